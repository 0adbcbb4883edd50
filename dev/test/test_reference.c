// test_reference.c: tests the C reference of the attention: gradients against central differences in double;
// branches and block selection against direct definitions; shapes that are no multiple of a tile; segments;
// the same bits for any number of threads; float against double.
#include "../../llmc/utils.h"
#include "../../llmc/rand.h"
#include "../../fsa/reference.h"
#include "test.h"
#ifdef _OPENMP
#include <omp.h>
#endif

enum { MAX_SEQS = 8 };

// Sequences, queries, and all inputs in double, drawn from a seed.
typedef struct {
    FsaConfig c;
    FsaBatch b;
    int64_t cu_seqlens[MAX_SEQS + 1];
    FsaSegment segments[MAX_SEQS];
    int64_t n, nq, m, sizes[8]; // N, Nq, M; elements of q, k, v, wk, pe, wv, gate, o
    double *q, *k, *v, *wk, *pe, *wv, *gate, *dout, *o;
    double *dq, *dk, *dv, *dwk, *dpe, *dwv, *dgate;
    double inv_freq[64];
    fsa_ref_State_f64 state;
    void *memory;
} Problem;

// Returns n normal random values of standard deviation `scale`.
static double *draw(int64_t n, uint64_t seed, uint64_t stream, double scale) {
    double *x = xmalloc(n * sizeof(double));
    for (int64_t i = 0; i < n; i++) x[i] = scale * rng_normal_at(seed, stream, i);
    return x;
}

static FsaConfig small_config(int g, int kv_heads, int d) {
    FsaConfig c = {.q_heads = g * kv_heads,
                   .kv_heads = kv_heads,
                   .head_dim = d,
                   .cmp_len = 8,
                   .cmp_stride = 4,
                   .block = 16,
                   .topk = 4,
                   .init_blocks = 1,
                   .local_blocks = 2,
                   .window = 13,
                   .phi = FSA_PHI_LINEAR};
    return c;
}

// lengths: of the sequences; 0 ends the list. queries: one segment (first position, count) for each sequence;
// NULL: whole sequences.
static void make_problem(Problem *p, FsaConfig c, const int64_t *lengths, const int64_t (*queries)[2],
                         uint64_t seed) {
    memset(p, 0, sizeof *p);
    p->c = c;
    int s = 0;
    for (; lengths[s]; s++) {
        p->cu_seqlens[s + 1] = p->cu_seqlens[s] + lengths[s];
        p->segments[s] = (FsaSegment){s, queries ? queries[s][0] : 0, queries ? queries[s][1] : lengths[s]};
    }
    p->b = (FsaBatch){s, p->cu_seqlens, s, p->segments};
    p->n = fsa_batch_keys(&p->b), p->nq = fsa_batch_queries(&p->b), p->m = fsa_batch_windows(&c, &p->b);
    int64_t d = c.head_dim, nq = p->nq * c.q_heads * d, nk = p->n * c.kv_heads * d;
    int64_t nw = (int64_t)c.kv_heads * c.cmp_len * d * d, ng = p->nq * (c.gate_per_token ? 3 : 3 * c.q_heads);
    int64_t sizes[8] = {nq, nk, nk, nw, nw / d, nw, ng, nq};
    memcpy(p->sizes, sizes, sizeof sizes);
    p->q = draw(nq, seed, 1, 1.5), p->k = draw(nk, seed, 2, 1.5), p->v = draw(nk, seed, 3, 1);
    p->wk = draw(nw, seed, 4, 1.0 / sqrt(c.cmp_len * d)), p->pe = draw(nw / d, seed, 5, 0.5);
    p->wv = draw(nw, seed, 6, 1.0 / sqrt(c.cmp_len * d)), p->gate = draw(ng, seed, 7, 1);
    p->dout = draw(nq, seed, 8, 1), p->o = draw(nq, seed, 9, 1);
    double **grads[7] = {&p->dq, &p->dk, &p->dv, &p->dwk, &p->dpe, &p->dwv, &p->dgate};
    for (int i = 0; i < 7; i++) *grads[i] = xcalloc(sizes[i], sizeof(double));
    for (int i = 0; i < d / 2; i++) p->inv_freq[i] = pow(100, -2.0 * i / d);
    size_t bytes = fsa_ref_state_layout_f64(&p->state, &c, p->nq, p->n, s, NULL);
    p->memory = xmalloc(bytes);
    memset(p->memory, 0xff, bytes); // NaN, so that a read of unwritten memory shows
    fsa_ref_state_layout_f64(&p->state, &c, p->nq, p->n, s, p->memory);
}

static void free_problem(Problem *p) {
    double *all[] = {p->q, p->k,  p->v,  p->wk, p->pe,  p->wv,  p->gate, p->dout,
                     p->o, p->dq, p->dk, p->dv, p->dwk, p->dpe, p->dwv,  p->dgate};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    free(p->memory);
}

static fsa_ref_PhiWeights_f64 phi_weights(const Problem *p) {
    fsa_ref_PhiWeights_f64 phi = {p->wk, p->pe, p->wv}, none = {NULL, NULL, NULL};
    return p->c.phi == FSA_PHI_MEAN ? none : phi;
}

static void run_forward(Problem *p, const int32_t *block_indices) {
    fsa_ref_PhiWeights_f64 phi = phi_weights(p);
    fsa_ref_forward_f64(&p->c, &p->b, p->q, p->k, p->v, &phi, p->inv_freq, p->gate, block_indices, &p->state,
                        p->o);
}

static void run_backward(Problem *p) {
    fsa_ref_PhiWeights_f64 phi = phi_weights(p);
    fsa_ref_PhiGradients_f64 dphi = {p->dwk, p->dpe, p->dwv}, none = {NULL, NULL, NULL};
    fsa_ref_backward_f64(&p->c, &p->b, p->k, p->v, &phi, p->inv_freq, p->gate, &p->state, p->dout, p->dq,
                         p->dk, p->dv, p->c.phi == FSA_PHI_MEAN ? &none : &dphi, p->dgate);
}

static double inner(const double *a, const double *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Returns the relative Frobenius error of grad against central differences of loss(context) in `count`
// elements of x [n].
static double difference_error(double *x, const double *grad, int64_t n, int count, double (*loss)(void *),
                               void *context) {
    const double h = 1e-5;
    double error = 0, norm = 0;
    for (int i = 0; i < count && i < n; i++) {
        int64_t j = n <= count ? i : (int64_t)((i + 0.5) * n / count);
        double x_j = x[j];
        x[j] = x_j + h;
        double up = loss(context);
        x[j] = x_j - h;
        double down = loss(context);
        x[j] = x_j;
        double numeric = (up - down) / (2 * h);
        error += (numeric - grad[j]) * (numeric - grad[j]);
        norm += grad[j] * grad[j];
    }
    return sqrt(error / (norm + 1e-30));
}

// Block indices during the differences, because selection is not differentiable.
static int32_t *fixed_indices;
static double attention_loss(void *context) {
    Problem *p = context;
    run_forward(p, fixed_indices);
    return inner(p->dout, p->o, p->sizes[7]);
}

static void test_gradients(const char *name, FsaConfig c, const int64_t *lengths,
                           const int64_t (*queries)[2]) {
    Problem p;
    make_problem(&p, c, lengths, queries, 11);
    run_forward(&p, NULL);
    int64_t num_indices = c.kv_heads * p.nq * c.topk;
    fixed_indices = xmalloc(num_indices * sizeof(int32_t));
    memcpy(fixed_indices, p.state.block_indices, num_indices * sizeof(int32_t));
    run_backward(&p);
    double *inputs[7] = {p.q, p.k, p.v, p.wk, p.pe, p.wv, p.gate};
    double *grads[7] = {p.dq, p.dk, p.dv, p.dwk, p.dpe, p.dwv, p.dgate};
    const char *names[7] = {"q", "k", "v", "wk", "pe", "wv", "gate"};
    for (int i = 0; i < 7; i++) {
        if (c.phi == FSA_PHI_MEAN && i >= 3 && i <= 5) continue;
        double error = difference_error(inputs[i], grads[i], p.sizes[i], 60, attention_loss, &p);
        CHECK(error < 1e-6, "%s: gradient of %s: error %.2e, must be below 1e-6", name, names[i], error);
    }
    free(fixed_indices);
    free_problem(&p);
}

// Each branch alone, so that a failure names its branch.
typedef struct {
    Problem *p;
    FsaVisibility rule;
    double *k, *v, *o, *lse;
} BranchRun;

static double branch_loss(void *context) {
    BranchRun *r = context;
    fsa_ref_attention_forward_f64(&r->p->c, &r->p->b, r->rule, r->p->q, r->k, r->v, fixed_indices, r->o,
                                  r->lse);
    return inner(r->p->dout, r->o, r->p->sizes[7]);
}

static void test_branches(void) {
    const char *names[] = {"causal", "window", "compressed", "selected"};
    const int64_t lengths[] = {70, 5, 41, 0};
    Problem p;
    make_problem(&p, small_config(3, 2, 6), lengths, NULL, 12);
    run_forward(&p, NULL);
    int64_t num_indices = p.c.kv_heads * p.nq * p.c.topk, nw = p.m * p.c.kv_heads * p.c.head_dim;
    fixed_indices = xmalloc(num_indices * sizeof(int32_t));
    memcpy(fixed_indices, p.state.block_indices, num_indices * sizeof(int32_t));
    for (int rule = 0; rule < 4; rule++) {
        int compressed = rule == FSA_COMPRESSED;
        int64_t nk = compressed ? nw : p.sizes[1];
        double *o = xmalloc(p.sizes[7] * 8), *lse = xmalloc(p.nq * p.c.q_heads * 8);
        double *dq = xcalloc(p.sizes[0], 8), *dk = xcalloc(nk, 8), *dv = xcalloc(nk, 8);
        BranchRun r = {
            &p, (FsaVisibility)rule, compressed ? p.state.kc : p.k, compressed ? p.state.vc : p.v, o, lse};
        branch_loss(&r);
        fsa_ref_attention_backward_f64(&p.c, &p.b, r.rule, p.q, r.k, r.v, fixed_indices, o, lse, p.dout, dq,
                                       dk, dv);
        double eq = difference_error(p.q, dq, p.sizes[0], 60, branch_loss, &r);
        double ek = difference_error(r.k, dk, nk, 60, branch_loss, &r);
        double ev = difference_error(r.v, dv, nk, 60, branch_loss, &r);
        CHECK(eq < 1e-6 && ek < 1e-6 && ev < 1e-6,
              "%s branch: errors dq %.2e dk %.2e dv %.2e, must be below 1e-6", names[rule], eq, ek, ev);
        free(o), free(lse), free(dq), free(dk), free(dv);
    }
    free(fixed_indices);
    free_problem(&p);
}

// The branches against their definition, key by key, without ranges and online softmax.
static void test_definition(void) {
    const int64_t lengths[] = {90, 1, 33, 0};
    Problem p;
    make_problem(&p, small_config(2, 2, 8), lengths, NULL, 13);
    FsaConfig *c = &p.c;
    run_forward(&p, NULL);
    int d = c->head_dim, g = c->q_heads / c->kv_heads;
    double max_error = 0, max_lse_error = 0;
    int64_t window0 = 0;
    for (int64_t s = 0; s < p.b.num_seqs; s++) {
        int64_t start = p.cu_seqlens[s], n = p.cu_seqlens[s + 1] - start;
        for (int64_t t = 0; t < n; t++) {
            for (int head = 0; head < c->q_heads; head++) {
                int h = head / g;
                const double *q = p.state.q + ((start + t) * c->q_heads + head) * d;
                const int32_t *indices = p.state.block_indices + (h * p.nq + start + t) * c->topk;
                for (int branch = 0; branch < 3; branch++) {
                    double sum = 0, out[8] = {0};
                    int64_t keys = branch == 0 ? fsa_num_windows(c, n) : n;
                    for (int64_t j = 0; j < keys; j++) {
                        int visible = 0;
                        if (branch == 0) visible = c->cmp_stride * j + c->cmp_len - 1 <= t;
                        if (branch == 2) visible = j <= t && j > t - c->window;
                        for (int i = 0; branch == 1 && i < c->topk; i++)
                            visible |= indices[i] == j / c->block && j <= t;
                        if (!visible) continue;
                        int64_t offset = ((branch == 0 ? window0 : start) + j) * c->kv_heads * d + h * d;
                        const double *k = (branch == 0 ? p.state.kc : p.state.k) + offset;
                        const double *v = (branch == 0 ? p.state.vc : p.v) + offset;
                        double e = exp(inner(q, k, d) / sqrt(d));
                        sum += e;
                        for (int i = 0; i < d; i++) out[i] += e * v[i];
                    }
                    int64_t row = (start + t) * c->q_heads + head;
                    for (int i = 0; i < d; i++) {
                        double want = sum > 0 ? out[i] / sum : 0;
                        max_error = fmax(max_error, fabs(want - p.state.o[branch][row * d + i]));
                    }
                    double lse = p.state.lse[branch][row];
                    if (sum > 0) max_lse_error = fmax(max_lse_error, fabs(log(sum) - lse));
                    CHECK(sum > 0 || lse == -INFINITY,
                          "branch %d: lse %g of a row without keys, must be -inf", branch, lse);
                }
            }
        }
        window0 += fsa_num_windows(c, n);
    }
    CHECK(max_error < 1e-12, "outputs differ by %.2e", max_error);
    CHECK(max_lse_error < 1e-12, "lse differs by %.2e", max_lse_error);
    free_problem(&p);
}

// Compression: kc and vc of each window by the equation; kc rotated to position s*i.
static void test_compression(void) {
    const int64_t lengths[] = {29, 7, 8, 0};
    Problem p;
    make_problem(&p, small_config(1, 2, 6), lengths, NULL, 14);
    run_forward(&p, NULL);
    FsaConfig *c = &p.c;
    int d = c->head_dim, l = c->cmp_len;
    CHECK(p.m == 6 + 0 + 1, "windows of 29, 7 and 8 tokens: %lld", (long long)p.m);
    double max_error = 0;
    int64_t row = 0;
    for (int64_t s = 0; s < p.b.num_seqs; s++) {
        int64_t m = fsa_num_windows(c, p.cu_seqlens[s + 1] - p.cu_seqlens[s]);
        for (int64_t i = 0; i < m; i++, row++) {
            for (int h = 0; h < c->kv_heads; h++) {
                double kc[6], vc[6];
                for (int o = 0; o < d; o++) {
                    kc[o] = vc[o] = 0;
                    for (int r = 0; r < l; r++) {
                        for (int e = 0; e < d; e++) {
                            int64_t in =
                                ((p.cu_seqlens[s] + i * c->cmp_stride + r) * c->kv_heads + h) * d + e;
                            int64_t w = ((int64_t)h * l * d + r * d + e) * d + o;
                            kc[o] += (p.k[in] + p.pe[(h * l + r) * d + e]) * p.wk[w];
                            vc[o] += p.v[in] * p.wv[w];
                        }
                    }
                }
                for (int o = 0; o < d; o++) {
                    double angle = (double)(c->cmp_stride * i) * p.inv_freq[o % (d / 2)];
                    double other = o < d / 2 ? -kc[o + d / 2] : kc[o - d / 2];
                    int64_t offset = (row * c->kv_heads + h) * d + o;
                    max_error =
                        fmax(max_error, fabs(kc[o] * cos(angle) + other * sin(angle) - p.state.kc[offset]));
                    max_error = fmax(max_error, fabs(vc[o] - p.state.vc[offset]));
                }
            }
        }
    }
    CHECK(max_error < 1e-12, "compressed keys and values differ by %.2e", max_error);
    free_problem(&p);
}

// Block scores with the default l, s, B: w_ij = 1, 2, 2, 2, 1 for windows 4j-1 .. 4j+3.
static void test_scores(void) {
    const int64_t lengths[] = {400, 0};
    Problem p;
    FsaConfig c = small_config(2, 1, 8);
    c.cmp_len = 32, c.cmp_stride = 16, c.block = 64, c.topk = 4;
    make_problem(&p, c, lengths, NULL, 15);
    run_forward(&p, NULL);
    const int64_t queries[] = {31, 63, 64, 200, 399};
    const double weights[] = {1, 2, 2, 2, 1};
    for (int i = 0; i < 5; i++) {
        int64_t t = queries[i], seen = fsa_num_windows(&c, t + 1);
        double scores[16], P[32] = {0}, max_error = 0;
        int64_t blocks =
            fsa_ref_block_scores_f64(&c, &p.b, p.state.q, p.state.kc, p.state.lse[0], t, 0, scores);
        CHECK(blocks == t / 64 + 1, "query %lld has %lld blocks", (long long)t, (long long)blocks);
        for (int64_t w = 0; w < seen; w++) {
            for (int head = 0; head < 2; head++) {
                double s = inner(p.state.q + (t * 2 + head) * 8, p.state.kc + w * 8, 8) / sqrt(8);
                P[w] += exp(s - p.state.lse[0][t * 2 + head]);
            }
        }
        for (int64_t j = 0; j < blocks; j++) {
            double want = 0;
            for (int k = 0; k < 5; k++) {
                int64_t w = 4 * j - 1 + k;
                if (w >= 0 && w < seen) want += weights[k] * P[w];
            }
            max_error = fmax(max_error, fabs(want - scores[j]));
        }
        CHECK(max_error < 1e-12, "scores of query %lld differ by %.2e", (long long)t, max_error);
    }
    free_problem(&p);
}

// Checks the block indices of all rows: min(T, blocks) distinct ones, ascending and causal, among them the
// initial and local blocks; no block that is left out has a greater score than a selected one, or an equal
// score and a lower index.
static void check_block_indices(const Problem *p, const char *name) {
    const FsaConfig *c = &p->c;
    double scores[512];
    int bad_order = 0, bad_init_local = 0, bad_top = 0;
    int64_t row = 0;
    for (int64_t s = 0; s < p->b.num_segments; s++) {
        for (int64_t i = 0; i < p->segments[s].len; i++, row++) {
            for (int h = 0; h < c->kv_heads; h++) {
                const int32_t *indices = p->state.block_indices + (h * p->nq + row) * c->topk;
                int64_t blocks = fsa_ref_block_scores_f64(c, &p->b, p->state.q, p->state.kc, p->state.lse[0],
                                                          row, h, scores);
                int want = blocks < c->topk ? (int)blocks : c->topk;
                char in[512] = {0};
                for (int k = 0; k < c->topk; k++) {
                    int ok = k >= want ? indices[k] == -1
                                       : indices[k] >= 0 && indices[k] < blocks &&
                                             (k == 0 || indices[k] > indices[k - 1]);
                    if (!ok)
                        bad_order++;
                    else if (k < want)
                        in[indices[k]] = 1;
                }
                for (int64_t j = 0; j < blocks; j++) {
                    int init_local = j < c->init_blocks || j >= blocks - c->local_blocks;
                    if (init_local && !in[j]) bad_init_local++;
                    if (init_local || in[j]) continue;
                    // left-out block j against selected block k
                    for (int64_t k = c->init_blocks; k < blocks - c->local_blocks; k++) {
                        if (in[k] && (scores[j] > scores[k] || (scores[j] == scores[k] && j < k))) bad_top++;
                    }
                }
            }
        }
    }
    CHECK(bad_order == 0, "%s: %d block indices out of order or range", name, bad_order);
    CHECK(bad_init_local == 0, "%s: %d initial or local blocks missing", name, bad_init_local);
    CHECK(bad_top == 0, "%s: %d blocks with greater scores left out", name, bad_top);
}

static void test_selection(void) {
    const int64_t lengths[] = {300, 15, 130, 0};
    Problem p;
    make_problem(&p, small_config(4, 2, 8), lengths, NULL, 16);
    run_forward(&p, NULL);
    check_block_indices(&p, "random");
    free_problem(&p);

    // Ties: with q = 0 all windows have the same probability, so all inner blocks have the same score. Ties
    // must go to the lower index.
    make_problem(&p, small_config(2, 1, 8), lengths, NULL, 17);
    memset(p.q, 0, p.sizes[0] * sizeof(double));
    run_forward(&p, NULL);
    check_block_indices(&p, "ties");
    const int32_t *last = p.state.block_indices + 299 * 4;
    CHECK(last[0] == 0 && last[1] == 1 && last[2] == 17 && last[3] == 18,
          "query 299 with ties: blocks %d %d %d %d, must be 0 1 17 18", last[0], last[1], last[2], last[3]);
    free_problem(&p);

    FsaConfig c = small_config(1, 1, 8); // no initial and local blocks
    c.init_blocks = c.local_blocks = 0;
    make_problem(&p, c, lengths, NULL, 18);
    run_forward(&p, NULL);
    check_block_indices(&p, "no initial and local blocks");
    free_problem(&p);
}

// Segments that are slices of the queries give the same rows as whole sequences.
static void test_segments(void) {
    const int64_t lengths[] = {100, 40, 0}, slices[][2] = {{37, 50}, {0, 40}};
    Problem all, part;
    make_problem(&all, small_config(2, 2, 8), lengths, NULL, 19);
    make_problem(&part, small_config(2, 2, 8), lengths, slices, 19);
    int64_t row = all.c.q_heads * all.c.head_dim;
    for (int s = 0, dst = 0; s < 2; s++) {
        int64_t src = all.cu_seqlens[s] + slices[s][0];
        memcpy(part.q + dst * row, all.q + src * row, slices[s][1] * row * 8);
        memcpy(part.gate + dst * 3 * 4, all.gate + src * 3 * 4, slices[s][1] * 3 * 4 * 8);
        dst += slices[s][1];
    }
    run_forward(&all, NULL);
    run_forward(&part, NULL);
    int same = memcmp(part.o, all.o + 37 * row, 50 * row * 8) == 0 &&
               memcmp(part.o + 50 * row, all.o + 100 * row, 40 * row * 8) == 0;
    CHECK(same, "the rows of query segments differ from those of whole sequences");
    free_problem(&all), free_problem(&part);
}

// Sequences without tokens or queries change no bit of the other sequences.
static void test_empty_sequences(void) {
    const int64_t lengths[] = {60, 0}, cu_seqlens[] = {0, 0, 60, 60, 60};
    const FsaSegment segment = {1, 0, 60};
    Problem alone, among;
    make_problem(&alone, small_config(2, 2, 8), lengths, NULL, 23);
    make_problem(&among, small_config(2, 2, 8), lengths, NULL, 23);
    among.b = (FsaBatch){4, cu_seqlens, 1, &segment};
    run_forward(&alone, NULL), run_backward(&alone);
    size_t bytes = fsa_ref_state_layout_f64(&among.state, &among.c, 60, 60, 4, NULL);
    free(among.memory);
    fsa_ref_state_layout_f64(&among.state, &among.c, 60, 60, 4, among.memory = xmalloc(bytes));
    run_forward(&among, NULL), run_backward(&among);
    int same = memcmp(alone.o, among.o, alone.sizes[7] * 8) == 0 &&
               memcmp(alone.dq, among.dq, alone.sizes[0] * 8) == 0 &&
               memcmp(alone.dk, among.dk, alone.sizes[1] * 8) == 0 &&
               memcmp(alone.dv, among.dv, alone.sizes[2] * 8) == 0 &&
               memcmp(alone.dwk, among.dwk, alone.sizes[3] * 8) == 0;
    CHECK(same, "empty sequences change the results of the others");
    free_problem(&alone), free_problem(&among);
}

// Runs one shape forward and backward: results are finite, and have the same bits with 1, 2 and 5 threads.
static void test_shape(const char *name, FsaConfig c, const int64_t *lengths) {
    double *first_o = NULL, *first_dk = NULL;
    const int threads[] = {1, 2, 5};
    for (int i = 0; i < 3; i++) {
#ifdef _OPENMP
        omp_set_num_threads(threads[i]);
#endif
        (void)threads;
        Problem p;
        make_problem(&p, c, lengths, NULL, 20);
        run_forward(&p, NULL);
        run_backward(&p);
        int finite = 1;
        for (int64_t j = 0; j < p.sizes[0]; j++) finite &= isfinite(p.o[j]) && isfinite(p.dq[j]);
        for (int64_t j = 0; j < p.sizes[1]; j++) finite &= isfinite(p.dk[j]) && isfinite(p.dv[j]);
        for (int64_t j = 0; j < p.sizes[3]; j++) finite &= isfinite(p.dwk[j]) && isfinite(p.dwv[j]);
        CHECK(finite, "%s: a value is not finite", name);
        if (i == 0) {
            check_block_indices(&p, name);
            first_o = p.o, first_dk = p.dk;
            p.o = p.dk = NULL;
        } else {
            CHECK(memcmp(first_o, p.o, p.sizes[7] * 8) == 0 && memcmp(first_dk, p.dk, p.sizes[1] * 8) == 0,
                  "%s: bits differ with %d threads", name, threads[i]);
        }
        free_problem(&p);
    }
    free(first_o), free(first_dk);
#ifdef _OPENMP
    omp_set_num_threads(omp_get_num_procs());
#endif
}

static void test_shapes(void) {
    const int64_t lengths[] = {1, 7, 8, 15, 16, 17, 31, 32, 63, 65, 507};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        int64_t one[] = {lengths[i], 0};
        char name[64];
        snprintf(name, sizeof name, "n = %lld", (long long)lengths[i]);
        test_shape(name, small_config(2, 1, 8), one);
    }
    const int groups[] = {1, 3, 5, 7, 16};
    for (int i = 0; i < 5; i++) {
        const int64_t mixed[] = {1, 97, 2, 33, 0};
        char name[64];
        snprintf(name, sizeof name, "g = %d", groups[i]);
        test_shape(name, small_config(groups[i], 2, 4), mixed);
    }
    const int64_t mixed[] = {1, 700, 0};
    FsaConfig c = small_config(2, 1, 64);
    c.cmp_len = 32, c.cmp_stride = 16, c.block = 64, c.topk = 5, c.window = 111;
    test_shape("the default l, s, B and d = 64", c, mixed);
    c.head_dim = 128, c.block = 128, c.window = 1, c.gate_per_token = 1, c.phi = FSA_PHI_MEAN;
    test_shape("B = 128, d = 128, W = 1, mean, a gate per token", c, mixed);
    c.head_dim = 8, c.cmp_len = 48, c.cmp_stride = 16, c.block = 48, c.window = 5000;
    test_shape("l = B = 48, W beyond the sequence", c, mixed);
}

// Float against double, with the block indices of double: a sequence of one token beside a long one.
static void test_float(void) {
    const int64_t lengths[] = {1, 1500, 0};
    Problem p;
    FsaConfig c = small_config(4, 2, 32);
    c.cmp_len = 32, c.cmp_stride = 16, c.block = 64, c.window = 100;
    make_problem(&p, c, lengths, NULL, 21);
    run_forward(&p, NULL);
    run_backward(&p);
    double *in[8] = {p.q, p.k, p.v, p.wk, p.pe, p.wv, p.gate, p.dout};
    double *want[8] = {p.dq, p.dk, p.dv, p.dwk, p.dpe, p.dwv, p.dgate, p.o};
    float *x[8], *y[8];
    for (int i = 0; i < 8; i++) {
        x[i] = xmalloc(p.sizes[i] * sizeof(float));
        y[i] = xcalloc(p.sizes[i], sizeof(float));
        for (int64_t j = 0; j < p.sizes[i]; j++) x[i][j] = (float)in[i][j];
    }
    fsa_ref_State_f32 s;
    fsa_ref_state_layout_f32(&s, &c, p.nq, p.n, 2,
                             xmalloc(fsa_ref_state_layout_f32(&s, &c, p.nq, p.n, 2, NULL)));
    fsa_ref_PhiWeights_f32 phi = {x[3], x[4], x[5]};
    fsa_ref_PhiGradients_f32 dphi = {y[3], y[4], y[5]};
    fsa_ref_forward_f32(&c, &p.b, x[0], x[1], x[2], &phi, p.inv_freq, x[6], p.state.block_indices, &s, y[7]);
    fsa_ref_backward_f32(&c, &p.b, x[1], x[2], &phi, p.inv_freq, x[6], &s, x[7], y[0], y[1], y[2], &dphi,
                         y[6]);
    const char *names[8] = {"dq", "dk", "dv", "dwk", "dpe", "dwv", "dgate", "o"};
    for (int i = 0; i < 8; i++) {
        double error = 0, norm = 0;
        for (int64_t j = 0; j < p.sizes[i]; j++) {
            error += (y[i][j] - want[i][j]) * (y[i][j] - want[i][j]);
            norm += want[i][j] * want[i][j];
        }
        CHECK(sqrt(error / norm) < 2e-5, "%s in float: error %.2e, must be below 2e-5", names[i],
              sqrt(error / norm));
        free(x[i]), free(y[i]);
    }
    free(s.q);
    free_problem(&p);
}

// RoPE at position 1,000,000, which needs the angle in double.
static void test_rope(void) {
    float x[4] = {1, 2, 3, 4};
    double inv_freq[2] = {0.9, 0.001};
    fsa_ref_rope_f32(x, 1, 1, 4, 1000000, 1, inv_freq, 0);
    double a = 0.9 * 1000000, b = 0.001 * 1000000;
    double want[4] = {cos(a) - 3 * sin(a), 2 * cos(b) - 4 * sin(b), 3 * cos(a) + sin(a),
                      4 * cos(b) + 2 * sin(b)};
    for (int i = 0; i < 4; i++)
        CHECK(fabs(x[i] - want[i]) < 1e-6, "channel %d: %g, not %g", i, x[i], want[i]);
    fsa_ref_rope_f32(x, 1, 1, 4, 1000000, 1, inv_freq, 1);
    for (int i = 0; i < 4; i++)
        CHECK(fabs(x[i] - (i + 1)) < 1e-6, "after the inverse rotation channel %d is %g", i, x[i]);
}

int main(void) {
    const int64_t packed[] = {75, 1, 6, 50, 0}, slices[][2] = {{20, 40}, {0, 1}, {2, 3}, {49, 1}};
    FsaConfig c = small_config(3, 2, 6);
    test_gradients("linear, g = 3, packed", c, packed, NULL);
    test_gradients("query segments", c, packed, slices);
    c.phi = FSA_PHI_MEAN, c.gate_per_token = 1, c.scale = 0.7f;
    test_gradients("mean, a gate per token, own scale", c, packed, NULL);
    test_branches();
    CHECK(fsa_version() == 1000 * FSA_VERSION_MAJOR + FSA_VERSION_MINOR, "version %d", fsa_version());
    test_definition();
    test_compression();
    test_scores();
    test_selection();
    test_segments();
    test_empty_sequences();
    test_shapes();
    test_float();
    test_rope();
    return test_end("reference");
}
