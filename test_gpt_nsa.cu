// test_gpt_nsa.cu: tests the GPU trainer's model against the C model, which defines it, and against PyTorch's
// autograd: losses, logits, the gradient of every tensor, and ten training steps. It also tests that
// results are bitwise reproducible, with every kind of recomputation and after a checkpoint.
//
//   test_gpt_nsa [small] [seed=N]      small: few tokens and channels, for the emulator; takes seconds
//
// Error limits. A rounding to bf16 has a relative error of 1.1e-3 (rms), one to fp16 an eighth of that. About
// 10 roundings a layer lie between a weight and the loss, and 20 on the way back. Independent errors grow
// with the square root of their number: 2 layers of 20 roundings give about 7e-3. The limits are about three
// times the largest measured errors. A wrong kernel has an error of 0.1 or more.
//
// The seed is fixed, because random models differ in how much they amplify a rounding. Of 30 seeds one gave
// gradient errors of 7e-2 in bf16 and 4e-3 in fp16; the others gave 2e-2 to 3e-2 in bf16.
#define GPT_NO_MAIN
#define CP_HEAD_GROUP_BYTES 1 // several head groups even in these small models
#include "train_gpt_nsa.cu"
#include "train_gpt_nsa.h" // the C model, in namespace cpu
#include "dev/test/checkpoint_old.h"
#include "dev/test/golden.h"
#include "dev/test/ranks.h"

#if defined(ENABLE_FP32)
static const double loss_limit = 6e-4, logit_limit = 2.5e-3, grad_limit = 6e-3, step_limit = 1e-3;
#elif defined(ENABLE_FP16)
static const double loss_limit = 1e-3, logit_limit = 4e-3, grad_limit = 1e-2, step_limit = 1e-3;
#else
static const double loss_limit = 8e-3, logit_limit = 3e-2, grad_limit = 8e-2, step_limit = 1.2e-2;
#endif

static uint64_t seed = 1337;
static int small, fp8; // fp8: build makes models with -matmul fp8
static double worst_loss, worst_logit, worst_next, worst_grad, worst_step, worst_fp8;

// ---------------------------------------------------------------------------------------------------------
// Models and batches

typedef struct {
    const char *name;
    int attn, tied, bias, qk_norm, q_heads, kv_heads, gate_per_token, phi;
    double rope_factor;
    int full_every;
} Variant;

static ModelConfig make_config(const Variant *v) {
    ModelConfig c;
    char msg[256];
    memset(&c, 0, sizeof c);
    config_set_vocab(&c, small ? 70 : 1000);
    c.layers = v->full_every ? 4 : 2, c.full_every = v->full_every;
    c.channels = small ? 64 : 256, c.hidden = small ? 96 : 352;
    c.attn = v->attn, c.tied = v->tied, c.qkv_bias = v->bias, c.qk_norm = v->qk_norm;
    c.rope_theta = 10000, c.norm_eps = 1e-5, c.rope_factor = v->rope_factor;
    c.rope_low_freq = 1, c.rope_high_freq = 4, c.rope_original_len = 128;
    FsaConfig *f = &c.fsa;
    f->q_heads = v->q_heads, f->kv_heads = v->kv_heads, f->head_dim = small ? 64 : 128;
    f->cmp_len = 8, f->cmp_stride = 4, f->block = 16, f->topk = 3, f->init_blocks = 1, f->local_blocks = 1;
    f->window = 20, f->phi = (FsaPhi)v->phi, f->gate_per_token = v->gate_per_token;
    if (config_check(&c, msg, sizeof msg)) die("%s: %s", v->name, msg);
    return c;
}

// Returns random parameters that are exact in floatX. They are larger than those of a new model, so that
// attention weights and gates vary.
static std::vector<float> random_params(const ModelConfig *c, uint64_t stream) {
    int64_t total, count = param_table(c, NULL, &total);
    std::vector<ParamTensor> table(count);
    param_table(c, table.data(), &total);
    std::vector<float> params(total);
    for (const ParamTensor &t : table) {
        double mean = t.init == INIT_ONES ? 1 : 0, std = t.rows == 1 ? 0.25 : 1 / sqrt((double)t.cols);
        if (t.init == INIT_MEAN) std = 1 / sqrt((double)c->fsa.cmp_len * c->fsa.head_dim);
        for (int64_t i = 0; i < t.size; i++) {
            double x = mean + std * rng_normal_at(seed, stream, t.offset + i);
            params[t.offset + i] = (float)(floatX)(float)x;
        }
    }
    return params;
}

// Random tokens in sequences of the given lengths, on the host, and this GPU's part of them on the device.
struct Documents {
    std::vector<int32_t> tokens, targets;
    std::vector<int64_t> cu_seqlens;
    std::vector<char> host;
    char *device;
    Batch batch;
    Documents(const ModelConfig *c, const std::vector<int64_t> &lengths, uint64_t stream, Gpus *gpus = NULL) {
        int64_t longest = 0, count = (int64_t)lengths.size();
        cu_seqlens.push_back(0);
        for (int64_t length : lengths) {
            cu_seqlens.push_back(cu_seqlens.back() + length);
            longest = std::max(longest, length);
        }
        const int64_t n = cu_seqlens.back();
        for (int64_t i = 0; i < n; i++) {
            tokens.push_back((int32_t)(rng_u64_at(seed + stream, 2 * i) % c->vocab_size));
            targets.push_back((int32_t)(rng_u64_at(seed + stream, 2 * i + 1) % c->vocab_size));
        }
        Batch b = batch_unsharded(n, count);
        b.num_chunks = cp_num_chunks(n, count, gpus ? gpus->cp_size : 1), b.num_segments += b.num_chunks;
        host.resize(batch_bytes(&b));
        b = batch_fill(c, gpus, tokens.data(), targets.data(), cu_seqlens.data(), count, host.data());
        cuda_check(cudaMalloc((void **)&device, host.size()));
        cuda_check(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice));
        cuda_check(cudaDeviceSynchronize()); // a model's stream does not wait for this copy
        batch = batch_bind(&b, device);
    }
    ~Documents() { cudaFree(device); }
};

static std::vector<int64_t> test_lengths() {
    return small ? std::vector<int64_t>{70, 1, 25} : std::vector<int64_t>{700, 1, 33, 507, 64, 7};
}

// Sets all parameters [num_params] from the host, and AdamW's moments m and v; NULL sets them to zero.
static void model_set(Model *model, const float *params, const float *m, const float *v) {
    for (int64_t u = 0; u < model->params.zero.num_units; u++) {
        int64_t begin = model->params.zero.units[u].begin, end;
        if (model->training) zero_owned(&model->params.zero, u, model->params.zero.rank, &begin, &end);
        set_unit_params(&model->params, &model->optimizer, u, params + begin, m ? m + begin : NULL,
                        v ? v + begin : NULL, model->stream);
    }
}

static Model *build(const ModelConfig *c, const std::vector<float> &params, int64_t tokens, int recompute,
                    Gpus *gpus = NULL) {
    Model *model = new Model;
    model_build(model, c, tokens, 1, recompute, fp8, gpus, 0);
    model->last_micro_batch = 1;
    // poison memory with NaN (all bits set): unwritten values must not matter
    cuda_check(cudaMemset(model->arenas[ACTIVATIONS].base, 0xff, model->arenas[ACTIVATIONS].bytes));
    cuda_check(cudaMemset(model->scratch.workspace, 0xff, model->scratch.workspace_bytes));
    cuda_check(cudaMemset(model->scratch.dqkv, 0xff,
                          tokens / (gpus ? gpus->cp_size : 1) * model->acts.layers[0].layout.stride *
                              sizeof(floatX))); // with its padding columns
    cuda_check(cudaDeviceSynchronize());
    model_set(model, params.data(), NULL, NULL);
    return model;
}

// Runs what is left of the last update, which otherwise runs beside the next forward pass.
static void finish_update(Model *model) {
    optimizer_finish(&model->optimizer, &model->params, model->stream);
}

static void destroy(Model *model) {
    model_free(model);
    delete model;
}

template <typename T> static std::vector<T> download(const T *src, int64_t count) {
    std::vector<T> dst(count);
    cuda_check(cudaDeviceSynchronize());
    cuda_check(cudaMemcpy(dst.data(), src, count * sizeof(T), cudaMemcpyDeviceToHost));
    return dst;
}

// The results of a forward and backward pass; == compares bits.
struct Result {
    std::vector<float> losses, grads;
    bool operator==(const Result &other) const {
        return memcmp(losses.data(), other.losses.data(), losses.size() * sizeof(float)) == 0 &&
               memcmp(grads.data(), other.grads.data(), grads.size() * sizeof(float)) == 0;
    }
};

static Result run(Model *model, const Documents &d) {
    model_zero_grad(model);
    model_forward_backward(model, &d.batch);
    if (model->gpus)
        compute_waits_for_transfers(model->gpus, model->stream); // waits for the reductions of gradients
    return {download(model->acts.losses, d.batch.n), download(model->params.grads, model->layout.num_params)};
}

static double relative_error(const float *x, const float *reference, int64_t count) {
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(x[i])) return INFINITY;
        difference += ((double)x[i] - reference[i]) * ((double)x[i] - reference[i]);
        norm += (double)reference[i] * reference[i];
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

// ---------------------------------------------------------------------------------------------------------
// Tests

// Makes the C model attend to the blocks that the GPU selected in its last forward pass. Scores that differ
// by a rounding may select other blocks; that is no error, but would make all later values incomparable.
static void copy_block_indices(cpu::Model *cpu_model, const Model *model,
                               std::vector<std::vector<int32_t>> *block_indices) {
    const ModelConfig *c = &model->config;
    FsaDeviceBatch b = fsa_device_batch(&model->batch);
    if (c->attn != ATTN_NSA) return;
    block_indices->resize(c->layers);
    for (int l = 0; l < c->layers; l++) {
        if (layer_attention(c, l) != ATTN_NSA) continue;
        (*block_indices)[l] =
            download(fsa_saved_block_indices(&c->fsa, attn_dtype, &b, model->acts.layers[l].saved),
                     (int64_t)c->fsa.kv_heads * b.num_queries * c->fsa.topk);
        cpu_model->acts.layers[l].block_indices = (*block_indices)[l].data();
    }
}

// Tests losses, logits and gradients against the C model with the same weights. The C model first selects
// blocks itself: most must agree with the GPU's. Then it uses the GPU's block indices.
static void test_against_c(const Variant *v) {
    ModelConfig c = make_config(v);
    std::vector<float> params = random_params(&c, 1);
    Documents d(&c, test_lengths(), 2);
    const int64_t n = d.batch.n, C = c.channels, Vp = c.padded_vocab, V = c.vocab_size;
    Model *model = build(&c, params, n, 0);
    CHECK(model->scratch.lm_head_rows == n, "%s: the test needs the logits of all tokens in one chunk",
          v->name);

    model->batch = d.batch;
    model_forward(model);
    matmul_forward(&model->linears.matmul, model->scratch.logits, Vp, model->acts.lnf_out, C,
                   weight(model, model->layout.lm_head), NULL, n, C, Vp, model->stream);
    std::vector<floatX> logits = download(model->scratch.logits, n * Vp);
    Result result = run(model, d);
    double sum = download(&model->scratch.result->loss_sum, 1)[0];

    cpu::Model cpu_model;
    cpu::model_build(&cpu_model, &c, n, 1);
    std::copy(params.begin(), params.end(), cpu_model.params.weights);
    std::vector<std::vector<int32_t>> block_indices;
    const int64_t num_queries = (int64_t)c.fsa.kv_heads * n, T = c.fsa.topk;
    if (c.attn == ATTN_NSA)
        cpu::model_forward(&cpu_model, d.tokens.data(), d.targets.data(), d.cu_seqlens.data(),
                           d.batch.num_seqs);
    copy_block_indices(&cpu_model, model, &block_indices);
    for (size_t l = 0; l < block_indices.size(); l++) {
        if (layer_attention(&c, (int)l) != ATTN_NSA) continue;
        const int32_t *selected = cpu_model.acts.layers[l].saved.block_indices;
        int64_t same = 0;
        for (int64_t i = 0; i < num_queries; i++)
            same += memcmp(selected + i * T, &block_indices[l][i * T], T * sizeof(int32_t)) == 0;
        CHECK((double)same >= 0.9 * (double)num_queries,
              "%s: layer %d: only %lld of %lld queries select the same blocks", v->name, (int)l,
              (long long)same, (long long)num_queries);
    }
    double loss = cpu::model_forward(&cpu_model, d.tokens.data(), d.targets.data(), d.cu_seqlens.data(),
                                     d.batch.num_seqs);
    std::vector<float> gpu_logits, cpu_logits;
    for (int64_t i = 0; i < n * Vp; i++)
        if (i % Vp < V)
            gpu_logits.push_back((float)logits[i]), cpu_logits.push_back(cpu_model.acts.logits[i]);
    double error = relative_error(gpu_logits.data(), cpu_logits.data(), n * V);
    worst_logit = std::max(worst_logit, error);
    CHECK(error < logit_limit, "%s: logits: error %.2e", v->name, error);
    error = relative_error(result.losses.data(), cpu_model.acts.losses, n);
    worst_loss = std::max(worst_loss, error);
    CHECK(error < loss_limit, "%s: losses: error %.2e", v->name, error);
    CHECK(fabs(sum / (double)n - loss) < loss_limit * loss, "%s: mean loss %.6f, the C model's %.6f", v->name,
          sum / (double)n, loss);

    cpu::model_zero_grad(&cpu_model);
    cpu::model_backward(&cpu_model, (double)n); // of the sum of the losses, as on the GPU
    for (int64_t i = 0; i < cpu_model.layout.num_tensors; i++) {
        const ParamTensor *t = &cpu_model.layout.tensors[i];
        error = relative_error(&result.grads[t->offset], cpu_model.params.grads + t->offset, t->size);
        worst_grad = std::max(worst_grad, error);
        CHECK(error < grad_limit, "%s: gradient of %s: error %.2e", v->name, t->name, error);
        int64_t padding = strcmp(t->name, "wte") == 0 || strcmp(t->name, "lm_head") == 0 ? (Vp - V) * C : 0;
        int64_t nonzero = 0;
        for (int64_t j = t->size - padding; j < t->size; j++) nonzero += result.grads[t->offset + j] != 0;
        CHECK(nonzero == 0, "%s: %s: the vocabulary's padding has a gradient", v->name, t->name);
    }
    cpu::model_free(&cpu_model);
    destroy(model);
}

// Tests that results are bitwise equal in two runs and with each kind of recomputation. With other chunks
// of the LM head cuBLASLt may add in another order. That changes losses by fp32 rounding. Gradients then
// change by much less than the rounding error of the attention's 16-bit type. The limit is for two layers,
// and grows with the square root of their number, as errors do.
static void test_same_bits(const Variant *v) {
    ModelConfig c = make_config(v);
    std::vector<float> params = random_params(&c, 1);
    Documents d(&c, test_lengths(), 2), other(&c, {40, 9}, 3);
    Result first;
    for (int recompute = 0; recompute <= 2; recompute++) {
        Model *model = build(&c, params, d.batch.n, recompute);
        if (recompute == 0) {
            first = run(model, d);
            run(model, other); // leaves other values in all buffers
        }
        CHECK(run(model, d) == first, "%s: recomputation %d: other bits than the first run", v->name,
              recompute);
        model->scratch.lm_head_rows = 40;
        Result chunked = run(model, d);
        double error =
            relative_error(chunked.losses.data(), first.losses.data(), (int64_t)first.losses.size());
        CHECK(error < 1e-6, "%s: losses depend on the chunks of the LM head: %.2e", v->name, error);
        error = relative_error(chunked.grads.data(), first.grads.data(), model->layout.num_params);
        CHECK(error < grad_limit / 20 * sqrt(c.layers / 2.0),
              "%s: gradients depend on the chunks of the LM head: %.2e", v->name, error);
        destroy(model);
    }
}

// Returns whether a run's losses or gradients have a number that is not finite, so that training stops.
static bool not_finite(Model *model, const Documents &d) {
    const Result r = run(model, d);
    for (const std::vector<float> &x : {r.losses, r.grads})
        for (float value : x)
            if (!isfinite(value)) return true;
    return false;
}

// Returns whether this build and GPU can run -matmul fp8.
static bool has_fp8(void) {
    cudaDeviceProp gpu;
    cuda_check(cudaGetDeviceProperties(&gpu, 0));
    return sizeof(floatX) == 2 && gpu.major * 10 + gpu.minor >= 89;
}

// Tests -matmul fp8 against the 16-bit matmuls: results are near but other, the same in two runs, with each
// kind of recomputation and in validation; the e4m3 weights follow an update; NaN and Inf are not hidden.
static void test_fp8(const Variant *v) {
    ModelConfig c = make_config(v);
    std::vector<float> params = random_params(&c, 1);
    Documents d(&c, test_lengths(), 2), other(&c, {40, 9}, 3);
    const int64_t n = d.batch.n, size = (int64_t)params.size();
    Model *model = build(&c, params, n, 0);
    const Result exact = run(model, d);
    destroy(model);

    fp8 = 1;
    Result first;
    for (int recompute = 0; recompute <= 2; recompute++) {
        model = build(&c, params, n, recompute);
        if (recompute == 0) first = run(model, d), run(model, other);
        CHECK(run(model, d) == first, "fp8, %s: recomputation %d: other bits", v->name, recompute);
        if (recompute < 2) destroy(model);
    }
    double error = relative_error(first.losses.data(), exact.losses.data(), n);
    CHECK(error > 1e-5 && error < 0.1, "fp8, %s: losses: difference %.2e from 16 bits", v->name, error);
    for (int64_t i = 0; i < model->layout.num_tensors; i++) {
        const ParamTensor *t = &model->layout.tensors[i];
        error = relative_error(&first.grads[t->offset], &exact.grads[t->offset], t->size);
        worst_fp8 = std::max(worst_fp8, error);
        CHECK(error > 1e-5 && error < 0.5, "fp8, %s: gradient of %s: difference %.2e from 16 bits", v->name,
              t->name, error);
    }

    Options o;
    options_defaults(&o);
    model_update(model, &o, 1, 1e-2, n);
    finish_update(model);
    const std::vector<float> updated = download(model->optimizer.master, size);
    const Result after = run(model, d);
    destroy(model);
    CHECK(!(after.losses == first.losses), "fp8, %s: an update does not change the losses", v->name);
    model = build(&c, updated, n, 0);
    CHECK(run(model, d) == after, "fp8, %s: the e4m3 weights are not those of the update", v->name);
    destroy(model);

    model = new Model;
    model_build(model, &c, n, 0, 0, 1, NULL, 0);
    model_set(model, params.data(), NULL, NULL);
    model->batch = d.batch;
    model_forward(model);
    model_lm_head(model, 0);
    CHECK(download(model->acts.losses, n) == first.losses, "fp8, %s: validation has other losses", v->name);
    destroy(model);

    fp8 = 0;
}

// Tests that -matmul fp8 does not hide NaN and Inf in the weights of a layer.
static void test_fp8_not_finite(const Variant *v) {
    ModelConfig c = make_config(v);
    std::vector<float> params = random_params(&c, 1);
    Documents d(&c, {40, 9}, 2);
    const int64_t n = d.batch.n;
    fp8 = 1;
    Model *model;
    for (const char *name : {"wqkv", "wo", "wgu", "wdown"})
        for (float bad : {NAN, INFINITY}) {
            std::vector<float> broken = params;
            model = build(&c, params, n, 0);
            for (int64_t i = 0; i < model->layout.num_tensors; i++)
                if (model->layout.tensors[i].layer == 1 && param_is(&model->layout.tensors[i], name))
                    broken[model->layout.tensors[i].offset + 33] = bad;
            model_set(model, broken.data(), NULL, NULL);
            CHECK(not_finite(model, d), "fp8, %s: %g in %s is hidden", v->name, bad, name);
            destroy(model);
        }
    fp8 = 0;
}

// Tests that the gradients of two micro-batches are added, and that norm and update are those of the mean
// over all tokens.
static void test_accumulation(const Variant *v) {
    ModelConfig c = make_config(v);
    std::vector<float> params = random_params(&c, 1);
    Documents a(&c, {40, 24}, 4), b(&c, {64}, 5);
    Model *model = build(&c, params, 64, 1);
    Result one = run(model, a), two = run(model, b);
    model_zero_grad(model);
    model->last_micro_batch = 0;
    model_forward_backward(model, &a.batch);
    model->last_micro_batch = 1;
    model_forward_backward(model, &b.batch);
    std::vector<float> both = download(model->params.grads, model->layout.num_params), sum(one.grads);
    double norm = 0;
    for (size_t i = 0; i < sum.size(); i++) sum[i] += two.grads[i];
    for (float x : both) norm += (double)x * x;
    norm = sqrt(norm) / 128;
    CHECK(relative_error(both.data(), sum.data(), model->layout.num_params) < 1e-5, "%s: micro-batches",
          v->name);
    double loss = 0, losses = download(&model->scratch.result->loss_sum, 1)[0];
    for (float x : one.losses) loss += x;
    for (float x : two.losses) loss += x;
    CHECK(fabs(losses - loss) < 1e-9 * loss, "%s: losses of micro-batches: %.9g, not %.9g", v->name, losses,
          loss);

    Options o;
    options_defaults(&o);
    o.clip = norm / 2;
    model_update(model, &o, 1, 1e-3, 128);
    finish_update(model);
    cuda_check(cudaEventSynchronize(model->step_done));
    CHECK(fabs(model->host.result->norm[NORM_VALUE] - norm) < 1e-4 * norm, "norm %g, not %g",
          model->host.result->norm[NORM_VALUE], norm);
    // after one step m = (1 - beta1) * the clipped gradient
    std::vector<float> m = download(model->optimizer.m, model->layout.num_params);
    for (float &x : both) x *= (float)(0.1 / 128 / 2);
    double error = relative_error(m.data(), both.data(), model->layout.num_params);
    CHECK(error < 1e-4, "clipping: error %.2e", error);

    // a step with a loss that is not finite changes nothing
    std::vector<float> master = download(model->optimizer.master, model->layout.num_params);
    double bad = INFINITY;
    cuda_check(cudaMemcpy(&model->scratch.result->loss_sum, &bad, sizeof bad, cudaMemcpyHostToDevice));
    cuda_check(cudaDeviceSynchronize());
    model_update(model, &o, 2, 1e-3, 128);
    finish_update(model);
    CHECK(download(model->optimizer.master, model->layout.num_params) == master &&
              download(model->optimizer.m, model->layout.num_params) == m,
          "a step with an infinite loss changed parameters or moments");
    double nan = NAN;
    model_zero_grad(model);
    cuda_check(cudaDeviceSynchronize());
    cuda_check(cudaMemcpy(&model->scratch.result->squares, &nan, sizeof nan, cudaMemcpyHostToDevice));
    cuda_check(cudaDeviceSynchronize());
    model_update(model, &o, 2, 1e-3, 128);
    finish_update(model);
    CHECK(download(model->optimizer.master, model->layout.num_params) == master,
          "a step with a NaN in the gradient changed parameters");
    destroy(model);
}

static void gpu_step(Model *model, const Options *o, const Documents &d, int64_t step, double *loss) {
    model_zero_grad(model);
    model_forward_backward(model, &d.batch);
    model_update(model, o, step, o->lr, d.batch.n);
    cuda_check(cudaEventSynchronize(model->step_done));
    *loss = model->host.result->loss_sum / (double)d.batch.n;
}

// Tests a new run, on three alternating batches, against the C trainer: ten steps, and the checkpoint after
// fifteen. Their losses drift apart from step to step, since AdamW turns a rounding error of a small gradient
// into a step of the learning rate; dev/results/experiments.md has the drift. Also tests that a run which is
// interrupted, written to a checkpoint and resumed is bitwise equal up to step 20.
static void test_training(const Variant *v) {
    ModelConfig c = make_config(v);
    std::vector<int64_t> lengths = small ? std::vector<int64_t>{36, 12} : test_lengths();
    Documents d[3] = {{&c, lengths, 6}, {&c, lengths, 7}, {&c, lengths, 8}};
    const int64_t n = d[0].batch.n;
    Options o;
    options_defaults(&o);
    o.lr = 1e-3;
    cpu::Model cpu_model;
    cpu::model_build(&cpu_model, &c, n, 1);
    const ParamInit init = {seed, {-1, 0, 1}};
    params_init(&c, cpu_model.params.weights, &init);
    std::vector<float> start(cpu_model.params.weights,
                             cpu_model.params.weights + cpu_model.layout.num_params);
    Model *model = build(&c, start, n, 0);
    char folder[] = "/tmp/test_gpt_nsa.XXXXXX";
    if (!mkdtemp(folder)) die("%s: %s", folder, strerror(errno));
    TrainState state;
    memset(&state, 0, sizeof state);
    state.seq_len = n;

    double first = 0, loss = 0, losses[20];
    std::vector<std::vector<int32_t>> block_indices;
    for (int step = 0; step < 20; step++) {
        const Documents &batch = d[step % 3];
        gpu_step(model, &o, batch, step + 1, &loss);
        if (step < 10) {
            copy_block_indices(&cpu_model, model, &block_indices);
            cpu::model_zero_grad(&cpu_model);
            double reference = cpu::model_forward(&cpu_model, batch.tokens.data(), batch.targets.data(),
                                                  batch.cu_seqlens.data(), batch.batch.num_seqs);
            cpu::model_backward(&cpu_model, 1);
            double norm = cpu::model_grad_norm(&cpu_model);
            cpu::model_update(&cpu_model, step + 1, o.lr, o.beta1, o.beta2, o.eps, o.weight_decay,
                              norm > o.clip ? o.clip / norm : 1);
            worst_step = std::max(worst_step, fabs(loss - reference) / reference);
            CHECK(fabs(loss - reference) < step_limit * reference,
                  "%s: step %d: loss %.5f, the C trainer's %.5f", v->name, step + 1, loss, reference);
        }
        losses[step] = loss;
        if (step == 0) first = loss;
        if (step == 14) { // the checkpoint
            state.step = 15;
            finish_update(model);
            std::vector<float> arrays[3];
            const float *device[3] = {model->optimizer.master, model->optimizer.m, model->optimizer.v};
            for (int i = 0; i < 3; i++) arrays[i] = download(device[i], model->layout.num_params);
            checkpoint_save(folder, &c, &state, arrays[0].data(), arrays[1].data(), arrays[2].data(),
                            model->layout.num_params);
        }
    }
    CHECK(loss < first - 0.3, "%s: the loss falls from %.4f to %.4f only", v->name, first, loss);

    char path[PATH_BYTES];
    checkpoint_path(path, sizeof path, folder, 15);
    std::vector<float> arrays[3];
    for (std::vector<float> &a : arrays) a.resize(model->layout.num_params);
    checkpoint_load(path, &c, &init, &state, arrays[0].data(), arrays[1].data(), arrays[2].data(),
                    model->layout.num_params);
    Model *resumed = build(&c, arrays[0], n, 2);
    model_set(resumed, arrays[0].data(), arrays[1].data(), arrays[2].data());
    for (int step = 15; step < 20; step++) {
        gpu_step(resumed, &o, d[step % 3], step + 1, &loss);
        CHECK(loss == losses[step], "%s: step %d after a checkpoint: loss %.9g, not %.9g", v->name, step + 1,
              loss, losses[step]);
    }
    finish_update(model), finish_update(resumed);
    CHECK(download(resumed->optimizer.master, resumed->layout.num_params) ==
                  download(model->optimizer.master, model->layout.num_params) &&
              download(resumed->optimizer.v, resumed->layout.num_params) ==
                  download(model->optimizer.v, model->layout.num_params),
          "%s: a resumed run has other bits", v->name);
    unlink(path);
    rmdir(folder);
    destroy(resumed);
    destroy(model);
    cpu::model_free(&cpu_model);
}

// Tests that the trainer loads parameters and moments of a checkpoint of version 1, 2 or 3. The gates' biases
// are 0 in versions 1 and 2.
static void test_checkpoint_old(const Variant *v, int version) {
    static Run r;
    r.config = make_config(v), r.resuming = 1, r.state.seq_len = 16;
    std::vector<float> arrays[3];
    for (int i = 0; i < 3; i++) arrays[i] = random_params(&r.config, 10 + i);
    const int64_t count = (int64_t)arrays[0].size();
    Model *model = build(&r.config, std::vector<float>(count, 0.0f), 16, 0);
    for (int64_t i = 0; i < model->layout.num_tensors; i++) {
        const ParamTensor *t = &model->layout.tensors[i];
        for (std::vector<float> &a : arrays)
            if (version < 3 && param_is(t, "bgate")) std::fill_n(a.begin() + t->offset, t->size, 0.0f);
    }
    char folder[] = "/tmp/test_gpt_nsa.XXXXXX";
    if (!mkdtemp(folder)) die("%s: %s", folder, strerror(errno));
    checkpoint_old_save(folder, &r.config, &r.state, version, arrays[0].data(), arrays[1].data(),
                        arrays[2].data());
    checkpoint_path(r.checkpoint, sizeof r.checkpoint, folder, 0);
    load_params(&r, &model->params, &model->optimizer, model->stream);
    const float *device[3] = {model->optimizer.master, model->optimizer.m, model->optimizer.v};
    for (int i = 0; i < 3; i++)
        CHECK(download(device[i], count) == arrays[i], "%s: array %d of version %d differs", v->name, i,
              version);
    unlink(r.checkpoint);
    rmdir(folder);
    destroy(model);
}

// Tests validation, and the logits of the next token, of a model that is built without training's memory.
static void test_inference(const Variant *v) {
    ModelConfig c = make_config(v);
    std::vector<float> params = random_params(&c, 1);
    Documents d(&c, test_lengths(), 2);
    const int64_t n = d.batch.n;
    Model *model = build(&c, params, n, 0);
    Result trained = run(model, d);
    destroy(model);
    model = new Model;
    model_build(model, &c, n, 0, 0, 0, NULL, 0);
    model_set(model, params.data(), NULL, NULL);
    Run r;
    memset(&r, 0, sizeof r);
    r.inputs = d.tokens.data(), r.targets = d.targets.data();
    r.cu_seqlens = d.cu_seqlens.data(), r.num_seqs = d.batch.num_seqs;
    const float *losses;
    const int32_t *argmax;
    evaluate(model, &r, &losses, &argmax);
    CHECK(memcmp(losses, trained.losses.data(), n * sizeof(float)) == 0, "%s: validation has other losses",
          v->name);

    cpu::Model cpu_model;
    cpu::model_build(&cpu_model, &c, n, 0);
    std::copy(params.begin(), params.end(), cpu_model.params.weights);
    cpu::model_forward(&cpu_model, d.tokens.data(), d.targets.data(), d.cu_seqlens.data(), d.batch.num_seqs);
    int64_t same = 0;
    for (int64_t i = 0; i < n; i++) same += argmax[i] == cpu_model.acts.argmax[i];
    CHECK((double)same >= 0.9 * (double)n, "%s: %lld of %lld arg maxes agree", v->name, (long long)same,
          (long long)n);
    const int64_t row = c.fsa.kv_heads * c.fsa.topk;
    std::vector<int32_t> block_indices(c.layers * n * row);
    for (int64_t length : {(int64_t)1, (int64_t)29, n}) {
        model->host.block_indices = block_indices.data();
        const float *logits = next_logits(model, d.tokens.data(), length);
        model->host.block_indices = NULL;
        // the C model gets the sequence with the GPU's padding, and the GPU's block indices
        const int64_t padded = model->batch.n, cu_seqlens[2] = {0, padded};
        std::vector<int32_t> tokens(d.tokens.begin(), d.tokens.begin() + length);
        tokens.resize(padded);
        for (int l = 0; l < c.layers && c.attn == ATTN_NSA; l++) // layers of full attention read none
            cpu_model.acts.layers[l].block_indices = block_indices.data() + l * padded * row;
        cpu::model_forward(&cpu_model, tokens.data(), tokens.data(), cu_seqlens, 1);
        double error =
            relative_error(logits, cpu_model.acts.logits + (length - 1) * c.padded_vocab, c.vocab_size);
        worst_next = std::max(worst_next, error);
        CHECK(error < 2 * logit_limit, "%s: logits after %lld tokens: error %.2e", v->name, (long long)length,
              error); // one row has a larger spread than all rows
    }
    cpu::model_free(&cpu_model);
    destroy(model);
}

// Tests losses, logits and gradients against PyTorch, folded as in dev/test/golden.py. These weights are not
// exact in 16 bits, so the limits are twice as large.
static void test_golden(const char *name) {
    Golden file, *g = &file;
    golden_load(g, name);
    ModelConfig c;
    memset(&c, 0, sizeof c);
    int fields;
    const ModelField *field = model_fields(&fields);
    for (int i = 0; i < fields; i++)
        model_field_set(&c, &field[i], golden_get(g, 'f', "config.", field[i].name)->f[0]);
    char message[256];
    if (config_check(&c, message, sizeof message)) die("%s: %s", name, message);
    std::vector<int64_t> lengths;
    const GoldenTensor *cu_seqlens = golden_get(g, 'i', "", "cu_seqlens");
    for (int64_t i = 1; i < cu_seqlens->size; i++) lengths.push_back(cu_seqlens->i[i] - cu_seqlens->i[i - 1]);
    Documents d(&c, lengths, 0);
    const int64_t n = d.batch.n, V = c.vocab_size, Vp = c.padded_vocab;
    for (int64_t i = 0; i < n; i++) {
        d.tokens[i] = (int32_t)golden_ints(g, "tokens")[i];
        d.targets[i] = (int32_t)golden_ints(g, "targets")[i];
    }
    cuda_check(cudaMemcpy(d.batch.tokens, d.tokens.data(), n * sizeof(int32_t), cudaMemcpyHostToDevice));
    cuda_check(cudaMemcpy(d.batch.targets, d.targets.data(), n * sizeof(int32_t), cudaMemcpyHostToDevice));

    int64_t total, count = param_table(&c, NULL, &total);
    std::vector<ParamTensor> table(count);
    param_table(&c, table.data(), &total);
    std::vector<float> params(total, 0.5f);
    std::vector<double> values(total);
    auto real_size =
        [&](const ParamTensor &t) { // without the padding of the vocabulary or of the gate's bias
            if (param_is(&t, "wte") || param_is(&t, "lm_head")) return V * t.cols;
            return param_is(&t, "bgate") ? (int64_t)num_gate_logits(&c.fsa) : t.size;
        };
    for (const ParamTensor &t : table) {
        golden_fill(g, t.name, values.data(), real_size(t));
        for (int64_t i = 0; i < real_size(t); i++) params[t.offset + i] = (float)values[i];
    }
    Model *model = build(&c, params, n, 0);
    model->batch = d.batch;
    model_forward(model);
    matmul_forward(&model->linears.matmul, model->scratch.logits, Vp, model->acts.lnf_out, c.channels,
                   weight(model, model->layout.lm_head), NULL, n, c.channels, Vp, model->stream);
    std::vector<floatX> logits = download(model->scratch.logits, n * Vp);
    values.clear();
    for (int64_t i = 0; i < n * Vp; i++)
        if (i % Vp < V) values.push_back((double)(float)logits[i]);
    golden_check(g, "", "logits", values.data(), n * V, 2 * logit_limit);
    Result result = run(model, d);
    values.assign(result.losses.begin(), result.losses.end());
    golden_check(g, "", "losses", values.data(), n, 2 * logit_limit);
    for (const ParamTensor &t : table) {
        values.clear();
        for (int64_t i = 0; i < real_size(t); i++)
            values.push_back((double)result.grads[t.offset + i] / (double)n); // of the mean
        golden_check(g, "grad.", t.name, values.data(), real_size(t), 2 * grad_limit);
    }
    destroy(model);
    golden_free(g);
}

// Returns the block indices of the last forward pass: for each layer and KV head the rows [n, topk].
static std::vector<std::vector<int32_t>> block_indices_by_head(const Model *model) {
    const HeadGroups *g = &model->groups;
    const FsaConfig group = head_group_config(&model->config.fsa, g);
    const FsaDeviceBatch b = fsa_device_batch(&model->batch);
    const int64_t size = b.num_queries * group.topk;
    std::vector<std::vector<int32_t>> heads;
    for (int l = 0; l < model->config.layers; l++)
        for (int i = 0; i < g->count && layer_attention(&model->config, l) == ATTN_NSA; i++)
            for (int h = 0; h < group.kv_heads; h++)
                heads.push_back(download(
                    fsa_saved_block_indices(&group, attn_dtype, &b,
                                            model->acts.layers[l].saved + i * g->saved_bytes[ATTN_NSA]) +
                        h * size,
                    size));
    return heads;
}

// Tests two GPUs that share a batch, one head group after another, against one GPU. Only the order of
// rounding differs; it may select another block where two scores are nearly equal, so the test takes the
// first parameters with which it does not. Two runs, and a run with recomputation, must be bitwise equal.
static void test_shared(const Variant *v, Gpus *gpus) {
    ModelConfig c = make_config(v);
    Documents whole(&c, test_lengths(), 2), part(&c, test_lengths(), 2, gpus), other(&c, {40, 8}, 3, gpus);
    const int64_t n = whole.batch.n, local_n = part.batch.n;
    const Batch host_batch = batch_bind(&part.batch, part.host.data());
    std::vector<float> params, losses(local_n);
    Result expected, first;
    int64_t others = 1; // block indices of the GPUs that differ from one GPU's
    for (int stream = 1; others > 0 && stream <= 8; stream++) {
        params = random_params(&c, stream);
        Model *single = build(&c, params, n, 0), *shared = build(&c, params, n, 0, gpus);
        expected = run(single, whole);
        run(shared, part);
        const auto expected_indices = block_indices_by_head(single), indices = block_indices_by_head(shared);
        int64_t local_others = 0, all_others[2];
        for (size_t h = 0; h < indices.size(); h++) {
            std::vector<int32_t> rows(indices[h].size());
            cp_gather_rows(gpus->cp_size, n, host_batch.num_chunks, host_batch.chunk_perm, gpus->cp_rank,
                           rows.data(), expected_indices[h].data(), c.fsa.topk * sizeof(int32_t));
            for (size_t i = 0; i < rows.size(); i++) local_others += rows[i] != indices[h][i];
        }
        comm_allgather(gpus->comm, &local_others, sizeof local_others, all_others);
        others = all_others[0] + all_others[1];
        destroy(single), destroy(shared);
    }
    CHECK(others == 0, "%s, shared: %lld other block indices with each of 8 parameters", v->name,
          (long long)others);
    cp_gather_rows(gpus->cp_size, n, host_batch.num_chunks, host_batch.chunk_perm, gpus->cp_rank,
                   losses.data(), expected.losses.data(), sizeof(float));
    for (int recompute = 0; recompute <= 2; recompute++) {
        Model *model = build(&c, params, n, recompute, gpus);
        CHECK(model->groups.count == c.fsa.kv_heads, "%s: %d head groups", v->name, model->groups.count);
        if (recompute == 0) {
            first = run(model, part);
            run(model, other); // leaves other values in all buffers
        }
        CHECK(run(model, part) == first, "%s, shared: recomputation %d: other bits than the first run",
              v->name, recompute);
        destroy(model);
    }
    double error = relative_error(first.losses.data(), losses.data(), local_n);
    CHECK(error < loss_limit, "%s, shared: losses: error %.2e", v->name, error);
    int64_t total, count = param_table(&c, NULL, &total);
    std::vector<ParamTensor> table(count);
    param_table(&c, table.data(), &total);
    for (const ParamTensor &t : table) {
        error = relative_error(&first.grads[t.offset], &expected.grads[t.offset], t.size);
        worst_grad = std::max(worst_grad, error);
        CHECK(error < grad_limit, "%s, shared: gradient of %s: error %.2e", v->name, t.name, error);
    }
}

// Runs in each of the two processes. Returns the exit code.
static int test_rank(void *) {
    static const Variant variants[] = {
        {"nsa, bias, QK-norm", ATTN_NSA, 0, 1, 1, 6, 3, 0, FSA_PHI_LINEAR, 0, 0},
        {"nsa, mean, a gate a token", ATTN_NSA, 1, 0, 0, 4, 2, 1, FSA_PHI_MEAN, 0, 0},
        {"full", ATTN_FULL, 0, 1, 0, 4, 2, 0, FSA_PHI_LINEAR, 0, 0},
        {"window, QK-norm", ATTN_WINDOW, 0, 0, 1, 4, 4, 0, FSA_PHI_LINEAR, 0, 0},
        {"nsa and full", ATTN_NSA, 1, 1, 0, 4, 2, 1, FSA_PHI_LINEAR, 0, 2}};
    Comm comm;
    Gpus gpus;
    comm_start(&comm);
    int devices;
    cuda_check(cudaGetDeviceCount(&devices));
    cuda_check(cudaSetDevice(comm.local_rank % devices));
    gpus_init(&gpus, &comm, comm.ranks);
    for (const Variant &v : variants) test_shared(&v, &gpus);
    if (comm.rank == 0) printf("shared: largest error of a gradient %.2e\n", worst_grad);
    gpus_free(&gpus);
    comm_end(&comm);
    return test_failed != 0;
}

int main(int argc, char **argv) {
    int devices = 0;
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "seed=", 5) == 0) seed = strtoull(argv[i] + 5, NULL, 10);
        if (strcmp(argv[i], "small") == 0) small = 1;
    }
    printf("seed=%llu, %s\n", (unsigned long long)seed, FLOATX_NAME);
#ifdef MULTI_GPU
    const int gpus = test_gpus();
#else
    const int gpus = 1;
#endif
    if (gpus < 2) {
        SKIP("a batch shared by two GPUs: GPUS is %d, or built without NCCL", gpus);
    } else {
        int failed = test_ranks(2, test_rank, NULL);
        CHECK(failed == 0, "%d of 2 GPUs that share a batch failed", failed);
    }
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        SKIP("no GPU");
        return test_end("test_gpt_nsa");
    }
    static const Variant nsa = {"nsa, bias, QK-norm", ATTN_NSA, 0, 1, 1, 3, 1, 0, FSA_PHI_LINEAR, 0, 0};
    static const Variant nsa_mean = {
        "nsa, tied, mean, a gate a token", ATTN_NSA, 1, 0, 0, 4, 2, 1, FSA_PHI_MEAN, 8, 0};
    static const Variant full = {"full, tied, bias", ATTN_FULL, 1, 1, 0, 2, 1, 0, FSA_PHI_LINEAR, 8, 0};
    static const Variant window = {"window, QK-norm", ATTN_WINDOW, 0, 0, 1, 2, 2, 0, FSA_PHI_LINEAR, 0, 0};
    static const Variant hybrid = {"nsa and full", ATTN_NSA, 1, 1, 0, 2, 1, 0, FSA_PHI_LINEAR, 8, 2};
    static const Variant hybrid_norm = {"nsa and full, QK-norm", ATTN_NSA, 0, 0, 1, 2, 2, 0,
                                        FSA_PHI_LINEAR,          0,        3};
    static const Variant hybrid_window = {"window and full", ATTN_WINDOW, 0, 0, 0, 2, 1, 0,
                                          FSA_PHI_LINEAR,    0,           2};
    for (const Variant *v : {&nsa, &nsa_mean, &full, &window, &hybrid, &hybrid_norm, &hybrid_window})
        test_against_c(v);
    test_golden("model_gpu");
    test_golden("model_gpu_full");
    for (const Variant *v : {&nsa, &full, &window, &hybrid, &hybrid_norm, &hybrid_window}) test_same_bits(v);
    if (has_fp8()) {
        for (const Variant *v : {&nsa, &nsa_mean, &full, &hybrid}) test_fp8(v);
        test_fp8_not_finite(&nsa);
    } else {
        SKIP("-matmul fp8: %s, or a GPU below compute capability 8.9", FLOATX_NAME);
    }
    test_accumulation(&full);
    test_training(&nsa);
    test_training(&hybrid);
    test_checkpoint_old(&nsa, 1);
    test_checkpoint_old(&nsa, 2);
    test_checkpoint_old(&nsa, 3);
    test_inference(&nsa);
    test_inference(&full);
    test_inference(&hybrid);
    test_inference(&hybrid_window);
    printf("largest errors: losses %.2e, logits %.2e, of the next token %.2e, gradients %.2e, losses of 15 "
           "steps %.2e; largest difference of a gradient with fp8 %.2e\n",
           worst_loss, worst_logit, worst_next, worst_grad, worst_step, worst_fp8);
    return test_end("test_gpt_nsa");
}
