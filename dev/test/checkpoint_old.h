// checkpoint_old.h: writes checkpoints of versions 1 to 3, for tests of their readers.
#ifndef CHECKPOINT_OLD_H
#define CHECKPOINT_OLD_H
#include "../../llmc/checkpoint.h"

// Writes DIR/ckpt_<state->step>.bin as version 1, 2 or 3 had it, from params, m and v in today's order,
// without full-every and, in versions 1 and 2, without the gates' biases. Returns the stored elements of each
// array.
static int64_t checkpoint_old_save(const char *folder, const ModelConfig *c, const TrainState *state,
                                   int version, const float *params, const float *m, const float *v) {
    static const char *const names_v1[] = {"ln1",    "wqkv",  "bqkv", "qnorm", "knorm", "phi_wk", "phi_pe",
                                           "phi_wv", "wgate", "wo",   "ln2",   "wgu",   "wdown"};
    static const char *const names_v2[] = {"ln1",    "wqkv",   "wgate", "bqkv", "qnorm", "knorm", "phi_wk",
                                           "phi_pe", "phi_wv", "wo",    "ln2",  "wgu",   "wdown"};
    static const char *const names_v3[] = {"ln1",    "wqkv",   "wgate",  "bqkv", "bgate", "qnorm", "knorm",
                                           "phi_wk", "phi_pe", "phi_wv", "wo",   "ln2",   "wgu",   "wdown"};
    static const char *const first[] = {"wte"}, *const last[] = {"lnf", "lm_head"};
    const float *arrays[3] = {params, m, v};
    float *stored[3];
    int64_t total, num_tensors = param_table(c, NULL, &total), end = 0;
    ParamTensor *table = (ParamTensor *)xcalloc((size_t)num_tensors, sizeof *table);
    param_table(c, table, &total);
    for (int a = 0; a < 3; a++) stored[a] = (float *)xmalloc((size_t)total * sizeof(float));
    for (int l = -1; l <= c->layers; l++) { // -1: before the layers, c->layers: after them
        const char *const *names = l < 0            ? first
                                   : l == c->layers ? last
                                   : version == 1   ? names_v1
                                   : version == 2   ? names_v2
                                                    : names_v3;
        const int num_names = l < 0 ? 1 : l == c->layers ? 2 : version < 3 ? 13 : 14;
        for (int k = 0; k < num_names; k++) {
            for (int64_t i = 0; i < num_tensors; i++) {
                const ParamTensor *t = &table[i];
                char name[48];
                snprintf(name, sizeof name, "layers.%d.%s", l, names[k]);
                if (strcmp(t->name, l < 0 || l == c->layers ? names[k] : name) != 0) continue;
                for (int a = 0; a < 3; a++)
                    memcpy(stored[a] + end, arrays[a] + t->offset, (size_t)t->size * sizeof(float));
                end += t->size;
            }
        }
    }
    checkpoint_save(folder, c, state, stored[0], stored[1], stored[2], end);
    for (int a = 0; a < 3; a++) free(stored[a]);
    free(table);

    unsigned char header[CHECKPOINT_HEADER_BYTES];
    char path[PATH_BYTES];
    checkpoint_path(path, sizeof path, folder, state->step);
    FILE *f = fopen(path, "r+b");
    if (!f || fread(header, sizeof header, 1, f) != 1) die("cannot read %s", path);
    int fields;
    model_fields(&fields);
    checkpoint_put_word(header, 1, version);
    checkpoint_put_word(header, 3, fields - 1);
    if (version < 3) checkpoint_put_word(header, 5, 0);
    unsigned char *state_fields = header + 8 * (8 + fields);
    memmove(state_fields - 8, state_fields, 8 * TRAIN_STATE_FIELDS);
    memset(state_fields + 8 * (TRAIN_STATE_FIELDS - 1), 0, 8);
    checkpoint_put_word(header, 511, (int64_t)checksum(header, CHECKPOINT_HEADER_BYTES - 8, 0));
    if (fseeko(f, 0, SEEK_SET) || fwrite(header, sizeof header, 1, f) != 1 || fclose(f))
        die("cannot write %s", path);
    return end;
}
#endif
