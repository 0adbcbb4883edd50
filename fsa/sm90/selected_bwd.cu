// sm90/selected_bwd.cu: main kernel of the selected branch's backward pass for Hopper.
//
// A thread block (one per SM, one wave) processes work ranges of one KV head (../selected.cuh): two if key
// tiles have 64 keys, one if they have 128. For each key tile, K and V stay in shared memory, dK and dV in
// registers. For each tile i of 64 gathered rows of q and dO, the thread block computes
//     S^T = scale K Q^T,  dP^T = V dO^T,  P^T = exp(S^T - lse_bwd),  dS^T = P^T (dP^T - delta)
//     dV += P^T dO,  dK / scale += dS^T Q,  dQ = scale dS K, stored as dq_partial rows (partial.cuh)
// dO is dout, the ungated gradient; lse_bwd contains the gate, so P is gate * P. selected_store_dkv_kernel
// multiplies dK by scale.
//
// Producer warpgroup, for each work range:
//     q warps    find the rows of a tile, gather q by cp.async, and load lse_bwd and delta
//     dO warps   gather dO by cp.async; one of them also loads K and V by TMA
// Two consumer warpgroups with 64 keys each: each has its own work range, or half of a 128-key tile and half
// of dQ's columns. Schedule at d = 128 and 64 keys (0 and 1 are halves of the rows, or of dQ's columns):
//     wgmma   S(i)  dP0    dV0    dP1    dV1    dK          dQ0           dQ1    S(i+1)
//     other         P0     dS0    P1     dS1    dS to smem         store dQ0     store dQ1
// P^T and dS^T are A operands from registers. dQ reads dS^T from shared memory, transposed. The stage of q
// and dO is free after dK, so the next rows arrive during dQ.
//
// Shared memory at d = 128, 208 KiB:    K, V      q, dO           dS
//     2 work ranges of 64-key tiles     32 KiB    2 x 32 KiB      8 KiB     each
//     1 work range of 128-key tiles     64 KiB    4 x 32 KiB     16 KiB
//
// Each dq_partial row is written once. The work range that holds the start of a query list adds dK and dV to
// dkv_accum. A range that continues the list writes dkv_partial, which the combine kernel adds in order. So
// the results are bitwise reproducible.
//
// Lower bounds for 64K tokens, (32, 8) heads, d = 128, (B, T) = (64, 16), all 16 blocks in the
// lists; fsa_backward leaves out the 2 local ones:
//     17.2 GB of q and dO in, 6.4 GB of dq_partial out   5.2 ms
//     2.75 TFLOP                                         3.5 ms
//     shared memory, 184 KiB per tile                    3.3 ms
//     dkv_accum of 4 slabs: 0.8 GB in, 1.3 GB out        0.5 ms
// Limited by the dependent chain of a tile's matmuls, and by memory bandwidth.
#include "selected.cuh"

template <int D, int TILE_KEYS> struct BackwardTraits {
    static constexpr int CONSUMERS = 2; // warpgroups, each with 64 keys
    // Work ranges of a thread block, and consumers of each.
    static constexpr int RANGES = TILE_KEYS == 64 ? 2 : 1, CONSUMERS_PER_RANGE = CONSUMERS / RANGES;
    static constexpr int Q_STAGES = D == 128 && TILE_KEYS == 64 ? 2 : 4,
                         KV_STAGES = D == 128 || TILE_KEYS == 64 ? 1 : 2;
    // At d = 128, >= 232 consumer registers keep the wgmmas asynchronous (else ptxas serializes them,
    // warning C7512).
    static constexpr int PRODUCER_REGISTERS = D == 64 ? 88 : 40, CONSUMER_REGISTERS = D == 64 ? 208 : 232;
    static constexpr int DP_ROWS = D == 64 ? 64 : 32; // rows of dP at a time, as many as the registers hold
    // Columns of dQ at a time.
    static constexpr int DQ_COLUMNS = D / CONSUMERS_PER_RANGE < 64 ? D / CONSUMERS_PER_RANGE : 64;
    // Pairs of a q warp and a dO warp per work range. Each loads every GATHER_PAIRS-th tile.
    static constexpr int GATHER_PAIRS = 2 / RANGES;
    static_assert(Q_STAGES % GATHER_PAIRS == 0, "each stage must belong to one pair");
};

// Shared memory of one work range.
template <int D, int TILE_KEYS> struct alignas(1024) BackwardSmem {
    static constexpr int Q = BackwardTraits<D, TILE_KEYS>::Q_STAGES,
                         KV = BackwardTraits<D, TILE_KEYS>::KV_STAGES;
    char k[KV][TILE_KEYS * D * 2], v[KV][TILE_KEYS * D * 2], q[Q][2][64 * D * 2]; // q[stage]: q and dO
    char ds[TILE_KEYS * 64 * 2];                                                  // dS^T, [keys][64 rows]
    struct {
        uint32_t partial_row[64];
        alignas(8) float lse[64], delta[64]; // lse is lse_bwd
        alignas(8) int limit[64];            // last visible key of each row, -1 for a row that pads the tile
        int masked;                          // whether a row sees fewer than TILE_KEYS keys
    } row_tile_info[Q];
    struct {
        float *dkv;                          // destination of dK and dV, [keys, 2, D]
        int num_tiles, num_keys, accumulate; // num_tiles 0: end of the work range; accumulate: add to dkv
    } key_tile_info[KV];
    uint32_t do_rows[2 * Q][64]; // rows of dO to gather, from the warp that gathers q
    uint64_t do_rows_full[2 * Q], q_full[Q], q_empty[Q], kv_full[KV], kv_empty[KV];
};

template <typename T, int D, int TILE_KEYS>
__global__ void __launch_bounds__(128 + 128 * BackwardTraits<D, TILE_KEYS>::CONSUMERS, 1)
    selected_backward_sm90_kernel(const SelectedParams a, const __grid_constant__ CUtensorMap k_map,
                                  const __grid_constant__ CUtensorMap v_map) {
    typedef BackwardTraits<D, TILE_KEYS> Traits;
    typedef BackwardSmem<D, TILE_KEYS> Smem;
    typedef PipelineState<Traits::Q_STAGES> QState;
    typedef PipelineState<2 * Traits::Q_STAGES> RowsState;
    typedef PipelineState<Traits::KV_STAGES> KvState;
    constexpr int TILE = 64 * D * 2;
    extern __shared__ __align__(1024) char raw[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    // This warp's work range among the thread block's: with two ranges, even producer warps serve the first
    // and odd ones the second.
    const int range_in_block = Traits::RANGES == 1 ? 0 : warp < 4 ? warp % 2 : warp / 4 - 1;
    const unsigned range_index = blockIdx.x * Traits::RANGES + range_in_block;
    Smem *m = (Smem *)(raw + (1024 - (smem_address(raw) & 1023)) % 1024) + range_in_block;
    const uint32_t do_rows_full = smem_address(m->do_rows_full), q_full = smem_address(m->q_full),
                   q_empty = smem_address(m->q_empty);
    const uint32_t kv_full = smem_address(m->kv_full), kv_empty = smem_address(m->kv_empty);
    const int kv_head = a.kv_head0 + blockIdx.y, g = a.group;
    if (warp < Traits::RANGES && lane == 0) {
        for (int i = 0; i < 2 * Traits::Q_STAGES; i++) mbarrier_init(do_rows_full + 8 * i, WARP_ARRIVALS);
        for (int i = 0; i < Traits::Q_STAGES; i++) {
            // The copies of a pair's 64 lanes, and the q warp itself for the stage's `row_tile_info`.
            mbarrier_init(q_full + 8 * i, 64 + WARP_ARRIVALS);
            mbarrier_init(q_empty + 8 * i, 4 * Traits::CONSUMERS_PER_RANGE * WARP_ARRIVALS);
        }
        for (int i = 0; i < Traits::KV_STAGES; i++) {
            mbarrier_init(kv_full + 8 * i, 32 + 1); // the lanes' copies; lane 0 with the bytes of TMA
            mbarrier_init(kv_empty + 8 * i, 4 * Traits::CONSUMERS_PER_RANGE * WARP_ARRIVALS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warp < 4) {
        warpgroup_reg_dealloc<Traits::PRODUCER_REGISTERS>();
        const WorkRange range = work_range_of(a, kv_head, range_index);
        const uint32_t pair = Traits::RANGES == 1 ? warp % 2 : 0; // loads every GATHER_PAIRS-th tile
        if (warp < 2) {                                           // q, lse_bwd, delta
            // Partial rows are counted over all heads of the launch. entry0 may wrap below 0: only its
            // differences to entries are used, modulo 2^32.
            const uint32_t entry0 = range.entry0 - blockIdx.y * (uint32_t)(a.lists.slab_queries * a.topk);
            GatherTileIterator<Traits::GATHER_PAIRS> tiles(a, range, pair);
            for (uint32_t n = pair; tiles.blocks.valid; n += Traits::GATHER_PAIRS) {
                GatherRows t = tiles.rows(a, entry0);
                // Pass the rows to the dO warp. This entry of do_rows is free: it held tile n - 2 * Q_STAGES,
                // and this warp has already waited for the consumers' release of a later tile.
                const RowsState rows_state(n);
#pragma unroll
                for (int i = 0; i < 2; i++) m->do_rows[rows_state.stage][lane + 32 * i] = t.row[i];
                mbarrier_arrive_warp(do_rows_full + 8 * rows_state.stage);
                tiles.next(a, range);
                QState state(n);
                state.wait_empty(q_empty);
                auto &info = m->row_tile_info[state.stage];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int r = lane + 32 * i;
                    cp_async_4(smem_address(&info.lse[r]), &a.lse_bwd[t.row[i]]);
                    cp_async_4(smem_address(&info.delta[r]), &a.delta[t.row[i]]);
                    if (t.partial_row[i] == NO_ROW) t.limit[i] = -1;
                    info.partial_row[r] = t.partial_row[i], info.limit[r] = t.limit[i];
                }
                int masked = __any_sync(0xffffffffu, min(t.limit[0], t.limit[1]) < TILE_KEYS - 1);
                if (lane == 0) info.masked = masked;
                gather_tile<T, D, 4>(smem_address(m->q[state.stage][0]), a.q.data, t.row);
                cp_async_mbarrier_arrive(q_full + 8 * state.stage);
                mbarrier_arrive_warp(q_full + 8 * state.stage);
            }
        } else {                      // dO, K, V
            uint32_t n = 0, tile = 0; // key tiles and tiles so far
            for (KvBlockIterator blocks(a, range); blocks.valid; blocks.next(a, range)) {
                const KvBlockEntries &kv_block = blocks.kv_block;
                const int num_tiles = ((int)kv_block.num_entries * g + 63) / 64;
                for (int key_tile = 0; key_tile < a.key_tiles; key_tile++, n++) {
                    auto load_kv = [&] {
                        bool accumulate;
                        float *dkv =
                            dkv_destination<D>(a, range, range_index, kv_block, key_tile, &accumulate);
                        KvState state(n);
                        const uint32_t k_tile = smem_address(m->k[state.stage]);
                        const uint32_t v_tile = smem_address(m->v[state.stage]),
                                       full = kv_full + 8 * state.stage;
                        const int num_keys = kv_block.num_keys - key_tile * TILE_KEYS;
                        state.wait_empty(kv_empty);
                        // Rows past a short tile's last key must be zero; TMA would load the following keys.
                        if (num_keys < TILE_KEYS)
                            load_short_kv_tile<T, D, TILE_KEYS>(a, kv_block, key_tile, k_tile, v_tile);
                        cp_async_mbarrier_arrive(full);
                        if (lane == 0) {
                            auto &info = m->key_tile_info[state.stage];
                            info.dkv = dkv, info.accumulate = accumulate;
                            info.num_tiles = num_tiles, info.num_keys = num_keys;
                            mbarrier_arrive_expect_tx(full, num_keys < TILE_KEYS ? 0 : 2 * TILE_KEYS * D * 2);
                            for (int panel = 0; panel < D / 64 && num_keys >= TILE_KEYS; panel++) {
                                const int key0 = (int)kv_block.key0 + key_tile * TILE_KEYS,
                                          offset = panel * TILE_KEYS * 128;
                                tma_load_3d(k_tile + offset, &k_map, panel * 64, kv_head, key0, full);
                                tma_load_3d(v_tile + offset, &v_map, panel * 64, kv_head, key0, full);
                            }
                        }
                    };
                    for (int i = 0; i < num_tiles; i++, tile++) {
                        if (tile % Traits::GATHER_PAIRS == pair) {
                            const RowsState rows_state(tile);
                            rows_state.wait_full(do_rows_full);
                            QState state(tile);
                            state.wait_empty(q_empty);
                            const uint32_t row[2] = {m->do_rows[rows_state.stage][lane],
                                                     m->do_rows[rows_state.stage][lane + 32]};
                            gather_tile<T, D, 4>(smem_address(m->q[state.stage][1]), a.dout.data, row);
                            cp_async_mbarrier_arrive(q_full + 8 * state.stage);
                        }
                        // Load K and V after the first rows of the key tile are in flight: the load waits
                        // until the consumers have finished the previous key tile.
                        if (pair == 0 && i == min(num_tiles, Traits::GATHER_PAIRS) - 1) load_kv();
                    }
                }
            }
            if (pair == 0) {
                KvState state(n);
                state.wait_empty(kv_empty);
                cp_async_mbarrier_arrive(kv_full + 8 * state.stage);
                if (lane == 0) {
                    m->key_tile_info[state.stage].num_tiles = 0;
                    mbarrier_arrive(kv_full + 8 * state.stage);
                }
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
    } else {
        warpgroup_reg_alloc<Traits::CONSUMER_REGISTERS>();
        pdl_wait(); // only the consumers wait, as in the forward kernel
        pdl_launch_dependents();
        const int key_half = warp / 4 - 1 - range_in_block; // this consumer's 64 keys of a 128-key tile
        const int quad = lane / 4, c = lane % 4;
        const int key0 = key_half * 64 + warp % 4 * 16 + quad; // this thread's keys: key0 and key0 + 8
        const float scale_log2 = a.scale * FSA_LOG2E;
        float s[8][4], dp[Traits::DP_ROWS / 8][4], dq[Traits::DQ_COLUMNS / 8][4], dk[D / 8][4], dv[D / 8][4];
        uint32_t tile = 0, n = 0; // tiles and key tiles so far
        for (;; n++) {
            KvState kv_state(n);
            kv_state.wait_full(kv_full);
            const auto &key_info = m->key_tile_info[kv_state.stage];
            const int num_tiles = key_info.num_tiles;
            if (num_tiles == 0) break;
            fence_proxy_async(); // cp.async may have written K and V
            const uint32_t k_tile = smem_address(m->k[kv_state.stage]);
            const uint32_t k_own = k_tile + key_half * 64 * 128;
            const uint32_t v_own = smem_address(m->v[kv_state.stage]) + key_half * 64 * 128;
            // x = A B^T: A this consumer's 64 rows of K or V, B 64 or DP_ROWS rows of q or dO
            auto start_matmul = [&](auto &x, uint32_t a_tile, uint32_t b_tile) {
                const uint64_t a_desc = make_smem_desc_opaque(a_tile), b_desc = make_smem_desc(b_tile);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < D / 16; k++) {
                    wgmma_ss<T>(x, advance_desc(a_desc, k / 4 * TILE_KEYS * 128 + k % 4 * 32),
                                advance_desc(b_desc, k / 4 * 64 * 128 + k % 4 * 32), k > 0);
                }
                wgmma_commit();
            };
            auto wait_q = [&](QState state) {
                state.wait_full(q_full);
                fence_proxy_async(); // cp.async wrote the rows
            };
            auto start_s = [&](QState state) { start_matmul(s, k_own, smem_address(m->q[state.stage][0])); };
            wait_q(tile);
            start_s(tile);
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++) dk[j][i] = dv[j][i] = 0;
            }
            for (const uint32_t end = tile + num_tiles; tile < end; tile++) {
                QState state(tile);
                const auto &info = m->row_tile_info[state.stage];
                const uint32_t q_tile = smem_address(m->q[state.stage][0]), do_tile = q_tile + TILE;
                const uint64_t q_desc = make_smem_desc(q_tile, 64 * 128),
                               do_desc = make_smem_desc(do_tile, 64 * 128);
                uint32_t p[4][4], ds[4][4];
                const int masked = info.masked;
                // P^T and dS^T, DP_ROWS rows at a time
#pragma unroll
                for (int row = 0; row < 64; row += Traits::DP_ROWS) {
                    float2 lse[Traits::DP_ROWS / 8], delta[Traits::DP_ROWS / 8];
#pragma unroll
                    for (int j = 0; j < Traits::DP_ROWS / 8; j++)
                        lse[j] = *(const float2 *)&info.lse[row + j * 8 + 2 * c];
                    if (row == 0) {
                        wgmma_wait<0>(); // S^T
                        fence_operand(s);
                    }
                    // dP^T = V dO^T; P^T = exp(S^T - lse_bwd) meanwhile
                    start_matmul(dp, v_own, do_tile + row * 128);
#pragma unroll
                    for (int j = row / 8; j < (row + Traits::DP_ROWS) / 8; j++) {
                        const float base[2] = {lse[j - row / 8].x * -FSA_LOG2E,
                                               lse[j - row / 8].y * -FSA_LOG2E};
#pragma unroll
                        for (int i = 0; i < 4; i++) s[j][i] = exp2_fast(s[j][i] * scale_log2 + base[i & 1]);
                    }
                    if (masked) {
#pragma unroll
                        for (int j = row / 8; j < (row + Traits::DP_ROWS) / 8; j++) {
                            int2 limit = *(const int2 *)&info.limit[j * 8 + 2 * c];
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                if (key0 + i / 2 * 8 > (i & 1 ? limit.y : limit.x)) s[j][i] = 0;
                            }
                        }
                    }
#pragma unroll
                    for (int j = row / 8; j < (row + Traits::DP_ROWS) / 8; j++) {
                        p[j / 2][j % 2 * 2] = pack2<T>(s[j][0], s[j][1]);
                        p[j / 2][j % 2 * 2 + 1] = pack2<T>(s[j][2], s[j][3]);
                    }
                    // dV += P^T dO; dS^T = P^T (dP^T - delta) meanwhile
                    wgmma_fence();
#pragma unroll
                    for (int k = row / 16; k < (row + Traits::DP_ROWS) / 16; k++)
                        wgmma_rs<T, 1>(dv, p[k], advance_desc(do_desc, k * 2048), 1);
                    wgmma_commit();
#pragma unroll
                    for (int j = 0; j < Traits::DP_ROWS / 8; j++)
                        delta[j] = *(const float2 *)&info.delta[row + j * 8 + 2 * c];
                    wgmma_wait<1>(); // dP^T
                    fence_operand(dp);
#pragma unroll
                    for (int j = row / 8; j < (row + Traits::DP_ROWS) / 8; j++) {
                        const float(&x)[4] = dp[j - row / 8];
                        const float2 d = delta[j - row / 8];
#pragma unroll
                        for (int i = 0; i < 4; i += 2) {
                            ds[j / 2][j % 2 * 2 + i / 2] =
                                pack2<T>(s[j][i] * (x[i] - d.x), s[j][i + 1] * (x[i + 1] - d.y));
                        }
                    }
                }
                // dK += dS^T Q; dS^T to shared memory meanwhile
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; k++) wgmma_rs<T, 1>(dk, ds[k], advance_desc(q_desc, k * 2048), 1);
                wgmma_commit();
                // All consumers of the range have finished dQ of the previous tile, which reads m->ds.
                named_barrier_sync(1 + range_in_block, 128 * Traits::CONSUMERS_PER_RANGE);
#pragma unroll
                for (int j = 0; j < 8; j++) {
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        *(uint32_t *)(m->ds + panel_offset(key0 + 8 * i, j, TILE_KEYS * 128) + 4 * c) =
                            ds[j / 2][j % 2 * 2 + i];
                }
                fence_proxy_async();
                named_barrier_sync(1 + range_in_block, 128 * Traits::CONSUMERS_PER_RANGE);

                // dQ = dS K: this consumer's columns, DQ_COLUMNS at a time
                const int column0 = key_half * (D / Traits::CONSUMERS_PER_RANGE);
                auto start_dq = [&](int column) {
                    const uint64_t a_desc = make_smem_desc(smem_address(m->ds));
                    const uint64_t b_desc =
                        make_smem_desc(k_tile + column / 64 * TILE_KEYS * 128 + column % 64 * 2);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < TILE_KEYS / 16; k++)
                        wgmma_ss<T, 1, 1>(dq, advance_desc(a_desc, k * 2048), advance_desc(b_desc, k * 2048),
                                          k > 0);
                    wgmma_commit();
                };
                uint32_t partial_row[2];
#pragma unroll
                for (int i = 0; i < 2; i++) partial_row[i] = info.partial_row[warp % 4 * 16 + quad + 8 * i];
                auto store_dq = [&](int column) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (partial_row[i] == NO_ROW) continue;
                        PartialChunk<T> x[Traits::DQ_COLUMNS / 32];
#pragma unroll
                        for (int j = 0; j < Traits::DQ_COLUMNS / 32; j++)
                            x[j] = make_partial_chunk<T>(dq, 4 * j, i, a.scale);
                        PartialChunk<T>::store(a.partial +
                                                   partial_row[i] * (uint64_t)partial_row_bytes<T, D>(),
                                               column / 32, c, x);
                    }
                };
                constexpr int DQ_STEPS = D / Traits::CONSUMERS_PER_RANGE / Traits::DQ_COLUMNS;
#pragma unroll
                for (int step = 0; step < DQ_STEPS; step++) {
                    start_dq(column0 + step * Traits::DQ_COLUMNS);
                    if (step == 0) {
                        wgmma_wait<1>(); // dV and dK: the stage of q and dO is free
                        mbarrier_arrive_warp(q_empty + 8 * state.stage);
                    }
                    if (step + 1 == DQ_STEPS) {
                        // S of the next tile; store the last columns of dQ meanwhile. After the last tile of
                        // the key tile, S is computed from old data in the stage, and discarded: ptxas
                        // serializes the wgmmas if one starts under a condition, or if two are in flight at
                        // the start of the loop. The discarded S does not wait for its stage, since the stage
                        // never fills at the end of the work range.
                        if (tile + 1 < end) wait_q(tile + 1);
                        start_s(tile + 1);
                        wgmma_wait<1>(); // dQ
                    } else {
                        wgmma_wait<0>();
                    }
                    fence_operand(dq);
                    store_dq(column0 + step * Traits::DQ_COLUMNS);
                }
            }
            // Epilogue: store dK and dV of the key tile.
            fence_operand(dk);
            fence_operand(dv);
            float *const dkv = key_info.dkv;
            const int num_keys = key_info.num_keys, accumulate = key_info.accumulate;
            mbarrier_arrive_warp(kv_empty + 8 * kv_state.stage); // only the discarded S still reads K
            auto store_dkv = [&](auto store_pair) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = key0 + 8 * i;
                    if (key >= num_keys) continue;
                    float *const dest = dkv + (int64_t)key * 2 * D + 2 * c;
#pragma unroll
                    for (int j = 0; j < D / 8; j++) {
                        store_pair(dest + 8 * j, dk[j][2 * i], dk[j][2 * i + 1]);
                        store_pair(dest + D + 8 * j, dv[j][2 * i], dv[j][2 * i + 1]);
                    }
                }
            };
            if (accumulate)
                store_dkv([](float *dest, float x, float y) { red_add_v2(dest, x, y); });
            else
                store_dkv([](float *dest, float x, float y) { *(float2 *)dest = make_float2(x, y); });
            wgmma_wait<0>(); // the discarded S
            fence_operand(s);
        }
    }
}

template <typename T, int D, int TILE_KEYS>
static int selected_backward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    typedef BackwardTraits<D, TILE_KEYS> Traits;
    constexpr int smem = (int)sizeof(BackwardSmem<D, TILE_KEYS>) * Traits::RANGES + 1024;
    static_assert(smem <= 232448, "exceeds the shared memory of a thread block");
    CUtensorMap k_map, v_map;
    TRY((make_kv_tensor_map<T, D, TILE_KEYS>(a, a.k.data, &k_map)));
    TRY((make_kv_tensor_map<T, D, TILE_KEYS>(a, a.v.data, &v_map)));
    dim3 grid((unsigned)ceil_div(a.num_ranges, Traits::RANGES), heads);
    return LAUNCH_PDL(a.slab_index > 0, (selected_backward_sm90_kernel<T, D, TILE_KEYS>), grid,
                      128 + 128 * Traits::CONSUMERS, smem, stream, a, k_map, v_map);
}

int fsa_selected_backward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                               cudaStream_t stream) {
    return DISPATCH_TILE_KEYS(selected_backward);
}

int fsa_selected_ranges_per_sm_sm90(int tile_keys, int backward) {
    return backward && tile_keys == 64 ? BackwardTraits<128, 64>::RANGES : 1;
}
