// sm90/ptx.cuh: the functions of fsa/sm90/ptx.cuh in C++, for the emulator. An asynchronous operation (wgmma,
// TMA) runs either at once or as late as the program allows, by a random bit. Late operations reveal a
// missing wait, early ones a buffer that is overwritten while it is in use.
#ifndef FSA_SM90_PTX_CUH
#define FSA_SM90_PTX_CUH
#include "../sm80/ptx.cuh"
#include <cuda.h>

namespace emu {

bool flip_coin(); // returns whether an asynchronous operation runs at once

// ---- wgmma: an instruction runs at the earliest when all 128 threads of the warpgroup have issued it
struct WgmmaOperands { // of one thread
    float *d;          // accumulators
    uint32_t a[4];     // fragment of A, if A is in registers
};
struct WgmmaInstruction {
    int n, trans_a, trans_b, add, a_in_registers, is_half;
    uint64_t a, b; // matrix descriptors
};
void issue_wgmma(const WgmmaInstruction &instruction, const WgmmaOperands &operands);
void commit_wgmma_group();
void wait_wgmma_groups(int pending); // until at most `pending` groups are pending

// ---- mbarrier
struct Mbarrier {
    uint64_t phase : 1, count : 20, pending : 20; // parity; arrivals of a phase; those still missing
    int64_t tx_bytes : 23;                        // expected minus copied bytes
};
inline Mbarrier *mbarrier_at(uint32_t address) {
    if (address % 8) fail("mbarrier at %u: must be a multiple of 8", address);
    return (Mbarrier *)smem_pointer(address);
}
inline void try_complete_phase(Mbarrier *b) {
    if (b->pending || b->tx_bytes) return;
    b->phase ^= 1;
    b->pending = b->count;
    progress();
}
inline void arrive_expect_tx(uint32_t address, int bytes) {
    Mbarrier *b = mbarrier_at(address);
    if (b->pending == 0) fail("mbarrier at %u: more than %d arrivals in a phase", address, (int)b->count);
    b->tx_bytes += bytes;
    b->pending--;
    progress();
    try_complete_phase(b);
}
inline void complete_tx(uint32_t address, int bytes) {
    Mbarrier *b = mbarrier_at(address);
    b->tx_bytes -= bytes;
    try_complete_phase(b);
}

// ---- TMA: the arguments of cuTensorMapEncodeTiled; dimension 0 is the innermost
struct TensorMap {
    char *base;
    int64_t size[4], stride[4]; // elements, bytes
    int box[4];                 // elements
    int16_t rank, element_bytes, swizzled, valid;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a TensorMap must fit into a CUtensorMap");
void issue_tma_load(uint32_t dst, const TensorMap *map, const int64_t coord[4], int rank, uint32_t barrier);
void issue_bulk_load(uint32_t dst, const void *src, int bytes, uint32_t barrier);
void complete_bulk_loads(); // runs all pending loads of the thread block
void issue_bulk_store(void *dst, uint32_t src, int bytes, bool add);
// Reads the sources of the thread's pending stores. write: writes their destinations too.
void complete_bulk_stores(bool write);

} // namespace emu

inline uint64_t make_smem_desc(uint32_t address, uint32_t panel_bytes = 16) {
    return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(panel_bytes >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
inline uint64_t advance_desc(uint64_t matrix, int bytes) {
    return matrix + bytes / 16;
}
inline uint64_t make_smem_desc_opaque(uint32_t address) {
    return make_smem_desc(address);
}
inline void wgmma_fence() {}
inline void wgmma_commit() {
    emu::commit_wgmma_group();
}
template <int left> inline void wgmma_wait() {
    emu::wait_wgmma_groups(left);
}
template <typename T> inline void keep_in_registers(T *&) {}
inline void make_opaque(int &) {}
template <int N> inline void fence_operand(float (&)[N][4]) {}
template <typename T, int trans_b = 0, int trans_a = 0, int N8>
inline void wgmma_ss(float (&d)[N8][4], uint64_t a, uint64_t b, int accumulate) {
    static_assert(N8 == 4 || N8 == 8 || N8 == 16, "the shapes of fsa/sm90/ptx.cuh");
    emu::issue_wgmma({N8 * 8, trans_a, trans_b, accumulate, 0, std::is_same<T, __half>::value, a, b},
                     {&d[0][0], {}});
}
template <typename T, int trans_b = 0, int N8>
inline void wgmma_rs(float (&d)[N8][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    static_assert(N8 == 4 || N8 == 8 || N8 == 16, "the shapes of fsa/sm90/ptx.cuh");
    emu::issue_wgmma({N8 * 8, 0, trans_b, accumulate, 1, std::is_same<T, __half>::value, 0, b},
                     {&d[0][0], {a[0], a[1], a[2], a[3]}});
}

inline void mbarrier_init(uint32_t barrier, int count) {
    *emu::mbarrier_at(barrier) = {0, (uint64_t)count, (uint64_t)count, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint32_t barrier) {
    emu::arrive_expect_tx(barrier, 0);
}
enum { WARP_ARRIVALS = 1 };
inline void mbarrier_arrive_warp(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}
inline void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
    emu::arrive_expect_tx(barrier, bytes);
}
inline void cp_async_mbarrier_arrive(uint32_t barrier) {
    cp_async_commit();
    cp_async_wait<0>();
    emu::arrive_expect_tx(barrier, 0);
}
inline void mbarrier_wait(uint32_t barrier, int parity) {
    while ((int)emu::mbarrier_at(barrier)->phase == parity) {
        emu::complete_bulk_loads();
        if ((int)emu::mbarrier_at(barrier)->phase == parity) emu::yield();
    }
}
inline void mbarrier_wait_sleeping(uint32_t barrier, int parity) {
    mbarrier_wait(barrier, parity);
}

inline void tma_load_3d(uint32_t dst, const CUtensorMap *map, int x, int y, int z, uint32_t barrier) {
    int64_t coord[4] = {x, y, z, 0};
    emu::issue_tma_load(dst, (const emu::TensorMap *)map, coord, 3, barrier);
}
inline void tma_load_3d(uint32_t dst, const CUtensorMap *map, int x, int y, int z, uint32_t barrier,
                        uint64_t) {
    tma_load_3d(dst, map, x, y, z, barrier);
}
inline void bulk_load(uint32_t dst, const void *src, int bytes, uint32_t barrier) {
    emu::issue_bulk_load(dst, src, bytes, barrier);
}
inline void bulk_load(uint32_t dst, const void *src, int bytes, uint32_t barrier, uint64_t) {
    bulk_load(dst, src, bytes, barrier);
}
inline void bulk_store(void *dst, uint32_t src, int bytes) {
    emu::issue_bulk_store(dst, src, bytes, false);
}
inline void bulk_reduce_add(float *dst, uint32_t src, int bytes) {
    emu::issue_bulk_store(dst, src, bytes, true);
}
inline void bulk_commit() {}
inline void bulk_wait_read() {
    emu::complete_bulk_stores(false);
}
inline void bulk_wait() {
    emu::complete_bulk_stores(true);
}
inline void semaphore_wait(const int *semaphore, int value) {
    while (__atomic_load_n(semaphore, __ATOMIC_ACQUIRE) != value) {
        emu::progress(); // no deadlock: another thread block releases the semaphore
        emu::yield();
    }
}
inline void semaphore_release(int *semaphore) {
    __atomic_fetch_add(semaphore, 1, __ATOMIC_RELEASE);
}
inline void red_add_v2(float *address, float x, float y) {
    address[0] += x, address[1] += y;
}
inline void fence_proxy_async() {}
inline void named_barrier_sync(int id, int threads) {
    emu::barrier_sync(id, threads);
}
inline void named_barrier_arrive(int id, int threads) {
    emu::barrier_arrive(id, threads);
}
template <int count> inline void warpgroup_reg_dealloc() {}
template <int count> inline void warpgroup_reg_alloc() {}
#endif
