// dense_forward.cu: forward pass of dense attention: causal, sliding window, compressed.
//   version 1: one warp per query and head, one key after another, in fp32
//   library:   fsa_dense_forward: fsa/sm90/dense_fwd.cu on Hopper, fsa/sm80/dense_fwd.cu elsewhere
// usage: dense_forward [seed=N] [check [small] | time]      both by default
#include "../../fsa/dense.cuh"
#include "shapes.h"

// Version 1. A lane holds d/32 channels. Each query reads its K and V again, so the kernel is limited by L2
// bandwidth.
template <typename T, int D>
__global__ void __launch_bounds__(128) naive_forward_kernel(const DenseParams p) {
    int64_t index = blockIdx.x * 4ll + threadIdx.x / 32, row = index / p.q_heads;
    if (row >= p.batch.nq) return;
    int q_head = index % p.q_heads, kv_head = q_head / (p.q_heads / p.kv_heads), lane = threadIdx.x % 32;
    int64_t seq, pos;
    query_position(p.batch, row, &seq, &pos);
    float q[D / 32], out[D / 32] = {}, max = -INFINITY, sum = 0;
    for (int i = 0; i < D / 32; i++) q[i] = to_f32(((const T *)p.q.data)[index * D + i * 32 + lane]);
    for (int j = p.mask.first_key((int)pos); j < p.mask.end_key((int)pos); j++) {
        int64_t key = ((p.cu_keys[seq] + j) * p.kv_heads + kv_head) * D;
        float s = 0;
        for (int i = 0; i < D / 32; i++) s += q[i] * to_f32(((const T *)p.k.data)[key + i * 32 + lane]);
        for (int step = 16; step > 0; step /= 2) s += __shfl_xor_sync(~0u, s, step);
        s *= p.scale;
        float new_max = fmaxf(max, s), rescale = expf(max - new_max), e = expf(s - new_max);
        max = new_max;
        sum = sum * rescale + e;
        for (int i = 0; i < D / 32; i++)
            out[i] = out[i] * rescale + e * to_f32(((const T *)p.v.data)[key + i * 32 + lane]);
    }
    for (int i = 0; i < D / 32; i++)
        ((T *)p.o.data)[index * D + i * 32 + lane] = (T)(sum > 0 ? out[i] / sum : 0);
    if (lane == 0) p.lse[index] = sum > 0 ? max + logf(sum) : -INFINITY;
}
template <typename T, int D> static int launch_naive(const DenseParams &d, cudaStream_t stream) {
    unsigned grid = (unsigned)((d.batch.nq * d.q_heads + 3) / 4);
    return LAUNCH((naive_forward_kernel<T, D>), grid, 128, 0, stream, d);
}
static int naive_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, FsaVisibility rule,
                         ConstRows q, ConstRows k, ConstRows v, Rows o, float *lse, cudaStream_t stream) {
    DenseParams d = make_dense_params(c, batch, rule);
    d.q = q, d.k = k, d.v = v, d.o = o, d.lse = lse;
    return FSA_DISPATCH(dtype, c->head_dim, launch_naive, d, stream);
}

static const struct Version {
    const char *name;
    decltype(&fsa_dense_forward) run;
} versions[] = {{"1", naive_forward}, {"library", fsa_dense_forward}};

static double worst[2][3]; // largest relative error of the library: [dtype][rule]

template <typename T> static void check_shape(Random *r, const Shape &s) {
    const FsaConfig &c = s.c;
    Batch b(c, s.lengths, s.segments);
    int64_t nq = b.batch.nq, d = c.head_dim;
    Host<T> q(r, nq * c.q_heads * d, 1.5f);
    Buffer<T> q_dev(q.raw);
    for (int rule = FSA_CAUSAL; rule <= FSA_COMPRESSED; rule++) {
        int64_t keys = rule == FSA_COMPRESSED ? fsa_batch_windows(&c, &b.ref) : b.batch.n;
        Host<T> k(r, keys * c.kv_heads * d, 1), v(r, keys * c.kv_heads * d, 1);
        Buffer<T> k_dev(kv_elements(c, b.batch, (FsaVisibility)rule)), v_dev(k_dev.n), o(nq * c.q_heads * d);
        k_dev.set(k.raw), v_dev.set(v.raw);
        Buffer<float> lse(nq * c.q_heads);
        std::vector<float> ref_o(o.n), ref_lse(lse.n);
        fsa_ref_attention_forward_f32(&c, &b.ref, (FsaVisibility)rule, q.f.data(), k.f.data(), v.f.data(),
                                      NULL, ref_o.data(), ref_lse.data());
        std::vector<T> first_bits;
        for (const Version &version : versions) {
            std::string name = std::string(version.name) + " " + rule_names[rule] + " " + Dtype<T>::name +
                               " " + shape_name(s);
            for (int repeat = 0; repeat < 2; repeat++) {
                o.poison();
                lse.poison();
                FSA_CHECK(version.run(&c, &b.batch, Dtype<T>::value, (FsaVisibility)rule, packed_q(&c, q_dev),
                                      packed_kv(&c, k_dev), packed_kv(&c, v_dev), packed_q(&c, o), lse, 0));
                CUDA_CHECK(cudaDeviceSynchronize());
                std::vector<T> bits = o.host();
                check_that(!repeat || memcmp(bits.data(), first_bits.data(), bits.size() * sizeof(T)) == 0,
                           ("repeat of " + name).c_str(), 1, 0);
                first_bits = bits;
            }
            double err = relative_error(o.floats(), ref_o), lse_err = lse_error(lse.host(), ref_lse);
            check_that(err <= Dtype<T>::out_tolerance, ("o " + name).c_str(), err, Dtype<T>::out_tolerance);
            check_that(lse_err <= 1e-3, ("lse " + name).c_str(), lse_err, 1e-3);
            check_that(o.guards_intact() && lse.guards_intact(), ("guards " + name).c_str(), 1, 0);
            if (&version != versions) {
                double &w = worst[Dtype<T>::value][rule];
                w = std::max(w, err);
            }
        }
    }
}

template <typename T> static void time_shape(const Timing &t, int d, uint64_t seed) {
    FsaConfig c = default_config(t.hq, t.hkv, d, 64, 16);
    Batch b(c, {t.n});
    Buffer<T> q(t.n * t.hq * d), k(t.n * t.hkv * d), v(t.n * t.hkv * d), o(t.n * t.hq * d);
    Buffer<float> lse(t.n * t.hq);
    fill_random(q.get(), q.n, seed, 1.0f);
    fill_random(k.get(), k.n, seed + 1, 1.0f);
    fill_random(v.get(), v.n, seed + 2, 1.0f);
    for (int rule = FSA_CAUSAL; rule <= FSA_COMPRESSED; rule++) {
        for (const Version &version : versions) {
            bool naive = &version == versions;
            if (naive && t.n > 8192) continue;
            double ms = time_ms(
                [&] {
                    FSA_CHECK(version.run(&c, &b.batch, Dtype<T>::value, (FsaVisibility)rule, packed_q(&c, q),
                                          packed_kv(&c, k), packed_kv(&c, v), packed_q(&c, o), lse, 0));
                },
                naive ? 3 : 10);
            double flops = visible_pairs(c, (FsaVisibility)rule, t.n) * t.hq * d * 4;
            int64_t keys = rule == FSA_COMPRESSED ? fsa_num_windows(&c, t.n) : t.n;
            double bytes = 4.0 * d * (t.n * t.hq + keys * t.hkv) + 4.0 * t.n * t.hq;
            report({"dense_forward", rule_names[rule], rule_attn[rule], "fwd", Dtype<T>::name, t.n, c, ms, 0,
                    worst[Dtype<T>::value][rule], NULL, version.name, 1},
                   flops, bytes);
        }
    }
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = seed_from_args(argc, argv);
    Random r(seed);
    // Timings report the error of a check in the same run; `time` runs the small check.
    bool small = has_flag(argc, argv, "small") || has_flag(argc, argv, "time");
    {
        for (const Shape &s : small ? small_shapes(&r) : test_shapes(&r, 24)) {
            check_shape<__nv_bfloat16>(&r, s);
            check_shape<__half>(&r, s);
        }
        for (int rule = 0; rule < 3; rule++) {
            printf("%-5s worst error: bf16 %.2e fp16 %.2e\n", rule_names[rule], worst[FSA_BF16][rule],
                   worst[FSA_FP16][rule]);
        }
        printf("dense_forward: %d passed, %d failed\n", checks_passed, checks_failed);
    }
    if (!has_flag(argc, argv, "check")) {
        for (const Timing &t : timings) time_shape<__nv_bfloat16>(t, 128, seed);
        time_shape<__half>(timings[2], 128, seed);
        time_shape<__nv_bfloat16>(timings[2], 64, seed);
    }
    return checks_failed != 0;
}
