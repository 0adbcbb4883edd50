// partial.cuh: memory format of the selected branch's partial rows. The main kernels write them and the
// combine kernels read them. They are most of the bytes that these kernels move.
//
// A partial row consists of D/32 slices of 32 columns, and a slice of four chunks of eight columns. A chunk
// is the part of a slice that one lane of a quad holds in an mma accumulator (sm80/ptx.cuh): lane c holds
// chunk 4*slice + c.
//     o_partial    chunk i is channels 8i .. 8i + 7, since the main kernels permute the columns of V
//     dq_partial   chunk 4*slice + c is columns 2c, 2c+1, 8+2c, 9+2c, 16+2c, 17+2c, 24+2c, 25+2c of the slice
#ifndef FSA_PARTIAL_CUH
#define FSA_PARTIAL_CUH
#include "mma.cuh"

// sum += weight * x, eight channels of type T.
template <typename T> static __device__ __forceinline__ void add_row(float (&sum)[8], uint4 x, float weight) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 f = unpack2<T>(words[j]);
        sum[2 * j] += weight * f.x;
        sum[2 * j + 1] += weight * f.y;
    }
}

// A chunk in BYTES bytes. o_partial uses T = __half for every input type, since its error matters for a
// query that sees one key: its output is v, so dP = dO v = delta, and dS = P (dP - delta) must be 0. A
// rounded output would leave an error in dS. dq_partial uses the type of q.
template <typename T> struct PartialChunk;

// Eight fp16 numbers. The chunks of a slice are 64 contiguous bytes.
template <> struct PartialChunk<__half> {
    enum { BYTES = 16 };
    uint4 x;
    static __device__ __forceinline__ PartialChunk pack(const float (&v)[8], float scale) {
        auto pair = [&](int i) { return pack2<__half>(v[i] * scale, v[i + 1] * scale); };
        return {make_uint4(pair(0), pair(2), pair(4), pair(6))};
    }
    // sum += weight * this chunk
    __device__ __forceinline__ void add_to(float (&sum)[8], float weight) const {
        add_row<__half>(sum, x, weight);
    }
    // Stores lane c's chunks of COUNT slices, `slice` and the following ones.
    template <int COUNT>
    static __device__ __forceinline__ void store(char *row, int slice, int c,
                                                 const PartialChunk (&p)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) __stcs((uint4 *)row + 4 * (slice + i) + c, p[i].x);
    }
    // Returns the byte offset of a chunk in its row.
    static __device__ __forceinline__ int offset(int chunk) {
        return chunk * BYTES;
    }
    // Loads the chunk at `address`, or zeros if !valid. policy: l2_evict_first or l2_evict_last (ptx.cuh).
    static __device__ __forceinline__ PartialChunk load(const char *address, int, bool valid,
                                                        uint64_t policy) {
        return {load_or_zero(valid, address, policy)};
    }
};

// Block floating point: eight numbers of a sign and 10 bits share an 8-bit exponent, 12 bits per number in
// all. The rounding error is at most 2^-11 to 2^-10 of the chunk's largest magnitude. bf16's rounding error
// is up to 2^-9 of each number.
//
// Each number is an fp16 subnormal (sign and 10 bits, exponent field 0), so the hardware's fp16 conversions
// encode and decode it. The exponent fields of numbers 0 to 5 hold numbers 6 and 7 and the shared exponent:
//   bits       31    30..26                  25..16    15    14..10                  9..0
//   word 0     sign  number 7, bits 9..5     number 1  sign  number 6, bits 9..5     number 0
//   word 1     sign  number 7, bits 4..0     number 3  sign  number 6, bits 4..0     number 2
//   word 2     sign  number 7, sign;         number 5  sign  number 6, sign;         number 4
//                    exponent bits 7..4                      exponent bits 3..0
// A chunk with NaN, Inf or a magnitude of at least 2^112 has exponent 255 and decodes to NaN.
//
// Two slices are 96 bytes, three 32-byte sectors: 16 bytes per lane (words 0 and 1 of both slices), then 8
// bytes per lane (word 2 of both slices).
template <> struct PartialChunk<__nv_bfloat16> {
    enum { BYTES = 12 };
    uint32_t w[3];
    static __device__ __forceinline__ PartialChunk pack(const float (&v)[8], float scale) {
        float amax = max_magnitude(v[0], v[1]);
#pragma unroll
        for (int i = 2; i < 8; i++) amax = max_magnitude(amax, v[i]);
        // The exponent field of amax, plus one if amax rounds up to the next power of two.
        const uint32_t bits = __float_as_uint(amax * scale) + 0x2000u;
        const uint32_t exponent = bits < 239u << 23 ? (bits & 0x7f800000u) + (15u << 23) : 255u << 23;
        scale *= __uint_as_float((254u << 23) - exponent); // times 2^-exponent
        uint32_t pair[4];
#pragma unroll
        for (int i = 0; i < 4; i++) pair[i] = pack2<__half>(v[2 * i] * scale, v[2 * i + 1] * scale);
        const uint32_t exponent_bits = (exponent >> 13 & 0x00003c00u) | (exponent >> 1 & 0x3c000000u);
        return {{pair[0] | (pair[3] << 5 & 0x7c007c00u), pair[1] | (pair[3] << 10 & 0x7c007c00u),
                 pair[2] | (pair[3] >> 1 & 0x40004000u) | exponent_bits}};
    }
    __device__ __forceinline__ void add_to(float (&sum)[8], float weight) const {
        const uint4 x = {w[0] & 0x83ff83ffu, w[1] & 0x83ff83ffu, w[2] & 0x83ff83ffu,
                         (w[0] >> 5 & 0x03e003e0u) | (w[1] >> 10 & 0x001f001fu) | (w[2] << 1 & 0x80008000u)};
        weight *= __uint_as_float((w[2] << 13 & 0x07800000u) | (w[2] << 1 & 0x78000000u)); // times 2^exponent
        add_row<__half>(sum, x, weight);
    }
    template <int COUNT>
    static __device__ __forceinline__ void store(char *row, int slice, int c,
                                                 const PartialChunk (&p)[COUNT]) {
        static_assert(COUNT == 1 || COUNT % 2 == 0, "COUNT must be one slice or pairs of slices");
        if (COUNT == 1) {
            char *const pair = row + slice / 2 * 96, *const words01 = pair + 16 * c + slice % 2 * 8;
            __stcs((uint2 *)words01, make_uint2(p[0].w[0], p[0].w[1]));
            __stcs((unsigned *)(pair + 64 + 8 * c + slice % 2 * 4), p[0].w[2]);
        }
#pragma unroll
        for (int i = 0; i + 1 < COUNT; i += 2) {
            char *const pair = row + (slice + i) / 2 * 96;
            __stcs((uint4 *)pair + c, make_uint4(p[i].w[0], p[i].w[1], p[i + 1].w[0], p[i + 1].w[1]));
            __stcs((uint2 *)(pair + 64) + c, make_uint2(p[i].w[2], p[i + 1].w[2]));
        }
    }
    static __device__ __forceinline__ int offset(int chunk) {
        return chunk / 8 * 96 + chunk % 4 * 16 + chunk / 4 % 2 * 8;
    }
    static __device__ __forceinline__ PartialChunk load(const char *address, int chunk, bool valid,
                                                        uint64_t) {
        PartialChunk p;
        load_or_zero(valid, address, address + (64 - chunk % 4 * 8 - chunk / 4 % 2 * 4), p.w);
        return p;
    }
};

// Returns the chunk of n8 tiles j .. j + 3 of an accumulator [n8 tiles][4], times scale, in row `quad` (i =
// 0) or quad + 8 (i = 1).
template <typename T, int COLUMNS>
static __device__ __forceinline__ PartialChunk<T> make_partial_chunk(const float (&x)[COLUMNS][4], int j,
                                                                     int i, float scale) {
    float v[8];
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = x[j + k / 2][2 * i + k % 2];
    return PartialChunk<T>::pack(v, scale);
}
template <typename T, int D> __host__ __device__ constexpr int partial_row_bytes() {
    return D / 8 * PartialChunk<T>::BYTES;
}
#endif
