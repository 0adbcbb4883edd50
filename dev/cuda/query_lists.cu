// query_lists.cu: checks (exactly) and times the query lists of blocks, from block_indices.
//   version 1: one thread per (KV head, slab, block) reads all block indices and writes the block's list
//   library:   fsa/query_lists.cu: a counting sort of chunks in shared memory
// usage: query_lists [seed=N] [check]      check: no timing
#include "../../fsa/kernels.h"
#include "block_indices.h"

// Version 1. Each thread reads all block indices of its slab twice.
__global__ void query_lists_v1_kernel(BatchLayout batch, QueryLists l, const int32_t *block_indices, int topk,
                                      int block) {
    int64_t target = blockIdx.x * 128ll + threadIdx.x, kv_head = blockIdx.z, slab = blockIdx.y;
    if (target >= l.max_blocks) return;
    int64_t first_query = slab * l.slab_queries, end_query = min(first_query + l.slab_queries, batch.nq);
    uint32_t before = 0, count = 0, *entries = l.entries + (kv_head * batch.nq + first_query) * topk;
    for (int pass = 0; pass < 2; pass++) { // pass 0 finds the offset of the list, pass 1 writes the list
        for (int64_t query = first_query; query < end_query; query++) {
            int64_t seq, pos;
            query_position(batch, query, &seq, &pos);
            for (int t = 0; t < topk; t++) {
                int32_t index = block_indices[(kv_head * batch.nq + query) * topk + t];
                if (index < l.init_blocks || ((int64_t)index + l.local_blocks) * block > pos) continue;
                int64_t b = batch.cu_blocks[seq] + index;
                if (pass == 0)
                    before += b < target;
                else if (b == target)
                    entries[before + count++] = (uint32_t)(query * topk + t);
            }
        }
    }
    uint32_t *offsets = l.offsets + (kv_head * l.num_slabs + slab) * (l.max_blocks + 1);
    offsets[target] = before;
    if (target == l.max_blocks - 1) offsets[target + 1] = before + count;
}

static void run_v1(const FsaConfig &c, const BatchLayout &batch, const int32_t *block_indices,
                   const QueryLists &l) {
    if (batch.nq == 0) return;
    dim3 grid((unsigned)((l.max_blocks + 127) / 128), (unsigned)l.num_slabs, c.kv_heads);
    query_lists_v1_kernel<<<grid, 128>>>(batch, l, block_indices, c.topk, c.block);
    CUDA_CHECK(cudaGetLastError());
}

// Makes block indices that fsa_topk never writes but fsa_query_lists accepts: the blocks of a query in any
// order, and slots that hold a negative index or a block far beyond the query's position.
static void corrupt(Random *r, const FsaConfig &c, int64_t nq, std::vector<int32_t> *block_indices) {
    for (int64_t query = 0; query < c.kv_heads * nq; query++) {
        int32_t *x = block_indices->data() + query * c.topk;
        for (int t = c.topk - 1; t > 0; t--) std::swap(x[t], x[r->below(t + 1)]);
        for (int t = 0; t < c.topk; t++) {
            int64_t kind = r->below(40);
            if (kind == 0) x[t] = -1 - (int32_t)r->below(INT32_MAX);
            if (kind == 1) x[t] = INT32_MAX - (int32_t)r->below(INT32_MAX / 2);
        }
    }
}

static void check(Random *r, int version, const FsaConfig &c, const std::vector<int64_t> &lengths,
                  int64_t slab, const std::vector<FsaSegment> &segments = {}) {
    Batch b(c, lengths, segments);
    int64_t nq = b.batch.nq;
    std::vector<int32_t> block_indices = random_block_indices(r, c, b.ref);
    if (r->below(2)) corrupt(r, c, nq, &block_indices);
    Buffer<int32_t> block_indices_dev(block_indices);
    Buffer<char> memory((int64_t)fsa_query_lists_bytes(&c, &b.batch, slab)),
        workspace((int64_t)fsa_query_lists_scratch_bytes(&c, &b.batch, slab));
    QueryLists l = fsa_query_lists_at(&c, &b.batch, slab, memory.get());
    if (r->below(2)) l.init_blocks = (int)r->below(4), l.local_blocks = (int)r->below(5);
    if (version == 1)
        run_v1(c, b.batch, block_indices_dev, l);
    else
        FSA_CHECK(fsa_query_lists(&c, &b.batch, block_indices_dev, &l, workspace, 0));
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<uint32_t> entries((size_t)(c.kv_heads * nq * c.topk)),
        offsets((size_t)(c.kv_heads * l.num_slabs * (l.max_blocks + 1)));
    CUDA_CHECK(cudaMemcpy(entries.data(), l.entries, entries.size() * 4, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(offsets.data(), l.offsets, offsets.size() * 4, cudaMemcpyDeviceToHost));
    std::vector<int64_t> block0(1, 0);
    for (int64_t length : lengths) block0.push_back(block0.back() + (length + c.block - 1) / c.block);
    bool same = memory.guards_intact() && workspace.guards_intact();
    for (int h = 0; h < c.kv_heads; h++) {
        std::vector<std::vector<std::vector<uint32_t>>> expected(
            (size_t)l.num_slabs, std::vector<std::vector<uint32_t>>((size_t)l.max_blocks));
        int64_t query = 0;
        for (const FsaSegment &segment : b.segments) {
            for (int64_t i = 0; i < segment.len; i++, query++) {
                for (int t = 0; t < c.topk; t++) {
                    int64_t index = block_indices[(size_t)((h * nq + query) * c.topk + t)];
                    if (index >= l.init_blocks && (index + l.local_blocks) * c.block <= segment.pos + i)
                        expected[(size_t)(query / slab)][(size_t)(block0[(size_t)segment.seq] + index)]
                            .push_back((uint32_t)(query * c.topk + t));
                }
            }
        }
        for (int64_t s = 0; s < l.num_slabs; s++) {
            uint32_t position = 0;
            const uint32_t *o = &offsets[(size_t)((h * l.num_slabs + s) * (l.max_blocks + 1))];
            for (int64_t k = 0; k < l.max_blocks; k++) {
                same = same && o[k] == position;
                for (uint32_t e : expected[(size_t)s][(size_t)k])
                    same = same && entries[(size_t)((h * nq + s * slab) * c.topk + position++)] == e;
            }
            same = same && o[l.max_blocks] == position;
        }
    }
    char what[160];
    snprintf(what, sizeof what,
             "query_lists version %d, nq %lld, %d heads, block %d, topk %d, slab %lld, without %d initial + "
             "%d local blocks",
             version, (long long)nq, c.kv_heads, c.block, c.topk, (long long)slab, l.init_blocks,
             l.local_blocks);
    check_that(same, what, 1, 0);
}

// Random sequences, some of them empty, with any number of segments each.
static void check_random(Random *r, int version) {
    const int topks[] = {1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 37, 40, 64, 96, 300};
    FsaConfig c = default_config(1, 1, 64, 16 << r->below(4), topks[r->below(16)]);
    c.q_heads = c.kv_heads = 1 + (int)r->below(3);
    if (c.topk < 3) c.init_blocks = c.local_blocks = 0;
    std::vector<int64_t> lengths;
    std::vector<FsaSegment> segments;
    for (int64_t count = 1 + r->below(6), s = 0; s < count; s++) {
        lengths.push_back(r->below(4) ? r->below(r->below(3) ? 700 : 30000) : 0);
        for (int64_t left = 40000 / c.topk, pos = 0; pos < lengths.back() && r->below(4);) {
            int64_t skip = r->below(lengths.back() - pos), len = r->below(lengths.back() - pos - skip + 1);
            len = std::min(len, left / 2);
            segments.push_back(FsaSegment{s, pos + skip, len});
            pos += skip + len, left -= len;
        }
    }
    if (segments.empty()) segments.push_back(FsaSegment{0, 0, 0});
    check(r, version, c, lengths, 1 + r->below(r->below(2) ? 100 : 5000), segments);
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    for (int version = 1; version <= 2; version++) {
        check(&r, version, default_config(4, 2, 64, 16, 8), {507}, 128);
        check(&r, version, default_config(4, 4, 64, 64, 16), {1, 31, 2300, 0, 64, 65}, 512);
        check(&r, version, default_config(6, 1, 64, 16, 5), {9000, 1, 3}, 4096);
        check(&r, version, default_config(1, 1, 64, 128, 3), {1}, 1);
        // More blocks than one pass sorts or counts; segments that begin late in the sequence.
        check(&r, version, default_config(2, 2, 64, 16, 16), {140000}, 200, {{0, 500, 40}, {0, 139000, 333}});
        for (int i = 0; i < 20; i++) check_random(&r, version);
    }
    // Splits of several chunks.
    check(&r, 2, default_config(1, 1, 64, 64, 20), {66000}, 65536);
    const int64_t shapes[][2] = {{8192, 8}, {32768, 8}, {65536, 8}, {65536, 32}};
    for (auto [n, kv_heads] : shapes) {
        if (has_flag(argc, argv, "check")) break;
        FsaConfig c = default_config(32, (int)kv_heads, 128, 64, 16);
        Batch b(c, {n});
        Buffer<int32_t> block_indices_dev(c.kv_heads * n * c.topk);
        random_block_indices_device(block_indices_dev, n, c, r.u64());
        int64_t slab = fsa_selected_slab_queries(&c, &b.batch);
        Buffer<char> memory((int64_t)fsa_query_lists_bytes(&c, &b.batch, slab)),
            workspace((int64_t)fsa_query_lists_scratch_bytes(&c, &b.batch, slab));
        QueryLists l = fsa_query_lists_at(&c, &b.batch, slab, memory.get());
        double bytes = 8.0 * c.kv_heads * n * c.topk;
        for (int version = 1; version <= 2; version++) {
            if (version == 1 && n > 8192) continue; // quadratic
            double ms = time_ms([&] {
                if (version == 1)
                    run_v1(c, b.batch, block_indices_dev, l);
                else
                    FSA_CHECK(fsa_query_lists(&c, &b.batch, block_indices_dev, &l, workspace, 0));
            });
            printf("query_lists %s n %lld, %d kv heads: %.4f ms, %.2f TB/s, lower bound %.4f ms\n",
                   version == 1 ? "1" : "library", (long long)n, c.kv_heads, ms, bytes / ms * 1e-9,
                   bytes / 4.5e9);
            record({"lists", "lists", "nsa", "fwd", "bf16", n, c, ms, 0, 0, "random",
                    version == 1 ? "1" : "library", 1});
        }
    }
    printf("query_lists: %d passed, %d failed\n", checks_passed, checks_failed);
    return checks_failed != 0;
}
