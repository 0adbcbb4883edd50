#!/usr/bin/env bash
# shakespeare.sh: trains on tinyshakespeare (bytes) with the three attention modes and three seeds each: 6
# layers, 384 channels, context 1,024. Then prints the best validation loss of each run, and their mean and
# standard deviation for each mode. nsa uses mean compression: linear compression has 1.6M weights, which
# overfit a megabyte of text.
#   data/get && make && scripts/shakespeare.sh
# Run again, the script resumes where it stopped; to start anew, remove or rename log/shakespeare_MODE_SEED.
# Environment: TRAINER (./train_gpt_nsa), STEPS (1500), SEEDS ("1 2 3"), JOBS (parallel runs; 3), TEXT (input
# file).
set -eu
. "$(dirname "$0")/common.sh"
usage "$@"
no_arguments "$@"
cd "$(dirname "$0")/.."
TRAINER=${TRAINER:-./train_gpt_nsa} STEPS=${STEPS:-1500} SEEDS=${SEEDS:-"1 2 3"} JOBS=${JOBS:-3}
TEXT=${TEXT:-data/corpora/tinyshakespeare.txt}
whole_numbers STEPS JOBS
for seed in $SEEDS; do [[ $seed =~ ^[0-9]{1,9}$ ]] || die "SEEDS=$SEEDS: $seed must be a whole number"; done
need_trainer
[ -f "$TEXT" ] || die "$TEXT: no such file; download it with data/get"
need_maker build/text
run build/text -o data/shakespeare -name shakespeare "$TEXT"
mkdir -p log
failed=
# wait_for_runs N: waits until at most N runs are left. If one has failed, waits for the others and ends the script.
wait_for_runs() {
    local left=$1
    while [ ${#pids[@]} -gt "$left" ]; do wait_for "${pids[@]:0:1}" || left=0 failed=1; done
    [ -z "$failed" ] || exit 1
}
for seed in $SEEDS; do
    for attn in nsa full window; do
        wait_for_runs $((JOBS - 1))
        out=log/shakespeare_${attn}_$seed
        mkdir -p "$out"
        start "$TRAINER" -e shakespeare -attn "$attn" -phi mean -seed "$seed" -b 16 -x "$STEPS" -l 1e-3 \
            -u $((STEPS / 15)) -q 0.1 -c 0.1 -beta2 0.99 -v 50 -m 0 -n 500 -nk 1 -o "$out" -y 1 \
            -i "data/shakespeare/shakespeare_train_*.bin" -j "data/shakespeare/shakespeare_val_*.bin" >>"$out/stdout.txt"
    done
done
wait_for_runs 0
for attn in nsa full window; do
    for seed in $SEEDS; do
        grep -o '"val_loss": *[0-9.]*' "log/shakespeare_${attn}_$seed/log.jsonl" | grep -o '[0-9.]*$' |
            sort -g | head -n 1
    done | awk -v attn="$attn" '{ s += $1; q += $1 * $1; n++; all = all " " $1 }
        END { m = s / n; v = n > 1 ? (q - n * m * m) / (n - 1) : 0
              printf "%-7s best validation losses%s, mean %.4f, standard deviation %.4f\n",
                     attn, all, m, sqrt(v > 0 ? v : 0) }'
done
