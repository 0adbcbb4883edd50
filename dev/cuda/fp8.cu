// dev/cuda/fp8.cu: e4m3 quantization, alone and inside RMSNorm and SwiGLU, and matmuls on e4m3 operands.
//   bf16 (fp16)       : the 16-bit matmuls and layers of llmc, for comparison
//   tensor, row, block: a scale for the matrix, for each row, for each 128 elements of a row
//   fast              : the matmul with fast accumulation
//   ./fp8 [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "layers.h"
#include "../../llmc/fp8_matmul.cuh"
#include "../../llmc/rmsnorm.cuh"
#include <sys/wait.h>
#include <unistd.h>

static const char *const scaling_names[] = {"tensor", "row", "block"};
static const double matmul_tolerance = 3e-3, eps = 1e-5;
static Matmul mm;

// ---- matrices --------------------------------------------------------------------------------------------

// An e4m3 matrix [rows, k] on the device, with room for the scales of each scaling.
struct Fp8Buffer {
    int64_t rows, k;
    Buffer<uint8_t> data;
    Buffer<float> scale;
    Fp8Buffer(int64_t num_rows, int64_t row_size)
        : rows(num_rows), k(row_size), data(rows * k), scale((k + FP8_BLOCK - 1) / FP8_BLOCK * rows) {}
    operator Fp8Matrix() const { return {data.get(), scale.get()}; }
    void poison() { data.poison(), scale.poison(); }
};

// The same on the host.
struct Fp8Host {
    int64_t rows, k;
    std::vector<uint8_t> data;
    std::vector<float> scale;
    Fp8Host(int64_t num_rows, int64_t row_size)
        : rows(num_rows), k(row_size), data(rows * k), scale((k + FP8_BLOCK - 1) / FP8_BLOCK * rows) {}
    operator Fp8Matrix() { return {data.data(), scale.data()}; }
    int64_t scales(Fp8Scaling scaling) const {
        return scaling == FP8_SCALE_TENSOR ? 1 : scaling == FP8_SCALE_ROW ? rows : (int64_t)scale.size();
    }
    std::vector<float> values(Fp8Scaling scaling) {
        std::vector<float> x(rows * k);
        fp8_dequantize(x.data(), *this, scaling, rows, k);
        return x;
    }
};

// The same elements and scales, bit for bit, and nothing beyond the scales.
static void check_bits(const char *what, const char *shape, const Fp8Buffer &got, const Fp8Host &expected,
                       Fp8Scaling scaling) {
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<uint8_t> data = got.data.host();
    std::vector<float> scale = got.scale.host();
    const int64_t scales = expected.scales(scaling);
    int64_t wrong = 0, beyond = 0;
    for (size_t i = 0; i < data.size(); i++) wrong += data[i] != expected.data[i];
    for (int64_t i = 0; i < (int64_t)scale.size(); i++) {
        uint32_t a, b;
        memcpy(&a, &scale[i], 4), memcpy(&b, &expected.scale[i], 4);
        if (i < scales)
            wrong += a != b;
        else
            beyond += a != 0xffffffff;
    }
    const std::string name = std::string(what) + " " + scaling_names[scaling] + ", " + shape;
    check_that(wrong == 0, (name + ": bits that differ from fp8.h").c_str(), (double)wrong, 0);
    check_that(beyond == 0 && got.data.guards_intact() && got.scale.guards_intact(),
               (name + ": bytes written outside").c_str(), 1, 0);
}

// Values with heavy tails: normal, times a random power of two for each row, each column and each element.
static std::vector<floatX> heavy_tailed(Random *r, int64_t rows, int64_t k, int64_t ld) {
    std::vector<floatX> x(rows * ld, from_float<floatX>(NAN)); // NaN between the rows
    std::vector<int> column(k);
    for (int &e : column) e = r->below(50) ? 0 : 5;
    for (int64_t i = 0; i < rows; i++) {
        const int row = (int)r->below(9) - 8;
        for (int64_t j = 0; j < k; j++) {
            const int element = r->below(100) ? 0 : (int)r->below(8);
            x[i * ld + j] = from_float<floatX>(ldexpf(r->normal(), row + column[j] + element));
        }
    }
    return x;
}

// The same with rows of zeros, of one large value, of tiny and of the largest values, and with `special` NaN
// or Inf.
static std::vector<floatX> with_special_rows(Random *r, int64_t rows, int64_t k, int64_t ld, bool special) {
    std::vector<floatX> x = heavy_tailed(r, rows, k, ld);
    const bool half = std::is_same<floatX, __half>::value;
    const float largest = half ? 65504 : 3.38e38f, tiny = half ? 6e-8f : 1e-40f;
    for (int64_t i = 0; i < rows; i += 3) {
        const int kind = (int)r->below(special ? 7 : 4);
        for (int64_t j = 0; j < k && kind < 4; j++) {
            const float v = kind == 0 ? (j % 2 ? -0.0f : 0.0f) : kind == 2 ? tiny : kind == 3 ? largest : -1;
            if (kind != 1) x[i * ld + j] = from_float<floatX>(v);
        }
        const float value = kind == 1 ? 30000 : kind == 4 ? NAN : kind == 5 ? INFINITY : -INFINITY;
        if (kind == 1 || kind > 3) x[i * ld + r->below(k)] = from_float<floatX>(value);
    }
    return x;
}

static std::vector<float> floats_of(const std::vector<floatX> &x, int64_t rows, int64_t k, int64_t ld) {
    std::vector<float> f(rows * k);
    for (int64_t i = 0; i < rows * k; i++) f[i] = to_float(x[i / k * ld + i % k]);
    return f;
}

static Fp8Host quantized(const std::vector<float> &x, Fp8Scaling scaling, int64_t rows, int64_t k) {
    Fp8Host q(rows, k);
    fp8_quantize(q, scaling, x.data(), k, rows, k);
    return q;
}
static Fp8Host transposed(Fp8Host &x, Fp8Scaling scaling) {
    Fp8Host q(x.k, fp8_padded(x.rows));
    std::vector<float> tmp(q.rows * q.k);
    fp8_transpose(q, scaling, x, x.rows, x.k, tmp.data());
    return q;
}

// ---- numbers and scales ----------------------------------------------------------------------------------

static __global__ void convert_kernel(uint8_t *out, const float *x, int64_t n) {
    const int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i < n) out[i] = (uint8_t)pack_fp8x4(x[i], 0, 0, 0);
}

static void check_numbers(Random *r) {
    std::vector<float> x = {0.0f, -0.0f, 448, 449, 464, 480, 1e30f, -1e30f, INFINITY, -INFINITY, NAN, -NAN};
    for (int i = 0; i < 256; i++) { // every e4m3 number, the midpoint to the next, and both sides of it
        const float a = fp8_to_float((uint8_t)i), b = fp8_to_float((uint8_t)(i + 1)), middle = (a + b) / 2;
        if (isnan(a)) continue;
        check_that(fp8_from_float(a) == i, "e4m3 to float and back", i, 0);
        x.insert(x.end(), {a, middle, nextafterf(middle, a), nextafterf(middle, b)});
    }
    for (int i = 0; i < 20000; i++) {
        const uint32_t bits = (uint32_t)r->u64();
        float any;
        memcpy(&any, &bits, 4);
        x.insert(x.end(), {any, ldexpf(r->normal(), (int)r->below(20) - 12)});
    }
    const int64_t n = (int64_t)x.size();
    Buffer<float> in(x);
    Buffer<uint8_t> out(n);
    convert_kernel<<<(unsigned)((n + 255) / 256), 256>>>(out, in, n);
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<uint8_t> got = out.host();
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++) wrong += got[i] != fp8_from_float(x[i]);
    check_that(wrong == 0, "conversion to e4m3: bits that differ from fp8.h", (double)wrong, 0);
    // every value is rounded to the nearest of all numbers
    for (int64_t i = 0; i < n; i += 37) {
        if (isnan(x[i])) continue;
        double nearest = INFINITY;
        for (int j = 0; j < 256; j++) {
            const double number = fp8_to_float((uint8_t)j);
            if (!isnan(number)) nearest = std::min(nearest, fabs(number - (double)x[i]));
        }
        const double e = fabs((double)fp8_to_float(fp8_from_float(x[i])) - (double)x[i]);
        check_that(e == nearest || isinf(x[i]), "rounding to the nearest e4m3 number", e, nearest);
    }
}

static void check_scales(Random *r) {
    for (int i = 0; i < 20000; i++) {
        const uint32_t bits = i == 0   ? 0x43e00000 // 448
                              : i == 1 ? 0x43e00001
                              : i == 2 ? 0
                              : i == 3 ? 0x7f800000 // Inf
                              : i == 4 ? 0x7f7fffff
                                       : (uint32_t)r->u64() & 0x7fffffff;
        float amax;
        memcpy(&amax, &bits, 4);
        const Fp8Scale s = fp8_scale(bits);
        int exponent;
        if (!isfinite(amax)) {
            check_that(isnan(s.scale) && isnan(s.inverse), "scale of NaN or Inf", s.scale, NAN);
            continue;
        }
        check_that(s.scale * s.inverse == 1 && frexp(s.scale, &exponent) == 0.5, "scale: a power of two",
                   s.scale, 1);
        check_that((double)amax <= 448.0 * s.scale, "scale: the largest value fits", amax, s.scale);
        check_that((double)amax > 224.0 * s.scale || s.scale == 0x1p-120f, "scale: the smallest that fits",
                   amax, s.scale);
    }
}

// ---- quantizers ------------------------------------------------------------------------------------------

static void check_quantizers(Random *r, int64_t n, int64_t k, int64_t ldx) {
    char shape[64];
    snprintf(shape, sizeof shape, "n %lld k %lld ldx %lld", (long long)n, (long long)k, (long long)ldx);
    for (int special = 0; special < 2; special++) {
        const std::vector<floatX> x = with_special_rows(r, n, k, ldx, special);
        BufferX in(x);
        Fp8Buffer q(n, k);
        Fp8Host rows = quantized(floats_of(x, n, k, ldx), FP8_SCALE_ROW, n, k);
        quantize_rows(q, in, ldx, n, k, 0);
        check_bits("quantize_rows", shape, q, rows, FP8_SCALE_ROW);
        for (int scaling = 0; scaling < 3; scaling++) {
            Fp8Buffer q_t(k, fp8_padded(n)), again(k, fp8_padded(n));
            Buffer<uint32_t> scratch(k);
            quantize_transpose(q_t, (Fp8Scaling)scaling, q, n, k, scratch, 0);
            check_bits("quantize_transpose", shape, q_t, transposed(rows, (Fp8Scaling)scaling),
                       (Fp8Scaling)scaling);
            quantize_transpose(again, (Fp8Scaling)scaling, q, n, k, scratch, 0);
            check_same("quantize_transpose", q_t.data, again.data);
            check_that(scratch.guards_intact(), "quantize_transpose: bytes written outside of scratch", 1, 0);
        }
        Buffer<float> largest(1);
        for (int twice = 0; twice < 2; twice++) { // the second time nothing changes
            equalize_scales(q, n, k, largest, 0);
            if (twice == 0) fp8_equalize_scales(rows, n, k);
            check_bits("equalize_scales", shape, q, rows, FP8_SCALE_ROW);
        }
    }
}

static void check_weight(Random *r, int64_t out, int64_t in) {
    char shape[64];
    snprintf(shape, sizeof shape, "out %lld in %lld", (long long)out, (long long)in);
    const std::vector<floatX> weight = with_special_rows(r, out, in, in, false);
    BufferX w(weight);
    Fp8Buffer q(out, in), q_t(in, out);
    Buffer<uint32_t> scratch(in);
    Fp8Host rows = quantized(floats_of(weight, out, in, in), FP8_SCALE_ROW, out, in);
    quantize_weight(q, q_t, w, out, in, scratch, 0);
    check_bits("quantize_weight", shape, q, rows, FP8_SCALE_ROW);
    check_bits("quantize_weight, transposed", shape, q_t, transposed(rows, FP8_SCALE_ROW), FP8_SCALE_ROW);
}

// q holds what quantize_rows makes of x [n, k].
static void check_quantized_output(const char *what, const char *shape, const Fp8Buffer &q,
                                   const BufferX &x) {
    CUDA_CHECK(cudaDeviceSynchronize());
    check_bits(what, shape, q, quantized(x.floats(), FP8_SCALE_ROW, q.rows, q.k), FP8_SCALE_ROW);
}

// RMSNorm's outputs in e4m3 are those in 16 bits, quantized; the 16-bit outputs stay the same.
static void check_rmsnorm(Random *r, int64_t n, int c) {
    char shape[64];
    snprintf(shape, sizeof shape, "n %lld c %d", (long long)n, c);
    BufferX x(heavy_tailed(r, n, c, c)), y(heavy_tailed(r, n, c, c)), dout(heavy_tailed(r, n, c, c));
    HostX weight(r, c, 1), dx0(r, n * c, 1);
    BufferX w(weight.raw), out(n * c), plain(n * c), sum(n * c), plain_sum(n * c), dx(dx0.raw),
        plain_dx(dx0.raw);
    Buffer<float> rstd(n), plain_rstd(n), dw(c), plain_dw(c);
    Buffer<char> scratch((int64_t)rmsnorm_backward_scratch(n, c));
    Fp8Buffer q(n, c);
    rmsnorm_forward(plain, plain_rstd, x, w, n, c, (float)eps, 0);
    rmsnorm_forward(out, rstd, x, w, n, c, (float)eps, 0, q);
    check_same("rmsnorm with e4m3", out, plain);
    check_same("rstd with e4m3", rstd, plain_rstd);
    check_quantized_output("rmsnorm", shape, q, plain);
    q.poison();
    rmsnorm_forward(NULL, rstd, x, w, n, c, (float)eps, 0, q);
    check_quantized_output("rmsnorm alone", shape, q, plain);
    q.poison();
    rmsnorm_residual_forward(plain, plain_sum, plain_rstd, x, y, w, n, c, (float)eps, 0);
    rmsnorm_residual_forward(NULL, sum, rstd, x, y, w, n, c, (float)eps, 0, q);
    check_same("sum with e4m3", sum, plain_sum);
    check_quantized_output("rmsnorm of a sum", shape, q, plain);
    for (int add = 0; add < 2; add++) {
        q.poison(), dw.zero(), plain_dw.zero();
        rmsnorm_backward(plain_dx, add, plain_dw, dout, x, w, plain_rstd, n, c, scratch, 0);
        rmsnorm_backward(dx, add, dw, dout, x, w, plain_rstd, n, c, scratch, 0, q);
        check_same("rmsnorm backward with e4m3", dx, plain_dx);
        check_same("rmsnorm dweight with e4m3", dw, plain_dw);
        check_quantized_output("rmsnorm backward", shape, q, plain_dx);
    }
}

static void check_swiglu(Random *r, int64_t n, int h) {
    char shape[64];
    snprintf(shape, sizeof shape, "n %lld h %d", (long long)n, h);
    HostX gate_up(r, n * 2 * h, 3), dout(r, n * h, 1);
    BufferX in(gate_up.raw), d(dout.raw), out(n * h), plain(n * h), din(n * 2 * h), plain_din(n * 2 * h);
    Fp8Buffer q(n, h), dq(n, 2 * h);
    swiglu_forward(plain, in, n, h, 0);
    swiglu_forward(out, in, n, h, 0, q);
    check_same("swiglu with e4m3", out, plain);
    check_quantized_output("swiglu", shape, q, plain);
    q.poison();
    swiglu_forward(NULL, in, n, h, 0, q);
    check_quantized_output("swiglu alone", shape, q, plain);
    swiglu_backward(plain_din, d, in, n, h, 0);
    swiglu_backward(din, d, in, n, h, 0, dq);
    check_same("swiglu backward with e4m3", din, plain_din);
    check_quantized_output("swiglu backward", shape, dq, plain_din);
    dq.poison();
    swiglu_backward(NULL, d, in, n, h, 0, dq);
    check_quantized_output("swiglu backward alone", shape, dq, plain_din);
    swiglu_backward(in, d, in, n, h, 0, dq);
    check_same("swiglu with e4m3, gradient in place", in, plain_din);
}

// ---- matmuls ---------------------------------------------------------------------------------------------

// The relative error of out [rows_a, rows_b], rows ldo elements apart, against old + a b^T in double, at a
// sample of rows and columns.
template <typename T>
static double sampled_error(Random *r, const std::vector<T> &out, int64_t ldo, const std::vector<float> &old,
                            const std::vector<float> &a, const std::vector<float> &b, int64_t rows_a,
                            int64_t rows_b, int64_t k) {
    double diff = 0, norm = 0;
    for (int s = 0; s < 2048; s++) {
        const int64_t i = s == 0 ? 0 : s == 1 ? rows_a - 1 : r->below(rows_a);
        const int64_t j = s == 0 ? 0 : s == 1 ? rows_b - 1 : r->below(rows_b);
        double sum = old.empty() ? 0 : old[i * rows_b + j];
        for (int64_t p = 0; p < k; p++) sum += (double)a[i * k + p] * b[j * k + p];
        const double e = to_float(out[i * ldo + j]) - sum;
        diff += e * e, norm += sum * sum;
    }
    return sqrt(diff / norm);
}

// Whether all elements between the rows of out are still poisoned.
static bool gaps_poisoned(const std::vector<floatX> &out, int64_t ldo, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = columns; j < ldo; j++) {
            unsigned char bytes[sizeof(floatX)];
            memcpy(bytes, &out[i * ldo + j], sizeof bytes);
            if (bytes[0] != 0xff || bytes[1] != 0xff) return false;
        }
    }
    return true;
}

static void upload(Fp8Buffer &to, const Fp8Host &from, Fp8Scaling scaling) {
    to.data.set(from.data);
    to.scale.set(std::vector<float>(from.scale.begin(), from.scale.begin() + from.scales(scaling)));
}

// One matmul in one mode: out = a b^T, then out += a b^T.
template <typename T>
static void check_matmul(Random *r, const char *what, Fp8Mode mode, Fp8Host &a, Fp8Host &b, int64_t ldo) {
    const int64_t rows_a = a.rows, rows_b = b.rows, k = a.k;
    const int fp32_out = std::is_same<T, float>::value;
    char name[160];
    snprintf(name, sizeof name, "%s %s%s, [%lld, %lld] x [%lld, %lld]^T ldo %lld", what,
             scaling_names[mode.scaling], mode.fast ? " fast" : "", (long long)rows_a, (long long)k,
             (long long)rows_b, (long long)k, (long long)ldo);
    const bool equalized = mode.scaling == FP8_SCALE_ROW && !mm.row_scales;
    if (!equalized && !fp8_matmul_supported(&mm, mode, fp32_out, ldo, rows_a, rows_b, k)) {
        printf("not supported by cuBLASLt: %s\n", name);
        check_that(mode.scaling == FP8_SCALE_BLOCK, name, 1, 0);
        return;
    }
    // a few elements can have larger rounding errors than the average of many
    const double tolerance = rows_a * rows_b < 4096 && !fp32_out ? rounded_tolerance : matmul_tolerance;
    Fp8Buffer a_in(rows_a, k), b_in(rows_b, k);
    upload(a_in, a, mode.scaling), upload(b_in, b, mode.scaling);
    if (equalized) fp8_equalize_scales(a, rows_a, k), fp8_equalize_scales(b, rows_b, k);
    const std::vector<float> a_values = a.values(mode.scaling), b_values = b.values(mode.scaling);
    Buffer<T> out(rows_a * ldo), again(rows_a * ldo);
    fp8_matmul(&mm, mode, out, fp32_out, ldo, 0, a_in, b_in, rows_a, rows_b, k, 0);
    fp8_matmul(&mm, mode, again, fp32_out, ldo, 0, a_in, b_in, rows_a, rows_b, k, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    check_same(name, out, again);
    const std::vector<T> got = out.host();
    double e = sampled_error(r, got, ldo, {}, a_values, b_values, rows_a, rows_b, k);
    double &w = worst[std::string(what) + " " + scaling_names[mode.scaling] + (mode.fast ? " fast" : "")];
    w = std::max(w, e);
    check_that(e < tolerance, name, e, tolerance);
    if constexpr (std::is_same<T, floatX>::value)
        check_that(gaps_poisoned(got, ldo, rows_a, rows_b), "fp8 matmul: bytes written between rows", 1, 0);
    std::vector<float> old(rows_a * rows_b);
    for (int64_t i = 0; i < rows_a * rows_b; i++) old[i] = to_float(got[i / rows_b * ldo + i % rows_b]);
    fp8_matmul(&mm, mode, out, fp32_out, ldo, 1, a_in, b_in, rows_a, rows_b, k, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    e = sampled_error(r, out.host(), ldo, old, a_values, b_values, rows_a, rows_b, k);
    check_that(e < tolerance, (std::string(name) + ", added").c_str(), e, tolerance);
    check_that(out.guards_intact(), "fp8 matmul: bytes written outside", 1, 0);
    check_bits("operand of a matmul", name, a_in, a, mode.scaling);
    check_bits("operand of a matmul", name, b_in, b, mode.scaling);
}

// Normal values, times a power of two for each row and each column.
static std::vector<float> scaled_normal(Random *r, int64_t rows, int64_t k) {
    std::vector<float> x(rows * k);
    std::vector<int> column(k);
    for (int &e : column) e = (int)r->below(4);
    for (int64_t i = 0; i < rows; i++) {
        const int row = -(int)r->below(4);
        for (int64_t j = 0; j < k; j++)
            x[i * k + j] = to_float(from_float<floatX>(ldexpf(r->normal(), row + column[j])));
    }
    return x;
}

// The three matmuls of a linear layer of n tokens, c inputs and o outputs, in the trainer's modes and in
// those that lost.
static void check_layer(Random *r, int64_t n, int64_t c, int64_t o, int64_t ldo, bool all_modes) {
    const std::vector<float> x = scaled_normal(r, n, c), w = scaled_normal(r, o, c),
                             dout = scaled_normal(r, n, o);
    Fp8Host x_rows = quantized(x, FP8_SCALE_ROW, n, c), dout_rows = quantized(dout, FP8_SCALE_ROW, n, o);
    for (int scaling = 0; scaling < 3; scaling++) {
        const Fp8Scaling s = (Fp8Scaling)scaling;
        if (!all_modes && s != FP8_SCALE_ROW) continue;
        Fp8Host x_q = quantized(x, s, n, c), w_q = quantized(w, s, o, c), dout_q = quantized(dout, s, n, o);
        Fp8Host w_t(c, o), x_t = transposed(x_rows, s), dout_t = transposed(dout_rows, s);
        std::vector<float> w_transposed(c * o);
        for (int64_t i = 0; i < c * o; i++) w_transposed[i] = w[i % o * c + i / o];
        fp8_quantize(w_t, s, w_transposed.data(), o, c, o);
        check_matmul<floatX>(r, "fwd", {s, 0}, x_q, w_q, ldo);
        check_matmul<floatX>(r, "dinput", {s, 0}, dout_q, w_t, c);
        check_matmul<float>(r, "dweight", {s, 0}, dout_t, x_t, c);
    }
}

// A row with NaN or Inf makes its outputs and the weight's gradient NaN, and with row scales no other row's
// outputs.
static void check_not_finite(Random *r, float value) {
    const int64_t n = 20, c = 32, o = 48, bad = 7;
    std::vector<floatX> x = heavy_tailed(r, n, c, c);
    x[bad * c + 5] = from_float<floatX>(value);
    BufferX in(x), weight(heavy_tailed(r, o, c, c)), y(n * o), dy(heavy_tailed(r, n, o, o));
    Buffer<float> dw(o * c);
    Buffer<uint32_t> scratch(64);
    Fp8Buffer q(n, c), w(o, c), w_t(c, o), dq(n, o), q_t(c, fp8_padded(n)), dq_t(o, fp8_padded(n));
    quantize_rows(q, in, c, n, c, 0);
    quantize_rows(dq, dy, o, n, o, 0);
    quantize_weight(w, w_t, weight, o, c, scratch, 0);
    quantize_transpose(q_t, FP8_WEIGHT_GRADIENT.scaling, q, n, c, scratch, 0);
    quantize_transpose(dq_t, FP8_WEIGHT_GRADIENT.scaling, dq, n, o, scratch, 0);
    fp8_matmul_forward(&mm, y, o, q, w, n, c, o, 0);
    fp8_matmul_backward_weight(&mm, dw, 0, dq_t, q_t, n, c, o, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    bool nan_row = true, others = true, nan_weight = true;
    const std::vector<float> y_host = y.floats(), dw_host = dw.host();
    for (int64_t i = 0; i < n * o; i++) {
        if (i / o == bad)
            nan_row = nan_row && isnan(y_host[i]);
        else
            others = others && isfinite(y_host[i]);
    }
    for (float v : dw_host) nan_weight = nan_weight && isnan(v);
    check_that(nan_row && nan_weight, "fp8: NaN or Inf does not reach the results", value, 0);
    check_that(others || !mm.row_scales, "fp8: NaN or Inf reaches another row", value, 0);
}

// ---- models that cannot be trained in 8 bits -------------------------------------------------------------

// fp8_check exits with an error that contains `message`; NULL: it returns.
static void check_refused(const ModelConfig *c, int major, int minor, const char *message) {
    cudaDeviceProp gpu = {};
    gpu.major = major, gpu.minor = minor, strcpy(gpu.name, "GPU");
    int fds[2], status = 0;
    char text[512] = "";
    if (pipe(fds) != 0) exit(1);
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        dup2(fds[1], 2);
        fp8_check(c, &gpu);
        _exit(0);
    }
    close(fds[1]);
    const ssize_t bytes = read(fds[0], text, sizeof text - 1);
    close(fds[0]);
    waitpid(child, &status, 0);
    const char *newline = strchr(text, '\n');
    const bool one_line = bytes > 0 && newline && newline[1] == 0;
    const bool good =
        message ? WEXITSTATUS(status) == 1 && one_line && strstr(text, message) : status == 0 && bytes == 0;
    check_that(good, (std::string("fp8_check: ") + (message ? message : "accepted") + ": " + text).c_str(), 1,
               0);
}

static void check_models() {
    ModelConfig c = {};
    c.channels = 4096, c.hidden = 14336, c.fsa.q_heads = 32, c.fsa.kv_heads = 8, c.fsa.head_dim = 128;
    check_refused(&c, 9, 0, NULL);
    check_refused(&c, 8, 0, "compute capability 8.0");
    check_refused(&c, 8, 9, NULL);
    check_refused(&c, 12, 0, NULL);
    c.channels = 4104;
    check_refused(&c, 9, 0, "-channels 4104: must be a multiple of 16; try -channels 4112");
    c.channels = 4096, c.hidden = 14344;
    check_refused(&c, 9, 0, "-hidden 14344: must be a multiple of 16; try -hidden 14352");
    c.hidden = 65536;
    check_refused(&c, 9, 0, "-hidden 65536: must be at most 58112");
    c.hidden = 14336, c.fsa.q_heads = 3, c.fsa.kv_heads = 3, c.fsa.head_dim = 24;
    check_refused(&c, 9, 0, "try -head-dim 32");
    c.fsa.q_heads = 256, c.fsa.kv_heads = 8, c.fsa.head_dim = 128;
    check_refused(&c, 9, 0, "q, k and v have 34816 channels: must be at most 32768");
}

// ---- errors of the scalings against 16-bit operands ------------------------------------------------------

static void report_error(const char *data, const char *dir, const char *version, int64_t n, int64_t c,
                         int64_t o, double err) {
    printf("fp8 error, %s, %s, %s, n %lld, c %lld, o %lld: %.4f\n", data, dir, version, (long long)n,
           (long long)c, (long long)o, err);
    FILE *f = record_start("fp8");
    if (!f) return;
    fprintf(f,
            ",\"part\":\"error\",\"data\":\"%s\",\"dir\":\"%s\",\"n\":%lld,\"c\":%lld,\"o\":%lld,"
            "\"dtype\":\"%s\",\"err\":%.4g,\"version\":\"%s\"}\n",
            data, dir, (long long)n, (long long)c, (long long)o, FLOATX_NAME, err, version);
    fclose(f);
}

// out = a b^T of the quantized a and b, in one mode; empty if cuBLASLt cannot.
static std::vector<float> multiplied(Fp8Mode mode, Fp8Host &a, Fp8Host &b) {
    if (!fp8_matmul_supported(&mm, mode, 1, b.rows, a.rows, b.rows, a.k)) return {};
    Fp8Buffer a_in(a.rows, a.k), b_in(b.rows, b.k);
    Buffer<float> out(a.rows * b.rows);
    upload(a_in, a, mode.scaling), upload(b_in, b, mode.scaling);
    fp8_matmul(&mm, mode, out, 1, b.rows, 0, a_in, b_in, a.rows, b.rows, a.k, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    return out.host();
}
static std::vector<float> transposed_floats(const std::vector<float> &x, int64_t rows, int64_t k) {
    std::vector<float> t(rows * k);
    for (int64_t i = 0; i < rows * k; i++) t[i] = x[i % rows * k + i / rows];
    return t;
}

// Relative errors of y, dx and dW in each mode, against the matmuls of llmc/matmul.cuh on the same 16-bit
// operands. n is a multiple of 128. Quantization twice is the library's path: by rows, then transposed.
static void compare_errors(Random *r, const char *data, int64_t n, int64_t c, int64_t o, double limit) {
    std::vector<floatX> x = heavy_tailed(r, n, c, c), w(o * c), dy = heavy_tailed(r, n, o, o);
    if (strcmp(data, "normal") == 0) {
        for (floatX &v : x) v = from_float<floatX>(r->normal());
        for (floatX &v : dy) v = from_float<floatX>(r->normal());
    }
    for (floatX &v : w) v = from_float<floatX>(0.02f * r->normal());
    const std::vector<float> xf = floats_of(x, n, c, c), wf = floats_of(w, o, c, c),
                             dyf = floats_of(dy, n, o, o), x_tf = transposed_floats(xf, n, c),
                             dy_tf = transposed_floats(dyf, n, o), w_tf = transposed_floats(wf, o, c);
    BufferX x_in(x), w_in(w), dy_in(dy), y(n * o), dx(n * c);
    Buffer<float> dw(o * c);
    dw.zero();
    matmul_forward(&mm, y, o, x_in, c, w_in, NULL, n, c, o, 0);
    matmul_backward_input(&mm, dx, 0, dy_in, o, w_in, n, c, o, 0);
    matmul_backward_weight(&mm, dw, dy_in, o, x_in, c, n, c, o, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<float> y_ref = y.floats(), dx_ref = dx.floats(), dw_ref = dw.host();
    Fp8Host x_rows = quantized(xf, FP8_SCALE_ROW, n, c), dy_rows = quantized(dyf, FP8_SCALE_ROW, n, o);
    for (int i = 0; i < 6; i++) {
        const Fp8Mode mode = {(Fp8Scaling)(i / 2), i % 2};
        const Fp8Scaling s = mode.scaling;
        Fp8Host xq = quantized(xf, s, n, c), wq = quantized(wf, s, o, c), dyq = quantized(dyf, s, n, o),
                w_tq = quantized(w_tf, s, c, o), x_tq = quantized(x_tf, s, c, n),
                dy_tq = quantized(dy_tf, s, o, n), x_t2 = transposed(x_rows, s),
                dy_t2 = transposed(dy_rows, s);
        const struct {
            const char *dir;
            Fp8Host *a, *b;
            const std::vector<float> *expected;
        } cases[] = {{"fwd", &xq, &wq, &y_ref},
                     {"dinput", &dyq, &w_tq, &dx_ref},
                     {"dweight", &dy_tq, &x_tq, &dw_ref},
                     {"dweight, quantized twice", &dy_t2, &x_t2, &dw_ref}};
        for (const auto &t : cases) {
            const std::vector<float> got = multiplied(mode, *t.a, *t.b);
            if (got.empty()) continue;
            const double e = relative_error(got, *t.expected);
            check_that(e < limit, (std::string("error of ") + t.dir).c_str(), e, limit);
            if (n > 1000)
                report_error(data, t.dir,
                             (std::string(scaling_names[s]) + (mode.fast ? " fast" : "")).c_str(), n, c, o,
                             e);
        }
    }
}

// ---- times -----------------------------------------------------------------------------------------------

static void time_matmuls(Random *r, int64_t n, int64_t c, int64_t o) {
    const int64_t padded = fp8_padded(n);
    const double flops = 2.0 * (double)n * (double)c * (double)o;
    const double in = (double)(n * c + o * c + n * o); // elements of all three matrices
    BufferX x(n * c), w(o * c), y(n * o);
    Buffer<float> dw(o * c);
    fill_random(x.get(), n * c, r->u64(), 1), fill_random(w.get(), o * c, r->u64(), 0.02f);
    fill_random(y.get(), n * o, r->u64(), 1);
    dw.zero();
    Fp8Buffer xq(n, c), wq(o, c), yq(n, o), w_tq(c, o), x_tq(c, padded), y_tq(o, padded);
    Buffer<uint32_t> scratch(std::max(c, o));
    quantize_rows(xq, x, c, n, c, 0), quantize_rows(yq, y, o, n, o, 0);
    quantize_weight(wq, w_tq, w, o, c, scratch, 0);
    quantize_transpose(x_tq, FP8_SCALE_ROW, xq, n, c, scratch, 0);
    quantize_transpose(y_tq, FP8_SCALE_ROW, yq, n, o, scratch, 0);
    for (Fp8Buffer *q : {&xq, &wq, &yq, &w_tq, &x_tq, &y_tq}) // scales of any mode
        fill_random(q->scale.get(), q->scale.n, r->u64(), 1);
    double ms = time_ms([&] { matmul_backward_weight(&mm, dw, y, o, x, c, n, c, o, 0); });
    report("fp8", "dweight", FLOATX_NAME, n, c, o, ms, 2 * in + 6.0 * (double)(o * c), flops);
    ms = time_ms([&] { matmul_backward_input(&mm, x, 0, y, o, w, n, c, o, 0); });
    report("fp8", "dinput", FLOATX_NAME, n, c, o, ms, 2 * in, flops);
    ms = time_ms([&] { matmul_forward(&mm, y, o, x, c, w, NULL, n, c, o, 0); });
    report("fp8", "fwd", FLOATX_NAME, n, c, o, ms, 2 * in, flops);
    for (int i = 0; i < 6; i++) {
        const Fp8Mode mode = {(Fp8Scaling)(i / 2), i % 2};
        const std::string version = std::string(scaling_names[mode.scaling]) + (mode.fast ? " fast" : "");
        const struct {
            const char *dir;
            void *out;
            int fp32_out, add;
            Fp8Buffer *a, *b;
            double bytes;
        } cases[] = {
            {"fwd", y.get(), 0, 0, &xq, &wq, in + (double)(n * o)},
            {"dinput", x.get(), 0, 0, &yq, &w_tq, in + (double)(n * c)},
            {"dweight", dw.get(), 1, 1, &y_tq, &x_tq, in + 7.0 * (double)(o * c)},
            {"dweight, beta 0", dw.get(), 1, 0, &y_tq, &x_tq, in + 3.0 * (double)(o * c)},
        };
        for (const auto &t : cases) {
            if (!fp8_matmul_supported(&mm, mode, t.fp32_out, t.b->rows, t.a->rows, t.b->rows, t.a->k)) {
                printf("fp8 %s %s: not supported by cuBLASLt\n", t.dir, version.c_str());
                continue;
            }
            ms = time_ms([&] {
                fp8_matmul(&mm, mode, t.out, t.fp32_out, t.b->rows, t.add, *t.a, *t.b, t.a->rows, t.b->rows,
                           t.a->k, 0);
            });
            report("fp8", t.dir, version.c_str(), n, c, o, ms, t.bytes, flops);
        }
    }
}

static void time_quantizers(Random *r, int64_t n, int64_t k) {
    BufferX x(n * k);
    fill_random(x.get(), n * k, r->u64(), 1);
    Fp8Buffer q(n, k), q_t(k, fp8_padded(n));
    Buffer<uint32_t> scratch(k);
    const double elements = (double)n * (double)k;
    double ms = time_ms([&] { quantize_rows(q, x, k, n, k, 0); });
    report("fp8", "quantize", "row", n, k, 0, ms, (sizeof(floatX) + 1.0) * elements, 0);
    for (int scaling = 0; scaling < 3; scaling++) {
        ms = time_ms([&] { quantize_transpose(q_t, (Fp8Scaling)scaling, q, n, k, scratch, 0); });
        report("fp8", "transpose", scaling_names[scaling], n, k, 0, ms,
               (scaling == FP8_SCALE_ROW ? 3 : 2) * elements, 0);
    }
}

static void time_weight(Random *r, int64_t out, int64_t in) {
    BufferX x(out * in);
    fill_random(x.get(), out * in, r->u64(), 0.02f);
    Fp8Buffer q(out, in), q_t(in, out);
    Buffer<uint32_t> scratch(in);
    const double ms = time_ms([&] { quantize_weight(q, q_t, x, out, in, scratch, 0); });
    report("fp8", "weight", "row", out, in, 0, ms, (sizeof(floatX) + 4.0) * (double)(out * in), 0);
}

// The layers that write 16 bits, e4m3, or both.
static void time_layers(Random *r, int64_t n, int c, int h) {
    const double X = sizeof(floatX), size = (double)n * c, wide = (double)n * h;
    {
        BufferX x(n * c), y(n * c), out(n * c), weight(c);
        Buffer<float> rstd(n), dw(c);
        Buffer<char> scratch((int64_t)rmsnorm_backward_scratch(n, c));
        Fp8Buffer q(n, c);
        fill_random(x.get(), n * c, r->u64(), 1), fill_random(y.get(), n * c, r->u64(), 1);
        fill_random(weight.get(), c, r->u64(), 1);
        dw.zero();
        double ms =
            time_ms([&] { rmsnorm_residual_forward(out, x, rstd, x, y, weight, n, c, (float)eps, 0); });
        report("fp8", "residual", FLOATX_NAME, n, c, 0, ms, 4 * X * size, 0);
        ms = time_ms([&] { rmsnorm_residual_forward(NULL, x, rstd, x, y, weight, n, c, (float)eps, 0, q); });
        report("fp8", "residual", "row", n, c, 0, ms, (3 * X + 1) * size, 0);
        ms = time_ms([&] { rmsnorm_residual_forward(out, x, rstd, x, y, weight, n, c, (float)eps, 0, q); });
        report("fp8", "residual", "both", n, c, 0, ms, (4 * X + 1) * size, 0);
        ms = time_ms([&] { rmsnorm_backward(out, 1, dw, y, x, weight, rstd, n, c, scratch, 0); });
        report("fp8", "rmsnorm bwd", FLOATX_NAME, n, c, 0, ms, 4 * X * size, 0);
        ms = time_ms([&] { rmsnorm_backward(out, 1, dw, y, x, weight, rstd, n, c, scratch, 0, q); });
        report("fp8", "rmsnorm bwd", "both", n, c, 0, ms, (4 * X + 1) * size, 0);
    }
    BufferX in(2 * n * h), out(n * h), din(2 * n * h);
    Fp8Buffer q(n, 2 * h);
    fill_random(in.get(), 2 * n * h, r->u64(), 3), fill_random(out.get(), n * h, r->u64(), 1);
    double ms = time_ms([&] { swiglu_backward(din, out, in, n, h, 0); });
    report("fp8", "swiglu bwd", FLOATX_NAME, n, h, 0, ms, 5 * X * wide, 0);
    ms = time_ms([&] { swiglu_backward(NULL, out, in, n, h, 0, q); });
    report("fp8", "swiglu bwd", "row", n, h, 0, ms, (3 * X + 2) * wide, 0);
    ms = time_ms([&] { swiglu_backward(din, out, in, n, h, 0, q); });
    report("fp8", "swiglu bwd", "both", n, h, 0, ms, (5 * X + 2) * wide, 0);
    ms = time_ms([&] { swiglu_forward(out, in, n, h, 0); });
    report("fp8", "swiglu fwd", FLOATX_NAME, n, h, 0, ms, 3 * X * wide, 0);
    ms = time_ms([&] { swiglu_forward(NULL, in, n, h, 0, q); });
    report("fp8", "swiglu fwd", "row", n, h, 0, ms, (2 * X + 1) * wide, 0);
    ms = time_ms([&] { swiglu_forward(out, in, n, h, 0, q); });
    report("fp8", "swiglu fwd", "both", n, h, 0, ms, (3 * X + 1) * wide, 0);
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    const bool small = has_flag(argc, argv, "small");
    Buffer<char> workspace(MATMUL_WORKSPACE_BYTES);
    check_numbers(&r), check_scales(&r), check_models();
    check_quantizers(&r, 1, 16, 16); // every size of team, and tiles that are not full
    check_quantizers(&r, 33, 48, 56);
    check_quantizers(&r, 129, 1072, 1072);
    check_quantizers(&r, 20, 4112, 4120);
    check_quantizers(&r, 3, 16400, 16400);
    check_weight(&r, 144, 272);
    check_rmsnorm(&r, 1, 16), check_rmsnorm(&r, 33, 64), check_rmsnorm(&r, 9, 272);
    check_rmsnorm(&r, 19, 1040), check_rmsnorm(&r, 2, 4112);
    check_swiglu(&r, 1, 16), check_swiglu(&r, 5, 352), check_swiglu(&r, 2, 16400);

    int major;
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    if (major != 9) {
        printf("fp8: compute capability %d.x: matmuls with row scales need 9.0; they are not tested\n",
               major);
        return finish("fp8");
    }
    matmul_init(&mm, workspace, MATMUL_WORKSPACE_BYTES);
    check_layer(&r, 1, 16, 16, 16, true);
    check_layer(&r, 31, 48, 80, 88, true);
    check_layer(&r, 130, 256, 144, 144, true);
    check_layer(&r, 256, 384, 512, 512, true);
    if (mm.row_scales) { // the path of GPUs and toolkits without them
        mm.row_scales = 0;
        check_layer(&r, 31, 48, 80, 88, false);
        check_layer(&r, 130, 256, 144, 144, false);
        check_not_finite(&r, NAN);
        mm.row_scales = 1;
    }
    check_not_finite(&r, NAN), check_not_finite(&r, INFINITY), check_not_finite(&r, -INFINITY);
    compare_errors(&r, "normal", 128, 256, 384, 0.06);
    compare_errors(&r, "heavy tails", 128, 256, 384, 0.06);
    int presets_count;
    const Preset *preset = presets(&presets_count);
    for (int i = 0; i < presets_count; i++) {
        const Preset *p = &preset[i];
        const int64_t d = p->head_dim, q = p->q_heads * d, qkv = q + 2 * p->kv_heads * d;
        if (p->channels > (small ? 256 : 1 << 20)) continue;
        const int64_t n = small ? 17 : 257;
        check_layer(&r, n, p->channels, qkv, qkv + 32, false);
        check_layer(&r, n, q, p->channels, p->channels, false);
        check_layer(&r, n, p->channels, 2 * p->hidden, 2 * p->hidden, false);
        check_layer(&r, n, p->hidden, p->channels, p->channels, false);
    }
    if (!has_flag(argc, argv, "check")) {
        compare_errors(&r, "normal", 2048, 4096, 1024, 0.06);
        compare_errors(&r, "heavy tails", 2048, 4096, 1024, 0.06);
        for (int64_t n : {8192, 65536}) {
            const struct {
                int64_t c, o;
            } weights[] = {{4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}};
            for (auto w : weights) time_matmuls(&r, n, w.c, w.o);
            for (int64_t k : {4096, 6144, 14336, 28672}) time_quantizers(&r, n, k);
            time_layers(&r, n, 4096, 14336);
        }
        const struct {
            int64_t out, in;
        } weights[] = {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}};
        for (auto w : weights) time_weight(&r, w.out, w.in);
    }
    check_that(workspace.guards_intact(), "fp8: bytes written outside of the workspace", 1, 0);
    matmul_free(&mm);
    return finish("fp8");
}
