// test_golden.c: tests the double reference of the attention against golden values: PyTorch autograd in
// float64, written by golden.py.
#include "golden.h"
#include "../../fsa/reference.h"

static const double tolerance = 1e-10;

static double *zeros(int64_t n) {
    return (double *)calloc((size_t)(n ? n : 1), sizeof(double));
}

static double *input(const Golden *g, const char *name, int64_t n) {
    double *x = zeros(n);
    golden_fill(g, name, x, n);
    return x;
}

static void test_case(const char *name) {
    Golden file, *g = &file;
    golden_load(g, name);
    const int64_t *n = golden_ints(g, "config");
    FsaConfig c;
    c.q_heads = (int)n[0], c.kv_heads = (int)n[1], c.head_dim = (int)n[2];
    c.cmp_len = (int)n[3], c.cmp_stride = (int)n[4], c.block = (int)n[5], c.topk = (int)n[6];
    c.init_blocks = (int)n[7], c.local_blocks = (int)n[8], c.window = (int)n[9];
    c.phi = n[10] ? FSA_PHI_LINEAR : FSA_PHI_MEAN, c.gate_per_token = (int)n[11];
    c.scale = (float)golden_get(g, 'f', "", "scale")->f[0];
    char message[256];
    CHECK(fsa_config_check(&c, message, sizeof message) == 0, "%s: %s", name, message);

    FsaSegment segments[16];
    FsaBatch b = {golden_get(g, 'i', "", "cu_seqlens")->size - 1, golden_ints(g, "cu_seqlens"),
                  golden_get(g, 'i', "", "segments")->size / 3, segments};
    const int64_t *triples = golden_ints(g, "segments"); // seq, pos, len
    for (int64_t i = 0; i < b.num_segments; i++) {
        FsaSegment s = {triples[3 * i], triples[3 * i + 1], triples[3 * i + 2]};
        segments[i] = s;
    }
    const GoldenTensor *rope = golden_find(g, "", "inv_freq");
    const double *inv_freq = rope ? rope->f : NULL;

    const int64_t Hkv = c.kv_heads, d = c.head_dim, rows = fsa_batch_queries(&b) * c.q_heads;
    const int64_t nq = rows * d, nk = fsa_batch_keys(&b) * Hkv * d;
    const int64_t ngate = fsa_batch_queries(&b) * (c.gate_per_token ? 1 : c.q_heads) * 3;
    const int64_t npe = Hkv * c.cmp_len * d, nw = npe * d;
    double *q = input(g, "q", nq), *k = input(g, "k", nk), *v = input(g, "v", nk);
    double *gate = input(g, "gate", ngate), *dout = input(g, "dout", nq);
    double *o = zeros(nq), *dq = zeros(nq), *dk = zeros(nk), *dv = zeros(nk), *dgate = zeros(ngate);
    double *wk = NULL, *pe = NULL, *wv = NULL, *dwk = NULL, *dpe = NULL, *dwv = NULL;
    if (c.phi == FSA_PHI_LINEAR) {
        wk = input(g, "wk", nw), pe = input(g, "pe", npe), wv = input(g, "wv", nw);
        dwk = zeros(nw), dpe = zeros(npe), dwv = zeros(nw);
    }
    fsa_ref_PhiWeights_f64 phi = {wk, pe, wv};
    fsa_ref_PhiGradients_f64 dphi = {dwk, dpe, dwv};

    // Native sparse attention.
    fsa_ref_State_f64 s;
    size_t bytes =
        fsa_ref_state_layout_f64(&s, &c, fsa_batch_queries(&b), fsa_batch_keys(&b), b.num_seqs, NULL);
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    memset(memory, 0xff, bytes); // NaN, so that a read of unwritten memory shows
    fsa_ref_state_layout_f64(&s, &c, fsa_batch_queries(&b), fsa_batch_keys(&b), b.num_seqs, memory);
    fsa_ref_forward_f64(&c, &b, q, k, v, &phi, inv_freq, gate, NULL, &s, o);
    golden_check_ints(g, "indices", s.block_indices, Hkv * fsa_batch_queries(&b) * c.topk);
    golden_check(g, "", "o", o, nq, tolerance);
    static const char *branches[3] = {"c", "s", "w"};
    for (int i = 0; i < 3; i++) {
        golden_check(g, "o_", branches[i], s.o[i], nq, tolerance);
        golden_check(g, "lse_", branches[i], s.lse[i], rows, tolerance);
    }
    fsa_ref_backward_f64(&c, &b, k, v, &phi, inv_freq, gate, &s, dout, dq, dk, dv, &dphi, dgate);
    golden_check(g, "d", "q", dq, nq, tolerance);
    golden_check(g, "d", "k", dk, nk, tolerance);
    golden_check(g, "d", "v", dv, nk, tolerance);
    golden_check(g, "d", "gate", dgate, ngate, tolerance);
    if (c.phi == FSA_PHI_LINEAR) {
        golden_check(g, "d", "wk", dwk, nw, tolerance);
        golden_check(g, "d", "pe", dpe, npe, tolerance);
        golden_check(g, "d", "wv", dwv, nw, tolerance);
    }

    // Full causal attention of the same queries and keys.
    double *lse = zeros(rows);
    memset(dq, 0, (size_t)nq * sizeof *dq);
    memset(dk, 0, (size_t)nk * sizeof *dk);
    memset(dv, 0, (size_t)nk * sizeof *dv);
    fsa_ref_rope_queries_f64(&c, &b, q, inv_freq, 0);
    fsa_ref_rope_keys_f64(&c, &b, k, inv_freq, 0);
    fsa_ref_attention_forward_f64(&c, &b, FSA_CAUSAL, q, k, v, NULL, o, lse);
    fsa_ref_attention_backward_f64(&c, &b, FSA_CAUSAL, q, k, v, NULL, o, lse, dout, dq, dk, dv);
    fsa_ref_rope_queries_f64(&c, &b, dq, inv_freq, 1);
    fsa_ref_rope_keys_f64(&c, &b, dk, inv_freq, 1);
    golden_check(g, "full_", "o", o, nq, tolerance);
    golden_check(g, "full_", "lse", lse, rows, tolerance);
    golden_check(g, "full_", "dq", dq, nq, tolerance);
    golden_check(g, "full_", "dk", dk, nk, tolerance);
    golden_check(g, "full_", "dv", dv, nk, tolerance);

    double *all[] = {q, k, v, gate, dout, o, dq, dk, dv, dgate, wk, pe, wv, dwk, dpe, dwv, lse};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    free(memory);
    golden_free(g);
}

int main(void) {
    test_case("gqa1");
    test_case("gqa4");
    test_case("gqa3");
    test_case("slice");
    test_case("edges");
    return test_end("golden");
}
