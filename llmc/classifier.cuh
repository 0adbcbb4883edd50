// classifier.cuh: softmax, cross-entropy, arg max and the logits' gradient in one kernel.
#ifndef LLMC_CLASSIFIER_CUH
#define LLMC_CLASSIFIER_CUH
#include "cuda_common.cuh"

// The greatest logit so far, where it first stands, and the sum of exp(logit - max).
struct Softmax {
    float max, sum;
    int at;
};
// Both parts together; of equal logits the first one is kept, whichever side it is on.
__device__ __forceinline__ Softmax softmax_join(const Softmax &a, const Softmax &b) {
    bool second = b.max > a.max || (b.max == a.max && b.at < a.at);
    Softmax s = {fmaxf(a.max, b.max), 0, second ? b.at : a.at};
    float shift = s.max == -INFINITY ? 0 : s.max; // nothing yet; a NaN stays in the sum
    s.sum = a.sum * __expf(a.max - shift) + b.sum * __expf(b.max - shift);
    return s;
}
__device__ __forceinline__ Softmax softmax_lanes(Softmax s) {
    for (int i = 16; i > 0; i /= 2) {
        Softmax other;
        other.max = __shfl_xor_sync(0xffffffffu, s.max, i);
        other.sum = __shfl_xor_sync(0xffffffffu, s.sum, i);
        other.at = __shfl_xor_sync(0xffffffffu, s.at, i);
        s = softmax_join(s, other);
    }
    return s;
}

// A block: one row. First pass: each thread its packs' maximum and sum, then the block's; second pass, where
// there is a gradient, backwards, so that what was read last is met first in the caches. Reads 2*vp bytes a
// row from HBM, and again from L2, and writes 2*vp. 8K rows of 32,768: 1.07 GB, 0.24 ms at 4.5 TB/s; memory
// binds, two exps a logit (0.14 ms) come close.
static __global__ void __launch_bounds__(1024)
    classifier_kernel(floatX *all_logits, float *losses, int32_t *best, const int32_t *targets, float dloss,
                      int v, int vp) {
    __shared__ Softmax parts[32];
    floatX *logits = all_logits + (int64_t)blockIdx.x * vp;
    int target = targets[blockIdx.x], packs = (v + PACK - 1) / PACK; // those with a logit that counts
    Softmax s = {-INFINITY, 0, INT_MAX};
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        float x[PACK];
        load_pack(x, logits + i * PACK);
        float max = s.max;
#pragma unroll
        for (int j = 0; j < PACK; j++) {
            if (i * PACK + j >= v) x[j] = -INFINITY;
            if (x[j] > max) max = x[j], s.at = i * PACK + j;
        }
        float shift = max == -INFINITY ? 0 : max;
        s.sum *= __expf(s.max - shift);
        s.max = max;
#pragma unroll
        for (int j = 0; j < PACK; j++) s.sum += __expf(x[j] - shift);
    }
    s = softmax_lanes(s);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
    __syncthreads();
    Softmax none = {-INFINITY, 0, INT_MAX};
    s = softmax_lanes(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : none);
    float lse = s.max + logf(s.sum);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse - (float)logits[target];
        best[blockIdx.x] = s.at < v ? s.at : 0;
    }
    if (dloss == 0) return;
    __syncthreads(); // the target's logit has been read
    for (int i = vp / PACK - 1 - (int)threadIdx.x; i >= 0; i -= blockDim.x) {
        float x[PACK] = {};
        if (i < packs) load_pack(x, logits + i * PACK);
#pragma unroll
        for (int j = 0; j < PACK; j++) {
            int column = i * PACK + j;
            x[j] = column < v ? dloss * (__expf(x[j] - lse) - (column == target ? 1.0f : 0.0f)) : 0;
        }
        store_pack(logits + i * PACK, x);
    }
}

// losses[i] = -log softmax(logits[i])[targets[i]] over the first v of vp columns; best[i] the arg max, the
// first of equals. dloss != 0: logits become their gradient times dloss, columns past v 0.
static inline void classifier(floatX *logits, float *losses, int32_t *best, const int32_t *targets,
                              float dloss, int64_t n, int64_t v, int64_t vp, cudaStream_t stream) {
    if (n == 0) return;
    check_packs("classifier", vp);
    if (v < 1 || v > vp || vp > INT_MAX / 2)
        die("classifier: %lld logits in rows of %lld", (long long)v, (long long)vp);
    int threads = (int)min((vp / PACK + 31) / 32 * 32, (int64_t)1024);
    classifier_kernel<<<(unsigned)n, threads, 0, stream>>>(logits, losses, best, targets, dloss, (int)v,
                                                           (int)vp);
    cuda_check(cudaGetLastError());
}
#endif
