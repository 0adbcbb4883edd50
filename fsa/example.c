// example.c: libfsa from C (or C++): forward, backward and a check of native sparse attention, for one
// sequence of 1,000 tokens and one of 500, with 4 query heads and 2 key-value heads.
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
    bf16 *x = (bf16 *)malloc((size_t)n * sizeof *x);
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
// Allocates device memory of zeros.
static void *zeros(size_t bytes) {
    void *p = device(bytes);
    CUDA(cudaMemset(p, 0, bytes));
    return p;
}
// Returns the dot product of two device arrays of `rows` rows of `columns` values, each with its row stride.
static double dot(const void *a, int64_t a_stride, const void *b, int64_t b_stride, int64_t rows,
                  int64_t columns) {
    bf16 *x = host(columns), *y = host(columns);
    double sum = 0;
    for (int64_t i = 0; i < rows; i++) {
        CUDA(cudaMemcpy(x, (const bf16 *)a + i * a_stride, (size_t)columns * sizeof *x,
                        cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(y, (const bf16 *)b + i * b_stride, (size_t)columns * sizeof *y,
                        cudaMemcpyDeviceToHost));
        for (int64_t j = 0; j < columns; j++) sum += (double)from_bf16(x[j]) * from_bf16(y[j]);
    }
    free(x);
    free(y);
    return sum;
}

// Makes a batch of packed sequences of 1,000 and 500 tokens. One segment for each sequence: a query at every
// token.
static FsaDeviceBatch make_batch(void) {
    const int64_t cu_seqlens[] = {0, 1000, 1500};
    const FsaSegment segments[] = {{0, 0, 1000}, {1, 0, 500}};
    FsaDeviceBatch batch = {.num_queries = 1500, .num_keys = 1500, .num_seqs = 2, .num_segments = 2};
    batch.cu_seqlens = (const int64_t *)to_device(cu_seqlens, sizeof cu_seqlens);
    batch.segments = (const FsaSegment *)to_device(segments, sizeof segments);
    return batch;
}

// Makes random parameters for the compression, [Hkv, l*d, d] and [Hkv, l, d], and their gradients, which
// backward adds to: they start at 0.
static void make_phi(const FsaConfig *c, FsaPhiWeights *phi, FsaPhiGradients *dphi) {
    const int64_t pe_size = c->kv_heads * c->cmp_len * c->head_dim, w_size = pe_size * c->head_dim;
    phi->wk = random_values(w_size, 0.04f);
    phi->pe = random_values(pe_size, 0.5f);
    phi->wv = random_values(w_size, 0.04f);
    dphi->dwk = (float *)zeros((size_t)w_size * sizeof(float));
    dphi->dpe = (float *)zeros((size_t)pe_size * sizeof(float));
    dphi->dwv = (float *)zeros((size_t)w_size * sizeof(float));
}

// Computes o from the matrix qkv, and the gradient dqkv of the loss |o|^2 / 2 from dout = o. A row of qkv and
// of dqkv is a token's q, k, v and gate logits, from the column `columns[0]` to `columns[3]` on.
static void forward_backward(const FsaConfig *c, const FsaDeviceBatch *batch, bf16 *qkv, bf16 *dqkv,
                             const int64_t columns[4], int64_t stride, void *o) {
    FsaForward forward = {.size = sizeof forward, .q = qkv + columns[0], .k = qkv + columns[1]};
    forward.v = qkv + columns[2], forward.gate_logits = qkv + columns[3];
    forward.q_stride = forward.k_stride = forward.v_stride = forward.gate_stride = stride;
    FsaBackward backward = {.size = sizeof backward, .k = forward.k, .v = forward.v, .dout = o};
    backward.gate_logits = forward.gate_logits;
    backward.k_stride = backward.v_stride = backward.gate_stride = stride;
    backward.dq = dqkv + columns[0], backward.dk = dqkv + columns[1];
    backward.dv = dqkv + columns[2], backward.dgate_logits = dqkv + columns[3];
    backward.dq_stride = backward.dk_stride = backward.dv_stride = backward.dgate_stride = stride;
    make_phi(c, &forward.phi, &backward.dphi);
    backward.phi = forward.phi;
    double inv_freq[FSA_MAX_HEAD_DIM / 2];
    for (int i = 0; i < c->head_dim / 2; i++) inv_freq[i] = pow(10000, -2.0 * i / c->head_dim);
    forward.inv_freq = backward.inv_freq = (const double *)to_device(inv_freq, sizeof inv_freq);
    forward.o = o;

    // Memory that forward saves for backward, and one workspace for both.
    size_t saved_bytes = fsa_saved_size(c, FSA_BF16, batch);
    size_t forward_bytes = fsa_workspace_size(c, FSA_BF16, batch, FSA_FORWARD);
    size_t backward_bytes = fsa_workspace_size(c, FSA_BF16, batch, FSA_BACKWARD);
    if (!saved_bytes || !forward_bytes || !backward_bytes) { // 0: an error
        fprintf(stderr, "error: %s\n", fsa_last_error());
        exit(1);
    }
    size_t bytes = forward_bytes > backward_bytes ? forward_bytes : backward_bytes;
    backward.saved = forward.saved = device(saved_bytes);
    backward.workspace = forward.workspace = device(bytes);
    backward.workspace_bytes = forward.workspace_bytes = bytes;
    printf("%.0f MiB saved, %.0f MiB workspace; ", (double)saved_bytes / 1048576, (double)bytes / 1048576);

    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    FSA(fsa_forward(c, FSA_BF16, batch, &forward, stream));
    FSA(fsa_backward(c, FSA_BF16, batch, &backward, stream));
    CUDA(cudaStreamSynchronize(stream));
}

int main(void) {
    const FsaConfig c = {
        .q_heads = 4,
        .kv_heads = 2,
        .head_dim = 64,
        .cmp_len = 32,
        .cmp_stride = 16,
        .block = 64,
        .topk = 6,
        .init_blocks = 1,
        .local_blocks = 2,
        .window = 128,
        .phi = FSA_PHI_LINEAR,
    };
    const FsaDeviceBatch batch = make_batch();

    // q, k (before RoPE), v and the gate logits are columns of one matrix, as one matmul writes them. Its
    // rows are padded to a multiple of 8 elements.
    const int64_t n = batch.num_queries, q_row = c.q_heads * c.head_dim, kv_row = c.kv_heads * c.head_dim;
    const int64_t columns[4] = {0, q_row, q_row + kv_row, q_row + 2 * kv_row};
    const int64_t stride = (columns[3] + 3 * c.q_heads + 7) / 8 * 8;
    bf16 *qkv = (bf16 *)random_values(n * stride, 2),
         *dqkv = (bf16 *)zeros((size_t)(n * stride) * sizeof *dqkv);
    bf16 *o = (bf16 *)device((size_t)(n * q_row) * sizeof *o);
    forward_backward(&c, &batch, qkv, dqkv, columns, stride, o);

    // o is linear in v, and dout = o, so <v, dv> = <o, o>.
    double left = dot(qkv + columns[2], stride, dqkv + columns[2], stride, n, kv_row);
    double right = dot(o, q_row, o, q_row, n, q_row);
    printf("<v, dv> = %.1f, <o, o> = %.1f\n", left, right);
    if (!(fabs(left - right) < 0.01 * right)) {
        fprintf(stderr, "error: <v, dv> and <o, o> differ by 1%% or more\n");
        return 1;
    }
    printf("example: 1 passed, 0 failed\n");
    return 0; // the end of the process frees all memory
}
