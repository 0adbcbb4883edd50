// global_norm.cuh: the norm of all gradients and the factor that clips them, computed on the device.
#ifndef LLMC_GLOBAL_NORM_CUH
#define LLMC_GLOBAL_NORM_CUH
#include "cuda_common.cuh"

enum { GLOBAL_NORM_BLOCKS = 1024 };

// Sums x over a thread block of 256 threads in a fixed order; only thread 0 gets the sum.
__device__ __forceinline__ double block_reduce_sum_256(double x) {
    __shared__ double shared[8];
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 1; i < 8 && threadIdx.x == 0; i++) x += shared[i];
    return x;
}

// partial [blocks]: each thread block sums the squares of every GLOBAL_NORM_BLOCKS-th 4 KiB of x, in fp64, so
// that no square overflows unless the norm does. Memory-bound, even on GPUs whose fp64 rate is 1/64 of
// fp32's. It reads 4 bytes per element: 2 G elements have 8 GB, which takes at least 1.8 ms at 4.5 TB/s.
static __global__ void __launch_bounds__(256)
    sum_of_squares_kernel(double *partial, const float *x, int64_t count) {
    double sum = 0;
    int64_t stride = gridDim.x * 1024ll, i = (blockIdx.x * 256ll + threadIdx.x) * 4;
    for (; i + 3 < count; i += stride) {
        float4 v = *(const float4 *)(x + i);
        sum += (double)v.x * v.x + (double)v.y * v.y + (double)v.z * v.z + (double)v.w * v.w;
    }
    for (; i < count; i++) sum += (double)x[i] * x[i]; // the last one to three elements belong to one thread
    sum = block_reduce_sum_256(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// *sum += the sum of partial [parts], in a fixed order. One thread block; limited by latency.
static __global__ void __launch_bounds__(256)
    add_squares_kernel(double *sum, const double *partial, int parts) {
    double x = 0;
    for (int i = threadIdx.x; i < parts; i += 256) x += partial[i];
    x = block_reduce_sum_256(x);
    if (threadIdx.x == 0) *sum += x;
}

static __global__ void global_norm_kernel(float *out, const double *squares, float unscale, float clip) {
    float norm = (float)(sqrt(*squares) * unscale);
    out[NORM_VALUE] = norm;
    out[NORM_GRAD_SCALE] = unscale * (clip > 0 && norm > clip ? clip / norm : 1);
    out[NORM_FINITE] = isfinite(norm) ? 1 : 0;
}

static inline int64_t global_norm_blocks(int64_t count) {
    return min((count + 1023) / 1024, (int64_t)GLOBAL_NORM_BLOCKS);
}
// Returns the bytes of scratch that sum_of_squares needs for `count` elements.
static inline size_t global_norm_scratch(int64_t count) {
    return (size_t)global_norm_blocks(count) * sizeof(double);
}

// *squares += the sum of the squares of x [count]. x is aligned to 16 bytes; scratch has global_norm_scratch
// bytes.
static inline void sum_of_squares(double *squares, const float *x, int64_t count, void *scratch,
                                  cudaStream_t stream) {
    unsigned blocks = (unsigned)global_norm_blocks(count);
    if (count == 0) return;
    sum_of_squares_kernel<<<blocks, 256, 0, stream>>>((double *)scratch, x, count);
    cuda_check(cudaGetLastError());
    add_squares_kernel<<<1, 256, 0, stream>>>(squares, (const double *)scratch, (int)blocks);
    cuda_check(cudaGetLastError());
}

// Writes out [NORM_FIELDS], given *squares, the sum of the squares of all gradients:
//   NORM_VALUE       the gradients' norm times unscale
//   NORM_GRAD_SCALE  unscale; times clip / norm if 0 < clip < norm
//   NORM_FINITE      1 if the norm is finite, else 0
static inline void global_norm(float *out, const double *squares, float unscale, float clip,
                               cudaStream_t stream) {
    global_norm_kernel<<<1, 1, 0, stream>>>(out, squares, unscale, clip);
    cuda_check(cudaGetLastError());
}
#endif
