// topk.cu: checks and times block selection.
//   version 1: one thread block per (query, KV head): scores of all blocks to global memory, then T searches
//   portable:  fsa/sm80/topk.cu: mma.sync, scores stay on chip, a running top-k list per query
//   library:   fsa_topk; on Hopper fsa/sm90/topk.cu (wgmma; MMA, exp and lists overlap) if it supports the
//              configuration
// The selected blocks of a query are correct if their indices ascend, are causal and complete, and include
// the initial and local blocks, and if no other block scores more than (1 + 1e-3) times the lowest freely
// selected one.
// usage: topk [seed=N] [check [small] | time]      default: check and time
#include "../../fsa/sm80/topk.cu"
#include "shapes.h"

// Version 1. scores [Hkv, Nq, max_blocks], max_blocks = N/B + 1.
template <typename T, int D>
__global__ void __launch_bounds__(128)
    naive_topk_kernel(const TopKParams p, float *scores, int64_t max_blocks) {
    int64_t query = blockIdx.x / p.kv_heads, seq, pos;
    int kv_head = blockIdx.x % p.kv_heads, group = p.q_heads / p.kv_heads;
    query_position(p.batch, query, &seq, &pos);
    int blocks = (int)(pos / p.block) + 1;
    int32_t *out = p.block_indices + ((int64_t)kv_head * p.batch.nq + query) * p.topk;
    float *query_scores = scores + (kv_head * p.batch.nq + query) * max_blocks;
    for (int j = threadIdx.x; j < blocks; j += 128) {
        int first = j * p.block - p.cmp_len + p.cmp_stride, last = (j + 1) * p.block - p.cmp_stride;
        float s = 0;
        for (int start = max(first, 0); start <= last && start + p.cmp_len - 1 <= pos;
             start += p.cmp_stride) {
            int64_t key = ((p.batch.cu_windows[seq] + start / p.cmp_stride) * p.kv_heads + kv_head) * D;
            int overlap =
                (min(start + p.cmp_len, (j + 1) * p.block) - max(start, j * p.block)) / p.cmp_stride;
            for (int h = 0; h < group; h++) {
                int64_t head = query * p.q_heads + kv_head * group + h;
                float dot = 0;
                for (int i = 0; i < D; i++)
                    dot +=
                        to_f32(((const T *)p.q.data)[head * D + i]) * to_f32(((const T *)p.kc.data)[key + i]);
                s += overlap * expf(p.scale * dot - p.lse[head]);
            }
        }
        query_scores[j] = j < p.init_blocks || j >= blocks - p.local_blocks ? INFINITY : s;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 0; i < p.topk; i++) out[i] = i < blocks ? i : -1;
    if (blocks <= p.topk) return;
    for (int i = 0; i < p.topk; i++) {
        int argmax = 0;
        for (int j = 1; j < blocks; j++) argmax = query_scores[j] > query_scores[argmax] ? j : argmax;
        query_scores[argmax] = -1;
    }
    for (int j = 0, i = 0; j < blocks; j++) {
        if (query_scores[j] == -1) out[i++] = j;
    }
}
static float *naive_scores;
static int64_t naive_max_blocks;
template <typename T, int D> static int launch_naive(const TopKParams &p, cudaStream_t stream) {
    unsigned grid = (unsigned)(p.batch.nq * p.kv_heads);
    return LAUNCH((naive_topk_kernel<T, D>), grid, 128, 0, stream, p, naive_scores, naive_max_blocks);
}
static int naive_topk(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, ConstRows q, ConstRows kc,
                      const float *lse_c, int32_t *block_indices, cudaStream_t stream) {
    TopKParams p = {*batch,
                    q,
                    kc,
                    lse_c,
                    block_indices,
                    softmax_scale(c),
                    c->q_heads,
                    c->kv_heads,
                    c->cmp_len,
                    c->cmp_stride,
                    c->block,
                    c->topk,
                    c->init_blocks,
                    c->local_blocks,
                    0,
                    0};
    return FSA_DISPATCH(dtype, c->head_dim, launch_naive, p, stream);
}

static const struct Version {
    const char *name;
    decltype(&fsa_topk) run;
} versions[] = {{"1", naive_topk}, {"portable", fsa_topk_sm80}, {"library", fsa_topk}};

static double worst;                     // largest excess (block_excess) of portable and library
static int64_t num_selected, num_differ; // selected blocks, and those that differ from the reference's

// Returns how much the highest score of the blocks not selected exceeds the lowest freely selected one,
// relative; infinity if the indices break a rule.
static double block_excess(const FsaConfig &c, const int32_t *indices, const float *scores, int64_t blocks) {
    int64_t count = std::min<int64_t>(blocks, c.topk);
    std::vector<char> selected(blocks, 0);
    for (int i = 0; i < c.topk; i++) {
        if (i >= count ? indices[i] != -1 : indices[i] < 0 || indices[i] >= blocks) return INFINITY;
        if (i > 0 && i < count && indices[i] <= indices[i - 1]) return INFINITY;
        if (i < count) selected[indices[i]] = 1;
    }
    if (blocks <= c.topk) return 0;
    double min_free = INFINITY, max_other = 0;
    for (int64_t j = 0; j < blocks; j++) {
        bool init_or_local = j < c.init_blocks || j >= blocks - c.local_blocks;
        if (init_or_local && !selected[j]) return INFINITY;
        if (!init_or_local && selected[j]) min_free = std::min(min_free, (double)scores[j]);
        if (!selected[j]) max_other = std::max(max_other, (double)scores[j]);
    }
    if (max_other <= min_free) return 0;
    return min_free > 0 ? max_other / min_free - 1 : INFINITY;
}

// kinds > 0 tests ties: all windows of a block get the same key, one of `kinds` different ones, so many
// blocks have equal scores and the lower block must win. That needs one whole sequence with local blocks, and
// windows of one stride, or kinds = 1.
template <typename T> static void check_shape(Random *r, const Shape &s, int kinds = 0) {
    const FsaConfig &c = s.c;
    Batch b(c, s.lengths, s.segments);
    int64_t nq = b.batch.nq, d = c.head_dim, windows = fsa_batch_windows(&c, &b.ref);
    Host<T> q(r, nq * c.q_heads * d, 1), kc(r, windows * c.kv_heads * d, 1);
    if (kinds) {
        int64_t row = c.kv_heads * d, block_strides = c.block / c.cmp_stride, kind = 0;
        for (int64_t w = kinds; w < windows; w++) {
            if (w % block_strides == 0) kind = r->below(kinds);
            std::copy_n(&kc.raw[kind * row], row, &kc.raw[w * row]);
            std::copy_n(&kc.f[kind * row], row, &kc.f[w * row]);
        }
    }
    std::vector<float> o(q.f.size()), lse(nq * c.q_heads);
    naive_max_blocks = b.batch.n / c.block + 1;
    std::vector<float> scratch(c.kv_heads * naive_max_blocks);
    std::vector<int32_t> ref(c.kv_heads * nq * c.topk);
    fsa_ref_attention_forward_f32(&c, &b.ref, FSA_COMPRESSED, q.f.data(), kc.f.data(), kc.f.data(), NULL,
                                  o.data(), lse.data());
    fsa_ref_select_blocks_f32(&c, &b.ref, q.f.data(), kc.f.data(), lse.data(), scratch.data(), ref.data());
    Buffer<T> q_dev(q.raw), kc_dev(kv_elements(c, b.batch, FSA_COMPRESSED));
    kc_dev.set(kc.raw);
    Buffer<float> lse_dev(lse), scores(c.kv_heads * nq * naive_max_blocks);
    Buffer<int32_t> block_indices((int64_t)ref.size());
    naive_scores = scores;
    for (const Version &version : versions) {
        std::string what = std::string(version.name) + " " + Dtype<T>::name + " " + shape_name(s);
        std::vector<int32_t> got, before;
        for (int again = 0; again < 2; again++) {
            block_indices.poison();
            CUDA_CHECK(cudaMemset(block_indices.get(), 0x55, block_indices.n * sizeof(int32_t)));
            FSA_CHECK(version.run(&c, &b.batch, Dtype<T>::value, packed_q(&c, q_dev), packed_kv(&c, kc_dev),
                                  lse_dev, block_indices, 0));
            CUDA_CHECK(cudaDeviceSynchronize());
            got = block_indices.host();
            check_that(!again || got == before, ("repeat of " + what).c_str(), 1, 0);
            before = got;
        }
        check_that(block_indices.guards_intact(), ("guards " + what).c_str(), 1, 0);
        double excess = 0;
        for (int h = 0; h < c.kv_heads; h++) {
            for (int64_t query = 0; query < nq; query++) {
                int64_t blocks = fsa_ref_block_scores_f32(&c, &b.ref, q.f.data(), kc.f.data(), lse.data(),
                                                          query, h, scratch.data());
                excess = std::max(excess,
                                  block_excess(c, &got[(h * nq + query) * c.topk], scratch.data(), blocks));
            }
        }
        check_that(excess <= 1e-3, ("selection " + what).c_str(), excess, 1e-3);
        if (kinds) check_that(got == ref, ("ties " + what).c_str(), 1, 0);
        if (&version == versions) continue;
        worst = std::max(worst, excess);
        for (size_t i = 0; i < ref.size(); i++) num_selected += ref[i] >= 0, num_differ += got[i] != ref[i];
    }
}

// Checks that fsa_topk_sm80 takes the topk that fsa_max_topk_sm80 returns, and no larger one.
static void check_limit(int g) {
    FsaConfig c = default_config(g, 1, 128, 64, 16);
    const int limit = fsa_max_topk_sm80(&c);
    Batch b(c, {20});
    const int64_t kv = kv_elements(c, b.batch, FSA_COMPRESSED);
    Buffer<__nv_bfloat16> q(b.batch.nq * g * 128), kc(kv);
    Buffer<float> lse(b.batch.nq * g);
    Buffer<int32_t> block_indices(b.batch.nq * (limit + 1));
    for (int over = 0; over < 2; over++) {
        c.topk = limit + over;
        const int status =
            fsa_topk_sm80(&c, &b.batch, FSA_BF16, packed_q(&c, q), packed_kv(&c, kc), lse, block_indices, 0);
        check_that(status == (over ? FSA_ERROR_CONFIG : FSA_OK), "the largest topk", c.topk, limit);
    }
    CUDA_CHECK(cudaDeviceSynchronize());
}

template <typename T> static void time_shape(const Timing &t, int block, int topk, uint64_t seed) {
    const int d = 128;
    FsaConfig c = default_config(t.hq, t.hkv, d, block, topk);
    Batch b(c, {t.n});
    int64_t windows = fsa_num_windows(&c, t.n);
    Buffer<T> q(t.n * t.hq * d), kc(t.n / c.cmp_stride * t.hkv * d);
    Buffer<float> lse(t.n * t.hq);
    Buffer<int32_t> block_indices(t.n * t.hkv * topk);
    fill_random(q.get(), q.n, seed, 1.0f);
    fill_random(kc.get(), kc.n, seed + 1, 1.0f);
    fill_random(lse.get(), lse.n, seed + 2, 0.01f); // any finite values will do
    naive_max_blocks = t.n / c.block + 1;
    for (const Version &version : versions) {
        bool naive = &version == versions;
        if (naive && t.n > 8192) continue;
        Buffer<float> scores(naive ? t.hkv * t.n * naive_max_blocks : 1);
        naive_scores = scores;
        double ms = time_ms(
            [&] {
                FSA_CHECK(version.run(&c, &b.batch, Dtype<T>::value, packed_q(&c, q), packed_kv(&c, kc), lse,
                                      block_indices, 0));
            },
            naive ? 3 : 10);
        double pairs = visible_pairs(c, FSA_COMPRESSED, t.n) * t.hq, flops = pairs * 2 * d;
        double bytes = 2.0 * d * (t.n * t.hq + windows * t.hkv) + 4.0 * t.n * (t.hq + t.hkv * topk);
        report({"topk", "topk", "nsa", "fwd", Dtype<T>::name, t.n, c, ms, 0, worst, NULL, version.name, 1},
               flops, bytes, pairs / 3.7e9);
    }
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = seed_from_args(argc, argv);
    Random r(seed);
    // Timings are recorded with the error of a check in the same run, so `time` runs the small check.
    bool small = has_flag(argc, argv, "small") || has_flag(argc, argv, "time");
    {
        std::vector<Shape> shapes = small ? small_shapes(&r) : test_shapes(&r, 40);
        for (int g : {2, 5}) { // several tiles of windows; g = 5: blocks that span two tiles
            shapes.push_back(plain_shape(g, 1, 64, {450}));
            FsaConfig *c = &shapes.back().c;
            c->cmp_stride = 4, c->cmp_len = g == 2 ? 8 : 12, c->block = g == 2 ? 16 : 48;
            c->topk = 6, c->local_blocks = g == 2 ? 1 : 0;
        }
        // 8, 4 and 2 selectors per query; segments that begin in the middle; blocks of 8 strides.
        for (int g : {8, 4, 2}) {
            shapes.push_back(plain_shape(g, 1, 64, {300, 380}));
            shapes.back().segments = {{0, 0, 7}, {0, 9, 290}, {1, 130, 250}};
            FsaConfig *c = &shapes.back().c;
            c->cmp_stride = 4, c->cmp_len = g == 4 ? 4 : 8, c->block = g == 2 ? 32 : 16;
            c->scale = 0.5f; // scores differ by orders of magnitude, so one wrong window shows
            c->topk = g == 4 ? 19 : 5, c->init_blocks = g == 8 ? 0 : 2, c->local_blocks = g == 2 ? 0 : 2;
        }
        if (!small) {
            // Every number of selectors, for blocks of 4, 8, 16 and 12 strides.
            for (int g : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16}) {
                for (int block_strides : {4, 8, 16, 12}) {
                    shapes.push_back(plain_shape(g, 1, 64, {700, 1 + r.below(500)}));
                    FsaConfig *c = &shapes.back().c;
                    c->cmp_stride = 4, c->cmp_len = r.below(2) ? 8 : 4, c->block = 4 * block_strides;
                    c->init_blocks = (int)r.below(4), c->local_blocks = (int)r.below(4);
                    c->topk = c->init_blocks + c->local_blocks + 1 + (int)r.below(16);
                }
            }
            shapes.push_back(plain_shape(4, 1, 128, {6000}));
            for (int g = 1; g <= 16; g++) // sequences that end inside a tile of queries, and empty ones
                shapes.push_back(plain_shape(g, 1, g % 2 ? 64 : 128, {1500 + g, 0, 1030, 0}));
            shapes.push_back(plain_shape(2, 1, 128, {3000})); // a long list
            shapes.back().c.topk = 40;
        }
        for (const Shape &s : shapes) {
            check_shape<__nv_bfloat16>(&r, s);
            check_shape<__half>(&r, s);
        }
        for (const Shape &s : {plain_shape(4, 1, 128, {1500}), plain_shape(1, 1, 64, {1300, 100})}) {
            check_shape<__nv_bfloat16>(&r, s, 1);
            check_shape<__half>(&r, s, 1);
        }
        for (int g : {1, 2, 4, 8}) { // 1, 2, 4 and 8 selectors per query
            Shape s = plain_shape(g, 1, 64, {1100});
            s.c.cmp_stride = s.c.cmp_len = 4, s.c.block = 16, s.c.init_blocks = g == 4 ? 3 : 1,
            s.c.local_blocks = 1;
            for (int kinds : {1, 3})
                check_shape<__nv_bfloat16>(&r, s, kinds), check_shape<__half>(&r, s, kinds);
        }
        for (int g : {1, 4, 16}) check_limit(g);
        printf("topk  worst excess %.2e; %lld of %lld selected blocks differ from the reference\n", worst,
               (long long)num_differ, (long long)num_selected);
        printf("topk: %d passed, %d failed\n", checks_passed, checks_failed);
    }
    if (!has_flag(argc, argv, "check")) {
        for (const Timing &t : timings) time_shape<__nv_bfloat16>(t, 64, 16, seed);
        time_shape<__nv_bfloat16>(timings[2], 128, 8, seed);
    }
    return checks_failed != 0;
}
