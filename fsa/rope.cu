// rope.cu: RoPE of queries and keys, and the conversion of dq_accum to 16 bits. selected_combine.cu applies
// the inverse RoPE to the gradients.
//
// Lower bound for 64K tokens, 32 heads, d = 128: 0.54 GB in, 0.54 GB out, 0.24 ms. Memory-bound.
#include "kernels.h"
#include "rope.cuh"
#include "launch.cuh"
#include "mma.cuh"

struct RopeParams {
    BatchLayout batch;
    int is_query;           // 1: x is q, at the positions of the segments; 0: x is k
    int heads;              // Hq or Hkv
    int64_t tokens;         // Nq or N
    const void *x;          // [tokens, heads, D]
    const double *inv_freq; // [D/2]; NULL: copy
    void *out;              // [tokens, heads, D]
};

// Convert eight 16-bit channels, 16 bytes, to floats and back.
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

// out = RoPE(x): channels c and c + D/2 are rotated by position * inv_freq[c].
// A thread block handles all heads of 8 tokens, so each angle is computed once per token. A thread handles 8
// channels of the lower half, and the same 8 channels of the upper half.
template <typename T, int D> __global__ void __launch_bounds__(128) rope_kernel(const RopeParams p) {
    constexpr int TOKENS = 8, HALF = D / 2, VECS = HALF / 8; // vectors of 8 channels
    __shared__ float2 cos_sin[TOKENS][HALF];
    int64_t token0 = blockIdx.x * (int64_t)TOKENS;
    int tokens = p.tokens - token0 < TOKENS ? (int)(p.tokens - token0) : TOKENS;
    if (p.inv_freq) {
        for (int i = threadIdx.x; i < tokens * HALF; i += 128) {
            int64_t token = token0 + i / HALF, seq, pos;
            if (p.is_query) {
                query_position(p.batch, token, &seq, &pos);
            } else {
                seq = find_in_cu(p.batch.cu_seqlens, p.batch.num_seqs, token);
                pos = token - p.batch.cu_seqlens[seq];
            }
            cos_sin[i / HALF][i % HALF] = rope_cos_sin(pos, p.inv_freq[i % HALF]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * p.heads * VECS; i += 128) {
        int token = i / (p.heads * VECS), vec = i % VECS;
        int64_t offset = ((token0 + token) * p.heads + i / VECS % p.heads) * D + vec * 8;
        float lo[8], hi[8];
        load8(lo, (const T *)p.x + offset);
        load8(hi, (const T *)p.x + offset + HALF);
        if (p.inv_freq) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 cs = cos_sin[token][vec * 8 + j];
                float x = lo[j], y = hi[j];
                lo[j] = x * cs.x - y * cs.y;
                hi[j] = y * cs.x + x * cs.y;
            }
        }
        store8((T *)p.out + offset, lo);
        store8((T *)p.out + offset + HALF, hi);
    }
}

// dq [Nq, Hq, D] in 16 bits from dq_accum, whose layout dq_accum_row describes (kernels.h). A thread handles
// 8 channels. It reads 4 bytes and writes 2 bytes per channel. Memory-bound.
template <typename T, int D>
__global__ void __launch_bounds__(256)
    convert_dq_kernel(const float *dq_accum, T *dq, int64_t nq, int heads, int group) {
    const int64_t i = blockIdx.x * 256ll + threadIdx.x, query = i / (D / 8) / heads;
    if (query >= nq) return;
    const int64_t accum_row = dq_accum_row(nq, group, query, (int)(i / (D / 8) % heads));
    const float4 *from =
        (const float4 *)(dq_accum + accum_row * D + dq_accum_chunk(accum_row, (int)(i % (D / 8))) * 8);
    const float4 x = from[0], y = from[1];
    ((uint4 *)dq)[i] =
        make_uint4(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w), pack2<T>(y.x, y.y), pack2<T>(y.z, y.w));
}

template <typename T, int D> static int launch_rope(const RopeParams &p, cudaStream_t stream) {
    unsigned blocks = (unsigned)((p.tokens + 7) / 8);
    if (blocks == 0) return FSA_OK;
    return LAUNCH((rope_kernel<T, D>), blocks, 128, 0, stream, p);
}
template <typename T, int D>
static int launch_convert_dq(const FsaConfig *c, const BatchLayout *batch, const float *dq_accum, void *dq,
                             cudaStream_t stream) {
    const int64_t threads = batch->nq * c->q_heads * (D / 8);
    if (threads == 0) return FSA_OK;
    return LAUNCH((convert_dq_kernel<T, D>), (unsigned)((threads + 255) / 256), 256, 0, stream, dq_accum,
                  (T *)dq, batch->nq, c->q_heads, c->q_heads / c->kv_heads);
}

static int run_rope(const FsaConfig *c, FsaDtype dtype, RopeParams p, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    p.tokens = p.is_query ? p.batch.nq : p.batch.n;
    p.heads = p.is_query ? c->q_heads : c->kv_heads;
    return FSA_DISPATCH(dtype, c->head_dim, launch_rope, p, stream);
}

int fsa_rope_queries(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const void *x,
                     const double *inv_freq, void *out, cudaStream_t stream) {
    return run_rope(c, dtype, RopeParams{*batch, 1, 0, 0, x, inv_freq, out}, stream);
}
int fsa_rope_keys(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const void *x,
                  const double *inv_freq, void *out, cudaStream_t stream) {
    return run_rope(c, dtype, RopeParams{*batch, 0, 0, 0, x, inv_freq, out}, stream);
}
int fsa_convert_dq(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const float *dq_accum,
                   void *dq, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    return FSA_DISPATCH(dtype, c->head_dim, launch_convert_dq, c, batch, dq_accum, dq, stream);
}
