// classifier.cuh: softmax, cross-entropy, argmax and the logits' gradient in one kernel. For a row of logits
// x with target t:
//   lse = ln sum_j exp(x_j),  loss = lse - x_t,  dx_j = dloss * (exp(x_j - lse) - [j == t])
#ifndef LLMC_CLASSIFIER_CUH
#define LLMC_CLASSIFIER_CUH
#include "cuda_common.cuh"

// The online-softmax state of a subset of a row's logits: the maximum, the sum of exp(logit - max), and the
// first index of the maximum.
struct Softmax {
    float max, sum;
    int argmax;
};
// Combines two parts of a row, in either order. If their maxima are equal, argmax is the lower index.
__device__ __forceinline__ Softmax softmax_combine(const Softmax &a, const Softmax &b) {
    bool second = b.max > a.max || (b.max == a.max && b.argmax < a.argmax);
    Softmax s = {fmaxf(a.max, b.max), 0, second ? b.argmax : a.argmax};
    float shift = s.max == -INFINITY ? 0 : s.max; // no logit yet; a NaN stays in the sum
    s.sum = a.sum * __expf(a.max - shift) + b.sum * __expf(b.max - shift);
    return s;
}
__device__ __forceinline__ Softmax softmax_warp_reduce(Softmax s) {
    for (int i = 16; i > 0; i /= 2) {
        Softmax other;
        other.max = __shfl_xor_sync(0xffffffffu, s.max, i);
        other.sum = __shfl_xor_sync(0xffffffffu, s.sum, i);
        other.argmax = __shfl_xor_sync(0xffffffffu, s.argmax, i);
        s = softmax_combine(s, other);
    }
    return s;
}

// Each thread block processes one row. The first pass computes the maximum and the sum of each thread's
// packs, then combines them over the block. The second pass writes the gradient. It runs backwards through
// the row, to start with the logits that the caches read last. Memory-bound. Lower bounds for 8K rows of
// 32,768 logits in 16 bits:
//   memory  2*vp bytes per row read from HBM (and again from L2), 2*vp written  1.07 GB at 4.5 TB/s   0.24 ms
//   exp     two per logit                                                       0.54 G at 3.7 T/s     0.14 ms
static __global__ void __launch_bounds__(1024)
    classifier_kernel(floatX *all_logits, float *losses, int32_t *argmax, const int32_t *targets, float dloss,
                      int v, int vp) {
    __shared__ Softmax parts[32];
    floatX *logits = all_logits + (int64_t)blockIdx.x * vp;
    int target = targets[blockIdx.x], packs = (v + PACK - 1) / PACK; // packs with a column below v
    Softmax s = {-INFINITY, 0, INT_MAX};
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        float x[PACK];
        load_pack(x, logits + i * PACK);
        float max = s.max;
#pragma unroll
        for (int j = 0; j < PACK; j++) {
            if (i * PACK + j >= v) x[j] = -INFINITY;
            if (x[j] > max) max = x[j], s.argmax = i * PACK + j;
        }
        float shift = max == -INFINITY ? 0 : max;
        s.sum *= __expf(s.max - shift);
        s.max = max;
#pragma unroll
        for (int j = 0; j < PACK; j++) s.sum += __expf(x[j] - shift);
    }
    s = softmax_warp_reduce(s);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
    __syncthreads();
    Softmax none = {-INFINITY, 0, INT_MAX};
    s = softmax_warp_reduce(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : none);
    float lse = s.max + logf(s.sum);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = lse - (float)logits[target];
        argmax[blockIdx.x] = s.argmax < v ? s.argmax : 0;
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

// losses[i] = -log softmax(logits[i])[targets[i]] over the first v of vp columns. argmax[i] is the first
// index of the greatest of them. logits [n, vp]; losses, argmax, targets [n]; vp is a multiple of PACK. If
// dloss != 0, logits is overwritten by its gradient times dloss, with 0 in columns v to vp - 1.
static inline void classifier(floatX *logits, float *losses, int32_t *argmax, const int32_t *targets,
                              float dloss, int64_t n, int64_t v, int64_t vp, cudaStream_t stream) {
    if (n == 0) return;
    check_packs("classifier", vp);
    if (v < 1 || v > vp || vp > INT_MAX / 2)
        die("classifier: %lld logits in rows of %lld: must be 1 to the row's length, and a row at most %d",
            (long long)v, (long long)vp, INT_MAX / 2);
    int threads = (int)min((vp / PACK + 31) / 32 * 32, (int64_t)1024);
    classifier_kernel<<<(unsigned)n, threads, 0, stream>>>(logits, losses, argmax, targets, dloss, (int)v,
                                                           (int)vp);
    cuda_check(cudaGetLastError());
}
#endif
