#!/usr/bin/env bash
# gpus_host.sh FLAG...: trains on all GPUs of this host, a process each, without MPI; the flags are the trainer's.
#   scripts/gpus_host.sh -e gpt-124m -i 'data/books/books_train_*.bin' -b 4 -t 8192 -d 262144 -z 1 -o log/books
#   GPUS=2: so many; TRAINER: another program. SIGTERM and Ctrl-C finish the step and write a checkpoint, as with one.
set -u
TRAINER=${TRAINER:-./train_gpt_nsa} GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
[ -x "$TRAINER" ] || { echo "gpus_host.sh: no $TRAINER: make builds it" >&2; exit 1; }
[ "$GPUS" -ge 1 ] || { echo "gpus_host.sh: nvidia-smi lists no GPU" >&2; exit 1; }
folder=$(mktemp -d) || exit 1 # where rank 0 tells the others its address
trap 'rm -rf "$folder"' EXIT
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap : INT # the terminal tells the processes itself
pids=()
for rank in $(seq 0 $((GPUS - 1))); do
    RANK=$rank WORLD_SIZE=$GPUS MASTER_DIR=$folder "$TRAINER" "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    while :; do
        wait "$pid"
        one=$?
        kill -0 "$pid" 2>/dev/null || break # a signal ends a wait, too
    done
    [ $one -eq 0 ] || code=$one
done
exit $code
