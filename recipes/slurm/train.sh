#!/bin/bash
# Train on several machines under SLURM:
#
#   sbatch recipes/slurm/train.sh stage1 --variant xformer --data recipes/data/paper-14m.json --output-dir /shared/runs/stage1
#
# What follows the script's name is what follows `xformer train`. One task per machine; torchrun starts a process for each of
# its GPUs. A job that is requeued, or submitted again with the same words, goes on from the newest good checkpoint.
# --output-dir and the data must be on a file system that all machines see.
#
# FSDP instead of DDP: put `accelerate launch --config_file recipes/accelerate/one-node-fsdp.yaml` with --num_machines,
# --num_processes, --machine_rank "$SLURM_NODEID", --main_process_ip and --main_process_port in place of torchrun.

#SBATCH --job-name=xformer
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs that share a machine do not meet
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))}"

srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
    --no-python xformer train "$@"
