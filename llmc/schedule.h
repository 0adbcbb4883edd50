// schedule.h: the learning rate schedule, and the steps at which to validate, generate text and save.
#ifndef LLMC_SCHEDULE_H
#define LLMC_SCHEDULE_H

#include "checkpoint.h"
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

// Returns the learning rate of `step`, counted from 0, by the schedule -k. After the warm-up, linear falls on
// a line to final_frac * lr at max_steps. constant stays. wsd stays until four fifths of max_steps, then
// falls as 1 - sqrt of the decay's finished part.
static inline double schedule_rate(const Options *o, int64_t step) {
    const double max_lr = o->lr, min_lr = o->lr * o->final_frac;
    if (step < o->warmup || strcmp(o->schedule, "cosine") == 0)
        return learning_rate(step, max_lr, o->warmup, o->max_steps, o->final_frac);
    if (strcmp(o->schedule, "constant") == 0) return max_lr;
    if (step >= o->max_steps) return min_lr;
    if (strcmp(o->schedule, "linear") == 0)
        return max_lr + (min_lr - max_lr) * (double)(step - o->warmup) / (double)(o->max_steps - o->warmup);
    double begin = 0.8 * (double)o->max_steps; // of the decay
    if (begin < (double)o->warmup) begin = (double)o->warmup;
    if ((double)step < begin) return max_lr;
    double done = ((double)step - begin) / ((double)o->max_steps - begin);
    return max_lr + (min_lr - max_lr) * sqrt(done);
}

// Returns the value above which the next one is an outlier: mean + max_z * standard deviation of the last
// OUTLIER_WINDOW values; infinity if max_z is 0 or there are fewer values.
static inline double outlier_limit(const OutlierWindow *w, double max_z) {
    if (max_z == 0 || w->count < OUTLIER_WINDOW) return INFINITY;
    double sum = 0, squares = 0;
    for (int i = 0; i < OUTLIER_WINDOW; i++) sum += w->values[i];
    const double mean = sum / OUTLIER_WINDOW;
    for (int i = 0; i < OUTLIER_WINDOW; i++) squares += (w->values[i] - mean) * (w->values[i] - mean);
    return mean + max_z * sqrt(squares / OUTLIER_WINDOW);
}

// Adds a value to the window, unless it is NaN or Inf.
static inline void outlier_add(OutlierWindow *w, double value) {
    if (isfinite(value)) w->values[w->count++ % OUTLIER_WINDOW] = (float)value;
}

// Returns whether an event every `every` steps (0: never) is due after `step` of `max_steps` steps: at step
// 0, at multiples of `every`, and after the last step.
static inline int cadence_due(int64_t step, int64_t every, int64_t max_steps) {
    return every > 0 && (step % every == 0 || step == max_steps);
}

typedef struct {
    int validate, sample, save;
    int save_first; // before the validation and the sample, too
} Cadence;

// Returns what is due after `step` finished steps; 0: before the first step.
static inline Cadence cadence_at(const Options *o, int64_t step) {
    Cadence c;
    c.validate = (o->val || o->hellaswag || o->multiple_choice || o->needle) &&
                 cadence_due(step, o->val_every, o->max_steps);
    c.sample = step > 0 && cadence_due(step, o->sample_every, o->max_steps);
    c.save = o->output != NULL && step > 0 &&
             (step == o->max_steps || cadence_due(step, o->save_every, o->max_steps));
    return c;
}

#endif
