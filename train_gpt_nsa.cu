// train_gpt_nsa.cu: the transformer of train_gpt_nsa.c on one GPU or many, and its training loop. From top to
// bottom: the model's memory, its forward and backward pass, the data's way to the GPU, and what the program
// does.
//
// Weights and activations are bf16; -DENABLE_FP16 makes them fp16, -DENABLE_FP32 fp32, where the attention
// alone is computed in fp16. The optimizer's copy of the weights, AdamW's m and v and the gradients of
// weights are fp32 in all builds. All memory is allocated at the start; a training step waits for the GPU
// once, to read its loss. Every sum has a fixed order: the same seed gives the same bits.
//
// The backward pass computes the gradient of the SUM of the token losses. Dividing by the tokens of a step is
// left to fp32, in the gradient's norm and in AdamW: so activations' gradients do not shrink as batches grow,
// and fp16 needs no loss scale.
//
// With several processes, a GPU each, groups of -cp of them share the tokens of a micro-batch
// (context_parallel.h), whose keys they gather some heads at a time, and the groups take micro-batches of
// their own. Gradients are sums over all processes; what each keeps of weights, moments and gradients, zero.h
// says. Transfers run beside the passes, on a stream of their own.
#define TRAINER_GPU
#include "llmc/run.h"
#include "llmc/choice.h"
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

// What the attention takes.
#ifdef ENABLE_FP32
typedef __half attX;
#else
typedef floatX attX;
#endif
#if defined(ENABLE_FP32) || defined(ENABLE_FP16)
static const FsaDtype att_dtype = FSA_FP16;
#else
static const FsaDtype att_dtype = FSA_BF16;
#endif
static const bool att_converts = sizeof(attX) != sizeof(floatX);

// A call of fsa.h, or of its launchers.
#define fsa_check(call)                                                                                      \
    do {                                                                                                     \
        int status_ = (call);                                                                                \
        if (status_)                                                                                         \
            die("%s:%d: %.60s...: %s (%s)", __FILE__, __LINE__, #call, fsa_last_error(),                     \
                cudaGetErrorString(cudaPeekAtLastError()));                                                  \
    } while (0)

// ---------------------------------------------------------------------------------------------------------
// The model and its memory

// Packed sequences, or this process's part of their tokens. The arrays lie in one piece, so that one copy
// brings them to the GPU.
typedef struct {
    int64_t n, keys; // tokens here, and of the whole sequences
    int64_t num_seqs, num_segments, blocks, max_len;
    int32_t *tokens, *targets; // [n]
    int64_t *cu_seqlens;       // [num_seqs + 1]
    FsaSegment *segments;      // [num_segments] of the tokens here
    int32_t *place;            // [blocks] as context_parallel.h has it
} Batch;

// Offsets of one layer's tensors into params and grads; -1 where the model has none.
typedef struct {
    int64_t ln1, wqkv, bqkv, qnorm, knorm, phi_wk, phi_pe, phi_wv, wgate, wo, ln2, wgu, wdown;
} LayerParams;

// What a layer keeps for its backward pass; n tokens. Layers share what recomputation brings back.
typedef struct {
    floatX *in, *ln1; // [n, C] the residual stream before the layer, its norm
    float *rstd1;     // [n]
    floatX *q_raw, *k_raw;
    float *rstd_q, *rstd_k; // with QK-norm: q and k before it, [n, Hq], [n, Hkv]
    attX *q, *k, *v;        // [n, Hq|Hkv, d]; q and k before RoPE (nsa) or after it (full, window)
    attX *gate;             // [n, 3*Hq] or [n, 3] logits
    char *saved;            // [groups][saved_bytes] nsa: what fsa_forward keeps; full, window: lse [n, heads]
    attX *o;                // [n, Hq*d] what the attention returns
    floatX *att, *mid;      // the same as floatX; [n, C] the residual stream after the attention
    floatX *ln2;
    float *rstd2;
    floatX *gate_up, *act; // [n, 2*hidden], [n, hidden]
} Activations;

// Device memory: one piece for each kind of thing.
typedef enum { WEIGHTS, MASTER, MOMENTS, GRADIENTS, ACTIVATIONS, SCRATCH, ARENAS } ArenaKind;
static const char *const arena_names[ARENAS] = {"weights",   "fp32 weights", "AdamW",
                                                "gradients", "activations",  "scratch"};
typedef struct {
    char *base; // NULL: only counting
    size_t bytes;
} Arena;

typedef struct {
    ModelConfig config;
    int64_t max_tokens, max_keys; // keys: of whole sequences, which several GPUs may share
    int training, recompute;
    int64_t num_tensors, num_params;
    ParamTensor *tensors;
    Gpus *gpus; // NULL: one alone
    Zero zero;
    AdamwRange *ranges;   // on the host; counted from where what this GPU owns of a unit begins
    int64_t *first_range; // [units + 1] of each unit
    LayerParams *layers;
    int64_t wte, lnf, lm_head; // offsets; lm_head = wte where tied

    // on the device
    Arena arenas[ARENAS];
    floatX *params;        // [num_params]
    float *master, *m, *v; // [zero.shard_size], with training alone
    float *grads;          // [num_params]; with ZeRO stage 2 [zero.shard_size]
    float *buffers[4];     // stage 2: gradients of a unit at work (unit_buffer)
    float **unit_grads;    // [units] on the host: where each unit's gradients are made

    // Context parallel: the attention takes one group of heads after another. Each array holds one group's.
    int groups;
    size_t saved_bytes;        // that its attention keeps in a layer
    attX *keys[3], *values[3]; // [max_keys] of all GPUs that share a batch, or gradients: keys_buffer
    attX *slots;               // [max_keys] on their way, in the order of GPUs
    // [max_tokens] where there are several groups; dgate with a gate a token: [groups]
    attX *group_q, *group_o, *group_gate, *group_dout, *group_dq, *group_dgate;

    Activations *acts;                 // [layers]
    floatX *out, *lnf_out;             // [n, C] the residual stream after the last layer, its norm
    float *rstdf, *losses;             // [n]
    int32_t *best;                     // [n] arg max of the logits
    floatX *logits;                    // [head_rows, Vp]
    int64_t head_rows;                 // tokens that the LM head takes at a time
    floatX *branch;                    // [n, C] what half a layer adds to the residual stream
    floatX *wide;                      // [n, Hq*d] where att_converts: between products and the attention
    attX *phi[3];                      // where att_converts: wk, pe, wv of the layer at hand
    floatX *dres, *dnorm, *datt;       // [n, C], [n, C], [n, Hq*d]
    attX *dout, *dq, *dk, *dv, *dgate; // what the attention's backward pass reads and writes
    floatX *draw;                      // [n, Hq*d] with QK-norm: the gradient before it
    double *inv_freq, *inv_freq_back;  // [d/2], and its negative, which turns back
    void *plan_memory, *scratch, *products_memory;
    size_t scratch_bytes; // of `scratch`, which one step after another uses
    StepResult *result;
    AdamwRange *device_ranges;
    char *eval_memory, *feed_memory[2]; // of batches: of validation and sampling, of training

    // on the host, pinned
    char *eval_memory_host;
    float *losses_host;
    int32_t *best_host;
    floatX *logits_host; // [Vp] of the last token
    StepResult *result_host;
    double *stop_host;    // what becomes result->stop
    float *sample_logits; // [V], not pinned
    int32_t *choice;      // [layers, Hkv, n, T] where -choice asks for the last batch's, not pinned

    Batch batch;          // the one at hand, on the device
    int last_micro_batch; // of its step
    BatchLayout plan;         // full, window: of that batch
    Matmul products;      // matmul.cuh's state
    cudaStream_t stream;
    cudaEvent_t step_done;
    cudaEvent_t *gathered;      // [units] its weights have come from those who own them
    cudaEvent_t buffer_free[4]; // its gradients have gone to those who own them
    Profile *profile;           // NULL: nothing is measured
} Model;

template <typename T> static void take(Model *model, ArenaKind kind, T **p, int64_t bytes) {
    Arena *a = &model->arenas[kind];
    *p = a->base ? (T *)(a->base + a->bytes) : NULL;
    a->bytes += (size_t)((bytes + 255) / 256 * 256);
}

// Whole sequences, each a segment, on one GPU.
static Batch batch_whole(int64_t n, int64_t num_seqs, int64_t max_len) {
    Batch b = {n, n, num_seqs, num_seqs, 1, max_len, NULL, NULL, NULL, NULL, NULL};
    return b;
}

// Bytes of a batch's arrays.
static size_t batch_bytes(const Batch *b) {
    return (size_t)(2 * b->n * sizeof(int32_t) + (b->num_seqs + 1) * sizeof(int64_t) +
                    b->num_segments * sizeof(FsaSegment) + b->blocks * sizeof(int32_t));
}

// The same counts, with arrays in `memory`: 8-byte ones first.
static Batch batch_place(const Batch *counts, char *memory) {
    Batch b = *counts;
    b.cu_seqlens = (int64_t *)memory;
    b.segments = (FsaSegment *)(b.cu_seqlens + b.num_seqs + 1);
    b.tokens = (int32_t *)(b.segments + b.num_segments);
    b.targets = b.tokens + b.n;
    b.place = b.targets + b.n;
    return b;
}

// Writes into `memory` on the host this GPU's part of a micro-batch: whole sequences, or its blocks of them.
static Batch batch_fill(const ModelConfig *c, const Gpus *gpus, const int32_t *tokens, const int32_t *targets,
                        const int64_t *cu_seqlens, int64_t num_seqs, char *memory) {
    const int ranks = gpus ? gpus->cp_size : 1, rank = gpus ? gpus->cp_rank : 0;
    const int64_t keys = cu_seqlens[num_seqs], blocks = cp_num_blocks(keys, num_seqs, ranks);
    std::vector<int32_t> place(blocks);
    std::vector<FsaSegment> segments(num_seqs + blocks / ranks);
    cp_assign_blocks(c, cu_seqlens, num_seqs, ranks, blocks, place.data(), NULL);
    Batch counts = batch_whole(keys / ranks, num_seqs, 0);
    counts.keys = keys, counts.blocks = blocks;
    counts.num_segments =
        cp_segments(cu_seqlens, num_seqs, ranks, blocks, place.data(), rank, segments.data());
    for (int64_t s = 0; s < num_seqs; s++)
        counts.max_len = std::max(counts.max_len, cu_seqlens[s + 1] - cu_seqlens[s]);
    Batch b = batch_place(&counts, memory);
    memcpy(b.cu_seqlens, cu_seqlens, (num_seqs + 1) * sizeof(int64_t));
    memcpy(b.segments, segments.data(), b.num_segments * sizeof(FsaSegment));
    memcpy(b.place, place.data(), blocks * sizeof(int32_t));
    cp_gather_rows(ranks, keys, blocks, b.place, rank, b.tokens, tokens, sizeof(int32_t));
    cp_gather_rows(ranks, keys, blocks, b.place, rank, b.targets, targets, sizeof(int32_t));
    return b;
}

// The most that a batch of the model may be.
static Batch batch_most(const Model *model) {
    Batch b = batch_whole(model->max_tokens, model->max_keys, model->max_keys);
    b.keys = model->max_keys;
    b.num_segments = model->max_tokens;
    b.blocks = model->gpus ? 32 * model->gpus->cp_size : 1;
    return b;
}

// As fsa.h takes a batch.
static FsaDeviceBatch fsa_batch(const Batch *b) {
    FsaDeviceBatch f = {b->n, b->keys, b->num_seqs, b->num_segments, b->max_len, b->cu_seqlens, b->segments};
    return f;
}

static int64_t gate_logits(const FsaConfig *f) {
    return f->gate_per_token ? 3 : 3 * f->q_heads;
}

// With a gate a token each group of heads has gradients of the same logits; numbers from one to the next.
static int64_t gate_part(int64_t n) {
    return (3 * n + 7) / 8 * 8;
}

// The configuration of a group of heads.
static FsaConfig group_config(const Model *model) {
    FsaConfig f = model->config.fsa;
    f.q_heads /= model->groups, f.kv_heads /= model->groups;
    return f;
}

// Places one layer's activations. The first layer has all arrays; another has its own of what its backward
// pass reads and recomputation does not bring back, and shares the rest with the first.
static void place_layer(Model *model, Activations *a, int first) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const int64_t n = model->max_tokens, C = c->channels, d = f->head_dim, H = c->hidden;
    const int64_t q = n * f->q_heads * d, k = n * f->kv_heads * d, x = sizeof(floatX);
    int keep = model->training && model->recompute < 2; // more than the layer's input
    int keep_cheap = model->training && model->recompute < 1;
    if (first || model->training) take(model, ACTIVATIONS, &a->in, n * C * x);
    if (first || keep_cheap) {
        take(model, ACTIVATIONS, &a->ln1, n * C * x);
        take(model, ACTIVATIONS, &a->ln2, n * C * x);
        take(model, ACTIVATIONS, &a->act, n * H * x);
    }
    // nsa keeps the rotated q in `saved`
    if (first || (keep && c->attn != ATTN_NSA)) take(model, ACTIVATIONS, &a->q, q * sizeof(attX));
    if (!first && !keep) return;
    take(model, ACTIVATIONS, &a->rstd1, n * sizeof(float));
    take(model, ACTIVATIONS, &a->rstd2, n * sizeof(float));
    if (c->qk_norm) {
        take(model, ACTIVATIONS, &a->q_raw, q * x);
        take(model, ACTIVATIONS, &a->k_raw, k * x);
        take(model, ACTIVATIONS, &a->rstd_q, n * f->q_heads * sizeof(float));
        take(model, ACTIVATIONS, &a->rstd_k, n * f->kv_heads * sizeof(float));
    }
    take(model, ACTIVATIONS, &a->k, k * sizeof(attX));
    take(model, ACTIVATIONS, &a->v, k * sizeof(attX));
    if (c->attn == ATTN_NSA) take(model, ACTIVATIONS, &a->gate, n * gate_logits(f) * sizeof(attX));
    take(model, ACTIVATIONS, &a->saved, model->groups * (int64_t)model->saved_bytes);
    take(model, ACTIVATIONS, &a->o, q * sizeof(attX));
    a->att = (floatX *)a->o;
    if (att_converts) take(model, ACTIVATIONS, &a->att, q * x);
    take(model, ACTIVATIONS, &a->mid, n * C * x);
    take(model, ACTIVATIONS, &a->gate_up, n * 2 * H * x);
}

// What the attention of a head group keeps for its backward pass.
static size_t attention_saved(const Model *model) {
    const FsaConfig group = group_config(model), *f = &group;
    Batch b = batch_most(model);
    FsaDeviceBatch most = fsa_batch(&b);
    if (model->config.attn == ATTN_NSA) return fsa_saved_size(f, att_dtype, &most);
    return (model->max_tokens * f->q_heads * sizeof(float) + 255) / 256 * 256;
}

// Scratch of fsa.h, for any division of the tokens into sequences.
static size_t attention_scratch(const Model *model) {
    const FsaConfig group = group_config(model), *f = &group;
    Batch b = batch_most(model);
    FsaDeviceBatch most = fsa_batch(&b);
    bool nsa = model->config.attn == ATTN_NSA;
    size_t bytes = fsa_workspace_size(f, att_dtype, &most, nsa ? FSA_FORWARD : FSA_ATTENTION_FORWARD);
    if (bytes == 0) die("%s", fsa_last_error());
    if (!model->training) return bytes;
    return std::max(bytes, fsa_workspace_size(f, att_dtype, &most, nsa ? FSA_BACKWARD : FSA_ATTENTION_BACKWARD));
}

// With ZeRO stage 2, the buffer that unit u's gradients are made in: layers use two in turn, so that one is
// reduced while the next is filled. A tied embedding, filled at both ends of the backward pass, has its own.
static int unit_buffer(const Model *model, int64_t u) {
    if (u == 0) return 0;
    if (u == model->zero.num_units - 1) return model->config.tied ? 1 : 0;
    return 2 + (int)(u % 2);
}

// Where gradients are made: in one array, or in those buffers.
static void place_unit_gradients(Model *model) {
    const Zero *z = &model->zero;
    int64_t sizes[4] = {0, 0, 0, 0};
    for (int64_t u = 0; u < z->num_units && z->stage == 2; u++) {
        int64_t *size = &sizes[unit_buffer(model, u)];
        *size = std::max(*size, z->units[u].end - z->units[u].begin);
    }
    for (int i = 0; i < 4; i++)
        if (sizes[i]) take(model, GRADIENTS, &model->buffers[i], sizes[i] * sizeof(float));
    for (int64_t u = 0; u < z->num_units; u++)
        model->unit_grads[u] = z->stage == 2  ? model->buffers[unit_buffer(model, u)]
                               : model->grads ? model->grads + z->units[u].begin
                                              : NULL;
}

// Cuts the arenas into arrays. Called first without memory, to count.
static void model_place(Model *model) {
    const ModelConfig *c = &model->config;
    const FsaConfig *f = &c->fsa;
    const int64_t n = model->max_tokens, P = model->num_params, C = c->channels, d = f->head_dim;
    const int64_t q = n * f->q_heads * d, k = n * f->kv_heads * d, x = sizeof(floatX);
    for (int i = 0; i < ARENAS; i++) model->arenas[i].bytes = 0;
    take(model, WEIGHTS, &model->params, P * x);
    if (model->training) {
        const int64_t shard = model->zero.shard_size;
        take(model, MASTER, &model->master, shard * sizeof(float));
        take(model, MOMENTS, &model->m, shard * sizeof(float));
        take(model, MOMENTS, &model->v, shard * sizeof(float));
        take(model, GRADIENTS, &model->grads, (model->zero.stage == 2 ? shard : P) * sizeof(float));
        place_unit_gradients(model);
    }
    model->saved_bytes = attention_saved(model);
    for (int l = 0; l < c->layers; l++) {
        Activations *a = &model->acts[l];
        *a = model->acts[0]; // shared, but for what place_layer gives it
        place_layer(model, a, l == 0);
    }
    // a layer's last product is added to `in` of the next layer, or to `out`
    model->out = model->acts[0].in, model->lnf_out = model->acts[0].ln1;
    if (model->training) take(model, ACTIVATIONS, &model->out, n * C * x);
    if (model->training && model->recompute == 0) take(model, ACTIVATIONS, &model->lnf_out, n * C * x);
    take(model, ACTIVATIONS, &model->rstdf, n * sizeof(float));
    take(model, ACTIVATIONS, &model->losses, n * sizeof(float));
    take(model, ACTIVATIONS, &model->best, n * sizeof(int32_t));

    // The head's gradient, 4 bytes a weight, is read and written once a chunk: with 4,096 tokens at most 6%
    // of the chunk's products, which take 6 operations a weight and token.
    model->head_rows = std::min<int64_t>(n, 4096);
    take(model, SCRATCH, &model->logits, model->head_rows * c->padded_vocab * x);
    take(model, SCRATCH, &model->branch, n * C * x);
    if (att_converts) {
        int64_t window = (int64_t)f->kv_heads / model->groups * f->cmp_len;
        take(model, SCRATCH, &model->wide, std::max(q, n * gate_logits(f)) * x);
        for (int i = 0; i < 3; i++)
            take(model, SCRATCH, &model->phi[i], window * d * (i == 1 ? 1 : d) * sizeof(attX));
    }
    const int64_t groups = model->groups, keys = model->max_keys * f->kv_heads / groups * d;
    for (int i = 0; model->max_keys > n && i < (groups > 1 ? 3 : model->training ? 2 : 1); i++) {
        take(model, SCRATCH, &model->keys[i], keys * sizeof(attX));
        take(model, SCRATCH, &model->values[i], keys * sizeof(attX));
    }
    if (model->max_keys > n) take(model, SCRATCH, &model->slots, keys * sizeof(attX));
    if (groups > 1) {
        take(model, SCRATCH, &model->group_q, q / groups * sizeof(attX));
        take(model, SCRATCH, &model->group_o, q / groups * sizeof(attX));
        take(model, SCRATCH, &model->group_gate, n * gate_logits(f) / groups * sizeof(attX));
        // nsa's backward pass reads neither q nor o
        model->group_dout = model->group_q, model->group_dq = model->group_o;
    }
    if (groups > 1 && model->training) {
        if (c->attn != ATTN_NSA) {
            take(model, SCRATCH, &model->group_dout, q / groups * sizeof(attX));
            take(model, SCRATCH, &model->group_dq, q / groups * sizeof(attX));
        }
        const int64_t gates = f->gate_per_token ? groups * gate_part(n) : n * gate_logits(f) / groups;
        take(model, SCRATCH, &model->group_dgate, gates * sizeof(attX));
    }
    model->scratch_bytes = attention_scratch(model);
    if (model->training) {
        take(model, SCRATCH, &model->dres, n * C * x);
        take(model, SCRATCH, &model->dnorm, n * C * x);
        take(model, SCRATCH, &model->datt, q * x);
        model->dout = (attX *)model->datt;
        if (att_converts) take(model, SCRATCH, &model->dout, q * sizeof(attX));
        take(model, SCRATCH, &model->dq, q * sizeof(attX));
        take(model, SCRATCH, &model->dk, k * sizeof(attX));
        take(model, SCRATCH, &model->dv, k * sizeof(attX));
        take(model, SCRATCH, &model->dgate, std::max(n * gate_logits(f), gate_part(n)) * sizeof(attX));
        if (c->qk_norm) take(model, SCRATCH, &model->draw, q * x);
        size_t *most = &model->scratch_bytes;
        *most = std::max(*most, rmsnorm_backward_scratch(n, c->channels));
        *most = std::max(*most, rmsnorm_backward_scratch(n * f->q_heads, f->head_dim));
        *most = std::max(*most, embedding_backward_scratch(n, c->channels));
        *most = std::max(*most, global_norm_scratch(P));
    }
    take(model, SCRATCH, &model->scratch, (int64_t)model->scratch_bytes);
    take(model, SCRATCH, &model->products_memory, MATMUL_WORKSPACE_BYTES);
    take(model, SCRATCH, &model->inv_freq, d / 2 * sizeof(double));
    take(model, SCRATCH, &model->inv_freq_back, d / 2 * sizeof(double));
    const Batch most_batch = batch_most(model);
    const int64_t batch_size = (int64_t)batch_bytes(&most_batch);
    take(model, SCRATCH, &model->plan_memory,
         (int64_t)fsa_batch_layout_bytes(most_batch.num_seqs, most_batch.num_segments));
    take(model, SCRATCH, &model->result, sizeof(StepResult));
    take(model, SCRATCH, &model->eval_memory, batch_size);
    if (!model->training) return;
    take(model, SCRATCH, &model->device_ranges,
         model->first_range[model->zero.num_units] * (int64_t)sizeof(AdamwRange));
    for (char *&memory : model->feed_memory) take(model, SCRATCH, &memory, batch_size);
}

static size_t model_bytes(const Model *model) {
    size_t bytes = 0;
    for (int i = 0; i < ARENAS; i++) bytes += model->arenas[i].bytes;
    return bytes;
}

// Says what was needed, what is there, and which flags lower it.
LLMC_NORETURN static void die_of_memory(Model *model, size_t free_bytes) {
    char parts[512] = "", lower[128] = "";
    size_t need = model_bytes(model);
    for (int i = 0; i < ARENAS; i++) {
        size_t at = strlen(parts);
        if (model->arenas[i].bytes == 0) continue;
        snprintf(parts + at, sizeof parts - at, "%s%s %zu", at ? ", " : "", arena_names[i],
                 model->arenas[i].bytes >> 20);
    }
    if (model->training && model->recompute < 2) {
        model->recompute = 2;
        model_place(model);
        snprintf(lower, sizeof lower, "-r 2 (%zu MiB), ", model_bytes(model) >> 20);
    }
    die("out of GPU memory: %zu MiB needed (%s), %zu MiB free; lower it with %sa smaller -b or -t, "
        "or a smaller model",
        need >> 20, parts, free_bytes >> 20, lower);
}

static void model_allocate(Model *model) {
    // for the code of kernels, which is loaded when first used, and for what NCCL takes when it is
    const size_t reserve = (size_t)(model->gpus ? 1024 : 256) << 20;
    size_t free_bytes, total;
    model_place(model);
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    free_bytes -= std::min(free_bytes, reserve);
    if (model_bytes(model) > free_bytes) die_of_memory(model, free_bytes);
    for (int i = 0; i < ARENAS; i++) {
        Arena *a = &model->arenas[i];
        if (a->bytes == 0) continue;
        cudaError_t error = cudaMalloc((void **)&a->base, a->bytes);
        if (error == cudaErrorMemoryAllocation) die_of_memory(model, free_bytes);
        cuda_check(error);
    }
    model_place(model);
}

static int64_t tensor_offset(const Model *model, int layer, const char *name) {
    for (int64_t i = 0; i < model->num_tensors; i++) {
        const ParamTensor *t = &model->tensors[i];
        const char *dot = strrchr(t->name, '.');
        if (t->layer == layer && strcmp(dot ? dot + 1 : t->name, name) == 0) return t->offset;
    }
    return -1;
}

// The parameter table, and where the passes find things in it.
static void model_layout(Model *model, int zero) {
    const ModelConfig *c = &model->config;
    model->num_tensors = param_table(c, NULL, &model->num_params);
    model->tensors = (ParamTensor *)xcalloc(model->num_tensors, sizeof *model->tensors);
    param_table(c, model->tensors, &model->num_params);
    zero_build(&model->zero, zero, model->gpus ? model->gpus->rank : 0, model->gpus ? model->gpus->ranks : 1,
               model->tensors, model->num_tensors);
    const Zero *z = &model->zero;
    model->unit_grads = (float **)xcalloc(z->num_units, sizeof *model->unit_grads);
    model->first_range = (int64_t *)xcalloc(z->num_units + 1, sizeof *model->first_range);
    model->ranges = (AdamwRange *)xcalloc(model->num_tensors, sizeof *model->ranges);
    int64_t ranges = 0;
    for (int64_t u = 0; u < z->num_units; u++) {
        int64_t begin, end;
        zero_owned(z, u, z->rank, &begin, &end);
        for (int64_t i = 0; i < model->num_tensors; i++) {
            const ParamTensor *t = &model->tensors[i];
            if (t->offset + t->size <= begin || t->offset >= end) continue;
            if (ranges > model->first_range[u] && model->ranges[ranges - 1].decay == t->decay) continue;
            AdamwRange range = {std::max<int64_t>(t->offset - begin, 0), t->decay};
            model->ranges[ranges++] = range;
        }
        model->first_range[u + 1] = ranges;
    }
    model->wte = tensor_offset(model, -1, "wte");
    model->lnf = tensor_offset(model, -1, "lnf");
    model->lm_head = c->tied ? model->wte : tensor_offset(model, -1, "lm_head");
    model->layers = (LayerParams *)xcalloc(c->layers, sizeof *model->layers);
    model->acts = (Activations *)xcalloc(c->layers, sizeof *model->acts);
    for (int l = 0; l < c->layers; l++) {
        LayerParams *p = &model->layers[l];
#define OFFSET(name) p->name = tensor_offset(model, l, #name)
        OFFSET(ln1), OFFSET(wqkv), OFFSET(bqkv), OFFSET(qnorm), OFFSET(knorm), OFFSET(phi_wk), OFFSET(phi_pe);
        OFFSET(phi_wv), OFFSET(wgate), OFFSET(wo), OFFSET(ln2), OFFSET(wgu), OFFSET(wdown);
#undef OFFSET
    }
}

// Builds a model for at most max_tokens tokens in a pass, of all GPUs that share it; training: with gradients
// and AdamW's state. recompute as -r says, zero as -z; gpus NULL: one alone. Parameters are not set:
// model_set.
static void model_build(Model *model, const ModelConfig *config, int64_t max_tokens, int training,
                        int recompute, Gpus *gpus, int zero) {
    memset(model, 0, sizeof *model);
    model->config = *config;
    model->gpus = gpus && gpus->ranks > 1 ? gpus : NULL;
    model->max_keys = max_tokens;
    model->max_tokens = model->gpus ? max_tokens / gpus->cp_size : max_tokens;
    model->groups = cp_num_head_groups(&config->fsa, max_tokens, model->gpus ? gpus->cp_size : 1);
    model->training = training;
    model->recompute = recompute;
    if (config->channels % 8 != 0 || config->hidden % 8 != 0)
        die("-channels %d -hidden %d: the GPU trainer takes multiples of 8", config->channels,
            config->hidden);
    model_layout(model, zero);
    model_allocate(model);

    int half = config->fsa.head_dim / 2;
    std::vector<double> inv_freq(half);
    rope_inv_freq(config, inv_freq.data());
    cuda_check(cudaMemcpy(model->inv_freq, inv_freq.data(), half * sizeof(double), cudaMemcpyHostToDevice));
    for (double &f : inv_freq) f = -f;
    cuda_check(
        cudaMemcpy(model->inv_freq_back, inv_freq.data(), half * sizeof(double), cudaMemcpyHostToDevice));
    if (training)
        cuda_check(cudaMemcpy(model->device_ranges, model->ranges,
                              model->first_range[model->zero.num_units] * sizeof(AdamwRange),
                              cudaMemcpyHostToDevice));
    const int64_t n = max_tokens;
    const Batch most = batch_most(model);
    cuda_check(cudaMallocHost((void **)&model->eval_memory_host, batch_bytes(&most)));
    cuda_check(cudaMallocHost((void **)&model->stop_host, sizeof(double)));
    cuda_check(cudaMallocHost((void **)&model->losses_host, n * sizeof(float)));
    cuda_check(cudaMallocHost((void **)&model->best_host, n * sizeof(int32_t)));
    cuda_check(cudaMallocHost((void **)&model->logits_host, config->padded_vocab * sizeof(floatX)));
    cuda_check(cudaMallocHost((void **)&model->result_host, sizeof(StepResult)));
    model->sample_logits = (float *)xmalloc(config->vocab_size * sizeof(float));
    matmul_init(&model->products, model->products_memory, MATMUL_WORKSPACE_BYTES);
    cuda_check(cudaStreamCreateWithFlags(&model->stream, cudaStreamNonBlocking));
    cuda_check(cudaEventCreateWithFlags(&model->step_done, cudaEventDisableTiming));
    model->gathered = (cudaEvent_t *)xcalloc(model->zero.num_units, sizeof *model->gathered);
    for (int64_t u = 0; u < model->zero.num_units; u++)
        cuda_check(cudaEventCreateWithFlags(&model->gathered[u], cudaEventDisableTiming));
    for (cudaEvent_t &event : model->buffer_free)
        cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    cuda_check(cudaDeviceSynchronize()); // the copies above are not in model->stream
}

static void model_free(Model *model) {
    cuda_check(cudaStreamSynchronize(model->stream));
    if (model->gpus) cuda_check(cudaStreamSynchronize(model->gpus->stream));
    matmul_free(&model->products);
    for (int i = 0; i < ARENAS; i++) cuda_check(cudaFree(model->arenas[i].base));
    cuda_check(cudaFreeHost(model->eval_memory_host));
    cuda_check(cudaFreeHost(model->losses_host));
    cuda_check(cudaFreeHost(model->best_host));
    cuda_check(cudaFreeHost(model->logits_host));
    cuda_check(cudaFreeHost(model->result_host));
    cuda_check(cudaFreeHost(model->stop_host));
    cuda_check(cudaStreamDestroy(model->stream));
    cuda_check(cudaEventDestroy(model->step_done));
    for (int64_t u = 0; u < model->zero.num_units; u++) cuda_check(cudaEventDestroy(model->gathered[u]));
    for (cudaEvent_t event : model->buffer_free) cuda_check(cudaEventDestroy(event));
    free(model->tensors), free(model->ranges), free(model->first_range), free(model->layers),
        free(model->acts);
    free(model->sample_logits), free(model->gathered), free(model->unit_grads);
    zero_free(&model->zero);
    memset(model, 0, sizeof *model);
}

// Every unit's weights from those who own them, while later work waits for what it reads of them (use_unit).
static void gather_weights(Model *model, int64_t u) {
    gpus_fork(model->gpus, model->stream);
    gpus_all_gather_unit(model->gpus, &model->zero, u, model->params + model->zero.units[u].begin,
                     sizeof(floatX));
    cuda_check(cudaEventRecord(model->gathered[u], model->gpus->stream));
}

// Sets, of unit u, the parameters that this GPU owns, or without training all, from the host; m and v too, or
// NULL: zeros.
static void set_unit(Model *model, int64_t u, const float *params, const float *m, const float *v) {
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
        cuda_check(cudaDeviceSynchronize()); // these are not in model->stream
        convert(model->params + begin, model->master + shard, count, model->stream);
        if (model->zero.stage > 0) gather_weights(model, u);
    } else { // nothing on the device holds them in fp32
        std::vector<floatX> rounded(count);
        for (int64_t i = 0; i < count; i++) rounded[i] = (floatX)params[i];
        cuda_check(cudaMemcpy(model->params + begin, rounded.data(), count * sizeof(floatX),
                              cudaMemcpyHostToDevice));
    }
    cuda_check(cudaDeviceSynchronize());
}

// ---------------------------------------------------------------------------------------------------------
// The forward pass

static const floatX *weight(const Model *model, int64_t offset) {
    return offset < 0 ? NULL : model->params + offset;
}
static float *gradient(const Model *model, int64_t offset) {
    if (offset < 0) return NULL;
    int64_t u = zero_find_unit(&model->zero, offset);
    return model->unit_grads[u] + (offset - model->zero.units[u].begin);
}

// Before the first work of a pass that reads the weights from `offset` on, up to where their unit ends.
static void use_unit(Model *model, int64_t offset) {
    if (model->zero.stage == 0) return;
    cuda_check(cudaStreamWaitEvent(model->stream, model->gathered[zero_find_unit(&model->zero, offset)], 0));
}

// Before the first work of a backward pass that adds to the gradients from `offset` on: with ZeRO stage 2
// their buffer has to be free, and is zeroed.
static void begin_gradients(Model *model, int64_t offset) {
    if (model->zero.stage < 2) return;
    const int64_t u = zero_find_unit(&model->zero, offset);
    const ZeroUnit *unit = &model->zero.units[u];
    cuda_check(cudaStreamWaitEvent(model->stream, model->buffer_free[unit_buffer(model, u)], 0));
    cuda_check(
        cudaMemsetAsync(model->unit_grads[u], 0, (unit->end - unit->begin) * sizeof(float), model->stream));
}

// After the last work of a backward pass that adds to them: they are summed over all GPUs, beside what
// follows. Without stage 2 that can wait for the step's last micro-batch.
static void end_gradients(Model *model, int64_t offset) {
    const Zero *z = &model->zero;
    const int64_t u = zero_find_unit(z, offset);
    if (!model->gpus || (z->stage < 2 && !model->last_micro_batch)) return;
    gpus_fork(model->gpus, model->stream);
    gpus_reduce_unit(model->gpus, z, u, model->unit_grads[u]);
    if (z->stage < 2) return;
    int64_t begin, end;
    zero_partition(z, u, z->rank, &begin, &end);
    add_arrays(model->grads + z->units[u].shard_offset, model->unit_grads[u] + (begin - z->units[u].begin),
               end - begin, model->gpus->stream);
    cuda_check(cudaEventRecord(model->buffer_free[unit_buffer(model, u)], model->gpus->stream));
}
static void mark(Model *model, ProfilePart part) {
    profile_mark(model->profile, part, model->stream);
}

// The batch that the passes below work on; its arrays lie on the device.
static void model_take_batch(Model *model, const Batch *b) {
    model->batch = *b;
    if (model->config.attn == ATTN_NSA) return; // fsa_forward makes its own plan
    fsa_check(fsa_batch_layout(&model->plan, &model->config.fsa, b->n, b->keys, b->num_seqs, b->num_segments,
                       b->max_len, b->cu_seqlens, b->segments, model->plan_memory, model->stream));
}

// One of the products that read the normed input: q, k, v and the gate's logits. `norm` >= 0: RMSNorm of
// each of its heads follows (QK-norm).
typedef struct {
    int64_t weight, bias, norm; // offsets, -1: none
    int64_t width;
    int heads;
    attX *out, *dout;
    floatX *raw; // before the norm
    float *rstd;
} Projection;

// Fills p; returns how many there are. Keys and values come first: those of other GPUs are waited for
// longest.
static int layer_projections(const Model *model, int l, Projection *p) {
    const FsaConfig *f = &model->config.fsa;
    const LayerParams *w = &model->layers[l];
    const Activations *a = &model->acts[l];
    const int64_t C = model->config.channels, qd = f->q_heads * f->head_dim, kd = f->kv_heads * f->head_dim;
    const int64_t k_bias = w->bqkv < 0 ? -1 : w->bqkv + qd, v_bias = w->bqkv < 0 ? -1 : k_bias + kd;
    const int64_t k_weight = w->wqkv + qd * C, v_weight = k_weight + kd * C;
    p[0] = {k_weight, k_bias, w->knorm, kd, f->kv_heads, a->k, model->dk, a->k_raw, a->rstd_k};
    p[1] = {v_weight, v_bias, -1, kd, f->kv_heads, a->v, model->dv, NULL, NULL};
    p[2] = {w->wqkv, w->bqkv, w->qnorm, qd, f->q_heads, a->q, model->dq, a->q_raw, a->rstd_q};
    if (w->wgate < 0) return 3;
    p[3] = {w->wgate, -1, -1, gate_logits(f), 1, a->gate, model->dgate, NULL, NULL};
    return 4;
}

static void project(Model *model, const Activations *a, const Projection *p) {
    const ModelConfig *c = &model->config;
    const int64_t n = model->batch.n;
    floatX *result = att_converts ? model->wide : (floatX *)p->out;
    mark(model, PART_MATMUL);
    matmul_forward(&model->products, p->norm < 0 ? result : p->raw, p->width, a->ln1,
                   weight(model, p->weight), weight(model, p->bias), n, c->channels, p->width, model->stream);
    if (p->norm >= 0) {
        mark(model, PART_NORMS);
        rmsnorm_heads_forward(result, p->rstd, p->raw, p->width, weight(model, p->norm), n, p->heads,
                              c->fsa.head_dim, (float)c->norm_eps, model->stream);
    }
    if (att_converts) convert(p->out, result, n * p->width, model->stream);
}

// The compression's weights of head group i, in the attention's type.
static FsaPhiWeights layer_phi(Model *model, int l, int i) {
    const FsaConfig *f = &model->config.fsa;
    const LayerParams *w = &model->layers[l];
    if (w->phi_wk < 0) return {NULL, NULL, NULL};
    const int64_t rows = (int64_t)f->kv_heads / model->groups * f->cmp_len, d = f->head_dim;
    FsaPhiWeights phi = {weight(model, w->phi_wk + i * rows * d * d), weight(model, w->phi_pe + i * rows * d),
                         weight(model, w->phi_wv + i * rows * d * d)};
    if (!att_converts) return phi;
    convert(model->phi[0], (const floatX *)phi.wk, rows * d * d, model->stream);
    convert(model->phi[1], (const floatX *)phi.pe, rows * d, model->stream);
    convert(model->phi[2], (const floatX *)phi.wv, rows * d * d, model->stream);
    return {model->phi[0], model->phi[1], model->phi[2]};
}

// Whether other GPUs have some of the batch's keys.
static bool keys_are_shared(const Model *model) {
    return model->batch.keys > model->batch.n;
}

// Three buffers in turn: one holds head group i's gathered keys; in another, where the last group's keys
// were, their gradients are made; the third sends the last group's gradients away, then takes the next
// group's keys.
static int keys_buffer(int i) {
    return 2 * i % 3;
}
static int gradients_buffer(int i) {
    return (2 * i + 1) % 3;
}

// Starts to bring the keys and values, before RoPE, of head group i of layer l, if there is one, from all
// GPUs that share the batch; gpus_join lets the passes wait for them.
static void gather_keys(Model *model, int l, int i) {
    const Activations *a = &model->acts[l];
    const Batch *b = &model->batch;
    const int64_t stride = model->config.fsa.kv_heads * model->config.fsa.head_dim;
    const int64_t width = stride / model->groups;
    if (!keys_are_shared(model) || i == model->groups) return;
    gpus_fork(model->gpus, model->stream);
    gpus_all_gather_rows(model->gpus, model->keys[keys_buffer(i)], model->slots, a->k + i * width, b->keys, width,
                     stride, b->place, b->blocks);
    gpus_all_gather_rows(model->gpus, model->values[keys_buffer(i)], model->slots, a->v + i * width, b->keys,
                     width, stride, b->place, b->blocks);
}

// Head group i's columns of `all` [n, width]: copied to `room`, unless it is the only group.
static attX *group_columns(const Model *model, attX *all, attX *room, int64_t width, int i) {
    const int64_t mine = width / model->groups;
    if (model->groups == 1) return all;
    copy_columns(room, mine, all + i * mine, width, mine, model->batch.n, model->stream);
    return room;
}
// The way back, to `all`.
static void group_done(const Model *model, attX *all, const attX *part, int64_t width, int i) {
    const int64_t mine = width / model->groups;
    if (part == all) return;
    copy_columns(all + i * mine, width, part, mine, mine, model->batch.n, model->stream);
}

// The gate's logits for head group i.
static attX *group_gate(const Model *model, const Activations *a, int i) {
    const FsaConfig *f = &model->config.fsa;
    if (f->gate_per_token) return a->gate;
    return group_columns(model, a->gate, model->group_gate, gate_logits(f), i);
}

static void attention_forward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig group = group_config(model), *f = &group;
    const Activations *a = &model->acts[l];
    const int64_t qd = c->fsa.q_heads * f->head_dim, kd = c->fsa.kv_heads * f->head_dim;
    FsaDeviceBatch b = fsa_batch(&model->batch);
    mark(model, PART_ATTENTION_FORWARD);
    if (c->attn != ATTN_NSA)
        fsa_check(
            fsa_rope_queries(&c->fsa, &model->plan, att_dtype, a->q, model->inv_freq, a->q, model->stream));
    for (int i = 0; i < model->groups; i++) {
        attX *q = group_columns(model, a->q, model->group_q, qd, i);
        attX *o = model->groups == 1 ? a->o : model->group_o;
        char *saved = a->saved + i * model->saved_bytes;
        attX *k, *v;
        if (keys_are_shared(model)) {
            gpus_join(model->gpus, model->stream);
            gather_keys(model, l, i + 1);
            k = model->keys[keys_buffer(i)], v = model->values[keys_buffer(i)];
        } else {
            k = group_columns(model, a->k, model->keys[0], kd, i);
            v = group_columns(model, a->v, model->values[0], kd, i);
        }
        if (c->attn == ATTN_NSA) {
            FsaPhiWeights phi = layer_phi(model, l, i);
            fsa_check(fsa_forward(f, att_dtype, &b, q, k, v, &phi, model->inv_freq, group_gate(model, a, i),
                                  NULL, o, saved, model->scratch, model->scratch_bytes, model->stream));
            const int64_t chosen = f->kv_heads * model->batch.n * f->topk;
            if (model->choice)
                cuda_check(cudaMemcpyAsync(model->choice + l * chosen,
                                           fsa_saved_block_indices(f, att_dtype, &b, saved),
                                           chosen * sizeof(int32_t), cudaMemcpyDeviceToHost, model->stream));
        } else {
            FsaVisibility rule = c->attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW;
            fsa_check(fsa_rope_keys(f, &model->plan, att_dtype, k, model->inv_freq, k, model->stream));
            fsa_check(fsa_attention_forward(f, att_dtype, &b, rule, q, k, v, o, (float *)saved, model->scratch,
                                         model->scratch_bytes, model->stream));
        }
        group_done(model, a->o, o, qd, i);
    }
    if (att_converts) convert(a->att, a->o, model->batch.n * qd, model->stream);
}

// The norm at a layer's start.
static void layer_norm1(Model *model, int l) {
    const Activations *a = &model->acts[l];
    mark(model, PART_NORMS);
    rmsnorm_forward(a->ln1, a->rstd1, a->in, weight(model, model->layers[l].ln1), model->batch.n,
                    model->config.channels, (float)model->config.norm_eps, model->stream);
}

// From ln1 to the SwiGLU's output.
static void layer_body(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const LayerParams *w = &model->layers[l];
    const Activations *a = &model->acts[l];
    const int64_t n = model->batch.n, C = c->channels, H = c->hidden, qd = c->fsa.q_heads * c->fsa.head_dim;
    Projection p[4];
    int projections = layer_projections(model, l, p);
    for (int i = 0; i < projections; i++) {
        if (i == 2) gather_keys(model, l, 0);
        project(model, a, &p[i]);
    }
    attention_forward(model, l);
    mark(model, PART_MATMUL);
    matmul_forward(&model->products, model->branch, C, a->att, weight(model, w->wo), NULL, n, qd, C,
                   model->stream);
    mark(model, PART_NORMS);
    rmsnorm_residual_forward(a->ln2, a->mid, a->rstd2, a->in, model->branch, weight(model, w->ln2), n, (int)C,
                             (float)c->norm_eps, model->stream);
    mark(model, PART_MATMUL);
    matmul_forward(&model->products, a->gate_up, 2 * H, a->ln2, weight(model, w->wgu), NULL, n, C, 2 * H,
                   model->stream);
    mark(model, PART_NORMS);
    swiglu_forward(a->act, a->gate_up, n, H, model->stream);
}

// The batch at hand, up to the norm before the LM head.
static void model_forward(Model *model) {
    const ModelConfig *c = &model->config;
    const int64_t n = model->batch.n, C = c->channels;
    mark(model, PART_EMBEDDING);
    use_unit(model, model->wte);
    embedding_forward(model->acts[0].in, model->batch.tokens, weight(model, model->wte), n, (int)C,
                      model->stream);
    use_unit(model, model->layers[0].ln1);
    layer_norm1(model, 0);
    for (int l = 0; l < c->layers; l++) {
        const Activations *a = &model->acts[l], *next = l + 1 < c->layers ? a + 1 : NULL;
        layer_body(model, l);
        mark(model, PART_MATMUL);
        matmul_forward(&model->products, model->branch, C, a->act, weight(model, model->layers[l].wdown),
                       NULL, n, c->hidden, C, model->stream);
        mark(model, PART_NORMS);
        use_unit(model, next ? model->layers[l + 1].ln1 : model->lnf);
        rmsnorm_residual_forward(next ? next->ln1 : model->lnf_out, next ? next->in : model->out,
                                 next ? next->rstd1 : model->rstdf, a->mid, model->branch,
                                 weight(model, next ? model->layers[l + 1].ln1 : model->lnf), n, (int)C,
                                 (float)c->norm_eps, model->stream);
    }
}

// The LM head and the cross-entropy of the batch at hand, in chunks of tokens: the logits of all tokens never
// exist at once. With `training` their gradient is made of them in place, and at once goes into the head's
// gradient and into dnorm.
static void model_head(Model *model, int training) {
    const ModelConfig *c = &model->config;
    const Batch *b = &model->batch;
    const int64_t C = c->channels, V = c->vocab_size, Vp = c->padded_vocab;
    const floatX *head = weight(model, model->lm_head);
    mark(model, PART_CLASSIFIER);
    for (int64_t t = 0; t < b->n; t += model->head_rows) {
        const int64_t rows = std::min(model->head_rows, b->n - t);
        const floatX *x = model->lnf_out + t * C;
        matmul_forward(&model->products, model->logits, Vp, x, head, NULL, rows, C, Vp, model->stream);
        classifier(model->logits, model->losses + t, model->best + t, b->targets + t, training ? 1.0f : 0.0f,
                   rows, V, Vp, model->stream);
        if (!training) continue;
        matmul_backward_weight(&model->products, gradient(model, model->lm_head), NULL, model->logits, Vp, x,
                               rows, C, Vp, model->stream);
        matmul_backward_input(&model->products, model->dnorm + t * C, 0, model->logits, Vp, head, rows, C, Vp,
                              model->stream);
    }
}

// ---------------------------------------------------------------------------------------------------------
// The backward pass

static void project_backward(Model *model, const Activations *a, const Projection *p, int add) {
    const ModelConfig *c = &model->config;
    const int64_t n = model->batch.n;
    const floatX *dout = (const floatX *)p->dout;
    if (att_converts) {
        convert(model->wide, p->dout, n * p->width, model->stream);
        dout = model->wide;
    }
    if (p->norm >= 0) {
        mark(model, PART_NORMS);
        rmsnorm_heads_backward(model->draw, p->width, gradient(model, p->norm), dout, p->raw, p->width,
                               weight(model, p->norm), p->rstd, n, p->heads, c->fsa.head_dim, model->scratch,
                               model->stream);
        dout = model->draw;
    }
    mark(model, PART_MATMUL);
    matmul_backward_weight(&model->products, gradient(model, p->weight), gradient(model, p->bias), dout,
                           p->width, a->ln1, n, c->channels, p->width, model->stream);
    matmul_backward_input(&model->products, model->dnorm, add, dout, p->width, weight(model, p->weight), n,
                          c->channels, p->width, model->stream);
}

// Starts to bring what this GPU's queries add to the gradients of head group i's keys and values to the GPUs
// that they belong to, which sum it up in dk and dv; gpus_join lets the passes wait for them.
static void sum_key_gradients(Model *model, int i) {
    const Batch *b = &model->batch;
    const int64_t stride = model->config.fsa.kv_heads * model->config.fsa.head_dim;
    const int64_t width = stride / model->groups;
    if (!keys_are_shared(model) || i < 0) return;
    gpus_fork(model->gpus, model->stream);
    gpus_reduce_scatter_rows(model->gpus, model->dk + i * width, model->keys[gradients_buffer(i)], model->slots, b->keys,
                  width, stride, b->place, b->blocks);
    gpus_reduce_scatter_rows(model->gpus, model->dv + i * width, model->values[gradients_buffer(i)], model->slots,
                  b->keys, width, stride, b->place, b->blocks);
}

// datt -> dq, dk, dv and dgate, before RoPE; adds to the gradients of the compression's weights. What the
// queries here add to the gradients of other GPUs' keys is on its way to them at the end: wait with
// gpus_join before dk and dv are read.
static void attention_backward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const FsaConfig group = group_config(model), *f = &group;
    const LayerParams *w = &model->layers[l];
    const Activations *a = &model->acts[l];
    const int64_t n = model->batch.n, qd = c->fsa.q_heads * f->head_dim, gates = gate_logits(&c->fsa);
    const bool shared = keys_are_shared(model);
    attX *k = a->k, *v = a->v, *dk = model->dk, *dv = model->dv;
    FsaDeviceBatch b = fsa_batch(&model->batch);
    mark(model, PART_ATTENTION_BACKWARD);
    if (att_converts) convert(model->dout, model->datt, n * qd, model->stream);
    for (int i = 0; i < model->groups; i++) {
        attX *dout = group_columns(model, model->dout, model->group_dout, qd, i);
        attX *dq = model->groups == 1 ? model->dq : model->group_dq;
        char *saved = a->saved + i * model->saved_bytes;
        if (shared) {
            gpus_join(model->gpus, model->stream);
            sum_key_gradients(model, i - 1);
            gather_keys(model, l, i + 1);
            k = model->keys[keys_buffer(i)], v = model->values[keys_buffer(i)];
            dk = model->keys[gradients_buffer(i)], dv = model->values[gradients_buffer(i)];
        }
        if (c->attn == ATTN_NSA) {
            FsaPhiWeights phi = layer_phi(model, l, i);
            const int64_t rows = (int64_t)f->kv_heads * f->cmp_len, d = f->head_dim;
            FsaPhiGradients dphi = {NULL, NULL, NULL};
            if (w->phi_wk >= 0)
                dphi = {gradient(model, w->phi_wk + i * rows * d * d),
                        gradient(model, w->phi_pe + i * rows * d),
                        gradient(model, w->phi_wv + i * rows * d * d)};
            attX *gate = group_gate(model, a, i);
            attX *dgate = model->groups == 1 ? model->dgate : model->group_dgate;
            if (f->gate_per_token) dgate += i * gate_part(n);
            fsa_check(fsa_backward(f, att_dtype, &b, k, v, &phi, model->inv_freq, gate, dout, saved, dq, dk,
                                   dv, &dphi, dgate, model->scratch, model->scratch_bytes, model->stream));
            if (!f->gate_per_token) group_done(model, model->dgate, dgate, gates, i);
        } else {
            FsaVisibility rule = c->attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW;
            attX *q = group_columns(model, a->q, model->group_q, qd, i);
            attX *o = group_columns(model, a->o, model->group_o, qd, i);
            if (shared)
                fsa_check(fsa_rope_keys(f, &model->plan, att_dtype, k, model->inv_freq, k, model->stream));
            fsa_check(fsa_attention_backward(f, att_dtype, &b, rule, q, k, v, o, (float *)saved, dout, dq, dk,
                                          dv, model->scratch, model->scratch_bytes, model->stream));
            fsa_check(
                fsa_rope_queries(f, &model->plan, att_dtype, dq, model->inv_freq_back, dq, model->stream));
            fsa_check(fsa_rope_keys(f, &model->plan, att_dtype, dk, model->inv_freq_back, dk, model->stream));
        }
        group_done(model, model->dq, dq, qd, i);
    }
    sum_key_gradients(model, model->groups - 1);
    if (f->gate_per_token && model->groups > 1)
        sum_parts(model->dgate, model->group_dgate, model->groups, gate_part(n), 1, 1, model->stream);
}

// dres [n, C] is the gradient of the layer's output, and becomes that of its input. Gradients are written
// over what is no longer needed: act holds its own gradient in the end, gate_up too.
static void layer_backward(Model *model, int l) {
    const ModelConfig *c = &model->config;
    const LayerParams *w = &model->layers[l];
    const Activations *a = &model->acts[l];
    const int64_t n = model->batch.n, C = c->channels, H = c->hidden, qd = c->fsa.q_heads * c->fsa.head_dim;
    cudaStream_t stream = model->stream;
    if (model->recompute == 2) {
        layer_norm1(model, l);
        layer_body(model, l);
    }
    gather_keys(model, l, 0);
    if (model->recompute == 1) {
        mark(model, PART_NORMS);
        swiglu_forward(a->act, a->gate_up, n, H, stream);
        rmsnorm_forward(a->ln2, a->rstd2, a->mid, weight(model, w->ln2), n, (int)C, (float)c->norm_eps,
                        stream);
    }
    mark(model, PART_MATMUL);
    matmul_backward_weight(&model->products, gradient(model, w->wdown), NULL, model->dres, C, a->act, n, H, C,
                           stream);
    matmul_backward_input(&model->products, a->act, 0, model->dres, C, weight(model, w->wdown), n, H, C,
                          stream);
    mark(model, PART_NORMS);
    swiglu_backward(a->gate_up, a->act, a->gate_up, n, H, stream);
    mark(model, PART_MATMUL);
    matmul_backward_weight(&model->products, gradient(model, w->wgu), NULL, a->gate_up, 2 * H, a->ln2, n, C,
                           2 * H, stream);
    matmul_backward_input(&model->products, model->dnorm, 0, a->gate_up, 2 * H, weight(model, w->wgu), n, C,
                          2 * H, stream);
    mark(model, PART_NORMS);
    rmsnorm_backward(model->dres, 1, gradient(model, w->ln2), model->dnorm, a->mid, weight(model, w->ln2),
                     a->rstd2, n, (int)C, model->scratch, stream);
    mark(model, PART_MATMUL);
    matmul_backward_weight(&model->products, gradient(model, w->wo), NULL, model->dres, C, a->att, n, qd, C,
                           stream);
    matmul_backward_input(&model->products, model->datt, 0, model->dres, C, weight(model, w->wo), n, qd, C,
                          stream);
    attention_backward(model, l);
    if (model->recompute == 1) layer_norm1(model, l);
    Projection p[4];
    int projections = layer_projections(model, l, p);
    for (int i = 0; i < projections; i++) { // keys and values last
        if (i == projections - 2 && keys_are_shared(model)) gpus_join(model->gpus, stream);
        project_backward(model, a, &p[(i + 2) % projections], i > 0);
    }
    mark(model, PART_NORMS);
    rmsnorm_backward(model->dres, 1, gradient(model, w->ln1), model->dnorm, a->in, weight(model, w->ln1),
                     a->rstd1, n, (int)C, model->scratch, stream);
}

// Adds to grads the gradient of the sum of the batch's token losses, and that sum to result->loss_sum.
static void model_train(Model *model, const Batch *b) {
    const ModelConfig *c = &model->config;
    model_take_batch(model, b);
    model_forward(model);
    begin_gradients(model, model->lnf);
    if (c->tied) begin_gradients(model, model->wte);
    model_head(model, 1);
    loss_sum(&model->result->loss_sum, model->losses, b->n, model->stream);
    mark(model, PART_NORMS);
    rmsnorm_backward(model->dres, 0, gradient(model, model->lnf), model->dnorm, model->out,
                     weight(model, model->lnf), model->rstdf, b->n, c->channels, model->scratch,
                     model->stream);
    end_gradients(model, model->lnf);
    for (int l = c->layers - 1; l >= 0; l--) {
        begin_gradients(model, model->layers[l].ln1);
        layer_backward(model, l);
        end_gradients(model, model->layers[l].ln1);
    }
    mark(model, PART_EMBEDDING);
    if (!c->tied) begin_gradients(model, model->wte);
    embedding_backward(gradient(model, model->wte), b->tokens, model->dres, b->n, c->channels,
                       c->padded_vocab, model->scratch, model->stream);
    end_gradients(model, model->wte);
}

// After model_update, which waits for the transfers that touch gradients: weights may still be gathered.
static void model_zero_grad(Model *model) {
    const int64_t count = model->zero.stage == 2 ? model->zero.shard_size : model->num_params;
    mark(model, PART_OPTIMIZER);
    cuda_check(cudaMemsetAsync(model->grads, 0, count * sizeof(float), model->stream));
    cuda_check(cudaMemsetAsync(model->result, 0, sizeof(StepResult), model->stream));
}

// AdamW over the gradient of the mean loss over `tokens` tokens, clipped to the norm `clip` (0: not).
// Nothing changes where the loss or the norm is not finite. step counts from 1.
static void model_update(Model *model, const Options *o, int64_t step, double lr, int64_t tokens) {
    StepResult *r = model->result;
    const Zero *z = &model->zero;
    int64_t begin, end;
    mark(model, PART_OPTIMIZER);
    cuda_check(
        cudaMemcpyAsync(&r->stop, model->stop_host, sizeof r->stop, cudaMemcpyHostToDevice, model->stream));
    cuda_check(cudaMemsetAsync(&r->squares, 0, sizeof r->squares, model->stream));
    if (model->gpus) gpus_join(model->gpus, model->stream); // for the gradients' sums
    for (int64_t u = 0; u < z->num_units; u++) {
        zero_partition(z, u, z->rank, &begin, &end);
        sum_of_squares(&r->squares, model->grads + (z->stage == 2 ? z->units[u].shard_offset : begin), end - begin,
                       model->scratch, model->stream);
    }
    if (model->gpus) {
        gpus_fork(model->gpus, model->stream);
        gpus_all_reduce(model->gpus, &r->loss_sum, STEP_SUMS);
        gpus_join(model->gpus, model->stream);
    }
    global_norm(r->norm, &r->squares, (float)(1.0 / (double)tokens), (float)o->clip, model->stream);
    loss_guard(r, model->stream);
    for (int64_t u = 0; u < z->num_units; u++) {
        const int64_t shard = z->units[u].shard_offset, first = model->first_range[u];
        zero_owned(z, u, z->rank, &begin, &end);
        adamw(model->params + begin, model->master + shard, model->m + shard, model->v + shard,
              model->grads + (z->stage == 2 ? shard : begin), end - begin, model->device_ranges + first,
              (int)(model->first_range[u + 1] - first), lr, o->beta1, o->beta2, o->eps, o->weight_decay, step,
              r->norm, model->stream);
        if (z->stage > 0) gather_weights(model, u);
    }
    cuda_check(cudaMemcpyAsync(model->result_host, r, sizeof *r, cudaMemcpyDeviceToHost, model->stream));
    mark(model, PART_END);
    cuda_check(cudaEventRecord(model->step_done, model->stream));
}

// ---------------------------------------------------------------------------------------------------------
// Validation and sampling: batches that the host waits for

// Losses and arg maxes of the batch in r.
static void evaluate(void *where, const Run *r, const float **losses, const int32_t **best) {
    Model *model = (Model *)where;
    Batch host = batch_fill(&model->config, model->gpus, r->inputs, r->targets, r->cu_seqlens, r->num_seqs,
                            model->eval_memory_host);
    Batch b = batch_place(&host, model->eval_memory);
    const int64_t bytes = b.n * (int64_t)sizeof(float); // of either result
    const void *results[2] = {model->losses, model->best};
    void *gathered[2] = {model->keys[0], model->values[0]}, *to[2] = {model->losses_host, model->best_host};
    cuda_check(cudaMemcpyAsync(model->eval_memory, model->eval_memory_host, batch_bytes(&b),
                               cudaMemcpyHostToDevice, model->stream));
    model_take_batch(model, &b);
    model_forward(model);
    model_head(model, 0);
    mark(model, PART_END);
    if (keys_are_shared(model)) {
        gpus_fork(model->gpus, model->stream);
        for (int i = 0; i < 2; i++) gpus_all_gather(model->gpus, gathered[i], results[i], bytes);
        gpus_join(model->gpus, model->stream);
    }
    for (int i = 0; i < 2; i++) {
        const void *from = keys_are_shared(model) ? gathered[i] : results[i];
        cuda_check(
            cudaMemcpyAsync(to[i], from, bytes * (b.keys / b.n), cudaMemcpyDeviceToHost, model->stream));
    }
    cuda_check(cudaStreamSynchronize(model->stream));
    for (int i = 0; i < 2 && keys_are_shared(model); i++) { // in the order of GPUs
        std::vector<int32_t> slots((int32_t *)to[i], (int32_t *)to[i] + b.keys);
        cp_scatter_rows(b.keys, b.blocks, host.place, to[i], slots.data(), sizeof(int32_t));
    }
    *losses = model->losses_host;
    *best = model->best_host;
}

// Validates, and writes what the last batch's queries chose.
static void validate_choice(Run *r, Model *model, const char *path) {
    const FsaConfig *f = &r->config.fsa;
    ChoiceHeader h = {"", r->config.layers, f->q_heads, f->kv_heads, 0, f->topk, f->block, 0};
    memcpy(h.magic, choice_magic, sizeof h.magic);
    if (r->config.attn != ATTN_NSA) die("-choice %s: only -attn nsa chooses blocks", path);
    if (r->comm.ranks > 1) die("-choice %s: %d processes, only one can write it", path, r->comm.ranks);
    h.num_queries = r->opt.batch * r->opt.seq_len;
    model->choice = (int32_t *)xmalloc(choice_size(&h) * sizeof(int32_t));
    run_validate(r, evaluate, model);
    h.num_seqs = r->num_seqs;
    std::vector<int64_t> lengths(h.num_seqs);
    for (int64_t i = 0; i < h.num_seqs; i++) lengths[i] = r->cu_seqlens[i + 1] - r->cu_seqlens[i];
    choice_write(path, &h, lengths.data(), model->choice);
    free(model->choice);
    model->choice = NULL;
}

// Logits of the token after tokens [n]. The sequence is filled up to a multiple of 128 tokens, which no
// earlier token sees: few shapes, so few choices of algorithms for the products.
static const float *next_logits(void *where, const int32_t *tokens, int64_t n) {
    Model *model = (Model *)where;
    const ModelConfig *c = &model->config;
    const int64_t C = c->channels, Vp = c->padded_vocab;
    const int64_t length = std::min(model->max_tokens, (n + 127) / 128 * 128);
    const int64_t cu_seqlens[2] = {0, length};
    std::vector<int32_t> filled(length);
    std::copy(tokens, tokens + n, filled.begin());
    Batch host = batch_fill(c, NULL, filled.data(), filled.data(), cu_seqlens, 1, model->eval_memory_host);
    Batch b = batch_place(&host, model->eval_memory);
    cuda_check(cudaMemcpyAsync(model->eval_memory, model->eval_memory_host, batch_bytes(&b),
                               cudaMemcpyHostToDevice, model->stream));
    model_take_batch(model, &b);
    model_forward(model);
    matmul_forward(&model->products, model->logits, Vp, model->lnf_out + (n - 1) * C,
                   weight(model, model->lm_head), NULL, 1, C, Vp, model->stream);
    cuda_check(cudaMemcpyAsync(model->logits_host, model->logits, Vp * sizeof(floatX), cudaMemcpyDeviceToHost,
                               model->stream));
    cuda_check(cudaStreamSynchronize(model->stream));
    for (int i = 0; i < c->vocab_size; i++) model->sample_logits[i] = (float)model->logits_host[i];
    return model->sample_logits;
}

// ---------------------------------------------------------------------------------------------------------
// Training batches: a thread reads ahead and copies to the GPU on a stream of its own

typedef struct {
    char *host, *device;         // a batch each; host memory is pinned
    Batch batch;                 // on the device
    double flops;                // of a training step on it
    int64_t epoch, position;     // of the training data after it
    cudaEvent_t copied, trained; // the copy is done; the passes over it are
    int full;                    // 1: to be trained on
} FeedSlot;

typedef struct {
    Run *run;
    const Gpus *gpus;
    int device;
    FeedSlot slots[2];
    int64_t taken; // batches
    int stop;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t change;
    cudaStream_t stream;
} Feed;

// The next batch of the training data, or, for -profile, of random tokens.
static void feed_fill(Feed *feed, FeedSlot *slot, int64_t number, int32_t *tokens, int64_t *cu_seqlens) {
    Run *r = feed->run;
    DataLoader *l = &r->train;
    const Options *o = &r->opt;
    const int64_t n = o->batch * o->seq_len, first = 2 * n * (number * r->groups + r->group);
    if (o->profile_steps) {
        for (int64_t i = 0; i < 2 * n; i++)
            tokens[i] = (int32_t)(rng_u64_at((uint64_t)o->seed, first + i) % r->config.vocab_size);
    } else {
        if (o->overfit && number % r->micro_batches == 0) loader_seek(l, 0, 0);
        loader_next(l, tokens, tokens + n);
    }
    int64_t num_seqs = doc_boundaries(tokens, o->batch, o->seq_len, o->profile_steps ? -1 : r->eot,
                                      (int)o->doc_mask, cu_seqlens);
    Batch b = batch_fill(&r->config, feed->gpus, tokens, tokens + n, cu_seqlens, num_seqs, slot->host);
    slot->batch = batch_place(&b, slot->device);
    slot->flops = 0;
    for (int64_t s = 0; s < num_seqs; s++)
        slot->flops += model_flops(&r->config, cu_seqlens[s + 1] - cu_seqlens[s]) * r->groups;
    slot->epoch = l->epoch;
    slot->position = l->position;
}

static void *feed_thread(void *where) {
    Feed *feed = (Feed *)where;
    const Options *o = &feed->run->opt;
    int64_t *cu_seqlens = (int64_t *)xmalloc((o->batch * o->seq_len + 1) * sizeof(int64_t));
    int32_t *tokens = (int32_t *)xmalloc(2 * o->batch * o->seq_len * sizeof(int32_t)); // then targets
    cuda_check(cudaSetDevice(feed->device));
    for (int64_t number = 0;; number++) {
        FeedSlot *slot = &feed->slots[number % 2];
        pthread_mutex_lock(&feed->lock);
        while (slot->full && !feed->stop) pthread_cond_wait(&feed->change, &feed->lock);
        int stop = feed->stop;
        pthread_mutex_unlock(&feed->lock);
        if (stop) break;
        cuda_check(cudaEventSynchronize(slot->copied)); // of its last batch, long ago
        feed_fill(feed, slot, number, tokens, cu_seqlens);
        cuda_check(cudaStreamWaitEvent(feed->stream, slot->trained, 0));
        cuda_check(cudaMemcpyAsync(slot->device, slot->host, batch_bytes(&slot->batch),
                                   cudaMemcpyHostToDevice, feed->stream));
        cuda_check(cudaEventRecord(slot->copied, feed->stream));
        pthread_mutex_lock(&feed->lock);
        slot->full = 1;
        pthread_cond_broadcast(&feed->change);
        pthread_mutex_unlock(&feed->lock);
    }
    free(cu_seqlens), free(tokens);
    return NULL;
}

static void feed_start(Feed *feed, Run *r, const Model *model) {
    memset(feed, 0, sizeof *feed);
    feed->run = r;
    feed->gpus = model->gpus;
    cuda_check(cudaGetDevice(&feed->device));
    const Batch most = batch_most(model);
    for (int i = 0; i < 2; i++) {
        FeedSlot *slot = &feed->slots[i];
        slot->device = model->feed_memory[i];
        cuda_check(cudaMallocHost((void **)&slot->host, batch_bytes(&most)));
        cuda_check(cudaEventCreateWithFlags(&slot->copied, cudaEventDisableTiming | cudaEventBlockingSync));
        cuda_check(cudaEventCreateWithFlags(&slot->trained, cudaEventDisableTiming));
    }
    cuda_check(cudaStreamCreateWithFlags(&feed->stream, cudaStreamNonBlocking));
    pthread_mutex_init(&feed->lock, NULL);
    pthread_cond_init(&feed->change, NULL);
    int error = pthread_create(&feed->thread, NULL, feed_thread, feed);
    if (error) die("cannot start the thread that reads data: %s", strerror(error));
}

// The next batch, ready for work on `stream`; feed_release gives its slot back.
static FeedSlot *feed_next(Feed *feed, cudaStream_t stream) {
    FeedSlot *slot = &feed->slots[feed->taken++ % 2];
    pthread_mutex_lock(&feed->lock);
    while (!slot->full) pthread_cond_wait(&feed->change, &feed->lock);
    pthread_mutex_unlock(&feed->lock);
    cuda_check(cudaStreamWaitEvent(stream, slot->copied, 0));
    return slot;
}

static void feed_release(Feed *feed, FeedSlot *slot, cudaStream_t stream) {
    cuda_check(cudaEventRecord(slot->trained, stream));
    pthread_mutex_lock(&feed->lock);
    slot->full = 0;
    pthread_cond_broadcast(&feed->change);
    pthread_mutex_unlock(&feed->lock);
}

static void feed_stop(Feed *feed) {
    pthread_mutex_lock(&feed->lock);
    feed->stop = 1;
    pthread_cond_broadcast(&feed->change);
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
    pthread_cond_destroy(&feed->change);
}

// ---------------------------------------------------------------------------------------------------------
// The program

#ifndef GPT_NO_MAIN

// The GPU of this process, the local_rank-th of its host: dies where this program cannot run on it.
static cudaDeviceProp gpu_start(int local_rank) {
    int count = 0, driver = 0, runtime = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver) {
        cuda_check(cudaDriverGetVersion(&driver));
        cuda_check(cudaRuntimeGetVersion(&runtime));
        if (driver == 0) die("no NVIDIA driver found; train_gpt_nsa_cpu trains without a GPU");
        die("the NVIDIA driver is for CUDA %d.%d and this program for CUDA %d.%d: update the "
            "driver, or build with the older toolkit",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    }
    if (error != cudaSuccess || count == 0)
        die("no NVIDIA GPU found (%s); train_gpt_nsa_cpu trains without one", cudaGetErrorString(error));
    // a launcher may show each process its own GPU alone
    int device = count > 1 ? local_rank : 0;
    if (device >= count)
        die("process %d of this host, but it has %d GPUs: start no more processes than that", local_rank + 1,
            count);
    cuda_check(cudaSetDevice(device));
    cudaDeviceProp gpu;
    cuda_check(cudaGetDeviceProperties(&gpu, device));
    if (gpu.major < 8)
        die("%s: compute capability %d.%d, at least 8.0 is needed (A100, RTX 30 and later)", gpu.name,
            gpu.major, gpu.minor);
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, (const void *)loss_guard_kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
        die("%s: this program was built for other GPUs than compute capability %d.%d; build it "
            "on this machine with make",
            gpu.name, gpu.major, gpu.minor);
    cuda_check(error);
    return gpu;
}

// Array a (0 fp32 weights, 1 m, 2 v) from `begin` to `end` into `to`, on every process: unit by unit,
// gathered where gradients are made, which nothing uses between steps.
static void gather_array(Model *model, int a, int64_t begin, int64_t end, float *to) {
    const Zero *z = &model->zero;
    float *const arrays[3] = {model->master, model->m, model->v};
    for (int64_t u = 0; u < z->num_units; u++) {
        const ZeroUnit *unit = &z->units[u];
        float *from = arrays[a] + unit->shard_offset;
        if (z->stage > 0) {
            int64_t first, last;
            zero_owned(z, u, z->rank, &first, &last);
            from = model->unit_grads[u];
            cuda_check(cudaMemcpyAsync(from + (first - unit->begin), arrays[a] + unit->shard_offset,
                                       (last - first) * sizeof(float), cudaMemcpyDeviceToDevice,
                                       model->stream));
            gpus_fork(model->gpus, model->stream);
            gpus_all_gather_unit(model->gpus, z, u, from, sizeof(float));
            gpus_join(model->gpus, model->stream);
        }
        const int64_t first = std::max(begin, unit->begin), last = std::min(end, unit->end);
        if (first < last)
            cuda_check(cudaMemcpyAsync(to + (first - begin), from + (first - unit->begin),
                                       (last - first) * sizeof(float), cudaMemcpyDeviceToHost,
                                       model->stream));
    }
    cuda_check(cudaStreamSynchronize(model->stream));
}

// Writes a checkpoint, the same file as the C trainer's whatever the number of processes: each writes a part.
static void save(Run *r, Model *model) {
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
            comm->rank > 0 ? "; the folder -o must be one that all hosts share" : "");
    float *part = (float *)xmalloc((end - begin) * sizeof(float));
    for (int a = 0; a < 3; a++) {
        gather_array(model, a, begin, end, part);
        checkpoint_write_part(fd, path, a, count, begin, end - begin, part);
    }
    free(part);
    if (fsync(fd) != 0 || close(fd) != 0)
        die("cannot write %s: %s (is the disk full?)", path, strerror(errno));
    comm_barrier(comm);
    if (comm->rank > 0) return;
    atomic_commit(&file);
    checkpoint_prune(r->opt.output, r->opt.keep, r->state.step);
}

// Parameters, and AdamW's state where the run goes on: from the checkpoint, or new. Each process reads what
// it owns.
static void load(const Run *r, Model *model) {
    const Zero *z = &model->zero;
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
                die("%s", why);
        }
        set_unit(model, u, arrays[0].data(), r->resuming ? arrays[1].data() : NULL,
                 r->resuming ? arrays[2].data() : NULL);
    }
    if (file) fclose(file);
}

// One step of AdamW over the step's micro-batches; fills everything of `line` but its times. Returns the
// step's arithmetic.
static double train_step(Run *r, Model *model, Feed *feed, TrainLine *line) {
    const Options *o = &r->opt;
    double flops = 0;
    int64_t epoch = 0, position = 0;
    model_zero_grad(model);
    for (int64_t i = 0; i < r->micro_batches; i++) {
        FeedSlot *slot = feed_next(feed, model->stream);
        model->last_micro_batch = i == r->micro_batches - 1;
        model_train(model, &slot->batch);
        flops += slot->flops, epoch = slot->epoch, position = slot->position;
        feed_release(feed, slot, model->stream);
    }
    line->lr = learning_rate(r->state.step, o->lr, o->warmup, o->max_steps, o->final_frac);
    *model->stop_host = run_signal != 0;
    model_update(model, o, r->state.step + 1, line->lr, r->state.total_batch);
    cuda_check(cudaEventSynchronize(model->step_done));
    line->loss = model->result_host->loss_sum / (double)r->state.total_batch;
    line->norm = model->result_host->norm[0];
    run_step_is_good(r, line->loss, line->norm);
    line->step = run_step_done(r, epoch, position);
    if (model->result_host->stop > 0) run_agree_to_stop(r);
    return flops;
}

static void train(Run *r, Model *model, double peak) {
    const Options *o = &r->opt;
    Feed feed;
    run_catch_signals();
    if (r->resuming && r->state.step < o->max_steps) {
        printf("going on after step %lld of %lld\n", (long long)r->state.step, (long long)o->max_steps);
    } else if (r->resuming) {
        printf("all %lld steps are done; -x with more than %lld goes on\n", (long long)o->max_steps,
               (long long)r->state.step);
    }
    feed_start(&feed, r, model);
    int64_t first = r->state.step;
    double seconds = 0; // in steps
    for (int fresh = 1;; fresh = 0) {
        Cadence due = cadence_at(o, r->state.step);
        if (due.save && !fresh) save(r, model);
        if (due.validate) run_validate(r, evaluate, model);
        if (due.sample && r->comm.rank == 0) run_sample(r, next_logits, model);
        if (r->state.step >= o->max_steps || run_stops(r)) break;
        TrainLine line;
        memset(&line, 0, sizeof line);
        double start = now_seconds();
        double flops = train_step(r, model, &feed, &line);
        double took = now_seconds() - start;
        seconds += took;
        line.ms = took * 1e3;
        line.tokens_per_second = (double)r->state.total_batch / took;
        line.mfu = peak > 0 ? flops / took / (peak * 1e12) : 0;
        line.memory_bytes = (int64_t)model_bytes(model);
        logger_train(&r->log, &line, o->max_steps,
                     eta_seconds(seconds, r->state.step - first, o->max_steps - r->state.step));
    }
    if (run_stops(r)) {
        if (o->output) save(r, model);
        printf("stopped by signal %d after step %lld%s\n", (int)run_signal, (long long)r->state.step,
               o->output ? "; -y 1 goes on from here" : "");
    }
    feed_stop(&feed);
}

// ---- -profile: where a step's time goes

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

// Prints the median milliseconds of the parts of a step (or of a forward pass), `ms` [runs][PART_END], and
// appends them to dev/results.
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

// Times -profile forward passes of a micro-batch and as many steps, after two of each, on random tokens.
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
            TrainLine line;
            if (step) {
                flops = train_step(r, model, &feed, &line);
            } else {
                FeedSlot *slot = feed_next(&feed, model->stream);
                flops = slot->flops / 3; // the backward pass is twice the forward pass
                model_take_batch(model, &slot->batch);
                model_forward(model);
                model_head(model, 0);
                mark(model, PART_END);
                feed_release(&feed, slot, model->stream);
            }
            profile_collect(&measure, parts.data(), model->stream);
            if (i >= 2) ms.push_back(parts);
        }
        int64_t tokens = step ? r->state.total_batch : o->batch * o->seq_len * r->groups;
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
    cudaDeviceProp gpu = gpu_start(comm->local_rank);
    int training = !o->sample_only && !o->val_only;
    double peak = o->peak_tflops;
    if (peak == 0 && !att_converts) peak = peak_tflops(gpu.name); // the table is of 16-bit products
    gpus_init(&gpus, &run.comm, (int)o->context);
    model_build(&model, &run.config, o->batch * o->seq_len, training, (int)o->recompute, &gpus, (int)o->zero);
    run.sample_len = std::min(run.sample_len, model.max_tokens); // one process samples
    load(&run, &model);
    size_t free_bytes, total;
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    printf("gpu: %s, %d multiprocessors, %zu MiB, %s", gpu.name, gpu.multiProcessorCount, total >> 20,
           FLOATX_NAME);
    if (peak > 0) printf(", peak %.0f TFLOP/s", peak);
    printf("\n");
    if (comm->ranks > 1)
        printf("processes: %d, a GPU each, in %d groups of %d; ZeRO stage %d; memory is each GPU's\n",
               comm->ranks, run.groups, gpus.cp_size, model.zero.stage);
    if (gpus.cp_size > 1)
        printf("context parallel: keys and values of %d of the %d kv heads are gathered at a time\n",
               group_config(&model).kv_heads, run.config.fsa.kv_heads);
    peak *= comm->ranks;
    run_print(&run, model.num_params, model_bytes(&model));
    for (int i = 0; i < ARENAS; i++)
        if (model.arenas[i].bytes > 0)
            printf("  %-12s %8zu MiB\n", arena_names[i], (model.arenas[i].bytes + (1 << 20) - 1) >> 20);
    fflush(stdout);
    if (o->sample_only && comm->rank == 0) run_sample(&run, next_logits, &model);
    if (o->choice)
        validate_choice(&run, &model, o->choice);
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
