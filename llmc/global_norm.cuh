// global_norm.cuh: the norm of all gradients, and what clipping multiplies them by, without leaving the
// device.
#ifndef LLMC_GLOBAL_NORM_CUH
#define LLMC_GLOBAL_NORM_CUH
#include "cuda_common.cuh"

enum { GLOBAL_NORM_BLOCKS = 1024 };

// Over a block of 256 threads, in a fixed order; thread 0 has the sum.
__device__ __forceinline__ double block_sum_256(double x) {
    __shared__ double shared[8];
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 1; i < 8 && threadIdx.x == 0; i++) x += shared[i];
    return x;
}

// partial[block] = the sum of squares of every GLOBAL_NORM_BLOCKS-th 4 KiB of x. In fp64: no square overflows
// where the norm itself does not. Reads 4 bytes a number: 2 G: 8 GB, 1.8 ms at 4.5 TB/s; memory binds, also
// on GPUs with 1/64 of fp64 units.
static __global__ void __launch_bounds__(256)
    sum_of_squares_kernel(double *partial, const float *x, int64_t count) {
    double sum = 0;
    int64_t stride = gridDim.x * 1024ll, i = (blockIdx.x * 256ll + threadIdx.x) * 4;
    for (; i + 3 < count; i += stride) {
        float4 v = *(const float4 *)(x + i);
        sum += (double)v.x * v.x + (double)v.y * v.y + (double)v.z * v.z + (double)v.w * v.w;
    }
    for (; i < count; i++) sum += (double)x[i] * x[i]; // the last one to three, one thread's
    sum = block_sum_256(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// *sum += all partial sums, in a fixed order. One block; latency binds.
static __global__ void __launch_bounds__(256)
    add_squares_kernel(double *sum, const double *partial, int parts) {
    double x = 0;
    for (int i = threadIdx.x; i < parts; i += 256) x += partial[i];
    x = block_sum_256(x);
    if (threadIdx.x == 0) *sum += x;
}

static __global__ void global_norm_kernel(float *out, const double *squares, float unscale, float clip) {
    float norm = (float)(sqrt(*squares) * unscale);
    out[0] = norm;
    out[1] = unscale * (clip > 0 && norm > clip ? clip / norm : 1);
    out[2] = isfinite(norm) ? 1 : 0;
}

static inline int64_t global_norm_blocks(int64_t count) {
    return min((count + 1023) / 1024, (int64_t)GLOBAL_NORM_BLOCKS);
}
static inline size_t global_norm_scratch(int64_t count) {
    return (size_t)global_norm_blocks(count) * sizeof(double);
}

// *squares += the sum of the squares of x [count], aligned to 16 bytes. scratch: global_norm_scratch bytes.
static inline void sum_of_squares(double *squares, const float *x, int64_t count, void *scratch,
                                  cudaStream_t stream) {
    unsigned blocks = (unsigned)global_norm_blocks(count);
    if (count == 0) return;
    sum_of_squares_kernel<<<blocks, 256, 0, stream>>>((double *)scratch, x, count);
    cuda_check(cudaGetLastError());
    add_squares_kernel<<<1, 256, 0, stream>>>(squares, (const double *)scratch, (int)blocks);
    cuda_check(cudaGetLastError());
}

// From the sum of squares of all gradients: out[0]: their norm times unscale; out[1]: the factor that AdamW
// multiplies them by, unscale and, where the norm is above clip > 0, clip/norm; out[2]: 1 if the norm is
// finite, else 0.
static inline void global_norm(float *out, const double *squares, float unscale, float clip,
                               cudaStream_t stream) {
    global_norm_kernel<<<1, 1, 0, stream>>>(out, squares, unscale, clip);
    cuda_check(cudaGetLastError());
}
#endif
