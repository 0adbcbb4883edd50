// test_model.c: the C model in double: every layer and the whole model against central differences.
// Built with -DGPT_DOUBLE against train_gpt_nsa.c with -DGPT_NO_MAIN.
#include "../../train_gpt_nsa.h"
#include "test.h"

enum { N = 5, C = 6, O = 4, V = 11, VP = 16 };

static void draw(real *x, int64_t n, uint64_t stream, double scale) {
    for (int64_t i = 0; i < n; i++) x[i] = scale * rng_normal_at(3, stream, i);
}

static double inner(const real *a, const real *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Relative Frobenius error of grad [n] against central differences of loss() in x, over at most
// `count` entries; the bar is 1e-6.
static double difference_error(real *x, const real *grad, int64_t n, int count, double (*loss)(void)) {
    const double h = 1e-5;
    double error = 0, norm = 0;
    for (int i = 0; i < count && i < n; i++) {
        int64_t at = n <= count ? i : (int64_t)((i + 0.5) * (double)n / count);
        real keep = x[at];
        x[at] = keep + h;
        double up = loss();
        x[at] = keep - h;
        double numeric = (up - loss()) / (2 * h);
        x[at] = keep;
        error += (numeric - grad[at]) * (numeric - grad[at]);
        norm += grad[at] * grad[at];
    }
    return sqrt(error / (norm + 1e-30));
}

// Arrays of the layer at hand: input, weight, bias, output and their gradients.
static real x[N * VP], w[V * VP], bias[VP], out[N * VP], dout[N * VP], dx[N * VP], dw[V * VP], dbias[VP];
static real rstd[N], losses[N], lse[N];
static int32_t tokens[N] = {3, 0, 7, 3, 10}, best[N];

static double embedding_loss(void) {
    embedding_forward(out, tokens, w, N, C);
    return inner(out, dout, N * C);
}
static double rmsnorm_loss(void) {
    rmsnorm_forward(out, rstd, x, w, N, C, 1e-5);
    return inner(out, dout, N * C);
}
static double linear_loss(void) {
    linear_forward(out, x, w, bias, N, C, O);
    return inner(out, dout, N * O);
}
static double swiglu_loss(void) {
    swiglu_forward(out, x, N, C);
    return inner(out, dout, N * C);
}
static double crossentropy_loss(void) {
    crossentropy_forward(losses, lse, best, x, tokens, N, V, VP);
    return 0.3 * (losses[0] + losses[1] + losses[2] + losses[3] + losses[4]);
}

static void reset(void) {
    draw(x, N * VP, 1, 1), draw(w, V * VP, 2, 1), draw(bias, VP, 3, 1), draw(dout, N * VP, 4, 1);
    memset(dx, 0, sizeof dx), memset(dw, 0, sizeof dw), memset(dbias, 0, sizeof dbias);
}

static void test_layers(void) {
    reset();
    embedding_backward(dw, tokens, dout, N, C);
    double e = difference_error(w, dw, V * C, 100, embedding_loss);
    CHECK(e < 1e-6, "embedding: %.2e", e);

    reset();
    rmsnorm_loss();
    rmsnorm_backward(dx, dw, dout, x, w, rstd, N, C);
    e = difference_error(x, dx, N * C, 100, rmsnorm_loss);
    CHECK(e < 1e-6, "rmsnorm, x: %.2e", e);
    e = difference_error(w, dw, C, 100, rmsnorm_loss);
    CHECK(e < 1e-6, "rmsnorm, weight: %.2e", e);

    reset();
    linear_backward(dx, 0, dw, dbias, dout, x, w, N, C, O);
    e = difference_error(x, dx, N * C, 100, linear_loss);
    CHECK(e < 1e-6, "linear, x: %.2e", e);
    e = difference_error(w, dw, O * C, 100, linear_loss);
    CHECK(e < 1e-6, "linear, weight: %.2e", e);
    e = difference_error(bias, dbias, O, 100, linear_loss);
    CHECK(e < 1e-6, "linear, bias: %.2e", e);

    reset();
    swiglu_backward(dx, dout, x, N, C);
    e = difference_error(x, dx, N * 2 * C, 100, swiglu_loss);
    CHECK(e < 1e-6, "swiglu: %.2e", e);

    reset();
    crossentropy_loss();
    memcpy(dx, x, sizeof dx);
    crossentropy_backward(dx, lse, tokens, 0.3, N, V, VP);
    e = difference_error(x, dx, N * VP, 100, crossentropy_loss);
    CHECK(e < 1e-6, "crossentropy: %.2e", e);
    for (int i = 0; i < N; i++) {
        for (int j = V; j < VP; j++) CHECK(dx[i * VP + j] == 0, "the padded vocabulary has a gradient");
        for (int j = 0; j < V; j++) CHECK(x[i * VP + j] <= x[i * VP + best[i]], "arg max of row %d", i);
    }
}

// Products of every size up to beyond a tile, against the sum written out.
static void test_matmul(void) {
    const int sizes[][3] = {{1, 1, 1}, {3, 5, 2}, {4, 64, 128}, {129, 33, 130}, {7, 65, 257}, {260, 17, 1}};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        int n = sizes[s][0], c = sizes[s][1], o = sizes[s][2];
        real *a = xmalloc(n * c * 8), *b = xmalloc(o * c * 8), *y = xmalloc(n * o * 8),
             *da = xmalloc(n * c * 8);
        real *db = xcalloc(o * c, 8);
        draw(a, n * c, 5, 1), draw(b, o * c, 6, 1);
        linear_forward(y, a, b, NULL, n, c, o);
        double worst = 0;
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < o; j++) {
                double sum = 0;
                for (int k = 0; k < c; k++) sum += a[i * c + k] * b[j * c + k];
                worst = fmax(worst, fabs(sum - y[i * o + j]));
            }
        }
        linear_backward(da, 0, db, NULL, y, a, b, n, c, o);
        for (int i = 0; i < n; i++) {
            for (int k = 0; k < c; k++) {
                double sum = 0;
                for (int j = 0; j < o; j++) sum += y[i * o + j] * b[j * c + k];
                worst = fmax(worst, fabs(sum - da[i * c + k]) / (1 + fabs(sum)));
            }
        }
        for (int j = 0; j < o; j++) {
            for (int k = 0; k < c; k++) {
                double sum = 0;
                for (int i = 0; i < n; i++) sum += y[i * o + j] * a[i * c + k];
                worst = fmax(worst, fabs(sum - db[j * c + k]) / (1 + fabs(sum)));
            }
        }
        CHECK(worst < 1e-11, "matmul %d x %d x %d is off by %.2e", n, c, o, worst);
        free(a), free(b), free(y), free(da), free(db);
    }
}

static GPT gpt;
static int32_t inputs[60], targets[60];
static const int64_t cu_seqlens[] = {0, 41, 42, 60};
static double gpt_loss(void) {
    return 0.5 * gpt_forward(&gpt, inputs, targets, cu_seqlens, 3);
}

// Indices of all layers, to see that the differences did not change the choice of blocks.
static uint64_t choice_hash(void) {
    uint64_t h = 0;
    if (gpt.config.attn != ATTN_NSA) return h;
    const FsaConfig *f = &gpt.config.fsa;
    for (int l = 0; l < gpt.config.layers; l++) {
        for (int64_t i = 0; i < f->kv_heads * gpt.n * f->topk; i++) {
            h = rng_mix(h ^ (uint64_t)(uint32_t)gpt.acts[l].att_state.block_indices[i]);
        }
    }
    return h;
}

static void test_gpt(const char *name, const ModelConfig *config) {
    char msg[256];
    if (config_check(config, msg, sizeof msg)) die("%s", msg);
    gpt_build(&gpt, config, 60, 1);
    for (int64_t t = 0; t < gpt.num_tensors; t++) { // no zeros: every gradient path carries something
        const ParamTensor *p = &gpt.tensors[t];
        draw(gpt.params + p->offset, p->size, 100 + (uint64_t)t,
             p->rows == 1 ? 0.3 : 1.2 / sqrt((double)p->cols));
        if (p->init == INIT_ONES) {
            for (int64_t i = 0; i < p->size; i++) gpt.params[p->offset + i] += 1;
        }
    }
    for (int i = 0; i < 60; i++) {
        inputs[i] = (int32_t)(rng_u64_at(7, (uint64_t)i) % (uint64_t)config->vocab_size);
        targets[i] = (int32_t)(rng_u64_at(8, (uint64_t)i) % (uint64_t)config->vocab_size);
    }
    gpt_zero_grad(&gpt);
    gpt_loss();
    uint64_t choice = choice_hash();
    gpt_backward(&gpt, 0.5);
    for (int64_t t = 0; t < gpt.num_tensors; t++) {
        const ParamTensor *p = &gpt.tensors[t];
        double e = difference_error(gpt.params + p->offset, gpt.grads + p->offset, p->size, 25, gpt_loss);
        CHECK(e < 1e-6, "%s: gradient of %s is off by %.2e", name, p->name, e);
    }
    gpt_loss();
    CHECK(choice_hash() == choice, "%s: the choice of blocks changed", name);

    // The logits of a last token alone are those of the whole pass.
    real logits[128];
    const int64_t whole[2] = {0, 41};
    gpt_forward(&gpt, inputs, targets, whole, 1);
    memcpy(logits, gpt.logits + 40 * config->padded_vocab, sizeof(real) * config->padded_vocab);
    gpt_forward(&gpt, inputs, NULL, whole, 1);
    double worst = 0;
    for (int j = 0; j < config->vocab_size; j++) worst = fmax(worst, fabs(logits[j] - gpt.logits[j]));
    CHECK(worst < 1e-12, "%s: last logits differ by %.2e", name, worst);
    gpt_free(&gpt);
}

// AdamW on one tensor pair against the formula, step by step.
static void test_adamw(void) {
    ModelConfig c;
    config_from_preset(&c, preset_find("recall"));
    config_set_vocab(&c, 20);
    c.layers = 1;
    gpt_build(&gpt, &c, 4, 1);
    double p[2] = {0.5, 0.5}, m[2] = {0, 0}, v[2] = {0, 0};
    int64_t at[2] = {gpt.wte, gpt.lnf}; // one that decays, one that doesn't
    gpt.params[at[0]] = gpt.params[at[1]] = 0.5;
    for (int step = 1; step <= 3; step++) {
        double g = 0.7 * step - 1;
        for (int i = 0; i < 2; i++) {
            gpt.grads[at[i]] = g;
            m[i] = 0.9 * m[i] + 0.1 * 2 * g;
            v[i] = 0.99 * v[i] + 0.01 * 4 * g * g;
            double mhat = m[i] / (1 - pow(0.9, step)), vhat = v[i] / (1 - pow(0.99, step));
            p[i] -= 0.01 * (mhat / (sqrt(vhat) + 1e-8) + (i == 0 ? 0.1 * p[i] : 0));
        }
        gpt_update(&gpt, step, 0.01, 0.9, 0.99, 1e-8, 0.1, 2);
        for (int i = 0; i < 2; i++) {
            CHECK(fabs(p[i] - gpt.params[at[i]]) < 1e-12, "step %d: %.12g, not %.12g", step,
                  gpt.params[at[i]], p[i]);
        }
    }
    gpt_zero_grad(&gpt);
    gpt.grads[0] = 3, gpt.grads[gpt.num_params - 1] = 4;
    CHECK(gpt_grad_norm(&gpt) == 5, "gradient norm %g, not 5", gpt_grad_norm(&gpt));
    gpt_free(&gpt);
}

int main(void) {
    test_layers();
    test_matmul();
    ModelConfig c;
    config_from_preset(&c, preset_find("recall"));
    config_set_vocab(&c, 31);
    c.channels = 12, c.hidden = 10, c.fsa.head_dim = 6;
    c.qkv_bias = c.qk_norm = 1;
    c.rope_theta = 50, c.rope_factor = 4, c.rope_original_len = 20;
    test_gpt("nsa", &c);
    c.fsa.gate_per_token = 1, c.fsa.phi = FSA_PHI_MEAN, c.tied = 1, c.qkv_bias = c.qk_norm = 0;
    test_gpt("nsa, mean, a gate per token, tied", &c);
    c.attn = ATTN_FULL;
    test_gpt("full", &c);
    c.attn = ATTN_WINDOW;
    test_gpt("window", &c);
    test_adamw();
    return test_end("model");
}
