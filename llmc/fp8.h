// fp8.h: e4m3 numbers and their scales in plain C. The CUDA kernels (fp8.cuh) share the rule of scales; the
// tests compare the kernels with the functions below, bit for bit.
//
// e4m3 has a sign, 4 bits of exponent and 3 of mantissa: 2^-9 to 448, no Inf, one NaN of each sign. A matrix
// is stored as e4m3 elements and fp32 scales: value = element * scale.
//
// A scale is the smallest power of two that brings the largest absolute value (amax) to at most 448. Scaling
// by a power of two is exact. So a matrix that was quantized by rows can be quantized again by columns, for
// the weight gradient, without a second rounding error; only values far below the largest of both become
// less precise. With scales of amax / 448 the second rounding makes the error of a weight gradient half as
// large again. A power of two wastes at most one of e4m3's 18 binades.
//
// NaN and Inf are never hidden. If a row has one, its scale and all its elements are NaN, so that every
// matmul that reads the row returns NaN, and the loss or the norm of the gradients stops the run.
#ifndef LLMC_FP8_H
#define LLMC_FP8_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FP8_FUNCTION static __host__ __device__ inline
#else
#define FP8_FUNCTION static inline
#endif

enum {
    FP8_ALIGN = 16, // the elements of an e4m3 row are a multiple of it (cuBLASLt)
    FP8_NAN = 0x7f
};

// The elements that share a scale: all of a matrix, or a row, along which a matmul sums. The scales are an
// array [1] or [rows].
typedef enum { FP8_SCALE_TENSOR, FP8_SCALE_ROW } Fp8Scaling;

// An e4m3 matrix: data [rows, k], rows contiguous, and its scales.
typedef struct {
    uint8_t *data;
    float *scale;
} Fp8Matrix;

// A scale and its reciprocal. Both are powers of two from 2^-120 to 2^120, or NaN.
typedef struct {
    float scale, inverse;
} Fp8Scale;

// Returns the scale of elements whose largest absolute value has these bits as an fp32 number. As integers,
// absolute values are ordered, and NaN is above Inf. If there is NaN or Inf, the scale is NaN. Zeros and
// values below 2^-112 get the smallest scale.
FP8_FUNCTION Fp8Scale fp8_scale(uint32_t amax_bits) {
    const uint32_t smallest = 7, nan = 0x7fc00000;             // the biased exponent of 2^-120
    uint32_t exponent = (amax_bits + 0x1fffff) >> 23, bits[2]; // one more if the mantissa is above 448's
    exponent = exponent < smallest + 8 ? smallest : exponent - 8;
    bits[0] = amax_bits >= 0x7f800000 ? nan : exponent << 23;
    bits[1] = amax_bits >= 0x7f800000 ? nan : (254 - exponent) << 23;
    Fp8Scale s;
    memcpy(&s, bits, sizeof s);
    return s;
}

// Returns the bits of |x|.
static inline uint32_t fp8_abs_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

// Rounds x to e4m3: to nearest, ties to even. Beyond 448, Inf included, the result is 448 of the same sign.
// Any NaN becomes FP8_NAN. This is cvt.rn.satfinite.e4m3x2.f32 of one element.
static inline uint8_t fp8_from_float(float x) {
    const uint32_t magnitude = fp8_abs_bits(x);
    const uint8_t sign = signbit(x) ? 0x80 : 0;
    if (magnitude > 0x7f800000) return FP8_NAN;
    if (magnitude >= 0x43e00000) return sign | 0x7e;                      // 448
    if (magnitude < 0x3c800000)                                           // 2^-6
        return sign | (uint8_t)lrintf(fabsf(x) * 512);                    // subnormal, or rounded up to 2^-6
    const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1); // 20 bits of mantissa go
    return sign | (uint8_t)((rounded >> 20) - (120 << 3));
}

static inline float fp8_to_float(uint8_t x) {
    const int exponent = x >> 3 & 15, mantissa = x & 7;
    const float magnitude = (x & 0x7f) == FP8_NAN ? NAN
                            : exponent == 0       ? ldexpf((float)mantissa, -9)
                                                  : ldexpf((float)(8 + mantissa), exponent - 10);
    return x & 0x80 ? -magnitude : magnitude;
}

// Quantizes x [rows, k], whose rows are ldx elements apart, to q.
static inline void fp8_quantize(Fp8Matrix q, Fp8Scaling scaling, const float *x, int64_t ldx, int64_t rows,
                                int64_t k) {
    const int64_t height = scaling == FP8_SCALE_TENSOR ? rows : 1;
    for (int64_t row = 0; row < rows; row += height) {
        uint32_t amax = 0;
        for (int64_t i = row; i < row + height; i++)
            for (int64_t j = 0; j < k; j++)
                if (fp8_abs_bits(x[i * ldx + j]) > amax) amax = fp8_abs_bits(x[i * ldx + j]);
        const Fp8Scale s = fp8_scale(amax);
        q.scale[row] = s.scale;
        for (int64_t i = row; i < row + height; i++)
            for (int64_t j = 0; j < k; j++) q.data[i * k + j] = fp8_from_float(x[i * ldx + j] * s.inverse);
    }
}

// Returns n rounded up to a multiple of FP8_ALIGN: the row length of a transposed matrix of n rows.
static inline int64_t fp8_padded(int64_t n) {
    return (n + FP8_ALIGN - 1) / FP8_ALIGN * FP8_ALIGN;
}

// Transposes x [n, k], which has a scale for each row, to q [k, fp8_padded(n)] with scales of its own: q is
// the quantized transpose of x's values, with zeros at the ends of its rows. With FP8_SCALE_TENSOR its scale
// is the largest scale of x, which needs no look at the elements. tmp: [k, fp8_padded(n)].
static inline void fp8_transpose(Fp8Matrix q, Fp8Scaling scaling, Fp8Matrix x, int64_t n, int64_t k,
                                 float *tmp) {
    const int64_t padded = fp8_padded(n);
    for (int64_t j = 0; j < k; j++)
        for (int64_t i = 0; i < padded; i++)
            tmp[j * padded + i] = i < n ? fp8_to_float(x.data[i * k + j]) * x.scale[i] : 0;
    if (scaling != FP8_SCALE_TENSOR) {
        fp8_quantize(q, scaling, tmp, padded, k, padded);
        return;
    }
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++)
        if (fp8_abs_bits(x.scale[i]) > largest) largest = fp8_abs_bits(x.scale[i]);
    memcpy(q.scale, &largest, sizeof largest);
    for (int64_t i = 0; i < k * padded; i++) q.data[i] = fp8_from_float(tmp[i] * (1 / q.scale[0]));
}

// Makes the scales of all rows of q [rows, k] equal to the largest one.
static inline void fp8_equalize_scales(Fp8Matrix q, int64_t rows, int64_t k) {
    uint32_t bits = 0;
    float largest;
    for (int64_t i = 0; i < rows; i++)
        if (fp8_abs_bits(q.scale[i]) > bits) bits = fp8_abs_bits(q.scale[i]);
    memcpy(&largest, &bits, sizeof bits);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < k && q.scale[i] != largest; j++)
            q.data[i * k + j] = fp8_from_float(fp8_to_float(q.data[i * k + j]) * q.scale[i] * (1 / largest));
        q.scale[i] = largest;
    }
}

#undef FP8_FUNCTION
#endif
