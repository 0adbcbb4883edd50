// selected.cuh: what the selected branch's portable kernels (selected.cu) and Hopper's (selected_sm90.cu)
// share: how the work is cut, and how a thread block finds its part of the index lists.
//
// A main kernel turns each (token, head, slot) into a row of partial results in memory; a reduction merges a
// row's partials. A launch takes one slab of query rows and some kv heads, which bounds that memory. Each of
// its thread blocks takes a share of a head's list, as large as the others' in tiles of work: the lists of
// several KV blocks, the first and the last of them perhaps shared with its neighbours.
//
// Forward on Hopper leaves the forced blocks out of the lists, and so out of the main kernel: dense_sm90.cu
// has written their part to o and lse when the reduction merges the rest with it. Their places among the
// partials stay empty. Backward within the whole attention leaves out the last blocks alone, whose part comes
// with the window's gradients (fsa_window_backward).
#ifndef FSA_SELECTED_CUH
#define FSA_SELECTED_CUH
#include "kernels.h"
#include "launch.cuh"
#include "partial.cuh"

struct SelectedParams {
    BatchLayout batch;
    QueryLists lists;
    int64_t slab, tokens; // this launch's slab, and the query rows in it
    int head0;            // its first kv head; blockIdx.y or .z counts on
    int q_heads, kv_heads, group, block, topk;
    int parts, keys; // a block is worked on in `parts` parts of `keys` keys, and has as many partials a slot
    FastDivisor topk_divisor, group_divisor;
    int shares; // of a slab's list of a head
    // [Hkv, slabs, shares + 1]: where each begins in the slab's list, see work_ranges_kernel; and the block that this
    // lies in, or 0 for a cut at the list's start, whose first blocks may be empty.
    uint32_t *cuts, *cut_blocks;
    float scale;
    const void *q, *k, *v, *dout;
    const int32_t *block_indices;
    const float *delta, *lse_bwd;
    uint32_t kept;   // rows of `partial`, from the first on, that stay in the L2 until they are merged
    char *partial;   // [heads, slab*T, parts, group] rows of partial.cuh
    float2 *stats;   // forward: [heads, slab*T, parts, group] {lse in base 2, factor of the row}
    char *packed;    // Hopper's forward: V of the launch's heads, [heads, D/64, N, 64] fp16 (pack_v_kernel)
    float *factors;  // and what to multiply its blocks by, [heads, blocks, parts]
    float *dkv;      // backward: [heads, N, 2, D], the sums over the slabs so far
    float *crossing; // backward: [heads, shares, parts, keys, 2, D], see selected_backward_kernel
    void *o, *dq, *dk, *dv;
    float *lse;
    // The gated sum of all branches, where sum isn't NULL; per_token: one triple of logits for all heads.
    GateCombine gate;
    int per_token;
    BranchGradients others; // backward; pointers may be NULL
};

#ifdef __CUDACC__
// A thread block's share of a slab's list of one head.
struct Share {
    const uint32_t *entries, *offsets; // the slab's
    uint32_t entry0;                   // its first row's first entry
    uint32_t begin, end;               // the share
    uint32_t block;                    // of cut_blocks
};
static __device__ __forceinline__ int64_t first_cut(const SelectedParams &a, int head) {
    return (head * a.lists.num_slabs + a.slab) * (a.shares + 1);
}
static __device__ __forceinline__ Share share_of(const SelectedParams &a, int head, unsigned index) {
    Share s;
    int64_t row0 = a.slab * a.lists.slab_rows;
    s.entries = a.lists.entries + (head * a.batch.nq + row0) * a.topk;
    s.offsets = a.lists.offsets + (head * a.lists.num_slabs + a.slab) * (a.lists.max_blocks + 1);
    s.entry0 = (uint32_t)(row0 * a.topk);
    const bool there = index < (unsigned)a.shares;
    const int64_t at = first_cut(a, head) + (there ? index : 0);
    s.begin = there ? a.cuts[at] : 0, s.end = there ? a.cuts[at + 1] : 0;
    s.block = a.cut_blocks[at];
    return s;
}

// The entries of one KV block from `begin` on, as far as they lie in the share.
struct Run {
    uint32_t begin, count;
    int index, block;     // the block, counted over all sequences, and within its own
    int64_t key0;         // its first key row
    int keys;             // tokens that it has (the last of a sequence may be short)
    uint32_t first, last; // where the block's whole list starts and ends in the slab's
};

// Whole warps call it: the lanes look at 32 blocks' offsets at a time.
static __device__ __forceinline__ Run run_at(const SelectedParams &a, const Share &s, uint32_t begin) {
    const int lane = threadIdx.x % 32;
    int64_t lo = 0, hi = a.lists.max_blocks; // offsets[lo] <= begin < offsets[hi]
    while (hi - lo > 1) {
        int64_t step = (hi - lo + 31) / 32, at = lo + lane * step;
        unsigned below = __ballot_sync(0xffffffffu, at < hi && s.offsets[at] <= begin);
        lo += (31 - __clz((int)below)) * step; // lane 0's is always below
        hi = min(hi, lo + step);
    }
    Run r;
    r.index = (int)lo;
    r.first = s.offsets[lo], r.last = s.offsets[lo + 1];
    r.begin = begin, r.count = min(s.end, r.last) - begin;
    int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, lo);
    r.block = (int)(lo - a.batch.cu_blocks[seq]);
    r.key0 = a.batch.cu_seqlens[seq] + (int64_t)r.block * a.block;
    r.keys = (int)min((int64_t)a.block, a.batch.cu_seqlens[seq + 1] - r.key0);
    return r;
}

// The last key of the block that a query sees. Lists ascend by row, so only the first `block` queries from
// the list's start can lie in the block itself; the rest see all of it.
static __device__ __forceinline__ int last_key(const SelectedParams &a, const Run &r, int64_t in_list, int64_t row) {
    if (in_list >= a.block) return r.keys - 1;
    int64_t seq, pos;
    query_position(a.batch, row, &seq, &pos);
    return (int)min((int64_t)r.keys - 1, pos - (int64_t)r.block * a.block);
}

// Whether any of the first `slabs` slabs lists the block. Whole warps call it.
static __device__ __forceinline__ bool listed(const SelectedParams &a, int head, int64_t block, int64_t slabs) {
    for (int64_t s0 = 0; s0 < slabs; s0 += 32) {
        int64_t s = s0 + threadIdx.x % 32;
        const uint32_t *offsets = a.lists.offsets + (head * a.lists.num_slabs + s) * (a.lists.max_blocks + 1) + block;
        if (__any_sync(0xffffffffu, s < slabs && offsets[0] != offsets[1])) return true;
    }
    return false;
}

// Where the backward kernel's sums [keys, 2, D] over a run of share `index` belong, and whether they are
// added there. Whole warps call it.
template <int D>
static __device__ __forceinline__ float *sum_of(const SelectedParams &a, const Share &s, unsigned index,
                                                const Run &r, int part, bool *add) {
    bool starts = r.first >= s.begin;
    *add = starts && listed(a, a.head0 + blockIdx.y, r.index, a.slab);
    if (starts) return a.dkv + ((int64_t)blockIdx.y * a.batch.n + r.key0 + part * a.keys) * 2 * D;
    return a.crossing + (((int64_t)blockIdx.y * a.shares + index) * a.parts + part) * a.keys * 2 * D;
}
#endif

// selected_sm90.cu: the two main kernels for Hopper. They take the same arguments and leave the same
// partials, statistics and sums as the portable ones. a.keys is 64 or 128. pack comes before the forward
// kernels of some heads.
int fsa_selected_forward_sm80(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, cudaStream_t stream);
int fsa_selected_backward_sm80(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                          cudaStream_t stream);
int fsa_pack_v_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, cudaStream_t stream);
int fsa_selected_forward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, cudaStream_t stream);
int fsa_selected_backward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                          cudaStream_t stream);
// Shares that a multiprocessor works on at once.
int fsa_selected_ranges_per_sm_sm90(int keys, int backward);

// selected_combine.cu
int fsa_selected_combine(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, bool early,
                         cudaStream_t stream);
int fsa_selected_combine_backward(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, bool early,
                                  cudaStream_t stream);
int fsa_selected_store_dkv(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, bool early,
                           cudaStream_t stream);

#endif
