// sm80/tile.cuh: tiles of 16-bit elements in shared memory for the mma.sync kernels: rows of D elements (64
// or 128), chunks swizzled (`swizzled` in mma.cuh). Copies from global memory, loads of mma operands, and
// matmuls of a warp.
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

// The same for two arrays whose rows have different strides.
template <int ROWS, int D, int THREADS, typename T>
__device__ __forceinline__ void load_tile_pair(uint32_t tile0, const T *src0, int64_t stride0, uint32_t tile1,
                                               const T *src1, int64_t stride1, int rows) {
    constexpr int CHUNKS = D / 8, ROW_STEP = THREADS / CHUNKS;
    static_assert(ROWS % ROW_STEP == 0, "every thread copies the same number of chunks");
    const int row0 = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    int64_t offset0 = row0 * stride0 + chunk * 8, offset1 = row0 * stride1 + chunk * 8;
#pragma unroll
    for (int i = 0; i < ROWS / ROW_STEP; i++) {
        const int row = i * ROW_STEP + row0;
        const uint32_t dst = swizzled<D>(row, chunk);
        const bool valid = row < rows;
        cp_async_16(tile0 + dst, src0 + (valid ? offset0 : 0), valid);
        cp_async_16(tile1 + dst, src1 + (valid ? offset1 : 0), valid);
        offset0 += ROW_STEP * stride0, offset1 += ROW_STEP * stride1;
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

// Operands of mma_tiles in shared memory, parts of a tile. load_a loads blocks 0 .. M - 1 of m of A, 16 (m) x
// 16 (k) each. load_b loads block n of B, 16 (k) x 16 (n). k: number of a block of 16.
//
// The rows of the tile are m or n, the columns k. first: the first row of the part.
template <int D> struct RowOperand {
    uint32_t tile;
    int first;
    template <int M> __device__ __forceinline__ void load_a(uint32_t (&r)[M][4], int k) const {
        static_assert(M <= 2, "A has one or two blocks of m");
        ::load_a<D>(r[0], tile, first, k);
        if (M > 1) ::load_a<D>(r[M - 1], tile, first + 16, k);
    }
    __device__ __forceinline__ void load_b(uint32_t (&r)[4], int n, int k) const {
        ::load_b<D>(r, tile, first + n * 16, k);
    }
};
// The rows of the tile are k, the columns m or n. first: the first column of the part, divided by 16.
template <int D> struct ColumnOperand {
    uint32_t tile;
    int first;
    template <int M> __device__ __forceinline__ void load_a(uint32_t (&r)[M][4], int k) const {
#pragma unroll
        for (int m = 0; m < M; m++) load_a_trans<D>(r[m], tile, k * 16, first + m);
    }
    __device__ __forceinline__ void load_b(uint32_t (&r)[4], int n, int k) const {
        load_b_trans<D>(r, tile, k * 16, first + n);
    }
};

// A operands in registers: accumulators x [m16 blocks][8-column blocks of k][4], rounded to T.
template <typename T, int N> struct AccumOperand {
    const float (*x)[N][4];
    template <int M> __device__ __forceinline__ void load_a(uint32_t (&r)[M][4], int k) const {
        for (int m = 0; m < M; m++) accum_as_a<T>(r[m], x[m][2 * k], x[m][2 * k + 1]);
    }
};
template <typename T, int M, int N>
__device__ __forceinline__ AccumOperand<T, N> accum_operand(const float (&x)[M][N][4]) {
    return {x};
}
template <typename T, int N>
__device__ __forceinline__ AccumOperand<T, N> accum_operand(const float (&x)[N][4]) {
    return {&x};
}
// A operands that are already packed: 16 (m) x 16*K (k), x [k16 blocks][4].
template <int K> struct FragmentOperand {
    const uint32_t (&x)[K][4];
    template <int M> __device__ __forceinline__ void load_a(uint32_t (&r)[M][4], int k) const {
        static_assert(M == 1, "one block of m");
        for (int i = 0; i < 4; i++) r[0][i] = x[k][i];
    }
};

// The two n8 halves of an accumulator += a * b, 16 (m) x 16 (n) over 16 (k).
template <typename T>
__device__ __forceinline__ void mma_161616(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[4]) {
    mma_16816<T>(left, a, b[0], b[1]);
    mma_16816<T>(right, a, b[2], b[3]);
}

// acc += A B over K elements of k, for the whole warp. acc [M][N][4] is 16*M (m) x 8*N (n).
template <typename T, int K, int M, int N, typename A, typename B>
__device__ __forceinline__ void mma_loop(float (*acc)[N][4], const A &a, const B &b) {
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
        uint32_t fa[M][4];
        a.load_a(fa, k);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            uint32_t fb[4];
            b.load_b(fb, n, k);
#pragma unroll
            for (int m = 0; m < M; m++) mma_161616<T>(acc[m][2 * n], acc[m][2 * n + 1], fa[m], fb);
        }
    }
}
template <typename T, int K, int M, int N, typename A, typename B>
__device__ __forceinline__ void mma_tiles(float (&acc)[M][N][4], const A &a, const B &b) {
    mma_loop<T, K, M>(acc, a, b);
}
// The same for acc [N][4], 16 (m) x 8*N (n).
template <typename T, int K, int N, typename A, typename B>
__device__ __forceinline__ void mma_tiles(float (&acc)[N][4], const A &a, const B &b) {
    mma_loop<T, K, 1>(&acc, a, b);
}
#endif
