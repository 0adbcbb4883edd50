#!/usr/bin/env bash
# Tests the GPU trainer as several processes, one per GPU, or up to four on the emulator: data parallel with every ZeRO
# stage and context parallel against one process on the same samples, resume with other numbers of processes, signals,
# failures. Needs TRAINER, BUILD (the folder of recall and text), GPUS (the number of GPUs) and MPI (empty: the trainer is
# built without MPI), which make test sets.
set -u
HOST=$(realpath scripts/gpus_host.sh) LLAMA3_8B=$(realpath scripts/llama3_8b.sh) PROGRAM=${TRAINER:-./train_gpt_nsa}
. dev/test/checks.sh
export OMP_NUM_THREADS=1 # of each process on the emulator

if [ "${GPUS:-0}" -lt 2 ]; then
    echo "skipped: several GPUs: there are ${GPUS:-0}, or no NCCL"
    skipped=1
    finish_test
    exit
fi
"$BUILD/recall" -o data -t 32 -n 40 -m 5 >/dev/null || bad "recall"
set -f # the shell does not expand glob patterns
FLAGS="-e recall -layers 2 -hidden 64 -heads 2 -kv-heads 1 -head-dim 64 -t 32 -l 1e-3 -u 0 -v 3 -m 0 -x 3
    -i data/recall_train_*.bin -j data/recall_val_*.bin"
port=$((20000 + $$ % 20000))

# start N FLAG...: starts N processes, whose ids are in pids; rank R writes to R.out and R.err
# finish: waits for them; their exit codes are in codes
start() {
    local n=$1 r
    shift
    port=$((port + 1)) pids=()
    for r in $(seq 0 $((n - 1))); do
        RANK=$r WORLD_SIZE=$n MASTER_ADDR=127.0.0.1 MASTER_PORT=$port "$PROGRAM" $FLAGS "$@" >$r.out 2>$r.err &
        pids+=($!)
    done
}
finish() {
    codes=
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null; codes="$codes$? "; done
}
many() { start "$@"; finish; }
# value FOLDER KEY STEP: prints a value from log.jsonl
value() { grep -h "^{\"step\":$3,.*\"$2\":" "$1/log.jsonl" | sed "s/.*\"$2\":\([0-9.e+-]*\).*/\1/"; }
# same A B LIMIT: returns whether two runs agree in the losses of three steps, the first gradient norm, and the
# validation loss
same() {
    local step
    for step in 1 2 3; do near "$(value $1 loss $step)" "$(value $2 loss $step)" $3 || return 1; done
    near "$(value $1 norm 1)" "$(value $2 norm 1)" $3 && near "$(value $1 val_loss 3)" "$(value $2 val_loss 3)" $3
}
differ() { grep -h '"loss"\|val_loss' $1/log.jsonl $2/log.jsonl | cut -c1-60 | tr '\n' ' '; }

# Relative tolerance for matmuls of another shape: cuBLASLt may sum in another order, the emulator does not.
shape=2e-3
[[ $PROGRAM == *emulator* ]] && shape=1e-6

# ---- data parallel with each ZeRO stage: differs by the order of fp32 sums, and by 16-bit weights that round differently
many 1 -b 2 -d 128 -o one
check '[ "$codes" = "0 " ]' "one process: $codes $(cat 0.err)"
for z in 0 1 2; do
    many 2 -b 2 -z $z -o z$z
    check '[ "$codes" = "0 0 " ] && grep -q "ZeRO stage $z" 0.out && [ ! -s 1.out ]' "-z $z: $codes $(cat 0.err 1.err)"
    check 'same one z$z 1e-4' "-z $z is not as one process: $(differ one z$z)"
done
many 2 -b 2 -z 2 -o again
check 'cmp -s z2/ckpt_00000003.bin again/ckpt_00000003.bin' "two runs of two processes have other bits"
# micro-batches, a tied embedding, recomputation
for tied in 0 1; do
    many 1 -b 1 -d 128 -tied $tied -o sum1_$tied
    many 2 -b 1 -d 128 -tied $tied -z $((1 + tied)) -r $((2 * tied)) -o sum2_$tied
    check 'same sum1_$tied sum2_$tied 1e-3' "accumulation is not as in one process: $(differ sum1_$tied sum2_$tied)"
done
if [ "$GPUS" -ge 4 ]; then
    many 4 -b 1 -z 2 -o four
    check 'same sum1_0 four 1e-4' "four processes are not as one: $(differ sum1_0 four)"
    many 3 -b 1 -z 1 -o three
    check '[ "$codes" = "0 0 0 " ]' "three processes: $codes $(cat 0.err 1.err 2.err)"
else
    skipped=$((skipped + 1)) && echo "skipped: four processes on $GPUS GPUs"
fi

# ---- fp8: as in 16 bits, several GPUs change only the order of sums, and resuming and recomputation nothing
many 1 -b 2 -d 128 -matmul fp8 -o fp8_one
if grep -q "compute capability" 0.err; then
    skipped=$((skipped + 1)) && echo "skipped: -matmul fp8: $(cat 0.err)"
else
    for flags in "-z 0" "-z 1" "-z 2" "-cp 2 -b 4"; do
        out="fp8$(echo $flags | tr -d ' ')"
        many 2 -b 2 -d 128 $flags -matmul fp8 -n 2 -o "$out"
        check '[ "$codes" = "0 0 " ] && same fp8_one "$out" 5e-3' "-matmul fp8 $flags: $codes $(differ fp8_one "$out") $(cat 0.err)"
        mv "$out/ckpt_00000003.bin" want
        many 2 -b 2 -d 128 $flags -matmul fp8 -r 2 -o "$out" -y 1
        check 'cmp -s want "$out/ckpt_00000003.bin"' "-matmul fp8 $flags: resumed with -r 2, other bits $(cat 0.err)"
    done
fi

# ---- context parallel: each rank rounds its part of the key gradients to 16 bits
for attn in nsa full window; do
    many 1 -b 1 -attn $attn -o whole_$attn
    many 2 -b 1 -attn $attn -cp 2 -o shared_$attn
    check '[ "$codes" = "0 0 " ] && grep -q "1 groups of 2" 0.out' "-cp 2 -attn $attn: $codes $(cat 0.err 1.err)"
    check 'same whole_$attn shared_$attn 3e-3' "-cp 2 -attn $attn: $(differ whole_$attn shared_$attn)"
    check 'near "$(value whole_$attn loss 1)" "$(value shared_$attn loss 1)" $shape' "-cp 2 -attn $attn: another first loss"
done
# several head groups: only on the emulator, which is built with a smaller minimum group size
for attn in nsa full window; do
    heads="-b 1 -attn $attn -heads 6 -kv-heads 3"
    many 1 $heads -o whole3_$attn
    many 2 $heads -cp 2 -n 2 -o shared3_$attn
    check '[ "$codes" = "0 0 " ] && { [[ $PROGRAM != *emulator* ]] || grep -q "of 1 of the 3 kv heads" 0.out; }' \
        "-cp 2 -kv-heads 3 -attn $attn: $codes $(cat 0.err 1.err)"
    check 'same whole3_$attn shared3_$attn 3e-3' "-cp 2 -kv-heads 3 -attn $attn: $(differ whole3_$attn shared3_$attn)"
    mv shared3_$attn/ckpt_00000003.bin want
    many 2 $heads -cp 2 -r 2 -o shared3_$attn -y 1
    check 'cmp -s want shared3_$attn/ckpt_00000003.bin' "-cp 2 -kv-heads 3 -attn $attn: resumed with -r 2, other bits $(cat 0.err)"
    rm shared3_$attn/ckpt_00000003.bin
    many 1 $heads -o shared3_$attn -y 1
    check '[ "$codes" = "0 " ] && same whole3_$attn shared3_$attn 3e-3' "-cp 2, then one: $codes $(differ whole3_$attn shared3_$attn)"
done
# layers of full attention among those of nsa, with gates per token
hybrid="-full-every 2 -gate-per-token 1 -heads 6 -kv-heads 3"
many 1 -b 2 $hybrid -o whole_hybrid
for flags in "-b 2 -cp 2" "-b 2 -cp 2 -r 2 -z 1" "-b 1 -z 2"; do
    out=hybrid$(echo $flags | tr -d ' ')
    many 2 $flags $hybrid -o $out
    check '[ "$codes" = "0 0 " ] && same whole_hybrid $out 3e-3' "-full-every 2 $flags: $codes $(differ whole_hybrid $out) $(cat 0.err 1.err)"
done
for n in 1 2; do # only rank 0 generates text, without the other ranks' keys
    many $n -b 1 -heads 6 -kv-heads 3 -cp $n -sample 1 -e whole3_nsa/ckpt_00000003.bin -temp 1 -seed 5 -g 8
    sed -n 's/^sample: //p' 0.out >sample$n
done
check '[ "$codes" = "0 0 " ] && [ -s sample1 ] && cmp -s sample1 sample2' "-sample 1 -cp 2: $codes $(cat sample1 sample2 0.err)"
if [ "$GPUS" -ge 4 ]; then
    many 1 -b 2 -o two
    many 4 -b 1 -cp 2 -z 1 -r 1 -o both
    check 'same two both 3e-3' "-cp 2 in two groups: $(differ two both)"
fi

# ---- the answers to evaluation files and the mean gates do not depend on the number of processes
make_eval_files 68
for n in 1 2 cp; do
    many ${n/cp/2} -b 1 $([ $n = cp ] && echo -cp 2) -e one/ckpt_00000003.bin -x 3 -val 1 -mc mc.bin -needle needle.bin
    grep "^mc: \|^needle by" 0.out >answers$n
    grep "^mean gates" 0.out >gates$n
    check '[ -s gates$n ] && same_numbers gates1 gates$n 1e-3' "mean gates, $n processes: $(cat gates1 gates$n 0.err)"
    check '[ "$(wc -l <answers$n)" -eq 2 ] && cmp -s answers1 answers$n' "-mc, -needle, $n processes: $codes $(cat answers$n 0.err)"
done
# between two steps, one batch for two processes: the one without a batch takes part in gathering the weights, too
FLAGS=${FLAGS% -j *} start 2 -b 8 -z 1 -v 1 -x 2 -mc mc.bin
(sleep 100 && kill -KILL "${pids[@]}") 2>/dev/null & watch=$!
finish && kill $watch
check '[ "$codes" = "0 0 " ] && [ "$(grep -c "^mc: " 0.out)" -eq 3 ]' "-mc with fewer batches than processes: $codes $(cat 0.out 0.err)"

# ---- checkpoints do not depend on the number of processes
for n in 1 2; do
    many $n -b 2 -d 128 -n 2 -z $n -o begun$n
    rm begun$n/ckpt_00000003.bin || bad "begun$n has no second checkpoint"
done
check '[ "$(stat -c %s begun1/ckpt_00000002.bin)" = "$(stat -c %s begun2/ckpt_00000002.bin)" ]' "sizes of checkpoints"
many 2 -b 2 -z 1 -o begun1 -y 1
check '[ "$codes" = "0 0 " ] && same one begun1 1e-4' "1, then 2: $codes $(cat 0.err 1.err) $(differ one begun1)"
many 1 -b 2 -d 128 -o begun2 -y 1
check '[ "$codes" = "0 " ] && same one begun2 1e-4' "2, then 1: $codes $(cat 0.err) $(differ one begun2)"
many 1 -b 3 -val 1 -e one/ckpt_00000003.bin && cp 0.out want
for cp in 1 2; do # there are 5 samples, so the last row of the second batch must not count
    many 2 -b 3 -cp $cp -val 1 -e one/ckpt_00000003.bin
    check '[ "$codes" = "0 0 " ] && [ "$(grep -c "^val loss\|^recall" 0.out)" -eq 2 ]' "-val 1 -cp $cp: $codes $(cat 0.err)"
    check 'near "$(sed -n "s/^val loss \([0-9.]*\).*/\1/p" 0.out)" "$(sed -n "s/^val loss \([0-9.]*\).*/\1/p" want)" $shape' "-val 1 -cp $cp: $(cat 0.out want)"
done

# ---- the launcher of one host
GPUS=2 TRAINER=$PROGRAM bash "$HOST" $FLAGS -b 2 -z 1 -o host >0.out 2>0.err
code=$?
check '[ $code -eq 0 ] && cmp -s host/ckpt_00000003.bin z1/ckpt_00000003.bin' "gpus_host.sh: $(cat 0.err)"
GPUS=2 TRAINER=$PROGRAM bash "$HOST" $FLAGS -i none -b 2 >0.out 2>0.err
code=$?
check '[ $code -ne 0 ] && grep -q "no shard matches" 0.err' "gpus_host.sh hides an error: $(cat 0.err)"

# ---- llama3_8b.sh counts the memory that the trainer needs; the emulator's GPUs have too little, and the trainer says how
# much is missing
if [ "$GPUS" -ge 4 ] && [[ $PROGRAM == *emulator* ]]; then
    for mode in nsa full; do
        for length in 32768 65536; do # with one GPU a sequence: with -cp the emulator's head groups are smaller
            for matmul in bf16 fp8; do
                memory=$((length == 32768 ? 81559 : 143771))
                DRY=1 GPUS=4 MEMORY=$memory MODES=$mode LENGTHS=$length MATMUL=$matmul bash "$LLAMA3_8B" >plan
                check '[ "$(grep -c "fits$" plan)" -eq 1 ]' "llama3_8b.sh, $mode, $length tokens, $matmul: $(cat plan)"
                FLAGS= many 4 -e llama3-8b -attn $mode -matmul $matmul -t $length -b 1 $(sed -n '/fits$/s/:.*//p' plan) -profile 1
                check 'near "$(sed -n "s/.* = \([0-9]*\) MiB, fits/\1/p" plan)" "$(sed -n "s/.*memory: \([0-9]*\) MiB needed.*/\1/p" 0.err)" 0.02' \
                    "llama3_8b.sh, $mode, $length tokens, $matmul: $(cat plan 0.err)"
            done
        done
    done
fi

# ---- signals and killed processes
running() { for i in $(seq 100); do grep -q '"step":1,"loss"' "$1/log.jsonl" 2>/dev/null && return; sleep 0.1; done; bad "$1 has not begun"; }
start 2 -b 1 -x 100000 -v 0 -o term -z 1
running term
kill -TERM "${pids[1]}"
finish
check '[ "$codes" = "143 143 " ] && grep -q "stopped by signal 15" 0.out && ls term | grep -q ckpt_' "SIGTERM to rank 1: $codes $(cat 0.err 1.err)"
for who in 0 1; do
    start 2 -b 1 -x 100000 -v 0 -o kill$who -z 2
    running kill$who
    kill -KILL "${pids[$who]}"
    begin=$SECONDS
    finish
    other=$((1 - who))
    check '[ $((SECONDS - begin)) -lt 60 ] && [ "$(wc -l <$other.err)" -eq 1 ] && grep -q "error: rank $other: rank $who is gone" $other.err' \
        "rank $who was killed: $codes $(cat $other.err)"
done

# ---- one of four processes is killed, stopped, or cannot write its part of a checkpoint: the others end within a
# minute, each with one line, and two processes resume from the last checkpoint
# ended WHO TEXT WHAT: the processes of `start` but WHO end so, and TEXT is in their lines
ended() {
    local who=$1 text=$2 what=$3 begin=$SECONDS r
    for r in 0 1 2 3; do [ $r -eq $who ] || wait "${pids[$r]}"; done
    check '[ $((SECONDS - begin)) -lt 60 ]' "$what: the others ended after $((SECONDS - begin)) s"
    for r in 0 1 2 3; do
        [ $r -eq $who ] || check '[ "$(wc -l <$r.err)" -eq 1 ] && grep -q "^error: rank $r: $text" $r.err' "$what, rank $r: $(cat $r.err)"
    done
    kill -KILL "${pids[$who]}" 2>/dev/null
    wait "${pids[$who]}" 2>/dev/null
}
resumes() { # FOLDER WHAT: two processes train one more step from the last checkpoint in FOLDER
    local what=$2 last=$(ls $1 | sed -n 's/^ckpt_0*\([0-9]*\)\.bin$/\1/p' | sort -n | tail -1)
    many 2 -b 1 -d 128 -z 1 -n 1 -v 0 -o $1 -y 1 -x $((${last:-0} + 1))
    check '[ "$codes" = "0 0 " ] && grep -q "^step $((last + 1))/" 0.out' "$what: two processes do not resume step ${last:-none}: $(cat 0.err)"
}
if [ "$GPUS" -ge 4 ]; then
    for fault in KILL STOP; do
        for who in 0 2; do
            [ $fault$who != STOP0 ] || continue # as rank 2; waiting for a heartbeat takes half a minute
            start 4 -b 1 -cp 2 -z 2 -x 100000 -v 0 -n 1 -keep 2 -o $fault$who
            running $fault$who
            kill -$fault "${pids[$who]}"
            ended $who "rank $who is gone" "rank $who of four, SIG$fault"
            resumes $fault$who "rank $who of four, SIG$fault"
        done
    done
    many 4 -b 1 -z 1 -x 2 -n 1 -v 0 -o disk
    size=$(stat -c %s disk/ckpt_00000002.bin)
    pids=() port=$((port + 1))
    for r in 0 1 2 3; do
        (
            [ $r -lt 3 ] || { ulimit -f $((size / 2048)); trap '' XFSZ; } # in KiB: half of a checkpoint
            RANK=$r WORLD_SIZE=4 MASTER_PORT=$port exec "$PROGRAM" $FLAGS -b 1 -z 1 -x 9 -n 1 -v 0 -o disk -y 1 >$r.out 2>$r.err
        ) &
        pids+=($!)
    done
    ended 3 "rank 3 failed: cannot write disk/" "rank 3 of four cannot write"
    check 'grep -q "^error: rank 3: cannot write disk/.*check the free disk space" 3.err' "rank 3 cannot write: $(cat 3.err)"
    check '[ "$(ls disk | grep -c "ckpt_00000003\|tmp")" -eq 0 ]' "a checkpoint that failed left $(ls disk)"
    resumes disk "rank 3 of four could not write"
fi

# ---- mpirun
# mpi N FLAG...: N processes, which write to 0.out and 0.err; rank R writes its id to R.pid
mpi() {
    local n=$1
    shift
    rm -f [0-9].pid
    mpirun --allow-run-as-root --oversubscribe -np $n sh -c 'echo $$ >${OMPI_COMM_WORLD_RANK:-$PMI_RANK}.pid; exec "$@"' \
        sh "$PROGRAM" $FLAGS "$@" >0.out 2>0.err
}
if [ -n "${MPI:-}" ] && command -v mpirun >/dev/null; then
    mpi 2 -b 2 -z 2 -o mpi2
    code=$?
    check '[ $code -eq 0 ] && cmp -s z2/ckpt_00000003.bin mpi2/ckpt_00000003.bin' "mpirun, 2 processes: $code $(cat 0.err)"
    n=$((GPUS < 4 ? GPUS : 4))
    if [ $n -eq 4 ]; then
        mpi 4 -b 1 -cp 2 -z 1 -r 1 -o mpi4
        code=$?
        check '[ $code -eq 0 ] && cmp -s both/ckpt_00000003.bin mpi4/ckpt_00000003.bin' "mpirun, 4 processes: $code $(cat 0.err)"
    fi
    mpi $n -b 1 -i none -o bad
    code=$?
    check '[ $code -ne 0 ] && grep -q "^error: rank [0-9]: .*no shard matches" 0.err && [ ! -e bad ]' "mpirun hides an error: $code $(cat 0.err)"
    for who in 0 $((n - 1)); do
        mpi $n -b 1 -x 100000 -v 0 -o mpikill$who -z 2 & launcher=$!
        running mpikill$who
        kill -KILL "$(cat $who.pid)"
        begin=$SECONDS
        wait $launcher
        code=$?
        for r in $(seq 0 $((n - 1))); do
            [ $r -eq $who ] || check '[ $code -ne 0 ] && [ $((SECONDS - begin)) -lt 60 ] && grep -q "^error: rank $r: rank $who is gone" 0.err' \
                "mpirun: rank $who was killed: $code $(cat 0.err)"
        done
    done
else
    skipped=$((skipped + 1)) && echo "skipped: mpirun: not found, or the trainer is built without MPI"
fi

# ---- errors: every process exits with code 1 and one line
each_says() { # TEXT WHAT: every process has printed one line with TEXT
    local text=$1 what=$2 r
    for r in $(seq 0 $((${#pids[@]} - 1))); do
        check '[ "$(wc -l <$r.err)" -eq 1 ] && grep -qe "$text" $r.err' "$what, rank $r: $(cat $r.err)"
    done
    check '[ "$(echo $codes | tr -d " 1")" = "" ]' "$what: $codes"
}
many 2 -b 1 -cp 3 -o bad
each_says "cp 3: must divide the number of processes, 2" "-cp 3"
many 2 -b 1 -t 30 -cp 4 -o bad
each_says "cp 4: must divide the number of processes, 2" "-cp 4"
many 2 -b 1 -t 31 -cp 2 -o bad
each_says "cp 2: b\*t = 31 must be a multiple of 2\*cp = 4" "-cp 2 -t 31"
many 2 -b 1 -d 96 -o bad
each_says "d 96: must be a multiple of" "-d 96"
many 2 -b 1 -o one
each_says "holds checkpoints up to step 3" "-o with checkpoints"
port=$((port + 1))
RANK=0 WORLD_SIZE=2 MASTER_PORT=$port "$PROGRAM" $FLAGS -b 1 >0.out 2>0.err & pids=($!)
RANK=1 WORLD_SIZE=2 MASTER_PORT=$port "$PROGRAM" $FLAGS -b 2 >1.out 2>1.err & pids+=($!)
finish
each_says "rank 1 was started with other flags than rank 0" "other flags"
check '[ ! -e bad ]' "a run that could not start left $(ls bad 2>/dev/null)"

finish_test
