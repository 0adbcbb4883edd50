#include "dense.cuh"

// ---------------------------------------------------------------------------------------------------------
// Work items of forward: up to 128/g tokens of one KV head, and the tiles of keys that they see: those from
// `begin` on, or, of forced blocks, the first `init_tiles`, and `begin` is so much less.
struct QWorkItem {
    int row, rows; // the first token's place in q, and how many tokens: 0 no such item, -1 no more items
    int kv_head, first_pos, begin, keys; // keys: of the whole sequence
    int tiles, init_tiles;
    template <bool FORCED> __device__ __forceinline__ int first_key(int tile) const {
        return FORCED && tile < init_tiles ? tile * KEYS : begin + tile * KEYS;
    }
};

// That of a thread block's `round`: items are taken from both ends of each round in turn. key0: the
// sequence's first key.
template <bool FORCED>
static __device__ __forceinline__ QWorkItem q_work_item(const DenseParams &p, int round, int items, int *key0) {
    const int item = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    QWorkItem w = {};
    w.rows = -1;
    if (item >= items) return w;
    const int g = p.q_heads / p.kv_heads, tile = item / p.kv_heads;
    const RowTile rows =
        find_row_tile(p.batch.cu_queries, p.batch.num_segments, ROWS / g, items / p.kv_heads - 1 - tile);
    w.row = (int)rows.row, w.rows = rows.rows;
    w.kv_head = item - tile * p.kv_heads;
    if (w.rows == 0) return w;
    FsaSegment segment = p.batch.segments[rows.range];
    w.first_pos = (int)segment.pos + rows.first;
    w.begin = FORCED ? p.forced.local_begin(w.first_pos) : p.visible.first_key(w.first_pos);
    *key0 = (int)p.cu_keys[segment.seq];
    w.keys = (int)p.cu_keys[segment.seq + 1] - *key0;
    int end = min(p.visible.end_key(w.first_pos + w.rows - 1), w.keys);
    if (FORCED) {
        const int init_end = min(p.forced.init_end, end);
        if (p.forced.local == 0) end = init_end;
        w.init_tiles = (init_end + KEYS - 1) / KEYS;
        if (w.init_tiles * KEYS >= w.begin) w.init_tiles = w.begin = 0; // one range
    }
    w.tiles = end > w.begin ? (end - w.begin + KEYS - 1) / KEYS : 0;
    if (FORCED) w.tiles += w.init_tiles, w.begin -= w.init_tiles * KEYS;
    return w;
}

// The same in uniform registers, as it comes to all lanes from one place.
static __device__ __forceinline__ QWorkItem uniform(QWorkItem w) {
    for (int *x = &w.row; x <= &w.init_tiles; x++) *x = __shfl_sync(0xffffffffu, *x, 0);
    return w;
}

// Barriers and tiles of forward: Q and what to do with it, of this work item and the next one; the ring of K
// and V.
template <int D> struct ForwardPipeline {
    static constexpr int Q_STAGES = 2, Q_BYTES = ROWS * D * 2, KV_BYTES = KEYS * D * 2;
    static constexpr int TILES = Q_STAGES * Q_BYTES + 2 * KV_STAGES * KV_BYTES;
    static constexpr int BYTES = TILES + Q_STAGES * (int)sizeof(QWorkItem);
    uint32_t q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty;
    __device__ __forceinline__ ForwardPipeline(uint32_t start) {
        q = start, k = q + Q_STAGES * Q_BYTES, v = k + KV_STAGES * KV_BYTES;
        q_full = start + BYTES, q_empty = q_full + 8 * Q_STAGES;
        k_full = q_empty + 8 * Q_STAGES, k_empty = k_full + 8 * KV_STAGES;
        v_full = k_empty + 8 * KV_STAGES, v_empty = v_full + 8 * KV_STAGES;
    }
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < Q_STAGES; i++)
            mbarrier_init(q_full + 8 * i, 1), mbarrier_init(q_empty + 8 * i, RELEASES);
        for (int i = 0; i < KV_STAGES; i++) {
            mbarrier_init(k_full + 8 * i, 1), mbarrier_init(k_empty + 8 * i, RELEASES);
            mbarrier_init(v_full + 8 * i, 1), mbarrier_init(v_empty + 8 * i, RELEASES);
        }
        mbarrier_init_fence();
    }
    // The producer's thread: all loads of this thread block. work: behind the tiles.
    template <bool FORCED>
    __device__ void produce(const DenseParams &p, const Maps &maps, int items, QWorkItem *work) const {
        const int g = p.q_heads / p.kv_heads, q_bytes = ROWS / g * g * D * 2;
        Turn<KV_STAGES> turn;
        Turn<Q_STAGES> q_turn;
        QWorkItem w = {};
        for (int round = 0; w.rows >= 0; round++) {
            int key0;
            w = q_work_item<FORCED>(p, round, items, &key0);
            if (w.rows == 0) continue;
            const uint32_t q_at = 8 * q_turn.stage;
            mbarrier_wait(q_empty + q_at, q_turn.parity ^ 1);
            work[q_turn.stage] = w;
            mbarrier_arrive_expect(q_full + q_at, w.tiles > 0 ? q_bytes : 0);
            for (int i = 0; i < D / 64 && w.tiles > 0; i++)
                tma_load_3d(q + q_turn.stage * Q_BYTES + i * ROWS * 128, &maps.q, i * 64, w.kv_head * g,
                            w.row, q_full + q_at);
            q_turn.next();
            for (int tile = 0; tile < w.tiles; tile++, turn.next()) {
                int key = key0 + w.first_key<FORCED>(tile);
                uint32_t at = 8 * turn.stage;
                mbarrier_wait(k_empty + at, turn.parity ^ 1);
                mbarrier_arrive_expect(k_full + at, KV_BYTES);
                for (int i = 0; i < D / 64; i++)
                    tma_load_3d(k + turn.stage * KV_BYTES + i * KEYS * 128, &maps.k, i * 64, w.kv_head, key,
                                k_full + at);
                mbarrier_wait(v_empty + at, turn.parity ^ 1);
                mbarrier_arrive_expect(v_full + at, KV_BYTES);
                for (int i = 0; i < D / 64; i++)
                    tma_load_3d(v + turn.stage * KV_BYTES + i * KEYS * 128, &maps.v, i * 64, w.kv_head, key,
                                v_full + at);
            }
        }
    }
};

// Rows that a thread holds of its warpgroup's 64: row[half], the keys begin..end that it sees, and its place
// in q.
struct ThreadRows {
    int row[2], begin[2], end[2];
    int64_t at[2]; // row * q_heads + head; -1: none
    template <bool FORCED>
    __device__ __forceinline__ void place(const DenseParams &p, const QWorkItem &w, int warpgroup) {
        const int g = p.q_heads / p.kv_heads;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row[i] = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
            const int token = fast_divide(row[i], p.group_divisor);
            at[i] = token < w.rows ? (int64_t)(w.row + token) * p.q_heads + w.kv_head * g + row[i] - token * g
                                   : -1;
            begin[i] = begin_of<FORCED>(p, w.first_pos + token), end[i] = end_of(p, w, w.first_pos + token);
        }
    }
    // Those of the query at a position; of forced blocks the local ones.
    template <bool FORCED> static __device__ __forceinline__ int begin_of(const DenseParams &p, int pos) {
        return FORCED ? p.forced.local_begin(pos) : p.visible.first_key(pos);
    }
    static __device__ __forceinline__ int end_of(const DenseParams &p, const QWorkItem &w, int pos) {
        return min(p.visible.end_key(pos), w.keys);
    }
};

// Scores that a row doesn't see become -inf, where a warpgroup's rows and the tile of keys j0.. meet the
// rule's edge. last_begin, first_end: of the warpgroup's last and first row. init: the tile is one of the
// first blocks'.
template <bool FORCED, int N8>
static __device__ __forceinline__ void mask_scores(const DenseParams &p, float (&s)[N8][4], const ThreadRows &mine,
                                                   int last_begin, int first_end, bool init, int j0) {
    const int init_end = p.forced.init_end;
    if (init) last_begin = 0, first_end = min(first_end, init_end);
    if (j0 >= last_begin && j0 + N8 * 8 <= first_end) return;
    const int mine0 = j0 + threadIdx.x % 4 * 2; // the thread's first key
    int begin[2], end[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        begin[i] = mine.begin[i] - mine0;
        end[i] = (FORCED && init ? min(mine.end[i], init_end) : mine.end[i]) - mine0;
    }
    if (FORCED && j0 >= last_begin) {
#pragma unroll
        for (int n = 0; n < N8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (n * 8 + e % 2 >= end[e / 2]) s[n][e] = -INFINITY;
        }
        return;
    }
#pragma unroll
    for (int n = 0; n < N8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int j = n * 8 + e % 2;
            if (j >= end[e / 2] || (j < begin[e / 2] && !(FORCED && j < init_end - mine0)))
                s[n][e] = -INFINITY;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// Forward
//
// A work item: o and lse of 128 rows. Each warpgroup computes S = Q K^T for one tile of keys while P V of the
// tile before is under way, and the two warpgroups take turns at issuing their products, so that one's
// softmax hides behind the other's products. Bytes: q and o once, K and V once for every 128 rows of a group
// (from L2). Floors: 4*d flops a visible pair at 790 TFLOP/s; exp 16 a clock and multiprocessor, a third of
// that time at d = 128. At 64K tokens, 32 heads, d = 128: causal 35 TFLOP, 44.5 ms; compressed 2.2 TFLOP, 2.8
// ms; window 512: 0.55 TFLOP, 0.7 ms, against 1.3 GB, 0.3 ms. FORCED: the rule of InitLocalBlocks, two ranges of keys;
// of 1 + 2 blocks of 64 two tiles an item, 0.27 TFLOP, 0.35 ms, against 1.1 GB, 0.24 ms: 0.68 on an H100.
template <typename T, int D, bool FORCED>
__global__ void __launch_bounds__(THREADS, 1)
    dense_forward_sm90_kernel(const DenseParams p, const __grid_constant__ Maps maps, int items) {
    extern __shared__ __align__(1024) char shared[];
    typedef ForwardPipeline<D> Ring;
    const uint32_t start = (smem_address(shared) + 1023) & ~1023u;
    char *const tiles = shared + (start - smem_address(shared));
    const Ring ring(start);
    QWorkItem *const work = (QWorkItem *)(tiles + Ring::TILES);
    char *const staging = tiles + Ring::BYTES + 128; // o on its way out, 128 x D
    if (threadIdx.x == 0) ring.init();
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); // in a uniform register
    if (warpgroup == 2) {
        warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMERS) ring.template produce<FORCED>(p, maps, items, work);
    } else {
        warpgroup_reg_alloc<CONSUMER_REGISTERS>();
        const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = p.q_heads / p.kv_heads;
        const float scale = p.scale * FSA_LOG2E;
        Turn<KV_STAGES> turn;
        Turn<Ring::Q_STAGES> q_turn;
        // Whose turn it is to issue products: barrier 1 + warpgroup opens when the other one has issued its
        // own.
        if (warpgroup == 1) named_barrier_arrive(1, CONSUMERS);
        for (;;) {
            mbarrier_wait(ring.q_full + 8 * q_turn.stage, q_turn.parity);
            const QWorkItem w = uniform(work[q_turn.stage]);
            if (w.rows < 0) break;
            ThreadRows mine;
            mine.place<FORCED>(p, w, warpgroup);
            const int first_pos = w.first_pos + fast_divide(warpgroup * 64, p.group_divisor),
                      last_pos = w.first_pos + fast_divide(warpgroup * 64 + 63, p.group_divisor),
                      first_end = ThreadRows::end_of(p, w, first_pos),
                      last_begin = ThreadRows::begin_of<FORCED>(p, last_pos);
            float out[D / 8][4], s[KEYS / 8][4], max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
            uint32_t probabilities[KEYS / 16][4];
            auto multiply_keys = [&]() { // S = Q K^T, the next tile's
                mbarrier_wait(ring.k_full + 8 * turn.stage, turn.parity);
                named_barrier_sync(1 + warpgroup, CONSUMERS);
                wgmma_fence();
                product_rows<T, D, ROWS, KEYS>(s,
                                               ring.q + q_turn.stage * Ring::Q_BYTES + warpgroup * 64 * 128,
                                               ring.k + turn.stage * Ring::KV_BYTES);
                wgmma_commit();
            };
            auto multiply_values = [&](const Turn<KV_STAGES> &at, bool add) { // out (+)= P V
                mbarrier_wait(ring.v_full + 8 * at.stage, at.parity);
                wgmma_fence();
                product_columns<T, KEYS>(out, probabilities, ring.v + at.stage * Ring::KV_BYTES, add);
                wgmma_commit();
            };
            float shrink[2];
            auto softmax = [&](int tile) { // S becomes exp(S - max), and the sums so far are to shrink
                mask_scores<FORCED>(p, s, mine, last_begin, first_end, FORCED && tile < w.init_tiles,
                                    w.first_key<FORCED>(tile));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float most = max[half];
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
                        most = fmaxf(most, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
                    most = quad_max(most);
                    // A row that has seen nothing yet has no maximum; 0 keeps its differences defined.
                    float base = most == -INFINITY ? 0 : most * scale, added = 0;
                    shrink[half] = exp2_fast(max[half] * scale - base);
                    max[half] = most;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float &x = s[n][half * 2 + e];
                            x = exp2_fast(x * scale - base);
                            added += x;
                        }
                    }
                    sum[half] = sum[half] * shrink[half] + added;
                }
            };
            auto pack = [&]() {
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) result_as_a<T>(probabilities[k], s[2 * k], s[2 * k + 1]);
            };

            if (w.tiles > 0) {
                multiply_keys();
                named_barrier_arrive(1 + (warpgroup ^ 1), CONSUMERS);
                wgmma_wait<0>();
                fence_operand(s);
                mbarrier_arrive_warp(ring.k_empty + 8 * turn.stage);
                softmax(0);
                pack();
                Turn<KV_STAGES> before = turn; // the tile whose P V is still to be done
                turn.next();
                for (int tile = 1; tile < w.tiles; tile++, turn.next()) {
                    multiply_keys();
                    multiply_values(before, tile > 1);
                    named_barrier_arrive(1 + (warpgroup ^ 1), CONSUMERS);
                    wgmma_wait<1>();
                    fence_operand(s);
                    mbarrier_arrive_warp(ring.k_empty + 8 * turn.stage);
                    softmax(tile);
                    wgmma_wait<0>();
                    fence_operand(out);
                    mbarrier_arrive_warp(ring.v_empty + 8 * before.stage);
                    before = turn;
#pragma unroll
                    for (int n = 0; n < D / 8; n++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) out[n][e] *= shrink[e / 2];
                    }
                    pack();
                }
                mbarrier_arrive_warp(ring.q_empty + 8 * q_turn.stage);
                int left = w.keys - w.first_key<FORCED>(w.tiles - 1);
                if (left < KEYS) {
                    mbarrier_wait(ring.v_full + 8 * before.stage, before.parity);
                    clear_rows<D, KEYS>(tiles + (ring.v - start) + before.stage * Ring::KV_BYTES, left);
                }
                multiply_values(before, w.tiles > 1);
                wgmma_wait<0>();
                fence_operand(out);
                mbarrier_arrive_warp(ring.v_empty + 8 * before.stage);
            } else {
                mbarrier_arrive_warp(ring.q_empty + 8 * q_turn.stage);
            }
            q_turn.next();

            // Through shared memory, so that rows are written in 16-byte pieces; each warp its own rows.
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float total = quad_sum(sum[half]), inverse = total > 0 ? 1 / total : 0;
                if (lane % 4 == 0 && mine.at[half] >= 0)
                    p.lse[mine.at[half]] = total > 0 ? max[half] * p.scale + logf(total) : -INFINITY;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    uint32_t x = w.tiles > 0
                                     ? pack2<T>(out[n][half * 2] * inverse, out[n][half * 2 + 1] * inverse)
                                     : 0;
                    *(uint32_t *)(staging + panel_offset(mine.row[half], n, ROWS * 128) + lane % 4 * 4) = x;
                }
            }
            __syncwarp();
            T *const o = (T *)p.o + ((int64_t)w.row * p.q_heads + w.kv_head * g) * D + lane % (D / 8) * 8;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                const int row = warpgroup * 64 + warp * 16 + (i * 32 + lane) / (D / 8),
                          token = fast_divide(row, p.group_divisor);
                if (token < w.rows)
                    *(uint4 *)(o + (token * p.q_heads + row - token * g) * D) =
                        *(uint4 *)(staging + panel_offset(row, lane % (D / 8), ROWS * 128));
            }
            __syncwarp();
        }
        if (warpgroup == 0) named_barrier_sync(1, CONSUMERS); // the turn that nobody took
    }
}

static int num_q_work_items(const DenseParams &d) {
    return (int)row_tile_bound(d.batch.nq, d.batch.num_segments, ROWS / (d.q_heads / d.kv_heads)) * d.kv_heads;
}

template <typename T, int D, bool FORCED>
static int launch_forward(const DenseParams &d, const Maps &maps, cudaStream_t stream) {
    int bytes = 1024 + ForwardPipeline<D>::BYTES + 128 + ROWS * D * 2;
    return launch(dense_forward_sm90_kernel<T, D, FORCED>, d, maps, num_q_work_items(d), bytes, stream);
}
template <typename T, int D> static int forward_sm90(const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    Maps maps = {};
    int status = make_maps(d, dtype, D, ROWS / (d.q_heads / d.kv_heads), &maps);
    if (status) return status;
    return d.forced.init + d.forced.local > 0 ? launch_forward<T, D, true>(d, maps, stream)
                                              : launch_forward<T, D, false>(d, maps, stream);
}

int fsa_dense_forward_sm90(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, forward_sm90, d, dtype, stream);
}
