// embedding.cuh: rows of a table by token, and the table's gradient without atomics.
#ifndef LLMC_EMBEDDING_CUH
#define LLMC_EMBEDDING_CUH
#include "cuda_common.cuh"

// A block: one token's row, c numbers in packs. Reads and writes 2*c bytes a token (rows of frequent tokens
// come from L2). 64K tokens, c = 4096: 1.07 GB, 0.24 ms at 4.5 TB/s; memory binds.
static __global__ void __launch_bounds__(256)
    embedding_forward_kernel(floatX *out, const int32_t *tokens, const floatX *table, int c) {
    const floatX *from = table + (int64_t)tokens[blockIdx.x] * c;
    floatX *to = out + (int64_t)blockIdx.x * c;
    for (int i = threadIdx.x * PACK; i < c; i += blockDim.x * PACK) store16(to + i, load16(from + i));
}

// out [n, c], out[i] = table[tokens[i]].
static inline void embedding_forward(floatX *out, const int32_t *tokens, const floatX *table, int64_t n,
                                     int c, cudaStream_t stream) {
    if (n == 0) return;
    check_packs("embedding", c);
    int threads = min((c / PACK + 31) / 32 * 32, 256);
    embedding_forward_kernel<<<(unsigned)n, threads, 0, stream>>>(out, tokens, table, c);
    cuda_check(cudaGetLastError());
}

// ---- backward --------------------------------------------------------------------------------------------
// Positions 0..n-1 are sorted by token, those of a token staying in order (a radix sort, 8 bits a pass); then
// dout's rows are added up along that order. All orders are fixed, so the result's bits are.
enum {
    EMBEDDING_TILE = 2048, // positions that a block sorts
    EMBEDDING_SPAN = 128   // sorted positions that a warp adds up
};

// counts[tile] [256]: how often each digit occurs among the tile's tokens. order NULL: 0, 1, 2, ...
// A thread counts its own digit, so nothing is atomic; its 2048 reads of shared memory bind.
static __global__ void __launch_bounds__(256)
    embedding_count_kernel(int32_t *counts, const int32_t *tokens, const int32_t *order, int n, int shift) {
    __shared__ uint8_t digits[EMBEDDING_TILE];
    int first = blockIdx.x * EMBEDDING_TILE, size = min(n - first, (int)EMBEDDING_TILE), count = 0;
    for (int i = threadIdx.x; i < size; i += 256)
        digits[i] = (uint8_t)(tokens[order ? order[first + i] : first + i] >> shift);
    __syncthreads();
    for (int i = 0; i < size; i++) count += digits[i] == threadIdx.x;
    counts[(int64_t)blockIdx.x * 256 + threadIdx.x] = count;
}

// counts become the places where each tile's first position of each digit goes: after all smaller digits, and
// the same digit's of earlier tiles. One block, a thread a digit; latency binds.
static __global__ void __launch_bounds__(256) embedding_scan_kernel(int32_t *counts, int tiles) {
    __shared__ int32_t totals[256];
    int32_t total = 0;
#pragma unroll 8
    for (int t = 0; t < tiles; t++) total += counts[(int64_t)t * 256 + threadIdx.x];
    totals[threadIdx.x] = total;
    __syncthreads();
    int32_t at = 0;
    for (int i = 0; i < (int)threadIdx.x; i++) at += totals[i];
#pragma unroll 8
    for (int t = 0; t < tiles; t++) {
        int32_t count = counts[(int64_t)t * 256 + threadIdx.x];
        counts[(int64_t)t * 256 + threadIdx.x] = at;
        at += count;
    }
}

// A thread moves the tile's positions of its own digit, in order.
static __global__ void __launch_bounds__(256)
    embedding_scatter_kernel(int32_t *sorted, const int32_t *places, const int32_t *tokens,
                             const int32_t *order, int n, int shift) {
    __shared__ uint8_t digits[EMBEDDING_TILE];
    __shared__ int32_t positions[EMBEDDING_TILE];
    int first = blockIdx.x * EMBEDDING_TILE, size = min(n - first, (int)EMBEDDING_TILE);
    for (int i = threadIdx.x; i < size; i += 256) {
        positions[i] = order ? order[first + i] : first + i;
        digits[i] = (uint8_t)(tokens[positions[i]] >> shift);
    }
    __syncthreads();
    int32_t at = places[(int64_t)blockIdx.x * 256 + threadIdx.x];
    for (int i = 0; i < size; i++) {
        if (digits[i] == threadIdx.x) sorted[at++] = positions[i];
    }
}

// A warp: 32 packs of channels of EMBEDDING_SPAN sorted positions, so that frequent and rare tokens cost the
// same. Sums of tokens whose positions all lie within the span are added to dtable. What belongs to a token
// that began before it goes to head[span] [c], to one that goes on after it to tail[span] [c] (if both, to
// head). Reads 2*c bytes a position; reads and writes 8*c bytes a distinct token. 64K tokens of 15K kinds,
// c = 4096: 1.03 GB, 0.23 ms at 4.5 TB/s; memory binds.
static __global__ void __launch_bounds__(256)
    embedding_sum_kernel(float *dtable, float *head, float *tail, const int32_t *sorted,
                         const int32_t *tokens, const floatX *dout, int n, int c) {
    int lane = threadIdx.x % 32;
    int64_t span = blockIdx.x * 8ll + threadIdx.x / 32;
    int first = (int)(span * EMBEDDING_SPAN), last = min(first + (int)EMBEDDING_SPAN, n);
    if (span * EMBEDDING_SPAN >= n) return;
    int channel = (blockIdx.y * 32 + lane) * PACK;
    bool valid = channel < c;
    int before = first > 0 ? tokens[sorted[first - 1]] : -1, after = last < n ? tokens[sorted[last]] : -1;
    int token = -1; // of the sum
    float sum[PACK] = {};
    for (int i = first; i <= last; i += 32) { // one step past the end, to put away the last sum
        int position = i + lane < last ? sorted[i + lane] : 0;
        int next = i + lane < last ? tokens[position] : -1;
        for (int j = 0; j < 32; j += 8) {
            uint4 rows[8];
            int kinds[8];
#pragma unroll
            for (int k = 0; k < 8; k++) { // eight rows under way at once
                int64_t row = __shfl_sync(0xffffffffu, position, j + k);
                kinds[k] = __shfl_sync(0xffffffffu, next, j + k);
                if (valid && kinds[k] >= 0) rows[k] = load16(dout + row * c + channel);
            }
#pragma unroll
            for (int k = 0; k < 8; k++) {
                if (kinds[k] != token && token >= 0) {
                    float *to = token == before ? head + span * c : token == after ? tail + span * c : NULL;
                    if (valid && to) {
                        for (int x = 0; x < PACK; x += 4)
                            *(float4 *)(to + channel + x) =
                                make_float4(sum[x], sum[x + 1], sum[x + 2], sum[x + 3]);
                    } else if (valid) {
                        add_pack(dtable + (int64_t)token * c + channel, sum);
                    }
                    for (int x = 0; x < PACK; x++) sum[x] = 0;
                }
                token = kinds[k];
                if (valid && token >= 0) {
                    float x[PACK];
                    unpack(x, rows[k]);
                    for (int y = 0; y < PACK; y++) sum[y] += x[y];
                }
            }
            if (token < 0) break;
        }
    }
}

// A block: 256 channels of the token that goes on after span blockIdx.x, if it began there: its tail and the
// heads that follow are added up in order. Reads 4*c bytes a span; latency binds.
static __global__ void __launch_bounds__(256)
    embedding_join_kernel(float *dtable, const float *head, const float *tail, const int32_t *sorted,
                          const int32_t *tokens, int n, int c) {
    int64_t span = blockIdx.x, channel = blockIdx.y * 256ll + threadIdx.x;
    int64_t first = span * EMBEDDING_SPAN, next = first + EMBEDDING_SPAN;
    int token = tokens[sorted[next - 1]];
    if (tokens[sorted[next]] != token || (first > 0 && tokens[sorted[first - 1]] == token)) return;
    if (channel >= c) return;
    float sum = tail[span * c + channel];
    for (; next < n && tokens[sorted[next]] == token; next += EMBEDDING_SPAN)
        sum += head[next / EMBEDDING_SPAN * c + channel];
    dtable[(int64_t)token * c + channel] += sum;
}

// Where the backward pass keeps what it needs for a while; returns the bytes of all.
typedef struct {
    int32_t *order[2], *counts; // [n] each, [tiles, 256]
    float *head, *tail;         // [spans, c]
} EmbeddingScratch;
static inline size_t embedding_place(EmbeddingScratch *s, int64_t n, int c, void *memory) {
    size_t positions = (size_t)(n + 63) / 64 * 64 * sizeof(int32_t);
    size_t tiles = (size_t)(n + EMBEDDING_TILE - 1) / EMBEDDING_TILE;
    size_t spans = (size_t)(n + EMBEDDING_SPAN - 1) / EMBEDDING_SPAN;
    uintptr_t at = (uintptr_t)memory;
    s->order[0] = (int32_t *)at, at += positions;
    s->order[1] = (int32_t *)at, at += positions;
    s->counts = (int32_t *)at, at += tiles * 256 * sizeof(int32_t);
    s->head = (float *)at, at += spans * c * sizeof(float);
    s->tail = (float *)at, at += spans * c * sizeof(float);
    return at - (uintptr_t)memory;
}
static inline size_t embedding_backward_scratch(int64_t n, int c) {
    EmbeddingScratch s;
    return embedding_place(&s, n, c, NULL);
}

// dtable [vocab, c] fp32 += dout [n, c] at tokens [n], all below vocab. scratch: embedding_backward_scratch.
static inline void embedding_backward(float *dtable, const int32_t *tokens, const floatX *dout, int64_t n,
                                      int c, int64_t vocab, void *scratch, cudaStream_t stream) {
    if (n == 0) return;
    check_packs("embedding", c);
    if (n > INT_MAX - EMBEDDING_TILE) die("embedding: %lld tokens, at most 2^31 - 2049", (long long)n);
    EmbeddingScratch s;
    embedding_place(&s, n, c, scratch);
    int tiles = (int)((n + EMBEDDING_TILE - 1) / EMBEDDING_TILE);
    int spans = (int)((n + EMBEDDING_SPAN - 1) / EMBEDDING_SPAN);
    const int32_t *order = NULL;
    for (int shift = 0; shift == 0 || (vocab - 1) >> shift > 0; shift += 8) {
        int32_t *sorted = order == s.order[0] ? s.order[1] : s.order[0];
        embedding_count_kernel<<<tiles, 256, 0, stream>>>(s.counts, tokens, order, (int)n, shift);
        cuda_check(cudaGetLastError());
        embedding_scan_kernel<<<1, 256, 0, stream>>>(s.counts, tiles);
        cuda_check(cudaGetLastError());
        embedding_scatter_kernel<<<tiles, 256, 0, stream>>>(sorted, s.counts, tokens, order, (int)n, shift);
        cuda_check(cudaGetLastError());
        order = sorted;
    }
    dim3 grid((unsigned)(spans + 7) / 8, (unsigned)(c + 32 * PACK - 1) / (32 * PACK));
    embedding_sum_kernel<<<grid, 256, 0, stream>>>(dtable, s.head, s.tail, order, tokens, dout, (int)n, c);
    cuda_check(cudaGetLastError());
    if (spans == 1) return;
    dim3 joins((unsigned)spans - 1, (unsigned)(c + 255) / 256);
    embedding_join_kernel<<<joins, 256, 0, stream>>>(dtable, s.head, s.tail, order, tokens, (int)n, c);
    cuda_check(cudaGetLastError());
}
#endif
