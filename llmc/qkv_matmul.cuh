// qkv_matmul.cuh: the matmuls of a layer's q, k, v and gate logits, part by part (qkv_layout.h), with biases.
#ifndef LLMC_QKV_MATMUL_CUH
#define LLMC_QKV_MATMUL_CUH
#include "linear.cuh"
#include "qkv_layout.h"

// Returns whether the bias belongs to the part's last columns alone, which no cuBLASLt epilogue can add.
static inline bool qkv_part_has_tail_bias(const QkvPart *p) {
    return p->bias >= 0 && p->bias_column > p->column;
}

// out = x w^T + bias: out [n, width] with rows `stride` elements apart, x [n, C], w [width, C],
// bias [width, or the part's last columns] or NULL.
static inline void qkv_part_forward(Linears *m, const QkvPart *p, floatX *out, int64_t stride, Operand x,
                                    const Linear *w, const floatX *bias, int64_t n, cudaStream_t stream) {
    const bool tail = qkv_part_has_tail_bias(p);
    linear_forward(m, out, stride, x, w, tail ? NULL : bias, n, stream);
    const int64_t skipped = p->bias_column - p->column;
    if (tail) add_bias(out + skipped, stride, bias, n, p->width - skipped, stream);
}

// dweight += dout^T x, dbias += column sums of dout, dx = dout w, or dx += dout w if add_dx != 0.
// Shapes as in qkv_part_forward; dweight and dbias are fp32, dbias may be NULL.
static inline void qkv_part_backward(Linears *m, const QkvPart *p, floatX *dx, int add_dx, float *dweight,
                                     float *dbias, Operand dout, Operand x, const Linear *w, int64_t n,
                                     cudaStream_t stream) {
    const int64_t skipped = p->bias < 0 ? 0 : p->bias_column - p->column;
    if (w->q.w.data) operand_quantize(m, &dout, n, p->width, stream);
    linear_backward(m, dx, add_dx, dweight, dout, x, w, n, stream);
    if (dbias) bias_backward(&m->matmul, dbias, dout.x + skipped, dout.stride, n, p->width - skipped, stream);
}
#endif
