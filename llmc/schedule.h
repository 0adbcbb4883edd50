// schedule.h: the learning rate schedule, and the steps at which to validate, generate text and save.
#ifndef LLMC_SCHEDULE_H
#define LLMC_SCHEDULE_H

#include "options.h"
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

// Returns whether an event every `every` steps (0: never) is due after `step` of `max_steps` steps: at step
// 0, at multiples of `every`, and after the last step.
static inline int cadence_due(int64_t step, int64_t every, int64_t max_steps) {
    return every > 0 && (step % every == 0 || step == max_steps);
}

typedef struct {
    int validate, sample, save;
} Cadence;

// Returns what is due after `step` finished steps; 0: before the first step.
static inline Cadence cadence_at(const Options *o, int64_t step) {
    Cadence c;
    c.validate = o->val != NULL && cadence_due(step, o->val_every, o->max_steps);
    c.sample = step > 0 && cadence_due(step, o->sample_every, o->max_steps);
    c.save = o->output != NULL && step > 0 &&
             (step == o->max_steps || cadence_due(step, o->save_every, o->max_steps));
    return c;
}

#endif
