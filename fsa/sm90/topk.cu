// topk_sm90.cu: the choice of blocks on Hopper (topk.cu says what is computed). One thread block on each
// multiprocessor takes tile after tile of queries of one KV head, the longest first. Its warpgroups:
//   0, 1: scorers. S^T = kc Q^T by wgmma, 64 windows by 128 columns, each for its own 8*floor(16/g)
//         queries; exp, and the sum over the g heads, in registers; P goes to shared memory.
//   2, 3: selectors, 2 for scorer 0's queries, 3 for scorer 1's: block scores out of P, and the running
//         lists of the best blocks. A query has 1, 2, 4 or 8 selectors, each for its part of the windows.
//   4:    a warp that loads Q and kc by TMA, into rings of tiles that both scorers read; one that brings the
//         lse of Q's rows; a thread that finds the tiles of queries.
// So the tensor cores, exp and the lists can be busy at once: one scorer's exps beside the other's products,
// and the lists beside both.
//
// A scorer's columns are 8 queries of head 0, the same 8 of head 1, ..., then the next 8 queries: a thread
// holds all heads of its queries, whatever g is, and 8*g*floor(16/g) of the 128 columns are used: all for
// g = 1, 2, 4, 8, 16, and 72 at worst, for g = 9.
//
// Selectors: a scorer has 128/g queries or fewer and 128 selectors. So of every 32 windows, a tile of P, a
// selector has 32, 16, 8 or 4 in a row, as few as make whole blocks and find a selector. It walks through
// them in order. A block's score is compared with the lowest of the selector's list; what beats it goes to a
// short buffer, and when some lane's may be full, all 32 lanes sort theirs and merge them into their sorted
// lists, in registers, together, by networks: an exchange is 5 instructions. A query's selectors are lanes of
// one warp. What is below so many of each one's list is not among the best either, so that four lists of a
// query take in little more than one would. In the end they are merged, lane with lane.
//
// What binds at 64K tokens, (32, 8) heads, d = 128: 1.1 TFLOP, 1.4 ms at 790 TFLOP/s, and 4.3e9 exps, 1.2 ms,
// which may overlap. kc passes through L2 once for every 256/g queries: 64K*8/64 times 512 KiB on
// average, 4.3 GB, 0.8 ms at 5.5 TB/s; q comes once from HBM, 0.5 GB. Shared memory, in clocks of a scorer's
// tile: wgmma 384 of the 512 that its products take, kc in 64, P out and in 512/g: at g = 1 960
// clocks, 2.2 ms at 64K (32, 32), where there is room for three halves of tiles of P a scorer: selectors
// read one while scorers write others. Selectors issue, a tile of 64 windows and warp, 172 instructions for
// scores at g = 4 and 378 at g = 1, and for each merge 380 or 355, for random scores one in 5 tiles at g = 4
// and one in 2 at g = 1. On an H100 2.4 ms, 2,090 clocks a tile of both scorers, of which products are 1,024
// and exps as many: they hardly overlap. No unit is busy for more than 57% of the time (shared memory; tensor
// cores 47, exp 47, issue 52); scorers wait for products a fifth of their time and for room for P a tenth,
// selectors for P a seventh of theirs, and merges are a third of it. At (32, 32) 3.7 ms: selectors bind,
// scorers wait for room for 40% of the time.
//
// A tile of kc may go on past its sequence's windows, into another's or into what the caller's array has
// beyond them: no candidate of the queries has such a window, unless fewer than two local blocks are forced,
// and then selectors take its P for zero.
#include "../kernels.h"
#include "../launch.cuh"
#include "../mma.cuh"
#include "ptx.cuh"
#include "tma.cuh"
#include <algorithm>

namespace {

constexpr int WINDOWS = 64, COLUMNS = 128; // of a scorer's tile
constexpr int SCORERS = 2, THREADS = 128 * (2 * SCORERS + 1);
constexpr int P_WINDOWS = WINDOWS / 2; // of a tile of P: two scorer warps'; the other two write the next one
constexpr int MAX_SMEM = 227 * 1024;
// To be tuned.
constexpr int STAGES = 3;     // tiles of kc
constexpr int PLACES = 16;    // of a selector's list
constexpr int PENDING = 8;    // places of its buffer
constexpr int SHARE = 8;      // windows that it loads at once, or all of its part where they are fewer
constexpr int MOST_SLOTS = 8; // tiles of P of a scorer
constexpr int WORKS = 4;      // tiles of queries that the finder may be ahead
// Selectors keep what they start with.
constexpr int SCORER_REGISTERS = 128, SELECTOR_REGISTERS = 96, LOADER_REGISTERS = 32;
static_assert(PENDING >= SHARE, "room for the blocks of a share");
static_assert(65536 / THREADS / 8 * 8 == SELECTOR_REGISTERS &&
                  SCORERS * (SCORER_REGISTERS - SELECTOR_REGISTERS) <= SELECTOR_REGISTERS - LOADER_REGISTERS,
              "registers");

// Where things lie in shared memory, from a multiple of 1,024 on, and the sizes of tiles.
struct Layout {
    int q_bytes, k_bytes, p_bytes;
    int k, p, pending, offsets, works, barriers, end; // tiles of Q come first
};
struct TopKParamsSm90 {
    BatchLayout batch;
    const void *q, *kc;
    const float *lse;
    int32_t *block_indices;
    float scale; // times log2(e)
    int q_heads, kv_heads, group, cmp_len, cmp_stride, block, topk, init, local;
    // Bit k: the k-th eight of a scorer's columns is of its queries' first head, or their last one.
    uint32_t first_heads, last_heads;
    int wanted, part_wanted;       // blocks that are chosen freely; so many of each part are as many
    int window_cells, block_cells; // in stride cells
    int queries;                   // of a scorer
    int parts;                     // of a query's windows, a selector each
    int q_tiles, slots;            // how many tiles of Q a scorer has room for, and of P
    int selector_warps;            // of a scorer
    int most_pending;              // blocks, so that those that end within a share still have room
    Layout at;
};

// A tile of queries that a thread block takes. The finder tells the others.
struct Work {
    int64_t row, window0;         // first row of q, first window of its sequence
    int rows, first_pos, kv_head; // rows = 0: there is no more work
    int steps;                    // tiles of windows that the last query's candidates need
};

// Buffers that one role fills and another empties: for each a barrier that it is full, then for each one that
// it is empty.
struct Ring {
    uint32_t barriers;
    int count, at, parity;
    __device__ __forceinline__ Ring(uint32_t barriers, int count)
        : barriers(barriers), count(count), at(0), parity(0) {}
    __device__ __forceinline__ uint32_t full() const { return barriers + 8 * at; }
    __device__ __forceinline__ uint32_t empty() const { return barriers + 8 * (count + at); }
    __device__ __forceinline__ void wait_full() const { mbarrier_wait(full(), parity); }
    __device__ __forceinline__ void wait_empty() const { mbarrier_wait(empty(), parity ^ 1); }
    __device__ __forceinline__ void wait_empty_asleep() const { mbarrier_wait_sleeping(empty(), parity ^ 1); }
    __device__ __forceinline__ void next() {
        if (++at == count) at = 0, parity ^= 1;
    }
};

// Queries of a box of Q.
__host__ __device__ __forceinline__ int box_queries(int group) {
    return group == 1 ? COLUMNS : 8;
}

// The next tile of queries of this thread block, from its turn `*turn` on. Turns go up and down the thread
// blocks, so that each has long ones and short ones.
__device__ __forceinline__ Work find_work(const TopKParamsSm90 &p, int64_t *turn) {
    Work w = {};
    int size = SCORERS * p.queries;
    int64_t tiles = p.batch.nq / size + p.batch.num_segments, blocks = gridDim.x;
    for (; w.rows == 0 && *turn * blocks < tiles * p.kv_heads; ++*turn) {
        int64_t number = *turn * blocks + (*turn & 1 ? blocks - 1 - blockIdx.x : blockIdx.x);
        if (number >= tiles * p.kv_heads) continue;
        RowTile rows =
            find_row_tile(p.batch.cu_queries, p.batch.num_segments, size, tiles - 1 - number / p.kv_heads);
        if (rows.rows == 0) continue;
        FsaSegment segment = p.batch.segments[rows.range];
        w.kv_head = (int)(number % p.kv_heads);
        w.row = rows.row, w.rows = rows.rows;
        w.first_pos = (int)segment.pos + rows.first;
        w.window0 = p.batch.cu_windows[segment.seq];
        int blocks_seen = (w.first_pos + rows.rows - 1) / p.block + 1;
        if (blocks_seen > p.topk && p.wanted > 0)
            w.steps = ((blocks_seen - p.local) * p.block_cells + WINDOWS - 1) / WINDOWS;
    }
    return w;
}
__device__ __forceinline__ void find(const TopKParamsSm90 &p, char *shared, Ring works) {
    for (int64_t turn = 0;;) {
        const Work w = find_work(p, &turn);
        works.wait_empty_asleep();
        ((Work *)(shared + p.at.works))[works.at] = w;
        mbarrier_arrive(works.full());
        works.next();
        if (w.rows == 0) break;
    }
}
// Waits for the next tile of queries. It may be read until work_done, which a whole warp calls.
__device__ __forceinline__ const Work &next_work(const TopKParamsSm90 &p, const char *shared, const Ring &works) {
    works.wait_full();
    return ((const Work *)(shared + p.at.works))[works.at];
}
__device__ __forceinline__ void work_done(Ring *works) {
    mbarrier_arrive_warp(works->empty());
    works->next();
}

// Brings Q and kc as K-major operands of wgmma. A box of Q is 8 queries, or all of a scorer's where a query
// has one head, of all heads of a group.
template <typename T, int D>
__device__ __forceinline__ void load(const TopKParamsSm90 &p, const CUtensorMap &q_map, const CUtensorMap &k_map,
                                     uint32_t start, const char *shared, Ring works, Ring q_ring,
                                     Ring k_ring) {
    const int lane = threadIdx.x % 32;
    for (;; work_done(&works)) {
        const Work w = next_work(p, shared, works);
        if (w.rows == 0) break;
        if (w.steps == 0) continue;

        q_ring.wait_empty_asleep();
        if (lane == 0) {
            const int box = box_queries(p.group), rows = (w.rows + box - 1) / box * box;
            mbarrier_arrive_expect(q_ring.full(), min(rows, SCORERS * p.queries) * p.group * D * 2);
            for (int query = 0; query < min(rows, SCORERS * p.queries); query += box) {
                const int scorer = query >= p.queries;
                const uint32_t tile = start + (q_ring.at * SCORERS + scorer) * p.at.q_bytes +
                                      (query - scorer * p.queries) * p.group * 128;
                for (int i = 0; i < D / 64; i++)
                    tma_load_3d(tile + i * COLUMNS * 128, &q_map, i * 64, (int)w.row + query,
                                w.kv_head * p.group, q_ring.full());
            }
        }
        q_ring.next();

        for (int step = 0; step < w.steps; step++, k_ring.next()) {
            k_ring.wait_empty_asleep();
            if (lane > 0) continue;
            mbarrier_arrive_expect(k_ring.full(), WINDOWS * D * 2);
            for (int i = 0; i < D / 64; i++)
                tma_load_3d(start + p.at.k + k_ring.at * p.at.k_bytes + i * WINDOWS * 128, &k_map, i * 64,
                            w.kv_head, (int)w.window0 + step * WINDOWS, k_ring.full());
        }
    }
}

// Brings -lse * log2(e) of the columns of Q, -inf for those of no row and of rows that see nothing.
__device__ __forceinline__ void bring_offsets(const TopKParamsSm90 &p, char *shared, Ring works, Ring q_ring) {
    const int lane = threadIdx.x % 32, used = p.queries / 8 * p.group; // eights of columns
    for (;; work_done(&works)) {
        const Work w = next_work(p, shared, works);
        if (w.rows == 0) break;
        if (w.steps == 0) continue;
        float x[SCORERS * COLUMNS / 32];
#pragma unroll
        for (int i = 0; i < SCORERS * COLUMNS / 32; i++) {
            const int column = (i * 32 + lane) % COLUMNS, eight = column / 8, of_queries = eight / p.group;
            const int query = i * 32 / COLUMNS * p.queries + of_queries * 8 + column % 8;
            x[i] = -INFINITY;
            if (eight < used && query < w.rows)
                x[i] =
                    p.lse[(w.row + query) * p.q_heads + w.kv_head * p.group + eight - of_queries * p.group];
        }
        q_ring.wait_empty_asleep();
        float *to = (float *)(shared + p.at.offsets) + q_ring.at * SCORERS * COLUMNS + lane;
#pragma unroll
        for (int i = 0; i < SCORERS * COLUMNS / 32; i++)
            to[i * 32] = x[i] == -INFINITY ? -INFINITY : -x[i] * FSA_LOG2E;
        mbarrier_arrive_warp(q_ring.full());
        q_ring.next();
    }
}

// A tile of P: [queries][32 windows], the eight pieces of 4 windows of a row exchanged by query % 8, so that
// neither its writers nor its readers meet in a bank. Of the next query, where this one is even, the place is
// ^ 4 + 32, and of the windows 8 on, where these are the first 8 of 16, ^ 8.
__device__ __forceinline__ int p_place(int query, int window) {
    return query * P_WINDOWS + (window ^ query % 8 * 4);
}

// GROUP: p.group, or 0 for one that is no power of two.
template <typename T, int D, int GROUP>
__device__ __forceinline__ void score(const TopKParamsSm90 &p, char *shared, uint32_t start, int scorer,
                                      Ring works, Ring q_ring, Ring k_ring, Ring p_ring) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int group = GROUP ? GROUP : p.group, queries = GROUP ? COLUMNS / group : p.queries;
    const int used = queries / 8 * group; // eights of columns
    const int mine = p_place(lane % 4 * 2, warp % 2 * 16 + lane / 4);
    if (warp >= 2) p_ring.next(); // a tile's second half is another's
    for (;; work_done(&works)) {
        const Work &w = next_work(p, shared, works);
        const int steps = w.steps;
        if (w.rows == 0) break;
        if (steps == 0) continue;
        q_ring.wait_full();
        float2 offset[COLUMNS / 8]; // of the thread's columns
        const float2 *offsets = (const float2 *)(shared + p.at.offsets) +
                                ((q_ring.at * SCORERS + scorer) * COLUMNS + lane % 4 * 2) / 2;
#pragma unroll
        for (int k = 0; k < COLUMNS / 8; k++) offset[k] = offsets[k * 4];
        for (int step = 0; step < steps; step++) {
            k_ring.wait_full();
            // In uniform registers, where wgmma wants them: ptxas doesn't see that all lanes have the same.
            const uint64_t from_k =
                make_smem_desc(__shfl_sync(0xffffffffu, start + p.at.k + k_ring.at * p.at.k_bytes, 0));
            const uint64_t from_q = make_smem_desc(
                __shfl_sync(0xffffffffu, start + (q_ring.at * SCORERS + scorer) * p.at.q_bytes, 0));
            float s[COLUMNS / 8][4];
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < D / 16; k++)
                wgmma_ss<T>(s, advance_desc(from_k, k / 4 * WINDOWS * 128 + k % 4 * 32),
                            advance_desc(from_q, k / 4 * COLUMNS * 128 + k % 4 * 32), k > 0);
            wgmma_commit();
            p_ring.wait_empty();
            float *to = (float *)(shared + p.at.p + (scorer * p.slots + p_ring.at) * p.at.p_bytes);
            wgmma_wait<0>();
            fence_operand(s);
            mbarrier_arrive_warp(k_ring.empty());
            if (step == steps - 1) mbarrier_arrive_warp(q_ring.empty());
            k_ring.next();
            float sum[4];
#pragma unroll
            for (int k = 0; k < COLUMNS / 8; k++) {
                if (GROUP == 0 && k % 4 == 0 && k >= used) break;
                // Masks, not counts: no chain of conditions.
                const bool first_head = GROUP ? k % group == 0 : p.first_heads >> k & 1;
                const bool last_head = GROUP ? (k + 1) % group == 0 : p.last_heads >> k & 1;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float x = exp2_fast(fmaf(s[k][i], p.scale, i % 2 ? offset[k].y : offset[k].x));
                    sum[i] = first_head ? x : sum[i] + x;
                }
                if (last_head) {
                    to[mine] = sum[0], to[(mine ^ 4) + P_WINDOWS] = sum[1];
                    to[mine ^ 8] = sum[2], to[(mine ^ 12) + P_WINDOWS] = sum[3];
                    to += 8 * P_WINDOWS;
                }
            }
            mbarrier_arrive_warp(p_ring.full());
            p_ring.next(), p_ring.next();
        }
        q_ring.next();
    }
}
template <typename T, int D>
__device__ __forceinline__ void score(const TopKParamsSm90 &p, char *shared, uint32_t start, int scorer,
                                      Ring works, Ring q_ring, Ring k_ring, Ring p_ring) {
    switch (p.group) {
    case 1:
        return score<T, D, 1>(p, shared, start, scorer, works, q_ring, k_ring, p_ring);
    case 2:
        return score<T, D, 2>(p, shared, start, scorer, works, q_ring, k_ring, p_ring);
    case 4:
        return score<T, D, 4>(p, shared, start, scorer, works, q_ring, k_ring, p_ring);
    case 8:
        return score<T, D, 8>(p, shared, start, scorer, works, q_ring, k_ring, p_ring);
    case 16:
        return score<T, D, 16>(p, shared, start, scorer, works, q_ring, k_ring, p_ring);
    default:
        return score<T, D, 0>(p, shared, start, scorer, works, q_ring, k_ring, p_ring);
    }
}

// A block and its score as one number, which takes one instruction to compare: a double, its upper half the
// score's bits, which order as scores do, none being negative, the lower one INT32_MAX - block. So the higher
// score is the greater entry, and of equals the smaller block.
using Entry = double;
constexpr Entry NO_ENTRY = -1; // less than every other

__device__ __forceinline__ void sort_two(Entry &first, Entry &second) { // the greater one comes first
    bool swap = second > first;
    Entry greater = swap ? second : first;
    second = swap ? first : second, first = greater;
}
// Batcher's network for N numbers from FIRST on: calls what compares, and exchanges, those at two places.
template <int FIRST, int N, int STEP, typename F> __device__ __forceinline__ void merge_all(F sort_places) {
    if constexpr (2 * STEP < N) {
        merge_all<FIRST, N, 2 * STEP>(sort_places);
        merge_all<FIRST + STEP, N, 2 * STEP>(sort_places);
#pragma unroll
        for (int i = FIRST + STEP; i + STEP < FIRST + N; i += 2 * STEP) sort_places(i, i + STEP);
    } else {
        sort_places(FIRST, FIRST + STEP);
    }
}
template <int FIRST, int N, typename F> __device__ __forceinline__ void sort_all(F sort_places) {
    if constexpr (N > 1) {
        sort_all<FIRST, N / 2>(sort_places);
        sort_all<FIRST + N / 2, N / 2>(sort_places);
        merge_all<FIRST, N, 1>(sort_places);
    }
}

// The best that a selector has seen, the best one first.
struct List {
    Entry entry[PLACES];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < PLACES; i++) entry[i] = NO_ENTRY;
    }
    // Entries that first rise and then fall, or the other way.
    __device__ __forceinline__ void sort() {
#pragma unroll
        for (int step = PLACES / 2; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < PLACES; i++)
                if (!(i & step)) sort_two(entry[i], entry[i + step]);
        }
    }
    __device__ __forceinline__ void put(Entry (&more)[PENDING]) {
        sort_all<0, PENDING>([&](int i, int j) { sort_two(more[i], more[j]); });
#pragma unroll
        for (int i = 0; i < PENDING; i++)
            if (more[i] > entry[PLACES - 1 - i]) entry[PLACES - 1 - i] = more[i];
        sort();
    }
    // Puts the list of lane ^ `other` in, which does the same.
    __device__ __forceinline__ void put_lane(int other) {
#pragma unroll
        for (int i = 0; i < PLACES / 2; i++) {
            Entry &a = entry[i], &b = entry[PLACES - 1 - i];
            Entry other_a = __shfl_xor_sync(0xffffffffu, a, other);
            Entry other_b = __shfl_xor_sync(0xffffffffu, b, other);
            if (other_b > a) a = other_b;
            if (other_a > b) b = other_a;
        }
        sort();
    }
    // The bits of the score at a place; less than all scores' if it is empty.
    __device__ __forceinline__ int score_at(int place) const {
        int x[PLACES];
#pragma unroll
        for (int i = 0; i < PLACES; i++) x[i] = __double2hiint(entry[i]);
#pragma unroll
        for (int step = PLACES / 2; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < PLACES / 2; i++)
                if (i < step) x[i] = place & step ? x[i + step] : x[i];
        }
        return x[0];
    }
};

// Cells of a block: four; a multiple of four; any number. In the first two a window is at most two cells, so
// that only a block's last window reaches out of it.
enum Cells { FOUR, FOURS, ANY };
__host__ __device__ __forceinline__ Cells cells_of(const TopKParamsSm90 &p) {
    return p.block_cells % 4 || p.window_cells > 2 ? ANY : p.block_cells == 4 ? FOUR : FOURS;
}

// SHARE windows at a time.
template <Cells cells, int SHARE>
__device__ __forceinline__ void select(const TopKParamsSm90 &p, char *shared, int scorer, Ring works,
                                       Ring p_ring) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    // A warp has all parts of some queries. Eight lanes that load at once have eight queries' rows, or, of
    // eight parts, four queries' and parts 4 apart: no bank conflicts.
    const int warp_queries = 32 / p.parts, group = lane / warp_queries;
    const int mine = warp * warp_queries + lane % warp_queries;
    const int part = group / 2 + group % 2 * (p.parts / 2);
    const int place = min(mine, p.queries - 1); // lanes too many read what another lane does
    const int part_windows = P_WINDOWS / p.parts, part_first = part * part_windows;
    const int part_place = p_place(place, part_first);           // of the part's window i: ^ i
    const int before = (part_first + P_WINDOWS - 1) % P_WINDOWS; // the window before the part's, cyclically
    const int skipped_blocks = p.parts > 1 ? (P_WINDOWS - part_windows) / p.block_cells : 0;
    const float whole = p.window_cells, out = p.window_cells - 1;
    // The buffer: a selector's places lie ROW bytes apart, a row for all 128 of them.
    constexpr int ROW = 128 * sizeof(Entry);
    char *const pending =
        shared + p.at.pending + scorer * PENDING * ROW + threadIdx.x % 128 * (int)sizeof(Entry);
    for (;; work_done(&works)) {
        const Work &w = next_work(p, shared, works);
        const int steps = w.steps;
        if (w.rows == 0) break;
        const int query = scorer * p.queries + mine;
        const bool there = mine < p.queries && query < w.rows;
        const int pos = w.first_pos + query, blocks = there ? pos / p.block + 1 : 0;
        const bool all = blocks <= p.topk;
        // Blocks are counted from the first that is not forced; a query's candidates are 0 .. candidates - 1,
        // whose `block`, as entries have them, are above `last`.
        const int last = all ? INT32_MAX : INT32_MAX - (blocks - p.local - p.init);
        // Windows from here on aren't seen, and their P is taken for zero. With two local blocks candidates
        // have none of these.
        int unseen = pos < p.cmp_len - 1 ? 0 : (pos - p.cmp_len + 1) / p.cmp_stride + 1;
        if (p.local >= 2) unseen = INT32_MAX;
        List list;
        list.clear();
        int lowest = -1, used = 0, cell = 0; // used: bytes down the buffer
        uint32_t block = (uint32_t)INT32_MAX + p.init - (p.parts > 1 ? part_first / p.block_cells : 0);
        float sum = 0, next = 0, carried = 0;
        auto put_pending = [&] {
            Entry more[PENDING];
#pragma unroll
            for (int i = 0; i < PENDING; i++) {
                more[i] = NO_ENTRY;
                if (used > i * ROW) more[i] = *(const Entry *)(pending + i * ROW);
                // A score that is no number counts as infinite.
                more[i] = __hiloint2double(min(__double2hiint(more[i]), 0x7f800000), __double2loint(more[i]));
            }
            list.put(more);
            used = 0, lowest = list.score_at(p.wanted - 1);
            if (p.parts > 1) { // if all parts have so many, what is below them all is not among the best
                int shared_lowest = list.score_at(p.part_wanted - 1);
                for (int i = warp_queries; i < 32; i *= 2)
                    shared_lowest = min(shared_lowest, __shfl_xor_sync(0xffffffffu, shared_lowest, i));
                lowest = max(lowest, shared_lowest - 1); // of equals a smaller block may be still to come
            }
        };
        auto end_block = [&](float score) {
            int bits = __float_as_int(score);
            if (bits > lowest && (int)block > last) {
                *(Entry *)(pending + used) = __hiloint2double(bits, block);
                used += ROW;
            }
            block--;
        };
        for (int first = 0; first < steps * WINDOWS; first += P_WINDOWS) {
            p_ring.wait_full();
            const float *from =
                (const float *)(shared + p.at.p + (scorer * p.slots + p_ring.at) * p.at.p_bytes);
            if (p.parts > 1) {
                float x = from[p_place(place, before)];
                if (first + before >= unseen) x = 0;
                sum = out * (part == 0 ? carried : x), carried = x;
            }
            for (int i0 = 0; i0 < part_windows; i0 += SHARE) {
                float x[SHARE];
#pragma unroll
                for (int i = 0; i < SHARE; i += 4) {
                    float4 four = *(const float4 *)(from + (part_place ^ i0 ^ i));
                    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
                }
                const bool full = used > p.most_pending * ROW;
                if (__any_sync(0xffffffffu, full || first + part_first + i0 + SHARE > unseen)) {
                    if (__any_sync(0xffffffffu, full)) put_pending();
#pragma unroll
                    for (int i = 0; i < SHARE; i++)
                        if (first + part_first + i0 + i >= unseen) x[i] = 0;
                }
                // Window i of a block shares min(r, R - i) of its r cells with the block, the others with the
                // next one (a block has R).
                if (cells == ANY) {
#pragma unroll
                    for (int i = 0; i < SHARE; i++) {
                        int inside = min(p.window_cells, p.block_cells - cell);
                        sum = fmaf(inside, x[i], sum);
                        next = fmaf(p.window_cells - inside, x[i], next);
                        if (++cell == p.block_cells) {
                            end_block(sum);
                            sum = next, next = 0, cell = 0;
                        }
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < SHARE; i += 4) {
                        sum += whole * (x[i] + x[i + 1] + x[i + 2]);
                        if (cells == FOUR || (cell += 4) == p.block_cells) {
                            end_block(sum + x[i + 3]);
                            sum = out * x[i + 3], cell = 0;
                        } else {
                            sum = fmaf(whole, x[i + 3], sum);
                        }
                    }
                }
            }
            mbarrier_arrive_warp(p_ring.empty());
            p_ring.next();
            block -= skipped_blocks;
        }
        put_pending();
        for (int i = warp_queries; i < 32; i *= 2) list.put_lane(i);

        if (!there || part > 0) continue;
        int32_t *to = p.block_indices + ((int64_t)w.kv_head * p.batch.nq + w.row + query) * p.topk;
        if (all) {
            for (int i = 0; i < p.topk; i++) to[i] = i < blocks ? i : -1;
            continue;
        }
        for (int i = 0; i < p.init; i++) to[i] = i;
        int chosen[PLACES];
#pragma unroll
        for (int i = 0; i < PLACES; i++)
            chosen[i] = i < p.wanted ? INT32_MAX - __double2loint(list.entry[i]) : INT32_MAX;
        sort_all<0, PLACES>([&](int i, int j) {
            int low = min(chosen[i], chosen[j]);
            chosen[j] = max(chosen[i], chosen[j]), chosen[i] = low;
        });
#pragma unroll
        for (int i = 0; i < PLACES; i++)
            if (i < p.wanted) to[p.init + i] = p.init + chosen[i];
        for (int i = 0; i < p.local; i++) to[p.init + p.wanted + i] = blocks - p.local + i;
    }
}
__device__ __forceinline__ void select(const TopKParamsSm90 &p, char *shared, int scorer, Ring works,
                                       Ring p_ring) {
    Cells cells = cells_of(p);
    if (cells == FOUR && P_WINDOWS / p.parts == 4)
        select<FOUR, 4>(p, shared, scorer, works, p_ring);
    else if (cells == FOUR)
        select<FOUR, SHARE>(p, shared, scorer, works, p_ring);
    else if (cells == FOURS)
        select<FOURS, SHARE>(p, shared, scorer, works, p_ring);
    else
        select<ANY, SHARE>(p, shared, scorer, works, p_ring);
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    topk_sm90_kernel(const __grid_constant__ TopKParamsSm90 p, const __grid_constant__ CUtensorMap q_map,
                       const __grid_constant__ CUtensorMap k_map) {
    extern __shared__ __align__(1024) char shared_memory[];
    const uint32_t start = (smem_address(shared_memory) + 1023) & ~1023u;
    char *shared = shared_memory + (start - smem_address(shared_memory));
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), warpgroup = warp / 4; // uniform registers
    const int scorer = warpgroup % SCORERS;
    const Ring works(start + p.at.barriers, WORKS), q_ring(works.barriers + 16 * WORKS, p.q_tiles),
        k_ring(q_ring.barriers + 16 * p.q_tiles, STAGES);
    const uint32_t p_barriers = k_ring.barriers + 16 * STAGES;
    const Ring p_ring(p_barriers + scorer * 16 * p.slots, p.slots);
    if (threadIdx.x == 0) {
        auto init = [](const Ring &ring, int filling, int emptying) {
            for (int i = 0; i < ring.count; i++) {
                mbarrier_init(ring.barriers + 8 * i, filling);
                mbarrier_init(ring.barriers + 8 * (ring.count + i), emptying);
            }
        };
        init(works, 1, (SCORERS * (4 + p.selector_warps) + 2) * WARP_ARRIVALS);
        init(q_ring, 1 + WARP_ARRIVALS, SCORERS * 4 * WARP_ARRIVALS);
        init(k_ring, 1, SCORERS * 4 * WARP_ARRIVALS);
        for (int s = 0; s < SCORERS; s++)
            init(Ring(p_barriers + s * 16 * p.slots, p.slots), 2 * WARP_ARRIVALS,
                 p.selector_warps * WARP_ARRIVALS);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (warpgroup < SCORERS) {
        warpgroup_reg_alloc<SCORER_REGISTERS>();
        score<T, D>(p, shared, start, scorer, works, q_ring, k_ring, p_ring);
    } else if (warpgroup < 2 * SCORERS) {
        if (warp % 4 < p.selector_warps) select(p, shared, scorer, works, p_ring);
    } else {
        warpgroup_reg_dealloc<LOADER_REGISTERS>();
        if (warp % 4 == 0) load<T, D>(p, q_map, k_map, start, shared, works, q_ring, k_ring);
        if (warp % 4 == 1) bring_offsets(p, shared, works, q_ring);
        if (warp % 4 == 2 && threadIdx.x % 32 == 0) find(p, shared, works);
    }
}

// Where things lie for so many tiles of Q and P.
Layout layout_of(const TopKParamsSm90 &p, int head_dim) {
    Layout a;
    a.q_bytes = COLUMNS * head_dim * 2, a.k_bytes = WINDOWS * head_dim * 2,
    a.p_bytes = p.queries * P_WINDOWS * 4;
    a.k = p.q_tiles * SCORERS * a.q_bytes;
    a.p = a.k + STAGES * a.k_bytes;
    a.pending = a.p + SCORERS * p.slots * a.p_bytes;
    a.offsets = a.pending + SCORERS * PENDING * 128 * (int)sizeof(Entry);
    a.works = a.offsets + p.q_tiles * SCORERS * COLUMNS * (int)sizeof(float);
    a.barriers = a.works + WORKS * (int)sizeof(Work);
    a.end = a.barriers + 16 * (WORKS + p.q_tiles + STAGES + SCORERS * p.slots);
    return a;
}

template <typename T, int D>
int launch_topk(const TopKParamsSm90 &p, FsaDtype dtype, int blocks, cudaStream_t stream) {
    CUtensorMap q_map, k_map;
    const int64_t q_size[] = {D, p.batch.nq, p.q_heads}, q_stride[] = {2, (int64_t)p.q_heads * D * 2, D * 2},
                  k_size[] = {D, p.kv_heads, p.batch.n / p.cmp_stride},
                  k_stride[] = {2, D * 2, (int64_t)p.kv_heads * D * 2};
    const int q_box[] = {64, box_queries(p.group), p.group}, k_box[] = {64, 1, WINDOWS};
    int status = make_tensor_map(&q_map, dtype, 3, p.q, q_size, q_stride, q_box);
    if (!status) status = make_tensor_map(&k_map, dtype, 3, p.kc, k_size, k_stride, k_box);
    if (status) return status;
    int smem = p.at.end + 1024; // what the alignment may take
    cudaFuncSetAttribute(topk_sm90_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    topk_sm90_kernel<T, D><<<(unsigned)blocks, THREADS, smem, stream>>>(p, q_map, k_map);
    return launch_status();
}

} // namespace

bool fsa_topk_sm90_supports(const FsaConfig *c) {
    return (c->head_dim == 64 || c->head_dim == 128) && c->topk - c->init_blocks - c->local_blocks <= PLACES;
}

int fsa_topk_sm90(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const void *q, const void *kc,
                  const float *lse_c, int32_t *block_indices, cudaStream_t stream) {
    if (batch->nq == 0) return FSA_OK;
    TopKParamsSm90 p = {};
    p.batch = *batch;
    p.q = q, p.kc = kc, p.lse = lse_c, p.block_indices = block_indices;
    p.scale = softmax_scale_of(c) * FSA_LOG2E;
    p.q_heads = c->q_heads, p.kv_heads = c->kv_heads, p.group = c->q_heads / c->kv_heads;
    p.cmp_len = c->cmp_len, p.cmp_stride = c->cmp_stride, p.block = c->block;
    p.topk = c->topk, p.init = c->init_blocks, p.local = c->local_blocks;
    p.wanted = p.topk - p.init - p.local;
    p.window_cells = p.cmp_len / p.cmp_stride, p.block_cells = p.block / p.cmp_stride;
    p.queries = COLUMNS / 8 / p.group * 8;
    for (int k = 0; k < p.queries / 8 * p.group; k++) {
        p.first_heads |= (uint32_t)(k % p.group == 0) << k;
        p.last_heads |= (uint32_t)(k % p.group == p.group - 1) << k;
    }
    p.parts = 1; // whole blocks each
    while (cells_of(p) != ANY && 2 * p.parts * p.queries <= 128 &&
           P_WINDOWS / (2 * p.parts) % p.block_cells == 0)
        p.parts *= 2;
    p.part_wanted = (p.wanted + p.parts - 1) / p.parts;
    p.selector_warps = (p.parts * p.queries + 31) / 32;
    p.most_pending = PENDING - (std::min(SHARE, P_WINDOWS / p.parts) + p.block_cells - 1) / p.block_cells;

    // Room goes to a second pair of tiles of P, then to one of Q, then to more of P.
    p.q_tiles = 1, p.slots = 2;
    p.at = layout_of(p, c->head_dim);
    auto grow = [&](int *what, int more) {
        *what += more;
        Layout larger = layout_of(p, c->head_dim);
        if (larger.end + 1024 <= MAX_SMEM)
            p.at = larger;
        else
            *what -= more;
    };
    grow(&p.slots, 2), grow(&p.q_tiles, 1);
    for (int i = p.slots; i < MOST_SLOTS; i++) grow(&p.slots, 1);

    int device = 0, processors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    int64_t tiles = row_tile_bound(batch->nq, batch->num_segments, SCORERS * p.queries) * p.kv_heads;
    int blocks = (int)(tiles < processors ? tiles : processors);
    return FSA_DISPATCH(dtype, c->head_dim, launch_topk, p, dtype, blocks, stream);
}
