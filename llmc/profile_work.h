// profile_work.h: the work of each part of a pass on one GPU, for -profile: the FLOPs of parts that the
// tensor cores limit, the bytes of those that the memory limits. Bytes are those that each kernel must read
// and write.
#ifndef LLMC_PROFILE_WORK_H
#define LLMC_PROFILE_WORK_H
#include "mfu.h"

typedef enum {
    PART_MATMUL,            // of the layers, forward and backward
    PART_QUANTIZE,          // to e4m3, in kernels of their own
    PART_ATTENTION_FORWARD, // fsa_forward or the dense attention, and RoPE
    PART_ATTENTION_BACKWARD,
    PART_NORMS, // RMSNorm, SwiGLU
    PART_EMBEDDING,
    PART_CLASSIFIER, // LM head and cross-entropy
    PART_OPTIMIZER,  // the gradient norm, and waiting for AdamW, which runs beside the forward pass
    PART_END,        // ends the last part
} ProfilePart;

static const char *const part_names[PART_END] = {
    "matmul", "quantize",  "attention_forward", "attention_backward",
    "norms",  "embedding", "classifier",        "optimizer"};

typedef enum { LIMIT_MATMUL_16, LIMIT_MATMUL_8, LIMIT_MEMORY, LIMITS } Limit;

typedef struct {
    Limit limit;
    double amount; // FLOPs, or bytes with LIMIT_MEMORY; 0: not counted
} PartWork;

// A pass on one GPU, whose work profile_work counts.
typedef struct {
    int step;                   // 1: a training step, 0: a forward pass
    int fp8, recompute;         // of the flags -matmul and -r
    int64_t sequences, seq_len; // of a micro-batch; `share` GPUs share them (-cp)
    int share;
    int64_t micro_batches;
} PassWork;

// Fills work [PART_END].
static inline void profile_work(const ModelConfig *c, const PassWork *p, PartWork *work) {
    const FsaConfig *f = &c->fsa;
    const double C = c->channels, H = c->hidden, q = (double)f->q_heads * f->head_dim;
    const double qkv = q + 2.0 * f->kv_heads * f->head_dim;
    const double weights = qkv * C + q * C + 3 * C * H; // of a layer, without its gate
    const double n = (double)(p->sequences * p->seq_len) / p->share,
                 micro_batches = p->step ? (double)p->micro_batches : 1;
    const double layers = c->layers * micro_batches; // layer passes
    const int again = p->step && p->recompute == 2;  // layers run twice, up to wdown
    const LayersWork all = layers_work(c, p->seq_len);
    const double sequences = (double)p->sequences / p->share * micro_batches;
    memset(work, 0, PART_END * sizeof *work);

    work[PART_MATMUL].limit = p->fp8 ? LIMIT_MATMUL_8 : LIMIT_MATMUL_16;
    work[PART_MATMUL].amount = 2 * n * (weights * layers + all.gates * C * micro_batches) * (p->step ? 3 : 1);
    if (again) // all but wdown
        work[PART_MATMUL].amount += 2 * n * ((weights - C * H) * layers + all.gates * C * micro_batches);
    work[PART_CLASSIFIER].limit = LIMIT_MATMUL_16;
    work[PART_CLASSIFIER].amount = 2 * n * C * c->padded_vocab * micro_batches * (p->step ? 3 : 1);
    work[PART_ATTENTION_FORWARD].limit = work[PART_ATTENTION_BACKWARD].limit = LIMIT_MATMUL_16;
    work[PART_ATTENTION_FORWARD].amount = sequences * all.forward * (1 + again);
    work[PART_ATTENTION_BACKWARD].amount = p->step ? sequences * all.backward : 0;

    // attention output by rows; in a step the weights once, and for each weight gradient the rows of dqkv and
    // both operands transposed, which are read twice
    work[PART_QUANTIZE].limit = LIMIT_MEMORY;
    if (p->fp8) {
        const double operands = (qkv + C) + (C + q) + (2 * H + C) + (C + H);
        work[PART_QUANTIZE].amount = 3 * n * q * layers * (1 + (p->step && p->recompute > 0));
        if (p->step)
            work[PART_QUANTIZE].amount += (3 * n * qkv + 3 * n * operands) * layers + 6 * weights * c->layers;
    }
    // Bytes per token: RMSNorm 4C twice, SwiGLU 6H; backward 8C twice and 10H. -r 1 and -r 2 compute both
    // norms and SwiGLU again. With fp8 the second norm and SwiGLU write one byte instead of two. The first
    // norm and the backward passes of both norms write e4m3 and 16 bits.
    const double fp8 = p->fp8 ? 1 : 0, swiglu = (6 - fp8) * H;
    double norms = 8 * C + swiglu;
    if (p->step) norms += 16 * C + 2 * C * fp8 + (10 - 2 * fp8) * H;
    if (p->step && p->recompute) norms += 8 * C + swiglu;
    work[PART_NORMS].limit = LIMIT_MEMORY;
    work[PART_NORMS].amount = n * norms * layers;
}
#endif
