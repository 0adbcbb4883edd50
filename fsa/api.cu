// api.cu: the public API of fsa.h. Every function checks its arguments, lays out the workspace, and launches
// the steps (kernels.h) in order.
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

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

// Sets the error of a launcher. function: of fsa.h; call: the launcher's call, of which the name is kept.
static int fail_launcher(int status, const char *function, const char *call) {
    if (status == FSA_ERROR_CUDA) return fail(status, "%s: %s", function, fsa_cuda_error());
    return fail(status, "%s: %.*s: unsupported arguments; fsa.h states the limits", function,
                (int)strcspn(call, "("), call);
}
// Calls a launcher, or a function of the CUDA runtime; on failure sets the error and returns the status.
#define RUN(call)                                                                                            \
    do {                                                                                                     \
        int status_ = (call);                                                                                \
        if (status_) return fail_launcher(status_, __func__, #call);                                         \
    } while (0)
#define RUN_CUDA(call)                                                                                       \
    do {                                                                                                     \
        cudaError_t error_ = (call);                                                                         \
        if (error_ != cudaSuccess)                                                                           \
            return fail_launcher(fsa_record_cuda_error(#call, error_), __func__, #call);                     \
    } while (0)

static int check_shape(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b) {
    if (!c) return fail(FSA_ERROR_ARGUMENT, "config: NULL; must be an FsaConfig");
    if (!b) return fail(FSA_ERROR_ARGUMENT, "batch: NULL; must be an FsaDeviceBatch");
    if (fsa_config_check(c, last_error, sizeof last_error)) return FSA_ERROR_CONFIG;
    if (c->head_dim != 64 && c->head_dim != 128) {
        return fail(FSA_ERROR_CONFIG, "head_dim %d: must be 64 or 128 on the GPU", c->head_dim);
    }
    if (c->kv_heads > 65535)
        return fail(FSA_ERROR_CONFIG, "kv_heads %d: must be at most 65535 on the GPU", c->kv_heads);
    if (dtype != FSA_BF16 && dtype != FSA_FP16) {
        return fail(FSA_ERROR_ARGUMENT, "dtype %d: must be %d (bf16) or %d (fp16)", (int)dtype, FSA_BF16,
                    FSA_FP16);
    }
    if (b->num_queries < 0 || b->num_keys < 0 || b->num_seqs < 0 || b->num_segments < 0) {
        return fail(FSA_ERROR_ARGUMENT,
                    "num_queries %lld, num_keys %lld, num_seqs %lld, num_segments %lld: must be at least 0",
                    (long long)b->num_queries, (long long)b->num_keys, (long long)b->num_seqs,
                    (long long)b->num_segments);
    }
    if ((b->num_keys > 0 && b->num_seqs == 0) || (b->num_queries > 0 && b->num_segments == 0)) {
        return fail(FSA_ERROR_ARGUMENT,
                    "num_seqs %lld, num_segments %lld: must be at least 1 for %lld keys and %lld queries",
                    (long long)b->num_seqs, (long long)b->num_segments, (long long)b->num_keys,
                    (long long)b->num_queries);
    }
    if (b->max_len > INT32_MAX / 2 || b->max_len < 0 || b->max_len > b->num_keys) {
        return fail(FSA_ERROR_ARGUMENT, "max_len %lld: must be from 0 to num_keys %lld, and below 2^30",
                    (long long)b->max_len, (long long)b->num_keys);
    }
    if (b->num_queries > INT32_MAX || b->num_keys > INT32_MAX) {
        return fail(FSA_ERROR_ARGUMENT, "num_queries %lld, num_keys %lld: must be at most 2^31 - 1",
                    (long long)b->num_queries, (long long)b->num_keys);
    }
    if (b->num_queries > INT32_MAX / c->topk) {
        return fail(FSA_ERROR_ARGUMENT,
                    "num_queries %lld: times topk %d must be below 2^31; use batches of at most %lld",
                    (long long)b->num_queries, c->topk, (long long)INT32_MAX / c->topk);
    }
    if (b->num_queries > (int64_t)UINT32_MAX / c->q_heads) {
        return fail(FSA_ERROR_ARGUMENT,
                    "num_queries %lld: times q_heads %d must be below 2^32; use batches of at most %lld",
                    (long long)b->num_queries, c->q_heads, (long long)UINT32_MAX / c->q_heads);
    }
    return FSA_OK;
}

static int check_pointer(const char *name, const void *p) {
    if (!p) return fail(FSA_ERROR_ARGUMENT, "%s: NULL; must be a device pointer", name);
    if ((uintptr_t)p % 16) return fail(FSA_ERROR_ARGUMENT, "%s %p: must be aligned to 16 bytes", name, p);
    return FSA_OK;
}
#define POINTER(name) TRY(check_pointer(#name, name))

// Allocates arrays one after another from `base`, each aligned to 256 bytes; with base NULL it only counts.
struct Arena {
    char *base;
    size_t used;
    template <typename T> void allocate(T **p, size_t bytes) {
        *p = base ? (T *)(base + used) : NULL;
        used += (bytes + 255) / 256 * 256;
    }
};

// The fields that the host knows: enough for sizes and bounds. fsa_batch_layout sets the cu_ arrays.
static BatchLayout make_batch_layout(const FsaDeviceBatch *b) {
    BatchLayout batch = {b->num_queries, b->num_keys,   b->num_seqs, b->num_segments,
                         b->max_len,     b->cu_seqlens, b->segments};
    return batch;
}

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

// Elements of q, k, kc (an upper bound) and lse.
struct NumElements {
    size_t q, k, kc, lse;
    NumElements(const FsaConfig *c, const BatchLayout *batch)
        : q((size_t)batch->nq * c->q_heads * c->head_dim), k((size_t)batch->n * c->kv_heads * c->head_dim),
          kc((size_t)fsa_max_windows(c, batch) * c->kv_heads * c->head_dim),
          lse((size_t)batch->nq * c->q_heads) {}
};

// Layout of what forward saves for backward. Branches are in the order compressed, selected, sliding.
struct Saved {
    void *q, *k;            // rotated: [Nq, Hq, d], [N, Hkv, d]
    void *kc, *vc;          // [floor(N/s), Hkv, d]
    void *o[3];             // [Nq, Hq, d] of each branch, unless c->recompute
    float *lse[3];          // [Nq, Hq] of each branch
    int32_t *block_indices; // [Hkv, Nq, T]
    size_t bytes;           // of all
    Saved(const FsaConfig *c, const BatchLayout *batch, void *memory) {
        NumElements n(c, batch);
        Arena a = {(char *)memory, 0};
        a.allocate(&q, n.q * 2);
        a.allocate(&k, n.k * 2);
        a.allocate(&kc, n.kc * 2);
        a.allocate(&vc, n.kc * 2);
        for (int i = 0; i < 3 && !c->recompute; i++) a.allocate(&o[i], n.q * 2);
        for (int i = 0; i < 3; i++) a.allocate(&lse[i], n.lse * 4);
        a.allocate(&block_indices, (size_t)c->kv_heads * batch->nq * c->topk * 4);
        bytes = a.used;
    }
};

// Layout of an operation's workspace: the arrays of the BatchLayout, then those that the operation needs.
struct Workspace {
    void *batch_layout;              // fsa_batch_layout_bytes
    void *o[3];                      // with c->recompute: [Nq, Hq, d] of each branch
    float *lse;                      // with c->recompute: [Nq, Hq] of one branch
    float *delta[3], *lse_bwd[3];    // [Nq, Hq] of each branch
    float *dq_accum;                 // fp32 gradient of the rotated q, in the layout of kernels.h
    float *dk_accum, *dv_accum;      // [N, Hkv, d] fp32; of the rotated k
    float *dk_unrotated, *dkc, *dvc; // fp32: [N, Hkv, d] of k before RoPE, and [floor(N/s), Hkv, d]
    void *scratch;                   // of one step at a time; its size is that of the largest step
    size_t bytes;                    // of all
    Workspace(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, FsaOperation op, void *memory) {
        NumElements n(c, batch);
        Arena a = {(char *)memory, 0};
        size_t scratch_bytes = 0;
        bool backward = op == FSA_BACKWARD || op == FSA_SELECTED_BACKWARD || op == FSA_ATTENTION_BACKWARD;
        a.allocate(&batch_layout, fsa_batch_layout_bytes(batch->num_seqs, batch->num_segments));
        if (op <= FSA_SELECTED_BACKWARD)
            scratch_bytes = fsa_selected_scratch_bytes(c, batch, dtype, backward);
        if (c->recompute && (op == FSA_FORWARD || op == FSA_BACKWARD)) {
            for (int i = 0; i < 3; i++) // forward's selected branch stores only the gated sum
                if (backward || i != 1) a.allocate(&o[i], n.q * 2);
            if (backward) a.allocate(&lse, n.lse * 4);
            scratch_bytes = max_size(scratch_bytes, fsa_selected_scratch_bytes(c, batch, dtype, 0));
        }
        for (int i = 0; i < (op == FSA_BACKWARD ? 3 : backward ? 1 : 0); i++) {
            a.allocate(&delta[i], n.lse * 4);
            // FSA_SELECTED_BACKWARD reads lse instead.
            if (op != FSA_SELECTED_BACKWARD) a.allocate(&lse_bwd[i], n.lse * 4);
        }
        if (op == FSA_FORWARD || op == FSA_BACKWARD) {
            scratch_bytes = max_size(scratch_bytes, fsa_compress_scratch_bytes(c, batch, backward));
        }
        if (op == FSA_BACKWARD || op == FSA_ATTENTION_BACKWARD) {
            a.allocate(&dq_accum, n.q * 4);
            a.allocate(&dk_accum, n.k * 4);
            a.allocate(&dv_accum, n.k * 4);
            for (int rule = FSA_CAUSAL; rule <= FSA_COMPRESSED; rule++) {
                scratch_bytes =
                    max_size(scratch_bytes, fsa_dense_backward_scratch_bytes(c, batch, (FsaVisibility)rule));
            }
        }
        if (op == FSA_BACKWARD) {
            a.allocate(&dk_unrotated, n.k * 4);
            a.allocate(&dkc, n.kc * 4);
            a.allocate(&dvc, n.kc * 4);
        }
        a.allocate(&scratch, scratch_bytes);
        bytes = a.used;
    }
};

size_t fsa_workspace_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaOperation op) {
    if (check_shape(c, dtype, b)) return 0;
    if (op < FSA_FORWARD || op > FSA_ATTENTION_BACKWARD) {
        fail(FSA_ERROR_ARGUMENT, "operation %d: must be from %d (FSA_FORWARD) to %d (FSA_ATTENTION_BACKWARD)",
             (int)op, FSA_FORWARD, FSA_ATTENTION_BACKWARD);
        return 0;
    }
    if (fsa_check_device()) {
        fail(FSA_ERROR_CUDA, "%s: %s", __func__, fsa_cuda_error());
        return 0;
    }
    BatchLayout batch = make_batch_layout(b);
    return Workspace(c, &batch, dtype, op, NULL).bytes;
}

size_t fsa_saved_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b) {
    if (check_shape(c, dtype, b)) return 0;
    BatchLayout batch = make_batch_layout(b);
    return Saved(c, &batch, NULL).bytes;
}

const int32_t *fsa_saved_block_indices(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                                       const void *saved) {
    if (check_shape(c, dtype, b)) return NULL;
    BatchLayout batch = make_batch_layout(b);
    return Saved(c, &batch, (void *)saved).block_indices;
}

// Checks the arguments that all operations share, and launches the kernel that fills the batch layout.
// function: the caller's name.
static int start(const char *function, const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                 FsaOperation op, void *workspace, size_t workspace_bytes, BatchLayout *batch,
                 FsaStream stream) {
    TRY(check_shape(c, dtype, b));
    if (!b->cu_seqlens) return fail(FSA_ERROR_ARGUMENT, "cu_seqlens: NULL; must be a device pointer");
    if (!b->segments && b->num_segments > 0)
        return fail(FSA_ERROR_ARGUMENT, "segments: NULL; must be a device pointer");
    // cudaEventQuery and cudaStreamQuery leave cudaErrorNotReady, which is no error.
    cudaError_t earlier = cudaPeekAtLastError();
    if (earlier != cudaSuccess && earlier != cudaErrorNotReady) {
        return fail(FSA_ERROR_CUDA, "%s: not started, as a CUDA error of an earlier call is pending: %s",
                    function, cudaGetErrorString(earlier));
    }
    if (fsa_check_device()) return fail_launcher(FSA_ERROR_CUDA, function, "");
    const BatchLayout bounds = make_batch_layout(b);
    const size_t need = Workspace(c, &bounds, dtype, op, NULL).bytes;
    if (!workspace) return fail(FSA_ERROR_WORKSPACE, "workspace: NULL; must have %zu bytes", need);
    if ((uintptr_t)workspace % 256) {
        return fail(FSA_ERROR_WORKSPACE, "workspace %p: must be aligned to 256 bytes", workspace);
    }
    if (workspace_bytes < need) {
        return fail(FSA_ERROR_WORKSPACE, "workspace_bytes %zu: must be at least %zu (fsa_workspace_size)",
                    workspace_bytes, need);
    }
    int status = fsa_batch_layout(batch, c, b, workspace, stream);
    return status ? fail_launcher(status, function, "fsa_batch_layout") : FSA_OK;
}

static int check_phi(const FsaConfig *c, const FsaPhiWeights *phi) {
    if (c->phi == FSA_PHI_MEAN) return FSA_OK;
    if (!phi) return fail(FSA_ERROR_ARGUMENT, "phi: NULL; linear compression needs weights");
    TRY(check_pointer("phi->wk", phi->wk));
    TRY(check_pointer("phi->wv", phi->wv));
    return phi->pe ? check_pointer("phi->pe", phi->pe) : FSA_OK;
}

// Computes o and lse of the compressed (branch 0), the selected (1) or the sliding branch (2).
static int branch_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, int branch,
                          const Saved &s, const void *v, void *scratch, void *o, float *lse,
                          cudaStream_t stream) {
    if (branch == 0)
        return fsa_dense_forward(c, batch, dtype, FSA_COMPRESSED, s.q, s.kc, s.vc, o, lse, stream);
    if (branch == 2) return fsa_dense_forward(c, batch, dtype, FSA_WINDOW, s.q, s.k, v, o, lse, stream);
    return fsa_selected_branch_forward(c, batch, dtype, s.q, s.k, v, s.block_indices, scratch, o, lse, NULL,
                                       stream);
}

int fsa_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q, const void *k,
                const void *v, const FsaPhiWeights *phi, const double *inv_freq, const void *gate_logits,
                const int32_t *block_indices, void *o, void *saved, void *workspace, size_t workspace_bytes,
                FsaStream stream) {
    BatchLayout batch;
    TRY(start(__func__, c, dtype, b, FSA_FORWARD, workspace, workspace_bytes, &batch, stream));
    if (batch.nq == 0) return FSA_OK;
    POINTER(q);
    POINTER(k);
    POINTER(v);
    POINTER(gate_logits);
    POINTER(o);
    POINTER(saved);
    TRY(check_phi(c, phi));
    FsaPhiWeights none = {NULL, NULL, NULL};
    if (c->phi == FSA_PHI_MEAN) phi = &none;
    const int64_t q_row = (int64_t)c->q_heads * c->head_dim, k_row = (int64_t)c->kv_heads * c->head_dim;
    Saved s(c, &batch, saved);
    Workspace w(c, &batch, dtype, FSA_FORWARD, workspace);
    RUN(fsa_rope_queries(c, &batch, dtype, q, inv_freq, s.q, stream));
    RUN(fsa_rope_keys(c, &batch, dtype, k, inv_freq, s.k, stream));
    RUN(fsa_compress_forward(c, &batch, dtype, k, v, phi->wk, phi->pe, phi->wv, inv_freq, s.kc, s.vc,
                             w.scratch, stream));
    void *const *o_branch = c->recompute ? w.o : s.o;
    RUN(branch_forward(c, &batch, dtype, 0, s, v, w.scratch, o_branch[0], s.lse[0], stream));
    if (block_indices) {
        size_t bytes = (size_t)c->kv_heads * batch.nq * c->topk * 4;
        RUN_CUDA(cudaMemcpyAsync(s.block_indices, block_indices, bytes, cudaMemcpyDeviceToDevice, stream));
    } else {
        RUN(fsa_topk(c, &batch, dtype, {s.q, q_row}, {s.kc, k_row}, s.lse[0], s.block_indices, stream));
    }
    RUN(branch_forward(c, &batch, dtype, 2, s, v, w.scratch, o_branch[2], s.lse[2], stream));
    const int64_t gate_row = c->gate_per_token ? 3 : 3 * c->q_heads;
    GateCombine gate = {{gate_logits, gate_row}, o_branch[0], o_branch[2], {o, q_row}};
    RUN(fsa_selected_branch_forward(c, &batch, dtype, s.q, s.k, v, s.block_indices, w.scratch,
                                    c->recompute ? o : o_branch[1], s.lse[1], &gate, stream));
    return FSA_OK;
}

int fsa_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *k, const void *v,
                 const FsaPhiWeights *phi, const double *inv_freq, const void *gate_logits, const void *dout,
                 const void *saved, void *dq, void *dk, void *dv, const FsaPhiGradients *dphi,
                 void *dgate_logits, void *workspace, size_t workspace_bytes, FsaStream stream) {
    BatchLayout batch;
    TRY(start(__func__, c, dtype, b, FSA_BACKWARD, workspace, workspace_bytes, &batch, stream));
    if (batch.n == 0) return FSA_OK;
    POINTER(k);
    POINTER(v);
    POINTER(saved);
    POINTER(dk);
    POINTER(dv);
    if (batch.nq > 0) {
        POINTER(gate_logits);
        POINTER(dout);
        POINTER(dq);
        POINTER(dgate_logits);
    }
    TRY(check_phi(c, phi));
    FsaPhiWeights none = {NULL, NULL, NULL};
    FsaPhiGradients no_gradients = {NULL, NULL, NULL};
    if (c->phi == FSA_PHI_MEAN) phi = &none, dphi = &no_gradients;
    if (!dphi) return fail(FSA_ERROR_ARGUMENT, "dphi: NULL; linear compression needs gradients");
    if (c->phi != FSA_PHI_MEAN) {
        TRY(check_pointer("dphi->dwk", dphi->dwk));
        TRY(check_pointer("dphi->dwv", dphi->dwv));
        if (phi->pe) TRY(check_pointer("dphi->dpe", dphi->dpe));
    }
    Saved s(c, &batch, (void *)saved);
    Workspace w(c, &batch, dtype, FSA_BACKWARD, workspace);
    void *const *o_branch = c->recompute ? w.o : s.o;
    for (int i = 0; i < 3 && c->recompute && batch.nq > 0; i++) {
        RUN(branch_forward(c, &batch, dtype, i, s, v, w.scratch, w.o[i], w.lse, stream));
    }
    RUN(fsa_gate_backward(c, dtype, batch.nq, gate_logits, o_branch, s.lse, dout, w.delta, w.lse_bwd,
                          dgate_logits, stream));
    // The other branches leave fp32 gradients, which the selected branch adds to its own.
    RUN(fsa_window_backward(c, &batch, dtype, s.q, s.k, v, dout, w.lse_bwd + 1, w.delta + 1, w.dq_accum,
                            w.dk_accum, w.dv_accum, w.scratch, stream));
    RUN(fsa_dense_backward(c, &batch, dtype, FSA_COMPRESSED, s.q, s.kc, s.vc, dout, w.lse_bwd[0], w.delta[0],
                           w.dq_accum, w.dkc, w.dvc, 1, 0, w.scratch, stream));
    RUN(fsa_compress_backward(c, &batch, dtype, k, v, phi->wk, phi->pe, phi->wv, inv_freq, w.dkc, w.dvc,
                              w.dk_unrotated, w.dv_accum, 1, dphi->dwk, dphi->dpe, dphi->dwv, w.scratch,
                              stream));
    BranchGradients branch_grads = {w.dq_accum, w.dk_accum, w.dv_accum, w.dk_unrotated, inv_freq};
    RUN(fsa_selected_branch_backward(c, &batch, dtype, s.q, s.k, v, s.block_indices,
                                     fsa_local_blocks_in_window_backward(c), dout, w.delta[1], w.lse_bwd[1],
                                     &branch_grads, w.scratch, dq, dk, dv, stream));
    return FSA_OK;
}

int fsa_selected_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q,
                         const void *k, const void *v, const int32_t *block_indices, void *o, float *lse,
                         void *workspace, size_t workspace_bytes, FsaStream stream) {
    BatchLayout batch;
    TRY(start(__func__, c, dtype, b, FSA_SELECTED_FORWARD, workspace, workspace_bytes, &batch, stream));
    if (batch.nq == 0) return FSA_OK;
    POINTER(q);
    POINTER(k);
    POINTER(v);
    POINTER(block_indices);
    POINTER(o);
    POINTER(lse);
    Workspace w(c, &batch, dtype, FSA_SELECTED_FORWARD, workspace);
    RUN(fsa_selected_branch_forward(c, &batch, dtype, q, k, v, block_indices, w.scratch, o, lse, NULL,
                                    stream));
    return FSA_OK;
}

int fsa_selected_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q,
                          const void *k, const void *v, const int32_t *block_indices, const void *o,
                          const float *lse, const void *dout, void *dq, void *dk, void *dv, void *workspace,
                          size_t workspace_bytes, FsaStream stream) {
    BatchLayout batch;
    TRY(start(__func__, c, dtype, b, FSA_SELECTED_BACKWARD, workspace, workspace_bytes, &batch, stream));
    if (batch.n == 0) return FSA_OK;
    POINTER(k);
    POINTER(v);
    POINTER(dk);
    POINTER(dv);
    if (batch.nq > 0) {
        POINTER(q);
        POINTER(block_indices);
        POINTER(o);
        POINTER(lse);
        POINTER(dout);
        POINTER(dq);
    }
    Workspace w(c, &batch, dtype, FSA_SELECTED_BACKWARD, workspace);
    RUN(fsa_bwd_preprocess(c, dtype, batch.nq, o, lse, dout, w.delta[0], NULL, stream));
    RUN(fsa_selected_branch_backward(c, &batch, dtype, q, k, v, block_indices, 0, dout, w.delta[0], lse, NULL,
                                     w.scratch, dq, dk, dv, stream));
    return FSA_OK;
}

int fsa_select_blocks(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q,
                      const void *kc, const float *lse_c, int32_t *block_indices, void *workspace,
                      size_t workspace_bytes, FsaStream stream) {
    BatchLayout batch;
    TRY(start(__func__, c, dtype, b, FSA_SELECT_BLOCKS, workspace, workspace_bytes, &batch, stream));
    if (batch.nq == 0) return FSA_OK;
    POINTER(q);
    POINTER(kc);
    POINTER(lse_c);
    POINTER(block_indices);
    const int64_t q_row = (int64_t)c->q_heads * c->head_dim, k_row = (int64_t)c->kv_heads * c->head_dim;
    RUN(fsa_topk(c, &batch, dtype, {q, q_row}, {kc, k_row}, lse_c, block_indices, stream));
    return FSA_OK;
}

static int check_rule(FsaVisibility rule) {
    if (rule == FSA_CAUSAL || rule == FSA_WINDOW || rule == FSA_COMPRESSED) return FSA_OK;
    return fail(FSA_ERROR_ARGUMENT, "rule %d: must be %d (causal), %d (window) or %d (compressed)", (int)rule,
                FSA_CAUSAL, FSA_WINDOW, FSA_COMPRESSED);
}

int fsa_attention_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaVisibility rule,
                          const void *q, const void *k, const void *v, void *o, float *lse, void *workspace,
                          size_t workspace_bytes, FsaStream stream) {
    BatchLayout batch;
    TRY(check_rule(rule));
    TRY(start(__func__, c, dtype, b, FSA_ATTENTION_FORWARD, workspace, workspace_bytes, &batch, stream));
    if (batch.nq == 0) return FSA_OK;
    POINTER(q);
    POINTER(k);
    POINTER(v);
    POINTER(o);
    POINTER(lse);
    RUN(fsa_dense_forward(c, &batch, dtype, rule, q, k, v, o, lse, stream));
    return FSA_OK;
}

// y = x rounded to 16 bits, the first *rows rows of row_quads float4. A thread converts four elements. Reads
// 4 and writes 2 bytes per element; memory-bound.
template <typename T>
__global__ void __launch_bounds__(256)
    convert_kernel(const float4 *x, uint2 *y, const int64_t *rows, int row_quads) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= *rows * row_quads) return;
    float4 f = x[i];
    y[i] = make_uint2(pack2<T>(f.x, f.y), pack2<T>(f.z, f.w));
}
// bound: elements of x that the grid covers; row: elements per row.
static int convert(FsaDtype dtype, const float *x, void *y, size_t bound, const int64_t *rows, int row,
                   cudaStream_t stream) {
    if (bound == 0) return FSA_OK;
    unsigned grid = (unsigned)((bound / 4 + 255) / 256);
    if (dtype == FSA_BF16)
        return LAUNCH(convert_kernel<__nv_bfloat16>, grid, 256, 0, stream, (const float4 *)x, (uint2 *)y,
                      rows, row / 4);
    return LAUNCH(convert_kernel<__half>, grid, 256, 0, stream, (const float4 *)x, (uint2 *)y, rows, row / 4);
}

int fsa_attention_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaVisibility rule,
                           const void *q, const void *k, const void *v, const void *o, const float *lse,
                           const void *dout, void *dq, void *dk, void *dv, void *workspace,
                           size_t workspace_bytes, FsaStream stream) {
    BatchLayout batch;
    TRY(check_rule(rule));
    TRY(start(__func__, c, dtype, b, FSA_ATTENTION_BACKWARD, workspace, workspace_bytes, &batch, stream));
    NumElements n(c, &batch);
    bool compressed = rule == FSA_COMPRESSED;
    size_t keys = compressed ? n.kc : n.k; // elements of k
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
    Workspace w(c, &batch, dtype, FSA_ATTENTION_BACKWARD, workspace);
    if (n.q == 0 || keys == 0) { // no query or no key: the gradients are zero
        RUN_CUDA(cudaMemsetAsync(w.dq_accum, 0, n.q * 4, stream));
        RUN_CUDA(cudaMemsetAsync(w.dk_accum, 0, keys * 4, stream));
        RUN_CUDA(cudaMemsetAsync(w.dv_accum, 0, keys * 4, stream));
    } else {
        RUN(fsa_bwd_preprocess(c, dtype, batch.nq, o, lse, dout, w.delta[0], w.lse_bwd[0], stream));
        RUN(fsa_dense_backward(c, &batch, dtype, rule, q, k, v, dout, w.lse_bwd[0], w.delta[0], w.dq_accum,
                               w.dk_accum, w.dv_accum, 0, 0, w.scratch, stream));
    }
    const int64_t *key_rows =
        compressed ? batch.cu_windows + batch.num_seqs : batch.cu_seqlens + batch.num_seqs;
    RUN(fsa_convert_dq(c, &batch, dtype, w.dq_accum, dq, stream));
    RUN(convert(dtype, w.dk_accum, dk, keys, key_rows, c->kv_heads * c->head_dim, stream));
    RUN(convert(dtype, w.dv_accum, dv, keys, key_rows, c->kv_heads * c->head_dim, stream));
    return FSA_OK;
}
