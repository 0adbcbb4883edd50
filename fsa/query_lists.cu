// lists.cu: from the choice [Hkv, Nq, T] to the list of queries of every block: a stable counting sort.
//
// The rows of each (kv head, slab) are cut into parts, a thread block each. One kernel counts how often a
// part names each block. The other finds in these counts where a part's entries belong, sorts them by block
// in shared memory, a chunk at a time, and writes them: those of one block lie side by side, 16 on average
// where 16K entries name 1,024 blocks, so sectors leave whole, also where the lists exceed the L2.
//
// 64K tokens, T = 16, 8 (32) kv heads: 12 bytes an entry, 0.1 (0.4) GB, 0.025 (0.1) ms at 4 TB/s.
// Instructions for 32 entries, as compiled for Hopper: 16 to count, then 26 to find and count the block, 31
// to rank, 15 to write, 9 for the tables: 25 (102) million, 0.05 (0.21) ms at 2.2 a clock and multiprocessor.
// Shared memory is as busy: atomics and scattered accesses of random banks take some 45 clocks for 32
// entries. These two bind.
#include "kernels.h"
#include <limits.h>

enum {
    WARPS = 16, // of a thread block
    THREADS = WARPS * 32,
    COUNTED = 8192,      // selection blocks that are counted at once
    RANGE = 2 * THREADS, // and that are sorted at once, two a thread
    CHUNK = 16384,       // entries that are sorted at once
    AHEAD = 8,           // that a lane loads at once
    RANKED = 8,          // and ranks at once
    SUMMED = 8,          // parts whose counts a thread loads at once
    NONE = 0xffff,       // the key of an entry that is in none of the lists at hand
    WANTED = 512,        // thread blocks: two waves of two a multiprocessor
    MAX_PARTS = 64       // of a slab: each of its thread blocks reads the counts of all
};

struct Choice {
    const int32_t *block_indices;
    int topk, block;
    FastDivisor topk_divisor;
    unsigned init; // the first block that is listed,
    unsigned most; // and how many: one further on is for no position; one below, times block, is an int
    int64_t ahead; // a block is listed for rows from so many tokens after its start on
    int width;     // lanes that rank together: a row's entries, or an equal part of them
};

// Rows of a slab, and the i-th of `parts` equal parts of them.
struct Rows {
    int begin, end;
};
static __device__ __forceinline__ Rows cut(Rows rows, int parts, int i) {
    const int share = (rows.end - rows.begin + parts - 1) / parts;
    const int begin = min(rows.begin + i * share, rows.end);
    return {begin, min(begin + share, rows.end)};
}

// A thread block's part of the rows of one (kv head, slab).
struct Part {
    int64_t list, row0;     // which (head, slab); the slab's first row
    const int32_t *block_indices; // the slab's
    Rows rows;
};
static __device__ __forceinline__ Part part_of(const BatchLayout &p, const QueryLists &lists,
                                               const Choice &choice) {
    const int64_t slab = blockIdx.y, head = blockIdx.z, row0 = slab * lists.slab_rows;
    const int rows = (int)(p.nq - row0 < lists.slab_rows ? p.nq - row0 : lists.slab_rows);
    return {head * lists.num_slabs + slab, row0, choice.block_indices + (head * p.nq + row0) * choice.topk,
            cut({0, rows}, lists.num_splits, (int)blockIdx.x)};
}

// The same for all lanes, as the compiler then knows: it needn't be ready for lanes that go apart.
static __device__ __forceinline__ int this_warp() {
    return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
}

// A warp calls visit(i, end, b, seen) for entries of some rows of the slab, 32 at a time, and so beyond their
// end. b: the block that entry i names, counted from first_block; what it names counts only where `seen`.
template <typename Visit>
static __device__ __forceinline__ void walk(const BatchLayout &p, const Part &part, const Choice &choice,
                                            Rows rows, int64_t first_block, Visit visit) {
    const int lane = threadIdx.x % 32;
    if (rows.begin >= rows.end) return;
    int64_t segment = find_in_cu(p.cu_queries, p.num_segments, part.row0 + rows.begin);
    for (int row = rows.begin; row < rows.end; segment++) {
        const int begin = row * choice.topk;
        const int64_t stop = p.cu_queries[segment + 1] - part.row0;
        row = (int)(stop < rows.end ? stop : rows.end);
        const int end = row * choice.topk;
        const int pos0 = (int)(p.segments[segment].pos + part.row0 - p.cu_queries[segment] -
                               choice.ahead); // of the slab's row 0, less `ahead`
        const int block0 = (int)(p.cu_blocks[p.segments[segment].seq] - first_block);
        int next[AHEAD];
        auto load = [&](int i) {
#pragma unroll
            for (int k = 0; k < AHEAD; k++) next[k] = i + 32 * k < end ? part.block_indices[i + 32 * k] : -1;
        };
        load(begin + lane);
#pragma unroll 1
        for (int i = begin + lane; i < end; i += 32 * AHEAD) {
            int now[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) now[k] = next[k];
            load(i + 32 * AHEAD);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const int slab_row = (int)fast_divide(i + 32 * k, choice.topk_divisor);
                const bool seen =
                    (unsigned)now[k] - choice.init < choice.most && now[k] * choice.block - pos0 <= slab_row;
                visit(i + 32 * k, end, block0 + now[k], seen);
            }
        }
    }
}

// Counts how often a part names each block, in any order. part_counts [Hkv, slabs, parts, blocks].
__global__ void __launch_bounds__(THREADS)
    count_kernel(BatchLayout p, QueryLists lists, Choice choice, uint32_t *part_counts) {
    __shared__ uint32_t counts[COUNTED + 32]; // the last are the lanes' own, for what isn't counted
    const Part part = part_of(p, lists, choice);
    const Rows mine = cut(part.rows, WARPS, this_warp());
    const int64_t blocks = p.cu_blocks[p.num_seqs]; // those that there are; lists.blocks is a bound
    uint32_t *to = part_counts + (part.list * lists.num_splits + blockIdx.x) * lists.max_blocks;
    for (int64_t first = 0; first < blocks; first += COUNTED) {
        const unsigned used = (unsigned)(blocks - first < COUNTED ? blocks - first : COUNTED);
        for (unsigned i = threadIdx.x; i < used; i += THREADS) counts[i] = 0;
        __syncthreads();
        walk(p, part, choice, mine, first, [&](int, int, int b, bool seen) {
            atomicAdd(&counts[seen && (unsigned)b < used ? b : COUNTED + threadIdx.x % 32], 1);
        });
        __syncthreads();
        for (unsigned i = threadIdx.x; i < used; i += THREADS) to[first + i] = counts[i];
    }
}

// A thread has the counts of two blocks of a range, its own number and THREADS beyond. Turns each into the
// sum over the blocks before, and returns the sum over all. Between two calls there is a barrier.
static __device__ __forceinline__ uint32_t prefix(uint32_t counts[2]) {
    __shared__ uint64_t warp_sums[WARPS];
    const int warp = this_warp(), lane = threadIdx.x % 32;
    auto over_lanes = [&](uint64_t x) {
        for (int i = 1; i < 32; i *= 2) {
            const uint64_t other = __shfl_up_sync(0xffffffffu, x, i);
            if (lane >= i) x += other;
        }
        return x;
    };
    const uint64_t own = counts[0] | (uint64_t)counts[1] << 32;
    uint64_t sum = over_lanes(own);
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    const uint64_t sums = over_lanes(lane < WARPS ? warp_sums[lane] : 0);
    const uint64_t all = __shfl_sync(0xffffffffu, sums, 31);
    sum -= own;
    if (warp > 0) sum += __shfl_sync(0xffffffffu, sums, warp - 1);
    counts[0] = (uint32_t)sum;
    counts[1] = (uint32_t)all + (uint32_t)(sum >> 32);
    return (uint32_t)all + (uint32_t)(all >> 32);
}

// A warp's 16-bit numbers, one for each block of a range: words of two, THREADS blocks apart. Then the lanes'
// own words, for what is in none of these blocks: a branch around an atomic takes longer than the atomic.
enum { TABLE = THREADS + 32 };
static __device__ __forceinline__ uint32_t add_one(uint32_t *table, uint32_t b, bool here) {
    return atomicAdd(&table[here ? b % THREADS : THREADS + threadIdx.x % 32], b < THREADS ? 1 : 1 << 16);
}
static __device__ __forceinline__ uint32_t number_of(uint32_t word, uint32_t b) {
    return b < THREADS ? word & 0xffff : word >> 16;
}

// Sorts a part in chunks and writes their entries to their lists.
__global__ void __launch_bounds__(THREADS, 2)
    fill_kernel(BatchLayout p, QueryLists lists, Choice choice, const uint32_t *part_counts) {
    extern __shared__ uint32_t tables[];                         // [WARPS][TABLE]
    uint16_t *const keys = (uint16_t *)(tables + WARPS * TABLE); // of the chunk's entries: their blocks
    uint16_t *const sorted = keys + CHUNK;                       // the entries in order
    const int thread = threadIdx.x, warp = this_warp(), lane = thread % 32, topk = choice.topk;
    uint32_t *const table = tables + warp * TABLE;
    const Part part = part_of(p, lists, choice);
    const int64_t blocks = p.cu_blocks[p.num_seqs];
    const int most = CHUNK / topk, chunks = (part.rows.end - part.rows.begin + most - 1) / most;
    const uint32_t *counts = part_counts + part.list * lists.num_splits * lists.max_blocks;
    uint32_t *offsets = lists.offsets + part.list * (lists.max_blocks + 1);
    uint32_t *entries = lists.entries + (blockIdx.z * p.nq + part.row0) * topk;
    uint32_t below = 0; // entries that name blocks below the range

    for (int64_t first = 0; first < blocks; first += RANGE) {
        // Where the part's entries of the thread's two blocks go: behind lower blocks', and earlier parts'.
        uint32_t to[2] = {0, 0}, before[2] = {0, 0};
        for (int i0 = 0; i0 < lists.num_splits; i0 += SUMMED) {
#pragma unroll
            for (int k = 0; k < 2 * SUMMED; k++) {
                const int i = i0 + k / 2, h = k % 2;
                const int64_t b = first + h * THREADS + thread;
                const uint32_t n = i < lists.num_splits && b < blocks ? counts[i * lists.max_blocks + b] : 0;
                to[h] += n;
                if (i < (int)blockIdx.x) before[h] += n;
            }
        }
        __syncthreads();
        const uint32_t all = prefix(to);
        for (int h = 0; h < 2; h++) {
            const int64_t b = first + h * THREADS + thread;
            to[h] += below;
            if (blockIdx.x == 0 && b < blocks) offsets[b] = to[h];
            to[h] += before[h];
        }
        below += all;
        if (all == 0) continue;

        const int used = (int)(blocks - first < THREADS ? blocks - first : THREADS); // words of a table
        for (int c = 0; c < chunks; c++) {
            const Rows chunk = cut(part.rows, chunks, c), mine = cut(chunk, WARPS, warp);
            const int entry0 = chunk.begin * topk;
            for (int i = lane; i < used; i += 32) table[i] = 0;
            __syncwarp();
            walk(p, part, choice, mine, first, [&](int i, int end, int b, bool seen) {
                const bool here = seen && (unsigned)b < RANGE;
                if (i < end) keys[i - entry0] = (uint16_t)(here ? b : NONE);
                add_one(table, b, here);
            });
            __syncthreads();

            // From how often each warp names a block to where its entries of the block start in `sorted`.
            uint32_t sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += thread < used ? tables[w * TABLE + thread] : 0;
            const uint32_t size[2] = {sum & 0xffff, sum >> 16};
            uint32_t start[2] = {size[0], size[1]};
            const uint32_t total = prefix(start);
            if (total == 0) continue;
            uint32_t at = start[0] | start[1] << 16;
#pragma unroll
            for (int w = 0; w < WARPS && thread < used; w++) {
                const uint32_t count = tables[w * TABLE + thread];
                tables[w * TABLE + thread] = at;
                at += count;
            }
            __syncthreads();

            // A row's blocks are distinct: lanes of one row never meet at a number, and rows take turns.
            const int width = choice.width, turns = 32 / width, turn = lane / width;
            const int end = (mine.end - chunk.begin) * topk;
            for (int i = (mine.begin - chunk.begin) * topk; i < end; i += turns * RANKED * width) {
                const int e = i + turn * RANKED * width + lane % width;
                uint32_t key[RANKED], word[RANKED];
#pragma unroll
                for (int k = 0; k < RANKED; k++)
                    key[k] = turn < turns && e + k * width < end ? keys[e + k * width] : NONE;
                for (int t = 0; t < turns; t++) {
#pragma unroll
                    for (int k = 0; k < RANKED; k++) {
                        if (t == turn) word[k] = add_one(table, key[k], key[k] != NONE);
                        __syncwarp();
                    }
                }
#pragma unroll
                for (int k = 0; k < RANKED; k++) {
                    if (key[k] != NONE) sorted[number_of(word[k], key[k])] = (uint16_t)(e + k * width);
                }
            }
            __syncthreads();

            // The tables have done. In their place: how far a block's entries move from `sorted` to its list.
            for (int h = 0; h < 2; h++) {
                tables[h * THREADS + thread] = to[h] - start[h];
                to[h] += size[h];
            }
            __syncthreads();
            const uint32_t first_entry = (uint32_t)((part.row0 + chunk.begin) * topk);
#pragma unroll 4
            for (uint32_t i = thread; i < total; i += THREADS) {
                const uint32_t e = sorted[i];
                entries[tables[keys[e]] + i] = first_entry + e;
            }
            __syncthreads();
        }
    }
    if (blockIdx.x == 0) {
        for (int64_t i = blocks + thread; i <= lists.max_blocks; i += THREADS) offsets[i] = below;
    }
}

static size_t round_up(size_t x) {
    return (x + 255) / 256 * 256;
}

// Bytes of the arrays.
static size_t entries_bytes(const FsaConfig *c, const BatchLayout *p) {
    return round_up((size_t)c->kv_heads * p->nq * c->topk * sizeof(uint32_t));
}
static size_t offsets_bytes(const FsaConfig *c, const QueryLists *l) {
    return round_up((size_t)c->kv_heads * l->num_slabs * (l->max_blocks + 1) * sizeof(uint32_t));
}

// All but the pointers.
static QueryLists shape_of(const FsaConfig *c, const BatchLayout *p, int64_t slab) {
    QueryLists l = {slab, (p->nq + slab - 1) / slab, fsa_max_blocks(c, p), 1, 0, 0, NULL, NULL};
    const int64_t lists = c->kv_heads * l.num_slabs, entries = (p->nq < slab ? p->nq : slab) * c->topk;
    while (l.num_splits < MAX_PARTS && l.num_splits * lists < WANTED && l.num_splits * (CHUNK / 4) < entries) l.num_splits++;
    return l;
}

size_t fsa_query_lists_bytes(const FsaConfig *c, const BatchLayout *p, int64_t slab) {
    QueryLists l = shape_of(c, p, slab);
    return entries_bytes(c, p) + offsets_bytes(c, &l);
}

// For as many parts as shape_of may make of so many lists: all but one of each are fewer than WANTED.
size_t fsa_query_lists_scratch_bytes(const FsaConfig *c, const BatchLayout *p, int64_t slab) {
    QueryLists l = shape_of(c, p, slab);
    const int64_t lists = c->kv_heads * l.num_slabs;
    const int64_t counted = lists * MAX_PARTS < WANTED + lists ? lists * MAX_PARTS : WANTED + lists;
    return round_up((size_t)counted * l.max_blocks * sizeof(uint32_t));
}

QueryLists fsa_query_lists_at(const FsaConfig *c, const BatchLayout *p, int64_t slab, void *memory) {
    QueryLists l = shape_of(c, p, slab);
    l.entries = (uint32_t *)memory;
    l.offsets = (uint32_t *)((char *)memory + entries_bytes(c, p));
    return l;
}

int fsa_query_lists(const FsaConfig *c, const BatchLayout *p, const int32_t *block_indices, const QueryLists *lists,
              void *workspace, cudaStream_t stream) {
    if (lists->slab_rows > FSA_MAX_SLAB || p->nq * c->topk > INT32_MAX || lists->max_blocks > INT32_MAX / 2 ||
        lists->num_slabs > 65535) {
        return FSA_ERROR_ARGUMENT;
    }
    if (p->nq == 0) return FSA_OK;
    const int most = (1 << 30) / c->block + 1 - lists->init_blocks - lists->local_blocks;
    Choice choice = {block_indices,
                     c->topk,
                     c->block,
                     make_fast_divisor(c->topk),
                     (unsigned)lists->init_blocks,
                     most > 0 ? (unsigned)most : 0,
                     (int64_t)lists->local_blocks * c->block,
                     0};
    choice.width = c->topk < 32 ? c->topk : 32;
    while (c->topk % choice.width) choice.width--;
    const int smem = WARPS * TABLE * (int)sizeof(uint32_t) + 2 * CHUNK * (int)sizeof(uint16_t);
    if (cudaFuncSetAttribute(fill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem) != cudaSuccess)
        return FSA_ERROR_CUDA;
    dim3 grid((unsigned)lists->num_splits, (unsigned)lists->num_slabs, (unsigned)c->kv_heads);
    count_kernel<<<grid, THREADS, 0, stream>>>(*p, *lists, choice, (uint32_t *)workspace);
    fill_kernel<<<grid, THREADS, smem, stream>>>(*p, *lists, choice, (const uint32_t *)workspace);
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}
