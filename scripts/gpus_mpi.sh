#!/usr/bin/env bash
# gpus_mpi.sh HOST[,HOST...] FLAG...: trains on all GPUs of these hosts with Open MPI's mpirun. The flags are
# the trainer's. The program, the data and the folder -o must have the same path on all hosts. ssh must work
# without a password.
#   scripts/gpus_mpi.sh node1,node2 -e llama3-8b -i '/shared/data/train_*.bin' -b 1 -t 65536 -cp 8 -z 2 -r 2 \
#       -o /shared/log
# Environment: GPUS (number of GPUs per host; 8), TRAINER (./train_gpt_nsa), MPI_FLAGS (more flags for
# mpirun).
# scripts/README.md lists the variables of the trainer and of NCCL.
# SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C make the processes finish the step and write a checkpoint. All reach
# the processes as SIGUSR2: mpirun kills them after some of the others, and that of Open MPI 4.1.6 on Ubuntu was seen
# not to forward SIGUSR1.
set -eu
. "$(dirname "$0")/common.sh"
usage "$@"
TRAINER=$(realpath -m -- "${TRAINER:-./train_gpt_nsa}") GPUS=${GPUS:-8}
[ $# -ge 1 ] && [[ $1 != -* ]] || die "no hosts: gpus_mpi.sh HOST[,HOST...] FLAG...; -h explains it"
whole_numbers GPUS
need_trainer
hosts=$1
shift
count=$(echo "$hosts" | tr ',' '\n' | wc -l)
if [ -n "${MASTER_ADDR:-}" ] && [ -z "${MASTER_SECRET:-}" ]; then # else MPI or MASTER_DIR carries the secret
    MASTER_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    export MASTER_SECRET
fi
variables=()
for name in $(compgen -e | grep -E '^(NCCL_|MASTER_(ADDR|PORT|DIR|SECRET)$|CUDA_VISIBLE_DEVICES$|LD_LIBRARY_PATH$)'); do
    variables+=(-x "$name")
done
forward_as=USR2
start mpirun -np $((count * GPUS)) --host "$(echo "$hosts" | sed "s/,/:$GPUS,/g"):$GPUS" \
    --map-by "ppr:$GPUS:node" --bind-to none ${MPI_FLAGS:-} "${variables[@]}" "$TRAINER" "$@"
wait_for $!
