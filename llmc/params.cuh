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
    float **unit_grads;         // [units], on the host: where the backward pass writes each unit's gradients
    int *unit_buffer;           // [units], on the host: the unit's index in unit_grad_buffers
    cudaEvent_t *weights_ready; // [units] the unit's weights are updated, and gathered from their owners
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
    p->weights_ready = (cudaEvent_t *)xcalloc(units, sizeof *p->weights_ready);
    for (int64_t u = 0; u < units; u++) {
        p->unit_buffer[u] = u == 0 ? 0 : u == units - 1 ? (c->tied ? 1 : 0) : 2 + (int)(u % 2);
        cuda_check(cudaEventCreateWithFlags(&p->weights_ready[u], cudaEventDisableTiming));
    }
    for (cudaEvent_t &event : p->unit_grad_buffer_free)
        cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
}

static void params_free(Params *p) {
    for (int64_t u = 0; u < p->zero.num_units; u++) cuda_check(cudaEventDestroy(p->weights_ready[u]));
    for (cudaEvent_t event : p->unit_grad_buffer_free) cuda_check(cudaEventDestroy(event));
    free(p->unit_grads), free(p->unit_buffer), free(p->weights_ready);
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

// Marks the weights of unit u as updated by the work on `stream`, and with ZeRO starts to gather them from
// their owners.
static void params_share_unit(const Params *p, int64_t u, cudaStream_t stream) {
    if (p->zero.stage > 0) {
        transfers_wait_for_compute(p->gpus, stream);
        gpus_all_gather_unit(p->gpus, &p->zero, u, p->weights + p->zero.units[u].begin, sizeof(floatX));
        stream = p->gpus->stream;
    }
    cuda_check(cudaEventRecord(p->weights_ready[u], stream));
}

// Waits for the updated weights of the unit that contains parameter `offset`. Called before a pass launches
// the first work that reads them.
static void params_use_unit(const Params *p, int64_t offset, cudaStream_t stream) {
    cuda_check(cudaStreamWaitEvent(stream, p->weights_ready[zero_find_unit(&p->zero, offset)], 0));
}

// Returns whether a micro-batch adds to the gradients of those before; else its matmuls overwrite them. With
// ZeRO stage 2 every micro-batch begins with new gradients.
static int params_add_gradients(const Params *p, int first_micro_batch) {
    return p->zero.stage < 2 && !first_micro_batch;
}

// Called before the backward pass launches the first work that writes the gradients of the unit that contains
// parameter `offset`: with ZeRO stage 2 waits until the unit's buffer is free; zeroes the gradients that no
// matmul overwrites.
static void params_begin_gradients(const Params *p, const ParamLayout *layout, int64_t offset,
                                   int first_micro_batch, cudaStream_t stream) {
    const int64_t u = zero_find_unit(&p->zero, offset);
    const ZeroUnit *unit = &p->zero.units[u];
    if (p->zero.stage == 2)
        cuda_check(cudaStreamWaitEvent(stream, p->unit_grad_buffer_free[p->unit_buffer[u]], 0));
    if (params_add_gradients(p, first_micro_batch)) return;
    int64_t begin = unit->begin; // of neighbouring tensors to zero
    for (int64_t i = 0; i <= layout->num_tensors; i++) {
        const int64_t end = i < layout->num_tensors ? layout->tensors[i].offset : layout->num_params;
        if (end < unit->begin || end > unit->end) continue;
        if (end < unit->end && !param_is_linear(layout, &layout->tensors[i])) continue;
        if (end > begin)
            cuda_check(cudaMemsetAsync(p->unit_grads[u] + (begin - unit->begin), 0,
                                       (end - begin) * sizeof(float), stream));
        if (end < unit->end) begin = end + layout->tensors[i].size;
    }
}

// Reduces the gradients of the unit over all GPUs, beside the following work. ZeRO stages 0 and 1 reduce only
// after the step's last micro-batch. Called after the backward pass has launched the last work that writes
// the unit's gradients.
static void params_end_gradients(const Params *p, int64_t offset, int first_micro_batch, int last_micro_batch,
                                 cudaStream_t stream) {
    const ZeroPartition *z = &p->zero;
    const int64_t u = zero_find_unit(z, offset);
    if (!p->gpus || (z->stage < 2 && !last_micro_batch)) return;
    transfers_wait_for_compute(p->gpus, stream);
    gpus_reduce_unit(p->gpus, z, u, p->unit_grads[u]);
    if (z->stage < 2) return;
    int64_t begin, end;
    zero_partition(z, u, z->rank, &begin, &end);
    float *own = p->grads + z->units[u].shard_offset;
    const float *reduced = p->unit_grads[u] + (begin - z->units[u].begin);
    if (first_micro_batch)
        cuda_check(cudaMemcpyAsync(own, reduced, (end - begin) * sizeof(float), cudaMemcpyDeviceToDevice,
                                   p->gpus->stream));
    else
        add_arrays(own, reduced, end - begin, p->gpus->stream);
    cuda_check(cudaEventRecord(p->unit_grad_buffer_free[p->unit_buffer[u]], p->gpus->stream));
}
#endif
