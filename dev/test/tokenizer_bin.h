// tokenizer_bin.h: writes tokenizer.bin of version 2 (llmc/tokenizer.h) for the tests.
#ifndef TEST_TOKENIZER_BIN_H
#define TEST_TOKENIZER_BIN_H
#include "../../llmc/tokenizer.h"

typedef struct {
    const char *text; // 0-terminated
    int32_t rank;
    int flags; // TOKEN_VOCAB and following
} TestToken;

// Writes `tokens` [vocab_size] and merges [num_merges][3]. fields: the header's numbers from `eot` on, which
// are 0 where not given; those of the sizes are filled in.
static void write_tokenizer_bin(const char *path, const TestToken *tokens, int vocab_size,
                                const int32_t (*merges)[3], int num_merges, const int32_t fields[16]) {
    int32_t header[256] = {TOKENIZER_MAGIC, 2, vocab_size};
    memcpy(header + 3, fields, 16 * sizeof(int32_t));
    header[10] = num_merges;
    FILE *f = fopen(path, "wb");
    if (f == NULL) die("cannot write %s: %s", path, strerror(errno));
    fwrite(header, sizeof(header), 1, f);
    for (int i = 0; i < vocab_size; i++) {
        uint16_t length = (uint16_t)strlen(tokens[i].text);
        uint8_t flags = (uint8_t)tokens[i].flags;
        fwrite(&length, 2, 1, f);
        fwrite(tokens[i].text, 1, length, f);
        if (header[4] >= TOKENIZER_BPE) fwrite(&tokens[i].rank, 4, 1, f);
        fwrite(&flags, 1, 1, f);
    }
    fwrite(merges, sizeof(merges[0]), (size_t)num_merges, f);
    fclose(f);
}

// A small SentencePiece BPE: <unk>, BOS, EOS, all bytes but 0, letters, merges that make "hello", " hello"
// and runs of spaces, and added tokens of each kind.
enum { SP_UNKNOWN, SP_BOS, SP_EOS, SP_BYTES, SP_SPACE = SP_BYTES + 255, SP_H, SP_E, SP_L, SP_O, SP_CJK };
enum { SP_HE = SP_CJK + 1, SP_LL, SP_LLO, SP_HELLO, SP__HELLO, SP_SPACES2, SP_SPACES4 };
enum { SP_USER = SP_SPACES4 + 1, SP_USER_LONG, SP_STRIP, SP_META, SP_WIDE, SP_NORMAL, SP_VOCAB };

static void write_sentencepiece(const char *path, int32_t prefix, int32_t split_spaces, int32_t unknown) {
    static const int32_t merges[][3] = {
        {SP_SPACE, SP_SPACE, SP_SPACES2},     {SP_H, SP_E, SP_HE},   {SP_L, SP_L, SP_LL},
        {SP_SPACES2, SP_SPACES2, SP_SPACES4}, {SP_LL, SP_O, SP_LLO}, {SP_HE, SP_LLO, SP_HELLO},
        {SP_SPACE, SP_HELLO, SP__HELLO},
    };
    static const char *const letters[] = {" ",  "h",   "e",     "l",      "o",  "\xe6\xbc\xa2", "he",
                                          "ll", "llo", "hello", " hello", "  ", "    "};
    static char bytes[256][2];
    TestToken tokens[SP_VOCAB] = {{"<unk>", -1, TOKEN_ADDED | TOKEN_SPECIAL},
                                  {"<s>", -1, TOKEN_ADDED | TOKEN_SPECIAL},
                                  {"</s>", -1, TOKEN_ADDED | TOKEN_SPECIAL}};
    for (int i = 0; i < 255; i++) {
        bytes[i][0] = (char)(i + 1);
        TestToken byte = {bytes[i], -1, TOKEN_BYTE};
        tokens[SP_BYTES + i] = byte;
    }
    for (int i = SP_SPACE; i < SP_USER; i++) {
        TestToken letter = {letters[i - SP_SPACE], -1, TOKEN_VOCAB};
        tokens[i] = letter;
    }
    const TestToken added[] = {{"<|a|>", -1, TOKEN_ADDED | TOKEN_SPECIAL},
                               {"<|a|>b", -1, TOKEN_ADDED | TOKEN_SPECIAL},
                               {"<|strip|>", -1, TOKEN_ADDED | TOKEN_SPECIAL | TOKEN_LSTRIP | TOKEN_RSTRIP},
                               {" <P>", -1, TOKEN_ADDED | TOKEN_SPECIAL | TOKEN_METASPACE},
                               {"\n\n", -1, TOKEN_ADDED},
                               {"<n>", -1, TOKEN_ADDED | TOKEN_NORMALIZED}};
    memcpy(tokens + SP_USER, added, sizeof(added));
    const int32_t fields[16] = {
        SP_EOS, TOKENIZER_SENTENCEPIECE, 0, 0, SP_BOS, unknown, 1, 0, prefix, split_spaces, 2, SP_EOS,
        SP_USER};
    write_tokenizer_bin(path, tokens, SP_VOCAB, merges, 7, fields);
}
#endif
