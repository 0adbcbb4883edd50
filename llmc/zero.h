// zero.h: ZeRO's partition of a model over ranks. The owner of a parameter keeps its fp32 weight and AdamW's
// moments, and updates it.
//   stage 0: every rank owns everything; gradients are all-reduced
//   stage 1: fp32 weights and moments are partitioned; gradients are reduce-scattered to their owners
//   stage 2: as stage 1, and between micro-batches a rank keeps the gradients of its own partition only
// The flat parameter buffer is cut into units: the embedding, each layer, and the tensors after the last
// layer. Units are reduced and gathered one after another. Each unit is partitioned over all ranks, so that
// all ranks take part in each transfer.
#ifndef LLMC_ZERO_H
#define LLMC_ZERO_H
#include "config.h"

enum { ZERO_ALIGN = 8 }; // elements, 16 bytes in a 16-bit type; all units begin and end at multiples of it

typedef struct {
    int64_t begin, end;     // the unit's elements in the parameter buffer
    int64_t partition_size; // elements of each rank; the last rank also has the remainder
    int64_t shard_offset;   // where the unit begins in this rank's part of the parameters
} ZeroUnit;

typedef struct {
    int stage, rank, ranks;
    int64_t num_units, shard_size; // shard_size: elements in this rank's part, with stage 0 all
    ZeroUnit *units;               // [num_units]
} ZeroPartition;

// Sets [*begin, *end) to the partition of unit u that belongs to `rank`, in the parameter buffer.
static inline void zero_partition(const ZeroPartition *z, int64_t u, int rank, int64_t *begin, int64_t *end) {
    const ZeroUnit *unit = &z->units[u];
    *begin = unit->begin + rank * unit->partition_size;
    *end = rank < z->ranks - 1 ? *begin + unit->partition_size : unit->end;
}

// Sets [*begin, *end) to the elements of unit u that `rank` owns and updates: its partition, with stage 0 the
// whole unit.
static inline void zero_owned(const ZeroPartition *z, int64_t u, int rank, int64_t *begin, int64_t *end) {
    zero_partition(z, u, rank, begin, end);
    if (z->stage == 0) *begin = z->units[u].begin, *end = z->units[u].end;
}

// Cuts the parameters of tensors [num_tensors] into units where the layer changes, and partitions each unit
// over `ranks` ranks. One rank alone has stage 0. Exits with an error if a unit is not aligned.
static inline void zero_partition_build(ZeroPartition *z, int stage, int rank, int ranks,
                                        const ParamTensor *tensors, int64_t num_tensors) {
    memset(z, 0, sizeof *z);
    z->stage = ranks > 1 ? stage : 0, z->rank = rank, z->ranks = ranks;
    z->units = (ZeroUnit *)xcalloc((size_t)num_tensors, sizeof *z->units);
    for (int64_t i = 0; i < num_tensors; i++) {
        const ParamTensor *t = &tensors[i];
        if (i == 0 || t->layer != t[-1].layer) z->units[z->num_units++].begin = t->offset;
        z->units[z->num_units - 1].end = t->offset + t->size;
    }
    for (int64_t u = 0; u < z->num_units; u++) {
        ZeroUnit *unit = &z->units[u];
        int64_t begin, end, size = unit->end - unit->begin;
        if (unit->begin % ZERO_ALIGN || size % ZERO_ALIGN)
            die("ZeRO unit of parameters %lld to %lld: must begin and end at multiples of %d; choose "
                "-channels and -hidden as multiples of %d",
                (long long)unit->begin, (long long)unit->end, ZERO_ALIGN, ZERO_ALIGN);
        unit->partition_size = size / ranks / ZERO_ALIGN * ZERO_ALIGN;
        zero_owned(z, u, rank, &begin, &end);
        unit->shard_offset = z->shard_size;
        z->shard_size += end - begin;
    }
}

static inline void zero_partition_free(ZeroPartition *z) {
    free(z->units);
    memset(z, 0, sizeof *z);
}

// Returns the index of the unit that contains parameter `offset`.
static inline int64_t zero_find_unit(const ZeroPartition *z, int64_t offset) {
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
