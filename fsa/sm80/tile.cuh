// tile.cuh: tiles of 16-bit elements in shared memory as the dense, top-k and compression kernels use
// them: rows of D elements (64 or 128), chunks swizzled as mma.cuh says; and how a flat tile number
// finds its rows in a batch.
#ifndef FSA_SM80_TILE_CUH
#define FSA_SM80_TILE_CUH
#include "../mma.cuh"

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
#endif
