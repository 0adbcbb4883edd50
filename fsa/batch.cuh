// batch.cuh: what every kernel needs to know of a batch, on the device. fsa_batch_layout (plan.cu) fills it
// once a batch with one small kernel; the host passes only bounds, so nothing synchronizes.
#ifndef FSA_PLAN_CUH
#define FSA_PLAN_CUH
#include "fsa.h"
#include <cuda_runtime.h>

#define FSA_TILE_TOKENS 64 // queries in a token tile; a tile never spans two segments

struct BatchLayout {
    int64_t nq, n, num_seqs, num_segments, max_len; // host: query rows, keys, counts, longest sequence
    const int64_t *cu_seqlens;                      // [num_seqs + 1], device
    const FsaSegment *segments;                     // [num_segments], device
    int64_t *cu_queries;                               // [num_segments + 1] first query row of each segment
    int64_t *cu_tiles;   // [num_segments + 1] prefix sum of ceil(segment.len / FSA_TILE_TOKENS)
    int64_t *cu_windows; // [num_seqs + 1] first compression window
    int64_t *cu_blocks;  // [num_seqs + 1] first selection block
};

// Upper bounds that the host knows, for grids and workspaces.
static inline int64_t fsa_max_tiles(const BatchLayout *p) {
    return p->nq / FSA_TILE_TOKENS + p->num_segments;
}
static inline int64_t fsa_max_windows(const FsaConfig *c, const BatchLayout *p) {
    return p->n / c->cmp_stride;
}
static inline int64_t fsa_max_blocks(const FsaConfig *c, const BatchLayout *p) {
    return p->n / c->block + p->num_seqs;
}

// Whether the current device runs the kernels of the *_sm90.cu files: compute capability 9.0, unless
// FSA_KERNELS=portable is in the environment.
bool fsa_use_sm90();

// Bytes of the four arrays for at most so many sequences and segments.
static inline size_t fsa_batch_layout_bytes(int64_t num_seqs, int64_t num_segments) {
    return (size_t)(2 * (num_segments + 1) + 2 * (num_seqs + 1)) * sizeof(int64_t);
}

// Sets p's fields, the four arrays lying in `memory` (fsa_batch_layout_bytes, on the device), and launches the
// kernel that fills them. cu_seqlens and segments are device pointers.
int fsa_batch_layout(BatchLayout *p, const FsaConfig *c, int64_t nq, int64_t n, int64_t num_seqs, int64_t num_segments,
             int64_t max_len, const int64_t *cu_seqlens, const FsaSegment *segments, void *memory,
             cudaStream_t stream);

// Division by a small number, which the host prepares: x / divisor = umulhi(2x, factor) >> shift, x < 2^31.
struct FastDivisor {
    uint32_t factor;
    int shift;
};
static inline FastDivisor make_fast_divisor(int divisor) {
    FastDivisor d = {0, 0};
    while ((1 << d.shift) < divisor) d.shift++;
    d.factor = (uint32_t)((((int64_t)1 << (31 + d.shift)) + divisor - 1) / divisor);
    return d;
}

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t fast_divide(uint32_t x, FastDivisor d) {
    return __umulhi(2 * x, d.factor) >> d.shift;
}

// The i with cu[i] <= x < cu[i + 1]; the caller knows that x lies in cu[0] .. cu[count].
__device__ __forceinline__ int64_t find_in_cu(const int64_t *cu, int64_t count, int64_t x) {
    int64_t lo = 0, hi = count;
    while (hi - lo > 1) {
        int64_t mid = (lo + hi) / 2;
        if (cu[mid] <= x)
            lo = mid;
        else
            hi = mid;
    }
    // Empty entries repeat a value; the last of equals is the one that holds x.
    return lo;
}

__host__ __device__ __forceinline__ int64_t num_windows_of(int cmp_len, int cmp_stride, int64_t n) {
    return n < cmp_len ? 0 : (n - cmp_len) / cmp_stride + 1;
}

// A token tile: `len` (1..64) queries of one segment.
struct FsaTile {
    int64_t seq, pos, row; // sequence, position of the first query in it, its row in q
    int64_t key0, n;       // the sequence's first key row and its tokens
    int len;               // 0: no such tile (the grid is a bound)
};

__device__ __forceinline__ FsaTile fsa_tile(const BatchLayout &p, int64_t tile) {
    FsaTile t;
    t.len = 0;
    if (tile >= p.cu_tiles[p.num_segments]) return t;
    int64_t i = find_in_cu(p.cu_tiles, p.num_segments, tile);
    int64_t first = (tile - p.cu_tiles[i]) * FSA_TILE_TOKENS, left = p.segments[i].len - first;
    t.seq = p.segments[i].seq;
    t.pos = p.segments[i].pos + first;
    t.row = p.cu_queries[i] + first;
    t.key0 = p.cu_seqlens[t.seq];
    t.n = p.cu_seqlens[t.seq + 1] - t.key0;
    t.len = left < FSA_TILE_TOKENS ? (int)left : FSA_TILE_TOKENS;
    return t;
}

// Sequence and position of a query row.
__device__ __forceinline__ void query_position(const BatchLayout &p, int64_t row, int64_t *seq, int64_t *pos) {
    int64_t i = find_in_cu(p.cu_queries, p.num_segments, row);
    *seq = p.segments[i].seq;
    *pos = p.segments[i].pos + row - p.cu_queries[i];
}

// Tile `index` of at most `size` consecutive rows of the ranges cu[0..count]: no tile spans two ranges.
// Range i's tiles start at cu[i]/size + i, which leaves room enough, so no prefix sum over tiles is
// needed and cu[count]/size + count is the grid. The tiles left over have rows = 0. Rows are fewer than 2^32.
struct RowTile {
    int64_t range, row; // the range and the tile's first row
    int first, rows;    // the row's place in its range, and how many rows
};
__device__ __forceinline__ RowTile find_row_tile(const int64_t *cu, int64_t count, int size, int64_t index) {
    int64_t lo = 0, hi = count;
    while (hi - lo > 1) {
        int64_t mid = (lo + hi) / 2;
        if ((uint32_t)cu[mid] / size + mid <= index)
            lo = mid;
        else
            hi = mid;
    }
    int64_t first = (index - (uint32_t)cu[lo] / size - lo) * size, left = cu[lo + 1] - cu[lo] - first;
    RowTile t;
    t.range = lo;
    t.row = cu[lo] + first;
    t.first = (int)first;
    t.rows = left <= 0 ? 0 : left < size ? (int)left : size;
    return t;
}
#endif

static inline int64_t row_tile_bound(int64_t rows, int64_t count, int size) {
    return rows / size + count;
}
#endif
