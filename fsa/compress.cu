// compress.cu: windows of l tokens to compressed keys and values, forward and backward, for phi = mean
// and linear. The keys are those before RoPE; a compressed key is rotated as position s*i.
//
// Linear is a matrix product for each KV head: row i of the left side is window i's l*d numbers, which lie
// in memory as they are needed (token s*i + r at r = 0..l-1), so nothing is copied first. The position
// embedding is a bias: (x + pe) W = x W + pe W, the latter the same for all windows.
#include "kernels.h"
#include "rope.cuh"
#include "launch.cuh"
#include "sm80/tile.cuh"

struct Compress {
    BatchLayout batch;
    const void *in[2];          // k, v
    const void *weight[2], *pe; // linear
    const double *inv_freq;
    int kv_heads, len, stride;
    void *out[2]; // kc, vc
    // Backward.
    const float *dout[2]; // of kc (rotated), vc
    float *din[2], *dweight[2], *dpe;
    int accumulate;
    // Workspace.
    float *bias;     // [Hkv, d] pe W; backward: the sum over the windows of the gradient of kc
    void *turned[2]; // backward: dout turned back, 16-bit for linear, fp32 for mean
};

// -------------------------------------------------------------------------------------------------
// Forward

// bias[h] = pe[h] W[h], [l*d] x [l*d, d]. A block a head: 1024/D groups of rows, added up in order. Reads W
// once (2*l*d*d bytes a head); latency binds.
template <typename T, int D> __global__ void __launch_bounds__(1024) compress_bias_kernel(const Compress p) {
    constexpr int GROUPS = 1024 / D;
    __shared__ float sums[GROUPS][D];
    int head = blockIdx.x, column = threadIdx.x % D, group = threadIdx.x / D, rows = p.len * D;
    float sum = 0;
    if (p.pe) {
        const T *w = (const T *)p.weight[0] + (int64_t)head * rows * D,
                *pe = (const T *)p.pe + (int64_t)head * rows;
#pragma unroll 8
        for (int row = group; row < rows; row += GROUPS)
            sum += to_f32(pe[row]) * to_f32(w[(int64_t)row * D + column]);
    }
    sums[group][column] = sum;
    __syncthreads();
    if (group != 0) return;
    for (int i = 1; i < GROUPS; i++) sum += sums[i][column];
    p.bias[head * D + column] = sum;
}

// A block: 128 windows of a KV head, of K or V (grid y, z). Four warps of 32 windows; the sum over l*d goes
// in steps of 64 channels, both sides double buffered. Bytes: k and v (L2: l/s times), W once from HBM and
// once for every 128 windows from L2, kc and vc. Flops: 2*l*d*d a window; at 64K tokens and 8 heads 69 GFLOP,
// which bind.
template <typename T, int D>
__global__ void __launch_bounds__(128, 2) compress_linear_kernel(const Compress p) {
    constexpr int ROWS = 128, STEP = 64, A_BYTES = ROWS * STEP * 2, B_BYTES = STEP * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t tile_a = smem_address(shared), tile_b = tile_a + 2 * A_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, which = blockIdx.z;
    RowTile rows = find_row_tile(p.batch.cu_windows, p.batch.num_seqs, ROWS, blockIdx.x);
    if (rows.rows == 0) return;

    int64_t token = (int64_t)p.kv_heads * D;
    const T *x = (const T *)p.in[which] +
                 (p.batch.cu_seqlens[rows.range] + (int64_t)rows.first * p.stride) * token + head * D;
    const T *w = (const T *)p.weight[which] + (int64_t)head * p.len * D * D;
    auto load = [&](int at, int stage) { // channels at .. at + 63 of the l*d
        load_tile<ROWS, STEP, 128>(tile_a + stage * A_BYTES, x + at / D * token + at % D, p.stride * token,
                                   rows.rows);
        load_tile<STEP, D, 128>(tile_b + stage * B_BYTES, w + (int64_t)at * D, D, STEP);
    };
    load(0, 0);
    cp_async_commit();
    float sum[2][D / 8][4] = {};
    int depth = p.len * D, stage = 0;
    for (int at = 0; at < depth; at += STEP, stage ^= 1) {
        if (at + STEP < depth) load(at + STEP, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < STEP / 16; kk++) {
            uint32_t a[2][4];
            load_a<STEP>(a[0], tile_a + stage * A_BYTES, warp * 32, kk);
            load_a<STEP>(a[1], tile_a + stage * A_BYTES, warp * 32 + 16, kk);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tile_b + stage * B_BYTES, kk * 16, n);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_16816<T>(sum[m][2 * n], a[m], b[0], b[1]);
                    mma_16816<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();

    // A lane holds channels c and c + D/2 of its rows.
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp * 32 + m * 16 + half * 8 + lane / 4;
            if (row >= rows.rows) continue;
            T *to = (T *)p.out[which] + (rows.row + row) * token + head * D;
            int64_t position = (int64_t)(rows.first + row) * p.stride;
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                float lo[2], hi[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int c = n * 8 + lane % 4 * 2 + e;
                    lo[e] = sum[m][n][half * 2 + e];
                    hi[e] = sum[m][n + D / 16][half * 2 + e];
                    if (which == 0) {
                        lo[e] += p.bias[head * D + c];
                        hi[e] += p.bias[head * D + c + D / 2];
                        if (p.inv_freq) {
                            float2 turn = rope_cos_sin(position, p.inv_freq[c]);
                            float a = lo[e], b = hi[e];
                            lo[e] = a * turn.x - b * turn.y;
                            hi[e] = b * turn.x + a * turn.y;
                        }
                    }
                }
                *(uint32_t *)(to + n * 8 + lane % 4 * 2) = pack2<T>(lo[0], lo[1]);
                *(uint32_t *)(to + n * 8 + lane % 4 * 2 + D / 2) = pack2<T>(hi[0], hi[1]);
            }
        }
    }
}

// A thread: channels c and c + D/2 of a window's average, of K and V. Reads k and v l/s times (once from
// HBM); bound by bytes.
template <typename T, int D> __global__ void __launch_bounds__(256) compress_mean_kernel(const Compress p) {
    int64_t at = blockIdx.x * 256ll + threadIdx.x, window = at / (D / 2) / p.kv_heads;
    if (window >= p.batch.cu_windows[p.batch.num_seqs]) return;
    int c = at % (D / 2), head = (int)(at / (D / 2) % p.kv_heads);
    int64_t seq = find_in_cu(p.batch.cu_windows, p.batch.num_seqs, window), token = (int64_t)p.kv_heads * D;
    int64_t start = (window - p.batch.cu_windows[seq]) * p.stride, out = window * token + head * D + c;
    for (int which = 0; which < 2; which++) {
        const T *x = (const T *)p.in[which] + (p.batch.cu_seqlens[seq] + start) * token + head * D + c;
        float lo = 0, hi = 0;
        for (int r = 0; r < p.len; r++) {
            lo += to_f32(x[r * token]);
            hi += to_f32(x[r * token + D / 2]);
        }
        lo /= p.len;
        hi /= p.len;
        if (which == 0 && p.inv_freq) {
            float2 turn = rope_cos_sin(start, p.inv_freq[c]);
            float a = lo, b = hi;
            lo = a * turn.x - b * turn.y;
            hi = b * turn.x + a * turn.y;
        }
        ((T *)p.out[which])[out] = (T)lo;
        ((T *)p.out[which])[out + D / 2] = (T)hi;
    }
}

// -------------------------------------------------------------------------------------------------
// Backward

// turned = dout, that of kc turned back. A thread: channels c and c + D/2 of a window, of K and V. Bytes
// bind.
template <typename Out, int D> __global__ void __launch_bounds__(256) compress_turn_kernel(const Compress p) {
    int64_t at = blockIdx.x * 256ll + threadIdx.x, window = at / (D / 2) / p.kv_heads;
    if (window >= p.batch.cu_windows[p.batch.num_seqs]) return;
    int c = at % (D / 2), head = (int)(at / (D / 2) % p.kv_heads);
    int64_t seq = find_in_cu(p.batch.cu_windows, p.batch.num_seqs, window);
    int64_t start = (window - p.batch.cu_windows[seq]) * p.stride, x = (window * p.kv_heads + head) * D + c;
    for (int which = 0; which < 2; which++) {
        float lo = p.dout[which][x], hi = p.dout[which][x + D / 2];
        if (which == 0 && p.inv_freq) {
            float2 turn = rope_cos_sin(start, p.inv_freq[c]);
            float a = lo, b = hi;
            lo = a * turn.x + b * turn.y;
            hi = b * turn.x - a * turn.y;
        }
        ((Out *)p.turned[which])[x] = (Out)lo;
        ((Out *)p.turned[which])[x + D / 2] = (Out)hi;
    }
}

// A thread: four channels of a token, of K and V: the average's gradient, summed over the windows that hold
// it. Bytes: dk, dv in fp32, which bind; the windows' gradients l/s times, from L2.
template <int D> __global__ void __launch_bounds__(256) compress_mean_backward_kernel(const Compress p) {
    int row_size = p.kv_heads * D;
    int64_t at = (blockIdx.x * 256ll + threadIdx.x) * 4, row = at / row_size;
    if (row >= p.batch.n) return;
    int64_t seq = find_in_cu(p.batch.cu_seqlens, p.batch.num_seqs, row), window0 = p.batch.cu_windows[seq];
    int t = (int)(row - p.batch.cu_seqlens[seq]), windows = (int)(p.batch.cu_windows[seq + 1] - window0);
    int first = t < p.len ? 0 : (t - p.len) / p.stride + 1, last = min(t / p.stride, windows - 1);
    for (int which = 0; which < 2; which++) {
        float4 sum = make_float4(0, 0, 0, 0), *to = (float4 *)(p.din[which] + at);
        for (int i = first; i <= last; i++) {
            float4 x = *(const float4 *)((const float *)p.turned[which] + (window0 + i) * row_size + at -
                                         row * row_size);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        float4 old = which && p.accumulate ? *to : make_float4(0, 0, 0, 0);
        *to = make_float4(old.x + sum.x / p.len, old.y + sum.y / p.len, old.z + sum.z / p.len,
                          old.w + sum.w / p.len);
    }
}

// dk, dv. A block: tokens s*c + r0 of 128 stride cells c, for one r0 (grid x: all tiles of r0 = 0, then of 1
// and so on), KV head and K or V (grid y, z): the sum over a = 0..l/s-1 of the gradient of window c - a times
// W[a*s + r0]^T. Four warps of 32 cells; steps of 64 channels, double buffered.
// Bytes: dk, dv in fp32; the windows' gradients and W from L2. Flops: 2*l*d*d a window; they bind.
template <typename T, int D> __global__ void __launch_bounds__(128, 2) compress_din_kernel(const Compress p) {
    constexpr int ROWS = 128, STEP = 64, A_BYTES = ROWS * STEP * 2, B_BYTES = STEP * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t tile_a = smem_address(shared), tile_b = tile_a + 2 * A_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int tiles = gridDim.x / p.stride, r0 = blockIdx.x / tiles, head = blockIdx.y, which = blockIdx.z;
    RowTile tokens = find_row_tile(p.batch.cu_seqlens, p.batch.num_seqs, ROWS * p.stride, blockIdx.x % tiles);
    if (tokens.rows == 0) return;
    int cell0 = tokens.first / p.stride;
    int64_t token = (int64_t)p.kv_heads * D, window0 = p.batch.cu_windows[tokens.range];
    int windows = (int)(p.batch.cu_windows[tokens.range + 1] - window0);
    const T *dy = (const T *)p.turned[which] + window0 * token + head * D;
    const T *w = (const T *)p.weight[which] + (int64_t)head * p.len * D * D;

    auto load = [&](int at, int stage) { // at = a*D + channel
        int window = cell0 - at / D;     // of the tile's first row
#pragma unroll
        for (int i = 0; i < ROWS * STEP / 8 / 128; i++) {
            int row = (i * 128 + threadIdx.x) / (STEP / 8), chunk = threadIdx.x % (STEP / 8);
            bool valid = window + row >= 0 && window + row < windows;
            const T *from =
                valid ? dy + (window + row) * token + at % D + chunk * 8 : (const T *)p.weight[which];
            cp_async_16(tile_a + stage * A_BYTES + swizzled<STEP>(row, chunk), from, valid);
        }
        load_tile<D, STEP, 128>(tile_b + stage * B_BYTES,
                                w + (int64_t)(at / D * p.stride + r0) * D * D + at % D, D, D);
    };
    load(0, 0);
    cp_async_commit();
    float sum[2][D / 8][4] = {};
    int depth = p.len / p.stride * D, stage = 0;
    for (int at = 0; at < depth; at += STEP, stage ^= 1) {
        if (at + STEP < depth) load(at + STEP, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < STEP / 16; kk++) {
            uint32_t a[2][4];
            load_a<STEP>(a[0], tile_a + stage * A_BYTES, warp * 32, kk);
            load_a<STEP>(a[1], tile_a + stage * A_BYTES, warp * 32 + 16, kk);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b<STEP>(b, tile_b + stage * B_BYTES, n * 16, kk);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_16816<T>(sum[m][2 * n], a[m], b[0], b[1]);
                    mma_16816<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
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
            float *to = p.din[which] + (tokens.row + t) * token + head * D + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                float2 x = make_float2(sum[m][n][half * 2], sum[m][n][half * 2 + 1]),
                       *at = (float2 *)(to + n * 8);
                if (which && p.accumulate) {
                    float2 old = *at;
                    x.x += old.x, x.y += old.y;
                }
                *at = x;
            }
        }
    }
}

// bias[h] = the sum over all windows of the gradient of kc, from which dpe and its part of dW follow. A block
// a head, 1024/D groups of windows added up in order. Reads 2*d bytes a window and head; latency binds.
template <typename T, int D> __global__ void __launch_bounds__(1024) compress_sum_kernel(const Compress p) {
    constexpr int GROUPS = 1024 / D;
    __shared__ float sums[GROUPS][D];
    int head = blockIdx.x, column = threadIdx.x % D, group = threadIdx.x / D;
    int64_t windows = p.batch.cu_windows[p.batch.num_seqs];
    float sum = 0;
#pragma unroll 8
    for (int64_t i = group; i < windows; i += GROUPS) {
        sum += to_f32(((const T *)p.turned[0])[(i * p.kv_heads + head) * D + column]);
    }
    sums[group][column] = sum;
    __syncthreads();
    if (group != 0) return;
    for (int i = 1; i < GROUPS; i++) sum += sums[i][column];
    p.bias[head * D + column] = sum;
}

// dpe[h, row] += W[h, row] . bias[h], a warp a row. Reads W once; bound by bytes.
template <typename T, int D> __global__ void __launch_bounds__(256) compress_dpe_kernel(const Compress p) {
    int64_t row = blockIdx.x * 8ll + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (row >= (int64_t)p.kv_heads * p.len * D) return;
    const float *bias = p.bias + row / (p.len * D) * D;
    float sum = 0;
    for (int i = lane; i < D; i += 32) sum += to_f32(((const T *)p.weight[0])[row * D + i]) * bias[i];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) p.dpe[row] += sum;
}

// dW. A block: rows r*d .. r*d + d-1 of a KV head's weight, of K or V (grid x, y, z): the sum over all
// windows of x[s*i + r]^T (gradient of window i), 64 windows at a time, sequence after sequence. Four warps
// of D/4 rows; both sides double buffered. Bytes: k, v once for every 1/(l/s) of the blocks, the gradients
// from L2. Flops: 2*l*d*d a window; they bind.
template <typename T, int D>
__global__ void __launch_bounds__(128, 2) compress_dweight_kernel(const Compress p) {
    constexpr int WINDOWS = 64, BYTES = WINDOWS * D * 2, M = D / 64; // 16-row pieces of a warp
    extern __shared__ __align__(128) char shared[];
    uint32_t tile_x = smem_address(shared), tile_dy = tile_x + 2 * BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = blockIdx.x, head = blockIdx.y,
        which = blockIdx.z;
    int64_t token = (int64_t)p.kv_heads * D, seq = -1, window0 = 0;
    int at = 0, windows = 0; // the next tile's first window, and the windows of its sequence
    auto advance = [&]() {
        at += WINDOWS;
        while (at >= windows) {
            if (++seq >= p.batch.num_seqs) return false;
            window0 = p.batch.cu_windows[seq];
            windows = (int)(p.batch.cu_windows[seq + 1] - window0);
            at = 0;
        }
        return true;
    };
    auto load = [&](int stage) {
        int64_t first = p.batch.cu_seqlens[seq] + (int64_t)at * p.stride + r;
        load_tile<WINDOWS, D, 128>(tile_x + stage * BYTES, (const T *)p.in[which] + first * token + head * D,
                                   p.stride * token, windows - at);
        load_tile<WINDOWS, D, 128>(tile_dy + stage * BYTES,
                                   (const T *)p.turned[which] + (window0 + at) * token + head * D, token,
                                   windows - at);
    };
    float sum[M][D / 8][4] = {};
    bool more = advance();
    if (more) load(0);
    cp_async_commit();
    for (int stage = 0; more; stage ^= 1) {
        more = advance();
        if (more) load(stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < WINDOWS / 16; kk++) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) load_a_trans<D>(a[m], tile_x + stage * BYTES, kk * 16, warp * M + m);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tile_dy + stage * BYTES, kk * 16, n);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma_16816<T>(sum[m][2 * n], a[m], b[0], b[1]);
                    mma_16816<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
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
            int64_t row = ((int64_t)head * p.len + r) * D + (warp * M + m) * 16 + half * 8 + lane / 4;
            float pe = which == 0 && p.pe ? to_f32(((const T *)p.pe)[row]) : 0;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                int column = n * 8 + lane % 4 * 2;
                float2 *to = (float2 *)(p.dweight[which] + row * D + column), x = *to;
                x.x += sum[m][n][half * 2];
                x.y += sum[m][n][half * 2 + 1];
                if (which == 0 && p.pe) {
                    x.x += pe * p.bias[head * D + column];
                    x.y += pe * p.bias[head * D + column + 1];
                }
                *to = x;
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------

static size_t rounded(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}
static size_t bias_bytes(const FsaConfig *c) {
    return rounded(sizeof(float) * c->kv_heads * c->head_dim);
}
static size_t turned_bytes(const FsaConfig *c, const BatchLayout *p) {
    size_t element = c->phi == FSA_PHI_MEAN ? sizeof(float) : 2;
    return rounded((size_t)fsa_max_windows(c, p) * c->kv_heads * c->head_dim * element);
}

size_t fsa_compress_scratch_bytes(const FsaConfig *c, const BatchLayout *p, int backward) {
    return bias_bytes(c) + (backward ? 2 * turned_bytes(c, p) : 0);
}

static Compress compress_of(const FsaConfig *c, const BatchLayout *p, const void *k, const void *v,
                            const void *wk, const void *pe, const void *wv, const double *inv_freq,
                            void *workspace) {
    Compress s = {};
    s.batch = *p;
    s.in[0] = k, s.in[1] = v, s.weight[0] = wk, s.weight[1] = wv, s.pe = pe, s.inv_freq = inv_freq;
    s.kv_heads = c->kv_heads, s.len = c->cmp_len, s.stride = c->cmp_stride;
    s.bias = (float *)workspace;
    return s;
}

template <typename T, int D>
static int launch_forward(const FsaConfig *c, const Compress &p, cudaStream_t stream) {
    int64_t windows = fsa_max_windows(c, &p.batch);
    if (windows == 0) return FSA_OK;
    if (c->phi == FSA_PHI_MEAN) {
        int64_t threads = windows * p.kv_heads * (D / 2);
        compress_mean_kernel<T, D><<<(unsigned)((threads + 255) / 256), 256, 0, stream>>>(p);
        return launch_status();
    }
    int bytes = 2 * (128 + D) * 64 * 2;
    cudaFuncSetAttribute(compress_linear_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    compress_bias_kernel<T, D><<<p.kv_heads, 1024, 0, stream>>>(p);
    dim3 grid((unsigned)row_tile_bound(windows, p.batch.num_seqs, 128), p.kv_heads, 2);
    compress_linear_kernel<T, D><<<grid, 128, bytes, stream>>>(p);
    return launch_status();
}

int fsa_compress_forward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *k, const void *v,
                         const void *wk, const void *pe, const void *wv, const double *inv_freq, void *kc,
                         void *vc, void *workspace, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    Compress s = compress_of(c, p, k, v, wk, pe, wv, inv_freq, workspace);
    s.out[0] = kc, s.out[1] = vc;
    return FSA_DISPATCH(dtype, c->head_dim, launch_forward, c, s, stream);
}

template <typename T, int D>
static int launch_backward(const FsaConfig *c, const Compress &p, cudaStream_t stream) {
    int64_t windows = fsa_max_windows(c, &p.batch), threads = windows * p.kv_heads * (D / 2);
    unsigned turn_blocks = (unsigned)((threads + 255) / 256);
    if (p.batch.n == 0) return FSA_OK;
    if (c->phi == FSA_PHI_MEAN) {
        if (windows > 0) compress_turn_kernel<float, D><<<turn_blocks, 256, 0, stream>>>(p);
        compress_mean_backward_kernel<D>
            <<<(unsigned)((p.batch.n * p.kv_heads * D / 4 + 255) / 256), 256, 0, stream>>>(p);
        return launch_status();
    }
    int bytes = 2 * (128 + D) * 64 * 2, bytes_w = 4 * 64 * D * 2;
    cudaFuncSetAttribute(compress_din_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaFuncSetAttribute(compress_dweight_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes_w);
    if (windows > 0) compress_turn_kernel<T, D><<<turn_blocks, 256, 0, stream>>>(p);
    int64_t tiles = row_tile_bound(p.batch.n, p.batch.num_seqs, 128 * p.stride);
    dim3 grid((unsigned)(tiles * p.stride), p.kv_heads, 2);
    compress_din_kernel<T, D><<<grid, 128, bytes, stream>>>(p);
    if (windows == 0) return launch_status();
    if (p.pe) {
        compress_sum_kernel<T, D><<<p.kv_heads, 1024, 0, stream>>>(p);
        compress_dpe_kernel<T, D><<<(unsigned)((int64_t)p.kv_heads * p.len * D / 8), 256, 0, stream>>>(p);
    }
    compress_dweight_kernel<T, D><<<dim3(p.len, p.kv_heads, 2), 128, bytes_w, stream>>>(p);
    return launch_status();
}

int fsa_compress_backward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *k, const void *v,
                          const void *wk, const void *pe, const void *wv, const double *inv_freq,
                          const float *dkc, const float *dvc, float *dk, float *dv, int accumulate,
                          float *dwk, float *dpe, float *dwv, void *workspace, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    Compress s = compress_of(c, p, k, v, wk, pe, wv, inv_freq, workspace);
    s.dout[0] = dkc, s.dout[1] = dvc, s.din[0] = dk, s.din[1] = dv, s.accumulate = accumulate;
    s.dweight[0] = dwk, s.dweight[1] = dwv, s.dpe = dpe;
    s.turned[0] = (char *)workspace + bias_bytes(c);
    s.turned[1] = (char *)s.turned[0] + turned_bytes(c, p);
    return FSA_DISPATCH(dtype, c->head_dim, launch_backward, c, s, stream);
}
