// encode.c: encodes or decodes texts with llmc/tokenizer.h. test_bpe.py compares the results with those of
// the original tokenizer libraries. usage: encode TOKENIZER.bin [special | decode] < TEXTS
//   Reads texts, each as its number of bytes (uint32) and its bytes, and writes for each text its number of
//   tokens (uint32) and its tokens (int32).
//   special: special tokens in the text become their ids
//   decode: the other way round
#include "../../llmc/tokenizer.h"

// Reads n items of `size` bytes each, or dies.
static void read_items(void *items, size_t size, size_t n) {
    if (fread(items, size, n, stdin) != n) die("the input ends within a text of %zu items", n);
}

static void encode_text(const Tokenizer *t, uint32_t bytes, int special) {
    char *text = (char *)xmalloc(bytes + 1);
    read_items(text, 1, bytes);
    uint32_t n = (uint32_t)tokenizer_encode(t, text, bytes, special, NULL, 0);
    int32_t *tokens = (int32_t *)xmalloc((n + 1) * sizeof *tokens);
    tokenizer_encode(t, text, bytes, special, tokens, n);
    fwrite(&n, sizeof n, 1, stdout);
    fwrite(tokens, sizeof *tokens, n, stdout);
    free(tokens);
    free(text);
}

static void decode_text(const Tokenizer *t, uint32_t n) {
    char *text;
    size_t size;
    int32_t *tokens = (int32_t *)xmalloc((n + 1) * sizeof *tokens);
    read_items(tokens, sizeof *tokens, n);
    FILE *f = open_memstream(&text, &size);
    tokenizer_print(t, f, tokens, n, 1);
    fclose(f);
    uint32_t bytes = (uint32_t)size;
    fwrite(&bytes, sizeof bytes, 1, stdout);
    fwrite(text, 1, size, stdout);
    free(tokens);
    free(text);
}

int main(int argc, char **argv) {
    const char *mode = argc == 3 ? argv[2] : "";
    Tokenizer t;
    uint32_t length;
    if (argc != 2 && strcmp(mode, "special") != 0 && strcmp(mode, "decode") != 0)
        die("usage: encode TOKENIZER.bin [special | decode] < TEXTS");
    if (tokenizer_load(&t, argv[1]) != 0)
        die("cannot read tokenizer %s: no such file; check the path", argv[1]);
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        if (strcmp(mode, "decode") == 0)
            decode_text(&t, length);
        else
            encode_text(&t, length, *mode != 0);
    }
    tokenizer_free(&t);
    return 0;
}
