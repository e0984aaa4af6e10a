#!/usr/bin/env bash
# The whole recipe on 64 GPUs under Slurm: the four stages as jobs that wait for each other.
#
# Machine: 64 GPUs of 80 GB.   Time: 3.5 days on H100 (estimate: svg_t2i.plan).   Price: 5,430 GPU-hours, 13,600 dollars at 2.50
# Data: DATA_PATH, DATA_SFT.   Out: svg_t2i/results/stage1_256 … stage4_sft
#
#   DATA_PATH=/data/shards DATA_SFT=/data/sft bash runs/full_64gpus.sh [key=value for every stage …]
# Run it on the login machine. SUBMIT replaces `sbatch --parsable`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=${DATA_PATH:?set DATA_PATH to what holds images and captions}
submit=${SUBMIT:-sbatch --parsable}
turns=${TURNS:-20}  # of 24 hours at most for a stage; those after its end load it and stop

after=()
for stage in stage1_256 stage2_512 stage3_1024 stage4_sft; do
    path=$data
    [ "$stage" != stage4_sft ] || path=${DATA_SFT:-$data}
    job=$(CONFIG=configs/svg_t2i/$stage.yaml DATA_PATH=$path $submit "${after[@]}" --array="1-$turns%1" runs/slurm.sh "$@")
    echo "$stage: job $job"
    after=(--dependency="afterany:$job")
done
