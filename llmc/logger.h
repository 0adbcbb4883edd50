// logger.h: writes the progress to the console and to DIR/log.jsonl, one JSON object per line, each flushed
// at once. `step` always counts finished steps.
#ifndef LLMC_LOGGER_H
#define LLMC_LOGGER_H
#include "eval_file.h"
#include "gate_means.h"
#include "position_loss.h"
#include <math.h>

// Estimates the remaining seconds of steps_left steps from the `elapsed` seconds of `steps` steps; 0 if steps
// is 0.
static inline double eta_seconds(double elapsed, int64_t steps, int64_t steps_left) {
    return steps > 0 ? elapsed / (double)steps * (double)steps_left : 0;
}

// Writes a time as 7s, 2m05s, 3h02m or 4d03h.
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
    int64_t tokens;   // tokens trained on until the logged step
    int console_only; // 1: nothing is added to the file
    double printed;   // now_seconds() of the last step on the console; 0: none yet
} Logger;

typedef struct {
    int64_t step;
    double loss, lr, norm; // norm: gradient norm before clipping
    double ms;             // time of the step in milliseconds
    double tokens_per_second;
    double mfu;           // fraction of the peak FLOP rate; 0: the peak is unknown
    int64_t memory_bytes; // 0: not measured
} StepLog;

// Appends a line to the file and flushes it; dies if it cannot, or if someone has removed or replaced the
// file or its folder.
static inline void logger_write(Logger *l, const char *line) {
    struct stat path, file;
    if (!l->file || l->console_only) return;
    if (fstat(fileno(l->file), &file) != 0 || stat(l->path, &path) != 0 || path.st_ino != file.st_ino ||
        path.st_dev != file.st_dev)
        die("%s is gone: the folder or the file was removed during the run; start again in a new folder",
            l->path);
    if (fputs(line, l->file) < 0 || fflush(l->file) != 0)
        die("cannot write %s: %s; check the free disk space and ulimit -f", l->path, strerror(errno));
}

// Writes a number as JSON, NaN and Inf as null. Returns out.
static inline const char *logger_format_number(char *out, size_t size, double x) {
    if (isfinite(x))
        snprintf(out, size, "%.9g", x);
    else
        snprintf(out, size, "null");
    return out;
}

// Writes text as a JSON string, or null.
static inline void logger_json_text(FILE *f, const char *text) {
    if (!text) {
        fprintf(f, "null");
        return;
    }
    fputc('"', f);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            fprintf(f, "\\%c", *text);
        else if ((unsigned char)*text < 32)
            fprintf(f, "\\u%04x", *text);
        else
            fputc(*text, f);
    }
    fputc('"', f);
}

// Returns the step of a line of the log, or -1 if the line is incomplete or has no step.
static inline int64_t logger_parse_step(const char *line, size_t length) {
    static const char prefix[] = "{\"step\":";
    size_t prefix_bytes = sizeof prefix - 1;
    if (length < prefix_bytes + 3 || memcmp(line, prefix, prefix_bytes) != 0 || line[length - 1] != '\n' ||
        line[length - 2] != '}')
        return -1;
    return strtoll(line + prefix_bytes, NULL, 10);
}

// Returns whether DIR/log.jsonl has a line.
static inline int logger_has_lines(const char *dir) {
    char path[PATH_BYTES];
    struct stat st;
    return snprintf(path, sizeof path, "%s/log.jsonl", dir) < (int)sizeof path && stat(path, &st) == 0 &&
           st.st_size > 0;
}

// Opens DIR/log.jsonl; dir NULL: only the console. last_step: the step of the checkpoint from which the run
// resumes; the lines up to that step stay, later ones are removed. -1: a new run, all lines are removed.
static inline void logger_open(Logger *l, const char *dir, int64_t last_step) {
    l->file = NULL;
    l->console_only = 0;
    l->tokens = 0;
    l->printed = 0;
    if (!dir) return;
    if (snprintf(l->path, sizeof l->path, "%s/log.jsonl", dir) >= (int)sizeof l->path)
        die("-o %s: the name is too long; choose a shorter path", dir);
    FILE *old = last_step >= 0 ? fopen(l->path, "rb") : NULL;
    if (!old && last_step >= 0 && errno != ENOENT)
        die("cannot read %s: %s; check its permissions", l->path, strerror(errno));
    AtomicFile out;
    atomic_open(&out, l->path);
    char *line = NULL;
    size_t capacity = 0;
    ssize_t length;
    while (old && (length = getline(&line, &capacity, old)) > 0) {
        int64_t step = logger_parse_step(line, (size_t)length);
        if (step >= 0 && step <= last_step) atomic_write(&out, line, (size_t)length);
    }
    free(line);
    if (old) fclose(old);
    atomic_commit(&out);
    l->file = fopen(l->path, "ab");
    if (!l->file) die("cannot write %s: %s; check its permissions", l->path, strerror(errno));
}

// Closes the log; dies if the last bytes cannot be written.
static inline void logger_close(Logger *l) {
    if (l->file && fclose(l->file) != 0)
        die("cannot write %s: %s; check the free disk space and ulimit -f", l->path, strerror(errno));
    l->file = NULL;
}

// Logs a finished step. The file gets every step. The console gets the first step, the last step, and between
// them at most one per second. eta: remaining seconds.
static inline void logger_train(Logger *l, const StepLog *t, int64_t max_steps, double eta) {
    char line[512], loss[32], lr[32], norm[32], mfu[32] = "", memory[32] = "", time_left[32];
    format_seconds(time_left, sizeof time_left, eta);
    if (t->mfu > 0) snprintf(mfu, sizeof mfu, " | mfu %.1f%%", 100 * t->mfu);
    if (t->memory_bytes > 0)
        snprintf(memory, sizeof memory, " | %lld MiB", (long long)(t->memory_bytes >> 20));
    if (l->printed == 0 || now_seconds() - l->printed >= 1 || t->step == max_steps) {
        printf("step %lld/%lld | loss %.4f | norm %.3f | lr %.2e | %.1f ms | %.0f tokens/s%s%s | %s left\n",
               (long long)t->step, (long long)max_steps, t->loss, t->norm, t->lr, t->ms, t->tokens_per_second,
               mfu, memory, time_left);
        fflush(stdout);
        l->printed = now_seconds();
    }
    snprintf(line, sizeof line,
             "{\"step\":%lld,\"loss\":%s,\"lr\":%s,\"norm\":%s,\"ms\":%.3f,\"tokens_per_second\":%.1f,"
             "\"mfu\":%.5f,\"memory_bytes\":%lld,\"tokens\":%lld}\n",
             (long long)t->step, logger_format_number(loss, sizeof loss, t->loss),
             logger_format_number(lr, sizeof lr, t->lr), logger_format_number(norm, sizeof norm, t->norm),
             t->ms, t->tokens_per_second, t->mfu, (long long)t->memory_bytes, (long long)l->tokens);
    logger_write(l, line);
}

// Logs the mean loss of a validation over val_tokens target tokens, whose text has val_bytes bytes (0:
// unknown), and what follows from it.
static inline void logger_val(Logger *l, int64_t step, double val_loss, int64_t val_tokens,
                              int64_t val_bytes) {
    char line[256], loss[32], perplexity[32], bits[32], bits_text[48] = "";
    double bits_per_byte = val_loss / log(2) * (double)val_tokens / (double)val_bytes;
    if (val_bytes > 0) snprintf(bits_text, sizeof bits_text, " | %.6f bits/byte", bits_per_byte);
    printf("val loss %.6f | perplexity %.6g%s | %lld tokens | step %lld\n", val_loss, exp(val_loss),
           bits_text, (long long)val_tokens, (long long)step);
    fflush(stdout);
    snprintf(line, sizeof line,
             "{\"step\":%lld,\"tokens\":%lld,\"val_loss\":%s,\"val_perplexity\":%s,\"val_bits_per_byte\":%s,"
             "\"val_tokens\":%lld}\n",
             (long long)step, (long long)l->tokens, logger_format_number(loss, sizeof loss, val_loss),
             logger_format_number(perplexity, sizeof perplexity, exp(val_loss)),
             logger_format_number(bits, sizeof bits, val_bytes > 0 ? bits_per_byte : NAN),
             (long long)val_tokens);
    logger_write(l, line);
}

// Logs the loss by position in the document, of the buckets that have tokens.
static inline void logger_positions(Logger *l, int64_t step, const PositionLoss *p) {
    char line[4096], loss[32];
    int length = snprintf(line, sizeof line, "{\"step\":%lld,\"tokens\":%lld,\"position_loss\":[",
                          (long long)step, (long long)l->tokens);
    printf("loss by position at step %lld:", (long long)step);
    for (int i = 0, shown = 0; i < POSITION_BUCKETS; i++) {
        if (p->tokens[i] == 0) continue;
        const double mean = p->loss_sum[i] / (double)p->tokens[i];
        printf(" | %lld+: %.4f of %lld", (long long)position_bucket_start(i), mean, (long long)p->tokens[i]);
        length += snprintf(line + length, sizeof line - (size_t)length,
                           "%s{\"from\":%lld,\"tokens\":%lld,\"loss\":%s}", shown++ ? "," : "",
                           (long long)position_bucket_start(i), (long long)p->tokens[i],
                           logger_format_number(loss, sizeof loss, mean));
    }
    printf("\n");
    fflush(stdout);
    snprintf(line + length, sizeof line - (size_t)length, "]}\n");
    logger_write(l, line);
}

// Logs the recall accuracy by distance. Bucket i has asked[i] answers at distances distances[i] to
// 2*distances[i] - 1 tokens, of which right[i] are correct. chance: accuracy of random guesses.
static inline void logger_recall(Logger *l, int64_t step, int buckets, const int64_t *distances,
                                 const int64_t *asked, const int64_t *right, double chance) {
    char line[8192];
    int length = snprintf(line, sizeof line, "{\"step\":%lld,\"tokens\":%lld,\"chance\":%.5g,\"recall\":[",
                          (long long)step, (long long)l->tokens, chance);
    printf("recall by distance at step %lld (chance %.1f%%):", (long long)step, 100 * chance);
    for (int i = 0; i < buckets && length < (int)sizeof line - 128; i++) {
        if (asked[i] == 0)
            printf(" | %lld+: none", (long long)distances[i]);
        else
            printf(" | %lld+: %.1f%% of %lld", (long long)distances[i],
                   100.0 * (double)right[i] / (double)asked[i], (long long)asked[i]);
        length += snprintf(line + length, sizeof line - (size_t)length,
                           "%s{\"from\":%lld,\"asked\":%lld,\"right\":%lld}", i ? "," : "",
                           (long long)distances[i], (long long)asked[i], (long long)right[i]);
    }
    printf("\n");
    fflush(stdout);
    snprintf(line + length, sizeof line - (size_t)length, "]}\n");
    logger_write(l, line);
}

// Begins a line of any length, {"step":...,"tokens":..., in *line and *size. Dies without memory.
static inline FILE *logger_begin_line(const Logger *l, int64_t step, char **line, size_t *size) {
    FILE *f = open_memstream(line, size);
    if (!f) die("out of memory: a line of the log");
    fprintf(f, "{\"step\":%lld,\"tokens\":%lld,", (long long)step, (long long)l->tokens);
    return f;
}

// Ends a line of logger_begin_line, whose last text the caller has written, and adds it to the log.
static inline void logger_end_line(Logger *l, FILE *f, char **line) {
    if (fclose(f) != 0) die("out of memory: a line of the log");
    logger_write(l, *line);
    free(*line);
}

// Logs the right answers to a multiple-choice file.
static inline void logger_multiple_choice(Logger *l, int64_t step, const EvalFile *f, const EvalAccuracy *a) {
    char *line;
    size_t size;
    const char *unit = f->llmc_format ? "token" : "character";
    printf("%s: %lld of %lld right, %.2f%% | by loss per %s %lld, %.2f%% | chance %.1f%% | step %lld\n",
           f->name, (long long)a->right, (long long)a->examples, 100 * (double)a->right / (double)a->examples,
           unit, (long long)a->right_normalized, 100 * (double)a->right_normalized / (double)a->examples,
           100 * a->chance, (long long)step);
    fflush(stdout);
    FILE *out = logger_begin_line(l, step, &line, &size);
    fprintf(out, "\"multiple_choice\":");
    logger_json_text(out, f->name);
    fprintf(out, ",\"examples\":%lld,\"right\":%lld,\"right_normalized\":%lld,\"chance\":%.5g}\n",
            (long long)a->examples, (long long)a->right, (long long)a->right_normalized, a->chance);
    logger_end_line(l, out, &line);
}

// Logs the right answers to a needle file: on the console by length, in the log by length and depth. cells
// [count] by length and depth.
static inline void logger_needle(Logger *l, int64_t step, const EvalFile *f, const EvalCell *cells,
                                 int64_t count) {
    char *line;
    size_t size;
    FILE *out = logger_begin_line(l, step, &line, &size);
    fprintf(out, "\"needle\":");
    logger_json_text(out, f->name);
    fprintf(out, ",\"keys\":%lld,\"cells\":[", (long long)f->keys);
    printf("%s by length at step %lld (keys: %lld):", f->name, (long long)step, (long long)f->keys);
    int64_t asked = 0, right = 0; // of a length
    for (int64_t i = 0; i < count; i++) {
        const EvalCell *c = &cells[i];
        fprintf(out, "%s{\"length\":%lld,\"depth\":%.3f,\"asked\":%lld,\"right\":%lld}", i ? "," : "",
                (long long)c->length, (double)c->depth / 1000, (long long)c->asked, (long long)c->right);
        asked += c->asked, right += c->right;
        if (i + 1 < count && cells[i + 1].length == c->length) continue;
        printf(" | %lld: %.1f%% of %lld", (long long)c->length, 100 * (double)right / (double)asked,
               (long long)asked);
        asked = right = 0;
    }
    printf("\n");
    fflush(stdout);
    fprintf(out, "]}\n");
    logger_end_line(l, out, &line);
}

// Logs the mean gates: on the console of all layers, in the log of each. gates [layers].
static inline void logger_gates(Logger *l, int64_t step, const GateSums *gates, int layers) {
    static const char *const branches[GATE_BRANCHES] = {"compressed", "selected", "sliding"};
    char *line, mean[32];
    size_t size;
    FILE *out = logger_begin_line(l, step, &line, &size);
    fprintf(out, "\"gates\":[");
    GateSums all = {{0}, 0};
    for (int i = 0; i < layers; i++) {
        gate_sums_merge(&all, &gates[i]);
        for (int b = 0; b < GATE_BRANCHES; b++)
            fprintf(out, "%s%s",
                    b   ? ","
                    : i ? ",["
                        : "[",
                    logger_format_number(mean, sizeof mean, gates[i].sum[b] / (double)gates[i].count));
        fprintf(out, "]");
    }
    fprintf(out, "]}\n");
    logger_end_line(l, out, &line);
    printf("mean gates at step %lld:", (long long)step);
    for (int b = 0; b < GATE_BRANCHES; b++)
        printf("%s %s %.4f", b ? " |" : "", branches[b], all.sum[b] / (double)all.count);
    printf("\n");
    fflush(stdout);
}
#endif
