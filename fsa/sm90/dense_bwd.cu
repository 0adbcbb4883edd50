#include "dense.cuh"

// ---------------------------------------------------------------------------------------------------------
// Backward
//
// A work item: dk and dv of 128 keys of a KV head, 64 a warpgroup, over all rows that see them (or, with
// `splits`, over a share of the tokens), and these keys' part of those rows' dq. Scores are computed
// transposed, so that P^T and dS^T are in registers, at once operands of the products with dO and Q; those
// come in tiles of 64 rows with their lse and delta. dS^T goes through shared memory, too: of a tile's dQ =
// dS K over all 128 keys each warpgroup makes half of the columns, and a thread adds them to dq in memory;
// two threads take turns, since an addition waits for the L2 three times, by estimate longer than a tile
// takes.
//
// The order of these additions is fixed: a tile of rows takes them by ascending keys, and a counter says how
// many it has. Nobody waits for long: items go out by ascending keys (a ticket each, so that whoever holds
// the smallest of them runs), and each goes through its rows backwards. Under the causal rule thread blocks
// that began together stay one tile behind each other; under a window, further keys see later rows, which are
// so met first.
//
// Under the compressed rule there are so few tiles of keys that a wave of thread blocks takes all of some
// heads. It begins together at the last row and ends where each tile's keys do, one after the other. So the
// next wave goes the other way: it begins one after the other, each where its keys do, by the time at which
// those before it come by. Rows come into the L2 once a wave, not once a tile: at 64K tokens, (32, 8) heads,
// d = 128, 25 GB of HBM traffic became 5.6 and 12.7 ms 9.3 on an H100; at 128K 107 GB 15 and 55.9 ms 36.4.
//
// The last blocks that the selected branch always has lie in the window as a rule. There both branches have S
// and dO V^T in common and, since P of the one is P of the other times a number a row, all the rest: with another
// lse and delta (bring_stats) the window's products are those of both. Of the whole attention's backward pass at
// 64K tokens, d = 128, that takes 2 of 16 blocks out of the selected branch at no cost here: on an H100 30.4 to
// 29.2 ms with (32, 8) heads, (64, 4) 55.7 to 53.5.
//
// What comes next runs meanwhile: dP while exp is taken, dV while dS is made, dK while it is stored, dQ and
// the next tile's S while dQ goes out. After the last tile S is computed of whatever lies there, and not
// used: ptxas serializes the products here if one is started under a condition, or two are under way where
// the loop begins.
//
// Bytes: k, v once, dk, dv once in fp32; from L2 q and dO, and dq in fp32 read and written, once for every
// 128 keys that their tokens see. Flops: 10*d a visible pair; they bind: causal 64K, 32 heads, d = 128: 88
// TFLOP, 111 ms at 790. Shared memory comes close: for a tile at d = 128 wgmma reads 256 KiB, 2,048 clocks,
// and 80 KiB more are written and read on the way of dS and dQ, where the products take 2,560. On an H200 a
// tile takes some 4,600 clocks, 162 to 173 ms: exp and dS lie between dependent products, and both warpgroups
// are at the same place.
struct KvWorkItem {
    RowTile keys; // no rows: no work
    int kv_head, split;
    int step;                   // its rows in ascending or in descending order: 1, -1
    int segment, segment_end;   // those of the sequence
    int pos_begin, pos_last;    // tokens that see some of the keys
    int share_begin, share_end; // the split's tiles begin here
};

static __device__ KvWorkItem kv_work_item(const DenseParams &p, int64_t item, int64_t items) {
    KvWorkItem w;
    w.keys.rows = 0;
    if (item >= items) return w;
    // Some heads after the others; of those heads one split after the other, the last one first; of a split by
    // ascending keys.
    const int64_t tiles = items / p.kv_heads / p.splits, round = item / (tiles * p.splits * p.together);
    const int head0 = (int)round * p.together, heads = min(p.together, p.kv_heads - head0);
    const int64_t rest = item - tiles * p.splits * head0;
    const int turn = (int)(rest / (tiles * heads));
    w.split = p.splits - 1 - turn;
    w.kv_head = head0 + (int)(rest % heads);
    w.keys = find_row_tile(p.cu_keys, p.batch.num_seqs, KEYS, rest % (tiles * heads) / heads);
    w.step = p.alternate && (round * p.splits + turn) % 2 ? 1 : -1;
    int64_t lo = 0, hi = p.batch.num_segments, end = hi;
    while (lo < hi) { // the sequence's first segment
        int64_t mid = (lo + hi) / 2;
        if (p.batch.segments[mid].seq < w.keys.range)
            lo = mid + 1;
        else
            hi = mid;
    }
    w.segment = (int)lo;
    for (hi = end; lo < hi;) { // and the next sequence's
        int64_t mid = (lo + hi) / 2;
        if (p.batch.segments[mid].seq <= w.keys.range)
            lo = mid + 1;
        else
            hi = mid;
    }
    w.segment_end = (int)lo;
    w.pos_begin = p.visible.first_query(w.keys.first);
    w.pos_last = p.visible.last_query(w.keys.first + w.keys.rows - 1);
    int64_t n = p.batch.cu_seqlens[w.keys.range + 1] - p.batch.cu_seqlens[w.keys.range];
    w.share_begin = (int)(n * w.split / p.splits);
    w.share_end = (int)(n * (w.split + 1) / p.splits);
    return w;
}

// The tiles of tokens that a work item's keys meet: of the last segment first, and from its last tile to the
// first, or the other way round. Under a window a walk begins at the last tile that ends a period, which is as
// many tiles as meet the keys, and the tiles beyond come at its end: so thread blocks that began together are
// at the same rows together. A segment's tiles are the same for all keys: they begin at its first token. Rows
// count in 32 bits, as TMA's coordinates do.
struct QTileIterator {
    int segment, row, place; // the first token's row in q; the tile's number of all
    int pos, end;            // the first token's position; the end of the segment's tokens
    int tile, lowest, last;  // of the segment's
    int beyond;              // tiles beyond..last are still to come when the lowest was met
    __device__ __forceinline__ QTileIterator(const KvWorkItem &w)
        : segment(w.step > 0 ? w.segment - 1 : w.segment_end), row(0), place(0), pos(0), end(0), tile(0),
          lowest(0), last(-1), beyond(0) {}
    __device__ __forceinline__ void move(int by, int tokens) {
        tile += by, place += by, pos += by * tokens, row += by * tokens;
    }
    __device__ __forceinline__ bool next(const DenseParams &p, const KvWorkItem &w, int tokens) {
        move(w.step, tokens);
        while (w.step > 0 ? tile > last : tile < lowest) {
            if (w.step < 0 && beyond <= last) {
                move(last - tile, tokens);
                lowest = beyond, last = -1;
                break;
            }
            segment += w.step;
            if (segment < w.segment || segment >= w.segment_end) return false;
            const int first = (int)p.batch.segments[segment].pos, len = (int)p.batch.segments[segment].len;
            const int last_pos = min(w.pos_last, first + len - 1), row0 = (int)p.batch.cu_queries[segment];
            // The tile of the first token that sees a key, but none that begins before the share; the tile of
            // the last, but none that begins past the share.
            lowest = max(w.pos_begin > first ? (w.pos_begin - first) / tokens : 0,
                         w.share_begin > first ? (w.share_begin - first + tokens - 1) / tokens : 0);
            last = min(last_pos >= first ? (last_pos - first) / tokens : -1,
                       w.share_end > first ? (w.share_end - first + tokens - 1) / tokens - 1 : -1);
            tile = w.step > 0 ? lowest : last;
            if (p.visible.width < INT32_MAX / 2) {
                const int turn = last - (last + 1) % ((p.visible.width + KEYS - 2) / tokens + 1);
                if (turn >= lowest) tile = turn;
            }
            beyond = tile + 1;
            pos = first + tile * tokens, end = first + len;
            row = row0 + tile * tokens;
            place = row0 / tokens + segment + tile;
        }
        return true;
    }
};

template <int D> struct BackwardPipeline {
    static constexpr int STAGES = D == 64 ? 4 : 2;
    static constexpr int STAY_BYTES = KEYS * D * 2, ROW_BYTES = STREAM_ROWS * D * 2;
    static constexpr int DS_BYTES = KEYS * STREAM_ROWS * 2; // [key][row], two of them in turn
    static constexpr int STATS = 4 * STREAM_ROWS * 4;       // bytes of a stage's lse and delta for each warpgroup
    static constexpr int DQ_BYTES = STREAM_ROWS * D * 4;    // also two, each with a thread that adds it to dq
    static constexpr int DS = 2 * STAY_BYTES + 2 * STAGES * ROW_BYTES, DQ = DS + 2 * DS_BYTES;
    static constexpr int STAT = DQ + 2 * DQ_BYTES, WORK = STAT + STAGES * STATS,
                         BARRIERS = WORK + 2 * (int)sizeof(KvWorkItem), BYTES = BARRIERS + 8 * (6 + 2 * STAGES);
    uint32_t k, v, q, dout, ds, dq, stay_full, stay_empty, dq_full, dq_empty, full, empty;
    __device__ __forceinline__ BackwardPipeline(uint32_t start) {
        k = start, v = k + STAY_BYTES, q = v + STAY_BYTES, dout = q + STAGES * ROW_BYTES;
        ds = start + DS, dq = start + DQ;
        stay_full = start + BARRIERS, stay_empty = stay_full + 8, dq_full = stay_empty + 8;
        dq_empty = dq_full + 16, full = dq_empty + 16, empty = full + 8 * STAGES;
    }
    __device__ __forceinline__ void init() const {
        mbarrier_init(stay_full, 1), mbarrier_init(stay_empty, RELEASES + 3);
        for (int i = 0; i < 2; i++)
            mbarrier_init(dq_full + 8 * i, RELEASES), mbarrier_init(dq_empty + 8 * i, 1);
        for (int i = 0; i < STAGES; i++)
            mbarrier_init(full + 8 * i, 1 + 32), mbarrier_init(empty + 8 * i, RELEASES);
        mbarrier_init_fence();
    }
    // Work items lie in shared memory, where all warps read them, two in turn: the warps that add to dq lag
    // behind the others, the one that brings lse and delta runs ahead.
    static __device__ __forceinline__ KvWorkItem *work(char *tiles, int parity) {
        return (KvWorkItem *)(tiles + WORK) + parity;
    }
    // The next one, or NULL.
    __device__ __forceinline__ const KvWorkItem *next_work(char *tiles, int *parity) const {
        mbarrier_wait(stay_full, *parity);
        const KvWorkItem *w = work(tiles, *parity);
        *parity ^= 1;
        return w->keys.rows > 0 ? w : NULL;
    }
    // A thread: takes the items and brings their keys and rows.
    __device__ void produce(const DenseParams &p, const Maps &maps, char *tiles, int64_t items) const {
        const int g = p.q_heads / p.kv_heads, tokens = STREAM_ROWS / g;
        Turn<STAGES> turn;
        for (int parity = 0;; parity ^= 1) {
            KvWorkItem *w = work(tiles, parity), next;
            int item;
            do {
                item = atomicAdd(p.order, 1);
                next = kv_work_item(p, item, items);
            } while (item < items && next.keys.rows == 0);
            mbarrier_wait(stay_empty, parity ^ 1); // a fresh barrier's phase before the first counts as over
            *w = next;
            if (next.keys.rows == 0) {
                mbarrier_arrive(stay_full);
                return;
            }
            mbarrier_arrive_expect(stay_full, 2 * STAY_BYTES);
            for (int i = 0; i < D / 64; i++) {
                uint32_t at = i * KEYS * 128;
                tma_load_3d(k + at, &maps.k, i * 64, next.kv_head, (int)next.keys.row, stay_full);
                tma_load_3d(v + at, &maps.v, i * 64, next.kv_head, (int)next.keys.row, stay_full);
            }
            QTileIterator walk(*w);
            for (; walk.next(p, *w, tokens); turn.next()) {
                const uint32_t is_full = full + 8 * turn.stage;
                mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
                mbarrier_arrive_expect(is_full, 2 * tokens * g * D * 2);
                for (int i = 0; i < D / 64; i++) {
                    uint32_t at = turn.stage * ROW_BYTES + i * STREAM_ROWS * 128;
                    tma_load_3d(q + at, &maps.q, i * 64, w->kv_head * g, walk.row, is_full);
                    tma_load_3d(dout + at, &maps.dout, i * 64, w->kv_head * g, walk.row, is_full);
                }
            }
        }
    }
    // A warp: brings lse and delta of the rows, a tile ahead of those that wait. For a warpgroup whose keys are
    // among a row's last blocks they are such that P and dS become those of window and selected branch
    // together: with P = e^(S - lse), P' = e^(S - lse')
    //     P + P' = e^(S - both), both = -ln(e^-lse + e^-lse')
    //     P (dP - delta) + P' (dP - delta') = (P + P') (dP - (P delta + P' delta') / (P + P'))
    // where P / (P + P') is the same for all keys.
    __device__ void bring_stats(const DenseParams &p, char *tiles) const {
        const int g = p.q_heads / p.kv_heads, tokens = STREAM_ROWS / g, lane = threadIdx.x % 32;
        Turn<STAGES> turn;
        // Of the lane's two rows of a tile: the token, and the place of lse after the tile's first.
        int token[2], place[2], parity = 0;
        for (int i = 0; i < 2; i++) {
            token[i] = (lane + 32 * i) / g;
            place[i] = token[i] * p.q_heads + (lane + 32 * i) % g;
        }
        while (const KvWorkItem *w = next_work(tiles, &parity)) {
            __syncwarp();
            if (lane == 0) mbarrier_arrive(stay_empty);
            QTileIterator walk(*w);
            // Up to here a warpgroup's keys are among the last blocks; no token is before 0.
            int local_end[2] = {};
            if (p.forced.local > 0)
                for (int i = 0; i < 2; i++)
                    local_end[i] =
                        ((w->keys.first + 64 * i) / p.forced.block + p.forced.local) * p.forced.block;
            float lse[2], delta[2], other_lse[2], other_delta[2];
            auto fetch = [&] {
                const int64_t first = (int64_t)walk.row * p.q_heads + w->kv_head * g;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int pos = walk.pos + token[i];
                    const bool there = token[i] < tokens && pos < walk.end, both = there && pos < local_end[1];
                    lse[i] = there ? p.lse_bwd[first + place[i]] : INFINITY; // no row: P = 0
                    delta[i] = there ? p.delta[first + place[i]] : 0;
                    other_lse[i] = both ? p.local_lse_bwd[first + place[i]] : INFINITY;
                    other_delta[i] = both ? p.local_delta[first + place[i]] : 0;
                }
            };
            bool more = walk.next(p, *w, tokens);
            if (more) fetch();
            for (; more; turn.next()) {
                mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
                float *to = (float *)(tiles + STAT + turn.stage * STATS);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    // Nothing seen: P = 0.
                    const float own = lse[i] == -INFINITY ? INFINITY : lse[i] * FSA_LOG2E;
                    const float other = other_lse[i] * FSA_LOG2E;
                    // In base 2, from the larger of both probabilities.
                    const float low = fminf(own, other);
                    const float less = low == INFINITY ? 0 : exp2f(low - fmaxf(own, other));
                    const float both = low - log2f(1 + less);
                    const float share = (own == low ? 1 : less) / (1 + less); // own of both
                    const float both_delta = other_delta[i] + share * (delta[i] - other_delta[i]);
                    for (int half = 0; half < 2; half++) {
                        const bool local = walk.pos + token[i] < local_end[half];
                        to[half * 2 * STREAM_ROWS + lane + 32 * i] = local ? both : own;
                        to[half * 2 * STREAM_ROWS + STREAM_ROWS + lane + 32 * i] =
                            local ? both_delta : delta[i];
                    }
                }
                mbarrier_arrive(full + 8 * turn.stage);
                more = walk.next(p, *w, tokens);
                if (more) fetch();
            }
        }
    }
    // A thread of two: adds every second tile of dQ to dq when those of all smaller keys are in.
    __device__ void add_queries(const DenseParams &p, char *tiles, int mine) const {
        const int g = p.q_heads / p.kv_heads, tokens = STREAM_ROWS / g;
        const uint32_t my_dq = dq + mine * DQ_BYTES;
        int work_parity = 0;
        Turn<2> buffer;
        while (const KvWorkItem *w = next_work(tiles, &work_parity)) {
            mbarrier_arrive(stay_empty);
            QTileIterator walk(*w);
            for (; walk.next(p, *w, tokens); buffer.next()) {
                if (buffer.stage != mine) continue;
                int *turn = p.order + 1 + (int64_t)walk.place * p.kv_heads + w->kv_head;
                const int before = w->keys.first / KEYS - p.visible.first_key(walk.pos) / KEYS;
                const int bytes = min(tokens, walk.end - walk.pos) * g * D * 4;
                float *to = p.dq + dq_accum_group_row(p.batch.nq, g, walk.row, w->kv_head) * D;
                semaphore_wait(turn, before);
                mbarrier_wait(dq_full + 8 * mine, buffer.parity);
                if (before > 0 || p.accumulate_q)
                    bulk_add(to, my_dq, bytes);
                else
                    bulk_store(to, my_dq, bytes);
                bulk_commit();
                bulk_wait_read();
                mbarrier_arrive(dq_empty + 8 * mine);
                bulk_wait();
                semaphore_release(turn);
            }
        }
    }
};

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    dense_backward_sm90_kernel(const DenseParams p, const __grid_constant__ Maps maps, int64_t items) {
    extern __shared__ __align__(1024) char shared[];
    typedef BackwardPipeline<D> Ring;
    const uint32_t start = smem_address(shared); // aligned as declared: there is no room to round it up
    char *const tiles = shared;
    const Ring ring(start);
    if (threadIdx.x == 0) ring.init();
    // The copies never write the last rows of a tile where g doesn't divide 64; they are zeros for good.
    for (int i = threadIdx.x; i < 2 * Ring::STAGES * Ring::ROW_BYTES / 16; i += THREADS)
        ((uint4 *)(tiles + 2 * Ring::STAY_BYTES))[i] = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); // in a uniform register
    if (warpgroup == 2) {
        warpgroup_reg_dealloc<BACKWARD_PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32 - CONSUMERS / 32;
        if (warp == 0)
            ring.bring_stats(p, tiles);
        else if (threadIdx.x % 32 == 0)
            warp == 1 ? ring.produce(p, maps, tiles, items) : ring.add_queries(p, tiles, warp - 2);
    } else {
        warpgroup_reg_alloc<BACKWARD_CONSUMER_REGISTERS>();
        const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        const int g = p.q_heads / p.kv_heads, tokens = STREAM_ROWS / g;
        const float scale = p.scale * FSA_LOG2E, shift = probability_shift<T>();
        const float unit = probability_unit<T>(), unit_k = unit * p.scale;
        const uint32_t my_k = ring.k + warpgroup * 64 * 128, my_v = ring.v + warpgroup * 64 * 128;
        // The warpgroup's columns of K, D/2 of them, in all rows.
        const uint32_t my_columns = ring.k + warpgroup * (D == 64 ? 64 : KEYS * 128);
        const int my_key = warpgroup * 64 + warp * 16 + lane / 4; // the first of the thread's two
        Turn<Ring::STAGES> turn;
        Turn<2> buffer; // of dS and of dQ
        int work_parity = 0;
        while (const KvWorkItem *work = ring.next_work(tiles, &work_parity)) {
            const KvWorkItem &w = *work;
            if (w.keys.rows < KEYS) {
                clear_rows<D, KEYS>(tiles, w.keys.rows);
                clear_rows<D, KEYS>(tiles + Ring::STAY_BYTES, w.keys.rows);
            }
            float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[STREAM_ROWS / 8][4];
            const int j0 = w.keys.first + warpgroup * 64;
            QTileIterator walk(w);
            bool more = walk.next(p, w, tokens);
            auto start_scores = [&] {
                if (more) { // past the end the stage's next round may be any
                    mbarrier_wait(ring.full + 8 * turn.stage, turn.parity);
                    const int left = (walk.end - walk.pos) * g;
                    if (left < tokens * g) {
                        clear_rows<D, STREAM_ROWS>(tiles + (ring.q - start) + turn.stage * Ring::ROW_BYTES,
                                                   left);
                        clear_rows<D, STREAM_ROWS>(tiles + (ring.dout - start) + turn.stage * Ring::ROW_BYTES,
                                                   left);
                    }
                }
                wgmma_fence();
                product_rows<T, D, KEYS, STREAM_ROWS>(s, my_k, ring.q + turn.stage * Ring::ROW_BYTES);
                wgmma_commit();
            };
            start_scores();
            for (; more; buffer.next()) {
                const int stage = turn.stage, pos = walk.pos, end = walk.end;
                const int64_t sums = dq_accum_group_row(p.batch.nq, g, walk.row, w.kv_head);
                const uint32_t tile_q = ring.q + stage * Ring::ROW_BYTES;
                const uint32_t tile_dout = ring.dout + stage * Ring::ROW_BYTES;
                const uint32_t tile_ds = ring.ds + buffer.stage * Ring::DS_BYTES;
                const float *lse =
                    (const float *)(tiles + Ring::STAT + stage * Ring::STATS) + warpgroup * 2 * STREAM_ROWS;
                const float *delta = lse + STREAM_ROWS;
                float dp[STREAM_ROWS / 8][4];
                wgmma_wait<0>();
                fence_operand(s);
                wgmma_fence();
                product_rows<T, D, KEYS, STREAM_ROWS>(dp, my_v, tile_dout);
                wgmma_commit();
                if (!p.visible(pos, j0 + 63) || j0 < p.visible.first_key(min(pos + tokens, end) - 1)) {
                    int from[2]; // rows from[half] .. from[half] + rows[half] - 1 see the key
                    unsigned rows[2];
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int j = w.keys.first + my_key + half * 8;
                        const int first = min(max(p.visible.first_query(j) - pos, 0), tokens);
                        const int past = min(p.visible.last_query(j) - pos, tokens - 1) + 1;
                        from[half] = first * g - lane % 4 * 2;
                        rows[half] = max(past - first, 0) * g;
                    }
#pragma unroll
                    for (int n = 0; n < STREAM_ROWS / 8; n++) {
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if ((unsigned)(n * 8 + e % 2 - from[e / 2]) >= rows[e / 2]) s[n][e] = -INFINITY;
                    }
                }
                uint32_t a[STREAM_ROWS / 16][4];
#pragma unroll
                for (int n = 0; n < STREAM_ROWS / 8; n++) {
                    float2 l = *(const float2 *)(lse + n * 8 + lane % 4 * 2);
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        s[n][e] = exp2_fast(s[n][e] * scale - ((e % 2 ? l.y : l.x) - shift));
                }
#pragma unroll
                for (int k = 0; k < STREAM_ROWS / 16; k++) result_as_a<T>(a[k], s[2 * k], s[2 * k + 1]);
                wgmma_fence();
                product_columns<T, STREAM_ROWS>(dv, a, tile_dout, true);
                wgmma_commit();
                wgmma_wait<1>();
                fence_operand(dp);
                uint32_t b[STREAM_ROWS / 16][4];
#pragma unroll
                for (int n = 0; n < STREAM_ROWS / 8; n++) {
                    float2 l = *(const float2 *)(delta + n * 8 + lane % 4 * 2);
#pragma unroll
                    for (int e = 0; e < 4; e++) s[n][e] *= dp[n][e] - (e % 2 ? l.y : l.x);
                }
#pragma unroll
                for (int k = 0; k < STREAM_ROWS / 16; k++) result_as_a<T>(b[k], s[2 * k], s[2 * k + 1]);
                wgmma_fence();
                product_columns<T, STREAM_ROWS>(dk, b, tile_q, true);
                wgmma_commit();
                // Into the one buffer while the other warpgroup may still multiply out of the other one.
#pragma unroll
                for (int k = 0; k < STREAM_ROWS / 16; k++) {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        *(uint32_t *)(tiles + (tile_ds - start) + lane % 4 * 4 +
                                      panel_offset(my_key + i % 2 * 8, k * 2 + i / 2, 0)) = b[k][i];
                }
                fence_proxy_async();
                named_barrier_sync(1, CONSUMERS);
                float dq[D / 16][4];
                wgmma_fence();
                const uint64_t from_ds = make_smem_desc(tile_ds), from_k = make_smem_desc(my_columns);
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++)
                    wgmma_ss<T, 1, 1>(dq, advance_desc(from_ds, k * 2048), advance_desc(from_k, k * 2048),
                                      k > 0);
                wgmma_commit();
                turn.next();
                more = walk.next(p, w, tokens);
                wgmma_wait<1>();
                fence_operand(dv), fence_operand(dk);
                mbarrier_arrive_warp(ring.empty + 8 * stage);
                start_scores();
                wgmma_wait<1>();
                fence_operand(dq);
                mbarrier_wait(ring.dq_empty + 8 * buffer.stage, buffer.parity ^ 1);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = warp * 16 + half * 8 + lane / 4;
                    char *to = tiles + Ring::DQ + buffer.stage * Ring::DQ_BYTES + row * D * 4 + lane % 4 * 8;
#pragma unroll
                    for (int n = 0; n < D / 16; n++)
                        *(float2 *)(to + dq_accum_chunk(sums + row, warpgroup * D / 16 + n) * 32) =
                            make_float2(dq[n][half * 2] * unit_k, dq[n][half * 2 + 1] * unit_k);
                }
                fence_proxy_async();
                mbarrier_arrive_warp(ring.dq_full + 8 * buffer.stage);
            }
            wgmma_wait<0>(); // scores of no tile
            mbarrier_arrive_warp(ring.stay_empty);

            int64_t row_size = (int64_t)p.kv_heads * D, all = p.num_keys * row_size; // elements of dk
            float *to_k = p.splits > 1 ? p.partial + w.split * 2 * all : p.dk;
            float *to_v = p.splits > 1 ? p.partial + (w.split * 2 + 1) * all : p.dv;
            bool accumulate = p.accumulate_kv && p.splits == 1;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = my_key + half * 8;
                if (row >= w.keys.rows) continue;
                int64_t at = (w.keys.row + row) * row_size + w.kv_head * D + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    float2 x = make_float2(dk[n][half * 2] * unit_k, dk[n][half * 2 + 1] * unit_k);
                    float2 y = make_float2(dv[n][half * 2] * unit, dv[n][half * 2 + 1] * unit);
                    float2 *at_k = (float2 *)(to_k + at + n * 8), *at_v = (float2 *)(to_v + at + n * 8);
                    if (accumulate) {
                        float2 u = *at_k, z = *at_v;
                        x.x += u.x, x.y += u.y, y.x += z.x, y.y += z.y;
                    }
                    *at_k = x;
                    *at_v = y;
                }
            }
        }
    }
}

template <typename T, int D> static int backward_sm90(DenseParams d, FsaDtype dtype, cudaStream_t stream) {
    Maps maps = {};
    int tokens = STREAM_ROWS / (d.q_heads / d.kv_heads), status = make_maps(d, dtype, D, tokens, &maps);
    if (status) return status;
    int64_t of_a_head = (d.num_keys + KEYS - 1) / KEYS * d.splits;
    if (of_a_head < 1) of_a_head = 1;
    const int64_t of_a_split = of_a_head / d.splits;
    d.alternate = d.visible.a > 1 && of_a_split <= processors();
    if (d.alternate) {
        d.together = (int)(processors() / of_a_split);
    } else {
        int together = (int)((ENOUGH_ITEMS + of_a_head - 1) / of_a_head);
        if (together < FEW_HEADS / d.splits) together = FEW_HEADS / d.splits;
        int turns = d.kv_heads > together ? d.kv_heads / together : 1;
        d.together = (d.kv_heads + turns - 1) / turns;
    }
    int64_t items = row_tile_bound(d.num_keys, d.batch.num_seqs, KEYS) * d.kv_heads * d.splits;
    if (items > INT32_MAX / 2) return FSA_ERROR_ARGUMENT; // tickets are of 32 bits
    size_t bytes = fsa_dense_semaphore_bytes(d.batch, d.q_heads, d.kv_heads);
    if (cudaMemsetAsync(d.order, 0, bytes, stream) != cudaSuccess) return FSA_ERROR_CUDA;
    return launch(dense_backward_sm90_kernel<T, D>, d, maps, items, BackwardPipeline<D>::BYTES, stream);
}

int fsa_dense_num_splits_sm90(int64_t num_keys, int kv_heads) {
    int64_t items = (num_keys + KEYS - 1) / KEYS * kv_heads;
    if (items >= UNDIVIDED_ITEMS || items == 0) return 1;
    if (items >= HALVED_ITEMS) return 2;
    return (int)(SHARED_ITEMS / items < MOST_SHARES ? SHARED_ITEMS / items : MOST_SHARES);
}

int64_t fsa_dense_split_rows_sm90(int64_t num_keys, int kv_heads) {
    int64_t rows = num_keys + (UNDIVIDED_ITEMS / kv_heads + 1) * KEYS;
    return rows < num_keys * MOST_SHARES ? rows : num_keys * MOST_SHARES;
}

size_t fsa_dense_semaphore_bytes(const BatchLayout &p, int q_heads, int kv_heads) {
    int64_t tiles = row_tile_bound(p.nq, p.num_segments, STREAM_ROWS / (q_heads / kv_heads));
    return (size_t)(1 + tiles * kv_heads) * sizeof(int);
}

int fsa_dense_backward_sm90(const FsaConfig *c, const DenseParams &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, backward_sm90, d, dtype, stream);
}
