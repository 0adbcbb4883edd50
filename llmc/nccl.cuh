// nccl.cuh: transfers between GPUs, one process per GPU: gradients to their owners and weights back to all
// ranks (ZeRO, zero.h), and the keys and values of a shared batch (context_parallel.h). Needs -DMULTI_GPU;
// without it there is one GPU and every transfer is empty.
//
// All transfers run on one stream, in an order that is the same on all ranks. With two streams the kernels of
// two communicators could wait for each other.
#ifndef LLMC_NCCL_CUH
#define LLMC_NCCL_CUH
#include "comm.h"
#include "context_parallel.h"
#include "cuda_common.cuh"
#include "zero.h"

#ifdef MULTI_GPU
#include <nccl.h>
// Exits with the file, the line, the call and NCCL's error text unless `call` succeeds. A call also fails if
// another process ended. The macro sleeps three seconds first, so that comm.h's monitor thread can report
// that process.
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

// One process of `ranks`, on its own GPU. Groups of cp_size neighbouring ranks share each batch.
typedef struct {
    Comm *comm;
    int rank, ranks;
    int cp_size, cp_rank;       // ranks of a context-parallel group, and this one's index in its group
    ncclComm_t world_comm;      // of all ranks
    ncclComm_t cp_comm;         // of this rank's context-parallel group
    cudaStream_t stream;        // all transfers run on it
    cudaEvent_t compute_done;   // recorded and awaited by transfers_wait_for_compute
    cudaEvent_t transfers_done; // recorded and awaited by compute_waits_for_transfers
} Gpus;

#ifdef MULTI_GPU
// Called repeatedly by comm.h's monitor thread with the Gpus as arg. Returns NCCL's asynchronous error, or
// NULL. The first two reports are held back: if they come from the end of another process, comm.h names it
// within the next seconds.
static const char *gpus_async_error(void *arg) {
    static char why[COMM_TEXT_BYTES];
    static int calls;
    Gpus *g = (Gpus *)arg;
    ncclResult_t error = ncclSuccess;
    ncclComm_t all[2] = {g->world_comm, g->cp_comm};
    for (int i = 0; i < 2 && error == ncclSuccess; i++)
        if (all[i] && ncclCommGetAsyncError(all[i], &error) == ncclSuccess && error == ncclInProgress)
            error = ncclSuccess;
    if (error == ncclSuccess || calls++ < 2) return NULL;
    snprintf(why, sizeof why, "NCCL: %s", ncclGetErrorString(error));
    return why;
}

// Creates the communicators of all ranks and of this rank's context-parallel group. Rank 0's id is all that
// NCCL needs: its bootstrap exchanges the ranks' addresses.
static void gpus_create_comms(Gpus *g) {
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    if (g->rank == 0) nccl_check(ncclGetUniqueId(&id));
    comm_broadcast(g->comm, &id, sizeof id);
    ncclResult_t result = ncclCommInitRank(&g->world_comm, g->ranks, id, g->rank);
    if (result == ncclInvalidUsage)
        die("NCCL: %s; check that each process of a host has its own GPU", ncclGetErrorString(result));
    nccl_check(result);
    if (g->cp_size > 1)
        nccl_check(ncclCommSplit(g->world_comm, g->rank / g->cp_size, g->cp_rank, &g->cp_comm, NULL));
}
#endif

// Creates the communicators and the stream on the current GPU. comm comes from comm_start; cp_size, the ranks
// that share a batch, divides its number of ranks.
static void gpus_init(Gpus *g, Comm *comm, int cp_size) {
    memset(g, 0, sizeof *g);
    g->comm = comm, g->rank = comm->rank, g->ranks = comm->ranks;
    g->cp_size = cp_size, g->cp_rank = g->rank % cp_size;
    if (g->ranks == 1) return;
    // Highest priority: the thread blocks of a large matmul would delay a transfer's until the matmul ends.
    int least, greatest;
    cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    cuda_check(cudaStreamCreateWithPriority(&g->stream, cudaStreamNonBlocking, greatest));
    cuda_check(cudaEventCreateWithFlags(&g->compute_done, cudaEventDisableTiming));
    cuda_check(cudaEventCreateWithFlags(&g->transfers_done, cudaEventDisableTiming));
#ifdef MULTI_GPU
    gpus_create_comms(g);
    comm_set_error_check(comm, gpus_async_error, g);
#endif
}

static void gpus_free(Gpus *g) {
    if (g->ranks == 1) return;
    cuda_check(cudaStreamSynchronize(g->stream));
#ifdef MULTI_GPU
    comm_set_error_check(g->comm, NULL, NULL);
    comm_barrier(g->comm); // no rank leaves while another still transfers
    if (g->cp_comm) nccl_check(ncclCommDestroy(g->cp_comm));
    nccl_check(ncclCommDestroy(g->world_comm));
#endif
    cuda_check(cudaEventDestroy(g->compute_done));
    cuda_check(cudaEventDestroy(g->transfers_done));
    cuda_check(cudaStreamDestroy(g->stream));
}

// Transfers that are launched later wait for the work that is on `stream` now.
static void transfers_wait_for_compute(Gpus *g, cudaStream_t stream) {
    cuda_check(cudaEventRecord(g->compute_done, stream));
    cuda_check(cudaStreamWaitEvent(g->stream, g->compute_done, 0));
}

// Work that is launched later on `stream` waits for the transfers launched so far.
static void compute_waits_for_transfers(Gpus *g, cudaStream_t stream) {
    cuda_check(cudaEventRecord(g->transfers_done, g->stream));
    cuda_check(cudaStreamWaitEvent(stream, g->transfers_done, 0));
}

// Sums x [count], on the device, over all ranks, in place.
static void gpus_all_reduce(Gpus *g, double *x, int64_t count) {
    nccl_check(ncclAllReduce(x, x, count, ncclFloat64, ncclSum, g->world_comm, g->stream));
    (void)g, (void)x, (void)count;
}

// Sums the gradients of unit u, which begin at `grads`, over all ranks in place. With stage 0 every rank gets
// all sums (all-reduce, 8 bytes of traffic per element); else each rank gets those of its partition
// (reduce-scatter, 4 bytes).
static void gpus_reduce_unit(Gpus *g, const ZeroPartition *z, int64_t u, float *grads) {
    const ZeroUnit *unit = &z->units[u];
    const int64_t size = unit->end - unit->begin, even = unit->partition_size * z->ranks;
    if (z->stage == 0) {
        nccl_check(ncclAllReduce(grads, grads, size, ncclFloat32, ncclSum, g->world_comm, g->stream));
        return;
    }
    nccl_check(ncclGroupStart());
    nccl_check(ncclReduceScatter(grads, grads + g->rank * unit->partition_size, unit->partition_size,
                                 ncclFloat32, ncclSum, g->world_comm, g->stream));
    if (even < size)
        nccl_check(ncclReduce(grads + even, grads + even, size - even, ncclFloat32, ncclSum, g->ranks - 1,
                              g->world_comm, g->stream));
    nccl_check(ncclGroupEnd());
    (void)g, (void)grads;
}

// Gathers the partitions of unit u, which begins at `data` and has elements of `bytes` bytes, on all ranks in
// place.
static void gpus_all_gather_unit(Gpus *g, const ZeroPartition *z, int64_t u, void *data, int64_t bytes) {
    const ZeroUnit *unit = &z->units[u];
    const int64_t part = unit->partition_size * bytes, even = part * z->ranks;
    const int64_t rest = (unit->end - unit->begin) * bytes - even;
    nccl_check(ncclGroupStart());
    nccl_check(ncclAllGather((char *)data + g->rank * part, data, part, ncclInt8, g->world_comm, g->stream));
    if (rest > 0)
        nccl_check(ncclBroadcast((char *)data + even, (char *)data + even, rest, ncclInt8, g->ranks - 1,
                                 g->world_comm, g->stream));
    nccl_check(ncclGroupEnd());
    (void)g, (void)data;
}

// sum[i] += x[i]. Memory-bound: 12 bytes per element.
static __global__ void __launch_bounds__(256) add_arrays_kernel(float *sum, const float *x, int64_t count) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i < count) sum[i] += x[i];
}
// sum [count] += x [count].
static void add_arrays(float *sum, const float *x, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    add_arrays_kernel<<<(unsigned)((count + 255) / 256), 256, 0, stream>>>(sum, x, count);
    cuda_check(cudaGetLastError());
}

// all = `local` of every rank of the context-parallel group, in rank order. local has `bytes` bytes, all
// cp_size times as many; local may be its own part of all.
static void gpus_all_gather(Gpus *g, void *all, const void *local, int64_t bytes) {
    nccl_check(ncclAllGather(local, all, bytes, ncclInt8, g->cp_comm, g->stream));
    (void)g, (void)all, (void)local, (void)bytes;
}

// ---- context parallel ------------------------------------------------------------------------------------
// Permutes the chunks of `in` by chunk_perm (context_parallel.h): scatters them from rank order to sequence
// order, out[chunk_perm[i]] = in[i]; with `inverse` gathers them back, out[i] = in[chunk_perm[i]]. A chunk
// has `packs` packs of 16 bytes; grid: x packs, y chunks. Memory-bound: reads and writes each byte once.
static __global__ void __launch_bounds__(256)
    permute_chunks_kernel(uint4 *out, const uint4 *in, const int32_t *chunk_perm, int64_t packs,
                          int inverse) {
    const int64_t rank_offset = blockIdx.y * packs, seq_offset = chunk_perm[blockIdx.y] * packs;
    const int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= packs) return;
    if (inverse)
        out[rank_offset + i] = in[seq_offset + i];
    else
        out[seq_offset + i] = in[rank_offset + i];
}
// The same for `chunks` chunks of `bytes` bytes, a multiple of 16.
static void permute_chunks(void *out, const void *in, const int32_t *chunk_perm, int64_t chunks,
                           int64_t bytes, int inverse, cudaStream_t stream) {
    if (bytes % 16) die("context parallel: chunks of %lld bytes: must be a multiple of 16", (long long)bytes);
    dim3 grid((unsigned)((bytes / 16 + 255) / 256), (unsigned)chunks);
    permute_chunks_kernel<<<grid, 256, 0, stream>>>((uint4 *)out, (const uint4 *)in, chunk_perm, bytes / 16,
                                                    inverse);
    cuda_check(cudaGetLastError());
}

// out[row, column] = the sum over r of parts[r, row, column]: parts [num_parts, rows, width] are contiguous,
// rows of out are `stride` elements apart, count = rows * width. Sums in fp32 in the order of r and rounds
// once. Memory-bound: reads 2 bytes per element of parts and writes 2 bytes per element of out.
template <typename T>
static __global__ void __launch_bounds__(256)
    sum_parts_kernel(T *out, const T *parts, int num_parts, int64_t count, int64_t width, int64_t stride) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= count) return;
    float sum = 0;
    for (int r = 0; r < num_parts; r++) sum += (float)parts[r * count + i];
    out[i / width * stride + i % width] = (T)sum;
}
// Launches sum_parts_kernel.
template <typename T>
static void sum_parts(T *out, const T *parts, int num_parts, int64_t count, int64_t width, int64_t stride,
                      cudaStream_t stream) {
    unsigned grid = (unsigned)((count + 255) / 256);
    sum_parts_kernel<T><<<grid, 256, 0, stream>>>(out, parts, num_parts, count, width, stride);
    cuda_check(cudaGetLastError());
}

// dst = src, n rows of `width` elements; rows are dst_stride and src_stride elements apart.
template <typename T>
static void copy_columns(T *dst, int64_t dst_stride, const T *src, int64_t src_stride, int64_t width,
                         int64_t n, cudaStream_t stream) {
    cuda_check(cudaMemcpy2DAsync(dst, dst_stride * sizeof(T), src, src_stride * sizeof(T), width * sizeof(T),
                                 n, cudaMemcpyDeviceToDevice, stream));
}

// Gathers the rows of every rank of the group: all [n, width], in sequence order. local [n/cp_size] holds
// this rank's rows, `stride` elements apart; scratch [n, width]; chunk_perm [chunks] on the device. Each rank
// receives (cp_size - 1)/cp_size of the rows.
template <typename T>
static void gpus_all_gather_rows(Gpus *g, T *all, T *scratch, const T *local, int64_t n, int64_t width,
                                 int64_t stride, const int32_t *chunk_perm, int64_t chunks) {
    const int64_t rows = n / g->cp_size, size = (int64_t)sizeof(T);
    T *own = scratch + g->cp_rank * rows * width;
    copy_columns(own, width, local, stride, width, rows, g->stream);
    gpus_all_gather(g, scratch, own, rows * width * size);
    permute_chunks(all, scratch, chunk_perm, chunks, n / chunks * width * size, 0, g->stream);
}

// Sums `all` [n, width], in sequence order, over the group. Each rank gets the sums of its own rows in local
// [n/cp_size], `stride` elements apart. Overwrites `all` and scratch [n, width]. Transfers as much as
// gpus_all_gather_rows.
template <typename T>
static void gpus_reduce_scatter_rows(Gpus *g, T *local, T *all, T *scratch, int64_t n, int64_t width,
                                     int64_t stride, const int32_t *chunk_perm, int64_t chunks) {
    const int64_t count = n / g->cp_size * width;
    permute_chunks(scratch, all, chunk_perm, chunks, n / chunks * width * (int64_t)sizeof(T), 1, g->stream);
    nccl_check(ncclGroupStart());
    for (int r = 0; r < g->cp_size; r++) {
        nccl_check(ncclSend(scratch + r * count, count * sizeof(T), ncclInt8, r, g->cp_comm, g->stream));
        nccl_check(ncclRecv(all + r * count, count * sizeof(T), ncclInt8, r, g->cp_comm, g->stream));
    }
    nccl_check(ncclGroupEnd());
    sum_parts(local, all, g->cp_size, count, width, stride, g->stream);
}
#endif
