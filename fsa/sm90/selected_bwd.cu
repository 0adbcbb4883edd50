#include "selected.cuh"

template <int D, int KEYS> struct Backward {
    static constexpr int CONSUMERS = 2; // warpgroups, each with 64 keys
    // A thread block's shares of the lists: consumers of blocks of 64 keys have one each, two of 128 keys are
    // two halves of one.
    static constexpr int SHARES = KEYS == 64 ? 2 : 1, SHARERS = CONSUMERS / SHARES;
    static constexpr int Q_STAGES = D == 128 && KEYS == 64 ? 2 : 4,
                         KV_STAGES = D == 128 || KEYS == 64 ? 1 : 2;
    static constexpr int PRODUCER_REGISTERS = D == 64 ? 88 : 40, REGISTERS = D == 64 ? 208 : 232;
    static constexpr int DP_ROWS = D == 64 ? 64 : 32; // of dP at a time: all 64 would spill registers
    static constexpr int DQ_COLUMNS = D / SHARERS < 64 ? D / SHARERS : 64; // of dQ at a time
    // Pairs of producer warps that a share has: one warp of a pair finds a tile's rows and gathers q, the
    // other gathers dO; the first pair's other one brings K and V, too.
    static constexpr int GATHERERS = 2 / SHARES;
    static_assert(Q_STAGES % GATHERERS == 0, "a stage has one pair");
};

// ---------------------------------------------------------------------------------------------------------
// Backward

// One share's.
template <int D, int KEYS> struct alignas(1024) BackwardSmem {
    static constexpr int Q = Backward<D, KEYS>::Q_STAGES, KV = Backward<D, KEYS>::KV_STAGES;
    char k[KV][KEYS * D * 2], v[KV][KEYS * D * 2], q[Q][2][64 * D * 2]; // q and dO
    char ds[KEYS * 64 * 2];                                             // dS^T, [keys][64 rows]
    struct {
        uint32_t partial[64];
        alignas(8) float lse[64], delta[64]; // lse_bwd and delta
        alignas(8) int limit[64];
        int masked;
    } tile[Q];
    struct {
        float *out;             // where the sums [keys, 2, D] go
        int tiles, keys, added; // added: they are added there
    } block[KV];
    uint32_t rows[2 * Q][64]; // of dO, from the warp that gathers q
    uint64_t rows_full[2 * Q], q_full[Q], q_empty[Q], kv_full[KV], kv_empty[KV];
};

// A thread block takes a share or two of one head's list: K and V of each KV block stay in shared memory,
// and a consumer's dK and dV of 64 keys in registers. For each 64 gathered rows of q and dO a consumer
// computes S^T = K Q^T, dP^T = V dO^T, P^T = exp(S^T - lse_bwd), dS^T = P^T (dP^T - delta), and dV += P^T
// dO, dK += dS^T Q with P^T and dS^T as A fragments. dS^T also goes to shared memory, where dQ = dS K reads
// it transposed; a consumer takes 64 of dQ's columns at a time. What comes next runs meanwhile: dP while exp
// is taken, dV while dS is made, dK while it is stored, the next tile's S while the last of dQ goes out, as a
// partial row (partial.cuh; the reduction puts its channels in order). dQ needs the rows no longer, so the
// next ones come while it is computed and packed. After a block's last tile S is computed of whatever lies
// there, and not used: ptxas serializes the products here if one is started under a condition, or two are
// under way where the loop begins. A KV block's sum is added to dkv by the thread block where its list
// starts; one that goes on with another's list leaves its sum in `crossing`, and sum_crossing adds these in
// order.
//
// Floors at 64K tokens, 32 heads, (B, T) = (64, 16), d = 128: 17.2 GB of q and dO rows in, 6.4 GB out: 5.2 ms
// at 4.5 TB/s, about 4.1 with the gathers out of L2 (a slab has 32 MiB of rows); dK and dV of each slab to
// and from dkv, 2.1 GB each way, 1 ms; 2.75 TFLOP, 3.5 ms at 790; shared memory 184 KiB a tile (gather 32, S
// 32, dP 48, dV and dK 32, dQ 32, dS 8), 3.3 ms at 128 bytes a clock. On an H100 32 launches of 250 us by ncu
// with 620 MB of HBM traffic each, 2.5 TB/s of some 3.0, and as many reductions of 104 us and 282 MB. A tile
// takes a consumer 6,200 clocks and 900 instructions, while both consumers' products are 2,600: the chain of
// products and what lies between them binds, closely followed by memory, for which consumers wait a tenth of
// the time. Blocks of 128 keys move half of the rows for the same products: 350 us, 783 MB. At d = 128 and
// with 224 registers ptxas serializes the products (C7512), which costs 5%; of 232 for both consumers 40 are
// left for producers.
template <typename T, int D, int KEYS>
__global__ void __launch_bounds__(128 + 128 * Backward<D, KEYS>::CONSUMERS, 1)
    selected_backward_sm90_kernel(const SelectedParams a, const __grid_constant__ CUtensorMap k_map,
                                  const __grid_constant__ CUtensorMap v_map) {
    typedef Backward<D, KEYS> B;
    typedef BackwardSmem<D, KEYS> Smem;
    typedef Turn<B::Q_STAGES> QTurn;
    typedef Turn<2 * B::Q_STAGES> RowsTurn;
    typedef Turn<B::KV_STAGES> KvTurn;
    constexpr int TILE = 64 * D * 2;
    extern __shared__ __align__(1024) char raw[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    // Which of the thread block's shares is this warp's: even producer warps work for the first, odd ones for
    // the second.
    const int which = B::SHARES == 1 ? 0 : warp < 4 ? warp % 2 : warp / 4 - 1;
    const unsigned index = blockIdx.x * B::SHARES + which;
    Smem *m = (Smem *)(raw + (1024 - (smem_address(raw) & 1023)) % 1024) + which;
    const uint32_t rows_full = smem_address(m->rows_full), q_full = smem_address(m->q_full),
                   q_empty = smem_address(m->q_empty);
    const uint32_t kv_full = smem_address(m->kv_full), kv_empty = smem_address(m->kv_empty);
    const int head = a.head0 + blockIdx.y, g = a.group;
    if (warp < B::SHARES && lane == 0) {
        for (int i = 0; i < 2 * B::Q_STAGES; i++) mbarrier_init(rows_full + 8 * i, WARP_ARRIVALS);
        for (int i = 0; i < B::Q_STAGES; i++) {
            // The lanes' copies of both warps, and one's word that what goes with them is there.
            mbarrier_init(q_full + 8 * i, 64 + WARP_ARRIVALS);
            mbarrier_init(q_empty + 8 * i, 4 * B::SHARERS * WARP_ARRIVALS);
        }
        for (int i = 0; i < B::KV_STAGES; i++) {
            mbarrier_init(kv_full + 8 * i, 32 + 1);
            mbarrier_init(kv_empty + 8 * i, 4 * B::SHARERS * WARP_ARRIVALS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warp < 4) {
        warpgroup_reg_dealloc<B::PRODUCER_REGISTERS>();
        const Share share = share_of(a, head, index);
        const uint32_t pair = B::SHARES == 1 ? warp % 2 : 0; // takes every GATHERERS-th tile
        if (warp < 2) {
            // Partial rows are counted over all heads of the launch.
            const uint32_t entry0 = share.entry0 - blockIdx.y * (uint32_t)(a.lists.slab_rows * a.topk);
            GatherTileIterator<B::GATHERERS> walk(a, share, pair);
            for (uint32_t n = pair; walk.runs.more; n += B::GATHERERS) {
                TileRows t = walk.take(a, entry0);
                // The tile that had this place, 2*Q_STAGES before, has ended: this warp has waited for a
                // later.
                const RowsTurn rows(n);
#pragma unroll
                for (int i = 0; i < 2; i++) m->rows[rows.stage][lane + 32 * i] = t.row[i];
                mbarrier_arrive_warp(rows_full + 8 * rows.stage);
                walk.next(a, share);
                QTurn turn(n);
                turn.wait_empty(q_empty);
                auto &meta = m->tile[turn.stage];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int r = lane + 32 * i;
                    cp_async_4(smem_address(&meta.lse[r]), &a.lse_bwd[t.row[i]]);
                    cp_async_4(smem_address(&meta.delta[r]), &a.delta[t.row[i]]);
                    if (t.partial[i] == NONE) t.limit[i] = -1;
                    meta.partial[r] = t.partial[i], meta.limit[r] = t.limit[i];
                }
                int masked = __any_sync(0xffffffffu, min(t.limit[0], t.limit[1]) < KEYS - 1);
                if (lane == 0) meta.masked = masked;
                gather<T, D, 4>(smem_address(m->q[turn.stage][0]), a.q, t.row);
                cp_async_mbarrier_arrive(q_full + 8 * turn.stage);
                mbarrier_arrive_warp(q_full + 8 * turn.stage);
            }
        } else {
            uint32_t n = 0, tile = 0;
            for (KvBlockIterator runs(a, share); runs.more; runs.next(a, share)) {
                const Run &run = runs.run;
                const int tiles = ((int)run.count * g + 63) / 64;
                for (int part = 0; part < a.parts; part++, n++) {
                    auto load_keys = [&] {
                        bool added;
                        float *out = sum_of<D>(a, share, index, run, part, &added);
                        KvTurn turn(n);
                        const uint32_t k_tile = smem_address(m->k[turn.stage]);
                        const uint32_t v_tile = smem_address(m->v[turn.stage]),
                                       full = kv_full + 8 * turn.stage;
                        const int keys = run.keys - part * KEYS;
                        turn.wait_empty(kv_empty);
                        // What a short block lacks are zeros, which the copy engine doesn't write.
                        if (keys < KEYS) load_kv<T, D, KEYS>(a, run, part, k_tile, v_tile);
                        cp_async_mbarrier_arrive(full);
                        if (lane == 0) {
                            auto &meta = m->block[turn.stage];
                            meta.out = out, meta.added = added;
                            meta.tiles = tiles, meta.keys = keys;
                            mbarrier_arrive_expect_tx(full, keys < KEYS ? 0 : 2 * KEYS * D * 2);
                            for (int panel = 0; panel < D / 64 && keys >= KEYS; panel++) {
                                const int key0 = (int)run.key0 + part * KEYS, at = panel * KEYS * 128;
                                tma_load_3d(k_tile + at, &k_map, panel * 64, head, key0, full);
                                tma_load_3d(v_tile + at, &v_map, panel * 64, head, key0, full);
                            }
                        }
                    };
                    for (int i = 0; i < tiles; i++, tile++) {
                        if (tile % B::GATHERERS == pair) {
                            const RowsTurn rows(tile);
                            rows.wait_full(rows_full);
                            QTurn turn(tile);
                            turn.wait_empty(q_empty);
                            const uint32_t row[2] = {m->rows[rows.stage][lane],
                                                     m->rows[rows.stage][lane + 32]};
                            gather<T, D, 4>(smem_address(m->q[turn.stage][1]), a.dout, row);
                            cp_async_mbarrier_arrive(q_full + 8 * turn.stage);
                        }
                        // Not before the part's first rows are under way: this waits until the part before
                        // is done with.
                        if (pair == 0 && i == min(tiles, B::GATHERERS) - 1) load_keys();
                    }
                }
            }
            if (pair == 0) {
                KvTurn turn(n);
                turn.wait_empty(kv_empty);
                cp_async_mbarrier_arrive(kv_full + 8 * turn.stage);
                if (lane == 0) {
                    m->block[turn.stage].tiles = 0;
                    mbarrier_arrive(kv_full + 8 * turn.stage);
                }
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
    } else {
        warpgroup_reg_alloc<B::REGISTERS>();
        pdl_wait(); // as in the forward kernel
        pdl_launch_dependents();
        const int half = warp / 4 - 1 - which, quad = lane / 4, c = lane % 4; // half: of 128 keys
        const int key0 = half * 64 + warp % 4 * 16 + quad; // this thread's keys: key0 and key0 + 8
        const float scale_log2 = a.scale * FSA_LOG2E;
        float s[8][4], dp[B::DP_ROWS / 8][4], dq[B::DQ_COLUMNS / 8][4], dk[D / 8][4], dv[D / 8][4];
        uint32_t tile = 0, n = 0; // tiles so far, and parts
        for (;; n++) {
            KvTurn kv(n);
            kv.wait_full(kv_full);
            const auto &block = m->block[kv.stage];
            const int tiles = block.tiles;
            if (tiles == 0) break;
            fence_proxy_async(); // cp.async may have written K and V
            const uint32_t k_tile = smem_address(m->k[kv.stage]);
            const uint32_t k_mine = k_tile + half * 64 * 128;
            const uint32_t v_mine = smem_address(m->v[kv.stage]) + half * 64 * 128;
            // x = A B^T over D: 64 keys of this consumer's by 64 or fewer rows
            auto start_product = [&](auto &x, uint32_t keys, uint32_t rows) {
                const uint64_t left = make_smem_desc_opaque(keys), right = make_smem_desc(rows);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < D / 16; k++) {
                    wgmma_ss<T>(x, advance_desc(left, k / 4 * KEYS * 128 + k % 4 * 32),
                                advance_desc(right, k / 4 * 64 * 128 + k % 4 * 32), k > 0);
                }
                wgmma_commit();
            };
            auto wait_rows = [&](QTurn turn) {
                turn.wait_full(q_full);
                fence_proxy_async(); // cp.async wrote the rows
            };
            auto start_s = [&](QTurn turn) { start_product(s, k_mine, smem_address(m->q[turn.stage][0])); };
            wait_rows(tile);
            start_s(tile);
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++) dk[j][i] = dv[j][i] = 0;
            }
            for (const uint32_t end = tile + tiles; tile < end; tile++) {
                QTurn turn(tile);
                const auto &meta = m->tile[turn.stage];
                const uint32_t q_tile = smem_address(m->q[turn.stage][0]), g_tile = q_tile + TILE;
                const uint64_t q_rows = make_smem_desc(q_tile, 64 * 128),
                               g_rows = make_smem_desc(g_tile, 64 * 128);
                uint32_t p[4][4], ds[4][4];
                const int masked = meta.masked;
#pragma unroll
                for (int row = 0; row < 64; row += B::DP_ROWS) {
                    float2 lse[B::DP_ROWS / 8], delta[B::DP_ROWS / 8];
#pragma unroll
                    for (int j = 0; j < B::DP_ROWS / 8; j++)
                        lse[j] = *(const float2 *)&meta.lse[row + j * 8 + 2 * c];
                    if (row == 0) {
                        wgmma_wait<0>();
                        fence_operand(s);
                    }
                    start_product(dp, v_mine, g_tile + row * 128);
#pragma unroll
                    for (int j = row / 8; j < (row + B::DP_ROWS) / 8; j++) {
                        const float base[2] = {lse[j - row / 8].x * -FSA_LOG2E,
                                               lse[j - row / 8].y * -FSA_LOG2E};
#pragma unroll
                        for (int i = 0; i < 4; i++) s[j][i] = exp2_fast(s[j][i] * scale_log2 + base[i & 1]);
                    }
                    if (masked) {
#pragma unroll
                        for (int j = row / 8; j < (row + B::DP_ROWS) / 8; j++) {
                            int2 limit = *(const int2 *)&meta.limit[j * 8 + 2 * c];
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                if (key0 + i / 2 * 8 > (i & 1 ? limit.y : limit.x)) s[j][i] = 0;
                            }
                        }
                    }
#pragma unroll
                    for (int j = row / 8; j < (row + B::DP_ROWS) / 8; j++) {
                        p[j / 2][j % 2 * 2] = pack2<T>(s[j][0], s[j][1]);
                        p[j / 2][j % 2 * 2 + 1] = pack2<T>(s[j][2], s[j][3]);
                    }
                    wgmma_fence();
#pragma unroll
                    for (int k = row / 16; k < (row + B::DP_ROWS) / 16; k++)
                        wgmma_rs<T, 1>(dv, p[k], advance_desc(g_rows, k * 2048), 1);
                    wgmma_commit();
#pragma unroll
                    for (int j = 0; j < B::DP_ROWS / 8; j++)
                        delta[j] = *(const float2 *)&meta.delta[row + j * 8 + 2 * c];
                    wgmma_wait<1>();
                    fence_operand(dp);
#pragma unroll
                    for (int j = row / 8; j < (row + B::DP_ROWS) / 8; j++) {
                        const float(&x)[4] = dp[j - row / 8];
                        const float2 d = delta[j - row / 8];
#pragma unroll
                        for (int i = 0; i < 4; i += 2) {
                            ds[j / 2][j % 2 * 2 + i / 2] =
                                pack2<T>(s[j][i] * (x[i] - d.x), s[j][i + 1] * (x[i + 1] - d.y));
                        }
                    }
                }
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; k++) wgmma_rs<T, 1>(dk, ds[k], advance_desc(q_rows, k * 2048), 1);
                wgmma_commit();
                named_barrier_sync(1 + which, 128 * B::SHARERS); // the last tile's dQ has been computed
#pragma unroll
                for (int j = 0; j < 8; j++) {
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        *(uint32_t *)(m->ds + panel_offset(key0 + 8 * i, j, KEYS * 128) + 4 * c) =
                            ds[j / 2][j % 2 * 2 + i];
                }
                fence_proxy_async();
                named_barrier_sync(1 + which, 128 * B::SHARERS);

                // dQ from `column` on; sharers have halves of the columns.
                const int column0 = half * (D / B::SHARERS);
                auto start_dq = [&](int column) {
                    const uint64_t left = make_smem_desc(smem_address(m->ds));
                    const uint64_t right = make_smem_desc(k_tile + column / 64 * KEYS * 128 + column % 64 * 2);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < KEYS / 16; k++)
                        wgmma_ss<T, 1, 1>(dq, advance_desc(left, k * 2048), advance_desc(right, k * 2048),
                                          k > 0);
                    wgmma_commit();
                };
                uint32_t to[2];
#pragma unroll
                for (int i = 0; i < 2; i++) to[i] = meta.partial[warp % 4 * 16 + quad + 8 * i];
                auto store_dq = [&](int column) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (to[i] == NONE) continue;
                        Partial<T> x[B::DQ_COLUMNS / 32];
#pragma unroll
                        for (int j = 0; j < B::DQ_COLUMNS / 32; j++)
                            x[j] = piece_of<T>(dq, 4 * j, i, a.scale);
                        Partial<T>::store(a.partial + to[i] * (uint64_t)row_bytes<T, D>(), column / 32, c, x);
                    }
                };
                constexpr int PIECES = D / B::SHARERS / B::DQ_COLUMNS;
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++) {
                    start_dq(column0 + piece * B::DQ_COLUMNS);
                    if (piece == 0) {
                        wgmma_wait<1>(); // dV and dK are there
                        mbarrier_arrive_warp(q_empty + 8 * turn.stage);
                    }
                    if (piece + 1 == PIECES) {
                        // No waiting past the part's end: the stage's next round may be any, the parity lies.
                        if (tile + 1 < end) wait_rows(tile + 1);
                        start_s(tile + 1);
                        wgmma_wait<1>();
                    } else {
                        wgmma_wait<0>();
                    }
                    fence_operand(dq);
                    store_dq(column0 + piece * B::DQ_COLUMNS);
                }
            }
            fence_operand(dk);
            fence_operand(dv);
            float *const out = block.out;
            const int keys = block.keys, added = block.added;
            mbarrier_arrive_warp(kv_empty + 8 * kv.stage); // only the S that nobody uses still reads K
            auto put_sums = [&](auto put) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = key0 + 8 * i;
                    if (key >= keys) continue;
                    float *const to = out + (int64_t)key * 2 * D + 2 * c;
#pragma unroll
                    for (int j = 0; j < D / 8; j++) {
                        put(to + 8 * j, dk[j][2 * i], dk[j][2 * i + 1]);
                        put(to + D + 8 * j, dv[j][2 * i], dv[j][2 * i + 1]);
                    }
                }
            };
            if (added)
                put_sums([](float *to, float x, float y) { red_add_v2(to, x, y); });
            else
                put_sums([](float *to, float x, float y) { *(float2 *)to = make_float2(x, y); });
            wgmma_wait<0>();
            fence_operand(s);
        }
    }
}

template <typename T, int D, int KEYS>
static int backward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    typedef Backward<D, KEYS> B;
    constexpr int smem = (int)sizeof(BackwardSmem<D, KEYS>) * B::SHARES + 1024;
    static_assert(smem <= 232448, "shared memory of a thread block");
    if (allow_smem(selected_backward_sm90_kernel<T, D, KEYS>, smem)) return FSA_ERROR_CUDA;
    CUtensorMap k_map, v_map;
    if (key_map<T, D, KEYS>(a, a.k, &k_map) || key_map<T, D, KEYS>(a, a.v, &v_map)) return FSA_ERROR_CUDA;
    dim3 grid((unsigned)ceil_div(a.shares, B::SHARES), heads);
    launch(a.slab > 0, selected_backward_sm90_kernel<T, D, KEYS>, grid, 128 + 128 * B::CONSUMERS, smem,
           stream, a, k_map, v_map);
    return FSA_OK;
}

int fsa_selected_backward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                          cudaStream_t stream) {
    return DISPATCH(backward);
}

int fsa_selected_ranges_per_sm_sm90(int keys, int backward) {
    return backward && keys == 64 ? Backward<128, 64>::SHARES : 1;
}
