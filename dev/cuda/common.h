// common.h: shared code of the programs in dev/cuda and dev/test: checked CUDA calls, random inputs, device
// buffers with guard zones, timing, errors against the reference, and records in dev/results.
#ifndef DEV_CUDA_COMMON_H
#define DEV_CUDA_COMMON_H
#include "../../llmc/results.h"
#include "../../fsa/kernels.h"
#include "../../fsa/reference.h"
#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <time.h>
#include <vector>

#define CUDA_CHECK(call)                                                                                     \
    do {                                                                                                     \
        cudaError_t e_ = (call);                                                                             \
        if (e_ != cudaSuccess) {                                                                             \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e_));                    \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)
// The same for launchers.
#define FSA_CHECK(call)                                                                                      \
    do {                                                                                                     \
        int e_ = (call);                                                                                     \
        if (e_) {                                                                                            \
            printf("%s:%d: %s: status %d, %s\n", __FILE__, __LINE__, #call, e_, fsa_cuda_error());           \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

// ---- random numbers -----------------------------------------------------------------------------
struct Random {
    uint64_t s;
    explicit Random(uint64_t seed) : s(seed) {}
    uint64_t u64() {
        uint64_t z = (s += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    double uniform() { return (u64() >> 11) * 0x1p-53; }
    int64_t below(int64_t n) { return (int64_t)(u64() % (uint64_t)n); }
    // Approximately normal with unit variance: the sum of four uniform numbers, which is cheap.
    float normal() {
        uint64_t x = u64();
        int sum = (int)(x & 0xffff) + (int)(x >> 16 & 0xffff) + (int)(x >> 32 & 0xffff) + (int)(x >> 48);
        return (float)((sum - 131070) / 37837.2);
    }
};

// Returns and prints the seed: N of the last argument seed=N, otherwise the clock.
static inline uint64_t seed_from_args(int argc, char **argv) {
    uint64_t seed = (uint64_t)time(NULL);
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "seed=", 5) == 0) seed = strtoull(argv[i] + 5, NULL, 10);
    }
    printf("seed=%llu\n", (unsigned long long)seed);
    return seed;
}
// Returns whether `flag` is among the arguments.
static inline bool has_flag(int argc, char **argv, const char *flag) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], flag) == 0) return true;
    }
    return false;
}

// ---- 16-bit types on the host ---------------------------------------------------------------------
template <typename T> static inline float to_float(T x);
template <> inline float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <> inline float to_float(__half x) {
    return __half2float(x);
}
template <> inline float to_float(float x) {
    return x;
}
template <typename T> static inline T from_float(float x);
template <> inline __nv_bfloat16 from_float(float x) {
    return __float2bfloat16(x);
}
template <> inline __half from_float(float x) {
    return __float2half(x);
}
template <> inline float from_float(float x) {
    return x;
}
// The FsaDtype of a type, its name, and the largest relative errors of outputs and gradients.
template <typename T> struct Dtype;
template <> struct Dtype<__nv_bfloat16> {
    static constexpr FsaDtype value = FSA_BF16;
    static constexpr const char *name = "bf16";
    static constexpr double out_tolerance = 3e-3, grad_tolerance = 4e-3;
};
template <> struct Dtype<__half> {
    static constexpr FsaDtype value = FSA_FP16;
    static constexpr const char *name = "fp16";
    static constexpr double out_tolerance = 5e-4, grad_tolerance = 8e-4;
};

// n random values of standard deviation `scale`, rounded to T: as T, and as float for the reference.
template <typename T> struct Host {
    std::vector<T> raw;
    std::vector<float> f;
    Host(Random *r, int64_t n, float scale) : raw(n), f(n) {
        for (int64_t i = 0; i < n; i++) {
            raw[i] = from_float<T>(scale * r->normal());
            f[i] = to_float<T>(raw[i]);
        }
    }
};

// ---- device buffers -------------------------------------------------------------------------------
// n elements in device memory between two guard zones. poison() sets all bits: NaN, or -1.
template <typename T> struct Buffer {
#ifdef __SANITIZE_ADDRESS__
    enum { GUARD = 0 }; // the sanitizer's guard zones also detect reads
#else
    enum { GUARD = 1024 };
#endif
    char *base;
    int64_t n;
    explicit Buffer(int64_t count) : n(count) {
        CUDA_CHECK(cudaMalloc((void **)&base, n * sizeof(T) + 2 * GUARD));
        poison();
    }
    explicit Buffer(const std::vector<T> &v) : Buffer((int64_t)v.size()) {
        set(v);
    }
    Buffer(const Buffer &) = delete;
    ~Buffer() {
        cudaFree(base);
    }
    operator T *() const {
        return (T *)(base + GUARD);
    }
    T *get() const {
        return (T *)(base + GUARD);
    }
    void poison() {
        CUDA_CHECK(cudaMemset(base, 0xff, n * sizeof(T) + 2 * GUARD));
    }
    void zero() {
        CUDA_CHECK(cudaMemset(get(), 0, n * sizeof(T)));
    }
    void set(const std::vector<T> &v) {
        CUDA_CHECK(cudaMemcpy(get(), v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> host() const {
        std::vector<T> v(n);
        CUDA_CHECK(cudaMemcpy(v.data(), get(), n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
    std::vector<float> floats() const {
        std::vector<T> v = host();
        std::vector<float> f(n);
        for (int64_t i = 0; i < n; i++) f[i] = to_float<T>(v[i]);
        return f;
    }
    // Returns whether both guard zones still hold the poison.
    bool guards_intact() const {
        std::vector<unsigned char> g(2 * GUARD);
        CUDA_CHECK(cudaMemcpy(g.data(), base, GUARD, cudaMemcpyDeviceToHost));
        CUDA_CHECK(cudaMemcpy(g.data() + GUARD, base + GUARD + n * sizeof(T), GUARD, cudaMemcpyDeviceToHost));
        for (unsigned char c : g) {
            if (c != 0xff) return false;
        }
        return true;
    }
};

// A device array of `rows` rows of row_size elements, `stride` elements apart, whose gaps between rows are
// guard zones too. r: draws a stride for a view of a larger matrix; NULL: the rows are packed.
template <typename T> struct RowBuffer {
    int64_t rows, row_size, stride, n; // n: elements of all rows, without the gaps
    Buffer<T> memory;
    RowBuffer(int64_t num_rows, int64_t size, Random *r)
        : rows(num_rows), row_size(size), stride(r ? (size + 7) / 8 * 8 + 8 * (int64_t)r->below(4) : size),
          n(rows * size), memory(rows * stride) {}
    RowBuffer(int64_t num_rows, int64_t size, Random *r, const std::vector<T> &v)
        : RowBuffer(num_rows, size, r) {
        set(v);
    }
    int64_t stride_arg() const { return stride == row_size ? 0 : stride; } // 0: packed (fsa.h)
    operator T *() const { return memory.get(); }
    T *get() const { return memory.get(); }
    void poison() { memory.poison(); }
    void set(const std::vector<T> &v) {
        std::vector<T> all = memory.host();
        for (int64_t i = 0; i < n; i++) all[i / row_size * stride + i % row_size] = v[i];
        memory.set(all);
    }
    std::vector<T> host() const {
        std::vector<T> all = memory.host(), v(n);
        for (int64_t i = 0; i < n; i++) v[i] = all[i / row_size * stride + i % row_size];
        return v;
    }
    std::vector<float> floats() const {
        std::vector<float> f;
        for (T x : host()) f.push_back(to_float<T>(x));
        return f;
    }
    bool guards_intact() const {
        const std::vector<T> all = memory.host();
        for (size_t i = 0; i < all.size(); i++) {
            static const unsigned char poison[sizeof(T)] = {0xff, 0xff};
            if ((int64_t)i % stride >= row_size && memcmp(&all[i], poison, sizeof(T)) != 0) return false;
        }
        return memory.guards_intact();
    }
};

// Fills x [n] on the device with the values of Random::normal times scale, for timings.
template <typename T> __global__ void fill_random_kernel(T *x, int64_t n, uint64_t seed, float scale) {
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) {
        uint64_t z = seed + 0x9e3779b97f4a7c15ull * (uint64_t)(i + 1);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        int sum = (int)(z & 0xffff) + (int)(z >> 16 & 0xffff) + (int)(z >> 32 & 0xffff) + (int)(z >> 48);
        x[i] = (T)(scale * (float)(sum - 131070) / 37837.2f);
    }
}
template <typename T> static inline void fill_random(T *x, int64_t n, uint64_t seed, float scale) {
    fill_random_kernel<T><<<1024, 256>>>(x, n, seed, scale);
    CUDA_CHECK(cudaGetLastError());
}

// ---- batches --------------------------------------------------------------------------------------
// A batch of sequences of the given lengths, on the host and the device. seg: its segments; empty: one for
// each whole sequence.
struct Batch {
    std::vector<int64_t> cu_seqlens;
    std::vector<FsaSegment> segments;
    FsaBatch ref;      // for the reference
    BatchLayout batch; // for the launchers
    int64_t longest;   // tokens of the longest sequence
    Buffer<int64_t> *cu_seqlens_device;
    Buffer<FsaSegment> *segments_device;
    Buffer<char> *memory; // of the BatchLayout
    Batch(const FsaConfig &c, const std::vector<int64_t> &lengths, std::vector<FsaSegment> seg = {})
        : segments(seg), longest(0) {
        cu_seqlens.push_back(0);
        for (size_t i = 0; i < lengths.size(); i++) {
            cu_seqlens.push_back(cu_seqlens[i] + lengths[i]);
            longest = std::max(longest, lengths[i]);
            if (seg.empty()) segments.push_back(FsaSegment{(int64_t)i, 0, lengths[i]});
        }
        ref = FsaBatch{(int64_t)lengths.size(), cu_seqlens.data(), (int64_t)segments.size(), segments.data()};
        cu_seqlens_device = new Buffer<int64_t>(cu_seqlens);
        segments_device = new Buffer<FsaSegment>(segments);
        memory = new Buffer<char>((int64_t)fsa_batch_layout_bytes(ref.num_seqs, ref.num_segments));
        const FsaDeviceBatch b = {fsa_batch_queries(&ref), fsa_batch_keys(&ref),     ref.num_seqs,
                                  ref.num_segments,        cu_seqlens_device->get(), segments_device->get()};
        FSA_CHECK(fsa_batch_layout(&batch, &c, &b, memory->get(), 0));
    }
    Batch(const Batch &) = delete;
    ~Batch() {
        delete cu_seqlens_device;
        delete segments_device;
        delete memory;
    }
};

// l = 32, s = 16, one initial and two local blocks, W = 512, phi = linear.
static inline FsaConfig default_config(int hq, int hkv, int d, int block, int topk) {
    FsaConfig c;
    memset(&c, 0, sizeof c);
    c.q_heads = hq, c.kv_heads = hkv, c.head_dim = d, c.cmp_len = 32, c.cmp_stride = 16, c.block = block;
    c.topk = topk, c.init_blocks = 1, c.local_blocks = 2, c.window = 512, c.phi = FSA_PHI_LINEAR;
    return c;
}

// Returns inv_freq [d/2] of RoPE with base 10,000.
static inline std::vector<double> rope_frequencies(int d) {
    std::vector<double> f;
    for (int i = 0; i < d / 2; i++) f.push_back(pow(10000, -2.0 * i / d));
    return f;
}

// Returns the index in dq_accum (kernels.h) of element i of dq [Nq, Hq, d].
static inline int64_t dq_accum_index(const FsaConfig &c, int64_t nq, int64_t i) {
    int64_t d = c.head_dim, head = i / d % c.q_heads,
            row = dq_accum_row(nq, c.q_heads / c.kv_heads, i / d / c.q_heads, (int)head);
    return row * d + dq_accum_chunk(row, (int)(i % d / 8)) * 8 + i % 8;
}
// Convert dq_accum to dq [Nq, Hq, d], and back.
static inline std::vector<float> dq_from_accum(const FsaConfig &c, int64_t nq,
                                               const std::vector<float> &accum) {
    std::vector<float> dq(accum.size());
    for (size_t i = 0; i < dq.size(); i++) dq[i] = accum[(size_t)dq_accum_index(c, nq, (int64_t)i)];
    return dq;
}
static inline std::vector<float> dq_to_accum(const FsaConfig &c, int64_t nq, const std::vector<float> &dq) {
    std::vector<float> accum(dq.size());
    for (size_t i = 0; i < dq.size(); i++) accum[(size_t)dq_accum_index(c, nq, (int64_t)i)] = dq[i];
    return accum;
}
// Returns the number of elements of k or v under a rule. Under the compressed rule they have floor(N/s) rows
// (fsa.h).
static inline int64_t kv_elements(const FsaConfig &c, const BatchLayout &p, FsaVisibility rule) {
    return (rule == FSA_COMPRESSED ? fsa_max_windows(&c, &p) : p.n) * c.kv_heads * c.head_dim;
}

// Returns random block indices [Hkv, Nq, T] that obey the rules of fsa_selected_forward.
static inline std::vector<int32_t> random_block_indices(Random *r, const FsaConfig &c, const FsaBatch &b) {
    int64_t nq = fsa_batch_queries(&b);
    std::vector<int32_t> out((size_t)(c.kv_heads * nq * c.topk), -1);
    std::vector<int32_t> selected;
    for (int h = 0; h < c.kv_heads; h++) {
        int64_t query = 0;
        for (int64_t s = 0; s < b.num_segments; s++) {
            for (int64_t i = 0; i < b.segments[s].len; i++, query++) {
                int64_t blocks = (b.segments[s].pos + i) / c.block + 1;
                selected.clear();
                int64_t want = std::min<int64_t>(blocks, c.topk);
                if (c.init_blocks + c.local_blocks == 0 && r->below(2)) want = r->below(want + 1);
                for (int64_t j = 0; j < blocks && blocks == want; j++) selected.push_back((int32_t)j);
                if (blocks > want) {
                    for (int j = 0; j < c.init_blocks; j++) selected.push_back(j);
                    for (int j = 0; j < c.local_blocks; j++) selected.push_back((int32_t)(blocks - 1 - j));
                }
                while ((int64_t)selected.size() < want) {
                    int32_t j = (int32_t)r->below(blocks);
                    if (std::find(selected.begin(), selected.end(), j) == selected.end())
                        selected.push_back(j);
                }
                std::sort(selected.begin(), selected.end());
                std::copy(selected.begin(), selected.end(), out.begin() + (h * nq + query) * c.topk);
            }
        }
    }
    return out;
}

// ---- timing -----------------------------------------------------------------------------------------
// Returns the median milliseconds of `reps` runs after two warm-up runs. flush: each run starts with a cold
// L2.
template <typename F> static inline double time_ms(F run, int reps = 10, bool flush = true) {
    static char *flush_buffer = NULL;
    const size_t flush_bytes = 256u << 20;
    if (!flush_buffer) CUDA_CHECK(cudaMalloc((void **)&flush_buffer, flush_bytes));
    cudaEvent_t a, b;
    CUDA_CHECK(cudaEventCreate(&a));
    CUDA_CHECK(cudaEventCreate(&b));
    std::vector<float> t;
    for (int i = 0; i < reps + 2; i++) {
        if (flush) CUDA_CHECK(cudaMemsetAsync(flush_buffer, i, flush_bytes));
        CUDA_CHECK(cudaEventRecord(a));
        run();
        CUDA_CHECK(cudaEventRecord(b));
        CUDA_CHECK(cudaEventSynchronize(b));
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, a, b));
        if (i >= 2) t.push_back(ms);
    }
    CUDA_CHECK(cudaEventDestroy(a));
    CUDA_CHECK(cudaEventDestroy(b));
    std::sort(t.begin(), t.end());
    return t[t.size() / 2];
}

// ---- errors -------------------------------------------------------------------------------------------
// Returns |x - ref| / max(|ref|, |terms|) in the Frobenius norm; infinity if x is not finite. terms: the
// terms whose sum is ref, if they may cancel.
static inline double relative_error(const std::vector<float> &x, const std::vector<float> &ref,
                                    const std::vector<float> &terms = {}) {
    double diff = 0, norm = 0, norm_of_terms = 0;
    for (size_t i = 0; i < ref.size(); i++) {
        if (!isfinite(x[i])) return INFINITY;
        double e = (double)x[i] - ref[i];
        diff += e * e;
        norm += (double)ref[i] * ref[i];
    }
    for (float t : terms) norm_of_terms += (double)t * t;
    norm = std::max(norm, norm_of_terms);
    if (norm == 0) return diff == 0 ? 0 : INFINITY;
    return sqrt(diff / norm);
}
// Returns the largest difference of log-sum-exps; infinity if only one of two is -inf.
static inline double lse_error(const std::vector<float> &x, const std::vector<float> &ref) {
    double worst = 0;
    for (size_t i = 0; i < ref.size(); i++) {
        if (isinf(ref[i]) && ref[i] < 0 ? !(isinf(x[i]) && x[i] < 0) : !isfinite(x[i])) return INFINITY;
        if (isfinite(ref[i])) worst = std::max(worst, fabs((double)x[i] - ref[i]));
    }
    return worst;
}
static int checks_failed = 0, checks_passed = 0;
// Counts a check, and prints a failed one with the value and its limit.
static inline void check_that(bool ok, const char *what, double value, double limit) {
    if (ok) {
        checks_passed++;
    } else {
        checks_failed++;
        printf("FAILED %s: %g, must be at most %g\n", what, value, limit);
    }
}

// ---- results ------------------------------------------------------------------------------------------
// One timing.
struct Result {
    const char *program, *part, *attn, *dir, *dtype;
    int64_t n; // tokens
    FsaConfig c;
    double ms, tflops, err;    // err: largest error of this run's checks; -1: none
    const char *block_indices; // their distribution; NULL: none
    const char *version;       // "library", "1", ...
    int64_t sequences;
};

// Opens the results file of this GPU and starts a new line (llmc/results.h). Returns NULL on failure.
static inline FILE *record_start(const char *program) {
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceProperties(&prop, 0));
    return results_open(prop.name, 1, program, "");
}

// Appends a result as one line.
static inline void record(const Result &r) {
    FILE *f = record_start(r.program);
    if (!f) return;
    fprintf(f,
            ",\"part\":\"%s\",\"attn\":\"%s\",\"dir\":\"%s\",\"n\":%lld,\"hq\":%d,\"hkv\":%d,\"d\":%d,"
            "\"block\":%d,\"topk\":%d,\"dtype\":\"%s\",\"ms\":%.4f,\"tflops\":%.2f",
            r.part, r.attn, r.dir, (long long)r.n, r.c.q_heads, r.c.kv_heads, r.c.head_dim, r.c.block,
            r.c.topk, r.dtype, r.ms, r.tflops);
    if (r.err >= 0) fprintf(f, ",\"err\":%.3g", r.err);
    if (r.c.cmp_len != 32) fprintf(f, ",\"l\":%d", r.c.cmp_len);
    if (r.c.cmp_stride != 16) fprintf(f, ",\"s\":%d", r.c.cmp_stride);
    if (r.c.window != 512) fprintf(f, ",\"W\":%d", r.c.window);
    if (r.sequences > 1) fprintf(f, ",\"sequences\":%lld", (long long)r.sequences);
    if (r.block_indices) fprintf(f, ",\"indices\":\"%s\"", r.block_indices);
    fprintf(f, ",\"version\":\"%s\"}\n", r.version);
    fclose(f);
}
#endif
