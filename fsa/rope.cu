// rope.cu: rotates queries and keys by their positions, and turns the gradients of keys back (those of
// queries are turned where the selected branch adds them up).
#include "kernels.h"
#include "rope.cuh"
#include "tile.cuh"

struct Rope {
    FsaPlan plan;
    int queries;      // rows are query rows, at their segments' positions; else keys
    int heads, group; // group: query heads a kv head
    int64_t rows;
    const void *x;
    const double *inv_freq;
    void *out;
    // Gradients.
    const float *dx, *plain;
    const void *more;
};

// Eight channels as floats.
template <typename T> __device__ __forceinline__ void load8(float (&x)[8], const T *from) {
    uint4 bits = *(const uint4 *)from;
    uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = unpack2<T>(words[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void load8(float (&x)[8], const float *from) {
    *(float4 *)x = *(const float4 *)from;
    *(float4 *)(x + 4) = *(const float4 *)(from + 4);
}
template <typename T> __device__ __forceinline__ void store8(T *to, const float (&x)[8]) {
    *(uint4 *)to =
        make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}

// A block: 8 rows, all heads; the angles of a row are computed once for its heads. A thread: eight channels
// of the lower half and their partners of the upper. Forward reads and writes 2*d bytes a row and head; the
// gradient reads 4*d (and 2*d, 4*d of the other summands) and writes 2*d. Bound by bytes.
template <typename T, int D, bool GRADIENT> __global__ void __launch_bounds__(128) rope_kernel(const Rope p) {
    constexpr int ROWS = 8, HALF = D / 2, PARTS = HALF / 8;
    __shared__ float2 turns[ROWS][HALF];
    int64_t row0 = blockIdx.x * (int64_t)ROWS;
    int rows = p.rows - row0 < ROWS ? (int)(p.rows - row0) : ROWS;
    if (p.inv_freq) {
        for (int i = threadIdx.x; i < rows * HALF; i += 128) {
            int64_t row = row0 + i / HALF, seq, pos;
            if (p.queries) {
                fsa_row(p.plan, row, &seq, &pos);
            } else {
                seq = fsa_find(p.plan.cu_seqlens, p.plan.num_seqs, row);
                pos = row - p.plan.cu_seqlens[seq];
            }
            turns[i / HALF][i % HALF] = rope_turn(pos, p.inv_freq[i % HALF]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * p.heads * PARTS; i += 128) {
        int row = i / (p.heads * PARTS), part = i % PARTS;
        int64_t at = ((row0 + row) * p.heads + i / PARTS % p.heads) * D + part * 8;
        float lo[8], hi[8], a[8], b[8];
        if (GRADIENT) {
            if (p.queries) {
                const int64_t sum = dq_sum_row(p.rows, p.group, row0 + row, i / PARTS % p.heads);
                load8(lo, p.dx + sum * D + dq_sum_piece(sum, part) * 8);
                load8(hi, p.dx + sum * D + dq_sum_piece(sum, part + PARTS) * 8);
            } else {
                load8(lo, p.dx + at);
                load8(hi, p.dx + at + HALF);
            }
            if (p.more) {
                load8(a, (const T *)p.more + at);
                load8(b, (const T *)p.more + at + HALF);
#pragma unroll
                for (int j = 0; j < 8; j++) lo[j] += a[j], hi[j] += b[j];
            }
        } else {
            load8(lo, (const T *)p.x + at);
            load8(hi, (const T *)p.x + at + HALF);
        }
        if (p.inv_freq) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 turn = turns[row][part * 8 + j];
                float sine = GRADIENT ? -turn.y : turn.y, x = lo[j], y = hi[j];
                lo[j] = x * turn.x - y * sine;
                hi[j] = y * turn.x + x * sine;
            }
        }
        if (GRADIENT && p.plain) {
            load8(a, p.plain + at);
            load8(b, p.plain + at + HALF);
#pragma unroll
            for (int j = 0; j < 8; j++) lo[j] += a[j], hi[j] += b[j];
        }
        store8((T *)p.out + at, lo);
        store8((T *)p.out + at + HALF, hi);
    }
}

template <typename T, int D> static int launch_rope(const Rope &p, cudaStream_t stream) {
    unsigned blocks = (unsigned)((p.rows + 7) / 8);
    if (blocks == 0) return FSA_OK;
    if (p.dx)
        rope_kernel<T, D, true><<<blocks, 128, 0, stream>>>(p);
    else
        rope_kernel<T, D, false><<<blocks, 128, 0, stream>>>(p);
    return launch_status();
}

static int rope(const FsaConfig *c, FsaDtype dtype, Rope p, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    p.rows = p.queries ? p.plan.nq : p.plan.n;
    p.heads = p.queries ? c->q_heads : c->kv_heads;
    p.group = c->q_heads / c->kv_heads;
    return FSA_DISPATCH(dtype, c->head_dim, launch_rope, p, stream);
}

int fsa_rope_queries(const FsaConfig *c, const FsaPlan *p, FsaDtype dtype, const void *x,
                     const double *inv_freq, void *out, cudaStream_t stream) {
    return rope(c, dtype, Rope{*p, 1, 0, 0, 0, x, inv_freq, out, NULL, NULL, NULL}, stream);
}
int fsa_rope_keys(const FsaConfig *c, const FsaPlan *p, FsaDtype dtype, const void *x, const double *inv_freq,
                  void *out, cudaStream_t stream) {
    return rope(c, dtype, Rope{*p, 0, 0, 0, 0, x, inv_freq, out, NULL, NULL, NULL}, stream);
}
int fsa_rope_keys_gradient(const FsaConfig *c, const FsaPlan *p, FsaDtype dtype, const float *dx,
                           const void *more, const float *plain, const double *inv_freq, void *out,
                           cudaStream_t stream) {
    return rope(c, dtype, Rope{*p, 0, 0, 0, 0, NULL, inv_freq, out, dx, plain, more}, stream);
}
int fsa_round_dq(const FsaConfig *c, const FsaPlan *p, FsaDtype dtype, const float *sums, void *dq,
                 cudaStream_t stream) {
    return rope(c, dtype, Rope{*p, 1, 0, 0, 0, NULL, NULL, dq, sums, NULL, NULL}, stream);
}
