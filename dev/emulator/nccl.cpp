// nccl.cpp: the NCCL calls that the project makes, between processes of this machine over shared memory, for
// the trainer's build on the emulator. Sums are added in the order of ranks. A call returns when its work is
// done, as all of the emulator does. Every collective call is compared over the ranks: different calls, which
// would hang or corrupt on GPUs, are reported. A peer that has died is waited for, as NCCL does.
#include <atomic>
#include <cuda_runtime.h>
#include <errno.h>
#include <fcntl.h>
#include <nccl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <vector>

namespace {

constexpr size_t SLOT = 1 << 18, MAIL = 1 << 16, NAME = 64;

// What a rank is about to do; the same on all ranks.
struct Call {
    int kind, type, root;
    uint64_t count;
};

struct Mailbox { // of one sender to one receiver
    std::atomic<int> full;
    size_t bytes;
    char data[MAIL];
};

struct Shared {
    std::atomic<int> attached, arrived;
    std::atomic<unsigned> generation;
};

struct Operation {
    int send, peer;
    char *data;
    size_t bytes, done;
    ncclComm_t comm;
};

thread_local int group_depth;
thread_local std::vector<Operation> group;
thread_local char last_error[256];

} // namespace

struct ncclComm {
    int rank, ranks;
    size_t bytes;
    Shared *shared;
    Call *calls;    // [ranks]
    char *slots;    // [ranks][SLOT]
    Mailbox *mails; // [sender][receiver]
    std::atomic<int> aborted;
};

namespace {

ncclResult_t fail(ncclResult_t result, const char *format, long a = 0, long b = 0) {
    snprintf(last_error, sizeof last_error, format, a, b);
    fprintf(stderr, "emulated NCCL: %s\n", last_error);
    return result;
}

void nap(int turn) {
    struct timespec t = {0, 20000};
    if (turn < 50)
        sched_yield();
    else
        nanosleep(&t, NULL);
}

size_t size_of(ncclDataType_t type) {
    switch (type) {
    case ncclInt8:
        return 1;
    case ncclFloat16:
    case ncclBfloat16:
        return 2;
    case ncclInt32:
    case ncclFloat32:
        return 4;
    case ncclInt64:
    case ncclFloat64:
        return 8;
    default:
        return 0;
    }
}

ncclResult_t barrier(ncclComm_t c) {
    unsigned generation = c->shared->generation.load();
    if (c->shared->arrived.fetch_add(1) + 1 == c->ranks) {
        c->shared->arrived.store(0);
        c->shared->generation.fetch_add(1);
        return ncclSuccess;
    }
    for (int turn = 0; c->shared->generation.load() == generation; turn++) {
        if (c->aborted.load()) return ncclInternalError;
        nap(turn);
    }
    return ncclSuccess;
}

#define TRY(call)                                                                                            \
    do {                                                                                                     \
        ncclResult_t result_ = (call);                                                                       \
        if (result_ != ncclSuccess) return result_;                                                          \
    } while (0)

// All ranks begin the same call. In a group it is not put off: nobody looks before the group's end.
ncclResult_t meet(ncclComm_t c, Call call) {
    if (!c) return fail(ncclInvalidArgument, "the communicator is NULL");
    c->calls[c->rank] = call;
    TRY(barrier(c));
    for (int r = 0; r < c->ranks; r++)
        if (memcmp(&c->calls[r], &call, sizeof call))
            return fail(ncclInvalidUsage, "rank %ld makes another call than rank %ld", c->rank, r);
    return barrier(c);
}

Call describe(int kind, ncclDataType_t type, int root, size_t count) {
    Call call;
    memset(&call, 0, sizeof call);
    call.kind = kind, call.type = (int)type, call.root = root, call.count = count;
    return call;
}

template <typename T> void add_slots(ncclComm_t c, char *out, size_t bytes) {
    for (size_t i = 0; i < bytes / sizeof(T); i++) {
        T sum = ((const T *)c->slots)[i];
        for (int r = 1; r < c->ranks; r++) sum += ((const T *)(c->slots + (size_t)r * SLOT))[i];
        ((T *)out)[i] = sum;
    }
}

// to = the sum of the ranks' `from` [bytes]; to is NULL on ranks that want none.
ncclResult_t sum(ncclComm_t c, const char *from, char *to, size_t bytes, ncclDataType_t type) {
    for (size_t at = 0; at < bytes; at += SLOT) {
        size_t n = bytes - at < SLOT ? bytes - at : SLOT;
        memcpy(c->slots + (size_t)c->rank * SLOT, from + at, n);
        TRY(barrier(c));
        if (to && type == ncclFloat32) add_slots<float>(c, to + at, n);
        if (to && type == ncclFloat64) add_slots<double>(c, to + at, n);
        TRY(barrier(c));
    }
    return ncclSuccess;
}

ncclResult_t check_sum(ncclDataType_t type, ncclRedOp_t op) {
    if (op == ncclSum && (type == ncclFloat32 || type == ncclFloat64)) return ncclSuccess;
    return fail(ncclInvalidArgument, "type %ld, operation %ld: only sums of fp32 and fp64 are emulated", type,
                op);
}

// root's `from` goes to everybody's `to`.
ncclResult_t spread(ncclComm_t c, const char *from, char *to, size_t bytes, int root) {
    for (size_t at = 0; at < bytes; at += SLOT) {
        size_t n = bytes - at < SLOT ? bytes - at : SLOT;
        if (c->rank == root) memcpy(c->slots, from + at, n);
        TRY(barrier(c));
        memcpy(to + at, c->slots, n);
        TRY(barrier(c));
    }
    return ncclSuccess;
}

// All sends and receives of a group go on together, in the order in which they were called for each pair.
ncclResult_t run_group() {
    std::vector<Operation> all;
    all.swap(group);
    size_t left = all.size();
    for (Operation &o : all) left -= o.bytes == 0;
    for (int turn = 0; left > 0; turn++) {
        bool moved = false;
        for (size_t i = 0; i < all.size(); i++) {
            Operation &o = all[i];
            if (o.done == o.bytes) continue;
            bool behind = false; // an earlier one of this pair is not done
            for (size_t j = 0; j < i; j++)
                behind |= all[j].comm == o.comm && all[j].send == o.send && all[j].peer == o.peer &&
                          all[j].done < all[j].bytes;
            if (behind) continue;
            ncclComm_t c = o.comm;
            if (c->aborted.load()) return ncclInternalError;
            Mailbox *box = &c->mails[o.send ? c->rank * c->ranks + o.peer : o.peer * c->ranks + c->rank];
            if (o.send != !box->full.load()) continue;
            if (o.send) {
                box->bytes = o.bytes - o.done < MAIL ? o.bytes - o.done : MAIL;
                memcpy(box->data, o.data + o.done, box->bytes);
            } else if (box->bytes > o.bytes - o.done) {
                return fail(ncclInvalidUsage, "%ld bytes arrive where %ld are expected", box->bytes,
                            o.bytes - o.done);
            } else {
                memcpy(o.data + o.done, box->data, box->bytes);
            }
            o.done += box->bytes;
            box->full.store(o.send);
            left -= o.done == o.bytes;
            moved = true;
        }
        if (moved)
            turn = 0;
        else
            nap(turn);
    }
    return ncclSuccess;
}

ncclResult_t enqueue(int send, void *data, size_t count, ncclDataType_t type, int peer, ncclComm_t c) {
    if (!c || peer < 0 || peer >= c->ranks || size_of(type) == 0)
        return fail(ncclInvalidArgument, "send or receive: peer %ld, type %ld", peer, type);
    group.push_back({send, peer, (char *)data, count * size_of(type), 0, c});
    return group_depth ? ncclSuccess : run_group();
}

} // namespace

const char *ncclGetErrorString(ncclResult_t result) {
    return result == ncclSuccess ? "no error" : last_error[0] ? last_error : "emulated NCCL failed";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static int made;
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    memset(id, 0, sizeof *id);
    snprintf(id->internal, NAME, "/emulated_nccl_%d_%d_%ld", (int)getpid(), made++, (long)t.tv_nsec);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank) {
    if (rank < 0 || rank >= ranks) return fail(ncclInvalidArgument, "rank %ld of %ld", rank, ranks);
    ncclComm_t c = new ncclComm();
    c->rank = rank, c->ranks = ranks;
    size_t slots = 4096 + (ranks * sizeof(Call) + 4095) / 4096 * 4096, mails = slots + (size_t)ranks * SLOT;
    c->bytes = mails + (size_t)ranks * ranks * sizeof(Mailbox);
    int fd = shm_open(id.internal, O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, (off_t)c->bytes) != 0)
        return fail(ncclSystemError, "shared memory: errno %ld", errno);
    char *base = (char *)mmap(NULL, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (base == MAP_FAILED) return fail(ncclSystemError, "shared memory: errno %ld", errno);
    c->shared = (Shared *)base;
    c->calls = (Call *)(base + 4096);
    c->slots = base + slots;
    c->mails = (Mailbox *)(base + mails);
    c->shared->attached.fetch_add(1);
    *comm = c;
    for (int turn = 0; c->shared->attached.load() < ranks; turn++) nap(turn);
    shm_unlink(id.internal); // of all ranks one succeeds; it lives on while it is mapped
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t c) {
    munmap(c->shared, c->bytes);
    delete c;
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t c) {
    c->aborted.store(1); // who waits in it returns; the memory goes with the process
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *result) {
    *result = c->aborted.load() ? ncclInternalError : ncclSuccess;
    return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
    group_depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    if (group_depth == 0) return fail(ncclInvalidUsage, "a group ends that has not begun");
    return --group_depth ? ncclSuccess : run_group();
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t c, cudaStream_t) {
    TRY(check_sum(type, op));
    TRY(meet(c, describe(1, type, 0, count)));
    return sum(c, (const char *)from, (char *)to, count * size_of(type), type);
}

ncclResult_t ncclReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t c, cudaStream_t) {
    TRY(check_sum(type, op));
    TRY(meet(c, describe(2, type, root, count)));
    return sum(c, (const char *)from, c->rank == root ? (char *)to : NULL, count * size_of(type), type);
}

ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t c, cudaStream_t) {
    size_t bytes = count * size_of(type);
    TRY(check_sum(type, op));
    TRY(meet(c, describe(3, type, 0, count)));
    if (to != (const char *)from + c->rank * bytes && (char *)to + bytes > from &&
        to < (const char *)from + c->ranks * bytes)
        return fail(ncclInvalidUsage,
                    "reduceScatter: the result overlaps the input, but not at this rank's place");
    for (int r = 0; r < c->ranks; r++)
        TRY(sum(c, (const char *)from + r * bytes, c->rank == r ? (char *)to : NULL, bytes, type));
    return ncclSuccess;
}

ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t c,
                           cudaStream_t) {
    size_t bytes = count * size_of(type);
    if (bytes == 0 && count) return fail(ncclInvalidArgument, "type %ld is not emulated", type);
    TRY(meet(c, describe(4, type, 0, count)));
    if (from != (char *)to + c->rank * bytes && (const char *)from + bytes > to &&
        from < (char *)to + c->ranks * bytes)
        return fail(ncclInvalidUsage,
                    "allGather: the input overlaps the result, but not at this rank's place");
    for (int r = 0; r < c->ranks; r++) TRY(spread(c, (const char *)from, (char *)to + r * bytes, bytes, r));
    return ncclSuccess;
}

ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root,
                           ncclComm_t c, cudaStream_t) {
    if (size_of(type) == 0) return fail(ncclInvalidArgument, "type %ld is not emulated", type);
    TRY(meet(c, describe(5, type, root, count)));
    return spread(c, (const char *)from, (char *)to, count * size_of(type), root);
}

ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t) {
    return enqueue(1, (void *)from, count, type, peer, c);
}

ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t c, cudaStream_t) {
    return enqueue(0, to, count, type, peer, c);
}
