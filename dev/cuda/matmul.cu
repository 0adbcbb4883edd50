// dev/cuda/matmul.cu: matmuls with weights, forward, and backward to the input and to the weight.
//   version 1: a thread a number, both rows out of L1 (forward)
//   version 2: tiles of 64 x 64 in shared memory, 4 x 4 sums a thread, no tensor cores (forward)
//   library  : cuBLASLt (llmc/matmul.cuh)
//   ./matmul [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "layers.h"
#include "../../llmc/matmul.cuh"

// Version 1. Neighbouring threads share x's row and read weight rows 2*c bytes apart.
__global__ void matmul_v1_kernel(floatX *out, const floatX *x, const floatX *weight, int64_t n, int64_t c,
                                 int64_t o) {
    int64_t i = blockIdx.x, j = blockIdx.y * 128ll + threadIdx.x;
    if (j >= o) return;
    float sum = 0;
    for (int64_t k = 0; k < c; k++) sum += (float)x[i * c + k] * (float)weight[j * c + k];
    out[i * o + j] = (floatX)sum;
}

// Version 2. 64*64*2*16 operations for each 2*64*16 numbers read; fp32 units bind (67 TFLOP/s on an H200).
__global__ void __launch_bounds__(256)
    matmul_v2_kernel(floatX *out, const floatX *x, const floatX *weight, int64_t n, int64_t c, int64_t o) {
    __shared__ float a[16][64 + 1], b[16][64 + 1];
    int64_t i0 = blockIdx.x * 64ll, j0 = blockIdx.y * 64ll;
    int row = threadIdx.x / 16 * 4, col = threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    for (int64_t k0 = 0; k0 < c; k0 += 16) {
        for (int i = threadIdx.x; i < 64 * 16; i += 256) {
            int64_t k = k0 + i % 16;
            a[i % 16][i / 16] = k < c && i0 + i / 16 < n ? (float)x[(i0 + i / 16) * c + k] : 0;
            b[i % 16][i / 16] = k < c && j0 + i / 16 < o ? (float)weight[(j0 + i / 16) * c + k] : 0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 16; k++) {
#pragma unroll
            for (int i = 0; i < 16; i++) sum[i / 4][i % 4] += a[k][row + i / 4] * b[k][col + i % 4];
        }
        __syncthreads();
    }
    for (int i = 0; i < 16; i++) {
        int64_t at = i0 + row + i / 4, channel = j0 + col + i % 4;
        if (at < n && channel < o) out[at * o + channel] = (floatX)sum[i / 4][i % 4];
    }
}
static void forward_old(int version, floatX *out, const floatX *x, const floatX *weight, int64_t n, int64_t c,
                        int64_t o) {
    if (version == 1) {
        dim3 grid((unsigned)n, (unsigned)((o + 127) / 128));
        matmul_v1_kernel<<<grid, 128>>>(out, x, weight, n, c, o);
    } else {
        dim3 grid((unsigned)((n + 63) / 64), (unsigned)((o + 63) / 64));
        matmul_v2_kernel<<<grid, 256>>>(out, x, weight, n, c, o);
    }
    CUDA_CHECK(cudaGetLastError());
}

static Matmul mm;

// Rows of out and dout are ldo elements apart, rows of x c + gap; the weights begin `shift` elements after an
// aligned address.
static void check(Random *r, int64_t n, int c, int o, int64_t ldo, int shift, int gap = 0) {
    const int64_t ldx = c + gap;
    HostX x(r, n * c, 1), weight(r, (int64_t)o * c, 0.5f), bias(r, o, 1), dout(r, n * ldo, 1),
        dx0(r, n * c, 1);
    std::vector<float> dense(n * o), out_ref(n * o), plain_ref(n * o), dx_ref(n * c), added_ref = dx0.f;
    std::vector<float> dw0((int64_t)o * c), db0(o), dw_ref, db_ref;
    for (float &v : dw0) v = r->normal();
    for (float &v : db0) v = r->normal();
    dw_ref = dw0, db_ref = db0;
    for (int64_t i = 0; i < n; i++) std::copy_n(&dout.f[i * ldo], o, &dense[i * o]);
    matmul_forward(plain_ref.data(), x.f.data(), weight.f.data(), NULL, n, c, o);
    matmul_forward(out_ref.data(), x.f.data(), weight.f.data(), bias.f.data(), n, c, o);
    matmul_backward(dx_ref.data(), 0, dw_ref.data(), db_ref.data(), dense.data(), x.f.data(), weight.f.data(),
                    n, c, o);
    std::vector<float> dw_alone((int64_t)o * c);
    matmul_backward(added_ref.data(), 1, dw_alone.data(), NULL, dense.data(), x.f.data(), weight.f.data(), n,
                    c, o);

    std::vector<floatX> shifted(shift);
    shifted.insert(shifted.end(), weight.raw.begin(), weight.raw.end());
    std::vector<floatX> spread(n * ldx, (floatX)NAN); // x with NaN between its rows
    for (int64_t i = 0; i < n; i++) std::copy_n(&x.raw[i * c], c, &spread[i * ldx]);
    BufferX dx_in(x.raw), x_in(spread), w_memory(shifted), b(bias.raw), d(dout.raw), out(n * ldo),
        plain(n * o), dx(n * c);
    Buffer<float> dw(dw0), db(db0), dw_again(dw0), db_again(db0);
    const floatX *w = w_memory.get() + shift;
    char shape[96];
    snprintf(shape, sizeof shape, "n %lld c %d o %d ldo %lld ldx %lld shift %d", (long long)n, c, o,
             (long long)ldo, (long long)ldx, shift);

    for (int version = 1; version <= 3; version++) {
        plain.poison();
        if (version < 3)
            forward_old(version, plain, dx_in, w, n, c, o);
        else
            matmul_forward(&mm, plain, o, x_in, ldx, w, NULL, n, c, o, 0);
        check_close("fwd",
                    version == 1   ? "1"
                    : version == 2 ? "2"
                                   : "library",
                    shape, plain, plain_ref, rounded_tolerance);
    }
    matmul_forward(&mm, out, ldo, x_in, ldx, w, b, n, c, o, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<floatX> raw = out.host();
    std::vector<float> got(n * o);
    bool others = true; // between the rows all stays poisoned
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < ldo; j++) {
            unsigned char bytes[sizeof(floatX)];
            memcpy(bytes, &raw[i * ldo + j], sizeof bytes);
            if (j < o)
                got[i * o + j] = to_float(raw[i * ldo + j]);
            else
                others = others && bytes[0] == 0xff && bytes[sizeof(floatX) - 1] == 0xff;
        }
    }
    double e = relative_error(got, out_ref);
    check_that(e < rounded_tolerance, (std::string("fwd with bias, ") + shape).c_str(), e, rounded_tolerance);
    check_that(others && out.guards_intact(), "matmul: numbers written between rows", 1, 0);
    // with an addend, another array or the output; between its rows is NaN
    HostX addend(r, n * ldo, 1);
    std::vector<floatX> addend_raw = addend.raw;
    std::vector<float> sum_ref = out_ref;
    for (int64_t i = 0; i < n * o; i++) sum_ref[i] += addend.f[i / o * ldo + i % o];
    for (int64_t i = 0; i < n * ldo; i++)
        if (i % ldo >= o) addend_raw[i] = from_float<floatX>(NAN);
    std::vector<floatX> shifted_addend(shift);
    shifted_addend.insert(shifted_addend.end(), addend_raw.begin(), addend_raw.end());
    BufferX addend_memory(shifted_addend), sum(addend_raw);
    for (bool in_place : {false, true}) {
        if (!in_place) sum.poison();
        if (in_place) sum.set(addend_raw);
        const floatX *addend_in = in_place ? sum.get() : addend_memory.get() + shift;
        matmul_forward(&mm, sum, ldo, x_in, ldx, w, b, n, c, o, 0, addend_in);
        CUDA_CHECK(cudaDeviceSynchronize());
        const std::vector<float> all = sum.floats();
        bool gaps = true; // NaN, as before
        for (int64_t i = 0; i < n * ldo; i++) {
            if (i % ldo < o)
                got[i / ldo * o + i % ldo] = all[i];
            else
                gaps = gaps && isnan(all[i]);
        }
        check_that(gaps, "matmul with addend: numbers written between rows", 1, 0);
        e = relative_error(got, sum_ref);
        check_that(e < rounded_tolerance, (std::string("fwd with addend, ") + shape).c_str(), e,
                   rounded_tolerance);
        check_that(sum.guards_intact(), "matmul with addend: bytes written outside", 1, 0);
    }
    matmul_forward(&mm, plain, o, x_in, ldx, w, NULL, n, c, o, 0);
    add_bias(plain, o, b, n, o, 0);
    check_close("add_bias", "library", shape, plain, out_ref, rounded_tolerance);

    matmul_backward_input(&mm, dx, 0, d, ldo, w, n, c, o, 0);
    check_close("dinput", "library", shape, dx, dx_ref, rounded_tolerance);
    dx.set(dx0.raw);
    matmul_backward_input(&mm, dx, 1, d, ldo, w, n, c, o, 0);
    check_close("dinput", "library", shape, dx, added_ref, rounded_tolerance);
    matmul_backward_weight(&mm, dw, 1, d, ldo, x_in, ldx, n, c, o, 0);
    bias_backward(&mm, db, d, ldo, n, o, 0);
    check_close("dweight", "library", shape, dw, dw_ref, fp32_tolerance);
    check_close("dbias", "library", shape, db, db_ref, fp32_tolerance);
    matmul_backward_weight(&mm, dw_again, 1, d, ldo, x_in, ldx, n, c, o, 0);
    bias_backward(&mm, db_again, d, ldo, n, o, 0);
    check_same("matmul dweight", dw, dw_again);
    check_same("matmul dbias", db, db_again);
    dw.poison();
    matmul_backward_weight(&mm, dw, 0, d, ldo, x_in, ldx, n, c, o, 0);
    check_close("dweight, overwritten", "library", shape, dw, dw_alone, fp32_tolerance);
}

// More shapes than are remembered, then the first ones again.
static void check_many_shapes(Random *r) {
    int64_t c = 2 * PACK, o = PACK, rows = MATMUL_CACHE_SIZE + 40;
    HostX x(r, rows * c, 1), weight(r, o * c, 1);
    std::vector<float> expected(rows * o);
    matmul_forward(expected.data(), x.f.data(), weight.f.data(), NULL, rows, (int)c, (int)o);
    BufferX in(x.raw), w(weight.raw), out(rows * o);
    bool good = true;
    for (int64_t i = 0; i < rows + 50; i++) {
        int64_t n = i % rows + 1;
        out.poison();
        matmul_forward(&mm, out, o, in, c, w, NULL, n, c, o, 0);
        CUDA_CHECK(cudaDeviceSynchronize());
        std::vector<float> got = out.floats();
        got.resize(n * o);
        good = good && relative_error(got, std::vector<float>(expected.begin(), expected.begin() + n * o)) <
                           rounded_tolerance;
    }
    check_that(good, "matmul: more shapes than are remembered", 1, 0);
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    Buffer<char> workspace(MATMUL_WORKSPACE_BYTES);
    matmul_init(&mm, workspace, MATMUL_WORKSPACE_BYTES);
    check(&r, 1, 64, 128, 128, 0);
    check(&r, 65, 128, 64, 64, PACK); // 16 bytes past an aligned address
    check(&r, 33, 72, 18, 18, 0);     // a gate of 6 heads
    check(&r, 33, 64, 3, 3, 0);       // one for all heads
    check(&r, 130, 64, 64, 192, 0);   // one of three matmuls into one row
    check(&r, 31, 40, 24, 32, 2);     // weights on an odd address
    check(&r, 40, 64, 265, 272, 0);   // q, k, v and 9 gate logits, with padding columns
    check(&r, 70, 64, 72, 72, 0, 80); // x: some columns of a matrix
    check_many_shapes(&r);
    if (!has_flag(argc, argv, "small")) {
        check(&r, 700, 384, 512, 512, 0);
        check(&r, 257, 1024, 3072, 4096, 0);
    }
    const struct { int64_t c, o; } weights[] = {{4096, 4096}, {4096, 28672}, {14336, 4096}};
    for (int64_t n : {8192, 65536}) {
        if (has_flag(argc, argv, "check")) break;
        for (auto size : weights) {
            int64_t c = size.c, o = size.o;
            BufferX x(n * c), weight(o * c), out(n * o);
            Buffer<float> dweight(o * c), dbias(o);
            fill_random(x.get(), n * c, r.u64(), 1), fill_random(weight.get(), o * c, r.u64(), 0.02f);
            fill_random(out.get(), n * o, r.u64(), 1);
            dweight.zero(), dbias.zero();
            double flops = 2.0 * (double)n * (double)c * (double)o;
            double bytes = sizeof(floatX) * (double)(n * c + o * c + n * o), ms;
            ms = time_ms([&] { matmul_backward_weight(&mm, dweight, 1, out, o, x, c, n, c, o, 0); });
            report("matmul", "dweight", "library", n, c, o, ms,
                   bytes + (8.0 - sizeof(floatX)) * (double)(o * c), flops);
            ms = time_ms([&] { matmul_backward_input(&mm, x, 0, out, o, weight, n, c, o, 0); });
            report("matmul", "dinput", "library", n, c, o, ms, bytes, flops);
            for (int version = 1; version <= 2 && n == 8192 && c == o; version++) {
                ms = time_ms([&] { forward_old(version, out, x, weight, n, c, o); }, 3);
                report("matmul", "fwd", version == 1 ? "1" : "2", n, c, o, ms, bytes, flops);
            }
            ms = time_ms([&] { matmul_forward(&mm, out, o, x, c, weight, NULL, n, c, o, 0); });
            report("matmul", "fwd", "library", n, c, o, ms, bytes, flops);
            BufferX sum(n * o);
            ms = time_ms([&] { matmul_forward(&mm, sum, o, x, c, weight, NULL, n, c, o, 0, out); });
            report("matmul", "fwd, addend", "library", n, c, o, ms, bytes + sizeof(floatX) * (double)(n * o),
                   flops);
        }
    }
    check_that(workspace.guards_intact(), "matmul: bytes written outside of the workspace", 1, 0);
    matmul_free(&mm);
    return finish("matmul");
}
