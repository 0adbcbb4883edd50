// gate.cu: checks and times the gate's backward pass and the preprocessing of the branches' backward passes
// (delta, lse_bwd). selected.cu checks the gate's forward pass, which the combine kernel of the selected
// branch computes.
//   version 1: one thread per query, all heads and channels
//   library:   fsa/gate.cu: 16-byte loads, one pass over dout and the three outputs
// usage: gate [seed=N] [check]      check: no timing
#include "../../fsa/kernels.h"
#include "common.h"

struct Branches {
    const void *o[3];
    const float *lse[3];
    float *delta[3], *lse_bwd[3];
};

// Version 1. Uncoalesced: a warp reads 32 rows at once.
template <typename T>
__global__ void gate_v1_kernel(int64_t nq, int d, int hq, int per_token, const T *logits, Branches b,
                               const T *dout, T *dlogits) {
    int64_t token = blockIdx.x * 128ll + threadIdx.x;
    if (token >= nq) return;
    for (int i = 0; i < 3; i++) {
        float sum = 0;
        for (int64_t row = token * hq; row < (token + 1) * hq; row++) {
            int64_t gate_index = (per_token ? token : row) * 3 + i;
            float x = (float)logits[gate_index], gate = 1 / (1 + expf(-x)), dot = 0;
            for (int j = 0; j < d; j++)
                dot += (float)((const T *)b.o[i])[row * d + j] * (float)dout[row * d + j];
            sum += dot * gate * (1 - gate);
            b.delta[i][row] = dot;
            b.lse_bwd[i][row] = b.lse[i][row] == -INFINITY ? INFINITY : b.lse[i][row] + log1pf(expf(-x));
            if (!per_token || row == (token + 1) * hq - 1) dlogits[gate_index] = (T)sum, sum = 0;
        }
    }
}

static double run_error[2]; // largest relative error of dlogits in bf16: version 1, library

template <typename T> static void check(Random *r, int hq, int d, int64_t nq, int per_token, bool version_1) {
    FsaConfig c = default_config(hq, 1, d, 64, 16);
    c.gate_per_token = per_token;
    int64_t size = nq * hq * d, rows = nq * hq, gate_row = per_token ? 3 : 3 * hq, num_gates = nq * gate_row;
    Host<T> logits(r, num_gates, 2), dout(r, size, 1), o0(r, size, 1), o1(r, size, 1), o2(r, size, 1);
    Host<T> *o[3] = {&o0, &o1, &o2};
    Buffer<T> logits_dev(logits.raw), dout_dev(dout.raw), b0(o0.raw), b1(o1.raw), b2(o2.raw),
        dlogits(num_gates);
    std::vector<float> lse((size_t)rows), ref_dlogits((size_t)num_gates, 0), scratch((size_t)size);
    for (float &x : lse) x = r->below(10) ? r->normal() : -INFINITY;
    Buffer<float> lse_dev(lse), delta(3 * rows), lse_bwd(3 * rows);
    Branches b = {{b0.get(), b1.get(), b2.get()},
                  {lse_dev, lse_dev, lse_dev},
                  {delta, delta + rows, delta + 2 * rows},
                  {lse_bwd, lse_bwd + rows, lse_bwd + 2 * rows}};
    char name[128];
    snprintf(name, sizeof name, "gate version %s %s hq %d d %d nq %lld per_token %d",
             version_1 ? "1" : "library", Dtype<T>::name, hq, d, (long long)nq, per_token);
    if (version_1) {
        gate_v1_kernel<T>
            <<<(unsigned)((nq + 127) / 128), 128>>>(nq, d, hq, per_token, logits_dev, b, dout_dev, dlogits);
    } else {
        FSA_CHECK(fsa_gate_backward(&c, Dtype<T>::value, nq, {logits_dev, gate_row}, b.o, b.lse,
                                    packed_q(&c, dout_dev), b.delta, b.lse_bwd, {dlogits, gate_row}, 0));
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<float> got_delta = delta.host(), got_lse_bwd = lse_bwd.host(), ref_delta(3 * rows);
    double worst = 0;
    for (int i = 0; i < 3; i++) {
        fsa_ref_gate_backward_f32(&c, nq, i, logits.f.data(), o[i]->f.data(), dout.f.data(), scratch.data(),
                                  ref_dlogits.data());
        for (int64_t row = 0; row < rows; row++) {
            double sum = 0, x = logits.f[(size_t)((per_token ? row / hq : row) * 3 + i)];
            for (int j = 0; j < d; j++)
                sum += (double)o[i]->f[(size_t)(row * d + j)] * dout.f[(size_t)(row * d + j)];
            ref_delta[(size_t)(i * rows + row)] = (float)sum;
            float got = got_lse_bwd[(size_t)(i * rows + row)], ref = lse[(size_t)row];
            if (isinf(ref))
                worst = isinf(got) && got > 0 ? worst : INFINITY;
            else
                worst = std::isfinite(got) ? std::max(worst, fabs(got - (ref + log1p(exp(-x))))) : INFINITY;
        }
    }
    check_that(worst < 1e-5, name, worst, 1e-5);
    check_that(relative_error(got_delta, ref_delta) < 1e-5, name, relative_error(got_delta, ref_delta), 1e-5);
    double e = relative_error(dlogits.floats(), ref_dlogits);
    if (Dtype<T>::value == FSA_BF16) run_error[!version_1] = std::max(run_error[!version_1], e);
    check_that(e < Dtype<T>::grad_tolerance && dlogits.guards_intact() && delta.guards_intact(), name, e,
               Dtype<T>::grad_tolerance);
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    for (int v1 = 0; v1 < 2; v1++) {
        check<__nv_bfloat16>(&r, 32, 128, 65, 0, v1);
        check<__nv_bfloat16>(&r, 7, 64, 507, 1, v1);
        check<__half>(&r, 5, 128, 31, 1, v1);
        check<__half>(&r, 3, 64, 1, 0, v1);
        check<__half>(&r, 40, 64, 9, 1, v1);
        check<__nv_bfloat16>(&r, 67, 128, 9, 0, v1);
    }
    for (int64_t n : {8192, 65536}) {
        if (has_flag(argc, argv, "check")) break;
        typedef __nv_bfloat16 T;
        FsaConfig c = default_config(32, 8, 128, 64, 16);
        int64_t rows = n * 32, size = rows * 128;
        Buffer<T> o0(size), o1(size), o2(size), dout(size), logits(rows * 3), dlogits(rows * 3);
        Buffer<float> lse(rows), delta(3 * rows), lse_bwd(3 * rows);
        T *all[4] = {o0, o1, o2, dout};
        for (int i = 0; i < 4; i++) fill_random(all[i], size, r.u64(), 1);
        fill_random(logits.get(), rows * 3, r.u64(), 1);
        fill_random(lse.get(), rows, r.u64(), 1);
        Branches b = {{o0.get(), o1.get(), o2.get()},
                      {lse, lse, lse},
                      {delta, delta + rows, delta + 2 * rows},
                      {lse_bwd, lse_bwd + rows, lse_bwd + 2 * rows}};
        double bytes = 8.0 * size;
        for (int library = 0; library < 2; library++) {
            double ms = time_ms([&] {
                if (library)
                    FSA_CHECK(fsa_gate_backward(&c, FSA_BF16, n, {logits, 3 * c.q_heads}, b.o, b.lse,
                                                packed_q(&c, dout), b.delta, b.lse_bwd,
                                                {dlogits, 3 * c.q_heads}, 0));
                else
                    gate_v1_kernel<T>
                        <<<(unsigned)((n + 127) / 128), 128>>>(n, 128, 32, 0, logits, b, dout, dlogits);
            });
            const char *version = library ? "library" : "1";
            printf("gate %s bwd n %lld: %.4f ms, %.2f TB/s, lower bound %.4f ms\n", version, (long long)n, ms,
                   bytes / ms * 1e-9, bytes / 4.5e9);
            record({"gate", "gate", "nsa", "bwd", "bf16", n, c, ms, 0, run_error[library], NULL, version, 1});
        }
    }
    printf("gate: %d passed, %d failed\n", checks_passed, checks_failed);
    return checks_failed != 0;
}
