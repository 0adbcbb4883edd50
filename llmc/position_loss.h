// position_loss.h: the loss by position in the document. A model that makes use of a long context has a lower
// loss at later positions.
//
// The position of a prediction is the number of tokens of its document before its input token, as far as the
// sample has them: 0 for the first token of a document or of a sample. With -doc-mask 0 the model sees the
// whole sample, so positions count from there. Bucket 0 has positions 0 to 127, bucket 1 128 to 255, bucket 2
// 256 to 511, and so on.
#ifndef LLMC_POSITION_LOSS_H
#define LLMC_POSITION_LOSS_H
#include "utils.h"

enum { POSITION_FIRST = 128, POSITION_BUCKETS = 24 };

typedef struct {
    double loss_sum[POSITION_BUCKETS];
    int64_t tokens[POSITION_BUCKETS];
} PositionLoss;

// Returns the first position of a bucket.
static inline int64_t position_bucket_start(int bucket) {
    return bucket == 0 ? 0 : (int64_t)POSITION_FIRST << (bucket - 1);
}

// Adds the losses of tokens [begin, end) of a batch. losses [n]; cu_seqlens [num_seqs + 1] of the batch.
static inline void position_loss_add(PositionLoss *p, const float *losses, const int64_t *cu_seqlens,
                                     int64_t num_seqs, int64_t begin, int64_t end) {
    for (int64_t s = 0; s < num_seqs; s++) {
        int bucket = 0;
        if (cu_seqlens[s + 1] <= begin || cu_seqlens[s] >= end) continue;
        for (int64_t t = cu_seqlens[s]; t < cu_seqlens[s + 1]; t++) {
            if (bucket + 1 < POSITION_BUCKETS && t - cu_seqlens[s] == position_bucket_start(bucket + 1))
                bucket++;
            if (t < begin || t >= end) continue;
            p->loss_sum[bucket] += losses[t];
            p->tokens[bucket]++;
        }
    }
}

// Adds the sums and counts of another process.
static inline void position_loss_sum(PositionLoss *p, const PositionLoss *other) {
    for (int i = 0; i < POSITION_BUCKETS; i++)
        p->loss_sum[i] += other->loss_sum[i], p->tokens[i] += other->tokens[i];
}
#endif
