// dense.cuh: what the dense kernels share, the portable ones of dense.cu and Hopper's of dense_sm90.cu.
#ifndef FSA_DENSE_CUH
#define FSA_DENSE_CUH
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"

// A query at position t sees key j when a*j + b <= t and t - j < width.
struct DenseMask {
    int a, b, width;
    FastDivisor a_divisor;
    __device__ bool operator()(int t, int j) const { return a * j + b <= t && t - j < width; }
    __device__ int first_key(int t) const { return t - width + 1 > 0 ? t - width + 1 : 0; }
    __device__ int end_key(int t) const { return t < b ? 0 : fast_divide(t - b, a_divisor) + 1; }
    __device__ int first_query(int j) const { return a * j + b; }
    __device__ int last_query(int j) const { return j < INT32_MAX - width ? j + width - 1 : INT32_MAX; }
};

// Of the selected branch's forced blocks a query at position t sees the tokens j <= t before init_end and
// those from local_begin(t) on.
struct InitLocalBlocks {
    int init, local, block, init_end;
    FastDivisor block_divisor;
    __device__ int local_begin(int t) const { // 0 where the two ranges meet
        const int first = fast_divide(t, block_divisor) - local + 1;
        return first > init ? first * block : 0;
    }
};

static inline DenseMask make_dense_mask(const FsaConfig *c, FsaVisibility rule) {
    if (rule == FSA_COMPRESSED)
        return DenseMask{c->cmp_stride, c->cmp_len - 1, INT32_MAX, make_fast_divisor(c->cmp_stride)};
    return DenseMask{1, 0, rule == FSA_WINDOW ? c->window : INT32_MAX, make_fast_divisor(1)};
}

// What all three kernels read. Keys are tokens or, for the compressed rule, windows; cu_keys their prefix
// sum.
struct DenseParams {
    BatchLayout batch;
    const int64_t *cu_keys;
    int64_t num_keys; // a bound
    int q_heads, kv_heads;
    FastDivisor group_divisor; // q_heads / kv_heads
    float scale;
    DenseMask visible;
    // Forward: instead of `visible`, if one of its counts is not 0. Backward: the last blocks are the selected
    // branch's, too.
    InitLocalBlocks forced;
    const void *q, *k, *v;
    void *o;
    float *lse;
    // Backward.
    const void *dout;
    const float *lse_bwd, *delta;
    const float *local_lse_bwd, *local_delta; // the selected branch's
    float *dq, *dk, *dv;
    int accumulate_q, accumulate_kv;
    int splits; // dK, dV: thread blocks that share a tile of keys; partial sums go to `partial` if > 1
    float *partial;
    // Hopper's backward: kv heads taken together; whether their rows are walked backwards and forwards in turn;
    // items taken, and how many have added to each tile of dq.
    int together, alternate, *order;
};

static inline DenseParams make_dense_params(const FsaConfig *c, const BatchLayout *p, FsaVisibility rule) {
    DenseParams d = {};
    d.batch = *p;
    d.cu_keys = rule == FSA_COMPRESSED ? p->cu_windows : p->cu_seqlens;
    d.num_keys = rule == FSA_COMPRESSED ? fsa_max_windows(c, p) : p->n;
    d.q_heads = c->q_heads;
    d.kv_heads = c->kv_heads;
    d.group_divisor = make_fast_divisor(c->q_heads / c->kv_heads);
    d.scale = softmax_scale_of(c);
    d.visible = make_dense_mask(c, rule);
    return d;
}

// fp16 loses the small probabilities of long rows to its exponent; the backward kernels keep them, times
// 2^6, and divide their sums by it. bf16 has float's exponent.
template <typename T> __device__ constexpr float probability_shift() {
    return sizeof(T) == 0;
}
template <> __device__ constexpr float probability_shift<__nv_bfloat16>() {
    return 0;
}
template <> __device__ constexpr float probability_shift<__half>() {
    return 6;
}
template <typename T> __device__ constexpr float probability_unit() {
    return sizeof(T) == 0;
}
template <> __device__ constexpr float probability_unit<__nv_bfloat16>() {
    return 1;
}
template <> __device__ constexpr float probability_unit<__half>() {
    return 1.0f / 64;
}

// Hopper's kernels, behind the launchers of kernels.h. `splits` parts of the queries that see a key tile are
// summed apart in `partial`.
int fsa_dense_forward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream);
int fsa_dense_backward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream);
int fsa_dense_forward_sm90(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream);
// Adds to dq, or, unless accumulate_q, overwrites those rows that see a key.
int fsa_dense_backward_sm90(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream);
// How many shares of the queries that see a tile of keys the compressed rule makes, and a bound of shares
// times keys that never shrinks while keys are added.
int fsa_dense_num_splits_sm90(int64_t num_keys, int kv_heads);
int64_t fsa_dense_split_rows_sm90(int64_t num_keys, int kv_heads);
size_t fsa_dense_semaphore_bytes(const BatchLayout &p, int q_heads, int kv_heads);
#endif
