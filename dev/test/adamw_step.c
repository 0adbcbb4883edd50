// adamw_step.c: checks that one checkpoint is AdamW's next step after another, whichever trainer wrote them.
// usage: adamw_step BEFORE|new AFTER BETA1 BETA2 EPS WEIGHT_DECAY
// "new" stands for the initial parameters. The gradient that AdamW got, already clipped, follows from m; the
// learning rate is the one that fits best. Prints them and the state of AFTER:
//   step 2 tokens 256 epoch 0 position 4 draws 0 norm 0.49999 lr 0.0005
// Exits with code 1 if v or the parameters are not those of AdamW.
#include "../../llmc/checkpoint.h"

// The arrays of a checkpoint, [n] each.
typedef struct {
    float *params, *m, *v;
} Arrays;

static void arrays_alloc(Arrays *a, int64_t n) {
    a->params = (float *)xcalloc((size_t)n, sizeof(float));
    a->m = (float *)xcalloc((size_t)n, sizeof(float));
    a->v = (float *)xcalloc((size_t)n, sizeof(float));
}

static void arrays_free(Arrays *a) {
    free(a->params), free(a->m), free(a->v);
}

int main(int argc, char **argv) {
    if (argc != 7) die("usage: adamw_step BEFORE|new AFTER BETA1 BETA2 EPS WEIGHT_DECAY");
    const char *before = argv[1], *after = argv[2];
    const double beta1 = parse_double("BETA1", argv[3], 0, 1), beta2 = parse_double("BETA2", argv[4], 0, 1);
    const double eps = parse_double("EPS", argv[5], 0, 1),
                 decay = parse_double("WEIGHT_DECAY", argv[6], 0, 1e9);
    Checkpoint k;
    TrainState old = {.step = 0}, state;
    char msg[CHECKPOINT_MSG_BYTES];
    if (checkpoint_open(&k, after, msg)) die("%s; choose another checkpoint", msg);
    checkpoint_close(&k);
    const ModelConfig c = k.config;
    ParamInit init = {.seed = (uint64_t)k.state.seed};
    memcpy(init.gate_bias, default_gate_bias, sizeof init.gate_bias);
    int64_t n, num_tensors = param_table(&c, NULL, &n);
    ParamTensor *tensors = (ParamTensor *)xmalloc((size_t)num_tensors * sizeof *tensors);
    param_table(&c, tensors, &n);
    Arrays a, b;
    arrays_alloc(&a, n), arrays_alloc(&b, n);
    checkpoint_load(after, &c, &init, &state, b.params, b.m, b.v, n);
    if (strcmp(before, "new") == 0)
        params_init(&c, a.params, &init);
    else
        checkpoint_load(before, &c, &init, &old, a.params, a.m, a.v, n);
    if (state.step != old.step + 1)
        die("%s: step %lld does not follow step %lld; choose consecutive checkpoints", after,
            (long long)state.step, (long long)old.step);

    const double correction1 = 1 - pow(beta1, (double)state.step),
                 correction2 = 1 - pow(beta2, (double)state.step);
    double *update = (double *)xmalloc((size_t)n * sizeof *update); // of the parameters, at learning rate 1
    double grad2 = 0, v2 = 0, v_error2 = 0, fit = 0, update2 = 0, moved2 = 0, error2 = 0;
    for (int64_t t = 0; t < num_tensors; t++) {
        for (int64_t i = tensors[t].offset; i < tensors[t].offset + tensors[t].size; i++) {
            const double g = (b.m[i] - beta1 * a.m[i]) / (1 - beta1),
                         v = beta2 * a.v[i] + (1 - beta2) * g * g;
            update[i] = b.m[i] / correction1 / (sqrt(b.v[i] / correction2) + eps) +
                        (tensors[t].decay ? decay * a.params[i] : 0);
            const double moved = (double)a.params[i] - b.params[i];
            grad2 += g * g;
            v2 += v * v, v_error2 += (v - b.v[i]) * (v - b.v[i]);
            fit += moved * update[i], update2 += update[i] * update[i], moved2 += moved * moved;
        }
    }
    const double lr = update2 > 0 ? fit / update2 : 0;
    for (int64_t i = 0; i < n; i++) {
        const double error = (double)a.params[i] - b.params[i] - lr * update[i];
        error2 += error * error;
    }
    printf("step %lld tokens %lld epoch %lld position %lld draws %lld norm %.6g lr %.6g\n",
           (long long)state.step, (long long)state.tokens, (long long)state.epoch, (long long)state.position,
           (long long)state.draws, sqrt(grad2), lr);
    const double v_error = sqrt(v_error2 / (v2 + 1e-300)), error = sqrt(error2 / (moved2 + 1e-300));
    if (v_error > 1e-4)
        die("%s: v differs from AdamW's by %.2g; look at -beta2, or at the order of m and v", after, v_error);
    if (error > 1e-3)
        die("%s: the parameters moved by %.3g, %.2g of it not by AdamW; look at -eps and -c", after,
            sqrt(moved2), error);
    free(tensors), free(update);
    arrays_free(&a), arrays_free(&b);
    return 0;
}
