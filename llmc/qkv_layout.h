// qkv_layout.h: the matrix of a layer that holds q, k, v and the gate logits of all tokens, and the matmuls
// that compute it. A row of wqkv and wgate, which are one matrix in memory, computes a column.
#ifndef LLMC_QKV_LAYOUT_H
#define LLMC_QKV_LAYOUT_H
#include "param_layout.h"

// The columns q [Hq*d] | k [Hkv*d] | v [Hkv*d] | gate logits [num_gate_logits], with q at column 0, and row
// strides in elements. A layer without gates ends at v. Without QK-norm, the attention reads q and k from
// their columns. With QK-norm, it reads normalized copies, which are packed.
typedef struct {
    int64_t k, v, gate;         // first columns
    int64_t width;              // of all columns
    int64_t stride;             // width rounded up to a multiple of 8, which the attention needs
    int64_t q_stride, k_stride; // of the attention's inputs q and k, and of their gradients
    int64_t o_stride;           // of the attention's output o
    int o_over_q;               // 1: o overwrites q's columns
} QkvLayout;

// Returns the columns of layer l. No layer's stride is larger than that of layer 0.
static inline QkvLayout qkv_layout(const ModelConfig *c, int l) {
    const FsaConfig *f = &c->fsa;
    const int nsa = layer_attention(c, l) == ATTN_NSA;
    const int64_t q_width = (int64_t)f->q_heads * f->head_dim, k_width = (int64_t)f->kv_heads * f->head_dim;
    QkvLayout x = {q_width, q_width + k_width, q_width + 2 * k_width, 0, 0, 0, 0, 0, 0};
    x.width = x.gate + (nsa ? num_gate_logits(f) : 0);
    x.stride = (x.width + 7) / 8 * 8;
    x.q_stride = c->qk_norm ? q_width : x.stride;
    x.k_stride = c->qk_norm ? k_width : x.stride;
    // the backward pass of nsa does not read q, but the rotated q that forward saves
    x.o_over_q = nsa && !c->qk_norm;
    x.o_stride = x.o_over_q ? x.stride : q_width;
    return x;
}

// A range of columns that one matmul computes.
typedef struct {
    int64_t column, width;
    int64_t weight;            // offset in the parameters of the first column's row
    int64_t bias, bias_column; // offset of the bias of the columns from bias_column on; -1: none
} QkvPart;
enum { QKV_PARTS = 3 };

// Fills parts [QKV_PARTS] and returns their number: one for all columns. The gate is a part of its own if its
// logits are no multiple of 8, since a matmul of such a width cannot use 16-byte accesses, and with fp8 != 0,
// since the gate is not computed in 8 bits. If the keys and values are gathered from several GPUs (sharded !=
// 0), [k|v] comes first, so that the gather starts early. The backward pass goes through the parts in
// reverse. bgate is right behind bqkv.
static inline int qkv_parts(const QkvLayout *layout, const LayerParams *w, int64_t channels, int sharded,
                            int fp8, QkvPart *parts) {
    const QkvLayout x = *layout;
    const int64_t k_weight = w->wqkv + x.k * channels, k_bias = w->bqkv < 0 ? -1 : w->bqkv + x.k;
    const QkvPart kv = {x.k, x.gate - x.k, k_weight, k_bias, x.k}, q = {0, x.k, w->wqkv, w->bqkv, 0};
    const QkvPart qkv = {0, x.gate, w->wqkv, w->bqkv, 0};
    const QkvPart gate = {x.gate, x.width - x.gate, w->wgate, w->bgate, x.gate};
    int count = 0;
    if (sharded) parts[count++] = kv;
    parts[count++] = sharded ? q : qkv;
    if (w->wgate < 0) return count;
    if (sharded || fp8 || gate.width % 8 != 0) {
        parts[count++] = gate;
    } else {
        parts[0].width = x.width;
        if (w->bqkv < 0) parts[0].bias = gate.bias, parts[0].bias_column = gate.bias_column;
    }
    return count;
}
#endif
