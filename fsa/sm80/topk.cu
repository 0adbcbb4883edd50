// topk.cu: the choice of blocks. Scores of the compressed windows are computed again from q and kc with
// the branch's lse known, summed over the group's heads and over each block's windows, and a running list
// of the best T blocks is kept for every query. Scores are never written to global memory. On Hopper
// topk_sm90.cu does the same where it suits the configuration.
#include "../kernels.h"
#include "../launch.cuh"
#include "tile.cuh"

struct TopKParams {
    BatchLayout batch;
    const void *q, *kc;
    const float *lse;
    int32_t *block_indices;
    float scale;
    int q_heads, kv_heads, cmp_len, cmp_stride, block, topk, init, local;
    int stages;      // of the buffer for kc: 2, or 1 where Q takes too much room
    int block_slots; // most blocks that one tile of windows touches
};

// A list's entry: a block and its rank, the bits of its score (which order as the scores do, none being
// negative) plus 1; an empty place has rank 0. Puts the candidates of 32 lanes (rank 0: none), blocks
// ascending with the lanes, that outrank `lowest` into a list of `size` entries, each in the place of the
// lowest, and of equals in that of the greatest block. Returns the lowest rank then. A whole warp calls it.
__device__ __forceinline__ uint32_t keep_best(uint2 *list, int size, uint32_t rank, uint32_t block,
                                              uint32_t lowest) {
    const uint32_t all = 0xffffffffu;
    int lane = threadIdx.x % 32;
    uint32_t waiting = __ballot_sync(all, rank > lowest);
    while (waiting != 0) {
        int first = __ffs(waiting) - 1;
        waiting &= waiting - 1;
        uint2 candidate = make_uint2(__shfl_sync(all, rank, first), __shfl_sync(all, block, first));
        if (candidate.x <= lowest) continue; // it has risen since
        uint2 mine = make_uint2(all, 0);     // the lowest of the places that this lane looks after
        int place = 0;
        for (int i = lane; i < size; i += 32) {
            uint2 x = list[i];
            if (x.x < mine.x || (x.x == mine.x && x.y > mine.y)) mine = x, place = i;
        }
        uint32_t holders = __ballot_sync(all, mine.x == lowest);
        if (holders & (holders - 1)) {
            uint32_t last = __reduce_max_sync(all, mine.x == lowest ? mine.y : 0);
            holders = __ballot_sync(all, mine.x == lowest && mine.y == last);
        }
        if (lane == __ffs(holders) - 1) {
            list[place] = candidate;
            mine.x = candidate.x;
            for (int i = lane; i < size; i += 32) mine.x = min(mine.x, list[i].x);
        }
        lowest = __reduce_min_sync(all, mine.x);
    }
    return lowest;
}

// A block: the choice of TOKENS queries for one KV head. Q of the group's heads stays in shared memory; kc
// comes in tiles of 64 windows. A warp takes 16 tokens and 16 of the windows, and adds up P over the heads in
// registers, in order of head.
// A window is r = l/s stride cells wide, a block R = B/s. S_j of a block is the sum over the windows that
// touch it, times the cells they share, in order of window; what a tile leaves unfinished (at most two
// blocks) is carried on to the next. A warp keeps the lists of
// four tokens: its lanes compare 32 finished blocks with the list's lowest rank at once, and only what beats
// it costs a replacement.
// Bytes: q once, kc once (L2: once for every TOKENS queries), 4*T*Nq*Hkv out. Flops: 2*d for each of the
// Nq*Hq*M/2 pairs, and as many exponentials; the flops bind, the list work comes on top.
template <typename T, int D, int TOKENS>
__global__ void __launch_bounds__(TOKENS * 8, 2) topk_kernel(const TopKParams p) {
    constexpr int WINDOWS = 64, K_BYTES = WINDOWS * D * 2, Q_BYTES = TOKENS * D * 2, PITCH = WINDOWS + 1;
    constexpr int THREADS = TOKENS * 8, TOKEN_WARPS = TOKENS / 16, SHARE = 16; // windows of a warp
    extern __shared__ __align__(128) char shared[];
    int group = p.q_heads / p.kv_heads, wanted = p.topk - p.init - p.local;
    uint32_t tile_q = smem_address(shared), tile_k = tile_q + group * Q_BYTES;
    uint2 *lists = (uint2 *)(shared + group * Q_BYTES + p.stages * K_BYTES); // [TOKENS][wanted]
    float *sums = (float *)(lists + TOKENS * wanted);                        // [TOKENS][PITCH] P of a tile
    float *scores = sums + TOKENS * PITCH;                // [block_slots][TOKENS + 1] finished blocks
    float *carry = scores + p.block_slots * (TOKENS + 1); // [2][2][TOKENS] unfinished ones
    float *lse = carry + 4 * TOKENS;                      // [group][TOKENS], times log2(e)
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_token = warp % TOKEN_WARPS * 16, warp_window = warp / TOKEN_WARPS * SHARE;

    int64_t tiles = gridDim.x / p.kv_heads, index = tiles - 1 - blockIdx.x / p.kv_heads;
    int kv_head = blockIdx.x % p.kv_heads;
    RowTile rows = find_row_tile(p.batch.cu_queries, p.batch.num_segments, TOKENS, index);
    if (rows.rows == 0) return;
    FsaSegment segment = p.batch.segments[rows.range];
    int first_pos = (int)segment.pos + rows.first, last_pos = first_pos + rows.rows - 1;
    int window_cells = p.cmp_len / p.cmp_stride, block_cells = p.block / p.cmp_stride;
    int64_t window0 = p.batch.cu_windows[segment.seq];
    int windows = (int)(p.batch.cu_windows[segment.seq + 1] - window0);

    // Candidates of the last query are blocks init .. candidates - 1; nobody needs a window past them.
    int last_block = last_pos / p.block, candidates = last_block + 1 - p.local, end = 0;
    if (last_block + 1 > p.topk && wanted > 0) end = candidates * block_cells;

    int64_t k_stride = (int64_t)p.kv_heads * D;
    const T *kc = (const T *)p.kc + window0 * k_stride + kv_head * D;
    auto load_windows = [&](int i, int stage) {
        load_tile<WINDOWS, D, THREADS>(tile_k + stage * K_BYTES,
                                       i < windows ? kc + i * k_stride : (const T *)p.kc, k_stride,
                                       windows - i);
    };
    if (end > 0) {
        for (int h = 0; h < group; h++) {
            int head = kv_head * group + h;
            load_tile<TOKENS, D, THREADS>(tile_q + h * Q_BYTES,
                                          (const T *)p.q + (rows.row * p.q_heads + head) * D,
                                          (int64_t)p.q_heads * D, rows.rows);
            if (threadIdx.x < TOKENS) {
                float x = -INFINITY;
                if (threadIdx.x < rows.rows) x = p.lse[(rows.row + threadIdx.x) * p.q_heads + head];
                lse[h * TOKENS + threadIdx.x] = x == -INFINITY ? INFINITY : x * FSA_LOG2E;
            }
        }
        load_windows(0, 0);
    }
    cp_async_commit();

    // The lowest rank in the list of each token that this warp keeps.
    constexpr int WARPS = THREADS / 32, MINE = TOKENS / WARPS;
    uint32_t lowest[MINE] = {};
    for (int i = threadIdx.x; i < TOKENS * wanted; i += THREADS) lists[i] = make_uint2(0, 0);
    float scale = p.scale * FSA_LOG2E;

    int turn = 0;
    for (int i0 = 0; i0 < end; i0 += WINDOWS, turn ^= 1) {
        int i1 = i0 + WINDOWS, stage = p.stages == 2 ? turn : 0;
        if (p.stages == 2 && i1 < end) load_windows(i1, stage ^ 1);
        if (p.stages == 2) cp_async_commit();
        if (p.stages == 2)
            cp_async_wait<1>();
        else
            cp_async_wait<0>();
        __syncthreads();

        float sum[SHARE / 8][4] = {};
        constexpr int HEADS = 4; // that share the operands of kc
        for (int h0 = 0; h0 < group; h0 += HEADS) {
            float s[HEADS][SHARE / 8][4] = {};
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) {
                uint32_t b[SHARE / 16][4];
#pragma unroll
                for (int n = 0; n < SHARE / 16; n++) {
                    load_b<D>(b[n], tile_k + stage * K_BYTES, warp_window + n * 16, kk);
                }
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    if (h0 + h >= group) break;
                    uint32_t a[4];
                    load_a<D>(a, tile_q + (h0 + h) * Q_BYTES, warp_token, kk);
#pragma unroll
                    for (int n = 0; n < SHARE / 16; n++) {
                        mma_16816<T>(s[h][2 * n], a, b[n][0], b[n][1]);
                        mma_16816<T>(s[h][2 * n + 1], a, b[n][2], b[n][3]);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h0 + h >= group) break;
                float l0 = lse[(h0 + h) * TOKENS + warp_token + lane / 4];
                float l1 = lse[(h0 + h) * TOKENS + warp_token + lane / 4 + 8];
#pragma unroll
                for (int n = 0; n < SHARE / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        sum[n][e] += exp2_fast(s[h][n][e] * scale - (e < 2 ? l0 : l1));
                }
            }
        }
#pragma unroll
        for (int n = 0; n < SHARE / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = warp_token + lane / 4 + e / 2 * 8,
                    column = warp_window + n * 8 + lane % 4 * 2 + e % 2;
                bool seen = (i0 + column) * p.cmp_stride + p.cmp_len - 1 <= first_pos + row;
                sums[row * PITCH + column] = seen ? sum[n][e] : 0;
            }
        }
        __syncthreads();
        if (p.stages == 1 && i1 < end) {
            load_windows(i1, 0);
            cp_async_commit();
        }

        // Block scores; of the blocks that the tile touches, those before `done` are finished.
        int block0 = i0 / block_cells, done = i1 / block_cells,
            touched = (i1 + window_cells - 2) / block_cells + 1;
        int carried = i0 > 0 ? (i0 + window_cells - 2) / block_cells + 1 : 0;
        const float *carry_in = carry + turn * 2 * TOKENS;
        float *carry_out = carry + (turn ^ 1) * 2 * TOKENS;
        int row = threadIdx.x % TOKENS;
        for (int j = block0 + threadIdx.x / TOKENS; j < touched; j += THREADS / TOKENS) {
            int begin_cell = j * block_cells, end_cell = begin_cell + block_cells;
            float s = j < carried ? carry_in[(j - block0) * TOKENS + row] : 0;
            for (int i = max(i0, begin_cell - window_cells + 1); i < min(i1, end_cell); i++) {
                int shared_cells = min(i + window_cells, end_cell) - max(i, begin_cell);
                s += (float)shared_cells * sums[row * PITCH + i - i0];
            }
            if (j < done)
                scores[(j - block0) * (TOKENS + 1) + row] = s;
            else
                carry_out[(j - done) * TOKENS + row] = s;
        }
        __syncthreads();

#pragma unroll
        for (int m = 0; m < MINE; m++) {
            int token = warp + m * WARPS,
                candidates_end = min(done, (first_pos + token) / p.block + 1 - p.local);
            for (int j0 = max(block0, p.init); j0 < candidates_end; j0 += 32) {
                int j = j0 + lane;
                uint32_t rank = 0;
                if (j < candidates_end)
                    rank = __float_as_uint(scores[(j - block0) * (TOKENS + 1) + token]) + 1;
                lowest[m] = keep_best(lists + token * wanted, wanted, rank, j, lowest[m]);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    int token = threadIdx.x, blocks = (first_pos + token) / p.block + 1;
    if (token >= rows.rows) return;
    int32_t *to = p.block_indices + ((int64_t)kv_head * p.batch.nq + rows.row + token) * p.topk;
    if (blocks <= p.topk) { // all of them
        for (int i = 0; i < p.topk; i++) to[i] = i < blocks ? i : -1;
        return;
    }
    uint2 *list = lists + token * wanted;
    for (int i = 1; i < wanted; i++) { // in order of block
        uint2 x = list[i];
        int at = i;
        for (; at > 0 && list[at - 1].y > x.y; at--) list[at] = list[at - 1];
        list[at] = x;
    }
    for (int i = 0; i < p.init; i++) to[i] = i;
    for (int i = 0; i < wanted; i++) to[p.init + i] = (int32_t)list[i].y;
    for (int i = 0; i < p.local; i++) to[p.init + wanted + i] = blocks - p.local + i;
}

static size_t topk_bytes(const FsaConfig *c, const TopKParams *p, int tokens) {
    size_t group = c->q_heads / c->kv_heads, wanted = c->topk - c->init_blocks - c->local_blocks;
    return (group * tokens + p->stages * 64) * c->head_dim * 2 + tokens * wanted * sizeof(uint2) +
           (tokens * (65 + 4 + group) + p->block_slots * (tokens + 1)) * sizeof(float);
}

template <typename T, int D, int TOKENS>
static int launch_tokens(const TopKParams &p, size_t bytes, cudaStream_t stream) {
    cudaFuncSetAttribute(topk_kernel<T, D, TOKENS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    int64_t blocks = row_tile_bound(p.batch.nq, p.batch.num_segments, TOKENS) * p.kv_heads;
    if (blocks > 0) topk_kernel<T, D, TOKENS><<<(unsigned)blocks, TOKENS * 8, bytes, stream>>>(p);
    return launch_status();
}

// The first arrangement that shared memory holds.
template <typename T, int D> static int launch_topk(const FsaConfig *c, TopKParams p, cudaStream_t stream) {
    const size_t most = 99 * 1024;
    for (p.stages = 2; p.stages >= 1; p.stages--) {
        size_t bytes = topk_bytes(c, &p, 32);
        if (bytes <= most) return launch_tokens<T, D, 32>(p, bytes, stream);
    }
    for (p.stages = 2; p.stages >= 1; p.stages--) {
        size_t bytes = topk_bytes(c, &p, 16);
        if (bytes <= most) return launch_tokens<T, D, 16>(p, bytes, stream);
    }
    return FSA_ERROR_CONFIG;
}

int fsa_topk_sm80(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const void *q,
                         const void *kc, const float *lse_c, int32_t *block_indices, cudaStream_t stream) {
    TopKParams p = {};
    p.batch = *batch;
    p.q = q, p.kc = kc, p.lse = lse_c, p.block_indices = block_indices;
    p.scale = softmax_scale_of(c);
    p.q_heads = c->q_heads, p.kv_heads = c->kv_heads;
    p.cmp_len = c->cmp_len, p.cmp_stride = c->cmp_stride, p.block = c->block;
    p.topk = c->topk, p.init = c->init_blocks, p.local = c->local_blocks;
    int window_cells = c->cmp_len / c->cmp_stride, block_cells = c->block / c->cmp_stride;
    p.block_slots = (64 + window_cells + block_cells) / block_cells + 1;
    return FSA_DISPATCH(dtype, c->head_dim, launch_topk, c, p, stream);
}
