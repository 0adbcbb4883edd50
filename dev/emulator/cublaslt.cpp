// cublaslt.cpp: the part of cuBLASLt that llmc/matmul.cuh calls, on the CPU, for the emulator: descriptors,
// layouts with leading dimensions, transposes, beta, the bias epilogue, and e4m3 operands with their scales.
// It rejects anything else as not supported. It rejects pointers with less than the alignment that the caller
// gave for the algorithm's heuristic, and e4m3 matmuls that Hopper's kernels do not take. It overwrites the
// workspace, as the library may.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

namespace {

struct Desc {
    int32_t trans_a, trans_b;
    uint32_t epilogue;
    const void *bias;
    const float *scale[2]; // of a and b
    int32_t scale_mode[2];
    int8_t fast_accumulation;
    int32_t sms; // ignored: the result does not depend on it
};
struct Layout {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld;
};
struct Preference {
    uint64_t workspace;
    uint32_t reduction_schemes, align[4]; // bytes: a, b, c, d
};
// The matmul that an algorithm was chosen for; stored in a cublasLtMatmulAlgo_t.
struct Algo {
    uint32_t align[3]; // bytes: a; b; the smaller one of c and d
    uint32_t m, n, k;  // modulo 2^32
};
static_assert(sizeof(Algo) <= sizeof(cublasLtMatmulAlgo_t), "an Algo must fit into a cublasLtMatmulAlgo_t");

size_t type_bytes(cudaDataType type) {
    return type == CUDA_R_32F                          ? 4
           : type == CUDA_R_16BF || type == CUDA_R_16F ? 2
           : type == CUDA_R_8F_E4M3                    ? 1
                                                       : 0;
}
float load(const void *p, cudaDataType type, int64_t i) {
    return type == CUDA_R_32F    ? ((const float *)p)[i]
           : type == CUDA_R_16BF ? __bfloat162float(((const __nv_bfloat16 *)p)[i])
           : type == CUDA_R_16F  ? __half2float(((const __half *)p)[i])
                                 : (float)((const __nv_fp8_e4m3 *)p)[i];
}
void store(void *p, cudaDataType type, int64_t i, float x) {
    if (type == CUDA_R_32F)
        ((float *)p)[i] = x;
    else if (type == CUDA_R_16BF)
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16(x);
    else
        ((__half *)p)[i] = __float2half(x);
}
bool same(const Layout &a, const Layout &b) {
    return a.type == b.type && a.rows == b.rows && a.cols == b.cols && a.ld == b.ld;
}

enum { SCALE_TENSOR = 0, SCALE_ROW = 3 }; // cublasLtMatmulMatrixScale_t, from CUDA 12.9 on

// Checks an e4m3 matmul against the rules of Hopper's kernels: a transposed, b not; 16-byte aligned columns;
// no e4m3 output; the same scale mode for both.
cublasStatus_t check_fp8_matmul(const Desc &e, const Layout &a, const Layout &b, const Layout &d, uint64_t m,
                                uint64_t n, uint64_t k) {
    const int32_t mode = e.scale_mode[0];
    const uint64_t d_bytes = type_bytes(d.type);
    if (b.type != a.type || d_bytes == 1 || e.trans_a != CUBLAS_OP_T || e.trans_b != CUBLAS_OP_N ||
        e.epilogue != CUBLASLT_EPILOGUE_DEFAULT || e.scale_mode[1] != mode ||
        (mode != SCALE_TENSOR && mode != SCALE_ROW))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (k % 16 || a.ld % 16 || b.ld % 16 || m * d_bytes % 16 || d.ld * d_bytes % 16)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

// The scale of row i of an e4m3 operand.
float row_scale(const Desc &e, int operand, uint64_t i) {
    const float *scale = e.scale[operand];
    if (!scale) return 1;
    return scale[e.scale_mode[operand] == SCALE_TENSOR ? 0 : i];
}

// Checks that the matmul's layouts are consistent and supported. Returns its shape in m, n and k.
cublasStatus_t check_matmul(const Desc &e, const Layout &a, const Layout &b, const Layout &c, const Layout &d,
                            uint64_t *m, uint64_t *n, uint64_t *k) {
    *m = d.rows, *n = d.cols, *k = e.trans_a ? a.rows : a.cols;
    if (!same(c, d)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if ((e.trans_a ? a.cols : a.rows) != *m || (e.trans_b ? b.rows : b.cols) != *n ||
        (e.trans_b ? b.cols : b.rows) != *k)
        return CUBLAS_STATUS_INVALID_VALUE;
    for (const Layout *l : {&a, &b, &d}) {
        if (l->ld < (int64_t)l->rows || l->rows == 0 || l->cols == 0) return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (a.type == CUDA_R_8F_E4M3) return check_fp8_matmul(e, a, b, d, *m, *n, *k);
    if (a.type != b.type || (d.type != a.type && d.type != CUDA_R_32F)) return CUBLAS_STATUS_NOT_SUPPORTED;
    return e.scale[0] || e.scale[1] ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
}

template <typename Handle, typename T> cublasStatus_t create(Handle *out, const T &value) {
    *out = (Handle) new T(value);
    return CUBLAS_STATUS_SUCCESS;
}
template <typename T> cublasStatus_t set(T *field, const void *value, size_t bytes) {
    if (bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(field, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

} // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    return create(handle, 0);
}
size_t cublasLtGetVersion(void) {
    return CUBLAS_VERSION;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete (int *)handle;
    return CUBLAS_STATUS_SUCCESS;
}
const char *cublasLtGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS         ? "success"
           : status == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported by the emulator's cuBLASLt"
           : status == CUBLAS_STATUS_INVALID_VALUE ? "an unsupported value or parameter"
                                                   : "unknown error of the emulator's cuBLASLt";
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    return create(desc, Desc{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT});
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete (Desc *)desc;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute, const void *value,
                                              size_t bytes) {
    Desc *e = (Desc *)desc;
    int32_t *trans = attribute == CUBLASLT_MATMUL_DESC_TRANSA   ? &e->trans_a
                     : attribute == CUBLASLT_MATMUL_DESC_TRANSB ? &e->trans_b
                                                                : NULL;
    if (trans) {
        cublasStatus_t status = set(trans, value, bytes);
        if (status == CUBLAS_STATUS_SUCCESS && *trans != CUBLAS_OP_N && *trans != CUBLAS_OP_T)
            return CUBLAS_STATUS_NOT_SUPPORTED;
        return status;
    }
    if (attribute == CUBLASLT_MATMUL_DESC_EPILOGUE) {
        cublasStatus_t status = set(&e->epilogue, value, bytes);
        if (status == CUBLAS_STATUS_SUCCESS && e->epilogue != CUBLASLT_EPILOGUE_DEFAULT &&
            e->epilogue != CUBLASLT_EPILOGUE_BIAS)
            return CUBLAS_STATUS_NOT_SUPPORTED;
        return status;
    }
    switch ((int)attribute) {
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return set(&e->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET:
        return set(&e->sms, value, bytes);
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM:
        return set(&e->fast_accumulation, value, bytes);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
        return set(&e->scale[0], value, bytes);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
        return set(&e->scale[1], value, bytes);
    case 31: // CUBLASLT_MATMUL_DESC_A_SCALE_MODE, from CUDA 12.8 on
        return set(&e->scale_mode[0], value, bytes);
    case 32:
        return set(&e->scale_mode[1], value, bytes);
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
    if (type_bytes(type) == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
    return create(layout, Layout{type, rows, cols, ld});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete (Layout *)layout;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    return create(preference, Preference{0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}});
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete (Preference *)preference;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t bytes) {
    Preference *p = (Preference *)preference;
    switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        return set(&p->workspace, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
        return set(&p->reduction_schemes, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        return set(&p->align[0], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        return set(&p->align[1], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        return set(&p->align[2], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
        return set(&p->align[3], value, bytes);
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t *results, int *found) {
    *found = 0;
    if (requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
    uint64_t m, n, k;
    cublasStatus_t status =
        check_matmul(*(Desc *)desc, *(Layout *)a, *(Layout *)b, *(Layout *)c, *(Layout *)d, &m, &n, &k);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    const Preference *p = (const Preference *)preference;
    memset((void *)results, 0, sizeof *results);
    Algo algo = {{p->align[0], p->align[1], p->align[2] < p->align[3] ? p->align[2] : p->align[3]},
                 (uint32_t)m,
                 (uint32_t)n,
                 (uint32_t)k};
    memcpy((void *)&results->algo, &algo, sizeof algo);
    results->state = CUBLAS_STATUS_SUCCESS;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha_ptr,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta_ptr, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t *algo_ptr, void *workspace, size_t workspace_bytes,
                              cudaStream_t) {
    const Desc &e = *(Desc *)desc;
    const Layout &la = *(Layout *)a_layout, &lb = *(Layout *)b_layout, &ld = *(Layout *)d_layout;
    float alpha = *(const float *)alpha_ptr, beta = *(const float *)beta_ptr;
    uint64_t m, n, k;
    cublasStatus_t status = check_matmul(e, la, lb, *(Layout *)c_layout, ld, &m, &n, &k);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    Algo algo;
    memcpy((void *)&algo, (const void *)algo_ptr, sizeof algo);
    if (algo.m != (uint32_t)m || algo.n != (uint32_t)n || algo.k != (uint32_t)k)
        return CUBLAS_STATUS_INVALID_VALUE; // an algorithm for another matmul
    if ((uintptr_t)a % algo.align[0] || (uintptr_t)b % algo.align[1] || (uintptr_t)c % algo.align[2] ||
        (uintptr_t)d % algo.align[2])
        return CUBLAS_STATUS_INVALID_VALUE;
    bool bias = e.epilogue == CUBLASLT_EPILOGUE_BIAS;
    if (bias && !e.bias) return CUBLAS_STATUS_INVALID_VALUE;
    const bool fp8 = la.type == CUDA_R_8F_E4M3;
    if (workspace) memset(workspace, 0xff, workspace_bytes < 4096 ? workspace_bytes : 4096);

    std::vector<float> op_a(k * m); // [k, m]
#pragma omp parallel for
    for (uint64_t p = 0; p < k; p++) {
        for (uint64_t i = 0; i < m; i++) {
            op_a[p * m + i] = load(a, la.type, e.trans_a ? (int64_t)i * la.ld + p : (int64_t)p * la.ld + i);
        }
    }
#pragma omp parallel for
    for (uint64_t j = 0; j < n; j++) {
        std::vector<float> sum(m, 0.0f);
        for (uint64_t p = 0; p < k; p++) {
            float x = load(b, lb.type, e.trans_b ? (int64_t)p * lb.ld + j : (int64_t)j * lb.ld + p);
            for (uint64_t i = 0; i < m; i++) sum[i] += op_a[p * m + i] * x;
        }
        for (uint64_t i = 0; i < m; i++) {
            int64_t index = (int64_t)j * ld.ld + i;
            float x = alpha * sum[i];
            if (fp8) x = x * row_scale(e, 0, i) * row_scale(e, 1, j);
            if (beta != 0) x += beta * load(c, ld.type, index);
            if (bias) x += load(e.bias, ld.type, (int64_t)i);
            store(d, ld.type, index, x);
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

} // extern "C"
