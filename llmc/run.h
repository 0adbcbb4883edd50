// run.h: a run as both trainers see it: from the command line to the model's shape, the data and the
// place to go on from; validation with recall accuracy; sampling; signals. The trainer brings the
// model: it runs a batch, and tells the logits of the next token.
#ifndef LLMC_RUN_H
#define LLMC_RUN_H
#include "utils.h"
#include "checkpoint.h"
#include "comm.h"
#include "dataloader.h"
#include "logger.h"
#include "options.h"
#include "sampler.h"
#include "schedule.h"
#include "tokenizer.h"
#include <signal.h>

typedef struct {
    Options opt;
    ModelConfig config;
    TrainState state;
    char checkpoint[PATH_BYTES]; // parameters are loaded from it; empty: a new model
    int resuming;                // 1: AdamW's state too
    Tokenizer tokenizer;
    char tokenizer_path[PATH_BYTES];
    int has_tokenizer, eot; // eot: -1 where there is no end-of-text token
    DataLoader train, val;
    Answers *answers;      // [val.shard_count], where val's shards are of the recall task
    int64_t micro_batches; // of a step
    int32_t *inputs, *targets;
    int64_t *cu_seqlens; // of the batch, num_seqs sequences
    int64_t num_seqs;
    Logger log;
    Comm comm;          // with other processes; alone: rank 0 of 1
    int groups, group;  // that each take micro-batches of their own, and which one is this
    int stop;           // the signal that all processes have agreed to end for
    int64_t sample_len; // tokens of context that samples have
} Run;

// ----------------------------------------------------------------------------
// Signals: the step at hand is finished and a checkpoint written before the program ends.

static volatile sig_atomic_t run_signal; // 0, or the signal that asked to stop

static inline void run_on_signal(int number) {
    run_signal = number;
}

static inline void run_catch_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = run_on_signal;
    action.sa_flags = SA_RESETHAND | SA_RESTART; // the second one ends the program at once
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

// ----------------------------------------------------------------------------
// Starting

// tokenizer.bin in the folder of `path`.
static inline int run_tokenizer_beside(Run *r, const char *path) {
    const char *slash = strrchr(path, '/');
    int length = slash ? (int)(slash - path) + 1 : 0;
    if (snprintf(r->tokenizer_path, PATH_BYTES, "%.*stokenizer.bin", length, path) >= PATH_BYTES) return 0;
    r->has_tokenizer = tokenizer_load(&r->tokenizer, r->tokenizer_path) == 0;
    return r->has_tokenizer;
}

// The tokenizer lies beside the shards, and a run leaves a copy beside its checkpoints.
static inline void run_find_tokenizer(Run *r) {
    const char *patterns[2] = {r->opt.train, r->opt.val};
    for (int i = 0; i < 2; i++) {
        glob_t found;
        if (!patterns[i] || glob(patterns[i], 0, NULL, &found) != 0) continue;
        int done = run_tokenizer_beside(r, found.gl_pathv[0]);
        globfree(&found);
        if (done) return;
    }
    if (r->checkpoint[0]) run_tokenizer_beside(r, r->checkpoint);
}

// Copies tokenizer.bin beside the checkpoints, so that samples need nothing else.
static inline void run_copy_tokenizer(const Run *r) {
    char path[PATH_BYTES], bytes[65536];
    if (!r->has_tokenizer) return;
    if (snprintf(path, sizeof path, "%s/tokenizer.bin", r->opt.output) >= (int)sizeof path)
        die("-o %s: the name is too long", r->opt.output);
    FILE *in = fopen(r->tokenizer_path, "rb");
    if (!in) die("cannot read %s: %s", r->tokenizer_path, strerror(errno));
    AtomicFile out;
    atomic_open(&out, path);
    size_t n;
    while ((n = fread(bytes, 1, sizeof bytes, in)) > 0) atomic_write(&out, bytes, n);
    fclose(in);
    atomic_commit(&out);
}

static inline void run_choose_vocab(Run *r, int from_checkpoint) {
    run_find_tokenizer(r);
    ModelConfig *c = &r->config;
    r->eot = r->has_tokenizer ? r->tokenizer.eot : c->vocab_size - 1; // llm.c's GPT-2: the last token
    if (!r->has_tokenizer) return;
    if ((from_checkpoint || options_given(&r->opt, "vocab")) && c->vocab_size != r->tokenizer.vocab_size)
        die("tokenizer.bin has %d tokens, but %s %d: use the data that belongs to it",
            r->tokenizer.vocab_size, from_checkpoint ? "the checkpoint's model has" : "-vocab says",
            c->vocab_size);
    config_set_vocab(c, r->tokenizer.vocab_size);
}

// Finds the other processes, where mpirun, srun or torchrun has started several; dies where this program
// cannot be one of them, or they differ.
static inline void run_join_others(Run *r, int argc, char **argv) {
#ifdef MULTI_GPU
    comm_start(&r->comm);
    uint64_t flags = 0, *all = (uint64_t *)xcalloc((size_t)r->comm.ranks, sizeof *all);
    for (int i = 1; i < argc; i++) flags = checksum(argv[i], strlen(argv[i]), flags + 1);
    comm_allgather(&r->comm, &flags, sizeof flags, all);
    for (int i = 1; i < r->comm.ranks; i++)
        if (all[i] != all[0]) comm_die(&r->comm, "rank %d was started with other flags than rank 0", i);
    free(all);
    if (r->comm.rank > 0 && !freopen("/dev/null", "w", stdout))
        die("cannot open /dev/null: %s", strerror(errno));
#else
    (void)argc, (void)argv;
    const CommLauncher *l = comm_find_launcher();
    if (l)
        die("started %s times at once (by %s, which sets %s), but this program is built for one process: "
            "start it alone, or build the GPU trainer where NCCL is",
            getenv(l->ranks), l->launcher, l->ranks);
    r->comm.ranks = 1;
#endif
    if (r->comm.ranks % r->opt.context != 0)
        die("-cp %lld: %d processes are no multiple of it", (long long)r->opt.context, r->comm.ranks);
    if (r->opt.batch * r->opt.seq_len % (2 * r->opt.context) != 0 && r->opt.context > 1)
        die("-cp %lld: the %lld tokens of a micro-batch are no multiple of twice as many",
            (long long)r->opt.context, (long long)(r->opt.batch * r->opt.seq_len));
    r->groups = r->comm.ranks / (int)r->opt.context;
    r->group = r->comm.rank / (int)r->opt.context;
}

// Reads the command line, decides where to start from, and opens the data. Nothing is written yet but
// the output folder and its log.
static inline void run_start(Run *r, int argc, char **argv) {
    memset(r, 0, sizeof *r);
    Options *o = &r->opt;
    options_parse(o, argc, argv);
    run_join_others(r, argc, argv);
    char msg[CHECKPOINT_MSG_BYTES];
    TrainState saved;
    int training = !o->sample_only && !o->val_only && !o->profile_steps;
    // rank 0 looks for it, since that reads all of it; a path stands for "yes"
    if (o->resume && r->comm.rank == 0) checkpoint_newest(o->output, r->checkpoint);
    comm_broadcast(&r->comm, r->checkpoint, sizeof r->checkpoint);
    if (o->resume && r->checkpoint[0]) {
        r->resuming = 1;
    } else if (!o->preset) {
        snprintf(r->checkpoint, sizeof r->checkpoint, "%s", o->start);
    }
    if (r->checkpoint[0]) {
        if (checkpoint_read_header(r->checkpoint, &r->config, &saved, msg)) die("%s", msg);
        options_check_model(o, &r->config, saved.seq_len);
        if (r->resuming) r->state = saved;
    } else {
        options_model(o, &r->config);
    }
    run_choose_vocab(r, r->checkpoint[0] != 0);
    if (config_check(&r->config, msg, sizeof msg)) die("%s", msg);
    r->micro_batches = options_micro_batches(o, r->groups);

    int64_t tokens = o->batch * o->seq_len;
    r->state.total_batch = tokens * r->micro_batches * r->groups;
    r->sample_len = o->seq_len;
    if (o->train && training)
        loader_open(&r->train, o->train, o->batch, o->seq_len, r->config.vocab_size, 1, o->seed, r->group,
                    r->groups);
    if (o->val && !o->sample_only) {
        loader_open(&r->val, o->val, o->batch, o->seq_len, r->config.vocab_size, 0, o->seed, r->group,
                    r->groups);
        r->answers = (Answers *)xcalloc(r->val.shard_count, sizeof *r->answers);
        int found = 0;
        for (int64_t s = 0; s < r->val.shard_count; s++)
            found += answers_load(&r->answers[s], r->val.shards[s].path) == 0;
        if (!found) free(r->answers), r->answers = NULL;
    }
    r->inputs = (int32_t *)xcalloc(tokens, sizeof *r->inputs);
    r->targets = (int32_t *)xcalloc(tokens, sizeof *r->targets);
    r->cu_seqlens = (int64_t *)xcalloc(tokens + 1, sizeof *r->cu_seqlens);
    if (!training) return;

    if (r->resuming) {
        if (saved.seq_len == o->seq_len && saved.epoch_samples == r->train.samples && saved.seed == o->seed) {
            loader_seek(&r->train, saved.epoch, saved.position);
        } else {
            fprintf(stderr, "note: %s changed since the checkpoint, so a new epoch begins\n",
                    saved.seq_len != o->seq_len ? "-t"
                    : saved.seed != o->seed     ? "-seed"
                                                : "the shards");
            loader_seek(&r->train, saved.epoch + 1, 0);
        }
    }
    r->state.epoch = r->train.epoch;
    r->state.position = r->train.position;
    r->state.seed = o->seed;
    r->state.seq_len = o->seq_len;
    r->state.epoch_samples = r->train.samples;
    if (o->output && r->comm.rank == 0) {
        checkpoint_dir_check(o->output, o->resume);
        run_copy_tokenizer(r);
    }
    logger_open(&r->log, r->comm.rank == 0 ? o->output : NULL, r->resuming ? r->state.step : -1);
}

// What runs, in a few lines.
static inline void run_print(const Run *r, int64_t num_params, size_t bytes) {
    const ModelConfig *c = &r->config;
    const FsaConfig *f = &c->fsa;
    const Options *o = &r->opt;
    static const char *const modes[] = {"nsa", "full", "window"};
    printf(
        "model: %d layers, %d channels, %d/%d heads of %d, hidden %d, vocabulary %d, %.2fM parameters, %s\n",
        c->layers, c->channels, f->q_heads, f->kv_heads, f->head_dim, c->hidden, c->vocab_size,
        (double)num_params * 1e-6, r->checkpoint[0] ? r->checkpoint : "new");
    printf("attention: %s", modes[c->attn]);
    if (c->attn == ATTN_NSA)
        printf(", l %d, s %d, block %d, topk %d (%d first, %d local), window %d, phi %s", f->cmp_len,
               f->cmp_stride, f->block, f->topk, f->init_blocks, f->local_blocks, f->window,
               f->phi == FSA_PHI_LINEAR ? "linear" : "mean");
    if (c->attn == ATTN_WINDOW) printf(", window %d", f->window);
    printf("\n");
    char groups[48] = "";
    if (r->groups > 1) snprintf(groups, sizeof groups, " in each of %d groups", r->groups);
    if (r->train.samples > 0)
        printf("data: %lld tokens in %lld shards, %lld samples of %lld + 1; %lld tokens a step (%lld x %lld "
               "x %lld%s)\n",
               (long long)r->train.tokens, (long long)r->train.shard_count, (long long)r->train.samples,
               (long long)o->seq_len, (long long)r->state.total_batch, (long long)r->micro_batches,
               (long long)o->batch, (long long)o->seq_len, groups);
    printf("memory: %.0f MiB\n", (double)bytes / 1048576.0);
    fflush(stdout);
}

// Takes the next micro-batch of `l` into inputs, targets and cu_seqlens.
static inline void run_batch(Run *r, DataLoader *l) {
    loader_next(l, r->inputs, r->targets);
    r->num_seqs =
        doc_boundaries(r->inputs, l->batch, l->seq_len, r->eot, (int)r->opt.doc_mask, r->cu_seqlens);
}

// Whether the step at hand is finite. Where it is not, dies, or with -skip 1 says that it is left out.
static inline int run_step_is_good(const Run *r, double loss, double norm) {
    if (isfinite(loss) && isfinite(norm)) return 1;
    long long step = (long long)r->state.step + 1;
    if (!r->opt.skip_bad)
        die("step %lld: loss %g, gradient norm %g; training stopped%s, try a lower -l, or -skip 1", step,
            loss, norm, r->opt.output ? " and the checkpoints so far stay" : "");
    if (r->comm.rank == 0)
        fprintf(stderr, "warning: step %lld: loss %g, gradient norm %g; it changes nothing\n", step, loss,
                norm);
    return 0;
}

// Every process calls it after the same step, since one has been signalled: all take it as theirs.
static inline void run_agree_to_stop(Run *r) {
    int mine = run_signal, *all = (int *)xcalloc((size_t)r->comm.ranks, sizeof *all);
    comm_allgather(&r->comm, &mine, sizeof mine, all);
    for (int i = 0; i < r->comm.ranks; i++)
        if (all[i] > r->stop) r->stop = all[i];
    run_signal = r->stop;
    free(all);
}

// Whether the run ends here for a signal: alone at once, else when all know.
static inline int run_stops(const Run *r) {
    return r->comm.ranks > 1 ? r->stop : run_signal;
}

// Counts a finished step, whose batches end at this place of the training data. Returns its number.
static inline int64_t run_step_done(Run *r, int64_t epoch, int64_t position) {
    r->state.epoch = epoch;
    r->state.position = position;
    r->state.tokens += r->state.total_batch;
    return ++r->state.step;
}

// Parameters, m and v as they stand after r->state.step steps.
static inline void run_save(Run *r, const float *params, const float *m, const float *v, int64_t n) {
    checkpoint_save(r->opt.output, &r->config, &r->state, params, m, v, n);
    checkpoint_prune(r->opt.output, r->opt.keep, r->state.step);
}

// ----------------------------------------------------------------------------
// Validation

#define RUN_BUCKETS 24 // bucket k: distances 2^k to 2^(k+1) - 1

// What validation counts; `seen` marks the tokens that are answers.
typedef struct {
    double loss_sum;
    int64_t rows, asked[RUN_BUCKETS], right[RUN_BUCKETS];
    unsigned char seen[]; // [vocab_size]
} RunTally;

// Counts the answers in one row of a batch: sample number `sample` of the validation shards, whose
// predictions for each place are best [seq_len].
static inline void run_count_recall(const Run *r, int64_t sample, const int32_t *best, const int32_t *targets,
                                    RunTally *tally) {
    const DataLoader *l = &r->val;
    int64_t shard = 0, span = l->seq_len + 1;
    while (sample >= loader_shard_samples(l, shard)) sample -= loader_shard_samples(l, shard++);
    const Answers *a = &r->answers[shard];
    int64_t lo = 0, hi = a->count;
    while (lo < hi) { // the first answer in the sample
        int64_t mid = (lo + hi) / 2;
        if (a->answers[mid].index < sample * span)
            lo = mid + 1;
        else
            hi = mid;
    }
    for (; lo < a->count && a->answers[lo].index < (sample + 1) * span; lo++) {
        int64_t at = a->answers[lo].index - sample * span - 1; // predicted from the token before it
        int bucket = 0;
        while (bucket < RUN_BUCKETS - 1 && a->answers[lo].distance >> (bucket + 1)) bucket++;
        if (at < 0) continue;
        tally->asked[bucket]++;
        tally->right[bucket] += best[at] == targets[at];
        tally->seen[targets[at]] = 1;
    }
}

// Adds up what the groups of processes have counted, in their order.
static inline void run_add_tallies(Run *r, RunTally *tally, size_t bytes) {
    char *all = (char *)xmalloc(bytes * (size_t)r->comm.ranks);
    comm_allgather(&r->comm, tally, bytes, all);
    memset(tally, 0, bytes);
    for (int i = 0; i < r->comm.ranks; i += (int)r->opt.context) { // all of a group have counted the same
        const RunTally *t = (const RunTally *)(all + bytes * (size_t)i);
        tally->loss_sum += t->loss_sum;
        tally->rows += t->rows;
        for (int k = 0; k < RUN_BUCKETS; k++) tally->asked[k] += t->asked[k], tally->right[k] += t->right[k];
        for (int k = 0; k < r->config.vocab_size; k++) tally->seen[k] |= t->seen[k];
    }
    free(all);
}

// Runs the batch in r (inputs, targets, cu_seqlens, num_seqs) and returns its tokens' losses and arg
// maxes, [batch * seq_len] each.
typedef void (*RunEvaluate)(void *model, const Run *r, const float **losses, const int32_t **best);

// Mean loss over -m batches of the validation shards (0: all), in their order; logs it, and recall
// accuracy by distance where the shards tell the answers.
static inline double run_validate(Run *r, RunEvaluate evaluate, void *model) {
    DataLoader *l = &r->val;
    const int64_t together = l->batch * r->groups; // samples that the groups take at a time
    int64_t batches = (l->samples + together - 1) / together, from[RUN_BUCKETS];
    if (r->opt.val_batches > 0 && r->opt.val_batches < batches) batches = r->opt.val_batches;
    // a multiple of 8, since several lie one after another
    size_t bytes = (sizeof(RunTally) + (size_t)r->config.vocab_size + 7) / 8 * 8;
    RunTally *tally = (RunTally *)xcalloc(bytes, 1);
    loader_seek(l, 0, 0);
    for (int64_t i = 0; i < batches; i++) {
        const float *losses;
        const int32_t *best;
        int64_t first = i * together + r->group * l->batch;
        run_batch(r, l);
        evaluate(model, r, &losses, &best);
        for (int64_t b = 0; b < l->batch && first + b < l->samples;
             b++, tally->rows++) { // the rest has wrapped
            for (int64_t t = 0; t < l->seq_len; t++) tally->loss_sum += losses[b * l->seq_len + t];
            if (r->answers)
                run_count_recall(r, first + b, best + b * l->seq_len, r->targets + b * l->seq_len, tally);
        }
    }
    run_add_tallies(r, tally, bytes);
    double loss = tally->loss_sum / (double)(tally->rows * l->seq_len);
    logger_val(&r->log, r->state.step, loss);
    if (r->answers) {
        int first = 0, last = RUN_BUCKETS, answers = 0; // answers: different ones
        for (int i = 0; i < r->config.vocab_size; i++) answers += tally->seen[i];
        while (first < RUN_BUCKETS && !tally->asked[first]) first++;
        while (last > first && !tally->asked[last - 1]) last--;
        for (int k = 0; k < RUN_BUCKETS; k++) from[k] = (int64_t)1 << k;
        logger_recall(&r->log, r->state.step, last - first, from + first, tally->asked + first,
                      tally->right + first, answers ? 1.0 / answers : 0);
    }
    free(tally);
    return loss;
}

// ----------------------------------------------------------------------------
// Sampling

// Logits [vocab_size] of the token after tokens [n].
typedef const float *(*RunLogits)(void *model, const int32_t *tokens, int64_t n);

// Prints -prompt and -g tokens that go on from it, or fewer where an end-of-text comes. The context is
// at most sample_len tokens; where it is full, its older half is dropped.
static inline void run_sample(Run *r, RunLogits logits, void *model) {
    const Options *o = &r->opt;
    int64_t room = r->sample_len, n = 0;
    int vocab = r->config.vocab_size;
    int32_t *tokens = (int32_t *)xmalloc((size_t)(room + 1) * sizeof *tokens);
    int32_t *order = (int32_t *)xmalloc((size_t)vocab * sizeof *order);
    float *probs = (float *)xmalloc((size_t)vocab * sizeof *probs);
    if (r->eot >= 0) tokens[n++] = r->eot;
    if (o->prompt && o->prompt[0]) {
        if (!r->has_tokenizer)
            die("-prompt: no tokenizer.bin beside the shards or the checkpoint to read it with");
        int64_t count =
            tokenizer_encode(&r->tokenizer, o->prompt, (int64_t)strlen(o->prompt), tokens + n, room - n);
        if (count > room - n - 1)
            die("-prompt: %lld tokens, but a context of %lld leaves room for %lld", (long long)count,
                (long long)room, (long long)(room - n - 1));
        n += count;
    }
    if (n == 0) die("-sample 1: the vocabulary has no end-of-text token to start from, give -prompt");
    int64_t begin = n > 0 && tokens[0] == r->eot ? 1 : 0, printed = begin;
    Rng rng;
    rng_seed(&rng, (uint64_t)o->seed, 0x73616d70);
    rng.counter = (uint64_t)r->state.draws;
    printf("sample: ");
    for (int64_t i = 0; i <= o->generate; i++) {
        if (r->has_tokenizer) {
            if (printed > begin && r->tokenizer.kind == TOKENIZER_WORDS) printf(" ");
            tokenizer_print(&r->tokenizer, stdout, tokens + printed, n - printed);
        } else {
            for (int64_t j = printed; j < n; j++) printf("%d ", tokens[j]);
        }
        fflush(stdout);
        printed = n;
        if (i == o->generate) break;
        int next = sample_token(logits(model, tokens, n), vocab, o->temperature, o->top_p, rng_uniform(&rng),
                                order, probs);
        if (next == r->eot) break;
        if (n == room) {
            memmove(tokens, tokens + room / 2, (size_t)(room - room / 2) * sizeof *tokens);
            n = printed = room - room / 2;
            begin = 0;
        }
        tokens[n++] = next;
    }
    printf("\n");
    fflush(stdout);
    r->state.draws = (int64_t)rng.counter;
    free(tokens), free(order), free(probs);
}

static inline void run_end(Run *r) {
    logger_close(&r->log);
    if (r->train.samples > 0) loader_close(&r->train);
    if (r->answers) {
        for (int64_t s = 0; s < r->val.shard_count; s++) answers_free(&r->answers[s]);
        free(r->answers);
    }
    if (r->val.samples > 0) loader_close(&r->val);
    if (r->has_tokenizer) tokenizer_free(&r->tokenizer);
    free(r->inputs), free(r->targets), free(r->cu_seqlens);
    comm_end(&r->comm);
}
#endif
