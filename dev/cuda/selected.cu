// dev/cuda/selected.cu: the selected branch, forward and backward, from a choice of blocks.
//   version 1: naive, a warp a (token, head)                              (selected_versions.h, forward
//   alone) version 2: vanilla NSA's order, query outside, g rows padded to a tile version 3: FSA as in its
//   paper: statistics kernel, main kernel, reduction library  : KV block outside, normalized partials merged
//   by a reduction (fsa/lists.cu, fsa/selected.cu)
//   ./selected [check] [seed=N]    (check: no timing)
#include "../../fsa/kernels.h"
#include "choice.h"
#include "selected_versions.h"

// Everything that one shape needs on the device, and the reference's answer where it was asked for.
template <typename T> struct Library {
    const FsaConfig &c;
    const FsaPlan &p;
    int64_t slab;
    Buffer<char> lists_memory, memory;
    Buffer<float> delta, lse_grad;
    FsaLists lists;
    Library(const FsaConfig &config, const FsaPlan &plan)
        : c(config), p(plan), slab(fsa_sel_slab(&c, &p)),
          lists_memory((int64_t)fsa_lists_bytes(&c, &p, slab)),
          memory((int64_t)std::max(fsa_sel_bytes(&c, &p, 0), fsa_sel_bytes(&c, &p, 1))),
          delta(p.nq * c.q_heads), lse_grad(p.nq * c.q_heads),
          lists(fsa_lists_place(&c, &p, slab, lists_memory.get())) {}
    void forward(const T *q, const T *k, const T *v, const int32_t *indices, T *o, float *lse) {
        FSA_CHECK(fsa_lists(&c, &p, indices, &lists, 0));
        FSA_CHECK(fsa_sel_forward(&c, &p, Dtype<T>::value, q, k, v, indices, &lists, memory, o, lse, 0));
    }
    void backward(const T *q, const T *k, const T *v, const int32_t *indices, const T *o, const float *lse,
                  const T *dout, T *dq, T *dk, T *dv) {
        FSA_CHECK(fsa_row_stats(&c, Dtype<T>::value, p.nq, o, lse, dout, delta, lse_grad, 0));
        FSA_CHECK(fsa_sel_backward(&c, &p, Dtype<T>::value, q, k, v, indices, &lists, dout, delta, lse_grad,
                                   memory, dq, dk, dv, 0));
    }
};

static double worst[2][2],
    worst_version[4]; // errors of this run: [type][forward, backward], versions in bf16

template <typename X> static bool same_bits(const Buffer<X> &a, const Buffer<X> &b) {
    std::vector<X> x = a.host(), y = b.host();
    return memcmp(x.data(), y.data(), x.size() * sizeof(X)) == 0;
}

template <typename T>
static void check(Random *r, const FsaConfig &c, const std::vector<int64_t> &lengths,
                  const std::vector<FsaSegment> &segments = {}, float v_scale = 1) {
    Batch b(c, lengths, segments);
    int64_t nq = b.plan.nq, n = b.plan.n, d = c.head_dim, rows = nq * c.q_heads;
    Host<T> q(r, rows * d, 1), k(r, n * c.kv_heads * d, 1), v(r, n * c.kv_heads * d, v_scale),
        g(r, rows * d, 1);
    std::vector<int32_t> choice = random_choice(r, c, b.ref);
    Buffer<T> dq_(rows * d), q_(q.raw), k_(k.raw), v_(v.raw), g_(g.raw), o_(rows * d), dk_(k.raw.size()),
        dv_(k.raw.size());
    Buffer<T> o2(rows * d), dq2(rows * d), dk2(k.raw.size()), dv2(k.raw.size());
    Buffer<float> lse_(rows), lse2(rows);
    Buffer<int32_t> indices(choice);
    std::vector<float> o(rows * d), lse(rows), dq(rows * d, 0), dk(k.f.size(), 0), dv(k.f.size(), 0);
    fsa_ref_attend_forward_f32(&c, &b.ref, FSA_SELECTED, q.f.data(), k.f.data(), v.f.data(), choice.data(),
                               o.data(), lse.data());
    fsa_ref_attend_backward_f32(&c, &b.ref, FSA_SELECTED, q.f.data(), k.f.data(), v.f.data(), choice.data(),
                                o.data(), lse.data(), g.f.data(), dq.data(), dk.data(), dv.data());
    Library<T> library(c, b.plan);
    library.forward(q_, k_, v_, indices, o_, lse_);
    library.backward(q_, k_, v_, indices, o_, lse_, g_, dq_, dk_, dv_);
    CUDA_CHECK(cudaDeviceSynchronize());
    char what[160];
    snprintf(what, sizeof what, "selected %s nq %lld n %lld heads %d/%d d %d block %d topk %d",
             Dtype<T>::name, (long long)nq, (long long)n, c.q_heads, c.kv_heads, c.head_dim, c.block, c.topk);
    double eo = relative_error(o_.floats(), o), el = lse_error(lse_.host(), lse),
           eq = relative_error(dq_.floats(), dq);
    double ek = relative_error(dk_.floats(), dk), ev = relative_error(dv_.floats(), dv);
    printf("%s: o %.2e lse %.1e dq %.2e dk %.2e dv %.2e\n", what, eo, el, eq, ek, ev);
    check_that(eo <= Dtype<T>::out_tolerance, what, eo, Dtype<T>::out_tolerance);
    check_that(el <= 1e-3, what, el, 1e-3);
    double *w = worst[Dtype<T>::value];
    w[0] = std::max(w[0], eo);
    if (n > 1) w[1] = std::max(w[1], std::max(eq, std::max(ek, ev)));
    // With one visible key the softmax has no gradient: dq and dk are rounding alone.
    bool tiny = n <= 1;
    check_that(tiny || eq <= Dtype<T>::grad_tolerance, what, eq, Dtype<T>::grad_tolerance);
    check_that(tiny || ek <= Dtype<T>::grad_tolerance, what, ek, Dtype<T>::grad_tolerance);
    check_that(ev <= Dtype<T>::grad_tolerance, what, ev, Dtype<T>::grad_tolerance);
    library.memory.poison();
    library.forward(q_, k_, v_, indices, o2, lse2);
    library.backward(q_, k_, v_, indices, o2, lse2, g_, dq2, dk2, dv2);
    CUDA_CHECK(cudaDeviceSynchronize());
    bool same = same_bits(o_, o2) && same_bits(lse_, lse2) && same_bits(dq_, dq2) && same_bits(dk_, dk2) &&
                same_bits(dv_, dv2);
    check_that(same, "the same bits twice", 0, 0);
    bool intact = o_.guards_intact() && lse_.guards_intact() && dq_.guards_intact() && dk_.guards_intact() &&
                  dv_.guards_intact() && library.memory.guards_intact() &&
                  library.lists_memory.guards_intact();
    check_that(intact, "guard zones", 0, 0);
}

template <typename T, int D>
static void check_version(Random *r, int version, const FsaConfig &c, const std::vector<int64_t> &lengths) {
    Batch b(c, lengths);
    int64_t nq = b.plan.nq, rows = nq * c.q_heads;
    Host<T> q(r, rows * D, 1), k(r, nq * c.kv_heads * D, 1), v(r, nq * c.kv_heads * D, 1);
    std::vector<int32_t> choice = random_choice(r, c, b.ref);
    Buffer<T> q_(q.raw), k_(k.raw), v_(v.raw), o_(rows * D);
    Buffer<float> lse_(rows);
    Buffer<int32_t> indices(choice);
    std::vector<float> o(rows * D), lse(rows);
    fsa_ref_attend_forward_f32(&c, &b.ref, FSA_SELECTED, q.f.data(), k.f.data(), v.f.data(), choice.data(),
                               o.data(), lse.data());
    Versions<T, D> versions(c, b.plan, version);
    versions.forward(version, q_, k_, v_, indices, o_, lse_);
    CUDA_CHECK(cudaDeviceSynchronize());
    char what[160];
    snprintf(what, sizeof what, "selected version %d %s n %lld heads %d/%d d %d block %d topk %d", version,
             Dtype<T>::name, (long long)nq, c.q_heads, c.kv_heads, D, c.block, c.topk);
    // Versions 1 to 3 keep partial results and probabilities as their originals do, in the 16-bit type.
    double e = relative_error(o_.floats(), o), limit = 1.2 * Dtype<T>::out_tolerance,
           el = lse_error(lse_.host(), lse);
    printf("%s: o %.2e lse %.1e\n", what, e, el);
    if (Dtype<T>::value == FSA_BF16) worst_version[version] = std::max(worst_version[version], e);
    check_that(e <= limit && el <= 1e-3 && o_.guards_intact(), what, e, limit);
}

template <typename T> static void bench_versions(Random *r, int64_t n, int hq, int hkv) {
    FsaConfig c = default_config(hq, hkv, 128, 64, 16);
    Batch b(c, {n});
    int64_t rows = n * hq, kv = n * hkv * 128;
    Buffer<T> q(rows * 128), k(kv), v(kv), o(rows * 128);
    Buffer<float> lse(rows);
    Buffer<int32_t> indices(hkv * n * 16);
    fill_random(q.get(), rows * 128, r->u64(), 1);
    fill_random(k.get(), kv, r->u64(), 1);
    fill_random(v.get(), kv, r->u64(), 1);
    random_choice_device(indices, n, c, r->u64());
    double flops = 4.0 * n * hq * 1024 * 128;
    for (int version = 1; version <= 3; version++) {
        if (version == 1 && n > 8192) continue;
        if (version == 3 && n > FSA_MAX_SLAB) continue; // its lists are one slab
        Versions<T, 128> versions(c, b.plan, version);
        double ms = time_ms([&] { versions.forward(version, q, k, v, indices, o, lse); });
        printf("selected version %d n %lld (%d, %d): fwd %.3f ms (%.0f TFLOP/s)\n", version, (long long)n, hq,
               hkv, ms, flops / ms * 1e-9);
        const char *names[] = {"", "1", "2", "3"};
        record({"selected", "sel", "nsa", "fwd", Dtype<T>::name, n, c, ms, flops / ms * 1e-9,
                worst_version[version], "random", names[version], 1});
    }
}

template <typename T> static void check_all(Random *r) {
    for (int version = 1; version <= 3; version++) {
        check_version<T, 128>(r, version, default_config(8, 2, 128, 64, 8), {1000, 1, 65});
        check_version<T, 64>(r, version, default_config(7, 1, 64, 32, 5), {507});
        check_version<T, 64>(r, version, default_config(16, 1, 64, 64, 4), {900});
    }
    check<T>(r, default_config(4, 1, 64, 64, 16), {1});
    check<T>(r, default_config(4, 2, 128, 64, 4), {507});
    check<T>(r, default_config(32, 8, 128, 64, 16), {1500});
    check<T>(r, default_config(3, 1, 64, 16, 8), {31, 1, 700, 63, 65});
    check<T>(r, default_config(10, 2, 128, 32, 7), {1000, 32});
    check<T>(r, default_config(7, 1, 64, 128, 4), {1300, 1, 200});
    check<T>(r, default_config(16, 1, 128, 128, 3), {900});
    check<T>(r, default_config(2, 2, 128, 64, 16), {4097});
    check<T>(r, default_config(4, 4, 64, 80, 5), {1111, 79});
    check<T>(r, default_config(6, 2, 64, 256, 3), {1400});
    check<T>(r, default_config(12, 2, 128, 48, 40), {3000});
    check<T>(r, default_config(4, 2, 128, 64, 5), {900, 1, 300}, {{0, 100, 57}, {0, 400, 500}, {2, 299, 1}});
    check<T>(r, default_config(4, 2, 64, 64, 5), {600}, {},
             sizeof(T) == 2 && Dtype<T>::value == FSA_BF16 ? 1e8f : 3e3f);
    check<T>(r, default_config(64, 4, 64, 64, 16), {2500});
    check<T>(r, default_config(16, 1, 128, 48, 40), {3000}); // more than one slab
}

template <typename T>
static void bench(Random *r, int64_t n, int hq, int hkv, int d, int block, int topk, bool clustered) {
    FsaConfig c = default_config(hq, hkv, d, block, topk);
    Batch b(c, {n});
    int64_t rows = n * hq, kv = n * hkv * d;
    Buffer<T> q(rows * d), k(kv), v(kv), g(rows * d), o(rows * d), dq(rows * d), dk(kv), dv(kv);
    Buffer<float> lse(rows);
    Buffer<int32_t> indices(hkv * n * topk);
    fill_random(q.get(), rows * d, r->u64(), 1);
    fill_random(k.get(), kv, r->u64(), 1);
    fill_random(v.get(), kv, r->u64(), 1);
    fill_random(g.get(), rows * d, r->u64(), 1);
    random_choice_device(indices, n, c, r->u64(), clustered);
    Library<T> library(c, b.plan);
    double pairs = (double)n * hq * topk, flops = 4.0 * pairs * block * d;
    double bytes[2] = {pairs * (3 * (2.0 * d + 4)), pairs * (8.0 * d + 12)};
    double fwd = time_ms([&] { library.forward(q, k, v, indices, o, lse); });
    double bwd = time_ms([&] { library.backward(q, k, v, indices, o, lse, g, dq, dk, dv); });
    printf("selected library n %lld (%d, %d) d %d (%d, %d) %s %s: fwd %.3f ms (%.0f TFLOP/s, %.2f TB/s), bwd "
           "%.3f ms "
           "(%.0f TFLOP/s, %.2f TB/s), workspace %.0f MiB + lists %.0f MiB\n",
           (long long)n, hq, hkv, d, block, topk, Dtype<T>::name, clustered ? "clustered" : "random", fwd,
           flops / fwd * 1e-9, bytes[0] / fwd * 1e-9, bwd, 2.5 * flops / bwd * 1e-9, bytes[1] / bwd * 1e-9,
           library.memory.n / 1048576.0, library.lists_memory.n / 1048576.0);
    const char *kind = clustered ? "clustered" : "random";
    record({"selected", "sel", "nsa", "fwd", Dtype<T>::name, n, c, fwd, flops / fwd * 1e-9,
            worst[Dtype<T>::value][0], kind, "library", 1});
    record({"selected", "sel", "nsa", "bwd", Dtype<T>::name, n, c, bwd, 2.5 * flops / bwd * 1e-9,
            worst[Dtype<T>::value][1], kind, "library", 1});
}

int main(int argc, char **argv) {
    Random r(seed_from(argc, argv));
    check_all<__nv_bfloat16>(&r);
    check_all<__half>(&r);
    if (!has_flag(argc, argv, "check")) {
        typedef __nv_bfloat16 T;
        bench<T>(&r, 65536, 32, 8, 128, 64, 16, false);
        bench<T>(&r, 65536, 32, 8, 128, 64, 16, true);
        bench<T>(&r, 65536, 32, 32, 128, 64, 16, false);
        bench<T>(&r, 65536, 32, 16, 128, 64, 16, false);
        bench<T>(&r, 65536, 40, 8, 128, 64, 16, false);
        bench<T>(&r, 65536, 32, 4, 128, 64, 16, false);
        bench<T>(&r, 65536, 64, 4, 128, 64, 16, false);
        bench<T>(&r, 32768, 32, 8, 128, 64, 16, false);
        bench<T>(&r, 8192, 32, 8, 128, 64, 16, false);
        bench<T>(&r, 65536, 32, 8, 128, 128, 8, false);
        bench<T>(&r, 65536, 32, 32, 128, 128, 8, false);
        bench<__half>(&r, 65536, 32, 8, 128, 64, 16, false);
        bench<T>(&r, 65536, 32, 8, 64, 64, 16, false);
        bench_versions<T>(&r, 8192, 32, 8);
        bench_versions<T>(&r, 32768, 32, 32);
        bench_versions<T>(&r, 32768, 32, 8);
        bench_versions<T>(&r, 32768, 64, 4);
        bench_versions<T>(&r, 65536, 32, 8);
    }
    printf("selected: %d passed, %d failed\n", checks_passed, checks_failed);
    return checks_failed != 0;
}
