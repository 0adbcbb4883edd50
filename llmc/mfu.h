// mfu.h: model FLOPs utilization (MFU): the FLOPs of a training step, and the peak FLOP rates of GPUs.
#ifndef LLMC_MFU_H
#define LLMC_MFU_H
#include "config.h"
#include <ctype.h>
#include <stddef.h>
#include <string.h>

// Returns the GPU's peak in TFLOP/s for dense 16-bit matmuls with fp32 accumulation, at boost clock, from the
// data sheets; 0 for an unknown GPU. The first entry counts that `gpu`, the device name, contains as whole
// words.
static inline double peak_tflops(const char *gpu) {
    // clang-format off
    static const struct { const char *name; double tflops; } table[] = {
        {"GB200", 2500}, {"B200", 2250}, {"H200 NVL", 835.5}, {"H200", 989.4}, {"GH200", 989.4},
        {"H100 PCIe", 756}, {"H100 NVL", 835.5}, {"H100", 989.4}, {"H800", 989.4}, {"H20", 148},
        {"A100", 311.9}, {"A100X", 311.9}, {"A800", 311.9}, {"A40", 149.7}, {"A30", 165}, {"A10", 125},
        {"L40S", 362}, {"L40", 181}, {"L4", 121}, {"RTX A6000", 154.8}, {"RTX 6000 Ada", 364.2},
        {"RTX 5090", 209.5}, {"RTX 4090", 165.2}, {"RTX 4080", 97.5}, {"RTX 3090 Ti", 80}, {"RTX 3090", 71.2},
    };
    // clang-format on
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        size_t length = strlen(table[i].name);
        for (const char *match = strstr(gpu, table[i].name); match;
             match = strstr(match + 1, table[i].name)) {
            int at_word_start = match == gpu || !isalnum((unsigned char)match[-1]);
            if (at_word_start && !isalnum((unsigned char)match[length])) return table[i].tflops;
        }
    }
    return 0;
}

// Returns the number of visible (query, key) pairs of one head in a sequence of n tokens.
static inline double visible_pairs(const FsaConfig *c, FsaVisibility rule, int64_t n) {
    double causal_pairs = 0.5 * (double)n * (double)(n + 1);
    if (rule == FSA_WINDOW && n > c->window) {
        double num_queries =
            (double)(n - c->window); // with a full window; the first W queries see a triangle
        return 0.5 * (double)c->window * ((double)c->window + 1) + num_queries * (double)c->window;
    }
    if (rule == FSA_COMPRESSED) { // query t sees floor((t - l + 1)/s) + 1 windows
        int64_t queries = n - c->cmp_len + 1;
        if (queries <= 0) return 0;
        double full_groups = (double)(queries / c->cmp_stride), rest = (double)(queries % c->cmp_stride);
        return c->cmp_stride * full_groups * (full_groups + 1) / 2 + rest * (full_groups + 1);
    }
    int64_t selected_tokens = (int64_t)c->block * c->topk; // the first B*T queries see all earlier tokens
    if (rule == FSA_SELECTED &&
        n > selected_tokens) { // the others see T-1 blocks, and their own block causally
        double num_queries = (double)(n - selected_tokens),
               whole_blocks = (double)((n - selected_tokens) / c->block);
        double rest = (double)((n - selected_tokens) % c->block),
               own_block_pairs = 0.5 * c->block * (c->block + 1.0);
        return 0.5 * (double)selected_tokens * ((double)selected_tokens + 1) +
               num_queries * (double)(selected_tokens - c->block) + whole_blocks * own_block_pairs +
               0.5 * rest * (rest + 1);
    }
    return causal_pairs;
}

// Sets the FLOPs of a layer's attention of mode `attn` in the forward and in the backward pass, on one
// sequence of n tokens: those over the keys that are visible to each query, and those of the compression.
static inline void attention_flops(const FsaConfig *f, AttnMode attn, int64_t n, double *forward,
                                   double *backward) {
    const double d = f->head_dim, Hq = f->q_heads, Hkv = f->kv_heads;
    const double compressed = attn == ATTN_NSA ? visible_pairs(f, FSA_COMPRESSED, n) : 0;
    double pairs = visible_pairs(f, attn == ATTN_FULL ? FSA_CAUSAL : FSA_WINDOW, n) + compressed;
    if (attn == ATTN_NSA) pairs += visible_pairs(f, FSA_SELECTED, n);
    *forward = 4 * d * Hq * pairs; // q.k and p.v have 2d each per pair
    if (attn == ATTN_NSA && f->phi == FSA_PHI_LINEAR)
        *forward += 4 * (double)f->cmp_len * d * d * Hkv * (double)fsa_num_windows(f, n);
    *backward = 2 * *forward;
    *forward += 2 * d * Hq * compressed; // block scores
}

// The work that depends on the layers' attention modes, summed over all layers.
typedef struct {
    double gates;             // gate logits of a token
    double forward, backward; // FLOPs of the attention, on one sequence
} LayersWork;

// Returns the work of all layers on one sequence of n tokens.
static inline LayersWork layers_work(const ModelConfig *c, int64_t n) {
    LayersWork sum = {0, 0, 0};
    for (int l = 0; l < c->layers; l++) {
        const AttnMode attn = layer_attention(c, l);
        double forward, backward;
        attention_flops(&c->fsa, attn, n, &forward, &backward);
        sum.gates += attn == ATTN_NSA ? num_gate_logits(&c->fsa) : 0;
        sum.forward += forward, sum.backward += backward;
    }
    return sum;
}

// Returns the FLOPs of a training step, forward and backward, on one sequence of n tokens, for MFU. Counts
// the matmuls with weights, and the FLOPs of each layer's attention mode. Does not count recomputation.
static inline double model_flops(const ModelConfig *c, int64_t n) {
    const FsaConfig *f = &c->fsa;
    const double C = c->channels, d = f->head_dim, Hq = f->q_heads, Hkv = f->kv_heads;
    const double weights = (2 * Hq + 2 * Hkv) * d * C + 3.0 * C * c->hidden; // per layer, without its gate
    const LayersWork layers = layers_work(c, n);
    return 6 * (c->layers * weights + layers.gates * C + c->padded_vocab * C) * (double)n + layers.forward +
           layers.backward;
}
#endif
