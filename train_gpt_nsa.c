// train_gpt_nsa.c: a GQA transformer with native sparse attention in plain C, and its training loop.
// It is the definition of every layer: the GPU trainer is tested against it. From top to bottom:
// the layers, the model, then what the program does.
#include "train_gpt_nsa.h"
#include "llmc/matmul.h"
#include <assert.h>
#include <math.h>
#include <string.h>

#ifdef GPT_DOUBLE
#define EXP exp
#define SQRT sqrt
#else
#define EXP expf
#define SQRT sqrtf
#endif

// ---------------------------------------------------------------------------------------------
// Layers

void embedding_forward(real *out, const int32_t *tokens, const real *table, int64_t n, int c) {
    for (int64_t i = 0; i < n; i++) memcpy(out + i * c, table + (int64_t)tokens[i] * c, sizeof(real) * c);
}

void embedding_backward(real *dtable, const int32_t *tokens, const real *dout, int64_t n, int c) {
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < c; j++) dtable[(int64_t)tokens[i] * c + j] += dout[i * c + j];
    }
}

void rmsnorm_forward(real *out, real *rstd, const real *x, const real *weight, int64_t n, int c, double eps) {
#pragma omp parallel for if (n * c > 20000)
    for (int64_t i = 0; i < n; i++) {
        const real *xi = x + i * c;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < c; j++) sum += xi[j] * xi[j];
        rstd[i] = 1 / SQRT(sum / c + (real)eps);
        for (int j = 0; j < c; j++) out[i * c + j] = xi[j] * rstd[i] * weight[j];
    }
}

void rmsnorm_backward(real *dx, real *dweight, const real *dout, const real *x, const real *weight,
                      const real *rstd, int64_t n, int c) {
    // with y = x * rstd: dx = rstd * (w*dout - y * mean(w*dout*y))
#pragma omp parallel for if (n * c > 20000)
    for (int64_t i = 0; i < n; i++) {
        const real *xi = x + i * c, *doi = dout + i * c;
        real mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int j = 0; j < c; j++) mean += weight[j] * doi[j] * xi[j];
        mean *= rstd[i] / c;
        for (int j = 0; j < c; j++) dx[i * c + j] += rstd[i] * (weight[j] * doi[j] - xi[j] * rstd[i] * mean);
    }
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < c; j++) dweight[j] += dout[i * c + j] * x[i * c + j] * rstd[i];
    }
}

void linear_forward(real *out, const real *x, const real *weight, const real *bias, int64_t n, int c, int o) {
    matmul(out, (MatmulOperand){x, c, 1}, (MatmulOperand){weight, 1, c}, n, o, c, 0);
    if (!bias) return;
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < o; j++) out[i * o + j] += bias[j];
    }
}

void linear_backward(real *dx, int add_dx, real *dweight, real *dbias, const real *dout, const real *x,
                     const real *weight, int64_t n, int c, int o) {
    matmul(dx, (MatmulOperand){dout, o, 1}, (MatmulOperand){weight, c, 1}, n, c, o, add_dx);
    matmul(dweight, (MatmulOperand){dout, 1, o}, (MatmulOperand){x, c, 1}, o, c, n, 1);
    if (!dbias) return;
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < o; j++) dbias[j] += dout[i * o + j];
    }
}

void swiglu_forward(real *out, const real *gate_up, int64_t n, int h) {
#pragma omp parallel for if (n * h > 20000)
    for (int64_t i = 0; i < n; i++) {
        const real *gate = gate_up + i * 2 * h, *up = gate + h;
        for (int j = 0; j < h; j++) out[i * h + j] = gate[j] / (1 + EXP(-gate[j])) * up[j];
    }
}

void swiglu_backward(real *dgate_up, const real *dout, const real *gate_up, int64_t n, int h) {
#pragma omp parallel for if (n * h > 20000)
    for (int64_t i = 0; i < n; i++) {
        const real *gate = gate_up + i * 2 * h, *up = gate + h;
        real *dgate = dgate_up + i * 2 * h, *dup = dgate + h;
        for (int j = 0; j < h; j++) {
            real s = 1 / (1 + EXP(-gate[j])), d = dout[i * h + j];
            dup[j] = d * gate[j] * s;
            dgate[j] = d * up[j] * s * (1 + gate[j] * (1 - s)); // silu' = s + x s (1 - s)
        }
    }
}

void crossentropy_forward(real *losses, real *lse, int32_t *best, const real *logits, const int32_t *targets,
                          int64_t n, int v, int vp) {
#pragma omp parallel for if (n * v > 20000)
    for (int64_t i = 0; i < n; i++) {
        const real *row = logits + i * vp;
        best[i] = 0;
        for (int j = 1; j < v; j++) {
            if (row[j] > row[best[i]]) best[i] = j;
        }
        real max = row[best[i]], sum = 0;
        for (int j = 0; j < v; j++) sum += EXP(row[j] - max);
        lse[i] = max + (real)log((double)sum);
        losses[i] = lse[i] - row[targets[i]];
    }
}

void crossentropy_backward(real *logits, const real *lse, const int32_t *targets, real dloss, int64_t n,
                           int v, int vp) {
#pragma omp parallel for if (n * v > 20000)
    for (int64_t i = 0; i < n; i++) {
        real *row = logits + i * vp;
        for (int j = 0; j < v; j++) row[j] = dloss * EXP(row[j] - lse[i]);
        row[targets[i]] -= dloss;
        for (int j = v; j < vp; j++) row[j] = 0;
    }
}

// ---------------------------------------------------------------------------------------------
// The model

static int64_t tensor_offset(const GPT *model, int layer, const char *name) {
    for (int64_t i = 0; i < model->num_tensors; i++) {
        const ParamTensor *t = &model->tensors[i];
        const char *dot = strrchr(t->name, '.');
        if (t->layer == layer && strcmp(dot ? dot + 1 : t->name, name) == 0) return t->offset;
    }
    return -1;
}

// The tensor at `offset` of params or grads; NULL where the model has none.
static real *at(real *base, int64_t offset) {
    return offset < 0 ? NULL : base + offset;
}

static void *take(GPT *model, size_t count, size_t size) {
    model->bytes += count * size;
    return xcalloc(count, size);
}

// Every attention mode keeps its arrays in a State; full and window use a part of it.
static void place_attention(GPT *model, LayerActs *a, int64_t n) {
    const FsaConfig *f = &model->config.fsa;
    if (model->config.attn == ATTN_NSA) {
        size_t bytes = GPT_REF(state_layout)(&a->att_state, f, n, n, n, NULL);
        GPT_REF(state_layout)(&a->att_state, f, n, n, n, take(model, bytes, 1));
        return;
    }
    a->att_state.q = take(model, n * f->q_heads * f->head_dim, sizeof(real));
    a->att_state.k = take(model, n * f->kv_heads * f->head_dim, sizeof(real));
    a->att_state.lse[0] = take(model, n * f->q_heads, sizeof(real));
}

void gpt_build(GPT *model, const ModelConfig *config, int64_t n, int training) {
    memset(model, 0, sizeof *model);
    model->config = *config;
    model->max_tokens = n;
    const FsaConfig *f = &model->config.fsa;
    int64_t C = config->channels, d = f->head_dim, qd = f->q_heads * d, kd = f->kv_heads * d,
            H = config->hidden;
    int64_t gates = f->gate_per_token ? 3 : 3 * f->q_heads;

    model->inv_freq = take(model, d / 2, sizeof(double));
    rope_inv_freq(config, model->inv_freq);
    model->num_tensors = param_table(config, NULL, &model->num_params);
    model->tensors = take(model, model->num_tensors, sizeof(ParamTensor));
    param_table(config, model->tensors, &model->num_params);
    model->wte = tensor_offset(model, -1, "wte");
    model->lnf = tensor_offset(model, -1, "lnf");
    model->lm_head = config->tied ? model->wte : tensor_offset(model, -1, "lm_head");
    model->layers = take(model, config->layers, sizeof(LayerOffsets));
    model->acts = take(model, config->layers, sizeof(LayerActs));
    for (int l = 0; l < config->layers; l++) {
        LayerOffsets *o = &model->layers[l];
#define OFFSET(name) o->name = tensor_offset(model, l, #name)
        OFFSET(ln1), OFFSET(wqkv), OFFSET(bqkv), OFFSET(qnorm), OFFSET(knorm), OFFSET(phi_wk), OFFSET(phi_pe);
        OFFSET(phi_wv), OFFSET(wgate), OFFSET(wo), OFFSET(ln2), OFFSET(wgu), OFFSET(wdown);
#undef OFFSET
        LayerActs *a = &model->acts[l];
        a->in = take(model, n * C, sizeof(real));
        a->ln1 = take(model, n * C, sizeof(real));
        a->rstd1 = take(model, n, sizeof(real));
        a->q = take(model, n * qd, sizeof(real));
        a->k = take(model, n * kd, sizeof(real));
        a->v = take(model, n * kd, sizeof(real));
        a->q_raw = a->q;
        a->k_raw = a->k;
        if (config->qk_norm) {
            a->q_raw = take(model, n * qd, sizeof(real));
            a->k_raw = take(model, n * kd, sizeof(real));
            a->rstd_q = take(model, n * f->q_heads, sizeof(real));
            a->rstd_k = take(model, n * f->kv_heads, sizeof(real));
        }
        if (config->attn == ATTN_NSA) a->gate = take(model, n * gates, sizeof(real));
        place_attention(model, a, n);
        a->att = take(model, n * qd, sizeof(real));
        a->mid = take(model, n * C, sizeof(real));
        a->ln2 = take(model, n * C, sizeof(real));
        a->rstd2 = take(model, n, sizeof(real));
        a->gate_up = take(model, n * 2 * H, sizeof(real));
        a->act = take(model, n * H, sizeof(real));
    }
    model->params = take(model, model->num_params, sizeof(real));
    model->out = take(model, n * C, sizeof(real));
    model->lnf_out = take(model, n * C, sizeof(real));
    model->rstdf = take(model, n, sizeof(real));
    model->logits = take(model, n * config->padded_vocab, sizeof(real));
    model->losses = take(model, n, sizeof(real));
    model->lse = take(model, n, sizeof(real));
    model->best = take(model, n, sizeof(int32_t));
    model->segments = take(model, n, sizeof(FsaSegment));
    if (!training) return;
    model->grads = take(model, model->num_params, sizeof(real));
    model->m = take(model, model->num_params, sizeof(real));
    model->v = take(model, model->num_params, sizeof(real));
    model->dout = take(model, n * C, sizeof(real));
    model->dnorm = take(model, n * C, sizeof(real));
    model->dq = take(model, n * qd, sizeof(real));
    model->dk = take(model, n * kd, sizeof(real));
    model->dv = take(model, n * kd, sizeof(real));
    model->datt = take(model, n * qd, sizeof(real));
    model->dgate = take(model, n * gates, sizeof(real));
    model->dgate_up = take(model, n * 2 * H, sizeof(real));
    model->dact = take(model, n * H, sizeof(real));
}

void gpt_free(GPT *model) {
    for (int l = 0; l < model->config.layers; l++) {
        LayerActs *a = &model->acts[l];
        if (a->q_raw != a->q) free(a->q_raw), free(a->k_raw), free(a->rstd_q), free(a->rstd_k);
        free(a->in), free(a->ln1), free(a->rstd1), free(a->q), free(a->k), free(a->v), free(a->gate);
        if (model->config.attn != ATTN_NSA) free(a->att_state.k), free(a->att_state.lse[0]);
        free(a->att_state.q); // the first array of a State, so of its whole memory
        free(a->att), free(a->mid), free(a->ln2), free(a->rstd2), free(a->gate_up), free(a->act);
    }
    free(model->inv_freq), free(model->tensors), free(model->layers), free(model->acts), free(model->params);
    free(model->out), free(model->lnf_out), free(model->rstdf), free(model->logits), free(model->losses);
    free(model->lse), free(model->best), free(model->segments), free(model->grads), free(model->m);
    free(model->v), free(model->dout), free(model->dnorm), free(model->dq), free(model->dk), free(model->dv);
    free(model->datt), free(model->dgate), free(model->dgate_up), free(model->dact);
    memset(model, 0, sizeof *model);
}

static GPT_REF(PhiWeights) layer_phi(const GPT *model, int l) {
    const LayerOffsets *o = &model->layers[l];
    return (GPT_REF(PhiWeights)){at(model->params, o->phi_wk), at(model->params, o->phi_pe),
                          at(model->params, o->phi_wv)};
}

static void attention_forward(GPT *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    LayerActs *a = &model->acts[l];
    GPT_REF(State) *s = &a->att_state;
    if (c->attn == ATTN_NSA) {
        GPT_REF(PhiWeights) phi = layer_phi(model, l);
        GPT_REF(forward)
        (f, &model->batch, a->q, a->k, a->v, &phi, model->inv_freq, a->gate, a->choice, s, a->att);
        return;
    }
    memcpy(s->q, a->q, sizeof(real) * model->n * f->q_heads * f->head_dim);
    memcpy(s->k, a->k, sizeof(real) * model->n * f->kv_heads * f->head_dim);
    GPT_REF(rope_queries)(f, &model->batch, s->q, model->inv_freq, 0);
    GPT_REF(rope_keys)(f, &model->batch, s->k, model->inv_freq, 0);
    GPT_REF(attention_forward)
    (f, &model->batch, c->attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW, s->q, s->k, a->v, NULL, a->att,
     s->lse[0]);
}

// datt -> dq, dk, dv (overwritten), and the gradients of the gate's logits and of phi.
static void attention_backward(GPT *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const LayerOffsets *o = &model->layers[l];
    LayerActs *a = &model->acts[l];
    GPT_REF(State) *s = &a->att_state;
    if (c->attn == ATTN_NSA) {
        GPT_REF(PhiWeights) phi = layer_phi(model, l);
        GPT_REF(PhiGradients)
        dphi = {at(model->grads, o->phi_wk), at(model->grads, o->phi_pe), at(model->grads, o->phi_wv)};
        memset(model->dgate, 0, sizeof(real) * model->n * (f->gate_per_token ? 3 : 3 * f->q_heads));
        GPT_REF(backward)
        (f, &model->batch, a->k, a->v, &phi, model->inv_freq, a->gate, s, model->datt, model->dq, model->dk,
         model->dv, &dphi, model->dgate);
        return;
    }
    memset(model->dq, 0, sizeof(real) * model->n * f->q_heads * f->head_dim);
    memset(model->dk, 0, sizeof(real) * model->n * f->kv_heads * f->head_dim);
    memset(model->dv, 0, sizeof(real) * model->n * f->kv_heads * f->head_dim);
    GPT_REF(attention_backward)
    (f, &model->batch, c->attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW, s->q, s->k, a->v, NULL, a->att,
     s->lse[0], model->datt, model->dq, model->dk, model->dv);
    GPT_REF(rope_queries)(f, &model->batch, model->dq, model->inv_freq, 1);
    GPT_REF(rope_keys)(f, &model->batch, model->dk, model->inv_freq, 1);
}

// A layer's output goes into `out` [n, C], the next layer's input.
static void layer_forward(GPT *model, int l, real *out) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const LayerOffsets *o = &model->layers[l];
    LayerActs *a = &model->acts[l];
    real *p = model->params;
    int64_t n = model->n;
    int C = c->channels, d = f->head_dim, qd = f->q_heads * d, kd = f->kv_heads * d, H = c->hidden;
    const real *wqkv = p + o->wqkv, *bias = at(p, o->bqkv);

    rmsnorm_forward(a->ln1, a->rstd1, a->in, p + o->ln1, n, C, c->norm_eps);
    linear_forward(a->q_raw, a->ln1, wqkv, bias, n, C, qd);
    linear_forward(a->k_raw, a->ln1, wqkv + (int64_t)qd * C, bias ? bias + qd : NULL, n, C, kd);
    linear_forward(a->v, a->ln1, wqkv + (int64_t)(qd + kd) * C, bias ? bias + qd + kd : NULL, n, C, kd);
    if (c->qk_norm) {
        rmsnorm_forward(a->q, a->rstd_q, a->q_raw, p + o->qnorm, n * f->q_heads, d, c->norm_eps);
        rmsnorm_forward(a->k, a->rstd_k, a->k_raw, p + o->knorm, n * f->kv_heads, d, c->norm_eps);
    }
    if (a->gate)
        linear_forward(a->gate, a->ln1, p + o->wgate, NULL, n, C, f->gate_per_token ? 3 : 3 * f->q_heads);
    attention_forward(model, l);
    linear_forward(a->mid, a->att, p + o->wo, NULL, n, qd, C);
    for (int64_t i = 0; i < n * C; i++) a->mid[i] += a->in[i];
    rmsnorm_forward(a->ln2, a->rstd2, a->mid, p + o->ln2, n, C, c->norm_eps);
    linear_forward(a->gate_up, a->ln2, p + o->wgu, NULL, n, C, 2 * H);
    swiglu_forward(a->act, a->gate_up, n, H);
    linear_forward(out, a->act, p + o->wdown, NULL, n, H, C);
    for (int64_t i = 0; i < n * C; i++) out[i] += a->mid[i];
}

// model->dout [n, C] is the gradient of the layer's output, and becomes that of its input.
static void layer_backward(GPT *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const LayerOffsets *o = &model->layers[l];
    LayerActs *a = &model->acts[l];
    real *p = model->params, *g = model->grads, *dout = model->dout, *dnorm = model->dnorm;
    int64_t n = model->n;
    int C = c->channels, d = f->head_dim, qd = f->q_heads * d, kd = f->kv_heads * d, H = c->hidden;
    int64_t k_at = o->wqkv + (int64_t)qd * C, v_at = k_at + (int64_t)kd * C;
    real *dbias = at(g, o->bqkv);

    linear_backward(model->dact, 0, g + o->wdown, NULL, dout, a->act, p + o->wdown, n, H, C);
    swiglu_backward(model->dgate_up, model->dact, a->gate_up, n, H);
    linear_backward(dnorm, 0, g + o->wgu, NULL, model->dgate_up, a->ln2, p + o->wgu, n, C, 2 * H);
    rmsnorm_backward(dout, g + o->ln2, dnorm, a->mid, p + o->ln2, a->rstd2, n, C);
    linear_backward(model->datt, 0, g + o->wo, NULL, dout, a->att, p + o->wo, n, qd, C);
    attention_backward(model, l);
    if (c->qk_norm) { // of the raw q and k, in the same arrays: q and k are no longer needed
        memset(a->q, 0, sizeof(real) * n * qd);
        memset(a->k, 0, sizeof(real) * n * kd);
        rmsnorm_backward(a->q, g + o->qnorm, model->dq, a->q_raw, p + o->qnorm, a->rstd_q, n * f->q_heads, d);
        rmsnorm_backward(a->k, g + o->knorm, model->dk, a->k_raw, p + o->knorm, a->rstd_k, n * f->kv_heads,
                         d);
    }
    const real *dq = c->qk_norm ? a->q : model->dq, *dk = c->qk_norm ? a->k : model->dk;
    linear_backward(dnorm, 0, g + o->wqkv, dbias, dq, a->ln1, p + o->wqkv, n, C, qd);
    linear_backward(dnorm, 1, g + k_at, dbias ? dbias + qd : NULL, dk, a->ln1, p + k_at, n, C, kd);
    linear_backward(dnorm, 1, g + v_at, dbias ? dbias + qd + kd : NULL, model->dv, a->ln1, p + v_at, n, C,
                    kd);
    if (a->gate) {
        linear_backward(dnorm, 1, g + o->wgate, NULL, model->dgate, a->ln1, p + o->wgate, n, C,
                        f->gate_per_token ? 3 : 3 * f->q_heads);
    }
    rmsnorm_backward(dout, g + o->ln1, dnorm, a->in, p + o->ln1, a->rstd1, n, C);
}

double gpt_forward(GPT *model, const int32_t *tokens, const int32_t *targets, const int64_t *cu_seqlens,
                   int64_t num_seqs) {
    const ModelConfig *c = &model->config;
    int64_t n = model->n = cu_seqlens[num_seqs];
    assert(n <= model->max_tokens);
    model->tokens = tokens;
    model->targets = targets;
    for (int64_t s = 0; s < num_seqs; s++) {
        model->segments[s] = (FsaSegment){s, 0, cu_seqlens[s + 1] - cu_seqlens[s]};
    }
    model->batch = (FsaBatch){num_seqs, cu_seqlens, num_seqs, model->segments};

    embedding_forward(model->acts[0].in, tokens, model->params + model->wte, n, c->channels);
    for (int l = 0; l < c->layers; l++)
        layer_forward(model, l, l + 1 < c->layers ? model->acts[l + 1].in : model->out);
    rmsnorm_forward(model->lnf_out, model->rstdf, model->out, model->params + model->lnf, n, c->channels,
                    c->norm_eps);
    const real *lm_head = model->params + model->lm_head;
    if (!targets) {
        linear_forward(model->logits, model->lnf_out + (n - 1) * c->channels, lm_head, NULL, 1, c->channels,
                       c->padded_vocab);
        return 0;
    }
    linear_forward(model->logits, model->lnf_out, lm_head, NULL, n, c->channels, c->padded_vocab);
    crossentropy_forward(model->losses, model->lse, model->best, model->logits, targets, n, c->vocab_size,
                         c->padded_vocab);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += model->losses[i];
    return sum / n;
}

void gpt_backward(GPT *model, double loss_scale) {
    const ModelConfig *c = &model->config;
    int64_t n = model->n;
    crossentropy_backward(model->logits, model->lse, model->targets, (real)(loss_scale / n), n, c->vocab_size,
                          c->padded_vocab);
    linear_backward(model->dnorm, 0, model->grads + model->lm_head, NULL, model->logits, model->lnf_out,
                    model->params + model->lm_head, n, c->channels, c->padded_vocab);
    memset(model->dout, 0, sizeof(real) * n * c->channels);
    rmsnorm_backward(model->dout, model->grads + model->lnf, model->dnorm, model->out,
                     model->params + model->lnf, model->rstdf, n, c->channels);
    for (int l = c->layers - 1; l >= 0; l--) layer_backward(model, l);
    embedding_backward(model->grads + model->wte, model->tokens, model->dout, n, c->channels);
}

void gpt_zero_grad(GPT *model) {
    memset(model->grads, 0, sizeof(real) * model->num_params);
}

double gpt_grad_norm(const GPT *model) {
    double sum = 0;
    for (int64_t i = 0; i < model->num_params; i++) sum += (double)model->grads[i] * model->grads[i];
    return sqrt(sum);
}

void gpt_update(GPT *model, int64_t step, double lr, double beta1, double beta2, double eps,
                double weight_decay, double grad_scale) {
    double correct1 = 1 - pow(beta1, (double)step), correct2 = 1 - pow(beta2, (double)step);
    for (int64_t t = 0; t < model->num_tensors; t++) {
        const ParamTensor *tensor = &model->tensors[t];
        real decay = (real)(tensor->decay ? lr * weight_decay : 0), rate = (real)(lr / correct1);
        real b1 = (real)beta1, b2 = (real)beta2, scale = (real)grad_scale;
        real root = (real)(1 / sqrt(correct2)), epsilon = (real)eps;
        real *p = model->params + tensor->offset, *m = model->m + tensor->offset,
             *v = model->v + tensor->offset;
        const real *g = model->grads + tensor->offset;
#pragma omp parallel for if (tensor->size > 20000)
        for (int64_t i = 0; i < tensor->size; i++) {
            real gi = g[i] * scale;
            m[i] = b1 * m[i] + (1 - b1) * gi;
            v[i] = b2 * v[i] + (1 - b2) * gi * gi;
            p[i] -= rate * m[i] / (SQRT(v[i]) * root + epsilon) + decay * p[i];
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The program

#ifndef GPT_NO_MAIN
#include "llmc/run.h"

static void evaluate(void *model, const Run *r, const float **losses, const int32_t **best) {
    GPT *gpt = model;
    gpt_forward(gpt, r->inputs, r->targets, r->cu_seqlens, r->num_seqs);
    *losses = gpt->losses;
    *best = gpt->best;
}

static const float *next_logits(void *model, const int32_t *tokens, int64_t n) {
    GPT *gpt = model;
    int64_t cu_seqlens[2] = {0, n};
    gpt_forward(gpt, tokens, NULL, cu_seqlens, 1);
    return gpt->logits;
}

// One step of AdamW over the step's micro-batches; fills everything of `line` but its times.
static void train_step(Run *r, GPT *gpt, TrainLine *line) {
    const Options *o = &r->opt;
    if (o->overfit) loader_seek(&r->train, 0, 0);
    gpt_zero_grad(gpt);
    double loss = 0;
    for (int64_t i = 0; i < r->micro_batches; i++) {
        run_batch(r, &r->train);
        loss +=
            gpt_forward(gpt, r->inputs, r->targets, r->cu_seqlens, r->num_seqs) / (double)r->micro_batches;
        gpt_backward(gpt, 1.0 / (double)r->micro_batches);
    }
    line->loss = loss;
    line->norm = gpt_grad_norm(gpt);
    line->lr = learning_rate(r->state.step, o->lr, o->warmup, o->max_steps, o->final_frac);
    if (run_step_is_good(r, loss, line->norm)) {
        double scale = o->clip > 0 && line->norm > o->clip ? o->clip / line->norm : 1;
        gpt_update(gpt, r->state.step + 1, line->lr, o->beta1, o->beta2, o->eps, o->weight_decay, scale);
    }
    line->step = run_step_done(r, r->train.epoch, r->train.position);
}

int main(int argc, char **argv) {
    static Run run;
    GPT gpt;
    run_start(&run, argc, argv);
    const Options *o = &run.opt;
    int training = !o->sample_only && !o->val_only;
    gpt_build(&gpt, &run.config, o->batch * o->seq_len, training);
    if (run.checkpoint[0]) {
        TrainState state;
        checkpoint_load(run.checkpoint, &run.config, &state, gpt.params, run.resuming ? gpt.m : NULL,
                        run.resuming ? gpt.v : NULL, gpt.num_params);
    } else {
        params_init(&run.config, gpt.params, (uint64_t)o->seed);
    }
    run_print(&run, gpt.num_params, gpt.bytes);
    if (o->sample_only) run_sample(&run, next_logits, &gpt);
    if (o->val_only) run_validate(&run, evaluate, &gpt);

    if (training) {
        run_catch_signals();
        if (run.resuming && run.state.step < o->max_steps) {
            printf("going on after step %lld of %lld\n", (long long)run.state.step, (long long)o->max_steps);
        } else if (run.resuming) {
            printf("all %lld steps are done; -x with more than %lld goes on\n", (long long)o->max_steps,
                   (long long)run.state.step);
        }
        int64_t first = run.state.step;
        double seconds = 0; // in steps
        for (int fresh = 1;; fresh = 0) {
            Cadence due = cadence_at(o, run.state.step);
            if (due.save && !fresh) run_save(&run, gpt.params, gpt.m, gpt.v, gpt.num_params);
            if (due.validate) run_validate(&run, evaluate, &gpt);
            if (due.sample) run_sample(&run, next_logits, &gpt);
            if (run.state.step >= o->max_steps || run_signal) break;
            TrainLine line = {.memory_bytes = (int64_t)gpt.bytes};
            double start = now_seconds();
            train_step(&run, &gpt, &line);
            double took = now_seconds() - start;
            seconds += took;
            line.ms = took * 1e3;
            line.tokens_per_second = (double)run.state.total_batch / took;
            logger_train(&run.log, &line, o->max_steps,
                         eta_seconds(seconds, run.state.step - first, o->max_steps - run.state.step));
        }
        if (run_signal) {
            if (o->output) run_save(&run, gpt.params, gpt.m, gpt.v, gpt.num_params);
            printf("stopped by signal %d after step %lld%s\n", (int)run_signal, (long long)run.state.step,
                   o->output ? "; -y 1 goes on from here" : "");
        }
    }
    gpt_free(&gpt);
    run_end(&run);
    return run_signal ? 128 + run_signal : 0;
}
#endif
