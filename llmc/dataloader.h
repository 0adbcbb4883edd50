// dataloader.h: loads batches of consecutive tokens from shards, in an order that depends on (seed, epoch)
// and not on the number of GPUs.
//
// A sample is seq_len + 1 consecutive tokens of one shard; samples do not overlap. An epoch visits the shards
// in an order permuted by (seed, epoch), and the samples of each shard in an order permuted by (seed, epoch,
// shard). A batch is the next ranks * batch samples of that order, across the ends of shards and epochs. Rank
// r gets samples [r * batch, (r + 1) * batch) of it. A rank is a data-parallel rank in this file:
// with -cp, all processes of a group have the same rank and get the same samples.
#ifndef LLMC_DATALOADER_H
#define LLMC_DATALOADER_H

#include "shard.h"
#include "rand.h"
#include <glob.h>

typedef struct {
    int64_t batch, seq_len, vocab_size; // a rank's batch is [batch, seq_len]
    int shuffle;                        // 0: shards and samples in file order
    uint64_t seed;
    int rank, ranks; // data-parallel rank and number of data-parallel ranks
    Shard *shards;   // [shard_count], sorted by name; only shards[shard_order[open_shard]] is open
    int64_t shard_count;
    int64_t tokens;   // in all shards
    int64_t samples;  // per epoch
    int64_t epoch;    // of the next batch's first sample
    int64_t position; // samples of this epoch that all ranks together have consumed

    int64_t order_epoch;   // the epoch of shard_order and first_sample; -1: none
    int64_t *shard_order;  // [shard_count], indices into shards
    int64_t *first_sample; // [shard_count + 1], position in the epoch of each shard's first sample
    int64_t open_shard;    // index into shard_order of the open shard; -1: none
    int64_t *sample_order; // [samples of the largest shard], sample indices within the open shard
    uint32_t *sample;      // [seq_len + 1], scratch
} DataLoader;

// Returns the number of samples in shard number `shard`.
static inline int64_t loader_shard_samples(const DataLoader *l, int64_t shard) {
    return l->shards[shard].count / (l->seq_len + 1);
}

// Sets the position of the next batch, as a checkpoint stores it; dies if the data has no such position.
static inline void loader_seek(DataLoader *l, int64_t epoch, int64_t position) {
    if (epoch < 0 || position < 0 || position >= l->samples) {
        die("the data has no sample %lld in epoch %lld: %lld samples found; use the data that the checkpoint "
            "was "
            "trained on",
            (long long)position, (long long)epoch, (long long)l->samples);
    }
    l->epoch = epoch;
    l->position = position;
}

// Opens all shards that match the glob pattern. A shard shorter than a sample is skipped with a warning on
// stderr. Dies if no shard matches, if a shard is invalid, and if all shards are too short.
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
    l->order_epoch = l->open_shard = -1;
    int error = glob(pattern, 0, NULL, &found);
    if (error == GLOB_NOMATCH) {
        die("no shard matches '%s': check the pattern, or make data first with build/recall, build/text or "
            "data/bpe",
            pattern);
    }
    if (error != 0) die("cannot list shards '%s': check the folder's permissions", pattern);

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
                fprintf(stderr, "warning: shard %s is skipped: it has %lld tokens, a sample needs %lld\n",
                        s->path, (long long)s->count, (long long)(seq_len + 1));
            }
            continue;
        }
        l->tokens += s->count;
        l->samples += samples;
        l->shard_count++;
    }
    if (l->shard_count == 0) {
        die("every shard that matches '%s' is too short: a sample needs %lld tokens, the longest shard has "
            "%lld; "
            "choose a smaller -t or other data",
            pattern, (long long)(seq_len + 1), (long long)longest);
    }
    globfree(&found);
    l->shard_order = (int64_t *)xmalloc((size_t)l->shard_count * sizeof(int64_t));
    l->first_sample = (int64_t *)xmalloc((size_t)(l->shard_count + 1) * sizeof(int64_t));
    l->sample_order = (int64_t *)xmalloc((size_t)largest * sizeof(int64_t));
    l->sample = (uint32_t *)xmalloc((size_t)(seq_len + 1) * sizeof(uint32_t));
}

// Warns on stderr if a shard of val is one of train, too, under the same file name.
static inline void loader_warn_shared(const DataLoader *train, const DataLoader *val) {
    for (int64_t i = 0; i < val->shard_count; i++) {
        const char *path = val->shards[i].path;
        struct stat a, b;
        for (int64_t j = 0; j < train->shard_count; j++) {
            const char *other = train->shards[j].path;
            if (strcmp(file_name(other), file_name(path)) != 0) continue;
            if (stat(path, &a) != 0 || stat(other, &b) != 0) continue;
            if (a.st_dev != b.st_dev || a.st_ino != b.st_ino) continue;
            fprintf(stderr, "warning: -i and -j share shard %s: validation measures training data\n", path);
            return;
        }
    }
}

// Closes the open shard and frees all memory.
static inline void loader_close(DataLoader *l) {
    if (l->open_shard >= 0) shard_close(&l->shards[l->shard_order[l->open_shard]]);
    free(l->shards);
    free(l->shard_order);
    free(l->first_sample);
    free(l->sample_order);
    free(l->sample);
    memset(l, 0, sizeof(*l));
}

// Builds shard_order of the epoch, opens the shard that contains sample `position` of the epoch, and builds
// its sample_order.
static inline void loader_seek_shard(DataLoader *l, int64_t epoch, int64_t position) {
    if (l->order_epoch == epoch && l->open_shard >= 0 && position >= l->first_sample[l->open_shard] &&
        position < l->first_sample[l->open_shard + 1]) {
        return;
    }
    if (l->open_shard >= 0) shard_close(&l->shards[l->shard_order[l->open_shard]]);
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
    int64_t lo = 0,
            hi = l->shard_count; // binary search for the last shard that begins at or before `position`
    while (hi - lo > 1) {
        int64_t mid = (lo + hi) / 2;
        if (l->first_sample[mid] <= position)
            lo = mid;
        else
            hi = mid;
    }
    l->open_shard = lo;
    int64_t shard = l->shard_order[lo], count = l->shards[shard].count;
    shard_open(&l->shards[shard], l->shards[shard].path);
    if (l->shards[shard].count != count) {
        die("shard %s has changed while in use: %lld tokens before, %lld now; start again with -y 1",
            l->shards[shard].path, (long long)count, (long long)l->shards[shard].count);
    }
    int64_t samples = loader_shard_samples(l, shard);
    for (int64_t i = 0; i < samples; i++) l->sample_order[i] = i;
    if (l->shuffle) rng_shuffle(l->sample_order, samples, seed, (uint64_t)shard + 1);
}

// Loads the next batch of this rank: inputs and targets [batch, seq_len], where target t is input token t
// + 1. Dies on a token outside the vocabulary and on a shard that has changed.
static inline void loader_next(DataLoader *l, int32_t *inputs, int32_t *targets) {
    for (int64_t row = 0; row < l->batch; row++) {
        int64_t position = l->position + l->rank * l->batch + row;
        int64_t epoch = l->epoch + position / l->samples;
        position %= l->samples;
        loader_seek_shard(l, epoch, position);
        const Shard *s = &l->shards[l->shard_order[l->open_shard]];
        int64_t first = l->sample_order[position - l->first_sample[l->open_shard]] * (l->seq_len + 1);
        shard_read(s, first, l->seq_len + 1, l->sample);
        for (int64_t t = 0; t <= l->seq_len; t++) {
            if (l->sample[t] >= (uint64_t)l->vocab_size) {
                die("shard %s: token %lld is %u, outside the vocabulary of %lld; use data of the model's "
                    "tokenizer",
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

// Finds the sequences in a batch of inputs [batch, seq_len]; attention never crosses their boundaries. Each
// row starts a sequence. With doc_mask every end-of-text token starts one too, so it belongs to the document
// that it opens. Writes cu_seqlens [at most batch * seq_len + 1] and returns the number S of sequences, where
// cu_seqlens[S] = batch * seq_len. eot < 0: there is no end-of-text token.
static inline int64_t doc_boundaries(const int32_t *inputs, int64_t batch, int64_t seq_len, int eot,
                                     int doc_mask, int64_t *cu_seqlens) {
    int64_t num_seqs = 0;
    for (int64_t i = 0; i < batch * seq_len; i++) {
        if (i % seq_len == 0 || (doc_mask && eot >= 0 && inputs[i] == eot)) cu_seqlens[num_seqs++] = i;
    }
    cu_seqlens[num_seqs] = batch * seq_len;
    return num_seqs;
}

#endif
