#!/usr/bin/env bash
# One stage of the recipe on eight machines of eight GPUs, under Slurm: sbatch runs/slurm.sh
# As turns one after another: sbatch --array=1-20%1 runs/slurm.sh. Turns after the end of the training load it and stop.
#
# Machine: 64 GPUs of 80 GB.   Time and price: python -m svg_t2i.plan --config stage1_256 --gpus 64 --gpu h100 --price 2.5
# Data: DATA_PATH.             Out: svg_t2i/results/stage1_256, or RESULTS_DIR
#
#   CONFIG=configs/svg_t2i/stage2_512.yaml DATA_PATH=/data/shards sbatch runs/slurm.sh [key=value …]
#SBATCH --job-name=svg-t2i
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

export NNODES=${SLURM_NNODES:-1} NPROC_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

# srun passes Slurm's signal on; each torchrun lets its processes finish their step and save. Code 75: start it again.
status=0
srun bash -c 'exec bash scripts/run_train_mnodes.sh "$SLURM_PROCID" "$@"' run_train_mnodes "$@" || status=$?
if [ "$status" -eq 75 ] && [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
