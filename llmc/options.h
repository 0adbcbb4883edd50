// options.h: parses the command line of both trainers. One table defines each flag's name, type, range and
// help. The model's flags come from the table of fields in config.h. Every error dies with one line. The GPU
// trainer defines TRAINER_GPU before it includes this header, which lets it use its own flags.
#ifndef LLMC_OPTIONS_H
#define LLMC_OPTIONS_H
#include "utils.h"
#include "commit.h"
#include "config.h"
#include <ctype.h>

#define OPTIONS_MAX 96 // at least the number of flags, model flags included

typedef struct {
    const char *train, *val;                          // glob patterns of shards; NULL: none
    const char *hellaswag, *multiple_choice, *needle; // glob patterns of evaluation files; NULL: none
    const char *init_from;                            // name of a preset, or path of a checkpoint
    const char *output;                               // folder for checkpoints and the log; NULL: none
    int64_t save_every;            // steps between checkpoints; 0: only after the last step
    int64_t keep;                  // number of checkpoints to keep
    int64_t new_data;              // 1: resume with other data than the checkpoint's
    int64_t resume;                // 1: resume from the newest intact checkpoint in output
    int64_t batch, seq_len;        // a micro-batch is [batch, seq_len]; seq_len 0 until the model is known
    int64_t total_batch;           // tokens per step; 0: one micro-batch
    int64_t max_steps, warmup;     // steps
    const char *schedule;          // cosine, linear, constant or wsd
    double max_loss_z, max_norm_z; // z-scores above which a step is skipped; 0: never
    double lr, final_frac;         // the learning rate ends at final_frac * lr
    double weight_decay, beta1, beta2, eps, clip;
    int64_t val_every, val_batches; // steps between validations, 0: never; batches each, 0: all
    int64_t sample_every, generate; // steps between text samples, 0: never; tokens each
    int64_t overfit, val_only, sample_only;
    const char *prompt;
    double temperature, top_p;
    int64_t seed, doc_mask;
    int64_t skip_nonfinite; // 1: skip a step whose loss or gradient is NaN or Inf
    const char *gate_bias;  // initial biases of the gates; NULL: the default
    // only in the GPU trainer
    const char *matmul; // bf16 or fp8
    int64_t recompute, profile_steps;
    double peak_tflops;        // 0: look up by the GPU's name
    const char *block_indices; // output file; NULL: none
    int64_t zero_stage;
    int64_t cp_size; // GPUs that share each batch (context parallel)
    // set by the parser
    const Preset *preset;             // NULL: init_from is a checkpoint
    double gate_bias_value[3];        // the numbers of gate_bias
    unsigned char given[OPTIONS_MAX]; // [index in option_flags], 1: on the command line
    double model_value[OPTIONS_MAX];  // [index in model_fields], valid if model_given
    unsigned char model_given[OPTIONS_MAX];
} Options;

typedef enum { OPTION_TEXT, OPTION_INT, OPTION_REAL } OptionType;
typedef struct {
    const char *flag, *alias; // names without the dash; alias may be NULL
    OptionType type;
    size_t offset; // in Options, of a const char *, int64_t or double
    double min, max;
    const char *help;
} OptionFlag;

// Returns the table of all flags except the model's, and its length in *count.
static inline const OptionFlag *option_flags(int *count) {
#define OFFSET(member) offsetof(Options, member)
#define BIG 9e15
    static const OptionFlag flags[] = {
        {"i", "train", OPTION_TEXT, OFFSET(train), 0, 0, "training shards, a quoted glob pattern"},
        {"j", "val-data", OPTION_TEXT, OFFSET(val), 0, 0, "validation shards, a quoted glob pattern"},
        {"e", "model", OPTION_TEXT, OFFSET(init_from), 0, 0,
         "model to start from: a preset (listed below) or a checkpoint file"},
        {"o", "output", OPTION_TEXT, OFFSET(output), 0, 0, "output folder for checkpoints and the log"},
        {"n", "save-every", OPTION_INT, OFFSET(save_every), 0, BIG,
         "steps between checkpoints; 0: only after the last step"},
        {"nk", "keep", OPTION_INT, OFFSET(keep), 1, BIG, "number of newest checkpoints to keep"},
        {"y", "resume", OPTION_INT, OFFSET(resume), 0, 1,
         "1: resume from the newest intact checkpoint in -o, if there is one"},
        {"new-data", NULL, OPTION_INT, OFFSET(new_data), 0, 1,
         "1: resume although the shards or the tokenizer are not those of the run; a new epoch begins"},
        {"b", "batch", OPTION_INT, OFFSET(batch), 1, 1 << 24,
         "micro-batch size in sequences, per GPU (with -cp: per group of GPUs)"},
        {"t", "context", OPTION_INT, OFFSET(seq_len), 0, 1 << 30,
         "sequence length in tokens; 0: that of the preset or checkpoint"},
        {"d", "total-batch", OPTION_INT, OFFSET(total_batch), 0, BIG,
         "batch size of a step in tokens, a multiple of b*t times the number of GPUs (with -cp: of groups); "
         "0: one micro-batch"},
        {"x", "steps", OPTION_INT, OFFSET(max_steps), -1, BIG, "number of training steps; -1: one epoch"},
        {"l", "lr", OPTION_REAL, OFFSET(lr), 0, 1e6,
         "maximum learning rate (default: the preset's or the checkpoint's)"},
        {"u", "warmup", OPTION_INT, OFFSET(warmup), 0, BIG,
         "warm-up in steps, in which the learning rate rises linearly (default: the preset's, at most a "
         "tenth of -x; of a checkpoint, its own)"},
        {"k", "lr-schedule", OPTION_TEXT, OFFSET(schedule), 0, 0,
         "learning rate after the warm-up: cosine, linear, constant, or wsd (stable, then decay in the last "
         "fifth)"},
        {"sl", "skip-loss-z", OPTION_REAL, OFFSET(max_loss_z), 0, 1e9,
         "skip a step whose loss is so many standard deviations above the mean of the last 128; 0: never"},
        {"sg", "skip-norm-z", OPTION_REAL, OFFSET(max_norm_z), 0, 1e9,
         "skip a step whose gradient norm is so many standard deviations above that mean; 0: never"},
        {"q", "final-lr-frac", OPTION_REAL, OFFSET(final_frac), 0, 1,
         "learning rate after the last step, as a fraction of -l"},
        {"c", "weight-decay", OPTION_REAL, OFFSET(weight_decay), 0, 1e6,
         "weight decay of AdamW, on matrices only"},
        {"beta1", NULL, OPTION_REAL, OFFSET(beta1), 0, 0.999999999, "decay rate of AdamW's first moment"},
        {"beta2", NULL, OPTION_REAL, OFFSET(beta2), 0, 0.999999999, "decay rate of AdamW's second moment"},
        {"eps", NULL, OPTION_REAL, OFFSET(eps), 1e-30, 1, "epsilon of AdamW"},
        {"clip", NULL, OPTION_REAL, OFFSET(clip), 0, 1e30, "maximum gradient norm; 0: no clipping"},
        {"v", "val-every", OPTION_INT, OFFSET(val_every), 0, BIG, "steps between validations; 0: never"},
        {"m", "val-batches", OPTION_INT, OFFSET(val_batches), 0, BIG,
         "batches of -b sequences per validation, of all processes together; 0: all of -j (default: 20; with "
         "-val 1 all)"},
        {"hellaswag", NULL, OPTION_TEXT, OFFSET(hellaswag), 0, 0,
         "HellaSwag in llm.c's format (data/hellaswag), answered at each validation"},
        {"mc", NULL, OPTION_TEXT, OFFSET(multiple_choice), 0, 0,
         "multiple-choice files (data/mc), a quoted glob pattern, answered at each validation"},
        {"needle", NULL, OPTION_TEXT, OFFSET(needle), 0, 0,
         "needle files (data/needle), a quoted glob pattern, answered at each validation"},
        {"s", "sample-every", OPTION_INT, OFFSET(sample_every), 0, BIG,
         "steps between text samples; 0: never"},
        {"g", "generate", OPTION_INT, OFFSET(generate), 1, 1 << 30,
         "tokens to generate per text sample; when the context -t is full, its older half is dropped"},
        {"a", "overfit", OPTION_INT, OFFSET(overfit), 0, 1,
         "1: train on the first batch only, to see whether the model overfits it"},
        {"val", NULL, OPTION_INT, OFFSET(val_only), 0, 1,
         "1: only validate the checkpoint -e on the shards -j and the files of -hellaswag, -mc and -needle"},
        {"sample", NULL, OPTION_INT, OFFSET(sample_only), 0, 1,
         "1: only generate text with the checkpoint -e"},
        {"prompt", NULL, OPTION_TEXT, OFFSET(prompt), 0, 0, "prompt for text generation"},
        {"temp", NULL, OPTION_REAL, OFFSET(temperature), 0, 1e6,
         "sampling temperature; 0: always the most likely token"},
        {"topp", NULL, OPTION_REAL, OFFSET(top_p), 1e-9, 1,
         "top-p sampling: the total probability of the most likely tokens to sample from"},
        {"seed", NULL, OPTION_INT, OFFSET(seed), 0, BIG,
         "random seed of the initial weights, the data order and the text samples"},
        {"doc-mask", NULL, OPTION_INT, OFFSET(doc_mask), 0, 1,
         "1: attention never crosses document boundaries"},
        {"skip", NULL, OPTION_INT, OFFSET(skip_nonfinite), 0, 1,
         "action on a NaN or Inf loss or gradient: 0 stop, 1 skip the step"},
        {"gate-bias", NULL, OPTION_TEXT, OFFSET(gate_bias), 0, 0,
         "initial biases of new gates before the sigmoid, three numbers C,S,W for compressed, selected, "
         "sliding (default: -2,-2,2; for -attn nsa on a checkpoint without gates, gates of 0.05, 0.9, 0.05)"},
        // in the GPU trainer alone; option_is_gpu lists them, too
        {"matmul", NULL, OPTION_TEXT, OFFSET(matmul), 0, 0,
         "number format of the layers' matmuls: bf16 (that of the build), or fp8 on GPUs of compute "
         "capability 8.9 and higher"},
        {"r", "recompute", OPTION_INT, OFFSET(recompute), 0, 2,
         "activations recomputed in the backward pass to save memory: 0 none, 1 RMSNorm and SwiGLU, 2 whole "
         "layers"},
        {"profile", NULL, OPTION_INT, OFFSET(profile_steps), 0, 10000,
         "time this many steps on random tokens instead of training; 0: off"},
        {"block-indices", NULL, OPTION_TEXT, OFFSET(block_indices), 0, 0,
         "with -val 1, file to write the block indices of the last batch to"},
        {"peak-tflops", NULL, OPTION_REAL, OFFSET(peak_tflops), 0, 1e9,
         "peak rate of the GPU in TFLOP/s, for MFU; 0: look it up by the GPU's name"},
        {"z", "zero", OPTION_INT, OFFSET(zero_stage), 0, 2,
         "ZeRO stage: 0 none, 1 optimizer state, 2 and gradients"},
        {"cp", NULL, OPTION_INT, OFFSET(cp_size), 1, 1 << 20,
         "context parallel size, the number of GPUs that share the tokens of each micro-batch"},
    };
#undef BIG
#undef OFFSET
    *count = (int)(sizeof flags / sizeof flags[0]);
    return flags;
}

// Returns whether only the GPU trainer has a flag.
static inline int option_is_gpu(const OptionFlag *f) {
    static const char *const names[] = {"matmul", "r", "profile", "block-indices", "peak-tflops", "z", "cp"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(f->flag, names[i]) == 0) return 1;
    return 0;
}

// Sets the default of every flag.
static inline void options_defaults(Options *o) {
    memset(o, 0, sizeof *o);
    o->init_from = "recall";
    o->save_every = 1000, o->keep = 3;
    o->batch = 4;
    o->schedule = "cosine", o->matmul = "bf16";
    o->max_steps = 1000, o->lr = 1e-3, o->final_frac = 0.1;
    o->weight_decay = 0.1, o->beta1 = 0.9, o->beta2 = 0.95, o->eps = 1e-8, o->clip = 1;
    o->val_every = 250, o->val_batches = 20, o->generate = 128;
    o->temperature = 0.8, o->top_p = 0.95;
    o->seed = 1337, o->doc_mask = 1;
    o->cp_size = 1;
    memcpy(o->gate_bias_value, default_gate_bias, sizeof o->gate_bias_value);
}

// Returns whether a flag was on the command line. `flag`: its name in the table, without the dash.
static inline int options_given(const Options *o, const char *flag) {
    int count;
    const OptionFlag *f = option_flags(&count);
    for (int i = 0; i < count; i++)
        if (strcmp(f[i].flag, flag) == 0) return o->given[i];
    const ModelField *m = model_fields(&count);
    for (int i = 0; i < count; i++)
        if (strcmp(m[i].name, flag) == 0) return o->model_given[i];
    return 0;
}

// Writes a number as text with up to 12 significant digits.
static inline void options_number(char *out, size_t size, int integer, double value) {
    snprintf(out, size, integer ? "%.0f" : "%.12g", value);
}

// Prints the help of all flags, and the presets.
static inline void options_help(const char *program) {
    Options defaults;
    options_defaults(&defaults);
    int count;
    char value[64];
    printf(
        "Trains a transformer with Native Sparse Attention, validates it, and generates text.\n"
        "usage: %s [-flag value]...    (also --flag value, -flag=value)\n"
        "Flags marked [GPU] are of the GPU trainer, train_gpt_nsa; all others also of train_gpt_nsa_cpu.\n\n",
        program);
    const OptionFlag *f = option_flags(&count);
    for (int i = 0; i < count; i++) {
        const char *default_value = (const char *)&defaults + f[i].offset, *text = NULL;
        char name[40];
        snprintf(name, sizeof name, "-%s%s%s", f[i].flag, f[i].alias ? ", -" : "",
                 f[i].alias ? f[i].alias : "");
        if (f[i].type == OPTION_TEXT) {
            memcpy(&text, default_value, sizeof text);
            snprintf(value, sizeof value, "%s", text ? text : "none");
        } else if (f[i].type == OPTION_INT) {
            int64_t n;
            memcpy(&n, default_value, sizeof n);
            options_number(value, sizeof value, 1, (double)n);
        } else {
            double x;
            memcpy(&x, default_value, sizeof x);
            options_number(value, sizeof value, 0, x);
        }
        const char *gpu = option_is_gpu(&f[i]) ? "[GPU] " : "";
        if (strstr(f[i].help, "(default: "))
            printf("  %-20s %s%s\n", name, gpu, f[i].help);
        else
            printf("  %-20s %s%s (default: %s)\n", name, gpu, f[i].help, value);
    }
    printf("\nModel (default: the value of the preset or checkpoint -e):\n");
    const ModelField *m = model_fields(&count);
    for (int i = 0; i < count; i++) {
        if (!m[i].help) continue;
        printf("  -%-19s %s%s%s\n", m[i].name, m[i].help, m[i].enum_names ? ": " : "",
               m[i].enum_names ? m[i].enum_names : "");
    }
    printf("\nPresets:\n");
    const Preset *p = presets(&count);
    for (int i = 0; i < count; i++) {
        printf("  %-12s %s: %d layers, %d channels, %d query / %d KV heads, head size %d, context %d, "
               "learning rate %g, warm-up %d\n",
               p[i].name, p[i].help, p[i].layers, p[i].channels, p[i].q_heads, p[i].kv_heads, p[i].head_dim,
               p[i].seq_len, p[i].lr, p[i].warmup);
    }
}

// Returns the edit distance of a and b (Damerau-Levenshtein, adjacent transpositions), or 99 if one of them
// has more than 31 characters.
static inline int options_distance(const char *a, const char *b) {
    int na = (int)strlen(a), nb = (int)strlen(b), table[32][32];
    if (na > 31 || nb > 31) return 99;
    for (int i = 0; i <= na; i++) {
        for (int j = 0; j <= nb; j++) {
            if (i == 0 || j == 0) {
                table[i][j] = i + j;
                continue;
            }
            int best = table[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
            if (table[i - 1][j] + 1 < best) best = table[i - 1][j] + 1;
            if (table[i][j - 1] + 1 < best) best = table[i][j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                table[i - 2][j - 2] + 1 < best)
                best = table[i - 2][j - 2] + 1;
            table[i][j] = best;
        }
    }
    return table[na][nb];
}

// Writes the name in `arg`, which starts with one or two dashes, to name [size]: without the dashes, up to a
// `=`, with dashes for underscores. Returns the text behind the `=`, or NULL.
static inline const char *options_split(const char *arg, char *name, size_t size) {
    const char *begin = arg[0] != '-' ? arg : arg[1] == '-' ? arg + 2 : arg + 1, *equal = strchr(begin, '=');
    snprintf(name, size, "%.*s", (int)(equal ? equal - begin : (long)strlen(begin)), begin);
    for (char *c = name; *c; c++)
        if (*c == '_') *c = '-';
    return equal ? equal + 1 : NULL;
}

// Returns the index of the flag in `arg`, which starts with one or two dashes: an index in option_flags, or
// OPTIONS_MAX + an index in model_fields, or -1 if there is no such flag.
static inline int options_find(const char *arg) {
    if (arg[0] != '-' || arg[1] == '\0') return -1;
    char name[64];
    int count;
    options_split(arg, name, sizeof name);
    if (strcmp(name, "choice") == 0) snprintf(name, sizeof name, "block-indices"); // former name
    const OptionFlag *f = option_flags(&count);
    for (int i = 0; i < count; i++)
        if (strcmp(f[i].flag, name) == 0 || (f[i].alias && strcmp(f[i].alias, name) == 0)) return i;
    const ModelField *m = model_fields(&count);
    for (int i = 0; i < count; i++)
        if (m[i].help && strcmp(m[i].name, name) == 0) return OPTIONS_MAX + i;
    return -1;
}

// Returns the flag that other programs call `name`, or NULL.
static inline const char *options_synonym(const char *name) {
    static const char *const table[][2] = {
        {"learning-rate", "lr"},
        {"lrate", "lr"},
        {"batch-size", "batch"},
        {"micro-batch-size", "batch"},
        {"max-steps", "steps"},
        {"max-iters", "steps"},
        {"num-iterations", "steps"},
        {"iterations", "steps"},
        {"epoch", "steps"},
        {"epochs", "steps"},
        {"num-epochs", "steps"},
        {"warmup-steps", "warmup"},
        {"warmup-iters", "warmup"},
        {"out", "output"},
        {"out-dir", "output"},
        {"output-dir", "output"},
        {"data", "train"},
        {"input", "train"},
        {"train-data", "train"},
        {"preset", "model"},
        {"checkpoint", "model"},
        {"init-from", "model"},
        {"seq-len", "context"},
        {"max-seq-len", "context"},
        {"seq-length", "context"},
        {"context-length", "context"},
        {"block-size", "context"},
        {"wd", "weight-decay"},
        {"grad-clip", "clip"},
        {"max-grad-norm", "clip"},
        {"temperature", "temp"},
        {"top-p", "topp"},
        {"num-layers", "layers"},
        {"n-layer", "layers"},
        {"n-head", "heads"},
        {"num-heads", "heads"},
        {"hidden-size", "channels"},
        {"n-embd", "channels"},
        {"dim", "channels"},
        {"vocab-size", "vocab"},
        {"schedule", "lr-schedule"},
        {"scheduler", "lr-schedule"},
        {"top-k", "topk"},
        {"validate", "val"},
        {"eval-every", "val-every"},
        {"eval-interval", "val-every"},
        {"save-interval", "save-every"},
        {"generate-only", "sample"},
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strcmp(table[i][0], name) == 0) return table[i][1];
    return NULL;
}

// Dies because `arg` is not a flag; suggests the most similar flag.
LLMC_NORETURN static inline void options_unknown(const char *arg) {
    if (arg[0] != '-') die("%s: not a flag; flags start with a dash, -h lists all", arg);
    char name[64];
    options_split(arg, name, sizeof name);
    for (char *c = name; *c; c++) *c = (char)tolower((unsigned char)*c);
    const char *nearest = options_synonym(name);
    int count, best = nearest ? 0 : strlen(name) < 5 ? 1 : 2; // largest edit distance of a suggestion
    const OptionFlag *f = option_flags(&count);
    for (int i = 0; i < count; i++) {
        for (int k = 0; k < 2; k++) {
            const char *word = k ? f[i].alias : f[i].flag;
            if (!word || strlen(word) < 2) continue;
            int distance = options_distance(name, word);
            if (distance < best || (distance == best && !nearest)) best = distance, nearest = word;
        }
    }
    const ModelField *m = model_fields(&count);
    for (int i = 0; i < count; i++) {
        if (!m[i].help) continue;
        int distance = options_distance(name, m[i].name);
        if (distance < best || (distance == best && !nearest)) best = distance, nearest = m[i].name;
    }
    for (int i = 0; i < count && !nearest && strlen(name) > 2; i++) // the start of a name
        if (m[i].help && strncmp(name, m[i].name, strlen(name)) == 0) nearest = m[i].name;
    f = option_flags(&count);
    for (int i = 0; i < count && !nearest && strlen(name) > 2; i++)
        if (f[i].alias && strncmp(name, f[i].alias, strlen(name)) == 0) nearest = f[i].alias;
    if (nearest) die("%s: unknown flag; did you mean -%s? -h lists all", arg, nearest);
    die("%s: unknown flag; -h lists all", arg);
}

// Parses a number in [min, max]; dies if it is not. arg: the flag, for the message.
static inline double options_parse_number(const char *arg, const char *text, int integer, double min,
                                          double max) {
    char *end, low[64], high[64];
    double value = integer ? (double)strtoll(text, &end, 10) : strtod(text, &end);
    if (end == text || *end != '\0' || !isfinite(value) || text[0] == ' ')
        die("%s %s: must be %s", arg, text, integer ? "a whole number" : "a number");
    options_number(low, sizeof low, integer, min);
    options_number(high, sizeof high, integer, max);
    if (value < min || value > max) die("%s %s: must be from %s to %s", arg, text, low, high);
    return value;
}

// Parses the value of a model's flag: a number, or one of f->enum_names.
static inline double options_parse_model(const char *arg, const char *text, const ModelField *f) {
    if (!f->enum_names)
        return options_parse_number(arg, text, f->type == FIELD_INT32 || f->type == FIELD_INT64, f->min,
                                    f->max);
    for (int i = 0; i <= (int)f->max; i++) {
        char word[32];
        model_field_print(f, i, word, sizeof word);
        if (strcmp(word, text) == 0) return i;
    }
    die("%s %s: must be one of %s", arg, text, f->enum_names);
}

// Dies if flags contradict each other. Sets o->gate_bias_value.
static inline void options_check(Options *o) {
    struct stat st;
    if (!o->preset) {
        int count;
        const Preset *p = presets(&count);
        char names[256] = "";
        for (int i = 0; i < count; i++)
            snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? " " : "", p[i].name);
        if (stat(o->init_from, &st) != 0)
            die("-e %s: neither a preset (%s) nor a checkpoint file (%s); check the name", o->init_from,
                names, strerror(errno));
        if (S_ISDIR(st.st_mode))
            die("-e %s: it is a folder; give a checkpoint file in it, resume its run with -o %s -y 1, or "
                "make a checkpoint of a Hugging Face folder with scripts/from_hf.py",
                o->init_from, o->init_from);
    }
    if (o->sample_only && o->val_only) die("-sample 1 -val 1: cannot be combined; drop one of them");
    if (o->sample_only && o->preset) die("-sample 1: needs a trained model; give a checkpoint file with -e");
    if (o->val_only && o->preset) die("-val 1: needs a trained model; give a checkpoint file with -e");
    const int has_eval_files = o->hellaswag || o->multiple_choice || o->needle;
    if (o->val_only && !o->val && !has_eval_files)
        die("-val 1: needs validation shards or evaluation files; give them with -j, -hellaswag, -mc or "
            "-needle");
    if (o->block_indices && !o->val_only)
        die("-block-indices %s: only validation writes block indices; add -val 1", o->block_indices);
    if (o->block_indices && (!o->val || has_eval_files))
        die("-block-indices %s: writes those of the shards -j; %s", o->block_indices,
            o->val ? "drop -hellaswag, -mc and -needle" : "give them");
    if ((o->sample_only || o->val_only) && (o->resume || o->overfit))
        die("%s 1 %s 1: cannot be combined; drop one of them", o->sample_only ? "-sample" : "-val",
            o->resume ? "-y" : "-a");
    if (o->sample_only && o->output)
        die("-o %s: -sample 1 writes no log and no checkpoint; drop it", o->output);
    if (o->profile_steps && (o->sample_only || o->val_only || o->output || o->resume || o->overfit))
        die("-profile %lld: does not train; drop %s", (long long)o->profile_steps,
            o->sample_only ? "-sample"
            : o->val_only  ? "-val"
            : o->overfit   ? "-a"
            : o->output    ? "-o"
                           : "-y");
    if (!o->sample_only && !o->val_only && !o->profile_steps && !o->train)
        die("no training data: give shards with -i; -h lists all flags");
    if (o->resume && !o->output) die("-y 1: needs the folder of the run to resume; give it with -o");
    if (o->save_every > 0 && options_given(o, "n") && !o->output)
        die("-n %lld: needs a folder for checkpoints; give it with -o", (long long)o->save_every);
    if (options_given(o, "nk") && !o->output)
        die("-nk %lld: needs a folder for checkpoints; give it with -o", (long long)o->keep);
    if (o->val_every > 0 && options_given(o, "v") && !o->val && !has_eval_files)
        die("-v %lld: needs validation shards or evaluation files; give them with -j, -hellaswag, -mc or "
            "-needle",
            (long long)o->val_every);
    if (strcmp(o->matmul, "bf16") && strcmp(o->matmul, "fp8"))
        die("-matmul %s: must be bf16 or fp8", o->matmul);
    if (strcmp(o->schedule, "cosine") && strcmp(o->schedule, "linear") && strcmp(o->schedule, "constant") &&
        strcmp(o->schedule, "wsd"))
        die("-k %s: must be one of cosine|linear|constant|wsd", o->schedule);
    if (o->gate_bias) {
        char rest;
        if (sscanf(o->gate_bias, "%lf,%lf,%lf%c", &o->gate_bias_value[0], &o->gate_bias_value[1],
                   &o->gate_bias_value[2], &rest) != 3)
            die("-gate-bias %s: must be three numbers, such as -2,-2,2", o->gate_bias);
        for (int i = 0; i < 3; i++)
            if (!(fabs(o->gate_bias_value[i]) <= 100))
                die("-gate-bias %s: its numbers must be from -100 to 100", o->gate_bias);
    }
    if (o->max_steps == 0) die("-x 0: must be at least 1, or -1 for one epoch");
    if (o->max_steps > 0 && o->warmup > o->max_steps)
        die("-u %lld: warm-up is longer than the %lld steps of -x; lower -u or raise -x",
            (long long)o->warmup, (long long)o->max_steps);
}

// Returns the name of flag number i of options_find, with its dash.
static inline const char *options_canonical(int i) {
    static char name[64];
    int count;
    snprintf(name, sizeof name, "-%s",
             i < OPTIONS_MAX ? option_flags(&count)[i].flag : model_fields(&count)[i - OPTIONS_MAX].name);
    return name;
}

// Prints the versions of the program and the library.
static inline void options_version(void) {
#ifdef TRAINER_GPU
    const char *program = "train_gpt_nsa";
#else
    const char *program = "train_gpt_nsa_cpu";
#endif
    printf("%s %d.%d.%d, commit %s\n", program, FSA_VERSION_MAJOR, FSA_VERSION_MINOR, FSA_VERSION_PATCH,
           build_commit());
}

// Fills *o from the command line. If a flag is given twice, the last one counts. -h prints the help and exits
// with code 0. Dies on any error.
static inline void options_parse(Options *o, int argc, char **argv) {
    options_defaults(o);
    int count;
    const OptionFlag *flags = option_flags(&count);
    const ModelField *fields = model_fields(&count);
    for (int a = 1; a < argc; a++) {
        const char *arg = argv[a];
        char name[64];
        if (!strcmp(arg, "-version") || !strcmp(arg, "--version")) {
            options_version();
            finish_stdout();
            exit(0);
        }
        if (!strcmp(arg, "-h") || !strcmp(arg, "-help") || !strcmp(arg, "--help")) {
            options_help(argv[0]);
            finish_stdout();
            exit(0);
        }
        int i = options_find(arg);
        if (i < 0) options_unknown(arg);
        const char *text = options_split(arg, name, sizeof name);
        if (!text && (a + 1 >= argc || options_find(argv[a + 1]) >= 0))
            die("%s: its value is missing; -h explains the flag", arg);
        if (!text) text = argv[++a];
        if (strchr(arg, '=')) arg = options_canonical(i);
        if (text[0] == '\0' && strcmp(arg, "-prompt") != 0)
            die("%s: its value is empty; -h explains the flag", arg);
        if (i >= OPTIONS_MAX) {
            i -= OPTIONS_MAX;
            o->model_value[i] = options_parse_model(arg, text, &fields[i]);
            o->model_given[i] = 1;
            continue;
        }
#ifndef TRAINER_GPU
        if (option_is_gpu(&flags[i]))
            die("%s: only the GPU trainer has this flag; drop it, or run train_gpt_nsa", arg);
#endif
        char *field = (char *)o + flags[i].offset;
        o->given[i] = 1;
        if (flags[i].type == OPTION_TEXT) {
            memcpy(field, &text, sizeof text);
        } else {
            double value =
                options_parse_number(arg, text, flags[i].type == OPTION_INT, flags[i].min, flags[i].max);
            int64_t integer = (int64_t)value;
            if (flags[i].type == OPTION_INT)
                memcpy(field, &integer, sizeof integer);
            else
                memcpy(field, &value, sizeof value);
        }
    }
    if (o->val_only && !options_given(o, "m")) o->val_batches = 0;
    o->preset = preset_find(o->init_from);
    options_check(o);
}

// Applies the model's flags that are on the command line to *c.
static inline void options_override(const Options *o, ModelConfig *c) {
    int count;
    const ModelField *f = model_fields(&count);
    for (int i = 0; i < count; i++)
        if (o->model_given[i]) model_field_set(c, &f[i], o->model_value[i]);
    if (c->attn == ATTN_FULL && !options_given(o, "full-every"))
        c->full_every = 0; // -attn full on another model
    config_set_vocab(c, c->vocab_size);
}

// Fills *c for a new model: the preset -e, overridden by flags. vocab_size is 0 if neither sets it. Sets
// o->seq_len to the preset's unless -t is given. The caller calls config_check later, when it knows the
// vocabulary.
static inline void options_model(Options *o, ModelConfig *c) {
    config_from_preset(c, o->preset);
    options_override(o, c);
    if (o->seq_len == 0) o->seq_len = o->preset->seq_len;
    // a later run at a longer context scales RoPE from this length
    if (c->rope_factor == 0 && !options_given(o, "rope-original-len")) c->rope_original_len = o->seq_len;
}

// Checks the flags against *c, the model of a checkpoint that was trained at sequence length trained_len.
// Sets o->seq_len to trained_len unless -t is given. Dies if a flag or a preset -e contradicts the
// checkpoint. If -t is longer than trained_len, RoPE's flags may differ, and are applied to *c. So is another
// -attn, with the flags that belong to it, unless the run resumes.
static inline void options_check_model(Options *o, ModelConfig *c, int64_t trained_len, int resuming) {
    if (o->seq_len == 0) o->seq_len = trained_len;
    int count;
    const ModelField *f = model_fields(&count);
    ModelConfig wanted = *c;
    if (o->preset && options_given(o, "e")) {
        config_from_preset(&wanted, o->preset);
        config_set_vocab(&wanted, c->vocab_size);
    }
    options_override(o, &wanted);
    const int other_attention = wanted.attn != c->attn && options_given(o, "attn") && !resuming;
    for (int i = 0; i < count; i++) {
        double given_value = model_field_get(&wanted, &f[i]), stored_value = model_field_get(c, &f[i]);
        if (given_value == stored_value || !f[i].help) continue;
        int rope = model_field_is_rope(&f[i]);
        // a preset beside the checkpoint does not undo the RoPE flags of an earlier run at a longer context
        if (rope && !o->model_given[i]) continue;
        if ((rope && o->seq_len > trained_len) || (other_attention && model_field_is_attention(&f[i]))) {
            model_field_set(c, &f[i], given_value);
            continue;
        }
        char given_text[64], stored_text[64];
        model_field_print(&f[i], given_value, given_text, sizeof given_text);
        model_field_print(&f[i], stored_value, stored_text, sizeof stored_text);
        if (rope)
            die("-%s %s: the checkpoint's model has %s; drop the flag, or train at a -t above its %lld",
                f[i].name, given_text, stored_text, (long long)trained_len);
        if (o->model_given[i])
            die("-%s %s: the checkpoint's model has %s; drop the flag, or start a new model", f[i].name,
                given_text, stored_text);
        die("-e %s: its %s is %s, but the checkpoint's model has %s; drop -e, or choose another -o",
            o->init_from, f[i].name, given_text, stored_text);
    }
}

// Sets -x -1 to the steps of an epoch, and -l and -u unless they are given: to those of the run that wrote
// the checkpoint of -e or -y (saved_lr 0: unknown), else of the preset. Dies if no -l is known. epoch_steps:
// steps of an epoch.
static inline void options_set_schedule(Options *o, double saved_lr, int64_t saved_warmup,
                                        int64_t epoch_steps) {
    if (o->max_steps < 0) o->max_steps = epoch_steps > 0 ? epoch_steps : 1;
    if (!options_given(o, "l")) {
        if (saved_lr <= 0 && !o->preset)
            die("-e %s: has no learning rate, as an imported model has none; give one, such as -l 1e-5",
                o->init_from);
        o->lr = saved_lr > 0 ? saved_lr : o->preset->lr;
    }
    if (!options_given(o, "u")) {
        int64_t tenth = o->max_steps / 10;
        o->warmup = o->preset && o->preset->warmup < tenth ? o->preset->warmup : o->preset ? tenth : 0;
        if (saved_lr > 0 && saved_warmup <= o->max_steps) o->warmup = saved_warmup;
    }
    if (o->warmup > o->max_steps)
        die("-u %lld: warm-up is longer than the %lld steps of -x; lower -u or raise -x",
            (long long)o->warmup, (long long)o->max_steps);
}

// Returns the number of micro-batches per step, each of b*t tokens on each of `ranks` data-parallel ranks;
// dies if -d is not a multiple of these tokens.
static inline int64_t options_micro_batches(const Options *o, int ranks) {
    int64_t tokens = o->batch * o->seq_len * ranks;
    if (o->total_batch == 0) return 1;
    if (o->total_batch % tokens != 0)
        die("-d %lld: must be a multiple of b*t%s = %lld; try -d %lld", (long long)o->total_batch,
            ranks > 1 ? "*data-parallel ranks" : "", (long long)tokens,
            (long long)((o->total_batch / tokens + 1) * tokens));
    return o->total_batch / tokens;
}
#endif
