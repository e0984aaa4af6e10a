#!/usr/bin/env bash
# The four stages of the transformer on one machine of eight GPUs, one after another; each begins with the one before.
#
# Machine: 8 GPUs of 80 GB.    Time: 28 days on H100 for all steps of the paper (estimate: svg_t2i.plan).
# Price: 5,430 GPU-hours.      Data: DATA_PATH, and DATA_SFT for the last stage; svg_t2i/pre-trained/ for the autoencoders
# Out: svg_t2i/results/stage1_256 … stage4_sft, each a model for `svg_t2i.sample`
#
#   DATA_PATH=/data/shards DATA_SFT=/data/sft bash runs/node_8gpus.sh [key=value for every stage …]
# Stopped and started again it goes on where it was; a stage that is done is passed over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../svg_t2i"

data=${DATA_PATH:?set DATA_PATH to what holds images and captions}
stages=(${STAGES:-stage1_256 stage2_512 stage3_1024 stage4_sft})
launch=${LAUNCH:-scripts/run_train_8gpus.sh}

for stage in "${stages[@]}"; do
    path=$data
    [ "$stage" != stage4_sft ] || path=${DATA_SFT:-$data}
    CONFIG=configs/svg_t2i/$stage.yaml DATA_PATH=$path bash "$launch" "$@"
done
