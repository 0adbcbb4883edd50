// selected_versions.h: versions 1 to 3 of the selected branch, forward and backward, for selected.cu.
//
//   version  forward                                     backward
//   1        a warp per (query, head)                    the same; dK, dV by atomics
//   2        a thread block per (query, KV head)         the same for dQ; KV blocks outside for dK, dV
//   3        KV blocks outside, three kernels (FSA)      KV blocks outside; dQ by partial rows and a combine
#ifndef DEV_CUDA_SELECTED_VERSIONS_H
#define DEV_CUDA_SELECTED_VERSIONS_H
#include "../../fsa/kernels.h"
#include "../../fsa/sm80/tile.cuh"
#include "common.h"

struct VersionParams {
    BatchLayout batch;
    int q_heads, kv_heads, group, block, topk;
    float scale;
    const int32_t *block_indices;
    const float *lse, *delta;   // backward: [Nq, Hq]
    float *dk_accum, *dv_accum; // backward: [N, Hkv, D]
    // Kernels with KV blocks outside: the library's query lists in one slab, the KV head of this launch, and
    // the number of tiles of at most 64 keys in a KV block.
    QueryLists lists;
    int kv_head, key_tiles;
    void *partial;      // version 3: o_partial or dq_partial [Nq*T, key_tiles, g, D], in 16 bits
    float *lse_partial; // version 3: [Nq*T, key_tiles, g], in base 2
    float *row_lse;     // version 3: [Nq, g], in base 2
};

// ---- version 1 --------------------------------------------------------------------------------------
// A warp computes one row (query, head), one key at a time, D/32 channels per lane. dK and dV by atomics.
__device__ __forceinline__ float v1_warp_reduce_sum(float x) {
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

// Calls f(kv_offset) for every key that the warp's row sees. kv_offset: this lane's channels in k and v.
template <int D, typename F> __device__ void v1_for_each_key(const VersionParams &a, int64_t row, F f) {
    int64_t query = row / a.q_heads, seq, pos;
    int kv_head = (int)(row % a.q_heads) / a.group;
    query_position(a.batch, query, &seq, &pos);
    for (int t = 0; t < a.topk; t++) {
        int64_t index = a.block_indices[(kv_head * a.batch.nq + query) * a.topk + t];
        if (index < 0) continue;
        for (int64_t key = index * a.block; key < (index + 1) * a.block && key <= pos; key++)
            f(((a.batch.cu_seqlens[seq] + key) * a.kv_heads + kv_head) * D + threadIdx.x % 32 * (D / 32));
    }
}

template <typename T, int D>
__global__ void selected_v1_kernel(VersionParams a, const T *q, const T *k, const T *v, T *o, float *lse) {
    constexpr int PER_LANE = D / 32;
    int64_t row = blockIdx.x * 4ll + threadIdx.x / 32;
    if (row >= a.batch.nq * a.q_heads) return;
    const T *my_q = q + row * D + threadIdx.x % 32 * PER_LANE;
    float acc[PER_LANE] = {}, row_max = -INFINITY, row_sum = 0;
    v1_for_each_key<D>(a, row, [&](int64_t kv_offset) {
        float s = 0;
        for (int i = 0; i < PER_LANE; i++) s += (float)my_q[i] * (float)k[kv_offset + i];
        s = v1_warp_reduce_sum(s) * a.scale * FSA_LOG2E;
        float new_max = fmaxf(row_max, s), rescale = exp2f(row_max - new_max), p = exp2f(s - new_max);
        row_max = new_max;
        row_sum = row_sum * rescale + p;
        for (int i = 0; i < PER_LANE; i++) acc[i] = acc[i] * rescale + p * (float)v[kv_offset + i];
    });
    for (int i = 0; i < PER_LANE; i++)
        o[row * D + threadIdx.x % 32 * PER_LANE + i] = (T)(row_sum > 0 ? acc[i] / row_sum : 0);
    if (threadIdx.x % 32 == 0) lse[row] = row_sum > 0 ? (row_max + log2f(row_sum)) * FSA_LN2 : -INFINITY;
}

template <typename T, int D>
__global__ void selected_v1_backward_kernel(VersionParams a, const T *q, const T *k, const T *v,
                                            const T *dout, T *dq) {
    constexpr int PER_LANE = D / 32;
    int64_t row = blockIdx.x * 4ll + threadIdx.x / 32, offset = row * D + threadIdx.x % 32 * PER_LANE;
    if (row >= a.batch.nq * a.q_heads) return;
    float acc[PER_LANE] = {};
    v1_for_each_key<D>(a, row, [&](int64_t kv_offset) {
        float s = 0, dp = 0;
        for (int i = 0; i < PER_LANE; i++) {
            s += (float)q[offset + i] * (float)k[kv_offset + i];
            dp += (float)dout[offset + i] * (float)v[kv_offset + i];
        }
        float p = expf(v1_warp_reduce_sum(s) * a.scale - a.lse[row]);
        float ds = p * (v1_warp_reduce_sum(dp) - a.delta[row]) * a.scale;
        for (int i = 0; i < PER_LANE; i++) {
            acc[i] += ds * (float)k[kv_offset + i];
            atomicAdd(a.dk_accum + kv_offset + i, ds * (float)q[offset + i]);
            atomicAdd(a.dv_accum + kv_offset + i, p * (float)dout[offset + i]);
        }
    });
    for (int i = 0; i < PER_LANE; i++) dq[offset + i] = (T)acc[i];
}

// ---- version 2 --------------------------------------------------------------------------------------
// NSA's order of the loops: queries outside. A thread block processes one (query, KV head), its g rows padded
// to the 16 rows of an mma tile. It iterates over the selected blocks in slices of 16 keys, every fourth
// slice per warp, with the next slice in flight (cp.async, two stages, no block barrier). At the end the
// partial sums of the warps are combined. The backward pass has this order for dQ; dK and dV come from the
// query lists, below.
//
// Each query loads T*B keys and values: 512 KiB at T*B = 1024, d = 128. Lower bound for 64K tokens, 8 KV
// heads: 275 GB from L2 at 10 TB/s, 27 ms. Limited by L2 bandwidth.
template <typename T, int D> struct V2SliceIterator {
    const VersionParams &a;
    const T *k_head, *v_head;
    const int32_t *block_indices;
    int64_t pos;
    uint32_t smem; // this warp's shared memory: two stages of a K and a V slice
    static constexpr int TILE = 16 * D * 2, WARP = 4 * TILE;

    __device__ V2SliceIterator(const VersionParams &args, const T *k, const T *v, uint32_t base)
        : a(args), smem(base + threadIdx.x / 32 * WARP) {
        int64_t query = blockIdx.x, kv_head = blockIdx.y, seq;
        query_position(a.batch, query, &seq, &pos);
        int64_t offset = (a.batch.cu_seqlens[seq] * a.kv_heads + kv_head) * D;
        k_head = k + offset, v_head = v + offset;
        block_indices = a.block_indices + (kv_head * a.batch.nq + query) * a.topk;
    }
    __device__ int64_t first_key(int slice) const { // -1 if the query sees none of the slice's keys
        int slot = slice / (a.block / 16);
        int64_t key = (int64_t)block_indices[slot] * a.block + slice % (a.block / 16) * 16;
        return block_indices[slot] >= 0 && key <= pos ? key : -1;
    }
    __device__ int visible_slice(int slice) const {
        while (slice < a.topk * (a.block / 16) && first_key(slice) < 0) slice += 4;
        return slice;
    }
    __device__ int num_keys(int slice) const { return (int)min((int64_t)16, pos + 1 - first_key(slice)); }
    __device__ void load(int slice, int stage) const {
        if (slice < a.topk * (a.block / 16)) {
            const int64_t stride = (int64_t)a.kv_heads * D, key0 = first_key(slice);
            const int keys = num_keys(slice);
            for (int i = threadIdx.x % 32; i < 2 * D; i += 32) {
                int r = i / (D / 8), chunk = i % (D / 8);
                int64_t source = (key0 + min(r, keys - 1)) * stride + chunk * 8;
                uint32_t dest = smem + stage * 2 * TILE + swizzled<D>(r, chunk);
                cp_async_16(dest, k_head + source, r < keys);
                cp_async_16(dest + TILE, v_head + source, r < keys);
            }
        }
        cp_async_commit();
    }
    // Calls f(K slice, V slice, keys in them) for each of this warp's slices.
    template <typename F> __device__ void operator()(F f) const {
        int slice = visible_slice(threadIdx.x / 32), stage = 0;
        load(slice, 0);
        while (slice < a.topk * (a.block / 16)) {
            int next = visible_slice(slice + 4);
            load(next, stage ^ 1);
            cp_async_wait<1>();
            __syncwarp();
            f(smem + stage * 2 * TILE, smem + stage * 2 * TILE + TILE, num_keys(slice));
            __syncwarp();
            slice = next, stage ^= 1;
        }
    }
};

// The g rows of a query as A operands of mma, padded with zeros to 16 rows.
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

// out [g, D] = the sum over the warps of factor * acc. smem: 4*16*D floats.
template <typename T, int D>
__device__ __forceinline__ void v2_combine_warps(float *smem, const float (&acc)[D / 8][4],
                                                 const float (&factor)[2], T *out, int g) {
    const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    __syncthreads(); // all warps have finished with their slices
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *(float2 *)(smem + (warp * 16 + quad + 8 * i) * D + n * 8 + 2 * c) =
                make_float2(factor[i] * acc[n][2 * i], factor[i] * acc[n][2 * i + 1]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < g * D; i += 128)
        out[i] = (T)(smem[i] + smem[i + 16 * D] + smem[i + 32 * D] + smem[i + 48 * D]);
}

// s [16, 16] = rows * slice^T over D.
template <typename T, int D>
__device__ __forceinline__ void v2_matmul_nt(float (&s)[2][4], const uint32_t (&rows)[D / 16][4],
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
// acc [16, D] += x * slice, x [16, 16].
template <typename T, int D>
__device__ __forceinline__ void v2_matmul_nn(float (&acc)[D / 8][4], const float (&x)[2][4], uint32_t tile) {
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
    selected_v2_kernel(VersionParams a, const T *q, const T *k, const T *v, T *o, float *lse) {
    extern __shared__ __align__(128) char smem[];
    __shared__ float warp_row_max[4][16], warp_row_sum[4][16];
    const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, c = threadIdx.x % 4, g = a.group;
    const int64_t row = (int64_t)blockIdx.x * a.q_heads + blockIdx.y * g;
    const float scale_log2 = a.scale * FSA_LOG2E;
    uint32_t rows[D / 16][4];
    v2_load_rows<T, D>(rows, q + row * D, g);
    float acc[D / 8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0}, factor[2];
    V2SliceIterator<T, D> for_each_slice(a, k, v, smem_address(smem));
    for_each_slice([&](uint32_t k_tile, uint32_t v_tile, int keys) {
        float s[2][4], old[2] = {row_max[0], row_max[1]};
        v2_matmul_nt<T, D>(s, rows, k_tile);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &x = s[i / 4][i % 4];
            x = i / 4 * 8 + 2 * c + i % 2 < keys ? x * scale_log2 : -INFINITY;
            row_max[i % 4 / 2] = fmaxf(row_max[i % 4 / 2], x);
        }
        for (int i = 0; i < 2; i++) row_max[i] = quad_reduce_max(row_max[i]);
        if (__any_sync(0xffffffffu, row_max[0] > old[0] || row_max[1] > old[1])) {
            float rescale[2] = {exp2_fast(old[0] - row_max[0]), exp2_fast(old[1] - row_max[1])};
            for (int i = 0; i < 2; i++) row_sum[i] *= rescale[i];
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                for (int i = 0; i < 4; i++) acc[n][i] *= rescale[i / 2];
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &x = s[i / 4][i % 4];
            x = exp2_fast(x - row_max[i % 4 / 2]);
            row_sum[i % 4 / 2] += x;
        }
        v2_matmul_nn<T, D>(acc, s, v_tile);
    });
    for (int i = 0; i < 2; i++) {
        row_sum[i] = quad_reduce_sum(row_sum[i]);
        if (c == 0)
            warp_row_max[warp][quad + 8 * i] = row_max[i], warp_row_sum[warp][quad + 8 * i] = row_sum[i];
    }
    __syncthreads();
    for (int i = 0; i < 2; i++) {
        int r = quad + 8 * i;
        float m = -INFINITY, total = 0;
        for (int w = 0; w < 4; w++) m = fmaxf(m, warp_row_max[w][r]);
        for (int w = 0; w < 4; w++)
            total +=
                warp_row_max[w][r] == -INFINITY ? 0 : exp2_fast(warp_row_max[w][r] - m) * warp_row_sum[w][r];
        factor[i] = row_max[i] == -INFINITY ? 0 : exp2_fast(row_max[i] - m) / total;
        if (warp == 0 && c == 0 && r < g) lse[row + r] = total > 0 ? (m + log2f(total)) * FSA_LN2 : -INFINITY;
    }
    v2_combine_warps<T, D>((float *)smem, acc, factor, o + row * D, g);
}

template <typename T, int D>
__global__ void __launch_bounds__(128, 3)
    selected_v2_dq_kernel(VersionParams a, const T *q, const T *k, const T *v, const T *dout, T *dq) {
    extern __shared__ __align__(128) char smem[];
    const int quad = threadIdx.x % 32 / 4, c = threadIdx.x % 4, g = a.group;
    const int64_t row = (int64_t)blockIdx.x * a.q_heads + blockIdx.y * g;
    const float scale_log2 = a.scale * FSA_LOG2E;
    uint32_t q_rows[D / 16][4], dout_rows[D / 16][4];
    v2_load_rows<T, D>(q_rows, q + row * D, g);
    v2_load_rows<T, D>(dout_rows, dout + row * D, g);
    float acc[D / 8][4] = {}, lse_log2[2], delta[2];
    for (int i = 0; i < 2; i++) {
        bool valid = quad + 8 * i < g;
        lse_log2[i] = valid ? a.lse[row + quad + 8 * i] * FSA_LOG2E : INFINITY;
        delta[i] = valid ? a.delta[row + quad + 8 * i] : 0;
    }
    V2SliceIterator<T, D> for_each_slice(a, k, v, smem_address(smem));
    for_each_slice([&](uint32_t k_tile, uint32_t v_tile, int keys) {
        float s[2][4], dp[2][4];
        v2_matmul_nt<T, D>(s, q_rows, k_tile);
        v2_matmul_nt<T, D>(dp, dout_rows, v_tile);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &x = s[i / 4][i % 4];
            bool visible = i / 4 * 8 + 2 * c + i % 2 < keys;
            float p = visible ? exp2_fast(x * scale_log2 - lse_log2[i % 4 / 2]) : 0;
            x = p * (dp[i / 4][i % 4] - delta[i % 4 / 2]);
        }
        v2_matmul_nn<T, D>(acc, s, k_tile);
    });
    const float factor[2] = {a.scale, a.scale};
    v2_combine_warps<T, D>((float *)smem, acc, factor, dq + row * D, g);
}

// ---- KV blocks outside --------------------------------------------------------------------------------
// A thread block's work: one key tile of a KV block (at most 64 keys), and the rows begin .. end - 1 of the
// block's query list (g rows per entry), at most WORK_ROWS.
enum { WORK_ROWS = 4096 };
struct WorkItem {
    const uint32_t *entries;
    int64_t first_key, key_row;         // of the key tile: position in the sequence, row in k and v
    int num_keys, key_tile, begin, end; // begin >= end: no work
};
__device__ __forceinline__ WorkItem work_item_of(const VersionParams &a) {
    WorkItem work;
    const uint32_t *offsets = a.lists.offsets + a.kv_head * (a.lists.max_blocks + 1);
    int64_t block = blockIdx.x / a.key_tiles;
    work.key_tile = blockIdx.x % a.key_tiles;
    work.begin = work.end = 0;
    if (block >= a.batch.cu_blocks[a.batch.num_seqs]) return work;
    int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, block);
    work.first_key = (block - a.batch.cu_blocks[seq]) * a.block + work.key_tile * 64;
    work.key_row = a.batch.cu_seqlens[seq] + work.first_key;
    work.num_keys =
        (int)min((int64_t)min(64, a.block - work.key_tile * 64), a.batch.cu_seqlens[seq + 1] - work.key_row);
    if (work.num_keys <= 0) return work;
    work.entries = a.lists.entries + a.kv_head * a.batch.nq * a.topk + offsets[block];
    work.begin = blockIdx.y * WORK_ROWS;
    work.end = min((int)(offsets[block + 1] - offsets[block]) * a.group, work.begin + WORK_ROWS);
    return work;
}
// Returns the last key that a query sees, within the key tile; -1 if it sees none.
__device__ __forceinline__ int last_visible_key(const VersionParams &a, const WorkItem &work, int64_t query) {
    int64_t seq, pos;
    query_position(a.batch, query, &seq, &pos);
    return (int)min((int64_t)work.num_keys - 1, max(pos - work.first_key, (int64_t)-1));
}
template <int D, typename T>
__device__ __forceinline__ void load_kv_tile(const VersionParams &a, const WorkItem &work, uint32_t tile,
                                             const T *x) {
    load_tile<64, D, 128>(tile, x + (work.key_row * a.kv_heads + a.kv_head) * D, (int64_t)a.kv_heads * D,
                          work.num_keys);
}

// ---- version 3 --------------------------------------------------------------------------------------
// FSA as in its paper, one KV head at a time. A statistics kernel (LSE_PASS) computes Q K^T for the lse of
// each row. A main kernel computes Q K^T again and writes o_partial rows, which a third kernel adds. A warp
// processes 16 rows of the query list at a time, the next ones in flight.
//
// Lower bound for 64K tokens, 32 heads, T = 16, d = 128: q in twice, partial rows out and in, 8.6 GB each at
// 4.5 TB/s, 7.6 ms.
template <typename T, int D, bool LSE_PASS>
__global__ void __launch_bounds__(128)
    selected_v3_kernel(VersionParams a, const T *q, const T *k, const T *v) {
    constexpr int CHUNKS = D / 8, TILE = 16 * D * 2;
    extern __shared__ __align__(128) char smem[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, c = lane % 4, g = a.group;
    const uint32_t k_base = smem_address(smem), v_base = k_base + 64 * D * 2;
    char *my_tiles = smem + (LSE_PASS ? 1 : 2) * 64 * D * 2 + warp * 2 * TILE;
    const uint32_t q_base = smem_address(my_tiles);
    const float scale_log2 = a.scale * FSA_LOG2E;
    const WorkItem work = work_item_of(a);
    if (work.begin >= work.end) return;
    const int tiles = (work.end + 15) / 16, tile0 = work.begin / 16 + warp;
    load_kv_tile<D>(a, work, k_base, k);
    if (!LSE_PASS) load_kv_tile<D>(a, work, v_base, v);
    cp_async_commit();

    // Lane i holds the entry of row i % 16 of a tile.
    auto entry_of = [&](int tile) { return work.entries[min(tile * 16 + lane % 16, work.end - 1) / g]; };
    auto gather = [&](int tile, uint32_t entry, int stage) {
#pragma unroll
        for (int i = lane; i < 16 * CHUNKS; i += 32) {
            int r = i / CHUNKS, chunk = i % CHUNKS;
            int64_t query = __shfl_sync(0xffffffffu, entry, r) / (uint32_t)a.topk;
            int64_t row = query * a.q_heads + a.kv_head * g + min(tile * 16 + r, work.end - 1) % g;
            cp_async_16(q_base + stage * TILE + swizzled<D>(r, chunk), q + row * D + chunk * 8);
        }
        cp_async_commit();
    };
    uint32_t entry = entry_of(tile0), next_entry = entry_of(tile0 + 4);
    gather(tile0, entry, 0);
    cp_async_wait<1>(); // K and V
    __syncthreads();
    for (int tile = tile0, stage = 0; tile < tiles; tile += 4, stage ^= 1) {
        gather(tile + 4, next_entry, stage ^ 1); // past the last tile: the last row again
        uint32_t later_entry = entry_of(tile + 8);
        cp_async_wait<1>();
        __syncwarp();
        int limit[2];
        int64_t partial_row[2]; // -1: padding
        float base[2];
        for (int i = 0; i < 2; i++) {
            int r = tile * 16 + quad + 8 * i, in_group = min(r, work.end - 1) % g;
            int64_t e = __shfl_sync(0xffffffffu, entry, quad + 8 * i), query = e / a.topk;
            limit[i] = last_visible_key(a, work, query);
            partial_row[i] = r < work.end ? (e * a.key_tiles + work.key_tile) * g + in_group : -1;
            base[i] = LSE_PASS ? -INFINITY : a.row_lse[query * g + in_group];
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
                bool visible = n * 8 + 2 * c + i % 2 <= limit[i / 2];
                s[n][i] = visible ? s[n][i] * scale_log2 : -INFINITY;
                if (LSE_PASS) base[i / 2] = fmaxf(base[i / 2], s[n][i]);
            }
        }
        if constexpr (LSE_PASS) {
            for (int i = 0; i < 2; i++) {
                base[i] = quad_reduce_max(base[i]);
                float row_sum = 0;
#pragma unroll
                for (int n = 0; n < 8; n++)
                    row_sum += exp2_fast(s[n][2 * i] - base[i]) + exp2_fast(s[n][2 * i + 1] - base[i]);
                row_sum = quad_reduce_sum(row_sum);
                if (c == 0 && partial_row[i] >= 0) a.lse_partial[partial_row[i]] = base[i] + log2f(row_sum);
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
            // Store through shared memory (the q tile), so that each row is written contiguously.
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
                int64_t low = __shfl_sync(0xffffffffu, partial_row[0], r % 8 * 4),
                        high = __shfl_sync(0xffffffffu, partial_row[1], r % 8 * 4), row = r < 8 ? low : high;
                if (row >= 0)
                    ((uint4 *)((T *)a.partial + row * D))[chunk] = *(uint4 *)(out + swizzled<D>(r, chunk));
            }
        }
        __syncwarp(); // all lanes have finished with this stage
        entry = next_entry, next_entry = later_entry;
    }
    cp_async_wait<0>();
}

// Calls f(partial) for every (slot, key tile) that a query sees. The partial rows of (slot, key tile) are
// partial * g .. partial * g + g - 1.
template <typename F>
__device__ __forceinline__ void v3_for_each_partial(const VersionParams &a, int64_t query, F f) {
    int64_t seq, pos;
    query_position(a.batch, query, &seq, &pos);
    for (int t = 0; t < a.topk; t++) {
        int64_t index = a.block_indices[(a.kv_head * a.batch.nq + query) * a.topk + t];
        for (int key_tile = 0; key_tile < a.key_tiles && index >= 0 && index * a.block + key_tile * 64 <= pos;
             key_tile++)
            f((query * a.topk + t) * a.key_tiles + key_tile);
    }
}

// Computes the lse of each row from lse_partial. One thread per row.
static __global__ void selected_v3_row_lse_kernel(VersionParams a, float *lse) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x, query = i / a.group;
    if (query >= a.batch.nq) return;
    int r = (int)(i % a.group);
    float row_max = -INFINITY, row_sum = 0;
    v3_for_each_partial(
        a, query, [&](int64_t partial) { row_max = fmaxf(row_max, a.lse_partial[partial * a.group + r]); });
    v3_for_each_partial(
        a, query, [&](int64_t partial) { row_sum += exp2f(a.lse_partial[partial * a.group + r] - row_max); });
    a.row_lse[i] = row_max + log2f(row_sum);
    lse[query * a.q_heads + a.kv_head * a.group + r] = a.row_lse[i] * FSA_LN2;
}

// Adds the o_partial or dq_partial rows of each row. One thread per eight channels of a row.
template <typename T, int D> __global__ void selected_v3_combine_kernel(VersionParams a, T *out) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x, row = i / (D / 8), query = row / a.group;
    if (query >= a.batch.nq) return;
    int r = (int)(row % a.group);
    float acc[8] = {};
    v3_for_each_partial(a, query, [&](int64_t partial) {
        uint4 x = ((const uint4 *)((const T *)a.partial + (partial * a.group + r) * D))[i % (D / 8)];
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
        for (int j = 0; j < 4; j++) {
            float2 f = unpack2<T>(words[j]);
            acc[2 * j] += f.x;
            acc[2 * j + 1] += f.y;
        }
    });
    uint4 *out_row = (uint4 *)(out + (query * a.q_heads + a.kv_head * a.group + r) * D);
    out_row[i % (D / 8)] = make_uint4(pack2<T>(acc[0], acc[1]), pack2<T>(acc[2], acc[3]),
                                      pack2<T>(acc[4], acc[5]), pack2<T>(acc[6], acc[7]));
}

// ---- versions 2 and 3, backward ----------------------------------------------------------------------- KV
// blocks outside. dK and dV of 64 keys stay in registers, 16 keys per warp. The rows of q and dO in the
// block's query list are loaded 32 at a time, the next ones in flight. P^T and dS^T of a warp's keys are the
// A operands of dV += P^T dO and dK / scale += dS^T Q. With DQ (version 3), dQ = scale dS K is stored as
// dq_partial rows. Without DQ (version 2), selected_v2_dq_kernel computes dQ. Several thread blocks share a
// list of more than WORK_ROWS rows, so dK and dV are added by atomics.
template <typename T, int D, bool DQ>
__global__ void __launch_bounds__(128, 2)
    selected_kv_backward_kernel(VersionParams a, const T *q, const T *k, const T *v, const T *dout) {
    constexpr int CHUNKS = D / 8, KV_TILE = 64 * D * 2, ROW_TILE = 32 * D * 2;
    extern __shared__ __align__(128) char smem[];
    // For the rows of three tiles: query * q_heads + head, partial row, lse in base 2, delta, and the last
    // visible key within the key tile (-1: padding).
    __shared__ int64_t tile_row[3][32], tile_partial[3][32];
    __shared__ float tile_lse[3][32], tile_delta[3][32];
    __shared__ int tile_limit[3][32];
    const int tid = threadIdx.x, warp = tid / 32, quad = tid % 32 / 4, c = tid % 4, g = a.group;
    const uint32_t k_tile = smem_address(smem), v_tile = k_tile + KV_TILE, ds_base = v_tile + KV_TILE,
                   stages = ds_base + 64 * 64 * 2;
    char *ds_tile = smem + 2 * KV_TILE, *stage_tiles = ds_tile + 64 * 64 * 2; // dS^T: keys x 32 rows
    const float scale_log2 = a.scale * FSA_LOG2E;
    const WorkItem work = work_item_of(a);
    if (work.begin >= work.end) return;
    const int tiles = (work.end - work.begin + 31) / 32;

    uint32_t entry = 0; // threads 0 to 31: of row tid of the tile that load_meta loads next
    auto load_entry = [&](int tile) {
        entry = work.entries[min(work.begin + tile * 32 + tid, work.end - 1) / g];
    };
    auto load_meta = [&](int tile) {
        int r = work.begin + tile * 32 + tid, in_group = min(r, work.end - 1) % g, slot = tile % 3;
        int64_t e = entry, query = e / a.topk, row = query * a.q_heads + a.kv_head * g + in_group;
        load_entry(tile + 1);
        tile_row[slot][tid] = row;
        tile_partial[slot][tid] = (e * a.key_tiles + work.key_tile) * g + in_group;
        tile_lse[slot][tid] = a.lse[row] * FSA_LOG2E;
        tile_delta[slot][tid] = a.delta[row];
        tile_limit[slot][tid] = r < work.end ? last_visible_key(a, work, query) : -1;
    };
    auto gather = [&](int tile) {
        uint32_t dest = stages + tile % 2 * 2 * ROW_TILE;
#pragma unroll
        for (int i = tid; i < 32 * CHUNKS; i += 128) {
            int r = i / CHUNKS, chunk = i % CHUNKS;
            int64_t source = tile_row[tile % 3][r] * D + chunk * 8;
            cp_async_16(dest + swizzled<D>(r, chunk), q + source);
            cp_async_16(dest + ROW_TILE + swizzled<D>(r, chunk), dout + source);
        }
        cp_async_commit();
    };
    load_kv_tile<D>(a, work, k_tile, k);
    load_kv_tile<D>(a, work, v_tile, v);
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
        const int slot = tile % 3;
        const uint32_t q_tile = stages + tile % 2 * 2 * ROW_TILE, do_tile = q_tile + ROW_TILE;
        float s[4][4] = {}, dp[4][4] = {}; // keys x rows
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t left_k[4], left_v[4], b[4];
            load_a<D>(left_k, k_tile, warp * 16, kk);
            load_a<D>(left_v, v_tile, warp * 16, kk);
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                load_b<D>(b, q_tile, n * 8, kk);
                mma_16816<T>(s[n], left_k, b[0], b[1]);
                mma_16816<T>(s[n + 1], left_k, b[2], b[3]);
                load_b<D>(b, do_tile, n * 8, kk);
                mma_16816<T>(dp[n], left_v, b[0], b[1]);
                mma_16816<T>(dp[n + 1], left_v, b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            for (int i = 0; i < 4; i++) {
                int r = n * 8 + 2 * c + i % 2;
                bool visible = warp * 16 + quad + i / 2 * 8 <= tile_limit[slot][r];
                s[n][i] = visible ? exp2_fast(s[n][i] * scale_log2 - tile_lse[slot][r]) : 0;
                dp[n][i] = s[n][i] * (dp[n][i] - tile_delta[slot][r]);
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
                load_b_trans<D>(b, do_tile, kk * 16, n / 2);
                mma_16816<T>(dv[n], p, b[0], b[1]);
                mma_16816<T>(dv[n + 1], p, b[2], b[3]);
                load_b_trans<D>(b, q_tile, kk * 16, n / 2);
                mma_16816<T>(dk[n], ds, b[0], b[1]);
                mma_16816<T>(dk[n + 1], ds, b[2], b[3]);
            }
        }
        if constexpr (DQ) { // rows 16*wm.., columns D/2*wn..
            const int wm = warp % 2, wn = warp / 2;
            char *out = stage_tiles + tile % 2 * 2 * ROW_TILE;
            float dq[D / 16][4] = {};
            __syncthreads(); // dS is complete, and q is no longer needed
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                uint32_t left[4], b[4];
                load_a_trans<64>(left, ds_base, kk * 16, wm);
#pragma unroll
                for (int n = 0; n < D / 16; n += 2) {
                    load_b_trans<D>(b, k_tile, kk * 16, wn * (D / 32) + n / 2);
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
                if (work.begin + tile * 32 + r < work.end)
                    ((uint4 *)((T *)a.partial + tile_partial[slot][r] * D))[chunk] =
                        *(uint4 *)(out + swizzled<D>(r, chunk));
            }
        }
        if (tid < 32) load_meta(tile + 2);
    }
    for (int i = 0; i < 4; i++) {
        int key = warp * 16 + quad + i / 2 * 8;
        if (key >= work.num_keys) continue;
        int64_t offset = ((work.key_row + key) * a.kv_heads + a.kv_head) * D + 2 * c + i % 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            atomicAdd(a.dk_accum + offset + n * 8, dk[n][i] * a.scale);
            atomicAdd(a.dv_accum + offset + n * 8, dv[n][i]);
        }
    }
}

template <typename T> __global__ void selected_convert_kernel(const float *x, T *y, int64_t n) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i < n) y[i] = (T)x[i];
}

// Runs one of the versions, with its own device memory.
template <typename T, int D> struct Versions {
    const FsaConfig &c;
    const int version;
    VersionParams a;
    Buffer<char> lists_memory, lists_scratch;
    Buffer<T> partial;
    Buffer<float> lse_partial, row_lse, delta, lse_bwd, dk_accum, dv_accum;
    Versions(const FsaConfig &config, const BatchLayout &p, int version_number)
        : c(config), version(version_number), lists_memory((int64_t)fsa_query_lists_bytes(&c, &p, p.nq)),
          lists_scratch((int64_t)fsa_query_lists_scratch_bytes(&c, &p, p.nq)),
          partial(version == 3 ? num_partials(p) * D : 0), lse_partial(version == 3 ? num_partials(p) : 0),
          row_lse(p.nq * (c.q_heads / c.kv_heads)), delta(p.nq * c.q_heads), lse_bwd(p.nq * c.q_heads),
          dk_accum(p.n * c.kv_heads * D), dv_accum(p.n * c.kv_heads * D) {
        memset(&a, 0, sizeof a);
        a.batch = p, a.q_heads = c.q_heads, a.kv_heads = c.kv_heads, a.group = c.q_heads / c.kv_heads;
        a.block = c.block, a.topk = c.topk, a.scale = softmax_scale(&c), a.key_tiles = (c.block + 63) / 64;
        a.lists = fsa_query_lists_at(&c, &p, p.nq, lists_memory.get());
        a.partial = partial.get(), a.lse_partial = lse_partial, a.row_lse = row_lse;
        a.delta = delta, a.dk_accum = dk_accum, a.dv_accum = dv_accum;
        const int v2 = 4 * V2SliceIterator<T, D>::WARP, kv = (64 + 4 * 2 * 16) * D * 2, backward = kv_smem();
        allow_smem(selected_v2_kernel<T, D>, v2);
        allow_smem(selected_v2_dq_kernel<T, D>, v2);
        allow_smem(selected_v3_kernel<T, D, true>, kv);
        allow_smem(selected_v3_kernel<T, D, false>, kv + 64 * D * 2);
        allow_smem(selected_kv_backward_kernel<T, D, true>, backward);
        allow_smem(selected_kv_backward_kernel<T, D, false>, backward);
    }
    int64_t num_partials(const BatchLayout &p) const {
        return p.nq * c.topk * ((c.block + 63) / 64) * (c.q_heads / c.kv_heads);
    }
    template <typename K> static void allow_smem(K kernel, int bytes) {
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    }
    static int kv_smem() { return (2 * 64 + 4 * 32) * D * 2 + 64 * 64 * 2; }
    dim3 kv_grid() const {
        int64_t rows = a.batch.nq * a.group;
        return dim3((unsigned)(a.lists.max_blocks * a.key_tiles),
                    (unsigned)((rows + WORK_ROWS - 1) / WORK_ROWS));
    }
    void combine(T *out) {
        int64_t threads = a.batch.nq * a.group * (D / 8);
        selected_v3_combine_kernel<T, D><<<(unsigned)((threads + 255) / 256), 256>>>(a, out);
    }

    void forward(const T *q, const T *k, const T *v, const int32_t *block_indices, T *o, float *lse) {
        a.block_indices = block_indices;
        int64_t nq = a.batch.nq;
        if (version == 1)
            selected_v1_kernel<T, D><<<(unsigned)((nq * a.q_heads + 3) / 4), 128>>>(a, q, k, v, o, lse);
        if (version == 2) {
            dim3 grid((unsigned)nq, a.kv_heads);
            selected_v2_kernel<T, D><<<grid, 128, 4 * V2SliceIterator<T, D>::WARP>>>(a, q, k, v, o, lse);
        }
        if (version == 3) {
            const int smem = (64 + 4 * 2 * 16) * D * 2;
            FSA_CHECK(fsa_query_lists(&c, &a.batch, block_indices, &a.lists, lists_scratch, 0));
            for (a.kv_head = 0; a.kv_head < a.kv_heads; a.kv_head++) {
                selected_v3_kernel<T, D, true><<<kv_grid(), 128, smem>>>(a, q, k, v);
                selected_v3_row_lse_kernel<<<(unsigned)((nq * a.group + 255) / 256), 256>>>(a, lse);
                selected_v3_kernel<T, D, false><<<kv_grid(), 128, smem + 64 * D * 2>>>(a, q, k, v);
                combine(o);
            }
        }
        CUDA_CHECK(cudaGetLastError());
    }
    // Must follow forward: version 3 uses its query lists.
    void backward(const T *q, const T *k, const T *v, const int32_t *block_indices, const T *o,
                  const float *lse, const T *dout, T *dq, T *dk, T *dv) {
        a.block_indices = block_indices, a.lse = lse;
        int64_t nq = a.batch.nq, size = dk_accum.n;
        FSA_CHECK(fsa_bwd_preprocess(&c, Dtype<T>::value, nq, packed_q(&c, o), lse, packed_q(&c, dout), delta,
                                     lse_bwd, 0));
        CUDA_CHECK(cudaMemsetAsync(dk_accum.get(), 0, size * sizeof(float)));
        CUDA_CHECK(cudaMemsetAsync(dv_accum.get(), 0, size * sizeof(float)));
        if (version == 1) {
            unsigned grid = (unsigned)((nq * a.q_heads + 3) / 4);
            selected_v1_backward_kernel<T, D><<<grid, 128>>>(a, q, k, v, dout, dq);
        }
        if (version == 2) {
            dim3 grid((unsigned)nq, a.kv_heads);
            selected_v2_dq_kernel<T, D><<<grid, 128, 4 * V2SliceIterator<T, D>::WARP>>>(a, q, k, v, dout, dq);
            FSA_CHECK(fsa_query_lists(&c, &a.batch, block_indices, &a.lists, lists_scratch, 0));
            for (a.kv_head = 0; a.kv_head < a.kv_heads; a.kv_head++)
                selected_kv_backward_kernel<T, D, false><<<kv_grid(), 128, kv_smem()>>>(a, q, k, v, dout);
        }
        for (a.kv_head = 0; a.kv_head < a.kv_heads && version == 3; a.kv_head++) {
            selected_kv_backward_kernel<T, D, true><<<kv_grid(), 128, kv_smem()>>>(a, q, k, v, dout);
            combine(dq);
        }
        selected_convert_kernel<T><<<(unsigned)((size + 255) / 256), 256>>>(dk_accum, dk, size);
        selected_convert_kernel<T><<<(unsigned)((size + 255) / 256), 256>>>(dv_accum, dv, size);
        CUDA_CHECK(cudaGetLastError());
    }
};
#endif
