#!/usr/bin/env bash
# Any of the scripts on two nodes of eight GPUs under Slurm; for others change the #SBATCH lines.
#     sbatch recipes/slurm.sh main_moco.py @recipes/vit_base_300.txt /data/imagenet --resume auto
# --resume auto: a job that Slurm queues again goes on where it was.
#SBATCH --job-name=moco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=72:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch recipes/slurm.sh SCRIPT.py [FLAGS…] [DIR]" >&2
    exit 2
fi

# srun doesn't take the cores over from sbatch (Slurm 22.05).
# torchrun, once on each node, starts a process for each GPU; the first node is where they meet.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
echo "${SLURM_JOB_NUM_NODES} node(s): ${hosts[*]}"
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
    "$@"
