// sm90/pipeline.cuh: the state of a pipeline, for all kernels of sm90/.
#ifndef FSA_SM90_PIPELINE_CUH
#define FSA_SM90_PIPELINE_CUH
#include "ptx.cuh"

// A pipeline is a ring of `stages` stages in shared memory, which producers fill and consumers empty. Each
// stage has two mbarriers: `full`, which completes a phase when the stage's data have arrived, and `empty`,
// which completes one when all consumers have released the stage. Every producer and consumer has a
// PipelineState of its own: the stage that it uses next, and the parity of the ring's round. If several
// warps alternate, each processes every stride-th item, from item `first` on. Then stages % stride == 0, so
// that a stage belongs to one of them, or the items are consumed in order, as topk.cu's scores are.
struct PipelineState {
    uint32_t full, empty; // addresses of the first stage's barriers; the next stage's are 8 bytes further
    int stages, stride, stage, phase;
    __device__ __forceinline__ PipelineState(uint32_t full, uint32_t empty, int stages, int first = 0,
                                             int stride = 1)
        : full(full), empty(empty), stages(stages), stride(stride), stage(first), phase(0) {}
    __device__ __forceinline__ uint32_t full_barrier() const { return full + 8 * stage; }
    __device__ __forceinline__ uint32_t empty_barrier() const { return empty + 8 * stage; }
    // Consumer: waits until the stage is full.
    __device__ __forceinline__ void wait_full() const { mbarrier_wait(full_barrier(), phase); }
    // Producer: waits until the stage is empty. Returns at once in the first round.
    __device__ __forceinline__ void wait_empty() const { mbarrier_wait(empty_barrier(), phase ^ 1); }
    __device__ __forceinline__ void advance() {
        if ((stage += stride) >= stages) stage -= stages, phase ^= 1;
    }
    // wait_empty that sleeps between polls: leaves issue slots to other warps, and adds about 100 ns.
    __device__ __forceinline__ void wait_empty_sleeping() const {
        mbarrier_wait_sleeping(empty_barrier(), phase ^ 1);
    }
};
#endif
