// dev/cuda/rmsnorm.cu: RMSNorm, of rows and of heads inside a row; and its backward pass.
//   version 1: a thread a row; backward, a thread a channel for the weight's gradient
//   version 2: a warp a row, which it reads twice (forward)
//   library  : a team of threads fit for the row's length, which holds it in registers (llmc/rmsnorm.cuh)
//   ./rmsnorm [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "layers.h"
#include "../../llmc/rmsnorm.cuh"

static const float eps = 1e-5f;

// Version 1. Neighbouring threads read 2*c bytes apart.
__global__ void rmsnorm_v1_kernel(floatX *out, float *rstd, const floatX *x, const floatX *weight, int64_t n,
                                  int c) {
    int64_t row = blockIdx.x * 128ll + threadIdx.x;
    if (row >= n) return;
    float sum = 0;
    for (int j = 0; j < c; j++) sum += (float)x[row * c + j] * (float)x[row * c + j];
    rstd[row] = 1 / sqrtf(sum / c + eps);
    for (int j = 0; j < c; j++)
        out[row * c + j] = (floatX)((float)x[row * c + j] * rstd[row] * (float)weight[j]);
}
// Version 2. Coalesced; the row comes from L1 or L2 the second time.
__global__ void rmsnorm_v2_kernel(floatX *out, float *rstd, const floatX *x, const floatX *weight, int64_t n,
                                  int c) {
    int64_t row = blockIdx.x * 8ll + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (row >= n) return;
    float sum = 0;
    for (int j = lane; j < c; j += 32) sum += (float)x[row * c + j] * (float)x[row * c + j];
    float scale = 1 / sqrtf(warp_reduce_sum(sum) / c + eps);
    if (lane == 0) rstd[row] = scale;
    for (int j = lane; j < c; j += 32)
        out[row * c + j] = (floatX)((float)x[row * c + j] * scale * (float)weight[j]);
}
static void forward_old(int version, floatX *out, float *rstd, const floatX *x, const floatX *weight,
                        int64_t n, int c) {
    if (version == 1)
        rmsnorm_v1_kernel<<<(unsigned)((n + 127) / 128), 128>>>(out, rstd, x, weight, n, c);
    else
        rmsnorm_v2_kernel<<<(unsigned)((n + 7) / 8), 256>>>(out, rstd, x, weight, n, c);
    CUDA_CHECK(cudaGetLastError());
}

// Version 1 of the backward pass, dx added to: all rows for dx, then all channels for dweight.
__global__ void rmsnorm_backward_v1_kernel(floatX *dx, float *dweight, const floatX *dout, const floatX *x,
                                           const floatX *weight, const float *rstd, int64_t n, int c) {
    int64_t i = blockIdx.x * 128ll + threadIdx.x;
    if (i < n) {
        const floatX *xi = x + i * c, *di = dout + i * c;
        float mean = 0;
        for (int j = 0; j < c; j++) mean += (float)weight[j] * (float)di[j] * (float)xi[j];
        mean *= rstd[i] / c;
        for (int j = 0; j < c; j++) {
            float g = rstd[i] * ((float)weight[j] * (float)di[j] - (float)xi[j] * rstd[i] * mean);
            dx[i * c + j] = (floatX)((float)dx[i * c + j] + g);
        }
    }
    if (i < c) {
        float sum = 0;
        for (int64_t row = 0; row < n; row++)
            sum += (float)dout[row * c + i] * (float)x[row * c + i] * rstd[row];
        dweight[i] += sum;
    }
}
static void backward_v1(floatX *dx, float *dweight, const floatX *dout, const floatX *x, const floatX *weight,
                        const float *rstd, int64_t n, int c) {
    int64_t threads = std::max<int64_t>(n, c);
    rmsnorm_backward_v1_kernel<<<(unsigned)((threads + 127) / 128), 128>>>(dx, dweight, dout, x, weight, rstd,
                                                                           n, c);
    CUDA_CHECK(cudaGetLastError());
}

static void check(Random *r, int64_t n, int c) {
    HostX x(r, n * c, 2), weight(r, c, 1), dout(r, n * c, 1), dx0(r, n * c, 1);
    BufferX dx_in(x.raw), w(weight.raw), d(dout.raw), out(n * c), again(n * c), dx(dx0.raw);
    Buffer<float> rstd(n), dw(c), dw_again(c);
    Buffer<char> scratch((int64_t)rmsnorm_backward_scratch(n, c));
    std::vector<float> expected(n * c), rstd_ref(n), dx_ref = dx0.f, dw_ref(c), dw0(c);
    for (int j = 0; j < c; j++) dw_ref[j] = dw0[j] = r->normal();
    char shape[64];
    snprintf(shape, sizeof shape, "n %lld c %d", (long long)n, c);

    rmsnorm_forward(expected.data(), rstd_ref.data(), x.f.data(), weight.f.data(), n, c, eps);
    for (int version = 1; version <= 3; version++) {
        const char *names[] = {"1", "2", "library"};
        out.poison(), rstd.poison();
        if (version < 3)
            forward_old(version, out, rstd, dx_in, w, n, c);
        else
            rmsnorm_forward(out, rstd, dx_in, w, n, c, eps, 0);
        check_close("fwd", names[version - 1], shape, out, expected, rounded_tolerance);
        check_close("rstd", names[version - 1], shape, rstd, rstd_ref, fp32_tolerance);
    }

    rmsnorm_backward(dx_ref.data(), dw_ref.data(), dout.f.data(), x.f.data(), weight.f.data(),
                     rstd_ref.data(), n, c);
    dw.set(dw0);
    backward_v1(dx, dw, d, dx_in, w, rstd, n, c);
    check_close("bwd", "1", shape, dx, dx_ref, rounded_tolerance);
    check_close("dweight", "1", shape, dw, dw_ref, fp32_tolerance);
    dx.set(dx0.raw), dw.set(dw0);
    rmsnorm_backward(dx, 1, dw, d, dx_in, w, rstd, n, c, scratch, 0);
    check_close("bwd", "library", shape, dx, dx_ref, rounded_tolerance);
    check_close("dweight", "library", shape, dw, dw_ref, fp32_tolerance);
    check_that(scratch.guards_intact(), "rmsnorm: bytes written outside of the scratch", 1, 0);
    // dx overwritten; the same bits again
    dx_ref.assign(n * c, 0), dx.poison(), dw_again.set(dw0), scratch.poison();
    std::vector<float> dw_unused(c);
    rmsnorm_backward(dx_ref.data(), dw_unused.data(), dout.f.data(), x.f.data(), weight.f.data(),
                     rstd_ref.data(), n, c);
    rmsnorm_backward(dx, 0, dw_again, d, dx_in, w, rstd, n, c, scratch, 0);
    check_close("bwd", "library", shape, dx, dx_ref, rounded_tolerance);
    check_same("rmsnorm dweight", dw, dw_again);
    again.set(dout.raw), dw_again.set(dw0);
    rmsnorm_backward(again, 0, dw_again, again, dx_in, w, rstd, n, c, scratch, 0);
    check_same("rmsnorm backward in place", dx, again);
}

// Heads inside rows of `stride` numbers, the gradient's tokens dx_stride apart.
static void check_heads(Random *r, int64_t n, int heads, int d, int64_t stride, int64_t dx_stride) {
    int64_t rows = n * heads;
    HostX x(r, n * stride, 2), weight(r, d, 1), dout(r, rows * d, 1);
    BufferX in(x.raw), w(weight.raw), dd(dout.raw), out(rows * d), dx(n * dx_stride);
    Buffer<float> rstd(rows), dw(d);
    Buffer<char> scratch((int64_t)rmsnorm_backward_scratch(rows, d));
    std::vector<float> dense(rows * d), expected(rows * d), rstd_ref(rows), dx_ref(rows * d, 0), dw_ref(d, 0);
    for (int64_t t = 0; t < n; t++) std::copy_n(&x.f[t * stride], heads * d, &dense[t * heads * d]);
    char shape[96];
    snprintf(shape, sizeof shape, "n %lld heads %d d %d strides %lld %lld", (long long)n, heads, d,
             (long long)stride, (long long)dx_stride);
    rmsnorm_forward(expected.data(), rstd_ref.data(), dense.data(), weight.f.data(), rows, d, eps);
    rmsnorm_heads_forward(out, rstd, in, stride, w, n, heads, d, eps, 0);
    check_close("heads fwd", "library", shape, out, expected, rounded_tolerance);
    rmsnorm_backward(dx_ref.data(), dw_ref.data(), dout.f.data(), dense.data(), weight.f.data(),
                     rstd_ref.data(), rows, d);
    dw.zero();
    rmsnorm_heads_backward(dx, dx_stride, dw, dd, in, stride, w, rstd, n, heads, d, scratch, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<floatX> raw = dx.host();
    std::vector<float> got(rows * d);
    bool others = true; // what lies between the heads of two tokens stays poisoned
    for (int64_t t = 0; t < n; t++) {
        for (int64_t j = 0; j < dx_stride; j++) {
            floatX v = raw[t * dx_stride + j];
            unsigned char bytes[sizeof(floatX)];
            memcpy(bytes, &v, sizeof v);
            if (j < heads * d)
                got[t * heads * d + j] = to_float(v);
            else
                others = others && bytes[0] == 0xff && bytes[sizeof(floatX) - 1] == 0xff;
        }
    }
    double e = relative_error(got, dx_ref), &w_err = worst["heads bwd library"];
    w_err = std::max(w_err, e);
    check_that(e < rounded_tolerance, (std::string("heads bwd, ") + shape).c_str(), e, rounded_tolerance);
    check_that(others && dx.guards_intact(), "rmsnorm heads: bytes written outside", 1, 0);
    check_close("heads dweight", "library", shape, dw, dw_ref, fp32_tolerance);
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    bool small = has_flag(argc, argv, "small");
    // every size of team, full and not, and rows that leave teams without one
    check(&r, 1, PACK);
    check(&r, 33, 64);
    check(&r, 70, 9 * PACK);
    check(&r, 9, 33 * PACK);
    check(&r, 19, 129 * PACK);
    check(&r, 2, 513 * PACK);
    check_heads(&r, 3, 5, 64, 5 * 64 + 64, 5 * 64);
    check_heads(&r, 7, 2, 128, 512, 256 + PACK);
    if (!small) {
        check(&r, 20000, 64); // several rows a team
        check(&r, 1500, 384);
        check(&r, 1100, 4096);
        check(&r, 5, RMSNORM_MAX_CHANNELS);
    }
    for (int64_t n : {8192, 65536}) {
        if (has_flag(argc, argv, "check")) break;
        int c = 4096, heads = 32, d = 128;
        int64_t size = n * c;
        BufferX x(size), y(size), out(size), weight(c);
        Buffer<float> rstd(n * heads), dw(c);
        Buffer<char> scratch(
            (int64_t)std::max(rmsnorm_backward_scratch(n, c), rmsnorm_backward_scratch(n * heads, d)));
        fill_random(x.get(), size, r.u64(), 1), fill_random(y.get(), size, r.u64(), 1);
        fill_random(weight.get(), c, r.u64(), 1);
        dw.zero();
        double bytes = sizeof(floatX) * (double)size, ms;
        for (int version = 1; version <= 2; version++) {
            ms = time_ms([&] { forward_old(version, out, rstd, x, weight, n, c); });
            report("rmsnorm", "fwd", version == 1 ? "1" : "2", n, c, 0, ms, 2 * bytes, 0);
        }
        ms = time_ms([&] { rmsnorm_forward(out, rstd, x, weight, n, c, eps, 0); });
        report("rmsnorm", "fwd", "library", n, c, 0, ms, 2 * bytes, 0);
        ms = time_ms([&] { backward_v1(out, dw, y, x, weight, rstd, n, c); }, 3);
        report("rmsnorm", "bwd", "1", n, c, 0, ms, 4 * bytes, 0);
        ms = time_ms([&] { rmsnorm_backward(out, 1, dw, y, x, weight, rstd, n, c, scratch, 0); });
        report("rmsnorm", "bwd", "library", n, c, 0, ms, 4 * bytes, 0);
        ms = time_ms([&] { rmsnorm_heads_forward(out, rstd, x, c, weight, n, heads, d, eps, 0); });
        report("rmsnorm", "heads fwd", "library", n * heads, d, 0, ms, 2 * bytes, 0);
        ms = time_ms(
            [&] { rmsnorm_heads_backward(out, c, dw, y, x, c, weight, rstd, n, heads, d, scratch, 0); });
        report("rmsnorm", "heads bwd", "library", n * heads, d, 0, ms, 3 * bytes, 0);
    }
    return finish("rmsnorm");
}
