// swiglu.cuh: out = silu(gate) * up, and its backward pass; results in floatX, in e4m3, or in both.
#ifndef LLMC_SWIGLU_CUH
#define LLMC_SWIGLU_CUH
#include "cuda_common.cuh"
#include "fp8.cuh"

// gate = silu(gate) * up.
__device__ __forceinline__ void swiglu_pack(float (&gate)[PACK], const float (&up)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; i++) gate[i] *= sigmoid(gate[i]) * up[i];
}
// gate, up = their gradients, given d, the gradient of the result.
__device__ __forceinline__ void swiglu_gradient_pack(float (&gate)[PACK], float (&up)[PACK],
                                                     const float (&d)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; i++) {
        const float s = sigmoid(gate[i]), ds = d[i] * s, silu = gate[i] * s;
        gate[i] = ds * up[i] * (1 + (gate[i] - silu)); // silu' = s (1 + (x - x s))
        up[i] = d[i] * silu;
    }
}

// Each thread computes one pack of a token's row; a thread block has 256. Grid: x tokens, y parts of a row.
// Memory-bound. It reads 4*h and writes 2*h bytes per token in 16 bits: 64K tokens of h = 14336 move 5.6 GB,
// which takes 1.25 ms at 4.5 TB/s.
static __global__ void __launch_bounds__(256)
    swiglu_forward_kernel(floatX *out, const floatX *gate_up, int64_t h) {
    int64_t column = (blockIdx.y * 256ll + threadIdx.x) * PACK, row = blockIdx.x;
    if (column >= h) return;
    float gate[PACK], up[PACK];
    load_pack(gate, gate_up + row * 2 * h + column);
    load_pack(up, gate_up + row * 2 * h + h + column);
    swiglu_pack(gate, up);
    store_pack(out + row * h + column, gate);
}

// The same grid. Memory-bound. It reads 6*h and writes 4*h bytes per token in 16 bits: 64K tokens of
// h = 14336 move 9.4 GB, which takes 2.1 ms at 4.5 TB/s. A thread reads its pack of gate_up before it writes
// dgate_up, so both may be one array.
static __global__ void __launch_bounds__(256)
    swiglu_backward_kernel(floatX *dgate_up, const floatX *dout, const floatX *gate_up, int64_t h) {
    int64_t column = (blockIdx.y * 256ll + threadIdx.x) * PACK, row = blockIdx.x;
    if (column >= h) return;
    float gate[PACK], up[PACK], d[PACK];
    load_pack(gate, gate_up + row * 2 * h + column);
    load_pack(up, gate_up + row * 2 * h + h + column);
    load_pack(d, dout + row * h + column);
    swiglu_gradient_pack(gate, up, d);
    store_pack(dgate_up + row * 2 * h + column, gate);
    store_pack(dgate_up + row * 2 * h + h + column, up);
}

// ---- e4m3: a scale for each row, of values that are rounded to floatX first -------------------------------
// A thread block processes a row. It holds the result in shared memory until the row's scale is known. A
// thread reads back only what it wrote. It loads two packs before it computes with the first.

// Returns the largest h whose backward pass needs at most `bytes` of shared memory a thread block: a row of
// 2*h elements, and block_reduce_max's 32 words.
static inline int64_t swiglu_fp8_max_h(int64_t bytes) {
    const int64_t h = (bytes - 32 * (int64_t)sizeof(uint32_t)) / (2 * (int64_t)sizeof(floatX));
    return h / FP8_ALIGN * FP8_ALIGN;
}

// q [n, h] = silu(gate) * up, and out [n, h] unless it is NULL. Memory-bound. It reads 4*h bytes and writes h
// per token in 16 bits: 64K tokens of h = 14336 move 4.7 GB, which takes 1.04 ms at 4.5 TB/s.
static __global__ void __launch_bounds__(256)
    swiglu_forward_fp8_kernel(Fp8Matrix q, floatX *out, const floatX *gate_up, int64_t h) {
    extern __shared__ __align__(16) uint4 result[]; // [h / PACK]
    __shared__ uint32_t shared[32];
    const int64_t row = blockIdx.x;
    const int packs = (int)(h / PACK);
    uint32_t amax = 0;
    for (int first = threadIdx.x; first < packs; first += 2 * blockDim.x) {
        uint4 gate_bits[2], up_bits[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int i = first + j * blockDim.x;
            if (i >= packs) break;
            gate_bits[j] = load16(gate_up + row * 2 * h + i * PACK);
            up_bits[j] = load16(gate_up + row * 2 * h + h + i * PACK);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int i = first + j * blockDim.x;
            if (i >= packs) break;
            float gate[PACK], up[PACK];
            unpack(gate, gate_bits[j]), unpack(up, up_bits[j]);
            swiglu_pack(gate, up);
            const uint4 bits = pack(gate);
            amax = pack_amax(amax, bits);
            if (out) store16(out + row * h + i * PACK, bits);
            result[i] = bits;
        }
    }
    const Fp8Scale s = fp8_scale(block_reduce_max(amax_bits(amax), shared));
    if (threadIdx.x == 0) q.scale[row] = s.scale;
    for (int i = threadIdx.x; i < packs; i += blockDim.x)
        store_fp8_pack(q.data + row * h + i * PACK, result[i], s.inverse);
}

// q [n, 2h] = the gradient of gate_up, and dgate_up [n, 2h] unless it is NULL. Memory-bound. It reads 6*h
// bytes and writes 2*h per token in 16 bits: 64K tokens of h = 14336 move 7.5 GB, which takes 1.67 ms at
// 4.5 TB/s.
static __global__ void __launch_bounds__(512)
    swiglu_backward_fp8_kernel(Fp8Matrix q, floatX *dgate_up, const floatX *dout, const floatX *gate_up,
                               int64_t h) {
    extern __shared__ __align__(16) uint4 result[]; // [2 * h / PACK]: gates, then ups
    __shared__ uint32_t shared[32];
    const int64_t row = blockIdx.x;
    const int packs = (int)(h / PACK);
    uint32_t amax = 0;
    for (int first = threadIdx.x; first < packs; first += 2 * blockDim.x) {
        uint4 gate_bits[2], up_bits[2], d_bits[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int i = first + j * blockDim.x;
            if (i >= packs) break;
            gate_bits[j] = load16(gate_up + row * 2 * h + i * PACK);
            up_bits[j] = load16(gate_up + row * 2 * h + h + i * PACK);
            d_bits[j] = load16(dout + row * h + i * PACK);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int i = first + j * blockDim.x;
            if (i >= packs) break;
            float gate[PACK], up[PACK], d[PACK];
            unpack(gate, gate_bits[j]), unpack(up, up_bits[j]), unpack(d, d_bits[j]);
            swiglu_gradient_pack(gate, up, d);
            const uint4 dgate = pack(gate), dup = pack(up);
            amax = pack_amax(pack_amax(amax, dgate), dup);
            if (dgate_up) {
                store16(dgate_up + row * 2 * h + i * PACK, dgate);
                store16(dgate_up + row * 2 * h + h + i * PACK, dup);
            }
            result[i] = dgate, result[packs + i] = dup;
        }
    }
    const Fp8Scale s = fp8_scale(block_reduce_max(amax_bits(amax), shared));
    if (threadIdx.x == 0) q.scale[row] = s.scale;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        store_fp8_pack(q.data + row * 2 * h + i * PACK, result[i], s.inverse);
        store_fp8_pack(q.data + row * 2 * h + h + i * PACK, result[packs + i], s.inverse);
    }
}

// Returns the threads of a thread block of the kernels above: at most max_threads, with equal shares of the
// packs.
static inline unsigned swiglu_fp8_threads(int64_t h, int64_t max_threads) {
    check_fp8_row("swiglu", h);
    const int64_t packs = h / PACK, shares = (packs + max_threads - 1) / max_threads;
    return (unsigned)(((packs + shares - 1) / shares + 31) / 32 * 32);
}

static inline dim3 swiglu_grid(int64_t n, int64_t h) {
    check_packs("swiglu", h);
    return dim3((unsigned)n, (unsigned)((h / PACK + 255) / 256));
}

// out = silu(gate) * up: out [n, h]; gate_up [n, 2h], each row h gates, then h ups; h is a multiple of PACK.
// If q.data is not NULL, the result goes to q [n, h] too, quantized by rows; out may then be NULL.
static inline void swiglu_forward(floatX *out, const floatX *gate_up, int64_t n, int64_t h,
                                  cudaStream_t stream, Fp8Matrix q = {}) {
    if (n == 0) return;
    if (q.data) {
        const unsigned threads = swiglu_fp8_threads(h, 256), bytes = (unsigned)(h * sizeof(floatX));
        cuda_check(cudaFuncSetAttribute(swiglu_forward_fp8_kernel,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
        swiglu_forward_fp8_kernel<<<(unsigned)n, threads, bytes, stream>>>(q, out, gate_up, h);
    } else {
        swiglu_forward_kernel<<<swiglu_grid(n, h), 256, 0, stream>>>(out, gate_up, h);
    }
    cuda_check(cudaGetLastError());
}

// dgate_up [n, 2h] = the gradient of gate_up [n, 2h], given dout [n, h]; it may be the same array as gate_up.
// If q.data is not NULL, the gradient goes to q [n, 2h] too, quantized by rows; dgate_up may then be NULL.
static inline void swiglu_backward(floatX *dgate_up, const floatX *dout, const floatX *gate_up, int64_t n,
                                   int64_t h, cudaStream_t stream, Fp8Matrix q = {}) {
    if (n == 0) return;
    if (q.data) {
        const unsigned threads = swiglu_fp8_threads(h, 512), bytes = (unsigned)(2 * h * sizeof(floatX));
        cuda_check(cudaFuncSetAttribute(swiglu_backward_fp8_kernel,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
        swiglu_backward_fp8_kernel<<<(unsigned)n, threads, bytes, stream>>>(q, dgate_up, dout, gate_up, h);
    } else {
        swiglu_backward_kernel<<<swiglu_grid(n, h), 256, 0, stream>>>(dgate_up, dout, gate_up, h);
    }
    cuda_check(cudaGetLastError());
}
#endif
