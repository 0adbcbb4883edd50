// eval_file.h: evaluation files, which data/hellaswag, data/mc and data/needle write, and how a model is
// scored on them.
//
// An example is a context and its choices. The model scores each choice as a continuation of the context. In
// a multiple-choice file the model answers with the choice of the lowest loss, one of which is right. In a
// needle file an example has one choice, and the answer is right if the model predicts each of its tokens.
//
// A file has a header of 256 int32, and then the examples. Two formats, both little-endian:
//   llm.c's, for multiple choice: {20240522, 1, examples, bytes of the longest, 0, 0, tokenizer, 0, ...},
//   then uint16:
//     65535, bytes of the example, its index, label, choices, then a count and so many tokens, for the
//     context and for each choice
//   ours: {20260803, 1, kind, examples, vocabulary size, keys, tokenizer, 0, ...}, then int32:
//     label, choices, depth in thousandths, then a count and so many tokens of the context; for each choice
//     its length in characters, a count and so many tokens
//   kind 0: multiple choice; kind 1: needle. keys: needles in a context. label: the right choice, from 0.
//   tokenizer: tokenizer_checksum(); 0: unknown, as in llm.c's own files.
#ifndef LLMC_EVAL_FILE_H
#define LLMC_EVAL_FILE_H
#include "tokenizer.h"
#include <math.h>

#define EVAL_MAGIC 20260803
#define EVAL_VERSION 1
#define EVAL_LLMC_MAGIC 20240522
#define EVAL_LLMC_VERSION 1
#define EVAL_LLMC_START 65535
#define EVAL_HEADER_BYTES 1024

typedef enum { EVAL_CHOICE, EVAL_NEEDLE } EvalKind;

typedef struct {
    int64_t first, tokens; // its tokens are data[first] to data[first + tokens - 1]
    int64_t length;        // what the normalized loss is divided by: characters, or tokens in llm.c's format
    int64_t example;
} EvalChoice;

typedef struct {
    int64_t context, context_tokens; // its tokens are data[context] and following
    int64_t first_choice, num_choices, label;
    int64_t depth; // of the needle, in thousandths of the context
} EvalExample;

typedef struct {
    char path[PATH_BYTES], name[64]; // name: of the file, without folder and .bin
    EvalKind kind;
    int llmc_format;
    int64_t keys;
    int64_t num_examples, num_choices;
    EvalExample *examples; // [num_examples]
    EvalChoice *choices;   // [num_choices], in the order of the examples
    int32_t *data;         // [count], what follows the header
    int64_t count;
} EvalFile;

// A model's result for a choice.
typedef struct {
    double loss;    // sum over the choice's tokens
    int64_t greedy; // 1: the model predicts each of its tokens
} EvalResult;

// A batch of contexts with a choice behind each. The arrays have space for `capacity` tokens.
typedef struct {
    int32_t *inputs, *targets;
    int64_t *cu_seqlens;
    int64_t num_seqs, capacity;
} EvalBatch;

// Reads the values of a file in order.
typedef struct {
    const EvalFile *f;
    int64_t at, example; // index of the next value; number of the example that it belongs to
} EvalParser;

// Returns the next value, which must be in [min, max]; dies if it is not. what: its name, for messages.
static inline int64_t eval_next(EvalParser *p, const char *what, int64_t min, int64_t max) {
    const EvalFile *f = p->f;
    if (p->at >= f->count)
        die("%s is truncated in example %lld; make it again", f->path, (long long)p->example);
    const int64_t value = f->data[p->at++];
    if (value < min || value > max)
        die("%s: example %lld: %s is %lld, but must be from %lld to %lld; make the file again, with the "
            "model's "
            "tokenizer",
            f->path, (long long)p->example, what, (long long)value, (long long)min, (long long)max);
    return value;
}

// Reads a count and so many tokens. Sets *first to the index of the first one, and returns their number.
static inline int64_t eval_next_tokens(EvalParser *p, const char *what, int64_t vocab_size, int64_t *first) {
    const int64_t n = eval_next(p, what, 1, INT32_MAX);
    *first = p->at;
    for (int64_t i = 0; i < n; i++) eval_next(p, "a token", 0, vocab_size - 1);
    return n;
}

// Reads the examples from f->data. Sets f->examples, f->choices and f->num_choices.
static inline void eval_parse(EvalFile *f, int64_t vocab_size) {
    EvalParser p = {f, 0, 0};
    int64_t capacity = 0;
    for (; p.example < f->num_examples; p.example++) {
        EvalExample *e = &f->examples[p.example];
        const int64_t begin = p.at;
        int64_t bytes = 0;
        if (f->llmc_format) {
            eval_next(&p, "its first value", EVAL_LLMC_START, EVAL_LLMC_START);
            bytes = eval_next(&p, "its number of bytes", 0, INT32_MAX);
            eval_next(&p, "its index", p.example, p.example);
        }
        e->label = eval_next(&p, "the right choice", 0, INT32_MAX);
        e->num_choices = eval_next(&p, "the number of choices", f->kind == EVAL_NEEDLE ? 1 : 2,
                                   f->kind == EVAL_NEEDLE ? 1 : f->count);
        if (!f->llmc_format) e->depth = eval_next(&p, "the depth", 0, 1000);
        e->context_tokens = eval_next_tokens(&p, "the context's number of tokens", vocab_size, &e->context);
        e->first_choice = f->num_choices;
        for (int64_t i = 0; i < e->num_choices; i++) {
            if (f->num_choices == capacity) {
                capacity = 2 * capacity + 1024;
                f->choices = (EvalChoice *)realloc(f->choices, (size_t)capacity * sizeof *f->choices);
                if (!f->choices) die("out of memory: %lld choices of %s", (long long)capacity, f->path);
            }
            EvalChoice *c = &f->choices[f->num_choices++];
            c->example = p.example;
            if (!f->llmc_format) c->length = eval_next(&p, "the length of a choice", 1, INT32_MAX);
            c->tokens = eval_next_tokens(&p, "a choice's number of tokens", vocab_size, &c->first);
            if (f->llmc_format) c->length = c->tokens;
        }
        if (e->label >= e->num_choices)
            die("%s: example %lld: choice %lld is right, but there are %lld; make the file again", f->path,
                (long long)p.example, (long long)e->label, (long long)e->num_choices);
        if (f->llmc_format && bytes != 2 * (p.at - begin))
            die("%s: example %lld: has %lld bytes, not %lld; make the file again", f->path,
                (long long)p.example, (long long)(2 * (p.at - begin)), (long long)bytes);
    }
    if (p.at != f->count)
        die("%s has %lld values behind its last example; make it again", f->path,
            (long long)(f->count - p.at));
}

// Reads a file of a model with vocab_size tokens. Dies if it is invalid, of another kind, or made with
// another tokenizer. t: the model's (NULL: unknown), from tokenizer_path. flag: for messages.
static inline void eval_load(EvalFile *f, const char *flag, const char *path, EvalKind kind,
                             int64_t vocab_size, const Tokenizer *t, const char *tokenizer_path) {
    int32_t header[EVAL_HEADER_BYTES / 4];
    struct stat st;
    memset(f, 0, sizeof *f);
    if (snprintf(f->path, sizeof f->path, "%s", path) >= (int)sizeof f->path)
        die("%s %s: the name is too long; choose a shorter path", flag, path);
    const char *base = file_name(path), *end = strstr(base, ".bin");
    snprintf(f->name, sizeof f->name, "%.*s", end ? (int)(end - base) : (int)strlen(base), base);
    FILE *file = input_fopen("", path, &st);
    if (!file) die("cannot read %s: %s; check the path", path, strerror(errno));
    if (fread(header, sizeof header, 1, file) != 1 ||
        (header[0] != EVAL_MAGIC && header[0] != EVAL_LLMC_MAGIC))
        die("%s %s: not an evaluation file; make one with data/hellaswag, data/mc or data/needle", flag,
            path);
    f->llmc_format = header[0] == EVAL_LLMC_MAGIC;
    if (header[1] != (f->llmc_format ? EVAL_LLMC_VERSION : EVAL_VERSION))
        die("%s %s: version %d found, %d expected; make the file again", flag, path, header[1],
            f->llmc_format ? EVAL_LLMC_VERSION : EVAL_VERSION);
    f->kind = !f->llmc_format && header[2] == EVAL_NEEDLE ? EVAL_NEEDLE : EVAL_CHOICE;
    if (f->kind != kind)
        die("%s %s: a file for %s; give it with that flag", flag, path,
            f->kind == EVAL_NEEDLE ? "-needle" : "-mc");
    f->num_examples = header[f->llmc_format ? 2 : 3];
    if (!f->llmc_format) f->keys = header[5];
    if (t && (header[6] ? (uint32_t)header[6] != tokenizer_checksum(t)
                        : !f->llmc_format && header[4] != t->vocab_size))
        die("%s %s: made with another tokenizer than %s; make it with the latter: data/%s --tokenizer "
            "ITS_TOKENIZER_JSON",
            flag, path, tokenizer_path, flag + 1);
    const int64_t bytes = (int64_t)st.st_size - EVAL_HEADER_BYTES, width = f->llmc_format ? 2 : 4;
    f->count = bytes / width;
    if (f->num_examples < 1 || f->num_examples > f->count || bytes % width != 0)
        die("%s %s: invalid: %lld examples in %lld bytes; make the file again", flag, path,
            (long long)f->num_examples, (long long)bytes);
    f->data = (int32_t *)xmalloc((size_t)f->count * sizeof *f->data);
    // 16-bit values are read into the second half, and widened from the start
    char *raw = (char *)f->data + f->count * (4 - width);
    if (fread(raw, (size_t)width, (size_t)f->count, file) != (size_t)f->count)
        die("cannot read %s: it has become shorter; make it again", path);
    fclose(file);
    for (int64_t i = 0; i < f->count && width == 2; i++) {
        uint16_t value;
        memcpy(&value, raw + 2 * i, 2);
        f->data[i] = value;
    }
    f->examples = (EvalExample *)xcalloc((size_t)f->num_examples, sizeof *f->examples);
    eval_parse(f, vocab_size);
}

static inline void eval_free(EvalFile *f) {
    free(f->examples), free(f->choices), free(f->data);
    memset(f, 0, sizeof *f);
}

// Returns the tokens that the model reads for a choice: context and choice but for their last token.
static inline int64_t eval_choice_inputs(const EvalFile *f, const EvalChoice *c) {
    return f->examples[c->example].context_tokens + c->tokens - 1;
}

// Fills a batch with choices from number `choice` on, each of which gets at most seq_len tokens: longer
// contexts lose their beginning. Other tokens of the batch are 0, in sequences of their own. Returns the
// number of the choice behind the last one.
static inline int64_t eval_fill_batch(const EvalFile *f, int64_t choice, int64_t seq_len, EvalBatch *b) {
    enum { FILL = 64 };
    int64_t n = 0;
    for (b->num_seqs = 0; choice < f->num_choices; choice++, b->num_seqs++) {
        const EvalChoice *c = &f->choices[choice];
        const EvalExample *e = &f->examples[c->example];
        int64_t length = eval_choice_inputs(f, c);
        if (length > seq_len) length = seq_len;
        if (n + length > b->capacity) break;
        b->cu_seqlens[b->num_seqs] = n;
        // token i of the context and the choice behind it, counted from the choice's last token on
        for (int64_t i = 0; i <= length; i++) {
            const int64_t at = e->context_tokens + c->tokens - 1 - length + i;
            const int32_t token =
                f->data[at < e->context_tokens ? e->context + at : c->first + at - e->context_tokens];
            if (i < length) b->inputs[n + i] = token;
            if (i > 0) b->targets[n + i - 1] = token;
        }
        n += length;
    }
    while (n < b->capacity) {
        b->cu_seqlens[b->num_seqs++] = n;
        for (int64_t i = 0; i < FILL && n < b->capacity; i++, n++) b->inputs[n] = b->targets[n] = 0;
    }
    b->cu_seqlens[b->num_seqs] = n;
    return choice;
}

// Fills in results [num_choices] of choices [first, end), which a batch holds, from its losses and predicted
// tokens.
static inline void eval_read_batch(const EvalFile *f, int64_t first, int64_t end, const EvalBatch *b,
                                   const float *losses, const int32_t *argmax, EvalResult *results) {
    for (int64_t i = first; i < end; i++) {
        const int64_t stop = b->cu_seqlens[i - first + 1];
        results[i].loss = 0, results[i].greedy = 1;
        for (int64_t t = stop - f->choices[i].tokens; t < stop; t++) {
            results[i].loss += losses[t];
            results[i].greedy &= argmax[t] == b->targets[t];
        }
    }
}

// Returns the choice of an example with the lowest loss, from 0; the first of equal ones. normalized: the
// loss is divided by the choice's length.
static inline int64_t eval_answer(const EvalFile *f, const EvalExample *e, const EvalResult *results,
                                  int normalized) {
    int64_t best = 0;
    double best_loss = INFINITY;
    for (int64_t i = 0; i < e->num_choices; i++) {
        const int64_t c = e->first_choice + i;
        const double loss = results[c].loss / (normalized ? (double)f->choices[c].length : 1);
        if (loss < best_loss) best_loss = loss, best = i;
    }
    return best;
}

// The right answers of a multiple-choice file.
typedef struct {
    int64_t examples, right, right_normalized;
    double chance; // accuracy of random answers
} EvalAccuracy;

static inline EvalAccuracy eval_accuracy(const EvalFile *f, const EvalResult *results) {
    EvalAccuracy a = {f->num_examples, 0, 0, 0};
    for (int64_t i = 0; i < f->num_examples; i++) {
        const EvalExample *e = &f->examples[i];
        a.right += eval_answer(f, e, results, 0) == e->label;
        a.right_normalized += eval_answer(f, e, results, 1) == e->label;
        a.chance += 1.0 / (double)e->num_choices / (double)f->num_examples;
    }
    return a;
}

// The answers of a needle file at one length and depth.
typedef struct {
    int64_t length; // tokens of context and answer
    int64_t depth;  // in thousandths of the context
    int64_t asked, right;
} EvalCell;

static inline int eval_compare_cells(const void *a, const void *b) {
    const EvalCell *x = (const EvalCell *)a, *y = (const EvalCell *)b;
    if (x->length != y->length) return x->length < y->length ? -1 : 1;
    return (x->depth > y->depth) - (x->depth < y->depth);
}

// Fills cells [num_examples] of a needle file, by length and depth. Returns their number.
static inline int64_t eval_cells(const EvalFile *f, const EvalResult *results, EvalCell *cells) {
    int64_t n = 0;
    for (int64_t i = 0; i < f->num_examples; i++) {
        const EvalExample *e = &f->examples[i];
        cells[i].length = e->context_tokens + f->choices[e->first_choice].tokens;
        cells[i].depth = e->depth;
        cells[i].asked = 1, cells[i].right = results[e->first_choice].greedy;
    }
    qsort(cells, (size_t)f->num_examples, sizeof *cells, eval_compare_cells);
    for (int64_t i = 0; i < f->num_examples; i++) {
        if (n > 0 && eval_compare_cells(&cells[n - 1], &cells[i]) == 0)
            cells[n - 1].asked++, cells[n - 1].right += cells[i].right;
        else
            cells[n++] = cells[i];
    }
    return n;
}
#endif
