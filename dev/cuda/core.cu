// dev/cuda/core.cu: times the whole attention through the public API, and full causal attention beside it.
//   ./core [seed=N]     (its correctness: dev/test/test_fsa.cu)
#include "common.h"

typedef __nv_bfloat16 T;

static void bench(Random *r, int64_t n, int hq, int hkv, bool full) {
    FsaConfig c = default_config(hq, hkv, 128, 64, 16);
    Batch batch(c, {n});
    FsaDeviceBatch b = {n, n, 1, 1, n, batch.plan.cu_seqlens, batch.plan.segments};
    int64_t size_q = n * hq * 128, size_k = n * hkv * 128, size_w = (int64_t)hkv * c.cmp_len * 128 * 128;
    Buffer<T> q(size_q), k(size_k), v(size_k), dout(size_q), o(size_q), dq(size_q), dk(size_k), dv(size_k);
    Buffer<T> gate(n * hq * 3), dgate(n * hq * 3), wk(size_w), wv(size_w);
    Buffer<float> lse(n * hq), dwk(size_w), dwv(size_w);
    T *all[] = {q, k, v, dout, gate};
    int64_t sizes[] = {size_q, size_k, size_k, size_q, n * hq * 3};
    for (int i = 0; i < 5; i++) fill_random(all[i], sizes[i], r->u64(), 1);
    fill_random(wk.get(), size_w, r->u64(), 1.0f / 64);
    fill_random(wv.get(), size_w, r->u64(), 1.0f / 64);
    dwk.zero(), dwv.zero();
    std::vector<double> f;
    for (int i = 0; i < 64; i++) f.push_back(pow(10000, -i / 64.0));
    Buffer<double> inv_freq(f);
    FsaPhiWeights phi = {wk.get(), NULL, wv.get()};
    FsaPhiGradients dphi = {dwk, NULL, dwv};
    FsaOperation forward = full ? FSA_ATTEND_FORWARD : FSA_FORWARD,
                 backward = full ? FSA_ATTEND_BACKWARD : FSA_BACKWARD;
    size_t bytes = std::max(fsa_workspace_size(&c, FSA_BF16, &b, forward),
                            fsa_workspace_size(&c, FSA_BF16, &b, backward));
    Buffer<char> work((int64_t)bytes), saved(full ? 1 : (int64_t)fsa_saved_size(&c, FSA_BF16, &b));
    double fwd = time_ms(
        [&] {
            if (full)
                FSA_CHECK(fsa_attend_forward(&c, FSA_BF16, &b, FSA_CAUSAL, q, k, v, o, lse, work, bytes, 0));
            else
                FSA_CHECK(fsa_forward(&c, FSA_BF16, &b, q, k, v, &phi, inv_freq, gate, NULL, o, saved, work,
                                      bytes, 0));
        },
        10, n < 32768);
    double bwd = time_ms(
        [&] {
            if (full)
                FSA_CHECK(fsa_attend_backward(&c, FSA_BF16, &b, FSA_CAUSAL, q, k, v, o, lse, dout, dq, dk, dv,
                                              work, bytes, 0));
            else
                FSA_CHECK(fsa_backward(&c, FSA_BF16, &b, k, v, &phi, inv_freq, gate, dout, saved, dq, dk, dv,
                                       &dphi, dgate, work, bytes, 0));
        },
        10, n < 32768);
    printf("core %s n %lld (%d, %d): fwd %.3f ms, bwd %.3f ms, workspace %.0f MiB, saved %.0f MiB\n",
           full ? "full" : "nsa", (long long)n, hq, hkv, fwd, bwd, bytes / 1048576.0, saved.n / 1048576.0);
    double flops = full ? 2.0 * n * n * hq * 128 : 0;
    record({"core", full ? "full" : "core", full ? "full" : "nsa", "fwd", "bf16", n, c, fwd,
            flops / fwd * 1e-9, -1, NULL, "library", 1});
    record({"core", full ? "full" : "core", full ? "full" : "nsa", "bwd", "bf16", n, c, bwd,
            2.5 * flops / bwd * 1e-9, -1, NULL, "library", 1});
}

int main(int argc, char **argv) {
    Random r(seed_from(argc, argv));
    for (int64_t n : {8192, 16384, 32768, 65536}) bench(&r, n, 32, 8, false);
    bench(&r, 65536, 32, 32, false);
    for (int64_t n : {8192, 32768}) bench(&r, n, 32, 8, true);
    return 0;
}
