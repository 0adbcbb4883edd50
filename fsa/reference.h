// reference.h: native sparse attention in plain C, forward and backward. One source defines the float
// functions (names end in _f32) and the double functions (_f64). The equations are in fsa/README.md.
//
// Layouts are token-major. N is the number of keys, Nq of queries, M of compression windows, all summed over
// the sequences of a batch:
//   q, o              [Nq, Hq, d]
//   k, v              [N, Hkv, d]
//   kc, vc            [M, Hkv, d]    compressed keys and values
//   lse               [Nq, Hq]       natural log-sum-exp; -inf for a row that sees no key (its output is 0)
//   block_indices     [Hkv, Nq, T]   ascending, counted from the sequence's first block; padded with -1
//
// The functions allocate nothing and store no N x N array. They check no argument; fsa_config_check checks a
// configuration. Results are bitwise reproducible for any number of threads. A backward function adds to its
// gradients, unless its comment says that it overwrites them. So the gradients of several branches and
// micro-batches are summed.
#ifndef FSA_REF_REAL
#ifndef FSA_REFERENCE_H
#define FSA_REFERENCE_H
#include "fsa.h"

// Packed sequences and their queries, in host memory.
typedef struct {
    int64_t num_seqs;
    const int64_t *cu_seqlens; // [num_seqs + 1], ascending: cu_seqlens[0] = 0, cu_seqlens[num_seqs] = N
    int64_t num_segments;
    const FsaSegment *segments; // [num_segments], ascending by (seq, pos)
} FsaBatch;

#ifdef __cplusplus
extern "C" {
#endif
// Return Nq (queries), N (keys) and M (compression windows) of a batch.
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

// Parameters of the compression for phi = linear. All are NULL for phi = mean.
typedef struct {
    const FSA_REF_REAL *wk; // [Hkv, l*d, d]; row r*d + c multiplies channel c of the window's token r
    const FSA_REF_REAL *pe; // [Hkv, l, d] position embedding, added to the window of k; NULL: none
    const FSA_REF_REAL *wv; // [Hkv, l*d, d]
} FSA_REF(PhiWeights);
// Their gradients, of the same shapes. All are NULL for phi = mean.
typedef struct {
    FSA_REF_REAL *dwk, *dpe, *dwv;
} FSA_REF(PhiGradients);

// Applies RoPE to x [rows, heads, d] in place. Row r has position first + r*stride. Channels c and c + d/2
// are rotated by the angle position * inv_freq[c], computed in double. inverse != 0 applies the inverse
// rotation, which is also the backward pass. inv_freq [d/2]; NULL leaves x unchanged.
void FSA_REF(rope)(FSA_REF_REAL *x, int64_t rows, int heads, int d, int64_t first, int64_t stride,
                   const double *inv_freq, int inverse);
// Apply RoPE to q [Nq, Hq, d] and k [N, Hkv, d] in place. The position of a query comes from its segment. The
// position of a key is its index in its sequence.
void FSA_REF(rope_queries)(const FsaConfig *c, const FsaBatch *b, FSA_REF_REAL *q, const double *inv_freq,
                           int inverse);
void FSA_REF(rope_keys)(const FsaConfig *c, const FsaBatch *b, FSA_REF_REAL *k, const double *inv_freq,
                        int inverse);

// Computes the compression kc, vc [M, Hkv, d] of k, v [N, Hkv, d] before RoPE. kc is rotated: window i of a
// sequence has position s*i.
void FSA_REF(compress_forward)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *k,
                               const FSA_REF_REAL *v, const FSA_REF(PhiWeights) * phi, const double *inv_freq,
                               FSA_REF_REAL *kc, FSA_REF_REAL *vc);
// Computes the gradients of compress_forward from dkc, dvc [M, Hkv, d]. Adds to dk, dv [N, Hkv, d] and to
// dphi. Overwrites dkc with the gradient of kc before RoPE.
void FSA_REF(compress_backward)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *k,
                                const FSA_REF_REAL *v, const FSA_REF(PhiWeights) * phi,
                                const double *inv_freq, FSA_REF_REAL *dkc, const FSA_REF_REAL *dvc,
                                FSA_REF_REAL *dk, FSA_REF_REAL *dv, const FSA_REF(PhiGradients) * dphi);

// Computes softmax attention under one of the four visibility rules: o [Nq, Hq, d], lse [Nq, Hq]. q and k are
// rotated. For FSA_COMPRESSED, k and v are kc and vc. Only FSA_SELECTED reads block_indices.
void FSA_REF(attention_forward)(const FsaConfig *c, const FsaBatch *b, FsaVisibility rule,
                                const FSA_REF_REAL *q, const FSA_REF_REAL *k, const FSA_REF_REAL *v,
                                const int32_t *block_indices, FSA_REF_REAL *o, FSA_REF_REAL *lse);
// Computes the gradients of attention_forward from o, lse and dout, the gradient of o [Nq, Hq, d]. Adds to
// dq, dk and dv, the gradients of the rotated arrays.
void FSA_REF(attention_backward)(const FsaConfig *c, const FsaBatch *b, FsaVisibility rule,
                                 const FSA_REF_REAL *q, const FSA_REF_REAL *k, const FSA_REF_REAL *v,
                                 const int32_t *block_indices, const FSA_REF_REAL *o, const FSA_REF_REAL *lse,
                                 const FSA_REF_REAL *dout, FSA_REF_REAL *dq, FSA_REF_REAL *dk,
                                 FSA_REF_REAL *dv);

// Computes the block scores of one query and one KV head h: scores [floor(t/B) + 1], where t is the query's
// position. query: its index in q; lse_c: lse of the compressed branch. Returns the number of scores. Tests
// use this function.
int64_t FSA_REF(block_scores)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *q,
                              const FSA_REF_REAL *kc, const FSA_REF_REAL *lse_c, int64_t query, int h,
                              FSA_REF_REAL *scores);
// Computes the block selection: block_indices [Hkv, Nq, T]. scratch holds block scores [Hkv, floor(n/B) + 1],
// where n is the length of the longest sequence.
void FSA_REF(select_blocks)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *q,
                            const FSA_REF_REAL *kc, const FSA_REF_REAL *lse_c, FSA_REF_REAL *scratch,
                            int32_t *block_indices);

// Computes the gated sum o = sum over the branches of sigmoid(logit) * o_branch. logits [Nq, Hq, 3], or [Nq,
// 3] with gate_per_token, in the order compressed, selected, sliding.
void FSA_REF(gate_forward)(const FsaConfig *c, int64_t nq, const FSA_REF_REAL *logits,
                           FSA_REF_REAL *const o_branch[3], FSA_REF_REAL *o);
// Computes the gradients of gate_forward for one branch (0, 1 or 2 in that order). Overwrites gated_dout [Nq,
// Hq, d], the gradient of the branch's output, with gate * dout. Adds the gradient of the branch's logits to
// dlogits.
void FSA_REF(gate_backward)(const FsaConfig *c, int64_t nq, int branch, const FSA_REF_REAL *logits,
                            const FSA_REF_REAL *o_branch, const FSA_REF_REAL *dout, FSA_REF_REAL *gated_dout,
                            FSA_REF_REAL *dlogits);

// The arrays that forward keeps for backward, and scratch memory of both.
typedef struct {
    FSA_REF_REAL *q, *k;         // rotated: [Nq, Hq, d], [N, Hkv, d]
    FSA_REF_REAL *kc, *vc;       // [M, Hkv, d]
    FSA_REF_REAL *o[3], *lse[3]; // compressed, selected, sliding branch: [Nq, Hq, d], [Nq, Hq]
    int32_t *block_indices;      // [Hkv, Nq, T]
    FSA_REF_REAL *gated_dout;    // backward: gate * dout of one branch, [Nq, Hq, d]
    FSA_REF_REAL *dkc, *dvc;     // backward: [M, Hkv, d]
    FSA_REF_REAL *scratch;       // of select_blocks
} FSA_REF(State);

// Returns the bytes of a State for at most nq queries, n keys and num_seqs sequences. Sets the pointers of *s
// into `memory` (aligned to 64 bytes), unless memory is NULL.
size_t FSA_REF(state_layout)(FSA_REF(State) * s, const FsaConfig *c, int64_t nq, int64_t n, int64_t num_seqs,
                             void *memory);

// Computes native sparse attention from v, and from q and k before RoPE. Writes o, and *s for backward.
// block_indices [Hkv, Nq, T]: blocks to attend to; NULL: select_blocks selects them.
void FSA_REF(forward)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *q, const FSA_REF_REAL *k,
                      const FSA_REF_REAL *v, const FSA_REF(PhiWeights) * phi, const double *inv_freq,
                      const FSA_REF_REAL *gate_logits, const int32_t *block_indices, FSA_REF(State) * s,
                      FSA_REF_REAL *o);
// Computes the gradients of forward from dout [Nq, Hq, d]. Overwrites dq, dk (of q and k before RoPE) and dv.
// Adds to dphi and dgate_logits.
void FSA_REF(backward)(const FsaConfig *c, const FsaBatch *b, const FSA_REF_REAL *k, const FSA_REF_REAL *v,
                       const FSA_REF(PhiWeights) * phi, const double *inv_freq,
                       const FSA_REF_REAL *gate_logits, FSA_REF(State) * s, const FSA_REF_REAL *dout,
                       FSA_REF_REAL *dq, FSA_REF_REAL *dk, FSA_REF_REAL *dv,
                       const FSA_REF(PhiGradients) * dphi, FSA_REF_REAL *dgate_logits);
#endif
