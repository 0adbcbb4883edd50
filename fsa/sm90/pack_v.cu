// sm90/pack_v.cu: converts V of the selected branch's forward pass to scaled fp16, in the layout of the main
// kernel's tile. A thread block converts one key tile (TILE_KEYS keys of a KV block) of one KV head.
//
// Scale: a power of two that makes the largest magnitude of the tile less than 2^15 / TILE_KEYS; v_scale is
// its inverse. So sums of TILE_KEYS values, weighted by probabilities of at most 1, cannot overflow, and the
// rounding error of a partial row is an eighth of bf16's.
//
// Layout: [D/64 panels][N keys][64 channels]. The 16-byte chunks of a row are swizzled as wgmma expects
// (ptx.cuh), so plain bulk copies load a tile. The 4-byte units of each 64-byte slice are transposed (unit
// 4c+i lies at i*4+c). So a lane's accumulators of four n8 columns are 16 contiguous bytes of o.
//
// Lower bound for 64K tokens, 8 KV heads, d = 128: 2 bytes in and 2 out per channel, 0.27 GB, 0.06 ms. The
// kernel is limited by latency, so it starts while the combine kernel of the previous launch's heads
// runs (programmatic dependent launch). It may write before pdl_wait: v is an input, and all readers of the
// previous v_packed have ended when that combine kernel lets it start.
#include "selected.cuh"

// Returns the larger of the magnitudes of amax and x, for each 16-bit half. The bits of non-negative floats
// have the same order as the floats.
static __device__ __forceinline__ uint32_t amax_bits(uint32_t amax, uint32_t x) {
    uint32_t lo = max(amax & 0xffffu, x & 0x7fffu), hi = max(amax >> 16, x >> 16 & 0x7fffu);
    return lo | hi << 16;
}

enum { PACK_THREADS = 128 };
template <typename T, int D, int TILE_KEYS>
__global__ void __launch_bounds__(PACK_THREADS) pack_v_kernel(const SelectedParams a) {
    constexpr int SLICES = D / 32,
                  ITEMS = TILE_KEYS * SLICES / PACK_THREADS; // an item: one slice (64 bytes) of a row
    __shared__ float warp_amax[PACK_THREADS / 32];
    const int64_t block = blockIdx.x / a.key_tiles;
    const int key_tile = (int)(blockIdx.x % a.key_tiles), kv_head = a.kv_head0 + blockIdx.y,
              thread = threadIdx.x;
    if (block >= a.batch.cu_blocks[a.batch.num_seqs]) {
        pdl_wait();
        return;
    }
    const int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, block);
    const int64_t key0 =
        a.batch.cu_seqlens[seq] + (block - a.batch.cu_blocks[seq]) * a.block + key_tile * TILE_KEYS;
    const int num_keys =
        (int)min((int64_t)min(a.block - key_tile * TILE_KEYS, TILE_KEYS), a.batch.cu_seqlens[seq + 1] - key0);
    uint4 v[ITEMS][4];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int item = thread + i * PACK_THREADS, row = item / SLICES;
        // In units of 16 bytes.
        const int64_t offset = (key0 + row) * (a.v.stride >> 3) + kv_head * (D / 8) + item % SLICES * 4;
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[i][j] = row < num_keys ? ((const uint4 *)a.v.data)[offset + j] : make_uint4(0, 0, 0, 0);
    }

    // The scale, from the tile's largest magnitude.
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            bits =
                amax_bits(amax_bits(amax_bits(amax_bits(bits, v[i][j].x), v[i][j].y), v[i][j].z), v[i][j].w);
    }
    float2 f = unpack2<T>(bits);
    float amax = fmaxf(f.x, f.y);
    for (int i = 16; i > 0; i /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, i));
    if (thread % 32 == 0) warp_amax[thread / 32] = amax;
    __syncthreads();
    amax = fmaxf(fmaxf(warp_amax[0], warp_amax[1]), fmaxf(warp_amax[2], warp_amax[3]));
    constexpr int MAX_EXPONENT = TILE_KEYS == 64 ? 8 : 7; // scaled magnitudes are below 2^(MAX_EXPONENT + 1)
    // Clamped before the subtraction: ilogbf(0) is INT_MIN.
    const int exponent = MAX_EXPONENT - min(max(ilogbf(amax), MAX_EXPONENT - 100), MAX_EXPONENT + 100);
    const float inv_scale = amax > 0 ? ldexpf(1, exponent) : 1;
    if (thread == 0)
        a.v_scale[(blockIdx.y * a.lists.max_blocks + block) * a.key_tiles + key_tile] = 1 / inv_scale;

    // Convert, transpose, store.
    auto convert = [&](uint32_t x) {
        float2 y = unpack2<T>(x);
        return pack2<__half>(y.x * inv_scale, y.y * inv_scale);
    };
    char *const v_packed = a.v_packed + blockIdx.y * a.batch.n * (2 * D);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int item = thread + i * PACK_THREADS, row = item / SLICES;
        if (row >= num_keys) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 &x = v[i][j];
            x = make_uint4(convert(x.x), convert(x.y), convert(x.z), convert(x.w));
        }
        auto store = [&](int j, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
            const int chunk = item % SLICES * 4 + j;
            *(uint4 *)(v_packed + (chunk / 8 * a.batch.n + key0 + row) * 128 + ((chunk ^ row) % 8 << 4)) =
                make_uint4(x0, x1, x2, x3);
        };
        store(0, v[i][0].x, v[i][1].x, v[i][2].x, v[i][3].x);
        store(1, v[i][0].y, v[i][1].y, v[i][2].y, v[i][3].y);
        store(2, v[i][0].z, v[i][1].z, v[i][2].z, v[i][3].z);
        store(3, v[i][0].w, v[i][1].w, v[i][2].w, v[i][3].w);
    }
    pdl_wait(); // this kernel must not end before the preceding one
}

template <typename T, int D, int TILE_KEYS>
static int launch_pack_v(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    dim3 grid((unsigned)(a.lists.max_blocks * a.key_tiles), heads);
    return LAUNCH_PDL(a.kv_head0 > 0, (pack_v_kernel<T, D, TILE_KEYS>), grid, PACK_THREADS, 0, stream, a);
}

template <typename T, int D> static int pack_v(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    return a.tile_keys == 64 ? launch_pack_v<T, D, 64>(a, heads, stream)
                             : launch_pack_v<T, D, 128>(a, heads, stream);
}

int fsa_pack_v_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                    cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, pack_v, a, heads, stream);
}
