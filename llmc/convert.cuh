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
#endif
