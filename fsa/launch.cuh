// launch.cuh: what launchers share: the dispatch by type and head size, shared memory, launches that start early.
#ifndef FSA_LAUNCH_CUH
#define FSA_LAUNCH_CUH
#include "fsa.h"
#include <cuda_runtime.h>

// Runs f with the element type of a dtype and the head size as template arguments.
#define FSA_DISPATCH(dtype, head_dim, f, ...)                                                                \
    ((dtype) == FSA_BF16                                                                                     \
         ? (head_dim) == 64 ? f<__nv_bfloat16, 64>(__VA_ARGS__) : f<__nv_bfloat16, 128>(__VA_ARGS__)         \
     : (head_dim) == 64 ? f<__half, 64>(__VA_ARGS__)                                                         \
                        : f<__half, 128>(__VA_ARGS__))

static inline int launch_status() {
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// More than 48 KiB of shared memory is to be asked for; cheap, so at every launch.
template <typename Kernel> static int allow_smem(Kernel kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess
               ? FSA_OK
               : FSA_ERROR_CUDA;
}

// kernel<<<grid, block, smem, stream>>>(args...). early (Hopper): it may start while the kernel ahead of it
// in the stream still runs, which spares the latency of launches; before it writes anything, or reads what
// that one writes, it calls pdl_wait. Threads without work may end before, as long as others
// of the grid call it always: a grid must not end before the one ahead of it. Errors are for
// cudaGetLastError.
template <typename... Parameters, typename... Args>
static void launch(bool early, void (*kernel)(Parameters...), dim3 grid, unsigned block, int smem,
                   cudaStream_t stream, const Args &...args) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {grid, dim3(block), (size_t)smem, stream, &attribute, early};
    cudaLaunchKernelEx(&config, kernel, args...);
}

// Whether a kernel's code waits: the driver can make code for Hopper of PTX for older GPUs, where the wait is
// nothing.
template <typename Kernel> static bool supports_pdl(Kernel kernel) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, (const void *)kernel) == cudaSuccess &&
           attributes.ptxVersion >= 90;
}
#endif
