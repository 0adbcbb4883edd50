// dev/cuda/swiglu.cu: silu(gate) * up, and its backward pass.
//   version 1: a thread a number, 2 bytes at a time
//   library  : 16-byte accesses (llmc/swiglu.cuh)
//   ./swiglu [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "layers.h"
#include "../../llmc/swiglu.cuh"

// Version 1. A warp reads 64 bytes at a time, and divides to find its row.
__global__ void swiglu_v1_kernel(floatX *out, const floatX *gate_up, int64_t n, int64_t h) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n * h) return;
    float gate = (float)gate_up[i / h * 2 * h + i % h], up = (float)gate_up[i / h * 2 * h + h + i % h];
    out[i] = (floatX)(gate / (1 + expf(-gate)) * up);
}
static void swiglu_v1(floatX *out, const floatX *gate_up, int64_t n, int64_t h) {
    swiglu_v1_kernel<<<(unsigned)((n * h + 255) / 256), 256>>>(out, gate_up, n, h);
    CUDA_CHECK(cudaGetLastError());
}

static void check(Random *r, int64_t n, int h) {
    HostX gate_up(r, n * 2 * h, 3), dout(r, n * h, 1);
    BufferX in(gate_up.raw), d(dout.raw), out(n * h), din(n * 2 * h);
    std::vector<float> expected(n * h), dexpected(n * 2 * h);
    swiglu_forward(expected.data(), gate_up.f.data(), n, h);
    swiglu_backward(dexpected.data(), dout.f.data(), gate_up.f.data(), n, h);
    char shape[64];
    snprintf(shape, sizeof shape, "n %lld h %d", (long long)n, h);
    swiglu_v1(out, in, n, h);
    check_close("fwd", "1", shape, out, expected, rounded_tolerance);
    out.poison();
    swiglu_forward(out, in, n, h, 0);
    check_close("fwd", "library", shape, out, expected, rounded_tolerance);
    swiglu_backward(din, d, in, n, h, 0);
    check_close("bwd", "library", shape, din, dexpected, rounded_tolerance);
    swiglu_backward(in, d, in, n, h, 0);
    check_same("swiglu, gradient in place", in, din);
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    check(&r, 1, PACK);
    check(&r, 3, 257 * PACK); // the second block of a row has one thread at work
    check(&r, 65, 64);
    if (!has_flag(argc, argv, "small")) check(&r, 507, 1024);
    for (int64_t n : {8192, 65536}) {
        if (has_flag(argc, argv, "check")) break;
        int64_t h = 14336, size = n * h;
        BufferX in(2 * size), out(size), din(2 * size);
        fill_random(in.get(), 2 * size, r.u64(), 3);
        fill_random(out.get(), size, r.u64(), 1);
        double bytes = sizeof(floatX) * (double)size, ms;
        ms = time_ms([&] { swiglu_backward(din, out, in, n, h, 0); });
        report("swiglu", "bwd", "library", n, h, 0, ms, 5 * bytes, 0);
        ms = time_ms([&] { swiglu_v1(out, in, n, h); });
        report("swiglu", "fwd", "1", n, h, 0, ms, 3 * bytes, 0);
        ms = time_ms([&] { swiglu_forward(out, in, n, h, 0); });
        report("swiglu", "fwd", "library", n, h, 0, ms, 3 * bytes, 0);
    }
    return finish("swiglu");
}
