// rope.cu: rotates queries and keys by their positions (gradients are turned back where the selected branch
// adds them up), and rounds the sums of dq.
#include "kernels.h"
#include "rope.cuh"
#include "launch.cuh"
#include "mma.cuh"

struct Rope {
    BatchLayout batch;
    int queries; // rows are query rows, at their segments' positions; else keys
    int heads;
    int64_t rows;
    const void *x;
    const double *inv_freq;
    void *out;
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
template <typename T> __device__ __forceinline__ void store8(T *to, const float (&x)[8]) {
    *(uint4 *)to =
        make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}

// A block: 8 rows, all heads; the angles of a row are computed once for its heads. A thread: eight channels
// of the lower half and their partners of the upper. Reads and writes 2*d bytes a row and head, which bind.
template <typename T, int D> __global__ void __launch_bounds__(128) rope_kernel(const Rope p) {
    constexpr int ROWS = 8, HALF = D / 2, PARTS = HALF / 8;
    __shared__ float2 turns[ROWS][HALF];
    int64_t row0 = blockIdx.x * (int64_t)ROWS;
    int rows = p.rows - row0 < ROWS ? (int)(p.rows - row0) : ROWS;
    if (p.inv_freq) {
        for (int i = threadIdx.x; i < rows * HALF; i += 128) {
            int64_t row = row0 + i / HALF, seq, pos;
            if (p.queries) {
                query_position(p.batch, row, &seq, &pos);
            } else {
                seq = find_in_cu(p.batch.cu_seqlens, p.batch.num_seqs, row);
                pos = row - p.batch.cu_seqlens[seq];
            }
            turns[i / HALF][i % HALF] = rope_cos_sin(pos, p.inv_freq[i % HALF]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * p.heads * PARTS; i += 128) {
        int row = i / (p.heads * PARTS), part = i % PARTS;
        int64_t at = ((row0 + row) * p.heads + i / PARTS % p.heads) * D + part * 8;
        float lo[8], hi[8];
        load8(lo, (const T *)p.x + at);
        load8(hi, (const T *)p.x + at + HALF);
        if (p.inv_freq) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 turn = turns[row][part * 8 + j];
                float x = lo[j], y = hi[j];
                lo[j] = x * turn.x - y * turn.y;
                hi[j] = y * turn.x + x * turn.y;
            }
        }
        store8((T *)p.out + at, lo);
        store8((T *)p.out + at + HALF, hi);
    }
}

// A thread: eight channels of a sum of dq. 4 bytes in and 2 out a channel, which bind.
template <typename T, int D>
__global__ void __launch_bounds__(256)
    round_dq_kernel(const float *sums, T *dq, int64_t nq, int heads, int group) {
    const int64_t i = blockIdx.x * 256ll + threadIdx.x, row = i / (D / 8) / heads;
    if (row >= nq) return;
    const int64_t sum = dq_accum_row(nq, group, row, (int)(i / (D / 8) % heads));
    const float4 *from = (const float4 *)(sums + sum * D + dq_accum_chunk(sum, (int)(i % (D / 8))) * 8);
    const float4 x = from[0], y = from[1];
    ((uint4 *)dq)[i] =
        make_uint4(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w), pack2<T>(y.x, y.y), pack2<T>(y.z, y.w));
}

template <typename T, int D> static int launch_rope(const Rope &p, cudaStream_t stream) {
    unsigned blocks = (unsigned)((p.rows + 7) / 8);
    if (blocks == 0) return FSA_OK;
    rope_kernel<T, D><<<blocks, 128, 0, stream>>>(p);
    return launch_status();
}
template <typename T, int D>
static int launch_round_dq(const FsaConfig *c, const BatchLayout *p, const float *sums, void *dq,
                           cudaStream_t stream) {
    const int64_t threads = p->nq * c->q_heads * (D / 8);
    if (threads == 0) return FSA_OK;
    round_dq_kernel<T, D><<<(unsigned)((threads + 255) / 256), 256, 0, stream>>>(
        sums, (T *)dq, p->nq, c->q_heads, c->q_heads / c->kv_heads);
    return launch_status();
}

static int rope(const FsaConfig *c, FsaDtype dtype, Rope p, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    p.rows = p.queries ? p.batch.nq : p.batch.n;
    p.heads = p.queries ? c->q_heads : c->kv_heads;
    return FSA_DISPATCH(dtype, c->head_dim, launch_rope, p, stream);
}

int fsa_rope_queries(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *x,
                     const double *inv_freq, void *out, cudaStream_t stream) {
    return rope(c, dtype, Rope{*p, 1, 0, 0, x, inv_freq, out}, stream);
}
int fsa_rope_keys(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const void *x, const double *inv_freq,
                  void *out, cudaStream_t stream) {
    return rope(c, dtype, Rope{*p, 0, 0, 0, x, inv_freq, out}, stream);
}
int fsa_convert_dq(const FsaConfig *c, const BatchLayout *p, FsaDtype dtype, const float *sums, void *dq,
                 cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    return FSA_DISPATCH(dtype, c->head_dim, launch_round_dq, c, p, sums, dq, stream);
}
