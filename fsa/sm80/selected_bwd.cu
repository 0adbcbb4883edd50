#include "../selected.cuh"

// ---------------------------------------------------------------------------------------------------------
// Backward

// A thread block takes a share of one head's list, 64 keys of each KV block at a time: K and V stay
// in shared memory, dK and dV in registers; 64 gathered rows of q and dO at a time give S, dP = dO V^T, P =
// exp(S - lse_bwd), dS = P (dP - delta), then dV += P^T dO, dK += dS^T Q, and dQ = dS K goes out as a
// partial row (partial.cuh; the reduction puts its channels in order). A KV block's sum is added to dkv by
// the thread block where its list starts; one that goes on with another's list leaves its sum in `crossing`,
// and sum_crossing adds these in order. A row moves 4*D + 12 bytes in and 1.5*D out (fp16 2*D). 64K tokens,
// 32 heads, T = 16, d = 128: 17.6 GB in, 6.4 out, 5.3 ms at 4.5 TB/s; 2.75 TFLOP, 3.5 ms at 790; with
// mma.sync shared memory's 288 KB a tile of 64 rows: 5.7 ms.
template <typename T, int D> __global__ void __launch_bounds__(128, 2) selected_backward_kernel(SelectedParams a) {
    constexpr int CHUNKS = D / 8, STEP = 128 / CHUNKS, HALF = D / 2, TILE = 64 * D * 2;
    extern __shared__ __align__(128) char smem[];
    __shared__ int64_t meta_row[2][64]; // row*Hq + head, of the tile's rows
    __shared__ uint32_t meta_partial[2][64];
    __shared__ float meta_lse[2][64], meta_delta[2][64];
    __shared__ int meta_limit[2][64]; // last visible key; -1 for a row that pads the tile
    const uint32_t sk = smem_address(smem), sv = sk + TILE, sq = sv + TILE, sg = sq + TILE, sp = sg + TILE;
    char *p_tile = smem + 4 * TILE, *ds_tile = p_tile + 64 * 64 * 2;
    const uint32_t sds = sp + 64 * 64 * 2;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, quad = lane / 4, c = lane % 4;
    const int wm = warp / 2, wn = warp % 2; // which half of a product's rows and columns is this warp's
    const int head = a.head0 + blockIdx.y, g = a.group;
    const Share share = share_of(a, head, blockIdx.x);
    const float scale_log2 = a.scale * FSA_LOG2E;
    char *partial = a.partial + (int64_t)blockIdx.y * a.lists.slab_rows * a.topk * a.parts * g * row_bytes<T, D>();

    for (uint32_t begin = share.begin; begin < share.end;) {
        Run run = run_at(a, share, begin);
        const int rows = (int)run.count * g, tiles = (rows + 63) / 64;
        for (int part = 0; part < a.parts; part++) {
            const int first_key = part * 64, keys = min(64, run.keys - first_key);
            const int64_t kv_row = (int64_t)a.kv_heads * D;

            // What a row needs besides q and dO, for thread tid < 64: row tid of a tile.
            int64_t new_row;
            uint32_t new_partial;
            float new_lse, new_delta;
            int new_limit;
            uint32_t next_entry = 0; // of the tile after the one that load_meta takes
            auto load_entry = [&](int tile) {
                next_entry = share.entries[begin + min(tile * 64 + tid, rows - 1) / g];
            };
            auto load_meta = [&](int tile) {
                int r = tile * 64 + tid, i = min(r, rows - 1) / g, in_group = min(r, rows - 1) % g;
                uint32_t entry = next_entry;
                load_entry(tile + 1);
                int64_t row = entry / (uint32_t)a.topk;
                new_row = row * a.q_heads + head * g + in_group;
                new_partial = ((entry - share.entry0) * a.parts + part) * g + in_group;
                new_lse = a.lse_bwd[new_row] * FSA_LOG2E;
                new_delta = a.delta[new_row];
                new_limit =
                    r < rows ? last_key(a, run, (int64_t)(begin - run.first) + i, row) - first_key : -1;
            };
            auto store_meta = [&](int tile) {
                int at = tile & 1;
                meta_row[at][tid] = new_row, meta_partial[at][tid] = new_partial;
                meta_lse[at][tid] = new_lse, meta_delta[at][tid] = new_delta, meta_limit[at][tid] = new_limit;
            };
            auto gather = [&](int tile) {
                int chunk = tid % CHUNKS;
#pragma unroll
                for (int r = tid / CHUNKS; r < 64; r += STEP) {
                    int64_t from = meta_row[tile & 1][r] * D + chunk * 8;
                    cp_async_16(sq + swizzled<D>(r, chunk), (const T *)a.q + from);
                    cp_async_16(sg + swizzled<D>(r, chunk), (const T *)a.dout + from);
                }
                cp_async_commit();
            };

            __syncthreads(); // the last KV block's readers are done
            if (tid < 64) {
                load_entry(0);
                load_meta(0);
                store_meta(0);
            }
            for (int i = tid; i < 64 * CHUNKS; i += 128) {
                int r = i / CHUNKS, chunk = i % CHUNKS;
                int64_t from = (run.key0 + (r < keys ? first_key + r : 0)) * kv_row + head * D + chunk * 8;
                cp_async_16(sk + swizzled<D>(r, chunk), (const T *)a.k + from, r < keys);
                cp_async_16(sv + swizzled<D>(r, chunk), (const T *)a.v + from, r < keys);
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
            for (int tile = 0; tile < tiles; tile++) {
                cp_async_wait<0>();
                __syncthreads();
                const int at = tile & 1;
                if (tid < 64 && tile + 1 < tiles) load_meta(tile + 1);

                // S and dP: rows 32*wm.., keys 32*wn..
                float s[2][4][4], dp[2][4][4];
                auto row_products = [&](float(*x)[4][4], uint32_t left, uint32_t right) {
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
                row_products(s, sq, sk);
                row_products(dp, sg, sv);
#pragma unroll
                for (int m = 0; m < 2; m++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int r = wm * 32 + m * 16 + quad + 8 * i;
                        float lse = meta_lse[at][r], delta = meta_delta[at][r];
                        int limit = meta_limit[at][r];
#pragma unroll
                        for (int n = 0; n < 4; n++) {
                            float p[2], ds[2];
#pragma unroll
                            for (int j = 0; j < 2; j++) {
                                int key = wn * 32 + n * 8 + 2 * c + j;
                                p[j] = key <= limit ? exp2_fast(s[m][n][2 * i + j] * scale_log2 - lse) : 0;
                                ds[j] = p[j] * (dp[m][n][2 * i + j] - delta);
                            }
                            uint32_t to = swizzled<64>(r, wn * 4 + n) + 4 * c;
                            *(uint32_t *)(p_tile + to) = pack2<T>(p[0], p[1]);
                            *(uint32_t *)(ds_tile + to) = pack2<T>(ds[0], ds[1]);
                        }
                    }
                }
                if (tid < 64 && tile + 1 < tiles) store_meta(tile + 1);
                __syncthreads();

                // dV += P^T dO, dK += dS^T Q
                auto key_products = [&](float(*x)[HALF / 8][4], uint32_t left, uint32_t right) {
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
                key_products(dv, sp, sg);
                key_products(dk, sds, sq);
                __syncthreads();
                if (tile + 1 < tiles) gather(tile + 1);

                    // dQ = dS K, 32 columns at a time: rows 32*wm.., columns HALF*wn..
#pragma unroll
                for (int group = 0; group < HALF / 32; group++) {
                    float dq[2][4][4] = {};
#pragma unroll
                    for (int kk = 0; kk < 4; kk++) {
                        uint32_t fa[2][4];
#pragma unroll
                        for (int m = 0; m < 2; m++) {
                            ldmatrix_x4(fa[m], sds + swizzled<64>(wm * 32 + m * 16 + (lane & 15),
                                                                  kk * 2 + lane / 16));
                        }
#pragma unroll
                        for (int n = 0; n < 4; n += 2) {
                            uint32_t fb[4];
                            ldmatrix_x4_trans(fb,
                                              sk + swizzled<D>(kk * 16 + (lane & 15),
                                                               wn * (HALF / 8) + group * 4 + n + lane / 16));
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
                            if (tile * 64 + r >= rows) continue;
                            const Partial<T> out[1] = {piece_of<T>(dq[m], 0, i, a.scale)};
                            Partial<T>::store(partial + (int64_t)meta_partial[at][r] * row_bytes<T, D>(),
                                              wn * (HALF / 32) + group, c, out);
                        }
                    }
                }
            }

            bool add;
            float *out = sum_of<D>(a, share, blockIdx.x, run, part, &add);
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int key = wm * 32 + m * 16 + quad + 8 * i;
                    if (key >= keys) continue;
#pragma unroll
                    for (int n = 0; n < HALF / 8; n++) {
                        float2 *to_k = (float2 *)(out + key * 2 * D + wn * HALF + n * 8 + 2 * c);
                        float2 *to_v = to_k + D / 2;
                        float2 x = make_float2(dk[m][n][2 * i], dk[m][n][2 * i + 1]);
                        float2 y = make_float2(dv[m][n][2 * i], dv[m][n][2 * i + 1]);
                        if (add) {
                            float2 x0 = *to_k, y0 = *to_v;
                            x.x += x0.x, x.y += x0.y, y.x += y0.x, y.y += y0.y;
                        }
                        *to_k = x;
                        *to_v = y;
                    }
                }
            }
        }
        begin += run.count;
    }
}

template <typename T, int D> static int backward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    int smem = 4 * 64 * D * 2 + 2 * 64 * 64 * 2;
    if (allow_smem(selected_backward_kernel<T, D>, smem)) return FSA_ERROR_CUDA;
    dim3 grid((unsigned)a.shares, heads);
    selected_backward_kernel<T, D><<<grid, 128, smem, stream>>>(a);
    return FSA_OK;
}

int fsa_selected_backward_sm80(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                          cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, backward, a, heads, stream);
}
