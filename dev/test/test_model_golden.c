// test_model_golden.c: tests the C model, in double, against PyTorch's autograd. Built with -DGPT_DOUBLE;
// train_gpt_nsa.c is built with -DGPT_NO_MAIN -DGPT_DOUBLE.
#include "golden.h"
#include "../../train_gpt_nsa.h"

static const double tolerance = 1e-10;

// Returns the elements of a tensor without padding: of the vocabulary, or of the gate's bias.
static int64_t real_size(const ModelConfig *c, const ParamTensor *t) {
    if (param_is(t, "wte") || param_is(t, "lm_head")) return c->vocab_size * t->cols;
    return param_is(t, "bgate") ? num_gate_logits(&c->fsa) : t->size;
}

static void test_case(const char *name) {
    Golden file, *g = &file;
    golden_load(g, name);
    ModelConfig c;
    memset(&c, 0, sizeof c);
    int fields;
    const ModelField *field = model_fields(&fields);
    for (int i = 0; i < fields; i++)
        model_field_set(&c, &field[i], golden_get(g, 'f', "config.", field[i].name)->f[0]);
    char message[256];
    int bad = config_check(&c, message, sizeof message);
    CHECK(!bad, "%s: %s", name, message);
    if (bad) return;

    const int64_t *cu_seqlens = golden_ints(g, "cu_seqlens");
    const int64_t num_seqs = golden_get(g, 'i', "", "cu_seqlens")->size - 1, n = cu_seqlens[num_seqs];
    int32_t *tokens = (int32_t *)xmalloc((size_t)n * 2 * sizeof *tokens), *targets = tokens + n;
    for (int64_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)golden_ints(g, "tokens")[i];
        targets[i] = (int32_t)golden_ints(g, "targets")[i];
    }
    Model model;
    model_build(&model, &c, n, 1);
    golden_check(g, "", "inv_freq", model.inv_freq, c.fsa.head_dim / 2, tolerance);
    // the padding must not matter, so it is not 0
    for (int64_t i = 0; i < model.layout.num_params; i++) model.params.weights[i] = 0.5;
    for (int64_t i = 0; i < model.layout.num_tensors; i++) {
        const ParamTensor *t = &model.layout.tensors[i];
        golden_fill(g, t->name, model.params.weights + t->offset, real_size(&c, t));
    }

    double loss = model_forward(&model, tokens, targets, cu_seqlens, num_seqs);
    golden_check(g, "", "loss", &loss, 1, tolerance);
    golden_check(g, "", "losses", model.acts.losses, n, tolerance);
    double *logits = (double *)xmalloc((size_t)(n * c.vocab_size) * sizeof *logits);
    for (int64_t i = 0; i < n; i++)
        memcpy(logits + i * c.vocab_size, model.acts.logits + i * c.padded_vocab,
               (size_t)c.vocab_size * sizeof *logits);
    golden_check(g, "", "logits", logits, n * c.vocab_size, tolerance);
    for (int layer = 0; layer < c.layers && c.attn == ATTN_NSA; layer++) {
        char indices[32];
        snprintf(indices, sizeof indices, "layers.%d.indices", layer);
        golden_check_ints(g, indices, model.acts.layers[layer].saved.block_indices,
                          c.fsa.kv_heads * n * c.fsa.topk);
    }

    model_zero_grad(&model);
    model_backward(&model, 1.0);
    for (int64_t i = 0; i < model.layout.num_tensors; i++) {
        const ParamTensor *t = &model.layout.tensors[i];
        golden_check(g, "grad.", t->name, model.params.grads + t->offset, real_size(&c, t), tolerance);
        int64_t nonzero = 0;
        for (int64_t j = real_size(&c, t); j < t->size; j++)
            nonzero += model.params.grads[t->offset + j] != 0;
        CHECK(nonzero == 0, "%s: %s: the padding has a gradient", name, t->name);
    }
    free(logits);
    free(tokens);
    model_free(&model);
    golden_free(g);
}

int main(void) {
    test_case("model_nsa");
    test_case("model_full");
    test_case("model_window");
    test_case("model_gpu");
    test_case("model_gpu_full");
    return test_end("model_golden");
}
