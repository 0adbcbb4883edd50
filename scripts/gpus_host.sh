#!/usr/bin/env bash
# gpus_host.sh FLAG...: trains on all GPUs of this host, one process per GPU, without MPI. The flags are the
# trainer's.
#   scripts/gpus_host.sh -e gpt-124m -i 'data/books/books_train_*.bin' -b 4 -t 8192 -d 262144 -z 1 \
#       -o log/books
# Environment: GPUS (number of GPUs; default all), TRAINER (./train_gpt_nsa), OMP_NUM_THREADS (CPU threads of a process;
# default its share of the cores).
# SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C reach each process once: it finishes the step and writes a
# checkpoint, as a single process does.
set -u
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; exit ;; esac
TRAINER=${TRAINER:-./train_gpt_nsa} GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
[ -x "$TRAINER" ] || { echo "error: $TRAINER: no such program; build it with make" >&2; exit 1; }
[ "$GPUS" -ge 1 ] || { echo "error: GPUS=$GPUS: must be at least 1; see nvidia-smi -L" >&2; exit 1; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + GPUS - 1) / GPUS))}
folder=$(mktemp -d) || exit 1 # rank 0 writes its address and the secret here
trap 'rm -rf "$folder"' EXIT
pids=() signals=() started=
forward() {
    signals+=("$1")
    [ -z "$started" ] || kill -s "$1" -- "${pids[@]}" 2>/dev/null
}
for signal in HUP INT TERM USR1 USR2; do trap "forward $signal" $signal; done
set -m # each process has a process group of its own, so that the terminal's Ctrl-C does not reach it a second time
for rank in $(seq 0 $((GPUS - 1))); do
    RANK=$rank WORLD_SIZE=$GPUS LOCAL_WORLD_SIZE=$GPUS MASTER_DIR=$folder "$TRAINER" "$@" </dev/null &
    pids+=($!)
done
started=1 early=${#signals[@]}
for ((i = 0; i < early; i++)); do kill -s "${signals[i]}" -- "${pids[@]}" 2>/dev/null; done
code=0
for pid in "${pids[@]}"; do
    while :; do
        received=${#signals[@]}
        wait "$pid"
        status=$?
        [ $status -gt 128 ] && [ ${#signals[@]} -gt $received ] || break # else a signal interrupted wait
    done
    [ $status -eq 0 ] || code=$status
done
exit $code
