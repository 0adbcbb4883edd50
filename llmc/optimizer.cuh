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
    int gpu_sms;       // SMs of the GPU; 0: it cannot run AdamW on a few of them
    // The step whose AdamW is not launched yet for the units from next_unit on.
    int64_t next_unit, step;
    double lr;
    const Options *options;
    const float *norm; // [NORM_FIELDS] output of global_norm
} Optimizer;

// Builds the ranges of weight decay.
static void optimizer_build(Optimizer *a, const ParamLayout *layout, const ZeroPartition *z) {
    a->range_offsets = (int64_t *)xcalloc(z->num_units + 1, sizeof *a->range_offsets);
    a->ranges_host = (AdamwRange *)xcalloc(layout->num_tensors, sizeof *a->ranges_host);
    cuda_check(cudaStreamCreateWithFlags(&a->stream, cudaStreamNonBlocking));
    cuda_check(cudaEventCreateWithFlags(&a->event, cudaEventDisableTiming));
    int device;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&a->gpu_sms, cudaDevAttrMultiProcessorCount, device));
    if (!adamw_fits_few_sms()) a->gpu_sms = 0;
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
              a->step, a->norm, sms, a->stream);
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

// Returns the number of SMs on which a unit's AdamW takes about as long as the layer's matmuls of n tokens
// that it runs beside, a fourth of the GPU's at most; 0: all, since the matmuls are too short.
//   matmuls  2*n FLOPs a parameter at 700 TFLOP/s, 1,300 in fp8: 23 and 13 ps for 8K tokens
//   AdamW    an SM takes 370 ps a parameter alone, and half more beside matmuls
static int optimizer_few_sms(const Optimizer *a, int64_t n, int fp8) {
    const int64_t sms = (fp8 ? 320 : 192) * 1024 / std::max<int64_t>(n, 1);
    return sms > a->gpu_sms / 2 ? 0 : (int)std::min<int64_t>(std::max<int64_t>(sms, 8), a->gpu_sms / 4);
}

// Launches AdamW for the unit that contains parameter `offset`, unless it has been launched, beside the
// matmuls of a layer that are launched next on `stream`. They lose little to it; attention would lose more.
// Returns the number of SMs to plan these matmuls for (Matmul.sms). It depends on the shape alone, so that a
// run that resumes here plans the same.
static int optimizer_update_beside(Optimizer *a, const Params *p, int64_t offset, int64_t n, int fp8,
                                   cudaStream_t stream) {
    const int64_t u = zero_find_unit(&p->zero, offset);
    const int sms = optimizer_few_sms(a, n, fp8);
    if (a->options && a->next_unit <= u) {
        stream_waits_for_stream(a, a->stream, stream);
        optimizer_launch(a, p, u, sms);
    }
    return sms ? a->gpu_sms - sms : 0;
}
#endif
