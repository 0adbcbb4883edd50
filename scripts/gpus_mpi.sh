#!/usr/bin/env bash
# gpus_mpi.sh HOST[,HOST...] FLAG...: trains on all GPUs of these hosts with Open MPI's mpirun. The flags are
# the trainer's. The program, the data and the folder -o must have the same path on all hosts. ssh must work
# without a password.
#   scripts/gpus_mpi.sh node1,node2 -e llama3-8b -i '/shared/data/train_*.bin' -b 1 -t 65536 -cp 8 -z 2 -r 2 \
#       -o /shared/log
# Environment: GPUS (number of GPUs per host; 8), TRAINER (./train_gpt_nsa), MPI_FLAGS (more flags for
# mpirun).
# scripts/README.md lists the variables of the trainer and of NCCL.
set -eu
TRAINER=$(realpath "${TRAINER:-./train_gpt_nsa}") GPUS=${GPUS:-8}
[ $# -ge 1 ] || { sed -n 's/^# //p' "$0" >&2; exit 1; }
hosts=$1
shift
count=$(echo "$hosts" | tr ',' '\n' | wc -l)
variables=()
for name in $(compgen -e | grep -E '^(NCCL_|CUDA_VISIBLE_DEVICES$|LD_LIBRARY_PATH$)'); do
    variables+=(-x "$name")
done
exec mpirun -np $((count * GPUS)) --host "$(echo "$hosts" | sed "s/,/:$GPUS,/g"):$GPUS" \
    --map-by "ppr:$GPUS:node" --bind-to none ${MPI_FLAGS:-} "${variables[@]}" "$TRAINER" "$@"
