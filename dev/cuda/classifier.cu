// dev/cuda/classifier.cu: softmax, cross-entropy, argmax and the logits' gradient.
//   version 1: a thread a row, three passes
//   version 2: a warp a row: maximum, sum, gradient, each a pass, 2 bytes at a time
//   library  : a block a row, which it holds in registers, chunk by chunk: maximum and sum in one pass of
//              16-byte accesses, gradient in the second (llmc/classifier.cuh)
//   ./classifier [check [small]] [seed=N]    (check: no timing; small: few shapes, for the slow tools)
#include "layers.h"
#include "../../llmc/classifier.cuh"

// Versions 1 and 2: LANES = 1 and 32 threads a row.
template <int LANES>
__global__ void classifier_rows_kernel(floatX *all_logits, float *losses, int32_t *argmax,
                                       const int32_t *targets, float dloss, int64_t n, int v, int vp) {
    int64_t row = (blockIdx.x * 128ll + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    if (row >= n) return;
    floatX *logits = all_logits + row * vp;
    float max = -INFINITY, sum = 0;
    int at = INT_MAX;
    for (int j = lane; j < v; j += LANES) {
        if ((float)logits[j] > max) max = (float)logits[j], at = j;
    }
    for (int i = LANES / 2; i > 0; i /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, max, i);
        int other_at = __shfl_xor_sync(0xffffffffu, at, i);
        if (other > max || (other == max && other_at < at)) max = other, at = other_at;
    }
    for (int j = lane; j < v; j += LANES) sum += expf((float)logits[j] - max);
    sum = lanes_reduce_sum<LANES>(sum);
    float lse = max + logf(sum);
    int target = targets[row];
    float loss = lse - (float)logits[target];
    if (LANES > 1) __syncwarp();
    if (lane == 0) losses[row] = loss, argmax[row] = at;
    for (int j = lane; j < vp && dloss != 0; j += LANES) {
        float p = j < v ? expf((float)logits[j] - lse) - (j == target ? 1.0f : 0.0f) : 0;
        logits[j] = (floatX)(dloss * p);
    }
}
static void classifier_old(int version, floatX *logits, float *losses, int32_t *argmax,
                           const int32_t *targets, float dloss, int64_t n, int v, int vp) {
    if (version == 1)
        classifier_rows_kernel<1>
            <<<(unsigned)((n + 127) / 128), 128>>>(logits, losses, argmax, targets, dloss, n, v, vp);
    else
        classifier_rows_kernel<32>
            <<<(unsigned)((n + 3) / 4), 128>>>(logits, losses, argmax, targets, dloss, n, v, vp);
    CUDA_CHECK(cudaGetLastError());
}

// scale: of the logits. Padding columns hold NaN before; some rows have two equal maxima.
static void check(Random *r, int64_t n, int v, int vp, float scale, float dloss) {
    HostX logits(r, n * vp, scale);
    std::vector<int32_t> targets(n), argmax_ref(n);
    for (int64_t i = 0; i < n; i++) {
        targets[i] = (int32_t)r->below(v);
        if (r->below(3) == 0 && v > 1) { // a tie: the first of them is the argmax
            // side by side, anywhere, or in two packs of one thread
            const int64_t column = r->below(v - 1), gaps[] = {1, (int64_t)r->below(v), 1024 * PACK};
            const int64_t gap = gaps[i % 3], a = i * vp + column, b = i * vp + (column + gap) % v;
            logits.raw[a] = logits.raw[b] = from_float<floatX>(scale * 5);
            logits.f[a] = logits.f[b] = to_float(logits.raw[a]);
        }
        for (int j = v; j < vp; j++) logits.raw[i * vp + j] = from_float<floatX>(NAN);
    }
    std::vector<float> losses_ref(n), lse(n), gradient = logits.f;
    crossentropy_forward(losses_ref.data(), lse.data(), argmax_ref.data(), gradient.data(), targets.data(), n,
                         v, vp);
    crossentropy_backward(gradient.data(), lse.data(), targets.data(), dloss, n, v, vp);
    auto without_targets = [&](std::vector<float> x) { // which outweigh all else
        for (int64_t i = 0; i < n; i++) x[i * vp + targets[i]] = 0;
        return x;
    };
    BufferX x(n * vp), before(logits.raw);
    Buffer<float> losses(n);
    Buffer<int32_t> argmax(n), t(targets);
    double by_width = 3e-9 * v; // the C layer adds v exps one after another, in fp32
    char shape[96];
    snprintf(shape, sizeof shape, "n %lld v %d vp %d scale %g", (long long)n, v, vp, scale);
    for (int version = 1; version <= 3; version++) {
        const char *name = version == 1 ? "1" : version == 2 ? "2" : "library";
        x.set(logits.raw), losses.poison(), argmax.poison();
        if (version < 3)
            classifier_old(version, x, losses, argmax, t, dloss, n, v, vp);
        else
            classifier(x, losses, argmax, t, dloss, n, v, vp, 0);
        check_that(argmax.host() == argmax_ref && argmax.guards_intact(), "argmax", 1, 0);
        if (v == 1) { // loss and gradient are 0 but for roundings
            std::vector<float> zeros = x.floats(), loss = losses.host();
            zeros.insert(zeros.end(), loss.begin(), loss.end());
            for (float zero : zeros) check_that(fabsf(zero) <= 1e-6, shape, zero, 1e-6);
            continue;
        }
        check_close("bwd", name, shape, x, gradient, rounded_tolerance + by_width);
        double e = relative_error(without_targets(x.floats()), without_targets(gradient));
        check_that(e < rounded_tolerance + by_width, (std::string("others, ") + shape).c_str(), e,
                   rounded_tolerance + by_width);
        check_close("loss", name, shape, losses, losses_ref, fp32_tolerance + by_width);
    }
    x.set(logits.raw);
    Buffer<float> alone(n);
    classifier(x, alone, argmax, t, 0, n, v, vp, 0);
    check_same("classifier without gradient: logits", x, before);
    check_same("classifier without gradient: losses", alone, losses);
    for (int64_t i = 0; i < n; i++) { // one NaN in a row, wherever it is, shows in the row's loss
        int64_t at = i * vp + r->below(v);
        logits.raw[at] = from_float<floatX>(NAN);
    }
    x.set(logits.raw);
    classifier(x, losses, argmax, t, dloss, n, v, vp, 0);
    std::vector<float> all = losses.host();
    check_that(std::all_of(all.begin(), all.end(), [](float loss) { return isnan(loss); }), "NaN", 0, 1);
}

// Losses of rows whose target has nearly all of the probability, against double.
static void check_confident(Random *r, int64_t n, int v) {
    HostX logits(r, n * v, 1);
    std::vector<int32_t> targets(n);
    for (int64_t i = 0; i < n; i++) {
        targets[i] = (int32_t)r->below(v);
        const int64_t at = i * v + targets[i];
        logits.raw[at] = from_float<floatX>((i % 2 ? 15.0f : 1.0f) * (10 + 8 * (float)r->uniform()));
        logits.f[at] = to_float(logits.raw[at]);
    }
    BufferX x(logits.raw);
    Buffer<float> losses(n);
    Buffer<int32_t> argmax(n), t(targets);
    classifier(x, losses, argmax, t, 1, n, v, v, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<float> got = losses.host();
    for (int64_t i = 0; i < n; i++) {
        double sum = 0;
        for (int j = 0; j < v; j++) sum += exp((double)logits.f[i * v + j] - logits.f[i * v + targets[i]]);
        const double e = fabs(got[i] - log(sum));
        check_that(e <= 2e-6, "loss of a confident row", e, 2e-6);
    }
}

int main(int argc, char **argv) {
    Random r(seed_from_args(argc, argv));
    check(&r, 1, 1, 128, 1, 1);
    check(&r, 33, 68, 128, 2, 1);
    check(&r, 5, 257, 384, 300, 0.25f); // one logit has all of the probability
    check(&r, 3, 20011, 20096, 1, 1);   // several packs a thread
    check(&r, 3, 32765, 33024, 3, 1);   // two chunks, the second of padding alone
    check(&r, 4, 33000, 33024, 3, 1);
    check_confident(&r, 8, 4096);
    if (!has_flag(argc, argv, "small")) {
        check(&r, 40, 50257, 50304, 3, 1);
        check(&r, 7, 128256, 128256, 3, 0.5f);
    }
    for (int64_t n : {2048, 8192}) {
        if (has_flag(argc, argv, "check")) break;
        for (int v : {32768, 128256}) {
            BufferX logits(n * v);
            Buffer<float> losses(n);
            std::vector<int32_t> targets(n);
            for (int32_t &t : targets) t = (int32_t)r.below(v);
            Buffer<int32_t> argmax(n), t(targets);
            fill_random(logits.get(), n * v, r.u64(), 3);
            double bytes = sizeof(floatX) * (double)n * v, ms;
            ms = time_ms([&] { classifier(logits, losses, argmax, t, 0, n, v, v, 0); });
            report("classifier", "fwd", "library", n, v, 0, ms, bytes, 0);
            for (int version = 1; version <= 2; version++) {
                ms = time_ms([&] { classifier_old(version, logits, losses, argmax, t, 1, n, v, v); }, 3);
                report("classifier", "bwd", version == 1 ? "1" : "2", n, v, 0, ms, 2 * bytes, 0);
            }
            ms = time_ms([&] { classifier(logits, losses, argmax, t, 1, n, v, v, 0); });
            report("classifier", "bwd", "library", n, v, 0, ms, 2 * bytes, 0);
        }
    }
    return finish("classifier");
}
