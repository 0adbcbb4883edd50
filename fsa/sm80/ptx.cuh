// sm80/ptx.cuh: the inline PTX for sm_80 and up, one function per instruction. dev/emulator/sm80/ptx.cuh has
// the same functions in C++.
//
// Fragments of mma.m16n8k16, lane = 4*r + c (r = lane / 4, c = lane % 4):
//   A 16x16: a[0] row r, columns 2c 2c+1; a[1] row r+8, columns 2c 2c+1;
//            a[2] row r, columns 2c+8 2c+9; a[3] row r+8, columns 2c+8 2c+9
//   B 16x8 : b[0] rows 2c 2c+1 of column r; b[1] rows 2c+8 2c+9 of column r
//   C 16x8 : c[0] c[1] row r, columns 2c 2c+1; c[2] c[3] row r+8, columns 2c 2c+1
#ifndef FSA_SM80_PTX_CUH
#define FSA_SM80_PTX_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

// c += a * b
template <typename T>
__device__ __forceinline__ void mma_16816(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_16816<__nv_bfloat16>(float c[4], const uint32_t a[4], uint32_t b0,
                                                         uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16816<__half>(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Returns the 32-bit address of p in shared memory.
__device__ __forceinline__ uint32_t smem_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// Loads four 8x8 matrices of 16-bit elements. Lane i passes the address of row i%8 of matrix i/8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// L2 cache policies: lines that L2 evicts last, or first.
__device__ __forceinline__ uint64_t l2_evict_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t l2_evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Returns 16 bytes (not cached in L1), or zeros if !valid. Uses a predicate; the compiler would emit a
// branch.
__device__ __forceinline__ uint4 load_or_zero(bool valid, const void *src, uint64_t policy) {
    uint4 x;
    asm volatile("{\n"
                 ".reg .pred valid;\n"
                 "setp.ne.b32 valid, %5, 0;\n"
                 "mov.b32 %0, 0;\n"
                 "mov.b32 %1, 0;\n"
                 "mov.b32 %2, 0;\n"
                 "mov.b32 %3, 0;\n"
                 "@valid ld.global.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %6;\n"
                 "}"
                 : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
                 : "l"(src), "r"((int)valid), "l"(policy)
                 : "memory");
    return x;
}
// The same for 8 bytes at src_8 and 4 bytes at src_4, as streaming loads.
__device__ __forceinline__ void load_or_zero(bool valid, const void *src_8, const void *src_4,
                                             uint32_t (&x)[3]) {
    asm volatile("{\n"
                 ".reg .pred valid;\n"
                 "setp.ne.b32 valid, %5, 0;\n"
                 "mov.b32 %0, 0;\n"
                 "mov.b32 %1, 0;\n"
                 "mov.b32 %2, 0;\n"
                 "@valid ld.global.cs.v2.b32 {%0, %1}, [%3];\n"
                 "@valid ld.global.cs.b32 %2, [%4];\n"
                 "}"
                 : "=&r"(x[0]), "=&r"(x[1]), "=&r"(x[2])
                 : "l"(src_8), "l"(src_4), "r"((int)valid)
                 : "memory");
}
// Stores 16 bytes with an L2 cache policy.
__device__ __forceinline__ void store_16_l2(void *dst, uint4 x, uint64_t policy) {
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(dst), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w), "l"(policy)
                 : "memory");
}

// Starts an asynchronous copy of 16 bytes to shared memory, or writes zeros if !valid. If !valid, `src` is
// not read, but must still be a valid C++ pointer.
__device__ __forceinline__ void cp_async_16(uint32_t dst, const void *src, bool valid = true) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_4(uint32_t dst, const void *src) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `pending` of this thread's groups are incomplete.
template <int pending> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Programmatic dependent launch (launch.cuh): waits until the previous kernel in the stream has ended and its
// writes are visible. Before Hopper it is empty.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Allows the next kernel to start, once all thread blocks have called this or ended. Call it after pdl_wait,
// so that at most two kernels overlap.
__device__ __forceinline__ void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Approximate 2^x, log2(x), 1/x.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Returns max(|x|, |y|), or NaN if x or y is NaN.
__device__ __forceinline__ float max_magnitude(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(fabsf(x)), "f"(fabsf(y)));
    return z;
}
#endif
