// sm90/topk.cu: block selection on Hopper, for at most 16 free blocks. It computes
//   P[t, i] = sum over the g heads of exp(scale q.kc_i - lse), 0 if query t does not see window i
//   S[t, j] = sum over i of w_ij P[t, i],  w_ij = strides (s tokens) that window i and block j share
// For each query it writes the indices of the initial blocks, of the num_free other blocks with the highest
// S, and of the local blocks. If two blocks have the same S, the lower block is selected first. The lse of
// the compressed branch is given, so P needs no online softmax. P and S stay on chip.
//
// The kernel is persistent: one thread block per SM, with five warpgroups. Two warpgroups are scorers, which
// compute P. Two are selectors: each thread computes the block scores of one query, or of a part of its
// blocks, and keeps the highest in a top-k list. A work item is consecutive queries of one KV head: at most
// 8*floor(16/g) for each scorer.
//
//   warpgroup 4      warp 0: loads Q and kc (TMA)   warp 1: loads lse     warp 2: schedules work items
//                      |  k_pipe: 3 stages            |                     |
//                      |  q_pipe: 1 or 2 stages <-----+                     |  work_pipe: 4 stages,
//                      v                                                    v  to all warps
//   warpgroups 0, 1  scorers 0 and 1: kc Q^T by wgmma, tiles of 64 windows x 128 columns (one column per row
//                    of Q); exp, and the sum over the heads, in registers
//                      |  p_pipe of each scorer: 2 to 8 stages of P, 32 windows each
//                      v
//   warpgroups 2, 3  selectors of scorers 0 and 1: block scores from P; top-k lists in registers; block
//                    indices to memory
//
// One scorer can compute exp during the MMA of the other, and the selectors run at the same time. Every sum
// has a fixed order, so the results are bitwise reproducible.
//
// Lower bounds for 64K tokens, (32, 8) heads, d = 128:
//     1.1 TFLOP                                        1.4 ms
//     4.3e9 exps                                       1.2 ms
//     4.3 GB of kc from L2, once per 256/g queries     0.8 ms
//     0.5 GB of q from HBM                             0.1 ms
// Clocks per tile of a scorer:
//     MMA                                              512
//     shared memory: wgmma operands                    384
//                    load of kc                         64
//                    P out and in                       512/g
//                    total                              448 + 512/g
// Limited by MMA and exp at g = 4, and by the selectors at g = 1.
#include "../kernels.h"
#include "../launch.cuh"
#include "../mma.cuh"
#include "pipeline.cuh"
#include "tma.cuh"
#include <algorithm>

namespace {

constexpr int WINDOWS = 64, COLUMNS = 128; // M and N of a scorer's MMA tile
constexpr int SCORERS = 2, THREADS = 128 * (2 * SCORERS + 1);
// Windows of a stage of P. Two warps of a scorer write the stage; the other two write the next stage.
constexpr int P_WINDOWS = WINDOWS / 2;
constexpr int MAX_SMEM = 227 * 1024;
// Tuned values.
constexpr int K_STAGES = 3;     // stages of kc tiles
constexpr int LIST_SIZE = 16;   // elements of a selector's top-k list; num_free is at most this
constexpr int BUFFER_SIZE = 8;  // elements of a selector's candidate buffer
constexpr int LOAD_WINDOWS = 8; // windows of P that a selector loads at once, or all of its windows if fewer
constexpr int MAX_P_STAGES = 8; // maximum of the P stages of a scorer
constexpr int WORK_STAGES = 4;  // work items that the scheduler may be ahead of the other warps
// Registers per thread. Selectors keep the registers of the launch.
constexpr int SCORER_REGISTERS = 128, SELECTOR_REGISTERS = 96, LOADER_REGISTERS = 32;
static_assert(BUFFER_SIZE >= LOAD_WINDOWS, "the buffer holds the blocks that end within one load");
static_assert(65536 / THREADS / 8 * 8 == SELECTOR_REGISTERS &&
                  SCORERS * (SCORER_REGISTERS - SELECTOR_REGISTERS) <= SELECTOR_REGISTERS - LOADER_REGISTERS,
              "registers");

// Shared memory: sizes of tiles, and byte offsets from an address that is a multiple of 1,024.
struct SmemLayout {
    int q_bytes, k_bytes, p_bytes; // sizes of a scorer's tile of Q, a tile of kc, a stage of P
    // [q_stages][SCORERS] tiles of Q begin at 0. Then [K_STAGES] tiles of kc, [SCORERS][p_stages] stages of
    // P, [SCORERS][BUFFER_SIZE][128] candidates, [q_stages][SCORERS][COLUMNS] floats -lse * log2(e),
    // [WORK_STAGES] work items, and the barriers of all pipelines.
    int k, p, buffers, neg_lse, work_items, barriers, end;
};
struct TopKParamsSm90 {
    BatchLayout batch;
    ConstRows q, kc;        // [Nq, Hq, d], [M, Hkv, d], both rotated
    const float *lse;       // [Nq, Hq] of the compressed branch
    int32_t *block_indices; // [Hkv, Nq, T]
    float scale;            // factor of q.kc, times log2(e)
    int q_heads, kv_heads, group, cmp_len, cmp_stride, block, topk, init_blocks, local_blocks;
    // Bit k is set if n8 tile k of a scorer's columns belongs to the first head (or to the last head).
    uint32_t first_head_mask, last_head_mask;
    int num_free;                      // free blocks: T minus the initial and local blocks
    int free_per_selector;             // ceil(num_free / selectors_per_query)
    int window_strides, block_strides; // l/s, B/s
    int queries_per_scorer;            // 8*floor(16/g)
    int selectors_per_query;           // 1, 2, 4 or 8
    int q_stages, p_stages;            // stages of Q; stages of P of each scorer
    int selector_warps;                // warps with selectors, for each scorer
    int max_buffered;                  // a buffer with more candidates may overflow in the next load
    SmemLayout smem;
};

// Up to 2 * queries_per_scorer consecutive queries of one segment, and a KV head.
struct WorkItem {
    int64_t first_query, window0;        // first query; first window of its sequence
    int num_queries, first_pos, kv_head; // 0 queries: no more work; first_pos: position of first_query
    int k_tiles;                         // tiles of kc that the last query needs for its block scores
};

// A block and its score as one double, so that one instruction compares two candidates. The upper 32 bits
// are the bits of the score: scores are not negative, so their bits have the same order. The lower 32 bits
// are the key INT32_MAX - block. So the candidate with the higher score is greater; if the scores are equal,
// the candidate with the lower block is greater.
using Candidate = double;
constexpr Candidate NO_CANDIDATE = -1; // less than every candidate

// Shared memory of the thread block, and the pipelines in it (at the first stage). Tiles of Q and kc are
// named by their 32-bit shared-memory address.
struct TopKSmem {
    const SmemLayout &layout;
    int q_stages, p_stages;
    uint32_t start; // a multiple of 1,024, in a uniform register (by a shuffle)
    char *bytes;    // the same address, as a generic pointer
    __device__ __forceinline__ TopKSmem(const TopKParamsSm90 &p, char *shared)
        : layout(p.smem), q_stages(p.q_stages), p_stages(p.p_stages),
          start(__shfl_sync(0xffffffffu, (smem_address(shared) + 1023) & ~1023u, 0)),
          bytes(shared + (start - smem_address(shared))) {}
    __device__ __forceinline__ uint32_t q(int stage, int scorer) const {
        return start + (stage * SCORERS + scorer) * layout.q_bytes;
    }
    __device__ __forceinline__ uint32_t k(int stage) const {
        return start + layout.k + stage * layout.k_bytes;
    }
    __device__ __forceinline__ float *p(int stage, int scorer) const {
        return (float *)(bytes + layout.p + (scorer * p_stages + stage) * layout.p_bytes);
    }
    __device__ __forceinline__ Candidate *buffers(int scorer) const {
        return (Candidate *)(bytes + layout.buffers) + scorer * BUFFER_SIZE * 128;
    }
    __device__ __forceinline__ float *neg_lse(int stage, int scorer) const {
        return (float *)(bytes + layout.neg_lse) + (stage * SCORERS + scorer) * COLUMNS;
    }
    __device__ __forceinline__ WorkItem &work_item(int stage) const {
        return ((WorkItem *)(bytes + layout.work_items))[stage];
    }
    // Barriers: full | empty of each pipeline.
    static __device__ __forceinline__ PipelineState pipe(uint32_t barriers, int stages) {
        return PipelineState(barriers, barriers + 8 * stages, stages);
    }
    __device__ __forceinline__ PipelineState work_pipe() const {
        return pipe(start + layout.barriers, WORK_STAGES);
    }
    __device__ __forceinline__ PipelineState q_pipe() const {
        return pipe(start + layout.barriers + 16 * WORK_STAGES, q_stages);
    }
    __device__ __forceinline__ PipelineState k_pipe() const {
        return pipe(start + layout.barriers + 16 * (WORK_STAGES + q_stages), K_STAGES);
    }
    __device__ __forceinline__ PipelineState p_pipe(int scorer) const {
        return pipe(start + layout.barriers + 16 * (WORK_STAGES + q_stages + K_STAGES + scorer * p_stages),
                    p_stages);
    }
    static __device__ __forceinline__ void init_pipe(const PipelineState &pipe, int full_arrivals,
                                                     int empty_arrivals) {
        for (int i = 0; i < pipe.stages; i++) {
            mbarrier_init(pipe.full + 8 * i, full_arrivals);
            mbarrier_init(pipe.empty + 8 * i, empty_arrivals);
        }
    }
    __device__ __forceinline__ void init_barriers(int selector_warps) const {
        init_pipe(work_pipe(), 1, (SCORERS * (4 + selector_warps) + 2) * WARP_ARRIVALS);
        init_pipe(q_pipe(), 1 + WARP_ARRIVALS, SCORERS * 4 * WARP_ARRIVALS);
        init_pipe(k_pipe(), 1, SCORERS * 4 * WARP_ARRIVALS);
        for (int s = 0; s < SCORERS; s++)
            init_pipe(p_pipe(s), 2 * WARP_ARRIVALS, selector_warps * WARP_ARRIVALS);
        mbarrier_init_fence();
    }
};

// ---- work items -------------------------------------------------------------------------------------------
// Returns the next work item of this thread block. *wave is the first wave to look at, and is advanced. Work
// items are in order of descending query: later queries of a sequence see more windows, and come first. A
// wave assigns one work item to each thread block, in ascending order of the thread blocks in even waves and
// in descending order in odd waves. So every thread block gets long and short work items.
__device__ __forceinline__ WorkItem next_work_item(const TopKParamsSm90 &p, int64_t *wave) {
    WorkItem w = {};
    int item_queries = SCORERS * p.queries_per_scorer;
    int64_t q_tiles = p.batch.nq / item_queries + p.batch.num_segments, grid = gridDim.x;
    for (; w.num_queries == 0 && *wave * grid < q_tiles * p.kv_heads; ++*wave) {
        int64_t index = *wave * grid + (*wave & 1 ? grid - 1 - blockIdx.x : blockIdx.x);
        if (index >= q_tiles * p.kv_heads) continue;
        RowTile tile = find_row_tile(p.batch.cu_queries, p.batch.num_segments, item_queries,
                                     q_tiles - 1 - index / p.kv_heads);
        if (tile.rows == 0) continue;
        FsaSegment segment = p.batch.segments[tile.cu_index];
        w.kv_head = (int)(index % p.kv_heads);
        w.first_query = tile.row, w.num_queries = tile.rows;
        w.first_pos = (int)segment.pos + tile.first;
        w.window0 = p.batch.cu_windows[segment.seq];
        int num_blocks = (w.first_pos + tile.rows - 1) / p.block + 1;
        if (num_blocks > p.topk && p.num_free > 0)
            w.k_tiles = ((num_blocks - p.local_blocks) * p.block_strides + WINDOWS - 1) / WINDOWS;
    }
    return w;
}
// One thread: writes the thread block's work items to work_pipe, last an empty one.
__device__ __forceinline__ void schedule_work(const TopKParamsSm90 &p, const TopKSmem &smem) {
    PipelineState work_pipe = smem.work_pipe();
    for (int64_t wave = 0;;) {
        const WorkItem w = next_work_item(p, &wave);
        work_pipe.wait_empty_sleeping();
        smem.work_item(work_pipe.stage) = w;
        mbarrier_arrive(work_pipe.full_barrier());
        work_pipe.advance();
        if (w.num_queries == 0) break;
    }
}
// Waits for the next work item and returns it. The reference is valid until the warp calls release_work_item.
__device__ __forceinline__ const WorkItem &wait_work_item(const TopKSmem &smem,
                                                          const PipelineState &work_pipe) {
    work_pipe.wait_full();
    return smem.work_item(work_pipe.stage);
}
__device__ __forceinline__ void release_work_item(PipelineState &work_pipe) {
    mbarrier_arrive_warp(work_pipe.empty_barrier());
    work_pipe.advance();
}

// ---- loaders ----------------------------------------------------------------------------------------------
// Queries of a TMA box of Q.
__host__ __device__ __forceinline__ int box_queries(int group) {
    return group == 1 ? COLUMNS : 8;
}

// Loads Q and kc by TMA as K-major operands of wgmma.
//
// A TMA box of Q has the g heads of 8 queries (if g = 1, of all queries of the scorer). So the columns of a
// scorer are 8 queries of head 0, the same 8 queries of head 1, ..., then the next 8 queries. A thread of a
// scorer then holds all heads of its queries for every g. Of the 128 columns 8*g*floor(16/g) are used: all
// if g is a power of two, at least 72 otherwise.
//
// A tile of kc may extend past the last window of its sequence. No candidate block overlaps these windows if
// at least two local blocks are selected. Otherwise the selectors replace their P by zero.
template <int D>
__device__ __forceinline__ void load_q_tiles(const TopKParamsSm90 &p, const CUtensorMap &q_map,
                                             const TopKSmem &smem, const WorkItem &w,
                                             const PipelineState &q_pipe) {
    const int box = box_queries(p.group), num_queries = (w.num_queries + box - 1) / box * box;
    mbarrier_arrive_expect_tx(q_pipe.full_barrier(),
                              min(num_queries, SCORERS * p.queries_per_scorer) * p.group * D * 2);
    for (int query = 0; query < min(num_queries, SCORERS * p.queries_per_scorer); query += box) {
        const int scorer = query >= p.queries_per_scorer;
        const uint32_t tile =
            smem.q(q_pipe.stage, scorer) + (query - scorer * p.queries_per_scorer) * p.group * 128;
        for (int i = 0; i < D / 64; i++)
            tma_load_3d(tile + i * COLUMNS * 128, &q_map, i * 64, (int)w.first_query + query,
                        w.kv_head * p.group, q_pipe.full_barrier());
    }
}
template <int D>
__device__ __forceinline__ void load_k_tile(const CUtensorMap &k_map, const TopKSmem &smem, const WorkItem &w,
                                            int tile, const PipelineState &k_pipe) {
    mbarrier_arrive_expect_tx(k_pipe.full_barrier(), WINDOWS * D * 2);
    for (int i = 0; i < D / 64; i++)
        tma_load_3d(smem.k(k_pipe.stage) + i * WINDOWS * 128, &k_map, i * 64, w.kv_head,
                    (int)w.window0 + tile * WINDOWS, k_pipe.full_barrier());
}
template <int D>
__device__ __forceinline__ void load_tiles(const TopKParamsSm90 &p, const CUtensorMap &q_map,
                                           const CUtensorMap &k_map, const TopKSmem &smem) {
    PipelineState work_pipe = smem.work_pipe(), q_pipe = smem.q_pipe(), k_pipe = smem.k_pipe();
    const int lane = threadIdx.x % 32;
    for (;; release_work_item(work_pipe)) {
        const WorkItem w = wait_work_item(smem, work_pipe);
        if (w.num_queries == 0) break;
        if (w.k_tiles == 0) continue;
        q_pipe.wait_empty_sleeping();
        if (lane == 0) load_q_tiles<D>(p, q_map, smem, w, q_pipe);
        q_pipe.advance();
        for (int tile = 0; tile < w.k_tiles; tile++, k_pipe.advance()) {
            k_pipe.wait_empty_sleeping();
            if (lane == 0) load_k_tile<D>(k_map, smem, w, tile, k_pipe);
        }
    }
}

// Loads -lse * log2(e) for each column of a scorer: -inf for unused columns, and for rows that see no window.
__device__ __forceinline__ void load_lse(const TopKParamsSm90 &p, const TopKSmem &smem) {
    PipelineState work_pipe = smem.work_pipe(), q_pipe = smem.q_pipe();
    const int lane = threadIdx.x % 32,
              used_n8 = p.queries_per_scorer / 8 * p.group; // n8 tiles of columns in use
    for (;; release_work_item(work_pipe)) {
        const WorkItem w = wait_work_item(smem, work_pipe);
        if (w.num_queries == 0) break;
        if (w.k_tiles == 0) continue;
        float x[SCORERS * COLUMNS / 32];
#pragma unroll
        for (int i = 0; i < SCORERS * COLUMNS / 32; i++) {
            const int column = (i * 32 + lane) % COLUMNS, n8 = column / 8, query_tile = n8 / p.group;
            const int query = i * 32 / COLUMNS * p.queries_per_scorer + query_tile * 8 + column % 8;
            x[i] = -INFINITY;
            if (n8 < used_n8 && query < w.num_queries)
                x[i] = p.lse[(w.first_query + query) * p.q_heads + w.kv_head * p.group + n8 -
                             query_tile * p.group];
        }
        q_pipe.wait_empty_sleeping();
        float *out = smem.neg_lse(q_pipe.stage, 0) + lane;
#pragma unroll
        for (int i = 0; i < SCORERS * COLUMNS / 32; i++)
            out[i * 32] = x[i] == -INFINITY ? -INFINITY : -x[i] * FSA_LOG2E;
        mbarrier_arrive_warp(q_pipe.full_barrier());
        q_pipe.advance();
    }
}

// ---- scorers ----------------------------------------------------------------------------------------------
// Returns the offset of an element in a stage of P, [queries_per_scorer][32 windows]. The eight chunks of 4
// windows of a query are swizzled by query % 8, so writers and readers have no bank conflicts. From offset x:
//     the next query, for an even query                    (x ^ 4) + 32
//     window w + 8, for a window w with w % 16 < 8          x ^ 8
__device__ __forceinline__ int p_offset(int query, int window) {
    return query * P_WINDOWS + (window ^ query % 8 * 4);
}

// s (64 windows x 128 columns) = kc Q^T, the scores of windows, asynchronous.
template <typename T, int D>
__device__ __forceinline__ void issue_kq(float (&s)[COLUMNS / 8][4], uint32_t k, uint32_t q) {
    // The shuffle puts the descriptors into uniform registers, where wgmma needs them.
    const uint64_t k_desc = make_smem_desc(__shfl_sync(0xffffffffu, k, 0));
    const uint64_t q_desc = make_smem_desc(__shfl_sync(0xffffffffu, q, 0));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_ss<T>(s, advance_desc(k_desc, k / 4 * WINDOWS * 128 + k % 4 * 32),
                    advance_desc(q_desc, k / 4 * COLUMNS * 128 + k % 4 * 32), k > 0);
    wgmma_commit();
}

// P = exp(S - lse), summed over the heads, to a stage of P. p_tile: at the thread's first element, as an
// offset (p_offset) from the stage. GROUP is p.group if p.group is a power of two, else 0. used_n8: n8 tiles
// of columns in use.
template <int GROUP>
__device__ __forceinline__ void store_p(const TopKParamsSm90 &p, const float (&s)[COLUMNS / 8][4],
                                        const float2 (&neg_lse)[COLUMNS / 8], int used_n8, float *p_tile,
                                        int thread_offset) {
    const int group = GROUP ? GROUP : p.group;
    float sum[4];
#pragma unroll
    for (int k = 0; k < COLUMNS / 8; k++) {
        if (GROUP == 0 && k % 4 == 0 && k >= used_n8) break;
        // Masks instead of counters avoid a chain of dependent conditions.
        const bool first_head = GROUP ? k % group == 0 : p.first_head_mask >> k & 1;
        const bool last_head = GROUP ? (k + 1) % group == 0 : p.last_head_mask >> k & 1;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float x = exp2_fast(fmaf(s[k][i], p.scale, i % 2 ? neg_lse[k].y : neg_lse[k].x));
            sum[i] = first_head ? x : sum[i] + x;
        }
        if (last_head) {
            p_tile[thread_offset] = sum[0], p_tile[(thread_offset ^ 4) + P_WINDOWS] = sum[1];
            p_tile[thread_offset ^ 8] = sum[2], p_tile[(thread_offset ^ 12) + P_WINDOWS] = sum[3];
            p_tile += 8 * P_WINDOWS;
        }
    }
}

// A scorer computes P of its queries for all tiles of kc.
template <typename T, int D, int GROUP>
__device__ __forceinline__ void compute_scores(const TopKParamsSm90 &p, const TopKSmem &smem, int scorer) {
    PipelineState work_pipe = smem.work_pipe(), q_pipe = smem.q_pipe(), k_pipe = smem.k_pipe(),
                  p_pipe = smem.p_pipe(scorer);
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int queries = GROUP ? COLUMNS / GROUP : p.queries_per_scorer;
    const int used_n8 = queries / 8 * (GROUP ? GROUP : p.group);
    const int thread_offset = p_offset(lane % 4 * 2, warp % 2 * 16 + lane / 4);
    if (warp >= 2) p_pipe.advance(); // warps 2 and 3 write the second half of a tile: the next stage
    for (;; release_work_item(work_pipe)) {
        const WorkItem &w = wait_work_item(smem, work_pipe);
        const int k_tiles = w.k_tiles;
        if (w.num_queries == 0) break;
        if (k_tiles == 0) continue;
        q_pipe.wait_full();
        float2 neg_lse[COLUMNS / 8]; // of this thread's columns
        const float2 *neg_lse_smem = (const float2 *)(smem.neg_lse(q_pipe.stage, scorer) + lane % 4 * 2);
#pragma unroll
        for (int k = 0; k < COLUMNS / 8; k++) neg_lse[k] = neg_lse_smem[k * 4];
        for (int tile = 0; tile < k_tiles; tile++) {
            float s[COLUMNS / 8][4];
            k_pipe.wait_full();
            issue_kq<T, D>(s, smem.k(k_pipe.stage), smem.q(q_pipe.stage, scorer));
            p_pipe.wait_empty();
            float *p_tile = smem.p(p_pipe.stage, scorer);
            wgmma_wait<0>();
            fence_operand(s);
            mbarrier_arrive_warp(k_pipe.empty_barrier());
            if (tile == k_tiles - 1) mbarrier_arrive_warp(q_pipe.empty_barrier());
            k_pipe.advance();
            // The other scorer's matmul runs now.
            store_p<GROUP>(p, s, neg_lse, used_n8, p_tile, thread_offset);
            mbarrier_arrive_warp(p_pipe.full_barrier());
            p_pipe.advance(), p_pipe.advance();
        }
        q_pipe.advance();
    }
}
template <typename T, int D>
__device__ __forceinline__ void compute_scores(const TopKParamsSm90 &p, const TopKSmem &smem, int scorer) {
    switch (p.group) {
    case 1:
        return compute_scores<T, D, 1>(p, smem, scorer);
    case 2:
        return compute_scores<T, D, 2>(p, smem, scorer);
    case 4:
        return compute_scores<T, D, 4>(p, smem, scorer);
    case 8:
        return compute_scores<T, D, 8>(p, smem, scorer);
    case 16:
        return compute_scores<T, D, 16>(p, smem, scorer);
    default:
        return compute_scores<T, D, 0>(p, smem, scorer);
    }
}

// ---- selectors --------------------------------------------------------------------------------------------
__device__ __forceinline__ void compare_exchange(Candidate &first, Candidate &second) { // greater first
    bool swap = second > first;
    Candidate greater = swap ? second : first;
    second = swap ? first : second, first = greater;
}
// Batcher's odd-even merge sort of elements FIRST .. FIRST + N - 1: calls exchange(i, j) for each comparator.
template <int FIRST, int N, int STEP, typename F> __device__ __forceinline__ void odd_even_merge(F exchange) {
    if constexpr (2 * STEP < N) {
        odd_even_merge<FIRST, N, 2 * STEP>(exchange);
        odd_even_merge<FIRST + STEP, N, 2 * STEP>(exchange);
#pragma unroll
        for (int i = FIRST + STEP; i + STEP < FIRST + N; i += 2 * STEP) exchange(i, i + STEP);
    } else {
        exchange(FIRST, FIRST + STEP);
    }
}
template <int FIRST, int N, typename F> __device__ __forceinline__ void odd_even_merge_sort(F exchange) {
    if constexpr (N > 1) {
        odd_even_merge_sort<FIRST, N / 2>(exchange);
        odd_even_merge_sort<FIRST + N / 2, N / 2>(exchange);
        odd_even_merge<FIRST, N, 1>(exchange);
    }
}

// The top-k list of a selector: the LIST_SIZE greatest candidates so far, in descending order, in registers.
struct TopKList {
    Candidate candidate[LIST_SIZE];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < LIST_SIZE; i++) candidate[i] = NO_CANDIDATE;
    }
    // Sorts a bitonic list.
    __device__ __forceinline__ void bitonic_merge() {
#pragma unroll
        for (int step = LIST_SIZE / 2; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < LIST_SIZE; i++)
                if (!(i & step)) compare_exchange(candidate[i], candidate[i + step]);
        }
    }
    __device__ __forceinline__ void merge(Candidate (&candidates)[BUFFER_SIZE]) {
        odd_even_merge_sort<0, BUFFER_SIZE>(
            [&](int i, int j) { compare_exchange(candidates[i], candidates[j]); });
#pragma unroll
        for (int i = 0; i < BUFFER_SIZE; i++)
            if (candidates[i] > candidate[LIST_SIZE - 1 - i]) candidate[LIST_SIZE - 1 - i] = candidates[i];
        bitonic_merge();
    }
    // Merges the lists of this lane and of lane ^ lane_mask. Both lanes get the result.
    __device__ __forceinline__ void merge_lane(int lane_mask) {
#pragma unroll
        for (int i = 0; i < LIST_SIZE / 2; i++) {
            Candidate &a = candidate[i], &b = candidate[LIST_SIZE - 1 - i];
            Candidate other_a = __shfl_xor_sync(0xffffffffu, a, lane_mask);
            Candidate other_b = __shfl_xor_sync(0xffffffffu, b, lane_mask);
            if (other_b > a) a = other_b;
            if (other_a > b) b = other_a;
        }
        bitonic_merge();
    }
    // Returns the bits of the score of candidate[index], or a number less than the bits of every score if
    // the list has no such candidate.
    __device__ __forceinline__ int score_at(int index) const {
        int x[LIST_SIZE];
#pragma unroll
        for (int i = 0; i < LIST_SIZE; i++) x[i] = __double2hiint(candidate[i]);
#pragma unroll
        for (int step = LIST_SIZE / 2; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < LIST_SIZE / 2; i++)
                if (i < step) x[i] = index & step ? x[i + step] : x[i];
        }
        return x[0];
    }
};

// Strides per block: four; a multiple of four; any number. For the first two kinds, a window has at most two
// strides, so only the last window of a block extends into the next block.
enum BlockKind { FOUR, MULTIPLE_OF_FOUR, ANY };
__host__ __device__ __forceinline__ BlockKind block_kind(const TopKParamsSm90 &p) {
    return p.block_strides % 4 || p.window_strides > 2 ? ANY : p.block_strides == 4 ? FOUR : MULTIPLE_OF_FOUR;
}

// A selector is a thread that computes block scores of one query from P, and keeps a top-k list of them.
//
// A scorer has at most 128/g queries, and its selector warpgroup has 128 threads. So a query has 1, 2, 4 or
// 8 selectors, which are lanes of one warp. They divide the 32 windows of a stage of P into equal parts of
// whole blocks. A selector processes the windows of its part in order:
//   1. It sums the scores of its blocks.
//   2. If a score exceeds the threshold, it appends the block to its candidate buffer in shared memory.
//   3. When the buffer of any lane of the warp may overflow, all 32 lanes sort their buffers and merge them
//      into their top-k lists, in registers, by comparator networks of 5 instructions per comparator.
// The threshold is the score of candidate num_free of the selector's list: a block with a lower score cannot
// be selected. With several selectors per query, a second threshold is shared. It is the least, over the
// query's selectors, of the score of candidate free_per_selector in a selector's list. At least num_free
// candidates have a score that is as high. At the end the lists of a query's selectors are merged.
//
// LOADED: windows that a selector loads at once.
template <BlockKind KIND, int LOADED> struct Selector {
    const TopKParamsSm90 &p;
    // The thread's query, counted within the scorer's queries, and which one of the query's selectors it is.
    int warp_queries, query, selector;
    // Its windows of a stage of P: p_query is the query whose P it reads; window i is at element base ^ i.
    int p_query, num_windows, first_window, base;
    int prev_window;    // before first_window, cyclic
    int skipped_blocks; // blocks of the query's other selectors in a stage
    // Candidate buffers [BUFFER_SIZE][128 selectors]. `buffered` is the number of this selector's
    // candidates, times ROW_BYTES.
    static constexpr int ROW_BYTES = 128 * sizeof(Candidate);
    char *buffer;
    // State of a work item.
    int key_bound, windows_end;
    TopKList list;
    int threshold, buffered, stride; // stride: index within the block
    uint32_t key;                    // of the current block
    float sum, next_sum, carried_p;  // score of the current block and the next one; P of prev_window

    // A warp has all selectors of 32 / selectors_per_query queries. The 8 lanes of one 128-byte load read P
    // of 8 queries; with 8 selectors per query, P of 4 queries and of selectors i and i + 4. So the load has
    // no bank conflicts.
    __device__ __forceinline__ Selector(const TopKParamsSm90 &p, Candidate *buffers) : p(p) {
        const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        warp_queries = 32 / p.selectors_per_query;
        const int lane_set = lane / warp_queries;
        query = warp * warp_queries + lane % warp_queries;
        selector = lane_set / 2 + lane_set % 2 * (p.selectors_per_query / 2);
        p_query = min(query, p.queries_per_scorer - 1); // lanes without a query read P of the last one
        num_windows = P_WINDOWS / p.selectors_per_query, first_window = selector * num_windows;
        base = p_offset(p_query, first_window);
        prev_window = (first_window + P_WINDOWS - 1) % P_WINDOWS;
        skipped_blocks = p.selectors_per_query > 1 ? (P_WINDOWS - num_windows) / p.block_strides : 0;
        buffer = (char *)(buffers + threadIdx.x % 128);
    }
    // Starts the query at position pos, which sees num_blocks blocks.
    __device__ __forceinline__ void start(int pos, int num_blocks) {
        // The key of block j is INT32_MAX - (j - init_blocks). Candidates are the blocks between the initial
        // and the local blocks. Their keys exceed key_bound. Local blocks have keys of at most key_bound,
        // and initial blocks have keys that are negative as int.
        key_bound =
            num_blocks <= p.topk ? INT32_MAX : INT32_MAX - (num_blocks - p.local_blocks - p.init_blocks);
        // The query sees windows 0 .. windows_end - 1. P of the other windows is replaced by zero. With two
        // local blocks this is not necessary, since no candidate overlaps the other windows.
        windows_end = pos < p.cmp_len - 1 ? 0 : (pos - p.cmp_len + 1) / p.cmp_stride + 1;
        if (p.local_blocks >= 2) windows_end = INT32_MAX;
        list.clear();
        threshold = -1, buffered = 0, stride = 0;
        key = (uint32_t)INT32_MAX + p.init_blocks -
              (p.selectors_per_query > 1 ? first_window / p.block_strides : 0);
        sum = 0, next_sum = 0, carried_p = 0;
    }
    // Sorts the buffer and merges it into the list. All lanes of the warp call it.
    __device__ __forceinline__ void flush_buffer() {
        Candidate candidates[BUFFER_SIZE];
#pragma unroll
        for (int i = 0; i < BUFFER_SIZE; i++) {
            candidates[i] = NO_CANDIDATE;
            if (buffered > i * ROW_BYTES) candidates[i] = *(const Candidate *)(buffer + i * ROW_BYTES);
            // Replace NaN by +Inf.
            candidates[i] = __hiloint2double(min(__double2hiint(candidates[i]), 0x7f800000),
                                             __double2loint(candidates[i]));
        }
        list.merge(candidates);
        buffered = 0, threshold = list.score_at(p.num_free - 1);
        if (p.selectors_per_query > 1) { // the threshold that the query's selectors share
            int shared_threshold = list.score_at(p.free_per_selector - 1);
            for (int i = warp_queries; i < 32; i *= 2)
                shared_threshold = min(shared_threshold, __shfl_xor_sync(0xffffffffu, shared_threshold, i));
            threshold = max(threshold, shared_threshold - 1); // a lower block may have the same score
        }
    }
    // Appends the current block to the buffer if it can be selected, and moves to the next block.
    __device__ __forceinline__ void finish_block(float score) {
        int bits = __float_as_int(score);
        if (bits > threshold && (int)key > key_bound) {
            *(Candidate *)(buffer + buffered) = __hiloint2double(bits, key);
            buffered += ROW_BYTES;
        }
        key--;
    }
    // Adds P of the next LOADED windows to the scores of their blocks. Window i of a block shares
    // min(window_strides, block_strides - i) strides with the block, and its other strides with the next one.
    __device__ __forceinline__ void add_windows(const float (&x)[LOADED]) {
        const float window_weight = p.window_strides, spill_weight = p.window_strides - 1;
        if (KIND == ANY) {
#pragma unroll
            for (int i = 0; i < LOADED; i++) {
                int overlap = min(p.window_strides, p.block_strides - stride);
                sum = fmaf(overlap, x[i], sum);
                next_sum = fmaf(p.window_strides - overlap, x[i], next_sum);
                if (++stride == p.block_strides) {
                    finish_block(sum);
                    sum = next_sum, next_sum = 0, stride = 0;
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < LOADED; i += 4) {
                sum += window_weight * (x[i] + x[i + 1] + x[i + 2]);
                if (KIND == FOUR || (stride += 4) == p.block_strides) {
                    finish_block(sum + x[i + 3]);
                    sum = spill_weight * x[i + 3], stride = 0;
                } else {
                    sum = fmaf(window_weight, x[i + 3], sum);
                }
            }
        }
    }
    // Processes the selector's windows of a stage of P, whose first window is tile_window.
    __device__ __forceinline__ void add_tile(const float *p_tile, int tile_window) {
        if (p.selectors_per_query > 1) { // prev_window may extend into the first block
            float x = p_tile[p_offset(p_query, prev_window)];
            if (tile_window + prev_window >= windows_end) x = 0;
            sum = (p.window_strides - 1) * (selector == 0 ? carried_p : x), carried_p = x;
        }
        for (int i0 = 0; i0 < num_windows; i0 += LOADED) {
            float x[LOADED];
#pragma unroll
            for (int i = 0; i < LOADED; i += 4) {
                float4 four = *(const float4 *)(p_tile + (base ^ i0 ^ i));
                x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
            }
            const bool buffer_full = buffered > p.max_buffered * ROW_BYTES;
            if (__any_sync(0xffffffffu,
                           buffer_full || tile_window + first_window + i0 + LOADED > windows_end)) {
                if (__any_sync(0xffffffffu, buffer_full)) flush_buffer();
#pragma unroll
                for (int i = 0; i < LOADED; i++)
                    if (tile_window + first_window + i0 + i >= windows_end) x[i] = 0;
            }
            add_windows(x);
        }
        key -= skipped_blocks;
    }
    // Merges the lists of the query's selectors. Every one gets the result.
    __device__ __forceinline__ void merge_lists() {
        flush_buffer();
        for (int i = warp_queries; i < 32; i *= 2) list.merge_lane(i);
    }
    // Writes the query's block indices [T] in ascending order, -1 after the last block.
    __device__ __forceinline__ void store_indices(int32_t *out, int num_blocks) const {
        if (num_blocks <= p.topk) {
            for (int i = 0; i < p.topk; i++) out[i] = i < num_blocks ? i : -1;
            return;
        }
        for (int i = 0; i < p.init_blocks; i++) out[i] = i;
        int selected[LIST_SIZE];
#pragma unroll
        for (int i = 0; i < LIST_SIZE; i++)
            selected[i] = i < p.num_free ? INT32_MAX - __double2loint(list.candidate[i]) : INT32_MAX;
        odd_even_merge_sort<0, LIST_SIZE>([&](int i, int j) {
            int low = min(selected[i], selected[j]);
            selected[j] = max(selected[i], selected[j]), selected[i] = low;
        });
#pragma unroll
        for (int i = 0; i < LIST_SIZE; i++)
            if (i < p.num_free) out[p.init_blocks + i] = p.init_blocks + selected[i];
        for (int i = 0; i < p.local_blocks; i++)
            out[p.init_blocks + p.num_free + i] = num_blocks - p.local_blocks + i;
    }
};

// The selectors of a scorer: block scores from P, and the block indices of each query.
template <BlockKind KIND, int LOADED>
__device__ __forceinline__ void select_blocks(const TopKParamsSm90 &p, const TopKSmem &smem, int scorer) {
    PipelineState work_pipe = smem.work_pipe(), p_pipe = smem.p_pipe(scorer);
    Selector<KIND, LOADED> selector(p, smem.buffers(scorer));
    for (;; release_work_item(work_pipe)) {
        const WorkItem &w = wait_work_item(smem, work_pipe);
        const int k_tiles = w.k_tiles;
        if (w.num_queries == 0) break;
        const int item_query = scorer * p.queries_per_scorer + selector.query;
        const bool valid = selector.query < p.queries_per_scorer && item_query < w.num_queries;
        const int pos = w.first_pos + item_query, num_blocks = valid ? pos / p.block + 1 : 0;
        selector.start(pos, num_blocks);
        for (int window = 0; window < k_tiles * WINDOWS; window += P_WINDOWS) {
            p_pipe.wait_full();
            selector.add_tile(smem.p(p_pipe.stage, scorer), window);
            mbarrier_arrive_warp(p_pipe.empty_barrier());
            p_pipe.advance();
        }
        selector.merge_lists();
        if (valid && selector.selector == 0)
            selector.store_indices(
                p.block_indices + ((int64_t)w.kv_head * p.batch.nq + w.first_query + item_query) * p.topk,
                num_blocks);
    }
}
__device__ __forceinline__ void select_blocks(const TopKParamsSm90 &p, const TopKSmem &smem, int scorer) {
    BlockKind kind = block_kind(p);
    if (kind == FOUR && P_WINDOWS / p.selectors_per_query == 4)
        select_blocks<FOUR, 4>(p, smem, scorer);
    else if (kind == FOUR)
        select_blocks<FOUR, LOAD_WINDOWS>(p, smem, scorer);
    else if (kind == MULTIPLE_OF_FOUR)
        select_blocks<MULTIPLE_OF_FOUR, LOAD_WINDOWS>(p, smem, scorer);
    else
        select_blocks<ANY, LOAD_WINDOWS>(p, smem, scorer);
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    topk_sm90_kernel(const __grid_constant__ TopKParamsSm90 p, const __grid_constant__ CUtensorMap q_map,
                     const __grid_constant__ CUtensorMap k_map) {
    extern __shared__ __align__(1024) char shared[];
    const TopKSmem smem(p, shared);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), warpgroup = warp / 4; // uniform registers
    const int scorer = warpgroup % SCORERS;
    if (threadIdx.x == 0) smem.init_barriers(p.selector_warps);
    __syncthreads();
    if (warpgroup < SCORERS) {
        warpgroup_reg_alloc<SCORER_REGISTERS>();
        compute_scores<T, D>(p, smem, scorer);
    } else if (warpgroup < 2 * SCORERS) {
        if (warp % 4 < p.selector_warps) select_blocks(p, smem, scorer);
    } else {
        warpgroup_reg_dealloc<LOADER_REGISTERS>();
        if (warp % 4 == 0) load_tiles<D>(p, q_map, k_map, smem);
        if (warp % 4 == 1) load_lse(p, smem);
        if (warp % 4 == 2 && threadIdx.x % 32 == 0) schedule_work(p, smem);
    }
}

// Returns the layout for p.q_stages and p.p_stages.
SmemLayout smem_layout(const TopKParamsSm90 &p, int head_dim) {
    SmemLayout s;
    s.q_bytes = COLUMNS * head_dim * 2, s.k_bytes = WINDOWS * head_dim * 2,
    s.p_bytes = p.queries_per_scorer * P_WINDOWS * 4;
    s.k = p.q_stages * SCORERS * s.q_bytes;
    s.p = s.k + K_STAGES * s.k_bytes;
    s.buffers = s.p + SCORERS * p.p_stages * s.p_bytes;
    s.neg_lse = s.buffers + SCORERS * BUFFER_SIZE * 128 * (int)sizeof(Candidate);
    s.work_items = s.neg_lse + p.q_stages * SCORERS * COLUMNS * (int)sizeof(float);
    s.barriers = s.work_items + WORK_STAGES * (int)sizeof(WorkItem);
    s.end = s.barriers + 16 * (WORK_STAGES + p.q_stages + K_STAGES + SCORERS * p.p_stages);
    return s;
}

template <typename T, int D>
int launch_topk_sm90(const TopKParamsSm90 &p, FsaDtype dtype, int blocks, cudaStream_t stream) {
    CUtensorMap q_map, k_map;
    const int64_t q_size[] = {D, p.batch.nq, p.q_heads}, q_stride[] = {2, p.q.stride * 2, D * 2},
                  k_size[] = {D, p.kv_heads, p.batch.n / p.cmp_stride},
                  k_stride[] = {2, D * 2, p.kc.stride * 2};
    const int q_box[] = {64, box_queries(p.group), p.group}, k_box[] = {64, 1, WINDOWS};
    TRY(make_tensor_map(&q_map, dtype, 3, p.q.data, q_size, q_stride, q_box));
    TRY(make_tensor_map(&k_map, dtype, 3, p.kc.data, k_size, k_stride, k_box));
    const SharedMemory smem(p.smem.end + 1024, MAX_SMEM); // 1,024 to align the layout
    return LAUNCH((topk_sm90_kernel<T, D>), (unsigned)blocks, THREADS, smem, stream, p, q_map, k_map);
}

} // namespace

int fsa_max_topk_sm90(const FsaConfig *c) {
    return c->init_blocks + c->local_blocks + LIST_SIZE;
}

int fsa_topk_sm90(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q, ConstRows kc,
                  const float *lse_c, int32_t *block_indices, cudaStream_t stream) {
    if (batch->nq == 0) return FSA_OK;
    TopKParamsSm90 p = {};
    p.batch = *batch;
    p.q = q, p.kc = kc, p.lse = lse_c, p.block_indices = block_indices;
    p.scale = softmax_scale(c) * FSA_LOG2E;
    p.q_heads = c->q_heads, p.kv_heads = c->kv_heads, p.group = c->q_heads / c->kv_heads;
    p.cmp_len = c->cmp_len, p.cmp_stride = c->cmp_stride, p.block = c->block;
    p.topk = c->topk, p.init_blocks = c->init_blocks, p.local_blocks = c->local_blocks;
    p.num_free = p.topk - p.init_blocks - p.local_blocks;
    p.window_strides = p.cmp_len / p.cmp_stride, p.block_strides = p.block / p.cmp_stride;
    p.queries_per_scorer = COLUMNS / 8 / p.group * 8;
    for (int k = 0; k < p.queries_per_scorer / 8 * p.group; k++) {
        p.first_head_mask |= (uint32_t)(k % p.group == 0) << k;
        p.last_head_mask |= (uint32_t)(k % p.group == p.group - 1) << k;
    }
    p.selectors_per_query = 1; // as many as 128 threads and whole blocks allow
    while (block_kind(p) != ANY && 2 * p.selectors_per_query * p.queries_per_scorer <= 128 &&
           P_WINDOWS / (2 * p.selectors_per_query) % p.block_strides == 0)
        p.selectors_per_query *= 2;
    p.free_per_selector = (p.num_free + p.selectors_per_query - 1) / p.selectors_per_query;
    p.selector_warps = (p.selectors_per_query * p.queries_per_scorer + 31) / 32;
    p.max_buffered =
        BUFFER_SIZE -
        (std::min(LOAD_WINDOWS, P_WINDOWS / p.selectors_per_query) + p.block_strides - 1) / p.block_strides;

    // Shared memory that is left is used for two more P stages per scorer, then for a second Q stage, then
    // for more P stages.
    p.q_stages = 1, p.p_stages = 2;
    p.smem = smem_layout(p, c->head_dim);
    auto grow = [&](int *stages, int more) {
        *stages += more;
        SmemLayout larger = smem_layout(p, c->head_dim);
        if (larger.end + 1024 <= MAX_SMEM)
            p.smem = larger;
        else
            *stages -= more;
    };
    grow(&p.p_stages, 2), grow(&p.q_stages, 1);
    for (int i = p.p_stages; i < MAX_P_STAGES; i++) grow(&p.p_stages, 1);

    const int num_sms = fsa_num_sms();
    int64_t tiles =
        max_row_tiles(batch->nq, batch->num_segments, SCORERS * p.queries_per_scorer) * p.kv_heads;
    int blocks = (int)(tiles < num_sms ? tiles : num_sms);
    return FSA_DISPATCH(dtype, c->head_dim, launch_topk_sm90, p, dtype, blocks, stream);
}
