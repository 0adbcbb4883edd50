// nccl.cuh: what moves between GPUs: gradients to those who own them, weights back to all, and the keys and
// values of a sequence that several GPUs share. Built with -DMULTI_GPU; without it there is one GPU.
//
// All transfers go through one stream, in an order that is the same on all ranks: NCCL's calls on two
// communicators would otherwise wait for each other.
#ifndef LLMC_NCCL_CUH
#define LLMC_NCCL_CUH
#include "comm.h"
#include "context_parallel.h"
#include "cuda_common.cuh"
#include "zero.h"

#ifdef MULTI_GPU
#include <nccl.h>
// A peer that dies makes calls here fail; the thread of comm.h knows by then which one, and is left time to
// say it.
#define nccl_check(call)                                                                                     \
    do {                                                                                                     \
        ncclResult_t result_ = (call);                                                                       \
        if (result_ != ncclSuccess) {                                                                        \
            sleep(3);                                                                                        \
            die("%s:%d: %.60s...: %s", __FILE__, __LINE__, #call, ncclGetErrorString(result_));              \
        }                                                                                                    \
    } while (0)
#else
typedef void *ncclComm_t;
#define nccl_check(call) ((void)0)
#endif

// This process among all: ranks = data * context; ranks of a group share each batch, neighbours in number.
typedef struct {
    Comm *comm;
    int rank, ranks;
    int context, context_rank; // ranks of this rank's group, and its place among them
    int data, data_rank;       // groups, and which one is this
    ncclComm_t world, group;
    cudaStream_t stream;     // of all transfers
    cudaEvent_t launched;    // work that transfers wait for
    cudaEvent_t transferred; // the other way
} Gpus;

#ifdef MULTI_GPU
// Asked by comm.h's thread. What one call reports may be a peer's death, which the next few seconds will
// name.
static const char *gpus_trouble(void *where) {
    static char why[COMM_TEXT];
    static int times;
    Gpus *g = (Gpus *)where;
    ncclResult_t error = ncclSuccess;
    ncclComm_t all[2] = {g->world, g->group};
    for (int i = 0; i < 2 && error == ncclSuccess; i++)
        if (all[i] && ncclCommGetAsyncError(all[i], &error) == ncclSuccess && error == ncclInProgress)
            error = ncclSuccess;
    if (error == ncclSuccess || times++ < 2) return NULL;
    snprintf(why, sizeof why, "NCCL: %s", ncclGetErrorString(error));
    return why;
}

// A communicator of the ranks [first, first + count), this one among them. All ranks of the world call it.
static ncclComm_t gpus_connect(Gpus *g, int first, int count) {
    ncclUniqueId mine, *all = (ncclUniqueId *)xcalloc(g->ranks, sizeof mine);
    ncclComm_t made = NULL;
    memset(&mine, 0, sizeof mine);
    if (g->rank == first) nccl_check(ncclGetUniqueId(&mine));
    comm_allgather(g->comm, &mine, sizeof mine, all);
    ncclResult_t result = ncclCommInitRank(&made, count, all[first], g->rank - first);
    if (result == ncclInvalidUsage)
        die("NCCL: %s; does each rank of a host have a GPU of its own?", ncclGetErrorString(result));
    nccl_check(result);
    free(all);
    return made;
}
#endif

// After comm_start, on the GPU chosen: `context` ranks, which divide their number, are to share a batch.
static void gpus_start(Gpus *g, Comm *comm, int context) {
    memset(g, 0, sizeof *g);
    g->comm = comm, g->rank = comm->rank, g->ranks = comm->ranks;
    g->context = context, g->context_rank = g->rank % context;
    g->data = g->ranks / context, g->data_rank = g->rank / context;
    if (g->ranks == 1) return;
    // A large product's thread blocks would keep a transfer that comes after them waiting until the last one.
    int least, first;
    cuda_check(cudaDeviceGetStreamPriorityRange(&least, &first));
    cuda_check(cudaStreamCreateWithPriority(&g->stream, cudaStreamNonBlocking, first));
    cuda_check(cudaEventCreateWithFlags(&g->launched, cudaEventDisableTiming));
    cuda_check(cudaEventCreateWithFlags(&g->transferred, cudaEventDisableTiming));
#ifdef MULTI_GPU
    g->world = gpus_connect(g, 0, g->ranks);
    if (context > 1) g->group = gpus_connect(g, g->rank - g->context_rank, context);
    comm_watch(comm, gpus_trouble, g);
#endif
}

static void gpus_stop(Gpus *g) {
    if (g->ranks == 1) return;
    cuda_check(cudaStreamSynchronize(g->stream));
#ifdef MULTI_GPU
    comm_watch(g->comm, NULL, NULL);
    comm_barrier(g->comm); // nobody leaves while others still transfer
    if (g->group) nccl_check(ncclCommDestroy(g->group));
    nccl_check(ncclCommDestroy(g->world));
#endif
    cuda_check(cudaEventDestroy(g->launched));
    cuda_check(cudaEventDestroy(g->transferred));
    cuda_check(cudaStreamDestroy(g->stream));
}

// Transfers called from now on wait for what is on `stream` now.
static void gpus_after(Gpus *g, cudaStream_t stream) {
    cuda_check(cudaEventRecord(g->launched, stream));
    cuda_check(cudaStreamWaitEvent(g->stream, g->launched, 0));
}

// Work on `stream` from now on waits for the transfers called so far.
static void gpus_before(Gpus *g, cudaStream_t stream) {
    cuda_check(cudaEventRecord(g->transferred, g->stream));
    cuda_check(cudaStreamWaitEvent(stream, g->transferred, 0));
}

// Sums over all ranks of `count` numbers in place, on every rank.
static void gpus_sum(Gpus *g, double *numbers, int64_t count) {
    nccl_check(ncclAllReduce(numbers, numbers, count, ncclFloat64, ncclSum, g->world, g->stream));
    (void)g, (void)numbers, (void)count;
}

// Sums over all ranks of unit u's gradients, which begin at `grads`, in place: with stage 0 all of them on
// every rank, else each rank's piece on that rank. Traffic of a rank: 8 bytes a number of the unit in stage
// 0, else 4.
static void gpus_reduce_unit(Gpus *g, const Zero *z, int64_t u, float *grads) {
    const ZeroUnit *unit = &z->units[u];
    const int64_t size = unit->end - unit->begin, even = unit->piece * z->ranks;
    if (z->stage == 0) {
        nccl_check(ncclAllReduce(grads, grads, size, ncclFloat32, ncclSum, g->world, g->stream));
        return;
    }
    nccl_check(ncclGroupStart());
    nccl_check(ncclReduceScatter(grads, grads + g->rank * unit->piece, unit->piece, ncclFloat32, ncclSum,
                                 g->world, g->stream));
    if (even < size)
        nccl_check(ncclReduce(grads + even, grads + even, size - even, ncclFloat32, ncclSum, g->ranks - 1,
                              g->world, g->stream));
    nccl_check(ncclGroupEnd());
    (void)g, (void)grads;
}

// Every rank's piece of unit u, of numbers of `bytes`, to all ranks; `data` is where the unit begins.
static void gpus_gather_unit(Gpus *g, const Zero *z, int64_t u, void *data, int64_t bytes) {
    const ZeroUnit *unit = &z->units[u];
    const int64_t piece = unit->piece * bytes, even = piece * z->ranks;
    const int64_t rest = (unit->end - unit->begin) * bytes - even;
    char *begin = (char *)data;
    nccl_check(ncclGroupStart());
    nccl_check(ncclAllGather(begin + g->rank * piece, begin, piece, ncclInt8, g->world, g->stream));
    if (rest > 0)
        nccl_check(
            ncclBroadcast(begin + even, begin + even, rest, ncclInt8, g->ranks - 1, g->world, g->stream));
    nccl_check(ncclGroupEnd());
    (void)g, (void)begin;
}

// sum[i] += x[i]: 12 bytes a number; memory binds.
static __global__ void __launch_bounds__(256) add_arrays_kernel(float *sum, const float *x, int64_t count) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i < count) sum[i] += x[i];
}
static void add_arrays(float *sum, const float *x, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    add_arrays_kernel<<<(unsigned)((count + 255) / 256), 256, 0, stream>>>(sum, x, count);
    cuda_check(cudaGetLastError());
}

// all [context * bytes] = `mine` of every rank of the group.
static void gpus_gather_bytes(Gpus *g, void *all, const void *mine, int64_t bytes) {
    nccl_check(ncclAllGather(mine, all, bytes, ncclInt8, g->group, g->stream));
    (void)g, (void)all, (void)mine, (void)bytes;
}

// ---- context parallel ------------------------------------------------------------------------------------
// Moves blocks of `quads` 16-byte pieces between slots and places (context_parallel.h): out[place[i]] =
// in[i], or with `back` out[i] = in[place[i]]. Reads and writes each byte once; memory binds.
static __global__ void __launch_bounds__(256)
    place_blocks_kernel(uint4 *out, const uint4 *in, const int32_t *place, int64_t quads, int back) {
    const int64_t slot = blockIdx.y * quads, at = place[blockIdx.y] * quads;
    const int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= quads) return;
    if (back)
        out[slot + i] = in[at + i];
    else
        out[at + i] = in[slot + i];
}
static void place_blocks(void *out, const void *in, const int32_t *place, int64_t blocks, int64_t bytes,
                         int back, cudaStream_t stream) {
    if (bytes % 16) die("context parallel: blocks of %lld bytes, no multiple of 16", (long long)bytes);
    dim3 grid((unsigned)((bytes / 16 + 255) / 256), (unsigned)blocks);
    place_blocks_kernel<<<grid, 256, 0, stream>>>((uint4 *)out, (const uint4 *)in, place, bytes / 16, back);
    cuda_check(cudaGetLastError());
}

// out's row i of `width` numbers, `stride` apart, = the sum over r of row i of parts[r*count], in fp32 and in
// the order of r, rounded once; count is of all rows. Reads 2 bytes a part and number, writes 2; memory
// binds.
template <typename T>
static __global__ void __launch_bounds__(256)
    sum_parts_kernel(T *out, const T *parts, int num_parts, int64_t count, int64_t width, int64_t stride) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= count) return;
    float sum = 0;
    for (int r = 0; r < num_parts; r++) sum += (float)parts[r * count + i];
    out[i / width * stride + i % width] = (T)sum;
}
template <typename T>
static void sum_parts(T *out, const T *parts, int num_parts, int64_t count, int64_t width, int64_t stride,
                      cudaStream_t stream) {
    unsigned grid = (unsigned)((count + 255) / 256);
    sum_parts_kernel<T><<<grid, 256, 0, stream>>>(out, parts, num_parts, count, width, stride);
    cuda_check(cudaGetLastError());
}

// n rows of `width` numbers, from rows `from_stride` apart to rows `to_stride` apart.
template <typename T>
static void copy_columns(T *to, int64_t to_stride, const T *from, int64_t from_stride, int64_t width,
                         int64_t n, cudaStream_t stream) {
    cuda_check(cudaMemcpy2DAsync(to, to_stride * sizeof(T), from, from_stride * sizeof(T), width * sizeof(T),
                                 n, cudaMemcpyDeviceToDevice, stream));
}

// all [n rows of `width`] = the rows of every rank of the group at their places in the batch; mine
// [n/context], rows `stride` apart. `slots` [n] is scratch. Each rank receives (context - 1)/context of the
// rows.
template <typename T>
static void gpus_gather_rows(Gpus *g, T *all, T *slots, const T *mine, int64_t n, int64_t width,
                             int64_t stride, const int32_t *place, int64_t blocks) {
    const int64_t rows = n / g->context, size = (int64_t)sizeof(T);
    T *own = slots + g->context_rank * rows * width;
    copy_columns(own, width, mine, stride, width, rows, g->stream);
    gpus_gather_bytes(g, slots, own, rows * width * size);
    place_blocks(all, slots, place, blocks, n / blocks * width * size, 0, g->stream);
}

// mine [n/context rows, `stride` apart] = the sum of every rank's `all` [n rows of `width`] over the group,
// where each row is summed on the rank that it belongs to. Overwrites `all` and `slots` [n]. As much traffic
// as gpus_gather_rows.
template <typename T>
static void gpus_sum_rows(Gpus *g, T *mine, T *all, T *slots, int64_t n, int64_t width, int64_t stride,
                          const int32_t *place, int64_t blocks) {
    const int64_t count = n / g->context * width;
    place_blocks(slots, all, place, blocks, n / blocks * width * (int64_t)sizeof(T), 1, g->stream);
    nccl_check(ncclGroupStart());
    for (int r = 0; r < g->context; r++) {
        nccl_check(ncclSend(slots + r * count, count * sizeof(T), ncclInt8, r, g->group, g->stream));
        nccl_check(ncclRecv(all + r * count, count * sizeof(T), ncclInt8, r, g->group, g->stream));
    }
    nccl_check(ncclGroupEnd());
    sum_parts(mine, all, g->context, count, width, stride, g->stream);
}
#endif
