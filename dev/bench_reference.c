// bench_reference.c: times the C reference, forward and backward, on one sequence. `make bench` runs it on a
// machine without a GPU.
// usage: bench_reference [tokens [q_heads [kv_heads [head_dim]]]]
#include "../llmc/utils.h"
#include "../llmc/rand.h"
#include "../fsa/reference.h"

// Allocates n normally distributed values.
static float *random_array(int64_t n, uint64_t stream, double scale) {
    float *x = xmalloc(n * sizeof(float));
    for (int64_t i = 0; i < n; i++) x[i] = (float)(scale * rng_normal_at(1, stream, i));
    return x;
}

int main(int argc, char **argv) {
    int64_t n = argc > 1 ? atoll(argv[1]) : 4096;
    FsaConfig c = {.q_heads = argc > 2 ? atoi(argv[2]) : 8,
                   .kv_heads = argc > 3 ? atoi(argv[3]) : 4,
                   .head_dim = argc > 4 ? atoi(argv[4]) : 64,
                   .cmp_len = 32,
                   .cmp_stride = 16,
                   .block = 64,
                   .topk = 16,
                   .init_blocks = 1,
                   .local_blocks = 2,
                   .window = 512,
                   .phi = FSA_PHI_LINEAR};
    char msg[256];
    if (n < 1) die("tokens %lld: must be at least 1", (long long)n);
    if (fsa_config_check(&c, msg, sizeof msg)) die("%s", msg);
    int64_t d = c.head_dim, nq = n * c.q_heads * d, nk = n * c.kv_heads * d,
            nw = c.kv_heads * c.cmp_len * d * d;
    int64_t cu_seqlens[2] = {0, n};
    FsaSegment segment = {0, 0, n};
    FsaBatch batch = {1, cu_seqlens, 1, &segment};
    float *q = random_array(nq, 1, 1), *k = random_array(nk, 2, 1), *v = random_array(nk, 3, 1);
    float *gate = random_array(n * c.q_heads * 3, 4, 1), *dout = random_array(nq, 5, 1);
    float *wk = random_array(nw, 6, 0.02), *wv = random_array(nw, 7, 0.02),
          *pe = random_array(nw / d, 8, 0.1);
    fsa_ref_PhiWeights_f32 phi = {wk, pe, wv};
    double inv_freq[256];
    for (int i = 0; i < d / 2; i++) inv_freq[i] = pow(10000, -2.0 * i / d);
    fsa_ref_State_f32 state;
    size_t bytes = fsa_ref_state_layout_f32(&state, &c, n, n, 1, NULL);
    fsa_ref_state_layout_f32(&state, &c, n, n, 1, xmalloc(bytes));
    float *o = xmalloc(nq * 4), *dq = xmalloc(nq * 4), *dk = xmalloc(nk * 4), *dv = xmalloc(nk * 4);
    float *dgate = xcalloc(n * c.q_heads * 3, 4);
    fsa_ref_PhiGradients_f32 dphi = {xcalloc(nw, 4), xcalloc(nw / d, 4), xcalloc(nw, 4)};

    double t0 = now_seconds();
    fsa_ref_forward_f32(&c, &batch, q, k, v, &phi, inv_freq, gate, NULL, &state, o);
    double t1 = now_seconds();
    fsa_ref_backward_f32(&c, &batch, k, v, &phi, inv_freq, gate, &state, dout, dq, dk, dv, &dphi, dgate);
    double t2 = now_seconds();
    printf("reference, %lld tokens, (%d, %d) heads of %d: forward %.2f s, backward %.2f s, state %.0f MiB\n",
           (long long)n, c.q_heads, c.kv_heads, c.head_dim, t1 - t0, t2 - t1, bytes / 1048576.0);
    return 0;
}
