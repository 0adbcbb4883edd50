#!/usr/bin/env bash
# faults.sh [cpu|emulator]: mutation tests. Plants one fault at a time in a copy of the sources and runs the tests that
# should notice it up to the first failed check, LANES (2) faults at a time. Prints a line for each fault. Fails if a
# fault is missed or cannot be planted, or if a test fails without a fault.
#   ONLY=TEXT plants only the faults whose names contain TEXT.
set -u
cd "$(dirname "$0")/../.." || exit 1
LANES=${LANES:-2} kind=${1:-cpu}
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
# The copies are no git repository; they report the commit of this one.
export COMMIT=${COMMIT:-$(git --git-dir=.git describe --always --dirty 2>/dev/null || echo unknown)}
names=() files=() expressions=() tests=()

# fault NAME FILE SED_EXPRESSION TESTS: a fault that a sed expression makes, and the test programs and scripts that
# should notice it.
fault() {
    [[ $1 == *"${ONLY:-}"* ]] || return 0
    names+=("$1") files+=("$2") expressions+=("$3") tests+=("$4")
}

# The C reference, the C trainer and what all trainers share.
cpu_faults() {
    A="test_reference test_golden"
    R=fsa/reference.c
    fault "each window counts only for its first block (block j misses window 4j-1)" $R 's/cell < c->cmp_len \/ s; cell/cell < 1; cell/' "$A"
    fault "scores of the group's first head instead of the sum over the group" $R 's/for \(int r = 0; r < g; r\+\+\) (p \+= EXP)/for (int r = 0; r < 1; r++) \1/' "$A"
    fault "a tie selects the larger block index" $R 's/scores\[j\] > scores\[argmax\]/scores[j] >= scores[argmax]/' "$A"
    fault "causal mask off by one" $R 's/case FSA_CAUSAL: r\[0\].end = pos \+ 1/case FSA_CAUSAL: r[0].end = pos/; s/(r\[0\]\.end = pos) \+ 1;$/\1;/' "$A"
    fault "no causal limit within the query's own block" $R 's/if \(end > pos \+ 1\) end = pos \+ 1;/if (end > pos + 2) end = pos + 2;/' "$A"
    fault "a window is visible before its last token" $R 's/return fsa_num_windows\(c, pos \+ 1\)/return fsa_num_windows(c, pos + 2)/' "$A"
    fault "sliding window of W + 1 tokens" $R 's/r\[0\]\.begin = pos \+ 1 - c->window/r[0].begin = pos - c->window > 0 ? pos - c->window : 0/' "$A"
    fault "compressed keys rotated to the next position" $R 's/\(kc, m, c->kv_heads, c->head_dim, 0, c->cmp_stride/(kc, m, c->kv_heads, c->head_dim, 1, c->cmp_stride/' "$A"
    fault "the initial blocks are not always selected" $R 's/j < c->init_blocks; j\+\+\) scores\[j\] = INFINITY/j < 0; j++) scores[j] = INFINITY/' "$A"
    fault "one local block too few" $R 's/j = blocks - c->local_blocks; j < blocks/j = blocks - c->local_blocks + 1; j < blocks/' "$A"
    fault "lse 0 for a row without visible keys" $R 's/max \+ LOG\(sum\) : -INFINITY/max + LOG(sum) : 0/' "$A"
    fault "queries of a segment rotated from position 0" $R 's/b->segments\[s\]\.pos, 1, inv_freq/0, 1, inv_freq/' "$A"
    fault "position embedding missing in the weight's gradient" $R 's/axpy\(dw \+ row, x\[r \* stride \+ i\] \+ \(pe \? pe\[r \* d \+ i\] : 0\)/axpy(dw + row, x[r * stride + i]/' "$A"
    fault "the gate's gradient without 1 - g" $R 's/\* gate \* \(1 - gate\)/* gate/' "$A"
    fault "RoPE angles in float" $R 's/double angle = \(double\)\(first/float angle = (float)(first/' "$A"

    # ---- the model
    M="test_model test_model_golden"
    C=train_gpt_nsa.c
    fault "RMSNorm's gradient without the term of the mean" $C 's/- xi\[j\] \* rstd\[i\] \* mean//' "$M"
    fault "the derivative of SiLU is the sigmoid" $C 's/ \* \(1 \+ gate\[j\] \* \(1 - s\)\)//' "$M"
    fault "a tied head has no gradient" $C 's/matmul_backward\(model->scratch.dnorm, 0, model->params.grads \+ model->layout.lm_head/static real none[1 << 16];\n    matmul_backward(model->scratch.dnorm, 0, c->tied ? none : model->params.grads + model->layout.lm_head/' "$M"
    fault "RoPE's base is always 10,000" llmc/config.h 's/pow\(c->rope_theta,/pow(1e4,/' "$M test_run"
    fault "-full-every counts its layers from 0" llmc/config.h 's/\(l \+ 1\) % c->full_every == 0/l % c->full_every == 0/' "$M test_run"
    fault "layers of -full-every have gates" llmc/config.h 's/const int nsa = layer_attention\(c, l\) == ATTN_NSA;/const int nsa = c->attn == ATTN_NSA;/' "test_model test_run"
    fault "FLOPs without -full-every" llmc/mfu.h 's/const AttnMode attn = layer_attention\(c, l\);/const AttnMode attn = (AttnMode)c->attn;/' "test_run"
    fault "the padded vocabulary has a probability" $C 's/for \(int j = 0; j < v; j\+\+\) sum \+= EXP/for (int j = 0; j < vp; j++) sum += EXP/' "$M"

    # ---- AdamW and the learning rate
    fault "weight decay on norms too" $C 's/tensor->decay \? lr \* weight_decay : 0/lr * weight_decay/' "test_model"
    fault "AdamW without bias correction" $C 's/lr \/ bias_correction1/lr/' "test_model"
    fault "weight decay in the gradient" $C 's/real gi = g\[i\] \* scale;/real gi = g[i] * scale + (decay ? (real)weight_decay * p[i] : 0);/; s/ \+ decay \* p\[i\];$/;/' "test_model"
    fault "warm-up begins one step too early" llmc/schedule.h 's/max_lr \* \(double\)\(step \+ 1\)/max_lr * (double)step/' "test_data test_run"
    fault "WSD decays from nine tenths" llmc/schedule.h 's/begin = 0.8/begin = 0.9/' "test_run"
    fault "the outlier window is one value short" llmc/schedule.h 's/w->count < OUTLIER_WINDOW\)/w->count < OUTLIER_WINDOW - 1)/' "test_run"
    fault "a step's own loss and norm count for its outlier limit" llmc/run.h '/const double loss_limit = run_loss_limit/d; s/(    )(if \(loss <= loss_limit && norm)/\1const double loss_limit = run_loss_limit(r), norm_limit = run_norm_limit(r);\n\1\2/' "test_run"

    # ---- the training step
    S="cli.sh"
    fault "no warning of a shard of -i and -j" llmc/dataloader.h 's/fprintf\(stderr, "warning: -i and -j/if (0) &/' "$S"
    fault "-clip is ignored" $C 's/double scale = o->clip > 0 .*;/double scale = 1;/' "$S"
    fault "gradients below -clip are scaled up to it" $C 's/o->clip > 0 && line->norm > o->clip \?/o->clip > 0 ?/' "$S"
    fault "the norm is logged after clipping" $C 's/(model_update\(model, r->state.step \+ 1, .*)/line->norm *= scale;\n        \1/' "$S"
    fault "AdamW's step number is one too small" $C 's/model_update\(model, r->state.step \+ 1,/model_update(model, r->state.step ? r->state.step : 1,/' "$S"
    fault "AdamW's step number is one too large" $C 's/model_update\(model, r->state.step \+ 1,/model_update(model, r->state.step + 2,/' "$S"
    fault "beta1 for beta2" $C 's/line->lr, o->beta1, o->beta2,/line->lr, o->beta1, o->beta1,/' "$S"
    fault "weight decay is ignored" $C 's/o->eps, o->weight_decay, scale/o->eps, 0, scale/' "$S"
    fault "the next step's learning rate" $C 's/line->lr = schedule_rate\(o, r->state.step\)/line->lr = schedule_rate(o, r->state.step + 1)/' "$S"
    fault "the next step's learning rate, but the right one in the log" $C 's/model_update\(model, r->state.step \+ 1, line->lr,/model_update(model, r->state.step + 1, schedule_rate(o, r->state.step + 1),/' "$S"
    fault "-skip 1 updates with NaN" $C 's/if \(run_accept_step\(r, loss, line->norm\)\) \{/run_accept_step(r, loss, line->norm);\n    {/' "$S"
    fault "gradients of micro-batches are not divided" $C 's/model_backward\(model, 1.0 \/ \(double\)r->micro_batches\)/model_backward(model, 1.0)/' "$S"
    fault "gradients are not zeroed" $C 's/^    model_zero_grad\(model\);/    if (r->state.step == 0) model_zero_grad(model);/' "$S"
    fault "gradients are zeroed at every micro-batch" $C 's/^        model_backward\(model, 1.0/        model_zero_grad(model);\n        model_backward(model, 1.0/' "$S"
    fault "the loss of the last micro-batch alone" $C 's/loss \+= model_forward\(model, r->inputs/loss = model_forward(model, r->inputs/; s/\(double\)r->micro_batches;/1.0;/' "$S"
    fault "the log's lines have the step before" llmc/run.h 's/return \+\+r->state.step;/return r->state.step++;/' "$S"
    fault "tokens are not counted" llmc/run.h 's/r->state.tokens \+= r->state.total_batch;/(void)0;/' "$S"
    fault "tokens of one micro-batch are counted" llmc/run.h 's/r->state.tokens \+= r->state.total_batch;/r->state.tokens += r->opt.batch * r->opt.seq_len;/' "$S"
    fault "-a 1 trains on new batches" $C 's/if \(o->overfit\) loader_seek/if (0) loader_seek/' "$S"

    # ---- data
    fault "samples overlap by a token" llmc/dataloader.h 's/(->count|\.count) \/ \(l->seq_len \+ 1\)/\1 \/ l->seq_len/' "test_data"
    fault "-seed does not change the order of the data" llmc/run.h 's/loader_open\(&r->train, o->train, (.*) 1, o->seed,/loader_open(\&r->train, o->train, \1 1, 0,/' "test_run"
    fault "-doc-mask 0 is ignored" llmc/run.h 's/r->eot, \(int\)r->opt.doc_mask,/r->eot, 1,/' "test_run"
    fault "shards without a tokenizer have no end-of-text" llmc/run.h 's/r->tokenizer.eot : c->vocab_size - 1;/r->tokenizer.eot : -1;/' "test_run"
    fault "a tokenizer's end-of-text is not used" llmc/run.h 's/r->eot = r->has_tokenizer \? r->tokenizer.eot : /r->eot = /' "test_run"
    fault "shards of another tokenizer are taken" llmc/run.h 's/if \(r->has_tokenizer && tokenizer_checksum/if (0 \&\& tokenizer_checksum/' "$S"
    fault "evaluation files of another tokenizer are taken" llmc/eval_file.h 's/\(uint32_t\)header\[6\] != tokenizer_checksum\(t\)/0/' "test_run"
    fault "end-of-text ends a document instead of beginning it" llmc/dataloader.h 's/inputs\[i\] == eot\)\)/i > 0 \&\& inputs[i - 1] == eot))/' "test_data"
    fault "a pre-token of white space keeps its last character" llmc/tokenizer.h 's/if \(at_text_end \|\| span == first_bytes\) return span/return span/' "test_data"
    fault "a merge that an earlier one has made impossible" llmc/tokenizer.h 's/if \(left->len \+ right->len != merge.len\) continue;//' "test_data"
    fault "an added token keeps the white space before it" llmc/tokenizer.h 's/flags \& TOKEN_LSTRIP \&\&/0 \&\&/' "test_data"
    fault "a second BOS before a prompt" llmc/run.h 's/> 0 \&\& first == bos/> 0 \&\& 0/' "test_run"

    # ---- validation
    fault "recall answers are read one place late" llmc/run.h 's/a->answers\[lo\].index - sample \* sample_tokens -$/a->answers[lo].index - sample * sample_tokens + 0 */' "test_run"
    fault "recall answers of a sample's first half alone" llmc/run.h 's/a->answers\[lo\].index < \(sample \+ 1\) \* sample_tokens; lo\+\+/a->answers[lo].index < sample * sample_tokens + sample_tokens \/ 2; lo++/' "test_run"
    fault "loss by position of the sample, not of the document" llmc/position_loss.h 's/t - cu_seqlens\[s\] == position_bucket_start/t % 300 == position_bucket_start/' "test_run"
    fault "loss by position of the first process alone" llmc/run.h 's/position_loss_sum\(&counts->positions, &c->positions\);/if (i == 0) position_loss_sum(\&counts->positions, \&c->positions);/' "test_run"
    fault "gates of batches that are not full" llmc/run.h 's/r->config.attn == ATTN_NSA \&\& first \+ l->batch <= samples/r->config.attn == ATTN_NSA/' "test_run"
    fault "gates of one process of a -cp group" llmc/run.h '/static inline void run_sum_counts/,/^}/ s/for \(int i = 0; i < r->comm.ranks; i\+\+\) \{/for (int i = 0; i < r->comm.ranks; i += (int)r->opt.cp_size) {/' "test_run"
    fault "the first token of a choice does not count" llmc/eval_file.h 's/t = stop - f->choices\[i\].tokens; t < stop/t = stop - f->choices[i].tokens + 1; t < stop/' "test_run"
    fault "a context that is cut loses a token more" llmc/eval_file.h 's/if \(length > seq_len\) length = seq_len;/if (length > seq_len) length = seq_len - 1;/' "test_run"
    fault "the answer is the last of equal choices, or the worst" llmc/eval_file.h 's/if \(loss < best_loss\) best_loss/if (!(loss < best_loss)) best_loss/' "test_run"
    fault "a needle is found if its last token is" llmc/eval_file.h 's/results\[i\].greedy &= argmax/results[i].greedy = argmax/' "test_run"
    fault "answers of the first process alone" llmc/run.h 's/rank < r->comm.ranks; rank \+= \(int\)r->opt.cp_size/rank < 1; rank++/' "test_run"
    fault "lengths of choices in tokens for all formats" llmc/eval_file.h 's/if \(f->llmc_format\) c->length = c->tokens;/c->length = c->tokens;/' "test_run"
    fault "recall answers of the first shard alone" llmc/run.h 's/const Answers \*a = &r->answers\[shard\];/const Answers *a = \&r->answers[0];/' "test_run"
    fault "a distance bucket ends one too late" llmc/run.h 's/a->answers\[lo\].distance >> \(bucket \+ 1\)/(a->answers[lo].distance - 1) >> (bucket + 1)/' "test_run"
    fault "distance buckets are named by the next power of two" llmc/run.h 's/distances\[k\] = \(int64_t\)1 << k;/distances[k] = (int64_t)2 << k;/' "test_run"
    fault "chance is that of the whole vocabulary" llmc/run.h 's/answers \? 1.0 \/ answers : 0/answers ? 1.0 \/ r->config.vocab_size : 0/' "test_run"
    fault "rows behind the last validation sample count" llmc/run.h 's/b < l->batch && first \+ b < samples;/b < l->batch;/' "test_run"
    fault "validation is a batch short" llmc/run.h 's/const int64_t batches = \(samples \+ global_batch - 1\) \/ global_batch;/const int64_t batches = samples \/ global_batch;/' "test_run"
    fault "validation goes on where the last one ended" llmc/run.h 's/^    loader_seek\(l, 0, 0\);$//' "test_run"
    fault "validation samples are shuffled" llmc/run.h 's/r->config.vocab_size, 0, o->seed, r->dp_rank,/r->config.vocab_size, 1, o->seed, r->dp_rank,/' "test_run"

    # ---- text generation
    fault "-seed does not change the text" llmc/run.h 's/rng_seed\(&rng, \(uint64_t\)o->seed, 0x73616d70\)/rng_seed(\&rng, 0, 0x73616d70)/' "test_run"
    fault "draws are not stored" llmc/run.h 's/r->state.draws = \(int64_t\)rng.counter;/(void)0;/' "test_run"
    fault "draws are not restored" llmc/run.h 's/rng.counter = \(uint64_t\)r->state.draws;/(void)0;/' "test_run"
    fault "text does not end at end-of-text" llmc/run.h 's/if \(next == r->eot \|\| /if (0 \&\& /' "test_run"
    fault "text does not begin with end-of-text" llmc/run.h 's/^    tokens\[0\] = bos;/    tokens[0] = 0;/' "test_run"
    fault "the newer half of a full context is dropped" llmc/run.h 's/memmove\(tokens, tokens \+ dropped, .*;/(void)dropped;/' "test_run"
    fault "-temp is ignored" llmc/run.h 's/vocab, o->temperature, o->top_p/vocab, 1, o->top_p/' "test_run"

    # ---- checkpoints and resume
    fault "checksums of checkpoint chunks are not compared" llmc/checkpoint.h 's/else if \(checksum\(data.*$/else if (0) {/' "test_run"
    fault "m and v of a checkpoint are swapped" $C 's/run_save\(&run, model.params.weights, model.optimizer.m, model.optimizer.v,/run_save(\&run, model.params.weights, model.optimizer.v, model.optimizer.m,/' "$S"
    fault "a resumed run begins without v" $C 's/run.resuming \? model.optimizer.v : NULL/NULL/' "$S"
    fault "a resumed run repeats a sample" llmc/run.h 's/loader_seek\(&r->train, saved.epoch, saved.position\)/loader_seek(\&r->train, saved.epoch, saved.position ? saved.position - 1 : 0)/' "$S"
    fault "a new -t keeps the epoch" llmc/run.h '/changed since the checkpoint/,/loader_seek/s/saved.epoch \+ 1, 0/saved.epoch, 0/' "test_run"
    fault "other data keeps the epoch" llmc/run.h '/if \(!same_data\)/,/loader_seek/s/saved.epoch \+ 1, 0/saved.epoch, 0/' "test_run"
    fault "a new -t keeps the position" llmc/run.h 's/\} else if \(saved.seq_len == o->seq_len && saved.epoch_samples == r->train.samples &&/} else if (/' "test_run"
    fault "a new -seed keeps the position" llmc/run.h 's/^( +)saved.seed == o->seed\) \{/\11) {/' "test_run"
    fault "no checkpoint after the last step" llmc/schedule.h 's/\(step == o->max_steps \|\| cadence_due\(step, o->save_every, o->max_steps\)\)/o->save_every > 0 \&\& step % o->save_every == 0/' "test_run"
    fault "a checkpoint is not synced to disk" llmc/utils.h 's/if \(fflush\(a->f\) != 0 \|\| fsync\(fileno\(a->f\)\) != 0\) \{/if (fflush(a->f) != 0) {/' "test_run"
    fault "the folder of a checkpoint is not synced to disk" llmc/utils.h 's/\(fsync\(fd\) != 0 && errno != EINVAL\)/0/' "test_run"
    fault "a checkpoint is renamed before it is synced" llmc/utils.h 's/^    if \(a->f != NULL\) atomic_sync\(a\);$/    rename(a->tmp, a->path); if (a->f != NULL) atomic_sync(a); rename(a->path, a->tmp);/' "test_run"

    # ---- several processes
    fault "the last rank does not own the remainder of a layer" llmc/zero.h 's/rank < z->ranks - 1 \? \*begin \+ unit->partition_size : unit->end/*begin + unit->partition_size/' "test_parallel"
    fault "context-parallel chunks are not balanced by work" llmc/context_parallel.h 's/ \|\| sum\[r\] < sum\[min_rank\]//' "test_parallel"
    fault "positions of a context-parallel slice begin at 0" llmc/context_parallel.h 's/pos = first - cu_seqlens\[s\]/pos = 0/' "test_parallel"
    fault "all ranks read the samples of rank 0" llmc/dataloader.h 's/l->position \+ l->rank \* l->batch/l->position/' "test_parallel"
    fault "the end of a process is not detected" llmc/comm.c 's/if \(closed\) (comm_die\(c, "rank %d is gone: its process ended without)/if (0) \1/; s/(COMM_HEARTBEAT, NULL, 0\)) \&\&$/\1 \&\& 0 \&\&/' "test_comm"
    fault "a missing heartbeat is not detected" llmc/comm.c 's/now - p->last_received > COMM_TIMEOUT_SECONDS/0/' "test_comm"
    fault "two processes may connect with the same rank" llmc/comm.c 's/ \|\| s->peers\[h\.rank\]\.fd >= 0//' "test_comm"

    hf_faults
}

# Import and export (scripts/*_hf.py, scripts/hf/). A test hf:NAME:NAME is `test_hf.py NAME NAME`.
hf_faults() {
    local H=scripts/hf
    if ! python3 -c "import numpy, ml_dtypes, tokenizers, tiktoken, gguf" 2>/dev/null; then
        echo "skipped: faults in scripts/hf need the Python packages of requirements.txt"
        return
    fi
    # ---- import
    fault "hf: rope_scaling is ignored" $H/config.py 's/if kind == "llama3":/if kind == "llama3" and False:/; s/elif kind != "default":/elif kind not in ("default", "llama3"):/' "hf:families:llama3"
    fault "hf: low and high of Llama 3's RoPE are swapped" $H/config.py 's/rope.number\("low_freq_factor"/rope.number("X"/; s/rope.number\("high_freq_factor"/rope.number("low_freq_factor"/; s/rope.number\("X"/rope.number("high_freq_factor"/' "hf:families:llama3"
    fault "hf: the original length of Llama 3's RoPE is that of the model" $H/config.py '/original_max_position_embeddings"\)$/d' "hf:families:llama3"
    fault "hf: rope_theta in rope_parameters is ignored" $H/config.py 's/rope.number\("rope_theta", (c.number\("rope_theta", 10000.0, float\)), float\)/\1/' "hf:families:llama3_new"
    fault "hf: head_dim is hidden_size / heads" $H/config.py 's/c.number\("head_dim", channels \/\/ heads\)/channels \/\/ heads/' "hf:families:qwen3"
    fault "hf: rms_norm_eps is ignored" $H/config.py 's/c.number\("rms_norm_eps", 1e-6, float\)/1e-6/' "hf:families:llama"
    fault "hf: sliding_window is one too large" $H/config.py 's/return c.number\("sliding_window"\)/return c.number("sliding_window") + 1/' "hf:families:mistral"
    fault "hf: sliding_window is ignored" $H/config.py 's/        window, every = _sliding_window\(.*/        window, every = None, 0/' "hf:families:mistral"
    fault "hf: full layers in a Qwen3 with a window are ignored" $H/config.py 's/return c.number\("sliding_window"\), every/return c.number("sliding_window"), 0/' "hf:families:qwen3_hybrid"
    fault "hf: any full layers in a Qwen3 with a window are every N-th" $H/config.py 's/ or every == 1 or types != expected:/:/' "hf:refused_configs"
    fault "hf: Qwen2's window without use_sliding_window" $H/config.py 's/ and not c.flag\("use_sliding_window"\):/ and False:/' "hf:families:qwen2"
    fault "hf: the first layers of max_window_layers are not full" $H/config.py 's/full = min\(c.number\("max_window_layers", 28\), layers\)/full = 0/' "hf:refused_configs"
    fault "hf: biases of q, k and v are dropped" $H/config.py 's/"qkv-bias": int\(architecture == "Qwen2ForCausalLM" or /"qkv-bias": int(/' "hf:families:qwen2"
    fault "hf: attention_bias is ignored" $H/config.py 's/ or c.flag\("attention_bias"\)\)/)/' "hf:families:nsa_linear"
    fault "hf: norms of q and k are swapped" $H/weights.py 's/\("q_norm.weight"/("X"/; s/\("k_norm.weight"/("q_norm.weight"/; s/\("X"/("k_norm.weight"/' "hf:families:qwen3"
    fault "hf: k and v are swapped" $H/weights.py 's/"k_proj": kv_heads \* d, "v_proj"/"v_proj": kv_heads * d, "k_proj"/' "hf:families:llama"
    fault "hf: gate and up of the MLP are swapped" $H/weights.py 's/\("gate", "up"\)/("up", "gate")/' "hf:families:llama"
    fault "hf: the compressions of k and v are swapped" $H/weights.py 's/\("compress_k"/("X"/; s/\("compress_v"/("compress_k"/; s/\("X"/("compress_v"/' "hf:families:nsa_linear"
    fault "hf: a tied model has a head of its own" $H/config.py 's/int\(c.flag\("tie_word_embeddings"\)\)/0/' "hf:families:llama3"
    fault "hf: a stored head of a tied model is not compared" $H/weights.py 's/all\(np.array_equal\(x, y\) for x, y/all(x is not y for x, y/' "hf:refused_tensors"
    fault "hf: tensors that no trainer has are ignored" $H/weights.py 's/^        die\(f"\{name\}: \{tensor\[:80\]\}: not supported.*/        pass/' "hf:refused_tensors"
    fault "hf: a bias of o_proj is ignored" $H/weights.py 's/if tensor in biases and .*:$/if tensor in biases:/' "hf:refused_tensors"
    fault "hf: padded rows are not 0" scripts/from_hf.py 's/yield np.zeros\(tensor.rows \* tensor.cols - filled/yield np.ones(tensor.rows * tensor.cols - filled/' "hf:families:llama"
    fault "hf: the sequence length of a model is not stored" $H/checkpoint.py 's/state\[SEQ_LEN_FIELD\] = seq_len/state[SEQ_LEN_FIELD] = 0/' "hf:families:llama"
    fault "hf: new gates of selected and sliding are swapped" scripts/from_hf.py 's/for g in gates\], logits/for g in (gates[0], gates[2], gates[1])], logits/' "hf:attention_flags"
    fault "hf: a new compression is the sum" scripts/from_hf.py 's/ \/ model\["cmp-len"\]$//' "hf:attention_flags"
    fault "hf: --phi is ignored" scripts/from_hf.py 's/^    if args.phi:/    if False:/' "hf:attention_flags"
    fault "hf: another tokenizer in the folder is replaced" scripts/from_hf.py 's/ and read_input\(path\) != content:/ and False:/' "hf:tokenizer"
    fault "hf: tokens that only the model has are missing" scripts/from_hf.py 's/b""\] \* unused/b""] * 0/; s/-1\] \* unused/-1] * 0/; s/ \[0\] \* unused/ [0] * 0/' "hf:tokenizer"
    fault "hf: files of a tokenizer are not kept" scripts/from_hf.py 's/^        if files:$/        if False:/' "hf:tokenizer"

    # ---- GGUF
    fault "hf: rows of GGUF's q and k stay in its order" $H/gguf_file.py 's/if self.architecture == "llama" and re/if False and re/' "hf:gguf"
    fault "hf: rows of GGUF's q alone are reordered" $H/gguf_file.py 's/\(q\|k\)_proj/(q)_proj/' "hf:gguf"
    fault "hf: rows of q and k are reordered in each GGUF" $H/gguf_file.py 's/if self.architecture == "llama" and re/if re/' "hf:gguf"
    fault "hf: GGUF's rope_freqs are ignored" $H/gguf_file.py 's/elif self.rope_freqs is not None:/elif False:/' "hf:gguf"
    fault "hf: GGUF's rope_freqs are not checked" $H/gguf_file.py 's/ or not np.allclose\(found, expected, rtol=1e-3\)//' "hf:gguf"
    fault "hf: GGUF's head_dim is hidden_size / heads" $H/gguf_file.py 's/get\("attention.key_length", channels \/\/ heads\)/channels \/\/ heads/' "hf:gguf"
    fault "hf: GGUF's sliding window is ignored" $H/gguf_file.py 's/window = get\("attention.sliding_window"\)/window = None/' "hf:gguf"

    # ---- files
    fault "hf: overlapping tensors are not refused" $H/safetensors_files.py 's/entry.begin == position,/entry.begin >= 0,/' "hf:refused_tensors"
    fault "hf: a truncated safetensors file is not refused" $H/safetensors_files.py '/need\(position <= size/d' "hf:refused_tensors"
    fault "hf: bytes behind the last tensor are not refused" $H/safetensors_files.py '/need\(position >= size/d' "hf:refused_tensors"
    fault "hf: sizes that differ from the shape are not refused" $H/safetensors_files.py 's/end - begin == math.prod\(shape\) \* DTYPE_BYTES\[dtype\]/True/' "hf:refused_tensors"
    fault "hf: a tensor in two shards is not refused" $H/safetensors_files.py 's/if name in entries:/if False:/' "hf:refused_folders"
    fault "hf: an index can name a file outside the folder" $H/safetensors_files.py 's/os.path.basename\(file\) != file or //' "hf:refused_folders"
    fault "hf: all shards have the tensors of the first" $H/safetensors_files.py 's/in self.shards\[self.shard\]:/in self.shards[0]:/' "hf:large"

    # ---- export
    fault "hf: bf16 is cut, not rounded" $H/safetensors_files.py 's/data = piece.astype\(DTYPES\[self.dtype\]\)/data = (piece.view("u4") \& 0xFFFF0000).view("f4").astype(DTYPES[self.dtype])/' "hf:families:llama"
    fault "hf: the next piece overwrites the begin of a row" scripts/to_hf.py '/left = left.copy\(\)/d' "hf:large"
    fault "hf: the header's checksum is not verified" $H/checkpoint.py 's/!= checksum\(header\[:-8\]\):/== 0:/' "hf:refused_checkpoints"
    fault "hf: checksums of the parameters are not verified" $H/checkpoint.py 's/if value != self.sums\[first \+ i\]:/if False:/' "hf:refused_checkpoints"
    fault "hf: the last chunk's checksum is not verified" $H/checkpoint.py 's/if value != self.sums\[first \+ i\]:/if value != self.sums[first + i] and data.size - i * CHUNK_FLOATS >= CHUNK_FLOATS:/' "hf:large"
    fault "hf: a checkpoint that is too long is not refused" $H/checkpoint.py 's/if size != expected:/if size < expected:/' "hf:refused_checkpoints"
    fault "hf: version 1 has the order of version 2" $H/checkpoint.py 's/if nsa and version > 1:/if nsa:/; s/if nsa and version == 1:/if False:/' "hf:old_versions"
    fault "hf: gates of old versions have a bias" $H/checkpoint.py 's/yield np.zeros\(count, "<f4"\)/yield np.ones(count, "<f4")/' "hf:old_versions"
    fault "hf: AdamW's m is exported" $H/checkpoint.py 's/^            self.file.seek\(HEADER_BYTES \+ 4 \* begin\)/            self.file.seek(HEADER_BYTES + 4 * (begin + self.total * (self.sums_offset > HEADER_BYTES + 4 * self.total)))/; s/if value != self.sums\[first \+ i\]:/if False:/' "hf:old_versions hf:trained_checkpoint"
    fault "hf: the factor of Llama 3's RoPE is not exported" $H/config.py 's/^    if factor:/    if False:/' "hf:families:llama3"
    fault "hf: the window is not exported" $H/config.py 's/window = model\["window"\] if model\["attn"\] == WINDOW else None/window = None/' "hf:families:mistral"
    fault "hf: eps is not exported" $H/config.py 's/"rms_norm_eps": model\["norm-eps"\]/"rms_norm_eps": 1e-6/' "hf:families:llama"
    fault "hf: a scale that transformers lacks is exported" $H/config.py 's/if model\["scale"\] not in \(0, .*:$/if False:/' "hf:refused_checkpoints"
    fault "hf: generation_config.json is not exported" $H/hub_files.py 's/, "generation_config.json"//' "hf:tokenizer"
    fault "hf: a rebuilt tokenizer.json lacks its merges" $H/tokenizer_json.py 's/if t.kind == vocab.BPE and not merges:/if False:/; s/for left, right, _ in t.merges\]/for left, right, _ in t.merges[:9]]/' "hf:tokenizer"
    fault "hf: a rebuilt SentencePiece has no byte fallback" $H/tokenizer_json.py 's/byte_fallback = any\(.*/byte_fallback = False/' "hf:sentencepiece"
    fault "hf: a rebuilt SentencePiece always has byte fallback" $H/tokenizer_json.py 's/byte_fallback = any\(.*/byte_fallback = t.kind == vocab.SENTENCEPIECE/' "hf:sentencepiece"
    fault "hf: a rebuilt SentencePiece puts no space before a text" $H/tokenizer_json.py 's/t.prefix != vocab.PREFIX_ALWAYS:/t.prefix != -1:/; s/if t.prefix == vocab.PREFIX_ALWAYS:/if False:/' "hf:sentencepiece"
    fault "hf: a rebuilt SentencePiece splits no pre-tokens" $H/tokenizer_json.py 's/bool\(t.split_spaces\)/False/' "hf:sentencepiece"
    fault "hf: added tokens of a rebuilt tokenizer keep white space" $H/tokenizer_json.py 's/bool\(flags \& vocab.TOKEN_LSTRIP\)/False/' "hf:sentencepiece"

    # ---- the modeling file
    if ! python3 -c "import torch, transformers" 2>/dev/null; then
        echo "skipped: faults in modeling_nsa.py need the Python packages torch and transformers"
        return
    fi
    local P=$H/modeling_nsa.py N=hf:transformers:nsa L=hf:transformers:nsa_linear K=hf:transformers:nsa_token
    fault "hf: a window is visible before its last token" $P 's/first \+ c.nsa_cmp_len - 1 <= row/first + c.nsa_cmp_len - 2 <= row/' "$N"
    fault "hf: block scores of the group's first head" $P 's/p.sum\(2\).detach/p[:, :, 0].detach/' "$N"
    fault "hf: a window counts for the block of its first stride alone" $P 's/range\(c.nsa_cmp_len \/\/ c.nsa_cmp_stride\)/range(1)/' "$N"
    fault "hf: one local block too few" $P 's/block > own - c.nsa_local_blocks/block > own - c.nsa_local_blocks + 1/' "$N"
    fault "hf: no initial blocks" $P 's/\(block < c.nsa_init_blocks\) \| //' "$N"
    fault "hf: one block too many is selected" $P 's/\[\.\.\., : c.nsa_topk\]/[..., : c.nsa_topk + 1]/' "$N"
    fault "hf: sliding window of W + 1 tokens" $P 's/key > row - c.nsa_window/key >= row - c.nsa_window/' "$N"
    fault "hf: gates of compressed and selected are swapped" $P 's/return compressed, branch\(causal \& in_blocks\),/return branch(causal \& in_blocks), compressed,/' "$N"
    fault "hf: hidden states without the first layer's input" $P 's/hidden_states \+= \(x,\)$/hidden_states = (x,)/' "$N"
    fault "hf: output_attentions is ignored" $P 's/raise ValueError\("output_attentions/str("output_attentions/' "$N"
    fault "hf: gates without bias" $P 's/self.gate_proj\(x\)/F.linear(x, self.gate_proj.weight)/' "$N"
    fault "hf: compressed keys are not rotated" $P 's/^            kc = rotate\(kc, first.*$//' "$N"
    fault "hf: the compression of keys has no position embedding" $P 's/x = x \+ pe\[:, None\]/x = x + 0 * pe[:, None]/' "$L"
    fault "hf: the position embedding is added to values too" $P 's/self.compress_v if linear else None, None\)/self.compress_v if linear else None, self.compress_pe if linear else None)/' "$L"
    fault "hf: nsa_scale is ignored" $P 's/scale = c.nsa_scale or d/scale = d/' "$K"
    fault "hf: RoPE scaling of nsa is ignored" $P 's/if config.rope_factor:/if False:/' "$K"
    fault "hf: k is not normalized" $P 's/self.q_norm\(q\), self.k_norm\(k\)/self.q_norm(q), k/' "$K"
    fault "hf: positions of a cached step begin one too late" $P 's/torch.arange\(past, n, device=x.device\)/(torch.arange(past, n, device=x.device) + (past > 0))/' "$N"
    fault "hf: padding on the left counts as positions" $P 's/positions = \(attention_mask.*$/positions = torch.arange(past, n, device=x.device).expand(x.shape[0], -1)/' "$N"
    fault "hf: keys are not sorted before padding" $P 's/^        if order is not None:/        if False:/' "$N"
    fault "hf: the cache holds rotated keys" $P 's/k, v = cache.update\(k, v, self.layer_idx\)/k, v = cache.update(rotate(k, positions, frequencies), v, self.layer_idx)/' "$N"
    fault "hf: no logits but the last are kept" $P 's/logits_to_keep=0,/logits_to_keep=1,/' "$N"
}

# The GPU trainer's own code, on the emulator. The rest of a run is in llmc/*.h, which both trainers share.
emulator_faults() {
    local U=train_gpt_nsa.cu S=cli_gpu.sh
    fault "-clip is ignored" $U 's/\(float\)o->clip, stream/0, stream/' "$S"
    fault "gradients below -clip are scaled up to it" llmc/global_norm.cuh 's/clip > 0 && norm > clip \?/clip > 0 ?/' "$S"
    fault "the norm is logged after clipping" llmc/global_norm.cuh 's/out\[NORM_VALUE\] = norm;/out[NORM_VALUE] = clip > 0 \&\& norm > clip ? clip : norm;/' "$S"
    fault "AdamW's step number is one too large" $U 's/r->state.step \+ 1, line->lr/r->state.step + 2, line->lr/' "$S"
    fault "layers of -full-every lose their outputs before the backward pass" $U 's/\(first \|\| keep \|\| \(first_full/(first || (first_full/' "$S"
    fault "beta1 for beta2" llmc/optimizer.cuh 's/a->lr, o->beta1, o->beta2,/a->lr, o->beta1, o->beta1,/' "$S"
    fault "weight decay on norms too" llmc/optimizer.cuh 's/begin, 0\), t->decay\}/begin, 0), 1}/' "$S"
    fault "the next step's learning rate" $U 's/schedule_rate\(o, r->state.step\)/schedule_rate(o, r->state.step + 1)/' "$S"
    fault "-skip 1 updates with NaN" llmc/adamw.cuh 's/ \|\| a.norm\[NORM_FINITE\] == 0\) return/) return/' "$S"
    fault "outliers update" $U 's/^    skip_update_above\(.*$//' "$S"
    fault "gradients of micro-batches are not divided" $U 's/line->lr, r->state.total_batch\)/line->lr, o->batch * o->seq_len)/' "$S"
    fault "gradients are not zeroed" $U 's/^    model_zero_grad\(model\);/    if (r->state.step == 0) model_zero_grad(model);/' "$S"
    fault "-doc-mask 0 is ignored" llmc/feed.cuh 's/\(int\)o->doc_mask, cu_seqlens/1, cu_seqlens/' "$S"
    fault "the position of the batch read ahead is saved" $U 's/epoch = slot->epoch, position = slot->position;/epoch = r->train.epoch, position = r->train.position;/' "$S"
    fault "m and v of a checkpoint are swapped" llmc/checkpoint.cuh 's/arrays\[3\] = \{a->master, a->m, a->v\}/arrays[3] = {a->master, a->v, a->m}/' "$S"
    fault "the rounded weights are saved" llmc/checkpoint.cuh 's/^        checkpoint_write_part\(fd, path, 3, i,/        for (int64_t k = 0; i == 0 \&\& k < end - begin; k++) part[k] = (float)(floatX)part[k];\n&/' "$S"
    fault "a resumed run begins without v" llmc/checkpoint.cuh 's/if \(v\) cuda_check/if (0) cuda_check/' "$S"

    # ---- kernels
    S=emulator/dev/cuda/selected.out
    fault "dK and dV of a slab overwrite those of the slab before" fsa/selected.cuh 's/\*accumulate = owner .*;/*accumulate = false;/' "$S"
    fault "every launch packs V of the first heads" fsa/sm90/pack_v.cu 's/kv_head = a.kv_head0 \+ blockIdx.y/kv_head = (int)blockIdx.y/' "$S"
    fault "a NaN sum counts as no visible key" fsa/sm90/dense_fwd.cu 's/total != 0/total > 0/' emulator/dev/test/test_fsa.out
    fault "the lse of two branches loses a NaN" fsa/sm90/dense_bwd.cu 's/exp2f\(-fabsf\(lse2 - local_lse2\)\)/exp2f(min_lse2 - fmaxf(lse2, local_lse2))/' emulator/dev/test/test_fsa.out
}

"${kind}_faults"

# ---- the programs are built once; each lane has a copy of them and of the sources, and builds what depends on a fault
case $kind in
cpu) BUILD=build/faults CPU=build/faults/train_gpt_nsa_cpu flags="BUILD=build/faults CFLAGS=-O2 GPU=" ;; # compiles fast
emulator) BUILD=build CPU=train_gpt_nsa_cpu flags="" ;;
esac
TRAINER=$BUILD/emulator/train_gpt_nsa.out

# program TEST: prints the file to build before TEST runs.
program() {
    case $1 in
    cli.sh) echo "$CPU" ;;
    cli_gpu.sh) echo "$TRAINER" ;;
    hf:*) echo "$BUILD/logits" ;;
    *) echo "$BUILD/$1" ;;
    esac
}

# run_test LANE TEST: runs a test in the lane's folder up to its first failed check.
run_test() {
    local command=$BUILD/$2
    [[ $2 != *.sh ]] || command="bash dev/test/$2"
    [[ $2 != *.out ]] || command+=" check small"
    [[ $2 != hf:* ]] || command="python3 dev/test/test_hf.py$(tr ':' ' ' <<<"${2#hf}")"
    CPU=$CPU TRAINER=$TRAINER BUILD=$BUILD FIRST_FAILURE=1 PYTHONDONTWRITEBYTECODE=1 timeout 600 $command >"$T/out.$1" 2>&1
} 2>/dev/null

# plant LANE INDEX: plants a fault in the lane's folder, runs its tests until one fails, and takes the fault away again.
plant() {
    local name=${names[$2]} file=${files[$2]} test code why
    sed -i -E "${expressions[$2]}" "$file"
    if cmp -s "$file" "$T/good/$file"; then
        echo "NOT PLANTED  $name: nothing in $file matches"
        return
    fi
    for test in ${tests[$2]}; do
        if ! make -s $flags "$(program "$test")" >"$T/err.$1" 2>&1; then
            echo "NOT PLANTED  $name: $(grep -m 1 error "$T/err.$1")"
            break
        fi
        run_test "$1" "$test"
        code=$?
        if [ $code -ne 0 ]; then
            why=$(grep -a -m 1 FAILED "$T/out.$1" | cut -c 1-150)
            echo "noticed      $name: $test: ${why:-it ends with code $code}"
            break
        fi
        [ "$test" != "${tests[$2]##* }" ] || echo "MISSED       $name"
    done
    cp "$T/good/$file" "$file"
}

# work LANE: takes the next fault until none is left.
work() {
    cd "$T/$1" || exit 1
    local i
    for i in "${!names[@]}"; do
        mkdir "$T/taken.$i" 2>/dev/null && plant "$1" "$i" | tee -a "$T/report"
    done
}

all=$(printf '%s\n' ${tests[*]} | sort -u)
make -s $flags $(for test in $all; do program "$test"; done) "$CPU" "$BUILD"/{recall,text,adamw_step} >"$T/err" 2>&1 ||
    { cat "$T/err" >&2; exit 1; }
for lane in $(seq "$LANES"); do
    mkdir -p "$T/$lane/data" "$T/$lane/$(dirname "$BUILD")"
    cp -a Makefile .clang-format ./*.[ch] ./*.cu fsa llmc dev scripts "$T/$lane/" && cp -a data/*.{c,py} data/mc "$T/$lane/data/" &&
        cp -a "$BUILD" "$T/$lane/$BUILD" && { [ -e "$T/$lane/$CPU" ] || cp -a "$CPU" "$T/$lane/"; } || exit 1
done
for file in $(printf '%s\n' "${files[@]}" | sort -u); do
    mkdir -p "$T/good/$(dirname "$file")" && cp "$file" "$T/good/$file"
done
for test in $all; do
    (cd "$T/1" && run_test 1 "$test") ||
        { echo "error: $test fails without a fault: $(tail -n 3 "$T/out.1"); repair it first" >&2; exit 1; }
done
for lane in $(seq "$LANES"); do work "$lane" & done
wait
noticed=$(grep -c '^noticed' "$T/report") missed=$(grep -c '^MISSED' "$T/report")
echo "${#names[@]} faults: $noticed noticed, $missed missed, $((${#names[@]} - noticed - missed)) not planted"
[ "$noticed" -eq ${#names[@]} ]
