// fp8.cuh: quantization to e4m3 on the GPU (fp8.h has the number format and the scales). Current scales: they
// depend on the matrix alone, never on earlier steps.
//
// cuBLASLt's e4m3 matmuls on Hopper sum along the rows of both operands. Forward and input gradient sum along
// channels, and read matrices with a scale for each row: quantize_rows, or the kernels that produce a row
// (rmsnorm.cuh, swiglu.cuh). The weight gradient sums along tokens: quantize_transpose turns a matrix that
// is quantized by rows into its transpose with scales along the tokens.
//
// All maxima are maxima of integers, so they are exact in any order: results are bitwise reproducible.
#ifndef LLMC_FP8_CUH
#define LLMC_FP8_CUH
#include "cuda_common.cuh"
#include "fp8.h"
#include <cuda_fp8.h>

// ---- packs of 16 bytes -----------------------------------------------------------------------------------

// A maximum of absolute values of floatX: fp32 bits, or in 16-bit builds two maxima of two elements each.
__device__ __forceinline__ uint32_t pack_amax(uint32_t amax, const uint4 &bits) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if defined(ENABLE_FP32)
        amax = max(amax, words[i] & 0x7fffffff);
#else
        amax = __vmaxu2(amax, words[i] & 0x7fff7fff);
#endif
    }
    return amax;
}
// The fp32 bits of the larger maximum.
__device__ __forceinline__ uint32_t amax_bits(uint32_t amax) {
#if defined(ENABLE_FP32)
    return amax;
#else
    const float2 two = unpack2(max(amax >> 16, amax & 0xffff));
    return __float_as_uint(two.x);
#endif
}

__device__ __forceinline__ uint32_t pack_fp8x4(float a, float b, float c, float d) {
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3),
                   high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
    return high << 16 | low;
}
// dst[0..PACK-1] = e4m3 of x * inverse.
__device__ __forceinline__ void store_fp8_pack(uint8_t *dst, const uint4 &bits, float inverse) {
    float x[PACK];
    uint32_t words[PACK / 4];
    unpack(x, bits);
#pragma unroll
    for (int i = 0; i < PACK; i++) x[i] *= inverse;
#pragma unroll
    for (int i = 0; i < PACK; i += 4) words[i / 4] = pack_fp8x4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    if constexpr (PACK == 8)
        __stwb((uint2 *)dst, make_uint2(words[0], words[1]));
    else
        __stwb((uint32_t *)dst, words[0]);
}
// Elements 2*i and 2*i + 1 of 16 e4m3 elements.
__device__ __forceinline__ float2 unpack_fp8x2(const uint4 &bits, int i) {
    const uint32_t word = i < 2 ? bits.x : i < 4 ? bits.y : i < 6 ? bits.z : bits.w;
    const __half2_raw two = __nv_cvt_fp8x2_to_halfraw2((uint16_t)(word >> i % 2 * 16), __NV_E4M3);
    return __half22float2(__half2(two));
}

// ---- rows ------------------------------------------------------------------------------------------------

enum {
    FP8_PACKS = 4,                             // packs of a row that a thread holds in registers
    FP8_MAX_ROW = 1024 * FP8_PACKS * (int)PACK // 32,768 in 16 bits
};

// Quantizes row `row` of k elements: thread `lane` of a team holds packs lane, lane + TEAM, ... of `packs`. A
// team without a row has packs = 0, and only joins the reduction.
template <int TEAM, int PACKS>
__device__ __forceinline__ void quantize_team_row(Fp8Matrix q, int64_t row, int64_t k, int packs,
                                                  const uint4 (&bits)[PACKS], uint32_t *shared) {
    const int lane = threadIdx.x % TEAM;
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        if (lane + i * TEAM >= packs) break;
        amax = pack_amax(amax, bits[i]);
    }
    const Fp8Scale s = fp8_scale(team_reduce_max<TEAM>(amax_bits(amax), shared));
    if (packs > 0 && lane == 0) q.scale[row] = s.scale;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        if (lane + i * TEAM >= packs) break;
        store_fp8_pack(q.data + row * k + (lane + i * TEAM) * PACK, bits[i], s.inverse);
    }
}

// Each team of threads quantizes one row: a warp, or a thread block of 128, 512 or 1,024. Memory-bound. A row
// reads 2*k bytes and writes k: 64K tokens of k = 4096 move 0.81 GB, which takes 0.18 ms at 4.5 TB/s.
template <int TEAM>
static __global__ void __launch_bounds__(team_threads(TEAM))
    quantize_rows_kernel(Fp8Matrix q, const floatX *x, int64_t ldx, int64_t n, int64_t k) {
    __shared__ uint32_t shared[32];
    const int lane = threadIdx.x % TEAM;
    const int64_t row = blockIdx.x * (int64_t)(blockDim.x / TEAM) + threadIdx.x / TEAM;
    const int packs = row < n ? (int)(k / PACK) : 0;
    uint4 bits[FP8_PACKS];
#pragma unroll
    for (int i = 0; i < FP8_PACKS; i++) { // all loads are in flight before the first is used
        if (lane + i * TEAM >= packs) break;
        bits[i] = load16(x + row * ldx + (lane + i * TEAM) * PACK);
    }
    quantize_team_row<TEAM>(q, row, k, packs, bits, shared);
}

// Exits with an error unless rows of k elements can be quantized.
static inline void check_fp8_row(const char *layer, int64_t k) {
    if (k <= 0 || k % FP8_ALIGN != 0 || k > FP8_MAX_ROW)
        die("%s: rows of %lld elements in 8 bits: must be a multiple of %d, at most %d", layer, (long long)k,
            (int)FP8_ALIGN, (int)FP8_MAX_ROW);
}

// Quantizes x [n, k], whose rows are ldx elements apart, to q [n, k] with a scale for each row.
static inline void quantize_rows(Fp8Matrix q, const floatX *x, int64_t ldx, int64_t n, int64_t k,
                                 cudaStream_t stream) {
    if (n == 0) return;
    check_fp8_row("quantization", k), check_packs("quantization", ldx);
    const int64_t lanes = (k / PACK + FP8_PACKS - 1) / FP8_PACKS;
    if (lanes <= 32)
        quantize_rows_kernel<32><<<(unsigned)((n + 7) / 8), 256, 0, stream>>>(q, x, ldx, n, k);
    else if (lanes <= 128)
        quantize_rows_kernel<128><<<(unsigned)n, 128, 0, stream>>>(q, x, ldx, n, k);
    else if (lanes <= 512)
        quantize_rows_kernel<512><<<(unsigned)n, 512, 0, stream>>>(q, x, ldx, n, k);
    else
        quantize_rows_kernel<1024><<<(unsigned)n, 1024, 0, stream>>>(q, x, ldx, n, k);
    cuda_check(cudaGetLastError());
}

// scale [1] = the largest of scales [n]. One thread block.
static __global__ void __launch_bounds__(1024)
    max_scale_kernel(float *scale, const float *scales, int64_t n) {
    __shared__ uint32_t shared[32];
    uint32_t x = 0;
    for (int64_t i = threadIdx.x; i < n; i += 1024) x = max(x, __float_as_uint(scales[i]) & 0x7fffffff);
    x = block_reduce_max(x, shared);
    if (threadIdx.x == 0) *scale = __uint_as_float(x);
}

// A thread block for each row of q [n, k]. Reads and writes k bytes per row, but nothing of rows whose scale
// is the largest one already.
static __global__ void __launch_bounds__(256)
    equalize_scales_kernel(Fp8Matrix q, const float *largest, int64_t k) {
    const float scale = q.scale[blockIdx.x], inverse = 1 / *largest;
    if (scale == *largest) return;
    __syncthreads(); // all threads have read the scale
    if (threadIdx.x == 0) q.scale[blockIdx.x] = *largest;
    for (int64_t i = threadIdx.x; i < k / 16; i += 256) {
        uint4 *p = (uint4 *)(q.data + blockIdx.x * k) + i;
        const uint4 bits = *p;
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 a = unpack_fp8x2(bits, 2 * j), b = unpack_fp8x2(bits, 2 * j + 1);
            words[j] = pack_fp8x4(a.x * scale * inverse, a.y * scale * inverse, b.x * scale * inverse,
                                  b.y * scale * inverse);
        }
        *p = make_uint4(words[0], words[1], words[2], words[3]);
    }
}
// Makes the scales of all rows of q [n, k] equal to the largest one. The values stay, except for those that
// e4m3 can no longer represent. For matmuls that take only one scale for a matrix. scratch: [1].
static inline void equalize_scales(Fp8Matrix q, int64_t n, int64_t k, float *scratch, cudaStream_t stream) {
    max_scale_kernel<<<1, 1024, 0, stream>>>(scratch, q.scale, n);
    equalize_scales_kernel<<<(unsigned)n, 256, 0, stream>>>(q, scratch, k);
    cuda_check(cudaGetLastError());
}

// ---- transpose -------------------------------------------------------------------------------------------
// Tiles have 128 tokens and 128 channels. Thread t of 256 reads 16 channels of four neighbouring tokens: of
// channels 16 * (t % 8) and on, tokens 4 * (t / 8) and on.
enum { FP8_TILE = 128 };

// The maxima, over the tokens that a thread block of 256 threads has read, of 16 channels of each thread: the
// maximum of channel c of the tile returns to thread c.
__device__ __forceinline__ uint32_t tile_channel_max(uint32_t (&amax)[16], uint32_t (*shared)[FP8_TILE]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 16; j++) { // the four lanes of the same channels
        amax[j] = max(amax[j], __shfl_xor_sync(0xffffffffu, amax[j], 8));
        amax[j] = max(amax[j], __shfl_xor_sync(0xffffffffu, amax[j], 16));
    }
    if (lane < 8) {
#pragma unroll
        for (int j = 0; j < 16; j += 4)
            *(uint4 *)&shared[warp][lane * 16 + j] =
                make_uint4(amax[j], amax[j + 1], amax[j + 2], amax[j + 3]);
    }
    __syncthreads();
    uint32_t x = 0;
    if (threadIdx.x < FP8_TILE) {
        for (int w = 0; w < 8; w++) x = max(x, shared[w][threadIdx.x]);
    }
    return x;
}

// amax[j] = max(amax[j], bits of |element j * scale|) for 16 e4m3 elements.
__device__ __forceinline__ void fp8_channel_max(uint32_t (&amax)[16], const uint4 &bits, float scale) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 two = unpack_fp8x2(bits, j);
        amax[2 * j] = max(amax[2 * j], __float_as_uint(two.x * scale) & 0x7fffffff);
        amax[2 * j + 1] = max(amax[2 * j + 1], __float_as_uint(two.y * scale) & 0x7fffffff);
    }
}

// amax [k], which begins as zeros: the largest absolute value of each channel of x [n, k], as fp32 bits. A
// thread block reads 128 channels of `tokens` tokens. Memory-bound: k bytes per token.
static __global__ void __launch_bounds__(256)
    channel_amax_kernel(uint32_t *amax, Fp8Matrix x, int64_t n, int64_t k, int tokens) {
    __shared__ __align__(16) uint32_t shared[8][FP8_TILE];
    const int64_t channel = blockIdx.y * (int64_t)FP8_TILE + threadIdx.x % 8 * 16;
    const int64_t first = blockIdx.x * (int64_t)tokens, last = first + tokens < n ? first + tokens : n;
    uint32_t max16[16] = {};
    if (channel < k) {
#pragma unroll 4
        for (int64_t token = first + threadIdx.x / 8; token < last; token += 32)
            fp8_channel_max(max16, __ldca((const uint4 *)(x.data + token * k + channel)), x.scale[token]);
    }
    const uint32_t x_max = tile_channel_max(max16, shared);
    const int64_t c = blockIdx.y * (int64_t)FP8_TILE + threadIdx.x;
    if (threadIdx.x < FP8_TILE && c < k) atomicMax(&amax[c], x_max);
}

// q [k, padded] = the transpose of x [n, k], quantized again. The thread block of a tile computes the scales
// of its channels from amax [k] (FP8_SCALE_ROW), or reads the scale of the matrix (FP8_SCALE_TENSOR). Four
// tokens of a channel are one word of shared memory; the words of a channel are stored in an order that
// depends on the channel, so that no access has a bank conflict. Memory-bound. A token reads k bytes and
// writes k: 64K tokens of k = 14336 move 1.9 GB, which takes 0.42 ms at 4.5 TB/s.
template <int SCALING>
static __global__ void __launch_bounds__(256, 3)
    quantize_transpose_kernel(Fp8Matrix q, Fp8Matrix x, const uint32_t *amax, int64_t n, int64_t k,
                              int64_t padded) {
    __shared__ __align__(16) uint32_t words[FP8_TILE * 32];
    __shared__ __align__(16) float inverse[FP8_TILE];
    const int chunk = threadIdx.x % 8, group = threadIdx.x / 8;
    const int64_t first_channel = blockIdx.y * (int64_t)FP8_TILE,
                  first_token = blockIdx.x * (int64_t)FP8_TILE;
    const int64_t channel = first_channel + chunk * 16, token = first_token + group * 4;
    uint4 rows[4];
    float scales[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool inside = channel < k && token + i < n; // zeros elsewhere
        rows[i] =
            inside ? __ldca((const uint4 *)(x.data + (token + i) * k + channel)) : make_uint4(0, 0, 0, 0);
        scales[i] = inside ? x.scale[token + i] : 0;
    }
    if (SCALING == FP8_SCALE_ROW) {
        const int64_t c = first_channel + threadIdx.x;
        if (threadIdx.x < FP8_TILE) {
            const Fp8Scale s = fp8_scale(c < k ? amax[c] : 0);
            inverse[threadIdx.x] = s.inverse;
            if (c < k && blockIdx.x == 0) q.scale[c] = s.scale;
        }
        __syncthreads();
    }
    const float tensor_inverse = SCALING == FP8_SCALE_TENSOR ? 1 / q.scale[0] : 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 v[4], by = make_float2(tensor_inverse, tensor_inverse);
        if (SCALING == FP8_SCALE_ROW) by = *(const float2 *)&inverse[chunk * 16 + 2 * j];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = unpack_fp8x2(rows[i], j);
            v[i].x = v[i].x * scales[i] * by.x, v[i].y = v[i].y * scales[i] * by.y;
        }
        const int word = (chunk * 16 + 2 * j) * 32 + (group ^ 4 * chunk);
        words[word] = pack_fp8x4(v[0].x, v[1].x, v[2].x, v[3].x);
        words[word + 32] = pack_fp8x4(v[0].y, v[1].y, v[2].y, v[3].y);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) { // eight threads store the 128 bytes of a channel
        const int c = i * 32 + group;
        const int64_t out = first_token + chunk * 16;
        if (first_channel + c >= k || out >= padded) continue;
        const uint4 bits = *(const uint4 *)&words[c * 32 + (4 * chunk ^ 4 * (c / 16))];
        __stwb((uint4 *)(q.data + (first_channel + c) * padded + out), bits);
    }
}

// Transposes x [n, k], which has a scale for each row, to q [k, fp8_padded(n)] with scales of its own, which
// fp8_transpose (fp8.h) defines. scratch: [k] for FP8_SCALE_ROW. FP8_SCALE_ROW reads x twice: 3*k bytes per
// token instead of 2*k.
static inline void quantize_transpose(Fp8Matrix q, Fp8Scaling scaling, Fp8Matrix x, int64_t n, int64_t k,
                                      uint32_t *scratch, cudaStream_t stream) {
    if (n == 0) return;
    if (k <= 0 || k % FP8_ALIGN != 0)
        die("transpose: rows of %lld elements in 8 bits: must be a multiple of %d", (long long)k,
            (int)FP8_ALIGN);
    const int64_t padded = fp8_padded(n);
    const unsigned channel_tiles = (unsigned)((k + FP8_TILE - 1) / FP8_TILE);
    const dim3 grid((unsigned)((padded + FP8_TILE - 1) / FP8_TILE), channel_tiles);
    const dim3 amax_grid((unsigned)((n + 1023) / 1024), channel_tiles);
    if (scaling == FP8_SCALE_TENSOR) {
        max_scale_kernel<<<1, 1024, 0, stream>>>(q.scale, x.scale, n);
        quantize_transpose_kernel<FP8_SCALE_TENSOR>
            <<<grid, 256, 0, stream>>>(q, x, (const uint32_t *)NULL, n, k, padded);
    } else {
        cuda_check(cudaMemsetAsync(scratch, 0, k * sizeof *scratch, stream));
        channel_amax_kernel<<<amax_grid, 256, 0, stream>>>(scratch, x, n, k, 1024);
        quantize_transpose_kernel<FP8_SCALE_ROW><<<grid, 256, 0, stream>>>(q, x, scratch, n, k, padded);
    }
    cuda_check(cudaGetLastError());
}

// Quantizes a weight [out, in] for forward and input gradient: w [out, in] and w_t [in, out], each with a
// scale for each row. Once a step. out and in are multiples of FP8_ALIGN. scratch: [in]. It moves 6 bytes per
// weight: the 218M weights of a layer of Llama 3 8B take 0.29 ms at 4.5 TB/s.
static inline void quantize_weight(Fp8Matrix w, Fp8Matrix w_t, const floatX *weight, int64_t out, int64_t in,
                                   uint32_t *scratch, cudaStream_t stream) {
    if (out % FP8_ALIGN != 0)
        die("quantization: a weight of %lld rows in 8 bits: must be a multiple of %d", (long long)out,
            (int)FP8_ALIGN);
    quantize_rows(w, weight, in, out, in, stream);
    quantize_transpose(w_t, FP8_SCALE_ROW, w, out, in, scratch, stream);
}
#endif
