// schedule.h: the learning rate schedule.
#ifndef LLMC_SCHEDULE_H
#define LLMC_SCHEDULE_H

#include <math.h>
#include <stdint.h>

// Returns the learning rate of `step`, counted from 0. It rises linearly for `warmup` steps, the last of
// which has max_lr. Then it follows half a cosine from max_lr (step == warmup) to final_frac * max_lr (step
// >= max_steps).
static inline double learning_rate(int64_t step, double max_lr, int64_t warmup, int64_t max_steps,
                                   double final_frac) {
    if (step < warmup) return max_lr * (double)(step + 1) / (double)warmup;
    if (step >= max_steps) return max_lr * final_frac;
    double done = (double)(step - warmup) / (double)(max_steps - warmup);
    double cosine = 0.5 * (1.0 + cos(3.14159265358979323846 * done));
    return max_lr * (final_frac + (1.0 - final_frac) * cosine);
}

#endif
