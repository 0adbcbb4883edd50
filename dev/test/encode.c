// encode.c: encodes standard input with llmc/tokenizer.h and prints one token per line.
// usage: encode TOKENIZER.bin < TEXT
// test_bpe.py compares the tokens with those of the original tokenizer libraries.
#include "../../llmc/tokenizer.h"

int main(int argc, char **argv) {
    enum { MAX_BYTES = 1 << 24 };
    Tokenizer t;
    if (argc != 2) die("usage: encode TOKENIZER.bin < TEXT");
    if (tokenizer_load(&t, argv[1]) != 0)
        die("cannot read tokenizer %s: no such file; check the path", argv[1]);
    char *text = (char *)xmalloc(MAX_BYTES);
    int32_t *tokens = (int32_t *)xmalloc(MAX_BYTES * sizeof(int32_t));
    int64_t n = tokenizer_encode(&t, text, (int64_t)fread(text, 1, MAX_BYTES, stdin), tokens, MAX_BYTES);
    for (int64_t i = 0; i < n; i++) printf("%d\n", tokens[i]);
    free(tokens);
    free(text);
    tokenizer_free(&t);
    return 0;
}
