// dense_backward.cu: backward pass of dense attention: causal, sliding window, compressed.
//   version 1: one warp per query and head (dq), one warp per key and KV head (dk, dv), in fp32
//   library:   fsa_dense_backward: fsa/sm90/dense_bwd.cu on Hopper (one kernel that adds to dQ in a fixed
//              order), fsa/sm80/dense_bwd.cu elsewhere (one kernel for dQ, one for dK and dV)
// Gradients are checked with a gate: the kernels read the ungated dout, and lse_bwd = lse - ln(gate).
// usage: dense_backward [seed=N] [check [small] | time]      both by default
#include "../../fsa/dense.cuh"
#include "shapes.h"

template <typename T, int D> __device__ void load_row(float (&x)[D / 32], const void *in, int64_t row) {
    for (int i = 0; i < D / 32; i++) x[i] = to_f32(((const T *)in)[row * D + i * 32 + threadIdx.x % 32]);
}
template <int N> __device__ float warp_dot(const float (&x)[N], const float (&y)[N]) {
    float s = 0;
    for (int i = 0; i < N; i++) s += x[i] * y[i];
    for (int step = 16; step > 0; step /= 2) s += __shfl_xor_sync(~0u, s, step);
    return s;
}
template <int N> __device__ void store_row(float *out, int64_t row, const float (&x)[N], bool accumulate) {
    for (int i = 0; i < N; i++) {
        float &y = out[row * N * 32 + i * 32 + threadIdx.x % 32];
        y = accumulate ? y + x[i] : x[i];
    }
}

// Version 1. Each query reads its K and V again, and each key its Q and dout, so the kernels are limited by
// L2 bandwidth.
template <typename T, int D> __global__ void __launch_bounds__(128) naive_dq_kernel(const DenseParams p) {
    int64_t index = blockIdx.x * 4ll + threadIdx.x / 32, row = index / p.q_heads, seq, pos;
    if (row >= p.batch.nq) return;
    int kv_head = index % p.q_heads / (p.q_heads / p.kv_heads);
    query_position(p.batch, row, &seq, &pos);
    float q[D / 32], dout[D / 32], k[D / 32], v[D / 32], dq[D / 32] = {};
    load_row<T, D>(q, p.q.data, index);
    load_row<T, D>(dout, p.dout.data, index);
    for (int j = p.mask.first_key((int)pos); j < p.mask.end_key((int)pos); j++) {
        int64_t key = (p.cu_keys[seq] + j) * p.kv_heads + kv_head;
        load_row<T, D>(k, p.k.data, key);
        load_row<T, D>(v, p.v.data, key);
        float prob = expf(p.scale * warp_dot(q, k) - p.lse_bwd[index]);
        float ds = p.scale * prob * (warp_dot(dout, v) - p.delta[index]);
        for (int i = 0; i < D / 32; i++) dq[i] += ds * k[i];
    }
    int64_t dq_row = dq_accum_row(p.batch.nq, p.q_heads / p.kv_heads, row, (int)(index % p.q_heads));
    for (int i = 0; i < D / 32; i++) {
        int column = i * 32 + threadIdx.x % 32;
        float &y = p.dq_accum[dq_row * D + dq_accum_chunk(dq_row, column / 8) * 8 + column % 8];
        y = p.accumulate_dq ? y + dq[i] : dq[i];
    }
}
template <typename T, int D> __global__ void __launch_bounds__(128) naive_dkdv_kernel(const DenseParams p) {
    int64_t index = blockIdx.x * 4ll + threadIdx.x / 32, key = index / p.kv_heads;
    if (key >= p.cu_keys[p.batch.num_seqs]) return;
    int kv_head = index % p.kv_heads, g = p.q_heads / p.kv_heads;
    int64_t seq = find_in_cu(p.cu_keys, p.batch.num_seqs, key);
    int j = (int)(key - p.cu_keys[seq]);
    float q[D / 32], dout[D / 32], k[D / 32], v[D / 32], dk[D / 32] = {}, dv[D / 32] = {};
    load_row<T, D>(k, p.k.data, index);
    load_row<T, D>(v, p.v.data, index);
    for (int64_t s = 0; s < p.batch.num_segments; s++) {
        FsaSegment segment = p.batch.segments[s];
        if (segment.seq != seq) continue;
        for (int64_t t = segment.pos; t < segment.pos + segment.len; t++) {
            if (!p.mask.visible((int)t, j)) continue;
            for (int h = 0; h < g; h++) {
                int64_t row = (p.batch.cu_queries[s] + t - segment.pos) * p.q_heads + kv_head * g + h;
                load_row<T, D>(q, p.q.data, row);
                load_row<T, D>(dout, p.dout.data, row);
                float prob = expf(p.scale * warp_dot(q, k) - p.lse_bwd[row]);
                float ds = p.scale * prob * (warp_dot(dout, v) - p.delta[row]);
                for (int i = 0; i < D / 32; i++) dk[i] += ds * q[i], dv[i] += prob * dout[i];
            }
        }
    }
    store_row(p.dk_accum, index, dk, p.accumulate_dkv);
    store_row(p.dv_accum, index, dv, p.accumulate_dkv);
}
template <typename T, int D> static int launch_naive(const DenseParams &d, cudaStream_t stream) {
    unsigned dq_grid = (unsigned)((d.batch.nq * d.q_heads + 3) / 4);
    TRY(LAUNCH((naive_dq_kernel<T, D>), dq_grid, 128, 0, stream, d));
    unsigned dkdv_grid = (unsigned)((d.num_keys * d.kv_heads + 3) / 4);
    if (dkdv_grid > 0) TRY(LAUNCH((naive_dkdv_kernel<T, D>), dkdv_grid, 128, 0, stream, d));
    return FSA_OK;
}
static int naive_backward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, FsaVisibility rule,
                          ConstRows q, ConstRows k, ConstRows v, ConstRows dout, const float *lse_bwd,
                          const float *delta, float *dq, float *dk, float *dv, int accumulate_dq,
                          int accumulate_dkv, void *, cudaStream_t stream) {
    DenseParams d = make_dense_params(c, batch, rule);
    d.q = q, d.k = k, d.v = v, d.dout = dout, d.lse_bwd = lse_bwd, d.delta = delta;
    d.dq_accum = dq, d.dk_accum = dk, d.dv_accum = dv;
    d.accumulate_dq = accumulate_dq, d.accumulate_dkv = accumulate_dkv;
    return FSA_DISPATCH(dtype, c->head_dim, launch_naive, d, stream);
}

static const struct Version {
    const char *name;
    decltype(&fsa_dense_backward) run;
} versions[] = {{"1", naive_backward}, {"library", fsa_dense_backward}};

static double worst[2][3]; // largest relative error of the library: [dtype][rule]

template <typename T>
static void check_shape(Random *r, const Shape &s,
                        const std::vector<FsaVisibility> &rules = {FSA_CAUSAL, FSA_WINDOW, FSA_COMPRESSED}) {
    const FsaConfig &c = s.c;
    Batch b(c, s.lengths, s.segments);
    int64_t nq = b.batch.nq, d = c.head_dim, rows = nq * c.q_heads;
    Host<T> q(r, rows * d, 1.5f), dout(r, rows * d, 1);
    Buffer<T> q_dev(q.raw), dout_dev(dout.raw);
    for (FsaVisibility rule : rules) {
        int64_t keys = rule == FSA_COMPRESSED ? fsa_batch_windows(&c, &b.ref) : b.batch.n,
                size = keys * c.kv_heads * d;
        Host<T> k(r, size, 1), v(r, size, 1);
        std::vector<float> o(rows * d), lse(rows), delta(rows), lse_bwd(rows), gated(rows * d);
        std::vector<float> ref[3] = {std::vector<float>(rows * d), std::vector<float>(size),
                                     std::vector<float>(size)};
        fsa_ref_attention_forward_f32(&c, &b.ref, rule, q.f.data(), k.f.data(), v.f.data(), NULL, o.data(),
                                      lse.data());
        for (int64_t i = 0; i < rows; i++) {
            double gate = r->uniform(), sum = 0;
            if (r->below(50) == 0) gate = 0;
            for (int64_t x = i * d; x < (i + 1) * d; x++) {
                sum += (double)o[x] * dout.f[x];
                gated[x] = (float)gate * dout.f[x];
            }
            delta[i] = (float)sum;
            lse_bwd[i] = isinf(lse[i]) ? INFINITY : (float)(lse[i] - log(gate));
        }
        fsa_ref_attention_backward_f32(&c, &b.ref, rule, q.f.data(), k.f.data(), v.f.data(), NULL, o.data(),
                                       lse.data(), gated.data(), ref[0].data(), ref[1].data(), ref[2].data());
        Buffer<T> k_dev(kv_elements(c, b.batch, rule)), v_dev(k_dev.n);
        k_dev.set(k.raw), v_dev.set(v.raw);
        Buffer<float> delta_dev(delta), lse_dev(lse_bwd), dq(rows * d), dk(size), dv(size);
        Buffer<char> workspace((int64_t)fsa_dense_backward_scratch_bytes(&c, &b.batch, rule));
        Buffer<float> *outs[3] = {&dq, &dk, &dv};
        for (const Version &version : versions) {
            std::string name = std::string(version.name) + " " + rule_names[rule] + " " + Dtype<T>::name +
                               " " + shape_name(s);
            std::vector<float> first[3];
            for (int run = 0; run < 3; run++) { // overwrite, overwrite, add
                for (int i = 0; i < 3 && run < 2; i++) outs[i]->poison();
                FSA_CHECK(version.run(&c, &b.batch, Dtype<T>::value, rule, packed_q(&c, q_dev),
                                      packed_kv(&c, k_dev), packed_kv(&c, v_dev), packed_q(&c, dout_dev),
                                      lse_dev, delta_dev, dq, dk, dv, run == 2, run == 2, workspace.get(),
                                      0));
                CUDA_CHECK(cudaDeviceSynchronize());
                for (int i = 0; i < 3; i++) {
                    std::vector<float> bits = outs[i]->host();
                    if (i == 0) bits = dq_from_accum(c, nq, bits);
                    if (run == 1) {
                        bool same = memcmp(bits.data(), first[i].data(), bits.size() * sizeof(float)) == 0;
                        check_that(same, ("repeat of " + name).c_str(), 1, 0);
                    } else if (run == 2) {
                        for (float &x : bits) x /= 2;
                        double err = relative_error(bits, first[i]);
                        check_that(err <= 1e-6, ("sum of " + name).c_str(), err, 1e-6);
                    }
                    if (run < 2) first[i] = bits;
                }
            }
            for (int i = 0; i < 3; i++) {
                static const char *const names[] = {"dq ", "dk ", "dv "};
                double max_grad = 0, err = relative_error(first[i], ref[i]);
                // If every query sees one key, dq = dk = 0 up to rounding. Then err is absolute.
                for (float x : ref[i]) max_grad = std::max(max_grad, fabs((double)x));
                if (max_grad < 1e-4) {
                    err = 0;
                    for (float x : first[i])
                        err = std::isfinite(x) ? std::max(err, fabs((double)x)) : INFINITY;
                }
                check_that(err <= Dtype<T>::grad_tolerance, (names[i] + name).c_str(), err,
                           Dtype<T>::grad_tolerance);
                check_that(outs[i]->guards_intact(), ("guards " + name).c_str(), 1, 0);
                if (&version != versions) {
                    double &w = worst[Dtype<T>::value][rule];
                    w = std::max(w, err);
                }
            }
        }
    }
}

template <typename T> static void time_shape(const Timing &t, int d, uint64_t seed) {
    FsaConfig c = default_config(t.hq, t.hkv, d, 64, 16);
    Batch b(c, {t.n});
    Buffer<T> q(t.n * t.hq * d), k(t.n * t.hkv * d), v(t.n * t.hkv * d), o(t.n * t.hq * d),
        dout(t.n * t.hq * d);
    Buffer<float> lse(t.n * t.hq), delta(t.n * t.hq), dq(t.n * t.hq * d), dk(t.n * t.hkv * d),
        dv(t.n * t.hkv * d);
    fill_random(q.get(), q.n, seed, 1.0f);
    fill_random(k.get(), k.n, seed + 1, 1.0f);
    fill_random(v.get(), v.n, seed + 2, 1.0f);
    fill_random(dout.get(), dout.n, seed + 3, 1.0f);
    fill_random(delta.get(), delta.n, seed + 4, 1.0f);
    for (int rule = FSA_CAUSAL; rule <= FSA_COMPRESSED; rule++) {
        Buffer<char> workspace((int64_t)fsa_dense_backward_scratch_bytes(&c, &b.batch, (FsaVisibility)rule));
        FSA_CHECK(fsa_dense_forward(&c, &b.batch, Dtype<T>::value, (FsaVisibility)rule, packed_q(&c, q),
                                    packed_kv(&c, k), packed_kv(&c, v), packed_q(&c, o), lse, 0));
        for (const Version &version : versions) {
            bool naive = &version == versions;
            if (naive ? t.n > 8192 || rule == FSA_CAUSAL : rule == FSA_CAUSAL && t.n > 8192 && t.hkv != 8)
                continue;
            double ms = time_ms(
                [&] {
                    FSA_CHECK(version.run(&c, &b.batch, Dtype<T>::value, (FsaVisibility)rule, packed_q(&c, q),
                                          packed_kv(&c, k), packed_kv(&c, v), packed_q(&c, dout), lse, delta,
                                          dq, dk, dv, 0, 0, workspace.get(), 0));
                },
                naive ? 1 : 10);
            // FLOPs of a backward pass, 5 matmuls. The sm80 kernels compute 7.
            double flops = visible_pairs(c, (FsaVisibility)rule, t.n) * t.hq * d * 10;
            int64_t keys = rule == FSA_COMPRESSED ? fsa_num_windows(&c, t.n) : t.n;
            double bytes = 8.0 * d * t.n * t.hq + 12.0 * d * keys * t.hkv + 8.0 * t.n * t.hq;
            report({"dense_backward", rule_names[rule], rule_attn[rule], "bwd", Dtype<T>::name, t.n, c, ms, 0,
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
        if (!small) // two head groups
            check_shape<__nv_bfloat16>(&r, plain_shape(18, 18, 64, {4300}), {FSA_WINDOW});
        for (int rule = 0; rule < 3; rule++) {
            printf("%-5s worst error: bf16 %.2e fp16 %.2e\n", rule_names[rule], worst[FSA_BF16][rule],
                   worst[FSA_FP16][rule]);
        }
        printf("dense_backward: %d passed, %d failed\n", checks_passed, checks_failed);
    }
    if (!has_flag(argc, argv, "check")) {
        for (const Timing &t : timings) time_shape<__nv_bfloat16>(t, 128, seed);
        time_shape<__half>(timings[2], 128, seed);
        time_shape<__nv_bfloat16>(timings[2], 64, seed);
    }
    return checks_failed != 0;
}
