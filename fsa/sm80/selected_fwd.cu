#include "../selected.cuh"

// ---------------------------------------------------------------------------------------------------------
// Forward

// K and V lie in shared memory with the 4-byte units of each 64-byte group transposed (unit 4c+i at i*4+c).
// Then lane c of a quad, which mma gives units c, 4+c, 8+c, 12+c, works on 16 contiguous bytes of q and of o,
// and the gather and the partials move straight between registers and memory.
static __device__ __forceinline__ void store_transposed(char *tile, uint32_t at[4], const uint4 x[4]) {
    *(uint4 *)(tile + at[0]) = make_uint4(x[0].x, x[1].x, x[2].x, x[3].x);
    *(uint4 *)(tile + at[1]) = make_uint4(x[0].y, x[1].y, x[2].y, x[3].y);
    *(uint4 *)(tile + at[2]) = make_uint4(x[0].z, x[1].z, x[2].z, x[3].z);
    *(uint4 *)(tile + at[3]) = make_uint4(x[0].w, x[1].w, x[2].w, x[3].w);
}

template <typename T> static __device__ __forceinline__ uint32_t to_half_scaled(uint32_t x, float factor) {
    float2 f = unpack2<T>(x);
    return pack2<__half>(f.x * factor, f.y * factor);
}
template <typename T> static __device__ __forceinline__ float max_abs(const uint4 &x) {
    float2 a = unpack2<T>(x.x), b = unpack2<T>(x.y), c = unpack2<T>(x.z), d = unpack2<T>(x.w);
    float m = fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y)));
    return fmaxf(m, fmaxf(fmaxf(fabsf(c.x), fabsf(c.y)), fmaxf(fabsf(d.x), fabsf(d.y))));
}

// A thread block takes a share of one head's list: for each KV block in it K and V come to shared
// memory once, and each warp takes 16 rows (g rows a token, packed) at a time: q from memory into fragments,
// S = QK^T, softmax within the block, O = PV, and out goes the normalized row and its log-sum-exp.
// V and P are fp16: V times a power of two that brings the block's largest to 2^14, so nothing overflows and
// a partial's rounding is an eighth of bf16's.
// A row moves 2*D bytes in and 2*D + 8 out. 64K tokens, 32 heads, T = 16, d = 128: 8.6 GB in, 8.8 out, 3.9 ms
// at 4.5 TB/s; 1.1 TFLOP, 1.4 ms at 790. Memory binds (with mma.sync, shared memory is next: 2.4 ms).
template <typename T, int D, int TILES>
__global__ void __launch_bounds__(128, 3) selected_forward_kernel(SelectedParams a) {
    constexpr int GROUPS = D / 32, KEYS = 64 * TILES;
    extern __shared__ __align__(128) char smem[];
    __shared__ float warp_max[4];
    char *k_tile = smem, *v_tile = smem + KEYS * D * 2;
    const uint32_t k_base = smem_address(k_tile), v_base = smem_address(v_tile);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, c = lane % 4;
    const int head = a.head0 + blockIdx.y, g = a.group;
    const Share share = share_of(a, head, blockIdx.x);
    const float scale_log2 = a.scale * FSA_LOG2E;

    for (uint32_t begin = share.begin; begin < share.end;) {
        Run run = run_at(a, share, begin);
        const int rows = (int)run.count * g, tiles = (rows + 15) / 16;
        for (int part = 0; part < a.parts; part++) {
            const int first_key = part * KEYS, keys = min(KEYS, run.keys - first_key); // may be < 1
            // K and V of the block; keys that it lacks are zeros.
            const int64_t kv_row = (int64_t)a.kv_heads * D;
            const T *k_head = (const T *)a.k + (run.key0 + first_key) * kv_row + head * D;
            const T *v_head = (const T *)a.v + (run.key0 + first_key) * kv_row + head * D;
            float largest = 0;
            for (int i = threadIdx.x; i < KEYS * D / 8; i += 128) {
                int row = i / (D / 8);
                if (row < keys)
                    largest =
                        fmaxf(largest, max_abs<T>(((const uint4 *)(v_head + row * kv_row))[i % (D / 8)]));
            }
            for (int i = 16; i > 0; i /= 2)
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, i));
            __syncthreads(); // all warps are done with the last tile
            if (lane == 0) warp_max[warp] = largest;
            __syncthreads();
            largest = fmaxf(fmaxf(warp_max[0], warp_max[1]), fmaxf(warp_max[2], warp_max[3]));
            int exponent = min(max(14 - ilogbf(largest), -100), 100);
            const float factor = largest > 0 ? ldexpf(1, exponent) : 1, unfactor = 1 / factor;
            for (int i = threadIdx.x; i < KEYS * GROUPS; i += 128) {
                int row = i / GROUPS, group = i % GROUPS;
                uint4 x[4] = {}, y[4] = {};
                if (row < keys) {
                    const uint4 *from_k = (const uint4 *)(k_head + row * kv_row) + group * 4;
                    const uint4 *from_v = (const uint4 *)(v_head + row * kv_row) + group * 4;
#pragma unroll
                    for (int j = 0; j < 4; j++) x[j] = from_k[j], y[j] = from_v[j];
                }
                uint32_t at[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    at[j] = swizzled<D>(row, group * 4 + j);
                    y[j] = make_uint4(to_half_scaled<T>(y[j].x, factor), to_half_scaled<T>(y[j].y, factor),
                                      to_half_scaled<T>(y[j].z, factor), to_half_scaled<T>(y[j].w, factor));
                }
                store_transposed(k_tile, at, x);
                store_transposed(v_tile, at, y);
            }
            __syncthreads();

            uint4 q[2][GROUPS]; // rows `quad` and quad + 8 of the tile
            uint32_t entry[2], next_entry[2];
            auto load_entries = [&](int tile, uint32_t *e) {
#pragma unroll
                for (int i = 0; i < 2; i++)
                    e[i] = share.entries[begin + min(tile * 16 + quad + 8 * i, rows - 1) / g];
            };
            auto load_q = [&](int tile, const uint32_t *e) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int r = min(tile * 16 + quad + 8 * i, rows - 1);
                    int64_t at = (int64_t)(e[i] / (uint32_t)a.topk) * a.q_heads + head * g + r % g;
                    const uint4 *from = (const uint4 *)((const T *)a.q + at * D);
#pragma unroll
                    for (int j = 0; j < GROUPS; j++) q[i][j] = from[4 * j + c];
                }
            };
            if (warp < tiles) {
                load_entries(warp, entry);
                load_q(warp, entry);
                load_entries(warp + 4, next_entry);
            }
            for (int tile = warp; tile < tiles; tile += 4) {
                float o[D / 8][4], max_row[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
                for (int i = 0; i < D / 8; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
                int limit[2]; // last visible key of this part
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int64_t in_list = begin - run.first + (tile * 16 + quad + 8 * i) / g;
                    limit[i] = last_key(a, run, in_list, entry[i] / (uint32_t)a.topk) - first_key;
                }
#pragma unroll
                for (int half = 0; half < TILES; half++) {
                    if (TILES > 1 && half > 0 && keys <= 64 * half) break;
                    float s[8][4];
#pragma unroll
                    for (int n = 0; n < 8; n++) {
                        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
                        for (int j = 0; j < GROUPS; j++) {
                            uint32_t b[4];
                            ldmatrix_x4(b, k_base +
                                               swizzled<D>(half * 64 + n * 8 + (lane & 7), j * 4 + lane / 8));
                            const uint32_t a0[4] = {q[0][j].x, q[1][j].x, q[0][j].y, q[1][j].y};
                            const uint32_t a1[4] = {q[0][j].z, q[1][j].z, q[0][j].w, q[1][j].w};
                            mma_16816<T>(s[n], a0, b[0], b[1]);
                            mma_16816<T>(s[n], a1, b[2], b[3]);
                        }
                    }
                    if (half == TILES - 1 || keys <= 64 * (half + 1)) {
                        // The next rows travel while this tile goes on.
                        if (tile + 4 < tiles) load_q(tile + 4, next_entry);
                    }
                    float new_max[2] = {max_row[0], max_row[1]};
#pragma unroll
                    for (int n = 0; n < 8; n++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int key = half * 64 + n * 8 + 2 * c + (i & 1);
                            s[n][i] = key <= limit[i / 2] ? s[n][i] * scale_log2 : -INFINITY;
                            new_max[i / 2] = fmaxf(new_max[i / 2], s[n][i]);
                        }
                    }
                    float base[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        new_max[i] = quad_reduce_max(new_max[i]);
                        base[i] = new_max[i] == -INFINITY ? 0 : new_max[i];
                        if (half > 0) sum[i] *= exp2_fast(max_row[i] - base[i]);
                    }
                    if (half > 0) {
                        float shrink[2] = {exp2_fast(max_row[0] - base[0]), exp2_fast(max_row[1] - base[1])};
#pragma unroll
                        for (int n = 0; n < D / 8; n++) {
#pragma unroll
                            for (int i = 0; i < 4; i++) o[n][i] *= shrink[i / 2];
                        }
                    }
                    max_row[0] = new_max[0], max_row[1] = new_max[1];
                    uint32_t p[4][4];
#pragma unroll
                    for (int n = 0; n < 8; n++) {
                        float e[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            e[i] = exp2_fast(s[n][i] - base[i / 2]);
                            sum[i / 2] += e[i];
                        }
                        p[n / 2][(n & 1) * 2] = pack2<__half>(e[0], e[1]);
                        p[n / 2][(n & 1) * 2 + 1] = pack2<__half>(e[2], e[3]);
                    }
#pragma unroll
                    for (int kk = 0; kk < 4; kk++) {
#pragma unroll
                        for (int n = 0; n < D / 8; n += 2) {
                            uint32_t b[4];
                            ldmatrix_x4_trans(
                                b, v_base + swizzled<D>(half * 64 + kk * 16 + (lane & 15), n + lane / 16));
                            mma_16816<__half>(o[n], p[kk], b[0], b[1]);
                            mma_16816<__half>(o[n + 1], p[kk], b[2], b[3]);
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int r = tile * 16 + quad + 8 * i;
                    float l = quad_reduce_sum(sum[i]), inverse = l > 0 ? 1 / l : 0;
                    if (r >= rows) continue;
                    int64_t at =
                        (((int64_t)blockIdx.y * a.lists.slab_rows * a.topk + (entry[i] - share.entry0)) * a.parts +
                         part) *
                            g +
                        r % g;
                    Partial<__half> out[GROUPS];
#pragma unroll
                    for (int j = 0; j < GROUPS; j++) out[j] = piece_of<__half>(o, 4 * j, i, inverse);
                    Partial<__half>::store(a.partial + at * row_bytes<__half, D>(), 0, c, out);
                    if (c == 0)
                        a.stats[at] = make_float2(l > 0 ? max_row[i] + log2f(l) : -INFINITY, unfactor);
                }
                entry[0] = next_entry[0], entry[1] = next_entry[1];
                load_entries(tile + 8, next_entry);
            }
        }
        begin += run.count;
    }
}

template <typename T, int D, int TILES>
static int launch_forward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    int smem = TILES * 64 * D * 2 * 2;
    if (allow_smem(selected_forward_kernel<T, D, TILES>, smem)) return FSA_ERROR_CUDA;
    dim3 grid((unsigned)a.shares, heads);
    selected_forward_kernel<T, D, TILES><<<grid, 128, smem, stream>>>(a);
    return FSA_OK;
}
template <typename T, int D> static int forward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    return a.keys > 64 ? launch_forward<T, D, 2>(a, heads, stream) : launch_forward<T, D, 1>(a, heads, stream);
}

int fsa_selected_forward_sm80(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                         cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, forward, a, heads, stream);
}
