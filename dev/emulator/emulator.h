// emulator.h: CUDA on the CPU, so that the kernels' tests run without a GPU. Every thread of a thread block
// is a fiber with its own stack. A fiber runs until it waits for other threads (at a barrier, a shuffle, a
// matrix instruction); then the next fiber runs. Each CPU thread runs one thread block at a time, in the
// order of block indices. The emulator finds wrong indices, wrong arithmetic and deadlocks. It shows nothing
// about speed, and only the races that its order of threads exposes.
//
// emulator.mk includes this header ahead of every translated source (dev/emulator/translate.sh). The headers
// of the CUDA Toolkit provide the types. emulator.cpp implements the runtime functions that the project
// calls.
#ifndef EMULATOR_H
#define EMULATOR_H
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <functional>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <tuple>
#include <type_traits>

#ifndef __CUDACC__
#define __CUDACC__ // sources guard device code with it
#endif
#undef __shared__
#define __shared__ thread_local // a thread block runs on one CPU thread
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __constant__
#define __constant__

namespace emu {
typedef float Float8 __attribute__((vector_size(32))); // for the rows of matmuls

struct Thread;
extern thread_local Thread *self; // the running fiber

struct Indices {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};
const Indices &indices();
int lane();
char *dynamic_smem();

[[noreturn]] void fail(const char *format, ...);
void yield();    // runs the other threads of the thread block
void progress(); // reports progress to the deadlock detection

// A warp-synchronous instruction of the lanes in `mask`. Each lane passes an input; the last lane to arrive
// computes the outputs of all lanes. The buffers alternate between generations, since a lane is at most one
// generation ahead of another.
struct WarpCollective {
    enum { SLOT = 64 };     // bytes of a lane's input or output
    uint32_t mask, arrived; // bit i: lane i
    uint64_t generation;
    const char *name; // of the instruction, for messages
    void (*compute)(uint32_t mask, const void *in, void *out);
    alignas(16) char in[2][32 * SLOT], out[2][32 * SLOT]; // [generation % 2][lane]
};
// Returns the collective of the lanes in mask. Fails if other lanes of the mask wait at a different
// instruction.
WarpCollective *find_collective(const char *name, uint32_t mask,
                                void (*compute)(uint32_t, const void *, void *));
void arrive_and_wait(WarpCollective *c);
// Runs a warp-synchronous instruction. in: the calling lane's input. compute(mask, in[32], out[32]) computes
// the outputs of the lanes in mask. Returns the calling lane's output.
template <typename In, typename Out, void (*compute)(uint32_t mask, const In *in, Out *out)>
Out warp_collective(const char *name, uint32_t mask, const In &in) {
    static_assert(sizeof(In) <= WarpCollective::SLOT && sizeof(Out) <= WarpCollective::SLOT,
                  "a lane's value must fit into its slot");
    WarpCollective *c = find_collective(
        name, mask, [](uint32_t lanes, const void *i, void *o) { compute(lanes, (const In *)i, (Out *)o); });
    uint64_t parity = c->generation & 1;
    ((In *)c->in[parity])[lane()] = in;
    arrive_and_wait(c);
    return ((Out *)c->out[parity])[lane()];
}

// Barrier `id` of the thread block, as bar.sync and bar.arrive: completes when `threads` threads have arrived
// (0: all threads that have not exited). barrier_sync waits for its completion, barrier_arrive does not.
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);

// ---- launches: translate.sh turns kernel<<<grid, block, smem, stream>>>(args) into
// emu::launch(grid, block, smem, stream)(kernel)(args)
struct LaunchConfig {
    dim3 grid, block;
    size_t smem;
};
// Runs `thread` for every thread of the grid. `kernel` identifies the kernel's attributes. Returns the error
// of the launch, which cudaGetLastError returns too.
cudaError_t run_grid(const LaunchConfig &config, const void *kernel, const std::function<void()> &thread);
template <typename... P> struct KernelLaunch {
    LaunchConfig config;
    void (*kernel)(P...);
    template <typename... A> cudaError_t operator()(A &&...args) const {
        std::tuple<P...> params(static_cast<P>(args)...);
        auto f = kernel;
        return run_grid(config, (const void *)kernel, [&params, f] { std::apply(f, params); });
    }
};
struct ConfiguredLaunch {
    LaunchConfig config;
    template <typename... P> KernelLaunch<P...> operator()(void (*kernel)(P...)) const {
        return {config, kernel};
    }
};
inline ConfiguredLaunch launch(dim3 grid, dim3 block, size_t smem = 0, cudaStream_t = nullptr) {
    return {{grid, block, smem}};
}
// Ignores launch attributes: they concern kernels that overlap, and here kernels run one after another.
template <typename... P, typename... A>
cudaError_t launch_with_attributes(const cudaLaunchConfig_t *c, void (*kernel)(P...), A &&...args) {
    return launch(c->gridDim, c->blockDim, c->dynamicSmemBytes)(kernel)(args...);
}
#define cudaLaunchKernelEx emu::launch_with_attributes
cudaError_t set_kernel_attribute(const void *kernel, cudaFuncAttribute attribute, int value);

// Faults for tests, on the calling thread. fail_call lets call n from now fail with `error` (0: the next
// one). Launches, copies, memsets, kernel attributes and tensor maps count. pending_faults returns how many
// faults (0 or 1) still wait for their call, and removes them. fail_device_queries lets cudaGetDevice and
// cudaDeviceGetAttribute fail while it is set.
void fail_call(int64_t n, cudaError_t error);
int pending_faults();
extern thread_local bool fail_device_queries;
// A pointer that belongs to GPU 1, for cudaPointerGetAttributes, and the GPU that cudaStreamGetDevice
// returns.
extern thread_local const void *other_device_memory;
extern thread_local int stream_device;

// ---- shuffles, votes and reductions
struct Shuffle {
    uint64_t bits;
    int src_lane;
};
inline void shuffle_lanes(uint32_t mask, const Shuffle *in, uint64_t *out) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (!(mask >> in[i].src_lane & 1))
            fail("shfl: lane %d reads lane %d, which is not in mask %08x", i, in[i].src_lane, mask);
        out[i] = in[in[i].src_lane].bits;
    }
}
template <typename T> T shuffle(uint32_t mask, T x, int src_lane) {
    static_assert(sizeof(T) <= 8, "a value of one or two registers");
    Shuffle in = {0, src_lane};
    memcpy(&in.bits, &x, sizeof x);
    uint64_t bits = warp_collective<Shuffle, uint64_t, shuffle_lanes>("shfl", mask, in);
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline void ballot_lanes(uint32_t mask, const int *in, uint32_t *out) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= (uint32_t)((mask >> i & 1) && in[i]) << i;
    for (int i = 0; i < 32; i++) out[i] = bits;
}
inline uint32_t ballot(uint32_t mask, int x) {
    return warp_collective<int, uint32_t, ballot_lanes>("vote", mask, x);
}
// op 1: minimum, 2: maximum.
template <typename T, int op> void reduce_lanes(uint32_t mask, const T *in, T *out) {
    bool first = true;
    T x = 0;
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        x = first ? in[i] : op == 1 ? (in[i] < x ? in[i] : x) : (in[i] > x ? in[i] : x);
        first = false;
    }
    for (int i = 0; i < 32; i++) out[i] = x;
}
template <int op, typename T> T reduce(uint32_t mask, T x) {
    return warp_collective<T, T, reduce_lanes<T, op>>("redux", mask, x);
}

} // namespace emu

#define threadIdx (emu::indices().thread)
#define blockIdx (emu::indices().block)
#define blockDim (emu::indices().block_dim)
#define gridDim (emu::indices().grid_dim)

static inline void __syncthreads() {
    emu::barrier_sync(0, 0);
}
static inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    emu::ballot(mask, 0);
}
template <typename T> static inline T __shfl_sync(uint32_t mask, T x, int src_lane, int width = 32) {
    int base = emu::lane() / width * width;
    return emu::shuffle(mask, x, base + src_lane % width);
}
template <typename T> static inline T __shfl_xor_sync(uint32_t mask, T x, int lane_mask, int width = 32) {
    int lane = emu::lane(), src_lane = lane ^ lane_mask;
    return emu::shuffle(mask, x, src_lane / width > lane / width ? lane : src_lane);
}
template <typename T> static inline T __shfl_up_sync(uint32_t mask, T x, unsigned delta, int width = 32) {
    int lane = emu::lane();
    return emu::shuffle(mask, x, lane % width < (int)delta ? lane : lane - (int)delta);
}
static inline uint32_t __ballot_sync(uint32_t mask, int x) {
    return emu::ballot(mask, x);
}
static inline int __any_sync(uint32_t mask, int x) {
    return emu::ballot(mask, x) != 0;
}
template <typename T> static inline T __reduce_min_sync(uint32_t mask, T x) {
    return emu::reduce<1>(mask, x);
}
template <typename T> static inline T __reduce_max_sync(uint32_t mask, T x) {
    return emu::reduce<2>(mask, x);
}

template <typename T, typename U> static inline T atomicAdd(T *address, U x) {
    if constexpr (std::is_integral<T>::value) {
        return __atomic_fetch_add(address, (T)x, __ATOMIC_SEQ_CST);
    } else {
        T old, sum;
        __atomic_load(address, &old, __ATOMIC_SEQ_CST);
        do sum = old + (T)x;
        while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        return old;
    }
}
template <typename T> static inline T atomicMax(T *address, T x) {
    T old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
    while (old < x &&
           !__atomic_compare_exchange_n(address, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}
template <typename T> static inline T atomicMin(T *address, T x) {
    T old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
    while (old > x &&
           !__atomic_compare_exchange_n(address, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}

template <typename T> static inline T __ldca(const T *p) {
    return *p;
}
template <typename T> static inline void __stwb(T *p, T x) {
    *p = x;
}
template <typename T> static inline void __stcs(T *p, T x) {
    *p = x;
}
template <typename A, typename B> static inline typename std::common_type<A, B>::type min(A a, B b) {
    return b < a ? b : a;
}
template <typename A, typename B> static inline typename std::common_type<A, B>::type max(A a, B b) {
    return b > a ? b : a;
}
static inline float __fmul_rn(float a, float b) {
    volatile float product = a * b; // never part of a multiply-add
    return product;
}
#define __expf expf // glibc declares a function with this name
static inline float __fdividef(float a, float b) {
    return a / b;
}
static inline float rsqrtf(float x) {
    return 1 / sqrtf(x);
}
static inline void sincospif(float x, float *s, float *c) {
    *s = (float)sin(M_PI * (double)x), *c = (float)cos(M_PI * (double)x);
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((uint64_t)a * b >> 32);
}
static inline unsigned __vmaxu2(unsigned a, unsigned b) {
    const unsigned high = max(a >> 16, b >> 16), low = max(a & 0xffff, b & 0xffff);
    return high << 16 | low;
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}
template <typename To, typename From> static inline To bit_cast_to(From x) {
    static_assert(sizeof(To) == sizeof(From), "types of the same size");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline unsigned __float_as_uint(float x) {
    return bit_cast_to<unsigned>(x);
}
static inline int __float_as_int(float x) {
    return bit_cast_to<int>(x);
}
static inline float __uint_as_float(unsigned x) {
    return bit_cast_to<float>(x);
}
static inline double __hiloint2double(int high, int low) {
    return bit_cast_to<double>((uint64_t)(uint32_t)high << 32 | (uint32_t)low);
}
static inline int __double2hiint(double x) {
    return (int)(bit_cast_to<uint64_t>(x) >> 32);
}
static inline int __double2loint(double x) {
    return (int)bit_cast_to<uint64_t>(x);
}

template <typename... P>
static inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return emu::set_kernel_attribute((const void *)kernel, attribute, value);
}
#endif
