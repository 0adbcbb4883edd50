// kernels.h: the launchers of all steps. A launcher takes device pointers, sizes and a stream,
// allocates nothing, never synchronizes, and returns an FsaStatus.
#ifndef FSA_KERNELS_H
#define FSA_KERNELS_H
#include "batch.cuh"

static inline float softmax_scale_of(const FsaConfig *c) {
    return c->scale != 0 ? c->scale : (float)(1 / __builtin_sqrt((double)c->head_dim));
}

// ---- query_lists.cu ---------------------------------------------------------------------------------
// Query lists: for every (KV head, slab of query rows) the entries (row, slot) in CSR form, ordered by the
// block that the slot names, within a block by row. Blocks are counted over all sequences (cu_blocks).
struct QueryLists {
    int64_t slab_rows, num_slabs;  // query rows of a slab; slabs
    int64_t max_blocks;            // bound on the blocks of all sequences
    int num_splits;                // thread blocks that sort one slab's rows, each a contiguous part of them
    int init_blocks, local_blocks; // a row's first and last blocks that the lists leave out
    uint32_t *entries; // [Hkv, Nq*T]; an entry is row*T + slot; slab i's begin at i*slab_rows*T
    uint32_t *offsets; // [Hkv, num_slabs, max_blocks + 1] where a block's list begins in its slab's entries
};
enum { FSA_MAX_SLAB = 65536 };
// As all sizes below: at least as much for a plan that is greater in some counts and smaller in none, here
// with fsa_selected_slab's slab. place leaves no block out.
size_t fsa_query_lists_bytes(const FsaConfig *c, const BatchLayout *p, int64_t slab);
QueryLists fsa_query_lists_at(const FsaConfig *c, const BatchLayout *p, int64_t slab, void *memory);
// indices [Hkv, Nq, T]; entries that are negative or not causal are left out, too. workspace:
// fsa_query_lists_scratch_bytes bytes, aligned to 16.
size_t fsa_query_lists_scratch_bytes(const FsaConfig *c, const BatchLayout *p, int64_t slab);
int fsa_query_lists(const FsaConfig *c, const BatchLayout *p, const int32_t *block_indices, const QueryLists *lists,
              void *workspace, cudaStream_t stream);

// ---- selected.cu --------------------------------------------------------------------------------------
// The selected branch. `memory` is fsa_selected_scratch_bytes, index lists among them, aligned to 256. On Hopper forward
// takes the forced blocks for chosen, and indices must have them.
int64_t fsa_selected_slab(const FsaConfig *c, const BatchLayout *p);
size_t fsa_selected_scratch_bytes(const FsaConfig *c, const BatchLayout *p, FsaDtype type, int backward);
// With a gate the merge of partials goes on to the gated sum of the three branches; o may then be its `sum`.
struct GateCombine {
    const void *logits;        // [Nq, Hq, 3] or [Nq, 3], 16-bit like the rest
    const void *o_cmp, *o_win; // the other branches' outputs, [Nq, Hq, d]
    void *sum;                 // sigmoid(logits[0]) o_cmp + sigmoid(logits[1]) o + sigmoid(logits[2]) o_win
};
int fsa_selected_branch_forward(const FsaConfig *c, const BatchLayout *p, FsaDtype type, const void *q, const void *k,
                    const void *v, const int32_t *block_indices, void *memory, void *o, float *lse,
                    const GateCombine *gate, cudaStream_t stream);
// Gradients of the other branches, fp32, that the selected branch's are added to. dq and dk are of rotated
// rows, and their sums are turned back by inv_freq; dk_plain is of keys before RoPE.
struct BranchGradients {
    const float *dq;                 // as dq_accum_row says
    const float *dk, *dv, *dk_plain; // [N, Hkv, d]
    const double *inv_freq;          // [d/2]; NULL turns nothing
};
// delta and lse_bwd [Nq, Hq] come from fsa_bwd_preprocess; rows that no list has aren't read. Overwrites dq, dk,
// dv with the selected branch's gradients and `others` (NULL: nothing, not turned back). A row's last `local`
// blocks are left out: fsa_window_backward takes them.
int fsa_selected_branch_backward(const FsaConfig *c, const BatchLayout *p, FsaDtype type, const void *q, const void *k,
                     const void *v, const int32_t *block_indices, int local, const void *dout, const float *delta,
                     const float *lse_bwd, const BranchGradients *others, void *memory, void *dq, void *dk, void *dv,
                     cudaStream_t stream);

// ---- gate.cu --------------------------------------------------------------------------------------------
// What the branches' backward passes read: delta = <dout, o_branch> and lse_bwd = lse - ln(gate), so that
// each of them takes the raw dout; +inf for a row that sees nothing. Overwrites dlogits. (Forward is
// GateCombine's.)
int fsa_gate_backward(const FsaConfig *c, FsaDtype type, int64_t nq, const void *logits,
                      const void *const o_branch[3], const float *const lse[3], const void *dout,
                      float *const delta[3], float *const lse_bwd[3], void *dlogits, cudaStream_t stream);
// The same for one branch without a gate. lse_bwd may be NULL: it is lse where all rows see something.
int fsa_bwd_preprocess(const FsaConfig *c, FsaDtype type, int64_t nq, const void *o, const float *lse,
                  const void *dout, float *delta, float *lse_bwd, cudaStream_t stream);

// ---- dense.cu ---------------------------------------------------------------------------------------
// Attention over tokens (rule = FSA_CAUSAL, FSA_WINDOW) or over windows (FSA_COMPRESSED, where k and v
// are kc and vc). q, o [Nq, Hq, d], k, v [N or M, Hkv, d], all rotated; lse [Nq, Hq] fp32.
int fsa_dense_forward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, FsaVisibility rule, const void *q,
                      const void *k, const void *v, void *o, float *lse, cudaStream_t stream);
// The forced blocks' part of the selected branch, normalized by itself. Hopper alone.
int fsa_dense_init_local_forward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *q, const void *k,
                     const void *v, void *o, float *lse, cudaStream_t stream);
// Gradients in fp32, so that branches sum up without rounding: dk, dv [N or M, Hkv, d], and dq as dq_accum_row
// has it.
// accumulate_dq, accumulate_dkv: 0 overwrites dq, and dk and dv; 1 adds to them. delta and lse_bwd come
// from fsa_bwd_preprocess or fsa_gate_backward; dout is raw. workspace: fsa_dense_backward_scratch_bytes bytes,
// aligned to 16. fsa_rope_gradient makes 16-bit gradients of the sums. The sums for dq lie in rows [Hkv, Nq,
// g] of d, so that the rows of any tile of tokens are one piece of memory; in a row the pieces of 8 numbers
// are exchanged by row % 4, so that threads that write the same columns of neighbouring rows to shared
// memory, where sums have the same layout, meet different banks.
__host__ __device__ static inline int64_t dq_accum_group_row(int64_t nq, int g, int64_t token, int kv_head) {
    return (kv_head * nq + token) * g; // the first of the g rows
}
__host__ __device__ static inline int64_t dq_accum_row(int64_t nq, int g, int64_t token, int head) {
    return dq_accum_group_row(nq, g, token, head / g) + head % g;
}
__host__ __device__ static inline int dq_accum_chunk(int64_t row, int piece) {
    return piece ^ (int)(row & 3);
}
size_t fsa_dense_backward_scratch_bytes(const FsaConfig *c, const BatchLayout *p, FsaVisibility rule);
int fsa_dense_backward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, FsaVisibility rule,
                       const void *q, const void *k, const void *v, const void *dout, const float *lse_bwd,
                       const float *delta, float *dq, float *dk, float *dv, int accumulate_dq,
                       int accumulate_dkv, void *workspace, cudaStream_t stream);

// The window's gradients and, in the same sums, those of the selected branch's last fsa_window_backward_local_blocks blocks.
// lse_bwd and delta of the selected branch and of the window.
int fsa_window_backward_local_blocks(const FsaConfig *c);
int fsa_window_backward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *q, const void *k,
                        const void *v, const void *dout, const float *const lse_bwd[2],
                        const float *const delta[2], float *dq, float *dk, float *dv, void *workspace,
                        cudaStream_t stream);

// ---- topk.cu ----------------------------------------------------------------------------------------
// The choice of blocks: indices [Hkv, Nq, T] from the rotated q, kc and the compressed branch's lse.
int fsa_topk(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *q, const void *kc,
             const float *lse_c, int32_t *block_indices, cudaStream_t stream);
int fsa_topk_sm80(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *q, const void *kc,
                  const float *lse_c, int32_t *block_indices, cudaStream_t stream);
// topk_sm90.cu: the same on Hopper, for configurations that suit it.
bool fsa_topk_sm90_supports(const FsaConfig *c);
int fsa_topk_sm90(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *q, const void *kc,
                  const float *lse_c, int32_t *block_indices, cudaStream_t stream);

// ---- compress.cu ------------------------------------------------------------------------------------
// k, v [N, Hkv, d] before RoPE -> kc, vc [M, Hkv, d], kc rotated. Weights for phi = linear: wk, wv
// [Hkv, l*d, d] and pe [Hkv, l, d], all of the 16-bit type (pe may be NULL: none); NULL for phi = mean.
// inv_freq [d/2] doubles on the device; NULL rotates nothing. workspace: fsa_compress_scratch_bytes bytes.
size_t fsa_compress_scratch_bytes(const FsaConfig *c, const BatchLayout *p, int backward);
int fsa_compress_forward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *k, const void *v,
                         const void *wk, const void *pe, const void *wv, const double *inv_freq, void *kc,
                         void *vc, void *workspace, cudaStream_t stream);
// dkc (of the rotated kc) and dvc in fp32, as fsa_dense_backward writes them. Overwrites dk, fp32 [N, Hkv,
// d], of k before RoPE; dv is overwritten (accumulate = 0) or added to (1). dwk, dpe, dwv in fp32 are added
// to (NULL for phi = mean).
int fsa_compress_backward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *k, const void *v,
                          const void *wk, const void *pe, const void *wv, const double *inv_freq,
                          const float *dkc, const float *dvc, float *dk, float *dv, int accumulate,
                          float *dwk, float *dpe, float *dwv, void *workspace, cudaStream_t stream);

// ---- rope.cu ----------------------------------------------------------------------------------------
// Rotates 16-bit rows: queries [Nq, Hq, d] at their segments' positions, keys [N, Hkv, d] at theirs in
// their sequence. out may be x. inv_freq as above; NULL copies.
int fsa_rope_queries(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *x,
                     const double *inv_freq, void *out, cudaStream_t stream);
int fsa_rope_keys(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *x, const double *inv_freq,
                  void *out, cudaStream_t stream);
// dq (16-bit) of its sums, which lie as dq_accum_row says.
int fsa_convert_dq(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const float *sums, void *dq,
                 cudaStream_t stream);

#endif
