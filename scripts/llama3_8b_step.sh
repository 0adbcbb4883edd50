#!/usr/bin/env bash
# llama3_8b_step.sh: profiles a training step of Llama 3 8B's shape with 4 layers, vocabulary 32,768 and one
# sequence of 8K to 64K tokens, with native sparse and with full attention, with 16-bit matmuls and, from
# compute capability 8.9 on, in fp8. Prints the time of each part and the memory, and appends them to
# dev/results.
#   make && scripts/llama3_8b_step.sh
# Environment: LENGTHS ("8192 16384 32768 65536"), MODES ("nsa full"), MATMULS ("bf16 fp8" or "bf16"), STEPS (5),
# TRAINER (./train_gpt_nsa).
set -eu
. "$(dirname "$0")/common.sh"
usage "$@"
no_arguments "$@"
cd "$(dirname "$0")/.."
TRAINER=${TRAINER:-./train_gpt_nsa} LENGTHS=${LENGTHS:-"8192 16384 32768 65536"} MODES=${MODES:-"nsa full"}
STEPS=${STEPS:-5}
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
MATMULS=${MATMULS:-bf16$([ "${capability:-0}" -lt 89 ] || echo " fp8")}
whole_numbers LENGTHS STEPS
attention_modes
need_trainer
for t in $LENGTHS; do
    for attn in $MODES; do
        for matmul in $MATMULS; do
            run "$TRAINER" -e llama3-8b -layers 4 -vocab 32768 -attn "$attn" -matmul "$matmul" -t "$t" -b 1 -profile "$STEPS"
        done
    done
done
