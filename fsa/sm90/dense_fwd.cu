// sm90/dense_fwd.cu: forward pass of dense attention on Hopper. ../dense.cuh lists the rules.
//
//     S = scale Q K^T, masked    P = exp(S - max)    O = P V / sum(P)    lse = max + ln sum(P)
//
// A work item is O and lse of 128 rows of one KV head: 128/g queries times the g heads of its group.
// Persistent thread blocks, one per SM, process work items in a static order:
//
//     warpgroups 0 and 1           64 rows each: matmuls, online softmax, O and lse to memory
//     warpgroup 2, one thread      loads by TMA: Q of the next work item, then its K and V tiles of 128 keys
//
// A consumer issues S of key tile j and P V of tile j - 1 together. Two named barriers make the consumers
// alternate, so that the softmax of one overlaps the matmuls of the other:
//
//     warpgroup 0    S(j), PV(j-1) | softmax(j)    | S(j+1), PV(j) | softmax(j+1)  | ...
//     warpgroup 1    softmax(j-1)  | S(j), PV(j-1) | softmax(j)    | S(j+1), PV(j) | ...
//
// Shared memory, d = 128: Q 2 x 32 KiB, K 2 x 32 KiB, V 2 x 32 KiB, O 32 KiB. One warpgroup sums over the
// keys of a row in a fixed order, so O and lse are reproducible.
//
// Lower bounds at 64K tokens, (32, 8) heads, d = 128; rates in ../README.md. Matmuls: 4*d FLOPs per visible
// pair. HBM: q, k, v, o once. The kernel is limited by the matmuls.
//
//                                     matmuls                    exp                HBM
//     causal                            35 TFLOP    44.5 ms      69 G    18.6 ms    1.3 GB    0.3 ms
//     compressed                       2.2 TFLOP     2.8 ms     4.3 G     1.2 ms    1.1 GB    0.2 ms
//     window 512                      0.55 TFLOP     0.7 ms     1.1 G     0.3 ms    1.3 GB    0.3 ms
//     1 initial, 2 local blocks *     0.27 TFLOP    0.35 ms    0.54 G    0.15 ms    1.3 GB    0.3 ms
//
// * computed as two whole tiles of 128 keys
#include "dense.cuh"

// Up to 128/g queries of one KV head, and the tiles of KEYS keys that they see. Tiles cover one range of
// keys, or with INIT_LOCAL two: the initial blocks and the local blocks.
struct QWorkItem {
    int query0, num_queries;       // first query in q; num_queries 0: empty item, -1: no more items
    int kv_head, first_pos;        // position of the first query in its sequence
    int key_begin, seq_keys;       // offset of the tiles, see first_key; keys of the whole sequence
    int num_tiles, num_init_tiles; // all tiles; tiles of the initial blocks, which come first

    // Returns the first key of a tile, counted within the sequence.
    template <bool INIT_LOCAL> __device__ __forceinline__ int first_key(int tile) const {
        return INIT_LOCAL && tile < num_init_tiles ? tile * KEYS : key_begin + tile * KEYS;
    }
};

// Returns the thread block's work item of a round and, in *seq_key0, the row of its sequence's first key in
// k. Items begin with the last queries of the batch, so that the longest rows of a sequence come first. Odd
// rounds assign items to thread blocks in reverse order, which balances the load.
template <bool INIT_LOCAL>
static __device__ __forceinline__ QWorkItem find_q_work_item(const DenseParams &p, int round, int num_items,
                                                             int *seq_key0) {
    const int item = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    QWorkItem w = {};
    w.num_queries = -1;
    if (item >= num_items) return w;
    const int g = p.q_heads / p.kv_heads, tile = item / p.kv_heads;
    const RowTile queries = find_row_tile(p.batch.cu_queries, p.batch.num_segments, FWD_ROWS / g,
                                          num_items / p.kv_heads - 1 - tile);
    w.query0 = (int)queries.row, w.num_queries = queries.rows;
    w.kv_head = item - tile * p.kv_heads;
    if (w.num_queries == 0) return w;
    FsaSegment segment = p.batch.segments[queries.cu_index];
    w.first_pos = (int)segment.pos + queries.first;
    w.key_begin = INIT_LOCAL ? p.init_local.local_begin(w.first_pos) : p.mask.first_key(w.first_pos);
    *seq_key0 = (int)p.cu_keys[segment.seq];
    w.seq_keys = (int)p.cu_keys[segment.seq + 1] - *seq_key0;
    int end = min(p.mask.end_key(w.first_pos + w.num_queries - 1), w.seq_keys);
    if (INIT_LOCAL) {
        const int init_end = min(p.init_local.init_end, end);
        if (p.init_local.local_blocks == 0) end = init_end;
        w.num_init_tiles = (init_end + KEYS - 1) / KEYS;
        if (w.num_init_tiles * KEYS >= w.key_begin) w.num_init_tiles = w.key_begin = 0; // the ranges meet
    }
    w.num_tiles = end > w.key_begin ? (end - w.key_begin + KEYS - 1) / KEYS : 0;
    if (INIT_LOCAL) w.num_tiles += w.num_init_tiles, w.key_begin -= w.num_init_tiles * KEYS;
    return w;
}

// Broadcasts lane 0's copy, so that the compiler keeps the fields in uniform registers.
static __device__ __forceinline__ QWorkItem to_uniform_registers(QWorkItem w) {
    for (int *x = &w.query0; x <= &w.num_init_tiles; x++) *x = __shfl_sync(0xffffffffu, *x, 0);
    return w;
}

// Shared memory and the producer that fills it. Parts: two stages of Q with its work item, KV_STAGES stages
// of K and of V, a full and an empty barrier per stage; staging of O. Addresses are 32-bit shared-memory
// addresses.
//
//     0: Q tiles | K tiles | V tiles | WORK_OFFSET: work items | BARRIER_OFFSET: barriers, 128 bytes | O
template <int D> struct DenseForwardSmem {
    static constexpr int Q_STAGES = 2, Q_BYTES = FWD_ROWS * D * 2, KV_BYTES = KEYS * D * 2;
    static constexpr int WORK_OFFSET = Q_STAGES * Q_BYTES + 2 * KV_STAGES * KV_BYTES;
    static constexpr int BARRIER_OFFSET = WORK_OFFSET + Q_STAGES * (int)sizeof(QWorkItem);
    uint32_t q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty;
    __device__ __forceinline__ DenseForwardSmem(uint32_t start) {
        q = start, k = q + Q_STAGES * Q_BYTES, v = k + KV_STAGES * KV_BYTES;
        q_full = start + BARRIER_OFFSET, q_empty = q_full + 8 * Q_STAGES;
        k_full = q_empty + 8 * Q_STAGES, k_empty = k_full + 8 * KV_STAGES;
        v_full = k_empty + 8 * KV_STAGES, v_empty = v_full + 8 * KV_STAGES;
    }
    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < Q_STAGES; i++)
            mbarrier_init(q_full + 8 * i, 1), mbarrier_init(q_empty + 8 * i, CONSUMER_ARRIVALS);
        for (int i = 0; i < KV_STAGES; i++) {
            mbarrier_init(k_full + 8 * i, 1), mbarrier_init(k_empty + 8 * i, CONSUMER_ARRIVALS);
            mbarrier_init(v_full + 8 * i, 1), mbarrier_init(v_empty + 8 * i, CONSUMER_ARRIVALS);
        }
        mbarrier_init_fence();
    }
    // The producer thread: finds the thread block's work items, writes them to `work` and loads their tiles.
    template <bool INIT_LOCAL>
    __device__ void load_tiles(const DenseParams &p, const TensorMaps &maps, int num_items,
                               QWorkItem *work) const {
        const int g = p.q_heads / p.kv_heads, q_bytes = FWD_ROWS / g * g * D * 2;
        PipelineState<KV_STAGES> kv_state;
        PipelineState<Q_STAGES> q_state;
        QWorkItem w = {};
        for (int round = 0; w.num_queries >= 0; round++) {
            int seq_key0;
            w = find_q_work_item<INIT_LOCAL>(p, round, num_items, &seq_key0);
            if (w.num_queries == 0) continue;
            const uint32_t q_barrier = 8 * q_state.stage;
            mbarrier_wait(q_empty + q_barrier, q_state.phase ^ 1);
            work[q_state.stage] = w;
            mbarrier_arrive_expect_tx(q_full + q_barrier, w.num_tiles > 0 ? q_bytes : 0);
            for (int i = 0; i < D / 64 && w.num_tiles > 0; i++)
                tma_load_3d(q + q_state.stage * Q_BYTES + i * FWD_ROWS * 128, &maps.q, i * 64, w.kv_head * g,
                            w.query0, q_full + q_barrier);
            q_state.advance();
            for (int tile = 0; tile < w.num_tiles; tile++, kv_state.advance()) {
                int key = seq_key0 + w.first_key<INIT_LOCAL>(tile);
                uint32_t kv_barrier = 8 * kv_state.stage;
                mbarrier_wait(k_empty + kv_barrier, kv_state.phase ^ 1);
                mbarrier_arrive_expect_tx(k_full + kv_barrier, KV_BYTES);
                for (int i = 0; i < D / 64; i++)
                    tma_load_3d(k + kv_state.stage * KV_BYTES + i * KEYS * 128, &maps.k, i * 64, w.kv_head,
                                key, k_full + kv_barrier);
                mbarrier_wait(v_empty + kv_barrier, kv_state.phase ^ 1);
                mbarrier_arrive_expect_tx(v_full + kv_barrier, KV_BYTES);
                for (int i = 0; i < D / 64; i++)
                    tma_load_3d(v + kv_state.stage * KV_BYTES + i * KEYS * 128, &maps.v, i * 64, w.kv_head,
                                key, v_full + kv_barrier);
            }
        }
    }
};

// The two rows of the tile whose scores a thread holds.
struct ThreadRows {
    int row[2];                   // in the tile, 0 .. 127
    int key_begin[2], key_end[2]; // keys that the row sees; with INIT_LOCAL those of its local blocks
    int64_t lse_index[2];         // query * q_heads + head, or -1 past the work item's queries
    template <bool INIT_LOCAL>
    __device__ __forceinline__ void init(const DenseParams &p, const QWorkItem &w, int warpgroup) {
        const int g = p.q_heads / p.kv_heads;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row[i] = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
            const int query = fast_divide(row[i], p.group_divisor);
            lse_index[i] = query < w.num_queries
                               ? (int64_t)(w.query0 + query) * p.q_heads + w.kv_head * g + row[i] - query * g
                               : -1;
            key_begin[i] = first_key_at<INIT_LOCAL>(p, w.first_pos + query);
            key_end[i] = end_key_at(p, w, w.first_pos + query);
        }
    }
    // The range of keys that the query at position pos sees; with INIT_LOCAL the range of its local blocks.
    template <bool INIT_LOCAL>
    static __device__ __forceinline__ int first_key_at(const DenseParams &p, int pos) {
        return INIT_LOCAL ? p.init_local.local_begin(pos) : p.mask.first_key(pos);
    }
    static __device__ __forceinline__ int end_key_at(const DenseParams &p, const QWorkItem &w, int pos) {
        return min(p.mask.end_key(pos), w.seq_keys);
    }
};

// Sets the scores of invisible keys to -inf, in the tile of keys that starts at j0. max_key_begin and
// min_key_end are the tightest bounds of the warpgroup's rows: a tile within them needs no mask. init: the
// tile belongs to the initial blocks.
template <bool INIT_LOCAL, int N8>
static __device__ __forceinline__ void mask_scores(const DenseParams &p, float (&s)[N8][4],
                                                   const ThreadRows &rows, int max_key_begin, int min_key_end,
                                                   bool init, int j0) {
    const int init_end = p.init_local.init_end;
    if (init) max_key_begin = 0, min_key_end = min(min_key_end, init_end);
    if (j0 >= max_key_begin && j0 + N8 * 8 <= min_key_end) return;
    const int thread_key0 = j0 + threadIdx.x % 4 * 2; // the first key of the thread
    int begin[2], end[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        begin[i] = rows.key_begin[i] - thread_key0;
        end[i] = (INIT_LOCAL && init ? min(rows.key_end[i], init_end) : rows.key_end[i]) - thread_key0;
    }
    if (INIT_LOCAL && j0 >= max_key_begin) {
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
            if (j >= end[e / 2] || (j < begin[e / 2] && !(INIT_LOCAL && j < init_end - thread_key0)))
                s[n][e] = -INFINITY;
        }
    }
}

// INIT_LOCAL: queries see the initial and local blocks (p.init_local); p.mask gives the causal bound.
template <typename T, int D, bool INIT_LOCAL>
__global__ void __launch_bounds__(THREADS, 1)
    dense_forward_sm90_kernel(const DenseParams p, const __grid_constant__ TensorMaps maps, int num_items) {
    extern __shared__ __align__(1024) char shared[];
    typedef DenseForwardSmem<D> Smem;
    const uint32_t start = (smem_address(shared) + 1023) & ~1023u;
    char *const tiles = shared + (start - smem_address(shared));
    const Smem smem(start);
    QWorkItem *const work = (QWorkItem *)(tiles + Smem::WORK_OFFSET);
    char *const smem_o = tiles + Smem::BARRIER_OFFSET + 128; // [128, D], staging of O
    if (threadIdx.x == 0) smem.init_barriers();
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); // in a uniform register
    if (warpgroup == 2) {
        warpgroup_reg_dealloc<FWD_PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) smem.template load_tiles<INIT_LOCAL>(p, maps, num_items, work);
    } else {
        warpgroup_reg_alloc<FWD_CONSUMER_REGISTERS>();
        const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = p.q_heads / p.kv_heads;
        const float scale = p.scale * FSA_LOG2E;
        PipelineState<KV_STAGES> kv_state;
        PipelineState<Smem::Q_STAGES> q_state;
        // Named barrier 1 + w admits warpgroup w once the other warpgroup has issued its matmuls.
        if (warpgroup == 1) named_barrier_arrive(1, CONSUMER_THREADS);
        for (;;) {
            mbarrier_wait(smem.q_full + 8 * q_state.stage, q_state.phase);
            const QWorkItem w = to_uniform_registers(work[q_state.stage]);
            if (w.num_queries < 0) break;
            ThreadRows rows;
            rows.init<INIT_LOCAL>(p, w, warpgroup);
            const int first_pos = w.first_pos + fast_divide(warpgroup * 64, p.group_divisor),
                      last_pos = w.first_pos + fast_divide(warpgroup * 64 + 63, p.group_divisor),
                      min_key_end = ThreadRows::end_key_at(p, w, first_pos),
                      max_key_begin = ThreadRows::first_key_at<INIT_LOCAL>(p, last_pos);
            float out[D / 8][4], s[KEYS / 8][4], row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};
            uint32_t p_frag[KEYS / 16][4];
            // S = Q K^T of the tile at kv_state
            auto gemm_qk = [&]() {
                mbarrier_wait(smem.k_full + 8 * kv_state.stage, kv_state.phase);
                named_barrier_sync(1 + warpgroup, CONSUMER_THREADS);
                wgmma_fence();
                gemm_ss<T, D, FWD_ROWS, KEYS>(s,
                                              smem.q + q_state.stage * Smem::Q_BYTES + warpgroup * 64 * 128,
                                              smem.k + kv_state.stage * Smem::KV_BYTES);
                wgmma_commit();
            };
            // O (+)= P V of the tile at state
            auto gemm_pv = [&](const PipelineState<KV_STAGES> &state, bool accumulate) {
                mbarrier_wait(smem.v_full + 8 * state.stage, state.phase);
                wgmma_fence();
                gemm_rs<T, KEYS>(out, p_frag, smem.v + state.stage * Smem::KV_BYTES, accumulate);
                wgmma_commit();
            };
            float rescale[2];
            // S = exp(S - max). Updates the rows' max and sum; rescale is the factor for the earlier O.
            auto softmax = [&](int tile) {
                mask_scores<INIT_LOCAL>(p, s, rows, max_key_begin, min_key_end,
                                        INIT_LOCAL && tile < w.num_init_tiles, w.first_key<INIT_LOCAL>(tile));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float new_max = row_max[half];
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
                        new_max = fmaxf(new_max, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
                    new_max = quad_reduce_max(new_max);
                    // While a row has seen no key, its maximum is -inf. 0 instead avoids inf - inf.
                    float scaled_max = new_max == -INFINITY ? 0 : new_max * scale, tile_sum = 0;
                    rescale[half] = exp2_fast(row_max[half] * scale - scaled_max);
                    row_max[half] = new_max;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float &x = s[n][half * 2 + e];
                            x = exp2_fast(x * scale - scaled_max);
                            tile_sum += x;
                        }
                    }
                    row_sum[half] = row_sum[half] * rescale[half] + tile_sum;
                }
            };
            auto pack_p = [&]() {
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) accum_as_a<T>(p_frag[k], s[2 * k], s[2 * k + 1]);
            };

            // Main loop: S of this tile and P V of the previous one are in flight together.
            if (w.num_tiles > 0) {
                gemm_qk();
                named_barrier_arrive(1 + (warpgroup ^ 1), CONSUMER_THREADS);
                wgmma_wait<0>();
                fence_operand(s);
                mbarrier_arrive_warp(smem.k_empty + 8 * kv_state.stage);
                softmax(0);
                pack_p();
                PipelineState<KV_STAGES> prev = kv_state; // the tile whose P V is pending
                kv_state.advance();
                for (int tile = 1; tile < w.num_tiles; tile++, kv_state.advance()) {
                    gemm_qk();
                    gemm_pv(prev, tile > 1);
                    named_barrier_arrive(1 + (warpgroup ^ 1), CONSUMER_THREADS);
                    wgmma_wait<1>();
                    fence_operand(s);
                    mbarrier_arrive_warp(smem.k_empty + 8 * kv_state.stage);
                    softmax(tile);
                    wgmma_wait<0>();
                    fence_operand(out);
                    mbarrier_arrive_warp(smem.v_empty + 8 * prev.stage);
                    prev = kv_state;
#pragma unroll
                    for (int n = 0; n < D / 8; n++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) out[n][e] *= rescale[e / 2];
                    }
                    pack_p();
                }
                mbarrier_arrive_warp(smem.q_empty + 8 * q_state.stage);
                int valid_keys = w.seq_keys - w.first_key<INIT_LOCAL>(w.num_tiles - 1);
                if (valid_keys < KEYS) {
                    mbarrier_wait(smem.v_full + 8 * prev.stage, prev.phase);
                    clear_rows<D, KEYS>(tiles + (smem.v - start) + prev.stage * Smem::KV_BYTES, valid_keys);
                }
                gemm_pv(prev, w.num_tiles > 1);
                wgmma_wait<0>();
                fence_operand(out);
                mbarrier_arrive_warp(smem.v_empty + 8 * prev.stage);
            } else {
                mbarrier_arrive_warp(smem.q_empty + 8 * q_state.stage);
            }
            q_state.advance();

            // Epilogue: each warp stages its own rows in shared memory and writes them in 16-byte chunks.
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float total = quad_reduce_sum(row_sum[half]), inverse = total > 0 ? 1 / total : 0;
                if (lane % 4 == 0 && rows.lse_index[half] >= 0)
                    p.lse[rows.lse_index[half]] =
                        total > 0 ? row_max[half] * p.scale + logf(total) : -INFINITY;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    uint32_t x = w.num_tiles > 0
                                     ? pack2<T>(out[n][half * 2] * inverse, out[n][half * 2 + 1] * inverse)
                                     : 0;
                    *(uint32_t *)(smem_o + panel_offset(rows.row[half], n, FWD_ROWS * 128) + lane % 4 * 4) =
                        x;
                }
            }
            __syncwarp();
            T *const o =
                (T *)p.o.data + ((int64_t)w.query0 * p.q_heads + w.kv_head * g) * D + lane % (D / 8) * 8;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                const int row = warpgroup * 64 + warp * 16 + (i * 32 + lane) / (D / 8),
                          query = fast_divide(row, p.group_divisor);
                if (query < w.num_queries)
                    *(uint4 *)(o + (query * p.q_heads + row - query * g) * D) =
                        *(uint4 *)(smem_o + panel_offset(row, lane % (D / 8), FWD_ROWS * 128));
            }
            __syncwarp();
        }
        if (warpgroup == 0) named_barrier_sync(1, CONSUMER_THREADS); // balances the last arrive
    }
}

// An upper bound: some work items may be empty.
static int num_q_work_items(const DenseParams &d) {
    return (int)max_row_tiles(d.batch.nq, d.batch.num_segments, FWD_ROWS / (d.q_heads / d.kv_heads)) *
           d.kv_heads;
}

template <typename T, int D, bool INIT_LOCAL>
static int launch_forward(const DenseParams &d, const TensorMaps &maps, cudaStream_t stream) {
    int bytes = 1024 + DenseForwardSmem<D>::BARRIER_OFFSET + 128 + FWD_ROWS * D * 2;
    return launch_persistent("dense_forward_sm90_kernel", dense_forward_sm90_kernel<T, D, INIT_LOCAL>, d,
                             maps, num_q_work_items(d), bytes, stream);
}
template <typename T, int D>
static int forward_sm90(const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    TensorMaps maps = {};
    TRY(make_tensor_maps(d, dtype, D, FWD_ROWS / (d.q_heads / d.kv_heads), &maps));
    return d.init_local.init_blocks + d.init_local.local_blocks > 0
               ? launch_forward<T, D, true>(d, maps, stream)
               : launch_forward<T, D, false>(d, maps, stream);
}

int fsa_dense_forward_sm90(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, forward_sm90, d, dtype, stream);
}
