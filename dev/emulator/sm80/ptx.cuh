// sm80/ptx.cuh: the functions of fsa/sm80/ptx.cuh in C++, for the emulator. A cp.async copy runs only when
// the thread waits for it, so that a missing wait reads the old contents of shared memory.
#ifndef FSA_SM80_PTX_CUH
#define FSA_SM80_PTX_CUH
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace emu {

// A 32-bit shared memory address is the offset from the start of the thread block's dynamic shared memory.
inline uint32_t smem_offset(const void *p) {
    return (uint32_t)((const char *)p - dynamic_smem());
}
inline char *smem_pointer(uint32_t address) {
    return dynamic_smem() + (int32_t)address;
}

template <typename T> float half_to_float(uint16_t bits);
template <> inline float half_to_float<__nv_bfloat16>(uint16_t bits) {
    return bit_cast_to<float>((uint32_t)bits << 16);
}
template <> inline float half_to_float<__half>(uint16_t bits) {
#ifdef __F16C__
    return _cvtsh_ss(bits);
#endif
    return __half2float(bit_cast_to<__half>(bits));
}

// mma.m16n8k16 of a warp. Each lane adds the result to its accumulators.
struct MmaOperands {
    uint32_t a[4], b[2];
};
struct MmaResult {
    float c[4];
};
template <typename T> void mma_warp(uint32_t mask, const MmaOperands *in, MmaResult *out) {
    if (mask != 0xffffffffu) fail("mma: mask %08x: all lanes of the warp must take part", mask);
    float a[16][16];
    alignas(32) float b[16][8], c[16][8];
    for (int lane = 0; lane < 32; lane++) {
        int row = lane / 4, col = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            for (int half = 0; half < 2; half++)
                a[row + i % 2 * 8][col + i / 2 * 8 + half] =
                    half_to_float<T>((uint16_t)(in[lane].a[i] >> 16 * half));
        }
        for (int i = 0; i < 2; i++) {
            for (int half = 0; half < 2; half++)
                b[col + i * 8 + half][row] = half_to_float<T>((uint16_t)(in[lane].b[i] >> 16 * half));
        }
    }
    for (int i = 0; i < 16; i++) {
        Float8 sum = {};
        for (int k = 0; k < 16; k++) sum += a[i][k] * *(const Float8 *)b[k];
        *(Float8 *)c[i] = sum;
    }
    for (int lane = 0; lane < 32; lane++) {
        int row = lane / 4, col = lane % 4 * 2;
        out[lane] = {{c[row][col], c[row][col + 1], c[row + 8][col], c[row + 8][col + 1]}};
    }
}

struct LdmatrixResult {
    uint32_t r[4];
};
template <bool trans> void ldmatrix_warp(uint32_t mask, const uint32_t *address, LdmatrixResult *out) {
    if (mask != 0xffffffffu) fail("ldmatrix: mask %08x: all lanes of the warp must take part", mask);
    for (int m = 0; m < 4; m++) {
        uint16_t rows[8][8];
        for (int i = 0; i < 8; i++) {
            uint32_t row = address[m * 8 + i];
            if (row % 16) fail("ldmatrix: shared memory address %u: must be a multiple of 16", row);
            memcpy(rows[i], smem_pointer(row), 16);
        }
        for (int lane = 0; lane < 32; lane++) {
            int row = lane / 4, col = lane % 4 * 2;
            uint16_t lo = trans ? rows[col][row] : rows[row][col];
            uint16_t hi = trans ? rows[col + 1][row] : rows[row][col + 1];
            out[lane].r[m] = lo | (uint32_t)hi << 16;
        }
    }
}

// A pending cp.async copy.
struct AsyncCopy {
    uint32_t dst;
    const void *src; // NULL: zero fill
    int group, bytes;
};
// The pending copies of a thread, oldest first.
struct AsyncCopies {
    std::vector<AsyncCopy> list;
    int group; // of the copies since the last commit
};
AsyncCopies &async_copies();

} // namespace emu

template <typename T> inline void mma_16816(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    emu::MmaOperands in = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    emu::MmaResult out =
        emu::warp_collective<emu::MmaOperands, emu::MmaResult, emu::mma_warp<T>>("mma", 0xffffffffu, in);
    for (int i = 0; i < 4; i++) c[i] += out.c[i];
}

inline uint32_t smem_address(const void *p) {
    return emu::smem_offset(p);
}

inline void ldmatrix_x4(uint32_t r[4], uint32_t address) {
    emu::LdmatrixResult m = emu::warp_collective<uint32_t, emu::LdmatrixResult, emu::ldmatrix_warp<false>>(
        "ldmatrix", 0xffffffffu, address);
    memcpy(r, m.r, sizeof m.r);
}
inline void ldmatrix_x4_trans(uint32_t r[4], uint32_t address) {
    emu::LdmatrixResult m = emu::warp_collective<uint32_t, emu::LdmatrixResult, emu::ldmatrix_warp<true>>(
        "ldmatrix", 0xffffffffu, address);
    memcpy(r, m.r, sizeof m.r);
}

inline uint64_t l2_evict_last() {
    return 1;
}
inline uint64_t l2_evict_first() {
    return 0;
}
inline uint4 load_or_zero(bool valid, const void *src, uint64_t) {
    return valid ? *(const uint4 *)src : uint4{0, 0, 0, 0};
}
inline void load_or_zero(bool valid, const void *src_8, const void *src_4, uint32_t (&x)[3]) {
    if ((uintptr_t)src_8 % 8 || (uintptr_t)src_4 % 4)
        emu::fail("ld from %p and %p: must be multiples of 8 and 4", src_8, src_4);
    memset(x, 0, sizeof x);
    if (valid) memcpy(x, src_8, 8), memcpy(x + 2, src_4, 4);
}
inline void store_16_l2(void *dst, uint4 x, uint64_t) {
    *(uint4 *)dst = x;
}
inline void cp_async_16(uint32_t dst, const void *src, bool valid = true) {
    if (dst % 16 || (uintptr_t)src % 16)
        emu::fail("cp.async from %p to %u: must be multiples of 16", src, dst);
    emu::AsyncCopies &copies = emu::async_copies();
    copies.list.push_back({dst, valid ? src : NULL, copies.group, 16});
}
inline void cp_async_4(uint32_t dst, const void *src) {
    if (dst % 4 || (uintptr_t)src % 4) emu::fail("cp.async from %p to %u: must be multiples of 4", src, dst);
    emu::AsyncCopies &copies = emu::async_copies();
    copies.list.push_back({dst, src, copies.group, 4});
}
inline void pdl_wait() {}
inline void pdl_launch_dependents() {}
inline void cp_async_commit() {
    emu::async_copies().group++;
}
template <int left> inline void cp_async_wait() {
    emu::AsyncCopies &copies = emu::async_copies();
    size_t i = 0;
    for (; i < copies.list.size() && copies.list[i].group < copies.group - left; i++) {
        const emu::AsyncCopy &c = copies.list[i];
        if (c.src)
            memcpy(emu::smem_pointer(c.dst), c.src, c.bytes);
        else
            memset(emu::smem_pointer(c.dst), 0, c.bytes);
    }
    copies.list.erase(copies.list.begin(), copies.list.begin() + (long)i);
}

inline float exp2_fast(float x) {
    return std::isnan(x) ? NAN : exp2f(x); // as on a GPU, a NaN has no sign
}
inline float log2_fast(float x) {
    return log2f(x);
}
inline float reciprocal_fast(float x) {
    return 1 / x;
}
inline float max_magnitude(float x, float y) {
    return x != x || y != y ? NAN : fmaxf(fabsf(x), fabsf(y));
}
#endif
