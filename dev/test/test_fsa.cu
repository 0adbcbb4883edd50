// test_fsa.cu: tests libfsa against the C reference: all steps together over random shapes, single branches,
// and samples of long sequences. It also tests that results are bitwise reproducible, on two streams and from
// two threads at once; guard zones; that sizes never shrink when a batch grows; and every error of every
// function.
//   test_fsa [small | large] [shapes=N] [seed=N]     small: for the emulator and compute-sanitizer
//                                                    large: also 300,000 and 1,000,000 tokens
#include "../cuda/common.h"
#include "test.h"
#include <functional>
#include <thread>

// Relative error of one array or of several arrays together. The norm is at least 1e-2 per element, because
// gradients may vanish (a query with one visible key). norm_of_terms: the norm of the terms whose sums are
// ref, used if it is larger than the norm of ref.
struct Tally {
    double diff = 0, norm = 0, terms = 0, size = 0;
    void add(const std::vector<float> &x, const std::vector<float> &ref, double norm_of_terms = 0) {
        for (size_t i = 0; i < ref.size(); i++) {
            diff += isfinite(x[i]) ? ((double)x[i] - ref[i]) * ((double)x[i] - ref[i]) : INFINITY;
            norm += (double)ref[i] * ref[i];
        }
        terms += norm_of_terms * norm_of_terms, size += (double)ref.size();
    }
    double error() const { return sqrt(diff) / (sqrt(std::max(norm, terms)) + 1e-2 * sqrt(size) + 1e-30); }
};
static double error_of(const std::vector<float> &x, const std::vector<float> &ref) {
    Tally tally;
    tally.add(x, ref);
    return tally.error();
}

template <typename T> struct Problem {
    FsaConfig c;
    Batch batch;
    FsaDeviceBatch b;
    int64_t nq, n, size_q, size_k, size_w, gates;
    bool linear, rope;
    Host<T> q, k, v, dout, gate, wk, wv, pe;
    RowBuffer<T> q_, k_, v_, dout_, gate_, o, dq, dk, dv, dgate;
    Buffer<T> wk_, wv_, pe_;
    Buffer<float> dwk, dwv, dpe;
    std::vector<double> inv_freq;
    Buffer<double> inv_freq_;
    Buffer<char> saved, forward_workspace, backward_workspace;

    static FsaDeviceBatch device_batch(const Batch &x) {
        return FsaDeviceBatch{x.batch.nq,           x.batch.n,          x.batch.num_seqs,
                              x.batch.num_segments, x.batch.cu_seqlens, x.batch.segments};
    }
    // strides: draws the row strides of the 16-bit arrays; NULL: they are packed.
    Problem(Random *r, const FsaConfig &config, const std::vector<int64_t> &lengths,
            const std::vector<FsaSegment> &segments, bool with_rope, Random *strides = NULL)
        : c(config), batch(c, lengths, segments), b(device_batch(batch)), nq(b.num_queries), n(b.num_keys),
          size_q(nq * c.q_heads * c.head_dim), size_k(n * c.kv_heads * c.head_dim),
          size_w((int64_t)c.kv_heads * c.cmp_len * c.head_dim * c.head_dim),
          gates(nq * (c.gate_per_token ? 1 : c.q_heads) * 3), linear(c.phi == FSA_PHI_LINEAR),
          rope(with_rope), q(r, size_q, 1), k(r, size_k, 1), v(r, size_k, 1), dout(r, size_q, 1),
          gate(r, gates, 1), wk(r, size_w, 1 / sqrtf((float)c.cmp_len * c.head_dim)),
          wv(r, size_w, 1 / sqrtf((float)c.cmp_len * c.head_dim)), pe(r, size_w / c.head_dim, 0.3f),
          q_(nq, q_row(), strides, q.raw), k_(n, kv_row(), strides, k.raw), v_(n, kv_row(), strides, v.raw),
          dout_(nq, q_row(), strides, dout.raw), gate_(nq, gate_row(), strides, gate.raw),
          o(nq, q_row(), strides), dq(nq, q_row(), strides), dk(n, kv_row(), strides),
          dv(n, kv_row(), strides), dgate(nq, gate_row(), strides), wk_(wk.raw), wv_(wv.raw), pe_(pe.raw),
          dwk(size_w), dwv(size_w), dpe(size_w / c.head_dim), inv_freq(rope_frequencies(c.head_dim)),
          inv_freq_(inv_freq), saved((int64_t)fsa_saved_size(&c, Dtype<T>::value, &b)),
          forward_workspace((int64_t)fsa_workspace_size(&c, Dtype<T>::value, &b, FSA_FORWARD)),
          backward_workspace((int64_t)fsa_workspace_size(&c, Dtype<T>::value, &b, FSA_BACKWARD)) {
        dwk.zero(), dwv.zero(), dpe.zero();
    }
    int64_t q_row() const { return (int64_t)c.q_heads * c.head_dim; }
    int64_t kv_row() const { return (int64_t)c.kv_heads * c.head_dim; }
    int64_t gate_row() const { return c.gate_per_token ? 3 : 3 * c.q_heads; }
    FsaForward forward_args() const {
        FsaForward a = {sizeof a, q_, k_, v_, gate_};
        a.q_stride = q_.stride_arg(), a.k_stride = k_.stride_arg(), a.v_stride = v_.stride_arg();
        a.gate_stride = gate_.stride_arg(), a.o = o, a.o_stride = o.stride_arg(), a.saved = saved;
        if (linear) a.phi = {wk_, pe_, wv_};
        a.inv_freq = rope ? inv_freq_.get() : NULL;
        a.workspace = forward_workspace, a.workspace_bytes = (size_t)forward_workspace.n;
        return a;
    }
    FsaBackward backward_args() const {
        FsaBackward a = {sizeof a, k_, v_, gate_, dout_};
        a.k_stride = k_.stride_arg(), a.v_stride = v_.stride_arg(), a.gate_stride = gate_.stride_arg();
        a.dout_stride = dout_.stride_arg(), a.saved = saved;
        if (linear) a.phi = {wk_, pe_, wv_}, a.dphi = {dwk, dpe, dwv};
        a.inv_freq = rope ? inv_freq_.get() : NULL;
        a.dq = dq, a.dk = dk, a.dv = dv, a.dgate_logits = dgate;
        a.dq_stride = dq.stride_arg(), a.dk_stride = dk.stride_arg(), a.dv_stride = dv.stride_arg();
        a.dgate_stride = dgate.stride_arg();
        a.workspace = backward_workspace, a.workspace_bytes = (size_t)backward_workspace.n;
        return a;
    }
    int forward(cudaStream_t stream) {
        const FsaForward a = forward_args();
        return fsa_forward(&c, Dtype<T>::value, &b, &a, stream);
    }
    int backward(cudaStream_t stream) {
        const FsaBackward a = backward_args();
        return fsa_backward(&c, Dtype<T>::value, &b, &a, stream);
    }
    std::vector<int32_t> block_indices() const {
        std::vector<int32_t> x((size_t)(c.kv_heads * nq * c.topk));
        CUDA_CHECK(cudaMemcpy(x.data(), fsa_saved_block_indices(&c, Dtype<T>::value, &b, saved.get()),
                              x.size() * 4, cudaMemcpyDeviceToHost));
        return x;
    }
    bool guards_intact() const {
        return o.guards_intact() && dq.guards_intact() && dk.guards_intact() && dv.guards_intact() &&
               dgate.guards_intact() && dwk.guards_intact() && dwv.guards_intact() && dpe.guards_intact() &&
               saved.guards_intact() && forward_workspace.guards_intact() &&
               backward_workspace.guards_intact();
    }
    // Returns all results, one after another, to compare their bits.
    std::vector<char> bits() const {
        std::vector<char> all;
        auto add = [&](const auto &x) {
            all.insert(all.end(), (const char *)x.data(), (const char *)(x.data() + x.size()));
        };
        add(o.host()), add(dq.host()), add(dk.host()), add(dv.host()), add(dgate.host());
        if (linear) add(dwk.host()), add(dwv.host()), add(dpe.host());
        return all;
    }
};

// Returns whether every row has min(T, blocks) blocks that ascend and are causal, among them the initial and
// local blocks.
static bool block_indices_valid(const FsaConfig &c, const Batch &b, const std::vector<int32_t> &all) {
    for (int h = 0; h < c.kv_heads; h++) {
        int64_t row = 0;
        for (const FsaSegment &s : b.segments) {
            for (int64_t i = 0; i < s.len; i++, row++) {
                const int32_t *x = &all[(size_t)((h * b.batch.nq + row) * c.topk)];
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

static double max_error[2][2]; // [type][0: output, 1: gradients]

template <typename T> static void round_to_type(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = to_float<T>(from_float<T>(x[i]));
}

// fsa_ref_forward with the library's block indices and its 16-bit rounding between the steps: the rotated q
// and k, kc, vc, and the branches' outputs. The remaining errors are those of the kernels, so the kernels'
// tolerances hold for all steps together, forward and backward.
template <typename T>
static void rounded_forward(const Problem<T> &p, const fsa_ref_PhiWeights_f32 *phi, const double *inv_freq,
                            const std::vector<int32_t> &block_indices, fsa_ref_State_f32 *s, float *o) {
    const FsaConfig *c = &p.c;
    const FsaBatch *b = &p.batch.ref;
    int64_t size_c = fsa_batch_windows(c, b) * c->kv_heads * c->head_dim;
    std::copy(p.q.f.begin(), p.q.f.end(), s->q);
    std::copy(p.k.f.begin(), p.k.f.end(), s->k);
    std::copy(block_indices.begin(), block_indices.end(), s->block_indices);
    fsa_ref_rope_queries_f32(c, b, s->q, inv_freq, 0);
    fsa_ref_rope_keys_f32(c, b, s->k, inv_freq, 0);
    fsa_ref_compress_forward_f32(c, b, p.k.f.data(), p.v.f.data(), phi, inv_freq, s->kc, s->vc);
    round_to_type<T>(s->q, p.size_q), round_to_type<T>(s->k, p.size_k);
    round_to_type<T>(s->kc, size_c), round_to_type<T>(s->vc, size_c);
    const FsaVisibility rules[3] = {FSA_COMPRESSED, FSA_SELECTED, FSA_WINDOW};
    for (int i = 0; i < 3; i++) {
        fsa_ref_attention_forward_f32(c, b, rules[i], s->q, i == 0 ? s->kc : s->k,
                                      i == 0 ? s->vc : p.v.f.data(), s->block_indices, s->o[i], s->lse[i]);
        round_to_type<T>(s->o[i], p.size_q);
    }
    fsa_ref_gate_forward_f32(c, p.nq, p.gate.f.data(), s->o, o);
}

// The norms of the terms whose sums are dwk and dpe. Both come from dS = P (dP - delta), whose two parts
// cancel to any fraction if a query sees few windows. So each part goes through the backward pass alone: with
// o = 0 delta is 0, with vc = 0 dP is 0. dpe also sums W_k dk~ over the windows. Without RoPE that sum is 0,
// because pe shifts all compressed keys alike and softmax ignores the shift. Overwrites the gradients in *s.
struct PhiTerms {
    double dwk, dpe;
};

template <typename T>
static PhiTerms phi_terms(const Problem<T> &p, const fsa_ref_PhiWeights_f32 *phi, const double *inv_freq,
                          fsa_ref_State_f32 *s) {
    const FsaConfig *c = &p.c;
    const FsaBatch *b = &p.batch.ref;
    int64_t d = c->head_dim, rows = c->cmp_len * d, keys = fsa_batch_windows(c, b) * c->kv_heads;
    std::vector<float> none(std::max(p.size_q, keys * d), 0), dq(p.size_q), dk(p.size_k), dv(p.size_k);
    std::vector<float> dgate(p.gates), dwv(p.size_w), dpe(p.size_w / d);
    double dwk_terms = 0, dpe_terms = 0;
    fsa_ref_gate_backward_f32(c, p.nq, 0, p.gate.f.data(), s->o[0], p.dout.f.data(), s->gated_dout,
                              dgate.data());
    for (bool delta : {false, true}) {
        std::fill(s->dkc, s->dkc + keys * d, 0.f);
        fsa_ref_attention_backward_f32(c, b, FSA_COMPRESSED, s->q, s->kc, delta ? none.data() : s->vc, NULL,
                                       delta ? s->o[0] : none.data(), s->lse[0], s->gated_dout, dq.data(),
                                       s->dkc, s->dvc);
        std::vector<float> dwk(p.size_w, 0);
        fsa_ref_PhiGradients_f32 dphi = {dwk.data(), dpe.data(), dwv.data()};
        fsa_ref_compress_backward_f32(c, b, p.k.f.data(), p.v.f.data(), phi, inv_freq, s->dkc, s->dvc,
                                      dk.data(), dv.data(), &dphi);
        for (float x : dwk) dwk_terms += (double)x * x;
        for (int64_t i = 0; i < keys; i++) {
            const float *w = phi->wk + i % c->kv_heads * rows * d;
            for (int64_t row = 0; row < rows; row++) {
                float term = 0;
                for (int64_t x = 0; x < d; x++) term += w[row * d + x] * s->dkc[i * d + x];
                dpe_terms += (double)term * term;
            }
        }
    }
    return PhiTerms{sqrt(dwk_terms), sqrt(dpe_terms)};
}

// Returns the norm of the terms whose sums are dgate: sigmoid'(logit) dout o over the d channels of a branch,
// and with gate_per_token over all heads. Few sums of few tokens can by chance be a third of what their terms
// suggest.
template <typename T> static double dgate_terms(const Problem<T> &p, float *const o[3]) {
    double norm = 0;
    const FsaConfig &c = p.c;
    for (int64_t row = 0; row < p.nq * c.q_heads; row++) {
        int64_t gate = (c.gate_per_token ? row / c.q_heads : row) * 3;
        for (int branch = 0; branch < 3; branch++) {
            double sigmoid = 1 / (1 + exp(-p.gate.f[gate + branch])), slope = sigmoid * (1 - sigmoid);
            for (int64_t x = row * c.head_dim; x < (row + 1) * c.head_dim; x++) {
                double term = slope * p.dout.f[x] * o[branch][x];
                norm += term * term;
            }
        }
    }
    return sqrt(norm);
}

// Tests one draw of inputs, and adds the errors to the tallies.
enum { O, DQ, DK, DV, DGATE, DWK, DWV, DPE, TALLIES };
template <typename T>
static void test_draw(Random *r, const FsaConfig &c, const std::vector<int64_t> &lengths,
                      const std::vector<FsaSegment> &segments, bool rope, const char *shape, Tally *tallies) {
    Problem<T> p(r, c, lengths, segments, rope, r->below(2) ? r : NULL);
    int status = p.forward(0);
    if (!status) status = p.backward(0);
    cudaError_t e = cudaDeviceSynchronize();
    CHECK(status == 0 && e == cudaSuccess, "%s: status %d, %s, %s", shape, status, fsa_last_error(),
          cudaGetErrorString(e));
    if (status || e != cudaSuccess) exit(1);
    std::vector<int32_t> block_indices = p.block_indices();
    bool valid = block_indices_valid(c, p.batch, block_indices);
    CHECK(valid, "%s: block indices break their rules", shape);
    if (!valid) return;

    fsa_ref_State_f32 state;
    std::vector<char> memory(fsa_ref_state_layout_f32(&state, &c, p.nq, p.n, (int64_t)lengths.size(), NULL) +
                             64);
    char *aligned = memory.data() + (64 - (uintptr_t)memory.data() % 64);
    fsa_ref_state_layout_f32(&state, &c, p.nq, p.n, (int64_t)lengths.size(), aligned);
    fsa_ref_PhiWeights_f32 phi = {NULL, NULL, NULL};
    if (p.linear) phi = {p.wk.f.data(), p.pe.f.data(), p.wv.f.data()};
    std::vector<float> dwk(p.size_w, 0), dwv(p.size_w, 0), dpe(p.size_w / c.head_dim, 0);
    fsa_ref_PhiGradients_f32 dphi = {NULL, NULL, NULL};
    if (p.linear) dphi = {dwk.data(), dpe.data(), dwv.data()};
    std::vector<float> o(p.size_q), dq(p.size_q), dk(p.size_k), dv(p.size_k), dgate(p.gates, 0);
    const double *inv_freq = rope ? p.inv_freq.data() : NULL;
    rounded_forward(p, &phi, inv_freq, block_indices, &state, o.data());
    fsa_ref_backward_f32(&c, &p.batch.ref, p.k.f.data(), p.v.f.data(), &phi, inv_freq, p.gate.f.data(),
                         &state, p.dout.f.data(), dq.data(), dk.data(), dv.data(), &dphi, dgate.data());
    tallies[O].add(p.o.floats(), o);
    tallies[DQ].add(p.dq.floats(), dq);
    tallies[DK].add(p.dk.floats(), dk);
    tallies[DV].add(p.dv.floats(), dv);
    tallies[DGATE].add(p.dgate.floats(), dgate, dgate_terms(p, state.o));
    if (p.linear) {
        PhiTerms terms = phi_terms(p, &phi, inv_freq, &state);
        tallies[DWK].add(p.dwk.host(), dwk, terms.dwk);
        tallies[DWV].add(p.dwv.host(), dwv);
        tallies[DPE].add(p.dpe.host(), dpe, terms.dpe);
    }
    CHECK(p.guards_intact(), "%s: a guard zone was written", shape);

    // Again, with poisoned workspaces: the same bits.
    std::vector<char> first = p.bits();
    p.forward_workspace.poison(), p.backward_workspace.poison(), p.saved.poison(), p.o.poison(),
        p.dq.poison();
    p.dk.poison(), p.dv.poison(), p.dwk.zero(), p.dwv.zero(), p.dpe.zero();
    p.forward(0), p.backward(0);
    CUDA_CHECK(cudaDeviceSynchronize());
    CHECK(p.bits() == first, "%s: bits differ between two runs", shape);
}

template <typename T>
static void test_shape(Random *r, const FsaConfig &c, const std::vector<int64_t> &lengths,
                       const std::vector<FsaSegment> &segments, bool rope) {
    int64_t n = 0, nq = 0;
    for (int64_t length : lengths) n += length;
    for (const FsaSegment &s : segments) nq += s.len;
    if (segments.empty()) nq = n;
    char shape[200];
    snprintf(shape, sizeof shape,
             "%s nq %lld n %lld seqs %zu heads %d/%d d %d l %d s %d block %d topk %d init %d local %d W %d "
             "phi %d per_token %d recompute %d rope %d",
             Dtype<T>::name, (long long)nq, (long long)n, lengths.size(), c.q_heads, c.kv_heads, c.head_dim,
             c.cmp_len, c.cmp_stride, c.block, c.topk, c.init_blocks, c.local_blocks, c.window, (int)c.phi,
             c.gate_per_token, c.recompute, rope);
    // The limits are for norms of many numbers, so several draws of few tokens count together.
    Tally tallies[TALLIES];
    for (int draw = 0; draw < (std::min(n, nq) < 32 ? 8 : 1); draw++)
        test_draw<T>(r, c, lengths, segments, rope, shape, tallies);
    // The gradients of phi's weights come from two kernels in turn. Their errors are independent, so the
    // squares add up.
    static const char *const names[TALLIES] = {"o", "dq", "dk", "dv", "dgate", "dwk", "dwv", "dpe"};
    for (int i = 0; i < TALLIES; i++) {
        const double limit =
            i == O ? Dtype<T>::out_tolerance : (i >= DWK ? sqrt(2) : 1) * Dtype<T>::grad_tolerance;
        const double error = tallies[i].error();
        CHECK(error <= limit, "%s: %s %.2e, must be at most %.2e", shape, names[i], error, limit);
        double &max = max_error[Dtype<T>::value][i > O];
        max = std::max(max, error);
    }
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
    c.init_blocks = (int)r->below(4);
    c.local_blocks = (int)r->below(5);
    c.topk = std::max(1, c.init_blocks + c.local_blocks) + (int)r->below(8);
    c.window = 1 + (int)r->below(300);
    c.phi = r->below(2) ? FSA_PHI_LINEAR : FSA_PHI_MEAN;
    c.gate_per_token = (int)r->below(2);
    c.recompute = (int)r->below(2);
    if (r->below(4) == 0) c.scale = 0.05f + 0.1f * (float)r->uniform();
    return c;
}

static void test_random_shapes(Random *r, int shapes, bool small) {
    for (int i = 0; i < shapes; i++) {
        FsaConfig c = random_config(r);
        std::vector<int64_t> lengths;
        for (int64_t s = 1 + r->below(3); s > 0; s--)
            lengths.push_back(r->below(8) ? 1 + r->below(r->below(3) && !small ? 400 : 40) : 0);
        std::vector<FsaSegment> segments;
        if (r->below(4) == 0) { // a part of each sequence, which may be empty
            for (size_t s = 0; s < lengths.size(); s++) {
                int64_t pos = r->below(lengths[s] + 1);
                segments.push_back(FsaSegment{(int64_t)s, pos, r->below(lengths[s] - pos + 1)});
            }
        }
        bool rope = r->below(2);
        if (r->below(2))
            test_shape<__nv_bfloat16>(r, c, lengths, segments, rope);
        else
            test_shape<__half>(r, c, lengths, segments, rope);
    }
}

static void test_edge_shapes(Random *r, bool small) {
    typedef __nv_bfloat16 T;
    for (int64_t n : {1, 31, 32, 63, 65, 507}) {
        if (small && n != 32 && n != 65) continue;
        FsaConfig c = default_config(small ? 3 : 8, small ? 1 : 2, 128, 64, 16);
        if (small) c.cmp_len = 16;
        test_shape<T>(r, c, {n}, {}, n % 2);
    }
    // Empty sequences and segments at the beginning, in the middle, at the end; no query at all; no token.
    FsaConfig c = default_config(4, 2, 64, 16, 4);
    c.cmp_len = 16;
    test_shape<__half>(r, c, {0, 0, 50, 0, 1, 33, 0}, {}, true);
    test_shape<T>(r, c, {60, 0, 40}, {{0, 0, 0}, {0, 9, 20}, {0, 40, 0}, {1, 0, 0}, {2, 30, 10}, {2, 40, 0}},
                  true);
    test_shape<T>(r, c, {40}, {{0, 5, 0}}, true);
    test_shape<T>(r, c, {0, 0}, {}, true);
    // A window that exceeds the local blocks but not the sequence, and one as long as the local blocks.
    c = default_config(3, 1, 64, 64, 4);
    c.local_blocks = 1, c.window = 100;
    test_shape<T>(r, c, {230}, {}, true);
    c.window = 64;
    test_shape<__half>(r, c, {200, 33}, {{0, 75, 100}, {1, 0, 33}}, true);
    if (small) return;
    test_shape<__half>(r, default_config(8, 2, 128, 64, 16), {2049}, {}, true);
    test_shape<T>(r, default_config(16, 1, 64, 64, 16), {1, 3000, 1, 31}, {}, true);
}

// recompute: saved memory shrinks by the branches' outputs, and every bit is the same.
static void test_recompute(Random *r, bool small) {
    typedef __nv_bfloat16 T;
    FsaConfig c = default_config(small ? 3 : 12, small ? 1 : 4, 64, small ? 16 : 64, small ? 4 : 8);
    c.cmp_len = 16;
    const uint64_t seed = r->u64();
    std::vector<char> bits[2];
    int64_t saved_bytes[2];
    for (int recompute = 0; recompute < 2; recompute++) {
        c.recompute = recompute;
        Random same(seed);
        Problem<T> p(&same, c, {small ? 90 : 1500, 0, 31}, {}, true);
        p.dwk.zero(), p.dwv.zero(), p.dpe.zero();
        int status = p.forward(0);
        if (!status) status = p.backward(0);
        CHECK(status == 0 && cudaDeviceSynchronize() == cudaSuccess, "status %d: %s", status,
              fsa_last_error());
        bits[recompute] = p.bits(), saved_bytes[recompute] = p.saved.n;
        if (recompute)
            CHECK(saved_bytes[0] - saved_bytes[1] >= 3 * p.size_q * 2 &&
                      saved_bytes[0] - saved_bytes[1] < 3 * p.size_q * 2 + 3 * 256,
                  "saved %lld bytes, with recompute %lld", (long long)saved_bytes[0],
                  (long long)saved_bytes[1]);
    }
    CHECK(bits[0] == bits[1], "bits differ with recompute");
}

// NaN and Inf in one sequence: the other sequences' results keep their bits, and the block indices of all
// queries obey their rules.
template <typename T> static void test_nonfinite_sequence(Random *r, bool small) {
    FsaConfig c = default_config(small ? 3 : 12, small ? 1 : 4, small ? 64 : 128, small ? 16 : 64, 4);
    c.cmp_len = 16, c.window = 20;
    const int64_t one = small ? 90 : 421, begin = small ? 41 : 541, end = begin + one;
    Problem<T> p(r, c, {begin, one, small ? 30 : 330}, {}, true);
    // Returns the rows of the first and the last sequence of all results.
    auto other_sequences = [&] {
        std::vector<T> all;
        for (const RowBuffer<T> *results : {&p.o, &p.dq, &p.dk, &p.dv, &p.dgate}) {
            const std::vector<T> x = results->host();
            all.insert(all.end(), x.begin(), x.begin() + begin * results->row_size);
            all.insert(all.end(), x.begin() + end * results->row_size, x.end());
        }
        return all;
    };
    auto inject_nonfinite = [&](const Host<T> &x, RowBuffer<T> &to) {
        std::vector<T> y(x.raw);
        int64_t row = (int64_t)y.size() / p.n;
        for (int64_t i = begin * row; i < end * row; i++)
            if (r->below(3) == 0)
                y[(size_t)i] = (T)(float)(r->below(2) ? NAN : r->below(2) ? INFINITY : -INFINITY);
        to.set(y);
    };
    std::vector<T> clean;
    for (int round = 0; round < 2; round++) {
        if (round) {
            inject_nonfinite(p.q, p.q_), inject_nonfinite(p.k, p.k_), inject_nonfinite(p.v, p.v_),
                inject_nonfinite(p.dout, p.dout_);
            inject_nonfinite(p.gate, p.gate_);
        }
        p.dwk.zero(), p.dwv.zero(), p.dpe.zero();
        int status = p.forward(0);
        if (!status) status = p.backward(0);
        CHECK(status == 0 && cudaDeviceSynchronize() == cudaSuccess, "status %d: %s", status,
              fsa_last_error());
        CHECK(p.guards_intact(), "round %d: a guard zone was written", round);
        CHECK(block_indices_valid(c, p.batch, p.block_indices()), "round %d: block indices break their rules",
              round);
        if (round == 0) clean = other_sequences();
    }
    std::vector<T> now = other_sequences();
    CHECK(memcmp(now.data(), clean.data(), now.size() * sizeof(T)) == 0,
          "bits differ in the other sequences");
}

// Views of larger matrices give the bits that packed arrays give.
template <typename T> static void test_strides(Random *r, bool small) {
    FsaConfig c = default_config(small ? 6 : 12, 2, small ? 64 : 128, small ? 16 : 64, 4);
    c.cmp_len = 16, c.gate_per_token = (int)r->below(2), c.recompute = (int)r->below(2);
    const std::vector<int64_t> lengths = {small ? 90 : 900, 40};
    Problem<T> packed(r, c, lengths, {}, true), views(r, c, lengths, {}, true, r);
    views.q_.set(packed.q.raw), views.k_.set(packed.k.raw), views.v_.set(packed.v.raw);
    views.dout_.set(packed.dout.raw), views.gate_.set(packed.gate.raw);
    views.wk_.set(packed.wk.raw), views.wv_.set(packed.wv.raw), views.pe_.set(packed.pe.raw);
    for (Problem<T> *p : {&packed, &views})
        CHECK(p->forward(0) == 0 && p->backward(0) == 0, "%s", fsa_last_error());
    CUDA_CHECK(cudaDeviceSynchronize());
    CHECK(packed.bits() == views.bits(), "%s: the bits of strided arrays differ", Dtype<T>::name);
    CHECK(views.guards_intact(), "%s: a guard zone was written", Dtype<T>::name);
    FsaForward over_q = views.forward_args(); // o overwrites q
    over_q.o = views.q_, over_q.o_stride = views.q_.stride_arg();
    CHECK(fsa_forward(&c, Dtype<T>::value, &views.b, &over_q, 0) == 0, "%s", fsa_last_error());
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<T> o = packed.o.host(), in_q = views.q_.host();
    CHECK(memcmp(o.data(), in_q.data(), o.size() * sizeof(T)) == 0, "%s: o over q", Dtype<T>::name);
}

// The largest topk that an error names is one that block selection takes, and the next one is an error. With
// given blocks there is no limit but FSA_MAX_TOPK.
template <typename T> static void test_max_topk(Random *r) {
    FsaConfig c = default_config(16, 1, 128, 64, 200);
    int limit = 0;
    {
        Problem<T> p(r, c, {20}, {}, false);
        CHECK(p.forward(0) == FSA_ERROR_CONFIG, "topk 200: no error");
        const char *words = strstr(fsa_last_error(), "fsa_forward: topk 200: block selection takes ");
        CHECK(words && sscanf(strstr(words, "at most"), "at most %d with init_blocks 1, ", &limit) == 1 &&
                  limit == 1 + 2 + 99, // fsa.h has this number
              "%s", fsa_last_error());
        std::vector<int32_t> blocks(p.nq * c.topk, -1);
        for (int64_t i = 0; i < p.nq; i++) blocks[i * c.topk] = 0;
        Buffer<int32_t> given(blocks);
        FsaForward a = p.forward_args();
        a.block_indices = given;
        CHECK(fsa_forward(&c, Dtype<T>::value, &p.b, &a, 0) == 0, "%s", fsa_last_error());
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    for (int over = 0; over < 2; over++) {
        c.topk = limit + over;
        Problem<T> p(r, c, {20}, {}, false);
        CHECK(p.forward(0) == (over ? FSA_ERROR_CONFIG : FSA_OK), "topk %d: %s", c.topk, fsa_last_error());
        CUDA_CHECK(cudaDeviceSynchronize());
    }
}

// Under the compressed rule a batch with fewer tokens than a stride has no key: o and dq are 0, lse is -inf,
// the first blocks are selected, and k, v, dk and dv may be NULL.
template <typename T> static void test_no_windows(Random *r) {
    Problem<T> p(r, default_config(4, 2, 64, 64, 4), {11}, {}, false);
    const FsaConfig &c = p.c;
    const FsaDtype t = Dtype<T>::value;
    Buffer<float> lse(p.nq * c.q_heads);
    Buffer<T> o(p.size_q), dq(p.size_q);
    Buffer<int32_t> blocks(c.kv_heads * p.nq * c.topk);
    FsaAttentionForward f = {sizeof f, FSA_COMPRESSED, p.q_};
    f.q_stride = p.q_.stride_arg(), f.o = o, f.lse = lse;
    FsaAttentionBackward g = {sizeof g, FSA_COMPRESSED, p.q_, NULL, NULL, o, p.dout_};
    g.q_stride = p.q_.stride_arg(), g.dout_stride = p.dout_.stride_arg(), g.lse = lse, g.dq = dq;
    FsaSelectBlocks s = {sizeof s, p.q_, NULL};
    s.q_stride = p.q_.stride_arg(), s.lse_c = lse, s.block_indices = blocks;
    size_t bytes = 0;
    for (FsaOperation op : {FSA_ATTENTION_FORWARD, FSA_ATTENTION_BACKWARD, FSA_SELECT_BLOCKS})
        bytes = std::max(bytes, fsa_workspace_size(&c, t, &p.b, op));
    Buffer<char> work((int64_t)bytes);
    f.workspace = g.workspace = s.workspace = work;
    f.workspace_bytes = g.workspace_bytes = s.workspace_bytes = bytes;
    o.poison(), dq.poison(), lse.poison();
    CHECK(fsa_attention_forward(&c, t, &p.b, &f, 0) == 0, "%s", fsa_last_error());
    CHECK(fsa_attention_backward(&c, t, &p.b, &g, 0) == 0, "%s", fsa_last_error());
    CHECK(fsa_select_blocks(&c, t, &p.b, &s, 0) == 0, "%s", fsa_last_error());
    CUDA_CHECK(cudaDeviceSynchronize());
    bool zero = true, infinite = true, first = true;
    for (const Buffer<T> *x : {&o, &dq})
        for (T y : x->host()) zero = zero && to_float<T>(y) == 0;
    for (float x : lse.host()) infinite = infinite && std::isinf(x) && x < 0;
    const std::vector<int32_t> all = blocks.host();
    for (size_t i = 0; i < all.size(); i++) first = first && all[i] == (i % (size_t)c.topk ? -1 : 0);
    CHECK(zero && infinite && first, "%s: o and dq are 0: %d, lse is -inf: %d, first blocks: %d",
          Dtype<T>::name, zero, infinite, first);
}

// Two problems on two streams at once, and from two threads, give the bits that each gives alone.
static void test_two_streams(Random *r, bool small) {
    typedef __nv_bfloat16 T;
    // Block selection needs more than 48 KiB of shared memory for both, and not the same.
    FsaConfig c = default_config(small ? 4 : 16, small ? 1 : 2, 128, small ? 16 : 64, small ? 4 : 8),
              other = c;
    c.cmp_len = other.cmp_len = 16, other.topk += 5;
    Problem<T> a(r, c, {small ? 90 : 1500}, {}, true),
        b(r, other, {small ? 40 : 900, small ? 20 : 300}, {}, false);
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
    // From two host threads, each with its own stream and workspaces. Each thread has its own last error.
    std::thread threads[2];
    for (int i = 0; i < 2; i++) {
        threads[i] = std::thread([&, i] {
            Problem<T> &p = i ? b : a;
            for (int round = 0; round < 3; round++) {
                p.dwk.zero(), p.dwv.zero(), p.dpe.zero();
                CUDA_CHECK(cudaStreamSynchronize(0));
                p.forward(s[i]);
                p.backward(s[i]);
                CUDA_CHECK(cudaStreamSynchronize(s[i]));
            }
            if (i) fsa_workspace_size(NULL, FSA_BF16, &p.b, FSA_FORWARD);
        });
    }
    fsa_workspace_size(&c, FSA_BF16, NULL, FSA_FORWARD);
    for (std::thread &t : threads) t.join();
    CHECK(a.bits() == alone[0] && b.bits() == alone[1], "bits differ from two threads");
    CHECK(strstr(fsa_last_error(), "batch"), "fsa_last_error returns another thread's error: %s",
          fsa_last_error());
    for (cudaStream_t &x : s) CUDA_CHECK(cudaStreamDestroy(x));
}

// Tests one branch against the reference. rope: the library rotates q and k.
template <typename T>
static void test_branch(Problem<T> &p, FsaVisibility rule, bool rope, std::vector<int32_t> &block_indices,
                        const Buffer<int32_t> &block_indices_) {
    const FsaConfig &c = p.c;
    const FsaDtype t = Dtype<T>::value;
    const int64_t rows = p.nq * c.q_heads;
    const bool selected = rule == FSA_SELECTED;
    const size_t bytes =
        std::max(fsa_workspace_size(&c, t, &p.b, selected ? FSA_SELECTED_FORWARD : FSA_ATTENTION_FORWARD),
                 fsa_workspace_size(&c, t, &p.b, selected ? FSA_SELECTED_BACKWARD : FSA_ATTENTION_BACKWARD));
    Buffer<char> workspace((int64_t)bytes);
    Buffer<float> lse(rows);
    p.o.poison(), p.dq.poison(), p.dk.poison(), p.dv.poison();
    int status;
    if (selected) {
        FsaSelectedForward f = {sizeof f, p.q_, p.k_, p.v_};
        f.q_stride = p.q_.stride_arg(), f.k_stride = p.k_.stride_arg(), f.v_stride = p.v_.stride_arg();
        f.block_indices = block_indices_, f.o = p.o, f.lse = lse, f.o_stride = p.o.stride_arg();
        f.workspace = workspace, f.workspace_bytes = bytes;
        FsaSelectedBackward g = {sizeof g, p.q_, p.k_, p.v_, p.o, p.dout_};
        g.q_stride = f.q_stride, g.k_stride = f.k_stride, g.v_stride = f.v_stride, g.o_stride = f.o_stride;
        g.dout_stride = p.dout_.stride_arg(), g.block_indices = block_indices_, g.lse = lse;
        g.dq = p.dq, g.dk = p.dk, g.dv = p.dv, g.dq_stride = p.dq.stride_arg();
        g.dk_stride = p.dk.stride_arg(), g.dv_stride = p.dv.stride_arg();
        g.workspace = workspace, g.workspace_bytes = bytes;
        status = fsa_selected_forward(&c, t, &p.b, &f, 0);
        if (!status) status = fsa_selected_backward(&c, t, &p.b, &g, 0);
    } else {
        FsaAttentionForward f = {sizeof f, rule, p.q_, p.k_, p.v_};
        f.q_stride = p.q_.stride_arg(), f.k_stride = p.k_.stride_arg(), f.v_stride = p.v_.stride_arg();
        f.inv_freq = rope ? p.inv_freq_.get() : NULL;
        f.o = p.o, f.lse = lse, f.o_stride = p.o.stride_arg();
        f.workspace = workspace, f.workspace_bytes = bytes;
        FsaAttentionBackward g = {sizeof g, rule, p.q_, p.k_, p.v_, p.o, p.dout_};
        g.q_stride = f.q_stride, g.k_stride = f.k_stride, g.v_stride = f.v_stride, g.o_stride = f.o_stride;
        g.dout_stride = p.dout_.stride_arg(), g.inv_freq = f.inv_freq, g.lse = lse;
        g.dq = p.dq, g.dk = p.dk, g.dv = p.dv, g.dq_stride = p.dq.stride_arg();
        g.dk_stride = p.dk.stride_arg(), g.dv_stride = p.dv.stride_arg();
        g.workspace = workspace, g.workspace_bytes = bytes;
        status = fsa_attention_forward(&c, t, &p.b, &f, 0);
        if (!status) status = fsa_attention_backward(&c, t, &p.b, &g, 0);
    }
    CHECK(status == 0, "rule %d: %s", rule, fsa_last_error());
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<float> q = p.q.f, k = p.k.f;
    if (rope) {
        fsa_ref_rope_queries_f32(&c, &p.batch.ref, q.data(), p.inv_freq.data(), 0);
        fsa_ref_rope_keys_f32(&c, &p.batch.ref, k.data(), p.inv_freq.data(), 0);
        round_to_type<T>(q.data(), p.size_q), round_to_type<T>(k.data(), p.size_k);
    }
    std::vector<float> ro(p.size_q), rl(rows), rq(p.size_q, 0), rk(p.size_k, 0), rv(p.size_k, 0);
    fsa_ref_attention_forward_f32(&c, &p.batch.ref, rule, q.data(), k.data(), p.v.f.data(),
                                  block_indices.data(), ro.data(), rl.data());
    fsa_ref_attention_backward_f32(&c, &p.batch.ref, rule, q.data(), k.data(), p.v.f.data(),
                                   block_indices.data(), ro.data(), rl.data(), p.dout.f.data(), rq.data(),
                                   rk.data(), rv.data());
    if (rope) {
        fsa_ref_rope_queries_f32(&c, &p.batch.ref, rq.data(), p.inv_freq.data(), 1);
        fsa_ref_rope_keys_f32(&c, &p.batch.ref, rk.data(), p.inv_freq.data(), 1);
    }
    const double eo = error_of(p.o.floats(), ro), eq = error_of(p.dq.floats(), rq),
                 ek = error_of(p.dk.floats(), rk), ev = error_of(p.dv.floats(), rv),
                 el = lse_error(lse.host(), rl), limit = Dtype<T>::grad_tolerance;
    CHECK(eo <= Dtype<T>::out_tolerance && el <= 1e-3 && eq <= limit && ek <= limit && ev <= limit,
          "rule %d rope %d %s: o %.2e lse %.1e dq %.2e dk %.2e dv %.2e", rule, rope, Dtype<T>::name, eo, el,
          eq, ek, ev);
    CHECK(p.o.guards_intact() && p.dq.guards_intact() && p.dk.guards_intact() && p.dv.guards_intact() &&
              lse.guards_intact() && workspace.guards_intact(),
          "rule %d: a guard zone was written", rule);
}

// A NaN in a query's row: o and lse of each branch are NaN there, not those of a query that sees no key.
template <typename T> static void test_nan_query(Random *r, bool small) {
    FsaConfig c = default_config(4, 2, 64, small ? 16 : 64, 4);
    c.cmp_len = 16, c.window = 20;
    Problem<T> p(r, c, {90}, {}, false);
    const std::vector<int32_t> block_indices = random_block_indices(r, c, p.batch.ref);
    const Buffer<int32_t> block_indices_(block_indices);
    const FsaDtype t = Dtype<T>::value;
    const size_t bytes = std::max(fsa_workspace_size(&c, t, &p.b, FSA_SELECTED_FORWARD),
                                  fsa_workspace_size(&c, t, &p.b, FSA_ATTENTION_FORWARD));
    Buffer<char> workspace((int64_t)bytes);
    Buffer<float> lse(p.nq * c.q_heads);
    for (int64_t query : {3, 40, 89}) {
        const int64_t row = query * c.q_heads + 1;
        std::vector<T> q(p.q.raw);
        q[(size_t)(row * c.head_dim + r->below(c.head_dim))] = (T)NAN;
        p.q_.set(q);
        for (int rule = FSA_CAUSAL; rule <= FSA_SELECTED; rule++) {
            if (rule == FSA_COMPRESSED && query < c.cmp_len - 1) continue; // sees no key
            int status;
            p.o.memory.zero(), lse.zero();
            if (rule == FSA_SELECTED) {
                FsaSelectedForward f = {sizeof f, p.q_, p.k_, p.v_};
                f.block_indices = block_indices_, f.o = p.o, f.lse = lse;
                f.workspace = workspace, f.workspace_bytes = bytes;
                status = fsa_selected_forward(&c, t, &p.b, &f, 0);
            } else {
                FsaAttentionForward f = {sizeof f, (FsaVisibility)rule, p.q_, p.k_, p.v_};
                f.o = p.o, f.lse = lse, f.workspace = workspace, f.workspace_bytes = bytes;
                status = fsa_attention_forward(&c, t, &p.b, &f, 0);
            }
            CHECK(status == 0 && cudaDeviceSynchronize() == cudaSuccess, "%s", fsa_last_error());
            const std::vector<float> o = p.o.floats(), got_lse = lse.host();
            const int64_t first = rule == FSA_COMPRESSED ? (c.cmp_len - 1) * c.q_heads : 0; // sees a key
            bool right = true; // NaN in this row alone
            for (int64_t i = first; i < (int64_t)got_lse.size(); i++) {
                right &= std::isnan(got_lse[(size_t)i]) == (i == row);
                for (int64_t j = i * c.head_dim; j < (i + 1) * c.head_dim; j++)
                    right &= std::isnan(o[(size_t)j]) == (i == row);
            }
            CHECK(right, "rule %d, query %lld: lse %g, o %g", rule, (long long)query, got_lse[(size_t)row],
                  o[(size_t)(row * c.head_dim)]);
        }
    }
}

// A NaN in key 0 makes the selected branch NaN for all queries of its KV head, as block 0 is an initial
// block. The sliding branch of the last 128 queries is finite: they do not see key 0. The last key is in no
// compression window, so dv there is NaN through the selected branch alone.
template <typename T> static void test_nan_key(Random *r) {
    FsaConfig c = default_config(4, 2, 64, 64, 4);
    c.cmp_len = 16, c.window = 150; // holds the local blocks
    Problem<T> p(r, c, {378}, {}, false);
    std::vector<T> k(p.k.raw);
    k[0] = (T)NAN;
    p.k_.set(k);
    CHECK(p.forward(0) == 0 && p.backward(0) == 0, "%s", fsa_last_error());
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<float> dv = p.dv.floats();
    bool right = true; // NaN in KV head 0 alone
    for (int64_t i = 0; i < c.kv_heads * c.head_dim; i++)
        right &= std::isnan(dv[(size_t)((p.n - 1) * p.kv_row() + i)]) == (i < c.head_dim);
    CHECK(right, "%s: dv of the last key begins with %g", Dtype<T>::name,
          dv[(size_t)((p.n - 1) * p.kv_row())]);
}

// Tests the single-branch functions against the reference. init_local false: init_blocks and local_blocks are
// 0, and the lists of block indices may have any length.
template <typename T> static void test_branches(Random *r, bool small, bool init_local) {
    FsaConfig c = default_config(10, 2, 64, small ? 16 : 64, 4);
    c.cmp_len = 16, c.window = 60;
    if (!init_local) c.init_blocks = c.local_blocks = 0;
    Problem<T> p(r, c, {small ? 95 : 700, 0, 30}, {}, false, r);
    CHECK(p.forward(0) == 0, "%s", fsa_last_error());
    std::vector<int32_t> block_indices = random_block_indices(r, c, p.batch.ref);
    Buffer<int32_t> block_indices_(block_indices);
    for (int rule = FSA_CAUSAL; rule <= FSA_SELECTED; rule++) {
        bool selected = rule == FSA_SELECTED;
        if (rule == FSA_COMPRESSED || (!init_local && !selected))
            continue; // tested with all steps; unchanged
        for (bool rope : {false, true}) {
            if (!rope || !selected) test_branch(p, (FsaVisibility)rule, rope, block_indices, block_indices_);
        }
    }
}

// ---- long sequences -----------------------------------------------------------------------------------
// The branches on sequences that are too long for the reference. Sampled queries: o and dq against all keys
// that they see. Sampled keys: dk and dv against all queries that see them, with the GPU's o and lse.
template <typename T> struct LongProblem {
    FsaConfig c;
    Batch batch;
    FsaDeviceBatch b;
    int64_t d, size_q, size_k, size_c;
    int group;
    float scale;
    Buffer<T> q, dout, k, v, kc, vc, o, dq, dk, dv;
    Buffer<float> lse;
    Buffer<int32_t> block_indices;
    std::vector<int64_t> cu_windows;

    LongProblem(Random *r, const FsaConfig &config, const std::vector<int64_t> &lengths)
        : c(config), batch(c, lengths), b(Problem<T>::device_batch(batch)), d(c.head_dim),
          size_q(b.num_queries * c.q_heads * d), size_k(b.num_keys * c.kv_heads * d),
          size_c(b.num_keys / c.cmp_stride * c.kv_heads * d), group(c.q_heads / c.kv_heads),
          scale(1 / sqrtf((float)d)), q(size_q), dout(size_q), k(size_k), v(size_k), kc(size_c), vc(size_c),
          o(size_q), dq(size_q), dk(size_k), dv(size_k), lse(b.num_queries * c.q_heads),
          block_indices(c.kv_heads * b.num_queries * c.topk), cu_windows(1, 0) {
        Buffer<T> *inputs[] = {&q, &dout, &k, &v, &kc, &vc};
        for (Buffer<T> *x : inputs) fill_random(x->get(), x->n, r->u64(), 1);
        for (int64_t n : lengths) cu_windows.push_back(cu_windows.back() + fsa_num_windows(&c, n));
    }
    // Returns an upper bound of the device memory of a run, the workspaces of all rules included.
    static double gigabytes(const FsaConfig &c, int64_t n) {
        double q = (double)n * c.q_heads * c.head_dim, k = (double)n * c.kv_heads * c.head_dim;
        FsaDeviceBatch b = {n, n, 1, 1, NULL, NULL};
        size_t workspace = 0;
        for (FsaOperation op : {FSA_SELECTED_FORWARD, FSA_SELECTED_BACKWARD, FSA_ATTENTION_BACKWARD})
            workspace = std::max(workspace, fsa_workspace_size(&c, Dtype<T>::value, &b, op));
        return (8 * q + 10 * k + 4.0 * n * (c.q_heads + c.kv_heads * c.topk) + (double)workspace) * 1e-9;
    }
    template <typename X> static std::vector<X> rows(const Buffer<X> &x, int64_t first, int64_t count) {
        std::vector<X> y((size_t)count);
        CUDA_CHECK(cudaMemcpy(y.data(), x.get() + first, (size_t)count * sizeof(X), cudaMemcpyDeviceToHost));
        return y;
    }
    static std::vector<float> floats(const Buffer<T> &x, int64_t first, int64_t count) {
        std::vector<float> f;
        for (T y : rows(x, first, count)) f.push_back(to_float<T>(y));
        return f;
    }

    // Returns whether the query at position t, with the blocks row_indices [T], sees key (window) j.
    bool sees(FsaVisibility rule, int64_t t, int64_t j, const int32_t *row_indices) const {
        if (rule == FSA_COMPRESSED) return c.cmp_stride * j + c.cmp_len - 1 <= t;
        if (j > t || (rule == FSA_WINDOW && j <= t - c.window)) return false;
        return rule != FSA_SELECTED ||
               std::find(row_indices, row_indices + c.topk, (int32_t)(j / c.block)) != row_indices + c.topk;
    }

    void run(FsaVisibility rule) {
        bool selected = rule == FSA_SELECTED, compressed = rule == FSA_COMPRESSED;
        FsaDtype t = Dtype<T>::value;
        size_t bytes = std::max(
            fsa_workspace_size(&c, t, &b, selected ? FSA_SELECTED_FORWARD : FSA_ATTENTION_FORWARD),
            fsa_workspace_size(&c, t, &b, selected ? FSA_SELECTED_BACKWARD : FSA_ATTENTION_BACKWARD));
        Buffer<char> workspace((int64_t)bytes);
        const T *keys = compressed ? kc : k, *values = compressed ? vc : v;
        o.poison(), dq.poison(), dk.poison(), dv.poison(), lse.poison();
        int status;
        if (selected) {
            FsaSelectedForward f = {sizeof f, q, keys, values};
            f.block_indices = block_indices, f.o = o, f.lse = lse;
            f.workspace = workspace, f.workspace_bytes = bytes;
            FsaSelectedBackward g = {sizeof g, q, keys, values, o, dout};
            g.block_indices = block_indices, g.lse = lse, g.dq = dq, g.dk = dk, g.dv = dv;
            g.workspace = workspace, g.workspace_bytes = bytes;
            status = fsa_selected_forward(&c, t, &b, &f, 0);
            if (!status) status = fsa_selected_backward(&c, t, &b, &g, 0);
        } else {
            FsaAttentionForward f = {sizeof f, rule, q, keys, values};
            f.o = o, f.lse = lse, f.workspace = workspace, f.workspace_bytes = bytes;
            FsaAttentionBackward g = {sizeof g, rule, q, keys, values, o, dout};
            g.lse = lse, g.dq = dq, g.dk = dk, g.dv = dv, g.workspace = workspace, g.workspace_bytes = bytes;
            status = fsa_attention_forward(&c, t, &b, &f, 0);
            if (!status) status = fsa_attention_backward(&c, t, &b, &g, 0);
        }
        CHECK(status == 0, "rule %d: %s", rule, fsa_last_error());
        cudaError_t e = cudaDeviceSynchronize();
        CHECK(e == cudaSuccess, "rule %d: %s", rule, cudaGetErrorString(e));
        if (e != cudaSuccess) exit(1);
        if (compressed) {
            FsaSelectBlocks f = {sizeof f, q, kc};
            f.lse_c = lse, f.block_indices = block_indices, f.workspace = workspace,
            f.workspace_bytes = bytes;
            CHECK(fsa_select_blocks(&c, t, &b, &f, 0) == 0, "%s", fsa_last_error());
            CUDA_CHECK(cudaDeviceSynchronize());
        }
    }

    // Checks query `row`, at position t of a sequence whose keys (windows) begin at row key0.
    void check_query(FsaVisibility rule, int64_t row, int64_t t, int64_t key0, std::vector<float> *got,
                     std::vector<float> *want, double *max_lse_error) {
        bool compressed = rule == FSA_COMPRESSED;
        int64_t all = compressed ? fsa_num_windows(&c, t + 1) : t + 1, width = c.kv_heads * d;
        std::vector<float> q_row = floats(q, row * c.q_heads * d, c.q_heads * d),
                           dout_row = floats(dout, row * c.q_heads * d, c.q_heads * d), k_rows, v_rows;
        std::vector<float> lse_row = rows(lse, row * c.q_heads, c.q_heads);
        for (int h = 0; h < c.kv_heads; h++) {
            std::vector<int32_t> row_indices =
                rows(block_indices, (h * b.num_queries + row) * c.topk, c.topk);
            std::vector<int64_t> seen;
            for (int64_t j = 0; j < all; j++) {
                if (sees(rule, t, j, row_indices.data())) seen.push_back(j);
            }
            k_rows.clear(), v_rows.clear();
            for (size_t i = 0; i < seen.size();) { // copy consecutive keys at once
                size_t end = i + 1;
                while (end < seen.size() && seen[end] == seen[end - 1] + 1) end++;
                int64_t first = (key0 + seen[i]) * width, count = (int64_t)(end - i) * width;
                std::vector<float> x = floats(compressed ? kc : k, first, count),
                                   y = floats(compressed ? vc : v, first, count);
                for (size_t j = 0; j < end - i; j++) {
                    k_rows.insert(k_rows.end(), &x[j * width + h * d], &x[j * width + h * d] + d);
                    v_rows.insert(v_rows.end(), &y[j * width + h * d], &y[j * width + h * d] + d);
                }
                i = end;
            }
            for (int head = h * group; head < (h + 1) * group; head++) {
                const float *qh = &q_row[head * d], *gh = &dout_row[head * d];
                std::vector<double> s(seen.size()), dp(seen.size()), out(d, 0), grad(d, 0);
                double max = -INFINITY, sum = 0, delta = 0;
                for (size_t i = 0; i < seen.size(); i++) {
                    for (int64_t x = 0; x < d; x++) {
                        s[i] += (double)scale * qh[x] * k_rows[i * d + x];
                        dp[i] += (double)gh[x] * v_rows[i * d + x];
                    }
                    max = std::max(max, s[i]);
                }
                for (double &x : s) x = exp(x - max), sum += x;
                for (size_t i = 0; i < seen.size(); i++) {
                    delta += s[i] / sum * dp[i];
                    for (int64_t x = 0; x < d; x++) out[x] += s[i] / sum * v_rows[i * d + x];
                }
                for (size_t i = 0; i < seen.size(); i++) {
                    for (int64_t x = 0; x < d; x++)
                        grad[x] += scale * s[i] / sum * (dp[i] - delta) * k_rows[i * d + x];
                }
                double lse_want = max + log(sum);
                if (seen.empty() ? !(std::isinf(lse_row[head]) && lse_row[head] < 0)
                                 : !std::isfinite(lse_row[head]))
                    *max_lse_error = INFINITY;
                else if (!seen.empty())
                    *max_lse_error = std::max(*max_lse_error, fabs(lse_row[head] - lse_want));
                want[0].insert(want[0].end(), out.begin(), out.end());
                want[1].insert(want[1].end(), grad.begin(), grad.end());
            }
        }
        const Buffer<T> *results[2] = {&o, &dq};
        for (int i = 0; i < 2; i++) {
            std::vector<float> x = floats(*results[i], row * c.q_heads * d, c.q_heads * d);
            got[i].insert(got[i].end(), x.begin(), x.end());
        }
    }

    // Checks key (window) j of sequence s for a random KV head.
    void check_key(Random *r, FsaVisibility rule, int64_t s, int64_t j, std::vector<float> *got,
                   std::vector<float> *want) {
        bool compressed = rule == FSA_COMPRESSED;
        int64_t h = r->below(c.kv_heads), first = batch.cu_seqlens[s], n = batch.cu_seqlens[s + 1] - first;
        int64_t key = ((compressed ? cu_windows[s] : first) + j) * c.kv_heads + h, width = c.q_heads * d;
        std::vector<float> k_rows = floats(compressed ? kc : k, key * d, d),
                           v_rows = floats(compressed ? vc : v, key * d, d);
        std::vector<double> grad_k(d, 0), grad_v(d, 0);
        int64_t pos_begin = compressed ? c.cmp_stride * j + c.cmp_len - 1 : j, step = 4096;
        int64_t pos_end = rule == FSA_WINDOW ? std::min(n, j + c.window) : n;
        for (int64_t t0 = pos_begin; t0 < pos_end; t0 += step) {
            int64_t count = std::min(step, pos_end - t0), row = first + t0;
            std::vector<T> x = rows(q, row * width, count * width),
                           y = rows(dout, row * width, count * width),
                           z = rows(o, row * width, count * width);
            std::vector<float> l = rows(lse, row * c.q_heads, count * c.q_heads);
            std::vector<int32_t> row_indices =
                rows(block_indices, (h * b.num_queries + row) * c.topk, count * c.topk);
            for (int64_t t = 0; t < count; t++) {
                if (!sees(rule, t0 + t, j, &row_indices[t * c.topk])) continue;
                for (int64_t head = h * group; head < (h + 1) * group; head++) {
                    const size_t offset = (size_t)(t * width + head * d);
                    float dot = 0, dp = 0, delta = 0;
                    for (int64_t i = 0; i < d; i++) {
                        float g = to_float<T>(y[offset + i]);
                        dot += to_float<T>(x[offset + i]) * k_rows[i];
                        dp += g * v_rows[i];
                        delta += g * to_float<T>(z[offset + i]);
                    }
                    double p = exp((double)scale * dot - l[t * c.q_heads + head]),
                           ds = scale * p * (dp - delta);
                    for (int64_t i = 0; i < d; i++) {
                        grad_k[i] += ds * to_float<T>(x[offset + i]);
                        grad_v[i] += p * to_float<T>(y[offset + i]);
                    }
                }
            }
        }
        const Buffer<T> *results[2] = {&dk, &dv};
        for (int i = 0; i < 2; i++) {
            std::vector<float> x = floats(*results[i], key * d, d);
            got[i].insert(got[i].end(), x.begin(), x.end());
            want[i].insert(want[i].end(), (i ? grad_v : grad_k).begin(), (i ? grad_v : grad_k).end());
        }
    }

    // Returns whether the block indices of one query obey their rules, and no block that is left out has a
    // greater score than a selected one.
    bool block_indices_right(int64_t s, int64_t t, int h) {
        int64_t row = batch.cu_seqlens[s] + t, windows = fsa_num_windows(&c, t + 1), blocks = t / c.block + 1;
        int64_t want = std::min<int64_t>(blocks, c.topk);
        std::vector<int32_t> x = rows(block_indices, (h * b.num_queries + row) * c.topk, c.topk);
        std::vector<char> in((size_t)blocks, 0);
        for (int64_t i = 0; i < c.topk; i++) {
            if (i >= want ? x[i] != -1 : x[i] < 0 || x[i] >= blocks || (i && x[i] <= x[i - 1])) return false;
            if (i < want) in[x[i]] = 1;
        }
        std::vector<float> q_row = floats(q, (row * c.q_heads + h * group) * d, group * d),
                           keys = floats(kc, cu_windows[s] * c.kv_heads * d, windows * c.kv_heads * d);
        std::vector<double> score((size_t)blocks, 0), p((size_t)windows);
        for (int head = 0; head < group; head++) {
            double sum = 0;
            for (int64_t i = 0; i < windows; i++) {
                double dot = 0;
                for (int64_t y = 0; y < d; y++)
                    dot += q_row[head * d + y] * keys[(i * c.kv_heads + h) * d + y];
                p[i] = exp(scale * dot), sum += p[i];
            }
            for (int64_t i = 0; i < windows; i++) {
                for (int64_t cell = i; cell < i + c.cmp_len / c.cmp_stride; cell++) {
                    int64_t block = cell * c.cmp_stride / c.block;
                    if (block < blocks) score[block] += p[i] / sum;
                }
            }
        }
        double lowest = INFINITY, highest = 0;
        for (int64_t j = 0; j < blocks; j++) {
            bool init_local = j < c.init_blocks || j >= blocks - c.local_blocks;
            if (init_local && !in[j]) return false;
            if (!init_local && in[j]) lowest = std::min(lowest, score[j]);
            if (!in[j]) highest = std::max(highest, score[j]);
        }
        return highest <= lowest * (1 + 1e-3);
    }

    void check(Random *r) {
        for (FsaVisibility rule : {FSA_COMPRESSED, FSA_WINDOW, FSA_SELECTED, FSA_CAUSAL}) {
            if (rule == FSA_CAUSAL && batch.longest > 60000) continue; // takes n * n operations
            run(rule);
            std::vector<float> got[4], want[4]; // o, dq, dk, dv
            double max_lse_error = 0;
            for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); s++) {
                int64_t n = batch.cu_seqlens[s + 1] - batch.cu_seqlens[s], windows = fsa_num_windows(&c, n);
                bool compressed = rule == FSA_COMPRESSED;
                int64_t keys = compressed ? windows : n,
                        key0 = compressed ? cu_windows[s] : batch.cu_seqlens[s];
                // The first query, the last one and others: so many that the errors of single rows average
                // out.
                for (int i = 0; i < 32; i++) {
                    int64_t t = i == 0 ? 0 : i == 1 ? n - 1 : r->below(n);
                    check_query(rule, batch.cu_seqlens[s] + t, t, key0, got, want, &max_lse_error);
                    if (compressed)
                        CHECK(block_indices_right(s, t, (int)r->below(c.kv_heads)),
                              "block indices of query %lld of %lld", (long long)t, (long long)n);
                }
                // Keys, fewer in long sequences: a key takes n queries.
                for (int i = 0; i < (n <= 1000 ? 32 : 4) && keys > 0; i++) {
                    int64_t j = i == 0 ? 0 : i == 1 ? keys - 1 : r->below(keys);
                    check_key(r, rule, s, j, got + 2, want + 2);
                }
            }
            double limit[4] = {Dtype<T>::out_tolerance, Dtype<T>::grad_tolerance, Dtype<T>::grad_tolerance,
                               Dtype<T>::grad_tolerance};
            const char *names[4] = {"o", "dq", "dk", "dv"};
            printf("long %s rule %d longest %lld heads %d/%d d %d: lse %.1e", Dtype<T>::name, rule,
                   (long long)batch.longest, c.q_heads, c.kv_heads, c.head_dim, max_lse_error);
            CHECK(max_lse_error <= 1e-3, "rule %d: lse %.2e", rule, max_lse_error);
            for (int i = 0; i < 4; i++) {
                double error = relative_error(got[i], want[i]);
                printf(" %s %.2e", names[i], error);
                CHECK(error <= limit[i], "rule %d: %s %.2e, must be at most %.2e", rule, names[i], error,
                      limit[i]);
            }
            printf("\n");
        }
        CHECK(o.guards_intact() && dq.guards_intact() && dk.guards_intact() && dv.guards_intact() &&
                  block_indices.guards_intact(),
              "a guard zone was written");
    }
};

template <typename T>
static void test_long(Random *r, int hq, int hkv, int d, int block, int topk,
                      const std::vector<int64_t> &lengths) {
    FsaConfig c = default_config(hq, hkv, d, block, topk);
    c.window = 199;
    int64_t n = 0;
    for (int64_t x : lengths) n += x;
    size_t free_bytes, total;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
    double need = LongProblem<T>::gigabytes(c, n);
    if (need * 1e9 > (double)free_bytes) {
        SKIP("%lld tokens of %d heads need %.0f GB of GPU memory; %.0f GB are free", (long long)n, hq, need,
             (double)free_bytes * 1e-9);
        return;
    }
    LongProblem<T>(r, c, lengths).check(r);
}

// One API function. `pointers` are the pointer fields of its argument struct that must not be NULL, and
// `strides` their row strides, in the order in which `run` takes their values.
struct Function {
    const char *name;
    FsaOperation op;
    std::vector<const char *> pointers, strides;
    std::function<int(const FsaConfig *, FsaDtype, const FsaDeviceBatch *, void **x, const int64_t *s, void *,
                      size_t)>
        run;
};
#define RUN_FUNCTION                                                                                         \
    [&](const FsaConfig *c, FsaDtype t, const FsaDeviceBatch *b, void **x, const int64_t *s, void *work,     \
        size_t bytes)

// Returns all functions. weights, gradients: of the compression.
static std::vector<Function> all_functions(const FsaPhiWeights &weights, const FsaPhiGradients &gradients) {
    return {{"forward", FSA_FORWARD, {"q", "k", "v", "gate_logits", "o", "saved"},
             {"q", "k", "v", "gate", "o"},
             RUN_FUNCTION{FsaForward a = {sizeof a, x[0], x[1], x[2], x[3], s[0], s[1], s[2], s[3], weights};
    a.o = x[4], a.saved = x[5], a.o_stride = s[4], a.workspace = work, a.workspace_bytes = bytes;
    return fsa_forward(c, t, b, &a, 0);
}
}
, {"backward", FSA_BACKWARD, {"k", "v", "gate_logits", "dout", "saved", "dq", "dk", "dv", "dgate_logits"},
   {"k", "v", "gate", "dout", "dq", "dk", "dv", "dgate"},
   RUN_FUNCTION{FsaBackward a = {sizeof a, x[0], x[1], x[2], x[3], s[0], s[1], s[2], s[3], weights};
a.saved = x[4], a.dq = x[5], a.dk = x[6], a.dv = x[7], a.dgate_logits = x[8];
a.dq_stride = s[4], a.dk_stride = s[5], a.dv_stride = s[6], a.dgate_stride = s[7];
a.dphi = gradients, a.workspace = work, a.workspace_bytes = bytes;
return fsa_backward(c, t, b, &a, 0);
}
}
, {"selected_forward", FSA_SELECTED_FORWARD, {"q", "k", "v", "block_indices", "o", "lse"},
   {"q", "k", "v", "o"},
   RUN_FUNCTION{FsaSelectedForward a = {sizeof a, x[0], x[1], x[2], s[0], s[1], s[2], (int32_t *)x[3]};
a.o = x[4], a.lse = (float *)x[5], a.o_stride = s[3];
a.workspace = work, a.workspace_bytes = bytes;
return fsa_selected_forward(c, t, b, &a, 0);
}
}
, {"selected_backward", FSA_SELECTED_BACKWARD,
   {"q", "k", "v", "o", "dout", "block_indices", "lse", "dq", "dk", "dv"},
   {"q", "k", "v", "o", "dout", "dq", "dk", "dv"},
   RUN_FUNCTION{
       FsaSelectedBackward a = {sizeof a, x[0], x[1], x[2], x[3], x[4], s[0], s[1], s[2], s[3], s[4]};
a.block_indices = (int32_t *)x[5], a.lse = (float *)x[6], a.dq = x[7], a.dk = x[8], a.dv = x[9];
a.dq_stride = s[5], a.dk_stride = s[6], a.dv_stride = s[7];
a.workspace = work, a.workspace_bytes = bytes;
return fsa_selected_backward(c, t, b, &a, 0);
}
}
, {"select_blocks", FSA_SELECT_BLOCKS, {"q", "kc", "lse_c", "block_indices"}, {"q", "kc"},
   RUN_FUNCTION{FsaSelectBlocks a = {sizeof a, x[0], x[1], s[0], s[1], (float *)x[2], (int32_t *)x[3]};
a.workspace = work, a.workspace_bytes = bytes;
return fsa_select_blocks(c, t, b, &a, 0);
}
}
, {"attention_forward", FSA_ATTENTION_FORWARD, {"q", "k", "v", "o", "lse"}, {"q", "k", "v", "o"},
   RUN_FUNCTION{FsaAttentionForward a = {sizeof a, FSA_WINDOW, x[0], x[1], x[2], s[0], s[1], s[2]};
a.o = x[3], a.lse = (float *)x[4], a.o_stride = s[3];
a.workspace = work, a.workspace_bytes = bytes;
return fsa_attention_forward(c, t, b, &a, 0);
}
}
, {"attention_backward", FSA_ATTENTION_BACKWARD, {"q", "k", "v", "o", "dout", "lse", "dq", "dk", "dv"},
   {"q", "k", "v", "o", "dout", "dq", "dk", "dv"},
   RUN_FUNCTION{FsaAttentionBackward a = {sizeof a, FSA_WINDOW, x[0], x[1], x[2], x[3], x[4], s[0], s[1],
                                          s[2], s[3], s[4]};
a.lse = (float *)x[5], a.dq = x[6], a.dk = x[7], a.dv = x[8];
a.dq_stride = s[5], a.dk_stride = s[6], a.dv_stride = s[7];
a.workspace = work, a.workspace_bytes = bytes;
return fsa_attention_backward(c, t, b, &a, 0);
}
}
,
}
;
}

static void test_errors(Random *r) {
    typedef __nv_bfloat16 T;
    Problem<T> p(r, default_config(4, 2, 64, 64, 8), {100}, {}, true);
    Buffer<T> any(p.size_q), any_phi(p.size_w); // for any argument: no function uses it
    FsaPhiWeights weights = {p.wk_, p.pe_, p.wv_};
    FsaPhiGradients gradients = {p.dwk, p.dpe, p.dwv};
    const std::vector<Function> functions = all_functions(weights, gradients);
    const char *function = "";
    auto expect = [&](int status, int wanted, const char *words) {
        CHECK(status == wanted && strstr(fsa_last_error(), words),
              "%s: status %d and '%s' expected, got %d: %s", function, wanted, words, status,
              fsa_last_error());
    };
    alignas(16) static char host_memory[16];
    int device = 0, pageable = 0; // pageable: kernels may read all host memory
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&pageable, cudaDevAttrPageableMemoryAccess, device));
    auto host_pointer = [](const std::string &name, const void *pointer) {
        char words[100];
        snprintf(words, sizeof words, "%s %p: host memory; must be a device pointer", name.c_str(), pointer);
        return std::string(words);
    };
    auto misaligned = [](const std::string &name, const void *pointer) {
        char words[100];
        const int bytes = name.find("gate_logits") == std::string::npos ? 16 : 2;
        snprintf(words, sizeof words, "%s %p: must be aligned to %d bytes", name.c_str(), pointer, bytes);
        return std::string(words);
    };
    const FsaConfig good = p.c;
    FsaConfig bad = good;
    struct {
        int *field, value;
        const char *words;
    } configs[] = {{&bad.q_heads, 5, "q_heads 5"},
                   {&bad.q_heads, 0, "q_heads 0"},
                   {&bad.q_heads, 34, "q_heads 34"},
                   {&bad.kv_heads, 0, "kv_heads 0"},
                   {&bad.head_dim, 96, "head_dim 96"},
                   {&bad.head_dim, 63, "head_dim 63"},
                   {&bad.head_dim, 1024, "head_dim 1024"},
                   {&bad.cmp_len, 0, "cmp_len 0"},
                   {&bad.cmp_len, 80, "cmp_len 80"},
                   {&bad.cmp_stride, 0, "cmp_stride 0"},
                   {&bad.cmp_stride, 12, "cmp_stride 12"},
                   {&bad.cmp_stride, 128, "cmp_stride 128"},
                   {&bad.block, 24, "block 24"},
                   {&bad.topk, 2, "topk 2"},
                   {&bad.topk, 0, "topk 0"},
                   {&bad.topk, 5000, "topk 5000"},
                   {&bad.init_blocks, -1, "init_blocks -1"},
                   {&bad.local_blocks, -1, "local_blocks -1"},
                   {&bad.window, 0, "window 0"},
                   {(int *)&bad.phi, 7, "phi 7"},
                   {&bad.gate_per_token, 2, "gate_per_token 2"},
                   {&bad.recompute, -1, "recompute -1"},
                   {&bad.reserved[0], 1, "reserved[0] 1"},
                   {&bad.reserved[3], -5, "reserved[3] -5"}};
    const FsaDeviceBatch good_batch = p.b;
    FsaDeviceBatch b = good_batch;
    struct {
        int64_t *field, value;
        const char *words;
    } batches[] = {{&b.num_queries, -1, "num_queries -1"},
                   {&b.num_keys, -1, "num_keys -1"},
                   {&b.num_seqs, -1, "num_seqs -1"},
                   {&b.num_segments, -1, "num_segments -1"},
                   {&b.num_keys, 0, "num_keys 0: must be at least 1 for 100 queries"},
                   {&b.num_seqs, 0, "num_seqs 0"},
                   {&b.num_segments, 0, "num_segments 0"},
                   {&b.num_queries, INT32_MAX / 8 + 1, "times topk 8 must be below 2^31"},
                   {&b.num_queries, 1ll << 30, "num_queries 1073741824"},
                   {&b.num_queries, 1ll << 31, "num_queries 2147483648"},
                   {&b.num_keys, 1ll << 30, "num_keys 1073741824"},
                   {&b.reserved[1], 3, "FsaDeviceBatch.reserved 3"}};
    for (const Function &f : functions) {
        function = f.name;
        Buffer<char> work((int64_t)fsa_workspace_size(&good, FSA_BF16, &good_batch, f.op));
        size_t bytes = (size_t)work.n;
        std::vector<void *> args(f.pointers.size(), any.get());
        std::vector<int64_t> strides(f.strides.size(), 0);
        auto run = [&](const FsaConfig *c, FsaDtype t, const FsaDeviceBatch *batch) {
            return f.run(c, t, batch, args.data(), strides.data(), work, bytes);
        };
        expect(run(NULL, FSA_BF16, &good_batch), FSA_ERROR_ARGUMENT, "config: NULL");
        expect(run(&good, FSA_BF16, NULL), FSA_ERROR_ARGUMENT, "batch: NULL");
        expect(run(&good, (FsaDtype)7, &good_batch), FSA_ERROR_ARGUMENT, "dtype 7");
        for (auto &x : configs) {
            *x.field = x.value;
            expect(run(&bad, FSA_BF16, &good_batch), FSA_ERROR_CONFIG, x.words);
            expect(fsa_workspace_size(&bad, FSA_BF16, &good_batch, f.op) != 0, 0, x.words);
            bad = good;
        }
        bad.scale = NAN;
        expect(run(&bad, FSA_BF16, &good_batch), FSA_ERROR_CONFIG, "scale");
        bad = good;
        for (auto &x : batches) {
            *x.field = x.value;
            expect(run(&good, FSA_BF16, &b), FSA_ERROR_ARGUMENT, x.words);
            expect(fsa_workspace_size(&good, FSA_BF16, &b, f.op) != 0, 0, x.words);
            b = good_batch;
        }
        b.cu_seqlens = NULL;
        expect(run(&good, FSA_BF16, &b), FSA_ERROR_ARGUMENT, "cu_seqlens: NULL");
        b = good_batch, b.segments = NULL;
        expect(run(&good, FSA_BF16, &b), FSA_ERROR_ARGUMENT, "segments: NULL");
        b = good_batch;
        expect(f.run(&good, FSA_BF16, &b, args.data(), strides.data(), NULL, bytes), FSA_ERROR_WORKSPACE,
               "workspace: NULL");
        expect(f.run(&good, FSA_BF16, &b, args.data(), strides.data(), work + 16, bytes), FSA_ERROR_WORKSPACE,
               "must be aligned to 256 bytes");
        std::string needs = "must be at least " + std::to_string(bytes);
        expect(f.run(&good, FSA_BF16, &b, args.data(), strides.data(), work, bytes - 1), FSA_ERROR_WORKSPACE,
               needs.c_str());
        for (size_t i = 0; i < args.size(); i++) {
            std::string name = f.pointers[i];
            args[i] = NULL;
            expect(run(&good, FSA_BF16, &b), FSA_ERROR_ARGUMENT, (name + ": NULL").c_str());
            args[i] = (char *)any.get() + 1;
            expect(run(&good, FSA_BF16, &b), FSA_ERROR_ARGUMENT, misaligned(name, args[i]).c_str());
            args[i] = &host_memory;
            if (!pageable)
                expect(run(&good, FSA_BF16, &b), FSA_ERROR_ARGUMENT,
                       host_pointer(name, &host_memory).c_str());
            args[i] = any;
        }
        for (size_t i = 0; i < strides.size(); i++) {
            const std::string name = std::string(f.strides[i]) + "_stride ";
            for (int64_t stride : {(int64_t)8, (int64_t)-256, (int64_t)1 << 34, (int64_t)260}) {
                if (stride == 260 && name.find("gate") != std::string::npos) continue; // any stride
                strides[i] = stride;
                expect(run(&good, FSA_BF16, &b), FSA_ERROR_ARGUMENT, (name + std::to_string(stride)).c_str());
            }
            strides[i] = 0;
        }
        if (f.op == FSA_FORWARD || f.op == FSA_BACKWARD) {
            struct {
                const void **pointer;
                const char *name;
                bool optional;
            } phi[] = {{&weights.wk, "phi.wk", false},
                       {&weights.wv, "phi.wv", false},
                       {&weights.pe, "phi.pe", true},
                       {(const void **)&gradients.dwk, "dphi.dwk", false},
                       {(const void **)&gradients.dwv, "dphi.dwv", false},
                       {(const void **)&gradients.dpe, "dphi.dpe", false}};
            for (auto &x : phi) {
                if (x.name[0] == 'd' && f.op == FSA_FORWARD) continue;
                const void *before = *x.pointer;
                *x.pointer = any_phi + 1;
                expect(run(&good, FSA_BF16, &b), FSA_ERROR_ARGUMENT, misaligned(x.name, any_phi + 1).c_str());
                *x.pointer = NULL;
                if (!x.optional)
                    expect(run(&good, FSA_BF16, &b), FSA_ERROR_ARGUMENT,
                           (std::string(x.name) + ": NULL").c_str());
                *x.pointer = before;
            }
        }
    }
    // Errors that the loop does not cover.
    function = "";
    for (int rule : {(int)FSA_SELECTED, -1}) {
        FsaAttentionForward f = {sizeof f, (FsaVisibility)rule};
        FsaAttentionBackward g = {sizeof g, (FsaVisibility)rule};
        const std::string words = "rule " + std::to_string(rule);
        expect(fsa_attention_forward(&good, FSA_BF16, &b, &f, 0), FSA_ERROR_ARGUMENT, words.c_str());
        expect(fsa_attention_backward(&good, FSA_BF16, &b, &g, 0), FSA_ERROR_ARGUMENT, words.c_str());
    }
    FsaAttentionForward rotated = {sizeof rotated, FSA_COMPRESSED};
    rotated.inv_freq = p.inv_freq_;
    expect(fsa_attention_forward(&good, FSA_BF16, &b, &rotated, 0), FSA_ERROR_ARGUMENT,
           "must be NULL for the compressed rule");
    // Argument structs of other versions.
    struct {
        FsaForward known;
        int64_t later[2]; // fields of a later version
    } longer = {p.forward_args(), {0, 0}};
    expect(fsa_forward(&good, FSA_BF16, &b, NULL, 0), FSA_ERROR_ARGUMENT, "FsaForward: NULL");
    for (size_t size : {(size_t)0, sizeof(FsaForward) - 8, sizeof(FsaForward) + 4, (size_t)1 << 40}) {
        longer.known.size = size;
        expect(fsa_forward(&good, FSA_BF16, &b, &longer.known, 0), FSA_ERROR_ARGUMENT,
               ("FsaForward.size " + std::to_string(size) + ": must be sizeof(FsaForward)").c_str());
    }
    longer.known.size = sizeof longer;
    expect(fsa_forward(&good, FSA_BF16, &b, &longer.known, 0), FSA_OK, "");
    longer.later[1] = 1;
    expect(fsa_forward(&good, FSA_BF16, &b, &longer.known, 0), FSA_ERROR_ARGUMENT,
           ("FsaForward: byte " + std::to_string(sizeof(FsaForward) + 8) + " is not 0").c_str());
    expect(fsa_workspace_size(&good, FSA_BF16, &b, (FsaOperation)9) != 0, 0, "operation 9");
    bad.window = 0;
    expect(fsa_saved_size(&bad, FSA_BF16, &b) != 0, 0, "window 0");
    bad.window = -1;
    expect(fsa_saved_block_indices(&bad, FSA_BF16, &b, p.saved.get()) != NULL, 0, "window -1");
    expect(p.forward(0), FSA_OK, "window -1"); // a success keeps the last error
    expect(p.backward(0), FSA_OK, "window -1");
    CUDA_CHECK(cudaDeviceSynchronize());
}

// Forward and backward captured in a CUDA graph give the bits of direct calls, each time that it is launched.
static void test_graph(Random *r) {
#ifdef EMULATOR_H
    (void)r; // the emulator has no graphs
#else
    typedef __nv_bfloat16 T;
    Problem<T> p(r, default_config(8, 2, 128, 64, 8), {700, 200}, {}, true, r);
    CHECK(p.forward(0) == FSA_OK && p.backward(0) == FSA_OK, "%s", fsa_last_error());
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<char> direct = p.bits();
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaStreamCreate(&stream));
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK(p.forward(stream) == FSA_OK && p.backward(stream) == FSA_OK, "%s", fsa_last_error());
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    for (int launch = 0; launch < 2; launch++) {
        p.o.poison(), p.dq.poison(), p.saved.poison(), p.dwk.zero(), p.dwv.zero(), p.dpe.zero();
        CUDA_CHECK(cudaDeviceSynchronize());
        CUDA_CHECK(cudaGraphLaunch(exec, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        CHECK(p.bits() == direct, "launch %d: the bits of a graph differ", launch);
    }
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaStreamDestroy(stream));
#endif
}

// Memory and a stream of another GPU are errors that name the field and the GPUs.
static void test_other_device(Random *r) {
    typedef __nv_bfloat16 T;
    Problem<T> p(r, default_config(4, 2, 64, 64, 6), {100}, {}, true);
    FsaForward a = p.forward_args();
    cudaStream_t stream = 0;
#ifdef EMULATOR_H
    emu::other_device_memory = a.q;
    int status = fsa_forward(&p.c, FSA_BF16, &p.b, &a, 0);
    emu::other_device_memory = NULL;
#else
    int devices = 0, device = 0;
    CUDA_CHECK(cudaGetDeviceCount(&devices));
    CUDA_CHECK(cudaGetDevice(&device));
    if (devices < 2) {
        SKIP("one GPU: memory and a stream of another one");
        return;
    }
    void *memory;
    CUDA_CHECK(cudaSetDevice(1 - device));
    CUDA_CHECK(cudaMalloc(&memory, p.size_q * sizeof(T)));
    CUDA_CHECK(cudaStreamCreate(&stream));
    CUDA_CHECK(cudaSetDevice(device));
    a.q = memory, a.q_stride = 0;
    int status = fsa_forward(&p.c, FSA_BF16, &p.b, &a, 0);
    CUDA_CHECK(cudaFree(memory));
    a = p.forward_args();
#endif
    CHECK(status == FSA_ERROR_ARGUMENT && strncmp(fsa_last_error(), "fsa_forward: q 0x", 17) == 0 &&
              strstr(fsa_last_error(), ": memory of GPU 1; must be memory of the current GPU 0"),
          "status %d: %s", status, fsa_last_error());
#if CUDART_VERSION >= 12080
#ifdef EMULATOR_H
    CUDA_CHECK(cudaStreamCreate(&stream));
    emu::stream_device = 1;
#endif
    status = fsa_forward(&p.c, FSA_BF16, &p.b, &a, stream);
    CHECK(status == FSA_ERROR_ARGUMENT &&
              strstr(fsa_last_error(), ": of GPU 1; must be a stream of the current GPU 0"),
          "status %d: %s", status, fsa_last_error());
#ifdef EMULATOR_H
    emu::stream_device = 0;
#endif
#endif
    CHECK(p.forward(0) == FSA_OK, "%s", fsa_last_error());
    CUDA_CHECK(cudaDeviceSynchronize());
}

// Errors of CUDA: fsa_last_error names the function, the kernel or call, and CUDA's text.
static void test_cuda_errors(Random *r) {
    typedef __nv_bfloat16 T;
    Problem<T> p(r, default_config(4, 2, 64, 64, 6), {100, 300}, {}, true);
    auto expect = [&](int status, const std::string &wanted) {
        CHECK(status == FSA_ERROR_CUDA && strstr(fsa_last_error(), wanted.c_str()) &&
                  !strchr(fsa_last_error(), '\n'),
              "status %d and '%s' expected, got %d: %s", FSA_ERROR_CUDA, wanted.c_str(), status,
              fsa_last_error());
    };
    // An error is pending. The functions report it, launch nothing and leave it pending.
    cudaError_t invalid = cudaSetDevice(9999);
    std::string pending = std::string("not started, as a CUDA error of an earlier call is pending: ") +
                          cudaGetErrorString(invalid);
    expect(p.forward(0), "fsa_forward: " + pending);
    expect(p.backward(0), "fsa_backward: " + pending);
    CHECK(cudaGetLastError() == invalid, "the pending error is no longer pending");
    CHECK(p.forward(0) == FSA_OK && p.backward(0) == FSA_OK, "%s", fsa_last_error());
#ifdef EMULATOR_H
    // A query of an event that is not ready leaves no error.
    emu::fail_call(0, cudaErrorNotReady);
    CHECK(cudaMemsetAsync(p.o.get(), 0, 0, 0) == cudaErrorNotReady, "the fault was not planted");
    CHECK(cudaPeekAtLastError() == cudaErrorNotReady && p.forward(0) == FSA_OK, "%s", fsa_last_error());
    cudaGetLastError();
    // Every launch, copy, memset, kernel attribute and tensor map fails once.
    FsaConfig c = p.c;
    FsaDeviceBatch b = p.b, no_queries = b;
    no_queries.num_queries = 0;
    Buffer<char> work((int64_t)std::max(fsa_workspace_size(&c, FSA_BF16, &b, FSA_ATTENTION_BACKWARD),
                                        fsa_workspace_size(&c, FSA_BF16, &b, FSA_SELECTED_BACKWARD)));
    const size_t bytes = (size_t)work.n;
    CHECK(p.forward(0) == FSA_OK, "%s", fsa_last_error());
    const int32_t *selected = fsa_saved_block_indices(&c, FSA_BF16, &b, p.saved.get());
    Buffer<float> lse(p.b.num_queries * c.q_heads);
    Buffer<int32_t> indices(p.b.num_queries * c.kv_heads * c.topk);
    cudaMemcpy(indices, selected, (size_t)indices.n * sizeof(int32_t), cudaMemcpyDeviceToDevice);
    FsaSelectedForward selected_forward = {
        sizeof selected_forward, p.q_, p.k_, p.v_, 0, 0, 0, indices, p.o, lse};
    selected_forward.workspace = work, selected_forward.workspace_bytes = bytes;
    FsaSelectedBackward selected_backward = {sizeof selected_backward, p.q_, p.k_, p.v_, p.o, p.dout_};
    selected_backward.block_indices = indices, selected_backward.lse = lse, selected_backward.dq = p.dq;
    selected_backward.dk = p.dk, selected_backward.dv = p.dv;
    selected_backward.workspace = work, selected_backward.workspace_bytes = bytes;
    const FsaSelectBlocks select = {sizeof select, p.q_, p.k_, 0, 0, lse, indices, work, bytes};
    FsaAttentionForward attention_forward = {sizeof attention_forward, FSA_CAUSAL, p.q_, p.k_, p.v_};
    attention_forward.inv_freq = p.inv_freq_, attention_forward.o = p.o, attention_forward.lse = lse;
    attention_forward.workspace = work, attention_forward.workspace_bytes = bytes;
    FsaAttentionBackward attention_backward = {
        sizeof attention_backward, FSA_CAUSAL, p.q_, p.k_, p.v_, p.o, p.dout_};
    attention_backward.inv_freq = p.inv_freq_, attention_backward.lse = lse, attention_backward.dq = p.dq;
    attention_backward.dk = p.dk, attention_backward.dv = p.dv;
    attention_backward.workspace = work, attention_backward.workspace_bytes = bytes;
    struct {
        const char *name, *call; // call: one of the kernels and calls that fail
        std::function<int()> run;
    } functions[] = {
        {"fsa_forward", "selected_combine_kernel", [&] { return p.forward(0); }},
        {"fsa_forward", "cudaMemcpyAsync",
         [&] {
             FsaForward a = p.forward_args();
             a.block_indices = indices;
             return fsa_forward(&c, FSA_BF16, &b, &a, 0);
         }},
        {"fsa_backward", "selected_store_dkv_kernel", [&] { return p.backward(0); }},
        {"fsa_selected_forward", "work_ranges_kernel",
         [&] { return fsa_selected_forward(&c, FSA_BF16, &b, &selected_forward, 0); }},
        {"fsa_selected_backward", "selected_combine_bwd_kernel",
         [&] { return fsa_selected_backward(&c, FSA_BF16, &b, &selected_backward, 0); }},
        {"fsa_select_blocks", "topk_", [&] { return fsa_select_blocks(&c, FSA_BF16, &b, &select, 0); }},
        {"fsa_attention_forward", "dense_forward_",
         [&] { return fsa_attention_forward(&c, FSA_BF16, &b, &attention_forward, 0); }},
        {"fsa_attention_backward", "dense_combine_dkv_kernel",
         [&] {
             FsaAttentionBackward compressed = attention_backward;
             compressed.rule = FSA_COMPRESSED, compressed.inv_freq = NULL;
             return fsa_attention_backward(&c, FSA_BF16, &b, &compressed, 0);
         }},
        {"fsa_attention_backward", "rope_kernel",
         [&] { return fsa_attention_backward(&c, FSA_BF16, &b, &attention_backward, 0); }},
        {"fsa_attention_backward", "cudaMemsetAsync",
         [&] { return fsa_attention_backward(&c, FSA_BF16, &no_queries, &attention_backward, 0); }},
    };
    for (auto &f : functions) {
        std::string names;
        for (int n = 0;; n++) {
            emu::fail_call(n, cudaErrorMemoryAllocation);
            int status = f.run();
            if (emu::pending_faults()) { // the function has made fewer calls
                CHECK(status == FSA_OK && n > 0, "%s", fsa_last_error());
                break;
            }
            expect(status, std::string(f.name) + ": ");
            expect(status, ": out of memory");
            const char *name = fsa_last_error() + strlen(f.name) + 2;
            size_t length = strspn(name, "abcdefghijklmnopqrstuvwxyzCDEMTAF_0123456789");
            CHECK(length > 4 && strcmp(name + length, ": out of memory") == 0, "%s", fsa_last_error());
            names += std::string(name, length) + " ";
            CHECK(cudaPeekAtLastError() == cudaSuccess, "%s left its own error pending", f.name);
        }
        CHECK(names.find(f.call) != std::string::npos, "%s: no %s in %s", f.name, f.call, names.c_str());
    }
    // The error of a kernel that ran earlier
    emu::fail_call(0, cudaErrorIllegalAddress);
    expect(p.forward(0),
           "fsa_forward: batch_layout_kernel: an earlier kernel failed: an illegal memory access");
    emu::fail_device_queries = true;
    expect(p.forward(0), "fsa_forward: cudaGetDevice: invalid device ordinal");
    CHECK(fsa_workspace_size(&c, FSA_BF16, &b, FSA_FORWARD) == 0, "a size without a device");
    expect(FSA_ERROR_CUDA, "fsa_workspace_size: cudaGetDevice: invalid device ordinal");
    emu::fail_device_queries = false;
#else
    // A launch fails: the stream's capture is invalid after a call that a capture does not allow.
    cudaStream_t stream;
    cudaGraph_t graph = NULL;
    CUDA_CHECK(cudaStreamCreate(&stream));
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK(cudaStreamSynchronize(stream) != cudaSuccess, "a capture allows cudaStreamSynchronize");
    cudaGetLastError();
    expect(p.forward(stream), std::string("fsa_forward: batch_layout_kernel: ") +
                                  cudaGetErrorString(cudaErrorStreamCaptureInvalidated));
    CHECK(cudaPeekAtLastError() == cudaSuccess, "fsa_forward left its own error pending");
    cudaStreamEndCapture(stream, &graph);
    cudaGetLastError();
    CUDA_CHECK(cudaStreamDestroy(stream));
#endif
    CHECK(p.forward(0) == FSA_OK && p.backward(0) == FSA_OK, "%s", fsa_last_error());
    CUDA_CHECK(cudaDeviceSynchronize());
}

// Sizes never shrink when a count of the batch grows, so a workspace for the largest batch serves all.
static void test_sizes() {
    const int64_t max_tokens = 65536;
    for (int i = 0; i < 2 * 3 * 5 * 2; i++) {
        const int groups[] = {1, 3, 4, 8, 16}, blocks[][2] = {{64, 16}, {128, 8}, {32, 8}};
        const int g = groups[i / 2 % 5], kv_heads = g == 1 ? 32 : 8, *block = blocks[i / 10 % 3];
        FsaConfig c = default_config(g * kv_heads, kv_heads, i % 2 ? 128 : 64, block[0], block[1]);
        c.recompute = i / 30;
        for (int growing = 0; growing < 4; growing++) {
            std::vector<size_t> last(FSA_ATTENTION_BACKWARD + 2, 0);
            int64_t broken = -1;
            for (int64_t n = 1; n <= max_tokens; n += 1 + n / 256) {
                const FsaDeviceBatch batches[] = {
                    {n, n, 1, 1, NULL, NULL},             // one sequence
                    {n, n, n, n, NULL, NULL},             // as many sequences as tokens
                    {n, max_tokens, 1, 1, NULL, NULL},    // queries
                    {100, max_tokens, n, 100, NULL, NULL} // sequences
                };
                const FsaDeviceBatch &b = batches[growing];
                std::vector<size_t> now;
                for (int op = FSA_FORWARD; op <= FSA_ATTENTION_BACKWARD; op++)
                    now.push_back(fsa_workspace_size(&c, FSA_BF16, &b, (FsaOperation)op));
                now.push_back(fsa_saved_size(&c, FSA_BF16, &b));
                for (size_t k = 0; k < now.size(); k++)
                    if (now[k] < std::max<size_t>(last[k], 1) && broken < 0) broken = n;
                last = now;
            }
            CHECK(broken < 0,
                  "sizes, heads %d/%d d %d block %d topk %d recompute %d, batches %d: a size shrinks at %lld",
                  c.q_heads, c.kv_heads, c.head_dim, c.block, c.topk, c.recompute, growing,
                  (long long)broken);
        }
    }
    // The selected branch: at most 320 MiB for 64K tokens, and at most twice as much for 128K.
    for (int backward = 0; backward < 2; backward++) {
        FsaConfig c = default_config(32, 8, 128, 64, 16);
        size_t bytes[2];
        for (int64_t i = 0; i < 2; i++) {
            const int64_t n = max_tokens << i;
            FsaDeviceBatch b = {n, n, 1, 1, NULL, NULL};
            bytes[i] =
                fsa_workspace_size(&c, FSA_BF16, &b, backward ? FSA_SELECTED_BACKWARD : FSA_SELECTED_FORWARD);
        }
        CHECK(bytes[0] <= 320u << 20 && bytes[1] <= 2 * bytes[0],
              "selected branch, backward %d: %zu bytes for 64K tokens, %zu for 128K", backward, bytes[0],
              bytes[1]);
    }
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    bool small = has_flag(argc, argv, "small"), large = has_flag(argc, argv, "large");
    int shapes = small ? 5 : 200, devices = 0;
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "shapes=", 7) == 0) shapes = atoi(argv[i] + 7);
    }
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        SKIP("no GPU");
        return test_end("test_fsa");
    }
    typedef __nv_bfloat16 T;
    Random r(seed_from_args(argc, argv));
    test_errors(&r);
    test_other_device(&r);
    test_cuda_errors(&r);
    test_sizes();
    for (bool init_local : {true, false}) {
        test_branches<T>(&r, small, init_local);
        test_branches<__half>(&r, small, init_local);
    }
    test_edge_shapes(&r, small);
    test_random_shapes(&r, shapes, small);
    test_recompute(&r, small);
    test_nonfinite_sequence<T>(&r, small);
    test_nonfinite_sequence<__half>(&r, small);
    test_strides<T>(&r, small);
    test_strides<__half>(&r, small);
    test_nan_query<T>(&r, small);
    test_nan_query<__half>(&r, small);
    test_nan_key<T>(&r);
    test_nan_key<__half>(&r);
    test_max_topk<T>(&r);
    test_no_windows<T>(&r);
    test_no_windows<__half>(&r);
    test_two_streams(&r, small);
    test_graph(&r);
    printf("largest relative errors: bf16 output %.2e, gradients %.2e; fp16 output %.2e, gradients %.2e\n",
           max_error[0][0], max_error[0][1], max_error[1][0], max_error[1][1]);
    if (small)
        test_long<T>(&r, 2, 1, 64, 64, 4, {1, 330});
    else
        test_long<T>(&r, 8, 2, 128, 64, 16, {1, 50000, 1, 700});
    if (large) {
        test_long<__half>(&r, 8, 2, 64, 64, 16, {300000});
        test_long<T>(&r, 20, 4, 128, 64, 16, {1000000}); // 2.56e9 elements of q
    }
    return test_end("test_fsa");
}
