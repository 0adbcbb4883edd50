// convert.cuh: arrays from one type to another: weights from their fp32 masters, and in fp32 builds what the
// 16-bit attention reads and writes.
#ifndef LLMC_CONVERT_CUH
#define LLMC_CONVERT_CUH
#include "cuda_common.cuh"

// out[i] = in[i], rounded to nearest. A thread takes an element; bound by the bytes that it reads and writes.
template <typename To, typename From> __global__ void convert_kernel(To *out, const From *in, int64_t count) {
    int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (i < count) out[i] = (To)(float)in[i];
}

template <typename To, typename From>
static void convert(To *out, const From *in, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    unsigned blocks = (unsigned)((count + 255) / 256);
    convert_kernel<To, From><<<blocks, 256, 0, stream>>>(out, in, count);
    cuda_check(cudaGetLastError());
}
#endif
