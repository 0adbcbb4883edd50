// reference.h: the definition of the whole attention in plain C, forward and backward, in float
// (names ending in _f32) and double (_f64), from one source. No N x N buffer, no allocation, the
// same bits for any number of threads. The mathematics is in fsa/README.md.
//
// Layouts are token-major: q, o [Nq, Hq, d]; k, v [N, Hkv, d]; compressed keys and values
// [M, Hkv, d], the windows of all sequences one after another; lse [Nq, Hq], natural, -inf for a
// row that sees nothing (its output is 0); indices [Hkv, Nq, T]: the chosen blocks ascending,
// counted from the sequence's first block, then -1. N counts keys, Nq queries.
//
// The steps add their gradients to what is there, so that branches and accumulation steps sum up.
#ifndef FSA_REF_REAL
#ifndef FSA_REFERENCE_H
#define FSA_REFERENCE_H
#include "fsa.h"

// Packed sequences and the queries asked of them.
typedef struct {
    int64_t num_seqs;
    const int64_t *cu_seqlens; // [num_seqs + 1], cu_seqlens[0] = 0, ascending; the last is N
    int64_t num_segments;
    const FsaSegment *segments; // [num_segments]
} FsaBatch;

#ifdef __cplusplus
extern "C" {
#endif
// Nq, N and M of a batch: queries, keys, and compression windows.
int64_t fsa_batch_queries(const FsaBatch *b);
int64_t fsa_batch_keys(const FsaBatch *b);
int64_t fsa_batch_windows(const FsaConfig *c, const FsaBatch *b);

#define FSA_REF_REAL float
#define FSA_REF(name) fsa_ref_##name##_f32
#include "reference.h"
#undef FSA_REF_REAL
#undef FSA_REF
#define FSA_REF_REAL double
#define FSA_REF(name) fsa_ref_##name##_f64
#include "reference.h"
#undef FSA_REF_REAL
#undef FSA_REF
#ifdef __cplusplus
}
#endif
#endif
#else

// The learned parameters of the compression, for phi = linear; all NULL for phi = mean.
typedef struct {
    const FSA_REF_REAL *wk; // [Hkv, l*d, d], row r*d + c belongs to the window's token r, channel c
    const FSA_REF_REAL *pe; // [Hkv, l, d], added to K's window before the product
    const FSA_REF_REAL *wv; // [Hkv, l*d, d]
} FSA_REF(PhiWeights);
typedef struct {
    FSA_REF_REAL *wk, *pe, *wv;
} FSA_REF(PhiGradients);

// Rotates x [rows, heads, d] in place: row r stands at position first + r*stride. Half-rotation:
// channels c and c + d/2 turn by position * inv_freq[c], the angle in double. inverse != 0 turns
// back, which is also the backward pass. inv_freq [d/2]; NULL rotates nothing.
void FSA_REF(rope)(FSA_REF_REAL *x, int64_t rows, int heads, int d, int64_t first, int64_t stride,
                   const double *inv_freq, int inverse);
// The same for queries (positions from the segments) and for keys (positions in their sequences).
void FSA_REF(rope_queries)(const FsaConfig *c, const FsaBatch *b, FSA_REF_REAL *q, const double *inv_freq,
                           int inverse);
void FSA_REF(rope_keys)(const FsaConfig *c, const FsaBatch *b, FSA_REF_REAL *k, const double *inv_freq,
                        int inverse);

// Compression: k, v [N, Hkv, d] before RoPE -> kc, vc [M, Hkv, d]; kc is rotated, window i of a
// sequence as position s*i.
void FSA_REF(compress_forward)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *k,
                               const FSA_REF_REAL *v, const FSA_REF(PhiWeights) * phi, const double *inv_freq,
                               FSA_REF_REAL *kc, FSA_REF_REAL *vc);
// Adds to dk, dv and dphi (fields NULL for phi = mean). dkc is turned back in place.
void FSA_REF(compress_backward)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *k,
                                const FSA_REF_REAL *v, const FSA_REF(PhiWeights) * phi, const double *inv_freq,
                                FSA_REF_REAL *dkc, const FSA_REF_REAL *dvc, FSA_REF_REAL *dk,
                                FSA_REF_REAL *dv, const FSA_REF(PhiGradients) * dphi);

// Softmax attention under one of the four visibility rules. For FSA_COMPRESSED k and v are kc and
// vc. indices is read for FSA_SELECTED alone. Every array is already rotated.
void FSA_REF(attention_forward)(const FsaConfig *c, const FsaBatch *b, FsaVisibility rule, const FSA_REF_REAL *q,
                             const FSA_REF_REAL *k, const FSA_REF_REAL *v, const int32_t *block_indices,
                             FSA_REF_REAL *o, FSA_REF_REAL *lse);
// Adds to dq, dk, dv.
void FSA_REF(attention_backward)(const FsaConfig *c, const FsaBatch *b, FsaVisibility rule,
                              const FSA_REF_REAL *q, const FSA_REF_REAL *k, const FSA_REF_REAL *v,
                              const int32_t *block_indices, const FSA_REF_REAL *o, const FSA_REF_REAL *lse,
                              const FSA_REF_REAL *dout, FSA_REF_REAL *dq, FSA_REF_REAL *dk, FSA_REF_REAL *dv);

// Block scores S [num_blocks(t)] of one query: row `query` of q, kv head h, given the branch's lse.
// For tests and plots; select calls it for every query. num_blocks(t) = t/B + 1; returns it.
int64_t FSA_REF(block_scores)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *q,
                              const FSA_REF_REAL *kc, const FSA_REF_REAL *lse_c, int64_t query, int h,
                              FSA_REF_REAL *scores);
// The choice of blocks -> indices [Hkv, Nq, T]. scratch: [Hkv, longest sequence/B + 1] reals.
void FSA_REF(select_blocks)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *q, const FSA_REF_REAL *kc,
                     const FSA_REF_REAL *lse_c, FSA_REF_REAL *scratch, int32_t *block_indices);

// Gate: logits [Nq, Hq, 3] (or [Nq, 3] with gate_per_token), in the order compressed, selected,
// sliding; o = sum over branches of sigmoid(logit) * o_branch.
void FSA_REF(gate_forward)(const FsaConfig *c, int64_t nq, const FSA_REF_REAL *logits,
                           FSA_REF_REAL *const o_branch[3], FSA_REF_REAL *o);
// Writes do_branch = gate * dout for branch `which`, and adds the logits' gradient of that branch.
void FSA_REF(gate_backward)(const FsaConfig *c, int64_t nq, int which, const FSA_REF_REAL *logits,
                            const FSA_REF_REAL *o_branch, const FSA_REF_REAL *dout, FSA_REF_REAL *do_branch,
                            FSA_REF_REAL *dlogits);

// What the whole attention keeps from forward to backward, and the backward pass's scratch.
typedef struct {
    FSA_REF_REAL *q, *k;               // rotated
    FSA_REF_REAL *kc, *vc;             // compressed
    FSA_REF_REAL *o[3], *lse[3];       // of the compressed, selected and sliding branch
    int32_t *block_indices;                  // [Hkv, Nq, T]
    FSA_REF_REAL *dbranch, *dkc, *dvc; // backward: gate*dout [Nq, Hq, d], and gradients of kc, vc
    FSA_REF_REAL *scratch;             // of select
} FSA_REF(State);

// Places a State for at most nq queries, n keys and num_seqs sequences in `memory` and returns the
// bytes that it takes; with memory NULL it only counts. memory is aligned to 64 bytes.
size_t FSA_REF(state_layout)(FSA_REF(State) * s, const FsaConfig *c, int64_t nq, int64_t n, int64_t num_seqs,
                            void *memory);

// The whole of native sparse attention: q, k before RoPE -> o. frozen: indices to use instead of
// choosing (NULL: choose), [Hkv, Nq, T].
void FSA_REF(forward)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *q, const FSA_REF_REAL *k,
                      const FSA_REF_REAL *v, const FSA_REF(PhiWeights) * phi, const double *inv_freq,
                      const FSA_REF_REAL *gate_logits, const int32_t *frozen, FSA_REF(State) * s,
                      FSA_REF_REAL *o);
// dout [Nq, Hq, d] -> dq, dk, dv (before RoPE), which it overwrites; adds to dphi and dgate_logits.
void FSA_REF(backward)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *k, const FSA_REF_REAL *v,
                       const FSA_REF(PhiWeights) * phi, const double *inv_freq, const FSA_REF_REAL *gate_logits,
                       FSA_REF(State) * s, const FSA_REF_REAL *dout, FSA_REF_REAL *dq, FSA_REF_REAL *dk,
                       FSA_REF_REAL *dv, const FSA_REF(PhiGradients) * dphi, FSA_REF_REAL *dgate_logits);
#endif
