// matmul.h: the C trainer's matmul. Define the type `real` before including it.
//
// C is computed in tiles of ROWS x PANEL elements; OpenMP distributes the tiles. A tile packs PANEL columns
// of B, DEPTH rows at a time, into a contiguous panel that stays in the L1 cache. Four rows of A are
// multiplied by the panel at once, with accumulators in vector registers. Every element is summed over k in
// ascending order, so the result does not depend on the number of threads.
#ifndef LLMC_MATMUL_H
#define LLMC_MATMUL_H
#include <stdint.h>
#include <string.h>

typedef real MatmulVec __attribute__((vector_size(64)));
#ifdef __AVX512F__
#define MATMUL_VECS 2
#else
#define MATMUL_VECS 1 // the accumulators of 4 rows of 64 bytes take half of AVX2's or NEON's registers
#endif
enum {
    MATMUL_LANES = 64 / sizeof(real),
    MATMUL_PANEL = MATMUL_VECS * MATMUL_LANES,
    MATMUL_ROWS = 128,
    MATMUL_DEPTH = 128
};

// A strided matrix operand: element (i, k) is data[i * row_stride + k * col_stride].
typedef struct {
    const real *data;
    int64_t row_stride, col_stride;
} MatmulOperand;

// sums [4][PANEL] = rows i to i + 3 of A times the panel, over k0 <= k < k0 + depth. rows_left: the number of
// rows of A minus i. A row past the end repeats the last row, and the caller ignores its sums.
static inline void matmul_4rows(const MatmulOperand *a, int64_t i, int64_t rows_left, int64_t k0, int depth,
                                const real *panel, real *sums) {
    const real *a_row[4];
    for (int r = 0; r < 4; r++)
        a_row[r] = a->data + (i + (r < rows_left ? r : rows_left - 1)) * a->row_stride + k0 * a->col_stride;
    MatmulVec acc[4][MATMUL_VECS];
    memset(acc, 0, sizeof acc);
    for (int k = 0; k < depth; k++) {
        MatmulVec b[MATMUL_VECS];
        memcpy(b, panel + k * MATMUL_PANEL, sizeof b);
        for (int r = 0; r < 4; r++) {
            real x = a_row[r][k * a->col_stride];
            for (int v = 0; v < MATMUL_VECS; v++) acc[r][v] += x * b[v];
        }
    }
    memcpy(sums, acc, sizeof acc);
}

// c = a*b, or c += a*b if add != 0. c [m, n] is row-major and contiguous; a [m, k] and b [k, n] are
// strided.
static inline void matmul(real *c, MatmulOperand a, MatmulOperand b, int64_t m, int64_t n, int64_t k,
                          int add) {
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
            if (b.col_stride == 1) {
                for (int p = 0; p < depth; p++) {
                    memcpy(panel + p * MATMUL_PANEL, b.data + (k0 + p) * b.row_stride + j0,
                           sizeof(real) * width);
                }
            } else {
                for (int j = 0; j < width; j++) {
                    const real *column = b.data + (j0 + j) * b.col_stride + k0 * b.row_stride;
                    for (int p = 0; p < depth; p++) panel[p * MATMUL_PANEL + j] = column[p * b.row_stride];
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
