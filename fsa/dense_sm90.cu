// dense_sm90.cu: the dense kernels (dense.cu) for Hopper: TMA brings tiles into a ring of stages in shared
// memory, two warpgroups of consumers multiply with wgmma. A group's heads are packed into a tile's rows: row
// r is head r % g of token r / g, so that g heads share each tile of K and V and the masks stay tight.
//
// Both kernels are persistent: a thread block takes work items, long ones first, so that all end together;
// the loads of the next item travel while this one's results are written.
#include "dense.cuh"
#include "ptx_sm90.cuh"
#include "tma.cuh"

enum {
    ROWS = 128,       // rows of a work item of forward, 64 a warpgroup
    KEYS = 128,       // keys of a tile that forward streams; of a work item of backward, 64 a warpgroup
    STREAM_ROWS = 64, // rows of a tile that backward streams
    // Backward takes some heads together, few, so that several tiles of keys of each are under way and share
    // what their rows bring into the L2, but so many that the last of them still fill all multiprocessors.
    FEW_HEADS = 8,
    ENOUGH_ITEMS = 256,
    // The compressed rule's longest work item is twice the average, so where a wave or two of thread blocks
    // would take all items, these are divided: in two, and where there are few so that they make some 192. 192,
    // 256, 384 and 512 were tried, at 4K to 96K tokens.
    UNDIVIDED_ITEMS = 256,
    HALVED_ITEMS = 128,
    SHARED_ITEMS = 192,
    MOST_SHARES = 16,
    KV_STAGES = 2,
    CONSUMERS = 256, // threads; a third warpgroup produces
    THREADS = CONSUMERS + 128,
    // Of a thread of forward and of backward, whose producers keep books.
    PRODUCER_REGISTERS = 24,
    CONSUMER_REGISTERS = 240,
    BACKWARD_PRODUCER_REGISTERS = 24,
    BACKWARD_CONSUMER_REGISTERS = 240,
};

struct Maps {
    CUtensorMap q, dout, k, v;
};

// ---- tiles in shared memory: D/64 panels of 64 columns ---------------------------------------------------
// x (64 x N) = A B^T: 64 rows of A from address a on, N rows of B from address b on, both in panels of so
// many rows.
template <typename T, int D, int A_ROWS, int B_ROWS, int N8>
static __device__ __forceinline__ void product_rows(float (&x)[N8][4], uint32_t a, uint32_t b) {
    const uint64_t from_a = wgmma_matrix(a), from_b = wgmma_matrix(b);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_ss<T>(x, wgmma_further(from_a, k / 4 * A_ROWS * 128 + k % 4 * 32),
                    wgmma_further(from_b, k / 4 * B_ROWS * 128 + k % 4 * 32), k > 0);
}
// x (64 x D) = (add ? x : 0) + A B: A (64 x 16*K16) in registers, B's rows from address b on.
template <typename T, int B_ROWS, int N8, int K16>
static __device__ __forceinline__ void product_columns(float (&x)[N8][4], const uint32_t (&a)[K16][4],
                                                       uint32_t b, bool add) {
    const uint64_t from = wgmma_matrix(b, B_ROWS * 128);
#pragma unroll
    for (int k = 0; k < K16; k++) wgmma_rs<T, 1>(x, a[k], wgmma_further(from, k * 2048), add || k > 0);
}

// ---- the ring ---------------------------------------------------------------------------------------------
// A stage of the ring and the parity of its current round.
template <int STAGES> struct Turn {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};
// Arrivals of the consumers' warps, each of which is done with what a barrier guards.
enum { RELEASES = CONSUMERS / 32 * WARP_ARRIVALS };

// ---------------------------------------------------------------------------------------------------------
// Work items of forward: up to 128/g tokens of one KV head, and the tiles of keys that they see: those from
// `begin` on, or, of forced blocks, the first `init_tiles`, and `begin` is so much less.
struct QueryWork {
    int row, rows; // the first token's place in q, and how many tokens: 0 no such item, -1 no more items
    int kv_head, first_pos, begin, keys; // keys: of the whole sequence
    int tiles, init_tiles;
    int key0; // the sequence's first key
    template <bool FORCED> __device__ __forceinline__ int first_key(int tile) const {
        return FORCED && tile < init_tiles ? tile * KEYS : begin + tile * KEYS;
    }
};

// That of a thread block's `round`: items are taken from both ends of each round in turn.
template <bool FORCED>
static __device__ __forceinline__ QueryWork query_work(const Dense &p, int round, int items) {
    const int item = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    QueryWork w = {};
    w.rows = -1;
    if (item >= items) return w;
    const int g = p.q_heads / p.kv_heads, tile = item / p.kv_heads;
    const RowTile rows =
        find_row_tile(p.plan.cu_rows, p.plan.num_segments, ROWS / g, items / p.kv_heads - 1 - tile);
    w.row = (int)rows.row, w.rows = rows.rows;
    w.kv_head = item - tile * p.kv_heads;
    if (w.rows == 0) return w;
    FsaSegment segment = p.plan.segments[rows.range];
    w.first_pos = (int)segment.pos + rows.first;
    w.begin = FORCED ? p.forced.local_begin(w.first_pos) : p.visible.first_key(w.first_pos);
    w.key0 = (int)p.cu_keys[segment.seq];
    w.keys = (int)p.cu_keys[segment.seq + 1] - w.key0;
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

// What consumers read of it, in uniform registers, as it comes to all lanes from one place.
static __device__ __forceinline__ QueryWork uniform(QueryWork w) {
    for (int *x = &w.row; x <= &w.init_tiles; x++) *x = __shfl_sync(0xffffffffu, *x, 0);
    return w;
}

// Barriers and tiles of forward: Q and what to do with it, of this work item and the next one; the ring of K
// and V; work items that were found ahead.
template <int D> struct QueryRing {
    static constexpr int Q_STAGES = 2, Q_BYTES = ROWS * D * 2, KV_BYTES = KEYS * D * 2, FOUND = 4;
    static constexpr int TILES = Q_STAGES * Q_BYTES + 2 * KV_STAGES * KV_BYTES;
    static constexpr int BYTES = TILES + ((Q_STAGES + FOUND) * (int)sizeof(QueryWork) + 15) / 16 * 16;
    static constexpr int BARRIERS = 8 * (2 * Q_STAGES + 4 * KV_STAGES + 2 * FOUND);
    uint32_t q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, found_full, found_empty;
    __device__ __forceinline__ QueryRing(uint32_t start) {
        q = start, k = q + Q_STAGES * Q_BYTES, v = k + KV_STAGES * KV_BYTES;
        q_full = start + BYTES, q_empty = q_full + 8 * Q_STAGES;
        k_full = q_empty + 8 * Q_STAGES, k_empty = k_full + 8 * KV_STAGES;
        v_full = k_empty + 8 * KV_STAGES, v_empty = v_full + 8 * KV_STAGES;
        found_full = v_empty + 8 * KV_STAGES, found_empty = found_full + 8 * FOUND;
    }
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < Q_STAGES; i++)
            mbarrier_init(q_full + 8 * i, 1), mbarrier_init(q_empty + 8 * i, RELEASES);
        for (int i = 0; i < KV_STAGES; i++) {
            mbarrier_init(k_full + 8 * i, 1), mbarrier_init(k_empty + 8 * i, RELEASES);
            mbarrier_init(v_full + 8 * i, 1), mbarrier_init(v_empty + 8 * i, RELEASES);
        }
        for (int i = 0; i < FOUND; i++)
            mbarrier_init(found_full + 8 * i, 1), mbarrier_init(found_empty + 8 * i, 1);
        mbarrier_init_fence();
    }
    // A thread of its own finds the work items of this thread block, ahead of the one that loads: it takes
    // half a dozen loads from memory, one after the other. The last one has rows = -1.
    template <bool FORCED> __device__ void find(const Dense &p, int items, QueryWork *found) const {
        Turn<FOUND> turn;
        QueryWork w = {};
        for (int round = 0; w.rows >= 0; round++) {
            w = query_work<FORCED>(p, round, items);
            if (w.rows == 0) continue;
            mbarrier_wait(found_empty + 8 * turn.stage, turn.parity ^ 1);
            found[turn.stage] = w;
            mbarrier_arrive(found_full + 8 * turn.stage);
            turn.next();
        }
    }
    // The producer's thread: all loads of this thread block. work: for the consumers.
    template <bool FORCED>
    __device__ void produce(const Dense &p, const Maps &maps, const QueryWork *found, QueryWork *work) const {
        const int g = p.q_heads / p.kv_heads, q_bytes = ROWS / g * g * D * 2;
        Turn<KV_STAGES> turn;
        Turn<Q_STAGES> q_turn;
        Turn<FOUND> found_turn;
        for (bool more = true; more; found_turn.next()) {
            const QueryWork &w = found[found_turn.stage];
            mbarrier_wait(found_full + 8 * found_turn.stage, found_turn.parity);
            more = w.rows >= 0;
            const uint32_t q_at = 8 * q_turn.stage;
            mbarrier_wait(q_empty + q_at, q_turn.parity ^ 1);
            work[q_turn.stage] = w;
            mbarrier_arrive_expect(q_full + q_at, w.tiles > 0 ? q_bytes : 0);
            for (int i = 0; i < D / 64 && w.tiles > 0; i++)
                tma_load_3d(q + q_turn.stage * Q_BYTES + i * ROWS * 128, &maps.q, i * 64, w.kv_head * g,
                            w.row, q_full + q_at);
            q_turn.next();
            for (int tile = 0; tile < w.tiles; tile++, turn.next()) {
                int key = w.key0 + w.first_key<FORCED>(tile);
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
            mbarrier_arrive(found_empty + 8 * found_turn.stage);
        }
    }
};

// A tile of TILE_ROWS rows that goes on past its sequence's: rows `from` on become zeros, since what lies
// there may be no number, which no probability of 0 makes harmless. All consumers call it.
template <int D, int TILE_ROWS> static __device__ __forceinline__ void clear_rows(char *tile, int from) {
    int i = threadIdx.x;
    asm volatile("" : "+r"(i)); // else ptxas keeps what this needs in registers, all the time
#pragma unroll 1
    for (; i < (TILE_ROWS - from) * (D / 8); i += CONSUMERS)
        *(uint4 *)(tile + panel_offset(from + i / (D / 8), i % (D / 8), TILE_ROWS * 128)) =
            make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    named_barrier_sync(3, CONSUMERS);
}

// Rows that a thread holds of its warpgroup's 64: row[half], the keys begin..end that it sees, and its place
// in q.
struct MyRows {
    int row[2], begin[2], end[2];
    int64_t at[2]; // row * q_heads + head; -1: none
    template <bool FORCED>
    __device__ __forceinline__ void place(const Dense &p, const QueryWork &w, int warpgroup) {
        const int g = p.q_heads / p.kv_heads;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row[i] = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
            const int token = divide(row[i], p.by_group);
            at[i] = token < w.rows ? (int64_t)(w.row + token) * p.q_heads + w.kv_head * g + row[i] - token * g
                                   : -1;
            begin[i] = begin_of<FORCED>(p, w.first_pos + token), end[i] = end_of(p, w, w.first_pos + token);
        }
    }
    // Those of the query at a position; of forced blocks the local ones.
    template <bool FORCED> static __device__ __forceinline__ int begin_of(const Dense &p, int pos) {
        return FORCED ? p.forced.local_begin(pos) : p.visible.first_key(pos);
    }
    static __device__ __forceinline__ int end_of(const Dense &p, const QueryWork &w, int pos) {
        return min(p.visible.end_key(pos), w.keys);
    }
};

// Scores that a row doesn't see become -inf, where a warpgroup's rows and the tile of keys j0.. meet the
// rule's edge. last_begin, first_end: of the warpgroup's last and first row. init: the tile is one of the
// first blocks'.
template <bool FORCED, int N8>
static __device__ __forceinline__ void mask_scores(const Dense &p, float (&s)[N8][4], const MyRows &mine,
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
// ms; window 512: 0.55 TFLOP, 0.7 ms, against 1.3 GB, 0.3 ms. FORCED: the rule of Forced, two ranges of keys;
// of 1 + 2 blocks of 64 two tiles an item, 0.27 TFLOP, 0.35 ms, against 1.1 GB, 0.24 ms: 0.68 on an H100.
template <typename T, int D, bool FORCED>
__global__ void __launch_bounds__(THREADS, 1)
    forward_sm90_kernel(const Dense p, const __grid_constant__ Maps maps, int items) {
    extern __shared__ __align__(1024) char shared[];
    typedef QueryRing<D> Ring;
    const uint32_t start = (smem_address(shared) + 1023) & ~1023u;
    char *const tiles = shared + (start - smem_address(shared));
    const Ring ring(start);
    QueryWork *const work = (QueryWork *)(tiles + Ring::TILES), *const found = work + Ring::Q_STAGES;
    char *const staging = tiles + Ring::BYTES + Ring::BARRIERS; // o on its way out, 128 x D
    if (threadIdx.x == 0) ring.init();
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); // in a uniform register
    if (warpgroup == 2) {
        registers_down_to<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMERS) ring.template produce<FORCED>(p, maps, found, work);
        if (threadIdx.x == CONSUMERS + 32) ring.template find<FORCED>(p, items, found);
    } else {
        registers_up_to<CONSUMER_REGISTERS>();
        const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = p.q_heads / p.kv_heads;
        const float scale = p.scale * FSA_LOG2E;
        Turn<KV_STAGES> turn;
        Turn<Ring::Q_STAGES> q_turn;
        // Whose turn it is to issue products: barrier 1 + warpgroup opens when the other one has issued its
        // own.
        if (warpgroup == 1) named_barrier_arrive(1, CONSUMERS);
        for (;;) {
            mbarrier_wait(ring.q_full + 8 * q_turn.stage, q_turn.parity);
            const QueryWork w = uniform(work[q_turn.stage]);
            if (w.rows < 0) break;
            MyRows mine;
            mine.place<FORCED>(p, w, warpgroup);
            const int first_pos = w.first_pos + divide(warpgroup * 64, p.by_group),
                      last_pos = w.first_pos + divide(warpgroup * 64 + 63, p.by_group),
                      first_end = MyRows::end_of(p, w, first_pos),
                      last_begin = MyRows::begin_of<FORCED>(p, last_pos);
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
                wgmma_pin(s);
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
                    wgmma_pin(s);
                    mbarrier_arrive_warp(ring.k_empty + 8 * turn.stage);
                    softmax(tile);
                    // V came long ago, but ptxas moves the next wait ahead of all of softmax, though not past a
                    // branch, and P V would run alone.
                    mbarrier_wait(ring.v_full + 8 * before.stage, before.parity);
                    wgmma_wait<0>();
                    wgmma_pin(out);
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
                wgmma_pin(out);
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
                          token = divide(row, p.by_group);
                if (token < w.rows)
                    *(uint4 *)(o + (token * p.q_heads + row - token * g) * D) =
                        *(uint4 *)(staging + panel_offset(row, lane % (D / 8), ROWS * 128));
            }
            __syncwarp();
        }
        if (warpgroup == 0) named_barrier_sync(1, CONSUMERS); // the turn that nobody took
    }
}

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
// Meanwhile runs: dV while dS is made, the next tile's S while dS is stored, dK and dQ while the next tile's exp
// is taken. After the last tile S is computed of whatever lies there, and not used: ptxas serializes the
// products here if one is started under a condition, or two are under way where the loop begins.
//
// Bytes: k, v once, dk, dv once in fp32; from L2 q and dO, and dq in fp32 read and written, once for every
// 128 keys that their tokens see. Flops: 10*d a visible pair; they bind: causal 64K, 32 heads, d = 128: 88
// TFLOP, 111 ms at 790. Shared memory comes close: for a tile at d = 128 wgmma reads 256 KiB, 2,048 clocks,
// and 80 KiB more are written and read on the way of dS and dQ, where the products take 2,560. On an H200 a
// tile takes some 4,600 clocks, 162 to 173 ms: exp and dS lie between dependent products, and both warpgroups
// are at the same place.
struct KeyWork {
    RowTile keys; // no rows: no work
    int kv_head, split;
    int step;                   // its rows in ascending or in descending order: 1, -1
    int segment, segment_end;   // those of the sequence
    int pos_begin, pos_last;    // tokens that see some of the keys
    int share_begin, share_end; // the split's tiles begin here
};

static __device__ KeyWork key_work(const Dense &p, int64_t item, int64_t items) {
    KeyWork w;
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
    w.keys = find_row_tile(p.cu_keys, p.plan.num_seqs, KEYS, rest % (tiles * heads) / heads);
    w.step = p.alternate && (round * p.splits + turn) % 2 ? 1 : -1;
    int64_t lo = 0, hi = p.plan.num_segments, end = hi;
    while (lo < hi) { // the sequence's first segment
        int64_t mid = (lo + hi) / 2;
        if (p.plan.segments[mid].seq < w.keys.range)
            lo = mid + 1;
        else
            hi = mid;
    }
    w.segment = (int)lo;
    for (hi = end; lo < hi;) { // and the next sequence's
        int64_t mid = (lo + hi) / 2;
        if (p.plan.segments[mid].seq <= w.keys.range)
            lo = mid + 1;
        else
            hi = mid;
    }
    w.segment_end = (int)lo;
    w.pos_begin = p.visible.first_query(w.keys.first);
    w.pos_last = p.visible.last_query(w.keys.first + w.keys.rows - 1);
    int64_t n = p.plan.cu_seqlens[w.keys.range + 1] - p.plan.cu_seqlens[w.keys.range];
    w.share_begin = (int)(n * w.split / p.splits);
    w.share_end = (int)(n * (w.split + 1) / p.splits);
    return w;
}

// The tiles of tokens that a work item's keys meet: of the last segment first, and from its last tile to the
// first, or the other way round. Under a window a walk begins at the last tile that ends a period, which is as
// many tiles as meet the keys, and the tiles beyond come at its end: so thread blocks that began together are
// at the same rows together. A segment's tiles are the same for all keys: they begin at its first token. Rows
// count in 32 bits, as TMA's coordinates do.
struct TokenWalk {
    int segment, row, place; // the first token's row in q; the tile's number of all
    int pos, end;            // the first token's position; the end of the segment's tokens
    int tile, lowest, last;  // of the segment's
    int beyond;              // tiles beyond..last are still to come when the lowest was met
    __device__ __forceinline__ TokenWalk(const KeyWork &w)
        : segment(w.step > 0 ? w.segment - 1 : w.segment_end), row(0), place(0), pos(0), end(0), tile(0),
          lowest(0), last(-1), beyond(0) {}
    __device__ __forceinline__ void move(int by, int tokens) {
        tile += by, place += by, pos += by * tokens, row += by * tokens;
    }
    __device__ __forceinline__ bool next(const Dense &p, const KeyWork &w, int tokens) {
        move(w.step, tokens);
        while (w.step > 0 ? tile > last : tile < lowest) {
            if (w.step < 0 && beyond <= last) {
                move(last - tile, tokens);
                lowest = beyond, last = -1;
                break;
            }
            segment += w.step;
            if (segment < w.segment || segment >= w.segment_end) return false;
            const int first = (int)p.plan.segments[segment].pos, len = (int)p.plan.segments[segment].len;
            const int last_pos = min(w.pos_last, first + len - 1), row0 = (int)p.plan.cu_rows[segment];
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

// A tile of rows: the first token's row in q, its position, the end of the segment's tokens, the tile's number of
// all.
struct StreamTile {
    int row, pos, end, place; // pos = -1: the work item has no more
};

template <int D> struct KeyRing {
    // Of dO, with lse and delta of its rows, and of Q, of which the next tile's comes before this one's is done.
    static constexpr int STAGES = D == 64 ? 4 : 2, Q_STAGES = D == 64 ? 4 : 3;
    static constexpr int TILES = 8; // that may be known ahead of the slowest who reads of them
    static constexpr int STAY_BYTES = KEYS * D * 2, ROW_BYTES = STREAM_ROWS * D * 2;
    static constexpr int DS_BYTES = KEYS * STREAM_ROWS * 2; // [key][row]
    static constexpr int STATS = 4 * STREAM_ROWS * 4;       // bytes of a stage's lse and delta for each warpgroup
    static constexpr int DQ_BYTES = STREAM_ROWS * D * 4;    // two in turn, each with a thread that adds it to dq
    static constexpr int DS = 2 * STAY_BYTES + (Q_STAGES + STAGES) * ROW_BYTES, DQ = DS + DS_BYTES;
    static constexpr int STAT = DQ + 2 * DQ_BYTES, WORK = STAT + STAGES * STATS,
                         TILE = WORK + 2 * (int)sizeof(KeyWork),
                         BARRIERS = TILE + TILES * (int)sizeof(StreamTile),
                         BYTES = BARRIERS + 8 * (6 + 2 * Q_STAGES + 2 * STAGES + 2 * TILES);
    uint32_t k, v, q, dout, ds, dq, stay_full, stay_empty, dq_full, dq_empty, q_full, q_empty, full, empty;
    uint32_t tile_full, tile_empty;
    __device__ __forceinline__ KeyRing(uint32_t start) {
        k = start, v = k + STAY_BYTES, q = v + STAY_BYTES, dout = q + Q_STAGES * ROW_BYTES;
        ds = start + DS, dq = start + DQ;
        stay_full = start + BARRIERS, stay_empty = stay_full + 8, dq_full = stay_empty + 8;
        dq_empty = dq_full + 16, q_full = dq_empty + 16, q_empty = q_full + 8 * Q_STAGES;
        full = q_empty + 8 * Q_STAGES, empty = full + 8 * STAGES;
        tile_full = empty + 8 * STAGES, tile_empty = tile_full + 8 * TILES;
    }
    __device__ __forceinline__ void init() const {
        mbarrier_init(stay_full, 1), mbarrier_init(stay_empty, RELEASES + 3);
        for (int i = 0; i < 2; i++)
            mbarrier_init(dq_full + 8 * i, RELEASES), mbarrier_init(dq_empty + 8 * i, 1);
        for (int i = 0; i < Q_STAGES; i++)
            mbarrier_init(q_full + 8 * i, 1), mbarrier_init(q_empty + 8 * i, RELEASES);
        for (int i = 0; i < STAGES; i++)
            mbarrier_init(full + 8 * i, 1 + 32), mbarrier_init(empty + 8 * i, RELEASES);
        for (int i = 0; i < TILES; i++)
            mbarrier_init(tile_full + 8 * i, 1), mbarrier_init(tile_empty + 8 * i, RELEASES + 3);
        mbarrier_init_fence();
    }
    // The tiles that all but the one who finds them read of, and give back. number: of all so far, with those that
    // only say that a work item has no more.
    __device__ __forceinline__ const StreamTile &tile(char *tiles, uint32_t number) const {
        mbarrier_wait(tile_full + 8 * (number % TILES), number / TILES & 1);
        return ((const StreamTile *)(tiles + TILE))[number % TILES];
    }
    __device__ __forceinline__ void give_back(uint32_t number) const {
        mbarrier_arrive(tile_empty + 8 * (number % TILES));
    }
    // Work items lie in shared memory, where all warps read them, two in turn: the warps that add to dq lag
    // behind the others, the one that brings lse and delta runs ahead.
    static __device__ __forceinline__ KeyWork *work(char *tiles, int parity) {
        return (KeyWork *)(tiles + WORK) + parity;
    }
    // The next one, or NULL.
    __device__ __forceinline__ const KeyWork *next_work(char *tiles, int *parity) const {
        mbarrier_wait(stay_full, *parity);
        const KeyWork *w = work(tiles, *parity);
        *parity ^= 1;
        return w->keys.rows > 0 ? w : NULL;
    }
    // A thread: takes the items and brings their keys and rows.
    __device__ void produce(const Dense &p, const Maps &maps, char *tiles, int64_t items) const {
        const int g = p.q_heads / p.kv_heads, tokens = STREAM_ROWS / g;
        Turn<STAGES> turn;
        Turn<Q_STAGES> q_turn;
        uint32_t number = 0;
        auto tell = [&](const StreamTile &t) {
            mbarrier_wait(tile_empty + 8 * (number % TILES), number / TILES & 1 ^ 1);
            ((StreamTile *)(tiles + TILE))[number % TILES] = t;
            mbarrier_arrive(tile_full + 8 * (number++ % TILES));
        };
        for (int parity = 0;; parity ^= 1) {
            KeyWork *w = work(tiles, parity), next;
            int item;
            do {
                item = atomicAdd(p.order, 1);
                next = key_work(p, item, items);
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
            TokenWalk walk(*w);
            for (; walk.next(p, *w, tokens); turn.next(), q_turn.next()) {
                const int bytes = tokens * g * D * 2;
                auto bring = [&](const CUtensorMap *map, uint32_t to, uint32_t is_full) {
                    mbarrier_arrive_expect(is_full, bytes);
                    for (int i = 0; i < D / 64; i++)
                        tma_load_3d(to + i * STREAM_ROWS * 128, map, i * 64, w->kv_head * g, walk.row,
                                    is_full);
                };
                tell(StreamTile{walk.row, walk.pos, walk.end, walk.place});
                mbarrier_wait(q_empty + 8 * q_turn.stage, q_turn.parity ^ 1);
                bring(&maps.q, q + q_turn.stage * ROW_BYTES, q_full + 8 * q_turn.stage);
                mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
                bring(&maps.dout, dout + turn.stage * ROW_BYTES, full + 8 * turn.stage);
            }
            tell(StreamTile{0, -1, 0, 0});
        }
    }
    // A warp: brings lse and delta of the rows, a tile ahead of those that wait. For a warpgroup whose keys are
    // among a row's last blocks they are such that P and dS become those of window and selected branch
    // together: with P = e^(S - lse), P' = e^(S - lse')
    //     P + P' = e^(S - both), both = -ln(e^-lse + e^-lse')
    //     P (dP - delta) + P' (dP - delta') = (P + P') (dP - (P delta + P' delta') / (P + P'))
    // where P / (P + P') is the same for all keys.
    __device__ void bring_stats(const Dense &p, char *tiles) const {
        const int g = p.q_heads / p.kv_heads, tokens = STREAM_ROWS / g, lane = threadIdx.x % 32;
        Turn<STAGES> turn;
        // Of the lane's two rows of a tile: the token, and the place of lse after the tile's first.
        int token[2], place[2], parity = 0;
        for (int i = 0; i < 2; i++) {
            token[i] = (lane + 32 * i) / g;
            place[i] = token[i] * p.q_heads + (lane + 32 * i) % g;
        }
        uint32_t number = 0;
        while (const KeyWork *w = next_work(tiles, &parity)) {
            // Up to here a warpgroup's keys are among the last blocks; no token is before 0.
            int local_end[2] = {};
            if (p.forced.local > 0)
                for (int i = 0; i < 2; i++)
                    local_end[i] =
                        ((w->keys.first + 64 * i) / p.forced.block + p.forced.local) * p.forced.block;
            for (;; turn.next()) {
                const StreamTile t = tile(tiles, number);
                __syncwarp();
                if (lane == 0) give_back(number);
                number++;
                if (t.pos < 0) break;
                const int64_t first = (int64_t)t.row * p.q_heads + w->kv_head * g;
                float lse[2], delta[2], other_lse[2], other_delta[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int pos = t.pos + token[i];
                    const bool there = token[i] < tokens && pos < t.end, both = there && pos < local_end[1];
                    lse[i] = there ? p.lse_grad[first + place[i]] : INFINITY; // no row: P = 0
                    delta[i] = there ? p.delta[first + place[i]] : 0;
                    other_lse[i] = both ? p.local_lse_grad[first + place[i]] : INFINITY;
                    other_delta[i] = both ? p.local_delta[first + place[i]] : 0;
                }
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
                        const bool local = t.pos + token[i] < local_end[half];
                        to[half * 2 * STREAM_ROWS + lane + 32 * i] = local ? both : own;
                        to[half * 2 * STREAM_ROWS + STREAM_ROWS + lane + 32 * i] =
                            local ? both_delta : delta[i];
                    }
                }
                mbarrier_arrive(full + 8 * turn.stage);
            }
            __syncwarp();
            if (lane == 0) mbarrier_arrive(stay_empty);
        }
    }
    // A thread of two: adds every second tile of dQ to dq when those of all smaller keys are in.
    __device__ void add_queries(const Dense &p, char *tiles, int mine) const {
        const int g = p.q_heads / p.kv_heads, tokens = STREAM_ROWS / g;
        const uint32_t my_dq = dq + mine * DQ_BYTES;
        int work_parity = 0;
        Turn<2> buffer;
        uint32_t number = 0;
        while (const KeyWork *w = next_work(tiles, &work_parity)) {
            const int kv_head = w->kv_head, key_tile = w->keys.first / KEYS;
            mbarrier_arrive(stay_empty);
            for (;; buffer.next()) {
                const StreamTile t = tile(tiles, number);
                give_back(number++);
                if (t.pos < 0) break;
                if (buffer.stage != mine) continue;
                int *turn = p.order + 1 + (int64_t)t.place * p.kv_heads + kv_head;
                const int before = key_tile - p.visible.first_key(t.pos) / KEYS;
                const int bytes = min(tokens, t.end - t.pos) * g * D * 4;
                float *to = p.dq + dq_sum_group(p.plan.nq, g, t.row, kv_head) * D;
                turn_wait(turn, before);
                mbarrier_wait(dq_full + 8 * mine, buffer.parity);
                if (before > 0 || p.accumulate_q)
                    bulk_add(to, my_dq, bytes);
                else
                    bulk_store(to, my_dq, bytes);
                bulk_commit();
                bulk_wait_read();
                mbarrier_arrive(dq_empty + 8 * mine);
                bulk_wait();
                turn_pass(turn);
            }
        }
    }
};

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    backward_sm90_kernel(const Dense p, const __grid_constant__ Maps maps, int64_t items) {
    extern __shared__ __align__(1024) char shared[];
    typedef KeyRing<D> Ring;
    const uint32_t start = smem_address(shared); // aligned as declared: there is no room to round it up
    char *const tiles = shared;
    const Ring ring(start);
    if (threadIdx.x == 0) ring.init();
    // The copies never write the last rows of a tile where g doesn't divide 64; they are zeros for good.
    for (int i = threadIdx.x; i < (Ring::Q_STAGES + Ring::STAGES) * Ring::ROW_BYTES / 16; i += THREADS)
        ((uint4 *)(tiles + 2 * Ring::STAY_BYTES))[i] = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); // in a uniform register
    if (warpgroup == 2) {
        registers_down_to<BACKWARD_PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32 - CONSUMERS / 32;
        if (warp == 0)
            ring.bring_stats(p, tiles);
        else if (threadIdx.x % 32 == 0)
            warp == 1 ? ring.produce(p, maps, tiles, items) : ring.add_queries(p, tiles, warp - 2);
    } else {
        registers_up_to<BACKWARD_CONSUMER_REGISTERS>();
        const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        const int g = p.q_heads / p.kv_heads, tokens = STREAM_ROWS / g;
        const float scale = p.scale * FSA_LOG2E, shift = probability_shift<T>();
        const float unit = probability_unit<T>(), unit_k = unit * p.scale;
        const uint32_t my_k = ring.k + warpgroup * 64 * 128, my_v = ring.v + warpgroup * 64 * 128;
        // The warpgroup's columns of K, D/2 of them, in all rows.
        const uint32_t my_columns = ring.k + warpgroup * (D == 64 ? 64 : KEYS * 128);
        const int my_key = warpgroup * 64 + warp * 16 + lane / 4; // the first of the thread's two
        uint32_t n = 0; // tiles so far: the stage of dO's ring, and the buffer of dQ
        uint32_t number = 0; // the same with those of no tile
        Turn<Ring::Q_STAGES> q_turn;
        int work_parity = 0;
        // Barrier 4 + warpgroup opens when the other one has read the dS before.
        named_barrier_arrive(4 + (warpgroup ^ 1), CONSUMERS);
        while (const KeyWork *work = ring.next_work(tiles, &work_parity)) {
            const KeyWork &w = *work;
            if (w.keys.rows < KEYS) {
                clear_rows<D, KEYS>(tiles, w.keys.rows);
                clear_rows<D, KEYS>(tiles + Ring::STAY_BYTES, w.keys.rows);
            }
            float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[STREAM_ROWS / 8][4];
            const int j0 = w.keys.first + warpgroup * 64;
            const StreamTile *const tile_at = (const StreamTile *)(tiles + Ring::TILE);
            int pos; // of the first token whose scores are computed, of tile `number`; -1: no more tiles
            auto clear_end = [&](uint32_t rows) { // of the last tile of a segment
                const int left = (tile_at[number % Ring::TILES].end - pos) * g;
                if (left < tokens * g) clear_rows<D, STREAM_ROWS>(tiles + (rows - start), left);
            };
            auto start_scores = [&] {
                const uint32_t tile_q = ring.q + q_turn.stage * Ring::ROW_BYTES;
                pos = ring.tile(tiles, number).pos;
                if (pos >= 0) { // past the end the stage's next round may be any
                    mbarrier_wait(ring.q_full + 8 * q_turn.stage, q_turn.parity);
                    clear_end(tile_q);
                }
                wgmma_fence();
                product_rows<T, D, KEYS, STREAM_ROWS>(s, my_k, tile_q);
                wgmma_commit();
            };
            auto find_probabilities = [&](uint32_t n) {
                const int stage = n % Ring::STAGES;
                mbarrier_wait(ring.full + 8 * stage, n / Ring::STAGES & 1);
                clear_end(ring.dout + stage * Ring::ROW_BYTES);
                const float *lse =
                    (const float *)(tiles + Ring::STAT + stage * Ring::STATS) + warpgroup * 2 * STREAM_ROWS;
                if (!p.visible(pos, j0 + 63) ||
                    j0 < p.visible.first_key(min(pos + tokens, tile_at[number % Ring::TILES].end) - 1)) {
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
#pragma unroll
                for (int n = 0; n < STREAM_ROWS / 8; n++) {
                    float2 l = *(const float2 *)(lse + n * 8 + lane % 4 * 2);
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        s[n][e] = exp2_fast(s[n][e] * scale - ((e % 2 ? l.y : l.x) - shift));
                }
            };
            start_scores();
            wgmma_wait<0>();
            wgmma_pin(s);
            if (pos >= 0) find_probabilities(n);
            for (; pos >= 0; n++) {
                const int stage = n % Ring::STAGES, q_stage = q_turn.stage;
                const uint32_t tile_q = ring.q + q_stage * Ring::ROW_BYTES;
                const uint32_t tile_dout = ring.dout + stage * Ring::ROW_BYTES;
                const float *delta = (const float *)(tiles + Ring::STAT + stage * Ring::STATS) +
                                     warpgroup * 2 * STREAM_ROWS + STREAM_ROWS;
                float dp[STREAM_ROWS / 8][4];
                wgmma_fence();
                product_rows<T, D, KEYS, STREAM_ROWS>(dp, my_v, tile_dout);
                wgmma_commit();
                uint32_t a[STREAM_ROWS / 16][4]; // P^T
#pragma unroll
                for (int k = 0; k < STREAM_ROWS / 16; k++) result_as_a<T>(a[k], s[2 * k], s[2 * k + 1]);
                wgmma_fence();
                product_columns<T, STREAM_ROWS>(dv, a, tile_dout, true);
                wgmma_commit();
                wgmma_wait<1>();
                wgmma_pin(dp);
                uint32_t b[STREAM_ROWS / 16][4]; // dS^T
#pragma unroll
                for (int n = 0; n < STREAM_ROWS / 8; n++) {
                    float2 l = *(const float2 *)(delta + n * 8 + lane % 4 * 2);
#pragma unroll
                    for (int e = 0; e < 4; e++) s[n][e] *= dp[n][e] - (e % 2 ? l.y : l.x);
                }
#pragma unroll
                for (int k = 0; k < STREAM_ROWS / 16; k++) result_as_a<T>(b[k], s[2 * k], s[2 * k + 1]);
                q_turn.next(), number++;
                start_scores();
                named_barrier_sync(4 + warpgroup, CONSUMERS);
                int key = my_key;
                asm volatile("" : "+r"(key));
#pragma unroll
                for (int k = 0; k < STREAM_ROWS / 16; k++) {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        *(uint32_t *)(tiles + Ring::DS + lane % 4 * 4 +
                                      panel_offset(key + i % 2 * 8, k * 2 + i / 2, 0)) = b[k][i];
                }
                fence_proxy_async();
                named_barrier_sync(1, CONSUMERS);
                float dq[D / 16][4];
                const uint64_t from_ds = wgmma_matrix(ring.ds), from_k = wgmma_matrix(my_columns);
                const uint64_t my_ds = wgmma_matrix(ring.ds + warpgroup * 64 * 128),
                               from_q = wgmma_matrix(tile_q, STREAM_ROWS * 128);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STREAM_ROWS / 16; k++)
                    wgmma_ss<T, 1>(dk, wgmma_further(my_ds, k * 32), wgmma_further(from_q, k * 2048), 1);
                wgmma_commit();
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++)
                    wgmma_ss<T, 1, 1>(dq, wgmma_further(from_ds, k * 2048), wgmma_further(from_k, k * 2048),
                                      k > 0);
                wgmma_commit();
                wgmma_wait<2>();
                wgmma_pin(dv), wgmma_pin(s);
                mbarrier_arrive_warp(ring.empty + 8 * stage);
                if (pos >= 0) find_probabilities(n + 1); // while dK's and dQ's products run
                wgmma_wait<0>();
                wgmma_pin(dk), wgmma_pin(dq);
                const int sums =
                    (int)dq_sum_group(p.plan.nq, g, tile_at[(number - 1) % Ring::TILES].row, w.kv_head) % 8;
                mbarrier_arrive_warp(ring.q_empty + 8 * q_stage);
                mbarrier_arrive_warp(ring.tile_empty + 8 * ((number - 1) % Ring::TILES));
                named_barrier_arrive(4 + (warpgroup ^ 1), CONSUMERS);
                mbarrier_wait(ring.dq_empty + 8 * (n % 2), n / 2 & 1 ^ 1);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = warp * 16 + half * 8 + lane / 4;
                    char *to = tiles + Ring::DQ + n % 2 * Ring::DQ_BYTES + row * D * 4 + lane % 4 * 8;
#pragma unroll
                    for (int n = 0; n < D / 16; n++)
                        *(float2 *)(to + dq_sum_piece(sums + row, warpgroup * D / 16 + n) * 32) =
                            make_float2(dq[n][half * 2] * unit_k, dq[n][half * 2 + 1] * unit_k);
                }
                fence_proxy_async();
                mbarrier_arrive_warp(ring.dq_full + 8 * (n % 2));
            }
            mbarrier_arrive_warp(ring.tile_empty + 8 * (number++ % Ring::TILES)); // that of no tile
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
        named_barrier_sync(4 + warpgroup, CONSUMERS); // the turns that nobody took
    }
}

// ---------------------------------------------------------------------------------------------------------
// Launches

static int processors() {
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// q and dO in boxes of `tokens` tokens of a group's heads, k and v in boxes of KEYS keys of a head.
static int make_maps(const Dense &d, FsaDtype dtype, int head_dim, int tokens, Maps *m) {
    int g = d.q_heads / d.kv_heads;
    int64_t q_size[] = {head_dim, d.q_heads, d.plan.nq},
            q_stride[] = {2, head_dim * 2, (int64_t)d.q_heads * head_dim * 2};
    int64_t k_size[] = {head_dim, d.kv_heads, d.num_keys},
            k_stride[] = {2, head_dim * 2, (int64_t)d.kv_heads * head_dim * 2};
    int q_box[] = {64, g, tokens}, k_box[] = {64, 1, KEYS};
    int status = fsa_tensor_map(&m->q, dtype, 3, d.q, q_size, q_stride, q_box);
    if (!status && d.dout) status = fsa_tensor_map(&m->dout, dtype, 3, d.dout, q_size, q_stride, q_box);
    if (!status) status = fsa_tensor_map(&m->k, dtype, 3, d.k, k_size, k_stride, k_box);
    if (!status) status = fsa_tensor_map(&m->v, dtype, 3, d.v, k_size, k_stride, k_box);
    return status;
}

template <typename Kernel>
static int launch(Kernel kernel, const Dense &d, const Maps &maps, int64_t items, int bytes,
                  cudaStream_t stream) {
    if (items == 0) return FSA_OK;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
        return FSA_ERROR_CUDA;
    int64_t blocks = processors();
    if (blocks > items) blocks = items;
    kernel<<<(unsigned)blocks, THREADS, bytes, stream>>>(d, maps, items);
    return launch_status();
}

static int query_items(const Dense &d) {
    return (int)row_tile_bound(d.plan.nq, d.plan.num_segments, ROWS / (d.q_heads / d.kv_heads)) * d.kv_heads;
}

template <typename T, int D, bool FORCED>
static int launch_forward(const Dense &d, const Maps &maps, cudaStream_t stream) {
    int bytes = 1024 + QueryRing<D>::BYTES + QueryRing<D>::BARRIERS + ROWS * D * 2;
    return launch(forward_sm90_kernel<T, D, FORCED>, d, maps, query_items(d), bytes, stream);
}
template <typename T, int D> static int forward_sm90(const Dense &d, FsaDtype dtype, cudaStream_t stream) {
    Maps maps = {};
    int status = make_maps(d, dtype, D, ROWS / (d.q_heads / d.kv_heads), &maps);
    if (status) return status;
    return d.forced.init + d.forced.local > 0 ? launch_forward<T, D, true>(d, maps, stream)
                                              : launch_forward<T, D, false>(d, maps, stream);
}

template <typename T, int D> static int backward_sm90(Dense d, FsaDtype dtype, cudaStream_t stream) {
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
    int64_t items = row_tile_bound(d.num_keys, d.plan.num_seqs, KEYS) * d.kv_heads * d.splits;
    if (items > INT32_MAX / 2) return FSA_ERROR_ARGUMENT; // tickets are of 32 bits
    size_t bytes = fsa_dense_order_bytes(d.plan, d.q_heads, d.kv_heads);
    if (cudaMemsetAsync(d.order, 0, bytes, stream) != cudaSuccess) return FSA_ERROR_CUDA;
    return launch(backward_sm90_kernel<T, D>, d, maps, items, KeyRing<D>::BYTES, stream);
}

int fsa_dense_splits_sm90(int64_t num_keys, int kv_heads) {
    int64_t items = (num_keys + KEYS - 1) / KEYS * kv_heads;
    if (items >= UNDIVIDED_ITEMS || items == 0) return 1;
    if (items >= HALVED_ITEMS) return 2;
    return (int)(SHARED_ITEMS / items < MOST_SHARES ? SHARED_ITEMS / items : MOST_SHARES);
}

int64_t fsa_dense_split_rows_sm90(int64_t num_keys, int kv_heads) {
    int64_t rows = num_keys + (UNDIVIDED_ITEMS / kv_heads + 1) * KEYS;
    return rows < num_keys * MOST_SHARES ? rows : num_keys * MOST_SHARES;
}

size_t fsa_dense_order_bytes(const FsaPlan &p, int q_heads, int kv_heads) {
    int64_t tiles = row_tile_bound(p.nq, p.num_segments, STREAM_ROWS / (q_heads / kv_heads));
    return (size_t)(1 + tiles * kv_heads) * sizeof(int);
}

int fsa_dense_forward_sm90(const FsaConfig *c, const Dense &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, forward_sm90, d, dtype, stream);
}

int fsa_dense_backward_sm90(const FsaConfig *c, const Dense &d, FsaDtype dtype, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, c->head_dim, backward_sm90, d, dtype, stream);
}
