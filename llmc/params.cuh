// params.cuh: a model's weights and gradients on one GPU, and their transfers between the GPUs, one ZeRO unit
// (zero.h) after another, beside the passes.
#ifndef LLMC_PARAMS_CUH
#define LLMC_PARAMS_CUH
#include "arena.cuh"
#include "nccl.cuh"
#include "param_layout.h"

enum { UNIT_GRAD_BUFFERS = 4 };

typedef struct {
    Gpus *gpus; // NULL: one GPU alone
    ZeroPartition zero;
    floatX *weights;                             // [num_params]
    float *grads;                                // [num_params]; with ZeRO stage 2 [zero.shard_size]
    float *unit_grad_buffers[UNIT_GRAD_BUFFERS]; // ZeRO stage 2: the gradients of one unit each
    float **unit_grads; // [units], on the host: where the backward pass writes each unit's gradients
    int *unit_buffer;   // [units], on the host: the unit's index in unit_grad_buffers
    cudaEvent_t *weights_gathered; // [units] the unit's weights have come from their owners
    cudaEvent_t unit_grad_buffer_free[UNIT_GRAD_BUFFERS]; // the buffer's gradients have gone to their owners
} Params;

// Partitions the parameters by ZeRO (stage zero_stage); gpus NULL: one GPU alone.
//
// With stage 2 a buffer holds a unit's gradients during the backward pass. Layers alternate between two
// buffers, so that one is reduced while the other is filled. A tied embedding has a buffer of its own, since
// both ends of the backward pass add to its gradient.
static void params_build(Params *p, const ModelConfig *c, const ParamLayout *layout, Gpus *gpus,
                         int zero_stage) {
    p->gpus = gpus;
    zero_partition_build(&p->zero, zero_stage, gpus ? gpus->rank : 0, gpus ? gpus->ranks : 1, layout->tensors,
                         layout->num_tensors);
    const int64_t units = p->zero.num_units;
    p->unit_grads = (float **)xcalloc(units, sizeof *p->unit_grads);
    p->unit_buffer = (int *)xcalloc(units, sizeof *p->unit_buffer);
    p->weights_gathered = (cudaEvent_t *)xcalloc(units, sizeof *p->weights_gathered);
    for (int64_t u = 0; u < units; u++) {
        p->unit_buffer[u] = u == 0 ? 0 : u == units - 1 ? (c->tied ? 1 : 0) : 2 + (int)(u % 2);
        cuda_check(cudaEventCreateWithFlags(&p->weights_gathered[u], cudaEventDisableTiming));
    }
    for (cudaEvent_t &event : p->unit_grad_buffer_free)
        cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
}

static void params_free(Params *p) {
    for (int64_t u = 0; u < p->zero.num_units; u++) cuda_check(cudaEventDestroy(p->weights_gathered[u]));
    for (cudaEvent_t event : p->unit_grad_buffer_free) cuda_check(cudaEventDestroy(event));
    free(p->unit_grads), free(p->unit_buffer), free(p->weights_gathered);
    zero_partition_free(&p->zero);
}

// Returns the elements of grads.
static int64_t params_num_grads(const Params *p, const ParamLayout *layout) {
    return p->zero.stage == 2 ? p->zero.shard_size : layout->num_params;
}

// Assigns the memory of the weights, and with training != 0 of the gradients, in the arenas.
static void params_memory_layout(Params *p, const ParamLayout *layout, Arena *arenas, int training) {
    const ZeroPartition *z = &p->zero;
    int64_t sizes[UNIT_GRAD_BUFFERS] = {0};
    arena_alloc(&arenas[WEIGHTS], &p->weights, layout->num_params);
    if (!training) return;
    arena_alloc(&arenas[GRADIENTS], &p->grads, params_num_grads(p, layout));
    for (int64_t u = 0; u < z->num_units && z->stage == 2; u++)
        sizes[p->unit_buffer[u]] = std::max(sizes[p->unit_buffer[u]], z->units[u].end - z->units[u].begin);
    for (int i = 0; i < UNIT_GRAD_BUFFERS; i++)
        if (sizes[i]) arena_alloc(&arenas[GRADIENTS], &p->unit_grad_buffers[i], sizes[i]);
    for (int64_t u = 0; u < z->num_units; u++)
        p->unit_grads[u] = z->stage == 2 ? p->unit_grad_buffers[p->unit_buffer[u]]
                           : p->grads    ? p->grads + z->units[u].begin
                                         : NULL;
}

// Starts to gather unit u's weights from their owners. params_use_unit lets work that reads them wait.
static void params_gather_unit(const Params *p, int64_t u, cudaStream_t stream) {
    transfers_wait_for_compute(p->gpus, stream);
    gpus_all_gather_unit(p->gpus, &p->zero, u, p->weights + p->zero.units[u].begin, sizeof(floatX));
    cuda_check(cudaEventRecord(p->weights_gathered[u], p->gpus->stream));
}

// Waits for the gathered weights of the unit that contains parameter `offset`. Called before a pass launches
// the first work that reads them.
static void params_use_unit(const Params *p, int64_t offset, cudaStream_t stream) {
    if (p->zero.stage == 0) return;
    cuda_check(cudaStreamWaitEvent(stream, p->weights_gathered[zero_find_unit(&p->zero, offset)], 0));
}

// Acquires a gradient buffer for the unit that contains parameter `offset`: with ZeRO stage 2 waits until the
// unit's buffer is free, and zeroes it. Called before the backward pass launches the first work that adds to
// the unit's gradients.
static void params_begin_gradients(const Params *p, int64_t offset, cudaStream_t stream) {
    if (p->zero.stage < 2) return;
    const int64_t u = zero_find_unit(&p->zero, offset);
    const ZeroUnit *unit = &p->zero.units[u];
    cuda_check(cudaStreamWaitEvent(stream, p->unit_grad_buffer_free[p->unit_buffer[u]], 0));
    cuda_check(cudaMemsetAsync(p->unit_grads[u], 0, (unit->end - unit->begin) * sizeof(float), stream));
}

// Reduces the gradients of the unit over all GPUs, beside the following work. ZeRO stages 0 and 1 reduce only
// after the step's last micro-batch. Called after the backward pass has launched the last work that adds to
// the unit's gradients.
static void params_end_gradients(const Params *p, int64_t offset, int last_micro_batch, cudaStream_t stream) {
    const ZeroPartition *z = &p->zero;
    const int64_t u = zero_find_unit(z, offset);
    if (!p->gpus || (z->stage < 2 && !last_micro_batch)) return;
    transfers_wait_for_compute(p->gpus, stream);
    gpus_reduce_unit(p->gpus, z, u, p->unit_grads[u]);
    if (z->stage < 2) return;
    int64_t begin, end;
    zero_partition(z, u, z->rank, &begin, &end);
    add_arrays(p->grads + z->units[u].shard_offset, p->unit_grads[u] + (begin - z->units[u].begin),
               end - begin, p->gpus->stream);
    cuda_check(cudaEventRecord(p->unit_grad_buffer_free[p->unit_buffer[u]], p->gpus->stream));
}
#endif
