// dense.cu: launchers of dense attention: causal, sliding window and compressed (dense.cuh lists the rules).
// Chooses the kernels of the device's architecture: sm90/dense_fwd.cu and sm90/dense_bwd.cu for Hopper, the
// portable kernels sm80/dense_fwd.cu and sm80/dense_bwd.cu for others. kernels.h documents the functions.
#include "dense.cuh"

static bool dense_supports(const FsaConfig *c, FsaVisibility rule) {
    return (c->head_dim == 64 || c->head_dim == 128) && rule != FSA_SELECTED;
}

int fsa_dense_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, FsaVisibility rule,
                      ConstRows q, ConstRows k, ConstRows v, Rows o, float *lse, cudaStream_t stream) {
    if (!dense_supports(c, rule)) return FSA_ERROR_CONFIG;
    DenseParams d = make_dense_params(c, batch, rule);
    d.q = q, d.k = k, d.v = v, d.o = o, d.lse = lse;
    return fsa_use_sm90() ? fsa_dense_forward_sm90(c, d, dtype, stream)
                          : fsa_dense_forward_sm80(c, d, dtype, stream);
}

int fsa_dense_init_local_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q,
                                 ConstRows k, ConstRows v, Rows o, float *lse, cudaStream_t stream) {
    DenseParams d = make_dense_params(c, batch, FSA_CAUSAL);
    const int64_t init_end = (int64_t)c->init_blocks * c->block;
    d.init_local =
        InitLocalBlocks{c->init_blocks, c->local_blocks, c->block,
                        (int)(init_end < INT32_MAX ? init_end : INT32_MAX), make_fast_divisor(c->block)};
    d.q = q, d.k = k, d.v = v, d.o = o, d.lse = lse;
    return fsa_dense_forward_sm90(c, d, dtype, stream);
}

// dk_accum, dv_accum (+)= sum of the splits' partials, in the order of the splits. A thread sums four
// channels of dk and of dv: it reads num_splits * 32 bytes and writes 32. The kernel is memory-bound.
__global__ void __launch_bounds__(256) dense_combine_dkv_kernel(const DenseParams p, int64_t row_size) {
    int64_t index = (blockIdx.x * 256ll + threadIdx.x) * 4, size = p.num_keys * row_size;
    if (index >= p.cu_keys[p.batch.num_seqs] * row_size) return;
    for (int is_dv = 0; is_dv < 2; is_dv++) {
        float *out = (is_dv ? p.dv_accum : p.dk_accum) + index;
        float4 sum = p.accumulate_dkv ? *(float4 *)out : make_float4(0, 0, 0, 0);
        for (int split = 0; split < p.num_splits; split++) {
            float4 x = *(const float4 *)(p.dkv_partial + (split * 2 + is_dv) * size + index);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        *(float4 *)out = sum;
    }
}

// Returns how many thread blocks compute dK and dV of a key tile. Under the compressed rule many queries see
// few keys, so one thread block per key tile leaves SMs idle. sm80 kernels: one split per query head of the
// group.
static int dense_num_splits(const FsaConfig *c, FsaVisibility rule, int64_t num_keys) {
    if (rule != FSA_COMPRESSED) return 1;
    return fsa_use_sm90() ? fsa_dense_num_splits_sm90(num_keys, c->kv_heads) : c->q_heads / c->kv_heads;
}

static size_t dkv_partial_bytes(const FsaConfig *c, const BatchLayout *batch, FsaVisibility rule) {
    if (rule != FSA_COMPRESSED) return 0;
    int64_t keys = fsa_max_windows(c, batch), num_splits = dense_num_splits(c, rule, keys),
            rows = num_splits > 1 ? num_splits * keys : 0;
    if (fsa_use_sm90()) rows = fsa_dense_split_rows_sm90(keys, c->kv_heads);
    return (size_t)rows * 2 * c->kv_heads * c->head_dim * sizeof(float);
}

size_t fsa_dense_backward_scratch_bytes(const FsaConfig *c, const BatchLayout *batch, FsaVisibility rule) {
    return dkv_partial_bytes(c, batch, rule) + fsa_dense_semaphore_bytes(*batch, c->q_heads, c->kv_heads);
}

static int run_backward(const FsaConfig *c, FsaDtype dtype, FsaVisibility rule, DenseParams d, void *scratch,
                        cudaStream_t stream) {
    const BatchLayout *batch = &d.batch;
    if (!dense_supports(c, rule)) return FSA_ERROR_CONFIG;
    d.num_splits = dense_num_splits(c, rule, d.num_keys);
    d.dkv_partial = (float *)scratch;
    d.semaphores = (int *)((char *)scratch + dkv_partial_bytes(c, batch, rule));
    if (!scratch) return FSA_ERROR_WORKSPACE;
    // The sm90 kernel does not write the dq rows that see no key.
    if (fsa_use_sm90() && rule == FSA_COMPRESSED && !d.accumulate_dq) {
        const size_t bytes = (size_t)batch->nq * c->q_heads * c->head_dim * sizeof(float);
        CUDA_TRY(cudaMemsetAsync(d.dq_accum, 0, bytes, stream));
        d.accumulate_dq = 1;
    }
    TRY(fsa_use_sm90() ? fsa_dense_backward_sm90(c, d, dtype, stream)
                       : fsa_dense_backward_sm80(c, d, dtype, stream));
    if (d.num_splits > 1 && d.num_keys > 0) {
        int64_t row_size = (int64_t)d.kv_heads * c->head_dim, threads = d.num_keys * row_size / 4;
        return LAUNCH(dense_combine_dkv_kernel, (unsigned)((threads + 255) / 256), 256, 0, stream, d,
                      row_size);
    }
    return FSA_OK;
}

int fsa_dense_backward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, FsaVisibility rule,
                       ConstRows q, ConstRows k, ConstRows v, ConstRows dout, const float *lse_bwd,
                       const float *delta, float *dq, float *dk, float *dv, int accumulate_dq,
                       int accumulate_dkv, void *scratch, cudaStream_t stream) {
    DenseParams d = make_dense_params(c, batch, rule);
    d.q = q, d.k = k, d.v = v, d.dout = dout, d.lse_bwd = lse_bwd, d.delta = delta;
    d.dq_accum = dq, d.dk_accum = dk, d.dv_accum = dv;
    d.accumulate_dq = accumulate_dq, d.accumulate_dkv = accumulate_dkv;
    return run_backward(c, dtype, rule, d, scratch, stream);
}

// Not 0 if the local blocks of a query lie inside its window, and the 64 keys of a warpgroup in one block.
int fsa_local_blocks_in_window_backward(const FsaConfig *c) {
    const bool inside = (int64_t)c->local_blocks * c->block <= c->window && c->block % 64 == 0;
    return fsa_use_sm90() && inside ? c->local_blocks : 0;
}

int fsa_window_backward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q,
                        ConstRows k, ConstRows v, ConstRows dout, const float *const lse_bwd[2],
                        const float *const delta[2], float *dq, float *dk, float *dv, void *scratch,
                        cudaStream_t stream) {
    DenseParams d = make_dense_params(c, batch, FSA_WINDOW);
    d.init_local.local_blocks = fsa_local_blocks_in_window_backward(c), d.init_local.block = c->block;
    d.q = q, d.k = k, d.v = v, d.dout = dout, d.dq_accum = dq, d.dk_accum = dk, d.dv_accum = dv;
    d.local_lse_bwd = lse_bwd[0], d.local_delta = delta[0], d.lse_bwd = lse_bwd[1], d.delta = delta[1];
    return run_backward(c, dtype, FSA_WINDOW, d, scratch, stream);
}
