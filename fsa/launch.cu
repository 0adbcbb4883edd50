// launch.cu: the CUDA errors that launchers report, and the properties of the current device.
#include "launch.cuh"
#include "kernels.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static thread_local char cuda_error[200];

const char *fsa_cuda_error() {
    return cuda_error;
}

// Returns whether CUDA reports the error only after a kernel has started. The call that returns such an error
// is not its cause.
static bool is_asynchronous(cudaError_t error) {
    switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
        return true;
    default:
        return false;
    }
}

int fsa_record_cuda_error(const char *name, cudaError_t error) {
    name += strspn(name, "(");
    snprintf(cuda_error, sizeof cuda_error, "%.*s: %s%s", (int)strcspn(name, "<(,)"), name,
             is_asynchronous(error) ? "an earlier kernel failed: " : "", cudaGetErrorString(error));
    cudaGetLastError();
    return FSA_ERROR_CUDA;
}

struct DeviceProperties {
    int num_sms, major, minor;
};
static int query_device(DeviceProperties *p) {
    int device;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&p->num_sms, cudaDevAttrMultiProcessorCount, device));
    CUDA_TRY(cudaDeviceGetAttribute(&p->major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_TRY(cudaDeviceGetAttribute(&p->minor, cudaDevAttrComputeCapabilityMinor, device));
    return FSA_OK;
}

int fsa_check_device() {
    DeviceProperties p;
    return query_device(&p);
}

int fsa_num_sms() {
    DeviceProperties p;
    return query_device(&p) ? 1 : p.num_sms;
}

// The environment is read once.
static const char *kernels_variable() {
    static const char *const kernels = getenv("FSA_KERNELS");
    return kernels ? kernels : "";
}

const char *fsa_unknown_kernels() {
    const char *kernels = kernels_variable();
    return strcmp(kernels, "portable") == 0 || strcmp(kernels, "sm90") == 0 || !kernels[0] ? NULL : kernels;
}

bool fsa_use_sm90() {
    if (strcmp(kernels_variable(), "portable") == 0) return false;
    DeviceProperties p;
    return query_device(&p) == FSA_OK && p.major == 9 && p.minor == 0;
}
