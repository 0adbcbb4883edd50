// run.h: the parts of a run that both trainers share: the setup of configuration, data and checkpoint from
// the command line; validation, recall accuracy and other evaluations; text generation; signals. The trainer
// provides the model, as functions that evaluate a batch and return the logits of the next token.
#ifndef LLMC_RUN_H
#define LLMC_RUN_H
#include "utils.h"
#include "checkpoint.h"
#include "comm.h"
#include "dataloader.h"
#include "gate_means.h"
#include "logger.h"
#include "options.h"
#include "position_loss.h"
#include "sampler.h"
#include "schedule.h"
#include "tokenizer.h"
#include <poll.h>
#include <signal.h>

typedef struct {
    Options opt;
    ModelConfig config;
    TrainState state;
    char checkpoint[PATH_BYTES]; // path of the checkpoint to load the parameters from; empty: a new model
    int resuming;                // 1: load AdamW's moments and the state too
    ParamInit init;              // of the parameters that no checkpoint has
    Tokenizer tokenizer;
    char tokenizer_path[PATH_BYTES];
    int has_tokenizer, eot; // eot: id of the end-of-text token, -1: none
    DataLoader train, val;
    Answers *answers;     // [val.shard_count] for shards of the recall task, else NULL
    EvalFile *eval_files; // [num_eval_files] of -hellaswag, -mc and -needle
    int64_t num_eval_files;
    GateSums *gates;       // [layers], to which the trainer adds those of a validated batch; NULL: not wanted
    int64_t micro_batches; // per step
    int32_t *inputs, *targets; // [batch, seq_len] each, the current batch
    int64_t *cu_seqlens;       // [num_seqs + 1], of the current batch
    int64_t num_seqs;
    Logger log;
    const char *gpu;      // name of the GPU; NULL: none
    int64_t timed_steps;  // steps of this process
    double timed_seconds; // in them, without validation, samples and checkpoints
    Comm comm;            // this process among all; alone: rank 0 of 1
    // A data-parallel rank is a group of opt.cp_size processes. dp_size: number of groups; dp_rank: the group
    // of this process.
    int dp_size, dp_rank;
    int lock;               // descriptor of the lock of -o, on rank 0; 0 or -1: none
    int stop_signal;        // the signal after which all processes stop; 0: none
    int64_t sample_context; // largest context of generated text, in tokens
} Run;

// ----------------------------------------------------------------------------
// Signals. After SIGINT, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 (Slurm's warning, --signal) the trainer finishes
// the current step, writes a checkpoint and exits.

static volatile sig_atomic_t run_signal; // 0, or the number of the received signal
static const char *run_signal_note;      // the first signal prints it to stderr; NULL: nothing

static inline void run_handle_signal(int number) {
    const int first = !run_signal, error = errno;
    struct pollfd console = {STDERR_FILENO, POLLOUT, 0};
    run_signal = number;
    if (first && run_signal_note && poll(&console, 1, 0) == 1 && console.revents == POLLOUT) {
        const ssize_t written = write(STDERR_FILENO, run_signal_note, strlen(run_signal_note));
        (void)written; // the run stops whether or not somebody reads it
    }
    errno = error;
}

// Installs the signal handlers. A second SIGINT or SIGTERM kills the program. SIGHUP stays ignored under
// nohup.
static inline void run_install_signal_handlers(const Run *r) {
    if (r->comm.rank == 0)
        run_signal_note = r->opt.output
                              ? "note: stopping after this step, with a checkpoint; the same signal "
                                "again stops at once, without one\n"
                              : "note: stopping after this step\n";
    const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2};
    struct sigaction action, old;
    memset(&action, 0, sizeof action);
    action.sa_handler = run_handle_signal;
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++) {
        int kills = signals[i] == SIGINT || signals[i] == SIGTERM;
        if (signals[i] == SIGHUP && sigaction(SIGHUP, NULL, &old) == 0 && old.sa_handler == SIG_IGN) continue;
        action.sa_flags = SA_RESTART | (kills ? (int)SA_RESETHAND : 0);
        sigaction(signals[i], &action, NULL);
    }
}

// ----------------------------------------------------------------------------
// Setup

// Loads tokenizer.bin from the folder of `path`, if it is there and was not loaded last. Dies if its text
// tokens are not those of the tokenizer that was loaded before. flag: for messages.
static inline void run_load_tokenizer(Run *r, const char *flag, const char *path) {
    static const char *const makers[] = {"build/text -o FOLDER TEXT", "build/recall -o FOLDER"};
    Tokenizer t;
    char file[PATH_BYTES];
    const char *slash = strrchr(path, '/');
    int length = slash ? (int)(slash - path) + 1 : 0;
    if (snprintf(file, sizeof file, "%.*stokenizer.bin", length, path) >= (int)sizeof file) return;
    if (strcmp(file, r->tokenizer_path) == 0 || tokenizer_load(&t, file) != 0) return;
    if (r->has_tokenizer && tokenizer_checksum(&t) != tokenizer_checksum(&r->tokenizer))
        die("%s %s: another tokenizer than %s; make all data with the latter: %s", flag, file,
            r->tokenizer_path,
            r->tokenizer.kind < TOKENIZER_BPE ? makers[r->tokenizer.kind]
                                              : "data/bpe -o FOLDER --tokenizer ITS_TOKENIZER_JSON TEXT");
    if (r->has_tokenizer) tokenizer_free(&r->tokenizer);
    r->tokenizer = t;
    r->has_tokenizer = 1;
    memcpy(r->tokenizer_path, file, sizeof file);
}

// Loads tokenizer.bin from the folders of the checkpoint, the validation shards and the training shards,
// which must have the same one. The last one counts: it names the end-of-text token of the shards.
static inline void run_find_tokenizer(Run *r) {
    const char *const flags[] = {"-j", "-i"}, *const patterns[] = {r->opt.val, r->opt.train};
    if (r->checkpoint[0]) run_load_tokenizer(r, "-e", r->checkpoint);
    for (int i = 0; i < 2; i++) {
        glob_t found;
        if (!patterns[i] || glob(patterns[i], 0, NULL, &found) != 0) continue;
        for (size_t k = 0; k < found.gl_pathc; k++) run_load_tokenizer(r, flags[i], found.gl_pathv[k]);
        globfree(&found);
    }
}

// Copies tokenizer.bin to the output folder, so that text generation needs no other files.
static inline void run_copy_tokenizer(const Run *r) {
    char path[PATH_BYTES], buffer[65536];
    if (!r->has_tokenizer) return;
    if (snprintf(path, sizeof path, "%s/tokenizer.bin", r->opt.output) >= (int)sizeof path)
        die("-o %s: the name is too long; choose a shorter path", r->opt.output);
    FILE *source = fopen(r->tokenizer_path, "rb");
    if (!source) die("cannot read %s: %s; check its permissions", r->tokenizer_path, strerror(errno));
    AtomicFile copy;
    atomic_open(&copy, path);
    size_t n;
    while ((n = fread(buffer, 1, sizeof buffer, source)) > 0) atomic_write(&copy, buffer, n);
    if (ferror(source)) die("cannot read %s: %s; check the disk", r->tokenizer_path, strerror(errno));
    fclose(source);
    atomic_commit(&copy);
}

// Sets the vocabulary size from the tokenizer, if there is one; dies if the tokenizer has more tokens than
// -vocab or the checkpoint. It may have fewer, since some models pad their vocabulary.
static inline void run_set_vocab(Run *r, int from_checkpoint) {
    run_find_tokenizer(r);
    ModelConfig *c = &r->config;
    int tokens = r->tokenizer.vocab_size, given = from_checkpoint || options_given(&r->opt, "vocab");
    const char *source = from_checkpoint ? "the checkpoint's vocabulary" : "-vocab";
    r->eot = r->has_tokenizer ? r->tokenizer.eot : c->vocab_size - 1; // the last token, as in GPT-2
    if (!r->has_tokenizer) return;
    if (given && c->vocab_size < tokens)
        die("%s %d: tokenizer.bin has %d tokens; use data of the same tokenizer", source, c->vocab_size,
            tokens);
    if (given && c->vocab_size > tokens && r->comm.rank == 0)
        fprintf(stderr, "note: %s %d: tokenizer.bin has %d tokens; text samples contain only these\n", source,
                c->vocab_size, tokens);
    if (!given) config_set_vocab(c, tokens);
}

// Connects to the other processes if a launcher has started several. Dies if this build supports only one
// process, if the processes have different flags, or if their number does not fit -cp.
static inline void run_connect_ranks(Run *r, int argc, char **argv) {
#ifdef MULTI_GPU
    comm_start(&r->comm);
    uint64_t flags_checksum = 0, *checksums = (uint64_t *)xcalloc((size_t)r->comm.ranks, sizeof *checksums);
    for (int i = 1; i < argc; i++) flags_checksum = checksum(argv[i], strlen(argv[i]), flags_checksum + 1);
    comm_allgather(&r->comm, &flags_checksum, sizeof flags_checksum, checksums);
    for (int i = 1; i < r->comm.ranks; i++)
        if (checksums[i] != checksums[0])
            comm_die(&r->comm, "rank %d was started with other flags than rank 0; give all the same flags",
                     i);
    free(checksums);
    if (r->comm.rank > 0 && !freopen("/dev/null", "w", stdout))
        die("cannot open /dev/null: %s; check the host", strerror(errno));
#else
    (void)argc, (void)argv;
    const CommLauncher *l = comm_find_launcher();
    if (l)
        die("%s %s: %s started several processes, but this build runs as one; start it alone, or build the "
            "GPU trainer with NCCL",
            l->ranks, getenv(l->ranks), l->launcher);
    r->comm.ranks = 1;
#endif
    if (r->comm.ranks % r->opt.cp_size != 0)
        die("-cp %lld: must divide the number of processes, %d", (long long)r->opt.cp_size, r->comm.ranks);
    r->dp_size = r->comm.ranks / (int)r->opt.cp_size;
    r->dp_rank = r->comm.rank / (int)r->opt.cp_size;
}

// Returns the checksum of a file's size and of four samples of 16 KiB; 0: there is no such file.
static inline uint64_t run_file_checksum(const char *path) {
    enum { SAMPLES = 4, BYTES = 16384 };
    char *data = (char *)xmalloc(BYTES);
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    uint64_t sum = 0;
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        int64_t last = st.st_size > BYTES ? st.st_size - BYTES : 0; // offset of the last sample
        sum = checksum(&st.st_size, sizeof st.st_size, 1);
        for (int i = 0; i < SAMPLES; i++) {
            ssize_t n =
                pread(fd, data, BYTES,
                      (off_t)(last / (SAMPLES - 1) * i + (i == SAMPLES - 1) * (last % (SAMPLES - 1))));
            if (n < 0) die("cannot read %s: %s; check its disk", path, strerror(errno));
            sum = checksum(data, (size_t)n, sum);
        }
    }
    if (fd >= 0) close(fd);
    free(data);
    return sum;
}

// Returns the identity of the training data. Reads at most 64 KiB of each shard.
static inline DataIdentity run_data_identity(const Run *r) {
    DataIdentity d;
    glob_t found;
    memset(&d, 0, sizeof d);
    if (r->has_tokenizer) d.tokenizer = run_file_checksum(r->tokenizer_path);
    if (glob(r->opt.train, 0, NULL, &found) != 0) return d;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        Shard s;
        shard_open(&s, found.gl_pathv[i]);
        shard_close(&s);
        const char *name = file_name(s.path);
        d.shards++;
        d.tokens += s.count;
        d.names = checksum(name, strlen(name), d.names + (uint64_t)s.count);
        d.contents = checksum(&d.contents, sizeof d.contents, run_file_checksum(s.path));
        if (i == 0) snprintf(d.first, sizeof d.first, "%s", name);
        snprintf(d.last, sizeof d.last, "%s", name);
    }
    globfree(&found);
    return d;
}

// Dies if the training data is not that of the checkpoint, `saved`; with -new-data 1 notes it instead.
// Returns whether it is the same or unknown.
static inline int run_check_data(const Run *r, const DataIdentity *saved) {
    const DataIdentity *d = &r->state.data;
    char change[512] = "";
    if (saved->shards == 0) return 1;
    if (saved->shards != d->shards || saved->tokens != d->tokens || saved->names != d->names)
        snprintf(change, sizeof change,
                 "%lld %s %s to %s of %lld tokens, but the run has %lld %s %s to %s of %lld tokens",
                 (long long)d->shards, d->shards == 1 ? "shard" : "shards", d->first, d->last,
                 (long long)d->tokens, (long long)saved->shards, saved->shards == 1 ? "shard" : "shards",
                 saved->first, saved->last, (long long)saved->tokens);
    else if (saved->contents != d->contents)
        snprintf(change, sizeof change, "the shards %s to %s have other tokens than those of the run",
                 d->first, d->last);
    else if (saved->tokenizer != d->tokenizer)
        snprintf(change, sizeof change, "its tokenizer.bin is not that of the run");
    if (!change[0]) return 1;
    if (!r->opt.new_data) die("-i %s: %s; give the data of the run, or -new-data 1", r->opt.train, change);
    fprintf(stderr, "note: -i %s: %s; a new epoch begins\n", r->opt.train, change);
    return 0;
}

// Dies if a glob pattern of shards matches nothing, a folder, or a file that is no shard. flag: for messages.
static inline void run_check_shards(const char *flag, const char *pattern) {
    glob_t found;
    struct stat st;
    Shard s;
    if (!pattern) return;
    if (glob(pattern, 0, NULL, &found) != 0)
        die("no shard matches '%s': check the pattern, or make data first with build/recall, build/text or "
            "data/bpe",
            pattern);
    if (stat(found.gl_pathv[0], &st) == 0 && S_ISDIR(st.st_mode))
        die("%s %s: is a folder; give a quoted pattern of the shards in it, such as %s '%s/*_train_*.bin'",
            flag, found.gl_pathv[0], flag, found.gl_pathv[0]);
    shard_open(&s, found.gl_pathv[0]);
    shard_close(&s);
    globfree(&found);
}

// Sets the model's configuration, the initial values of parameters that the checkpoint has not, and *saved,
// the checkpoint's state. Dies if it contradicts the command line.
static inline void run_read_checkpoint(Run *r, TrainState *saved) {
    char msg[CHECKPOINT_MSG_BYTES];
    Checkpoint k;
    if (checkpoint_open(&k, r->checkpoint, msg) != 0)
        die("%s; choose another checkpoint, or make one of a GGUF file or a Hugging Face folder with "
            "scripts/from_hf.py",
            msg);
    checkpoint_close(&k);
    if (r->resuming && k.arrays == 1)
        die("%s: holds weights alone, so no run can resume from it; start one with -e %s and another -o",
            r->checkpoint, r->checkpoint);
    r->config = k.config;
    *saved = k.state;
    options_check_model(&r->opt, &r->config, saved->seq_len, r->resuming);
    if (k.arrays == 1 && r->opt.seq_len > saved->seq_len && !options_given(&r->opt, "theta") &&
        r->comm.rank == 0)
        fprintf(
            stderr,
            "note: -t %lld: the model was made for %lld tokens; a longer context needs training, and often a "
            "larger -theta\n",
            (long long)r->opt.seq_len, (long long)saved->seq_len);
    if (r->resuming) r->state = *saved;
    if (r->opt.val_only) r->state.step = saved->step, r->state.tokens = saved->tokens; // to log
    const int new_gates = r->config.attn == ATTN_NSA && k.config.attn != ATTN_NSA;
    if (r->opt.gate_bias && r->config.attn == ATTN_NSA && !new_gates && !r->resuming)
        die("-gate-bias %s: the checkpoint has gates; drop the flag", r->opt.gate_bias);
    if (!new_gates || r->opt.gate_bias) return;
    // The selected branch sees all tokens of short texts. With this gate, a model that was trained with full
    // attention loses least.
    static const double gates[3] = {0.05, 0.9, 0.05};
    for (int i = 0; i < 3; i++) r->init.gate_bias[i] = log(gates[i] / (1 - gates[i]));
}

// Sets the batch of -sample 1 to one sequence, as long as the prompt and the generated tokens can become on
// the one GPU that generates them, unless -b or -t are given. A token has at least one byte, and the prompt
// two special tokens at most.
static inline void run_shrink_to_sample(Run *r) {
    Options *o = &r->opt;
    const int64_t tokens = (o->prompt ? (int64_t)strlen(o->prompt) : 0) + 2 + o->generate;
    const int64_t most = (tokens + tokens % 2) * o->cp_size; // a multiple of 2*cp
    o->total_batch = 0;                                      // no training
    if (!options_given(o, "b")) o->batch = 1;
    if (!options_given(o, "t") && most < o->seq_len) o->seq_len = most;
}

// Loads the files that match a glob pattern, unless it is NULL. flag: for messages. Dies if a file is invalid
// or has a choice or a needle that does not fit into a context.
static inline void run_load_eval_files(Run *r, const char *flag, const char *pattern, EvalKind kind) {
    glob_t found;
    const int64_t seq_len = r->opt.seq_len;
    if (!pattern) return;
    if (glob(pattern, 0, NULL, &found) != 0)
        die("%s %s: no such file; make it with %s", flag, pattern,
            kind == EVAL_NEEDLE ? "data/needle" : "data/hellaswag or data/mc");
    for (size_t i = 0; i < found.gl_pathc; i++) {
        int64_t cut = 0; // contexts that lose their beginning
        r->eval_files =
            (EvalFile *)realloc(r->eval_files, (size_t)(r->num_eval_files + 1) * sizeof *r->eval_files);
        if (!r->eval_files) die("out of memory: %s %s", flag, pattern);
        EvalFile *f = &r->eval_files[r->num_eval_files++];
        eval_load(f, flag, found.gl_pathv[i], kind, r->config.vocab_size,
                  r->has_tokenizer ? &r->tokenizer : NULL, r->tokenizer_path);
        for (int64_t c = 0; c < f->num_choices; c++) {
            const int64_t needed =
                kind == EVAL_NEEDLE ? eval_choice_inputs(f, &f->choices[c]) : f->choices[c].tokens;
            if (needed > seq_len)
                die("%s %s: example %lld needs %lld tokens, but the context has %lld; raise -t, or make "
                    "shorter "
                    "examples",
                    flag, f->path, (long long)f->choices[c].example, (long long)needed, (long long)seq_len);
            cut += eval_choice_inputs(f, &f->choices[c]) > seq_len;
        }
        if (cut > 0 && r->comm.rank == 0)
            fprintf(stderr,
                    "note: %s %s: %lld of %lld choices need more than -t %lld; their contexts lose their "
                    "beginning\n",
                    flag, f->path, (long long)cut, (long long)f->num_choices, (long long)seq_len);
    }
    globfree(&found);
}

// Creates the output folder and its log, and copies tokenizer.bin there for the checkpoints.
static inline void run_open_output(Run *r) {
    const Options *o = &r->opt;
    if (o->output && r->comm.rank == 0) {
        make_dirs(o->output);
        if (!r->lock) r->lock = folder_lock("-o", o->output);
        checkpoint_dir_check(o->output, o->resume || o->val_only); // -val 1 writes a log alone
        if (!o->resume && logger_has_lines(o->output))
            die("-o %s: has a log already; %s", o->output,
                o->val_only ? "-val 1 needs a folder without one"
                            : "choose another folder, or resume with -y 1");
        if (!o->val_only) run_copy_tokenizer(r);
    }
    logger_open(&r->log, r->comm.rank == 0 ? o->output : NULL, r->resuming ? r->state.step : -1);
}

// Sets up a run: parses the command line, connects the processes, chooses the checkpoint to start from, sets
// the model's configuration and opens the data. Creates the output folder and its log; writes nothing else.
static inline void run_start(Run *r, int argc, char **argv) {
    memset(r, 0, sizeof *r);
    Options *o = &r->opt;
    open_standard_files();
    options_parse(o, argc, argv);
    run_connect_ranks(r, argc, argv);
    char msg[CHECKPOINT_MSG_BYTES];
    TrainState saved;
    memset(&saved, 0, sizeof saved);
    if (!o->sample_only) run_check_shards("-i", o->train), run_check_shards("-j", o->val);
    int training = !o->sample_only && !o->val_only && !o->profile_steps;
    if (training) signal(SIGPIPE, SIG_IGN); // a closed console does not end a training run
    // only rank 0 searches, because that reads whole checkpoints; an empty path means that there is none
    if (o->resume && r->comm.rank == 0) {
        struct stat st;
        if (stat(o->output, &st) == 0 && S_ISDIR(st.st_mode)) r->lock = folder_lock("-o", o->output);
        checkpoint_newest(o->output, r->checkpoint);
    }
    comm_broadcast(&r->comm, r->checkpoint, sizeof r->checkpoint);
    if (o->resume && r->checkpoint[0]) {
        r->resuming = 1;
    } else if (!o->preset) {
        snprintf(r->checkpoint, sizeof r->checkpoint, "%s", o->init_from);
    }
    r->init.seed = (uint64_t)o->seed;
    memcpy(r->init.gate_bias, o->gate_bias_value, sizeof r->init.gate_bias);
    if (r->checkpoint[0])
        run_read_checkpoint(r, &saved);
    else
        options_model(o, &r->config);
    if (o->gate_bias && r->config.attn != ATTN_NSA)
        die("-gate-bias %s: only -attn nsa has gates; drop the flag", o->gate_bias);
    run_set_vocab(r, r->checkpoint[0] != 0);
    if (training && !r->checkpoint[0] && !options_given(o, "e") &&
        !(r->has_tokenizer && r->tokenizer.kind == TOKENIZER_WORDS))
        die("-e: choose a model for this data: a preset such as tiny (CPU) or gpt-124m (GPU), or a "
            "checkpoint; "
            "-h lists the presets");
    if (config_check(&r->config, msg, sizeof msg)) die("%s", msg);
    if (o->sample_only) run_shrink_to_sample(r);
    if (o->batch * o->seq_len % (2 * o->cp_size) != 0 && o->cp_size > 1)
        die("-cp %lld: b*t = %lld must be a multiple of 2*cp = %lld; change -t", (long long)o->cp_size,
            (long long)(o->batch * o->seq_len), (long long)(2 * o->cp_size));
    r->micro_batches = options_micro_batches(o, r->dp_size);

    int64_t tokens = o->batch * o->seq_len;
    r->state.total_batch = tokens * r->micro_batches * r->dp_size;
    r->sample_context = o->seq_len;
    if (o->train && training)
        loader_open(&r->train, o->train, o->batch, o->seq_len, r->config.vocab_size, 1, o->seed, r->dp_rank,
                    r->dp_size);
    if (o->val && !o->sample_only) {
        loader_open(&r->val, o->val, o->batch, o->seq_len, r->config.vocab_size, 0, o->seed, r->dp_rank,
                    r->dp_size);
        if (r->comm.rank == 0) loader_warn_shared(&r->train, &r->val);
        r->answers = (Answers *)xcalloc(r->val.shard_count, sizeof *r->answers);
        int found = 0;
        for (int64_t s = 0; s < r->val.shard_count; s++)
            found += answers_load(&r->answers[s], &r->val.shards[s]) == 0;
        if (!found) free(r->answers), r->answers = NULL;
    }
    if (training || o->val_only) {
        run_load_eval_files(r, "-hellaswag", o->hellaswag, EVAL_CHOICE);
        run_load_eval_files(r, "-mc", o->multiple_choice, EVAL_CHOICE);
        run_load_eval_files(r, "-needle", o->needle, EVAL_NEEDLE);
    }
    if (training)
        options_set_schedule(o, saved.lr, saved.warmup,
                             r->train.samples / (r->micro_batches * o->batch * r->dp_size));
    r->state.lr = o->lr;
    r->state.warmup = o->warmup;
    r->inputs = (int32_t *)calloc(tokens, sizeof *r->inputs);
    r->targets = (int32_t *)calloc(tokens, sizeof *r->targets);
    r->cu_seqlens = (int64_t *)calloc(tokens + 1, sizeof *r->cu_seqlens);
    if (!r->inputs || !r->targets || !r->cu_seqlens)
        die("out of memory: %.2f GiB for batches of %lld tokens; lower -b or -t", 16.0 * tokens / (1 << 30),
            (long long)tokens);
    if (o->val_only) run_open_output(r);
    if (!training) return;

    int same_data = 1;
    if (r->comm.rank == 0) r->state.data = run_data_identity(r); // only rank 0 writes the header
    if (r->resuming && r->comm.rank == 0) same_data = run_check_data(r, &saved.data);
    comm_broadcast(&r->comm, &same_data, sizeof same_data);
    if (r->resuming) {
        if (!same_data) {
            loader_seek(&r->train, saved.epoch + 1, 0);
        } else if (saved.seq_len == o->seq_len && saved.epoch_samples == r->train.samples &&
                   saved.seed == o->seed) {
            loader_seek(&r->train, saved.epoch, saved.position);
        } else {
            if (r->comm.rank == 0)
                fprintf(stderr, "note: %s changed since the checkpoint; a new epoch begins\n",
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
    run_open_output(r);
}

// Prints the model, the attention mode, the data and the memory of the run. bytes: memory of the model and
// its activations.
static inline void run_print_summary(const Run *r, int64_t num_params, size_t bytes) {
    const ModelConfig *c = &r->config;
    const FsaConfig *f = &c->fsa;
    const Options *o = &r->opt;
    static const char *const modes[] = {"nsa", "full", "window"};
    printf("model: %d layers, %d channels, %d query / %d KV heads, head size %d, hidden %d, vocabulary %d, "
           "%.2fM parameters, %s\n",
           c->layers, c->channels, f->q_heads, f->kv_heads, f->head_dim, c->hidden, c->vocab_size,
           (double)num_params * 1e-6, r->checkpoint[0] ? r->checkpoint : "new");
    printf("attention: %s", modes[c->attn]);
    if (c->attn == ATTN_NSA)
        printf(", %s compression of %d tokens every %d, %d of the blocks of %d (%d initial, %d local), "
               "window %d",
               f->phi == FSA_PHI_LINEAR ? "linear" : "mean", f->cmp_len, f->cmp_stride, f->topk, f->block,
               f->init_blocks, f->local_blocks, f->window);
    if (c->attn == ATTN_WINDOW) printf(", window %d", f->window);
    if (c->full_every > 0)
        printf("; %d of %d layers full (-full-every %d)", c->layers / c->full_every, c->layers,
               c->full_every);
    printf("\n");
    char dp_ranks[48] = "";
    if (r->dp_size > 1) snprintf(dp_ranks, sizeof dp_ranks, " on each of %d data-parallel ranks", r->dp_size);
    if (r->train.samples > 0)
        printf(
            "data: %lld tokens in %lld shard%s, %lld samples of %lld + 1; %lld tokens per step (%lld x %lld "
            "x %lld%s)\n",
            (long long)r->train.tokens, (long long)r->train.shard_count, r->train.shard_count == 1 ? "" : "s",
            (long long)r->train.samples, (long long)o->seq_len, (long long)r->state.total_batch,
            (long long)r->micro_batches, (long long)o->batch, (long long)o->seq_len, dp_ranks);
    if (r->train.samples > 0)
        printf("learning rate: %g after %lld steps of warm-up, %s to %g at step %lld\n", o->lr,
               (long long)o->warmup, o->schedule, o->lr * o->final_frac, (long long)o->max_steps);
    printf("memory: %.0f MiB\n", (double)bytes / 1048576.0);
    fflush(stdout);
}

// Loads the next micro-batch of `l` into r->inputs, targets, cu_seqlens and num_seqs.
static inline void run_load_batch(Run *r, DataLoader *l) {
    loader_next(l, r->inputs, r->targets);
    r->num_seqs =
        doc_boundaries(r->inputs, l->batch, l->seq_len, r->eot, (int)r->opt.doc_mask, r->cu_seqlens);
}

// Logs the start of a run: all flags, the model, the commit, the GPU, the number of processes and the date.
static inline void run_log_start(Run *r) {
    char *line, date[32], value[64];
    size_t size;
    int count;
    FILE *f = logger_begin_line(&r->log, r->state.step, &line, &size);
    time_t now = time(NULL);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime(&now));
    fprintf(f, "\"start\":{\"date\":\"%s\",\"commit\":", date);
    logger_json_text(f, build_commit());
    fprintf(f, ",\"gpu\":");
    logger_json_text(f, r->gpu);
    fprintf(f, ",\"processes\":%d", r->comm.ranks);
    if (r->has_tokenizer && r->state.data.tokenizer) // a checksum, to compare training runs
        fprintf(f, ",\"tokenizer\":\"%016llx\"", (unsigned long long)r->state.data.tokenizer);
    fprintf(f, ",\"flags\":{");
    const OptionFlag *flags = option_flags(&count);
    for (int i = 0; i < count; i++) {
        const char *field = (const char *)&r->opt + flags[i].offset, *text;
        double real;
        int64_t integer;
        fprintf(f, "%s\"%s\":", i ? "," : "", flags[i].flag);
        if (flags[i].type == OPTION_TEXT) {
            memcpy(&text, field, sizeof text);
            logger_json_text(f, text);
        } else if (flags[i].type == OPTION_INT) {
            memcpy(&integer, field, sizeof integer);
            fprintf(f, "%lld", (long long)integer);
        } else {
            memcpy(&real, field, sizeof real);
            fprintf(f, "%.12g", real);
        }
    }
    fprintf(f, "},\"model\":{");
    const ModelField *fields = model_fields(&count);
    for (int i = 0; i < count; i++) {
        model_field_print(&fields[i], model_field_get(&r->config, &fields[i]), value, sizeof value);
        const char *quote = fields[i].enum_names ? "\"" : "";
        fprintf(f, "%s\"%s\":%s%s%s", i ? "," : "", fields[i].name, quote, value, quote);
    }
    fprintf(f, "}}}\n");
    logger_end_line(&r->log, f, &line);
}

static inline int64_t run_encode_prompt(const Run *r, int32_t *tokens, int64_t capacity, int64_t *hidden);

// Installs the signal handlers; logs the start; says where a resumed run continues. Dies if -s cannot begin
// its samples.
static inline void run_begin_training(Run *r) {
    if (r->opt.sample_every > 0 && r->comm.rank == 0) {
        int64_t hidden;
        int32_t *tokens = (int32_t *)xmalloc((size_t)(r->sample_context + 1) * sizeof *tokens);
        run_encode_prompt(r, tokens, r->sample_context, &hidden);
        free(tokens);
    }
    const long long step = (long long)r->state.step, max_steps = (long long)r->opt.max_steps;
    run_install_signal_handlers(r);
    r->log.tokens = r->state.tokens;
    if (!r->resuming || step < max_steps) run_log_start(r);
    if (!r->opt.output) printf("no -o: neither checkpoints nor the log will be saved\n");
    if (r->resuming && step < max_steps)
        printf("resuming after step %lld of %lld\n", step, max_steps);
    else if (r->resuming)
        printf("all %lld steps are done; train on with -x above %lld\n", max_steps, step);
    fflush(stdout);
}

// Logs a finished step that took `seconds`, whose times and rates it fills in. After the third step prints
// the expected time of the rest.
static inline void run_log_step(Run *r, StepLog *line, double seconds) {
    enum { EXPECTED_AFTER = 3 }; // the first steps are slower than the rest
    const int64_t left = r->opt.max_steps - r->state.step;
    r->timed_steps++;
    r->timed_seconds += seconds;
    line->ms = seconds * 1e3;
    line->tokens_per_second = (double)r->state.total_batch / seconds;
    r->log.tokens = r->state.tokens;
    logger_train(&r->log, line, r->opt.max_steps, eta_seconds(r->timed_seconds, r->timed_steps, left));
    if (r->timed_steps != EXPECTED_AFTER || left == 0) return;
    char text[32];
    format_seconds(text, sizeof text, (double)left * seconds);
    printf("expected: %s for the other %lld steps, without validation and text samples\n", text,
           (long long)left);
    fflush(stdout);
}

// Returns whether a signal ends the run after this step. One process stops at once; several stop after
// run_sync_stop_signal.
static inline int run_should_stop(const Run *r) {
    return r->comm.ranks > 1 ? r->stop_signal : run_signal;
}

// Returns what is due after r->state.step steps. first: 1 at the start of training. A checkpoint is written
// after the validation and the text sample of its step, so a resumed run does not repeat them. If it has no
// steps left, it shows them on the console alone. After a signal it is also written before them: they may
// take longer than is left to the process. A run that resumes from that one begins with them.
static inline Cadence run_due(Run *r, int first) {
    Cadence due = cadence_at(&r->opt, r->state.step);
    due.save_first = r->opt.output && run_should_stop(r) && (due.validate || due.sample);
    if (!first) {
        r->state.due = due.validate + 2 * due.sample; // run_validate and run_sample clear it
        return due;
    }
    due.save = due.save_first = 0;
    if (r->resuming && r->state.step < r->opt.max_steps)
        due.validate &= r->state.due & 1, due.sample &= r->state.due >> 1 & 1;
    if (r->resuming && r->state.step >= r->opt.max_steps) r->log.console_only = 1;
    return due;
}

// Says that a signal has ended the run, after its checkpoint has been written, and how it goes on.
static inline void run_print_stopped(const Run *r) {
    if (r->state.step >= r->opt.max_steps) { // nothing is left to do
        run_signal = 0;
        return;
    }
    printf("stopped by signal %d after step %lld%s\n", (int)run_signal, (long long)r->state.step,
           !r->opt.output  ? ""
           : r->opt.resume ? "; the same command resumes it"
                           : "; resume with -y 1");
}

// Returns 1 if the step's loss and gradient norm are finite. Otherwise dies, or with -skip 1 warns and
// returns 0.
static inline int run_check_step(const Run *r, double loss, double norm) {
    if (isfinite(loss) && isfinite(norm)) return 1;
    long long step = (long long)r->state.step + 1;
    if (!r->opt.skip_nonfinite)
        die("step %lld: loss %g, gradient norm %g: training stopped%s; try a lower -l, or -skip 1", step,
            loss, norm, r->opt.output ? " (earlier checkpoints stay)" : "");
    if (r->comm.rank == 0)
        fprintf(stderr, "warning: step %lld: loss %g, gradient norm %g: skipped\n", step, loss, norm);
    return 0;
}

// Returns the loss above which the next step is an outlier (-sl); infinity: there is no limit.
static inline double run_loss_limit(const Run *r) {
    return outlier_limit(&r->state.losses, r->opt.max_loss_z);
}

// Likewise the gradient norm (-sg).
static inline double run_norm_limit(const Run *r) {
    return outlier_limit(&r->state.norms, r->opt.max_norm_z);
}

// Returns 1 if the step is to update the weights: its loss and norm are finite and no outliers. Otherwise
// returns 0 with a warning, or dies (run_check_step). Call it once a step, since it counts the loss and the
// norm.
static inline int run_accept_step(Run *r, double loss, double norm) {
    const double loss_limit = run_loss_limit(r), norm_limit = run_norm_limit(r);
    if (!run_check_step(r, loss, norm)) return 0;
    outlier_add(&r->state.losses, loss);
    outlier_add(&r->state.norms, norm);
    if (loss <= loss_limit && norm <= norm_limit) return 1;
    if (r->comm.rank == 0)
        fprintf(stderr,
                "warning: step %lld: outlier skipped: loss %g (limit %g), gradient norm %g (limit %g)\n",
                (long long)r->state.step + 1, loss, loss_limit, norm, norm_limit);
    return 0;
}

// Shares the received signals, so that all processes stop after the same step. All processes call it after
// the same step.
static inline void run_sync_stop_signal(Run *r) {
    int local = run_signal, *signals = (int *)xcalloc((size_t)r->comm.ranks, sizeof *signals);
    comm_allgather(&r->comm, &local, sizeof local, signals);
    for (int i = 0; i < r->comm.ranks; i++)
        if (signals[i] > r->stop_signal) r->stop_signal = signals[i];
    run_signal = r->stop_signal;
    free(signals);
}

// Counts a finished step. epoch, position: those of the training data after the step. Returns the step's
// number.
static inline int64_t run_finish_step(Run *r, int64_t epoch, int64_t position) {
    r->state.epoch = epoch;
    r->state.position = position;
    r->state.tokens += r->state.total_batch;
    return ++r->state.step;
}

// Writes a checkpoint after r->state.step steps, from params, m and v [n], and removes old ones.
static inline void run_save(Run *r, const float *params, const float *m, const float *v, int64_t n) {
    checkpoint_save(r->opt.output, &r->config, &r->state, params, m, v, n);
    checkpoint_prune(r->opt.output, r->opt.keep, r->state.step, 1);
}

// ----------------------------------------------------------------------------
// Validation

#define RUN_BUCKETS 24 // of recall distances; bucket k: distances 2^k to 2^(k+1) - 1

// The sums and counts of a validation.
typedef struct {
    double loss_sum;            // over the tokens of all rows
    int64_t rows;               // validated samples
    int64_t bytes;              // of the target tokens' text; 0: there is no tokenizer
    int64_t asked[RUN_BUCKETS]; // answers by distance
    int64_t right[RUN_BUCKETS]; // correctly predicted answers
    PositionLoss positions;
    unsigned char seen[]; // [vocab_size], 1: the token is an answer; then GateSums [layers], aligned
} ValidationCounts;

// Returns the bytes of ValidationCounts without the gates: a multiple of 8, which keeps the gates and
// consecutive structs aligned.
static inline size_t run_counts_bytes(const Run *r) {
    return (sizeof(ValidationCounts) + (size_t)r->config.vocab_size + 7) / 8 * 8;
}

// Returns the sums of the gates [layers] behind the counts.
static inline GateSums *run_counts_gates(const Run *r, const ValidationCounts *counts) {
    return (GateSums *)((char *)counts + run_counts_bytes(r));
}

// Counts the answers in sample number `sample` of the validation shards. argmax [seq_len]: predicted tokens;
// targets [seq_len].
static inline void run_count_recall(const Run *r, int64_t sample, const int32_t *argmax,
                                    const int32_t *targets, ValidationCounts *counts) {
    const DataLoader *l = &r->val;
    int64_t shard = 0, sample_tokens = l->seq_len + 1;
    while (sample >= loader_shard_samples(l, shard)) sample -= loader_shard_samples(l, shard++);
    const Answers *a = &r->answers[shard];
    int64_t lo = 0, hi = a->count;
    while (lo < hi) { // binary search for the first answer in the sample
        int64_t mid = (lo + hi) / 2;
        if (a->answers[mid].index < sample * sample_tokens)
            lo = mid + 1;
        else
            hi = mid;
    }
    for (; lo < a->count && a->answers[lo].index < (sample + 1) * sample_tokens; lo++) {
        int64_t position = a->answers[lo].index - sample * sample_tokens -
                           1; // the answer is predicted at the token before it
        int bucket = 0;
        while (bucket < RUN_BUCKETS - 1 && a->answers[lo].distance >> (bucket + 1)) bucket++;
        if (position < 0 || a->answers[lo].distance > position + 1)
            continue; // the fact lies before the sample
        counts->asked[bucket]++;
        counts->right[bucket] += argmax[position] == targets[position];
        counts->seen[targets[position]] = 1;
    }
}

// Sums the counts over all data-parallel ranks, in rank order, so that all processes get the same sums, bit
// for bit. Sums the gates over all processes, which have those of their own tokens.
static inline void run_sum_counts(Run *r, ValidationCounts *counts, size_t bytes) {
    char *all = (char *)xmalloc(bytes * (size_t)r->comm.ranks);
    comm_allgather(&r->comm, counts, bytes, all);
    memset(counts, 0, bytes);
    for (int i = 0; i < r->comm.ranks; i++) {
        const GateSums *gates = run_counts_gates(r, (const ValidationCounts *)(all + bytes * (size_t)i));
        for (int l = 0; l < r->config.layers; l++)
            gate_sums_merge(&run_counts_gates(r, counts)[l], &gates[l]);
    }
    for (int i = 0; i < r->comm.ranks;
         i += (int)r->opt.cp_size) { // the ranks of a -cp group have the same counts
        const ValidationCounts *c = (const ValidationCounts *)(all + bytes * (size_t)i);
        counts->loss_sum += c->loss_sum;
        counts->rows += c->rows, counts->bytes += c->bytes;
        for (int k = 0; k < RUN_BUCKETS; k++)
            counts->asked[k] += c->asked[k], counts->right[k] += c->right[k];
        position_loss_sum(&counts->positions, &c->positions);
        for (int k = 0; k < r->config.vocab_size; k++) counts->seen[k] |= c->seen[k];
    }
    free(all);
}

// The trainer's function that evaluates the batch in r (inputs, targets, cu_seqlens, num_seqs). It returns
// the loss and the argmax token at each position, [batch, seq_len] each.
typedef void (*RunEvaluate)(void *model, const Run *r, const float **losses, const int32_t **argmax);

// Computes and logs the mean loss, perplexity and bits per byte over the first -m batches of -b sequences of
// the validation shards (0: all sequences), the same sequences on any number of processes. In contexts above
// 128 tokens also logs the loss by position; for NSA the mean gates; for the recall task the accuracy by
// distance. Returns the loss. All processes call it.
static inline double run_validate_shards(Run *r, RunEvaluate evaluate, void *model) {
    DataLoader *l = &r->val;
    const int64_t global_batch = l->batch * r->dp_size; // samples per batch of all ranks
    int64_t samples = l->samples, distances[RUN_BUCKETS];
    if (r->opt.val_batches > 0 && r->opt.val_batches < (samples + l->batch - 1) / l->batch)
        samples = r->opt.val_batches * l->batch;
    const int64_t batches = (samples + global_batch - 1) / global_batch;
    const size_t bytes = run_counts_bytes(r) + (size_t)r->config.layers * sizeof(GateSums);
    ValidationCounts *counts = (ValidationCounts *)xcalloc(bytes, 1);
    loader_seek(l, 0, 0);
    double told = now_seconds();
    for (int64_t i = 0; i < batches; i++) {
        if (r->opt.val_only && r->comm.rank == 0 && now_seconds() - told > 10) {
            fprintf(stderr, "validated %lld of %lld batches\n", (long long)i, (long long)batches);
            told = now_seconds();
        }
        const float *losses;
        const int32_t *argmax;
        int64_t first = i * global_batch + r->dp_rank * l->batch;
        run_load_batch(r, l);
        // the gates of a batch with rows behind the last sample do not count
        if (r->config.attn == ATTN_NSA && first + l->batch <= samples) r->gates = run_counts_gates(r, counts);
        evaluate(model, r, &losses, &argmax);
        r->gates = NULL;
        for (int64_t b = 0; b < l->batch && first + b < samples;
             b++, counts->rows++) { // the rows behind the last sample do not count
            for (int64_t t = b * l->seq_len; t < (b + 1) * l->seq_len; t++) {
                counts->loss_sum += losses[t];
                if (r->has_tokenizer) counts->bytes += tokenizer_text_bytes(&r->tokenizer, r->targets[t]);
            }
            position_loss_add(&counts->positions, losses, r->cu_seqlens, r->num_seqs, b * l->seq_len,
                              (b + 1) * l->seq_len);
            if (r->answers)
                run_count_recall(r, first + b, argmax + b * l->seq_len, r->targets + b * l->seq_len, counts);
        }
    }
    run_sum_counts(r, counts, bytes);
    const int64_t val_tokens = counts->rows * l->seq_len;
    double loss = counts->loss_sum / (double)val_tokens;
    logger_val(&r->log, r->state.step, loss, val_tokens, counts->bytes);
    if (r->answers) {
        int first = 0, last = RUN_BUCKETS, answers = 0; // answers: number of distinct answers
        for (int i = 0; i < r->config.vocab_size; i++) answers += counts->seen[i];
        while (first < RUN_BUCKETS && !counts->asked[first]) first++;
        while (last > first && !counts->asked[last - 1]) last--;
        for (int k = 0; k < RUN_BUCKETS; k++) distances[k] = (int64_t)1 << k;
        logger_recall(&r->log, r->state.step, last - first, distances + first, counts->asked + first,
                      counts->right + first, answers ? 1.0 / answers : 0);
    }
    if (l->seq_len > POSITION_FIRST) logger_positions(&r->log, r->state.step, &counts->positions);
    if (run_counts_gates(r, counts)->count > 0)
        logger_gates(&r->log, r->state.step, run_counts_gates(r, counts), r->config.layers);
    free(counts);
    return loss;
}

// Adds up the results [n] of all data-parallel ranks. Each choice has the result of one rank, and 0
// elsewhere.
static inline void run_sum_results(Run *r, EvalResult *results, int64_t n) {
    const size_t bytes = (size_t)n * sizeof *results;
    EvalResult *all = (EvalResult *)xmalloc(bytes * (size_t)r->comm.ranks);
    comm_allgather(&r->comm, results, bytes, all);
    memset(results, 0, bytes);
    for (int rank = 0; rank < r->comm.ranks; rank += (int)r->opt.cp_size) {
        const EvalResult *from = all + rank * n;
        for (int64_t i = 0; i < n; i++) results[i].loss += from[i].loss, results[i].greedy += from[i].greedy;
    }
    free(all);
}

// Scores the model on an evaluation file, and logs the accuracy. All processes call it; each data-parallel
// rank computes every dp_size-th batch.
static inline void run_evaluate_file(Run *r, const EvalFile *f, RunEvaluate evaluate, void *model) {
    EvalResult *results = (EvalResult *)xcalloc((size_t)f->num_choices, sizeof *results);
    EvalBatch b = {r->inputs, r->targets, r->cu_seqlens, 0, r->opt.batch * r->opt.seq_len};
    double told = now_seconds();
    for (int64_t choice = 0, batch = 0; choice < f->num_choices; batch++) {
        const float *losses;
        const int32_t *argmax;
        const int64_t first = choice;
        if (r->opt.val_only && r->comm.rank == 0 && now_seconds() - told > 10) {
            fprintf(stderr, "%s: %lld of %lld %s\n", f->name, (long long)choice, (long long)f->num_choices,
                    f->kind == EVAL_NEEDLE ? "contexts" : "choices");
            told = now_seconds();
        }
        choice = eval_fill_batch(f, first, r->opt.seq_len, &b);
        if (batch % r->dp_size != r->dp_rank) continue;
        r->num_seqs = b.num_seqs;
        evaluate(model, r, &losses, &argmax);
        eval_read_batch(f, first, choice, &b, losses, argmax, results);
    }
    run_sum_results(r, results, f->num_choices);
    if (f->kind == EVAL_CHOICE) {
        const EvalAccuracy accuracy = eval_accuracy(f, results);
        logger_multiple_choice(&r->log, r->state.step, f, &accuracy);
    } else {
        EvalCell *cells = (EvalCell *)xmalloc((size_t)f->num_examples * sizeof *cells);
        logger_needle(&r->log, r->state.step, f, cells, eval_cells(f, results, cells));
        free(cells);
    }
    free(results);
}

// Validates the model: the loss on the shards of -j, which it returns (NaN without -j), then the evaluation
// files. All processes call it.
static inline double run_validate(Run *r, RunEvaluate evaluate, void *model) {
    if (r->opt.val_only) r->log.tokens = r->state.tokens, run_log_start(r);
    const double loss = r->val.samples > 0 ? run_validate_shards(r, evaluate, model) : NAN;
    for (int64_t i = 0; i < r->num_eval_files; i++) run_evaluate_file(r, &r->eval_files[i], evaluate, model);
    r->state.due &= ~1;
    return loss;
}

// ----------------------------------------------------------------------------
// Text generation

// The trainer's function that returns the logits [vocab_size] of the token that follows tokens [n].
typedef const float *(*RunLogits)(void *model, const int32_t *tokens, int64_t n);

// Fills tokens [capacity + 1] with BOS, if the tokenizer has one, and -prompt. Without both, a text begins
// behind end-of-text. Sets *hidden to the number of tokens that are not to be printed: 1 or 0. Returns the
// number of tokens.
static inline int64_t run_encode_prompt(const Run *r, int32_t *tokens, int64_t capacity, int64_t *hidden) {
    const char *prompt = r->opt.prompt ? r->opt.prompt : "";
    const Tokenizer *t = &r->tokenizer;
    int bos = r->has_tokenizer ? t->bos : r->eot;
    if (*prompt && !r->has_tokenizer)
        die("-prompt: needs a tokenizer.bin beside the shards or the checkpoint; copy it there");
    if (!*prompt && bos < 0) bos = r->eot;
    if (!*prompt && bos < 0)
        die("-%s: the vocabulary has no end-of-text token to start from; give -prompt",
            r->opt.sample_only ? "sample 1" : "s");
    *hidden = bos >= 0;
    tokens[0] = bos;
    if (!*prompt) return 1;
    int32_t first;
    int64_t bytes = (int64_t)strlen(prompt);
    if (tokenizer_encode(t, prompt, bytes, 1, &first, 1) > 0 && first == bos)
        *hidden = 0; // the prompt itself begins with BOS
    int64_t space = capacity - *hidden;
    int64_t count = tokenizer_encode(t, prompt, bytes, 1, tokens + *hidden, space);
    if (count > space - 1)
        die("-prompt: %lld tokens, but the context of %lld has space for %lld; shorten it", (long long)count,
            (long long)capacity, (long long)(space - 1));
    return *hidden + count;
}

// Copies logits [vocab_size] to `masked`, with -INFINITY for each token that the tokenizer does not have.
static inline void run_mask_logits(const Run *r, const float *logits, float *masked) {
    for (int i = 0; i < r->config.vocab_size; i++) {
        int len = 1;
        if (r->has_tokenizer) tokenizer_piece(&r->tokenizer, i, &len);
        masked[i] = len > 0 ? logits[i] : -INFINITY;
    }
}

// Prints -prompt and -g generated tokens, or fewer if the model generates end-of-text or an end-of-sequence
// token. The context has at most sample_context tokens; when it is full, its older half is dropped.
static inline void run_sample(Run *r, RunLogits logits, void *model) {
    const Options *o = &r->opt;
    int64_t capacity = r->sample_context, printed;
    int vocab = r->config.vocab_size, first = 1;
    int32_t *tokens = (int32_t *)xmalloc((size_t)(capacity + 1) * sizeof *tokens);
    int32_t *order = (int32_t *)xmalloc((size_t)vocab * sizeof *order);
    float *probs = (float *)xmalloc((size_t)vocab * sizeof *probs);
    float *masked = (float *)xmalloc((size_t)vocab * sizeof *masked);
    int64_t n = run_encode_prompt(r, tokens, capacity, &printed);
    Rng rng;
    rng_seed(&rng, (uint64_t)o->seed, 0x73616d70);
    rng.counter = (uint64_t)r->state.draws;
    printf("sample: ");
    for (int64_t i = 0; i <= o->generate; i++) {
        if (r->has_tokenizer) {
            tokenizer_print(&r->tokenizer, stdout, tokens + printed, n - printed, first);
            if (n > printed) first = 0;
        } else {
            for (int64_t j = printed; j < n; j++) printf("%d ", tokens[j]);
        }
        fflush(stdout);
        printed = n;
        if (i == o->generate) break;
        run_mask_logits(r, logits(model, tokens, n), masked);
        int next = sample_token(masked, vocab, o->temperature, o->top_p, rng_uniform(&rng), order, probs);
        if (next == r->eot || (r->has_tokenizer && tokenizer_is_eos(&r->tokenizer, next))) break;
        if (n == capacity) {
            int64_t dropped = capacity > 1 ? capacity / 2 : 1;
            memmove(tokens, tokens + dropped, (size_t)(capacity - dropped) * sizeof *tokens);
            n = printed = capacity - dropped;
        }
        tokens[n++] = next;
    }
    printf("\n");
    fflush(stdout);
    r->state.draws = (int64_t)rng.counter;
    r->state.due &= ~2;
    free(tokens), free(order), free(probs), free(masked);
}

// Closes the log and the data, frees the memory, and disconnects the processes. Dies if the console output is
// incomplete, or warns if a training run has saved its results in -o.
static inline void run_end(Run *r) {
    if (!r->log.file)
        finish_stdout();
    else if (fflush(stdout) != 0 || ferror(stdout))
        fprintf(stderr, "warning: the console output is incomplete; %s has all steps\n", r->log.path);
    logger_close(&r->log);
    if (r->train.samples > 0) loader_close(&r->train);
    if (r->answers) {
        for (int64_t s = 0; s < r->val.shard_count; s++) answers_free(&r->answers[s]);
        free(r->answers);
    }
    if (r->val.samples > 0) loader_close(&r->val);
    for (int64_t i = 0; i < r->num_eval_files; i++) eval_free(&r->eval_files[i]);
    free(r->eval_files);
    if (r->has_tokenizer) tokenizer_free(&r->tokenizer);
    free(r->inputs), free(r->targets), free(r->cu_seqlens);
    if (r->lock > 0) close(r->lock);
    comm_end(&r->comm);
}
#endif
