// query_lists.cu: computes the query list of every block from block_indices [Hkv, Nq, T], in CSR form
// (QueryLists, kernels.h). It is a stable counting sort of the entries query*T + slot by the block that they
// name.
//
// The queries of each (KV head, slab) are divided among num_splits thread blocks:
//   count_kernel  histogram of each split over the blocks -> split_counts
//   fill_kernel   offsets of the lists, and of each split within a list, from split_counts. Then per chunk of
//                 16K entries: histogram per warp -> exclusive scan -> sort in shared memory -> write.
// The sort makes entries of one block adjacent before they are written: 16 on average if 16K entries name
// 1,024 blocks. So the writes fill whole sectors, even if the lists exceed the L2. The order of splits, warps
// and queries determines the ranks, so the results are bitwise reproducible.
//
// Lower bounds for 64K tokens, T = 16:                       8 KV heads    32 KV heads
//     HBM, 12 bytes per entry                                0.02 ms       0.09 ms
//     instructions: 97 per 32 entries, 2.2 per clock and SM  0.05 ms       0.20 ms
//     shared memory: 45 clocks per 32 entries                0.05 ms       0.20 ms
// The 97 instructions (SASS, sm_90) are 16 in count_kernel; in fill_kernel 26 to find and count the block,
// 31 to rank, 15 to write, 9 for the tables. Shared memory serves atomics and scattered accesses to random
// banks. The kernels are limited by instruction issue and shared memory.
#include "kernels.h"
#include "launch.cuh"
#include <limits.h>

enum {
    WARPS = 16, // of a thread block
    THREADS = WARPS * 32,
    COUNT_BLOCKS = 8192,        // selection blocks counted per pass over the entries
    SORT_BLOCKS = 2 * THREADS,  // selection blocks sorted per pass, two per thread
    CHUNK = 16384,              // entries sorted at once in shared memory
    LOAD_BATCH = 8,             // entries a lane loads ahead
    RANK_BATCH = 8,             // entries a lane ranks at once
    SUM_BATCH = 8,              // splits whose counts a thread loads at once
    NOT_LISTED = 0xffff,        // sort key of an entry that is in none of the current SORT_BLOCKS lists
    TARGET_THREAD_BLOCKS = 512, // two waves of two thread blocks per SM
    MAX_SPLITS = 64             // limited, since each thread block reads the counts of all splits
};

struct ListParams {
    const int32_t *block_indices; // [Hkv, Nq, T]
    int topk, block;              // T, B
    FastDivisor topk_divisor;
    // Block b of the query at position pos is listed if first_block <= b < first_block + num_listed and
    // b*B + local_tokens <= pos. num_listed keeps b*B in an int.
    unsigned first_block, num_listed;
    int64_t local_tokens; // local_blocks * B
    int rank_width;       // lanes that rank the entries of one query: the largest divisor of T up to 32
};

// Queries of a slab. split_queries returns the i-th of `count` equal parts of them.
struct QueryRange {
    int begin, end;
};
static __device__ __forceinline__ QueryRange split_queries(QueryRange queries, int count, int i) {
    const int size = (queries.end - queries.begin + count - 1) / count;
    const int begin = min(queries.begin + i * size, queries.end);
    return {begin, min(begin + size, queries.end)};
}

// A thread block's split of the queries of one (KV head, slab).
struct Split {
    int64_t list, first_query;    // kv_head * num_slabs + slab; the slab's first query
    const int32_t *block_indices; // of the slab
    QueryRange queries;           // of the split
};
static __device__ __forceinline__ Split get_split(const BatchLayout &batch, const QueryLists &lists,
                                                  const ListParams &params) {
    const int64_t slab = blockIdx.y, kv_head = blockIdx.z, first_query = slab * lists.slab_queries;
    const int queries =
        (int)(batch.nq - first_query < lists.slab_queries ? batch.nq - first_query : lists.slab_queries);
    return {kv_head * lists.num_slabs + slab, first_query,
            params.block_indices + (kv_head * batch.nq + first_query) * params.topk,
            split_queries({0, queries}, lists.num_splits, (int)blockIdx.x)};
}

// The shuffle tells the compiler that the index is warp-uniform, so it emits no code for divergent lanes.
static __device__ __forceinline__ int warp_index() {
    return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
}

// A warp calls visit(i, end, b, listed) for the entries of `queries` of the slab, 32 consecutive entries at
// a time. b is the block that entry i names, counted from first_block. b is valid only if `listed`. Entries
// i >= end are visited too, with listed = false.
template <typename Visit>
static __device__ __forceinline__ void for_each_entry(const BatchLayout &batch, const Split &split,
                                                      const ListParams &params, QueryRange queries,
                                                      int64_t first_block, Visit visit) {
    const int lane = threadIdx.x % 32;
    if (queries.begin >= queries.end) return;
    int64_t segment = find_in_cu(batch.cu_queries, batch.num_segments, split.first_query + queries.begin);
    for (int query = queries.begin; query < queries.end; segment++) {
        const int begin = query * params.topk;
        const int64_t segment_end = batch.cu_queries[segment + 1] - split.first_query;
        query = (int)(segment_end < queries.end ? segment_end : queries.end);
        const int end = query * params.topk;
        const int pos0 = (int)(batch.segments[segment].pos + split.first_query - batch.cu_queries[segment] -
                               params.local_tokens); // position of the slab's query 0, minus local_tokens
        const int block0 = (int)(batch.cu_blocks[batch.segments[segment].seq] - first_block);
        int next[LOAD_BATCH];
        auto load = [&](int i) {
#pragma unroll
            for (int k = 0; k < LOAD_BATCH; k++)
                next[k] = i + 32 * k < end ? split.block_indices[i + 32 * k] : -1;
        };
        load(begin + lane);
#pragma unroll 1
        for (int i = begin + lane; i < end; i += 32 * LOAD_BATCH) {
            int current[LOAD_BATCH];
#pragma unroll
            for (int k = 0; k < LOAD_BATCH; k++) current[k] = next[k];
            load(i + 32 * LOAD_BATCH);
#pragma unroll
            for (int k = 0; k < LOAD_BATCH; k++) {
                const int slab_query = (int)fast_divide(i + 32 * k, params.topk_divisor);
                const bool listed = (unsigned)current[k] - params.first_block < params.num_listed &&
                                    current[k] * params.block - pos0 <= slab_query;
                visit(i + 32 * k, end, block0 + current[k], listed);
            }
        }
    }
}

// split_counts [Hkv, num_slabs, num_splits, max_blocks] = how often a split names each block. The
// atomics are integer, so their order does not matter.
__global__ void __launch_bounds__(THREADS)
    count_kernel(BatchLayout batch, QueryLists lists, ListParams params, uint32_t *split_counts) {
    __shared__ uint32_t counts[COUNT_BLOCKS + 32]; // the last 32, one per lane, count unlisted entries
    const Split split = get_split(batch, lists, params);
    const QueryRange warp_queries = split_queries(split.queries, WARPS, warp_index());
    const int64_t blocks = batch.cu_blocks[batch.num_seqs]; // actual blocks; max_blocks is a bound
    uint32_t *out = split_counts + (split.list * lists.num_splits + blockIdx.x) * lists.max_blocks;
    for (int64_t first = 0; first < blocks; first += COUNT_BLOCKS) {
        const unsigned num_blocks = (unsigned)(blocks - first < COUNT_BLOCKS ? blocks - first : COUNT_BLOCKS);
        for (unsigned i = threadIdx.x; i < num_blocks; i += THREADS) counts[i] = 0;
        __syncthreads();
        for_each_entry(batch, split, params, warp_queries, first, [&](int, int, int b, bool listed) {
            atomicAdd(&counts[listed && (unsigned)b < num_blocks ? b : COUNT_BLOCKS + threadIdx.x % 32], 1);
        });
        __syncthreads();
        for (unsigned i = threadIdx.x; i < num_blocks; i += THREADS) out[first + i] = counts[i];
    }
}

// Exclusive scan over SORT_BLOCKS counts of a thread block. A thread passes the counts of blocks threadIdx.x
// and threadIdx.x + THREADS, and gets their prefix sums. Returns the total. Two calls need a barrier between
// them.
static __device__ __forceinline__ uint32_t exclusive_scan(uint32_t counts[2]) {
    __shared__ uint64_t warp_sums[WARPS];
    const int warp = warp_index(), lane = threadIdx.x % 32;
    auto inclusive_scan = [&](uint64_t x) {
        for (int i = 1; i < 32; i *= 2) {
            const uint64_t other = __shfl_up_sync(0xffffffffu, x, i);
            if (lane >= i) x += other;
        }
        return x;
    };
    const uint64_t own = counts[0] | (uint64_t)counts[1] << 32;
    uint64_t sum = inclusive_scan(own);
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    const uint64_t scanned_warp_sums = inclusive_scan(lane < WARPS ? warp_sums[lane] : 0);
    const uint64_t total = __shfl_sync(0xffffffffu, scanned_warp_sums, 31);
    sum -= own;
    if (warp > 0) sum += __shfl_sync(0xffffffffu, scanned_warp_sums, warp - 1);
    counts[0] = (uint32_t)sum;
    counts[1] = (uint32_t)total + (uint32_t)(sum >> 32);
    return (uint32_t)total + (uint32_t)(total >> 32);
}

// A warp's table: 16-bit counters, one per block of the current SORT_BLOCKS. A word holds the counters of
// blocks w and w + THREADS. Another 32 words, one per lane, count entries that are in no list: a branch
// around the atomic costs more than the atomic.
enum { TABLE_WORDS = THREADS + 32 };
static __device__ __forceinline__ uint32_t table_add(uint32_t *table, uint32_t b, bool listed) {
    return atomicAdd(&table[listed ? b % THREADS : THREADS + threadIdx.x % 32], b < THREADS ? 1 : 1 << 16);
}
static __device__ __forceinline__ uint32_t counter_of(uint32_t word, uint32_t b) {
    return b < THREADS ? word & 0xffff : word >> 16;
}

// The shared memory of fill_kernel.
struct SortSmem {
    uint32_t *tables; // [WARPS][TABLE_WORDS]
    uint16_t *keys;   // [CHUNK] the block of each entry
    uint16_t *sorted; // [CHUNK] the entries in order of block
};

// Returns the position in the slab's entries of this split's first entry of each of the thread's two blocks
// (first + threadIdx.x and + THREADS), in dest, after the entries of lower blocks and of earlier splits. Adds
// the entries of these SORT_BLOCKS blocks to *base, the entries of the blocks before `first`, and returns
// their number. The first split also writes the offsets of the lists.
static __device__ __forceinline__ uint32_t find_destinations(const QueryLists &lists, const uint32_t *counts,
                                                             uint32_t *offsets, int64_t first, int64_t blocks,
                                                             uint32_t *base, uint32_t (&dest)[2]) {
    uint32_t before[2] = {0, 0};
    dest[0] = dest[1] = 0;
    for (int i0 = 0; i0 < lists.num_splits; i0 += SUM_BATCH) {
#pragma unroll
        for (int k = 0; k < 2 * SUM_BATCH; k++) {
            const int i = i0 + k / 2, h = k % 2;
            const int64_t b = first + h * THREADS + threadIdx.x;
            const uint32_t n = i < lists.num_splits && b < blocks ? counts[i * lists.max_blocks + b] : 0;
            dest[h] += n;
            if (i < (int)blockIdx.x) before[h] += n;
        }
    }
    __syncthreads();
    const uint32_t total = exclusive_scan(dest);
    for (int h = 0; h < 2; h++) {
        const int64_t b = first + h * THREADS + threadIdx.x;
        dest[h] += *base;
        if (blockIdx.x == 0 && b < blocks) offsets[b] = dest[h];
        dest[h] += before[h];
    }
    *base += total;
    return total;
}

// Replaces each warp's counts of a block by the start of its entries of that block in `sorted`. size, start:
// the entries of the thread's two blocks in the chunk, and where they begin in `sorted`. Returns the listed
// entries of the chunk. table_words: words of a table that are in use.
static __device__ __forceinline__ uint32_t scan_tables(const SortSmem &smem, int table_words,
                                                       uint32_t (&size)[2], uint32_t (&start)[2]) {
    const int thread = threadIdx.x;
    uint32_t sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += thread < table_words ? smem.tables[w * TABLE_WORDS + thread] : 0;
    start[0] = size[0] = sum & 0xffff, start[1] = size[1] = sum >> 16;
    const uint32_t total = exclusive_scan(start);
    if (total == 0) return 0;
    uint32_t next_start = start[0] | start[1] << 16;
#pragma unroll
    for (int w = 0; w < WARPS && thread < table_words; w++) {
        const uint32_t count = smem.tables[w * TABLE_WORDS + thread];
        smem.tables[w * TABLE_WORDS + thread] = next_start;
        next_start += count;
    }
    return total;
}

// Sorts a warp's entries `begin` .. end - 1 of the chunk: sorted[rank] = entry. The atomic returns the rank,
// the entry's index in `sorted`. The blocks of a query are distinct, so lanes of one query never share a
// counter. Queries add one after the other, so the order is fixed. rank_width: ListParams.
static __device__ __forceinline__ void rank_entries(const SortSmem &smem, uint32_t *table, int begin, int end,
                                                    int rank_width) {
    const int lane = threadIdx.x % 32, width = rank_width, queries_at_once = 32 / width,
              query_index = lane / width;
    for (int i = begin; i < end; i += queries_at_once * RANK_BATCH * width) {
        const int e = i + query_index * RANK_BATCH * width + lane % width;
        uint32_t key[RANK_BATCH], word[RANK_BATCH];
#pragma unroll
        for (int k = 0; k < RANK_BATCH; k++)
            key[k] =
                query_index < queries_at_once && e + k * width < end ? smem.keys[e + k * width] : NOT_LISTED;
        for (int t = 0; t < queries_at_once; t++) {
#pragma unroll
            for (int k = 0; k < RANK_BATCH; k++) {
                if (t == query_index) word[k] = table_add(table, key[k], key[k] != NOT_LISTED);
                __syncwarp();
            }
        }
#pragma unroll
        for (int k = 0; k < RANK_BATCH; k++) {
            if (key[k] != NOT_LISTED) smem.sorted[counter_of(word[k], key[k])] = (uint16_t)(e + k * width);
        }
    }
}

// Writes the `total` listed entries of a chunk to their lists. first_entry: the chunk's entry 0. Advances
// dest by the thread's blocks. The tables are reused: tables[b] = distance from `sorted` to the list of block
// b.
static __device__ __forceinline__ void write_entries(const SortSmem &smem, uint32_t *entries,
                                                     uint32_t first_entry, uint32_t total,
                                                     const uint32_t (&size)[2], const uint32_t (&start)[2],
                                                     uint32_t (&dest)[2]) {
    for (int h = 0; h < 2; h++) {
        smem.tables[h * THREADS + threadIdx.x] = dest[h] - start[h];
        dest[h] += size[h];
    }
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < total; i += THREADS) {
        const uint32_t e = smem.sorted[i];
        entries[smem.tables[smem.keys[e]] + i] = first_entry + e;
    }
}

// Sorts the entries of a split in chunks and writes them to their lists; writes the offsets of the lists.
__global__ void __launch_bounds__(THREADS, 2)
    fill_kernel(BatchLayout batch, QueryLists lists, ListParams params, const uint32_t *split_counts) {
    extern __shared__ uint32_t tables[];
    uint16_t *const keys = (uint16_t *)(tables + WARPS * TABLE_WORDS);
    const SortSmem smem = {tables, keys, keys + CHUNK};
    const int warp = warp_index(), lane = threadIdx.x % 32, topk = params.topk;
    uint32_t *const table = tables + warp * TABLE_WORDS;
    const Split split = get_split(batch, lists, params);
    const int64_t blocks = batch.cu_blocks[batch.num_seqs];
    const int chunk_queries = CHUNK / topk,
              num_chunks = (split.queries.end - split.queries.begin + chunk_queries - 1) / chunk_queries;
    const uint32_t *counts = split_counts + split.list * lists.num_splits * lists.max_blocks;
    uint32_t *offsets = lists.offsets + split.list * (lists.max_blocks + 1);
    uint32_t *entries = lists.entries + (blockIdx.z * batch.nq + split.first_query) * topk;
    uint32_t base = 0; // entries of the blocks before `first`

    for (int64_t first = 0; first < blocks; first += SORT_BLOCKS) {
        uint32_t dest[2];
        if (find_destinations(lists, counts, offsets, first, blocks, &base, dest) == 0) continue;
        const int table_words = (int)(blocks - first < THREADS ? blocks - first : THREADS); // in use
        for (int c = 0; c < num_chunks; c++) {
            // Find the block of each entry, and count the blocks per warp.
            const QueryRange chunk = split_queries(split.queries, num_chunks, c),
                             warp_queries = split_queries(chunk, WARPS, warp);
            const int entry0 = chunk.begin * topk;
            for (int i = lane; i < table_words; i += 32) table[i] = 0;
            __syncwarp();
            for_each_entry(batch, split, params, warp_queries, first,
                           [&](int i, int end, int b, bool listed) {
                               const bool listed_here = listed && (unsigned)b < SORT_BLOCKS;
                               if (i < end) keys[i - entry0] = (uint16_t)(listed_here ? b : NOT_LISTED);
                               table_add(table, b, listed_here);
                           });
            __syncthreads();
            uint32_t size[2], start[2];
            const uint32_t total = scan_tables(smem, table_words, size, start);
            if (total == 0) continue;
            __syncthreads();
            rank_entries(smem, table, (warp_queries.begin - chunk.begin) * topk,
                         (warp_queries.end - chunk.begin) * topk, params.rank_width);
            __syncthreads();
            write_entries(smem, entries, (uint32_t)((split.first_query + chunk.begin) * topk), total, size,
                          start, dest);
            __syncthreads();
        }
    }
    if (blockIdx.x == 0) {
        for (int64_t i = blocks + threadIdx.x; i <= lists.max_blocks; i += THREADS) offsets[i] = base;
    }
}

static size_t round_up(size_t x) {
    return (x + 255) / 256 * 256;
}

static size_t entries_bytes(const FsaConfig *c, const BatchLayout *batch) {
    return round_up((size_t)c->kv_heads * batch->nq * c->topk * sizeof(uint32_t));
}
static size_t offsets_bytes(const FsaConfig *c, const QueryLists *l) {
    return round_up((size_t)c->kv_heads * l->num_slabs * (l->max_blocks + 1) * sizeof(uint32_t));
}

// Returns the query lists without the pointers.
static QueryLists list_shape(const FsaConfig *c, const BatchLayout *batch, int64_t slab_queries) {
    QueryLists l = {
        slab_queries, (batch->nq + slab_queries - 1) / slab_queries, fsa_max_blocks(c, batch), 1, 0, 0, NULL,
        NULL};
    const int64_t num_lists = c->kv_heads * l.num_slabs,
                  entries = (batch->nq < slab_queries ? batch->nq : slab_queries) * c->topk;
    while (l.num_splits < MAX_SPLITS && l.num_splits * num_lists < TARGET_THREAD_BLOCKS &&
           l.num_splits * (CHUNK / 4) < entries)
        l.num_splits++;
    return l;
}

size_t fsa_query_lists_bytes(const FsaConfig *c, const BatchLayout *batch, int64_t slab_queries) {
    QueryLists l = list_shape(c, batch, slab_queries);
    return entries_bytes(c, batch) + offsets_bytes(c, &l);
}

// Returns the bytes of split_counts, for the largest num_splits that list_shape may return with num_lists
// lists: (num_splits - 1) * num_lists < TARGET_THREAD_BLOCKS.
size_t fsa_query_lists_scratch_bytes(const FsaConfig *c, const BatchLayout *batch, int64_t slab_queries) {
    QueryLists l = list_shape(c, batch, slab_queries);
    const int64_t num_lists = c->kv_heads * l.num_slabs;
    const int64_t total_splits = num_lists * MAX_SPLITS < TARGET_THREAD_BLOCKS + num_lists
                                     ? num_lists * MAX_SPLITS
                                     : TARGET_THREAD_BLOCKS + num_lists;
    return round_up((size_t)total_splits * l.max_blocks * sizeof(uint32_t));
}

QueryLists fsa_query_lists_at(const FsaConfig *c, const BatchLayout *batch, int64_t slab_queries,
                              void *memory) {
    QueryLists l = list_shape(c, batch, slab_queries);
    l.entries = (uint32_t *)memory;
    l.offsets = (uint32_t *)((char *)memory + entries_bytes(c, batch));
    return l;
}

int fsa_query_lists(const FsaConfig *c, const BatchLayout *batch, const int32_t *block_indices,
                    const QueryLists *lists, void *scratch, cudaStream_t stream) {
    if (lists->slab_queries > FSA_MAX_SLAB || batch->nq * c->topk > INT32_MAX ||
        lists->max_blocks > INT32_MAX / 2 || lists->num_slabs > 65535) {
        return FSA_ERROR_ARGUMENT;
    }
    if (batch->nq == 0) return FSA_OK;
    const int num_listed = (1 << 30) / c->block + 1 - lists->init_blocks - lists->local_blocks;
    ListParams params = {block_indices,
                         c->topk,
                         c->block,
                         make_fast_divisor(c->topk),
                         (unsigned)lists->init_blocks,
                         num_listed > 0 ? (unsigned)num_listed : 0,
                         (int64_t)lists->local_blocks * c->block,
                         0};
    params.rank_width = c->topk < 32 ? c->topk : 32;
    while (c->topk % params.rank_width) params.rank_width--;
    const int smem = WARPS * TABLE_WORDS * (int)sizeof(uint32_t) + 2 * CHUNK * (int)sizeof(uint16_t);
    dim3 grid((unsigned)lists->num_splits, (unsigned)lists->num_slabs, (unsigned)c->kv_heads);
    TRY(LAUNCH(count_kernel, grid, THREADS, 0, stream, *batch, *lists, params, (uint32_t *)scratch));
    return LAUNCH(fill_kernel, grid, THREADS, smem, stream, *batch, *lists, params,
                  (const uint32_t *)scratch);
}
