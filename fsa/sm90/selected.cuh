// selected_sm90.cu: the selected branch's main kernels for Hopper: gathered rows by cp.async into a ring of
// stages, products by wgmma, a warpgroup of producers beside those that compute. selected.cuh says how the
// work is cut; selected.cu has the reductions and launches these.
#ifndef FSA_SM90_SELECTED_CUH
#define FSA_SM90_SELECTED_CUH
#include "../selected.cuh"
#include "ptx.cuh"
#include "tma.cuh"
#include <type_traits>

// Number `index` of what passes through a ring of COUNT stages: its stage, and the parity of its round.
template <int COUNT> struct Turn {
    uint32_t stage, round;
    __device__ __forceinline__ Turn(uint32_t index) : stage(index % COUNT), round(index / COUNT) {}
    __device__ __forceinline__ int parity() const { return (int)(round & 1); }
    // Before the stage is filled: all are done with what it held a round ago.
    __device__ __forceinline__ void wait_empty(uint32_t barriers) const {
        if (round > 0) mbarrier_wait(barriers + 8 * stage, (int)(round - 1 & 1));
    }
    __device__ __forceinline__ void wait_full(uint32_t barriers) const {
        mbarrier_wait(barriers + 8 * stage, parity());
    }
};

// The same of who takes every STEP-th.
template <int COUNT, int STEP> struct Steps {
    static_assert(COUNT % STEP == 0, "a stage is one's own");
    uint32_t stage;
    int parity = 0;
    __device__ __forceinline__ Steps(uint32_t first) : stage(first) {}
    __device__ __forceinline__ void next() {
        if ((stage += STEP) >= COUNT) stage -= COUNT, parity ^= 1;
    }
};

// A producer's way through the runs of its share. Whole warps use it; lane i holds the offset of block
// first_block + i, so that most steps read nothing.
struct KvBlockIterator {
    Run run;
    bool more; // there is such a run
    __device__ __forceinline__ KvBlockIterator(const SelectedParams &a, const Share &s) {
        run.begin = s.begin, run.count = 0;
        seq_end = 0;
        load(a, s, (int)s.block);
        next(a, s);
    }
    __device__ __forceinline__ void next(const SelectedParams &a, const Share &s) {
        run.begin += run.count;
        more = run.begin < s.end;
        if (!more) return;
        unsigned beyond; // blocks that nobody chose are passed over
        while (!(beyond = __ballot_sync(0xffffffffu, offset > run.begin))) load(a, s, first_block + 31);
        const int i = __ffs((int)beyond) - 1;
        run.index = first_block + i - 1;
        run.first = __shfl_sync(0xffffffffu, offset, i - 1), run.last = __shfl_sync(0xffffffffu, offset, i);
        run.count = min(s.end, run.last) - run.begin;
        find_block(a);
    }

  private:
    int first_block;
    uint32_t offset;
    int block0, seq_end; // of the run's sequence: its first block, and the first beyond it
    int64_t key0;        // and its keys
    int keys;
    __device__ __forceinline__ void load(const SelectedParams &a, const Share &s, int from) {
        first_block = from;
        offset = s.offsets[min(from + (int)threadIdx.x % 32, (int)a.lists.max_blocks)];
    }
    __device__ __forceinline__ void find_block(const SelectedParams &a) {
        if (run.index >= seq_end) {
            const int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, run.index);
            block0 = (int)a.batch.cu_blocks[seq], seq_end = (int)a.batch.cu_blocks[seq + 1];
            key0 = a.batch.cu_seqlens[seq], keys = (int)(a.batch.cu_seqlens[seq + 1] - key0);
        }
        run.block = run.index - block0;
        run.key0 = key0 + (int64_t)run.block * a.block;
        run.keys = min(a.block, keys - run.block * a.block);
    }
};

// Rows past the run's end repeat its last one, with partial = NONE.
enum : uint32_t { NONE = 0xffffffffu };
struct TileRows {
    uint32_t row[2];     // of q, [Nq*Hq]
    uint32_t partial[2]; // row of the partials
    int limit[2];        // last visible key of the part
};

// A gathering warp's way through its tiles, every TILES-th of a share's: 64 rows of a run (g an entry,
// packed), of which lane i looks after rows i and i + 32. Entries are loaded a tile ahead, those of the next
// run, too.
template <int TILES> struct GatherTileIterator {
    KvBlockIterator runs;
    __device__ __forceinline__ GatherTileIterator(const SelectedParams &a, const Share &s, int first)
        : runs(a, s), part(0), tile(first), row0(0), rows(0) {
        if (runs.more) find(a, s);
    }
    __device__ __forceinline__ void next(const SelectedParams &a, const Share &s) {
        tile += TILES;
        find(a, s);
    }
    // entry0: the entry whose partial is the first.
    __device__ __forceinline__ TileRows take(const SelectedParams &a, uint32_t entry0) {
        TileRows t;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t r = row_of(i), at = fast_divide(r, a.group_divisor);
            const bool valid = at < runs.run.count;
            const uint32_t in_group = valid ? r - at * a.group : a.group - 1;
            const uint32_t row = fast_divide(entry[i], a.topk_divisor);
            t.row[i] = row * a.q_heads + (a.head0 + blockIdx.y) * a.group + in_group;
            t.partial[i] = valid ? ((entry[i] - entry0) * a.parts + part) * a.group + in_group : NONE;
            t.limit[i] = last_key(a, at, row) - part * a.keys;
        }
        return t;
    }

  private:
    int part, tile;      // of the run: its part, and the part's tile
    uint32_t entry[2];   // what the list has there
    uint32_t row0, rows; // of the segment of the last row that was looked up
    int block_pos;       // row0's position in it, less its own number
    __device__ __forceinline__ uint32_t row_of(int i) const {
        return tile * 64 + threadIdx.x % 32 + 32 * i;
    }
    // Finds the run and part that the tile is in.
    __device__ __forceinline__ void find(const SelectedParams &a, const Share &s) {
        for (;;) {
            const int tiles = ((int)runs.run.count * a.group + 63) / 64;
            if (tile < tiles) break;
            tile -= tiles;
            if (++part < a.parts) continue;
            part = 0;
            runs.next(a, s);
            if (!runs.more) return;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            entry[i] = s.entries[runs.run.begin + min(fast_divide(row_of(i), a.group_divisor), runs.run.count - 1)];
    }
    // The last key of the block that the query sees. Lists ascend by row, so only the first `block` queries
    // from the list's start can lie in the block itself; the rest see all of it.
    __device__ __forceinline__ int last_key(const SelectedParams &a, uint32_t at, uint32_t row) {
        const Run &run = runs.run;
        if (run.begin - run.first + min(at, run.count - 1) >= (uint32_t)a.block) return run.keys - 1;
        if (row - row0 >= rows) {
            const int64_t segment = find_in_cu(a.batch.cu_queries, a.batch.num_segments, row);
            row0 = (uint32_t)a.batch.cu_queries[segment];
            rows = (uint32_t)a.batch.cu_queries[segment + 1] - row0;
            block_pos = (int)(a.batch.segments[segment].pos - row0);
        }
        return min(run.keys - 1, block_pos + (int)row - run.block * a.block);
    }
};

// Starts the copies of a tile's 64 rows. An address made in the register of the one before waits until that
// one's copy has read it, and for a shuffle: so there are to be BATCH addresses before the first is used. (At
// d = 128 ptxas makes them one after the other all the same; with registers for several it was no faster.)
template <typename T, int D, int BATCH>
static __device__ __forceinline__ void gather(uint32_t tile, const void *rows, const uint32_t (&row)[2]) {
    constexpr int CHUNKS = D / 8, ROWS = 32 / CHUNKS;
    constexpr int PERIOD = 8 / ROWS; // of the swizzle, in steps of ROWS rows
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS, sub = lane / CHUNKS;
    const char *from = (const char *)rows + chunk * 16;
    keep_in_registers(from);
    uint32_t to[PERIOD];
#pragma unroll
    for (int i = 0; i < PERIOD; i++) to[i] = tile + panel_offset(i * ROWS + sub, chunk, 64 * 128);
#pragma unroll
    for (int i0 = 0; i0 < 64 / ROWS; i0 += BATCH) {
        const char *at[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int r = (i0 + i) * ROWS;
            at[i] = from + __shfl_sync(0xffffffffu, row[r / 32], r % 32 + sub) * (uint64_t)(D * 2);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) keep_in_registers(at[i]);
#pragma unroll
        for (int i = 0; i < BATCH; i++) cp_async_16(to[(i0 + i) % PERIOD] + (i0 + i) / PERIOD * 1024, at[i]);
    }
}

// Starts the copies of a short block's K and V rows; rows that it lacks become zeros.
template <typename T, int D, int KEYS>
static __device__ __forceinline__ void load_kv(const SelectedParams &a, const Run &run, int part, uint32_t k_tile,
                                               uint32_t v_tile) {
    constexpr int CHUNKS = D / 8;
    const int64_t stride = (int64_t)a.kv_heads * D;
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS, keys = run.keys - part * KEYS;
    const int64_t head = (a.head0 + blockIdx.y) * D + chunk * 8;
#pragma unroll 2
    for (int r = lane / CHUNKS; r < KEYS; r += 32 / CHUNKS) {
        bool valid = r < keys;
        int64_t from = (run.key0 + (valid ? part * KEYS + r : 0)) * stride + head;
        uint32_t to = panel_offset(r, chunk, KEYS * 128);
        cp_async_16(k_tile + to, (const T *)a.k + from, valid);
        cp_async_16(v_tile + to, (const T *)a.v + from, valid);
    }
}

// A map of k or v, by a part of a block.
template <typename T, int D, int KEYS>
static int key_map(const SelectedParams &a, const void *keys, CUtensorMap *map) {
    int64_t size[] = {D, a.kv_heads, a.batch.n}, stride[] = {2, D * 2, (int64_t)a.kv_heads * D * 2};
    int box[] = {64, 1, KEYS};
    return make_tensor_map(map, std::is_same<T, __half>::value ? FSA_FP16 : FSA_BF16, 3, keys, size, stride,
                          box);
}
// f for the element type, head size and keys of a part.
#define DISPATCH(f)                                                                                          \
    (dtype == FSA_BF16 ? head_dim == 64 ? a.keys == 64 ? f<__nv_bfloat16, 64, 64>(a, heads, stream)          \
                                                       : f<__nv_bfloat16, 64, 128>(a, heads, stream)         \
                         : a.keys == 64 ? f<__nv_bfloat16, 128, 64>(a, heads, stream)                        \
                                        : f<__nv_bfloat16, 128, 128>(a, heads, stream)                       \
     : head_dim == 64                                                                                        \
         ? a.keys == 64 ? f<__half, 64, 64>(a, heads, stream) : f<__half, 64, 128>(a, heads, stream)         \
     : a.keys == 64 ? f<__half, 128, 64>(a, heads, stream)                                                   \
                    : f<__half, 128, 128>(a, heads, stream))

#endif
