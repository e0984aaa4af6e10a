#!/usr/bin/env bash
# Train on the 8 GPUs of one machine: bash scripts/run_train_8gpus.sh
# Run from svg_t2i/ or from the repository root; key=value arguments change fields of the config:
#   bash scripts/run_train_8gpus.sh train.micro_batch_size=12
set -euo pipefail

config=${CONFIG:-configs/svg_t2i/stage1_256.yaml}
results_dir=${RESULTS_DIR:-}  # below the folder you are in; empty: the config's
data_path=${DATA_PATH:-}      # manifest, .jsonl or .json; empty: the config's
init_from=${INIT_FROM:-}      # checkpoint, run or published folder to take first weights from
settings=(                    # more fields, for example:
    # optim.lr=1e-4
    # train.micro_batch_size=8
)

nnodes=1
nproc_per_node=${NPROC_PER_NODE:-8}
master_addr=${MASTER_ADDR:-127.0.0.1}
master_port=${MASTER_PORT:-}
node_rank=0

source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/launch_train.sh"
launch_train "$@"
