// dev/cuda/fp8_matmul.cu: matmuls on e4m3 operands, and the models, GPUs and errors that they have.
//   bf16 (fp16): the 16-bit matmuls of llmc/matmul.cuh, for comparison
//   tensor, row: a scale for the matrix, for each row
//   fast       : fast accumulation
//   ./fp8_matmul [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "fp8_matrix.h"
#include "../../llmc/fp8_linear.cuh"
#include <sys/wait.h>
#include <unistd.h>

static const double matmul_tolerance = 3e-3;
static Matmul mm;

// ---- matmuls ---------------------------------------------------------------------------------------------

// The relative error of out [rows_a, rows_b], rows ldo elements apart, against old + a b^T in double, at a
// sample of rows and columns.
template <typename T>
static double sampled_error(Random *r, const std::vector<T> &out, int64_t ldo, const std::vector<float> &old,
                            Fp8Host &a, Fp8Host &b, Fp8Scaling scaling) {
    const int64_t k = a.k;
    double diff = 0, norm = 0;
    std::vector<float> numbers;
    for (int x = 0; x < 256; x++) numbers.push_back(fp8_to_float((uint8_t)x));
    for (int s = 0; s < 2048; s++) {
        const int64_t i = s == 0 ? 0 : s == 1 ? a.rows - 1 : r->below(a.rows);
        const int64_t j = s == 0 ? 0 : s == 1 ? b.rows - 1 : r->below(b.rows);
        double sum = old.empty() ? 0 : old[i * b.rows + j];
        double product = 0;
        for (int64_t p = 0; p < k; p++)
            product += (double)numbers[a.data[i * k + p]] * numbers[b.data[j * k + p]];
        const int rows = scaling == FP8_SCALE_ROW;
        sum += product * a.scale[rows ? i : 0] * b.scale[rows ? j : 0];
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
    if (!fp8_matmul_supported(&mm, mode, fp32_out, ldo, rows_a, rows_b, k)) {
        printf("not supported by cuBLASLt: %s\n", name);
        check_that(!mm.row_scales, name, 1, 0);
        return;
    }
    // a few elements can have larger rounding errors than the average of many
    const double tolerance = rows_a * rows_b < 4096 && !fp32_out ? rounded_tolerance : matmul_tolerance;
    Fp8Buffer a_in(rows_a, k), b_in(rows_b, k);
    upload(a_in, a, mode.scaling), upload(b_in, b, mode.scaling);
    Buffer<T> out(rows_a * ldo), again(rows_a * ldo);
    fp8_matmul(&mm, mode, out, fp32_out, ldo, NULL, a_in, b_in, k, rows_a, rows_b, k, 0);
    fp8_matmul(&mm, mode, again, fp32_out, ldo, NULL, a_in, b_in, k, rows_a, rows_b, k, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    check_same(name, out, again);
    const std::vector<T> got = out.host();
    double e = sampled_error(r, got, ldo, {}, a, b, mode.scaling);
    double &w = worst[std::string(what) + " " + scaling_names[mode.scaling] + (mode.fast ? " fast" : "")];
    w = std::max(w, e);
    check_that(e < tolerance, name, e, tolerance);
    if constexpr (std::is_same<T, floatX>::value)
        check_that(gaps_poisoned(got, ldo, rows_a, rows_b), "fp8 matmul: bytes written between rows", 1, 0);
    std::vector<float> old(rows_a * rows_b);
    for (int64_t i = 0; i < rows_a * rows_b; i++) old[i] = to_float(got[i / rows_b * ldo + i % rows_b]);
    for (T *addend : {again.get(), out.get()}) { // both hold the same values
        fp8_matmul(&mm, mode, out, fp32_out, ldo, addend, a_in, b_in, k, rows_a, rows_b, k, 0);
        CUDA_CHECK(cudaDeviceSynchronize());
        e = sampled_error(r, out.host(), ldo, old, a, b, mode.scaling);
        check_that(e < tolerance, (std::string(name) + ", added").c_str(), e, tolerance);
        out.set(got);
    }
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

static std::vector<float> transposed_floats(const std::vector<float> &x, int64_t rows, int64_t k) {
    std::vector<float> t(rows * k);
    for (int64_t i = 0; i < rows * k; i++) t[i] = x[i % rows * k + i / rows];
    return t;
}

// The three matmuls of a linear layer of n tokens, c inputs and o outputs, in every mode.
static void check_modes(Random *r, int64_t n, int64_t c, int64_t o, int64_t ldo) {
    const std::vector<float> x = scaled_normal(r, n, c), w = scaled_normal(r, o, c),
                             dout = scaled_normal(r, n, o);
    Fp8Host x_rows = quantized(x, FP8_SCALE_ROW, n, c), dout_rows = quantized(dout, FP8_SCALE_ROW, n, o);
    for (Fp8Scaling s : {FP8_SCALE_TENSOR, FP8_SCALE_ROW}) {
        Fp8Host x_q = quantized(x, s, n, c), w_q = quantized(w, s, o, c), dout_q = quantized(dout, s, n, o);
        Fp8Host w_t = quantized(transposed_floats(w, o, c), s, c, o), x_t = transposed(x_rows, s),
                dout_t = transposed(dout_rows, s);
        check_matmul<floatX>(r, "fwd", {s, 0}, x_q, w_q, ldo);
        check_matmul<floatX>(r, "dinput", {s, 0}, dout_q, w_t, c);
        check_matmul<float>(r, "dweight", {s, 0}, dout_t, x_t, c);
    }
}

// ---- the linear layer ------------------------------------------------------------------------------------

static void check_error(const char *what, const char *shape, double e) {
    double &w = worst[std::string(what) + " layer"];
    w = std::max(w, e);
    check_that(e < matmul_tolerance, (std::string(what) + " of a layer, " + shape).c_str(), e,
               matmul_tolerance);
}

// Memory of a weight and of scratch, with the trainer's layout.
struct LinearMemory {
    Fp8Weight w;
    Fp8Scratch scratch;
    Arena arena;
    Buffer<char> *memory;
    LinearMemory(int64_t n, int64_t c, int64_t o) : arena() {
        layout(n, c, o);
        memory = new Buffer<char>((int64_t)arena.bytes + 256);
        arena.base = (char *)(((uintptr_t)memory->get() + 255) / 256 * 256), arena.bytes = 0;
        layout(n, c, o);
    }
    ~LinearMemory() { delete memory; }
    void layout(int64_t n, int64_t c, int64_t o) {
        fp8_weight_memory_layout(&w, o, c, 1, &arena);
        fp8_scratch_memory_layout(&scratch, n, o, c, &arena);
    }
};

// Normal values; in matrices small enough for the host each 64 have a power of two of their own, so that rows
// have different scales.
static void fill_scaled(Random *r, BufferX &x) {
    if (x.n > 1000000) {
        fill_random(x.get(), x.n, r->u64(), 1);
        return;
    }
    std::vector<floatX> values;
    for (int64_t i = 0, e = 0; i < x.n; i++) {
        if (i % 64 == 0) e = r->below(6);
        values.push_back(from_float<floatX>(ldexpf(r->normal(), -(int)e)));
    }
    x.set(values);
}

static Fp8Host download(Fp8Matrix q, int64_t rows, int64_t k, int64_t scales) {
    Fp8Host h(rows, k);
    CUDA_CHECK(cudaMemcpy(h.data.data(), q.data, rows * k, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(h.scale.data(), q.scale, scales * sizeof(float), cudaMemcpyDeviceToHost));
    return h;
}

// Quantizes x [rows, k]. quantize_rows does not take the longest rows, the gradients of gate and up: in the
// trainer swiglu_backward writes them. They are quantized in C.
static void quantize(const Fp8Buffer &q, const BufferX &x) {
    if (q.k <= FP8_MAX_ROW) {
        quantize_rows(q, x, q.k, q.rows, q.k, 0);
        return;
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    const Fp8Host host = quantized(x.floats(), FP8_SCALE_ROW, q.rows, q.k);
    CUDA_CHECK(cudaMemcpy(q.data.get(), host.data.data(), host.data.size(), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(q.scale.get(), host.scale.data(), q.rows * sizeof(float), cudaMemcpyHostToDevice));
}

// A linear layer as the trainer runs it, from 16-bit tensors to results, against double on the e4m3 operands;
// in two parts of the weight's rows, whose input gradients are added. Rows of out are ldo elements apart.
static void check_linear(Random *r, int64_t n, int64_t c, int64_t o, int64_t ldo) {
    char shape[96];
    snprintf(shape, sizeof shape, "n %lld c %lld o %lld%s", (long long)n, (long long)c, (long long)o,
             mm.row_scales ? "" : ", without row scales");
    BufferX x(n * c), w(o * c), dout(n * o), out(n * ldo), doubled(n * ldo), dx(n * c);
    Buffer<float> dw(o * c);
    fill_scaled(r, x), fill_scaled(r, w), fill_scaled(r, dout);
    fill_random(dw.get(), o * c, r->u64(), 1e-3f);
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<float> dw_old = dw.host();
    LinearMemory layer(n, c, o);
    Fp8Buffer xq(n, c), dq(n, o);
    fp8_weight_quantize(&mm, &layer.w, w, &layer.scratch, 0);
    quantize(xq, x), quantize(dq, dout);
    fp8_linear_forward(&mm, &layer.scratch, out, ldo, xq, &layer.w, n, 0);
    fp8_linear_forward(&mm, &layer.scratch, doubled, ldo, xq, &layer.w, n, 0, out);
    fp8_linear_transpose(&mm, &layer.scratch, dq, xq, n, c, o, 0);
    fp8_linear_backward_weight(&mm, &layer.scratch, dw, 1, n, c, o, 0);
    fp8_linear_backward_input(&mm, &layer.scratch, dx, 0, dq, &layer.w, n, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    const Fp8Scaling wide = fp8_mode(&mm, 0).scaling;
    const int64_t padded = fp8_padded(n);
    {
        Fp8Host a = download(xq, n, c, n), b = download(layer.w.w, o, c, o);
        check_error("fwd", shape, sampled_error(r, out.host(), ldo, {}, a, b, FP8_SCALE_ROW));
        std::vector<float> old;
        const std::vector<float> out_floats = out.floats();
        for (int64_t i = 0; i < n * o; i++) old.push_back(out_floats[i / o * ldo + i % o]);
        check_error("fwd, added", shape, sampled_error(r, doubled.host(), ldo, old, a, b, FP8_SCALE_ROW));
    }
    {
        Fp8Host a = download(dq, n, o, n), b = download(layer.w.w_t, c, o, c);
        check_error("dinput", shape, sampled_error(r, dx.host(), c, {}, a, b, FP8_SCALE_ROW));
    }
    {
        Fp8Host a = download(layer.scratch.dout_t, o, padded, wide == FP8_SCALE_TENSOR ? 1 : o),
                b = download(layer.scratch.x_t, c, padded, wide == FP8_SCALE_TENSOR ? 1 : c);
        check_error("dweight", shape, sampled_error(r, dw.host(), c, dw_old, a, b, wide));
    }
    check_that(gaps_poisoned(out.host(), ldo, n, o) && out.guards_intact() && dx.guards_intact() &&
                   dw.guards_intact() && layer.memory->guards_intact(),
               "fp8 linear: bytes written outside", 1, 0);
    if (o < 32) return;
    // the same in two parts
    const int64_t first = o / 2 / FP8_ALIGN * FP8_ALIGN;
    const Fp8Weight parts[] = {fp8_weight_rows(&layer.w, 0, first),
                               fp8_weight_rows(&layer.w, first, o - first)};
    BufferX again(n * ldo), dx_sum(n * c);
    for (int i = 0; i < 2; i++) {
        const int64_t column = i * first, width = parts[i].out;
        Fp8Buffer part(n, width);
        quantize_rows(part, dout + column, o, n, width, 0);
        fp8_linear_forward(&mm, &layer.scratch, again + column, ldo, xq, &parts[i], n, 0);
        fp8_linear_backward_input(&mm, &layer.scratch, dx_sum, i, part, &parts[i], n, 0);
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<float> whole, halves;
    const std::vector<float> out_floats = out.floats(), again_floats = again.floats();
    for (int64_t i = 0; i < n * o; i++) {
        whole.push_back(out_floats[i / o * ldo + i % o]);
        halves.push_back(again_floats[i / o * ldo + i % o]);
    }
    // the halves of dout have scales of their own
    const double out_error = relative_error(halves, whole),
                 dx_error = relative_error(dx_sum.floats(), dx.floats());
    check_that(out_error < rounded_tolerance, (std::string("fwd of two parts, ") + shape).c_str(), out_error,
               rounded_tolerance);
    check_that(dx_error < 2e-2, (std::string("dinput of two parts, ") + shape).c_str(), dx_error, 2e-2);
}

// A row with NaN or Inf makes its outputs and the weight's gradient NaN, and with row scales no other row's
// outputs.
static void check_not_finite(Random *r, float value) {
    const int64_t n = 20, c = 32, o = 48, bad = 7;
    std::vector<floatX> x = heavy_tailed(r, n, c, c);
    x[bad * c + 5] = from_float<floatX>(value);
    BufferX in(x), weight(heavy_tailed(r, o, c, c)), y(n * o), dy(heavy_tailed(r, n, o, o));
    Buffer<float> dw(o * c);
    dw.zero();
    LinearMemory layer(n, c, o);
    Fp8Buffer q(n, c), dq(n, o);
    fp8_weight_quantize(&mm, &layer.w, weight, &layer.scratch, 0);
    quantize_rows(q, in, c, n, c, 0), quantize_rows(dq, dy, o, n, o, 0);
    fp8_linear_forward(&mm, &layer.scratch, y, o, q, &layer.w, n, 0);
    fp8_linear_transpose(&mm, &layer.scratch, dq, q, n, c, o, 0);
    fp8_linear_backward_weight(&mm, &layer.scratch, dw, 1, n, c, o, 0);
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
    gpu.sharedMemPerBlockOptin = major == 9 ? 227 << 10 : 99 << 10;
    int fds[2], status = 0;
    char text[512] = "";
    if (pipe(fds) != 0) exit(1);
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        dup2(fds[1], 2);
        fp8_check("fp8", c, &gpu);
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
    c.hidden = 32768;
    check_refused(&c, 9, 0, NULL);
    check_refused(&c, 8, 9, "-hidden 32768: must be at most 25312 on GPU");
    c.hidden = 65536;
    check_refused(&c, 9, 0, "-hidden 65536: must be at most 32768 on GPU");
    c.hidden = 14336, c.fsa.q_heads = 256, c.fsa.kv_heads = 8, c.fsa.head_dim = 128;
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
    fp8_matmul(&mm, mode, out, 1, b.rows, NULL, a_in, b_in, a.k, a.rows, b.rows, a.k, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    return out.host();
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
    matmul_backward_weight(&mm, dw, 1, dy_in, o, x_in, c, n, c, o, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<float> y_ref = y.floats(), dx_ref = dx.floats(), dw_ref = dw.host();
    Fp8Host x_rows = quantized(xf, FP8_SCALE_ROW, n, c), dy_rows = quantized(dyf, FP8_SCALE_ROW, n, o);
    for (int i = 0; i < 4; i++) {
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

// The error of accumulation: against double on the same e4m3 operands, with sums of k terms that cancel
// ("normal") or not ("positive"), fp32 outputs. Fast accumulation is reported, not checked.
static void check_accumulation(Random *r, int64_t k, bool record) {
    const int64_t rows = 64;
    for (int positive = 0; positive < 2; positive++) {
        std::vector<float> x(rows * k), y(rows * k);
        for (std::vector<float> *v : {&x, &y})
            for (float &f : *v) f = positive ? fabsf(r->normal()) : r->normal();
        Fp8Host a = quantized(x, FP8_SCALE_ROW, rows, k), b = quantized(y, FP8_SCALE_ROW, rows, k);
        for (int fast = 0; fast < 2; fast++) {
            const std::vector<float> got = multiplied({FP8_SCALE_ROW, fast}, a, b);
            if (got.empty()) continue;
            const double e = sampled_error(r, got, rows, {}, a, b, FP8_SCALE_ROW);
            if (!fast) check_that(e < matmul_tolerance, "accumulation", e, matmul_tolerance);
            if (record)
                report_error(positive ? "positive" : "normal", "accumulation", fast ? "row fast" : "row",
                             rows, k, rows, e);
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
    double ms = time_ms([&] { matmul_backward_weight(&mm, dw, 1, y, o, x, c, n, c, o, 0); });
    report("fp8_matmul", "dweight", FLOATX_NAME, n, c, o, ms, 2 * in + 6.0 * (double)(o * c), flops);
    ms = time_ms([&] { matmul_backward_input(&mm, x, 0, y, o, w, n, c, o, 0); });
    report("fp8_matmul", "dinput", FLOATX_NAME, n, c, o, ms, 2 * in, flops);
    ms = time_ms([&] { matmul_forward(&mm, y, o, x, c, w, NULL, n, c, o, 0); });
    report("fp8_matmul", "fwd", FLOATX_NAME, n, c, o, ms, 2 * in, flops);
    for (int i = 0; i < 4; i++) {
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
                printf("fp8_matmul %s %s: not supported by cuBLASLt\n", t.dir, version.c_str());
                continue;
            }
            ms = time_ms([&] {
                fp8_matmul(&mm, mode, t.out, t.fp32_out, t.b->rows, t.add ? t.out : NULL, *t.a, *t.b, t.a->k,
                           t.a->rows, t.b->rows, t.a->k, 0);
            });
            report("fp8_matmul", t.dir, version.c_str(), n, c, o, ms, t.bytes, flops);
        }
    }
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    const bool small = has_flag(argc, argv, "small");
    Buffer<char> workspace(MATMUL_WORKSPACE_BYTES);
    cudaDeviceProp gpu;
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, 0));
    check_models();
    if (gpu.major * 10 + gpu.minor < 89) {
        printf("fp8_matmul: compute capability %d.%d: matmuls need 8.9; they are not tested\n", gpu.major,
               gpu.minor);
        return finish("fp8_matmul");
    }
    matmul_init(&mm, workspace, MATMUL_WORKSPACE_BYTES);
    check_modes(&r, 1, 16, 16, 16);
    check_modes(&r, 31, 48, 80, 88);
    check_modes(&r, 130, 256, 144, 144);
    check_modes(&r, 256, 384, 512, 512);
    check_linear(&r, 300, 48, 80, 88);
    check_not_finite(&r, NAN), check_not_finite(&r, INFINITY), check_not_finite(&r, -INFINITY);
    if (mm.row_scales) { // the path of GPUs and toolkits without them
        mm.row_scales = 0;
        check_linear(&r, 300, 48, 80, 88);
        check_linear(&r, 130, 256, 144, 144);
        check_not_finite(&r, NAN);
        mm.row_scales = 1;
    }
    compare_errors(&r, "normal", 128, 256, 384, 0.06);
    compare_errors(&r, "heavy tails", 128, 256, 384, 0.06);
    const bool check_only = has_flag(argc, argv, "check");
    for (int64_t k : {4096, 14336, 65536})
        if (!small || k == 4096) check_accumulation(&r, k, !check_only);
    int presets_count;
    const Preset *preset = presets(&presets_count);
    for (int i = 0; i < presets_count; i++) {
        const Preset *p = &preset[i];
        const int64_t n = small ? 67 : 1027, q = p->q_heads * p->head_dim;
        const int64_t qkv = q + 2 * p->kv_heads * p->head_dim;
        if (p->channels > (small ? 256 : 1 << 20)) continue;
        check_linear(&r, n, p->channels, qkv, qkv + 32);
        check_linear(&r, n, q, p->channels, p->channels);
        check_linear(&r, n, p->channels, 2 * p->hidden, 2 * p->hidden);
        check_linear(&r, n, p->hidden, p->channels, p->channels);
    }
    if (!check_only) {
        compare_errors(&r, "normal", 2048, 4096, 1024, 0.06);
        compare_errors(&r, "heavy tails", 2048, 4096, 1024, 0.06);
        const struct { int64_t c, o; } weights[] = {{4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}};
        for (int64_t n : {8192, 65536})
            for (auto w : weights) time_matmuls(&r, n, w.c, w.o);
    }
    check_that(workspace.guards_intact(), "fp8: bytes written outside of the workspace", 1, 0);
    matmul_free(&mm);
    return finish("fp8_matmul");
}
