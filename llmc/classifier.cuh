// classifier.cuh: softmax, cross-entropy, argmax and the logits' gradient in one kernel. For a row of logits
// x with target t:
//   lse = ln sum_j exp(x_j),  loss = lse - x_t,  dx_j = dloss * (exp(x_j - lse) - [j == t])
#ifndef LLMC_CLASSIFIER_CUH
#define LLMC_CLASSIFIER_CUH
#include "cuda_common.cuh"

enum { CLASSIFIER_PACKS = 4 }; // packs of a row that a thread holds in registers: a chunk

// The online softmax of some of a row's logits: the maximum, the sum of exp(logit - max), and the first pack
// that holds the maximum; -1: none.
struct Softmax {
    float max, sum;
    int pack;
};
// exp(x - max) is 2^(x log2(e) - shift): a multiply-add and one more instruction. The shift is rounded, and
// the same wherever it is computed: a product that is added to another number in one instruction would not
// be.
__device__ __forceinline__ float softmax_shift(float max) {
    return max == -INFINITY ? 0 : __fmul_rn(max, LOG2E); // no logit yet; a NaN stays in the sum
}
// Returns the factor of a sum that is relative to old_max and becomes relative to max.
__device__ __forceinline__ float softmax_rescale(float old_max, float max) {
    return exp2_fast(__fmul_rn(old_max, LOG2E) - softmax_shift(max));
}
// Makes max and sum those of the warp.
__device__ __forceinline__ void softmax_warp_reduce(float &max, float &sum) {
    float all = max;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, i));
    sum = warp_reduce_sum(sum * softmax_rescale(max, all));
    max = all;
}

// Returns the thread's pack k of the chunk that begins with its pack `first`.
__device__ __forceinline__ int chunk_pack(int first, int k) {
    return first + k * (int)blockDim.x;
}
// Makes the columns of pack i from v on, which may hold anything, -Inf.
__device__ __forceinline__ uint4 mask_logits(const uint4 &bits, int i, int v) {
    float x[PACK];
    unpack(x, bits);
#pragma unroll
    for (int j = 0; j < PACK; j++)
        if (i * PACK + j >= v) x[j] = -INFINITY;
    return pack(x);
}

// Loads the thread's packs first, first + blockDim.x, ... of a chunk of a row that has `packs` packs.
__device__ __forceinline__ void load_chunk(uint4 (&bits)[CLASSIFIER_PACKS], const floatX *logits, int first,
                                           int packs, int v) {
#pragma unroll
    for (int k = 0; k < CLASSIFIER_PACKS; k++) { // all loads are in flight before the first is used
        const int i = chunk_pack(first, k);
        if (i < packs) bits[k] = load16(logits + i * PACK);
    }
    if (min(chunk_pack(first - (int)threadIdx.x, CLASSIFIER_PACKS), packs) <= v / (int)PACK) return;
#pragma unroll
    for (int k = 0; k < CLASSIFIER_PACKS; k++) bits[k] = mask_logits(bits[k], chunk_pack(first, k), v);
}

// Adds the thread's packs first, first + blockDim.x, ... of a chunk to s.
__device__ __forceinline__ void softmax_add(Softmax &s, const uint4 (&bits)[CLASSIFIER_PACKS], int first,
                                            int packs) {
    const float old_max = s.max;
    float x[PACK];
#pragma unroll
    for (int k = 0; k < CLASSIFIER_PACKS; k++) {
        if (chunk_pack(first, k) >= packs) break;
        unpack(x, bits[k]);
#pragma unroll
        for (int j = 1; j < PACK; j++) x[0] = fmaxf(x[0], x[j]);
        if (x[0] > s.max) s.max = x[0], s.pack = chunk_pack(first, k);
    }
    const float shift = softmax_shift(s.max);
    s.sum *= softmax_rescale(old_max, s.max);
#pragma unroll
    for (int k = 0; k < CLASSIFIER_PACKS; k++) {
        if (chunk_pack(first, k) >= packs) break;
        unpack(x, bits[k]);
#pragma unroll
        for (int j = 0; j < PACK; j++) s.sum += exp2_fast(x[j] * LOG2E - shift);
    }
}

// Each thread block processes one row, in chunks that it holds in registers. The first pass computes the
// maximum and the sum of each thread's packs, then combines them over the block. The second pass writes the
// gradient. It begins with the last chunk, which is still in registers, so rows of one chunk (32,768 logits
// in 16 bits) are read once. Memory-bound. Lower bounds for 8K rows of 32,768 logits in 16 bits:
//   memory        2*vp bytes per row read, 2*vp written  1.07 GB at 4.5 TB/s              0.24 ms
//   exp2          two per logit                          0.54 G at 3.7 T/s                0.14 ms
//   instructions  about 13 per logit                     3.5 G on 132 SMs of 128 lanes    0.12 ms
static __global__ void __launch_bounds__(1024, 2)
    classifier_kernel(floatX *all_logits, float *losses, int32_t *argmax, const int32_t *targets, float dloss,
                      int v, int vp) {
    __shared__ float2 parts[32];
    __shared__ int row_argmax;
    floatX *logits = all_logits + (int64_t)blockIdx.x * vp;
    const int target = targets[blockIdx.x], packs = vp / PACK, lane = threadIdx.x % 32;
    const int chunk = CLASSIFIER_PACKS * (int)blockDim.x, last = (packs - 1) / chunk * chunk;
    uint4 bits[CLASSIFIER_PACKS];
    Softmax s = {-INFINITY, 0, -1};
    for (int first = threadIdx.x; first < last + (int)blockDim.x; first += chunk) {
        load_chunk(bits, logits, first, packs, v);
        softmax_add(s, bits, first, packs);
    }
    float max = s.max, sum = s.sum;
    softmax_warp_reduce(max, sum);
    if (lane == 0) parts[threadIdx.x / 32] = make_float2(max, sum);
    if (threadIdx.x == 0) row_argmax = INT_MAX;
    __syncthreads();
    max = lane < blockDim.x / 32 ? parts[lane].x : -INFINITY;
    sum = lane < blockDim.x / 32 ? parts[lane].y : 0;
    softmax_warp_reduce(max, sum);
    if (s.max == max && s.pack >= 0) { // the pack that holds the row's maximum
        float x[PACK];
        unpack(x, mask_logits(load16(logits + s.pack * PACK), s.pack, v));
        int column = PACK - 1;
#pragma unroll
        for (int j = PACK - 2; j >= 0; j--)
            if (x[j] == max) column = j;
        atomicMin(&row_argmax, s.pack * PACK + column);
    }
    const float shift = softmax_shift(max), target_logit = (float)logits[target], lse2 = shift + log2f(sum);
    // of the exponentials relative to max
    const float log2_sum = log2f(sum) - fmaf(max, LOG2E, -shift);
    // all threads have read the logits
    __syncthreads();
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = max - target_logit + log2_sum / LOG2E;
        argmax[blockIdx.x] = row_argmax < v ? row_argmax : 0;
    }
    if (dloss == 0) return;
    for (int first = last + (int)threadIdx.x; first >= 0; first -= chunk) {
        if (first - (int)threadIdx.x < last) load_chunk(bits, logits, first, packs, v);
#pragma unroll
        for (int k = 0; k < CLASSIFIER_PACKS; k++) {
            const int i = chunk_pack(first, k);
            if (i >= packs) break;
            float x[PACK];
            unpack(x, bits[k]);
#pragma unroll
            for (int j = 0; j < PACK; j++) x[j] = dloss * exp2_fast(x[j] * LOG2E - lse2);
            store_pack(logits + i * PACK, x);
        }
    }
    if (target / PACK % blockDim.x == threadIdx.x) // the thread that stored the target's pack
        logits[target] = (floatX)(dloss * (exp2_fast((target_logit - max) * LOG2E - log2_sum) - 1));
}

// losses[i] = -log softmax(logits[i])[targets[i]] over the first v of vp columns. argmax[i] is the first
// index of the greatest of them. logits [n, vp]; losses, argmax, targets [n]; vp is a multiple of PACK. If
// dloss != 0, logits is overwritten by its gradient times dloss, with 0 in columns v to vp - 1, or NaN in a
// row whose loss is not finite.
static inline void classifier(floatX *logits, float *losses, int32_t *argmax, const int32_t *targets,
                              float dloss, int64_t n, int64_t v, int64_t vp, cudaStream_t stream) {
    if (n == 0) return;
    check_packs("classifier", vp);
    if (v < 1 || v > vp || vp > INT_MAX / 2)
        die("classifier: %lld logits in rows of %lld: must be 1 to the row's length, and a row at most %d",
            (long long)v, (long long)vp, INT_MAX / 2);
    const int64_t lanes = (vp / PACK + CLASSIFIER_PACKS - 1) / CLASSIFIER_PACKS;
    const int threads = (int)min((lanes + 31) / 32 * 32, (int64_t)1024);
    classifier_kernel<<<(unsigned)n, threads, 0, stream>>>(logits, losses, argmax, targets, dloss, (int)v,
                                                           (int)vp);
    cuda_check(cudaGetLastError());
}
#endif
