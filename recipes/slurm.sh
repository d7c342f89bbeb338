#!/usr/bin/env bash
# Any of the scripts on two nodes of eight GPUs under Slurm; for others change the #SBATCH lines.
#     sbatch recipes/slurm.sh main_moco.py @recipes/vit_base_300.txt /data/imagenet --resume auto
# Five minutes before its time is over the run is stopped and saved, and the job queued again;
# --resume auto: then, or after a preemption, it goes on where it was.
#SBATCH --job-name=moco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=72:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --output=slurm-%j.out
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch recipes/slurm.sh SCRIPT.py [FLAGS…] [DIR]" >&2
    exit 2
fi

# Saving takes longer than the 30 seconds that torchrun gives.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# Where hosts don't find each other, export NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, the name of the
# network's interface, here.

# srun doesn't take the cores over from sbatch (Slurm 22.05).
# torchrun, once on each node, starts a process for each GPU; the first node is where they meet.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
echo "${SLURM_JOB_NUM_NODES} node(s): ${hosts[*]}"
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
    "$@" &
step=$! again=
trap 'again=yes; kill -TERM "$step"' USR1

code=0
wait "$step" || code=$?
if [[ $again ]]; then
    wait "$step" || true # the signal had ended the first wait
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
