// fp8_gradients.cu: compares the gradients of -matmul fp8 with those of 16-bit matmuls, for a model and its
// data.
//   build/fp8_gradients -e log/run/ckpt_00001000.bin -i 'data/linux_quarter/linux_train_*.bin' -t 16384 -b 1
// It takes the trainer's flags and one GPU, which must hold two such trainers: twice the memory that -profile
// 1 prints, for training. It runs eight micro-batches in both formats and prints for each kind of tensor,
// over all layers and micro-batches:
//   error      |g8 - g| / |g|, of the worst layer and of all: g8 with fp8, g without
//   channels   the same of each row and of each column of the tensors: of the worst one in a hundred, and of
//              the worst. A scale that is too large for a channel loses it, which the error hides.
//   scale      <g8, g> / <g, g>: below 1 if fp8 makes gradients smaller, as sums that lose small terms do
//   sample     |g - g'| / |g| with g' of the micro-batch before: the noise of a gradient anyway
#define GPT_NO_MAIN
#include "../train_gpt_nsa.cu"
#include <map>
#include <string>
#include <vector>

enum { MICRO_BATCHES = 8 };

// Sums over elements.
struct Sums {
    double error, exact, product, sample;
};
// Of a tensor, and of its rows and then its columns.
struct TensorSums {
    Sums all;
    std::vector<double> error, exact; // [rows + cols]
};

static void model_start(Model *model, Run *r, Gpus *gpus, int fp8) {
    const Options *o = &r->opt;
    model_build(model, &r->config, o->batch * o->seq_len, 1, (int)o->recompute, fp8, gpus, 0);
    load_params(r, &model->params, &model->optimizer, model->stream);
    model->first_micro_batch = model->last_micro_batch = 1;
}

// Returns the gradients of a micro-batch.
static std::vector<float> gradients(Model *model, const Batch *b) {
    std::vector<float> grads(model->layout.num_params);
    model_zero_grad(model);
    model_forward_backward(model, b);
    cuda_check(cudaDeviceSynchronize());
    cuda_check(
        cudaMemcpy(grads.data(), model->params.grads, grads.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return grads;
}

int main(int argc, char **argv) {
    static Run run;
    static Model exact, quantized;
    static Gpus gpus;
    run_start(&run, argc, argv);
    if (run.comm.ranks > 1) die("%d processes: fp8_gradients runs in one", run.comm.ranks);
    if (!run.opt.train) die("-i: name the shards of training data");
    cudaDeviceProp gpu = gpu_init(0, (const void *)skip_update_if_loss_not_finite_kernel);
    gpus_init(&gpus, &run.comm, 1);
    fp8_check("fp8", &run.config, &gpu);
    model_start(&exact, &run, &gpus, 0);
    model_start(&quantized, &run, &gpus, 1);
    Feed feed;
    feed_start(&feed, &run, &gpus, exact.batch_buffers.feed, exact.batch_buffers.bytes);
    const ParamLayout *layout = &exact.layout;
    std::vector<TensorSums> sums(layout->num_tensors);
    std::vector<float> before;
    for (int batch = 0; batch <= MICRO_BATCHES; batch++) { // the first is only the one before the second
        FeedSlot *slot = feed_next(&feed, exact.stream);
        const std::vector<float> g = gradients(&exact, &slot->batch);
        const std::vector<float> g8 = batch ? gradients(&quantized, &slot->batch) : g;
        feed_release(&feed, slot, exact.stream);
        for (int64_t i = 0; batch && i < layout->num_tensors; i++) {
            const ParamTensor *t = &layout->tensors[i];
            TensorSums *s = &sums[i];
            s->error.resize(t->rows + t->cols), s->exact.resize(t->rows + t->cols);
            for (int64_t j = 0; j < t->size; j++) {
                const double x = g[t->offset + j], x8 = g8[t->offset + j], old = before[t->offset + j];
                s->all.error += (x8 - x) * (x8 - x), s->all.sample += (old - x) * (old - x);
                s->all.exact += x * x, s->all.product += x8 * x;
                for (int64_t channel : {j / t->cols, t->rows + j % t->cols})
                    s->error[channel] += (x8 - x) * (x8 - x), s->exact[channel] += x * x;
            }
        }
        before = g;
    }
    feed_stop(&feed);
    std::map<std::string, Sums> kinds;
    std::map<std::string, double> worst;
    std::map<std::string, std::vector<double>> channels;
    for (int64_t i = 0; i < layout->num_tensors; i++) {
        const ParamTensor *t = &layout->tensors[i];
        const char *dot = strrchr(t->name, '.');
        const std::string name = dot ? dot + 1 : t->name;
        Sums *k = &kinds[name];
        const Sums *all = &sums[i].all;
        k->error += all->error, k->exact += all->exact;
        k->product += all->product, k->sample += all->sample;
        if (all->exact > 0) worst[name] = std::max(worst[name], sqrt(all->error / all->exact));
        for (size_t j = 0; j < sums[i].exact.size(); j++)
            if (sums[i].exact[j] > 0) channels[name].push_back(sqrt(sums[i].error[j] / sums[i].exact[j]));
    }
    printf("%-10s %8s %8s %19s %8s %8s\n", "tensor", "worst", "error", "channels: 1%, worst", "scale",
           "sample");
    for (const auto &[name, k] : kinds) {
        if (k.exact == 0) continue;
        std::vector<double> *c = &channels[name];
        std::sort(c->begin(), c->end());
        printf("%-10s %8.4f %8.4f %10.4f %8.4f %8.4f %8.3f\n", name.c_str(), worst[name],
               sqrt(k.error / k.exact), (*c)[c->size() * 99 / 100], c->back(), k.product / k.exact,
               sqrt(k.sample / k.exact));
    }
    model_free(&exact);
    model_free(&quantized);
    gpus_free(&gpus);
    run_end(&run);
}
