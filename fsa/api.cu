// fsa.cu: the public API: checks arguments, cuts the workspace, and runs the steps in order.
#include "kernels.h"
#include "mma.cuh"
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>

static thread_local char last_error[256];

const char *fsa_last_error(void) {
    return last_error;
}

__attribute__((format(printf, 2, 3))) static int fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}

#define TRY(call)                                                                                            \
    do {                                                                                                     \
        int status_ = (call);                                                                                \
        if (status_) return status_;                                                                         \
    } while (0)
// For a launcher.
#define RUN(call)                                                                                            \
    do {                                                                                                     \
        int status_ = (call);                                                                                \
        if (status_ == FSA_ERROR_CUDA) return fail(status_, "%.80s...: the launch failed", #call);           \
        if (status_) return fail(status_, "%.80s...: the step refuses these arguments", #call);              \
    } while (0)

static int check_shape(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b) {
    if (!c) return fail(FSA_ERROR_ARGUMENT, "config: NULL");
    if (!b) return fail(FSA_ERROR_ARGUMENT, "batch: NULL");
    if (fsa_config_check(c, last_error, sizeof last_error)) return FSA_ERROR_CONFIG;
    if (c->head_dim != 64 && c->head_dim != 128) {
        return fail(FSA_ERROR_CONFIG, "head_dim %d: the GPU kernels take 64 and 128", c->head_dim);
    }
    if (c->kv_heads > 65535) return fail(FSA_ERROR_CONFIG, "kv_heads %d: at most 65535", c->kv_heads);
    if (dtype != FSA_BF16 && dtype != FSA_FP16) {
        return fail(FSA_ERROR_ARGUMENT, "dtype %d: must be %d (bf16) or %d (fp16)", (int)dtype, FSA_BF16,
                    FSA_FP16);
    }
    if (b->num_queries < 0 || b->num_keys < 0 || b->num_seqs < 0 || b->num_segments < 0) {
        return fail(FSA_ERROR_ARGUMENT,
                    "batch: %lld queries, %lld keys, %lld sequences, %lld segments: none may be negative",
                    (long long)b->num_queries, (long long)b->num_keys, (long long)b->num_seqs,
                    (long long)b->num_segments);
    }
    if ((b->num_keys > 0 && b->num_seqs == 0) || (b->num_queries > 0 && b->num_segments == 0)) {
        return fail(FSA_ERROR_ARGUMENT, "batch: keys need a sequence and queries a segment");
    }
    if (b->max_len > INT32_MAX / 2 || b->max_len < 0 || b->max_len > b->num_keys) {
        return fail(FSA_ERROR_ARGUMENT, "max_len %lld: must be from 0 to num_keys %lld, and below 2^30",
                    (long long)b->max_len, (long long)b->num_keys);
    }
    if (b->num_queries > INT32_MAX || b->num_keys > INT32_MAX) {
        return fail(FSA_ERROR_ARGUMENT, "batch: %lld queries, %lld keys: at most 2^31 - 1 of either",
                    (long long)b->num_queries, (long long)b->num_keys);
    }
    if (b->num_queries * c->topk > (int64_t)UINT32_MAX) {
        return fail(FSA_ERROR_ARGUMENT, "num_queries %lld: times topk %d exceeds 2^32 - 1",
                    (long long)b->num_queries, c->topk);
    }
    return FSA_OK;
}

static int check_pointer(const char *name, const void *p) {
    if (!p) return fail(FSA_ERROR_ARGUMENT, "%s: NULL", name);
    if ((uintptr_t)p % 16) return fail(FSA_ERROR_ARGUMENT, "%s: not aligned to 16 bytes", name);
    return FSA_OK;
}
#define POINTER(name) TRY(check_pointer(#name, name))

// Cuts a workspace into pieces; with base NULL it only counts.
struct Arena {
    char *base;
    size_t used;
    template <typename T> void take(T **p, size_t bytes) {
        *p = base ? (T *)(base + used) : NULL;
        used += (bytes + 255) / 256 * 256;
    }
};

static BatchLayout bounds(const FsaDeviceBatch *b) {
    BatchLayout p = {b->num_queries, b->num_keys,   b->num_seqs, b->num_segments,
                 b->max_len,     b->cu_seqlens, b->segments};
    return p;
}

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

struct Sizes {
    size_t q, k, kc, lse, gate; // elements
    Sizes(const FsaConfig *c, const BatchLayout *p)
        : q((size_t)p->nq * c->q_heads * c->head_dim), k((size_t)p->n * c->kv_heads * c->head_dim),
          kc((size_t)fsa_max_windows(c, p) * c->kv_heads * c->head_dim), lse((size_t)p->nq * c->q_heads),
          gate((size_t)p->nq * (c->gate_per_token ? 1 : c->q_heads) * 3) {}
};

// What forward keeps for backward.
struct Saved {
    void *q, *k, *kc, *vc, *o[3];
    float *lse[3];
    int32_t *block_indices;
    size_t bytes;
    Saved(const FsaConfig *c, const BatchLayout *p, void *memory) {
        Sizes n(c, p);
        Arena a = {(char *)memory, 0};
        a.take(&q, n.q * 2);
        a.take(&k, n.k * 2);
        a.take(&kc, n.kc * 2);
        a.take(&vc, n.kc * 2);
        for (int i = 0; i < 3 && !c->recompute; i++) a.take(&o[i], n.q * 2);
        for (int i = 0; i < 3; i++) a.take(&lse[i], n.lse * 4);
        a.take(&block_indices, (size_t)c->kv_heads * p->nq * c->topk * 4);
        bytes = a.used;
    }
};

// The workspace of every operation: the plan first, then what it alone needs. `scratch` is shared by the
// steps, one after another.
struct Work {
    void *batch, *scratch;
    void *o[3]; // the branches' outputs and an lse, where they are not kept
    float *lse, *delta[3], *lse_bwd[3], *dq, *dk, *dv, *dk_plain, *dkc, *dvc;
    size_t bytes;
    Work(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, FsaOperation op, void *memory) {
        Sizes n(c, p);
        Arena a = {(char *)memory, 0};
        size_t scratch_bytes = 0;
        bool backward = op == FSA_BACKWARD || op == FSA_SELECTED_BACKWARD || op == FSA_ATTENTION_BACKWARD;
        a.take(&batch, fsa_batch_layout_bytes(p->num_seqs, p->num_segments));
        if (op <= FSA_SELECTED_BACKWARD) scratch_bytes = fsa_selected_scratch_bytes(c, p, dtype, backward);
        if (c->recompute && (op == FSA_FORWARD || op == FSA_BACKWARD)) {
            for (int i = 0; i < 3; i++) // forward's selected output is where the gated sum comes
                if (backward || i != 1) a.take(&o[i], n.q * 2);
            if (backward) a.take(&lse, n.lse * 4);
            scratch_bytes = max_size(scratch_bytes, fsa_selected_scratch_bytes(c, p, dtype, 0));
        }
        for (int i = 0; i < (op == FSA_BACKWARD ? 3 : backward ? 1 : 0); i++) {
            a.take(&delta[i], n.lse * 4);
            if (op != FSA_SELECTED_BACKWARD) a.take(&lse_bwd[i], n.lse * 4); // there it is lse
        }
        if (op == FSA_FORWARD || op == FSA_BACKWARD) {
            scratch_bytes = max_size(scratch_bytes, fsa_compress_scratch_bytes(c, p, backward));
        }
        if (op == FSA_BACKWARD || op == FSA_ATTENTION_BACKWARD) {
            a.take(&dq, n.q * 4);
            a.take(&dk, n.k * 4);
            a.take(&dv, n.k * 4);
            for (int rule = FSA_CAUSAL; rule <= FSA_COMPRESSED; rule++) {
                scratch_bytes =
                    max_size(scratch_bytes, fsa_dense_backward_scratch_bytes(c, p, (FsaVisibility)rule));
            }
        }
        if (op == FSA_BACKWARD) {
            a.take(&dk_plain, n.k * 4);
            a.take(&dkc, n.kc * 4);
            a.take(&dvc, n.kc * 4);
        }
        a.take(&scratch, scratch_bytes);
        bytes = a.used;
    }
};

size_t fsa_workspace_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaOperation op) {
    if (check_shape(c, dtype, b)) return 0;
    if (op < FSA_FORWARD || op > FSA_ATTENTION_BACKWARD) {
        fail(FSA_ERROR_ARGUMENT, "operation %d: unknown", (int)op);
        return 0;
    }
    BatchLayout p = bounds(b);
    return Work(c, &p, dtype, op, NULL).bytes;
}

size_t fsa_saved_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b) {
    if (check_shape(c, dtype, b)) return 0;
    BatchLayout p = bounds(b);
    return Saved(c, &p, NULL).bytes;
}

const int32_t *fsa_saved_block_indices(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                                 const void *saved) {
    if (check_shape(c, dtype, b)) return NULL;
    BatchLayout p = bounds(b);
    return Saved(c, &p, (void *)saved).block_indices;
}

// Checks what all entries share and makes the plan.
static int begin(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaOperation op,
                 void *workspace, size_t workspace_bytes, BatchLayout *p, FsaStream stream) {
    TRY(check_shape(c, dtype, b));
    if (!b->cu_seqlens) return fail(FSA_ERROR_ARGUMENT, "cu_seqlens: NULL");
    if (!b->segments && b->num_segments > 0) return fail(FSA_ERROR_ARGUMENT, "segments: NULL");
    *p = bounds(b);
    size_t need = Work(c, p, dtype, op, NULL).bytes;
    if (!workspace || (uintptr_t)workspace % 256) {
        return fail(FSA_ERROR_WORKSPACE, "workspace: %s", workspace ? "not aligned to 256 bytes" : "NULL");
    }
    if (workspace_bytes < need) {
        return fail(FSA_ERROR_WORKSPACE, "workspace: %zu bytes, needs %zu", workspace_bytes, need);
    }
    RUN(fsa_batch_layout(p, c, p->nq, p->n, p->num_seqs, p->num_segments, p->max_len, p->cu_seqlens, p->segments,
                 workspace, stream));
    return FSA_OK;
}

static int check_phi(const FsaConfig *c, const FsaPhiWeights *phi) {
    if (c->phi == FSA_PHI_MEAN) return FSA_OK;
    if (!phi) return fail(FSA_ERROR_ARGUMENT, "phi: NULL, but the config asks for linear compression");
    TRY(check_pointer("phi->wk", phi->wk));
    TRY(check_pointer("phi->wv", phi->wv));
    return phi->pe ? check_pointer("phi->pe", phi->pe) : FSA_OK;
}

// Output and lse of the compressed (branch 0), the selected (1) or the sliding branch (2).
static int branch_forward(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, int branch, const Saved &s,
                          const void *v, void *scratch, void *o, float *lse, cudaStream_t stream) {
    if (branch == 0) return fsa_dense_forward(c, p, dtype, FSA_COMPRESSED, s.q, s.kc, s.vc, o, lse, stream);
    if (branch == 2) return fsa_dense_forward(c, p, dtype, FSA_WINDOW, s.q, s.k, v, o, lse, stream);
    return fsa_selected_branch_forward(c, p, dtype, s.q, s.k, v, s.block_indices, scratch, o, lse, NULL, stream);
}

int fsa_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q, const void *k,
                const void *v, const FsaPhiWeights *phi, const double *inv_freq, const void *gate_logits,
                const int32_t *block_indices, void *o, void *saved, void *workspace, size_t workspace_bytes,
                FsaStream stream) {
    BatchLayout p;
    TRY(begin(c, dtype, b, FSA_FORWARD, workspace, workspace_bytes, &p, stream));
    if (p.nq == 0) return FSA_OK;
    POINTER(q);
    POINTER(k);
    POINTER(v);
    POINTER(gate_logits);
    POINTER(o);
    POINTER(saved);
    TRY(check_phi(c, phi));
    FsaPhiWeights none = {NULL, NULL, NULL};
    if (c->phi == FSA_PHI_MEAN) phi = &none;
    Saved s(c, &p, saved);
    Work w(c, &p, dtype, FSA_FORWARD, workspace);
    RUN(fsa_rope_queries(c, &p, dtype, q, inv_freq, s.q, stream));
    RUN(fsa_rope_keys(c, &p, dtype, k, inv_freq, s.k, stream));
    RUN(fsa_compress_forward(c, &p, dtype, k, v, phi->wk, phi->pe, phi->wv, inv_freq, s.kc, s.vc, w.scratch,
                             stream));
    void *const *branches = c->recompute ? w.o : s.o;
    RUN(branch_forward(c, &p, dtype, 0, s, v, w.scratch, branches[0], s.lse[0], stream));
    if (block_indices) {
        cudaMemcpyAsync(s.block_indices, block_indices, (size_t)c->kv_heads * p.nq * c->topk * 4,
                        cudaMemcpyDeviceToDevice, stream);
    } else {
        RUN(fsa_topk(c, &p, dtype, s.q, s.kc, s.lse[0], s.block_indices, stream));
    }
    RUN(branch_forward(c, &p, dtype, 2, s, v, w.scratch, branches[2], s.lse[2], stream));
    GateCombine gate = {gate_logits, branches[0], branches[2], o};
    RUN(fsa_selected_branch_forward(c, &p, dtype, s.q, s.k, v, s.block_indices, w.scratch, c->recompute ? o : branches[1],
                        s.lse[1], &gate, stream));
    return FSA_OK;
}

int fsa_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *k, const void *v,
                 const FsaPhiWeights *phi, const double *inv_freq, const void *gate_logits, const void *dout,
                 const void *saved, void *dq, void *dk, void *dv, const FsaPhiGradients *dphi,
                 void *dgate_logits, void *workspace, size_t workspace_bytes, FsaStream stream) {
    BatchLayout p;
    TRY(begin(c, dtype, b, FSA_BACKWARD, workspace, workspace_bytes, &p, stream));
    if (p.n == 0) return FSA_OK;
    POINTER(k);
    POINTER(v);
    POINTER(saved);
    POINTER(dk);
    POINTER(dv);
    if (p.nq > 0) {
        POINTER(gate_logits);
        POINTER(dout);
        POINTER(dq);
        POINTER(dgate_logits);
    }
    TRY(check_phi(c, phi));
    FsaPhiWeights none = {NULL, NULL, NULL};
    FsaPhiGradients no_gradients = {NULL, NULL, NULL};
    if (c->phi == FSA_PHI_MEAN) phi = &none, dphi = &no_gradients;
    if (!dphi) return fail(FSA_ERROR_ARGUMENT, "dphi: NULL, but the config asks for linear compression");
    if (c->phi != FSA_PHI_MEAN) {
        TRY(check_pointer("dphi->dwk", dphi->dwk));
        TRY(check_pointer("dphi->dwv", dphi->dwv));
        if (phi->pe) TRY(check_pointer("dphi->dpe", dphi->dpe));
    }
    Saved s(c, &p, (void *)saved);
    Work w(c, &p, dtype, FSA_BACKWARD, workspace);
    Sizes n(c, &p);
    void *const *branches = c->recompute ? w.o : s.o;
    for (int i = 0; i < 3 && c->recompute && p.nq > 0; i++) {
        RUN(branch_forward(c, &p, dtype, i, s, v, w.scratch, w.o[i], w.lse, stream));
    }
    RUN(fsa_gate_backward(c, dtype, p.nq, gate_logits, branches, s.lse, dout, w.delta, w.lse_bwd,
                          dgate_logits, stream));
    // The other branches leave fp32 sums, which the selected branch adds to its own.
    RUN(fsa_window_backward(c, &p, dtype, s.q, s.k, v, dout, w.lse_bwd + 1, w.delta + 1, w.dq, w.dk, w.dv,
                            w.scratch, stream));
    RUN(fsa_dense_backward(c, &p, dtype, FSA_COMPRESSED, s.q, s.kc, s.vc, dout, w.lse_bwd[0], w.delta[0],
                           w.dq, w.dkc, w.dvc, 1, 0, w.scratch, stream));
    RUN(fsa_compress_backward(c, &p, dtype, k, v, phi->wk, phi->pe, phi->wv, inv_freq, w.dkc, w.dvc,
                              w.dk_plain, w.dv, 1, dphi->dwk, dphi->dpe, dphi->dwv, w.scratch, stream));
    BranchGradients others = {w.dq, w.dk, w.dv, w.dk_plain, inv_freq};
    RUN(fsa_selected_branch_backward(c, &p, dtype, s.q, s.k, v, s.block_indices, fsa_window_backward_local_blocks(c), dout, w.delta[1],
                         w.lse_bwd[1], &others, w.scratch, dq, dk, dv, stream));
    return FSA_OK;
}

int fsa_selected_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q,
                         const void *k, const void *v, const int32_t *block_indices, void *o, float *lse,
                         void *workspace, size_t workspace_bytes, FsaStream stream) {
    BatchLayout p;
    TRY(begin(c, dtype, b, FSA_SELECTED_FORWARD, workspace, workspace_bytes, &p, stream));
    if (p.nq == 0) return FSA_OK;
    POINTER(q);
    POINTER(k);
    POINTER(v);
    POINTER(block_indices);
    POINTER(o);
    POINTER(lse);
    Work w(c, &p, dtype, FSA_SELECTED_FORWARD, workspace);
    RUN(fsa_selected_branch_forward(c, &p, dtype, q, k, v, block_indices, w.scratch, o, lse, NULL, stream));
    return FSA_OK;
}

int fsa_selected_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q,
                          const void *k, const void *v, const int32_t *block_indices, const void *o,
                          const float *lse, const void *dout, void *dq, void *dk, void *dv, void *workspace,
                          size_t workspace_bytes, FsaStream stream) {
    BatchLayout p;
    TRY(begin(c, dtype, b, FSA_SELECTED_BACKWARD, workspace, workspace_bytes, &p, stream));
    if (p.n == 0) return FSA_OK;
    POINTER(k);
    POINTER(v);
    POINTER(dk);
    POINTER(dv);
    if (p.nq > 0) {
        POINTER(q);
        POINTER(block_indices);
        POINTER(o);
        POINTER(lse);
        POINTER(dout);
        POINTER(dq);
    }
    Work w(c, &p, dtype, FSA_SELECTED_BACKWARD, workspace);
    RUN(fsa_bwd_preprocess(c, dtype, p.nq, o, lse, dout, w.delta[0], NULL, stream));
    RUN(fsa_selected_branch_backward(c, &p, dtype, q, k, v, block_indices, 0, dout, w.delta[0], lse, NULL, w.scratch, dq, dk,
                         dv, stream));
    return FSA_OK;
}

int fsa_select_blocks(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q, const void *kc,
               const float *lse_c, int32_t *block_indices, void *workspace, size_t workspace_bytes,
               FsaStream stream) {
    BatchLayout p;
    TRY(begin(c, dtype, b, FSA_SELECT_BLOCKS, workspace, workspace_bytes, &p, stream));
    if (p.nq == 0) return FSA_OK;
    POINTER(q);
    POINTER(kc);
    POINTER(lse_c);
    POINTER(block_indices);
    RUN(fsa_topk(c, &p, dtype, q, kc, lse_c, block_indices, stream));
    return FSA_OK;
}

static int check_rule(FsaVisibility rule) {
    if (rule == FSA_CAUSAL || rule == FSA_WINDOW || rule == FSA_COMPRESSED) return FSA_OK;
    return fail(FSA_ERROR_ARGUMENT, "rule %d: must be causal, window or compressed", (int)rule);
}

int fsa_attention_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaVisibility rule,
                       const void *q, const void *k, const void *v, void *o, float *lse, void *workspace,
                       size_t workspace_bytes, FsaStream stream) {
    BatchLayout p;
    TRY(check_rule(rule));
    TRY(begin(c, dtype, b, FSA_ATTENTION_FORWARD, workspace, workspace_bytes, &p, stream));
    if (p.nq == 0) return FSA_OK;
    POINTER(q);
    POINTER(k);
    POINTER(v);
    POINTER(o);
    POINTER(lse);
    RUN(fsa_dense_forward(c, &p, dtype, rule, q, k, v, o, lse, stream));
    return FSA_OK;
}

// Rounds fp32 gradients of *rows rows (bound: the grid's): 4 bytes in, 2 out an element; memory binds.
template <typename T>
__global__ void __launch_bounds__(256)
    round_kernel(const float4 *x, uint2 *y, const int64_t *rows, int row_quads) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= *rows * row_quads) return;
    float4 f = x[i];
    y[i] = make_uint2(pack2<T>(f.x, f.y), pack2<T>(f.z, f.w));
}
static int round_to(FsaDtype dtype, const float *x, void *y, size_t bound, const int64_t *rows, int row,
                    cudaStream_t stream) {
    if (bound == 0) return FSA_OK;
    unsigned grid = (unsigned)((bound / 4 + 255) / 256);
    if (dtype == FSA_BF16)
        round_kernel<__nv_bfloat16><<<grid, 256, 0, stream>>>((const float4 *)x, (uint2 *)y, rows, row / 4);
    else
        round_kernel<__half><<<grid, 256, 0, stream>>>((const float4 *)x, (uint2 *)y, rows, row / 4);
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

int fsa_attention_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaVisibility rule,
                        const void *q, const void *k, const void *v, const void *o, const float *lse,
                        const void *dout, void *dq, void *dk, void *dv, void *workspace,
                        size_t workspace_bytes, FsaStream stream) {
    BatchLayout p;
    TRY(check_rule(rule));
    TRY(begin(c, dtype, b, FSA_ATTENTION_BACKWARD, workspace, workspace_bytes, &p, stream));
    Sizes n(c, &p);
    bool compressed = rule == FSA_COMPRESSED;
    size_t keys = compressed ? n.kc : n.k;
    if (n.q > 0) {
        POINTER(q);
        POINTER(o);
        POINTER(lse);
        POINTER(dout);
        POINTER(dq);
    }
    if (keys > 0) {
        POINTER(k);
        POINTER(v);
        POINTER(dk);
        POINTER(dv);
    }
    Work w(c, &p, dtype, FSA_ATTENTION_BACKWARD, workspace);
    if (n.q == 0 || keys == 0) { // nothing attends to nothing: the gradients are zero
        cudaMemsetAsync(w.dq, 0, n.q * 4, stream);
        cudaMemsetAsync(w.dk, 0, keys * 4, stream);
        cudaMemsetAsync(w.dv, 0, keys * 4, stream);
    } else {
        RUN(fsa_bwd_preprocess(c, dtype, p.nq, o, lse, dout, w.delta[0], w.lse_bwd[0], stream));
        RUN(fsa_dense_backward(c, &p, dtype, rule, q, k, v, dout, w.lse_bwd[0], w.delta[0], w.dq, w.dk, w.dv,
                               0, 0, w.scratch, stream));
    }
    const int64_t *key_rows = compressed ? p.cu_windows + p.num_seqs : p.cu_seqlens + p.num_seqs;
    RUN(fsa_convert_dq(c, &p, dtype, w.dq, dq, stream));
    RUN(round_to(dtype, w.dk, dk, keys, key_rows, c->kv_heads * c->head_dim, stream));
    RUN(round_to(dtype, w.dv, dv, keys, key_rows, c->kv_heads * c->head_dim, stream));
    return FSA_OK;
}
