// compress.cu: checks and times the compression of keys and values (phi = mean and linear), and RoPE.
//   version 1: one thread per channel pair of the output, fp32 (forward, phi = linear)
//   library:   fsa/compress.cu: phi = linear as a GEMM (mma.sync) that reads the windows in place
// usage: compress [seed=N] [check [small] | time]      default: check and time
#include "../../fsa/compress.cu"
#include "../../fsa/rope.cu"
#include "shapes.h"

// Version 1. A thread computes channels c and c + d/2 of one window; it reads l*d inputs and 2*l*d weights.
template <typename T, int D>
__global__ void __launch_bounds__(D / 2) naive_forward_kernel(const CompressParams p) {
    int64_t window = blockIdx.x, token_stride = (int64_t)p.kv_heads * D;
    if (window >= p.batch.cu_windows[p.batch.num_seqs]) return;
    int c = threadIdx.x, head = blockIdx.y, kv = blockIdx.z;
    int64_t seq = find_in_cu(p.batch.cu_windows, p.batch.num_seqs, window);
    int64_t start = (window - p.batch.cu_windows[seq]) * p.stride;
    const T *x = (const T *)p.in[kv].data + (p.batch.cu_seqlens[seq] + start) * token_stride + head * D;
    const T *w = (const T *)p.weight[kv] + (int64_t)head * p.len * D * D,
            *pe = (const T *)p.pe + (int64_t)head * p.len * D;
    float lo = 0, hi = 0;
    for (int i = 0; i < p.len * D; i++) {
        float xi = to_f32(x[i / D * token_stride + i % D]);
        if (kv == 0 && p.pe) xi += to_f32(pe[i]);
        lo += xi * to_f32(w[(int64_t)i * D + c]);
        hi += xi * to_f32(w[(int64_t)i * D + c + D / 2]);
    }
    if (kv == 0 && p.inv_freq) {
        float2 cs = rope_cos_sin(start, p.inv_freq[c]);
        float a = lo, b = hi;
        lo = a * cs.x - b * cs.y;
        hi = b * cs.x + a * cs.y;
    }
    ((T *)p.out[kv])[window * token_stride + head * D + c] = (T)lo;
    ((T *)p.out[kv])[window * token_stride + head * D + c + D / 2] = (T)hi;
}
template <typename T, int D>
static int launch_naive(const CompressParams &p, int64_t windows, cudaStream_t stream) {
    dim3 grid((unsigned)windows, p.kv_heads, 2);
    return LAUNCH((naive_forward_kernel<T, D>), grid, D / 2, 0, stream, p);
}
static int naive_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows k,
                         ConstRows v, const void *wk, const void *pe, const void *wv, const double *inv_freq,
                         void *kc, void *vc, void *workspace, cudaStream_t stream) {
    CompressParams s = make_compress_params(c, batch, k, v, wk, pe, wv, inv_freq, workspace);
    s.out[0] = kc, s.out[1] = vc;
    int64_t windows = fsa_max_windows(c, batch);
    return windows ? FSA_DISPATCH(dtype, c->head_dim, launch_naive, s, windows, stream) : FSA_OK;
}

static const struct Version {
    const char *name;
    decltype(&fsa_compress_forward) run;
} versions[] = {{"1", naive_forward}, {"library", fsa_compress_forward}};

static double worst[2][2]; // largest relative error of the library: [dtype][forward, backward]

static void compare(const std::vector<float> &got, const std::vector<float> &ref, double limit,
                    const std::string &what, double *max_error) {
    double err = relative_error(got, ref);
    check_that(err <= limit, what.c_str(), err, limit);
    if (max_error) *max_error = std::max(*max_error, err);
}

template <typename T> static void check_shape(Random *r, const Shape &s, FsaPhi phi, bool with_pe) {
    FsaConfig c = s.c;
    c.phi = phi;
    Batch b(c, s.lengths, s.segments);
    const FsaDtype type = Dtype<T>::value;
    int64_t d = c.head_dim, rows = b.batch.n * c.kv_heads,
            windows = fsa_batch_windows(&c, &b.ref) * c.kv_heads;
    int64_t weights = c.kv_heads * c.cmp_len * d, linear = phi == FSA_PHI_LINEAR;
    std::string what = std::string(linear ? with_pe ? "linear " : "linear without pe " : "mean ") +
                       Dtype<T>::name + " " + shape_name(s);
    float weight_std = 1 / sqrtf((float)(c.cmp_len * d));
    Host<T> k(r, rows * d, 1), v(r, rows * d, 1);
    Host<T> wk(r, linear ? weights * d : 0, weight_std), wv(r, linear ? weights * d : 0, weight_std),
        pe(r, linear ? weights : 0, 0.5f);
    std::vector<double> freq = rope_frequencies((int)d);
    Buffer<T> k_dev(k.raw), v_dev(v.raw), wk_dev(wk.raw), wv_dev(wv.raw), pe_dev(pe.raw), kc(windows * d),
        vc(windows * d);
    Buffer<double> freq_dev(freq);
    Buffer<char> workspace((int64_t)fsa_compress_scratch_bytes(&c, &b.batch, 1));
    const T *pe_arg = with_pe && linear ? pe_dev.get() : NULL;
    std::vector<float> zero(weights);
    fsa_ref_PhiWeights_f32 ref_phi = {linear ? wk.f.data() : NULL,
                                      !linear   ? NULL
                                      : with_pe ? pe.f.data()
                                                : zero.data(),
                                      linear ? wv.f.data() : NULL};
    std::vector<float> ref_kc(kc.n), ref_vc(vc.n);
    fsa_ref_compress_forward_f32(&c, &b.ref, k.f.data(), v.f.data(), &ref_phi, freq.data(), ref_kc.data(),
                                 ref_vc.data());
    for (const Version &version : versions) {
        if (&version == versions && !linear) continue;
        std::vector<float> first_kc, first_vc;
        for (int again = 0; again < 2; again++) {
            kc.poison();
            vc.poison();
            FSA_CHECK(version.run(&c, &b.batch, type, packed_kv(&c, k_dev), packed_kv(&c, v_dev),
                                  wk_dev.get(), pe_arg, wv_dev.get(), freq_dev, kc, vc, workspace.get(), 0));
            CUDA_CHECK(cudaDeviceSynchronize());
            if (!again) first_kc = kc.floats(), first_vc = vc.floats();
        }
        check_that(kc.floats() == first_kc && vc.floats() == first_vc,
                   ("repeat of " + std::string(version.name) + " " + what).c_str(), 1, 0);
        double *w = &version == versions ? NULL : &worst[type][0];
        compare(kc.floats(), ref_kc, Dtype<T>::out_tolerance, std::string(version.name) + " kc " + what, w);
        compare(vc.floats(), ref_vc, Dtype<T>::out_tolerance, std::string(version.name) + " vc " + what, w);
        check_that(kc.guards_intact() && vc.guards_intact(), ("guards " + what).c_str(), 1, 0);
    }

    std::vector<float> dkc(windows * d), dvc(windows * d);
    for (float &x : dkc) x = r->normal();
    for (float &x : dvc) x = r->normal();
    Buffer<float> dkc_dev(dkc), dvc_dev(dvc), dk(rows * d), dv(rows * d), dwk(wk.f.size()), dwv(wk.f.size()),
        dpe(pe.f.size());
    std::vector<float> ref_dk(dk.n), ref_dv(dv.n), ref_dwk(dwk.n), ref_dwv(dwv.n), ref_dpe(weights);
    fsa_ref_PhiGradients_f32 ref_grad = {linear ? ref_dwk.data() : NULL, linear ? ref_dpe.data() : NULL,
                                         linear ? ref_dwv.data() : NULL};
    fsa_ref_compress_backward_f32(&c, &b.ref, k.f.data(), v.f.data(), &ref_phi, freq.data(), dkc.data(),
                                  dvc.data(), ref_dk.data(), ref_dv.data(), &ref_grad);
    std::vector<float> before[5];
    Buffer<float> *outs[5] = {&dk, &dv, &dwk, &dwv, &dpe};
    std::vector<float> *refs[5] = {&ref_dk, &ref_dv, &ref_dwk, &ref_dwv, &ref_dpe};
    static const char *const names[5] = {" dk ", " dv ", " dwk ", " dwv ", " dpe "};
    for (int run = 0; run < 3; run++) { // runs 0 and 1 overwrite, run 2 accumulates
        if (run < 2) {
            dk.poison(), dv.poison();
            for (int i = 2; i < 5; i++) outs[i]->zero();
        }
        FSA_CHECK(fsa_compress_backward(&c, &b.batch, type, packed_kv(&c, k_dev), packed_kv(&c, v_dev),
                                        wk_dev.get(), pe_arg, wv_dev.get(), freq_dev, dkc_dev, dvc_dev, dk,
                                        dv, run == 2, dwk, dpe, dwv, workspace.get(), 0));
        CUDA_CHECK(cudaDeviceSynchronize());
        for (int i = 0; i < 5; i++) {
            if (i == 4 && !pe_arg) continue;
            std::vector<float> got = outs[i]->host();
            if (run == 0)
                compare(got, *refs[i], Dtype<T>::grad_tolerance, "library" + (names[i] + what),
                        &worst[type][1]);
            if (run == 1) check_that(got == before[i], ("repeat of" + (names[i] + what)).c_str(), 1, 0);
            if (run == 2) {
                for (float &x : got) x /= i == 0 ? 1 : 2; // dk is always overwritten
                compare(got, before[i], 1e-6, "sum of" + (names[i] + what), NULL);
            }
            if (run < 2) before[i] = got;
            check_that(outs[i]->guards_intact(), ("guards" + (names[i] + what)).c_str(), 1, 0);
        }
    }
}

// RoPE of queries and keys, and the conversion of their gradients to 16 bits.
template <typename T> static void check_rope(Random *r, const Shape &s) {
    const FsaConfig &c = s.c;
    Batch b(c, s.lengths, s.segments);
    const FsaDtype type = Dtype<T>::value;
    std::vector<double> freq = rope_frequencies(c.head_dim);
    Buffer<double> freq_dev(freq);
    for (int queries = 0; queries < 2; queries++) {
        std::string what = std::string("rope ") + Dtype<T>::name + " " + shape_name(s);
        int64_t size = (queries ? b.batch.nq * c.q_heads : b.batch.n * c.kv_heads) * c.head_dim;
        auto ref_rope = queries ? fsa_ref_rope_queries_f32 : fsa_ref_rope_keys_f32;
        Host<T> x(r, size, 1);
        Buffer<T> x_dev(x.raw), out(size);
        std::vector<float> ref = x.f;
        ref_rope(&c, &b.ref, ref.data(), freq.data(), 0);
        const Rows x_rows = queries ? packed_q(&c, x_dev.get()) : packed_kv(&c, x_dev.get());
        FSA_CHECK((queries ? fsa_rope_queries : fsa_rope_keys)(&c, &b.batch, type, x_rows, freq_dev, out, 0));
        compare(out.floats(), ref, Dtype<T>::out_tolerance, what, NULL);
        check_that(out.guards_intact(), ("guards " + what).c_str(), 1, 0);

        // Gradients: the conversion alone, then with the inverse RoPE.
        std::vector<float> dx(size);
        for (float &y : dx) y = r->normal();
        Buffer<float> dx_dev(queries ? dq_to_accum(c, b.batch.nq, dx) : dx);
        for (int rotate = 0; rotate < 2; rotate++) {
            const double *const inv_freq = rotate ? freq_dev.get() : NULL;
            if (rotate) ref_rope(&c, &b.ref, dx.data(), freq.data(), 1);
            out.poison();
            FSA_CHECK(queries
                          ? fsa_convert_dq(&c, &b.batch, type, dx_dev, inv_freq, packed_q(&c, out.get()), 0)
                          : fsa_convert_dkv(&c, &b.batch, type, dx_dev, false, inv_freq,
                                            packed_kv(&c, out.get()), 0));
            compare(out.floats(), dx, Dtype<T>::out_tolerance,
                    (rotate ? "gradients with inverse " : "gradients without ") + what, NULL);
            check_that(out.guards_intact(), ("guards of gradients " + what).c_str(), 1, 0);
        }
    }
}

template <typename T> static void time_shape(const Timing &t, FsaPhi phi, uint64_t seed) {
    const int d = 128;
    FsaConfig c = default_config(t.hq, t.hkv, d, 64, 16);
    c.phi = phi;
    Batch b(c, {t.n});
    int64_t rows = t.n * t.hkv, windows = fsa_num_windows(&c, t.n) * t.hkv,
            weights = (int64_t)t.hkv * c.cmp_len * d;
    Buffer<T> k(rows * d), v(rows * d), wk(weights * d), wv(weights * d), pe(weights), kc(windows * d),
        vc(windows * d);
    Buffer<float> dkc(windows * d), dvc(windows * d), dk(rows * d), dv(rows * d), dwk(weights * d),
        dwv(weights * d), dpe(weights);
    Buffer<double> freq(rope_frequencies(d));
    Buffer<char> workspace((int64_t)fsa_compress_scratch_bytes(&c, &b.batch, 1));
    fill_random(k.get(), k.n, seed, 1.0f);
    fill_random(v.get(), v.n, seed + 1, 1.0f);
    fill_random(wk.get(), wk.n, seed + 2, 0.02f);
    fill_random(wv.get(), wv.n, seed + 3, 0.02f);
    fill_random(pe.get(), pe.n, seed + 4, 1.0f);
    fill_random(dkc.get(), dkc.n, seed + 5, 1.0f);
    fill_random(dvc.get(), dvc.n, seed + 6, 1.0f);
    dwk.zero(), dwv.zero(), dpe.zero();
    bool linear = phi == FSA_PHI_LINEAR;
    double flops = linear ? 2.0 * c.cmp_len * d * d * windows * 2 : 0;
    auto result = [&](const char *dir, const char *version, double ms) {
        return Result{
            linear ? "compress" : "compress mean", "compress", "nsa",   dir, Dtype<T>::name, t.n, c, ms, 0,
            worst[Dtype<T>::value][dir[0] == 'b'], NULL,       version, 1};
    };
    for (const Version &version : versions) {
        bool naive = &version == versions;
        if (naive && (t.n > 8192 || !linear)) continue;
        double ms = time_ms(
            [&] {
                FSA_CHECK(version.run(&c, &b.batch, Dtype<T>::value, packed_kv(&c, k), packed_kv(&c, v), wk,
                                      pe, wv, freq, kc, vc, workspace.get(), 0));
            },
            naive ? 3 : 10);
        report(result("fwd", version.name, ms), flops,
               (4.0 * rows + 4.0 * windows + 4.0 * weights * linear) * d);
    }
    double ms = time_ms([&] {
        FSA_CHECK(fsa_compress_backward(&c, &b.batch, Dtype<T>::value, packed_kv(&c, k), packed_kv(&c, v), wk,
                                        pe, wv, freq, dkc, dvc, dk, dv, 0, dwk, dpe, dwv, workspace.get(),
                                        0));
    });
    report(result("bwd", "library", ms), 2 * flops,
           (12.0 * rows + 8.0 * windows + 20.0 * weights * linear) * d);
}

template <typename T> static void time_rope(const Timing &t) {
    FsaConfig c = default_config(t.hq, t.hkv, 128, 64, 16);
    Batch b(c, {t.n});
    int64_t size = t.n * t.hq * 128;
    Buffer<T> x(size), out(size);
    Buffer<float> dq_accum(size);
    Buffer<double> freq(rope_frequencies(128));
    fill_random(x.get(), size, 1, 1.0f);
    fill_random(dq_accum.get(), size, 2, 1.0f);
    auto print = [&](const char *what, double bytes, double ms) {
        printf("%-22s n=%-6lld %2d heads %9.3f ms %6.2f TB/s\n", what, (long long)t.n, t.hq, ms,
               bytes / ms * 1e-9);
    };
    print("rope", 4.0 * size, time_ms([&] {
              FSA_CHECK(fsa_rope_queries(&c, &b.batch, Dtype<T>::value, packed_q(&c, x), freq, out, 0));
          }));
    for (bool rotate : {false, true}) {
        print(rotate ? "dq with inverse rope" : "dq", 6.0 * size, time_ms([&] {
                  FSA_CHECK(fsa_convert_dq(&c, &b.batch, Dtype<T>::value, dq_accum,
                                           rotate ? freq.get() : NULL, packed_q(&c, out), 0));
              }));
    }
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = seed_from_args(argc, argv);
    Random r(seed);
    // Timings are recorded with the error of a check in the same run, so `time` runs the small check.
    bool small = has_flag(argc, argv, "small") || has_flag(argc, argv, "time");
    {
        std::vector<Shape> shapes = small ? small_shapes(&r) : test_shapes(&r, 24);
        for (size_t i = 0; i < shapes.size(); i++) {
            if (!small || i % 2) { // small: each shape in one of the two dtypes
                check_shape<__nv_bfloat16>(&r, shapes[i], FSA_PHI_LINEAR, i % 4 != 3);
                check_shape<__half>(&r, shapes[i], FSA_PHI_MEAN, false);
            }
            if (!small || i % 2 == 0) {
                check_shape<__half>(&r, shapes[i], FSA_PHI_LINEAR, i % 4 != 2);
                check_shape<__nv_bfloat16>(&r, shapes[i], FSA_PHI_MEAN, false);
            }
            check_rope<__nv_bfloat16>(&r, shapes[i]);
            check_rope<__half>(&r, shapes[i]);
        }
        for (int i = 0; i < 2; i++) {
            printf("%s worst error: bf16 %.2e fp16 %.2e\n", i ? "backward" : "forward", worst[FSA_BF16][i],
                   worst[FSA_FP16][i]);
        }
        printf("compress: %d passed, %d failed\n", checks_passed, checks_failed);
    }
    if (!has_flag(argc, argv, "check")) {
        for (const Timing &t : timings) {
            time_shape<__nv_bfloat16>(t, FSA_PHI_LINEAR, seed);
            time_shape<__nv_bfloat16>(t, FSA_PHI_MEAN, seed);
        }
        time_rope<__nv_bfloat16>(timings[2]);
    }
    return checks_failed != 0;
}
