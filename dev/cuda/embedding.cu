// dev/cuda/embedding.cu: rows of the token embedding, and its gradient.
//   version 1: a thread a channel walks all tokens in order (backward)
//   version 2: float atomics: fast where tokens differ, slow where they don't, other bits every time
//   (backward) library  : tokens sorted, then sums along the sorted order, all orders fixed
//   (llmc/embedding.cuh)
//   ./embedding [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "layers.h"
#include "../../llmc/embedding.cuh"
#include <set>

// Version 1. As many threads as channels, each with n reads one after another.
__global__ void embedding_backward_v1_kernel(float *dtable, const int32_t *tokens, const floatX *dout,
                                             int64_t n, int c) {
    int64_t j = blockIdx.x * 64ll + threadIdx.x;
    if (j >= c) return;
    for (int64_t i = 0; i < n; i++) dtable[(int64_t)tokens[i] * c + j] += (float)dout[i * c + j];
}
// Version 2. A block a token.
__global__ void embedding_backward_v2_kernel(float *dtable, const int32_t *tokens, const floatX *dout,
                                             int c) {
    int64_t row = blockIdx.x;
    for (int j = threadIdx.x; j < c; j += 256)
        atomicAdd(&dtable[(int64_t)tokens[row] * c + j], (float)dout[row * c + j]);
}
static void backward_old(int version, float *dtable, const int32_t *tokens, const floatX *dout, int64_t n,
                         int c) {
    if (version == 1)
        embedding_backward_v1_kernel<<<(c + 63) / 64, 64>>>(dtable, tokens, dout, n, c);
    else
        embedding_backward_v2_kernel<<<(unsigned)n, 256>>>(dtable, tokens, dout, c);
    CUDA_CHECK(cudaGetLastError());
}

// Tokens of which one in `common` is token `vocab - 1`, the others drawn with a bias to small ones.
static std::vector<int32_t> random_tokens(Random *r, int64_t n, int64_t vocab, int common) {
    std::vector<int32_t> tokens(n);
    for (int32_t &t : tokens) {
        double u = r->uniform();
        t = (int32_t)(r->below(common) == 0 ? vocab - 1 : (int64_t)(u * u * (double)vocab));
    }
    return tokens;
}

static void check(Random *r, const char *name, const std::vector<int32_t> &tokens, int c, int64_t vocab) {
    int64_t n = (int64_t)tokens.size();
    HostX table(r, vocab * c, 1), dout(r, n * c, 1);
    std::vector<float> expected(n * c), dtable0(vocab * c), dtable_ref;
    for (float &x : dtable0) x = r->normal();
    dtable_ref = dtable0;
    embedding_forward(expected.data(), tokens.data(), table.f.data(), n, c);
    embedding_backward(dtable_ref.data(), tokens.data(), dout.f.data(), n, c);
    Buffer<int32_t> t(tokens);
    BufferX tab(table.raw), d(dout.raw), out(n * c);
    Buffer<float> dtable(dtable0), again(dtable0);
    Buffer<char> scratch((int64_t)embedding_backward_scratch(n, c));
    char shape[96];
    snprintf(shape, sizeof shape, "%s, n %lld c %d vocab %lld", name, (long long)n, c, (long long)vocab);
    embedding_forward(out, t, tab, n, c, 0);
    check_close("fwd", "library", shape, out, expected, 1e-30);
    embedding_backward(dtable, t, d, n, c, vocab, scratch, 0);
    check_close("bwd", "library", shape, dtable, dtable_ref, fp32_tolerance);
    check_that(scratch.guards_intact(), "embedding: bytes written outside of the scratch", 1, 0);
    scratch.poison();
    embedding_backward(again, t, d, n, c, vocab, scratch, 0);
    check_same("embedding backward", dtable, again);
    for (int version = 1; version <= 2; version++) {
        dtable.set(dtable0);
        backward_old(version, dtable, t, d, n, c);
        check_close("bwd", version == 1 ? "1" : "2", shape, dtable, dtable_ref, fp32_tolerance);
    }
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    auto drawn = [&](int64_t n, int64_t vocab, int common) { return random_tokens(&r, n, vocab, common); };
    check(&r, "one token", {0}, PACK, 1);
    check(&r, "one span, two parts of channels", drawn(128, 5, 3), 33 * PACK, 5);
    check(&r, "all the same, two spans", std::vector<int32_t>(129, 299), 64, 300);
    check(&r, "tokens across spans", drawn(517, 68, 4), 3 * PACK, 68);
    check(&r, "two tiles, a long run", drawn(2049, 70000, 2), 2 * PACK, 70000);
    std::vector<int32_t> high(400); // differ in the third pass of the sort alone
    for (int32_t &t : high) t = 5 + 65536 * (int32_t)r.below(2);
    check(&r, "high bits", high, PACK, 70000);
    if (!has_flag(argc, argv, "small")) {
        check(&r, "bytes", drawn(5000, 257, 6), 384, 257);
        check(&r, "words", drawn(20000, 50257, 20), 128, 50257);
    }
    for (int64_t n : {8192, 65536}) {
        if (has_flag(argc, argv, "check")) break;
        for (int64_t vocab : {257, 32768}) {
            int c = 4096;
            std::vector<int32_t> tokens = random_tokens(&r, n, vocab, 20);
            int64_t distinct = (int64_t)std::set<int32_t>(tokens.begin(), tokens.end()).size();
            Buffer<int32_t> t(tokens);
            BufferX table(vocab * c), out(n * c);
            Buffer<float> dtable(vocab * c);
            Buffer<char> scratch((int64_t)embedding_backward_scratch(n, c));
            fill_random(table.get(), vocab * c, r.u64(), 1);
            dtable.zero();
            double row = sizeof(floatX) * (double)c, ms;
            ms = time_ms([&] { embedding_forward(out, t, table, n, c, 0); });
            report("embedding", "fwd", "library", n, c, vocab, ms, row * (double)(n + distinct), 0);
            double bytes = row * (double)n + 8.0 * c * (double)distinct;
            for (int version = 1; version <= 2; version++) {
                ms = time_ms([&] { backward_old(version, dtable, t, out, n, c); }, 3);
                report("embedding", "bwd", version == 1 ? "1" : "2", n, c, vocab, ms, bytes, 0);
            }
            ms = time_ms([&] { embedding_backward(dtable, t, out, n, c, vocab, scratch, 0); });
            report("embedding", "bwd", "library", n, c, vocab, ms, bytes, 0);
        }
    }
    return finish("embedding");
}
