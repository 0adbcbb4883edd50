// embedding.cuh: gathers the rows of a table by token, and computes the table's gradient without atomics.
#ifndef LLMC_EMBEDDING_CUH
#define LLMC_EMBEDDING_CUH
#include "cuda_common.cuh"

// Each thread block copies one token's row of c elements. Memory-bound. It reads and writes 2*c bytes per
// token: 64K tokens of c = 4096 move 1.07 GB, which takes 0.24 ms at 4.5 TB/s. Rows of frequent tokens come
// from L2.
static __global__ void __launch_bounds__(256)
    embedding_forward_kernel(floatX *out, const int32_t *tokens, const floatX *table, int c) {
    const floatX *src = table + (int64_t)tokens[blockIdx.x] * c;
    floatX *dst = out + (int64_t)blockIdx.x * c;
    for (int i = threadIdx.x * PACK; i < c; i += blockDim.x * PACK) store16(dst + i, load16(src + i));
}

// out[i] = table[tokens[i]]: out [n, c], tokens [n], table [vocab, c]; c is a multiple of PACK.
static inline void embedding_forward(floatX *out, const int32_t *tokens, const floatX *table, int64_t n,
                                     int c, cudaStream_t stream) {
    if (n == 0) return;
    check_packs("embedding", c);
    int threads = min((c / PACK + 31) / 32 * 32, 256);
    embedding_forward_kernel<<<(unsigned)n, threads, 0, stream>>>(out, tokens, table, c);
    cuda_check(cudaGetLastError());
}

// ---- backward --------------------------------------------------------------------------------------------
// A stable radix sort orders the positions 0..n-1 by token, 8 bits per pass. Then the rows of dout are summed
// in the sorted order. All orders are fixed, so the result is bitwise reproducible.
enum {
    EMBEDDING_TILE = 2048, // positions that a thread block sorts
    EMBEDDING_SPAN = 128   // sorted positions that a warp sums
};

// counts [tiles, 256]: the histogram of each tile's digits. order [n] holds the positions as sorted so far;
// NULL means 0, 1, 2, ... Each thread counts one digit, without atomics. Limited by the 2048 reads of shared
// memory of each thread.
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

// Replaces counts by offsets, an exclusive prefix sum over (digit, tile): the sorted index of the tile's
// first position with that digit. One thread block, one thread per digit; limited by latency.
static __global__ void __launch_bounds__(256) embedding_scan_kernel(int32_t *counts, int tiles) {
    __shared__ int32_t totals[256];
    int32_t total = 0;
#pragma unroll 8
    for (int t = 0; t < tiles; t++) total += counts[(int64_t)t * 256 + threadIdx.x];
    totals[threadIdx.x] = total;
    __syncthreads();
    int32_t offset = 0;
    for (int i = 0; i < (int)threadIdx.x; i++) offset += totals[i];
#pragma unroll 8
    for (int t = 0; t < tiles; t++) {
        int32_t count = counts[(int64_t)t * 256 + threadIdx.x];
        counts[(int64_t)t * 256 + threadIdx.x] = offset;
        offset += count;
    }
}

// Scatters each tile's positions to their sorted places; each thread moves those of one digit, in order.
static __global__ void __launch_bounds__(256)
    embedding_scatter_kernel(int32_t *sorted, const int32_t *offsets, const int32_t *tokens,
                             const int32_t *order, int n, int shift) {
    __shared__ uint8_t digits[EMBEDDING_TILE];
    __shared__ int32_t positions[EMBEDDING_TILE];
    int first = blockIdx.x * EMBEDDING_TILE, size = min(n - first, (int)EMBEDDING_TILE);
    for (int i = threadIdx.x; i < size; i += 256) {
        positions[i] = order ? order[first + i] : first + i;
        digits[i] = (uint8_t)(tokens[positions[i]] >> shift);
    }
    __syncthreads();
    int32_t offset = offsets[(int64_t)blockIdx.x * 256 + threadIdx.x];
    for (int i = 0; i < size; i++) {
        if (digits[i] == threadIdx.x) sorted[offset++] = positions[i];
    }
}

// Each warp sums 32 packs of channels over a span of EMBEDDING_SPAN sorted positions, so that frequent and
// rare tokens cost the same. The sum of a token whose positions all lie in the span is added to dtable. The
// sum of a token that also occurs in the span before goes to head[span] [c]; else, the sum of a token that
// also occurs in the span after goes to tail[span] [c]. Memory-bound. It reads 2*c bytes per position, and
// reads and writes 8*c bytes per distinct token: 64K tokens of c = 4096, 15K of them distinct, move 1.03 GB,
// which takes 0.23 ms at 4.5 TB/s.
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
    int token = -1; // whose rows `sum` adds up
    float sum[PACK] = {};
    for (int i = first; i <= last; i += 32) { // one step past the end flushes the last sum
        int position = i + lane < last ? sorted[i + lane] : 0;
        int next = i + lane < last ? tokens[position] : -1;
        for (int j = 0; j < 32; j += 8) {
            uint4 rows[8];
            int row_tokens[8];
#pragma unroll
            for (int k = 0; k < 8; k++) { // eight loads in flight
                int64_t row = __shfl_sync(0xffffffffu, position, j + k);
                row_tokens[k] = __shfl_sync(0xffffffffu, next, j + k);
                if (valid && row_tokens[k] >= 0) rows[k] = load16(dout + row * c + channel);
            }
#pragma unroll
            for (int k = 0; k < 8; k++) {
                if (row_tokens[k] != token && token >= 0) {
                    float *partial = token == before  ? head + span * c
                                     : token == after ? tail + span * c
                                                      : NULL;
                    if (valid && partial) {
                        for (int x = 0; x < PACK; x += 4)
                            *(float4 *)(partial + channel + x) =
                                make_float4(sum[x], sum[x + 1], sum[x + 2], sum[x + 3]);
                    } else if (valid) {
                        add_pack(dtable + (int64_t)token * c + channel, sum);
                    }
                    for (int x = 0; x < PACK; x++) sum[x] = 0;
                }
                token = row_tokens[k];
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

// Adds to dtable the tokens that occur in several spans. Each thread block takes 256 channels of the last
// token of span blockIdx.x, if the token begins in that span and continues after it. It adds the span's tail
// and the heads of the following spans in order. Reads 4*c bytes per span; limited by latency.
static __global__ void __launch_bounds__(256)
    embedding_combine_kernel(float *dtable, const float *head, const float *tail, const int32_t *sorted,
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

// The backward pass's scratch.
typedef struct {
    int32_t *order[2], *counts; // [n] each; [tiles, 256]
    float *head, *tail;         // [spans, c]
} EmbeddingScratch;
// Lays s out in `memory`, or only counts bytes if it is NULL. Returns the bytes.
static inline size_t embedding_scratch_layout(EmbeddingScratch *s, int64_t n, int c, void *memory) {
    size_t positions = (size_t)(n + 63) / 64 * 64 * sizeof(int32_t);
    size_t tiles = (size_t)(n + EMBEDDING_TILE - 1) / EMBEDDING_TILE;
    size_t spans = (size_t)(n + EMBEDDING_SPAN - 1) / EMBEDDING_SPAN;
    uintptr_t p = (uintptr_t)memory;
    s->order[0] = (int32_t *)p, p += positions;
    s->order[1] = (int32_t *)p, p += positions;
    s->counts = (int32_t *)p, p += tiles * 256 * sizeof(int32_t);
    s->head = (float *)p, p += spans * c * sizeof(float);
    s->tail = (float *)p, p += spans * c * sizeof(float);
    return p - (uintptr_t)memory;
}
// Returns the bytes of scratch that embedding_backward needs.
static inline size_t embedding_backward_scratch(int64_t n, int c) {
    EmbeddingScratch s;
    return embedding_scratch_layout(&s, n, c, NULL);
}

// dtable[tokens[i]] += dout[i]: dtable [vocab, c] fp32, tokens [n], all below vocab, dout [n, c]; c is a
// multiple of PACK. scratch has embedding_backward_scratch bytes.
static inline void embedding_backward(float *dtable, const int32_t *tokens, const floatX *dout, int64_t n,
                                      int c, int64_t vocab, void *scratch, cudaStream_t stream) {
    if (n == 0) return;
    check_packs("embedding", c);
    if (n > INT_MAX - EMBEDDING_TILE)
        die("embedding: %lld tokens in a micro-batch: must be at most 2^31 - 2049; lower -b or -t",
            (long long)n);
    EmbeddingScratch s;
    embedding_scratch_layout(&s, n, c, scratch);
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
    dim3 combine_grid((unsigned)spans - 1, (unsigned)(c + 255) / 256);
    embedding_combine_kernel<<<combine_grid, 256, 0, stream>>>(dtable, s.head, s.tail, order, tokens, (int)n,
                                                               c);
    cuda_check(cudaGetLastError());
}
#endif
