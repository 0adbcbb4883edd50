// sm90/dense_bwd.cu: backward pass of dense attention on Hopper. ../dense.cuh lists the rules.
//
//     S = scale Q K^T    P = exp(S - lse_bwd)    dP = dout V^T    dS = P (dP - delta)
//     dV = P^T dout      dK = scale dS^T Q       dQ = scale dS K
//
// dout is the ungated gradient of the output. lse_bwd = lse - ln(gate), so P is gate * softmax(S).
//
// A work item is dK and dV of 128 keys of one KV head, over all rows that see them (or those of one split),
// and these keys' part of dQ. Persistent thread blocks, one per SM, take work items from an atomic counter:
//
//     warpgroups 0 and 1           64 keys each: all matmuls. Rows come in tiles of 64
//     warpgroup 2, warp 0          loads lse_bwd and delta of the row tiles
//     warpgroup 2, warp 1          one thread: takes work items; loads K, V, and Q, dout per row tile by TMA
//     warpgroup 2, warps 2 and 3   one thread each: adds every second dQ tile to dq_accum
//
// Scores are transposed (keys x rows), so that P^T and dS^T are A operands in registers. dS also goes to
// shared memory, and each warpgroup computes half of the columns of dQ over all 128 keys. Per row tile i:
//
//     matmuls    dP(i)         | dV(i)    | dK(i)                  | dQ(i)          | S(i+1)
//     threads    P = exp(S)    | dS       | dS to shared memory    | wait dV, dK    | dQ to shared memory
//
// Shared memory, d = 128:
//
//     K, V      Q, dout       dS            dQ            lse, delta
//     64 KiB    2 x 32 KiB    2 x 16 KiB    2 x 32 KiB    2 x 1 KiB
//
// dQ is reproducible: a semaphore per (row tile, KV head) admits key tiles in ascending order. Work items are
// taken by ascending keys, so the thread block that others wait for is always running.
//
// Lower bounds at 64K tokens, (32, 8) heads, d = 128; rates in ../README.md. Matmuls: 10*d FLOPs per visible
// pair. HBM: q, k, v, dout and fp32 dq, dk, dv once.
//
//                   matmuls                   exp                HBM
//     causal         88 TFLOP    111.3 ms      69 G    18.6 ms    3.0 GB    0.7 ms
//     compressed    5.5 TFLOP      7.0 ms     4.3 G     1.2 ms    2.2 GB    0.5 ms
//     window 512    1.4 TFLOP      1.7 ms     1.1 G     0.3 ms    3.0 GB    0.7 ms
//
// Clocks per row tile at peak rates: matmuls 2,560; shared memory 2,944, for wgmma's operands 256 KiB, dS and
// dQ 80 KiB, loads of Q and dout 32 KiB. The kernel is limited by the chain of dependent matmuls, exp and dS
// of a row tile: both warpgroups are in the same stage at once, so exp and dS add to the time of the matmuls.
#include "dense.cuh"

// 128 keys of a KV head, and the rows that see them.
struct KvWorkItem {
    RowTile keys; // keys.rows 0: no more work
    int kv_head, split;
    int direction;                  // 1: row tiles in ascending order, -1: descending
    int segment_begin, segment_end; // segments of the sequence
    int pos_begin, pos_last;        // first and last position that see a key of the tile
    int split_begin, split_end;     // positions at which the row tiles of the split begin
};

// Returns work item number `item` of num_items; it may be empty (keys.rows 0). The order, outermost first:
// head groups, splits from the last to the first, key tiles ascending, heads of the head group.
static __device__ KvWorkItem find_kv_work_item(const DenseParams &p, int64_t item, int64_t num_items) {
    KvWorkItem w = {};
    if (item >= num_items) return w;
    const int64_t tiles = num_items / p.kv_heads / p.num_splits,
                  head_group = item / (tiles * p.num_splits * p.head_group_size);
    const int group_head0 = (int)head_group * p.head_group_size,
              group_heads = min(p.head_group_size, p.kv_heads - group_head0);
    const int64_t group_item = item - tiles * p.num_splits * group_head0;
    const int split_rank = (int)(group_item / (tiles * group_heads));
    w.split = p.num_splits - 1 - split_rank;
    w.kv_head = group_head0 + (int)(group_item % group_heads);
    w.keys =
        find_row_tile(p.cu_keys, p.batch.num_seqs, KEYS, group_item % (tiles * group_heads) / group_heads);
    w.direction = p.alternate_direction && (head_group * p.num_splits + split_rank) % 2 ? 1 : -1;
    int64_t lo = 0, hi = p.batch.num_segments, end = hi;
    while (lo < hi) { // first segment of the sequence
        int64_t mid = (lo + hi) / 2;
        if (p.batch.segments[mid].seq < w.keys.cu_index)
            lo = mid + 1;
        else
            hi = mid;
    }
    w.segment_begin = (int)lo;
    for (hi = end; lo < hi;) { // first segment of the next sequence
        int64_t mid = (lo + hi) / 2;
        if (p.batch.segments[mid].seq <= w.keys.cu_index)
            lo = mid + 1;
        else
            hi = mid;
    }
    w.segment_end = (int)lo;
    w.pos_begin = p.mask.first_query(w.keys.first);
    w.pos_last = p.mask.last_query(w.keys.first + w.keys.rows - 1);
    int64_t n = p.batch.cu_seqlens[w.keys.cu_index + 1] - p.batch.cu_seqlens[w.keys.cu_index];
    w.split_begin = (int)(n * w.split / p.num_splits);
    w.split_end = (int)(n * (w.split + 1) / p.num_splits);
    return w;
}

// Iterates over the row tiles that see a key tile, from the last tile of the last segment to the first one,
// or in ascending order (direction 1). The tiles of a segment are the same for all keys.
//
// Descending order keeps the semaphore waits short. Under the causal rule, thread blocks that start together
// stay one row tile apart. Under a window, later keys see later rows. The iteration then starts at the last
// tile that ends a period of tiles, and the tiles after it come at the end. A period has as many tiles as see
// a key tile, so thread blocks that start together process the same rows at the same time.
struct QTileIterator {
    int segment, query0;             // query0: first query in q, 32 bits as TMA's coordinates
    int global_tile;                 // index of the tile's semaphores
    int pos, pos_end;                // position of the first query; end of the segment's positions
    int tile, first_tile, last_tile; // within the segment: this tile; the tiles that see the keys
    int deferred_tile;               // deferred_tile .. last_tile follow after first_tile
    __device__ __forceinline__ QTileIterator(const KvWorkItem &w)
        : segment(w.direction > 0 ? w.segment_begin - 1 : w.segment_end), query0(0), global_tile(0), pos(0),
          pos_end(0), tile(0), first_tile(0), last_tile(-1), deferred_tile(0) {}
    __device__ __forceinline__ void skip_tiles(int count, int tile_queries) {
        tile += count, global_tile += count, pos += count * tile_queries, query0 += count * tile_queries;
    }
    // Moves to the next tile. Returns false at the end.
    __device__ __forceinline__ bool next(const DenseParams &p, const KvWorkItem &w, int tile_queries) {
        skip_tiles(w.direction, tile_queries);
        while (w.direction > 0 ? tile > last_tile : tile < first_tile) {
            if (w.direction < 0 && deferred_tile <= last_tile) {
                skip_tiles(last_tile - tile, tile_queries);
                first_tile = deferred_tile, last_tile = -1;
                break;
            }
            segment += w.direction;
            if (segment < w.segment_begin || segment >= w.segment_end) return false;
            const int first_pos = (int)p.batch.segments[segment].pos,
                      len = (int)p.batch.segments[segment].len;
            const int last_pos = min(w.pos_last, first_pos + len - 1),
                      row0 = (int)p.batch.cu_queries[segment];
            // From the tile of the first query that sees a key to the tile of the last one. A split has those
            // of these tiles that begin at positions split_begin .. split_end - 1.
            first_tile =
                max(w.pos_begin > first_pos ? (w.pos_begin - first_pos) / tile_queries : 0,
                    w.split_begin > first_pos ? (w.split_begin - first_pos + tile_queries - 1) / tile_queries
                                              : 0);
            last_tile =
                min(last_pos >= first_pos ? (last_pos - first_pos) / tile_queries : -1,
                    w.split_end > first_pos ? (w.split_end - first_pos + tile_queries - 1) / tile_queries - 1
                                            : -1);
            tile = w.direction > 0 ? first_tile : last_tile;
            if (p.mask.window < INT32_MAX / 2) {
                const int period_end =
                    last_tile - (last_tile + 1) % ((p.mask.window + KEYS - 2) / tile_queries + 1);
                if (period_end >= first_tile) tile = period_end;
            }
            deferred_tile = tile + 1;
            pos = first_pos + tile * tile_queries, pos_end = first_pos + len;
            query0 = row0 + tile * tile_queries;
            global_tile = row0 / tile_queries + segment + tile;
        }
        return true;
    }
};

// Shared memory, and the threads of the producer warpgroup that fill and drain it:
//     K and V of a work item         load_tiles
//     STAGES stages of Q, dout       load_tiles
//     STAGES stages of lse, delta    load_lse_delta, which also merges the lse of two branches
//     2 buffers of dS                the consumers write and read them
//     2 stages of dQ                 add_dq_tiles adds them to dq_accum
//     2 work items, barriers         load_tiles writes the work items
// Tiles are named by their 32-bit shared-memory address.
template <int D> struct DenseBackwardSmem {
    static constexpr int STAGES = D == 64 ? 4 : 2;
    static constexpr int KV_BYTES = KEYS * D * 2, Q_BYTES = BWD_ROWS * D * 2;
    static constexpr int DS_BYTES = KEYS * BWD_ROWS * 2;     // [key][row]
    static constexpr int LSE_DELTA_BYTES = 4 * BWD_ROWS * 4; // fp32 [warpgroup][lse, delta][row]
    static constexpr int DQ_BYTES = BWD_ROWS * D * 4;        // fp32, layout of dq_accum
    static constexpr int Q_OFFSET = 2 * KV_BYTES, DOUT_OFFSET = Q_OFFSET + STAGES * Q_BYTES;
    static constexpr int DS_OFFSET = DOUT_OFFSET + STAGES * Q_BYTES, DQ_OFFSET = DS_OFFSET + 2 * DS_BYTES;
    static constexpr int LSE_DELTA_OFFSET = DQ_OFFSET + 2 * DQ_BYTES,
                         WORK_OFFSET = LSE_DELTA_OFFSET + STAGES * LSE_DELTA_BYTES,
                         BARRIER_OFFSET = WORK_OFFSET + 2 * (int)sizeof(KvWorkItem),
                         BYTES = BARRIER_OFFSET + 8 * (6 + 2 * STAGES);
    uint32_t start;
    char *bytes; // the same address, as a generic pointer
    // shared is aligned by declaration: no bytes are left to round it up.
    __device__ __forceinline__ DenseBackwardSmem(char *shared) : start(smem_address(shared)), bytes(shared) {}
    __device__ __forceinline__ uint32_t k() const { return start; }
    __device__ __forceinline__ uint32_t v() const { return start + KV_BYTES; }
    __device__ __forceinline__ uint32_t q(int stage) const { return start + Q_OFFSET + stage * Q_BYTES; }
    __device__ __forceinline__ uint32_t dout(int stage) const {
        return start + DOUT_OFFSET + stage * Q_BYTES;
    }
    __device__ __forceinline__ uint32_t ds(int buffer) const { return start + DS_OFFSET + buffer * DS_BYTES; }
    __device__ __forceinline__ uint32_t dq(int stage) const { return start + DQ_OFFSET + stage * DQ_BYTES; }
    __device__ __forceinline__ float *lse_delta(int stage) const {
        return (float *)(bytes + LSE_DELTA_OFFSET + stage * LSE_DELTA_BYTES);
    }
    __device__ __forceinline__ char *pointer(uint32_t address) const { return bytes + (address - start); }
    // Pipelines. kv_pipe: K and V of a work item, one stage. q_pipe: Q, dout, lse and delta of a row tile.
    // dq_pipe: dQ of a row tile; the consumers fill it.
    __device__ __forceinline__ PipelineState kv_pipe() const {
        return PipelineState(start + BARRIER_OFFSET, start + BARRIER_OFFSET + 8, 1);
    }
    __device__ __forceinline__ PipelineState dq_pipe() const {
        return PipelineState(start + BARRIER_OFFSET + 16, start + BARRIER_OFFSET + 32, 2);
    }
    __device__ __forceinline__ PipelineState q_pipe() const {
        return PipelineState(start + BARRIER_OFFSET + 48, start + BARRIER_OFFSET + 48 + 8 * STAGES, STAGES);
    }
    __device__ __forceinline__ void init_barriers() const {
        const PipelineState kv = kv_pipe(), dq = dq_pipe(), q = q_pipe();
        mbarrier_init(kv.full, 1), mbarrier_init(kv.empty, CONSUMER_ARRIVALS + 3);
        for (int i = 0; i < dq.stages; i++)
            mbarrier_init(dq.full + 8 * i, CONSUMER_ARRIVALS), mbarrier_init(dq.empty + 8 * i, 1);
        for (int i = 0; i < q.stages; i++)
            mbarrier_init(q.full + 8 * i, 1 + 32), mbarrier_init(q.empty + 8 * i, CONSUMER_ARRIVALS);
        mbarrier_init_fence();
    }
    // Two buffers of work items alternate: the threads that add dQ lag behind, the warp that loads lse and
    // delta runs ahead. kv_pipe completes one phase per work item, so the parity of that phase is also the
    // index of the work item's buffer.
    __device__ __forceinline__ KvWorkItem *work_item(int parity) const {
        return (KvWorkItem *)(bytes + WORK_OFFSET) + parity;
    }
    // Waits for the next work item. Returns NULL after the last one.
    __device__ __forceinline__ const KvWorkItem *next_work_item(PipelineState &kv_pipe) const {
        kv_pipe.wait_full();
        const KvWorkItem *w = work_item(kv_pipe.phase);
        kv_pipe.advance();
        return w->keys.rows > 0 ? w : NULL;
    }
};

// ---- producer warpgroup -----------------------------------------------------------------------------------
// Takes the thread block's next work item from the counter semaphores[0]. keys.rows 0: no more work.
static __device__ __forceinline__ KvWorkItem take_work_item(const DenseParams &p, int64_t num_items) {
    KvWorkItem w;
    int item;
    do {
        item = atomicAdd(p.semaphores, 1);
        w = find_kv_work_item(p, item, num_items);
    } while (item < num_items && w.keys.rows == 0);
    return w;
}
// One thread: takes work items, and loads their K, V, Q and dout tiles.
template <int D>
static __device__ __forceinline__ void load_tiles(const DenseParams &p, const TensorMaps &maps,
                                                  const DenseBackwardSmem<D> &smem, int64_t num_items) {
    const int g = p.q_heads / p.kv_heads, tile_queries = BWD_ROWS / g;
    PipelineState kv_pipe = smem.kv_pipe(), q_pipe = smem.q_pipe();
    for (;; kv_pipe.advance()) {
        const KvWorkItem next = take_work_item(p, num_items);
        kv_pipe.wait_empty();
        KvWorkItem &w = *smem.work_item(kv_pipe.phase);
        w = next;
        if (next.keys.rows == 0) {
            mbarrier_arrive(kv_pipe.full_barrier());
            return;
        }
        mbarrier_arrive_expect_tx(kv_pipe.full_barrier(), 2 * KEYS * D * 2);
        load_tile<D, KEYS>(smem.k(), &maps.k, next.kv_head, (int)next.keys.row, kv_pipe.full_barrier());
        load_tile<D, KEYS>(smem.v(), &maps.v, next.kv_head, (int)next.keys.row, kv_pipe.full_barrier());
        QTileIterator q_tile(w);
        for (; q_tile.next(p, w, tile_queries); q_pipe.advance()) {
            const uint32_t full = q_pipe.full_barrier();
            q_pipe.wait_empty();
            mbarrier_arrive_expect_tx(full, 2 * tile_queries * g * D * 2);
            load_tile<D, BWD_ROWS>(smem.q(q_pipe.stage), &maps.q, w.kv_head * g, q_tile.query0, full);
            load_tile<D, BWD_ROWS>(smem.dout(q_pipe.stage), &maps.dout, w.kv_head * g, q_tile.query0, full);
        }
    }
}

// One warp: writes lse (base 2) and delta of the row tiles to shared memory, one tile ahead.
//
// With p.init_local.local_blocks, the window's matmuls also compute the gradients of the selected branch in a
// query's local blocks, which lie inside the window. In these blocks both branches have the same S and dP.
// With P = e^(S - lse) of the window and P' = e^(S - lse') of the selected branch, where lse and lse' are the
// branches' lse_bwd:
//     P + P' = e^(S - both), both = -ln(e^-lse + e^-lse')
//     P (dP - delta) + P' (dP - delta') = (P + P') (dP - (P delta + P' delta') / (P + P'))
// P / (P + P') is the same for all keys, so that only lse and delta change for keys in the local blocks.
template <int D>
static __device__ __forceinline__ void load_lse_delta(const DenseParams &p,
                                                      const DenseBackwardSmem<D> &smem) {
    const int g = p.q_heads / p.kv_heads, tile_queries = BWD_ROWS / g, lane = threadIdx.x % 32;
    PipelineState kv_pipe = smem.kv_pipe(), q_pipe = smem.q_pipe();
    // The lane's two rows of a tile: query within the tile, and offset from the tile's first lse.
    int query[2], lse_offset[2];
    for (int i = 0; i < 2; i++) {
        query[i] = (lane + 32 * i) / g;
        lse_offset[i] = query[i] * p.q_heads + (lane + 32 * i) % g;
    }
    while (const KvWorkItem *w = smem.next_work_item(kv_pipe)) {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(kv_pipe.empty_barrier());
        QTileIterator q_tile(*w);
        // Queries before position local_end[i] have the keys of warpgroup i in a local block. 0: none.
        int local_end[2] = {};
        if (p.init_local.local_blocks > 0)
            for (int i = 0; i < 2; i++)
                local_end[i] = ((w->keys.first + 64 * i) / p.init_local.block + p.init_local.local_blocks) *
                               p.init_local.block;
        // Here and in shared memory, lse is lse_bwd.
        float lse[2], delta[2], local_lse[2], local_delta[2];
        auto load = [&] {
            const int64_t lse0 = (int64_t)q_tile.query0 * p.q_heads + w->kv_head * g;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int pos = q_tile.pos + query[i];
                const bool valid = query[i] < tile_queries && pos < q_tile.pos_end,
                           has_local = valid && pos < local_end[1];
                lse[i] = valid ? p.lse_bwd[lse0 + lse_offset[i]] : INFINITY; // no row: P = 0
                delta[i] = valid ? p.delta[lse0 + lse_offset[i]] : 0;
                local_lse[i] = has_local ? p.local_lse_bwd[lse0 + lse_offset[i]] : INFINITY;
                local_delta[i] = has_local ? p.local_delta[lse0 + lse_offset[i]] : 0;
            }
        };
        bool more = q_tile.next(p, *w, tile_queries);
        if (more) load();
        for (; more; q_pipe.advance()) {
            q_pipe.wait_empty();
            float *stage_lse = smem.lse_delta(q_pipe.stage);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // lse +inf makes P = 0 if the row sees no key. Only a plain lse (kernels.h) has -inf.
                const float lse2 = lse[i] == -INFINITY ? INFINITY : lse[i] * FSA_LOG2E;
                const float local_lse2 = local_lse[i] * FSA_LOG2E;
                // Base 2, relative to the branch with the larger probability.
                const float min_lse2 = fminf(lse2, local_lse2);
                const float ratio = min_lse2 == INFINITY ? 0 : exp2f(-fabsf(lse2 - local_lse2)); // keeps NaN
                const float both_lse2 = min_lse2 - log2f(1 + ratio);
                const float weight = (lse2 == min_lse2 ? 1 : ratio) / (1 + ratio); // P / (P + P')
                const float both_delta = local_delta[i] + weight * (delta[i] - local_delta[i]);
                for (int half = 0; half < 2; half++) {
                    const bool is_local = q_tile.pos + query[i] < local_end[half];
                    stage_lse[half * 2 * BWD_ROWS + lane + 32 * i] = is_local ? both_lse2 : lse2;
                    stage_lse[half * 2 * BWD_ROWS + BWD_ROWS + lane + 32 * i] =
                        is_local ? both_delta : delta[i];
                }
            }
            mbarrier_arrive(q_pipe.full_barrier());
            more = q_tile.next(p, *w, tile_queries);
            if (more) load();
        }
    }
}

// One of two threads: adds every second dQ tile to dq_accum, after the tiles of all smaller keys. Two threads
// overlap the three L2 round trips of an addition: semaphore, addition, release. stage: of dq_pipe, the
// thread's.
template <int D>
static __device__ __forceinline__ void add_dq_tiles(const DenseParams &p, const DenseBackwardSmem<D> &smem,
                                                    int stage) {
    const int g = p.q_heads / p.kv_heads, tile_queries = BWD_ROWS / g;
    PipelineState kv_pipe = smem.kv_pipe(), dq_pipe = smem.dq_pipe();
    while (const KvWorkItem *w = smem.next_work_item(kv_pipe)) {
        mbarrier_arrive(kv_pipe.empty_barrier());
        QTileIterator q_tile(*w);
        for (; q_tile.next(p, *w, tile_queries); dq_pipe.advance()) {
            if (dq_pipe.stage != stage) continue;
            int *semaphore = p.semaphores + 1 + (int64_t)q_tile.global_tile * p.kv_heads + w->kv_head;
            const int key_tiles_before = w->keys.first / KEYS - p.mask.first_key(q_tile.pos) / KEYS;
            const int bytes = min(tile_queries, q_tile.pos_end - q_tile.pos) * g * D * 4;
            float *dq_out = p.dq_accum + dq_accum_group_row(p.batch.nq, g, q_tile.query0, w->kv_head) * D;
            semaphore_wait(semaphore, key_tiles_before);
            dq_pipe.wait_full();
            if (key_tiles_before > 0 || p.accumulate_dq)
                bulk_reduce_add(dq_out, smem.dq(stage), bytes);
            else
                bulk_store(dq_out, smem.dq(stage), bytes);
            bulk_commit();
            bulk_wait_read();
            mbarrier_arrive(dq_pipe.empty_barrier());
            bulk_wait();
            semaphore_release(semaphore);
        }
    }
}

// ---- consumers, two warpgroups ----------------------------------------------------------------------------
// Returns the first of the thread's two keys of the key tile, 0 .. 127. The second one is 8 further.
static __device__ __forceinline__ int thread_key() {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
}

// Waits for the next Q and dout tile. Clears the rows after valid_rows if they belong to another sequence.
template <int D>
static __device__ __forceinline__ void
wait_q_tile(const DenseBackwardSmem<D> &smem, const PipelineState &q_pipe, int valid_rows, int tile_rows) {
    q_pipe.wait_full();
    if (valid_rows < tile_rows) {
        clear_rows<D, BWD_ROWS>(smem.pointer(smem.q(q_pipe.stage)), valid_rows);
        clear_rows<D, BWD_ROWS>(smem.pointer(smem.dout(q_pipe.stage)), valid_rows);
    }
}

// X (64 keys x 64 rows) = A B^T, asynchronous, for S^T = K Q^T and dP^T = V dout^T. a: the warpgroup's 64
// rows of K or V; b: a Q or dout tile.
template <typename T, int D>
static __device__ __forceinline__ void issue_abt(float (&x)[BWD_ROWS / 8][4], uint32_t a, uint32_t b) {
    wgmma_fence();
    gemm_ss<T, D, KEYS, BWD_ROWS>(x, a, b);
    wgmma_commit();
}
// X (64 keys x D) += A B, asynchronous, for dV += P^T dout and dK += dS^T Q. A (64 keys x 64 rows) in
// registers; b: a dout or Q tile.
template <typename T, int D>
static __device__ __forceinline__ void issue_add_ab(float (&x)[D / 8][4],
                                                    const uint32_t (&a)[BWD_ROWS / 16][4], uint32_t b) {
    wgmma_fence();
    gemm_rs<T, BWD_ROWS>(x, a, b, true);
    wgmma_commit();
}
// dQ (64 rows x D/2) = dS K, asynchronous. dS (64 rows x 128 keys) and D/2 columns of K from shared memory.
template <typename T, int D>
static __device__ __forceinline__ void issue_dq(float (&dq)[D / 16][4], uint32_t ds, uint32_t k_columns) {
    wgmma_fence();
    const uint64_t desc_ds = make_smem_desc(ds), desc_k = make_smem_desc(k_columns);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
        wgmma_ss<T, 1, 1>(dq, advance_desc(desc_ds, k * 2048), advance_desc(desc_k, k * 2048), k > 0);
    wgmma_commit();
}

// Sets the scores of invisible keys to -inf. S^T (64 keys x 64 rows) of a row tile.
static __device__ __forceinline__ void mask_scores(const DenseParams &p, float (&s)[BWD_ROWS / 8][4],
                                                   const KvWorkItem &w, const QTileIterator &q_tile, int g,
                                                   int tile_queries, int warpgroup) {
    const int pos = q_tile.pos, j0 = w.keys.first + warpgroup * 64;
    if (p.mask.visible(pos, j0 + 63) && j0 >= p.mask.first_key(min(pos + tile_queries, q_tile.pos_end) - 1))
        return;
    int row_begin[2]; // rows row_begin .. row_begin + num_rows - 1 see the key
    unsigned num_rows[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int j = w.keys.first + thread_key() + half * 8;
        const int query_begin = min(max(p.mask.first_query(j) - pos, 0), tile_queries);
        const int query_end = min(p.mask.last_query(j) - pos, tile_queries - 1) + 1;
        row_begin[half] = query_begin * g - threadIdx.x % 4 * 2;
        num_rows[half] = max(query_end - query_begin, 0) * g;
    }
#pragma unroll
    for (int n = 0; n < BWD_ROWS / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            if ((unsigned)(n * 8 + e % 2 - row_begin[e / 2]) >= num_rows[e / 2]) s[n][e] = -INFINITY;
    }
}

// S^T = P^T = 2^(scale S^T - (lse - shift)), 64 keys x 64 rows. lse: of the tile's rows, base 2.
static __device__ __forceinline__ void softmax(float (&s)[BWD_ROWS / 8][4], const float *lse, float scale,
                                               float shift) {
#pragma unroll
    for (int n = 0; n < BWD_ROWS / 8; n++) {
        float2 l = *(const float2 *)(lse + n * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = exp2_fast(s[n][e] * scale - ((e % 2 ? l.y : l.x) - shift));
    }
}
// P^T = dS^T = P^T (dP^T - delta), 64 keys x 64 rows.
static __device__ __forceinline__ void softmax_bwd(float (&s)[BWD_ROWS / 8][4],
                                                   const float (&dp)[BWD_ROWS / 8][4], const float *delta) {
#pragma unroll
    for (int n = 0; n < BWD_ROWS / 8; n++) {
        float2 l = *(const float2 *)(delta + n * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] *= dp[n][e] - (e % 2 ? l.y : l.x);
    }
}

// Writes the warpgroup's half of dS^T (128 keys x 64 rows) to shared memory, for issue_dq.
static __device__ __forceinline__ void store_ds(char *smem_ds, const uint32_t (&ds)[BWD_ROWS / 16][4]) {
#pragma unroll
    for (int k = 0; k < BWD_ROWS / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            *(uint32_t *)(smem_ds + threadIdx.x % 4 * 4 +
                          panel_offset(thread_key() + i % 2 * 8, k * 2 + i / 2, 0)) = ds[k][i];
    }
    fence_proxy_async();
}
// Writes the warpgroup's half of the columns of scale * dQ (64 rows x D, fp32) to shared memory, for
// add_dq_tiles. dq_row: the tile's first row of dq_accum.
template <int D>
static __device__ __forceinline__ void store_dq_tile(char *smem_dq, const float (&dq)[D / 16][4],
                                                     int64_t dq_row, float scale, int warpgroup) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp * 16 + half * 8 + lane / 4;
        char *out = smem_dq + row * D * 4 + lane % 4 * 8;
#pragma unroll
        for (int n = 0; n < D / 16; n++)
            *(float2 *)(out + dq_accum_chunk(dq_row + row, warpgroup * D / 16 + n) * 32) =
                make_float2(dq[n][half * 2] * scale, dq[n][half * 2 + 1] * scale);
    }
    fence_proxy_async();
}

// Epilogue: the warpgroup's dK and dV (64 keys x D), times their factors, to memory or to the split's
// partials.
template <int D>
static __device__ __forceinline__ void store_dkv(const DenseParams &p, const KvWorkItem &w,
                                                 const float (&dk)[D / 8][4], const float (&dv)[D / 8][4],
                                                 float dk_scale, float dv_scale) {
    int64_t row_size = (int64_t)p.kv_heads * D, dkv_size = p.num_keys * row_size;
    float *dk_out = p.num_splits > 1 ? p.dkv_partial + w.split * 2 * dkv_size : p.dk_accum;
    float *dv_out = p.num_splits > 1 ? p.dkv_partial + (w.split * 2 + 1) * dkv_size : p.dv_accum;
    bool accumulate = p.accumulate_dkv && p.num_splits == 1;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = thread_key() + half * 8;
        if (row >= w.keys.rows) continue;
        int64_t index = (w.keys.row + row) * row_size + w.kv_head * D + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float2 x = make_float2(dk[n][half * 2] * dk_scale, dk[n][half * 2 + 1] * dk_scale);
            float2 y = make_float2(dv[n][half * 2] * dv_scale, dv[n][half * 2 + 1] * dv_scale);
            float2 *dk_ptr = (float2 *)(dk_out + index + n * 8), *dv_ptr = (float2 *)(dv_out + index + n * 8);
            if (accumulate) {
                float2 u = *dk_ptr, z = *dv_ptr;
                x.x += u.x, x.y += u.y, y.x += z.x, y.y += z.y;
            }
            *dk_ptr = x;
            *dv_ptr = y;
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    dense_backward_sm90_kernel(const DenseParams p, const __grid_constant__ TensorMaps maps,
                               int64_t num_items) {
    extern __shared__ __align__(1024) char shared[];
    typedef DenseBackwardSmem<D> Smem;
    const Smem smem(shared);
    if (threadIdx.x == 0) smem.init_barriers();
    // If g does not divide 64, TMA never writes the last rows of a tile. They stay zero.
    for (int i = threadIdx.x; i < 2 * Smem::STAGES * Smem::Q_BYTES / 16; i += THREADS)
        ((uint4 *)(shared + Smem::Q_OFFSET))[i] = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); // in a uniform register
    if (warpgroup == 2) {
        warpgroup_reg_dealloc<BWD_PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32 - CONSUMER_THREADS / 32;
        if (warp == 0)
            load_lse_delta(p, smem);
        else if (threadIdx.x % 32 == 0)
            warp == 1 ? load_tiles(p, maps, smem, num_items) : add_dq_tiles(p, smem, warp - 2);
        return;
    }
    warpgroup_reg_alloc<BWD_CONSUMER_REGISTERS>();
    const int g = p.q_heads / p.kv_heads, tile_queries = BWD_ROWS / g;
    const float scale = p.scale * FSA_LOG2E, p_shift = p_scale_log2<T>();
    const float dv_scale = p_unscale<T>(), dqk_scale = dv_scale * p.scale;
    const uint32_t k = smem.k() + warpgroup * 64 * 128, v = smem.v() + warpgroup * 64 * 128; // 64 rows
    const uint32_t k_columns = smem.k() + warpgroup * (D == 64 ? 64 : KEYS * 128); // D/2 columns, all rows
    PipelineState kv_pipe = smem.kv_pipe(), q_pipe = smem.q_pipe(), dq_pipe = smem.dq_pipe();
    while (const KvWorkItem *work = smem.next_work_item(kv_pipe)) {
        const KvWorkItem &w = *work;
        if (w.keys.rows < KEYS) {
            clear_rows<D, KEYS>(smem.pointer(smem.k()), w.keys.rows);
            clear_rows<D, KEYS>(smem.pointer(smem.v()), w.keys.rows);
        }
        float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[BWD_ROWS / 8][4];
        QTileIterator q_tile(w);
        bool more = q_tile.next(p, w, tile_queries);
        // S^T = K Q^T is issued once more after the last tile. It then multiplies stale data and the result
        // is unused: ptxas serializes the wgmmas if one is issued under a condition, or if two are in flight
        // at the start of the loop.
        if (more) wait_q_tile(smem, q_pipe, (q_tile.pos_end - q_tile.pos) * g, tile_queries * g);
        issue_abt<T, D>(s, k, smem.q(q_pipe.stage));
        for (; more; dq_pipe.advance()) {
            const uint32_t q = smem.q(q_pipe.stage), dout = smem.dout(q_pipe.stage);
            const uint32_t q_empty = q_pipe.empty_barrier(), ds = smem.ds(dq_pipe.stage);
            const float *lse = smem.lse_delta(q_pipe.stage) + warpgroup * 2 * BWD_ROWS,
                        *delta = lse + BWD_ROWS;
            const int64_t dq_row = dq_accum_group_row(p.batch.nq, g, q_tile.query0, w.kv_head);
            float dp[BWD_ROWS / 8][4], dq[D / 16][4];
            uint32_t p_frag[BWD_ROWS / 16][4], ds_frag[BWD_ROWS / 16][4];
            wgmma_wait<0>();
            fence_operand(s);
            // dP^T = V dout^T in flight; mask, P^T = exp(S^T - lse_bwd)
            issue_abt<T, D>(dp, v, dout);
            mask_scores(p, s, w, q_tile, g, tile_queries, warpgroup);
            softmax(s, lse, scale, p_shift);
            pack_as_a<T>(p_frag, s);
            // dV += P^T dout in flight; dS^T = P^T (dP^T - delta)
            issue_add_ab<T, D>(dv, p_frag, dout);
            wgmma_wait<1>();
            fence_operand(dp);
            softmax_bwd(s, dp, delta);
            pack_as_a<T>(ds_frag, s);
            // dK += dS^T Q in flight; dS^T to shared memory. Two buffers: the other warpgroup may still read
            // the previous one.
            issue_add_ab<T, D>(dk, ds_frag, q);
            store_ds(smem.pointer(ds), ds_frag);
            named_barrier_sync(1, CONSUMER_THREADS);
            // dQ = dS K in flight, half of the columns; Q and dout released once dV and dK are done
            issue_dq<T, D>(dq, ds, k_columns);
            q_pipe.advance();
            more = q_tile.next(p, w, tile_queries);
            wgmma_wait<1>();
            fence_operand(dv), fence_operand(dk);
            mbarrier_arrive_warp(q_empty);
            // S^T of the next tile in flight; dQ to shared memory
            if (more) wait_q_tile(smem, q_pipe, (q_tile.pos_end - q_tile.pos) * g, tile_queries * g);
            issue_abt<T, D>(s, k, smem.q(q_pipe.stage));
            wgmma_wait<1>();
            fence_operand(dq);
            dq_pipe.wait_empty();
            store_dq_tile<D>(smem.pointer(smem.dq(dq_pipe.stage)), dq, dq_row, dqk_scale, warpgroup);
            mbarrier_arrive_warp(dq_pipe.full_barrier());
        }
        wgmma_wait<0>(); // the unused S
        mbarrier_arrive_warp(kv_pipe.empty_barrier());
        store_dkv<D>(p, w, dk, dv, dqk_scale, dv_scale);
    }
}

template <typename T, int D> static int backward_sm90(DenseParams d, FsaDtype dtype, cudaStream_t stream) {
    TensorMaps maps = {};
    TRY(make_tensor_maps(d, dtype, D, BWD_ROWS / (d.q_heads / d.kv_heads), &maps));
    int64_t items_per_head = (d.num_keys + KEYS - 1) / KEYS * d.num_splits;
    if (items_per_head < 1) items_per_head = 1;
    const int64_t tiles_per_split = items_per_head / d.num_splits;
    // The compressed rule has so few key tiles that one wave of thread blocks holds all tiles of some heads.
    // The thread blocks of a wave start together at the last row, and each ends at the first row that sees
    // its keys. The next wave goes in the other direction: each thread block starts at the first row that
    // sees its keys, when the earlier thread blocks pass there. So rows come into L2 once per wave, not once
    // per key tile.
    d.alternate_direction = d.mask.stride > 1 && tiles_per_split <= fsa_num_sms();
    if (d.alternate_direction) {
        d.head_group_size = (int)(fsa_num_sms() / tiles_per_split);
    } else {
        int group_size = (int)((MIN_GROUP_ITEMS + items_per_head - 1) / items_per_head);
        if (group_size < MIN_HEAD_GROUP / d.num_splits) group_size = MIN_HEAD_GROUP / d.num_splits;
        int num_groups = d.kv_heads > group_size ? d.kv_heads / group_size : 1;
        d.head_group_size = (d.kv_heads + num_groups - 1) / num_groups;
    }
    const int64_t num_items = max_row_tiles(d.num_keys, d.batch.num_seqs, KEYS) * d.kv_heads * d.num_splits;
    if (num_items > INT32_MAX / 2) return FSA_ERROR_ARGUMENT; // the work item counter has 32 bits
    size_t bytes = fsa_dense_semaphore_bytes(d.batch, d.q_heads, d.kv_heads);
    CUDA_TRY(cudaMemsetAsync(d.semaphores, 0, bytes, stream));
    if (num_items == 0) return FSA_OK;
    return LAUNCH((dense_backward_sm90_kernel<T, D>), persistent_grid(num_items), THREADS,
                  DenseBackwardSmem<D>::BYTES, stream, d, maps, num_items);
}

int fsa_dense_num_splits_sm90(int64_t num_keys, int kv_heads) {
    int64_t num_items = (num_keys + KEYS - 1) / KEYS * kv_heads;
    if (num_items >= MIN_ITEMS_UNSPLIT || num_items == 0) return 1;
    if (num_items >= MIN_ITEMS_TWO_SPLITS) return 2;
    return (int)(SPLIT_TARGET_ITEMS / num_items < MAX_SPLITS ? SPLIT_TARGET_ITEMS / num_items : MAX_SPLITS);
}

int64_t fsa_dense_split_rows_sm90(int64_t num_keys, int kv_heads) {
    int64_t rows = num_keys + (MIN_ITEMS_UNSPLIT / kv_heads + 1) * KEYS;
    return rows < num_keys * MAX_SPLITS ? rows : num_keys * MAX_SPLITS;
}

size_t fsa_dense_semaphore_bytes(const BatchLayout &batch, int q_heads, int kv_heads) {
    int64_t tiles = max_row_tiles(batch.nq, batch.num_segments, BWD_ROWS / (q_heads / kv_heads));
    return (size_t)(1 + tiles * kv_heads) * sizeof(int);
}

int fsa_dense_backward_sm90(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, backward_sm90, d, dtype, stream);
}
