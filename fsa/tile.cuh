// tile.cuh: tiles of 16-bit elements in shared memory as the dense, top-k and compression kernels use
// them: rows of D elements (64 or 128), chunks swizzled as mma.cuh says; and how a flat tile number
// finds its rows in a batch.
#ifndef FSA_TILE_CUH
#define FSA_TILE_CUH
#include "mma.cuh"
#include "plan.cuh"

// Starts the copy of `rows` rows, `stride` elements apart from `from` on, into a tile of ROWS rows; the
// others become zero. All THREADS threads of a block call it.
template <int ROWS, int D, int THREADS, typename T>
__device__ __forceinline__ void load_tile(uint32_t tile, const T *from, int64_t stride, int rows) {
    constexpr int CHUNKS = D / 8;
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies the same number of chunks");
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        int at = i * THREADS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
        bool valid = row < rows;
        cp_async_16(tile + swizzled<D>(row, chunk), valid ? from + row * stride + chunk * 8 : from, valid);
    }
}

// Operands of mma_16816 out of a tile. A is 16 (m) x 16 (k). B is 16 (k) x 16 (n): two n8 halves, the
// first in r[0], r[1], the second in r[2], r[3]. `k`, `m`, `n` count blocks of 16 columns.
// A where the tile's rows are m.
template <int D> __device__ __forceinline__ void load_a(uint32_t (&r)[4], uint32_t tile, int m0, int k) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4(r, tile + swizzled<D>(m0 + (lane & 15), 2 * k + (lane >> 4)));
}
// A where the tile's rows are k.
template <int D>
__device__ __forceinline__ void load_a_trans(uint32_t (&r)[4], uint32_t tile, int k0, int m) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4_trans(r, tile + swizzled<D>(k0 + (lane & 7) + ((lane >> 4) << 3), 2 * m + ((lane >> 3) & 1)));
}
// B where the tile's rows are n.
template <int D> __device__ __forceinline__ void load_b(uint32_t (&r)[4], uint32_t tile, int n0, int k) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4(r, tile + swizzled<D>(n0 + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
}
// B where the tile's rows are k.
template <int D>
__device__ __forceinline__ void load_b_trans(uint32_t (&r)[4], uint32_t tile, int k0, int n) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4_trans(r, tile + swizzled<D>(k0 + (lane & 15), 2 * n + (lane >> 4)));
}

// Columns 16*i .. 16*i + 15 of a result as the A operand of a product over those columns.
template <typename T>
__device__ __forceinline__ void result_as_a(uint32_t (&a)[4], const float (&left)[4],
                                            const float (&right)[4]) {
    a[0] = pack2<T>(left[0], left[1]);
    a[1] = pack2<T>(left[2], left[3]);
    a[2] = pack2<T>(right[0], right[1]);
    a[3] = pack2<T>(right[2], right[3]);
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
static inline int64_t row_tile_bound(int64_t rows, int64_t count, int size) {
    return rows / size + count;
}

// Runs f with the element type of a dtype and the head size as template arguments.
#define FSA_DISPATCH(dtype, head_dim, f, ...)                                                                \
    ((dtype) == FSA_BF16                                                                                     \
         ? (head_dim) == 64 ? f<__nv_bfloat16, 64>(__VA_ARGS__) : f<__nv_bfloat16, 128>(__VA_ARGS__)         \
     : (head_dim) == 64 ? f<__half, 64>(__VA_ARGS__)                                                         \
                        : f<__half, 128>(__VA_ARGS__))

template <typename T> __device__ __forceinline__ float to_f32(T x);
template <> __device__ __forceinline__ float to_f32(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <> __device__ __forceinline__ float to_f32(__half x) {
    return __half2float(x);
}

static inline float softmax_scale_of(const FsaConfig *c) {
    return c->scale != 0 ? c->scale : (float)(1 / __builtin_sqrt((double)c->head_dim));
}
static inline int launch_status() {
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

#endif
