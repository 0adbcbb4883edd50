// ceilings.cuh: what the GPU reaches at most, measured at the start of -profile: a copy in its memory, and
// large matmuls of random numbers.
#ifndef LLMC_CEILINGS_CUH
#define LLMC_CEILINGS_CUH
#include "arena.cuh"
#include "fp8_matmul.cuh"
#include "profile_work.h"
#include <algorithm>
#include <functional>
#include <vector>

// Work per second for each Limit: FLOP/s, or bytes/s read and written. 0: not measured.
typedef struct {
    double rate[LIMITS];
} Ceilings;

// x [count] = pseudo-random numbers from -1 to 1.
static __global__ void __launch_bounds__(256) random_matrix_kernel(floatX *x, int64_t count) {
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        uint32_t h = (uint32_t)i * 2654435761u + 12345u;
        h = (h ^ h >> 15) * 2246822519u, h = (h ^ h >> 13) * 3266489917u, h ^= h >> 16;
        x[i] = (floatX)((float)(h >> 8) * 0x1p-23f - 1);
    }
}

// Returns the median seconds of `run` among nine calls after three others.
static double ceiling_seconds(cudaStream_t stream, const std::function<void()> &run) {
    cudaEvent_t begin, end;
    std::vector<float> ms;
    cuda_check(cudaEventCreate(&begin));
    cuda_check(cudaEventCreate(&end));
    for (int i = 0; i < 12; i++) {
        float time;
        cuda_check(cudaEventRecord(begin, stream));
        run();
        cuda_check(cudaEventRecord(end, stream));
        cuda_check(cudaEventSynchronize(end));
        cuda_check(cudaEventElapsedTime(&time, begin, end));
        if (i >= 3) ms.push_back(time);
    }
    cuda_check(cudaEventDestroy(begin));
    cuda_check(cudaEventDestroy(end));
    std::sort(ms.begin(), ms.end());
    return 1e-3 * ms[ms.size() / 2];
}

// Measures in the memory of an arena, which it overwrites. Copies at most 1 GiB; the matmuls are square, of
// at most 8,192 rows, those in e4m3 with fast accumulation.
static Ceilings ceilings_measure(Matmul *mm, const Arena *arena, int fp8, cudaStream_t stream) {
    const size_t bytes = arena->bytes;
    Ceilings c = {};
    const int64_t half = (int64_t)std::min<size_t>(bytes / 2, (size_t)1 << 30) / 256 * 256;
    char *base = arena->base;
    if (half > 0) {
        const double seconds = ceiling_seconds(stream, [&] {
            cuda_check(cudaMemcpyAsync(base + half, base, half, cudaMemcpyDeviceToDevice, stream));
        });
        if (seconds > 0) c.rate[LIMIT_MEMORY] = 2 * (double)half / seconds;
    }
    int64_t m = 8192; // three matrices in floatX, and two in e4m3 with their scales
    while (m >= 256 && (size_t)(m * m * (3 * sizeof(floatX) + 2) + 8 * m) > bytes) m -= 128;
    if (m < 256) return c;
    floatX *a = (floatX *)base, *b = a + m * m, *d = b + m * m;
    Fp8Matrix a8 = {(uint8_t *)(d + m * m), NULL}, b8 = {a8.data + m * m, NULL};
    a8.scale = (float *)(b8.data + m * m), b8.scale = a8.scale + m;
    random_matrix_kernel<<<1024, 256, 0, stream>>>(a, 2 * m * m);
    cuda_check(cudaGetLastError());
    const double flops = 2.0 * (double)m * (double)m * (double)m;
    double seconds =
        ceiling_seconds(stream, [&] { matmul_forward(mm, d, m, a, m, b, NULL, m, m, m, stream); });
    if (seconds > 0) c.rate[LIMIT_MATMUL_16] = flops / seconds;
    if (!fp8) return c;
    quantize_rows(a8, a, m, m, m, stream), quantize_rows(b8, b, m, m, m, stream);
    seconds = ceiling_seconds(
        stream, [&] { fp8_matmul(mm, fp8_mode(mm, 1), d, 0, m, NULL, a8, b8, m, m, m, m, stream); });
    if (seconds > 0) c.rate[LIMIT_MATMUL_8] = flops / seconds;
    return c;
}
#endif
