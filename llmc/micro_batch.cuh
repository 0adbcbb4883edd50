// micro_batch.cuh: a micro-batch of packed sequences, on the host or on the GPU. With context parallel
// (context_parallel.h) it has this GPU's tokens of them.
#ifndef LLMC_MICRO_BATCH_CUH
#define LLMC_MICRO_BATCH_CUH
#include "cuda_common.cuh"
#include "context_parallel.h"
#include "nccl.cuh"
#include <algorithm>
#include <vector>

// The arrays are contiguous in memory, so that one copy transfers them to the GPU.
typedef struct {
    int64_t n, num_keys; // tokens on this GPU, and of the whole sequences
    int64_t num_seqs, num_segments, num_chunks;
    int32_t *tokens, *targets; // [n]
    int64_t *cu_seqlens;       // [num_seqs + 1] of the whole sequences
    FsaSegment *segments;      // [num_segments] of the tokens on this GPU
    int32_t *chunk_perm;       // [num_chunks] (context_parallel.h)
} Batch;

// Returns the counts of n tokens in whole sequences on one GPU: one segment per sequence, one chunk.
static Batch batch_unsharded(int64_t n, int64_t num_seqs) {
    Batch b = {n, n, num_seqs, num_seqs, 1, NULL, NULL, NULL, NULL, NULL};
    return b;
}

// Returns an upper bound of every count of batches with at most n tokens on this GPU, and num_keys tokens in
// their whole sequences.
static Batch batch_max(int64_t n, int64_t num_keys, const Gpus *gpus) {
    Batch b = batch_unsharded(n, num_keys);
    b.num_keys = num_keys;
    b.num_segments = n;
    b.num_chunks = gpus ? 32 * gpus->cp_size : 1;
    return b;
}

// Returns the bytes of a batch's arrays.
static size_t batch_bytes(const Batch *b) {
    return (size_t)(2 * b->n * sizeof(int32_t) + (b->num_seqs + 1) * sizeof(int64_t) +
                    b->num_segments * sizeof(FsaSegment) + b->num_chunks * sizeof(int32_t));
}

// Returns a batch with these counts and its arrays in `memory`, those with 8-byte elements first.
static Batch batch_bind(const Batch *counts, char *memory) {
    Batch b = *counts;
    b.cu_seqlens = (int64_t *)memory;
    b.segments = (FsaSegment *)(b.cu_seqlens + b.num_seqs + 1);
    b.tokens = (int32_t *)(b.segments + b.num_segments);
    b.targets = b.tokens + b.n;
    b.chunk_perm = b.targets + b.n;
    return b;
}

// Writes this GPU's part of a micro-batch to `memory` on the host: the whole sequences, or with context
// parallel its chunks of them. tokens, targets [n], cu_seqlens [num_seqs + 1]. Returns the batch, whose
// arrays are in `memory`.
static Batch batch_fill(const ModelConfig *c, const Gpus *gpus, const int32_t *tokens, const int32_t *targets,
                        const int64_t *cu_seqlens, int64_t num_seqs, char *memory) {
    const int ranks = gpus ? gpus->cp_size : 1, rank = gpus ? gpus->cp_rank : 0;
    const int64_t keys = cu_seqlens[num_seqs], chunks = cp_num_chunks(keys, num_seqs, ranks);
    std::vector<int32_t> chunk_perm(chunks);
    std::vector<FsaSegment> segments(num_seqs + chunks / ranks);
    cp_assign_chunks(c, cu_seqlens, num_seqs, ranks, chunks, chunk_perm.data(), NULL);
    Batch counts = batch_unsharded(keys / ranks, num_seqs);
    counts.num_keys = keys, counts.num_chunks = chunks;
    counts.num_segments =
        cp_segments(cu_seqlens, num_seqs, ranks, chunks, chunk_perm.data(), rank, segments.data());
    Batch b = batch_bind(&counts, memory);
    memcpy(b.cu_seqlens, cu_seqlens, (num_seqs + 1) * sizeof(int64_t));
    memcpy(b.segments, segments.data(), b.num_segments * sizeof(FsaSegment));
    memcpy(b.chunk_perm, chunk_perm.data(), chunks * sizeof(int32_t));
    cp_gather_rows(ranks, keys, chunks, b.chunk_perm, rank, b.tokens, tokens, sizeof(int32_t));
    cp_gather_rows(ranks, keys, chunks, b.chunk_perm, rank, b.targets, targets, sizeof(int32_t));
    return b;
}

// Copies a batch from the host to `memory` on the GPU, in the order of `stream`. Returns the batch there.
static Batch batch_upload(const Batch *host, char *memory, cudaStream_t stream) {
    Batch b = batch_bind(host, memory);
    cuda_check(cudaMemcpyAsync(memory, host->cu_seqlens, batch_bytes(&b), cudaMemcpyHostToDevice, stream));
    return b;
}

// Converts a batch to fsa.h's struct.
static FsaDeviceBatch fsa_device_batch(const Batch *b) {
    FsaDeviceBatch f = {b->n, b->num_keys, b->num_seqs, b->num_segments, b->cu_seqlens, b->segments};
    return f;
}

// Returns whether other GPUs hold some of the batch's keys (context parallel).
static bool kv_is_sharded(const Batch *b) {
    return b->num_keys > b->n;
}

// Permutes rows [num_keys] of 4 bytes, on the host, from rank order to sequence order. b: of batch_fill.
static void batch_to_sequence_order(const Batch *b, void *rows) {
    const std::vector<int32_t> rank_ordered((int32_t *)rows, (int32_t *)rows + b->num_keys);
    cp_scatter_rows(b->num_keys, b->num_chunks, b->chunk_perm, rows, rank_ordered.data(), sizeof(int32_t));
}

// The memory of batches.
typedef struct {
    size_t bytes;  // of the arrays of the largest Batch
    char *eval;    // [bytes] for validation and sampling
    char *feed[2]; // [bytes] for training
} BatchBuffers;

// Assigns the memory of batches of at most max_batch's counts.
static void batch_buffers_memory_layout(BatchBuffers *b, const Batch *max_batch, int training, Arena *arena) {
    b->bytes = batch_bytes(max_batch);
    arena_alloc(arena, &b->eval, (int64_t)b->bytes);
    for (int i = 0; i < 2 && training; i++) arena_alloc(arena, &b->feed[i], (int64_t)b->bytes);
}
#endif
