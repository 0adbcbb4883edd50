// tokenizer.h: encodes text to token ids and decodes them. Reads and writes tokenizer.bin; also reads llm.c's
// tokenizer.bin.
//
// tokenizer.bin has a header of 256 int32 (-1: there is no such token):
//   0  magic 20260801             6  ignore_merges, 0 or 1     12  split_spaces, 0 or 1
//   1  version, 1 or 2            7  id of BOS or -1           13  number of end-of-sequence ids, up to 32
//   2  vocab_size                 8  id of unknown or -1       14  the end-of-sequence ids
//   3  id of end-of-text or -1    9  fuse_unknown, 0 or 1
//   4  kind                      10  number of merges
//   5  pretokenizer              11  prefix
// Version 1 has fields 0 to 6: BOS and the only end-of-sequence token are end-of-text. Then follow for each
// token its length (uint16), its bytes, for kinds 2 and 3 its merge rank (int32), and in version 2 its flags
// (uint8, TOKEN_VOCAB and following). Then follow the merges, lowest rank first: the ids of the left, the
// right and the merged token (3 int32).
//   kind 0, bytes: each token is one byte. Text is the concatenation of the tokens.
//   kind 1, words: a token is a word, or several words with one space between them. Text is the tokens
//     joined by one space. The encoder takes the longest matching token.
//   kind 2, byte-level BPE: text is the concatenation of the tokens. The pre-tokenizer splits text into
//     pre-tokens. A pre-token begins as single bytes. The encoder merges adjacent tokens, lowest rank first,
//     and leftmost of equal ranks. A file with merges has the rank of each pair of tokens. A file without
//     merges merges any two tokens whose bytes together are a token, with that token's rank; rank -1: no
//     merge makes this token. ignore_merges 1: a pre-token that is in the vocabulary becomes that token
//     without merges.
//   kind 3, SentencePiece BPE: as kind 2, but a pre-token begins as single characters, and the pre-token is
//     the whole text (split_spaces 1: begins at each space). A character that is no token becomes its bytes
//     (TOKEN_BYTE). A space stands for SentencePiece's U+2581. `prefix` (PREFIX_NONE and following) adds a
//     space to the start of the text, which printing removes.
// A byte or character without a token becomes the unknown token, or is an error if there is none.
// fuse_unknown 1: several in a row become one unknown token.
// llm.c's file has a header of 256 uint32, {magic 20240328, version 1 or 2, vocab_size, end-of-text}. Version
// 1 has end-of-text 50256. Then follow for each token its length (uint8) and bytes. It is a BPE whose ranks
// are its ids.
#ifndef LLMC_TOKENIZER_H
#define LLMC_TOKENIZER_H

#include "unicode.h"
#include "input.h"

#define TOKENIZER_MAGIC 20260801
#define TOKENIZER_LLMC_MAGIC 20240328
#define TOKENIZER_MAX_BYTES (1 << 28) // of a file
enum { TOKENIZER_MAX_EOS = 32 };
enum { TOKENIZER_BYTES = 0, TOKENIZER_WORDS = 1, TOKENIZER_BPE = 2, TOKENIZER_SENTENCEPIECE = 3 };
// Pre-tokenizers. Llama 3's groups up to three digits, Qwen's takes digits one by one. cl100k is Llama 3's
// except for white space at the end of the text. SmolLM's is GPT-2's between single digits.
enum {
    PRETOKENIZER_GPT2 = 0,
    PRETOKENIZER_LLAMA3 = 1,
    PRETOKENIZER_QWEN = 2,
    PRETOKENIZER_CL100K = 3,
    PRETOKENIZER_SMOLLM = 4
};
// Where kind SentencePiece adds a space. ALWAYS: to the start of each text between raw added tokens.
// UNLESS_SPACE: to the start of each text between added tokens that does not begin with a space. FIRST: as
// UNLESS_SPACE, but only to the start of the whole text.
enum { PREFIX_NONE = 0, PREFIX_ALWAYS = 1, PREFIX_UNLESS_SPACE = 2, PREFIX_FIRST = 3 };
// Flags of a token. Added tokens are found in the text before it is split, the longest one first.
enum {
    TOKEN_VOCAB = 1,       // merges, or a single byte or character, can give this token
    TOKEN_BYTE = 2,        // one byte of a character that is no token
    TOKEN_ADDED = 4,       // an added token
    TOKEN_SPECIAL = 8,     // an added token that only a prompt can contain
    TOKEN_NORMALIZED = 16, // is found after the space of `prefix` is added, behind the raw added tokens
    TOKEN_LSTRIP = 32,     // takes the white space before it
    TOKEN_RSTRIP = 64,     // takes the white space after it
    TOKEN_METASPACE = 128  // is written with U+2581 for each space
};

// An added token in the form in which it is found in text.
typedef struct TokenizerAdded {
    char *text;
    int len;
    int32_t id;
} TokenizerAdded;

// Added tokens that are found in the same pass, sorted by first byte, then longest first. Those that begin
// with byte b are list [first[b], first[b + 1]).
typedef struct TokenizerAddedList {
    TokenizerAdded *list;
    int count, first[257];
} TokenizerAddedList;

typedef struct Tokenizer {
    int kind, vocab_size, eot;       // eot: id of the end-of-text token, -1: none
    int pretokenizer, ignore_merges; // for kind BPE
    int bos;                         // the token before a prompt, -1: none
    int unknown, fuse_unknown;       // unknown: -1: none
    int prefix, split_spaces;        // for kind SentencePiece
    int num_eos;                     // number of tokens that end a generated text
    int32_t eos[TOKENIZER_MAX_EOS];  // [num_eos]
    char *bytes;                     // all tokens, concatenated
    int64_t *offsets;                // [vocab_size + 1], offset in `bytes` of each token
    int32_t *rank;                   // [vocab_size], merge priority, -1: no merge makes this token
    uint8_t *flags;                  // [vocab_size]
    int32_t byte_id[256];            // token of each single byte, or -1
    int32_t *table;                  // [table_size], hash table from text to id, -1: empty slot
    int64_t table_size;              // a power of two
    int64_t max_token_bytes;         // bytes of the longest token
    int32_t *merges;                 // [num_merges][3], ids of left, right and merged token
    int64_t num_merges;              // 0: merge by the ranks of the tokens
    int32_t *merge_table;            // [merge_table_size], hash table from (left, right) to the merge, or -1
    int64_t merge_table_size;        // a power of two
    TokenizerAddedList raw, normalized; // added tokens without and with TOKEN_NORMALIZED
} Tokenizer;

static inline void tokenizer_free_added(TokenizerAddedList *a) {
    for (int i = 0; i < a->count; i++) free(a->list[i].text);
    free(a->list);
}

// Frees all memory and clears *t.
static inline void tokenizer_free(Tokenizer *t) {
    free(t->bytes);
    free(t->offsets);
    free(t->rank);
    free(t->flags);
    free(t->table);
    free(t->merges);
    free(t->merge_table);
    tokenizer_free_added(&t->raw);
    tokenizer_free_added(&t->normalized);
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

// Returns the bytes that a token adds to the text: none for a special token; a word's include a space.
static inline int64_t tokenizer_text_bytes(const Tokenizer *t, int id) {
    int bytes;
    tokenizer_piece(t, id, &bytes);
    if (bytes == 0 || id == t->eot || id == t->bos || (t->flags[id] & TOKEN_SPECIAL)) return 0;
    return bytes + (t->kind == TOKENIZER_WORDS);
}

// Returns the CRC-32 of the ids (int32) and bytes of the tokens that text becomes. It does not depend on
// added and unused tokens, BOS or end-of-text, which may differ between a model, its data and its evaluation
// files.
static inline uint32_t tokenizer_checksum(const Tokenizer *t) {
    uint32_t crc = UINT32_MAX;
    for (int id = 0; id < t->vocab_size; id++) {
        int len;
        const char *piece = tokenizer_piece(t, id, &len);
        int reachable = len == 1 || t->rank[id] >= 0 || t->kind < TOKENIZER_BPE;
        if ((t->flags[id] & (TOKEN_VOCAB | TOKEN_ADDED)) != TOKEN_VOCAB || !reachable) continue;
        for (int i = -4; i < len; i++) {
            crc ^= (unsigned char)(i < 0 ? id >> 8 * (i + 4) : piece[i]);
            for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    return ~crc;
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

// Returns the hash table's slot of the merge of two tokens, or the empty slot where it would be inserted.
static inline int64_t tokenizer_merge_slot(const Tokenizer *t, int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15ull;
    int64_t slot = (int64_t)((h ^ (h >> 32)) & (uint64_t)(t->merge_table_size - 1));
    for (; t->merge_table[slot] >= 0; slot = (slot + 1) & (t->merge_table_size - 1)) {
        const int32_t *merge = t->merges + 3 * (int64_t)t->merge_table[slot];
        if (merge[0] == left && merge[1] == right) break;
    }
    return slot;
}

// Reads the header of a tokenizer into *t and checks it. size: bytes behind the header.
static inline void tokenizer_read_header(Tokenizer *t, const char *path, const int32_t *header,
                                         int64_t size) {
    int llmc = header[0] == TOKENIZER_LLMC_MAGIC, version = header[1];
    if (!llmc && header[0] != TOKENIZER_MAGIC) {
        die("%s is not a tokenizer: magic %d found, %d or llm.c's %d expected; make it again", path,
            header[0], TOKENIZER_MAGIC, TOKENIZER_LLMC_MAGIC);
    }
    if (version != 1 && version != 2)
        die("tokenizer %s has version %d, 1 or 2 expected; make it again", path, version);
    t->vocab_size = header[2];
    t->eot = llmc && version == 1 ? 50256 : header[3];
    t->kind = llmc ? TOKENIZER_BPE : header[4];
    t->pretokenizer = llmc ? PRETOKENIZER_GPT2 : header[5];
    t->ignore_merges = llmc ? 0 : header[6];
    t->bos = t->eos[0] = t->eot;
    t->unknown = -1;
    t->num_eos = t->eot >= 0;
    if (!llmc && version == 2) {
        t->bos = header[7];
        t->unknown = header[8];
        t->fuse_unknown = header[9];
        t->num_merges = header[10];
        t->prefix = header[11];
        t->split_spaces = header[12];
        t->num_eos = header[13];
    }
    if (t->vocab_size < 1 || t->vocab_size > size) {
        die("tokenizer %s is invalid: vocabulary of %d tokens in %lld bytes; make it again", path,
            t->vocab_size, (long long)size);
    }
    if (t->eot < -1 || t->eot >= t->vocab_size || t->kind < TOKENIZER_BYTES ||
        t->kind > TOKENIZER_SENTENCEPIECE) {
        die("tokenizer %s is invalid: kind %d (0 to 3 expected), end-of-text %d of %d tokens; make it again",
            path, t->kind, t->eot, t->vocab_size);
    }
    if (t->pretokenizer < PRETOKENIZER_GPT2 || t->pretokenizer > PRETOKENIZER_SMOLLM ||
        t->ignore_merges < 0 || t->ignore_merges > 1) {
        die("tokenizer %s is invalid: pretokenizer %d (0 to 4 expected), ignore_merges %d (0 or 1); make it "
            "again",
            path, t->pretokenizer, t->ignore_merges);
    }
    if (t->bos < -1 || t->bos >= t->vocab_size || t->unknown < -1 || t->unknown >= t->vocab_size ||
        t->num_eos < 0 || t->num_eos > TOKENIZER_MAX_EOS) {
        die("tokenizer %s is invalid: BOS %d and unknown %d of %d tokens, %d end-of-sequence tokens (at most "
            "%d); make it again",
            path, t->bos, t->unknown, t->vocab_size, t->num_eos, TOKENIZER_MAX_EOS);
    }
    if (t->fuse_unknown < 0 || t->fuse_unknown > 1 || t->split_spaces < 0 || t->split_spaces > 1 ||
        t->prefix < PREFIX_NONE || t->prefix > PREFIX_FIRST || t->num_merges < 0 ||
        t->num_merges > size / 12) {
        die("tokenizer %s is invalid: fuse_unknown %d (0 or 1), %lld merges in %lld bytes, prefix %d (0 to "
            "3), split_spaces %d (0 or 1); make it again",
            path, t->fuse_unknown, (long long)t->num_merges, (long long)size, t->prefix, t->split_spaces);
    }
    for (int i = 0; i < t->num_eos; i++) {
        if (!llmc && version == 2) t->eos[i] = header[14 + i];
        if (t->eos[i] < 0 || t->eos[i] >= t->vocab_size)
            die("tokenizer %s is invalid: end-of-sequence %d of %d tokens; make it again", path, t->eos[i],
                t->vocab_size);
    }
}

// Makes the hash tables from text to id, from pair to merge, and byte_id.
static inline void tokenizer_make_tables(Tokenizer *t) {
    for (t->table_size = 4; t->table_size < 2 * (int64_t)t->vocab_size;) t->table_size *= 2;
    t->table = (int32_t *)xmalloc((size_t)t->table_size * sizeof(int32_t));
    memset(t->table, 0xff, (size_t)t->table_size * sizeof(int32_t));
    memset(t->byte_id, 0xff, sizeof(t->byte_id));
    // downwards: of tokens with the same text the first one wins
    for (int i = t->vocab_size - 1; i >= 0; i--) {
        int n, flag = t->kind == TOKENIZER_SENTENCEPIECE ? TOKEN_BYTE : TOKEN_VOCAB;
        const char *piece = tokenizer_piece(t, i, &n);
        if (n == 1 && t->flags[i] & flag) t->byte_id[(unsigned char)piece[0]] = i;
        if (n > 0 && t->flags[i] & TOKEN_VOCAB) t->table[tokenizer_slot(t, piece, n)] = i;
    }
    for (t->merge_table_size = 4; t->merge_table_size < 2 * t->num_merges;) t->merge_table_size *= 2;
    t->merge_table = (int32_t *)xmalloc((size_t)t->merge_table_size * sizeof(int32_t));
    memset(t->merge_table, 0xff, (size_t)t->merge_table_size * sizeof(int32_t));
    for (int64_t i = t->num_merges - 1; i >= 0; i--)
        t->merge_table[tokenizer_merge_slot(t, t->merges[3 * i], t->merges[3 * i + 1])] = (int32_t)i;
}

static inline int tokenizer_compare_added(const void *a, const void *b) {
    const TokenizerAdded *x = (const TokenizerAdded *)a, *y = (const TokenizerAdded *)b;
    int difference = (unsigned char)x->text[0] - (unsigned char)y->text[0];
    if (difference == 0) difference = y->len - x->len;
    return difference ? difference : x->id - y->id;
}

// Lists the added tokens whose flag TOKEN_NORMALIZED is `normalized`.
static inline void tokenizer_list_added(Tokenizer *t, TokenizerAddedList *a, int normalized) {
    a->list = (TokenizerAdded *)xcalloc((size_t)t->vocab_size, sizeof(TokenizerAdded));
    for (int i = 0; i < t->vocab_size; i++) {
        int n, flags = t->flags[i];
        const char *piece = tokenizer_piece(t, i, &n);
        if (!(flags & TOKEN_ADDED) || !(flags & TOKEN_NORMALIZED) != !normalized || n == 0) continue;
        TokenizerAdded *added = &a->list[a->count++];
        added->id = i;
        added->text = (char *)xmalloc(3 * (size_t)n + 1);
        if (normalized && t->prefix == PREFIX_ALWAYS) added->text[added->len++] = ' ';
        for (int j = 0; j < n; j++) {
            int metaspace = !normalized && flags & TOKEN_METASPACE && piece[j] == ' ';
            memcpy(added->text + added->len, metaspace ? "\xe2\x96\x81" : piece + j, metaspace ? 3 : 1);
            added->len += metaspace ? 3 : 1;
        }
    }
    qsort(a->list, (size_t)a->count, sizeof(TokenizerAdded), tokenizer_compare_added);
    for (int i = 0, b = 0; b <= 256; b++) {
        while (i < a->count && (unsigned char)a->list[i].text[0] < b) i++;
        a->first[b] = i;
    }
}

// Reads a tokenizer. Returns 0, or 1 if the file does not exist; dies if the file is invalid.
static inline int tokenizer_load(Tokenizer *t, const char *path) {
    int32_t header[256];
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
    int64_t size = (int64_t)st.st_size - (int64_t)sizeof(header);
    tokenizer_read_header(t, path, header, size);

    unsigned char *file_bytes = (unsigned char *)xmalloc((size_t)size);
    if (fread(file_bytes, 1, (size_t)size, f) != (size_t)size)
        die("cannot read tokenizer %s: check its disk", path);
    fclose(f);
    t->bytes = (char *)xmalloc((size_t)size);
    t->offsets = (int64_t *)xmalloc((size_t)(t->vocab_size + 1) * sizeof(int64_t));
    t->rank = (int32_t *)xmalloc((size_t)t->vocab_size * sizeof(int32_t));
    t->flags = (uint8_t *)xmalloc((size_t)t->vocab_size);
    int llmc = header[0] == TOKENIZER_LLMC_MAGIC, bpe = t->kind >= TOKENIZER_BPE;
    int64_t offset = 0, length_bytes = llmc ? 1 : 2, rank_bytes = !llmc && bpe ? 4 : 0;
    int64_t flag_bytes = !llmc && header[1] == 2;
    t->offsets[0] = 0;
    for (int i = 0; i < t->vocab_size; i++) {
        int64_t length = 0;
        if (offset + length_bytes <= size)
            length = llmc ? file_bytes[offset] : file_bytes[offset] | file_bytes[offset + 1] << 8;
        if (offset + length_bytes + length + rank_bytes + flag_bytes > size) {
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
        // in version 1 text never encodes to the end-of-text token
        t->flags[i] = i != t->eot && (!bpe || t->rank[i] >= 0 || length == 1) ? TOKEN_VOCAB : 0;
        if (flag_bytes > 0) t->flags[i] = file_bytes[offset];
        offset += flag_bytes;
    }
    int64_t excess = size - offset - 12 * t->num_merges;
    if (excess != 0) {
        die("tokenizer %s is too %s: %lld bytes follow its %d tokens, its %lld merges have %lld; make it "
            "again",
            path, excess > 0 ? "long" : "short", (long long)(size - offset), t->vocab_size,
            (long long)t->num_merges, (long long)(12 * t->num_merges));
    }
    t->merges = (int32_t *)xmalloc(12 * (size_t)t->num_merges + 1);
    memcpy(t->merges, file_bytes + offset, 12 * (size_t)t->num_merges);
    for (int64_t i = 0; i < 3 * t->num_merges; i++) {
        if (t->merges[i] < 0 || t->merges[i] >= t->vocab_size)
            die("tokenizer %s is invalid: merge %lld has token %d of %d; make it again", path,
                (long long)(i / 3), t->merges[i], t->vocab_size);
    }
    free(file_bytes);
    tokenizer_make_tables(t);
    tokenizer_list_added(t, &t->raw, 0);
    tokenizer_list_added(t, &t->normalized, 1);
    return 0;
}

// Returns whether the token ends a generated text.
static inline int tokenizer_is_eos(const Tokenizer *t, int id) {
    for (int i = 0; i < t->num_eos; i++)
        if (t->eos[i] == id) return 1;
    return 0;
}

// Writes a tokenizer.bin of version 1 atomically. Token i is pieces[i] with lengths[i] bytes. ranks
// [vocab_size] for kind BPE, else NULL.
static inline void tokenizer_write(const char *path, int kind, int vocab_size, int eot,
                                   const char *const *pieces, const int *lengths, const int32_t *ranks) {
    int32_t header[256] = {TOKENIZER_MAGIC, 1, 0};
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
//   SmolLM   \d|'s|'t|'re|'ve|'m|'ll|'d| ?\w+| ?\o+|\s+(?=\d)|\s+(?!\S)|\s+
//   Llama 3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\w\d]?\w+|\d{1,3}| ?\o+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
// A byte that is not UTF-8 is a pre-token of its own.
static inline int64_t tokenizer_pretoken_length(int pretokenizer, const char *text, int64_t len) {
    int64_t first_bytes, second_bytes;
    int char_class = tokenizer_char_class(text, len, &first_bytes);
    if (char_class == CHAR_END) return 1;
    int smollm = pretokenizer == PRETOKENIZER_SMOLLM, gpt2 = pretokenizer == PRETOKENIZER_GPT2 || smollm;
    int64_t n = tokenizer_contraction(text, len, !gpt2);
    if (n > 0) return n;
    if (smollm && char_class == CHAR_NUMBER) return first_bytes;
    int space = text[0] == ' ';
    int next_class = tokenizer_char_class(text + first_bytes, len - first_bytes, &second_bytes);
    if (gpt2) {
        if (char_class != CHAR_SPACE) return tokenizer_span(text, len, char_class, len);
        if (space && next_class >= CHAR_LETTER && !(smollm && next_class == CHAR_NUMBER))
            return 1 + tokenizer_span(text + 1, len - 1, next_class, len);
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
    int class_after = tokenizer_char_class(text + span, len - span, &n);
    int at_text_end = class_after == CHAR_END || (smollm && class_after == CHAR_NUMBER);
    if (pretokenizer == PRETOKENIZER_CL100K && at_text_end) return span;
    for (end = span; !gpt2 && end > 0; end--) {
        if (tokenizer_is_newline(text + end - 1, 1)) return end;
    }
    if (at_text_end || span == first_bytes) return span;
    for (end = 0; end < span; end += n) {
        tokenizer_char_class(text + end, len - end, &n);
        last_char = end;
    }
    return last_char;
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

// Encodes text of kind words: repeatedly takes the longest token that matches the next words.
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

// A token of a pre-token during the merges.
typedef struct TokenizerSymbol {
    int32_t start, len; // bytes [start, start + len) of the pre-token; len 0: merged into an earlier symbol
    int32_t id;         // -1: no token
    int32_t prev, next; // neighbors, -1: none
} TokenizerSymbol;

// A possible merge of a symbol with its next one.
typedef struct TokenizerMerge {
    int32_t rank, symbol;
    int32_t len, id; // of the merged token
} TokenizerMerge;

typedef struct TokenizerEncoder {
    const Tokenizer *t;
    int special; // 1: special tokens in the text become their ids
    int32_t *out;
    int64_t max, count;       // count: of all tokens; out has the first max
    int64_t capacity;         // of the arrays below, in bytes of a pre-token
    TokenizerSymbol *symbols; // [capacity]
    TokenizerMerge *heap;     // [2 * capacity], the possible merges, lowest rank first
    int64_t heap_size;
} TokenizerEncoder;

static inline void tokenizer_emit(TokenizerEncoder *e, int32_t id) {
    if (e->count < e->max) e->out[e->count] = id;
    e->count++;
}

// The order of the heap: lowest rank first, then leftmost.
static inline int tokenizer_merges_before(const TokenizerMerge *a, const TokenizerMerge *b) {
    return a->rank < b->rank || (a->rank == b->rank && a->symbol < b->symbol);
}

static inline void tokenizer_heap_push(TokenizerEncoder *e, TokenizerMerge merge) {
    int64_t i = e->heap_size++;
    for (; i > 0 && tokenizer_merges_before(&merge, &e->heap[(i - 1) / 2]); i = (i - 1) / 2)
        e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = merge;
}

static inline TokenizerMerge tokenizer_heap_pop(TokenizerEncoder *e) {
    TokenizerMerge top = e->heap[0], last = e->heap[--e->heap_size];
    int64_t i = 0, child;
    for (; (child = 2 * i + 1) < e->heap_size; i = child) {
        if (child + 1 < e->heap_size && tokenizer_merges_before(&e->heap[child + 1], &e->heap[child]))
            child++;
        if (!tokenizer_merges_before(&e->heap[child], &last)) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return top;
}

// Adds the merge of a symbol with its next one to the heap, if there is one.
static inline void tokenizer_push_merge(TokenizerEncoder *e, const char *text, int32_t symbol) {
    const Tokenizer *t = e->t;
    if (symbol < 0 || e->symbols[symbol].next < 0) return;
    const TokenizerSymbol *left = &e->symbols[symbol], *right = &e->symbols[left->next];
    TokenizerMerge merge = {-1, symbol, left->len + right->len, -1};
    if (t->num_merges > 0) {
        merge.rank = t->merge_table[tokenizer_merge_slot(t, left->id, right->id)];
        if (merge.rank >= 0) merge.id = t->merges[3 * (int64_t)merge.rank + 2];
    } else if (merge.len <= t->max_token_bytes) {
        merge.id = t->table[tokenizer_slot(t, text + left->start, merge.len)];
        if (merge.id >= 0) merge.rank = t->rank[merge.id];
    }
    if (merge.rank >= 0) tokenizer_heap_push(e, merge);
}

// Merges the symbols of a pre-token until no merge is left. Takes n log n time for n symbols.
static inline void tokenizer_merge(TokenizerEncoder *e, const char *text, int32_t n) {
    e->heap_size = 0;
    for (int32_t i = 0; i < n; i++) tokenizer_push_merge(e, text, i);
    while (e->heap_size > 0) {
        TokenizerMerge merge = tokenizer_heap_pop(e);
        TokenizerSymbol *left = &e->symbols[merge.symbol];
        if (left->len == 0 || left->next < 0) continue;
        TokenizerSymbol *right = &e->symbols[left->next];
        if (left->len + right->len != merge.len) continue; // one of the two has been merged since
        left->len = merge.len;
        left->id = merge.id;
        left->next = right->next;
        if (left->next >= 0) e->symbols[left->next].prev = merge.symbol;
        right->len = 0;
        tokenizer_push_merge(e, text, left->prev);
        tokenizer_push_merge(e, text, merge.symbol);
    }
}

// Emits the tokens of a character or byte that is no token itself: its bytes, or the unknown token.
// after_unknown: the symbol before it became the unknown token. Returns whether this one does.
static inline int tokenizer_emit_missing(TokenizerEncoder *e, const char *text, int32_t len,
                                         int after_unknown) {
    const Tokenizer *t = e->t;
    int32_t found = 0;
    while (found < len && t->byte_id[(unsigned char)text[found]] >= 0) found++;
    if (found == len) {
        for (int32_t i = 0; i < len; i++) tokenizer_emit(e, t->byte_id[(unsigned char)text[i]]);
        return 0;
    }
    if (t->unknown < 0)
        die("the vocabulary has no token for byte 0x%02x: leave it out of the text",
            (unsigned char)text[found]);
    if (!after_unknown || !t->fuse_unknown) tokenizer_emit(e, t->unknown);
    return 1;
}

// Encodes a pre-token of kind BPE or SentencePiece.
static inline void tokenizer_encode_pretoken(TokenizerEncoder *e, const char *text, int64_t len) {
    const Tokenizer *t = e->t;
    int32_t n = 0, id;
    if (len > INT32_MAX / 2) die("cannot encode a text of %lld bytes at once; split it", (long long)len);
    if (t->ignore_merges && (id = t->table[tokenizer_slot(t, text, len)]) >= 0) {
        tokenizer_emit(e, id);
        return;
    }
    if (len > e->capacity) {
        free(e->symbols);
        free(e->heap);
        e->capacity = 2 * len;
        e->symbols = (TokenizerSymbol *)xmalloc((size_t)e->capacity * sizeof(TokenizerSymbol));
        e->heap = (TokenizerMerge *)xmalloc(2 * (size_t)e->capacity * sizeof(TokenizerMerge));
    }
    for (int32_t start = 0; start < len; n++) {
        uint32_t c;
        int32_t bytes = 1;
        if (t->kind == TOKENIZER_SENTENCEPIECE) {
            bytes = (int32_t)tokenizer_decode_utf8(text + start, len - start, &c);
            id = bytes > 0 ? t->table[tokenizer_slot(t, text + start, bytes)] : -1;
            if (bytes == 0) bytes = 1; // a byte that is not UTF-8
        } else {
            id = t->byte_id[(unsigned char)text[start]];
        }
        TokenizerSymbol symbol = {start, bytes, id, n - 1, n + 1};
        e->symbols[n] = symbol;
        start += bytes;
    }
    e->symbols[n - 1].next = -1;
    tokenizer_merge(e, text, n);
    for (int32_t i = 0, unknown = 0; i >= 0; i = e->symbols[i].next) {
        const TokenizerSymbol *s = &e->symbols[i];
        if (s->id >= 0) tokenizer_emit(e, s->id);
        unknown = s->id < 0 && tokenizer_emit_missing(e, text + s->start, s->len, unknown);
    }
}

// Encodes text between added tokens. first: it is the start of the whole text. text[-1] may be overwritten.
static inline void tokenizer_encode_ordinary(TokenizerEncoder *e, char *text, int64_t len, int first) {
    const Tokenizer *t = e->t;
    if (text[0] != ' ' && (t->prefix == PREFIX_UNLESS_SPACE || (t->prefix == PREFIX_FIRST && first))) {
        *--text = ' ';
        len++;
    }
    for (int64_t begin = 0, n; begin < len; begin += n) {
        n = len - begin;
        if (t->kind == TOKENIZER_BYTES) {
            n = 1;
        } else if (t->kind == TOKENIZER_BPE) {
            n = tokenizer_pretoken_length(t->pretokenizer, text + begin, n);
        } else if (t->split_spaces) {
            const char *space = (const char *)memchr(text + begin + 1, ' ', (size_t)n - 1);
            if (space != NULL) n = space - (text + begin);
        }
        tokenizer_encode_pretoken(e, text + begin, n);
    }
}

// Returns whether white space that an added token takes with it ends at text + end; its bytes in *n.
static inline int tokenizer_space_before(const char *text, int64_t end, int64_t *n) {
    for (*n = 1; *n < 4 && *n < end && ((unsigned char)text[end - *n] & 0xc0) == 0x80;) ++*n;
    int64_t length;
    return *n <= end && tokenizer_char_class(text + end - *n, *n, &length) == CHAR_SPACE && length == *n;
}

// Finds the next added token of the list in text [len], at offset *next or later, and moves *next behind it.
// Returns its id and the part [*begin, *end) that it takes, with its white space from `done` on; or -1 and
// the end of the text.
static inline int32_t tokenizer_find_added(const TokenizerEncoder *e, const TokenizerAddedList *a,
                                           const char *text, int64_t len, int64_t done, int64_t *next,
                                           int64_t *begin, int64_t *end) {
    // behind the normalization U+2581 stands for a space, and is no white space
    int strip_spaces = a == &e->t->raw || e->t->kind != TOKENIZER_SENTENCEPIECE;
    for (; a->count > 0 && *next < len; ++*next) {
        unsigned char first = (unsigned char)text[*next];
        for (int k = a->first[first]; k < a->first[first + 1]; k++) {
            const TokenizerAdded *added = &a->list[k];
            if (added->len > len - *next || memcmp(added->text, text + *next, (size_t)added->len) != 0)
                continue;
            int flags = e->t->flags[added->id];
            int64_t n;
            if (flags & TOKEN_SPECIAL && !e->special) { // is ordinary text as a whole
                *next += added->len - 1;
                break;
            }
            *begin = *next;
            *next = *end = *begin + added->len;
            while (flags & TOKEN_LSTRIP && *begin > done && tokenizer_space_before(text, *begin, &n) &&
                   (strip_spaces || text[*begin - 1] != ' '))
                *begin -= n;
            while (flags & TOKEN_RSTRIP && tokenizer_char_class(text + *end, len - *end, &n) == CHAR_SPACE &&
                   (strip_spaces || text[*end] != ' '))
                *end += n;
            return added->id;
        }
    }
    *begin = *end = len;
    return -1;
}

// Encodes text. normalized: 0: finds the raw added tokens, then normalizes the text between them; 1: finds
// the normalized added tokens, then encodes the text between them. text[-1] may be overwritten. As in the
// tokenizers library, an added token that begins in the white space of the one before it counts too.
static inline void tokenizer_encode_text(TokenizerEncoder *e, char *text, int64_t len, int first,
                                         int normalized) {
    const Tokenizer *t = e->t;
    const TokenizerAddedList *added = normalized ? &t->normalized : &t->raw;
    int64_t done = 0, next = 0, begin, end, n;
    for (int32_t id = 0; id >= 0; done = end) {
        id = tokenizer_find_added(e, added, text, len, done, &next, &begin, &end);
        if (begin > done && normalized)
            tokenizer_encode_ordinary(e, text + done, begin - done, first && done == 0);
        if (begin > done && !normalized) {
            char *copy = (char *)xmalloc((size_t)(begin - done) + 2), *to = copy + 1;
            if (t->prefix == PREFIX_ALWAYS) *to++ = ' ';
            for (int64_t i = done; i < begin; i += n) {
                int metaspace = t->kind == TOKENIZER_SENTENCEPIECE && begin - i >= 3 &&
                                memcmp(text + i, "\xe2\x96\x81", 3) == 0;
                *to++ = metaspace ? ' ' : text[i];
                n = metaspace ? 3 : 1;
            }
            tokenizer_encode_text(e, copy + 1, to - copy - 1, first && done == 0, 1);
            free(copy);
        }
        if (id >= 0) tokenizer_emit(e, id);
    }
}

// Encodes text [len]. Writes the first `max` tokens to `out` and returns the number of all tokens, which may
// be larger. special: 1: special tokens in the text, such as <|im_start|>, become their ids. Dies on a word
// or byte that is not in the vocabulary.
static inline int64_t tokenizer_encode(const Tokenizer *t, const char *text, int64_t len, int special,
                                       int32_t *out, int64_t max) {
    if (t->kind == TOKENIZER_WORDS) return tokenizer_encode_words(t, text, len, out, max);
    TokenizerEncoder e = {t, special, out, max, 0, 0, NULL, NULL, 0};
    char *copy = (char *)xmalloc((size_t)len + 1);
    memcpy(copy, text, (size_t)len);
    tokenizer_encode_text(&e, copy, len, 1, 0);
    free(copy);
    free(e.symbols);
    free(e.heap);
    return e.count;
}

// Prints tokens [n] as text. first: they begin the text, which decides about the space between words and the
// space that `prefix` adds. Omits ids outside the vocabulary, and control characters except newline, return
// and tab, because a terminal could interpret them.
static inline void tokenizer_print(const Tokenizer *t, FILE *f, const int32_t *tokens, int64_t n, int first) {
    for (int64_t i = 0; i < n; i++) {
        int len;
        const char *piece = tokenizer_piece(t, tokens[i], &len);
        if (t->kind == TOKENIZER_WORDS && len > 0 && !first) fputc(' ', f);
        int skip = first && t->prefix != PREFIX_NONE && len > 0 && piece[0] == ' ';
        if (len > 0) first = 0;
        for (int j = skip; j < len; j++) {
            unsigned char c = (unsigned char)piece[j];
            if ((c >= 32 && c != 127) || c == '\n' || c == '\r' || c == '\t') fputc(c, f);
        }
    }
}

#endif
