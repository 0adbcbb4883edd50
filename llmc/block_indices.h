// choice.h: a file of the blocks that a model's queries chose, which the GPU trainer writes (-choice) and
// dev/cuda/selected times. All numbers are little-endian, in this order:
//   char magic[8]; int64 layers, q_heads, kv_heads, num_queries, topk, block, num_seqs
//   int64 lengths[num_seqs]                               tokens of each sequence
//   int32 indices[layers][kv_heads][num_queries][topk]    as fsa.h has them: ascending, -1 where there is none
#ifndef LLMC_CHOICE_H
#define LLMC_CHOICE_H
#include "utils.h"

typedef struct {
    char magic[8]; // choice_magic
    int64_t layers, q_heads, kv_heads, num_queries, topk, block, num_seqs;
} ChoiceHeader;
static const char choice_magic[8] = {'n', 's', 'a', 'c', 'h', 'o', 's', 'e'};

static inline int64_t choice_size(const ChoiceHeader *h) {
    return h->layers * h->kv_heads * h->num_queries * h->topk;
}

static inline void choice_write(const char *path, const ChoiceHeader *h, const int64_t *lengths,
                                const int32_t *indices) {
    AtomicFile file;
    atomic_open(&file, path);
    atomic_write(&file, h, sizeof *h);
    atomic_write(&file, lengths, (size_t)h->num_seqs * sizeof *lengths);
    atomic_write(&file, indices, (size_t)choice_size(h) * sizeof *indices);
    atomic_commit(&file);
}

// The caller frees both arrays.
static inline void choice_read(const char *path, ChoiceHeader *h, int64_t **lengths, int32_t **indices) {
    FILE *f = fopen(path, "rb");
    if (f == NULL) die("cannot read %s: %s", path, strerror(errno));
    if (fread(h, sizeof *h, 1, f) != 1 || memcmp(h->magic, choice_magic, sizeof h->magic) != 0)
        die("%s: not a file of chosen blocks, which -choice of the trainer writes", path);
    *lengths = (int64_t *)xmalloc((size_t)h->num_seqs * sizeof **lengths);
    *indices = (int32_t *)xmalloc((size_t)choice_size(h) * sizeof **indices);
    if (fread(*lengths, sizeof **lengths, (size_t)h->num_seqs, f) != (size_t)h->num_seqs ||
        fread(*indices, sizeof **indices, (size_t)choice_size(h), f) != (size_t)choice_size(h))
        die("%s: ends early, write it again", path);
    fclose(f);
}
#endif
