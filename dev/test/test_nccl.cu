// test_nccl.cu: the transfers of llmc/nccl.cuh between processes, one for each GPU of this host, or 2 to 4 on
// the emulator: sums and gathers of units that ranks do not divide, and rows of a shared sequence, against
// what each rank can compute alone. Built with -DMULTI_GPU.
#include "../../llmc/nccl.cuh"
#include "ranks.h"
#include "test.h"
#include <vector>

static Comm comm;
static Gpus gpus;

template <typename T> static T *to_gpu(const std::vector<T> &x) {
    T *p;
    cuda_check(cudaMalloc((void **)&p, x.size() * sizeof(T) + 16));
    cuda_check(cudaMemcpy(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    cuda_check(cudaDeviceSynchronize()); // the transfers' stream does not wait for copies
    return p;
}
template <typename T> static std::vector<T> from_gpu(T *p, size_t n) {
    std::vector<T> x(n);
    cuda_check(cudaDeviceSynchronize());
    cuda_check(cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    cuda_check(cudaFree(p));
    return x;
}

// Gradient i of a rank: a whole number, so that sums are exact in any order.
static float number(int rank, int64_t i) {
    return (float)((i * 7 + rank * 13) % 101);
}

static void test_units(void) {
    ParamTensor tensors[4];
    const int64_t sizes[4] = {8, 8 * 1237, 8 * 64,
                              8 * 40003}; // smaller than, beside and beyond what ranks divide
    int64_t total = 0;
    memset(tensors, 0, sizeof tensors);
    for (int i = 0; i < 4; i++)
        tensors[i].layer = i, tensors[i].offset = total, tensors[i].size = sizes[i], total += sizes[i];
    for (int stage = 0; stage <= 2; stage++) {
        ZeroPartition z;
        zero_partition_build(&z, stage, gpus.rank, gpus.ranks, tensors, 4);
        std::vector<float> mine(total), want(total);
        for (int64_t i = 0; i < total; i++) {
            mine[i] = number(gpus.rank, i);
            for (int r = 0; r < gpus.ranks; r++) want[i] += number(r, i);
        }
        float *grads = to_gpu(mine);
        std::vector<int16_t> weights(total, -1); // an owner's are its rank and the place
        for (int64_t u = 0; u < z.num_units; u++) {
            int64_t begin, end;
            zero_partition(&z, u, gpus.rank, &begin, &end);
            for (int64_t i = begin; i < end; i++) weights[i] = (int16_t)(i * 5 % 30000);
        }
        int16_t *params = to_gpu(weights);
        for (int64_t u = 0; u < z.num_units; u++) {
            gpus_reduce_unit(&gpus, &z, u, grads + z.units[u].begin);
            gpus_all_gather_unit(&gpus, &z, u, params + z.units[u].begin, sizeof(int16_t));
        }
        mine = from_gpu(grads, total), weights = from_gpu(params, total);
        int64_t wrong = 0, lost = 0;
        for (int64_t u = 0; u < z.num_units; u++) {
            int64_t begin, end;
            zero_owned(&z, u, gpus.rank, &begin, &end);
            for (int64_t i = begin; i < end; i++) wrong += mine[i] != want[i];
        }
        for (int64_t i = 0; i < total; i++) lost += weights[i] != (int16_t)(i * 5 % 30000);
        CHECK(wrong == 0 && lost == 0, "rank %d of %d, stage %d: %lld sums wrong, %lld weights lost",
              gpus.rank, gpus.ranks, stage, (long long)wrong, (long long)lost);
        zero_partition_free(&z);
    }
    double parts[3] = {gpus.rank + 1.0, 0.5, gpus.rank == 0 ? 1.0 : 0.0};
    double *sums = to_gpu(std::vector<double>(parts, parts + 3));
    gpus_all_reduce(&gpus, sums, 3);
    std::vector<double> got = from_gpu(sums, 3);
    int n = gpus.ranks;
    CHECK(got[0] == n * (n + 1) / 2 && got[1] == n * 0.5 && got[2] == 1, "sums %g %g %g", got[0], got[1],
          got[2]);
}

// Rows of documents, divided, gathered, and their gradients summed: the middle one of three groups of
// columns.
static void test_rows(void) {
    ModelConfig c;
    config_from_preset(&c, preset_find("recall"));
    const int64_t cu_seqlens[4] = {0, 100, 130, 96 * gpus.cp_size}, width = 8, stride = 3 * width;
    const int64_t n = cu_seqlens[3], chunks = cp_num_chunks(n, 3, gpus.cp_size), each = n / gpus.cp_size;
    std::vector<int32_t> place(chunks);
    cp_assign_chunks(&c, cu_seqlens, 3, gpus.cp_size, chunks, place.data(), NULL);
    typedef __nv_bfloat16 T;
    std::vector<T> all(n * width), mine(each * width), wide(each * stride, (T)-1.0f), partial(n * width);
    for (int64_t i = 0; i < n * width; i++) all[i] = (T)(float)(i % 251);
    cp_gather_rows(gpus.cp_size, n, chunks, place.data(), gpus.cp_rank, mine.data(), all.data(),
                   width * sizeof(T));
    for (int64_t i = 0; i < each * width; i++) wide[i / width * stride + width + i % width] = mine[i];
    int32_t *device_place = to_gpu(place);
    T *device_wide = to_gpu(wide), *device_all = to_gpu(partial), *slots = to_gpu(partial);
    gpus_all_gather_rows(&gpus, device_all, slots, device_wide + width, n, width, stride, device_place,
                         chunks);
    std::vector<T> got = from_gpu(device_all, n * width);
    int64_t wrong = 0;
    for (int64_t i = 0; i < n * width; i++) wrong += (float)got[i] != (float)all[i];
    CHECK(wrong == 0, "rank %d: %lld of %lld gathered numbers", gpus.rank, (long long)wrong,
          (long long)(n * width));
    // sums up to 256 are exact in bf16
    for (int64_t i = 0; i < n * width; i++) partial[i] = (T)(float)((i + 11 * gpus.cp_rank) % 61);
    device_all = to_gpu(partial);
    gpus_reduce_scatter_rows(&gpus, device_wide + width, device_all, slots, n, width, stride, device_place,
                             chunks);
    got = from_gpu(device_wide, each * stride);
    std::vector<T> sums(n * width), want(each * width);
    for (int64_t i = 0; i < n * width; i++) {
        float sum = 0;
        for (int r = 0; r < gpus.cp_size; r++) sum += (float)((i + 11 * r) % 61);
        sums[i] = (T)sum;
    }
    cp_gather_rows(gpus.cp_size, n, chunks, place.data(), gpus.cp_rank, want.data(), sums.data(),
                   width * sizeof(T));
    wrong = 0;
    for (int64_t i = 0; i < each * stride; i++) {
        const int64_t row = i / stride, column = i % stride - width;
        const bool moved = column >= 0 && column < width;
        wrong += (float)got[i] != (moved ? (float)want[row * width + column] : -1.0f);
    }
    CHECK(wrong == 0, "rank %d: %lld of %lld summed numbers", gpus.rank, (long long)wrong,
          (long long)(each * stride));
    cuda_check(cudaFree(device_all));
    cuda_check(cudaFree(slots));
    cuda_check(cudaFree(device_place));
}

// One of several processes, *where of which share a batch. Returns its exit code.
static int child(void *where) {
    const int cp_size = *(int *)where;
    comm_start(&comm);
    int devices;
    cuda_check(cudaGetDeviceCount(&devices));
    cuda_check(cudaSetDevice(comm.local_rank % devices));
    gpus_init(&gpus, &comm, cp_size);
    test_units();
    if (cp_size > 1) test_rows();
    gpus_free(&gpus);
    comm_end(&comm);
    return test_failed != 0;
}

int main(void) {
    struct {
        int ranks, cp_size;
    } runs[] = {{2, 1}, {2, 2}, {3, 3}, {4, 2}};
    alarm(300);
    const int devices = test_gpus();
    for (auto &run : runs) {
        if (run.ranks > devices) {
            SKIP("%d ranks: GPUS is %d", run.ranks, devices);
            continue;
        }
        int failed = test_ranks(run.ranks, child, &run.cp_size);
        CHECK(failed == 0, "%d of %d ranks failed, cp_size %d", failed, run.ranks, run.cp_size);
    }
    return test_end("test_nccl");
}
