// loss.cuh: the results of a training step that the host reads: the sum of the token losses and the
// gradient's norm.
#ifndef LLMC_LOSS_CUH
#define LLMC_LOSS_CUH
#include "cuda_common.cuh"

typedef struct {
    // The doubles are this GPU's first, then sums over all GPUs.
    double loss_sum;         // over the tokens of all micro-batches
    double squares;          // sum of the squares of the gradient
    double stop;             // above 0: a process has received a signal to stop
    float norm[NORM_FIELDS]; // output of global_norm
} StepResult;
enum { STEP_SUMS = 3 }; // number of doubles in StepResult

// *sum += the sum of losses [n], in double and in a fixed order: each thread sums every 1024th loss, then the
// sums of the threads are added pairwise. One thread block; reads 4 bytes per loss, a few microseconds.
static __global__ void __launch_bounds__(1024) loss_sum_kernel(double *sum, const float *losses, int64_t n) {
    __shared__ double partial[1024];
    double x = 0;
    for (int64_t i = threadIdx.x; i < n; i += 1024) x += (double)losses[i];
    partial[threadIdx.x] = x;
    for (int half = 512; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *sum += partial[0];
}

// *sum += the sum of losses [n]; both on the device.
static void loss_sum(double *sum, const float *losses, int64_t n, cudaStream_t stream) {
    loss_sum_kernel<<<1, 1024, 0, stream>>>(sum, losses, n);
    cuda_check(cudaGetLastError());
}

static __global__ void skip_update_if_loss_not_finite_kernel(StepResult *r) {
    if (!isfinite(r->loss_sum)) r->norm[NORM_FINITE] = 0;
}

// Called after global_norm. A loss that is NaN or Inf prevents the update, like a norm that is NaN or Inf.
static void skip_update_if_loss_not_finite(StepResult *r, cudaStream_t stream) {
    skip_update_if_loss_not_finite_kernel<<<1, 1, 0, stream>>>(r);
    cuda_check(cudaGetLastError());
}

static __global__ void skip_update_above_kernel(StepResult *r, double loss_sum_limit, double norm_limit) {
    if (r->loss_sum > loss_sum_limit || r->norm[NORM_VALUE] > norm_limit) r->norm[NORM_FINITE] = 0;
}

// Called after global_norm. A loss sum or a norm above its limit prevents the update. A limit that is 0 or
// Inf is none.
static void skip_update_above(StepResult *r, double loss_sum_limit, double norm_limit, cudaStream_t stream) {
    if (!(loss_sum_limit > 0)) loss_sum_limit = INFINITY;
    if (!(norm_limit > 0)) norm_limit = INFINITY;
    if (isinf(loss_sum_limit) && isinf(norm_limit)) return;
    skip_update_above_kernel<<<1, 1, 0, stream>>>(r, loss_sum_limit, norm_limit);
    cuda_check(cudaGetLastError());
}
#endif
