// rmsnorm.cuh: RMSNorm, out = x / sqrt(mean(x^2) + eps) * weight, over rows of c channels: of an array, or of
// each head of a row (QK-norm).
//
// A team of threads processes a row: 8 or 32 lanes of a warp, or a thread block of 128 or 512. A thread then
// holds at most RMSNORM_PACKS packs of the row in registers, and memory is read once.
#ifndef LLMC_RMSNORM_CUH
#define LLMC_RMSNORM_CUH
#include "cuda_common.cuh"
#include "fp8.cuh"

enum {
    RMSNORM_PACKS = 4,
    RMSNORM_BLOCKS = 512, // thread blocks of the backward pass, at most; each has a partial sum of dweight
    RMSNORM_MAX_CHANNELS = 512 * RMSNORM_PACKS * PACK // 16,384 in 16 bits
};

// Row i is head i % heads of token i / heads, and starts at token*stride + head*c. For a plain matrix heads
// is 1.
struct RmsnormRows {
    int rows, heads, c;
};
__device__ __forceinline__ int64_t rmsnorm_row_offset(const RmsnormRows &r, int row, int64_t stride) {
    int token = row / r.heads;
    return token * stride + (int64_t)(row - token * r.heads) * r.c;
}

// Each team normalizes one row of x. Memory-bound. A row reads 2*c bytes and writes 2*c in 16 bits: 64K
// tokens of c = 4096 move 1.07 GB, which takes 0.24 ms at 4.5 TB/s. With FP8 the row of out goes to q too,
// quantized after it is rounded to floatX. out may be NULL then.
template <int TEAM, bool FP8>
static __global__ void __launch_bounds__(team_threads(TEAM))
    rmsnorm_forward_kernel(RmsnormRows r, floatX *out, Fp8Matrix q, float *rstd, const floatX *x,
                           int64_t stride, const floatX *weight, float eps) {
    __shared__ float shared[32];
    int lane = threadIdx.x % TEAM, row = blockIdx.x * (blockDim.x / TEAM) + threadIdx.x / TEAM;
    int packs = row < r.rows ? r.c / PACK : 0; // a team past the last row only joins the reductions
    int64_t src = rmsnorm_row_offset(r, row, stride), dst = (int64_t)row * r.c;
    uint4 bits[RMSNORM_PACKS];
    float squares = 0, v[PACK], w[PACK];
#pragma unroll
    for (int i = 0; i < RMSNORM_PACKS; i++) { // all loads are in flight before the first is used
        int column = (lane + i * TEAM) * PACK;
        if (lane + i * TEAM >= packs) break;
        bits[i] = load16(x + src + column);
    }
#pragma unroll
    for (int i = 0; i < RMSNORM_PACKS; i++) {
        if (lane + i * TEAM >= packs) break;
        unpack(v, bits[i]);
#pragma unroll
        for (int j = 0; j < PACK; j++) squares += v[j] * v[j];
    }
    float scale = 1 / sqrtf(team_reduce_sum<TEAM>(squares, shared) / r.c + eps);
    if (packs > 0 && lane == 0) rstd[row] = scale;
#pragma unroll
    for (int i = 0; i < RMSNORM_PACKS; i++) {
        int column = (lane + i * TEAM) * PACK;
        if (lane + i * TEAM >= packs) break;
        unpack(v, bits[i]);
        load_pack(w, weight + column);
#pragma unroll
        for (int j = 0; j < PACK; j++) v[j] *= scale * w[j];
        bits[i] = pack(v);
        if (!FP8 || out) store16(out + dst + column, bits[i]);
    }
    if (FP8) quantize_team_row<TEAM>(q, row, r.c, packs, bits, (uint32_t *)shared);
}

// With y = x * rstd: dx = rstd * (w*dout - y * mean(w*dout*y)), and dweight is the sum over rows of dout*y.
// Each team processes rows with the grid as stride, and sums dweight in registers. At the end the thread
// block adds the sums of its teams in order and writes partial[block] [c] in fp32. Memory-bound. It reads 4*c
// bytes per row in 16 bits, 6*c with add, and writes 2*c: 64K tokens of c = 4096 with add move 2.1 GB, which
// takes 0.48 ms at 4.5 TB/s. A thread reads its packs of a row before it writes them, so dx may be x or dout
// if the strides are equal. With FP8 the row of dx goes to q too, quantized after it is rounded to floatX.
template <int TEAM, bool FP8>
static __global__ void __launch_bounds__(team_threads(TEAM))
    rmsnorm_backward_kernel(RmsnormRows r, floatX *dx, Fp8Matrix q, int64_t dx_stride, int add,
                            float *partial, const floatX *dout, const floatX *x, int64_t stride,
                            const floatX *weight, const float *rstd) {
    __shared__ float shared[TEAM > 32 ? 32 : 256 * RMSNORM_PACKS * PACK];
    int lane = threadIdx.x % TEAM, team = threadIdx.x / TEAM, teams = blockDim.x / TEAM;
    float dweight[RMSNORM_PACKS][PACK] = {};
    for (int64_t first = (int64_t)blockIdx.x * teams; first < r.rows; first += (int64_t)gridDim.x * teams) {
        int row = (int)first + team, packs = row < r.rows ? r.c / PACK : 0;
        int64_t src = rmsnorm_row_offset(r, row, stride), dst = rmsnorm_row_offset(r, row, dx_stride);
        float scale = packs > 0 ? rstd[row] : 0, mean = 0;
        uint4 x_bits[RMSNORM_PACKS], d_bits[RMSNORM_PACKS], dx_bits[RMSNORM_PACKS];
        float v[PACK], d[PACK], w[PACK];
#pragma unroll
        for (int i = 0; i < RMSNORM_PACKS; i++) { // all loads are in flight before the first is used
            int column = (lane + i * TEAM) * PACK;
            if (lane + i * TEAM >= packs) break;
            x_bits[i] = load16(x + src + column);
            d_bits[i] = load16(dout + (int64_t)row * r.c + column);
            if (add) dx_bits[i] = load16(dx + dst + column);
        }
#pragma unroll
        for (int i = 0; i < RMSNORM_PACKS; i++) {
            int column = (lane + i * TEAM) * PACK;
            if (lane + i * TEAM >= packs) break;
            unpack(v, x_bits[i]);
            unpack(d, d_bits[i]);
            load_pack(w, weight + column);
#pragma unroll
            for (int j = 0; j < PACK; j++) {
                mean += w[j] * d[j] * v[j];
                dweight[i][j] += d[j] * v[j] * scale;
            }
        }
        mean = team_reduce_sum<TEAM>(mean, shared) * scale / r.c;
#pragma unroll
        for (int i = 0; i < RMSNORM_PACKS; i++) {
            int column = (lane + i * TEAM) * PACK;
            if (lane + i * TEAM >= packs) break;
            unpack(v, x_bits[i]);
            unpack(d, d_bits[i]);
            load_pack(w, weight + column);
#pragma unroll
            for (int j = 0; j < PACK; j++) v[j] = scale * (w[j] * d[j] - v[j] * scale * mean);
            if (add) {
                unpack(d, dx_bits[i]);
#pragma unroll
                for (int j = 0; j < PACK; j++) v[j] += d[j];
            }
            x_bits[i] = pack(v);
            store16(dx + dst + column, x_bits[i]);
        }
        if (FP8) quantize_team_row<TEAM>(q, row, r.c, packs, x_bits, (uint32_t *)shared);
    }
    float *team_partial = TEAM > 32 ? partial + (int64_t)blockIdx.x * r.c : shared + team * r.c;
#pragma unroll
    for (int i = 0; i < RMSNORM_PACKS; i++) {
        if (lane + i * TEAM >= r.c / PACK) break;
#pragma unroll
        for (int j = 0; j < PACK; j++) team_partial[(lane + i * TEAM) * PACK + j] = dweight[i][j];
    }
    if (TEAM > 32) return;
    __syncthreads();
    for (int column = threadIdx.x; column < r.c; column += blockDim.x) {
        float total = 0;
        for (int i = 0; i < teams; i++) total += shared[i * r.c + column];
        partial[(int64_t)blockIdx.x * r.c + column] = total;
    }
}

// Returns the threads of the team that c channels need: 8, 32, 128 or 512.
static inline int rmsnorm_team(int c) {
    check_packs("rmsnorm", c);
    if (c > RMSNORM_MAX_CHANNELS)
        die("rmsnorm: rows of %d channels: must be at most %d; lower -channels", c,
            (int)RMSNORM_MAX_CHANNELS);
    int lanes = (c / PACK + RMSNORM_PACKS - 1) / RMSNORM_PACKS;
    return lanes <= 8 ? 8 : lanes <= 32 ? 32 : lanes <= 128 ? 128 : 512;
}
// Returns the thread blocks that `rows` rows of c channels fill.
static inline int64_t rmsnorm_blocks(int64_t rows, int c) {
    int team = rmsnorm_team(c), teams = team_threads(team) / team;
    if (rows > INT_MAX - teams)
        die("rmsnorm: %lld rows (tokens times heads): must be at most %d; lower -b or -t", (long long)rows,
            INT_MAX - teams);
    return (rows + teams - 1) / teams;
}

// Launches kernel<TEAM, fp8><<<grid, ...>>>(arguments) for the team that c channels need.
#define RMSNORM_LAUNCH(kernel, fp8, grid, c, stream, ...)                                                    \
    do {                                                                                                     \
        unsigned grid_ = (unsigned)(grid);                                                                   \
        switch (rmsnorm_team(c)) {                                                                           \
        case 8:                                                                                              \
            kernel<8, fp8><<<grid_, team_threads(8), 0, stream>>>(__VA_ARGS__);                              \
            break;                                                                                           \
        case 32:                                                                                             \
            kernel<32, fp8><<<grid_, team_threads(32), 0, stream>>>(__VA_ARGS__);                            \
            break;                                                                                           \
        case 128:                                                                                            \
            kernel<128, fp8><<<grid_, team_threads(128), 0, stream>>>(__VA_ARGS__);                          \
            break;                                                                                           \
        default:                                                                                             \
            kernel<512, fp8><<<grid_, team_threads(512), 0, stream>>>(__VA_ARGS__);                          \
        }                                                                                                    \
        cuda_check(cudaGetLastError());                                                                      \
    } while (0)

// ---- rows of heads: head h of token t starts at t*stride + h*d --------------------------------------------

// Normalizes each head: out [n, heads, d] is contiguous, rstd [n, heads], weight [d]. Tokens of x are
// `stride` elements apart. d and stride are multiples of PACK.
static inline void rmsnorm_heads_forward(floatX *out, float *rstd, const floatX *x, int64_t stride,
                                         const floatX *weight, int64_t n, int heads, int d, float eps,
                                         cudaStream_t stream) {
    if (n == 0) return;
    check_packs("rmsnorm", stride);
    int64_t blocks = rmsnorm_blocks(n * heads, d);
    RmsnormRows rows = {(int)(n * heads), heads, d};
    RMSNORM_LAUNCH(rmsnorm_forward_kernel, false, blocks, d, stream, rows, out, Fp8Matrix{}, rstd, x, stride,
                   weight, eps);
}

// Returns the bytes of scratch that the backward pass of `rows` rows (tokens times heads) of c channels
// needs.
static inline size_t rmsnorm_backward_scratch(int64_t rows, int c) {
    int64_t blocks = rmsnorm_blocks(rows, c);
    return (size_t)min(blocks, (int64_t)RMSNORM_BLOCKS) * c * sizeof(float);
}
static inline void rmsnorm_launch_backward(floatX *dx, Fp8Matrix q, int64_t dx_stride, int add,
                                           float *dweight, const floatX *dout, const floatX *x,
                                           int64_t stride, const floatX *weight, const float *rstd, int64_t n,
                                           int heads, int d, void *scratch, cudaStream_t stream) {
    if (n == 0) return;
    check_packs("rmsnorm", stride), check_packs("rmsnorm", dx_stride);
    int blocks = (int)(rmsnorm_backward_scratch(n * heads, d) / (d * sizeof(float)));
    RmsnormRows rows = {(int)(n * heads), heads, d};
    if (q.data)
        RMSNORM_LAUNCH(rmsnorm_backward_kernel, true, blocks, d, stream, rows, dx, q, dx_stride, add,
                       (float *)scratch, dout, x, stride, weight, rstd);
    else
        RMSNORM_LAUNCH(rmsnorm_backward_kernel, false, blocks, d, stream, rows, dx, q, dx_stride, add,
                       (float *)scratch, dout, x, stride, weight, rstd);
    add_partial_sums(dweight, (const float *)scratch, blocks, d, stream);
}
// The gradient of rmsnorm_heads_forward: overwrites dx, whose tokens are dx_stride elements apart, and adds
// to dweight [d]. dout [n, heads, d] is contiguous; rstd is the output of forward; scratch has
// rmsnorm_backward_scratch(n * heads, d) bytes.
static inline void rmsnorm_heads_backward(floatX *dx, int64_t dx_stride, float *dweight, const floatX *dout,
                                          const floatX *x, int64_t stride, const floatX *weight,
                                          const float *rstd, int64_t n, int heads, int d, void *scratch,
                                          cudaStream_t stream) {
    rmsnorm_launch_backward(dx, Fp8Matrix{}, dx_stride, 0, dweight, dout, x, stride, weight, rstd, n, heads,
                            d, scratch, stream);
}

// ---- rows of a matrix [n, c] ---------------------------------------------------------------------------
// If q.data is not NULL, the output goes to q [n, c] too, in e4m3 with a scale for each row: what
// quantize_rows makes of the output. c is then a multiple of FP8_ALIGN, and the output of a forward pass may
// be NULL.

// Normalizes the rows of x: out, x [n, c], rstd [n], weight [c].
static inline void rmsnorm_forward(floatX *out, float *rstd, const floatX *x, const floatX *weight, int64_t n,
                                   int c, float eps, cudaStream_t stream, Fp8Matrix q = {}) {
    if (n == 0) return;
    int64_t blocks = rmsnorm_blocks(n, c);
    RmsnormRows rows = {(int)n, 1, c};
    if (q.data) check_fp8_row("rmsnorm", c);
    if (q.data)
        RMSNORM_LAUNCH(rmsnorm_forward_kernel, true, blocks, c, stream, rows, out, q, rstd, x, c, weight,
                       eps);
    else
        RMSNORM_LAUNCH(rmsnorm_forward_kernel, false, blocks, c, stream, rows, out, q, rstd, x, c, weight,
                       eps);
}

// The gradient of rmsnorm_forward, given dout [n, c]: overwrites dx [n, c], or adds to it if add != 0, and
// adds to dweight [c]. rstd is the output of forward; scratch has rmsnorm_backward_scratch(n, c) bytes.
static inline void rmsnorm_backward(floatX *dx, int add, float *dweight, const floatX *dout, const floatX *x,
                                    const floatX *weight, const float *rstd, int64_t n, int c, void *scratch,
                                    cudaStream_t stream, Fp8Matrix q = {}) {
    if (q.data) check_fp8_row("rmsnorm", c);
    rmsnorm_launch_backward(dx, q, c, add, dweight, dout, x, c, weight, rstd, n, 1, c, scratch, stream);
}
#endif
