// sm90/ptx.cuh: the inline PTX for Hopper (sm_90a), one function per instruction: wgmma, mbarrier, TMA,
// named barriers, register reallocation. dev/emulator/sm90/ptx.cuh has the same functions in C++.
//
// wgmma operands in shared memory are panels of 64 columns: [rows][64] 16-bit elements, 128 bytes per row,
// with the 128-byte swizzle of TMA (16-byte chunk c of a row is at c ^ row % 8). A panel starts at a multiple
// of 1,024 bytes. A matrix of 128 columns is two panels.
//
// Accumulators of a warpgroup: d[j][i], j = 0 .. N/8 - 1, is row 16*warp + lane/4 + 8*(i/2) of 64, column
// 8*j + 2*(lane%4) + i%2. A operands in registers are those of mma.m16n8k16 (sm80/ptx.cuh), 16 rows per warp.
#ifndef FSA_SM90_PTX_CUH
#define FSA_SM90_PTX_CUH
#include "../sm80/ptx.cuh"
#include <cuda.h>

// Returns the descriptor of a matrix in shared memory, 128-byte swizzle. K-major (rows m or n, columns k):
// the next 16 of k are 32 bytes further. MN-major (rows k, columns m or n): the next 16 of k are 2,048 bytes
// further; panel_bytes is the distance between panels of 64 columns.
__device__ __forceinline__ uint64_t make_smem_desc(uint32_t address, uint32_t panel_bytes = 16) {
    return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(panel_bytes >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
// The same, but the compiler cannot see that the address is constant. Otherwise the compiler would keep the
// descriptors of all k steps of a loop in registers.
__device__ __forceinline__ uint64_t make_smem_desc_opaque(uint32_t address) {
    asm volatile("" : "+r"(address));
    return make_smem_desc(address);
}

// Keeps a pointer in a register. ptxas would recompute it in each iteration of a loop.
template <typename T> __device__ __forceinline__ void keep_in_registers(T *&pointer) {
    asm volatile("" : "+l"(pointer));
}

// Hides the value of x from the compiler, which then recomputes values derived from x in each iteration of a
// loop instead of keeping them in registers.
__device__ __forceinline__ void make_opaque(int &x) {
    asm volatile("" : "+r"(x));
}

// Returns the descriptor with its address advanced by `bytes` (a multiple of 16).
__device__ __forceinline__ uint64_t advance_desc(uint64_t desc, int bytes) {
    return desc + bytes / 16;
}

// Orders register writes before wgmma. Call it before the first wgmma of a group, and after writes to
// registers that a wgmma reads or accumulates to.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `pending` groups of the warpgroup are in flight.
template <int pending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Tells the compiler that accumulators change here, so that it moves no use of them before a wait.
template <int N> __device__ __forceinline__ void fence_operand(float (&d)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++)
        asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

// d (64 x N) = (accumulate ? d : 0) + A (64 x 16) B (16 x N), asynchronous until wgmma_wait. N is 32, 64 or
// 128. wgmma_ss: A and B from shared memory (descriptors a, b). wgmma_rs: A from registers. trans_a, trans_b:
// 1 if the operand is MN-major.
template <typename T, int N, int trans_b> struct Wgmma;

// asm operands of the accumulators, and their numbers. FSA_WGMMA defines one type and N; n0 to n6 are the
// numbers of the operands after the accumulators.
#define FSA_ACC(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FSA_ACC_32 FSA_ACC(0), FSA_ACC(1), FSA_ACC(2), FSA_ACC(3)
#define FSA_ACC_64 FSA_ACC_32, FSA_ACC(4), FSA_ACC(5), FSA_ACC(6), FSA_ACC(7)
#define FSA_ACC_128                                                                                          \
    FSA_ACC_64, FSA_ACC(8), FSA_ACC(9), FSA_ACC(10), FSA_ACC(11), FSA_ACC(12), FSA_ACC(13), FSA_ACC(14),     \
        FSA_ACC(15)
#define FSA_NUMBERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FSA_NUMBERS_64                                                                                       \
    FSA_NUMBERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FSA_NUMBERS_128                                                                                      \
    FSA_NUMBERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
                   "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FSA_WGMMA(T, types, N, n0, n1, n2, n3, n4, n5, n6)                                                   \
    template <int trans_b> struct Wgmma<T, N, trans_b> {                                                     \
        template <int trans_a>                                                                               \
        static __device__ __forceinline__ void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b,              \
                                                  int accumulate) {                                          \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " n2 ", 0;\n"                                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." types " {" FSA_NUMBERS_##N        \
                         "}, " n0 ", " n1 ", p, 1, 1, " n3 ", " n4 ";}"                                      \
                         : FSA_ACC_##N                                                                       \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(trans_a), "n"(trans_b)                       \
                         : "memory");                                                                        \
        }                                                                                                    \
        static __device__ __forceinline__ void rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,  \
                                                  int accumulate) {                                          \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " n5 ", 0;\n"                                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." types " {" FSA_NUMBERS_##N        \
                         "}, {" n0 ", " n1 ", " n2 ", " n3 "}, " n4 ", p, 1, 1, " n6 ";}"                    \
                         : FSA_ACC_##N                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(trans_b) \
                         : "memory");                                                                        \
        }                                                                                                    \
    };
FSA_WGMMA(__nv_bfloat16, "bf16.bf16", 32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
FSA_WGMMA(__nv_bfloat16, "bf16.bf16", 64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
FSA_WGMMA(__nv_bfloat16, "bf16.bf16", 128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
FSA_WGMMA(__half, "f16.f16", 32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
FSA_WGMMA(__half, "f16.f16", 64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
FSA_WGMMA(__half, "f16.f16", 128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
#undef FSA_WGMMA

template <typename T, int trans_b = 0, int trans_a = 0, int N8>
__device__ __forceinline__ void wgmma_ss(float (&d)[N8][4], uint64_t a, uint64_t b, int accumulate) {
    Wgmma<T, N8 * 8, trans_b>::template ss<trans_a>(d, a, b, accumulate);
}
template <typename T, int trans_b = 0, int N8>
__device__ __forceinline__ void wgmma_rs(float (&d)[N8][4], const uint32_t (&a)[4], uint64_t b,
                                         int accumulate) {
    Wgmma<T, N8 * 8, trans_b>::rs(d, a, b, accumulate);
}

// ---- mbarrier: 8 bytes in shared memory that count arrivals and bytes. A phase completes after `count`
// arrivals and all expected bytes.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialized mbarriers visible to TMA. Call it after mbarrier_init, before the thread block's first
// barrier.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A warp arrives after all its lanes have reached this point. It counts as WARP_ARRIVALS arrivals: one lane
// arrives for all. racecheck of compute-sanitizer tracks only a thread's own arrivals, so under FSA_RACECHECK
// every lane arrives.
#ifdef FSA_RACECHECK
enum { WARP_ARRIVALS = 32 };
#else
enum { WARP_ARRIVALS = 1 };
#endif
__device__ __forceinline__ void mbarrier_arrive_warp(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 < WARP_ARRIVALS) mbarrier_arrive(barrier);
}
// Arrives and adds `bytes` to the bytes that the phase expects from copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// Makes the thread's earlier cp.async copies arrive at the barrier on completion, as one of its `count`
// arrivals.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase of this parity completes. The first phase of a barrier has parity 0, the next 1, and
// so on. Waiting for parity 1 on a new barrier returns at once.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
    asm volatile("{.reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again;}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
// The same, but sleeps between polls, which leaves issue slots to other warps and adds about 100 ns.
__device__ __forceinline__ void mbarrier_wait_sleeping(uint32_t barrier, int parity) {
    asm volatile("{.reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "nanosleep.u32 64;\n"
                 "bra again;\n"
                 "done:}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// ---- TMA: copies a box of a tensor (tma.cuh) to shared memory. x, y, z: coordinates of the first element,
// innermost first. Elements outside the tensor become zero. Completes its bytes at `barrier`. policy:
// l2_evict_first() or l2_evict_last().
__device__ __forceinline__ void tma_load_3d(uint32_t dst, const CUtensorMap *map, int x, int y, int z,
                                            uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void tma_load_3d(uint32_t dst, const CUtensorMap *map, int x, int y, int z,
                                            uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(dst),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(policy)
        : "memory");
}
// Copies `bytes` contiguous bytes (a multiple of 16) to shared memory. Completes them at `barrier`.
__device__ __forceinline__ void bulk_load(uint32_t dst, const void *src, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
        "l"(src), "r"(bytes), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t dst, const void *src, int bytes, uint32_t barrier,
                                          uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

// Copies `bytes` (a multiple of 16) from shared to global memory, or adds them to global memory as fp32
// numbers.
// bulk_commit makes a group of the thread's copies since the last one. bulk_wait_read: shared memory may be
// overwritten. bulk_wait: the results are in global memory.
__device__ __forceinline__ void bulk_store(void *dst, uint32_t src, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_reduce_add(float *dst, uint32_t src, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst),
                 "r"(src), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Orders thread blocks. semaphore_wait waits until *semaphore is `value`. semaphore_release increments it,
// after the thread's writes and its bulk copies that bulk_wait has completed.
__device__ __forceinline__ void semaphore_wait(const int *semaphore, int value) {
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(semaphore) : "memory");
    } while (now != value);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ __forceinline__ void semaphore_release(int *semaphore) {
    asm volatile("fence.proxy.async.global;\n"
                 "red.release.gpu.global.add.s32 [%0], 1;" ::"l"(semaphore)
                 : "memory");
}

// dst[0] += x, dst[1] += y in global memory, without waiting. Reproducible if no other thread adds to them at
// the same time.
__device__ __forceinline__ void red_add_v2(float *dst, float x, float y) {
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(dst), "f"(x), "f"(y) : "memory");
}

// Makes the thread's writes to shared memory visible to wgmma and TMA. Call it before the barrier that
// signals them.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- named barriers: id 1 to 15, for `threads` threads of the thread block. 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Sets the registers per thread of the calling warpgroup: dealloc to fewer, alloc to more.
template <int count> __device__ __forceinline__ void warpgroup_reg_dealloc() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count> __device__ __forceinline__ void warpgroup_reg_alloc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
#endif
