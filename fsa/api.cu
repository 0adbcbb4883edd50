// api.cu: the public API of fsa.h. Every function checks its arguments, lays out the workspace, and launches
// the steps (kernels.h) in order.
#include "kernels.h"
#include "launch.cuh"
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static thread_local char last_error[320];
static thread_local const char *current_function = ""; // of fsa.h, for messages

const char *fsa_last_error(void) {
    return last_error;
}

// Sets the error "function: message" and returns the status.
__attribute__((format(printf, 2, 3))) static int fail(int status, const char *format, ...) {
    int length = snprintf(last_error, sizeof last_error, "%s: ", current_function);
    va_list args;
    va_start(args, format);
    vsnprintf(last_error + length, sizeof last_error - (size_t)length, format, args);
    va_end(args);
    return status;
}

// Sets the error of a launcher. call: the launcher's call, of which the name is kept.
static int fail_launcher(int status, const char *call) {
    if (status == FSA_ERROR_CUDA) return fail(status, "%s", fsa_cuda_error());
    return fail(status, "%.*s: unsupported arguments; fsa.h states the limits", (int)strcspn(call, "("),
                call);
}
// Calls a launcher, or a function of the CUDA runtime; on failure sets the error and returns the status.
#define RUN(call)                                                                                            \
    do {                                                                                                     \
        int status_ = (call);                                                                                \
        if (status_) return fail_launcher(status_, #call);                                                   \
    } while (0)
#define RUN_CUDA(call)                                                                                       \
    do {                                                                                                     \
        cudaError_t error_ = (call);                                                                         \
        if (error_ != cudaSuccess) return fail_launcher(fsa_record_cuda_error(#call, error_), #call);        \
    } while (0)

static int check_shape(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b) {
    if (!c) return fail(FSA_ERROR_ARGUMENT, "config: NULL; must be an FsaConfig");
    if (!b) return fail(FSA_ERROR_ARGUMENT, "batch: NULL; must be an FsaDeviceBatch");
    char msg[200];
    if (fsa_config_check(c, msg, sizeof msg)) return fail(FSA_ERROR_CONFIG, "%s", msg);
    if (c->head_dim != 64 && c->head_dim != 128) {
        return fail(FSA_ERROR_CONFIG, "head_dim %d: must be 64 or 128 on the GPU", c->head_dim);
    }
    if (c->kv_heads > 65535)
        return fail(FSA_ERROR_CONFIG, "kv_heads %d: must be at most 65535 on the GPU", c->kv_heads);
    if (dtype != FSA_BF16 && dtype != FSA_FP16) {
        return fail(FSA_ERROR_ARGUMENT, "dtype %d: must be %d (bf16) or %d (fp16)", (int)dtype, FSA_BF16,
                    FSA_FP16);
    }
    for (int64_t reserved : b->reserved)
        if (reserved != 0)
            return fail(FSA_ERROR_ARGUMENT,
                        "FsaDeviceBatch.reserved %lld: must be 0; set all fields to zero first",
                        (long long)reserved);
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
    if (b->num_queries > 0 && b->num_keys == 0)
        return fail(FSA_ERROR_ARGUMENT, "num_keys 0: must be at least 1 for %lld queries",
                    (long long)b->num_queries);
    if (b->num_queries > INT32_MAX || b->num_keys > INT32_MAX / 2) {
        return fail(FSA_ERROR_ARGUMENT, "num_queries %lld, num_keys %lld: must be below 2^31 and below 2^30",
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

// ---- arguments --------------------------------------------------------------------------------------

// Copies an argument struct of the caller's version to *args, this version's: fields that the caller does not
// know become 0. function: of fsa.h, for messages; name: of the struct.
template <typename Args>
static int load_args(const char *function, Args *args, const Args *from, const char *name) {
    current_function = function;
    if (!from) return fail(FSA_ERROR_ARGUMENT, "%s: NULL; must be an argument struct", name);
    const size_t size = from->size, known = sizeof *args; // 0.1 is the first version, so none is smaller
    if (size < known || size % 8 != 0 || size > 4096) {
        return fail(FSA_ERROR_ARGUMENT, "%s.size %zu: must be sizeof(%s), which is %zu in version %d.%d",
                    name, size, name, known, FSA_VERSION_MAJOR, FSA_VERSION_MINOR);
    }
    for (size_t i = known; i < size; i++) {
        if (((const char *)from)[i] != 0) {
            return fail(
                FSA_ERROR_ARGUMENT,
                "%s: byte %zu is not 0: a field that library version %d.%d does not have; set it to 0", name,
                i, FSA_VERSION_MAJOR, FSA_VERSION_MINOR);
        }
    }
    memcpy(args, from, known);
    return FSA_OK;
}

// Returns an error if CUDA knows that the current GPU cannot use the memory at p.
static int check_memory(const char *name, const void *p) {
    cudaPointerAttributes memory;
    int device = 0, pageable = 0;
    if (cudaPointerGetAttributes(&memory, p) != cudaSuccess || cudaGetDevice(&device) != cudaSuccess) {
        cudaGetLastError();
        return FSA_OK;
    }
    if (memory.type == cudaMemoryTypeDevice && memory.device != device) {
        return fail(FSA_ERROR_ARGUMENT, "%s %p: memory of GPU %d; must be memory of the current GPU %d", name,
                    p, memory.device, device);
    }
    if (memory.type == cudaMemoryTypeUnregistered &&
        cudaDeviceGetAttribute(&pageable, cudaDevAttrPageableMemoryAccess, device) == cudaSuccess &&
        !pageable)
        return fail(FSA_ERROR_ARGUMENT, "%s %p: host memory; must be a device pointer", name, p);
    return FSA_OK;
}

// alignment: bytes.
static int check_pointer(const char *name, const void *p, int alignment = 16) {
    if (!p) return fail(FSA_ERROR_ARGUMENT, "%s: NULL; must be a device pointer", name);
    if ((uintptr_t)p % alignment)
        return fail(FSA_ERROR_ARGUMENT, "%s %p: must be aligned to %d bytes", name, p, alignment);
    return check_memory(name, p);
}

// Checks a 16-bit array of `rows` rows of row_size elements, and replaces the stride 0 by row_size. name,
// stride_name: of the two fields. alignment: elements to which the rows must be aligned.
static int check_rows(const char *name, const void *p, const char *stride_name, int64_t *stride,
                      int64_t row_size, int64_t rows, int alignment) {
    TRY(check_pointer(name, p, 2 * alignment));
    if (*stride == 0) *stride = row_size;
    if (*stride < row_size || *stride % alignment != 0) {
        return fail(FSA_ERROR_ARGUMENT,
                    "%s %lld: must be a multiple of %d and at least %lld, the elements of a row, or 0: "
                    "packed",
                    stride_name, (long long)*stride, alignment, (long long)row_size);
    }
    const int64_t max_elements = (int64_t)1 << 35; // gathers address rows by 32-bit offsets of 16 bytes
    if (rows > max_elements / *stride) {
        return fail(FSA_ERROR_ARGUMENT, "%s %lld: times %lld rows must be at most 2^35; use smaller batches",
                    stride_name, (long long)*stride, (long long)rows);
    }
    return FSA_OK;
}

// The checks of the fields of the argument struct `a`. The arrays of queries have Nq rows, those of keys N.
#define POINTER(name) TRY(check_pointer(#name, a.name))
#define ROWS(name, stride, row_size, rows, alignment)                                                        \
    TRY(check_rows(#name, a.name, #stride, &a.stride, row_size, rows, alignment))
#define Q_ROWS(name) ROWS(name, name##_stride, (int64_t)c->q_heads * c->head_dim, b->num_queries, 8)
#define KV_ROWS(name) ROWS(name, name##_stride, (int64_t)c->kv_heads * c->head_dim, b->num_keys, 8)
#define GATE_ROWS(name)                                                                                      \
    ROWS(name##_logits, name##_stride, c->gate_per_token ? 3 : 3 * (int64_t)c->q_heads, b->num_queries, 1)

// Returns the rows that k and v must have under a rule.
static int64_t num_key_rows(const FsaConfig *c, const FsaDeviceBatch *b, FsaVisibility rule) {
    return rule == FSA_COMPRESSED ? b->num_keys / c->cmp_stride : b->num_keys;
}

static int check_phi(const FsaConfig *c, const FsaPhiWeights &phi) {
    if (c->phi == FSA_PHI_MEAN) return FSA_OK;
    TRY(check_pointer("phi.wk", phi.wk));
    TRY(check_pointer("phi.wv", phi.wv));
    return phi.pe ? check_pointer("phi.pe", phi.pe) : FSA_OK;
}

// ---- memory -----------------------------------------------------------------------------------------

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
    BatchLayout batch = {b->num_queries,  b->num_keys,   b->num_seqs,
                         b->num_segments, b->cu_seqlens, b->segments};
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
    void *q_rotated, *k_rotated;     // [Nq, Hq, d], [N, Hkv, d] of the dense modes with RoPE
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
        if (op == FSA_ATTENTION_FORWARD || op == FSA_ATTENTION_BACKWARD) {
            a.allocate(&q_rotated, n.q * 2);
            a.allocate(&k_rotated, n.k * 2);
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
    current_function = __func__;
    if (check_shape(c, dtype, b)) return 0;
    if (op < FSA_FORWARD || op > FSA_ATTENTION_BACKWARD) {
        fail(FSA_ERROR_ARGUMENT, "operation %d: must be from %d (FSA_FORWARD) to %d (FSA_ATTENTION_BACKWARD)",
             (int)op, FSA_FORWARD, FSA_ATTENTION_BACKWARD);
        return 0;
    }
    if (fsa_check_device()) {
        fail(FSA_ERROR_CUDA, "%s", fsa_cuda_error());
        return 0;
    }
    BatchLayout batch = make_batch_layout(b);
    return Workspace(c, &batch, dtype, op, NULL).bytes;
}

size_t fsa_saved_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b) {
    current_function = __func__;
    if (check_shape(c, dtype, b)) return 0;
    BatchLayout batch = make_batch_layout(b);
    return Saved(c, &batch, NULL).bytes;
}

const int32_t *fsa_saved_block_indices(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                                       const void *saved) {
    current_function = __func__;
    if (check_shape(c, dtype, b)) return NULL;
    BatchLayout batch = make_batch_layout(b);
    return Saved(c, &batch, (void *)saved).block_indices;
}

// Returns an error if CUDA knows that the stream belongs to another GPU. A stream that is being captured is
// not asked, since CUDA forbids it.
static int check_stream(FsaStream stream) {
#if CUDART_VERSION >= 12080
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    int device = 0, stream_device = 0;
    if (!stream) return FSA_OK; // of the current GPU
    if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess || capture != cudaStreamCaptureStatusNone ||
        cudaGetDevice(&device) != cudaSuccess || cudaStreamGetDevice(stream, &stream_device) != cudaSuccess) {
        cudaGetLastError(); // the first launch reports it
        return FSA_OK;
    }
    if (stream_device != device) {
        return fail(FSA_ERROR_ARGUMENT, "stream %p: of GPU %d; must be a stream of the current GPU %d",
                    (void *)stream, stream_device, device);
    }
#else
    (void)stream; // the first launch fails
#endif
    return FSA_OK;
}

// Checks what all operations share except the workspace.
static int check_call(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaStream stream) {
    TRY(check_shape(c, dtype, b));
    // cudaEventQuery and cudaStreamQuery leave cudaErrorNotReady, which is no error.
    cudaError_t earlier = cudaPeekAtLastError();
    if (earlier != cudaSuccess && earlier != cudaErrorNotReady) {
        return fail(FSA_ERROR_CUDA, "not started, as a CUDA error of an earlier call is pending: %s",
                    cudaGetErrorString(earlier));
    }
    if (fsa_check_device()) return fail_launcher(FSA_ERROR_CUDA, "");
    if (const char *kernels = fsa_unknown_kernels())
        return fail(FSA_ERROR_ARGUMENT, "FSA_KERNELS=%s in the environment: must be portable or sm90",
                    kernels);
    TRY(check_stream(stream));
    TRY(check_pointer("cu_seqlens", b->cu_seqlens, 8));
    return b->segments || b->num_segments > 0 ? check_pointer("segments", b->segments, 8) : FSA_OK;
}

// Returns an error if block selection cannot hold the free blocks of a query. fsa_topk_sm80 takes more of
// them than fsa_topk_sm90, on all GPUs.
static int check_topk(const FsaConfig *c) {
    const int limit = fsa_max_topk_sm80(c);
    if (c->topk <= limit) return FSA_OK;
    return fail(FSA_ERROR_CONFIG,
                "topk %d: block selection takes at most %d with init_blocks %d, local_blocks %d, "
                "%d query heads per KV head and head_dim %d",
                c->topk, limit, c->init_blocks, c->local_blocks, c->q_heads / c->kv_heads, c->head_dim);
}

// Checks the workspace, and launches the kernel that fills the batch layout.
static int start(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaOperation op,
                 void *workspace, size_t workspace_bytes, BatchLayout *batch, FsaStream stream) {
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
    TRY(check_memory("workspace", workspace));
    int status = fsa_batch_layout(batch, c, b, workspace, stream);
    return status ? fail_launcher(status, "fsa_batch_layout") : FSA_OK;
}

// ---- native sparse attention ------------------------------------------------------------------------

// Computes o and lse of the compressed (branch 0), the selected (1) or the sliding branch (2). o [Nq, Hq, d],
// packed.
static int branch_forward(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, int branch,
                          const Saved &s, ConstRows v, void *scratch, void *o, float *lse,
                          cudaStream_t stream) {
    const ConstRows q = packed_q(c, (const void *)s.q), k = packed_kv(c, (const void *)s.k);
    const Rows out = packed_q(c, o);
    if (branch == 0) {
        const ConstRows kc = packed_kv(c, (const void *)s.kc), vc = packed_kv(c, (const void *)s.vc);
        return fsa_dense_forward(c, batch, dtype, FSA_COMPRESSED, q, kc, vc, out, lse, stream);
    }
    if (branch == 2) return fsa_dense_forward(c, batch, dtype, FSA_WINDOW, q, k, v, out, lse, stream);
    return fsa_selected_branch_forward(c, batch, dtype, q, k, v, s.block_indices, scratch, out, lse, NULL,
                                       stream);
}

int fsa_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const FsaForward *args,
                FsaStream stream) {
    FsaForward a;
    BatchLayout batch;
    TRY(load_args(__func__, &a, args, "FsaForward"));
    TRY(check_call(c, dtype, b, stream));
    if (b->num_queries > 0) {
        Q_ROWS(q);
        KV_ROWS(k);
        KV_ROWS(v);
        GATE_ROWS(gate);
        Q_ROWS(o);
        POINTER(saved);
        TRY(check_phi(c, a.phi));
        if (a.inv_freq) POINTER(inv_freq);
        TRY(a.block_indices ? check_pointer("block_indices", a.block_indices) : check_topk(c));
    }
    TRY(start(c, dtype, b, FSA_FORWARD, a.workspace, a.workspace_bytes, &batch, stream));
    if (batch.nq == 0) return FSA_OK;
    if (c->phi == FSA_PHI_MEAN) a.phi = {NULL, NULL, NULL};
    const Saved s(c, &batch, a.saved);
    const Workspace w(c, &batch, dtype, FSA_FORWARD, a.workspace);
    const ConstRows k = {a.k, a.k_stride}, v = {a.v, a.v_stride};
    const ConstRows q_rotated = packed_q(c, (const void *)s.q), k_rotated = packed_kv(c, (const void *)s.k);
    RUN(fsa_rope_queries(c, &batch, dtype, {a.q, a.q_stride}, a.inv_freq, s.q, stream));
    RUN(fsa_rope_keys(c, &batch, dtype, k, a.inv_freq, s.k, stream));
    RUN(fsa_compress_forward(c, &batch, dtype, k, v, a.phi.wk, a.phi.pe, a.phi.wv, a.inv_freq, s.kc, s.vc,
                             w.scratch, stream));
    void *const *o_branch = c->recompute ? w.o : s.o;
    RUN(branch_forward(c, &batch, dtype, 0, s, v, w.scratch, o_branch[0], s.lse[0], stream));
    if (a.block_indices) {
        size_t bytes = (size_t)c->kv_heads * batch.nq * c->topk * 4;
        RUN_CUDA(cudaMemcpyAsync(s.block_indices, a.block_indices, bytes, cudaMemcpyDeviceToDevice, stream));
    } else {
        RUN(fsa_topk(c, &batch, dtype, q_rotated, packed_kv(c, (const void *)s.kc), s.lse[0], s.block_indices,
                     stream));
    }
    RUN(branch_forward(c, &batch, dtype, 2, s, v, w.scratch, o_branch[2], s.lse[2], stream));
    const Rows o = {a.o, a.o_stride};
    const GateCombine gate = {{a.gate_logits, a.gate_stride}, o_branch[0], o_branch[2], o};
    RUN(fsa_selected_branch_forward(c, &batch, dtype, q_rotated, k_rotated, v, s.block_indices, w.scratch,
                                    c->recompute ? o : packed_q(c, o_branch[1]), s.lse[1], &gate, stream));
    return FSA_OK;
}

// Checks the fields of *args, and sets the strides that are 0.
static int check_backward(const FsaConfig *c, const FsaDeviceBatch *b, FsaBackward *args) {
    FsaBackward &a = *args;
    KV_ROWS(k);
    KV_ROWS(v);
    POINTER(saved);
    KV_ROWS(dk);
    KV_ROWS(dv);
    if (b->num_queries > 0) {
        GATE_ROWS(gate);
        Q_ROWS(dout);
        Q_ROWS(dq);
        GATE_ROWS(dgate);
    }
    if (a.inv_freq) POINTER(inv_freq);
    TRY(check_phi(c, a.phi));
    if (c->phi == FSA_PHI_MEAN) {
        a.phi = {NULL, NULL, NULL}, a.dphi = {NULL, NULL, NULL};
        return FSA_OK;
    }
    POINTER(dphi.dwk);
    POINTER(dphi.dwv);
    if (a.phi.pe) POINTER(dphi.dpe);
    return FSA_OK;
}

int fsa_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const FsaBackward *args,
                 FsaStream stream) {
    FsaBackward a;
    BatchLayout batch;
    TRY(load_args(__func__, &a, args, "FsaBackward"));
    TRY(check_call(c, dtype, b, stream));
    if (b->num_keys > 0) TRY(check_backward(c, b, &a));
    TRY(start(c, dtype, b, FSA_BACKWARD, a.workspace, a.workspace_bytes, &batch, stream));
    if (batch.n == 0) return FSA_OK;
    const Saved s(c, &batch, (void *)a.saved);
    const Workspace w(c, &batch, dtype, FSA_BACKWARD, a.workspace);
    const ConstRows q = packed_q(c, (const void *)s.q), k = packed_kv(c, (const void *)s.k),
                    kc = packed_kv(c, (const void *)s.kc), vc = packed_kv(c, (const void *)s.vc),
                    v = {a.v, a.v_stride}, dout = {a.dout, a.dout_stride};
    void *const *o_branch = c->recompute ? w.o : s.o;
    for (int i = 0; i < 3 && c->recompute && batch.nq > 0; i++) {
        RUN(branch_forward(c, &batch, dtype, i, s, v, w.scratch, w.o[i], w.lse, stream));
    }
    RUN(fsa_gate_backward(c, dtype, batch.nq, {a.gate_logits, a.gate_stride}, o_branch, s.lse, dout, w.delta,
                          w.lse_bwd, {a.dgate_logits, a.dgate_stride}, stream));
    // The other branches leave fp32 gradients, which the selected branch adds to its own.
    RUN(fsa_window_backward(c, &batch, dtype, q, k, v, dout, w.lse_bwd + 1, w.delta + 1, w.dq_accum,
                            w.dk_accum, w.dv_accum, w.scratch, stream));
    RUN(fsa_dense_backward(c, &batch, dtype, FSA_COMPRESSED, q, kc, vc, dout, w.lse_bwd[0], w.delta[0],
                           w.dq_accum, w.dkc, w.dvc, 1, 0, w.scratch, stream));
    RUN(fsa_compress_backward(c, &batch, dtype, {a.k, a.k_stride}, v, a.phi.wk, a.phi.pe, a.phi.wv,
                              a.inv_freq, w.dkc, w.dvc, w.dk_unrotated, w.dv_accum, 1, a.dphi.dwk, a.dphi.dpe,
                              a.dphi.dwv, w.scratch, stream));
    const BranchGradients branch_grads = {w.dq_accum, w.dk_accum, w.dv_accum, w.dk_unrotated, a.inv_freq};
    RUN(fsa_selected_branch_backward(c, &batch, dtype, q, k, v, s.block_indices,
                                     fsa_local_blocks_in_window_backward(c), dout, w.delta[1], w.lse_bwd[1],
                                     &branch_grads, w.scratch, {a.dq, a.dq_stride}, {a.dk, a.dk_stride},
                                     {a.dv, a.dv_stride}, stream));
    return FSA_OK;
}

// ---- the selected branch and block selection alone --------------------------------------------------

int fsa_selected_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                         const FsaSelectedForward *args, FsaStream stream) {
    FsaSelectedForward a;
    BatchLayout batch;
    TRY(load_args(__func__, &a, args, "FsaSelectedForward"));
    TRY(check_call(c, dtype, b, stream));
    if (b->num_queries > 0) {
        Q_ROWS(q);
        KV_ROWS(k);
        KV_ROWS(v);
        POINTER(block_indices);
        Q_ROWS(o);
        POINTER(lse);
    }
    TRY(start(c, dtype, b, FSA_SELECTED_FORWARD, a.workspace, a.workspace_bytes, &batch, stream));
    if (batch.nq == 0) return FSA_OK;
    const Workspace w(c, &batch, dtype, FSA_SELECTED_FORWARD, a.workspace);
    RUN(fsa_selected_branch_forward(c, &batch, dtype, {a.q, a.q_stride}, {a.k, a.k_stride}, {a.v, a.v_stride},
                                    a.block_indices, w.scratch, {a.o, a.o_stride}, a.lse, NULL, stream));
    return FSA_OK;
}

int fsa_selected_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                          const FsaSelectedBackward *args, FsaStream stream) {
    FsaSelectedBackward a;
    BatchLayout batch;
    TRY(load_args(__func__, &a, args, "FsaSelectedBackward"));
    TRY(check_call(c, dtype, b, stream));
    if (b->num_keys > 0) {
        KV_ROWS(k);
        KV_ROWS(v);
        KV_ROWS(dk);
        KV_ROWS(dv);
    }
    if (b->num_queries > 0) {
        Q_ROWS(q);
        POINTER(block_indices);
        Q_ROWS(o);
        POINTER(lse);
        Q_ROWS(dout);
        Q_ROWS(dq);
    }
    TRY(start(c, dtype, b, FSA_SELECTED_BACKWARD, a.workspace, a.workspace_bytes, &batch, stream));
    if (batch.n == 0) return FSA_OK;
    const Workspace w(c, &batch, dtype, FSA_SELECTED_BACKWARD, a.workspace);
    const ConstRows dout = {a.dout, a.dout_stride};
    RUN(fsa_bwd_preprocess(c, dtype, batch.nq, {a.o, a.o_stride}, a.lse, dout, w.delta[0], NULL, stream));
    RUN(fsa_selected_branch_backward(c, &batch, dtype, {a.q, a.q_stride}, {a.k, a.k_stride},
                                     {a.v, a.v_stride}, a.block_indices, 0, dout, w.delta[0], a.lse, NULL,
                                     w.scratch, {a.dq, a.dq_stride}, {a.dk, a.dk_stride}, {a.dv, a.dv_stride},
                                     stream));
    return FSA_OK;
}

int fsa_select_blocks(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                      const FsaSelectBlocks *args, FsaStream stream) {
    FsaSelectBlocks a;
    BatchLayout batch;
    TRY(load_args(__func__, &a, args, "FsaSelectBlocks"));
    TRY(check_call(c, dtype, b, stream));
    if (b->num_queries > 0) {
        Q_ROWS(q);
        // Without rows none is read, but TMA needs an address.
        if (num_key_rows(c, b, FSA_COMPRESSED) == 0) a.kc = a.q, a.kc_stride = 0;
        KV_ROWS(kc);
        POINTER(lse_c);
        POINTER(block_indices);
        TRY(check_topk(c));
    }
    TRY(start(c, dtype, b, FSA_SELECT_BLOCKS, a.workspace, a.workspace_bytes, &batch, stream));
    if (batch.nq == 0) return FSA_OK;
    RUN(fsa_topk(c, &batch, dtype, {a.q, a.q_stride}, {a.kc, a.kc_stride}, a.lse_c, a.block_indices, stream));
    return FSA_OK;
}

// ---- dense attention --------------------------------------------------------------------------------

static int check_rule(FsaVisibility rule, const double *inv_freq) {
    if (rule != FSA_CAUSAL && rule != FSA_WINDOW && rule != FSA_COMPRESSED) {
        return fail(FSA_ERROR_ARGUMENT, "rule %d: must be %d (causal), %d (window) or %d (compressed)",
                    (int)rule, FSA_CAUSAL, FSA_WINDOW, FSA_COMPRESSED);
    }
    if (!inv_freq) return FSA_OK;
    if (rule == FSA_COMPRESSED)
        return fail(FSA_ERROR_ARGUMENT, "inv_freq %p: must be NULL for the compressed rule",
                    (const void *)inv_freq);
    return check_pointer("inv_freq", inv_freq);
}

// Rotates *q and *k to the workspace and sets them to the rotated arrays, if inv_freq is not NULL.
static int rotate_qk(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const double *inv_freq,
                     const Workspace &w, ConstRows *q, ConstRows *k, cudaStream_t stream) {
    if (!inv_freq) return FSA_OK;
    TRY(fsa_rope_queries(c, batch, dtype, *q, inv_freq, w.q_rotated, stream));
    TRY(fsa_rope_keys(c, batch, dtype, *k, inv_freq, w.k_rotated, stream));
    *q = packed_q(c, w.q_rotated), *k = packed_kv(c, w.k_rotated);
    return FSA_OK;
}

int fsa_attention_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                          const FsaAttentionForward *args, FsaStream stream) {
    FsaAttentionForward a;
    BatchLayout batch;
    TRY(load_args(__func__, &a, args, "FsaAttentionForward"));
    TRY(check_rule(a.rule, a.inv_freq));
    TRY(check_call(c, dtype, b, stream));
    if (b->num_queries > 0) {
        Q_ROWS(q);
        // Without rows none is read, but TMA needs an address.
        if (num_key_rows(c, b, a.rule) == 0) a.k = a.v = a.q, a.k_stride = a.v_stride = 0;
        KV_ROWS(k);
        KV_ROWS(v);
        Q_ROWS(o);
        POINTER(lse);
    }
    TRY(start(c, dtype, b, FSA_ATTENTION_FORWARD, a.workspace, a.workspace_bytes, &batch, stream));
    if (batch.nq == 0) return FSA_OK;
    const Workspace w(c, &batch, dtype, FSA_ATTENTION_FORWARD, a.workspace);
    ConstRows q = {a.q, a.q_stride}, k = {a.k, a.k_stride};
    RUN(rotate_qk(c, &batch, dtype, a.inv_freq, w, &q, &k, stream));
    RUN(fsa_dense_forward(c, &batch, dtype, a.rule, q, k, {a.v, a.v_stride}, {a.o, a.o_stride}, a.lse,
                          stream));
    return FSA_OK;
}

int fsa_attention_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                           const FsaAttentionBackward *args, FsaStream stream) {
    FsaAttentionBackward a;
    BatchLayout batch;
    TRY(load_args(__func__, &a, args, "FsaAttentionBackward"));
    TRY(check_rule(a.rule, a.inv_freq));
    TRY(check_call(c, dtype, b, stream));
    const bool compressed = a.rule == FSA_COMPRESSED;
    const int64_t key_rows = num_key_rows(c, b, a.rule);
    if (b->num_queries > 0) {
        Q_ROWS(q);
        Q_ROWS(o);
        POINTER(lse);
        Q_ROWS(dout);
        Q_ROWS(dq);
    }
    if (key_rows > 0) {
        KV_ROWS(k);
        KV_ROWS(v);
        KV_ROWS(dk);
        KV_ROWS(dv);
    }
    TRY(start(c, dtype, b, FSA_ATTENTION_BACKWARD, a.workspace, a.workspace_bytes, &batch, stream));
    const Workspace w(c, &batch, dtype, FSA_ATTENTION_BACKWARD, a.workspace);
    if (batch.nq == 0 || key_rows == 0) { // no query or no key: the gradients are zero
        const size_t q_bytes = (size_t)batch.nq * c->q_heads * c->head_dim * 4,
                     kv_bytes = (size_t)key_rows * c->kv_heads * c->head_dim * 4;
        RUN_CUDA(cudaMemsetAsync(w.dq_accum, 0, q_bytes, stream));
        RUN_CUDA(cudaMemsetAsync(w.dk_accum, 0, kv_bytes, stream));
        RUN_CUDA(cudaMemsetAsync(w.dv_accum, 0, kv_bytes, stream));
    } else {
        ConstRows q = {a.q, a.q_stride}, k = {a.k, a.k_stride}, dout = {a.dout, a.dout_stride};
        RUN(rotate_qk(c, &batch, dtype, a.inv_freq, w, &q, &k, stream));
        RUN(fsa_bwd_preprocess(c, dtype, batch.nq, {a.o, a.o_stride}, a.lse, dout, w.delta[0], w.lse_bwd[0],
                               stream));
        RUN(fsa_dense_backward(c, &batch, dtype, a.rule, q, k, {a.v, a.v_stride}, dout, w.lse_bwd[0],
                               w.delta[0], w.dq_accum, w.dk_accum, w.dv_accum, 0, 0, w.scratch, stream));
    }
    RUN(fsa_convert_dq(c, &batch, dtype, w.dq_accum, a.inv_freq, {a.dq, a.dq_stride}, stream));
    RUN(fsa_convert_dkv(c, &batch, dtype, w.dk_accum, compressed, a.inv_freq, {a.dk, a.dk_stride}, stream));
    RUN(fsa_convert_dkv(c, &batch, dtype, w.dv_accum, compressed, NULL, {a.dv, a.dv_stride}, stream));
    return FSA_OK;
}
