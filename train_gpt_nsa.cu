// train_gpt_nsa.cu: the transformer of train_gpt_nsa.c on one GPU or many, and its training loop. From top to
// bottom: the model and its memory, its forward pass, backward pass and update, validation and sampling, the
// main loop. Both files share the names of tensors, types and most functions; train_gpt_nsa.h lists the
// exceptions.
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
// which process keeps which weights, moments and gradients. Beside the passes run, on streams of their own,
// the transfers (nccl.cuh) and, in a forward pass, AdamW of the step before (optimizer.cuh).
#define TRAINER_GPU
// The headers, with what this file takes from each. The run: configuration, data, processes.
#include "llmc/run.h" // Run, Options, ModelConfig, Comm, run_start, run_validate, run_sample
#include "llmc/mfu.h" // peak_tflops
#include "llmc/validate_block_indices.cuh" // validate_block_indices
// The layers.
#include "llmc/cuda_common.cuh" // floatX, cuda_check
#include "llmc/matmul.cuh"      // matmul_forward, matmul_backward_input, matmul_backward_weight
#include "llmc/linear.cuh"      // Linears, Operand, linear_forward, linear_backward
#include "llmc/rmsnorm.cuh"     // rmsnorm_forward, rmsnorm_backward
#include "llmc/swiglu.cuh"      // swiglu_forward, swiglu_backward
#include "llmc/embedding.cuh"   // embedding_forward, embedding_backward
#include "llmc/classifier.cuh"  // classifier
#include "llmc/loss.cuh"        // StepResult, loss_sum, skip_update_if_loss_not_finite, skip_update_above
#include "llmc/global_norm.cuh" // global_norm
#include "llmc/convert.cuh"     // convert, convert_columns
#include "llmc/fsa_call.cuh"    // attnX, attn_dtype, attn_needs_convert, fsa_check
#include "llmc/gate_means.cuh"  // DeviceGateSums, gate_sums_begin, gate_sums_add, gate_sums_end
// The state of a model, and the GPUs that share it.
#include "llmc/nccl.cuh"        // Gpus, transfers_wait_for_compute, compute_waits_for_transfers
#include "llmc/micro_batch.cuh" // Batch, BatchBuffers, batch_fill, batch_upload, fsa_device_batch
#include "llmc/arena.cuh"       // Arena, arena_alloc, die_out_of_memory
#include "llmc/param_layout.h"  // ParamLayout, LayerParams
#include "llmc/qkv_matmul.cuh"  // QkvLayout, QkvPart, qkv_part_forward, qkv_part_backward
#include "llmc/params.cuh"      // Params, params_begin_gradients, params_end_gradients
#include "llmc/optimizer.cuh"   // Optimizer, optimizer_begin, optimizer_update_beside, optimizer_finish
#include "llmc/head_groups.cuh" // HeadGroups, all_gather_kv, reduce_scatter_dkv
// The program.
#include "llmc/checkpoint.cuh"     // set_unit_params, load_params, save_checkpoint
#include "llmc/feed.cuh"           // Feed, feed_next, feed_release
#include "llmc/profile.cuh"        // Profile, profile_mark, profile_collect
#include "llmc/profile_report.cuh" // PassTimes, profile_report
#include "llmc/gpu.cuh"            // gpu_init
#include <algorithm>

// ---------------------------------------------------------------------------------------------------------
// The model and its memory

// The activations that a layer keeps for its backward pass; n tokens. Layers share recomputed arrays.
typedef struct {
    QkvLayout layout;       // the columns of qkv, and the strides of q, k, o and attn_out
    floatX *residual_in;    // [n, C] the residual stream before the layer
    floatX *ln1;            // [n, C]
    float *ln1_rstd;        // [n]
    floatX *qkv;            // [n, layout.stride] columns q | k | v | gate logits; q and k before QK-norm
    attnX *attn_qkv;        // [n, layout.stride] qkv as attnX; the same array if the types are equal
    float *q_rstd, *k_rstd; // [n, Hq], [n, Hkv] with QK-norm
    attnX *q, *k;     // [n, Hq, d], [n, Hkv, d] after QK-norm, before RoPE; views of attn_qkv without it
    char *saved;      // [head groups, saved_bytes] `saved` of fsa_forward; full, window: lse [n, Hq]
    attnX *o;         // [n, Hq, d] the attention's output; a view of attn_qkv with layout.o_over_q
    floatX *attn_out; // [n, Hq, d] o as floatX; the same array if the types are equal
    floatX *residual_mid, *ln2; // [n, C] the residual stream after the attention, and its norm
    float *ln2_rstd;            // [n]
    floatX *gate_up, *swiglu;   // [n, 2*hidden], [n, hidden]
    // With -matmul fp8, in e4m3. ln1 is then for the gate alone, ln2 is NULL, swiglu holds its gradient.
    Fp8Matrix ln1_q, attn_q, ln2_q, swiglu_q;
} LayerActivations;

// The activations of a micro-batch, from its forward pass to its backward pass; n tokens.
typedef struct {
    LayerActivations *layers; // [layers]
    floatX *residual_out;     // [n, C] the residual stream after the last layer
    floatX *lnf_out;          // [n, C]
    float *lnf_rstd, *losses; // [n]
    int32_t *argmax;          // [n] of the logits
} Activations;

// Memory that layers, chunks of the LM head and the end of a step use one after another; n tokens. Gradients
// of activations have their shapes.
typedef struct {
    floatX *logits;         // [lm_head_rows, Vp]
    int64_t lm_head_rows;   // tokens that the LM head processes at a time
    floatX *convert_buffer; // [n, Hq, d] if attn_needs_convert, with QK-norm: q or k, dq or dk as floatX
    attnX *phi[3];          // if attn_needs_convert: phi_wk, phi_pe, phi_wv of one head group
    floatX *dresidual, *dnorm, *dattn_out; // [n, C], [n, C], [n, Hq, d]
    attnX *dout;           // [n, Hq, d] dattn_out as attnX; the same array if the types are equal
    Fp8Matrix dresidual_q; // with -matmul fp8: dresidual in e4m3
    Fp8Matrix dout_q;      // the same of dgate_up [n, 2*hidden], then of columns of dqkv
    floatX *dqkv;          // [n, layout.stride] of the layer
    attnX *attn_dqkv;      // [n, layout.stride] dqkv as attnX; the same array if the types are equal
    attnX *dq, *dk;        // [n, Hq, d], [n, Hkv, d]: columns of attn_dqkv; with QK-norm packed
    char *workspace;       // [workspace_bytes] of the attention and of the layers
    size_t workspace_bytes;
    char *matmul_workspace; // [MATMUL_WORKSPACE_BYTES]
    StepResult *result;     // [1] sums of a step
    DeviceGateSums gates;   // of a batch of validation
} Scratch;

// Host memory. The arrays are pinned unless they say otherwise.
typedef struct {
    Arena pinned;
    char *eval_batch;       // [batch_buffers.bytes] arrays of a Batch
    float *losses;          // [max_keys]
    int32_t *argmax;        // [max_keys]
    floatX *logits;         // [Vp] of the last token
    StepResult *result;     // [1] copy of scratch.result
    double *stop;           // [1] copied to scratch.result->stop
    float *sample_logits;   // [V], not pinned
    int32_t *block_indices; // [layers, Hkv, n, T] for -block-indices, not pinned; else NULL
} HostBuffers;

typedef struct {
    ModelConfig config;
    int64_t max_tokens, max_keys; // tokens of a micro-batch on this GPU, and of its whole sequences
    int training, recompute;      // training 0: no gradients, no AdamW; recompute: the value of -r
    Gpus *gpus;                   // NULL: one GPU alone
    Arena arenas[ARENAS];         // all device memory
    // They last as long as the model.
    ParamLayout layout;  // where the tensors are in params.weights and params.grads
    Params params;       // weights and gradients
    Optimizer optimizer; // master weights, m, v
    double *inv_freq;    // [d/2] of RoPE
    // They belong to the current micro-batch.
    Batch batch;                             // on the device, in batch_buffers
    int first_micro_batch, last_micro_batch; // 1: of its step
    double loss_sum_limit, norm_limit; // a step above one of them does not update (-sl, -sg); 0: no limit
    Activations acts;
    // They hold one thing after another.
    Scratch scratch;
    HeadGroups groups;
    BatchBuffers batch_buffers;
    HostBuffers host;
    // All passes run on one stream.
    Linears linears;
    cudaStream_t stream;
    cudaEvent_t step_done;
} Model;

// Assigns the memory of layer l's activations. Layer 0 has all arrays; the others share those that are not
// their own, and overwrite them. Their own:
//   training    residual_in
//   -r 0        ln1, ln2, swiglu; in fp8 ln1_q, attn_q, ln2_q, swiglu_q, and ln1 where nsa's gate reads it
//   -r 0, 1     the rest. q with QK-norm, but not nsa's, whose backward pass reads the rotated q in `saved`
// The layers of -full-every share o and, in fp8, ln1 among themselves: layer 0 may have o in q and keep ln1.
// In fp8 swiglu is only ever a gradient, in the matmuls' scratch.
static void layer_memory_layout(Model *model, int l) {
    const ModelConfig *c = &model->config;
    LayerActivations *layers = model->acts.layers, *a = &layers[l];
    const AttnMode attn = layer_attention(c, l);
    const int first = l == 0, first_full = l == c->full_every - 1, fp8 = model->linears.fp8;
    *a = layers[attn != c->attn && !first_full ? c->full_every - 1 : 0];
    a->layout = qkv_layout(c, l);
    const FsaConfig *f = &c->fsa;
    Arena *arena = &model->arenas[ACTIVATIONS];
    const int64_t n = model->max_tokens, C = c->channels, d = f->head_dim, q = n * f->q_heads * d;
    const int keep = model->training && model->recompute < 2, keep_cheap = keep && model->recompute < 1;
    if (first || model->training) arena_alloc(arena, &a->residual_in, n * C);
    if (first || (keep_cheap && (!fp8 || attn == ATTN_NSA || first_full))) arena_alloc(arena, &a->ln1, n * C);
    if (first || keep_cheap) {
        if (fp8) {
            fp8_matrix_memory_layout(&a->ln1_q, n, C, arena);
            fp8_matrix_memory_layout(&a->attn_q, n, q / n, arena);
            fp8_matrix_memory_layout(&a->ln2_q, n, C, arena);
            fp8_matrix_memory_layout(&a->swiglu_q, n, c->hidden, arena);
            a->swiglu = (floatX *)model->linears.scratch.dout_t.data;
        } else {
            arena_alloc(arena, &a->ln2, n * C);
            arena_alloc(arena, &a->swiglu, n * c->hidden);
        }
    }
    if (c->qk_norm && (first || (keep && attn != ATTN_NSA))) arena_alloc(arena, &a->q, q);
    if (!a->layout.o_over_q && (first || keep || (first_full && layers[0].layout.o_over_q))) {
        arena_alloc(arena, &a->o, q);
        a->attn_out = (floatX *)a->o;
        if (attn_needs_convert) arena_alloc(arena, &a->attn_out, q);
    }
    if (!first && !keep) return;
    arena_alloc(arena, &a->ln1_rstd, n);
    arena_alloc(arena, &a->ln2_rstd, n);
    arena_alloc(arena, &a->qkv, n * a->layout.stride);
    a->attn_qkv = (attnX *)a->qkv;
    if (attn_needs_convert) arena_alloc(arena, &a->attn_qkv, n * a->layout.stride);
    if (c->qk_norm) {
        arena_alloc(arena, &a->q_rstd, n * f->q_heads);
        arena_alloc(arena, &a->k_rstd, n * f->kv_heads);
        arena_alloc(arena, &a->k, n * f->kv_heads * d);
    } else {
        a->q = a->attn_qkv, a->k = a->attn_qkv + a->layout.k;
    }
    arena_alloc(arena, &a->saved, model->groups.count * (int64_t)model->groups.saved_bytes[attn]);
    if (a->layout.o_over_q) a->o = a->q, a->attn_out = a->qkv;
    arena_alloc(arena, &a->residual_mid, n * C);
    arena_alloc(arena, &a->gate_up, n * 2 * c->hidden);
}

// Assigns the memory of all activations.
static void activations_memory_layout(Model *model) {
    Activations *acts = &model->acts;
    Arena *arena = &model->arenas[ACTIVATIONS];
    const int64_t n = model->max_tokens, C = model->config.channels;
    for (int l = 0; l < model->config.layers; l++) layer_memory_layout(model, l);
    // the last layer's output is residual_out; every other layer's is residual_in of the next layer
    acts->residual_out = acts->layers[0].residual_in, acts->lnf_out = acts->layers[0].ln1;
    if (model->training) arena_alloc(arena, &acts->residual_out, n * C);
    if (model->training && model->recompute == 0) arena_alloc(arena, &acts->lnf_out, n * C);
    arena_alloc(arena, &acts->lnf_rstd, n);
    arena_alloc(arena, &acts->losses, n);
    arena_alloc(arena, &acts->argmax, n);
}

// Assigns the gradients of activations in scratch.
static void gradients_memory_layout(Model *model) {
    const FsaConfig *f = &model->config.fsa;
    Scratch *s = &model->scratch;
    Arena *arena = &model->arenas[SCRATCH];
    const int64_t n = model->max_tokens, C = model->config.channels;
    const int64_t q = n * f->q_heads * f->head_dim;
    const QkvLayout *layout = &model->acts.layers[0].layout; // the largest
    arena_alloc(arena, &s->dresidual, n * C);
    arena_alloc(arena, &s->dnorm, n * C);
    arena_alloc(arena, &s->dattn_out, q);
    s->dout = (attnX *)s->dattn_out;
    if (attn_needs_convert) arena_alloc(arena, &s->dout, q);
    if (model->linears.fp8) {
        fp8_matrix_memory_layout(&s->dresidual_q, n, C, arena);
        fp8_matrix_memory_layout(&s->dout_q, n, std::max<int64_t>(2 * model->config.hidden, layout->gate),
                                 arena);
    }
    arena_alloc(arena, &s->dqkv, n * layout->stride);
    s->attn_dqkv = (attnX *)s->dqkv;
    if (attn_needs_convert) arena_alloc(arena, &s->attn_dqkv, n * layout->stride);
    s->dq = s->attn_dqkv, s->dk = s->attn_dqkv + layout->k;
    if (!model->config.qk_norm) return;
    arena_alloc(arena, &s->dq, q);
    arena_alloc(arena, &s->dk, n * f->kv_heads * f->head_dim);
}

// Returns the bytes of workspace that the attention and the layers need.
static size_t workspace_bytes(const Model *model, const Batch *max_batch) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const int64_t n = model->max_tokens;
    size_t bytes = head_group_workspace_bytes(c, &model->groups, max_batch, model->training);
    if (!model->training) return bytes;
    return std::max({bytes, rmsnorm_backward_scratch(n, c->channels),
                     rmsnorm_backward_scratch(n * f->q_heads, f->head_dim),
                     embedding_backward_scratch(n, c->channels)});
}

// Assigns the memory of scratch. max_batch: upper bounds of a batch's counts.
static void scratch_memory_layout(Model *model, const Batch *max_batch) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    Scratch *s = &model->scratch;
    Arena *arena = &model->arenas[SCRATCH];
    const int64_t n = model->max_tokens, d = f->head_dim, Vp = c->padded_vocab;
    // The logits lie in dqkv if they fit: layers use it only in their backward pass. Reading and writing the
    // LM head's gradient takes at most 6% of the time of a chunk's matmuls with 4,096 rows, 3% with 8,192.
    const int64_t dqkv_size = model->training ? n * model->acts.layers[0].layout.stride : 0;
    s->lm_head_rows = std::min<int64_t>(n, 8192 * Vp <= dqkv_size ? 8192 : 4096);
    if (s->lm_head_rows * Vp > dqkv_size) arena_alloc(arena, &s->logits, s->lm_head_rows * Vp);
    if (attn_needs_convert) {
        int64_t window_rows = (int64_t)f->kv_heads / model->groups.count * f->cmp_len;
        if (c->qk_norm) arena_alloc(arena, &s->convert_buffer, n * f->q_heads * d);
        for (int i = 0; i < 3; i++) arena_alloc(arena, &s->phi[i], window_rows * d * (i == 1 ? 1 : d));
    }
    s->workspace_bytes = workspace_bytes(model, max_batch);
    arena_alloc(arena, &s->workspace, (int64_t)s->workspace_bytes);
    arena_alloc(arena, &s->matmul_workspace, MATMUL_WORKSPACE_BYTES);
    arena_alloc(arena, &s->result, 1);
    arena_alloc(arena, &s->gates.sums, c->layers * GATE_BRANCHES);
    if (model->training) gradients_memory_layout(model);
    if (s->lm_head_rows * Vp <= dqkv_size) s->logits = s->dqkv;
}

// Assigns memory in the arenas to all device arrays. The first call, with empty arenas, only counts bytes.
static void model_memory_layout(Model *model) {
    const ModelConfig *c = &model->config;
    const Batch max_batch = batch_max(model->max_tokens, model->max_keys, model->gpus);
    Arena *arenas = model->arenas;
    for (int i = 0; i < ARENAS; i++) arenas[i].bytes = 0;
    params_memory_layout(&model->params, &model->layout, arenas, model->training);
    if (model->training) optimizer_memory_layout(&model->optimizer, &model->params.zero, arenas);
    linears_memory_layout(&model->linears, c, &model->layout, model->params.weights, model->max_tokens,
                          model->training, arenas);
    head_groups_set_saved_bytes(&model->groups, &c->fsa, &max_batch);
    activations_memory_layout(model);
    head_groups_memory_layout(&model->groups, c, model->max_tokens, model->max_keys, model->training,
                              &arenas[SCRATCH]);
    scratch_memory_layout(model, &max_batch);
    batch_buffers_memory_layout(&model->batch_buffers, &max_batch, model->training, &arenas[SCRATCH]);
    arena_alloc(&arenas[SCRATCH], &model->inv_freq, c->fsa.head_dim / 2);
}

// Allocates the arenas and lays the arrays out in them. Exits with an error if GPU memory is short.
static void model_allocate(Model *model) {
    // reserve memory for kernel code, which is loaded at its first use, and for NCCL
    const size_t reserve = (size_t)(model->gpus ? 1024 : 256) << 20;
    size_t free_bytes, recompute_bytes = 0;
    model_memory_layout(model);
    if (!arenas_allocate(model->arenas, reserve, &free_bytes)) {
        Arena needed[ARENAS];
        std::copy(model->arenas, model->arenas + ARENAS, needed);
        if (model->training && model->recompute < 2) {
            model->recompute = 2;
            model_memory_layout(model);
            recompute_bytes = arenas_bytes(model->arenas);
        }
        die_out_of_memory(needed, recompute_bytes, free_bytes);
    }
    model_memory_layout(model);
}

// Assigns the pinned memory of the host. The first call only counts bytes.
static void host_memory_layout(Model *model) {
    HostBuffers *h = &model->host;
    h->pinned.bytes = 0;
    arena_alloc(&h->pinned, &h->eval_batch, (int64_t)model->batch_buffers.bytes);
    arena_alloc(&h->pinned, &h->losses, model->max_keys);
    arena_alloc(&h->pinned, &h->argmax, model->max_keys);
    arena_alloc(&h->pinned, &h->logits, model->config.padded_vocab);
    arena_alloc(&h->pinned, &h->result, 1);
    arena_alloc(&h->pinned, &h->stop, 1);
}

// Builds a model for at most max_tokens tokens in a pass, counted over all GPUs that share a micro-batch.
// With training != 0 it has gradients and AdamW's moments. recompute is the value of -r, zero_stage that of
// -z; fp8 != 0: -matmul fp8; gpus may be NULL: one GPU alone. The caller sets the parameters with
// set_unit_params. Exits with an error if GPU memory is short.
static void model_build(Model *model, const ModelConfig *config, int64_t max_tokens, int training,
                        int recompute, int fp8, Gpus *gpus, int zero_stage) {
    memset(model, 0, sizeof *model);
    model->config = *config;
    model->gpus = gpus && gpus->ranks > 1 ? gpus : NULL;
    model->max_keys = max_tokens;
    model->max_tokens = model->gpus ? max_tokens / gpus->cp_size : max_tokens;
    head_groups_build(&model->groups, &config->fsa, max_tokens, model->gpus);
    model->training = training, model->recompute = recompute;
    if (config->channels % 8 != 0 || config->hidden % 8 != 0)
        die("-channels %d -hidden %d: both must be multiples of 8 on the GPU", config->channels,
            config->hidden);
    param_layout_build(&model->layout, config);
    params_build(&model->params, config, &model->layout, model->gpus, zero_stage);
    optimizer_build(&model->optimizer, &model->layout, &model->params.zero);
    linears_build(&model->linears, config, fp8);
    model->acts.layers = (LayerActivations *)xcalloc(config->layers, sizeof *model->acts.layers);
    model_allocate(model);
    host_memory_layout(model); // counts
    cuda_check(cudaMallocHost((void **)&model->host.pinned.base, model->host.pinned.bytes));
    host_memory_layout(model);
    model->host.sample_logits = (float *)xmalloc(config->vocab_size * sizeof(float));

    const int half = config->fsa.head_dim / 2;
    std::vector<double> inv_freq(half);
    rope_inv_freq(config, inv_freq.data());
    cuda_check(cudaMemcpy(model->inv_freq, inv_freq.data(), half * sizeof(double), cudaMemcpyHostToDevice));
    if (training) optimizer_upload_ranges(&model->optimizer, &model->params.zero);
    matmul_init(&model->linears.matmul, model->scratch.matmul_workspace, MATMUL_WORKSPACE_BYTES);
    cuda_check(cudaStreamCreateWithFlags(&model->stream, cudaStreamNonBlocking));
    cuda_check(cudaEventCreateWithFlags(&model->step_done, cudaEventDisableTiming));
    cuda_check(cudaDeviceSynchronize()); // model->stream does not wait for the copies above
}

static void model_free(Model *model) {
    cuda_check(cudaStreamSynchronize(model->stream));
    if (model->gpus) cuda_check(cudaStreamSynchronize(model->gpus->stream));
    matmul_free(&model->linears.matmul), linears_free(&model->linears);
    arenas_free(model->arenas);
    cuda_check(cudaFreeHost(model->host.pinned.base));
    cuda_check(cudaStreamDestroy(model->stream));
    cuda_check(cudaEventDestroy(model->step_done));
    free(model->acts.layers), free(model->host.sample_logits);
    optimizer_free(&model->optimizer);
    params_free(&model->params);
    param_layout_free(&model->layout);
    memset(model, 0, sizeof *model);
}

// ---------------------------------------------------------------------------------------------------------
// The forward pass

// Returns the weights or gradients of the tensor at `offset`; NULL if offset is -1.
static const floatX *weight(const Model *model, int64_t offset) {
    return offset < 0 ? NULL : model->params.weights + offset;
}
static float *gradient(const Model *model, int64_t offset) {
    if (offset < 0) return NULL;
    const ZeroPartition *z = &model->params.zero;
    const int64_t u = zero_find_unit(z, offset);
    return model->params.unit_grads[u] + (offset - z->units[u].begin);
}

static void profile_part(Model *model, ProfilePart part) {
    profile_mark(model->linears.profile, part, model->stream);
}

// QK-norm of q or k, which are columns of qkv: RMSNorm of each head.
typedef struct {
    int64_t weight, column; // offset in params; first column of qkv
    int heads;
    attnX *out, *dout; // [n, heads, d]
    float *rstd;       // [n, heads]
} QkNorm;

// Fills norms [2] with the QK-norms of columns in `part`, and returns their number; 0 without QK-norm.
static int part_qk_norms(const Model *model, int l, const QkvPart *part, QkNorm *norms) {
    const Scratch *s = &model->scratch;
    const FsaConfig *f = &model->config.fsa;
    const LayerParams *w = &model->layout.layers[l];
    const LayerActivations *a = &model->acts.layers[l];
    const QkNorm all[2] = {{w->qnorm, 0, f->q_heads, a->q, s->dq, a->q_rstd},
                           {w->knorm, a->layout.k, f->kv_heads, a->k, s->dk, a->k_rstd}};
    int count = 0;
    for (const QkNorm &norm : all)
        if (norm.weight >= 0 && norm.column >= part->column && norm.column < part->column + part->width)
            norms[count++] = norm;
    return count;
}

// Returns the rows of the weight that compute a part of qkv. The gate's are never in e4m3.
static Linear qkv_part_weight(const Model *model, int l, const QkvPart *p) {
    if (model->linears.fp8 && p->column < model->acts.layers[l].layout.gate)
        return linear_rows(linear_weight(&model->linears, l, LINEAR_QKV), p->column, p->width);
    return {weight(model, p->weight), p->width, model->config.channels, p->width};
}

// Starts to gather head group i of layer l's keys and values from the GPUs.
static void all_gather_layer_kv(Model *model, int l, int i) {
    const LayerActivations *a = &model->acts.layers[l];
    all_gather_kv(&model->groups, &model->batch, a->k, a->layout.k_stride, a->attn_qkv + a->layout.v,
                  a->layout.stride, i, model->stream);
}

// ln1 -> qkv, q and k. Starts the all-gather of the first head group's keys and values.
static void qkv_forward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const LayerActivations *a = &model->acts.layers[l];
    const int64_t n = model->batch.n, C = c->channels, d = c->fsa.head_dim, stride = a->layout.stride;
    QkvPart parts[QKV_PARTS];
    QkNorm norms[2];
    const int count = qkv_parts(&a->layout, &model->layout.layers[l], C, kv_is_sharded(&model->batch),
                                model->linears.fp8, parts);
    for (int i = 0; i < count; i++) {
        const QkvPart *p = &parts[i];
        const Linear w = qkv_part_weight(model, l, p);
        floatX *out = a->qkv + p->column;
        qkv_part_forward(&model->linears, p, out, stride, {a->ln1, C, a->ln1_q}, &w, weight(model, p->bias),
                         n, model->stream);
        if (attn_needs_convert)
            convert_columns(a->attn_qkv + p->column, out, n, p->width, stride, model->stream);
        for (int j = 0, num_norms = part_qk_norms(model, l, p, norms); j < num_norms; j++) {
            const QkNorm *x = &norms[j];
            floatX *normed = attn_needs_convert ? model->scratch.convert_buffer : (floatX *)x->out;
            profile_part(model, PART_NORMS);
            rmsnorm_heads_forward(normed, x->rstd, a->qkv + x->column, stride, weight(model, x->weight), n,
                                  x->heads, (int)d, (float)c->norm_eps, model->stream);
            if (attn_needs_convert) convert(x->out, normed, n * x->heads * d, model->stream);
        }
        if (i == 0) all_gather_layer_kv(model, l, 0); // the first part has k and v
    }
}

// Returns the compression's weights for head group i, in the attention's type.
static FsaPhiWeights layer_phi(Model *model, int l, int i) {
    const Scratch *s = &model->scratch;
    const FsaConfig *f = &model->config.fsa;
    const LayerParams *w = &model->layout.layers[l];
    if (w->phi_wk < 0) return {NULL, NULL, NULL};
    const int64_t rows = (int64_t)f->kv_heads / model->groups.count * f->cmp_len, d = f->head_dim;
    FsaPhiWeights phi = {weight(model, w->phi_wk + i * rows * d * d), weight(model, w->phi_pe + i * rows * d),
                         weight(model, w->phi_wv + i * rows * d * d)};
    if (!attn_needs_convert) return phi;
    convert(s->phi[0], (const floatX *)phi.wk, rows * d * d, model->stream);
    convert(s->phi[1], (const floatX *)phi.pe, rows * d, model->stream);
    convert(s->phi[2], (const floatX *)phi.wv, rows * d * d, model->stream);
    return {s->phi[0], s->phi[1], s->phi[2]};
}

// Returns the gradients of the compression's weights for head group i.
static FsaPhiGradients layer_dphi(Model *model, int l, int i) {
    const FsaConfig *f = &model->config.fsa;
    const LayerParams *w = &model->layout.layers[l];
    if (w->phi_wk < 0) return {NULL, NULL, NULL};
    const int64_t rows = (int64_t)f->kv_heads / model->groups.count * f->cmp_len, d = f->head_dim;
    return {gradient(model, w->phi_wk + i * rows * d * d), gradient(model, w->phi_pe + i * rows * d),
            gradient(model, w->phi_wv + i * rows * d * d)};
}

// The attention's arrays of one head group: columns of the layer's arrays, or with context parallel the
// gathered keys and values. Strides are the elements from a token to the next.
typedef struct {
    FsaConfig config;
    attnX *q, *dq, *o, *dout;             // [n, Hq/groups, d]
    attnX *k, *dk, *v, *dv;               // [keys, Hkv/groups, d]
    attnX *gate_logits, *dgate_logits;    // [n, Hq/groups, 3], or [n, 3] with gate_per_token
    int64_t q_stride, k_stride, v_stride; // of q and dq, k and dk, v and dv
    int64_t o_stride, dout_stride, gate_stride, dgate_stride;
    char *saved; // `saved` of fsa_forward; full, window: lse [n, Hq/groups]
} HeadGroup;

// Returns head group i of layer l.
static HeadGroup head_group(const Model *model, int l, int i) {
    const HeadGroups *groups = &model->groups;
    const Scratch *s = &model->scratch;
    const LayerActivations *a = &model->acts.layers[l];
    const FsaConfig *f = &model->config.fsa;
    const QkvLayout *qkv = &a->layout;
    HeadGroup g = {head_group_config(f, groups)};
    const int64_t q = i * g.config.q_heads * f->head_dim, kv_width = groups->kv_width;
    g.q_stride = qkv->q_stride, g.o_stride = qkv->o_stride, g.dout_stride = f->q_heads * f->head_dim;
    g.q = a->q + q, g.dq = s->dq + q, g.o = a->o + q, g.dout = s->dout + q;
    if (kv_is_sharded(&model->batch)) {
        g.k_stride = g.v_stride = kv_width;
        g.k = groups->k[kv_buffer(i)], g.v = groups->v[kv_buffer(i)];
        g.dk = groups->k[dkv_buffer(i)], g.dv = groups->v[dkv_buffer(i)];
    } else {
        g.k_stride = qkv->k_stride, g.v_stride = qkv->stride;
        g.k = a->k + i * kv_width, g.v = a->attn_qkv + qkv->v + i * kv_width;
        g.dk = s->dk + i * kv_width, g.dv = s->attn_dqkv + qkv->v + i * kv_width;
    }
    const int64_t gate = qkv->gate + (f->gate_per_token ? 0 : i * num_gate_logits(&g.config));
    g.gate_stride = g.dgate_stride = qkv->stride;
    g.gate_logits = a->attn_qkv + gate, g.dgate_logits = s->attn_dqkv + gate;
    if (groups->dgate_logits) { // a gradient for each head group, which sum_parts adds
        g.dgate_stride = num_gate_logits(f);
        g.dgate_logits = groups->dgate_logits + i * model->batch.n * g.dgate_stride;
    }
    g.saved = a->saved + i * groups->saved_bytes[layer_attention(&model->config, l)];
    return g;
}

// q, k, attn_qkv -> attn_out. With context parallel the caller has started the all-gather of head group 0.
static void attention_forward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const Scratch *s = &model->scratch;
    const LayerActivations *a = &model->acts.layers[l];
    const FsaDeviceBatch b = fsa_device_batch(&model->batch);
    const AttnMode attn = layer_attention(c, l);
    profile_part(model, PART_ATTENTION_FORWARD);
    for (int i = 0; i < model->groups.count; i++) {
        if (kv_is_sharded(&model->batch)) {
            compute_waits_for_transfers(model->gpus, model->stream);
            all_gather_layer_kv(model, l, i + 1);
        }
        const HeadGroup g = head_group(model, l, i);
        if (attn == ATTN_NSA) {
            FsaForward x = {sizeof x, g.q, g.k, g.v, g.gate_logits};
            x.q_stride = g.q_stride, x.k_stride = g.k_stride, x.v_stride = g.v_stride;
            x.gate_stride = g.gate_stride, x.o = g.o, x.o_stride = g.o_stride;
            x.phi = layer_phi(model, l, i), x.inv_freq = model->inv_freq;
            x.saved = g.saved, x.workspace = s->workspace, x.workspace_bytes = s->workspace_bytes;
            fsa_check(fsa_forward(&g.config, attn_dtype, &b, &x, model->stream));
            const int64_t count = g.config.kv_heads * model->batch.n * g.config.topk;
            if (model->host.block_indices)
                cuda_check(cudaMemcpyAsync(model->host.block_indices + l * count,
                                           fsa_saved_block_indices(&g.config, attn_dtype, &b, g.saved),
                                           count * sizeof(int32_t), cudaMemcpyDeviceToHost, model->stream));
        } else {
            FsaAttentionForward x = {sizeof x, attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW, g.q, g.k, g.v};
            x.q_stride = g.q_stride, x.k_stride = g.k_stride, x.v_stride = g.v_stride;
            x.inv_freq = model->inv_freq, x.o = g.o, x.o_stride = g.o_stride, x.lse = (float *)g.saved;
            x.workspace = s->workspace, x.workspace_bytes = s->workspace_bytes;
            fsa_check(fsa_attention_forward(&g.config, attn_dtype, &b, &x, model->stream));
        }
    }
    gate_sums_add(&s->gates, l, a->attn_qkv, &a->layout, model->batch.n, model->stream);
    if (attn_needs_convert)
        convert_columns(a->attn_out, a->o, model->batch.n, c->fsa.q_heads * c->fsa.head_dim,
                        a->layout.o_stride, model->stream);
}

// residual_in -> ln1.
static void layer_ln1(Model *model, int l) {
    const LayerActivations *a = &model->acts.layers[l];
    profile_part(model, PART_NORMS);
    rmsnorm_forward(a->ln1, a->ln1_rstd, a->residual_in, weight(model, model->layout.layers[l].ln1),
                    model->batch.n, model->config.channels, (float)model->config.norm_eps, model->stream,
                    a->ln1_q);
}

// residual_mid -> ln2.
static void layer_ln2(Model *model, int l) {
    const LayerActivations *a = &model->acts.layers[l];
    profile_part(model, PART_NORMS);
    rmsnorm_forward(a->ln2, a->ln2_rstd, a->residual_mid, weight(model, model->layout.layers[l].ln2),
                    model->batch.n, model->config.channels, (float)model->config.norm_eps, model->stream,
                    a->ln2_q);
}

// ln1 -> swiglu: everything but the layer's first norm and its last matmul. In a step's first forward pass
// AdamW of the step before updates the next layer beside these matmuls, which leave some SMs to it.
static void layer_body(Model *model, int l) {
    const ModelConfig *c = &model->config;
    Linears *m = &model->linears;
    const LayerActivations *a = &model->acts.layers[l];
    const int64_t n = model->batch.n, C = c->channels, H = c->hidden, qd = c->fsa.q_heads * c->fsa.head_dim;
    const Operand attn_out = {a->attn_out, a->layout.o_stride, a->attn_q};
    linears_quantize(m, l, model->stream);
    qkv_forward(model, l);
    attention_forward(model, l);
    if (model->first_micro_batch)
        m->matmul.sms =
            optimizer_update_beside(&model->optimizer, &model->params,
                                    param_after_layer(&model->layout, c, l), n, m->fp8, model->stream);
    operand_quantize(m, &attn_out, n, qd, model->stream);
    linear_forward(m, a->residual_mid, C, attn_out, linear_weight(m, l, LINEAR_WO), NULL, n, model->stream,
                   a->residual_in);
    layer_ln2(model, l);
    linear_forward(m, a->gate_up, 2 * H, {a->ln2, C, a->ln2_q}, linear_weight(m, l, LINEAR_WGU), NULL, n,
                   model->stream);
    profile_part(model, PART_NORMS);
    swiglu_forward(a->swiglu_q.data ? NULL : a->swiglu, a->gate_up, n, H, model->stream, a->swiglu_q);
}

// Lets the pass wait for the weights of the unit that contains parameter `offset`, which AdamW may still
// update.
static void use_weights(Model *model, int64_t offset) {
    profile_part(model, PART_OPTIMIZER);
    optimizer_use_unit(&model->optimizer, &model->params, offset, model->stream);
}

// Runs the current batch up to lnf_out, the input of the LM head.
static void model_forward(Model *model) {
    const ModelConfig *c = &model->config;
    Linears *m = &model->linears;
    const Activations *acts = &model->acts;
    const ParamLayout *layout = &model->layout;
    cudaStream_t stream = model->stream;
    const int64_t n = model->batch.n, C = c->channels;
    use_weights(model, layout->wte);
    profile_part(model, PART_EMBEDDING);
    embedding_forward(acts->layers[0].residual_in, model->batch.tokens, weight(model, layout->wte), n, (int)C,
                      stream);
    for (int l = 0; l < c->layers; l++) {
        const LayerActivations *a = &acts->layers[l];
        floatX *out = l + 1 < c->layers ? acts->layers[l + 1].residual_in : acts->residual_out;
        use_weights(model, layout->layers[l].ln1);
        layer_ln1(model, l);
        layer_body(model, l);
        linear_forward(m, out, C, {a->swiglu, c->hidden, a->swiglu_q}, linear_weight(m, l, LINEAR_WDOWN),
                       NULL, n, stream, a->residual_mid);
        m->matmul.sms = 0;
    }
    use_weights(model, layout->lnf);
    profile_part(model, PART_NORMS);
    rmsnorm_forward(acts->lnf_out, acts->lnf_rstd, acts->residual_out, weight(model, layout->lnf), n, (int)C,
                    (float)c->norm_eps, stream);
}

// Computes losses and argmax of the current batch from lnf_out, in chunks of lm_head_rows tokens: the logits
// of all tokens never exist at once. With training != 0 each chunk's logits are overwritten by their
// gradient, from which dnorm and the LM head's gradient follow.
static void model_lm_head(Model *model, int training) {
    const ModelConfig *c = &model->config;
    const Scratch *s = &model->scratch;
    const Activations *acts = &model->acts;
    const ParamLayout *layout = &model->layout;
    const Batch *b = &model->batch;
    const int64_t C = c->channels, V = c->vocab_size, Vp = c->padded_vocab;
    const floatX *lm_head = weight(model, layout->lm_head);
    profile_part(model, PART_CLASSIFIER);
    for (int64_t t = 0; t < b->n; t += s->lm_head_rows) {
        const int64_t rows = std::min(s->lm_head_rows, b->n - t);
        const floatX *x = acts->lnf_out + t * C;
        matmul_forward(&model->linears.matmul, s->logits, Vp, x, C, lm_head, NULL, rows, C, Vp,
                       model->stream);
        classifier(s->logits, acts->losses + t, acts->argmax + t, b->targets + t, training ? 1.0f : 0.0f,
                   rows, V, Vp, model->stream);
        if (!training) continue;
        matmul_backward_weight(&model->linears.matmul, gradient(model, layout->lm_head),
                               t > 0 || model->linears.add_gradients, s->logits, Vp, x, C, rows, C, Vp,
                               model->stream);
        matmul_backward_input(&model->linears.matmul, s->dnorm + t * C, 0, s->logits, Vp, lm_head, rows, C,
                              Vp, model->stream);
    }
}

// ---------------------------------------------------------------------------------------------------------
// The backward pass

// Starts to sum the gradients of head group i's keys and values of layer l over the GPUs, into dk and
// attn_dqkv.
static void reduce_scatter_layer_dkv(Model *model, int l, int i) {
    const Scratch *s = &model->scratch;
    const QkvLayout *qkv = &model->acts.layers[l].layout;
    reduce_scatter_dkv(&model->groups, &model->batch, s->dk, qkv->k_stride, s->attn_dqkv + qkv->v,
                       qkv->stride, i, model->stream);
}

// dattn_out -> dq, dk and attn_dqkv, q and k before RoPE; adds to the gradients of phi. With context parallel
// dk and dv are still being summed when it returns: call compute_waits_for_transfers before reading them.
static void attention_backward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const Scratch *s = &model->scratch;
    const int64_t n = model->batch.n, gates = num_gate_logits(&c->fsa);
    const FsaDeviceBatch b = fsa_device_batch(&model->batch);
    const AttnMode attn = layer_attention(c, l);
    profile_part(model, PART_ATTENTION_BACKWARD);
    if (attn_needs_convert)
        convert(s->dout, s->dattn_out, n * c->fsa.q_heads * c->fsa.head_dim, model->stream);
    for (int i = 0; i < model->groups.count; i++) {
        if (kv_is_sharded(&model->batch)) {
            compute_waits_for_transfers(model->gpus, model->stream);
            reduce_scatter_layer_dkv(model, l, i - 1);
            all_gather_layer_kv(model, l, i + 1);
        }
        const HeadGroup g = head_group(model, l, i);
        if (attn == ATTN_NSA) {
            FsaBackward x = {sizeof x, g.k, g.v, g.gate_logits, g.dout};
            x.dq_stride = g.q_stride, x.dout_stride = g.dout_stride;
            x.k_stride = x.dk_stride = g.k_stride, x.v_stride = x.dv_stride = g.v_stride;
            x.gate_stride = g.gate_stride, x.dgate_stride = g.dgate_stride;
            x.phi = layer_phi(model, l, i), x.dphi = layer_dphi(model, l, i), x.inv_freq = model->inv_freq;
            x.saved = g.saved, x.dq = g.dq, x.dk = g.dk, x.dv = g.dv, x.dgate_logits = g.dgate_logits;
            x.workspace = s->workspace, x.workspace_bytes = s->workspace_bytes;
            fsa_check(fsa_backward(&g.config, attn_dtype, &b, &x, model->stream));
        } else {
            const FsaVisibility rule = attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW;
            FsaAttentionBackward x = {sizeof x, rule, g.q, g.k, g.v, g.o, g.dout};
            x.q_stride = x.dq_stride = g.q_stride, x.o_stride = g.o_stride, x.dout_stride = g.dout_stride;
            x.k_stride = x.dk_stride = g.k_stride, x.v_stride = x.dv_stride = g.v_stride;
            x.inv_freq = model->inv_freq, x.lse = (float *)g.saved, x.dq = g.dq, x.dk = g.dk, x.dv = g.dv;
            x.workspace = s->workspace, x.workspace_bytes = s->workspace_bytes;
            fsa_check(fsa_attention_backward(&g.config, attn_dtype, &b, &x, model->stream));
        }
    }
    reduce_scatter_layer_dkv(model, l, model->groups.count - 1);
    const QkvLayout *qkv = &model->acts.layers[l].layout;
    if (attn == ATTN_NSA && model->groups.dgate_logits)
        sum_parts(s->attn_dqkv + qkv->gate, model->groups.dgate_logits, model->groups.count, n * gates, gates,
                  qkv->stride, model->stream);
}

// dq, dk and attn_dqkv -> dnorm, the gradient of ln1; adds to the gradients of the parameters. With context
// parallel k and v come last, to wait for their gradients as late as possible.
static void qkv_backward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const Scratch *s = &model->scratch;
    const LayerActivations *a = &model->acts.layers[l];
    const int64_t n = model->batch.n, C = c->channels, d = c->fsa.head_dim, stride = a->layout.stride;
    cudaStream_t stream = model->stream;
    QkvPart parts[QKV_PARTS];
    QkNorm norms[2];
    const int count = qkv_parts(&a->layout, &model->layout.layers[l], C, kv_is_sharded(&model->batch),
                                model->linears.fp8, parts);
    for (int i = count - 1; i >= 0; i--) {
        const QkvPart *p = &parts[i];
        const Linear w = qkv_part_weight(model, l, p);
        floatX *dout = s->dqkv + p->column;
        if (i == 0 && kv_is_sharded(&model->batch)) compute_waits_for_transfers(model->gpus, stream);
        // with QK-norm q and k are overwritten below
        if (attn_needs_convert) convert_columns(dout, s->attn_dqkv + p->column, n, p->width, stride, stream);
        for (int j = 0, num_norms = part_qk_norms(model, l, p, norms); j < num_norms; j++) {
            const QkNorm *x = &norms[j];
            if (attn_needs_convert) convert(s->convert_buffer, x->dout, n * x->heads * d, stream);
            profile_part(model, PART_NORMS);
            rmsnorm_heads_backward(s->dqkv + x->column, stride, gradient(model, x->weight),
                                   attn_needs_convert ? s->convert_buffer : (floatX *)x->dout,
                                   a->qkv + x->column, stride, weight(model, x->weight), x->rstd, n, x->heads,
                                   (int)d, s->workspace, stream);
        }
        qkv_part_backward(&model->linears, p, s->dnorm, i < count - 1, gradient(model, p->weight),
                          gradient(model, p->bias), {dout, stride, s->dout_q}, {a->ln1, C, a->ln1_q}, &w, n,
                          stream);
    }
}

// Turns dresidual [n, C] from the gradient of layer l's output into that of its input; adds to the gradients
// of its parameters. Gradients overwrite activations that are no longer needed: without fp8, swiglu and
// gate_up end as their own gradients.
static void layer_backward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const Scratch *s = &model->scratch;
    Linears *m = &model->linears;
    const LayerParams *w = &model->layout.layers[l];
    const LayerActivations *a = &model->acts.layers[l];
    const int64_t n = model->batch.n, C = c->channels, H = c->hidden, qd = c->fsa.q_heads * c->fsa.head_dim;
    cudaStream_t stream = model->stream;
    const Operand dresidual = {s->dresidual, C, s->dresidual_q},
                  attn_out = {a->attn_out, a->layout.o_stride, a->attn_q};
    if (model->recompute == 2) {
        layer_ln1(model, l);
        layer_body(model, l);
        m->matmul.sms = 0;
    }
    all_gather_layer_kv(model, l, 0);
    if (model->recompute == 1) {
        profile_part(model, PART_NORMS);
        swiglu_forward(m->fp8 ? NULL : a->swiglu, a->gate_up, n, H, stream, a->swiglu_q);
        layer_ln2(model, l);
        operand_quantize(m, &attn_out, n, qd, stream);
    }
    linear_backward(m, a->swiglu, 0, gradient(model, w->wdown), dresidual, {a->swiglu, H, a->swiglu_q},
                    linear_weight(m, l, LINEAR_WDOWN), n, stream);
    profile_part(model, PART_NORMS);
    swiglu_backward(m->fp8 ? NULL : a->gate_up, a->swiglu, a->gate_up, n, H, stream, s->dout_q);
    linear_backward(m, s->dnorm, 0, gradient(model, w->wgu), {a->gate_up, 2 * H, s->dout_q},
                    {a->ln2, C, a->ln2_q}, linear_weight(m, l, LINEAR_WGU), n, stream);
    profile_part(model, PART_NORMS);
    rmsnorm_backward(s->dresidual, 1, gradient(model, w->ln2), s->dnorm, a->residual_mid,
                     weight(model, w->ln2), a->ln2_rstd, n, (int)C, s->workspace, stream, s->dresidual_q);
    linear_backward(m, s->dattn_out, 0, gradient(model, w->wo), dresidual, attn_out,
                    linear_weight(m, l, LINEAR_WO), n, stream);
    attention_backward(model, l);
    if (model->recompute == 1) layer_ln1(model, l);
    qkv_backward(model, l);
    profile_part(model, PART_NORMS);
    rmsnorm_backward(s->dresidual, 1, gradient(model, w->ln1), s->dnorm, a->residual_in,
                     weight(model, w->ln1), a->ln1_rstd, n, (int)C, s->workspace, stream, s->dresidual_q);
}

// Called before and after the passes write the gradients of the unit that contains parameter `offset`. After
// a step's last micro-batch their squares are summed beside the passes.
static void begin_gradients(Model *model, int64_t offset) {
    params_begin_gradients(&model->params, &model->layout, offset, model->first_micro_batch, model->stream);
}
static void end_gradients(Model *model, int64_t offset) {
    const Params *p = &model->params;
    params_end_gradients(p, offset, model->first_micro_batch, model->last_micro_batch, model->stream);
    if (model->last_micro_batch)
        optimizer_add_squares(&model->optimizer, p, zero_find_unit(&p->zero, offset),
                              &model->scratch.result->squares,
                              model->gpus ? model->gpus->stream : model->stream);
}

// Adds to grads the gradient of the sum of the token losses of batch b, and adds that sum to
// result->loss_sum. A step's first micro-batch overwrites grads.
static void model_forward_backward(Model *model, const Batch *b) {
    const ModelConfig *c = &model->config;
    const Scratch *s = &model->scratch;
    const Activations *acts = &model->acts;
    const ParamLayout *layout = &model->layout;
    cudaStream_t stream = model->stream;
    model->batch = *b;
    model->linears.add_gradients = params_add_gradients(&model->params, model->first_micro_batch);
    model_forward(model);
    begin_gradients(model, layout->lnf);
    if (c->tied) begin_gradients(model, layout->wte);
    model_lm_head(model, 1);
    loss_sum(&s->result->loss_sum, acts->losses, b->n, stream);
    profile_part(model, PART_NORMS);
    rmsnorm_backward(s->dresidual, 0, gradient(model, layout->lnf), s->dnorm, acts->residual_out,
                     weight(model, layout->lnf), acts->lnf_rstd, b->n, c->channels, s->workspace, stream,
                     s->dresidual_q);
    end_gradients(model, layout->lnf);
    for (int l = c->layers - 1; l >= 0; l--) {
        begin_gradients(model, layout->layers[l].ln1);
        layer_backward(model, l);
        end_gradients(model, layout->layers[l].ln1);
    }
    profile_part(model, PART_EMBEDDING);
    if (!c->tied) begin_gradients(model, layout->wte);
    embedding_backward(gradient(model, layout->wte), b->tokens, s->dresidual, b->n, c->channels,
                       c->padded_vocab, s->workspace, stream);
    end_gradients(model, layout->wte);
    model->first_micro_batch = 0;
}

// Begins a step: zeroes the sums of result, and lets the next micro-batch overwrite grads. AdamW may still
// read grads and result->norm.
static void model_zero_grad(Model *model) {
    model->first_micro_batch = 1;
    cuda_check(
        cudaMemsetAsync(&model->scratch.result->loss_sum, 0, STEP_SUMS * sizeof(double), model->stream));
}

// AdamW step number `step` (1-based), with the gradient of the mean loss over `tokens` tokens, clipped to the
// norm o->clip (0: not clipped). If the loss or the norm is NaN or Inf, nothing changes. Copies result to
// host.result, and records step_done.
static void model_update(Model *model, const Options *o, int64_t step, double lr, int64_t tokens) {
    Optimizer *a = &model->optimizer;
    cudaStream_t stream = model->stream;
    StepResult *r = model->scratch.result;
    profile_part(model, PART_OPTIMIZER);
    cuda_check(cudaMemcpyAsync(&r->stop, model->host.stop, sizeof r->stop, cudaMemcpyHostToDevice, stream));
    stream_waits_for_stream(a, stream, a->stream); // for the sums of squares
    if (model->gpus) {
        transfers_wait_for_compute(model->gpus, stream);
        gpus_all_reduce(model->gpus, &r->loss_sum, STEP_SUMS);
        compute_waits_for_transfers(model->gpus, stream);
    }
    global_norm(r->norm, &r->squares, (float)(1.0 / (double)tokens), (float)o->clip, stream);
    skip_update_if_loss_not_finite(r, stream);
    skip_update_above(r, model->loss_sum_limit, model->norm_limit, stream);
    optimizer_begin(a, o, step, lr, r->norm, stream);
    cuda_check(cudaMemcpyAsync(model->host.result, r, sizeof *r, cudaMemcpyDeviceToHost, stream));
    linears_weights_changed(&model->linears, model->config.layers);
    profile_part(model, PART_END);
    cuda_check(cudaEventRecord(model->step_done, stream));
}

// ---------------------------------------------------------------------------------------------------------
// Validation and sampling; the host waits for each batch

// run_validate's callback: losses and argmax of the batch in r.
static void evaluate(void *arg, const Run *r, const float **losses, const int32_t **argmax) {
    Model *model = (Model *)arg;
    cudaStream_t stream = model->stream;
    Batch host = batch_fill(&model->config, model->gpus, r->inputs, r->targets, r->cu_seqlens, r->num_seqs,
                            model->host.eval_batch);
    Batch b = batch_upload(&host, model->batch_buffers.eval, stream);
    const bool sharded = kv_is_sharded(&b);
    const int64_t bytes = b.n * (int64_t)sizeof(float); // of each result
    const void *results[2] = {model->acts.losses, model->acts.argmax};
    void *gathered[2] = {model->groups.k[0], model->groups.v[0]},
         *dst[2] = {model->host.losses, model->host.argmax};
    model->batch = b;
    gate_sums_begin(&model->scratch.gates, r->gates, model->config.layers, stream);
    model_forward(model);
    model_lm_head(model, 0);
    profile_part(model, PART_END);
    if (sharded) {
        transfers_wait_for_compute(model->gpus, stream);
        for (int i = 0; i < 2; i++) gpus_all_gather(model->gpus, gathered[i], results[i], bytes);
        compute_waits_for_transfers(model->gpus, stream);
    }
    for (int i = 0; i < 2; i++) {
        const void *src = sharded ? gathered[i] : results[i];
        cuda_check(cudaMemcpyAsync(dst[i], src, bytes * (b.num_keys / b.n), cudaMemcpyDeviceToHost, stream));
    }
    cuda_check(cudaStreamSynchronize(stream));
    for (int i = 0; i < 2 && sharded; i++) batch_to_sequence_order(&host, dst[i]);
    gate_sums_end(&model->scratch.gates, r->gates, &model->config, b.n, stream);
    *losses = model->host.losses, *argmax = model->host.argmax;
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
    Batch host = batch_fill(c, NULL, padded.data(), padded.data(), cu_seqlens, 1, model->host.eval_batch);
    Batch b = batch_upload(&host, model->batch_buffers.eval, model->stream);
    model->batch = b;
    model_forward(model);
    matmul_forward(&model->linears.matmul, model->scratch.logits, Vp, model->acts.lnf_out + (n - 1) * C, C,
                   weight(model, model->layout.lm_head), NULL, 1, C, Vp, model->stream);
    cuda_check(cudaMemcpyAsync(model->host.logits, model->scratch.logits, Vp * sizeof(floatX),
                               cudaMemcpyDeviceToHost, model->stream));
    cuda_check(cudaStreamSynchronize(model->stream));
    for (int i = 0; i < c->vocab_size; i++) model->host.sample_logits[i] = (float)model->host.logits[i];
    return model->host.sample_logits;
}

// ---------------------------------------------------------------------------------------------------------
// The main loop

#ifndef GPT_NO_MAIN

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
    line->lr = schedule_rate(o, r->state.step);
    *model->host.stop = run_signal != 0;
    model->loss_sum_limit = run_loss_limit(r) * (double)r->state.total_batch;
    model->norm_limit = run_norm_limit(r);
    model_update(model, o, r->state.step + 1, line->lr, r->state.total_batch);
    cuda_check(cudaEventSynchronize(model->step_done));
    line->loss = model->host.result->loss_sum / (double)r->state.total_batch;
    line->norm = model->host.result->norm[NORM_VALUE];
    run_accept_step(r, line->loss, line->norm); // on the device, skip_update has decided alike
    line->step = run_finish_step(r, epoch, position);
    if (model->host.result->stop > 0) run_sync_stop_signal(r);
    return flops;
}

// Trains up to -x steps, with validation, samples and checkpoints in between. peak: of all GPUs, in TFLOP/s;
// 0: unknown.
static void train(Run *r, Model *model, double peak) {
    const Options *o = &r->opt;
    Feed feed;
    run_begin_training(r);
    feed_start(&feed, r, model->gpus, model->batch_buffers.feed, model->batch_buffers.bytes);
    int stop = 0;
    for (int first_iteration = 1;; first_iteration = 0) {
        Cadence due = run_due(r, first_iteration);
        if (due.save_first)
            save_checkpoint(r, &model->params, &model->optimizer, &model->layout, model->stream);
        if (due.validate || due.sample) // all processes finish the step, but not all of them run the model
            optimizer_finish(&model->optimizer, &model->params, model->stream);
        if (due.validate) run_validate(r, evaluate, model);
        if (due.sample && r->comm.rank == 0) run_sample(r, next_logits, model);
        stop = run_should_stop(r);
        if (due.save || (stop && o->output))
            save_checkpoint(r, &model->params, &model->optimizer, &model->layout, model->stream);
        if (r->state.step >= o->max_steps || stop) break;
        StepLog line = {};
        double start = now_seconds();
        double flops = train_step(r, model, &feed, &line);
        double elapsed = now_seconds() - start;
        line.mfu = peak > 0 ? flops / elapsed / (peak * 1e12) : 0;
        line.memory_bytes = (int64_t)arenas_bytes(model->arenas);
        run_log_step(r, &line, elapsed);
    }
    if (stop) run_print_stopped(r);
    feed_stop(&feed);
}

// Times -profile forward passes on random tokens, then as many steps, each after two others. gpu: its name.
static void profile(Run *r, Model *model, const char *gpu, double peak) {
    const Options *o = &r->opt;
    Profile measure;
    Feed feed;
    const Ceilings ceilings = ceilings_measure(&model->linears.matmul, &model->arenas[ACTIVATIONS],
                                               model->linears.fp8, model->stream);
    feed_start(&feed, r, model->gpus, model->batch_buffers.feed, model->batch_buffers.bytes);
    model->linears.profile = &measure;
    for (bool step : {false, true}) {
        PassTimes times = profile_pass(r, step);
        for (int64_t i = 0; i < o->profile_steps + 2; i++) {
            std::vector<double> parts(PART_END, 0.0);
            StepLog line;
            if (step) {
                times.flops = train_step(r, model, &feed, &line);
            } else {
                FeedSlot *slot = feed_next(&feed, model->stream);
                times.flops = slot->flops / 3; // the backward pass takes twice the FLOPs of the forward pass
                model->batch = slot->batch;
                model_forward(model);
                model_lm_head(model, 0);
                profile_part(model, PART_END);
                feed_release(&feed, slot, model->stream);
            }
            profile_collect(&measure, parts.data(), model->stream);
            if (i >= 2) times.ms.push_back(parts);
        }
        profile_report(r, gpu, peak, arenas_bytes(model->arenas), &ceilings, &times);
    }
    model->linears.profile = NULL;
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
    cudaDeviceProp gpu = gpu_init(comm->local_rank, (const void *)skip_update_if_loss_not_finite_kernel);
    int training = !o->sample_only && !o->val_only;
    run.gpu = gpu.name;
    double peak = o->peak_tflops || attn_needs_convert ? o->peak_tflops : peak_tflops(gpu.name);
    gpus_init(&gpus, &run.comm, (int)o->cp_size);
    const int fp8 = fp8_check(o->matmul, &run.config, &gpu);
    model_build(&model, &run.config, o->batch * o->seq_len, training, (int)o->recompute, fp8, &gpus,
                (int)o->zero_stage);
    run.sample_context = std::min(run.sample_context, model.max_tokens); // only rank 0 samples
    load_params(&run, &model.params, &model.optimizer, model.stream);
    gpu_print(&gpu, fp8, peak);
    if (comm->ranks > 1)
        printf("processes: %d, one GPU each, in %d groups of %d; ZeRO stage %d; memory is per GPU\n",
               comm->ranks, run.dp_size, gpus.cp_size, model.params.zero.stage);
    head_groups_print(&model.groups, &run.config.fsa);
    peak *= comm->ranks;
    run_print_summary(&run, model.layout.num_params, arenas_bytes(model.arenas));
    arenas_print(model.arenas);
    fflush(stdout);
    if (o->sample_only && comm->rank == 0) run_sample(&run, next_logits, &model);
    if (o->block_indices)
        validate_block_indices(&run, evaluate, &model, &model.host.block_indices, o->block_indices);
    else if (o->val_only)
        run_validate(&run, evaluate, &model);
    if (o->profile_steps)
        profile(&run, &model, gpu.name, peak);
    else if (training)
        train(&run, &model, peak);
    model_free(&model);
    gpus_free(&gpus);
    run_end(&run);
    return run_signal ? 128 + run_signal : 0;
}
#endif
