// train_gpt_nsa.cu: the transformer of train_gpt_nsa.c on one GPU or many, and its training loop. From top to
// bottom: the model's memory, its forward and backward pass, the data feed, the program. Both files share the
// names of tensors, types and most functions; train_gpt_nsa.h lists the exceptions.
//
// Weights and activations are bf16. -DENABLE_FP16 makes them fp16. -DENABLE_FP32 makes them fp32, and
// computes the attention alone in fp16. The master weights, AdamW's m and v and the gradients of weights are
// fp32 in all builds. All memory is allocated at the start. A training step synchronizes with the GPU once,
// to read its loss. Every sum has a fixed order, so a run is bitwise reproducible.
//
// The backward pass computes the gradient of the SUM of the token losses. The gradient's norm and AdamW
// divide it by the tokens of the step, in fp32. So the gradients of activations do not shrink as batches
// grow, and fp16 needs no loss scaling.
//
// With several processes, each has one GPU. Each -cp group of processes shares the tokens of a micro-batch
// (context_parallel.h): its processes gather the keys and values one head group after another. Different -cp
// groups process different micro-batches (data parallel). Gradients are sums over all processes; zero.h says
// which process keeps which weights, moments and gradients. Transfers run on a stream of their own, beside
// the passes.
#define TRAINER_GPU
#include "llmc/run.h"
#include "llmc/block_indices.h"
#include "llmc/mfu.h"
#include "llmc/results.h"
#include "llmc/cuda_common.cuh"
#include "llmc/matmul.cuh"
#include "llmc/rmsnorm.cuh"
#include "llmc/swiglu.cuh"
#include "llmc/embedding.cuh"
#include "llmc/classifier.cuh"
#include "llmc/loss.cuh"
#include "llmc/global_norm.cuh"
#include "llmc/adamw.cuh"
#include "llmc/convert.cuh"
#include "llmc/nccl.cuh"
#include "llmc/profile.cuh"
#include "fsa/kernels.h"
#include <algorithm>
#include <math.h>
#include <pthread.h>

// The type of the attention's inputs and outputs.
#ifdef ENABLE_FP32
typedef __half attnX;
#else
typedef floatX attnX;
#endif
#if defined(ENABLE_FP32) || defined(ENABLE_FP16)
static const FsaDtype attn_dtype = FSA_FP16;
#else
static const FsaDtype attn_dtype = FSA_BF16;
#endif
static const bool attn_needs_convert = sizeof(attnX) != sizeof(floatX);

// Exits with the file, the line, the call and the error's text unless `call`, a function of fsa.h, returns
// FSA_OK.
#define fsa_check(call)                                                                                      \
    do {                                                                                                     \
        int status_ = (call);                                                                                \
        if (status_) die("%s:%d: %s", __FILE__, __LINE__, fsa_last_error());                                 \
    } while (0)
// The same for a launcher of kernels.h, which does not set fsa_last_error.
#define launcher_check(call)                                                                                 \
    do {                                                                                                     \
        int status_ = (call);                                                                                \
        if (status_)                                                                                         \
            die("%s:%d: %.*s: %s", __FILE__, __LINE__, (int)strcspn(#call, "("), #call,                      \
                status_ == FSA_ERROR_CUDA ? fsa_cuda_error() : "unsupported arguments");                     \
    } while (0)

// ---------------------------------------------------------------------------------------------------------
// The model and its memory

// A micro-batch: packed sequences, or with context parallel this GPU's tokens of them. The arrays are
// contiguous in memory, so that one copy transfers them to the GPU.
typedef struct {
    int64_t n, num_keys; // tokens on this GPU, and of the whole sequences
    int64_t num_seqs, num_segments, num_chunks, max_len;
    int32_t *tokens, *targets; // [n]
    int64_t *cu_seqlens;       // [num_seqs + 1] of the whole sequences
    FsaSegment *segments;      // [num_segments] of the tokens on this GPU
    int32_t *chunk_perm;       // [num_chunks] (context_parallel.h)
} Batch;

// Offsets of a layer's tensors in params and grads; -1 if the model has no such tensor. param_table
// (config.h) has their shapes.
typedef struct {
    int64_t ln1, wqkv, bqkv, qnorm, knorm, phi_wk, phi_pe, phi_wv, wgate, wo, ln2, wgu, wdown;
} LayerParams;

// The activations that a layer keeps for its backward pass; n tokens. Layers share the arrays that are
// recomputed.
typedef struct {
    floatX *residual_in;    // [n, C] the residual stream before the layer
    floatX *ln1;            // [n, C]
    float *ln1_rstd;        // [n]
    floatX *q_raw, *k_raw;  // [n, Hq, d], [n, Hkv, d] before QK-norm; NULL without it
    float *q_rstd, *k_rstd; // [n, Hq], [n, Hkv]
    // [n, Hq, d], [n, Hkv, d] twice, before RoPE. full and window rotate q in place; without
    // context parallel they also rotate k.
    attnX *q, *k, *v;
    attnX *gate_logits; // [n, Hq, 3], or [n, 3] with gate_per_token
    char *saved;        // [head groups, saved_bytes] `saved` of fsa_forward; full, window: lse [n, Hq]
    attnX *o;           // [n, Hq, d] the attention's output
    floatX *attn_out;   // [n, Hq, d] o as floatX; the same array if the types are equal
    floatX *residual_mid, *ln2; // [n, C] the residual stream after the attention, and its norm
    float *ln2_rstd;            // [n]
    floatX *gate_up, *swiglu;   // [n, 2*hidden], [n, hidden]
} LayerActivations;

// Device memory is allocated in arenas, one per kind.
typedef enum { WEIGHTS, MASTER, MOMENTS, GRADIENTS, ACTIVATIONS, SCRATCH, ARENAS } ArenaKind;
static const char *const arena_names[ARENAS] = {"weights",   "fp32 weights", "AdamW",
                                                "gradients", "activations",  "scratch"};
typedef struct {
    char *base;   // NULL: arena_alloc only counts
    size_t bytes; // handed out so far
} Arena;

typedef struct {
    ModelConfig config;
    int64_t max_tokens, max_keys; // tokens of a micro-batch on this GPU, and of its whole sequences
    int training, recompute;
    int64_t num_tensors, num_params;
    ParamTensor *tensors; // [num_tensors]
    Gpus *gpus;           // NULL: one GPU alone
    ZeroPartition zero;
    AdamwRange *ranges;        // on the host; begins count from the start of this GPU's part of a unit
    int64_t *range_offsets;    // [units + 1] each unit's first range
    LayerParams *layers;       // [layers]
    int64_t wte, lnf, lm_head; // offsets in params; lm_head = wte if tied

    // On the device.
    Arena arenas[ARENAS];
    floatX *params;              // [num_params]
    float *master, *m, *v;       // [zero.shard_size]; only for training
    float *grads;                // [num_params]; with ZeRO stage 2 [zero.shard_size]
    float *unit_grad_buffers[4]; // ZeRO stage 2: the gradients of one unit each (unit_grad_buffer)
    float **unit_grads;          // [units], on the host: where the backward pass writes each unit's gradients

    // Context parallel: the attention processes one head group after another. Each array holds one of them.
    int num_head_groups;
    size_t saved_bytes;                           // of a head group's part of LayerActivations.saved
    attnX *k_buffers[3];                          // [max_keys, Hkv/groups, d] gathered k, or dk (kv_buffer)
    attnX *v_buffers[3];                          // the same for v and dv
    attnX *gather_scratch;                        // [max_keys, Hkv/groups, d] rows in rank order
    attnX *group_q, *group_o, *group_gate_logits; // [max_tokens, ...] if there are several head groups
    attnX *group_dout, *group_dq;                 // the same
    attnX *group_dgate_logits; // the same; with gate_per_token [groups, dgate_group_stride]

    LayerActivations *acts;   // [layers]
    floatX *residual_out;     // [n, C] the residual stream after the last layer
    floatX *lnf_out;          // [n, C]
    float *lnf_rstd, *losses; // [n]
    int32_t *argmax;          // [n] of the logits
    floatX *logits;           // [lm_head_rows, Vp]
    int64_t lm_head_rows;     // tokens that the LM head processes at a time
    floatX *proj_out;         // [n, C] output of wo or wdown, before the residual addition
    floatX *convert_buffer;   // [n, Hq, d] if attn_needs_convert: matmul outputs and inputs as floatX
    attnX *phi[3];            // if attn_needs_convert: phi_wk, phi_pe, phi_wv of one head group
    floatX *dresidual, *dnorm, *dattn_out; // [n, C], [n, C], [n, Hq, d]
    attnX *dout; // [n, Hq, d] dattn_out as attnX; the same array if the types are equal
    attnX *dq, *dk, *dv, *dgate_logits; // as q, k, v, gate_logits
    floatX *dq_raw;                     // [n, Hq, d] with QK-norm: the gradient of q_raw, then of k_raw
    double *inv_freq, *neg_inv_freq;    // [d/2], and its negative for the inverse RoPE
    void *batch_layout_memory, *scratch, *matmul_workspace;
    size_t scratch_bytes; // of scratch, the workspace of the attention and of the layers
    StepResult *result;
    AdamwRange *ranges_device;
    char *eval_memory, *feed_memory[2]; // arrays of a Batch: for validation and sampling; for training

    // On the host, pinned unless it says otherwise.
    char *eval_memory_host;
    float *losses_host;
    int32_t *argmax_host;
    floatX *logits_host; // [Vp] of the last token
    StepResult *result_host;
    double *stop_host;           // copied to result->stop
    float *sample_logits;        // [V], not pinned
    int32_t *block_indices_host; // [layers, Hkv, n, T] for -block-indices, not pinned; else NULL

    Batch batch;              // the current one, on the device
    int last_micro_batch;     // 1: the current batch is the last of its step
    BatchLayout batch_layout; // of the current batch; only full and window use it
    Matmul matmul;
    cudaStream_t stream;
    cudaEvent_t step_done;
    cudaEvent_t *weights_gathered;        // [units] the unit's weights have come from their owners
    cudaEvent_t unit_grad_buffer_free[4]; // the buffer's gradients have gone to their owners
    Profile *profile;                     // NULL: nothing is measured
} Model;

// Sets *p to `bytes` bytes of an arena, aligned to 256, or to NULL if the arena only counts.
template <typename T> static void arena_alloc(Model *model, ArenaKind kind, T **p, int64_t bytes) {
    Arena *a = &model->arenas[kind];
    *p = a->base ? (T *)(a->base + a->bytes) : NULL;
    a->bytes += (size_t)((bytes + 255) / 256 * 256);
}

// Returns the counts of n tokens in whole sequences on one GPU: one segment per sequence, one chunk.
static Batch batch_unsharded(int64_t n, int64_t num_seqs, int64_t max_len) {
    Batch b = {n, n, num_seqs, num_seqs, 1, max_len, NULL, NULL, NULL, NULL, NULL};
    return b;
}

// Returns the bytes of a batch's arrays.
static size_t batch_bytes(const Batch *b) {
    return (size_t)(2 * b->n * sizeof(int32_t) + (b->num_seqs + 1) * sizeof(int64_t) +
                    b->num_segments * sizeof(FsaSegment) + b->num_chunks * sizeof(int32_t));
}

// Returns a batch with these counts and its arrays in `memory`, those with 8-byte elements first.
static Batch batch_bind(const Batch *counts, char *memory) {
    Batch b = *counts;
    b.cu_seqlens = (int64_t *)memory;
    b.segments = (FsaSegment *)(b.cu_seqlens + b.num_seqs + 1);
    b.tokens = (int32_t *)(b.segments + b.num_segments);
    b.targets = b.tokens + b.n;
    b.chunk_perm = b.targets + b.n;
    return b;
}

// Writes this GPU's part of a micro-batch to `memory` on the host: the whole sequences, or with context
// parallel its chunks of them. tokens, targets [n], cu_seqlens [num_seqs + 1]. Returns the batch, whose
// arrays are in `memory`.
static Batch batch_fill(const ModelConfig *c, const Gpus *gpus, const int32_t *tokens, const int32_t *targets,
                        const int64_t *cu_seqlens, int64_t num_seqs, char *memory) {
    const int ranks = gpus ? gpus->cp_size : 1, rank = gpus ? gpus->cp_rank : 0;
    const int64_t keys = cu_seqlens[num_seqs], chunks = cp_num_chunks(keys, num_seqs, ranks);
    std::vector<int32_t> chunk_perm(chunks);
    std::vector<FsaSegment> segments(num_seqs + chunks / ranks);
    cp_assign_chunks(c, cu_seqlens, num_seqs, ranks, chunks, chunk_perm.data(), NULL);
    Batch counts = batch_unsharded(keys / ranks, num_seqs, 0);
    counts.num_keys = keys, counts.num_chunks = chunks;
    counts.num_segments =
        cp_segments(cu_seqlens, num_seqs, ranks, chunks, chunk_perm.data(), rank, segments.data());
    for (int64_t s = 0; s < num_seqs; s++)
        counts.max_len = std::max(counts.max_len, cu_seqlens[s + 1] - cu_seqlens[s]);
    Batch b = batch_bind(&counts, memory);
    memcpy(b.cu_seqlens, cu_seqlens, (num_seqs + 1) * sizeof(int64_t));
    memcpy(b.segments, segments.data(), b.num_segments * sizeof(FsaSegment));
    memcpy(b.chunk_perm, chunk_perm.data(), chunks * sizeof(int32_t));
    cp_gather_rows(ranks, keys, chunks, b.chunk_perm, rank, b.tokens, tokens, sizeof(int32_t));
    cp_gather_rows(ranks, keys, chunks, b.chunk_perm, rank, b.targets, targets, sizeof(int32_t));
    return b;
}

// Returns an upper bound of every count of the model's batches.
static Batch batch_max(const Model *model) {
    Batch b = batch_unsharded(model->max_tokens, model->max_keys, model->max_keys);
    b.num_keys = model->max_keys;
    b.num_segments = model->max_tokens;
    b.num_chunks = model->gpus ? 32 * model->gpus->cp_size : 1;
    return b;
}

// Converts a batch to fsa.h's struct.
static FsaDeviceBatch fsa_device_batch(const Batch *b) {
    FsaDeviceBatch f = {b->n,       b->num_keys,   b->num_seqs, b->num_segments,
                        b->max_len, b->cu_seqlens, b->segments};
    return f;
}

// Returns the gate logits of a token.
static int64_t num_gate_logits(const FsaConfig *f) {
    return f->gate_per_token ? 3 : 3 * f->q_heads;
}

// With gate_per_token every head group has its own gradient of the same logits. Returns the elements from one
// head group's gradient to the next.
static int64_t dgate_group_stride(int64_t n) {
    return (3 * n + 7) / 8 * 8;
}

// Returns the attention's configuration for one head group.
static FsaConfig head_group_config(const Model *model) {
    FsaConfig f = model->config.fsa;
    f.q_heads /= model->num_head_groups, f.kv_heads /= model->num_head_groups;
    return f;
}

// Allocates a layer's activations. The first layer gets all arrays. Another layer gets its own copy of those
// that its backward pass reads and does not recompute, and shares the rest with the first layer.
static void alloc_layer_activations(Model *model, LayerActivations *a, int first) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const int64_t n = model->max_tokens, C = c->channels, d = f->head_dim, H = c->hidden;
    const int64_t q = n * f->q_heads * d, k = n * f->kv_heads * d, x = sizeof(floatX);
    int keep = model->training && model->recompute < 2; // more than residual_in
    int keep_cheap = model->training && model->recompute < 1;
    if (first || model->training) arena_alloc(model, ACTIVATIONS, &a->residual_in, n * C * x);
    if (first || keep_cheap) {
        arena_alloc(model, ACTIVATIONS, &a->ln1, n * C * x);
        arena_alloc(model, ACTIVATIONS, &a->ln2, n * C * x);
        arena_alloc(model, ACTIVATIONS, &a->swiglu, n * H * x);
    }
    // with nsa `saved` holds the rotated q
    if (first || (keep && c->attn != ATTN_NSA)) arena_alloc(model, ACTIVATIONS, &a->q, q * sizeof(attnX));
    if (!first && !keep) return;
    arena_alloc(model, ACTIVATIONS, &a->ln1_rstd, n * sizeof(float));
    arena_alloc(model, ACTIVATIONS, &a->ln2_rstd, n * sizeof(float));
    if (c->qk_norm) {
        arena_alloc(model, ACTIVATIONS, &a->q_raw, q * x);
        arena_alloc(model, ACTIVATIONS, &a->k_raw, k * x);
        arena_alloc(model, ACTIVATIONS, &a->q_rstd, n * f->q_heads * sizeof(float));
        arena_alloc(model, ACTIVATIONS, &a->k_rstd, n * f->kv_heads * sizeof(float));
    }
    arena_alloc(model, ACTIVATIONS, &a->k, k * sizeof(attnX));
    arena_alloc(model, ACTIVATIONS, &a->v, k * sizeof(attnX));
    if (c->attn == ATTN_NSA)
        arena_alloc(model, ACTIVATIONS, &a->gate_logits, n * num_gate_logits(f) * sizeof(attnX));
    arena_alloc(model, ACTIVATIONS, &a->saved, model->num_head_groups * (int64_t)model->saved_bytes);
    arena_alloc(model, ACTIVATIONS, &a->o, q * sizeof(attnX));
    a->attn_out = (floatX *)a->o;
    if (attn_needs_convert) arena_alloc(model, ACTIVATIONS, &a->attn_out, q * x);
    arena_alloc(model, ACTIVATIONS, &a->residual_mid, n * C * x);
    arena_alloc(model, ACTIVATIONS, &a->gate_up, n * 2 * H * x);
}

// Returns the bytes that the attention of one head group keeps for its backward pass.
static size_t attention_saved_bytes(const Model *model) {
    const FsaConfig group = head_group_config(model), *f = &group;
    Batch b = batch_max(model);
    FsaDeviceBatch max_batch = fsa_device_batch(&b);
    if (model->config.attn == ATTN_NSA) return fsa_saved_size(f, attn_dtype, &max_batch);
    return (model->max_tokens * f->q_heads * sizeof(float) + 255) / 256 * 256;
}

// Returns the workspace that fsa.h needs for one head group, whatever the lengths of the sequences.
static size_t attention_workspace_bytes(const Model *model) {
    const FsaConfig group = head_group_config(model), *f = &group;
    Batch b = batch_max(model);
    FsaDeviceBatch max_batch = fsa_device_batch(&b);
    bool nsa = model->config.attn == ATTN_NSA;
    size_t bytes = fsa_workspace_size(f, attn_dtype, &max_batch, nsa ? FSA_FORWARD : FSA_ATTENTION_FORWARD);
    if (bytes == 0) die("%s", fsa_last_error());
    if (!model->training) return bytes;
    return std::max(
        bytes, fsa_workspace_size(f, attn_dtype, &max_batch, nsa ? FSA_BACKWARD : FSA_ATTENTION_BACKWARD));
}

// ZeRO stage 2: returns which buffer holds unit u's gradients during the backward pass. Layers alternate
// between two buffers, so that one is reduced while the other is filled. A tied embedding has a buffer of its
// own, since both ends of the backward pass add to its gradient.
static int unit_grad_buffer(const Model *model, int64_t u) {
    if (u == 0) return 0;
    if (u == model->zero.num_units - 1) return model->config.tied ? 1 : 0;
    return 2 + (int)(u % 2);
}

// Sets unit_grads: in grads, or with ZeRO stage 2 in unit_grad_buffers, which it allocates.
static void alloc_unit_grads(Model *model) {
    const ZeroPartition *z = &model->zero;
    int64_t sizes[4] = {0, 0, 0, 0};
    for (int64_t u = 0; u < z->num_units && z->stage == 2; u++) {
        int64_t *size = &sizes[unit_grad_buffer(model, u)];
        *size = std::max(*size, z->units[u].end - z->units[u].begin);
    }
    for (int i = 0; i < 4; i++)
        if (sizes[i]) arena_alloc(model, GRADIENTS, &model->unit_grad_buffers[i], sizes[i] * sizeof(float));
    for (int64_t u = 0; u < z->num_units; u++)
        model->unit_grads[u] = z->stage == 2  ? model->unit_grad_buffers[unit_grad_buffer(model, u)]
                               : model->grads ? model->grads + z->units[u].begin
                                              : NULL;
}

// Assigns memory in the arenas to all device arrays. The first call, with empty arenas, only counts bytes.
static void model_memory_layout(Model *model) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const int64_t n = model->max_tokens, P = model->num_params, C = c->channels, d = f->head_dim;
    const int64_t q = n * f->q_heads * d, k = n * f->kv_heads * d, x = sizeof(floatX);
    for (int i = 0; i < ARENAS; i++) model->arenas[i].bytes = 0;
    arena_alloc(model, WEIGHTS, &model->params, P * x);
    if (model->training) {
        const int64_t shard = model->zero.shard_size;
        arena_alloc(model, MASTER, &model->master, shard * sizeof(float));
        arena_alloc(model, MOMENTS, &model->m, shard * sizeof(float));
        arena_alloc(model, MOMENTS, &model->v, shard * sizeof(float));
        arena_alloc(model, GRADIENTS, &model->grads, (model->zero.stage == 2 ? shard : P) * sizeof(float));
        alloc_unit_grads(model);
    }
    model->saved_bytes = attention_saved_bytes(model);
    for (int l = 0; l < c->layers; l++) {
        LayerActivations *a = &model->acts[l];
        *a = model->acts[0]; // shared, unless alloc_layer_activations replaces it
        alloc_layer_activations(model, a, l == 0);
    }
    // the last layer's output is residual_out; every other layer's is residual_in of the next layer
    model->residual_out = model->acts[0].residual_in, model->lnf_out = model->acts[0].ln1;
    if (model->training) arena_alloc(model, ACTIVATIONS, &model->residual_out, n * C * x);
    if (model->training && model->recompute == 0) arena_alloc(model, ACTIVATIONS, &model->lnf_out, n * C * x);
    arena_alloc(model, ACTIVATIONS, &model->lnf_rstd, n * sizeof(float));
    arena_alloc(model, ACTIVATIONS, &model->losses, n * sizeof(float));
    arena_alloc(model, ACTIVATIONS, &model->argmax, n * sizeof(int32_t));

    // Each chunk reads and writes the LM head's gradient, 4 bytes per weight. With 4,096 tokens per chunk
    // that takes at most 6% of the time of the chunk's matmuls, which do 6 FLOPs per weight and token.
    model->lm_head_rows = std::min<int64_t>(n, 4096);
    arena_alloc(model, SCRATCH, &model->logits, model->lm_head_rows * c->padded_vocab * x);
    arena_alloc(model, SCRATCH, &model->proj_out, n * C * x);
    if (attn_needs_convert) {
        int64_t window_rows = (int64_t)f->kv_heads / model->num_head_groups * f->cmp_len;
        arena_alloc(model, SCRATCH, &model->convert_buffer, std::max(q, n * num_gate_logits(f)) * x);
        for (int i = 0; i < 3; i++)
            arena_alloc(model, SCRATCH, &model->phi[i], window_rows * d * (i == 1 ? 1 : d) * sizeof(attnX));
    }
    const int64_t groups = model->num_head_groups, keys = model->max_keys * f->kv_heads / groups * d;
    for (int i = 0; model->max_keys > n && i < (groups > 1 ? 3 : model->training ? 2 : 1); i++) {
        arena_alloc(model, SCRATCH, &model->k_buffers[i], keys * sizeof(attnX));
        arena_alloc(model, SCRATCH, &model->v_buffers[i], keys * sizeof(attnX));
    }
    if (model->max_keys > n) arena_alloc(model, SCRATCH, &model->gather_scratch, keys * sizeof(attnX));
    if (groups > 1) {
        arena_alloc(model, SCRATCH, &model->group_q, q / groups * sizeof(attnX));
        arena_alloc(model, SCRATCH, &model->group_o, q / groups * sizeof(attnX));
        arena_alloc(model, SCRATCH, &model->group_gate_logits,
                    n * num_gate_logits(f) / groups * sizeof(attnX));
        // the backward pass of nsa reads neither q nor o
        model->group_dout = model->group_q, model->group_dq = model->group_o;
    }
    if (groups > 1 && model->training) {
        if (c->attn != ATTN_NSA) {
            arena_alloc(model, SCRATCH, &model->group_dout, q / groups * sizeof(attnX));
            arena_alloc(model, SCRATCH, &model->group_dq, q / groups * sizeof(attnX));
        }
        const int64_t gates =
            f->gate_per_token ? groups * dgate_group_stride(n) : n * num_gate_logits(f) / groups;
        arena_alloc(model, SCRATCH, &model->group_dgate_logits, gates * sizeof(attnX));
    }
    model->scratch_bytes = attention_workspace_bytes(model);
    if (model->training) {
        arena_alloc(model, SCRATCH, &model->dresidual, n * C * x);
        arena_alloc(model, SCRATCH, &model->dnorm, n * C * x);
        arena_alloc(model, SCRATCH, &model->dattn_out, q * x);
        model->dout = (attnX *)model->dattn_out;
        if (attn_needs_convert) arena_alloc(model, SCRATCH, &model->dout, q * sizeof(attnX));
        arena_alloc(model, SCRATCH, &model->dq, q * sizeof(attnX));
        arena_alloc(model, SCRATCH, &model->dk, k * sizeof(attnX));
        arena_alloc(model, SCRATCH, &model->dv, k * sizeof(attnX));
        arena_alloc(model, SCRATCH, &model->dgate_logits,
                    std::max(n * num_gate_logits(f), dgate_group_stride(n)) * sizeof(attnX));
        if (c->qk_norm) arena_alloc(model, SCRATCH, &model->dq_raw, q * x);
        size_t *scratch_bytes = &model->scratch_bytes;
        *scratch_bytes = std::max(*scratch_bytes, rmsnorm_backward_scratch(n, c->channels));
        *scratch_bytes = std::max(*scratch_bytes, rmsnorm_backward_scratch(n * f->q_heads, f->head_dim));
        *scratch_bytes = std::max(*scratch_bytes, embedding_backward_scratch(n, c->channels));
        *scratch_bytes = std::max(*scratch_bytes, global_norm_scratch(P));
    }
    arena_alloc(model, SCRATCH, &model->scratch, (int64_t)model->scratch_bytes);
    arena_alloc(model, SCRATCH, &model->matmul_workspace, MATMUL_WORKSPACE_BYTES);
    arena_alloc(model, SCRATCH, &model->inv_freq, d / 2 * sizeof(double));
    arena_alloc(model, SCRATCH, &model->neg_inv_freq, d / 2 * sizeof(double));
    const Batch max_batch = batch_max(model);
    const int64_t batch_size = (int64_t)batch_bytes(&max_batch);
    arena_alloc(model, SCRATCH, &model->batch_layout_memory,
                (int64_t)fsa_batch_layout_bytes(max_batch.num_seqs, max_batch.num_segments));
    arena_alloc(model, SCRATCH, &model->result, sizeof(StepResult));
    arena_alloc(model, SCRATCH, &model->eval_memory, batch_size);
    if (!model->training) return;
    arena_alloc(model, SCRATCH, &model->ranges_device,
                model->range_offsets[model->zero.num_units] * (int64_t)sizeof(AdamwRange));
    for (char *&memory : model->feed_memory) arena_alloc(model, SCRATCH, &memory, batch_size);
}

// Returns the bytes of all arenas.
static size_t model_bytes(const Model *model) {
    size_t bytes = 0;
    for (int i = 0; i < ARENAS; i++) bytes += model->arenas[i].bytes;
    return bytes;
}

// Exits with the bytes needed, the bytes free, and the flags that lower the need.
LLMC_NORETURN static void die_out_of_memory(Model *model, size_t free_bytes) {
    char parts[512] = "", lower[128] = "";
    size_t need = model_bytes(model);
    for (int i = 0; i < ARENAS; i++) {
        size_t length = strlen(parts);
        if (model->arenas[i].bytes == 0) continue;
        snprintf(parts + length, sizeof parts - length, "%s%s %zu", length ? ", " : "", arena_names[i],
                 model->arenas[i].bytes >> 20);
    }
    if (model->training && model->recompute < 2) {
        model->recompute = 2;
        model_memory_layout(model);
        snprintf(lower, sizeof lower, "-r 2 (needs %zu MiB), ", model_bytes(model) >> 20);
    }
    die("out of GPU memory: %zu MiB needed (%s), %zu MiB free; try %sa smaller -b or -t, or a smaller model",
        need >> 20, parts, free_bytes >> 20, lower);
}

// Allocates the arenas and lays the arrays out in them. Exits with an error if GPU memory is short.
static void model_allocate(Model *model) {
    // reserve memory for kernel code, which is loaded at its first use, and for NCCL
    const size_t reserve = (size_t)(model->gpus ? 1024 : 256) << 20;
    size_t free_bytes, total;
    model_memory_layout(model);
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    free_bytes -= std::min(free_bytes, reserve);
    if (model_bytes(model) > free_bytes) die_out_of_memory(model, free_bytes);
    for (int i = 0; i < ARENAS; i++) {
        Arena *a = &model->arenas[i];
        if (a->bytes == 0) continue;
        cudaError_t error = cudaMalloc((void **)&a->base, a->bytes);
        if (error == cudaErrorMemoryAllocation) die_out_of_memory(model, free_bytes);
        cuda_check(error);
    }
    model_memory_layout(model);
}

// Returns the offset of a layer's tensor `name` in params and grads, or -1; layer -1: a tensor outside the
// layers.
static int64_t tensor_offset(const Model *model, int layer, const char *name) {
    for (int64_t i = 0; i < model->num_tensors; i++) {
        const ParamTensor *t = &model->tensors[i];
        const char *dot = strrchr(t->name, '.');
        if (t->layer == layer && strcmp(dot ? dot + 1 : t->name, name) == 0) return t->offset;
    }
    return -1;
}

// Builds the parameter table, its partition by ZeRO (stage zero_stage), AdamW's ranges, and the offsets of
// all tensors.
static void model_param_layout(Model *model, int zero_stage) {
    const ModelConfig *c = &model->config;
    model->num_tensors = param_table(c, NULL, &model->num_params);
    model->tensors = (ParamTensor *)xcalloc(model->num_tensors, sizeof *model->tensors);
    param_table(c, model->tensors, &model->num_params);
    zero_partition_build(&model->zero, zero_stage, model->gpus ? model->gpus->rank : 0,
                         model->gpus ? model->gpus->ranks : 1, model->tensors, model->num_tensors);
    const ZeroPartition *z = &model->zero;
    model->unit_grads = (float **)xcalloc(z->num_units, sizeof *model->unit_grads);
    model->range_offsets = (int64_t *)xcalloc(z->num_units + 1, sizeof *model->range_offsets);
    model->ranges = (AdamwRange *)xcalloc(model->num_tensors, sizeof *model->ranges);
    int64_t ranges = 0;
    for (int64_t u = 0; u < z->num_units; u++) {
        int64_t begin, end;
        zero_owned(z, u, z->rank, &begin, &end);
        for (int64_t i = 0; i < model->num_tensors; i++) {
            const ParamTensor *t = &model->tensors[i];
            if (t->offset + t->size <= begin || t->offset >= end) continue;
            if (ranges > model->range_offsets[u] && model->ranges[ranges - 1].decay == t->decay) continue;
            AdamwRange range = {std::max<int64_t>(t->offset - begin, 0), t->decay};
            model->ranges[ranges++] = range;
        }
        model->range_offsets[u + 1] = ranges;
    }
    model->wte = tensor_offset(model, -1, "wte");
    model->lnf = tensor_offset(model, -1, "lnf");
    model->lm_head = c->tied ? model->wte : tensor_offset(model, -1, "lm_head");
    model->layers = (LayerParams *)xcalloc(c->layers, sizeof *model->layers);
    model->acts = (LayerActivations *)xcalloc(c->layers, sizeof *model->acts);
    for (int l = 0; l < c->layers; l++) {
        LayerParams *w = &model->layers[l];
#define OFFSET(name) w->name = tensor_offset(model, l, #name)
        OFFSET(ln1), OFFSET(wqkv), OFFSET(bqkv), OFFSET(qnorm), OFFSET(knorm), OFFSET(phi_wk), OFFSET(phi_pe);
        OFFSET(phi_wv), OFFSET(wgate), OFFSET(wo), OFFSET(ln2), OFFSET(wgu), OFFSET(wdown);
#undef OFFSET
    }
}

// Builds a model for at most max_tokens tokens in a pass, counted over all GPUs that share a micro-batch.
// With training != 0 it has gradients and AdamW's moments. recompute is the value of -r, zero_stage that of
// -z; gpus may be NULL: one GPU alone. The caller sets the parameters with set_unit_params. Exits with an
// error if GPU memory is short.
static void model_build(Model *model, const ModelConfig *config, int64_t max_tokens, int training,
                        int recompute, Gpus *gpus, int zero_stage) {
    memset(model, 0, sizeof *model);
    model->config = *config;
    model->gpus = gpus && gpus->ranks > 1 ? gpus : NULL;
    model->max_keys = max_tokens;
    model->max_tokens = model->gpus ? max_tokens / gpus->cp_size : max_tokens;
    model->num_head_groups = cp_num_head_groups(&config->fsa, max_tokens, model->gpus ? gpus->cp_size : 1);
    model->training = training;
    model->recompute = recompute;
    if (config->channels % 8 != 0 || config->hidden % 8 != 0)
        die("-channels %d -hidden %d: both must be multiples of 8 on the GPU", config->channels,
            config->hidden);
    model_param_layout(model, zero_stage);
    model_allocate(model);

    int half = config->fsa.head_dim / 2;
    std::vector<double> inv_freq(half);
    rope_inv_freq(config, inv_freq.data());
    cuda_check(cudaMemcpy(model->inv_freq, inv_freq.data(), half * sizeof(double), cudaMemcpyHostToDevice));
    for (double &f : inv_freq) f = -f;
    cuda_check(
        cudaMemcpy(model->neg_inv_freq, inv_freq.data(), half * sizeof(double), cudaMemcpyHostToDevice));
    if (training)
        cuda_check(cudaMemcpy(model->ranges_device, model->ranges,
                              model->range_offsets[model->zero.num_units] * sizeof(AdamwRange),
                              cudaMemcpyHostToDevice));
    const int64_t n = max_tokens;
    const Batch max_batch = batch_max(model);
    cuda_check(cudaMallocHost((void **)&model->eval_memory_host, batch_bytes(&max_batch)));
    cuda_check(cudaMallocHost((void **)&model->stop_host, sizeof(double)));
    cuda_check(cudaMallocHost((void **)&model->losses_host, n * sizeof(float)));
    cuda_check(cudaMallocHost((void **)&model->argmax_host, n * sizeof(int32_t)));
    cuda_check(cudaMallocHost((void **)&model->logits_host, config->padded_vocab * sizeof(floatX)));
    cuda_check(cudaMallocHost((void **)&model->result_host, sizeof(StepResult)));
    model->sample_logits = (float *)xmalloc(config->vocab_size * sizeof(float));
    matmul_init(&model->matmul, model->matmul_workspace, MATMUL_WORKSPACE_BYTES);
    cuda_check(cudaStreamCreateWithFlags(&model->stream, cudaStreamNonBlocking));
    cuda_check(cudaEventCreateWithFlags(&model->step_done, cudaEventDisableTiming));
    model->weights_gathered = (cudaEvent_t *)xcalloc(model->zero.num_units, sizeof *model->weights_gathered);
    for (int64_t u = 0; u < model->zero.num_units; u++)
        cuda_check(cudaEventCreateWithFlags(&model->weights_gathered[u], cudaEventDisableTiming));
    for (cudaEvent_t &event : model->unit_grad_buffer_free)
        cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    cuda_check(cudaDeviceSynchronize()); // model->stream does not wait for the copies above
}

static void model_free(Model *model) {
    cuda_check(cudaStreamSynchronize(model->stream));
    if (model->gpus) cuda_check(cudaStreamSynchronize(model->gpus->stream));
    matmul_free(&model->matmul);
    for (int i = 0; i < ARENAS; i++) cuda_check(cudaFree(model->arenas[i].base));
    cuda_check(cudaFreeHost(model->eval_memory_host));
    cuda_check(cudaFreeHost(model->losses_host));
    cuda_check(cudaFreeHost(model->argmax_host));
    cuda_check(cudaFreeHost(model->logits_host));
    cuda_check(cudaFreeHost(model->result_host));
    cuda_check(cudaFreeHost(model->stop_host));
    cuda_check(cudaStreamDestroy(model->stream));
    cuda_check(cudaEventDestroy(model->step_done));
    for (int64_t u = 0; u < model->zero.num_units; u++)
        cuda_check(cudaEventDestroy(model->weights_gathered[u]));
    for (cudaEvent_t event : model->unit_grad_buffer_free) cuda_check(cudaEventDestroy(event));
    free(model->tensors), free(model->ranges), free(model->range_offsets), free(model->layers),
        free(model->acts);
    free(model->sample_logits), free(model->weights_gathered), free(model->unit_grads);
    zero_partition_free(&model->zero);
    memset(model, 0, sizeof *model);
}

// Starts to gather unit u's weights from their owners. use_unit lets work that reads them wait.
static void all_gather_weights(Model *model, int64_t u) {
    transfers_wait_for_compute(model->gpus, model->stream);
    gpus_all_gather_unit(model->gpus, &model->zero, u, model->params + model->zero.units[u].begin,
                         sizeof(floatX));
    cuda_check(cudaEventRecord(model->weights_gathered[u], model->gpus->stream));
}

// Sets the parameters of unit u that this GPU owns, or all of them without training, from params on the host,
// which starts with the first of them. m and v, with the same layout, set AdamW's moments; NULL sets zeros.
static void set_unit_params(Model *model, int64_t u, const float *params, const float *m, const float *v) {
    const ZeroUnit *unit = &model->zero.units[u];
    int64_t begin = unit->begin, end = unit->end;
    if (model->training) zero_owned(&model->zero, u, model->zero.rank, &begin, &end);
    const int64_t count = end - begin, bytes = count * (int64_t)sizeof(float), shard = unit->shard_offset;
    if (model->training) {
        cuda_check(cudaMemcpy(model->master + shard, params, bytes, cudaMemcpyHostToDevice));
        cuda_check(cudaMemset(model->m + shard, 0, bytes));
        cuda_check(cudaMemset(model->v + shard, 0, bytes));
        if (m) cuda_check(cudaMemcpy(model->m + shard, m, bytes, cudaMemcpyHostToDevice));
        if (v) cuda_check(cudaMemcpy(model->v + shard, v, bytes, cudaMemcpyHostToDevice));
        cuda_check(cudaDeviceSynchronize()); // model->stream does not wait for these copies
        convert(model->params + begin, model->master + shard, count, model->stream);
        if (model->zero.stage > 0) all_gather_weights(model, u);
    } else { // without training there are no master weights
        std::vector<floatX> rounded(count);
        for (int64_t i = 0; i < count; i++) rounded[i] = (floatX)params[i];
        cuda_check(cudaMemcpy(model->params + begin, rounded.data(), count * sizeof(floatX),
                              cudaMemcpyHostToDevice));
    }
    cuda_check(cudaDeviceSynchronize());
}

// ---------------------------------------------------------------------------------------------------------
// The forward pass

// Returns the weights or gradients of the tensor at `offset`; NULL if offset is -1.
static const floatX *weight(const Model *model, int64_t offset) {
    return offset < 0 ? NULL : model->params + offset;
}
static float *gradient(const Model *model, int64_t offset) {
    if (offset < 0) return NULL;
    int64_t u = zero_find_unit(&model->zero, offset);
    return model->unit_grads[u] + (offset - model->zero.units[u].begin);
}

// Waits for the gathered weights of the ZeRO unit that contains parameter `offset`. Called before a pass
// launches the first work that reads them.
static void use_unit(Model *model, int64_t offset) {
    if (model->zero.stage == 0) return;
    cuda_check(
        cudaStreamWaitEvent(model->stream, model->weights_gathered[zero_find_unit(&model->zero, offset)], 0));
}

// Acquires a gradient buffer for the unit that contains parameter `offset`: with ZeRO stage 2 waits until the
// unit's buffer is free, and zeroes it. Called before the backward pass launches the first work that adds to
// the unit's gradients.
static void begin_gradients(Model *model, int64_t offset) {
    if (model->zero.stage < 2) return;
    const int64_t u = zero_find_unit(&model->zero, offset);
    const ZeroUnit *unit = &model->zero.units[u];
    cuda_check(
        cudaStreamWaitEvent(model->stream, model->unit_grad_buffer_free[unit_grad_buffer(model, u)], 0));
    cuda_check(
        cudaMemsetAsync(model->unit_grads[u], 0, (unit->end - unit->begin) * sizeof(float), model->stream));
}

// Reduces the gradients of the unit over all GPUs, beside the following work. ZeRO stages 0 and 1 reduce only
// after the step's last micro-batch. Called after the backward pass has launched the last work that adds to
// the unit's gradients.
static void end_gradients(Model *model, int64_t offset) {
    const ZeroPartition *z = &model->zero;
    const int64_t u = zero_find_unit(z, offset);
    if (!model->gpus || (z->stage < 2 && !model->last_micro_batch)) return;
    transfers_wait_for_compute(model->gpus, model->stream);
    gpus_reduce_unit(model->gpus, z, u, model->unit_grads[u]);
    if (z->stage < 2) return;
    int64_t begin, end;
    zero_partition(z, u, z->rank, &begin, &end);
    add_arrays(model->grads + z->units[u].shard_offset, model->unit_grads[u] + (begin - z->units[u].begin),
               end - begin, model->gpus->stream);
    cuda_check(
        cudaEventRecord(model->unit_grad_buffer_free[unit_grad_buffer(model, u)], model->gpus->stream));
}

static void profile_part(Model *model, ProfilePart part) {
    profile_mark(model->profile, part, model->stream);
}

// Makes b, whose arrays are on the device, the batch that the passes below process.
static void model_set_batch(Model *model, const Batch *b) {
    model->batch = *b;
    if (model->config.attn == ATTN_NSA) return; // fsa_forward computes its own
    const FsaDeviceBatch device_batch = fsa_device_batch(b);
    launcher_check(fsa_batch_layout(&model->batch_layout, &model->config.fsa, &device_batch,
                                    model->batch_layout_memory, model->stream));
}

// A linear layer that reads ln1: k, v, q or the gate logits. With norm >= 0 an RMSNorm of each head follows
// (QK-norm).
typedef struct {
    int64_t weight, bias, norm; // offsets in params; -1: none
    int64_t width;              // output channels
    int heads;
    attnX *out, *dout; // [n, width]
    floatX *raw;       // [n, width] before the norm
    float *rstd;       // [n, heads]
} Projection;

// Fills p [4] and returns the number of projections. k and v come first, so that their all-gather starts
// early.
static int layer_projections(const Model *model, int l, Projection *p) {
    const FsaConfig *f = &model->config.fsa;
    const LayerParams *w = &model->layers[l];
    const LayerActivations *a = &model->acts[l];
    const int64_t C = model->config.channels, qd = f->q_heads * f->head_dim, kd = f->kv_heads * f->head_dim;
    const int64_t k_bias = w->bqkv < 0 ? -1 : w->bqkv + qd, v_bias = w->bqkv < 0 ? -1 : k_bias + kd;
    const int64_t k_weight = w->wqkv + qd * C, v_weight = k_weight + kd * C;
    p[0] = {k_weight, k_bias, w->knorm, kd, f->kv_heads, a->k, model->dk, a->k_raw, a->k_rstd};
    p[1] = {v_weight, v_bias, -1, kd, f->kv_heads, a->v, model->dv, NULL, NULL};
    p[2] = {w->wqkv, w->bqkv, w->qnorm, qd, f->q_heads, a->q, model->dq, a->q_raw, a->q_rstd};
    if (w->wgate < 0) return 3;
    p[3] = {w->wgate, -1, -1, num_gate_logits(f), 1, a->gate_logits, model->dgate_logits, NULL, NULL};
    return 4;
}

// ln1 -> p->out.
static void projection_forward(Model *model, const LayerActivations *a, const Projection *p) {
    const ModelConfig *c = &model->config;
    const int64_t n = model->batch.n;
    floatX *out = attn_needs_convert ? model->convert_buffer : (floatX *)p->out;
    profile_part(model, PART_MATMUL);
    matmul_forward(&model->matmul, p->norm < 0 ? out : p->raw, p->width, a->ln1, weight(model, p->weight),
                   weight(model, p->bias), n, c->channels, p->width, model->stream);
    if (p->norm >= 0) {
        profile_part(model, PART_NORMS);
        rmsnorm_heads_forward(out, p->rstd, p->raw, p->width, weight(model, p->norm), n, p->heads,
                              c->fsa.head_dim, (float)c->norm_eps, model->stream);
    }
    if (attn_needs_convert) convert(p->out, out, n * p->width, model->stream);
}

// Returns the compression's weights for head group i, in the attention's type.
static FsaPhiWeights layer_phi(Model *model, int l, int i) {
    const FsaConfig *f = &model->config.fsa;
    const LayerParams *w = &model->layers[l];
    if (w->phi_wk < 0) return {NULL, NULL, NULL};
    const int64_t rows = (int64_t)f->kv_heads / model->num_head_groups * f->cmp_len, d = f->head_dim;
    FsaPhiWeights phi = {weight(model, w->phi_wk + i * rows * d * d), weight(model, w->phi_pe + i * rows * d),
                         weight(model, w->phi_wv + i * rows * d * d)};
    if (!attn_needs_convert) return phi;
    convert(model->phi[0], (const floatX *)phi.wk, rows * d * d, model->stream);
    convert(model->phi[1], (const floatX *)phi.pe, rows * d, model->stream);
    convert(model->phi[2], (const floatX *)phi.wv, rows * d * d, model->stream);
    return {model->phi[0], model->phi[1], model->phi[2]};
}

// Returns whether other GPUs hold some of the batch's keys (context parallel).
static bool kv_is_sharded(const Model *model) {
    return model->batch.num_keys > model->batch.n;
}

// The head groups rotate through three k (and v) buffers. While head group i is processed,
//   kv_buffer(i)       holds its gathered keys,
//   dkv_buffer(i)      receives their gradients; it held the keys of head group i - 1,
//   the third buffer   sends the gradients of head group i - 1, then receives the keys of head group i + 1.
static int kv_buffer(int i) {
    return 2 * i % 3;
}
static int dkv_buffer(int i) {
    return (2 * i + 1) % 3;
}

// Starts to gather the keys and values of head group i of layer l, before RoPE, from all GPUs that share the
// batch. Does nothing if there is no such head group. The caller waits with compute_waits_for_transfers.
static void all_gather_kv(Model *model, int l, int i) {
    const LayerActivations *a = &model->acts[l];
    const Batch *b = &model->batch;
    const int64_t stride = model->config.fsa.kv_heads * model->config.fsa.head_dim;
    const int64_t width = stride / model->num_head_groups;
    if (!kv_is_sharded(model) || i == model->num_head_groups) return;
    transfers_wait_for_compute(model->gpus, model->stream);
    gpus_all_gather_rows(model->gpus, model->k_buffers[kv_buffer(i)], model->gather_scratch, a->k + i * width,
                         b->num_keys, width, stride, b->chunk_perm, b->num_chunks);
    gpus_all_gather_rows(model->gpus, model->v_buffers[kv_buffer(i)], model->gather_scratch, a->v + i * width,
                         b->num_keys, width, stride, b->chunk_perm, b->num_chunks);
}

// Returns head group i's columns of all [n, width]: copied to `buffer`, or `all` itself if it is the only
// group.
static attnX *load_head_group(const Model *model, attnX *all, attnX *buffer, int64_t width, int i) {
    const int64_t group_width = width / model->num_head_groups;
    if (model->num_head_groups == 1) return all;
    copy_columns(buffer, group_width, all + i * group_width, width, group_width, model->batch.n,
                 model->stream);
    return buffer;
}
// Copies head group i's columns `part` back to all [n, width], unless both are the same array.
static void store_head_group(const Model *model, attnX *all, const attnX *part, int64_t width, int i) {
    const int64_t group_width = width / model->num_head_groups;
    if (part == all) return;
    copy_columns(all + i * group_width, width, part, group_width, group_width, model->batch.n, model->stream);
}

// Returns the gate logits for head group i.
static attnX *head_group_gate_logits(const Model *model, const LayerActivations *a, int i) {
    const FsaConfig *f = &model->config.fsa;
    if (f->gate_per_token) return a->gate_logits;
    return load_head_group(model, a->gate_logits, model->group_gate_logits, num_gate_logits(f), i);
}

// q, k, v, gate_logits -> attn_out. With context parallel the caller has started all_gather_kv of head group
// 0.
static void attention_forward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig group = head_group_config(model), *f = &group;
    const LayerActivations *a = &model->acts[l];
    const int64_t qd = c->fsa.q_heads * f->head_dim, kd = c->fsa.kv_heads * f->head_dim;
    FsaDeviceBatch b = fsa_device_batch(&model->batch);
    profile_part(model, PART_ATTENTION_FORWARD);
    if (c->attn != ATTN_NSA)
        launcher_check(fsa_rope_queries(&c->fsa, &model->batch_layout, attn_dtype, a->q, model->inv_freq,
                                        a->q, model->stream));
    for (int i = 0; i < model->num_head_groups; i++) {
        attnX *q = load_head_group(model, a->q, model->group_q, qd, i);
        attnX *o = model->num_head_groups == 1 ? a->o : model->group_o;
        char *saved = a->saved + i * model->saved_bytes;
        attnX *k, *v;
        if (kv_is_sharded(model)) {
            compute_waits_for_transfers(model->gpus, model->stream);
            all_gather_kv(model, l, i + 1);
            k = model->k_buffers[kv_buffer(i)], v = model->v_buffers[kv_buffer(i)];
        } else {
            k = load_head_group(model, a->k, model->k_buffers[0], kd, i);
            v = load_head_group(model, a->v, model->v_buffers[0], kd, i);
        }
        if (c->attn == ATTN_NSA) {
            FsaPhiWeights phi = layer_phi(model, l, i);
            fsa_check(fsa_forward(f, attn_dtype, &b, q, k, v, &phi, model->inv_freq,
                                  head_group_gate_logits(model, a, i), NULL, o, saved, model->scratch,
                                  model->scratch_bytes, model->stream));
            const int64_t count = f->kv_heads * model->batch.n * f->topk;
            if (model->block_indices_host)
                cuda_check(cudaMemcpyAsync(model->block_indices_host + l * count,
                                           fsa_saved_block_indices(f, attn_dtype, &b, saved),
                                           count * sizeof(int32_t), cudaMemcpyDeviceToHost, model->stream));
        } else {
            FsaVisibility rule = c->attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW;
            launcher_check(
                fsa_rope_keys(f, &model->batch_layout, attn_dtype, k, model->inv_freq, k, model->stream));
            fsa_check(fsa_attention_forward(f, attn_dtype, &b, rule, q, k, v, o, (float *)saved,
                                            model->scratch, model->scratch_bytes, model->stream));
        }
        store_head_group(model, a->o, o, qd, i);
    }
    if (attn_needs_convert) convert(a->attn_out, a->o, model->batch.n * qd, model->stream);
}

// residual_in -> ln1.
static void layer_ln1(Model *model, int l) {
    const LayerActivations *a = &model->acts[l];
    profile_part(model, PART_NORMS);
    rmsnorm_forward(a->ln1, a->ln1_rstd, a->residual_in, weight(model, model->layers[l].ln1), model->batch.n,
                    model->config.channels, (float)model->config.norm_eps, model->stream);
}

// ln1 -> swiglu: everything but the layer's first norm and its last matmul.
static void layer_body(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const LayerParams *w = &model->layers[l];
    const LayerActivations *a = &model->acts[l];
    const int64_t n = model->batch.n, C = c->channels, H = c->hidden, qd = c->fsa.q_heads * c->fsa.head_dim;
    Projection p[4];
    int num_projections = layer_projections(model, l, p);
    for (int i = 0; i < num_projections; i++) {
        if (i == 2) all_gather_kv(model, l, 0);
        projection_forward(model, a, &p[i]);
    }
    attention_forward(model, l);
    profile_part(model, PART_MATMUL);
    matmul_forward(&model->matmul, model->proj_out, C, a->attn_out, weight(model, w->wo), NULL, n, qd, C,
                   model->stream);
    profile_part(model, PART_NORMS);
    rmsnorm_residual_forward(a->ln2, a->residual_mid, a->ln2_rstd, a->residual_in, model->proj_out,
                             weight(model, w->ln2), n, (int)C, (float)c->norm_eps, model->stream);
    profile_part(model, PART_MATMUL);
    matmul_forward(&model->matmul, a->gate_up, 2 * H, a->ln2, weight(model, w->wgu), NULL, n, C, 2 * H,
                   model->stream);
    profile_part(model, PART_NORMS);
    swiglu_forward(a->swiglu, a->gate_up, n, H, model->stream);
}

// Runs the current batch up to lnf_out, the input of the LM head.
static void model_forward(Model *model) {
    const ModelConfig *c = &model->config;
    const int64_t n = model->batch.n, C = c->channels;
    profile_part(model, PART_EMBEDDING);
    use_unit(model, model->wte);
    embedding_forward(model->acts[0].residual_in, model->batch.tokens, weight(model, model->wte), n, (int)C,
                      model->stream);
    use_unit(model, model->layers[0].ln1);
    layer_ln1(model, 0);
    for (int l = 0; l < c->layers; l++) {
        const LayerActivations *a = &model->acts[l], *next = l + 1 < c->layers ? a + 1 : NULL;
        layer_body(model, l);
        profile_part(model, PART_MATMUL);
        matmul_forward(&model->matmul, model->proj_out, C, a->swiglu, weight(model, model->layers[l].wdown),
                       NULL, n, c->hidden, C, model->stream);
        profile_part(model, PART_NORMS);
        use_unit(model, next ? model->layers[l + 1].ln1 : model->lnf);
        rmsnorm_residual_forward(next ? next->ln1 : model->lnf_out,
                                 next ? next->residual_in : model->residual_out,
                                 next ? next->ln1_rstd : model->lnf_rstd, a->residual_mid, model->proj_out,
                                 weight(model, next ? model->layers[l + 1].ln1 : model->lnf), n, (int)C,
                                 (float)c->norm_eps, model->stream);
    }
}

// Computes losses and argmax of the current batch from lnf_out, in chunks of lm_head_rows tokens: the logits
// of all tokens never exist at once. With training != 0 each chunk's logits are overwritten by their
// gradient, from which dnorm and the LM head's gradient follow.
static void model_lm_head(Model *model, int training) {
    const ModelConfig *c = &model->config;
    const Batch *b = &model->batch;
    const int64_t C = c->channels, V = c->vocab_size, Vp = c->padded_vocab;
    const floatX *lm_head = weight(model, model->lm_head);
    profile_part(model, PART_CLASSIFIER);
    for (int64_t t = 0; t < b->n; t += model->lm_head_rows) {
        const int64_t rows = std::min(model->lm_head_rows, b->n - t);
        const floatX *x = model->lnf_out + t * C;
        matmul_forward(&model->matmul, model->logits, Vp, x, lm_head, NULL, rows, C, Vp, model->stream);
        classifier(model->logits, model->losses + t, model->argmax + t, b->targets + t,
                   training ? 1.0f : 0.0f, rows, V, Vp, model->stream);
        if (!training) continue;
        matmul_backward_weight(&model->matmul, gradient(model, model->lm_head), NULL, model->logits, Vp, x,
                               rows, C, Vp, model->stream);
        matmul_backward_input(&model->matmul, model->dnorm + t * C, 0, model->logits, Vp, lm_head, rows, C,
                              Vp, model->stream);
    }
}

// ---------------------------------------------------------------------------------------------------------
// The backward pass

// p->dout -> the gradients of the projection's parameters and of its input: overwrites dnorm, or adds to it
// if add != 0.
static void projection_backward(Model *model, const LayerActivations *a, const Projection *p, int add) {
    const ModelConfig *c = &model->config;
    const int64_t n = model->batch.n;
    const floatX *dout = (const floatX *)p->dout;
    if (attn_needs_convert) {
        convert(model->convert_buffer, p->dout, n * p->width, model->stream);
        dout = model->convert_buffer;
    }
    if (p->norm >= 0) {
        profile_part(model, PART_NORMS);
        rmsnorm_heads_backward(model->dq_raw, p->width, gradient(model, p->norm), dout, p->raw, p->width,
                               weight(model, p->norm), p->rstd, n, p->heads, c->fsa.head_dim, model->scratch,
                               model->stream);
        dout = model->dq_raw;
    }
    profile_part(model, PART_MATMUL);
    matmul_backward_weight(&model->matmul, gradient(model, p->weight), gradient(model, p->bias), dout,
                           p->width, a->ln1, n, c->channels, p->width, model->stream);
    matmul_backward_input(&model->matmul, model->dnorm, add, dout, p->width, weight(model, p->weight), n,
                          c->channels, p->width, model->stream);
}

// Starts to sum the gradients of head group i's keys and values over all GPUs that share the batch. Each GPU
// gets the sums for its own tokens in dk and dv. Does nothing if i < 0. The caller waits with
// compute_waits_for_transfers.
static void reduce_scatter_dkv(Model *model, int i) {
    const Batch *b = &model->batch;
    const int64_t stride = model->config.fsa.kv_heads * model->config.fsa.head_dim;
    const int64_t width = stride / model->num_head_groups;
    if (!kv_is_sharded(model) || i < 0) return;
    transfers_wait_for_compute(model->gpus, model->stream);
    gpus_reduce_scatter_rows(model->gpus, model->dk + i * width, model->k_buffers[dkv_buffer(i)],
                             model->gather_scratch, b->num_keys, width, stride, b->chunk_perm, b->num_chunks);
    gpus_reduce_scatter_rows(model->gpus, model->dv + i * width, model->v_buffers[dkv_buffer(i)],
                             model->gather_scratch, b->num_keys, width, stride, b->chunk_perm, b->num_chunks);
}

// dattn_out -> dq, dk, dv and dgate_logits, q and k before RoPE; adds to the gradients of phi. With context
// parallel dk and dv are still being summed when it returns: call compute_waits_for_transfers before reading
// them.
static void attention_backward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig group = head_group_config(model), *f = &group;
    const LayerParams *w = &model->layers[l];
    const LayerActivations *a = &model->acts[l];
    const int64_t n = model->batch.n, qd = c->fsa.q_heads * f->head_dim,
                  gate_width = num_gate_logits(&c->fsa);
    const bool sharded = kv_is_sharded(model);
    attnX *k = a->k, *v = a->v, *dk = model->dk, *dv = model->dv;
    FsaDeviceBatch b = fsa_device_batch(&model->batch);
    profile_part(model, PART_ATTENTION_BACKWARD);
    if (attn_needs_convert) convert(model->dout, model->dattn_out, n * qd, model->stream);
    for (int i = 0; i < model->num_head_groups; i++) {
        attnX *dout = load_head_group(model, model->dout, model->group_dout, qd, i);
        attnX *dq = model->num_head_groups == 1 ? model->dq : model->group_dq;
        char *saved = a->saved + i * model->saved_bytes;
        if (sharded) {
            compute_waits_for_transfers(model->gpus, model->stream);
            reduce_scatter_dkv(model, i - 1);
            all_gather_kv(model, l, i + 1);
            k = model->k_buffers[kv_buffer(i)], v = model->v_buffers[kv_buffer(i)];
            dk = model->k_buffers[dkv_buffer(i)], dv = model->v_buffers[dkv_buffer(i)];
        }
        if (c->attn == ATTN_NSA) {
            FsaPhiWeights phi = layer_phi(model, l, i);
            const int64_t rows = (int64_t)f->kv_heads * f->cmp_len, d = f->head_dim;
            FsaPhiGradients dphi = {NULL, NULL, NULL};
            if (w->phi_wk >= 0)
                dphi = {gradient(model, w->phi_wk + i * rows * d * d),
                        gradient(model, w->phi_pe + i * rows * d),
                        gradient(model, w->phi_wv + i * rows * d * d)};
            attnX *group_gate_logits = head_group_gate_logits(model, a, i);
            attnX *dgate_logits =
                model->num_head_groups == 1 ? model->dgate_logits : model->group_dgate_logits;
            if (f->gate_per_token) dgate_logits += i * dgate_group_stride(n);
            fsa_check(fsa_backward(f, attn_dtype, &b, k, v, &phi, model->inv_freq, group_gate_logits, dout,
                                   saved, dq, dk, dv, &dphi, dgate_logits, model->scratch,
                                   model->scratch_bytes, model->stream));
            if (!f->gate_per_token) store_head_group(model, model->dgate_logits, dgate_logits, gate_width, i);
        } else {
            FsaVisibility rule = c->attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW;
            attnX *q = load_head_group(model, a->q, model->group_q, qd, i);
            attnX *o = load_head_group(model, a->o, model->group_o, qd, i);
            if (sharded)
                launcher_check(
                    fsa_rope_keys(f, &model->batch_layout, attn_dtype, k, model->inv_freq, k, model->stream));
            fsa_check(fsa_attention_backward(f, attn_dtype, &b, rule, q, k, v, o, (float *)saved, dout, dq,
                                             dk, dv, model->scratch, model->scratch_bytes, model->stream));
            launcher_check(fsa_rope_queries(f, &model->batch_layout, attn_dtype, dq, model->neg_inv_freq, dq,
                                            model->stream));
            launcher_check(fsa_rope_keys(f, &model->batch_layout, attn_dtype, dk, model->neg_inv_freq, dk,
                                         model->stream));
        }
        store_head_group(model, model->dq, dq, qd, i);
    }
    reduce_scatter_dkv(model, model->num_head_groups - 1);
    if (f->gate_per_token && model->num_head_groups > 1)
        sum_parts(model->dgate_logits, model->group_dgate_logits, model->num_head_groups,
                  dgate_group_stride(n), 1, 1, model->stream);
}

// Turns dresidual [n, C] from the gradient of layer l's output into that of its input; adds to the gradients
// of its parameters. Gradients overwrite activations that are no longer needed: swiglu and gate_up end as
// their own gradients.
static void layer_backward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const LayerParams *w = &model->layers[l];
    const LayerActivations *a = &model->acts[l];
    const int64_t n = model->batch.n, C = c->channels, H = c->hidden, qd = c->fsa.q_heads * c->fsa.head_dim;
    cudaStream_t stream = model->stream;
    if (model->recompute == 2) {
        layer_ln1(model, l);
        layer_body(model, l);
    }
    all_gather_kv(model, l, 0);
    if (model->recompute == 1) {
        profile_part(model, PART_NORMS);
        swiglu_forward(a->swiglu, a->gate_up, n, H, stream);
        rmsnorm_forward(a->ln2, a->ln2_rstd, a->residual_mid, weight(model, w->ln2), n, (int)C,
                        (float)c->norm_eps, stream);
    }
    profile_part(model, PART_MATMUL);
    matmul_backward_weight(&model->matmul, gradient(model, w->wdown), NULL, model->dresidual, C, a->swiglu, n,
                           H, C, stream);
    matmul_backward_input(&model->matmul, a->swiglu, 0, model->dresidual, C, weight(model, w->wdown), n, H, C,
                          stream);
    profile_part(model, PART_NORMS);
    swiglu_backward(a->gate_up, a->swiglu, a->gate_up, n, H, stream);
    profile_part(model, PART_MATMUL);
    matmul_backward_weight(&model->matmul, gradient(model, w->wgu), NULL, a->gate_up, 2 * H, a->ln2, n, C,
                           2 * H, stream);
    matmul_backward_input(&model->matmul, model->dnorm, 0, a->gate_up, 2 * H, weight(model, w->wgu), n, C,
                          2 * H, stream);
    profile_part(model, PART_NORMS);
    rmsnorm_backward(model->dresidual, 1, gradient(model, w->ln2), model->dnorm, a->residual_mid,
                     weight(model, w->ln2), a->ln2_rstd, n, (int)C, model->scratch, stream);
    profile_part(model, PART_MATMUL);
    matmul_backward_weight(&model->matmul, gradient(model, w->wo), NULL, model->dresidual, C, a->attn_out, n,
                           qd, C, stream);
    matmul_backward_input(&model->matmul, model->dattn_out, 0, model->dresidual, C, weight(model, w->wo), n,
                          qd, C, stream);
    attention_backward(model, l);
    if (model->recompute == 1) layer_ln1(model, l);
    Projection p[4];
    int num_projections = layer_projections(model, l, p);
    // k and v come last, to wait for their gradients as late as possible
    for (int i = 0; i < num_projections; i++) {
        if (i == num_projections - 2 && kv_is_sharded(model))
            compute_waits_for_transfers(model->gpus, stream);
        projection_backward(model, a, &p[(i + 2) % num_projections], i > 0);
    }
    profile_part(model, PART_NORMS);
    rmsnorm_backward(model->dresidual, 1, gradient(model, w->ln1), model->dnorm, a->residual_in,
                     weight(model, w->ln1), a->ln1_rstd, n, (int)C, model->scratch, stream);
}

// Adds to grads the gradient of the sum of the token losses of batch b, and adds that sum to
// result->loss_sum.
static void model_forward_backward(Model *model, const Batch *b) {
    const ModelConfig *c = &model->config;
    model_set_batch(model, b);
    model_forward(model);
    begin_gradients(model, model->lnf);
    if (c->tied) begin_gradients(model, model->wte);
    model_lm_head(model, 1);
    loss_sum(&model->result->loss_sum, model->losses, b->n, model->stream);
    profile_part(model, PART_NORMS);
    rmsnorm_backward(model->dresidual, 0, gradient(model, model->lnf), model->dnorm, model->residual_out,
                     weight(model, model->lnf), model->lnf_rstd, b->n, c->channels, model->scratch,
                     model->stream);
    end_gradients(model, model->lnf);
    for (int l = c->layers - 1; l >= 0; l--) {
        begin_gradients(model, model->layers[l].ln1);
        layer_backward(model, l);
        end_gradients(model, model->layers[l].ln1);
    }
    profile_part(model, PART_EMBEDDING);
    if (!c->tied) begin_gradients(model, model->wte);
    embedding_backward(gradient(model, model->wte), b->tokens, model->dresidual, b->n, c->channels,
                       c->padded_vocab, model->scratch, model->stream);
    end_gradients(model, model->wte);
}

// Zeroes grads and result. model_update has waited for the transfers of gradients; weights may still be in
// transfer.
static void model_zero_grad(Model *model) {
    const int64_t count = model->zero.stage == 2 ? model->zero.shard_size : model->num_params;
    profile_part(model, PART_OPTIMIZER);
    cuda_check(cudaMemsetAsync(model->grads, 0, count * sizeof(float), model->stream));
    cuda_check(cudaMemsetAsync(model->result, 0, sizeof(StepResult), model->stream));
}

// AdamW step number `step` (1-based), with the gradient of the mean loss over `tokens` tokens, clipped to the
// norm o->clip (0: not clipped). If the loss or the norm is NaN or Inf, nothing changes. Copies result to
// result_host, and records step_done.
static void model_update(Model *model, const Options *o, int64_t step, double lr, int64_t tokens) {
    StepResult *r = model->result;
    const ZeroPartition *z = &model->zero;
    int64_t begin, end;
    profile_part(model, PART_OPTIMIZER);
    cuda_check(
        cudaMemcpyAsync(&r->stop, model->stop_host, sizeof r->stop, cudaMemcpyHostToDevice, model->stream));
    cuda_check(cudaMemsetAsync(&r->squares, 0, sizeof r->squares, model->stream));
    if (model->gpus)
        compute_waits_for_transfers(model->gpus, model->stream); // waits for the reductions of gradients
    for (int64_t u = 0; u < z->num_units; u++) {
        zero_partition(z, u, z->rank, &begin, &end);
        sum_of_squares(&r->squares, model->grads + (z->stage == 2 ? z->units[u].shard_offset : begin),
                       end - begin, model->scratch, model->stream);
    }
    if (model->gpus) {
        transfers_wait_for_compute(model->gpus, model->stream);
        gpus_all_reduce(model->gpus, &r->loss_sum, STEP_SUMS);
        compute_waits_for_transfers(model->gpus, model->stream);
    }
    global_norm(r->norm, &r->squares, (float)(1.0 / (double)tokens), (float)o->clip, model->stream);
    skip_update_if_loss_not_finite(r, model->stream);
    for (int64_t u = 0; u < z->num_units; u++) {
        const int64_t shard = z->units[u].shard_offset, first = model->range_offsets[u];
        zero_owned(z, u, z->rank, &begin, &end);
        adamw(model->params + begin, model->master + shard, model->m + shard, model->v + shard,
              model->grads + (z->stage == 2 ? shard : begin), end - begin, model->ranges_device + first,
              (int)(model->range_offsets[u + 1] - first), lr, o->beta1, o->beta2, o->eps, o->weight_decay,
              step, r->norm, model->stream);
        if (z->stage > 0) all_gather_weights(model, u);
    }
    cuda_check(cudaMemcpyAsync(model->result_host, r, sizeof *r, cudaMemcpyDeviceToHost, model->stream));
    profile_part(model, PART_END);
    cuda_check(cudaEventRecord(model->step_done, model->stream));
}

// ---------------------------------------------------------------------------------------------------------
// Validation and sampling; the host waits for each batch

// run_validate's callback: losses and argmax of the batch in r.
static void evaluate(void *arg, const Run *r, const float **losses, const int32_t **argmax) {
    Model *model = (Model *)arg;
    Batch host = batch_fill(&model->config, model->gpus, r->inputs, r->targets, r->cu_seqlens, r->num_seqs,
                            model->eval_memory_host);
    Batch b = batch_bind(&host, model->eval_memory);
    const int64_t bytes = b.n * (int64_t)sizeof(float); // of each result
    const void *results[2] = {model->losses, model->argmax};
    void *gathered[2] = {model->k_buffers[0], model->v_buffers[0]},
         *dst[2] = {model->losses_host, model->argmax_host};
    cuda_check(cudaMemcpyAsync(model->eval_memory, model->eval_memory_host, batch_bytes(&b),
                               cudaMemcpyHostToDevice, model->stream));
    model_set_batch(model, &b);
    model_forward(model);
    model_lm_head(model, 0);
    profile_part(model, PART_END);
    if (kv_is_sharded(model)) {
        transfers_wait_for_compute(model->gpus, model->stream);
        for (int i = 0; i < 2; i++) gpus_all_gather(model->gpus, gathered[i], results[i], bytes);
        compute_waits_for_transfers(model->gpus, model->stream);
    }
    for (int i = 0; i < 2; i++) {
        const void *src = kv_is_sharded(model) ? gathered[i] : results[i];
        cuda_check(
            cudaMemcpyAsync(dst[i], src, bytes * (b.num_keys / b.n), cudaMemcpyDeviceToHost, model->stream));
    }
    cuda_check(cudaStreamSynchronize(model->stream));
    for (int i = 0; i < 2 && kv_is_sharded(model); i++) { // from rank order to sequence order
        std::vector<int32_t> rank_ordered((int32_t *)dst[i], (int32_t *)dst[i] + b.num_keys);
        cp_scatter_rows(b.num_keys, b.num_chunks, host.chunk_perm, dst[i], rank_ordered.data(),
                        sizeof(int32_t));
    }
    *losses = model->losses_host;
    *argmax = model->argmax_host;
}

// Validates, and writes the block indices of the last batch to `path`.
static void validate_block_indices(Run *r, Model *model, const char *path) {
    const FsaConfig *f = &r->config.fsa;
    BlockIndicesHeader h = {"", r->config.layers, f->q_heads, f->kv_heads, 0, f->topk, f->block, 0};
    memcpy(h.magic, block_indices_magic, sizeof h.magic);
    if (r->config.attn != ATTN_NSA)
        die("-block-indices %s: only -attn nsa selects blocks; drop one of them", path);
    if (r->comm.ranks > 1)
        die("-block-indices %s: %d processes; start one process alone", path, r->comm.ranks);
    h.num_queries = r->opt.batch * r->opt.seq_len;
    model->block_indices_host = (int32_t *)xmalloc(block_indices_count(&h) * sizeof(int32_t));
    run_validate(r, evaluate, model);
    h.num_seqs = r->num_seqs;
    std::vector<int64_t> lengths(h.num_seqs);
    for (int64_t i = 0; i < h.num_seqs; i++) lengths[i] = r->cu_seqlens[i + 1] - r->cu_seqlens[i];
    block_indices_write(path, &h, lengths.data(), model->block_indices_host);
    free(model->block_indices_host);
    model->block_indices_host = NULL;
}

// run_sample's callback: the logits [vocab_size] of the token after tokens [n]. Pads the sequence to a
// multiple of 128 tokens; earlier tokens do not see the padding. So there are few shapes, and the matmuls
// need few algorithms.
static const float *next_logits(void *arg, const int32_t *tokens, int64_t n) {
    Model *model = (Model *)arg;
    const ModelConfig *c = &model->config;
    const int64_t C = c->channels, Vp = c->padded_vocab;
    const int64_t length = std::min(model->max_tokens, (n + 127) / 128 * 128);
    const int64_t cu_seqlens[2] = {0, length};
    std::vector<int32_t> padded(length);
    std::copy(tokens, tokens + n, padded.begin());
    Batch host = batch_fill(c, NULL, padded.data(), padded.data(), cu_seqlens, 1, model->eval_memory_host);
    Batch b = batch_bind(&host, model->eval_memory);
    cuda_check(cudaMemcpyAsync(model->eval_memory, model->eval_memory_host, batch_bytes(&b),
                               cudaMemcpyHostToDevice, model->stream));
    model_set_batch(model, &b);
    model_forward(model);
    matmul_forward(&model->matmul, model->logits, Vp, model->lnf_out + (n - 1) * C,
                   weight(model, model->lm_head), NULL, 1, C, Vp, model->stream);
    cuda_check(cudaMemcpyAsync(model->logits_host, model->logits, Vp * sizeof(floatX), cudaMemcpyDeviceToHost,
                               model->stream));
    cuda_check(cudaStreamSynchronize(model->stream));
    for (int i = 0; i < c->vocab_size; i++) model->sample_logits[i] = (float)model->logits_host[i];
    return model->sample_logits;
}

// ---------------------------------------------------------------------------------------------------------
// The data feed: a thread reads training batches ahead and copies them to the GPU on a stream of its own

// One of the feed's two batches.
typedef struct {
    char *host, *device;         // arrays of the batch; host memory is pinned
    Batch batch;                 // on the device
    double flops;                // of a training step on the batch
    int64_t epoch, position;     // of the training data after the batch
    cudaEvent_t copied, trained; // the copy to the device, and the passes over the batch, are done
    int full;                    // 1: ready for training
} FeedSlot;

typedef struct {
    Run *run;
    const Gpus *gpus;
    int device;
    FeedSlot slots[2];
    int64_t num_taken; // batches that training has taken
    int stop;          // 1: the thread shall end
    pthread_t thread;
    pthread_mutex_t lock; // guards full and stop
    pthread_cond_t changed;
    cudaStream_t stream; // of the copies
} Feed;

// Fills a slot with batch number batch_index of the training data, or of random tokens for -profile. tokens
// [2n] and cu_seqlens [n + 1] are scratch.
static void feed_fill(Feed *feed, FeedSlot *slot, int64_t batch_index, int32_t *tokens, int64_t *cu_seqlens) {
    Run *r = feed->run;
    DataLoader *l = &r->train;
    const Options *o = &r->opt;
    const int64_t n = o->batch * o->seq_len, first = 2 * n * (batch_index * r->dp_size + r->dp_rank);
    if (o->profile_steps) {
        for (int64_t i = 0; i < 2 * n; i++)
            tokens[i] = (int32_t)(rng_u64_at((uint64_t)o->seed, first + i) % r->config.vocab_size);
    } else {
        if (o->overfit && batch_index % r->micro_batches == 0) loader_seek(l, 0, 0);
        loader_next(l, tokens, tokens + n);
    }
    int64_t num_seqs = doc_boundaries(tokens, o->batch, o->seq_len, o->profile_steps ? -1 : r->eot,
                                      (int)o->doc_mask, cu_seqlens);
    Batch b = batch_fill(&r->config, feed->gpus, tokens, tokens + n, cu_seqlens, num_seqs, slot->host);
    slot->batch = batch_bind(&b, slot->device);
    slot->flops = 0;
    for (int64_t s = 0; s < num_seqs; s++)
        slot->flops += model_flops(&r->config, cu_seqlens[s + 1] - cu_seqlens[s]) * r->dp_size;
    slot->epoch = l->epoch;
    slot->position = l->position;
}

// The feed's thread: fills free slots until feed->stop.
static void *feed_thread(void *arg) {
    Feed *feed = (Feed *)arg;
    const Options *o = &feed->run->opt;
    int64_t *cu_seqlens = (int64_t *)xmalloc((o->batch * o->seq_len + 1) * sizeof(int64_t));
    int32_t *tokens = (int32_t *)xmalloc(2 * o->batch * o->seq_len * sizeof(int32_t)); // then targets
    cuda_check(cudaSetDevice(feed->device));
    for (int64_t batch_index = 0;; batch_index++) {
        FeedSlot *slot = &feed->slots[batch_index % 2];
        pthread_mutex_lock(&feed->lock);
        while (slot->full && !feed->stop) pthread_cond_wait(&feed->changed, &feed->lock);
        int stop = feed->stop;
        pthread_mutex_unlock(&feed->lock);
        if (stop) break;
        cuda_check(cudaEventSynchronize(slot->copied)); // the slot's last copy, which ended long ago
        feed_fill(feed, slot, batch_index, tokens, cu_seqlens);
        cuda_check(cudaStreamWaitEvent(feed->stream, slot->trained, 0));
        cuda_check(cudaMemcpyAsync(slot->device, slot->host, batch_bytes(&slot->batch),
                                   cudaMemcpyHostToDevice, feed->stream));
        cuda_check(cudaEventRecord(slot->copied, feed->stream));
        pthread_mutex_lock(&feed->lock);
        slot->full = 1;
        pthread_cond_broadcast(&feed->changed);
        pthread_mutex_unlock(&feed->lock);
    }
    free(cu_seqlens), free(tokens);
    return NULL;
}

// Starts the feed of training batches; feed_stop ends it.
static void feed_start(Feed *feed, Run *r, const Model *model) {
    memset(feed, 0, sizeof *feed);
    feed->run = r;
    feed->gpus = model->gpus;
    cuda_check(cudaGetDevice(&feed->device));
    const Batch max_batch = batch_max(model);
    for (int i = 0; i < 2; i++) {
        FeedSlot *slot = &feed->slots[i];
        slot->device = model->feed_memory[i];
        cuda_check(cudaMallocHost((void **)&slot->host, batch_bytes(&max_batch)));
        cuda_check(cudaEventCreateWithFlags(&slot->copied, cudaEventDisableTiming | cudaEventBlockingSync));
        cuda_check(cudaEventCreateWithFlags(&slot->trained, cudaEventDisableTiming));
    }
    cuda_check(cudaStreamCreateWithFlags(&feed->stream, cudaStreamNonBlocking));
    pthread_mutex_init(&feed->lock, NULL);
    pthread_cond_init(&feed->changed, NULL);
    int error = pthread_create(&feed->thread, NULL, feed_thread, feed);
    if (error) die("cannot start the data feed's thread: %s", strerror(error));
}

// Returns the slot of the next batch. Work that is launched later on `stream` waits for its copy. The caller
// gives the slot back with feed_release.
static FeedSlot *feed_next(Feed *feed, cudaStream_t stream) {
    FeedSlot *slot = &feed->slots[feed->num_taken++ % 2];
    pthread_mutex_lock(&feed->lock);
    while (!slot->full) pthread_cond_wait(&feed->changed, &feed->lock);
    pthread_mutex_unlock(&feed->lock);
    cuda_check(cudaStreamWaitEvent(stream, slot->copied, 0));
    return slot;
}

// Gives the slot back. The feed overwrites its device memory after the work that is on `stream` now.
static void feed_release(Feed *feed, FeedSlot *slot, cudaStream_t stream) {
    cuda_check(cudaEventRecord(slot->trained, stream));
    pthread_mutex_lock(&feed->lock);
    slot->full = 0;
    pthread_cond_broadcast(&feed->changed);
    pthread_mutex_unlock(&feed->lock);
}

static void feed_stop(Feed *feed) {
    pthread_mutex_lock(&feed->lock);
    feed->stop = 1;
    pthread_cond_broadcast(&feed->changed);
    pthread_mutex_unlock(&feed->lock);
    pthread_join(feed->thread, NULL);
    cuda_check(cudaStreamSynchronize(feed->stream));
    for (FeedSlot &slot : feed->slots) {
        cuda_check(cudaFreeHost(slot.host));
        cuda_check(cudaEventDestroy(slot.copied));
        cuda_check(cudaEventDestroy(slot.trained));
    }
    cuda_check(cudaStreamDestroy(feed->stream));
    pthread_mutex_destroy(&feed->lock);
    pthread_cond_destroy(&feed->changed);
}

// ---------------------------------------------------------------------------------------------------------
// The program

#ifndef GPT_NO_MAIN

// Selects the GPU of this process, the local_rank-th of its host, and returns its properties. Exits with an
// error if the program cannot run on it.
static cudaDeviceProp gpu_init(int local_rank) {
    int count = 0, driver = 0, runtime = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver) {
        cuda_check(cudaDriverGetVersion(&driver));
        cuda_check(cudaRuntimeGetVersion(&runtime));
        if (driver == 0) die("no NVIDIA driver found; use train_gpt_nsa_cpu to train without a GPU");
        die("the NVIDIA driver supports CUDA %d.%d, this program needs CUDA %d.%d: update the driver, or "
            "build with the older toolkit",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    }
    if (error != cudaSuccess || count == 0)
        die("no NVIDIA GPU found (%s); use train_gpt_nsa_cpu to train without one",
            cudaGetErrorString(error));
    // some launchers make only its own GPU visible to each process
    int device = count > 1 ? local_rank : 0;
    if (device >= count)
        die("process %d of this host: it has %d GPUs; start at most one process per GPU", local_rank + 1,
            count);
    cuda_check(cudaSetDevice(device));
    cudaDeviceProp gpu;
    cuda_check(cudaGetDeviceProperties(&gpu, device));
    if (gpu.major < 8)
        die("%s: compute capability %d.%d: must be at least 8.0 (A100, RTX 30 and later)", gpu.name,
            gpu.major, gpu.minor);
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, (const void *)skip_update_if_loss_not_finite_kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
        die("%s: this program was not built for compute capability %d.%d; run make on this machine", gpu.name,
            gpu.major, gpu.minor);
    cuda_check(error);
    return gpu;
}

// Copies elements [begin, end) of an array (0: master weights, 1: m, 2: v) to out on the host, on every
// process. With ZeRO each unit is gathered into its unit_grads, which nothing else uses between steps.
static void gather_state(Model *model, int array, int64_t begin, int64_t end, float *out) {
    const ZeroPartition *z = &model->zero;
    float *const arrays[3] = {model->master, model->m, model->v};
    for (int64_t u = 0; u < z->num_units; u++) {
        const ZeroUnit *unit = &z->units[u];
        float *src = arrays[array] + unit->shard_offset;
        if (z->stage > 0) {
            int64_t first, last;
            zero_owned(z, u, z->rank, &first, &last);
            src = model->unit_grads[u];
            cuda_check(cudaMemcpyAsync(src + (first - unit->begin), arrays[array] + unit->shard_offset,
                                       (last - first) * sizeof(float), cudaMemcpyDeviceToDevice,
                                       model->stream));
            transfers_wait_for_compute(model->gpus, model->stream);
            gpus_all_gather_unit(model->gpus, z, u, src, sizeof(float));
            compute_waits_for_transfers(model->gpus, model->stream);
        }
        const int64_t first = std::max(begin, unit->begin), last = std::min(end, unit->end);
        if (first < last)
            cuda_check(cudaMemcpyAsync(out + (first - begin), src + (first - unit->begin),
                                       (last - first) * sizeof(float), cudaMemcpyDeviceToHost,
                                       model->stream));
    }
    cuda_check(cudaStreamSynchronize(model->stream));
}

// Writes a checkpoint; every process writes a part. The file is the same as the C trainer's, whatever the
// number of processes.
static void save_checkpoint(Run *r, Model *model) {
    Comm *comm = &r->comm;
    const int64_t count = model->num_params, chunks = checkpoint_num_chunks(count);
    const int64_t begin = chunks * comm->rank / comm->ranks * CHECKPOINT_CHUNK_FLOATS;
    const int64_t end = std::min(count, chunks * (comm->rank + 1) / comm->ranks * CHECKPOINT_CHUNK_FLOATS);
    AtomicFile file;
    char path[PATH_BYTES + 4] = "";
    if (comm->rank == 0) {
        checkpoint_begin(&file, r->opt.output, &r->config, &r->state, count);
        snprintf(path, sizeof path, "%s", file.tmp);
    }
    comm_broadcast(comm, path, sizeof path);
    int fd = open(path, O_WRONLY);
    if (fd < 0)
        die("cannot write %s: %s%s", path, strerror(errno),
            comm->rank > 0 ? "; the folder -o must be shared by all hosts" : "");
    float *part = (float *)xmalloc((end - begin) * sizeof(float));
    for (int a = 0; a < 3; a++) {
        gather_state(model, a, begin, end, part);
        checkpoint_write_part(fd, path, a, count, begin, end - begin, part);
    }
    free(part);
    if (fsync(fd) != 0 || close(fd) != 0)
        die("cannot write %s: %s; check the free disk space", path, strerror(errno));
    comm_barrier(comm);
    if (comm->rank > 0) return;
    atomic_commit(&file);
    checkpoint_prune(r->opt.output, r->opt.keep, r->state.step);
}

// Sets the parameters, and AdamW's moments when the run resumes: from the checkpoint, or to initial values.
// Each process reads only what it owns.
static void load_params(const Run *r, Model *model) {
    const ZeroPartition *z = &model->zero;
    TrainState state;
    char why[CHECKPOINT_MSG_BYTES];
    FILE *file = r->checkpoint[0] ? checkpoint_open(r->checkpoint, &r->config, &state) : NULL;
    for (int64_t u = 0; u < z->num_units; u++) {
        int64_t begin = z->units[u].begin, end = z->units[u].end;
        if (model->training) zero_owned(z, u, z->rank, &begin, &end);
        std::vector<float> arrays[3];
        for (int a = 0; a < (r->resuming ? 3 : 1); a++) {
            arrays[a].resize(end - begin);
            if (!file)
                params_init_part(&r->config, arrays[a].data(), begin, end, (uint64_t)r->opt.seed);
            else if (checkpoint_read_part(file, r->checkpoint, a, model->num_params, begin, end - begin,
                                          arrays[a].data(), why))
                die("%s; choose another checkpoint", why);
        }
        set_unit_params(model, u, arrays[0].data(), r->resuming ? arrays[1].data() : NULL,
                        r->resuming ? arrays[2].data() : NULL);
    }
    if (file) fclose(file);
}

// One training step: gradients of all micro-batches, then AdamW. Fills `line` except its times and rates.
// Returns the step's FLOPs.
static double train_step(Run *r, Model *model, Feed *feed, StepLog *line) {
    const Options *o = &r->opt;
    double flops = 0;
    int64_t epoch = 0, position = 0;
    model_zero_grad(model);
    for (int64_t i = 0; i < r->micro_batches; i++) {
        FeedSlot *slot = feed_next(feed, model->stream);
        model->last_micro_batch = i == r->micro_batches - 1;
        model_forward_backward(model, &slot->batch);
        flops += slot->flops, epoch = slot->epoch, position = slot->position;
        feed_release(feed, slot, model->stream);
    }
    line->lr = learning_rate(r->state.step, o->lr, o->warmup, o->max_steps, o->final_frac);
    *model->stop_host = run_signal != 0;
    model_update(model, o, r->state.step + 1, line->lr, r->state.total_batch);
    cuda_check(cudaEventSynchronize(model->step_done));
    line->loss = model->result_host->loss_sum / (double)r->state.total_batch;
    line->norm = model->result_host->norm[NORM_VALUE];
    run_check_step(r, line->loss, line->norm);
    line->step = run_finish_step(r, epoch, position);
    if (model->result_host->stop > 0) run_sync_stop_signal(r);
    return flops;
}

// Trains up to -x steps, with validation, samples and checkpoints in between. peak: of all GPUs, in TFLOP/s;
// 0: unknown.
static void train(Run *r, Model *model, double peak) {
    const Options *o = &r->opt;
    Feed feed;
    run_install_signal_handlers();
    if (r->resuming && r->state.step < o->max_steps) {
        printf("resuming after step %lld of %lld\n", (long long)r->state.step, (long long)o->max_steps);
    } else if (r->resuming) {
        printf("all %lld steps are done; train on with -x above %lld\n", (long long)o->max_steps,
               (long long)r->state.step);
    }
    feed_start(&feed, r, model);
    int64_t first_step = r->state.step;
    double train_seconds = 0; // in training steps, without validation, samples and checkpoints
    for (int first_iteration = 1;; first_iteration = 0) {
        Cadence due = cadence_at(o, r->state.step);
        if (due.save && !first_iteration) save_checkpoint(r, model);
        if (due.validate) run_validate(r, evaluate, model);
        if (due.sample && r->comm.rank == 0) run_sample(r, next_logits, model);
        if (r->state.step >= o->max_steps || run_should_stop(r)) break;
        StepLog line;
        memset(&line, 0, sizeof line);
        double start = now_seconds();
        double flops = train_step(r, model, &feed, &line);
        double elapsed = now_seconds() - start;
        train_seconds += elapsed;
        line.ms = elapsed * 1e3;
        line.tokens_per_second = (double)r->state.total_batch / elapsed;
        line.mfu = peak > 0 ? flops / elapsed / (peak * 1e12) : 0;
        line.memory_bytes = (int64_t)model_bytes(model);
        logger_train(&r->log, &line, o->max_steps,
                     eta_seconds(train_seconds, r->state.step - first_step, o->max_steps - r->state.step));
    }
    if (run_should_stop(r)) {
        if (o->output) save_checkpoint(r, model);
        printf("stopped by signal %d after step %lld%s\n", (int)run_signal, (long long)r->state.step,
               o->output ? "; resume with -y 1" : "");
    }
    feed_stop(&feed);
}

// ---- -profile: the time of each part of a step

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

// Prints the median milliseconds of each part of a training step (dir "step") or of a forward pass ("fwd"),
// and appends them to dev/results. ms [runs][PART_END]; flops and batch_tokens of one run.
static void profile_report(const Run *r, const Model *model, const cudaDeviceProp *gpu, double peak,
                           const char *dir, int64_t batch_tokens, const std::vector<std::vector<double>> &ms,
                           double flops) {
    const ModelConfig *c = &r->config;
    const FsaConfig *f = &c->fsa;
    static const char *const modes[] = {"nsa", "full", "window"};
    std::vector<double> totals, parts[PART_END];
    for (const std::vector<double> &run : ms) {
        totals.push_back(0);
        for (int i = 0; i < PART_END; i++) parts[i].push_back(run[i]), totals.back() += run[i];
    }
    double total = median(totals), tokens = 1e3 * (double)batch_tokens / total;
    double mfu = peak > 0 ? flops / (total * 1e-3) / (peak * 1e12) : 0;
    bool step = strcmp(dir, "step") == 0;
    printf("\n%s, median of %zu: %.2f ms, %.0f tokens/s, %.1f TFLOP/s",
           step ? "training step" : "forward pass", ms.size(), total, tokens, flops / total * 1e-9);
    if (peak > 0) printf(", mfu %.1f%%", 100 * mfu);
    printf("\n");
    for (int i = 0; i < PART_END; i++)
        if (median(parts[i]) > 0)
            printf("  %-20s %9.2f ms %5.1f%%\n", part_names[i], median(parts[i]),
                   100 * median(parts[i]) / total);
    FILE *file = r->comm.rank == 0 ? results_open(gpu->name, r->comm.ranks, "train_gpt_nsa") : NULL;
    if (!file) return;
    fprintf(file,
            ",\"part\":\"step\",\"attn\":\"%s\",\"dir\":\"%s\",\"n\":%lld,\"hq\":%d,\"hkv\":%d,\"d\":%d,"
            "\"block\":%d,\"topk\":%d,\"dtype\":\"%s\",\"ms\":%.4f,\"tflops\":%.2f",
            modes[c->attn], dir, (long long)r->opt.seq_len, f->q_heads, f->kv_heads, f->head_dim, f->block,
            f->topk, FLOATX_NAME, total, flops / total * 1e-9);
    if (f->cmp_len != 32) fprintf(file, ",\"l\":%d", f->cmp_len);
    if (f->cmp_stride != 16) fprintf(file, ",\"s\":%d", f->cmp_stride);
    if (f->window != 512) fprintf(file, ",\"W\":%d", f->window);
    if (r->opt.batch > 1) fprintf(file, ",\"sequences\":%lld", (long long)r->opt.batch);
    if (model->gpus) fprintf(file, ",\"zero\":%d,\"cp\":%d", model->zero.stage, model->gpus->cp_size);
    fprintf(file,
            ",\"layers\":%d,\"channels\":%d,\"hidden\":%d,\"vocab\":%d,\"micro_batches\":%lld,"
            "\"recompute\":%d,\"tokens_per_second\":%.1f,\"mfu\":%.4f,\"memory_bytes\":%zu,\"split\":{",
            c->layers, c->channels, c->hidden, c->vocab_size, (long long)r->micro_batches, model->recompute,
            tokens, mfu, model_bytes(model));
    for (int i = 0; i < PART_END; i++)
        fprintf(file, "%s\"%s\":%.4f", i ? "," : "", part_key(i), median(parts[i]));
    fprintf(file, "}}\n");
    fclose(file);
}

// Times -profile forward passes of a micro-batch, then as many training steps, each after two that are not
// timed, on random tokens.
static void profile(Run *r, Model *model, const cudaDeviceProp *gpu, double peak) {
    const Options *o = &r->opt;
    Profile measure;
    Feed feed;
    feed_start(&feed, r, model);
    model->profile = &measure;
    for (int step = 0; step < 2; step++) {
        std::vector<std::vector<double>> ms;
        double flops = 0;
        for (int64_t i = 0; i < o->profile_steps + 2; i++) {
            std::vector<double> parts(PART_END, 0.0);
            StepLog line;
            if (step) {
                flops = train_step(r, model, &feed, &line);
            } else {
                FeedSlot *slot = feed_next(&feed, model->stream);
                flops = slot->flops / 3; // the backward pass takes twice the FLOPs of the forward pass
                model_set_batch(model, &slot->batch);
                model_forward(model);
                model_lm_head(model, 0);
                profile_part(model, PART_END);
                feed_release(&feed, slot, model->stream);
            }
            profile_collect(&measure, parts.data(), model->stream);
            if (i >= 2) ms.push_back(parts);
        }
        int64_t tokens = step ? r->state.total_batch : o->batch * o->seq_len * r->dp_size;
        profile_report(r, model, gpu, peak, step ? "step" : "fwd", tokens, ms, flops);
    }
    model->profile = NULL;
    profile_free(&measure);
    feed_stop(&feed);
}

int main(int argc, char **argv) {
    static Run run;
    static Model model;
    static Gpus gpus;
    run_start(&run, argc, argv);
    const Options *o = &run.opt;
    const Comm *comm = &run.comm;
    cudaDeviceProp gpu = gpu_init(comm->local_rank);
    int training = !o->sample_only && !o->val_only;
    double peak = o->peak_tflops;
    if (peak == 0 && !attn_needs_convert) peak = peak_tflops(gpu.name); // of 16-bit matmuls
    gpus_init(&gpus, &run.comm, (int)o->cp_size);
    model_build(&model, &run.config, o->batch * o->seq_len, training, (int)o->recompute, &gpus,
                (int)o->zero_stage);
    run.sample_context = std::min(run.sample_context, model.max_tokens); // only rank 0 samples
    load_params(&run, &model);
    size_t free_bytes, total;
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    printf("gpu: %s, %d SMs, %zu MiB, %s", gpu.name, gpu.multiProcessorCount, total >> 20, FLOATX_NAME);
    if (peak > 0) printf(", peak %.0f TFLOP/s", peak);
    printf("\n");
    if (comm->ranks > 1)
        printf("processes: %d, one GPU each, in %d groups of %d; ZeRO stage %d; memory is per GPU\n",
               comm->ranks, run.dp_size, gpus.cp_size, model.zero.stage);
    if (gpus.cp_size > 1)
        printf("context parallel: gathers keys and values of %d of the %d kv heads at a time\n",
               head_group_config(&model).kv_heads, run.config.fsa.kv_heads);
    peak *= comm->ranks;
    run_print_summary(&run, model.num_params, model_bytes(&model));
    for (int i = 0; i < ARENAS; i++)
        if (model.arenas[i].bytes > 0)
            printf("  %-12s %8zu MiB\n", arena_names[i], (model.arenas[i].bytes + (1 << 20) - 1) >> 20);
    fflush(stdout);
    if (o->sample_only && comm->rank == 0) run_sample(&run, next_logits, &model);
    if (o->block_indices)
        validate_block_indices(&run, &model, o->block_indices);
    else if (o->val_only)
        run_validate(&run, evaluate, &model);
    if (o->profile_steps)
        profile(&run, &model, &gpu, peak);
    else if (training)
        train(&run, &model, peak);
    model_free(&model);
    gpus_free(&gpus);
    run_end(&run);
    return run_signal ? 128 + run_signal : 0;
}
#endif
