// sm80/selected_fwd.cu: main kernel of the selected branch's forward pass for any GPU (mma.sync).
//
// A thread block (4 warps) processes one work range of one KV head (selected.cuh). For each KV block in the
// range:
//     all warps      load K and V of the block into shared memory, V as fp16
//     each warp      for every fourth tile of 16 gathered rows:
//                        load q straight into mma fragments, one tile ahead
//                        S = scale Q K^T,  P = exp(S - row max),  O = P V / row sum
//                        store the o_partial row (fp16) and lse_partial
// A key tile of 128 keys is processed in two steps of 64 keys with online softmax. Each partial row is
// written once, so the results are bitwise reproducible.
//
// P and V are fp16. A power of two scales the largest magnitude of V in the tile to at least 2^14 and below
// 2^15. So O cannot overflow, and the rounding error of a partial row is an eighth of bf16's. The consumer of
// a partial row multiplies it by lse_partial.y, the inverse of this scale.
//
// Shared memory: K and V, TILE_KEYS * D * 2 bytes each. Within each 64-byte group of a row, the 4-byte units
// are transposed (unit 4c+i lies at i*4+c). mma assigns units c, 4+c, 8+c, 12+c to lane c of a quad. With the
// transposed K, these are 16 contiguous bytes of q; with the transposed V, 16 contiguous bytes of o. So q and
// o move straight between registers and memory.
//
// Lower bounds for 64K tokens, (32, 8) heads, d = 128, (B, T) = (64, 16). The kernel is memory-bound.
//     8.6 GB of q in (2D bytes per partial row), 8.9 GB out (2D + 8)   3.9 ms
//     1.1 TFLOP                                                        1.4 ms
//     shared memory reads of mma.sync's operands                       2.3 ms
#include "../selected.cuh"
#include "tile.cuh"

// Stores 64 bytes at the offsets of their four 16-byte chunks, with the 4-byte units transposed.
static __device__ __forceinline__ void store_transposed(char *tile, uint32_t offset[4], const uint4 x[4]) {
    *(uint4 *)(tile + offset[0]) = make_uint4(x[0].x, x[1].x, x[2].x, x[3].x);
    *(uint4 *)(tile + offset[1]) = make_uint4(x[0].y, x[1].y, x[2].y, x[3].y);
    *(uint4 *)(tile + offset[2]) = make_uint4(x[0].z, x[1].z, x[2].z, x[3].z);
    *(uint4 *)(tile + offset[3]) = make_uint4(x[0].w, x[1].w, x[2].w, x[3].w);
}

template <typename T> static __device__ __forceinline__ uint32_t to_half_scaled(uint32_t x, float inv_scale) {
    float2 f = unpack2<T>(x);
    return pack2<__half>(f.x * inv_scale, f.y * inv_scale);
}
template <typename T> static __device__ __forceinline__ float chunk_amax(const uint4 &x) {
    float2 a = unpack2<T>(x.x), b = unpack2<T>(x.y), c = unpack2<T>(x.z), d = unpack2<T>(x.w);
    float m = fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y)));
    return fmaxf(m, fmaxf(fmaxf(fabsf(c.x), fabsf(c.y)), fmaxf(fabsf(d.x), fabsf(d.y))));
}

// Returns the largest magnitude of V in the key tile: v_head [num_keys, D], rows `stride` elements apart. Its
// first barrier waits until all warps have finished the previous key tile.
template <typename T, int D, int TILE_KEYS>
static __device__ __forceinline__ float compute_v_amax(const T *v_head, int64_t stride, int num_keys) {
    __shared__ float warp_amax[4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float amax = 0;
    for (int i = threadIdx.x; i < TILE_KEYS * D / 8; i += 128) {
        int row = i / (D / 8);
        if (row < num_keys)
            amax = fmaxf(amax, chunk_amax<T>(((const uint4 *)(v_head + row * stride))[i % (D / 8)]));
    }
    for (int i = 16; i > 0; i /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, i));
    __syncthreads();
    if (lane == 0) warp_amax[warp] = amax;
    __syncthreads();
    return fmaxf(fmaxf(warp_amax[0], warp_amax[1]), fmaxf(warp_amax[2], warp_amax[3]));
}

// Loads K and V of the key tile into shared memory [TILE_KEYS, D], transposed in units of 4 bytes. V becomes
// fp16 and is multiplied by inv_scale. Rows past the last key become zeros.
template <typename T, int D, int TILE_KEYS>
static __device__ __forceinline__ void load_kv_tile(char *k_tile, char *v_tile, const T *k_head,
                                                    int64_t k_stride, const T *v_head, int64_t v_stride,
                                                    int num_keys, float inv_scale) {
    constexpr int SLICES = D / 32;
    for (int i = threadIdx.x; i < TILE_KEYS * SLICES; i += 128) {
        int row = i / SLICES, slice = i % SLICES;
        uint4 x[4] = {}, y[4] = {};
        if (row < num_keys) {
            const uint4 *k_row = (const uint4 *)(k_head + row * k_stride) + slice * 4;
            const uint4 *v_row = (const uint4 *)(v_head + row * v_stride) + slice * 4;
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] = k_row[j], y[j] = v_row[j];
        }
        uint32_t offset[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            offset[j] = swizzled<D>(row, slice * 4 + j);
            y[j] = make_uint4(to_half_scaled<T>(y[j].x, inv_scale), to_half_scaled<T>(y[j].y, inv_scale),
                              to_half_scaled<T>(y[j].z, inv_scale), to_half_scaled<T>(y[j].w, inv_scale));
        }
        store_transposed(k_tile, offset, x);
        store_transposed(v_tile, offset, y);
    }
}

// The rows of one KV block in a work range: num_rows gathered rows of q, in tiles of 16 per warp. A lane of
// quad i holds rows i and i + 8 of a tile.
struct RowGather {
    const uint32_t *entries; // of the slab
    uint32_t begin;          // position of the first entry
    int num_rows, kv_head, g;
    static __device__ __forceinline__ int row_of(int tile, int i) {
        return tile * 16 + (int)(threadIdx.x % 32) / 4 + 8 * i;
    }
    // Loads the query list entries of a lane's two rows. Past the last row: those of the last row.
    __device__ __forceinline__ void load_entries(int tile, uint32_t (&e)[2]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) e[i] = entries[begin + min(row_of(tile, i), num_rows - 1) / g];
    }
    // Loads a lane's parts of its two rows of q, as A operands.
    template <typename T, int D>
    __device__ __forceinline__ void load_q(const SelectedParams &a, int tile, const uint32_t (&e)[2],
                                           uint4 (&q)[2][D / 32]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = min(row_of(tile, i), num_rows - 1);
            int64_t query = e[i] / (uint32_t)a.topk;
            const T *q_head = (const T *)a.q.data + kv_head * g * D;
            const uint4 *q_row = (const uint4 *)(q_head + query * a.q.stride + r % g * D);
#pragma unroll
            for (int j = 0; j < D / 32; j++) q[i][j] = q_row[4 * j + threadIdx.x % 4];
        }
    }
};

// S = Q K^T, 16 rows x 64 keys. k_tile: the first of the keys.
template <typename T, int D>
static __device__ __forceinline__ void compute_scores(float (&s)[8][4], const uint4 (&q)[2][D / 32],
                                                      uint32_t k_tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            uint32_t b[4];
            ldmatrix_x4(b, k_tile + swizzled<D>(n * 8 + (lane & 7), j * 4 + lane / 8));
            const uint32_t a0[4] = {q[0][j].x, q[1][j].x, q[0][j].y, q[1][j].y};
            const uint32_t a1[4] = {q[0][j].z, q[1][j].z, q[0][j].w, q[1][j].w};
            mma_16816<T>(s[n], a0, b[0], b[1]);
            mma_16816<T>(s[n], a1, b[2], b[3]);
        }
    }
}

// Maximum (in base 2) and sum of a lane's two rows.
struct SoftmaxState {
    float row_max[2], row_sum[2];
};
// Online softmax of a step of 64 keys, the first of which is first_key of the key tile. S becomes P =
// exp2(scale_log2 S - max), as fp16 A operands p [k16 blocks][4]. Rescales o [16, D] and the row sums to the
// new maximum, except in the first step. limit: the last key of the key tile that each of a lane's rows sees.
template <int D8>
static __device__ __forceinline__ void
online_softmax(uint32_t (&p)[4][4], float (&s)[8][4], float (&o)[D8][4], SoftmaxState &state,
               const int (&limit)[2], int first_key, float scale_log2) {
    const int c = threadIdx.x % 4;
    float new_max[2] = {state.row_max[0], state.row_max[1]};
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = first_key + n * 8 + 2 * c + (i & 1);
            s[n][i] = key <= limit[i / 2] ? s[n][i] * scale_log2 : -INFINITY;
            new_max[i / 2] = fmaxf(new_max[i / 2], s[n][i]);
        }
    }
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        new_max[i] = quad_reduce_max(new_max[i]);
        base[i] = new_max[i] == -INFINITY ? 0 : new_max[i];
        if (first_key > 0) state.row_sum[i] *= exp2_fast(state.row_max[i] - base[i]);
    }
    if (first_key > 0) {
        float rescale[2] = {exp2_fast(state.row_max[0] - base[0]), exp2_fast(state.row_max[1] - base[1])};
#pragma unroll
        for (int n = 0; n < D8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] *= rescale[i / 2];
        }
    }
    state.row_max[0] = new_max[0], state.row_max[1] = new_max[1];
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float e[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            e[i] = exp2_fast(s[n][i] - base[i / 2]);
            state.row_sum[i / 2] += e[i];
        }
        p[n / 2][(n & 1) * 2] = pack2<__half>(e[0], e[1]);
        p[n / 2][(n & 1) * 2 + 1] = pack2<__half>(e[2], e[3]);
    }
}

// Writes o_partial, normalized, and lse_partial of the 16 rows of `tile`. entry: of a lane's two rows.
// entry0: the slab's smallest entry. v_scale: factor of o_partial.
template <int D>
static __device__ __forceinline__ void store_o_partial(const SelectedParams &a, const RowGather &rows,
                                                       int tile, int key_tile, const uint32_t (&entry)[2],
                                                       uint32_t entry0, const float (&o)[D / 8][4],
                                                       const SoftmaxState &state, float v_scale) {
    constexpr int SLICES = D / 32;
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int r = RowGather::row_of(tile, i);
        float sum = quad_reduce_sum(state.row_sum[i]), inverse = sum != 0 ? 1 / sum : 0;
        if (r >= rows.num_rows) continue;
        int64_t slot = (int64_t)blockIdx.y * a.lists.slab_queries * a.topk + (entry[i] - entry0);
        int64_t row = (slot * a.key_tiles + key_tile) * rows.g + r % rows.g;
        PartialChunk<__half> out[SLICES];
#pragma unroll
        for (int j = 0; j < SLICES; j++) out[j] = make_partial_chunk<__half>(o, 4 * j, i, inverse);
        PartialChunk<__half>::store(a.partial + row * partial_row_bytes<__half, D>(), 0, c, out);
        if (c == 0)
            a.lse_partial[row] = make_float2(sum != 0 ? state.row_max[i] + log2f(sum) : -INFINITY, v_scale);
    }
}

// KEY_STEPS: steps of 64 keys in a key tile.
template <typename T, int D, int KEY_STEPS>
__global__ void __launch_bounds__(128, 3) selected_forward_sm80_kernel(SelectedParams a) {
    constexpr int TILE_KEYS = 64 * KEY_STEPS;
    extern __shared__ __align__(128) char smem[]; // K, V [TILE_KEYS, D]
    char *k_tile = smem, *v_tile = smem + TILE_KEYS * D * 2;
    const uint32_t k_base = smem_address(k_tile), v_base = smem_address(v_tile);
    const int warp = threadIdx.x / 32, kv_head = a.kv_head0 + blockIdx.y, g = a.group;
    const WorkRange range = work_range_of(a, kv_head, blockIdx.x);
    const float scale_log2 = a.scale * FSA_LOG2E;

    for (uint32_t begin = range.begin; begin < range.end;) {
        KvBlockEntries kv_block = find_kv_block(a, range, begin);
        const RowGather rows = {range.entries, begin, (int)kv_block.num_entries * g, kv_head, g};
        const int num_tiles = (rows.num_rows + 15) / 16;
        for (int key_tile = 0; key_tile < a.key_tiles; key_tile++) {
            // num_keys can be 0 or negative: the last block of a sequence may be short.
            const int first_key = key_tile * TILE_KEYS,
                      num_keys = min(TILE_KEYS, kv_block.num_keys - first_key);
            const int64_t key0 = kv_block.key0 + first_key;
            const T *k_head = (const T *)a.k.data + key0 * a.k.stride + kv_head * D;
            const T *v_head = (const T *)a.v.data + key0 * a.v.stride + kv_head * D;
            const float amax = compute_v_amax<T, D, TILE_KEYS>(v_head, a.v.stride, num_keys);
            // Clamped before the subtraction: ilogbf(0) is INT_MIN.
            const int exponent = 14 - min(max(ilogbf(amax), 14 - 100), 14 + 100);
            const float inv_scale = amax > 0 ? ldexpf(1, exponent) : 1, v_scale = 1 / inv_scale;
            load_kv_tile<T, D, TILE_KEYS>(k_tile, v_tile, k_head, a.k.stride, v_head, a.v.stride, num_keys,
                                          inv_scale);
            __syncthreads();

            uint4 q[2][D / 32];
            uint32_t entry[2], next_entry[2];
            if (warp < num_tiles) {
                rows.load_entries(warp, entry);
                rows.load_q<T, D>(a, warp, entry, q);
                rows.load_entries(warp + 4, next_entry);
            }
            for (int tile = warp; tile < num_tiles; tile += 4) {
                float o[D / 8][4] = {};
                SoftmaxState softmax = {{-INFINITY, -INFINITY}, {0, 0}};
                int limit[2]; // last visible key, within the key tile
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int64_t list_position = begin - kv_block.list_begin + RowGather::row_of(tile, i) / g;
                    limit[i] =
                        last_visible_key(a, kv_block, list_position, entry[i] / (uint32_t)a.topk) - first_key;
                }
#pragma unroll
                for (int step = 0; step < KEY_STEPS; step++) {
                    if (KEY_STEPS > 1 && step > 0 && num_keys <= 64 * step) break;
                    float s[8][4];
                    compute_scores<T, D>(s, q, k_base + step * 64 * D * 2);
                    // After the last step q is no longer needed: load q of the next tile.
                    if (step == KEY_STEPS - 1 || num_keys <= 64 * (step + 1)) {
                        if (tile + 4 < num_tiles) rows.load_q<T, D>(a, tile + 4, next_entry, q);
                    }
                    uint32_t p[4][4];
                    online_softmax(p, s, o, softmax, limit, step * 64, scale_log2);
                    // O += P V
                    mma_tiles<__half, 64>(o, FragmentOperand<4>{p},
                                          ColumnOperand<D>{v_base + step * 64 * D * 2, 0});
                }
                store_o_partial<D>(a, rows, tile, key_tile, entry, range.entry0, o, softmax, v_scale);
                entry[0] = next_entry[0], entry[1] = next_entry[1];
                rows.load_entries(tile + 8, next_entry);
            }
        }
        begin += kv_block.num_entries;
    }
}

template <typename T, int D, int KEY_STEPS>
static int launch_selected_forward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    int smem = KEY_STEPS * 64 * D * 2 * 2;
    dim3 grid((unsigned)a.num_ranges, heads);
    return LAUNCH((selected_forward_sm80_kernel<T, D, KEY_STEPS>), grid, 128, smem, stream, a);
}
template <typename T, int D>
static int selected_forward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    return a.tile_keys > 64 ? launch_selected_forward<T, D, 2>(a, heads, stream)
                            : launch_selected_forward<T, D, 1>(a, heads, stream);
}

int fsa_selected_forward_sm80(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                              cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, selected_forward, a, heads, stream);
}
