// profile_report.cuh: what -profile prints and records: the time of each part of a training step or of a
// forward pass.
#ifndef LLMC_PROFILE_REPORT_CUH
#define LLMC_PROFILE_REPORT_CUH
#include "ceilings.cuh"
#include "run.h"
#include "profile.cuh"
#include "results.h"
#include <algorithm>

// Measurements of a training step or of a forward pass.
struct PassTimes {
    bool step;                           // false: a forward pass
    double flops;                        // of a pass, on all GPUs
    int64_t tokens;                      // the same
    PartWork work[PART_END];             // on one GPU
    std::vector<std::vector<double>> ms; // [passes][PART_END]
};

// Returns the pass of a profile before its first measurement: a training step or a forward pass of a
// micro-batch.
static PassTimes profile_pass(const Run *r, bool step) {
    const Options *o = &r->opt;
    const PassWork work = {step,
                           strcmp(o->matmul, "fp8") == 0,
                           (int)o->recompute,
                           o->batch,
                           o->seq_len,
                           (int)o->cp_size,
                           r->micro_batches};
    PassTimes t = {step, 0, step ? r->state.total_batch : o->batch * o->seq_len * r->dp_size, {}, {}};
    profile_work(&r->config, &work, t.work);
    return t;
}

// Returns the part's work per second, in TFLOP/s or TB/s, and sets *fraction to its fraction of what the GPU
// reaches; 0: unknown.
static double part_rate(const PartWork *w, const Ceilings *ceilings, double ms, double *fraction) {
    const double ceiling = ceilings->rate[w->limit], rate = ms > 0 ? w->amount / (1e-3 * ms) : 0;
    *fraction = ceiling > 0 ? rate / ceiling : 0;
    return 1e-12 * rate;
}

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

// Appends the median times `parts` [PART_END] and their total to dev/results.
static void profile_record(const Run *r, const char *gpu, double peak, size_t memory_bytes,
                           const Ceilings *ceilings, const PassTimes *t, double total, const double *parts) {
    static const char *const modes[] = {"nsa", "full", "window"};
    const ModelConfig *c = &r->config;
    const FsaConfig *f = &c->fsa;
    FILE *file = r->comm.rank == 0 ? results_open(gpu, r->comm.ranks, "train_gpt_nsa", build_commit()) : NULL;
    if (!file) return;
    fprintf(file,
            ",\"part\":\"step\",\"attn\":\"%s\",\"dir\":\"%s\",\"n\":%lld,\"hq\":%d,\"hkv\":%d,\"d\":%d,"
            "\"block\":%d,\"topk\":%d,\"dtype\":\"%s\",\"ms\":%.4f,\"tflops\":%.2f",
            modes[c->attn], t->step ? "step" : "fwd", (long long)r->opt.seq_len, f->q_heads, f->kv_heads,
            f->head_dim, f->block, f->topk, FLOATX_NAME, total, t->flops / total * 1e-9);
    if (f->cmp_len != 32) fprintf(file, ",\"l\":%d", f->cmp_len);
    if (f->cmp_stride != 16) fprintf(file, ",\"s\":%d", f->cmp_stride);
    if (f->window != 512) fprintf(file, ",\"W\":%d", f->window);
    if (c->full_every > 0) fprintf(file, ",\"full_every\":%d", c->full_every);
    if (strcmp(r->opt.matmul, "bf16")) fprintf(file, ",\"matmul\":\"%s\"", r->opt.matmul);
    if (r->opt.batch > 1) fprintf(file, ",\"sequences\":%lld", (long long)r->opt.batch);
    if (r->comm.ranks > 1)
        fprintf(file, ",\"zero\":%d,\"cp\":%d", (int)r->opt.zero_stage, (int)r->opt.cp_size);
    fprintf(file,
            ",\"layers\":%d,\"channels\":%d,\"hidden\":%d,\"vocab\":%d,\"micro_batches\":%lld,"
            "\"recompute\":%d,\"tokens_per_second\":%.1f,\"mfu\":%.4f,\"memory_bytes\":%zu,\"split\":{",
            c->layers, c->channels, c->hidden, c->vocab_size, (long long)r->micro_batches,
            (int)r->opt.recompute, 1e3 * (double)t->tokens / total,
            peak > 0 ? t->flops / (total * 1e-3) / (peak * 1e12) : 0, memory_bytes);
    for (int i = 0; i < PART_END; i++) fprintf(file, "%s\"%s\":%.4f", i ? "," : "", part_key(i), parts[i]);
    fprintf(file, "},\"ceilings\":{\"tflops\":%.1f,\"fp8_tflops\":%.1f,\"copy_tbs\":%.3f},\"of_ceiling\":{",
            1e-12 * ceilings->rate[LIMIT_MATMUL_16], 1e-12 * ceilings->rate[LIMIT_MATMUL_8],
            1e-12 * ceilings->rate[LIMIT_MEMORY]);
    for (int i = 0; i < PART_END; i++) {
        double fraction;
        part_rate(&t->work[i], ceilings, parts[i], &fraction);
        fprintf(file, "%s\"%s\":%.3f", i ? "," : "", part_key(i), fraction);
    }
    fprintf(file, "}}\n");
    fclose(file);
}

// Prints the median milliseconds of each part, its work, its rate and how much that is of what the GPU
// reaches, and appends them to dev/results. gpu: the device name; peak: of all GPUs, in TFLOP/s, 0: unknown;
// memory_bytes: of one GPU.
static void profile_report(const Run *r, const char *gpu, double peak, size_t memory_bytes,
                           const Ceilings *ceilings, const PassTimes *t) {
    std::vector<double> totals, parts[PART_END];
    double medians[PART_END];
    for (const std::vector<double> &pass : t->ms) {
        totals.push_back(0);
        for (int i = 0; i < PART_END; i++) parts[i].push_back(pass[i]), totals.back() += pass[i];
    }
    for (int i = 0; i < PART_END; i++) medians[i] = median(parts[i]);
    const double total = median(totals);
    printf("\n%s, median of %zu: %.2f ms, %.0f tokens/s, %.1f TFLOP/s",
           t->step ? "training step" : "forward pass", t->ms.size(), total, 1e3 * (double)t->tokens / total,
           t->flops / total * 1e-9);
    if (peak > 0) printf(", mfu %.1f%%", 100 * (t->flops / (total * 1e-3) / (peak * 1e12)));
    printf("\n");
    for (int i = 0; i < PART_END; i++) {
        static const char *const format[LIMITS] = {"  %9.3f TFLOP  %7.0f TFLOP/s, %5.1f%% of 16-bit matmuls",
                                                   "  %9.3f TFLOP  %7.0f TFLOP/s, %5.1f%% of fp8 matmuls",
                                                   "  %9.3f TB     %7.2f TB/s,    %5.1f%% of a copy"};
        const PartWork *w = &t->work[i];
        double fraction, rate = part_rate(w, ceilings, medians[i], &fraction);
        if (medians[i] == 0) continue;
        printf("  %-20s %9.2f ms %5.1f%%", part_names[i], medians[i], 100 * medians[i] / total);
        if (fraction > 0) printf(format[w->limit], 1e-12 * w->amount, rate, 100 * fraction);
        printf("\n");
    }
    profile_record(r, gpu, peak, memory_bytes, ceilings, t, total, medians);
}
#endif
