// batch.cuh: the layout of a batch of packed sequences, on the device, and the functions that look rows up in
// it. fsa_batch_layout (batch.cu) fills it once per batch with one small kernel. The host knows only bounds
// of the counts, so nothing synchronizes.
#ifndef FSA_BATCH_CUH
#define FSA_BATCH_CUH
#include "fsa.h"
#include <cuda_runtime.h>

struct BatchLayout {
    int64_t nq, n;                  // queries; keys
    int64_t num_seqs, num_segments; // sequences of keys; segments of queries
    const int64_t *cu_seqlens;      // [num_seqs + 1] first key of each sequence
    const FsaSegment *segments;     // [num_segments] consecutive queries of one sequence
    int64_t *cu_queries;            // [num_segments + 1] first query of each segment
    int64_t *cu_windows;            // [num_seqs + 1] first compression window of each sequence
    int64_t *cu_blocks;             // [num_seqs + 1] first selection block of each sequence
};

// Upper bounds for grids and workspaces: compression windows, and selection blocks, of all sequences.
static inline int64_t fsa_max_windows(const FsaConfig *c, const BatchLayout *batch) {
    return batch->n / c->cmp_stride;
}
static inline int64_t fsa_max_blocks(const FsaConfig *c, const BatchLayout *batch) {
    return batch->n / c->block + batch->num_seqs;
}

// Returns the bytes of the three cu_ arrays that fsa_batch_layout fills, for at most num_seqs sequences and
// num_segments segments.
static inline size_t fsa_batch_layout_bytes(int64_t num_seqs, int64_t num_segments) {
    return (size_t)(num_segments + 1 + 2 * (num_seqs + 1)) * sizeof(int64_t);
}

// Sets the fields of *batch for b and launches the kernel that fills its cu_ arrays. memory: device memory,
// fsa_batch_layout_bytes bytes, where the cu_ arrays lie. Returns FSA_OK or FSA_ERROR_CUDA.
int fsa_batch_layout(BatchLayout *batch, const FsaConfig *c, const FsaDeviceBatch *b, void *memory,
                     cudaStream_t stream);

// Division of x < 2^31 by a small number that the host prepares: x / divisor = umulhi(2x, factor) >> shift.
struct FastDivisor {
    uint32_t factor;
    int shift;
};
static inline FastDivisor make_fast_divisor(int divisor) {
    FastDivisor d = {0, 0};
    while (((int64_t)1 << d.shift) < divisor) d.shift++;
    d.factor = (uint32_t)((((int64_t)1 << (31 + d.shift)) + divisor - 1) / divisor);
    return d;
}

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t fast_divide(uint32_t x, FastDivisor d) {
    return __umulhi(2 * x, d.factor) >> d.shift;
}

// Returns the i with cu[i] <= x < cu[i + 1]. x must be in cu[0] .. cu[count] - 1.
__device__ __forceinline__ int64_t find_in_cu(const int64_t *cu, int64_t count, int64_t x) {
    int64_t lo = 0, hi = count;
    while (hi - lo > 1) {
        int64_t mid = (lo + hi) / 2;
        if (cu[mid] <= x)
            lo = mid;
        else
            hi = mid;
    }
    return lo; // empty ranges repeat a value; the last of equal values begins the range that holds x
}

// Returns the compression windows of a sequence of n tokens.
__host__ __device__ __forceinline__ int64_t num_windows_of(int cmp_len, int cmp_stride, int64_t n) {
    return n < cmp_len ? 0 : (n - cmp_len) / cmp_stride + 1;
}

// Finds the sequence of a query and the query's position in the sequence.
__device__ __forceinline__ void query_position(const BatchLayout &batch, int64_t query, int64_t *seq,
                                               int64_t *pos) {
    int64_t i = find_in_cu(batch.cu_queries, batch.num_segments, query);
    *seq = batch.segments[i].seq;
    *pos = batch.segments[i].pos + query - batch.cu_queries[i];
}

// A tile of consecutive rows of one sequence or segment: entry i of cu, rows cu[i] .. cu[i + 1] - 1. The
// tiles of entry i begin at index cu[i]/size + i, an upper bound of the tiles before, so no prefix sum over
// tiles is needed. The indices left over have rows = 0.
struct RowTile {
    int64_t cu_index, row; // the entry of cu; the tile's first row
    int first, rows;       // first row counted from cu[cu_index], and the number of rows (at most size)
};
// Returns tile `index` (below max_row_tiles) for tiles of `size` rows. Rows are fewer than 2^32.
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
    t.cu_index = lo;
    t.row = cu[lo] + first;
    t.first = (int)first;
    t.rows = left <= 0 ? 0 : left < size ? (int)left : size;
    return t;
}
#endif

// Returns an upper bound of the tiles of `size` rows in `count` sequences or segments: the grid for
// find_row_tile.
static inline int64_t max_row_tiles(int64_t rows, int64_t count, int size) {
    return rows / size + count;
}
#endif
