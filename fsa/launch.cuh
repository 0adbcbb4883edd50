// launch.cuh: helpers of launchers: dispatch by type and head size, launches and checked CUDA calls.
#ifndef FSA_LAUNCH_CUH
#define FSA_LAUNCH_CUH
#include "fsa.h"
#include <cuda_runtime.h>

// Calls f<element type of dtype, head_dim>(...).
#define FSA_DISPATCH(dtype, head_dim, f, ...)                                                                \
    ((dtype) == FSA_BF16                                                                                     \
         ? (head_dim) == 64 ? f<__nv_bfloat16, 64>(__VA_ARGS__) : f<__nv_bfloat16, 128>(__VA_ARGS__)         \
     : (head_dim) == 64 ? f<__half, 64>(__VA_ARGS__)                                                         \
                        : f<__half, 128>(__VA_ARGS__))

// Records a CUDA error of the calling thread for fsa_cuda_error (kernels.h): "name: CUDA's text". name: the
// kernel or the call as the source spells it; only its identifier is kept. Resets the error in the CUDA
// runtime. Returns FSA_ERROR_CUDA.
int fsa_record_cuda_error(const char *name, cudaError_t error);

// Returns the status of `call` unless it is FSA_OK.
#define TRY(call)                                                                                            \
    do {                                                                                                     \
        int status_ = (call);                                                                                \
        if (status_) return status_;                                                                         \
    } while (0)
// Calls a function of the CUDA runtime; records its error and returns FSA_ERROR_CUDA if it fails.
#define CUDA_TRY(call)                                                                                       \
    do {                                                                                                     \
        cudaError_t error_ = (call);                                                                         \
        if (error_ != cudaSuccess) return fsa_record_cuda_error(#call, error_);                              \
    } while (0)

// Launches a kernel, whose name stands in parentheses if it contains a comma, and returns an FsaStatus. After
// an error fsa_cuda_error names the kernel.
//     LAUNCH((kernel<T, D>), grid, block, smem, stream, args...)
// smem: bytes of dynamic shared memory, which may exceed 48 KiB. A kernel that is launched with different
// sizes needs SharedMemory(bytes, limit) with the largest one: the limit belongs to the kernel, and another
// thread's smaller one must not come between setting it and the launch.
#define LAUNCH(kernel, ...) launch_kernel(#kernel, false, kernel, __VA_ARGS__)
// The same as a programmatic dependent launch if pdl is true (Hopper). The kernel may start while the
// previous kernel in the stream still runs, which hides the launch latency. It calls pdl_wait before it
// writes memory or reads what the previous kernel writes. Threads without work may exit before pdl_wait, but
// some thread of the grid must call it: a grid must not end before the previous one.
#define LAUNCH_PDL(pdl, kernel, ...) launch_kernel(#kernel, pdl, kernel, __VA_ARGS__)

struct SharedMemory {
    size_t bytes, limit;
    SharedMemory(size_t bytes, size_t limit) : bytes(bytes), limit(limit) {}
    SharedMemory(size_t bytes) : bytes(bytes), limit(bytes) {}
};

template <typename... Parameters, typename... Args>
static int launch_kernel(const char *name, bool pdl, void (*kernel)(Parameters...), dim3 grid, unsigned block,
                         SharedMemory smem, cudaStream_t stream, const Args &...args) {
    cudaError_t error = cudaSuccess;
    // CUDA requires this attribute for more than 48 KiB. It is cheap, so it is set before every launch.
    if (smem.limit > 0)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem.limit);
    if (error == cudaSuccess) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {grid, dim3(block), smem.bytes, stream, &attribute, pdl};
        error = cudaLaunchKernelEx(&config, kernel, args...);
    }
    return error == cudaSuccess ? FSA_OK : fsa_record_cuda_error(name, error);
}

// Sets *pdl to whether the loaded code of a kernel contains pdl_wait. The driver can compile PTX of older
// architectures for Hopper, where pdl_wait is empty. Returns an FsaStatus.
#define SUPPORTS_PDL(kernel, pdl) supports_pdl(#kernel, kernel, pdl)
template <typename Kernel> static int supports_pdl(const char *name, Kernel kernel, bool *pdl) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, (const void *)kernel);
    if (error != cudaSuccess) return fsa_record_cuda_error(name, error);
    *pdl = attributes.ptxVersion >= 90;
    return FSA_OK;
}

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
#endif
