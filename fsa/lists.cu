// lists.cu: from the choice [Hkv, Nq, T] to the list of queries of every block: count, prefix sum, fill.
#include "kernels.h"
#include <limits.h>

enum {
    WARPS = 32,  // of a thread block
    RANGE = 512, // selection blocks that it lists
    AHEAD = 4    // entries that a lane loads at once
};

// One thread block lists RANGE blocks of one (kv head, slab). Its warps take equal shares of the slab's rows,
// in order, twice: first they count how often their share names each block (in any order); after a prefix sum
// over (block, warp) they write each entry to its place, of a warp's 32 entries that name one block the first
// first: a list ascends by row whatever the timing. Reads slab*T*4 bytes twice (from L2 the second time) and
// as often as there are ranges; writes 4 bytes an entry. At 64K tokens, 8 kv heads: 34 MB in, 34 MB out,
// 0.015 ms; the instructions of the loops bind, about 25 and 40 for 32 entries: 8.4 million entries in 2
// ranges are 34 million, 0.06 ms at 3 a clock and multiprocessor, of which 96 are at work. On an H200 0.26 ms, and
// 1.5 ms with 32 kv heads, whose scattered writes leave L2.
__global__ void __launch_bounds__(WARPS * 32)
    lists_kernel(FsaPlan p, FsaLists lists, const int32_t *all_indices, int topk, int block) {
    extern __shared__ uint32_t counts[]; // [WARPS][RANGE]
    __shared__ uint32_t warp_sum[WARPS], below;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first_block = (int64_t)blockIdx.x * RANGE, slab = blockIdx.y, head = blockIdx.z;
    const int64_t blocks = p.cu_blocks[p.num_seqs]; // those that there are; lists.blocks is a bound
    if (first_block >= blocks) return;
    const int64_t row0 = slab * lists.slab, rows = p.nq - row0 < lists.slab ? p.nq - row0 : lists.slab;
    const int64_t share = (rows + WARPS - 1) / WARPS;
    const int64_t begin = row0 + (warp * share < rows ? warp * share : rows);
    const int64_t end = begin + share < row0 + rows ? begin + share : row0 + rows;
    const int32_t *indices = all_indices + (head * p.nq + begin) * topk;
    const uint32_t entry0 = (uint32_t)(begin * topk), entries_here = (uint32_t)((end - begin) * topk);
    uint32_t *count = counts + warp * RANGE;

    // Calls visit(entry, b) for 32 entries of the share at a time, a lane each. b: the block that the entry
    // names, counted from this range's first; INT_MAX where it names none.
    auto walk = [&](auto visit) {
        int segment_end = 0, block0 = 0; // of the segment that the lane is in: queries of the share, blocks
        int64_t pos0 = 0;                // what to add to a query for its position
        const int step = 32 / topk, slot_step = 32 % topk;
        int query = lane / topk, slot = lane % topk, next[AHEAD];
        auto load = [&](uint32_t i) {
#pragma unroll
            for (int k = 0; k < AHEAD; k++) next[k] = i + 32 * k < entries_here ? indices[i + 32 * k] : -1;
        };
        load(lane);
#pragma unroll 1
        for (uint32_t i0 = 0; i0 < entries_here; i0 += 32 * AHEAD) {
            int now[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) now[k] = next[k];
            load(i0 + 32 * AHEAD + lane);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                int b = INT_MAX;
                if (now[k] >= 0) {
                    if (query >= segment_end) {
                        int64_t segment = fsa_find(p.cu_rows, p.num_segments, begin + query);
                        int64_t stop = p.cu_rows[segment + 1];
                        segment_end = (int)((stop < end ? stop : end) - begin);
                        pos0 = p.segments[segment].pos + begin - p.cu_rows[segment];
                        block0 = (int)(p.cu_blocks[p.segments[segment].seq] - first_block);
                    }
                    if ((int64_t)now[k] * block <= pos0 + query) b = block0 + now[k];
                }
                visit(entry0 + i0 + 32 * k + lane, b);
                query += step, slot += slot_step;
                if (slot >= topk) slot -= topk, query++;
            }
        }
    };

    for (int i = threadIdx.x; i < WARPS * RANGE; i += WARPS * 32) counts[i] = 0;
    if (threadIdx.x == 0) below = 0;
    __syncthreads();
    uint32_t before = 0; // entries that name blocks below this range
    walk([&](uint32_t, int b) {
        before += b < 0;
        if ((unsigned)b < RANGE) atomicAdd(&count[b], 1);
    });
    before = __reduce_add_sync(0xffffffffu, before);
    if (lane == 0 && before) atomicAdd(&below, before);
    __syncthreads();

    // A thread takes a block: its total, and then where each warp's part of its list starts.
    uint32_t total = 0;
    if (threadIdx.x < RANGE) {
        for (int w = 0; w < WARPS; w++) total += counts[w * RANGE + threadIdx.x];
    }
    uint32_t sum = total; // inclusive over the warp, then over the thread block
    for (int i = 1; i < 32; i *= 2) {
        uint32_t other = __shfl_up_sync(0xffffffffu, sum, i);
        if (lane >= i) sum += other;
    }
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) sum += warp_sum[w];
    if (threadIdx.x < RANGE) {
        uint32_t at = below + sum - total;
        uint32_t *offsets = lists.offsets + (head * lists.slabs + slab) * (lists.blocks + 1);
        if (first_block + threadIdx.x < blocks) offsets[first_block + threadIdx.x] = at;
        // The last block's thread ends the lists.
        if (first_block + threadIdx.x == blocks - 1) {
            for (int64_t i = blocks; i <= lists.blocks; i++) offsets[i] = at + total;
        }
        for (int w = 0; w < WARPS; w++) {
            uint32_t n = counts[w * RANGE + threadIdx.x];
            counts[w * RANGE + threadIdx.x] = at;
            at += n;
        }
    }
    __syncthreads();

    uint32_t *entries = lists.entries + (head * p.nq + row0) * topk;
    walk([&](uint32_t entry, int b) {
        const unsigned same = __match_any_sync(0xffffffffu, b), before = same & ((1u << lane) - 1);
        const bool here = (unsigned)b < RANGE;
        const uint32_t at = here ? count[b] : 0;
        __syncwarp();
        if (here) entries[at + __popc(before)] = entry;
        if (here && before == 0) count[b] = at + __popc(same);
        __syncwarp();
    });
}

static size_t round_up(size_t x) {
    return (x + 255) / 256 * 256;
}

static size_t entries_bytes(const FsaConfig *c, const FsaPlan *p) {
    return round_up((size_t)c->kv_heads * p->nq * c->topk * sizeof(uint32_t));
}

size_t fsa_lists_bytes(const FsaConfig *c, const FsaPlan *p, int64_t slab) {
    int64_t slabs = (p->nq + slab - 1) / slab;
    return entries_bytes(c, p) +
           round_up(c->kv_heads * slabs * (fsa_max_blocks(c, p) + 1) * sizeof(uint32_t));
}

FsaLists fsa_lists_place(const FsaConfig *c, const FsaPlan *p, int64_t slab, void *memory) {
    FsaLists lists = {slab, (p->nq + slab - 1) / slab, fsa_max_blocks(c, p), (uint32_t *)memory, NULL};
    lists.offsets = (uint32_t *)((char *)memory + entries_bytes(c, p));
    return lists;
}

int fsa_lists(const FsaConfig *c, const FsaPlan *p, const int32_t *indices, const FsaLists *lists,
              cudaStream_t stream) {
    if (lists->slab > FSA_MAX_SLAB || p->nq * c->topk > INT32_MAX || lists->blocks > INT32_MAX / 2 ||
        lists->slabs > 65535) {
        return FSA_ERROR_ARGUMENT;
    }
    if (p->nq == 0) return FSA_OK;
    dim3 grid((unsigned)((lists->blocks + RANGE - 1) / RANGE), (unsigned)lists->slabs, (unsigned)c->kv_heads);
    int smem = WARPS * RANGE * (int)sizeof(uint32_t);
    if (cudaFuncSetAttribute(lists_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem) != cudaSuccess)
        return FSA_ERROR_CUDA;
    lists_kernel<<<grid, WARPS * 32, smem, stream>>>(*p, *lists, indices, c->topk, c->block);
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}
