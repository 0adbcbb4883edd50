// ptx.cuh: fsa/ptx.cuh's instructions in C++, for the emulator. Asynchronous copies happen as late as the
// program allows, when it waits for them, so that a missing wait reads what was there before.
#ifndef FSA_PTX_CUH
#define FSA_PTX_CUH
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <vector>

namespace emu {

// Addresses of shared memory are 32-bit distances from the start of the block's dynamic shared memory.
inline uint32_t to_shared(const void *p) {
    return (uint32_t)((const char *)p - dynamic_smem());
}
inline char *from_shared(uint32_t address) {
    return dynamic_smem() + (int32_t)address;
}

template <typename T> float half_to_float(uint16_t bits);
template <> inline float half_to_float<__nv_bfloat16>(uint16_t bits) {
    return emu_bits<float>((uint32_t)bits << 16);
}
template <> inline float half_to_float<__half>(uint16_t bits) {
    return __half2float(emu_bits<__half>(bits));
}

// The products of a warp; the sums go on in each lane's own registers.
struct MmaIn {
    uint32_t a[4], b[2];
};
struct MmaOut {
    float c[4];
};
template <typename T> void mma_finish(uint32_t mask, const MmaIn *in, MmaOut *out) {
    if (mask != 0xffffffffu) fail("mma: only lanes %08x came", mask);
    float a[16][16], b[16][8], c[16][8] = {};
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
        for (int k = 0; k < 16; k++) {
            for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        int row = lane / 4, col = lane % 4 * 2;
        out[lane] = {{c[row][col], c[row][col + 1], c[row + 8][col], c[row + 8][col + 1]}};
    }
}

struct Matrices {
    uint32_t r[4];
};
template <bool trans> void ldmatrix_finish(uint32_t mask, const uint32_t *address, Matrices *out) {
    if (mask != 0xffffffffu) fail("ldmatrix: only lanes %08x came", mask);
    for (int m = 0; m < 4; m++) {
        uint16_t rows[8][8];
        for (int i = 0; i < 8; i++) {
            uint32_t at = address[m * 8 + i];
            if (at % 16) fail("ldmatrix: the row at %u is not aligned to 16 bytes", at);
            memcpy(rows[i], from_shared(at), 16);
        }
        for (int lane = 0; lane < 32; lane++) {
            int row = lane / 4, col = lane % 4 * 2;
            uint16_t lo = trans ? rows[col][row] : rows[row][col];
            uint16_t hi = trans ? rows[col + 1][row] : rows[row][col + 1];
            out[lane].r[m] = lo | (uint32_t)hi << 16;
        }
    }
}

// A thread's copies under way, oldest first.
struct AsyncCopy {
    uint32_t to;
    const void *from; // NULL: zeros
    int group, bytes;
};
struct AsyncCopies {
    std::vector<AsyncCopy> list;
    int group; // the one being filled
};
AsyncCopies &async_copies();

} // namespace emu

template <typename T> inline void mma_16816(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    emu::MmaIn in = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    emu::MmaOut out = emu::warp_join<emu::MmaIn, emu::MmaOut, emu::mma_finish<T>>("mma", 0xffffffffu, in);
    for (int i = 0; i < 4; i++) c[i] += out.c[i];
}

inline uint32_t smem_address(const void *p) {
    return emu::to_shared(p);
}

inline void ldmatrix_x4(uint32_t r[4], uint32_t address) {
    emu::Matrices m = emu::warp_join<uint32_t, emu::Matrices, emu::ldmatrix_finish<false>>(
        "ldmatrix", 0xffffffffu, address);
    memcpy(r, m.r, sizeof m.r);
}
inline void ldmatrix_x4_trans(uint32_t r[4], uint32_t address) {
    emu::Matrices m =
        emu::warp_join<uint32_t, emu::Matrices, emu::ldmatrix_finish<true>>("ldmatrix", 0xffffffffu, address);
    memcpy(r, m.r, sizeof m.r);
}

inline uint64_t l2_evict_last() {
    return 1;
}
inline uint64_t l2_evict_first() {
    return 0;
}
inline uint4 load_if(bool there, const void *from, uint64_t) {
    return there ? *(const uint4 *)from : uint4{0, 0, 0, 0};
}
inline void load_if(bool there, const void *two, const void *one, uint32_t (&x)[3]) {
    if ((uintptr_t)two % 8 || (uintptr_t)one % 4) emu::fail("ld: not aligned");
    memset(x, 0, sizeof x);
    if (there) memcpy(x, two, 8), memcpy(x + 2, one, 4);
}
inline void store(void *to, uint4 x, uint64_t) {
    *(uint4 *)to = x;
}
inline void cp_async_16(uint32_t to, const void *from, bool valid = true) {
    if (to % 16 || (uintptr_t)from % 16) emu::fail("cp.async: not aligned to 16 bytes");
    emu::AsyncCopies &copies = emu::async_copies();
    copies.list.push_back({to, valid ? from : NULL, copies.group, 16});
}
inline void cp_async_4(uint32_t to, const void *from) {
    if (to % 4 || (uintptr_t)from % 4) emu::fail("cp.async: not aligned to 4 bytes");
    emu::AsyncCopies &copies = emu::async_copies();
    copies.list.push_back({to, from, copies.group, 4});
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
        if (c.from)
            memcpy(emu::from_shared(c.to), c.from, c.bytes);
        else
            memset(emu::from_shared(c.to), 0, c.bytes);
    }
    copies.list.erase(copies.list.begin(), copies.list.begin() + (long)i);
}

inline float exp2_fast(float x) {
    return exp2f(x);
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
