// optimizer.cuh: AdamW on one GPU: the state of the parameters that this GPU owns (zero.h), and the end of a
// step. Its work runs on a stream of its own: the sums of the squares of gradients beside the backward pass,
// AdamW beside the next step's forward pass, one ZeRO unit after another.
#ifndef LLMC_OPTIMIZER_CUH
#define LLMC_OPTIMIZER_CUH
#include "adamw.cuh"
#include "arena.cuh"
#include "global_norm.cuh"
#include "loss.cuh"
#include "options.h"
#include "params.cuh"
#include <algorithm>

typedef struct {
    float *master, *m, *v; // [zero.shard_size]; NULL without training
    AdamwRange *ranges;    // [range_offsets[units]]; begins count from the start of this GPU's part of a unit
    AdamwRange *ranges_host; // the same, on the host
    int64_t *range_offsets;  // [units + 1], on the host: each unit's first range
    char *squares_scratch;   // of sum_of_squares
    cudaStream_t stream;
    cudaEvent_t event; // recorded and awaited by stream_waits_for_stream
    int few_sms;       // 1: the GPU can run AdamW on a few SMs
    // The step whose AdamW is not launched yet for the units from next_unit on.
    int64_t next_unit, step;
    double lr;
    const Options *options;
    const float *norm; // [NORM_FIELDS] output of global_norm
} Optimizer;

// AdamW beside a forward pass takes so many SMs.
enum { ADAMW_SMS = 16 };

// Builds the ranges of weight decay.
static void optimizer_build(Optimizer *a, const ParamLayout *layout, const ZeroPartition *z) {
    a->range_offsets = (int64_t *)xcalloc(z->num_units + 1, sizeof *a->range_offsets);
    a->ranges_host = (AdamwRange *)xcalloc(layout->num_tensors, sizeof *a->ranges_host);
    cuda_check(cudaStreamCreateWithFlags(&a->stream, cudaStreamNonBlocking));
    cuda_check(cudaEventCreateWithFlags(&a->event, cudaEventDisableTiming));
    int device, major;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    a->few_sms = major >= 9;
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
    arena_alloc(&arenas[SCRATCH], &a->squares_scratch, (int64_t)global_norm_scratch(z->shard_size));
}

// Copies the ranges to the GPU. The caller synchronizes.
static void optimizer_upload_ranges(Optimizer *a, const ZeroPartition *z) {
    cuda_check(cudaMemcpy(a->ranges, a->ranges_host, a->range_offsets[z->num_units] * sizeof(AdamwRange),
                          cudaMemcpyHostToDevice));
}

static void optimizer_free(Optimizer *a) {
    cuda_check(cudaStreamSynchronize(a->stream));
    cuda_check(cudaStreamDestroy(a->stream));
    cuda_check(cudaEventDestroy(a->event));
    free(a->ranges_host), free(a->range_offsets);
}

// Work that is launched later on `waiting` waits for the work that is on `stream` now.
static void stream_waits_for_stream(const Optimizer *a, cudaStream_t waiting, cudaStream_t stream) {
    cuda_check(cudaEventRecord(a->event, stream));
    cuda_check(cudaStreamWaitEvent(waiting, a->event, 0));
}

// *squares += the sum of the squares of this GPU's partition of unit u's gradients, which are complete after
// the work on `stream`.
static void optimizer_add_squares(const Optimizer *a, const Params *p, int64_t u, double *squares,
                                  cudaStream_t stream) {
    const ZeroPartition *z = &p->zero;
    int64_t begin, end;
    zero_partition(z, u, z->rank, &begin, &end);
    stream_waits_for_stream(a, a->stream, stream);
    sum_of_squares(squares, p->grads + (z->stage == 2 ? z->units[u].shard_offset : begin), end - begin,
                   a->squares_scratch, a->stream);
}

// Begins AdamW step number `step` (1-based) after the work on `stream`: o has its constants. optimizer_launch
// launches it.
static void optimizer_begin(Optimizer *a, const Options *o, int64_t step, double lr, const float *norm,
                            cudaStream_t stream) {
    stream_waits_for_stream(a, a->stream, stream);
    a->next_unit = 0, a->step = step, a->lr = lr, a->options = o, a->norm = norm;
}

// Launches AdamW for the units up to `last` that it has not been launched for. sms: as in adamw. Passes wait
// for the weights with params_use_unit.
static void optimizer_launch(Optimizer *a, const Params *p, int64_t last, int sms) {
    const ZeroPartition *z = &p->zero;
    const Options *o = a->options;
    for (; o && a->next_unit <= last; a->next_unit++) {
        const int64_t u = a->next_unit, shard = z->units[u].shard_offset, first = a->range_offsets[u];
        int64_t begin, end;
        zero_owned(z, u, z->rank, &begin, &end);
        adamw(p->weights + begin, a->master + shard, a->m + shard, a->v + shard,
              p->grads + (z->stage == 2 ? shard : begin), end - begin, a->ranges + first,
              (int)(a->range_offsets[u + 1] - first), a->lr, o->beta1, o->beta2, o->eps, o->weight_decay,
              a->step, a->norm, a->few_sms ? sms : 0, a->stream);
        params_share_unit(p, u, a->stream);
    }
}

// Lets `stream` wait for the weights of the unit that contains parameter `offset`. Called before a pass
// launches the first work that reads them.
static void optimizer_use_unit(Optimizer *a, const Params *p, int64_t offset, cudaStream_t stream) {
    optimizer_launch(a, p, zero_find_unit(&p->zero, offset), 0);
    params_use_unit(p, offset, stream);
}

// Finishes the step: lets `stream` wait for the weights and moments of all units. With ZeRO all processes
// must call it at the same point of the run.
static void optimizer_finish(Optimizer *a, const Params *p, cudaStream_t stream) {
    const ZeroUnit *last = &p->zero.units[p->zero.num_units - 1];
    optimizer_use_unit(a, p, last->begin, stream);
}

// Launches AdamW for the unit that contains parameter `offset` on a few SMs, beside the work that is launched
// next on `stream`: matmuls, which lose little to it. Attention would lose more.
static void optimizer_update_beside(Optimizer *a, const Params *p, int64_t offset, cudaStream_t stream) {
    const int64_t u = zero_find_unit(&p->zero, offset);
    if (!a->options || a->next_unit > u) return;
    stream_waits_for_stream(a, a->stream, stream);
    optimizer_launch(a, p, u, ADAMW_SMS);
}
#endif
