// tokenizer.h: what token ids mean. Reads and writes `tokenizer.bin`; reads llm.c's file of that name too.
//
// tokenizer.bin: 256 int32 of header, {magic 20260801, version 1, vocab_size, id of the end-of-text token
// or -1, kind, split, whole}, then for each token uint16 length and its bytes, and for kind 2 its int32 rank.
//   kind 0, bytes: a token is a byte; text is their concatenation.
//   kind 1, words: a token is a word, or several with one space between them; text is tokens joined by one
//   space. Where several tokens fit a text, the longest does.
//   kind 2, BPE: text is the concatenation; tokens arise by merging adjacent ones, lowest rank first
//   (rank -1: never by merging), within the stretches that `split` cuts the text into; whole = 1: a
//   stretch that is itself a token is that token.
// llm.c's: 256 uint32, {magic 20240328, version 1 or 2, vocab_size, end-of-text (version 2; else 50256)},
// then uint8 length and bytes: a BPE whose ranks are its ids.
#ifndef LLMC_TOKENIZER_H
#define LLMC_TOKENIZER_H

#include "unicode.h"
#include "utils.h"

#define TOKENIZER_MAGIC 20260801
#define TOKENIZER_VERSION 1
#define TOKENIZER_LLMC_MAGIC 20240328
enum { TOKENIZER_BYTES = 0, TOKENIZER_WORDS = 1, TOKENIZER_BPE = 2 };
// Ways to split text. Llama 3's takes digits by threes, Qwen's one by one; cl100k is Llama 3's, but for a
// text that ends in white space.
enum { SPLIT_GPT2 = 0, SPLIT_LLAMA3 = 1, SPLIT_QWEN = 2, SPLIT_CL100K = 3 };

typedef struct Tokenizer {
    int kind, vocab_size, eot; // eot: -1 when there is none
    int split, whole;          // of kind BPE
    char *bytes;               // all tokens, one after the other
    int64_t *start;            // [vocab_size + 1]: where each begins in `bytes`
    int32_t *rank;             // [vocab_size]: merge priority, -1 for a token that no merge makes
    int32_t byte_id[256];      // the token of each single byte, or -1
    int32_t *table;            // [table_size]: hash table from text to id, -1 where empty
    int64_t table_size;        // a power of two
    int64_t longest;           // bytes of the longest token
} Tokenizer;

static inline void tokenizer_free(Tokenizer *t) {
    free(t->bytes);
    free(t->start);
    free(t->rank);
    free(t->table);
    memset(t, 0, sizeof(*t));
}

// The bytes of a token (not 0-terminated) and their number; none for an id outside the vocabulary.
static inline const char *tokenizer_piece(const Tokenizer *t, int id, int *len) {
    *len = 0;
    if (id < 0 || id >= t->vocab_size) return "";
    *len = (int)(t->start[id + 1] - t->start[id]);
    return t->bytes + t->start[id];
}

// The slot of the hash table where this text stands or would stand.
static inline int64_t tokenizer_slot(const Tokenizer *t, const char *text, int64_t len) {
    uint64_t h = 14695981039346656037ull; // FNV-1a
    for (int64_t i = 0; i < len; i++) h = (h ^ (unsigned char)text[i]) * 1099511628211ull;
    int64_t slot = (int64_t)((h ^ (h >> 32)) & (uint64_t)(t->table_size - 1));
    for (; t->table[slot] >= 0; slot = (slot + 1) & (t->table_size - 1)) {
        int n;
        const char *piece = tokenizer_piece(t, t->table[slot], &n);
        if (n == len && memcmp(piece, text, (size_t)n) == 0) break;
    }
    return slot;
}

// 0: loaded; 1: no such file. A broken file dies.
static inline int tokenizer_load(Tokenizer *t, const char *path) {
    uint32_t header[256];
    struct stat st;
    memset(t, 0, sizeof(*t));
    FILE *f = fopen(path, "rb");
    if (f == NULL && (errno == ENOENT || errno == ENOTDIR)) return 1;
    if (f == NULL || fstat(fileno(f), &st) != 0) die("cannot read tokenizer %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("cannot read tokenizer %s: not a file", path);
    if (fread(header, sizeof(header), 1, f) != 1) {
        die("tokenizer %s is truncated: %lld bytes found, its header alone has %zu", path,
            (long long)st.st_size, sizeof(header));
    }
    int llmc = header[0] == TOKENIZER_LLMC_MAGIC;
    if (!llmc && header[0] != TOKENIZER_MAGIC) {
        die("%s is no tokenizer: magic %d found, %d or llm.c's %d expected", path, (int)header[0],
            TOKENIZER_MAGIC, TOKENIZER_LLMC_MAGIC);
    }
    if (header[1] != TOKENIZER_VERSION && !(llmc && header[1] == 2)) {
        die("tokenizer %s has version %d, %s expected", path, (int)header[1], llmc ? "1 or 2" : "1");
    }
    t->vocab_size = (int)header[2];
    t->eot = llmc && header[1] == 1 ? 50256 : (int)header[3];
    t->kind = llmc ? TOKENIZER_BPE : (int)header[4];
    t->split = llmc ? SPLIT_GPT2 : (int)header[5];
    t->whole = llmc ? 0 : (int)header[6];
    int64_t size = (int64_t)st.st_size - (int64_t)sizeof(header);
    if (t->vocab_size < 1 || t->vocab_size > size) {
        die("tokenizer %s says it has %d tokens, in %lld bytes", path, t->vocab_size, (long long)size);
    }
    if (t->eot < -1 || t->eot >= t->vocab_size || t->kind < TOKENIZER_BYTES || t->kind > TOKENIZER_BPE) {
        die("tokenizer %s is broken: kind %d (0 to 2 expected), end-of-text %d of %d tokens", path, t->kind,
            t->eot, t->vocab_size);
    }
    if (t->split < SPLIT_GPT2 || t->split > SPLIT_CL100K || t->whole < 0 || t->whole > 1) {
        die("tokenizer %s is broken: split %d (0 to 3 expected), whole %d (0 or 1)", path, t->split,
            t->whole);
    }

    unsigned char *raw = (unsigned char *)xmalloc((size_t)size);
    if (fread(raw, 1, (size_t)size, f) != (size_t)size) die("cannot read tokenizer %s", path);
    fclose(f);
    t->bytes = (char *)xmalloc((size_t)size);
    t->start = (int64_t *)xmalloc((size_t)(t->vocab_size + 1) * sizeof(int64_t));
    t->rank = (int32_t *)xmalloc((size_t)t->vocab_size * sizeof(int32_t));
    int64_t at = 0, length_bytes = llmc ? 1 : 2, rank_bytes = !llmc && t->kind == TOKENIZER_BPE ? 4 : 0;
    t->start[0] = 0;
    for (int i = 0; i < t->vocab_size; i++) {
        int64_t length = 0;
        if (at + length_bytes <= size) length = llmc ? raw[at] : raw[at] | raw[at + 1] << 8;
        if (at + length_bytes + length + rank_bytes > size) {
            die("tokenizer %s is truncated: its %lld bytes end within token %d of %d", path,
                (long long)st.st_size, i, t->vocab_size);
        }
        memcpy(t->bytes + t->start[i], raw + at + length_bytes, (size_t)length);
        t->start[i + 1] = t->start[i] + length;
        if (length > t->longest) t->longest = length;
        at += length_bytes + length;
        t->rank[i] = llmc && i != t->eot ? i : -1;
        if (rank_bytes > 0) memcpy(&t->rank[i], raw + at, 4);
        at += rank_bytes;
    }
    if (at != size) {
        die("tokenizer %s is too long: %lld bytes follow its %d tokens", path, (long long)(size - at),
            t->vocab_size);
    }
    free(raw);

    // the end-of-text token is in neither table: it never arises from text
    for (t->table_size = 4; t->table_size < 2 * (int64_t)t->vocab_size;) t->table_size *= 2;
    t->table = (int32_t *)xmalloc((size_t)t->table_size * sizeof(int32_t));
    memset(t->table, 0xff, (size_t)t->table_size * sizeof(int32_t));
    memset(t->byte_id, 0xff, sizeof(t->byte_id));
    for (int i = t->vocab_size - 1; i >= 0; i--) { // of tokens with the same text the first counts
        int n;
        const char *piece = tokenizer_piece(t, i, &n);
        if (i == t->eot || n == 0) continue;
        if (n == 1) t->byte_id[(unsigned char)piece[0]] = i;
        if (t->kind == TOKENIZER_BPE && t->rank[i] < 0) continue;
        t->table[tokenizer_slot(t, piece, n)] = i;
    }
    return 0;
}

// Writes `path` in one step: pieces[i] has lengths[i] bytes; ranks for kind BPE, else NULL.
static inline void tokenizer_write(const char *path, int kind, int vocab_size, int eot,
                                   const char *const *pieces, const int *lengths, const int32_t *ranks) {
    int32_t header[256] = {TOKENIZER_MAGIC, TOKENIZER_VERSION, 0};
    AtomicFile file;
    header[2] = vocab_size;
    header[3] = eot;
    header[4] = kind;
    atomic_open(&file, path);
    atomic_write(&file, header, sizeof(header));
    for (int i = 0; i < vocab_size; i++) {
        uint16_t length = (uint16_t)lengths[i];
        if (lengths[i] < 0 || lengths[i] > UINT16_MAX) {
            die("cannot write %s: token %d has %d bytes", path, i, lengths[i]);
        }
        atomic_write(&file, &length, 2);
        atomic_write(&file, pieces[i], length);
        if (kind == TOKENIZER_BPE) atomic_write(&file, &ranks[i], 4);
    }
    atomic_commit(&file);
}

static inline int tokenizer_is_space(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

// What a character is to the ways of splitting. Text ends at its end, and at a byte that is no UTF-8.
enum { CHAR_END, CHAR_SPACE, CHAR_LETTER, CHAR_NUMBER, CHAR_OTHER };

// The first character of text [len] into *c; returns its bytes, 0 at the end and where it is no UTF-8.
static inline int64_t tokenizer_char(const char *text, int64_t len, uint32_t *c) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000}; // with so many bytes
    *c = 0;
    if (len <= 0) return 0;
    unsigned char first = (unsigned char)text[0];
    int64_t n = first < 0x80   ? 1
                : first < 0xc0 ? 0
                : first < 0xe0 ? 2
                : first < 0xf0 ? 3
                : first < 0xf8 ? 4
                               : 0;
    if (n == 0 || n > len) return 0;
    *c = n == 1 ? first : first & (0x7fu >> n);
    for (int64_t i = 1; i < n; i++) {
        if (((unsigned char)text[i] & 0xc0) != 0x80) return 0;
        *c = *c << 6 | ((unsigned char)text[i] & 0x3f);
    }
    return *c < least[n] || *c > 0x10ffff || (*c >= 0xd800 && *c < 0xe000) ? 0 : n;
}

// The class of the first character, and its bytes into *n.
static inline int tokenizer_class(const char *text, int64_t len, int64_t *n) {
    uint32_t c;
    *n = tokenizer_char(text, len, &c);
    if (*n == 0) return CHAR_END;
    if (UNICODE_HAS(UNICODE_LETTERS, c)) return CHAR_LETTER;
    if (UNICODE_HAS(UNICODE_NUMBERS, c)) return CHAR_NUMBER;
    return UNICODE_HAS(UNICODE_SPACES, c) ? CHAR_SPACE : CHAR_OTHER;
}

// The bytes of the first `most` characters or fewer that are of one class.
static inline int64_t tokenizer_run(const char *text, int64_t len, int wanted, int64_t most) {
    int64_t at = 0, n;
    while (most-- > 0 && tokenizer_class(text + at, len - at, &n) == wanted) at += n;
    return at;
}

static inline int tokenizer_is_newline(const char *text, int64_t len) {
    return len > 0 && (*text == '\n' || *text == '\r');
}

// The bytes of 's 't 're 've 'm 'll 'd at the start of the text, else 0; in any case: also of 'S and so on.
static inline int64_t tokenizer_contraction(const char *text, int64_t len, int any_case) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    if (len < 2 || text[0] != '\'') return 0;
    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        const char *letter = endings[i];
        int64_t at = 1;
        for (; *letter; letter++) {
            uint32_t c;
            at += tokenizer_char(text + at, len - at, &c);
            if (any_case && c >= 'A' && c <= 'Z') c += 'a' - 'A';
            if (any_case && c == 0x17f) c = 's'; // the long s
            if (c != (uint32_t)*letter) break;
        }
        if (*letter == 0) return at;
    }
    return 0;
}

// Length of the first stretch of text, which merges do not cross. The regular expressions, with \w for \p{L},
// \d for \p{N} and \o for [^\s\w\d]:
//   GPT-2    's|'t|'re|'ve|'m|'ll|'d| ?\w+| ?\d+| ?\o+|\s+(?!\S)|\s+
//   Llama 3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\w\d]?\w+|\d{1,3}| ?\o+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
// A byte that is no UTF-8 is a stretch of its own.
static inline int64_t tokenizer_stretch(int split, const char *text, int64_t len) {
    int64_t first, second;
    int kind = tokenizer_class(text, len, &first);
    if (kind == CHAR_END) return 1;
    int64_t n = tokenizer_contraction(text, len, split != SPLIT_GPT2);
    if (n > 0) return n;
    int space = text[0] == ' ';
    int next = tokenizer_class(text + first, len - first, &second);
    if (split == SPLIT_GPT2) {
        if (kind != CHAR_SPACE) return tokenizer_run(text, len, kind, len);
        if (space && next >= CHAR_LETTER) return 1 + tokenizer_run(text + 1, len - 1, next, len);
    } else {
        int joins = kind == CHAR_OTHER || (kind == CHAR_SPACE && !tokenizer_is_newline(text, len));
        if (kind == CHAR_LETTER) return tokenizer_run(text, len, CHAR_LETTER, len);
        if (joins && next == CHAR_LETTER)
            return first + tokenizer_run(text + first, len - first, CHAR_LETTER, len);
        if (kind == CHAR_NUMBER) return tokenizer_run(text, len, CHAR_NUMBER, split == SPLIT_QWEN ? 1 : 3);
        if (kind == CHAR_OTHER || (space && next == CHAR_OTHER)) {
            n = space + tokenizer_run(text + space, len - space, CHAR_OTHER, len);
            while (tokenizer_is_newline(text + n, len - n)) n++;
            return n;
        }
    }
    // white space: up to its last line end; else without its last character, which goes with what follows
    int64_t run = tokenizer_run(text, len, CHAR_SPACE, len), last = 0, at;
    int ends = tokenizer_class(text + run, len - run, &n) == CHAR_END;
    if (split == SPLIT_CL100K && ends) return run;
    for (at = run; split != SPLIT_GPT2 && at > 0; at--) {
        if (tokenizer_is_newline(text + at - 1, 1)) return at;
    }
    if (ends || run == first) return run;
    for (at = 0; at < run; at += n) {
        tokenizer_class(text + at, len - at, &n);
        last = at;
    }
    return last;
}

// Tokens of one stretch: from single bytes, merges the adjacent pair of lowest rank until none is left.
// start [len + 1] is scratch. Time is quadratic in the stretch, which in prompts is a word.
static inline int64_t tokenizer_merge(const Tokenizer *t, const char *text, int64_t len, int64_t *start) {
    int64_t n = len;
    for (int64_t i = 0; i <= len; i++) start[i] = i;
    for (;;) {
        int64_t best = -1;
        int32_t best_rank = INT32_MAX;
        for (int64_t i = 0; i + 1 < n; i++) {
            int32_t id = t->table[tokenizer_slot(t, text + start[i], start[i + 2] - start[i])];
            if (id >= 0 && t->rank[id] < best_rank) {
                best = i;
                best_rank = t->rank[id];
            }
        }
        if (best < 0) return n;
        memmove(start + best + 1, start + best + 2, (size_t)(n - best - 1) * sizeof(int64_t));
        n--;
    }
}

// Dies because no token matches the words [len], which have one space behind each, from the first one on.
LLMC_NORETURN static inline void tokenizer_no_word(const Tokenizer *t, const char *words, int64_t len) {
    int n = 0, length;
    while (n < len && words[n] != ' ') n++;
    int shown = n < 200 ? n : 200;
    for (int i = 0; i < t->vocab_size; i++) {
        const char *piece = tokenizer_piece(t, i, &length);
        if (i == t->eot || length <= n || memcmp(piece, words, (size_t)n + 1) != 0) continue;
        die("the vocabulary has no word '%.*s' (did you mean '%.*s'?)", shown, words,
            length < 200 ? length : 200, piece);
    }
    die("the vocabulary has no word '%.*s'; words and punctuation are separated by spaces", shown, words);
}

// tokenizer_encode of kind words: at each word, the longest token whose words come next.
static inline int64_t tokenizer_encode_words(const Tokenizer *t, const char *text, int64_t len, int32_t *out,
                                             int64_t max) {
    char *words = (char *)xmalloc((size_t)len + 1); // those of the text, with one space behind each
    int64_t size = 0, count = 0, n;
    for (int64_t i = 0; i <= len; i++) {
        int space = i == len || tokenizer_is_space(text[i]);
        if (!space) words[size++] = text[i];
        if (space && size > 0 && words[size - 1] != ' ') words[size++] = ' ';
    }
    for (int64_t at = 0; at < size; at += n + 1) {
        int32_t id = -1;
        n = 0; // bytes of the token
        for (int64_t i = 1; i <= t->longest && at + i < size; i++) {
            int32_t found = words[at + i] == ' ' ? t->table[tokenizer_slot(t, words + at, i)] : -1;
            if (found < 0) continue;
            id = found;
            n = i;
        }
        if (id < 0) tokenizer_no_word(t, words + at, size - at);
        if (count < max) out[count] = id;
        count++;
    }
    free(words);
    return count;
}

// Turns text [len] into tokens, of which the first `max` go to `out`; returns how many there are, which
// may be more than max. A word or byte that the vocabulary lacks dies.
static inline int64_t tokenizer_encode(const Tokenizer *t, const char *text, int64_t len, int32_t *out,
                                       int64_t max) {
    if (t->kind == TOKENIZER_WORDS) return tokenizer_encode_words(t, text, len, out, max);
    int64_t count = 0, at = 0;
    int64_t *start =
        t->kind == TOKENIZER_BPE ? (int64_t *)xmalloc((size_t)(len + 1) * sizeof(int64_t)) : NULL;
    while (at < len) {
        int64_t n = 1, tokens = 1; // of this stretch or byte
        if (t->kind == TOKENIZER_BPE) {
            n = tokenizer_stretch(t->split, text + at, len - at);
            start[0] = 0;
            start[1] = n;
            if (!t->whole || t->table[tokenizer_slot(t, text + at, n)] < 0)
                tokens = tokenizer_merge(t, text + at, n, start);
        }
        for (int64_t i = 0; i < tokens; i++) {
            int64_t from = at + (start != NULL ? start[i] : 0);
            int64_t size = start != NULL ? start[i + 1] - start[i] : n;
            int32_t id = size == 1 ? t->byte_id[(unsigned char)text[from]]
                                   : t->table[tokenizer_slot(t, text + from, size)];
            if (id < 0) die("the vocabulary has no byte 0x%02x", (unsigned char)text[from]);
            if (count < max) out[count] = id;
            count++;
        }
        at += n;
    }
    free(start);
    return count;
}

// Prints tokens [n] as text. Ids outside the vocabulary print nothing, nor do control characters other than
// newline, return and tab, which a terminal might obey.
static inline void tokenizer_print(const Tokenizer *t, FILE *f, const int32_t *tokens, int64_t n) {
    int words = 0;
    for (int64_t i = 0; i < n; i++) {
        int len;
        const char *piece = tokenizer_piece(t, tokens[i], &len);
        if (t->kind == TOKENIZER_WORDS && len > 0 && words++ > 0) fputc(' ', f);
        for (int j = 0; j < len; j++) {
            unsigned char c = (unsigned char)piece[j];
            if ((c >= 32 && c != 127) || c == '\n' || c == '\r' || c == '\t') fputc(c, f);
        }
    }
}

#endif
