// sm90/selected_fwd.cu: main kernel of the selected branch's forward pass for Hopper.
//
// A thread block (one per SM, one wave) processes one work range of one KV head (../selected.cuh). For each
// tile of 64 gathered q rows of each key tile it computes S = scale Q K^T, P = exp(S - row max), O = P V. It
// stores the unnormalized O as an o_partial row, and {lse, scale of the row} to lse_partial.
//
// Producer warpgroup:
//     GATHER_WARPS warps   gather the q rows of every GATHER_WARPS-th tile by cp.async
//     the last warp        loads K by TMA and packed V (pack_v.cu) by bulk copies
// CONSUMERS consumer warpgroups compute every CONSUMERS-th tile. Schedule of one consumer; i + 1 is its next
// tile:
//     wgmma   S(i)            P V (i)            S(i+1)
//     other            P(i)   lse_partial(i)     store O(i)     P(i+1)
// P and V are fp16; P is the A operand from registers.
//
// Shared memory at d = 128:     K, V       q
//     key tiles of 64 keys      96 KiB     96 KiB
//     key tiles of 128 keys     128 KiB    64 KiB
//
// Each partial row is written once, so the results are bitwise reproducible. K and V are read once and leave
// L2 first, so that the first l2_rows partial rows stay in L2 until the combine kernel reads them.
//
// Lower bounds for 64K tokens, (32, 8) heads, d = 128, (B, T) = (64, 16), 3 blocks per query left out of the
// lists:
//     7.0 GB of q rows in, 7.2 GB of partial rows out   3.2 ms
//     0.9 TFLOP                                         1.1 ms
//     shared memory, 64 KiB per tile                    0.9 ms
//     exp                                               0.5 ms
// Limited by HBM bandwidth and by the link between the two L2 partitions.
#include "selected.cuh"

// The registers of all warpgroups (setmaxnreg) must not exceed those that the thread block starts with:
// 65,536 with 512 threads, 64,512 with 384.
template <int D, int TILE_KEYS> struct ForwardTraits {
    static constexpr bool LARGE_TILES = D == 128 && TILE_KEYS == 128; // 128 KiB of K and V in two stages
    static constexpr int CONSUMERS = TILE_KEYS == 64 ? 3 : 2;         // warpgroups
    static constexpr int Q_STAGES = LARGE_TILES ? 4 : TILE_KEYS == 64 ? 6 : 8;
    static constexpr int KV_STAGES = TILE_KEYS == 64 ? 3 : 2;
    static constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = TILE_KEYS == 64 ? 152 : 224;
    // A stage belongs to one gather warp, so the warp cannot be two phases ahead of the stage. A wait by
    // parity could not distinguish these phases.
    static constexpr int GATHER_WARPS = TILE_KEYS == 64 ? 3 : 2;
    static_assert(Q_STAGES % GATHER_WARPS == 0, "each stage must belong to one gather warp");
};

template <int D, int TILE_KEYS> struct alignas(1024) ForwardSmem {
    static constexpr int Q = ForwardTraits<D, TILE_KEYS>::Q_STAGES,
                         KV = ForwardTraits<D, TILE_KEYS>::KV_STAGES;
    char kv[KV][2][TILE_KEYS * D * 2], q[Q][64 * D * 2];
    struct {
        uint32_t partial_row[64];
        int limit[64]; // last visible key of each row
        int masked;    // whether a row sees fewer than TILE_KEYS keys
    } row_tile_info[Q];
    struct {
        int num_tiles; // of 64 rows; 0: end of the work range
        float v_scale;
    } key_tile_info[KV];
    alignas(8) uint64_t q_full[Q], q_empty[Q], kv_full[KV], kv_empty[KV];
};

template <typename T, int D, int TILE_KEYS>
__global__ void __launch_bounds__(128 + 128 * ForwardTraits<D, TILE_KEYS>::CONSUMERS, 1)
    selected_forward_sm90_kernel(const SelectedParams a, const __grid_constant__ CUtensorMap k_map) {
    typedef ForwardTraits<D, TILE_KEYS> Traits;
    typedef ForwardSmem<D, TILE_KEYS> Smem;
    typedef PipelineState<Traits::Q_STAGES> QState;
    typedef PipelineState<Traits::KV_STAGES> KvState;
    extern __shared__ __align__(1024) char raw[];
    Smem *m = (Smem *)(raw + (1024 - (smem_address(raw) & 1023)) % 1024);
    const uint32_t q_full = smem_address(m->q_full), q_empty = smem_address(m->q_empty);
    const uint32_t kv_full = smem_address(m->kv_full), kv_empty = smem_address(m->kv_empty);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    const int kv_head = a.kv_head0 + blockIdx.y, g = a.group;
    if (threadIdx.x == 0) {
        // q_full: the copies of the gather warp's 32 lanes, and the warp itself for the stage's
        // `row_tile_info`.
        for (int i = 0; i < Traits::Q_STAGES; i++)
            mbarrier_init(q_full + 8 * i, 32 + WARP_ARRIVALS),
                mbarrier_init(q_empty + 8 * i, 4 * WARP_ARRIVALS);
        for (int i = 0; i < Traits::KV_STAGES; i++) {
            mbarrier_init(kv_full + 8 * i, 1);
            mbarrier_init(kv_empty + 8 * i, 4 * Traits::CONSUMERS * WARP_ARRIVALS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warp < 4) {
        warpgroup_reg_dealloc<Traits::PRODUCER_REGISTERS>();
        const WorkRange range = work_range_of(a, kv_head, blockIdx.x);
        if (warp < Traits::GATHER_WARPS) { // q rows
            GatherTileIterator<Traits::GATHER_WARPS> tiles(a, range, warp);
            for (uint32_t n = warp; tiles.blocks.valid; n += Traits::GATHER_WARPS) {
                GatherRows t = tiles.rows(a, range.entry0);
                tiles.next(a, range);
                QState state(n);
                state.wait_empty(q_empty);
                gather_tile<T, D, 8>(smem_address(m->q[state.stage]), a.q.data, t.row);
                cp_async_mbarrier_arrive(q_full + 8 * state.stage);
                auto &info = m->row_tile_info[state.stage];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    info.partial_row[lane + 32 * i] = t.partial_row[i];
                    info.limit[lane + 32 * i] = t.limit[i];
                }
                int masked = __any_sync(0xffffffffu, min(t.limit[0], t.limit[1]) < TILE_KEYS - 1);
                if (lane == 0) info.masked = masked;
                mbarrier_arrive_warp(q_full + 8 * state.stage);
            }
        } else if (warp == 3) { // K and V
            uint32_t n = 0;     // key tiles so far
            const char *const v_packed = a.v_packed + blockIdx.y * a.batch.n * (2 * D);
            for (KvBlockIterator blocks(a, range); blocks.valid; blocks.next(a, range)) {
                const KvBlockEntries &kv_block = blocks.kv_block;
                for (int key_tile = 0; key_tile < a.key_tiles; key_tile++, n++) {
                    const int num_keys = max(0, min(kv_block.num_keys - key_tile * TILE_KEYS, TILE_KEYS));
                    const float v_scale =
                        a.v_scale[(blockIdx.y * a.lists.max_blocks + kv_block.index) * a.key_tiles +
                                  key_tile];
                    KvState state(n);
                    state.wait_empty(kv_empty);
                    // A short tile has rows past its last key. Zero these rows of V, since old data may be
                    // NaN. S of these rows of K is masked.
                    if (num_keys < TILE_KEYS) {
                        char *const v = m->kv[state.stage][1];
                        for (int i = num_keys * (D / 8) + lane; i < TILE_KEYS * (D / 8); i += 32)
                            *(uint4 *)(v + panel_offset(i / (D / 8), i % (D / 8), TILE_KEYS * 128)) =
                                make_uint4(0, 0, 0, 0);
                        fence_proxy_async();
                        __syncwarp();
                    }
                    if (lane == 0) {
                        const uint32_t full = kv_full + 8 * state.stage,
                                       kv_tile = smem_address(m->kv[state.stage][0]);
                        m->key_tile_info[state.stage].num_tiles = ((int)kv_block.num_entries * g + 63) / 64;
                        m->key_tile_info[state.stage].v_scale = v_scale;
                        mbarrier_arrive_expect_tx(full, (TILE_KEYS + num_keys) * D * 2);
                        const int64_t key0 = kv_block.key0 + key_tile * TILE_KEYS;
                        for (int panel = 0; panel < D / 64; panel++) {
                            const uint32_t k_panel = kv_tile + panel * TILE_KEYS * 128;
                            tma_load_3d(k_panel, &k_map, panel * 64, kv_head, (int)key0, full,
                                        l2_evict_first());
                            if (num_keys > 0)
                                bulk_load(k_panel + TILE_KEYS * D * 2,
                                          v_packed + (panel * a.batch.n + key0) * 128, num_keys * 128, full,
                                          l2_evict_first());
                        }
                    }
                }
            }
            KvState state(n);
            state.wait_empty(kv_empty);
            if (lane == 0) {
                m->key_tile_info[state.stage].num_tiles = 0;
                mbarrier_arrive(kv_full + 8 * state.stage);
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
    } else {
        warpgroup_reg_alloc<Traits::CONSUMER_REGISTERS>();
        // Only the consumers wait for the preceding kernel, which still reads the partial rows. The
        // producers' inputs were complete before the launch of the first slab.
        pdl_wait();
        pdl_launch_dependents();
        const int consumer = warp / 4 - 1, quad = lane / 4, c = lane % 4;
        const float scale_log2 = a.scale * FSA_LOG2E;
        const int64_t partial0 = (int64_t)blockIdx.y * a.lists.slab_queries * a.topk * a.key_tiles * g;
        char *o_partial = a.partial + partial0 * partial_row_bytes<__half, D>();
        float2 *lse_partial = a.lse_partial + partial0;
        keep_in_registers(o_partial), keep_in_registers(lse_partial);
        const uint32_t l2_rows = a.l2_rows > partial0 ? a.l2_rows - (uint32_t)partial0 : 0;
        float s[TILE_KEYS / 8][4], o[D / 8][4];
        uint32_t tiles_before = 0, n = 0; // tiles before this key tile, and key tiles so far
        StridedPipelineState<Traits::Q_STAGES, Traits::CONSUMERS> q_state(
            consumer); // of this consumer's next tile
        for (;; n++) {
            KvState kv_state(n);
            kv_state.wait_full(kv_full);
            const int num_tiles = m->key_tile_info[kv_state.stage].num_tiles;
            const float v_scale = m->key_tile_info[kv_state.stage].v_scale;
            if (num_tiles == 0) break;
            const uint64_t k_desc = make_smem_desc(smem_address(m->kv[kv_state.stage][0])),
                           v_desc = make_smem_desc(smem_address(m->kv[kv_state.stage][1]), TILE_KEYS * 128);
            auto start_s = [&] {
                mbarrier_wait(q_full + 8 * q_state.stage, q_state.parity);
                fence_proxy_async(); // cp.async wrote the rows
                const uint64_t q_desc = make_smem_desc(smem_address(m->q[q_state.stage]));
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < D / 16; k++)
                    wgmma_ss<T>(s, advance_desc(q_desc, k / 4 * 64 * 128 + k % 4 * 32),
                                advance_desc(k_desc, k / 4 * TILE_KEYS * 128 + k % 4 * 32), k > 0);
                wgmma_commit();
            };
            int tile =
                (int)((consumer + Traits::CONSUMERS - tiles_before % Traits::CONSUMERS) % Traits::CONSUMERS);
            if (tile < num_tiles) start_s();
            for (; tile < num_tiles; tile += Traits::CONSUMERS) {
                const uint32_t stage = q_state.stage;
                const auto &info = m->row_tile_info[stage];
                uint32_t partial_row[2];
                int limit[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int r = warp % 4 * 16 + quad + 8 * i;
                    partial_row[i] = info.partial_row[r], limit[i] = info.limit[r];
                }
                const int masked = info.masked;
                wgmma_wait<0>(); // S
                fence_operand(s);
                mbarrier_arrive_warp(q_empty + 8 * stage);
                q_state.advance();

                if (masked) {
#pragma unroll
                    for (int j = 0; j < TILE_KEYS / 8; j++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            if (j * 8 + 2 * c + (i & 1) > limit[i / 2]) s[j][i] = -INFINITY;
                        }
                    }
                }
                // P = exp(S - row max), as A fragments
                float base[2], row_sum[2] = {0, 0};
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float row_max = fmaxf(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
                    for (int j = 1; j < TILE_KEYS / 8; j++)
                        row_max = fmaxf(row_max, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
                    row_max = quad_reduce_max(row_max);
                    base[i] = row_max == -INFINITY ? 0 : row_max * scale_log2;
                }
                uint32_t p[TILE_KEYS / 16][4];
#pragma unroll
                for (int j = 0; j < TILE_KEYS / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[j][i] = exp2_fast(s[j][i] * scale_log2 - base[i / 2]);
                        row_sum[i / 2] += s[j][i];
                    }
                    p[j / 2][j % 2 * 2] = pack2<__half>(s[j][0], s[j][1]);
                    p[j / 2][j % 2 * 2 + 1] = pack2<__half>(s[j][2], s[j][3]);
                }
                // O = P V; lse_partial meanwhile
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < TILE_KEYS / 16; k++)
                    wgmma_rs<__half, 1>(o, p[k], advance_desc(v_desc, k * 2048), k > 0);
                wgmma_commit();
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float sum = quad_reduce_sum(row_sum[i]);
                    if (c == 0 && partial_row[i] != NO_ROW) // log2(0) = -inf
                        lse_partial[partial_row[i]] = make_float2(
                            base[i] + log2_fast(sum), sum > 0 ? v_scale * reciprocal_fast(sum) : 0);
                }
                wgmma_wait<0>();
                fence_operand(o);
                // S of the next tile; store O meanwhile
                if (tile + Traits::CONSUMERS < num_tiles) start_s();
                PartialChunk<__half> x[2][D / 32];
#pragma unroll
                for (int i = 0; i < 2; i++) {
#pragma unroll
                    for (int j = 0; j < D / 32; j++) x[i][j] = make_partial_chunk<__half>(o, 4 * j, i, 1);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (partial_row[i] == NO_ROW) continue;
                    uint4 *const row =
                        (uint4 *)(o_partial + partial_row[i] * (uint64_t)partial_row_bytes<__half, D>()) + c;
                    const uint64_t policy = partial_row[i] < l2_rows ? l2_evict_last() : l2_evict_first();
#pragma unroll
                    for (int j = 0; j < D / 32; j++) store_16_l2(row + 4 * j, x[i][j].x, policy);
                }
            }
            tiles_before += num_tiles;
            mbarrier_arrive_warp(kv_empty + 8 * kv_state.stage);
        }
    }
}

template <typename T, int D, int TILE_KEYS>
static int selected_forward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    constexpr int smem = (int)sizeof(ForwardSmem<D, TILE_KEYS>) + 1024;
    static_assert(smem <= 232448, "exceeds the shared memory of a thread block");
    CUtensorMap k_map;
    TRY((make_kv_tensor_map<T, D, TILE_KEYS>(a, a.k.data, &k_map)));
    dim3 grid((unsigned)a.num_ranges, heads);
    const unsigned threads = 128 + 128 * ForwardTraits<D, TILE_KEYS>::CONSUMERS;
    return LAUNCH_PDL(a.slab_index > 0, (selected_forward_sm90_kernel<T, D, TILE_KEYS>), grid, threads, smem,
                      stream, a, k_map);
}

int fsa_selected_forward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                              cudaStream_t stream) {
    return DISPATCH_TILE_KEYS(selected_forward);
}
