// sm90/selected.cuh: shared by the selected branch's forward and backward kernels for Hopper: the producer
// warps' iterators over a work range (../selected.cuh), and the loads of gathered rows and of K and V.
#ifndef FSA_SM90_SELECTED_CUH
#define FSA_SM90_SELECTED_CUH
#include "../selected.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"
#include "tma.cuh"
#include <type_traits>

// Iterates over the KV blocks of a work range that have a nonempty query list. All lanes of a warp must call
// its functions: lane i holds the offset of block first_block + i, so most steps read no memory.
struct KvBlockIterator {
    KvBlockEntries kv_block;
    bool valid; // false past the last block
    __device__ __forceinline__ KvBlockIterator(const SelectedParams &a, const WorkRange &range) {
        kv_block.entry_begin = range.begin, kv_block.num_entries = 0;
        seq_end_block = 0;
        load_offsets(a, range, (int)range.first_block);
        next(a, range);
    }
    __device__ __forceinline__ void next(const SelectedParams &a, const WorkRange &range) {
        kv_block.entry_begin += kv_block.num_entries;
        valid = kv_block.entry_begin < range.end;
        if (!valid) return;
        unsigned above;
        while (!(above = __ballot_sync(0xffffffffu, offset > kv_block.entry_begin)))
            load_offsets(a, range, first_block + 31);
        const int i = __ffs((int)above) - 1;
        kv_block.index = first_block + i - 1;
        kv_block.list_begin = __shfl_sync(0xffffffffu, offset, i - 1);
        kv_block.list_end = __shfl_sync(0xffffffffu, offset, i);
        kv_block.num_entries = min(range.end, kv_block.list_end) - kv_block.entry_begin;
        find_keys(a);
    }

  private:
    int first_block;
    uint32_t offset;                    // of block first_block + lane
    int seq_first_block, seq_end_block; // of the current sequence
    int seq_key0;                       // first key of this sequence
    int seq_keys;                       // keys of this sequence
    __device__ __forceinline__ void load_offsets(const SelectedParams &a, const WorkRange &range, int block) {
        first_block = block;
        offset = range.offsets[min(block + (int)threadIdx.x % 32, (int)a.lists.max_blocks)];
    }
    __device__ __forceinline__ void find_keys(const SelectedParams &a) {
        if (kv_block.index >= seq_end_block) {
            const int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, kv_block.index);
            seq_first_block = (int)a.batch.cu_blocks[seq], seq_end_block = (int)a.batch.cu_blocks[seq + 1];
            seq_key0 = (int)a.batch.cu_seqlens[seq], seq_keys = (int)(a.batch.cu_seqlens[seq + 1] - seq_key0);
        }
        kv_block.index_in_seq = kv_block.index - seq_first_block;
        kv_block.key0 = seq_key0 + kv_block.index_in_seq * a.block;
        kv_block.num_keys = min(a.block, seq_keys - kv_block.index_in_seq * a.block);
    }
};

// Rows i and i + 32 of a tile of 64 gathered rows, in lane i. Rows past the end of the list repeat
// the last row, with partial_row = NO_ROW.
enum : uint32_t { NO_ROW = 0xffffffff };
struct GatherRows {
    uint32_t query[2], head[2]; // head: the query head
    uint32_t partial_row[2];    // counted from the partial row of entry0
    int limit[2];               // last visible key, within the key tile
    // Returns the offset of row i in x [Nq, Hq, D], in units of 16 bytes. It is below 2^32.
    template <int D> __device__ __forceinline__ uint32_t offset(const ConstRows &x, int i) const {
        return query[i] * (uint32_t)(x.stride >> 3) + head[i] * (D / 8);
    }
};

// Iterates over the row tiles of a work range for a gather warp: tiles first, first + STRIDE, first + 2 *
// STRIDE, ... For each key tile of each KV block, the rows of the block's query list (g per entry) are
// divided into tiles of 64. The entries of a tile are loaded one tile ahead, across KV blocks.
template <int STRIDE> struct GatherTileIterator {
    KvBlockIterator blocks;
    __device__ __forceinline__ GatherTileIterator(const SelectedParams &a, const WorkRange &range, int first)
        : blocks(a, range), key_tile(0), tile(first), segment_query0(0), segment_queries(0) {
        if (blocks.valid) load_entries(a, range);
    }
    __device__ __forceinline__ void next(const SelectedParams &a, const WorkRange &range) {
        tile += STRIDE;
        load_entries(a, range);
    }
    // Returns the rows of the current tile. entry0: the entry whose first partial row has index 0.
    __device__ __forceinline__ GatherRows rows(const SelectedParams &a, uint32_t entry0) {
        GatherRows t;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t r = list_row(i), list_index = fast_divide(r, a.group_divisor);
            const bool valid = list_index < blocks.kv_block.num_entries;
            const uint32_t in_group = valid ? r - list_index * a.group : a.group - 1;
            t.query[i] = fast_divide(entry[i], a.topk_divisor);
            t.head[i] = (a.kv_head0 + blockIdx.y) * a.group + in_group;
            t.partial_row[i] =
                valid ? ((entry[i] - entry0) * a.key_tiles + key_tile) * a.group + in_group : NO_ROW;
            t.limit[i] = last_visible_key(a, list_index, t.query[i]) - key_tile * a.tile_keys;
        }
        return t;
    }

  private:
    int key_tile, tile; // key tile of the KV block; row tile of the key tile
    uint32_t entry[2];  // of rows lane and lane + 32
    // The segment of the query that was looked up last: its first query and its length.
    uint32_t segment_query0, segment_queries;
    int segment_pos; // position of its first query, minus segment_query0
    __device__ __forceinline__ uint32_t list_row(int i) const {
        return tile * 64 + threadIdx.x % 32 + 32 * i;
    }
    // Finds the KV block and key tile of tile number `tile`, and loads the tile's entries.
    __device__ __forceinline__ void load_entries(const SelectedParams &a, const WorkRange &range) {
        for (;;) {
            const int num_tiles = ((int)blocks.kv_block.num_entries * a.group + 63) / 64;
            if (tile < num_tiles) break;
            tile -= num_tiles;
            if (++key_tile < a.key_tiles) continue;
            key_tile = 0;
            blocks.next(a, range);
            if (!blocks.valid) return;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            entry[i] =
                range.entries[blocks.kv_block.entry_begin + min(fast_divide(list_row(i), a.group_divisor),
                                                                blocks.kv_block.num_entries - 1)];
    }
    // Same as ::last_visible_key, with the last segment cached.
    __device__ __forceinline__ int last_visible_key(const SelectedParams &a, uint32_t list_index,
                                                    uint32_t query) {
        const KvBlockEntries &kv_block = blocks.kv_block;
        if (kv_block.entry_begin - kv_block.list_begin + min(list_index, kv_block.num_entries - 1) >=
            (uint32_t)a.block)
            return kv_block.num_keys - 1;
        if (query - segment_query0 >= segment_queries) {
            const int64_t segment = find_in_cu(a.batch.cu_queries, a.batch.num_segments, query);
            segment_query0 = (uint32_t)a.batch.cu_queries[segment];
            segment_queries = (uint32_t)a.batch.cu_queries[segment + 1] - segment_query0;
            segment_pos = (int)(a.batch.segments[segment].pos - segment_query0);
        }
        return min(kv_block.num_keys - 1, segment_pos + (int)query - kv_block.index_in_seq * a.block);
    }
};

// A warp starts the copies (cp.async) of 64 rows of x to a tile [64][D] in panels of 64 columns (ptx.cuh).
// offset: of rows `lane` and lane + 32 of the tile in x, in units of 16 bytes. BATCH addresses are computed
// before the first copy: an address register is free again only when its copy has been issued.
template <typename T, int D, int BATCH>
static __device__ __forceinline__ void gather_tile(uint32_t tile, const void *x,
                                                   const uint32_t (&offset)[2]) {
    constexpr int CHUNKS = D / 8, ROWS = 32 / CHUNKS; // 16-byte chunks of a row; rows per copy of the warp
    constexpr int PERIOD = 8 / ROWS;                  // of the swizzle, in steps of ROWS rows
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
    int sub = lane / CHUNKS;
    // The backward producers have 40 registers at d = 128. They spill if the compiler keeps the source lanes
    // of all shuffles in registers across tiles.
    if (D == 128 && BATCH == 4) make_opaque(sub);
    const char *source = (const char *)x + chunk * 16;
    keep_in_registers(source);
    uint32_t dest[PERIOD];
#pragma unroll
    for (int i = 0; i < PERIOD; i++) dest[i] = tile + panel_offset(i * ROWS + sub, chunk, 64 * 128);
#pragma unroll
    for (int i0 = 0; i0 < 64 / ROWS; i0 += BATCH) {
        const char *address[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int r = (i0 + i) * ROWS;
            address[i] = source + __shfl_sync(0xffffffffu, offset[r / 32], r % 32 + sub) * (uint64_t)16;
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) keep_in_registers(address[i]);
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            cp_async_16(dest[(i0 + i) % PERIOD] + (i0 + i) / PERIOD * 1024, address[i]);
    }
}

// A warp starts the copies (cp.async) of K and V of a key tile with fewer than TILE_KEYS keys; the other rows
// become zeros.
template <typename T, int D, int TILE_KEYS>
static __device__ __forceinline__ void load_short_kv_tile(const SelectedParams &a,
                                                          const KvBlockEntries &kv_block, int key_tile,
                                                          uint32_t k_tile, uint32_t v_tile) {
    constexpr int CHUNKS = D / 8;
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS,
              num_keys = kv_block.num_keys - key_tile * TILE_KEYS;
    const int64_t column = (int64_t)(a.kv_head0 + blockIdx.y) * D + chunk * 8;
#pragma unroll 2
    for (int r = lane / CHUNKS; r < TILE_KEYS; r += 32 / CHUNKS) {
        bool valid = r < num_keys;
        int64_t key = kv_block.key0 + (valid ? key_tile * TILE_KEYS + r : 0);
        uint32_t dest = panel_offset(r, chunk, TILE_KEYS * 128);
        cp_async_16(k_tile + dest, (const T *)a.k.data + key * a.k.stride + column, valid);
        cp_async_16(v_tile + dest, (const T *)a.v.data + key * a.v.stride + column, valid);
    }
}

// Makes the tensor map of kv = k or v [N, Hkv, D] with the boxes of a key tile, [TILE_KEYS keys][1 KV
// head][64 channels]. Returns an FsaStatus.
template <typename T, int D, int TILE_KEYS>
static int make_kv_tensor_map(const SelectedParams &a, const ConstRows &kv, CUtensorMap *map) {
    int64_t size[] = {D, a.kv_heads, a.batch.n}, stride[] = {2, D * 2, kv.stride * 2};
    int box[] = {64, 1, TILE_KEYS};
    return make_tensor_map(map, std::is_same<T, __half>::value ? FSA_FP16 : FSA_BF16, 3, kv.data, size,
                           stride, box);
}
#endif
