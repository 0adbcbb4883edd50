#!/usr/bin/env bash
# gpus_losses.sh FILE_OR_FOLDER...: trains gpt-124m on bytes of these texts, with contexts of 4,096 tokens and 131,072
# tokens a step, on 1, 2, 4, ... GPUs of this host: data parallel with each ZeRO stage, context parallel, both. All runs
# train on the same samples. Prints the largest relative difference of each run's losses from those of one GPU.
#   make && scripts/gpus_losses.sh TEXTS && python3 scripts/plot_log.py log/gpus/* -o gpus.png
# Environment: GPUS (number of GPUs; default all), STEPS (40), TRAINER (./train_gpt_nsa).
set -eu
. "$(dirname "$0")/common.sh"
usage "$@"
GPUS=${GPUS:-$(all_gpus)} STEPS=${STEPS:-40} TRAINER=${TRAINER:-./train_gpt_nsa}
[ $# -ge 1 ] || die "no text: gpus_losses.sh FILE_OR_FOLDER...; -h explains it"
need_gpus
whole_numbers STEPS
texts=()
for text in "$@"; do texts+=("$(realpath -m -- "$text")"); done
cd "$(dirname "$0")/.."
need_trainer
need_maker build/text
run build/text -o data/gpus -name gpus "${texts[@]}"

# train NAME GPUS FLAG...
train() {
    local name=$1 gpus=$2
    shift 2
    rm -rf "log/gpus/$name"
    GPUS=$gpus run scripts/gpus_host.sh -e gpt-124m \
        -i 'data/gpus/gpus_train_*.bin' -j 'data/gpus/gpus_val_*.bin' -t 4096 -theta 1e6 -d 131072 -l 6e-4 -u 10 -x "$STEPS" \
        -v 0 -n 0 -o "log/gpus/$name" "$@" >"log/gpus/$name.out"
    echo "$name: $(tail -n 1 "log/gpus/$name.out")"
}
mkdir -p log/gpus
train 1 1 -b 4
for ((gpus = 2; gpus <= GPUS; gpus *= 2)); do
    for z in 0 1 2; do train "${gpus}_z$z" $gpus -b 4 -z $z; done
    for ((cp = 2; cp <= gpus; cp *= 2)); do train "${gpus}_cp$cp" $gpus -b 4 -cp $cp; done
    [ $gpus -le 2 ] || train "${gpus}_cp2_z1" $gpus -b 4 -cp 2 -z 1
done
for name in $(ls log/gpus | sed -n 's/\.out$//p'); do
    paste <(sed -n 's/.*"loss":\([0-9.]*\).*/\1/p' log/gpus/1/log.jsonl) <(sed -n 's/.*"loss":\([0-9.]*\).*/\1/p' "log/gpus/$name/log.jsonl") |
        awk -v name="$name" 'NF < 2 { bad = 1 } { d = ($2 - $1) / $1; if (d < 0) d = -d; if (d > most) most = d; last = $2 }
            END { printf "%s: %d steps, last loss %s, largest relative difference %.1e%s\n", name, NR, last, most, bad ? ", steps are missing" : "" }'
done
