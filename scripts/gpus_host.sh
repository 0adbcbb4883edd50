#!/usr/bin/env bash
# gpus_host.sh FLAG...: trains on all GPUs of this host, one process per GPU, without MPI. The flags are the
# trainer's.
#   scripts/gpus_host.sh -e gpt-124m -i 'data/books/books_train_*.bin' -b 4 -t 8192 -d 262144 -z 1 \
#       -o log/books
# Environment: GPUS (number of GPUs; default all), TRAINER (./train_gpt_nsa).
# SIGTERM and Ctrl-C finish the step and write a checkpoint, as with a single process.
set -u
TRAINER=${TRAINER:-./train_gpt_nsa} GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
[ -x "$TRAINER" ] || { echo "error: $TRAINER: no such program; build it with make" >&2; exit 1; }
[ "$GPUS" -ge 1 ] || { echo "error: GPUS=$GPUS: must be at least 1; see nvidia-smi -L" >&2; exit 1; }
folder=$(mktemp -d) || exit 1 # rank 0 writes its address here
trap 'rm -rf "$folder"' EXIT
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap : INT # the terminal sends SIGINT to all processes
pids=()
for rank in $(seq 0 $((GPUS - 1))); do
    RANK=$rank WORLD_SIZE=$GPUS MASTER_DIR=$folder "$TRAINER" "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    while :; do
        wait "$pid"
        status=$?
        kill -0 "$pid" 2>/dev/null || break # else a signal interrupted wait
    done
    [ $status -eq 0 ] || code=$status
done
exit $code
