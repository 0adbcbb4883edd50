// test_run.c: tests fsa_config_check, config.h, qkv_layout.h, mfu.h, options.h, checkpoint.h, schedule.h and
// logger.h. Each error path runs in a child process, and its exit code and stderr are checked. A child that
// writes checkpoints is killed at random times.
#include "../../llmc/utils.h"
#include "../../llmc/checkpoint.h"
#include "../../llmc/config.h"
#include "../../llmc/logger.h"
#include "../../llmc/mfu.h"
#include "../../llmc/options.h"
#include "../../llmc/profile_work.h"
#include "../../llmc/qkv_layout.h"
#include "../../llmc/run.h"
#include "../../llmc/schedule.h"
#include "checkpoint_old.h"
#include "test.h"
#include "tokenizer_bin.h"
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

static char dir[256]; // temporary folder of this test

// The linker replaces fsync and rename by these functions (test.mk). They note each call: the name, and of
// fsync's file the inode and the size.
static char calls[1024];
int __real_fsync(int fd);
int __real_rename(const char *from, const char *to);

int __wrap_fsync(int fd) {
    struct stat st;
    if (fstat(fd, &st) != 0) die("fstat: %s", strerror(errno));
    size_t n = strlen(calls);
    snprintf(calls + n, sizeof calls - n, "fsync %lld %lld; ", (long long)st.st_ino,
             S_ISDIR(st.st_mode) ? 0 : (long long)st.st_size);
    return __real_fsync(fd);
}

int __wrap_rename(const char *from, const char *to) {
    size_t n = strlen(calls);
    snprintf(calls + n, sizeof calls - n, "rename; ");
    return __real_rename(from, to);
}

// ----------------------------------------------------------------------------
// Child processes

typedef struct {
    int code; // exit code, -1: killed by a signal
    char out[32768], err[4096];
} Child;

static void read_text(const char *path, char *text, size_t size) {
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(text, 1, size - 1, f) : 0;
    text[n] = '\0';
    if (f) fclose(f);
}

// Runs run(argument) in a child process, and returns its exit code and output.
static Child child(void (*run)(void *), void *argument) {
    Child c;
    char out[300], err[300];
    snprintf(out, sizeof out, "%s/stdout", dir);
    snprintf(err, sizeof err, "%s/stderr", dir);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        if (!freopen(out, "wb", stdout) || !freopen(err, "wb", stderr)) _exit(99);
        run(argument);
        exit(0);
    }
    int status = 0;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) die("fork: %s", strerror(errno));
    c.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    read_text(out, c.out, sizeof c.out);
    read_text(err, c.err, sizeof c.err);
    return c;
}

static int count_lines(const char *text) {
    int n = 0;
    for (; *text; text++) n += *text == '\n';
    return n;
}

// Checks that the child exited with code 1 and one line "error: ..." on stderr that contains texts a and b.
static void check_died(const Child *c, const char *what, const char *a, const char *b) {
    CHECK(c->code == 1, "%s: exit code %d, stderr: %s", what, c->code, c->err);
    CHECK(count_lines(c->err) == 1 && strncmp(c->err, "error: ", 7) == 0, "%s: stderr: %s", what, c->err);
    CHECK(strstr(c->err, a) && strstr(c->err, b), "%s: '%s' and '%s' expected in: %s", what, a, b, c->err);
}

// ----------------------------------------------------------------------------
// Configuration

static void test_fsa_config(void) {
    const FsaConfig good = {8, 2, 64, 32, 16, 64, 16, 1, 2, 512, FSA_PHI_LINEAR, 0, 0, 0, {0}};
    char msg[200];
    CHECK(fsa_config_check(&good, msg, sizeof msg) == 0, "%s", msg);
    FsaConfig c;
#define BAD(field, value, named)                                                                             \
    c = good, c.field = (value);                                                                             \
    CHECK(fsa_config_check(&c, msg, sizeof msg) == -1 && strstr(msg, named) && !count_lines(msg),            \
          #field " " #value ": '%s'", msg)
#define GOOD(field, value)                                                                                   \
    c = good, c.field = (value);                                                                             \
    CHECK(fsa_config_check(&c, msg, sizeof msg) == 0, #field " " #value ": '%s'", msg)
    BAD(q_heads, 0, "q_heads 0");
    BAD(q_heads, 7, "q_heads 7");
    BAD(q_heads, 34, "q_heads 34"); // g = 17
    BAD(q_heads, 1, "q_heads 1");
    GOOD(q_heads, 32); // g = 16
    GOOD(q_heads, 2);
    GOOD(q_heads, 10);
    GOOD(q_heads, 14);
    BAD(kv_heads, 0, "kv_heads 0");
    BAD(kv_heads, -2, "kv_heads -2");
    BAD(kv_heads, 3, "kv_heads 3");
    BAD(head_dim, 0, "head_dim 0");
    BAD(head_dim, 63, "head_dim 63");
    GOOD(head_dim, 2);
    BAD(cmp_len, 0, "cmp_len 0");
    BAD(cmp_len, 40, "cmp_len 40"); // not a multiple of s = 16
    BAD(cmp_len, 80, "cmp_len 80"); // > B
    GOOD(cmp_len, 64);
    GOOD(cmp_len, 16);
    BAD(cmp_stride, 0, "cmp_stride 0");
    BAD(cmp_stride, 12, "cmp_stride 12");
    GOOD(cmp_stride, 1);
    GOOD(cmp_stride, 32);
    BAD(block, 0, "block 0");
    BAD(block, 72, "block 72");
    BAD(block, 8, "block 8");
    BAD(block, 16, "block 16"); // < l
    GOOD(block, 48);
    c = good, c.cmp_len = c.cmp_stride = 24; // s divides l, but not B
    CHECK(fsa_config_check(&c, msg, sizeof msg) == -1 && strstr(msg, "cmp_stride 24"), "%s", msg);
    BAD(topk, 0, "topk 0");
    BAD(topk, 2, "topk 2");
    GOOD(topk, 3);
    BAD(init_blocks, -1, "init_blocks -1");
    BAD(init_blocks, 15, "init_blocks 15");
    BAD(init_blocks, 2147483647, "init_blocks 2147483647");
    GOOD(init_blocks, 0);
    BAD(local_blocks, -1, "local_blocks -1");
    BAD(local_blocks, 16, "local_blocks 16");
    BAD(window, 0, "window 0");
    GOOD(window, 1);
    BAD(phi, (FsaPhi)2, "phi 2");
    GOOD(phi, FSA_PHI_MEAN);
    BAD(gate_per_token, 2, "gate_per_token 2");
    BAD(recompute, 2, "recompute 2");
    BAD(scale, -1.0f, "scale -1");
    BAD(scale, NAN, "scale");
    GOOD(scale, 0.5f);
#undef BAD
#undef GOOD
    c = good, c.window = 0;
    memset(msg, 'x', sizeof msg);
    CHECK(fsa_config_check(&c, msg, 8) == -1 && strlen(msg) == 7 && msg[8] == 'x', "cut message");
    CHECK(fsa_config_check(&c, NULL, 0) == -1, "no message wanted");
    for (int64_t n = 0; n < 200; n++) {
        int64_t windows = 0;
        while (16 * windows + 32 <= n) windows++;
        CHECK(fsa_num_windows(&good, n) == windows, "n %lld", (long long)n);
    }
    CHECK(fsa_num_windows(&good, (int64_t)1 << 40) == ((int64_t)1 << 36) - 1, "64 bits");
}

static ModelConfig preset_config(const char *name, int vocab) {
    ModelConfig c;
    config_from_preset(&c, preset_find(name));
    if (vocab) config_set_vocab(&c, vocab);
    return c;
}

static void test_model_config(void) {
    int count;
    char msg[256];
    const Preset *p = presets(&count);
    for (int i = 0; i < count; i++) {
        ModelConfig c = preset_config(p[i].name, 257);
        CHECK(config_check(&c, msg, sizeof msg) == 0, "%s: %s", p[i].name, msg);
        CHECK(c.padded_vocab == 384, "%s: %d", p[i].name, c.padded_vocab);
    }
    CHECK(preset_find("llama3") == NULL, "no such preset");
    ModelConfig good = preset_config("tiny", 256), c;
    CHECK(good.padded_vocab == 256, "%d", good.padded_vocab);
#define BAD(field, value, named)                                                                             \
    c = good, c.field = (value);                                                                             \
    CHECK(config_check(&c, msg, sizeof msg) == -1 && strstr(msg, named) && !count_lines(msg),                \
          #field ": '%s'", msg)
    BAD(vocab_size, 0, "-vocab");
    BAD(vocab_size, -5, "vocab -5");
    BAD(vocab_size, 257, "padded-vocab 256");
    BAD(padded_vocab, 300, "padded-vocab 300");
    BAD(layers, 0, "layers 0");
    BAD(channels, 0, "channels 0");
    BAD(hidden, -1, "hidden -1");
    BAD(attn, 3, "attn 3");
    BAD(tied, 2, "tied 2");
    BAD(qkv_bias, -1, "qkv-bias -1");
    BAD(qk_norm, 7, "qk-norm 7");
    BAD(rope_theta, 0, "theta 0");
    BAD(rope_theta, NAN, "theta");
    BAD(norm_eps, 0, "norm-eps 0");
    BAD(rope_factor, 0.5, "rope-factor 0.5");
    BAD(rope_original_len, 0, "rope-original-len 0");
    BAD(fsa.topk, 2, "-topk 2: must be at least -init-blocks 1 + -local-blocks 2 = 3");
    BAD(full_every, -1, "full-every -1: must be from 0");
    BAD(full_every, 1,
        "-full-every 1: must be 0 (off), or from 2 to -layers 4; for all layers use -attn full");
    BAD(full_every, 5, "-full-every 5: must be 0 (off), or from 2 to -layers 4");
    BAD(fsa.q_heads, 5, "-heads 5: must be a multiple of -kv-heads 2; try -heads 4");
    BAD(fsa.reserved[0], 1, "reserved[0] 1: must be 0; set all fields of FsaConfig to zero first");
    good.attn = ATTN_FULL;
    BAD(full_every, 2, "-full-every 2: with -attn full all layers have full attention; drop it");
    good.attn = ATTN_NSA;
#undef BAD
    c = good, c.fsa.q_heads = 5;
    memset(msg, 'x', sizeof msg);
    CHECK(config_check(&c, msg, 9) == -1 && strcmp(msg, "-heads 5") == 0 && msg[9] == 'x', "cut: '%s'", msg);
    c = good, c.rope_factor = 8, c.rope_low_freq = 4;
    CHECK(config_check(&c, msg, sizeof msg) == -1 && strstr(msg, "rope-low-freq 4"), "%s", msg);

    // every field is in the table once, and set and get agree
    const ModelField *f = model_fields(&count);
    for (int i = 0; i < count; i++) {
        memset(&c, 0, sizeof c);
        model_field_set(&c, &f[i], 1);
        int set = 0;
        for (int k = 0; k < count; k++) set += model_field_get(&c, &f[k]) != 0;
        CHECK(set == 1 && model_field_get(&c, &f[i]) == 1, "%s sets %d fields", f[i].name, set);
    }
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += f[i].type == FIELD_INT64 || f[i].type == FIELD_DOUBLE ? 8 : 4;
    bytes += sizeof c.fsa.recompute + sizeof c.fsa.reserved; // they are no part of a model
    CHECK(bytes <= sizeof(ModelConfig) && bytes + 16 > sizeof(ModelConfig),
          "a field of ModelConfig is not listed");
}

static void test_rope(void) {
    ModelConfig c = preset_config("llama3-8b", 0);
    double f[64];
    rope_inv_freq(&c, f);
    for (int i = 0; i < 64; i++)
        CHECK(fabs(f[i] / exp(-i / 64.0 * log(5e5)) - 1) < 1e-14, "channel %d: %.17g", i, f[i]);
    // Llama 3.1's scaling; expected values from Hugging Face's formula in float64
    c.rope_factor = 8, c.rope_original_len = 8192;
    rope_inv_freq(&c, f);
    static const struct {
        int i;
        double value;
    } known[] = {
        {1, 0.81461723385654472},     {20, 0.016560440080994446},   {28, 0.0032114459947525913},
        {29, 0.0021665707635033591},  {30, 0.0013718935677611381},  {32, 0.00052484616099295468},
        {34, 0.00017850781276799638}, {35, 9.5562123539646833e-05}, {63, 3.0689259889145111e-07},
    };
    for (size_t k = 0; k < sizeof known / sizeof known[0]; k++)
        CHECK(fabs(f[known[k].i] / known[k].value - 1) < 1e-13, "channel %d: %.17g", known[k].i,
              f[known[k].i]);
}

static void test_param_table(void) {
    static const struct {
        const char *preset;
        long long total; // parameters of the published model
    } known[] = {{"llama3-8b", 8030261248},   {"qwen3-14b", 14768307200}, {"qwen2.5-7b", 7615616512},
                 {"smollm2-360m", 361821120}, {"qwen3-0.6b", 596049920},  {"llama3.2-1b", 1235814400},
                 {"llama3.2-3b", 3212749824}};
    int64_t total;
    for (int i = 0; i < 7; i++) {
        ModelConfig c = preset_config(known[i].preset, 0);
        c.attn = ATTN_FULL;
        param_table(&c, NULL, &total);
        CHECK(total == known[i].total, "%s: %lld", known[i].preset, (long long)total);
    }
    // a small model with all optional tensors and distinct sizes
    ModelConfig c = preset_config("tiny", 200);
    c.layers = 2, c.channels = 24, c.hidden = 40, c.qkv_bias = c.qk_norm = 1;
    c.fsa.q_heads = 6, c.fsa.kv_heads = 2, c.fsa.head_dim = 10, c.fsa.cmp_len = 32, c.fsa.cmp_stride = 16;
    static const struct {
        const char *name;
        int64_t rows, cols;
        int decay, layer;
    } want[] = {
        {"wte", 256, 24, 1, -1},
        {"layers.0.ln1", 1, 24, 0, 0},
        {"layers.0.wqkv", 100, 24, 1, 0},
        {"layers.0.wgate", 18, 24, 1, 0},
        {"layers.0.bqkv", 1, 100, 0, 0},
        {"layers.0.bgate", 1, 24, 0, 0},
        {"layers.0.qnorm", 1, 10, 0, 0},
        {"layers.0.knorm", 1, 10, 0, 0},
        {"layers.0.phi_wk", 640, 10, 1, 0},
        {"layers.0.phi_pe", 64, 10, 0, 0},
        {"layers.0.phi_wv", 640, 10, 1, 0},
        {"layers.0.wo", 24, 60, 1, 0},
        {"layers.0.ln2", 1, 24, 0, 0},
        {"layers.0.wgu", 80, 24, 1, 0},
        {"layers.0.wdown", 24, 40, 1, 0},
    };
    ParamTensor t[64];
    int64_t n = param_table(&c, t, &total), at = 0;
    CHECK(n == 1 + 2 * 14 + 2, "%lld tensors", (long long)n);
    for (int64_t i = 0; i < n; i++) {
        CHECK(t[i].offset == at && t[i].size == t[i].rows * t[i].cols, "%s", t[i].name);
        at += t[i].size;
    }
    CHECK(at == total, "total");
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++)
        CHECK(!strcmp(t[i].name, want[i].name) && t[i].rows == want[i].rows && t[i].cols == want[i].cols &&
                  t[i].decay == want[i].decay && t[i].layer == want[i].layer,
              "%s [%lld, %lld]", t[i].name, (long long)t[i].rows, (long long)t[i].cols);
    CHECK(!strcmp(t[15].name, "layers.1.ln1") && !strcmp(t[n - 2].name, "lnf") &&
              !strcmp(t[n - 1].name, "lm_head"),
          "%s %s %s", t[15].name, t[n - 2].name, t[n - 1].name);
    c.tied = 1, c.fsa.gate_per_token = 1, c.fsa.phi = FSA_PHI_MEAN;
    n = param_table(&c, t, &total);
    CHECK(n == 1 + 2 * 11 + 1 && !strcmp(t[3].name, "layers.0.wgate") && t[3].rows == 3 && t[5].cols == 8,
          "%lld", (long long)n);
    c.attn = ATTN_WINDOW;
    CHECK(param_table(&c, NULL, &total) == 1 + 2 * 9 + 1, "no gate");
    c.attn = ATTN_NSA, c.full_every = 2, c.fsa.phi = FSA_PHI_LINEAR;
    CHECK(param_table(&c, t, &total) == 1 + 14 + 9 + 1 && strcmp(t[15].name, "layers.1.ln1") == 0 &&
              strcmp(t[17].name, "layers.1.bqkv") == 0 && strcmp(t[18].name, "layers.1.qnorm") == 0 &&
              strcmp(t[20].name, "layers.1.wo") == 0,
          "the second layer is full, and has neither gates nor phi");
}

// Tests that the matmuls of a layer's q, k, v and gate logits compute each column once, from its own row of
// the one matrix that wqkv and wgate are, and that k and v come first if they are gathered.
static void test_qkv_layout(void) {
    for (int variant = 0; variant < 64; variant++) {
        const int hybrid = variant >> 5, nsa = variant & 1 && !hybrid, sharded = variant >> 4 & 1;
        ModelConfig c = preset_config("tiny", 200);
        c.full_every = 2 * hybrid; // the second of four layers is full
        c.attn = nsa || hybrid ? ATTN_NSA : ATTN_FULL, c.qkv_bias = variant >> 1 & 1,
        c.qk_norm = variant >> 2 & 1;
        c.fsa.q_heads = 8, c.fsa.kv_heads = 2, c.fsa.gate_per_token = variant >> 3 & 1;
        const int64_t d = c.fsa.head_dim, gates = !nsa ? 0 : c.fsa.gate_per_token ? 3 : 24;
        ParamLayout layout;
        param_layout_build(&layout, &c);
        const LayerParams *w = &layout.layers[1];
        const QkvLayout x = qkv_layout(&c, 1);
        CHECK(x.stride <= qkv_layout(&c, 0).stride && x.o_over_q == (nsa && !c.qk_norm), "layout");
        CHECK(x.k == 8 * d && x.v == 10 * d && x.gate == 12 * d && x.width == 12 * d + gates, "columns");
        CHECK(x.stride % 8 == 0 && x.stride >= x.width && x.stride < x.width + 8, "stride");
        CHECK(!nsa || w->wgate == w->wqkv + x.gate * c.channels, "wgate is not right behind wqkv");
        QkvPart parts[QKV_PARTS];
        const int count = qkv_parts(&x, w, c.channels, sharded, 0, parts);
        int64_t sum = 0, wrong = 0;
        for (int i = 0; i < count; i++) {
            const QkvPart *p = &parts[i];
            const int64_t end = p->column + p->width;
            // the first biased column: of q, k and v if they have a bias, and of the gates
            const int64_t biased = c.qkv_bias || p->column >= x.gate ? p->column : x.gate;
            sum += p->width;
            for (int k = 0; k < i; k++) // parts do not overlap
                wrong +=
                    p->column < parts[k].column + parts[k].width && parts[k].column < p->column + p->width;
            wrong += p->weight != w->wqkv + p->column * c.channels;
            const int64_t bias = biased < x.gate ? w->bqkv + biased : w->bgate + biased - x.gate;
            wrong += p->bias != (biased < end ? bias : -1);
            wrong += biased < end && p->bias_column != biased;
        }
        CHECK(sum == x.width && wrong == 0, "variant %d: parts", variant);
        CHECK(!nsa || !c.qkv_bias || w->bgate == w->bqkv + x.gate, "bgate is not right behind bqkv");
        CHECK(count == (sharded ? 2 + nsa : 1 + (nsa && gates % 8)), "variant %d: %d parts", variant, count);
        CHECK(parts[0].column <= x.k && parts[0].column + parts[0].width >= x.gate, "k and v come first");
        param_layout_free(&layout);
    }
}

static void test_params_init(void) {
    const ParamInit seed7 = {7, {-2, 0, 2}}, seed8 = {8, {-2, 0, 2}};
    ModelConfig c = preset_config("tiny", 300);
    ParamTensor t[64];
    int64_t total, n = param_table(&c, t, &total);
    float *a = (float *)xmalloc((size_t)total * sizeof *a), *b = (float *)xmalloc((size_t)total * sizeof *b);
    for (int64_t i = 0; i < total; i++) a[i] = b[i] = NAN;
    params_init(&c, a, &seed7);
    params_init(&c, b, &seed7);
    CHECK(memcmp(a, b, (size_t)total * sizeof *a) == 0, "same seed, same bits");
    params_init(&c, b, &seed8);
    for (int64_t k = 0; k < n; k++) {
        const float *x = a + t[k].offset;
        double sum = 0, squares = 0;
        int64_t same = 0;
        for (int64_t i = 0; i < t[k].size; i++) {
            double mean = 0;
            if (t[k].init == INIT_ONES) mean = 1;
            if (strstr(t[k].name, "bgate") && i < 12) mean = (double)(i % 3) * 2 - 2; // 4 heads, 4 zeros
            // the diagonal of each [d, d] matrix in [Hkv, l, d, d]
            if (strstr(t[k].name, "phi_w") && i % 32 == (i / 32) % 32) mean = 1.0 / 16;
            sum += x[i] - mean;
            squares += (x[i] - mean) * (x[i] - mean);
            same += x[i] == b[t[k].offset + i];
        }
        double size = (double)t[k].size, std = sqrt(squares / size), want = 0;
        if (strstr(t[k].name, "wte") || strstr(t[k].name, "wqkv") || strstr(t[k].name, "wgu") ||
            strstr(t[k].name, "lm_head"))
            want = 1 / sqrt(3.0 * c.channels);
        if (strstr(t[k].name, "wo") || strstr(t[k].name, "wdown")) want = 1 / sqrt(3.0 * c.channels * 8);
        if (strstr(t[k].name, "phi_w")) want = 0.02 / 4;
        CHECK(fabs(std - want) <= 0.05 * want && fabs(sum / size) <= 6 * want / sqrt(size),
              "%s: mean off by %g, std %g, expected %g", t[k].name, sum / size, std, want);
        CHECK(want == 0 ? same == t[k].size : same < t[k].size / 100, "%s: another seed", t[k].name);
    }
    CHECK(a[t[2].offset] != a[t[0].offset], "two tensors use one random stream");
    free(a);
    free(b);
}

// Counts the visible pairs query by query.
static double brute_pairs(const FsaConfig *c, FsaVisibility rule, int64_t n) {
    double pairs = 0;
    for (int64_t t = 0; t < n; t++) {
        if (rule == FSA_CAUSAL) pairs += (double)(t + 1);
        if (rule == FSA_WINDOW) pairs += (double)(t + 1 < c->window ? t + 1 : c->window);
        if (rule == FSA_COMPRESSED)
            for (int64_t i = 0; i * c->cmp_stride + c->cmp_len - 1 <= t; i++) pairs++;
        if (rule == FSA_SELECTED) {
            int64_t own = t / c->block, others = own < c->topk - 1 ? own : c->topk - 1;
            pairs += (double)(others * c->block + t % c->block + 1);
        }
    }
    return pairs;
}

static void test_flops(void) {
    FsaConfig f = {4, 2, 8, 8, 4, 16, 3, 1, 1, 13, FSA_PHI_LINEAR, 0, 0, 0, {0}};
    for (int64_t n = 0; n < 150; n++)
        for (int rule = FSA_CAUSAL; rule <= FSA_SELECTED; rule++)
            CHECK(visible_pairs(&f, (FsaVisibility)rule, n) == brute_pairs(&f, (FsaVisibility)rule, n),
                  "rule %d, n %lld: %g", rule, (long long)n, visible_pairs(&f, (FsaVisibility)rule, n));
    ModelConfig c = preset_config("llama3-8b", 0);
    int64_t total, n = 100;
    c.attn = ATTN_FULL;
    param_table(&c, NULL, &total);
    // all weights except wte and the norms are operands of matmuls
    double weights = (double)total - (double)c.padded_vocab * c.channels - 65.0 * c.channels;
    double want = 6 * weights * (double)n + 32.0 * 32 * 12 * 128 * 5050;
    CHECK(fabs(model_flops(&c, n) / want - 1) < 1e-12, "%g, expected %g", model_flops(&c, n), want);
    c.attn = ATTN_NSA;
    double compressed = 16 * (1 + 2 + 3 + 4) + 5 * 5; // 69 queries see windows, one more every 16 queries
    want = 6 * weights * (double)n + 6.0 * 32 * 3 * 32 * 4096 * (double)n +
           32.0 * 32 * 12 * 128 * (5050 + 5050 + compressed) + 32.0 * 32 * 2 * 128 * compressed +
           32.0 * 8 * 12 * 32 * 128 * 128 * 5;
    CHECK(fabs(model_flops(&c, n) / want - 1) < 1e-12, "%g, expected %g", model_flops(&c, n), want);
    // -profile counts the same FLOPs, in four micro-batches of three sequences that two GPUs share
    PassWork pass = {1, 0, 0, 3, n, 2, 4};
    PartWork work[PART_END];
    double sum = 0, forward = 0;
    profile_work(&c, &pass, work);
    for (int i = 0; i < PART_END; i++)
        if (work[i].limit != LIMIT_MEMORY) sum += work[i].amount;
    CHECK(fabs(sum / (model_flops(&c, n) * 4 * 3 / 2) - 1) < 1e-12, "profile: %g FLOPs", sum);
    CHECK(work[PART_QUANTIZE].amount == 0 && work[PART_NORMS].amount > 0, "profile: bytes");
    pass.recompute = 2;
    profile_work(&c, &pass, work);
    for (int i = 0; i < PART_END; i++)
        if (work[i].limit != LIMIT_MEMORY) forward += work[i].amount;
    pass.step = 0, pass.micro_batches = 9;
    profile_work(&c, &pass, work);
    forward -= sum + 4 * (work[PART_MATMUL].amount + work[PART_ATTENTION_FORWARD].amount);
    forward += 4 * 2.0 * 3 * n / 2 * c.layers * c.channels * c.hidden;
    CHECK(fabs(forward) < 1e-9 * sum, "profile: -r 2 adds a forward pass of the layers but wdown: %g",
          forward);
    // with full_every, eight of the 32 layers have the FLOPs of full attention, the others those of their own
    for (int attn = 0; attn < 3; attn += 2) {
        double hybrid[2], full;
        c.attn = attn, c.full_every = 4, c.fsa.window = 13, pass.step = 1, pass.recompute = 0,
        pass.micro_batches = 4;
        hybrid[0] = model_flops(&c, n), hybrid[1] = 0;
        profile_work(&c, &pass, work);
        for (int i = 0; i < PART_END; i++)
            if (work[i].limit != LIMIT_MEMORY) hybrid[1] += work[i].amount;
        c.full_every = 0, want = 0.75 * model_flops(&c, n);
        c.attn = ATTN_FULL, full = model_flops(&c, n);
        want += 0.25 * full;
        CHECK(fabs(hybrid[0] / want - 1) < 1e-12 && fabs(want / full - 1) > 1e-3, "%g, expected %g",
              hybrid[0], want);
        CHECK(fabs(hybrid[1] / (want * 4 * 3 / 2) - 1) < 1e-12, "profile: %g FLOPs", hybrid[1]);
    }
    c.attn = ATTN_WINDOW, c.fsa.window = 1;
    want = 6 * weights * (double)n + 32.0 * 32 * 12 * 128 * (double)n;
    CHECK(fabs(model_flops(&c, n) / want - 1) < 1e-12, "%g, expected %g", model_flops(&c, n), want);
}

// ----------------------------------------------------------------------------
// Options

// Parses a command line whose words are separated by spaces; '' is an empty word.
static void parse(Options *o, const char *line) {
    static char text[16][1024]; // Options points into the text
    static int next;
    static char *argv[16][40];
    int k = next++ % 16, argc = 1;
    snprintf(text[k], sizeof text[k], "%s", line);
    argv[k][0] = (char *)"trainer";
    for (char *word = strtok(text[k], " "); word; word = strtok(NULL, " "))
        argv[k][argc++] = strcmp(word, "''") == 0 ? (char *)"" : word;
    options_parse(o, argc, argv[k]);
}

static void run_parse(void *line) {
    Options o;
    parse(&o, (const char *)line);
}

static void test_options(void) {
    Options o;
    ModelConfig c;
    parse(&o, "-i a*.bin");
    CHECK(!strcmp(o.train, "a*.bin") && !o.val && !o.output && !strcmp(o.init_from, "recall") && o.preset,
          "defaults");
    CHECK(o.batch == 4 && o.beta1 == 0.9 && o.doc_mask == 1 && o.eps == 1e-8 && o.resume == 0, "defaults");
    CHECK(options_given(&o, "i") && !options_given(&o, "j") && !options_given(&o, "topk"), "given");
    parse(&o, "-i a -j b -e tiny -o d -n 7 -nk 2 -y 1 -b 3 -t 64 -d 384 -x 50 -l 2e-3 -u 5 -q 0.25 -c 0.2 "
              "-v 9 -m 8 -s 11 -g 12");
    CHECK(!strcmp(o.val, "b") && !strcmp(o.init_from, "tiny") && !strcmp(o.output, "d") &&
              o.save_every == 7 && o.keep == 2 && o.resume == 1 && o.batch == 3 && o.seq_len == 64 &&
              o.total_batch == 384,
          "values");
    CHECK(o.max_steps == 50 && o.lr == 2e-3 && o.warmup == 5 && o.final_frac == 0.25 &&
              o.weight_decay == 0.2 && o.val_every == 9 && o.val_batches == 8 && o.sample_every == 11 &&
              o.generate == 12,
          "values");
    CHECK(options_micro_batches(&o, 1) == 2 && options_micro_batches(&o, 2) == 1, "micro-batches");
    parse(&o, "-i a -beta1 0.5 -beta2 0.98 -eps 1e-7 -clip 0 -a 1 -prompt -5 -temp 0 -topp 0.5 -seed 42 "
              "-doc-mask 0");
    CHECK(o.beta1 == 0.5 && o.beta2 == 0.98 && o.eps == 1e-7 && o.clip == 0 && o.overfit == 1 &&
              !strcmp(o.prompt, "-5") && o.temperature == 0 && o.top_p == 0.5 && o.seed == 42 &&
              o.doc_mask == 0,
          "values");
    parse(&o, "-i a --overfit 1 -prompt ''");
    CHECK(o.overfit == 1 && options_given(&o, "a") && o.prompt[0] == '\0', "-overfit");
    parse(&o, "--train=a --batch=6 -steps 70 -warmup=7 -lr 3e-3 --weight_decay 0.5 -attn=full --kv_heads=1 "
              "--prompt=a=b");
    CHECK(!strcmp(o.train, "a") && o.batch == 6 && o.max_steps == 70 && o.warmup == 7 && o.lr == 3e-3 &&
              o.weight_decay == 0.5 && !strcmp(o.prompt, "a=b") && options_given(&o, "attn") &&
              options_given(&o, "kv-heads") && options_given(&o, "l"),
          "long forms");
    // -l, -u and -x from the preset, the checkpoint or the epoch
    parse(&o, "-i a -e gpt-124m -x 5000");
    options_set_schedule(&o, 0, 0, 99);
    CHECK(o.lr == 6e-4 && o.warmup == 500 && o.max_steps == 5000, "preset: %g %lld", o.lr,
          (long long)o.warmup);
    parse(&o, "-i a -e gpt-124m -x -1");
    options_set_schedule(&o, 0, 0, 90000);
    CHECK(o.warmup == 700 && o.max_steps == 90000, "one epoch");
    parse(&o, "-i a -e gpt-124m -x 5000");
    options_set_schedule(&o, 2e-3, 40, 99);
    CHECK(o.lr == 2e-3 && o.warmup == 40, "resumed");
    parse(&o, "-i a -e gpt-124m -l 1e-3 -u 3");
    options_set_schedule(&o, 2e-3, 40, 99);
    CHECK(o.lr == 1e-3 && o.warmup == 3, "given");
    parse(&o, "-i a -b 2 -b 5");
    CHECK(o.batch == 5, "the last one counts");
    parse(&o, "-i a");
    options_model(&o, &c);
    CHECK(o.seq_len == 256 && c.layers == 2 && c.vocab_size == 0 && c.fsa.topk == 4 && c.attn == ATTN_NSA,
          "recall");
    parse(&o, "-i a -e tiny -t 100 -attn window -layers 3 -channels 60 -heads 6 -kv-heads 1 -head-dim 10 "
              "-hidden 30 "
              "-tied 1 -qkv-bias 1 -qk-norm 1 -theta 5e5 -vocab 300");
    options_model(&o, &c);
    CHECK(o.seq_len == 100 && c.attn == ATTN_WINDOW && c.layers == 3 && c.channels == 60 &&
              c.fsa.q_heads == 6 && c.fsa.kv_heads == 1 && c.fsa.head_dim == 10 && c.hidden == 30 &&
              c.tied == 1 && c.qkv_bias == 1 && c.qk_norm == 1 && c.rope_theta == 5e5 &&
              c.vocab_size == 300 && c.padded_vocab == 384 && c.rope_original_len == 100,
          "model flags");
    parse(&o, "-i a -cmp-len 32 -cmp-stride 16 -block 64 -topk 9 -init-blocks 2 -local-blocks 3 -window 77 "
              "-phi mean "
              "-gate-per-token 1 -norm-eps 1e-6 -rope-factor 8 -rope-low-freq 2 -rope-high-freq 3 "
              "-rope-original-len 512 -scale 0.25");
    options_model(&o, &c);
    CHECK(c.fsa.cmp_len == 32 && c.fsa.cmp_stride == 16 && c.fsa.block == 64 && c.fsa.topk == 9 &&
              c.fsa.init_blocks == 2 && c.fsa.local_blocks == 3 && c.fsa.window == 77 &&
              c.fsa.phi == FSA_PHI_MEAN && c.fsa.gate_per_token == 1 && c.norm_eps == 1e-6 &&
              c.rope_factor == 8 && c.rope_low_freq == 2 && c.rope_high_freq == 3 &&
              c.rope_original_len == 512 && c.fsa.scale == 0.25f,
          "model flags");

    static const char *const bad[][3] = {
        // command line, two texts that the message must contain
        {"", "no training data", "-i"},
        {"-i a -overfitt 1", "-overfitt", "did you mean -overfit?"},
        {"-i a -lyaers 1", "-lyaers", "-layers?"},
        {"-i a -kvheads 1", "-kvheads", "-kv-heads?"},
        {"-i a -topc 1", "-topc", "-top"},
        {"-i a -padded-vocab 256", "-padded-vocab: unknown flag", "-h"},
        {"-i a -zzzzz 1", "-zzzzz: unknown flag", "-h lists all"},
        {"-i a - 1", "-: unknown flag", "-h"},
        {"-i a -choice f", "-choice: only the GPU trainer", "train_gpt_nsa"},
        {"-i a --z=1", "-z: only the GPU trainer", "train_gpt_nsa"},
        {"-i a extra", "extra", "not a flag"},
        {"-i a -b", "-b", "missing"},
        {"-i -j b", "-i", "missing"},
        {"-i ''", "-i", "empty"},
        {"-i a -b ''", "-b", "empty"},
        {"-i a -b 4x", "-b 4x", "must be a whole number"},
        {"-i a -b 1.5", "-b 1.5", "must be a whole number"},
        {"-i a -l 1e-3f", "-l 1e-3f", "must be a number"},
        {"-i a -l nan", "-l nan", "must be a number"},
        {"-i a -l inf", "-l inf", "must be a number"},
        {"-i a -l -1", "-l -1", "must be from 0 to"},
        {"-i a -l 1e999", "-l 1e999", "must be a number"},
        {"-i a -b 0", "-b 0", "must be from 1 to"},
        {"-i a -b -3", "-b -3", "must be from 1 to"},
        {"-i a -x 99999999999999999999", "-x 99999999999999999999", "must be from -1 to"},
        {"-i a -x 0", "-x 0", "-1 for one epoch"},
        {"-i a -k cosin", "-k cosin", "cosine|linear|constant|wsd"},
        {"-i a -learning-rate 1", "-learning-rate", "did you mean -lr?"},
        {"-i a --batch_size=4", "--batch_size=4", "did you mean -batch?"},
        {"-i a --max-steps 4", "--max-steps", "did you mean -steps?"},
        {"-i a -chan 64", "-chan", "did you mean -channels?"},
        {"-i a -warm 5", "-warm", "did you mean -warmup?"},
        {"-i a -LR 1", "-LR", "did you mean -lr?"},
        {"-i a -lrate 1", "-lrate", "did you mean -lr?"},
        {"-i a --epoch 1", "--epoch", "did you mean -steps?"},
        {"-i a -eval-interval 1", "-eval-interval", "did you mean -val-every?"},
        {"-i a --batch=4x", "-b 4x", "must be a whole number"},
        {"-i a -steps", "-steps", "missing"},
        {"-i a --steps=", "-x", "empty"},
        {"-i a -q 1.5", "-q 1.5", "from 0 to 1"},
        {"-i a -beta2 1", "-beta2 1", "must be from 0 to"},
        {"-i a -topp 0", "-topp 0", "must be from"},
        {"-i a -y 2", "-y 2", "must be from 0 to 1"},
        {"-i a -attn sparse", "-attn sparse", "nsa|full|window"},
        {"-i a -attn 1", "-attn 1", "nsa|full|window"},
        {"-i a -phi avg", "-phi avg", "mean|linear"},
        {"-i a -layers 0", "-layers 0", "must be from 1 to"},
        {"-i a -window 1e3", "-window 1e3", "must be a whole number"},
        {"-i a -e nosuch", "-e nosuch", "recall tiny"},
        {"-i a -e /", "-e /", "folder"},
        {"-i a -y 1", "-y 1", "-o"},
        {"-i a -n 5", "-n 5", "-o"},
        {"-i a -nk 5", "-nk 5", "-o"},
        {"-i a -v 5", "-v 5", "-j"},
        {"-i a -u 20 -x 10", "-u 20", "10 steps of -x"},
        {"-sample 1", "-sample 1", "-e"},
        {"-sample 1 -e tiny", "-sample 1", "checkpoint file"},
        {"-val 1 -j b", "-val 1", "-e"},
        {"-val 1 -e /dev/null", "-val 1", "-j"},
        {"-sample 1 -val 1 -e /dev/null", "-sample 1 -val 1", "cannot be combined"},
        {"-sample 1 -a 1 -e /dev/null", "-sample 1 -a 1", "cannot be combined"},
        {"-val 1 -y 1 -o x -e /dev/null -j b", "-val 1 -y 1", "cannot be combined"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        Child r = child(run_parse, (void *)bad[i][0]);
        check_died(&r, bad[i][0], bad[i][1], bad[i][2]);
    }
    static const char *const good[] = {
        "-sample 1 -e /dev/null", "-val 1 -e /dev/null -j b", "-i a -v 0",       "-i a -n 0",
        "-i a -u 10 -x 10",       "-i a -t 0 -d 0",           "-i a -x -1 -u 20"};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        Child r = child(run_parse, (void *)good[i]);
        CHECK(r.code == 0 && r.err[0] == '\0', "%s: %s", good[i], r.err);
    }
    static const char *const help[] = {"-h", "--help", "-i a -help"};
    for (int k = 0; k < 3; k++) {
        Child r = child(run_parse, (void *)help[k]);
        CHECK(r.code == 0 && r.err[0] == '\0', "%s: %d %s", help[k], r.code, r.err);
        int count;
        char name[40];
        const OptionFlag *f = option_flags(&count);
        for (int i = 0; i < count; i++) {
            snprintf(name, sizeof name, "  -%s", f[i].flag);
            CHECK(strstr(r.out, name) && strstr(r.out, f[i].help), "help misses %s", name);
            CHECK(!strstr(r.out, "[GPU]") == 0, "the GPU trainer's flags are not marked");
        }
        const ModelField *m = model_fields(&count);
        for (int i = 0; i < count; i++) {
            snprintf(name, sizeof name, "  -%s ", m[i].name);
            CHECK(!m[i].help == !strstr(r.out, name), "help and %s", name);
        }
        CHECK(strstr(r.out, "qwen2.5-7b") && strstr(r.out, "(default: 0.95)"), "help");
    }
    int flags, fields;
    option_flags(&flags);
    model_fields(&fields);
    CHECK(flags <= OPTIONS_MAX && fields <= OPTIONS_MAX, "%d flags, %d fields", flags, fields);
}

typedef struct {
    const char *line;
    ModelConfig model;
} ModelCheck;

static void run_check_model(void *argument) {
    ModelCheck *a = (ModelCheck *)argument;
    Options o;
    parse(&o, a->line);
    options_check_model(&o, &a->model, 256, 0);
}

static void run_resume_model(void *argument) {
    ModelCheck *a = (ModelCheck *)argument;
    Options o;
    parse(&o, a->line);
    options_check_model(&o, &a->model, 256, 1);
}

static void run_micro_batches(void *argument) {
    Options o;
    parse(&o, (const char *)argument);
    options_micro_batches(&o, 2);
}

static void test_options_checkpoint(void) {
    ModelConfig trained = preset_config("recall", 70), c;
    Options o;
    ModelCheck a;
    static const char *const bad[][3] = {
        {"-i a -layers 3", "-layers 3", "has 2"},
        {"-i a -attn full -layers 3", "-layers 3", "has 2"},
        {"-i a -attn nsa -topk 8", "-topk 8", "has 4"},
        {"-i a -attn full -heads 2", "-heads 2", "has 4"},
        {"-i a -phi mean", "-phi mean", "has linear"},
        {"-i a -full-every 2", "-full-every 2", "has 0"},
        {"-i a -vocab 71", "-vocab 71", "has 70"},
        {"-i a -t 512 -topk 8", "-topk 8", "has 4"},
        {"-i a -e tiny", "-e tiny", "layers is 4"},
        {"-i a -theta 5e5", "-theta 500000", "256"},
        {"-i a -t 256 -rope-factor 2", "-rope-factor 2", "has 0"},
        {"-i a -t 100 -rope-factor 2", "-rope-factor 2", "-t above its 256"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        a.line = bad[i][0], a.model = trained;
        Child r = child(run_check_model, &a);
        check_died(&r, bad[i][0], bad[i][1], bad[i][2]);
    }
    static const char *const good[] = {"-i a", "-i a -e recall", "-i a -layers 2 -attn nsa -vocab 70",
                                       "-i a -t 64", "-i a -theta 1e4"};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        a.line = good[i], a.model = trained;
        Child r = child(run_check_model, &a);
        CHECK(r.code == 0 && r.err[0] == '\0', "%s: %s", good[i], r.err);
    }
    c = trained;
    parse(&o, "-i a -e recall");
    options_check_model(&o, &c, 300, 0);
    CHECK(o.seq_len == 300 && memcmp(&c, &trained, sizeof c) == 0, "nothing changed");
    parse(&o, "-i a -t 512 -theta 1e6 -rope-factor 4");
    options_check_model(&o, &c, 256, 0);
    CHECK(o.seq_len == 512 && c.rope_theta == 1e6 && c.rope_factor == 4 && c.rope_original_len == 256 &&
              c.layers == 2,
          "a longer context");
    parse(&o, "-i a -e recall -t 512 -theta 1e6 -rope-factor 4"); // resumed
    options_check_model(&o, &c, 512, 1);
    CHECK(o.seq_len == 512 && c.rope_theta == 1e6 && c.rope_factor == 4, "resumed at the longer context");
    c = trained;
    parse(&o, "-i a -attn window -window 128");
    options_check_model(&o, &c, 256, 0);
    CHECK(c.attn == ATTN_WINDOW && c.fsa.window == 128 && c.layers == 2, "another attention");
    parse(&o, "-i a -attn nsa -window 16 -topk 8 -phi mean");
    options_check_model(&o, &c, 256, 0);
    CHECK(c.attn == ATTN_NSA && c.fsa.topk == 8 && c.fsa.phi == FSA_PHI_MEAN, "to nsa");
    parse(&o, "-i a -attn window -full-every 2");
    options_check_model(&o, &c, 256, 0);
    CHECK(c.attn == ATTN_WINDOW && c.full_every == 2, "to window and full");
    parse(&o, "-i a -attn nsa");
    options_check_model(&o, &c, 256, 0);
    CHECK(c.attn == ATTN_NSA && c.full_every == 2, "full layers stay full");
    a.line = "-i a -full-every 0", a.model = c;
    Child r = child(run_check_model, &a);
    check_died(&r, a.line, "-full-every 0", "has 2");
    parse(&o, "-i a -attn full");
    options_check_model(&o, &c, 256, 0);
    CHECK(c.attn == ATTN_FULL && c.full_every == 0, "all layers full");
    a.line = "-i a -attn full", a.model = trained;
    r = child(run_resume_model, &a);
    check_died(&r, a.line, "-attn full", "has nsa");
    a.line = "-i a -e recall", a.model = trained,
    a.model.rope_theta = 1e6; // changed by an earlier run at a longer context
    r = child(run_check_model, &a);
    CHECK(r.code == 0, "a preset must not override RoPE's fields: %s", r.err);
    r = child(run_micro_batches, (void *)"-i a -t 64 -b 2 -d 128");
    check_died(&r, "-d", "-d 128: must be a multiple of b*t*data-parallel ranks = 256", "try -d 256");
}

// ----------------------------------------------------------------------------
// Checkpoints

static ModelConfig model;
static int64_t model_size;
static float *arrays[3], *loaded[3];

static float pattern(int array, int64_t i, int64_t step) {
    return (float)(array + 1) * 0.25f + (float)(i % 1000) + 1e4f * (float)step;
}

static TrainState make_state(int64_t step) {
    TrainState s;
    memset(&s, 0, sizeof s);
    s.step = step, s.tokens = 10 * step, s.epoch = 2, s.position = 3, s.epoch_samples = 4, s.seed = 5;
    s.seq_len = 6, s.total_batch = 7, s.draws = 8;
    s.data.shards = 9, s.data.tokenizer = 10, s.data.last[62] = 'x', s.lr = 0.5, s.warmup = 11;
    s.losses.count = 12, s.norms.values[OUTLIER_WINDOW - 1] = 13;
    return s;
}

static void save(const char *folder, int64_t step) {
    TrainState s = make_state(step);
    for (int a = 0; a < 3; a++)
        for (int64_t i = 0; i < model_size; i++) arrays[a][i] = pattern(a, i, step);
    checkpoint_save(folder, &model, &s, arrays[0], arrays[1], arrays[2], model_size);
}

static const ParamInit no_init;

static void load(const char *path, TrainState *s, int all) {
    for (int a = 0; a < 3; a++)
        for (int64_t i = 0; i < model_size; i++) loaded[a][i] = NAN;
    checkpoint_load(path, &model, &no_init, s, loaded[0], all ? loaded[1] : NULL, all ? loaded[2] : NULL,
                    model_size);
}

// Returns the number of elements of array a that differ from what save(step) wrote.
static int64_t num_wrong(int a, int64_t step) {
    int64_t n = 0;
    for (int64_t i = 0; i < model_size; i++) n += loaded[a][i] != pattern(a, i, step);
    return n;
}

static void flip(const char *path, int64_t at, int bit) {
    FILE *f = fopen(path, "r+b");
    unsigned char byte = 0;
    int ok = f && fseeko(f, (off_t)at, SEEK_SET) == 0 && fread(&byte, 1, 1, f) == 1;
    byte ^= (unsigned char)(1 << bit);
    ok = ok && fseeko(f, (off_t)at, SEEK_SET) == 0 && fwrite(&byte, 1, 1, f) == 1;
    if (!ok || fclose(f) != 0) die("cannot change %s", path);
}

static int exists(const char *folder, const char *name) {
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return access(path, F_OK) == 0;
}

static void make_file(const char *folder, const char *name, const char *text) {
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    if (!f || fputs(text, f) < 0 || fclose(f) != 0) die("cannot write %s", path);
}

static void save_one(void *folder) {
    save((const char *)folder, 1);
}

// Saves with a limit on the size of files, as on a full disk.
static void run_save_full(void *folder) {
    struct rlimit limit = {100000, 100000};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    save((const char *)folder, 1);
}

// Writes a file whose temporary file another process replaces meanwhile.
static void run_replaced(void *folder) {
    AtomicFile a;
    char path[PATH_BYTES];
    checkpoint_path(path, sizeof path, (const char *)folder, 9);
    atomic_open(&a, path);
    unlink(a.tmp);
    make_file((const char *)folder, "ckpt_00000009.bin.tmp", "another");
    atomic_commit(&a);
}

static void run_lock(void *folder) {
    folder_lock("-o", (const char *)folder);
}

static void test_folder_lock(void) {
    char folder[300], owner[64], host[200] = "";
    snprintf(folder, sizeof folder, "%s/lock", dir);
    make_dirs(folder);
    int lock = folder_lock("-o", folder);
    CHECK(lock >= 0, "no lock");
    Child r = child(run_lock, folder);
    snprintf(owner, sizeof owner, "process %d on host", (int)getpid());
    gethostname(host, sizeof host - 1);
    check_died(&r, "a second lock", owner, host);
    close(lock);
    r = child(run_lock, folder);
    CHECK(r.code == 0, "the lock is still held: %s", r.err);
    char path[400];
    snprintf(path, sizeof path, "%s/.lock", folder);
    unlink(path);
    if (symlink("/dev/null", path) != 0) die("symlink");
    r = child(run_lock, folder);
    check_died(&r, "a link", folder, "cannot write to the folder");
}

static void run_load(void *path) {
    TrainState s;
    load((const char *)path, &s, 1);
}

static void run_load_weights(void *path) {
    TrainState s;
    load((const char *)path, &s, 0);
}

static void run_newest(void *folder) {
    char path[PATH_BYTES];
    if (!checkpoint_newest((const char *)folder, path)) path[0] = '\0';
    printf("%s", path);
}

static void run_dir_check_new(void *folder) {
    checkpoint_dir_check((const char *)folder, 0);
}

static void run_dir_check_resume(void *folder) {
    checkpoint_dir_check((const char *)folder, 1);
}

static void test_checksum(void) {
    unsigned char data[200];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (unsigned char)(i * 7);
    for (size_t n = 0; n <= sizeof data; n += n < 70 ? 1 : 13) {
        uint64_t h = checksum(data, n, 1);
        CHECK(h == checksum(data, n, 1) && h != checksum(data, n, 2), "seed, n %zu", n);
        if (n > 0) CHECK(h != checksum(data, n - 1, 1), "length, n %zu", n);
        int missed = 0;
        for (size_t i = 0; i < 8 * n; i++) {
            data[i / 8] ^= (unsigned char)(1 << i % 8);
            missed += checksum(data, n, 1) == h;
            data[i / 8] ^= (unsigned char)(1 << i % 8);
        }
        CHECK(missed == 0, "n %zu: %d flips missed", n, missed);
    }
}

static void test_checkpoint_file(void) {
    char folder[300], path[PATH_BYTES], msg[CHECKPOINT_MSG_BYTES];
    snprintf(folder, sizeof folder, "%s/a/b", dir);
    checkpoint_dir_check(folder, 0);
    save(folder, 12);
    checkpoint_path(path, sizeof path, folder, 12);
    CHECK(strstr(path, "/a/b/ckpt_00000012.bin") != NULL, "%s", path);
    CHECK(!exists(folder, "ckpt_00000012.bin.tmp"), "temporary file left");
    Checkpoint k;
    TrainState s, want = make_state(12);
    CHECK(checkpoint_open(&k, path, msg) == 0, "%s", msg);
    checkpoint_close(&k);
    CHECK(memcmp(&k.state, &want, sizeof want) == 0, "state");
    static const int64_t bad_lengths[] = {0, -5, (int64_t)1 << 62};
    for (size_t i = 0; i < sizeof bad_lengths / sizeof bad_lengths[0]; i++) {
        s = make_state(13), s.seq_len = bad_lengths[i];
        checkpoint_save(folder, &model, &s, arrays[0], arrays[1], arrays[2], model_size);
        char bad[PATH_BYTES];
        checkpoint_path(bad, sizeof bad, folder, 13);
        CHECK(checkpoint_open(&k, bad, msg) != 0 && strstr(msg, "invalid context of "), "%s", msg);
        s.seq_len = 6, s.epoch = -1;
        checkpoint_save(folder, &model, &s, arrays[0], arrays[1], arrays[2], model_size);
        CHECK(checkpoint_open(&k, bad, msg) != 0 && strstr(msg, "its state is invalid"), "%s", msg);
        unlink(bad);
    }
    CHECK(checkpoint_open(&k, path, msg) == 0, "%s", msg);
    checkpoint_close(&k);
    int count;
    const ModelField *f = model_fields(&count);
    for (int i = 0; i < count; i++)
        CHECK(model_field_get(&k.config, &f[i]) == model_field_get(&model, &f[i]), "%s", f[i].name);
    load(path, &s, 1);
    for (int a = 0; a < 3; a++)
        CHECK(num_wrong(a, 12) == 0, "array %d: %lld differ", a, (long long)num_wrong(a, 12));
    CHECK(memcmp(&s, &want, sizeof s) == 0, "state");
    load(path, &s, 0);
    CHECK(num_wrong(0, 12) == 0 && isnan(loaded[1][0]), "weights alone");
    CHECK(checkpoint_verify(path, msg) == 0, "%s", msg);

    // flip one bit of: each header byte, the ends of each chunk, random bytes of the arrays, each checksum
    // byte
    int64_t size = checkpoint_bytes(model_size, 3), chunks = checkpoint_num_chunks(model_size),
            table = 24 * chunks;
    int missed = 0;
    CHECK(chunks == 3, "%lld chunks", (long long)chunks);
    for (int64_t at = 0; at < CHECKPOINT_HEADER_BYTES; at++) {
        flip(path, at, (int)(at % 8));
        missed += checkpoint_open(&k, path, msg) == 0 || count_lines(msg);
        flip(path, at, (int)(at % 8));
    }
    CHECK(missed == 0, "%d flips in the header missed", missed);
    Rng rng;
    rng_seed(&rng, (uint64_t)getpid(), 1);
    for (int64_t i = 0; i < 18 + 30 + table; i++) {
        int64_t a = i / 6, end = CHECKPOINT_HEADER_BYTES + 4 * model_size * (a + 1);
        int64_t from = CHECKPOINT_HEADER_BYTES + 4 * model_size * a + i / 2 % 3 * CHECKPOINT_CHUNK_BYTES,
                at = from;
        if (i % 2) at = (from + CHECKPOINT_CHUNK_BYTES < end ? from + CHECKPOINT_CHUNK_BYTES : end) - 1;
        if (i >= 18) at = CHECKPOINT_HEADER_BYTES + rng_below(&rng, 12 * model_size);
        if (i >= 48) at = size - table + i - 48;
        int bit = (int)rng_below(&rng, 8);
        flip(path, at, bit);
        if (checkpoint_verify(path, msg) == 0 || !strstr(msg, "damaged") || !strstr(msg, path)) {
            missed++;
            printf("missed: bit %d of byte %lld\n", bit, (long long)at);
        }
        flip(path, at, bit);
    }
    CHECK(checkpoint_verify(path, msg) == 0, "all flipped back: %s", msg);
    CHECK(missed == 0, "%d flips missed", missed);
    flip(path, CHECKPOINT_HEADER_BYTES + 5, 3);
    Child r = child(run_load, path);
    check_died(&r, "params flipped", path, "parameters");
    r = child(run_load_weights, path);
    check_died(&r, "params flipped", path, "damaged");
    save(folder, 12);
    flip(path, CHECKPOINT_HEADER_BYTES + 4 * model_size, 7);
    r = child(run_load, path);
    check_died(&r, "m flipped", path, "AdamW m");
    r = child(run_load_weights, path);
    CHECK(r.code == 0, "weights are good: %s", r.err);
    save(folder, 12);
    flip(path, CHECKPOINT_HEADER_BYTES + 12 * model_size - 1, 0);
    r = child(run_load, path);
    check_died(&r, "v flipped", path, "AdamW v");

    // swap two chunks and their checksums
    save(folder, 12);
    {
        FILE *file = fopen(path, "r+b");
        char *one = (char *)xmalloc(CHECKPOINT_CHUNK_BYTES), *two = (char *)xmalloc(CHECKPOINT_CHUNK_BYTES);
        int64_t sum1, sum2, sums = size - table;
        int ok = file && fseeko(file, CHECKPOINT_HEADER_BYTES, SEEK_SET) == 0 &&
                 fread(one, 1, CHECKPOINT_CHUNK_BYTES, file) == CHECKPOINT_CHUNK_BYTES &&
                 fread(two, 1, CHECKPOINT_CHUNK_BYTES, file) == CHECKPOINT_CHUNK_BYTES &&
                 fseeko(file, (off_t)sums, SEEK_SET) == 0 && fread(&sum1, 8, 1, file) == 1 &&
                 fread(&sum2, 8, 1, file) == 1 && fseeko(file, CHECKPOINT_HEADER_BYTES, SEEK_SET) == 0 &&
                 fwrite(two, 1, CHECKPOINT_CHUNK_BYTES, file) == CHECKPOINT_CHUNK_BYTES &&
                 fwrite(one, 1, CHECKPOINT_CHUNK_BYTES, file) == CHECKPOINT_CHUNK_BYTES &&
                 fseeko(file, (off_t)sums, SEEK_SET) == 0 && fwrite(&sum2, 8, 1, file) == 1 &&
                 fwrite(&sum1, 8, 1, file) == 1;
        if (!ok || fclose(file) != 0) die("cannot change %s", path);
        free(one);
        free(two);
    }
    CHECK(checkpoint_verify(path, msg) != 0, "swapped chunks");

    // truncated files, and a file with an appended byte
    const int64_t cuts[] = {0, 1, 15, 16, 4095, 4096, 4097, size / 2, size - 8, size - 1};
    for (int i = (int)(sizeof cuts / sizeof cuts[0]) - 1; i >= 0; i--) {
        if (i == (int)(sizeof cuts / sizeof cuts[0]) - 1) save(folder, 12);
        if (truncate(path, (off_t)cuts[i]) != 0) die("truncate %s", path);
        r = child(i % 2 ? run_load : run_load_weights, path);
        check_died(&r, "cut", path, cuts[i] < 16 ? "not a checkpoint" : "truncated");
    }
    save(folder, 12);
    FILE *file = fopen(path, "ab");
    if (!file || fputc(0, file) == EOF || fclose(file) != 0) die("cannot append");
    r = child(run_load, path);
    check_died(&r, "appended", path, "too long");

    // other files
    make_file(folder, "ckpt_00000012.bin", "This is a text, and it is not a checkpoint at all.\n");
    r = child(run_load, path);
    check_died(&r, "text", path, "not a checkpoint");
    r = child(run_load, (void *)"/no/such/file.bin");
    check_died(&r, "missing", "/no/such/file.bin", "No such file");
    r = child(run_load, folder);
    check_died(&r, "folder", folder, "not a file but a folder");
    save(folder, 12);
    unsigned char header[CHECKPOINT_HEADER_BYTES];
    file = fopen(path, "r+b");
    if (!file || fread(header, 1, sizeof header, file) != sizeof header) die("cannot read");
    checkpoint_put_word(header, 1, 9);
    checkpoint_put_word(header, 511, (int64_t)checksum(header, CHECKPOINT_HEADER_BYTES - 8, 0));
    if (fseeko(file, 0, SEEK_SET) || fwrite(header, 1, sizeof header, file) != sizeof header || fclose(file))
        die("cannot write");
    r = child(run_load, path);
    check_died(&r, "version", "version 9", "versions 1 to 4");

    // another model: the same size, but another topk; then a bias that the file has not
    save(folder, 12);
    model.fsa.topk = 5;
    r = child(run_load, path);
    check_died(&r, "topk", "topk is 4, not 5", path);
    model.fsa.topk = 4, model.qkv_bias = 1;
    r = child(run_load, path);
    check_died(&r, "bias", "qkv-bias is 0, not 1", path);
    model.qkv_bias = 0, model.rope_theta = 5e5;
    r = child(run_load, path);
    CHECK(r.code == 0, "RoPE may change: %s", r.err);
    model.rope_theta = 1e4;

    // writing fails
    r = child(save_one, (void *)"/dev/null/x");
    check_died(&r, "unwritable", "/dev/null/x/ckpt_00000001.bin", "cannot write");
    char tmp[400];
    unlink(path);
    snprintf(tmp, sizeof tmp, "%s/ckpt_00000001.bin.tmp", folder);
    r = child(run_save_full, folder);
    check_died(&r, "full disk", "cannot write", "disk");
    CHECK(!exists(folder, "ckpt_00000001.bin") && !exists(folder, "ckpt_00000001.bin.tmp"),
          "a file was left");

    // a symbolic link with the temporary name is not followed
    char victim[400];
    make_file(folder, "victim", "precious");
    snprintf(victim, sizeof victim, "%s/victim", folder);
    if (symlink(victim, tmp) != 0) die("symlink");
    r = child(save_one, folder);
    CHECK(r.code == 0 && exists(folder, "ckpt_00000001.bin"), "a link with the temporary name: %s", r.err);
    char text[64];
    read_text(victim, text, sizeof text);
    CHECK(strcmp(text, "precious") == 0, "a symbolic link was followed");
    r = child(run_replaced, folder);
    check_died(&r, "another writer", "another process writes it", "ckpt_00000009.bin");
    CHECK(exists(folder, "ckpt_00000009.bin.tmp") && !exists(folder, "ckpt_00000009.bin"), "another writer");
}

// Tests that a checkpoint reaches the disk as a whole before it gets its name, and that the folder follows.
static void test_sync(void) {
    char folder[300], path[PATH_BYTES], want[256];
    struct stat file, parent;
    snprintf(folder, sizeof folder, "%s/sync", dir);
    make_dirs(folder);
    calls[0] = '\0';
    save(folder, 1);
    checkpoint_path(path, sizeof path, folder, 1);
    if (stat(path, &file) != 0 || stat(folder, &parent) != 0) die("stat: %s", strerror(errno));
    snprintf(want, sizeof want, "fsync %lld %lld; rename; fsync %lld 0; ", (long long)file.st_ino,
             (long long)checkpoint_bytes(model_size, 3), (long long)parent.st_ino);
    CHECK(strcmp(calls, want) == 0, "'%s', not '%s'", calls, want);
    unlink(path);
}

// Tests that a checkpoint of version 1, 2 or 3 loads to the same arrays, as a whole and in parts at any
// place, and that its gates have the bias 0 in versions 1 and 2.
static void test_checkpoint_old(const char *name, int version, int attn, int linear, int bias_and_norm) {
    char folder[300], path[PATH_BYTES], msg[CHECKPOINT_MSG_BYTES];
    snprintf(folder, sizeof folder, "%s/old", dir);
    checkpoint_dir_check(folder, 1);
    ModelConfig c = preset_config("recall", 3000);
    c.attn = attn, c.fsa.phi = linear ? FSA_PHI_LINEAR : FSA_PHI_MEAN;
    c.qkv_bias = c.qk_norm = bias_and_norm, c.fsa.gate_per_token = !linear;
    const ParamInit init = {1, {1, 2, 3}}; // an older gate has no such bias
    TrainState s, want = make_state(40);
    int64_t n, num_tensors = param_table(&c, NULL, &n);
    ParamTensor table[64];
    param_table(&c, table, &n);
    float *saved[3], *read[3];
    for (int a = 0; a < 3; a++) {
        saved[a] = (float *)xmalloc((size_t)n * sizeof(float));
        read[a] = (float *)xcalloc((size_t)n, sizeof(float));
        for (int64_t i = 0; i < n; i++) saved[a][i] = (float)i + 0.25f * (float)a; // exact below 2^22
        for (int64_t t = 0; t < num_tensors; t++)
            for (int64_t i = 0; i < table[t].size && version < 3 && param_is(&table[t], "bgate"); i++)
                saved[a][table[t].offset + i] = 0;
    }
    int64_t stored = checkpoint_old_save(folder, &c, &want, version, saved[0], saved[1], saved[2]);
    CHECK(stored == n - (attn == ATTN_NSA && version < 3 ? 2 * gate_bias_size(&c.fsa) : 0), "%s: %lld stored",
          name, (long long)stored);
    checkpoint_path(path, sizeof path, folder, 40);
    CHECK(checkpoint_verify(path, msg) == 0, "%s: %s", name, msg);
    checkpoint_load(path, &c, &init, &s, read[0], read[1], read[2], n);
    CHECK(memcmp(&s, &want, sizeof s) == 0, "%s: state", name);
    for (int a = 0; a < 3; a++)
        CHECK(memcmp(read[a], saved[a], (size_t)n * sizeof(float)) == 0, "%s: array %d differs", name, a);

    Checkpoint k;
    if (checkpoint_open(&k, path, msg) != 0) die("%s", msg);
    int64_t wrong = 0;
    Rng rng;
    rng_seed(&rng, 1, 1);
    for (int i = 0; i < 50; i++) {
        int64_t begin = rng_below(&rng, n), count = i == 0 ? 0 : 1 + rng_below(&rng, n - begin);
        int a = i % 3;
        memset(read[a], 0, (size_t)n * sizeof(float));
        if (checkpoint_read_part(&k, &c, a, begin, count, read[a], msg) != 0) die("%s", msg);
        wrong += memcmp(read[a], saved[a] + begin, (size_t)count * sizeof(float)) != 0;
    }
    CHECK(wrong == 0, "%s: %lld parts differ", name, (long long)wrong);
    checkpoint_close(&k);
    flip(path, CHECKPOINT_HEADER_BYTES + 4 * stored + 5, 3);
    CHECK(checkpoint_verify(path, msg) != 0 && strstr(msg, "AdamW m"), "%s: %s", name, msg);
    if (checkpoint_open(&k, path, msg) != 0) die("%s", msg);
    CHECK(checkpoint_read_part(&k, &c, 1, 0, n, read[1], msg) != 0 && strstr(msg, "AdamW m"), "%s: %s", name,
          msg);
    checkpoint_close(&k);
    unlink(path);
    for (int a = 0; a < 3; a++) free(saved[a]), free(read[a]);
}

// Tests a checkpoint of weights alone, loaded into a model with another attention: common tensors are the
// file's, the others have initial values.
static void test_checkpoint_weights(int from, int to) {
    char folder[300], path[PATH_BYTES], msg[CHECKPOINT_MSG_BYTES];
    snprintf(folder, sizeof folder, "%s/weights", dir);
    checkpoint_dir_check(folder, 1);
    ModelConfig stored = preset_config("recall", 300), c = stored;
    stored.attn = from, c.attn = to;
    const ParamInit init = {1, {-2, 0, 2}};
    TrainState s, want = make_state(0);
    int64_t n, stored_n, wrong = 0, common = 0, count = param_table(&c, NULL, &n);
    int64_t stored_count = param_table(&stored, NULL, &stored_n);
    ParamTensor table[64], stored_table[64];
    param_table(&c, table, &n), param_table(&stored, stored_table, &stored_n);
    float *values = (float *)xmalloc((size_t)stored_n * sizeof *values);
    float *read = (float *)xmalloc((size_t)n * sizeof *read),
          *fresh = (float *)xmalloc((size_t)n * sizeof *fresh);
    for (int64_t i = 0; i < stored_n; i++) values[i] = (float)i;
    checkpoint_save(folder, &stored, &want, values, NULL, NULL, stored_n);
    checkpoint_path(path, sizeof path, folder, 0);
    struct stat st;
    CHECK(stat(path, &st) == 0 && st.st_size == checkpoint_bytes(stored_n, 1) && st.st_size < 5 * stored_n,
          "%lld bytes", (long long)st.st_size);
    CHECK(checkpoint_verify(path, msg) == 0, "%s", msg);
    checkpoint_load(path, &c, &init, &s, read, NULL, NULL, n);
    params_init(&c, fresh, &init);
    for (int64_t t = 0; t < count; t++) {
        const float *expected = fresh + table[t].offset;
        for (int64_t k = 0; k < stored_count; k++)
            if (strcmp(stored_table[k].name, table[t].name) == 0)
                expected = values + stored_table[k].offset, common++;
        wrong += memcmp(read + table[t].offset, expected, (size_t)table[t].size * sizeof *read) != 0;
    }
    const int64_t gates = 2 * 5; // wgate, bgate and phi's three of each layer
    CHECK(wrong == 0 && common == (to == ATTN_NSA && from != to ? count - gates : count),
          "%d to %d: %lld tensors differ, %lld in common", from, to, (long long)wrong, (long long)common);
    flip(path, checkpoint_bytes(stored_n, 1) - 1, 4);
    CHECK(checkpoint_verify(path, msg) != 0 && strstr(msg, "parameters"), "%s", msg);
    unlink(path);
    free(values), free(read), free(fresh);
}

static void test_checkpoint_folder(void) {
    char folder[300], path[PATH_BYTES], expected[PATH_BYTES];
    snprintf(folder, sizeof folder, "%s/folder", dir);
    CHECK(checkpoint_newest(folder, path) == 0, "no folder");
    checkpoint_dir_check(folder, 1);
    CHECK(checkpoint_newest(folder, path) == 0, "empty");
    make_file(folder, "ckpt_00000099.bin.tmp", "x");
    make_file(folder, "ckpt_1.bin", "x");
    make_file(folder, "ckpt_00000001.binx", "x");
    make_file(folder, "ckpt_0000001a.bin", "x");
    make_file(folder, "other.tmp", "x");
    CHECK(checkpoint_newest(folder, path) == 0, "other files");
    checkpoint_dir_check(folder, 0);
    CHECK(!exists(folder, "ckpt_00000099.bin.tmp"), "an unfinished checkpoint stays");
    CHECK(exists(folder, "other.tmp") && exists(folder, "ckpt_1.bin"), "other files are removed");
    const int64_t steps[] = {30, 10, 123456789, 20, 40};
    for (int i = 0; i < 5; i++) save(folder, steps[i]);
    CHECK(checkpoint_newest(folder, path) == 1, "newest");
    checkpoint_path(expected, sizeof expected, folder, 123456789);
    CHECK(strcmp(path, expected) == 0, "%s", path);
    Child r = child(run_dir_check_new, folder);
    check_died(&r, "a new run beside an old one", "123456789", "-y 1");
    r = child(run_dir_check_resume, folder);
    CHECK(r.code == 0, "%s", r.err);

    // the newest two are damaged: a flipped bit, a truncated file
    flip(path, CHECKPOINT_HEADER_BYTES + 8 * model_size, 1);
    checkpoint_path(path, sizeof path, folder, 40);
    if (truncate(path, 5000) != 0) die("truncate");
    checkpoint_path(expected, sizeof expected, folder, 30);
    r = child(run_newest, folder);
    CHECK(r.code == 0 && strcmp(r.out, expected) == 0, "%d %s %s", r.code, r.out, r.err);
    CHECK(count_lines(r.err) == 2 && strstr(r.err, "warning: ") &&
              strstr(r.err, "ckpt_00000040.bin: truncated") && strstr(r.err, "ckpt_123456789.bin: damaged"),
          "%s", r.err);

    // checkpoints of later steps do not count
    checkpoint_prune(folder, 2, 30, 1);
    CHECK(!exists(folder, "ckpt_00000010.bin") && exists(folder, "ckpt_00000020.bin") &&
              exists(folder, "ckpt_00000030.bin") && exists(folder, "ckpt_00000040.bin"),
          "prune");
    checkpoint_prune(folder, 1, 123456789, 1);
    CHECK(!exists(folder, "ckpt_00000020.bin") && !exists(folder, "ckpt_00000040.bin") &&
              exists(folder, "ckpt_123456789.bin") && exists(folder, "ckpt_1.bin"),
          "prune");
    r = child(run_newest, folder);
    CHECK(r.code == 1 && strstr(r.err, "error: ") && strstr(r.err, folder) && strstr(r.err, "none of its 1"),
          "%s", r.err);

    // more checkpoints than the initial capacity of the list; damaged ones do not count
    for (int i = 0; i < 40; i++) {
        char name[64];
        snprintf(name, sizeof name, "ckpt_%08d.bin", i * 7 % 40);
        make_file(folder, name, "x");
    }
    save(folder, 30), save(folder, 34), save(folder, 36), save(folder, 38);
    checkpoint_path(path, sizeof path, folder, 36);
    flip(path, CHECKPOINT_HEADER_BYTES + 4 * model_size, 2);
    checkpoint_prune(folder, 2, 38, 1);
    CHECK(exists(folder, "ckpt_00000038.bin") && exists(folder, "ckpt_00000036.bin") &&
              exists(folder, "ckpt_00000034.bin") && !exists(folder, "ckpt_00000033.bin") &&
              !exists(folder, "ckpt_00000030.bin") && !exists(folder, "ckpt_00000000.bin"),
          "prune many");
    // other processes wrote a part of the newest one
    save(folder, 50), save(folder, 51);
    checkpoint_path(path, sizeof path, folder, 51);
    flip(path, CHECKPOINT_HEADER_BYTES + 4 * model_size, 2);
    checkpoint_prune(folder, 1, 51, 0);
    CHECK(exists(folder, "ckpt_00000051.bin") && exists(folder, "ckpt_00000050.bin") &&
              !exists(folder, "ckpt_00000038.bin"),
          "the last intact checkpoint was removed");

    r = child(run_dir_check_new, (void *)"/dev/null/x");
    check_died(&r, "a file with the folder's name", "/dev/null", "folder");
    r = child(run_dir_check_new, (void *)"/proc/self");
    check_died(&r, "unwritable", "-o /proc/self", "cannot write to the folder");
}

// Writes checkpoints until killed, and keeps two.
static void run_saves(void *folder) {
    for (int64_t step = 1;; step++) {
        save((const char *)folder, step);
        checkpoint_prune((const char *)folder, 2, step, 1);
    }
}

static void test_kill(void) {
    char folder[300], path[PATH_BYTES], msg[CHECKPOINT_MSG_BYTES], tmp[64];
    Rng rng;
    rng_seed(&rng, (uint64_t)getpid(), 2);
    int unfinished = 0;
    for (int i = 0; i < 20; i++) {
        snprintf(folder, sizeof folder, "%s/kill%d", dir, i);
        checkpoint_dir_check(folder, 0);
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            run_saves(folder);
            _exit(0);
        }
        for (int wait = 0;
             wait < 5000 && !exists(folder, "ckpt_00000001.bin") && !exists(folder, "ckpt_00000002.bin");
             wait++)
            usleep(1000);
        usleep((useconds_t)rng_below(&rng, 60000));
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        TrainState s;
        memset(&s, 0, sizeof s);
        CHECK(checkpoint_newest(folder, path) == 1, "kill %d: no checkpoint", i);
        load(path, &s, 1);
        for (int a = 0; a < 3; a++)
            CHECK(num_wrong(a, s.step) == 0, "kill %d: step %lld", i, (long long)s.step);
        int64_t *steps, count = checkpoint_list(folder, &steps);
        for (int64_t k = 0; k < count; k++) {
            checkpoint_path(path, sizeof path, folder, steps[k]);
            CHECK(checkpoint_verify(path, msg) == 0, "%s", msg);
        }
        free(steps);
        CHECK(count >= 1 && count <= 3, "%lld checkpoints", (long long)count);
        snprintf(tmp, sizeof tmp, "ckpt_%08lld.bin.tmp", (long long)s.step + 1);
        unfinished += exists(folder, tmp);
        checkpoint_dir_check(folder, 1);
        CHECK(!exists(folder, tmp), "kill %d: %s stays", i, tmp);
        for (int64_t step = 0; step <= s.step; step++) {
            checkpoint_path(path, sizeof path, folder, step);
            unlink(path);
        }
    }
    CHECK(unfinished > 0, "no kill interrupted a write");
}

// ----------------------------------------------------------------------------
// Validation on several processes: the test calls run_validate for one rank after another

static char gathered[4][4096]; // what each rank has sent
static int own_rank;

void comm_allgather(Comm *c, const void *send, size_t bytes, void *recv) {
    memcpy(gathered[own_rank], send, bytes);
    for (int i = 0; i < c->ranks; i++) memcpy((char *)recv + bytes * (size_t)i, gathered[i], bytes);
}
void comm_broadcast(Comm *c, void *data, size_t bytes) {
    (void)c, (void)data, (void)bytes;
}
void comm_end(Comm *c) {
    (void)c;
}
const CommLauncher *comm_find_launcher(void) {
    return NULL;
}

// The loss of a token is the token.
static void evaluate_tokens(void *losses, const Run *r, const float **out, const int32_t **argmax) {
    for (int64_t i = 0; i < r->val.batch * r->val.seq_len; i++) ((float *)losses)[i] = (float)r->inputs[i];
    *out = (float *)losses, *argmax = r->inputs;
}

// Returns the validation loss of `ranks` processes with -m batches.
static double validate(const char *shard, int ranks, int64_t batches) {
    static Run r;
    float losses[2 * 3];
    double loss = 0;
    fflush(stdout);
    int console = dup(1), null = open("/dev/null", O_WRONLY); // "val loss" lines are not wanted here
    dup2(null, 1);
    for (own_rank = ranks - 1; own_rank >= 0; own_rank--) { // rank 0 is last, and gets the others' counts
        memset(&r, 0, sizeof r);
        r.opt.val_batches = batches, r.opt.cp_size = 1, r.eot = -1;
        r.config.vocab_size = 100, r.comm.ranks = r.dp_size = ranks, r.comm.rank = r.dp_rank = own_rank;
        loader_open(&r.val, shard, 2, 3, 100, 0, 1, own_rank, ranks);
        r.inputs = (int32_t *)xcalloc(6, 4), r.targets = (int32_t *)xcalloc(6, 4);
        r.cu_seqlens = (int64_t *)xcalloc(7, 8);
        loss = run_validate(&r, evaluate_tokens, losses);
        loader_close(&r.val);
        free(r.inputs), free(r.targets), free(r.cu_seqlens);
    }
    fflush(stdout);
    dup2(console, 1);
    close(console), close(null);
    return loss;
}

static void test_validate(void) {
    char path[300];
    ShardWriter w;
    int32_t tokens[44]; // 11 samples of 3 + 1 tokens
    snprintf(path, sizeof path, "%s/val.bin", dir);
    for (int i = 0; i < 44; i++) tokens[i] = i / 4 * 7 % 10;
    shard_writer_open(&w, path, 100);
    shard_writer_add(&w, tokens, 44);
    shard_writer_commit(&w);
    for (int batches = 0; batches <= 7; batches++) {
        int rows = batches == 0 || batches > 5 ? 11 : 2 * batches;
        double want = 0;
        for (int i = 0; i < rows; i++) want += i * 7 % 10;
        for (int ranks = 1; ranks <= 4; ranks++) {
            double loss = validate(path, ranks, batches);
            CHECK(fabs(loss - want / rows) < 1e-12, "-m %d, %d processes: %g, not %g", batches, ranks, loss,
                  want / rows);
        }
    }
}

// ----------------------------------------------------------------------------
// Text generation

// A case of run_sample: the prompt, the tokens that the model prefers in this order, and what is printed.
typedef struct {
    const char *prompt;
    int32_t bos;
    int32_t next[4];
    const char *tokens; // that the model gets first
    const char *text;
    int64_t calls; // so many tokens are generated, the last one of which may end the text
} SampleCase;

// The logits of a model that prefers `next`. It prefers the tokens that the tokenizer lacks even more.
static const float *prefer_next(void *model, const int32_t *tokens, int64_t n) {
    static float logits[SP_VOCAB + 8];
    SampleCase *c = (SampleCase *)model;
    fprintf(stderr, c->calls == 0 ? "tokens:" : "");
    for (int64_t i = 0; c->calls == 0 && i < n; i++) fprintf(stderr, " %d", tokens[i]);
    for (int i = 0; i < SP_VOCAB + 8; i++) logits[i] = i < SP_VOCAB ? 0.0f : 9.0f;
    logits[c->next[c->calls++ & 3]] = 5;
    return logits;
}

static void run_sample_case(void *argument) {
    static Run r;
    SampleCase c = *(SampleCase *)argument;
    memset(&r, 0, sizeof r);
    snprintf(r.tokenizer_path, sizeof r.tokenizer_path, "%s/tokenizer.bin", dir);
    r.has_tokenizer = tokenizer_load(&r.tokenizer, r.tokenizer_path) == 0;
    r.tokenizer.bos = c.bos;
    r.eot = r.tokenizer.eot;
    r.config.vocab_size = SP_VOCAB + 8;
    r.sample_context = 8;
    r.opt.prompt = c.prompt, r.opt.generate = 4, r.opt.top_p = 1;
    c.calls = 0;
    run_sample(&r, prefer_next, &c);
    fprintf(stderr, " calls: %lld", (long long)c.calls);
}

static void test_sample(void) {
    const SampleCase cases[] = {
        {"hello", SP_BOS, {SP__HELLO, SP_L, SP_EOS}, "1 268", "sample: hello hellol\n", 3},
        {"hello", -1, {SP__HELLO, SP_L, SP_USER}, "268", "sample: hello hellol\n", 3}, // a second EOS
        {"<s>hello", SP_BOS, {SP_EOS}, "1 268", "sample: <s> hello\n", 1},             // only one BOS
        {"<|a|>h", SP_BOS, {SP_L, SP_L, SP_L, SP_L}, "1 271 258 259", "sample: <|a|> hllll\n", 4},
        {"", SP_BOS, {SP__HELLO, SP_EOS}, "1", "sample: hello\n", 2},
        {"", -1, {SP__HELLO, SP_EOS}, "2", "sample: hello\n", 2}, // behind end-of-text
    };
    char path[300], wanted[64];
    snprintf(path, sizeof path, "%s/tokenizer.bin", dir);
    write_sentencepiece(path, PREFIX_ALWAYS, 0, SP_UNKNOWN);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Child c = child(run_sample_case, (void *)&cases[i]);
        snprintf(wanted, sizeof wanted, "tokens: %s calls: %lld", cases[i].tokens, (long long)cases[i].calls);
        CHECK(c.code == 0 && !strcmp(c.out, cases[i].text) && !strcmp(c.err, wanted),
              "prompt '%s': '%s' and '%s', expected '%s' and '%s'", cases[i].prompt, c.out, c.err,
              cases[i].text, wanted);
    }
    const SampleCase longer = {"<|a|><|a|><|a|><|a|><|a|><|a|><|a|><|a|>", SP_BOS, {0}, "", "", 0};
    Child c = child(run_sample_case, (void *)&longer);
    check_died(&c, "a long prompt", "-prompt: 8 tokens", "context of 8 has space for 6");
}

// ----------------------------------------------------------------------------
// Runs without a model: run_start sets them up from a command line, and the test calls the parts of a
// step

// Writes the shard `name` of n tokens in the folder of these runs, and answers [count] beside it.
static void make_shard(const char *name, int vocab, const int32_t *tokens, int64_t n, const Answer *answers,
                       int64_t count) {
    char path[300];
    ShardWriter w;
    snprintf(path, sizeof path, "%s/run", dir);
    make_dirs(path);
    snprintf(path, sizeof path, "%s/run/%s", dir, name);
    shard_writer_open(&w, path, vocab);
    shard_writer_add(&w, tokens, n);
    shard_writer_commit(&w);
    if (count == 0) return;
    Answers a = {count, 7, (Answer *)xmalloc((size_t)count * sizeof *answers)};
    memcpy(a.answers, answers, (size_t)count * sizeof *answers);
    answers_save(&a, path);
    answers_free(&a);
}

// Sets up a run in a child process. Paths are relative to the folder of these runs.
static Run *start(const char *line) {
    static Run r;
    static char text[1024], *argv[60];
    int argc = 1;
    if (chdir(dir) != 0 || chdir("run") != 0) die("cannot change to %s/run: %s", dir, strerror(errno));
    snprintf(text, sizeof text, "%s", line);
    own_rank = 0;
    argv[0] = (char *)"trainer";
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    run_start(&r, argc, argv);
    return &r;
}

// Prints where the sequences of the first batch of validation data begin.
static void run_documents(void *line) {
    Run *r = start((const char *)line);
    run_load_batch(r, &r->val);
    for (int64_t i = 0; i <= r->num_seqs; i++) printf("%lld ", (long long)r->cu_seqlens[i]);
}

// Tests that attention stays within documents, which begin with the tokenizer's end-of-text token, or
// without a tokenizer with the last token of the vocabulary.
static void test_documents(void) {
    const int32_t last[] = {1, 99, 2, 3, 99, 4, 5, 99}, first[] = {1, 0, 2, 3, 0, 4, 5, 0};
    const char *pieces[6] = {"<|end|>", "a", "b", "c", "d", "e"};
    const int lengths[6] = {7, 1, 1, 1, 1, 1};
    char path[300];
    make_shard("last.bin", 100, last, 8, NULL, 0);
    snprintf(path, sizeof path, "%s/run/words", dir);
    make_dirs(path);
    make_shard("words/first.bin", 6, first, 8, NULL, 0);
    snprintf(path, sizeof path, "%s/run/words/tokenizer.bin", dir);
    tokenizer_write(path, TOKENIZER_WORDS, 6, 0, pieces, lengths, NULL);
    static const char *const cases[][2] = {
        {"-e recall -t 3 -b 2 -x 1 -vocab 100 -i last.bin -j last.bin", "0 1 3 6 "},
        {"-e recall -t 3 -b 2 -x 1 -vocab 100 -i last.bin -j last.bin -doc-mask 0", "0 3 6 "},
        {"-e recall -t 3 -b 2 -x 1 -i words/first.bin -j words/first.bin", "0 1 3 6 "},
        {"-e recall -t 3 -b 2 -x 1 -i words/first.bin -j words/first.bin -doc-mask 0", "0 3 6 "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Child r = child(run_documents, (void *)cases[i][0]);
        CHECK(r.code == 0 && strcmp(r.out, cases[i][1]) == 0, "%s: '%s', not '%s' %s", cases[i][0], r.out,
              cases[i][1], r.err);
    }
}

// Tokens below 50 are predicted, others are not.
static void evaluate_below_50(void *losses, const Run *r, const float **out, const int32_t **argmax) {
    static int32_t predicted[64];
    for (int64_t i = 0; i < r->val.batch * r->val.seq_len; i++)
        predicted[i] = r->targets[i] < 50 ? r->targets[i] : 0, ((float *)losses)[i] = (float)r->inputs[i];
    *out = (float *)losses, *argmax = predicted;
}

// Validates twice, which must give the same.
static void run_recall(void *line) {
    Run *r = start((const char *)line);
    float losses[64];
    for (int i = 0; i < 2; i++) run_validate(r, evaluate_below_50, losses);
}

// Tests the losses and the recall accuracy of two shards with 3 and 2 samples of 8 tokens.
static void test_recall_accuracy(void) {
    // {index, distance}; a sample's first token is not predicted, so it does not count
    static const Answer a0[] = {{3, 1}, {5, 2}, {7, 3}, {12, 4}, {15, 7}, {16, 8}, {20, 8}},
                        a1[] = {{1, 1}, {9, 8}};
    static const int32_t right0[] = {10, 11, 70, 10, 12, 80, 71}, right1[] = {70, 13}; // the answers' tokens
    int32_t tokens0[24], tokens1[16];
    for (int i = 0; i < 24; i++) tokens0[i] = 60;
    for (int i = 0; i < 16; i++) tokens1[i] = 61;
    for (int i = 0; i < 7; i++) tokens0[a0[i].index] = right0[i];
    for (int i = 0; i < 2; i++) tokens1[a1[i].index] = right1[i];
    make_shard("recall_0.bin", 100, tokens0, 24, a0, 7);
    make_shard("recall_1.bin", 100, tokens1, 16, a1, 2);
    // 4 distinct answers: 10, 11, 70, 12. The facts of 71 and 13 are before their samples, so these do not
    // count.
    static const char *const cases[][2] = {
        {"-e recall -t 7 -b 2 -x 1 -vocab 100 -m 0 -i last.bin -j recall_*.bin",
         "recall by distance at step 0 (chance 25.0%): | 1+: 50.0% of 2 | 2+: 50.0% of 2 | 4+: 100.0% of "
         "2\n"},
        {"-e recall -t 7 -b 2 -x 1 -vocab 100 -m 1 -i last.bin -j recall_*.bin",
         "recall by distance at step 0 (chance 25.0%): | 1+: 100.0% of 1 | 2+: 50.0% of 2 | 4+: 100.0% "
         "of "
         "2\n"},
    };
    for (int i = 0; i < 2; i++) {
        double sum = 0;
        int rows = i == 0 ? 5 : 2;
        for (int row = 0; row < rows; row++)
            for (int t = 0; t < 7; t++) sum += row < 3 ? tokens0[8 * row + t] : tokens1[8 * (row - 3) + t];
        const double loss = sum / (7 * rows);
        char once[512], want[1024];
        snprintf(once, sizeof once, "val loss %.6f | perplexity %.6g | %d tokens | step 0\n%s", loss,
                 exp(loss), 7 * rows, cases[i][1]);
        snprintf(want, sizeof want, "%s%s", once, once);
        Child r = child(run_recall, (void *)cases[i][0]);
        CHECK(r.code == 0 && strcmp(r.out, want) == 0, "'%s', not '%s' %s", r.out, want, r.err);
    }
}

enum { POSITION_SAMPLES = 3, POSITION_CONTEXT = 300 };
static int32_t position_tokens[POSITION_SAMPLES * (POSITION_CONTEXT + 1)];

// The loss of a prediction is its place in the sample. Fills in a batch of one sequence.
static void evaluate_places(void *losses, const Run *r, const float **out, const int32_t **argmax) {
    for (int64_t i = 0; i < r->val.seq_len; i++) ((float *)losses)[i] = (float)i;
    *out = (float *)losses, *argmax = r->inputs;
}

// Validates with `ranks` processes, a sample each at a time, and the documents of doc_mask.
static void run_positions(void *argument) {
    static Run r;
    static float losses[POSITION_CONTEXT];
    const int ranks = ((const int *)argument)[0], doc_mask = ((const int *)argument)[1];
    char path[300];
    snprintf(path, sizeof path, "%s/run/positions.bin", dir);
    for (own_rank = ranks - 1; own_rank >= 0; own_rank--) { // rank 0 is last, and gets the others' counts
        memset(&r, 0, sizeof r);
        r.opt.cp_size = 1, r.opt.doc_mask = doc_mask, r.eot = 99;
        r.config.vocab_size = 100, r.comm.ranks = r.dp_size = ranks, r.comm.rank = r.dp_rank = own_rank;
        if (own_rank == 0) logger_open(&r.log, dir, -1);
        loader_open(&r.val, path, 1, POSITION_CONTEXT, 100, 0, 1, own_rank, ranks);
        r.inputs = (int32_t *)xcalloc(POSITION_CONTEXT, 4),
        r.targets = (int32_t *)xcalloc(POSITION_CONTEXT, 4);
        r.cu_seqlens = (int64_t *)xcalloc(POSITION_CONTEXT + 1, 8);
        run_validate(&r, evaluate_places, losses);
    }
    logger_close(&r.log);
}

// Tests the loss by position with 1 and 2 processes, with and without document boundaries.
static void test_position_loss(void) {
    const int n = POSITION_SAMPLES * (POSITION_CONTEXT + 1);
    for (int i = 0; i < n; i++) position_tokens[i] = i % 50;
    // the second sample begins within the first one's last document; the third one has two more boundaries
    position_tokens[0] = position_tokens[20] = position_tokens[170] = 99;
    position_tokens[602 + 10] = position_tokens[602 + 11] = 99;
    make_shard("positions.bin", 100, position_tokens, n, NULL, 0);
    for (int doc_mask = 0; doc_mask <= 1; doc_mask++) {
        double sums[3] = {0, 0, 0};
        int64_t counts[3] = {0, 0, 0};
        for (int sample = 0; sample < POSITION_SAMPLES; sample++) {
            for (int t = 0, start = 0; t < POSITION_CONTEXT; t++) {
                if (doc_mask && position_tokens[sample * (POSITION_CONTEXT + 1) + t] == 99) start = t;
                const int bucket = t - start < 128 ? 0 : t - start < 256 ? 1 : 2;
                sums[bucket] += t, counts[bucket]++;
            }
        }
        char line[256], log[400], text[65536], path[300];
        snprintf(line, sizeof line,
                 "loss by position at step 0: | 0+: %.4f of %lld | 128+: %.4f of %lld | 256+: %.4f of %lld\n",
                 sums[0] / counts[0], (long long)counts[0], sums[1] / counts[1], (long long)counts[1],
                 sums[2] / counts[2], (long long)counts[2]);
        snprintf(
            log, sizeof log,
            "{\"step\":0,\"tokens\":0,\"position_loss\":[{\"from\":0,\"tokens\":%lld,\"loss\":%.9g},"
            "{\"from\":128,\"tokens\":%lld,\"loss\":%.9g},{\"from\":256,\"tokens\":%lld,\"loss\":%.9g}]}\n",
            (long long)counts[0], sums[0] / counts[0], (long long)counts[1], sums[1] / counts[1],
            (long long)counts[2], sums[2] / counts[2]);
        for (int ranks = 1; ranks <= 2; ranks++) {
            const int argument[2] = {ranks, doc_mask};
            Child r = child(run_positions, (void *)argument);
            snprintf(path, sizeof path, "%s/log.jsonl", dir);
            read_text(path, text, sizeof text);
            CHECK(r.code == 0 && strstr(r.out, line), "%d processes: '%s', not '%s' %s", ranks, r.out, line,
                  r.err);
            CHECK(strstr(text, log), "%d processes: the log has '%s', not '%s'", ranks, text, log);
        }
    }
}

// Adds the gates of two tokens in each layer, whose logits are made from the batch's first token and the
// layer. The processes of a -cp group share them.
static void evaluate_gates(void *losses, const Run *r, const float **out, const int32_t **argmax) {
    for (int l = 0; r->gates && l < r->config.layers; l++) {
        const float first = (float)r->inputs[0] / 10, logits[6] = {first, -first, (float)l, 0, 1, -1};
        const int cp_size = (int)r->opt.cp_size;
        gate_sums_add(&r->gates[l], logits + 3 * (r->comm.rank % cp_size), 2 / cp_size);
    }
    *out = (float *)losses, *argmax = r->inputs;
}

// Validates with `ranks` processes in groups of cp_size, batches of 2 samples of 3 tokens.
static void run_gates(void *argument) {
    static Run r;
    static float losses[6];
    const int ranks = ((const int *)argument)[0], cp_size = ((const int *)argument)[1];
    char path[300];
    snprintf(path, sizeof path, "%s/run/gates.bin", dir);
    for (own_rank = ranks - 1; own_rank >= 0; own_rank--) {
        memset(&r, 0, sizeof r);
        r.opt.cp_size = cp_size, r.eot = -1, r.config.attn = ATTN_NSA, r.config.layers = 2;
        r.config.vocab_size = 100, r.comm.ranks = ranks, r.comm.rank = own_rank;
        r.dp_size = ranks / cp_size, r.dp_rank = own_rank / cp_size;
        if (own_rank == 0) logger_open(&r.log, dir, -1);
        loader_open(&r.val, path, 2, 3, 100, 0, 1, r.dp_rank, r.dp_size);
        r.inputs = (int32_t *)xcalloc(6, 4), r.targets = (int32_t *)xcalloc(6, 4);
        r.cu_seqlens = (int64_t *)xcalloc(7, 8);
        run_validate(&r, evaluate_gates, losses);
    }
    logger_close(&r.log);
}

// Tests the mean gates of 5 samples, the last of which is in a batch that is not full and does not count.
static void test_gates(void) {
    int32_t tokens[20];
    double means[2][3], all[3];
    for (int i = 0; i < 20; i++) tokens[i] = i * 3 % 50;
    make_shard("gates.bin", 100, tokens, 20, NULL, 0);
    for (int l = 0; l < 2; l++) {
        for (int b = 0; b < 3; b++) means[l][b] = 0;
        for (int batch = 0; batch < 2; batch++) {
            const double first = (float)tokens[8 * batch] / 10, logits[6] = {first, -first, l, 0, 1, -1};
            for (int i = 0; i < 6; i++) means[l][i % 3] += 1 / (1 + exp(-(double)(float)logits[i])) / 4;
        }
    }
    for (int b = 0; b < 3; b++) all[b] = (means[0][b] + means[1][b]) / 2;
    char want[128], log[256], text[65536], path[300];
    snprintf(want, sizeof want, "mean gates at step 0: compressed %.4f | selected %.4f | sliding %.4f\n",
             all[0], all[1], all[2]);
    snprintf(log, sizeof log, "\"gates\":[[%.6f,%.6f,%.6f],[%.6f,%.6f,%.6f]]}\n", means[0][0], means[0][1],
             means[0][2], means[1][0], means[1][1], means[1][2]);
    static const int cases[][2] = {{1, 1}, {2, 1}, {2, 2}, {4, 2}};
    for (int i = 0; i < 4; i++) {
        Child r = child(run_gates, (void *)cases[i]);
        CHECK(r.code == 0 && strstr(r.out, want), "%d processes, -cp %d: '%s' %s, not '%s'", cases[i][0],
              cases[i][1], r.out, r.err, want);
        snprintf(path, sizeof path, "%s/log.jsonl", dir);
        read_text(path, text, sizeof text);
        const char *line = strstr(text, "\"gates\":");
        double got[6];
        const int n = line ? sscanf(line, "\"gates\":[[%lf,%lf,%lf],[%lf,%lf,%lf]]}", got, got + 1, got + 2,
                                    got + 3, got + 4, got + 5)
                           : 0;
        for (int k = 0; k < 6; k++)
            CHECK(n == 6 && fabs(got[k] - means[k / 3][k % 3]) < 1e-6, "the log: %s, not %s", text, log);
    }
}

// ----------------------------------------------------------------------------
// Evaluation files. The test's model has a loss and a prediction for each token that are made from all tokens
// of its sequence before it.

enum { EVAL_EXAMPLES = 9, EVAL_CHOICES = 4, EVAL_LONGEST = 24, EVAL_VOCAB = 100 };

// An example of the test: the context, and choices behind it.
typedef struct {
    int context, choices, label, depth, lengths[EVAL_CHOICES];
    int32_t tokens[EVAL_LONGEST], choice_tokens[EVAL_CHOICES][EVAL_LONGEST];
} TestExample;

static TestExample examples[EVAL_EXAMPLES];

// Returns the test model's loss of `target` behind tokens [n], and its prediction in *predicted.
static float model_of_prefix(const int32_t *tokens, int64_t n, int32_t target, int32_t *predicted) {
    uint64_t hash = checksum(tokens, (size_t)n * sizeof *tokens, (uint64_t)target + 1);
    *predicted = hash % 4 ? target : (target + 1) % EVAL_VOCAB;
    return (float)(hash % 1000) / 100;
}

static void evaluate_prefixes(void *unused, const Run *r, const float **losses, const int32_t **argmax) {
    static float loss[256];
    static int32_t predicted[256];
    (void)unused;
    if (r->cu_seqlens[r->num_seqs] != r->opt.batch * r->opt.seq_len) die("the batch is not full");
    for (int64_t s = 0; s < r->num_seqs; s++)
        for (int64_t t = r->cu_seqlens[s]; t < r->cu_seqlens[s + 1]; t++)
            loss[t] = model_of_prefix(r->inputs + r->cu_seqlens[s], t + 1 - r->cu_seqlens[s], r->targets[t],
                                      &predicted[t]);
    *losses = loss, *argmax = predicted;
}

// The sum of the losses of choice i of an example, whose context and choice have at most seq_len + 1 tokens.
static double loss_of_choice(const TestExample *e, int i, int seq_len, int *greedy) {
    int32_t tokens[2 * EVAL_LONGEST], predicted;
    const int n = e->context + e->lengths[i], first = n > seq_len + 1 ? n - seq_len - 1 : 0;
    double loss = 0;
    memcpy(tokens, e->tokens, (size_t)e->context * sizeof *tokens);
    memcpy(tokens + e->context, e->choice_tokens[i], (size_t)e->lengths[i] * sizeof *tokens);
    *greedy = 1;
    for (int t = e->context; t < n; t++) {
        loss += model_of_prefix(tokens + first, t - first, tokens[t], &predicted);
        *greedy &= predicted == tokens[t];
    }
    return loss;
}

// Writes the examples: `file` of our format, kind 0 or 1, or llm.c's.
static void write_eval_file(const char *file, int llmc, int kind) {
    static int32_t values[8192];
    int32_t header[256] = {EVAL_MAGIC, 1, kind, EVAL_EXAMPLES, EVAL_VOCAB, 3},
            llmc_header[256] = {EVAL_LLMC_MAGIC, 1, EVAL_EXAMPLES};
    char path[300];
    int n = 0;
    for (int i = 0; i < EVAL_EXAMPLES; i++) {
        const TestExample *e = &examples[i];
        const int begin = n, choices = kind == EVAL_NEEDLE ? 1 : e->choices;
        if (llmc) values[n++] = 65535, values[n++] = 0, values[n++] = i;
        values[n++] = kind == EVAL_NEEDLE ? 0 : e->label, values[n++] = choices;
        if (!llmc) values[n++] = e->depth;
        values[n++] = e->context;
        for (int t = 0; t < e->context; t++) values[n++] = e->tokens[t];
        for (int c = 0; c < choices; c++) {
            if (!llmc) values[n++] = 3 * c + 1; // its length in characters
            values[n++] = e->lengths[c];
            for (int t = 0; t < e->lengths[c]; t++) values[n++] = e->choice_tokens[c][t];
        }
        if (llmc) values[begin + 1] = 2 * (n - begin);
    }
    snprintf(path, sizeof path, "%s/run/%s", dir, file);
    FILE *f = fopen(path, "wb");
    if (!f) die("cannot write %s", path);
    fwrite(llmc ? llmc_header : header, 1024, 1, f);
    for (int i = 0; i < n; i++) fwrite(&values[i], llmc ? 2 : 4, 1, f); // little-endian
    fclose(f);
}

// Copies a file of these runs, with its 32-bit word number `word` replaced, and cut to `bytes` (-1: whole).
static void damage_eval_file(const char *from, const char *to, int word, int32_t value, long bytes) {
    static char data[65536];
    char path[300];
    snprintf(path, sizeof path, "%s/run/%s", dir, from);
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(data, 1, sizeof data, f) : 0;
    if (f) fclose(f);
    memcpy(data + 4 * word, &value, 4);
    snprintf(path, sizeof path, "%s/run/%s", dir, to);
    f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes >= 0 ? (size_t)bytes : n, f) == 0) die("cannot write %s", path);
    fclose(f);
}

// Evaluates as one process of several. The argument: their number, and the command line.
typedef struct {
    int ranks;
    const char *line;
} EvalCase;

static void run_evaluations(void *argument) {
    const EvalCase *c = (const EvalCase *)argument;
    Run *r = start(c->line);
    r->comm.ranks = r->dp_size = c->ranks;
    memset(gathered, 0, sizeof gathered);
    for (own_rank = c->ranks - 1; own_rank >= 0; own_rank--) { // rank 0 is last, and gets the others' results
        r->comm.rank = r->dp_rank = own_rank;
        if (own_rank > 0 && !freopen("/dev/null", "w", stdout)) die("cannot open /dev/null");
        if (own_rank == 0 && c->ranks > 1) stdout = stderr;
        run_validate(r, evaluate_prefixes, NULL);
    }
    r->comm.ranks = 1;
}

static void run_start_only(void *line) {
    start((const char *)line);
}

static void make_examples(void) {
    Rng rng;
    rng_seed(&rng, 7, 7);
    for (int i = 0; i < EVAL_EXAMPLES; i++) {
        TestExample *e = &examples[i];
        e->context = 1 + (int)rng_below(&rng, EVAL_LONGEST), e->choices = 2 + (int)rng_below(&rng, 3);
        e->label = (int)rng_below(&rng, e->choices), e->depth = i % 2 ? 500 : 1000;
        for (int t = 0; t < e->context; t++) e->tokens[t] = (int32_t)rng_below(&rng, EVAL_VOCAB);
        for (int c = 0; c < e->choices; c++) {
            e->lengths[c] = 1 + (int)rng_below(&rng, 6);
            for (int t = 0; t < e->lengths[c]; t++)
                e->choice_tokens[c][t] = (int32_t)rng_below(&rng, EVAL_VOCAB);
        }
        if (i < EVAL_EXAMPLES / 2)
            e->context = 9 - i % 2, e->lengths[0] = i % 2 + 1; // the same length in sum
    }
}

// Tests the answers to files of both formats and to needles, with 1 to 3 processes, and contexts that are
// cut.
static void test_evaluations(void) {
    make_examples();
    write_eval_file("a.bin", 0, EVAL_CHOICE), write_eval_file("llmc.bin", 1, EVAL_CHOICE);
    write_eval_file("n.bin", 0, EVAL_NEEDLE);
    for (int seq_len = 12; seq_len <= 32; seq_len += 20) {
        double chance = 0;
        int right = 0, right_normalized[2] = {0, 0}, cut = 0, all = 0, greedy;
        for (int i = 0; i < EVAL_EXAMPLES; i++) {
            const TestExample *e = &examples[i];
            int best[3] = {0, 0, 0}; // by loss, by loss per character, per token
            double lowest[3] = {INFINITY, INFINITY, INFINITY};
            for (int c = 0; c < e->choices; c++) {
                const double loss = loss_of_choice(e, c, seq_len, &greedy);
                const double losses[3] = {loss, loss / (3 * c + 1), loss / e->lengths[c]};
                for (int k = 0; k < 3; k++)
                    if (losses[k] < lowest[k]) lowest[k] = losses[k], best[k] = c;
                cut += e->context + e->lengths[c] - 1 > seq_len, all++;
            }
            right += best[0] == e->label, chance += 100.0 / e->choices / EVAL_EXAMPLES;
            for (int k = 0; k < 2; k++) right_normalized[k] += best[k + 1] == e->label;
        }
        for (int k = 0; k < 2; k++) {
            static const char *const flags[] = {"-hellaswag llmc.bin", "-mc [a].bin"};
            char want[512], line[256];
            snprintf(want, sizeof want,
                     "%s: %d of 9 right, %.2f%% | by loss per %s %d, %.2f%% | chance %.1f%% | step 0\n",
                     k ? "a" : "llmc", right, 100.0 * right / 9, k ? "character" : "token",
                     right_normalized[!k], 100.0 * right_normalized[!k] / 9, chance);
            snprintf(line, sizeof line, "-e recall -t %d -b 2 -x 1 -vocab 100 -i positions.bin %s", seq_len,
                     flags[k]);
            for (int ranks = 1; ranks <= 3; ranks++) {
                const EvalCase c = {ranks, line};
                Child r = child(run_evaluations, (void *)&c);
                CHECK(r.code == 0 && strstr(ranks > 1 ? r.err : r.out, want),
                      "%s, %d processes: '%s' '%s', not '%s'", line, ranks, r.out, r.err, want);
                if (ranks > 1) continue;
                char note[128];
                snprintf(note, sizeof note, "%d of %d choices need more than -t %d;", cut, all, seq_len);
                CHECK(cut ? strstr(r.err, note) != NULL : r.err[0] == '\0', "'%s', not '%s'", r.err, note);
            }
        }
    }
    CHECK(examples[0].context + examples[0].lengths[0] == 10, "needles of the same length");
    int asked[64][2], right[64][2], asked_of[64], right_of[64];
    memset(asked, 0, sizeof asked), memset(right, 0, sizeof right);
    memset(asked_of, 0, sizeof asked_of), memset(right_of, 0, sizeof right_of);
    for (int i = 0; i < EVAL_EXAMPLES; i++) {
        int greedy, length = examples[i].context + examples[i].lengths[0], deep = examples[i].depth == 1000;
        loss_of_choice(&examples[i], 0, 32, &greedy);
        asked[length][deep]++, right[length][deep] += greedy, asked_of[length]++, right_of[length] += greedy;
    }
    char want[1024] = "n by length at step 0 (keys: 3):",
         log[2048] = "\"needle\":\"n\",\"keys\":3,\"cells\":[";
    for (int i = 0, first = 1; i < 64; i++) {
        if (!asked_of[i]) continue;
        snprintf(want + strlen(want), 64, " | %d: %.1f%% of %d", i, 100.0 * right_of[i] / asked_of[i],
                 asked_of[i]);
        for (int deep = 0; deep < 2; deep++) {
            if (!asked[i][deep]) continue;
            snprintf(log + strlen(log), 128, "%s{\"length\":%d,\"depth\":%s,\"asked\":%d,\"right\":%d}",
                     first ? "" : ",", i, deep ? "1.000" : "0.500", asked[i][deep], right[i][deep]);
            first = 0;
        }
    }
    const EvalCase needle = {
        1, "-e recall -t 32 -b 1 -x 1 -vocab 100 -i positions.bin -needle n.bin -o needle_log"};
    Child r = child(run_evaluations, (void *)&needle);
    CHECK(r.code == 0 && strstr(r.out, want), "'%s' '%s', not '%s'", r.out, r.err, want);
    static char text[65536];
    char path[300];
    snprintf(path, sizeof path, "%s/run/needle_log/log.jsonl", dir);
    read_text(path, text, sizeof text);
    CHECK(strstr(text, log), "the log: '%s', not '%s'", text, log);
}

// Tests that damaged and unfit files end with one line.
static void test_bad_evaluations(void) {
    const int context = 256 + 4, token = 256 + 4 + examples[0].context; // words of the first example
    damage_eval_file("a.bin", "bad_magic.bin", 0, 5, -1);
    damage_eval_file("a.bin", "bad_version.bin", 1, 2, -1);
    damage_eval_file("a.bin", "bad_count.bin", 3, 1 << 30, -1);
    damage_eval_file("a.bin", "bad_zero.bin", 3, 0, -1);
    damage_eval_file("a.bin", "bad_more.bin", 3, EVAL_EXAMPLES + 1, -1);
    damage_eval_file("a.bin", "bad_fewer.bin", 3, EVAL_EXAMPLES - 1, -1);
    damage_eval_file("a.bin", "bad_vocabulary.bin", 4, 5, -1);
    damage_eval_file("a.bin", "bad_label.bin", 256, 4, -1);
    damage_eval_file("a.bin", "bad_choices.bin", 257, 1, -1);
    damage_eval_file("a.bin", "bad_depth.bin", 258, 1001, -1);
    damage_eval_file("a.bin", "bad_context.bin", context - 1, 0, -1);
    damage_eval_file("a.bin", "bad_token.bin", context, 100, -1);
    damage_eval_file("a.bin", "bad_length.bin", token, 0, -1);
    damage_eval_file("a.bin", "bad_huge.bin", token + 1, INT32_MAX, -1);
    damage_eval_file("a.bin", "bad_cut.bin", 0, EVAL_MAGIC, 1024 + 4 * 20);
    damage_eval_file("a.bin", "bad_odd.bin", 0, EVAL_MAGIC, 1024 + 4 * 20 + 1);
    damage_eval_file("a.bin", "bad_header.bin", 0, EVAL_MAGIC, 500);
    damage_eval_file("a.bin", "other.bin", 6, 5, -1);
    damage_eval_file("n.bin", "other_n.bin", 6, 5, -1);
    damage_eval_file("llmc.bin", "other_llmc.bin", 6, 5, -1);
    damage_eval_file("llmc.bin", "bad_start.bin", 256, 7, -1);
    damage_eval_file("llmc.bin", "bad_bytes.bin", 256, 65535 | 6 << 16, -1);
    static const char *const bad[][3] = {
        {"-mc bad_magic.bin", "-mc bad_magic.bin: not an evaluation file", "data/hellaswag"},
        {"-hellaswag bad_version.bin", "version 2 found, 1 expected", ""},
        {"-mc bad_count.bin", "invalid: 1073741824 examples", ""},
        {"-mc bad_zero.bin", "invalid: 0 examples", ""},
        {"-mc bad_more.bin", "truncated in example 9", ""},
        {"-mc bad_fewer.bin", "values behind its last example", ""},
        {"-mc bad_label.bin", "choice 4 is right, but there are", ""},
        {"-mc bad_choices.bin", "example 0: the number of choices is 1", "from 2"},
        {"-mc bad_depth.bin", "the depth is 1001", "from 0 to 1000"},
        {"-mc bad_context.bin", "the context's number of tokens is 0", ""},
        {"-mc bad_token.bin", "example 0: a token is 100", "from 0 to 99"},
        {"-mc bad_length.bin", "the length of a choice is 0", ""},
        {"-mc bad_huge.bin", "bad_huge.bin", "make"},
        {"-mc bad_cut.bin", "truncated in example", ""},
        {"-mc bad_odd.bin", "invalid: 9 examples in 81 bytes", ""},
        {"-mc bad_header.bin", "not an evaluation file", ""},
        {"-mc bad_start.bin", "its first value is 7", ""},
        {"-mc bad_bytes.bin", "example 0: has ", "bytes, not 6"},
        {"-mc positions.bin", "positions.bin: not an evaluation file", ""},
        {"-mc nothing*.bin", "-mc nothing*.bin: no such file", "data/mc"},
        {"-needle nothing.bin", "-needle nothing.bin: no such file", "data/needle"},
        {"-needle a.bin", "-needle a.bin: a file for -mc", ""},
        {"-hellaswag n.bin", "-hellaswag n.bin: a file for -needle", ""},
        {"-needle n.bin -t 8", "tokens, but the context has 8; raise -t", ""},
        {"-mc a.bin -t 3", "tokens, but the context has 3; raise -t", ""},
        {"-mc . -t 3", "not a file but a folder", ""},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char line[256];
        snprintf(line, sizeof line, "-e recall -t 32 -b 2 -x 1 -vocab 100 -i positions.bin %s", bad[i][0]);
        Child r = child(run_start_only, line);
        check_died(&r, line, bad[i][1], bad[i][2]);
    }
    static const char *const others[][2] = {{"-mc a.bin", "data/mc"}, // its tokenizer had 100 tokens
                                            {"-mc other.bin", "data/mc"},
                                            {"-needle other_n.bin", "data/needle"},
                                            {"-hellaswag other_llmc.bin", "data/hellaswag"}};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        char line[256], wanted[256];
        snprintf(line, sizeof line, "-t 3 -b 2 -x 1 -e recall -i words/first.bin %s", others[i][0]);
        snprintf(wanted, sizeof wanted, "%s: made with another tokenizer than words/tokenizer.bin",
                 others[i][0]);
        Child r = child(run_start_only, line);
        check_died(&r, line, wanted, others[i][1]);
    }
}

// Prints the first batch of training data.
static void run_batch(void *line) {
    Run *r = start((const char *)line);
    run_load_batch(r, &r->train);
    for (int64_t i = 0; i < r->opt.batch * r->opt.seq_len; i++) printf("%d ", r->inputs[i]);
}

static void run_resume(void *line) {
    Run *r = start((const char *)line);
    printf("step %lld tokens %lld draws %lld epoch %lld position %lld", (long long)r->state.step,
           (long long)r->state.tokens, (long long)r->state.draws, (long long)r->train.epoch,
           (long long)r->train.position);
    if (r->state.epoch != r->train.epoch || r->state.position != r->train.position)
        die("the state is elsewhere");
}

// Tests the order of the data by -seed, and where a resumed run goes on.
static void test_data_position(void) {
    char folder[300];
    int32_t tokens[700];
    for (int i = 0; i < 700; i++) tokens[i] = i % 100;
    make_shard("order.bin", 100, tokens, 700, NULL, 0);
    Child one = child(run_batch, (void *)"-e recall -t 6 -b 8 -x 1 -vocab 100 -i order.bin -seed 1");
    Child again = child(run_batch, (void *)"-e recall -t 6 -b 8 -x 1 -vocab 100 -i order.bin -seed 1");
    Child two = child(run_batch, (void *)"-e recall -t 6 -b 8 -x 1 -vocab 100 -i order.bin -seed 2");
    CHECK(one.code == 0 && strcmp(one.out, again.out) == 0, "one seed, two orders: %s %s", one.out,
          again.out);
    CHECK(two.code == 0 && strcmp(one.out, two.out) != 0, "two seeds, one order: %s", one.out);

    TrainState s = make_state(3);
    s.seq_len = 6, s.epoch_samples = 100, s.position = 30, s.data.shards = 0;
    snprintf(folder, sizeof folder, "%s/run/position", dir);
    make_dirs(folder);
    checkpoint_save(folder, &model, &s, arrays[0], arrays[1], arrays[2], model_size);
    s.step = 4, s.data.shards = 1, s.data.tokens = 699; // other data than order.bin
    snprintf(folder, sizeof folder, "%s/run/position_data", dir);
    make_dirs(folder);
    checkpoint_save(folder, &model, &s, arrays[0], arrays[1], arrays[2], model_size);
    static const char *const cases[][3] = {
        // flags, state, text in stderr
        {"-y 1 -o position -t 6 -seed 5", "step 3 tokens 30 draws 8 epoch 2 position 30", ""},
        {"-y 1 -o position -t 6 -seed 5 -b 4", "step 3 tokens 30 draws 8 epoch 2 position 30", ""},
        {"-y 1 -o position -t 9 -seed 5", "step 3 tokens 30 draws 8 epoch 3 position 0", "-t changed"},
        {"-y 1 -o position -t 6 -seed 6", "step 3 tokens 30 draws 8 epoch 3 position 0", "-seed changed"},
        {"-y 1 -o position_data -t 6 -seed 5 -new-data 1", "step 4 tokens 30 draws 8 epoch 3 position 0",
         "of 700 tokens, but the run has 1 shard "},
        {"-e position/ckpt_00000003.bin -t 6 -seed 5", "step 0 tokens 0 draws 0 epoch 0 position 0", ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char line[256];
        snprintf(line, sizeof line, "-x 9 -l 1e-3 -i order.bin %s", cases[i][0]);
        Child r = child(run_resume, line);
        CHECK(r.code == 0 && strcmp(r.out, cases[i][1]) == 0 && strstr(r.err, cases[i][2]),
              "%s: '%s', not '%s' %s", line, r.out, cases[i][1], r.err);
        CHECK(cases[i][2][0] || !r.err[0], "%s: %s", line, r.err);
    }
}

static void run_outliers(void *unused) {
    (void)unused;
    Run r;
    memset(&r, 0, sizeof r);
    r.comm.ranks = 1, r.opt.max_loss_z = 3, r.opt.max_norm_z = 3, r.opt.skip_nonfinite = 1;
    for (int i = 0; i < OUTLIER_WINDOW; i++)
        outlier_add(&r.state.losses, i % 2 ? 3 : 5), outlier_add(&r.state.norms, 2);
    printf("%d ", run_accept_step(&r, 7.5, 2)); // the mean is 4, the standard deviation 1
    printf("%d ", run_accept_step(&r, 4, 2));
    printf("%d ", run_accept_step(&r, NAN, 2));
    printf("%d ", run_accept_step(&r, 4, INFINITY));
    printf("%d", (int)r.state.losses.count);
}

// Tests which steps update the weights.
static void test_accept_step(void) {
    Child r = child(run_outliers, NULL);
    CHECK(r.code == 0 && strcmp(r.out, "0 1 0 0 130") == 0, "%s", r.out);
    CHECK(strstr(r.err, "step 1: outlier skipped: loss 7.5 (limit 7), gradient norm 2 (limit 2)\n") &&
              strstr(r.err, "step 1: loss nan, gradient norm 2: skipped\n") &&
              strstr(r.err, "step 1: loss 4, gradient norm inf: skipped\n") && count_lines(r.err) == 3,
          "%s", r.err);
}

// A model of 32 tokens that counts from 0, and ends the text after token *last. Prints its contexts to
// stderr.
static const float *count_logits(void *last, const int32_t *tokens, int64_t n) {
    static float logits[32];
    int token = tokens[n - 1];
    memset(logits, 0, sizeof logits);
    logits[token == 31 ? 0 : token == *(int *)last ? 31 : token + 1] = 1;
    fprintf(stderr, "%d..%d of %lld ", tokens[0], token, (long long)n);
    return logits;
}

// A model that generates all tokens but end-of-text with the same probability.
static const float *equal_logits(void *unused, const int32_t *tokens, int64_t n) {
    static float logits[32];
    (void)unused, (void)tokens, (void)n;
    logits[31] = -INFINITY;
    return logits;
}

// Prints the text samples of a command line; the state has `draws` draws. last: -1: equal_logits.
typedef struct {
    const char *line;
    int64_t draws;
    int samples, last;
} TextRun;

static void run_text(void *argument) {
    TextRun *t = (TextRun *)argument;
    Run r;
    memset(&r, 0, sizeof r);
    parse(&r.opt, t->line);
    r.config.vocab_size = 32, r.eot = 31, r.sample_context = 8, r.state.draws = t->draws;
    for (int i = 0; i < t->samples; i++) run_sample(&r, t->last < 0 ? equal_logits : count_logits, &t->last);
}

static void test_text(void) {
    TextRun t = {"-i a -g 14 -temp 0", 0, 1, 99};
    Child r = child(run_text, &t);
    CHECK(r.code == 0 && strcmp(r.out, "sample: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 \n") == 0, "%s", r.out);
    // the context starts with end-of-text; when 8 tokens are in it, the older 4 are dropped
    CHECK(strcmp(r.err,
                 "31..31 of 1 31..0 of 2 31..1 of 3 31..2 of 4 31..3 of 5 31..4 of 6 31..5 of 7 31..6 of 8 "
                 "3..7 of 5 3..8 of 6 3..9 of 7 3..10 of 8 7..11 of 5 7..12 of 6 ") == 0,
          "%s", r.err);
    t.last = 4;
    r = child(run_text, &t);
    CHECK(r.code == 0 && strcmp(r.out, "sample: 0 1 2 3 4 \n") == 0, "text goes on after its end: %s", r.out);

    // random numbers: those of -seed, and each one once, in later samples and in a resumed run too
    TextRun whole = {"-i a -g 12 -temp 1 -topp 1 -seed 1", 0, 1, -1},
            half = {"-i a -g 6 -temp 1 -topp 1 -seed 1", 0, 2, -1},
            resumed = {"-i a -g 6 -temp 1 -topp 1 -seed 1", 6, 1, -1},
            other = {"-i a -g 12 -temp 1 -topp 1 -seed 2", 0, 1, -1};
    Child a = child(run_text, &whole), b = child(run_text, &half), c = child(run_text, &resumed),
          d = child(run_text, &other);
    char text[256];
    const char *second = strstr(b.out, "\nsample: ");
    snprintf(text, sizeof text, "%.*s%s", second ? (int)(second - b.out) : 0, b.out,
             second ? second + 9 : "");
    CHECK(a.code == 0 && b.code == 0 && strcmp(a.out, text) == 0, "'%s', in two samples '%s'", a.out, b.out);
    CHECK(c.code == 0 && second && strcmp(c.out, second + 1) == 0, "resumed '%s', without a stop '%s'", c.out,
          b.out);
    CHECK(d.code == 0 && strcmp(a.out, d.out) != 0, "two seeds, one text: %s", d.out);
}

// ----------------------------------------------------------------------------
// Log

static void test_cadence(void) {
    CHECK(cadence_due(0, 10, 25) && cadence_due(10, 10, 25) && cadence_due(20, 10, 25) &&
              cadence_due(25, 10, 25),
          "due");
    CHECK(!cadence_due(5, 10, 25) && !cadence_due(24, 10, 25), "not due");
    CHECK(!cadence_due(0, 0, 25) && !cadence_due(25, 0, 25), "never");
    Options o;
    parse(&o, "-i a -j b -o d -x 25 -n 10 -v 5 -s 20");
    for (int64_t step = 0; step <= 25; step++) {
        Cadence c = cadence_at(&o, step);
        CHECK(c.validate == (step % 5 == 0), "val %lld", (long long)step);
        CHECK(c.sample == (step == 20 || step == 25), "sample %lld", (long long)step);
        CHECK(c.save == (step == 10 || step == 20 || step == 25), "save %lld", (long long)step);
    }
    parse(&o, "-i a -o d -x 25 -n 0");
    CHECK(!cadence_at(&o, 24).save && cadence_at(&o, 25).save && !cadence_at(&o, 25).validate &&
              !cadence_at(&o, 25).sample,
          "only at the end");
    parse(&o, "-i a -x 25");
    CHECK(!cadence_at(&o, 25).save, "nowhere to save");
    CHECK(eta_seconds(10, 5, 20) == 40 && eta_seconds(10, 0, 20) == 0, "time left");
    static const struct {
        double seconds;
        const char *text;
    } times[] = {{0, "0s"},         {59.4, "59s"},    {59.6, "1m00s"},  {125, "2m05s"},
                 {3599.9, "1h00m"}, {10920, "3h02m"}, {86400, "1d00h"}, {1e6, "11d13h"}};
    for (size_t i = 0; i < sizeof times / sizeof times[0]; i++) {
        char text[32];
        format_seconds(text, sizeof text, times[i].seconds);
        CHECK(strcmp(text, times[i].text) == 0, "%s", text);
    }
}

// The expected values follow llm.c's schedulers.
static void test_schedule(void) {
    Options o;
    parse(&o, "-i a -x 100 -u 10 -l 1 -q 0.1 -k linear");
    CHECK(schedule_rate(&o, 4) == 0.5 && schedule_rate(&o, 10) == 1 &&
              fabs(schedule_rate(&o, 55) - 0.55) < 1e-15 && schedule_rate(&o, 100) == 0.1,
          "linear");
    parse(&o, "-i a -x 100 -u 10 -l 1 -q 0.1 -k constant");
    CHECK(schedule_rate(&o, 4) == 0.5 && schedule_rate(&o, 10) == 1 && schedule_rate(&o, 99) == 1,
          "constant");
    parse(&o, "-i a -x 100 -u 10 -l 1 -q 0.1 -k wsd");
    CHECK(schedule_rate(&o, 4) == 0.5 && schedule_rate(&o, 10) == 1 && schedule_rate(&o, 80) == 1 &&
              fabs(schedule_rate(&o, 85) - 0.55) < 1e-15 && schedule_rate(&o, 100) == 0.1,
          "wsd");
    parse(&o, "-i a -x 100 -u 10 -l 1 -q 0.1");
    for (int i = 0; i <= 100; i++)
        CHECK(schedule_rate(&o, i) == learning_rate(i, 1, 10, 100, 0.1), "cosine is the default");

    OutlierWindow w;
    memset(&w, 0, sizeof w);
    for (int i = 0; i < 200; i++) {
        CHECK(isinf(outlier_limit(&w, 2)) == (i < OUTLIER_WINDOW), "value %d", i);
        outlier_add(&w, i < 72 ? 1000 : i % 2 ? 5 : 3); // mean 4, standard deviation 1
    }
    outlier_add(&w, NAN);
    outlier_add(&w, INFINITY);
    CHECK(w.count == 200 && fabs(outlier_limit(&w, 3) - 7) < 1e-12, "limit %g", outlier_limit(&w, 3));
    CHECK(isinf(outlier_limit(&w, 0)), "off");
}

static void run_log_full(void *unused) {
    (void)unused;
    Logger l;
    memset(&l, 0, sizeof l);
    l.file = fopen("/dev/full", "w");
    snprintf(l.path, sizeof l.path, "/dev/full");
    logger_val(&l, 1, 1, 1, 0);
}

// Logs some steps. The parent checks the console output and the file.
static void run_log(void *folder) {
    Logger l;
    logger_open(&l, (const char *)folder, -1);
    l.tokens = 77;
    const int64_t from[] = {1, 2, 4}, asked[] = {0, 8, 400}, right[] = {0, 1, 380};
    logger_val(&l, 0, 4.5, 300, 0);
    for (int64_t step = 1; step <= 4; step++) {
        StepLog t = {step, step == 3 ? NAN : 1.0 / (double)step, 1e-3, 0.5, 12.5, 1e4, 0.421, 0};
        logger_train(&l, &t, 10, 65);
    }
    logger_recall(&l, 4, 3, from, asked, right, 1.0 / 16);
    logger_val(&l, 4, 1.25, 300, 900);
    fflush(stdout);
    _exit(0); // without closing: every line is already in the file
}

static void run_log_removed(void *folder) {
    Logger l;
    char path[400];
    logger_open(&l, (const char *)folder, -1);
    logger_val(&l, 1, 1, 1, 0);
    snprintf(path, sizeof path, "%s/log.jsonl", (const char *)folder);
    unlink(path);
    logger_val(&l, 2, 1, 1, 0);
}

// The text of a special token has no bytes, that of a word begins with a space.
static void test_text_bytes(void) {
    int64_t offsets[] = {0, 3, 8, 13, 13, 18};
    uint8_t flags[] = {TOKEN_VOCAB, 0, TOKEN_ADDED | TOKEN_SPECIAL, 0, TOKEN_ADDED};
    const int64_t want[] = {3, 0, 0, 0, 5};
    Tokenizer t;
    memset(&t, 0, sizeof t);
    t.kind = TOKENIZER_BPE, t.vocab_size = 5, t.eot = 1, t.bos = -1;
    t.bytes = (char *)"the<eot><pad><tab>", t.offsets = offsets, t.flags = flags;
    for (int i = 0; i < 5; i++) {
        int64_t bytes = tokenizer_text_bytes(&t, i);
        CHECK(bytes == want[i], "token %d: %lld bytes", i, (long long)bytes);
    }
    t.bos = 0;
    CHECK(tokenizer_text_bytes(&t, 0) == 0, "BOS has bytes");
    t.bos = -1, t.kind = TOKENIZER_WORDS;
    CHECK(tokenizer_text_bytes(&t, 0) == 4 && tokenizer_text_bytes(&t, 3) == 0, "words");
}

static void test_logger(void) {
    char folder[300], path[400], text[8192];
    snprintf(folder, sizeof folder, "%s/log", dir);
    snprintf(path, sizeof path, "%s/log.jsonl", folder);
    make_dirs(folder);
    make_file(folder, "log.jsonl", "{\"step\":1,\"of\":\"an older run\"}\n");
    Child r = child(run_log, folder);
    CHECK(r.code == 0, "%d %s", r.code, r.err);
    CHECK(strstr(r.out, "val loss 4.500000 | perplexity 90.0171 | 300 tokens | step 0\n"), "%s", r.out);
    CHECK(
        strstr(r.out, "val loss 1.250000 | perplexity 3.49034 | 0.601123 bits/byte | 300 tokens | step 4\n"),
        "%s", r.out);
    CHECK(strstr(r.out,
                 "step 1/10 | loss 1.0000 | norm 0.500 | lr 1.00e-03 | 12.5 ms | 10000 tokens/s | mfu 42.1% "
                 "| 1m05s left\n"),
          "%s", r.out);
    CHECK(!strstr(r.out, "step 2/10"), "more than one line per second: %s", r.out);
    CHECK(strstr(r.out, "recall by distance at step 4 (chance 6.2%)") && strstr(r.out, "4+: 95.0% of 400") &&
              strstr(r.out, "1+: none"),
          "%s", r.out);
    read_text(path, text, sizeof text);
    CHECK(count_lines(text) == 7 && !strstr(text, "older"), "%s", text);
    CHECK(strstr(text, "{\"step\":2,\"loss\":0.5,\"lr\":0.001,\"norm\":0.5,\"ms\":12.500,\"tokens_per_"
                       "second\":10000.0,"
                       "\"mfu\":0.42100,\"memory_bytes\":0,\"tokens\":77}\n"),
          "%s", text);
    CHECK(strstr(text, "{\"step\":3,\"loss\":null,"), "NaN: %s", text);
    CHECK(strstr(text, "{\"step\":4,\"tokens\":77,\"val_loss\":1.25,\"val_perplexity\":3.49034296,"
                       "\"val_bits_per_byte\":0.601122934,\"val_tokens\":300}\n"),
          "%s", text);
    CHECK(strstr(text, "{\"step\":4,\"tokens\":77,\"chance\":0.0625,\"recall\":[{\"from\":1,\"asked\":0,"
                       "\"right\":0},{\"from\":2,"
                       "\"asked\":8,\"right\":1},{\"from\":4,\"asked\":400,\"right\":380}]}\n"),
          "%s", text);

    // resume after step 2; a kill has truncated the last line
    FILE *f = fopen(path, "ab");
    if (!f || fputs("{\"step\":2,\"recall\":[{\"from\":1}", f) < 0 || fclose(f) != 0) die("cannot append");
    Logger l;
    logger_open(&l, folder, 2);
    logger_write(&l, "{\"step\":3,\"loss\":9}\n");
    logger_close(&l);
    read_text(path, text, sizeof text);
    CHECK(count_lines(text) == 4, "%s", text);
    CHECK(strncmp(text, "{\"step\":0,\"tokens\":77,\"val_loss\":4.5,", 37) == 0 &&
              strstr(text, "\"val_bits_per_byte\":null,\"val_tokens\":300}\n{\"step\":1,") &&
              strstr(text, "\n{\"step\":2,") && strstr(text, "}\n{\"step\":3,\"loss\":9}\n") &&
              !strstr(text, "\"step\":4") && !strstr(text, "\"loss\":null"),
          "%s", text);
    CHECK(!exists(folder, "log.jsonl.tmp"), "temporary file left");
    unlink(path);
    logger_open(&l, folder, 5); // a checkpoint, but no log
    logger_close(&l);
    CHECK(exists(folder, "log.jsonl"), "no new log");
    logger_open(&l, NULL, -1);
    logger_write(&l, "nowhere");
    logger_close(&l);
    r = child(run_log_removed, folder);
    check_died(&r, "a removed log", "log.jsonl is gone", folder);
    if (access("/dev/full", W_OK) == 0) {
        r = child(run_log_full, NULL);
        check_died(&r, "full disk", "/dev/full", "cannot write");
    } else {
        SKIP("full disk: no /dev/full");
    }
}

int main(void) {
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%.200s/test_run_XXXXXX", base && base[0] ? base : "/tmp");
    if (!mkdtemp(dir)) die("cannot make %s: %s", dir, strerror(errno));
    model = preset_config("recall", 3000); // three chunks per array
    param_table(&model, NULL, &model_size);
    for (int a = 0; a < 3; a++) {
        arrays[a] = (float *)xmalloc((size_t)model_size * sizeof(float));
        loaded[a] = (float *)xmalloc((size_t)model_size * sizeof(float));
    }
    test_fsa_config();
    test_model_config();
    test_rope();
    test_param_table();
    test_qkv_layout();
    test_flops();
    test_options();
    test_options_checkpoint();
    test_checksum();
    test_checkpoint_file();
    test_sync();
    for (int version = 1; version <= 3; version++) {
        test_checkpoint_old("nsa, linear, bias, QK-norm", version, ATTN_NSA, 1, 1);
        test_checkpoint_old("nsa, linear", version, ATTN_NSA, 1, 0);
        test_checkpoint_old("nsa, mean, a gate a token", version, ATTN_NSA, 0, 0);
        test_checkpoint_old("full", version, ATTN_FULL, 1, 1);
    }
    for (int mode = ATTN_NSA; mode <= ATTN_WINDOW; mode++) {
        test_checkpoint_weights(ATTN_FULL, mode);
        test_checkpoint_weights(ATTN_NSA, mode);
    }
    test_checkpoint_folder();
    test_folder_lock();
    test_kill();
    test_validate();
    test_sample();
    test_documents();
    test_recall_accuracy();
    test_position_loss();
    test_gates();
    test_evaluations();
    test_bad_evaluations();
    test_data_position();
    test_accept_step();
    test_text();
    test_cadence();
    test_schedule();
    test_text_bytes();
    test_logger();
    test_params_init(); // last, because a fork must not happen while its OpenMP threads run
    for (int a = 0; a < 3; a++) free(arrays[a]), free(loaded[a]);
    char command[400];
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    if (system(command) != 0) printf("cannot remove %s\n", dir);
    return test_end("test_run");
}
