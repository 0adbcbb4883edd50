// dev/cuda/adamw.cu: AdamW with fp32 master weights.
//   version 1: a thread a parameter, a launch a tensor
//   library  : one launch, 16-byte accesses (llmc/adamw.cuh)
//   ./adamw [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "layers.h"
#include "../../llmc/adamw.cuh"

static const double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;

// Version 1.
__global__ void adamw_v1_kernel(floatX *params, float *master, float *m, float *v, const float *grads,
                                int64_t count, float rate, float root, float decay, float b1, float b2,
                                float epsilon, const float *factor) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= count || factor[2] == 0) return;
    float g = grads[i] * factor[1];
    m[i] = b1 * m[i] + (1 - b1) * g;
    v[i] = b2 * v[i] + (1 - b2) * g * g;
    master[i] -= rate * m[i] / (sqrtf(v[i]) * root + epsilon) + decay * master[i];
    params[i] = (floatX)master[i];
}
static void adamw_v1(floatX *params, float *master, float *m, float *v, const float *grads,
                     const std::vector<AdamwRange> &ranges, int64_t count, int64_t step,
                     const float *factor) {
    float rate = (float)(lr / (1 - pow(beta1, (double)step)));
    float root = (float)(1 / sqrt(1 - pow(beta2, (double)step)));
    for (size_t i = 0; i < ranges.size(); i++) {
        int64_t at = ranges[i].begin, size = (i + 1 < ranges.size() ? ranges[i + 1].begin : count) - at;
        adamw_v1_kernel<<<(unsigned)((size + 255) / 256), 256>>>(
            params + at, master + at, m + at, v + at, grads + at, size, rate, root,
            (float)(ranges[i].decay ? lr * weight_decay : 0), (float)beta1, (float)beta2, (float)eps, factor);
        CUDA_CHECK(cudaGetLastError());
    }
}

static bool few_sms; // whether the GPU can run AdamW on a few SMs

// Three steps of all versions against the C trainer's cpu::model_update.
static void check(Random *r, const std::vector<int64_t> &sizes) {
    std::vector<AdamwRange> ranges;
    std::vector<ParamTensor> tensors;
    int64_t count = 0;
    for (size_t i = 0; i < sizes.size(); i++) {
        ParamTensor t;
        memset(&t, 0, sizeof t);
        t.offset = count, t.size = sizes[i], t.decay = i % 2 == 0;
        tensors.push_back(t);
        ranges.push_back({count, i % 2 == 0});
        count += sizes[i];
    }
    std::vector<float> p(count), m0(count, 0), g(count);
    for (float &x : p) x = r->normal();
    Buffer<AdamwRange> table(ranges);
    for (int version = 1; version <= 3; version++) {
        const char *name = version == 1 ? "1" : version == 2 ? "library" : "three SMs";
        if (version == 3 && !few_sms) continue;
        std::vector<float> p_ref = p, m_ref = m0, v_ref = m0;
        cpu::Model cpu_model;
        memset(&cpu_model, 0, sizeof cpu_model);
        cpu_model.layout.num_tensors = (int64_t)tensors.size(), cpu_model.layout.tensors = tensors.data();
        cpu_model.params.weights = p_ref.data(), cpu_model.params.grads = g.data();
        cpu_model.optimizer.m = m_ref.data(), cpu_model.optimizer.v = v_ref.data();
        Buffer<float> master(p), m(m0), v(m0), grads(count), factor(3);
        BufferX params(count);
        Buffer<float> all_master(p), all_m(m0), all_v(m0); // of all SMs, for version 3
        BufferX all_params(count);
        for (int64_t step = 1; step <= 4; step++) {
            float scale = 1.0f / (float)step;
            for (float &x : g) x = r->below(10) ? r->normal() : 0;
            grads.set(g);
            factor.set({123, scale, step == 3 ? 0.0f : 1.0f}); // step 3 is skipped
            if (version == 1)
                adamw_v1(params, master, m, v, grads, ranges, count, step, factor);
            else
                adamw(params, master, m, v, grads, count, table, (int)ranges.size(), lr, beta1, beta2, eps,
                      weight_decay, step, factor, version == 3 ? 3 : 0, 0);
            if (version == 3) { // the same bits, since a run that saves a checkpoint updates on all SMs
                adamw(all_params, all_master, all_m, all_v, grads, count, table, (int)ranges.size(), lr,
                      beta1, beta2, eps, weight_decay, step, factor, 0, 0);
                check_same("params on three SMs", params, all_params);
                check_same("master weights on three SMs", master, all_master);
                check_same("m on three SMs", m, all_m), check_same("v on three SMs", v, all_v);
            }
            if (step != 3) cpu::model_update(&cpu_model, step, lr, beta1, beta2, eps, weight_decay, scale);
            char shape[64];
            snprintf(shape, sizeof shape, "count %lld step %lld", (long long)count, (long long)step);
            check_close("m", name, shape, m, m_ref, 1e-6);
            check_close("v", name, shape, v, v_ref, 1e-6);
            check_close("step", name, shape, master, p_ref, 1e-6);
            std::vector<float> moved = master.host(), moved_ref = p_ref;
            for (int64_t i = 0; i < count; i++) moved[i] -= p[i], moved_ref[i] -= p[i];
            double e = relative_error(moved, moved_ref);
            check_that(e < 1e-3, "what the steps moved", e, 1e-3); // p has 2^-24, a step is 1e-3
            std::vector<floatX> weights = params.host();
            std::vector<float> full = master.host();
            bool rounded = params.guards_intact();
            for (int64_t i = 0; i < count; i++)
                rounded = rounded && to_float(weights[i]) == to_float(from_float<floatX>(full[i]));
            check_that(rounded, "weights are the rounded master weights", 1, 0);
        }
    }
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    few_sms = adamw_fits_few_sms();
    check(&r, {8});
    check(&r, {64, 8, 128, 16, 1200});
    check(&r, {4096, 20000, 8, 12, 4});
    if (!has_flag(argc, argv, "small")) {
        std::vector<int64_t> sizes;
        for (int i = 0; i < 300; i++) sizes.push_back(4 * (1 + r.below(i % 7 == 0 ? 5000 : 50)));
        int64_t sum = 0;
        for (int64_t size : sizes) sum += size;
        sizes.push_back(8 + sum % 8);
        check(&r, sizes);
    }
    for (int64_t count : {124 << 20, 1 << 30}) {
        if (has_flag(argc, argv, "check")) break;
        Buffer<float> master(count), m(count), v(count), grads(count), factor(std::vector<float>{1, 1, 1});
        BufferX params(count);
        fill_random(master.get(), count, r.u64(), 1), fill_random(grads.get(), count, r.u64(), 1);
        m.zero(), v.zero();
        std::vector<AdamwRange> ranges; // as of a model of 32 layers
        for (int i = 0; i < 320; i++) ranges.push_back({count / 320 / 4 * 4 * i, i % 2});
        Buffer<AdamwRange> table(ranges);
        double bytes = (28.0 + sizeof(floatX)) * (double)count;
        double ms = time_ms([&] { adamw_v1(params, master, m, v, grads, ranges, count, 1, factor); });
        report("adamw", "step", "1", count, 1, 0, ms, bytes, 0);
        ms = time_ms([&] {
            adamw(params, master, m, v, grads, count, table, (int)ranges.size(), lr, beta1, beta2, eps,
                  weight_decay, 1, factor, 0, 0);
        });
        report("adamw", "step", "library", count, 1, 0, ms, bytes, 0);
        for (int sms : {8, 16, 32}) {
            if (!few_sms) break;
            ms = time_ms([&] {
                adamw(params, master, m, v, grads, count, table, (int)ranges.size(), lr, beta1, beta2, eps,
                      weight_decay, 1, factor, sms, 0);
            });
            report("adamw", "step",
                   sms == 8    ? "8 SMs"
                   : sms == 16 ? "16 SMs"
                               : "32 SMs",
                   count, 1, 0, ms, bytes, 0);
        }
    }
    return finish("adamw");
}
