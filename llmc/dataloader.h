// dataloader.h: batches of consecutive tokens from shards, in an order that depends on (seed, epoch) and
// not on the number of GPUs.
//
// A sample is seq_len + 1 consecutive tokens of one shard; samples do not overlap. An epoch goes through
// the shards, permuted by (seed, epoch), and through the samples of each, permuted by (seed, epoch,
// shard). A step takes the next ranks * batch samples of that order, over the end of shards and epochs;
// rank r gets the r-th run of `batch` of them.
#ifndef LLMC_DATALOADER_H
#define LLMC_DATALOADER_H

#include "shard.h"
#include "rand.h"
#include <glob.h>

typedef struct {
    int64_t batch, seq_len, vocab_size;
    int shuffle;
    uint64_t seed;
    int rank, ranks;
    Shard *shards; // [shard_count], in the order of their names; only the current one is open
    int64_t shard_count;
    int64_t tokens;   // in these shards
    int64_t samples;  // an epoch
    int64_t epoch;    // where the next batch begins
    int64_t position; // samples of this epoch already taken, by all ranks together

    int64_t order_epoch;   // the epoch that shard_order and first_sample are for; -1: none
    int64_t *shard_order;  // [shard_count]
    int64_t *first_sample; // [shard_count + 1]: the place in the epoch where each shard of shard_order begins
    int64_t current;       // the place in shard_order of the open shard; -1: none
    int64_t *sample_order; // [samples of the largest shard], for the open shard
    uint32_t *sample;      // [seq_len + 1]
} DataLoader;

static inline int64_t loader_shard_samples(const DataLoader *l, int64_t shard) {
    return l->shards[shard].count / (l->seq_len + 1);
}

// Sets the position that a checkpoint has kept; dies when the data has no such place.
static inline void loader_seek(DataLoader *l, int64_t epoch, int64_t position) {
    if (epoch < 0 || position < 0 || position >= l->samples) {
        die("the data has no sample %lld in epoch %lld: %lld samples found; has the data changed since the "
            "checkpoint?",
            (long long)position, (long long)epoch, (long long)l->samples);
    }
    l->epoch = epoch;
    l->position = position;
}

// Opens all shards that match the glob pattern. Dies when there is none, when one is broken, and when none
// holds a sample; one that alone is too short is skipped with a warning on stderr.
static inline void loader_open(DataLoader *l, const char *pattern, int64_t batch, int64_t seq_len,
                               int64_t vocab_size, int shuffle, uint64_t seed, int rank, int ranks) {
    glob_t found;
    memset(l, 0, sizeof(*l));
    l->batch = batch;
    l->seq_len = seq_len;
    l->vocab_size = vocab_size;
    l->shuffle = shuffle;
    l->seed = seed;
    l->rank = rank;
    l->ranks = ranks;
    l->order_epoch = l->current = -1;
    int error = glob(pattern, 0, NULL, &found);
    if (error == GLOB_NOMATCH) {
        die("no shard matches '%s': check the name, or make data first with data/recall or data/text",
            pattern);
    }
    if (error != 0) die("cannot look for shards '%s'", pattern);

    l->shards = (Shard *)xmalloc(found.gl_pathc * sizeof(Shard));
    int64_t largest = 0, longest = 0;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        Shard *s = &l->shards[l->shard_count];
        shard_open(s, found.gl_pathv[i]);
        shard_close(s);
        int64_t samples = s->count / (seq_len + 1);
        if (s->count > longest) longest = s->count;
        if (samples > largest) largest = samples;
        if (samples == 0) {
            if (rank == 0 && found.gl_pathc > 1) {
                fprintf(stderr, "warning: shard %s is skipped: %lld tokens, a sample has %lld\n", s->path,
                        (long long)s->count, (long long)(seq_len + 1));
            }
            continue;
        }
        l->tokens += s->count;
        l->samples += samples;
        l->shard_count++;
    }
    if (l->shard_count == 0) {
        die("every shard that matches '%s' is too short: a sample has %lld tokens, the longest shard %lld; "
            "choose a shorter sequence or other data",
            pattern, (long long)(seq_len + 1), (long long)longest);
    }
    globfree(&found);
    l->shard_order = (int64_t *)xmalloc((size_t)l->shard_count * sizeof(int64_t));
    l->first_sample = (int64_t *)xmalloc((size_t)(l->shard_count + 1) * sizeof(int64_t));
    l->sample_order = (int64_t *)xmalloc((size_t)largest * sizeof(int64_t));
    l->sample = (uint32_t *)xmalloc((size_t)(seq_len + 1) * sizeof(uint32_t));
}

static inline void loader_close(DataLoader *l) {
    if (l->current >= 0) shard_close(&l->shards[l->shard_order[l->current]]);
    free(l->shards);
    free(l->shard_order);
    free(l->first_sample);
    free(l->sample_order);
    free(l->sample);
    memset(l, 0, sizeof(*l));
}

// Makes the order of an epoch and, within it, of the shard that holds the place `at`.
static inline void loader_enter(DataLoader *l, int64_t epoch, int64_t at) {
    if (l->order_epoch == epoch && l->current >= 0 && at >= l->first_sample[l->current] &&
        at < l->first_sample[l->current + 1]) {
        return;
    }
    if (l->current >= 0) shard_close(&l->shards[l->shard_order[l->current]]);
    uint64_t seed = rng_key(l->seed, (uint64_t)epoch);
    if (l->order_epoch != epoch) {
        for (int64_t i = 0; i < l->shard_count; i++) l->shard_order[i] = i;
        if (l->shuffle) rng_shuffle(l->shard_order, l->shard_count, seed, 0);
        l->first_sample[0] = 0;
        for (int64_t i = 0; i < l->shard_count; i++) {
            l->first_sample[i + 1] = l->first_sample[i] + loader_shard_samples(l, l->shard_order[i]);
        }
        l->order_epoch = epoch;
    }
    int64_t low = 0, high = l->shard_count; // the last shard that begins at or before `at`
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (l->first_sample[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    l->current = low;
    int64_t shard = l->shard_order[low], count = l->shards[shard].count;
    shard_open(&l->shards[shard], l->shards[shard].path);
    if (l->shards[shard].count != count) {
        die("shard %s has changed while in use: %lld tokens before, %lld now", l->shards[shard].path,
            (long long)count, (long long)l->shards[shard].count);
    }
    int64_t samples = loader_shard_samples(l, shard);
    for (int64_t i = 0; i < samples; i++) l->sample_order[i] = i;
    if (l->shuffle) rng_shuffle(l->sample_order, samples, seed, (uint64_t)shard + 1);
}

// The next batch of this rank: inputs and targets [batch, seq_len], targets one token ahead. Dies on a
// token outside the vocabulary and on a shard that has changed.
static inline void loader_next(DataLoader *l, int32_t *inputs, int32_t *targets) {
    for (int64_t row = 0; row < l->batch; row++) {
        int64_t at = l->position + l->rank * l->batch + row;
        int64_t epoch = l->epoch + at / l->samples;
        at %= l->samples;
        loader_enter(l, epoch, at);
        const Shard *s = &l->shards[l->shard_order[l->current]];
        int64_t first = l->sample_order[at - l->first_sample[l->current]] * (l->seq_len + 1);
        shard_read(s, first, l->seq_len + 1, l->sample);
        for (int64_t t = 0; t <= l->seq_len; t++) {
            if (l->sample[t] >= (uint64_t)l->vocab_size) {
                die("shard %s: token %lld is %u, beyond the vocabulary of %lld; is this the data of another "
                    "tokenizer?",
                    s->path, (long long)(first + t), l->sample[t], (long long)l->vocab_size);
            }
            if (t < l->seq_len) inputs[row * l->seq_len + t] = (int32_t)l->sample[t];
            if (t > 0) targets[row * l->seq_len + t - 1] = (int32_t)l->sample[t];
        }
    }
    l->position += l->ranks * l->batch;
    l->epoch += l->position / l->samples;
    l->position %= l->samples;
}

// The sequences within a batch of inputs [batch, seq_len], for attention that does not look across them:
// a row starts one, and with doc_mask so does every end-of-text token, which thus belongs to the document
// it opens. Fills cu_seqlens [batch * seq_len + 1] at most and returns the number S of sequences
// (cu_seqlens[S] = batch * seq_len). eot < 0: rows alone.
static inline int64_t doc_boundaries(const int32_t *inputs, int64_t batch, int64_t seq_len, int eot,
                                     int doc_mask, int64_t *cu_seqlens) {
    int64_t sequences = 0;
    for (int64_t i = 0; i < batch * seq_len; i++) {
        if (i % seq_len == 0 || (doc_mask && eot >= 0 && inputs[i] == eot)) cu_seqlens[sequences++] = i;
    }
    cu_seqlens[sequences] = batch * seq_len;
    return sequences;
}

#endif
