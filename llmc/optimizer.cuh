// optimizer.cuh: AdamW's state on one GPU: fp32 master weights and moments of the parameters that this GPU
// owns (zero.h), and where weight decay applies to them.
#ifndef LLMC_OPTIMIZER_CUH
#define LLMC_OPTIMIZER_CUH
#include "adamw.cuh"
#include "arena.cuh"
#include "param_layout.h"
#include "zero.h"
#include <algorithm>

typedef struct {
    float *master, *m, *v; // [zero.shard_size]; NULL without training
    AdamwRange *ranges;    // [range_offsets[units]]; begins count from the start of this GPU's part of a unit
    AdamwRange *ranges_host; // the same, on the host
    int64_t *range_offsets;  // [units + 1], on the host: each unit's first range
} Optimizer;

// Builds the ranges of weight decay.
static void optimizer_build(Optimizer *a, const ParamLayout *layout, const ZeroPartition *z) {
    a->range_offsets = (int64_t *)xcalloc(z->num_units + 1, sizeof *a->range_offsets);
    a->ranges_host = (AdamwRange *)xcalloc(layout->num_tensors, sizeof *a->ranges_host);
    int64_t ranges = 0;
    for (int64_t u = 0; u < z->num_units; u++) {
        int64_t begin, end;
        zero_owned(z, u, z->rank, &begin, &end);
        for (int64_t i = 0; i < layout->num_tensors; i++) {
            const ParamTensor *t = &layout->tensors[i];
            if (t->offset + t->size <= begin || t->offset >= end) continue;
            if (ranges > a->range_offsets[u] && a->ranges_host[ranges - 1].decay == t->decay) continue;
            AdamwRange range = {std::max<int64_t>(t->offset - begin, 0), t->decay};
            a->ranges_host[ranges++] = range;
        }
        a->range_offsets[u + 1] = ranges;
    }
}

// Assigns the device arrays in the arenas.
static void optimizer_memory_layout(Optimizer *a, const ZeroPartition *z, Arena *arenas) {
    arena_alloc(&arenas[MASTER], &a->master, z->shard_size);
    arena_alloc(&arenas[MOMENTS], &a->m, z->shard_size);
    arena_alloc(&arenas[MOMENTS], &a->v, z->shard_size);
    arena_alloc(&arenas[SCRATCH], &a->ranges, a->range_offsets[z->num_units]);
}

// Copies the ranges to the GPU. The caller synchronizes.
static void optimizer_upload_ranges(Optimizer *a, const ZeroPartition *z) {
    cuda_check(cudaMemcpy(a->ranges, a->ranges_host, a->range_offsets[z->num_units] * sizeof(AdamwRange),
                          cudaMemcpyHostToDevice));
}

static void optimizer_free(Optimizer *a) {
    free(a->ranges_host), free(a->range_offsets);
}
#endif
