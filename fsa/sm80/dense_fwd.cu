// sm80/dense_fwd.cu: forward pass of dense attention by mma.sync and cp.async. ../dense.cuh lists the rules.
//
//     S = scale Q K^T, masked    P = exp(S - max)    O = P V / sum(P)    lse = max + ln sum(P)
//
// A thread block computes O and lse of 128 queries of one query head, with four warps of 32 queries each. Q
// stays in shared memory. K and V come in tiles of 64 keys, double buffered:
//
//     cp.async    K, V of tile j + 1
//     warps       S = Q K^T of tile j | mask | online softmax, rescale O | O += P V
//
// Thread blocks with the longest rows start first. Heads of a group are neighbors in the grid, so that K and
// V come from HBM once and then from L2. Shared memory: 96 KiB at d = 128. A warp sums over the keys of a row
// in ascending order, so O and lse are reproducible.
//
// Lower bounds at 64K tokens, (32, 8) heads, d = 128; rates in ../README.md. Matmuls: 4*d FLOPs per visible
// pair. HBM: q, k, v, o once.
//
//                   matmuls                    exp                HBM
//     causal          35 TFLOP    44.5 ms      69 G    18.6 ms    1.3 GB    0.3 ms
//     compressed     2.2 TFLOP     2.8 ms     4.3 G     1.2 ms    1.1 GB    0.2 ms
//     window 512    0.55 TFLOP     0.7 ms     1.1 G     0.3 ms    1.3 GB    0.3 ms
//
// The kernel is limited by the matmuls under every rule. mma.sync reaches about 60% of Hopper's matmul rate.
#include "dense.cuh"

enum { ROWS = 128 }; // queries of a thread block

// Online softmax of a warp's 32 queries. A lane holds rows lane/4 + 8*half of each m16 block: its maximum and
// its sum over the lane's keys.
struct DenseSoftmaxState {
    float row_max[2][2], row_sum[2][2]; // [m16 blocks][halves]
    __device__ __forceinline__ DenseSoftmaxState() : row_sum() {
        for (int i = 0; i < 4; i++) row_max[i / 2][i % 2] = -INFINITY;
    }
};

// S [32 queries, 64 keys] becomes P = exp2(scale S - max), unnormalized. Rescales out [32, D] and the row
// sums to the new maximum.
template <int N, int D8>
static __device__ __forceinline__ void online_softmax(float (&s)[2][N][4], float (&out)[2][D8][4],
                                                      DenseSoftmaxState &state, float scale) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float new_max = state.row_max[m][half];
#pragma unroll
            for (int n = 0; n < N; n++) {
                new_max = fmaxf(new_max, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
            }
            new_max = quad_reduce_max(new_max);
            // While a row has seen no key, its maximum is -inf. 0 instead avoids inf - inf.
            float scaled_max = new_max == -INFINITY ? 0 : new_max * scale;
            float rescale = exp2_fast(state.row_max[m][half] * scale - scaled_max), tile_sum = 0;
            state.row_max[m][half] = new_max;
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = s[m][n][half * 2 + e];
                    x = exp2_fast(x * scale - scaled_max);
                    tile_sum += x;
                }
            }
            state.row_sum[m][half] = state.row_sum[m][half] * rescale + tile_sum;
#pragma unroll
            for (int n = 0; n < D8; n++) {
                out[m][n][half * 2] *= rescale;
                out[m][n][half * 2 + 1] *= rescale;
            }
        }
    }
}

// Writes o [32 queries, D] and lse of a warp, normalized. A warp stages o in its own rows of the Q tile,
// `smem`, and writes it in 16-byte chunks.
template <typename T, int D>
static __device__ __forceinline__ void store_o_lse(const DenseParams &p, const QueryTile &tile,
                                                   const float (&out)[2][D / 8][4],
                                                   const DenseSoftmaxState &state, char *smem) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp * 32 + m * 16 + half * 8 + lane / 4;
            float total = quad_reduce_sum(state.row_sum[m][half]), inverse = total != 0 ? 1 / total : 0;
            if (lane % 4 == 0 && row < tile.rows.rows) {
                p.lse[(tile.rows.row + row) * p.q_heads + tile.q_head] =
                    total != 0 ? state.row_max[m][half] * p.scale + logf(total) : -INFINITY;
            }
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                *(uint32_t *)(smem + swizzled<D>(row, n) + (lane % 4) * 4) =
                    pack2<T>(out[m][n][half * 2] * inverse, out[m][n][half * 2 + 1] * inverse);
            }
        }
    }
    __syncwarp();
    T *o = (T *)p.o.data + tile.rows.row * p.o.stride + tile.q_head * D;
#pragma unroll
    for (int i = 0; i < 32 * (D / 8) / 32; i++) {
        int row = warp * 32 + (i * 32 + lane) / (D / 8), chunk = (i * 32 + lane) % (D / 8);
        if (row < tile.rows.rows) {
            *(uint4 *)(o + row * p.o.stride + chunk * 8) = *(uint4 *)(smem + swizzled<D>(row, chunk));
        }
    }
}

// A thread block: O and lse of ROWS queries of one query head, 32 per warp.
template <typename T, int D>
__global__ void __launch_bounds__(DENSE_THREADS, 2) dense_forward_kernel(const DenseParams p) {
    extern __shared__ __align__(128) char shared[]; // Q [ROWS, D], K and V: two stages each
    uint32_t smem_q = smem_address(shared);
    int warp = threadIdx.x / 32;
    const RowTile rows = find_queries<ROWS>(p);
    if (rows.rows == 0) return;
    const QueryTile tile = make_query_tile(p, rows);
    KvStages<T, D> kv(p, tile, smem_q + ROWS * D * 2);

    const T *q = (const T *)p.q.data + rows.row * p.q.stride + tile.q_head * D;
    load_tile<ROWS, D, DENSE_THREADS>(smem_q, q, p.q.stride, rows.rows);
    if (tile.begin < tile.end) kv.load(tile.begin, 0);
    cp_async_commit();

    float out[2][D / 8][4] = {}, scale = p.scale * FSA_LOG2E;
    DenseSoftmaxState softmax;
    int stage = 0;
    for (int j0 = tile.begin; j0 < tile.end; j0 += DENSE_KEYS, stage ^= 1) {
        if (j0 + DENSE_KEYS < tile.end) kv.load(j0 + DENSE_KEYS, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();

        // S = Q K^T
        float s[2][DENSE_KEYS / 8][4] = {};
        mma_tiles<T, D>(s, RowOperand<D>{smem_q, warp * 32}, RowOperand<D>{kv.k_tile(stage), 0});
        int t0 = tile.first_pos + warp * 32;
        if (needs_mask(p.mask, t0, 32, j0, DENSE_KEYS)) {
#pragma unroll
            for (int m = 0; m < 2; m++) mask_scores(s[m], p.mask, t0 + m * 16, j0);
        }
        online_softmax(s, out, softmax, scale);
        // O += P V
        mma_tiles<T, DENSE_KEYS>(out, accum_operand<T>(s), ColumnOperand<D>{kv.v_tile(stage), 0});
        __syncthreads();
    }
    cp_async_wait<0>();
    __syncthreads();
    store_o_lse<T, D>(p, tile, out, softmax, shared);
}

template <typename T, int D> static int launch_forward(const DenseParams &d, cudaStream_t stream) {
    int bytes = (ROWS + 4 * DENSE_KEYS) * D * 2;
    int64_t blocks = max_row_tiles(d.batch.nq, d.batch.num_segments, ROWS) * d.q_heads;
    if (blocks == 0) return FSA_OK;
    return LAUNCH((dense_forward_kernel<T, D>), (unsigned)blocks, DENSE_THREADS, bytes, stream, d);
}

int fsa_dense_forward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, launch_forward, d, stream);
}
