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
#include "dense.cuh"

enum { ROWS = 64 }; // queries of a tile

// Returns lse_bwd of a row in base 2 minus p_scale_log2, or +inf (P = 0) for a row without keys: past the
// tile's end, or with lse_bwd = -inf, a plain lse (kernels.h).
template <typename T>
static __device__ __forceinline__ float load_lse_log2(const DenseParams &p, int64_t index, bool valid) {
    float x = valid ? p.lse_bwd[index] : -INFINITY;
    return x == -INFINITY ? INFINITY : x * FSA_LOG2E - p_scale_log2<T>();
}

// ---- dQ ---------------------------------------------------------------------------------------------

// lse (load_lse_log2) and delta of a lane's two rows in a warp's 16.
struct RowStats {
    float lse[2], delta[2];
};
template <typename T>
static __device__ __forceinline__ RowStats load_row_stats(const DenseParams &p, const QueryTile &tile) {
    RowStats stats;
    for (int half = 0; half < 2; half++) {
        int row = threadIdx.x / 32 * 16 + half * 8 + threadIdx.x % 32 / 4;
        int64_t index = (tile.rows.row + row) * p.q_heads + tile.q_head;
        stats.lse[half] = load_lse_log2<T>(p, index, row < tile.rows.rows);
        stats.delta[half] = row < tile.rows.rows ? p.delta[index] : 0;
    }
    return stats;
}

// S = Q K^T and dP = dout V^T, 16 queries x 64 keys per warp. Q and dout are A operands in registers.
template <typename T, int D, int N>
static __device__ __forceinline__ void
compute_scores(float (&s)[N][4], float (&dp)[N][4], const uint32_t (&q)[D / 16][4],
               const uint32_t (&dout)[D / 16][4], uint32_t k_tile, uint32_t v_tile) {
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            uint32_t b[4];
            load_b<D>(b, k_tile, n * 16, kk);
            mma_161616<T>(s[2 * n], s[2 * n + 1], q[kk], b);
            load_b<D>(b, v_tile, n * 16, kk);
            mma_161616<T>(dp[2 * n], dp[2 * n + 1], dout[kk], b);
        }
    }
}

// S becomes dS = P (dP - delta), 16 queries x 8*N keys per warp.
template <int N>
static __device__ __forceinline__ void softmax_bwd(float (&s)[N][4], const float (&dp)[N][4],
                                                   const RowStats &stats, float scale) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[n][e] = exp2_fast(s[n][e] * scale - stats.lse[e / 2]) * (dp[n][e] - stats.delta[e / 2]);
        }
    }
}

// Writes or adds a warp's 16 rows of dQ [16, D], times scale, to dq_accum.
template <typename T, int D>
static __device__ __forceinline__ void store_dq(const DenseParams &p, const QueryTile &tile,
                                                const float (&dq)[D / 8][4]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float dq_scale = p.scale * p_unscale<T>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp * 16 + half * 8 + lane / 4;
        if (row >= tile.rows.rows) continue;
        int64_t dq_row = dq_accum_row(p.batch.nq, p.q_heads / p.kv_heads, tile.rows.row + row, tile.q_head);
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

// A thread block: dQ of 64 queries of one query head, 16 per warp.
template <typename T, int D>
__global__ void __launch_bounds__(DENSE_THREADS, 2) dense_dq_kernel(const DenseParams p) {
    extern __shared__ __align__(128) char shared[]; // K and V: two stages each
    int warp = threadIdx.x / 32;
    const RowTile rows = find_queries<ROWS>(p);
    if (rows.rows == 0) return;
    const QueryTile tile = make_query_tile(p, rows);
    const KvStages<T, D> kv(p, tile, smem_address(shared));

    // Q and dout go through the second stage of K and V into registers.
    load_tile_pair<ROWS, D, DENSE_THREADS>(
        kv.k_tile(1), (const T *)p.q.data + rows.row * p.q.stride + tile.q_head * D, p.q.stride, kv.v_tile(1),
        (const T *)p.dout.data + rows.row * p.dout.stride + tile.q_head * D, p.dout.stride, rows.rows);
    if (tile.begin < tile.end) kv.load(tile.begin, 0);
    cp_async_commit();
    const RowStats stats = load_row_stats<T>(p, tile);
    cp_async_wait<0>();
    __syncthreads();
    uint32_t q[D / 16][4], dout[D / 16][4];
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        load_a<D>(q[kk], kv.k_tile(1), warp * 16, kk);
        load_a<D>(dout[kk], kv.v_tile(1), warp * 16, kk);
    }
    __syncthreads();

    float dq[D / 8][4] = {}, scale = p.scale * FSA_LOG2E;
    int stage = 0;
    for (int j0 = tile.begin; j0 < tile.end; j0 += DENSE_KEYS, stage ^= 1) {
        if (j0 + DENSE_KEYS < tile.end) kv.load(j0 + DENSE_KEYS, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();

        float s[DENSE_KEYS / 8][4] = {}, dp[DENSE_KEYS / 8][4] = {};
        compute_scores<T, D>(s, dp, q, dout, kv.k_tile(stage), kv.v_tile(stage));
        int t0 = tile.first_pos + warp * 16;
        if (needs_mask(p.mask, t0, 16, j0, DENSE_KEYS)) mask_scores(s, p.mask, t0, j0);
        softmax_bwd(s, dp, stats, scale);
        // dQ += dS K
        mma_tiles<T, DENSE_KEYS>(dq, accum_operand<T>(s), ColumnOperand<D>{kv.k_tile(stage), 0});
        __syncthreads();
    }
    cp_async_wait<0>();
    store_dq<T, D>(p, tile, dq);
}

// ---- dK, dV -----------------------------------------------------------------------------------------

// The keys of a thread block, of one KV head, and the query heads of its split.
struct KeyTile {
    int split, kv_head;
    RowTile keys;
    int q_head_begin, q_head_end;
};
// Returns the key tile of this thread block. keys.rows is 0 if it has no keys.
static __device__ __forceinline__ KeyTile find_key_tile(const DenseParams &p) {
    KeyTile t;
    t.split = blockIdx.x % p.num_splits;
    t.kv_head = blockIdx.x / p.num_splits % p.kv_heads;
    int64_t tile = blockIdx.x / p.num_splits / p.kv_heads;
    t.keys = find_row_tile(p.cu_keys, p.batch.num_seqs, DENSE_KEYS, tile);
    int g = p.q_heads / p.kv_heads;
    t.q_head_begin = t.kv_head * g + g * t.split / p.num_splits;
    t.q_head_end = t.kv_head * g + g * (t.split + 1) / p.num_splits;
    return t;
}

// Iterates over the tiles of ROWS queries that see a key of the tile: over the query heads of the split, the
// segments of the sequence, and the positions of a segment.
struct QueryTileIterator {
    const FsaSegment *segments;
    const int64_t *cu_queries;
    int64_t seq, seg_begin, seg_end; // the sequence, its first segment, and the number of segments
    int pos_begin, pos_last;         // first and last position that see any of the keys
    int q_head_end;
    // The current tile.
    int q_head;
    int64_t segment, row; // segment of the batch; first query in q
    int pos, end;         // position of the first query; end of the segment's positions that see the keys

    // Before the first tile.
    __device__ __forceinline__ QueryTileIterator(const DenseParams &p, const KeyTile &tile)
        : segments(p.batch.segments), cu_queries(p.batch.cu_queries), seq(tile.keys.cu_index), seg_begin(0),
          seg_end(p.batch.num_segments), q_head_end(tile.q_head_end), q_head(tile.q_head_begin - 1), row(0),
          pos(0), end(0) {
        while (seg_begin < seg_end) {
            int64_t mid = (seg_begin + seg_end) / 2;
            if (segments[mid].seq < seq)
                seg_begin = mid + 1;
            else
                seg_end = mid;
        }
        seg_end = p.batch.num_segments;
        segment = seg_end;
        pos_begin = p.mask.first_query(tile.keys.first);
        pos_last = p.mask.last_query(tile.keys.first + tile.keys.rows - 1);
    }
    // Moves to the next tile. Returns false at the end.
    __device__ __forceinline__ bool advance() {
        pos += ROWS;
        row += ROWS;
        while (pos >= end) {
            segment++;
            if (segment >= seg_end || segments[segment].seq != seq) {
                if (++q_head >= q_head_end) return false;
                segment = seg_begin;
                if (seg_begin >= seg_end || segments[seg_begin].seq != seq) return false;
            }
            FsaSegment s = segments[segment];
            int64_t first = s.pos > pos_begin ? s.pos : pos_begin, last = s.pos + s.len;
            if (last - 1 > pos_last) last = (int64_t)pos_last + 1;
            pos = (int)first;
            end = last > first ? (int)last : (int)first;
            row = cu_queries[segment] + first - s.pos;
        }
        return true;
    }
};

// Q, dout, lse and delta of a tile of queries, in two stages of shared memory.
template <typename T, int D> struct QStages {
    enum { TILE_BYTES = ROWS * D * 2 };
    uint32_t smem_q, smem_dout; // [2 stages][ROWS, D]
    float *lse_delta;           // [2 stages][lse (load_lse_log2), delta][ROWS]
    __device__ __forceinline__ uint32_t q_tile(int stage) const { return smem_q + stage * TILE_BYTES; }
    __device__ __forceinline__ uint32_t dout_tile(int stage) const { return smem_dout + stage * TILE_BYTES; }
    __device__ __forceinline__ const float *lse(int stage) const { return lse_delta + stage * 2 * ROWS; }
    __device__ __forceinline__ const float *delta(int stage) const { return lse(stage) + ROWS; }
    // Starts the copy of the iterator's tile. Queries past its end become zeros with P = 0.
    __device__ __forceinline__ void load(const DenseParams &p, const QueryTileIterator &tile,
                                         int stage) const {
        int count = tile.end - tile.pos;
        load_tile_pair<ROWS, D, DENSE_THREADS>(
            q_tile(stage), (const T *)p.q.data + tile.row * p.q.stride + tile.q_head * D, p.q.stride,
            dout_tile(stage), (const T *)p.dout.data + tile.row * p.dout.stride + tile.q_head * D,
            p.dout.stride, count);
        static_assert(DENSE_THREADS == 2 * ROWS, "a thread loads lse or delta of one query");
        int row = threadIdx.x % ROWS;
        int64_t index = (tile.row + row) * p.q_heads + tile.q_head;
        float x;
        if (threadIdx.x < ROWS)
            x = load_lse_log2<T>(p, index, row < count);
        else
            x = row < count ? p.delta[index] : 0;
        lse_delta[stage * 2 * ROWS + threadIdx.x] = x;
    }
};

// Sets the scores that the mask hides to -inf. s: S^T, 16 keys from j0 on x 8*N queries from position t0 on.
template <int N>
static __device__ __forceinline__ void mask_scores_transposed(float (&s)[N][4], const DenseMask &mask, int t0,
                                                              int j0) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int t = t0 + n * 8 + lane % 4 * 2 + e % 2, j = j0 + e / 2 * 8 + lane / 4;
            if (!mask.visible(t, j)) s[n][e] = -INFINITY;
        }
    }
}
// S^T becomes P^T = exp2(scale S^T - lse), 16 keys x 8*N queries per warp.
template <int N>
static __device__ __forceinline__ void softmax_transposed(float (&s)[N][4], const float *lse, float scale) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 l = *(const float2 *)(lse + n * 8 + (lane % 4) * 2);
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = exp2_fast(s[n][e] * scale - (e % 2 ? l.y : l.x));
    }
}
// P^T becomes dS^T = P^T (dP^T - delta).
template <int N>
static __device__ __forceinline__ void softmax_bwd_transposed(float (&s)[N][4], const float (&dp)[N][4],
                                                              const float *delta) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 l = *(const float2 *)(delta + n * 8 + (lane % 4) * 2);
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] *= dp[n][e] - (e % 2 ? l.y : l.x);
    }
}

// Writes or adds a warp's 16 rows of dK and dV [16, D] to the accumulators, or writes them to the partials of
// the split.
template <typename T, int D>
static __device__ __forceinline__ void store_dkv(const DenseParams &p, const KeyTile &tile,
                                                 const float (&dk)[D / 8][4], const float (&dv)[D / 8][4]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t row_size = (int64_t)p.kv_heads * D, dkv_size = p.num_keys * row_size; // elements of dk
    float *dk_out = p.num_splits > 1 ? p.dkv_partial + tile.split * 2 * dkv_size : p.dk_accum;
    float *dv_out = p.num_splits > 1 ? p.dkv_partial + (tile.split * 2 + 1) * dkv_size : p.dv_accum;
    bool accumulate = p.accumulate_dkv && p.num_splits == 1;
    float dv_unscale = p_unscale<T>(), dk_scale = dv_unscale * p.scale;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp * 16 + half * 8 + lane / 4;
        if (row >= tile.keys.rows) continue;
        int64_t index = (tile.keys.row * row_size + tile.kv_head * D) + row * row_size + (lane % 4) * 2;
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

// A thread block: dK and dV of 64 keys of a KV head, 16 per warp, summed over the heads of its group (or the
// heads of one split) and over the queries that see the keys. K and V stay in shared memory. Scores are
// transposed (keys x queries), so that P^T and dS^T are A operands in registers.
template <typename T, int D>
__global__ void __launch_bounds__(DENSE_THREADS, 2) dense_dkdv_kernel(const DenseParams p) {
    constexpr int BYTES = DENSE_KEYS * D * 2;
    extern __shared__ __align__(128) char shared[]; // K, V; QStages
    uint32_t smem_k = smem_address(shared), smem_v = smem_k + BYTES;
    const QStages<T, D> queries = {smem_v + BYTES, smem_v + 3 * BYTES, (float *)(shared + 6 * BYTES)};
    int warp = threadIdx.x / 32;
    const KeyTile tile = find_key_tile(p);
    if (tile.keys.rows == 0) return;
    load_tile_pair<DENSE_KEYS, D, DENSE_THREADS>(
        smem_k, (const T *)p.k.data + tile.keys.row * p.k.stride + tile.kv_head * D, p.k.stride, smem_v,
        (const T *)p.v.data + tile.keys.row * p.v.stride + tile.kv_head * D, p.v.stride, tile.keys.rows);

    float dk[D / 8][4] = {}, dv[D / 8][4] = {}, scale = p.scale * FSA_LOG2E;
    QueryTileIterator next(p, tile);
    bool more = next.advance();
    if (more) queries.load(p, next, 0);
    cp_async_commit();
    for (int stage = 0; more; stage ^= 1) {
        int pos = next.pos, last = pos + ROWS < next.end ? pos + ROWS - 1 : next.end - 1;
        more = next.advance();
        if (more) queries.load(p, next, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();

        // P^T = exp(K Q^T - lse_bwd), 16 keys x 64 queries
        float s[ROWS / 8][4] = {};
        mma_tiles<T, D>(s, RowOperand<D>{smem_k, warp * 16}, RowOperand<D>{queries.q_tile(stage), 0});
        int j0 = tile.keys.first + warp * 16;
        if (needs_mask(p.mask, pos, last - pos + 1, j0, 16)) mask_scores_transposed(s, p.mask, pos, j0);
        softmax_transposed(s, queries.lse(stage), scale);
        // dV += P^T dout
        mma_tiles<T, ROWS>(dv, accum_operand<T>(s), ColumnOperand<D>{queries.dout_tile(stage), 0});
        // dS^T = P^T (V dout^T - delta)
        float dp[ROWS / 8][4] = {};
        mma_tiles<T, D>(dp, RowOperand<D>{smem_v, warp * 16}, RowOperand<D>{queries.dout_tile(stage), 0});
        softmax_bwd_transposed(s, dp, queries.delta(stage));
        // dK += dS^T Q
        mma_tiles<T, ROWS>(dk, accum_operand<T>(s), ColumnOperand<D>{queries.q_tile(stage), 0});
        __syncthreads();
    }
    cp_async_wait<0>();
    store_dkv<T, D>(p, tile, dk, dv);
}

template <typename T, int D> static int launch_backward(const DenseParams &d, cudaStream_t stream) {
    int dq_smem = 4 * 64 * D * 2, dkdv_smem = 6 * 64 * D * 2 + 4 * 64 * (int)sizeof(float);
    int64_t dq_blocks = max_row_tiles(d.batch.nq, d.batch.num_segments, ROWS) * d.q_heads;
    int64_t dkdv_blocks = max_row_tiles(d.num_keys, d.batch.num_seqs, DENSE_KEYS) * d.kv_heads * d.num_splits;
    if (dq_blocks > 0)
        TRY(LAUNCH((dense_dq_kernel<T, D>), (unsigned)dq_blocks, DENSE_THREADS, dq_smem, stream, d));
    if (dkdv_blocks > 0)
        TRY(LAUNCH((dense_dkdv_kernel<T, D>), (unsigned)dkdv_blocks, DENSE_THREADS, dkdv_smem, stream, d));
    return FSA_OK;
}

int fsa_dense_backward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, launch_backward, d, stream);
}
