// tokenizer.h: encodes text to token ids and decodes them. Reads and writes tokenizer.bin; also reads llm.c's
// tokenizer.bin.
//
// tokenizer.bin has a header of 256 int32, {magic 20260801, version 1, vocab_size, id of the end-of-text
// token or -1, kind, pretokenizer, ignore_merges, 0, ...}. Then follow for each token its length (uint16),
// its bytes, and for kind 2 its merge rank (int32).
//   kind 0, bytes: each token is one byte. Text is the concatenation of the tokens.
//   kind 1, words: a token is a word, or several words with one space between them. Text is the tokens
//     joined by one space. The encoder takes the longest matching token.
//   kind 2, BPE: text is the concatenation of the tokens. The pre-tokenizer splits text into pre-tokens.
//     Within a pre-token the encoder merges adjacent tokens, lowest rank first. Rank -1: no merge makes this
//     token. ignore_merges 1: a pre-token that is in the vocabulary becomes that token without merges.
// llm.c's file has a header of 256 uint32, {magic 20240328, version 1 or 2, vocab_size, end-of-text}. Version
// 1 has end-of-text 50256. Then follow for each token its length (uint8) and bytes. It is a BPE whose ranks
// are its ids.
#ifndef LLMC_TOKENIZER_H
#define LLMC_TOKENIZER_H

#include "unicode.h"
#include "input.h"

#define TOKENIZER_MAGIC 20260801
#define TOKENIZER_VERSION 1
#define TOKENIZER_LLMC_MAGIC 20240328
#define TOKENIZER_MAX_BYTES (1 << 28) // of a file
enum { TOKENIZER_BYTES = 0, TOKENIZER_WORDS = 1, TOKENIZER_BPE = 2 };
// Pre-tokenizers. Llama 3's groups up to three digits, Qwen's takes digits one by one. cl100k is Llama 3's
// except for white space at the end of the text.
enum { PRETOKENIZER_GPT2 = 0, PRETOKENIZER_LLAMA3 = 1, PRETOKENIZER_QWEN = 2, PRETOKENIZER_CL100K = 3 };

typedef struct Tokenizer {
    int kind, vocab_size, eot;       // eot: id of the end-of-text token, -1: none
    int pretokenizer, ignore_merges; // for kind BPE
    char *bytes;                     // all tokens, concatenated
    int64_t *offsets;                // [vocab_size + 1], offset in `bytes` of each token
    int32_t *rank;                   // [vocab_size], merge priority, -1: no merge makes this token
    int32_t byte_id[256];            // token of each single byte, or -1
    int32_t *table;                  // [table_size], hash table from text to id, -1: empty slot
    int64_t table_size;              // a power of two
    int64_t max_token_bytes;         // bytes of the longest token
} Tokenizer;

// Frees all memory and clears *t.
static inline void tokenizer_free(Tokenizer *t) {
    free(t->bytes);
    free(t->offsets);
    free(t->rank);
    free(t->table);
    memset(t, 0, sizeof(*t));
}

// Returns the bytes of a token, not 0-terminated, and their number in *len; 0 bytes for an id outside the
// vocabulary.
static inline const char *tokenizer_piece(const Tokenizer *t, int id, int *len) {
    *len = 0;
    if (id < 0 || id >= t->vocab_size) return "";
    *len = (int)(t->offsets[id + 1] - t->offsets[id]);
    return t->bytes + t->offsets[id];
}

// Returns the bytes that a token adds to the text: none for end-of-text; a word's include a space.
static inline int64_t tokenizer_text_bytes(const Tokenizer *t, int id) {
    int bytes;
    tokenizer_piece(t, id, &bytes);
    return id == t->eot ? 0 : bytes + (t->kind == TOKENIZER_WORDS);
}

// Returns the hash table's slot of this text, or the empty slot where it would be inserted.
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

// Reads a tokenizer. Returns 0, or 1 if the file does not exist; dies if the file is invalid.
static inline int tokenizer_load(Tokenizer *t, const char *path) {
    uint32_t header[256];
    struct stat st;
    memset(t, 0, sizeof(*t));
    FILE *f = input_fopen("tokenizer ", path, &st);
    if (f == NULL && (errno == ENOENT || errno == ENOTDIR)) return 1;
    if (f == NULL) die("cannot read tokenizer %s: %s; check its permissions", path, strerror(errno));
    if (st.st_size > TOKENIZER_MAX_BYTES) {
        die("tokenizer %s is too long: %lld bytes, at most %d expected; check the path", path,
            (long long)st.st_size, TOKENIZER_MAX_BYTES);
    }
    if (fread(header, sizeof(header), 1, f) != 1) {
        die("tokenizer %s is truncated: %lld bytes found, its header alone has %zu; make it again", path,
            (long long)st.st_size, sizeof(header));
    }
    int llmc = header[0] == TOKENIZER_LLMC_MAGIC;
    if (!llmc && header[0] != TOKENIZER_MAGIC) {
        die("%s is not a tokenizer: magic %d found, %d or llm.c's %d expected; make it again", path,
            (int)header[0], TOKENIZER_MAGIC, TOKENIZER_LLMC_MAGIC);
    }
    if (header[1] != TOKENIZER_VERSION && !(llmc && header[1] == 2)) {
        die("tokenizer %s has version %d, %s expected; make it again", path, (int)header[1],
            llmc ? "1 or 2" : "1");
    }
    t->vocab_size = (int)header[2];
    t->eot = llmc && header[1] == 1 ? 50256 : (int)header[3];
    t->kind = llmc ? TOKENIZER_BPE : (int)header[4];
    t->pretokenizer = llmc ? PRETOKENIZER_GPT2 : (int)header[5];
    t->ignore_merges = llmc ? 0 : (int)header[6];
    int64_t size = (int64_t)st.st_size - (int64_t)sizeof(header);
    if (t->vocab_size < 1 || t->vocab_size > size) {
        die("tokenizer %s is invalid: vocabulary of %d tokens in %lld bytes; make it again", path,
            t->vocab_size, (long long)size);
    }
    if (t->eot < -1 || t->eot >= t->vocab_size || t->kind < TOKENIZER_BYTES || t->kind > TOKENIZER_BPE) {
        die("tokenizer %s is invalid: kind %d (0 to 2 expected), end-of-text %d of %d tokens; make it again",
            path, t->kind, t->eot, t->vocab_size);
    }
    if (t->pretokenizer < PRETOKENIZER_GPT2 || t->pretokenizer > PRETOKENIZER_CL100K ||
        t->ignore_merges < 0 || t->ignore_merges > 1) {
        die("tokenizer %s is invalid: pretokenizer %d (0 to 3 expected), ignore_merges %d (0 or 1); make it "
            "again",
            path, t->pretokenizer, t->ignore_merges);
    }

    unsigned char *file_bytes = (unsigned char *)xmalloc((size_t)size);
    if (fread(file_bytes, 1, (size_t)size, f) != (size_t)size)
        die("cannot read tokenizer %s: check its disk", path);
    fclose(f);
    t->bytes = (char *)xmalloc((size_t)size);
    t->offsets = (int64_t *)xmalloc((size_t)(t->vocab_size + 1) * sizeof(int64_t));
    t->rank = (int32_t *)xmalloc((size_t)t->vocab_size * sizeof(int32_t));
    int64_t offset = 0, length_bytes = llmc ? 1 : 2, rank_bytes = !llmc && t->kind == TOKENIZER_BPE ? 4 : 0;
    t->offsets[0] = 0;
    for (int i = 0; i < t->vocab_size; i++) {
        int64_t length = 0;
        if (offset + length_bytes <= size)
            length = llmc ? file_bytes[offset] : file_bytes[offset] | file_bytes[offset + 1] << 8;
        if (offset + length_bytes + length + rank_bytes > size) {
            die("tokenizer %s is truncated: its %lld bytes end within token %d of %d; make it again", path,
                (long long)st.st_size, i, t->vocab_size);
        }
        memcpy(t->bytes + t->offsets[i], file_bytes + offset + length_bytes, (size_t)length);
        t->offsets[i + 1] = t->offsets[i] + length;
        if (length > t->max_token_bytes) t->max_token_bytes = length;
        offset += length_bytes + length;
        t->rank[i] = llmc && i != t->eot ? i : -1;
        if (rank_bytes > 0) memcpy(&t->rank[i], file_bytes + offset, 4);
        offset += rank_bytes;
    }
    if (offset != size) {
        die("tokenizer %s is too long: %lld bytes follow its %d tokens; make it again", path,
            (long long)(size - offset), t->vocab_size);
    }
    free(file_bytes);

    // neither table contains the end-of-text token, because text never encodes to it
    for (t->table_size = 4; t->table_size < 2 * (int64_t)t->vocab_size;) t->table_size *= 2;
    t->table = (int32_t *)xmalloc((size_t)t->table_size * sizeof(int32_t));
    memset(t->table, 0xff, (size_t)t->table_size * sizeof(int32_t));
    memset(t->byte_id, 0xff, sizeof(t->byte_id));
    for (int i = t->vocab_size - 1; i >= 0;
         i--) { // downwards: of tokens with the same text the first one wins
        int n;
        const char *piece = tokenizer_piece(t, i, &n);
        if (i == t->eot || n == 0) continue;
        if (n == 1) t->byte_id[(unsigned char)piece[0]] = i;
        if (t->kind == TOKENIZER_BPE && t->rank[i] < 0) continue;
        t->table[tokenizer_slot(t, piece, n)] = i;
    }
    return 0;
}

// Writes a tokenizer.bin atomically. Token i is pieces[i] with lengths[i] bytes. ranks [vocab_size] for kind
// BPE, else NULL.
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
            die("cannot write %s: token %d has %d bytes, at most 65535 are possible", path, i, lengths[i]);
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

// Character classes of the pre-tokenizers. CHAR_END: the end of the text, or a byte that is not UTF-8.
enum { CHAR_END, CHAR_SPACE, CHAR_LETTER, CHAR_NUMBER, CHAR_OTHER };

// Decodes the first character of text [len] into *c. Returns its length in bytes, or 0 if the text is empty
// or not valid UTF-8.
static inline int64_t tokenizer_decode_utf8(const char *text, int64_t len, uint32_t *c) {
    static const uint32_t min_code_point[] = {0, 0, 0x80, 0x800, 0x10000}; // of n bytes
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
    return *c < min_code_point[n] || *c > 0x10ffff || (*c >= 0xd800 && *c < 0xe000) ? 0 : n;
}

// Returns the class of the first character, and its length in bytes in *n.
static inline int tokenizer_char_class(const char *text, int64_t len, int64_t *n) {
    uint32_t c;
    *n = tokenizer_decode_utf8(text, len, &c);
    if (*n == 0) return CHAR_END;
    if (UNICODE_HAS(UNICODE_LETTERS, c)) return CHAR_LETTER;
    if (UNICODE_HAS(UNICODE_NUMBERS, c)) return CHAR_NUMBER;
    return UNICODE_HAS(UNICODE_SPACES, c) ? CHAR_SPACE : CHAR_OTHER;
}

// Returns the length in bytes of the longest prefix of at most max_chars characters that all have
// wanted_class.
static inline int64_t tokenizer_span(const char *text, int64_t len, int wanted_class, int64_t max_chars) {
    int64_t bytes = 0, n;
    while (max_chars-- > 0 && tokenizer_char_class(text + bytes, len - bytes, &n) == wanted_class) bytes += n;
    return bytes;
}

static inline int tokenizer_is_newline(const char *text, int64_t len) {
    return len > 0 && (*text == '\n' || *text == '\r');
}

// Returns the length in bytes of a contraction ('s 't 're 've 'm 'll 'd) at the start of the text, else 0.
// any_case 1: also upper case.
static inline int64_t tokenizer_contraction(const char *text, int64_t len, int any_case) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    if (len < 2 || text[0] != '\'') return 0;
    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        const char *letter = endings[i];
        int64_t at = 1;
        for (; *letter; letter++) {
            uint32_t c;
            at += tokenizer_decode_utf8(text + at, len - at, &c);
            if (any_case && c >= 'A' && c <= 'Z') c += 'a' - 'A';
            if (any_case && c == 0x17f) c = 's'; // the long s
            if (c != (uint32_t)*letter) break;
        }
        if (*letter == 0) return at;
    }
    return 0;
}

// Returns the length in bytes of the first pre-token of text [len], len >= 1. Merges never cross pre-tokens.
// The regular expressions of the pre-tokenizers, with \w for \p{L}, \d for \p{N} and \o for [^\s\w\d]:
//   GPT-2    's|'t|'re|'ve|'m|'ll|'d| ?\w+| ?\d+| ?\o+|\s+(?!\S)|\s+
//   Llama 3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\w\d]?\w+|\d{1,3}| ?\o+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
// A byte that is not UTF-8 is a pre-token of its own.
static inline int64_t tokenizer_pretoken_length(int pretokenizer, const char *text, int64_t len) {
    int64_t first_bytes, second_bytes;
    int char_class = tokenizer_char_class(text, len, &first_bytes);
    if (char_class == CHAR_END) return 1;
    int64_t n = tokenizer_contraction(text, len, pretokenizer != PRETOKENIZER_GPT2);
    if (n > 0) return n;
    int space = text[0] == ' ';
    int next_class = tokenizer_char_class(text + first_bytes, len - first_bytes, &second_bytes);
    if (pretokenizer == PRETOKENIZER_GPT2) {
        if (char_class != CHAR_SPACE) return tokenizer_span(text, len, char_class, len);
        if (space && next_class >= CHAR_LETTER) return 1 + tokenizer_span(text + 1, len - 1, next_class, len);
    } else {
        int is_prefix =
            char_class == CHAR_OTHER || (char_class == CHAR_SPACE && !tokenizer_is_newline(text, len));
        if (char_class == CHAR_LETTER) return tokenizer_span(text, len, CHAR_LETTER, len);
        if (is_prefix && next_class == CHAR_LETTER)
            return first_bytes + tokenizer_span(text + first_bytes, len - first_bytes, CHAR_LETTER, len);
        if (char_class == CHAR_NUMBER)
            return tokenizer_span(text, len, CHAR_NUMBER, pretokenizer == PRETOKENIZER_QWEN ? 1 : 3);
        if (char_class == CHAR_OTHER || (space && next_class == CHAR_OTHER)) {
            n = space + tokenizer_span(text + space, len - space, CHAR_OTHER, len);
            while (tokenizer_is_newline(text + n, len - n)) n++;
            return n;
        }
    }
    // white space: up to its last newline. Without a newline its last character belongs to the next
    // pre-token.
    int64_t span = tokenizer_span(text, len, CHAR_SPACE, len), last_char = 0, end;
    int at_text_end = tokenizer_char_class(text + span, len - span, &n) == CHAR_END;
    if (pretokenizer == PRETOKENIZER_CL100K && at_text_end) return span;
    for (end = span; pretokenizer != PRETOKENIZER_GPT2 && end > 0; end--) {
        if (tokenizer_is_newline(text + end - 1, 1)) return end;
    }
    if (at_text_end || span == first_bytes) return span;
    for (end = 0; end < span; end += n) {
        tokenizer_char_class(text + end, len - end, &n);
        last_char = end;
    }
    return last_char;
}

// Encodes one pre-token: starts from single bytes and merges the adjacent pair of lowest rank until no pair
// is a token. Token i is text [start[i], start[i + 1]); start has space for len + 1 numbers. Returns the
// number of tokens. The time is quadratic in len, which is the length of a word.
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

// Dies because no token matches the start of words [len], in which one space follows each word.
LLMC_NORETURN static inline void tokenizer_die_unknown_word(const Tokenizer *t, const char *words,
                                                            int64_t len) {
    int word_bytes = 0, length;
    while (word_bytes < len && words[word_bytes] != ' ') word_bytes++;
    int shown = word_bytes < 200 ? word_bytes : 200;
    for (int i = 0; i < t->vocab_size; i++) {
        const char *piece = tokenizer_piece(t, i, &length);
        if (i == t->eot || length <= word_bytes || memcmp(piece, words, (size_t)word_bytes + 1) != 0)
            continue;
        die("the vocabulary has no word '%.*s' (did you mean '%.*s'?)", shown, words,
            length < 200 ? length : 200, piece);
    }
    die("the vocabulary has no word '%.*s'; separate words and punctuation by spaces", shown, words);
}

// tokenizer_encode for kind words: repeatedly takes the longest token that matches the next words.
static inline int64_t tokenizer_encode_words(const Tokenizer *t, const char *text, int64_t len, int32_t *out,
                                             int64_t max) {
    char *words = (char *)xmalloc((size_t)len + 1); // the words of the text, each followed by one space
    int64_t words_bytes = 0, count = 0, token_bytes;
    for (int64_t i = 0; i <= len; i++) {
        int space = i == len || tokenizer_is_space(text[i]);
        if (!space) words[words_bytes++] = text[i];
        if (space && words_bytes > 0 && words[words_bytes - 1] != ' ') words[words_bytes++] = ' ';
    }
    for (int64_t begin = 0; begin < words_bytes; begin += token_bytes + 1) {
        int32_t id = -1;
        token_bytes = 0;
        for (int64_t i = 1; i <= t->max_token_bytes && begin + i < words_bytes; i++) {
            int32_t candidate = words[begin + i] == ' ' ? t->table[tokenizer_slot(t, words + begin, i)] : -1;
            if (candidate < 0) continue;
            id = candidate;
            token_bytes = i;
        }
        if (id < 0) tokenizer_die_unknown_word(t, words + begin, words_bytes - begin);
        if (count < max) out[count] = id;
        count++;
    }
    free(words);
    return count;
}

// Encodes text [len]. Writes the first `max` tokens to `out` and returns the number of all tokens, which may
// be larger. Dies on a word or byte that is not in the vocabulary.
static inline int64_t tokenizer_encode(const Tokenizer *t, const char *text, int64_t len, int32_t *out,
                                       int64_t max) {
    if (t->kind == TOKENIZER_WORDS) return tokenizer_encode_words(t, text, len, out, max);
    int64_t count = 0, begin = 0;
    int64_t *start =
        t->kind == TOKENIZER_BPE ? (int64_t *)xmalloc((size_t)(len + 1) * sizeof(int64_t)) : NULL;
    while (begin < len) {
        int64_t pretoken_bytes = 1, tokens = 1; // for kind bytes each byte is a pre-token
        if (t->kind == TOKENIZER_BPE) {
            pretoken_bytes = tokenizer_pretoken_length(t->pretokenizer, text + begin, len - begin);
            start[0] = 0;
            start[1] = pretoken_bytes;
            if (!t->ignore_merges || t->table[tokenizer_slot(t, text + begin, pretoken_bytes)] < 0)
                tokens = tokenizer_merge(t, text + begin, pretoken_bytes, start);
        }
        for (int64_t i = 0; i < tokens; i++) {
            int64_t token_begin = begin + (start != NULL ? start[i] : 0);
            int64_t token_bytes = start != NULL ? start[i + 1] - start[i] : pretoken_bytes;
            int32_t id = token_bytes == 1 ? t->byte_id[(unsigned char)text[token_begin]]
                                          : t->table[tokenizer_slot(t, text + token_begin, token_bytes)];
            if (id < 0)
                die("the vocabulary has no token for byte 0x%02x: leave it out of the text",
                    (unsigned char)text[token_begin]);
            if (count < max) out[count] = id;
            count++;
        }
        begin += pretoken_bytes;
    }
    free(start);
    return count;
}

// Prints tokens [n] as text. Omits ids outside the vocabulary, and control characters except newline, return
// and tab, because a terminal could interpret them.
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
