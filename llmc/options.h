// options.h: the command line of both trainers. One table says each flag's letter, type, range and
// meaning; model flags come from config.h's table of fields. Every mistake dies with one line. The GPU
// trainer defines TRAINER_GPU before it includes this: some flags are its alone.
#ifndef LLMC_OPTIONS_H
#define LLMC_OPTIONS_H
#include "utils.h"
#include "config.h"

#define OPTIONS_MAX 96 // at least the number of flags, model flags included

typedef struct {
    const char *train, *val;   // glob patterns of shards, NULL: none
    const char *start;         // a preset's name, or a checkpoint file
    const char *output;        // folder of checkpoints and log, NULL: none
    int64_t save_every, keep;  // steps between checkpoints (0: only at the end), how many stay
    int64_t resume;            // 1: go on from the newest good checkpoint in output
    int64_t batch, seq_len;    // micro-batch [batch, seq_len]; seq_len 0 until the model is known
    int64_t total_batch;       // tokens of a step, 0: one micro-batch
    int64_t max_steps, warmup; // warmup: steps
    double lr, final_frac;     // the last step's lr is final_frac*lr
    double weight_decay, beta1, beta2, eps, clip;
    int64_t val_every, val_batches; // 0: never; 0: all
    int64_t sample_every, generate; // 0: never; tokens
    int64_t overfit, val_only, sample_only;
    const char *prompt;
    double temperature, top_p;
    int64_t seed, doc_mask;
    int64_t skip_bad;                 // 1: a step that is not finite is skipped
    int64_t recompute, profile_steps; // of the GPU trainer
    double peak_tflops;               // the same; 0: by the GPU's name
    const char *choice;               // the same; a file, or NULL
    int64_t zero, context;            // the same, of several: ZeRO's stage, GPUs that share a batch
    // set by the parser
    const Preset *preset;             // NULL: start is a checkpoint file
    unsigned char given[OPTIONS_MAX]; // by the table's index: was it on the command line?
    double model_value[OPTIONS_MAX];  // by model_fields' index, where given
    unsigned char model_given[OPTIONS_MAX];
} Options;

typedef enum { OPTION_TEXT, OPTION_INT, OPTION_REAL } OptionType;
typedef struct {
    const char *flag, *alias; // without the dash; alias may be NULL
    OptionType type;
    size_t offset; // in Options: const char *, int64_t or double
    double min, max;
    const char *help;
} OptionFlag;

// All flags but the model's. *count: how many.
static inline const OptionFlag *option_flags(int *count) {
#define AT(member) offsetof(Options, member)
#define BIG 9e15
    static const OptionFlag flags[] = {
        {"i", NULL, OPTION_TEXT, AT(train), 0, 0, "training shards, a glob pattern in quotes"},
        {"j", NULL, OPTION_TEXT, AT(val), 0, 0, "validation shards, a glob pattern in quotes"},
        {"e", NULL, OPTION_TEXT, AT(start), 0, 0, "where to start: a preset (below) or a checkpoint file"},
        {"o", NULL, OPTION_TEXT, AT(output), 0, 0, "folder of checkpoints and log"},
        {"n", NULL, OPTION_INT, AT(save_every), 0, BIG,
         "write a checkpoint every n steps, 0: only at the end"},
        {"nk", NULL, OPTION_INT, AT(keep), 1, BIG, "keep the last nk checkpoints"},
        {"y", NULL, OPTION_INT, AT(resume), 0, 1, "1: go on from the newest good checkpoint in -o, if any"},
        {"b", NULL, OPTION_INT, AT(batch), 1, 1 << 24, "sequences in a micro-batch"},
        {"t", NULL, OPTION_INT, AT(seq_len), 0, 1 << 30,
         "tokens in a sequence, 0: the preset's or checkpoint's"},
        {"d", NULL, OPTION_INT, AT(total_batch), 0, BIG, "tokens of a step, a multiple of b*t, 0: b*t"},
        {"x", NULL, OPTION_INT, AT(max_steps), 1, BIG, "steps"},
        {"l", NULL, OPTION_REAL, AT(lr), 0, 1e6, "learning rate"},
        {"u", NULL, OPTION_INT, AT(warmup), 0, BIG, "steps of warm-up"},
        {"q", NULL, OPTION_REAL, AT(final_frac), 0, 1, "learning rate at the end, as a fraction of -l"},
        {"c", NULL, OPTION_REAL, AT(weight_decay), 0, 1e6, "weight decay, on matrices"},
        {"beta1", NULL, OPTION_REAL, AT(beta1), 0, 0.999999999, "AdamW's beta1"},
        {"beta2", NULL, OPTION_REAL, AT(beta2), 0, 0.999999999, "AdamW's beta2"},
        {"eps", NULL, OPTION_REAL, AT(eps), 1e-30, 1, "AdamW's epsilon"},
        {"clip", NULL, OPTION_REAL, AT(clip), 0, 1e30, "clip the gradient to this norm, 0: don't"},
        {"v", NULL, OPTION_INT, AT(val_every), 0, BIG, "validate every v steps, 0: never"},
        {"m", NULL, OPTION_INT, AT(val_batches), 0, BIG, "batches of a validation, 0: all"},
        {"s", NULL, OPTION_INT, AT(sample_every), 0, BIG, "sample text every s steps, 0: never"},
        {"g", NULL, OPTION_INT, AT(generate), 1, 1 << 30, "tokens to sample"},
        {"a", "overfit", OPTION_INT, AT(overfit), 0, 1, "1: train on the first batch again and again"},
        {"val", NULL, OPTION_INT, AT(val_only), 0, 1, "1: only validate the checkpoint -e on -j"},
        {"sample", NULL, OPTION_INT, AT(sample_only), 0, 1, "1: only sample from the checkpoint -e"},
        {"prompt", NULL, OPTION_TEXT, AT(prompt), 0, 0, "text that samples go on from"},
        {"temp", NULL, OPTION_REAL, AT(temperature), 0, 1e6,
         "temperature of samples, 0: the likeliest token"},
        {"topp", NULL, OPTION_REAL, AT(top_p), 1e-9, 1, "sample among the likeliest tokens of this total"},
        {"seed", NULL, OPTION_INT, AT(seed), 0, BIG, "of initial values, sample order and samples"},
        {"doc-mask", NULL, OPTION_INT, AT(doc_mask), 0, 1, "1: no token sees another document"},
        {"skip", NULL, OPTION_INT, AT(skip_bad), 0, 1,
         "where a step's loss or gradient is not finite, 0: stop, 1: leave the step out"},
#ifdef TRAINER_GPU
        {"r", "recompute", OPTION_INT, AT(recompute), 0, 2,
         "in the backward pass recompute 0: nothing, 1: norms and SwiGLU, 2: whole layers"},
        {"profile", NULL, OPTION_INT, AT(profile_steps), 0, 10000,
         "time n steps on random tokens, part by part, and end; 0: train"},
        {"choice", NULL, OPTION_TEXT, AT(choice), 0, 0,
         "with -val 1: write the blocks that the last batch's queries chose to this file"},
        {"peak-tflops", NULL, OPTION_REAL, AT(peak_tflops), 0, 1e9,
         "the GPU's peak rate, which MFU is a part of; 0: known by its name"},
        {"z", "zero", OPTION_INT, AT(zero), 0, 2,
         "of several GPUs each keeps 0: everything, 1: a part of fp32 weights and AdamW's state, 2: of "
         "gradients too"},
        {"cp", NULL, OPTION_INT, AT(context), 1, 1 << 20,
         "context parallel: so many GPUs share the tokens of each micro-batch"},
#endif
    };
#undef BIG
#undef AT
    *count = (int)(sizeof flags / sizeof flags[0]);
    return flags;
}

static inline void options_defaults(Options *o) {
    memset(o, 0, sizeof *o);
    o->start = "recall";
    o->save_every = 1000, o->keep = 3;
    o->batch = 4;
    o->max_steps = 1000, o->lr = 1e-3, o->final_frac = 0.1;
    o->weight_decay = 0.1, o->beta1 = 0.9, o->beta2 = 0.95, o->eps = 1e-8, o->clip = 1;
    o->val_every = 250, o->val_batches = 20, o->generate = 128;
    o->temperature = 0.8, o->top_p = 0.95;
    o->seed = 1337, o->doc_mask = 1;
    o->context = 1;
}

// Whether a flag (as the table spells it, without the dash) was on the command line.
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

// A number as text, without the digits that it does not need.
static inline void options_number(char *out, size_t size, int integer, double value) {
    snprintf(out, size, integer ? "%.0f" : "%.12g", value);
}

static inline void options_help(const char *program) {
    Options defaults;
    options_defaults(&defaults);
    int count;
    char value[64];
    printf("Trains, validates and samples a transformer with native sparse attention.\n"
           "usage: %s [-flag value]...\n\n",
           program);
    const OptionFlag *f = option_flags(&count);
    for (int i = 0; i < count; i++) {
        const char *at = (const char *)&defaults + f[i].offset, *text = NULL;
        char name[32];
        snprintf(name, sizeof name, "-%s%s%s", f[i].flag, f[i].alias ? ", -" : "",
                 f[i].alias ? f[i].alias : "");
        if (f[i].type == OPTION_TEXT) {
            memcpy(&text, at, sizeof text);
            snprintf(value, sizeof value, "%s", text ? text : "none");
        } else if (f[i].type == OPTION_INT) {
            int64_t n;
            memcpy(&n, at, sizeof n);
            options_number(value, sizeof value, 1, (double)n);
        } else {
            double x;
            memcpy(&x, at, sizeof x);
            options_number(value, sizeof value, 0, x);
        }
        printf("  %-20s %s (default: %s)\n", name, f[i].help, value);
    }
    printf("\nThe model (default: what the preset or the checkpoint -e says):\n");
    const ModelField *m = model_fields(&count);
    for (int i = 0; i < count; i++) {
        if (!m[i].help) continue;
        printf("  -%-19s %s%s%s\n", m[i].name, m[i].help, m[i].choices ? ": " : "",
               m[i].choices ? m[i].choices : "");
    }
    printf("\nPresets:\n");
    const Preset *p = presets(&count);
    for (int i = 0; i < count; i++) {
        printf("  %-12s %s: %d layers, %d channels, %d/%d heads of %d, context %d\n", p[i].name, p[i].help,
               p[i].layers, p[i].channels, p[i].q_heads, p[i].kv_heads, p[i].head_dim, p[i].seq_len);
    }
}

// Changes (insert, delete, replace, swap neighbours) that make a into b; names of up to 31 letters.
static inline int options_distance(const char *a, const char *b) {
    int na = (int)strlen(a), nb = (int)strlen(b), t[32][32];
    if (na > 31 || nb > 31) return 99;
    for (int i = 0; i <= na; i++) {
        for (int j = 0; j <= nb; j++) {
            if (i == 0 || j == 0) {
                t[i][j] = i + j;
                continue;
            }
            int best = t[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
            if (t[i - 1][j] + 1 < best) best = t[i - 1][j] + 1;
            if (t[i][j - 1] + 1 < best) best = t[i][j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && t[i - 2][j - 2] + 1 < best)
                best = t[i - 2][j - 2] + 1;
            t[i][j] = best;
        }
    }
    return t[na][nb];
}

// Index of the flag that `arg` (dash included) names: in option_flags, or OPTIONS_MAX + the index in
// model_fields; -1: none. One dash or two.
static inline int options_find(const char *arg) {
    if (arg[0] != '-' || arg[1] == '\0') return -1;
    const char *name = arg[1] == '-' ? arg + 2 : arg + 1;
    int count;
    const OptionFlag *f = option_flags(&count);
    for (int i = 0; i < count; i++)
        if (strcmp(f[i].flag, name) == 0 || (f[i].alias && strcmp(f[i].alias, name) == 0)) return i;
    const ModelField *m = model_fields(&count);
    for (int i = 0; i < count; i++)
        if (m[i].help && strcmp(m[i].name, name) == 0) return OPTIONS_MAX + i;
    return -1;
}

LLMC_NORETURN static inline void options_unknown(const char *arg) {
    if (arg[0] != '-') die("%s: not a flag; flags start with a dash, -h lists them", arg);
    const char *name = arg[1] == '-' ? arg + 2 : arg + 1, *nearest = NULL;
    int count, best = strlen(name) < 5 ? 1 : 2; // more is another word
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
    if (nearest) die("unknown flag %s: did you mean -%s? -h lists all", arg, nearest);
    die("unknown flag %s: -h lists all", arg);
}

// Reads a number within [min, max]; dies naming flag and text.
static inline double options_parse_number(const char *arg, const char *text, int integer, double min,
                                          double max) {
    char *end, low[64], high[64];
    double value = integer ? (double)strtoll(text, &end, 10) : strtod(text, &end);
    if (end == text || *end != '\0' || !isfinite(value) || text[0] == ' ')
        die("%s %s: not %s", arg, text, integer ? "a whole number" : "a number");
    options_number(low, sizeof low, integer, min);
    options_number(high, sizeof high, integer, max);
    if (value < min || value > max)
        die("%s %s: out of range, must be within %s and %s", arg, text, low, high);
    return value;
}

static inline double options_parse_model(const char *arg, const char *text, const ModelField *f) {
    if (!f->choices)
        return options_parse_number(arg, text, f->type == FIELD_INT32 || f->type == FIELD_INT64, f->min,
                                    f->max);
    for (int i = 0; i <= (int)f->max; i++) {
        char word[32];
        model_field_print(f, i, word, sizeof word);
        if (strcmp(word, text) == 0) return i;
    }
    die("%s %s: must be one of %s", arg, text, f->choices);
}

// Dies where two flags contradict each other.
static inline void options_check(const Options *o) {
    struct stat st;
    if (!o->preset) {
        int count;
        const Preset *p = presets(&count);
        char names[256] = "";
        for (int i = 0; i < count; i++)
            snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? " " : "", p[i].name);
        if (stat(o->start, &st) != 0)
            die("-e %s: neither a preset (%s) nor a checkpoint file: %s", o->start, names, strerror(errno));
        if (S_ISDIR(st.st_mode))
            die("-e %s: a folder; name a checkpoint file in it, or go on in it with -o %s -y 1", o->start,
                o->start);
    }
    if (o->sample_only && o->val_only) die("-sample 1 -val 1: contradict each other, give one of them");
    if (o->sample_only && o->preset)
        die("-sample 1: there is nothing to sample from, give a checkpoint file with -e");
    if (o->val_only && o->preset) die("-val 1: there is nothing to validate, give a checkpoint file with -e");
    if (o->val_only && !o->val) die("-val 1: there is nothing to validate on, give shards with -j");
    if (o->choice && !o->val_only) die("-choice %s: blocks are written while validating, add -val 1", o->choice);
    if ((o->sample_only || o->val_only) && (o->resume || o->overfit))
        die("%s 1 %s 1: contradict each other, drop one of them", o->sample_only ? "-sample" : "-val",
            o->resume ? "-y" : "-a");
    if (o->profile_steps && (o->sample_only || o->val_only || o->output || o->resume || o->overfit))
        die("-profile %lld: trains nothing, drop %s", (long long)o->profile_steps,
            o->sample_only ? "-sample"
            : o->val_only  ? "-val"
            : o->overfit   ? "-a"
            : o->output    ? "-o"
                           : "-y");
    if (!o->sample_only && !o->val_only && !o->profile_steps && !o->train)
        die("there is nothing to train on: give shards with -i, or -h for all flags");
    if (o->resume && !o->output) die("-y 1: there is nothing to go on from, name the folder with -o");
    if (o->save_every > 0 && options_given(o, "n") && !o->output)
        die("-n %lld: there is nowhere to write checkpoints, name a folder with -o",
            (long long)o->save_every);
    if (options_given(o, "nk") && !o->output)
        die("-nk %lld: there is nowhere to keep checkpoints, name a folder with -o", (long long)o->keep);
    if (o->val_every > 0 && options_given(o, "v") && !o->val)
        die("-v %lld: there is nothing to validate on, give shards with -j", (long long)o->val_every);
    if (o->warmup > o->max_steps)
        die("-u %lld: warm-up is longer than the %lld steps of -x", (long long)o->warmup,
            (long long)o->max_steps);
}

// Fills `o` from the command line; -h prints all flags and exits with 0. The last one counts where a
// flag is given twice.
static inline void options_parse(Options *o, int argc, char **argv) {
    options_defaults(o);
    int count;
    const OptionFlag *flags = option_flags(&count);
    const ModelField *fields = model_fields(&count);
    for (int a = 1; a < argc; a += 2) {
        const char *arg = argv[a];
        if (!strcmp(arg, "-h") || !strcmp(arg, "-help") || !strcmp(arg, "--help")) {
            options_help(argv[0]);
            exit(0);
        }
        int i = options_find(arg);
        if (i < 0) options_unknown(arg);
        if (a + 1 >= argc || options_find(argv[a + 1]) >= 0)
            die("%s: its value is missing, -h explains it", arg);
        const char *text = argv[a + 1];
        if (text[0] == '\0' && strcmp(arg, "-prompt") != 0) die("%s: its value is empty", arg);
        if (i >= OPTIONS_MAX) {
            i -= OPTIONS_MAX;
            o->model_value[i] = options_parse_model(arg, text, &fields[i]);
            o->model_given[i] = 1;
            continue;
        }
        char *at = (char *)o + flags[i].offset;
        o->given[i] = 1;
        if (flags[i].type == OPTION_TEXT) {
            memcpy(at, &text, sizeof text);
        } else {
            double value =
                options_parse_number(arg, text, flags[i].type == OPTION_INT, flags[i].min, flags[i].max);
            int64_t whole = (int64_t)value;
            if (flags[i].type == OPTION_INT)
                memcpy(at, &whole, sizeof whole);
            else
                memcpy(at, &value, sizeof value);
        }
    }
    o->preset = preset_find(o->start);
    options_check(o);
}

// Applies the model flags that were given.
static inline void options_override(const Options *o, ModelConfig *c) {
    int count;
    const ModelField *f = model_fields(&count);
    for (int i = 0; i < count; i++)
        if (o->model_given[i]) model_field_set(c, &f[i], o->model_value[i]);
    config_set_vocab(c, c->vocab_size);
}

// A new model: the preset -e with the flags given, vocab_size 0 where neither tells it. o->seq_len
// becomes the preset's unless -t was given. config_check comes later, when the vocabulary is known.
static inline void options_model(Options *o, ModelConfig *c) {
    config_from_preset(c, o->preset);
    options_override(o, c);
    if (o->seq_len == 0) o->seq_len = o->preset->seq_len;
    // what a later, longer continuation scales from
    if (c->rope_factor == 0 && !options_given(o, "rope-original-len")) c->rope_original_len = o->seq_len;
}

// A model from a checkpoint that was trained at `trained_len` tokens a sequence. o->seq_len becomes
// that unless -t was given. A flag that contradicts the checkpoint dies with both values, and so does
// a preset given by name. RoPE's flags may change it, and are applied to `c`, where -t asks for longer
// sequences.
static inline void options_check_model(Options *o, ModelConfig *c, int64_t trained_len) {
    if (o->seq_len == 0) o->seq_len = trained_len;
    int count;
    const ModelField *f = model_fields(&count);
    ModelConfig wanted = *c;
    if (o->preset && options_given(o, "e")) {
        config_from_preset(&wanted, o->preset);
        config_set_vocab(&wanted, c->vocab_size);
    }
    options_override(o, &wanted);
    for (int i = 0; i < count; i++) {
        double mine = model_field_get(&wanted, &f[i]), theirs = model_field_get(c, &f[i]);
        if (mine == theirs || !f[i].help) continue;
        int rope = model_field_is_rope(&f[i]);
        // a preset given beside it does not undo what an earlier, longer continuation changed
        if (rope && !o->model_given[i]) continue;
        if (rope && o->seq_len > trained_len) {
            model_field_set(c, &f[i], mine);
            continue;
        }
        char a[64], b[64];
        model_field_print(&f[i], mine, a, sizeof a);
        model_field_print(&f[i], theirs, b, sizeof b);
        if (rope)
            die("-%s %s: the checkpoint's model has %s, which only a -t above its %lld may change", f[i].name,
                a, b, (long long)trained_len);
        if (o->model_given[i])
            die("-%s %s: the checkpoint's model has %s; drop the flag, or start a new model", f[i].name, a,
                b);
        die("-e %s: its %s is %s, but the checkpoint's model has %s; drop -e, or choose another -o", o->start,
            f[i].name, a, b);
    }
}

// Micro-batches of a step, each of b*t tokens on `ranks` data-parallel processes (or groups of -cp); dies
// unless -d is a multiple.
static inline int64_t options_micro_batches(const Options *o, int ranks) {
    int64_t tokens = o->batch * o->seq_len * ranks;
    if (o->total_batch == 0) return 1;
    if (o->total_batch % tokens != 0)
        die("-d %lld: must be a multiple of b*t%s = %lld", (long long)o->total_batch,
            ranks > 1 ? "*processes" : "", (long long)tokens);
    return o->total_batch / tokens;
}
#endif
