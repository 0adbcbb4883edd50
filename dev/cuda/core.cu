// core.cu: times native sparse attention, its parts, and full causal attention through the public API. Prints
// two tables: the selected branch alone, and all parts. dev/test/test_fsa.cu checks the results.
//   usage: core [seed=N]
#include "block_indices.h"

typedef __nv_bfloat16 T;

struct Times {
    double ms[2]; // forward, backward
};

// The arguments of all API functions for one sequence of n tokens, d = 128, bf16.
struct Bench {
    FsaConfig c;
    Batch batch;
    FsaDeviceBatch b;
    int64_t size_q, size_k, size_c, size_w;
    Buffer<T> q, k, v, kc, vc, dout, o, dq, dk, dv, gate, dgate, wk, wv;
    Buffer<float> lse, dwk, dwv;
    Buffer<int32_t> block_indices;
    Bench(Random *r, int64_t n, int hq, int hkv, int block, int topk)
        : c(default_config(hq, hkv, 128, block, topk)),
          batch(c, {n}), b{n, n, 1, 1, batch.batch.cu_seqlens, batch.batch.segments}, size_q(n * hq * 128),
          size_k(n * hkv * 128), size_c(n / c.cmp_stride * hkv * 128),
          size_w((int64_t)hkv * c.cmp_len * 128 * 128), q(size_q), k(size_k), v(size_k), kc(size_c),
          vc(size_c), dout(size_q), o(size_q), dq(size_q), dk(size_k), dv(size_k), gate(n * hq * 3),
          dgate(n * hq * 3), wk(size_w), wv(size_w), lse(n * hq), dwk(size_w), dwv(size_w),
          block_indices(hkv * n * topk) {
        Buffer<T> *inputs[] = {&q, &k, &v, &kc, &vc, &dout, &gate};
        for (Buffer<T> *x : inputs) fill_random(x->get(), x->n, r->u64(), 1);
        fill_random(wk.get(), size_w, r->u64(), 1.0f / 64);
        fill_random(wv.get(), size_w, r->u64(), 1.0f / 64);
        dwk.zero(), dwv.zero();
        random_block_indices_device(block_indices, n, c, r->u64());
    }
    // Times f, records the time, and returns milliseconds. dir: 0 forward, 1 backward. flops: necessary FLOPs
    // of the part; 0: not counted.
    template <typename F>
    double run(const char *part, const char *attn, int dir, double flops, F f,
               const char *version = "library") {
        auto run_checked = [&] {
            int status = f();
            if (status) {
                printf("error: %s: status %d: %s\n", part, status, fsa_last_error());
                exit(1);
            }
        };
        double ms =
            time_ms(run_checked, flops > 1e15 ? 3 : 10, b.num_keys < 32768); // longer inputs exceed the L2
        record({"core", part, attn, dir ? "bwd" : "fwd", "bf16", b.num_keys, c, ms, flops / ms * 1e-9, -1,
                strcmp(part, "sel") ? NULL : "random", version, 1});
        return ms;
    }
    size_t workspace_bytes(FsaOperation op) const {
        size_t bytes = fsa_workspace_size(&c, FSA_BF16, &b, op);
        if (!bytes) printf("error: %s\n", fsa_last_error()), exit(1);
        return bytes;
    }
    Times selected() {
        size_t bytes =
            std::max(workspace_bytes(FSA_SELECTED_FORWARD), workspace_bytes(FSA_SELECTED_BACKWARD));
        Buffer<char> workspace((int64_t)bytes);
        double flops = 4.0 * size_q * c.topk * c.block;
        FsaSelectedForward f = {sizeof f, q, k, v};
        f.block_indices = block_indices, f.o = o, f.lse = lse;
        f.workspace = workspace, f.workspace_bytes = bytes;
        FsaSelectedBackward g = {sizeof g, q, k, v, o, dout};
        g.block_indices = block_indices, g.lse = lse, g.dq = dq, g.dk = dk, g.dv = dv;
        g.workspace = workspace, g.workspace_bytes = bytes;
        Times t;
        t.ms[0] = run("sel", "nsa", 0, flops, [&] { return fsa_selected_forward(&c, FSA_BF16, &b, &f, 0); });
        t.ms[1] =
            run("sel", "nsa", 1, 2.5 * flops, [&] { return fsa_selected_backward(&c, FSA_BF16, &b, &g, 0); });
        return t;
    }
    Times dense(FsaVisibility rule) {
        size_t bytes =
            std::max(workspace_bytes(FSA_ATTENTION_FORWARD), workspace_bytes(FSA_ATTENTION_BACKWARD));
        Buffer<char> workspace((int64_t)bytes);
        const char *part = rule == FSA_CAUSAL ? "full" : rule == FSA_WINDOW ? "win" : "cmp";
        const char *attn = rule == FSA_CAUSAL ? "full" : "nsa";
        const T *x = rule == FSA_COMPRESSED ? kc : k, *y = rule == FSA_COMPRESSED ? vc : v;
        double n = (double)b.num_keys, keys = rule == FSA_CAUSAL       ? n / 2
                                              : rule == FSA_COMPRESSED ? n / 2 / c.cmp_stride
                                                                       : c.window;
        double flops = 4.0 * size_q * keys;
        FsaAttentionForward f = {sizeof f, rule, q, x, y};
        f.o = o, f.lse = lse, f.workspace = workspace, f.workspace_bytes = bytes;
        FsaAttentionBackward g = {sizeof g, rule, q, x, y, o, dout};
        g.lse = lse, g.dq = dq, g.dk = dk, g.dv = dv, g.workspace = workspace, g.workspace_bytes = bytes;
        Times t;
        t.ms[0] = run(part, attn, 0, flops, [&] { return fsa_attention_forward(&c, FSA_BF16, &b, &f, 0); });
        t.ms[1] =
            run(part, attn, 1, 2.5 * flops, [&] { return fsa_attention_backward(&c, FSA_BF16, &b, &g, 0); });
        return t;
    }
    // Block selection. Reads the lse that dense(FSA_COMPRESSED) wrote.
    double select_blocks() {
        size_t bytes = workspace_bytes(FSA_SELECT_BLOCKS);
        Buffer<char> workspace((int64_t)bytes);
        Buffer<int32_t> selected(block_indices.n);
        FsaSelectBlocks f = {sizeof f, q, kc};
        f.lse_c = lse, f.block_indices = selected, f.workspace = workspace, f.workspace_bytes = bytes;
        return run("topk", "nsa", 0, (double)size_q * b.num_keys / c.cmp_stride,
                   [&] { return fsa_select_blocks(&c, FSA_BF16, &b, &f, 0); });
    }
    // All steps.
    Times attention(int recompute) {
        const char *version = recompute ? "recompute" : "library";
        c.recompute = recompute;
        size_t bytes = std::max(workspace_bytes(FSA_FORWARD), workspace_bytes(FSA_BACKWARD));
        Buffer<char> workspace((int64_t)bytes), saved((int64_t)fsa_saved_size(&c, FSA_BF16, &b));
        Buffer<double> inv_freq(rope_frequencies(128));
        FsaForward f = {sizeof f, q, k, v, gate};
        f.phi = {wk.get(), NULL, wv.get()}, f.inv_freq = inv_freq, f.o = o, f.saved = saved;
        f.workspace = workspace, f.workspace_bytes = bytes;
        FsaBackward g = {sizeof g, k, v, gate, dout};
        g.phi = f.phi, g.inv_freq = inv_freq, g.saved = saved, g.dq = dq, g.dk = dk, g.dv = dv;
        g.dgate_logits = dgate, g.dphi = {dwk, NULL, dwv};
        g.workspace = workspace, g.workspace_bytes = bytes;
        Times t;
        t.ms[0] = run(
            "core", "nsa", 0, 0, [&] { return fsa_forward(&c, FSA_BF16, &b, &f, 0); }, version);
        t.ms[1] = run(
            "core", "nsa", 1, 0, [&] { return fsa_backward(&c, FSA_BF16, &b, &g, 0); }, version);
        c.recompute = 0;
        printf("n %lld (%d, %d)%s: workspace %.0f MiB, saved for backward %.0f MiB\n", (long long)b.num_keys,
               c.q_heads, c.kv_heads, recompute ? ", recompute" : "", bytes / 1048576.0, saved.n / 1048576.0);
        return t;
    }
};

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    Random r(seed_from_args(argc, argv));
    const struct {
        int64_t n;
        int hq, hkv, block, topk;
    } selected[] = {{65536, 32, 32, 64, 16}, {65536, 32, 16, 64, 16}, {65536, 32, 8, 64, 16},
                    {65536, 40, 8, 64, 16},  {65536, 32, 4, 64, 16},  {65536, 64, 4, 64, 16},
                    {32768, 32, 8, 64, 16},  {8192, 32, 8, 64, 16},   {65536, 32, 8, 128, 8},
                    {65536, 32, 32, 128, 8}};
    const struct {
        int64_t n;
        int hq, hkv;
    } shapes[] = {{8192, 32, 8},   {16384, 32, 8},  {32768, 32, 8}, {65536, 32, 8},
                  {131072, 32, 8}, {65536, 32, 32}, {65536, 40, 8}, {65536, 64, 4}};
    printf("Selected branch, d = 128, bf16: milliseconds forward / backward\n");
    printf("%6s %10s %10s %18s\n", "n", "(Hq, Hkv)", "(B, T)", "fwd / bwd");
    for (auto s : selected) {
        Times t = Bench(&r, s.n, s.hq, s.hkv, s.block, s.topk).selected();
        printf("%6lld   (%2d, %2d)  (%3d, %2d) %8.2f / %7.2f\n", (long long)s.n, s.hq, s.hkv, s.block, s.topk,
               t.ms[0], t.ms[1]);
    }
    struct Row {
        Times cmp, win, sel, core, recompute, full;
        double topk;
    };
    std::vector<Row> rows;
    for (auto s : shapes) {
        Bench x(&r, s.n, s.hq, s.hkv, 64, 16);
        Row row;
        row.cmp = x.dense(FSA_COMPRESSED);
        row.topk = x.select_blocks();
        row.win = x.dense(FSA_WINDOW);
        row.sel = x.selected();
        row.core = x.attention(0);
        row.recompute = x.attention(1);
        row.full = x.dense(FSA_CAUSAL);
        rows.push_back(row);
    }
    printf("\nNative sparse attention (core) and its parts, (B, T) = (64, 16), W = 512, d = 128, bf16: "
           "milliseconds forward / backward\n");
    printf("%6s %10s %17s %7s %17s %17s %17s %17s %17s\n", "n", "(Hq, Hkv)", "compressed", "top-k",
           "selected", "sliding", "core", "core, recompute", "full");
    for (size_t i = 0; i < rows.size(); i++) {
        const Row &x = rows[i];
        printf("%6lld   (%2d, %2d) %8.2f / %6.2f %7.2f", (long long)shapes[i].n, shapes[i].hq, shapes[i].hkv,
               x.cmp.ms[0], x.cmp.ms[1], x.topk);
        for (const Times *t : {&x.sel, &x.win, &x.core, &x.recompute, &x.full})
            printf(" %8.2f / %6.2f", t->ms[0], t->ms[1]);
        printf("\n");
    }
    return 0;
}
