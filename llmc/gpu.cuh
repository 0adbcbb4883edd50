// gpu.cuh: selects the GPU of a process, checks that the program can run on it, and prints what it is.
#ifndef LLMC_GPU_CUH
#define LLMC_GPU_CUH
#include "cuda_common.cuh"

// Selects the GPU of this process, the local_rank-th of its host, and returns its properties. Exits with an
// error if the program, which has the kernel `kernel`, cannot run on it.
static cudaDeviceProp gpu_init(int local_rank, const void *kernel) {
    int count = 0, driver = 0, runtime = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver) {
        cuda_check(cudaDriverGetVersion(&driver));
        cuda_check(cudaRuntimeGetVersion(&runtime));
        if (driver == 0) die("no NVIDIA driver found; use train_gpt_nsa_cpu to train without a GPU");
        die("the NVIDIA driver supports CUDA %d.%d, this program needs CUDA %d.%d: update the driver, or "
            "build with the older toolkit",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    }
    if (error != cudaSuccess || count == 0)
        die("no NVIDIA GPU found (%s); use train_gpt_nsa_cpu to train without one",
            cudaGetErrorString(error));
    // some launchers make only its own GPU visible to each process
    int device = count > 1 ? local_rank : 0;
    if (device >= count)
        die("process %d of this host: it has %d GPUs; start at most one process per GPU", local_rank + 1,
            count);
    cuda_check(cudaSetDevice(device));
    cudaDeviceProp gpu;
    cuda_check(cudaGetDeviceProperties(&gpu, device));
    if (gpu.major < 8)
        die("%s: compute capability %d.%d: must be at least 8.0 (A100, RTX 30 and later)", gpu.name,
            gpu.major, gpu.minor);
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
        die("%s: this program was not built for compute capability %d.%d; run make on this machine", gpu.name,
            gpu.major, gpu.minor);
    cuda_check(error);
    return gpu;
}

// Prints the GPU, its memory, the number formats, and the peak of 16-bit matmuls to which the MFU refers; 0:
// unknown.
static void gpu_print(const cudaDeviceProp *gpu, int fp8, double peak_tflops) {
    size_t free_bytes, total;
    cuda_check(cudaMemGetInfo(&free_bytes, &total));
    printf("gpu: %s, %d SMs, %zu MiB, %s%s", gpu->name, gpu->multiProcessorCount, total >> 20, FLOATX_NAME,
           fp8 ? ", matmuls of layers in fp8" : "");
    if (peak_tflops > 0) printf(", peak %.0f TFLOP/s in 16 bits", peak_tflops);
    printf("\n");
}
#endif
