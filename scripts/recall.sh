#!/usr/bin/env bash
# recall.sh: trains each attention mode on the recall task with growing context. Training at a context starts
# from the checkpoint of the context before. Run again, the script resumes where it stopped.
#
#   make && scripts/recall.sh [CONTEXT...]        (256 512 ... 16384)
#   python3 scripts/plot_recall.py log/recall_*_nsa log/recall_*_full log/recall_*_window -o recall.png
#
# The base of RoPE is 1e6. With 1e4 no channel rotates slowly enough to match a name 8,000 tokens back as well
# as a near one. A sequence of any length has about 16 recalls from half its length back. So a step has at
# least 8 sequences, to learn as much about long distances at long contexts as at short ones.
# Environment: TRAINER (./train_gpt_nsa), STEPS per context (1000), TOKENS per step (16384; more if needed for
# 8 sequences).
set -eu
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
trainer=${TRAINER:-./train_gpt_nsa} steps=${STEPS:-1000} tokens=${TOKENS:-16384}
[ $# -gt 0 ] || set -- 256 512 1024 2048 4096 8192 16384
[ -x "$trainer" ] || { echo "error: $trainer: no such program; build it with make" >&2; exit 1; }
[ -x build/recall ] || { echo "error: build/recall: no such program; build it with make" >&2; exit 1; }
for mode in nsa full window; do
    start=recall-1k theta='-theta 1e6' rate=1e-3
    for context in "$@"; do
        batch=$((tokens / context))
        [ $batch -ge 8 ] || batch=8
        data=data/recall_$context out=log/recall_${context}_$mode
        build/recall -o "$data" -t "$context" -n $((steps * batch))
        echo "== context $context, $mode"
        "$trainer" -e "$start" $theta -attn $mode -t "$context" -b $batch -x "$steps" -l $rate \
            -u $((steps / 10)) -q 0 -beta2 0.98 -v $((steps / 4)) -m 0 -n "$steps" -o "$out" -y 1 \
            -i "$data/recall_train_*.bin" -j "$data/recall_val_*.bin"
        start=$(ls "$out"/ckpt_*.bin | tail -n 1) theta= rate=5e-4
    done
done
