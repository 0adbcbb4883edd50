// encode.c: encodes standard input with llmc/tokenizer.h and prints one token per line; or decodes.
// usage: encode TOKENIZER.bin [special | decode] < TEXT_OR_TOKENS
//   special: special tokens in the text become their ids
//   decode: standard input has one token per line; prints them as text
// test_bpe.py compares the tokens with those of the original tokenizer libraries.
#include "../../llmc/tokenizer.h"

int main(int argc, char **argv) {
    enum { MAX_BYTES = 1 << 24 };
    const char *mode = argc == 3 ? argv[2] : "";
    Tokenizer t;
    if (argc != 2 && strcmp(mode, "special") != 0 && strcmp(mode, "decode") != 0)
        die("usage: encode TOKENIZER.bin [special | decode] < TEXT_OR_TOKENS");
    if (tokenizer_load(&t, argv[1]) != 0)
        die("cannot read tokenizer %s: no such file; check the path", argv[1]);
    char *text = (char *)xmalloc(MAX_BYTES);
    int32_t *tokens = (int32_t *)xmalloc(MAX_BYTES * sizeof(int32_t));
    int64_t n = 0;
    if (strcmp(mode, "decode") == 0) {
        while (n < MAX_BYTES && scanf("%d", &tokens[n]) == 1) n++;
        tokenizer_print(&t, stdout, tokens, n, 1);
    } else {
        int64_t bytes = (int64_t)fread(text, 1, MAX_BYTES, stdin);
        n = tokenizer_encode(&t, text, bytes, *mode != 0, tokens, MAX_BYTES);
        for (int64_t i = 0; i < n; i++) printf("%d\n", tokens[i]);
    }
    free(tokens);
    free(text);
    tokenizer_free(&t);
    return 0;
}
