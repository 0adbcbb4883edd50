// ptx_sm90.cuh: the inline PTX of Hopper (sm_90a), one function an instruction: wgmma, mbarrier, TMA, named
// barriers, register budgets. dev/emulator/ptx_sm90.cuh has the same functions in C++.
//
// Operands of wgmma lie in shared memory in panels of 64 columns: [rows][64] 16-bit elements, a row 128
// bytes, the 16-byte chunks of a row exchanged by (row % 8) as TMA's 128-byte swizzle does; a panel starts at
// a multiple of 1,024 bytes. A matrix of 128 columns is two panels, one after the other.
//
// Accumulators: d[j][i], j = 0 .. N/8 - 1: rows 16*warp + lane/4 + 8*(i/2) of the warpgroup's 64, columns
// 8*j + 2*(lane%4) + i%2. A from registers: as of mma.m16n8k16 (ptx.cuh), each warp its own 16 rows.
#ifndef FSA_PTX_SM90_CUH
#define FSA_PTX_SM90_CUH
#include "../sm80/ptx.cuh"
#include <cuda.h>

// A matrix in shared memory as wgmma wants to be told of it. K-major: rows are m or n, columns k; 16 more of
// k are 32 bytes on. Transposed (columns are m or n, rows k): 16 more of k are 2,048 bytes on; panel_bytes is
// the distance of its panels of 64 columns.
__device__ __forceinline__ uint64_t make_smem_desc(uint32_t address, uint32_t panel_bytes = 16) {
    return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(panel_bytes >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
// make_smem_desc for a loop that doesn't change the address: the compiler would keep all parts in registers.
__device__ __forceinline__ uint64_t make_smem_desc_opaque(uint32_t address) {
    asm volatile("" : "+r"(address));
    return make_smem_desc(address);
}

// Computed once: ptxas would compute it anew in each round of a loop.
template <typename T> __device__ __forceinline__ void keep_in_registers(T *&pointer) {
    asm volatile("" : "+l"(pointer));
}

// The same matrix so many bytes further on.
__device__ __forceinline__ uint64_t advance_desc(uint64_t matrix, int bytes) {
    return matrix + bytes / 16;
}

// Before the first wgmma of a batch, and after registers that one reads or adds to were written.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `left` of the warpgroup's batches are under way.
template <int left> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
// Tells the compiler that an accumulator changes here, so that no use of it moves ahead of a wait.
template <int N> __device__ __forceinline__ void fence_operand(float (&d)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++)
        asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

// d (64 x N) = (add ? d : 0) + A (64 x 16) B (16 x N), all in the background until a wait. N is 32, 64 or
// 128. wgmma_ss: A and B in shared memory; wgmma_rs: A in registers. trans_b: B's columns are n; trans_a (of
// wgmma_ss): A's columns are m.
template <typename T, int N, int trans_b> struct Wgmma;

// Accumulators as operands, and their numbers; then one instance. n0 to n6 are the numbers of the operands
// after the accumulators.
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
        static __device__ __forceinline__ void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b, int add) {   \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " n2 ", 0;\n"                                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." types " {" FSA_NUMBERS_##N "}, "  \
                         n0 ", " n1 ", p, 1, 1, " n3 ", " n4 ";}"                                            \
                         : FSA_ACC_##N                                                                       \
                         : "l"(a), "l"(b), "r"(add), "n"(trans_a), "n"(trans_b)                              \
                         : "memory");                                                                        \
        }                                                                                                    \
        static __device__ __forceinline__ void rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,  \
                                                  int add) {                                                 \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " n5 ", 0;\n"                                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." types " {" FSA_NUMBERS_##N "}, {" \
                         n0 ", " n1 ", " n2 ", " n3 "}, " n4 ", p, 1, 1, " n6 ";}"                           \
                         : FSA_ACC_##N                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(trans_b)        \
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
__device__ __forceinline__ void wgmma_ss(float (&d)[N8][4], uint64_t a, uint64_t b, int add) {
    Wgmma<T, N8 * 8, trans_b>::template ss<trans_a>(d, a, b, add);
}
template <typename T, int trans_b = 0, int N8>
__device__ __forceinline__ void wgmma_rs(float (&d)[N8][4], const uint32_t (&a)[4], uint64_t b, int add) {
    Wgmma<T, N8 * 8, trans_b>::rs(d, a, b, add);
}

// ---- mbarrier: a counter of arrivals and of bytes in shared memory, 8 bytes. A phase is over when `count`
// have arrived and all bytes that were announced have come.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After the inits, before the block's first barrier: makes them visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A whole warp arrives, once its lanes are done with what went before: as WARP_ARRIVALS, one lane for all.
// compute-sanitizer's racecheck follows a thread only to its own arrivals, so that for it every lane arrives.
#ifdef FSA_RACECHECK
enum { WARP_ARRIVALS = 32 };
#else
enum { WARP_ARRIVALS = 1 };
#endif
__device__ __forceinline__ void mbarrier_arrive_warp(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 < WARP_ARRIVALS) mbarrier_arrive(barrier);
}
// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// The calling thread's cp.async copies so far arrive at the barrier when they are there (counted in its
// `count`).
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Waits for the end of the phase of this parity: 0 for a barrier's first, then alternating.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
    asm volatile("{.reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again;}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
// The same where some 100 ns more do no harm: sleeps meanwhile, and leaves other warps the issue slots.
__device__ __forceinline__ void mbarrier_wait_sleeping(uint32_t barrier, int parity) {
    asm volatile("{.reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra over;\n"
                 "nanosleep.u32 64;\n"
                 "bra again;\n"
                 "over:}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// ---- TMA: boxes of a tensor of up to 4 dimensions, the innermost first, into shared memory, swizzled as the
// tensor's map says. What lies outside the tensor becomes zero. Counts its bytes at `barrier`. policy:
// l2_evict_first or l2_evict_last (ptx.cuh).
__device__ __forceinline__ void tma_load_3d(uint32_t to, const CUtensorMap *map, int x, int y, int z,
                                            uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void tma_load_3d(uint32_t to, const CUtensorMap *map, int x, int y, int z,
                                            uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void tma_load_4d(uint32_t to, const CUtensorMap *map, int x, int y, int z, int w,
                                            uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
                 : "memory");
}
// `bytes` (a multiple of 16) in one piece, as they lie.
__device__ __forceinline__ void bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier,
                                          uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

// The other way: `bytes` (a multiple of 16) of shared memory into global memory, or fp32 numbers added to those
// there. A thread's copies since its last commit are a group; wait_read: shared memory may be overwritten;
// wait: the results are in memory.
__device__ __forceinline__ void bulk_store(void *to, uint32_t from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_add(float *to, uint32_t from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(from), "r"(bytes)
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

// An order among thread blocks: semaphore_wait until `turn` in memory is `mine`; semaphore_release when the work is done,
// bulk copies that were waited for included.
__device__ __forceinline__ void semaphore_wait(const int *turn, int mine) {
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    } while (now != mine);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ __forceinline__ void semaphore_release(int *turn) {
    asm volatile("fence.proxy.async.global;\n"
                 "red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn)
                 : "memory");
}

// to[0] += x, to[1] += y in memory, without waiting. Reproducible where nobody else adds there meanwhile.
__device__ __forceinline__ void red_add_v2(float *to, float x, float y) {
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
}

// Shared memory that threads wrote becomes visible to wgmma and TMA; before the barrier that tells of it.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- barriers 1 to 15 of a block, among `threads` of its threads (0 is __syncthreads)
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A warpgroup gives back registers, or takes some.
template <int count> __device__ __forceinline__ void warpgroup_reg_dealloc() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count> __device__ __forceinline__ void warpgroup_reg_alloc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
#endif
