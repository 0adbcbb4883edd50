// emulator.h: CUDA on the CPU, so that the kernels' tests run where there is no GPU. Every thread of a block
// is a fiber with its own stack; a fiber runs until it waits for others (a barrier, a shuffle, a matrix
// instruction), then the next one goes on. Blocks run one after another on each CPU thread, in the order of
// their numbers. It shows wrong indices, missing barriers' deadlocks and wrong arithmetic; it says nothing of
// speed, and of races only those that its order of threads brings out.
//
// Included ahead of every translated source (dev/emulator/translate.sh). The CUDA toolkit's headers give the
// types; emulator.cpp has the runtime calls that the project makes.
#ifndef EMULATOR_H
#define EMULATOR_H
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <functional>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <tuple>
#include <type_traits>

#ifndef __CUDACC__
#define __CUDACC__ // sources keep device code behind it
#endif
#undef __shared__
#define __shared__ thread_local // a block runs on one CPU thread
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __constant__
#define __constant__

namespace emu {

struct Thread;
extern thread_local Thread *self; // the fiber that runs

struct Indices {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};
const Indices &indices();
int lane();
char *dynamic_smem();

[[noreturn]] void fail(const char *format, ...);
void yield();    // lets the other threads of the block run
void progress(); // tells the search for deadlocks that something happened

// Lanes that meet under one mask. Each hands in a value; the last one computes everybody's result. Slots
// alternate between generations: a lane is at most one ahead of another.
struct Meeting {
    enum { SLOT = 64 };
    uint32_t mask, arrived;
    uint64_t generation;
    const char *what;
    void (*finish)(uint32_t, const void *, void *);
    alignas(16) char in[2][32 * SLOT], out[2][32 * SLOT];
};
Meeting *join(const char *what, uint32_t mask, void (*finish)(uint32_t, const void *, void *));
void await(Meeting *m); // counts the lane in, and waits for the others
template <typename In, typename Out, void (*finish)(uint32_t mask, const In *in, Out *out)>
Out warp_join(const char *what, uint32_t mask, const In &in) {
    static_assert(sizeof(In) <= Meeting::SLOT && sizeof(Out) <= Meeting::SLOT, "room in a lane's slot");
    Meeting *m = join(what, mask,
                      [](uint32_t lanes, const void *i, void *o) { finish(lanes, (const In *)i, (Out *)o); });
    uint64_t parity = m->generation & 1;
    ((In *)m->in[parity])[lane()] = in;
    await(m);
    return ((Out *)m->out[parity])[lane()];
}

// Barrier `id` of the block: waits until `threads` threads have come (0: all that are left); or only counts.
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);

// ---- launches: kernel<<<grid, block, smem, stream>>>(args) is translated to
// emu::launch(grid, block, smem, stream)(kernel)(args)
struct Config {
    dim3 grid, block;
    size_t smem;
};
void run(const Config &config, const void *kernel, const std::function<void()> &thread);
template <typename... P> struct Launcher {
    Config config;
    void (*kernel)(P...);
    template <typename... A> void operator()(A &&...args) const {
        std::tuple<P...> params(static_cast<P>(args)...);
        auto f = kernel;
        run(config, (const void *)kernel, [&params, f] { std::apply(f, params); });
    }
};
struct Pending {
    Config config;
    template <typename... P> Launcher<P...> operator()(void (*kernel)(P...)) const {
        return {config, kernel};
    }
};
inline Pending launch(dim3 grid, dim3 block, size_t smem = 0, cudaStream_t = nullptr) {
    return {{grid, block, smem}};
}
// Attributes are about what runs at the same time; here a kernel ends before the next begins.
template <typename... P, typename... A>
cudaError_t launch_with_attributes(const cudaLaunchConfig_t *c, void (*kernel)(P...), A &&...args) {
    launch(c->gridDim, c->blockDim, c->dynamicSmemBytes)(kernel)(args...);
    return cudaSuccess;
}
#define cudaLaunchKernelEx emu::launch_with_attributes
cudaError_t set_max_smem(const void *kernel, cudaFuncAttribute attribute, int value);

// ---- shuffles, votes and reductions
struct Shuffle {
    uint64_t bits;
    int from;
};
inline void shuffle_finish(uint32_t mask, const Shuffle *in, uint64_t *out) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (!(mask >> in[i].from & 1))
            fail("lane %d shuffles from lane %d, which is not there", i, in[i].from);
        out[i] = in[in[i].from].bits;
    }
}
template <typename T> T shuffle(uint32_t mask, T x, int from) {
    static_assert(sizeof(T) <= 8, "a register or two");
    Shuffle in = {0, from};
    memcpy(&in.bits, &x, sizeof x);
    uint64_t bits = warp_join<Shuffle, uint64_t, shuffle_finish>("shfl", mask, in);
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline void ballot_finish(uint32_t mask, const int *in, uint32_t *out) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= (uint32_t)((mask >> i & 1) && in[i]) << i;
    for (int i = 0; i < 32; i++) out[i] = bits;
}
inline uint32_t ballot(uint32_t mask, int x) {
    return warp_join<int, uint32_t, ballot_finish>("vote", mask, x);
}
template <typename T, int op> void reduce_finish(uint32_t mask, const T *in, T *out) {
    bool first = true;
    T x = 0;
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        x = first ? in[i] : op == 0 ? x + in[i] : op == 1 ? (in[i] < x ? in[i] : x) : (in[i] > x ? in[i] : x);
        first = false;
    }
    for (int i = 0; i < 32; i++) out[i] = x;
}
template <int op, typename T> T reduce(uint32_t mask, T x) {
    return warp_join<T, T, reduce_finish<T, op>>("redux", mask, x);
}

} // namespace emu

#define threadIdx (emu::indices().thread)
#define blockIdx (emu::indices().block)
#define blockDim (emu::indices().block_dim)
#define gridDim (emu::indices().grid_dim)
#define warpSize 32

static inline void __syncthreads() {
    emu::barrier_sync(0, 0);
}
static inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    emu::ballot(mask, 0);
}
template <typename T> static inline T __shfl_sync(uint32_t mask, T x, int from, int width = 32) {
    int base = emu::lane() / width * width;
    return emu::shuffle(mask, x, base + from % width);
}
template <typename T> static inline T __shfl_xor_sync(uint32_t mask, T x, int with, int width = 32) {
    int lane = emu::lane(), from = lane ^ with;
    return emu::shuffle(mask, x, from / width > lane / width ? lane : from);
}
template <typename T> static inline T __shfl_up_sync(uint32_t mask, T x, unsigned by, int width = 32) {
    int lane = emu::lane();
    return emu::shuffle(mask, x, lane % width < (int)by ? lane : lane - (int)by);
}
template <typename T> static inline T __shfl_down_sync(uint32_t mask, T x, unsigned by, int width = 32) {
    int lane = emu::lane();
    return emu::shuffle(mask, x, lane % width + (int)by >= width ? lane : lane + (int)by);
}
static inline uint32_t __ballot_sync(uint32_t mask, int x) {
    return emu::ballot(mask, x);
}
static inline int __any_sync(uint32_t mask, int x) {
    return emu::ballot(mask, x) != 0;
}
static inline int __all_sync(uint32_t mask, int x) {
    return emu::ballot(mask, !x) == 0;
}
template <typename T> static inline uint32_t __match_any_sync(uint32_t mask, T x) {
    uint32_t same = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) same |= (uint32_t)(emu::shuffle(mask, x, i) == x) << i;
    return same;
}
template <typename T> static inline T __reduce_add_sync(uint32_t mask, T x) {
    return emu::reduce<0>(mask, x);
}
template <typename T> static inline T __reduce_min_sync(uint32_t mask, T x) {
    return emu::reduce<1>(mask, x);
}
template <typename T> static inline T __reduce_max_sync(uint32_t mask, T x) {
    return emu::reduce<2>(mask, x);
}

template <typename T, typename U> static inline T atomicAdd(T *to, U x) {
    if constexpr (std::is_integral<T>::value) {
        return __atomic_fetch_add(to, (T)x, __ATOMIC_SEQ_CST);
    } else {
        T old, sum;
        __atomic_load(to, &old, __ATOMIC_SEQ_CST);
        do sum = old + (T)x;
        while (!__atomic_compare_exchange(to, &old, &sum, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        return old;
    }
}
template <typename T> static inline T atomicExch(T *to, T x) {
    return __atomic_exchange_n(to, x, __ATOMIC_SEQ_CST);
}
template <typename T> static inline T atomicMax(T *to, T x) {
    T old = __atomic_load_n(to, __ATOMIC_SEQ_CST);
    while (old < x && !__atomic_compare_exchange_n(to, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}
template <typename T> static inline T atomicOr(T *to, T x) {
    return __atomic_fetch_or(to, x, __ATOMIC_SEQ_CST);
}
static inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static inline void __threadfence_block() {}

template <typename T> static inline T __ldg(const T *p) {
    return *p;
}
template <typename T> static inline T __ldca(const T *p) {
    return *p;
}
template <typename T> static inline T __ldcs(const T *p) {
    return *p;
}
template <typename T> static inline T __ldcg(const T *p) {
    return *p;
}
template <typename T> static inline void __stwb(T *p, T x) {
    *p = x;
}
template <typename T> static inline void __stcs(T *p, T x) {
    *p = x;
}
template <typename T> static inline void __stcg(T *p, T x) {
    *p = x;
}
template <typename A, typename B> static inline typename std::common_type<A, B>::type min(A a, B b) {
    return b < a ? b : a;
}
template <typename A, typename B> static inline typename std::common_type<A, B>::type max(A a, B b) {
    return b > a ? b : a;
}
#define __expf expf // glibc declares functions of these names
#define __logf logf
static inline float __fdividef(float a, float b) {
    return a / b;
}
static inline float __frcp_rn(float x) {
    return 1 / x;
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
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
static inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}
template <typename To, typename From> static inline To emu_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same size");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline unsigned __float_as_uint(float x) {
    return emu_bits<unsigned>(x);
}
static inline int __float_as_int(float x) {
    return emu_bits<int>(x);
}
static inline float __uint_as_float(unsigned x) {
    return emu_bits<float>(x);
}
static inline float __int_as_float(int x) {
    return emu_bits<float>(x);
}
static inline double __hiloint2double(int high, int low) {
    return emu_bits<double>((uint64_t)(uint32_t)high << 32 | (uint32_t)low);
}
static inline int __double2hiint(double x) {
    return (int)(emu_bits<uint64_t>(x) >> 32);
}
static inline int __double2loint(double x) {
    return (int)emu_bits<uint64_t>(x);
}

template <typename... P>
static inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return emu::set_max_smem((const void *)kernel, attribute, value);
}
#endif
