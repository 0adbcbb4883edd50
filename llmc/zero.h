// zero.h: ZeRO's division of a model over ranks: which of them owns which part of the flat parameter buffer,
// that is, keeps its fp32 weights and AdamW's moments and updates it.
//   stage 0: every rank everything; gradients are summed on all ranks
//   stage 1: fp32 weights and moments divided; a sum of gradients arrives at its owner alone
//   stage 2: the same, and between micro-batches only the owner's part of the gradients is kept
// The buffer is cut into units that are reduced and gathered one after another: the embedding, each layer,
// and what follows them. Each unit is divided anew, so that all ranks take part in each transfer.
#ifndef LLMC_ZERO_H
#define LLMC_ZERO_H
#include "config.h"

enum { ZERO_ALIGN = 8 }; // numbers; 16 bytes in 16 bits. All units begin and end at multiples of it

typedef struct {
    int64_t begin, end; // in the parameters
    int64_t piece; // what each rank owns of it; the last one also the rest, fewer than ranks * ZERO_ALIGN
    int64_t shard; // where this rank's part begins in its shard
} ZeroUnit;

typedef struct {
    int stage, rank, ranks;
    int64_t num_units, shard_size; // numbers that this rank owns
    int64_t largest;               // unit
    ZeroUnit *units;
} Zero;

// The piece [*begin, *end) of unit u that falls to `rank`, in the parameters.
static inline void zero_piece(const Zero *z, int64_t u, int rank, int64_t *begin, int64_t *end) {
    const ZeroUnit *unit = &z->units[u];
    *begin = unit->begin + rank * unit->piece;
    *end = rank < z->ranks - 1 ? *begin + unit->piece : unit->end;
}

// What `rank` owns and updates of unit u: its piece, or with stage 0 all.
static inline void zero_owned(const Zero *z, int64_t u, int rank, int64_t *begin, int64_t *end) {
    zero_piece(z, u, rank, begin, end);
    if (z->stage == 0) *begin = z->units[u].begin, *end = z->units[u].end;
}

// Cuts the parameters of `tensors` where the layer changes. Dies where a unit is not aligned.
static inline void zero_build(Zero *z, int stage, int rank, int ranks, const ParamTensor *tensors,
                              int64_t num_tensors) {
    memset(z, 0, sizeof *z);
    z->stage = ranks > 1 ? stage : 0, z->rank = rank, z->ranks = ranks;
    z->units = (ZeroUnit *)xcalloc((size_t)num_tensors, sizeof *z->units);
    for (int64_t i = 0; i < num_tensors; i++) {
        const ParamTensor *t = &tensors[i];
        if (i == 0 || (ranks > 1 && t->layer != t[-1].layer)) z->units[z->num_units++].begin = t->offset;
        z->units[z->num_units - 1].end = t->offset + t->size;
    }
    for (int64_t u = 0; u < z->num_units; u++) {
        ZeroUnit *unit = &z->units[u];
        int64_t begin, end, size = unit->end - unit->begin;
        if (unit->begin % ZERO_ALIGN || size % ZERO_ALIGN)
            die("parameters %lld to %lld: not aligned to %d", (long long)unit->begin, (long long)unit->end,
                ZERO_ALIGN);
        unit->piece = size / ranks / ZERO_ALIGN * ZERO_ALIGN;
        zero_owned(z, u, rank, &begin, &end);
        unit->shard = z->shard_size;
        z->shard_size += end - begin;
        if (size > z->largest) z->largest = size;
    }
}

static inline void zero_free(Zero *z) {
    free(z->units);
    memset(z, 0, sizeof *z);
}

// The unit that parameter `offset` belongs to.
static inline int64_t zero_unit_of(const Zero *z, int64_t offset) {
    int64_t lo = 0, hi = z->num_units;
    while (hi - lo > 1) {
        int64_t mid = (lo + hi) / 2;
        if (z->units[mid].begin <= offset)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}
#endif
