// test_fsa.cu: the library's whole attention against the C reference over random shapes, the single-branch
// entries, the same bits twice and on two streams at once, guard zones, and every error code.
//   test_fsa [shapes=N] [seed=N]
#include "../cuda/common.h"
#include "test.h"

// Relative error with a floor: 1e-2 an entry is added to the norm, so that gradients that vanish (one visible
// key) don't divide by nothing.
static double error_of(const std::vector<float> &x, const std::vector<float> &ref) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < ref.size(); i++) {
        if (!isfinite(x[i])) return INFINITY;
        diff += ((double)x[i] - ref[i]) * ((double)x[i] - ref[i]);
        norm += (double)ref[i] * ref[i];
    }
    return sqrt(diff) / (sqrt(norm) + 1e-2 * sqrt((double)ref.size()) + 1e-30);
}

template <typename T> struct Problem {
    FsaConfig c;
    Batch batch;
    FsaDeviceBatch b;
    int64_t nq, n, size_q, size_k, size_w, gates;
    bool linear, rope;
    Host<T> q, k, v, dout, gate, wk, wv, pe;
    Buffer<T> q_, k_, v_, dout_, gate_, wk_, wv_, pe_, o, dq, dk, dv, dgate;
    Buffer<float> dwk, dwv, dpe;
    std::vector<double> inv_freq;
    Buffer<double> inv_freq_;
    Buffer<char> saved, forward_work, backward_work;

    static std::vector<double> frequencies(int d) {
        std::vector<double> f;
        for (int i = 0; i < d / 2; i++) f.push_back(pow(10000, -2.0 * i / d));
        return f;
    }
    static FsaDeviceBatch device_batch(const Batch &x) {
        return FsaDeviceBatch{x.plan.nq,      x.plan.n,          x.plan.num_seqs, x.plan.num_segments,
                              x.plan.max_len, x.plan.cu_seqlens, x.plan.segments};
    }
    Problem(Random *r, const FsaConfig &config, const std::vector<int64_t> &lengths,
            const std::vector<FsaSegment> &segments, bool with_rope)
        : c(config), batch(c, lengths, segments), b(device_batch(batch)), nq(b.num_queries), n(b.num_keys),
          size_q(nq * c.q_heads * c.head_dim), size_k(n * c.kv_heads * c.head_dim),
          size_w((int64_t)c.kv_heads * c.cmp_len * c.head_dim * c.head_dim),
          gates(nq * (c.gate_per_token ? 1 : c.q_heads) * 3), linear(c.phi == FSA_PHI_LINEAR),
          rope(with_rope), q(r, size_q, 1), k(r, size_k, 1), v(r, size_k, 1), dout(r, size_q, 1),
          gate(r, gates, 1), wk(r, size_w, 1 / sqrtf((float)c.cmp_len * c.head_dim)),
          wv(r, size_w, 1 / sqrtf((float)c.cmp_len * c.head_dim)), pe(r, size_w / c.head_dim, 0.3f),
          q_(q.raw), k_(k.raw), v_(v.raw), dout_(dout.raw), gate_(gate.raw), wk_(wk.raw), wv_(wv.raw),
          pe_(pe.raw), o(size_q), dq(size_q), dk(size_k), dv(size_k), dgate(gates), dwk(size_w), dwv(size_w),
          dpe(size_w / c.head_dim), inv_freq(frequencies(c.head_dim)), inv_freq_(inv_freq),
          saved((int64_t)fsa_saved_size(&c, Dtype<T>::value, &b)),
          forward_work((int64_t)fsa_workspace_size(&c, Dtype<T>::value, &b, FSA_FORWARD)),
          backward_work((int64_t)fsa_workspace_size(&c, Dtype<T>::value, &b, FSA_BACKWARD)) {
        dwk.zero(), dwv.zero(), dpe.zero();
    }
    FsaPhiWeights weights() const { return FsaPhiWeights{wk_.get(), pe_.get(), wv_.get()}; }
    int forward(cudaStream_t stream) {
        FsaPhiWeights w = weights();
        return fsa_forward(&c, Dtype<T>::value, &b, q_, k_, v_, linear ? &w : NULL,
                           rope ? inv_freq_.get() : NULL, gate_, NULL, o, saved, forward_work,
                           (size_t)forward_work.n, stream);
    }
    int backward(cudaStream_t stream) {
        FsaPhiWeights w = weights();
        FsaPhiGradients g = {dwk, dpe, dwv};
        return fsa_backward(&c, Dtype<T>::value, &b, k_, v_, linear ? &w : NULL,
                            rope ? inv_freq_.get() : NULL, gate_, dout_, saved, dq, dk, dv,
                            linear ? &g : NULL, dgate, backward_work, (size_t)backward_work.n, stream);
    }
    std::vector<int32_t> indices() const {
        std::vector<int32_t> x((size_t)(c.kv_heads * nq * c.topk));
        CUDA_CHECK(cudaMemcpy(x.data(), fsa_saved_indices(&c, Dtype<T>::value, &b, saved.get()), x.size() * 4,
                              cudaMemcpyDeviceToHost));
        return x;
    }
    bool guards_intact() const {
        return o.guards_intact() && dq.guards_intact() && dk.guards_intact() && dv.guards_intact() &&
               dgate.guards_intact() && dwk.guards_intact() && dwv.guards_intact() && dpe.guards_intact() &&
               saved.guards_intact() && forward_work.guards_intact() && backward_work.guards_intact();
    }
    // All results, one after another, to compare bit by bit.
    std::vector<char> bits() const {
        std::vector<char> all;
        auto add = [&](const void *p, size_t bytes) {
            size_t at = all.size();
            all.resize(at + bytes);
            CUDA_CHECK(cudaMemcpy(all.data() + at, p, bytes, cudaMemcpyDeviceToHost));
        };
        add(o.get(), size_q * 2), add(dq.get(), size_q * 2), add(dk.get(), size_k * 2),
            add(dv.get(), size_k * 2);
        add(dgate.get(), gates * 2);
        if (linear)
            add(dwk.get(), size_w * 4), add(dwv.get(), size_w * 4), add(dpe.get(), size_w / c.head_dim * 4);
        return all;
    }
};

// Whether the choice obeys the rules: min(T, blocks) of them, ascending, causal, the forced ones in.
static bool choice_valid(const FsaConfig &c, const Batch &b, const std::vector<int32_t> &all) {
    for (int h = 0; h < c.kv_heads; h++) {
        int64_t row = 0;
        for (const FsaSegment &s : b.segments) {
            for (int64_t i = 0; i < s.len; i++, row++) {
                const int32_t *x = &all[(size_t)((h * b.plan.nq + row) * c.topk)];
                int64_t blocks = (s.pos + i) / c.block + 1, want = std::min<int64_t>(blocks, c.topk);
                for (int t = 0; t < c.topk; t++) {
                    if (t < want ? x[t] < 0 || x[t] >= blocks || (t > 0 && x[t] <= x[t - 1]) : x[t] != -1)
                        return false;
                }
                for (int j = 0; j < c.init_blocks && j < blocks; j++) {
                    if (std::find(x, x + want, j) == x + want) return false;
                }
                for (int64_t j = std::max<int64_t>(0, blocks - c.local_blocks); j < blocks; j++) {
                    if (std::find(x, x + want, (int32_t)j) == x + want) return false;
                }
            }
        }
    }
    return true;
}

static double worst_error[2][2]; // by type, output and gradients

template <typename T>
static void test_shape(Random *r, const FsaConfig &c, const std::vector<int64_t> &lengths,
                       const std::vector<FsaSegment> &segments, bool rope) {
    Problem<T> p(r, c, lengths, segments, rope);
    char what[200];
    snprintf(what, sizeof what,
             "%s nq %lld n %lld seqs %zu heads %d/%d d %d l %d s %d block %d topk %d init %d local %d W %d "
             "phi %d per_token %d rope %d",
             Dtype<T>::name, (long long)p.nq, (long long)p.n, lengths.size(), c.q_heads, c.kv_heads,
             c.head_dim, c.cmp_len, c.cmp_stride, c.block, c.topk, c.init_blocks, c.local_blocks, c.window,
             (int)c.phi, c.gate_per_token, rope);
    int status = p.forward(0);
    if (!status) status = p.backward(0);
    cudaError_t e = cudaDeviceSynchronize();
    CHECK(status == 0 && e == cudaSuccess, "%s: status %d, %s, %s", what, status, fsa_last_error(),
          cudaGetErrorString(e));
    if (status || e != cudaSuccess) exit(1);
    std::vector<int32_t> indices = p.indices();
    bool valid = choice_valid(c, p.batch, indices);
    CHECK(valid, "%s: choice of blocks", what);
    if (!valid) return;

    fsa_ref_State_f32 state;
    std::vector<char> memory(fsa_ref_state_place_f32(&state, &c, p.nq, p.n, (int64_t)lengths.size(), NULL) +
                             64);
    char *aligned = memory.data() + (64 - (uintptr_t)memory.data() % 64);
    fsa_ref_state_place_f32(&state, &c, p.nq, p.n, (int64_t)lengths.size(), aligned);
    fsa_ref_Phi_f32 phi = {NULL, NULL, NULL};
    if (p.linear) phi = {p.wk.f.data(), p.pe.f.data(), p.wv.f.data()};
    std::vector<float> dwk(p.size_w, 0), dwv(p.size_w, 0), dpe(p.size_w / c.head_dim, 0);
    fsa_ref_PhiGrad_f32 dphi = {NULL, NULL, NULL};
    if (p.linear) dphi = {dwk.data(), dpe.data(), dwv.data()};
    std::vector<float> o(p.size_q), dq(p.size_q), dk(p.size_k), dv(p.size_k), dgate(p.gates, 0);
    const double *inv_freq = rope ? p.inv_freq.data() : NULL;
    fsa_ref_forward_f32(&c, &p.batch.ref, p.q.f.data(), p.k.f.data(), p.v.f.data(), &phi, inv_freq,
                        p.gate.f.data(), indices.data(), &state, o.data());
    fsa_ref_backward_f32(&c, &p.batch.ref, p.k.f.data(), p.v.f.data(), &phi, inv_freq, p.gate.f.data(),
                         &state, p.dout.f.data(), dq.data(), dk.data(), dv.data(), &dphi, dgate.data());
    // Between the steps q, k, the compressed keys and values and the branches' outputs are rounded to 16
    // bits, which the reference doesn't do: twice a single kernel's tolerance.
    double out_limit = 2 * Dtype<T>::out_tolerance, grad_limit = 2 * Dtype<T>::grad_tolerance;
    double error = error_of(p.o.floats(), o), worst = error;
    CHECK(error <= out_limit, "%s: o %.2e, at most %.2e", what, error, out_limit);
    struct {
        const char *name;
        std::vector<float> got, want;
    } grads[] = {{"dq", p.dq.floats(), dq},          {"dk", p.dk.floats(), dk},  {"dv", p.dv.floats(), dv},
                 {"dgate", p.dgate.floats(), dgate}, {"dwk", p.dwk.host(), dwk}, {"dwv", p.dwv.host(), dwv},
                 {"dpe", p.dpe.host(), dpe}};
    double worst_grad = 0;
    for (auto &g : grads) {
        if (!p.linear && g.name[1] != 'q' && g.name[1] != 'k' && g.name[1] != 'v' && g.name[1] != 'g')
            continue;
        // Without RoPE the position embedding moves all compressed keys alike, which softmax ignores: no
        // gradient.
        if (g.name[2] == 'e' && !rope) continue;
        error = error_of(g.got, g.want);
        worst_grad = std::max(worst_grad, error);
        CHECK(error <= grad_limit, "%s: %s %.2e, at most %.2e", what, g.name, error, grad_limit);
    }
    double *w = worst_error[Dtype<T>::value];
    w[0] = std::max(w[0], worst), w[1] = std::max(w[1], worst_grad);
    CHECK(p.guards_intact(), "%s: guard zones", what);

    // Again, from other garbage in the workspaces: the same bits.
    std::vector<char> first = p.bits();
    p.forward_work.poison(), p.backward_work.poison(), p.saved.poison(), p.o.poison(), p.dq.poison();
    p.dk.poison(), p.dv.poison(), p.dwk.zero(), p.dwv.zero(), p.dpe.zero();
    p.forward(0), p.backward(0);
    CUDA_CHECK(cudaDeviceSynchronize());
    CHECK(p.bits() == first, "%s: the same bits twice", what);
}

static FsaConfig random_config(Random *r) {
    FsaConfig c = default_config(1, 1, r->below(3) ? 64 : 128, 64, 8);
    int g = 1 + (int)r->below(16), blocks[] = {16, 32, 48, 64, 64, 128};
    c.kv_heads = 1 + (int)r->below(g > 8 ? 1 : 3);
    c.q_heads = g * c.kv_heads;
    c.block = blocks[r->below(6)];
    c.cmp_stride = r->below(3) ? 16 : 8;
    c.cmp_len = c.cmp_stride * (1 + (int)r->below(2));
    if (c.cmp_len > c.block) c.cmp_len = c.cmp_stride;
    c.init_blocks = (int)r->below(2);
    c.local_blocks = (int)r->below(3);
    c.topk = std::max(1, c.init_blocks + c.local_blocks) + (int)r->below(8);
    c.window = 1 + (int)r->below(300);
    c.phi = r->below(2) ? FSA_PHI_LINEAR : FSA_PHI_MEAN;
    c.gate_per_token = (int)r->below(2);
    if (r->below(4) == 0) c.scale = 0.05f + 0.1f * (float)r->uniform();
    return c;
}

static void test_random_shapes(Random *r, int shapes) {
    for (int i = 0; i < shapes; i++) {
        FsaConfig c = random_config(r);
        std::vector<int64_t> lengths;
        for (int64_t s = 1 + r->below(3); s > 0; s--) lengths.push_back(1 + r->below(r->below(3) ? 400 : 40));
        std::vector<FsaSegment> segments;
        if (r->below(4) == 0) { // a part of each sequence
            for (size_t s = 0; s < lengths.size(); s++) {
                int64_t pos = r->below(lengths[s]);
                segments.push_back(FsaSegment{(int64_t)s, pos, 1 + r->below(lengths[s] - pos)});
            }
        }
        bool rope = r->below(2);
        if (r->below(2))
            test_shape<__nv_bfloat16>(r, c, lengths, segments, rope);
        else
            test_shape<__half>(r, c, lengths, segments, rope);
    }
}

static void test_chosen_shapes(Random *r) {
    for (int64_t n : {1, 31, 32, 63, 65, 507})
        test_shape<__nv_bfloat16>(r, default_config(8, 2, 128, 64, 16), {n}, {}, true);
    test_shape<__half>(r, default_config(8, 2, 128, 64, 16), {2049}, {}, true);
    test_shape<__nv_bfloat16>(r, default_config(16, 1, 64, 64, 16), {1, 3000, 1, 31}, {}, true);
}

// Two problems on two streams at once give what each gives alone.
static void test_two_streams(Random *r) {
    typedef __nv_bfloat16 T;
    FsaConfig c = default_config(8, 2, 64, 64, 8);
    Problem<T> a(r, c, {1500}, {}, true), b(r, c, {900, 300}, {}, false);
    cudaStream_t s[2];
    for (cudaStream_t &x : s) CUDA_CHECK(cudaStreamCreate(&x));
    std::vector<char> alone[2];
    for (int round = 0; round < 3; round++) {
        a.dwk.zero(), a.dwv.zero(), a.dpe.zero(), b.dwk.zero(), b.dwv.zero(), b.dpe.zero();
        CUDA_CHECK(cudaDeviceSynchronize());
        a.forward(s[0]);
        if (round == 0) CUDA_CHECK(cudaDeviceSynchronize());
        b.forward(s[1]);
        if (round == 0) CUDA_CHECK(cudaDeviceSynchronize());
        a.backward(s[0]);
        if (round == 0) CUDA_CHECK(cudaDeviceSynchronize());
        b.backward(s[1]);
        CUDA_CHECK(cudaDeviceSynchronize());
        if (round == 0)
            alone[0] = a.bits(), alone[1] = b.bits();
        else
            CHECK(a.bits() == alone[0] && b.bits() == alone[1], "round %d", round);
    }
    for (cudaStream_t &x : s) CUDA_CHECK(cudaStreamDestroy(x));
}

// The single-branch entries against the reference.
template <typename T> static void test_branches(Random *r) {
    FsaConfig c = default_config(10, 2, 64, 64, 4);
    Problem<T> p(r, c, {700, 90}, {}, false);
    CHECK(p.forward(0) == 0, "%s", fsa_last_error());
    std::vector<int32_t> choice = random_choice(r, c, p.batch.ref);
    Buffer<int32_t> indices(choice), chosen((int64_t)choice.size());
    int64_t rows = p.nq * c.q_heads;
    for (int rule = FSA_CAUSAL; rule <= FSA_SELECTED; rule++) {
        bool selected = rule == FSA_SELECTED;
        if (rule == FSA_COMPRESSED) continue; // part of the whole
        FsaOperation ops[2] = {selected ? FSA_SELECTED_FORWARD : FSA_ATTEND_FORWARD,
                               selected ? FSA_SELECTED_BACKWARD : FSA_ATTEND_BACKWARD};
        Buffer<char> work((int64_t)std::max(fsa_workspace_size(&c, Dtype<T>::value, &p.b, ops[0]),
                                            fsa_workspace_size(&c, Dtype<T>::value, &p.b, ops[1])));
        Buffer<T> o(p.size_q), dq(p.size_q), dk(p.size_k), dv(p.size_k);
        Buffer<float> lse(rows);
        FsaDtype t = Dtype<T>::value;
        size_t bytes = (size_t)work.n;
        int status =
            selected ? fsa_selected_forward(&c, t, &p.b, p.q_, p.k_, p.v_, indices, o, lse, work, bytes, 0)
                     : fsa_attend_forward(&c, t, &p.b, (FsaVisibility)rule, p.q_, p.k_, p.v_, o, lse, work,
                                          bytes, 0);
        CHECK(status == 0, "rule %d: %s", rule, fsa_last_error());
        status = selected ? fsa_selected_backward(&c, t, &p.b, p.q_, p.k_, p.v_, indices, o, lse, p.dout_, dq,
                                                  dk, dv, work, bytes, 0)
                          : fsa_attend_backward(&c, t, &p.b, (FsaVisibility)rule, p.q_, p.k_, p.v_, o, lse,
                                                p.dout_, dq, dk, dv, work, bytes, 0);
        CHECK(status == 0, "rule %d: %s", rule, fsa_last_error());
        CUDA_CHECK(cudaDeviceSynchronize());
        std::vector<float> ro(p.size_q), rl(rows), rq(p.size_q, 0), rk(p.size_k, 0), rv(p.size_k, 0);
        fsa_ref_attend_forward_f32(&c, &p.batch.ref, (FsaVisibility)rule, p.q.f.data(), p.k.f.data(),
                                   p.v.f.data(), choice.data(), ro.data(), rl.data());
        fsa_ref_attend_backward_f32(&c, &p.batch.ref, (FsaVisibility)rule, p.q.f.data(), p.k.f.data(),
                                    p.v.f.data(), choice.data(), ro.data(), rl.data(), p.dout.f.data(),
                                    rq.data(), rk.data(), rv.data());
        double eo = error_of(o.floats(), ro), eq = error_of(dq.floats(), rq), ek = error_of(dk.floats(), rk);
        double ev = error_of(dv.floats(), rv), el = lse_error(lse.host(), rl),
               limit = Dtype<T>::grad_tolerance;
        CHECK(eo <= Dtype<T>::out_tolerance && el <= 1e-3 && eq <= limit && ek <= limit && ev <= limit,
              "rule %d %s: o %.2e lse %.1e dq %.2e dk %.2e dv %.2e", rule, Dtype<T>::name, eo, el, eq, ek,
              ev);
    }
}

static void test_errors(Random *r) {
    typedef __nv_bfloat16 T;
    Problem<T> p(r, default_config(4, 2, 64, 64, 8), {200}, {}, true);
    FsaConfig good = p.c;
    auto expect = [&](int status, int wanted, const char *word) {
        CHECK(status == wanted && strstr(fsa_last_error(), word), "wanted status %d and '%s', got %d: %s",
              wanted, word, status, fsa_last_error());
    };
#define CONFIG_ERROR(field, value, word)                                                                     \
    p.c.field = value;                                                                                       \
    expect(p.forward(0), FSA_ERROR_CONFIG, word);                                                            \
    CHECK(fsa_workspace_size(&p.c, FSA_BF16, &p.b, FSA_FORWARD) == 0, word);                                 \
    p.c = good
    CONFIG_ERROR(q_heads, 5, "q_heads");
    CONFIG_ERROR(head_dim, 96, "head_dim 96");
    CONFIG_ERROR(block, 24, "block 24");
    CONFIG_ERROR(topk, 2, "topk 2");
    CONFIG_ERROR(topk, 5000, "topk 5000");
    CONFIG_ERROR(window, 0, "window 0");
    CONFIG_ERROR(cmp_stride, 12, "cmp_stride 12");
    FsaDeviceBatch good_batch = p.b;
    p.b.num_queries = -1, expect(p.forward(0), FSA_ERROR_ARGUMENT, "negative"), p.b = good_batch;
    p.b.num_seqs = 0, expect(p.forward(0), FSA_ERROR_ARGUMENT, "sequence"), p.b = good_batch;
    p.b.max_len = 300, expect(p.forward(0), FSA_ERROR_ARGUMENT, "max_len 300"), p.b = good_batch;
    p.b.cu_seqlens = NULL, expect(p.forward(0), FSA_ERROR_ARGUMENT, "cu_seqlens"), p.b = good_batch;
    p.b.segments = NULL, expect(p.forward(0), FSA_ERROR_ARGUMENT, "segments"), p.b = good_batch;
    p.b.num_queries = 1ll << 30, expect(p.forward(0), FSA_ERROR_ARGUMENT, "num_queries"), p.b = good_batch;
    int64_t size = p.forward_work.n;
    p.forward_work.n = size - 1, expect(p.forward(0), FSA_ERROR_WORKSPACE, "needs"), p.forward_work.n = size;
    FsaPhiWeights w = p.weights();
    size_t bytes = (size_t)size;
    auto run = [&](FsaDtype t, const T *q, const FsaPhiWeights *phi, void *work) {
        return fsa_forward(&p.c, t, &p.b, q, p.k_, p.v_, phi, NULL, p.gate_, NULL, p.o, p.saved, work, bytes,
                           0);
    };
    expect(run((FsaDtype)7, p.q_, &w, p.forward_work), FSA_ERROR_ARGUMENT, "dtype 7");
    expect(run(FSA_BF16, NULL, &w, p.forward_work), FSA_ERROR_ARGUMENT, "q: NULL");
    expect(run(FSA_BF16, p.q_ + 1, &w, p.forward_work), FSA_ERROR_ARGUMENT, "q: not aligned");
    expect(run(FSA_BF16, p.q_, NULL, p.forward_work), FSA_ERROR_ARGUMENT, "phi");
    expect(run(FSA_BF16, p.q_, &w, NULL), FSA_ERROR_WORKSPACE, "NULL");
    expect(run(FSA_BF16, p.q_, &w, p.forward_work.get() + 16), FSA_ERROR_WORKSPACE, "aligned");
    expect(fsa_attend_forward(&p.c, FSA_BF16, &p.b, FSA_SELECTED, p.q_, p.k_, p.v_, p.o, p.dwk,
                              p.forward_work, bytes, 0),
           FSA_ERROR_ARGUMENT, "rule 3");
    expect(fsa_workspace_size(&p.c, FSA_BF16, &p.b, (FsaOperation)9) != 0, 0, "operation 9");
    expect(p.forward(0), FSA_OK, "");
}

int main(int argc, char **argv) {
    int shapes = 200, devices = 0;
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "shapes=", 7) == 0) shapes = atoi(argv[i] + 7);
    }
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        SKIP("no GPU");
        return test_end("test_fsa");
    }
    Random r(seed_from(argc, argv));
    test_errors(&r);
    test_branches<__nv_bfloat16>(&r);
    test_branches<__half>(&r);
    test_chosen_shapes(&r);
    test_random_shapes(&r, shapes);
    test_two_streams(&r);
    printf("worst relative errors: bf16 output %.2e, gradients %.2e; fp16 output %.2e, gradients %.2e\n",
           worst_error[0][0], worst_error[0][1], worst_error[1][0], worst_error[1][1]);
    return test_end("test_fsa");
}
