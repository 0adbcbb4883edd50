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
. "$(dirname "$0")/common.sh"
usage "$@"
TRAINER=${TRAINER:-./train_gpt_nsa} GPUS=${GPUS:-$(all_gpus)}
need_trainer
need_gpus
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + GPUS - 1) / GPUS))}
folder=$(mktemp -d) || exit 1 # rank 0 writes its address and the secret here
trap 'rm -rf "$folder"' EXIT
for ((rank = 0; rank < GPUS; rank++)); do
    RANK=$rank WORLD_SIZE=$GPUS LOCAL_WORLD_SIZE=$GPUS MASTER_DIR=$folder start "$TRAINER" "$@"
done
code=0
for pid in "${pids[@]}"; do wait_for "$pid" || code=$?; done
exit $code
