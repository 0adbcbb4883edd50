// linear.cuh: the matmuls of the layers' linear weights, in floatX or, with -matmul fp8, in e4m3
// (fp8_matmul.cuh).
//
// With fp8 each weight has two e4m3 copies, made once a step: q for the forward pass, the transposed t for
// the input gradient. The kernels that produce activations and gradients write them in e4m3, with a scale for
// each row. The weight gradient sums over tokens, so its two operands are transposed first, with scales along
// the tokens.
#ifndef LLMC_LINEAR_CUH
#define LLMC_LINEAR_CUH
#include "arena.cuh"
#include "fp8_matmul.cuh"
#include "param_layout.h"
#include "profile.cuh"

// A linear weight [out, in], or some of its rows. With context parallel the gradients of k and v come later
// than those of q, so wqkv has two transposed copies, of the rows before `split` and from there on; else
// split = out.
typedef struct {
    const floatX *weight;
    int64_t out, in, split;
    Fp8Matrix q; // [out, in]; q.data is NULL without fp8
    Fp8Matrix t; // [in, split], then [in, out - split]
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
    int add_gradients;   // 1: weight gradients are added to those of the micro-batches before; 0: they
                         // overwrite them
    Linear *weights;     // [layers][LINEARS]
    int *quantized;      // [layers] 1: q and t are those of the current weights
    uint8_t *transposed; // scratch: the two operands of a weight gradient
    uint32_t *amax;      // scratch: of the channels of an operand
    float *scales[2];    // scratch: of the two operands
    Profile *profile;    // NULL: nothing is measured
} Linears;

// Returns layer l's linear weight `kind`.
static const Linear *linear_weight(const Linears *m, int l, LinearKind kind) {
    return &m->weights[l * LINEARS + kind];
}

// Returns rows [row, row + out) of w. `row` is 0 or w->split.
static Linear linear_rows(const Linear *w, int64_t row, int64_t out) {
    Linear part = *w;
    part.weight += row * w->in, part.out = part.split = out;
    if (!w->q.data) return part;
    part.q.data += row * w->in, part.q.scale += row;
    part.t.data += row * w->in, part.t.scale += row ? w->in : 0;
    return part;
}

// Builds the table of the layers' linear weights. kv_split: 1 if the keys' and values' gradients come
// separately.
static void linears_build(Linears *m, const ModelConfig *c, int fp8, int kv_split) {
    const int64_t C = c->channels, H = c->hidden, q = (int64_t)c->fsa.q_heads * c->fsa.head_dim;
    const int64_t qkv = q + 2 * (int64_t)c->fsa.kv_heads * c->fsa.head_dim;
    m->fp8 = fp8;
    m->weights = (Linear *)xcalloc((size_t)c->layers * LINEARS, sizeof *m->weights);
    m->quantized = (int *)xcalloc((size_t)c->layers, sizeof *m->quantized);
    for (int l = 0; l < c->layers; l++) {
        Linear *w = m->weights + l * LINEARS;
        w[LINEAR_QKV] = {NULL, qkv, C, kv_split ? q : qkv};
        w[LINEAR_WO] = {NULL, C, q, C}, w[LINEAR_WGU] = {NULL, 2 * H, C, 2 * H};
        w[LINEAR_WDOWN] = {NULL, C, H, C};
    }
}

static void linears_free(Linears *m) {
    free(m->weights), free(m->quantized);
}

// Assigns the memory of e4m3 matrix q [rows, k].
static void fp8_alloc(Arena *arena, Fp8Matrix *q, int64_t rows, int64_t k) {
    arena_alloc(arena, &q->data, rows * k);
    arena_alloc(arena, &q->scale, rows);
}

// Points the table to the weights, and assigns the memory of their e4m3 copies, t only with training, and of
// the scratch for n tokens.
static void linears_memory_layout(Linears *m, const ModelConfig *c, const ParamLayout *layout,
                                  const floatX *weights, int64_t n, int training, Arena *arenas) {
    int64_t widest = 0, operands = 0;
    for (int l = 0; l < c->layers; l++) {
        const LayerParams *p = &layout->layers[l];
        const int64_t offsets[LINEARS] = {p->wqkv, p->wo, p->wgu, p->wdown};
        for (int k = 0; k < LINEARS; k++) {
            Linear *w = &m->weights[l * LINEARS + k];
            w->weight = weights + offsets[k];
            widest = std::max({widest, w->out, w->in}), operands = std::max(operands, w->out + w->in);
            if (!m->fp8) continue;
            fp8_alloc(&arenas[WEIGHTS], &w->q, w->out, w->in);
            if (!training) continue;
            arena_alloc(&arenas[WEIGHTS], &w->t.data, w->out * w->in);
            arena_alloc(&arenas[WEIGHTS], &w->t.scale, (w->split < w->out ? 2 : 1) * w->in);
        }
    }
    if (!m->fp8) return;
    arena_alloc(&arenas[SCRATCH], &m->amax, widest);
    if (!training) return;
    arena_alloc(&arenas[SCRATCH], &m->transposed, operands * fp8_padded(n));
    for (float *&scale : m->scales) arena_alloc(&arenas[SCRATCH], &scale, widest);
}

// Makes the e4m3 copies of layer l's weights unless they are those of the current weights.
static void linears_quantize(Linears *m, int l, cudaStream_t stream) {
    if (!m->fp8 || m->quantized[l]) return;
    m->quantized[l] = 1;
    profile_mark(m->profile, PART_QUANTIZE, stream);
    for (int k = 0; k < LINEARS; k++) {
        const Linear *w = &m->weights[l * LINEARS + k];
        for (int64_t row = 0; row < w->out; row = row < w->split ? w->split : w->out) {
            const Linear part = linear_rows(w, row, row < w->split ? w->split : w->out - w->split);
            if (w->t.data)
                quantize_weight(part.q, part.t, part.weight, part.out, part.in, m->amax, stream);
            else
                quantize_rows(part.q, part.weight, part.in, part.out, part.in, stream);
        }
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

// out = x w^T + bias: out [n, w->out] with rows ldo elements apart, x [n, w->in], bias [w->out] or NULL.
static void linear_forward(Linears *m, floatX *out, int64_t ldo, Operand x, const Linear *w,
                           const floatX *bias, int64_t n, cudaStream_t stream) {
    profile_mark(m->profile, PART_MATMUL, stream);
    if (!w->q.data) {
        matmul_forward(&m->matmul, out, ldo, x.x, x.stride, w->weight, bias, n, w->in, w->out, stream);
        return;
    }
    fp8_matmul_forward(&m->matmul, out, ldo, x.q, w->q, n, w->in, w->out, stream);
    if (bias) add_bias(out, ldo, bias, n, w->out, stream);
}

// dweight [w->out, w->in] = dout^T x, or dweight += dout^T x if m->add_gradients, in fp32; then dx = dout w,
// or dx += dout w if add_dx != 0: dout [n, w->out], x [n, w->in], dx [n, w->in]. dx may be x.
static void linear_backward(Linears *m, floatX *dx, int add_dx, float *dweight, Operand dout, Operand x,
                            const Linear *w, int64_t n, cudaStream_t stream) {
    if (!w->q.data) {
        profile_mark(m->profile, PART_MATMUL, stream);
        matmul_backward_weight(&m->matmul, dweight, m->add_gradients, dout.x, dout.stride, x.x, x.stride, n,
                               w->in, w->out, stream);
        matmul_backward_input(&m->matmul, dx, add_dx, dout.x, dout.stride, w->weight, n, w->in, w->out,
                              stream);
        return;
    }
    const Fp8Matrix dout_t = {m->transposed, m->scales[0]},
                    x_t = {m->transposed + w->out * fp8_padded(n), m->scales[1]};
    profile_mark(m->profile, PART_QUANTIZE, stream);
    quantize_transpose(dout_t, FP8_SCALE_ROW, dout.q, n, w->out, m->amax, stream);
    quantize_transpose(x_t, FP8_SCALE_ROW, x.q, n, w->in, m->amax, stream);
    profile_mark(m->profile, PART_MATMUL, stream);
    fp8_matmul_backward_weight(&m->matmul, dweight, m->add_gradients, dout_t, x_t, n, w->in, w->out, stream);
    fp8_matmul_backward_input(&m->matmul, dx, add_dx, dout.q, w->t, n, w->in, w->out, stream);
}
#endif
