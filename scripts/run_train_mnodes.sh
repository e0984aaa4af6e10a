#!/usr/bin/env bash
# Train on several machines; on each of them: bash scripts/run_train_mnodes.sh <RANK ID: 0, 1, … NNODES - 1>
# MASTER_ADDR, MASTER_PORT, NNODES and NPROC_PER_NODE come from the environment.
# Processes need about 6 open files each for every other one: with 1,000 of them, `ulimit -Hn` has to say 8000 or more.
# Run from svg_t2i/ or from the repository root; key=value arguments change fields of the config:
#   NNODES=2 MASTER_ADDR=10.0.0.1 bash scripts/run_train_mnodes.sh 0 optim.lr=1e-4
set -euo pipefail

config=${CONFIG:-configs/svg_t2i/stage1_256.yaml}
results_dir=${RESULTS_DIR:-}  # below the folder you are in; empty: the config's
data_path=${DATA_PATH:-}      # manifest, .jsonl or .json; empty: the config's
init_from=${INIT_FROM:-}      # checkpoint, run or published folder to take first weights from
settings=(                    # more fields, for example:
    # optim.lr=1e-4
    # train.micro_batch_size=8
)

nnodes=${NNODES:-4}
nproc_per_node=${NPROC_PER_NODE:-8}
master_addr=${MASTER_ADDR:-127.0.0.1}
master_port=${MASTER_PORT:-29500}
node_rank=${1:-0}
shift $(( $# > 0 ? 1 : 0 ))

source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/launch_train.sh"
launch_train "$@"
