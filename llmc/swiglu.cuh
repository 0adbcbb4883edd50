// swiglu.cuh: out = silu(gate) * up, and its backward pass.
#ifndef LLMC_SWIGLU_CUH
#define LLMC_SWIGLU_CUH
#include "cuda_common.cuh"

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
#pragma unroll
    for (int i = 0; i < PACK; i++) gate[i] = gate[i] / (1 + __expf(-gate[i])) * up[i];
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
#pragma unroll
    for (int i = 0; i < PACK; i++) {
        float x = gate[i], s = 1 / (1 + __expf(-x));
        gate[i] = d[i] * up[i] * s * (1 + x * (1 - s)); // silu' = s + x s (1 - s)
        up[i] = d[i] * x * s;
    }
    store_pack(dgate_up + row * 2 * h + column, gate);
    store_pack(dgate_up + row * 2 * h + h + column, up);
}

static inline dim3 swiglu_grid(int64_t n, int64_t h) {
    check_packs("swiglu", h);
    return dim3((unsigned)n, (unsigned)((h / PACK + 255) / 256));
}

// out = silu(gate) * up: out [n, h]; gate_up [n, 2h], each row h gates, then h ups; h is a multiple of PACK.
static inline void swiglu_forward(floatX *out, const floatX *gate_up, int64_t n, int64_t h,
                                  cudaStream_t stream) {
    if (n == 0) return;
    swiglu_forward_kernel<<<swiglu_grid(n, h), 256, 0, stream>>>(out, gate_up, h);
    cuda_check(cudaGetLastError());
}

// dgate_up [n, 2h] = the gradient of gate_up [n, 2h], given dout [n, h]; it may be the same array as gate_up.
static inline void swiglu_backward(floatX *dgate_up, const floatX *dout, const floatX *gate_up, int64_t n,
                                   int64_t h, cudaStream_t stream) {
    if (n == 0) return;
    swiglu_backward_kernel<<<swiglu_grid(n, h), 256, 0, stream>>>(dgate_up, dout, gate_up, h);
    cuda_check(cudaGetLastError());
}
#endif
