// topk.cu: the choice of blocks, by the kernel that suits the GPU and the configuration.
#include "kernels.h"

int fsa_topk(const FsaConfig *c, const FsaPlan *plan, FsaDtype dtype, const void *q, const void *kc,
             const float *lse_c, int32_t *indices, cudaStream_t stream) {
    if (c->head_dim != 64 && c->head_dim != 128) return FSA_ERROR_CONFIG;
    return fsa_hopper() && fsa_topk_suits_sm90(c)
               ? fsa_topk_sm90(c, plan, dtype, q, kc, lse_c, indices, stream)
               : fsa_topk_sm80(c, plan, dtype, q, kc, lse_c, indices, stream);
}
