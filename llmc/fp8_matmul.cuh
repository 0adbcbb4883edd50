// fp8_matmul.cuh: matmuls of e4m3 matrices on cuBLASLt.
//
// Operands are Fp8Matrix (fp8.h): rows along which the matmul sums, 16-byte aligned, a multiple of FP8_ALIGN
// long. cuBLASLt takes no other layout on Hopper. Outputs are floatX, or fp32 for gradients of weights.
//
// cuBLASLt has scales for rows since CUDA 12.9, and for compute capability 9.0 alone. Scales for whole
// matrices work from compute capability 8.9 and CUDA 12.0 on.
//
// Fast accumulation leaves the sum in the tensor core's accumulators, which keep about 14 bits. Precise
// accumulation adds them to fp32 registers every 128 terms. Relative errors of fast accumulation, measured on
// an H200: sums of 4,096 terms of both signs 0.0013, of 14,336 terms 0.0028, of 65,536 terms 0.007. If all
// terms are positive: 0.07, 0.20 and 0.54. Of precise accumulation: 0.0006 and less.
#ifndef LLMC_FP8_MATMUL_CUH
#define LLMC_FP8_MATMUL_CUH
#include "fp8.cuh"
#include "matmul.cuh"

// How a matmul scales and adds.
typedef struct {
    Fp8Scaling scaling;
    int fast; // 1: fast accumulation
} Fp8Mode;

// Returns the mode of a matmul; on a GPU without scales for rows, with one scale for a matrix.
static inline Fp8Mode fp8_mode(const Matmul *mm, int fast) {
    return {mm->row_scales ? FP8_SCALE_ROW : FP8_SCALE_TENSOR, fast};
}

// The shape of out [rows_a, rows_b] = a b^T: a [rows_a, k], b [rows_b, k] with rows ldb elements apart.
// Row-major out is column-major transposed, so b is cuBLASLt's first operand.
static inline MatmulShape fp8_matmul_shape(Fp8Mode mode, int fp32_out, int64_t ldo, int64_t ldb,
                                           int64_t rows_a, int64_t rows_b, int64_t k) {
    MatmulShape s = {rows_b, rows_a, k, ldb, k, ldo, 1, 0, fp32_out};
    s.fp8 = 1 + mode.scaling, s.fp8_fast = mode.fast;
    return s;
}

// Returns whether cuBLASLt has an algorithm for this matmul of aligned arrays.
static inline bool fp8_matmul_supported(Matmul *mm, Fp8Mode mode, int fp32_out, int64_t ldo, int64_t rows_a,
                                        int64_t rows_b, int64_t k) {
    MatmulShape s = fp8_matmul_shape(mode, fp32_out, ldo, k, rows_a, rows_b, k);
    s.align_a = s.align_b = s.align_c = s.align_d = s.align_bias = 16;
    MatmulCacheEntry entry = {};
    MatmulArrays arrays = {};
    arrays.a_scale = arrays.b_scale = (const float *)mm->workspace; // any address: nothing is read
    int found;
    const cublasStatus_t status = matmul_find_algo(mm, &entry, &s, &arrays, &found);
    entry.last_used = 1;
    matmul_evict(&entry);
    return status == CUBLAS_STATUS_SUCCESS && found > 0;
}

// out = a b^T + addend: out and addend [rows_a, rows_b] with rows ldo elements apart, floatX or fp32; a
// [rows_a, k]; b [rows_b, k] with rows ldb elements apart. addend may be out, or NULL. 2*rows_a*rows_b*k
// FLOPs: 64K tokens of 4,096 inputs and 14,336 outputs take 5.9 ms at 1,300 TFLOP/s.
static inline void fp8_matmul(Matmul *mm, Fp8Mode mode, void *out, int fp32_out, int64_t ldo,
                              const void *addend, Fp8Matrix a, Fp8Matrix b, int64_t ldb, int64_t rows_a,
                              int64_t rows_b, int64_t k, cudaStream_t stream) {
    const MatmulArrays arrays = {out, b.data, a.data, addend, NULL, b.scale, a.scale};
    matmul_run(mm, fp8_matmul_shape(mode, fp32_out, ldo, ldb, rows_a, rows_b, k), &arrays, stream);
}
#endif
