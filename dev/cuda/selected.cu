// selected.cu: checks and times the selected branch, forward and backward, for given block indices.
//   version 1: one warp per (query, head)
//   version 2: NSA's loop order: queries outside, the g rows of a query padded to an mma tile
//   version 3: FSA as in its paper: KV blocks outside; a statistics, a main and a combine kernel
//   library:   KV blocks outside; a main and a combine kernel (fsa/query_lists.cu, fsa/selected.cu)
// Versions 1 to 3 are in selected_versions.h.
// usage: selected [seed=N] [check [small] | time | compare | shape=N,HQ,HKV,BLOCK,TOPK | indices=FILE]
//     default   check, time and compare
//     compare   times versions 2 and 3, the library and full attention over group sizes and lengths
//     shape     times the library at one shape, for a profiler
//     indices   times the library on the block indices of a trained model, layer by layer, and on random ones
//               of the same shape (train_gpt_nsa -val 1 -block-indices FILE writes the file)
#include "../../fsa/kernels.h"
#include "../../fsa/partial.cuh"
#include "../../llmc/block_indices.h"
#include "block_indices.h"
#include "selected_versions.h"

// The library's selected branch with its scratch memory.
template <typename T> struct Library {
    const FsaConfig &c;
    const BatchLayout &batch;
    Buffer<char> scratch;
    Buffer<float> delta;
    Library(const FsaConfig &config, const BatchLayout &layout)
        : c(config), batch(layout),
          scratch((int64_t)std::max(fsa_selected_scratch_bytes(&c, &batch, Dtype<T>::value, 0),
                                    fsa_selected_scratch_bytes(&c, &batch, Dtype<T>::value, 1))),
          delta(batch.nq * c.q_heads) {}
    void forward(const T *q, const T *k, const T *v, const int32_t *block_indices, T *o, float *lse,
                 const GateCombine *gate = NULL) {
        FSA_CHECK(fsa_selected_branch_forward(&c, &batch, Dtype<T>::value, packed_q(&c, q), packed_kv(&c, k),
                                              packed_kv(&c, v), block_indices, scratch, packed_q(&c, o), lse,
                                              gate, 0));
    }
    void backward(const T *q, const T *k, const T *v, const int32_t *block_indices, const T *o,
                  const float *lse, const T *dout, T *dq, T *dk, T *dv,
                  const BranchGradients *branch_grads = NULL) {
        FSA_CHECK(fsa_bwd_preprocess(&c, Dtype<T>::value, batch.nq, packed_q(&c, o), lse, packed_q(&c, dout),
                                     delta, NULL, 0));
        FSA_CHECK(fsa_selected_branch_backward(&c, &batch, Dtype<T>::value, packed_q(&c, q), packed_kv(&c, k),
                                               packed_kv(&c, v), block_indices, 0, packed_q(&c, dout), delta,
                                               lse, branch_grads, scratch, packed_q(&c, dq),
                                               packed_kv(&c, dk), packed_kv(&c, dv), 0));
    }
};

// The largest errors in this run, which the records of timings contain.
static double max_error[2][2];         // library: [type][forward, backward]
static double max_version_error[4][2]; // versions 1 to 3 in bf16: [version][forward, backward]

template <typename X> static bool same_bits(const Buffer<X> &a, const Buffer<X> &b) {
    std::vector<X> x = a.host(), y = b.host();
    return memcmp(x.data(), y.data(), x.size() * sizeof(X)) == 0;
}

template <typename T>
static void check(Random *r, const FsaConfig &c, const std::vector<int64_t> &lengths,
                  const std::vector<FsaSegment> &segments = {}, float v_scale = 1) {
    Batch b(c, lengths, segments);
    int64_t nq = b.batch.nq, n = b.batch.n, d = c.head_dim, rows = nq * c.q_heads;
    Host<T> q(r, rows * d, 1), k(r, n * c.kv_heads * d, 1), v(r, n * c.kv_heads * d, v_scale),
        dout(r, rows * d, 1);
    std::vector<int32_t> indices = random_block_indices(r, c, b.ref);
    Buffer<T> dq_(rows * d), q_(q.raw), k_(k.raw), v_(v.raw), dout_(dout.raw), o_(rows * d),
        dk_(k.raw.size()), dv_(k.raw.size());
    Buffer<T> o2(rows * d), dq2(rows * d), dk2(k.raw.size()), dv2(k.raw.size());
    Buffer<float> lse_(rows), lse2(rows);
    Buffer<int32_t> block_indices(indices);
    std::vector<float> o(rows * d), lse(rows), dq(rows * d, 0), dk(k.f.size(), 0), dv(k.f.size(), 0);
    fsa_ref_attention_forward_f32(&c, &b.ref, FSA_SELECTED, q.f.data(), k.f.data(), v.f.data(),
                                  indices.data(), o.data(), lse.data());
    fsa_ref_attention_backward_f32(&c, &b.ref, FSA_SELECTED, q.f.data(), k.f.data(), v.f.data(),
                                   indices.data(), o.data(), lse.data(), dout.f.data(), dq.data(), dk.data(),
                                   dv.data());
    // P (dP - delta) cancels in queries that see one key. With few queries, dq and dk are then near zero, and
    // their errors are relative to the terms without delta (o = 0), if these are larger.
    std::vector<float> dq_terms, dk_terms;
    if (nq <= 16) { // with more queries, some see several keys in every shape below
        std::vector<float> zero(o.size()), unused(dv.size());
        dq_terms.resize(dq.size()), dk_terms.resize(dk.size());
        fsa_ref_attention_backward_f32(&c, &b.ref, FSA_SELECTED, q.f.data(), k.f.data(), v.f.data(),
                                       indices.data(), zero.data(), lse.data(), dout.f.data(),
                                       dq_terms.data(), dk_terms.data(), unused.data());
    }
    Library<T> library(c, b.batch);
    library.forward(q_, k_, v_, block_indices, o_, lse_);
    library.backward(q_, k_, v_, block_indices, o_, lse_, dout_, dq_, dk_, dv_);
    CUDA_CHECK(cudaDeviceSynchronize());
    char what[160];
    snprintf(what, sizeof what,
             "selected %s nq %lld n %lld heads %d/%d d %d block %d topk %d init %d local %d", Dtype<T>::name,
             (long long)nq, (long long)n, c.q_heads, c.kv_heads, c.head_dim, c.block, c.topk, c.init_blocks,
             c.local_blocks);
    double eo = relative_error(o_.floats(), o), el = lse_error(lse_.host(), lse),
           eq = relative_error(dq_.floats(), dq, dq_terms);
    double ek = relative_error(dk_.floats(), dk, dk_terms), ev = relative_error(dv_.floats(), dv);
    printf("%s: o %.2e lse %.1e dq %.2e dk %.2e dv %.2e\n", what, eo, el, eq, ek, ev);
    check_that(eo <= Dtype<T>::out_tolerance, what, eo, Dtype<T>::out_tolerance);
    check_that(el <= 1e-3, what, el, 1e-3);
    double *e = max_error[Dtype<T>::value];
    e[0] = std::max(e[0], eo);
    e[1] = std::max(e[1], std::max(eq, std::max(ek, ev)));
    check_that(eq <= Dtype<T>::grad_tolerance, what, eq, Dtype<T>::grad_tolerance);
    check_that(ek <= Dtype<T>::grad_tolerance, what, ek, Dtype<T>::grad_tolerance);
    check_that(ev <= Dtype<T>::grad_tolerance, what, ev, Dtype<T>::grad_tolerance);
    // With a gate: the gated sum; the same lse; the same o, unless o_gated replaces it.
    int64_t triples = (c.gate_per_token ? nq : rows) * 3;
    Host<T> logits(r, triples, 2), o_cmp(r, rows * d, 1), o_win(r, rows * d, 1);
    Buffer<T> logits_(logits.raw), o_cmp_(o_cmp.raw), o_win_(o_win.raw), o_gated_(rows * d);
    GateCombine gate = {
        {logits_, c.gate_per_token ? 3 : 3 * c.q_heads}, o_cmp_, o_win_, {o_gated_, c.q_heads * d}};
    float *branches[3] = {o_cmp.f.data(), o.data(), o_win.f.data()};
    std::vector<float> o_gated(rows * d);
    fsa_ref_gate_forward_f32(&c, nq, logits.f.data(), branches, o_gated.data());
    for (int keep_o = 0; keep_o < 2; keep_o++) {
        o2.poison(), lse2.poison(), o_gated_.poison();
        library.forward(q_, k_, v_, block_indices, keep_o ? o2.get() : o_gated_.get(), lse2, &gate);
        CUDA_CHECK(cudaDeviceSynchronize());
        double error = relative_error(o_gated_.floats(), o_gated);
        check_that(error <= Dtype<T>::out_tolerance, (std::string("gated sum of ") + what).c_str(), error,
                   Dtype<T>::out_tolerance);
        check_that(same_bits(lse_, lse2) && (!keep_o || same_bits(o_, o2)),
                   "o and lse must have the same bits with a gate", 0, 0);
        check_that(o_gated_.guards_intact() && o2.guards_intact(), "guard zones", 0, 0);
    }
    // With the gradients of the other branches and the inverse RoPE.
    std::vector<float> dq_total(dq.size()), dk_total(dk.size()), dv_total(dv.size()), dk_unrotated(dk.size());
    for (std::vector<float> *x : {&dq_total, &dk_total, &dv_total, &dk_unrotated})
        for (float &y : *x) y = r->normal();
    Buffer<float> dq_accum_(dq_to_accum(c, nq, dq_total)), dk_accum_(dk_total), dv_accum_(dv_total),
        dk_unrotated_(dk_unrotated);
    const std::vector<double> inv_freq = rope_frequencies(c.head_dim);
    Buffer<double> inv_freq_(inv_freq);
    const BranchGradients branch_grads = {dq_accum_, dk_accum_, dv_accum_, dk_unrotated_, inv_freq_};
    for (size_t i = 0; i < dq.size(); i++) dq_total[i] += dq[i];
    for (size_t i = 0; i < dk.size(); i++) dk_total[i] += dk[i], dv_total[i] += dv[i];
    fsa_ref_rope_queries_f32(&c, &b.ref, dq_total.data(), inv_freq.data(), 1);
    fsa_ref_rope_keys_f32(&c, &b.ref, dk_total.data(), inv_freq.data(), 1);
    for (size_t i = 0; i < dk.size(); i++) dk_total[i] += dk_unrotated[i];
    dq2.poison(), dk2.poison(), dv2.poison();
    library.backward(q_, k_, v_, block_indices, o_, lse_, dout_, dq2, dk2, dv2, &branch_grads);
    CUDA_CHECK(cudaDeviceSynchronize());
    const double errors[] = {relative_error(dq2.floats(), dq_total), relative_error(dk2.floats(), dk_total),
                             relative_error(dv2.floats(), dv_total)};
    for (double error : errors)
        check_that(error <= Dtype<T>::grad_tolerance,
                   (std::string("gradients of all branches: ") + what).c_str(), error,
                   Dtype<T>::grad_tolerance);
    check_that(dq2.guards_intact() && dk2.guards_intact() && dv2.guards_intact(), "guard zones", 0, 0);
    // Again with poisoned scratch memory.
    library.scratch.poison();
    library.forward(q_, k_, v_, block_indices, o2, lse2);
    library.backward(q_, k_, v_, block_indices, o2, lse2, dout_, dq2, dk2, dv2);
    CUDA_CHECK(cudaDeviceSynchronize());
    bool same = same_bits(o_, o2) && same_bits(lse_, lse2) && same_bits(dq_, dq2) && same_bits(dk_, dk2) &&
                same_bits(dv_, dv2);
    check_that(same, "results must have the same bits twice", 0, 0);
    bool intact = o_.guards_intact() && lse_.guards_intact() && dq_.guards_intact() && dk_.guards_intact() &&
                  dv_.guards_intact() && library.scratch.guards_intact();
    check_that(intact, "guard zones", 0, 0);
}

// Writes eight partial rows of 64 channels as the main kernels do, and reads them as the combine kernels do.
enum { CHUNKS = 8 }; // of a row
template <typename T> __global__ void partial_chunks_kernel(const float *x, char *rows, float *y) {
    const int row = threadIdx.x / 4, c = threadIdx.x % 4;
    char *const at = rows + row * partial_row_bytes<T, 64>();
    PartialChunk<T> p[2];
    for (int slice = 0; slice < 2; slice++) {
        float v[8];
        for (int k = 0; k < 8; k++) v[k] = x[(row * CHUNKS + 4 * slice + c) * 8 + k];
        p[slice] = PartialChunk<T>::pack(v, 1);
    }
    if (row % 2 == 0) {
        PartialChunk<T>::store(at, 0, c, p);
    } else {
        for (int slice = 0; slice < 2; slice++) {
            const PartialChunk<T> one[1] = {p[slice]};
            PartialChunk<T>::store(at, slice, c, one);
        }
    }
    __syncthreads();
    for (int chunk = c; chunk < CHUNKS; chunk += 4) {
        float sum[8] = {};
        PartialChunk<T>::load(at + PartialChunk<T>::offset(chunk), chunk, true, l2_evict_first())
            .add_to(sum, 1);
        for (int k = 0; k < 8; k++) y[(row * CHUNKS + chunk) * 8 + k] = sum[k];
    }
}

// Checks partial rows: the error is at most half of the last bit; NaN and Inf stay within their chunk.
template <typename T> static void check_partial_chunks(Random *r) {
    const bool shared = Dtype<T>::value == FSA_BF16; // the chunk shares an exponent
    std::vector<float> x(8 * CHUNKS * 8);
    for (float &v : x) v = r->normal();
    for (int k = 0; k < 64; k++) {
        x[64 + k] *= shared ? 1e-36f : 1e-2f, x[128 + k] *= shared ? 1e33f : 1e3f, x[192 + k] = 0;
        x[256 + k] *= k % 8 == 5 ? 1000.f : 1, x[320 + k] = k % 2 ? 0.99999f : -0.4999f;
    }
    x[384] = NAN, x[448 + 63] = -INFINITY, x[448] = 1e34f; // 1e34 is out of range
    Buffer<float> x_(x), y_((int64_t)x.size());
    Buffer<char> rows(8 * partial_row_bytes<T, 64>());
    rows.poison(), y_.poison();
    partial_chunks_kernel<T><<<1, 32>>>(x_, rows, y_);
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<float> y = y_.host();
    for (size_t chunk = 0; chunk < x.size() / 8; chunk++) {
        float amax = 0, worst = 0;
        bool finite = true, result_finite = true;
        for (size_t i = chunk * 8; i < chunk * 8 + 8; i++) {
            finite &= fabsf(x[i]) < 0x1p112f, result_finite &= std::isfinite(y[i]);
            amax = std::max(amax, fabsf(x[i])), worst = std::max(worst, fabsf(x[i] - y[i]));
        }
        const float limit = amax / (shared ? 1024 : 2048);
        check_that(finite ? result_finite && worst <= limit : !result_finite, "a chunk of a partial row",
                   worst, limit);
    }
    check_that(rows.guards_intact() && y_.guards_intact(), "guard zones", 0, 0);
}

template <typename T, int D>
static void check_version(Random *r, int version, const FsaConfig &c, const std::vector<int64_t> &lengths) {
    Batch b(c, lengths);
    int64_t nq = b.batch.nq, rows = nq * c.q_heads, kv = nq * c.kv_heads * D;
    Host<T> q(r, rows * D, 1), k(r, kv, 1), v(r, kv, 1), dout(r, rows * D, 1);
    std::vector<int32_t> indices = random_block_indices(r, c, b.ref);
    Buffer<T> q_(q.raw), k_(k.raw), v_(v.raw), dout_(dout.raw), o_(rows * D), dq_(rows * D), dk_(kv), dv_(kv);
    Buffer<float> lse_(rows);
    Buffer<int32_t> block_indices(indices);
    std::vector<float> o(rows * D), lse(rows), dq(rows * D, 0), dk(kv, 0), dv(kv, 0);
    fsa_ref_attention_forward_f32(&c, &b.ref, FSA_SELECTED, q.f.data(), k.f.data(), v.f.data(),
                                  indices.data(), o.data(), lse.data());
    fsa_ref_attention_backward_f32(&c, &b.ref, FSA_SELECTED, q.f.data(), k.f.data(), v.f.data(),
                                   indices.data(), o.data(), lse.data(), dout.f.data(), dq.data(), dk.data(),
                                   dv.data());
    Versions<T, D> versions(c, b.batch, version);
    versions.forward(q_, k_, v_, block_indices, o_, lse_);
    versions.backward(q_, k_, v_, block_indices, o_, lse_, dout_, dq_, dk_, dv_);
    CUDA_CHECK(cudaDeviceSynchronize());
    char what[160];
    snprintf(what, sizeof what, "selected version %d %s n %lld heads %d/%d d %d block %d topk %d", version,
             Dtype<T>::name, (long long)nq, c.q_heads, c.kv_heads, D, c.block, c.topk);
    // Versions 1 to 3 keep partial results and probabilities in the 16-bit type, as their originals do.
    double eo = relative_error(o_.floats(), o), el = lse_error(lse_.host(), lse),
           eg = std::max(relative_error(dq_.floats(), dq),
                         std::max(relative_error(dk_.floats(), dk), relative_error(dv_.floats(), dv)));
    double out_limit = 1.2 * Dtype<T>::out_tolerance, grad_limit = 1.2 * Dtype<T>::grad_tolerance;
    printf("%s: o %.2e lse %.1e gradients %.2e\n", what, eo, el, eg);
    if (Dtype<T>::value == FSA_BF16) {
        max_version_error[version][0] = std::max(max_version_error[version][0], eo);
        max_version_error[version][1] = std::max(max_version_error[version][1], eg);
    }
    check_that(eo <= out_limit, what, eo, out_limit);
    check_that(el <= 1e-3, what, el, 1e-3);
    check_that(eg <= grad_limit, what, eg, grad_limit);
    check_that(o_.guards_intact() && lse_.guards_intact() && dq_.guards_intact() && dk_.guards_intact() &&
                   dv_.guards_intact() && versions.partial.guards_intact(),
               "guard zones", 1, 0);
}

static FsaConfig with_init_local(FsaConfig c, int init, int local) {
    c.init_blocks = init, c.local_blocks = local;
    return c;
}

// Checks random numbers of initial and local blocks: also as many as the top-k, and none.
template <typename T> static void check_init_local(Random *r, bool small) {
    const int blocks[] = {16, 32, 48, 64, 80, 128};
    for (int i = 0; i < (small ? 6 : 60); i++) {
        const int g = 1 + (int)r->below(small ? 4 : 16), kv_heads = 1 + (int)r->below(g > 8 || small ? 1 : 2);
        const int init = (int)r->below(4), local = (int)r->below(5), free_blocks = (int)r->below(6);
        const int block = blocks[r->below(6)];
        FsaConfig c = with_init_local(default_config(g * kv_heads, kv_heads, r->below(2) ? 64 : 128, block,
                                                     std::max(1, init + local + free_blocks)),
                                      init, local);
        if (i % 6 == 0) c = with_init_local(c, 0, 0);
        c.gate_per_token = (int)r->below(2);
        std::vector<int64_t> lengths;
        for (int64_t s = 1 + r->below(3); s > 0; s--) lengths.push_back(r->below(small ? 200 : 1500));
        std::vector<FsaSegment> segments;
        for (size_t s = 0; s < lengths.size() && i % 2; s++) {
            int64_t pos = r->below(lengths[s] + 1), len = r->below(lengths[s] - pos + 1);
            segments.push_back(FsaSegment{(int64_t)s, pos, len});
        }
        check<T>(r, c, lengths, segments);
    }
}

template <typename T> static void check_all(Random *r, bool small) {
    check_partial_chunks<T>(r);
    for (int version = 1; version <= 3; version++) {
        check_version<T, 64>(r, version, default_config(3, 1, 64, 16, 3), {70, 0, 9});
        check_version<T, 128>(r, version, default_config(4, 2, 128, 80, 3), {0, 100});
        if (small) continue;
        check_version<T, 128>(r, version, default_config(8, 2, 128, 64, 8), {1000, 1, 65});
        check_version<T, 64>(r, version, default_config(7, 1, 64, 32, 5), {507});
        check_version<T, 64>(r, version, default_config(16, 1, 64, 64, 4), {900});
        check_version<T, 128>(r, version, default_config(4, 1, 128, 128, 4), {1500, 200});
    }
    check<T>(r, default_config(4, 1, 64, 64, 16), {1});
    check<T>(r, default_config(3, 1, 64, 16, 3), {31, 0, 100, 0, 63, 65, 0});
    check<T>(r, default_config(4, 2, 128, 80, 4), {0, 330 + r->below(50)});
    check<T>(r, default_config(2, 1, 64, 16, 4), {90, 0, 40},
             {{0, 0, 0}, {0, 10, 30}, {0, 80, 10}, {1, 0, 0}, {2, 39, 1}, {2, 40, 0}});
    check<T>(r, with_init_local(default_config(2, 1, 64, 16, 12), 2, 1), {400},
             {{0, 300, 100}}); // initial and local keys are two ranges
    check<T>(r, with_init_local(default_config(2, 1, 64, 16, 40), 3, 4), {0, 700}, {{1, 660, 40}});
    check_init_local<T>(r, small);
    if (small) return;
    check<T>(r, default_config(4, 2, 128, 64, 4), {507});
    check<T>(r, default_config(32, 8, 128, 64, 16), {1500});
    check<T>(r, default_config(3, 1, 64, 16, 8), {31, 1, 700, 63, 65});
    check<T>(r, default_config(10, 2, 128, 32, 7), {1000, 32});
    check<T>(r, default_config(7, 1, 64, 128, 4), {1300, 1, 200});
    check<T>(r, default_config(16, 1, 128, 128, 3), {900});
    check<T>(r, default_config(2, 2, 128, 64, 16), {4097});
    check<T>(r, default_config(4, 4, 64, 80, 5), {1111, 79});
    check<T>(r, default_config(6, 2, 64, 256, 3), {1400});
    check<T>(r, default_config(12, 2, 128, 48, 40), {2000});
    check<T>(r, default_config(4, 2, 128, 64, 5), {900, 1, 300}, {{0, 100, 57}, {0, 400, 500}, {2, 299, 1}});
    check<T>(r, default_config(4, 2, 64, 64, 5), {600}, {}, Dtype<T>::value == FSA_BF16 ? 1e8f : 3e3f);
    check<T>(r, default_config(64, 4, 64, 64, 16), {1100});
    check<T>(r, default_config(32, 2, 128, 48, 24), {2000}); // forward: several slabs, a launch for each head
    check<T>(r, default_config(1, 1, 128, 128, 8), {5000});  // long query lists of 128-key blocks
}

typedef __nv_bfloat16 Bf16;

// Inputs and outputs for timings.
template <typename T> struct Bench {
    FsaConfig c;
    Batch b;
    int64_t rows, kv;
    Buffer<T> q, k, v, dout, o, dq, dk, dv;
    Buffer<float> lse;
    Buffer<int32_t> block_indices;
    Bench(Random *r, const FsaConfig &config, const std::vector<int64_t> &lengths)
        : c(config), b(c, lengths), rows(b.batch.n * c.q_heads), kv(b.batch.n * c.kv_heads * c.head_dim),
          q(rows * c.head_dim), k(kv), v(kv), dout(q.n), o(q.n), dq(q.n), dk(kv), dv(kv), lse(rows),
          block_indices(c.kv_heads * b.batch.n * c.topk) {
        Buffer<T> *inputs[] = {&q, &k, &v, &dout};
        for (Buffer<T> *x : inputs) fill_random(x->get(), x->n, r->u64(), 1);
    }
    Bench(Random *r, int64_t n, int hq, int hkv, int d, int block, int topk, bool clustered)
        : Bench(r, default_config(hq, hkv, d, block, topk), {n}) {
        random_block_indices_device(block_indices, n, c, r->u64(), clustered);
    }
    double flops() const { return 4.0 * rows * c.topk * c.block * c.head_dim; } // forward
};

// Forward and backward milliseconds of one implementation.
struct Times {
    double ms[2];
};

template <typename T> static Times time_library(Bench<T> *x, const char *kind) {
    Library<T> library(x->c, x->b.batch);
    Times t;
    t.ms[0] = time_ms([&] { library.forward(x->q, x->k, x->v, x->block_indices, x->o, x->lse); });
    t.ms[1] = time_ms([&] {
        library.backward(x->q, x->k, x->v, x->block_indices, x->o, x->lse, x->dout, x->dq, x->dk, x->dv);
    });
    int d = x->c.head_dim;
    // Partial rows of a row, forward.
    int forward_slots = x->c.topk - (fsa_use_sm90() ? x->c.init_blocks + x->c.local_blocks : 0);
    double rows = (double)x->rows, flops[2] = {x->flops(), 2.5 * x->flops()};
    int row = d / 8 * PartialChunk<T>::BYTES; // of dq_partial, written and read
    double bytes[2] = {rows * forward_slots * 3 * (2 * d + 4), rows * x->c.topk * (4 * d + 12 + 2 * row)};
    printf("selected library n %lld (%d, %d) d %d (%d, %d) %s %s:", (long long)x->b.batch.n, x->c.q_heads,
           x->c.kv_heads, d, x->c.block, x->c.topk, Dtype<T>::name, kind);
    for (int i = 0; i < 2; i++) {
        printf(" %s %.3f ms (%.0f TFLOP/s, %.2f TB/s, lower bound %.2f ms),", i ? "bwd" : "fwd", t.ms[i],
               flops[i] / t.ms[i] * 1e-9, bytes[i] / t.ms[i] * 1e-9,
               std::max(flops[i] / 790e9, bytes[i] / 4.5e9));
        record({"selected", "sel", "nsa", i ? "bwd" : "fwd", Dtype<T>::name, x->b.batch.n, x->c, t.ms[i],
                flops[i] / t.ms[i] * 1e-9, max_error[Dtype<T>::value][i], kind, "library", 1});
    }
    printf(" workspace %.0f MiB\n", library.scratch.n / 1048576.0);
    return t;
}

static Times time_version(Bench<Bf16> *x, int version) {
    Versions<Bf16, 128> versions(x->c, x->b.batch, version);
    const char *names[] = {"", "1", "2", "3"};
    Times t;
    t.ms[0] = time_ms([&] { versions.forward(x->q, x->k, x->v, x->block_indices, x->o, x->lse); }, 5);
    t.ms[1] = time_ms(
        [&] {
            versions.backward(x->q, x->k, x->v, x->block_indices, x->o, x->lse, x->dout, x->dq, x->dk, x->dv);
        },
        5);
    printf("selected version %d n %lld (%d, %d) d 128 (%d, %d): fwd %.3f ms, bwd %.3f ms\n", version,
           (long long)x->b.batch.n, x->c.q_heads, x->c.kv_heads, x->c.block, x->c.topk, t.ms[0], t.ms[1]);
    for (int i = 0; i < 2; i++)
        record({"selected", "sel", "nsa", i ? "bwd" : "fwd", "bf16", x->b.batch.n, x->c, t.ms[i],
                (i ? 2.5 : 1) * x->flops() / t.ms[i] * 1e-9, max_version_error[version][i], "random",
                names[version], 1});
    return t;
}

// Full causal attention of the same q, k, v.
static Times time_full(Bench<Bf16> *x) {
    const BatchLayout &p = x->b.batch;
    Buffer<float> delta(x->rows), lse_bwd(x->rows), dq(x->rows * 128), dk(x->kv), dv(x->kv);
    Buffer<char> workspace((int64_t)fsa_dense_backward_scratch_bytes(&x->c, &p, FSA_CAUSAL));
    const ConstRows q = packed_q(&x->c, x->q), k = packed_kv(&x->c, x->k), v = packed_kv(&x->c, x->v),
                    dout = packed_q(&x->c, x->dout);
    Times t;
    t.ms[0] = time_ms(
        [&] {
            FSA_CHECK(fsa_dense_forward(&x->c, &p, FSA_BF16, FSA_CAUSAL, q, k, v, packed_q(&x->c, x->o),
                                        x->lse, 0));
        },
        3);
    t.ms[1] = time_ms(
        [&] {
            FSA_CHECK(fsa_bwd_preprocess(&x->c, FSA_BF16, p.nq, packed_q(&x->c, x->o), x->lse, dout, delta,
                                         lse_bwd, 0));
            FSA_CHECK(fsa_dense_backward(&x->c, &p, FSA_BF16, FSA_CAUSAL, q, k, v, dout, lse_bwd, delta, dq,
                                         dk, dv, 0, 0, workspace.get(), 0));
        },
        3);
    double flops = 2.0 * p.n * p.n * x->c.q_heads * 128;
    for (int i = 0; i < 2; i++)
        record({"selected", "full", "full", i ? "bwd" : "fwd", "bf16", p.n, x->c, t.ms[i],
                (i ? 2.5 : 1) * flops / t.ms[i] * 1e-9, -1, NULL, "library", 1});
    return t;
}

// The comparison of FSA's paper, for 32 query heads: the selected branch in NSA's order (version 2), in FSA's
// order (version 3) and by the library, and full attention.
static void compare(Random *r) {
    const struct { int block, topk; } block_configs[] = {{64, 16}, {128, 8}};
    struct Row {
        int64_t n;
        int hkv, block, topk;
        Times nsa, fsa, library, full;
    };
    std::vector<Row> rows;
    for (int64_t n = 8192; n <= 65536; n *= 2) {
        for (int hkv : {32, 16, 8, 4}) {
            Times full = {};
            for (auto config : block_configs) {
                Bench<Bf16> x(r, n, 32, hkv, 128, config.block, config.topk, false);
                if (config.block == 64) full = time_full(&x);
                Times nsa = time_version(&x, 2), fsa = time_version(&x, 3);
                rows.push_back(
                    {n, hkv, config.block, config.topk, nsa, fsa, time_library(&x, "random"), full});
            }
        }
    }
    printf("\nSelected branch, 32 query heads, d = 128, bf16: milliseconds forward / backward, and NSA over "
           "the library\n");
    printf("%6s %3s %9s %17s %17s %17s %17s %14s\n", "n", "g", "(B, T)", "full", "NSA", "FSA", "library",
           "NSA/library");
    for (const Row &x : rows) {
        printf("%6lld %3d (%3d, %2d)", (long long)x.n, 32 / x.hkv, x.block, x.topk);
        for (const Times *t : {&x.full, &x.nsa, &x.fsa, &x.library})
            printf(" %8.2f / %6.2f", t->ms[0], t->ms[1]);
        printf(" %6.2f / %5.2f\n", x.nsa.ms[0] / x.library.ms[0], x.nsa.ms[1] / x.library.ms[1]);
    }
}

static void time_block_indices(Random *r, const char *path) {
    BlockIndicesHeader h;
    int64_t *lengths;
    int32_t *block_indices;
    block_indices_read(path, &h, &lengths, &block_indices);
    Bench<Bf16> x(r, default_config((int)h.q_heads, (int)h.kv_heads, 128, (int)h.block, (int)h.topk),
                  std::vector<int64_t>(lengths, lengths + h.num_seqs));
    if (x.b.batch.n != h.num_queries)
        die("%s: %lld queries, but sequences of %lld tokens", path, (long long)h.num_queries,
            (long long)x.b.batch.n);
    const int64_t size = block_indices_count(&h) / h.layers;
    for (int64_t layer = 0; layer < h.layers; layer++) {
        if (block_indices[layer * size] < 0) continue; // of full attention
        x.block_indices.set(
            std::vector<int32_t>(block_indices + layer * size, block_indices + (layer + 1) * size));
        time_library(&x, "trained");
    }
    x.block_indices.set(random_block_indices(r, x.c, x.b.ref));
    time_library(&x, "random");
    free(lengths), free(block_indices);
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    Random r(seed_from_args(argc, argv));
    for (int i = 1; i < argc; i++) {
        const bool is_indices = strncmp(argv[i], "indices=", 8) == 0;
        if (!is_indices && strncmp(argv[i], "choice=", 7) != 0) continue; // choice=FILE: the former name
        time_block_indices(&r, strchr(argv[i], '=') + 1);
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        long long n;
        int hq, hkv, block, topk;
        if (sscanf(argv[i], "shape=%lld,%d,%d,%d,%d", &n, &hq, &hkv, &block, &topk) != 5) continue;
        Bench<Bf16> x(&r, n, hq, hkv, 128, block, topk, false);
        time_library(&x, "random");
        return 0;
    }
    bool check_only = has_flag(argc, argv, "check"), compare_only = has_flag(argc, argv, "compare");
    // The records of timings contain the errors of a check in the same run.
    bool small = has_flag(argc, argv, "small") || has_flag(argc, argv, "time") || compare_only;
    check_all<Bf16>(&r, small);
    check_all<__half>(&r, small);
    if (!check_only && !compare_only) {
        struct {
            int64_t n;
            int hq, hkv, block, topk;
        } shapes[] = {{65536, 32, 8, 64, 16}, {65536, 32, 32, 64, 16}, {65536, 32, 16, 64, 16},
                      {65536, 40, 8, 64, 16}, {65536, 32, 4, 64, 16},  {65536, 64, 4, 64, 16},
                      {32768, 32, 8, 64, 16}, {8192, 32, 8, 64, 16},   {65536, 32, 8, 128, 8},
                      {65536, 32, 32, 128, 8}};
        for (auto s : shapes) {
            Bench<Bf16> x(&r, s.n, s.hq, s.hkv, 128, s.block, s.topk, false);
            time_library(&x, "random");
            if (s.n == 8192) time_version(&x, 1);
        }
        Bench<Bf16> clustered(&r, 65536, 32, 8, 128, 64, 16, true), d64(&r, 65536, 32, 8, 64, 64, 16, false);
        time_library(&clustered, "clustered");
        time_library(&d64, "random");
        Bench<__half> half(&r, 65536, 32, 8, 128, 64, 16, false);
        time_library(&half, "random");
    }
    if (!check_only && !has_flag(argc, argv, "time")) compare(&r);
    printf("selected: %d passed, %d failed\n", checks_passed, checks_failed);
    return checks_failed != 0;
}
