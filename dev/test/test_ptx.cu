// test_ptx.cu: checks the functions of fsa/sm80/ptx.cuh and fsa/sm90/ptx.cuh against plain loops, on a GPU of
// compute capability 9.0 and in the emulator. So the emulator's functions do what the GPU's instructions do.
// usage: test_ptx [seed=N]
#include "../../fsa/sm90/ptx.cuh"
#include "../../fsa/sm90/tma.cuh"
#include "../cuda/common.h"
#include "test.h"

// c [64, N] = a b by one warpgroup, for every operand form of wgmma. TMA loads the operands in panels of 64
// columns: a as [64, K], or [K, 64] if trans_a; b as [N, K], or [K, skip + N] if trans_b, of which the first
// `skip` columns are not used. Box rows past the tensor become zero.
template <typename T, int N, int K, int trans_b, int trans_a, int in_registers, int skip>
__global__ void __launch_bounds__(128) wgmma_kernel(const __grid_constant__ CUtensorMap a_map,
                                                    const __grid_constant__ CUtensorMap b_map, float *c) {
    extern __shared__ __align__(1024) char smem[];
    const uint32_t start = (smem_address(smem) + 1023) & ~1023u;
    constexpr int B_ROWS = trans_b ? K : N, B_COLS = trans_b ? N + skip : K, B_PANELS = B_COLS / 64;
    const uint32_t smem_a = start, smem_b = smem_a + 64 * K * 2, barrier = smem_b + B_ROWS * B_COLS * 2;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(barrier, 64 * K * 2 + B_ROWS * B_COLS * 2);
        for (int p = 0; p < (trans_a ? 1 : K / 64); p++)
            tma_load_3d(smem_a + p * 64 * 128, &a_map, p * 64, 0, 0, barrier);
        for (int p = 0; p < B_PANELS; p++)
            tma_load_3d(smem_b + p * B_ROWS * 128, &b_map, p * 64, 0, 0, barrier);
    }
    mbarrier_wait(barrier, 0);
    float d[N / 8][4];
    wgmma_fence();
    for (int k = 0; k < K / 16; k++) {
        uint64_t b = trans_b ? make_smem_desc(smem_b + skip / 64 * B_ROWS * 128 + skip % 64 * 2 + k * 2048,
                                              B_ROWS * 128)
                             : make_smem_desc(smem_b + k / 4 * B_ROWS * 128 + k % 4 * 32);
        if (in_registers) {
            uint32_t r[4];
            int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + (lane & 15),
                chunk = k % 4 * 2 + lane / 16;
            ldmatrix_x4(r, smem_a + k / 4 * 64 * 128 + row * 128 + ((chunk ^ (row & 7)) << 4));
            wgmma_fence();
            wgmma_rs<T, trans_b>(d, r, b, k > 0);
            wgmma_commit();
            wgmma_wait<0>();
        } else {
            uint64_t a = make_smem_desc(smem_a + (trans_a ? k * 2048 : k / 4 * 64 * 128 + k % 4 * 32));
            wgmma_ss<T, trans_b, trans_a>(d, a, b, k > 0);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    fence_operand(d);
    for (int j = 0; j < N / 8; j++) {
        for (int i = 0; i < 4; i++) {
            int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 * 8,
                col = j * 8 + threadIdx.x % 4 * 2 + i % 2;
            c[row * N + col] = d[j][i];
        }
    }
}

template <typename T, int N, int K, int trans_b, int trans_a, int in_registers, int skip = 0>
static void test_wgmma(Random *r) {
    // The tensors have more columns than a row of the box, and 3 or 5 rows less than the box.
    constexpr int A_ROWS = (trans_a ? K : 64) - 3, A_COLS = trans_a ? 64 : K, B_ROWS = trans_b ? K : N,
                  B_COLS = trans_b ? N + skip : K, B_VALID = B_ROWS - 5;
    Host<T> a(r, A_ROWS * A_COLS * 3, 1), b(r, B_VALID * B_COLS * 2, 1);
    Buffer<T> a_(a.raw), b_(b.raw);
    Buffer<float> c_(64 * N);
    CUtensorMap a_map, b_map;
    int64_t a_size[] = {A_COLS, A_ROWS, 1}, a_stride[] = {2, 3 * A_COLS * 2, 3 * A_COLS * 2 * A_ROWS};
    int64_t b_size[] = {B_COLS, 1, B_VALID}, b_stride[] = {2, B_COLS * 2, 2 * B_COLS * 2};
    int a_box[] = {64, trans_a ? K : 64, 1}, b_box[] = {64, 1, B_ROWS};
    FSA_CHECK(make_tensor_map(&a_map, Dtype<T>::value, 3, a_.get(), a_size, a_stride, a_box));
    FSA_CHECK(make_tensor_map(&b_map, Dtype<T>::value, 3, b_.get(), b_size, b_stride, b_box));
    int smem = (64 * K + B_ROWS * B_COLS) * 2 + 8 + 1024;
    const auto kernel = wgmma_kernel<T, N, K, trans_b, trans_a, in_registers, skip>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    kernel<<<1, 128, smem>>>(a_map, b_map, c_);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<float> expected(64 * N, 0);
    for (int i = 0; i < 64; i++) {
        for (int n = 0; n < N; n++) {
            for (int k = 0; k < K; k++) {
                int a_row = trans_a ? k : i, a_col = trans_a ? i : k, row = trans_b ? k : n,
                    col = trans_b ? n + skip : k;
                if (a_row < A_ROWS && row < B_VALID)
                    expected[i * N + n] += a.f[a_row * 3 * A_COLS + a_col] * b.f[row * 2 * B_COLS + col];
            }
        }
    }
    double e = relative_error(c_.host(), expected);
    CHECK(e < 1e-5 && c_.guards_intact(), "%s N %d K %d trans_b %d trans_a %d in_registers %d skip %d: %.1e",
          Dtype<T>::name, N, K, trans_b, trans_a, in_registers, skip, e);
}

template <typename T> static void test_wgmma_forms(Random *r) {
    test_wgmma<T, 64, 64, 0, 0, 0>(r);
    test_wgmma<T, 128, 128, 0, 0, 0>(r);
    test_wgmma<T, 32, 128, 0, 0, 0>(r);
    test_wgmma<T, 64, 128, 1, 0, 0>(r);
    test_wgmma<T, 128, 64, 1, 0, 0>(r);
    test_wgmma<T, 64, 128, 1, 1, 0>(r);
    test_wgmma<T, 128, 64, 0, 1, 0>(r);
    test_wgmma<T, 128, 128, 1, 0, 1>(r);
    test_wgmma<T, 64, 64, 0, 0, 1>(r);
    test_wgmma<T, 64, 128, 1, 1, 0, 64>(r);
    test_wgmma<T, 32, 128, 1, 1, 0, 32>(r);
}

// A pipeline of two stages: one thread loads rows by bulk copies, 128 threads add them up.
__global__ void __launch_bounds__(160) pipeline_kernel(const float *rows, int count, float *sums) {
    extern __shared__ __align__(1024) char smem[];
    const uint32_t start = smem_address(smem), full = start + 1024, empty = full + 16;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, 128);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        float sum = 0;
        for (int i = 0; i < count; i++) {
            mbarrier_wait(full + 8 * (i % 2), i / 2 % 2);
            sum += *(float *)(smem + i % 2 * 512 + threadIdx.x * 4);
            mbarrier_arrive(empty + 8 * (i % 2));
        }
        sums[threadIdx.x] = sum;
    } else if (threadIdx.x == 128) {
        for (int i = 0; i < count; i++) {
            if (i >= 2) mbarrier_wait(empty + 8 * (i % 2), (i / 2 - 1) % 2);
            mbarrier_arrive_expect_tx(full + 8 * (i % 2), 512);
            bulk_load(start + i % 2 * 512, rows + i * 128, 512, full + 8 * (i % 2));
        }
    }
}

static void test_pipeline(Random *r) {
    const int count = 37;
    std::vector<float> rows(count * 128), expected(128, 0);
    for (float &x : rows) x = (float)r->below(1000);
    for (int i = 0; i < count * 128; i++) expected[i % 128] += rows[i];
    Buffer<float> rows_(rows), sums(128);
    pipeline_kernel<<<1, 160, 1024 + 32>>>(rows_, count, sums);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaDeviceSynchronize());
    CHECK(sums.host() == expected, "pipeline: wrong sums of %d rows", count);
}

// Thread blocks take items from a counter and add their rows to the same sums, ordered by a semaphore. fp32
// sums show any other order. The first item overwrites. semaphores: [0] the counter, [1] the semaphore.
__global__ void __launch_bounds__(128)
    semaphore_kernel(const float *rows, int count, int *semaphores, float *sums) {
    extern __shared__ __align__(1024) char smem[];
    __shared__ int next_item;
    for (;;) {
        if (threadIdx.x == 0) next_item = atomicAdd(semaphores, 1);
        __syncthreads();
        const int item = next_item;
        if (item >= count) return;
        ((float *)smem)[threadIdx.x] = rows[item * 128 + threadIdx.x];
        fence_proxy_async();
        __syncthreads();
        if (threadIdx.x == 0) {
            semaphore_wait(semaphores + 1, item);
            if (item == 0)
                bulk_store(sums, smem_address(smem), 512);
            else
                bulk_reduce_add(sums, smem_address(smem), 512);
            bulk_commit();
            bulk_wait_read();
            bulk_wait();
            semaphore_release(semaphores + 1);
        }
        __syncthreads();
    }
}

static void test_semaphore(Random *r) {
    const int count = 3000;
    std::vector<float> rows(count * 128), expected(128, 0);
    for (float &x : rows) x = r->normal() * expf(3 * r->normal());
    for (int i = 0; i < count * 128; i++) expected[i % 128] = i < 128 ? rows[i] : expected[i % 128] + rows[i];
    Buffer<float> rows_(rows), sums(128);
    Buffer<int> semaphores(2);
    semaphores.zero();
    semaphore_kernel<<<300, 128, 1024>>>(rows_, count, semaphores, sums);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaDeviceSynchronize());
    CHECK(sums.host() == expected && sums.guards_intact(), "semaphore: wrong sums of %d rows", count);
}

int main(int argc, char **argv) {
    int devices = 0;
    cudaDeviceProp p;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 ||
        cudaGetDeviceProperties(&p, 0) != cudaSuccess || p.major != 9) {
        SKIP("no GPU of compute capability 9.0");
        return test_end("test_ptx");
    }
    Random r(seed_from_args(argc, argv));
    test_wgmma_forms<__nv_bfloat16>(&r);
    test_wgmma_forms<__half>(&r);
    test_pipeline(&r);
    test_semaphore(&r);
    return test_end("test_ptx");
}
