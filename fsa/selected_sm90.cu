// selected_sm90.cu: the selected branch's main kernels for Hopper: gathered rows by cp.async into a ring of
// stages, products by wgmma, a warpgroup of producers beside those that compute. selected.cuh says how the
// work is cut; selected.cu has the reductions and launches these.
#include "ptx_sm90.cuh"
#include "selected.cuh"
#include "tma.cuh"
#include <type_traits>

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

// Number `index` of what passes through a ring of COUNT stages: its stage, and the parity of its round.
template <int COUNT> struct Turn {
    uint32_t stage, round;
    __device__ __forceinline__ Turn(uint32_t index) : stage(index % COUNT), round(index / COUNT) {}
    __device__ __forceinline__ int parity() const { return (int)(round & 1); }
    // Before the stage is filled: all are done with what it held a round ago.
    __device__ __forceinline__ void wait_empty(uint32_t barriers) const {
        if (round > 0) mbarrier_wait(barriers + 8 * stage, (int)(round - 1 & 1));
    }
    __device__ __forceinline__ void wait_full(uint32_t barriers) const {
        mbarrier_wait(barriers + 8 * stage, parity());
    }
};

// The same of who takes every STEP-th.
template <int COUNT, int STEP> struct Steps {
    static_assert(COUNT % STEP == 0, "a stage is one's own");
    uint32_t stage;
    int parity = 0;
    __device__ __forceinline__ Steps(uint32_t first) : stage(first) {}
    __device__ __forceinline__ void next() {
        if ((stage += STEP) >= COUNT) stage -= COUNT, parity ^= 1;
    }
};

// A producer's way through the runs of its share. Whole warps use it; lane i holds the offset of block
// first_block + i, so that most steps read nothing.
struct RunWalk {
    Run run;
    bool more; // there is such a run
    __device__ __forceinline__ RunWalk(const SelArgs &a, const Share &s) {
        run.begin = s.begin, run.count = 0;
        seq_end = 0;
        load(a, s, (int)s.block);
        next(a, s);
    }
    __device__ __forceinline__ void next(const SelArgs &a, const Share &s) {
        run.begin += run.count;
        more = run.begin < s.end;
        if (!more) return;
        unsigned beyond; // blocks that nobody chose are passed over
        while (!(beyond = __ballot_sync(0xffffffffu, offset > run.begin))) load(a, s, first_block + 31);
        const int i = __ffs((int)beyond) - 1;
        run.index = first_block + i - 1;
        run.first = __shfl_sync(0xffffffffu, offset, i - 1), run.last = __shfl_sync(0xffffffffu, offset, i);
        run.count = min(s.end, run.last) - run.begin;
        find_block(a);
    }

  private:
    int first_block;
    uint32_t offset;
    int block0, seq_end; // of the run's sequence: its first block, and the first beyond it
    int64_t key0;        // and its keys
    int keys;
    __device__ __forceinline__ void load(const SelArgs &a, const Share &s, int from) {
        first_block = from;
        offset = s.offsets[min(from + (int)threadIdx.x % 32, (int)a.lists.blocks)];
    }
    __device__ __forceinline__ void find_block(const SelArgs &a) {
        if (run.index >= seq_end) {
            const int64_t seq = fsa_find(a.plan.cu_blocks, a.plan.num_seqs, run.index);
            block0 = (int)a.plan.cu_blocks[seq], seq_end = (int)a.plan.cu_blocks[seq + 1];
            key0 = a.plan.cu_seqlens[seq], keys = (int)(a.plan.cu_seqlens[seq + 1] - key0);
        }
        run.block = run.index - block0;
        run.key0 = key0 + (int64_t)run.block * a.block;
        run.keys = min(a.block, keys - run.block * a.block);
    }
};

// Rows past the run's end repeat its last one, with partial = NONE.
enum : uint32_t { NONE = 0xffffffffu };
struct TileRows {
    uint32_t row[2];     // of q, [Nq*Hq]
    uint32_t partial[2]; // row of the partials
    int limit[2];        // last visible key of the part
};

// A gathering warp's way through its tiles, every TILES-th of a share's: 64 rows of a run (g an entry,
// packed), of which lane i looks after rows i and i + 32. Entries are loaded a tile ahead, those of the next
// run, too.
template <int TILES> struct TileWalk {
    RunWalk runs;
    __device__ __forceinline__ TileWalk(const SelArgs &a, const Share &s, int first)
        : runs(a, s), part(0), tile(first), row0(0), rows(0) {
        if (runs.more) find(a, s);
    }
    __device__ __forceinline__ void next(const SelArgs &a, const Share &s) {
        tile += TILES;
        find(a, s);
    }
    // entry0: the entry whose partial is the first.
    __device__ __forceinline__ TileRows take(const SelArgs &a, uint32_t entry0) {
        TileRows t;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t r = row_of(i), at = divide(r, a.by_group);
            const bool valid = at < runs.run.count;
            const uint32_t in_group = valid ? r - at * a.group : a.group - 1;
            const uint32_t row = divide(entry[i], a.by_topk);
            t.row[i] = row * a.q_heads + (a.head0 + blockIdx.y) * a.group + in_group;
            t.partial[i] = valid ? ((entry[i] - entry0) * a.parts + part) * a.group + in_group : NONE;
            t.limit[i] = last_key(a, at, row) - part * a.keys;
        }
        return t;
    }

  private:
    int part, tile;      // of the run: its part, and the part's tile
    uint32_t entry[2];   // what the list has there
    uint32_t row0, rows; // of the segment of the last row that was looked up
    int block_pos;       // row0's position in it, less its own number
    __device__ __forceinline__ uint32_t row_of(int i) const {
        return tile * 64 + threadIdx.x % 32 + 32 * i;
    }
    // Finds the run and part that the tile is in.
    __device__ __forceinline__ void find(const SelArgs &a, const Share &s) {
        for (;;) {
            const int tiles = ((int)runs.run.count * a.group + 63) / 64;
            if (tile < tiles) break;
            tile -= tiles;
            if (++part < a.parts) continue;
            part = 0;
            runs.next(a, s);
            if (!runs.more) return;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            entry[i] = s.entries[runs.run.begin + min(divide(row_of(i), a.by_group), runs.run.count - 1)];
    }
    // The last key of the block that the query sees. Lists ascend by row, so only the first `block` queries
    // from the list's start can lie in the block itself; the rest see all of it.
    __device__ __forceinline__ int last_key(const SelArgs &a, uint32_t at, uint32_t row) {
        const Run &run = runs.run;
        if (run.begin - run.first + min(at, run.count - 1) >= (uint32_t)a.block) return run.keys - 1;
        if (row - row0 >= rows) {
            const int64_t segment = fsa_find(a.plan.cu_rows, a.plan.num_segments, row);
            row0 = (uint32_t)a.plan.cu_rows[segment];
            rows = (uint32_t)a.plan.cu_rows[segment + 1] - row0;
            block_pos = (int)(a.plan.segments[segment].pos - row0);
        }
        return min(run.keys - 1, block_pos + (int)row - run.block * a.block);
    }
};

// Starts the copies of a tile's 64 rows. An address made in the register of the one before waits until that
// one's copy has read it, and for a shuffle: so there are to be BATCH addresses before the first is used. (At
// d = 128 ptxas makes them one after the other all the same; with registers for several it was no faster.)
template <typename T, int D, int BATCH>
static __device__ __forceinline__ void gather(uint32_t tile, const void *rows, const uint32_t (&row)[2]) {
    constexpr int CHUNKS = D / 8, ROWS = 32 / CHUNKS;
    constexpr int PERIOD = 8 / ROWS; // of the swizzle, in steps of ROWS rows
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS, sub = lane / CHUNKS;
    const char *from = (const char *)rows + chunk * 16;
    keep_in_registers(from);
    uint32_t to[PERIOD];
#pragma unroll
    for (int i = 0; i < PERIOD; i++) to[i] = tile + panel_offset(i * ROWS + sub, chunk, 64 * 128);
#pragma unroll
    for (int i0 = 0; i0 < 64 / ROWS; i0 += BATCH) {
        const char *at[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int r = (i0 + i) * ROWS;
            at[i] = from + __shfl_sync(0xffffffffu, row[r / 32], r % 32 + sub) * (uint64_t)(D * 2);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) keep_in_registers(at[i]);
#pragma unroll
        for (int i = 0; i < BATCH; i++) cp_async_16(to[(i0 + i) % PERIOD] + (i0 + i) / PERIOD * 1024, at[i]);
    }
}

// Starts the copies of a short block's K and V rows; rows that it lacks become zeros.
template <typename T, int D, int KEYS>
static __device__ __forceinline__ void load_kv(const SelArgs &a, const Run &run, int part, uint32_t k_tile,
                                               uint32_t v_tile) {
    constexpr int CHUNKS = D / 8;
    const int64_t stride = (int64_t)a.kv_heads * D;
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS, keys = run.keys - part * KEYS;
    const int64_t head = (a.head0 + blockIdx.y) * D + chunk * 8;
#pragma unroll 2
    for (int r = lane / CHUNKS; r < KEYS; r += 32 / CHUNKS) {
        bool valid = r < keys;
        int64_t from = (run.key0 + (valid ? part * KEYS + r : 0)) * stride + head;
        uint32_t to = panel_offset(r, chunk, KEYS * 128);
        cp_async_16(k_tile + to, (const T *)a.k + from, valid);
        cp_async_16(v_tile + to, (const T *)a.v + from, valid);
    }
}

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

static __device__ __forceinline__ uint32_t max_abs_bits(uint32_t most, uint32_t x) {
    uint32_t lo = max(most & 0xffffu, x & 0x7fffu), hi = max(most >> 16, x >> 16 & 0x7fffu);
    return lo | hi << 16;
}

// V of a part of a block, rearranged so that plain bulk copies make the main kernel's tile of it: [D/64
// panels][N keys][64], the 16-byte chunks of a row swizzled. 16-bit as it comes, it becomes fp16 times a
// power of two that brings the part's largest to 2^15 / KEYS, so that no sum overflows that probabilities of
// at most 1 weight, and a partial's rounding is an eighth of bf16's; and the 4-byte units of each 64-byte
// group are transposed (unit 4c+i at i*4+c), so that a lane's accumulators of four n8 columns are 16 bytes of
// the output in one piece. 2 bytes in and out a channel: 0.06 ms for 64K tokens of 8 heads at 4.3 TB/s; on an
// H200 0.16, eight launches of 20 us: latency. So it starts while the heads before are merged: v is there,
// and who read `packed` has ended when a merge lets it.
enum { PACK_THREADS = 128 };
template <typename T, int D, int KEYS>
__global__ void __launch_bounds__(PACK_THREADS) pack_kernel(const SelArgs a) {
    constexpr int GROUPS = D / 32, ITEMS = KEYS * GROUPS / PACK_THREADS; // an item: 64 bytes of a row
    __shared__ float largest[PACK_THREADS / 32];
    const int64_t block = blockIdx.x / a.parts;
    const int part = (int)(blockIdx.x % a.parts), head = a.head0 + blockIdx.y, thread = threadIdx.x;
    if (block >= a.plan.cu_blocks[a.plan.num_seqs]) {
        wait_for_previous_kernel();
        return;
    }
    const int64_t seq = fsa_find(a.plan.cu_blocks, a.plan.num_seqs, block);
    const int64_t key0 = a.plan.cu_seqlens[seq] + (block - a.plan.cu_blocks[seq]) * a.block + part * KEYS;
    const int keys = (int)min((int64_t)min(a.block - part * KEYS, KEYS), a.plan.cu_seqlens[seq + 1] - key0);
    uint4 v[ITEMS][4];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int item = thread + i * PACK_THREADS, row = item / GROUPS;
        const uint4 *from =
            (const uint4 *)((const T *)a.v + ((key0 + row) * a.kv_heads + head) * D) + item % GROUPS * 4;
#pragma unroll
        for (int j = 0; j < 4; j++) v[i][j] = row < keys ? from[j] : make_uint4(0, 0, 0, 0);
    }
    uint32_t most = 0; // the largest magnitudes, as bits: they ascend as the numbers do
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            most = max_abs_bits(
                max_abs_bits(max_abs_bits(max_abs_bits(most, v[i][j].x), v[i][j].y), v[i][j].z), v[i][j].w);
    }
    float2 f = unpack2<T>(most);
    float mine = fmaxf(f.x, f.y);
    for (int i = 16; i > 0; i /= 2) mine = fmaxf(mine, __shfl_xor_sync(0xffffffffu, mine, i));
    if (thread % 32 == 0) largest[thread / 32] = mine;
    __syncthreads();
    mine = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
    constexpr int LARGEST = KEYS == 64 ? 8 : 7; // below 2^(LARGEST + 1)
    const int exponent = min(max(LARGEST - ilogbf(mine), -100), 100);
    const float factor = mine > 0 ? ldexpf(1, exponent) : 1;
    if (thread == 0) a.factors[(blockIdx.y * a.lists.blocks + block) * a.parts + part] = 1 / factor;
    auto convert = [&](uint32_t x) {
        float2 y = unpack2<T>(x);
        return pack2<__half>(y.x * factor, y.y * factor);
    };
    char *const to = a.packed + blockIdx.y * a.plan.n * (2 * D);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int item = thread + i * PACK_THREADS, row = item / GROUPS;
        if (row >= keys) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 &x = v[i][j];
            x = make_uint4(convert(x.x), convert(x.y), convert(x.z), convert(x.w));
        }
        auto store = [&](int j, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
            const int chunk = item % GROUPS * 4 + j;
            *(uint4 *)(to + (chunk / 8 * a.plan.n + key0 + row) * 128 + ((chunk ^ row) % 8 << 4)) =
                make_uint4(x0, x1, x2, x3);
        };
        store(0, v[i][0].x, v[i][1].x, v[i][2].x, v[i][3].x);
        store(1, v[i][0].y, v[i][1].y, v[i][2].y, v[i][3].y);
        store(2, v[i][0].z, v[i][1].z, v[i][2].z, v[i][3].z);
        store(3, v[i][0].w, v[i][1].w, v[i][2].w, v[i][3].w);
    }
    wait_for_previous_kernel(); // so that it has ended when this one has
}

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
    selected_forward_sm90_kernel(const SelArgs a, const __grid_constant__ CUtensorMap k_map) {
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
        registers_down_to<F::PRODUCER_REGISTERS>();
        const Share share = share_of(a, head, blockIdx.x);
        if (warp < F::GATHERERS) {
            TileWalk<F::GATHERERS> walk(a, share, warp);
            for (uint32_t n = warp; walk.runs.more; n += F::GATHERERS) {
                TileRows t = walk.take(a, share.entry0);
                walk.next(a, share);
                QTurn turn(n);
                turn.wait_empty(q_empty);
                gather<T, D, 8>(smem_address(m->q[turn.stage]), a.q, t.row);
                cp_async_arrive(q_full + 8 * turn.stage);
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
            const char *const packed = a.packed + blockIdx.y * a.plan.n * (2 * D);
            for (RunWalk runs(a, share); runs.more; runs.next(a, share)) {
                const Run &run = runs.run;
                for (int part = 0; part < a.parts; part++, n++) {
                    const int keys = max(0, min(run.keys - part * KEYS, KEYS));
                    const float unfactor =
                        a.factors[(blockIdx.y * a.lists.blocks + run.index) * a.parts + part];
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
                        mbarrier_arrive_expect(full, (KEYS + keys) * D * 2);
                        const int64_t key0 = run.key0 + part * KEYS;
                        for (int panel = 0; panel < D / 64; panel++) {
                            const uint32_t at = to + panel * KEYS * 128;
                            tma_load_3d(at, &k_map, panel * 64, head, (int)key0, full, l2_first());
                            if (keys > 0)
                                bulk_load(at + KEYS * D * 2, packed + (panel * a.plan.n + key0) * 128,
                                          keys * 128, full, l2_first());
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
        registers_up_to<F::REGISTERS>();
        // Producers go ahead: what they read was there before the first slab, which waits for all before it.
        wait_for_previous_kernel();
        let_next_kernel_start();
        const int consumer = warp / 4 - 1, quad = lane / 4, c = lane % 4;
        const float scale_log2 = a.scale * FSA_LOG2E;
        const int64_t partial0 = (int64_t)blockIdx.y * a.lists.slab * a.topk * a.parts * g;
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
            const uint64_t from_k = wgmma_matrix(smem_address(m->kv[kv.stage][0])),
                           from_v = wgmma_matrix(smem_address(m->kv[kv.stage][1]), KEYS * 128);
            auto start_s = [&] {
                mbarrier_wait(q_full + 8 * q_turn.stage, q_turn.parity);
                fence_proxy_async(); // cp.async wrote the rows
                const uint64_t from_q = wgmma_matrix(smem_address(m->q[q_turn.stage]));
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < D / 16; k++)
                    wgmma_ss<T>(s, wgmma_further(from_q, k / 4 * 64 * 128 + k % 4 * 32),
                                wgmma_further(from_k, k / 4 * KEYS * 128 + k % 4 * 32), k > 0);
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
                wgmma_pin(s);
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
                    most = quad_max(most);
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
                    wgmma_rs<__half, 1>(o, p[k], wgmma_further(from_v, k * 2048), k > 0);
                wgmma_commit();
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float l = quad_sum(sum[i]);
                    if (c == 0 && to[i] != NONE) // no sum, no logarithm: -inf
                        stats[to[i]] =
                            make_float2(base[i] + log2_fast(l), l > 0 ? unfactor * reciprocal_fast(l) : 0);
                }
                wgmma_wait<0>();
                wgmma_pin(o);
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
                    const uint64_t policy = to[i] < kept ? l2_last() : l2_first();
#pragma unroll
                    for (int j = 0; j < D / 32; j++) store(row + 4 * j, x[i][j].x, policy);
                }
            }
            first += tiles;
            mbarrier_arrive_warp(kv_empty + 8 * kv.stage);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// Backward

// One share's.
template <int D, int KEYS> struct alignas(1024) BackwardSmem {
    static constexpr int Q = Backward<D, KEYS>::Q_STAGES, KV = Backward<D, KEYS>::KV_STAGES;
    char k[KV][KEYS * D * 2], v[KV][KEYS * D * 2], q[Q][2][64 * D * 2]; // q and dO
    char ds[KEYS * 64 * 2];                                             // dS^T, [keys][64 rows]
    struct {
        uint32_t partial[64];
        alignas(8) float lse[64], delta[64]; // lse_grad and delta
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
// computes S^T = K Q^T, dP^T = V dO^T, P^T = exp(S^T - lse_grad), dS^T = P^T (dP^T - delta), and dV += P^T
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
    selected_backward_sm90_kernel(const SelArgs a, const __grid_constant__ CUtensorMap k_map,
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
        registers_down_to<B::PRODUCER_REGISTERS>();
        const Share share = share_of(a, head, index);
        const uint32_t pair = B::SHARES == 1 ? warp % 2 : 0; // takes every GATHERERS-th tile
        if (warp < 2) {
            // Partial rows are counted over all heads of the launch.
            const uint32_t entry0 = share.entry0 - blockIdx.y * (uint32_t)(a.lists.slab * a.topk);
            TileWalk<B::GATHERERS> walk(a, share, pair);
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
                    cp_async_4(smem_address(&meta.lse[r]), &a.lse_grad[t.row[i]]);
                    cp_async_4(smem_address(&meta.delta[r]), &a.delta[t.row[i]]);
                    if (t.partial[i] == NONE) t.limit[i] = -1;
                    meta.partial[r] = t.partial[i], meta.limit[r] = t.limit[i];
                }
                int masked = __any_sync(0xffffffffu, min(t.limit[0], t.limit[1]) < KEYS - 1);
                if (lane == 0) meta.masked = masked;
                gather<T, D, 4>(smem_address(m->q[turn.stage][0]), a.q, t.row);
                cp_async_arrive(q_full + 8 * turn.stage);
                mbarrier_arrive_warp(q_full + 8 * turn.stage);
            }
        } else {
            uint32_t n = 0, tile = 0;
            for (RunWalk runs(a, share); runs.more; runs.next(a, share)) {
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
                        cp_async_arrive(full);
                        if (lane == 0) {
                            auto &meta = m->block[turn.stage];
                            meta.out = out, meta.added = added;
                            meta.tiles = tiles, meta.keys = keys;
                            mbarrier_arrive_expect(full, keys < KEYS ? 0 : 2 * KEYS * D * 2);
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
                            cp_async_arrive(q_full + 8 * turn.stage);
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
                cp_async_arrive(kv_full + 8 * turn.stage);
                if (lane == 0) {
                    m->block[turn.stage].tiles = 0;
                    mbarrier_arrive(kv_full + 8 * turn.stage);
                }
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
    } else {
        registers_up_to<B::REGISTERS>();
        wait_for_previous_kernel(); // as in the forward kernel
        let_next_kernel_start();
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
                const uint64_t left = wgmma_matrix_anew(keys), right = wgmma_matrix(rows);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < D / 16; k++) {
                    wgmma_ss<T>(x, wgmma_further(left, k / 4 * KEYS * 128 + k % 4 * 32),
                                wgmma_further(right, k / 4 * 64 * 128 + k % 4 * 32), k > 0);
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
                const uint64_t q_rows = wgmma_matrix(q_tile, 64 * 128),
                               g_rows = wgmma_matrix(g_tile, 64 * 128);
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
                        wgmma_pin(s);
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
                        wgmma_rs<T, 1>(dv, p[k], wgmma_further(g_rows, k * 2048), 1);
                    wgmma_commit();
#pragma unroll
                    for (int j = 0; j < B::DP_ROWS / 8; j++)
                        delta[j] = *(const float2 *)&meta.delta[row + j * 8 + 2 * c];
                    wgmma_wait<1>();
                    wgmma_pin(dp);
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
                for (int k = 0; k < 4; k++) wgmma_rs<T, 1>(dk, ds[k], wgmma_further(q_rows, k * 2048), 1);
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
                    const uint64_t left = wgmma_matrix(smem_address(m->ds));
                    const uint64_t right = wgmma_matrix(k_tile + column / 64 * KEYS * 128 + column % 64 * 2);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < KEYS / 16; k++)
                        wgmma_ss<T, 1, 1>(dq, wgmma_further(left, k * 2048), wgmma_further(right, k * 2048),
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
                    wgmma_pin(dq);
                    store_dq(column0 + piece * B::DQ_COLUMNS);
                }
            }
            wgmma_pin(dk);
            wgmma_pin(dv);
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
                put_sums([](float *to, float x, float y) { add_to_memory(to, x, y); });
            else
                put_sums([](float *to, float x, float y) { *(float2 *)to = make_float2(x, y); });
            wgmma_wait<0>();
            wgmma_pin(s);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// Launchers

template <typename T, int D, int KEYS>
static int pack(const SelArgs &a, unsigned heads, cudaStream_t stream) {
    dim3 grid((unsigned)(a.lists.blocks * a.parts), heads);
    launch(a.head0 > 0, pack_kernel<T, D, KEYS>, grid, PACK_THREADS, 0, stream, a);
    return FSA_OK;
}
// A map of k or v, by a part of a block.
template <typename T, int D, int KEYS>
static int key_map(const SelArgs &a, const void *keys, CUtensorMap *map) {
    int64_t size[] = {D, a.kv_heads, a.plan.n}, stride[] = {2, D * 2, (int64_t)a.kv_heads * D * 2};
    int box[] = {64, 1, KEYS};
    return fsa_tensor_map(map, std::is_same<T, __half>::value ? FSA_FP16 : FSA_BF16, 3, keys, size, stride,
                          box);
}
template <typename T, int D, int KEYS>
static int forward(const SelArgs &a, unsigned heads, cudaStream_t stream) {
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
template <typename T, int D, int KEYS>
static int backward(const SelArgs &a, unsigned heads, cudaStream_t stream) {
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

// f for the element type, head size and keys of a part.
#define DISPATCH(f)                                                                                          \
    (dtype == FSA_BF16 ? head_dim == 64 ? a.keys == 64 ? f<__nv_bfloat16, 64, 64>(a, heads, stream)          \
                                                       : f<__nv_bfloat16, 64, 128>(a, heads, stream)         \
                         : a.keys == 64 ? f<__nv_bfloat16, 128, 64>(a, heads, stream)                        \
                                        : f<__nv_bfloat16, 128, 128>(a, heads, stream)                       \
     : head_dim == 64                                                                                        \
         ? a.keys == 64 ? f<__half, 64, 64>(a, heads, stream) : f<__half, 64, 128>(a, heads, stream)         \
     : a.keys == 64 ? f<__half, 128, 64>(a, heads, stream)                                                   \
                    : f<__half, 128, 128>(a, heads, stream))

int fsa_sel_pack_sm90(const SelArgs &a, FsaDtype dtype, int head_dim, unsigned heads, cudaStream_t stream) {
    return DISPATCH(pack);
}
int fsa_sel_forward_sm90(const SelArgs &a, FsaDtype dtype, int head_dim, unsigned heads,
                         cudaStream_t stream) {
    return DISPATCH(forward);
}
int fsa_sel_backward_sm90(const SelArgs &a, FsaDtype dtype, int head_dim, unsigned heads,
                          cudaStream_t stream) {
    return DISPATCH(backward);
}

int fsa_sel_places_sm90(int keys, int backward) {
    return backward && keys == 64 ? Backward<128, 64>::SHARES : 1;
}
