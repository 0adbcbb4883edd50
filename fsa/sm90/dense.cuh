// dense_sm90.cu: the dense kernels (dense.cu) for Hopper: TMA brings tiles into a ring of stages in shared
// memory, two warpgroups of consumers multiply with wgmma. A group's heads are packed into a tile's rows: row
// r is head r % g of token r / g, so that g heads share each tile of K and V and the masks stay tight.
//
// Both kernels are persistent: a thread block takes work items, long ones first, so that all end together;
// the loads of the next item travel while this one's results are written.
#ifndef FSA_SM90_DENSE_CUH
#define FSA_SM90_DENSE_CUH
#include "../dense.cuh"
#include "ptx.cuh"
#include "tma.cuh"

enum {
    ROWS = 128,       // rows of a work item of forward, 64 a warpgroup
    KEYS = 128,       // keys of a tile that forward streams; of a work item of backward, 64 a warpgroup
    STREAM_ROWS = 64, // rows of a tile that backward streams
    // Backward takes some heads together, few, so that several tiles of keys of each are under way and share
    // what their rows bring into the L2, but so many that the last of them still fill all multiprocessors.
    FEW_HEADS = 8,
    ENOUGH_ITEMS = 256,
    // The compressed rule's longest work item is twice the average, so where a wave or two of thread blocks
    // would take all items, these are divided: in two, and where there are few so that they make some 192. 192,
    // 256, 384 and 512 were tried, at 4K to 96K tokens.
    UNDIVIDED_ITEMS = 256,
    HALVED_ITEMS = 128,
    SHARED_ITEMS = 192,
    MOST_SHARES = 16,
    KV_STAGES = 2,
    CONSUMERS = 256, // threads; a third warpgroup produces
    THREADS = CONSUMERS + 128,
    // Of a thread of forward and of backward, whose producers keep books.
    PRODUCER_REGISTERS = 24,
    CONSUMER_REGISTERS = 240,
    BACKWARD_PRODUCER_REGISTERS = 40,
    BACKWARD_CONSUMER_REGISTERS = 232,
};

struct Maps {
    CUtensorMap q, dout, k, v;
};

// ---- tiles in shared memory: D/64 panels of 64 columns ---------------------------------------------------
// x (64 x N) = A B^T: 64 rows of A from address a on, N rows of B from address b on, both in panels of so
// many rows.
template <typename T, int D, int A_ROWS, int B_ROWS, int N8>
static __device__ __forceinline__ void product_rows(float (&x)[N8][4], uint32_t a, uint32_t b) {
    const uint64_t from_a = make_smem_desc(a), from_b = make_smem_desc(b);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_ss<T>(x, advance_desc(from_a, k / 4 * A_ROWS * 128 + k % 4 * 32),
                    advance_desc(from_b, k / 4 * B_ROWS * 128 + k % 4 * 32), k > 0);
}
// x (64 x D) = (add ? x : 0) + A B: A (64 x 16*K16) in registers, B's rows from address b on.
template <typename T, int B_ROWS, int N8, int K16>
static __device__ __forceinline__ void product_columns(float (&x)[N8][4], const uint32_t (&a)[K16][4],
                                                       uint32_t b, bool add) {
    const uint64_t from = make_smem_desc(b, B_ROWS * 128);
#pragma unroll
    for (int k = 0; k < K16; k++) wgmma_rs<T, 1>(x, a[k], advance_desc(from, k * 2048), add || k > 0);
}

// ---- the ring ---------------------------------------------------------------------------------------------
// A stage of the ring and the parity of its current round.
template <int STAGES> struct Turn {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};
// Arrivals of the consumers' warps, each of which is done with what a barrier guards.
enum { RELEASES = CONSUMERS / 32 * WARP_ARRIVALS };

// A tile of TILE_ROWS rows that goes on past its sequence's: rows `from` on become zeros, since what lies
// there may be no number, which no probability of 0 makes harmless. All consumers call it.
template <int D, int TILE_ROWS> static __device__ __forceinline__ void clear_rows(char *tile, int from) {
    for (int i = threadIdx.x; i < (TILE_ROWS - from) * (D / 8); i += CONSUMERS)
        *(uint4 *)(tile + panel_offset(from + i / (D / 8), i % (D / 8), TILE_ROWS * 128)) =
            make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    named_barrier_sync(3, CONSUMERS);
}

// ---------------------------------------------------------------------------------------------------------
// Launches

static int processors() {
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// q and dO in boxes of `tokens` tokens of a group's heads, k and v in boxes of KEYS keys of a head.
static int make_maps(const DenseParams &d, FsaDtype dtype, int head_dim, int tokens, Maps *m) {
    int g = d.q_heads / d.kv_heads;
    int64_t q_size[] = {head_dim, d.q_heads, d.batch.nq},
            q_stride[] = {2, head_dim * 2, (int64_t)d.q_heads * head_dim * 2};
    int64_t k_size[] = {head_dim, d.kv_heads, d.num_keys},
            k_stride[] = {2, head_dim * 2, (int64_t)d.kv_heads * head_dim * 2};
    int q_box[] = {64, g, tokens}, k_box[] = {64, 1, KEYS};
    int status = make_tensor_map(&m->q, dtype, 3, d.q, q_size, q_stride, q_box);
    if (!status && d.dout) status = make_tensor_map(&m->dout, dtype, 3, d.dout, q_size, q_stride, q_box);
    if (!status) status = make_tensor_map(&m->k, dtype, 3, d.k, k_size, k_stride, k_box);
    if (!status) status = make_tensor_map(&m->v, dtype, 3, d.v, k_size, k_stride, k_box);
    return status;
}

template <typename Kernel>
static int launch(Kernel kernel, const DenseParams &d, const Maps &maps, int64_t items, int bytes,
                  cudaStream_t stream) {
    if (items == 0) return FSA_OK;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
        return FSA_ERROR_CUDA;
    int64_t blocks = processors();
    if (blocks > items) blocks = items;
    kernel<<<(unsigned)blocks, THREADS, bytes, stream>>>(d, maps, items);
    return launch_status();
}

#endif
