// ptx.cuh: the inline PTX of the CUDA layers, one function per instruction. dev/emulator has the same
// functions on the CPU.
#ifndef LLMC_PTX_CUH
#define LLMC_PTX_CUH
#include <stdint.h>

// ---- approximate 2^x and 1/x, of some 2^-22 relative error; subnormal numbers count as 0. nvcc adds
// instructions for subnormal numbers to exp2f and to divisions.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- bulk copies between global and shared memory. In code for compute capabilities below 9.0 the functions
// are empty, and no kernel that calls them is launched: the caller checks cudaFuncAttributes.ptxVersion,
// since the driver can compile PTX of older architectures for later GPUs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define BULK(...)
#else
#define BULK(...) asm volatile(__VA_ARGS__)
#endif

__device__ __forceinline__ uint32_t smem_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// ---- mbarrier: 8 bytes in shared memory. A phase completes after `count` arrivals and all expected bytes.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
    BULK("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialized mbarriers visible to copies. Call it before the thread block's first barrier.
__device__ __forceinline__ void mbarrier_init_fence() {
    BULK("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives and adds `bytes` to the bytes that the phase expects.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
    BULK("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity completes; the first phase has parity 0.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
    BULK("{.reg .pred p;\n"
         "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
         "@!p bra again;}" ::"r"(barrier),
         "r"(parity)
         : "memory");
}

// ---- copies of `bytes` contiguous bytes, a multiple of 16
// To shared memory; completes the bytes at `barrier`.
__device__ __forceinline__ void bulk_load(uint32_t dst, const void *src, int bytes, uint32_t barrier) {
    BULK("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
         "l"(src), "r"(bytes), "r"(barrier)
         : "memory");
}
// To global memory. bulk_commit makes a group of the thread's copies since the last one.
__device__ __forceinline__ void bulk_store(void *dst, uint32_t src, int bytes) {
    BULK("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes)
         : "memory");
}
__device__ __forceinline__ void bulk_commit() {
    BULK("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until all groups but the newest have read shared memory.
__device__ __forceinline__ void bulk_wait_read_but_newest() {
    BULK("cp.async.bulk.wait_group.read 1;" ::: "memory");
}
// Waits until the results of all groups are in global memory.
__device__ __forceinline__ void bulk_wait() {
    BULK("cp.async.bulk.wait_group 0;" ::: "memory");
}
// Lets later copies see the thread's writes to shared memory.
__device__ __forceinline__ void fence_proxy_async() {
    BULK("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif
