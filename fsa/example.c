// example.c: libfsa from plain C: forward, backward and a check of native sparse attention, for one sequence
// of 1,000 tokens and one of 500, with 4 query heads and 2 key-value heads.
//   nvcc fsa/example.c libfsa.a -o example        or: cc fsa/example.c -L. -lfsa -lcudart -lm -o example
#include "fsa.h"
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CUDA(call)                                                                                           \
    do {                                                                                                     \
        cudaError_t e_ = (call);                                                                             \
        if (e_ != cudaSuccess) {                                                                             \
            fprintf(stderr, "error: %s: %s\n", #call, cudaGetErrorString(e_));                               \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)
// Every function returns a status. fsa_last_error describes the error in one line.
#define FSA(call)                                                                                            \
    do {                                                                                                     \
        if ((call) != FSA_OK) {                                                                              \
            fprintf(stderr, "error: %s\n", fsa_last_error());                                                \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

typedef uint16_t bf16; // the upper half of a float

static bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float from_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// Allocates device memory.
static void *device(size_t bytes) {
    void *p;
    CUDA(cudaMalloc(&p, bytes));
    return p;
}
// Copies an array to new device memory.
static void *to_device(const void *x, size_t bytes) {
    void *p = device(bytes);
    CUDA(cudaMemcpy(p, x, bytes, cudaMemcpyHostToDevice));
    return p;
}
// Allocates n values on the host.
static bf16 *host(int64_t n) {
    bf16 *x = malloc((size_t)n * sizeof *x);
    if (!x) {
        fprintf(stderr, "error: no memory for %lld values\n", (long long)n);
        exit(1);
    }
    return x;
}
// Returns n random values on the device, uniform in (-scale, scale).
static void *random_values(int64_t n, float scale) {
    bf16 *x = host(n);
    for (int64_t i = 0; i < n; i++) x[i] = to_bf16(scale * (2 * (float)rand() / (float)RAND_MAX - 1));
    void *p = to_device(x, (size_t)n * sizeof *x);
    free(x);
    return p;
}
// Returns the dot product of two device arrays of n values.
static double dot(const void *a, const void *b, int64_t n) {
    bf16 *x = host(n), *y = host(n);
    double sum = 0;
    CUDA(cudaMemcpy(x, a, (size_t)n * sizeof *x, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(y, b, (size_t)n * sizeof *y, cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < n; i++) sum += (double)from_bf16(x[i]) * from_bf16(y[i]);
    free(x);
    free(y);
    return sum;
}

int main(void) {
    FsaConfig c = {
        .q_heads = 4,
        .kv_heads = 2,
        .head_dim = 64,
        .cmp_len = 32,
        .cmp_stride = 16,
        .phi = FSA_PHI_LINEAR,
        .block = 64,
        .topk = 6,
        .init_blocks = 1,
        .local_blocks = 2,
        .window = 128,
    };

    // The batch: packed sequences. One segment for each sequence: a query at every token.
    const int64_t cu_seqlens[] = {0, 1000, 1500};
    const FsaSegment segments[] = {{0, 0, 1000}, {1, 0, 500}};
    const int64_t n = 1500;
    FsaDeviceBatch batch = {
        .num_queries = n, .num_keys = n, .num_seqs = 2, .num_segments = 2, .max_len = 1000};
    batch.cu_seqlens = to_device(cu_seqlens, sizeof cu_seqlens);
    batch.segments = to_device(segments, sizeof segments);

    // Inputs. q and k are before RoPE.
    const int64_t q_size = n * c.q_heads * c.head_dim, kv_size = n * c.kv_heads * c.head_dim;
    const int64_t gates = n * c.q_heads * 3, pe_size = c.kv_heads * c.cmp_len * c.head_dim;
    const int64_t w_size = pe_size * c.head_dim;
    void *q = random_values(q_size, 2), *k = random_values(kv_size, 2);
    void *v = random_values(kv_size, 2), *gate = random_values(gates, 2);
    FsaPhiWeights phi = {.wk = random_values(w_size, 0.04f),
                         .pe = random_values(pe_size, 0.5f),
                         .wv = random_values(w_size, 0.04f)};
    double inv_freq_host[32];
    for (int i = 0; i < c.head_dim / 2; i++) inv_freq_host[i] = pow(10000, -2.0 * i / c.head_dim);
    double *inv_freq = to_device(inv_freq_host, sizeof inv_freq_host);

    // Results. Backward adds to the gradients of the compression's parameters, so they start at 0.
    void *o = device((size_t)q_size * 2), *dq = device((size_t)q_size * 2), *dk = device((size_t)kv_size * 2);
    void *dv = device((size_t)kv_size * 2), *dgate = device((size_t)gates * 2);
    FsaPhiGradients dphi = {.dwk = device((size_t)w_size * 4),
                            .dpe = device((size_t)pe_size * 4),
                            .dwv = device((size_t)w_size * 4)};
    CUDA(cudaMemset(dphi.dwk, 0, (size_t)w_size * 4));
    CUDA(cudaMemset(dphi.dpe, 0, (size_t)pe_size * 4));
    CUDA(cudaMemset(dphi.dwv, 0, (size_t)w_size * 4));

    // Memory that forward saves for backward, and one workspace for both.
    size_t saved_bytes = fsa_saved_size(&c, FSA_BF16, &batch);
    size_t forward_bytes = fsa_workspace_size(&c, FSA_BF16, &batch, FSA_FORWARD);
    size_t backward_bytes = fsa_workspace_size(&c, FSA_BF16, &batch, FSA_BACKWARD);
    if (!saved_bytes || !forward_bytes || !backward_bytes) { // 0: an error
        fprintf(stderr, "error: %s\n", fsa_last_error());
        return 1;
    }
    size_t bytes = forward_bytes > backward_bytes ? forward_bytes : backward_bytes;
    void *saved = device(saved_bytes), *workspace = device(bytes);

    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    FSA(fsa_forward(&c, FSA_BF16, &batch, q, k, v, &phi, inv_freq, gate, NULL, o, saved, workspace, bytes,
                    stream));
    // For the loss |o|^2 / 2, dout = o.
    FSA(fsa_backward(&c, FSA_BF16, &batch, k, v, &phi, inv_freq, gate, o, saved, dq, dk, dv, &dphi, dgate,
                     workspace, bytes, stream));
    CUDA(cudaStreamSynchronize(stream));

    // o is linear in v, and dout = o, so <v, dv> = <o, o>.
    double left = dot(v, dv, kv_size), right = dot(o, o, q_size);
    printf("%.0f MiB saved, %.0f MiB workspace; <v, dv> = %.1f, <o, o> = %.1f\n",
           (double)saved_bytes / 1048576, (double)bytes / 1048576, left, right);
    if (!(fabs(left - right) < 0.01 * right)) {
        fprintf(stderr, "error: <v, dv> and <o, o> differ by 1%% or more\n");
        return 1;
    }
    printf("example: 1 passed, 0 failed\n");
    return 0; // the end of the process frees all memory
}
