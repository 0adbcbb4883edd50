// sm80/dense_bwd.cu: backward pass of dense attention by mma.sync and cp.async. ../dense.cuh lists the rules.
//
//     S = scale Q K^T    P = exp(S - lse_bwd)    dP = dout V^T    dS = P (dP - delta)
//     dV = P^T dout      dK = scale dS^T Q       dQ = scale dS K
//
// dout is the ungated gradient of the output. lse_bwd = lse - ln(gate), so P is gate * softmax(S).
//
// Two kernels, each of which computes S and dP. That makes 7 matmuls instead of 5, but needs no atomics: one
// thread block computes each sum, in a fixed order, so gradients are reproducible.
//
//     dense_dq_kernel      dQ of 64 queries of a head        4 warps x 16 queries, streams K, V      64 KiB
//     dense_dkdv_kernel    dK, dV of 64 keys of a KV head    4 warps x 16 keys, streams Q, dout      97 KiB
//
// Streamed tiles have 64 rows and are double buffered by cp.async. Shared memory is for d = 128.
//
// Lower bounds at 64K tokens, (32, 8) heads, d = 128, causal; rates in ../README.md. HBM: q, k, v, dout and
// the fp32 results once per kernel that uses them. L2: K and V once per 64 queries of a head, Q and dout once
// per 64 keys.
//
//                          FLOPs per pair    matmuls                exp                HBM
//     dense_dq_kernel      6*d               53 TFLOP    66.8 ms    69 G    18.6 ms    2.4 GB    0.5 ms
//     dense_dkdv_kernel    8*d               70 TFLOP    89.1 ms    69 G    18.6 ms    1.9 GB    0.4 ms
//
// Both are limited by the matmuls. mma.sync reaches about 60% of Hopper's matmul rate.
#include "../dense.cuh"
#include "tile.cuh"

// A thread block: dQ of 64 queries of one query head, 16 per warp. Q and dout stay in registers as A
// operands.
template <typename T, int D> __global__ void __launch_bounds__(128, 2) dense_dq_kernel(const DenseParams p) {
    constexpr int ROWS = 64, KEYS = 64, K_BYTES = KEYS * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t smem_k = smem_address(shared), smem_v = smem_k + 2 * K_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    int64_t num_tiles = gridDim.x / p.q_heads, tile = num_tiles - 1 - blockIdx.x / p.q_heads;
    int q_head = blockIdx.x % p.q_heads, kv_head = q_head / (p.q_heads / p.kv_heads);
    RowTile rows = find_row_tile(p.batch.cu_queries, p.batch.num_segments, ROWS, tile);
    if (rows.rows == 0) return;
    FsaSegment segment = p.batch.segments[rows.cu_index];
    int first_pos = (int)segment.pos + rows.first, last_pos = first_pos + rows.rows - 1;
    int end = p.mask.end_key(last_pos), begin = p.mask.first_key(first_pos) / KEYS * KEYS;

    int64_t q_stride = (int64_t)p.q_heads * D, kv_stride = (int64_t)p.kv_heads * D;
    int64_t q_offset = rows.row * q_stride + q_head * D,
            kv_offset = p.cu_keys[segment.seq] * kv_stride + kv_head * D;
    const T *k = (const T *)p.k.data + kv_offset, *v = (const T *)p.v.data + kv_offset;

    // Q and dout go through the second stage of K and V into registers.
    load_tile<ROWS, D, 128>(smem_k + K_BYTES, (const T *)p.q.data + q_offset, q_stride, rows.rows);
    load_tile<ROWS, D, 128>(smem_v + K_BYTES, (const T *)p.dout.data + q_offset, q_stride, rows.rows);
    auto load_keys = [&](int j, int stage) {
        load_tile<KEYS, D, 128>(smem_k + stage * K_BYTES, k + j * kv_stride, kv_stride, end - j);
        load_tile<KEYS, D, 128>(smem_v + stage * K_BYTES, v + j * kv_stride, kv_stride, end - j);
    };
    if (begin < end) load_keys(begin, 0);
    cp_async_commit();

    float lse[2], delta[2];
    for (int half = 0; half < 2; half++) {
        int row = warp * 16 + half * 8 + lane / 4;
        int64_t lse_index = (rows.row + row) * p.q_heads + q_head;
        // -inf: the row is past the tile's end, or lse_bwd is a plain lse (kernels.h).
        float x = row < rows.rows ? p.lse_bwd[lse_index] : -INFINITY;
        lse[half] = x == -INFINITY ? INFINITY : x * FSA_LOG2E - p_scale_log2<T>(); // sees no key: P = 0
        delta[half] = row < rows.rows ? p.delta[lse_index] : 0;
    }
    cp_async_wait<0>();
    __syncthreads();
    uint32_t q[D / 16][4], dout[D / 16][4];
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        load_a<D>(q[kk], smem_k + K_BYTES, warp * 16, kk);
        load_a<D>(dout[kk], smem_v + K_BYTES, warp * 16, kk);
    }
    __syncthreads();

    float dq[D / 8][4] = {};
    float scale = p.scale * FSA_LOG2E;
    int stage = 0;
    for (int j0 = begin; j0 < end; j0 += KEYS, stage ^= 1) {
        if (j0 + KEYS < end) load_keys(j0 + KEYS, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        uint32_t tile_k = smem_k + stage * K_BYTES, tile_v = smem_v + stage * K_BYTES;

        // S = Q K^T, dP = dout V^T
        float s[KEYS / 8][4] = {}, dp[KEYS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, tile_k, n * 16, kk);
                mma_16816<T>(s[2 * n], q[kk], b[0], b[1]);
                mma_16816<T>(s[2 * n + 1], q[kk], b[2], b[3]);
                load_b<D>(b, tile_v, n * 16, kk);
                mma_16816<T>(dp[2 * n], dout[kk], b[0], b[1]);
                mma_16816<T>(dp[2 * n + 1], dout[kk], b[2], b[3]);
            }
        }
        int t0 = first_pos + warp * 16;
        if (!p.mask.visible(t0, j0 + KEYS - 1) || j0 < p.mask.first_key(t0 + 15)) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int t = t0 + e / 2 * 8 + lane / 4, j = j0 + n * 8 + lane % 4 * 2 + e % 2;
                    if (!p.mask.visible(t, j)) s[n][e] = -INFINITY;
                }
            }
        }
        // dS = P (dP - delta)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = exp2_fast(s[n][e] * scale - lse[e / 2]) * (dp[n][e] - delta[e / 2]);
            }
        }
        // dQ += dS K
#pragma unroll
        for (int kk = 0; kk < KEYS / 16; kk++) {
            uint32_t a[4];
            accum_as_a<T>(a, s[2 * kk], s[2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tile_k, kk * 16, n);
                mma_16816<T>(dq[2 * n], a, b[0], b[1]);
                mma_16816<T>(dq[2 * n + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();

    float dq_scale = p.scale * p_unscale<T>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp * 16 + half * 8 + lane / 4;
        if (row >= rows.rows) continue;
        int64_t dq_row = dq_accum_row(p.batch.nq, p.q_heads / p.kv_heads, rows.row + row, q_head);
        float *dq_out = p.dq_accum + dq_row * D + (lane % 4) * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float2 x = make_float2(dq[n][half * 2] * dq_scale, dq[n][half * 2 + 1] * dq_scale);
            float2 *dq_ptr = (float2 *)(dq_out + dq_accum_chunk(dq_row, n) * 8);
            if (p.accumulate_dq) {
                float2 old = *dq_ptr;
                x.x += old.x, x.y += old.y;
            }
            *dq_ptr = x;
        }
    }
}

// The current tile of ROWS queries of dense_dkdv_kernel.
struct QTilePosition {
    int q_head;      // query head
    int64_t segment; // segment of the batch
    int64_t row;     // first query in q
    int pos, end;    // position of the first query; end of the segment's positions that see the keys
};

// A thread block: dK and dV of 64 keys of a KV head, 16 per warp, summed over the heads of its group (or the
// heads of one split) and over the queries that see the keys. K and V stay in shared memory. Scores are
// transposed (keys x queries), so that P^T and dS^T are A operands in registers.
template <typename T, int D>
__global__ void __launch_bounds__(128, 2) dense_dkdv_kernel(const DenseParams p) {
    constexpr int ROWS = 64, KEYS = 64, BYTES = KEYS * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t smem_k = smem_address(shared), smem_v = smem_k + BYTES, smem_q = smem_v + BYTES;
    uint32_t smem_dout = smem_q + 2 * BYTES;
    float *lse_delta = (float *)(shared + 6 * BYTES); // [2 stages][lse, delta][ROWS]
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    int split = blockIdx.x % p.num_splits;
    int kv_head = blockIdx.x / p.num_splits % p.kv_heads;
    int64_t tile = blockIdx.x / p.num_splits / p.kv_heads;
    int64_t num_seqs = p.batch.num_seqs;
    RowTile keys = find_row_tile(p.cu_keys, num_seqs, KEYS, tile);
    if (keys.rows == 0) return;
    int g = p.q_heads / p.kv_heads;
    int q_head_begin = kv_head * g + g * split / p.num_splits;
    int q_head_end = kv_head * g + g * (split + 1) / p.num_splits;

    int64_t q_stride = (int64_t)p.q_heads * D, kv_stride = (int64_t)p.kv_heads * D;
    int64_t k_offset = keys.row * kv_stride + kv_head * D;
    load_tile<KEYS, D, 128>(smem_k, (const T *)p.k.data + k_offset, kv_stride, keys.rows);
    load_tile<KEYS, D, 128>(smem_v, (const T *)p.v.data + k_offset, kv_stride, keys.rows);

    // First segment of the sequence; first and last position that see any of the keys.
    int64_t seg_begin = 0, seg_end = p.batch.num_segments;
    while (seg_begin < seg_end) {
        int64_t mid = (seg_begin + seg_end) / 2;
        if (p.batch.segments[mid].seq < keys.cu_index)
            seg_begin = mid + 1;
        else
            seg_end = mid;
    }
    seg_end = p.batch.num_segments;
    int pos_begin = p.mask.first_query(keys.first);
    int pos_last = p.mask.last_query(keys.first + keys.rows - 1);

    QTilePosition next = {q_head_begin - 1, seg_end, 0, 0, 0};
    // Moves `next` to the next tile of queries. Returns false at the end.
    auto advance = [&]() {
        next.pos += ROWS;
        next.row += ROWS;
        while (next.pos >= next.end) {
            next.segment++;
            if (next.segment >= seg_end || p.batch.segments[next.segment].seq != keys.cu_index) {
                if (++next.q_head >= q_head_end) return false;
                next.segment = seg_begin;
                if (seg_begin >= seg_end || p.batch.segments[seg_begin].seq != keys.cu_index) return false;
            }
            FsaSegment s = p.batch.segments[next.segment];
            int64_t begin = s.pos > pos_begin ? s.pos : pos_begin, end = s.pos + s.len;
            if (end - 1 > pos_last) end = (int64_t)pos_last + 1;
            next.pos = (int)begin;
            next.end = end > begin ? (int)end : (int)begin;
            next.row = p.batch.cu_queries[next.segment] + begin - s.pos;
        }
        return true;
    };
    auto load_queries = [&](int stage) {
        int count = next.end - next.pos;
        int64_t offset = next.row * q_stride + next.q_head * D;
        load_tile<ROWS, D, 128>(smem_q + stage * BYTES, (const T *)p.q.data + offset, q_stride, count);
        load_tile<ROWS, D, 128>(smem_dout + stage * BYTES, (const T *)p.dout.data + offset, q_stride, count);
        int row = threadIdx.x % ROWS;
        int64_t lse_index = (next.row + row) * p.q_heads + next.q_head;
        float x;
        if (threadIdx.x < ROWS) {
            // -inf: the row is past the tile's end, or lse_bwd is a plain lse (kernels.h).
            x = row < count ? p.lse_bwd[lse_index] : -INFINITY;
            x = x == -INFINITY ? INFINITY : x * FSA_LOG2E - p_scale_log2<T>(); // sees no key: P = 0
        } else {
            x = row < count ? p.delta[lse_index] : 0;
        }
        lse_delta[stage * 2 * ROWS + threadIdx.x] = x;
    };

    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    float scale = p.scale * FSA_LOG2E;
    bool more = advance();
    if (more) load_queries(0);
    cp_async_commit();
    for (int stage = 0; more; stage ^= 1) {
        int pos = next.pos, end_pos = next.end;
        more = advance();
        if (more) load_queries(stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        uint32_t tile_q = smem_q + stage * BYTES, tile_dout = smem_dout + stage * BYTES;
        const float *lse = lse_delta + stage * 2 * ROWS, *delta = lse + ROWS;
        int j0 = keys.first + warp * 16;
        int last = pos + ROWS < end_pos ? pos + ROWS - 1 : end_pos - 1;

        // P^T = exp(K Q^T - lse_bwd), 16 keys x 64 queries
        float s[ROWS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t a[4];
            load_a<D>(a, smem_k, warp * 16, kk);
#pragma unroll
            for (int n = 0; n < ROWS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, tile_q, n * 16, kk);
                mma_16816<T>(s[2 * n], a, b[0], b[1]);
                mma_16816<T>(s[2 * n + 1], a, b[2], b[3]);
            }
        }
        if (!p.mask.visible(pos, j0 + 15) || j0 < p.mask.first_key(last)) {
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int t = pos + n * 8 + lane % 4 * 2 + e % 2, j = j0 + e / 2 * 8 + lane / 4;
                    if (!p.mask.visible(t, j)) s[n][e] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++) {
            float2 l = *(const float2 *)(lse + n * 8 + (lane % 4) * 2);
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = exp2_fast(s[n][e] * scale - (e % 2 ? l.y : l.x));
        }
        // dV += P^T dout
#pragma unroll
        for (int kk = 0; kk < ROWS / 16; kk++) {
            uint32_t a[4];
            accum_as_a<T>(a, s[2 * kk], s[2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tile_dout, kk * 16, n);
                mma_16816<T>(dv[2 * n], a, b[0], b[1]);
                mma_16816<T>(dv[2 * n + 1], a, b[2], b[3]);
            }
        }
        // dS^T = P^T (V dout^T - delta)
        float dp[ROWS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t a[4];
            load_a<D>(a, smem_v, warp * 16, kk);
#pragma unroll
            for (int n = 0; n < ROWS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, tile_dout, n * 16, kk);
                mma_16816<T>(dp[2 * n], a, b[0], b[1]);
                mma_16816<T>(dp[2 * n + 1], a, b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++) {
            float2 l = *(const float2 *)(delta + n * 8 + (lane % 4) * 2);
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] *= dp[n][e] - (e % 2 ? l.y : l.x);
        }
        // dK += dS^T Q
#pragma unroll
        for (int kk = 0; kk < ROWS / 16; kk++) {
            uint32_t a[4];
            accum_as_a<T>(a, s[2 * kk], s[2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tile_q, kk * 16, n);
                mma_16816<T>(dk[2 * n], a, b[0], b[1]);
                mma_16816<T>(dk[2 * n + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();

    int64_t dkv_size = p.num_keys * kv_stride; // elements of dk
    float *dk_out = p.num_splits > 1 ? p.dkv_partial + split * 2 * dkv_size : p.dk_accum;
    float *dv_out = p.num_splits > 1 ? p.dkv_partial + (split * 2 + 1) * dkv_size : p.dv_accum;
    bool accumulate = p.accumulate_dkv && p.num_splits == 1;
    float dv_unscale = p_unscale<T>(), dk_scale = dv_unscale * p.scale;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp * 16 + half * 8 + lane / 4;
        if (row >= keys.rows) continue;
        int64_t index = k_offset + row * kv_stride + (lane % 4) * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float2 x = make_float2(dk[n][half * 2] * dk_scale, dk[n][half * 2 + 1] * dk_scale);
            float2 y = make_float2(dv[n][half * 2] * dv_unscale, dv[n][half * 2 + 1] * dv_unscale);
            float2 *dk_ptr = (float2 *)(dk_out + index + n * 8), *dv_ptr = (float2 *)(dv_out + index + n * 8);
            if (accumulate) {
                float2 u = *dk_ptr, w = *dv_ptr;
                x.x += u.x, x.y += u.y, y.x += w.x, y.y += w.y;
            }
            *dk_ptr = x;
            *dv_ptr = y;
        }
    }
}

template <typename T, int D> static int launch_backward(const DenseParams &d, cudaStream_t stream) {
    int dq_smem = 4 * 64 * D * 2, dkdv_smem = 6 * 64 * D * 2 + 4 * 64 * (int)sizeof(float);
    int64_t dq_blocks = max_row_tiles(d.batch.nq, d.batch.num_segments, 64) * d.q_heads;
    int64_t dkdv_blocks = max_row_tiles(d.num_keys, d.batch.num_seqs, 64) * d.kv_heads * d.num_splits;
    if (dq_blocks > 0) TRY(LAUNCH((dense_dq_kernel<T, D>), (unsigned)dq_blocks, 128, dq_smem, stream, d));
    if (dkdv_blocks > 0)
        TRY(LAUNCH((dense_dkdv_kernel<T, D>), (unsigned)dkdv_blocks, 128, dkdv_smem, stream, d));
    return FSA_OK;
}

int fsa_dense_backward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, launch_backward, d, stream);
}
