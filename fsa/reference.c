// reference.c: native sparse attention step by step, as fsa/README.md defines it. It is compiled twice: as it
// is for float, and with -DFSA_REF_DOUBLE for double.
//
// A task is one (sequence, KV head) pair. One thread processes the queries of a task in order, and no other
// thread writes the task's rows of any gradient. So results are bitwise
// reproducible for any number of threads.
#include "reference.h"
#include <math.h>
#include <string.h>

#ifdef FSA_REF_DOUBLE
typedef double real;
#define FSA_REF(name) fsa_ref_##name##_f64
#define EXP exp
#define LOG log
#else
typedef float real;
#define FSA_REF(name) fsa_ref_##name##_f32
#define EXP expf
#define LOG logf
#endif

enum { TILE = 64 }; // keys of one step of the online softmax

#ifndef FSA_REF_DOUBLE // these serve both precisions and are compiled once
int64_t fsa_batch_keys(const FsaBatch *b) {
    return b->cu_seqlens[b->num_seqs];
}

int64_t fsa_batch_queries(const FsaBatch *b) {
    int64_t n = 0;
    for (int64_t i = 0; i < b->num_segments; i++) n += b->segments[i].len;
    return n;
}

int64_t fsa_batch_windows(const FsaConfig *c, const FsaBatch *b) {
    int64_t m = 0;
    for (int64_t s = 0; s < b->num_seqs; s++)
        m += fsa_num_windows(c, b->cu_seqlens[s + 1] - b->cu_seqlens[s]);
    return m;
}
#endif

static real softmax_scale(const FsaConfig *c) {
    return c->scale ? (real)c->scale : (real)(1 / sqrt(c->head_dim));
}

// sum_i a_i b_i. The pragma allows a sum in vector lanes; the compiler fixes the order of additions.
static inline real dot(const real *a, const real *b, int n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// y += a * x
static inline void axpy(real *restrict y, real a, const real *restrict x, int n) {
    for (int i = 0; i < n; i++) y[i] += a * x[i];
}

// ---------------------------------------------------------------------------------------------
// Tasks: one (sequence, KV head) pair each

typedef struct {
    int64_t seq;
    int64_t key0, n; // first row of the sequence in k and v, and its number of tokens
    int64_t window0; // first row of the sequence in kc and vc
    int64_t segment; // first segment of the sequence; num_segments if it has none
    int64_t query;   // first query of that segment
    int h;           // KV head
} Task;

static Task make_task(const FsaConfig *c, const FsaBatch *b, int64_t index) {
    Task t = {.seq = index / c->kv_heads, .h = (int)(index % c->kv_heads)};
    t.key0 = b->cu_seqlens[t.seq];
    t.n = b->cu_seqlens[t.seq + 1] - t.key0;
    for (int64_t s = 0; s < t.seq; s++) {
        t.window0 += fsa_num_windows(c, b->cu_seqlens[s + 1] - b->cu_seqlens[s]);
    }
    while (t.segment < b->num_segments && b->segments[t.segment].seq < t.seq) {
        t.query += b->segments[t.segment++].len;
    }
    return t;
}

#define FOR_EACH_TASK(c, b)                                                                                  \
    _Pragma("omp parallel for schedule(dynamic, 1)") for (int64_t task_ = 0;                                 \
                                                          task_ < (b)->num_seqs * (c)->kv_heads; task_++)

// Runs the statement that follows for every query of task t, with its index `query` in q and its position
// `pos`.
#define FOR_EACH_QUERY(b, t)                                                                                 \
    for (int64_t seg_ = (t).segment, query = (t).query;                                                      \
         seg_ < (b)->num_segments && (b)->segments[seg_].seq == (t).seq; seg_++)                             \
        for (int64_t i_ = 0, pos = (b)->segments[seg_].pos; i_ < (b)->segments[seg_].len;                    \
             i_++, pos++, query++)

// ---------------------------------------------------------------------------------------------
// RoPE

void FSA_REF(rope)(real *x, int64_t rows, int heads, int d, int64_t first, int64_t stride,
                   const double *inv_freq, int inverse) {
    if (!inv_freq) return;
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        real cosine[FSA_MAX_HEAD_DIM / 2], sine[FSA_MAX_HEAD_DIM / 2];
        for (int i = 0; i < d / 2; i++) {
            double angle = (double)(first + r * stride) * inv_freq[i];
            cosine[i] = (real)cos(angle);
            sine[i] = (real)(inverse ? -sin(angle) : sin(angle));
        }
        for (int h = 0; h < heads; h++) {
            real *lo = x + (r * heads + h) * d, *hi = lo + d / 2;
            for (int i = 0; i < d / 2; i++) {
                real a = lo[i], b = hi[i];
                lo[i] = a * cosine[i] - b * sine[i];
                hi[i] = b * cosine[i] + a * sine[i];
            }
        }
    }
}

void FSA_REF(rope_queries)(const FsaConfig *c, const FsaBatch *b, real *q, const double *inv_freq,
                           int inverse) {
    for (int64_t s = 0; s < b->num_segments; s++) {
        FSA_REF(rope)
        (q, b->segments[s].len, c->q_heads, c->head_dim, b->segments[s].pos, 1, inv_freq, inverse);
        q += b->segments[s].len * c->q_heads * c->head_dim;
    }
}

void FSA_REF(rope_keys)(const FsaConfig *c, const FsaBatch *b, real *k, const double *inv_freq, int inverse) {
    for (int64_t s = 0; s < b->num_seqs; s++) {
        int64_t n = b->cu_seqlens[s + 1] - b->cu_seqlens[s];
        FSA_REF(rope)(k, n, c->kv_heads, c->head_dim, 0, 1, inv_freq, inverse);
        k += n * c->kv_heads * c->head_dim;
    }
}

static void rope_windows(const FsaConfig *c, const FsaBatch *b, real *kc, const double *inv_freq,
                         int inverse) {
    for (int64_t s = 0; s < b->num_seqs; s++) {
        int64_t m = fsa_num_windows(c, b->cu_seqlens[s + 1] - b->cu_seqlens[s]);
        FSA_REF(rope)(kc, m, c->kv_heads, c->head_dim, 0, c->cmp_stride, inv_freq, inverse);
        kc += m * c->kv_heads * c->head_dim;
    }
}

// ---------------------------------------------------------------------------------------------
// Compression

// out [d] = phi of the window whose l tokens are at x, `stride` elements apart. w NULL: mean.
static void phi_forward(const FsaConfig *c, const real *x, int64_t stride, const real *pe, const real *w,
                        real *out) {
    int l = c->cmp_len, d = c->head_dim;
    memset(out, 0, sizeof(real) * d);
    for (int r = 0; r < l; r++) {
        if (!w) {
            axpy(out, (real)1 / l, x + r * stride, d);
            continue;
        }
        for (int i = 0; i < d; i++) {
            real xi = x[r * stride + i] + (pe ? pe[r * d + i] : 0);
            axpy(out, xi, w + (int64_t)(r * d + i) * d, d);
        }
    }
}

// Adds the gradients of dout [d] to dx, dpe and dw.
static void phi_backward(const FsaConfig *c, const real *x, int64_t stride, const real *pe, const real *w,
                         const real *dout, real *dx, real *dpe, real *dw) {
    int l = c->cmp_len, d = c->head_dim;
    for (int r = 0; r < l; r++) {
        if (!w) {
            axpy(dx + r * stride, (real)1 / l, dout, d);
            continue;
        }
        for (int i = 0; i < d; i++) {
            int64_t row = (int64_t)(r * d + i) * d;
            real dxi = dot(w + row, dout, d);
            dx[r * stride + i] += dxi;
            if (dpe) dpe[r * d + i] += dxi;
            axpy(dw + row, x[r * stride + i] + (pe ? pe[r * d + i] : 0), dout, d);
        }
    }
}

// The parameter of KV head h in an array with `size` elements per head; NULL stays NULL.
#define HEAD(pointer, h, size) ((pointer) ? (pointer) + (int64_t)(h) * (size) : NULL)

void FSA_REF(compress_forward)(const FsaConfig *c, const FsaBatch *b, const real *k, const real *v,
                               const FSA_REF(PhiWeights) * phi, const double *inv_freq, real *kc, real *vc) {
    int hkv = c->kv_heads, d = c->head_dim;
    int64_t token = (int64_t)hkv * d, ld = (int64_t)c->cmp_len * d;
    FOR_EACH_TASK(c, b) {
        Task t = make_task(c, b, task_);
        int64_t m = fsa_num_windows(c, t.n);
        for (int64_t i = 0; i < m; i++) {
            int64_t in = (t.key0 + i * c->cmp_stride) * token + t.h * d,
                    out = (t.window0 + i) * token + t.h * d;
            phi_forward(c, k + in, token, HEAD(phi->pe, t.h, ld), HEAD(phi->wk, t.h, ld * d), kc + out);
            phi_forward(c, v + in, token, NULL, HEAD(phi->wv, t.h, ld * d), vc + out);
        }
    }
    rope_windows(c, b, kc, inv_freq, 0);
}

void FSA_REF(compress_backward)(const FsaConfig *c, const FsaBatch *b, const real *k, const real *v,
                                const FSA_REF(PhiWeights) * phi, const double *inv_freq, real *dkc,
                                const real *dvc, real *dk, real *dv, const FSA_REF(PhiGradients) * dphi) {
    int hkv = c->kv_heads, d = c->head_dim;
    int64_t token = (int64_t)hkv * d, ld = (int64_t)c->cmp_len * d;
    rope_windows(c, b, dkc, inv_freq, 1);
    // The weight gradients of a head sum over all sequences, so one thread processes all sequences of a head.
#pragma omp parallel for schedule(dynamic, 1)
    for (int h = 0; h < hkv; h++) {
        for (int64_t s = 0; s < b->num_seqs; s++) {
            Task t = make_task(c, b, s * hkv + h);
            int64_t m = fsa_num_windows(c, t.n);
            for (int64_t i = 0; i < m; i++) {
                int64_t in = (t.key0 + i * c->cmp_stride) * token + h * d,
                        out = (t.window0 + i) * token + h * d;
                phi_backward(c, k + in, token, HEAD(phi->pe, h, ld), HEAD(phi->wk, h, ld * d), dkc + out,
                             dk + in, HEAD(dphi->dpe, h, ld), HEAD(dphi->dwk, h, ld * d));
                phi_backward(c, v + in, token, NULL, HEAD(phi->wv, h, ld * d), dvc + out, dv + in, NULL,
                             HEAD(dphi->dwv, h, ld * d));
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Attention. A visibility rule gives each query a list of ranges of keys.

typedef struct {
    int64_t begin, end; // keys (or windows) begin..end-1, counted from the first of the sequence
} Range;

static int64_t visible_windows(const FsaConfig *c, int64_t pos) {
    return fsa_num_windows(c, pos + 1);
}

// Writes the ranges of keys that the query at position pos sees, and returns their number, at most max(1, T).
// indices [T]: the query's block indices, for FSA_SELECTED.
static int visible_ranges(const FsaConfig *c, FsaVisibility rule, int64_t pos, const int32_t *indices,
                          Range *r) {
    r[0].begin = 0;
    switch (rule) {
    case FSA_CAUSAL:
        r[0].end = pos + 1;
        return 1;
    case FSA_WINDOW:
        if (pos + 1 > c->window) r[0].begin = pos + 1 - c->window;
        r[0].end = pos + 1;
        return 1;
    case FSA_COMPRESSED:
        r[0].end = visible_windows(c, pos);
        return 1;
    case FSA_SELECTED:
        break;
    }
    int count = 0;
    for (int i = 0; i < c->topk && indices[i] >= 0; i++) {
        int64_t begin = (int64_t)indices[i] * c->block, end = begin + c->block;
        if (end > pos + 1) end = pos + 1; // causal in the query's own block
        if (count && r[count - 1].end == begin) {
            r[count - 1].end = end; // join adjacent blocks
        } else {
            r[count].begin = begin;
            r[count++].end = end;
        }
    }
    return count;
}

void FSA_REF(attention_forward)(const FsaConfig *c, const FsaBatch *b, FsaVisibility rule, const real *q,
                                const real *k, const real *v, const int32_t *block_indices, real *o,
                                real *lse) {
    int hq = c->q_heads, hkv = c->kv_heads, g = hq / hkv, d = c->head_dim;
    int64_t token = (int64_t)hkv * d, nq = fsa_batch_queries(b);
    real scale = softmax_scale(c);
    FOR_EACH_TASK(c, b) {
        Task t = make_task(c, b, task_);
        int64_t key0 = rule == FSA_COMPRESSED ? t.window0 : t.key0;
        const real *kh = k + key0 * token + t.h * d, *vh = v + key0 * token + t.h * d;
        FOR_EACH_QUERY(b, t) {
            Range ranges[FSA_MAX_TOPK];
            int count = visible_ranges(
                c, rule, pos, rule == FSA_SELECTED ? block_indices + (t.h * nq + query) * c->topk : NULL,
                ranges);
            for (int head = t.h * g; head < (t.h + 1) * g; head++) {
                // Online softmax: maximum and sum of exponentials so far; out is normalized at the end.
                const real *qr = q + (query * hq + head) * d;
                real *out = o + (query * hq + head) * d;
                real max = -INFINITY, sum = 0, s[TILE];
                memset(out, 0, sizeof(real) * d);
                for (int r = 0; r < count; r++) {
                    for (int64_t j0 = ranges[r].begin; j0 < ranges[r].end; j0 += TILE) {
                        int nj = (int)(ranges[r].end - j0 < TILE ? ranges[r].end - j0 : TILE);
                        real tile_max = max;
                        for (int j = 0; j < nj; j++) {
                            s[j] = scale * dot(qr, kh + (j0 + j) * token, d);
                            if (s[j] > tile_max) tile_max = s[j];
                        }
                        real rescale = EXP(max - tile_max); // 0 for the first tile
                        max = tile_max;
                        sum *= rescale;
                        for (int i = 0; i < d; i++) out[i] *= rescale;
                        for (int j = 0; j < nj; j++) {
                            real p = EXP(s[j] - max);
                            sum += p;
                            axpy(out, p, vh + (j0 + j) * token, d);
                        }
                    }
                }
                lse[query * hq + head] = sum > 0 ? max + LOG(sum) : -INFINITY;
                if (sum > 0) {
                    for (int i = 0; i < d; i++) out[i] /= sum;
                }
            }
        }
    }
}

void FSA_REF(attention_backward)(const FsaConfig *c, const FsaBatch *b, FsaVisibility rule, const real *q,
                                 const real *k, const real *v, const int32_t *block_indices, const real *o,
                                 const real *lse, const real *dout, real *dq, real *dk, real *dv) {
    int hq = c->q_heads, hkv = c->kv_heads, g = hq / hkv, d = c->head_dim;
    int64_t token = (int64_t)hkv * d, nq = fsa_batch_queries(b);
    real scale = softmax_scale(c);
    FOR_EACH_TASK(c, b) {
        Task t = make_task(c, b, task_);
        int64_t kv_offset = (rule == FSA_COMPRESSED ? t.window0 : t.key0) * token + t.h * d;
        const real *kh = k + kv_offset, *vh = v + kv_offset;
        real *dkh = dk + kv_offset, *dvh = dv + kv_offset;
        FOR_EACH_QUERY(b, t) {
            Range ranges[FSA_MAX_TOPK];
            int count = visible_ranges(
                c, rule, pos, rule == FSA_SELECTED ? block_indices + (t.h * nq + query) * c->topk : NULL,
                ranges);
            for (int head = t.h * g; head < (t.h + 1) * g; head++) {
                int64_t offset = (query * hq + head) * d;
                const real *qr = q + offset, *dor = dout + offset;
                real *dqr = dq + offset;
                // dS = P (dP - delta), delta = sum_j P_j dP_j = <dout, o>
                real delta = dot(dor, o + offset, d);
                for (int r = 0; r < count; r++) {
                    for (int64_t j = ranges[r].begin; j < ranges[r].end; j++) {
                        real p = EXP(scale * dot(qr, kh + j * token, d) - lse[query * hq + head]);
                        real ds = scale * p * (dot(dor, vh + j * token, d) - delta);
                        axpy(dqr, ds, kh + j * token, d);
                        axpy(dkh + j * token, ds, qr, d);
                        axpy(dvh + j * token, p, dor, d);
                    }
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Block scores and block selection

// scores [floor(pos/B) + 1]: score_j = sum_i w_ij p_i, where p_i is the sum of exp(scale q.kc_i - lse) over
// the heads of the group.
static void query_scores(const FsaConfig *c, const real *q, const real *kc, const real *lse, int64_t token,
                         int64_t pos, real *scores) {
    int g = c->q_heads / c->kv_heads, d = c->head_dim, s = c->cmp_stride;
    int64_t blocks = pos / c->block + 1, seen = visible_windows(c, pos);
    real scale = softmax_scale(c);
    for (int64_t j = 0; j < blocks; j++) scores[j] = 0;
    for (int64_t i = 0; i < seen; i++) {
        real p = 0;
        for (int r = 0; r < g; r++) p += EXP(scale * dot(q + r * d, kc + i * token, d) - lse[r]);
        // w_ij is the number of strides of window i that lie in block j.
        for (int cell = 0; cell < c->cmp_len / s; cell++) scores[(i * s + cell * s) / c->block] += p;
    }
}

int64_t FSA_REF(block_scores)(const FsaConfig *c, const FsaBatch *b, const real *q, const real *kc,
                              const real *lse_c, int64_t query, int h, real *scores) {
    int g = c->q_heads / c->kv_heads;
    int64_t token = (int64_t)c->kv_heads * c->head_dim, row0 = 0, window0 = 0, seg = 0;
    while (row0 + b->segments[seg].len <= query) row0 += b->segments[seg++].len;
    for (int64_t s = 0; s < b->segments[seg].seq; s++) {
        window0 += fsa_num_windows(c, b->cu_seqlens[s + 1] - b->cu_seqlens[s]);
    }
    int64_t pos = b->segments[seg].pos + query - row0, row = query * c->q_heads + h * g;
    query_scores(c, q + row * c->head_dim, kc + window0 * token + h * c->head_dim, lse_c + row, token, pos,
                 scores);
    return pos / c->block + 1;
}

void FSA_REF(select_blocks)(const FsaConfig *c, const FsaBatch *b, const real *q, const real *kc,
                            const real *lse_c, real *scratch, int32_t *block_indices) {
    int hq = c->q_heads, hkv = c->kv_heads, g = hq / hkv, d = c->head_dim;
    int64_t token = (int64_t)hkv * d, nq = fsa_batch_queries(b), max_blocks = 0;
    for (int64_t s = 0; s < b->num_seqs; s++) {
        int64_t blocks = (b->cu_seqlens[s + 1] - b->cu_seqlens[s]) / c->block + 1;
        if (blocks > max_blocks) max_blocks = blocks;
    }
#pragma omp parallel for schedule(dynamic, 1)
    for (int h = 0; h < hkv; h++) {
        real *scores = scratch + h * max_blocks;
        for (int64_t s = 0; s < b->num_seqs; s++) {
            Task t = make_task(c, b, s * hkv + h);
            FOR_EACH_QUERY(b, t) {
                int32_t *indices = block_indices + (h * nq + query) * c->topk;
                int64_t blocks = pos / c->block + 1;
                int count = (int)(blocks < c->topk ? blocks : c->topk);
                for (int i = 0; i < c->topk; i++) indices[i] = i < count ? i : -1;
                if (blocks <= c->topk) continue;  // all are selected
                int64_t q_row = query * hq + h * g; // of the group's first head
                query_scores(c, q + q_row * d, kc + t.window0 * token + h * d, lse_c + q_row, token, pos,
                             scores);
                for (int64_t j = 0; j < c->init_blocks; j++) scores[j] = INFINITY; // always selected
                for (int64_t j = blocks - c->local_blocks; j < blocks; j++) scores[j] = INFINITY;
                // Select the T greatest scores; ties go to the lower index. A selected block gets the
                // score -1, below every other, so the loop below reads off the ascending list.
                for (int i = 0; i < count; i++) {
                    int64_t argmax = 0;
                    for (int64_t j = 1; j < blocks; j++) {
                        if (scores[j] > scores[argmax]) argmax = j;
                    }
                    scores[argmax] = -1;
                }
                for (int64_t j = 0, i = 0; j < blocks; j++) {
                    if (scores[j] < 0) indices[i++] = (int32_t)j;
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Gate

static real sigmoid(real x) {
    return 1 / (1 + EXP(-x));
}

// Index of the logit of (token, head, branch).
static int64_t gate_index(const FsaConfig *c, int64_t t, int head, int branch) {
    return (c->gate_per_token ? t : t * c->q_heads + head) * 3 + branch;
}

void FSA_REF(gate_forward)(const FsaConfig *c, int64_t nq, const real *logits, real *const o_branch[3],
                           real *o) {
    int hq = c->q_heads, d = c->head_dim;
#pragma omp parallel for
    for (int64_t t = 0; t < nq; t++) {
        for (int head = 0; head < hq; head++) {
            int64_t offset = (t * hq + head) * d;
            memset(o + offset, 0, sizeof(real) * d);
            for (int i = 0; i < 3; i++)
                axpy(o + offset, sigmoid(logits[gate_index(c, t, head, i)]), o_branch[i] + offset, d);
        }
    }
}

void FSA_REF(gate_backward)(const FsaConfig *c, int64_t nq, int branch, const real *logits,
                            const real *o_branch, const real *dout, real *gated_dout, real *dlogits) {
    int hq = c->q_heads, d = c->head_dim;
#pragma omp parallel for
    for (int64_t t = 0; t < nq; t++) {
        for (int head = 0; head < hq; head++) {
            int64_t offset = (t * hq + head) * d, logit = gate_index(c, t, head, branch);
            real gate = sigmoid(logits[logit]);
            dlogits[logit] += dot(dout + offset, o_branch + offset, d) * gate * (1 - gate);
            for (int i = 0; i < d; i++) gated_dout[offset + i] = gate * dout[offset + i];
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The whole attention

size_t FSA_REF(state_layout)(FSA_REF(State) * s, const FsaConfig *c, int64_t nq, int64_t n, int64_t num_seqs,
                             void *memory) {
    int64_t q = nq * c->q_heads * c->head_dim, k = n * c->kv_heads * c->head_dim, lse = nq * c->q_heads;
    int64_t windows = n / c->cmp_stride * c->kv_heads * c->head_dim; // a sequence of n tokens has at most n/s
    int64_t blocks = (n / c->block + num_seqs) * c->kv_heads, indices = c->kv_heads * nq * c->topk;
    size_t used = 0;
#define ARRAY(field, type, count)                                                                            \
    do {                                                                                                     \
        if (memory) s->field = (type *)((char *)memory + used);                                              \
        used += ((size_t)(count) * sizeof(type) + 63) / 64 * 64;                                             \
    } while (0)
    ARRAY(q, real, q);
    ARRAY(k, real, k);
    ARRAY(kc, real, windows);
    ARRAY(vc, real, windows);
    for (int i = 0; i < 3; i++) ARRAY(o[i], real, q);
    for (int i = 0; i < 3; i++) ARRAY(lse[i], real, lse);
    ARRAY(block_indices, int32_t, indices);
    ARRAY(gated_dout, real, q);
    ARRAY(dkc, real, windows);
    ARRAY(dvc, real, windows);
    ARRAY(scratch, real, blocks);
#undef ARRAY
    return used;
}

static const FsaVisibility branch_rule[3] = {FSA_COMPRESSED, FSA_SELECTED, FSA_WINDOW};

void FSA_REF(forward)(const FsaConfig *c, const FsaBatch *b, const real *q, const real *k, const real *v,
                      const FSA_REF(PhiWeights) * phi, const double *inv_freq, const real *gate_logits,
                      const int32_t *block_indices, FSA_REF(State) * s, real *o) {
    int64_t nq = fsa_batch_queries(b), n = fsa_batch_keys(b);
    memcpy(s->q, q, sizeof(real) * nq * c->q_heads * c->head_dim);
    memcpy(s->k, k, sizeof(real) * n * c->kv_heads * c->head_dim);
    FSA_REF(rope_queries)(c, b, s->q, inv_freq, 0);
    FSA_REF(rope_keys)(c, b, s->k, inv_freq, 0);
    FSA_REF(compress_forward)(c, b, k, v, phi, inv_freq, s->kc, s->vc);
    FSA_REF(attention_forward)(c, b, FSA_COMPRESSED, s->q, s->kc, s->vc, NULL, s->o[0], s->lse[0]);
    if (block_indices) {
        memcpy(s->block_indices, block_indices, sizeof(int32_t) * c->kv_heads * nq * c->topk);
    } else {
        FSA_REF(select_blocks)(c, b, s->q, s->kc, s->lse[0], s->scratch, s->block_indices);
    }
    FSA_REF(attention_forward)(c, b, FSA_SELECTED, s->q, s->k, v, s->block_indices, s->o[1], s->lse[1]);
    FSA_REF(attention_forward)(c, b, FSA_WINDOW, s->q, s->k, v, NULL, s->o[2], s->lse[2]);
    FSA_REF(gate_forward)(c, nq, gate_logits, s->o, o);
}

void FSA_REF(backward)(const FsaConfig *c, const FsaBatch *b, const real *k, const real *v,
                       const FSA_REF(PhiWeights) * phi, const double *inv_freq, const real *gate_logits,
                       FSA_REF(State) * s, const real *dout, real *dq, real *dk, real *dv,
                       const FSA_REF(PhiGradients) * dphi, real *dgate_logits) {
    int64_t nq = fsa_batch_queries(b), m = fsa_batch_windows(c, b);
    int64_t n = fsa_batch_keys(b), row = (int64_t)c->kv_heads * c->head_dim;
    if (nq > 0) memset(dq, 0, sizeof(real) * nq * c->q_heads * c->head_dim);
    if (n > 0) {
        memset(dk, 0, sizeof(real) * n * row);
        memset(dv, 0, sizeof(real) * n * row);
    }
    memset(s->dkc, 0, sizeof(real) * m * row);
    memset(s->dvc, 0, sizeof(real) * m * row);
    for (int i = 0; i < 3; i++) {
        FSA_REF(gate_backward)(c, nq, i, gate_logits, s->o[i], dout, s->gated_dout, dgate_logits);
        int compressed = branch_rule[i] == FSA_COMPRESSED;
        FSA_REF(attention_backward)
        (c, b, branch_rule[i], s->q, compressed ? s->kc : s->k, compressed ? s->vc : v, s->block_indices,
         s->o[i], s->lse[i], s->gated_dout, dq, compressed ? s->dkc : dk, compressed ? s->dvc : dv);
    }
    // dq and dk of the rotated q and k become those of q and k before RoPE.
    FSA_REF(rope_queries)(c, b, dq, inv_freq, 1);
    FSA_REF(rope_keys)(c, b, dk, inv_freq, 1);
    FSA_REF(compress_backward)(c, b, k, v, phi, inv_freq, s->dkc, s->dvc, dk, dv, dphi);
}
