// dev/cuda/global_norm.cu: the norm of all gradients and the factor that clips them.
//   version 1: one block, fp32
//   version 2: one float atomic a block: other bits every time
//   library  : two passes in fp64, all orders fixed (llmc/global_norm.cuh)
//   ./global_norm [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "layers.h"
#include "../../llmc/global_norm.cuh"

__global__ void norm_finish_kernel(float *out, const float *sum) {
    out[0] = sqrtf(*sum);
}
// Versions 1 (one block) and 2: out[1] is the sum.
__global__ void sum_of_squares_old_kernel(float *out, const float *x, int64_t count) {
    __shared__ float shared[32];
    float sum = 0;
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) sum += x[i] * x[i];
    sum = block_reduce_sum(sum, shared);
    if (threadIdx.x == 0) atomicAdd(out + 1, sum);
}
static void norm_old(int version, float *out, const float *x, int64_t count) {
    CUDA_CHECK(cudaMemsetAsync(out, 0, 2 * sizeof(float), 0));
    sum_of_squares_old_kernel<<<version == 1 ? 1 : 1024, 256>>>(out, x, count);
    norm_finish_kernel<<<1, 1>>>(out, out + 1);
    CUDA_CHECK(cudaGetLastError());
}

static void norm_library(float *out, const float *x, int64_t count, float unscale, float clip,
                         void *scratch) {
    static Buffer<double> squares(1);
    CUDA_CHECK(cudaMemsetAsync(squares, 0, sizeof(double), 0));
    sum_of_squares(squares, x, count, scratch, 0);
    global_norm(out, squares, unscale, clip, 0);
}

static void check(Random *r, int64_t count, float scale, float unscale, float clip) {
    std::vector<float> x(count);
    double sum = 0;
    for (float &v : x) v = scale * r->normal(), sum += (double)v * v;
    double norm = sqrt(sum) * unscale;
    std::vector<float> expected = {(float)norm,
                                   (float)(unscale * (clip > 0 && norm > clip ? clip / norm : 1)), 1};
    char shape[96];
    snprintf(shape, sizeof shape, "count %lld scale %g clip %g", (long long)count, scale, clip);
    Buffer<float> in(x), out(3), again(3);
    Buffer<char> scratch((int64_t)global_norm_scratch(count));
    norm_library(out, in, count, unscale, clip, scratch);
    check_close("norm", "library", shape, out, {expected[0], expected[1], 1}, 1e-6);
    std::vector<float> got = out.host(); // each by itself
    for (int i = 0; i < 3; i++) {
        double e = expected[i] ? fabs(got[i] / (double)expected[i] - 1) : fabs(got[i]);
        check_that(e < 1e-6, shape, e, 1e-6);
    }
    check_that(scratch.guards_intact(), "global_norm: bytes written outside of the scratch", 1, 0);
    scratch.poison();
    norm_library(again, in, count, unscale, clip, scratch);
    check_same("global_norm", out, again);
    if (count > 0) {
        for (float bad : {INFINITY, -INFINITY, NAN}) {
            x[r->below(count)] = bad;
            in.set(x);
            norm_library(out, in, count, unscale, clip, scratch);
            check_that(out.host()[2] == 0, "a gradient that is not finite", 1, 0);
        }
    }
    for (int version = 1; version <= 2 && scale == 1; version++) {
        for (float &v : x) v = r->normal();
        in.set(x);
        norm_old(version, out, in, count);
        float old = out.host()[0];
        norm_library(again, in, count, 1, 0, scratch);
        double e = fabs(old / (double)again.host()[0] - 1), &w = worst[version == 1 ? "norm 1" : "norm 2"];
        w = std::max(w, e);
        check_that(e < 1e-4, "old version", e, 1e-4);
    }
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    check(&r, 1, 1, 1, 0);
    check(&r, 3, 1, 0.5f, 1e-3f); // clipped
    check(&r, 1023, 1, 0.01f, 1); // not
    check(&r, 5001, 1e25f, 1, 1); // squares beyond fp32
    check(&r, 5001, 1e-25f, 1, 1e-24f);
    if (!has_flag(argc, argv, "small"))
        check(&r, 1024 * 1024 * 3 + 5, 1, 1, 1); // more than one round of the grid
    for (int64_t count : {124 << 20, 1 << 30}) {
        if (has_flag(argc, argv, "check")) break;
        Buffer<float> x(count), out(3);
        Buffer<char> scratch((int64_t)global_norm_scratch(count));
        fill_random(x.get(), count, r.u64(), 1);
        for (int version = 1; version <= 3; version++) {
            double ms = time_ms(
                [&] {
                    if (version < 3)
                        norm_old(version, out, x, count);
                    else
                        norm_library(out, x, count, 1, 1, scratch);
                },
                version == 1 ? 3 : 10);
            report("global_norm", "norm",
                   version == 1   ? "1"
                   : version == 2 ? "2"
                                  : "library",
                   count, 1, 0, ms, 4.0 * (double)count, 0);
        }
    }
    return finish("global_norm");
}
