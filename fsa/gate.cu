// gate.cu: the backward pass of the gate, and the preprocessing of the branches' backward passes. The forward
// pass of the gate, the gated sum, is in selected_combine.cu.
//
// For each row (query, head) and branch i, with gate_i = sigmoid(logit_i):
//   delta_i = <dout, o_i>       lse_bwd_i = lse_i - ln(gate_i), or +inf if lse_i = -inf
//   dlogit_i = delta_i * gate_i * (1 - gate_i), summed over the heads if per_token
// dout is the gradient of the gated sum. exp(s - lse_bwd) is gate * P, so the branches read the same, ungated
// dout. Without a gate, lse_bwd = lse, and there is no dlogit.
//
// A warp handles one query. D/8 lanes compute the dot products of one head; then each lane finishes one of 32
// heads. The order of the sums is fixed, so the results are bitwise reproducible.
//
// Lower bounds for 64K tokens, 32 heads, d = 128, three branches:
//     2.1 GB of dout and o in                                      0.48 ms
// Memory-bound. Instruction issue, about 130 instructions per two heads, takes nearly as long.
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"

struct BwdPreprocessParams {
    int64_t rows;           // Nq * Hq
    int q_heads, per_token; // per_token: 1 if all heads of a query share three gates
    ConstRows logits;       // [Nq, Hq, 3], or [Nq, 3] if per_token; NULL: no gate
    ConstRows o[3];         // [Nq, Hq, D] of each branch
    ConstRows dout;         // [Nq, Hq, D]
    const float *lse[3];    // [Nq, Hq] of each branch
    float *delta[3];        // [Nq, Hq] of each branch
    float *lse_bwd[3];      // [Nq, Hq] of each branch; NULL: not written
    Rows dlogits;           // as logits
};

// Returns a query's row of x.
template <typename T> static __device__ __forceinline__ const T *row_of(const ConstRows &x, int64_t query) {
    return (const T *)x.data + query * x.stride;
}

// delta, lse_bwd and dlogits of BRANCHES branches.
template <typename T, int D, int BRANCHES>
__global__ void __launch_bounds__(256) bwd_preprocess_kernel(BwdPreprocessParams p) {
    constexpr int LANES = D / 8, HEADS = 32 / LANES; // lanes per head, heads at once
    int64_t query = blockIdx.x * 8ll + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (query * p.q_heads >= p.rows) return;
    const uint4 *const dout = (const uint4 *)row_of<T>(p.dout, query), *o[BRANCHES];
#pragma unroll
    for (int i = 0; i < BRANCHES; i++) o[i] = (const uint4 *)row_of<T>(p.o[i], query);
    T *const dlogits = (T *)p.dlogits.data + query * p.dlogits.stride;
    float query_sum[BRANCHES] = {}; // dlogits of the query, if per_token
    for (int head0 = 0; head0 < p.q_heads; head0 += 32) {
        const int64_t row0 = query * p.q_heads + head0;
        const int heads = min(32, p.q_heads - head0);
        float dots[BRANCHES] = {}; // delta of head head0 + lane
#pragma unroll 2
        for (int first = 0; first < heads; first += HEADS) {
            const bool valid = first + lane / LANES < heads;
            const int at = (head0 + first) * LANES + lane;
            uint4 g = valid ? dout[at] : make_uint4(0, 0, 0, 0);
            const uint32_t gw[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
            for (int i = 0; i < BRANCHES; i++) {
                uint4 x = valid ? o[i][at] : make_uint4(0, 0, 0, 0);
                const uint32_t xw[4] = {x.x, x.y, x.z, x.w};
                float sum = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float2 u = unpack2<T>(gw[j]), w = unpack2<T>(xw[j]);
                    sum += u.x * w.x + u.y * w.y;
                }
                for (int j = LANES / 2; j > 0; j /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, j);
                sum = __shfl_sync(0xffffffffu, sum, lane % HEADS * LANES);
                if (lane / HEADS * HEADS == first) dots[i] = sum;
            }
        }
        const int64_t row = row0 + lane;
#pragma unroll
        for (int i = 0; i < BRANCHES; i++) {
            float dlogit = 0;
            if (lane < heads) {
                float lse = p.lse[i][row], shift = 0;
                if (p.logits.data) {
                    const int index = (p.per_token ? 0 : head0 + lane) * 3 + i;
                    float x = to_f32(row_of<T>(p.logits, query)[index]), gate = sigmoid(x);
                    shift = x > 0 ? log1pf(__expf(-x)) : log1pf(__expf(x)) - x; // -ln(gate)
                    dlogit = dots[i] * gate * (1 - gate);
                    if (!p.per_token) dlogits[index] = (T)dlogit;
                }
                p.delta[i][row] = dots[i];
                if (p.lse_bwd[i]) p.lse_bwd[i][row] = lse == -INFINITY ? INFINITY : lse + shift;
            }
            if (p.per_token) {
                for (int j = 16; j > 0; j /= 2) dlogit += __shfl_xor_sync(0xffffffffu, dlogit, j);
                query_sum[i] += dlogit;
            }
        }
    }
    if (p.per_token && lane == 0) {
        for (int i = 0; i < BRANCHES; i++) dlogits[i] = (T)query_sum[i];
    }
}

template <typename T, int D>
static int launch_gate_backward(const BwdPreprocessParams &p, unsigned grid, cudaStream_t stream) {
    return LAUNCH((bwd_preprocess_kernel<T, D, 3>), grid, 256, 0, stream, p);
}
template <typename T, int D>
static int launch_bwd_preprocess(const BwdPreprocessParams &p, unsigned grid, cudaStream_t stream) {
    return LAUNCH((bwd_preprocess_kernel<T, D, 1>), grid, 256, 0, stream, p);
}

int fsa_gate_backward(const FsaConfig *c, FsaDtype dtype, int64_t nq, ConstRows logits,
                      const void *const o_branch[3], const float *const lse[3], ConstRows dout,
                      float *const delta[3], float *const lse_bwd[3], Rows dlogits, cudaStream_t stream) {
    if (nq == 0) return FSA_OK;
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    BwdPreprocessParams p = {nq * c->q_heads, c->q_heads, c->gate_per_token, logits};
    p.dout = dout, p.dlogits = dlogits;
    for (int i = 0; i < 3; i++) {
        p.o[i] = packed_q(c, o_branch[i]);
        p.lse[i] = lse[i], p.delta[i] = delta[i], p.lse_bwd[i] = lse_bwd[i];
    }
    unsigned grid = (unsigned)((nq + 7) / 8);
    return FSA_DISPATCH(dtype, c->head_dim, launch_gate_backward, p, grid, stream);
}

int fsa_bwd_preprocess(const FsaConfig *c, FsaDtype dtype, int64_t nq, ConstRows o, const float *lse,
                       ConstRows dout, float *delta, float *lse_bwd, cudaStream_t stream) {
    if (nq == 0) return FSA_OK;
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    BwdPreprocessParams p = {nq * c->q_heads, c->q_heads, 0, {NULL, 0}};
    p.o[0] = o, p.dout = dout, p.lse[0] = lse, p.delta[0] = delta, p.lse_bwd[0] = lse_bwd;
    unsigned grid = (unsigned)((nq + 7) / 8);
    return FSA_DISPATCH(dtype, c->head_dim, launch_bwd_preprocess, p, grid, stream);
}
