// feed.cuh: the feed of training batches: a thread reads them ahead and copies them to the GPU on a stream of
// its own.
#ifndef LLMC_FEED_CUH
#define LLMC_FEED_CUH
#include "run.h"
#include "mfu.h"
#include "micro_batch.cuh"
#include <pthread.h>

// One of the feed's two batches.
typedef struct {
    char *host, *device;         // arrays of the batch; host memory is pinned
    Batch batch;                 // on the device
    double flops;                // of a training step on the batch
    int64_t epoch, position;     // of the training data after the batch
    cudaEvent_t copied, trained; // the copy to the device, and the passes over the batch, are done
    int full;                    // 1: ready for training
} FeedSlot;

typedef struct {
    Run *run;
    const Gpus *gpus;
    int device; // the GPU of the thread
    FeedSlot slots[2];
    int64_t num_taken; // batches that training has taken
    int stop;          // 1: the thread shall end
    pthread_t thread;
    pthread_mutex_t lock; // guards full and stop
    pthread_cond_t changed;
    cudaStream_t stream; // of the copies
} Feed;

// Fills a slot with batch number batch_index of the training data, or of random tokens for -profile, and
// starts its copy to the GPU, which waits until the passes over the slot's last batch are done. tokens [2n]
// and cu_seqlens [n + 1] are scratch.
static void feed_fill(Feed *feed, FeedSlot *slot, int64_t batch_index, int32_t *tokens, int64_t *cu_seqlens) {
    Run *r = feed->run;
    DataLoader *l = &r->train;
    const Options *o = &r->opt;
    const int64_t n = o->batch * o->seq_len, first = 2 * n * (batch_index * r->dp_size + r->dp_rank);
    if (o->profile_steps) {
        for (int64_t i = 0; i < 2 * n; i++)
            tokens[i] = (int32_t)(rng_u64_at((uint64_t)o->seed, first + i) % r->config.vocab_size);
    } else {
        if (o->overfit && batch_index % r->micro_batches == 0) loader_seek(l, 0, 0);
        loader_next(l, tokens, tokens + n);
    }
    int64_t num_seqs = doc_boundaries(tokens, o->batch, o->seq_len, o->profile_steps ? -1 : r->eot,
                                      (int)o->doc_mask, cu_seqlens);
    Batch b = batch_fill(&r->config, feed->gpus, tokens, tokens + n, cu_seqlens, num_seqs, slot->host);
    cuda_check(cudaStreamWaitEvent(feed->stream, slot->trained, 0));
    slot->batch = batch_upload(&b, slot->device, feed->stream);
    cuda_check(cudaEventRecord(slot->copied, feed->stream));
    slot->flops = 0;
    for (int64_t s = 0; s < num_seqs; s++)
        slot->flops += model_flops(&r->config, cu_seqlens[s + 1] - cu_seqlens[s]) * r->dp_size;
    slot->epoch = l->epoch;
    slot->position = l->position;
}

// The feed's thread: fills free slots until feed->stop.
static void *feed_thread(void *arg) {
    Feed *feed = (Feed *)arg;
    const Options *o = &feed->run->opt;
    int64_t *cu_seqlens = (int64_t *)xmalloc((o->batch * o->seq_len + 1) * sizeof(int64_t));
    int32_t *tokens = (int32_t *)xmalloc(2 * o->batch * o->seq_len * sizeof(int32_t)); // then targets
    cuda_check(cudaSetDevice(feed->device));
    for (int64_t batch_index = 0;; batch_index++) {
        FeedSlot *slot = &feed->slots[batch_index % 2];
        pthread_mutex_lock(&feed->lock);
        while (slot->full && !feed->stop) pthread_cond_wait(&feed->changed, &feed->lock);
        int stop = feed->stop;
        pthread_mutex_unlock(&feed->lock);
        if (stop) break;
        cuda_check(cudaEventSynchronize(slot->copied)); // the slot's last copy, which ended long ago
        feed_fill(feed, slot, batch_index, tokens, cu_seqlens);
        pthread_mutex_lock(&feed->lock);
        slot->full = 1;
        pthread_cond_broadcast(&feed->changed);
        pthread_mutex_unlock(&feed->lock);
    }
    free(cu_seqlens), free(tokens);
    return NULL;
}

// Starts the feed of the run's training batches; feed_stop ends it. device [2]: memory on the GPU, `bytes`
// bytes each, enough for a batch. gpus NULL: one GPU alone.
static void feed_start(Feed *feed, Run *r, const Gpus *gpus, char *const *device, size_t bytes) {
    memset(feed, 0, sizeof *feed);
    feed->run = r;
    feed->gpus = gpus;
    cuda_check(cudaGetDevice(&feed->device));
    for (int i = 0; i < 2; i++) {
        FeedSlot *slot = &feed->slots[i];
        slot->device = device[i];
        cuda_check(cudaMallocHost((void **)&slot->host, bytes));
        cuda_check(cudaEventCreateWithFlags(&slot->copied, cudaEventDisableTiming | cudaEventBlockingSync));
        cuda_check(cudaEventCreateWithFlags(&slot->trained, cudaEventDisableTiming));
    }
    cuda_check(cudaStreamCreateWithFlags(&feed->stream, cudaStreamNonBlocking));
    pthread_mutex_init(&feed->lock, NULL);
    pthread_cond_init(&feed->changed, NULL);
    int error = pthread_create(&feed->thread, NULL, feed_thread, feed);
    if (error) die("cannot start the data feed's thread: %s", strerror(error));
}

// Returns the slot of the next batch. Work that is launched later on `stream` waits for its copy. The caller
// gives the slot back with feed_release.
static FeedSlot *feed_next(Feed *feed, cudaStream_t stream) {
    FeedSlot *slot = &feed->slots[feed->num_taken++ % 2];
    pthread_mutex_lock(&feed->lock);
    while (!slot->full) pthread_cond_wait(&feed->changed, &feed->lock);
    pthread_mutex_unlock(&feed->lock);
    cuda_check(cudaStreamWaitEvent(stream, slot->copied, 0));
    return slot;
}

// Gives the slot back. The feed overwrites its device memory after the work that is on `stream` now.
static void feed_release(Feed *feed, FeedSlot *slot, cudaStream_t stream) {
    cuda_check(cudaEventRecord(slot->trained, stream));
    pthread_mutex_lock(&feed->lock);
    slot->full = 0;
    pthread_cond_broadcast(&feed->changed);
    pthread_mutex_unlock(&feed->lock);
}

static void feed_stop(Feed *feed) {
    pthread_mutex_lock(&feed->lock);
    feed->stop = 1;
    pthread_cond_broadcast(&feed->changed);
    pthread_mutex_unlock(&feed->lock);
    pthread_join(feed->thread, NULL);
    cuda_check(cudaStreamSynchronize(feed->stream));
    for (FeedSlot &slot : feed->slots) {
        cuda_check(cudaFreeHost(slot.host));
        cuda_check(cudaEventDestroy(slot.copied));
        cuda_check(cudaEventDestroy(slot.trained));
    }
    cuda_check(cudaStreamDestroy(feed->stream));
    pthread_mutex_destroy(&feed->lock);
    pthread_cond_destroy(&feed->changed);
}
#endif
