// linear.cuh: the matmuls of the layers' linear weights, in floatX or, with -matmul fp8, in e4m3
// (fp8_matmul.cuh).
//
// With fp8 each weight has two e4m3 copies, made once a step: w for the forward pass, the transposed w_t for
// the input gradient. The kernels that produce activations and gradients write them in e4m3, with a scale for
// each row. The weight gradient sums over tokens, so its two operands are transposed first, with scales along
// the tokens.
#ifndef LLMC_LINEAR_CUH
#define LLMC_LINEAR_CUH
#include "fp8_linear.cuh"
#include "param_layout.h"
#include "profile.cuh"

// A linear weight [out, in], or some of its rows. q.w.data is NULL without fp8, q.w_t.data without training.
typedef struct {
    const floatX *weight;
    int64_t out, in;
    Fp8Weight q;
} Linear;
typedef enum { LINEAR_QKV, LINEAR_WO, LINEAR_WGU, LINEAR_WDOWN, LINEARS } LinearKind;

// An operand [n, k] of a matmul: rows of x, `stride` elements apart; with fp8 q.
typedef struct {
    const floatX *x;
    int64_t stride;
    Fp8Matrix q;
} Operand;

typedef struct {
    Matmul matmul;
    int fp8;
    int add_gradients; // 1: weight gradients are added to those of the micro-batches before; 0: they
                       // overwrite them
    Linear *weights;   // [layers][LINEARS]
    int *quantized;    // [layers] 1: the e4m3 copies are those of the current weights
    Fp8Scratch scratch;
    Profile *profile; // NULL: nothing is measured
} Linears;

// Returns layer l's linear weight `kind`.
static const Linear *linear_weight(const Linears *m, int l, LinearKind kind) {
    return &m->weights[l * LINEARS + kind];
}

// Returns rows [row, row + out) of w.
static Linear linear_rows(const Linear *w, int64_t row, int64_t out) {
    return {w->weight + row * w->in, out, w->in, fp8_weight_rows(&w->q, row, out)};
}

// Builds the table of the layers' linear weights.
static void linears_build(Linears *m, const ModelConfig *c, int fp8) {
    const int64_t C = c->channels, H = c->hidden, q = (int64_t)c->fsa.q_heads * c->fsa.head_dim;
    const int64_t qkv = q + 2 * (int64_t)c->fsa.kv_heads * c->fsa.head_dim;
    m->fp8 = fp8;
    m->weights = (Linear *)xcalloc((size_t)c->layers * LINEARS, sizeof *m->weights);
    m->quantized = (int *)xcalloc((size_t)c->layers, sizeof *m->quantized);
    for (int l = 0; l < c->layers; l++) {
        Linear *w = m->weights + l * LINEARS;
        w[LINEAR_QKV] = {NULL, qkv, C}, w[LINEAR_WO] = {NULL, C, q};
        w[LINEAR_WGU] = {NULL, 2 * H, C}, w[LINEAR_WDOWN] = {NULL, C, H};
    }
}

static void linears_free(Linears *m) {
    free(m->weights), free(m->quantized);
}

// Points the table to the weights, and assigns the memory of their e4m3 copies and of the scratch for n
// tokens.
static void linears_memory_layout(Linears *m, const ModelConfig *c, const ParamLayout *layout,
                                  const floatX *weights, int64_t n, int training, Arena *arenas) {
    int64_t max_out = 0, max_in = 0;
    for (int l = 0; l < c->layers; l++) {
        const LayerParams *p = &layout->layers[l];
        const int64_t offsets[LINEARS] = {p->wqkv, p->wo, p->wgu, p->wdown};
        for (int k = 0; k < LINEARS; k++) {
            Linear *w = &m->weights[l * LINEARS + k];
            w->weight = weights + offsets[k];
            max_out = std::max(max_out, w->out), max_in = std::max(max_in, w->in);
            if (m->fp8) fp8_weight_memory_layout(&w->q, w->out, w->in, training, &arenas[WEIGHTS]);
        }
    }
    if (m->fp8) fp8_scratch_memory_layout(&m->scratch, training ? n : 0, max_out, max_in, &arenas[SCRATCH]);
}

// Makes the e4m3 copies of layer l's weights unless they are those of the current weights.
static void linears_quantize(Linears *m, int l, cudaStream_t stream) {
    if (!m->fp8 || m->quantized[l]) return;
    m->quantized[l] = 1;
    profile_mark(m->profile, PART_QUANTIZE, stream);
    for (int k = 0; k < LINEARS; k++) {
        const Linear *w = &m->weights[l * LINEARS + k];
        fp8_weight_quantize(&m->matmul, &w->q, w->weight, &m->scratch, stream);
    }
}

// Called when the weights change.
static void linears_weights_changed(Linears *m, int layers) {
    std::fill(m->quantized, m->quantized + layers, 0);
}

// q = operand.x [n, k] in e4m3. Does nothing without fp8.
static void operand_quantize(Linears *m, const Operand *x, int64_t n, int64_t k, cudaStream_t stream) {
    if (!x->q.data) return;
    profile_mark(m->profile, PART_QUANTIZE, stream);
    quantize_rows(x->q, x->x, x->stride, n, k, stream);
}

// out = x w^T + bias + addend: out and addend [n, w->out] with rows ldo elements apart, x [n, w->in], bias
// [w->out] or NULL, addend or NULL.
static void linear_forward(Linears *m, floatX *out, int64_t ldo, Operand x, const Linear *w,
                           const floatX *bias, int64_t n, cudaStream_t stream, const floatX *addend = NULL) {
    profile_mark(m->profile, PART_MATMUL, stream);
    if (!w->q.w.data) {
        matmul_forward(&m->matmul, out, ldo, x.x, x.stride, w->weight, bias, n, w->in, w->out, stream,
                       addend);
        return;
    }
    fp8_linear_forward(&m->matmul, &m->scratch, out, ldo, x.q, &w->q, n, stream, addend);
    if (bias) add_bias(out, ldo, bias, n, w->out, stream);
}

// dweight [w->out, w->in] = dout^T x, or dweight += dout^T x if m->add_gradients, in fp32; then dx = dout w,
// or dx += dout w if add_dx != 0: dout [n, w->out], x [n, w->in], dx [n, w->in]. dx may be x.
static void linear_backward(Linears *m, floatX *dx, int add_dx, float *dweight, Operand dout, Operand x,
                            const Linear *w, int64_t n, cudaStream_t stream) {
    Matmul *mm = &m->matmul;
    profile_mark(m->profile, w->q.w.data ? PART_QUANTIZE : PART_MATMUL, stream);
    if (!w->q.w.data) {
        matmul_backward_weight(mm, dweight, m->add_gradients, dout.x, dout.stride, x.x, x.stride, n, w->in,
                               w->out, stream);
        matmul_backward_input(mm, dx, add_dx, dout.x, dout.stride, w->weight, n, w->in, w->out, stream);
        return;
    }
    fp8_linear_transpose(mm, &m->scratch, dout.q, x.q, n, w->in, w->out, stream);
    profile_mark(m->profile, PART_MATMUL, stream);
    fp8_linear_backward_weight(mm, &m->scratch, dweight, m->add_gradients, n, w->in, w->out, stream);
    fp8_linear_backward_input(mm, &m->scratch, dx, add_dx, dout.q, &w->q, n, stream);
}
#endif
