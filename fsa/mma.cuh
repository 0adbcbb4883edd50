// mma.cuh: helpers of the tensor-core kernels on all architectures: layouts of tiles in shared memory, packed
// 16-bit elements, reductions over a row of an mma fragment, the sigmoid, and the constants log2(e) and
// ln(2). sm80/ptx.cuh has the instructions.
#ifndef FSA_MMA_CUH
#define FSA_MMA_CUH
#include "sm80/ptx.cuh"

#define FSA_LOG2E 1.4426950408889634f
#define FSA_LN2 0.6931471805599453f

// Returns the byte offset of 16-byte chunk `chunk` of row `row` in a tile with rows of D 16-bit elements (D a
// multiple of 64). Chunks are swizzled within a row: ldmatrix and 16-byte accesses have no bank conflicts.
template <int D> __device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
    return (uint32_t)(row * D * 2 + ((chunk ^ (row & 7)) << 4));
}

// The same for a tile in panels of 64 columns, panel_bytes apart, the layout of TMA and wgmma (sm90/ptx.cuh).
__device__ __forceinline__ uint32_t panel_offset(int row, int chunk, int panel_bytes) {
    return (uint32_t)(chunk / 8 * panel_bytes + row * 128 + ((chunk % 8 ^ (row & 7)) << 4));
}

// Converts two floats to two 16-bit elements, the first in the low half. unpack2 is the inverse.
template <typename T> __device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <> __device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float lo, float hi) {
    __nv_bfloat162 x = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<uint32_t *>(&x);
}
template <> __device__ __forceinline__ uint32_t pack2<__half>(float lo, float hi) {
    __half2 x = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<uint32_t *>(&x);
}
template <typename T> __device__ __forceinline__ float2 unpack2(uint32_t x);
template <> __device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t x) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&x));
}
template <> __device__ __forceinline__ float2 unpack2<__half>(uint32_t x) {
    return __half22float2(*reinterpret_cast<__half2 *>(&x));
}

template <typename T> __device__ __forceinline__ float to_f32(T x);
template <> __device__ __forceinline__ float to_f32(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <> __device__ __forceinline__ float to_f32(__half x) {
    return __half2float(x);
}

// Converts 16 columns of accumulators (two n8 tiles) to the A operand of a matmul over those columns.
template <typename T>
__device__ __forceinline__ void accum_as_a(uint32_t (&a)[4], const float (&left)[4],
                                           const float (&right)[4]) {
    a[0] = pack2<T>(left[0], left[1]);
    a[1] = pack2<T>(left[2], left[3]);
    a[2] = pack2<T>(right[0], right[1]);
    a[3] = pack2<T>(right[2], right[3]);
}

// Maximum and sum over the four lanes that hold a row of an accumulator fragment.
__device__ __forceinline__ float quad_reduce_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_reduce_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

static __device__ __forceinline__ float sigmoid(float x) {
    return 1 / (1 + __expf(-x));
}
#endif
