// sm80/selected_bwd.cu: main kernel of the selected branch's backward pass for any GPU (mma.sync).
//
// A thread block (4 warps) processes one work range of one KV head (selected.cuh). For each KV block in the
// range, 64 keys (a key tile) at a time:
//     load K and V into shared memory; dK = dV = 0 in registers
//     for each tile of 64 gathered rows of q and dO:
//         S = scale Q K^T,  dP = dO V^T,  P = exp(S - lse_bwd),  dS = P (dP - delta);  P, dS to shared memory
//         dV += P^T dO,  dK / scale += dS^T Q
//         start the gather of the next tile's q and dO
//         dQ = scale dS K; store it as a dq_partial row (partial.cuh)
//     store dK / scale and dV (dkv_destination); selected_store_dkv_kernel multiplies by scale
// dO is dout, the ungated gradient; lse_bwd contains the gate, so P is gate * P. The four warps divide the
// rows and columns of every matmul in halves. The row indices, lse_bwd and delta of a tile are loaded into
// registers one tile ahead, and are stored in shared memory in two stages.
//
// Shared memory: K, V, q, dO tiles of 64 rows and P, dS [64 rows, 64 keys]: 80 KiB at d = 128, two thread
// blocks per SM.
//
// Each partial row is written once. The thread block whose work range contains the start of a query list
// adds its part of dK and dV to dkv_accum. Thread blocks whose range continues the list write dkv_partial,
// which the combine kernel adds in order. So the results are bitwise reproducible.
//
// Lower bounds for 64K tokens, (32, 8) heads, d = 128, (B, T) = (64, 16). The kernel is limited by shared
// memory and memory bandwidth.
//     17.6 GB in (4D + 12 bytes per partial row), 6.4 GB out (1.5D; fp16: 2D)   5.3 ms
//     2.75 TFLOP                                                                3.5 ms
//     shared memory, 336 KiB per tile                                           6.1 ms
#include "../selected.cuh"
#include "tile.cuh"

// Data of the gathered rows of two tiles besides q and dO, in shared memory: [tile % 2][row of the tile].
struct RowData {
    uint2 row[2][64];        // query, query head
    uint32_t partial[2][64]; // partial row
    float lse[2][64];        // lse_bwd in base 2
    float delta[2][64];
    int limit[2][64]; // the last visible key within the key tile; -1 for a row that pads the tile
};

// Loads the RowData of the rows that a KV block of a work range gathers: num_rows rows, in tiles of 64.
// Thread t < 64 loads the data of row t of a tile into registers, one tile ahead, and stores it later.
struct RowLoader {
    const uint32_t *entries; // of the slab
    uint32_t entry0, begin;  // the slab's smallest entry; position of the block's first entry
    int num_rows, kv_head, g, key_tile;
    uint32_t next_entry; // entry of this thread's row in the tile that load() loads next
    uint2 row;
    uint32_t partial;
    float lse, delta;
    int limit;

    __device__ __forceinline__ void load_entry(int tile) {
        next_entry = entries[begin + min(tile * 64 + (int)threadIdx.x, num_rows - 1) / g];
    }
    __device__ __forceinline__ void load(const SelectedParams &a, const KvBlockEntries &kv_block, int tile) {
        int r = tile * 64 + threadIdx.x, i = min(r, num_rows - 1) / g, in_group = min(r, num_rows - 1) % g;
        uint32_t entry = next_entry;
        load_entry(tile + 1);
        int64_t query = entry / (uint32_t)a.topk;
        row = make_uint2((uint32_t)query, kv_head * g + in_group);
        int64_t lse_index = query * a.q_heads + row.y;
        partial = ((entry - entry0) * a.key_tiles + key_tile) * g + in_group;
        lse = a.lse_bwd[lse_index] * FSA_LOG2E;
        delta = a.delta[lse_index];
        limit = r < num_rows
                    ? last_visible_key(a, kv_block, (int64_t)(begin - kv_block.list_begin) + i, query) -
                          key_tile * 64
                    : -1;
    }
    __device__ __forceinline__ void store(RowData &data, int tile) const {
        const int stage = tile & 1, t = threadIdx.x;
        data.row[stage][t] = row, data.partial[stage][t] = partial;
        data.lse[stage][t] = lse, data.delta[stage][t] = delta;
        data.limit[stage][t] = limit;
    }
};

// Starts the gather of the 64 rows of q and dO of a tile.
template <typename T, int D>
static __device__ __forceinline__ void gather_q_dout(const SelectedParams &a, const RowData &data, int tile,
                                                     uint32_t q_tile, uint32_t do_tile) {
    constexpr int CHUNKS = D / 8, ROW_STEP = 128 / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS;
#pragma unroll
    for (int i = 0; i < 64 / ROW_STEP; i++) {
        int r = i * ROW_STEP + threadIdx.x / CHUNKS;
        const uint2 row = data.row[tile & 1][r];
        const int64_t query = row.x;
        const uint32_t column = row.y * D + chunk * 8;
        cp_async_16(q_tile + swizzled<D>(r, chunk), (const T *)a.q.data + query * a.q.stride + column);
        cp_async_16(do_tile + swizzled<D>(r, chunk), (const T *)a.dout.data + query * a.dout.stride + column);
    }
    cp_async_commit();
}

// Starts the copy of the key tile's K and V [64, D]; zeros past the last key.
template <typename T, int D>
static __device__ __forceinline__ void load_kv_tile(const SelectedParams &a, const KvBlockEntries &kv_block,
                                                    int kv_head, int first_key, int num_keys, uint32_t k_tile,
                                                    uint32_t v_tile) {
    // The block may end before the key tile: then no key is read, but the pointers stay valid.
    const int64_t key0 = kv_block.key0 + (num_keys > 0 ? first_key : 0);
    load_tile_pair<64, D, 128>(k_tile, (const T *)a.k.data + key0 * a.k.stride + kv_head * D, a.k.stride,
                               v_tile, (const T *)a.v.data + key0 * a.v.stride + kv_head * D, a.v.stride,
                               num_keys);
}

// x = A B^T over D, 32 x 32 per warp: rows 32*wm.. of the tile `left`, rows 32*wn.. of the tile `right`.
// Unlike mma_tiles, it loads all operands of a k step before the matmuls of the k step.
template <typename T, int D>
static __device__ __forceinline__ void matmul_nt(float (&x)[2][4][4], uint32_t left, uint32_t right, int wm,
                                                 int wn) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) x[m][n][0] = x[m][n][1] = x[m][n][2] = x[m][n][3] = 0;
    }
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        uint32_t fa[2][4], fb[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) {
            load_a<D>(fa[m], left, wm * 32 + m * 16, kk);
            load_b<D>(fb[m], right, wn * 32 + m * 16, kk);
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int n = 0; n < 2; n++) mma_161616<T>(x[m][2 * n], x[m][2 * n + 1], fa[m], fb[n]);
        }
    }
}

// P = exp2(scale_log2 S - lse) and dS = P (dP - delta), in 16 bits, to shared memory [64 rows, 64 keys]. s,
// dp: rows 32*wm.., keys 32*wn..
template <typename T>
static __device__ __forceinline__ void softmax_bwd(char *p_tile, char *ds_tile, const float (&s)[2][4][4],
                                                   const float (&dp)[2][4][4], const RowData &data, int stage,
                                                   float scale_log2, int wm, int wn) {
    const int lane = threadIdx.x % 32, quad = lane / 4, c = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = wm * 32 + m * 16 + quad + 8 * i;
            float lse = data.lse[stage][r], delta = data.delta[stage][r];
            int limit = data.limit[stage][r];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float p[2], ds[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    int key = wn * 32 + n * 8 + 2 * c + j;
                    p[j] = key <= limit ? exp2_fast(s[m][n][2 * i + j] * scale_log2 - lse) : 0;
                    ds[j] = p[j] * (dp[m][n][2 * i + j] - delta);
                }
                uint32_t offset = swizzled<64>(r, wn * 4 + n) + 4 * c;
                *(uint32_t *)(p_tile + offset) = pack2<T>(p[0], p[1]);
                *(uint32_t *)(ds_tile + offset) = pack2<T>(ds[0], ds[1]);
            }
        }
    }
}

// Writes one slice of 32 columns of dQ to the dq_partial rows of a tile, times scale. dq: rows 32*wm..
// num_rows: rows in the tile.
template <typename T, int D>
static __device__ __forceinline__ void store_dq_partial(char *partial, const float (&dq)[2][4][4],
                                                        const RowData &data, int stage, int num_rows,
                                                        float scale, int wm, int slice) {
    const int lane = threadIdx.x % 32, quad = lane / 4, c = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = wm * 32 + m * 16 + quad + 8 * i;
            if (r >= num_rows) continue;
            const PartialChunk<T> out[1] = {make_partial_chunk<T>(dq[m], 0, i, scale)};
            char *row = partial + (int64_t)data.partial[stage][r] * partial_row_bytes<T, D>();
            PartialChunk<T>::store(row, slice, c, out);
        }
    }
}

// Writes dK / scale and dV of the key tile to `out` [64, 2, D], or adds them to it. dk, dv: keys 32*wm..,
// columns D/2*wn..
template <int D>
static __device__ __forceinline__ void store_dkv(float *out, bool accumulate, const float (&dk)[2][D / 16][4],
                                                 const float (&dv)[2][D / 16][4], int num_keys, int wm,
                                                 int wn) {
    const int lane = threadIdx.x % 32, quad = lane / 4, c = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int key = wm * 32 + m * 16 + quad + 8 * i;
            if (key >= num_keys) continue;
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                float2 *dk_out = (float2 *)(out + key * 2 * D + wn * (D / 2) + n * 8 + 2 * c);
                float2 *dv_out = dk_out + D / 2;
                float2 x = make_float2(dk[m][n][2 * i], dk[m][n][2 * i + 1]);
                float2 y = make_float2(dv[m][n][2 * i], dv[m][n][2 * i + 1]);
                if (accumulate) {
                    float2 x0 = *dk_out, y0 = *dv_out;
                    x.x += x0.x, x.y += x0.y, y.x += y0.x, y.y += y0.y;
                }
                *dk_out = x;
                *dv_out = y;
            }
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(128, 2) selected_backward_sm80_kernel(SelectedParams a) {
    constexpr int HALF = D / 2, TILE = 64 * D * 2;
    extern __shared__ __align__(128) char smem[]; // K, V, q, dO [64, D]; P, dS [64, 64]
    __shared__ RowData data;
    const uint32_t k_tile = smem_address(smem), v_tile = k_tile + TILE, q_tile = v_tile + TILE,
                   do_tile = q_tile + TILE, p_base = do_tile + TILE, ds_base = p_base + 64 * 64 * 2;
    char *p_tile = smem + 4 * TILE, *ds_tile = p_tile + 64 * 64 * 2;
    // wm, wn: this warp's half of the rows and of the columns of each matmul
    const int tid = threadIdx.x, wm = tid / 32 / 2, wn = tid / 32 % 2;
    const int kv_head = a.kv_head0 + blockIdx.y, g = a.group;
    const WorkRange range = work_range_of(a, kv_head, blockIdx.x);
    const float scale_log2 = a.scale * FSA_LOG2E;
    char *partial = a.partial + (int64_t)blockIdx.y * a.lists.slab_queries * a.topk * a.key_tiles * g *
                                    partial_row_bytes<T, D>();

    for (uint32_t begin = range.begin; begin < range.end;) {
        KvBlockEntries kv_block = find_kv_block(a, range, begin);
        const int num_rows = (int)kv_block.num_entries * g, num_tiles = (num_rows + 63) / 64;
        for (int key_tile = 0; key_tile < a.key_tiles; key_tile++) {
            const int first_key = key_tile * 64, num_keys = min(64, kv_block.num_keys - first_key);
            RowLoader loader = {range.entries, range.entry0, begin, num_rows, kv_head, g, key_tile};
            __syncthreads(); // all warps have finished the previous key tile
            if (tid < 64) {
                loader.load_entry(0);
                loader.load(a, kv_block, 0);
                loader.store(data, 0);
            }
            load_kv_tile<T, D>(a, kv_block, kv_head, first_key, num_keys, k_tile, v_tile);
            __syncthreads();
            gather_q_dout<T, D>(a, data, 0, q_tile, do_tile);

            float dk[2][HALF / 8][4] = {}, dv[2][HALF / 8][4] = {}; // keys 32*wm.., columns HALF*wn..
            for (int tile = 0; tile < num_tiles; tile++) {
                cp_async_wait<0>();
                __syncthreads();
                const int stage = tile & 1;
                const bool load_next = tid < 64 && tile + 1 < num_tiles;
                if (load_next) loader.load(a, kv_block, tile + 1);
                float s[2][4][4], dp[2][4][4]; // S = Q K^T and dP = dO V^T: rows 32*wm.., keys 32*wn..
                matmul_nt<T, D>(s, q_tile, k_tile, wm, wn);
                matmul_nt<T, D>(dp, do_tile, v_tile, wm, wn);
                softmax_bwd<T>(p_tile, ds_tile, s, dp, data, stage, scale_log2, wm, wn);
                if (load_next) loader.store(data, tile + 1);
                __syncthreads();
                // dV += P^T dO, dK += dS^T Q
                mma_tiles<T, 64>(dv, ColumnOperand<64>{p_base, wm * 2},
                                 ColumnOperand<D>{do_tile, wn * (HALF / 16)});
                mma_tiles<T, 64>(dk, ColumnOperand<64>{ds_base, wm * 2},
                                 ColumnOperand<D>{q_tile, wn * (HALF / 16)});
                __syncthreads();
                if (tile + 1 < num_tiles) gather_q_dout<T, D>(a, data, tile + 1, q_tile, do_tile);
#pragma unroll
                for (int i = 0; i < HALF / 32; i++) {
                    const int slice = wn * (HALF / 32) + i;
                    float dq[2][4][4] = {}; // dQ = scale dS K: rows 32*wm.., the slice's 32 columns
                    mma_tiles<T, 64>(dq, RowOperand<64>{ds_base, wm * 32},
                                     ColumnOperand<D>{k_tile, slice * 2});
                    store_dq_partial<T, D>(partial, dq, data, stage, num_rows - tile * 64, a.scale, wm,
                                           slice);
                }
            }

            bool accumulate;
            float *out = dkv_destination<D>(a, range, blockIdx.x, kv_block, key_tile, &accumulate);
            store_dkv<D>(out, accumulate, dk, dv, num_keys, wm, wn);
        }
        begin += kv_block.num_entries;
    }
}

template <typename T, int D>
static int selected_backward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    int smem = 4 * 64 * D * 2 + 2 * 64 * 64 * 2;
    dim3 grid((unsigned)a.num_ranges, heads);
    return LAUNCH((selected_backward_sm80_kernel<T, D>), grid, 128, smem, stream, a);
}

int fsa_selected_backward_sm80(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                               cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, selected_backward, a, heads, stream);
}
