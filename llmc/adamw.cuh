// adamw.cuh: AdamW over all parameters in one launch. With g the clipped gradient and s the step number:
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   w = w - lr ((m / (1 - beta1^s)) / (sqrt(v / (1 - beta2^s)) + eps) + weight_decay w)
#ifndef LLMC_ADAMW_CUH
#define LLMC_ADAMW_CUH
#include "cuda_common.cuh"
#include <math.h>
#include <type_traits>

// Weight decay applies (1) or not (0) to the parameters from `begin` to the next range's begin.
typedef struct {
    int64_t begin, decay;
} AdamwRange;

typedef struct {
    floatX *params;
    float *master, *m, *v;
    const float *grads;
    int64_t count;
    const AdamwRange *ranges;
    int num_ranges;
    float step_size, decay, beta1, beta2, eps; // step_size: lr / (1 - beta1^step); decay: lr * weight_decay
    float inv_sqrt_bias_correction2;           // 1 / sqrt(1 - beta2^step)
    const float *norm;                         // [NORM_FIELDS] output of global_norm
} AdamwArgs;

// Each thread updates four neighbouring parameters. It finds their range by binary search in the table, which
// stays in L1. Memory-bound. It reads 16 bytes and writes 14 bytes per parameter (in 16 bits): 2 G parameters
// move 60 GB, which takes at least 13.5 ms at 4.5 TB/s.
static __global__ void __launch_bounds__(256) adamw_kernel(AdamwArgs a) {
    int64_t i = (blockIdx.x * 256ll + threadIdx.x) * 4;
    if (i >= a.count || a.norm[NORM_FINITE] == 0) return;
    int range = 0, end = a.num_ranges;
    while (end - range > 1) {
        int mid = (range + end) / 2;
        if (a.ranges[mid].begin <= i)
            range = mid;
        else
            end = mid;
    }
    float decay = a.ranges[range].decay ? a.decay : 0, grad_scale = a.norm[NORM_GRAD_SCALE];
    float p[4], m[4], v[4], g[4];
    *(float4 *)p = *(const float4 *)(a.master + i), *(float4 *)m = *(const float4 *)(a.m + i);
    *(float4 *)v = *(const float4 *)(a.v + i), *(float4 *)g = *(const float4 *)(a.grads + i);
    floatX weights[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float grad = g[j] * grad_scale;
        m[j] = a.beta1 * m[j] + (1 - a.beta1) * grad;
        v[j] = a.beta2 * v[j] + (1 - a.beta2) * grad * grad;
        p[j] -= a.step_size * m[j] / (sqrtf(v[j]) * a.inv_sqrt_bias_correction2 + a.eps) + decay * p[j];
        weights[j] = (floatX)p[j];
    }
    *(float4 *)(a.master + i) = *(float4 *)p, *(float4 *)(a.m + i) = *(float4 *)m;
    *(float4 *)(a.v + i) = *(float4 *)v;
    typedef std::conditional<sizeof(floatX) == 2, uint2, uint4>::type Four;
    Four bits;
    memcpy(&bits, weights, sizeof bits);
    *(Four *)(a.params + i) = bits;
}

// AdamW step number `step` (1-based) on `count` parameters. Updates the moments m and v and the fp32 master
// weights, all [count], and sets params [count] to the rounded master weights. norm [NORM_FIELDS], on the
// device, is the output of global_norm: gradients are multiplied by NORM_GRAD_SCALE. If NORM_FINITE is 0,
// nothing changes. ranges [num_ranges], on the device, say where weight decay changes: they ascend, and the
// first begins at 0. count and all begins are multiples of 4; all pointers are aligned to 16 bytes.
static inline void adamw(floatX *params, float *master, float *m, float *v, const float *grads, int64_t count,
                         const AdamwRange *ranges, int num_ranges, double lr, double beta1, double beta2,
                         double eps, double weight_decay, int64_t step, const float *norm,
                         cudaStream_t stream) {
    if (count == 0) return;
    if (count % 4 != 0 || num_ranges < 1)
        die("adamw: %lld parameters in %d ranges: must be a multiple of 4 in at least 1 range",
            (long long)count, num_ranges);
    AdamwArgs a = {params, master, m, v, grads, count, ranges, num_ranges};
    a.step_size = (float)(lr / (1 - pow(beta1, (double)step))), a.decay = (float)(lr * weight_decay);
    a.beta1 = (float)beta1, a.beta2 = (float)beta2, a.eps = (float)eps;
    a.inv_sqrt_bias_correction2 = (float)(1 / sqrt(1 - pow(beta2, (double)step))), a.norm = norm;
    adamw_kernel<<<(unsigned)((count + 1023) / 1024), 256, 0, stream>>>(a);
    cuda_check(cudaGetLastError());
}
#endif
