// param_layout.h: where each tensor of a model is in the flat arrays of its weights and gradients.
#ifndef LLMC_PARAM_LAYOUT_H
#define LLMC_PARAM_LAYOUT_H
#include "config.h"

// Offsets of a layer's tensors; -1 if the layer has no such tensor. param_table (config.h) has their shapes.
typedef struct {
    int64_t ln1, wqkv, wgate, bqkv, bgate, qnorm, knorm, phi_wk, phi_pe, phi_wv, wo, ln2, wgu, wdown;
} LayerParams;

typedef struct {
    int64_t num_params;        // elements of all tensors, padding included
    int64_t num_tensors;       // number of tensors
    ParamTensor *tensors;      // [num_tensors] in the order of their offsets
    int64_t wte, lnf, lm_head; // offsets; lm_head = wte if tied
    LayerParams *layers;       // [layers]
} ParamLayout;

// Returns whether matmuls are the first to write the gradient of tensor t, each element once: the linear
// layers' weights and the LM head. They can overwrite it. The other gradients are only added to, from zeros.
static inline int param_is_linear(const ParamLayout *p, const ParamTensor *t) {
    return param_is(t, "wqkv") || param_is(t, "wgate") || param_is(t, "wo") || param_is(t, "wgu") ||
           param_is(t, "wdown") || t->offset == p->lm_head;
}

// Returns the offset of a layer's tensor `name`, or -1; layer -1: a tensor outside the layers.
static inline int64_t param_offset(const ParamLayout *p, int layer, const char *name) {
    for (int64_t i = 0; i < p->num_tensors; i++) {
        const ParamTensor *t = &p->tensors[i];
        if (t->layer == layer && param_is(t, name)) return t->offset;
    }
    return -1;
}

// Builds the layout of a model's tensors. Returns the bytes of its arrays.
static inline size_t param_layout_build(ParamLayout *p, const ModelConfig *c) {
    p->num_tensors = param_table(c, NULL, &p->num_params);
    p->tensors = (ParamTensor *)xcalloc((size_t)p->num_tensors, sizeof *p->tensors);
    p->layers = (LayerParams *)xcalloc((size_t)c->layers, sizeof *p->layers);
    param_table(c, p->tensors, &p->num_params);
    p->wte = param_offset(p, -1, "wte");
    p->lnf = param_offset(p, -1, "lnf");
    p->lm_head = c->tied ? p->wte : param_offset(p, -1, "lm_head");
    for (int l = 0; l < c->layers; l++) {
        LayerParams *w = &p->layers[l];
#define OFFSET(name) w->name = param_offset(p, l, #name)
        OFFSET(ln1), OFFSET(wqkv), OFFSET(wgate), OFFSET(bqkv), OFFSET(bgate), OFFSET(qnorm), OFFSET(knorm);
        OFFSET(phi_wk), OFFSET(phi_pe), OFFSET(phi_wv), OFFSET(wo), OFFSET(ln2), OFFSET(wgu), OFFSET(wdown);
#undef OFFSET
    }
    return (size_t)p->num_tensors * sizeof *p->tensors + (size_t)c->layers * sizeof *p->layers;
}

// Returns the offset of the first tensor after layer l.
static inline int64_t param_after_layer(const ParamLayout *p, const ModelConfig *c, int l) {
    return l + 1 < c->layers ? p->layers[l + 1].ln1 : p->lnf;
}

static inline void param_layout_free(ParamLayout *p) {
    free(p->tensors), free(p->layers);
    memset(p, 0, sizeof *p);
}
#endif
