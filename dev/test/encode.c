// encode.c: the tokens that llmc/tokenizer.h makes of standard input, one a line: encode TOKENIZER.bin.
// test_bpe.py compares them with those of the tokenizers' own libraries.
#include "../../llmc/tokenizer.h"

int main(int argc, char **argv) {
    enum { MOST = 1 << 24 };
    Tokenizer t;
    if (argc != 2) die("usage: encode TOKENIZER.bin < TEXT");
    if (tokenizer_load(&t, argv[1]) != 0) die("cannot read tokenizer %s: no such file", argv[1]);
    char *text = (char *)xmalloc(MOST);
    int32_t *tokens = (int32_t *)xmalloc(MOST * sizeof(int32_t));
    int64_t n = tokenizer_encode(&t, text, (int64_t)fread(text, 1, MOST, stdin), tokens, MOST);
    for (int64_t i = 0; i < n; i++) printf("%d\n", tokens[i]);
    free(tokens);
    free(text);
    tokenizer_free(&t);
    return 0;
}
