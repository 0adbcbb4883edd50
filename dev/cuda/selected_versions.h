// selected_versions.h: versions 1 to 3 of the selected branch, forward and backward, for selected.cu.
#ifndef DEV_CUDA_SELECTED_VERSIONS_H
#define DEV_CUDA_SELECTED_VERSIONS_H
#include "../../fsa/kernels.h"
#include "../../fsa/sm80/tile.cuh"
#include "common.h"

struct VersionArgs {
    BatchLayout batch;
    int q_heads, kv_heads, group, block, topk;
    float scale;
    const int32_t *block_indices;
    const float *lse, *delta; // backward: of the rows [Nq, Hq]
    float *dk, *dv;           // backward: sums in fp32 [N, Hkv, D]
    // Of the kernels with the KV block outside: the library's lists in one slab, the kv head of this launch,
    // and the parts of at most 64 keys that a block is cut into.
    QueryLists lists;
    int head, parts;
    void *partial; // version 3: partial rows of the output or of dQ [Nq*T, parts, group, D]
    float *stats;  // version 3: lse in base 2, of partials [Nq*T, parts, group] and of rows [Nq, group]
    float *row_stats;
};

// ---- version 1 --------------------------------------------------------------------------------------
// A warp computes one (token, head), a key at a time, D/32 channels a lane; dK and dV by atomics.
__device__ __forceinline__ float v1_warp_sum(float x) {
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

// Calls f(offset of the lane's channels in k and v) for every key that the warp's row sees.
template <int D, typename F> __device__ void v1_keys(const VersionArgs &a, int64_t row, F f) {
    int64_t token = row / a.q_heads, seq, pos;
    int head = (int)(row % a.q_heads) / a.group;
    query_position(a.batch, token, &seq, &pos);
    for (int t = 0; t < a.topk; t++) {
        int64_t index = a.block_indices[(head * a.batch.nq + token) * a.topk + t];
        if (index < 0) continue;
        for (int64_t key = index * a.block; key < (index + 1) * a.block && key <= pos; key++)
            f(((a.batch.cu_seqlens[seq] + key) * a.kv_heads + head) * D + threadIdx.x % 32 * (D / 32));
    }
}

template <typename T, int D>
__global__ void selected_v1_kernel(VersionArgs a, const T *q, const T *k, const T *v, T *o, float *lse) {
    constexpr int PER = D / 32;
    int64_t row = blockIdx.x * 4ll + threadIdx.x / 32;
    if (row >= a.batch.nq * a.q_heads) return;
    const T *my_q = q + row * D + threadIdx.x % 32 * PER;
    float acc[PER] = {}, most = -INFINITY, sum = 0;
    v1_keys<D>(a, row, [&](int64_t at) {
        float s = 0;
        for (int i = 0; i < PER; i++) s += (float)my_q[i] * (float)k[at + i];
        s = v1_warp_sum(s) * a.scale * FSA_LOG2E;
        float new_most = fmaxf(most, s), shrink = exp2f(most - new_most), p = exp2f(s - new_most);
        most = new_most;
        sum = sum * shrink + p;
        for (int i = 0; i < PER; i++) acc[i] = acc[i] * shrink + p * (float)v[at + i];
    });
    for (int i = 0; i < PER; i++) o[row * D + threadIdx.x % 32 * PER + i] = (T)(sum > 0 ? acc[i] / sum : 0);
    if (threadIdx.x % 32 == 0) lse[row] = sum > 0 ? (most + log2f(sum)) * FSA_LN2 : -INFINITY;
}

template <typename T, int D>
__global__ void selected_v1_backward_kernel(VersionArgs a, const T *q, const T *k, const T *v, const T *dout,
                                            T *dq) {
    constexpr int PER = D / 32;
    int64_t row = blockIdx.x * 4ll + threadIdx.x / 32, mine = row * D + threadIdx.x % 32 * PER;
    if (row >= a.batch.nq * a.q_heads) return;
    float acc[PER] = {};
    v1_keys<D>(a, row, [&](int64_t at) {
        float s = 0, dp = 0;
        for (int i = 0; i < PER; i++) {
            s += (float)q[mine + i] * (float)k[at + i];
            dp += (float)dout[mine + i] * (float)v[at + i];
        }
        float p = expf(v1_warp_sum(s) * a.scale - a.lse[row]);
        float ds = p * (v1_warp_sum(dp) - a.delta[row]) * a.scale;
        for (int i = 0; i < PER; i++) {
            acc[i] += ds * (float)k[at + i];
            atomicAdd(a.dk + at + i, ds * (float)q[mine + i]);
            atomicAdd(a.dv + at + i, p * (float)dout[mine + i]);
        }
    });
    for (int i = 0; i < PER; i++) dq[mine + i] = (T)acc[i];
}

// ---- version 2 --------------------------------------------------------------------------------------
// Vanilla NSA's order: a thread block takes one (token, kv head), its g rows padded to the 16 of an mma tile,
// and walks over the chosen blocks, 16 keys a warp and step, the next ones under way (cp.async, two stages,
// no barrier); the warps' sums are joined at the end. Each token loads T*B rows of K and V: 512 KiB at T*B =
// 1024, d = 128; at 64K tokens and 8 kv heads 275 GB, which bind in L2: 27 ms at 10 TB/s. The backward pass
// has this order for dQ, the same bytes; dK and dV come from the lists, below.
template <typename T, int D> struct V2Walk {
    const VersionArgs &a;
    const T *k_head, *v_head;
    const int32_t *block_indices;
    int64_t pos;
    uint32_t smem; // this warp's: two stages of a K and a V tile of 16 rows
    static constexpr int TILE = 16 * D * 2, WARP = 4 * TILE;

    __device__ V2Walk(const VersionArgs &args, const T *k, const T *v, uint32_t base)
        : a(args), smem(base + threadIdx.x / 32 * WARP) {
        int64_t token = blockIdx.x, head = blockIdx.y, seq;
        query_position(a.batch, token, &seq, &pos);
        int64_t at = (a.batch.cu_seqlens[seq] * a.kv_heads + head) * D;
        k_head = k + at, v_head = v + at;
        block_indices = a.block_indices + (head * a.batch.nq + token) * a.topk;
    }
    __device__ int64_t first_key(int slice) const { // of 16 keys; -1: none that this query sees
        int slot = slice / (a.block / 16);
        int64_t key = (int64_t)block_indices[slot] * a.block + slice % (a.block / 16) * 16;
        return block_indices[slot] >= 0 && key <= pos ? key : -1;
    }
    __device__ int visible_slice(int slice) const {
        while (slice < a.topk * (a.block / 16) && first_key(slice) < 0) slice += 4;
        return slice;
    }
    __device__ int keys_of(int slice) const { return (int)min((int64_t)16, pos + 1 - first_key(slice)); }
    __device__ void load(int slice, int stage) const {
        if (slice < a.topk * (a.block / 16)) {
            const int64_t stride = (int64_t)a.kv_heads * D, key0 = first_key(slice);
            const int keys = keys_of(slice);
            for (int i = threadIdx.x % 32; i < 2 * D; i += 32) {
                int r = i / (D / 8), chunk = i % (D / 8);
                int64_t from = (key0 + min(r, keys - 1)) * stride + chunk * 8;
                uint32_t to = smem + stage * 2 * TILE + swizzled<D>(r, chunk);
                cp_async_16(to, k_head + from, r < keys);
                cp_async_16(to + TILE, v_head + from, r < keys);
            }
        }
        cp_async_commit();
    }
    // Calls step(K tile, V tile, keys in them) for this warp's slices.
    template <typename F> __device__ void operator()(F step) const {
        int slice = visible_slice(threadIdx.x / 32), stage = 0;
        load(slice, 0);
        while (slice < a.topk * (a.block / 16)) {
            int next = visible_slice(slice + 4);
            load(next, stage ^ 1);
            cp_async_wait<1>();
            __syncwarp();
            step(smem + stage * 2 * TILE, smem + stage * 2 * TILE + TILE, keys_of(slice));
            __syncwarp();
            slice = next, stage ^= 1;
        }
    }
};

// The g rows of a token as A operands, the others 0.
template <typename T, int D>
__device__ __forceinline__ void v2_load_rows(uint32_t (&x)[D / 16][4], const T *rows, int g) {
    const int quad = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        for (int i = 0; i < 4; i++) {
            int row = quad + i % 2 * 8;
            x[kk][i] = row < g ? ((const uint32_t *)(rows + row * D))[kk * 8 + i / 2 * 4 + c] : 0;
        }
    }
}

// Row r of `to` becomes the sum over the warps of factor * acc; smem has room for 4*16*D floats.
template <typename T, int D>
__device__ __forceinline__ void v2_join(float *smem, const float (&acc)[D / 8][4], const float (&factor)[2],
                                        T *to, int g) {
    const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    __syncthreads(); // all warps are done with their tiles
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *(float2 *)(smem + (warp * 16 + quad + 8 * i) * D + n * 8 + 2 * c) =
                make_float2(factor[i] * acc[n][2 * i], factor[i] * acc[n][2 * i + 1]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < g * D; i += 128)
        to[i] = (T)(smem[i] + smem[i + 16 * D] + smem[i + 32 * D] + smem[i + 48 * D]);
}

// S = rows * tile^T for the 16 rows of a tile of keys.
template <typename T, int D>
__device__ __forceinline__ void v2_products(float (&s)[2][4], const uint32_t (&rows)[D / 16][4],
                                            uint32_t tile) {
    for (int i = 0; i < 4; i++) s[0][i] = s[1][i] = 0;
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        uint32_t b[4];
        load_b<D>(b, tile, 0, kk);
        mma_16816<T>(s[0], rows[kk], b[0], b[1]);
        mma_16816<T>(s[1], rows[kk], b[2], b[3]);
    }
}
// acc += x * tile, x 16 x 16.
template <typename T, int D>
__device__ __forceinline__ void v2_add_product(float (&acc)[D / 8][4], const float (&x)[2][4],
                                               uint32_t tile) {
    uint32_t left[4];
    accum_as_a<T>(left, x[0], x[1]);
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        uint32_t b[4];
        load_b_trans<D>(b, tile, 0, n);
        mma_16816<T>(acc[2 * n], left, b[0], b[1]);
        mma_16816<T>(acc[2 * n + 1], left, b[2], b[3]);
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(128)
    selected_v2_kernel(VersionArgs a, const T *q, const T *k, const T *v, T *o, float *lse) {
    extern __shared__ __align__(128) char smem[];
    __shared__ float warp_max[4][16], warp_sum[4][16];
    const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, c = threadIdx.x % 4, g = a.group;
    const int64_t row = (int64_t)blockIdx.x * a.q_heads + blockIdx.y * g;
    const float scale_log2 = a.scale * FSA_LOG2E;
    uint32_t rows[D / 16][4];
    v2_load_rows<T, D>(rows, q + row * D, g);
    float acc[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, factor[2];
    V2Walk<T, D> walk(a, k, v, smem_address(smem));
    walk([&](uint32_t k_tile, uint32_t v_tile, int keys) {
        float s[2][4], old[2] = {most[0], most[1]};
        v2_products<T, D>(s, rows, k_tile);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &x = s[i / 4][i % 4];
            x = i / 4 * 8 + 2 * c + i % 2 < keys ? x * scale_log2 : -INFINITY;
            most[i % 4 / 2] = fmaxf(most[i % 4 / 2], x);
        }
        for (int i = 0; i < 2; i++) most[i] = quad_reduce_max(most[i]);
        if (__any_sync(0xffffffffu, most[0] > old[0] || most[1] > old[1])) {
            float shrink[2] = {exp2_fast(old[0] - most[0]), exp2_fast(old[1] - most[1])};
            for (int i = 0; i < 2; i++) sum[i] *= shrink[i];
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                for (int i = 0; i < 4; i++) acc[n][i] *= shrink[i / 2];
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &x = s[i / 4][i % 4];
            x = exp2_fast(x - most[i % 4 / 2]);
            sum[i % 4 / 2] += x;
        }
        v2_add_product<T, D>(acc, s, v_tile);
    });
    for (int i = 0; i < 2; i++) {
        sum[i] = quad_reduce_sum(sum[i]);
        if (c == 0) warp_max[warp][quad + 8 * i] = most[i], warp_sum[warp][quad + 8 * i] = sum[i];
    }
    __syncthreads();
    for (int i = 0; i < 2; i++) {
        int r = quad + 8 * i;
        float m = -INFINITY, total = 0;
        for (int w = 0; w < 4; w++) m = fmaxf(m, warp_max[w][r]);
        for (int w = 0; w < 4; w++)
            total += warp_max[w][r] == -INFINITY ? 0 : exp2_fast(warp_max[w][r] - m) * warp_sum[w][r];
        factor[i] = most[i] == -INFINITY ? 0 : exp2_fast(most[i] - m) / total;
        if (warp == 0 && c == 0 && r < g) lse[row + r] = total > 0 ? (m + log2f(total)) * FSA_LN2 : -INFINITY;
    }
    v2_join<T, D>((float *)smem, acc, factor, o + row * D, g);
}

template <typename T, int D>
__global__ void __launch_bounds__(128, 3)
    selected_v2_dq_kernel(VersionArgs a, const T *q, const T *k, const T *v, const T *dout, T *dq) {
    extern __shared__ __align__(128) char smem[];
    const int quad = threadIdx.x % 32 / 4, c = threadIdx.x % 4, g = a.group;
    const int64_t row = (int64_t)blockIdx.x * a.q_heads + blockIdx.y * g;
    const float scale_log2 = a.scale * FSA_LOG2E;
    uint32_t q_rows[D / 16][4], dout_rows[D / 16][4];
    v2_load_rows<T, D>(q_rows, q + row * D, g);
    v2_load_rows<T, D>(dout_rows, dout + row * D, g);
    float acc[D / 8][4] = {}, lse_log2[2], delta[2];
    for (int i = 0; i < 2; i++) {
        bool there = quad + 8 * i < g;
        lse_log2[i] = there ? a.lse[row + quad + 8 * i] * FSA_LOG2E : INFINITY;
        delta[i] = there ? a.delta[row + quad + 8 * i] : 0;
    }
    V2Walk<T, D> walk(a, k, v, smem_address(smem));
    walk([&](uint32_t k_tile, uint32_t v_tile, int keys) {
        float s[2][4], dp[2][4];
        v2_products<T, D>(s, q_rows, k_tile);
        v2_products<T, D>(dp, dout_rows, v_tile);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &x = s[i / 4][i % 4];
            bool seen = i / 4 * 8 + 2 * c + i % 2 < keys;
            float p = seen ? exp2_fast(x * scale_log2 - lse_log2[i % 4 / 2]) : 0;
            x = p * (dp[i / 4][i % 4] - delta[i % 4 / 2]);
        }
        v2_add_product<T, D>(acc, s, k_tile);
    });
    const float factor[2] = {a.scale, a.scale};
    v2_join<T, D>((float *)smem, acc, factor, dq + row * D, g);
}

// ---- KV block outside ---------------------------------------------------------------------------------
// What a thread block works on: at most 64 keys of a block, and the rows begin .. end - 1 (a row is a (token,
// head of the group)) of the block's list.
enum { SHARE_ROWS = 4096 };
struct Share {
    const uint32_t *entries;
    int64_t first_key, key_row; // in the sequence, in k and v
    int keys, part, begin, end; // begin >= end: nothing to do
};
__device__ __forceinline__ Share share_of(const VersionArgs &a) {
    Share s;
    const uint32_t *offsets = a.lists.offsets + a.head * (a.lists.max_blocks + 1);
    int64_t block = blockIdx.x / a.parts;
    s.part = blockIdx.x % a.parts;
    s.begin = s.end = 0;
    if (block >= a.batch.cu_blocks[a.batch.num_seqs]) return s;
    int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, block);
    s.first_key = (block - a.batch.cu_blocks[seq]) * a.block + s.part * 64;
    s.key_row = a.batch.cu_seqlens[seq] + s.first_key;
    s.keys = (int)min((int64_t)min(64, a.block - s.part * 64), a.batch.cu_seqlens[seq + 1] - s.key_row);
    if (s.keys <= 0) return s;
    s.entries = a.lists.entries + a.head * a.batch.nq * a.topk + offsets[block];
    s.begin = blockIdx.y * SHARE_ROWS;
    s.end = min((int)(offsets[block + 1] - offsets[block]) * a.group, s.begin + SHARE_ROWS);
    return s;
}
// The last key of the share that a token sees.
__device__ __forceinline__ int share_limit(const VersionArgs &a, const Share &s, int64_t token) {
    int64_t seq, pos;
    query_position(a.batch, token, &seq, &pos);
    return (int)min((int64_t)s.keys - 1, max(pos - s.first_key, (int64_t)-1));
}
template <int D, typename T>
__device__ __forceinline__ void share_load(const VersionArgs &a, const Share &s, uint32_t tile, const T *x) {
    load_tile<64, D, 128>(tile, x + (s.key_row * a.kv_heads + a.head) * D, (int64_t)a.kv_heads * D, s.keys);
}

// ---- version 3 --------------------------------------------------------------------------------------
// FSA as in its paper: a statistics kernel computes QK^T for the softmax's log-sum-exps, a main kernel
// computes it again and writes each block's part of the output, a reduction adds the parts; one kv head at a
// time. A warp takes 16 rows of the list at a time, the next ones under way. STATS: the statistics kernel,
// else the main kernel. 64K tokens, 32 heads, T = 16, d = 128: 8.6 GB in, and again, 8.6 GB out, which the
// reduction reads: 7.6 ms at 4.5 TB/s.
template <typename T, int D, bool STATS>
__global__ void __launch_bounds__(128) selected_v3_kernel(VersionArgs a, const T *q, const T *k, const T *v) {
    constexpr int CHUNKS = D / 8, TILE = 16 * D * 2;
    extern __shared__ __align__(128) char smem[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, c = lane % 4, g = a.group;
    const uint32_t k_base = smem_address(smem), v_base = k_base + 64 * D * 2;
    char *my_tiles = smem + (STATS ? 1 : 2) * 64 * D * 2 + warp * 2 * TILE;
    const uint32_t q_base = smem_address(my_tiles);
    const float scale_log2 = a.scale * FSA_LOG2E;
    const Share share = share_of(a);
    if (share.begin >= share.end) return;
    const int tiles = (share.end + 15) / 16, tile0 = share.begin / 16 + warp;
    share_load<D>(a, share, k_base, k);
    if (!STATS) share_load<D>(a, share, v_base, v);
    cp_async_commit();

    // Lane i holds the entry of row i % 16 of a tile.
    auto entry_of = [&](int tile) { return share.entries[min(tile * 16 + lane % 16, share.end - 1) / g]; };
    auto gather = [&](int tile, uint32_t entry, int stage) {
#pragma unroll
        for (int i = lane; i < 16 * CHUNKS; i += 32) {
            int r = i / CHUNKS, chunk = i % CHUNKS;
            int64_t token = __shfl_sync(0xffffffffu, entry, r) / (uint32_t)a.topk;
            int64_t row = token * a.q_heads + a.head * g + min(tile * 16 + r, share.end - 1) % g;
            cp_async_16(q_base + stage * TILE + swizzled<D>(r, chunk), q + row * D + chunk * 8);
        }
        cp_async_commit();
    };
    uint32_t entry = entry_of(tile0), next_entry = entry_of(tile0 + 4);
    gather(tile0, entry, 0);
    cp_async_wait<1>(); // K and V
    __syncthreads();
    for (int tile = tile0, stage = 0; tile < tiles; tile += 4, stage ^= 1) {
        gather(tile + 4, next_entry, stage ^ 1); // beyond the last tile: its last row again
        uint32_t later_entry = entry_of(tile + 8);
        cp_async_wait<1>();
        __syncwarp();
        int limit[2];
        int64_t at[2]; // of the partial rows
        float base[2];
        for (int i = 0; i < 2; i++) {
            int r = tile * 16 + quad + 8 * i, in_group = min(r, share.end - 1) % g;
            int64_t e = __shfl_sync(0xffffffffu, entry, quad + 8 * i), token = e / a.topk;
            limit[i] = share_limit(a, share, token);
            at[i] = r < share.end ? (e * a.parts + share.part) * g + in_group : -1;
            base[i] = STATS ? -INFINITY : a.row_stats[token * g + in_group];
        }
        float s[8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t rows[4];
            load_a<D>(rows, q_base + stage * TILE, 0, kk);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t b[4];
                load_b<D>(b, k_base, n * 8, kk);
                mma_16816<T>(s[n], rows, b[0], b[1]);
                mma_16816<T>(s[n + 1], rows, b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            for (int i = 0; i < 4; i++) {
                bool seen = n * 8 + 2 * c + i % 2 <= limit[i / 2];
                s[n][i] = seen ? s[n][i] * scale_log2 : -INFINITY;
                if (STATS) base[i / 2] = fmaxf(base[i / 2], s[n][i]);
            }
        }
        if constexpr (STATS) {
            for (int i = 0; i < 2; i++) {
                base[i] = quad_reduce_max(base[i]);
                float sum = 0;
#pragma unroll
                for (int n = 0; n < 8; n++)
                    sum += exp2_fast(s[n][2 * i] - base[i]) + exp2_fast(s[n][2 * i + 1] - base[i]);
                sum = quad_reduce_sum(sum);
                if (c == 0 && at[i] >= 0) a.stats[at[i]] = base[i] + log2f(sum);
            }
        } else {
            float acc[D / 8][4] = {};
#pragma unroll
            for (int n = 0; n < 8; n++) {
                for (int i = 0; i < 4; i++) s[n][i] = exp2_fast(s[n][i] - base[i / 2]);
            }
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                uint32_t p[4];
                accum_as_a<T>(p, s[2 * kk], s[2 * kk + 1]);
#pragma unroll
                for (int n = 0; n < D / 8; n += 2) {
                    uint32_t b[4];
                    load_b_trans<D>(b, v_base, kk * 16, n / 2);
                    mma_16816<T>(acc[n], p, b[0], b[1]);
                    mma_16816<T>(acc[n + 1], p, b[2], b[3]);
                }
            }
            // Out by way of the q tile, so that a row leaves in one piece.
            char *out = my_tiles + stage * TILE;
            __syncwarp();
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                for (int i = 0; i < 2; i++)
                    *(uint32_t *)(out + swizzled<D>(quad + 8 * i, n) + 4 * c) =
                        pack2<T>(acc[n][2 * i], acc[n][2 * i + 1]);
            }
            __syncwarp();
#pragma unroll
            for (int i = lane; i < 16 * CHUNKS; i += 32) {
                int r = i / CHUNKS, chunk = i % CHUNKS;
                int64_t low = __shfl_sync(0xffffffffu, at[0], r % 8 * 4),
                        high = __shfl_sync(0xffffffffu, at[1], r % 8 * 4), to = r < 8 ? low : high;
                if (to >= 0)
                    ((uint4 *)((T *)a.partial + to * D))[chunk] = *(uint4 *)(out + swizzled<D>(r, chunk));
            }
        }
        __syncwarp(); // before the next rows land in this tile
        entry = next_entry, next_entry = later_entry;
    }
    cp_async_wait<0>();
}

// Calls f(index of the partial row, without the group) for the parts of the blocks that a token sees.
template <typename F> __device__ __forceinline__ void v3_parts(const VersionArgs &a, int64_t token, F f) {
    int64_t seq, pos;
    query_position(a.batch, token, &seq, &pos);
    for (int t = 0; t < a.topk; t++) {
        int64_t index = a.block_indices[(a.head * a.batch.nq + token) * a.topk + t];
        for (int part = 0; part < a.parts && index >= 0 && index * a.block + part * 64 <= pos; part++)
            f((token * a.topk + t) * a.parts + part);
    }
}

// Version 3's log-sum-exp of each row over its parts. A thread a row.
static __global__ void selected_v3_row_stats_kernel(VersionArgs a, float *lse) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x, token = i / a.group;
    if (token >= a.batch.nq) return;
    int r = (int)(i % a.group);
    float most = -INFINITY, sum = 0;
    v3_parts(a, token, [&](int64_t part) { most = fmaxf(most, a.stats[part * a.group + r]); });
    v3_parts(a, token, [&](int64_t part) { sum += exp2f(a.stats[part * a.group + r] - most); });
    a.row_stats[i] = most + log2f(sum);
    lse[token * a.q_heads + a.head * a.group + r] = a.row_stats[i] * FSA_LN2;
}

// Version 3's reduction, of the output and of dQ. A thread takes eight channels of a row.
template <typename T, int D> __global__ void selected_v3_reduce_kernel(VersionArgs a, T *out) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x, row = i / (D / 8), token = row / a.group;
    if (token >= a.batch.nq) return;
    int r = (int)(row % a.group);
    float acc[8] = {};
    v3_parts(a, token, [&](int64_t part) {
        uint4 x = ((const uint4 *)((const T *)a.partial + (part * a.group + r) * D))[i % (D / 8)];
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
        for (int j = 0; j < 4; j++) {
            float2 f = unpack2<T>(words[j]);
            acc[2 * j] += f.x;
            acc[2 * j + 1] += f.y;
        }
    });
    uint4 *to = (uint4 *)(out + (token * a.q_heads + a.head * a.group + r) * D);
    to[i % (D / 8)] = make_uint4(pack2<T>(acc[0], acc[1]), pack2<T>(acc[2], acc[3]), pack2<T>(acc[4], acc[5]),
                                 pack2<T>(acc[6], acc[7]));
}

// ---- versions 2 and 3, backward -------------------------------------------------------------------------
// The KV block outside: dK and dV of 64 keys stay in registers, 16 keys a warp, while the list's rows of q
// and dO pass, 32 at a time, the next ones under way. A warp has S^T and dP^T of its keys, which are at once
// the operands of dV += P^T dO and dK += dS^T Q. DQ (version 3): dS K goes out as a partial row of dQ, for
// the reduction above; without it (version 2) dQ is selected_v2_dq_kernel's. Lists of more than SHARE_ROWS
// rows have several thread blocks, so dK and dV are added up by atomics.
template <typename T, int D, bool DQ>
__global__ void __launch_bounds__(128, 2)
    selected_kv_backward_kernel(VersionArgs a, const T *q, const T *k, const T *v, const T *dout) {
    constexpr int CHUNKS = D / 8, KEYS = 64 * D * 2, ROWS = 32 * D * 2;
    extern __shared__ __align__(128) char smem[];
    // Of three tiles' rows: the row in q, the place in a.partial, lse in base 2, delta, and the last visible
    // key (-1: the row only fills the tile).
    __shared__ int64_t meta_row[3][32], meta_partial[3][32];
    __shared__ float meta_lse[3][32], meta_delta[3][32];
    __shared__ int meta_limit[3][32];
    const int tid = threadIdx.x, warp = tid / 32, quad = tid % 32 / 4, c = tid % 4, g = a.group;
    const uint32_t sk = smem_address(smem), sv = sk + KEYS, sds = sv + KEYS, stages = sds + 64 * 64 * 2;
    char *ds_tile = smem + 2 * KEYS, *stage_tiles = ds_tile + 64 * 64 * 2; // dS^T: keys x 32 rows
    const float scale_log2 = a.scale * FSA_LOG2E;
    const Share share = share_of(a);
    if (share.begin >= share.end) return;
    const int tiles = (share.end - share.begin + 31) / 32;

    uint32_t entry = 0; // threads 0 to 31: of row tid of the tile that load_meta takes next
    auto load_entry = [&](int tile) {
        entry = share.entries[min(share.begin + tile * 32 + tid, share.end - 1) / g];
    };
    auto load_meta = [&](int tile) {
        int r = share.begin + tile * 32 + tid, in_group = min(r, share.end - 1) % g, to = tile % 3;
        int64_t e = entry, token = e / a.topk, row = token * a.q_heads + a.head * g + in_group;
        load_entry(tile + 1);
        meta_row[to][tid] = row;
        meta_partial[to][tid] = (e * a.parts + share.part) * g + in_group;
        meta_lse[to][tid] = a.lse[row] * FSA_LOG2E;
        meta_delta[to][tid] = a.delta[row];
        meta_limit[to][tid] = r < share.end ? share_limit(a, share, token) : -1;
    };
    auto gather = [&](int tile) {
        uint32_t to = stages + tile % 2 * 2 * ROWS;
#pragma unroll
        for (int i = tid; i < 32 * CHUNKS; i += 128) {
            int r = i / CHUNKS, chunk = i % CHUNKS;
            int64_t from = meta_row[tile % 3][r] * D + chunk * 8;
            cp_async_16(to + swizzled<D>(r, chunk), q + from);
            cp_async_16(to + ROWS + swizzled<D>(r, chunk), dout + from);
        }
        cp_async_commit();
    };
    share_load<D>(a, share, sk, k);
    share_load<D>(a, share, sv, v);
    if (tid < 32) {
        load_entry(0);
        load_meta(0);
        load_meta(1);
    }
    __syncthreads();
    gather(0);

    float dk[D / 8][4] = {}, dv[D / 8][4] = {}; // keys 16*warp..
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) gather(tile + 1);
        const int at = tile % 3;
        const uint32_t sq = stages + tile % 2 * 2 * ROWS, sg = sq + ROWS;
        float s[4][4] = {}, dp[4][4] = {}; // keys x rows
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t left_k[4], left_v[4], b[4];
            load_a<D>(left_k, sk, warp * 16, kk);
            load_a<D>(left_v, sv, warp * 16, kk);
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                load_b<D>(b, sq, n * 8, kk);
                mma_16816<T>(s[n], left_k, b[0], b[1]);
                mma_16816<T>(s[n + 1], left_k, b[2], b[3]);
                load_b<D>(b, sg, n * 8, kk);
                mma_16816<T>(dp[n], left_v, b[0], b[1]);
                mma_16816<T>(dp[n + 1], left_v, b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            for (int i = 0; i < 4; i++) {
                int r = n * 8 + 2 * c + i % 2;
                bool seen = warp * 16 + quad + i / 2 * 8 <= meta_limit[at][r];
                s[n][i] = seen ? exp2_fast(s[n][i] * scale_log2 - meta_lse[at][r]) : 0;
                dp[n][i] = s[n][i] * (dp[n][i] - meta_delta[at][r]);
            }
            for (int i = 0; i < 2 && DQ; i++)
                *(uint32_t *)(ds_tile + swizzled<64>(warp * 16 + quad + 8 * i, n) + 4 * c) =
                    pack2<T>(dp[n][2 * i], dp[n][2 * i + 1]);
        }
#pragma unroll
        for (int kk = 0; kk < 2; kk++) {
            uint32_t p[4], ds[4], b[4];
            accum_as_a<T>(p, s[2 * kk], s[2 * kk + 1]);
            accum_as_a<T>(ds, dp[2 * kk], dp[2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                load_b_trans<D>(b, sg, kk * 16, n / 2);
                mma_16816<T>(dv[n], p, b[0], b[1]);
                mma_16816<T>(dv[n + 1], p, b[2], b[3]);
                load_b_trans<D>(b, sq, kk * 16, n / 2);
                mma_16816<T>(dk[n], ds, b[0], b[1]);
                mma_16816<T>(dk[n + 1], ds, b[2], b[3]);
            }
        }
        if constexpr (DQ) { // rows 16*wm.., columns D/2*wn..
            const int wm = warp % 2, wn = warp / 2;
            char *out = stage_tiles + tile % 2 * 2 * ROWS;
            float dq[D / 16][4] = {};
            __syncthreads(); // dS is whole, and q no longer needed
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                uint32_t left[4], b[4];
                load_a_trans<64>(left, sds, kk * 16, wm);
#pragma unroll
                for (int n = 0; n < D / 16; n += 2) {
                    load_b_trans<D>(b, sk, kk * 16, wn * (D / 32) + n / 2);
                    mma_16816<T>(dq[n], left, b[0], b[1]);
                    mma_16816<T>(dq[n + 1], left, b[2], b[3]);
                }
            }
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                for (int i = 0; i < 2; i++)
                    *(uint32_t *)(out + swizzled<D>(wm * 16 + quad + 8 * i, wn * (D / 16) + n) + 4 * c) =
                        pack2<T>(dq[n][2 * i] * a.scale, dq[n][2 * i + 1] * a.scale);
            }
            __syncthreads();
            for (int i = tid; i < 32 * CHUNKS; i += 128) {
                int r = i / CHUNKS, chunk = i % CHUNKS;
                if (share.begin + tile * 32 + r < share.end)
                    ((uint4 *)((T *)a.partial + meta_partial[at][r] * D))[chunk] =
                        *(uint4 *)(out + swizzled<D>(r, chunk));
            }
        }
        if (tid < 32) load_meta(tile + 2);
    }
    for (int i = 0; i < 4; i++) {
        int key = warp * 16 + quad + i / 2 * 8;
        if (key >= share.keys) continue;
        int64_t to = ((share.key_row + key) * a.kv_heads + a.head) * D + 2 * c + i % 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            atomicAdd(a.dk + to + n * 8, dk[n][i] * a.scale);
            atomicAdd(a.dv + to + n * 8, dv[n][i]);
        }
    }
}

template <typename T> __global__ void selected_round_kernel(const float *x, T *y, int64_t n) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i < n) y[i] = (T)x[i];
}

// Runs one of the versions, with memory of its own.
template <typename T, int D> struct Versions {
    const FsaConfig &c;
    const int version;
    VersionArgs a;
    Buffer<char> lists_memory, lists_workspace;
    Buffer<T> partial;
    Buffer<float> stats, row_stats, delta, lse_bwd, dk_sum, dv_sum;
    Versions(const FsaConfig &config, const BatchLayout &p, int which)
        : c(config), version(which), lists_memory((int64_t)fsa_query_lists_bytes(&c, &p, p.nq)),
          lists_workspace((int64_t)fsa_query_lists_scratch_bytes(&c, &p, p.nq)),
          partial(version == 3 ? partials(p) * D : 0), stats(version == 3 ? partials(p) : 0),
          row_stats(p.nq * (c.q_heads / c.kv_heads)), delta(p.nq * c.q_heads), lse_bwd(p.nq * c.q_heads),
          dk_sum(p.n * c.kv_heads * D), dv_sum(p.n * c.kv_heads * D) {
        memset(&a, 0, sizeof a);
        a.batch = p, a.q_heads = c.q_heads, a.kv_heads = c.kv_heads, a.group = c.q_heads / c.kv_heads;
        a.block = c.block, a.topk = c.topk, a.scale = softmax_scale_of(&c), a.parts = (c.block + 63) / 64;
        a.lists = fsa_query_lists_at(&c, &p, p.nq, lists_memory.get());
        a.partial = partial.get(), a.stats = stats, a.row_stats = row_stats;
        a.delta = delta, a.dk = dk_sum, a.dv = dv_sum;
        const int v2 = 4 * V2Walk<T, D>::WARP, kv = (64 + 4 * 2 * 16) * D * 2, backward = kv_smem();
        allow(selected_v2_kernel<T, D>, v2);
        allow(selected_v2_dq_kernel<T, D>, v2);
        allow(selected_v3_kernel<T, D, true>, kv);
        allow(selected_v3_kernel<T, D, false>, kv + 64 * D * 2);
        allow(selected_kv_backward_kernel<T, D, true>, backward);
        allow(selected_kv_backward_kernel<T, D, false>, backward);
    }
    int64_t partials(const BatchLayout &p) const {
        return p.nq * c.topk * ((c.block + 63) / 64) * (c.q_heads / c.kv_heads);
    }
    template <typename K> static void allow(K kernel, int bytes) {
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    }
    static int kv_smem() { return (2 * 64 + 4 * 32) * D * 2 + 64 * 64 * 2; }
    dim3 shares() const {
        int64_t rows = a.batch.nq * a.group;
        return dim3((unsigned)(a.lists.max_blocks * a.parts), (unsigned)((rows + SHARE_ROWS - 1) / SHARE_ROWS));
    }
    void reduce(T *out) {
        int64_t threads = a.batch.nq * a.group * (D / 8);
        selected_v3_reduce_kernel<T, D><<<(unsigned)((threads + 255) / 256), 256>>>(a, out);
    }

    void forward(const T *q, const T *k, const T *v, const int32_t *block_indices, T *o, float *lse) {
        a.block_indices = block_indices;
        int64_t nq = a.batch.nq;
        if (version == 1)
            selected_v1_kernel<T, D><<<(unsigned)((nq * a.q_heads + 3) / 4), 128>>>(a, q, k, v, o, lse);
        if (version == 2) {
            dim3 grid((unsigned)nq, a.kv_heads);
            selected_v2_kernel<T, D><<<grid, 128, 4 * V2Walk<T, D>::WARP>>>(a, q, k, v, o, lse);
        }
        if (version == 3) {
            const int smem = (64 + 4 * 2 * 16) * D * 2;
            FSA_CHECK(fsa_query_lists(&c, &a.batch, block_indices, &a.lists, lists_workspace, 0));
            for (a.head = 0; a.head < a.kv_heads; a.head++) {
                selected_v3_kernel<T, D, true><<<shares(), 128, smem>>>(a, q, k, v);
                selected_v3_row_stats_kernel<<<(unsigned)((nq * a.group + 255) / 256), 256>>>(a, lse);
                selected_v3_kernel<T, D, false><<<shares(), 128, smem + 64 * D * 2>>>(a, q, k, v);
                reduce(o);
            }
        }
        CUDA_CHECK(cudaGetLastError());
    }
    // After forward; version 3 uses its lists.
    void backward(const T *q, const T *k, const T *v, const int32_t *block_indices, const T *o, const float *lse,
                  const T *dout, T *dq, T *dk, T *dv) {
        a.block_indices = block_indices, a.lse = lse;
        int64_t nq = a.batch.nq, size = dk_sum.n;
        FSA_CHECK(fsa_bwd_preprocess(&c, Dtype<T>::value, nq, o, lse, dout, delta, lse_bwd, 0));
        CUDA_CHECK(cudaMemsetAsync(dk_sum.get(), 0, size * sizeof(float)));
        CUDA_CHECK(cudaMemsetAsync(dv_sum.get(), 0, size * sizeof(float)));
        if (version == 1) {
            unsigned grid = (unsigned)((nq * a.q_heads + 3) / 4);
            selected_v1_backward_kernel<T, D><<<grid, 128>>>(a, q, k, v, dout, dq);
        }
        if (version == 2) {
            dim3 grid((unsigned)nq, a.kv_heads);
            selected_v2_dq_kernel<T, D><<<grid, 128, 4 * V2Walk<T, D>::WARP>>>(a, q, k, v, dout, dq);
            FSA_CHECK(fsa_query_lists(&c, &a.batch, block_indices, &a.lists, lists_workspace, 0));
            for (a.head = 0; a.head < a.kv_heads; a.head++)
                selected_kv_backward_kernel<T, D, false><<<shares(), 128, kv_smem()>>>(a, q, k, v, dout);
        }
        for (a.head = 0; a.head < a.kv_heads && version == 3; a.head++) {
            selected_kv_backward_kernel<T, D, true><<<shares(), 128, kv_smem()>>>(a, q, k, v, dout);
            reduce(dq);
        }
        selected_round_kernel<T><<<(unsigned)((size + 255) / 256), 256>>>(dk_sum, dk, size);
        selected_round_kernel<T><<<(unsigned)((size + 255) / 256), 256>>>(dv_sum, dv, size);
        CUDA_CHECK(cudaGetLastError());
    }
};
#endif
