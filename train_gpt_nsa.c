// train_gpt_nsa.c: a GQA transformer with native sparse attention in plain C, and its training loop. It
// defines every layer: the GPU trainer is tested against it. From top to bottom: the layers, the model, the
// program.
//
// train_gpt_nsa.cu shares names with this file. train_gpt_nsa.h lists the exceptions, and says how a test has
// both.
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

void matmul_forward(real *out, const real *x, const real *weight, const real *bias, int64_t n, int c, int o) {
    matmul(out, (MatmulOperand){x, c, 1}, (MatmulOperand){weight, 1, c}, n, o, c, 0);
    if (!bias) return;
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < o; j++) out[i * o + j] += bias[j];
    }
}

void matmul_backward(real *dx, int add_dx, real *dweight, real *dbias, const real *dout, const real *x,
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

void crossentropy_forward(real *losses, real *lse, int32_t *argmax, const real *logits,
                          const int32_t *targets, int64_t n, int v, int vp) {
#pragma omp parallel for if (n * v > 20000)
    for (int64_t i = 0; i < n; i++) {
        const real *row = logits + i * vp;
        argmax[i] = 0;
        for (int j = 1; j < v; j++) {
            if (row[j] > row[argmax[i]]) argmax[i] = j;
        }
        real max = row[argmax[i]];
        double sum = 0; // in fp32, 50,000 terms one after another would lose 4e-5 of the loss
        for (int j = 0; j < v; j++) sum += EXP(row[j] - max);
        lse[i] = (real)(max + log(sum));
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

// Returns the tensor at `offset` of base, which is params or grads; NULL if the model has no such tensor.
static real *tensor_at(real *base, int64_t offset) {
    return offset < 0 ? NULL : base + offset;
}

// Dies because the model needs more than `limit` bytes. whose: of what the limit is.
static _Noreturn void die_out_of_memory(const Model *model, double limit, const char *whose) {
    const double gib = 1 << 30;
    double params = (model->training ? 4.0 : 1.0) * (double)model->layout.num_params * sizeof(real);
    double activations = model->needed - params;
    die("out of memory: %.2f GiB needed, %.2f GiB %s: %.2f GiB for %.1fM parameters%s, %.2f GiB for the "
        "activations of %lld tokens; lower %s, or choose a smaller model with -e or -layers",
        model->needed / gib, limit / gib, whose, params / gib, 1e-6 * (double)model->layout.num_params,
        model->training ? ", gradients and AdamW" : "", activations / gib, (long long)model->max_tokens,
        activations > params ? "-b or -t" : "-channels or -hidden");
}

// Returns count zeroed elements of `size` bytes, and counts them. While model->needed is 0 it only counts.
static void *model_alloc(Model *model, size_t count, size_t size) {
    model->bytes += count * size;
    if (model->needed == 0) return NULL;
    void *p = calloc(count > 0 ? count : 1, size);
    if (!p)
        die_out_of_memory(model, (double)(model->bytes - count * size), "granted by the system (ulimit -v)");
    return p;
}

// Allocates the State of layer l's attention. The modes full and window use q, k and one lse of it.
static void alloc_attention_state(Model *model, int l, int64_t n) {
    const FsaConfig *f = &model->config.fsa;
    LayerActivations *a = &model->acts.layers[l];
    if (layer_attention(&model->config, l) == ATTN_NSA) {
        size_t bytes = GPT_REF(state_layout)(&a->saved, f, n, n, n, NULL);
        GPT_REF(state_layout)(&a->saved, f, n, n, n, model_alloc(model, bytes, 1));
        return;
    }
    a->saved.q = model_alloc(model, n * f->q_heads * f->head_dim, sizeof(real));
    a->saved.k = model_alloc(model, n * f->kv_heads * f->head_dim, sizeof(real));
    a->saved.lse[0] = model_alloc(model, n * f->q_heads, sizeof(real));
}

// Allocates all arrays but the layout's, or only counts their bytes (model_alloc).
static void model_allocate(Model *model) {
    const ModelConfig *config = &model->config;
    const FsaConfig *f = &config->fsa;
    int64_t n = model->max_tokens, C = config->channels, d = f->head_dim, qd = f->q_heads * d,
            kd = f->kv_heads * d, H = config->hidden;

    model->inv_freq = model_alloc(model, d / 2, sizeof(double));
    for (int l = 0; l < config->layers; l++) {
        LayerActivations *a = &model->acts.layers[l];
        a->residual_in = model_alloc(model, n * C, sizeof(real));
        a->ln1 = model_alloc(model, n * C, sizeof(real));
        a->ln1_rstd = model_alloc(model, n, sizeof(real));
        a->q = model_alloc(model, n * qd, sizeof(real));
        a->k = model_alloc(model, n * kd, sizeof(real));
        a->v = model_alloc(model, n * kd, sizeof(real));
        a->q_raw = a->q;
        a->k_raw = a->k;
        if (config->qk_norm) {
            a->q_raw = model_alloc(model, n * qd, sizeof(real));
            a->k_raw = model_alloc(model, n * kd, sizeof(real));
            a->q_rstd = model_alloc(model, n * f->q_heads, sizeof(real));
            a->k_rstd = model_alloc(model, n * f->kv_heads, sizeof(real));
        }
        if (layer_attention(config, l) == ATTN_NSA)
            a->gate_logits = model_alloc(model, n * num_gate_logits(f), sizeof(real));
        alloc_attention_state(model, l, n);
        a->attn_out = model_alloc(model, n * qd, sizeof(real));
        a->residual_mid = model_alloc(model, n * C, sizeof(real));
        a->ln2 = model_alloc(model, n * C, sizeof(real));
        a->ln2_rstd = model_alloc(model, n, sizeof(real));
        a->gate_up = model_alloc(model, n * 2 * H, sizeof(real));
        a->swiglu = model_alloc(model, n * H, sizeof(real));
    }
    model->params.weights = model_alloc(model, model->layout.num_params, sizeof(real));
    model->acts.residual_out = model_alloc(model, n * C, sizeof(real));
    model->acts.lnf_out = model_alloc(model, n * C, sizeof(real));
    model->acts.lnf_rstd = model_alloc(model, n, sizeof(real));
    model->acts.logits = model_alloc(model, n * config->padded_vocab, sizeof(real));
    model->acts.losses = model_alloc(model, n, sizeof(real));
    model->acts.lse = model_alloc(model, n, sizeof(real));
    model->acts.argmax = model_alloc(model, n, sizeof(int32_t));
    model->segments = model_alloc(model, n, sizeof(FsaSegment));
    if (!model->training) return;
    model->params.grads = model_alloc(model, model->layout.num_params, sizeof(real));
    model->optimizer.m = model_alloc(model, model->layout.num_params, sizeof(real));
    model->optimizer.v = model_alloc(model, model->layout.num_params, sizeof(real));
    model->scratch.dresidual = model_alloc(model, n * C, sizeof(real));
    model->scratch.dnorm = model_alloc(model, n * C, sizeof(real));
    model->scratch.dq = model_alloc(model, n * qd, sizeof(real));
    model->scratch.dk = model_alloc(model, n * kd, sizeof(real));
    model->scratch.dv = model_alloc(model, n * kd, sizeof(real));
    model->scratch.dattn_out = model_alloc(model, n * qd, sizeof(real));
    model->scratch.dgate_logits = model_alloc(model, n * num_gate_logits(f), sizeof(real));
    model->scratch.dgate_up = model_alloc(model, n * 2 * H, sizeof(real));
    model->scratch.dswiglu = model_alloc(model, n * H, sizeof(real));
}

void model_build(Model *model, const ModelConfig *config, int64_t n, int training) {
    memset(model, 0, sizeof *model);
    model->config = *config;
    model->max_tokens = n;
    model->training = training;
    size_t bytes = param_layout_build(&model->layout, config) + config->layers * sizeof(LayerActivations);
    model->acts.layers = xcalloc(config->layers, sizeof(LayerActivations));
    model_allocate(model);
    model->needed = (double)(model->bytes + bytes);
    model->bytes = bytes;
    // Linux would grant more memory than the machine has, and kill the program later, without a message
    double memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (model->needed > memory) die_out_of_memory(model, memory, "in this machine");
    model_allocate(model);
    rope_inv_freq(config, model->inv_freq);
}

void model_free(Model *model) {
    for (int l = 0; l < model->config.layers; l++) {
        LayerActivations *a = &model->acts.layers[l];
        if (a->q_raw != a->q) free(a->q_raw), free(a->k_raw), free(a->q_rstd), free(a->k_rstd);
        free(a->residual_in), free(a->ln1), free(a->ln1_rstd), free(a->q), free(a->k), free(a->v),
            free(a->gate_logits);
        if (layer_attention(&model->config, l) != ATTN_NSA) free(a->saved.k), free(a->saved.lse[0]);
        free(a->saved.q); // with nsa q is the first array of the State's one allocation
        free(a->attn_out), free(a->residual_mid), free(a->ln2), free(a->ln2_rstd), free(a->gate_up),
            free(a->swiglu);
    }
    param_layout_free(&model->layout);
    free(model->inv_freq), free(model->acts.layers), free(model->params.weights);
    free(model->acts.residual_out), free(model->acts.lnf_out), free(model->acts.lnf_rstd),
        free(model->acts.logits), free(model->acts.losses);
    free(model->acts.lse), free(model->acts.argmax), free(model->segments), free(model->params.grads),
        free(model->optimizer.m);
    free(model->optimizer.v), free(model->scratch.dresidual), free(model->scratch.dnorm),
        free(model->scratch.dq), free(model->scratch.dk), free(model->scratch.dv);
    free(model->scratch.dattn_out), free(model->scratch.dgate_logits), free(model->scratch.dgate_up),
        free(model->scratch.dswiglu);
    memset(model, 0, sizeof *model);
}

static GPT_REF(PhiWeights) layer_phi(const Model *model, int l) {
    const LayerParams *w = &model->layout.layers[l];
    return (GPT_REF(PhiWeights)){tensor_at(model->params.weights, w->phi_wk),
                                 tensor_at(model->params.weights, w->phi_pe),
                                 tensor_at(model->params.weights, w->phi_wv)};
}

// q, k, v, gate_logits -> attn_out.
static void attention_forward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    LayerActivations *a = &model->acts.layers[l];
    GPT_REF(State) *s = &a->saved;
    const AttnMode attn = layer_attention(c, l);
    if (attn == ATTN_NSA) {
        GPT_REF(PhiWeights) phi = layer_phi(model, l);
        GPT_REF(forward)
        (f, &model->batch, a->q, a->k, a->v, &phi, model->inv_freq, a->gate_logits, a->block_indices, s,
         a->attn_out);
        return;
    }
    memcpy(s->q, a->q, sizeof(real) * model->n * f->q_heads * f->head_dim);
    memcpy(s->k, a->k, sizeof(real) * model->n * f->kv_heads * f->head_dim);
    GPT_REF(rope_queries)(f, &model->batch, s->q, model->inv_freq, 0);
    GPT_REF(rope_keys)(f, &model->batch, s->k, model->inv_freq, 0);
    GPT_REF(attention_forward)
    (f, &model->batch, attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW, s->q, s->k, a->v, NULL, a->attn_out,
     s->lse[0]);
}

// dattn_out -> dq, dk, dv and dgate_logits, which it overwrites; adds to the gradients of phi.
static void attention_backward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const LayerParams *w = &model->layout.layers[l];
    LayerActivations *a = &model->acts.layers[l];
    GPT_REF(State) *s = &a->saved;
    const AttnMode attn = layer_attention(c, l);
    if (attn == ATTN_NSA) {
        GPT_REF(PhiWeights) phi = layer_phi(model, l);
        GPT_REF(PhiGradients)
        dphi = {tensor_at(model->params.grads, w->phi_wk), tensor_at(model->params.grads, w->phi_pe),
                tensor_at(model->params.grads, w->phi_wv)};
        memset(model->scratch.dgate_logits, 0, sizeof(real) * model->n * num_gate_logits(f));
        GPT_REF(backward)
        (f, &model->batch, a->k, a->v, &phi, model->inv_freq, a->gate_logits, s, model->scratch.dattn_out,
         model->scratch.dq, model->scratch.dk, model->scratch.dv, &dphi, model->scratch.dgate_logits);
        return;
    }
    memset(model->scratch.dq, 0, sizeof(real) * model->n * f->q_heads * f->head_dim);
    memset(model->scratch.dk, 0, sizeof(real) * model->n * f->kv_heads * f->head_dim);
    memset(model->scratch.dv, 0, sizeof(real) * model->n * f->kv_heads * f->head_dim);
    GPT_REF(attention_backward)
    (f, &model->batch, attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW, s->q, s->k, a->v, NULL, a->attn_out,
     s->lse[0], model->scratch.dattn_out, model->scratch.dq, model->scratch.dk, model->scratch.dv);
    GPT_REF(rope_queries)(f, &model->batch, model->scratch.dq, model->inv_freq, 1);
    GPT_REF(rope_keys)(f, &model->batch, model->scratch.dk, model->inv_freq, 1);
}

// Runs layer l on its residual_in, and writes residual_out [n, C], the residual_in of the next layer.
static void layer_forward(Model *model, int l, real *residual_out) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const LayerParams *w = &model->layout.layers[l];
    LayerActivations *a = &model->acts.layers[l];
    real *p = model->params.weights;
    int64_t n = model->n;
    int C = c->channels, d = f->head_dim, qd = f->q_heads * d, kd = f->kv_heads * d, H = c->hidden;
    const real *wqkv = p + w->wqkv, *bias = tensor_at(p, w->bqkv);

    rmsnorm_forward(a->ln1, a->ln1_rstd, a->residual_in, p + w->ln1, n, C, c->norm_eps);
    matmul_forward(a->q_raw, a->ln1, wqkv, bias, n, C, qd);
    matmul_forward(a->k_raw, a->ln1, wqkv + (int64_t)qd * C, bias ? bias + qd : NULL, n, C, kd);
    matmul_forward(a->v, a->ln1, wqkv + (int64_t)(qd + kd) * C, bias ? bias + qd + kd : NULL, n, C, kd);
    if (c->qk_norm) {
        rmsnorm_forward(a->q, a->q_rstd, a->q_raw, p + w->qnorm, n * f->q_heads, d, c->norm_eps);
        rmsnorm_forward(a->k, a->k_rstd, a->k_raw, p + w->knorm, n * f->kv_heads, d, c->norm_eps);
    }
    if (a->gate_logits)
        matmul_forward(a->gate_logits, a->ln1, p + w->wgate, p + w->bgate, n, C, num_gate_logits(f));
    attention_forward(model, l);
    matmul_forward(a->residual_mid, a->attn_out, p + w->wo, NULL, n, qd, C);
    for (int64_t i = 0; i < n * C; i++) a->residual_mid[i] += a->residual_in[i];
    rmsnorm_forward(a->ln2, a->ln2_rstd, a->residual_mid, p + w->ln2, n, C, c->norm_eps);
    matmul_forward(a->gate_up, a->ln2, p + w->wgu, NULL, n, C, 2 * H);
    swiglu_forward(a->swiglu, a->gate_up, n, H);
    matmul_forward(residual_out, a->swiglu, p + w->wdown, NULL, n, H, C);
    for (int64_t i = 0; i < n * C; i++) residual_out[i] += a->residual_mid[i];
}

// Turns model->scratch.dresidual [n, C] from the gradient of layer l's output into that of its input; adds to
// the gradients of its parameters.
static void layer_backward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const LayerParams *w = &model->layout.layers[l];
    LayerActivations *a = &model->acts.layers[l];
    real *p = model->params.weights, *g = model->params.grads, *dresidual = model->scratch.dresidual,
         *dnorm = model->scratch.dnorm;
    int64_t n = model->n;
    int C = c->channels, d = f->head_dim, qd = f->q_heads * d, kd = f->kv_heads * d, H = c->hidden;
    // offsets of k's and v's rows in wqkv
    int64_t wk = w->wqkv + (int64_t)qd * C, wv = wk + (int64_t)kd * C;
    real *dbias = tensor_at(g, w->bqkv);

    matmul_backward(model->scratch.dswiglu, 0, g + w->wdown, NULL, dresidual, a->swiglu, p + w->wdown, n, H,
                    C);
    swiglu_backward(model->scratch.dgate_up, model->scratch.dswiglu, a->gate_up, n, H);
    matmul_backward(dnorm, 0, g + w->wgu, NULL, model->scratch.dgate_up, a->ln2, p + w->wgu, n, C, 2 * H);
    rmsnorm_backward(dresidual, g + w->ln2, dnorm, a->residual_mid, p + w->ln2, a->ln2_rstd, n, C);
    matmul_backward(model->scratch.dattn_out, 0, g + w->wo, NULL, dresidual, a->attn_out, p + w->wo, n, qd,
                    C);
    attention_backward(model, l);
    if (c->qk_norm) { // q and k are no longer needed: their arrays hold dq_raw and dk_raw
        memset(a->q, 0, sizeof(real) * n * qd);
        memset(a->k, 0, sizeof(real) * n * kd);
        rmsnorm_backward(a->q, g + w->qnorm, model->scratch.dq, a->q_raw, p + w->qnorm, a->q_rstd,
                         n * f->q_heads, d);
        rmsnorm_backward(a->k, g + w->knorm, model->scratch.dk, a->k_raw, p + w->knorm, a->k_rstd,
                         n * f->kv_heads, d);
    }
    const real *dq_raw = c->qk_norm ? a->q : model->scratch.dq,
               *dk_raw = c->qk_norm ? a->k : model->scratch.dk;
    matmul_backward(dnorm, 0, g + w->wqkv, dbias, dq_raw, a->ln1, p + w->wqkv, n, C, qd);
    matmul_backward(dnorm, 1, g + wk, dbias ? dbias + qd : NULL, dk_raw, a->ln1, p + wk, n, C, kd);
    matmul_backward(dnorm, 1, g + wv, dbias ? dbias + qd + kd : NULL, model->scratch.dv, a->ln1, p + wv, n, C,
                    kd);
    if (a->gate_logits) {
        matmul_backward(dnorm, 1, g + w->wgate, g + w->bgate, model->scratch.dgate_logits, a->ln1,
                        p + w->wgate, n, C, num_gate_logits(f));
    }
    rmsnorm_backward(dresidual, g + w->ln1, dnorm, a->residual_in, p + w->ln1, a->ln1_rstd, n, C);
}

double model_forward(Model *model, const int32_t *tokens, const int32_t *targets, const int64_t *cu_seqlens,
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

    embedding_forward(model->acts.layers[0].residual_in, tokens, model->params.weights + model->layout.wte, n,
                      c->channels);
    for (int l = 0; l < c->layers; l++)
        layer_forward(model, l,
                      l + 1 < c->layers ? model->acts.layers[l + 1].residual_in : model->acts.residual_out);
    rmsnorm_forward(model->acts.lnf_out, model->acts.lnf_rstd, model->acts.residual_out,
                    model->params.weights + model->layout.lnf, n, c->channels, c->norm_eps);
    const real *lm_head = model->params.weights + model->layout.lm_head;
    if (!targets) {
        matmul_forward(model->acts.logits, model->acts.lnf_out + (n - 1) * c->channels, lm_head, NULL, 1,
                       c->channels, c->padded_vocab);
        return 0;
    }
    matmul_forward(model->acts.logits, model->acts.lnf_out, lm_head, NULL, n, c->channels, c->padded_vocab);
    crossentropy_forward(model->acts.losses, model->acts.lse, model->acts.argmax, model->acts.logits, targets,
                         n, c->vocab_size, c->padded_vocab);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += model->acts.losses[i];
    return sum / n;
}

void model_backward(Model *model, double loss_scale) {
    const ModelConfig *c = &model->config;
    int64_t n = model->n;
    crossentropy_backward(model->acts.logits, model->acts.lse, model->targets, (real)(loss_scale / n), n,
                          c->vocab_size, c->padded_vocab);
    matmul_backward(model->scratch.dnorm, 0, model->params.grads + model->layout.lm_head, NULL,
                    model->acts.logits, model->acts.lnf_out, model->params.weights + model->layout.lm_head, n,
                    c->channels, c->padded_vocab);
    memset(model->scratch.dresidual, 0, sizeof(real) * n * c->channels);
    rmsnorm_backward(model->scratch.dresidual, model->params.grads + model->layout.lnf, model->scratch.dnorm,
                     model->acts.residual_out, model->params.weights + model->layout.lnf,
                     model->acts.lnf_rstd, n, c->channels);
    for (int l = c->layers - 1; l >= 0; l--) layer_backward(model, l);
    embedding_backward(model->params.grads + model->layout.wte, model->tokens, model->scratch.dresidual, n,
                       c->channels);
}

void model_zero_grad(Model *model) {
    memset(model->params.grads, 0, sizeof(real) * model->layout.num_params);
}

double model_grad_norm(const Model *model) {
    double sum = 0;
    for (int64_t i = 0; i < model->layout.num_params; i++)
        sum += (double)model->params.grads[i] * model->params.grads[i];
    return sqrt(sum);
}

void model_update(Model *model, int64_t step, double lr, double beta1, double beta2, double eps,
                  double weight_decay, double grad_scale) {
    double bias_correction1 = 1 - pow(beta1, (double)step), bias_correction2 = 1 - pow(beta2, (double)step);
    for (int64_t t = 0; t < model->layout.num_tensors; t++) {
        const ParamTensor *tensor = &model->layout.tensors[t];
        real decay = (real)(tensor->decay ? lr * weight_decay : 0), step_size = (real)(lr / bias_correction1);
        real b1 = (real)beta1, b2 = (real)beta2, scale = (real)grad_scale;
        real inv_sqrt_bias_correction2 = (real)(1 / sqrt(bias_correction2)), epsilon = (real)eps;
        real *p = model->params.weights + tensor->offset, *m = model->optimizer.m + tensor->offset,
             *v = model->optimizer.v + tensor->offset;
        const real *g = model->params.grads + tensor->offset;
#pragma omp parallel for if (tensor->size > 20000)
        for (int64_t i = 0; i < tensor->size; i++) {
            real gi = g[i] * scale;
            m[i] = b1 * m[i] + (1 - b1) * gi;
            v[i] = b2 * v[i] + (1 - b2) * gi * gi;
            p[i] -= step_size * m[i] / (SQRT(v[i]) * inv_sqrt_bias_correction2 + epsilon) + decay * p[i];
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The program

#ifndef GPT_NO_MAIN
#include "llmc/run.h"

// run_validate's callback: losses and argmax of the batch in r.
static void evaluate(void *arg, const Run *r, const float **losses, const int32_t **argmax) {
    Model *model = arg;
    model_forward(model, r->inputs, r->targets, r->cu_seqlens, r->num_seqs);
    for (int l = 0; r->gates && l < model->config.layers; l++) {
        if (model->acts.layers[l].gate_logits)
            gate_sums_add(&r->gates[l], model->acts.layers[l].gate_logits,
                          model->n * num_gate_logits(&model->config.fsa) / GATE_BRANCHES);
    }
    *losses = model->acts.losses;
    *argmax = model->acts.argmax;
}

// run_sample's callback: the logits of the token after tokens [n].
static const float *next_logits(void *arg, const int32_t *tokens, int64_t n) {
    Model *model = arg;
    int64_t cu_seqlens[2] = {0, n};
    model_forward(model, tokens, NULL, cu_seqlens, 1);
    return model->acts.logits;
}

// One training step: gradients of all micro-batches, then AdamW. Fills `line` except its times and rates.
static void train_step(Run *r, Model *model, StepLog *line) {
    const Options *o = &r->opt;
    if (o->overfit) loader_seek(&r->train, 0, 0);
    model_zero_grad(model);
    double loss = 0;
    for (int64_t i = 0; i < r->micro_batches; i++) {
        run_load_batch(r, &r->train);
        loss += model_forward(model, r->inputs, r->targets, r->cu_seqlens, r->num_seqs) /
                (double)r->micro_batches;
        model_backward(model, 1.0 / (double)r->micro_batches);
    }
    line->loss = loss;
    line->norm = model_grad_norm(model);
    line->lr = schedule_rate(o, r->state.step);
    if (run_accept_step(r, loss, line->norm)) {
        double scale = o->clip > 0 && line->norm > o->clip ? o->clip / line->norm : 1;
        model_update(model, r->state.step + 1, line->lr, o->beta1, o->beta2, o->eps, o->weight_decay, scale);
    }
    line->step = run_finish_step(r, r->train.epoch, r->train.position);
}

// OpenMP threads that wait for work sleep almost at once, unless the environment says otherwise: on a busy
// machine, spinning threads take the cores from the working ones.
// OpenMP reads the environment before main, so the program starts again.
static void wait_passively(char **argv) {
#ifdef _OPENMP
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    setenv("GOMP_SPINCOUNT", "2000", 1); // GCC's OpenMP: sleeps after a few microseconds
    execv("/proc/self/exe", argv);
#else
    (void)argv;
#endif
}

int main(int argc, char **argv) {
    static Run run;
    wait_passively(argv);
    Model model;
    run_start(&run, argc, argv);
    const Options *o = &run.opt;
    int training = !o->sample_only && !o->val_only;
    model_build(&model, &run.config, o->batch * o->seq_len, training);
    if (run.checkpoint[0]) {
        TrainState state;
        checkpoint_load(run.checkpoint, &run.config, &run.init, &state, model.params.weights,
                        run.resuming ? model.optimizer.m : NULL, run.resuming ? model.optimizer.v : NULL,
                        model.layout.num_params);
    } else {
        params_init(&run.config, model.params.weights, &run.init);
    }
    run_print_summary(&run, model.layout.num_params, model.bytes);
    if (o->sample_only) run_sample(&run, next_logits, &model);
    if (o->val_only) run_validate(&run, evaluate, &model);

    if (training) {
        run_begin_training(&run);
        int stop = 0;
        for (int first_iteration = 1;; first_iteration = 0) {
            Cadence due = run_due(&run, first_iteration);
            if (due.save_first)
                run_save(&run, model.params.weights, model.optimizer.m, model.optimizer.v,
                         model.layout.num_params);
            if (due.validate) run_validate(&run, evaluate, &model);
            if (due.sample) run_sample(&run, next_logits, &model);
            stop = run_signal != 0;
            if (due.save || (stop && o->output))
                run_save(&run, model.params.weights, model.optimizer.m, model.optimizer.v,
                         model.layout.num_params);
            if (run.state.step >= o->max_steps || stop) break;
            StepLog line = {.memory_bytes = (int64_t)model.bytes};
            double start = now_seconds();
            train_step(&run, &model, &line);
            run_log_step(&run, &line, now_seconds() - start);
        }
        if (stop) run_print_stopped(&run);
    }
    model_free(&model);
    run_end(&run);
    return run_signal ? 128 + run_signal : 0;
}
#endif
