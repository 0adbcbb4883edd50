// logger.h: the console's line and DIR/log.jsonl, one JSON object a line, flushed at once; time left;
// and when to validate, sample and save. `step` counts finished steps everywhere.
#ifndef LLMC_LOGGER_H
#define LLMC_LOGGER_H
#include "utils.h"
#include "options.h"

// ----------------------------------------------------------------------------
// Cadence

// Whether something done every `every` steps (0: never) is due after `step` of `max_steps` steps: at
// multiples, 0 among them, and at the end.
static inline int cadence_due(int64_t step, int64_t every, int64_t max_steps) {
    return every > 0 && (step % every == 0 || step == max_steps);
}

typedef struct {
    int validate, sample, save;
} Cadence;

// What is due after `step` finished steps (0: before the first).
static inline Cadence cadence_at(const Options *o, int64_t step) {
    Cadence c;
    c.validate = o->val != NULL && cadence_due(step, o->val_every, o->max_steps);
    c.sample = step > 0 && cadence_due(step, o->sample_every, o->max_steps);
    c.save = o->output != NULL && step > 0 &&
             (step == o->max_steps || cadence_due(step, o->save_every, o->max_steps));
    return c;
}

// Seconds left, from the time that the last `steps` steps took; 0 where none was done.
static inline double eta_seconds(double elapsed, int64_t steps, int64_t steps_left) {
    return steps > 0 ? elapsed / (double)steps * (double)steps_left : 0;
}

// 7s, 2m05s, 3h02m, 4d03h.
static inline void format_seconds(char *out, size_t size, double seconds) {
    int64_t s = (int64_t)(seconds + 0.5);
    if (s < 60)
        snprintf(out, size, "%llds", (long long)s);
    else if (s < 3600)
        snprintf(out, size, "%lldm%02llds", (long long)(s / 60), (long long)(s % 60));
    else if (s < 86400)
        snprintf(out, size, "%lldh%02lldm", (long long)(s / 3600), (long long)(s / 60 % 60));
    else
        snprintf(out, size, "%lldd%02lldh", (long long)(s / 86400), (long long)(s / 3600 % 24));
}

// ----------------------------------------------------------------------------
// The log

typedef struct {
    FILE *file; // NULL: console only
    char path[PATH_BYTES];
    double printed; // now_seconds() of the last step on the console, 0: none yet
} Logger;

typedef struct {
    int64_t step;
    double loss, lr, norm; // norm: of the gradient, before clipping
    double ms;             // of the step
    double tokens_per_second;
    double mfu;           // fraction of the peak; 0: the peak is not known
    int64_t memory_bytes; // 0: not measured
} TrainLine;

static inline void logger_write(Logger *l, const char *line) {
    if (!l->file) return;
    if (fputs(line, l->file) < 0 || fflush(l->file) != 0)
        die("cannot write %s: %s (is the disk full?)", l->path, strerror(errno));
}

// JSON knows no NaN and no infinity.
static inline const char *logger_number(char *out, size_t size, double x) {
    if (isfinite(x))
        snprintf(out, size, "%.9g", x);
    else
        snprintf(out, size, "null");
    return out;
}

// The step of a line, -1 where it has none or is not whole.
static inline int64_t logger_step_of(const char *line, size_t length) {
    static const char start[] = "{\"step\":";
    size_t n = sizeof start - 1;
    if (length < n + 3 || memcmp(line, start, n) != 0 || line[length - 1] != '\n' || line[length - 2] != '}')
        return -1;
    return strtoll(line + n, NULL, 10);
}

// Opens DIR/log.jsonl (dir NULL: console only). last_step: the finished steps of the checkpoint that the
// run goes on from, whose lines and those before it stay; -1: a new run, nothing stays.
static inline void logger_open(Logger *l, const char *dir, int64_t last_step) {
    l->file = NULL;
    l->printed = 0;
    if (!dir) return;
    if (snprintf(l->path, sizeof l->path, "%s/log.jsonl", dir) >= (int)sizeof l->path)
        die("-o %s: the name is too long", dir);
    FILE *old = last_step >= 0 ? fopen(l->path, "rb") : NULL;
    if (!old && last_step >= 0 && errno != ENOENT) die("cannot read %s: %s", l->path, strerror(errno));
    AtomicFile out;
    atomic_open(&out, l->path);
    char *line = NULL;
    size_t room = 0;
    ssize_t length;
    while (old && (length = getline(&line, &room, old)) > 0) {
        int64_t step = logger_step_of(line, (size_t)length);
        if (step >= 0 && step <= last_step) atomic_write(&out, line, (size_t)length);
    }
    free(line);
    if (old) fclose(old);
    atomic_commit(&out);
    l->file = fopen(l->path, "ab");
    if (!l->file) die("cannot write %s: %s", l->path, strerror(errno));
}

static inline void logger_close(Logger *l) {
    if (l->file && fclose(l->file) != 0) die("cannot write %s: %s", l->path, strerror(errno));
    l->file = NULL;
}

// One finished step. The file gets every step, the console the first, the last, and between them one a
// second at most. eta: seconds left.
static inline void logger_train(Logger *l, const TrainLine *t, int64_t max_steps, double eta) {
    char line[512], loss[32], lr[32], norm[32], mfu[32] = "", memory[32] = "", left[32];
    format_seconds(left, sizeof left, eta);
    if (t->mfu > 0) snprintf(mfu, sizeof mfu, " | mfu %.1f%%", 100 * t->mfu);
    if (t->memory_bytes > 0)
        snprintf(memory, sizeof memory, " | %lld MiB", (long long)(t->memory_bytes >> 20));
    if (l->printed == 0 || now_seconds() - l->printed >= 1 || t->step == max_steps) {
        printf("step %lld/%lld | loss %.4f | norm %.3f | lr %.2e | %.1f ms | %.0f tokens/s%s%s | %s left\n",
               (long long)t->step, (long long)max_steps, t->loss, t->norm, t->lr, t->ms, t->tokens_per_second,
               mfu, memory, left);
        fflush(stdout);
        l->printed = now_seconds();
    }
    snprintf(line, sizeof line,
             "{\"step\":%lld,\"loss\":%s,\"lr\":%s,\"norm\":%s,\"ms\":%.3f,\"tokens_per_second\":%.1f,"
             "\"mfu\":%.5f,\"memory_bytes\":%lld}\n",
             (long long)t->step, logger_number(loss, sizeof loss, t->loss),
             logger_number(lr, sizeof lr, t->lr), logger_number(norm, sizeof norm, t->norm), t->ms,
             t->tokens_per_second, t->mfu, (long long)t->memory_bytes);
    logger_write(l, line);
}

static inline void logger_val(Logger *l, int64_t step, double val_loss) {
    char line[128], loss[32];
    printf("val loss %.4f\n", val_loss);
    fflush(stdout);
    snprintf(line, sizeof line, "{\"step\":%lld,\"val_loss\":%s}\n", (long long)step,
             logger_number(loss, sizeof loss, val_loss));
    logger_write(l, line);
}

// Recall by distance: bucket i holds the answers at distances from[i] to 2*from[i]-1, of which right[i]
// of asked[i] were right. chance: accuracy of guessing.
static inline void logger_recall(Logger *l, int64_t step, int buckets, const int64_t *from,
                                 const int64_t *asked, const int64_t *right, double chance) {
    char line[8192];
    int at =
        snprintf(line, sizeof line, "{\"step\":%lld,\"chance\":%.5g,\"recall\":[", (long long)step, chance);
    printf("recall by distance (chance %.1f%%):", 100 * chance);
    for (int i = 0; i < buckets && at < (int)sizeof line - 128; i++) {
        if (asked[i] == 0)
            printf(" | %lld+: none", (long long)from[i]);
        else
            printf(" | %lld+: %.1f%% of %lld", (long long)from[i],
                   100.0 * (double)right[i] / (double)asked[i], (long long)asked[i]);
        at += snprintf(line + at, sizeof line - (size_t)at, "%s{\"from\":%lld,\"asked\":%lld,\"right\":%lld}",
                       i ? "," : "", (long long)from[i], (long long)asked[i], (long long)right[i]);
    }
    printf("\n");
    fflush(stdout);
    snprintf(line + at, sizeof line - (size_t)at, "]}\n");
    logger_write(l, line);
}
#endif
