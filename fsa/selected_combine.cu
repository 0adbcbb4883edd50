#include "rope.cuh"
#include "selected.cuh"

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
    __device__ __forceinline__ PartialRow(const SelectedParams &a, uint32_t index) {
        const uint32_t rows = (uint32_t)a.tokens * a.group;
        there = index < rows, index = min(index, rows - 1), piece = threadIdx.x % LANES;
        const uint32_t token = fast_divide(index, a.group_divisor), in_group = index - token * a.group;
        row = (uint32_t)a.slab * (uint32_t)a.lists.slab_rows + token;
        int64_t seq;
        query_position(a.batch, row, &seq, &pos);
        to = row * a.q_heads + (a.head0 + blockIdx.y) * a.group + in_group;
        first = (blockIdx.y * (uint32_t)a.lists.slab_rows + token) * (a.topk * a.parts * a.group) + in_group;
        from = a.partial + first * (uint64_t)row_bytes<P, D>() + Partial<P>::offset(piece);
        policy = first < a.kept ? l2_evict_last() : l2_evict_first();
    }
    // Of slots slot0 .. slot0 + 15. Whole warps call it.
    __device__ __forceinline__ void find_valid(const SelectedParams &a, int slot0) {
        const int32_t *const block_indices =
            a.block_indices + ((a.head0 + blockIdx.y) * (uint32_t)a.batch.nq + row) * (uint64_t)a.topk;
        valid = 0;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int slot = slot0 + k * LANES + piece;
            int index = -1;
            if (slot < a.topk * a.parts) index = block_indices[a.parts == 1 ? slot : slot / a.parts];
            const unsigned all = __ballot_sync(
                0xffffffffu, index >= a.lists.init_blocks && ((int64_t)index + a.lists.local_blocks) * a.block <= pos);
            valid |= (all >> (threadIdx.x % 32 / LANES * LANES) & ((1ull << LANES) - 1)) << k * LANES;
        }
    }
    // Starts to load a slot to x[i]; zeros if it isn't valid.
    __device__ __forceinline__ void load(const SelectedParams &a, int i, int slot) {
        x[i] = Partial<P>::load(from + slot * (uint64_t)(a.group * row_bytes<P, D>()), piece,
                                valid >> slot % 16 & 1, policy);
    }
    __device__ __forceinline__ void load_first(const SelectedParams &a, int slot0) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) load(a, i, slot0 + i);
    }
    // use(x, i) for each of up to 16 slots from slot0 on, of which load_first has begun to load the first.
    template <typename Use> __device__ __forceinline__ void each(const SelectedParams &a, int slot0, Use use) {
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
template <typename T, int D> __global__ void __launch_bounds__(256, 4) selected_combine_kernel(SelectedParams a) {
    typedef PartialRow<__half, D> Row;
    const int slots = a.topk * a.parts;
    if ((blockIdx.x * 8 + threadIdx.x / 32) * Row::ROWS >= a.tokens * a.group) return;
    Row r(a, (blockIdx.x * 256 + threadIdx.x) / Row::LANES);
    // All this was written before the main kernel began, which a merge never overtakes.
    const bool left_out = a.lists.init_blocks + a.lists.local_blocks > 0, gated = a.gate.o_gated;
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
    pdl_wait();
    pdl_launch_dependents();
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
    if (a.o != a.gate.o_gated) r.template store<T>(a.o, acc);
    if (gated) {
        const float gate = sigmoid((float)logit);
        const float own = __shfl_sync(0xffffffffu, gate, 1, Row::LANES);
#pragma unroll
        for (int j = 0; j < 8; j++) acc[j] *= own;
        for (int i = 1; i < 3; i++)
            add_row<T>(acc, others[i][threadIdx.x],
                       __shfl_sync(0xffffffffu, gate, i == 1 ? 0 : 2, Row::LANES));
        r.template store<T>(a.gate.o_gated, acc);
    }
    if (r.piece == 0 && r.there) a.lse[r.to] = sum > 0 ? (most + log2f(sum)) * FSA_LN2 : -INFINITY;
}

// Adds the pieces of the list that starts in share `index` of the main kernel and goes on beyond it, in
// order, to dkv: the thread block is number `quarter` of four. Most lists have one piece, block 0's, in which
// all queries are, a dozen. Reads 64 KiB a piece (d = 128), and as much again of dkv, which it writes;
// latency binds, so four pieces are under way at a time.
template <int D> static __device__ void sum_crossing(const SelectedParams &a, unsigned index, unsigned quarter) {
    const Share share = share_of(a, a.head0 + blockIdx.y, index);
    if (share.begin >= share.end) return;
    Run run = run_at(a, share, share.end - 1);
    if (run.first < share.begin || run.last <= share.end) return;
    pdl_wait();
    pdl_launch_dependents();
    const int64_t size = (int64_t)a.parts * a.keys * 2 * D / 4; // of a piece, in float4
    const float4 *pieces = (const float4 *)a.crossing + ((int64_t)blockIdx.y * a.shares + index + 1) * size;
    float4 *to = (float4 *)(a.dkv + ((int64_t)blockIdx.y * a.batch.n + run.key0) * 2 * D);
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
template <typename T, int D> static __device__ void sum_dq(const SelectedParams &a, unsigned index) {
    typedef PartialRow<T, D> Row;
    __shared__ float2 all_turns[256 / Row::LANES][D / 2];
    const int lane = threadIdx.x % 32, slots = a.topk * a.parts;
    if ((index * 8 + threadIdx.x / 32) * Row::ROWS >= a.tokens * a.group) return;
    Row r(a, (index * 256 + threadIdx.x) / Row::LANES);
    r.find_valid(a, 0);
    float2 *const turns = all_turns[threadIdx.x / Row::LANES];
    if (a.others.inv_freq)
        for (int i = r.piece; i < D / 2; i += Row::LANES) turns[i] = rope_cos_sin(r.pos, a.others.inv_freq[i]);
    pdl_wait();
    pdl_launch_dependents();
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
    if (a.others.dq_accum) {
        const int64_t sum = dq_accum_row(a.batch.nq, a.group, r.row, (int)(r.to - r.row * a.q_heads));
        const float4 *from = (const float4 *)(a.others.dq_accum + sum * D + dq_accum_chunk(sum, r.piece) * 8);
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
// T*parts rows of 1.5*D bytes a (token, head), of fp16 2*D, and 4*D of others.dq_accum, and writes one: 7.5 GB in
// and 0.5 out for the case of selected_combine_kernel, 1.8 ms.
template <typename T, int D> __global__ void __launch_bounds__(256, 4) selected_combine_bwd_kernel(SelectedParams a) {
    const unsigned crossing = a.shares * 4;
    if (blockIdx.x < crossing)
        sum_crossing<D>(a, blockIdx.x / 4, blockIdx.x % 4);
    else
        sum_dq<T, D>(a, blockIdx.x - crossing);
}

// dK and dV of a KV block, zeros where nobody chose it, join those of the other branches, dK is turned back,
// and all become the caller's type and layout: 8 bytes in and 4 out a channel and token, and 12 of the other
// branches. Without these 2.5 TB/s on an H100, where memory binds; with them it wasn't measured by itself.
template <typename T, int D> __global__ void __launch_bounds__(256) dkv_store_kernel(SelectedParams a) {
    const int64_t block = blockIdx.x;
    pdl_wait();
    if (block >= a.batch.cu_blocks[a.batch.num_seqs]) return;
    const int head = a.head0 + blockIdx.y;
    const int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, block), seq0 = a.batch.cu_seqlens[seq];
    const int64_t key0 = seq0 + (block - a.batch.cu_blocks[seq]) * a.block;
    const int keys = (int)min((int64_t)a.block, a.batch.cu_seqlens[seq + 1] - key0);
    const bool chosen = listed(a, head, block, a.lists.num_slabs);
    const float *own = a.dkv + ((int64_t)blockIdx.y * a.batch.n + key0) * 2 * D;
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
        const float *const sums = is_v ? a.others.dv_accum : a.others.dk_accum;
        if (sums) add(sums + at, 1);
        if (!is_v && a.others.inv_freq) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 turn = rope_cos_sin(key0 + token - seq0, a.others.inv_freq[channel + j]);
                const float x = lo[j], y = hi[j];
                lo[j] = x * turn.x + y * turn.y, hi[j] = y * turn.x - x * turn.y;
            }
        }
        if (!is_v && a.others.dk_unrotated) add(a.others.dk_unrotated + at, 1);
        T *const to = (T *)(is_v ? a.dv : a.dk) + at;
        *(uint2 *)to = make_uint2(pack2<T>(lo[0], lo[1]), pack2<T>(lo[2], lo[3]));
        *(uint2 *)(to + D / 2) = make_uint2(pack2<T>(hi[0], hi[1]), pack2<T>(hi[2], hi[3]));
    }
}

template <typename T, int D> static int combine(const SelectedParams &a, unsigned heads, bool early, cudaStream_t stream) {
    dim3 grid((unsigned)ceil_div(a.tokens * a.group, 256 / (D / 8)), heads);
    launch(early && supports_pdl(selected_combine_kernel<T, D>), selected_combine_kernel<T, D>, grid, 256, 0, stream, a);
    return FSA_OK;
}
template <typename T, int D> static int combine_backward(const SelectedParams &a, unsigned heads, bool early, cudaStream_t stream) {
    dim3 grid((unsigned)(a.shares * 4 + ceil_div(a.tokens * a.group, 256 / (D / 8))), heads);
    launch(early && supports_pdl(selected_combine_bwd_kernel<T, D>), selected_combine_bwd_kernel<T, D>, grid, 256, 0, stream, a);
    return FSA_OK;
}
template <typename T, int D> static int store_dkv(const SelectedParams &a, unsigned heads, bool early, cudaStream_t stream) {
    dim3 grid((unsigned)a.lists.max_blocks, heads);
    launch(early && supports_pdl(dkv_store_kernel<T, D>), dkv_store_kernel<T, D>, grid, 256, 0, stream, a);
    return FSA_OK;
}

int fsa_selected_combine(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, bool early, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, combine, a, heads, early, stream);
}
int fsa_selected_combine_backward(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, bool early, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, combine_backward, a, heads, early, stream);
}
int fsa_selected_store_dkv(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, bool early, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, store_dkv, a, heads, early, stream);
}
