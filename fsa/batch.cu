// batch.cu: prefix sums over the segments and sequences of a batch.
#include "batch.cuh"
#include "launch.cuh"

// cu[i] = sum of length(j) for j < i, i = 0 .. count. One thread block of 256 threads: each thread sums a
// contiguous chunk, one thread scans the chunks' sums, and each thread writes the prefix sums of its chunk.
// A few words per sequence are read and written. The kernel is limited by latency.
template <typename Length> __device__ void exclusive_scan(int64_t *cu, int64_t count, Length length) {
    __shared__ int64_t chunk_sums[256];
    int64_t chunk = (count + 255) / 256, begin = threadIdx.x * chunk;
    int64_t end = begin + chunk < count ? begin + chunk : count, sum = 0;
    for (int64_t i = begin; i < end; i++) sum += length(i);
    chunk_sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        int64_t total = 0;
        for (int t = 0; t < 256; t++) {
            int64_t s = chunk_sums[t];
            chunk_sums[t] = total;
            total += s;
        }
        cu[count] = total;
    }
    __syncthreads();
    sum = chunk_sums[threadIdx.x];
    for (int64_t i = begin; i < end; i++) {
        cu[i] = sum;
        sum += length(i);
    }
    __syncthreads();
}

__global__ void __launch_bounds__(256)
    batch_layout_kernel(BatchLayout batch, int cmp_len, int cmp_stride, int block) {
    const FsaSegment *segments = batch.segments;
    const int64_t *cu = batch.cu_seqlens;
    exclusive_scan(batch.cu_queries, batch.num_segments, [=](int64_t i) { return segments[i].len; });
    exclusive_scan(batch.cu_windows, batch.num_seqs,
                   [=](int64_t i) { return num_windows_of(cmp_len, cmp_stride, cu[i + 1] - cu[i]); });
    exclusive_scan(batch.cu_blocks, batch.num_seqs,
                   [=](int64_t i) { return (cu[i + 1] - cu[i] + block - 1) / block; });
}

int fsa_batch_layout(BatchLayout *batch, const FsaConfig *c, const FsaDeviceBatch *b, void *memory,
                     cudaStream_t stream) {
    int64_t *const cu_queries = (int64_t *)memory, *const cu_windows = cu_queries + b->num_segments + 1,
                   *const cu_blocks = cu_windows + b->num_seqs + 1;
    *batch = BatchLayout{b->num_queries, b->num_keys, b->num_seqs, b->num_segments, b->cu_seqlens,
                         b->segments,    cu_queries,  cu_windows,  cu_blocks};
    return LAUNCH(batch_layout_kernel, 1, 256, 0, stream, *batch, c->cmp_len, c->cmp_stride, c->block);
}
