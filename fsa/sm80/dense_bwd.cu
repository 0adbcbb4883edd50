#include "../dense.cuh"
#include "tile.cuh"

// -------------------------------------------------------------------------------------------------
// dQ
//
// A block: dq of 64 queries of one head, four warps of 16 rows. Q and dO live in registers as operands;
// K and V come in double-buffered tiles of 64 keys.
// Bytes: q, dO once, dq once in fp32 (read too if it accumulates). Flops: 6*d a visible pair; they bind.
template <typename T, int D> __global__ void __launch_bounds__(128, 2) dense_dq_kernel(const DenseParams p) {
    constexpr int ROWS = 64, KEYS = 64, K_BYTES = KEYS * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t tile_k = smem_address(shared), tile_v = tile_k + 2 * K_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    int64_t tiles = gridDim.x / p.q_heads, index = tiles - 1 - blockIdx.x / p.q_heads;
    int head = blockIdx.x % p.q_heads, kv_head = head / (p.q_heads / p.kv_heads);
    RowTile rows = find_row_tile(p.batch.cu_queries, p.batch.num_segments, ROWS, index);
    if (rows.rows == 0) return;
    FsaSegment segment = p.batch.segments[rows.range];
    int first_pos = (int)segment.pos + rows.first, last_pos = first_pos + rows.rows - 1;
    int end = p.visible.end_key(last_pos), begin = p.visible.first_key(first_pos) / KEYS * KEYS;

    int64_t q_stride = (int64_t)p.q_heads * D, k_stride = (int64_t)p.kv_heads * D;
    int64_t q_at = rows.row * q_stride + head * D, key0 = p.cu_keys[segment.seq] * k_stride + kv_head * D;
    const T *k = (const T *)p.k + key0, *v = (const T *)p.v + key0;

    // Q and dO pass through the second stage of K and V.
    load_tile<ROWS, D, 128>(tile_k + K_BYTES, (const T *)p.q + q_at, q_stride, rows.rows);
    load_tile<ROWS, D, 128>(tile_v + K_BYTES, (const T *)p.dout + q_at, q_stride, rows.rows);
    auto load_keys = [&](int j, int stage) {
        load_tile<KEYS, D, 128>(tile_k + stage * K_BYTES, k + j * k_stride, k_stride, end - j);
        load_tile<KEYS, D, 128>(tile_v + stage * K_BYTES, v + j * k_stride, k_stride, end - j);
    };
    if (begin < end) load_keys(begin, 0);
    cp_async_commit();

    float lse[2], delta[2];
    for (int half = 0; half < 2; half++) {
        int row = warp * 16 + half * 8 + lane / 4;
        int64_t at = (rows.row + row) * p.q_heads + head;
        float x = row < rows.rows ? p.lse_bwd[at] : -INFINITY;
        lse[half] = x == -INFINITY ? INFINITY : x * FSA_LOG2E - probability_shift<T>(); // nothing seen: P = 0
        delta[half] = row < rows.rows ? p.delta[at] : 0;
    }
    cp_async_wait<0>();
    __syncthreads();
    uint32_t q[D / 16][4], dout[D / 16][4];
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        load_a<D>(q[kk], tile_k + K_BYTES, warp * 16, kk);
        load_a<D>(dout[kk], tile_v + K_BYTES, warp * 16, kk);
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
        uint32_t tk = tile_k + stage * K_BYTES, tv = tile_v + stage * K_BYTES;

        float s[KEYS / 8][4] = {}, dp[KEYS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, tk, n * 16, kk);
                mma_16816<T>(s[2 * n], q[kk], b[0], b[1]);
                mma_16816<T>(s[2 * n + 1], q[kk], b[2], b[3]);
                load_b<D>(b, tv, n * 16, kk);
                mma_16816<T>(dp[2 * n], dout[kk], b[0], b[1]);
                mma_16816<T>(dp[2 * n + 1], dout[kk], b[2], b[3]);
            }
        }
        int t0 = first_pos + warp * 16;
        if (!p.visible(t0, j0 + KEYS - 1) || j0 < p.visible.first_key(t0 + 15)) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int t = t0 + e / 2 * 8 + lane / 4, j = j0 + n * 8 + lane % 4 * 2 + e % 2;
                    if (!p.visible(t, j)) s[n][e] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = exp2_fast(s[n][e] * scale - lse[e / 2]) * (dp[n][e] - delta[e / 2]);
            }
        }
#pragma unroll
        for (int kk = 0; kk < KEYS / 16; kk++) {
            uint32_t a[4];
            result_as_a<T>(a, s[2 * kk], s[2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tk, kk * 16, n);
                mma_16816<T>(dq[2 * n], a, b[0], b[1]);
                mma_16816<T>(dq[2 * n + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();

    float unit = p.scale * probability_unit<T>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp * 16 + half * 8 + lane / 4;
        if (row >= rows.rows) continue;
        int64_t sum = dq_accum_row(p.batch.nq, p.q_heads / p.kv_heads, rows.row + row, head);
        float *to = p.dq + sum * D + (lane % 4) * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float2 x = make_float2(dq[n][half * 2] * unit, dq[n][half * 2 + 1] * unit);
            float2 *at = (float2 *)(to + dq_accum_chunk(sum, n) * 8);
            if (p.accumulate_q) {
                float2 old = *at;
                x.x += old.x, x.y += old.y;
            }
            *at = x;
        }
    }
}

// -------------------------------------------------------------------------------------------------
// dK and dV
//
// A block: dk and dv of 64 keys of a KV head, summed over the heads of its group (or, with `splits`, over
// its share of them) and over the queries that see the keys, in that order. Four warps of 16 keys; scores
// are computed transposed, so that P^T and dS^T are at once operands of the products with dO and Q. K
// and V stay in shared memory, Q and dO come in double-buffered tiles of 64 queries of one head.
// Bytes: k, v once, dk, dv once in fp32; q and dO from L2, once for every key tile that sees them.
// Flops: 8*d a visible pair; they bind.
struct QTilePosition {
    int head;        // query head
    int64_t segment; // and segment of the current tile
    int64_t row;     // its first row in q
    int pos, end;    // the position of its first query; the end of the segment's visible queries
};

template <typename T, int D> __global__ void __launch_bounds__(128, 2) dense_dkdv_kernel(const DenseParams p) {
    constexpr int ROWS = 64, KEYS = 64, BYTES = KEYS * D * 2;
    extern __shared__ __align__(128) char shared[];
    uint32_t tile_k = smem_address(shared), tile_v = tile_k + BYTES, tile_q = tile_v + BYTES;
    uint32_t tile_do = tile_q + 2 * BYTES;
    float *stats = (float *)(shared + 6 * BYTES); // [2 stages][lse, delta][ROWS]
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    int split = blockIdx.x % p.splits;
    int kv_head = blockIdx.x / p.splits % p.kv_heads;
    int64_t index = blockIdx.x / p.splits / p.kv_heads;
    int64_t num_seqs = p.batch.num_seqs;
    RowTile keys = find_row_tile(p.cu_keys, num_seqs, KEYS, index);
    if (keys.rows == 0) return;
    int group = p.q_heads / p.kv_heads;
    int head_begin = kv_head * group + group * split / p.splits;
    int head_end = kv_head * group + group * (split + 1) / p.splits;

    int64_t q_stride = (int64_t)p.q_heads * D, k_stride = (int64_t)p.kv_heads * D;
    int64_t k_at = keys.row * k_stride + kv_head * D;
    load_tile<KEYS, D, 128>(tile_k, (const T *)p.k + k_at, k_stride, keys.rows);
    load_tile<KEYS, D, 128>(tile_v, (const T *)p.v + k_at, k_stride, keys.rows);

    // The sequence's segments, and the positions that see some of the keys.
    int64_t seg_begin = 0, seg_end = p.batch.num_segments;
    while (seg_begin < seg_end) {
        int64_t mid = (seg_begin + seg_end) / 2;
        if (p.batch.segments[mid].seq < keys.range)
            seg_begin = mid + 1;
        else
            seg_end = mid;
    }
    seg_end = p.batch.num_segments;
    int pos_begin = p.visible.first_query(keys.first);
    int pos_last = p.visible.last_query(keys.first + keys.rows - 1);

    QTilePosition next = {head_begin - 1, seg_end, 0, 0, 0};
    // Moves `next` on to its next tile of queries; false at the end.
    auto advance = [&]() {
        next.pos += ROWS;
        next.row += ROWS;
        while (next.pos >= next.end) {
            next.segment++;
            if (next.segment >= seg_end || p.batch.segments[next.segment].seq != keys.range) {
                if (++next.head >= head_end) return false;
                next.segment = seg_begin;
                if (seg_begin >= seg_end || p.batch.segments[seg_begin].seq != keys.range) return false;
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
        int64_t at = next.row * q_stride + next.head * D;
        load_tile<ROWS, D, 128>(tile_q + stage * BYTES, (const T *)p.q + at, q_stride, count);
        load_tile<ROWS, D, 128>(tile_do + stage * BYTES, (const T *)p.dout + at, q_stride, count);
        int row = threadIdx.x % ROWS;
        int64_t stat = (next.row + row) * p.q_heads + next.head;
        float x;
        if (threadIdx.x < ROWS) {
            x = row < count ? p.lse_bwd[stat] : -INFINITY;
            x = x == -INFINITY ? INFINITY : x * FSA_LOG2E - probability_shift<T>(); // nothing seen: P = 0
        } else {
            x = row < count ? p.delta[stat] : 0;
        }
        stats[stage * 2 * ROWS + threadIdx.x] = x;
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
        uint32_t tq = tile_q + stage * BYTES, tdo = tile_do + stage * BYTES;
        const float *lse = stats + stage * 2 * ROWS, *delta = lse + ROWS;
        int j0 = keys.first + warp * 16;
        int last = pos + ROWS < end_pos ? pos + ROWS - 1 : end_pos - 1;

        // P^T, 16 keys x 64 queries.
        float s[ROWS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t a[4];
            load_a<D>(a, tile_k, warp * 16, kk);
#pragma unroll
            for (int n = 0; n < ROWS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, tq, n * 16, kk);
                mma_16816<T>(s[2 * n], a, b[0], b[1]);
                mma_16816<T>(s[2 * n + 1], a, b[2], b[3]);
            }
        }
        if (!p.visible(pos, j0 + 15) || j0 < p.visible.first_key(last)) {
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int t = pos + n * 8 + lane % 4 * 2 + e % 2, j = j0 + e / 2 * 8 + lane / 4;
                    if (!p.visible(t, j)) s[n][e] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++) {
            float2 l = *(const float2 *)(lse + n * 8 + (lane % 4) * 2);
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = exp2_fast(s[n][e] * scale - (e % 2 ? l.y : l.x));
        }
        // dV += P^T dO
#pragma unroll
        for (int kk = 0; kk < ROWS / 16; kk++) {
            uint32_t a[4];
            result_as_a<T>(a, s[2 * kk], s[2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tdo, kk * 16, n);
                mma_16816<T>(dv[2 * n], a, b[0], b[1]);
                mma_16816<T>(dv[2 * n + 1], a, b[2], b[3]);
            }
        }
        // dS^T = P^T * (V dO^T - delta)
        float dp[ROWS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t a[4];
            load_a<D>(a, tile_v, warp * 16, kk);
#pragma unroll
            for (int n = 0; n < ROWS / 16; n++) {
                uint32_t b[4];
                load_b<D>(b, tdo, n * 16, kk);
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
            result_as_a<T>(a, s[2 * kk], s[2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_b_trans<D>(b, tq, kk * 16, n);
                mma_16816<T>(dk[2 * n], a, b[0], b[1]);
                mma_16816<T>(dk[2 * n + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();

    int64_t all = p.num_keys * k_stride; // elements of dk
    float *to_k = p.splits > 1 ? p.partial + split * 2 * all : p.dk;
    float *to_v = p.splits > 1 ? p.partial + (split * 2 + 1) * all : p.dv;
    bool accumulate = p.accumulate_kv && p.splits == 1;
    float unit = probability_unit<T>(), unit_k = unit * p.scale;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp * 16 + half * 8 + lane / 4;
        if (row >= keys.rows) continue;
        int64_t at = k_at + row * k_stride + (lane % 4) * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float2 x = make_float2(dk[n][half * 2] * unit_k, dk[n][half * 2 + 1] * unit_k);
            float2 y = make_float2(dv[n][half * 2] * unit, dv[n][half * 2 + 1] * unit);
            float2 *at_k = (float2 *)(to_k + at + n * 8), *at_v = (float2 *)(to_v + at + n * 8);
            if (accumulate) {
                float2 u = *at_k, w = *at_v;
                x.x += u.x, x.y += u.y, y.x += w.x, y.y += w.y;
            }
            *at_k = x;
            *at_v = y;
        }
    }
}

template <typename T, int D> static int launch_backward(const DenseParams &d, cudaStream_t stream) {
    int bytes_q = 4 * 64 * D * 2, bytes_k = 6 * 64 * D * 2 + 4 * 64 * (int)sizeof(float);
    cudaFuncSetAttribute(dense_dq_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes_q);
    cudaFuncSetAttribute(dense_dkdv_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes_k);
    int64_t q_blocks = row_tile_bound(d.batch.nq, d.batch.num_segments, 64) * d.q_heads;
    int64_t k_blocks = row_tile_bound(d.num_keys, d.batch.num_seqs, 64) * d.kv_heads * d.splits;
    if (q_blocks > 0) dense_dq_kernel<T, D><<<(unsigned)q_blocks, 128, bytes_q, stream>>>(d);
    if (k_blocks > 0) dense_dkdv_kernel<T, D><<<(unsigned)k_blocks, 128, bytes_k, stream>>>(d);
    return launch_status();
}

int fsa_dense_backward_sm80(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, launch_backward, d, stream);
}
