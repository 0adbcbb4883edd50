// compress.cu: compresses windows of l tokens, one every s tokens, to one key and one value each; forward and
// backward, phi = mean and linear. The input keys are those before RoPE. The compressed key of window i is
// rotated at position s*i.
//
// phi = linear is one GEMM per KV head and per K or V: [windows, l*d] x [l*d, d]. Row i of the left operand
// is window i, tokens s*i .. s*i + l - 1. It is read in place; each token is read l/s times. The position
// embedding pe becomes a bias that all windows share: (x + pe) W = x W + pe W.
//
// Backward, with dy = the gradients of kc (after the inverse RoPE) and vc:
//   dx[token s*i + r] = sum over i of dy[i] W[r]^T       dW[r] = sum over i of (x[s*i + r] + pe[r])^T dy[i]
//   dpe[r] = W[r] (sum over i of dy[i])
// One thread block computes each sum in a fixed order, so the results are bitwise reproducible.
//
// Lower bounds for 64K tokens, (l, s) = (32, 16), 8 KV heads, d = 128, phi = linear, K and V:
//     forward, dx and dW: 69 GFLOP each (4*l*d*d per window and KV head)   0.09 ms each
#include "kernels.h"
#include "rope.cuh"
#include "launch.cuh"
#include "sm80/tile.cuh"

// Arrays of two are K's and V's.
struct CompressParams {
    BatchLayout batch;
    ConstRows in[2];            // k, v [N, Hkv, d]
    const void *weight[2], *pe; // phi = linear: wk, wv [Hkv, l*d, d]; pe [Hkv, l*d] or NULL
    const double *inv_freq;     // [d/2]; NULL: no RoPE
    int kv_heads, len, stride;  // len, stride: l, s
    void *out[2];               // kc, vc [M, Hkv, d]
    // Backward.
    const float *dout[2];             // dkc, dvc [M, Hkv, d]; dkc is the gradient of the rotated kc
    float *din[2], *dweight[2], *dpe; // gradients of in, weight and pe, fp32
    int accumulate;                   // 1: add to dv; 0: overwrite dv
    // Scratch.
    float *head_sums;        // [Hkv, d] forward: pe W; backward: sum of dkc (before RoPE) over all windows
    void *dout_unrotated[2]; // backward: dout with the inverse RoPE on dkc; 16-bit (linear) or fp32 (mean)
};

// -------------------------------------------------------------------------------------------------
// Forward

// head_sums[h] = pe[h] W[h], [l*d] x [l*d, d], the bias of kc. A thread block computes one KV head. It
// divides the rows of W into 1024/D splits, and split i has rows i, i + 1024/D, ... The sums of the splits
// are added in order. Reads W once, 2*l*d*d bytes per KV head. Limited by latency.
template <typename T, int D>
__global__ void __launch_bounds__(1024) compress_bias_kernel(const CompressParams p) {
    constexpr int SPLITS = 1024 / D;
    __shared__ float sums[SPLITS][D];
    int kv_head = blockIdx.x, column = threadIdx.x % D, split = threadIdx.x / D, rows = p.len * D;
    float sum = 0;
    if (p.pe) {
        const T *w = (const T *)p.weight[0] + (int64_t)kv_head * rows * D,
                *pe = (const T *)p.pe + (int64_t)kv_head * rows;
#pragma unroll 8
        for (int row = split; row < rows; row += SPLITS)
            sum += to_f32(pe[row]) * to_f32(w[(int64_t)row * D + column]);
    }
    sums[split][column] = sum;
    __syncthreads();
    if (split != 0) return;
    for (int i = 1; i < SPLITS; i++) sum += sums[i][column];
    p.head_sums[kv_head * D + column] = sum;
}

// kc or vc for phi = linear. A thread block computes a 128 x d tile of one GEMM: 128 windows of one KV head
// (grid y), K or V (grid z). Each of four warps computes 32 windows. The k loop over l*d has steps of 64
// channels with two shared-memory stages, loaded by cp.async. The epilogue adds the bias and applies RoPE.
// Reads k and v once from HBM and l/s times from L2, and W once from HBM and once per 128 windows from L2.
// Limited by the FLOPs.
template <typename T, int D>
__global__ void __launch_bounds__(128, 2) compress_linear_kernel(const CompressParams p) {
    constexpr int TILE_M = 128, TILE_K = 64, A_BYTES = TILE_M * TILE_K * 2, B_BYTES = TILE_K * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t tile_a = smem_address(shared), tile_b = tile_a + 2 * A_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y,
        kv = blockIdx.z; // kv: 0 K, 1 V
    RowTile tile = find_row_tile(p.batch.cu_windows, p.batch.num_seqs, TILE_M, blockIdx.x);
    if (tile.rows == 0) return;

    const int64_t in_stride = p.in[kv].stride;
    const T *x = (const T *)p.in[kv].data +
                 (p.batch.cu_seqlens[tile.cu_index] + (int64_t)tile.first * p.stride) * in_stride +
                 kv_head * D;
    const T *w = (const T *)p.weight[kv] + (int64_t)kv_head * p.len * D * D;
    auto load_tiles = [&](int k0, int stage) { // columns k0 .. k0 + 63 of the l*d
        load_tile<TILE_M, TILE_K, 128>(tile_a + stage * A_BYTES, x + k0 / D * in_stride + k0 % D,
                                       p.stride * in_stride, tile.rows);
        load_tile<TILE_K, D, 128>(tile_b + stage * B_BYTES, w + (int64_t)k0 * D, D, TILE_K);
    };
    load_tiles(0, 0);
    cp_async_commit();
    float acc[2][D / 8][4] = {};
    int gemm_k = p.len * D, stage = 0;
    for (int k0 = 0; k0 < gemm_k; k0 += TILE_K, stage ^= 1) {
        if (k0 + TILE_K < gemm_k) load_tiles(k0 + TILE_K, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < TILE_K / 16; kk++) {
            uint32_t a[2][4];
            load_a<TILE_K>(a[0], tile_a + stage * A_BYTES, warp * 32, kk);
            load_a<TILE_K>(a[1], tile_a + stage * A_BYTES, warp * 32 + 16, kk);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tile_b + stage * B_BYTES, kk * 16, n);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_16816<T>(acc[m][2 * n], a[m], b[0], b[1]);
                    mma_16816<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();

    // Epilogue: a lane holds channels c and c + D/2 of its rows, the pair that RoPE rotates.
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp * 32 + m * 16 + half * 8 + lane / 4;
            if (row >= tile.rows) continue;
            T *out = (T *)p.out[kv] + ((tile.row + row) * p.kv_heads + kv_head) * D;
            int64_t position = (int64_t)(tile.first + row) * p.stride;
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                float lo[2], hi[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int c = n * 8 + lane % 4 * 2 + e;
                    lo[e] = acc[m][n][half * 2 + e];
                    hi[e] = acc[m][n + D / 16][half * 2 + e];
                    if (kv == 0) {
                        lo[e] += p.head_sums[kv_head * D + c];
                        hi[e] += p.head_sums[kv_head * D + c + D / 2];
                        if (p.inv_freq) {
                            float2 cs = rope_cos_sin(position, p.inv_freq[c]);
                            float a = lo[e], b = hi[e];
                            lo[e] = a * cs.x - b * cs.y;
                            hi[e] = b * cs.x + a * cs.y;
                        }
                    }
                }
                *(uint32_t *)(out + n * 8 + lane % 4 * 2) = pack2<T>(lo[0], lo[1]);
                *(uint32_t *)(out + n * 8 + lane % 4 * 2 + D / 2) = pack2<T>(hi[0], hi[1]);
            }
        }
    }
}

// kc and vc for phi = mean. A thread averages channels c and c + D/2 of one window, for K and for V. k and v
// are read once from HBM and l/s times from L2. Memory-bound.
template <typename T, int D>
__global__ void __launch_bounds__(256) compress_mean_kernel(const CompressParams p) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x, window = i / (D / 2) / p.kv_heads;
    if (window >= p.batch.cu_windows[p.batch.num_seqs]) return;
    int c = i % (D / 2), kv_head = (int)(i / (D / 2) % p.kv_heads);
    int64_t seq = find_in_cu(p.batch.cu_windows, p.batch.num_seqs, window);
    int64_t start = (window - p.batch.cu_windows[seq]) * p.stride,
            out = (window * p.kv_heads + kv_head) * D + c;
    for (int kv = 0; kv < 2; kv++) {
        const int64_t in_stride = p.in[kv].stride;
        const T *x =
            (const T *)p.in[kv].data + (p.batch.cu_seqlens[seq] + start) * in_stride + kv_head * D + c;
        float lo = 0, hi = 0;
        for (int r = 0; r < p.len; r++) {
            lo += to_f32(x[r * in_stride]);
            hi += to_f32(x[r * in_stride + D / 2]);
        }
        lo /= p.len;
        hi /= p.len;
        if (kv == 0 && p.inv_freq) {
            float2 cs = rope_cos_sin(start, p.inv_freq[c]);
            float a = lo, b = hi;
            lo = a * cs.x - b * cs.y;
            hi = b * cs.x + a * cs.y;
        }
        ((T *)p.out[kv])[out] = (T)lo;
        ((T *)p.out[kv])[out + D / 2] = (T)hi;
    }
}

// -------------------------------------------------------------------------------------------------
// Backward

// dout_unrotated = dout, with the inverse RoPE applied to dkc. A thread handles channels c and c + D/2 of one
// window, for K and for V. Memory-bound.
template <typename Out, int D>
__global__ void __launch_bounds__(256) compress_inverse_rope_kernel(const CompressParams p) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x, window = i / (D / 2) / p.kv_heads;
    if (window >= p.batch.cu_windows[p.batch.num_seqs]) return;
    int c = i % (D / 2), kv_head = (int)(i / (D / 2) % p.kv_heads);
    int64_t seq = find_in_cu(p.batch.cu_windows, p.batch.num_seqs, window);
    int64_t start = (window - p.batch.cu_windows[seq]) * p.stride,
            offset = (window * p.kv_heads + kv_head) * D + c;
    for (int kv = 0; kv < 2; kv++) {
        float lo = p.dout[kv][offset], hi = p.dout[kv][offset + D / 2];
        if (kv == 0 && p.inv_freq) {
            float2 cs = rope_cos_sin(start, p.inv_freq[c]);
            float a = lo, b = hi;
            lo = a * cs.x + b * cs.y;
            hi = b * cs.x - a * cs.y;
        }
        ((Out *)p.dout_unrotated[kv])[offset] = (Out)lo;
        ((Out *)p.dout_unrotated[kv])[offset + D / 2] = (Out)hi;
    }
}

// dk and dv for phi = mean: the sum of dout_unrotated / l over the windows that contain the token. A thread
// handles four channels of one token, for K and for V. dk and dv are written in fp32, and dout_unrotated is
// read l/s times from L2. Memory-bound.
template <int D>
__global__ void __launch_bounds__(256) compress_mean_backward_kernel(const CompressParams p) {
    int token_stride = p.kv_heads * D;
    int64_t offset = (blockIdx.x * 256ll + threadIdx.x) * 4, token = offset / token_stride;
    if (token >= p.batch.n) return;
    int64_t seq = find_in_cu(p.batch.cu_seqlens, p.batch.num_seqs, token), window0 = p.batch.cu_windows[seq];
    int t = (int)(token - p.batch.cu_seqlens[seq]), windows = (int)(p.batch.cu_windows[seq + 1] - window0);
    int first = t < p.len ? 0 : (t - p.len) / p.stride + 1, last = min(t / p.stride, windows - 1);
    for (int kv = 0; kv < 2; kv++) {
        float4 sum = make_float4(0, 0, 0, 0), *out = (float4 *)(p.din[kv] + offset);
        for (int i = first; i <= last; i++) {
            float4 x = *(const float4 *)((const float *)p.dout_unrotated[kv] + (window0 + i) * token_stride +
                                         offset - token * token_stride);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        float4 old = kv && p.accumulate ? *out : make_float4(0, 0, 0, 0);
        *out = make_float4(old.x + sum.x / p.len, old.y + sum.y / p.len, old.z + sum.z / p.len,
                           old.w + sum.w / p.len);
    }
}

// dk or dv for phi = linear. Token s*c + r0 is number r0 of stride c (s tokens). Its gradient is
//   sum over a = 0 .. l/s - 1 of dy[window c - a] W[a*s + r0]^T
// A thread block computes a 128 x d tile: token r0 of each of 128 strides, of one KV head (grid y), K or V
// (grid z). Grid x has all tiles of r0 = 0, then all tiles of r0 = 1, and so on. Each of four warps computes
// 32 tokens. The k loop over l/s*d has steps of 64 channels with two shared-memory stages. Writes dk and dv
// in fp32; reads dy and W from L2. Limited by the FLOPs.
template <typename T, int D>
__global__ void __launch_bounds__(128, 2) compress_dinput_kernel(const CompressParams p) {
    constexpr int TILE_M = 128, TILE_K = 64, A_BYTES = TILE_M * TILE_K * 2, B_BYTES = TILE_K * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t tile_a = smem_address(shared), tile_b = tile_a + 2 * A_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int tiles = gridDim.x / p.stride, r0 = blockIdx.x / tiles, kv_head = blockIdx.y, kv = blockIdx.z;
    RowTile tokens =
        find_row_tile(p.batch.cu_seqlens, p.batch.num_seqs, TILE_M * p.stride, blockIdx.x % tiles);
    if (tokens.rows == 0) return;
    int stride0 = tokens.first / p.stride;
    int64_t token_stride = (int64_t)p.kv_heads * D, window0 = p.batch.cu_windows[tokens.cu_index];
    int windows = (int)(p.batch.cu_windows[tokens.cu_index + 1] - window0);
    const T *dy = (const T *)p.dout_unrotated[kv] + window0 * token_stride + kv_head * D;
    const T *w = (const T *)p.weight[kv] + (int64_t)kv_head * p.len * D * D;

    auto load_tiles = [&](int k0, int stage) { // k0 = a*D + channel
        int window = stride0 - k0 / D;         // c - a of the tile's first row
#pragma unroll
        for (int i = 0; i < TILE_M * TILE_K / 8 / 128; i++) {
            int row = (i * 128 + threadIdx.x) / (TILE_K / 8), chunk = threadIdx.x % (TILE_K / 8);
            bool valid = window + row >= 0 && window + row < windows;
            const T *from =
                valid ? dy + (window + row) * token_stride + k0 % D + chunk * 8 : (const T *)p.weight[kv];
            cp_async_16(tile_a + stage * A_BYTES + swizzled<TILE_K>(row, chunk), from, valid);
        }
        load_tile<D, TILE_K, 128>(tile_b + stage * B_BYTES,
                                  w + (int64_t)(k0 / D * p.stride + r0) * D * D + k0 % D, D, D);
    };
    load_tiles(0, 0);
    cp_async_commit();
    float acc[2][D / 8][4] = {};
    int gemm_k = p.len / p.stride * D, stage = 0;
    for (int k0 = 0; k0 < gemm_k; k0 += TILE_K, stage ^= 1) {
        if (k0 + TILE_K < gemm_k) load_tiles(k0 + TILE_K, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < TILE_K / 16; kk++) {
            uint32_t a[2][4];
            load_a<TILE_K>(a[0], tile_a + stage * A_BYTES, warp * 32, kk);
            load_a<TILE_K>(a[1], tile_a + stage * A_BYTES, warp * 32 + 16, kk);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b<TILE_K>(b, tile_b + stage * B_BYTES, n * 16, kk);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_16816<T>(acc[m][2 * n], a[m], b[0], b[1]);
                    mma_16816<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = (warp * 32 + m * 16 + half * 8 + lane / 4) * p.stride + r0;
            if (t >= tokens.rows) continue;
            float *out = p.din[kv] + (tokens.row + t) * token_stride + kv_head * D + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                float2 x = make_float2(acc[m][n][half * 2], acc[m][n][half * 2 + 1]),
                       *at = (float2 *)(out + n * 8);
                if (kv && p.accumulate) {
                    float2 old = *at;
                    x.x += old.x, x.y += old.y;
                }
                *at = x;
            }
        }
    }
}

// head_sums[h] = the sum of dkc (before RoPE) over all windows, which dpe and the pe term of dW need. A
// thread block computes one KV head. It divides the windows into 1024/D splits, and split i has windows i, i
// + 1024/D, ... The sums of the splits are added in order. Reads 2*d bytes per window and KV head. Limited
// by latency.
template <typename T, int D>
__global__ void __launch_bounds__(1024) compress_sum_dkc_kernel(const CompressParams p) {
    constexpr int SPLITS = 1024 / D;
    __shared__ float sums[SPLITS][D];
    int kv_head = blockIdx.x, column = threadIdx.x % D, split = threadIdx.x / D;
    int64_t windows = p.batch.cu_windows[p.batch.num_seqs];
    float sum = 0;
#pragma unroll 8
    for (int64_t i = split; i < windows; i += SPLITS) {
        sum += to_f32(((const T *)p.dout_unrotated[0])[(i * p.kv_heads + kv_head) * D + column]);
    }
    sums[split][column] = sum;
    __syncthreads();
    if (split != 0) return;
    for (int i = 1; i < SPLITS; i++) sum += sums[i][column];
    p.head_sums[kv_head * D + column] = sum;
}

// dpe[h, row] += <W[h, row], head_sums[h]>. A warp computes one row of W. Reads W once. Memory-bound.
template <typename T, int D>
__global__ void __launch_bounds__(256) compress_dpe_kernel(const CompressParams p) {
    int64_t row = blockIdx.x * 8ll + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (row >= (int64_t)p.kv_heads * p.len * D) return;
    const float *dkc_sum = p.head_sums + row / (p.len * D) * D;
    float sum = 0;
    for (int i = lane; i < D; i += 32) sum += to_f32(((const T *)p.weight[0])[row * D + i]) * dkc_sum[i];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) p.dpe[row] += sum;
}

// dW for phi = linear. A thread block computes the d x d tile of one r (grid x), KV head (grid y), and K or V
// (grid z): dW[r] += sum over all windows i of (x[s*i + r] + pe[r])^T dy[i]. The k loop has steps of 64
// windows, sequence after sequence, with two shared-memory stages. Each of four warps computes D/4 rows.
// s thread blocks of a KV head together read k and v once; dy comes from L2. Limited by the FLOPs.
template <typename T, int D>
__global__ void __launch_bounds__(128, 2) compress_dweight_kernel(const CompressParams p) {
    constexpr int TILE_K = 64, TILE_BYTES = TILE_K * D * 2, M = D / 64; // M: 16-row MMA tiles of a warp
    extern __shared__ __align__(128) char shared[];
    uint32_t tile_x = smem_address(shared), tile_dy = tile_x + 2 * TILE_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = blockIdx.x, kv_head = blockIdx.y,
        kv = blockIdx.z;
    const int64_t in_stride = p.in[kv].stride, dy_stride = (int64_t)p.kv_heads * D;
    int64_t seq = -1, window0 = 0;
    int i0 = 0, windows = 0; // first window of the next tile, and the windows of its sequence
    auto next_tile = [&]() {
        i0 += TILE_K;
        while (i0 >= windows) {
            if (++seq >= p.batch.num_seqs) return false;
            window0 = p.batch.cu_windows[seq];
            windows = (int)(p.batch.cu_windows[seq + 1] - window0);
            i0 = 0;
        }
        return true;
    };
    auto load_tiles = [&](int stage) {
        int64_t first = p.batch.cu_seqlens[seq] + (int64_t)i0 * p.stride + r;
        load_tile<TILE_K, D, 128>(tile_x + stage * TILE_BYTES,
                                  (const T *)p.in[kv].data + first * in_stride + kv_head * D,
                                  p.stride * in_stride, windows - i0);
        load_tile<TILE_K, D, 128>(tile_dy + stage * TILE_BYTES,
                                  (const T *)p.dout_unrotated[kv] + (window0 + i0) * dy_stride + kv_head * D,
                                  dy_stride, windows - i0);
    };
    float acc[M][D / 8][4] = {};
    bool has_tile = next_tile();
    if (has_tile) load_tiles(0);
    cp_async_commit();
    for (int stage = 0; has_tile; stage ^= 1) {
        has_tile = next_tile();
        if (has_tile) load_tiles(stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < TILE_K / 16; kk++) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; m++)
                load_a_trans<D>(a[m], tile_x + stage * TILE_BYTES, kk * 16, warp * M + m);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tile_dy + stage * TILE_BYTES, kk * 16, n);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma_16816<T>(acc[m][2 * n], a[m], b[0], b[1]);
                    mma_16816<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int64_t row = ((int64_t)kv_head * p.len + r) * D + (warp * M + m) * 16 + half * 8 + lane / 4;
            float pe = kv == 0 && p.pe ? to_f32(((const T *)p.pe)[row]) : 0;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                int column = n * 8 + lane % 4 * 2;
                float2 *out = (float2 *)(p.dweight[kv] + row * D + column), x = *out;
                x.x += acc[m][n][half * 2];
                x.y += acc[m][n][half * 2 + 1];
                if (kv == 0 && p.pe) {
                    x.x += pe * p.head_sums[kv_head * D + column];
                    x.y += pe * p.head_sums[kv_head * D + column + 1];
                }
                *out = x;
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------

static size_t round_up(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}
static size_t head_sums_bytes(const FsaConfig *c) {
    return round_up(sizeof(float) * c->kv_heads * c->head_dim);
}
static size_t dout_unrotated_bytes(const FsaConfig *c, const BatchLayout *batch) {
    size_t element = c->phi == FSA_PHI_MEAN ? sizeof(float) : 2;
    return round_up((size_t)fsa_max_windows(c, batch) * c->kv_heads * c->head_dim * element);
}

size_t fsa_compress_scratch_bytes(const FsaConfig *c, const BatchLayout *batch, int backward) {
    return head_sums_bytes(c) + (backward ? 2 * dout_unrotated_bytes(c, batch) : 0);
}

static CompressParams make_compress_params(const FsaConfig *c, const BatchLayout *batch, ConstRows k,
                                           ConstRows v, const void *wk, const void *pe, const void *wv,
                                           const double *inv_freq, void *scratch) {
    CompressParams s = {};
    s.batch = *batch;
    s.in[0] = k, s.in[1] = v, s.weight[0] = wk, s.weight[1] = wv, s.pe = pe, s.inv_freq = inv_freq;
    s.kv_heads = c->kv_heads, s.len = c->cmp_len, s.stride = c->cmp_stride;
    s.head_sums = (float *)scratch;
    return s;
}

template <typename T, int D>
static int compress_forward(const FsaConfig *c, const CompressParams &p, cudaStream_t stream) {
    int64_t windows = fsa_max_windows(c, &p.batch);
    if (windows == 0) return FSA_OK;
    if (c->phi == FSA_PHI_MEAN) {
        int64_t threads = windows * p.kv_heads * (D / 2);
        return LAUNCH((compress_mean_kernel<T, D>), (unsigned)((threads + 255) / 256), 256, 0, stream, p);
    }
    int bytes = 2 * (128 + D) * 64 * 2;
    TRY(LAUNCH((compress_bias_kernel<T, D>), p.kv_heads, 1024, 0, stream, p));
    dim3 grid((unsigned)max_row_tiles(windows, p.batch.num_seqs, 128), p.kv_heads, 2);
    return LAUNCH((compress_linear_kernel<T, D>), grid, 128, bytes, stream, p);
}

int fsa_compress_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows k,
                         ConstRows v, const void *wk, const void *pe, const void *wv, const double *inv_freq,
                         void *kc, void *vc, void *scratch, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    CompressParams s = make_compress_params(c, batch, k, v, wk, pe, wv, inv_freq, scratch);
    s.out[0] = kc, s.out[1] = vc;
    return FSA_DISPATCH(dtype, c->head_dim, compress_forward, c, s, stream);
}

template <typename T, int D>
static int compress_backward(const FsaConfig *c, const CompressParams &p, cudaStream_t stream) {
    int64_t windows = fsa_max_windows(c, &p.batch), threads = windows * p.kv_heads * (D / 2);
    unsigned rope_blocks = (unsigned)((threads + 255) / 256);
    if (p.batch.n == 0) return FSA_OK;
    if (c->phi == FSA_PHI_MEAN) {
        if (windows > 0)
            TRY(LAUNCH((compress_inverse_rope_kernel<float, D>), rope_blocks, 256, 0, stream, p));
        unsigned blocks = (unsigned)((p.batch.n * p.kv_heads * D / 4 + 255) / 256);
        return LAUNCH(compress_mean_backward_kernel<D>, blocks, 256, 0, stream, p);
    }
    int bytes = 2 * (128 + D) * 64 * 2, bytes_w = 4 * 64 * D * 2;
    if (windows > 0) TRY(LAUNCH((compress_inverse_rope_kernel<T, D>), rope_blocks, 256, 0, stream, p));
    int64_t tiles = max_row_tiles(p.batch.n, p.batch.num_seqs, 128 * p.stride);
    dim3 grid((unsigned)(tiles * p.stride), p.kv_heads, 2);
    TRY(LAUNCH((compress_dinput_kernel<T, D>), grid, 128, bytes, stream, p));
    if (windows == 0) return FSA_OK;
    if (p.pe) {
        TRY(LAUNCH((compress_sum_dkc_kernel<T, D>), p.kv_heads, 1024, 0, stream, p));
        unsigned dpe_blocks = (unsigned)((int64_t)p.kv_heads * p.len * D / 8);
        TRY(LAUNCH((compress_dpe_kernel<T, D>), dpe_blocks, 256, 0, stream, p));
    }
    return LAUNCH((compress_dweight_kernel<T, D>), dim3(p.len, p.kv_heads, 2), 128, bytes_w, stream, p);
}

int fsa_compress_backward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows k,
                          ConstRows v, const void *wk, const void *pe, const void *wv, const double *inv_freq,
                          const float *dkc, const float *dvc, float *dk, float *dv, int accumulate,
                          float *dwk, float *dpe, float *dwv, void *scratch, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    CompressParams s = make_compress_params(c, batch, k, v, wk, pe, wv, inv_freq, scratch);
    s.dout[0] = dkc, s.dout[1] = dvc, s.din[0] = dk, s.din[1] = dv, s.accumulate = accumulate;
    s.dweight[0] = dwk, s.dweight[1] = dwv, s.dpe = dpe;
    s.dout_unrotated[0] = (char *)scratch + head_sums_bytes(c);
    s.dout_unrotated[1] = (char *)s.dout_unrotated[0] + dout_unrotated_bytes(c, batch);
    return FSA_DISPATCH(dtype, c->head_dim, compress_backward, c, s, stream);
}
