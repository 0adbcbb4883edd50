// train_gpt_nsa.h: the model of train_gpt_nsa.c for other programs: tests, and the GPU trainer's
// comparison. Compile train_gpt_nsa.c with -DGPT_NO_MAIN and link it; with -DGPT_DOUBLE as well, all
// of it is in double.
#ifndef TRAIN_GPT_NSA_H
#define TRAIN_GPT_NSA_H
#include "llmc/utils.h"
#include "llmc/config.h"
#include "fsa/reference.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifdef GPT_DOUBLE
typedef double real;
#define GPT_REF(name) fsa_ref_##name##_f64
#else
typedef float real;
#define GPT_REF(name) fsa_ref_##name##_f32
#endif

// Layers. x, out [n, c] are rows of c channels; a backward function adds to the gradients of inputs
// and weights, the embedding's and the norm's as well.

// out[i] = table[tokens[i]]
void embedding_forward(real *out, const int32_t *tokens, const real *table, int64_t n, int c);
void embedding_backward(real *dtable, const int32_t *tokens, const real *dout, int64_t n, int c);
// out = x / sqrt(mean(x^2) + eps) * weight [c]; rstd [n] is kept for the backward pass.
void rmsnorm_forward(real *out, real *rstd, const real *x, const real *weight, int64_t n, int c, double eps);
void rmsnorm_backward(real *dx, real *dweight, const real *dout, const real *x, const real *weight,
                      const real *rstd, int64_t n, int c);
// out [n, o] = x [n, c] weight^T + bias, weight [o, c], bias [o] or NULL.
void linear_forward(real *out, const real *x, const real *weight, const real *bias, int64_t n, int c, int o);
// dx is overwritten, or added to with add_dx != 0; dweight and dbias are added to.
void linear_backward(real *dx, int add_dx, real *dweight, real *dbias, const real *dout, const real *x,
                     const real *weight, int64_t n, int c, int o);
// out [n, h] = silu(gate) * up, gate_up [n, 2h]: h gates, then h ups. dgate_up is overwritten.
void swiglu_forward(real *out, const real *gate_up, int64_t n, int h);
void swiglu_backward(real *dgate_up, const real *dout, const real *gate_up, int64_t n, int h);
// losses[i] = -log softmax(logits[i])[targets[i]] over the first v of vp columns; lse [n] is kept;
// best[i] is the arg max.
void crossentropy_forward(real *losses, real *lse, int32_t *best, const real *logits, const int32_t *targets,
                          int64_t n, int v, int vp);
// logits become their gradient, scaled by dloss; columns past v become 0.
void crossentropy_backward(real *logits, const real *lse, const int32_t *targets, real dloss, int64_t n,
                           int v, int vp);

// Offsets of one layer's tensors into params and grads; -1 where the model has none.
typedef struct {
    int64_t ln1, wqkv, bqkv, qnorm, knorm, phi_wk, phi_pe, phi_wv, wgate, wo, ln2, wgu, wdown;
} LayerOffsets;

// What a layer keeps for its backward pass; n tokens.
typedef struct {
    real *in;                 // [n, C] the residual stream before the layer
    real *ln1, *rstd1;        // [n, C], [n]
    real *q_raw, *k_raw;      // before QK-norm (q and k themselves without it)
    real *rstd_q, *rstd_k;    // [n, Hq], [n, Hkv]
    real *q, *k, *v;          // [n, Hq|Hkv, d] before RoPE
    real *gate;               // [n, 3*Hq] or [n, 3] logits
    GPT_REF(State) att_state; // of the attention
    const int32_t *choice;    // of blocks, [Hkv, n, T], to use instead of choosing; NULL: the layer chooses
    real *att;                // [n, Hq*d]
    real *mid;                // [n, C] the residual stream after attention
    real *ln2, *rstd2;        // [n, C], [n]
    real *gate_up, *act;      // [n, 2*hidden], [n, hidden]
} LayerActs;

typedef struct {
    ModelConfig config;
    double *inv_freq; // [d/2]
    int64_t num_tensors, num_params, max_tokens;
    ParamTensor *tensors;
    int64_t wte, lnf, lm_head; // offsets; lm_head = wte where tied
    LayerOffsets *layers;
    real *params, *grads, *m, *v; // [num_params]; the last three NULL without training
    LayerActs *acts;
    real *out, *lnf_out, *rstdf; // the residual stream after the last layer, its norm
    real *logits;                // [n, Vp]
    real *losses, *lse;          // [n]
    int32_t *best;               // [n] arg max of the logits
    real *dout, *dnorm, *dq, *dk, *dv, *datt, *dgate, *dgate_up, *dact; // backward scratch
    FsaSegment *segments;                                               // [max_tokens]
    const int32_t *tokens, *targets;                                    // of the last forward pass
    FsaBatch batch;
    int64_t n;
    size_t bytes; // of everything allocated
} GPT;

// Allocates a model for at most max_tokens tokens in a pass; training: with gradients and AdamW's
// state. Parameters are not set: params_init, or a checkpoint.
void gpt_build(GPT *model, const ModelConfig *config, int64_t max_tokens, int training);
void gpt_free(GPT *model);
// tokens [n], n = cu_seqlens[num_seqs], packed sequences; all three arrays must last until the
// backward pass. With targets [n]: fills losses, best, logits and returns the mean loss. Without
// (NULL): logits row 0 is that of the last token, and 0 is returned.
double gpt_forward(GPT *model, const int32_t *tokens, const int32_t *targets, const int64_t *cu_seqlens,
                   int64_t num_seqs);
// Adds to grads the gradient of loss_scale times the mean loss of the last forward pass.
void gpt_backward(GPT *model, double loss_scale);
void gpt_zero_grad(GPT *model);
// The gradient's Euclidean norm over all parameters.
double gpt_grad_norm(const GPT *model);
// AdamW, decoupled weight decay on matrices only. step counts from 1; gradients are multiplied by
// grad_scale first (clipping).
void gpt_update(GPT *model, int64_t step, double lr, double beta1, double beta2, double eps,
                double weight_decay, double grad_scale);

#ifdef __cplusplus
}
#endif
#endif
