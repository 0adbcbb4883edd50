// sm80/tile.cuh: tiles of 16-bit elements in shared memory for the mma.sync kernels: rows of D elements (64
// or 128), chunks swizzled (`swizzled` in mma.cuh). Copies from global memory, and loads of mma operands.
#ifndef FSA_SM80_TILE_CUH
#define FSA_SM80_TILE_CUH
#include "../mma.cuh"

// Starts an asynchronous copy (cp.async) of `rows` rows into a tile of ROWS rows. The other rows become zero.
// Source rows begin at `src`, `stride` elements apart. All THREADS threads of the thread block call it.
template <int ROWS, int D, int THREADS, typename T>
__device__ __forceinline__ void load_tile(uint32_t tile, const T *src, int64_t stride, int rows) {
    constexpr int CHUNKS = D / 8;
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies the same number of chunks");
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        int index = i * THREADS + threadIdx.x, row = index / CHUNKS, chunk = index % CHUNKS;
        bool valid = row < rows;
        cp_async_16(tile + swizzled<D>(row, chunk), valid ? src + row * stride + chunk * 8 : src, valid);
    }
}

// Operands of mma_16816 from a tile. A is 16 (m) x 16 (k). B is 16 (k) x 16 (n): two n8 halves, the first in
// r[0], r[1], the second in r[2], r[3]. m0, n0, k0: first row in the tile; m, n, k: number of a block of 16
// columns.
//
// A from a tile with rows m.
template <int D> __device__ __forceinline__ void load_a(uint32_t (&r)[4], uint32_t tile, int m0, int k) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4(r, tile + swizzled<D>(m0 + (lane & 15), 2 * k + (lane >> 4)));
}
// A from a tile with rows k.
template <int D>
__device__ __forceinline__ void load_a_trans(uint32_t (&r)[4], uint32_t tile, int k0, int m) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4_trans(r, tile + swizzled<D>(k0 + (lane & 7) + ((lane >> 4) << 3), 2 * m + ((lane >> 3) & 1)));
}
// B from a tile with rows n.
template <int D> __device__ __forceinline__ void load_b(uint32_t (&r)[4], uint32_t tile, int n0, int k) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4(r, tile + swizzled<D>(n0 + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
}
// B from a tile with rows k.
template <int D>
__device__ __forceinline__ void load_b_trans(uint32_t (&r)[4], uint32_t tile, int k0, int n) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4_trans(r, tile + swizzled<D>(k0 + (lane & 15), 2 * n + (lane >> 4)));
}
#endif
