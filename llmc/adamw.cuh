// adamw.cuh: AdamW over one ZeRO unit. With g the clipped gradient and s the step number:
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

// Returns the weight decay of the parameter at i, and sets *end to the first parameter with another one.
// Searches the table, which stays in L1.
__device__ __forceinline__ float adamw_decay(const AdamwArgs &a, int64_t i, int64_t *end) {
    int range = 0, above = a.num_ranges;
    while (above - range > 1) {
        const int mid = (range + above) / 2;
        if (a.ranges[mid].begin <= i)
            range = mid;
        else
            above = mid;
    }
    *end = above < a.num_ranges ? a.ranges[above].begin : a.count;
    return a.ranges[range].decay ? a.decay : 0;
}

// Updates four parameters: w, m, v are their master weights and moments, g their gradients. Returns the
// rounded weights. The square root and the quotient are exact to 2 ulp: without the branches of exactly
// rounded ones, the four parameters' instructions overlap.
typedef std::conditional<sizeof(floatX) == 2, uint2, uint4>::type AdamwFour;
__device__ __forceinline__ AdamwFour adamw_four(const AdamwArgs &a, float decay, float grad_scale, float4 &w,
                                                float4 &m, float4 &v, float4 g) {
    float *ws = &w.x, *ms = &m.x, *vs = &v.x;
    const float *gs = &g.x;
    floatX weights[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float grad = gs[j] * grad_scale;
        ms[j] = a.beta1 * ms[j] + (1 - a.beta1) * grad;
        vs[j] = a.beta2 * vs[j] + (1 - a.beta2) * grad * grad;
        const float root = vs[j] == 0 ? 0 : vs[j] * rsqrtf(vs[j]);
        ws[j] -= __fdividef(a.step_size * ms[j], root * a.inv_sqrt_bias_correction2 + a.eps) + decay * ws[j];
        weights[j] = (floatX)ws[j];
    }
    AdamwFour bits;
    memcpy(&bits, weights, sizeof bits);
    return bits;
}

// Each thread updates four neighbouring parameters. Memory-bound. It reads 16 bytes and writes 14 bytes per
// parameter (in 16 bits): 2 G parameters move 60 GB, which takes at least 13.5 ms at 4.5 TB/s.
static __global__ void __launch_bounds__(256) adamw_kernel(AdamwArgs a) {
    const int64_t i = (blockIdx.x * 256ll + threadIdx.x) * 4;
    if (i >= a.count || a.norm[NORM_FINITE] == 0) return;
    float4 w = *(const float4 *)(a.master + i), m = *(const float4 *)(a.m + i),
           v = *(const float4 *)(a.v + i);
    int64_t end;
    const float decay = adamw_decay(a, i, &end);
    const AdamwFour bits =
        adamw_four(a, decay, a.norm[NORM_GRAD_SCALE], w, m, v, *(const float4 *)(a.grads + i));
    *(float4 *)(a.master + i) = w, *(float4 *)(a.m + i) = m, *(float4 *)(a.v + i) = v;
    *(AdamwFour *)(a.params + i) = bits;
}

// AdamW on a few SMs, beside the matmuls of another stream: each takes an SM for itself and moves its
// parameters through shared memory, in tiles of ADAMW_TILE. The copies of the next tiles are in flight while
// a tile is computed:
//
//   tile k      load        compute in place   store
//   tile k + 1    load          |   compute in place   store
//   ...            the loads of STAGES - 1 tiles are in flight
//
// An SM loads at most 64 bytes a cycle, and 16 bytes for each parameter: at 1.7 GHz 16 SMs update at most
// 109 G parameters a second, three quarters of what all SMs can at 4.5 TB/s.
enum { ADAMW_TILE = 2048, ADAMW_STAGES = 5, ADAMW_BULK_THREADS = 512 };
constexpr int ADAMW_STAGE_BYTES = ADAMW_TILE * (16 + (int)sizeof(floatX)),
              ADAMW_SHARED_BYTES = ADAMW_STAGES * ADAMW_STAGE_BYTES;

// Starts the loads of tile t of the parameters to stage `stage`.
__device__ __forceinline__ void adamw_load(const AdamwArgs &a, int64_t t, char *stage, uint32_t full) {
    const int64_t i = t * ADAMW_TILE;
    const int bytes = (int)(min((int64_t)ADAMW_TILE, a.count - i) * (int64_t)sizeof(float));
    mbarrier_arrive_expect_tx(full, 4 * bytes);
    const float *const src[4] = {a.master, a.m, a.v, a.grads};
#pragma unroll
    for (int k = 0; k < 4; k++) bulk_load(smem_address(stage) + k * ADAMW_TILE * 4, src[k] + i, bytes, full);
}

static __global__ void __launch_bounds__(ADAMW_BULK_THREADS, 1) adamw_bulk_kernel(AdamwArgs a) {
    extern __shared__ __align__(128) char stages[];
    __shared__ uint64_t full[ADAMW_STAGES];
    const int64_t tiles = (a.count + ADAMW_TILE - 1) / ADAMW_TILE, step = gridDim.x;
    if (a.norm[NORM_FINITE] == 0) return;
    if (threadIdx.x == 0) {
        for (int i = 0; i < ADAMW_STAGES; i++) mbarrier_init(smem_address(&full[i]), 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    for (int k = 0; k < ADAMW_STAGES - 1 && threadIdx.x == 0; k++)
        if (blockIdx.x + k * step < tiles)
            adamw_load(a, blockIdx.x + k * step, stages + k * ADAMW_STAGE_BYTES, smem_address(&full[k]));
    const float grad_scale = a.norm[NORM_GRAD_SCALE];
    float decay = 0; // of the parameters before decay_end
    int64_t decay_end = 0;
    int stage = 0, parity = 0;
    for (int64_t t = blockIdx.x; t < tiles; t += step) {
        char *const data = stages + stage * ADAMW_STAGE_BYTES;
        float4 *const w = (float4 *)data, *const m = w + ADAMW_TILE / 4, *const v = m + ADAMW_TILE / 4,
                      *const g = v + ADAMW_TILE / 4;
        AdamwFour *const weights = (AdamwFour *)(g + ADAMW_TILE / 4);
        const int count = (int)min((int64_t)ADAMW_TILE, a.count - t * ADAMW_TILE);
        mbarrier_wait(smem_address(&full[stage]), parity);
        for (int i = threadIdx.x; i < count / 4; i += ADAMW_BULK_THREADS) {
            const int64_t first = t * ADAMW_TILE + 4 * i;
            if (first >= decay_end) decay = adamw_decay(a, first, &decay_end);
            float4 wi = w[i], mi = m[i], vi = v[i];
            weights[i] = adamw_four(a, decay, grad_scale, wi, mi, vi, g[i]);
            w[i] = wi, m[i] = mi, v[i] = vi;
        }
        fence_proxy_async();
        __syncthreads();
        if (threadIdx.x == 0) {
            float *const dst[3] = {a.master, a.m, a.v};
#pragma unroll
            for (int k = 0; k < 3; k++)
                bulk_store(dst[k] + t * ADAMW_TILE, smem_address(data) + k * ADAMW_TILE * 4, count * 4);
            bulk_store(a.params + t * ADAMW_TILE, smem_address(weights), count * (int)sizeof(floatX));
            bulk_commit();
            bulk_wait_read_but_newest(); // the stage of the tile before is free
            const int64_t next = t + (ADAMW_STAGES - 1) * step;
            const int free = stage == 0 ? ADAMW_STAGES - 1 : stage - 1;
            if (next < tiles)
                adamw_load(a, next, stages + free * ADAMW_STAGE_BYTES, smem_address(&full[free]));
        }
        if (++stage == ADAMW_STAGES) stage = 0, parity ^= 1;
    }
    if (threadIdx.x == 0) bulk_wait();
}

// Returns whether the current GPU can run adamw_bulk_kernel. It cannot if a thread block has too little
// shared memory, or if the driver has compiled the kernel from PTX of an architecture without bulk copies.
static inline bool adamw_fits_few_sms() {
    int device, shared_bytes;
    cudaFuncAttributes kernel;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    cuda_check(cudaFuncGetAttributes(&kernel, (const void *)adamw_bulk_kernel));
    return kernel.ptxVersion >= 90 && (int)kernel.sharedSizeBytes + ADAMW_SHARED_BYTES <= shared_bytes;
}

// AdamW step number `step` (1-based) on `count` parameters. Updates the moments m and v and the fp32 master
// weights, all [count], and sets params [count] to the rounded master weights. norm [NORM_FIELDS], on the
// device, is the output of global_norm: gradients are multiplied by NORM_GRAD_SCALE. If NORM_FINITE is 0,
// nothing changes. ranges [num_ranges], on the device, say where weight decay changes: they ascend, and the
// first begins at 0. count is a multiple of 8, all begins are of 4; all pointers are aligned to 16 bytes.
// sms: the number of SMs that it takes, only if adamw_fits_few_sms(); 0: all.
static inline void adamw(floatX *params, float *master, float *m, float *v, const float *grads, int64_t count,
                         const AdamwRange *ranges, int num_ranges, double lr, double beta1, double beta2,
                         double eps, double weight_decay, int64_t step, const float *norm, int sms,
                         cudaStream_t stream) {
    if (count == 0) return;
    if (count % 8 != 0 || num_ranges < 1)
        die("adamw: %lld parameters in %d ranges: must be a multiple of 8 in at least 1 range",
            (long long)count, num_ranges);
    AdamwArgs a = {params, master, m, v, grads, count, ranges, num_ranges};
    a.step_size = (float)(lr / (1 - pow(beta1, (double)step))), a.decay = (float)(lr * weight_decay);
    a.beta1 = (float)beta1, a.beta2 = (float)beta2, a.eps = (float)eps;
    a.inv_sqrt_bias_correction2 = (float)(1 / sqrt(1 - pow(beta2, (double)step))), a.norm = norm;
    if (sms > 0) {
        cuda_check(cudaFuncSetAttribute(adamw_bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        ADAMW_SHARED_BYTES));
        adamw_bulk_kernel<<<sms, ADAMW_BULK_THREADS, ADAMW_SHARED_BYTES, stream>>>(a);
    } else {
        adamw_kernel<<<(unsigned)((count + 1023) / 1024), 256, 0, stream>>>(a);
    }
    cuda_check(cudaGetLastError());
}
#endif
