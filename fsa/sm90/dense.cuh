// sm90/dense.cuh: code shared by dense_fwd.cu and dense_bwd.cu: tile sizes, matmuls and loads of tiles in
// shared memory, the tensor maps, and the grid.
//
// In both kernels a producer warpgroup loads tiles by TMA into a pipeline in shared memory, and two consumer
// warpgroups run wgmma on them. Both are persistent: longer work items come first, so that all thread blocks
// end together, and the loads of the next work item overlap the epilogue of the current one.
//
// The g query heads of a KV head are packed into the rows of a tile: row r is head r % g of query r / g. So g
// heads share each tile of K and V, and a tile spans few positions, which keeps the masked part small.
#ifndef FSA_SM90_DENSE_CUH
#define FSA_SM90_DENSE_CUH
#include "../dense.cuh"
#include "pipeline.cuh"
#include "tma.cuh"

enum {
    FWD_ROWS = 128, // forward: rows of a work item, 64 per warpgroup
    KEYS = 128,     // forward: keys of a K or V tile; backward: keys of a work item, 64 per warpgroup
    BWD_ROWS = 64,  // backward: rows of a Q or dout tile
    KV_STAGES = 2,  // forward: stages of K and of V
    // Backward processes head groups one after another. A small head group keeps several key tiles of each
    // head in flight, which share Q and dout in L2. A head group has at least MIN_HEAD_GROUP / num_splits
    // heads and MIN_GROUP_ITEMS work items, so that the last head group still fills all SMs.
    MIN_HEAD_GROUP = FSA_SMALL_LIMITS ? 1 : 8,
    MIN_GROUP_ITEMS = FSA_SMALL_LIMITS ? 1 : 256,
    // Splits of backward under the compressed rule. The longest work item takes twice as long as the average.
    // With one or two work items per SM that leaves SMs idle, so the rows of each work item are split.
    //     work items                                     splits
    //     at least MIN_ITEMS_UNSPLIT                     1
    //     at least MIN_ITEMS_TWO_SPLITS                  2
    //     fewer: the splits make about SPLIT_TARGET_ITEMS work items, at most MAX_SPLITS splits
    MIN_ITEMS_UNSPLIT = 256,
    MIN_ITEMS_TWO_SPLITS = 128,
    SPLIT_TARGET_ITEMS = 192,
    MAX_SPLITS = 16,
    CONSUMER_THREADS = 256, // two warpgroups; a third one is the producer
    THREADS = CONSUMER_THREADS + 128,
    // Registers per thread. The producers of backward need more: they iterate over row tiles themselves.
    FWD_PRODUCER_REGISTERS = 24,
    FWD_CONSUMER_REGISTERS = 240,
    BWD_PRODUCER_REGISTERS = 40,
    BWD_CONSUMER_REGISTERS = 232,
};

// TMA tensor maps, passed to kernels by value. Forward leaves dout unset.
struct TensorMaps {
    CUtensorMap q, dout, k, v;
};

// ---- matmuls of a warpgroup on tiles in shared memory, D/64 panels of 64 columns (ptx.cuh) ----------------
// x (64 x N) = A B^T, asynchronous. A: 64 rows at address a, in panels of A_ROWS rows. B: N rows at address
// b, in panels of B_ROWS rows.
template <typename T, int D, int A_ROWS, int B_ROWS, int N8>
static __device__ __forceinline__ void gemm_ss(float (&x)[N8][4], uint32_t a, uint32_t b) {
    const uint64_t desc_a = make_smem_desc(a), desc_b = make_smem_desc(b);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_ss<T>(x, advance_desc(desc_a, k / 4 * A_ROWS * 128 + k % 4 * 32),
                    advance_desc(desc_b, k / 4 * B_ROWS * 128 + k % 4 * 32), k > 0);
}
// x (64 x D) = (accumulate ? x : 0) + A B, asynchronous. A (64 x 16*K16) in registers, B (16*K16 x D) at
// address b, in panels of B_ROWS rows.
template <typename T, int B_ROWS, int N8, int K16>
static __device__ __forceinline__ void gemm_rs(float (&x)[N8][4], const uint32_t (&a)[K16][4], uint32_t b,
                                               bool accumulate) {
    const uint64_t desc_b = make_smem_desc(b, B_ROWS * 128);
#pragma unroll
    for (int k = 0; k < K16; k++)
        wgmma_rs<T, 1>(x, a[k], advance_desc(desc_b, k * 2048), accumulate || k > 0);
}

// Converts accumulators (64 x 16*K16) to 16 bits, as the A operand of gemm_rs.
template <typename T, int K16>
static __device__ __forceinline__ void pack_as_a(uint32_t (&a)[K16][4], const float (&x)[2 * K16][4]) {
#pragma unroll
    for (int k = 0; k < K16; k++) accum_as_a<T>(a[k], x[2 * k], x[2 * k + 1]);
}

// ---- tiles in shared memory -------------------------------------------------------------------------------
// Arrivals of all consumer warps at an empty barrier: one per warp that has finished reading the stage.
enum { CONSUMER_ARRIVALS = CONSUMER_THREADS / 32 * WARP_ARRIVALS };

// One thread: loads a tile by TMA, in D/64 panels of TILE_ROWS rows of 64 columns. head, row: coordinates of
// the box (make_tensor_maps). Its bytes complete at `barrier`.
template <int D, int TILE_ROWS>
static __device__ __forceinline__ void load_tile(uint32_t tile, const CUtensorMap *map, int head, int row,
                                                 uint32_t barrier) {
    for (int i = 0; i < D / 64; i++) tma_load_3d(tile + i * TILE_ROWS * 128, map, i * 64, head, row, barrier);
}

// Sets rows first .. TILE_ROWS - 1 of a tile to zero: they belong to another sequence. A NaN or Inf in them
// would spread even if P is 0. All consumer threads call it.
template <int D, int TILE_ROWS> static __device__ __forceinline__ void clear_rows(char *tile, int first) {
    for (int i = threadIdx.x; i < (TILE_ROWS - first) * (D / 8); i += CONSUMER_THREADS)
        *(uint4 *)(tile + panel_offset(first + i / (D / 8), i % (D / 8), TILE_ROWS * 128)) =
            make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    named_barrier_sync(3, CONSUMER_THREADS);
}

// ---- launch -----------------------------------------------------------------------------------------------
// Makes the tensor map of x [num_rows, heads, head_dim], whose copies take boxes of box_rows rows x box_heads
// heads x 64 channels. Returns an FsaStatus.
static int make_rows_map(CUtensorMap *map, FsaDtype dtype, ConstRows x, int64_t num_rows, int heads,
                         int head_dim, int box_rows, int box_heads) {
    const int64_t size[] = {head_dim, heads, num_rows}, stride[] = {2, head_dim * 2, x.stride * 2};
    const int box[] = {64, box_heads, box_rows};
    return make_tensor_map(map, dtype, 3, x.data, size, stride, box);
}
// Makes all tensor maps: q and dout in boxes of tile_queries queries x g heads, k and v in boxes of KEYS keys
// of one head. Returns an FsaStatus.
static int make_tensor_maps(const DenseParams &d, FsaDtype dtype, int head_dim, int tile_queries,
                            TensorMaps *m) {
    const int g = d.q_heads / d.kv_heads;
    TRY(make_rows_map(&m->q, dtype, d.q, d.batch.nq, d.q_heads, head_dim, tile_queries, g));
    if (d.dout.data)
        TRY(make_rows_map(&m->dout, dtype, d.dout, d.batch.nq, d.q_heads, head_dim, tile_queries, g));
    TRY(make_rows_map(&m->k, dtype, d.k, d.num_keys, d.kv_heads, head_dim, KEYS, 1));
    return make_rows_map(&m->v, dtype, d.v, d.num_keys, d.kv_heads, head_dim, KEYS, 1);
}

// Returns the grid of a persistent kernel: one thread block per SM, at most one per work item.
static inline unsigned persistent_grid(int64_t num_items) {
    int64_t num_sms = fsa_num_sms();
    return (unsigned)(num_sms < num_items ? num_sms : num_items);
}

#endif
