#!/usr/bin/env bash
# Tests the GPU trainer from the command line: exact resume, checkpoints exchanged with the C trainer, recomputation,
# text generation, -profile, and its own errors. Needs TRAINER (the trainer, or its build for the emulator), CPU (the
# C trainer) and BUILD (the folder of recall, text and adamw_step), which make test sets.
set -u
PROGRAM=${TRAINER:-./train_gpt_nsa} CPU=$(realpath "${CPU:-./train_gpt_nsa_cpu}")
. dev/test/checks.sh

"$BUILD/recall" -o data -t 32 -n 20 -m 3 >/dev/null || bad "recall"
MODEL="-e recall -layers 1 -hidden 64 -heads 2 -kv-heads 1 -head-dim 64 -t 32 -b 1"
RUN="-l 1e-3 -u 2 -x 4 -v 4 -m 2"
DATA="-i data/recall_train_*.bin -j data/recall_val_*.bin"
set -f # the shell does not expand glob patterns
loss() { grep -h "^{\"step\":$2,\"loss\"" "$1/log.jsonl" | sed 's/.*"loss":\([0-9.]*\).*/\1/'; }
norm() { grep -h "^{\"step\":$2,\"loss\"" "$1/log.jsonl" | sed 's/.*"norm":\([0-9.]*\).*/\1/'; }

# ---- runs, exact resume, recomputation
run $MODEL $RUN $DATA -o a -n 2
check '[ $code -eq 0 ] && grep -q "^gpu: " out && grep -q "^  activations " out' "a short run: $(cat err)"
check 'head -1 a/log.jsonl | grep -q "\"start\":.*\"gpu\":\"[^\"]"' "the log does not name the GPU: $(head -1 a/log.jsonl)"
check 'grep -q "^val loss [0-9]*\.[0-9]* | perplexity [0-9.]* | [0-9.]* bits/byte | [0-9]* tokens | step " out && grep -q "^recall by distance" out' "no validation: $(cat out)"
check '[ "$(grep -c "^{\"step\":[0-9]*,\"loss\"" a/log.jsonl)" -eq 4 ]' "log.jsonl does not have 4 steps"
check '[ -f a/ckpt_00000002.bin ] && [ -f a/ckpt_00000004.bin ] && [ -f a/tokenizer.bin ]' "checkpoints are missing"

# ---- the updates: each checkpoint is AdamW's next step after the one before, with the rate and the clipping of the flags
for clip in 0.5 100; do
    run $MODEL $DATA -l 1e-3 -u 2 -k linear -q 0 -x 4 -v 0 -n 1 -nk 9 -beta1 0.8 -beta2 0.9 -eps 1e-6 -c 2 -clip $clip -o clip$clip
    updates clip$clip 0.8 0.9 1e-6 2 >is 2>err; logged clip$clip $clip >want
    check '[ ! -s err ] && [ "$(wc -l <is)" -eq 4 ] && same_numbers is want 1e-3' "-clip $clip: the updates are $(cat is), the log has $(cat want) $(cat err)"
done
check 'grep "\"loss\"" clip0.5/log.jsonl | sed "s/.*\"lr\":\([^,]*\).*/\1/" | diff - <(printf "%s\n" 0.0005 0.001 0.001 0.0005)' "learning rates: $(cat clip0.5/log.jsonl)"
check 'same_numbers <(head -1 want) <(logged clip0.5 0 | head -1) 1e-6' "-clip changes the norm in the log"

mkdir b && cp a/ckpt_00000002.bin a/tokenizer.bin b/ && grep "\"step\":[0-2]," a/log.jsonl >b/log.jsonl
run $MODEL $RUN $DATA -o b -y 1
check 'cmp -s a/ckpt_00000004.bin b/ckpt_00000004.bin' "a resumed run gives other bits: $(cat err)"
for r in 1 2; do
    run $MODEL $RUN $DATA -v 0 -o r$r -r $r
    check 'cmp -s a/ckpt_00000004.bin r$r/ckpt_00000004.bin' "-r $r gives other bits: $(cat err)"
done
# With many tokens AdamW runs on a few SMs, beside matmuls that are planned for the others: the same bits, too.
many_tokens() { # MATMUL
    local matmul=$1 size="-layers 3 -b 2"
    if [[ $PROGRAM == *emulator* ]]; then # which takes minutes for the tokens of fp8
        [ $matmul = bf16 ] || return 0
        size="-layers 2 -b 1"
    fi
    local flags="-e recall $size -heads 2 -kv-heads 1 -head-dim 64 -t 4096 -d 8192 -l 1e-3 -u 2 -x 4 -v 0 -matmul $matmul
        -i large/recall_train_*.bin -j large/recall_val_*.bin"
    "$BUILD/recall" -o large -t 4096 -n 16 -m 2 >/dev/null || bad "recall -t 4096"
    run $flags -o large$matmul -n 2
    mkdir again$matmul && cp large$matmul/ckpt_00000002.bin large$matmul/tokenizer.bin again$matmul/ && grep "\"step\":[0-2]," large$matmul/log.jsonl >again$matmul/log.jsonl
    run $flags -o again$matmul -y 1
    check 'cmp -s large$matmul/ckpt_00000004.bin again$matmul/ckpt_00000004.bin' "4,096 tokens, $matmul: a resumed run gives other bits: $(cat err)"
    run $flags -o less$matmul -r 2
    check 'cmp -s large$matmul/ckpt_00000004.bin less$matmul/ckpt_00000004.bin' "4,096 tokens, $matmul: -r 2 gives other bits: $(cat err)"
}
many_tokens bf16
run $MODEL $RUN $DATA -v 0 -b 2 -x 2 -o two && run $MODEL $RUN $DATA -v 0 -d 64 -x 2 -o one
check 'near "$(loss one 2)" "$(loss two 2)" 1e-3 && near "$(norm one 2)" "$(norm two 2)" 1e-2' "accumulation: $(tail -1 one/log.jsonl) $(tail -1 two/log.jsonl)"
for mask in 0 1; do run $MODEL $DATA -t 64 -x 1 -v 0 -u 0 -doc-mask $mask -o mask$mask; done # documents of 33 tokens
check '[ "$(loss mask0 1)" != "$(loss mask1 1)" ]' "-doc-mask has no effect: $(loss mask0 1) $(cat err)"
for attn in full window; do
    run $MODEL $DATA -x 1 -v 0 -attn $attn -doc-mask 0
    check '[ $code -eq 0 ] && grep -q "attention: $attn" out' "-attn $attn: $(cat err)"
done

# ---- fp8: near the 16-bit run, exact resume, recomputation, validation; what it cannot take
run $MODEL $RUN $DATA -o fp8 -n 2 -matmul fp8
if grep -q "^error: -matmul fp8: .*compute capability" err; then
    skipped=$((skipped + 1)) && echo "skipped: -matmul fp8: $(cat err)"
else
    check '[ $code -eq 0 ] && grep -q "^gpu: .*fp8" out && near "$(loss a 4)" "$(loss fp8 4)" 0.02 && ! cmp -s a/ckpt_00000004.bin fp8/ckpt_00000004.bin' \
        "-matmul fp8: $(cat err) $(loss fp8 4), 16 bits $(loss a 4)"
    mkdir fp8b && cp fp8/ckpt_00000002.bin fp8/tokenizer.bin fp8b/ && grep "\"step\":[0-2]," fp8/log.jsonl >fp8b/log.jsonl
    run $MODEL $RUN $DATA -o fp8b -y 1 -matmul fp8
    check 'cmp -s fp8/ckpt_00000004.bin fp8b/ckpt_00000004.bin' "-matmul fp8: a resumed run gives other bits: $(cat err)"
    run $MODEL $RUN $DATA -v 0 -o fp8r -r 2 -matmul fp8
    check 'cmp -s fp8/ckpt_00000004.bin fp8r/ckpt_00000004.bin' "-matmul fp8 -r 2 gives other bits: $(cat err)"
    run -e fp8/ckpt_00000004.bin -val 1 -j 'data/recall_val_*.bin' -b 1 -m 2 -matmul fp8
    check '[ "$(grep -o "^val loss [0-9.]*" out)" = "$(grep -h "val_loss" fp8/log.jsonl | tail -1 | sed "s/.*\"val_loss\":\([0-9.]*\).*/\1/" | xargs printf "val loss %.6f")" ]' "-matmul fp8 -val 1 gives another loss: $(cat out err)"
    many_tokens fp8
    expect_error "-matmul fp8: -hidden 72: must be a multiple of 16; try -hidden 80" $MODEL $DATA -hidden 72 -matmul fp8 -x 1
fi
expect_error "-matmul fp4: must be bf16 or fp8" $MODEL $DATA -matmul fp4 -x 1

# ---- the C trainer resumes from the GPU trainer's checkpoint, and the GPU trainer from the C trainer's
mkdir c && cp a/ckpt_00000002.bin a/tokenizer.bin c/
"$CPU" $MODEL $RUN $DATA -v 0 -o c -y 1 >out 2>err; code=$?
check '[ $code -eq 0 ] && near "$(loss a 4)" "$(loss c 4)" 0.02' "the C trainer's step 4: $(loss c 4), the GPU's $(loss a 4) $(cat err)"
mkdir g && cp c/ckpt_00000004.bin c/tokenizer.bin g/
run $MODEL $RUN $DATA -v 0 -x 5 -o g -y 1 && "$CPU" $MODEL $RUN $DATA -v 0 -x 5 -o c -y 1 >out 2>err
check 'near "$(loss g 5)" "$(loss c 5)" 0.02' "the GPU's step 5: $(loss g 5), the C trainer's $(loss c 5) $(cat err)"

# ---- validation only, text generation, signals
run -e a/ckpt_00000004.bin -val 1 -j 'data/recall_val_*.bin' -b 1 -m 2
check '[ "$(grep -o "^val loss [0-9.]*" out)" = "$(grep -h "val_loss" a/log.jsonl | tail -1 | sed "s/.*\"val_loss\":\([0-9.]*\).*/\1/" | xargs printf "val loss %.6f")" ]' "-val 1 gives another loss: $(cat out err)"
"$CPU" -e a/ckpt_00000004.bin -val 1 -j 'data/recall_val_*.bin' -b 1 -m 2 >c_out 2>err
check 'near "$(sed -n "s/^val loss \([0-9.]*\).*/\1/p" out)" "$(sed -n "s/^val loss \([0-9.]*\).*/\1/p" c_out)" 0.01' "-val 1, the C trainer: $(cat c_out err), the GPU trainer: $(cat out)"
run -e a/ckpt_00000004.bin -val 1 -j 'data/recall_val_*.bin' -b 1 -m 2 -block-indices indices.bin
check '[ $code -eq 0 ] && [ "$(head -c 8 indices.bin)" = nsachose ]' "-block-indices: $(cat err)"
run -e a/ckpt_00000004.bin -val 1 -j 'data/recall_val_*.bin' -b 1 -m 2 -choice former.bin # the former name
check '[ $code -eq 0 ] && cmp -s indices.bin former.bin' "-choice: $(cat err)"
run -h
check 'grep -q -- "-block-indices" out && ! grep -q -- " -choice" out' "-h lists -choice or not -block-indices"
run -e a/ckpt_00000004.bin -sample 1 -prompt 'Remember Mara : lamp .' -g 3 -seed 5
check '[ $code -eq 0 ] && grep -q "^sample: Remember Mara : lamp ." out' "sample: $(cat err)"
cp out first; run -e a/ckpt_00000004.bin -sample 1 -prompt 'Remember Mara : lamp .' -g 3 -seed 5
check 'cmp -s out first' "the same seed generates another text"
"$PROGRAM" $MODEL $DATA -x 100000 -v 0 -o s >out 2>err &
pid=$!
for _ in $(seq 600); do grep -q '"step":2,' s/log.jsonl 2>/dev/null && break; sleep 0.1; done
kill -TERM $pid; wait $pid; code=$?
check '[ $code -eq 143 ] && ls s | grep -q "^ckpt_"' "SIGTERM: $(cat err)"

# ---- steps whose loss is NaN or Inf
BLOW="$MODEL $DATA -v 0 -l 1e6 -c 1e6 -clip 0 -u 0 -x 6"
run $BLOW -o x -n 1
check '[ $code -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "^error: step" err && [ -f x/ckpt_00000001.bin ]' "a loss that is not finite: $(cat err)"
run $BLOW -skip 1 -n 1 -nk 6 -o nonfinite
check '[ $code -eq 0 ] && grep -q "^step 6/6" out && skipped_steps_change_nothing nonfinite' "-skip 1: $(tail -3 out) $(cat err)"

# ---- outliers: a skipped step changes no parameter
OUTLIERS="$MODEL $DATA -v 0 -l 1e-6 -u 0 -sl 0.5 -sg 1 -o z -y 1"
run $OUTLIERS -x 130 -n 130
run $OUTLIERS -x 138 -n 1 -nk 20
check '[ $code -eq 0 ] && grep -q "^warning: step 13[1-8]: outlier skipped" err' "-sl 0.5 -sg 1 skip nothing: $(cat err)"
good=1
for step in $(seq 131 138); do
    grep -q "step $step:" err && want=0 || want=1
    cmp -s -i 4096 z/ckpt_00000$((step - 1)).bin z/ckpt_00000$step.bin
    [ $? -eq $want ] || good=0
done
check '[ $good -eq 1 ]' "skipped steps change the parameters, or others do not: $(cat err)"

# ---- -profile
RESULTS=$T/results.jsonl "$PROGRAM" $MODEL -vocab 100 -profile 1 >out 2>err; code=$?
check '[ $code -eq 0 ] && grep -q "^training step" out && grep -q "attention_backward" out' "-profile: $(cat out err)"
check '[ "$(grep -c "\"part\":\"step\".*\"split\":{.*}}$" results.jsonl)" -eq 2 ]' "-profile records nothing: $(cat results.jsonl)"

# ---- the mean gates of each layer are those of the C trainer
for per_token in 0 1; do
    run $MODEL $DATA -gate-bias -2,0,2 -gate-per-token $per_token -x 1 -v 1 -m 2 -u 0 -o gates$per_token
    "$CPU" -e gates$per_token/ckpt_00000001.bin -val 1 -b 1 -m 2 -j 'data/recall_val_*.bin' 2>err | grep "^mean gates" >want
    check '[ -s want ] && same_numbers want <(grep "^mean gates at step 1:" out) 1e-2' "mean gates, -gate-per-token $per_token: $(cat want out err)"
done

# ---- -full-every: exact resume, recomputation, the C trainer's loss, gates and sample; a full layer selects no blocks
HYBRID="$MODEL $RUN -layers 4 -full-every 2"
run $HYBRID $DATA -o hybrid -n 2
check '[ $code -eq 0 ] && grep -q "^attention: nsa, .*; 2 of 4 layers full (-full-every 2)$" out' "-full-every 2: $(cat out err)"
for r in 0 1 2; do
    mkdir hybrid$r && cp hybrid/ckpt_00000002.bin hybrid/tokenizer.bin hybrid$r/
    run $HYBRID $DATA -o hybrid$r -y 1 -r $r
    check 'cmp -s hybrid/ckpt_00000004.bin hybrid$r/ckpt_00000004.bin' "-full-every 2 -r $r: a resumed run gives other bits: $(cat err)"
done
VAL="-e hybrid/ckpt_00000004.bin -val 1 -b 1 -m 2 -j data/recall_val_*.bin"
run $VAL -block-indices hybrid.bin && "$CPU" $VAL 2>err | grep "^mean gates\|^val loss" >want
check '[ "$(wc -l <want)" -eq 2 ] && same_numbers want <(grep "^mean gates\|^val loss" out) 2e-2' "-full-every: $(cat want out err)"
# 512 bytes a layer: the first query of the nsa layer selects block 0, those of the full layer none
check '[ "$(tail -c 1024 hybrid.bin | head -c 4 | od -An -td4)" -eq 0 ] && [ -z "$(tail -c 512 hybrid.bin | tr -d "\377")" ]' "block indices of -full-every: $(od -An -td4 hybrid.bin)"
run -e hybrid/ckpt_00000004.bin -sample 1 -g 8
check '[ $code -eq 0 ] && grep -q "^sample: " out' "a sample with -full-every: $(cat out err)"
RESULTS=$T/hybrid.jsonl "$PROGRAM" $MODEL -layers 4 -full-every 2 -vocab 100 -profile 1 >out 2>err; code=$?
check '[ $code -eq 0 ] && [ "$(grep -c "\"part\":\"step\".*,\"full_every\":2," hybrid.jsonl)" -eq 2 ]' "-profile with -full-every: $(cat out err)"

# ---- evaluation files: the answers of the C trainer
make_eval_files 68
EVALS="-e a/ckpt_00000004.bin -val 1 -b 1 -mc mc.bin -needle needle.bin"
run $EVALS && "$CPU" $EVALS >c_out 2>err; code=$?
check '[ $code -eq 0 ] && [ "$(grep -c "^mc: \|^needle by" out)" -eq 2 ] && [ "$(grep "^mc: \|^needle by" out)" = "$(grep "^mc: \|^needle by" c_out)" ]' "-mc, -needle: $(cat out c_out err)"
expect_error "-block-indices f: writes those of the shards -j; give them" $EVALS -block-indices f
expect_error "-block-indices f: writes those of the shards -j; drop -hellaswag, -mc and -needle" $EVALS -j 'data/recall_val_*.bin' -block-indices f

# ---- errors
expect_error "-head-dim 32" -e recall -t 32 -b 1 $DATA
expect_error "-channels 60" $MODEL $DATA -channels 60
expect_error "-r 3: must be from 0 to 2" $MODEL $DATA -r 3
expect_error "out of GPU memory" $MODEL $DATA -layers 1000 -channels 8192 -hidden 65536
expect_error "-r 2" $MODEL $DATA -layers 1000 -channels 8192 -hidden 65536
expect_error "-profile 2: does not train; drop -o" $MODEL $DATA -profile 2 -o p
expect_error "-block-indices f: only validation" $MODEL $DATA -block-indices f
expect_error "-block-indices f: only validation" $MODEL $DATA -choice f
expect_error "-cp 2: must divide the number of processes, 1" $MODEL $DATA -o p -cp 2
expect_error "-layers 2: the checkpoint's model has 1" -e a/ckpt_00000004.bin -sample 1 -layers 2
flip=$(($(stat -c %s a/ckpt_00000004.bin) / 4))
cp a/ckpt_00000004.bin flip.bin && printf '\x5a\xa5' | dd of=flip.bin bs=1 seek=$flip conv=notrunc 2>/dev/null
expect_error "flip.bin" -e flip.bin -sample 1

finish_test
