// checkpoint.cuh: the parameters and AdamW's moments on their way between a checkpoint (checkpoint.h) and the
// GPUs that own them.
#ifndef LLMC_CHECKPOINT_CUH
#define LLMC_CHECKPOINT_CUH
#include "run.h"
#include "convert.cuh"
#include "optimizer.cuh"
#include "params.cuh"
#include <vector>

// Sets the parameters of unit u that this GPU owns, or all of them without training, from `values` on the
// host, which starts with the first of them. m and v, with the same layout, set AdamW's moments; NULL sets
// zeros.
static void set_unit_params(const Params *p, const Optimizer *a, int64_t u, const float *values,
                            const float *m, const float *v, cudaStream_t stream) {
    const ZeroUnit *unit = &p->zero.units[u];
    const bool training = a->master != NULL;
    int64_t begin = unit->begin, end = unit->end;
    if (training) zero_owned(&p->zero, u, p->zero.rank, &begin, &end);
    const int64_t count = end - begin, bytes = count * (int64_t)sizeof(float), shard = unit->shard_offset;
    if (training) {
        cuda_check(cudaMemcpy(a->master + shard, values, bytes, cudaMemcpyHostToDevice));
        cuda_check(cudaMemset(a->m + shard, 0, bytes));
        cuda_check(cudaMemset(a->v + shard, 0, bytes));
        if (m) cuda_check(cudaMemcpy(a->m + shard, m, bytes, cudaMemcpyHostToDevice));
        if (v) cuda_check(cudaMemcpy(a->v + shard, v, bytes, cudaMemcpyHostToDevice));
        cuda_check(cudaDeviceSynchronize()); // `stream` does not wait for these copies
        convert(p->weights + begin, a->master + shard, count, stream);
        params_share_unit(p, u, stream);
    } else { // without training there are no master weights
        std::vector<floatX> rounded(count);
        for (int64_t i = 0; i < count; i++) rounded[i] = (floatX)values[i];
        cuda_check(
            cudaMemcpy(p->weights + begin, rounded.data(), count * sizeof(floatX), cudaMemcpyHostToDevice));
    }
    cuda_check(cudaDeviceSynchronize());
}

// Sets the parameters, and AdamW's moments when the run resumes: from the checkpoint, or to initial values.
// Each process reads only what it owns.
static void load_params(const Run *r, const Params *p, const Optimizer *a, cudaStream_t stream) {
    const ZeroPartition *z = &p->zero;
    char msg[CHECKPOINT_MSG_BYTES];
    const bool from_file = r->checkpoint[0];
    Checkpoint file;
    if (from_file) {
        if (checkpoint_open(&file, r->checkpoint, msg)) die("%s; choose another checkpoint", msg);
        checkpoint_check_model(&file, &r->config);
    }
    for (int64_t u = 0; u < z->num_units; u++) {
        int64_t begin = z->units[u].begin, end = z->units[u].end;
        if (a->master) zero_owned(z, u, z->rank, &begin, &end);
        std::vector<float> arrays[3];
        for (int i = 0; i < (r->resuming ? 3 : 1); i++) {
            arrays[i].resize(end - begin);
            if (!from_file)
                params_init_part(&r->config, arrays[i].data(), begin, end, &r->init);
            else if (i == 0)
                checkpoint_init_missing(&file, &r->config, begin, end, arrays[i].data(), &r->init);
            if (from_file &&
                checkpoint_read_part(&file, &r->config, i, begin, end - begin, arrays[i].data(), msg))
                die("%s; choose another checkpoint", msg);
        }
        set_unit_params(p, a, u, arrays[0].data(), r->resuming ? arrays[1].data() : NULL,
                        r->resuming ? arrays[2].data() : NULL, stream);
    }
    if (from_file) checkpoint_close(&file);
}

// Copies elements [begin, end) of an array (0: master weights, 1: m, 2: v) to out on the host, on every
// process. With ZeRO each unit is gathered into its unit_grads, which nothing else uses between steps.
static void gather_state(const Params *p, const Optimizer *a, int array, int64_t begin, int64_t end,
                         float *out, cudaStream_t stream) {
    const ZeroPartition *z = &p->zero;
    float *const arrays[3] = {a->master, a->m, a->v};
    for (int64_t u = 0; u < z->num_units; u++) {
        const ZeroUnit *unit = &z->units[u];
        float *src = arrays[array] + unit->shard_offset;
        if (z->stage > 0) {
            int64_t first, last;
            zero_owned(z, u, z->rank, &first, &last);
            src = p->unit_grads[u];
            cuda_check(cudaMemcpyAsync(src + (first - unit->begin), arrays[array] + unit->shard_offset,
                                       (last - first) * sizeof(float), cudaMemcpyDeviceToDevice, stream));
            transfers_wait_for_compute(p->gpus, stream);
            gpus_all_gather_unit(p->gpus, z, u, src, sizeof(float));
            compute_waits_for_transfers(p->gpus, stream);
        }
        const int64_t first = std::max(begin, unit->begin), last = std::min(end, unit->end);
        if (first < last)
            cuda_check(cudaMemcpyAsync(out + (first - begin), src + (first - unit->begin),
                                       (last - first) * sizeof(float), cudaMemcpyDeviceToHost, stream));
    }
    cuda_check(cudaStreamSynchronize(stream));
}

// Writes a checkpoint; every process writes a part. The file is the same as the C trainer's, whatever the
// number of processes.
static void save_checkpoint(Run *r, const Params *p, Optimizer *a, const ParamLayout *layout,
                            cudaStream_t stream) {
    Comm *comm = &r->comm;
    const int64_t count = layout->num_params, chunks = checkpoint_num_chunks(count);
    const int64_t begin = chunks * comm->rank / comm->ranks * CHECKPOINT_CHUNK_FLOATS;
    const int64_t end = std::min(count, chunks * (comm->rank + 1) / comm->ranks * CHECKPOINT_CHUNK_FLOATS);
    AtomicFile file;
    char path[PATH_BYTES + 4] = "";
    if (comm->rank == 0) {
        checkpoint_begin(&file, r->opt.output, &r->config, &r->state, count, 3);
        snprintf(path, sizeof path, "%s", file.tmp);
    }
    comm_broadcast(comm, path, sizeof path);
    int fd = open(path, O_WRONLY | O_NOFOLLOW);
    if (fd < 0)
        die("cannot write %s: %s%s", path, strerror(errno),
            comm->rank > 0 ? "; the folder -o must be shared by all hosts" : "");
    float *part = (float *)xmalloc((end - begin) * sizeof(float));
    optimizer_finish(a, p, stream);
    for (int i = 0; i < 3; i++) {
        gather_state(p, a, i, begin, end, part, stream);
        checkpoint_write_part(fd, path, 3, i, count, begin, end - begin, part);
    }
    free(part);
    if (fsync(fd) != 0 || close(fd) != 0)
        die("cannot write %s: %s; check the free disk space and ulimit -f", path, strerror(errno));
    comm_barrier(comm);
    if (comm->rank > 0) return;
    atomic_commit(&file);
    checkpoint_prune(r->opt.output, r->opt.keep, r->state.step, comm->ranks == 1);
}
#endif
