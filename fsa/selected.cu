// selected.cu: the selected branch: sizes of slabs and work ranges, scratch memory, order of the launches,
// and the kernel that divides the query lists into work ranges. selected.cuh defines the terms.
//
// Launches, in one stream. [...] is for the sm90 kernels only.
//     forward:   [initial and local blocks: dense kernel], query lists, work ranges
//                for the KV heads of each launch:
//                    [pack V]
//                    for each slab: main kernel, combine
//     backward:  query lists, work ranges
//                for the KV heads of each launch:
//                    for each slab: main kernel, combine
//                    store dK, dV
// On Hopper, most kernels start while the preceding kernel still runs (programmatic dependent launch).
#include "selected.cuh"

enum {
    FORWARD_PARTIAL_BYTES = FSA_SMALL_LIMITS ? 128 << 10 : 96 << 20,   // target of a launch's partial rows
    BACKWARD_PARTIAL_BYTES = FSA_SMALL_LIMITS ? 128 << 10 : 193 << 20, // backward: the same
    MIN_LAUNCH_TOKENS = FSA_SMALL_LIMITS ? 64 : 512, // queries * KV heads, even beyond that target
    KV_SCRATCH_BYTES = 64 << 20, // limit of dkv_accum and v_packed, unless one head needs more
    L2_PARTIAL_BYTES = 8 << 20,  // forward: partial rows that stay in L2 for the combine kernel
    MIN_RANGE_ENTRIES = 64,      // minimum of the average entries per work range
};

// Inclusive prefix sum of x over the lanes of a warp.
static __device__ __forceinline__ uint32_t warp_inclusive_scan(uint32_t x) {
    for (int i = 1; i < 32; i *= 2) {
        const uint32_t below = __shfl_up_sync(0xffffffffu, x, i);
        if (threadIdx.x % 32 >= i) x += below;
    }
    return x;
}

// Writes range_offsets and range_blocks: a thread block divides the entries of one (slab, KV head) into
// num_ranges work ranges.
//
// The cost of a query list is its number of 64-row tiles plus one. The extra tile stands for the load of K
// and V and for the partly filled last tile. With the number of entries as the cost, a range of many short
// lists would take twice as long as the others.
//
// Range i nominally starts at entry i * n / num_ranges of the slab's n entries. Within the sequence that
// holds this entry, the start moves to the same fraction of the sequence's cost. If every query has min(T,
// blocks up to its own) blocks, the number of entries of a sequence does not depend on its block indices.
// Then the ranges of a sequence, and the order of its sums, do not depend on the block indices of other
// sequences. A range may be empty.
//
// Each warp computes consecutive ranges: a first pass over the offsets of a sequence sums the costs, a second
// pass finds the starts. The kernel is limited by latency.
enum { RANGE_THREADS = 1024 };
static __global__ void __launch_bounds__(RANGE_THREADS) work_ranges_kernel(SelectedParams a) {
    a.slab_index = blockIdx.x;
    const int kv_head = blockIdx.y, lane = threadIdx.x % 32;
    WorkRange slab = {};
    slab.offsets = a.lists.offsets + (kv_head * a.lists.num_slabs + a.slab_index) * (a.lists.max_blocks + 1);
    slab.end = slab.offsets[a.lists.max_blocks];
    const int64_t out = range_offset_index(a, kv_head);
    const int per_warp = (a.num_ranges + RANGE_THREADS / 32) / (RANGE_THREADS / 32),
              first_range = threadIdx.x / 32 * per_warp;
    int seq_end = 0, block = 0;              // end of the sequence's blocks; this lane's block
    uint32_t seq_begin = 0, seq_entries = 0; // the sequence's first entry and number of entries
    uint32_t seq_cost = 0, before = 0; // cost of the sequence; of its blocks before the warp's 32 blocks
    uint32_t block_cost = 0,
             inclusive = 0; // cost of this lane's block; of all blocks up to this one, inclusive
    auto cost = [&](int block) {
        const uint32_t count = block < seq_end ? slab.offsets[block + 1] - slab.offsets[block] : 0;
        return count ? (count * a.group + 63) / 64 + 1 : 0;
    };
    for (int i = first_range; i <= min(first_range + per_warp - 1, a.num_ranges); i++) {
        const uint32_t entry = (uint32_t)((uint64_t)i * slab.end / a.num_ranges);
        uint32_t range_offset = entry, range_block = 0;
        if (entry > 0 && entry < slab.end) {
            if (entry - seq_begin >= seq_entries) { // first range start in a new sequence: sum its costs
                const KvBlockEntries kv_block = find_kv_block(a, slab, entry);
                const int first_block = kv_block.index - kv_block.index_in_seq;
                const int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, kv_block.index);
                seq_end = (int)a.batch.cu_blocks[seq + 1];
                seq_begin = slab.offsets[first_block], seq_entries = slab.offsets[seq_end] - seq_begin;
                seq_cost = 0, before = 0, block = first_block + lane;
                for (int other = block; other < seq_end; other += 32) seq_cost += cost(other);
                seq_cost = __shfl_sync(0xffffffffu, warp_inclusive_scan(seq_cost), 31);
                block_cost = cost(block), inclusive = warp_inclusive_scan(block_cost);
            }
            // Advance by 32 blocks until the cost prefix passes the target.
            const uint32_t target = (uint32_t)((uint64_t)(entry - seq_begin) * seq_cost / seq_entries);
            unsigned above;
            while (!(above = __ballot_sync(0xffffffffu, inclusive > target))) {
                before = __shfl_sync(0xffffffffu, inclusive, 31);
                block += 32, block_cost = cost(block), inclusive = before + warp_inclusive_scan(block_cost);
            }
            const int source_lane = __ffs((int)above) - 1;
            const uint32_t tiles = target - __shfl_sync(0xffffffffu, inclusive - block_cost, source_lane);
            // The first tile of a block's cost is the extra one.
            range_block = __shfl_sync(0xffffffffu, block, source_lane);
            range_offset = slab.offsets[range_block] + (tiles ? tiles - 1 : 0) * 64 / a.group;
        }
        if (lane == 0) a.range_offsets[out + i] = range_offset, a.range_blocks[out + i] = range_block;
    }
}

// ---- sizes and scratch memory -----------------------------------------------------------------------

static size_t round_up(size_t x) {
    return (x + 255) / 256 * 256;
}
static int64_t min_i64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static int64_t max_i64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// The sizes of a forward or backward pass and of each array in scratch memory. A larger batch can have fewer
// queries or KV heads per launch, but never smaller arrays: each *_bytes is an upper bound for all batches
// whose counts are all at most as large.
struct SelectedSizes {
    int group, tile_keys, key_tiles;
    int heads;            // KV heads per launch
    int num_ranges;       // work ranges per (KV head, slab)
    int init, local;      // initial and local blocks that the query lists leave out
    int64_t slab_queries; // queries per slab
    int64_t l2_rows;      // see SelectedParams
    size_t list_bytes, range_bytes, sort_bytes, partial_bytes, lse_bytes, v_packed_bytes, v_scale_bytes,
        dkv_accum_bytes, dkv_partial_bytes;
    bool sm90;
    // The scratch memory of the sort overlaps the arrays of the main kernels.
    size_t scratch_bytes() const {
        return list_bytes + range_bytes +
               max_i64(sort_bytes, partial_bytes + lse_bytes + v_packed_bytes + v_scale_bytes +
                                       dkv_accum_bytes + dkv_partial_bytes);
    }
};

static SelectedSizes make_sizes(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, int backward) {
    SelectedSizes s;
    const bool packed_dq = backward && dtype == FSA_BF16;
    const int row_bytes = packed_dq ? c->head_dim / 8 * PartialChunk<__nv_bfloat16>::BYTES : c->head_dim * 2;
    s.sm90 = fsa_use_sm90();
    s.group = c->q_heads / c->kv_heads;
    const int max_tile_keys = c->block > 64 ? 128 : 64, backward_tile_keys = s.sm90 ? max_tile_keys : 64;
    s.tile_keys = backward ? backward_tile_keys : max_tile_keys;
    s.key_tiles = (int)ceil_div(c->block, s.tile_keys);
    const bool skip_init_local = s.sm90 && !backward; // fsa_dense_init_local_forward computes these blocks
    s.init = skip_init_local ? c->init_blocks : 0, s.local = skip_init_local ? c->local_blocks : 0;
    // Queries per slab and KV heads per launch, from the target size of the partial rows.
    const int64_t target_bytes = backward ? BACKWARD_PARTIAL_BYTES : FORWARD_PARTIAL_BYTES;
    int64_t token_slots = (int64_t)c->topk * ceil_div(c->block, backward_tile_keys),
            token_bytes = token_slots * s.group * row_bytes; // partial rows of one query and KV head
    const int64_t max_tokens =
        max_i64(target_bytes / token_bytes, MIN_LAUNCH_TOKENS); // maximum of queries * heads per launch
    s.slab_queries = min_i64(max_tokens / 64 * 64, FSA_MAX_SLAB);
    int64_t nq = batch->nq > 0 ? batch->nq : 1;
    s.slab_queries = ceil_div(nq, ceil_div(nq, s.slab_queries)); // equal slabs
    const bool pack_v = s.sm90 && !backward;
    const int64_t head_kv_bytes = batch->n * c->head_dim *
                                  (backward ? 2 * (int64_t)sizeof(float)
                                   : pack_v ? 2
                                            : 0);
    int64_t heads = min_i64(c->kv_heads, target_bytes / token_bytes / s.slab_queries);
    if (head_kv_bytes > 0) heads = min_i64(heads, KV_SCRATCH_BYTES / head_kv_bytes);
    s.heads = (int)max_i64(heads, 1);
    // One wave: as many work ranges as the GPU processes at a time.
    int64_t resident_ranges = s.sm90     ? fsa_selected_ranges_per_sm_sm90(s.tile_keys, backward)
                              : backward ? 2
                                         : 3;
    resident_ranges *= fsa_num_sms();
    s.num_ranges = (int)min_i64(max_i64(resident_ranges / s.heads, 1),
                                ceil_div(s.slab_queries * c->topk, MIN_RANGE_ENTRIES));
    // Bounds for all smaller batches.
    const int64_t max_rows = min_i64(c->kv_heads * nq, max_tokens) * c->topk * s.key_tiles * s.group;
    const int64_t max_kv_bytes =
        min_i64(c->kv_heads * head_kv_bytes, max_i64(KV_SCRATCH_BYTES, head_kv_bytes));
    const int64_t max_ranges = min_i64(c->kv_heads * ceil_div(nq * c->topk, MIN_RANGE_ENTRIES),
                                       max_i64(resident_ranges, c->kv_heads));
    s.list_bytes = fsa_query_lists_bytes(c, batch, s.slab_queries);
    const int64_t max_slabs = ceil_div(nq, min_i64(max_tokens / 64 * 64, FSA_MAX_SLAB));
    s.range_bytes =
        round_up(c->kv_heads * max_slabs * (max_i64(resident_ranges, 1) + 1) * 2 * sizeof(uint32_t));
    s.sort_bytes = fsa_query_lists_scratch_bytes(c, batch, s.slab_queries);
    s.partial_bytes = round_up(max_rows * row_bytes);
    s.l2_rows =
        skip_init_local ? L2_PARTIAL_BYTES / token_bytes * token_slots * s.group : 0; // of whole queries
    s.lse_bytes = backward ? 0 : round_up(max_rows * sizeof(float2));
    s.v_packed_bytes = pack_v ? round_up(max_kv_bytes) : 0;
    s.v_scale_bytes =
        pack_v ? round_up((size_t)c->kv_heads * fsa_max_blocks(c, batch) * s.key_tiles * sizeof(float)) : 0;
    s.dkv_accum_bytes = backward ? round_up(max_kv_bytes) : 0;
    s.dkv_partial_bytes =
        backward ? round_up((size_t)max_ranges * s.key_tiles * s.tile_keys * 2 * c->head_dim * sizeof(float))
                 : 0;
    return s;
}

int64_t fsa_selected_slab_queries(const FsaConfig *c, const BatchLayout *batch) {
    return make_sizes(c, batch, FSA_BF16, 0).slab_queries;
}

size_t fsa_selected_scratch_bytes(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype,
                                  int backward) {
    return make_sizes(c, batch, dtype, backward).scratch_bytes();
}

static SelectedParams make_params(const FsaConfig *c, const BatchLayout *batch, const SelectedSizes &s,
                                  void *scratch) {
    SelectedParams a = {};
    a.batch = *batch, a.lists = fsa_query_lists_at(c, batch, s.slab_queries, scratch);
    a.lists.init_blocks = s.init, a.lists.local_blocks = s.local;
    a.q_heads = c->q_heads, a.kv_heads = c->kv_heads, a.group = s.group, a.block = c->block, a.topk = c->topk;
    a.key_tiles = s.key_tiles, a.tile_keys = s.tile_keys, a.num_ranges = s.num_ranges;
    a.scale = softmax_scale(c);
    a.topk_divisor = make_fast_divisor(a.topk), a.group_divisor = make_fast_divisor(a.group);
    a.l2_rows = (uint32_t)s.l2_rows;
    char *next = (char *)scratch + s.list_bytes;
    auto allocate = [&next](size_t bytes) { return (next += bytes) - bytes; };
    a.range_offsets = (uint32_t *)allocate(s.range_bytes);
    a.range_blocks = a.range_offsets + s.range_bytes / sizeof(uint32_t) / 2;
    a.partial = allocate(s.partial_bytes);
    a.lse_partial = (float2 *)allocate(s.lse_bytes);
    a.v_packed = allocate(s.v_packed_bytes);
    a.v_scale = (float *)allocate(s.v_scale_bytes);
    a.dkv_accum = (float *)allocate(s.dkv_accum_bytes);
    a.dkv_partial = (float *)allocate(s.dkv_partial_bytes);
    return a;
}

// ---- launches ---------------------------------------------------------------------------------------

// Builds the query lists and their work ranges for all slabs and KV heads.
static int build_lists_and_ranges(const FsaConfig *c, const BatchLayout *batch, const int32_t *block_indices,
                                  SelectedParams *a, cudaStream_t stream) {
    // The sort uses the memory of the partial rows as scratch.
    TRY(fsa_query_lists(c, batch, block_indices, &a->lists, a->partial, stream));
    if (a->lists.num_slabs == 0) return FSA_OK;
    dim3 grid((unsigned)a->lists.num_slabs, (unsigned)c->kv_heads);
    TRY(LAUNCH(work_ranges_kernel, grid, RANGE_THREADS, 0, stream, *a));
    a->block_indices = block_indices;
    return FSA_OK;
}

static int selected_forward(SelectedParams a, const SelectedSizes &s, FsaDtype dtype, int head_dim,
                            cudaStream_t stream) {
    bool use_pdl = false;
    if (s.sm90) TRY(fsa_selected_combine_supports_pdl(dtype, head_dim, &use_pdl));
    for (a.kv_head0 = 0; a.kv_head0 < a.kv_heads; a.kv_head0 += s.heads) {
        unsigned heads = (unsigned)(a.kv_heads - a.kv_head0 < s.heads ? a.kv_heads - a.kv_head0 : s.heads);
        if (s.sm90) TRY(fsa_pack_v_sm90(a, dtype, head_dim, heads, stream));
        for (a.slab_index = 0; a.slab_index < a.lists.num_slabs; a.slab_index++) {
            a.num_queries = a.batch.nq - a.slab_index * s.slab_queries < s.slab_queries
                                ? a.batch.nq - a.slab_index * s.slab_queries
                                : s.slab_queries;
            TRY(s.sm90 ? fsa_selected_forward_sm90(a, dtype, head_dim, heads, stream)
                       : fsa_selected_forward_sm80(a, dtype, head_dim, heads, stream));
            TRY(fsa_selected_combine(a, dtype, head_dim, heads, use_pdl, stream));
        }
    }
    return FSA_OK;
}

static int selected_backward(SelectedParams a, const SelectedSizes &s, FsaDtype dtype, int head_dim,
                             cudaStream_t stream) {
    bool use_pdl = false;
    if (s.sm90) TRY(fsa_selected_combine_supports_pdl(dtype, head_dim, &use_pdl));
    for (a.kv_head0 = 0; a.kv_head0 < a.kv_heads; a.kv_head0 += s.heads) {
        unsigned heads = (unsigned)(a.kv_heads - a.kv_head0 < s.heads ? a.kv_heads - a.kv_head0 : s.heads);
        for (a.slab_index = 0; a.slab_index < a.lists.num_slabs; a.slab_index++) {
            a.num_queries = a.batch.nq - a.slab_index * s.slab_queries < s.slab_queries
                                ? a.batch.nq - a.slab_index * s.slab_queries
                                : s.slab_queries;
            TRY(s.sm90 ? fsa_selected_backward_sm90(a, dtype, head_dim, heads, stream)
                       : fsa_selected_backward_sm80(a, dtype, head_dim, heads, stream));
            TRY(fsa_selected_combine_backward(a, dtype, head_dim, heads, use_pdl, stream));
        }
        TRY(fsa_selected_store_dkv(a, dtype, head_dim, heads, use_pdl, stream));
    }
    return FSA_OK;
}

int fsa_selected_branch_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q,
                                ConstRows k, ConstRows v, const int32_t *block_indices, void *scratch, Rows o,
                                float *lse, const GateCombine *gate, cudaStream_t stream) {
    SelectedSizes s = make_sizes(c, batch, dtype, 0);
    if (batch->nq * c->q_heads > UINT32_MAX) return FSA_ERROR_ARGUMENT;
    if (batch->nq == 0) return FSA_OK;
    if (s.init + s.local > 0) {
        TRY(fsa_dense_init_local_forward(c, batch, dtype, q, k, v, o, lse, stream));
    }
    SelectedParams a = make_params(c, batch, s, scratch);
    TRY(build_lists_and_ranges(c, batch, block_indices, &a, stream));
    a.q = q, a.k = k, a.v = v, a.o = o, a.lse = lse;
    if (gate) a.gate = *gate, a.gate_per_token = c->gate_per_token;
    return selected_forward(a, s, dtype, c->head_dim, stream);
}

int fsa_selected_branch_backward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q,
                                 ConstRows k, ConstRows v, const int32_t *block_indices, int local_blocks,
                                 ConstRows dout, const float *delta, const float *lse_bwd,
                                 const BranchGradients *branch_grads, void *scratch, Rows dq, Rows dk,
                                 Rows dv, cudaStream_t stream) {
    SelectedSizes s = make_sizes(c, batch, dtype, 1);
    s.local = local_blocks;
    if (batch->nq * c->q_heads > UINT32_MAX) return FSA_ERROR_ARGUMENT;
    if (batch->n == 0) return FSA_OK;
    SelectedParams a = make_params(c, batch, s, scratch);
    TRY(build_lists_and_ranges(c, batch, block_indices, &a, stream));
    a.q = q, a.k = k, a.v = v, a.dout = dout, a.delta = delta, a.lse_bwd = lse_bwd;
    a.dq = dq, a.dk = dk, a.dv = dv;
    if (branch_grads) a.branch_grads = *branch_grads;
    return selected_backward(a, s, dtype, c->head_dim, stream);
}
