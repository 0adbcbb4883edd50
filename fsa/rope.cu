// rope.cu: RoPE of queries and keys; inverse RoPE of fp32 gradients and their conversion to 16 bits.
// selected_combine.cu applies the inverse RoPE to the gradients of fsa_backward itself.
//
// Lower bound for 64K tokens, 32 heads, d = 128: 0.54 GB in, 0.54 GB out, 0.24 ms; from fp32 1.07 GB in, 0.36
// ms. Memory-bound.
#include "kernels.h"
#include "rope.cuh"
#include "launch.cuh"
#include "mma.cuh"

// The layout of the input.
enum RopeInput {
    ROPE_ROWS,     // 16-bit rows of q or k: RoPE
    ROPE_DQ_ACCUM, // dq_accum (kernels.h): inverse RoPE
    ROPE_FP32      // packed fp32 rows of dk or dv: inverse RoPE
};

struct RopeParams {
    BatchLayout batch;
    int is_query;              // 1: rows of queries, at the positions of the segments; 0: rows of keys
    int heads, group;          // Hq or Hkv; Hq/Hkv
    int64_t tokens;            // rows, or an upper bound
    const int64_t *num_tokens; // the number of rows, on the device; NULL: `tokens`
    ConstRows x;               // [tokens, heads, D]
    const double *inv_freq;    // [D/2]; NULL: no rotation
    Rows out;                  // [tokens, heads, D]
};

// Loads channels channel .. channel + 7 of a head of a token.
template <typename T, int D, RopeInput INPUT>
__device__ __forceinline__ void load8(float (&x)[8], const RopeParams &p, int64_t token, int head,
                                      int channel) {
    if (INPUT == ROPE_ROWS) {
        const uint4 bits = *(const uint4 *)((const T *)p.x.data + token * p.x.stride + head * D + channel);
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = unpack2<T>(words[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    } else {
        const float *from = (const float *)p.x.data;
        if (INPUT == ROPE_DQ_ACCUM) {
            const int64_t row = dq_accum_row(p.tokens, p.group, token, head);
            from += row * D + dq_accum_chunk(row, channel / 8) * 8;
        } else {
            from += token * p.x.stride + head * D + channel;
        }
        const float4 lo = ((const float4 *)from)[0], hi = ((const float4 *)from)[1];
        x[0] = lo.x, x[1] = lo.y, x[2] = lo.z, x[3] = lo.w;
        x[4] = hi.x, x[5] = hi.y, x[6] = hi.z, x[7] = hi.w;
    }
}
template <typename T> __device__ __forceinline__ void store8(T *to, const float (&x)[8]) {
    *(uint4 *)to =
        make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}

// out = x in 16 bits, channels c and c + D/2 rotated by position * inv_freq[c], or by its negative for
// gradients. A thread block handles all heads of 8 tokens, so each angle is computed once per token. A thread
// handles 8 channels of the lower half, and the same 8 channels of the upper half.
template <typename T, int D, RopeInput INPUT>
__global__ void __launch_bounds__(128) rope_kernel(const RopeParams p) {
    constexpr int TOKENS = 8, HALF = D / 2, VECS = HALF / 8; // vectors of 8 channels
    __shared__ float2 cos_sin[TOKENS][HALF];
    const int64_t token0 = blockIdx.x * (int64_t)TOKENS,
                  left = (p.num_tokens ? *p.num_tokens : p.tokens) - token0;
    const int tokens = left < TOKENS ? (int)left : TOKENS;
    if (p.inv_freq) {
        for (int i = threadIdx.x; i < tokens * HALF; i += 128) {
            int64_t token = token0 + i / HALF, seq, pos;
            if (p.is_query) {
                query_position(p.batch, token, &seq, &pos);
            } else {
                seq = find_in_cu(p.batch.cu_seqlens, p.batch.num_seqs, token);
                pos = token - p.batch.cu_seqlens[seq];
            }
            const float2 cs = rope_cos_sin(pos, p.inv_freq[i % HALF]);
            cos_sin[i / HALF][i % HALF] = make_float2(cs.x, INPUT == ROPE_ROWS ? cs.y : -cs.y);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * p.heads * VECS; i += 128) {
        const int token = i / (p.heads * VECS), head = i / VECS % p.heads, vec = i % VECS;
        float lo[8], hi[8];
        load8<T, D, INPUT>(lo, p, token0 + token, head, vec * 8);
        load8<T, D, INPUT>(hi, p, token0 + token, head, vec * 8 + HALF);
        if (p.inv_freq) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 cs = cos_sin[token][vec * 8 + j];
                const float x = lo[j], y = hi[j];
                lo[j] = x * cs.x - y * cs.y;
                hi[j] = y * cs.x + x * cs.y;
            }
        }
        T *const out = (T *)p.out.data + (token0 + token) * p.out.stride + head * D + vec * 8;
        store8(out, lo);
        store8(out + HALF, hi);
    }
}

template <typename T, int D>
static int launch_rope(const RopeParams &p, RopeInput input, cudaStream_t stream) {
    const unsigned blocks = (unsigned)((p.tokens + 7) / 8);
    if (blocks == 0) return FSA_OK;
    switch (input) {
    case ROPE_ROWS:
        return LAUNCH((rope_kernel<T, D, ROPE_ROWS>), blocks, 128, 0, stream, p);
    case ROPE_DQ_ACCUM:
        return LAUNCH((rope_kernel<T, D, ROPE_DQ_ACCUM>), blocks, 128, 0, stream, p);
    default:
        return LAUNCH((rope_kernel<T, D, ROPE_FP32>), blocks, 128, 0, stream, p);
    }
}

static int run_rope(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, int is_query,
                    RopeInput input, ConstRows x, const double *inv_freq, Rows out, bool compressed,
                    cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    RopeParams p = {*batch, is_query, is_query ? c->q_heads : c->kv_heads, c->q_heads / c->kv_heads};
    p.tokens = is_query ? batch->nq : batch->n;
    if (compressed) p.tokens = fsa_max_windows(c, batch), p.num_tokens = batch->cu_windows + batch->num_seqs;
    p.x = x, p.inv_freq = inv_freq, p.out = out;
    return FSA_DISPATCH(dtype, c->head_dim, launch_rope, p, input, stream);
}

int fsa_rope_queries(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows x,
                     const double *inv_freq, void *out, cudaStream_t stream) {
    return run_rope(c, batch, dtype, 1, ROPE_ROWS, x, inv_freq, packed_q(c, out), false, stream);
}
int fsa_rope_keys(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows x,
                  const double *inv_freq, void *out, cudaStream_t stream) {
    return run_rope(c, batch, dtype, 0, ROPE_ROWS, x, inv_freq, packed_kv(c, out), false, stream);
}
int fsa_convert_dq(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const float *dq_accum,
                   const double *inv_freq, Rows dq, cudaStream_t stream) {
    return run_rope(c, batch, dtype, 1, ROPE_DQ_ACCUM, packed_q(c, (const void *)dq_accum), inv_freq, dq,
                    false, stream);
}
int fsa_convert_dkv(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const float *x,
                    bool compressed, const double *inv_freq, Rows out, cudaStream_t stream) {
    return run_rope(c, batch, dtype, 0, ROPE_FP32, packed_kv(c, (const void *)x), inv_freq, out, compressed,
                    stream);
}
