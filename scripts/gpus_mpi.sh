#!/usr/bin/env bash
# gpus_mpi.sh HOST[,HOST...] FLAG...: trains on all GPUs of these hosts, started by mpirun of Open MPI from here; the flags
# are the trainer's. The program, the data and the folder -o must lie at the same place on all of them; ssh without a
# password must reach them.
#   scripts/gpus_mpi.sh node1,node2 -e llama3-8b -i '/shared/data/train_*.bin' -b 1 -t 65536 -cp 8 -z 2 -r 2 -o /shared/log
#   GPUS=8: of each host; MPI_FLAGS: more for mpirun. Variables: scripts/README.md
set -eu
TRAINER=$(realpath "${TRAINER:-./train_gpt_nsa}") GPUS=${GPUS:-8}
[ $# -ge 1 ] || { sed -n 's/^# //p' "$0" >&2; exit 1; }
hosts=$1
shift
count=$(echo "$hosts" | tr ',' '\n' | wc -l)
variables=()
for name in $(compgen -e | grep -E '^(NCCL_|CUDA_VISIBLE_DEVICES$|LD_LIBRARY_PATH$)'); do variables+=(-x "$name"); done
exec mpirun -np $((count * GPUS)) --host "$(echo "$hosts" | sed "s/,/:$GPUS,/g"):$GPUS" --map-by "ppr:$GPUS:node" --bind-to none \
    ${MPI_FLAGS:-} "${variables[@]}" "$TRAINER" "$@"
