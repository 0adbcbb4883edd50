// validate_block_indices.cuh: the flag -block-indices of the GPU trainer.
#ifndef LLMC_VALIDATE_BLOCK_INDICES_CUH
#define LLMC_VALIDATE_BLOCK_INDICES_CUH
#include "block_indices.h"
#include "run.h"
#include <vector>

// Validates with run_validate's callback `evaluate`, which gets `model`, and writes the block indices of the
// last batch to `path`. The callback writes them to *indices [layers, Hkv, queries, T], unless it is NULL.
static void validate_block_indices(Run *r, RunEvaluate evaluate, void *model, int32_t **indices,
                                   const char *path) {
    const FsaConfig *f = &r->config.fsa;
    BlockIndicesHeader h = {"", r->config.layers, f->q_heads, f->kv_heads, 0, f->topk, f->block, 0};
    memcpy(h.magic, block_indices_magic, sizeof h.magic);
    if (r->config.attn != ATTN_NSA)
        die("-block-indices %s: only -attn nsa selects blocks; drop one of them", path);
    if (r->comm.ranks > 1)
        die("-block-indices %s: %d processes; start one process alone", path, r->comm.ranks);
    h.num_queries = r->opt.batch * r->opt.seq_len;
    const size_t bytes = block_indices_count(&h) * sizeof(int32_t);
    *indices = (int32_t *)memset(xmalloc(bytes), 0xff, bytes); // -1: layers of full attention select none
    run_validate(r, evaluate, model);
    h.num_seqs = r->num_seqs;
    std::vector<int64_t> lengths(h.num_seqs);
    for (int64_t i = 0; i < h.num_seqs; i++) lengths[i] = r->cu_seqlens[i + 1] - r->cu_seqlens[i];
    block_indices_write(path, &h, lengths.data(), *indices);
    free(*indices);
    *indices = NULL;
}
#endif
