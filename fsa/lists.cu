// lists.cu: from the choice [Hkv, Nq, T] to the list of queries of every block: count, prefix sum, fill.
#include "kernels.h"

enum { WARPS = 32, RANGE = 512 }; // warps of a block, and selection blocks that one thread block lists

// Walks a lane through entries of ascending row; remembers the segment that it is in.
struct Walk {
    int64_t row_end, pos_minus_row, block0;
    // The block, counted over all sequences, that entry e of a head names with `index`; -1 for none.
    __device__ __forceinline__ int64_t block_of(const FsaPlan &p, uint32_t e, int index, int topk,
                                                int block) {
        int64_t row = e / (uint32_t)topk;
        if (row >= row_end) {
            int64_t i = fsa_find(p.cu_rows, p.num_segments, row);
            row_end = p.cu_rows[i + 1];
            pos_minus_row = p.segments[i].pos - p.cu_rows[i];
            block0 = p.cu_blocks[p.segments[i].seq];
        }
        return index >= 0 && (int64_t)index * block <= row + pos_minus_row ? block0 + index : -1;
    }
};

// One thread block lists RANGE blocks of one (kv head, slab). Its warps take equal shares of the slab's rows,
// in order, twice: first they count how often their share names each block; after a prefix sum over (block,
// warp) they write each entry to its place. A warp looks at 32 entries at a time, query after query (a query
// names a block once, so no two lanes meet in a counter): a list ascends by row whatever the timing. Reads
// slab*T*4 bytes twice (from L2 the second time) and as often as there are ranges; writes 4 bytes an entry.
// At 64K tokens, 8 kv heads: 34 MB in, 34 MB out; the instructions of this loop bind, not memory.
__global__ void __launch_bounds__(WARPS * 32)
    lists_kernel(FsaPlan p, FsaLists lists, const int32_t *all_indices, int topk, int block) {
    __shared__ uint16_t count[WARPS][RANGE];
    __shared__ uint32_t start[RANGE], warp_sum[WARPS], below;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t first_block = (int64_t)blockIdx.x * RANGE, slab = blockIdx.y, head = blockIdx.z;
    const int32_t *indices = all_indices + head * p.nq * topk;
    int64_t row0 = slab * lists.slab, rows = p.nq - row0 < lists.slab ? p.nq - row0 : lists.slab;
    int64_t share = (rows + WARPS - 1) / WARPS;
    int64_t begin = row0 + warp * share, end = begin + share < row0 + rows ? begin + share : row0 + rows;

    for (int i = threadIdx.x; i < WARPS * RANGE; i += WARPS * 32) (&count[0][0])[i] = 0;
    if (threadIdx.x == 0) below = 0;
    __syncthreads();

    uint32_t before = 0; // entries that name blocks below this range
    Walk walk = {};
    int next = begin * topk + lane < end * topk ? indices[begin * topk + lane] : -1;
    for (int64_t e0 = begin * topk; e0 < end * topk; e0 += 32) {
        int64_t e = e0 + lane, at = e < end * topk ? walk.block_of(p, (uint32_t)e, next, topk, block) : -1;
        next = e + 32 < end * topk ? indices[e + 32] : -1;
        before += at >= 0 && at < first_block;
        int b = at >= first_block && at < first_block + RANGE ? (int)(at - first_block) : -1;
        if (!__any_sync(0xffffffffu, b >= 0)) continue;
        int query = (int)((uint32_t)e / topk - (uint32_t)e0 / topk), queries = 31 / topk + 2;
        for (int i = 0; i < queries; i++) {
            if (b >= 0 && query == i) count[warp][b]++;
            __syncwarp();
        }
    }
    before = __reduce_add_sync(0xffffffffu, before);
    if (lane == 0 && before) atomicAdd(&below, before);
    __syncthreads();

    // Block i's total, and each warp's start within the block.
    uint32_t total = 0;
    if (threadIdx.x < RANGE) {
        for (int w = 0; w < WARPS; w++) {
            uint32_t n = count[w][threadIdx.x];
            count[w][threadIdx.x] = (uint16_t)total;
            total += n;
        }
    }
    uint32_t sum = total; // inclusive over the warp, then over the thread block
    for (int i = 1; i < 32; i *= 2) {
        uint32_t other = __shfl_up_sync(0xffffffffu, sum, i);
        if (lane >= i) sum += other;
    }
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) sum += warp_sum[w];
    uint32_t *offsets = lists.offsets + (head * lists.slabs + slab) * (lists.blocks + 1);
    if (threadIdx.x < RANGE) {
        start[threadIdx.x] = below + sum - total;
        int64_t at = first_block + threadIdx.x;
        if (at < lists.blocks) offsets[at] = start[threadIdx.x];
        if (at == lists.blocks - 1) offsets[at + 1] = below + sum;
    }
    __syncthreads();

    uint32_t *entries = lists.entries + (head * p.nq + row0) * topk;
    walk = {};
    next = begin * topk + lane < end * topk ? indices[begin * topk + lane] : -1;
    for (int64_t e0 = begin * topk; e0 < end * topk; e0 += 32) {
        int64_t e = e0 + lane, at = e < end * topk ? walk.block_of(p, (uint32_t)e, next, topk, block) : -1;
        next = e + 32 < end * topk ? indices[e + 32] : -1;
        int b = at >= first_block && at < first_block + RANGE ? (int)(at - first_block) : -1;
        if (!__any_sync(0xffffffffu, b >= 0)) continue;
        int query = (int)((uint32_t)e / topk - (uint32_t)e0 / topk), queries = 31 / topk + 2;
        for (int i = 0; i < queries; i++) {
            if (b >= 0 && query == i) entries[start[b] + count[warp][b]++] = (uint32_t)e;
            __syncwarp();
        }
    }
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
    if (lists->slab > FSA_MAX_SLAB || p->nq * c->topk > UINT32_MAX || lists->blocks > INT32_MAX / 2 ||
        lists->slabs > 65535) {
        return FSA_ERROR_ARGUMENT;
    }
    if (p->nq == 0) return FSA_OK;
    dim3 grid((unsigned)((lists->blocks + RANGE - 1) / RANGE), (unsigned)lists->slabs, (unsigned)c->kv_heads);
    lists_kernel<<<grid, WARPS * 32, 0, stream>>>(*p, *lists, indices, c->topk, c->block);
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}
