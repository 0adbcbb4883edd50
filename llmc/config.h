// config.h: the shape of a model: its fields, presets and rules; its parameter table and initial
// values; RoPE's frequencies; the arithmetic of a training step. Shared by both trainers.
#ifndef LLMC_CONFIG_H
#define LLMC_CONFIG_H
#include "utils.h"
#include "rand.h"
#include "../fsa/fsa.h"
#include <math.h>
#include <stddef.h>

typedef enum { ATTN_NSA = 0, ATTN_FULL = 1, ATTN_WINDOW = 2 } AttnMode;

typedef struct {
    int32_t vocab_size;   // V, tokens that exist
    int32_t padded_vocab; // Vp, V rounded up to a multiple of 128: rows of wte and lm_head
    int32_t layers;       // L
    int32_t channels;     // C
    int32_t hidden;       // of the SwiGLU
    int32_t attn;         // an AttnMode
    int32_t tied;         // 1: the LM head is wte
    int32_t qkv_bias;     // 1: bias on q, k and v (Qwen2.5)
    int32_t qk_norm;      // 1: RMSNorm of each q and k head (Qwen3)
    double rope_theta, norm_eps;
    double rope_factor; // Llama-3 frequency scaling; 0: none
    double rope_low_freq, rope_high_freq;
    int64_t rope_original_len; // context before the scaling
    FsaConfig fsa;             // heads, head size, and the numbers of the sparse attention
} ModelConfig;

// ----------------------------------------------------------------------------
// Fields, as flags, files and messages name them

typedef enum { FIELD_INT32, FIELD_INT64, FIELD_FLOAT, FIELD_DOUBLE } FieldType;
typedef struct {
    const char *name; // as flag: -name
    FieldType type;
    size_t offset; // in ModelConfig
    double min, max;
    const char *choices; // words for 0, 1, ... separated by '|', or NULL
    const char *help;    // NULL: no flag sets it
} ModelField;

// All fields; the order is that of the checkpoint's header. *count: how many.
static inline const ModelField *model_fields(int *count) {
#define AT(member) offsetof(ModelConfig, member)
    static const ModelField fields[] = {
        {"vocab", FIELD_INT32, AT(vocab_size), 1, 1 << 30, NULL,
         "vocabulary, where no tokenizer.bin tells it"},
        {"padded-vocab", FIELD_INT32, AT(padded_vocab), 1, 1 << 30, NULL, NULL},
        {"layers", FIELD_INT32, AT(layers), 1, 10000, NULL, "layers"},
        {"channels", FIELD_INT32, AT(channels), 1, 1 << 20, NULL, "channels, C"},
        {"hidden", FIELD_INT32, AT(hidden), 1, 1 << 24, NULL, "width of the SwiGLU"},
        {"attn", FIELD_INT32, AT(attn), 0, 2, "nsa|full|window", "attention"},
        {"heads", FIELD_INT32, AT(fsa.q_heads), 1, 65536, NULL, "query heads, a multiple of -kv-heads"},
        {"kv-heads", FIELD_INT32, AT(fsa.kv_heads), 1, 65536, NULL, "key-value heads"},
        {"head-dim", FIELD_INT32, AT(fsa.head_dim), 2, 65536, NULL, "channels of a head, even"},
        {"tied", FIELD_INT32, AT(tied), 0, 1, NULL, "1: the LM head is the token embedding"},
        {"qkv-bias", FIELD_INT32, AT(qkv_bias), 0, 1, NULL, "1: bias on q, k and v"},
        {"qk-norm", FIELD_INT32, AT(qk_norm), 0, 1, NULL, "1: RMSNorm of each q and k head"},
        {"norm-eps", FIELD_DOUBLE, AT(norm_eps), 1e-20, 1, NULL, "epsilon of RMSNorm"},
        {"theta", FIELD_DOUBLE, AT(rope_theta), 1, 1e15, NULL, "base of RoPE's frequencies"},
        {"rope-factor", FIELD_DOUBLE, AT(rope_factor), 0, 1e6, NULL, "Llama-3 frequency scaling, 0: none"},
        {"rope-low-freq", FIELD_DOUBLE, AT(rope_low_freq), 0, 1e6, NULL, "its low_freq_factor"},
        {"rope-high-freq", FIELD_DOUBLE, AT(rope_high_freq), 0, 1e6, NULL, "its high_freq_factor"},
        {"rope-original-len", FIELD_INT64, AT(rope_original_len), 1, 1e12, NULL,
         "context before the scaling"},
        {"cmp-len", FIELD_INT32, AT(fsa.cmp_len), 1, 65536, NULL, "l, tokens in a compression window"},
        {"cmp-stride", FIELD_INT32, AT(fsa.cmp_stride), 1, 65536, NULL, "s, stride of the windows"},
        {"block", FIELD_INT32, AT(fsa.block), 16, 1 << 20, NULL, "B, tokens in a selection block"},
        {"topk", FIELD_INT32, AT(fsa.topk), 1, 1 << 20, NULL, "T, blocks that a query selects"},
        {"init-blocks", FIELD_INT32, AT(fsa.init_blocks), 0, 1 << 20, NULL, "first blocks, always selected"},
        {"local-blocks", FIELD_INT32, AT(fsa.local_blocks), 0, 1 << 20, NULL, "last blocks, always selected"},
        {"window", FIELD_INT32, AT(fsa.window), 1, 1 << 30, NULL, "W, tokens that the sliding window sees"},
        {"phi", FIELD_INT32, AT(fsa.phi), 0, 1, "mean|linear", "compression"},
        {"gate-per-token", FIELD_INT32, AT(fsa.gate_per_token), 0, 1, NULL, "1: one gate for all heads"},
        {"scale", FIELD_FLOAT, AT(fsa.scale), 0, 1e6, NULL, "of q.k before softmax, 0: 1/sqrt(head-dim)"},
    };
#undef AT
    *count = (int)(sizeof fields / sizeof fields[0]);
    return fields;
}

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

// value must lie within [f->min, f->max].
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

// Writes the value as a user would: a number, or a word of f->choices.
static inline void model_field_print(const ModelField *f, double value, char *out, size_t size) {
    const char *word = f->choices;
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

// Whether the field only turns RoPE's frequencies: training may go on with another value.
static inline int model_field_is_rope(const ModelField *f) {
    return strcmp(f->name, "theta") == 0 || strncmp(f->name, "rope-", 5) == 0;
}

// ----------------------------------------------------------------------------
// Presets and rules

typedef struct {
    const char *name;
    const char *help;
    int seq_len; // what -t is unless given
    int vocab;   // 0: the tokenizer or -vocab tells
    int layers, channels, hidden, tied, qkv_bias, qk_norm;
    double theta, eps;
    int q_heads, kv_heads, head_dim;
    int cmp_len, cmp_stride, block, topk, init_blocks, local_blocks, window;
} Preset;

// All presets. *count: how many.
static inline const Preset *presets(int *count) {
    // clang-format off
    static const Preset table[] = {
        // name, what for, seq_len, vocab,
        //     L, C, hidden, tied, bias, qk-norm, theta, eps, Hq, Hkv, d,  l, s, B, T, init, local, W
        {"recall", "the synthetic recall task", 256, 0,
            2, 64, 128, 0, 0, 0, 1e4, 1e-5, 4, 2, 32,  8, 4, 16, 4, 1, 2, 16},
        {"tiny", "bytes of text, minutes on two CPU cores", 1024, 0,
            4, 128, 352, 0, 0, 0, 1e4, 1e-5, 4, 2, 32,  16, 8, 32, 8, 1, 2, 128},
        {"recall-1k", "the recall task over a longer context, on a GPU", 1024, 0,
            4, 256, 512, 0, 0, 0, 1e4, 1e-5, 4, 2, 64,  8, 4, 16, 8, 1, 2, 32},
        {"shakespeare", "bytes of text, minutes on a GPU", 1024, 0,
            6, 384, 1024, 0, 0, 0, 1e4, 1e-5, 6, 2, 64,  16, 8, 32, 8, 1, 2, 128},
        {"gpt-124m", "about GPT-2's size; 4 query heads a kv head", 8192, 50257,
            12, 768, 2048, 1, 0, 0, 1e4, 1e-5, 12, 3, 64,  32, 16, 64, 16, 1, 2, 512},
        {"llama3-8b", "Llama 3 8B", 8192, 128256,
            32, 4096, 14336, 0, 0, 0, 5e5, 1e-5, 32, 8, 128,  32, 16, 64, 16, 1, 2, 512},
        {"qwen3-14b", "Qwen3 14B", 8192, 151936,
            40, 5120, 17408, 0, 0, 1, 1e6, 1e-6, 40, 8, 128,  32, 16, 64, 16, 1, 2, 512},
        {"qwen2.5-7b", "Qwen2.5 7B", 8192, 152064,
            28, 3584, 18944, 0, 1, 0, 1e6, 1e-6, 28, 4, 128,  32, 16, 64, 16, 1, 2, 512},
    };
    // clang-format on
    *count = (int)(sizeof table / sizeof table[0]);
    return table;
}

// The preset of that name, or NULL.
static inline const Preset *preset_find(const char *name) {
    int count;
    const Preset *p = presets(&count);
    for (int i = 0; i < count; i++)
        if (strcmp(p[i].name, name) == 0) return &p[i];
    return NULL;
}

// Sets the vocabulary and its padding to a multiple of 128.
static inline void config_set_vocab(ModelConfig *c, int32_t vocab_size) {
    c->vocab_size = vocab_size;
    c->padded_vocab = (vocab_size + 127) / 128 * 128;
}

static inline void config_from_preset(ModelConfig *c, const Preset *p) {
    memset(c, 0, sizeof *c);
    config_set_vocab(c, p->vocab);
    c->layers = p->layers, c->channels = p->channels, c->hidden = p->hidden;
    c->attn = ATTN_NSA;
    c->tied = p->tied, c->qkv_bias = p->qkv_bias, c->qk_norm = p->qk_norm;
    c->rope_theta = p->theta, c->norm_eps = p->eps;
    c->rope_low_freq = 1, c->rope_high_freq = 4; // Llama 3.1's; rope_factor 0 leaves them unused
    c->rope_original_len = p->seq_len;
    c->fsa.q_heads = p->q_heads, c->fsa.kv_heads = p->kv_heads, c->fsa.head_dim = p->head_dim;
    c->fsa.cmp_len = p->cmp_len, c->fsa.cmp_stride = p->cmp_stride;
    c->fsa.block = p->block, c->fsa.topk = p->topk;
    c->fsa.init_blocks = p->init_blocks, c->fsa.local_blocks = p->local_blocks;
    c->fsa.window = p->window, c->fsa.phi = FSA_PHI_LINEAR;
}

// Returns 0, or -1 with one line in msg that names the field, its value and the rule.
static inline int config_check(const ModelConfig *c, char *msg, size_t msg_size) {
    int count;
    const ModelField *f = model_fields(&count);
    if (c->vocab_size == 0) {
        snprintf(msg, msg_size,
                 "the vocabulary is unknown: give -vocab, or a tokenizer.bin beside the shards");
        return -1;
    }
    for (int i = 0; i < count; i++) {
        double value = model_field_get(c, &f[i]);
        if (!(value >= f[i].min && value <= f[i].max)) {
            snprintf(msg, msg_size, "%s %.12g: must be within %.12g and %.12g", f[i].name, value, f[i].min,
                     f[i].max);
            return -1;
        }
    }
    if (c->padded_vocab % 128 != 0 || c->padded_vocab < c->vocab_size) {
        snprintf(msg, msg_size, "padded-vocab %d: must be a multiple of 128 and at least vocab %d",
                 c->padded_vocab, c->vocab_size);
        return -1;
    }
    if (c->rope_factor != 0 && c->rope_factor < 1) {
        snprintf(msg, msg_size, "rope-factor %g: must be 0 (no scaling) or at least 1", c->rope_factor);
        return -1;
    }
    if (c->rope_factor != 0 && !(c->rope_low_freq > 0 && c->rope_low_freq < c->rope_high_freq)) {
        snprintf(msg, msg_size, "rope-low-freq %g: must be above 0 and below rope-high-freq %g",
                 c->rope_low_freq, c->rope_high_freq);
        return -1;
    }
    return fsa_config_check(&c->fsa, msg, msg_size);
}

// inv_freq [d/2]: channels i and i + d/2 turn by position * inv_freq[i]. With rope_factor, Llama
// 3.1's scaling: wavelengths above original/low are stretched by the factor, those below
// original/high stay, and between them the two are blended.
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
    INIT_NORMAL, // normal of the tensor's std
    INIT_ONES,
    INIT_ZEROS,
    INIT_MEAN, // phi's weights: the average over the window, plus normal noise of the tensor's std
} InitKind;

// A tensor of the model inside the one array of all parameters. Weights are [out, in].
typedef struct {
    char name[48];
    int64_t offset, size; // in elements
    int64_t rows, cols;   // as a matrix; a vector has 1 row
    int decay;            // 1: weight decay applies (matrices, embeddings; no norms, biases, phi_pe)
    int layer;            // -1: none
    int init;             // an InitKind
    double std;
} ParamTensor;

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
    *total += rows * cols;
}

// Fills `table` (NULL: only counts) with the tensors in the order of memory, which also is that of
// checkpoints; *total: elements of all. Returns the number of tensors. Absent ones do not appear:
//   wte [Vp, C]; for each layer: ln1 [C], wqkv [(Hq+2Hkv)*d, C] (rows q heads, k heads, v heads),
//   bqkv [(Hq+2Hkv)*d] (qkv_bias), qnorm [d], knorm [d] (qk_norm); with attn nsa: phi_wk
//   [Hkv, l*d, d], phi_pe [Hkv, l, d], phi_wv [Hkv, l*d, d] (phi linear), wgate [3*Hq, C]
//   (gate_per_token: [3, C]); wo [C, Hq*d], ln2 [C], wgu [2*hidden, C] (gate rows, then up rows),
//   wdown [C, hidden]; then lnf [C], and lm_head [Vp, C] if not tied.
static inline int64_t param_table(const ModelConfig *c, ParamTensor *table, int64_t *total) {
    const int64_t C = c->channels, d = c->fsa.head_dim, Hq = c->fsa.q_heads, Hkv = c->fsa.kv_heads;
    const int64_t len = c->fsa.cmp_len, qkv = (Hq + 2 * Hkv) * d;
    // PyTorch's default for a linear layer has this std too; it is GPT-2's 0.02 at C = 833
    const double std = 1 / sqrt(3.0 * (double)C), std_residual = std / sqrt(2.0 * c->layers);
    const double noise = 0.02 / sqrt((double)len);
    int64_t n = 0;
    *total = 0;
    param_add(table, &n, total, -1, "wte", c->padded_vocab, C, 1, INIT_NORMAL, std);
    for (int l = 0; l < c->layers; l++) {
        param_add(table, &n, total, l, "ln1", 1, C, 0, INIT_ONES, 0);
        param_add(table, &n, total, l, "wqkv", qkv, C, 1, INIT_NORMAL, std);
        if (c->qkv_bias) param_add(table, &n, total, l, "bqkv", 1, qkv, 0, INIT_ZEROS, 0);
        if (c->qk_norm) {
            param_add(table, &n, total, l, "qnorm", 1, d, 0, INIT_ONES, 0);
            param_add(table, &n, total, l, "knorm", 1, d, 0, INIT_ONES, 0);
        }
        if (c->attn == ATTN_NSA) {
            if (c->fsa.phi == FSA_PHI_LINEAR) {
                param_add(table, &n, total, l, "phi_wk", Hkv * len * d, d, 1, INIT_MEAN, noise);
                param_add(table, &n, total, l, "phi_pe", Hkv * len, d, 0, INIT_ZEROS, 0);
                param_add(table, &n, total, l, "phi_wv", Hkv * len * d, d, 1, INIT_MEAN, noise);
            }
            param_add(table, &n, total, l, "wgate", c->fsa.gate_per_token ? 3 : 3 * Hq, C, 1, INIT_ZEROS, 0);
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

// Writes the initial values [begin, end) of tensor number `index` of the table: element i depends on (seed,
// index, i) alone.
static inline void param_init(const ModelConfig *c, const ParamTensor *p, int64_t index, int64_t begin,
                              int64_t end, float *values, uint64_t seed) {
    int64_t i;
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (i = begin; i < end; i++) {
        double x = p->init == INIT_ONES ? 1 : 0;
        if (p->init == INIT_NORMAL || p->init == INIT_MEAN)
            x = p->std * rng_normal_at(seed, (uint64_t)index, i);
        // row r*d + channel of a kv head's weight belongs to the window's token r
        if (p->init == INIT_MEAN && i / p->cols % p->cols == i % p->cols) x += 1.0 / c->fsa.cmp_len;
        values[i - begin] = (float)x;
    }
}

// Writes the initial values of parameters [begin, end) of all.
static inline void params_init_part(const ModelConfig *c, float *params, int64_t begin, int64_t end,
                                    uint64_t seed) {
    int64_t total, count = param_table(c, NULL, &total);
    ParamTensor *table = (ParamTensor *)xcalloc((size_t)count, sizeof *table);
    param_table(c, table, &total);
    for (int64_t t = 0; t < count; t++) {
        const ParamTensor *p = &table[t];
        int64_t from = begin > p->offset ? begin : p->offset;
        int64_t to = end < p->offset + p->size ? end : p->offset + p->size;
        if (from < to) param_init(c, p, t, from - p->offset, to - p->offset, params + from - begin, seed);
    }
    free(table);
}

// Writes the initial values of all parameters, `total` elements as param_table counts them.
static inline void params_init(const ModelConfig *c, float *params, uint64_t seed) {
    int64_t total;
    param_table(c, NULL, &total);
    params_init_part(c, params, 0, total, seed);
}

// ----------------------------------------------------------------------------
// Arithmetic

// Pairs (query, key) that one head sees in a sequence of n tokens.
static inline double visible_pairs(const FsaConfig *c, FsaVisibility rule, int64_t n) {
    double all = 0.5 * (double)n * (double)(n + 1);
    if (rule == FSA_WINDOW && n > c->window) {
        double rest = (double)(n - c->window); // the queries before these see a triangle
        return 0.5 * (double)c->window * ((double)c->window + 1) + rest * (double)c->window;
    }
    if (rule == FSA_COMPRESSED) { // query t sees floor((t - l + 1)/s) + 1 windows
        int64_t queries = n - c->cmp_len + 1;
        if (queries <= 0) return 0;
        double full = (double)(queries / c->cmp_stride), part = (double)(queries % c->cmp_stride);
        return c->cmp_stride * full * (full + 1) / 2 + part * (full + 1);
    }
    int64_t reach = (int64_t)c->block * c->topk; // queries before it see all tokens up to theirs
    if (rule == FSA_SELECTED && n > reach) {     // T-1 blocks, and its own up to the query
        double rest = (double)(n - reach), blocks = (double)((n - reach) / c->block);
        double part = (double)((n - reach) % c->block), own = 0.5 * c->block * (c->block + 1.0);
        return 0.5 * (double)reach * ((double)reach + 1) + rest * (double)(reach - c->block) + blocks * own +
               0.5 * part * (part + 1);
    }
    return all;
}

// Floating-point operations of a training step, forward and backward, on one sequence of n tokens:
// products with weights, and the attention that the mode really does over the keys that each query
// sees. Nothing recomputed counts. For MFU.
static inline double model_flops(const ModelConfig *c, int64_t n) {
    const FsaConfig *f = &c->fsa;
    const double C = c->channels, d = f->head_dim, Hq = f->q_heads, Hkv = f->kv_heads;
    double weights = (2 * Hq + 2 * Hkv) * d * C + 3.0 * C * c->hidden; // of a layer
    double attention = 0;
    // q.k and p.v are 2d each; twice that backward
    if (c->attn == ATTN_FULL) attention = 12 * d * Hq * visible_pairs(f, FSA_CAUSAL, n);
    if (c->attn == ATTN_WINDOW) attention = 12 * d * Hq * visible_pairs(f, FSA_WINDOW, n);
    if (c->attn == ATTN_NSA) {
        double compressed = visible_pairs(f, FSA_COMPRESSED, n);
        attention =
            12 * d * Hq * (compressed + visible_pairs(f, FSA_SELECTED, n) + visible_pairs(f, FSA_WINDOW, n));
        attention += 2 * d * Hq * compressed; // block scores
        if (f->phi == FSA_PHI_LINEAR)
            attention += 12 * (double)f->cmp_len * d * d * Hkv * (double)fsa_num_windows(f, n);
        weights += (f->gate_per_token ? 3 : 3 * Hq) * C;
    }
    return c->layers * (6 * weights * (double)n + attention) + 6.0 * c->padded_vocab * C * (double)n;
}
#endif
