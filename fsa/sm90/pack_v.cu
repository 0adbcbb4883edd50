#include "selected.cuh"

static __device__ __forceinline__ uint32_t max_abs_bits(uint32_t most, uint32_t x) {
    uint32_t lo = max(most & 0xffffu, x & 0x7fffu), hi = max(most >> 16, x >> 16 & 0x7fffu);
    return lo | hi << 16;
}

// V of a part of a block, rearranged so that plain bulk copies make the main kernel's tile of it: [D/64
// panels][N keys][64], the 16-byte chunks of a row swizzled. 16-bit as it comes, it becomes fp16 times a
// power of two that brings the part's largest to 2^15 / KEYS, so that no sum overflows that probabilities of
// at most 1 weight, and a partial's rounding is an eighth of bf16's; and the 4-byte units of each 64-byte
// group are transposed (unit 4c+i at i*4+c), so that a lane's accumulators of four n8 columns are 16 bytes of
// the output in one piece. 2 bytes in and out a channel: 0.06 ms for 64K tokens of 8 heads at 4.3 TB/s; on an
// H200 0.16, eight launches of 20 us: latency. So it starts while the heads before are merged: v is there,
// and who read `packed` has ended when a merge lets it.
enum { PACK_THREADS = 128 };
template <typename T, int D, int KEYS>
__global__ void __launch_bounds__(PACK_THREADS) pack_v_kernel(const SelectedParams a) {
    constexpr int GROUPS = D / 32, ITEMS = KEYS * GROUPS / PACK_THREADS; // an item: 64 bytes of a row
    __shared__ float largest[PACK_THREADS / 32];
    const int64_t block = blockIdx.x / a.parts;
    const int part = (int)(blockIdx.x % a.parts), head = a.head0 + blockIdx.y, thread = threadIdx.x;
    if (block >= a.batch.cu_blocks[a.batch.num_seqs]) {
        pdl_wait();
        return;
    }
    const int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, block);
    const int64_t key0 = a.batch.cu_seqlens[seq] + (block - a.batch.cu_blocks[seq]) * a.block + part * KEYS;
    const int keys = (int)min((int64_t)min(a.block - part * KEYS, KEYS), a.batch.cu_seqlens[seq + 1] - key0);
    uint4 v[ITEMS][4];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int item = thread + i * PACK_THREADS, row = item / GROUPS;
        const uint4 *from =
            (const uint4 *)((const T *)a.v + ((key0 + row) * a.kv_heads + head) * D) + item % GROUPS * 4;
#pragma unroll
        for (int j = 0; j < 4; j++) v[i][j] = row < keys ? from[j] : make_uint4(0, 0, 0, 0);
    }
    uint32_t most = 0; // the largest magnitudes, as bits: they ascend as the numbers do
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            most = max_abs_bits(
                max_abs_bits(max_abs_bits(max_abs_bits(most, v[i][j].x), v[i][j].y), v[i][j].z), v[i][j].w);
    }
    float2 f = unpack2<T>(most);
    float mine = fmaxf(f.x, f.y);
    for (int i = 16; i > 0; i /= 2) mine = fmaxf(mine, __shfl_xor_sync(0xffffffffu, mine, i));
    if (thread % 32 == 0) largest[thread / 32] = mine;
    __syncthreads();
    mine = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
    constexpr int LARGEST = KEYS == 64 ? 8 : 7; // below 2^(LARGEST + 1)
    const int exponent = min(max(LARGEST - ilogbf(mine), -100), 100);
    const float factor = mine > 0 ? ldexpf(1, exponent) : 1;
    if (thread == 0) a.factors[(blockIdx.y * a.lists.max_blocks + block) * a.parts + part] = 1 / factor;
    auto convert = [&](uint32_t x) {
        float2 y = unpack2<T>(x);
        return pack2<__half>(y.x * factor, y.y * factor);
    };
    char *const to = a.packed + blockIdx.y * a.batch.n * (2 * D);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int item = thread + i * PACK_THREADS, row = item / GROUPS;
        if (row >= keys) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 &x = v[i][j];
            x = make_uint4(convert(x.x), convert(x.y), convert(x.z), convert(x.w));
        }
        auto store = [&](int j, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
            const int chunk = item % GROUPS * 4 + j;
            *(uint4 *)(to + (chunk / 8 * a.batch.n + key0 + row) * 128 + ((chunk ^ row) % 8 << 4)) =
                make_uint4(x0, x1, x2, x3);
        };
        store(0, v[i][0].x, v[i][1].x, v[i][2].x, v[i][3].x);
        store(1, v[i][0].y, v[i][1].y, v[i][2].y, v[i][3].y);
        store(2, v[i][0].z, v[i][1].z, v[i][2].z, v[i][3].z);
        store(3, v[i][0].w, v[i][1].w, v[i][2].w, v[i][3].w);
    }
    pdl_wait(); // so that it has ended when this one has
}

template <typename T, int D, int KEYS>
static int pack(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    dim3 grid((unsigned)(a.lists.max_blocks * a.parts), heads);
    launch(a.head0 > 0, pack_v_kernel<T, D, KEYS>, grid, PACK_THREADS, 0, stream, a);
    return FSA_OK;
}

int fsa_pack_v_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, cudaStream_t stream) {
    return DISPATCH(pack);
}
