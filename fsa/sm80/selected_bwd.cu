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
//     shared memory, 288 KB per tile                                            5.7 ms
#include "../selected.cuh"

template <typename T, int D>
__global__ void __launch_bounds__(128, 2) selected_backward_sm80_kernel(SelectedParams a) {
    constexpr int CHUNKS = D / 8, ROW_STEP = 128 / CHUNKS, HALF = D / 2, TILE = 64 * D * 2;
    extern __shared__ __align__(128) char smem[];
    // For the rows of two tiles: query * q_heads + head, partial row, lse_bwd in base 2, delta, and the last
    // visible key within the key tile (-1 for a row that pads the tile).
    __shared__ int64_t tile_row[2][64];
    __shared__ uint32_t tile_partial[2][64];
    __shared__ float tile_lse[2][64], tile_delta[2][64];
    __shared__ int tile_limit[2][64];
    const uint32_t k_tile = smem_address(smem), v_tile = k_tile + TILE, q_tile = v_tile + TILE,
                   do_tile = q_tile + TILE, p_base = do_tile + TILE;
    char *p_tile = smem + 4 * TILE, *ds_tile = p_tile + 64 * 64 * 2;
    const uint32_t ds_base = p_base + 64 * 64 * 2;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, quad = lane / 4, c = lane % 4;
    const int wm = warp / 2, wn = warp % 2; // this warp's half of the rows and of the columns of each matmul
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
            const int64_t kv_stride = (int64_t)a.kv_heads * D;

            // Data of a row besides q and dO: thread tid < 64 loads the data of row tid of the next tile.
            int64_t new_row;
            uint32_t new_partial;
            float new_lse, new_delta;
            int new_limit;
            uint32_t next_entry = 0; // entry of row tid of the tile that load_meta loads next
            auto load_entry = [&](int tile) {
                next_entry = range.entries[begin + min(tile * 64 + tid, num_rows - 1) / g];
            };
            auto load_meta = [&](int tile) {
                int r = tile * 64 + tid, i = min(r, num_rows - 1) / g, in_group = min(r, num_rows - 1) % g;
                uint32_t entry = next_entry;
                load_entry(tile + 1);
                int64_t query = entry / (uint32_t)a.topk;
                new_row = query * a.q_heads + kv_head * g + in_group;
                new_partial = ((entry - range.entry0) * a.key_tiles + key_tile) * g + in_group;
                new_lse = a.lse_bwd[new_row] * FSA_LOG2E;
                new_delta = a.delta[new_row];
                new_limit =
                    r < num_rows
                        ? last_visible_key(a, kv_block, (int64_t)(begin - kv_block.list_begin) + i, query) -
                              first_key
                        : -1;
            };
            auto store_meta = [&](int tile) {
                int stage = tile & 1;
                tile_row[stage][tid] = new_row, tile_partial[stage][tid] = new_partial;
                tile_lse[stage][tid] = new_lse, tile_delta[stage][tid] = new_delta;
                tile_limit[stage][tid] = new_limit;
            };
            auto gather = [&](int tile) {
                int chunk = tid % CHUNKS;
#pragma unroll
                for (int r = tid / CHUNKS; r < 64; r += ROW_STEP) {
                    int64_t offset = tile_row[tile & 1][r] * D + chunk * 8;
                    cp_async_16(q_tile + swizzled<D>(r, chunk), (const T *)a.q.data + offset);
                    cp_async_16(do_tile + swizzled<D>(r, chunk), (const T *)a.dout.data + offset);
                }
                cp_async_commit();
            };

            __syncthreads(); // all warps have finished the previous key tile
            if (tid < 64) {
                load_entry(0);
                load_meta(0);
                store_meta(0);
            }
            for (int i = tid; i < 64 * CHUNKS; i += 128) {
                int r = i / CHUNKS, chunk = i % CHUNKS;
                int64_t offset = (kv_block.key0 + (r < num_keys ? first_key + r : 0)) * kv_stride +
                                 kv_head * D + chunk * 8;
                cp_async_16(k_tile + swizzled<D>(r, chunk), (const T *)a.k.data + offset, r < num_keys);
                cp_async_16(v_tile + swizzled<D>(r, chunk), (const T *)a.v.data + offset, r < num_keys);
            }
            __syncthreads();
            gather(0);

            float dk[2][HALF / 8][4], dv[2][HALF / 8][4]; // keys 32*wm.., columns HALF*wn..
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int n = 0; n < HALF / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) dk[m][n][i] = dv[m][n][i] = 0;
                }
            }
            for (int tile = 0; tile < num_tiles; tile++) {
                cp_async_wait<0>();
                __syncthreads();
                const int stage = tile & 1;
                if (tid < 64 && tile + 1 < num_tiles) load_meta(tile + 1);

                // S = Q K^T and dP = dO V^T: rows 32*wm.., keys 32*wn..
                float s[2][4][4], dp[2][4][4];
                auto matmul_nt = [&](float(*x)[4][4], uint32_t left, uint32_t right) {
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
                            ldmatrix_x4(fa[m], left + swizzled<D>(wm * 32 + m * 16 + (lane & 15),
                                                                  kk * 2 + lane / 16));
                            ldmatrix_x4(fb[m],
                                        right + swizzled<D>(wn * 32 + m * 16 + (lane & 7) + lane / 16 * 8,
                                                            kk * 2 + (lane / 8 & 1)));
                        }
#pragma unroll
                        for (int m = 0; m < 2; m++) {
#pragma unroll
                            for (int n = 0; n < 4; n++) {
                                mma_16816<T>(x[m][n], fa[m], fb[n / 2][n % 2 * 2], fb[n / 2][n % 2 * 2 + 1]);
                            }
                        }
                    }
                };
                matmul_nt(s, q_tile, k_tile);
                matmul_nt(dp, do_tile, v_tile);
                // P and dS to shared memory, in 16 bits
#pragma unroll
                for (int m = 0; m < 2; m++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int r = wm * 32 + m * 16 + quad + 8 * i;
                        float lse = tile_lse[stage][r], delta = tile_delta[stage][r];
                        int limit = tile_limit[stage][r];
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
                if (tid < 64 && tile + 1 < num_tiles) store_meta(tile + 1);
                __syncthreads();

                // dV += P^T dO, dK += dS^T Q: keys 32*wm.., columns HALF*wn..
                auto matmul_tn = [&](float(*x)[HALF / 8][4], uint32_t left, uint32_t right) {
#pragma unroll
                    for (int kk = 0; kk < 4; kk++) {
                        uint32_t fa[2][4];
#pragma unroll
                        for (int m = 0; m < 2; m++) {
                            ldmatrix_x4_trans(fa[m], left + swizzled<64>(kk * 16 + (lane & 7) + lane / 16 * 8,
                                                                         wm * 4 + m * 2 + (lane / 8 & 1)));
                        }
#pragma unroll
                        for (int n = 0; n < HALF / 8; n += 2) {
                            uint32_t fb[4];
                            ldmatrix_x4_trans(fb, right + swizzled<D>(kk * 16 + (lane & 15),
                                                                      wn * (HALF / 8) + n + lane / 16));
#pragma unroll
                            for (int m = 0; m < 2; m++) {
                                mma_16816<T>(x[m][n], fa[m], fb[0], fb[1]);
                                mma_16816<T>(x[m][n + 1], fa[m], fb[2], fb[3]);
                            }
                        }
                    }
                };
                matmul_tn(dv, p_base, do_tile);
                matmul_tn(dk, ds_base, q_tile);
                __syncthreads();
                if (tile + 1 < num_tiles) gather(tile + 1);

#pragma unroll
                for (int slice = 0; slice < HALF / 32; slice++) {
                    // dQ = scale dS K: rows 32*wm.., this slice of 32 of the columns HALF*wn..
                    float dq[2][4][4] = {};
#pragma unroll
                    for (int kk = 0; kk < 4; kk++) {
                        uint32_t fa[2][4];
#pragma unroll
                        for (int m = 0; m < 2; m++) {
                            ldmatrix_x4(fa[m], ds_base + swizzled<64>(wm * 32 + m * 16 + (lane & 15),
                                                                      kk * 2 + lane / 16));
                        }
#pragma unroll
                        for (int n = 0; n < 4; n += 2) {
                            uint32_t fb[4];
                            ldmatrix_x4_trans(
                                fb, k_tile + swizzled<D>(kk * 16 + (lane & 15),
                                                         wn * (HALF / 8) + slice * 4 + n + lane / 16));
#pragma unroll
                            for (int m = 0; m < 2; m++) {
                                mma_16816<T>(dq[m][n], fa[m], fb[0], fb[1]);
                                mma_16816<T>(dq[m][n + 1], fa[m], fb[2], fb[3]);
                            }
                        }
                    }
#pragma unroll
                    for (int m = 0; m < 2; m++) {
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            int r = wm * 32 + m * 16 + quad + 8 * i;
                            if (tile * 64 + r >= num_rows) continue;
                            const PartialChunk<T> out[1] = {make_partial_chunk<T>(dq[m], 0, i, a.scale)};
                            PartialChunk<T>::store(partial + (int64_t)tile_partial[stage][r] *
                                                                 partial_row_bytes<T, D>(),
                                                   wn * (HALF / 32) + slice, c, out);
                        }
                    }
                }
            }

            // Epilogue: store dK and dV of the key tile.
            bool accumulate;
            float *out = dkv_destination<D>(a, range, blockIdx.x, kv_block, key_tile, &accumulate);
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int key = wm * 32 + m * 16 + quad + 8 * i;
                    if (key >= num_keys) continue;
#pragma unroll
                    for (int n = 0; n < HALF / 8; n++) {
                        float2 *dk_out = (float2 *)(out + key * 2 * D + wn * HALF + n * 8 + 2 * c);
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
