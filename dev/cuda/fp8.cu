// dev/cuda/fp8.cu: quantization to e4m3, alone and inside RMSNorm and SwiGLU.
//   bf16 (fp16): the layer writes 16 bits alone, for comparison
//   tensor, row: e4m3 with a scale for the matrix, for each row
//   both       : the layer writes 16 bits, and e4m3 with a scale for each row
//   ./fp8 [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "fp8_matrix.h"
#include "../../llmc/rmsnorm.cuh"
#include "../../llmc/swiglu.cuh"

static const float eps = 1e-5f;

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

// Heavy-tailed values with special rows: kinds 0 to 2 are a row of zeros, of tiny values, and with one large
// value; kind 3 is a row of the largest values, which leaves zeros of all others in its columns; kinds 4 to 6
// have a NaN, Inf or -Inf. Rows have kinds below `kinds`; 0: none is special.
static std::vector<floatX> with_special_rows(Random *r, int64_t rows, int64_t k, int64_t ld, int kinds) {
    std::vector<floatX> x = heavy_tailed(r, rows, k, ld);
    const bool half = std::is_same<floatX, __half>::value;
    const float largest = half ? 65504 : 3.38e38f, tiny = half ? 6e-8f : 1e-40f;
    const float one[] = {0, 0, 30000, 0, NAN, INFINITY, -INFINITY};
    for (int64_t i = 0; i < rows && kinds > 0; i += 3) {
        const int kind = (int)r->below(kinds);
        for (int64_t j = 0; j < k && (kind < 2 || kind == 3); j++) {
            const float v = kind == 0 ? (j % 2 ? -0.0f : 0.0f) : kind == 1 ? tiny : largest;
            x[i * ld + j] = from_float<floatX>(v);
        }
        if (one[kind] != 0) x[i * ld + r->below(k)] = from_float<floatX>(one[kind]);
    }
    return x;
}

static void check_quantizers(Random *r, int64_t n, int64_t k, int64_t ldx) {
    char shape[64];
    snprintf(shape, sizeof shape, "n %lld k %lld ldx %lld", (long long)n, (long long)k, (long long)ldx);
    for (int kinds : {0, 3, 4, 7}) {
        const std::vector<floatX> x = with_special_rows(r, n, k, ldx, kinds);
        BufferX in(x);
        Fp8Buffer q(n, k);
        Fp8Host rows = quantized(floats_of(x, n, k, ldx), FP8_SCALE_ROW, n, k);
        quantize_rows(q, in, ldx, n, k, 0);
        check_bits("quantize_rows", shape, q, rows, FP8_SCALE_ROW);
        for (Fp8Scaling scaling : {FP8_SCALE_TENSOR, FP8_SCALE_ROW}) {
            Fp8Buffer q_t(k, fp8_padded(n)), again(k, fp8_padded(n));
            Buffer<uint32_t> scratch(k);
            quantize_transpose(q_t, scaling, q, n, k, scratch, 0);
            check_bits("quantize_transpose", shape, q_t, transposed(rows, scaling), scaling);
            quantize_transpose(again, scaling, q, n, k, scratch, 0);
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
    const std::vector<floatX> weight = with_special_rows(r, out, in, in, 3);
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
    BufferX x(heavy_tailed(r, n, c, c)), dout(heavy_tailed(r, n, c, c));
    HostX weight(r, c, 1), dx0(r, n * c, 1);
    BufferX w(weight.raw), out(n * c), plain(n * c), dx(dx0.raw), plain_dx(dx0.raw);
    Buffer<float> rstd(n), plain_rstd(n), dw(c), plain_dw(c);
    Buffer<char> scratch((int64_t)rmsnorm_backward_scratch(n, c));
    Fp8Buffer q(n, c);
    rmsnorm_forward(plain, plain_rstd, x, w, n, c, eps, 0);
    rmsnorm_forward(out, rstd, x, w, n, c, eps, 0, q);
    check_same("rmsnorm with e4m3", out, plain);
    check_same("rstd with e4m3", rstd, plain_rstd);
    check_quantized_output("rmsnorm", shape, q, plain);
    q.poison();
    rmsnorm_forward(NULL, rstd, x, w, n, c, eps, 0, q);
    check_quantized_output("rmsnorm alone", shape, q, plain);
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

// ---- times ----------------------------------------------------------------------------------------------

static void time_quantizers(Random *r, int64_t n, int64_t k) {
    BufferX x(n * k);
    fill_random(x.get(), n * k, r->u64(), 1);
    Fp8Buffer q(n, k), q_t(k, fp8_padded(n));
    Buffer<uint32_t> scratch(k);
    const double elements = (double)n * (double)k;
    double ms = time_ms([&] { quantize_rows(q, x, k, n, k, 0); });
    report("fp8", "quantize", "row", n, k, 0, ms, (sizeof(floatX) + 1.0) * elements, 0);
    for (Fp8Scaling scaling : {FP8_SCALE_TENSOR, FP8_SCALE_ROW}) {
        ms = time_ms([&] { quantize_transpose(q_t, scaling, q, n, k, scratch, 0); });
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
        double ms = time_ms([&] { rmsnorm_forward(out, rstd, x, weight, n, c, eps, 0); });
        report("fp8", "rmsnorm", FLOATX_NAME, n, c, 0, ms, 2 * X * size, 0);
        ms = time_ms([&] { rmsnorm_forward(NULL, rstd, x, weight, n, c, eps, 0, q); });
        report("fp8", "rmsnorm", "row", n, c, 0, ms, (X + 1) * size, 0);
        ms = time_ms([&] { rmsnorm_forward(out, rstd, x, weight, n, c, eps, 0, q); });
        report("fp8", "rmsnorm", "both", n, c, 0, ms, (2 * X + 1) * size, 0);
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
    check_numbers(&r), check_scales(&r);
    check_quantizers(&r, 1, 16, 16); // every size of team, and tiles that are not full
    check_quantizers(&r, 33, 48, 56);
    check_quantizers(&r, 129, 1072, 1072);
    check_quantizers(&r, 40, 1024, 1024);
    check_quantizers(&r, 3000, 16, 16); // three blocks of tokens in the maxima of channels
    check_quantizers(&r, 20, 4112, 4120);
    check_quantizers(&r, 3, 16400, 16400);
    if (!has_flag(argc, argv, "small")) check_quantizers(&r, 4097, 6144, 6240);
    check_weight(&r, 144, 272);
    check_rmsnorm(&r, 1, 16), check_rmsnorm(&r, 33, 64), check_rmsnorm(&r, 70, 256),
        check_rmsnorm(&r, 40, 1024);
    check_rmsnorm(&r, 9, 272), check_rmsnorm(&r, 19, 1040), check_rmsnorm(&r, 2, 4112);
    check_swiglu(&r, 1, 16), check_swiglu(&r, 50, 352), check_swiglu(&r, 2, 16400);
    if (has_flag(argc, argv, "check")) return finish("fp8");
    for (int64_t n : {8192, 65536}) {
        for (int64_t k : {4096, 6144, 14336, 28672}) time_quantizers(&r, n, k);
        time_layers(&r, n, 4096, 14336);
    }
    const struct { int64_t out, in; } weights[] = {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}};
    for (auto w : weights) time_weight(&r, w.out, w.in);
    return finish("fp8");
}
