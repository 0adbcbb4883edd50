// layers.h: what the programs of the layers in llmc share: the C trainer's layers to check against, random
// inputs of the layers' number type, and reports. -DENABLE_FP16 and -DENABLE_FP32 build them for the other
// types.
#ifndef DEV_CUDA_LAYERS_H
#define DEV_CUDA_LAYERS_H
#include "../../train_gpt_nsa.h"
#include "../../llmc/cuda_common.cuh"
#include "common.h"
#include <map>

// Largest relative Frobenius error against the C layers, which read the same rounded inputs: of what is
// rounded to floatX once, one rounding; of fp32 results, sums in another order.
static const double fp32_tolerance = 1e-5;
static const double rounded_tolerance = fp32_tolerance + (sizeof(floatX) == 4                   ? 0
                                                          : std::is_same<floatX, __half>::value ? 0x1p-11
                                                                                                : 0x1p-8);

typedef Host<floatX> HostX;
typedef Buffer<floatX> BufferX;

static std::map<std::string, double> worst; // error of "DIR VERSION" in this run

template <typename T>
static inline void check_close(const char *dir, const char *version, const char *shape, const Buffer<T> &got,
                               const std::vector<float> &expected, double tolerance) {
    CUDA_CHECK(cudaDeviceSynchronize());
    double e = relative_error(got.floats(), expected), &w = worst[std::string(dir) + " " + version];
    w = std::max(w, e);
    std::string what = std::string(dir) + " version " + version + ", " + shape;
    check_that(e < tolerance, what.c_str(), e, tolerance);
    check_that(got.guards_intact(), (what + ": bytes written outside").c_str(), 1, 0);
}
// The same bits in two buffers.
template <typename T>
static inline void check_same(const char *what, const Buffer<T> &a, const Buffer<T> &b) {
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<T> x = a.host(), y = b.host();
    bool same = memcmp((const void *)x.data(), (const void *)y.data(), x.size() * sizeof(T)) == 0;
    check_that(same, (std::string(what) + ": bits differ between runs").c_str(), 1, 0);
}

// A measurement of n rows of c channels (and o outputs, or tokens of the vocabulary), printed and recorded.
// bytes, flops: what has to be moved and computed at least.
static inline void report(const char *program, const char *dir, const char *version, int64_t n, int64_t c,
                          int64_t o, double ms, double bytes, double flops) {
    printf("%s %s version %s, n %lld, c %lld", program, dir, version, (long long)n, (long long)c);
    if (o) printf(", o %lld", (long long)o);
    printf(": %.4f ms, %.2f TB/s", ms, bytes / ms * 1e-9);
    if (flops) printf(", %.0f TFLOP/s", flops / ms * 1e-9);
    printf("\n");
    FILE *f = record_start(program);
    if (!f) return;
    fprintf(f, ",\"part\":\"layer\",\"dir\":\"%s\",\"n\":%lld,\"c\":%lld", dir, (long long)n, (long long)c);
    if (o) fprintf(f, ",\"o\":%lld", (long long)o);
    fprintf(f, ",\"dtype\":\"%s\",\"ms\":%.4f,\"tflops\":%.2f,\"tbs\":%.3f", FLOATX_NAME, ms,
            flops / ms * 1e-9, bytes / ms * 1e-9);
    auto e = worst.find(std::string(dir) + " " + version);
    if (e != worst.end()) fprintf(f, ",\"err\":%.3g", e->second);
    fprintf(f, ",\"version\":\"%s\"}\n", version);
    fclose(f);
}

static inline int finish(const char *program) {
    printf("%s: %d passed, %d failed\n", program, checks_passed, checks_failed);
    return checks_failed != 0;
}
#endif
