// shapes.h: batches on which the programs of the dense, top-k and compression kernels check them, and shapes
// that they time. The batches have lengths that are no multiple of a tile, all GQA group sizes, and queries
// that are parts of their sequences.
#ifndef DEV_CUDA_SHAPES_H
#define DEV_CUDA_SHAPES_H
#include "common.h"

struct Shape {
    FsaConfig c;
    std::vector<int64_t> lengths;
    std::vector<FsaSegment> segments; // empty: one per whole sequence
};

static inline Shape plain_shape(int hq, int hkv, int d, std::vector<int64_t> lengths) {
    return Shape{default_config(hq, hkv, d, 64, 16), lengths, {}};
}

// Returns lengths and group sizes at the edges of the kernels' tiles, then `count` random shapes.
static inline std::vector<Shape> test_shapes(Random *r, int count) {
    std::vector<Shape> shapes;
    shapes.push_back(plain_shape(4, 1, 128, {1}));
    shapes.push_back(plain_shape(4, 2, 64, {31, 32, 33, 1}));
    shapes.push_back(plain_shape(3, 1, 128, {63, 64, 65}));
    shapes.push_back(plain_shape(10, 2, 128, {507}));
    shapes.push_back(plain_shape(7, 1, 64, {129, 1, 700}));
    shapes.push_back(plain_shape(16, 1, 128, {300, 17}));
    shapes.push_back(plain_shape(2, 2, 128, {1, 4097, 1}));
    shapes.back().c.topk = 8;
    shapes.push_back(plain_shape(4, 1, 128, {2000, 40}));
    shapes.back().segments = {{0, 0, 1}, {0, 17, 100}, {0, 500, 1}, {0, 1990, 10}, {1, 30, 10}};
    for (int window : {63, 64, 159, 191, 255, 256, 257}) { // edges of the masked tiles of a window
        shapes.push_back(plain_shape(2, 1, window % 2 ? 64 : 128, {330}));
        shapes.back().c.window = window;
        if (window >= 255) shapes.back().segments = {{0, 125, 1}, {0, 126, 1}, {0, 127, 1}, {0, 128, 202}};
    }
    shapes.push_back(plain_shape(5, 1, 64, {0, 0, 200, 0, 33, 0})); // empty sequences
    shapes.push_back(plain_shape(4, 1, 128, {200, 0, 90}));         // and empty segments
    shapes.back().segments = {{0, 0, 0}, {0, 3, 50},  {0, 60, 0}, {0, 60, 140},
                              {1, 0, 0}, {2, 80, 10}, {2, 90, 0}};
    for (int i = 0; i < count; i++) {
        static const int groups[] = {1, 2, 3, 4, 5, 6, 7, 8, 12, 16}, strides[] = {4, 8, 16, 16};
        Shape s;
        int hkv = 1 + (int)r->below(2), g = groups[r->below(10)];
        s.c = default_config(hkv * g, hkv, r->below(2) ? 128 : 64, 64, 16);
        s.c.cmp_stride = strides[r->below(4)];
        s.c.block = 16 * (1 + (int)r->below(8));
        s.c.cmp_len = s.c.cmp_stride * (1 + (int)r->below(3));
        if (s.c.cmp_len > s.c.block) s.c.cmp_len = s.c.cmp_stride;
        s.c.init_blocks = (int)r->below(3);
        s.c.local_blocks = (int)r->below(4);
        s.c.topk = s.c.init_blocks + s.c.local_blocks + (int)r->below(8);
        if (s.c.topk == 0) s.c.topk = 1;
        s.c.window = 1 + (int)r->below(r->below(2) ? 20 : 600);
        if (r->below(3) == 0) s.c.scale = 0.05f;
        int sequences = 1 + (int)r->below(4);
        for (int j = 0; j < sequences; j++) s.lengths.push_back(1 + r->below(r->below(3) ? 200 : 900));
        if (r->below(3) == 0) {
            for (int j = 0; j < sequences; j++) {
                int64_t pos = r->below(s.lengths[j]);
                s.segments.push_back({j, pos, 1 + r->below(s.lengths[j] - pos)});
            }
        }
        shapes.push_back(s);
    }
    return shapes;
}

// Returns tiny shapes of the same kinds, for the emulator and compute-sanitizer.
static inline std::vector<Shape> small_shapes(Random *r) {
    std::vector<Shape> shapes;
    shapes.push_back(plain_shape(4, 1, 128, {1}));
    shapes.push_back(plain_shape(3, 1, 64, {0, 31, 0, 0, 65, 1, 0}));
    shapes.back().c.window = 20;
    shapes.push_back(plain_shape(4, 2, 128, {33, 40}));
    shapes.back().segments = {{0, 0, 0}, {0, 7, 20}, {0, 32, 1}, {1, 3, 0}, {1, 38, 2}};
    shapes.push_back(plain_shape(1, 1, r->below(2) ? 64 : 128, {90 + r->below(60)}));
    shapes.back().c.window = 1 + (int)r->below(100);
    for (Shape &s : shapes) {
        s.c.block = 16, s.c.topk = 4, s.c.cmp_len = 16;
        s.c.cmp_stride = r->below(2) ? 8 : 16;
    }
    // Several tiles of 128 keys, and of 128 windows.
    shapes.push_back(plain_shape(2, 1, r->below(2) ? 64 : 128, {5, 530 + r->below(60)}));
    FsaConfig &c = shapes.back().c;
    c.block = 16, c.topk = 4, c.cmp_len = 8, c.cmp_stride = 4, c.window = 20 + (int)r->below(200);
    return shapes;
}

static inline std::string shape_name(const Shape &s) {
    char text[256];
    snprintf(text, sizeof text,
             "hq=%d hkv=%d d=%d l=%d s=%d B=%d T=%d init=%d local=%d W=%d%s n=", s.c.q_heads, s.c.kv_heads,
             s.c.head_dim, s.c.cmp_len, s.c.cmp_stride, s.c.block, s.c.topk, s.c.init_blocks,
             s.c.local_blocks, s.c.window, s.segments.empty() ? "" : " segments");
    std::string name = text;
    for (int64_t n : s.lengths) name += std::to_string(n) + " ";
    return name;
}

// Returns the (query, key) pairs of one head that are visible under a rule in one sequence of n tokens.
static inline double visible_pairs(const FsaConfig &c, FsaVisibility rule, int64_t n) {
    double pairs = 0;
    for (int64_t t = 0; t < n; t++) {
        int64_t keys = rule == FSA_COMPRESSED ? fsa_num_windows(&c, t + 1) : t + 1;
        pairs += rule == FSA_WINDOW ? std::min<int64_t>(keys, c.window) : keys;
    }
    return pairs;
}

// Names in the records, indexed by FsaVisibility.
static const char *const rule_names[] = {"full", "win", "cmp"}, *const rule_attn[] = {"full", "window",
                                                                                      "nsa"};

// Prints a timing with its lower bound on an H200 (790 TFLOP/s, 4.5 TB/s), and records it. flops, bytes: the
// FLOPs and the bytes of HBM traffic that are necessary. other_bound: another lower bound in milliseconds.
static inline void report(Result r, double flops, double bytes, double other_bound = 0) {
    r.tflops = flops / r.ms * 1e-9;
    printf("%s %s %s n=%-6lld %2d/%-2d d=%-3d B=%-3d T=%-2d %s %-8s %9.3f ms %7.1f TFLOP/s %6.2f TB/s  bound "
           "%.3f ms\n",
           r.program, r.part, r.dir, (long long)r.n, r.c.q_heads, r.c.kv_heads, r.c.head_dim, r.c.block,
           r.c.topk, r.dtype, r.version, r.ms, r.tflops, bytes / r.ms * 1e-9,
           std::max(std::max(flops / 790e9, bytes / 4.5e9), other_bound));
    record(r);
}

// Shapes that are timed: tokens of one sequence, and heads as models have them.
struct Timing {
    int64_t n;
    int hq, hkv;
};
static const Timing timings[] = {{8192, 32, 8},   {32768, 32, 8}, {65536, 32, 8},
                                 {65536, 32, 32}, {65536, 40, 8}, {65536, 64, 4}};
#endif
