// topk.cu: the choice of blocks.
//   version 1: a block a query and KV head: scores of all blocks to global memory, then T searches
//   portable:  fsa/topk.cu: scores by mma.sync, summed on chip, a running list of the best T a query
//   library:   what fsa_topk runs; on Hopper fsa/topk_sm90.cu (wgmma; products, exp and lists at once) where
//              that suits the configuration
// A choice is right if it is ascending, causal, complete, holds the forced blocks, and no block that was
// left out scores more than (1 + 1e-3) times the lowest chosen one that was not forced.
// usage: topk [seed=N] [check [small] | time]      both by default
#include "../../fsa/sm80/topk.cu"
#include "shapes.h"

// Version 1. `scores` [Hkv, Nq, longest/B + 1]: N*N/B floats for each KV head.
template <typename T, int D>
__global__ void __launch_bounds__(128) naive_topk_kernel(const TopKParams p, float *scores, int64_t most) {
    int64_t row = blockIdx.x / p.kv_heads, seq, pos;
    int kv_head = blockIdx.x % p.kv_heads, group = p.q_heads / p.kv_heads;
    query_position(p.batch, row, &seq, &pos);
    int blocks = (int)(pos / p.block) + 1;
    int32_t *to = p.block_indices + ((int64_t)kv_head * p.batch.nq + row) * p.topk;
    float *mine = scores + (kv_head * p.batch.nq + row) * most;
    for (int j = threadIdx.x; j < blocks; j += 128) {
        int first = j * p.block - p.cmp_len + p.cmp_stride, last = (j + 1) * p.block - p.cmp_stride;
        float s = 0;
        for (int start = max(first, 0); start <= last && start + p.cmp_len - 1 <= pos;
             start += p.cmp_stride) {
            int64_t key = ((p.batch.cu_windows[seq] + start / p.cmp_stride) * p.kv_heads + kv_head) * D;
            int cells = (min(start + p.cmp_len, (j + 1) * p.block) - max(start, j * p.block)) / p.cmp_stride;
            for (int h = 0; h < group; h++) {
                int64_t head = row * p.q_heads + kv_head * group + h;
                float dot = 0;
                for (int i = 0; i < D; i++)
                    dot += to_f32(((const T *)p.q)[head * D + i]) * to_f32(((const T *)p.kc)[key + i]);
                s += cells * expf(p.scale * dot - p.lse[head]);
            }
        }
        mine[j] = j < p.init || j >= blocks - p.local ? INFINITY : s;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 0; i < p.topk; i++) to[i] = i < blocks ? i : -1;
    if (blocks <= p.topk) return;
    for (int i = 0; i < p.topk; i++) {
        int best = 0;
        for (int j = 1; j < blocks; j++) best = mine[j] > mine[best] ? j : best;
        mine[best] = -1;
    }
    for (int j = 0, i = 0; j < blocks; j++) {
        if (mine[j] == -1) to[i++] = j;
    }
}
static float *naive_scores;
static int64_t naive_most;
template <typename T, int D> static int launch_naive(const TopKParams &p, cudaStream_t stream) {
    naive_topk_kernel<T, D>
        <<<(unsigned)(p.batch.nq * p.kv_heads), 128, 0, stream>>>(p, naive_scores, naive_most);
    return launch_status();
}
static int naive_topk(const FsaConfig *c, const BatchLayout *batch, FsaDtype dtype, const void *q, const void *kc,
                      const float *lse_c, int32_t *block_indices, cudaStream_t stream) {
    TopKParams p = {*batch,
              q,
              kc,
              lse_c,
              block_indices,
              softmax_scale_of(c),
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

static double worst;           // how much a block left out beats a chosen one, relative
static int64_t places, differ; // chosen places, and those unlike the reference's

// The excess of the best block left out over the lowest chosen one, or infinity for a wrong list.
static double choice_excess(const FsaConfig &c, const int32_t *chosen, const float *scores, int64_t blocks) {
    int64_t want = std::min<int64_t>(blocks, c.topk);
    std::vector<char> in(blocks, 0);
    for (int i = 0; i < c.topk; i++) {
        if (i >= want ? chosen[i] != -1 : chosen[i] < 0 || chosen[i] >= blocks) return INFINITY;
        if (i > 0 && i < want && chosen[i] <= chosen[i - 1]) return INFINITY;
        if (i < want) in[chosen[i]] = 1;
    }
    if (blocks <= c.topk) return 0;
    double lowest = INFINITY, highest = 0;
    for (int64_t j = 0; j < blocks; j++) {
        bool forced = j < c.init_blocks || j >= blocks - c.local_blocks;
        if (forced && !in[j]) return INFINITY;
        if (!forced && in[j]) lowest = std::min(lowest, (double)scores[j]);
        if (!in[j]) highest = std::max(highest, (double)scores[j]);
    }
    if (highest <= lowest) return 0;
    return lowest > 0 ? highest / lowest - 1 : INFINITY;
}

// With `kinds` all windows of a block have the same key, one of so many: many blocks score alike, and of
// equals the smaller is right. That is for one whole sequence with local blocks, and windows of one cell, or
// one kind.
template <typename T> static void check_shape(Random *r, const Shape &s, int kinds = 0) {
    const FsaConfig &c = s.c;
    Batch b(c, s.lengths, s.segments);
    int64_t nq = b.batch.nq, d = c.head_dim, windows = fsa_batch_windows(&c, &b.ref);
    Host<T> q(r, nq * c.q_heads * d, 1), kc(r, windows * c.kv_heads * d, 1);
    if (kinds) {
        int64_t row = c.kv_heads * d, cells = c.block / c.cmp_stride, kind = 0;
        for (int64_t w = kinds; w < windows; w++) {
            if (w % cells == 0) kind = r->below(kinds);
            std::copy_n(&kc.raw[kind * row], row, &kc.raw[w * row]);
            std::copy_n(&kc.f[kind * row], row, &kc.f[w * row]);
        }
    }
    std::vector<float> o(q.f.size()), lse(nq * c.q_heads);
    naive_most = b.batch.max_len / c.block + 1;
    std::vector<float> scratch(c.kv_heads * naive_most);
    std::vector<int32_t> ref(c.kv_heads * nq * c.topk);
    fsa_ref_attention_forward_f32(&c, &b.ref, FSA_COMPRESSED, q.f.data(), kc.f.data(), kc.f.data(), NULL,
                               o.data(), lse.data());
    fsa_ref_select_blocks_f32(&c, &b.ref, q.f.data(), kc.f.data(), lse.data(), scratch.data(), ref.data());
    Buffer<T> q_dev(q.raw), kc_dev(kv_elements(c, b.batch, FSA_COMPRESSED));
    kc_dev.set(kc.raw);
    Buffer<float> lse_dev(lse), scores(c.kv_heads * nq * naive_most);
    Buffer<int32_t> block_indices((int64_t)ref.size());
    naive_scores = scores;
    for (const Version &version : versions) {
        std::string what = std::string(version.name) + " " + Dtype<T>::name + " " + shape_name(s);
        std::vector<int32_t> got, before;
        for (int again = 0; again < 2; again++) {
            block_indices.poison();
            CUDA_CHECK(cudaMemset(block_indices.get(), 0x55, block_indices.n * sizeof(int32_t)));
            FSA_CHECK(version.run(&c, &b.batch, Dtype<T>::value, q_dev, kc_dev, lse_dev, block_indices, 0));
            CUDA_CHECK(cudaDeviceSynchronize());
            got = block_indices.host();
            check_that(!again || got == before, ("repeat of " + what).c_str(), 1, 0);
            before = got;
        }
        check_that(block_indices.guards_intact(), ("guards " + what).c_str(), 1, 0);
        double excess = 0;
        for (int h = 0; h < c.kv_heads; h++) {
            for (int64_t row = 0; row < nq; row++) {
                int64_t blocks = fsa_ref_block_scores_f32(&c, &b.ref, q.f.data(), kc.f.data(), lse.data(),
                                                          row, h, scratch.data());
                excess =
                    std::max(excess, choice_excess(c, &got[(h * nq + row) * c.topk], scratch.data(), blocks));
            }
        }
        check_that(excess <= 1e-3, ("choice " + what).c_str(), excess, 1e-3);
        if (kinds) check_that(got == ref, ("ties " + what).c_str(), 1, 0);
        if (&version == versions) continue;
        worst = std::max(worst, excess);
        for (size_t i = 0; i < ref.size(); i++) places += ref[i] >= 0, differ += got[i] != ref[i];
    }
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
    fill_random(lse.get(), lse.n, seed + 2, 0.01f); // any finite values do
    naive_most = t.n / c.block + 1;
    for (const Version &version : versions) {
        bool naive = &version == versions;
        if (naive && t.n > 8192) continue;
        Buffer<float> scores(naive ? t.hkv * t.n * naive_most : 1);
        naive_scores = scores;
        double ms =
            time_ms([&] { FSA_CHECK(version.run(&c, &b.batch, Dtype<T>::value, q, kc, lse, block_indices, 0)); },
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
    // Timings carry the error of a check in the same run, if a short one.
    bool small = has_flag(argc, argv, "small") || has_flag(argc, argv, "time");
    {
        std::vector<Shape> shapes = small ? small_shapes(&r) : test_shapes(&r, 40);
        for (int g : {2, 5}) { // several tiles of windows; for g = 5 blocks that straddle them
            shapes.push_back(plain_shape(g, 1, 64, {450}));
            FsaConfig *c = &shapes.back().c;
            c->cmp_stride = 4, c->cmp_len = g == 2 ? 8 : 12, c->block = g == 2 ? 16 : 48;
            c->topk = 6, c->local_blocks = g == 2 ? 1 : 0;
        }
        // Queries' windows in 8, 4 and 2 parts; sequences that begin in the middle, blocks of 8 cells.
        for (int g : {8, 4, 2}) {
            shapes.push_back(plain_shape(g, 1, 64, {300, 380}));
            shapes.back().segments = {{0, 0, 7}, {0, 9, 290}, {1, 130, 250}};
            FsaConfig *c = &shapes.back().c;
            c->cmp_stride = 4, c->cmp_len = g == 4 ? 4 : 8, c->block = g == 2 ? 32 : 16;
            c->scale = 0.5f; // scores differ by orders of magnitude, and a wrong window shows
            c->topk = g == 4 ? 19 : 5, c->init_blocks = g == 8 ? 0 : 2, c->local_blocks = g == 2 ? 0 : 2;
        }
        if (!small) {
            // Every way to split blocks of 4, 8, 16 and 12 cells.
            for (int g : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16}) {
                for (int cells : {4, 8, 16, 12}) {
                    shapes.push_back(plain_shape(g, 1, 64, {700, 1 + r.below(500)}));
                    FsaConfig *c = &shapes.back().c;
                    c->cmp_stride = 4, c->cmp_len = r.below(2) ? 8 : 4, c->block = 4 * cells;
                    c->init_blocks = (int)r.below(4), c->local_blocks = (int)r.below(4);
                    c->topk = c->init_blocks + c->local_blocks + 1 + (int)r.below(16);
                }
            }
            shapes.push_back(plain_shape(4, 1, 128, {6000}));
            for (int g = 1; g <= 16; g++) // sequences that end within tiles of queries, and empty ones
                shapes.push_back(plain_shape(g, 1, g % 2 ? 64 : 128, {1500 + g, 0, 1030, 0}));
            shapes.push_back(plain_shape(2, 1, 128, {3000})); // a list of many
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
        for (int g : {1, 2, 4, 8}) { // queries' windows in 1, 2, 4 and 8 parts
            Shape s = plain_shape(g, 1, 64, {1100});
            s.c.cmp_stride = s.c.cmp_len = 4, s.c.block = 16, s.c.init_blocks = g == 4 ? 3 : 1,
            s.c.local_blocks = 1;
            for (int kinds : {1, 3})
                check_shape<__nv_bfloat16>(&r, s, kinds), check_shape<__half>(&r, s, kinds);
        }
        printf("topk  worst excess %.2e; %lld of %lld places differ from the reference\n", worst,
               (long long)differ, (long long)places);
        printf("topk: %d passed, %d failed\n", checks_passed, checks_failed);
    }
    if (!has_flag(argc, argv, "check")) {
        for (const Timing &t : timings) time_shape<__nv_bfloat16>(t, 64, 16, seed);
        time_shape<__nv_bfloat16>(timings[2], 128, 8, seed);
    }
    return checks_failed != 0;
}
