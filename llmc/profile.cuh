// profile.cuh: how long each part of a training step takes on the GPU. The trainer marks where a part
// begins, an event goes into the stream there, and it lasts until the next mark.
#ifndef LLMC_PROFILE_CUH
#define LLMC_PROFILE_CUH
#include "cuda_common.cuh"
#include <vector>

typedef enum {
    PART_PRODUCTS,          // with the layers' weights, forward and backward
    PART_ATTENTION_FORWARD, // what fsa.h and RoPE do
    PART_ATTENTION_BACKWARD,
    PART_NORMS, // RMSNorm, residuals, SwiGLU
    PART_EMBEDDING,
    PART_CLASSIFIER, // LM head and cross-entropy
    PART_OPTIMIZER,  // zeroed gradients, their norm, AdamW
    PART_END,        // of what is measured
} Part;

static const char *const part_names[PART_END] = {
    "products", "attention_forward", "attention_backward", "norms", "embedding", "classifier", "optimizer"};

struct Profile {
    std::vector<cudaEvent_t> events;
    std::vector<Part> parts; // of the marks made so far
};

// What follows on the stream belongs to `part`. p NULL: nothing is measured.
static inline void profile_mark(Profile *p, Part part, cudaStream_t stream) {
    if (!p) return;
    if (p->parts.size() == p->events.size()) {
        cudaEvent_t event;
        cuda_check(cudaEventCreate(&event));
        p->events.push_back(event);
    }
    cuda_check(cudaEventRecord(p->events[p->parts.size()], stream));
    p->parts.push_back(part);
}

// Adds to ms [PART_END] what the marks say, once the stream is done, and forgets them.
static inline void profile_collect(Profile *p, double *ms, cudaStream_t stream) {
    cuda_check(cudaStreamSynchronize(stream));
    for (size_t i = 0; i + 1 < p->parts.size(); i++) {
        float part;
        if (p->parts[i] == PART_END) continue;
        cuda_check(cudaEventElapsedTime(&part, p->events[i], p->events[i + 1]));
        ms[p->parts[i]] += part;
    }
    p->parts.clear();
}

static inline void profile_free(Profile *p) {
    for (cudaEvent_t event : p->events) cuda_check(cudaEventDestroy(event));
    p->events.clear();
}
#endif
