// topk.cu: block selection. Calls sm90/topk.cu on Hopper, if there are at most 16 free blocks.
// Otherwise it calls sm80/topk.cu.
#include "kernels.h"

int fsa_topk(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q, ConstRows kc,
             const float *lse_c, int32_t *block_indices, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    return fsa_use_sm90() && c->topk <= fsa_max_topk_sm90(c)
               ? fsa_topk_sm90(c, batch, dtype, q, kc, lse_c, block_indices, stream)
               : fsa_topk_sm80(c, batch, dtype, q, kc, lse_c, block_indices, stream);
}
