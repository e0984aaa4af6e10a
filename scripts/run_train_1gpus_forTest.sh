#!/usr/bin/env bash
# A short training run of one process: bash scripts/run_train_1gpus_forTest.sh <RANK ID, 0>
# Run from svg_t2i/ or from the repository root; key=value arguments change fields of the config:
#   bash scripts/run_train_1gpus_forTest.sh 0 train.max_steps=2 model=tiny
set -euo pipefail

config=${CONFIG:-configs/svg_t2i/forTest_1gpu.yaml}
results_dir=${RESULTS_DIR:-}  # below the folder you are in; empty: the config's
data_path=${DATA_PATH:-}      # manifest, .jsonl or .json; empty: the config's
init_from=${INIT_FROM:-}      # checkpoint, run or published folder to take first weights from
settings=(                    # more fields, for example:
    # optim.lr=1e-4
    # train.micro_batch_size=8
)

nnodes=1
nproc_per_node=${NPROC_PER_NODE:-1}
master_addr=${MASTER_ADDR:-127.0.0.1}
master_port=${MASTER_PORT:-}
node_rank=${1:-0}
shift $(( $# > 0 ? 1 : 0 ))

source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/launch_train.sh"
launch_train "$@"
