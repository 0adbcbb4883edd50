// selected.cuh: work distribution of the selected branch, shared by its kernels in sm80/ and sm90/.
//
// KV blocks are the outer loop, as in FSA. A main kernel keeps K and V of one KV block on chip and gathers
// the q rows of the queries that attend to the block. It writes one partial row per (row, top-k slot, key
// tile): o_partial and lse_partial forward, dq_partial backward. A combine kernel (selected_combine.cu) then
// reduces the partial rows of each row.
//
// Terms:
//   slab        a contiguous range of queries. One launch processes one slab and some KV heads, which bounds
//               the memory of the partial rows.
//   row         one (query, query head). Each query has g = q_heads / kv_heads rows per KV head.
//   query list  the queries of a slab that attend to a KV block, in ascending order (query_lists.cu, CSR). An
//               entry is query * T + slot, where the query's top-k slot names the block.
//   key tile    tile_keys keys of a KV block, the unit that the main kernels hold on chip.
//   work range  a contiguous part of a slab's query lists of one KV head. A thread block processes one work
//               range; in sm90/selected_bwd.cu with key tiles of 64 keys, two. A work range covers the
//               query lists of several KV blocks. Its first and last list may continue into the neighbouring
//               work ranges. All work ranges have about the same cost (selected.cu).
//
// The query lists may leave out a query's initial and local blocks. Their partial rows are then neither
// written nor read.
//   forward, sm90/   leaves out both. The dense kernel has already written their normalized output and lse to
//                    o and lse, and the combine kernel adds the partial rows.
//   backward, sm90/  leaves out the local blocks whose gradients fsa_window_backward computes together with
//                    the window's.
#ifndef FSA_SELECTED_CUH
#define FSA_SELECTED_CUH
#include "kernels.h"
#include "launch.cuh"
#include "partial.cuh"

struct SelectedParams {
    BatchLayout batch;
    QueryLists lists;
    int64_t slab_index, num_queries; // this launch's slab and the number of queries in it
    int kv_head0;                    // this launch's first KV head; blockIdx.y counts from it
    int q_heads, kv_heads, group, block, topk;
    int key_tiles, tile_keys; // a KV block has key_tiles tiles of tile_keys (64 or 128) keys
    FastDivisor topk_divisor, group_divisor;
    int num_ranges; // work ranges per (KV head, slab)
    // [Hkv, slabs, num_ranges + 1]: the position in the slab's entries at which each work range begins, and
    // the KV block whose list has this position (0 for position 0: the first blocks' lists may be empty).
    uint32_t *range_offsets, *range_blocks;
    float scale;
    ConstRows q, k, v, dout;
    const int32_t *block_indices;
    const float *delta, *lse_bwd;
    uint32_t l2_rows; // the first l2_rows partial rows stay in L2 until the combine kernel reads them
    char *partial;    // o_partial or dq_partial: [heads, slab queries * T, key_tiles, g] rows of partial.cuh
    // Forward: [heads, slab queries * T, key_tiles, g] {lse in base 2, scale}. The o_partial row times this
    // scale is the output normalized within the key tile.
    float2 *lse_partial;
    // Forward, sm90/: V of this launch's heads as fp16, [heads, D/64, N, 64] (pack_v.cu), and its scales,
    // [heads, blocks, key_tiles]: V = v_packed * v_scale.
    char *v_packed;
    float *v_scale;
    float *dkv_accum; // backward: [heads, N, 2, D] dK / scale and dV, summed over the slabs so far
    // Backward: [heads, num_ranges, key_tiles, tile_keys, 2, D] dK / scale and dV of the KV block whose
    // query list continues from the previous work range into this one.
    float *dkv_partial;
    Rows o, dq, dk, dv;
    float *lse;
    GateCombine gate;             // forward: the gated sum of all branches, unless o_gated is NULL
    int gate_per_token;           // one triple of gate logits for all heads of a query
    BranchGradients branch_grads; // backward: gradients of the other branches; pointers may be NULL
};

#ifdef __CUDACC__
struct WorkRange {
    const uint32_t *entries, *offsets; // the slab's query lists
    uint32_t entry0;                   // the smallest entry of the slab: its first query * T
    uint32_t begin, end;               // positions in `entries`
    uint32_t first_block;              // of range_blocks
};
// Returns the index in range_offsets of the first work range of (kv_head, this launch's slab).
static __device__ __forceinline__ int64_t range_offset_index(const SelectedParams &a, int kv_head) {
    return (kv_head * a.lists.num_slabs + a.slab_index) * (a.num_ranges + 1);
}
// Returns work range `index`, an empty one if index >= num_ranges.
static __device__ __forceinline__ WorkRange work_range_of(const SelectedParams &a, int kv_head,
                                                          unsigned index) {
    WorkRange range;
    int64_t first_query = a.slab_index * a.lists.slab_queries;
    range.entries = a.lists.entries + (kv_head * a.batch.nq + first_query) * a.topk;
    range.offsets = a.lists.offsets + (kv_head * a.lists.num_slabs + a.slab_index) * (a.lists.max_blocks + 1);
    range.entry0 = (uint32_t)(first_query * a.topk);
    const bool valid = index < (unsigned)a.num_ranges;
    const int64_t i = range_offset_index(a, kv_head) + (valid ? index : 0);
    range.begin = valid ? a.range_offsets[i] : 0, range.end = valid ? a.range_offsets[i + 1] : 0;
    range.first_block = a.range_blocks[i];
    return range;
}

// One KV block and the part of its query list that lies in a work range.
struct KvBlockEntries {
    uint32_t entry_begin, num_entries; // positions in the slab's entries
    int index, index_in_seq;           // of the block, in the batch and in its sequence
    int64_t key0;                      // the block's first key
    int num_keys;                      // keys of the block; the last block of a sequence may be short
    uint32_t list_begin, list_end;     // the block's whole query list
};

// Finds the KV block whose query list holds entry `begin`. A search with 32 probes per step: all lanes of a
// warp must call it.
static __device__ __forceinline__ KvBlockEntries find_kv_block(const SelectedParams &a,
                                                               const WorkRange &range, uint32_t begin) {
    const int lane = threadIdx.x % 32;
    int64_t lo = 0, hi = a.lists.max_blocks; // offsets[lo] <= begin < offsets[hi]
    while (hi - lo > 1) {
        int64_t step = (hi - lo + 31) / 32, probe = lo + lane * step;
        unsigned below = __ballot_sync(0xffffffffu, probe < hi && range.offsets[probe] <= begin);
        lo += (31 - __clz((int)below)) * step; // lane 0 is always below
        hi = min(hi, lo + step);
    }
    KvBlockEntries kv_block;
    kv_block.index = (int)lo;
    kv_block.list_begin = range.offsets[lo], kv_block.list_end = range.offsets[lo + 1];
    kv_block.entry_begin = begin, kv_block.num_entries = min(range.end, kv_block.list_end) - begin;
    int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, lo);
    kv_block.index_in_seq = (int)(lo - a.batch.cu_blocks[seq]);
    kv_block.key0 = a.batch.cu_seqlens[seq] + (int64_t)kv_block.index_in_seq * a.block;
    kv_block.num_keys = (int)min((int64_t)a.block, a.batch.cu_seqlens[seq + 1] - kv_block.key0);
    return kv_block;
}

// Returns the last key of the block that a query sees. list_position: the query's position in the list. The
// list ascends, so only its first `block` queries can lie inside the block. All later queries see the whole
// block.
static __device__ __forceinline__ int last_visible_key(const SelectedParams &a,
                                                       const KvBlockEntries &kv_block, int64_t list_position,
                                                       int64_t query) {
    if (list_position >= a.block) return kv_block.num_keys - 1;
    int64_t seq, pos;
    query_position(a.batch, query, &seq, &pos);
    return (int)min((int64_t)kv_block.num_keys - 1, pos - (int64_t)kv_block.index_in_seq * a.block);
}

// Returns whether a query of the first num_slabs slabs attends to the block. All lanes of a warp must call
// it.
static __device__ __forceinline__ bool has_queries(const SelectedParams &a, int kv_head, int64_t block,
                                                   int64_t num_slabs) {
    for (int64_t slab0 = 0; slab0 < num_slabs; slab0 += 32) {
        int64_t slab = slab0 + threadIdx.x % 32;
        const uint32_t *offsets =
            a.lists.offsets + (kv_head * a.lists.num_slabs + slab) * (a.lists.max_blocks + 1) + block;
        if (__any_sync(0xffffffffu, slab < num_slabs && offsets[0] != offsets[1])) return true;
    }
    return false;
}

// Returns the address to which the backward kernel stores dK / scale and dV [keys, 2, D] of a key tile of
// work range `index`. Sets *accumulate: whether the kernel must add to the values at this address. The work
// range in which a block's query list begins owns the block's rows of dkv_accum; a later work range writes
// dkv_partial. All lanes of a warp must call it.
template <int D>
static __device__ __forceinline__ float *dkv_destination(const SelectedParams &a, const WorkRange &range,
                                                         unsigned index, const KvBlockEntries &kv_block,
                                                         int key_tile, bool *accumulate) {
    bool owner = kv_block.list_begin >= range.begin;
    *accumulate = owner && has_queries(a, a.kv_head0 + blockIdx.y, kv_block.index, a.slab_index);
    if (owner)
        return a.dkv_accum +
               ((int64_t)blockIdx.y * a.batch.n + kv_block.key0 + key_tile * a.tile_keys) * 2 * D;
    return a.dkv_partial +
           (((int64_t)blockIdx.y * a.num_ranges + index) * a.key_tiles + key_tile) * a.tile_keys * 2 * D;
}
#endif

// Launchers of the kernels for `heads` KV heads, the first of which is kv_head0, and the slab slab_index.
// head_dim: 64 or 128. Each returns an FsaStatus.
//
// sm80/selected_fwd.cu, sm80/selected_bwd.cu: the main kernels for any GPU.
int fsa_selected_forward_sm80(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                              cudaStream_t stream);
int fsa_selected_backward_sm80(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                               cudaStream_t stream);
// sm90/pack_v.cu, sm90/selected_fwd.cu, sm90/selected_bwd.cu: the main kernels for Hopper, which write the
// same partial rows. fsa_pack_v_sm90 writes v_packed and v_scale, which the forward kernel reads.
int fsa_pack_v_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                    cudaStream_t stream);
int fsa_selected_forward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                              cudaStream_t stream);
int fsa_selected_backward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                               cudaStream_t stream);
// Returns the work ranges that an SM processes at a time with the sm90 kernels.
int fsa_selected_ranges_per_sm_sm90(int tile_keys, int backward);

// selected_combine.cu. use_pdl: programmatic dependent launch (launch.cuh).
// Sets *pdl to whether the kernels of this file support it: they are compiled together. The query costs as
// much time as a launch, so a call of the branch makes it once. Returns an FsaStatus.
int fsa_selected_combine_supports_pdl(FsaDtype dtype, int head_dim, bool *pdl);
// Forward, after the main kernel of a slab: o, lse and o_gated from the partial rows.
int fsa_selected_combine(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, bool use_pdl,
                         cudaStream_t stream);
// Backward, after the main kernel of a slab: dq from the partial rows, dkv_accum += dkv_partial.
int fsa_selected_combine_backward(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                                  bool use_pdl, cudaStream_t stream);
// Backward, after the last slab: dk and dv from dkv_accum.
int fsa_selected_store_dkv(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                           bool use_pdl, cudaStream_t stream);

#endif
