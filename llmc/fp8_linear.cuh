// fp8_linear.cuh: a linear layer in 8 bits: its quantized weight, its forward pass, and the gradients of its
// input and of its weight. Activations and gradients come as e4m3 with a scale for each row: from
// quantize_rows, or from the kernels that produce them (rmsnorm.cuh, swiglu.cuh).
//
// The input gradient reads the transposed weight, and the weight gradient the transposed operands, since
// cuBLASLt sums along rows alone (fp8_matmul.cuh). Where rows can have no scale, the scales of all rows of a
// matrix are made equal first, which is one more pass over its e4m3 elements.
#ifndef LLMC_FP8_LINEAR_CUH
#define LLMC_FP8_LINEAR_CUH
#include "arena.cuh"
#include "config.h"
#include "fp8_matmul.cuh"
#include "swiglu.cuh"

// Scales: of rows in all matmuls. A row of the operands of a weight gradient is a channel, so their scales
// cost another pass over both; one scale for each operand would not (dev/results/experiments.md).
// Accumulation: fast in sums of at most FP8_FAST_TERMS channels, forward and in input gradients: its error is
// 0.0013, that of rounding the output to bf16 0.0011. Precise in longer sums and in weight gradients: where
// all tokens share a gradient, these have terms of one sign, and fast accumulation cuts such sums
// (fp8_matmul.cuh). A layer's q, k and v are one input gradient, with -cp two shorter ones.
enum { FP8_FAST_TERMS = 4096 };

// A quantized weight, or some of its rows.
typedef struct {
    int64_t out, in;
    Fp8Matrix w;   // [out, in]
    Fp8Matrix w_t; // [in, out], rows ld_t elements apart
    int64_t ld_t;
} Fp8Weight;

// Memory that linear layers use one after another.
typedef struct {
    Fp8Matrix dout_t, x_t; // transposed operands of a weight gradient
    uint32_t *amax;        // [largest out or in]
} Fp8Scratch;

// Assigns the memory of a matrix of `rows` rows of k elements, which have a scale each.
static inline void fp8_matrix_memory_layout(Fp8Matrix *q, int64_t rows, int64_t k, Arena *arena) {
    arena_alloc(arena, &q->data, rows * k);
    arena_alloc(arena, &q->scale, rows);
}

// Without training there is no w_t.
static inline void fp8_weight_memory_layout(Fp8Weight *w, int64_t out, int64_t in, int training,
                                            Arena *arena) {
    w->out = w->ld_t = out, w->in = in;
    fp8_matrix_memory_layout(&w->w, out, in, arena);
    if (training) fp8_matrix_memory_layout(&w->w_t, in, out, arena);
}

// For linear layers of at most n tokens, max_out outputs and max_in inputs.
static inline void fp8_scratch_memory_layout(Fp8Scratch *s, int64_t n, int64_t max_out, int64_t max_in,
                                             Arena *arena) {
    fp8_matrix_memory_layout(&s->dout_t, max_out, fp8_padded(n), arena);
    fp8_matrix_memory_layout(&s->x_t, max_in, fp8_padded(n), arena);
    arena_alloc(arena, &s->amax, max_out > max_in ? max_out : max_in);
}

// Returns rows [first, first + count) of a weight; both are multiples of FP8_ALIGN.
static inline Fp8Weight fp8_weight_rows(const Fp8Weight *w, int64_t first, int64_t count) {
    Fp8Weight part = *w;
    part.out = count;
    if (w->w.data) part.w.data += first * w->in, part.w.scale += first;
    if (w->w_t.data) part.w_t.data += first;
    return part;
}

// Quantizes a weight [out, in]. Called once a step, after the update.
static inline void fp8_weight_quantize(const Matmul *mm, const Fp8Weight *w, const floatX *weight,
                                       const Fp8Scratch *s, cudaStream_t stream) {
    if (w->w_t.data)
        quantize_weight(w->w, w->w_t, weight, w->out, w->in, s->amax, stream);
    else
        quantize_rows(w->w, weight, w->in, w->out, w->in, stream);
    if (mm->row_scales) return;
    equalize_scales(w->w, w->out, w->in, (float *)s->amax, stream);
    if (w->w_t.data) equalize_scales(w->w_t, w->in, w->out, (float *)s->amax, stream);
}

// out = x weight^T + addend: out and addend [n, out] with rows ldo elements apart, x [n, in]; addend or NULL.
static inline void fp8_linear_forward(Matmul *mm, const Fp8Scratch *s, floatX *out, int64_t ldo, Fp8Matrix x,
                                      const Fp8Weight *w, int64_t n, cudaStream_t stream,
                                      const floatX *addend = NULL) {
    if (n == 0) return;
    if (!mm->row_scales) equalize_scales(x, n, w->in, (float *)s->amax, stream);
    const Fp8Mode mode = fp8_mode(mm, w->in <= FP8_FAST_TERMS);
    fp8_matmul(mm, mode, out, 0, ldo, addend, x, w->w, w->in, n, w->out, w->in, stream);
}

// dx = dout weight, or dx += dout weight if add != 0: dx [n, in], dout [n, out].
static inline void fp8_linear_backward_input(Matmul *mm, const Fp8Scratch *s, floatX *dx, int add,
                                             Fp8Matrix dout, const Fp8Weight *w, int64_t n,
                                             cudaStream_t stream) {
    if (n == 0) return;
    if (!mm->row_scales) equalize_scales(dout, n, w->out, (float *)s->amax, stream);
    const Fp8Mode mode = fp8_mode(mm, w->out <= FP8_FAST_TERMS);
    fp8_matmul(mm, mode, dx, 0, w->in, add ? dx : NULL, dout, w->w_t, w->ld_t, n, w->in, w->out, stream);
}

// Transposes the operands of a weight gradient to the scratch: dout [n, out], x [n, in].
static inline void fp8_linear_transpose(const Matmul *mm, const Fp8Scratch *s, Fp8Matrix dout, Fp8Matrix x,
                                        int64_t n, int64_t in, int64_t out, cudaStream_t stream) {
    const Fp8Scaling scaling = fp8_mode(mm, 0).scaling;
    quantize_transpose(s->dout_t, scaling, dout, n, out, s->amax, stream);
    quantize_transpose(s->x_t, scaling, x, n, in, s->amax, stream);
}

// dweight = dout^T x, or dweight += dout^T x if add != 0, of the operands that fp8_linear_transpose has put
// into the scratch: dweight [out, in] in fp32.
static inline void fp8_linear_backward_weight(Matmul *mm, const Fp8Scratch *s, float *dweight, int add,
                                              int64_t n, int64_t in, int64_t out, cudaStream_t stream) {
    if (n == 0) return;
    const int64_t padded = fp8_padded(n);
    fp8_matmul(mm, fp8_mode(mm, 0), dweight, 1, in, add ? dweight : NULL, s->dout_t, s->x_t, padded, out, in,
               padded, stream);
}

// Returns whether -matmul is fp8. Exits with an error if it is and cannot train this model with this program
// on this GPU.
static inline int fp8_check(const char *matmul, const ModelConfig *c, const cudaDeviceProp *gpu) {
    if (strcmp(matmul, "fp8") != 0) return 0;
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
    const int64_t max_hidden = // of the rows of wdown, and of SwiGLU
        std::min<int64_t>(FP8_MAX_ROW, swiglu_fp8_max_h((int64_t)gpu->sharedMemPerBlockOptin));
    if (c->hidden > max_hidden)
        die("-matmul fp8: -hidden %d: must be at most %lld on %s; use -matmul bf16", c->hidden,
            (long long)max_hidden, gpu->name);
    if (q + kv > FP8_MAX_ROW)
        die("-matmul fp8: -heads %d -kv-heads %d -head-dim %d: q, k and v have %lld channels: must be at "
            "most %d; use -matmul bf16",
            c->fsa.q_heads, c->fsa.kv_heads, c->fsa.head_dim, (long long)(q + kv), (int)FP8_MAX_ROW);
    return 1;
}
#endif
