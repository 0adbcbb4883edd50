// test_model.c: tests every layer and the whole C model, in double, against central differences. Built with
// -DGPT_DOUBLE; train_gpt_nsa.c is built with -DGPT_NO_MAIN -DGPT_DOUBLE.
#include "../../train_gpt_nsa.h"
#include "test.h"

enum { N = 5, C = 6, O = 4, V = 11, VP = 16 };

// x [n] = normal random numbers of standard deviation `scale`; a stream always gives the same ones.
static void fill_normal(real *x, int64_t n, uint64_t stream, double scale) {
    for (int64_t i = 0; i < n; i++) x[i] = scale * rng_normal_at(3, stream, i);
}

static double dot(const real *a, const real *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Returns the relative Frobenius error of grad [n] against central differences of loss() in x [n], over at
// most `count` elements spread over x. The limit is 1e-6.
static double difference_error(real *x, const real *grad, int64_t n, int count, double (*loss)(void)) {
    const double h = 1e-5;
    double error = 0, norm = 0;
    for (int i = 0; i < count && i < n; i++) {
        int64_t index = n <= count ? i : (int64_t)((i + 0.5) * (double)n / count);
        real saved = x[index];
        x[index] = saved + h;
        double up = loss();
        x[index] = saved - h;
        double numeric = (up - loss()) / (2 * h);
        x[index] = saved;
        error += (numeric - grad[index]) * (numeric - grad[index]);
        norm += grad[index] * grad[index];
    }
    return sqrt(error / (norm + 1e-30));
}

// The arrays of the layer under test: input, weight, bias, output and their gradients.
static real x[N * VP], w[V * VP], bias[VP], out[N * VP], dout[N * VP], dx[N * VP], dw[V * VP], dbias[VP];
static real rstd[N], losses[N], lse[N];
static int32_t tokens[N] = {3, 0, 7, 3, 10}, argmax[N];

static double embedding_loss(void) {
    embedding_forward(out, tokens, w, N, C);
    return dot(out, dout, N * C);
}
static double rmsnorm_loss(void) {
    rmsnorm_forward(out, rstd, x, w, N, C, 1e-5);
    return dot(out, dout, N * C);
}
static double linear_loss(void) {
    matmul_forward(out, x, w, bias, N, C, O);
    return dot(out, dout, N * O);
}
static double swiglu_loss(void) {
    swiglu_forward(out, x, N, C);
    return dot(out, dout, N * C);
}
static double crossentropy_loss(void) {
    crossentropy_forward(losses, lse, argmax, x, tokens, N, V, VP);
    return 0.3 * (losses[0] + losses[1] + losses[2] + losses[3] + losses[4]);
}

static void reset(void) {
    fill_normal(x, N * VP, 1, 1), fill_normal(w, V * VP, 2, 1), fill_normal(bias, VP, 3, 1),
        fill_normal(dout, N * VP, 4, 1);
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
    matmul_backward(dx, 0, dw, dbias, dout, x, w, N, C, O);
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
        for (int j = 0; j < V; j++) CHECK(x[i * VP + j] <= x[i * VP + argmax[i]], "arg max of row %d", i);
    }
}

// Tests matmuls of sizes below, at and beyond a tile against plain loops.
static void test_matmul(void) {
    const int sizes[][3] = {{1, 1, 1}, {3, 5, 2}, {4, 64, 128}, {129, 33, 130}, {7, 65, 257}, {260, 17, 1}};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        int n = sizes[s][0], c = sizes[s][1], o = sizes[s][2];
        real *a = xmalloc(n * c * 8), *b = xmalloc(o * c * 8), *y = xmalloc(n * o * 8),
             *da = xmalloc(n * c * 8);
        real *db = xcalloc(o * c, 8);
        fill_normal(a, n * c, 5, 1), fill_normal(b, o * c, 6, 1);
        matmul_forward(y, a, b, NULL, n, c, o);
        double worst = 0;
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < o; j++) {
                double sum = 0;
                for (int k = 0; k < c; k++) sum += a[i * c + k] * b[j * c + k];
                worst = fmax(worst, fabs(sum - y[i * o + j]));
            }
        }
        matmul_backward(da, 0, db, NULL, y, a, b, n, c, o);
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

static Model model;
static int32_t inputs[60], targets[60];
static const int64_t cu_seqlens[] = {0, 41, 42, 60};
static double model_loss(void) {
    return 0.5 * model_forward(&model, inputs, targets, cu_seqlens, 3);
}

// Returns a hash of all layers' block indices, to detect that a difference step changed the selected blocks.
static uint64_t block_indices_hash(void) {
    uint64_t h = 0;
    const FsaConfig *f = &model.config.fsa;
    for (int l = 0; l < model.config.layers; l++) {
        if (layer_attention(&model.config, l) != ATTN_NSA) continue;
        for (int64_t i = 0; i < f->kv_heads * model.n * f->topk; i++) {
            h = rng_mix(h ^ (uint64_t)(uint32_t)model.acts.layers[l].saved.block_indices[i]);
        }
    }
    return h;
}

static void test_gradients(const char *name, const ModelConfig *config) {
    char msg[256];
    if (config_check(config, msg, sizeof msg)) die("%s", msg);
    model_build(&model, config, 60, 1);
    for (int64_t t = 0; t < model.layout.num_tensors; t++) { // no zeros, so that every gradient is tested
        const ParamTensor *p = &model.layout.tensors[t];
        fill_normal(model.params.weights + p->offset, p->size, 100 + (uint64_t)t,
                    p->rows == 1 ? 0.3 : 1.2 / sqrt((double)p->cols));
        if (p->init == INIT_ONES) {
            for (int64_t i = 0; i < p->size; i++) model.params.weights[p->offset + i] += 1;
        }
    }
    for (int i = 0; i < 60; i++) {
        inputs[i] = (int32_t)(rng_u64_at(7, (uint64_t)i) % (uint64_t)config->vocab_size);
        targets[i] = (int32_t)(rng_u64_at(8, (uint64_t)i) % (uint64_t)config->vocab_size);
    }
    model_zero_grad(&model);
    model_loss();
    uint64_t indices_hash = block_indices_hash();
    model_backward(&model, 0.5);
    for (int64_t t = 0; t < model.layout.num_tensors; t++) {
        const ParamTensor *p = &model.layout.tensors[t];
        double e = difference_error(model.params.weights + p->offset, model.params.grads + p->offset, p->size,
                                    25, model_loss);
        CHECK(e < 1e-6, "%s: gradient of %s is off by %.2e", name, p->name, e);
    }
    model_loss();
    CHECK(block_indices_hash() == indices_hash, "%s: the selected blocks changed", name);

    // Without targets, row 0 of logits is the last row of the pass with targets.
    real logits[128];
    const int64_t whole[2] = {0, 41};
    model_forward(&model, inputs, targets, whole, 1);
    memcpy(logits, model.acts.logits + 40 * config->padded_vocab, sizeof(real) * config->padded_vocab);
    model_forward(&model, inputs, NULL, whole, 1);
    double worst = 0;
    for (int j = 0; j < config->vocab_size; j++) worst = fmax(worst, fabs(logits[j] - model.acts.logits[j]));
    CHECK(worst < 1e-12, "%s: last logits differ by %.2e", name, worst);
    model_free(&model);
}

// Tests which layers have full attention with full_every, and that each layer computes what it computes alone
// in a model of one layer with its attention mode. That model's embedding holds the layer's input.
static void test_full_every(const char *name, const ModelConfig *config) {
    enum { TOKENS = 31 };
    static const struct {
        int every;
        const char *layers; // F: full attention
    } cases[] = {{2, "-F-F-"}, {3, "--F"}, {3, "--F--F-"}, {5, "----F-"}};
    const int64_t whole[2] = {0, TOKENS};
    for (int i = 0; i < TOKENS; i++) inputs[i] = i;
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        ModelConfig c = *config;
        char msg[256];
        c.layers = (int)strlen(cases[k].layers), c.full_every = cases[k].every, c.tied = 0;
        if (config_check(&c, msg, sizeof msg)) die("%s", msg);
        model_build(&model, &c, TOKENS, 0);
        for (int64_t t = 0; t < model.layout.num_tensors; t++)
            fill_normal(model.params.weights + model.layout.tensors[t].offset, model.layout.tensors[t].size,
                        100 + (uint64_t)t, 0.5);
        model_forward(&model, inputs, inputs, whole, 1);
        for (int l = 0; l < c.layers; l++) {
            Model one;
            ModelConfig alone = c;
            alone.layers = 1, alone.full_every = 0;
            alone.attn = cases[k].layers[l] == 'F' ? ATTN_FULL : c.attn;
            model_build(&one, &alone, TOKENS, 0);
            const int64_t first = one.layout.layers[0].ln1, size = one.layout.lnf - first,
                          from = model.layout.layers[l].ln1;
            const int same_size = param_after_layer(&model.layout, &c, l) - from == size;
            CHECK(same_size, "%s, full-every %d: layer %d has other tensors", name, c.full_every, l);
            if (same_size)
                memcpy(one.params.weights + first, model.params.weights + from, sizeof(real) * size);
            memcpy(one.params.weights, model.acts.layers[l].residual_in, sizeof(real) * TOKENS * c.channels);
            model_forward(&one, inputs, inputs, whole, 1);
            const real *out =
                l + 1 < c.layers ? model.acts.layers[l + 1].residual_in : model.acts.residual_out;
            CHECK(memcmp(out, one.acts.residual_out, sizeof(real) * TOKENS * c.channels) == 0,
                  "%s, full-every %d: layer %d has another output than alone", name, c.full_every, l);
            model_free(&one);
        }
        model_free(&model);
    }
}

// Tests AdamW on two parameters, one with weight decay and one without, against its formula.
static void test_adamw(void) {
    ModelConfig c;
    config_from_preset(&c, preset_find("recall"));
    config_set_vocab(&c, 20);
    c.layers = 1;
    model_build(&model, &c, 4, 1);
    double p[2] = {0.5, 0.5}, m[2] = {0, 0}, v[2] = {0, 0};
    int64_t offset[2] = {model.layout.wte, model.layout.lnf}; // with and without weight decay
    model.params.weights[offset[0]] = model.params.weights[offset[1]] = 0.5;
    for (int step = 1; step <= 3; step++) {
        double g = 0.7 * step - 1;
        for (int i = 0; i < 2; i++) {
            model.params.grads[offset[i]] = g;
            m[i] = 0.9 * m[i] + 0.1 * 2 * g;
            v[i] = 0.99 * v[i] + 0.01 * 4 * g * g;
            double mhat = m[i] / (1 - pow(0.9, step)), vhat = v[i] / (1 - pow(0.99, step));
            p[i] -= 0.01 * (mhat / (sqrt(vhat) + 1e-8) + (i == 0 ? 0.1 * p[i] : 0));
        }
        model_update(&model, step, 0.01, 0.9, 0.99, 1e-8, 0.1, 2);
        for (int i = 0; i < 2; i++) {
            CHECK(fabs(p[i] - model.params.weights[offset[i]]) < 1e-12, "step %d: %.12g, not %.12g", step,
                  model.params.weights[offset[i]], p[i]);
        }
    }
    model_zero_grad(&model);
    model.params.grads[0] = 3, model.params.grads[model.layout.num_params - 1] = 4;
    CHECK(model_grad_norm(&model) == 5, "gradient norm %g, not 5", model_grad_norm(&model));
    model_free(&model);
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
    test_gradients("nsa", &c);
    c.layers = 4, c.full_every = 2;
    test_gradients("nsa, every second layer full", &c);
    c.layers = 2, c.full_every = 0;
    c.fsa.gate_per_token = 1, c.fsa.phi = FSA_PHI_MEAN, c.tied = 1, c.qkv_bias = c.qk_norm = 0;
    test_gradients("nsa, mean, a gate per token, tied", &c);
    c.attn = ATTN_FULL;
    test_gradients("full", &c);
    c.attn = ATTN_WINDOW;
    test_gradients("window", &c);
    test_full_every("window", &c);
    c.attn = ATTN_NSA, c.fsa.phi = FSA_PHI_LINEAR;
    test_full_every("nsa", &c);
    test_adamw();
    return test_end("model");
}
