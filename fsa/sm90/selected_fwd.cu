#include "selected.cuh"

// What to tune. Registers are setmaxnreg's: together no more than a thread block starts with, 65,536 with 512
// threads and 64,512 with 384.
template <int D, int KEYS> struct Forward {
    static constexpr bool LARGE = D == 128 && KEYS == 128; // tiles of 128 KiB of K and V
    static constexpr int CONSUMERS = KEYS == 64 ? 3 : 2;   // warpgroups, each with every CONSUMERS-th tile
    static constexpr int Q_STAGES = LARGE ? 4 : KEYS == 64 ? 6 : 8, KV_STAGES = KEYS == 64 ? 3 : 2;
    static constexpr int PRODUCER_REGISTERS = 56, REGISTERS = KEYS == 64 ? 152 : 224;
    // Of the producers' four warps, the first gather a tile's rows in turn, the last fetches K and V. A stage
    // is always the same gatherer's, which therefore is never two rounds ahead of it, where parities would
    // lie.
    static constexpr int GATHERERS = KEYS == 64 ? 3 : 2;
    static_assert(Q_STAGES % GATHERERS == 0, "a stage has one gatherer");
};

// ---------------------------------------------------------------------------------------------------------
// Forward

template <int D, int KEYS> struct alignas(1024) ForwardSmem {
    static constexpr int Q = Forward<D, KEYS>::Q_STAGES, KV = Forward<D, KEYS>::KV_STAGES;
    char kv[KV][2][KEYS * D * 2], q[Q][64 * D * 2];
    struct {
        uint32_t partial[64];
        int limit[64], masked; // masked: a row doesn't see all KEYS keys
    } tile[Q];
    struct {
        int tiles; // 0: there are no more blocks
        float unfactor;
    } block[KV];
    alignas(8) uint64_t q_full[Q], q_empty[Q], kv_full[KV], kv_empty[KV];
};

// A thread block takes a share of one head's list. Producers bring K and packed V of each KV block, KV_STAGES
// blocks at most, and the gathered q rows, 64 a stage. Each consumer takes every CONSUMERS-th tile: S =
// QK^T, P = exp(S - the row's maximum) to fp16 A fragments, O = PV, and out go the row, as it is, its
// log-sum-exp and what the row is to be multiplied by; the next tile's S runs while this one's rows are
// written.
//
// Floors at 64K tokens, 32 heads, (B, T) = (64, 16), d = 128, 3 forced blocks not among them: 27.3 million
// rows, 3,230 tiles a multiprocessor. 7.0 GB of q rows in and 7.2 GB out: 3.2 ms at 4.5 TB/s, 2.3 where q
// comes from L2 (a slab has 6 MiB of it); 0.9 TFLOP, 1.1 ms at 790; exp 0.5 ms; shared memory 64 KiB a tile
// (gather 16, S 32, PV 16), 1 ms at 128 bytes a clock. On an H100 (3.35 TB/s, of which a copy gets 3.0) 88
// launches of 45 us by ncu with 97 MB of HBM traffic each, and as many merges of 32 us and 78 MB. Busiest are
// the way between the two halves of the L2, for 73% of a launch, and HBM, 66%, its begin and end counted,
// when the first rows have not come and nothing goes out. Consumers wait for rows; gatherers never wait for
// room. Without the rows out 33 us, without K and V 41, with the same queries again and again 42, without all
// three 29. K and V, read once, are first to leave the L2, so that 8 MiB of rows wait there for the merge.
template <typename T, int D, int KEYS>
__global__ void __launch_bounds__(128 + 128 * Forward<D, KEYS>::CONSUMERS, 1)
    selected_forward_sm90_kernel(const SelectedParams a, const __grid_constant__ CUtensorMap k_map) {
    typedef Forward<D, KEYS> F;
    typedef ForwardSmem<D, KEYS> Smem;
    typedef Turn<F::Q_STAGES> QTurn;
    typedef Turn<F::KV_STAGES> KvTurn;
    extern __shared__ __align__(1024) char raw[];
    Smem *m = (Smem *)(raw + (1024 - (smem_address(raw) & 1023)) % 1024);
    const uint32_t q_full = smem_address(m->q_full), q_empty = smem_address(m->q_empty);
    const uint32_t kv_full = smem_address(m->kv_full), kv_empty = smem_address(m->kv_empty);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    const int head = a.head0 + blockIdx.y, g = a.group;
    if (threadIdx.x == 0) {
        // A gathering warp's 32 lanes' copies, and its word that the rows' numbers are there.
        for (int i = 0; i < F::Q_STAGES; i++)
            mbarrier_init(q_full + 8 * i, 32 + WARP_ARRIVALS),
                mbarrier_init(q_empty + 8 * i, 4 * WARP_ARRIVALS);
        for (int i = 0; i < F::KV_STAGES; i++) {
            mbarrier_init(kv_full + 8 * i, 1);
            mbarrier_init(kv_empty + 8 * i, 4 * F::CONSUMERS * WARP_ARRIVALS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warp < 4) {
        warpgroup_reg_dealloc<F::PRODUCER_REGISTERS>();
        const Share share = share_of(a, head, blockIdx.x);
        if (warp < F::GATHERERS) {
            GatherTileIterator<F::GATHERERS> walk(a, share, warp);
            for (uint32_t n = warp; walk.runs.more; n += F::GATHERERS) {
                TileRows t = walk.take(a, share.entry0);
                walk.next(a, share);
                QTurn turn(n);
                turn.wait_empty(q_empty);
                gather<T, D, 8>(smem_address(m->q[turn.stage]), a.q, t.row);
                cp_async_mbarrier_arrive(q_full + 8 * turn.stage);
                auto &meta = m->tile[turn.stage];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    meta.partial[lane + 32 * i] = t.partial[i];
                    meta.limit[lane + 32 * i] = t.limit[i];
                }
                int masked = __any_sync(0xffffffffu, min(t.limit[0], t.limit[1]) < KEYS - 1);
                if (lane == 0) meta.masked = masked;
                mbarrier_arrive_warp(q_full + 8 * turn.stage);
            }
        } else if (warp == 3) {
            uint32_t n = 0;
            const char *const packed = a.packed + blockIdx.y * a.batch.n * (2 * D);
            for (KvBlockIterator runs(a, share); runs.more; runs.next(a, share)) {
                const Run &run = runs.run;
                for (int part = 0; part < a.parts; part++, n++) {
                    const int keys = max(0, min(run.keys - part * KEYS, KEYS));
                    const float unfactor =
                        a.factors[(blockIdx.y * a.lists.max_blocks + run.index) * a.parts + part];
                    KvTurn turn(n);
                    turn.wait_empty(kv_empty);
                    // Keys that the block lacks: V's become zeros, since what lies there may be no number,
                    // K's are masked.
                    if (keys < KEYS) {
                        char *const v = m->kv[turn.stage][1];
                        for (int i = keys * (D / 8) + lane; i < KEYS * (D / 8); i += 32)
                            *(uint4 *)(v + panel_offset(i / (D / 8), i % (D / 8), KEYS * 128)) =
                                make_uint4(0, 0, 0, 0);
                        fence_proxy_async();
                        __syncwarp();
                    }
                    if (lane == 0) {
                        const uint32_t full = kv_full + 8 * turn.stage,
                                       to = smem_address(m->kv[turn.stage][0]);
                        m->block[turn.stage].tiles = ((int)run.count * g + 63) / 64;
                        m->block[turn.stage].unfactor = unfactor;
                        mbarrier_arrive_expect_tx(full, (KEYS + keys) * D * 2);
                        const int64_t key0 = run.key0 + part * KEYS;
                        for (int panel = 0; panel < D / 64; panel++) {
                            const uint32_t at = to + panel * KEYS * 128;
                            tma_load_3d(at, &k_map, panel * 64, head, (int)key0, full, l2_evict_first());
                            if (keys > 0)
                                bulk_load(at + KEYS * D * 2, packed + (panel * a.batch.n + key0) * 128,
                                          keys * 128, full, l2_evict_first());
                        }
                    }
                }
            }
            KvTurn turn(n);
            turn.wait_empty(kv_empty);
            if (lane == 0) {
                m->block[turn.stage].tiles = 0;
                mbarrier_arrive(kv_full + 8 * turn.stage);
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
    } else {
        warpgroup_reg_alloc<F::REGISTERS>();
        // Producers go ahead: what they read was there before the first slab, which waits for all before it.
        pdl_wait();
        pdl_launch_dependents();
        const int consumer = warp / 4 - 1, quad = lane / 4, c = lane % 4;
        const float scale_log2 = a.scale * FSA_LOG2E;
        const int64_t partial0 = (int64_t)blockIdx.y * a.lists.slab_rows * a.topk * a.parts * g;
        char *out = a.partial + partial0 * row_bytes<__half, D>();
        float2 *stats = a.stats + partial0;
        keep_in_registers(out), keep_in_registers(stats);
        const uint32_t kept = a.kept > partial0 ? a.kept - (uint32_t)partial0 : 0;
        float s[KEYS / 8][4], o[D / 8][4];
        uint32_t first = 0, n = 0;                         // tiles before this part's, and parts
        Steps<F::Q_STAGES, F::CONSUMERS> q_turn(consumer); // of the consumer's next tile
        for (;; n++) {
            KvTurn kv(n);
            kv.wait_full(kv_full);
            const int tiles = m->block[kv.stage].tiles;
            const float unfactor = m->block[kv.stage].unfactor;
            if (tiles == 0) break;
            const uint64_t from_k = make_smem_desc(smem_address(m->kv[kv.stage][0])),
                           from_v = make_smem_desc(smem_address(m->kv[kv.stage][1]), KEYS * 128);
            auto start_s = [&] {
                mbarrier_wait(q_full + 8 * q_turn.stage, q_turn.parity);
                fence_proxy_async(); // cp.async wrote the rows
                const uint64_t from_q = make_smem_desc(smem_address(m->q[q_turn.stage]));
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < D / 16; k++)
                    wgmma_ss<T>(s, advance_desc(from_q, k / 4 * 64 * 128 + k % 4 * 32),
                                advance_desc(from_k, k / 4 * KEYS * 128 + k % 4 * 32), k > 0);
                wgmma_commit();
            };
            int tile = (int)((consumer + F::CONSUMERS - first % F::CONSUMERS) % F::CONSUMERS);
            if (tile < tiles) start_s();
            for (; tile < tiles; tile += F::CONSUMERS) {
                const uint32_t stage = q_turn.stage;
                const auto &meta = m->tile[stage];
                uint32_t to[2];
                int limit[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int r = warp % 4 * 16 + quad + 8 * i;
                    to[i] = meta.partial[r], limit[i] = meta.limit[r];
                }
                const int masked = meta.masked;
                wgmma_wait<0>();
                fence_operand(s);
                mbarrier_arrive_warp(q_empty + 8 * stage);
                q_turn.next();

                if (masked) {
#pragma unroll
                    for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            if (j * 8 + 2 * c + (i & 1) > limit[i / 2]) s[j][i] = -INFINITY;
                        }
                    }
                }
                float base[2], sum[2] = {0, 0};
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float most = fmaxf(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
                    for (int j = 1; j < KEYS / 8; j++)
                        most = fmaxf(most, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
                    most = quad_reduce_max(most);
                    base[i] = most == -INFINITY ? 0 : most * scale_log2;
                }
                uint32_t p[KEYS / 16][4];
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[j][i] = exp2_fast(s[j][i] * scale_log2 - base[i / 2]);
                        sum[i / 2] += s[j][i];
                    }
                    p[j / 2][j % 2 * 2] = pack2<__half>(s[j][0], s[j][1]);
                    p[j / 2][j % 2 * 2 + 1] = pack2<__half>(s[j][2], s[j][3]);
                }
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++)
                    wgmma_rs<__half, 1>(o, p[k], advance_desc(from_v, k * 2048), k > 0);
                wgmma_commit();
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float l = quad_reduce_sum(sum[i]);
                    if (c == 0 && to[i] != NONE) // no sum, no logarithm: -inf
                        stats[to[i]] =
                            make_float2(base[i] + log2_fast(l), l > 0 ? unfactor * reciprocal_fast(l) : 0);
                }
                wgmma_wait<0>();
                fence_operand(o);
                if (tile + F::CONSUMERS < tiles) start_s();
                Partial<__half> x[2][D / 32];
#pragma unroll
                for (int i = 0; i < 2; i++) {
#pragma unroll
                    for (int j = 0; j < D / 32; j++) x[i][j] = piece_of<__half>(o, 4 * j, i, 1);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (to[i] == NONE) continue;
                    uint4 *const row = (uint4 *)(out + to[i] * (uint64_t)row_bytes<__half, D>()) + c;
                    const uint64_t policy = to[i] < kept ? l2_evict_last() : l2_evict_first();
#pragma unroll
                    for (int j = 0; j < D / 32; j++) store(row + 4 * j, x[i][j].x, policy);
                }
            }
            first += tiles;
            mbarrier_arrive_warp(kv_empty + 8 * kv.stage);
        }
    }
}

template <typename T, int D, int KEYS>
static int forward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    constexpr int smem = (int)sizeof(ForwardSmem<D, KEYS>) + 1024;
    static_assert(smem <= 232448, "shared memory of a thread block");
    if (allow_smem(selected_forward_sm90_kernel<T, D, KEYS>, smem)) return FSA_ERROR_CUDA;
    CUtensorMap k_map;
    if (key_map<T, D, KEYS>(a, a.k, &k_map)) return FSA_ERROR_CUDA;
    dim3 grid((unsigned)a.shares, heads);
    launch(a.slab > 0, selected_forward_sm90_kernel<T, D, KEYS>, grid,
           128 + 128 * Forward<D, KEYS>::CONSUMERS, smem, stream, a, k_map);
    return FSA_OK;
}

int fsa_selected_forward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                         cudaStream_t stream) {
    return DISPATCH(forward);
}
