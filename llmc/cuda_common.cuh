// cuda_common.cuh: shared by all CUDA layers: the type floatX, checked CUDA calls, 16-byte loads and stores,
// and reductions. All reductions add in a fixed order, so the results are bitwise reproducible.
#ifndef LLMC_CUDA_COMMON_CUH
#define LLMC_CUDA_COMMON_CUH
#include "ptx.cuh"
#include "utils.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <limits.h>

// Elements of global_norm's output, which AdamW reads.
enum {
    NORM_VALUE,      // the gradient's norm before clipping
    NORM_GRAD_SCALE, // the factor that AdamW multiplies gradients by, clipping included
    NORM_FINITE,     // 1 if the norm (and after skip_update_if_loss_not_finite the loss) is finite, else 0
    NORM_FIELDS
};

// The type of weights and activations. Statistics, parameter gradients and the optimizer's state are fp32 in
// all builds.
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

// Exits with the file, the line, the call and CUDA's error text unless `call` returns cudaSuccess.
#define cuda_check(call)                                                                                     \
    do {                                                                                                     \
        cudaError_t error_ = (call);                                                                         \
        if (error_ != cudaSuccess)                                                                           \
            die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(error_));                     \
    } while (0)

#define LOG2E 1.44269504f // log2(e)

// 1 / (1 + exp(-x)): four instructions. x = -Inf gives 0, NaN stays.
__device__ __forceinline__ float sigmoid(float x) {
    return reciprocal_fast(1 + exp2_fast(-LOG2E * x));
}

// ---- 16-byte loads and stores ----------------------------------------------------------------------------
enum { PACK = 16 / sizeof(floatX) }; // elements in 16 bytes; row lengths and row strides are multiples of it

// Both use intrinsics: the compiler would split a plain 16-byte access whose elements are used one by one.
__device__ __forceinline__ uint4 load16(const floatX *src) {
    return __ldca((const uint4 *)src);
}
__device__ __forceinline__ void store16(floatX *dst, const uint4 &bits) {
    __stwb((uint4 *)dst, bits);
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
__device__ __forceinline__ void load_pack(float (&x)[PACK], const floatX *src) {
    unpack(x, load16(src));
}
__device__ __forceinline__ void store_pack(floatX *dst, const float (&x)[PACK]) {
    store16(dst, pack(x));
}
// dst[0..PACK-1] += x, in fp32.
__device__ __forceinline__ void add_pack(float *dst, const float (&x)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; i += 4) {
        float4 sum = *(float4 *)(dst + i);
        sum.x += x[i], sum.y += x[i + 1], sum.z += x[i + 2], sum.w += x[i + 3];
        *(float4 *)(dst + i) = sum;
    }
}

// Exits with an error unless width, the elements of a row that the kernel of `layer` accesses in packs, is a
// positive multiple of PACK. Every launcher calls it.
static inline void check_packs(const char *layer, int64_t width) {
    if (width <= 0 || width % PACK != 0)
        die("%s: rows of %lld elements: must be a multiple of %d in %s", layer, (long long)width, (int)PACK,
            FLOATX_NAME);
}

// ---- reductions ------------------------------------------------------------------------------------------
// Sums x over WIDTH neighbouring lanes of a warp. Every lane gets the same value, bit for bit.
template <int WIDTH> __device__ __forceinline__ float lanes_reduce_sum(float x) {
#pragma unroll
    for (int i = WIDTH / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}
__device__ __forceinline__ float warp_reduce_sum(float x) {
    return lanes_reduce_sum<32>(x);
}
// Sums x over a thread block of whole warps. Every thread gets the same value, bit for bit. shared [warps]
// may be reused right after the call.
__device__ __forceinline__ float block_reduce_sum(float x, float *shared) {
    int warps = blockDim.x / 32;
    x = warp_reduce_sum(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : 0;
    __syncthreads();
    return warp_reduce_sum(x);
}

// The same of the maximum of non-negative integers. Absolute values of floating-point numbers are in order as
// integers, with NaN above Inf.
template <int WIDTH> __device__ __forceinline__ uint32_t lanes_reduce_max(uint32_t x) {
#pragma unroll
    for (int i = WIDTH / 2; i > 0; i /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}
__device__ __forceinline__ uint32_t block_reduce_max(uint32_t x, uint32_t *shared) {
    int warps = blockDim.x / 32;
    x = lanes_reduce_max<32>(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : 0;
    __syncthreads();
    return lanes_reduce_max<32>(x);
}

// The same over a team of TEAM threads that processes a row: lanes of a warp, or a thread block.
template <int TEAM> __device__ __forceinline__ float team_reduce_sum(float x, float *shared) {
    if (TEAM > 32) return block_reduce_sum(x, shared);
    return lanes_reduce_sum<(TEAM < 32 ? TEAM : 32)>(x);
}
template <int TEAM> __device__ __forceinline__ uint32_t team_reduce_max(uint32_t x, uint32_t *shared) {
    if (TEAM > 32) return block_reduce_max(x, shared);
    return lanes_reduce_max<(TEAM < 32 ? TEAM : 32)>(x);
}
// Returns the threads of a thread block whose teams have `team` threads.
static constexpr int team_threads(int team) {
    return team > 32 ? team : 256;
}

// The second pass of column sums: out[j] += the sum over p of partial[p*c + j]. A thread block reduces 32
// columns. Warp w of 8 sums p = w, w + 8, w + 16, ...; then the sums of the warps are added in order. Reads 4
// bytes per partial sum from L2, where the first pass has just written it.
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
// out [c] += the column sums of partial [parts, c].
static inline void add_partial_sums(float *out, const float *partial, int parts, int64_t c,
                                    cudaStream_t stream) {
    add_partial_sums_kernel<<<(unsigned)((c + 31) / 32), 256, 0, stream>>>(out, partial, parts, c);
    cuda_check(cudaGetLastError());
}
#endif
