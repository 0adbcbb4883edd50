// fp8_matrix.h: what fp8.cu and fp8_matmul.cu share: e4m3 matrices on the device and on the host, and inputs.
#ifndef DEV_CUDA_FP8_MATRIX_H
#define DEV_CUDA_FP8_MATRIX_H
#include "layers.h"
#include "../../llmc/fp8.cuh"

static const char *const scaling_names[] = {"tensor", "row"};

// An e4m3 matrix [rows, k] on the host, with room for a scale for each row.
struct Fp8Host {
    int64_t rows, k;
    std::vector<uint8_t> data;
    std::vector<float> scale;
    Fp8Host(int64_t num_rows, int64_t row_size) : rows(num_rows), k(row_size), data(rows * k), scale(rows) {}
    operator Fp8Matrix() { return {data.data(), scale.data()}; }
    int64_t scales(Fp8Scaling scaling) const { return scaling == FP8_SCALE_TENSOR ? 1 : rows; }
};

// The same on the device.
struct Fp8Buffer {
    int64_t rows, k;
    Buffer<uint8_t> data;
    Buffer<float> scale;
    Fp8Buffer(int64_t num_rows, int64_t row_size)
        : rows(num_rows), k(row_size), data(rows * k), scale(rows) {}
    operator Fp8Matrix() const { return {data.get(), scale.get()}; }
    void poison() { data.poison(), scale.poison(); }
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

#endif
