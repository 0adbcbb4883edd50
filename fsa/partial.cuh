// partial.cuh: a row of partial results in memory. The selected branch's main kernels (selected.cu,
// selected_sm90.cu) write such rows, its reductions (selected.cu) read them again, and their bytes are most
// of what both move.
//
// A row is made of pieces of eight channels, as a lane has them after a product (ptx.cuh): lane c of a quad
// has piece 4*group + c of each group of four n8 columns. Forward these are channels 8*piece and on, since
// V's tile is rearranged so; backward they are channels 2c, 2c + 1, 8 + 2c, ... 25 + 2c of the group.
#ifndef FSA_PARTIAL_CUH
#define FSA_PARTIAL_CUH
#include "mma.cuh"

// sum += weight * x, eight channels.
template <typename T> static __device__ __forceinline__ void add_row(float (&sum)[8], uint4 x, float weight) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 f = unpack2<T>(words[j]);
        sum[2 * j] += weight * f.x;
        sum[2 * j + 1] += weight * f.y;
    }
}

// The piece of forward's rows, T = __half whatever q, k and v are: o of a query that sees one key must be v,
// or dP - delta isn't 0. And of backward's, T being q's type. BYTES: of a piece.
template <typename T> struct Partial;

// fp16 as it is: 64 bytes a group, a lane's in one.
template <> struct Partial<__half> {
    enum { BYTES = 16 };
    uint4 x;
    static __device__ __forceinline__ Partial of(const float (&v)[8], float factor) {
        auto two = [&](int i) { return pack2<__half>(v[i] * factor, v[i + 1] * factor); };
        return {make_uint4(two(0), two(2), two(4), two(6))};
    }
    // sum += weight * the piece
    __device__ __forceinline__ void add_to(float (&sum)[8], float weight) const {
        add_row<__half>(sum, x, weight);
    }
    // Writes the pieces of COUNT groups from `group` on.
    template <int COUNT>
    static __device__ __forceinline__ void store(char *row, int group, int c, const Partial (&p)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) __stcs((uint4 *)row + 4 * (group + i) + c, p[i].x);
    }
    // Where piece number `piece` begins in a row; load takes what stands there, or zeros. policy: l2_evict_first or
    // l2_evict_last (ptx.cuh).
    static __device__ __forceinline__ int offset(int piece) {
        return piece * BYTES;
    }
    static __device__ __forceinline__ Partial load(const char *at, int, bool there, uint64_t policy) {
        return {load_or_zero(there, at, policy)};
    }
};

// bf16's range and more than its precision in twelve bits a number: the eight share a power of two, with
// which each is a sign and ten bits, so that half of the last bit is 2^-11 to 2^-10 of the largest; bf16's
// own rounding is up to 2^-9 of each. The ten bits and the sign lie as in an fp16 number below 2^-14, which
// the conversions of the hardware make and read. Words 0 to 2 have two such numbers each, whose five bits of
// exponent are 0; there lie the fourth pair, bits 9 to 5, 4 to 0 and sign, and the power's eight bits. A
// piece with NaN, infinity or what is 2^112 and more has the power 255, and comes back as NaN. A pair of
// groups is 96 bytes, three sectors of memory: a lane's words 0 and 1 of both groups, 16 bytes, then the
// words 2, 8 bytes a lane.
template <> struct Partial<__nv_bfloat16> {
    enum { BYTES = 12 };
    uint32_t w[3];
    static __device__ __forceinline__ Partial of(const float (&v)[8], float factor) {
        float most = max_magnitude(v[0], v[1]);
#pragma unroll
        for (int i = 2; i < 8; i++) most = max_magnitude(most, v[i]);
        // The largest's exponent, one more where it would be rounded up to the next power of two.
        const uint32_t bits = __float_as_uint(most * factor) + 0x2000u;
        const uint32_t power = bits < 239u << 23 ? (bits & 0x7f800000u) + (15u << 23) : 255u << 23;
        factor *= __uint_as_float((254u << 23) - power); // 1 / the power of two
        uint32_t pair[4];
#pragma unroll
        for (int i = 0; i < 4; i++) pair[i] = pack2<__half>(v[2 * i] * factor, v[2 * i + 1] * factor);
        const uint32_t power_bits = (power >> 13 & 0x00003c00u) | (power >> 1 & 0x3c000000u);
        return {{pair[0] | (pair[3] << 5 & 0x7c007c00u), pair[1] | (pair[3] << 10 & 0x7c007c00u),
                 pair[2] | (pair[3] >> 1 & 0x40004000u) | power_bits}};
    }
    __device__ __forceinline__ void add_to(float (&sum)[8], float weight) const {
        const uint4 x = {w[0] & 0x83ff83ffu, w[1] & 0x83ff83ffu, w[2] & 0x83ff83ffu,
                         (w[0] >> 5 & 0x03e003e0u) | (w[1] >> 10 & 0x001f001fu) | (w[2] << 1 & 0x80008000u)};
        weight *= __uint_as_float((w[2] << 13 & 0x07800000u) | (w[2] << 1 & 0x78000000u)); // the power
        add_row<__half>(sum, x, weight);
    }
    template <int COUNT>
    static __device__ __forceinline__ void store(char *row, int group, int c, const Partial (&p)[COUNT]) {
        static_assert(COUNT == 1 || COUNT % 2 == 0, "a group, or pairs of groups");
        if (COUNT == 1) {
            char *const at = row + group / 2 * 96, *const first = at + 16 * c + group % 2 * 8;
            __stcs((uint2 *)first, make_uint2(p[0].w[0], p[0].w[1]));
            __stcs((unsigned *)(at + 64 + 8 * c + group % 2 * 4), p[0].w[2]);
        }
#pragma unroll
        for (int i = 0; i + 1 < COUNT; i += 2) {
            char *const at = row + (group + i) / 2 * 96;
            __stcs((uint4 *)at + c, make_uint4(p[i].w[0], p[i].w[1], p[i + 1].w[0], p[i + 1].w[1]));
            __stcs((uint2 *)(at + 64) + c, make_uint2(p[i].w[2], p[i + 1].w[2]));
        }
    }
    static __device__ __forceinline__ int offset(int piece) {
        return piece / 8 * 96 + piece % 4 * 16 + piece / 4 % 2 * 8;
    }
    static __device__ __forceinline__ Partial load(const char *at, int piece, bool there, uint64_t) {
        Partial p;
        load_or_zero(there, at, at + (64 - piece % 4 * 8 - piece / 4 % 2 * 4), p.w);
        return p;
    }
};

// The piece of columns j .. j + 3 of a product's accumulators [n8 columns][4], of its row `quad` (i = 0) or
// quad + 8 (i = 1), times `factor`.
template <typename T, int COLUMNS>
static __device__ __forceinline__ Partial<T> piece_of(const float (&x)[COLUMNS][4], int j, int i,
                                                      float factor) {
    float v[8];
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = x[j + k / 2][2 * i + k % 2];
    return Partial<T>::of(v, factor);
}
template <typename T, int D> __host__ __device__ constexpr int row_bytes() {
    return D / 8 * Partial<T>::BYTES;
}
#endif
