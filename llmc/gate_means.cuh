// gate_means.cuh: sums of a layer's gates on the GPU (gate_means.h). The sums are integers, so their order
// does not matter.
#ifndef LLMC_GATE_MEANS_CUH
#define LLMC_GATE_MEANS_CUH
#include "fsa_call.cuh"
#include "gate_means.h"
#include "qkv_layout.h"
#include <vector>

#define GATE_SCALE 4294967296.0f // a gate of 1 in a sum

// The sums of the current batch.
typedef struct {
    unsigned long long *sums; // [layers, GATE_BRANCHES] on the device, in units of 1 / GATE_SCALE
    int on;                   // 1: the forward pass adds its gates
} DeviceGateSums;

// A thread's elements are of one branch, because the number of threads is a multiple of GATE_BRANCHES.
static __global__ void __launch_bounds__(192)
    gate_sums_kernel(unsigned long long *sums, const attnX *logits, int64_t stride, int64_t n, int width) {
    __shared__ unsigned long long block_sums[GATE_BRANCHES];
    if (threadIdx.x < GATE_BRANCHES) block_sums[threadIdx.x] = 0;
    __syncthreads();
    unsigned long long sum = 0;
    for (int64_t i = blockIdx.x * 192 + threadIdx.x; i < n * width; i += gridDim.x * 192) {
        float gate = sigmoid((float)logits[i / width * stride + i % width]);
        sum += (unsigned long long)(gate * GATE_SCALE);
    }
    atomicAdd(&block_sums[threadIdx.x % GATE_BRANCHES], sum);
    __syncthreads();
    if (threadIdx.x < GATE_BRANCHES) atomicAdd(&sums[threadIdx.x], block_sums[threadIdx.x]);
}

// Adds the gates of layer l, if it has any. qkv [n, layout->stride]: its columns from layout->gate on are the
// gate logits.
static void gate_sums_add(const DeviceGateSums *g, int l, const attnX *qkv, const QkvLayout *layout,
                          int64_t n, cudaStream_t stream) {
    const int width = (int)(layout->width - layout->gate);
    if (!g->on || n * width == 0) return;
    gate_sums_kernel<<<256, 192, 0, stream>>>(g->sums + l * GATE_BRANCHES, qkv + layout->gate, layout->stride,
                                              n, width);
    cuda_check(cudaGetLastError());
}

// Before a batch of validation: on if its gates are wanted.
static void gate_sums_begin(DeviceGateSums *g, const GateSums *wanted, int layers, cudaStream_t stream) {
    g->on = wanted != NULL;
    if (g->on) cuda_check(cudaMemsetAsync(g->sums, 0, layers * GATE_BRANCHES * sizeof *g->sums, stream));
}

// Behind a batch of n tokens: adds its sums to those of the layers, sums [layers].
static void gate_sums_end(DeviceGateSums *g, GateSums *sums, const ModelConfig *c, int64_t n,
                          cudaStream_t stream) {
    const int layers = c->layers;
    if (!g->on) return;
    std::vector<unsigned long long> host(layers * GATE_BRANCHES);
    cuda_check(
        cudaMemcpyAsync(host.data(), g->sums, host.size() * sizeof host[0], cudaMemcpyDeviceToHost, stream));
    cuda_check(cudaStreamSynchronize(stream));
    for (int l = 0; l < layers; l++) {
        for (int b = 0; b < GATE_BRANCHES; b++)
            sums[l].sum[b] += (double)host[l * GATE_BRANCHES + b] / GATE_SCALE;
        if (layer_attention(c, l) == ATTN_NSA) sums[l].count += n * num_gate_logits(&c->fsa) / GATE_BRANCHES;
    }
    g->on = 0;
}
#endif
