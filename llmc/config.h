// config.h: the configuration of a model, shared by both trainers: its fields, presets and checks; the
// parameter table and initial values; RoPE's frequencies.
#ifndef LLMC_CONFIG_H
#define LLMC_CONFIG_H
#include "utils.h"
#include "rand.h"
#include "../fsa/fsa.h"
#include <math.h>
#include <stddef.h>

typedef enum { ATTN_NSA = 0, ATTN_FULL = 1, ATTN_WINDOW = 2 } AttnMode;

typedef struct {
    int32_t vocab_size;   // V
    int32_t padded_vocab; // Vp, V rounded up to a multiple of 128: the rows of wte and lm_head
    int32_t layers;       // L
    int32_t channels;     // C
    int32_t hidden;       // hidden width of the SwiGLU
    int32_t attn;         // an AttnMode, of all layers but those of full_every
    int32_t full_every;   // N: every N-th layer has full attention; 0: none (layer_attention)
    int32_t tied;         // 1: the LM head shares the weights of wte
    int32_t qkv_bias;     // 1: bias on q, k and v (Qwen2.5)
    int32_t qk_norm;      // 1: RMSNorm on each q and k head (Qwen3)
    double rope_theta, norm_eps;
    double rope_factor; // of Llama 3.1's RoPE scaling; 0: no scaling
    double rope_low_freq, rope_high_freq;
    int64_t rope_original_len; // context length before the scaling
    FsaConfig fsa;             // heads, head size and the parameters of the sparse attention
} ModelConfig;

// Returns the attention mode of layer l. With full_every = N > 0, layers N - 1, 2N - 1, ... have full
// attention.
static inline AttnMode layer_attention(const ModelConfig *c, int l) {
    return c->full_every > 0 && (l + 1) % c->full_every == 0 ? ATTN_FULL : (AttnMode)c->attn;
}

// Returns the gate logits of a token.
static inline int num_gate_logits(const FsaConfig *f) {
    return f->gate_per_token ? 3 : 3 * f->q_heads;
}

// Returns the elements of bgate: the gate logits of a token, rounded up so that all tensors stay aligned.
static inline int gate_bias_size(const FsaConfig *f) {
    return (num_gate_logits(f) + 7) / 8 * 8;
}

// ----------------------------------------------------------------------------
// The table of fields, which flags, checkpoints and messages use

typedef enum { FIELD_INT32, FIELD_INT64, FIELD_FLOAT, FIELD_DOUBLE } FieldType;
typedef struct {
    const char *name; // the flag is -name
    FieldType type;
    size_t offset; // in ModelConfig
    double min, max;
    const char *enum_names; // names of the values 0, 1, ..., separated by '|', or NULL
    const char *help;       // NULL: there is no flag
} ModelField;

// Returns the table of all fields, in the order of the checkpoint's header, and its length in *count.
static inline const ModelField *model_fields(int *count) {
#define OFFSET(member) offsetof(ModelConfig, member)
    static const ModelField fields[] = {
        {"vocab", FIELD_INT32, OFFSET(vocab_size), 1, 1 << 30, NULL,
         "vocabulary size in tokens, needed if the shards have no tokenizer.bin"},
        {"padded-vocab", FIELD_INT32, OFFSET(padded_vocab), 1, 1 << 30, NULL, NULL},
        {"layers", FIELD_INT32, OFFSET(layers), 1, 10000, NULL, "number of layers"},
        {"channels", FIELD_INT32, OFFSET(channels), 1, 1 << 20, NULL, "C, width of the model in channels"},
        {"hidden", FIELD_INT32, OFFSET(hidden), 1, 1 << 24, NULL, "hidden width of the SwiGLU in channels"},
        {"attn", FIELD_INT32, OFFSET(attn), 0, 2, "nsa|full|window",
         "attention mode: native sparse, full causal, or a sliding window of -window tokens"},
        {"heads", FIELD_INT32, OFFSET(fsa.q_heads), 1, 65536, NULL,
         "number of query heads, a multiple of -kv-heads"},
        {"kv-heads", FIELD_INT32, OFFSET(fsa.kv_heads), 1, 65536, NULL, "number of key-value heads"},
        {"head-dim", FIELD_INT32, OFFSET(fsa.head_dim), 2, 65536, NULL, "head size in channels, even"},
        {"tied", FIELD_INT32, OFFSET(tied), 0, 1, NULL,
         "1: the LM head shares the weights of the token embedding"},
        {"qkv-bias", FIELD_INT32, OFFSET(qkv_bias), 0, 1, NULL, "1: bias on q, k and v (Qwen2.5)"},
        {"qk-norm", FIELD_INT32, OFFSET(qk_norm), 0, 1, NULL, "1: RMSNorm on each q and k head (Qwen3)"},
        {"norm-eps", FIELD_DOUBLE, OFFSET(norm_eps), 1e-20, 1, NULL, "epsilon of RMSNorm"},
        {"theta", FIELD_DOUBLE, OFFSET(rope_theta), 1, 1e15, NULL, "base of RoPE's frequencies"},
        {"rope-factor", FIELD_DOUBLE, OFFSET(rope_factor), 0, 1e6, NULL,
         "factor of Llama 3.1's RoPE scaling; 0: no scaling"},
        {"rope-low-freq", FIELD_DOUBLE, OFFSET(rope_low_freq), 0, 1e6, NULL,
         "low_freq_factor of the RoPE scaling"},
        {"rope-high-freq", FIELD_DOUBLE, OFFSET(rope_high_freq), 0, 1e6, NULL,
         "high_freq_factor of the RoPE scaling"},
        {"rope-original-len", FIELD_INT64, OFFSET(rope_original_len), 1, 1e12, NULL,
         "context length before the RoPE scaling, in tokens"},
        {"cmp-len", FIELD_INT32, OFFSET(fsa.cmp_len), 1, 65536, NULL,
         "l, length of a compression window in tokens"},
        {"cmp-stride", FIELD_INT32, OFFSET(fsa.cmp_stride), 1, 65536, NULL,
         "s, stride of the compression windows in tokens"},
        {"block", FIELD_INT32, OFFSET(fsa.block), 16, 1 << 20, NULL,
         "B, size of a selection block in tokens"},
        {"topk", FIELD_INT32, OFFSET(fsa.topk), 1, 1 << 20, NULL, "T, number of blocks that a query selects"},
        {"init-blocks", FIELD_INT32, OFFSET(fsa.init_blocks), 0, 1 << 20, NULL,
         "number of initial blocks, always selected"},
        {"local-blocks", FIELD_INT32, OFFSET(fsa.local_blocks), 0, 1 << 20, NULL,
         "number of local blocks, always selected"},
        {"window", FIELD_INT32, OFFSET(fsa.window), 1, 1 << 30, NULL,
         "W, size of the sliding window in tokens"},
        {"phi", FIELD_INT32, OFFSET(fsa.phi), 0, 1, "mean|linear", "compression of a window"},
        {"gate-per-token", FIELD_INT32, OFFSET(fsa.gate_per_token), 0, 1, NULL,
         "1: all heads of a token share the three gates"},
        {"scale", FIELD_FLOAT, OFFSET(fsa.scale), 0, 1e6, NULL,
         "softmax scale, the factor of q.k; 0: 1/sqrt(head-dim)"},
        {"full-every", FIELD_INT32, OFFSET(full_every), 0, 10000, NULL,
         "N: every N-th layer has full attention, the others -attn nsa or window; 0: none"},
    };
#undef OFFSET
    *count = (int)(sizeof fields / sizeof fields[0]);
    return fields;
}

// Returns the value of a field.
static inline double model_field_get(const ModelConfig *c, const ModelField *f) {
    const char *p = (const char *)c + f->offset;
    int32_t i32;
    int64_t i64;
    float f32;
    double f64;
    switch (f->type) {
    case FIELD_INT32:
        memcpy(&i32, p, sizeof i32);
        return i32;
    case FIELD_INT64:
        memcpy(&i64, p, sizeof i64);
        return (double)i64;
    case FIELD_FLOAT:
        memcpy(&f32, p, sizeof f32);
        return f32;
    default:
        memcpy(&f64, p, sizeof f64);
        return f64;
    }
}

// Sets a field to a value in [f->min, f->max].
static inline void model_field_set(ModelConfig *c, const ModelField *f, double value) {
    char *p = (char *)c + f->offset;
    int32_t i32 = f->type == FIELD_INT32 ? (int32_t)value : 0;
    int64_t i64 = f->type == FIELD_INT64 ? (int64_t)value : 0;
    float f32 = (float)value;
    switch (f->type) {
    case FIELD_INT32:
        memcpy(p, &i32, sizeof i32);
        break;
    case FIELD_INT64:
        memcpy(p, &i64, sizeof i64);
        break;
    case FIELD_FLOAT:
        memcpy(p, &f32, sizeof f32);
        break;
    default:
        memcpy(p, &value, sizeof value);
        break;
    }
}

// Writes a field's value as text: a number, or one of f->enum_names.
static inline void model_field_print(const ModelField *f, double value, char *out, size_t size) {
    const char *word = f->enum_names;
    for (int i = 0; word && i < (int)value; i++) {
        word = strchr(word, '|');
        if (word) word++;
    }
    if (word)
        snprintf(out, size, "%.*s", (int)strcspn(word, "|"), word);
    else if (f->type == FIELD_INT32 || f->type == FIELD_INT64)
        snprintf(out, size, "%.0f", value);
    else
        snprintf(out, size, "%.12g", value);
}

// Returns whether the field is the attention mode, or belongs to one mode. A new run can change these fields
// of a checkpoint's model together with -attn.
static inline int model_field_is_attention(const ModelField *f) {
    return f->offset == offsetof(ModelConfig, attn) || f->offset == offsetof(ModelConfig, full_every) ||
           (f->offset >= offsetof(ModelConfig, fsa.cmp_len) &&
            f->offset <= offsetof(ModelConfig, fsa.gate_per_token));
}

// Returns whether the field only affects RoPE's frequencies. Training can continue with another value of it.
static inline int model_field_is_rope(const ModelField *f) {
    return strcmp(f->name, "theta") == 0 || strncmp(f->name, "rope-", 5) == 0;
}

// ----------------------------------------------------------------------------
// Presets and checks

typedef struct {
    const char *name;
    const char *help;
    int seq_len; // default of -t
    int vocab;   // 0: from the tokenizer or -vocab
    double lr;   // default of -l
    int warmup;  // default of -u in steps, if that is at most a tenth of -x
    int layers, channels, hidden, tied, qkv_bias, qk_norm;
    double theta, eps;
    int q_heads, kv_heads, head_dim;
    int cmp_len, cmp_stride, block, topk, init_blocks, local_blocks, window;
} Preset;

// Returns the table of all presets, and its length in *count.
static inline const Preset *presets(int *count) {
    // clang-format off
    static const Preset table[] = {
        // name, help, seq_len, vocab, lr, warmup,
        //     L, C, hidden, tied, bias, qk-norm, theta, eps, Hq, Hkv, d,  l, s, B, T, init, local, W
        {"recall", "the synthetic recall task", 256, 0, 2e-3, 150,
            2, 64, 128, 0, 0, 0, 1e4, 1e-5, 4, 2, 32,  8, 4, 16, 4, 1, 2, 16},
        {"tiny", "bytes of text, minutes on two CPU cores", 1024, 0, 1e-3, 100,
            4, 128, 352, 0, 0, 0, 1e4, 1e-5, 4, 2, 32,  16, 8, 32, 8, 1, 2, 128},
        {"recall-1k", "the recall task over a longer context, on a GPU", 1024, 0, 1e-3, 150,
            4, 256, 512, 0, 0, 0, 1e4, 1e-5, 4, 2, 64,  8, 4, 16, 8, 1, 2, 32},
        {"shakespeare", "bytes of text, minutes on a GPU", 1024, 0, 1e-3, 100,
            6, 384, 1024, 0, 0, 0, 1e4, 1e-5, 6, 2, 64,  16, 8, 32, 8, 1, 2, 128},
        {"gpt-124m", "about GPT-2's size; 4 query heads per kv head", 8192, 50257, 6e-4, 700,
            12, 768, 2048, 1, 0, 0, 1e4, 1e-5, 12, 3, 64,  32, 16, 64, 16, 1, 2, 512},
        {"smollm2-360m", "SmolLM2 360M", 8192, 49152, 6e-4, 1000,
            32, 960, 2560, 1, 0, 0, 1e5, 1e-5, 15, 5, 64,  32, 16, 64, 16, 1, 2, 512},
        {"qwen3-0.6b", "Qwen3 0.6B", 8192, 151936, 5e-4, 1000,
            28, 1024, 3072, 1, 0, 1, 1e6, 1e-6, 16, 8, 128,  32, 16, 64, 16, 1, 2, 512},
        {"llama3.2-1b", "Llama 3.2 1B", 8192, 128256, 4e-4, 2000,
            16, 2048, 8192, 1, 0, 0, 5e5, 1e-5, 32, 8, 64,  32, 16, 64, 16, 1, 2, 512},
        {"llama3.2-3b", "Llama 3.2 3B", 8192, 128256, 3e-4, 2000,
            28, 3072, 8192, 1, 0, 0, 5e5, 1e-5, 24, 8, 128,  32, 16, 64, 16, 1, 2, 512},
        {"llama3-8b", "Llama 3 8B", 8192, 128256, 3e-4, 2000,
            32, 4096, 14336, 0, 0, 0, 5e5, 1e-5, 32, 8, 128,  32, 16, 64, 16, 1, 2, 512},
        {"qwen3-14b", "Qwen3 14B", 8192, 151936, 3e-4, 2000,
            40, 5120, 17408, 0, 0, 1, 1e6, 1e-6, 40, 8, 128,  32, 16, 64, 16, 1, 2, 512},
        {"qwen2.5-7b", "Qwen2.5 7B", 8192, 152064, 3e-4, 2000,
            28, 3584, 18944, 0, 1, 0, 1e6, 1e-6, 28, 4, 128,  32, 16, 64, 16, 1, 2, 512},
    };
    // clang-format on
    *count = (int)(sizeof table / sizeof table[0]);
    return table;
}

// Returns the preset with this name, or NULL.
static inline const Preset *preset_find(const char *name) {
    int count;
    const Preset *p = presets(&count);
    for (int i = 0; i < count; i++)
        if (strcmp(p[i].name, name) == 0) return &p[i];
    return NULL;
}

// Sets vocab_size, and padded_vocab to the next multiple of 128.
static inline void config_set_vocab(ModelConfig *c, int32_t vocab_size) {
    c->vocab_size = vocab_size;
    c->padded_vocab = (vocab_size + 127) / 128 * 128;
}

// Fills *c from a preset, with attention mode nsa and linear compression.
static inline void config_from_preset(ModelConfig *c, const Preset *p) {
    memset(c, 0, sizeof *c);
    config_set_vocab(c, p->vocab);
    c->layers = p->layers, c->channels = p->channels, c->hidden = p->hidden;
    c->attn = ATTN_NSA;
    c->tied = p->tied, c->qkv_bias = p->qkv_bias, c->qk_norm = p->qk_norm;
    c->rope_theta = p->theta, c->norm_eps = p->eps;
    c->rope_low_freq = 1, c->rope_high_freq = 4; // Llama 3.1's values; unused while rope_factor is 0
    c->rope_original_len = p->seq_len;
    c->fsa.q_heads = p->q_heads, c->fsa.kv_heads = p->kv_heads, c->fsa.head_dim = p->head_dim;
    c->fsa.cmp_len = p->cmp_len, c->fsa.cmp_stride = p->cmp_stride;
    c->fsa.block = p->block, c->fsa.topk = p->topk;
    c->fsa.init_blocks = p->init_blocks, c->fsa.local_blocks = p->local_blocks;
    c->fsa.window = p->window, c->fsa.phi = FSA_PHI_LINEAR;
}

// Copies a message of fsa_config_check to out [size], with the flags' names instead of the fields':
// "-heads 34" for "q_heads 34".
static inline void config_name_flags(const char *message, char *out, size_t size) {
    int count;
    const ModelField *f = model_fields(&count);
    size_t length = 0;
    if (size > 0) out[0] = '\0';
    while (*message && length + 1 < size) {
        size_t n = strspn(message, "abcdefghijklmnopqrstuvwxyz_");
        char word[32];
        snprintf(word, sizeof word, "%.*s", (int)n, message);
        for (char *c = word; *c; c++)
            if (*c == '_') *c = '-';
        const char *name = strcmp(word, "q-heads") == 0 ? "heads" : word, *dash = "";
        int known = 0;
        for (int i = 0; i < count; i++) known |= strcmp(f[i].name, name) == 0;
        if (known && message[n] == ' ' && strchr("-0123456789", message[n + 1])) dash = "-"; // with its value
        if (known)
            snprintf(out + length, size - length, "%s%s", dash, name);
        else
            snprintf(out + length, size - length, "%.*s", n > 0 ? (int)n : 1, message);
        length += strlen(out + length);
        message += n > 0 ? n : 1;
    }
}

// Checks a configuration. Returns 0, or -1 with one line in msg that names the flag, its value and the rule.
static inline int config_check(const ModelConfig *c, char *msg, size_t msg_size) {
    int count;
    const ModelField *f = model_fields(&count);
    if (c->vocab_size == 0) {
        snprintf(msg, msg_size,
                 "the vocabulary size is unknown: give -vocab, or put tokenizer.bin beside the shards");
        return -1;
    }
    for (int i = 0; i < count; i++) {
        double value = model_field_get(c, &f[i]);
        if (!(value >= f[i].min && value <= f[i].max)) {
            snprintf(msg, msg_size, "%s%s %.12g: must be from %.12g to %.12g", f[i].help ? "-" : "",
                     f[i].name, value, f[i].min, f[i].max);
            return -1;
        }
    }
    if (c->padded_vocab % 128 != 0 || c->padded_vocab < c->vocab_size) {
        snprintf(msg, msg_size, "padded-vocab %d: must be a multiple of 128 and at least -vocab %d",
                 c->padded_vocab, c->vocab_size);
        return -1;
    }
    if (c->rope_factor != 0 && c->rope_factor < 1) {
        snprintf(msg, msg_size, "-rope-factor %g: must be 0 (no scaling) or at least 1", c->rope_factor);
        return -1;
    }
    if (c->rope_factor != 0 && !(c->rope_low_freq > 0 && c->rope_low_freq < c->rope_high_freq)) {
        snprintf(msg, msg_size, "-rope-low-freq %g: must be above 0 and below -rope-high-freq %g",
                 c->rope_low_freq, c->rope_high_freq);
        return -1;
    }
    if (c->full_every > 0 && c->attn == ATTN_FULL) {
        snprintf(msg, msg_size, "-full-every %d: with -attn full all layers have full attention; drop it",
                 c->full_every);
        return -1;
    }
    if (c->full_every == 1 || c->full_every > c->layers) {
        snprintf(msg, msg_size, "-full-every %d: must be 0 (off), or from 2 to -layers %d%s", c->full_every,
                 c->layers, c->full_every == 1 ? "; for all layers use -attn full" : "");
        return -1;
    }
    char text[256];
    if (fsa_config_check(&c->fsa, text, sizeof text) == 0) return 0;
    config_name_flags(text, msg, msg_size);
    return -1;
}

// Writes RoPE's inv_freq [d/2]: RoPE rotates channels i and i + d/2 by position * inv_freq[i]. If rope_factor
// is not 0, applies Llama 3.1's scaling: divides the frequencies of wavelengths above original/low by the
// factor, keeps those of wavelengths below original/high, and interpolates between.
static inline void rope_inv_freq(const ModelConfig *c, double *inv_freq) {
    int d = c->fsa.head_dim;
    for (int i = 0; i < d / 2; i++) {
        double f = pow(c->rope_theta, -2.0 * i / d);
        if (c->rope_factor != 0) {
            double wavelength = 2 * 3.14159265358979323846 / f, original = (double)c->rope_original_len;
            double low = c->rope_low_freq, high = c->rope_high_freq;
            double smooth = (original / wavelength - low) / (high - low);
            if (wavelength > original / low)
                f /= c->rope_factor;
            else if (wavelength >= original / high)
                f = (1 - smooth) * f / c->rope_factor + smooth * f;
        }
        inv_freq[i] = f;
    }
}

// ----------------------------------------------------------------------------
// Parameters

typedef enum {
    INIT_NORMAL, // normal distribution with the tensor's std
    INIT_ONES,
    INIT_ZEROS,
    INIT_MEAN, // weights of phi: the mean over the window, plus normal noise with the tensor's std
    INIT_GATE, // bias of the gate logits: ParamInit.gate_bias for each head
} InitKind;

// The initial values of a new model follow from its configuration and from these.
typedef struct {
    uint64_t seed;
    double gate_bias[3]; // initial biases of the gate logits: compressed, selected, sliding
} ParamInit;

// Models of 97M parameters ended lower with these than with 0, 0, 0 or -2, 0, 2 (dev/results/learning.md).
static const double default_gate_bias[3] = {-2, -2, 2};

// A tensor of the model. All parameters are in one array. Weight matrices are [out, in].
typedef struct {
    char name[48];
    int64_t offset, size; // in elements of the array
    int64_t rows, cols;   // a vector has 1 row
    int decay;            // 1: has weight decay (matrices and embeddings; not norms, biases and phi_pe)
    int layer;            // -1: in no layer
    int init;             // an InitKind
    double std;
} ParamTensor;

// Returns whether a tensor is named `name`, in any layer or in none.
static inline int param_is(const ParamTensor *t, const char *name) {
    const char *dot = strrchr(t->name, '.');
    return strcmp(dot ? dot + 1 : t->name, name) == 0;
}

#define CONFIG_MAX_PARAMS ((int64_t)1 << 56) // larger counts stay at it: their bytes fit into 64 bits

// Appends a tensor to the table (NULL: only counts).
static inline void param_add(ParamTensor *table, int64_t *count, int64_t *total, int layer, const char *name,
                             int64_t rows, int64_t cols, int decay, InitKind init, double std) {
    if (table) {
        ParamTensor *p = &table[*count];
        if (layer < 0)
            snprintf(p->name, sizeof p->name, "%s", name);
        else
            snprintf(p->name, sizeof p->name, "layers.%d.%s", layer, name);
        p->offset = *total, p->size = rows * cols, p->rows = rows, p->cols = cols;
        p->decay = decay, p->layer = layer, p->init = init, p->std = std;
    }
    *count += 1;
    const int64_t left = CONFIG_MAX_PARAMS - *total;
    *total += rows * cols < left ? rows * cols : left;
}

// Fills `table` (NULL: only counts) with the model's tensors, in the order of the parameter array and of
// checkpoints. Returns the number of tensors, and the number of all elements in *total. The tensors:
//   wte [Vp, C]
//   for each layer, whose attn is layer_attention's: a layer of full attention has neither gates nor phi
//     ln1 [C], wqkv [(Hq+2Hkv)*d, C] (rows: q heads, k heads, v heads)
//     with attn nsa: wgate [3*Hq, C], or [3, C] with gate_per_token; with wqkv it is one matrix in memory
//     with qkv_bias: bqkv [(Hq+2Hkv)*d]
//     with attn nsa: bgate [3*Hq], or [3] with gate_per_token, and zeros up to a multiple of 8
//     with qk_norm: qnorm [d], knorm [d]
//     with attn nsa and phi linear: phi_wk [Hkv, l*d, d], phi_pe [Hkv, l, d], phi_wv [Hkv, l*d, d]
//     wo [C, Hq*d], ln2 [C], wgu [2*hidden, C] (rows: gate, then up), wdown [C, hidden]
//   lnf [C]
//   unless tied: lm_head [Vp, C]
static inline int64_t param_table(const ModelConfig *c, ParamTensor *table, int64_t *total) {
    const int64_t C = c->channels, d = c->fsa.head_dim, Hq = c->fsa.q_heads, Hkv = c->fsa.kv_heads;
    const int64_t len = c->fsa.cmp_len, qkv = (Hq + 2 * Hkv) * d;
    // the std of PyTorch's default for linear layers; equals GPT-2's 0.02 at C = 833
    const double std = 1 / sqrt(3.0 * (double)C), std_residual = std / sqrt(2.0 * c->layers);
    const double noise = 0.02 / sqrt((double)len);
    int64_t n = 0;
    *total = 0;
    param_add(table, &n, total, -1, "wte", c->padded_vocab, C, 1, INIT_NORMAL, std);
    for (int l = 0; l < c->layers; l++) {
        const int nsa = layer_attention(c, l) == ATTN_NSA;
        param_add(table, &n, total, l, "ln1", 1, C, 0, INIT_ONES, 0);
        param_add(table, &n, total, l, "wqkv", qkv, C, 1, INIT_NORMAL, std);
        if (nsa) param_add(table, &n, total, l, "wgate", num_gate_logits(&c->fsa), C, 1, INIT_ZEROS, 0);
        if (c->qkv_bias) param_add(table, &n, total, l, "bqkv", 1, qkv, 0, INIT_ZEROS, 0);
        if (nsa) param_add(table, &n, total, l, "bgate", 1, gate_bias_size(&c->fsa), 0, INIT_GATE, 0);
        if (c->qk_norm) {
            param_add(table, &n, total, l, "qnorm", 1, d, 0, INIT_ONES, 0);
            param_add(table, &n, total, l, "knorm", 1, d, 0, INIT_ONES, 0);
        }
        if (nsa && c->fsa.phi == FSA_PHI_LINEAR) {
            param_add(table, &n, total, l, "phi_wk", Hkv * len * d, d, 1, INIT_MEAN, noise);
            param_add(table, &n, total, l, "phi_pe", Hkv * len, d, 0, INIT_ZEROS, 0);
            param_add(table, &n, total, l, "phi_wv", Hkv * len * d, d, 1, INIT_MEAN, noise);
        }
        param_add(table, &n, total, l, "wo", C, Hq * d, 1, INIT_NORMAL, std_residual);
        param_add(table, &n, total, l, "ln2", 1, C, 0, INIT_ONES, 0);
        param_add(table, &n, total, l, "wgu", 2 * (int64_t)c->hidden, C, 1, INIT_NORMAL, std);
        param_add(table, &n, total, l, "wdown", C, c->hidden, 1, INIT_NORMAL, std_residual);
    }
    param_add(table, &n, total, -1, "lnf", 1, C, 0, INIT_ONES, 0);
    if (!c->tied) param_add(table, &n, total, -1, "lm_head", c->padded_vocab, C, 1, INIT_NORMAL, std);
    return n;
}

// Writes the initial values of elements [begin, end) of a tensor to values [end - begin]. `index` is the
// tensor's index in the table. Element i depends only on (init, index, i).
static inline void param_init(const ModelConfig *c, const ParamTensor *p, int64_t index, int64_t begin,
                              int64_t end, float *values, const ParamInit *init) {
    int64_t i;
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (i = begin; i < end; i++) {
        double x = p->init == INIT_ONES ? 1 : 0;
        if (p->init == INIT_NORMAL || p->init == INIT_MEAN)
            x = p->std * rng_normal_at(init->seed, (uint64_t)index, i);
        if (p->init == INIT_GATE && i < num_gate_logits(&c->fsa)) x = init->gate_bias[i % 3];
        // row r*d + i of a kv head's weight belongs to token r of the window and channel i
        if (p->init == INIT_MEAN && i / p->cols % p->cols == i % p->cols) x += 1.0 / c->fsa.cmp_len;
        values[i - begin] = (float)x;
    }
}

// Writes the initial values of elements [begin, end) of the parameter array to params [end - begin].
static inline void params_init_part(const ModelConfig *c, float *params, int64_t begin, int64_t end,
                                    const ParamInit *init) {
    int64_t total, count = param_table(c, NULL, &total);
    ParamTensor *table = (ParamTensor *)xcalloc((size_t)count, sizeof *table);
    param_table(c, table, &total);
    for (int64_t t = 0; t < count; t++) {
        const ParamTensor *p = &table[t];
        int64_t first = begin > p->offset ? begin : p->offset;
        int64_t last = end < p->offset + p->size ? end : p->offset + p->size;
        if (first < last)
            param_init(c, p, t, first - p->offset, last - p->offset, params + first - begin, init);
    }
    free(table);
}

// Writes the initial values of all parameters to params [total], where `total` is from param_table.
static inline void params_init(const ModelConfig *c, float *params, const ParamInit *init) {
    int64_t total;
    param_table(c, NULL, &total);
    params_init_part(c, params, 0, total, init);
}
#endif
