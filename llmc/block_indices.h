// block_indices.h: a file with the block indices of a model's queries. The GPU trainer writes it
// (-block-indices FILE) and dev/cuda/selected reads it (indices=FILE). The format, little-endian:
//   char magic[8]; int64 layers, q_heads, kv_heads, num_queries, topk, block, num_seqs
//   int64 lengths[num_seqs]                               tokens of each sequence
//   int32 indices[layers][kv_heads][num_queries][topk]    ascending, -1 behind the last one, as in fsa.h;
//                                                         all -1 in a layer of full attention (-full-every)
#ifndef LLMC_BLOCK_INDICES_H
#define LLMC_BLOCK_INDICES_H
#include "utils.h"

typedef struct {
    char magic[8]; // block_indices_magic
    int64_t layers, q_heads, kv_heads, num_queries, topk, block, num_seqs;
} BlockIndicesHeader;
// "nsachose" is kept for old files.
static const char block_indices_magic[8] = {'n', 's', 'a', 'c', 'h', 'o', 's', 'e'};

// Returns the number of indices in the file.
static inline int64_t block_indices_count(const BlockIndicesHeader *h) {
    return h->layers * h->kv_heads * h->num_queries * h->topk;
}

// Writes the file atomically; dies if it cannot. lengths [num_seqs], indices [layers, kv_heads, num_queries,
// topk].
static inline void block_indices_write(const char *path, const BlockIndicesHeader *h, const int64_t *lengths,
                                       const int32_t *indices) {
    AtomicFile file;
    atomic_open(&file, path);
    atomic_write(&file, h, sizeof *h);
    atomic_write(&file, lengths, (size_t)h->num_seqs * sizeof *lengths);
    atomic_write(&file, indices, (size_t)block_indices_count(h) * sizeof *indices);
    atomic_commit(&file);
}

// Returns whether a file of so many bytes can have this header: positive sizes, which make up the file.
static inline int block_indices_fit(const BlockIndicesHeader *h, int64_t bytes) {
    const int64_t sizes[] = {h->layers, h->q_heads, h->kv_heads, h->num_queries,
                             h->topk,   h->block,   h->num_seqs};
    for (int i = 0; i < (int)(sizeof sizes / sizeof *sizes); i++)
        if (sizes[i] < 1) return 0;
    const double indices = (double)h->layers * (double)h->kv_heads * (double)h->num_queries * (double)h->topk;
    return (double)sizeof *h + 8 * (double)h->num_seqs + 4 * indices == (double)bytes;
}

// Reads a file into *h and two new arrays, which the caller frees; dies if the file is invalid.
static inline void block_indices_read(const char *path, BlockIndicesHeader *h, int64_t **lengths,
                                      int32_t **indices) {
    FILE *f = fopen(path, "rb");
    if (f == NULL) die("cannot read %s: %s; check the path", path, strerror(errno));
    if (fread(h, sizeof *h, 1, f) != 1 || memcmp(h->magic, block_indices_magic, sizeof h->magic) != 0)
        die("%s: not a file of block indices; write one with train_gpt_nsa -val 1 -block-indices FILE", path);
    struct stat st;
    if (fstat(fileno(f), &st) != 0 || !block_indices_fit(h, st.st_size))
        die("%s: truncated, or not as its header says; write it again", path);
    *lengths = (int64_t *)xmalloc((size_t)h->num_seqs * sizeof **lengths);
    *indices = (int32_t *)xmalloc((size_t)block_indices_count(h) * sizeof **indices);
    if (fread(*lengths, sizeof **lengths, (size_t)h->num_seqs, f) != (size_t)h->num_seqs ||
        fread(*indices, sizeof **indices, (size_t)block_indices_count(h), f) !=
            (size_t)block_indices_count(h))
        die("cannot read %s: %s; write it again", path, strerror(errno));
    fclose(f);
}
#endif
