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
#include "../dense.cuh"
#include "tile.cuh"

template <typename T, int D>
__global__ void __launch_bounds__(128, 2) dense_forward_kernel(const DenseParams p) {
    constexpr int ROWS = 128, KEYS = 64, K_BYTES = KEYS * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t smem_q = smem_address(shared), smem_k = smem_q + ROWS * D * 2, smem_v = smem_k + 2 * K_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    int64_t num_tiles = gridDim.x / p.q_heads, tile = num_tiles - 1 - blockIdx.x / p.q_heads;
    int q_head = blockIdx.x % p.q_heads, kv_head = q_head / (p.q_heads / p.kv_heads);
    RowTile rows = find_row_tile(p.batch.cu_queries, p.batch.num_segments, ROWS, tile);
    if (rows.rows == 0) return;
    FsaSegment segment = p.batch.segments[rows.cu_index];
    int first_pos = (int)segment.pos + rows.first, last_pos = first_pos + rows.rows - 1;
    int end = p.mask.end_key(last_pos), begin = p.mask.first_key(first_pos) / KEYS * KEYS;

    int64_t q_stride = (int64_t)p.q_heads * D, kv_stride = (int64_t)p.kv_heads * D;
    const T *q = (const T *)p.q.data + rows.row * q_stride + q_head * D;
    int64_t kv_offset = p.cu_keys[segment.seq] * kv_stride + kv_head * D;
    const T *k = (const T *)p.k.data + kv_offset, *v = (const T *)p.v.data + kv_offset;

    auto load_keys = [&](int j, int stage) {
        load_tile<KEYS, D, 128>(smem_k + stage * K_BYTES, k + j * kv_stride, kv_stride, end - j);
        load_tile<KEYS, D, 128>(smem_v + stage * K_BYTES, v + j * kv_stride, kv_stride, end - j);
    };
    load_tile<ROWS, D, 128>(smem_q, q, q_stride, rows.rows);
    if (begin < end) load_keys(begin, 0);
    cp_async_commit();

    float out[2][D / 8][4] = {}, row_max[2][2], row_sum[2][2] = {};
    for (int i = 0; i < 4; i++) row_max[i / 2][i % 2] = -INFINITY;
    float scale = p.scale * FSA_LOG2E;
    int stage = 0;
    for (int j0 = begin; j0 < end; j0 += KEYS, stage ^= 1) {
        if (j0 + KEYS < end) load_keys(j0 + KEYS, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        uint32_t tile_k = smem_k + stage * K_BYTES, tile_v = smem_v + stage * K_BYTES;

        // S = Q K^T
        float s[2][KEYS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t a[2][4];
            load_a<D>(a[0], smem_q, warp * 32, kk);
            load_a<D>(a[1], smem_q, warp * 32 + 16, kk);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, tile_k, n * 16, kk);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_16816<T>(s[m][2 * n], a[m], b[0], b[1]);
                    mma_16816<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

        // Mask, if some query of the tile does not see some of its keys
        int t0 = first_pos + warp * 32;
        if (!p.mask.visible(t0, j0 + KEYS - 1) || j0 < p.mask.first_key(t0 + 31)) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int t = t0 + m * 16 + e / 2 * 8 + lane / 4, j = j0 + n * 8 + lane % 4 * 2 + e % 2;
                        if (!p.mask.visible(t, j)) s[m][n][e] = -INFINITY;
                    }
                }
            }
        }
        // Online softmax: S becomes P, O is rescaled to the new maximum
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float new_max = row_max[m][half];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
                    new_max = fmaxf(new_max, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
                }
                new_max = quad_reduce_max(new_max);
                // While a row has seen no key, its maximum is -inf. 0 instead avoids inf - inf.
                float scaled_max = new_max == -INFINITY ? 0 : new_max * scale;
                float rescale = exp2_fast(row_max[m][half] * scale - scaled_max), tile_sum = 0;
                row_max[m][half] = new_max;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = s[m][n][half * 2 + e];
                        x = exp2_fast(x * scale - scaled_max);
                        tile_sum += x;
                    }
                }
                row_sum[m][half] = row_sum[m][half] * rescale + tile_sum;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    out[m][n][half * 2] *= rescale;
                    out[m][n][half * 2 + 1] *= rescale;
                }
            }
        }
        // O += P V
#pragma unroll
        for (int kk = 0; kk < KEYS / 16; kk++) {
            uint32_t a[2][4];
            for (int m = 0; m < 2; m++) accum_as_a<T>(a[m], s[m][2 * kk], s[m][2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tile_v, kk * 16, n);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_16816<T>(out[m][2 * n], a[m], b[0], b[1]);
                    mma_16816<T>(out[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();
    __syncthreads();

    // Epilogue: each warp stages O in its own rows of the Q tile and writes it in 16-byte chunks.
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp * 32 + m * 16 + half * 8 + lane / 4;
            float total = quad_reduce_sum(row_sum[m][half]), inverse = total > 0 ? 1 / total : 0;
            if (lane % 4 == 0 && row < rows.rows) {
                p.lse[(rows.row + row) * p.q_heads + q_head] =
                    total > 0 ? row_max[m][half] * p.scale + logf(total) : -INFINITY;
            }
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                *(uint32_t *)(shared + swizzled<D>(row, n) + (lane % 4) * 4) =
                    pack2<T>(out[m][n][half * 2] * inverse, out[m][n][half * 2 + 1] * inverse);
            }
        }
    }
    __syncwarp();
    T *o = (T *)p.o.data + rows.row * q_stride + q_head * D;
#pragma unroll
    for (int i = 0; i < 32 * (D / 8) / 32; i++) {
        int row = warp * 32 + (i * 32 + lane) / (D / 8), chunk = (i * 32 + lane) % (D / 8);
        if (row < rows.rows) {
            *(uint4 *)(o + row * q_stride + chunk * 8) = *(uint4 *)(shared + swizzled<D>(row, chunk));
        }
    }
}

template <typename T, int D> static int launch_forward(const DenseParams &d, cudaStream_t stream) {
    int bytes = (128 + 4 * 64) * D * 2;
    int64_t blocks = max_row_tiles(d.batch.nq, d.batch.num_segments, 128) * d.q_heads;
    if (blocks == 0) return FSA_OK;
    return LAUNCH((dense_forward_kernel<T, D>), (unsigned)blocks, 128, bytes, stream, d);
}

int fsa_dense_forward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, launch_forward, d, stream);
}
