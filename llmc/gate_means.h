// gate_means.h: the mean gate of each branch and layer. The attention's output is the sum of its branches,
// each times a gate in (0, 1), the sigmoid of a gate logit. A gate near 0 says that a layer does not use the
// branch.
#ifndef LLMC_GATE_MEANS_H
#define LLMC_GATE_MEANS_H
#include "utils.h"
#include <math.h>

enum { GATE_BRANCHES = 3 }; // compressed, selected, sliding

// The gates of a layer.
typedef struct {
    double sum[GATE_BRANCHES];
    int64_t count; // of each branch
} GateSums;

// Adds the sigmoids of gate logits [n, GATE_BRANCHES].
static inline void gate_sums_add(GateSums *s, const float *logits, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        for (int b = 0; b < GATE_BRANCHES; b++) s->sum[b] += 1 / (1 + exp(-logits[i * GATE_BRANCHES + b]));
    s->count += n;
}

// Adds the sums of other tokens.
static inline void gate_sums_merge(GateSums *s, const GateSums *other) {
    for (int b = 0; b < GATE_BRANCHES; b++) s->sum[b] += other->sum[b];
    s->count += other->count;
}
#endif
