// sm80/topk.cu: block selection for any GPU (sm_80 and up). It runs if sm90/topk.cu does not apply: on other
// GPUs than Hopper, and for more than 16 free blocks. It computes
//   P[t, i] = sum over the g heads of exp(scale q.kc_i - lse), 0 if query t does not see window i
//   S[t, j] = sum over i of w_ij P[t, i],  w_ij = strides (s tokens) that window i and block j share
// For each query it writes the indices of the initial blocks, of the num_free other blocks with the highest
// S, and of the local blocks. If two blocks have the same S, the lower block is selected first. The lse of
// the compressed branch is given, so P needs no online softmax. P and S stay on chip.
//
// A thread block selects for QUERIES (32 or 16) queries of one KV head. Q of the g heads stays in shared
// memory. kc is streamed in tiles of 64 windows by cp.async, with two stages or one. For each tile:
//   1. MMA: a warp computes 16 queries x 16 windows. It sums P over the heads in registers, in order of head.
//   2. P goes to shared memory. Each thread sums the scores of some blocks for one query, over the windows in
//      order. The carry passes the scores of unfinished blocks, at most two, to the next tile.
//   3. A warp keeps the top-k lists of WARP_LISTS queries. Its lanes compare 32 finished blocks at once with
//      the lowest rank of a list. Only a block with a higher rank costs an insertion.
// Every sum has a fixed order, so the results are bitwise reproducible.
//
// Lower bounds for 64K tokens, (32, 8) heads, d = 128:
//   1.1 TFLOP: 2*d FLOPs for each of Nq*Hq*M/2 (query, window) pairs   1.4 ms
//   4.3e9 exps, one per pair                                           1.2 ms
//   0.5 GB: q once; kc once per QUERIES queries, mostly from L2        0.1 ms
// The kernel is limited by the FLOPs; step 3 does not overlap with them.
#include "../kernels.h"
#include "../launch.cuh"
#include "tile.cuh"

struct TopKParams {
    BatchLayout batch;
    ConstRows q, kc;        // [Nq, Hq, d], [M, Hkv, d], both rotated
    const float *lse;       // [Nq, Hq] of the compressed branch
    int32_t *block_indices; // [Hkv, Nq, T]
    float scale;
    int q_heads, kv_heads, cmp_len, cmp_stride, block, topk, init_blocks, local_blocks;
    int stages;          // shared-memory stages for kc: 2, or 1 if Q leaves no space for two
    int max_tile_blocks; // upper bound of the blocks that a tile of windows overlaps
};

// An element of a top-k list is (rank, block). The rank is the bits of the score, plus 1: scores are not
// negative, so their bits have the same order. An empty element has rank 0.
//
// Each lane of a warp passes one candidate: a rank (0: none) and a block, which ascends with the lanes.
// Inserts the candidates whose rank exceeds min_rank, the lowest rank of the list. A candidate replaces the
// element with the lowest rank; if several elements have this rank, it replaces the one with the highest
// block. Returns the new min_rank.
static __device__ __forceinline__ uint32_t insert_topk(uint2 *list, int size, uint32_t rank, uint32_t block,
                                                       uint32_t min_rank) {
    const uint32_t all = 0xffffffffu;
    int lane = threadIdx.x % 32;
    uint32_t pending = __ballot_sync(all, rank > min_rank);
    while (pending != 0) {
        int first = __ffs(pending) - 1;
        pending &= pending - 1;
        uint2 candidate = make_uint2(__shfl_sync(all, rank, first), __shfl_sync(all, block, first));
        if (candidate.x <= min_rank) continue; // min_rank has risen
        uint2 lane_min = make_uint2(all, 0);   // the lowest of elements lane, lane + 32, ...
        int lane_slot = 0;
        for (int i = lane; i < size; i += 32) {
            uint2 x = list[i];
            if (x.x < lane_min.x || (x.x == lane_min.x && x.y > lane_min.y)) lane_min = x, lane_slot = i;
        }
        uint32_t holders = __ballot_sync(all, lane_min.x == min_rank);
        if (holders & (holders - 1)) {
            uint32_t last_block = __reduce_max_sync(all, lane_min.x == min_rank ? lane_min.y : 0);
            holders = __ballot_sync(all, lane_min.x == min_rank && lane_min.y == last_block);
        }
        if (lane == __ffs(holders) - 1) {
            list[lane_slot] = candidate;
            lane_min.x = candidate.x;
            for (int i = lane; i < size; i += 32) lane_min.x = min(lane_min.x, list[i].x);
        }
        min_rank = __reduce_min_sync(all, lane_min.x);
    }
    return min_rank;
}

// The shared memory of a thread block, all dynamic.
template <int D, int QUERIES> struct TopKShared {
    enum { WINDOWS = 64, PITCH = WINDOWS + 1, Q_BYTES = QUERIES * D * 2, K_BYTES = WINDOWS * D * 2 };
    uint32_t q, k;       // Q [group][QUERIES, D]; kc [stages][WINDOWS, D]
    uint2 *lists;        // [QUERIES][num_free]
    float *p;            // [QUERIES][PITCH] P
    float *block_scores; // [max_tile_blocks][QUERIES + 1]
    float *carry;        // [2][2][QUERIES] unfinished scores
    float *lse_log2;     // [group][QUERIES] lse * log2(e)
    __device__ __forceinline__ TopKShared(char *shared, const TopKParams &a, int group, int num_free) {
        q = smem_address(shared), k = q + group * Q_BYTES;
        lists = (uint2 *)(shared + group * Q_BYTES + a.stages * K_BYTES);
        p = (float *)(lists + QUERIES * num_free);
        block_scores = p + QUERIES * PITCH;
        carry = block_scores + a.max_tile_blocks * (QUERIES + 1);
        lse_log2 = carry + 4 * QUERIES;
    }
};

// The queries of a thread block, of one KV head, and the windows that they need.
struct TopKTile {
    int kv_head, group, num_free;
    RowTile rows;
    int first_pos;                     // position of the first query
    int window_strides, block_strides; // strides (s tokens) of a window and of a block
    int64_t window0;                   // first window of the sequence
    int num_windows, windows_end;      // windows of the sequence; windows 0 .. windows_end - 1 are needed
};
static __device__ __forceinline__ TopKTile make_topk_tile(const TopKParams &p, const RowTile &rows) {
    TopKTile t;
    t.kv_head = blockIdx.x % p.kv_heads, t.group = p.q_heads / p.kv_heads;
    t.num_free = p.topk - p.init_blocks - p.local_blocks;
    t.rows = rows;
    FsaSegment segment = p.batch.segments[rows.cu_index];
    t.first_pos = (int)segment.pos + rows.first;
    t.window_strides = p.cmp_len / p.cmp_stride, t.block_strides = p.block / p.cmp_stride;
    t.window0 = p.batch.cu_windows[segment.seq];
    t.num_windows = (int)(p.batch.cu_windows[segment.seq + 1] - t.window0);
    // The candidates of the last query are blocks init_blocks .. candidates_end - 1. No query needs a window
    // past these blocks.
    int last_block = (t.first_pos + rows.rows - 1) / p.block,
        candidates_end = last_block + 1 - p.local_blocks;
    t.windows_end = last_block + 1 > p.topk && t.num_free > 0 ? candidates_end * t.block_strides : 0;
    return t;
}

// Starts the copy of windows i .. i + WINDOWS - 1 of kc into a stage. kc: window 0 of the sequence.
template <typename T, int D, int QUERIES>
static __device__ __forceinline__ void load_windows(const TopKParams &p, const TopKTile &tile,
                                                    const TopKShared<D, QUERIES> &smem, const T *kc, int i,
                                                    int stage) {
    typedef TopKShared<D, QUERIES> Smem;
    load_tile<Smem::WINDOWS, D, QUERIES * 8>(
        smem.k + stage * Smem::K_BYTES, i < tile.num_windows ? kc + i * p.kc.stride : (const T *)p.kc.data,
        p.kc.stride, tile.num_windows - i);
}

// Starts the copy of Q of all heads of the group, and stores lse in base 2: +inf (P = 0) for a row without
// keys or past the last query.
template <typename T, int D, int QUERIES>
static __device__ __forceinline__ void load_q_lse(const TopKParams &p, const TopKTile &tile,
                                                  const TopKShared<D, QUERIES> &smem) {
    for (int h = 0; h < tile.group; h++) {
        int head = tile.kv_head * tile.group + h;
        load_tile<QUERIES, D, QUERIES * 8>(smem.q + h * TopKShared<D, QUERIES>::Q_BYTES,
                                           (const T *)p.q.data + tile.rows.row * p.q.stride + head * D,
                                           p.q.stride, tile.rows.rows);
        if (threadIdx.x < QUERIES) {
            float x = -INFINITY;
            if (threadIdx.x < tile.rows.rows) x = p.lse[(tile.rows.row + threadIdx.x) * p.q_heads + head];
            smem.lse_log2[h * QUERIES + threadIdx.x] = x == -INFINITY ? INFINITY : x * FSA_LOG2E;
        }
    }
}

// p_acc = P of 16 queries from query0 on x 16 windows from row `window0` of k_tile on, summed over the heads.
template <typename T, int D, int QUERIES>
static __device__ __forceinline__ void compute_p(float (&p_acc)[2][4], const TopKShared<D, QUERIES> &smem,
                                                 uint32_t k_tile, int group, int query0, int window0,
                                                 float scale) {
    constexpr int HEADS = 4; // heads that share a B fragment of kc
    const int lane = threadIdx.x % 32;
    for (int h0 = 0; h0 < group; h0 += HEADS) {
        float s[HEADS][2][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t b[4];
            load_b<D>(b, k_tile, window0, kk);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h0 + h >= group) break;
                uint32_t a[4];
                load_a<D>(a, smem.q + (h0 + h) * TopKShared<D, QUERIES>::Q_BYTES, query0, kk);
                mma_161616<T>(s[h][0], s[h][1], a, b);
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (h0 + h >= group) break;
            float l0 = smem.lse_log2[(h0 + h) * QUERIES + query0 + lane / 4];
            float l1 = smem.lse_log2[(h0 + h) * QUERIES + query0 + lane / 4 + 8];
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) p_acc[n][e] += exp2_fast(s[h][n][e] * scale - (e < 2 ? l0 : l1));
            }
        }
    }
}

// Stores p_acc in p; 0 for windows that a query does not see. i0: first window of the tile.
template <int D, int QUERIES>
static __device__ __forceinline__ void store_p(const TopKParams &p, const TopKShared<D, QUERIES> &smem,
                                               const float (&p_acc)[2][4], int first_pos, int i0, int query0,
                                               int window0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int query = query0 + lane / 4 + e / 2 * 8, column = window0 + n * 8 + lane % 4 * 2 + e % 2;
            bool visible = (i0 + column) * p.cmp_stride + p.cmp_len - 1 <= first_pos + query;
            smem.p[query * TopKShared<D, QUERIES>::PITCH + column] = visible ? p_acc[n][e] : 0;
        }
    }
}

// A tile of windows i0 .. i1 - 1 overlaps blocks first_block .. overlapped_end - 1. It finishes the blocks
// before finished_end. Blocks before carried_end began in the previous tile.
struct TileBlocks {
    int i0, i1, first_block, finished_end, overlapped_end, carried_end;
};
static __device__ __forceinline__ TileBlocks tile_blocks(const TopKTile &tile, int i0, int i1) {
    const int window_strides = tile.window_strides, block_strides = tile.block_strides;
    return {i0,
            i1,
            i0 / block_strides,
            i1 / block_strides,
            (i1 + window_strides - 2) / block_strides + 1,
            i0 > 0 ? (i0 + window_strides - 2) / block_strides + 1 : 0};
}

// Sums the scores of the blocks that the tile overlaps: finished ones to block_scores, others to the carry of
// the next tile. Each thread sums some blocks of one query. parity: of the tile.
template <int D, int QUERIES>
static __device__ __forceinline__ void sum_block_scores(const TopKTile &tile,
                                                        const TopKShared<D, QUERIES> &smem,
                                                        const TileBlocks &blocks, int parity) {
    const float *carry_in = smem.carry + parity * 2 * QUERIES;
    float *carry_out = smem.carry + (parity ^ 1) * 2 * QUERIES;
    const int query = threadIdx.x % QUERIES;
    for (int j = blocks.first_block + threadIdx.x / QUERIES; j < blocks.overlapped_end; j += 8) {
        int block_begin = j * tile.block_strides, block_end = block_begin + tile.block_strides;
        float s = j < blocks.carried_end ? carry_in[(j - blocks.first_block) * QUERIES + query] : 0;
        for (int i = max(blocks.i0, block_begin - tile.window_strides + 1); i < min(blocks.i1, block_end);
             i++) {
            int overlap = min(i + tile.window_strides, block_end) - max(i, block_begin);
            s += (float)overlap * smem.p[query * TopKShared<D, QUERIES>::PITCH + i - blocks.i0];
        }
        if (j < blocks.finished_end)
            smem.block_scores[(j - blocks.first_block) * (QUERIES + 1) + query] = s;
        else
            carry_out[(j - blocks.finished_end) * QUERIES + query] = s;
    }
}

// Inserts the finished blocks that are candidates into the lists of this warp.
template <int D, int QUERIES, int WARP_LISTS>
static __device__ __forceinline__ void
merge_candidates(const TopKParams &p, const TopKTile &tile, const TopKShared<D, QUERIES> &smem,
                 const TileBlocks &blocks, uint32_t (&min_rank)[WARP_LISTS]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < WARP_LISTS; i++) {
        int query = warp + i * (QUERIES / WARP_LISTS);
        int candidates_end =
            min(blocks.finished_end, (tile.first_pos + query) / p.block + 1 - p.local_blocks);
        for (int j0 = max(blocks.first_block, p.init_blocks); j0 < candidates_end; j0 += 32) {
            int j = j0 + lane;
            uint32_t rank = 0;
            if (j < candidates_end)
                rank =
                    __float_as_uint(smem.block_scores[(j - blocks.first_block) * (QUERIES + 1) + query]) + 1;
            min_rank[i] =
                insert_topk(smem.lists + query * tile.num_free, tile.num_free, rank, j, min_rank[i]);
        }
    }
}

// Writes the block indices of one query, in ascending order. Sorts its list.
static __device__ __forceinline__ void store_block_indices(const TopKParams &p, const TopKTile &tile,
                                                           uint2 *list, int query) {
    const int num_free = tile.num_free, blocks = (tile.first_pos + query) / p.block + 1;
    int32_t *out = p.block_indices + ((int64_t)tile.kv_head * p.batch.nq + tile.rows.row + query) * p.topk;
    if (blocks <= p.topk) { // all blocks are selected
        for (int i = 0; i < p.topk; i++) out[i] = i < blocks ? i : -1;
        return;
    }
    for (int i = 1; i < num_free; i++) { // insertion sort by block
        uint2 x = list[i];
        int slot = i;
        for (; slot > 0 && list[slot - 1].y > x.y; slot--) list[slot] = list[slot - 1];
        list[slot] = x;
    }
    for (int i = 0; i < p.init_blocks; i++) out[i] = i;
    for (int i = 0; i < num_free; i++) out[p.init_blocks + i] = (int32_t)list[i].y;
    for (int i = 0; i < p.local_blocks; i++) out[p.init_blocks + num_free + i] = blocks - p.local_blocks + i;
}

template <typename T, int D, int QUERIES>
__global__ void __launch_bounds__(QUERIES * 8, 2) topk_kernel(const TopKParams p) {
    typedef TopKShared<D, QUERIES> Smem;
    constexpr int WINDOWS = Smem::WINDOWS, THREADS = QUERIES * 8, QUERY_WARPS = QUERIES / 16;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, query0 = warp % QUERY_WARPS * 16, window0 = warp / QUERY_WARPS * 16;
    int64_t tiles = gridDim.x / p.kv_heads, index = tiles - 1 - blockIdx.x / p.kv_heads;
    const RowTile rows = find_row_tile(p.batch.cu_queries, p.batch.num_segments, QUERIES, index);
    if (rows.rows == 0) return;
    const TopKTile tile = make_topk_tile(p, rows);
    const Smem smem(shared, p, tile.group, tile.num_free);
    const T *kc = (const T *)p.kc.data + tile.window0 * p.kc.stride + tile.kv_head * D;
    if (tile.windows_end > 0) {
        load_q_lse<T>(p, tile, smem);
        load_windows(p, tile, smem, kc, 0, 0);
    }
    cp_async_commit();
    uint32_t min_rank[QUERIES / (THREADS / 32)] = {}; // the lowest rank of each list that this warp keeps
    for (int i = threadIdx.x; i < QUERIES * tile.num_free; i += THREADS) smem.lists[i] = make_uint2(0, 0);

    const float scale = p.scale * FSA_LOG2E;
    int parity = 0;
    for (int i0 = 0; i0 < tile.windows_end; i0 += WINDOWS, parity ^= 1) {
        const int i1 = i0 + WINDOWS, stage = p.stages == 2 ? parity : 0;
        if (p.stages == 2) {
            if (i1 < tile.windows_end) load_windows(p, tile, smem, kc, i1, stage ^ 1);
            cp_async_commit();
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        float p_acc[2][4] = {};
        compute_p<T>(p_acc, smem, smem.k + stage * Smem::K_BYTES, tile.group, query0, window0, scale);
        store_p(p, smem, p_acc, tile.first_pos, i0, query0, window0);
        __syncthreads();
        if (p.stages == 1 && i1 < tile.windows_end) {
            load_windows(p, tile, smem, kc, i1, 0);
            cp_async_commit();
        }
        const TileBlocks blocks = tile_blocks(tile, i0, i1);
        sum_block_scores(tile, smem, blocks, parity);
        __syncthreads();
        merge_candidates(p, tile, smem, blocks, min_rank);
    }
    cp_async_wait<0>();
    __syncthreads();
    const int query = threadIdx.x;
    if (query < rows.rows) store_block_indices(p, tile, smem.lists + query * tile.num_free, query);
}

static int max_tile_blocks(const FsaConfig *c) {
    const int window_strides = c->cmp_len / c->cmp_stride, block_strides = c->block / c->cmp_stride;
    return (64 + window_strides + block_strides) / block_strides + 1;
}

static size_t smem_bytes(const FsaConfig *c, int stages, int queries) {
    size_t group = c->q_heads / c->kv_heads, num_free = c->topk - c->init_blocks - c->local_blocks;
    return (group * queries + stages * 64) * c->head_dim * 2 + queries * num_free * sizeof(uint2) +
           (queries * (65 + 4 + group) + max_tile_blocks(c) * (queries + 1)) * sizeof(float);
}

constexpr size_t MAX_SMEM = 99 * 1024; // the least of all GPUs since sm_80

template <typename T, int D, int QUERIES>
static int launch_topk_queries(const TopKParams &p, size_t bytes, cudaStream_t stream) {
    int64_t blocks = max_row_tiles(p.batch.nq, p.batch.num_segments, QUERIES) * p.kv_heads;
    if (blocks == 0) return FSA_OK;
    return LAUNCH((topk_kernel<T, D, QUERIES>), (unsigned)blocks, QUERIES * 8, SharedMemory(bytes, MAX_SMEM),
                  stream, p);
}

// Launches the first configuration that fits in shared memory: 32 queries with two stages or one, then 16
// queries with two stages or one. Returns FSA_ERROR_CONFIG if none fits.
template <typename T, int D>
static int launch_topk_sm80(const FsaConfig *c, TopKParams p, cudaStream_t stream) {
    for (p.stages = 2; p.stages >= 1; p.stages--) {
        size_t bytes = smem_bytes(c, p.stages, 32);
        if (bytes <= MAX_SMEM) return launch_topk_queries<T, D, 32>(p, bytes, stream);
    }
    for (p.stages = 2; p.stages >= 1; p.stages--) {
        size_t bytes = smem_bytes(c, p.stages, 16);
        if (bytes <= MAX_SMEM) return launch_topk_queries<T, D, 16>(p, bytes, stream);
    }
    return FSA_ERROR_CONFIG;
}

int fsa_max_topk_sm80(const FsaConfig *c) {
    FsaConfig no_lists = *c;
    no_lists.topk = c->init_blocks + c->local_blocks;
    return no_lists.topk + (int)((MAX_SMEM - smem_bytes(&no_lists, 1, 16)) / (16 * sizeof(uint2)));
}

int fsa_topk_sm80(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q, ConstRows kc,
                  const float *lse_c, int32_t *block_indices, cudaStream_t stream) {
    TopKParams p = {};
    p.batch = *batch;
    p.q = q, p.kc = kc, p.lse = lse_c, p.block_indices = block_indices;
    p.scale = softmax_scale(c);
    p.q_heads = c->q_heads, p.kv_heads = c->kv_heads;
    p.cmp_len = c->cmp_len, p.cmp_stride = c->cmp_stride, p.block = c->block;
    p.topk = c->topk, p.init_blocks = c->init_blocks, p.local_blocks = c->local_blocks;
    p.max_tile_blocks = max_tile_blocks(c);
    return FSA_DISPATCH(dtype, c->head_dim, launch_topk_sm80, c, p, stream);
}
