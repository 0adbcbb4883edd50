// matmul.cuh: the matmuls of the linear layers, forward and backward, on cuBLASLt.
//
// All matrices are row-major. cuBLASLt is column-major, so it computes the transposed product: a row-major
// [n, c] is a column-major [c, n]. Accumulation is in fp32; the fp32 build uses no TF32.
//
// Matmuls are bitwise reproducible on the same GPU. The algorithm of a shape is the first one that cuBLASLt's
// heuristic returns; algorithms are never timed against each other. Split-k algorithms are allowed only if
// they reduce fp32 partial sums in a fixed order.
#ifndef LLMC_MATMUL_CUH
#define LLMC_MATMUL_CUH
#include "cuda_common.cuh"
#include "fp8.h"
#include <cublasLt.h>

enum {
    MATMUL_WORKSPACE_BYTES = 32 << 20, // cuBLASLt's fastest algorithms need this much
    MATMUL_CACHE_SIZE = 256            // shapes whose algorithm is cached
};

// Exits with the file, the line, the call and cuBLASLt's error text unless `call` succeeds.
#define cublas_check(call)                                                                                   \
    do {                                                                                                     \
        cublasStatus_t status_ = (call);                                                                     \
        if (status_ != CUBLAS_STATUS_SUCCESS)                                                                \
            die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cublasLtGetStatusString(status_));               \
    } while (0)

// The key of the cache: everything that cuBLASLt's heuristic depends on. d = op(a) op(b), column-major: d
// [m, n], op(a) [m, k], op(b) [k, n].
typedef struct {
    int64_t m, n, k, lda, ldb, ldd;
    int32_t trans_a, trans_b, fp32_out, bias;
    int32_t fp8, fp8_fast; // fp8: 0, or for e4m3 operands with scales 1 + Fp8Scaling (fp8.h)
    int32_t align_a, align_b, align_c, align_d, align_bias; // bytes, at most 16
    int32_t sms; // as in Matmul. The struct has no padding, since its bytes are compared.
} MatmulShape;

// The arrays of a matmul. c [m, n] is added to the product: an array of d's type and stride, which may be d;
// NULL: none. bias [m] has one element per row of d; NULL: none. a_scale and b_scale are the scales of e4m3
// operands.
typedef struct {
    void *d;
    const void *a, *b, *c;
    const floatX *bias;
    const float *a_scale, *b_scale;
} MatmulArrays;

typedef struct {
    MatmulShape shape;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algo;
    int64_t last_used; // Matmul.clock at the last use; 0: the entry is empty
} MatmulCacheEntry;

// cuBLASLt's state. All matmuls share the workspace, so it serves one stream at a time.
typedef struct {
    cublasLtHandle_t handle;
    cublasLtMatmulPreference_t preference;
    void *workspace;
    size_t workspace_bytes;
    int row_scales; // 1: e4m3 operands can have a scale for each row (fp8_matmul.cuh)
    int sms;        // SMs that matmuls are planned for, beside another kernel that holds the others; 0: all
    int64_t clock;  // counts matmuls
    MatmulCacheEntry cache[MATMUL_CACHE_SIZE]; // the least recently used entry is evicted
} Matmul;

// Initializes mm. workspace: `bytes` bytes of device memory, MATMUL_WORKSPACE_BYTES or more for full speed;
// the caller keeps it until matmul_free.
static inline void matmul_init(Matmul *mm, void *workspace, size_t bytes) {
    memset(mm, 0, sizeof *mm);
    mm->workspace = workspace;
    mm->workspace_bytes = bytes;
    cublas_check(cublasLtCreate(&mm->handle));
    int device, major, minor;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    mm->row_scales = CUBLAS_VERSION >= 120900 && cublasLtGetVersion() >= 120900 && major == 9 && minor == 0;
    cublas_check(cublasLtMatmulPreferenceCreate(&mm->preference));
    // split-k with fp32 partial sums; no split-k is always allowed
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    cublas_check(cublasLtMatmulPreferenceSetAttribute(
        mm->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes));
    cublas_check(cublasLtMatmulPreferenceSetAttribute(
        mm->preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions));
}

static inline void matmul_evict(MatmulCacheEntry *c) {
    if (!c->last_used) return;
    cublas_check(cublasLtMatrixLayoutDestroy(c->a));
    cublas_check(cublasLtMatrixLayoutDestroy(c->b));
    cublas_check(cublasLtMatrixLayoutDestroy(c->d));
    cublas_check(cublasLtMatmulDescDestroy(c->desc));
}

static inline void matmul_free(Matmul *mm) {
    for (int i = 0; i < MATMUL_CACHE_SIZE; i++) matmul_evict(&mm->cache[i]);
    cublas_check(cublasLtMatmulPreferenceDestroy(mm->preference));
    cublas_check(cublasLtDestroy(mm->handle));
}

static inline void matmul_set_attribute(MatmulCacheEntry *c, cublasLtMatmulDescAttributes_t attribute,
                                        const void *value, size_t bytes) {
    cublas_check(cublasLtMatmulDescSetAttribute(c->desc, attribute, value, bytes));
}

// Sets the arrays that are attributes of the matmul.
static inline void matmul_set_arrays(MatmulCacheEntry *c, const MatmulArrays *x) {
    if (x->bias) matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &x->bias, sizeof x->bias);
    if (!c->shape.fp8) return;
    matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &x->a_scale, sizeof x->a_scale);
    matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x->b_scale, sizeof x->b_scale);
}

// Fills the cache entry c of a new shape: descriptors and algorithm. Returns cuBLASLt's status, and *found =
// 0 if it has no algorithm.
static inline cublasStatus_t matmul_find_algo(Matmul *mm, MatmulCacheEntry *c, const MatmulShape *s,
                                              const MatmulArrays *x, int *found) {
    cudaDataType_t in = s->fp8 ? CUDA_R_8F_E4M3 : FLOATX_TYPE, out = s->fp32_out ? CUDA_R_32F : FLOATX_TYPE;
    c->shape = *s;
    cublas_check(cublasLtMatmulDescCreate(&c->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    int32_t trans_a = s->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N,
            trans_b = s->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_TRANSA, &trans_a, sizeof trans_a);
    matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_TRANSB, &trans_b, sizeof trans_b);
    if (s->sms) matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, &s->sms, sizeof s->sms);
    if (s->bias) {
        uint32_t epilogue = CUBLASLT_EPILOGUE_BIAS;
        matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    }
    const int8_t fast = (int8_t)s->fp8_fast;
    if (s->fp8) matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast);
#if CUBLAS_VERSION >= 120900 // older versions scale whole tensors only, as do newer ones by default
    if (s->fp8 == 1 + FP8_SCALE_ROW) {
        const int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
        matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode);
        matmul_set_attribute(c, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode, sizeof mode);
    }
#endif
    matmul_set_arrays(c, x);
    cublas_check(
        cublasLtMatrixLayoutCreate(&c->a, in, s->trans_a ? s->k : s->m, s->trans_a ? s->m : s->k, s->lda));
    cublas_check(
        cublasLtMatrixLayoutCreate(&c->b, in, s->trans_b ? s->n : s->k, s->trans_b ? s->k : s->n, s->ldb));
    cublas_check(cublasLtMatrixLayoutCreate(&c->d, out, s->m, s->n, s->ldd));
    const cublasLtMatmulPreferenceAttributes_t attributes[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    const int32_t alignments[] = {s->align_a, s->align_b, s->align_c, s->align_d};
    for (int i = 0; i < 4; i++) {
        uint32_t bytes = (uint32_t)alignments[i];
        cublas_check(
            cublasLtMatmulPreferenceSetAttribute(mm->preference, attributes[i], &bytes, sizeof bytes));
    }
    cublasLtMatmulHeuristicResult_t result;
    *found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(mm->handle, c->desc, c->a, c->b, c->d, c->d,
                                                           mm->preference, 1, &result, found);
    if (status != CUBLAS_STATUS_SUCCESS || *found == 0) return status;
    c->algo = result.algo;
    return result.state;
}

// The same, or exits with an error.
static inline void matmul_select_algo(Matmul *mm, MatmulCacheEntry *c, const MatmulShape *s,
                                      const MatmulArrays *x) {
    int found;
    const cublasStatus_t status = matmul_find_algo(mm, c, s, x, &found);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0)
        die("cuBLASLt has no algorithm for a %s matmul of m %lld, n %lld, k %lld: %s",
            s->fp8 ? "fp8" : FLOATX_NAME, (long long)s->m, (long long)s->n, (long long)s->k,
            status == CUBLAS_STATUS_SUCCESS ? "none fits the workspace" : cublasLtGetStatusString(status));
}

// Returns the alignment of p in bytes, at most 16; 16 for NULL.
static inline int32_t matmul_align(const void *p) {
    return p == NULL || (uintptr_t)p % 16 == 0 ? 16 : (int32_t)((uintptr_t)p & -(uintptr_t)p);
}

// d = op(a) op(b) + c + bias, column-major, of shape s.
static inline void matmul_run(Matmul *mm, MatmulShape s, const MatmulArrays *x, cudaStream_t stream) {
    if (s.m == 0 || s.n == 0) return;
    const void *c = x->c ? x->c : x->d; // without c nothing is read there
    s.bias = x->bias != NULL, s.sms = mm->sms;
    s.align_a = matmul_align(x->a), s.align_b = matmul_align(x->b), s.align_c = matmul_align(c);
    s.align_d = matmul_align(x->d), s.align_bias = matmul_align(x->bias);
    MatmulCacheEntry *entry = NULL, *oldest = &mm->cache[0];
    for (int i = 0; i < MATMUL_CACHE_SIZE && !entry; i++) {
        MatmulCacheEntry *e = &mm->cache[i];
        if (e->last_used && memcmp(&e->shape, &s, sizeof s) == 0) entry = e;
        if (e->last_used < oldest->last_used) oldest = e;
        if (!e->last_used) break; // the cache fills up from its beginning
    }
    if (!entry) {
        matmul_evict(oldest);
        matmul_select_algo(mm, oldest, &s, x);
        entry = oldest;
    }
    entry->last_used = ++mm->clock;
    matmul_set_arrays(entry, x);
    const float one = 1, beta = x->c ? 1.0f : 0.0f;
    cublas_check(cublasLtMatmul(mm->handle, entry->desc, &one, x->a, entry->a, x->b, entry->b, &beta, c,
                                entry->d, x->d, entry->d, &entry->algo, mm->workspace, mm->workspace_bytes,
                                stream));
}

// out = x weight^T + bias + addend: out and addend [n, o] with rows ldo elements apart, x [n, c] with rows
// ldx elements apart, weight [o, c], bias [o] or NULL, addend or NULL. 2*n*c*o FLOPs: 64K tokens, c = 4096, o
// = 14336 have 7.7 TFLOP, which takes 9.8 ms at 790 TFLOP/s. Limited by the tensor cores; below about n =
// 300, by reading the weights.
static inline void matmul_forward(Matmul *mm, floatX *out, int64_t ldo, const floatX *x, int64_t ldx,
                                  const floatX *weight, const floatX *bias, int64_t n, int64_t c, int64_t o,
                                  cudaStream_t stream, const floatX *addend = NULL) {
    const MatmulArrays arrays = {out, weight, x, addend, bias};
    matmul_run(mm, MatmulShape{o, n, c, c, ldx, ldo, 1, 0, 0}, &arrays, stream);
}

// dx = dout weight, or dx += dout weight if add != 0: dx [n, c], dout [n, o] with rows ldo elements apart,
// weight [o, c]. 2*n*c*o FLOPs.
static inline void matmul_backward_input(Matmul *mm, floatX *dx, int add, const floatX *dout, int64_t ldo,
                                         const floatX *weight, int64_t n, int64_t c, int64_t o,
                                         cudaStream_t stream) {
    const MatmulArrays arrays = {dx, weight, dout, add ? dx : NULL};
    matmul_run(mm, MatmulShape{c, n, o, c, ldo, c, 0, 0, 0}, &arrays, stream);
}

// partial [gridDim.y, o]: column sums of dout, whose rows are cut into gridDim.y parts. Each thread block
// sums 32 packs of P columns over one part: warp w of 8 sums rows w, w + 8, w + 16, ..., then the sums of the
// warps are added in order. Memory-bound. It reads 2*o bytes per row in 16 bits.
template <int P>
static __global__ void __launch_bounds__(256)
    column_sums_kernel(float *partial, const floatX *dout, int64_t ldo, int64_t n, int64_t o) {
    __shared__ float sums[8][32 * P];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t column = (blockIdx.x * 32ll + lane) * P, rows = (n + gridDim.y - 1) / gridDim.y;
    int64_t first = blockIdx.y * rows, last = first + rows < n ? first + rows : n;
    float sum[P] = {};
    if (column < o) {
#pragma unroll 4
        for (int64_t row = first + warp; row < last; row += 8) {
            float x[P];
            if constexpr (P == PACK)
                load_pack(x, dout + row * ldo + column);
            else
                x[0] = (float)dout[row * ldo + column];
#pragma unroll
            for (int i = 0; i < P; i++) sum[i] += x[i];
        }
    }
#pragma unroll
    for (int i = 0; i < P; i++) sums[warp][lane * P + i] = sum[i];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * P; i += 256) {
        float total = 0;
        for (int w = 0; w < 8; w++) total += sums[w][i];
        if (blockIdx.x * 32ll * P + i < o) partial[blockIdx.y * o + blockIdx.x * 32ll * P + i] = total;
    }
}

// dbias [o] += the column sums of dout [n, o], whose rows are ldo elements apart; dbias is fp32.
static inline void bias_backward(Matmul *mm, float *dbias, const floatX *dout, int64_t ldo, int64_t n,
                                 int64_t o, cudaStream_t stream) {
    if (n == 0) return;
    const bool packed = o % PACK == 0 && ldo % PACK == 0 && matmul_align(dout) == 16;
    int64_t parts = (n + 63) / 64, max_parts = (int64_t)(mm->workspace_bytes / sizeof(float)) / o;
    if (parts > 64) parts = 64;
    if (parts > max_parts) parts = max_parts;
    if (parts == 0)
        die("bias gradient: a workspace of %zu bytes is too small for a row of %lld fp32 elements",
            mm->workspace_bytes, (long long)o);
    const int64_t columns = 32 * (packed ? PACK : 1); // of a thread block
    dim3 grid((unsigned)((o + columns - 1) / columns), (unsigned)parts);
    float *partial = (float *)mm->workspace;
    if (packed)
        column_sums_kernel<PACK><<<grid, 256, 0, stream>>>(partial, dout, ldo, n, o);
    else
        column_sums_kernel<1><<<grid, 256, 0, stream>>>(partial, dout, ldo, n, o);
    cuda_check(cudaGetLastError());
    add_partial_sums(dbias, partial, (int)parts, o, stream);
}

// One thread per element of out.
static __global__ void __launch_bounds__(256)
    add_bias_kernel(floatX *out, int64_t ldo, const floatX *bias, int64_t n, int o) {
    const int64_t i = blockIdx.x * 256ll + threadIdx.x, row = i / o, column = i % o;
    if (row < n) out[row * ldo + column] = (floatX)((float)out[row * ldo + column] + (float)bias[column]);
}

// out [n, o] += bias [o]; rows of out are ldo elements apart. For columns whose matmul has no bias. Memory-
// bound: 4 bytes per element in 16 bits.
static inline void add_bias(floatX *out, int64_t ldo, const floatX *bias, int64_t n, int64_t o,
                            cudaStream_t stream) {
    if (n == 0) return;
    add_bias_kernel<<<(unsigned)((n * o + 255) / 256), 256, 0, stream>>>(out, ldo, bias, n, (int)o);
    cuda_check(cudaGetLastError());
}

// dweight = dout^T x, or dweight += dout^T x if add != 0: dweight [o, c] is fp32, dout [n, o] has rows ldo
// elements apart, x [n, c] rows ldx elements apart. 2*n*c*o FLOPs.
static inline void matmul_backward_weight(Matmul *mm, float *dweight, int add, const floatX *dout,
                                          int64_t ldo, const floatX *x, int64_t ldx, int64_t n, int64_t c,
                                          int64_t o, cudaStream_t stream) {
    if (n == 0) return;
    const MatmulArrays arrays = {dweight, x, dout, add ? dweight : NULL};
    matmul_run(mm, MatmulShape{c, o, n, ldx, ldo, c, 0, 1, 1}, &arrays, stream);
}
#endif
