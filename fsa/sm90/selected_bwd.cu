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

// Values of the 64 rows of a stage of q and dO, for the consumers.
struct BackwardRowInfo {
    uint32_t partial_row[64];
    alignas(8) float lse[64], delta[64]; // lse is lse_bwd
    alignas(8) int limit[64];            // last visible key of each row, -1 for a row that pads the tile
    int masked;                          // whether a row sees fewer than TILE_KEYS keys
};

// Values of the key tile in a stage of K and V, for the consumers.
struct BackwardKeyInfo {
    float *dkv;                          // destination of dK and dV, [keys, 2, D]
    int num_tiles, num_keys, accumulate; // num_tiles 0: end of the work range; accumulate: add to dkv
};

// Shared memory of one work range.
template <int D, int TILE_KEYS> struct alignas(1024) BackwardSmem {
    typedef BackwardTraits<D, TILE_KEYS> Traits;
    static constexpr int Q = Traits::Q_STAGES, KV = Traits::KV_STAGES;
    char k[KV][TILE_KEYS * D * 2], v[KV][TILE_KEYS * D * 2], q[Q][2][64 * D * 2]; // q[stage]: q and dO
    char ds[TILE_KEYS * 64 * 2];                                                  // dS^T, [keys][64 rows]
    BackwardRowInfo row_tile_info[Q];
    BackwardKeyInfo key_tile_info[KV];
    uint32_t do_rows[2 * Q][64]; // offsets of the rows of dO to gather, from the warp that gathers q
    uint64_t do_rows_full[2 * Q], q_full[Q], q_empty[Q], kv_full[KV], kv_empty[KV];

    // Pipeline of q and dO tiles. A producer pair processes the tiles first, first + stride, ...
    __device__ __forceinline__ PipelineState q_pipeline(int first = 0, int stride = 1) {
        return PipelineState(smem_address(q_full), smem_address(q_empty), Q, first, stride);
    }
    // Pipeline of do_rows. It has no empty barriers: gather_q_rows says why an entry is free.
    __device__ __forceinline__ PipelineState do_rows_pipeline(int pair) {
        return PipelineState(smem_address(do_rows_full), 0, 2 * Q, pair, Traits::GATHER_PAIRS);
    }
    __device__ __forceinline__ PipelineState kv_pipeline() {
        return PipelineState(smem_address(kv_full), smem_address(kv_empty), KV);
    }
    __device__ __forceinline__ void init_barriers() {
        for (int i = 0; i < 2 * Q; i++) mbarrier_init(smem_address(&do_rows_full[i]), WARP_ARRIVALS);
        for (int i = 0; i < Q; i++) {
            // The copies of a pair's 64 lanes, and the q warp itself for the stage's row_tile_info.
            mbarrier_init(smem_address(&q_full[i]), 64 + WARP_ARRIVALS);
            mbarrier_init(smem_address(&q_empty[i]), 4 * Traits::CONSUMERS_PER_RANGE * WARP_ARRIVALS);
        }
        for (int i = 0; i < KV; i++) {
            mbarrier_init(smem_address(&kv_full[i]), 32 + 1); // the lanes' copies; lane 0 with TMA's bytes
            mbarrier_init(smem_address(&kv_empty[i]), 4 * Traits::CONSUMERS_PER_RANGE * WARP_ARRIVALS);
        }
        mbarrier_init_fence();
    }
};

// ---- producers ------------------------------------------------------------------------------------------
// The q warp of a pair loads tiles pair, pair + GATHER_PAIRS, ... of the work range: 64 rows of q to a stage
// [64][D], and their row_tile_info. It passes the rows to the pair's dO warp.
template <typename T, int D, int TILE_KEYS>
static __device__ __forceinline__ void gather_q_rows(const SelectedParams &a, const WorkRange &range,
                                                     BackwardSmem<D, TILE_KEYS> &m, int pair) {
    constexpr int GATHER_PAIRS = BackwardTraits<D, TILE_KEYS>::GATHER_PAIRS;
    const int lane = threadIdx.x % 32;
    // Partial rows are counted over all heads of the launch. entry0 may wrap below 0: only its differences to
    // entries are used, modulo 2^32.
    const uint32_t entry0 = range.entry0 - blockIdx.y * (uint32_t)(a.lists.slab_queries * a.topk);
    GatherTileIterator<GATHER_PAIRS> tiles(a, range, pair);
    PipelineState q = m.q_pipeline(pair, GATHER_PAIRS), do_rows = m.do_rows_pipeline(pair);
    for (; tiles.blocks.valid; q.advance(), do_rows.advance()) {
        GatherRows t = tiles.rows(a, entry0);
        const uint32_t q_offset[2] = {t.offset<D>(a.q, 0), t.offset<D>(a.q, 1)};
        // This entry of do_rows is free: it held the tile 2 * Q_STAGES before, and this warp has already
        // waited for the consumers' release of a later tile.
#pragma unroll
        for (int i = 0; i < 2; i++) m.do_rows[do_rows.stage][lane + 32 * i] = t.offset<D>(a.dout, i);
        mbarrier_arrive_warp(do_rows.full_barrier());
        tiles.next(a, range);
        q.wait_empty();
        BackwardRowInfo &info = m.row_tile_info[q.stage];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = lane + 32 * i;
            const uint32_t row = t.query[i] * a.q_heads + t.head[i];
            cp_async_4(smem_address(&info.lse[r]), &a.lse_bwd[row]);
            cp_async_4(smem_address(&info.delta[r]), &a.delta[row]);
            if (t.partial_row[i] == NO_ROW) t.limit[i] = -1;
            info.partial_row[r] = t.partial_row[i], info.limit[r] = t.limit[i];
        }
        int masked = __any_sync(0xffffffffu, min(t.limit[0], t.limit[1]) < TILE_KEYS - 1);
        if (lane == 0) info.masked = masked;
        gather_tile<T, D, 4>(smem_address(m.q[q.stage][0]), a.q.data, q_offset);
        cp_async_mbarrier_arrive(q.full_barrier());
        mbarrier_arrive_warp(q.full_barrier());
    }
}

// A warp loads K and V of a key tile, [TILE_KEYS][D] each, to the stage kv, and its key_tile_info.
template <typename T, int D, int TILE_KEYS>
static __device__ __forceinline__ void
load_kv_tile(const SelectedParams &a, const WorkRange &range, unsigned range_index,
             const KvBlockEntries &kv_block, int key_tile, int num_tiles, const CUtensorMap &k_map,
             const CUtensorMap &v_map, BackwardSmem<D, TILE_KEYS> &m, const PipelineState &kv) {
    bool accumulate;
    float *dkv = dkv_destination<D>(a, range, range_index, kv_block, key_tile, &accumulate);
    const uint32_t k_tile = smem_address(m.k[kv.stage]), v_tile = smem_address(m.v[kv.stage]);
    const uint32_t full = kv.full_barrier();
    const int num_keys = kv_block.num_keys - key_tile * TILE_KEYS;
    kv.wait_empty();
    // Rows past a short tile's last key must be zero; TMA would load the following keys.
    if (num_keys < TILE_KEYS) load_short_kv_tile<T, D, TILE_KEYS>(a, kv_block, key_tile, k_tile, v_tile);
    cp_async_mbarrier_arrive(full);
    if (threadIdx.x % 32 == 0) {
        BackwardKeyInfo &info = m.key_tile_info[kv.stage];
        info.dkv = dkv, info.accumulate = accumulate;
        info.num_tiles = num_tiles, info.num_keys = num_keys;
        mbarrier_arrive_expect_tx(full, num_keys < TILE_KEYS ? 0 : 2 * TILE_KEYS * D * 2);
        for (int panel = 0; panel < D / 64 && num_keys >= TILE_KEYS; panel++) {
            const int key0 = (int)kv_block.key0 + key_tile * TILE_KEYS, offset = panel * TILE_KEYS * 128;
            const int kv_head = a.kv_head0 + blockIdx.y;
            tma_load_3d(k_tile + offset, &k_map, panel * 64, kv_head, key0, full);
            tma_load_3d(v_tile + offset, &v_map, panel * 64, kv_head, key0, full);
        }
    }
}

// The dO warp of a pair loads 64 rows of dO to a stage [64][D], for the tiles of the pair's q warp. The dO
// warp of pair 0 also loads K and V.
template <typename T, int D, int TILE_KEYS>
static __device__ __forceinline__ void
gather_do_rows(const SelectedParams &a, const WorkRange &range, unsigned range_index,
               const CUtensorMap &k_map, const CUtensorMap &v_map, BackwardSmem<D, TILE_KEYS> &m, int pair) {
    constexpr int GATHER_PAIRS = BackwardTraits<D, TILE_KEYS>::GATHER_PAIRS;
    const int lane = threadIdx.x % 32;
    PipelineState kv = m.kv_pipeline(), q = m.q_pipeline(pair, GATHER_PAIRS),
                  do_rows = m.do_rows_pipeline(pair);
    int tile = pair; // this pair's next tile, counted from the key tile's first
    for (KvBlockIterator blocks(a, range); blocks.valid; blocks.next(a, range)) {
        const KvBlockEntries &kv_block = blocks.kv_block;
        const int num_tiles = ((int)kv_block.num_entries * a.group + 63) / 64;
        for (int key_tile = 0; key_tile < a.key_tiles; key_tile++, kv.advance()) {
            // Load K and V after the pair's first rows of the key tile are in flight: the load waits until
            // the consumers have finished the previous key tile.
            bool kv_pending = pair == 0;
            do {
                if (tile < num_tiles) {
                    do_rows.wait_full();
                    q.wait_empty();
                    const uint32_t offset[2] = {m.do_rows[do_rows.stage][lane],
                                                m.do_rows[do_rows.stage][lane + 32]};
                    gather_tile<T, D, 4>(smem_address(m.q[q.stage][1]), a.dout.data, offset);
                    cp_async_mbarrier_arrive(q.full_barrier());
                    q.advance(), do_rows.advance(), tile += GATHER_PAIRS;
                }
                if (kv_pending)
                    load_kv_tile<T>(a, range, range_index, kv_block, key_tile, num_tiles, k_map, v_map, m,
                                    kv);
                kv_pending = false;
            } while (tile < num_tiles);
            tile -= num_tiles;
        }
    }
    if (pair > 0) return;
    kv.wait_empty();
    cp_async_mbarrier_arrive(kv.full_barrier());
    if (lane == 0) {
        m.key_tile_info[kv.stage].num_tiles = 0;
        mbarrier_arrive(kv.full_barrier());
    }
}

// ---- consumers ------------------------------------------------------------------------------------------
// A consumer's accumulators of S^T, dP^T, dK and dV have its 64 keys as rows. A thread holds the keys key0
// and key0 + 8 of the key tile, and columns 2c and 2c + 1 of each n8 column tile, c = lane % 4. The columns
// of S^T and dP^T are the tile's gathered rows. dP^T exists for DP_ROWS gathered rows at a time; `row` below
// is the first of them.

// Waits until stage q of q and dO is full and visible to wgmma.
static __device__ __forceinline__ void wait_rows(const PipelineState &q) {
    q.wait_full();
    fence_proxy_async(); // cp.async wrote the rows
}

// Starts X = A B^T [64, 8 * N8]. a_tile: 64 rows of K or V [TILE_KEYS][D]; b_tile: rows of q or dO [64][D].
template <typename T, int D, int TILE_KEYS, int N8>
static __device__ __forceinline__ void issue_abt(float (&x)[N8][4], uint32_t a_tile, uint32_t b_tile) {
    const uint64_t a_desc = make_smem_desc_opaque(a_tile), b_desc = make_smem_desc(b_tile);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_ss<T>(x, advance_desc(a_desc, k / 4 * TILE_KEYS * 128 + k % 4 * 32),
                    advance_desc(b_desc, k / 4 * 64 * 128 + k % 4 * 32), k > 0);
    wgmma_commit();
}

// Starts X += A B [64, D]. a: columns row .. row + ROWS - 1 of A = P^T or dS^T [64, 64], as A fragments;
// b_desc: B = dO or q [64][D].
template <typename T, int ROWS, int N8>
static __device__ __forceinline__ void issue_ab(float (&x)[N8][4], const uint32_t (&a)[4][4], uint64_t b_desc,
                                                int row) {
    wgmma_fence();
#pragma unroll
    for (int k = row / 16; k < (row + ROWS) / 16; k++)
        wgmma_rs<T, 1>(x, a[k], advance_desc(b_desc, k * 2048), 1);
    wgmma_commit();
}

// Loads this thread's columns of a value per gathered row.
template <int N8> static __device__ __forceinline__ void load_columns(float2 (&x)[N8], const float *values) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < N8; j++) x[j] = *(const float2 *)&values[j * 8 + 2 * c];
}

// P^T = exp(S^T - lse_bwd) in s, for the columns row .. row + 8 * N8 - 1.
template <int N8>
static __device__ __forceinline__ void softmax(float (&s)[8][4], int row, const float2 (&lse)[N8],
                                               float scale_log2) {
#pragma unroll
    for (int j = row / 8; j < row / 8 + N8; j++) {
        const float base[2] = {lse[j - row / 8].x * -FSA_LOG2E, lse[j - row / 8].y * -FSA_LOG2E};
#pragma unroll
        for (int i = 0; i < 4; i++) s[j][i] = exp2_fast(s[j][i] * scale_log2 + base[i & 1]);
    }
}

// P^T = 0 for the keys after the last visible key of each gathered row.
template <int N8>
static __device__ __forceinline__ void mask_scores(float (&s)[8][4], int row, const int (&limits)[64],
                                                   int key0) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int j = row / 8; j < row / 8 + N8; j++) {
        int2 limit = *(const int2 *)&limits[j * 8 + 2 * c];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (key0 + i / 2 * 8 > (i & 1 ? limit.y : limit.x)) s[j][i] = 0;
        }
    }
}

// P^T as A fragments.
template <typename T, int N8>
static __device__ __forceinline__ void pack_p(uint32_t (&p)[4][4], const float (&s)[8][4], int row) {
#pragma unroll
    for (int j = row / 8; j < row / 8 + N8; j++) {
        p[j / 2][j % 2 * 2] = pack2<T>(s[j][0], s[j][1]);
        p[j / 2][j % 2 * 2 + 1] = pack2<T>(s[j][2], s[j][3]);
    }
}

// dS^T = P^T (dP^T - delta), as A fragments.
template <typename T, int N8>
static __device__ __forceinline__ void softmax_bwd(uint32_t (&ds)[4][4], const float (&p)[8][4],
                                                   const float (&dp)[N8][4], int row,
                                                   const float2 (&delta)[N8]) {
#pragma unroll
    for (int j = row / 8; j < row / 8 + N8; j++) {
        const float(&x)[4] = dp[j - row / 8];
        const float2 d = delta[j - row / 8];
#pragma unroll
        for (int i = 0; i < 4; i += 2)
            ds[j / 2][j % 2 * 2 + i / 2] = pack2<T>(p[j][i] * (x[i] - d.x), p[j][i + 1] * (x[i + 1] - d.y));
    }
}

// Stores dS^T to shared memory [TILE_KEYS keys][64 rows].
template <int TILE_KEYS>
static __device__ __forceinline__ void store_ds(char *tile, const uint32_t (&ds)[4][4], int key0) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            *(uint32_t *)(tile + panel_offset(key0 + 8 * i, j, TILE_KEYS * 128) + 4 * c) =
                ds[j / 2][j % 2 * 2 + i];
    }
}

// Starts dQ / scale = dS K [64 rows, 8 * N8], columns `column` and following. ds_tile: dS^T [TILE_KEYS][64];
// k_tile: K [TILE_KEYS][D].
template <typename T, int TILE_KEYS, int N8>
static __device__ __forceinline__ void issue_dq(float (&dq)[N8][4], uint32_t ds_tile, uint32_t k_tile,
                                                int column) {
    const uint64_t a_desc = make_smem_desc(ds_tile);
    const uint64_t b_desc = make_smem_desc(k_tile + column / 64 * TILE_KEYS * 128 + column % 64 * 2);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILE_KEYS / 16; k++)
        wgmma_ss<T, 1, 1>(dq, advance_desc(a_desc, k * 2048), advance_desc(b_desc, k * 2048), k > 0);
    wgmma_commit();
}

// Stores dQ [64 rows, 8 * N8], columns `column` and following, to the dq_partial rows of this thread's two
// gathered rows.
template <typename T, int D, int N8>
static __device__ __forceinline__ void store_dq_partial(const SelectedParams &a,
                                                        const uint32_t (&partial_row)[2],
                                                        const float (&dq)[N8][4], int column) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (partial_row[i] == NO_ROW) continue;
        PartialChunk<T> x[N8 / 4];
#pragma unroll
        for (int j = 0; j < N8 / 4; j++) x[j] = make_partial_chunk<T>(dq, 4 * j, i, a.scale);
        PartialChunk<T>::store(a.partial + partial_row[i] * (uint64_t)partial_row_bytes<T, D>(), column / 32,
                               threadIdx.x % 4, x);
    }
}

// Stores dK / scale and dV of this thread's keys to info.dkv, or adds them.
template <int D>
static __device__ __forceinline__ void store_dkv(const BackwardKeyInfo &info, const float (&dk)[D / 8][4],
                                                 const float (&dv)[D / 8][4], int key0) {
    auto store_all = [&](auto store_pair) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int key = key0 + 8 * i;
            if (key >= info.num_keys) continue;
            float *const dest = info.dkv + (int64_t)key * 2 * D + 2 * (threadIdx.x % 4);
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                store_pair(dest + 8 * j, dk[j][2 * i], dk[j][2 * i + 1]);
                store_pair(dest + D + 8 * j, dv[j][2 * i], dv[j][2 * i + 1]);
            }
        }
    };
    if (info.accumulate)
        store_all([](float *dest, float x, float y) { red_add_v2(dest, x, y); });
    else
        store_all([](float *dest, float x, float y) { *(float2 *)dest = make_float2(x, y); });
}

template <int N> static __device__ __forceinline__ void set_zero(float (&x)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) x[j][i] = 0;
    }
}

// The first half of a tile, from S^T in flight (in s) to dS^T as A fragments, DP_ROWS gathered rows at a
// time. dV += P^T dO is in flight at the end. v_own: this consumer's 64 rows of V.
template <typename T, int D, int TILE_KEYS>
static __device__ __forceinline__ void
compute_ds_and_dv(uint32_t (&ds)[4][4], float (&dv)[D / 8][4], float (&s)[8][4], const BackwardRowInfo &info,
                  uint32_t v_own, uint32_t do_tile, int key0, float scale_log2) {
    constexpr int ROWS = BackwardTraits<D, TILE_KEYS>::DP_ROWS;
    const uint64_t do_desc = make_smem_desc(do_tile, 64 * 128);
    const int masked = info.masked;
    float dp[ROWS / 8][4];
    uint32_t p[4][4];
#pragma unroll
    for (int row = 0; row < 64; row += ROWS) {
        float2 lse[ROWS / 8], delta[ROWS / 8];
        load_columns(lse, info.lse + row);
        if (row == 0) {
            wgmma_wait<0>(); // S^T
            fence_operand(s);
        }
        // dP^T = V dO^T; P^T meanwhile
        issue_abt<T, D, TILE_KEYS>(dp, v_own, do_tile + row * 128);
        softmax(s, row, lse, scale_log2);
        if (masked) mask_scores<ROWS / 8>(s, row, info.limit, key0);
        pack_p<T, ROWS / 8>(p, s, row);
        // dV += P^T dO; dS^T meanwhile
        issue_ab<T, ROWS>(dv, p, do_desc, row);
        load_columns(delta, info.delta + row);
        wgmma_wait<1>(); // dP^T
        fence_operand(dp);
        softmax_bwd<T>(ds, s, dp, row, delta);
    }
}

template <typename T, int D, int TILE_KEYS>
__global__ void __launch_bounds__(128 + 128 * BackwardTraits<D, TILE_KEYS>::CONSUMERS, 1)
    selected_backward_sm90_kernel(const SelectedParams a, const __grid_constant__ CUtensorMap k_map,
                                  const __grid_constant__ CUtensorMap v_map) {
    typedef BackwardTraits<D, TILE_KEYS> Traits;
    typedef BackwardSmem<D, TILE_KEYS> Smem;
    extern __shared__ __align__(1024) char raw[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    // This warp's work range among the thread block's: with two ranges, even producer warps serve the first
    // and odd ones the second.
    const int range_in_block = Traits::RANGES == 1 ? 0 : warp < 4 ? warp % 2 : warp / 4 - 1;
    const unsigned range_index = blockIdx.x * Traits::RANGES + range_in_block;
    Smem &m = ((Smem *)(raw + (1024 - (smem_address(raw) & 1023)) % 1024))[range_in_block];
    if (warp < Traits::RANGES && lane == 0) m.init_barriers();
    __syncthreads();

    if (warp < 4) { // producers
        warpgroup_reg_dealloc<Traits::PRODUCER_REGISTERS>();
        const WorkRange range = work_range_of(a, a.kv_head0 + blockIdx.y, range_index);
        const int pair = Traits::RANGES == 1 ? warp % 2 : 0;
        if (warp < 2)
            gather_q_rows<T>(a, range, m, pair);
        else
            gather_do_rows<T>(a, range, range_index, k_map, v_map, m, pair);
        cp_async_commit();
        cp_async_wait<0>();
    } else { // consumers
        warpgroup_reg_alloc<Traits::CONSUMER_REGISTERS>();
        pdl_wait(); // only the consumers wait, as in the forward kernel
        pdl_launch_dependents();
        constexpr int COLUMNS = Traits::DQ_COLUMNS, DQ_STEPS = D / Traits::CONSUMERS_PER_RANGE / COLUMNS;
        const int key_half = warp / 4 - 1 - range_in_block; // this consumer's 64 keys of a 128-key tile
        const int key0 = key_half * 64 + warp % 4 * 16 + lane / 4, dq_row = warp % 4 * 16 + lane / 4;
        const float scale_log2 = a.scale * FSA_LOG2E;
        float s[8][4], dq[COLUMNS / 8][4], dk[D / 8][4], dv[D / 8][4];
        auto sync_consumers = [&] { // of the work range
            named_barrier_sync(1 + range_in_block, 128 * Traits::CONSUMERS_PER_RANGE);
        };
        PipelineState kv = m.kv_pipeline(), q = m.q_pipeline();
        for (;; kv.advance()) {
            kv.wait_full();
            const int num_tiles = m.key_tile_info[kv.stage].num_tiles;
            if (num_tiles == 0) break;
            fence_proxy_async(); // cp.async may have written K and V
            const uint32_t k_tile = smem_address(m.k[kv.stage]), k_own = k_tile + key_half * 64 * 128;
            const uint32_t v_own = smem_address(m.v[kv.stage]) + key_half * 64 * 128;
            wait_rows(q);
            issue_abt<T, D, TILE_KEYS>(s, k_own, smem_address(m.q[q.stage][0])); // S^T of the first tile
            set_zero(dk), set_zero(dv);
            for (int tile = 0; tile < num_tiles; tile++) {
                const BackwardRowInfo &info = m.row_tile_info[q.stage];
                const uint32_t q_tile = smem_address(m.q[q.stage][0]), do_tile = q_tile + 64 * D * 2;
                uint32_t ds[4][4];
                // dP^T, P^T, dS^T; dV += P^T dO
                compute_ds_and_dv<T, D, TILE_KEYS>(ds, dv, s, info, v_own, do_tile, key0, scale_log2);
                // dK += dS^T Q; dS^T to shared memory meanwhile
                issue_ab<T, 64>(dk, ds, make_smem_desc(q_tile, 64 * 128), 0);
                sync_consumers(); // they have finished dQ of the previous tile, which reads m.ds
                store_ds<TILE_KEYS>(m.ds, ds, key0);
                fence_proxy_async();
                sync_consumers();
                // dQ = dS K: this consumer's columns, COLUMNS at a time
                const uint32_t partial_row[2] = {info.partial_row[dq_row], info.partial_row[dq_row + 8]};
#pragma unroll
                for (int step = 0; step < DQ_STEPS; step++) {
                    const int column = key_half * (D / Traits::CONSUMERS_PER_RANGE) + step * COLUMNS;
                    issue_dq<T, TILE_KEYS>(dq, smem_address(m.ds), k_tile, column);
                    if (step == 0) {
                        wgmma_wait<1>(); // dV and dK: the stage of q and dO is free
                        mbarrier_arrive_warp(q.empty_barrier());
                    }
                    if (step + 1 == DQ_STEPS) {
                        // S of the next tile; store the last columns of dQ meanwhile. After the last tile of
                        // the key tile, S is computed from old data in the stage, and discarded: ptxas
                        // serializes the wgmmas if one starts under a condition, or if two are in flight at
                        // the start of the loop. The discarded S does not wait for its stage, since the stage
                        // never fills at the end of the work range.
                        q.advance();
                        if (tile + 1 < num_tiles) wait_rows(q);
                        issue_abt<T, D, TILE_KEYS>(s, k_own, smem_address(m.q[q.stage][0]));
                        wgmma_wait<1>(); // dQ
                    } else {
                        wgmma_wait<0>();
                    }
                    fence_operand(dq);
                    store_dq_partial<T, D>(a, partial_row, dq, column);
                }
            }
            // Epilogue: store dK and dV of the key tile.
            fence_operand(dk);
            fence_operand(dv);
            const BackwardKeyInfo key_info = m.key_tile_info[kv.stage];
            mbarrier_arrive_warp(kv.empty_barrier()); // only the discarded S still reads K
            store_dkv<D>(key_info, dk, dv, key0);
            wgmma_wait<0>(); // the discarded S
            fence_operand(s);
        }
    }
}

// Launches the kernel for key tiles of TILE_KEYS keys.
template <typename T, int D, int TILE_KEYS>
static int launch_backward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    typedef BackwardTraits<D, TILE_KEYS> Traits;
    constexpr int smem = (int)sizeof(BackwardSmem<D, TILE_KEYS>) * Traits::RANGES + 1024;
    static_assert(smem <= 232448, "exceeds the shared memory of a thread block");
    CUtensorMap k_map, v_map;
    TRY((make_kv_tensor_map<T, D, TILE_KEYS>(a, a.k, &k_map)));
    TRY((make_kv_tensor_map<T, D, TILE_KEYS>(a, a.v, &v_map)));
    dim3 grid((unsigned)ceil_div(a.num_ranges, Traits::RANGES), heads);
    return LAUNCH_PDL(a.slab_index > 0, (selected_backward_sm90_kernel<T, D, TILE_KEYS>), grid,
                      128 + 128 * Traits::CONSUMERS, smem, stream, a, k_map, v_map);
}

template <typename T, int D>
static int selected_backward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    return a.tile_keys == 64 ? launch_backward<T, D, 64>(a, heads, stream)
                             : launch_backward<T, D, 128>(a, heads, stream);
}

int fsa_selected_backward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                               cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, selected_backward, a, heads, stream);
}

int fsa_selected_ranges_per_sm_sm90(int tile_keys, int backward) {
    return backward && tile_keys == 64 ? BackwardTraits<128, 64>::RANGES : 1;
}
