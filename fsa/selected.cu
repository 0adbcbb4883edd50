// selected.cu: the selected branch, KV block outside (see selected.cuh): portable main kernels, the
// reductions, and the launchers, which on Hopper start selected_sm90.cu's main kernels instead.
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
static __global__ void __launch_bounds__(CUT_THREADS) work_ranges_kernel(SelectedParams a) {
    a.slab = blockIdx.x;
    const int head = blockIdx.y, lane = threadIdx.x % 32;
    Share all = {};
    all.offsets = a.lists.offsets + (head * a.lists.num_slabs + a.slab) * (a.lists.max_blocks + 1);
    all.end = all.offsets[a.lists.max_blocks];
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
                last = (int)a.batch.cu_blocks[find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, run.index) + 1];
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
struct SelectedSchedule {
    int group, keys, parts, heads, shares; // heads: kv heads a launch takes; shares: of a slab and head
    int init, local;                       // blocks of a row that lists leave out
    int64_t slab, kept;                    // kept: rows of partials, see SelectedParams
    size_t lists, cuts, sort, partial, stats, packed, factors, dkv, crossing; // bytes; bounds, see above
    bool hopper;
    size_t bytes() const { // lists are sorted before the rest begins
        return lists + cuts + most(sort, partial + stats + packed + factors + dkv + crossing);
    }
};

static SelectedSchedule shape_of(const FsaConfig *c, const BatchLayout *p, FsaDtype type, int backward) {
    SelectedSchedule s;
    const bool packed_dq = backward && type == FSA_BF16;
    const int row = packed_dq ? c->head_dim / 8 * Partial<__nv_bfloat16>::BYTES : c->head_dim * 2;
    s.hopper = fsa_use_sm90();
    s.group = c->q_heads / c->kv_heads;
    const int wide = c->block > 64 ? 128 : 64, back_keys = s.hopper ? wide : 64;
    s.keys = backward ? back_keys : wide;
    s.parts = (int)ceil_div(c->block, s.keys);
    const bool forced = s.hopper && !backward; // these blocks are fsa_dense_init_local_forward's
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
    int64_t places = s.hopper ? fsa_selected_ranges_per_sm_sm90(s.keys, backward) : backward ? 2 : 3;
    places *= processors;
    s.shares = (int)least(most(places / s.heads, 1), ceil_div(s.slab * c->topk, MIN_SHARE));
    const int64_t rows = least(c->kv_heads * nq, room) * c->topk * s.parts * s.group;
    const int64_t key_room = least(c->kv_heads * key_bytes, most(KEY_BUDGET, key_bytes));
    const int64_t shares = least(c->kv_heads * ceil_div(nq * c->topk, MIN_SHARE), most(places, c->kv_heads));
    s.lists = fsa_query_lists_bytes(c, p, s.slab);
    const int64_t slabs = ceil_div(nq, least(room / 64 * 64, FSA_MAX_SLAB));
    s.cuts = round_up(c->kv_heads * slabs * (most(places, 1) + 1) * 2 * sizeof(uint32_t));
    s.sort = fsa_query_lists_scratch_bytes(c, p, s.slab);
    s.partial = round_up(rows * row);
    s.kept = forced ? KEPT / token * slots * s.group : 0; // of whole tokens
    s.stats = backward ? 0 : round_up(rows * sizeof(float2));
    s.packed = pack ? round_up(key_room) : 0;
    s.factors = pack ? round_up((size_t)c->kv_heads * fsa_max_blocks(c, p) * s.parts * sizeof(float)) : 0;
    s.dkv = backward ? round_up(key_room) : 0;
    s.crossing = backward ? round_up((size_t)shares * s.parts * s.keys * 2 * c->head_dim * sizeof(float)) : 0;
    return s;
}

int64_t fsa_selected_slab(const FsaConfig *c, const BatchLayout *p) {
    return shape_of(c, p, FSA_BF16, 0).slab;
}

size_t fsa_selected_scratch_bytes(const FsaConfig *c, const BatchLayout *p, FsaDtype type, int backward) {
    return shape_of(c, p, type, backward).bytes();
}

static SelectedParams args_of(const FsaConfig *c, const BatchLayout *p, const SelectedSchedule &s, void *memory) {
    SelectedParams a = {};
    a.batch = *p, a.lists = fsa_query_lists_at(c, p, s.slab, memory);
    a.lists.init_blocks = s.init, a.lists.local_blocks = s.local;
    a.q_heads = c->q_heads, a.kv_heads = c->kv_heads, a.group = s.group, a.block = c->block, a.topk = c->topk;
    a.parts = s.parts, a.keys = s.keys, a.shares = s.shares;
    a.scale = c->scale ? c->scale : 1 / sqrtf((float)c->head_dim);
    a.topk_divisor = make_fast_divisor(a.topk), a.group_divisor = make_fast_divisor(a.group);
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
static int prepare(const FsaConfig *c, const BatchLayout *p, const int32_t *block_indices, SelectedParams *a,
                   cudaStream_t stream) {
    // The sort's workspace lies where partials will.
    int status = fsa_query_lists(c, p, block_indices, &a->lists, a->partial, stream);
    if (status || a->lists.num_slabs == 0) return status;
    work_ranges_kernel<<<dim3((unsigned)a->lists.num_slabs, (unsigned)c->kv_heads), CUT_THREADS, 0, stream>>>(*a);
    a->block_indices = block_indices;
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

static int forward(SelectedParams a, const SelectedSchedule &s, FsaDtype dtype, int head_dim, cudaStream_t stream) {
    for (a.head0 = 0; a.head0 < a.kv_heads; a.head0 += s.heads) {
        unsigned heads = (unsigned)(a.kv_heads - a.head0 < s.heads ? a.kv_heads - a.head0 : s.heads);
        if (s.hopper && fsa_pack_v_sm90(a, dtype, head_dim, heads, stream)) return FSA_ERROR_CUDA;
        for (a.slab = 0; a.slab < a.lists.num_slabs; a.slab++) {
            a.tokens = a.batch.nq - a.slab * s.slab < s.slab ? a.batch.nq - a.slab * s.slab : s.slab;
            int status = s.hopper ? fsa_selected_forward_sm90(a, dtype, head_dim, heads, stream)
                                  : fsa_selected_forward_sm80(a, dtype, head_dim, heads, stream);
            if (status) return status;
            fsa_selected_combine(a, dtype, head_dim, heads, s.hopper, stream);
        }
    }
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

static int backward(SelectedParams a, const SelectedSchedule &s, FsaDtype dtype, int head_dim, cudaStream_t stream) {
    for (a.head0 = 0; a.head0 < a.kv_heads; a.head0 += s.heads) {
        unsigned heads = (unsigned)(a.kv_heads - a.head0 < s.heads ? a.kv_heads - a.head0 : s.heads);
        for (a.slab = 0; a.slab < a.lists.num_slabs; a.slab++) {
            a.tokens = a.batch.nq - a.slab * s.slab < s.slab ? a.batch.nq - a.slab * s.slab : s.slab;
            int status = s.hopper ? fsa_selected_backward_sm90(a, dtype, head_dim, heads, stream)
                                  : fsa_selected_backward_sm80(a, dtype, head_dim, heads, stream);
            if (status) return status;
            fsa_selected_combine_backward(a, dtype, head_dim, heads, s.hopper, stream);
        }
        fsa_selected_store_dkv(a, dtype, head_dim, heads, s.hopper, stream);
    }
    return cudaGetLastError() == cudaSuccess ? FSA_OK : FSA_ERROR_CUDA;
}

int fsa_selected_branch_forward(const FsaConfig *c, const BatchLayout *p, FsaDtype type, const void *q, const void *k,
                    const void *v, const int32_t *block_indices, void *memory, void *o, float *lse,
                    const GateCombine *gate, cudaStream_t stream) {
    SelectedSchedule s = shape_of(c, p, type, 0);
    if (p->nq * c->q_heads > UINT32_MAX) return FSA_ERROR_ARGUMENT;
    if (p->nq == 0) return FSA_OK;
    if (s.init + s.local > 0) {
        int status = fsa_dense_init_local_forward(c, p, type, q, k, v, o, lse, stream);
        if (status) return status;
    }
    SelectedParams a = args_of(c, p, s, memory);
    int status = prepare(c, p, block_indices, &a, stream);
    if (status) return status;
    a.q = q, a.k = k, a.v = v, a.o = o, a.lse = lse;
    if (gate) a.gate = *gate, a.per_token = c->gate_per_token;
    return forward(a, s, type, c->head_dim, stream);
}

int fsa_selected_branch_backward(const FsaConfig *c, const BatchLayout *p, FsaDtype type, const void *q, const void *k,
                     const void *v, const int32_t *block_indices, int local, const void *dout, const float *delta,
                     const float *lse_bwd, const BranchGradients *others, void *memory, void *dq, void *dk, void *dv,
                     cudaStream_t stream) {
    SelectedSchedule s = shape_of(c, p, type, 1);
    s.local = local;
    if (p->nq * c->q_heads > UINT32_MAX) return FSA_ERROR_ARGUMENT;
    if (p->n == 0) return FSA_OK;
    SelectedParams a = args_of(c, p, s, memory);
    int status = prepare(c, p, block_indices, &a, stream);
    if (status) return status;
    a.q = q, a.k = k, a.v = v, a.dout = dout, a.delta = delta, a.lse_bwd = lse_bwd;
    a.dq = dq, a.dk = dk, a.dv = dv;
    if (others) a.others = *others;
    return backward(a, s, type, c->head_dim, stream);
}
