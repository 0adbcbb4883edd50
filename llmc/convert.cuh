// convert.cuh: converts arrays between types: fp32 master weights to floatX, and in fp32 builds the
// attention's 16-bit inputs and outputs.
#ifndef LLMC_CONVERT_CUH
#define LLMC_CONVERT_CUH
#include "cuda_common.cuh"

// out[i] = in[i], rounded to nearest; each thread converts one element. Memory-bound.
template <typename To, typename From> __global__ void convert_kernel(To *out, const From *in, int64_t count) {
    int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (i < count) out[i] = (To)(float)in[i];
}

// out [count] = in [count].
template <typename To, typename From>
static void convert(To *out, const From *in, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    unsigned blocks = (unsigned)((count + 255) / 256);
    convert_kernel<To, From><<<blocks, 256, 0, stream>>>(out, in, count);
    cuda_check(cudaGetLastError());
}

// The same for rows of `width` elements, `stride` elements apart in both arrays. count: of all elements.
template <typename To, typename From>
__global__ void convert_columns_kernel(To *out, const From *in, int64_t count, int64_t width,
                                       int64_t stride) {
    int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, at = i / width * stride + i % width;
    if (i < count) out[at] = (To)(float)in[at];
}

// out = in: n rows of `width` elements, `stride` elements apart in both arrays. The elements between rows are
// neither read nor written.
template <typename To, typename From>
static void convert_columns(To *out, const From *in, int64_t n, int64_t width, int64_t stride,
                            cudaStream_t stream) {
    if (n * width == 0) return;
    unsigned blocks = (unsigned)((n * width + 255) / 256);
    convert_columns_kernel<To, From><<<blocks, 256, 0, stream>>>(out, in, n * width, width, stride);
    cuda_check(cudaGetLastError());
}
#endif
