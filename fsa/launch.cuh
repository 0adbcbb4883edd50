// launch.cuh: helpers of launchers: dispatch by type and head size, shared memory, dependent launch (PDL).
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

// Returns FSA_OK, or FSA_ERROR_CUDA after a CUDA error, which it clears.
static inline int launch_status() {
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Allows `bytes` of dynamic shared memory, which CUDA requires above 48 KiB. Returns an FsaStatus. It is
// cheap, so launchers call it before every launch.
template <typename Kernel> static int allow_smem(Kernel kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess
               ? FSA_OK
               : FSA_ERROR_CUDA;
}

// kernel<<<grid, block, smem, stream>>>(args...). Errors are left for launch_status.
//
// pdl: programmatic dependent launch (Hopper). The kernel may start while the previous kernel in the stream
// still runs, which hides the launch latency. It calls pdl_wait before it writes memory or reads what the
// previous kernel writes. Threads without work may exit before pdl_wait, but some thread of the grid must
// call it: a grid must not end before the previous one.
template <typename... Parameters, typename... Args>
static void launch(bool pdl, void (*kernel)(Parameters...), dim3 grid, unsigned block, int smem,
                   cudaStream_t stream, const Args &...args) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {grid, dim3(block), (size_t)smem, stream, &attribute, pdl};
    cudaLaunchKernelEx(&config, kernel, args...);
}

// Returns whether the loaded code of a kernel contains pdl_wait. The driver can compile PTX of older
// architectures for Hopper, where pdl_wait is empty.
template <typename Kernel> static bool supports_pdl(Kernel kernel) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, (const void *)kernel) == cudaSuccess &&
           attributes.ptxVersion >= 90;
}
#endif
