// selected_combine.cu: the reductions of the selected branch. The forward combine kernel computes o, lse and
// the gated sum from partial rows. The backward combine kernel computes dq from partial rows and adds
// dkv_partial to dkv_accum. A last kernel converts dkv_accum to dk and dv.
//
// Forward, for a row with o_partial rows x_i and lse_partial (lse_i, scale_i), lse_i in base 2. o_i is the
// output normalized within its key tile:
//     o_i = scale_i x_i
//     o = sum_i 2^(lse_i - max) o_i / sum_i 2^(lse_i - max),   lse = max + log2 sum_i 2^(lse_i - max)
// Backward: dq = inverse RoPE(sum_i dq_i + the other branches' dq).
//
// D/8 lanes process a row, eight channels each; a warp has 256/D rows. A row's partials are read 16 at a time
// with 8 loads in flight per lane. They are summed in the order of slots and key tiles, so the results are
// bitwise reproducible.
//
// Bytes of a row, forward:   T * (2D + 8) of partial rows and 6D of branch outputs in, 2D or 4D out
//                backward:   T * 1.5D (fp16: T * 2D) of partial rows and 4D of dq_accum in, 2D out
// Lower bounds for 64K tokens, (32, 8) heads, d = 128, (B, T) = (64, 16). Both kernels are memory-bound.
//     forward    8.8 GB in, 1.1 GB out   2.2 ms   with 3 of 16 blocks left out of the lists, and with the
//                                                 gate: its branches are 1.6 GB of these 9.9 GB
//     backward   7.5 GB in, 0.5 GB out   1.8 ms   with all 16 blocks in the lists; fsa_backward leaves out
//                                                 the 2 local ones
#include "rope.cuh"
#include "selected.cuh"

// Reads the partial rows of one row with D/8 lanes, a chunk per lane. The partial index of a partial row
// within its row is slot * key_tiles + key tile; the code below calls it `slot`. Rows and partial
// rows have 32-bit indices.
template <typename P, int D> struct PartialRowReader {
    static constexpr int LANES = D / 8, ROWS = 32 / LANES; // lanes per row, rows per warp
    static constexpr int SLOTS_PER_LANE = 16 / LANES, IN_FLIGHT = 8;
    bool in_slab;         // false for lanes past the slab's last row: they repeat this row and store nothing
    int chunk;            // this lane's chunk of eight channels
    uint32_t query;       // index in the batch's queries
    uint32_t row;         // query * q_heads + head
    uint32_t partial_row; // of partial index 0
    int64_t pos;          // position of the query in its sequence
    const char *partial;  // this lane's chunk of partial index 0
    unsigned valid;       // bit i: partial index i of the current 16 is in the query lists
    uint64_t policy;      // L2 eviction policy of the partial rows
    PartialChunk<P> x[IN_FLIGHT];
    __device__ __forceinline__ PartialRowReader(const SelectedParams &a, uint32_t index) {
        const uint32_t rows = (uint32_t)a.num_queries * a.group;
        in_slab = index < rows, index = min(index, rows - 1), chunk = threadIdx.x % LANES;
        const uint32_t slab_query = fast_divide(index, a.group_divisor),
                       in_group = index - slab_query * a.group;
        query = (uint32_t)a.slab_index * (uint32_t)a.lists.slab_queries + slab_query;
        int64_t seq;
        query_position(a.batch, query, &seq, &pos);
        row = query * a.q_heads + (a.kv_head0 + blockIdx.y) * a.group + in_group;
        partial_row =
            (blockIdx.y * (uint32_t)a.lists.slab_queries + slab_query) * (a.topk * a.key_tiles * a.group) +
            in_group;
        partial =
            a.partial + partial_row * (uint64_t)partial_row_bytes<P, D>() + PartialChunk<P>::offset(chunk);
        policy = partial_row < a.l2_rows ? l2_evict_last() : l2_evict_first();
    }
    // Sets `valid` for the partial indices slot0 .. slot0 + 15. All lanes of a warp must call it.
    __device__ __forceinline__ void find_valid_slots(const SelectedParams &a, int slot0) {
        const int32_t *const block_indices =
            a.block_indices + ((a.kv_head0 + blockIdx.y) * (uint32_t)a.batch.nq + query) * (uint64_t)a.topk;
        valid = 0;
#pragma unroll
        for (int k = 0; k < SLOTS_PER_LANE; k++) {
            const int slot = slot0 + k * LANES + chunk;
            int index = -1;
            if (slot < a.topk * a.key_tiles)
                index = block_indices[a.key_tiles == 1 ? slot : slot / a.key_tiles];
            const unsigned warp_valid =
                __ballot_sync(0xffffffffu, index >= a.lists.init_blocks &&
                                               ((int64_t)index + a.lists.local_blocks) * a.block <= pos);
            valid |= (warp_valid >> (threadIdx.x % 32 / LANES * LANES) & ((1ull << LANES) - 1)) << k * LANES;
        }
    }
    // Starts the load of partial index `slot` into x[i]: zeros if it is not valid.
    __device__ __forceinline__ void load(const SelectedParams &a, int i, int slot) {
        x[i] = PartialChunk<P>::load(partial + slot * (uint64_t)(a.group * partial_row_bytes<P, D>()), chunk,
                                     valid >> slot % 16 & 1, policy);
    }
    __device__ __forceinline__ void start_loads(const SelectedParams &a, int slot0) {
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) load(a, i, slot0 + i);
    }
    // Calls use(chunk, i) for partial indices slot0 + i, i < 16. start_loads(slot0) has started the first
    // loads.
    template <typename Use>
    __device__ __forceinline__ void for_each_slot(const SelectedParams &a, int slot0, Use use) {
        const bool more = slot0 + IN_FLIGHT < a.topk * a.key_tiles;
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            use(x[i], i);
            load(a, i, slot0 + IN_FLIGHT + i);
        }
        if (more) {
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) use(x[i], IN_FLIGHT + i);
        }
    }
    // Returns the address of this lane's chunk of the row in x [Nq, Hq, D].
    template <typename T> __device__ __forceinline__ uint4 *chunk_of(Rows x, int q_heads) const {
        return (uint4 *)((T *)x.data + query * x.stride) + (row - query * q_heads) * LANES + chunk;
    }
    template <typename T>
    __device__ __forceinline__ void store(Rows out, int q_heads, const float (&sum)[8]) const {
        if (in_slab)
            *chunk_of<T>(out, q_heads) = make_uint4(pack2<T>(sum[0], sum[1]), pack2<T>(sum[2], sum[3]),
                                                    pack2<T>(sum[4], sum[5]), pack2<T>(sum[6], sum[7]));
    }
};

// Loads lse_partial of the row's partial indices slot0 + k * LANES + chunk; (-inf, 0) for those that are not
// valid.
template <typename Reader>
static __device__ __forceinline__ void load_lse_partial(const SelectedParams &a, const Reader &r, int slot0,
                                                        float2 (&lse_partial)[Reader::SLOTS_PER_LANE]) {
#pragma unroll
    for (int k = 0; k < Reader::SLOTS_PER_LANE; k++) {
        const int slot = k * Reader::LANES + r.chunk;
        lse_partial[k] = r.valid >> slot & 1 ? a.lse_partial[r.partial_row + (slot0 + slot) * a.group]
                                             : make_float2(-INFINITY, 0);
    }
}

// Forward: combines the o_partial rows of one row with the output of the initial and local blocks, which o
// and lse already hold (selected.cuh), and with the other branches if there is a gate.
template <typename T, int D>
__global__ void __launch_bounds__(256, 4) selected_combine_kernel(SelectedParams a) {
    typedef PartialRowReader<__half, D> Reader;
    const int slots = a.topk * a.key_tiles;
    if ((blockIdx.x * 8 + threadIdx.x / 32) * Reader::ROWS >= a.num_queries * a.group) return;
    Reader r(a, (blockIdx.x * 256 + threadIdx.x) / Reader::LANES);

    // Before pdl_wait, load the arrays that the main kernel does not write. The kernels that wrote these
    // arrays ended before the main kernel let this kernel start. Each lane later reads only the chunk that
    // it copied.
    const bool has_init_local = a.lists.init_blocks + a.lists.local_blocks > 0, gated = a.gate.o_gated.data;
    __shared__ uint4 branch_rows[3][256]; // o of initial and local blocks, o_cmp, o_win
    auto copy_chunk = [&](int i, const uint4 *chunk) {
        cp_async_16(smem_address(&branch_rows[i][threadIdx.x]), chunk);
    };
    if (has_init_local) copy_chunk(0, r.template chunk_of<T>(a.o, a.q_heads));
    if (gated) {
        const uint64_t index = r.row * (uint64_t)Reader::LANES + r.chunk;
        copy_chunk(1, (const uint4 *)a.gate.o_cmp + index);
        copy_chunk(2, (const uint4 *)a.gate.o_win + index);
    }
    cp_async_commit();
    float init_local_lse = has_init_local ? a.lse[r.row] : -INFINITY;
    T logit = (T)0.f; // lane `chunk` < 3 holds the logit of branch `chunk`
    if (gated && r.chunk < 3)
        logit = ((const T *)a.gate.logits.data)[r.query * a.gate.logits.stride + r.chunk +
                                                (a.gate_per_token ? 0 : (r.row - r.query * a.q_heads) * 3)];
    r.find_valid_slots(a, 0);
    pdl_wait();
    pdl_launch_dependents();

    // The maximum lse over all partial indices.
    r.start_loads(a, 0);
    float2 lse_partial[Reader::SLOTS_PER_LANE]; // of partial indices k * LANES + chunk
    float max_lse = -INFINITY, sum = 0;
    if (slots > 16) {
        for (int slot0 = 16; slot0 < slots; slot0 += 16) {
            r.find_valid_slots(a, slot0);
            load_lse_partial(a, r, slot0, lse_partial);
#pragma unroll
            for (int k = 0; k < Reader::SLOTS_PER_LANE; k++) max_lse = fmaxf(max_lse, lse_partial[k].x);
        }
        r.find_valid_slots(a, 0);
    }
    load_lse_partial(a, r, 0, lse_partial);
#pragma unroll
    for (int k = 0; k < Reader::SLOTS_PER_LANE; k++) max_lse = fmaxf(max_lse, lse_partial[k].x);
    init_local_lse *= FSA_LOG2E;
    max_lse = fmaxf(max_lse, init_local_lse);
    for (int i = Reader::LANES / 2; i > 0; i /= 2)
        max_lse = fmaxf(max_lse, __shfl_xor_sync(0xffffffffu, max_lse, i));

    // The weighted sum, 16 partial indices at a time.
    float acc[8] = {};
    for (int slot0 = 0;;) {
        float weight[Reader::SLOTS_PER_LANE];
#pragma unroll
        for (int k = 0; k < Reader::SLOTS_PER_LANE; k++) {
            weight[k] = lse_partial[k].x == -INFINITY ? 0 : exp2_fast(lse_partial[k].x - max_lse);
            sum += weight[k];
            weight[k] *= lse_partial[k].y;
        }
        r.for_each_slot(a, slot0, [&](const PartialChunk<__half> &x, int i) {
            x.add_to(acc,
                     __shfl_sync(0xffffffffu, weight[i / Reader::LANES], i % Reader::LANES, Reader::LANES));
        });
        if ((slot0 += 16) >= slots) break;
        r.find_valid_slots(a, slot0);
        r.start_loads(a, slot0);
        load_lse_partial(a, r, slot0, lse_partial);
    }
    for (int i = Reader::LANES / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    cp_async_wait<0>();
    if (init_local_lse != -INFINITY) {
        const float weight = exp2_fast(init_local_lse - max_lse);
        sum += weight;
        add_row<T>(acc, branch_rows[0][threadIdx.x], weight);
    }
    const float inverse = sum != 0 ? 1 / sum : 0;
#pragma unroll
    for (int j = 0; j < 8; j++) acc[j] *= inverse;
    if (a.o.data != a.gate.o_gated.data) r.template store<T>(a.o, a.q_heads, acc);

    // The gated sum of the three branches.
    if (gated) {
        const float gate = sigmoid((float)logit);
        const float selected_gate = __shfl_sync(0xffffffffu, gate, 1, Reader::LANES);
#pragma unroll
        for (int j = 0; j < 8; j++) acc[j] *= selected_gate;
        for (int i = 1; i < 3; i++)
            add_row<T>(acc, branch_rows[i][threadIdx.x],
                       __shfl_sync(0xffffffffu, gate, i == 1 ? 0 : 2, Reader::LANES));
        r.template store<T>(a.gate.o_gated, a.q_heads, acc);
    }
    if (r.chunk == 0 && r.in_slab) a.lse[r.row] = sum != 0 ? (max_lse + log2f(sum)) * FSA_LN2 : -INFINITY;
}

// Backward: if a query list begins in work range `index` and continues beyond it, adds the dkv_partial of
// the following ranges to dkv_accum, in their order. Four thread blocks, `quarter` 0 to 3, divide the
// elements. Most of these lists continue into one more range. The list of an initial block continues into a
// dozen, since every query selects the block. A partial is 64 KiB at d = 128, B = 64. The sum is limited by
// latency, so four loads are in flight.
template <int D>
static __device__ void combine_dkv_partial(const SelectedParams &a, unsigned index, unsigned quarter) {
    const WorkRange range = work_range_of(a, a.kv_head0 + blockIdx.y, index);
    if (range.begin >= range.end) return;
    KvBlockEntries kv_block = find_kv_block(a, range, range.end - 1);
    if (kv_block.list_begin < range.begin || kv_block.list_end <= range.end) return;
    pdl_wait();
    pdl_launch_dependents();
    const int64_t size = (int64_t)a.key_tiles * a.tile_keys * 2 * D / 4; // of a partial, in float4
    const float4 *dkv_partial =
        (const float4 *)a.dkv_partial + ((int64_t)blockIdx.y * a.num_ranges + index + 1) * size;
    float4 *dkv_accum = (float4 *)(a.dkv_accum + ((int64_t)blockIdx.y * a.batch.n + kv_block.key0) * 2 * D);
    const uint32_t *const range_offsets =
        a.range_offsets + range_offset_index(a, a.kv_head0 + blockIdx.y) + index + 1;
    int count = 1; // partials
    while (index + 1 + count < a.num_ranges && range_offsets[count] < kv_block.list_end) count++;
    for (int i = quarter * 256 + threadIdx.x; i < kv_block.num_keys * 2 * D / 4; i += 4 * 256) {
        float4 sum = dkv_accum[i];
        for (int first = 0; first < count; first += 4) {
            float4 x[4];
#pragma unroll
            for (int k = 0; k < 4; k++) // an empty range has no partial
                x[k] = first + k < count && range_offsets[first + k] < range_offsets[first + k + 1]
                           ? dkv_partial[(first + k) * size + i]
                           : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int k = 0; k < 4; k++) sum.x += x[k].x, sum.y += x[k].y, sum.z += x[k].z, sum.w += x[k].w;
        }
        dkv_accum[i] = sum;
    }
}

// Backward: adds the dq_partial rows of one row and the other branches' dq_accum, applies the inverse RoPE,
// and stores dq. index: the index of this thread block among the thread blocks that combine dq.
template <typename T, int D>
static __device__ void combine_dq_partial(const SelectedParams &a, unsigned index) {
    typedef PartialRowReader<T, D> Reader;
    __shared__ float2 block_cos_sin[256 / Reader::LANES][D / 2];
    const int lane = threadIdx.x % 32, slots = a.topk * a.key_tiles;
    if ((index * 8 + threadIdx.x / 32) * Reader::ROWS >= a.num_queries * a.group) return;
    Reader r(a, (index * 256 + threadIdx.x) / Reader::LANES);
    r.find_valid_slots(a, 0);
    float2 *const cos_sin = block_cos_sin[threadIdx.x / Reader::LANES];
    if (a.branch_grads.inv_freq)
        for (int i = r.chunk; i < D / 2; i += Reader::LANES)
            cos_sin[i] = rope_cos_sin(r.pos, a.branch_grads.inv_freq[i]);
    pdl_wait();
    pdl_launch_dependents();
    float acc[8] = {};
    for (int slot0 = 0; slot0 < slots; slot0 += 16) {
        if (slot0 > 0) r.find_valid_slots(a, slot0);
        r.start_loads(a, slot0);
        r.for_each_slot(a, slot0, [&](const PartialChunk<T> &x, int) { x.add_to(acc, 1); });
    }
    // Put the channels in order. Lane 4*slice + c holds the channel pairs c, 4+c, 8+c, 12+c of its slice
    // (partial.cuh) and needs the pairs 4c .. 4c+3: a 4 x 4 transpose between the lanes of a quad. Lanes
    // without bit `with` keep pair `keep` and exchange pair `send` for the partner's pair `keep`. Lanes with
    // the bit do the reverse.
    auto exchange = [&](int keep, int send, int with) {
        const bool odd = lane & with;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float &x = acc[2 * keep + i], &y = acc[2 * send + i];
            const float received = __shfl_xor_sync(0xffffffffu, odd ? x : y, with);
            (odd ? x : y) = received;
        }
    };
    exchange(0, 1, 1), exchange(2, 3, 1);
    exchange(0, 2, 2), exchange(1, 3, 2);
    if (a.branch_grads.dq_accum) {
        const int64_t accum_row =
            dq_accum_row(a.batch.nq, a.group, r.query, (int)(r.row - r.query * a.q_heads));
        const float4 *dq_accum = (const float4 *)(a.branch_grads.dq_accum + accum_row * D +
                                                  dq_accum_chunk(accum_row, r.chunk) * 8);
        const float4 x = dq_accum[0], y = dq_accum[1];
        acc[0] += x.x, acc[1] += x.y, acc[2] += x.z, acc[3] += x.w;
        acc[4] += y.x, acc[5] += y.y, acc[6] += y.z, acc[7] += y.w;
    }
    if (a.branch_grads.inv_freq) { // RoPE pairs channel i of the lower half with channel i of the upper half
        const bool upper = r.chunk >= Reader::LANES / 2;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 cs = cos_sin[r.chunk % (Reader::LANES / 2) * 8 + j];
            const float other = __shfl_xor_sync(0xffffffffu, acc[j], Reader::LANES / 2);
            acc[j] = acc[j] * cs.x + (upper ? -other : other) * cs.y;
        }
    }
    r.template store<T>(a.dq, a.q_heads, acc);
}

// Backward: the reductions after the main kernel of a slab. The thread blocks for dkv_partial have the lowest
// indices and start first, so the traffic of the thread blocks for dq hides their latency.
template <typename T, int D>
__global__ void __launch_bounds__(256, 4) selected_combine_bwd_kernel(SelectedParams a) {
    const unsigned dkv_blocks = a.num_ranges * 4;
    if (blockIdx.x < dkv_blocks)
        combine_dkv_partial<D>(a, blockIdx.x / 4, blockIdx.x % 4);
    else
        combine_dq_partial<T, D>(a, blockIdx.x - dkv_blocks);
}

// Backward, after the last slab: dk and dv [N, Hkv, D] in 16 bits. A thread block processes one KV block of
// one head:
//     dk = inverse RoPE(scale * dkv_accum + dk_accum) + dk_unrotated,   dv = dkv_accum + dv_accum
// A block that no query attends to has no values in dkv_accum. The kernel reads 8 bytes per channel and
// token, and 12 of the other branches, and writes 4. It is memory-bound.
template <typename T, int D>
__global__ void __launch_bounds__(256) selected_store_dkv_kernel(SelectedParams a) {
    const int64_t block = blockIdx.x;
    pdl_wait();
    if (block >= a.batch.cu_blocks[a.batch.num_seqs]) return;
    const int kv_head = a.kv_head0 + blockIdx.y;
    const int64_t seq = find_in_cu(a.batch.cu_blocks, a.batch.num_seqs, block),
                  seq0 = a.batch.cu_seqlens[seq];
    const int64_t key0 = seq0 + (block - a.batch.cu_blocks[seq]) * a.block;
    const int num_keys = (int)min((int64_t)a.block, a.batch.cu_seqlens[seq + 1] - key0);
    const bool selected = has_queries(a, kv_head, block, a.lists.num_slabs);
    const float *dkv_accum = a.dkv_accum + ((int64_t)blockIdx.y * a.batch.n + key0) * 2 * D;
    // A thread stores four channels of dK or dV of a token, and the four channels that RoPE pairs with them.
    for (int i = threadIdx.x; i < num_keys * 2 * D / 8; i += 256) {
        const int token = i / (2 * D / 8), is_v = i / (D / 8) % 2, channel = i % (D / 8) * 4;
        const int64_t offset = ((key0 + token) * a.kv_heads + kv_head) * D + channel;
        float lo[4] = {}, hi[4] = {};
        auto add = [&](const float *row, float scale) {
            const float4 x = *(const float4 *)row, y = *(const float4 *)(row + D / 2);
            lo[0] += x.x * scale, lo[1] += x.y * scale, lo[2] += x.z * scale, lo[3] += x.w * scale;
            hi[0] += y.x * scale, hi[1] += y.y * scale, hi[2] += y.z * scale, hi[3] += y.w * scale;
        };
        if (selected) add(dkv_accum + (token * 2 + is_v) * D + channel, is_v ? 1 : a.scale);
        const float *const branch_accum = is_v ? a.branch_grads.dv_accum : a.branch_grads.dk_accum;
        if (branch_accum) add(branch_accum + offset, 1);
        if (!is_v && a.branch_grads.inv_freq) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 cs = rope_cos_sin(key0 + token - seq0, a.branch_grads.inv_freq[channel + j]);
                const float x = lo[j], y = hi[j];
                lo[j] = x * cs.x + y * cs.y, hi[j] = y * cs.x - x * cs.y;
            }
        }
        if (!is_v && a.branch_grads.dk_unrotated) add(a.branch_grads.dk_unrotated + offset, 1);
        const Rows &out_rows = is_v ? a.dv : a.dk;
        T *const out = (T *)out_rows.data + (key0 + token) * out_rows.stride + kv_head * D + channel;
        *(uint2 *)out = make_uint2(pack2<T>(lo[0], lo[1]), pack2<T>(lo[2], lo[3]));
        *(uint2 *)(out + D / 2) = make_uint2(pack2<T>(hi[0], hi[1]), pack2<T>(hi[2], hi[3]));
    }
}

template <typename T, int D>
static int selected_combine(const SelectedParams &a, unsigned heads, bool use_pdl, cudaStream_t stream) {
    dim3 grid((unsigned)ceil_div(a.num_queries * a.group, 256 / (D / 8)), heads);
    return LAUNCH_PDL(use_pdl, (selected_combine_kernel<T, D>), grid, 256, 0, stream, a);
}
template <typename T, int D>
static int selected_combine_backward(const SelectedParams &a, unsigned heads, bool use_pdl,
                                     cudaStream_t stream) {
    dim3 grid((unsigned)(a.num_ranges * 4 + ceil_div(a.num_queries * a.group, 256 / (D / 8))), heads);
    return LAUNCH_PDL(use_pdl, (selected_combine_bwd_kernel<T, D>), grid, 256, 0, stream, a);
}
template <typename T, int D>
static int selected_store_dkv(const SelectedParams &a, unsigned heads, bool use_pdl, cudaStream_t stream) {
    dim3 grid((unsigned)a.lists.max_blocks, heads);
    return LAUNCH_PDL(use_pdl, (selected_store_dkv_kernel<T, D>), grid, 256, 0, stream, a);
}

template <typename T, int D> static int combine_supports_pdl(bool *pdl) {
    return SUPPORTS_PDL((selected_combine_kernel<T, D>), pdl);
}

int fsa_selected_combine_supports_pdl(FsaDtype dtype, int head_dim, bool *pdl) {
    return FSA_DISPATCH(dtype, head_dim, combine_supports_pdl, pdl);
}
int fsa_selected_combine(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads, bool use_pdl,
                         cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, selected_combine, a, heads, use_pdl, stream);
}
int fsa_selected_combine_backward(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                                  bool use_pdl, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, selected_combine_backward, a, heads, use_pdl, stream);
}
int fsa_selected_store_dkv(const SelectedParams &a, FsaDtype dtype, int head_dim, unsigned heads,
                           bool use_pdl, cudaStream_t stream) {
    return FSA_DISPATCH(dtype, head_dim, selected_store_dkv, a, heads, use_pdl, stream);
}
