// logits.c: prints the C trainer's logits of a sequence, for dev/test/test_hf.py:
//   logits CHECKPOINT TOKEN...
// A line has the logits of one position.
#include "../../train_gpt_nsa.h"
#include "../../llmc/checkpoint.h"

int main(int argc, char **argv) {
    char msg[CHECKPOINT_MSG_BYTES];
    Checkpoint k;
    Model model;
    const int64_t n = argc - 2;
    if (n < 1) die("usage: logits CHECKPOINT TOKEN...");
    if (checkpoint_open(&k, argv[1], msg) != 0) die("%s", msg);
    const ModelConfig *c = &k.config;
    int32_t *tokens = (int32_t *)xmalloc((size_t)n * sizeof *tokens);
    for (int64_t i = 0; i < n; i++)
        tokens[i] = (int32_t)parse_int("token", argv[i + 2], 0, c->vocab_size - 1);
    model_build(&model, c, n, 0);
    if (checkpoint_read_part(&k, c, 0, 0, model.layout.num_params, model.params.weights, msg) != 0)
        die("%s", msg);
    const int64_t cu_seqlens[2] = {0, n};
    model_forward(&model, tokens, tokens, cu_seqlens, 1);
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < c->vocab_size; j++)
            printf("%.9g%c", model.acts.logits[i * c->padded_vocab + j], j + 1 < c->vocab_size ? ' ' : '\n');
    }
    checkpoint_close(&k);
    model_free(&model);
    free(tokens);
    return 0;
}
