// config.c: checks an FsaConfig, and counts the compression windows of a sequence.
#include "fsa.h"
#include <math.h>
#include <stdio.h>

int fsa_version(void) {
    return 1000 * FSA_VERSION_MAJOR + FSA_VERSION_MINOR;
}

int fsa_config_check(const FsaConfig *c, char *msg, size_t msg_size) {
    if (msg_size > 0) msg[0] = '\0';
#define FAIL(...)                                                                                            \
    do {                                                                                                     \
        snprintf(msg, msg_size, __VA_ARGS__);                                                                \
        return -1;                                                                                           \
    } while (0)
    if (c->q_heads < 1) FAIL("q_heads %d: must be at least 1", c->q_heads);
    if (c->kv_heads < 1) FAIL("kv_heads %d: must be at least 1", c->kv_heads);
    if (c->q_heads % c->kv_heads != 0)
        FAIL("q_heads %d: must be a multiple of kv_heads %d; try q_heads %d", c->q_heads, c->kv_heads,
             (c->q_heads / c->kv_heads + (c->q_heads < c->kv_heads)) * c->kv_heads);
    if (c->q_heads / c->kv_heads > 16)
        FAIL("q_heads %d: must be at most 16 times kv_heads %d; try q_heads %d", c->q_heads, c->kv_heads,
             16 * c->kv_heads);
    if (c->head_dim < 2 || c->head_dim % 2 != 0)
        FAIL("head_dim %d: must be even and at least 2; try head_dim 64 or 128", c->head_dim);
    if (c->head_dim > FSA_MAX_HEAD_DIM)
        FAIL("head_dim %d: must be at most %d", c->head_dim, FSA_MAX_HEAD_DIM);
    if (c->cmp_len < 1) FAIL("cmp_len %d: must be at least 1", c->cmp_len);
    if (c->cmp_stride < 1) FAIL("cmp_stride %d: must be at least 1", c->cmp_stride);
    if (c->block < 16 || c->block % 16 != 0)
        FAIL("block %d: must be a multiple of 16, at least 16; try block %d", c->block,
             c->block < 16 ? 16 : c->block / 16 * 16);
    if (c->cmp_len % c->cmp_stride != 0)
        FAIL("cmp_stride %d: must divide cmp_len %d; try cmp_len %d", c->cmp_stride, c->cmp_len,
             c->cmp_len < c->cmp_stride ? c->cmp_stride : c->cmp_len / c->cmp_stride * c->cmp_stride);
    if (c->block % c->cmp_stride != 0)
        FAIL("cmp_stride %d: must divide block %d; try cmp_stride 16", c->cmp_stride, c->block);
    if (c->cmp_len > c->block)
        FAIL("cmp_len %d: must be at most block %d; try cmp_len %d", c->cmp_len, c->block, c->block);
    if (c->topk < 1) FAIL("topk %d: must be at least 1", c->topk);
    if (c->topk > FSA_MAX_TOPK) FAIL("topk %d: must be at most %d", c->topk, FSA_MAX_TOPK);
    if (c->init_blocks < 0) FAIL("init_blocks %d: must be at least 0", c->init_blocks);
    if (c->local_blocks < 0) FAIL("local_blocks %d: must be at least 0", c->local_blocks);
    if (c->topk < (int64_t)c->init_blocks + c->local_blocks)
        FAIL("topk %d: must be at least init_blocks %d + local_blocks %d = %lld", c->topk, c->init_blocks,
             c->local_blocks, (long long)c->init_blocks + c->local_blocks);
    if (c->window < 1) FAIL("window %d: must be at least 1", c->window);
    if (c->phi != FSA_PHI_MEAN && c->phi != FSA_PHI_LINEAR)
        FAIL("phi %d: must be %d (mean) or %d (linear)", (int)c->phi, FSA_PHI_MEAN, FSA_PHI_LINEAR);
    if (c->gate_per_token != 0 && c->gate_per_token != 1)
        FAIL("gate_per_token %d: must be 0 or 1", c->gate_per_token);
    if (c->recompute != 0 && c->recompute != 1) FAIL("recompute %d: must be 0 or 1", c->recompute);
    if (!isfinite(c->scale) || c->scale < 0)
        FAIL("scale %g: must be positive and finite, or 0 for 1/sqrt(head_dim)", (double)c->scale);
    for (int i = 0; i < (int)(sizeof c->reserved / sizeof c->reserved[0]); i++)
        if (c->reserved[i] != 0)
            FAIL("reserved[%d] %d: must be 0; set all fields of FsaConfig to zero first", i, c->reserved[i]);
#undef FAIL
    return 0;
}

int64_t fsa_num_windows(const FsaConfig *c, int64_t n) {
    return n < c->cmp_len ? 0 : (n - c->cmp_len) / c->cmp_stride + 1;
}
