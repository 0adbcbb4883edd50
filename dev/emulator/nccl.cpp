// nccl.cpp: the NCCL functions that the project calls, between processes of one machine over shared memory,
// for the trainer's emulator build. Reductions add in the order of ranks. A call completes before it returns.
// Every collective call is compared across the ranks: different calls, which would hang or corrupt data on
// GPUs, are an error. As in NCCL, a call waits forever for a peer that has died.
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
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <vector>

namespace {

// Bytes of a rank's slot for collectives, of a mailbox, and of the name of the shared memory.
constexpr size_t SLOT = 1 << 18, MAILBOX_BYTES = 1 << 16, NAME = 64;

// The arguments of a collective call that must be the same on all ranks.
struct Collective {
    int kind, type, root;
    uint64_t count;
};

struct Mailbox { // from one sender to one receiver
    std::atomic<int> full;
    size_t bytes;
    char data[MAILBOX_BYTES];
};

struct ControlBlock {
    std::atomic<int> attached, arrived;
    std::atomic<unsigned> generation;
};

struct SendRecv {
    int send, peer; // send: 1 for a send, 0 for a receive
    char *data;
    size_t bytes, done;
    ncclComm_t comm;
};

thread_local int group_depth;
thread_local std::vector<SendRecv> group;
thread_local char last_error[256];

} // namespace

struct ncclComm {
    int rank, ranks;
    char name[NAME]; // of the shared memory
    int splits;      // calls of ncclCommSplit
    size_t bytes;
    ControlBlock *shared;
    Collective *calls;  // [ranks]
    char *slots;        // [ranks][SLOT]: a chunk of each rank's data
    Mailbox *mailboxes; // [sender][receiver]
    std::atomic<int> aborted;
};

namespace {

ncclResult_t fail(ncclResult_t result, const char *format, long a = 0, long b = 0) {
    snprintf(last_error, sizeof last_error, format, a, b);
    fprintf(stderr, "emulated NCCL: %s\n", last_error);
    return result;
}

// Yields the CPU in the first 50 attempts of a wait, then sleeps 20 us.
void back_off(int attempt) {
    struct timespec t = {0, 20000};
    if (attempt < 50)
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
    for (int attempt = 0; c->shared->generation.load() == generation; attempt++) {
        if (c->aborted.load()) return ncclInternalError;
        back_off(attempt);
    }
    return ncclSuccess;
}

#define TRY(call)                                                                                            \
    do {                                                                                                     \
        ncclResult_t result_ = (call);                                                                       \
        if (result_ != ncclSuccess) return result_;                                                          \
    } while (0)

// Waits until all ranks begin a collective call, and checks that it is the same. In a group the call runs at
// once: the caller cannot tell before the group ends.
ncclResult_t check_same_call(ncclComm_t c, Collective call) {
    if (!c) return fail(ncclInvalidArgument, "the communicator is NULL");
    c->calls[c->rank] = call;
    TRY(barrier(c));
    for (int r = 0; r < c->ranks; r++)
        if (memcmp(&c->calls[r], &call, sizeof call))
            return fail(ncclInvalidUsage, "rank %ld and rank %ld make different collective calls", c->rank,
                        r);
    return barrier(c);
}

Collective make_collective(int kind, ncclDataType_t type, int root, size_t count) {
    Collective call;
    memset(&call, 0, sizeof call);
    call.kind = kind, call.type = (int)type, call.root = root, call.count = count;
    return call;
}

template <typename T> void sum_slots(ncclComm_t c, char *out, size_t bytes) {
    for (size_t i = 0; i < bytes / sizeof(T); i++) {
        T sum = ((const T *)c->slots)[i];
        for (int r = 1; r < c->ranks; r++) sum += ((const T *)(c->slots + (size_t)r * SLOT))[i];
        ((T *)out)[i] = sum;
    }
}

// recvbuff = the sum of the ranks' sendbuff. recvbuff is NULL on ranks that do not receive the result.
ncclResult_t reduce(ncclComm_t c, const char *sendbuff, char *recvbuff, size_t bytes, ncclDataType_t type) {
    for (size_t offset = 0; offset < bytes; offset += SLOT) {
        size_t n = bytes - offset < SLOT ? bytes - offset : SLOT;
        memcpy(c->slots + (size_t)c->rank * SLOT, sendbuff + offset, n);
        TRY(barrier(c));
        if (recvbuff && type == ncclFloat32) sum_slots<float>(c, recvbuff + offset, n);
        if (recvbuff && type == ncclFloat64) sum_slots<double>(c, recvbuff + offset, n);
        TRY(barrier(c));
    }
    return ncclSuccess;
}

ncclResult_t check_reduction(ncclDataType_t type, ncclRedOp_t op) {
    if (op == ncclSum && (type == ncclFloat32 || type == ncclFloat64)) return ncclSuccess;
    return fail(ncclInvalidArgument, "reduction of type %ld, operation %ld: must be a sum of fp32 or fp64",
                type, op);
}

// recvbuff of every rank = sendbuff of root.
ncclResult_t broadcast(ncclComm_t c, const char *sendbuff, char *recvbuff, size_t bytes, int root) {
    for (size_t offset = 0; offset < bytes; offset += SLOT) {
        size_t n = bytes - offset < SLOT ? bytes - offset : SLOT;
        if (c->rank == root) memcpy(c->slots, sendbuff + offset, n);
        TRY(barrier(c));
        memcpy(recvbuff + offset, c->slots, n);
        TRY(barrier(c));
    }
    return ncclSuccess;
}

// Runs all sends and receives of a group concurrently. Those with the same peer and direction run in the
// order of their calls.
ncclResult_t run_group() {
    std::vector<SendRecv> operations;
    operations.swap(group);
    size_t pending = operations.size();
    for (SendRecv &o : operations) pending -= o.bytes == 0;
    for (int attempt = 0; pending > 0; attempt++) {
        bool progress = false;
        for (size_t i = 0; i < operations.size(); i++) {
            SendRecv &o = operations[i];
            if (o.done == o.bytes) continue;
            bool blocked = false; // by an earlier one with the same peer and direction
            for (size_t j = 0; j < i; j++)
                blocked |= operations[j].comm == o.comm && operations[j].send == o.send &&
                           operations[j].peer == o.peer && operations[j].done < operations[j].bytes;
            if (blocked) continue;
            ncclComm_t c = o.comm;
            if (c->aborted.load()) return ncclInternalError;
            Mailbox *box = &c->mailboxes[o.send ? c->rank * c->ranks + o.peer : o.peer * c->ranks + c->rank];
            if (o.send != !box->full.load()) continue;
            if (o.send) {
                box->bytes = o.bytes - o.done < MAILBOX_BYTES ? o.bytes - o.done : MAILBOX_BYTES;
                memcpy(box->data, o.data + o.done, box->bytes);
            } else if (box->bytes > o.bytes - o.done) {
                return fail(ncclInvalidUsage, "receive: %ld bytes arrive, %ld were expected", box->bytes,
                            o.bytes - o.done);
            } else {
                memcpy(o.data + o.done, box->data, box->bytes);
            }
            o.done += box->bytes;
            box->full.store(o.send);
            pending -= o.done == o.bytes;
            progress = true;
        }
        if (progress)
            attempt = 0;
        else
            back_off(attempt);
    }
    return ncclSuccess;
}

ncclResult_t enqueue(int send, void *data, size_t count, ncclDataType_t type, int peer, ncclComm_t c) {
    if (!c || peer < 0 || peer >= c->ranks || size_of(type) == 0)
        return fail(ncclInvalidArgument, "send or receive: invalid peer %ld or type %ld", peer, type);
    group.push_back({send, peer, (char *)data, count * size_of(type), 0, c});
    return group_depth ? ncclSuccess : run_group();
}

} // namespace

const char *ncclGetErrorString(ncclResult_t result) {
    return result == ncclSuccess ? "no error" : last_error[0] ? last_error : "emulated NCCL failed";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static int ids;
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    memset(id, 0, sizeof *id);
    snprintf(id->internal, NAME, "/emulated_nccl_%d_%d_%ld", (int)getpid(), ids++, (long)t.tv_nsec);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank) {
    if (rank < 0 || rank >= ranks)
        return fail(ncclInvalidArgument, "rank %ld: must be from 0 to %ld", rank, ranks - 1);
    ncclComm_t c = new ncclComm();
    c->rank = rank, c->ranks = ranks;
    snprintf(c->name, NAME, "%.*s", (int)NAME - 1, id.internal);
    size_t slots = 4096 + (ranks * sizeof(Collective) + 4095) / 4096 * 4096, // offsets in the shared memory
        mailboxes = slots + (size_t)ranks * SLOT;
    c->bytes = mailboxes + (size_t)ranks * ranks * sizeof(Mailbox);
    // Rank 0 makes the memory, so that another rank's limit of file sizes (a test of full disks) does not
    // matter.
    int fd = -1;
    if (rank == 0) {
        fd = shm_open(id.internal, O_RDWR | O_CREAT, 0600);
        if (fd < 0 || ftruncate(fd, (off_t)c->bytes) != 0)
            return fail(ncclSystemError, "cannot create shared memory: errno %ld", errno);
    }
    for (int attempt = 0; fd < 0; attempt++) {
        struct stat s;
        fd = shm_open(id.internal, O_RDWR, 0600);
        if (fd >= 0 && (fstat(fd, &s) != 0 || s.st_size != (off_t)c->bytes)) close(fd), fd = -1;
        if (fd < 0) back_off(attempt);
    }
    char *base = (char *)mmap(NULL, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (base == MAP_FAILED) return fail(ncclSystemError, "cannot map shared memory: errno %ld", errno);
    c->shared = (ControlBlock *)base;
    c->calls = (Collective *)(base + 4096);
    c->slots = base + slots;
    c->mailboxes = (Mailbox *)(base + mailboxes);
    c->shared->attached.fetch_add(1);
    *comm = c;
    for (int attempt = 0; c->shared->attached.load() < ranks; attempt++) back_off(attempt);
    shm_unlink(id.internal); // succeeds on one rank; the memory exists as long as it is mapped
    return ncclSuccess;
}

// Each rank's color and key pass through its slot.
ncclResult_t ncclCommSplit(ncclComm_t c, int color, int key, ncclComm_t *comm, ncclConfig_t *) {
    const int own[2] = {color, key};
    int rank = 0, ranks = 0;
    TRY(check_same_call(c, make_collective(6, ncclInt8, 0, 0)));
    memcpy(c->slots + (size_t)c->rank * SLOT, own, sizeof own);
    TRY(barrier(c));
    for (int r = 0; r < c->ranks; r++) {
        const int *other = (const int *)(c->slots + (size_t)r * SLOT);
        if (other[0] != color) continue;
        ranks++;
        rank += other[1] < key || (other[1] == key && r < c->rank);
    }
    TRY(barrier(c));
    *comm = NULL;
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    snprintf(id.internal, NAME, "%.40s_%d_%d", c->name, c->splits++, color);
    return color == NCCL_SPLIT_NOCOLOR ? ncclSuccess : ncclCommInitRank(comm, ranks, id, rank);
}

ncclResult_t ncclCommDestroy(ncclComm_t c) {
    munmap(c->shared, c->bytes);
    delete c;
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t c) {
    c->aborted.store(1); // threads that wait in a call return; the memory is freed when the process exits
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
    if (group_depth == 0) return fail(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    return --group_depth ? ncclSuccess : run_group();
}

ncclResult_t ncclAllReduce(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t c, cudaStream_t) {
    TRY(check_reduction(type, op));
    TRY(check_same_call(c, make_collective(1, type, 0, count)));
    return reduce(c, (const char *)sendbuff, (char *)recvbuff, count * size_of(type), type);
}

ncclResult_t ncclReduce(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t c, cudaStream_t) {
    TRY(check_reduction(type, op));
    TRY(check_same_call(c, make_collective(2, type, root, count)));
    return reduce(c, (const char *)sendbuff, c->rank == root ? (char *)recvbuff : NULL, count * size_of(type),
                  type);
}

ncclResult_t ncclReduceScatter(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t c, cudaStream_t) {
    size_t bytes = count * size_of(type);
    TRY(check_reduction(type, op));
    TRY(check_same_call(c, make_collective(3, type, 0, count)));
    if (recvbuff != (const char *)sendbuff + c->rank * bytes && (char *)recvbuff + bytes > sendbuff &&
        recvbuff < (const char *)sendbuff + c->ranks * bytes)
        return fail(
            ncclInvalidUsage,
            "reduceScatter: the receive buffer overlaps the send buffer, but not at this rank's offset");
    for (int r = 0; r < c->ranks; r++)
        TRY(reduce(c, (const char *)sendbuff + r * bytes, c->rank == r ? (char *)recvbuff : NULL, bytes,
                   type));
    return ncclSuccess;
}

ncclResult_t ncclAllGather(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t type,
                           ncclComm_t c, cudaStream_t) {
    size_t bytes = count * size_of(type);
    if (bytes == 0 && count) return fail(ncclInvalidArgument, "type %ld is not supported", type);
    TRY(check_same_call(c, make_collective(4, type, 0, count)));
    if (sendbuff != (char *)recvbuff + c->rank * bytes && (const char *)sendbuff + bytes > recvbuff &&
        sendbuff < (char *)recvbuff + c->ranks * bytes)
        return fail(ncclInvalidUsage,
                    "allGather: the send buffer overlaps the receive buffer, but not at this rank's offset");
    for (int r = 0; r < c->ranks; r++)
        TRY(broadcast(c, (const char *)sendbuff, (char *)recvbuff + r * bytes, bytes, r));
    return ncclSuccess;
}

ncclResult_t ncclBroadcast(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t type, int root,
                           ncclComm_t c, cudaStream_t) {
    if (size_of(type) == 0) return fail(ncclInvalidArgument, "type %ld is not supported", type);
    TRY(check_same_call(c, make_collective(5, type, root, count)));
    return broadcast(c, (const char *)sendbuff, (char *)recvbuff, count * size_of(type), root);
}

ncclResult_t ncclSend(const void *sendbuff, size_t count, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t) {
    return enqueue(1, (void *)sendbuff, count, type, peer, c);
}

ncclResult_t ncclRecv(void *recvbuff, size_t count, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t) {
    return enqueue(0, recvbuff, count, type, peer, c);
}
