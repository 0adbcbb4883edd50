// gate.cu: the gradient of the gate over the three branches, and the row statistics that their backward
// passes read. (The gated sum itself: selected_combine_kernel.)
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"

struct GateArgs {
    int64_t rows;           // Nq * Hq
    int q_heads, per_token; // per_token: one gate triple for all heads
    const void *logits, *o[3], *dout;
    const float *lse[3];
    float *delta[3], *lse_bwd[3];
    void *out; // dlogits
};

template <typename T> static __device__ __forceinline__ float load1(const void *p, int64_t i) {
    return (float)((const T *)p)[i];
}

// A warp takes one token: D/8 lanes a head, the heads in turn; what follows for a head from its sums is then
// one lane's work, 32 heads at once. Reads BRANCHES + 1 rows of d a (token, head); writes a few words. 64K
// tokens, 32 heads, d = 128, three branches: 2.1 GB, 0.48 ms at 4.5 TB/s; memory binds, closely followed by
// instructions, some 130 for two heads.
template <typename T, int D, int BRANCHES>
__global__ void __launch_bounds__(256) bwd_preprocess_kernel(GateArgs a) {
    constexpr int LANES = D / 8, HEADS = 32 / LANES;
    int64_t token = blockIdx.x * 8ll + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (token * a.q_heads >= a.rows) return;
    float shared_sum[BRANCHES] = {}; // of the gate's gradient, where a token has one triple
    for (int head0 = 0; head0 < a.q_heads; head0 += 32) {
        const int64_t row0 = token * a.q_heads + head0;
        const int heads = min(32, a.q_heads - head0);
        float dots[BRANCHES] = {}; // of head head0 + lane
#pragma unroll 2
        for (int first = 0; first < heads; first += HEADS) {
            const bool valid = first + lane / LANES < heads;
            const int64_t at = (row0 + first) * LANES + lane;
            uint4 g = valid ? ((const uint4 *)a.dout)[at] : make_uint4(0, 0, 0, 0);
            const uint32_t gw[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
            for (int i = 0; i < BRANCHES; i++) {
                uint4 x = valid ? ((const uint4 *)a.o[i])[at] : make_uint4(0, 0, 0, 0);
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
            float gradient = 0;
            if (lane < heads) {
                float lse = a.lse[i][row], shift = 0;
                if (a.logits) {
                    float x = load1<T>(a.logits, (a.per_token ? token : row) * 3 + i), gate = sigmoid(x);
                    shift = x > 0 ? log1pf(__expf(-x)) : log1pf(__expf(x)) - x; // -ln(gate)
                    gradient = dots[i] * gate * (1 - gate);
                    if (!a.per_token) ((T *)a.out)[row * 3 + i] = (T)gradient;
                }
                a.delta[i][row] = dots[i];
                if (a.lse_bwd[i]) a.lse_bwd[i][row] = lse == -INFINITY ? INFINITY : lse + shift;
            }
            if (a.per_token) {
                for (int j = 16; j > 0; j /= 2) gradient += __shfl_xor_sync(0xffffffffu, gradient, j);
                shared_sum[i] += gradient;
            }
        }
    }
    if (a.per_token && lane == 0) {
        for (int i = 0; i < BRANCHES; i++) ((T *)a.out)[token * 3 + i] = (T)shared_sum[i];
    }
}

#define FOR_TYPE_AND_DIM(launch)                                                                             \
    if (type == FSA_BF16 && c->head_dim == 128)                                                              \
        launch(__nv_bfloat16, 128);                                                                          \
    else if (type == FSA_BF16 && c->head_dim == 64)                                                          \
        launch(__nv_bfloat16, 64);                                                                           \
    else if (type == FSA_FP16 && c->head_dim == 128)                                                         \
        launch(__half, 128);                                                                                 \
    else if (type == FSA_FP16 && c->head_dim == 64)                                                          \
        launch(__half, 64);                                                                                  \
    else                                                                                                     \
        return FSA_ERROR_CONFIG

int fsa_gate_backward(const FsaConfig *c, FsaDtype type, int64_t nq, const void *logits,
                      const void *const o_branch[3], const float *const lse[3], const void *dout,
                      float *const delta[3], float *const lse_bwd[3], void *dlogits, cudaStream_t stream) {
    if (nq == 0) return FSA_OK;
    GateArgs a = {
        nq * c->q_heads, c->q_heads, c->gate_per_token, logits, {o_branch[0], o_branch[1], o_branch[2]}};
    a.dout = dout, a.out = dlogits;
    for (int i = 0; i < 3; i++) a.lse[i] = lse[i], a.delta[i] = delta[i], a.lse_bwd[i] = lse_bwd[i];
    unsigned grid = (unsigned)((nq + 7) / 8);
#define LAUNCH(T, D) bwd_preprocess_kernel<T, D, 3><<<grid, 256, 0, stream>>>(a)
    FOR_TYPE_AND_DIM(LAUNCH);
#undef LAUNCH
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

int fsa_bwd_preprocess(const FsaConfig *c, FsaDtype type, int64_t nq, const void *o, const float *lse,
                  const void *dout, float *delta, float *lse_bwd, cudaStream_t stream) {
    if (nq == 0) return FSA_OK;
    GateArgs a = {nq * c->q_heads, c->q_heads, 0, NULL, {o}, dout, {lse}, {delta}, {lse_bwd}, NULL};
    unsigned grid = (unsigned)((nq + 7) / 8);
#define LAUNCH(T, D) bwd_preprocess_kernel<T, D, 1><<<grid, 256, 0, stream>>>(a)
    FOR_TYPE_AND_DIM(LAUNCH);
#undef LAUNCH
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}
