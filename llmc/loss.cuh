// loss.cuh: what the host reads of a training step: the sum of its token losses, and the gradient's norm.
#ifndef LLMC_LOSS_CUH
#define LLMC_LOSS_CUH
#include "cuda_common.cuh"

typedef struct {
    // of this GPU, and then of all
    double loss_sum; // over the tokens of all micro-batches
    double squares;  // sum of the squares of the gradient
    double stop;     // above 0: a process has been asked to stop
    float norm[3];   // global_norm's: the norm, the gradient's factor, and 1 where all is finite
} StepResult;
enum { STEP_SUMS = 3 }; // the doubles of StepResult

// Adds losses [n] to *sum in double and in a fixed order: a thread takes every 1024th loss, then the threads'
// sums are added pairwise. One block: n * 4 bytes, a few microseconds.
static __global__ void __launch_bounds__(1024) loss_sum_kernel(double *sum, const float *losses, int64_t n) {
    __shared__ double part[1024];
    double mine = 0;
    for (int64_t i = threadIdx.x; i < n; i += 1024) mine += (double)losses[i];
    part[threadIdx.x] = mine;
    for (int half = 512; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *sum += part[0];
}

static void loss_sum(double *sum, const float *losses, int64_t n, cudaStream_t stream) {
    loss_sum_kernel<<<1, 1024, 0, stream>>>(sum, losses, n);
    cuda_check(cudaGetLastError());
}

// After global_norm: a loss that is not finite stops the update as a bad norm does.
static __global__ void loss_guard_kernel(StepResult *r) {
    if (!isfinite(r->loss_sum)) r->norm[2] = 0;
}

static void loss_guard(StepResult *r, cudaStream_t stream) {
    loss_guard_kernel<<<1, 1, 0, stream>>>(r);
    cuda_check(cudaGetLastError());
}
#endif
