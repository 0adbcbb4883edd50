#!/usr/bin/env bash
# gpus_scaling.sh: times training steps on 1, 2, 4, ... GPUs of this host: gpt-124m with contexts of 16K tokens, Llama 3
# 8B's shape with 4 layers at 8K with each ZeRO stage and at 128K with context parallelism, and one sequence of 1M tokens
# on all GPUs. Prints the time of each part and appends it to dev/results; the ratios are in the tables that
# dev/results/performance.py makes.
#   make && scripts/gpus_scaling.sh
# Environment: GPUS (number of GPUs; default all), STEPS (3), TRAINER (./train_gpt_nsa).
set -eu
. "$(dirname "$0")/common.sh"
usage "$@"
no_arguments "$@"
cd "$(dirname "$0")/.."
GPUS=${GPUS:-$(all_gpus)} STEPS=${STEPS:-3} TRAINER=${TRAINER:-./train_gpt_nsa}
need_gpus
whole_numbers STEPS
need_trainer

# measure GPUS TOKENS_A_STEP FLAG...
failed=0
measure() {
    local gpus=$1 tokens=$2
    shift 2
    echo "== $gpus GPUs: $*"
    GPUS=$gpus run scripts/gpus_host.sh "$@" -d "$tokens" \
        -profile "$STEPS" || failed=$((failed + 1))
}
SMALL="-e gpt-124m -t 16384 -theta 1e6 -b 1"
LARGE="-e llama3-8b -layers 4 -vocab 32768 -b 1"
for ((gpus = 1; gpus <= GPUS; gpus *= 2)); do
    measure $gpus $((gpus * 65536)) $SMALL -z $((gpus > 1))
    measure $gpus $((gpus * 32768)) $LARGE -t 8192 -z $((gpus > 1))
    [ $gpus -gt 1 ] || measure 1 65536 $LARGE -t 65536 -r 1
    [ $gpus -eq 1 ] || measure $gpus 131072 $LARGE -t 131072 -r 1 -cp $gpus -z 1
done
if [ "$GPUS" -gt 1 ]; then
    for z in 0 2; do measure "$GPUS" $((GPUS * 32768)) $LARGE -t 8192 -z $z; done
    measure "$GPUS" 1048576 -e llama3-8b -layers 1 -vocab 32768 -b 1 -t 1048576 -r 2 -cp "$GPUS" -z 1
fi
[ $failed -eq 0 ] || { echo "== $failed runs failed"; exit 1; }
