// train_gpt_nsa.h: the layers and the model of train_gpt_nsa.c, for tests. Compile train_gpt_nsa.c with
// -DGPT_NO_MAIN and link it. With -DGPT_DOUBLE for both, everything is computed in double.
//
// train_gpt_nsa.cu has the same names for the type Model, its members and their tensors, and for the
// functions of the model, except:
//   the GPU's classifier              crossentropy_forward and crossentropy_backward in one kernel
//   matmul_backward_input, _weight    the two halves of matmul_backward
//   layer_body                        layer_forward between the layer's first norm and its last matmul
//   model_forward_backward            model_forward and model_backward, with the LM head in chunks, for the
//                                     sum of the losses instead of loss_scale times their mean
//   model_build, model_update         more arguments: recomputation, GPUs; the tokens to divide gradients by
// In C++ the model below is in namespace cpu, so that a test can have both: cpu::model_forward is the C
// trainer's, model_forward the GPU trainer's. The layers are overloads: those of the GPU take floatX and a
// stream.
#ifndef TRAIN_GPT_NSA_H
#define TRAIN_GPT_NSA_H
#include "llmc/utils.h"
#include "llmc/config.h"
#include "llmc/param_layout.h"
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

// Layers. x and out are matrices of n rows. A backward function gets dout, the gradient of out, and adds the
// gradients of inputs and weights to their arrays unless its comment says that it overwrites one.

// out[i] = table[tokens[i]]: out [n, c], tokens [n], table [vocabulary, c].
void embedding_forward(real *out, const int32_t *tokens, const real *table, int64_t n, int c);
void embedding_backward(real *dtable, const int32_t *tokens, const real *dout, int64_t n, int c);
// out = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps) of a row: out, x [n, c], weight [c]. rstd [n]
// is kept for the backward pass.
void rmsnorm_forward(real *out, real *rstd, const real *x, const real *weight, int64_t n, int c, double eps);
void rmsnorm_backward(real *dx, real *dweight, const real *dout, const real *x, const real *weight,
                      const real *rstd, int64_t n, int c);
// out = x weight^T + bias: out [n, o], x [n, c], weight [o, c], bias [o] or NULL.
void matmul_forward(real *out, const real *x, const real *weight, const real *bias, int64_t n, int c, int o);
// Overwrites dx, or adds to it if add_dx != 0; adds to dweight and dbias. dbias may be NULL.
void matmul_backward(real *dx, int add_dx, real *dweight, real *dbias, const real *dout, const real *x,
                     const real *weight, int64_t n, int c, int o);
// out = silu(gate) * up: out [n, h]; gate_up [n, 2h], each row h gates, then h ups.
void swiglu_forward(real *out, const real *gate_up, int64_t n, int h);
// Overwrites dgate_up.
void swiglu_backward(real *dgate_up, const real *dout, const real *gate_up, int64_t n, int h);
// losses[i] = -log softmax(logits[i])[targets[i]] over the first v of vp columns; argmax[i] is the first
// index of the greatest of them. logits [n, vp]; losses, argmax, targets [n]. lse [n] is kept for the
// backward pass.
void crossentropy_forward(real *losses, real *lse, int32_t *argmax, const real *logits,
                          const int32_t *targets, int64_t n, int v, int vp);
// Overwrites logits by their gradient times dloss, with 0 in columns v to vp - 1.
void crossentropy_backward(real *logits, const real *lse, const int32_t *targets, real dloss, int64_t n,
                           int v, int vp);

// The model.
#ifdef __cplusplus
namespace cpu {
#endif

// The activations that a layer keeps for its backward pass; n tokens.
typedef struct {
    real *residual_in;            // [n, C] the residual stream before the layer
    real *ln1, *ln1_rstd;         // [n, C], [n]
    real *q_raw, *k_raw;          // [n, Hq, d], [n, Hkv, d] before QK-norm; without it the same as q and k
    real *q_rstd, *k_rstd;        // [n, Hq], [n, Hkv]
    real *q, *k, *v;              // [n, Hq, d], [n, Hkv, d] twice; q and k before RoPE
    real *gate_logits;            // [n, Hq, 3], or [n, 3] with gate_per_token; NULL in a layer without gates
    GPT_REF(State) saved;         // the attention's own activations
    const int32_t *block_indices; // [Hkv, n, T] to attend to; NULL: the layer selects the blocks
    real *attn_out;               // [n, Hq, d]
    real *residual_mid;           // [n, C] the residual stream after the attention
    real *ln2, *ln2_rstd;         // [n, C], [n]
    real *gate_up, *swiglu;       // [n, 2*hidden], [n, hidden]
} LayerActivations;

// The weights and their gradients.
typedef struct {
    real *weights; // [num_params]
    real *grads;   // [num_params]; NULL without training
} Params;

// AdamW's moments.
typedef struct {
    real *m, *v; // [num_params]; NULL without training
} Optimizer;

// The activations of a batch, from its forward pass to its backward pass.
typedef struct {
    LayerActivations *layers; // [layers]
    real *residual_out;       // [n, C] the residual stream after the last layer
    real *lnf_out, *lnf_rstd; // [n, C], [n]
    real *logits;             // [n, Vp]
    real *losses, *lse;       // [n]
    int32_t *argmax;          // [n] of the logits
} Activations;

// Scratch of the backward pass: gradients of one layer, with the shapes of its activations.
typedef struct {
    real *dresidual, *dnorm; // [n, C] of the residual stream, and of a norm's output
    real *dq, *dk, *dv, *dattn_out, *dgate_logits, *dgate_up, *dswiglu;
} Scratch;

typedef struct {
    ModelConfig config;
    int64_t max_tokens; // of a pass
    int training;       // 1: with gradients and AdamW's moments
    size_t bytes;       // of the arrays so far; needed: of all arrays, 0 while they are counted
    double needed;
    // They last as long as the model.
    ParamLayout layout; // where the tensors are in params.weights and params.grads
    Params params;
    Optimizer optimizer;
    double *inv_freq; // [d/2]
    // They belong to the batch of the last forward pass.
    int64_t n;
    const int32_t *tokens, *targets; // [n]
    FsaSegment *segments;            // [max_tokens]
    FsaBatch batch;
    Activations acts;
    Scratch scratch;
} Model;

// Allocates a model for at most max_tokens tokens in a pass. With training != 0 it has gradients and AdamW's
// moments. The caller sets the parameters, with params_init or from a checkpoint. Exits with an error if
// memory is short.
void model_build(Model *model, const ModelConfig *config, int64_t max_tokens, int training);
void model_free(Model *model);
// Runs packed sequences: tokens [n], cu_seqlens [num_seqs + 1], n = cu_seqlens[num_seqs] <= max_tokens. With
// targets [n] it fills losses, argmax and logits, and returns the mean loss. With targets NULL it writes the
// last token's logits to row 0 of logits, and returns 0. The three arrays must stay until the backward pass.
double model_forward(Model *model, const int32_t *tokens, const int32_t *targets, const int64_t *cu_seqlens,
                     int64_t num_seqs);
// Adds to grads the gradient of loss_scale times the mean loss of the last forward pass.
void model_backward(Model *model, double loss_scale);
void model_zero_grad(Model *model);
// Returns the Euclidean norm of grads.
double model_grad_norm(const Model *model);
// AdamW step number `step` (1-based). Gradients are multiplied by grad_scale first, which clips them. Weight
// decay is decoupled and applies to matrices only.
void model_update(Model *model, int64_t step, double lr, double beta1, double beta2, double eps,
                  double weight_decay, double grad_scale);

#ifdef __cplusplus
} // namespace cpu
}
#endif
#endif
