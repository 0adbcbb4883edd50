// fp8_matmul.cuh: the matmuls of the layers' linear weights on e4m3 operands, on cuBLASLt, and the check that
// a model, a GPU and a toolkit can run them.
//
// Operands are Fp8Matrix (fp8.h): rows along which the matmul sums, 16-byte aligned, a multiple of FP8_ALIGN
// long, with a scale for the matrix, each row or each 128 elements of a row. cuBLASLt takes no other layout
// on Hopper, so the input gradient reads the transposed weight, and the weight gradient the transposed
// operands. Outputs are floatX, or fp32 for gradients of weights.
//
// cuBLASLt has scales for rows and for 128 elements since CUDA 12.9, and for compute capability 9.0 alone. It
// takes scales for 128 elements only if both operands have a multiple of 4 rows. Scales for whole matrices
// work from compute capability 8.9 and CUDA 12.0 on. Where rows can have no scale, a matmul first makes the
// scales of an operand's rows equal, which is one more pass over e4m3 elements.
//
// Fast accumulation leaves the sum in the tensor core's accumulators, which keep about 14 bits. Precise
// accumulation adds them to fp32 registers every 128 terms. All matmuls use precise accumulation: a sum over
// 14,336 channels or over 65,536 tokens needs more than 14 bits.
#ifndef LLMC_FP8_MATMUL_CUH
#define LLMC_FP8_MATMUL_CUH
#include "config.h"
#include "fp8.cuh"
#include "matmul.cuh"
#include "swiglu.cuh"

// How a matmul scales and adds.
typedef struct {
    Fp8Scaling scaling;
    int fast; // 1: fast accumulation
} Fp8Mode;

static const Fp8Mode FP8_FORWARD = {FP8_SCALE_ROW, 0}, FP8_INPUT_GRADIENT = {FP8_SCALE_ROW, 0},
                     FP8_WEIGHT_GRADIENT = {FP8_SCALE_ROW, 0};

// The shape of out [rows_a, rows_b] = a b^T: a [rows_a, k], b [rows_b, k]. Row-major out is column-major
// transposed, so b is cuBLASLt's first operand.
static inline MatmulShape fp8_matmul_shape(Fp8Mode mode, int fp32_out, int64_t ldo, int64_t rows_a,
                                           int64_t rows_b, int64_t k) {
    MatmulShape s = {rows_b, rows_a, k, k, k, ldo, 1, 0, fp32_out};
    s.fp8 = 1 + mode.scaling, s.fp8_fast = mode.fast;
    return s;
}

// Returns whether cuBLASLt has an algorithm for this matmul of aligned arrays.
static inline bool fp8_matmul_supported(Matmul *mm, Fp8Mode mode, int fp32_out, int64_t ldo, int64_t rows_a,
                                        int64_t rows_b, int64_t k) {
    MatmulShape s = fp8_matmul_shape(mode, fp32_out, ldo, rows_a, rows_b, k);
    s.align_a = s.align_b = s.align_d = s.align_bias = 16;
    MatmulCacheEntry entry = {};
    MatmulArrays arrays = {};
    arrays.a_scale = arrays.b_scale = (const float *)mm->workspace; // any address: nothing is read
    int found;
    const cublasStatus_t status = matmul_find_algo(mm, &entry, &s, &arrays, &found);
    entry.last_used = 1;
    matmul_evict(&entry);
    return status == CUBLAS_STATUS_SUCCESS && found > 0;
}

// out = a b^T, or out += a b^T if add != 0: out [rows_a, rows_b], rows ldo elements apart, floatX or fp32.
// Without row scales a and b get equal ones.
static inline void fp8_matmul(Matmul *mm, Fp8Mode mode, void *out, int fp32_out, int64_t ldo, int add,
                              Fp8Matrix a, Fp8Matrix b, int64_t rows_a, int64_t rows_b, int64_t k,
                              cudaStream_t stream) {
    if (rows_a == 0) return;
    if (mode.scaling == FP8_SCALE_ROW && !mm->row_scales) {
        mode.scaling = FP8_SCALE_TENSOR;
        equalize_scales(a, rows_a, k, (float *)mm->workspace, stream);
        equalize_scales(b, rows_b, k, (float *)mm->workspace, stream);
    }
    const MatmulArrays arrays = {out, b.data, a.data, add ? 1.0f : 0.0f, NULL, b.scale, a.scale};
    matmul_run(mm, fp8_matmul_shape(mode, fp32_out, ldo, rows_a, rows_b, k), &arrays, stream);
}

// out = x weight^T: out [n, o] with rows ldo elements apart, x [n, c], weight [o, c]. 2*n*c*o FLOPs: 64K
// tokens, c = 4096, o = 14336 take 5.9 ms at 1,300 TFLOP/s.
static inline void fp8_matmul_forward(Matmul *mm, floatX *out, int64_t ldo, Fp8Matrix x, Fp8Matrix weight,
                                      int64_t n, int64_t c, int64_t o, cudaStream_t stream) {
    fp8_matmul(mm, FP8_FORWARD, out, 0, ldo, 0, x, weight, n, o, c, stream);
}

// dx = dout weight, or dx += dout weight if add != 0: dx [n, c], dout [n, o], weight_t [c, o] the transposed
// weight.
static inline void fp8_matmul_backward_input(Matmul *mm, floatX *dx, int add, Fp8Matrix dout,
                                             Fp8Matrix weight_t, int64_t n, int64_t c, int64_t o,
                                             cudaStream_t stream) {
    fp8_matmul(mm, FP8_INPUT_GRADIENT, dx, 0, c, add, dout, weight_t, n, c, o, stream);
}

// dweight = dout^T x, or dweight += dout^T x if add != 0: dweight [o, c] in fp32, dout_t [o, fp8_padded(n)]
// and x_t [c, fp8_padded(n)] the transposed operands (quantize_transpose).
static inline void fp8_matmul_backward_weight(Matmul *mm, float *dweight, int add, Fp8Matrix dout_t,
                                              Fp8Matrix x_t, int64_t n, int64_t c, int64_t o,
                                              cudaStream_t stream) {
    if (n == 0) return;
    fp8_matmul(mm, FP8_WEIGHT_GRADIENT, dweight, 1, c, add, dout_t, x_t, o, c, fp8_padded(n), stream);
}

// Exits with an error unless -matmul fp8 can train this model with this program on this GPU.
static inline void fp8_check(const ModelConfig *c, const cudaDeviceProp *gpu) {
    const int64_t d = c->fsa.head_dim, q = c->fsa.q_heads * d, kv = 2 * c->fsa.kv_heads * d;
    const int32_t widths[] = {c->channels, c->hidden};
    const char *flags[] = {"-channels", "-hidden"};
    if (sizeof(floatX) != 2)
        die("-matmul fp8: this is the %s build: use the bf16 or the fp16 build", FLOATX_NAME);
    if (gpu->major * 10 + gpu->minor < 89)
        die("-matmul fp8: %s, compute capability %d.%d: must be at least 8.9; use -matmul bf16", gpu->name,
            gpu->major, gpu->minor);
    for (int i = 0; i < 2; i++)
        if (widths[i] % FP8_ALIGN != 0)
            die("-matmul fp8: %s %d: must be a multiple of %d; try %s %d", flags[i], widths[i],
                (int)FP8_ALIGN, flags[i], (widths[i] + FP8_ALIGN - 1) / FP8_ALIGN * FP8_ALIGN);
    if (c->hidden > SWIGLU_MAX_FP8)
        die("-matmul fp8: -hidden %d: must be at most %d; use -matmul bf16", c->hidden, (int)SWIGLU_MAX_FP8);
    if (q % FP8_ALIGN != 0 || kv % FP8_ALIGN != 0)
        die("-matmul fp8: -heads %d -kv-heads %d -head-dim %d: all query heads, and all key and value heads, "
            "must have a multiple of %d channels; try -head-dim %d",
            c->fsa.q_heads, c->fsa.kv_heads, c->fsa.head_dim, (int)FP8_ALIGN,
            (c->fsa.head_dim + FP8_ALIGN - 1) / FP8_ALIGN * FP8_ALIGN);
    if (q + kv > FP8_MAX_ROW)
        die("-matmul fp8: -heads %d -kv-heads %d -head-dim %d: q, k and v have %lld channels: must be at "
            "most "
            "%d; use -matmul bf16",
            c->fsa.q_heads, c->fsa.kv_heads, c->fsa.head_dim, (long long)(q + kv), (int)FP8_MAX_ROW);
}
#endif
