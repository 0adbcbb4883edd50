// test_ptx.cu: the instructions of fsa/ptx.cuh and fsa/ptx_sm90.cuh against plain loops, on a GPU of compute
// capability 9.0, and the emulator's against the same loops: what the emulator takes them to do is what the
// GPU does.
//   test_ptx [seed=N]
#include "../../fsa/sm90/ptx.cuh"
#include "../../fsa/sm90/tma.cuh"
#include "../cuda/common.h"
#include "test.h"

// c [64, N] = a b, by one warpgroup, K in panels of 64: every operand form of wgmma. TMA brings a as [64, K]
// or, transposed, as [K, 64], and b as [N, K] or, transposed, as [K, N] or the columns from `skip` on of such a
// tile; box rows past the tensor come as zeros.
template <typename T, int N, int K, int trans_b, int trans_a, int in_registers, int skip>
__global__ void __launch_bounds__(128) product_kernel(const __grid_constant__ CUtensorMap a_map,
                                                      const __grid_constant__ CUtensorMap b_map, float *c) {
    extern __shared__ __align__(1024) char smem[];
    const uint32_t start = (smem_address(smem) + 1023) & ~1023u;
    constexpr int B_ROWS = trans_b ? K : N, B_COLS = trans_b ? N + skip : K, B_PANELS = B_COLS / 64;
    const uint32_t a_at = start, b_at = a_at + 64 * K * 2, barrier = b_at + B_ROWS * B_COLS * 2;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(barrier, 64 * K * 2 + B_ROWS * B_COLS * 2);
        for (int p = 0; p < (trans_a ? 1 : K / 64); p++)
            tma_load_3d(a_at + p * 64 * 128, &a_map, p * 64, 0, 0, barrier);
        for (int p = 0; p < B_PANELS; p++)
            tma_load_4d(b_at + p * B_ROWS * 128, &b_map, p * 64, 0, 0, 0, barrier);
    }
    mbarrier_wait(barrier, 0);
    float d[N / 8][4];
    wgmma_fence();
    for (int k = 0; k < K / 16; k++) {
        uint64_t b = trans_b ? make_smem_desc(b_at + skip / 64 * B_ROWS * 128 + skip % 64 * 2 + k * 2048, B_ROWS * 128)
                             : make_smem_desc(b_at + k / 4 * B_ROWS * 128 + k % 4 * 32);
        if (in_registers) {
            uint32_t r[4];
            int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + (lane & 15),
                chunk = k % 4 * 2 + lane / 16;
            ldmatrix_x4(r, a_at + k / 4 * 64 * 128 + row * 128 + ((chunk ^ (row & 7)) << 4));
            wgmma_fence();
            wgmma_rs<T, trans_b>(d, r, b, k > 0);
            wgmma_commit();
            wgmma_wait<0>();
        } else {
            uint64_t a = make_smem_desc(a_at + (trans_a ? k * 2048 : k / 4 * 64 * 128 + k % 4 * 32));
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
static void test_product(Random *r) {
    // The tensors have more columns than a row of the box, and 3 and 5 fewer rows than the box.
    constexpr int A_ROWS = (trans_a ? K : 64) - 3, A_COLS = trans_a ? 64 : K, B_ROWS = trans_b ? K : N,
                  B_COLS = trans_b ? N + skip : K, B_THERE = B_ROWS - 5;
    Host<T> a(r, A_ROWS * A_COLS * 3, 1), b(r, B_THERE * B_COLS * 2, 1);
    Buffer<T> a_(a.raw), b_(b.raw);
    Buffer<float> c_(64 * N);
    CUtensorMap a_map, b_map;
    int64_t a_size[] = {A_COLS, A_ROWS, 1}, a_stride[] = {2, 3 * A_COLS * 2, 3 * A_COLS * 2 * A_ROWS};
    int64_t b_size[] = {B_COLS, 1, B_THERE, 1},
            b_stride[] = {2, B_COLS * 2, 2 * B_COLS * 2, 2 * B_COLS * 2 * B_THERE};
    int a_box[] = {64, trans_a ? K : 64, 1}, b_box[] = {64, 1, B_ROWS, 1};
    FSA_CHECK(make_tensor_map(&a_map, Dtype<T>::value, 3, a_.get(), a_size, a_stride, a_box));
    FSA_CHECK(make_tensor_map(&b_map, Dtype<T>::value, 4, b_.get(), b_size, b_stride, b_box));
    int smem = (64 * K + B_ROWS * B_COLS) * 2 + 8 + 1024;
    const auto kernel = product_kernel<T, N, K, trans_b, trans_a, in_registers, skip>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    kernel<<<1, 128, smem>>>(a_map, b_map, c_);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<float> want(64 * N, 0);
    for (int i = 0; i < 64; i++) {
        for (int n = 0; n < N; n++) {
            for (int k = 0; k < K; k++) {
                int a_row = trans_a ? k : i, a_col = trans_a ? i : k, row = trans_b ? k : n,
                    col = trans_b ? n + skip : k;
                if (a_row < A_ROWS && row < B_THERE)
                    want[i * N + n] += a.f[a_row * 3 * A_COLS + a_col] * b.f[row * 2 * B_COLS + col];
            }
        }
    }
    double e = relative_error(c_.host(), want);
    CHECK(e < 1e-5 && c_.guards_intact(), "%s N %d K %d trans_b %d trans_a %d in_registers %d skip %d: %.1e",
          Dtype<T>::name, N, K, trans_b, trans_a, in_registers, skip, e);
}

template <typename T> static void test_products(Random *r) {
    test_product<T, 64, 64, 0, 0, 0>(r);
    test_product<T, 128, 128, 0, 0, 0>(r);
    test_product<T, 32, 128, 0, 0, 0>(r);
    test_product<T, 64, 128, 1, 0, 0>(r);
    test_product<T, 128, 64, 1, 0, 0>(r);
    test_product<T, 64, 128, 1, 1, 0>(r);
    test_product<T, 128, 64, 0, 1, 0>(r);
    test_product<T, 128, 128, 1, 0, 1>(r);
    test_product<T, 64, 64, 0, 0, 1>(r);
    test_product<T, 64, 128, 1, 1, 0, 64>(r);
    test_product<T, 32, 128, 1, 1, 0, 32>(r);
}

// A ring of two stages: one warp brings rows by plain bulk copies, the others add them up; each waits for the
// other.
__global__ void __launch_bounds__(160) ring_kernel(const float *rows, int count, float *sums) {
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

static void test_ring(Random *r) {
    const int count = 37;
    std::vector<float> rows(count * 128), want(128, 0);
    for (float &x : rows) x = (float)r->below(1000);
    for (int i = 0; i < count * 128; i++) want[i % 128] += rows[i];
    Buffer<float> rows_(rows), sums(128);
    ring_kernel<<<1, 160, 1024 + 32>>>(rows_, count, sums);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaDeviceSynchronize());
    CHECK(sums.host() == want, "sums of %d rows", count);
}

// Thread blocks, in an order that nobody gave them, take tickets and add their rows to the same numbers in
// the order of the tickets; fp32 sums show any other order. The first overwrites.
__global__ void __launch_bounds__(128) order_kernel(const float *rows, int count, int *order, float *sums) {
    extern __shared__ __align__(1024) char smem[];
    __shared__ int ticket;
    for (;;) {
        if (threadIdx.x == 0) ticket = atomicAdd(order, 1);
        __syncthreads();
        const int mine = ticket;
        if (mine >= count) return;
        ((float *)smem)[threadIdx.x] = rows[mine * 128 + threadIdx.x];
        fence_proxy_async();
        __syncthreads();
        if (threadIdx.x == 0) {
            semaphore_wait(order + 1, mine);
            if (mine == 0)
                bulk_store(sums, smem_address(smem), 512);
            else
                bulk_reduce_add(sums, smem_address(smem), 512);
            bulk_commit();
            bulk_wait_read();
            bulk_wait();
            semaphore_release(order + 1);
        }
        __syncthreads();
    }
}

static void test_order(Random *r) {
    const int count = 3000;
    std::vector<float> rows(count * 128), want(128, 0);
    for (float &x : rows) x = r->normal() * expf(3 * r->normal());
    for (int i = 0; i < count * 128; i++) want[i % 128] = i < 128 ? rows[i] : want[i % 128] + rows[i];
    Buffer<float> rows_(rows), sums(128);
    Buffer<int> order(2);
    order.zero();
    order_kernel<<<300, 128, 1024>>>(rows_, count, order, sums);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaDeviceSynchronize());
    CHECK(sums.host() == want && sums.guards_intact(), "sums of %d rows in order", count);
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
    test_products<__nv_bfloat16>(&r);
    test_products<__half>(&r);
    test_ring(&r);
    test_order(&r);
    return test_end("test_ptx");
}
