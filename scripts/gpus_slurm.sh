#!/usr/bin/env bash
#SBATCH --job-name=train_gpt_nsa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120
#SBATCH --requeue
# gpus_slurm.sh FLAG...: trains on all GPUs of a Slurm job, one task per GPU, without MPI. The flags are the
# trainer's. The #SBATCH lines are for two hosts of 8 GPUs; flags of sbatch override them. Slurm sends SIGTERM
# to the tasks two minutes before the time limit. The trainer then finishes the step and writes a checkpoint.
# With -y 1 the requeued job resumes from the checkpoint. srun carries a new secret to all tasks.
#   sbatch --nodes=4 scripts/gpus_slurm.sh -e llama3-8b -i '/shared/data/train_*.bin' -b 1 -t 65536 -cp 8 \
#       -z 2 -r 2 -o /shared/log -y 1
set -eu
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; exit ;; esac
TRAINER=${TRAINER:-./train_gpt_nsa}
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: not in a Slurm job; start this script with sbatch" >&2; exit 1; }
[ -x "$TRAINER" ] || { echo "error: $TRAINER: no such program; build it with make train_gpt_nsa, or name another one in TRAINER" >&2; exit 1; }
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
MASTER_SECRET=${MASTER_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
export MASTER_SECRET
exec srun --export=ALL --kill-on-bad-exit=1 "$TRAINER" "$@"
