// sm90/ptx.cuh: fsa/sm90/ptx.cuh's instructions in C++, for the emulator. Work in the background (wgmma, TMA)
// is done at once or as late as the program allows, by the toss of a coin, so that a missing wait and a
// buffer that is overwritten too early both show.
#ifndef FSA_PTX_SM90_CUH
#define FSA_PTX_SM90_CUH
#include "../sm80/ptx.cuh"
#include <cuda.h>

namespace emu {

bool toss(); // whether work in the background is done now

// ---- wgmma: threads hand in their parts of an operation; it is done once all 128 have.
struct WgmmaPart {
    float *d;
    uint32_t a[4];
};
struct WgmmaShape {
    int n, trans_a, trans_b, add, a_in_registers, is_half;
    uint64_t a, b;
};
void wgmma_issue(const WgmmaShape &shape, const WgmmaPart &part);
void wgmma_group();
void wgmma_finish(int left);

// ---- mbarrier
struct Mbarrier {
    uint64_t phase : 1, count : 20, pending : 20;
    int64_t bytes : 23;
};
inline Mbarrier *mbarrier_at(uint32_t address) {
    if (address % 8) fail("mbarrier at %u is not aligned to 8 bytes", address);
    return (Mbarrier *)from_shared(address);
}
inline void mbarrier_check(Mbarrier *b) {
    if (b->pending || b->bytes) return;
    b->phase ^= 1;
    b->pending = b->count;
    progress();
}
inline void mbarrier_count(uint32_t address, int expect) {
    Mbarrier *b = mbarrier_at(address);
    if (b->pending == 0) fail("mbarrier: more arrivals than it was made for (%d)", (int)b->count);
    b->bytes += expect;
    b->pending--;
    progress();
    mbarrier_check(b);
}
inline void mbarrier_bytes(uint32_t address, int bytes) {
    Mbarrier *b = mbarrier_at(address);
    b->bytes -= bytes;
    mbarrier_check(b);
}

// ---- TMA: what cuTensorMapEncodeTiled was told
struct TensorMap {
    char *base;
    int64_t size[4], stride[4]; // bytes
    int box[4];
    int16_t rank, element, swizzled, valid;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "fits");
void tma_issue(uint32_t to, const TensorMap *map, const int64_t at[4], int rank, uint32_t barrier);
void bulk_issue(uint32_t to, const void *from, int bytes, uint32_t barrier);
void copies_finish(); // those under way
void bulk_store_issue(void *to, uint32_t from, int bytes, bool add);
void bulk_stores_finish(bool written); // the thread's: read, or written too

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
    emu::wgmma_group();
}
template <int left> inline void wgmma_wait() {
    emu::wgmma_finish(left);
}
template <typename T> inline void keep_in_registers(T *&) {}
template <int N> inline void fence_operand(float (&)[N][4]) {}
template <typename T, int trans_b = 0, int trans_a = 0, int N8>
inline void wgmma_ss(float (&d)[N8][4], uint64_t a, uint64_t b, int add) {
    static_assert(N8 == 4 || N8 == 8 || N8 == 16, "the shapes of fsa/ptx_sm90.cuh");
    emu::wgmma_issue({N8 * 8, trans_a, trans_b, add, 0, std::is_same<T, __half>::value, a, b},
                     {&d[0][0], {}});
}
template <typename T, int trans_b = 0, int N8>
inline void wgmma_rs(float (&d)[N8][4], const uint32_t (&a)[4], uint64_t b, int add) {
    static_assert(N8 == 4 || N8 == 8 || N8 == 16, "the shapes of fsa/ptx_sm90.cuh");
    emu::wgmma_issue({N8 * 8, 0, trans_b, add, 1, std::is_same<T, __half>::value, 0, b},
                     {&d[0][0], {a[0], a[1], a[2], a[3]}});
}

inline void mbarrier_init(uint32_t barrier, int count) {
    *emu::mbarrier_at(barrier) = {0, (uint64_t)count, (uint64_t)count, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint32_t barrier) {
    emu::mbarrier_count(barrier, 0);
}
enum { WARP_ARRIVALS = 1 };
inline void mbarrier_arrive_warp(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    emu::mbarrier_count(barrier, bytes);
}
inline void cp_async_arrive(uint32_t barrier) {
    cp_async_commit();
    cp_async_wait<0>();
    emu::mbarrier_count(barrier, 0);
}
inline void mbarrier_wait(uint32_t barrier, int parity) {
    while ((int)emu::mbarrier_at(barrier)->phase == parity) {
        emu::copies_finish();
        if ((int)emu::mbarrier_at(barrier)->phase == parity) emu::yield();
    }
}
inline void mbarrier_wait_sleeping(uint32_t barrier, int parity) {
    mbarrier_wait(barrier, parity);
}

inline void tma_load_3d(uint32_t to, const CUtensorMap *map, int x, int y, int z, uint32_t barrier) {
    int64_t at[4] = {x, y, z, 0};
    emu::tma_issue(to, (const emu::TensorMap *)map, at, 3, barrier);
}
inline void tma_load_3d(uint32_t to, const CUtensorMap *map, int x, int y, int z, uint32_t barrier,
                        uint64_t) {
    tma_load_3d(to, map, x, y, z, barrier);
}
inline void tma_load_4d(uint32_t to, const CUtensorMap *map, int x, int y, int z, int w, uint32_t barrier) {
    int64_t at[4] = {x, y, z, w};
    emu::tma_issue(to, (const emu::TensorMap *)map, at, 4, barrier);
}
inline void bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    emu::bulk_issue(to, from, bytes, barrier);
}
inline void bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier, uint64_t) {
    bulk_load(to, from, bytes, barrier);
}
inline void bulk_store(void *to, uint32_t from, int bytes) {
    emu::bulk_store_issue(to, from, bytes, false);
}
inline void bulk_add(float *to, uint32_t from, int bytes) {
    emu::bulk_store_issue(to, from, bytes, true);
}
inline void bulk_commit() {}
inline void bulk_wait_read() {
    emu::bulk_stores_finish(false);
}
inline void bulk_wait() {
    emu::bulk_stores_finish(true);
}
inline void semaphore_wait(const int *turn, int mine) {
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine) {
        emu::progress(); // another thread block's
        emu::yield();
    }
}
inline void semaphore_release(int *turn) {
    __atomic_fetch_add(turn, 1, __ATOMIC_RELEASE);
}
inline void red_add_v2(float *to, float x, float y) {
    to[0] += x, to[1] += y;
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
