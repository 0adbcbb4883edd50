#!/usr/bin/env bash
# llama3_8b_step.sh: a training step of the shape of Llama 3 8B, 4 layers, vocabulary 32,768, one sequence of 8K to 64K
# tokens: milliseconds, split by part, and memory, native sparse against full attention. Appends to dev/results.
#   make && scripts/llama3_8b_step.sh       LENGTHS="8192 16384", MODES=nsa, STEPS=5: other choices
set -eu
cd "$(dirname "$0")/.."
TRAINER=${TRAINER:-./train_gpt_nsa} LENGTHS=${LENGTHS:-"8192 16384 32768 65536"} MODES=${MODES:-"nsa full"} STEPS=${STEPS:-5}
[ -x "$TRAINER" ] || { echo "llama3_8b_step.sh: no $TRAINER: make builds it" >&2; exit 1; }
for t in $LENGTHS; do
    for attn in $MODES; do
        COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)} \
            "$TRAINER" -e llama3-8b -layers 4 -vocab 32768 -attn "$attn" -t "$t" -b 1 -profile "$STEPS"
    done
done
