// sm90/tma.cuh: tensor maps for TMA, made on the host and passed to kernels by value.
#ifndef FSA_SM90_TMA_CUH
#define FSA_SM90_TMA_CUH
#include "../launch.cuh"
#include <cuda.h>
#include <cuda_runtime.h>

// Makes the tensor map of a 16-bit tensor with `rank` (at most 4) dimensions, innermost first: dimension i
// has size[i] elements, stride[i] bytes apart (stride[0] is not read). A copy takes a box of box[i] elements;
// box[0] is 64. Boxes have the 128-byte swizzle that ptx.cuh describes. Returns an FsaStatus.
static inline int make_tensor_map(CUtensorMap *map, FsaDtype dtype, int rank, const void *base,
                                  const int64_t *size, const int64_t *stride, const int *box) {
    typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                               const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                               CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                               CUtensorMapFloatOOBfill);
    // Looked up once at run time, since the library does not link the driver.
    static const Encode encode = [] {
        void *f = NULL;
        cudaDriverEntryPointQueryResult found;
        bool ok = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                                   &found) == cudaSuccess &&
                  found == cudaDriverEntryPointSuccess;
        return ok ? (Encode)f : (Encode)NULL;
    }();
    if (!encode) return fsa_record_cuda_error("cuTensorMapEncodeTiled", cudaErrorSymbolNotFound);
    cuuint64_t sizes[4], strides[3];
    cuuint32_t boxes[4], ones[4] = {1, 1, 1, 1};
    for (int i = 0; i < rank; i++) {
        sizes[i] = (cuuint64_t)(size[i] > 0 ? size[i] : 1), boxes[i] = (cuuint32_t)box[i];
        if (i > 0) strides[i - 1] = (cuuint64_t)stride[i];
    }
    CUresult result = encode(
        map, dtype == FSA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        (cuuint32_t)rank, (void *)base, sizes, strides, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return FSA_OK;
    return fsa_record_cuda_error("cuTensorMapEncodeTiled", (cudaError_t)result); // the codes are the same
}
#endif
