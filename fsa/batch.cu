// batch.cu: prefix sums over the segments and sequences of a batch.
#include "batch.cuh"
#include <stdlib.h>
#include <string.h>

// One block: thread t sums a contiguous share of the entries, the shares are summed by one thread,
// and each thread writes its share's prefix. Reads and writes a few words a sequence; latency binds.
template <typename Count> __device__ void prefix(int64_t *cu, int64_t count, Count length) {
    __shared__ int64_t shares[256];
    int64_t share = (count + 255) / 256, begin = threadIdx.x * share;
    int64_t end = begin + share < count ? begin + share : count, sum = 0;
    for (int64_t i = begin; i < end; i++) sum += length(i);
    shares[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        int64_t total = 0;
        for (int t = 0; t < 256; t++) {
            int64_t s = shares[t];
            shares[t] = total;
            total += s;
        }
        cu[count] = total;
    }
    __syncthreads();
    sum = shares[threadIdx.x];
    for (int64_t i = begin; i < end; i++) {
        cu[i] = sum;
        sum += length(i);
    }
    __syncthreads();
}

__global__ void __launch_bounds__(256) batch_layout_kernel(BatchLayout p, int cmp_len, int cmp_stride, int block) {
    const FsaSegment *segments = p.segments;
    const int64_t *cu = p.cu_seqlens;
    prefix(p.cu_queries, p.num_segments, [=](int64_t i) { return segments[i].len; });
    prefix(p.cu_tiles, p.num_segments,
           [=](int64_t i) { return (segments[i].len + FSA_TILE_TOKENS - 1) / FSA_TILE_TOKENS; });
    prefix(p.cu_windows, p.num_seqs,
           [=](int64_t i) { return num_windows_of(cmp_len, cmp_stride, cu[i + 1] - cu[i]); });
    prefix(p.cu_blocks, p.num_seqs, [=](int64_t i) { return (cu[i + 1] - cu[i] + block - 1) / block; });
}

int fsa_batch_layout(BatchLayout *p, const FsaConfig *c, int64_t nq, int64_t n, int64_t num_seqs, int64_t num_segments,
             int64_t max_len, const int64_t *cu_seqlens, const FsaSegment *segments, void *memory,
             cudaStream_t stream) {
    int64_t *at = (int64_t *)memory;
    *p = BatchLayout{nq, n, num_seqs, num_segments, max_len, cu_seqlens, segments, at, at, at, at};
    p->cu_tiles = p->cu_queries + num_segments + 1;
    p->cu_windows = p->cu_tiles + num_segments + 1;
    p->cu_blocks = p->cu_windows + num_seqs + 1;
    batch_layout_kernel<<<1, 256, 0, stream>>>(*p, c->cmp_len, c->cmp_stride, c->block);
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

bool fsa_use_sm90() {
    static const char *kernels = getenv("FSA_KERNELS");
    if (kernels && strcmp(kernels, "portable") == 0) return false;
    int device = 0, major = 0, minor = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
           major == 9 && minor == 0;
}
