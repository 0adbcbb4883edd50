// selected.cu: the selected branch, KV block outside (see selected.cuh): portable main kernels, the
// reductions, and the launchers, which on Hopper start selected_sm90.cu's main kernels instead.
#include "rope.cuh"
#include "selected.cuh"

enum {
    // Bytes of partial rows of a launch aimed at: forward's the best of those tried; backward gains a little
    // more with more, but 64K tokens are to do with 320 MiB of workspace.
    BUDGET = 96 << 20,
    BACKWARD_BUDGET = 193 << 20,
    KEY_BUDGET = 64 << 20, // and of dkv or packed, if a head's are not more
    KEPT = 8 << 20,        // of forward's partial rows, to stay in the L2 until the merge: with more fewer do
    MIN_SHARE = 64,        // list entries of a share on average, where there are so few
};

// ---------------------------------------------------------------------------------------------------------
// Forward

// K and V lie in shared memory with the 4-byte units of each 64-byte group transposed (unit 4c+i at i*4+c).
// Then lane c of a quad, which mma gives units c, 4+c, 8+c, 12+c, works on 16 contiguous bytes of q and of o,
// and the gather and the partials move straight between registers and memory.
static __device__ __forceinline__ void store_transposed(char *tile, uint32_t at[4], const uint4 x[4]) {
    *(uint4 *)(tile + at[0]) = make_uint4(x[0].x, x[1].x, x[2].x, x[3].x);
    *(uint4 *)(tile + at[1]) = make_uint4(x[0].y, x[1].y, x[2].y, x[3].y);
    *(uint4 *)(tile + at[2]) = make_uint4(x[0].z, x[1].z, x[2].z, x[3].z);
    *(uint4 *)(tile + at[3]) = make_uint4(x[0].w, x[1].w, x[2].w, x[3].w);
}

template <typename T> static __device__ __forceinline__ uint32_t to_half_scaled(uint32_t x, float factor) {
    float2 f = unpack2<T>(x);
    return pack2<__half>(f.x * factor, f.y * factor);
}
template <typename T> static __device__ __forceinline__ float max_abs(const uint4 &x) {
    float2 a = unpack2<T>(x.x), b = unpack2<T>(x.y), c = unpack2<T>(x.z), d = unpack2<T>(x.w);
    float m = fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y)));
    return fmaxf(m, fmaxf(fmaxf(fabsf(c.x), fabsf(c.y)), fmaxf(fabsf(d.x), fabsf(d.y))));
}

// A thread block takes a share of one head's list: for each KV block in it K and V come to shared
// memory once, and each warp takes 16 rows (g rows a token, packed) at a time: q from memory into fragments,
// S = QK^T, softmax within the block, O = PV, and out goes the normalized row and its log-sum-exp.
// V and P are fp16: V times a power of two that brings the block's largest to 2^14, so nothing overflows and
// a partial's rounding is an eighth of bf16's.
// A row moves 2*D bytes in and 2*D + 8 out. 64K tokens, 32 heads, T = 16, d = 128: 8.6 GB in, 8.8 out, 3.9 ms
// at 4.5 TB/s; 1.1 TFLOP, 1.4 ms at 790. Memory binds (with mma.sync, shared memory is next: 2.4 ms).
template <typename T, int D, int TILES>
__global__ void __launch_bounds__(128, 3) selected_forward_kernel(SelArgs a) {
    constexpr int GROUPS = D / 32, KEYS = 64 * TILES;
    extern __shared__ __align__(128) char smem[];
    __shared__ float warp_max[4];
    char *k_tile = smem, *v_tile = smem + KEYS * D * 2;
    const uint32_t k_base = smem_address(k_tile), v_base = smem_address(v_tile);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, c = lane % 4;
    const int head = a.head0 + blockIdx.y, g = a.group;
    const Share share = share_of(a, head, blockIdx.x);
    const float scale_log2 = a.scale * FSA_LOG2E;

    for (uint32_t begin = share.begin; begin < share.end;) {
        Run run = run_at(a, share, begin);
        const int rows = (int)run.count * g, tiles = (rows + 15) / 16;
        for (int part = 0; part < a.parts; part++) {
            const int first_key = part * KEYS, keys = min(KEYS, run.keys - first_key); // may be < 1
            // K and V of the block; keys that it lacks are zeros.
            const int64_t kv_row = (int64_t)a.kv_heads * D;
            const T *k_head = (const T *)a.k + (run.key0 + first_key) * kv_row + head * D;
            const T *v_head = (const T *)a.v + (run.key0 + first_key) * kv_row + head * D;
            float largest = 0;
            for (int i = threadIdx.x; i < KEYS * D / 8; i += 128) {
                int row = i / (D / 8);
                if (row < keys)
                    largest =
                        fmaxf(largest, max_abs<T>(((const uint4 *)(v_head + row * kv_row))[i % (D / 8)]));
            }
            for (int i = 16; i > 0; i /= 2)
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, i));
            __syncthreads(); // all warps are done with the last tile
            if (lane == 0) warp_max[warp] = largest;
            __syncthreads();
            largest = fmaxf(fmaxf(warp_max[0], warp_max[1]), fmaxf(warp_max[2], warp_max[3]));
            int exponent = min(max(14 - ilogbf(largest), -100), 100);
            const float factor = largest > 0 ? ldexpf(1, exponent) : 1, unfactor = 1 / factor;
            for (int i = threadIdx.x; i < KEYS * GROUPS; i += 128) {
                int row = i / GROUPS, group = i % GROUPS;
                uint4 x[4] = {}, y[4] = {};
                if (row < keys) {
                    const uint4 *from_k = (const uint4 *)(k_head + row * kv_row) + group * 4;
                    const uint4 *from_v = (const uint4 *)(v_head + row * kv_row) + group * 4;
#pragma unroll
                    for (int j = 0; j < 4; j++) x[j] = from_k[j], y[j] = from_v[j];
                }
                uint32_t at[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    at[j] = swizzled<D>(row, group * 4 + j);
                    y[j] = make_uint4(to_half_scaled<T>(y[j].x, factor), to_half_scaled<T>(y[j].y, factor),
                                      to_half_scaled<T>(y[j].z, factor), to_half_scaled<T>(y[j].w, factor));
                }
                store_transposed(k_tile, at, x);
                store_transposed(v_tile, at, y);
            }
            __syncthreads();

            uint4 q[2][GROUPS]; // rows `quad` and quad + 8 of the tile
            uint32_t entry[2], next_entry[2];
            auto load_entries = [&](int tile, uint32_t *e) {
#pragma unroll
                for (int i = 0; i < 2; i++)
                    e[i] = share.entries[begin + min(tile * 16 + quad + 8 * i, rows - 1) / g];
            };
            auto load_q = [&](int tile, const uint32_t *e) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int r = min(tile * 16 + quad + 8 * i, rows - 1);
                    int64_t at = (int64_t)(e[i] / (uint32_t)a.topk) * a.q_heads + head * g + r % g;
                    const uint4 *from = (const uint4 *)((const T *)a.q + at * D);
#pragma unroll
                    for (int j = 0; j < GROUPS; j++) q[i][j] = from[4 * j + c];
                }
            };
            if (warp < tiles) {
                load_entries(warp, entry);
                load_q(warp, entry);
                load_entries(warp + 4, next_entry);
            }
            for (int tile = warp; tile < tiles; tile += 4) {
                float o[D / 8][4], max_row[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
                for (int i = 0; i < D / 8; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
                int limit[2]; // last visible key of this part
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int64_t in_list = begin - run.first + (tile * 16 + quad + 8 * i) / g;
                    limit[i] = last_key(a, run, in_list, entry[i] / (uint32_t)a.topk) - first_key;
                }
#pragma unroll
                for (int half = 0; half < TILES; half++) {
                    if (TILES > 1 && half > 0 && keys <= 64 * half) break;
                    float s[8][4];
#pragma unroll
                    for (int n = 0; n < 8; n++) {
                        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
                        for (int j = 0; j < GROUPS; j++) {
                            uint32_t b[4];
                            ldmatrix_x4(b, k_base +
                                               swizzled<D>(half * 64 + n * 8 + (lane & 7), j * 4 + lane / 8));
                            const uint32_t a0[4] = {q[0][j].x, q[1][j].x, q[0][j].y, q[1][j].y};
                            const uint32_t a1[4] = {q[0][j].z, q[1][j].z, q[0][j].w, q[1][j].w};
                            mma_16816<T>(s[n], a0, b[0], b[1]);
                            mma_16816<T>(s[n], a1, b[2], b[3]);
                        }
                    }
                    if (half == TILES - 1 || keys <= 64 * (half + 1)) {
                        // The next rows travel while this tile goes on.
                        if (tile + 4 < tiles) load_q(tile + 4, next_entry);
                    }
                    float new_max[2] = {max_row[0], max_row[1]};
#pragma unroll
                    for (int n = 0; n < 8; n++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int key = half * 64 + n * 8 + 2 * c + (i & 1);
                            s[n][i] = key <= limit[i / 2] ? s[n][i] * scale_log2 : -INFINITY;
                            new_max[i / 2] = fmaxf(new_max[i / 2], s[n][i]);
                        }
                    }
                    float base[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        new_max[i] = quad_max(new_max[i]);
                        base[i] = new_max[i] == -INFINITY ? 0 : new_max[i];
                        if (half > 0) sum[i] *= exp2_fast(max_row[i] - base[i]);
                    }
                    if (half > 0) {
                        float shrink[2] = {exp2_fast(max_row[0] - base[0]), exp2_fast(max_row[1] - base[1])};
#pragma unroll
                        for (int n = 0; n < D / 8; n++) {
#pragma unroll
                            for (int i = 0; i < 4; i++) o[n][i] *= shrink[i / 2];
                        }
                    }
                    max_row[0] = new_max[0], max_row[1] = new_max[1];
                    uint32_t p[4][4];
#pragma unroll
                    for (int n = 0; n < 8; n++) {
                        float e[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            e[i] = exp2_fast(s[n][i] - base[i / 2]);
                            sum[i / 2] += e[i];
                        }
                        p[n / 2][(n & 1) * 2] = pack2<__half>(e[0], e[1]);
                        p[n / 2][(n & 1) * 2 + 1] = pack2<__half>(e[2], e[3]);
                    }
#pragma unroll
                    for (int kk = 0; kk < 4; kk++) {
#pragma unroll
                        for (int n = 0; n < D / 8; n += 2) {
                            uint32_t b[4];
                            ldmatrix_x4_trans(
                                b, v_base + swizzled<D>(half * 64 + kk * 16 + (lane & 15), n + lane / 16));
                            mma_16816<__half>(o[n], p[kk], b[0], b[1]);
                            mma_16816<__half>(o[n + 1], p[kk], b[2], b[3]);
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int r = tile * 16 + quad + 8 * i;
                    float l = quad_sum(sum[i]), inverse = l > 0 ? 1 / l : 0;
                    if (r >= rows) continue;
                    int64_t at =
                        (((int64_t)blockIdx.y * a.lists.slab * a.topk + (entry[i] - share.entry0)) * a.parts +
                         part) *
                            g +
                        r % g;
                    Partial<__half> out[GROUPS];
#pragma unroll
                    for (int j = 0; j < GROUPS; j++) out[j] = piece_of<__half>(o, 4 * j, i, inverse);
                    Partial<__half>::store(a.partial + at * row_bytes<__half, D>(), 0, c, out);
                    if (c == 0)
                        a.stats[at] = make_float2(l > 0 ? max_row[i] + log2f(l) : -INFINITY, unfactor);
                }
                entry[0] = next_entry[0], entry[1] = next_entry[1];
                load_entries(tile + 8, next_entry);
            }
        }
        begin += run.count;
    }
}

// The inclusive sum of x over the warp's lanes up to this one.
static __device__ __forceinline__ uint32_t warp_scan(uint32_t x) {
    for (int i = 1; i < 32; i *= 2) {
        const uint32_t below = __shfl_up_sync(0xffffffffu, x, i);
        if (threadIdx.x % 32 >= i) x += below;
    }
    return x;
}

// A thread block cuts a slab's list of one head into shares. A KV block's part of it counts as its tiles of
// 64 rows and one more, for the block's K and V and for the tile that isn't full: shares equal in entries
// alone would have those with many short lists take twice as long as the rest. But where a sequence's shares
// begin and end is a matter of its entries, whose number no choice changes: so a sequence's sums have the
// same order whatever its neighbours chose. Two shares may be cut at the same place. A warp makes cuts that
// follow each other, and goes through a sequence's offsets once for their sum and once for the cuts; latency
// binds, 15 us on an H100 for all slabs and heads of 64K tokens.
enum { CUT_THREADS = 1024 };
static __global__ void __launch_bounds__(CUT_THREADS) cut_kernel(SelArgs a) {
    a.slab = blockIdx.x;
    const int head = blockIdx.y, lane = threadIdx.x % 32;
    Share all = {};
    all.offsets = a.lists.offsets + (head * a.lists.slabs + a.slab) * (a.lists.blocks + 1);
    all.end = all.offsets[a.lists.blocks];
    const int64_t at = first_cut(a, head);
    const int each = (a.shares + CUT_THREADS / 32) / (CUT_THREADS / 32), from = threadIdx.x / 32 * each;
    int last = 0, block = 0;               // of the sequence: the block beyond; of the lanes: theirs
    uint32_t first_entry = 0, entries = 0; // the sequence's
    uint32_t sum = 0, before = 0, mine = 0,
             upto = 0; // tiles: the sequence's, before the 32 blocks, a block's, up to it
    auto cost = [&](int block) {
        const uint32_t count = block < last ? all.offsets[block + 1] - all.offsets[block] : 0;
        return count ? (count * a.group + 63) / 64 + 1 : 0;
    };
    for (int i = from; i <= min(from + each - 1, a.shares); i++) {
        const uint32_t entry = (uint32_t)((uint64_t)i * all.end / a.shares);
        uint32_t cut = entry, of_block = 0;
        if (entry > 0 && entry < all.end) {
            if (entry - first_entry >= entries) { // the first of its sequence
                const Run run = run_at(a, all, entry);
                const int first = run.index - run.block;
                last = (int)a.plan.cu_blocks[fsa_find(a.plan.cu_blocks, a.plan.num_seqs, run.index) + 1];
                first_entry = all.offsets[first], entries = all.offsets[last] - first_entry;
                sum = 0, before = 0, block = first + lane;
                for (int other = block; other < last; other += 32) sum += cost(other);
                sum = __shfl_sync(0xffffffffu, warp_scan(sum), 31);
                mine = cost(block), upto = warp_scan(mine);
            }
            const uint32_t target = (uint32_t)((uint64_t)(entry - first_entry) * sum / entries);
            unsigned beyond;
            while (!(beyond = __ballot_sync(0xffffffffu, upto > target))) {
                before = __shfl_sync(0xffffffffu, upto, 31);
                block += 32, mine = cost(block), upto = before + warp_scan(mine);
            }
            const int found = __ffs((int)beyond) - 1;
            const uint32_t tiles = target - __shfl_sync(0xffffffffu, upto - mine, found);
            // The first of a block's tiles is K's and V's.
            of_block = __shfl_sync(0xffffffffu, block, found);
            cut = all.offsets[of_block] + (tiles ? tiles - 1 : 0) * 64 / a.group;
        }
        if (lane == 0) a.cuts[at + i] = cut, a.cut_blocks[at + i] = of_block;
    }
}

// The partial rows of one (token, head), as D/8 lanes see them, a piece a lane: a warp has 256/D of these.
// Slots go 16 at a time, of which 8 are in flight. Rows of all kinds are fewer than 2^32.
template <typename P, int D> struct PartialRow {
    static constexpr int LANES = D / 8, ROWS = 32 / LANES, HELD = 16 / LANES, LOADS = 8;
    bool there;              // a warp's last rows may be missing; they repeat the last one
    int piece;               // of eight channels: this lane's
    uint32_t row, to, first; // the token's query row, row*q_heads + head, the first slot's partial
    int64_t pos;             // the token's position
    const char *from;        // this lane's piece of the first slot
    unsigned valid;          // of 16 slots, a bit each: those that are in the lists, as lists.cu has it
    uint64_t policy;         // of the token's rows
    Partial<P> x[LOADS];
    __device__ __forceinline__ PartialRow(const SelArgs &a, uint32_t index) {
        const uint32_t rows = (uint32_t)a.tokens * a.group;
        there = index < rows, index = min(index, rows - 1), piece = threadIdx.x % LANES;
        const uint32_t token = divide(index, a.by_group), in_group = index - token * a.group;
        row = (uint32_t)a.slab * (uint32_t)a.lists.slab + token;
        int64_t seq;
        fsa_row(a.plan, row, &seq, &pos);
        to = row * a.q_heads + (a.head0 + blockIdx.y) * a.group + in_group;
        first = (blockIdx.y * (uint32_t)a.lists.slab + token) * (a.topk * a.parts * a.group) + in_group;
        from = a.partial + first * (uint64_t)row_bytes<P, D>() + Partial<P>::offset(piece);
        policy = first < a.kept ? l2_last() : l2_first();
    }
    // Of slots slot0 .. slot0 + 15. Whole warps call it.
    __device__ __forceinline__ void find_valid(const SelArgs &a, int slot0) {
        const int32_t *const indices =
            a.indices + ((a.head0 + blockIdx.y) * (uint32_t)a.plan.nq + row) * (uint64_t)a.topk;
        valid = 0;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int slot = slot0 + k * LANES + piece;
            int index = -1;
            if (slot < a.topk * a.parts) index = indices[a.parts == 1 ? slot : slot / a.parts];
            const unsigned all = __ballot_sync(
                0xffffffffu, index >= a.lists.init && ((int64_t)index + a.lists.local) * a.block <= pos);
            valid |= (all >> (threadIdx.x % 32 / LANES * LANES) & ((1ull << LANES) - 1)) << k * LANES;
        }
    }
    // Starts to load a slot to x[i]; zeros if it isn't valid.
    __device__ __forceinline__ void load(const SelArgs &a, int i, int slot) {
        x[i] = Partial<P>::load(from + slot * (uint64_t)(a.group * row_bytes<P, D>()), piece,
                                valid >> slot % 16 & 1, policy);
    }
    __device__ __forceinline__ void load_first(const SelArgs &a, int slot0) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) load(a, i, slot0 + i);
    }
    // use(x, i) for each of up to 16 slots from slot0 on, of which load_first has begun to load the first.
    template <typename Use> __device__ __forceinline__ void each(const SelArgs &a, int slot0, Use use) {
        const bool more = slot0 + LOADS < a.topk * a.parts;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            use(x[i], i);
            load(a, i, slot0 + LOADS + i);
        }
        if (more) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) use(x[i], LOADS + i);
        }
    }
    template <typename T> __device__ __forceinline__ void store(void *rows, const float (&sum)[8]) const {
        if (there)
            ((uint4 *)rows)[to * (uint64_t)LANES + piece] =
                make_uint4(pack2<T>(sum[0], sum[1]), pack2<T>(sum[2], sum[3]), pack2<T>(sum[4], sum[5]),
                           pack2<T>(sum[6], sum[7]));
    }
};

// D/8 lanes merge the partials of one (token, head), with what o and lse already have of blocks that lists
// leave out, and go on to the gated sum of the branches if there is a gate. Rows beside the partials come
// early and wait in shared memory. Reads T*parts rows of 2*D + 8 bytes and up to three of 2*D, writes two, or
// the sum alone. 64K tokens, 32 heads, T = 16, d = 128, 3 blocks left out, with a gate: 7.2 GB and 1.6
// in, 1.1 out, 2.2 ms at 4.5 TB/s. Memory binds: on an H100 2.6 TB/s of 3.0.
template <typename T, int D> __global__ void __launch_bounds__(256, 4) selected_merge_kernel(SelArgs a) {
    typedef PartialRow<__half, D> Row;
    const int slots = a.topk * a.parts;
    if ((blockIdx.x * 8 + threadIdx.x / 32) * Row::ROWS >= a.tokens * a.group) return;
    Row r(a, (blockIdx.x * 256 + threadIdx.x) / Row::LANES);
    // All this was written before the main kernel began, which a merge never overtakes.
    const bool left_out = a.lists.init + a.lists.local > 0, gated = a.gate.sum;
    // Rows of left out blocks, of the compressed and of the sliding branch; each lane reads what it brought.
    __shared__ uint4 others[3][256];
    auto bring = [&](int i, const void *from) {
        cp_async_16(smem_address(&others[i][threadIdx.x]),
                    (const uint4 *)from + r.to * (uint64_t)Row::LANES + r.piece);
    };
    if (left_out) bring(0, a.o);
    if (gated) bring(1, a.gate.o_cmp), bring(2, a.gate.o_win);
    cp_async_commit();
    float left_out_lse = left_out ? a.lse[r.to] : -INFINITY;
    T logit = (T)0.f; // of branch `piece`
    if (gated && r.piece < 3)
        logit = ((const T *)a.gate.logits)[(a.per_token ? r.row : r.to) * 3ull + r.piece];
    r.find_valid(a, 0);
    wait_for_previous_kernel();
    let_next_kernel_start();
    r.load_first(a, 0);
    float2 stats[Row::HELD]; // of slots k*LANES + piece
    auto load_stats = [&](int slot0) {
#pragma unroll
        for (int k = 0; k < Row::HELD; k++) {
            const int slot = k * Row::LANES + r.piece;
            stats[k] =
                r.valid >> slot & 1 ? a.stats[r.first + (slot0 + slot) * a.group] : make_float2(-INFINITY, 0);
        }
    };
    float most = -INFINITY, sum = 0;
    if (slots > 16) {
        for (int s0 = 16; s0 < slots; s0 += 16) {
            r.find_valid(a, s0);
            load_stats(s0);
#pragma unroll
            for (int k = 0; k < Row::HELD; k++) most = fmaxf(most, stats[k].x);
        }
        r.find_valid(a, 0);
    }
    load_stats(0);
#pragma unroll
    for (int k = 0; k < Row::HELD; k++) most = fmaxf(most, stats[k].x);
    left_out_lse *= FSA_LOG2E;
    most = fmaxf(most, left_out_lse);
    for (int i = Row::LANES / 2; i > 0; i /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i));
    float acc[8] = {};
    for (int s0 = 0;;) {
        float weight[Row::HELD];
#pragma unroll
        for (int k = 0; k < Row::HELD; k++) {
            weight[k] = stats[k].x == -INFINITY ? 0 : exp2_fast(stats[k].x - most);
            sum += weight[k];
            weight[k] *= stats[k].y;
        }
        r.each(a, s0, [&](const Partial<__half> &x, int i) {
            x.add_to(acc, __shfl_sync(0xffffffffu, weight[i / Row::LANES], i % Row::LANES, Row::LANES));
        });
        if ((s0 += 16) >= slots) break;
        r.find_valid(a, s0);
        r.load_first(a, s0);
        load_stats(s0);
    }
    for (int i = Row::LANES / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    cp_async_wait<0>();
    if (left_out_lse != -INFINITY) {
        const float weight = exp2_fast(left_out_lse - most);
        sum += weight;
        add_row<T>(acc, others[0][threadIdx.x], weight);
    }
    const float inverse = sum > 0 ? 1 / sum : 0;
#pragma unroll
    for (int j = 0; j < 8; j++) acc[j] *= inverse;
    if (a.o != a.gate.sum) r.template store<T>(a.o, acc);
    if (gated) {
        const float gate = sigmoid((float)logit);
        const float own = __shfl_sync(0xffffffffu, gate, 1, Row::LANES);
#pragma unroll
        for (int j = 0; j < 8; j++) acc[j] *= own;
        for (int i = 1; i < 3; i++)
            add_row<T>(acc, others[i][threadIdx.x],
                       __shfl_sync(0xffffffffu, gate, i == 1 ? 0 : 2, Row::LANES));
        r.template store<T>(a.gate.sum, acc);
    }
    if (r.piece == 0 && r.there) a.lse[r.to] = sum > 0 ? (most + log2f(sum)) * FSA_LN2 : -INFINITY;
}

// ---------------------------------------------------------------------------------------------------------
// Backward

// A thread block takes a share of one head's list, 64 keys of each KV block at a time: K and V stay
// in shared memory, dK and dV in registers; 64 gathered rows of q and dO at a time give S, dP = dO V^T, P =
// exp(S - lse_grad), dS = P (dP - delta), then dV += P^T dO, dK += dS^T Q, and dQ = dS K goes out as a
// partial row (partial.cuh; the reduction puts its channels in order). A KV block's sum is added to dkv by
// the thread block where its list starts; one that goes on with another's list leaves its sum in `crossing`,
// and sum_crossing adds these in order. A row moves 4*D + 12 bytes in and 1.5*D out (fp16 2*D). 64K tokens,
// 32 heads, T = 16, d = 128: 17.6 GB in, 6.4 out, 5.3 ms at 4.5 TB/s; 2.75 TFLOP, 3.5 ms at 790; with
// mma.sync shared memory's 288 KB a tile of 64 rows: 5.7 ms.
template <typename T, int D> __global__ void __launch_bounds__(128, 2) selected_backward_kernel(SelArgs a) {
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
    char *partial = a.partial + (int64_t)blockIdx.y * a.lists.slab * a.topk * a.parts * g * row_bytes<T, D>();

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
                new_lse = a.lse_grad[new_row] * FSA_LOG2E;
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

// Adds the pieces of the list that starts in share `index` of the main kernel and goes on beyond it, in
// order, to dkv: the thread block is number `quarter` of four. Most lists have one piece, block 0's, in which
// all queries are, a dozen. Reads 64 KiB a piece (d = 128), and as much again of dkv, which it writes;
// latency binds, so four pieces are under way at a time.
template <int D> static __device__ void sum_crossing(const SelArgs &a, unsigned index, unsigned quarter) {
    const Share share = share_of(a, a.head0 + blockIdx.y, index);
    if (share.begin >= share.end) return;
    Run run = run_at(a, share, share.end - 1);
    if (run.first < share.begin || run.last <= share.end) return;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int64_t size = (int64_t)a.parts * a.keys * 2 * D / 4; // of a piece, in float4
    const float4 *pieces = (const float4 *)a.crossing + ((int64_t)blockIdx.y * a.shares + index + 1) * size;
    float4 *to = (float4 *)(a.dkv + ((int64_t)blockIdx.y * a.plan.n + run.key0) * 2 * D);
    const uint32_t *const cuts = a.cuts + first_cut(a, a.head0 + blockIdx.y) + index + 1;
    int count = 1; // pieces
    while (index + 1 + count < a.shares && cuts[count] < run.last) count++;
    for (int i = quarter * 256 + threadIdx.x; i < run.keys * 2 * D / 4; i += 4 * 256) {
        float4 sum = to[i];
        for (int b = 0; b < count; b += 4) {
            float4 x[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                x[k] = b + k < count && cuts[b + k] < cuts[b + k + 1] ? pieces[(b + k) * size + i]
                                                                      : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int k = 0; k < 4; k++) sum.x += x[k].x, sum.y += x[k].y, sum.z += x[k].z, sum.w += x[k].w;
        }
        to[i] = sum;
    }
}

// D/8 lanes add up the dQ partials of one (token, head) and what other branches have added to it, and turn
// the sum back to the unrotated query. Thread block `index` of those that do.
template <typename T, int D> static __device__ void sum_dq(const SelArgs &a, unsigned index) {
    typedef PartialRow<T, D> Row;
    __shared__ float2 all_turns[256 / Row::LANES][D / 2];
    const int lane = threadIdx.x % 32, slots = a.topk * a.parts;
    if ((index * 8 + threadIdx.x / 32) * Row::ROWS >= a.tokens * a.group) return;
    Row r(a, (index * 256 + threadIdx.x) / Row::LANES);
    r.find_valid(a, 0);
    float2 *const turns = all_turns[threadIdx.x / Row::LANES];
    if (a.others.inv_freq)
        for (int i = r.piece; i < D / 2; i += Row::LANES) turns[i] = rope_turn(r.pos, a.others.inv_freq[i]);
    wait_for_previous_kernel();
    let_next_kernel_start();
    float acc[8] = {};
    for (int s0 = 0; s0 < slots; s0 += 16) {
        if (s0 > 0) r.find_valid(a, s0);
        r.load_first(a, s0);
        r.each(a, s0, [&](const Partial<T> &x, int) { x.add_to(acc, 1); });
    }
    // Lane 4*group + c holds units c, 4+c, 8+c, 12+c of its 64-byte group, and is to write 4c .. 4c+3.
    auto exchange = [&](int kept, int given, int with) { // unit `kept` of the lanes without bit `with`
        const bool odd = lane & with;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float &x = acc[2 * kept + i], &y = acc[2 * given + i];
            const float got = __shfl_xor_sync(0xffffffffu, odd ? x : y, with);
            (odd ? x : y) = got;
        }
    };
    exchange(0, 1, 1), exchange(2, 3, 1);
    exchange(0, 2, 2), exchange(1, 3, 2);
    if (a.others.dq) {
        const int64_t sum = dq_sum_row(a.plan.nq, a.group, r.row, (int)(r.to - r.row * a.q_heads));
        const float4 *from = (const float4 *)(a.others.dq + sum * D + dq_sum_piece(sum, r.piece) * 8);
        const float4 x = from[0], y = from[1];
        acc[0] += x.x, acc[1] += x.y, acc[2] += x.z, acc[3] += x.w;
        acc[4] += y.x, acc[5] += y.y, acc[6] += y.z, acc[7] += y.w;
    }
    if (a.others.inv_freq) { // channels of the two halves turn together
        const bool upper = r.piece >= Row::LANES / 2;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 turn = turns[r.piece % (Row::LANES / 2) * 8 + j];
            const float other = __shfl_xor_sync(0xffffffffu, acc[j], Row::LANES / 2);
            acc[j] = acc[j] * turn.x + (upper ? -other : other) * turn.y;
        }
    }
    r.template store<T>(a.dq, acc);
}

// What a main kernel leaves to be summed, dkv's pieces first: beside dQ their latency is hidden. Reads
// T*parts rows of 1.5*D bytes a (token, head), of fp16 2*D, and 4*D of others.dq, and writes one: 7.5 GB in
// and 0.5 out for the case of selected_merge_kernel, 1.8 ms.
template <typename T, int D> __global__ void __launch_bounds__(256, 4) backward_sums_kernel(SelArgs a) {
    const unsigned crossing = a.shares * 4;
    if (blockIdx.x < crossing)
        sum_crossing<D>(a, blockIdx.x / 4, blockIdx.x % 4);
    else
        sum_dq<T, D>(a, blockIdx.x - crossing);
}

// dK and dV of a KV block, zeros where nobody chose it, join those of the other branches, dK is turned back,
// and all become the caller's type and layout: 8 bytes in and 4 out a channel and token, and 12 of the other
// branches. Without these 2.5 TB/s on an H100, where memory binds; with them it wasn't measured by itself.
template <typename T, int D> __global__ void __launch_bounds__(256) dkv_store_kernel(SelArgs a) {
    const int64_t block = blockIdx.x;
    wait_for_previous_kernel();
    if (block >= a.plan.cu_blocks[a.plan.num_seqs]) return;
    const int head = a.head0 + blockIdx.y;
    const int64_t seq = fsa_find(a.plan.cu_blocks, a.plan.num_seqs, block), seq0 = a.plan.cu_seqlens[seq];
    const int64_t key0 = seq0 + (block - a.plan.cu_blocks[seq]) * a.block;
    const int keys = (int)min((int64_t)a.block, a.plan.cu_seqlens[seq + 1] - key0);
    const bool chosen = listed(a, head, block, a.lists.slabs);
    const float *own = a.dkv + ((int64_t)blockIdx.y * a.plan.n + key0) * 2 * D;
    // Four channels of dK or dV of a token, and the four that RoPE turns them with.
    for (int i = threadIdx.x; i < keys * 2 * D / 8; i += 256) {
        const int token = i / (2 * D / 8), is_v = i / (D / 8) % 2, channel = i % (D / 8) * 4;
        const int64_t at = ((key0 + token) * a.kv_heads + head) * D + channel;
        float lo[4] = {}, hi[4] = {};
        auto add = [&](const float *from, float factor) {
            const float4 x = *(const float4 *)from, y = *(const float4 *)(from + D / 2);
            lo[0] += x.x * factor, lo[1] += x.y * factor, lo[2] += x.z * factor, lo[3] += x.w * factor;
            hi[0] += y.x * factor, hi[1] += y.y * factor, hi[2] += y.z * factor, hi[3] += y.w * factor;
        };
        if (chosen) add(own + (token * 2 + is_v) * D + channel, is_v ? 1 : a.scale);
        const float *const sums = is_v ? a.others.dv : a.others.dk;
        if (sums) add(sums + at, 1);
        if (!is_v && a.others.inv_freq) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 turn = rope_turn(key0 + token - seq0, a.others.inv_freq[channel + j]);
                const float x = lo[j], y = hi[j];
                lo[j] = x * turn.x + y * turn.y, hi[j] = y * turn.x - x * turn.y;
            }
        }
        if (!is_v && a.others.dk_plain) add(a.others.dk_plain + at, 1);
        T *const to = (T *)(is_v ? a.dv : a.dk) + at;
        *(uint2 *)to = make_uint2(pack2<T>(lo[0], lo[1]), pack2<T>(lo[2], lo[3]));
        *(uint2 *)(to + D / 2) = make_uint2(pack2<T>(hi[0], hi[1]), pack2<T>(hi[2], hi[3]));
    }
}

// ---------------------------------------------------------------------------------------------------------
// Launchers

static size_t round_up(size_t x) {
    return (x + 255) / 256 * 256;
}
static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// How the work is cut and where the workspace's parts lie. With more tokens a launch may take fewer rows or
// heads, but no part of the workspace is smaller: each has a bound for all batches that are smaller in every
// count.
struct SelShape {
    int group, keys, parts, heads, shares; // heads: kv heads a launch takes; shares: of a slab and head
    int init, local;                       // blocks of a row that lists leave out
    int64_t slab, kept;                    // kept: rows of partials, see SelArgs
    size_t lists, cuts, sort, partial, stats, packed, factors, dkv, crossing; // bytes; bounds, see above
    bool hopper;
    size_t bytes() const { // lists are sorted before the rest begins
        return lists + cuts + most(sort, partial + stats + packed + factors + dkv + crossing);
    }
};

static SelShape shape_of(const FsaConfig *c, const FsaPlan *p, FsaDtype type, int backward) {
    SelShape s;
    const bool packed_dq = backward && type == FSA_BF16;
    const int row = packed_dq ? c->head_dim / 8 * Partial<__nv_bfloat16>::BYTES : c->head_dim * 2;
    s.hopper = fsa_hopper();
    s.group = c->q_heads / c->kv_heads;
    const int wide = c->block > 64 ? 128 : 64, back_keys = s.hopper ? wide : 64;
    s.keys = backward ? back_keys : wide;
    s.parts = (int)ceil_div(c->block, s.keys);
    const bool forced = s.hopper && !backward; // these blocks are fsa_dense_forced's
    s.init = forced ? c->init_blocks : 0, s.local = forced ? c->local_blocks : 0;
    const int64_t budget = backward ? BACKWARD_BUDGET : BUDGET;
    int64_t slots = (int64_t)c->topk * ceil_div(c->block, back_keys),
            token = slots * s.group * row;          // bytes
    const int64_t room = most(budget / token, 512); // most rows times heads of a launch
    s.slab = least(room / 64 * 64, FSA_MAX_SLAB);
    int64_t nq = p->nq > 0 ? p->nq : 1;
    s.slab = ceil_div(nq, ceil_div(nq, s.slab)); // equal slabs
    const bool pack = s.hopper && !backward;
    const int64_t key_bytes = p->n * c->head_dim * (backward ? 2 * (int64_t)sizeof(float) : pack ? 2 : 0);
    int64_t heads = least(c->kv_heads, budget / token / s.slab);
    if (key_bytes > 0) heads = least(heads, KEY_BUDGET / key_bytes);
    s.heads = (int)most(heads, 1);
    // One wave: as many thread blocks as the GPU holds at once, each with a share of the lists.
    int device = 0, processors = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    int64_t places = s.hopper ? fsa_sel_places_sm90(s.keys, backward) : backward ? 2 : 3;
    places *= processors;
    s.shares = (int)least(most(places / s.heads, 1), ceil_div(s.slab * c->topk, MIN_SHARE));
    const int64_t rows = least(c->kv_heads * nq, room) * c->topk * s.parts * s.group;
    const int64_t key_room = least(c->kv_heads * key_bytes, most(KEY_BUDGET, key_bytes));
    const int64_t shares = least(c->kv_heads * ceil_div(nq * c->topk, MIN_SHARE), most(places, c->kv_heads));
    s.lists = fsa_lists_bytes(c, p, s.slab);
    const int64_t slabs = ceil_div(nq, least(room / 64 * 64, FSA_MAX_SLAB));
    s.cuts = round_up(c->kv_heads * slabs * (most(places, 1) + 1) * 2 * sizeof(uint32_t));
    s.sort = fsa_lists_workspace(c, p, s.slab);
    s.partial = round_up(rows * row);
    s.kept = forced ? KEPT / token * slots * s.group : 0; // of whole tokens
    s.stats = backward ? 0 : round_up(rows * sizeof(float2));
    s.packed = pack ? round_up(key_room) : 0;
    s.factors = pack ? round_up((size_t)c->kv_heads * fsa_max_blocks(c, p) * s.parts * sizeof(float)) : 0;
    s.dkv = backward ? round_up(key_room) : 0;
    s.crossing = backward ? round_up((size_t)shares * s.parts * s.keys * 2 * c->head_dim * sizeof(float)) : 0;
    return s;
}

int64_t fsa_sel_slab(const FsaConfig *c, const FsaPlan *p) {
    return shape_of(c, p, FSA_BF16, 0).slab;
}

size_t fsa_sel_bytes(const FsaConfig *c, const FsaPlan *p, FsaDtype type, int backward) {
    return shape_of(c, p, type, backward).bytes();
}

static SelArgs args_of(const FsaConfig *c, const FsaPlan *p, const SelShape &s, void *memory) {
    SelArgs a = {};
    a.plan = *p, a.lists = fsa_lists_place(c, p, s.slab, memory);
    a.lists.init = s.init, a.lists.local = s.local;
    a.q_heads = c->q_heads, a.kv_heads = c->kv_heads, a.group = s.group, a.block = c->block, a.topk = c->topk;
    a.parts = s.parts, a.keys = s.keys, a.shares = s.shares;
    a.scale = c->scale ? c->scale : 1 / sqrtf((float)c->head_dim);
    a.by_topk = divisor_of(a.topk), a.by_group = divisor_of(a.group);
    a.kept = (uint32_t)s.kept;
    char *at = (char *)memory + s.lists;
    auto take = [&at](size_t bytes) { return (at += bytes) - bytes; };
    a.cuts = (uint32_t *)take(s.cuts);
    a.cut_blocks = a.cuts + s.cuts / sizeof(uint32_t) / 2;
    a.partial = take(s.partial);
    a.stats = (float2 *)take(s.stats);
    a.packed = take(s.packed);
    a.factors = (float *)take(s.factors);
    a.dkv = (float *)take(s.dkv);
    a.crossing = (float *)take(s.crossing);
    return a;
}

// All index lists, and their shares.
static int prepare(const FsaConfig *c, const FsaPlan *p, const int32_t *indices, SelArgs *a,
                   cudaStream_t stream) {
    // The sort's workspace lies where partials will.
    int status = fsa_lists(c, p, indices, &a->lists, a->partial, stream);
    if (status || a->lists.slabs == 0) return status;
    cut_kernel<<<dim3((unsigned)a->lists.slabs, (unsigned)c->kv_heads), CUT_THREADS, 0, stream>>>(*a);
    a->indices = indices;
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

template <typename T, int D, int TILES>
static int forward(SelArgs a, const SelShape &s, FsaDtype dtype, cudaStream_t stream) {
    int smem = TILES * 64 * D * 2 * 2;
    if (!s.hopper && allow_smem(selected_forward_kernel<T, D, TILES>, smem)) return FSA_ERROR_CUDA;
    const bool early = s.hopper && can_wait(selected_merge_kernel<T, D>);
    for (a.head0 = 0; a.head0 < a.kv_heads; a.head0 += s.heads) {
        unsigned heads = (unsigned)(a.kv_heads - a.head0 < s.heads ? a.kv_heads - a.head0 : s.heads);
        if (s.hopper && fsa_sel_pack_sm90(a, dtype, D, heads, stream)) return FSA_ERROR_CUDA;
        for (a.slab = 0; a.slab < a.lists.slabs; a.slab++) {
            a.tokens = a.plan.nq - a.slab * s.slab < s.slab ? a.plan.nq - a.slab * s.slab : s.slab;
            dim3 grid((unsigned)a.shares, heads);
            if (s.hopper) {
                if (fsa_sel_forward_sm90(a, dtype, D, heads, stream)) return FSA_ERROR_CUDA;
            } else {
                selected_forward_kernel<T, D, TILES><<<grid, 128, smem, stream>>>(a);
            }
            dim3 merge((unsigned)ceil_div(a.tokens * a.group, 256 / (D / 8)), heads);
            launch(early, selected_merge_kernel<T, D>, merge, 256, 0, stream, a);
        }
    }
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

template <typename T, int D>
static int backward(SelArgs a, const SelShape &s, FsaDtype dtype, cudaStream_t stream) {
    int smem = 4 * 64 * D * 2 + 2 * 64 * 64 * 2;
    if (!s.hopper && allow_smem(selected_backward_kernel<T, D>, smem)) return FSA_ERROR_CUDA;
    const bool early =
        s.hopper && can_wait(backward_sums_kernel<T, D>); // and dkv_store_kernel, built with it
    for (a.head0 = 0; a.head0 < a.kv_heads; a.head0 += s.heads) {
        unsigned heads = (unsigned)(a.kv_heads - a.head0 < s.heads ? a.kv_heads - a.head0 : s.heads);
        for (a.slab = 0; a.slab < a.lists.slabs; a.slab++) {
            a.tokens = a.plan.nq - a.slab * s.slab < s.slab ? a.plan.nq - a.slab * s.slab : s.slab;
            dim3 grid((unsigned)a.shares, heads);
            if (s.hopper) {
                if (fsa_sel_backward_sm90(a, dtype, D, heads, stream)) return FSA_ERROR_CUDA;
            } else {
                selected_backward_kernel<T, D><<<grid, 128, smem, stream>>>(a);
            }
            dim3 sums((unsigned)(a.shares * 4 + ceil_div(a.tokens * a.group, 256 / (D / 8))), heads);
            launch(early, backward_sums_kernel<T, D>, sums, 256, 0, stream, a);
        }
        dim3 store((unsigned)a.lists.blocks, heads);
        launch(early, dkv_store_kernel<T, D>, store, 256, 0, stream, a);
    }
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

int fsa_sel_forward(const FsaConfig *c, const FsaPlan *p, FsaDtype type, const void *q, const void *k,
                    const void *v, const int32_t *indices, void *memory, void *o, float *lse,
                    const FsaGate *gate, cudaStream_t stream) {
    SelShape s = shape_of(c, p, type, 0);
    if (p->nq * c->q_heads > UINT32_MAX) return FSA_ERROR_ARGUMENT;
    if (p->nq == 0) return FSA_OK;
    if (s.init + s.local > 0) {
        int status = fsa_dense_forced(c, p, type, q, k, v, o, lse, stream);
        if (status) return status;
    }
    SelArgs a = args_of(c, p, s, memory);
    int status = prepare(c, p, indices, &a, stream);
    if (status) return status;
    a.q = q, a.k = k, a.v = v, a.o = o, a.lse = lse;
    if (gate) a.gate = *gate, a.per_token = c->gate_per_token;
    bool wide = c->block > 64;
#define PICK(T, D) return wide ? forward<T, D, 2>(a, s, type, stream) : forward<T, D, 1>(a, s, type, stream)
    if (type == FSA_BF16 && c->head_dim == 128) PICK(__nv_bfloat16, 128);
    if (type == FSA_BF16 && c->head_dim == 64) PICK(__nv_bfloat16, 64);
    if (type == FSA_FP16 && c->head_dim == 128) PICK(__half, 128);
    if (type == FSA_FP16 && c->head_dim == 64) PICK(__half, 64);
#undef PICK
    return FSA_ERROR_CONFIG;
}

int fsa_sel_backward(const FsaConfig *c, const FsaPlan *p, FsaDtype type, const void *q, const void *k,
                     const void *v, const int32_t *indices, int local, const void *dout, const float *delta,
                     const float *lse_grad, const FsaSums *others, void *memory, void *dq, void *dk, void *dv,
                     cudaStream_t stream) {
    SelShape s = shape_of(c, p, type, 1);
    s.local = local;
    if (p->nq * c->q_heads > UINT32_MAX) return FSA_ERROR_ARGUMENT;
    if (p->n == 0) return FSA_OK;
    SelArgs a = args_of(c, p, s, memory);
    int status = prepare(c, p, indices, &a, stream);
    if (status) return status;
    a.q = q, a.k = k, a.v = v, a.dout = dout, a.delta = delta, a.lse_grad = lse_grad;
    a.dq = dq, a.dk = dk, a.dv = dv;
    if (others) a.others = *others;
    if (type == FSA_BF16 && c->head_dim == 128) return backward<__nv_bfloat16, 128>(a, s, type, stream);
    if (type == FSA_BF16 && c->head_dim == 64) return backward<__nv_bfloat16, 64>(a, s, type, stream);
    if (type == FSA_FP16 && c->head_dim == 128) return backward<__half, 128>(a, s, type, stream);
    if (type == FSA_FP16 && c->head_dim == 64) return backward<__half, 64>(a, s, type, stream);
    return FSA_ERROR_CONFIG;
}
