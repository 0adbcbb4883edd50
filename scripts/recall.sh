#!/usr/bin/env bash
# recall.sh: trains attention modes on the recall task with growing context. Training at a context starts from the checkpoint
# of the context before. Run again, the script resumes where it stopped.
#
#   make && scripts/recall.sh [CONTEXT...]        (256 512 ... 16384; nsa also 32768 and 65536)
#   MODES=nsa scripts/recall.sh                   (nsa alone)
#   python3 scripts/plot_recall.py log/recall_*_nsa log/recall_*_full log/recall_*_window -o recall.png
#
# The base of RoPE is 1e7. Channels that hardly rotate match a name far back as well as a near one. With 1e4 there are none at
# 8,000 tokens. With 1e7, 9 of 32 pairs of channels rotate by less than a radian in 65,536 tokens, as many as with 1e6 in
# 16,384.
#
# A sequence of any length has about 4 recalls from half its length back. So a step has at least 8 sequences, to learn as
# much about long distances at long contexts as at short ones: 16,384 tokens up to a context of 2,048, and 8 times the
# context from there. 1,000 steps are 131M tokens at 16,384, 262M at 32,768 and 524M at 65,536, all together 1.1G. The data
# have 4.9 bytes a training token, up to 65,536 together 5.4 GB in data/recall_*; those of a context whose training has ended
# can be removed. A GPU trains at most 131,072 tokens at a time, so that memory does not grow with the context.
# Environment: MODES ("nsa full window"), TRAINER (./train_gpt_nsa), STEPS per context (1000), TOKENS per step (16384; more
# if needed for 8 sequences).
set -eu
. "$(dirname "$0")/common.sh"
usage "$@"
cd "$(dirname "$0")/.."
TRAINER=${TRAINER:-./train_gpt_nsa} STEPS=${STEPS:-1000} TOKENS=${TOKENS:-16384} MODES=${MODES:-nsa full window}
for context; do [[ $context =~ ^[1-9][0-9]{0,8}$ ]] || die "$context: a context must be a whole number of tokens; -h lists the usual ones"; done
whole_numbers STEPS TOKENS
attention_modes
need_trainer
need_maker build/recall
for mode in $MODES; do
    contexts="256 512 1024 2048 4096 8192 16384"
    [ "$mode" != nsa ] || contexts="$contexts 32768 65536"
    start=recall-1k theta='-theta 1e7' rate=1e-3
    for context in ${*:-$contexts}; do
        batch=$((TOKENS / context))
        [ $batch -ge 8 ] || batch=8
        micro=$((context < 131072 ? 131072 / context : 1)) # sequences at a time
        while [ $((batch % micro)) -ne 0 ]; do micro=$((micro - 1)); done
        data=data/recall_$context out=log/recall_${context}_$mode
        run build/recall -o "$data" -t "$context" -n $((STEPS * batch))
        echo "== context $context, $mode"
        run "$TRAINER" -e "$start" $theta -attn "$mode" -t "$context" -b $micro -d $((batch * context)) -x "$STEPS" -l $rate \
            -u $((STEPS / 10)) -q 0 -beta2 0.98 -v $((STEPS / 4)) -m 0 -n $((STEPS / 4)) -o "$out" -y 1 \
            -i "$data/recall_train_*.bin" -j "$data/recall_val_*.bin"
        start=$(ls "$out"/ckpt_*.bin | tail -n 1) theta= rate=5e-4
    done
done
