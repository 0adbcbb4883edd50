// emulator.cpp: fibers, their scheduler, and the CUDA runtime calls that the project makes. See emulator.h.
#include "emulator.h"
#include "sm90/ptx.cuh"
#include <deque>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <map>
#include <mutex>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emu {

// Stacks are a few cache lines more than a power of two apart, lest all of them meet in the same cache sets.
enum {
    MAX_THREADS = 1024,
    MAX_SMEM = 232448,
    MULTIPROCESSORS = 132, // an H200's, so that work is cut as it is there
    DEFAULT_SMEM = 49152,
    STACK = (256 << 10) + 832,
    BARRIERS = 16
};

// ---- switching stacks -------------------------------------------------------------------------------
#if defined(__x86_64__)
// Pushes what a function must preserve, keeps the stack pointer in *from, and goes on where `to` was kept.
extern "C" void emu_switch(void **from, void *to);
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static void *new_stack(char *stack, void (*entry)()) {
    void **top = (void **)(stack + STACK) - 3; // a called function finds its stack 8 bytes off 16
    *--top = (void *)entry;                    // ret pops it: the stack is then as after a call
    return top - 6;
}
#elif defined(__aarch64__)
extern "C" void emu_switch(void **from, void *to);
asm(R"(
.text
.globl emu_switch
.type emu_switch, %function
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
static void *new_stack(char *stack, void (*entry)()) {
    void **top = (void **)(stack + STACK) - 20;
    top[11] = (void *)entry; // x30
    return top;
}
#else
#error "the emulator switches stacks on x86-64 and aarch64"
#endif

// ---- blocks, warps, threads ---------------------------------------------------------------------------
struct Warp {
    uint32_t exited;
    Meeting meetings[32]; // by the lowest lane of the mask
};
struct Barrier {
    int arrived, threads;
    uint64_t generation;
};
// A bulk copy out of shared memory; data: what it read, once it has.
struct BulkStore {
    char *to;
    uint32_t from;
    int bytes;
    bool add;
    std::vector<char> data;
};
struct Thread {
    Indices at;
    int lane;
    Warp *warp;
    void *sp;
    bool done;
    Thread *next; // of the block's threads that are not done; NULL: the scheduler
    const char *waits_for;
    AsyncCopies copies;
    int64_t wgmma_issued;               // operations of its warpgroup that it took part in
    std::vector<int64_t> wgmma_commits; // how many of them each batch ended with
    std::vector<BulkStore> bulk_stores; // under way
};
// An operation of a warpgroup, and how many of its threads have handed in their parts.
struct WgmmaOp {
    WgmmaShape shape;
    int parts;
    bool now, done;
    WgmmaPart part[128];
};
struct Warpgroup {
    int64_t first; // number of ops[0]
    std::deque<WgmmaOp> ops;
};
// A copy into shared memory under way.
struct BulkCopy {
    uint32_t to, barrier;
    TensorMap map; // not valid: plain
    const void *from;
    int64_t at[4];
    int bytes;
};
// What one CPU thread needs to run a block.
struct Worker {
    void *sp; // the scheduler's
    char *stacks;
    Thread threads[MAX_THREADS];
    Warp warps[MAX_THREADS / 32];
    Barrier barriers[BARRIERS];
    Warpgroup warpgroups[MAX_THREADS / 128];
    std::vector<BulkCopy> bulk_copies;
    uint64_t coin;
    int count, left;
    uint64_t events;
    const std::function<void()> *body;
    alignas(1024) char smem[MAX_SMEM];
};

thread_local Thread *self;
static thread_local Worker *worker;

static Worker *this_worker() {
    static std::mutex lock;
    static auto *all = new std::vector<Worker *>; // for the leak checker, also of host threads that are gone
    if (!worker) {
        worker = (Worker *)aligned_alloc(1024, (sizeof(Worker) + 1023) / 1024 * 1024);
        {
            std::lock_guard<std::mutex> guard(lock);
            all->push_back(worker);
        }
        memset((void *)worker, 0, sizeof *worker);
        for (Thread &t : worker->threads)
            new (&t.copies) AsyncCopies(), new (&t.wgmma_commits) std::vector<int64_t>(),
                new (&t.bulk_stores) std::vector<BulkStore>();
        for (Warpgroup &g : worker->warpgroups) new (&g.ops) std::deque<WgmmaOp>();
        new (&worker->bulk_copies) std::vector<BulkCopy>();
        worker->stacks = (char *)mmap(NULL, (size_t)MAX_THREADS * STACK, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (worker->stacks == MAP_FAILED) fail("no memory for stacks");
    }
    return worker;
}

const Indices &indices() {
    return self->at;
}
int lane() {
    return self->lane;
}
char *dynamic_smem() {
    return worker->smem;
}
AsyncCopies &async_copies() {
    return self->copies;
}

void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "emulator: ");
    vfprintf(stderr, format, args);
    va_end(args);
    if (self)
        fprintf(stderr, " (block %u %u %u, thread %u %u %u)", self->at.block.x, self->at.block.y,
                self->at.block.z, self->at.thread.x, self->at.thread.y, self->at.thread.z);
    fprintf(stderr, "\n");
    abort();
}

void progress() {
    worker->events++;
}
void yield() {
    Thread *from = self;
    while (from->next && from->next->done) from->next = from->next->next;
    self = from->next;
    emu_switch(&from->sp, self ? self->sp : worker->sp);
}

static void thread_main() {
    (*worker->body)();
    if (self->copies.list.size() || self->bulk_stores.size()) fail("ends with asynchronous copies under way");
    self->done = true;
    self->warp->exited |= 1u << self->lane;
    worker->left--;
    progress();
    yield();
    __builtin_unreachable();
}

static bool complete(Meeting *m, const Warp *w) {
    uint32_t here = m->mask & ~w->exited;
    if (!m->arrived || (m->arrived & here) != here) return false;
    m->finish(m->arrived, m->in[m->generation & 1], m->out[m->generation & 1]);
    m->arrived = 0;
    m->generation++;
    progress();
    return true;
}

Meeting *join(const char *what, uint32_t mask, void (*finish)(uint32_t, const void *, void *)) {
    Thread *t = self;
    if (!(mask >> t->lane & 1)) fail("%s: lane %d is not in its own mask %08x", what, t->lane, mask);
    Meeting *m = &t->warp->meetings[__builtin_ctz(mask)];
    if (!m->arrived) {
        m->mask = mask, m->what = what, m->finish = finish;
    } else if (m->mask != mask || m->finish != finish) {
        fail("lanes of a warp disagree: %s with mask %08x meets %s with %08x", what, mask, m->what, m->mask);
    }
    return m;
}
void await(Meeting *m) {
    uint64_t generation = m->generation;
    m->arrived |= 1u << self->lane;
    progress();
    self->waits_for = m->what;
    while (m->generation == generation && !complete(m, self->warp)) yield();
}

static bool complete(Barrier *b) {
    int threads = b->threads ? b->threads : worker->left;
    if (b->arrived < threads) return false;
    if (b->arrived > threads) fail("a barrier of %d threads met %d", threads, b->arrived);
    b->arrived = 0;
    b->generation++;
    progress();
    return true;
}
static Barrier *arrive(int id, int threads) {
    if (id < 0 || id >= BARRIERS) fail("barrier %d of %d", id, BARRIERS);
    Barrier *b = &worker->barriers[id];
    if (b->arrived && b->threads != threads)
        fail("barrier %d: %d threads were expected, now %d", id, b->threads, threads);
    b->threads = threads;
    b->arrived++;
    progress();
    return b;
}
void barrier_sync(int id, int threads) {
    Barrier *b = arrive(id, threads);
    uint64_t generation = b->generation;
    self->waits_for = "a barrier";
    while (b->generation == generation && !complete(b)) yield();
}
void barrier_arrive(int id, int threads) {
    complete(arrive(id, threads));
}

static void run_block(const Config &c, uint3 block, const std::function<void()> &body) {
    Worker *w = this_worker();
    w->count = w->left = (int)(c.block.x * c.block.y * c.block.z);
    w->body = &body;
    memset((void *)w->warps, 0, sizeof(Warp) * ((size_t)(w->count + 31) / 32));
    memset(w->barriers, 0, sizeof w->barriers);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(w->smem, MAX_SMEM);
    __asan_poison_memory_region(w->smem + c.smem, MAX_SMEM - c.smem);
#endif
    memset(w->smem, 0xff, c.smem);
    for (int i = 0; i < w->count; i++) {
        Thread *t = &w->threads[i];
        unsigned x = (unsigned)i % c.block.x, y = (unsigned)i / c.block.x;
        t->at = {{x, y % c.block.y, y / c.block.y}, block, c.block, c.grid};
        t->lane = i % 32;
        t->warp = &w->warps[i / 32];
        t->done = false;
        t->next = i + 1 < w->count ? t + 1 : NULL;
        t->copies.list.clear();
        t->copies.group = 0;
        t->wgmma_issued = 0;
        t->wgmma_commits.clear();
        t->sp = new_stack(w->stacks + (size_t)i * STACK, thread_main);
    }
    for (Warpgroup &g : w->warpgroups) g.first = 0, g.ops.clear();
    w->bulk_copies.clear();
    for (int i = w->count; i % 32; i++) w->warps[i / 32].exited |= 1u << i % 32;
    Thread *first = &w->threads[0];
    while (w->left) {
        uint64_t before = w->events;
        while (first->done) first = first->next;
        self = first;
        emu_switch(&w->sp, self->sp);
        if (w->events == before) {
            for (int i = 0; i < w->count; i++) {
                self = &w->threads[i];
                if (!self->done)
                    fail("deadlock: %d threads wait, one of them for %s", w->left, self->waits_for);
            }
        }
    }
    for (Warpgroup &g : w->warpgroups) {
        for (WgmmaOp &op : g.ops) {
            if (!op.done) fail("a block ends with wgmma under way");
        }
    }
    if (w->bulk_copies.size()) fail("a block ends with bulk copies under way");
    self = NULL;
}

// ---- wgmma ------------------------------------------------------------------------------------------
bool toss() {
    return (worker->coin = worker->coin * 6364136223846793005ull + 1442695040888963407ull) >> 63;
}

// Element (row, column) of a K-major matrix in panels of 64 columns, or of a transposed one; `at` is the
// matrix's start, which lies within a panel's first row where 16 columns steps were added to it.
static const uint16_t *element(uint32_t at, int64_t offset) {
    uint32_t address = at + (uint32_t)offset;
    address ^= (address >> 7 & 7) << 4;
    if (address >= MAX_SMEM) fail("wgmma reads shared memory at %u", address);
    return (const uint16_t *)from_shared(address);
}

static void wgmma_run(const WgmmaOp &op) {
    const WgmmaShape &s = op.shape;
    static thread_local float a[64][16], b[16][128], c[64][128];
    auto number = [&](uint16_t bits) {
        return s.is_half ? half_to_float<__half>(bits) : half_to_float<__nv_bfloat16>(bits);
    };
    for (uint64_t d : {s.a, s.b}) {
        if (s.a_in_registers && d == s.a) continue;
        if (d >> 62 != 1 || (d >> 32 & 0x3fff) != 64)
            fail("wgmma: a matrix descriptor %llx", (unsigned long long)d);
    }
    uint32_t at_a = (uint32_t)(s.a & 0x3fff) << 4, at_b = (uint32_t)(s.b & 0x3fff) << 4;
    int64_t panel = (int64_t)(s.b >> 16 & 0x3fff) << 4;
    for (int row = 0; row < 64; row++) {
        for (int k = 0; k < 16; k++) {
            if (s.a_in_registers) {
                const WgmmaPart &p = op.part[row / 16 * 32 + row % 8 * 4 + k % 8 / 2];
                a[row][k] = number((uint16_t)(p.a[k / 8 * 2 + row % 16 / 8] >> k % 2 * 16));
            } else {
                a[row][k] = number(*element(at_a, s.trans_a ? k * 128 + row * 2 : row * 128 + k * 2));
            }
        }
    }
    for (int k = 0; k < 16; k++) {
        for (int n = 0; n < s.n; n++) {
            b[k][n] = number(s.trans_b ? *element(at_b, n / 64 * panel + k * 128 + n % 64 * 2)
                                       : *element(at_b, n * 128 + k * 2));
        }
    }
    for (int row = 0; row < 64; row++) {
        for (int n = 0; n < s.n; n++) c[row][n] = 0;
        for (int k = 0; k < 16; k++) {
            for (int n = 0; n < s.n; n++) c[row][n] += a[row][k] * b[k][n];
        }
    }
    for (int t = 0; t < 128; t++) {
        for (int j = 0; j < s.n / 8; j++) {
            for (int i = 0; i < 4; i++) {
                float x = c[t / 32 * 16 + t % 32 / 4 + i / 2 * 8][j * 8 + t % 4 * 2 + i % 2];
                float *d = op.part[t].d + j * 4 + i;
                *d = s.add ? *d + x : x;
            }
        }
    }
}

static Warpgroup *warpgroup() {
    return &worker->warpgroups[(self - worker->threads) / 128];
}

void wgmma_issue(const WgmmaShape &shape, const WgmmaPart &part) {
    Warpgroup *g = warpgroup();
    int64_t number = self->wgmma_issued++;
    if (number == g->first + (int64_t)g->ops.size()) g->ops.push_back({shape, 0, toss(), false, {}});
    WgmmaOp &op = g->ops[(size_t)(number - g->first)];
    if (op.shape.n != shape.n || op.shape.b != shape.b || op.shape.a != shape.a ||
        op.shape.add != shape.add || op.shape.trans_a != shape.trans_a || op.shape.trans_b != shape.trans_b ||
        op.shape.a_in_registers != shape.a_in_registers)
        fail("wgmma: the threads of a warpgroup disagree");
    op.part[(self - worker->threads) % 128] = part;
    op.parts++;
    progress();
    // In order: an operation adds to what the one before it left.
    for (WgmmaOp &o : g->ops) {
        if (o.parts < 128 || (!o.done && !o.now)) break;
        if (!o.done) wgmma_run(o), o.done = true;
    }
}
void wgmma_group() {
    self->wgmma_commits.push_back(self->wgmma_issued);
}
void wgmma_finish(int left) {
    Warpgroup *g = warpgroup();
    int64_t groups = (int64_t)self->wgmma_commits.size() - left;
    int64_t until = groups > 0 ? self->wgmma_commits[(size_t)groups - 1] : 0;
    self->waits_for = "wgmma";
    for (int64_t i = g->first; i < until;) {
        if (i < g->first) {
            i = g->first;
            continue;
        }
        WgmmaOp &op = g->ops[(size_t)(i - g->first)];
        if (op.parts < 128) {
            yield();
            continue;
        }
        if (!op.done) wgmma_run(op), op.done = true, progress();
        i++;
    }
    // Forget what everybody has behind them.
    int64_t base = (self - worker->threads) / 128 * 128, least = INT64_MAX;
    for (int64_t t = base; t < base + 128 && t < worker->count; t++) {
        if (worker->threads[t].wgmma_issued < least) least = worker->threads[t].wgmma_issued;
    }
    while (g->first < least && g->ops.front().done) g->ops.pop_front(), g->first++;
}

// ---- copies in the background -------------------------------------------------------------------------
static void copy_now(const BulkCopy &c) {
    if (!c.map.valid) {
        memcpy(from_shared(c.to), c.from, (size_t)c.bytes);
    } else {
        const TensorMap &m = c.map;
        int row = m.box[0] * m.element, bytes = 0;
        for (int w = 0; w < m.box[3]; w++) {
            for (int z = 0; z < m.box[2]; z++) {
                for (int y = 0; y < m.box[1]; y++) {
                    for (int x = 0; x < row; x += 2, bytes += 2) {
                        int64_t at[4] = {c.at[0] + x / m.element, c.at[1] + y, c.at[2] + z, c.at[3] + w},
                                from = x % m.element;
                        bool inside = true;
                        for (int i = 0; i < 4; i++) {
                            inside = inside && at[i] >= 0 && at[i] < m.size[i];
                            from += at[i] * m.stride[i];
                        }
                        uint32_t to = c.to + (uint32_t)bytes;
                        if (m.swizzled) to ^= (to >> 7 & 7) << 4;
                        *(uint16_t *)from_shared(to) =
                            inside ? *(const uint16_t *)(m.base + from) : (uint16_t)0;
                    }
                }
            }
        }
    }
    mbarrier_bytes(c.barrier, c.bytes);
    progress();
}
void copies_finish() {
    std::vector<BulkCopy> list;
    list.swap(worker->bulk_copies);
    for (size_t i = list.size(); i-- > 0;) copy_now(list[i]); // in no particular order: from the last
}
static void issue(const BulkCopy &c) {
    if (toss())
        copy_now(c);
    else
        worker->bulk_copies.push_back(c);
}
void tma_issue(uint32_t to, const TensorMap *map, const int64_t at[4], int rank, uint32_t barrier) {
    if (!map->valid || map->rank != rank) fail("TMA: no map of a tensor of %d dimensions", rank);
    if (to % (map->swizzled ? 1024 : 128)) fail("TMA: the box at %u is not aligned", to);
    BulkCopy c = {to, barrier, *map, NULL, {at[0], at[1], at[2], at[3]}, 0};
    c.bytes = map->box[0] * map->box[1] * map->box[2] * map->box[3] * map->element;
    issue(c);
}
void bulk_issue(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    if (to % 16 || (uintptr_t)from % 16 || bytes % 16) fail("a bulk copy is not aligned to 16 bytes");
    issue({to, barrier, {}, from, {}, bytes});
}

static void bulk_read(BulkStore &s) {
    if (s.data.empty())
        s.data.assign((char *)from_shared(s.from), (char *)from_shared(s.from) + s.bytes), progress();
}
static void bulk_write(const BulkStore &s) {
    for (int i = 0; i < s.bytes; i += 4) {
        if (s.add)
            *(float *)(s.to + i) += *(const float *)(s.data.data() + i);
        else
            memcpy(s.to + i, s.data.data() + i, 4);
    }
    progress();
}
void bulk_store_issue(void *to, uint32_t from, int bytes, bool add) {
    if (from % 16 || (uintptr_t)to % 16 || bytes % 16) fail("a bulk copy is not aligned to 16 bytes");
    self->bulk_stores.push_back({(char *)to, from, bytes, add, {}});
    if (toss()) bulk_read(self->bulk_stores.back());
}
void bulk_stores_finish(bool written) {
    for (BulkStore &s : self->bulk_stores) bulk_read(s);
    if (!written) return;
    for (const BulkStore &s : self->bulk_stores) bulk_write(s);
    self->bulk_stores.clear();
}

// ---- launches -------------------------------------------------------------------------------------
static cudaError_t last_error;
static std::mutex smem_mutex;
static std::map<const void *, size_t> max_smem;

cudaError_t set_max_smem(const void *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > MAX_SMEM) return last_error = cudaErrorInvalidValue;
    std::lock_guard<std::mutex> lock(smem_mutex);
    max_smem[kernel] = (size_t)value;
    return cudaSuccess;
}

void run(const Config &c, const void *kernel, const std::function<void()> &body) {
    int64_t blocks = (int64_t)c.grid.x * c.grid.y * c.grid.z,
            threads = (int64_t)c.block.x * c.block.y * c.block.z;
    size_t room = DEFAULT_SMEM;
    {
        std::lock_guard<std::mutex> lock(smem_mutex);
        auto found = max_smem.find(kernel);
        if (found != max_smem.end() && found->second > room) room = found->second;
    }
    if (blocks < 1 || threads < 1 || threads > MAX_THREADS || c.grid.x > 0x7fffffffu || c.grid.y > 65535 ||
        c.grid.z > 65535 || c.smem > room) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < blocks; i++) {
        uint3 block = {(unsigned)(i % c.grid.x), (unsigned)(i / c.grid.x % c.grid.y),
                       (unsigned)(i / c.grid.x / c.grid.y)};
        run_block(c, block, body);
    }
}

} // namespace emu

// ---- the runtime: one device, whose memory is the host's and whose streams finish at once ----------------
extern "C" {
cudaError_t cudaGetLastError() {
    cudaError_t e = emu::last_error;
    emu::last_error = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError() {
    return emu::last_error;
}
const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess                     ? "no error"
           : e == cudaErrorMemoryAllocation     ? "out of memory"
           : e == cudaErrorInvalidValue         ? "invalid argument"
           : e == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                : "an error of the emulator";
}
const char *cudaGetErrorName(cudaError_t e) {
    return cudaGetErrorString(e);
}
cudaError_t cudaMalloc(void **p, size_t bytes) {
    if (posix_memalign(p, 256, bytes ? bytes : 1)) return emu::last_error = cudaErrorMemoryAllocation;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
    free(p);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) {
    return cudaMalloc(p, bytes);
}
cudaError_t cudaMallocHost(void **p, size_t bytes) {
    return cudaMalloc(p, bytes);
}
cudaError_t cudaFreeHost(void *p) {
    return cudaFree(p);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
    if (width > to_pitch || width > from_pitch) return cudaErrorInvalidPitchValue;
    for (size_t i = 0; i < height; i++)
        memcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int x, size_t bytes) {
    memset(p, x, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int x, size_t bytes, cudaStream_t) {
    return cudaMemset(p, x, bytes);
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *free_bytes = *total = (size_t)8 << 30;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "emulator");
    p->major = 9;
    p->multiProcessorCount = emu::MULTIPROCESSORS;
    p->totalGlobalMem = (size_t)8 << 30;
    p->l2CacheSize = 1 << 20;
    p->sharedMemPerBlockOptin = emu::MAX_SMEM;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *p, const void *) {
    memset(p, 0, sizeof *p);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
        *value = 9;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
        *value = 0;
        return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
        *value = emu::MULTIPROCESSORS;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = emu::MAX_SMEM;
        return cudaSuccess;
    default:
        return emu::last_error = cudaErrorInvalidValue;
    }
}
static CUresult tensor_map(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                           const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                           const cuuint32_t *element_stride, CUtensorMapInterleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    emu::TensorMap m = {};
    m.base = (char *)base;
    m.rank = (int16_t)rank;
    m.element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    m.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    if (rank < 1 || rank > 4 || (uintptr_t)base % 16 || (m.swizzled && box[0] * (unsigned)m.element > 128))
        return CUDA_ERROR_INVALID_VALUE;
    for (int i = 0; i < 4; i++) {
        bool there = i < (int)rank;
        m.size[i] = there ? (int64_t)size[i] : 1;
        m.stride[i] = !there ? 0 : i == 0 ? m.element : (int64_t)stride[i - 1];
        m.box[i] = there ? (int)box[i] : 1;
        if (m.size[i] < 1 || m.size[i] > (int64_t)1 << 32 || m.box[i] < 1 || m.box[i] > 256 ||
            (there && i > 0 && m.stride[i] % 16) || (there && element_stride[i] != 1))
            return CUDA_ERROR_INVALID_VALUE;
    }
    m.valid = 1;
    memcpy((void *)map, &m, sizeof m);
    return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
    bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *function = known ? (void *)tensor_map : NULL;
    if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) {
    *s = (cudaStream_t)malloc(1);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    return cudaStreamCreate(s);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    free(s);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) {
    *e = (cudaEvent_t)calloc(1, sizeof(struct timespec));
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    return cudaEventCreate(e);
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    free(e);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    clock_gettime(CLOCK_MONOTONIC, (struct timespec *)e);
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    const struct timespec *x = (const struct timespec *)a, *y = (const struct timespec *)b;
    *ms = (float)((double)(y->tv_sec - x->tv_sec) * 1e3 + (double)(y->tv_nsec - x->tv_nsec) * 1e-6);
    return cudaSuccess;
}
}
