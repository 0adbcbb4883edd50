// kernels.h: the launchers of all steps, one section per file. README.md shows which step reads and writes
// what. The header is internal to the library.
//
// Conventions. c and batch are on the host and checked by the caller (api.cu); every other pointer is a
// device pointer. A void array has the 16-bit type `dtype`. Nq, N, M, T, Hq, Hkv, g, d are those of fsa.h. A
// launcher launches kernels on `stream`, allocates nothing and never synchronizes. It returns FSA_OK,
// FSA_ERROR_CUDA if a launch or a CUDA call fails (fsa_cuda_error names it), or what its comment lists. An
// empty batch is no error.
//
// Every *_bytes function returns at least as much for a batch whose counts are all at least as large.
#ifndef FSA_KERNELS_H
#define FSA_KERNELS_H
#include "batch.cuh"

// 1 in builds for tests: limits so small that small shapes have several head groups, slabs and launches.
#ifndef FSA_SMALL_LIMITS
#define FSA_SMALL_LIMITS 0
#endif

// A 16-bit array with a row for each token: [heads, d] for the arrays of the attention, [heads, 3] for gate
// logits. The row of token i begins at element i*stride. A packed array has the stride heads*d (or heads*3);
// a view of a larger matrix, like q inside a QKV matrix, has a larger one.
struct ConstRows {
    const void *data;
    int64_t stride;
};
struct Rows {
    void *data;
    int64_t stride;
    operator ConstRows() const { return {data, stride}; }
};

// A packed array of q's shape [Nq, Hq, d], and of k's shape [N or M, Hkv, d].
static inline ConstRows packed_q(const FsaConfig *c, const void *x) {
    return {x, (int64_t)c->q_heads * c->head_dim};
}
static inline Rows packed_q(const FsaConfig *c, void *x) {
    return {x, (int64_t)c->q_heads * c->head_dim};
}
static inline ConstRows packed_kv(const FsaConfig *c, const void *x) {
    return {x, (int64_t)c->kv_heads * c->head_dim};
}
static inline Rows packed_kv(const FsaConfig *c, void *x) {
    return {x, (int64_t)c->kv_heads * c->head_dim};
}

// Returns the factor of q.k before softmax.
static inline float softmax_scale(const FsaConfig *c) {
    return c->scale != 0 ? c->scale : (float)(1 / __builtin_sqrt((double)c->head_dim));
}

// ---- launch.cu --------------------------------------------------------------------------------------
// Returns the calling thread's last CUDA error in a launcher: "kernel or call: CUDA's text".
const char *fsa_cuda_error();
// Returns FSA_ERROR_CUDA if the current device or its attributes cannot be read. api.cu calls it first, so
// the next two functions assume that the device can be read: if not, they return 1 and false.
int fsa_check_device();
int fsa_num_sms(); // of the current device
// Returns whether the current device runs the kernels of sm90/: compute capability 9.0, and the environment
// variable FSA_KERNELS is not "portable".
bool fsa_use_sm90();
// Returns the value of FSA_KERNELS if it is neither "portable" nor "sm90"; NULL if it is one of them or not
// set.
const char *fsa_unknown_kernels();

// ---- rope.cu ----------------------------------------------------------------------------------------
// RoPE of queries: out = x rotated by position * inv_freq. x [Nq, Hq, d]; out [Nq, Hq, d], packed. The
// positions come from the segments. inv_freq [d/2] double, radians per token; NULL copies x. Returns
// FSA_ERROR_CONFIG unless d is 64 or 128.
int fsa_rope_queries(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows x,
                     const double *inv_freq, void *out, cudaStream_t stream);
// RoPE of keys: x [N, Hkv, d]; out [N, Hkv, d], packed. The position of a key is its index in its sequence.
// Otherwise as fsa_rope_queries.
int fsa_rope_keys(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows x,
                  const double *inv_freq, void *out, cudaStream_t stream);
// Inverse RoPE of gradients, and their conversion to 16 bits. inv_freq NULL: conversion alone. The same
// errors. dq [Nq, Hq, d] from dq_accum (below).
int fsa_convert_dq(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const float *dq_accum,
                   const double *inv_freq, Rows dq, cudaStream_t stream);
// out, which is dk or dv, from x, fp32 of the same shape, packed: [N, Hkv, d], or if `compressed` [M, Hkv,
// d].
int fsa_convert_dkv(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const float *x,
                    bool compressed, const double *inv_freq, Rows out, cudaStream_t stream);

// ---- dq_accum: its layout ---------------------------------------------------------------------------
// dq_accum is the fp32 accumulator of dQ: rows [Hkv, Nq, g] of d floats. The rows of consecutive queries of a
// KV head are contiguous, so one bulk copy can add them. Chunk i of a row, 8 floats, is stored as chunk
// i ^ (row % 4). Kernels hold tiles in shared memory in this layout: threads that write the same chunk of
// neighbouring rows then use different banks.
//
// Returns the row of (query, first query head of kv_head). nq: queries of the batch; g: heads of the group.
__host__ __device__ static inline int64_t dq_accum_group_row(int64_t nq, int g, int64_t query, int kv_head) {
    return (kv_head * nq + query) * g;
}
// Returns the row of (query, query head).
__host__ __device__ static inline int64_t dq_accum_row(int64_t nq, int g, int64_t query, int head) {
    return dq_accum_group_row(nq, g, query, head / g) + head % g;
}
// Returns the index at which a row stores its chunk `chunk`.
__host__ __device__ static inline int dq_accum_chunk(int64_t row, int chunk) {
    return chunk ^ (int)(row & 3);
}
// ---- compress.cu ------------------------------------------------------------------------------------
// Returns the bytes of `scratch` below.
size_t fsa_compress_scratch_bytes(const FsaConfig *c, const BatchLayout *batch, int backward);
// Compression phi: computes kc, vc [M, Hkv, d] from k, v [N, Hkv, d] before RoPE. Window i of kc is rotated
// to position s*i. phi = linear: wk, wv [Hkv, l*d, d]; pe [Hkv, l, d] or NULL. phi = mean: all NULL. inv_freq
// [d/2] double; NULL rotates nothing. scratch: fsa_compress_scratch_bytes bytes, aligned to 16. Returns
// FSA_ERROR_CONFIG unless d is 64 or 128.
int fsa_compress_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows k,
                         ConstRows v, const void *wk, const void *pe, const void *wv, const double *inv_freq,
                         void *kc, void *vc, void *scratch, cudaStream_t stream);
// Computes the gradients of fsa_compress_forward from dkc (of the rotated kc) and dvc, fp32 [M, Hkv, d].
// Overwrites dk (dk_unrotated), fp32 [N, Hkv, d], the gradient of k before RoPE. dv (dv_accum), of the same
// shape, is overwritten (accumulate = 0) or added to (1). phi = linear: adds to dwk, dpe, dwv, fp32 of the
// shapes of wk, pe, wv; phi = mean: these are NULL. Errors as in forward.
int fsa_compress_backward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows k,
                          ConstRows v, const void *wk, const void *pe, const void *wv, const double *inv_freq,
                          const float *dkc, const float *dvc, float *dk, float *dv, int accumulate,
                          float *dwk, float *dpe, float *dwv, void *scratch, cudaStream_t stream);

// ---- dense.cu ---------------------------------------------------------------------------------------
// Dense attention over all keys that are visible under a rule: FSA_CAUSAL, FSA_WINDOW, or FSA_COMPRESSED,
// whose k and v are kc and vc. o = softmax(scale q k^T) v, lse = ln sum exp(scale q k^T). q, o [Nq, Hq, d];
// k, v [N or M, Hkv, d]; q and k rotated; lse fp32 [Nq, Hq], -inf for a row without keys, whose o is 0.
// Returns FSA_ERROR_CONFIG for FSA_SELECTED, or unless d is 64 or 128.
int fsa_dense_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, FsaVisibility rule,
                      ConstRows q, ConstRows k, ConstRows v, Rows o, float *lse, cudaStream_t stream);
// The same over the keys of a query's initial and local blocks (Hopper only). The result is a partial result
// of the selected branch, normalized over these keys.
int fsa_dense_init_local_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q,
                                 ConstRows k, ConstRows v, Rows o, float *lse, cudaStream_t stream);

// Computes the gradients of fsa_dense_forward. With P = exp(scale q k^T - lse_bwd), which is gate * softmax,
// and dS = P (dout v^T - delta):
//   dq += scale dS k      dk += scale dS^T q      dv += P^T dout
// dq, dk and dv are the fp32 accumulators dq_accum, dk_accum and dv_accum, so that branches add up without
// rounding: dq in the layout of dq_accum; dk, dv [N or M, Hkv, d]. accumulate_dq: 0
// overwrites dq; accumulate_dkv: 0 overwrites dk and dv. delta and lse_bwd, fp32 [Nq, Hq], come from
// fsa_gate_backward or fsa_bwd_preprocess; with the former, dout [Nq, Hq, d] is the gradient of the gated
// sum. Both write +inf for a row without keys; P is 0 for lse_bwd = -inf, too. scratch:
// fsa_dense_backward_scratch_bytes bytes, aligned to 16. Returns FSA_ERROR_CONFIG as forward,
// FSA_ERROR_WORKSPACE if scratch is NULL, FSA_ERROR_ARGUMENT if there are too many work items (2^30).
size_t fsa_dense_backward_scratch_bytes(const FsaConfig *c, const BatchLayout *batch, FsaVisibility rule);
int fsa_dense_backward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, FsaVisibility rule,
                       ConstRows q, ConstRows k, ConstRows v, ConstRows dout, const float *lse_bwd,
                       const float *delta, float *dq, float *dk, float *dv, int accumulate_dq,
                       int accumulate_dkv, void *scratch, cudaStream_t stream);

// Returns how many of a query's local blocks fsa_window_backward handles for the selected branch: all
// local_blocks on Hopper, if they lie inside the window and B is a multiple of 64; otherwise 0.
int fsa_local_blocks_in_window_backward(const FsaConfig *c);
// Computes the gradients of the sliding branch, and those of the selected branch over a query's last
// fsa_local_blocks_in_window_backward(c) blocks. Overwrites the accumulators dq, dk and dv with the sums of
// both. lse_bwd and delta hold two branches:
//   lse_bwd[0], delta[0]    selected branch
//   lse_bwd[1], delta[1]    sliding branch
// Arrays, scratch and errors as in fsa_dense_backward.
int fsa_window_backward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q,
                        ConstRows k, ConstRows v, ConstRows dout, const float *const lse_bwd[2],
                        const float *const delta[2], float *dq, float *dk, float *dv, void *scratch,
                        cudaStream_t stream);

// ---- topk.cu ----------------------------------------------------------------------------------------
// Block selection: computes block scores from q [Nq, Hq, d] and kc [M, Hkv, d], both rotated, and lse_c, fp32
// [Nq, Hq]: lse of the compressed branch. Writes block_indices [Hkv, Nq, T]. Calls fsa_topk_sm90 on Hopper if
// T is at most fsa_max_topk_sm90, otherwise fsa_topk_sm80. Returns FSA_ERROR_CONFIG unless d is 64 or 128,
// and T at most fsa_max_topk_sm80.
int fsa_topk(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q, ConstRows kc,
             const float *lse_c, int32_t *block_indices, cudaStream_t stream);
// The same by sm80/topk.cu.
int fsa_topk_sm80(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q, ConstRows kc,
                  const float *lse_c, int32_t *block_indices, cudaStream_t stream);
// The same by sm90/topk.cu. d and T must be supported.
int fsa_topk_sm90(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q, ConstRows kc,
                  const float *lse_c, int32_t *block_indices, cudaStream_t stream);
// Return the largest T of these functions; c->topk is not read. sm80: the lists of free blocks must fit in
// shared memory, which holds at least 73. sm90: 16 free blocks.
int fsa_max_topk_sm80(const FsaConfig *c);
int fsa_max_topk_sm90(const FsaConfig *c);

// ---- query_lists.cu ---------------------------------------------------------------------------------
// Query lists: for every (KV head, slab of queries) the entries query*T + slot in CSR form, ordered by the
// block that the slot names, within a block by query. Blocks are counted over all sequences (cu_blocks).
struct QueryLists {
    int64_t slab_queries, num_slabs; // queries per slab; number of slabs
    int64_t max_blocks;              // bound on the blocks of all sequences
    int num_splits;                // thread blocks that sort one slab, each a contiguous part of its queries
    int init_blocks, local_blocks; // a query's first and last blocks that the lists leave out
    // [Hkv, Nq*T]; an entry is query*T + slot; slab i begins at i*slab_queries*T.
    uint32_t *entries;
    // [Hkv, num_slabs, max_blocks + 1]: the position in its slab's entries at which a block's list begins.
    uint32_t *offsets;
};
enum { FSA_MAX_SLAB = 65536 };
// fsa_query_lists_at returns lists whose arrays are in `memory`, fsa_query_lists_bytes bytes, aligned to 256.
// slab_queries: queries per slab, at most FSA_MAX_SLAB. The lists leave out no block until the caller sets
// init_blocks and local_blocks. The sizes grow with the batch if slab_queries is fsa_selected_slab_queries.
size_t fsa_query_lists_bytes(const FsaConfig *c, const BatchLayout *batch, int64_t slab_queries);
QueryLists fsa_query_lists_at(const FsaConfig *c, const BatchLayout *batch, int64_t slab_queries,
                              void *memory);
// Fills the entries and offsets from block_indices [Hkv, Nq, T]. Entries that are negative or not causal are
// left out. scratch: fsa_query_lists_scratch_bytes bytes, aligned to 16. Returns FSA_ERROR_ARGUMENT if
// slab_queries > FSA_MAX_SLAB, Nq*T >= 2^31, max_blocks >= 2^30, or num_slabs > 65,535.
size_t fsa_query_lists_scratch_bytes(const FsaConfig *c, const BatchLayout *batch, int64_t slab_queries);
int fsa_query_lists(const FsaConfig *c, const BatchLayout *batch, const int32_t *block_indices,
                    const QueryLists *lists, void *scratch, cudaStream_t stream);

// ---- gate.cu ----------------------------------------------------------------------------------------
// Computes the gradients of o = sum over the branches of gate * o_branch, gate = sigmoid(logits): those of
// the logits, and delta and lse_bwd for the branches' backward passes. The three branches are in the order
// compressed, selected, sliding. For each of them:
//   delta = <dout, o_branch>      lse_bwd = lse - ln(gate)      dlogits = delta gate (1 - gate)
// exp(s - lse_bwd) is gate * P, so the branches' backward passes read dout and not gate * dout. A row
// without keys (lse = -inf) has lse_bwd = +inf, so its probabilities are 0. logits, dlogits [Nq, Hq, 3], or
// [Nq, 3] with gate_per_token (dlogits then sums over the heads); o_branch[i], dout [Nq, Hq, d]; lse[i],
// delta[i], lse_bwd[i] fp32 [Nq, Hq]. Overwrites delta, lse_bwd and dlogits. Returns FSA_ERROR_CONFIG unless
// d is 64 or 128.
int fsa_gate_backward(const FsaConfig *c, FsaDtype dtype, int64_t nq, ConstRows logits,
                      const void *const o_branch[3], const float *const lse[3], ConstRows dout,
                      float *const delta[3], float *const lse_bwd[3], Rows dlogits, cudaStream_t stream);
// Computes delta and lse_bwd of one branch without a gate: lse_bwd = lse, or +inf for a row without keys.
// lse_bwd may be NULL: not written. fsa_selected_backward then passes lse as lse_bwd. That is valid because
// fsa_selected_branch_backward does not read the lse of a row without keys.
int fsa_bwd_preprocess(const FsaConfig *c, FsaDtype dtype, int64_t nq, ConstRows o, const float *lse,
                       ConstRows dout, float *delta, float *lse_bwd, cudaStream_t stream);

// ---- selected.cu, selected_combine.cu ---------------------------------------------------------------
// Returns the queries per slab of the selected branch's forward pass.
int64_t fsa_selected_slab_queries(const FsaConfig *c, const BatchLayout *batch);
// Returns the bytes of `scratch` below, which holds the query lists and the partial rows.
size_t fsa_selected_scratch_bytes(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, int backward);

// The gate's forward pass, which the combine kernel of the selected branch applies to its result:
//   o_gated = sigmoid(logits[0]) o_cmp + sigmoid(logits[1]) o + sigmoid(logits[2]) o_win
struct GateCombine {
    ConstRows logits;          // [Nq, Hq, 3], or [Nq, 3] with gate_per_token
    const void *o_cmp, *o_win; // outputs of the compressed and the sliding branch, [Nq, Hq, d], packed
    Rows o_gated;              // [Nq, Hq, d]
};
// Computes the selected branch: o and lse as in fsa_dense_forward, over the tokens of the blocks in
// block_indices [Hkv, Nq, T]. gate: NULL, or the gated sum to compute as well. If gate->o_gated is o, the
// ungated o is not stored.
// scratch: fsa_selected_scratch_bytes bytes, aligned to 256. On Hopper block_indices must contain the initial
// and local blocks, which fsa_dense_init_local_forward computes. Returns FSA_ERROR_ARGUMENT if Nq*Hq >= 2^32,
// and the errors of fsa_query_lists.
int fsa_selected_branch_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q,
                                ConstRows k, ConstRows v, const int32_t *block_indices, void *scratch, Rows o,
                                float *lse, const GateCombine *gate, cudaStream_t stream);

// Gradients of the other branches, fp32. The selected branch adds them to its own before it rounds to 16
// bits.
struct BranchGradients {
    const float *dq_accum;            // of the rotated q, in the layout of dq_accum
    const float *dk_accum, *dv_accum; // [N, Hkv, d]; dk_accum of the rotated k
    const float *dk_unrotated;        // [N, Hkv, d] of k before RoPE
    const double *inv_freq;           // [d/2]: the sums of dq and dk are rotated back; NULL: they are not
};
// Computes the gradients of the selected branch: the equations of fsa_dense_backward over the tokens of its
// blocks. Overwrites dq [Nq, Hq, d], dk and dv [N, Hkv, d] with these gradients plus branch_grads (NULL:
// nothing is added, and no inverse RoPE is applied). A query's last local_blocks blocks are left out;
// fsa_window_backward has added them to branch_grads. Rows without blocks in the query lists read neither
// delta nor lse_bwd. scratch and errors as in forward.
int fsa_selected_branch_backward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q,
                                 ConstRows k, ConstRows v, const int32_t *block_indices, int local_blocks,
                                 ConstRows dout, const float *delta, const float *lse_bwd,
                                 const BranchGradients *branch_grads, void *scratch, Rows dq, Rows dk,
                                 Rows dv, cudaStream_t stream);

#endif
