// arena.cuh: memory in arenas, one per kind. A layout function assigns the memory of all arrays. Its first
// run, with empty arenas, only counts bytes. Then the arenas are allocated, and its second run assigns
// addresses.
#ifndef LLMC_ARENA_CUH
#define LLMC_ARENA_CUH
#include "cuda_common.cuh"
#include <algorithm>

typedef enum { WEIGHTS, MASTER, MOMENTS, GRADIENTS, ACTIVATIONS, SCRATCH, ARENAS } ArenaKind;
static const char *const arena_names[ARENAS] = {"weights",   "fp32 weights", "AdamW",
                                                "gradients", "activations",  "scratch"};
typedef struct {
    char *base;   // NULL: arena_alloc only counts
    size_t bytes; // handed out so far
} Arena;

// Sets *p to `count` elements of the arena, aligned to 256 bytes, or to NULL if the arena only counts.
template <typename T> static void arena_alloc(Arena *a, T **p, int64_t count) {
    *p = a->base ? (T *)(a->base + a->bytes) : NULL;
    a->bytes += ((size_t)count * sizeof(T) + 255) / 256 * 256;
}

// Returns the bytes of all arenas [ARENAS].
static size_t arenas_bytes(const Arena *arenas) {
    size_t bytes = 0;
    for (int i = 0; i < ARENAS; i++) bytes += arenas[i].bytes;
    return bytes;
}

static void arenas_print(const Arena *arenas) {
    for (int i = 0; i < ARENAS; i++)
        if (arenas[i].bytes > 0)
            printf("  %-12s %8zu MiB\n", arena_names[i], (arenas[i].bytes + (1 << 20) - 1) >> 20);
}

// Allocates the counted bytes of all arenas on the current GPU, and leaves `reserve` bytes of its memory
// free. Returns whether the memory suffices; sets *free_bytes to what was free, without `reserve`.
static bool arenas_allocate(Arena *arenas, size_t reserve, size_t *free_bytes) {
    size_t total;
    cuda_check(cudaMemGetInfo(free_bytes, &total));
    *free_bytes -= std::min(*free_bytes, reserve);
    if (arenas_bytes(arenas) > *free_bytes) return false;
    for (int i = 0; i < ARENAS; i++) {
        if (arenas[i].bytes == 0) continue;
        cudaError_t error = cudaMalloc((void **)&arenas[i].base, arenas[i].bytes);
        if (error == cudaErrorMemoryAllocation) return false;
        cuda_check(error);
    }
    return true;
}

static void arenas_free(Arena *arenas) {
    for (int i = 0; i < ARENAS; i++) cuda_check(cudaFree(arenas[i].base));
}

// Exits with the bytes that the arenas need, the bytes free, and the flags that lower the need.
// recompute_bytes: the need with -r 2; 0: -r 2 lowers nothing.
LLMC_NORETURN static void die_out_of_memory(const Arena *arenas, size_t recompute_bytes, size_t free_bytes) {
    char parts[512] = "", lower[128] = "";
    for (int i = 0; i < ARENAS; i++) {
        size_t length = strlen(parts);
        if (arenas[i].bytes == 0) continue;
        snprintf(parts + length, sizeof parts - length, "%s%s %zu", length ? ", " : "", arena_names[i],
                 arenas[i].bytes >> 20);
    }
    if (recompute_bytes) snprintf(lower, sizeof lower, "-r 2 (needs %zu MiB), ", recompute_bytes >> 20);
    die("out of GPU memory: %zu MiB needed (%s), %zu MiB free; try %sa smaller -b or -t, or a smaller model",
        arenas_bytes(arenas) >> 20, parts, free_bytes >> 20, lower);
}
#endif
