// block_indices.h: generates random block indices on the GPU, for timings of one long sequence.
#ifndef DEV_CUDA_BLOCK_INDICES_H
#define DEV_CUDA_BLOCK_INDICES_H
#include "common.h"

// Writes block_indices [Hkv, nq, T] of one sequence of nq tokens. One thread handles one (kv head, query): it
// selects the initial and local blocks and then distinct random blocks, ascending, -1 behind the last one.
// clustered 1: the random blocks of 64 neighbouring queries come from the same 4*T neighbouring blocks.
__global__ void random_block_indices_kernel(int32_t *block_indices, int64_t nq, FsaConfig c, uint64_t seed,
                                            int clustered) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= nq * c.kv_heads) return;
    int64_t pos = i % nq;
    int32_t *out = block_indices + i * c.topk;
    int blocks = (int)(pos / c.block + 1), want = min(blocks, c.topk), count = 0;
    uint64_t s = seed + (uint64_t)i * 1000003, shared = seed + (uint64_t)(i / 64) * 7919;
    auto next = [](uint64_t *state) {
        uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    };
    auto insert = [&](int j) {
        int at = count;
        while (at > 0 && out[at - 1] > j) at--;
        if (at > 0 && out[at - 1] == j) return;
        for (int k = count++; k > at; k--) out[k] = out[k - 1];
        out[at] = j;
    };
    if (blocks <= c.topk) {
        for (int j = 0; j < want; j++) insert(j);
    } else {
        for (int j = 0; j < c.init_blocks; j++) insert(j);
        for (int j = 0; j < c.local_blocks; j++) insert(blocks - 1 - j);
        int span = clustered ? min(blocks, 4 * c.topk) : blocks;
        int base = (int)(next(&shared) % (uint64_t)(blocks - span + 1));
        while (count < want) insert(base + (int)(next(&s) % (uint64_t)span));
    }
    for (int j = count; j < c.topk; j++) out[j] = -1;
}
// Launches random_block_indices_kernel on the default stream.
static inline void random_block_indices_device(int32_t *block_indices, int64_t nq, const FsaConfig &c,
                                               uint64_t seed, bool clustered = false) {
    random_block_indices_kernel<<<(unsigned)((nq * c.kv_heads + 255) / 256), 256>>>(block_indices, nq, c,
                                                                                    seed, clustered);
    CUDA_CHECK(cudaGetLastError());
}
#endif
