// cuda_common.cuh: what the CUDA layers share: their number type, checked calls, 16-byte accesses, and
// reductions whose order is fixed, so that the same input gives the same bits.
#ifndef LLMC_CUDA_COMMON_CUH
#define LLMC_CUDA_COMMON_CUH
#include "utils.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <limits.h>

// Weights and activations. Statistics, gradients of parameters and the optimizer are fp32 in all builds.
#if defined(ENABLE_FP32)
typedef float floatX;
#define FLOATX_NAME "fp32"
#define FLOATX_TYPE CUDA_R_32F
#elif defined(ENABLE_FP16)
typedef __half floatX;
#define FLOATX_NAME "fp16"
#define FLOATX_TYPE CUDA_R_16F
#else
typedef __nv_bfloat16 floatX;
#define FLOATX_NAME "bf16"
#define FLOATX_TYPE CUDA_R_16BF
#endif

#define cuda_check(call)                                                                                     \
    do {                                                                                                     \
        cudaError_t error_ = (call);                                                                         \
        if (error_ != cudaSuccess)                                                                           \
            die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(error_));                     \
    } while (0)

// ---- 16 bytes at once --------------------------------------------------------------------------------
enum { PACK = 16 / sizeof(floatX) }; // numbers in 16 bytes; rows and row strides are multiples of it

// Intrinsics, since the compiler splits plain accesses where their numbers are used one by one.
__device__ __forceinline__ uint4 load16(const floatX *from) {
    return __ldca((const uint4 *)from);
}
__device__ __forceinline__ void store16(floatX *to, const uint4 &bits) {
    __stwb((uint4 *)to, bits);
}
#if defined(ENABLE_FP32)
__device__ __forceinline__ void unpack(float (&x)[PACK], const uint4 &bits) {
    x[0] = __uint_as_float(bits.x), x[1] = __uint_as_float(bits.y);
    x[2] = __uint_as_float(bits.z), x[3] = __uint_as_float(bits.w);
}
__device__ __forceinline__ uint4 pack(const float (&x)[PACK]) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                      __float_as_uint(x[3]));
}
#else
__device__ __forceinline__ float2 unpack2(uint32_t word) {
#if defined(ENABLE_FP16)
    return __half22float2(*reinterpret_cast<const __half2 *>(&word));
#else
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&word));
#endif
}
__device__ __forceinline__ uint32_t pack2(float x, float y) {
#if defined(ENABLE_FP16)
    __half2 both = __floats2half2_rn(x, y);
#else
    __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
#endif
    return *reinterpret_cast<const uint32_t *>(&both);
}
__device__ __forceinline__ void unpack(float (&x)[PACK], const uint4 &bits) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 two = unpack2(words[i]);
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}
__device__ __forceinline__ uint4 pack(const float (&x)[PACK]) {
    return make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}
#endif
__device__ __forceinline__ void load_pack(float (&x)[PACK], const floatX *from) {
    unpack(x, load16(from));
}
__device__ __forceinline__ void store_pack(floatX *to, const float (&x)[PACK]) {
    store16(to, pack(x));
}
// to[0..PACK-1] += x, in fp32.
__device__ __forceinline__ void add_pack(float *to, const float (&x)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; i += 4) {
        float4 sum = *(float4 *)(to + i);
        sum.x += x[i], sum.y += x[i + 1], sum.z += x[i + 2], sum.w += x[i + 3];
        *(float4 *)(to + i) = sum;
    }
}

// Every launcher calls it for the widths that its kernel reads in packs.
static inline void check_packs(const char *layer, int64_t width) {
    if (width <= 0 || width % PACK != 0)
        die("%s: rows of %lld numbers; %s wants multiples of %d", layer, (long long)width, FLOATX_NAME,
            (int)PACK);
}

// ---- sums ----------------------------------------------------------------------------------------------
// Over WIDTH neighbouring lanes; every lane gets the same bits.
template <int WIDTH> __device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
    for (int i = WIDTH / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}
__device__ __forceinline__ float warp_sum(float x) {
    return lanes_sum<32>(x);
}
// Over a block of whole warps; shared has a place for each warp, and may be used again at once.
__device__ __forceinline__ float block_sum(float x, float *shared) {
    int warps = blockDim.x / 32;
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : 0;
    __syncthreads();
    return warp_sum(x);
}

// out[j] += the sum over p of partial[p*c + j], the second pass of sums over rows. A block takes 32 columns;
// each of its warps every eighth p, then the warps' sums are added in order. Reads 4 bytes a partial sum, out
// of L2, where the first pass has just written them.
static __global__ void __launch_bounds__(256)
    add_partial_sums_kernel(float *out, const float *partial, int parts, int64_t c) {
    __shared__ float sums[8][32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t column = blockIdx.x * 32ll + lane;
    float sum = 0;
    if (column < c) {
#pragma unroll 8
        for (int p = warp; p < parts; p += 8) sum += partial[p * c + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= c) return;
    for (int i = 1; i < 8; i++) sum += sums[i][lane];
    out[column] += sum;
}
static inline void add_partial_sums(float *out, const float *partial, int parts, int64_t c,
                                    cudaStream_t stream) {
    add_partial_sums_kernel<<<(unsigned)((c + 31) / 32), 256, 0, stream>>>(out, partial, parts, c);
    cuda_check(cudaGetLastError());
}
#endif
