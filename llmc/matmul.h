// matmul.h: the matrix product of the C trainer. Include after defining the type `real`.
//
// A task is a tile of C, ROWS x PANEL. It copies PANEL columns of B, DEPTH rows at a time, into a
// contiguous panel that stays in the L1 cache, and multiplies four rows of A with it, their sums in
// vector registers. Every element sums over k in one order, whatever the number of threads.
#ifndef LLMC_MATMUL_H
#define LLMC_MATMUL_H
#include <stdint.h>
#include <string.h>

typedef real MatmulVec __attribute__((vector_size(64)));
#ifdef __AVX512F__
#define MATMUL_VECS 2
#else
#define MATMUL_VECS 1 // 4 rows of 64 bytes fill half of AVX2's or NEON's registers
#endif
enum {
    MATMUL_LANES = 64 / sizeof(real),
    MATMUL_PANEL = MATMUL_VECS * MATMUL_LANES,
    MATMUL_ROWS = 128,
    MATMUL_DEPTH = 128
};

// A matrix read through strides: element (i, k) is data[i * row + k * col].
typedef struct {
    const real *data;
    int64_t row, col;
} MatmulIn;

// sums[4][PANEL] = rows i..i+3 of A times the panel, over `depth` values of k. A row past the matrix
// repeats the last one; the caller drops its sums.
static inline void matmul_4rows(const MatmulIn *a, int64_t i, int64_t rows_left, int64_t k0, int depth,
                                const real *panel, real *sums) {
    const real *ar[4];
    for (int r = 0; r < 4; r++)
        ar[r] = a->data + (i + (r < rows_left ? r : rows_left - 1)) * a->row + k0 * a->col;
    MatmulVec acc[4][MATMUL_VECS];
    memset(acc, 0, sizeof acc);
    for (int k = 0; k < depth; k++) {
        MatmulVec b[MATMUL_VECS];
        memcpy(b, panel + k * MATMUL_PANEL, sizeof b);
        for (int r = 0; r < 4; r++) {
            real x = ar[r][k * a->col];
            for (int v = 0; v < MATMUL_VECS; v++) acc[r][v] += x * b[v];
        }
    }
    memcpy(sums, acc, sizeof acc);
}

// c [m, n], rows contiguous: c = a*b, or c += a*b with add != 0. a is [m, k], b is [k, n].
static inline void matmul(real *c, MatmulIn a, MatmulIn b, int64_t m, int64_t n, int64_t k, int add) {
    int64_t row_tiles = (m + MATMUL_ROWS - 1) / MATMUL_ROWS,
            col_tiles = (n + MATMUL_PANEL - 1) / MATMUL_PANEL;
#pragma omp parallel for schedule(static) if (m * n * k > 20000)
    for (int64_t tile = 0; tile < row_tiles * col_tiles; tile++) {
        real panel[MATMUL_DEPTH * MATMUL_PANEL], sums[4 * MATMUL_PANEL];
        int64_t i0 = tile / col_tiles * MATMUL_ROWS, i1 = i0 + MATMUL_ROWS < m ? i0 + MATMUL_ROWS : m;
        int64_t j0 = tile % col_tiles * MATMUL_PANEL;
        int width = (int)(n - j0 < MATMUL_PANEL ? n - j0 : (int64_t)MATMUL_PANEL);
        for (int64_t k0 = 0; k0 < k; k0 += MATMUL_DEPTH) {
            int depth = (int)(k - k0 < MATMUL_DEPTH ? k - k0 : (int64_t)MATMUL_DEPTH);
            if (width < MATMUL_PANEL) memset(panel, 0, sizeof panel);
            if (b.col == 1) {
                for (int p = 0; p < depth; p++) {
                    memcpy(panel + p * MATMUL_PANEL, b.data + (k0 + p) * b.row + j0, sizeof(real) * width);
                }
            } else {
                for (int j = 0; j < width; j++) {
                    const real *column = b.data + (j0 + j) * b.col + k0 * b.row;
                    for (int p = 0; p < depth; p++) panel[p * MATMUL_PANEL + j] = column[p * b.row];
                }
            }
            for (int64_t i = i0; i < i1; i += 4) {
                matmul_4rows(&a, i, i1 - i, k0, depth, panel, sums);
                for (int r = 0; r < 4 && i + r < i1; r++) {
                    real *out = c + (i + r) * n + j0, *sum = sums + r * MATMUL_PANEL;
                    if (add || k0 > 0) {
                        for (int j = 0; j < width; j++) out[j] += sum[j];
                    } else {
                        for (int j = 0; j < width; j++) out[j] = sum[j];
                    }
                }
            }
        }
    }
}
#endif
