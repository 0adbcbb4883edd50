#include "../dense.cuh"
#include "tile.cuh"

// -------------------------------------------------------------------------------------------------
// Forward
//
// A block: o and lse of 128 queries of one head. Four warps of 32 rows each; Q stays in shared memory,
// K and V come in tiles of 64 keys, double buffered. Blocks start with the longest rows, and the heads of
// a group side by side, so that K and V are read once from HBM and otherwise from L2.
// Bytes: q and o once, 2*d bytes a row each; K and V once (L2: once for every 128 queries of a head).
// Flops: 4*d for each visible pair, whole tiles at the diagonal. The causal and compressed rules are bound
// by arithmetic (flops/790 TFLOP/s; mma.sync reaches about 60% of that on Hopper); so is the window rule
// at W = 512, whose bytes take a tenth of its flops' time.
template <typename T, int D> __global__ void __launch_bounds__(128, 2) dense_forward_kernel(const DenseParams p) {
    constexpr int ROWS = 128, KEYS = 64, K_BYTES = KEYS * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t tile_q = smem_address(shared), tile_k = tile_q + ROWS * D * 2, tile_v = tile_k + 2 * K_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    int64_t tiles = gridDim.x / p.q_heads, index = tiles - 1 - blockIdx.x / p.q_heads;
    int head = blockIdx.x % p.q_heads, kv_head = head / (p.q_heads / p.kv_heads);
    RowTile rows = find_row_tile(p.batch.cu_queries, p.batch.num_segments, ROWS, index);
    if (rows.rows == 0) return;
    FsaSegment segment = p.batch.segments[rows.range];
    int first_pos = (int)segment.pos + rows.first, last_pos = first_pos + rows.rows - 1;
    int end = p.visible.end_key(last_pos), begin = p.visible.first_key(first_pos) / KEYS * KEYS;

    int64_t q_stride = (int64_t)p.q_heads * D, k_stride = (int64_t)p.kv_heads * D;
    const T *q = (const T *)p.q + rows.row * q_stride + head * D;
    int64_t key0 = p.cu_keys[segment.seq] * k_stride + kv_head * D;
    const T *k = (const T *)p.k + key0, *v = (const T *)p.v + key0;

    auto load_keys = [&](int j, int stage) {
        load_tile<KEYS, D, 128>(tile_k + stage * K_BYTES, k + j * k_stride, k_stride, end - j);
        load_tile<KEYS, D, 128>(tile_v + stage * K_BYTES, v + j * k_stride, k_stride, end - j);
    };
    load_tile<ROWS, D, 128>(tile_q, q, q_stride, rows.rows);
    if (begin < end) load_keys(begin, 0);
    cp_async_commit();

    float out[2][D / 8][4] = {}, max[2][2], sum[2][2] = {};
    for (int i = 0; i < 4; i++) max[i / 2][i % 2] = -INFINITY;
    float scale = p.scale * FSA_LOG2E;
    int stage = 0;
    for (int j0 = begin; j0 < end; j0 += KEYS, stage ^= 1) {
        if (j0 + KEYS < end) load_keys(j0 + KEYS, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        uint32_t tk = tile_k + stage * K_BYTES, tv = tile_v + stage * K_BYTES;

        float s[2][KEYS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t a[2][4];
            load_a<D>(a[0], tile_q, warp * 32, kk);
            load_a<D>(a[1], tile_q, warp * 32 + 16, kk);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, tk, n * 16, kk);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_16816<T>(s[m][2 * n], a[m], b[0], b[1]);
                    mma_16816<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

        // Does some query of this tile not see some key of it?
        int t0 = first_pos + warp * 32;
        if (!p.visible(t0, j0 + KEYS - 1) || j0 < p.visible.first_key(t0 + 31)) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int t = t0 + m * 16 + e / 2 * 8 + lane / 4, j = j0 + n * 8 + lane % 4 * 2 + e % 2;
                        if (!p.visible(t, j)) s[m][n][e] = -INFINITY;
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float tile_max = max[m][half];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
                    tile_max = fmaxf(tile_max, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
                }
                tile_max = quad_max(tile_max);
                // A row that has seen nothing yet has no maximum; 0 keeps its differences defined.
                float base = tile_max == -INFINITY ? 0 : tile_max * scale;
                float shrink = exp2_fast(max[m][half] * scale - base), added = 0;
                max[m][half] = tile_max;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = s[m][n][half * 2 + e];
                        x = exp2_fast(x * scale - base);
                        added += x;
                    }
                }
                sum[m][half] = sum[m][half] * shrink + added;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    out[m][n][half * 2] *= shrink;
                    out[m][n][half * 2 + 1] *= shrink;
                }
            }
        }
#pragma unroll
        for (int kk = 0; kk < KEYS / 16; kk++) {
            uint32_t a[2][4];
            for (int m = 0; m < 2; m++) result_as_a<T>(a[m], s[m][2 * kk], s[m][2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tv, kk * 16, n);
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

    // Through the warp's own rows of the Q tile, so that rows are written in 16-byte pieces.
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp * 32 + m * 16 + half * 8 + lane / 4;
            float total = quad_sum(sum[m][half]), inverse = total > 0 ? 1 / total : 0;
            if (lane % 4 == 0 && row < rows.rows) {
                p.lse[(rows.row + row) * p.q_heads + head] =
                    total > 0 ? max[m][half] * p.scale + logf(total) : -INFINITY;
            }
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                *(uint32_t *)(shared + swizzled<D>(row, n) + (lane % 4) * 4) =
                    pack2<T>(out[m][n][half * 2] * inverse, out[m][n][half * 2 + 1] * inverse);
            }
        }
    }
    __syncwarp();
    T *o = (T *)p.o + rows.row * q_stride + head * D;
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
    cudaFuncSetAttribute(dense_forward_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int64_t blocks = row_tile_bound(d.batch.nq, d.batch.num_segments, 128) * d.q_heads;
    if (blocks > 0) dense_forward_kernel<T, D><<<(unsigned)blocks, 128, bytes, stream>>>(d);
    return launch_status();
}

int fsa_dense_forward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, launch_forward, d, stream);
}
