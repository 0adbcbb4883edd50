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

// Values of the 64 rows of a q stage, for its consumer.
struct ForwardRowInfo {
    uint32_t partial_row[64];
    int limit[64]; // last visible key of each row
    int masked;    // whether a row sees fewer than TILE_KEYS keys
};

template <int D, int TILE_KEYS> struct alignas(1024) ForwardSmem {
    static constexpr int Q = ForwardTraits<D, TILE_KEYS>::Q_STAGES,
                         KV = ForwardTraits<D, TILE_KEYS>::KV_STAGES;
    char kv[KV][2][TILE_KEYS * D * 2], q[Q][64 * D * 2];
    ForwardRowInfo row_tile_info[Q];
    struct {
        int num_tiles; // of 64 rows; 0: end of the work range
        float v_scale;
    } key_tile_info[KV];
    alignas(8) uint64_t q_full[Q], q_empty[Q], kv_full[KV], kv_empty[KV];

    // Pipeline of q tiles. A gather warp or a consumer processes the tiles first, first + stride, ...
    __device__ __forceinline__ PipelineState q_pipeline(int first, int stride) {
        return PipelineState(smem_address(q_full), smem_address(q_empty), Q, first, stride);
    }
    __device__ __forceinline__ PipelineState kv_pipeline() {
        return PipelineState(smem_address(kv_full), smem_address(kv_empty), KV);
    }
    __device__ __forceinline__ void init_barriers() {
        constexpr int CONSUMERS = ForwardTraits<D, TILE_KEYS>::CONSUMERS;
        for (int i = 0; i < Q; i++) {
            // The copies of the gather warp's 32 lanes, and the warp itself for the stage's row_tile_info.
            mbarrier_init(smem_address(&q_full[i]), 32 + WARP_ARRIVALS);
            mbarrier_init(smem_address(&q_empty[i]), 4 * WARP_ARRIVALS);
        }
        for (int i = 0; i < KV; i++) {
            mbarrier_init(smem_address(&kv_full[i]), 1);
            mbarrier_init(smem_address(&kv_empty[i]), 4 * CONSUMERS * WARP_ARRIVALS);
        }
        mbarrier_init_fence();
    }
};

// ---- producers ------------------------------------------------------------------------------------------
// A gather warp loads tiles warp, warp + GATHER_WARPS, ... of the work range: 64 rows of q to a stage
// [64][D], and their row_tile_info.
template <typename T, int D, int TILE_KEYS>
static __device__ __forceinline__ void gather_q_rows(const SelectedParams &a, const WorkRange &range,
                                                     ForwardSmem<D, TILE_KEYS> &m, int warp) {
    constexpr int GATHER_WARPS = ForwardTraits<D, TILE_KEYS>::GATHER_WARPS;
    const int lane = threadIdx.x % 32;
    GatherTileIterator<GATHER_WARPS> tiles(a, range, warp);
    for (PipelineState q = m.q_pipeline(warp, GATHER_WARPS); tiles.blocks.valid; q.advance()) {
        const GatherRows t = tiles.rows(a, range.entry0);
        const uint32_t offset[2] = {t.offset<D>(a.q, 0), t.offset<D>(a.q, 1)};
        tiles.next(a, range);
        q.wait_empty();
        gather_tile<T, D, 8>(smem_address(m.q[q.stage]), a.q.data, offset);
        cp_async_mbarrier_arrive(q.full_barrier());
        ForwardRowInfo &info = m.row_tile_info[q.stage];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            info.partial_row[lane + 32 * i] = t.partial_row[i];
            info.limit[lane + 32 * i] = t.limit[i];
        }
        int masked = __any_sync(0xffffffffu, min(t.limit[0], t.limit[1]) < TILE_KEYS - 1);
        if (lane == 0) info.masked = masked;
        mbarrier_arrive_warp(q.full_barrier());
    }
}

// A warp zeroes rows num_keys .. TILE_KEYS - 1 of a V tile [TILE_KEYS][D], which no copy writes: P is 0
// there, but old data may be NaN.
template <int D, int TILE_KEYS>
static __device__ __forceinline__ void zero_v_rows(char *v_tile, int num_keys) {
    constexpr int CHUNKS = D / 8;
    for (int i = num_keys * CHUNKS + (int)(threadIdx.x % 32); i < TILE_KEYS * CHUNKS; i += 32)
        *(uint4 *)(v_tile + panel_offset(i / CHUNKS, i % CHUNKS, TILE_KEYS * 128)) = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    __syncwarp();
}

// A warp loads K by TMA and packed V by bulk copies, [TILE_KEYS][D] each, for each key tile of the work
// range. In a short tile, K has rows past the last key; S of these rows is masked.
template <int D, int TILE_KEYS>
static __device__ __forceinline__ void load_kv_tiles(const SelectedParams &a, const WorkRange &range,
                                                     const CUtensorMap &k_map, ForwardSmem<D, TILE_KEYS> &m) {
    const int lane = threadIdx.x % 32, kv_head = a.kv_head0 + blockIdx.y;
    const char *const v_packed = a.v_packed + blockIdx.y * a.batch.n * (2 * D);
    PipelineState kv = m.kv_pipeline();
    for (KvBlockIterator blocks(a, range); blocks.valid; blocks.next(a, range)) {
        const KvBlockEntries &kv_block = blocks.kv_block;
        for (int key_tile = 0; key_tile < a.key_tiles; key_tile++, kv.advance()) {
            const int num_keys = max(0, min(kv_block.num_keys - key_tile * TILE_KEYS, TILE_KEYS));
            const float v_scale =
                a.v_scale[(blockIdx.y * a.lists.max_blocks + kv_block.index) * a.key_tiles + key_tile];
            kv.wait_empty();
            if (num_keys < TILE_KEYS) zero_v_rows<D, TILE_KEYS>(m.kv[kv.stage][1], num_keys);
            if (lane == 0) {
                const uint32_t full = kv.full_barrier(), k_tile = smem_address(m.kv[kv.stage][0]),
                               v_tile = smem_address(m.kv[kv.stage][1]);
                m.key_tile_info[kv.stage].num_tiles = ((int)kv_block.num_entries * a.group + 63) / 64;
                m.key_tile_info[kv.stage].v_scale = v_scale;
                mbarrier_arrive_expect_tx(full, (TILE_KEYS + num_keys) * D * 2);
                const int64_t key0 = kv_block.key0 + key_tile * TILE_KEYS;
                for (int panel = 0; panel < D / 64; panel++) {
                    const int offset = panel * TILE_KEYS * 128;
                    tma_load_3d(k_tile + offset, &k_map, panel * 64, kv_head, (int)key0, full,
                                l2_evict_first());
                    if (num_keys > 0)
                        bulk_load(v_tile + offset, v_packed + (panel * a.batch.n + key0) * 128,
                                  num_keys * 128, full, l2_evict_first());
                }
            }
        }
    }
    kv.wait_empty();
    if (lane == 0) {
        m.key_tile_info[kv.stage].num_tiles = 0;
        mbarrier_arrive(kv.full_barrier());
    }
}

// ---- consumers: a thread holds rows r and r + 8 of a tile, r = 16 * (warp % 4) + lane / 4, and in each n8
// column tile of an accumulator columns 2c and 2c + 1, c = lane % 4.

// Destination of the partial rows of the thread block's KV head.
template <int D> struct PartialOutput {
    char *o_partial; // rows of partial_row_bytes<__half, D>()
    float2 *lse_partial;
    uint32_t l2_rows; // the first l2_rows partial rows stay in L2
    __device__ __forceinline__ PartialOutput(const SelectedParams &a) {
        const int64_t partial0 = (int64_t)blockIdx.y * a.lists.slab_queries * a.topk * a.key_tiles * a.group;
        o_partial = a.partial + partial0 * partial_row_bytes<__half, D>();
        lse_partial = a.lse_partial + partial0;
        keep_in_registers(o_partial), keep_in_registers(lse_partial);
        l2_rows = a.l2_rows > partial0 ? a.l2_rows - (uint32_t)partial0 : 0;
    }
};

// Waits for the q rows of stage q, and starts S = Q K^T [64, TILE_KEYS]. k_desc: K [TILE_KEYS][D].
template <typename T, int D, int TILE_KEYS>
static __device__ __forceinline__ void issue_qk(float (&s)[TILE_KEYS / 8][4], ForwardSmem<D, TILE_KEYS> &m,
                                                const PipelineState &q, uint64_t k_desc) {
    q.wait_full();
    fence_proxy_async(); // cp.async wrote the rows
    const uint64_t q_desc = make_smem_desc(smem_address(m.q[q.stage]));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_ss<T>(s, advance_desc(q_desc, k / 4 * 64 * 128 + k % 4 * 32),
                    advance_desc(k_desc, k / 4 * TILE_KEYS * 128 + k % 4 * 32), k > 0);
    wgmma_commit();
}

// Starts O = P V [64, D]. p: P [64, TILE_KEYS] as A fragments; v_desc: V [TILE_KEYS][D].
template <int D, int K_STEPS>
static __device__ __forceinline__ void issue_pv(float (&o)[D / 8][4], const uint32_t (&p)[K_STEPS][4],
                                                uint64_t v_desc) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K_STEPS; k++) wgmma_rs<__half, 1>(o, p[k], advance_desc(v_desc, k * 2048), k > 0);
    wgmma_commit();
}

// S = -inf for the keys after the last visible key of each row. limit: of rows r and r + 8.
template <int N8>
static __device__ __forceinline__ void mask_scores(float (&s)[N8][4], const int (&limit)[2]) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < N8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (j * 8 + 2 * c + (i & 1) > limit[i / 2]) s[j][i] = -INFINITY;
        }
    }
}

// P = exp(S - row max) of the key tile [64, 8 * N8], in fp32 in s and as A fragments of fp16 in p. base: row
// max in base 2, 0 if the row sees no key; row_sum: this thread's part of the row sum of P.
template <int N8>
static __device__ __forceinline__ void softmax(float (&s)[N8][4], float scale_log2, uint32_t (&p)[N8 / 2][4],
                                               float (&base)[2], float (&row_sum)[2]) {
    row_sum[0] = row_sum[1] = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float row_max = fmaxf(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
        for (int j = 1; j < N8; j++) row_max = fmaxf(row_max, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
        row_max = quad_reduce_max(row_max);
        base[i] = row_max == -INFINITY ? 0 : row_max * scale_log2;
    }
#pragma unroll
    for (int j = 0; j < N8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[j][i] = exp2_fast(s[j][i] * scale_log2 - base[i / 2]);
            row_sum[i / 2] += s[j][i];
        }
        p[j / 2][j % 2 * 2] = pack2<__half>(s[j][0], s[j][1]);
        p[j / 2][j % 2 * 2 + 1] = pack2<__half>(s[j][2], s[j][3]);
    }
}

// Stores {lse in base 2, scale of the o_partial row} of rows r and r + 8.
template <int D>
static __device__ __forceinline__ void
store_lse_partial(const PartialOutput<D> &out, const uint32_t (&partial_row)[2], const float (&base)[2],
                  const float (&row_sum)[2], float v_scale) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = quad_reduce_sum(row_sum[i]);
        if (threadIdx.x % 4 == 0 && partial_row[i] != NO_ROW) // log2(0) = -inf
            out.lse_partial[partial_row[i]] =
                make_float2(base[i] + log2_fast(sum), sum != 0 ? v_scale * reciprocal_fast(sum) : 0);
    }
}

// Stores the unnormalized O [64, D] to the rows' o_partial.
template <int D>
static __device__ __forceinline__ void
store_o_partial(const PartialOutput<D> &out, const uint32_t (&partial_row)[2], const float (&o)[D / 8][4]) {
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
            (uint4 *)(out.o_partial + partial_row[i] * (uint64_t)partial_row_bytes<__half, D>()) +
            threadIdx.x % 4;
        const uint64_t policy = partial_row[i] < out.l2_rows ? l2_evict_last() : l2_evict_first();
#pragma unroll
        for (int j = 0; j < D / 32; j++) store_16_l2(row + 4 * j, x[i][j].x, policy);
    }
}

template <typename T, int D, int TILE_KEYS>
__global__ void __launch_bounds__(128 + 128 * ForwardTraits<D, TILE_KEYS>::CONSUMERS, 1)
    selected_forward_sm90_kernel(const SelectedParams a, const __grid_constant__ CUtensorMap k_map) {
    typedef ForwardTraits<D, TILE_KEYS> Traits;
    extern __shared__ __align__(1024) char raw[];
    auto &m = *(ForwardSmem<D, TILE_KEYS> *)(raw + (1024 - (smem_address(raw) & 1023)) % 1024);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    if (threadIdx.x == 0) m.init_barriers();
    __syncthreads();

    if (warp < 4) { // producers
        warpgroup_reg_dealloc<Traits::PRODUCER_REGISTERS>();
        const WorkRange range = work_range_of(a, a.kv_head0 + blockIdx.y, blockIdx.x);
        if (warp < Traits::GATHER_WARPS)
            gather_q_rows<T>(a, range, m, warp);
        else if (warp == 3)
            load_kv_tiles(a, range, k_map, m);
        cp_async_commit();
        cp_async_wait<0>();
    } else { // consumers
        warpgroup_reg_alloc<Traits::CONSUMER_REGISTERS>();
        // Only the consumers wait for the preceding kernel, which still reads the partial rows. The
        // producers' inputs were complete before the launch of the first slab.
        pdl_wait();
        pdl_launch_dependents();
        const int consumer = warp / 4 - 1, r = warp % 4 * 16 + lane / 4;
        const float scale_log2 = a.scale * FSA_LOG2E;
        const PartialOutput<D> out(a);
        PipelineState kv = m.kv_pipeline(), q = m.q_pipeline(consumer, Traits::CONSUMERS);
        float s[TILE_KEYS / 8][4], o[D / 8][4];
        int tile = consumer; // this consumer's next tile, counted from the key tile's first
        for (;; kv.advance()) {
            kv.wait_full();
            const int num_tiles = m.key_tile_info[kv.stage].num_tiles;
            const float v_scale = m.key_tile_info[kv.stage].v_scale;
            if (num_tiles == 0) break;
            const uint64_t k_desc = make_smem_desc(smem_address(m.kv[kv.stage][0]));
            const uint64_t v_desc = make_smem_desc(smem_address(m.kv[kv.stage][1]), TILE_KEYS * 128);
            if (tile < num_tiles) issue_qk<T>(s, m, q, k_desc);
            for (; tile < num_tiles; tile += Traits::CONSUMERS) {
                const ForwardRowInfo &info = m.row_tile_info[q.stage];
                const uint32_t partial_row[2] = {info.partial_row[r], info.partial_row[r + 8]};
                const int limit[2] = {info.limit[r], info.limit[r + 8]}, masked = info.masked;
                wgmma_wait<0>(); // S
                fence_operand(s);
                mbarrier_arrive_warp(q.empty_barrier());
                q.advance();

                if (masked) mask_scores(s, limit);
                float base[2], row_sum[2];
                uint32_t p[TILE_KEYS / 16][4];
                softmax(s, scale_log2, p, base, row_sum);

                // O = P V; lse_partial meanwhile
                issue_pv<D>(o, p, v_desc);
                store_lse_partial(out, partial_row, base, row_sum, v_scale);
                wgmma_wait<0>();
                fence_operand(o);

                // S of the next tile; store O meanwhile
                if (tile + Traits::CONSUMERS < num_tiles) issue_qk<T>(s, m, q, k_desc);
                store_o_partial(out, partial_row, o);
            }
            tile -= num_tiles;
            mbarrier_arrive_warp(kv.empty_barrier());
        }
    }
}

// Launches the kernel for key tiles of TILE_KEYS keys.
template <typename T, int D, int TILE_KEYS>
static int launch_forward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    constexpr int smem = (int)sizeof(ForwardSmem<D, TILE_KEYS>) + 1024;
    static_assert(smem <= 232448, "exceeds the shared memory of a thread block");
    CUtensorMap k_map;
    TRY((make_kv_tensor_map<T, D, TILE_KEYS>(a, a.k, &k_map)));
    dim3 grid((unsigned)a.num_ranges, heads);
    const unsigned threads = 128 + 128 * ForwardTraits<D, TILE_KEYS>::CONSUMERS;
    return LAUNCH_PDL(a.slab_index > 0, (selected_forward_sm90_kernel<T, D, TILE_KEYS>), grid, threads, smem,
                      stream, a, k_map);
}

template <typename T, int D>
static int selected_forward(const SelectedParams &a, unsigned heads, cudaStream_t stream) {
    return a.tile_keys == 64 ? launch_forward<T, D, 64>(a, heads, stream)
                             : launch_forward<T, D, 128>(a, heads, stream);
}

int fsa_selected_forward_sm90(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                              cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, selected_forward, a, heads, stream);
}
