// dense.cuh: parameters and visibility rules of the dense attention kernels, for all architectures.
//
// Dense attention reads contiguous ranges of keys. The rule tells which keys a query at position t sees:
//
//     FSA_CAUSAL        tokens j <= t
//     FSA_WINDOW        tokens t - window < j <= t
//     FSA_COMPRESSED    compression windows j that end at or before t: cmp_stride*j + cmp_len - 1 <= t
//
// The forward kernel of sm90/ has one more rule, which no FsaVisibility value names: tokens j <= t in the
// initial and local blocks of the selected branch (struct InitLocalBlocks).
#ifndef FSA_DENSE_CUH
#define FSA_DENSE_CUH
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"

// A query at position t sees key j if stride*j + offset <= t and t - j < window.
struct DenseMask {
    int stride, offset, window;
    FastDivisor stride_divisor;
    __device__ bool visible(int t, int j) const { return stride * j + offset <= t && t - j < window; }
    // The query at position t sees the keys first_key(t) .. end_key(t) - 1.
    __device__ int first_key(int t) const { return t - window + 1 > 0 ? t - window + 1 : 0; }
    __device__ int end_key(int t) const {
        return t < offset ? 0 : fast_divide(t - offset, stride_divisor) + 1;
    }
    // The queries at positions first_query(j) .. last_query(j) see key j.
    __device__ int first_query(int j) const { return stride * j + offset; }
    __device__ int last_query(int j) const { return j < INT32_MAX - window ? j + window - 1 : INT32_MAX; }
};

// The initial and local blocks of the selected branch: a query at position t sees the tokens j <= t with
// j < init_end or j >= local_begin(t).
struct InitLocalBlocks {
    int init_blocks, local_blocks, block, init_end;
    FastDivisor block_divisor;
    __device__ int local_begin(int t) const { // 0 if the two ranges meet
        const int first = fast_divide(t, block_divisor) - local_blocks + 1;
        return first > init_blocks ? first * block : 0;
    }
};

static inline DenseMask make_dense_mask(const FsaConfig *c, FsaVisibility rule) {
    if (rule == FSA_COMPRESSED)
        return DenseMask{c->cmp_stride, c->cmp_len - 1, INT32_MAX, make_fast_divisor(c->cmp_stride)};
    return DenseMask{1, 0, rule == FSA_WINDOW ? c->window : INT32_MAX, make_fast_divisor(1)};
}

// Parameters of all dense kernels. Keys are tokens or, under the compressed rule, compression windows.
struct DenseParams {
    BatchLayout batch;
    const int64_t *cu_keys; // [num_seqs + 1] first key of each sequence
    int64_t num_keys;       // upper bound of the keys in the batch
    int q_heads, kv_heads;
    FastDivisor group_divisor; // q_heads / kv_heads
    float scale;
    DenseMask mask;
    // sm90 only. Forward: restricts the causal `mask` to these blocks if init_blocks or local_blocks is not
    // 0. Backward: gradients of the selected branch in a query's local blocks are computed together with
    // those of the window.
    InitLocalBlocks init_local;
    ConstRows q, k, v; // [nq, q_heads, D], [num_keys, kv_heads, D] twice
    Rows o;            // [nq, q_heads, D]
    float *lse;        // [nq, q_heads]
    // Backward. dout: ungated gradient of the output. exp(S - lse_bwd) is gate * P.
    ConstRows dout;                           // [nq, q_heads, D]
    const float *lse_bwd, *delta;             // [nq, q_heads]
    const float *local_lse_bwd, *local_delta; // [nq, q_heads], of the selected branch
    // fp32: dq in the layout of dq_accum_row, dk and dv [num_keys, kv_heads, D]
    float *dq_accum, *dk_accum, *dv_accum;
    int accumulate_dq, accumulate_dkv; // 0: overwrite, 1: add to
    int num_splits;     // thread blocks per key tile; if > 1, each writes its dK and dV to dkv_partial
    float *dkv_partial; // [num_splits][dk, dv][num_keys, kv_heads, D]
    // Backward, sm90. head_group_size: KV heads processed together. alternate_direction: 1 if every second
    // pass over the rows of a head group ascends. semaphores: [0] counts the work items taken, [1 +
    // tile*kv_heads + kv_head] the key tiles added to a dQ tile.
    int head_group_size, alternate_direction, *semaphores;
};

static inline DenseParams make_dense_params(const FsaConfig *c, const BatchLayout *batch,
                                            FsaVisibility rule) {
    DenseParams d = {};
    d.batch = *batch;
    d.cu_keys = rule == FSA_COMPRESSED ? batch->cu_windows : batch->cu_seqlens;
    d.num_keys = rule == FSA_COMPRESSED ? fsa_max_windows(c, batch) : batch->n;
    d.q_heads = c->q_heads;
    d.kv_heads = c->kv_heads;
    d.group_divisor = make_fast_divisor(c->q_heads / c->kv_heads);
    d.scale = softmax_scale(c);
    d.mask = make_dense_mask(c, rule);
    return d;
}

// The backward kernels scale P by 2^p_scale_log2 and their results by p_unscale, to keep small P from
// underflowing in fp16. bf16 has the exponent range of fp32 and needs no scale.
template <typename T> __device__ constexpr float p_scale_log2(); // bf16 and fp16 alone
template <> __device__ constexpr float p_scale_log2<__nv_bfloat16>() {
    return 0;
}
template <> __device__ constexpr float p_scale_log2<__half>() {
    return 6;
}
template <typename T> __device__ constexpr float p_unscale(); // bf16 and fp16 alone
template <> __device__ constexpr float p_unscale<__nv_bfloat16>() {
    return 1;
}
template <> __device__ constexpr float p_unscale<__half>() {
    return 1.0f / 64;
}

// Launchers of one architecture's kernels, called by dense.cu. They read only head_dim of c. Return an
// FsaStatus.
int fsa_dense_forward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream);
int fsa_dense_backward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream);
int fsa_dense_forward_sm90(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream);
// Without accumulate_dq, overwrites only the dq rows that see a key.
int fsa_dense_backward_sm90(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream);
// Backward under the compressed rule: the number of splits, and an upper bound of splits * keys that never
// shrinks while num_keys grows.
int fsa_dense_num_splits_sm90(int64_t num_keys, int kv_heads);
int64_t fsa_dense_split_rows_sm90(int64_t num_keys, int kv_heads);
// Bytes of DenseParams::semaphores.
size_t fsa_dense_semaphore_bytes(const BatchLayout &batch, int q_heads, int kv_heads);
#endif
