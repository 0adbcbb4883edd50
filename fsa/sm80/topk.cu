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
__device__ __forceinline__ uint32_t insert_topk(uint2 *list, int size, uint32_t rank, uint32_t block,
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

template <typename T, int D, int QUERIES>
__global__ void __launch_bounds__(QUERIES * 8, 2) topk_kernel(const TopKParams p) {
    constexpr int WINDOWS = 64, K_BYTES = WINDOWS * D * 2, Q_BYTES = QUERIES * D * 2, PITCH = WINDOWS + 1;
    constexpr int THREADS = QUERIES * 8, QUERY_WARPS = QUERIES / 16, WARP_WINDOWS = 16;
    extern __shared__ __align__(128) char shared[];
    int group = p.q_heads / p.kv_heads, num_free = p.topk - p.init_blocks - p.local_blocks;
    uint32_t tile_q = smem_address(shared), tile_k = tile_q + group * Q_BYTES;
    uint2 *lists = (uint2 *)(shared + group * Q_BYTES + p.stages * K_BYTES); // [QUERIES][num_free]
    float *p_tile = (float *)(lists + QUERIES * num_free);                   // [QUERIES][PITCH] P
    float *block_scores = p_tile + QUERIES * PITCH;                          // [max_tile_blocks][QUERIES + 1]
    float *carry = block_scores + p.max_tile_blocks * (QUERIES + 1); // [2][2][QUERIES] unfinished scores
    float *lse_log2 = carry + 4 * QUERIES;                           // [group][QUERIES] lse * log2(e)
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_query0 = warp % QUERY_WARPS * 16, warp_window0 = warp / QUERY_WARPS * WARP_WINDOWS;

    int64_t tiles = gridDim.x / p.kv_heads, index = tiles - 1 - blockIdx.x / p.kv_heads;
    int kv_head = blockIdx.x % p.kv_heads;
    RowTile tile = find_row_tile(p.batch.cu_queries, p.batch.num_segments, QUERIES, index);
    if (tile.rows == 0) return;
    FsaSegment segment = p.batch.segments[tile.cu_index];
    int first_pos = (int)segment.pos + tile.first, last_pos = first_pos + tile.rows - 1;
    int window_strides = p.cmp_len / p.cmp_stride, block_strides = p.block / p.cmp_stride;
    int64_t window0 = p.batch.cu_windows[segment.seq];
    int num_windows = (int)(p.batch.cu_windows[segment.seq + 1] - window0);

    // The candidates of the last query are blocks init_blocks .. candidates_end - 1. No query needs a window
    // past these blocks.
    int last_block = last_pos / p.block, candidates_end = last_block + 1 - p.local_blocks, windows_end = 0;
    if (last_block + 1 > p.topk && num_free > 0) windows_end = candidates_end * block_strides;

    int64_t k_stride = (int64_t)p.kv_heads * D;
    const T *kc = (const T *)p.kc.data + window0 * k_stride + kv_head * D;
    auto load_windows = [&](int i, int stage) {
        load_tile<WINDOWS, D, THREADS>(tile_k + stage * K_BYTES,
                                       i < num_windows ? kc + i * k_stride : (const T *)p.kc.data, k_stride,
                                       num_windows - i);
    };
    if (windows_end > 0) {
        for (int h = 0; h < group; h++) {
            int head = kv_head * group + h;
            load_tile<QUERIES, D, THREADS>(tile_q + h * Q_BYTES,
                                           (const T *)p.q.data + (tile.row * p.q_heads + head) * D,
                                           (int64_t)p.q_heads * D, tile.rows);
            if (threadIdx.x < QUERIES) {
                float x = -INFINITY;
                if (threadIdx.x < tile.rows) x = p.lse[(tile.row + threadIdx.x) * p.q_heads + head];
                lse_log2[h * QUERIES + threadIdx.x] = x == -INFINITY ? INFINITY : x * FSA_LOG2E;
            }
        }
        load_windows(0, 0);
    }
    cp_async_commit();

    constexpr int WARPS = THREADS / 32, WARP_LISTS = QUERIES / WARPS;
    uint32_t min_rank[WARP_LISTS] = {}; // the lowest rank of each list that this warp keeps
    for (int i = threadIdx.x; i < QUERIES * num_free; i += THREADS) lists[i] = make_uint2(0, 0);
    float scale = p.scale * FSA_LOG2E;

    int parity = 0;
    for (int i0 = 0; i0 < windows_end; i0 += WINDOWS, parity ^= 1) {
        int i1 = i0 + WINDOWS, stage = p.stages == 2 ? parity : 0;
        if (p.stages == 2 && i1 < windows_end) load_windows(i1, stage ^ 1);
        if (p.stages == 2) cp_async_commit();
        if (p.stages == 2)
            cp_async_wait<1>();
        else
            cp_async_wait<0>();
        __syncthreads();

        // P of 16 tokens x 16 windows, summed over the heads.
        float p_acc[WARP_WINDOWS / 8][4] = {};
        constexpr int HEADS = 4; // heads that share a B fragment of kc
        for (int h0 = 0; h0 < group; h0 += HEADS) {
            float s[HEADS][WARP_WINDOWS / 8][4] = {};
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) {
                uint32_t b[WARP_WINDOWS / 16][4];
#pragma unroll
                for (int n = 0; n < WARP_WINDOWS / 16; n++) {
                    load_b<D>(b[n], tile_k + stage * K_BYTES, warp_window0 + n * 16, kk);
                }
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    if (h0 + h >= group) break;
                    uint32_t a[4];
                    load_a<D>(a, tile_q + (h0 + h) * Q_BYTES, warp_query0, kk);
#pragma unroll
                    for (int n = 0; n < WARP_WINDOWS / 16; n++) {
                        mma_16816<T>(s[h][2 * n], a, b[n][0], b[n][1]);
                        mma_16816<T>(s[h][2 * n + 1], a, b[n][2], b[n][3]);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h0 + h >= group) break;
                float l0 = lse_log2[(h0 + h) * QUERIES + warp_query0 + lane / 4];
                float l1 = lse_log2[(h0 + h) * QUERIES + warp_query0 + lane / 4 + 8];
#pragma unroll
                for (int n = 0; n < WARP_WINDOWS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        p_acc[n][e] += exp2_fast(s[h][n][e] * scale - (e < 2 ? l0 : l1));
                }
            }
        }
#pragma unroll
        for (int n = 0; n < WARP_WINDOWS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int query = warp_query0 + lane / 4 + e / 2 * 8,
                    column = warp_window0 + n * 8 + lane % 4 * 2 + e % 2;
                bool visible = (i0 + column) * p.cmp_stride + p.cmp_len - 1 <= first_pos + query;
                p_tile[query * PITCH + column] = visible ? p_acc[n][e] : 0;
            }
        }
        __syncthreads();
        if (p.stages == 1 && i1 < windows_end) {
            load_windows(i1, 0);
            cp_async_commit();
        }

        // Block scores. The tile overlaps blocks first_block .. overlapped_end - 1. It finishes the blocks
        // before finished_end. Blocks before carried_end began in the previous tile.
        int first_block = i0 / block_strides, finished_end = i1 / block_strides,
            overlapped_end = (i1 + window_strides - 2) / block_strides + 1;
        int carried_end = i0 > 0 ? (i0 + window_strides - 2) / block_strides + 1 : 0;
        const float *carry_in = carry + parity * 2 * QUERIES;
        float *carry_out = carry + (parity ^ 1) * 2 * QUERIES;
        int query = threadIdx.x % QUERIES;
        for (int j = first_block + threadIdx.x / QUERIES; j < overlapped_end; j += THREADS / QUERIES) {
            int block_begin = j * block_strides, block_end = block_begin + block_strides;
            float s = j < carried_end ? carry_in[(j - first_block) * QUERIES + query] : 0;
            for (int i = max(i0, block_begin - window_strides + 1); i < min(i1, block_end); i++) {
                int overlap = min(i + window_strides, block_end) - max(i, block_begin);
                s += (float)overlap * p_tile[query * PITCH + i - i0];
            }
            if (j < finished_end)
                block_scores[(j - first_block) * (QUERIES + 1) + query] = s;
            else
                carry_out[(j - finished_end) * QUERIES + query] = s;
        }
        __syncthreads();

        // Update the lists with the finished blocks.
#pragma unroll
        for (int list_index = 0; list_index < WARP_LISTS; list_index++) {
            int query = warp + list_index * WARPS,
                query_candidates_end = min(finished_end, (first_pos + query) / p.block + 1 - p.local_blocks);
            for (int j0 = max(first_block, p.init_blocks); j0 < query_candidates_end; j0 += 32) {
                int j = j0 + lane;
                uint32_t rank = 0;
                if (j < query_candidates_end)
                    rank = __float_as_uint(block_scores[(j - first_block) * (QUERIES + 1) + query]) + 1;
                min_rank[list_index] =
                    insert_topk(lists + query * num_free, num_free, rank, j, min_rank[list_index]);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    int query = threadIdx.x, blocks = (first_pos + query) / p.block + 1;
    if (query >= tile.rows) return;
    int32_t *out = p.block_indices + ((int64_t)kv_head * p.batch.nq + tile.row + query) * p.topk;
    if (blocks <= p.topk) { // all blocks are selected
        for (int i = 0; i < p.topk; i++) out[i] = i < blocks ? i : -1;
        return;
    }
    uint2 *list = lists + query * num_free;
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

static size_t smem_bytes(const FsaConfig *c, const TopKParams *p, int queries) {
    size_t group = c->q_heads / c->kv_heads, num_free = c->topk - c->init_blocks - c->local_blocks;
    return (group * queries + p->stages * 64) * c->head_dim * 2 + queries * num_free * sizeof(uint2) +
           (queries * (65 + 4 + group) + p->max_tile_blocks * (queries + 1)) * sizeof(float);
}

template <typename T, int D, int QUERIES>
static int launch_topk_queries(const TopKParams &p, size_t bytes, cudaStream_t stream) {
    int64_t blocks = max_row_tiles(p.batch.nq, p.batch.num_segments, QUERIES) * p.kv_heads;
    if (blocks == 0) return FSA_OK;
    return LAUNCH((topk_kernel<T, D, QUERIES>), (unsigned)blocks, QUERIES * 8, bytes, stream, p);
}

// Launches the first configuration that fits in shared memory: 32 queries with two stages or one, then 16
// queries with two stages or one. Returns FSA_ERROR_CONFIG if none fits.
template <typename T, int D>
static int launch_topk_sm80(const FsaConfig *c, TopKParams p, cudaStream_t stream) {
    const size_t max_smem = 99 * 1024; // the least of all GPUs since sm_80
    for (p.stages = 2; p.stages >= 1; p.stages--) {
        size_t bytes = smem_bytes(c, &p, 32);
        if (bytes <= max_smem) return launch_topk_queries<T, D, 32>(p, bytes, stream);
    }
    for (p.stages = 2; p.stages >= 1; p.stages--) {
        size_t bytes = smem_bytes(c, &p, 16);
        if (bytes <= max_smem) return launch_topk_queries<T, D, 16>(p, bytes, stream);
    }
    return FSA_ERROR_CONFIG;
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
    int window_strides = c->cmp_len / c->cmp_stride, block_strides = c->block / c->cmp_stride;
    p.max_tile_blocks = (64 + window_strides + block_strides) / block_strides + 1;
    return FSA_DISPATCH(dtype, c->head_dim, launch_topk_sm80, c, p, stream);
}
