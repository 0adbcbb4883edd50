#!/usr/bin/env bash
# Tests the C trainer from the command line: runs, exact resume, signals, text generation, and every error path.
# Needs CPU (the trainer), BUILD (the folder of recall, text and adamw_step) and COMMIT (the trainer's), which make
# test sets.
set -u
root=$PWD PROGRAM=${CPU:-./train_gpt_nsa_cpu}
. dev/test/checks.sh

"$BUILD/recall" -o data -t 64 -n 40 -m 20 >/dev/null || bad "recall"
TINY="-e recall -t 64 -b 2 -l 1e-3 -u 2 -x 6 -v 3 -m 2"
BARE="-e recall -t 64 -b 2 -x 6" # for runs without validation shards
DATA="-i data/recall_train_*.bin -j data/recall_val_*.bin"
set -f # the shell does not expand glob patterns

# ---- runs, and exact resume
run $TINY $DATA -o a -n 3
check '[ $code -eq 0 ]' "a short run: $(cat err)"
check 'grep -q "^val loss [0-9]*\.[0-9]* | perplexity [0-9.]* | [0-9.]* bits/byte | [0-9]* tokens | step " out' "no line 'val loss': $(cat out)"
check 'grep -q "^recall by distance" out' "no recall accuracy"
check '[ "$(grep -c "^{\"step\":[0-9]*,\"loss\"" a/log.jsonl)" -eq 6 ]' "log.jsonl does not have 6 steps"
check '[ -f a/ckpt_00000003.bin ] && [ -f a/ckpt_00000006.bin ] && [ -f a/tokenizer.bin ]' "checkpoints are missing"
check 'grep -q "^expected: .* for the other 3 steps" out' "the expected time: $(cat out)"
if command -v python3 >/dev/null; then
    check 'python3 - a/log.jsonl <<"END"
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
start = rows[0]["start"]
assert all("step" in row and row["tokens"] == 128 * row["step"] for row in rows), "step, tokens"
assert start["flags"]["x"] == 6 and start["flags"]["i"].startswith("data/") and start["flags"]["l"] == 1e-3, "flags"
assert start["model"]["layers"] == 2 and start["model"]["attn"] == "nsa" and start["gpu"] is None, "model"
assert start["processes"] == 1 and start["date"].endswith("Z") and "commit" in start, "start"
END' "the first line of log.jsonl: $(head -1 a/log.jsonl)"
fi
mkdir b && cp a/ckpt_00000003.bin a/tokenizer.bin b/ && grep "\"step\":[0-3]," a/log.jsonl >b/log.jsonl
run $TINY $DATA -o b -n 3 -y 1
check 'cmp -s a/ckpt_00000006.bin b/ckpt_00000006.bin' "a resumed run gives other bits"
run $TINY $DATA -o b -n 3 -y 1
check '[ $code -eq 0 ] && grep -q "all 6 steps are done" out' "a finished run does not say so"
OMP_NUM_THREADS=1 run $TINY $DATA -o c -n 6
check 'cmp -s a/ckpt_00000006.bin c/ckpt_00000006.bin' "one thread gives other bits"
run $TINY $DATA -o k -n 1 -nk 2
set +f
check '[ "$(ls k/ckpt_*.bin | wc -l)" -eq 2 ] && [ -f k/ckpt_00000006.bin ]' "-nk 2 kept $(ls k)"
set -f
for attn in full window; do
    run $TINY $DATA -attn $attn
    check '[ $code -eq 0 ] && grep -q "attention: $attn" out' "-attn $attn: $(cat err)"
done
run $TINY $DATA -d 512 -x 2 -doc-mask 0 -gate-per-token 1 -phi mean -o accumulated
check '[ $code -eq 0 ] && grep -q "512 tokens per step (4 x 2 x 64)" out' "gradient accumulation: $(cat out err)"
check 'grep -q "^{\"step\":2,.*\"tokens\":1024}" accumulated/log.jsonl' "tokens of two steps of 512: $(tail -1 accumulated/log.jsonl)"

# one step of 4 micro-batches equals one step of a batch of 4, up to rounding
run -e recall -t 64 -b 4 -d 256 -x 2 $DATA && grep "^step 2" out | sed 's/.*loss \([0-9.]*\).*norm \([0-9.]*\).*/\1 \2/' >one
run -e recall -t 64 -b 1 -d 256 -x 2 $DATA && grep "^step 2" out | sed 's/.*loss \([0-9.]*\).*norm \([0-9.]*\).*/\1 \2/' >four
check '[ -s one ] && cmp -s one four' "accumulation differs: $(cat one four)"

# ---- the updates: each checkpoint is AdamW's next step after the one before, with the rate and the clipping of the flags
UPDATES="-e recall -t 64 -b 2 -l 1e-3 -u 4 -k linear -q 0 -x 8 -v 0 -n 1 -nk 9 -beta1 0.8 -beta2 0.9 -eps 1e-6 -c 2 $DATA"
for clip in 0 0.5 100; do
    run $UPDATES -clip $clip -o clip$clip
    updates clip$clip 0.8 0.9 1e-6 2 >is 2>err; logged clip$clip $clip >want
    check '[ ! -s err ] && [ "$(wc -l <is)" -eq 8 ] && same_numbers is want 1e-3' "-clip $clip: the updates are $(cat is), the log has $(cat want) $(cat err)"
done
check 'grep "\"loss\"" clip0.5/log.jsonl | sed "s/.*\"lr\":\([^,]*\).*/\1/" | diff - <(printf "%s\n" 0.00025 0.0005 0.00075 0.001 0.001 0.00075 0.0005 0.00025)' "learning rates: $(cat clip0.5/log.jsonl)"
check 'same_numbers <(head -1 want) <(logged clip0.5 0 | head -1) 1e-6' "-clip changes the norm in the log"

# a validation shard that is a training shard, too, by another path
run $TINY -x 1 -u 1 -i 'data/recall_*.bin' -j "$PWD/data/recall_val_*.bin"
check '[ $code -eq 0 ] && [ "$(cat err)" = "warning: -i and -j share shard $PWD/data/recall_val_000000.bin: validation measures training data" ]' "shared shards: $(cat err)"

# -a 1: the loss on one batch becomes much smaller
run -e recall -t 64 -b 2 -l 5e-3 -x 60 -a 1 -v 0 $DATA
check 'awk "/^step 1\//{a=\$5} /^step 60\//{b=\$5} END{exit !(b > 0 && b < a / 3)}" out' "-a 1 does not overfit"

# ---- validation only, samples
run -e a/ckpt_00000006.bin -val 1 -j 'data/recall_val_*.bin' -b 2 -m 2
check '[ "$(grep -o "^val loss [0-9.]*" out)" = "$(grep -h "val_loss" a/log.jsonl | tail -1 | sed "s/.*\"val_loss\":\([0-9.]*\).*/\1/" | xargs printf "val loss %.6f")" ]' "-val 1 gives another loss: $(cat out err)"
run -e a/ckpt_00000006.bin -sample 1 -prompt 'Remember Mara : lamp . Recall Mara :' -g 8 -seed 5
check '[ $code -eq 0 ] && grep -q "^sample: Remember Mara : lamp . Recall Mara :" out' "sample: $(cat out err)"
cp out first; run -e a/ckpt_00000006.bin -sample 1 -prompt 'Remember Mara : lamp . Recall Mara :' -g 8 -seed 5
check 'cmp -s out first' "the same seed generates another text"
run -e a/ckpt_00000006.bin -sample 1 -prompt 'Remember Mara : lamp . Recall Mara :' -g 8 -seed 5 -t 64 -b 4
check '[ "$(grep ^sample out)" = "$(grep ^sample first)" ]' "a sample with -t and -b is another text: $(cat out err)"
run $TINY $DATA -vocab 100 -x 1 -u 1 -s 1 -g 150 -temp 1e6 # a padded vocabulary: nearly uniform among 68 tokens
check '[ $code -eq 0 ] && [ "$(grep -c "^note: -vocab 100: tokenizer.bin has 68 tokens" err)" -eq 1 ] && grep -q "vocabulary 100" out' "-vocab 100: $(cat out err)"
run -e a/ckpt_00000006.bin -sample 1 -g 150 -temp 1 # more tokens than the context
check '[ $code -eq 0 ]' "a sample longer than the context: $(cat err)"
run $TINY $DATA -s 3 -g 5
check '[ "$(grep -c "^sample: " out)" -eq 2 ]' "-s 3: $(grep sample out)"

# ---- start and resume from a checkpoint at a longer context
"$BUILD/recall" -o long -t 128 -n 20 -m 10 >/dev/null
run -e a/ckpt_00000006.bin -t 128 -b 1 -x 2 -i 'long/recall_train_*.bin' -o l -theta 20000
check '[ $code -eq 0 ]' "a longer context: $(cat err)"
cp -r a d
LONGER="-e recall -t 128 -b 1 -x 8 -i long/recall_train_*.bin -o d -y 1"
expect_error "-new-data 1" $LONGER
run $LONGER -new-data 1
check '[ $code -eq 0 ] && grep -q "^step 8/8" out && grep -q "new epoch" err' "resumed at a longer context: $(cat err)"

# ---- resume says so if the data is not that of the run
rm d/ckpt_00000008.bin
"$BUILD/recall" -o other -t 64 -n 40 -m 20 -seed 99 >/dev/null || bad "recall -s"
expect_error "the shards recall_train_000000.bin to recall_train_000000.bin have other tokens" $BARE -x 8 -i 'other/recall_train_*.bin' -o d -y 1
mkdir moved && cp data/recall_train_000000.bin data/tokenizer.bin moved/
run $BARE -x 8 -i 'moved/recall_train_*.bin' -o d -y 1
check '[ $code -eq 0 ] && [ ! -s err ]' "the same shards in another folder: $(cat err)"
rm d/ckpt_00000008.bin d/tokenizer.bin moved/tokenizer.bin
expect_error "tokenizer.bin is not that of the run" $BARE -vocab 68 -x 8 -i 'moved/recall_train_*.bin' -o d -y 1
run $BARE -vocab 68 -x 8 -i 'moved/recall_train_*.bin' -o d -y 1 -new-data 1
check '[ $code -eq 0 ] && grep -q "^note: .*a new epoch begins" err' "-new-data 1: $(cat err)"

# ---- a stop at a step with validation and a text sample: the resumed run goes on as if it had not stopped
EVERY="-e recall -t 64 -b 2 -u 0 -q 1 -l 1e-3 -v 1 -m 1 -s 1 -g 3 $DATA"
"$PROGRAM" $EVERY -x 100000 -o stopped >first 2>err &
pid=$!
for _ in $(seq 300); do grep -q '"step":3,' stopped/log.jsonl 2>/dev/null && break; sleep 0.05; done
kill -TERM $pid; wait $pid
last=$(($(sed -n 's/^stopped by signal 15 after step \([0-9]*\); resume with -y 1$/\1/p' first) + 2))
run $EVERY -x $last -o stopped -y 1; cp out second
run $EVERY -x $last -o whole
printf -v name 'ckpt_%08d.bin' $last
events() { sed 's/"ms".*"mfu"/"mfu"/; s/,"memory_bytes.*//' "$1/log.jsonl" | grep -v '"start"'; }
check 'cmp -s stopped/$name whole/$name' "stopped at a step with a sample: other bits"
check '[ "$(events stopped)" = "$(events whole)" ]' "stopped at a step with validation: $(diff <(events stopped) <(events whole) | head -5)"
check '[ "$(grep -h ^sample first second)" = "$(grep ^sample out)" ]' "stopped at a step with a sample: other texts"
run $EVERY -x $last -o whole -y 1
check 'grep -q "^val loss" out && grep -q "^sample" out && [ "$(events stopped)" = "$(events whole)" ]' "a finished run shows its result, and logs it once"
# killed after the checkpoint that precedes the validation and the sample: the resumed run begins with these
"$BUILD/recall" -o slow -t 64 -n 1 -m 200 >/dev/null || bad "recall"
SLOW="$EVERY -d 4096 -m 0 -j slow/recall_val_*.bin" # the signal comes in a step, the kill in its validation
"$PROGRAM" $SLOW -x 100000 -o killed >first 2>err &
pid=$!
for _ in $(seq 600); do grep -q '"step":3,.*"gates"' killed/log.jsonl 2>/dev/null && break; sleep 0.02; done
sleep 0.05
kill -TERM $pid
for _ in $(seq 3000); do [ -n "$(find killed -name 'ckpt_*.bin')" ] && break; sleep 0.001; done
kill -KILL $pid 2>/dev/null; wait $pid
last=$(basename "$(find killed -name 'ckpt_*.bin')" .bin) last=$((10#${last#ckpt_} + 2))
run $SLOW -x $last -o killed -y 1
run $SLOW -x $last -o unkilled
printf -v name 'ckpt_%08d.bin' $last
check 'cmp -s killed/$name unkilled/$name' "killed before a sample that was due: other bits"
rm unkilled/$name
expect_error "-o unkilled: has a log already; choose another folder, or resume with -y 1" $SLOW -x 1 -o unkilled

# ---- a prompt that cannot be encoded ends the run before its first step
expect_error "the vocabulary has no word 'foo'" $TINY $DATA -s 3 -prompt foo

# ---- a signal in the last step: the run is complete
"$PROGRAM" $TINY $DATA -x 1 -u 0 -v 0 -d 65536 -o last_step >out 2>err &
pid=$!
sleep 1; kill -TERM $pid 2>/dev/null; wait $pid; code=$?
check '[ $code -eq 0 ] && [ -f last_step/ckpt_00000001.bin ] && ! grep -q "^stopped" out' "a signal in the last step: $code $(tail -n 1 out)"

# ---- the output folder is removed in mid-run
"$PROGRAM" $TINY $DATA -x 100000 -v 0 -o removed >out 2>err &
pid=$!
for _ in $(seq 300); do grep -q '"step":3,' removed/log.jsonl 2>/dev/null && break; sleep 0.05; done
mv removed removed_away
for _ in $(seq 50); do kill -0 $pid 2>/dev/null || break; sleep 0.1; done
kill -KILL $pid 2>/dev/null; wait $pid; code=$?
check '[ $code -eq 1 ] && grep -q "^error: removed/log.jsonl is gone" err' "a removed folder: $code $(cat err)"

# ---- one run a folder
"$PROGRAM" $TINY $DATA -x 100000 -v 0 -n 1 -o one_run >out 2>err &
pid=$!
for _ in $(seq 300); do grep -q '"step":3,' one_run/log.jsonl 2>/dev/null && break; sleep 0.1; done
for y in 0 1; do
    timeout 10 "$PROGRAM" $TINY $DATA -x 100000 -v 0 -n 1 -o one_run -y $y >out 2>err; code=$?
    check '[ $code -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "^error: -o one_run: process $pid on host $(hostname) writes" err' "a second run on one folder, -y $y: $code $(cat err)"
done
kill -TERM $pid; wait $pid
check 'grep -q "\"step\":1," one_run/log.jsonl' "a second run truncates the log of the first"
run $TINY $DATA -x 1 -v 0 -u 0 -o one_run -y 1
check '[ $code -eq 0 ]' "the folder stays locked: $(cat err)"

# ---- signals and kills
for signal in INT TERM HUP USR1 USR2; do
    "$PROGRAM" $TINY $DATA -x 100000 -v 0 -o s$signal -y 1 >out 2>err &
    pid=$!
    for _ in $(seq 300); do grep -q '"step":3,' s$signal/log.jsonl 2>/dev/null && break; sleep 0.1; done
    kill -$signal $pid; wait $pid; code=$?
    check "[ $code -eq $((128 + $(kill -l $signal))) ]" "SIG$signal: code $code"
    check 'grep -q "^stopped by signal .*; the same command resumes it$" out' "SIG$signal: $(tail -n 1 out)"
    check '[ "$(cat err)" = "note: stopping after this step, with a checkpoint; the same signal again stops at once, without one" ]' "SIG$signal: $(cat err)"
    run $TINY $DATA -x 3 -v 0 -o s$signal -y 1
    check '[ $code -eq 0 ] && grep -q "^all 3 steps are done" out' "no checkpoint after SIG$signal: $(cat err)"
done
# nobody reads stderr any more, as after a closed terminal
"$PROGRAM" $TINY $DATA -x 100000 -v 0 -o sunread >out 2> >(true) &
pid=$!
for _ in $(seq 300); do grep -q '"step":3,' sunread/log.jsonl 2>/dev/null && break; sleep 0.1; done
kill -HUP $pid; wait $pid; code=$?
check '[ $code -eq 129 ] && ls sunread | grep -q "^ckpt_"' "SIGHUP with a closed stderr: code $code"
# a signal before a validation: the checkpoint comes first
"$PROGRAM" $TINY $DATA -x 100000 -v 1 -m 0 -o sfirst >out 2>err &
pid=$!
for _ in $(seq 300); do grep -q '"step":3,' sfirst/log.jsonl 2>/dev/null && break; sleep 0.1; done
kill -TERM $pid; wait $pid; code=$?
check '[ $code -eq 143 ] && ls sfirst | grep -q "^ckpt_"' "SIGTERM at a step with validation: code $code"
cp sfirst/log.jsonl want
expect_error "-o sfirst: has a log already; -val 1 needs a folder without one" -e sfirst/$(ls sfirst | grep -m 1 ^ckpt_) -val 1 -j 'data/recall_val_*.bin' -o sfirst
check 'cmp -s want sfirst/log.jsonl' "-val 1 changed the log of a run"
expect_error "-o sfirst: -sample 1 writes no log" -e sfirst/$(ls sfirst | grep -m 1 ^ckpt_) -sample 1 -o sfirst
run -e sfirst/$(ls sfirst | grep -m 1 ^ckpt_) -val 1 -j 'data/recall_val_*.bin' -o validated
step=$(ls sfirst | sed -n '/^ckpt_/{s/ckpt_0*\([0-9]*\).bin/\1/p;q;}')
check '[ $code -eq 0 ] && [ "$(ls -A validated | grep -v "^.lock$")" = log.jsonl ] && head -1 validated/log.jsonl | grep -q "^{\"step\":$step,\"tokens\":[1-9].*\"start\"" &&
    grep -q "^{\"step\":$step,.*\"val_loss\"" validated/log.jsonl' "-val 1 -o: $(cat err) $(cat validated/log.jsonl)"
run -e sfirst/$(ls sfirst | grep -m 1 ^ckpt_) -sample 1 -g 4 -d 512
check '[ $code -eq 0 ]' "-sample 1 -d 512: $(cat err)"
good=1
for i in 1 2 3 4 5; do
    "$PROGRAM" $TINY $DATA -x 100000 -v 0 -n 1 -nk 2 -y 1 -o killed >out 2>err &
    pid=$!
    for _ in $(seq 300); do grep -q '"step":[0-9]*[1-9],' killed/log.jsonl 2>/dev/null && break; sleep 0.1; done
    sleep 0.$((RANDOM % 9 + 1)); kill -9 $pid; wait $pid 2>/dev/null
    run $TINY $DATA -x 1 -u 0 -v 0 -y 1 -o killed || good=0
done
check '[ $good -eq 1 ]' "no good checkpoint after a kill: $(cat err)"
set +f; check '[ -z "$(ls killed | grep tmp)" ]' "unfinished files are left: $(ls killed)"; set -f

(trap '' HUP; exec "$PROGRAM" $TINY $DATA -x 100000 -v 0 -o nohup >out 2>err) & # as under nohup
pid=$!
for _ in $(seq 300); do grep -q '"step":3,' nohup/log.jsonl 2>/dev/null && break; sleep 0.1; done
kill -HUP $pid; sleep 0.2
check 'kill -USR1 $pid' "SIGHUP ends a run under nohup"
wait $pid

# ---- stdout that is closed or full: a training run goes on, other programs fail
PIPED="$TINY $DATA -n 3"
{ sleep 0.5; "$PROGRAM" $PIPED -o pipe 2>err; echo $? >pipe_code; } | true
check '[ "$(cat pipe_code)" -eq 0 ] && cmp -s a/ckpt_00000006.bin pipe/ckpt_00000006.bin && grep -q "^warning: the console" err' "a pipe that nobody reads: $(cat pipe_code err)"
"$PROGRAM" $PIPED -o closed 2>err >&-; code=$?
check '[ $code -eq 0 ] && cmp -s a/ckpt_00000006.bin closed/ckpt_00000006.bin && [ "$(wc -l <a/log.jsonl)" -eq "$(wc -l <closed/log.jsonl)" ]' "a closed stdout: $code $(cat err)"
if [ -w /dev/full ]; then
    "$PROGRAM" $PIPED -o full >/dev/full 2>err; code=$?
    check '[ $code -eq 0 ] && cmp -s a/ckpt_00000006.bin full/ckpt_00000006.bin && grep -q "^warning: the console" err' "a full stdout: $code $(cat err)"
    for flags in "-h" "-e a/ckpt_00000006.bin -sample 1 -g 3" "-e a/ckpt_00000006.bin -val 1 -b 2 -m 1 -j data/recall_val_*.bin" "$TINY $DATA"; do
        "$PROGRAM" $flags >/dev/full 2>err; code=$?
        check '[ $code -eq 1 ] && [ "$(grep -c "^error: cannot write to stdout" err)" -eq 1 ]' "a full stdout, $flags: $code $(cat err)"
    done
else
    skipped=$((skipped + 1)) && echo "skipped: a full stdout: no /dev/full"
fi
# ---- a limit of the size of files
(ulimit -f 100; exec "$PROGRAM" $TINY $DATA -o limited) >out 2>err; code=$?
check '[ $code -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "^error: cannot write limited/ckpt_00000006.bin.tmp: File too large; check the free disk space and ulimit -f$" err' "ulimit -f, the trainer: $code $(cat err)"
head -c 300000 /dev/zero >zeros.txt
(ulimit -f 100; exec "$BUILD/text" -o limited_text zeros.txt) >out 2>err; code=$?
check '[ $code -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "^error: cannot write limited_text/.*: File too large; check" err' "ulimit -f, build/text: $code $(cat err)"

# ---- bad shards
head -c 2000 data/recall_train_000000.bin >cut_000.bin
expect_error "truncated" $BARE -vocab 68 -i 'cut_*.bin'
head -c 1024 /dev/zero >zero_000.bin
expect_error "magic" $BARE -i 'zero_*.bin' -vocab 68
cp data/recall_train_000000.bin v_000.bin && printf '\x09' | dd of=v_000.bin bs=1 seek=4 conv=notrunc 2>/dev/null
expect_error "version" $BARE -i 'v_*.bin' -vocab 68
mkdir -p small && cp data/recall_train_000000.bin small/
expect_error "vocabulary size is unknown" $BARE -i 'small/*.bin'
expect_error "-i data: is a folder; give a quoted pattern" $BARE -i data
expect_error "-j data: is a folder" $BARE -i 'small/*.bin' -j data
expect_error "data/tokenizer.bin is not a shard" $BARE -i data/tokenizer.bin
expect_error "no shard matches 'nothing*': check the pattern, or make data first with build/recall, build/text or data/bpe" $BARE -i 'nothing*'
expect_error "-e: choose a model for this data" -t 64 -b 2 -x 1 -i 'small/*.bin' -vocab 68
expect_error "outside the vocabulary of 20" $BARE -i 'small/*.bin' -vocab 20
expect_error "nothing_*.bin" $BARE -i 'nothing_*.bin' -vocab 20
expect_error "4097" $BARE -i 'small/*.bin' -vocab 68 -t 4096

# ---- bad flags
expect_error "-atn: unknown flag" $TINY $DATA -atn full
expect_error "-x: its value is missing" $DATA -x
expect_error "-b 12x: must be a whole number" $TINY $DATA -b 12x
expect_error "-l -1: must be from 0" $TINY $DATA -l -1
expect_error "error: -heads 4: must be a multiple of -kv-heads 3; try -heads 3" $TINY $DATA -heads 4 -kv-heads 3
expect_error "error: -topk 2: must be at least -init-blocks 1 + -local-blocks 2 = 3" $TINY $DATA -topk 2
expect_error "error: -topk 5000" $TINY $DATA -topk 5000
expect_error "error: -head-dim 1024" $TINY $DATA -head-dim 1024
expect_error "error: -cmp-stride 4: must divide -cmp-len 10; try -cmp-len 8" $TINY $DATA -cmp-len 10
expect_error "error: -block 24: must be a multiple of 16, at least 16; try -block 16" $TINY $DATA -block 24
expect_error "error: -heads 34: must be at most 16 times -kv-heads 2; try -heads 32" $TINY $DATA -heads 34 -kv-heads 2
expect_error "error: -rope-factor 0.5: must be 0" $TINY $DATA -rope-factor 0.5
expect_error "-d 300: must be a multiple of b*t = 128; try -d 384" $TINY $DATA -d 300
expect_error "-u 100: warm-up is longer" $TINY $DATA -u 100
expect_error "-y 1: needs the folder" $TINY $DATA -y 1
expect_error "-e nowhere: neither a preset" -e nowhere $DATA
expect_error "no training data: give shards with -i" -e recall
expect_error "-sample 1: needs a trained model" -e recall -sample 1
expect_error "-sample 1 -val 1: cannot be combined" -e a/ckpt_00000006.bin -val 1 -sample 1
expect_error "no word 'Nobody'" -e a/ckpt_00000006.bin -sample 1 -prompt 'Remember Nobody'
expect_error "-prompt: 160 tokens, but the context of 64 has space for 62" -e a/ckpt_00000006.bin -sample 1 -prompt "$(yes 'Recall Mara : lamp .' | head -40 | tr '\n' ' ')"
expect_error "-o a: holds checkpoints up to step 6; resume with -y 1" $TINY $DATA -o a
expect_error "-layers 3: the checkpoint's model has 2" $TINY $DATA -o a -y 1 -layers 3
expect_error "-attn window: the checkpoint's model has nsa" $TINY $DATA -o a -y 1 -attn window
expect_error "-full-every 2: the checkpoint's model has 0" $TINY $DATA -o a -y 1 -full-every 2
expect_error "-full-every -1: must be from 0 to 10000" $TINY $DATA -full-every -1
expect_error "-full-every 3: must be 0 (off), or from 2 to -layers 2" $TINY $DATA -full-every 3
expect_error "-full-every 2: with -attn full all layers have full attention; drop it" $TINY $DATA -attn full -full-every 2
expect_error "-vocab 60: tokenizer.bin has 68 tokens" $TINY $DATA -vocab 60
expect_error "-r: only the GPU trainer has this flag" $TINY $DATA -r 1
expect_error "-choice: only the GPU trainer has this flag" $TINY $DATA -choice f
OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_RANK=3 expect_error "OMPI_COMM_WORLD_SIZE 8: mpirun started several processes" $TINY $DATA -o many
SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0 expect_error "SLURM_STEP_NUM_TASKS 4: srun started several processes" $TINY $DATA -o many
touch plain
expect_error "cannot create folder plain: a file has that name" $TINY $DATA -o plain/x

# ---- bad checkpoints
head -c 100000 a/ckpt_00000006.bin >cut.bin
expect_error "truncated" -e cut.bin -sample 1
cp a/ckpt_00000006.bin flip.bin && printf '\x5a' | dd of=flip.bin bs=1 seek=70001 conv=notrunc 2>/dev/null
expect_error "flip.bin: damaged: wrong checksum of the parameters" -e flip.bin -sample 1
expect_error "data/tokenizer.bin: not a checkpoint" -e data/tokenizer.bin -sample 1
mkfifo fifo.bin
for file in fifo.bin /dev/zero; do
    timeout 10 "$PROGRAM" -e $file -sample 1 >out 2>err; code=$?
    check '[ $code -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "^error: $file: cannot open the checkpoint: it is not a file but a " err' "-e $file: $code $(cat err)"
done
cp -r a special && mkfifo special/ckpt_00000008.bin && mkdir special/ckpt_00000009.bin special/ckpt_00000002.bin
timeout 60 "$PROGRAM" $TINY $DATA -x 7 -nk 4 -o special -y 1 >out 2>err; code=$?
check '[ $code -eq 0 ] && grep -q "after step 6 of 7" out && [ "$(grep -c "^warning: skipped: .*it is not a file but" err)" -eq 2 ]' "a FIFO and folders named as checkpoints: $code $(cat out err)"
cp flip.bin b/ckpt_00000006.bin # resume falls back to the checkpoint before
run $TINY $DATA -o b -n 3 -y 1
check 'grep -q "after step 3 of 6" out && grep -q "ckpt_00000006" err && cmp -s a/ckpt_00000006.bin b/ckpt_00000006.bin' "a bad newest checkpoint: $(cat out err)"
expect_error "training stopped; try a lower -l" $TINY $DATA -l 1e6 -clip 0 -u 0 -x 20 -v 0
run $TINY $DATA -l 1e6 -c 1e6 -clip 0 -u 0 -x 20 -v 0 -skip 1 -n 1 -nk 20 -o nonfinite
check '[ $code -eq 0 ] && grep -q "^step 20/20" out && skipped_steps_change_nothing nonfinite' "-skip 1: $(tail -2 out) $(head -3 err)"
if [ "$(id -u)" -ne 0 ]; then
    mkdir locked && chmod 500 locked
    expect_error "cannot create folder locked/x: Permission denied" $TINY $DATA -o locked/x
else
    skipped=$((skipped + 1)) && echo "skipped: a folder that root may not write"
fi
run -h
check '[ $code -eq 0 ] && grep -q -- "-attn" out && grep -q "^  -z, -zero *\[GPU\]" out && ! grep -q "^  -b,.*\[GPU\]" out' "-h"
run --version
check '[ $code -eq 0 ] && grep -q "^train_gpt_nsa_cpu [0-9]*\.[0-9]" out' "--version: $(cat out err)"

for wait in "" ACTIVE; do
    env -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT ${wait:+OMP_WAIT_POLICY=$wait} OMP_DISPLAY_ENV=true "$PROGRAM" -h >out 2>err
    check 'grep OMP_WAIT_POLICY err | tail -1 | grep -q "${wait:-PASSIVE}"' "OpenMP threads do not wait ${wait:-passively}: $(cat err)"
done
expect_error "GiB needed, " -e qwen3-14b -vocab 68 -layers 4000 -t 64 -b 2 -x 1 -i 'small/*.bin'
limited() { (ulimit -v 700000; OMP_NUM_THREADS=1 exec "$PROGRAM" -vocab 68 -x 1 -i small/recall_train_000000.bin "$@") >out 2>err; code=$?; }
limited -e tiny -t 128 -b 512
check '[ $code -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "^error: out of memory: [0-9.]* GiB needed, 0\.[0-9]* GiB granted by the system (ulimit -v): .*; lower -b or -t" err' "too little memory is granted: $code $(cat err)"
limited -e tiny -t 64 -b 1048576
check '[ $code -eq 1 ] && grep -q "^error: out of memory: 1.00 GiB for batches of 67108864 tokens; lower -b or -t$" err' "a large batch: $code $(cat err)"
expect_error "lower -b or -t" -e tiny -vocab 68 -t 64 -b 16777216 -x 1 -i 'small/*.bin'

# ---- defaults, long forms, schedules, outliers
run --train=data/recall_train_*.bin --context=64 --batch 2 -steps=3
check '[ $code -eq 0 ] && grep -q "^learning rate: 0.002 after 0 steps of warm-up, cosine to 0.0002 at step 3" out && grep -q "^no -o: neither" out' "long forms: $(cat out err)"
run -i data/recall_train_*.bin -t 64 -b 4 -x -1
check '[ $code -eq 0 ] && grep -q "^step 10/10" out' "-x -1 is not one epoch of 40 samples: $(cat err; tail -1 out)"
run $BARE -i data/recall_train_*.bin -l 0.01 -u 1 -x 2 -k wsd -o lr
run -t 64 -b 2 -i data/recall_train_*.bin -x 10 -k wsd -o lr -y 1
check '[ $code -eq 0 ] && grep -q "^learning rate: 0.01 after 1 steps of warm-up, wsd" out' "a resumed run does not keep -l: $(cat out err)"
run -t 64 -b 2 -i data/recall_train_*.bin -x 150 -l 1e-6 -sl 1 -sg 1 -o outliers -n 140
check '[ $code -eq 0 ] && grep -q "^warning: step 1[0-9]*: outlier skipped" err && ! grep -q "step [0-9][0-9]:" err' "-sl 1 -sg 1 skip nothing: $(cat err)"
rm outliers/ckpt_00000150.bin; grep outlier err | grep "step 14[1-9]\|step 150" >first
run -t 64 -b 2 -i data/recall_train_*.bin -x 150 -l 1e-6 -sl 1 -sg 1 -o outliers -n 1 -nk 20 -y 1
check '[ $code -eq 0 ] && cmp -s err first' "outliers of a resumed run: $(cat err first)"
good=1
for step in $(seq 141 150); do # a skipped step changes no parameter
    grep -q "step $step:" err && want=0 || want=1
    cmp -s -i 4096 outliers/ckpt_00000$((step - 1)).bin outliers/ckpt_00000$step.bin
    [ $? -eq $want ] || good=0
done
check '[ $good -eq 1 ]' "skipped steps change the parameters, or others do not: $(cat err)"

# ---- byte shards, and shards in llm.c's format
printf 'The quick brown fox jumps over the lazy dog. %.0s' $(seq 60) >fox.txt
"$BUILD/text" -o fox -name fox fox.txt >/dev/null
run -e tiny -layers 1 -t 32 -b 2 -x 3 -v 3 -s 3 -g 5 -i 'fox/fox_train_*.bin' -j 'fox/fox_val_*.bin'
check '[ $code -eq 0 ] && grep -q "vocabulary 257" out' "bytes of text: $(cat err)"
mkdir gpt2 && {
    printf '\x88\xd8\x34\x01\x01\x00\x00\x00\xe8\x03\x00\x00'; head -c 1012 /dev/zero; head -c 2000 /dev/zero
} >gpt2/fineweb_train_000001.bin
run -e recall -vocab 50257 -layers 1 -channels 16 -t 32 -b 1 -x 1 -i 'gpt2/fineweb_train_*.bin'
check '[ $code -eq 0 ] && grep -q "vocabulary 50257" out' "llm.c's GPT-2 shards: $(cat err)"

# ---- the numbers of a validation, and the commit
run -e a/ckpt_00000006.bin -val 1 -b 3 -j 'data/recall_val_*.bin'
check 'grep -q "^val loss .* | 1280 tokens | step 6$" out && grep -q "^recall by distance at step 6" out' "-val 1 does not validate all 20 samples: $(cat out err)"
run -e a/ckpt_00000006.bin -val 1 -b 2 -m 1 -j 'data/recall_val_*.bin'
check 'grep -q " | 128 tokens | step 6$" out' "-val 1 -m 1: $(cat out err)"
mkdir docs && for i in 1 2 3; do printf 'The quick brown fox jumps. %.0s' $(seq 20) >docs/$i.txt; done
ln -s nowhere docs/4.txt
"$BUILD/text" -o several -name docs docs >/dev/null
run -e tiny -layers 1 -t 32 -b 2 -x 2 -v 2 -m 0 -i 'several/docs_train_*.bin' -j 'several/docs_train_*.bin' -o bytes
check 'awk -F"[ |]+" "/^val loss/ { bits = \$3 / log(2) * \$8 / (\$8 - 2); e = bits / \$6 - 1; p = exp(\$3) / \$5 - 1
    n += e * e < 1e-10 && p * p < 1e-10 && \$6 > 0 } END { exit n != 2 }" out' "perplexity, bits per byte without the 2 end-of-text tokens: $(grep val out)"
check '[ "$(head -1 bytes/log.jsonl | grep -c "\"tokenizer\":\"[0-9a-f]*\"")" -eq 1 ]' "no checksum of the tokenizer in the log"
run --version
check 'grep -q "commit $COMMIT$" out && head -1 bytes/log.jsonl | grep -qF "\"commit\":\"$COMMIT\""' "the commit is not $COMMIT: $(cat out) $(head -c 200 bytes/log.jsonl)"

# ---- mean gates: at step 0 they are nearly the sigmoids of their biases
for per_token in 0 1; do
    run $TINY $DATA -gate-bias -2,0,2 -gate-per-token $per_token -x 3 -o gates$per_token
    check 'awk "/^mean gates at step 0:/ { e = (\$7 - 0.1192) ^ 2 + (\$10 - 0.5) ^ 2 + (\$13 - 0.8808) ^ 2; n++ } END { exit !(n == 1 && e < 1e-3) }" out' "mean gates, -gate-per-token $per_token: $(cat out err)"
    check '[ "$(grep -c "^{\"step\":[03],\"tokens\":[0-9]*,\"gates\":\[\[0.[0-9]*,0.[0-9]*,0.[0-9]*\],\[0.[0-9]*,0.[0-9]*,0.[0-9]*\]\]}$" gates$per_token/log.jsonl)" -eq 2 ]' "gates in the log: $(cat gates$per_token/log.jsonl)"
done
run $TINY $DATA -attn full
check '! grep -q "mean gates" out' "-attn full has gates: $(cat out)"

# ---- -full-every: training, exact resume with the checkpoint's value, no gates of a full layer, text
run $TINY $DATA -full-every 2 -gate-bias -2,0,2 -n 3 -o hybrid
check '[ $code -eq 0 ] && grep -q "^attention: nsa, .*; 1 of 2 layers full (-full-every 2)$" out' "-full-every 2: $(cat out err)"
check 'awk "/^mean gates at step 0:/ { e = (\$7 - 0.1192) ^ 2 + (\$10 - 0.5) ^ 2 + (\$13 - 0.8808) ^ 2; n++ } END { exit !(n == 1 && e < 1e-3) }" out' "mean gates, -full-every: $(cat out)"
check 'grep -q "\"gates\":\[\[0.[0-9]*,0.[0-9]*,0.[0-9]*\],\[null,null,null\]\]}$" hybrid/log.jsonl' "gates of a full layer: $(cat hybrid/log.jsonl)"
mkdir hybrid2 && cp hybrid/ckpt_00000003.bin hybrid/tokenizer.bin hybrid2/
run $TINY $DATA -n 3 -o hybrid2 -y 1 -full-every 2
check 'cmp -s hybrid/ckpt_00000006.bin hybrid2/ckpt_00000006.bin' "-full-every 2: a resumed run gives other bits: $(cat err)"
expect_error "-full-every 0: the checkpoint's model has 2" -full-every 0 $DATA -o hybrid2 -y 1
run -e hybrid/ckpt_00000006.bin -sample 1 -g 8
check '[ $code -eq 0 ] && grep -q "^attention: .*(-full-every 2)$" out && grep -q "^sample: " out' "a sample with -full-every: $(cat out err)"
run -e hybrid/ckpt_00000006.bin $DATA -x 1 -attn full -t 64 -b 2
check '[ $code -eq 0 ] && grep -q "^attention: full$" out' "-attn full of a checkpoint with -full-every: $(cat out err)"

# ---- the tokenizers of checkpoint, shards and evaluation files
mkdir -p both/1 both/2 alone && cp -r data swapped && cp -r data bare && rm bare/tokenizer.bin && cp a/ckpt_00000006.bin alone/
LC_ALL=C sed 's/lamp/lump/' data/tokenizer.bin >swapped/tokenizer.bin
cp data/recall_train_000000.bin data/tokenizer.bin both/1/ && cp swapped/recall_train_000000.bin swapped/tokenizer.bin both/2/
ANOTHER="another tokenizer than" REMEDY="; make all data with the latter: build/recall -o FOLDER"
expect_error "error: -i swapped/tokenizer.bin: $ANOTHER a/tokenizer.bin$REMEDY" -e a/ckpt_00000006.bin -t 64 -b 2 -x 1 -i 'swapped/recall_train_*.bin' -o none
expect_error "error: -i swapped/tokenizer.bin: $ANOTHER a/tokenizer.bin$REMEDY" $BARE -x 8 -i 'swapped/recall_train_*.bin' -o a -y 1 -new-data 1
expect_error "error: -j swapped/tokenizer.bin: $ANOTHER a/tokenizer.bin$REMEDY" -e a/ckpt_00000006.bin -val 1 -b 2 -j 'swapped/recall_val_*.bin'
expect_error "error: -i data/tokenizer.bin: $ANOTHER swapped/tokenizer.bin$REMEDY" $TINY -i 'data/recall_train_*.bin' -j 'swapped/recall_val_*.bin' -o none
expect_error "error: -i both/2/tokenizer.bin: $ANOTHER both/1/tokenizer.bin$REMEDY" $BARE -i 'both/*/recall_train_*.bin' -o none
expect_error "error: -i data/tokenizer.bin: $ANOTHER bytes/tokenizer.bin; make all data with the latter: build/text -o FOLDER TEXT" -e bytes/ckpt_00000002.bin -t 64 -b 2 -x 1 -i 'data/recall_train_*.bin' -o none
for flags in "-e alone/ckpt_00000006.bin -i swapped/recall_train_*.bin" "-e a/ckpt_00000006.bin -i bare/recall_train_*.bin" "-e recall -i data/recall_train_*.bin -j bare/recall_val_*.bin"; do
    run $flags -t 64 -b 2 -x 1 -u 0
    check '[ $code -eq 0 ] && [ ! -s err ]' "a tokenizer that is not there: $flags: $(cat err)"
done

# ---- evaluation files
make_eval_files 68
EVALS="-mc mc.bin -needle needle.bin"
run $TINY $DATA $EVALS -hellaswag mc.bin -o evals
check '[ "$(grep -c "^mc: [0-6] of 6 right, .* | by loss per character .* | chance 33.3% | step [036]$" out)" -eq 6 ] && [ "$(grep -c "^needle by length at step [036] (keys: 1): | 6: [0-9.]*% of 6$" out)" -eq 3 ]' "evaluations at each validation: $(cat out err)"
check 'cmp -s a/ckpt_00000006.bin evals/ckpt_00000006.bin' "evaluations change the training"
check '[ "$(grep -c "^{\"step\":[036],\"tokens\":[0-9]*,\"multiple_choice\":\"mc\",\"examples\":6," evals/log.jsonl)" -eq 6 ] && [ "$(grep -c "\"needle\":\"needle\",\"keys\":1,\"cells\":\[{\"length\":6,\"depth\":0.100," evals/log.jsonl)" -eq 3 ]' "evaluations in the log: $(cat evals/log.jsonl)"
grep "^mc.*step 6\|^needle.*step 6" out >want
run -e a/ckpt_00000006.bin -val 1 $EVALS -hellaswag mc.bin -b 1
check 'grep "^mc\|^needle" out | cmp -s - want && ! grep -q "^val loss" out' "-val 1 without -j: $(cat out err want)"
run $TINY -i 'data/recall_train_*.bin' -mc mc.bin
check '[ $code -eq 0 ] && [ "$(grep -c "^mc: " out)" -eq 3 ] && ! grep -q "^val loss" out' "-mc without -j: $(cat out err)"
expect_error "-val 1: needs validation shards or evaluation files; give them with -j, -hellaswag, -mc or -needle" -e a/ckpt_00000006.bin -val 1
expect_error "-v 3: needs validation shards or evaluation files" $TINY -i 'data/recall_train_*.bin'
expect_error "-needle mc.bin: a file for -mc; give it with that flag" $TINY $DATA -needle mc.bin -o none
expect_error "-mc none.bin: no such file; make it with data/hellaswag or data/mc" $TINY $DATA -mc none.bin -o none

# ---- make says why there is no GPU trainer
# note_of VARIABLE=VALUE...: the note of make on such a machine
note_of() { env -u MAKEFLAGS make -C "$root" -n all SAN= "$@" 2>&1 | grep '^echo "note' | bash; }
check '[ "$(note_of GPU= NVCC=nvcc)" = "note: no GPU here: train_gpt_nsa was not built; make train_gpt_nsa builds it for another machine" ]' "make without a GPU: $(note_of GPU= NVCC=nvcc)"
check '[ "$(note_of GPU=90 NVCC=)" = "note: there is a GPU but no nvcc; with the CUDA Toolkit make would use the GPU" ]' "make without nvcc: $(note_of GPU=90 NVCC=)"
check '[ -z "$(note_of GPU=90 NVCC=nvcc)$(note_of GPU= NVCC=)" ]' "make: a note that helps nobody"

finish_test
