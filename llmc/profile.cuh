// profile.cuh: measures how long each part of a training step takes on the GPU. The trainer marks where a
// part begins: an event is recorded on the stream. The part lasts until the next mark.
#ifndef LLMC_PROFILE_CUH
#define LLMC_PROFILE_CUH
#include "cuda_common.cuh"
#include "profile_work.h"
#include <vector>

// Returns the key of a part in dev/results/*.jsonl. "products" is kept for old files.
static inline const char *part_key(int part) {
    return part == PART_MATMUL ? "products" : part_names[part];
}

struct Profile {
    std::vector<cudaEvent_t> events;
    std::vector<ProfilePart> parts; // one per mark
};

// Work that is launched on the stream after this call belongs to `part`. Does nothing if p is NULL.
static inline void profile_mark(Profile *p, ProfilePart part, cudaStream_t stream) {
    if (!p) return;
    if (p->parts.size() == p->events.size()) {
        cudaEvent_t event;
        cuda_check(cudaEventCreate(&event));
        p->events.push_back(event);
    }
    cuda_check(cudaEventRecord(p->events[p->parts.size()], stream));
    p->parts.push_back(part);
}

// Waits for the stream, adds the milliseconds of each part to ms [PART_END], and removes all marks.
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
