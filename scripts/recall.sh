#!/usr/bin/env bash
# Recall as the context grows: each attention mode learns the task at the shortest context and goes on from its
# checkpoint at twice the length, and so on. Run again, it goes on where it was stopped.
#
#   scripts/recall.sh [CONTEXT...]        (256 512 ... 16384)
#   python3 scripts/plot_recall.py log/recall_*_nsa log/recall_*_full log/recall_*_window -o recall.png
#
# RoPE's base is 1e6: at 1e4 no channel turns slowly enough to match a name 8,000 tokens back as it does nearby. A
# sequence asks some 16 names from half its length back, whatever that is: a step of long sequences has at least 8 of
# them, so that it learns as much of long distances as one of short ones. TRAINER, STEPS at each context and TOKENS of
# a step (more, where 8 sequences are) can be set.
set -eu
cd "$(dirname "$0")/.."
trainer=${TRAINER:-./train_gpt_nsa} steps=${STEPS:-1000} tokens=${TOKENS:-16384}
[ $# -gt 0 ] || set -- 256 512 1024 2048 4096 8192 16384
make build/recall "$(basename "$trainer")" >/dev/null
for mode in nsa full window; do
    from=recall-1k theta='-theta 1e6' rate=1e-3
    for context in "$@"; do
        batch=$((tokens / context))
        [ $batch -ge 8 ] || batch=8
        data=data/recall_$context out=log/recall_${context}_$mode
        build/recall -o "$data" -t "$context" -n $((steps * batch)) >/dev/null
        echo "== context $context, $mode"
        "$trainer" -e "$from" $theta -attn $mode -t "$context" -b $batch -x "$steps" -l $rate -u $((steps / 10)) -q 0 \
            -beta2 0.98 -v $((steps / 4)) -m 0 -n "$steps" -o "$out" -y 1 \
            -i "$data/recall_train_*.bin" -j "$data/recall_val_*.bin"
        from=$(ls "$out"/ckpt_*.bin | tail -n 1) theta= rate=5e-4
    done
done
