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
static __device__ __forceinline__ QWorkItem to_uniform_registers(const QWorkItem &w) {
    auto uniform = [](int x) { return __shfl_sync(0xffffffffu, x, 0); };
    return {uniform(w.query0),    uniform(w.num_queries), uniform(w.kv_head),   uniform(w.first_pos),
            uniform(w.key_begin), uniform(w.seq_keys),    uniform(w.num_tiles), uniform(w.num_init_tiles)};
}

// Shared memory: two stages of Q with its work item, KV_STAGES stages of K and of V, a full and an empty
// barrier per stage; staging of O. Tiles are named by their 32-bit shared-memory address.
//
//     0: Q tiles | K tiles | V tiles | WORK_OFFSET: work items | BARRIER_OFFSET: barriers, 128 bytes | O
template <int D> struct DenseForwardSmem {
    static constexpr int Q_STAGES = 2, Q_BYTES = FWD_ROWS * D * 2, KV_BYTES = KEYS * D * 2;
    static constexpr int K_OFFSET = Q_STAGES * Q_BYTES, V_OFFSET = K_OFFSET + KV_STAGES * KV_BYTES;
    static constexpr int WORK_OFFSET = V_OFFSET + KV_STAGES * KV_BYTES;
    static constexpr int BARRIER_OFFSET = WORK_OFFSET + Q_STAGES * (int)sizeof(QWorkItem);
    static constexpr int O_OFFSET = BARRIER_OFFSET + 128;
    static constexpr int BYTES = O_OFFSET + FWD_ROWS * D * 2 + 1024; // 1,024 to align the start
    uint32_t start;
    char *bytes; // the same address, as a generic pointer
    __device__ __forceinline__ DenseForwardSmem(char *shared)
        : start((smem_address(shared) + 1023) & ~1023u), bytes(shared + (start - smem_address(shared))) {}
    __device__ __forceinline__ uint32_t q(int stage) const { return start + stage * Q_BYTES; }
    __device__ __forceinline__ uint32_t k(int stage) const { return start + K_OFFSET + stage * KV_BYTES; }
    __device__ __forceinline__ uint32_t v(int stage) const { return start + V_OFFSET + stage * KV_BYTES; }
    __device__ __forceinline__ char *pointer(uint32_t address) const { return bytes + (address - start); }
    __device__ __forceinline__ QWorkItem &work_item(int q_stage) const {
        return ((QWorkItem *)(bytes + WORK_OFFSET))[q_stage];
    }
    __device__ __forceinline__ char *o() const { return bytes + O_OFFSET; } // [128, D]
    // The barriers of Q, of K, and of V, each: full | empty
    __device__ __forceinline__ PipelineState q_pipe() const {
        const uint32_t full = start + BARRIER_OFFSET;
        return PipelineState(full, full + 8 * Q_STAGES, Q_STAGES);
    }
    __device__ __forceinline__ PipelineState k_pipe() const {
        const uint32_t full = start + BARRIER_OFFSET + 16 * Q_STAGES;
        return PipelineState(full, full + 8 * KV_STAGES, KV_STAGES);
    }
    __device__ __forceinline__ PipelineState v_pipe() const {
        const uint32_t full = start + BARRIER_OFFSET + 16 * Q_STAGES + 16 * KV_STAGES;
        return PipelineState(full, full + 8 * KV_STAGES, KV_STAGES);
    }
    __device__ __forceinline__ void init_barriers() const {
        const PipelineState pipes[] = {q_pipe(), k_pipe(), v_pipe()};
        for (const PipelineState &pipe : pipes)
            for (int i = 0; i < pipe.stages; i++)
                mbarrier_init(pipe.full + 8 * i, 1), mbarrier_init(pipe.empty + 8 * i, CONSUMER_ARRIVALS);
        mbarrier_init_fence();
    }
};

// ---- producer, one thread ---------------------------------------------------------------------------------
// Publishes a work item and loads its Q tile into the next stage; an item without keys needs no Q.
template <int D>
static __device__ __forceinline__ void load_q_tile(const DenseParams &p, const TensorMaps &maps,
                                                   const DenseForwardSmem<D> &smem, const QWorkItem &w,
                                                   PipelineState &q_pipe) {
    const int g = p.q_heads / p.kv_heads, bytes = FWD_ROWS / g * g * D * 2;
    q_pipe.wait_empty();
    smem.work_item(q_pipe.stage) = w;
    mbarrier_arrive_expect_tx(q_pipe.full_barrier(), w.num_tiles > 0 ? bytes : 0);
    if (w.num_tiles > 0)
        load_tile<D, FWD_ROWS>(smem.q(q_pipe.stage), &maps.q, w.kv_head * g, w.query0, q_pipe.full_barrier());
    q_pipe.advance();
}
// Loads the K or V tile of the KEYS keys from row `key` of k or v into the next stage of its pipeline.
template <int D>
static __device__ __forceinline__ void load_kv_tile(uint32_t tile, const CUtensorMap *map, int kv_head,
                                                    int key, PipelineState &pipe) {
    pipe.wait_empty();
    mbarrier_arrive_expect_tx(pipe.full_barrier(), KEYS * D * 2);
    load_tile<D, KEYS>(tile, map, kv_head, key, pipe.full_barrier());
    pipe.advance();
}
// Finds the thread block's work items, and loads their tiles.
template <int D, bool INIT_LOCAL>
static __device__ __forceinline__ void load_tiles(const DenseParams &p, const TensorMaps &maps,
                                                  const DenseForwardSmem<D> &smem, int num_items) {
    PipelineState q_pipe = smem.q_pipe(), k_pipe = smem.k_pipe(), v_pipe = smem.v_pipe();
    QWorkItem w = {};
    for (int round = 0; w.num_queries >= 0; round++) {
        int seq_key0;
        w = find_q_work_item<INIT_LOCAL>(p, round, num_items, &seq_key0);
        if (w.num_queries == 0) continue;
        load_q_tile(p, maps, smem, w, q_pipe);
        for (int tile = 0; tile < w.num_tiles; tile++) {
            const int key = seq_key0 + w.first_key<INIT_LOCAL>(tile);
            load_kv_tile<D>(smem.k(k_pipe.stage), &maps.k, w.kv_head, key, k_pipe);
            load_kv_tile<D>(smem.v(v_pipe.stage), &maps.v, w.kv_head, key, v_pipe);
        }
    }
}

// ---- consumers, two warpgroups ----------------------------------------------------------------------------
// The two rows of the tile whose scores a thread holds, and bounds of all rows of its warpgroup.
struct ThreadRows {
    int row[2];                     // in the tile, 0 .. 127
    int key_begin[2], key_end[2];   // keys that the row sees; with INIT_LOCAL those of its local blocks
    int64_t lse_index[2];           // query * q_heads + head, or -1 past the work item's queries
    int max_key_begin, min_key_end; // of the warpgroup's 64 rows: a tile of keys within them needs no mask
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
        const int first_pos = w.first_pos + fast_divide(warpgroup * 64, p.group_divisor),
                  last_pos = w.first_pos + fast_divide(warpgroup * 64 + 63, p.group_divisor);
        min_key_end = end_key_at(p, w, first_pos);
        max_key_begin = first_key_at<INIT_LOCAL>(p, last_pos);
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

// S (64 x 128) = Q K^T of the warpgroup's 64 rows of a Q tile, asynchronous.
template <typename T, int D>
static __device__ __forceinline__ void issue_qk(float (&s)[KEYS / 8][4], uint32_t q, uint32_t k) {
    wgmma_fence();
    gemm_ss<T, D, FWD_ROWS, KEYS>(s, q, k);
    wgmma_commit();
}
// O (64 x D) = (accumulate ? O : 0) + P V, asynchronous. P (64 x 128) in registers.
template <typename T, int D>
static __device__ __forceinline__ void issue_pv(float (&o)[D / 8][4], const uint32_t (&p_frag)[KEYS / 16][4],
                                                uint32_t v, bool accumulate) {
    wgmma_fence();
    gemm_rs<T, KEYS>(o, p_frag, v, accumulate);
    wgmma_commit();
}

// Order in which the consumers issue matmuls: named barrier 1 + w admits warpgroup w once the other warpgroup
// has issued its matmuls.
static __device__ __forceinline__ void scheduler_barrier_sync(int warpgroup) {
    named_barrier_sync(1 + warpgroup, CONSUMER_THREADS);
}
static __device__ __forceinline__ void scheduler_barrier_arrive(int other_warpgroup) {
    named_barrier_arrive(1 + other_warpgroup, CONSUMER_THREADS);
}

// Sets the scores of invisible keys to -inf. S (64 x 128) of key tile `tile` of the work item.
template <bool INIT_LOCAL, int N8>
static __device__ __forceinline__ void mask_scores(const DenseParams &p, float (&s)[N8][4],
                                                   const QWorkItem &w, const ThreadRows &rows, int tile) {
    const int j0 = w.first_key<INIT_LOCAL>(tile), init_end = p.init_local.init_end;
    const bool init = INIT_LOCAL && tile < w.num_init_tiles; // the tile belongs to the initial blocks
    const int max_key_begin = init ? 0 : rows.max_key_begin,
              min_key_end = init ? min(rows.min_key_end, init_end) : rows.min_key_end;
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

// The online softmax of the thread's two rows.
struct OnlineSoftmax {
    float row_max[2], row_sum[2]; // over the tiles so far; row_sum: of the thread's keys only
    float rescale[2];             // factor of the O of the tiles before the last one
    __device__ __forceinline__ OnlineSoftmax() : row_max{-INFINITY, -INFINITY}, row_sum{0, 0}, rescale{} {}
    // S = exp(scale S - max), in base 2. Updates the rows' max and sum.
    template <int N8> __device__ __forceinline__ void update(float (&s)[N8][4], float scale) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float new_max = row_max[half];
#pragma unroll
            for (int n = 0; n < N8; n++) new_max = fmaxf(new_max, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
            new_max = quad_reduce_max(new_max);
            // While a row has seen no key, its maximum is -inf. 0 instead avoids inf - inf.
            float scaled_max = new_max == -INFINITY ? 0 : new_max * scale, tile_sum = 0;
            rescale[half] = exp2_fast(row_max[half] * scale - scaled_max);
            row_max[half] = new_max;
#pragma unroll
            for (int n = 0; n < N8; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = s[n][half * 2 + e];
                    x = exp2_fast(x * scale - scaled_max);
                    tile_sum += x;
                }
            }
            row_sum[half] = row_sum[half] * rescale[half] + tile_sum;
        }
    }
};
// O (64 x D) *= softmax.rescale.
template <int N8>
static __device__ __forceinline__ void rescale_o(float (&o)[N8][4], const OnlineSoftmax &softmax) {
#pragma unroll
    for (int n = 0; n < N8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) o[n][e] *= softmax.rescale[e / 2];
    }
}
// Epilogue: lse, and O (64 x D) / sum, to memory. Each warp stages its 16 rows in shared memory and writes
// them in 16-byte chunks.
template <typename T, int D>
static __device__ __forceinline__ void store_o(const DenseParams &p, const QWorkItem &w,
                                               const ThreadRows &rows, const float (&out)[D / 8][4],
                                               const OnlineSoftmax &softmax, char *smem_o) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = p.q_heads / p.kv_heads;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = quad_reduce_sum(softmax.row_sum[half]), inverse = total != 0 ? 1 / total : 0;
        if (lane % 4 == 0 && rows.lse_index[half] >= 0)
            p.lse[rows.lse_index[half]] =
                total != 0 ? softmax.row_max[half] * p.scale + logf(total) : -INFINITY;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            uint32_t x =
                w.num_tiles > 0 ? pack2<T>(out[n][half * 2] * inverse, out[n][half * 2 + 1] * inverse) : 0;
            *(uint32_t *)(smem_o + panel_offset(rows.row[half], n, FWD_ROWS * 128) + lane % 4 * 4) = x;
        }
    }
    __syncwarp();
    T *const o = (T *)p.o.data + w.query0 * p.o.stride + w.kv_head * g * D + lane % (D / 8) * 8;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int row = warp * 16 + (i * 32 + lane) / (D / 8), query = fast_divide(row, p.group_divisor);
        if (query < w.num_queries)
            *(uint4 *)(o + (unsigned)query * p.o.stride + (row - query * g) * D) =
                *(uint4 *)(smem_o + panel_offset(row, lane % (D / 8), FWD_ROWS * 128));
    }
    __syncwarp();
}

// INIT_LOCAL: queries see the initial and local blocks (p.init_local); p.mask gives the causal bound.
template <typename T, int D, bool INIT_LOCAL>
__global__ void __launch_bounds__(THREADS, 1)
    dense_forward_sm90_kernel(const DenseParams p, const __grid_constant__ TensorMaps maps, int num_items) {
    extern __shared__ __align__(1024) char shared[];
    const DenseForwardSmem<D> smem(shared);
    if (threadIdx.x == 0) smem.init_barriers();
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); // in a uniform register
    if (warpgroup == 2) {
        warpgroup_reg_dealloc<FWD_PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) load_tiles<D, INIT_LOCAL>(p, maps, smem, num_items);
        return;
    }
    warpgroup_reg_alloc<FWD_CONSUMER_REGISTERS>();
    const float scale = p.scale * FSA_LOG2E;
    PipelineState q_pipe = smem.q_pipe(), k_pipe = smem.k_pipe(), v_pipe = smem.v_pipe();
    if (warpgroup == 1) scheduler_barrier_arrive(0);
    for (;; q_pipe.advance()) {
        q_pipe.wait_full();
        const QWorkItem w = to_uniform_registers(smem.work_item(q_pipe.stage));
        if (w.num_queries < 0) break;
        const uint32_t q = smem.q(q_pipe.stage) + warpgroup * 64 * 128; // the warpgroup's rows
        ThreadRows rows;
        rows.init<INIT_LOCAL>(p, w, warpgroup);
        OnlineSoftmax softmax;
        float o[D / 8][4], s[KEYS / 8][4];
        uint32_t p_frag[KEYS / 16][4];
        if (w.num_tiles > 0) {
            // S(0)
            k_pipe.wait_full();
            scheduler_barrier_sync(warpgroup);
            issue_qk<T, D>(s, q, smem.k(k_pipe.stage));
            scheduler_barrier_arrive(warpgroup ^ 1);
            wgmma_wait<0>();
            fence_operand(s);
            mbarrier_arrive_warp(k_pipe.empty_barrier());
            k_pipe.advance();
            mask_scores<INIT_LOCAL>(p, s, w, rows, 0);
            softmax.update(s, scale);
            pack_as_a<T>(p_frag, s);
            for (int tile = 1; tile < w.num_tiles; tile++) {
                // S(tile) and P V(tile - 1) in flight together
                k_pipe.wait_full();
                scheduler_barrier_sync(warpgroup);
                issue_qk<T, D>(s, q, smem.k(k_pipe.stage));
                v_pipe.wait_full();
                issue_pv<T, D>(o, p_frag, smem.v(v_pipe.stage), tile > 1);
                scheduler_barrier_arrive(warpgroup ^ 1);
                wgmma_wait<1>();
                fence_operand(s);
                mbarrier_arrive_warp(k_pipe.empty_barrier());
                k_pipe.advance();
                // softmax(tile), while P V(tile - 1) and the other warpgroup's matmuls run
                mask_scores<INIT_LOCAL>(p, s, w, rows, tile);
                softmax.update(s, scale);
                wgmma_wait<0>();
                fence_operand(o);
                mbarrier_arrive_warp(v_pipe.empty_barrier());
                v_pipe.advance();
                rescale_o(o, softmax);
                pack_as_a<T>(p_frag, s);
            }
        }
        mbarrier_arrive_warp(q_pipe.empty_barrier());
        if (w.num_tiles > 0) {
            // P V of the last tile
            v_pipe.wait_full();
            const int valid_keys = w.seq_keys - w.first_key<INIT_LOCAL>(w.num_tiles - 1);
            if (valid_keys < KEYS) clear_rows<D, KEYS>(smem.pointer(smem.v(v_pipe.stage)), valid_keys);
            issue_pv<T, D>(o, p_frag, smem.v(v_pipe.stage), w.num_tiles > 1);
            wgmma_wait<0>();
            fence_operand(o);
            mbarrier_arrive_warp(v_pipe.empty_barrier());
            v_pipe.advance();
        }
        store_o<T, D>(p, w, rows, o, softmax, smem.o());
    }
    if (warpgroup == 0) scheduler_barrier_sync(0); // balances the last arrive
}

// An upper bound: some work items may be empty.
static int num_q_work_items(const DenseParams &d) {
    return (int)max_row_tiles(d.batch.nq, d.batch.num_segments, FWD_ROWS / (d.q_heads / d.kv_heads)) *
           d.kv_heads;
}

template <typename T, int D, bool INIT_LOCAL>
static int launch_forward(const DenseParams &d, const TensorMaps &maps, cudaStream_t stream) {
    const int num_items = num_q_work_items(d);
    if (num_items == 0) return FSA_OK;
    return LAUNCH((dense_forward_sm90_kernel<T, D, INIT_LOCAL>), persistent_grid(num_items), THREADS,
                  DenseForwardSmem<D>::BYTES, stream, d, maps, num_items);
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
