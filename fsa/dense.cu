// dense.cu: softmax attention over all tokens (causal), the last W tokens (window) or the compressed
// windows in a query's past: one forward and one backward for the three rules, which differ only in
// which keys a query sees.
//
// Forward: a block holds 128 queries of a head and walks over the key tiles that they see, with an
// online softmax. Backward: one kernel holds 64 keys and walks over the queries that see them (dK, dV),
// another holds 64 queries and walks over their keys (dQ). Scores are computed in both: 7 products
// instead of 5, for which nothing is added by atomics and every sum has a fixed order.
#include "dense.cuh"

static bool dense_supports(const FsaConfig *c, FsaVisibility rule) {
    return (c->head_dim == 64 || c->head_dim == 128) && rule != FSA_SELECTED;
}

int fsa_dense_forward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, FsaVisibility rule, const void *q,
                      const void *k, const void *v, void *o, float *lse, cudaStream_t stream) {
    if (!dense_supports(c, rule)) return FSA_ERROR_CONFIG;
    DenseParams d = make_dense_params(c, p, rule);
    d.q = q, d.k = k, d.v = v, d.o = o, d.lse = lse;
    return fsa_use_sm90() ? fsa_dense_forward_sm90(c, d, dtype, stream) : fsa_dense_forward_sm80(c, d, dtype, stream);
}

int fsa_dense_init_local_forward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *q, const void *k,
                     const void *v, void *o, float *lse, cudaStream_t stream) {
    DenseParams d = make_dense_params(c, p, FSA_CAUSAL);
    const int64_t init_end = (int64_t)c->init_blocks * c->block;
    d.forced = InitLocalBlocks{c->init_blocks, c->local_blocks, c->block,
                      (int)(init_end < INT32_MAX ? init_end : INT32_MAX), make_fast_divisor(c->block)};
    d.q = q, d.k = k, d.v = v, d.o = o, d.lse = lse;
    return fsa_dense_forward_sm90(c, d, dtype, stream);
}

// dk, dv = the sums of the splits' partials, in order of split. A thread: four channels of both. Reads
// `splits` times 32 bytes and writes 32; bound by bytes.
__global__ void __launch_bounds__(256) dense_combine_dkv_kernel(const DenseParams p, int64_t row_size) {
    int64_t at = (blockIdx.x * 256ll + threadIdx.x) * 4, all = p.num_keys * row_size;
    if (at >= p.cu_keys[p.batch.num_seqs] * row_size) return;
    for (int which = 0; which < 2; which++) {
        float *to = (which ? p.dv : p.dk) + at;
        float4 sum = p.accumulate_kv ? *(float4 *)to : make_float4(0, 0, 0, 0);
        for (int split = 0; split < p.splits; split++) {
            float4 x = *(const float4 *)(p.partial + (split * 2 + which) * all + at);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        *(float4 *)to = sum;
    }
}

// The compressed rule has few keys, each seen by many queries: thread blocks share a tile of keys, a query
// head each, or on Hopper as dense_sm90.cu says; then a sum.
static int dense_splits(const FsaConfig *c, FsaVisibility rule, int64_t num_keys) {
    if (rule != FSA_COMPRESSED) return 1;
    return fsa_use_sm90() ? fsa_dense_num_splits_sm90(num_keys, c->kv_heads) : c->q_heads / c->kv_heads;
}

static size_t partial_bytes(const FsaConfig *c, const BatchLayout *p, FsaVisibility rule) {
    if (rule != FSA_COMPRESSED) return 0;
    int64_t keys = fsa_max_windows(c, p), splits = dense_splits(c, rule, keys),
            rows = splits > 1 ? splits * keys : 0;
    if (fsa_use_sm90()) rows = fsa_dense_split_rows_sm90(keys, c->kv_heads);
    return (size_t)rows * 2 * c->kv_heads * c->head_dim * sizeof(float);
}

size_t fsa_dense_backward_scratch_bytes(const FsaConfig *c, const BatchLayout *p, FsaVisibility rule) {
    return partial_bytes(c, p, rule) + fsa_dense_semaphore_bytes(*p, c->q_heads, c->kv_heads);
}

static int run_backward(const FsaConfig *c, FsaDtype dtype, FsaVisibility rule, DenseParams d, void *workspace,
                        cudaStream_t stream) {
    const BatchLayout *p = &d.batch;
    if (!dense_supports(c, rule)) return FSA_ERROR_CONFIG;
    d.splits = dense_splits(c, rule, d.num_keys);
    d.partial = (float *)workspace;
    d.order = (int *)((char *)workspace + partial_bytes(c, p, rule));
    if (!workspace) return FSA_ERROR_WORKSPACE;
    if (fsa_use_sm90() && rule == FSA_COMPRESSED && !d.accumulate_q) { // some rows see nothing
        cudaMemsetAsync(d.dq, 0, (size_t)p->nq * c->q_heads * c->head_dim * sizeof(float), stream);
        d.accumulate_q = 1;
    }
    int status = fsa_use_sm90() ? fsa_dense_backward_sm90(c, d, dtype, stream)
                              : fsa_dense_backward_sm80(c, d, dtype, stream);
    if (status) return status;
    if (d.splits > 1 && d.num_keys > 0) {
        int64_t row_size = (int64_t)d.kv_heads * c->head_dim, threads = d.num_keys * row_size / 4;
        dense_combine_dkv_kernel<<<(unsigned)((threads + 255) / 256), 256, 0, stream>>>(d, row_size);
    }
    return launch_status();
}

int fsa_dense_backward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, FsaVisibility rule,
                       const void *q, const void *k, const void *v, const void *dout, const float *lse_bwd,
                       const float *delta, float *dq, float *dk, float *dv, int accumulate_q,
                       int accumulate_kv, void *workspace, cudaStream_t stream) {
    DenseParams d = make_dense_params(c, p, rule);
    d.q = q, d.k = k, d.v = v, d.dout = dout, d.lse_bwd = lse_bwd, d.delta = delta;
    d.dq = dq, d.dk = dk, d.dv = dv, d.accumulate_q = accumulate_q, d.accumulate_kv = accumulate_kv;
    return run_backward(c, dtype, rule, d, workspace, stream);
}

// Where a query sees all of its last blocks through the window, too, and the keys of a warpgroup are one
// block's.
int fsa_window_backward_local_blocks(const FsaConfig *c) {
    const bool inside = (int64_t)c->local_blocks * c->block <= c->window && c->block % 64 == 0;
    return fsa_use_sm90() && inside ? c->local_blocks : 0;
}

int fsa_window_backward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *q, const void *k,
                        const void *v, const void *dout, const float *const lse_bwd[2],
                        const float *const delta[2], float *dq, float *dk, float *dv, void *workspace,
                        cudaStream_t stream) {
    DenseParams d = make_dense_params(c, p, FSA_WINDOW);
    d.forced.local = fsa_window_backward_local_blocks(c), d.forced.block = c->block;
    d.q = q, d.k = k, d.v = v, d.dout = dout, d.dq = dq, d.dk = dk, d.dv = dv;
    d.local_lse_bwd = lse_bwd[0], d.local_delta = delta[0], d.lse_bwd = lse_bwd[1], d.delta = delta[1];
    return run_backward(c, dtype, FSA_WINDOW, d, workspace, stream);
}
