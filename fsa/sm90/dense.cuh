// sm90/dense.cuh: code shared by dense_fwd.cu and dense_bwd.cu: tile sizes, matmuls on tiles in shared
// memory, the pipeline state, and the launcher.
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
#include "ptx.cuh"
#include "tma.cuh"

enum {
    FWD_ROWS = 128, // forward: rows of a work item, 64 per warpgroup
    KEYS = 128,     // forward: keys of a K or V tile; backward: keys of a work item, 64 per warpgroup
    BWD_ROWS = 64,  // backward: rows of a Q or dout tile
    KV_STAGES = 2,  // forward: stages of K and of V
    // Backward processes head groups one after another. A small head group keeps several key tiles of each
    // head in flight, which share Q and dout in L2. A head group has at least MIN_HEAD_GROUP / num_splits
    // heads and MIN_GROUP_ITEMS work items, so that the last head group still fills all SMs.
    MIN_HEAD_GROUP = 8,
    MIN_GROUP_ITEMS = 256,
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

// ---- pipeline ---------------------------------------------------------------------------------------------
// The current stage of a pipeline. phase: parity (0 or 1) of the phase in which the stage's full barrier
// completes, as mbarrier_wait takes it. It flips after the last stage. Producers wait for the empty barrier
// with phase ^ 1, which returns at once in the first round. (In selected.cuh, phase is the round count.)
template <int STAGES> struct PipelineState {
    int stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};
// Arrivals of all consumer warps at an empty barrier: one per warp that has finished reading the stage.
enum { CONSUMER_ARRIVALS = CONSUMER_THREADS / 32 * WARP_ARRIVALS };

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
// Makes the tensor maps: q and dout in boxes of tile_queries queries x g heads x 64 channels, k and v in
// boxes of KEYS keys of one head x 64 channels. Returns an FsaStatus.
static int make_tensor_maps(const DenseParams &d, FsaDtype dtype, int head_dim, int tile_queries,
                            TensorMaps *m) {
    int g = d.q_heads / d.kv_heads;
    int64_t q_size[] = {head_dim, d.q_heads, d.batch.nq},
            q_stride[] = {2, head_dim * 2, (int64_t)d.q_heads * head_dim * 2};
    int64_t k_size[] = {head_dim, d.kv_heads, d.num_keys},
            k_stride[] = {2, head_dim * 2, (int64_t)d.kv_heads * head_dim * 2};
    int q_box[] = {64, g, tile_queries}, k_box[] = {64, 1, KEYS};
    int status = make_tensor_map(&m->q, dtype, 3, d.q.data, q_size, q_stride, q_box);
    if (!status && d.dout.data)
        status = make_tensor_map(&m->dout, dtype, 3, d.dout.data, q_size, q_stride, q_box);
    if (!status) status = make_tensor_map(&m->k, dtype, 3, d.k.data, k_size, k_stride, k_box);
    if (!status) status = make_tensor_map(&m->v, dtype, 3, d.v.data, k_size, k_stride, k_box);
    return status;
}

// Launches a persistent kernel: one thread block per SM, at most one per work item. name: the kernel's.
// bytes: shared memory of a thread block. Returns an FsaStatus.
template <typename Kernel>
static int launch_persistent(const char *name, Kernel kernel, const DenseParams &d, const TensorMaps &maps,
                             int64_t num_items, int bytes, cudaStream_t stream) {
    if (num_items == 0) return FSA_OK;
    int64_t blocks = fsa_num_sms();
    if (blocks > num_items) blocks = num_items;
    return launch_kernel(name, false, kernel, (unsigned)blocks, THREADS, bytes, stream, d, maps, num_items);
}

#endif
