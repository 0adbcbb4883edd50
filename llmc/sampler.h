// sampler.h: samples the next token from logits.
#ifndef LLMC_SAMPLER_H
#define LLMC_SAMPLER_H

#include "utils.h"
#include <math.h>

// The order of the heap below: larger probability first, then smaller token id.
static inline int sampler_before(const float *probs, int32_t a, int32_t b) {
    return probs[a] > probs[b] || (probs[a] == probs[b] && a < b);
}

// Restores the max-heap property of heap [n] below node i.
static inline void sampler_sift_down(const float *probs, int32_t *heap, int n, int i) {
    for (;;) {
        int largest = i, child = 2 * i + 1;
        if (child < n && sampler_before(probs, heap[child], heap[largest])) largest = child;
        if (child + 1 < n && sampler_before(probs, heap[child + 1], heap[largest])) largest = child + 1;
        if (largest == i) return;
        int32_t t = heap[i];
        heap[i] = heap[largest];
        heap[largest] = t;
        i = largest;
    }
}

// Returns one of n tokens, from logits [n]. Temperature 0: the argmax, the first of equal logits. Otherwise
// top-p (nucleus) sampling: from the smallest set of most likely tokens whose total probability is at least
// top_p, in (0, 1]. `coin` is a random number, uniform in [0, 1). `order` and `probs` [n] are scratch. Dies
// on a logit that is NaN or +inf.
static inline int sample_token(const float *logits, int n, double temperature, double top_p, double coin,
                               int32_t *order, float *probs) {
    int argmax = 0;
    for (int i = 0; i < n; i++) {
        if (isnan(logits[i]) || logits[i] == INFINITY) {
            die("cannot sample: the logit of token %d is %g; training has diverged, try a lower -l", i,
                logits[i]);
        }
        if (logits[i] > logits[argmax]) argmax = i;
    }
    if (temperature == 0 || logits[argmax] == -INFINITY) return argmax;

    double total = 0;
    for (int i = 0; i < n; i++) {
        probs[i] = (float)exp(((double)logits[i] - logits[argmax]) / temperature);
        order[i] = i;
        total += probs[i];
    }
    for (int i = n / 2 - 1; i >= 0; i--) sampler_sift_down(probs, order, n, i);

    // pop tokens into order[n - 1], order[n - 2], ... until their total probability reaches top_p
    double mass = 0;
    int heap_size = n;
    while (heap_size > 0 && (mass < top_p * total || mass == 0)) {
        int32_t top = order[0];
        order[0] = order[--heap_size];
        order[heap_size] = top;
        mass += probs[top];
        sampler_sift_down(probs, order, heap_size, 0);
    }
    double remaining = coin * mass;
    for (int i = n - 1; i > heap_size; i--) {
        remaining -= probs[order[i]];
        if (remaining < 0) return order[i];
    }
    return order[heap_size];
}

#endif
