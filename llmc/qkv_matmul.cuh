// qkv_matmul.cuh: the matmuls of a layer's q, k, v and gate logits, part by part (qkv_layout.h), with biases.
#ifndef LLMC_QKV_MATMUL_CUH
#define LLMC_QKV_MATMUL_CUH
#include "matmul.cuh"
#include "qkv_layout.h"

// Returns whether the bias belongs to the part's last columns alone, which no cuBLASLt epilogue can add.
static inline bool qkv_part_has_tail_bias(const QkvPart *p) {
    return p->bias >= 0 && p->bias_column > p->column;
}

// out = x weight^T + bias: out [n, width] with rows `stride` elements apart, x [n, C], weight [width, C],
// bias [width, or the part's last columns] or NULL.
static inline void qkv_part_forward(Matmul *mm, const QkvPart *p, floatX *out, int64_t stride,
                                    const floatX *x, const floatX *weight, const floatX *bias, int64_t n,
                                    int64_t C, cudaStream_t stream) {
    const bool tail = qkv_part_has_tail_bias(p);
    matmul_forward(mm, out, stride, x, C, weight, tail ? NULL : bias, n, C, p->width, stream);
    const int64_t skipped = p->bias_column - p->column;
    if (tail) add_bias(out + skipped, stride, bias, n, p->width - skipped, stream);
}

// dweight += dout^T x, dbias += column sums of dout, dx = dout weight, or dx += dout weight if add_dx != 0.
// Shapes as in qkv_part_forward; dweight and dbias are fp32, dbias may be NULL.
static inline void qkv_part_backward(Matmul *mm, const QkvPart *p, floatX *dx, int add_dx, float *dweight,
                                     float *dbias, const floatX *dout, int64_t stride, const floatX *x,
                                     const floatX *weight, int64_t n, int64_t C, cudaStream_t stream) {
    const int64_t skipped = p->bias < 0 ? 0 : p->bias_column - p->column;
    matmul_backward_weight(mm, dweight, dout, stride, x, C, n, C, p->width, stream);
    if (dbias) bias_backward(mm, dbias, dout + skipped, stride, n, p->width - skipped, stream);
    matmul_backward_input(mm, dx, add_dx, dout, stride, weight, n, C, p->width, stream);
}
#endif
