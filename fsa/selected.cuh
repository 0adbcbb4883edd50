// selected.cuh: work distribution of the selected branch, shared by its kernels in sm80/ and sm90/.
//
// KV blocks are the outer loop, as in FSA. A main kernel keeps K and V of one KV block on chip, gathers the q
// rows of the queries that attend to the block, and writes one partial row per (row, top-k slot, key tile):
// o_partial and lse_partial forward, dq_partial backward. A combine kernel (selected_combine.cu) then reduces
// the partial rows of each row.
//
// Terms:
//   slab        a contiguous range of queries. One launch processes one slab and some KV heads, which bounds
//               the memory of the partial rows.
//   row         one (query, query head). Each query has g = q_heads / kv_heads rows per KV head.
//   query list  the queries of a slab that attend to a KV block, in ascending order (query_lists.cu, CSR). An
//               entry is query * T + slot, where the query's top-k slot names the block.
//   key tile    tile_keys keys of a KV block, the unit that the main kernels hold on chip.
//   work range  the contiguous part of a (KV head, slab)'s entries that one thread block processes. It covers
//               the query lists of several KV blocks; the first and the last list may continue into the
//               neighbouring work ranges. All work ranges hold about the same number of 64-row tiles.
//
// The query lists may leave out a query's initial and local blocks. Forward on Hopper leaves out both: the
// dense kernel has already written their normalized output and lse to o and lse, and the combine kernel adds
// the partial rows. Backward of the whole attention leaves out the local blocks: fsa_window_backward computes
// their gradients together with the window's. Partial rows of blocks that are left out are never written nor
// read.
#ifndef FSA_SELECTED_CUH
#define FSA_SELECTED_CUH
#include "kernels.h"
#include "launch.cuh"
#include "partial.cuh"

struct SelectedParams {
    BatchLayout batch;
    QueryLists lists;
    int64_t slab_index, slab_queries; // this launch's slab and the number of its queries
    int head0;                        // this launch's first KV head; blockIdx.y counts from it
    int q_heads, kv_heads, group, block, topk;
    int key_tiles, tile_keys; // a KV block has key_tiles tiles of tile_keys (64 or 128) keys
    FastDivisor topk_divisor, group_divisor;
    int num_ranges; // work ranges per (KV head, slab)
    // [Hkv, slabs, num_ranges + 1]: the first entry of each work range, and the KV block that holds this
    // entry (0 for an entry at the start of the slab, where the first blocks may have empty lists).
    uint32_t *range_offsets, *range_blocks;
    float scale;
    const void *q, *k, *v, *dout;
    const int32_t *block_indices;
    const float *delta, *lse_bwd;
    uint32_t l2_rows;    // the first l2_rows partial rows stay in L2 until the combine kernel reads them
    char *partial;       // o_partial or dq_partial: [heads, slab * T, key_tiles, g] rows of partial.cuh
    float2 *lse_partial; // forward: [heads, slab * T, key_tiles, g] {lse in base 2, scale of o_partial's row}
    char *v_packed;      // forward on Hopper: V of this launch's heads, [heads, D/64, N, 64] fp16 (pack_v.cu)
    float *v_scale;      // and its scales, [heads, blocks, key_tiles]: V = v_packed * v_scale
    float *dkv_accum;    // backward: [heads, N, 2, D] dK and dV, summed over the slabs so far
    // Backward: [heads, num_ranges, key_tiles, tile_keys, 2, D] dK and dV of the KV block whose query list
    // continues from the previous work range into this one.
    float *dkv_partial;
    void *o, *dq, *dk, *dv;
    float *lse;
    GateCombine gate;             // forward: the gated sum of all branches, unless o_gated is NULL
    int gate_per_token;           // one triple of gate logits for all heads of a token
    BranchGradients branch_grads; // backward: gradients of the other branches; pointers may be NULL
};

#ifdef __CUDACC__
struct WorkRange {
    const uint32_t *entries, *offsets; // the slab's query lists
    uint32_t entry0;                   // the smallest entry of the slab: its first query * T
    uint32_t begin, end;               // positions in `entries`
    uint32_t first_block;              // of range_blocks
};
// Index in range_offsets of the first work range of (head, this launch's slab).
static __device__ __forceinline__ int64_t range_offset_index(const SelectedParams &a, int head) {
    return (head * a.lists.num_slabs + a.slab_index) * (a.num_ranges + 1);
}
// Work range `index`; empty if index >= num_ranges.
static __device__ __forceinline__ WorkRange work_range_of(const SelectedParams &a, int head, unsigned index) {
    WorkRange range;
    int64_t row0 = a.slab_index * a.lists.slab_rows;
    range.entries = a.lists.entries + (head * a.batch.nq + row0) * a.topk;
    range.offsets = a.lists.offsets + (head * a.lists.num_slabs + a.slab_index) * (a.lists.max_blocks + 1);
    range.entry0 = (uint32_t)(row0 * a.topk);
    const bool valid = index < (unsigned)a.num_ranges;
    const int64_t i = range_offset_index(a, head) + (valid ? index : 0);
    range.begin = valid ? a.range_offsets[i] : 0, range.end = valid ? a.range_offsets[i + 1] : 0;
    range.first_block = a.range_blocks[i];
    return range;
}

// One KV block and the part of its query list that lies in a work range.
struct KvBlockEntries {
    uint32_t entry_begin, num_entries; // positions in the slab's entries
    int index, index_in_seq;           // of the block, in the batch and in its sequence
    int64_t key0;                      // its first row in k and v
    int num_keys;                      // its keys; the last block of a sequence may be short
    uint32_t list_begin, list_end;     // the block's whole query list
};

// Finds the KV block whose query list holds entry `begin`. Binary search with 32 probes a step: all lanes of
// a warp must call it.
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

// The last key of the block that a query sees. A query list ascends, so only its first `block` queries can
// lie inside the block; all later ones see the whole block. list_position: the query's position in the list.
static __device__ __forceinline__ int last_visible_key(const SelectedParams &a,
                                                       const KvBlockEntries &kv_block, int64_t list_position,
                                                       int64_t query) {
    if (list_position >= a.block) return kv_block.num_keys - 1;
    int64_t seq, pos;
    query_position(a.batch, query, &seq, &pos);
    return (int)min((int64_t)kv_block.num_keys - 1, pos - (int64_t)kv_block.index_in_seq * a.block);
}

// Whether a query of the first num_slabs slabs attends to the block. All lanes of a warp must call it.
static __device__ __forceinline__ bool has_queries(const SelectedParams &a, int head, int64_t block,
                                                   int64_t num_slabs) {
    for (int64_t slab0 = 0; slab0 < num_slabs; slab0 += 32) {
        int64_t slab = slab0 + threadIdx.x % 32;
        const uint32_t *offsets =
            a.lists.offsets + (head * a.lists.num_slabs + slab) * (a.lists.max_blocks + 1) + block;
        if (__any_sync(0xffffffffu, slab < num_slabs && offsets[0] != offsets[1])) return true;
    }
    return false;
}

// Where the backward kernel stores dK and dV [keys, 2, D] of a key tile of work range `index`, and whether it
// must add to the values there. The work range in which a block's query list begins owns the block's rows of
// dkv_accum; a later one writes dkv_partial. All lanes of a warp must call it.
template <int D>
static __device__ __forceinline__ float *dkv_destination(const SelectedParams &a, const WorkRange &range,
                                                         unsigned index, const KvBlockEntries &kv_block,
                                                         int key_tile, bool *accumulate) {
    bool owner = kv_block.list_begin >= range.begin;
    *accumulate = owner && has_queries(a, a.head0 + blockIdx.y, kv_block.index, a.slab_index);
    if (owner)
        return a.dkv_accum +
               ((int64_t)blockIdx.y * a.batch.n + kv_block.key0 + key_tile * a.tile_keys) * 2 * D;
    return a.dkv_partial +
           (((int64_t)blockIdx.y * a.num_ranges + index) * a.key_tiles + key_tile) * a.tile_keys * 2 * D;
}
#endif

// Launchers of the kernels for `heads` KV heads from head0 on and the slab slab_index. head_dim: 64 or 128.
// Each returns an FsaStatus.
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
// Work ranges that an SM processes at a time on Hopper.
int fsa_selected_ranges_per_sm_sm90(int tile_keys, int backward);

// selected_combine.cu. use_pdl: programmatic dependent launch (launch.cuh).
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
