// sampler.h: from logits to the next token.
#ifndef LLMC_SAMPLER_H
#define LLMC_SAMPLER_H

#include "utils.h"
#include <math.h>

// The heap below keeps the likeliest token on top; of equals the smaller id.
static inline int sampler_before(const float *probs, int32_t a, int32_t b) {
    return probs[a] > probs[b] || (probs[a] == probs[b] && a < b);
}

static inline void sampler_sift(const float *probs, int32_t *heap, int n, int i) {
    for (;;) {
        int best = i, left = 2 * i + 1;
        if (left < n && sampler_before(probs, heap[left], heap[best])) best = left;
        if (left + 1 < n && sampler_before(probs, heap[left + 1], heap[best])) best = left + 1;
        if (best == i) return;
        int32_t t = heap[i];
        heap[i] = heap[best];
        heap[best] = t;
        i = best;
    }
}

// Picks one of n tokens. Temperature 0: the greatest logit, the first of equals. Else from the nucleus:
// the smallest set of likeliest tokens whose probability is at least top_p, in (0, 1]; `coin` is uniform
// in [0, 1). `order` and `probs` are scratch, [n] each. A logit that is NaN or +inf dies.
static inline int sample_token(const float *logits, int n, double temperature, double top_p, double coin,
                               int32_t *order, float *probs) {
    int best = 0;
    for (int i = 0; i < n; i++) {
        if (isnan(logits[i]) || logits[i] == INFINITY) {
            die("cannot sample: the logit of token %d is %g (has training diverged? try a lower learning "
                "rate)",
                i, logits[i]);
        }
        if (logits[i] > logits[best]) best = i;
    }
    if (temperature == 0 || logits[best] == -INFINITY) return best;

    double total = 0;
    for (int i = 0; i < n; i++) {
        probs[i] = (float)exp(((double)logits[i] - logits[best]) / temperature);
        order[i] = i;
        total += probs[i];
    }
    for (int i = n / 2 - 1; i >= 0; i--) sampler_sift(probs, order, n, i);

    // take tokens off the heap into order[n - 1], order[n - 2], ... until their mass suffices
    double mass = 0;
    int rest = n;
    while (rest > 0 && (mass < top_p * total || mass == 0)) {
        int32_t top = order[0];
        order[0] = order[--rest];
        order[rest] = top;
        mass += probs[top];
        sampler_sift(probs, order, rest, 0);
    }
    double left = coin * mass;
    for (int i = n - 1; i > rest; i--) {
        left -= probs[order[i]];
        if (left < 0) return order[i];
    }
    return order[rest];
}

#endif
