#!/usr/bin/env bash
# Train the SVG autoencoder:  bash run_train.sh <GPU NUM> <CONFIG> [key.sub=value ...]
#
#   bash run_train.sh 1 configs/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest
#
# CONFIG with or without .yaml. Further arguments override its entries. Run it again to go on from the last checkpoint.
set -euo pipefail

case "${1:---help}" in -h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit $(( $# == 0 ? 2 : 0 ))  # without arguments nothing is started
    ;;
esac

GPUS=${1:-1}                             # processes on this machine: one per GPU, or CPU processes where there is none
CONFIG=${2:-configs/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest}
LOGDIR=                                  # results: LOGDIR/<config name>/; empty: training.logdir of the config
PYTHON=${PYTHON:-python}

# Several machines: set NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) and run the script on each.
NNODES=${NNODES:-}

cd "$(dirname "${BASH_SOURCE[0]}")"
export PYTHONPATH="$(cd .. && pwd)${PYTHONPATH:+:$PYTHONPATH}"

exec "$PYTHON" -m autoencoder.train --config "$CONFIG" --devices "$GPUS" \
    ${LOGDIR:+"training.logdir=$LOGDIR"} ${NNODES:+"training.trainer.num_nodes=$NNODES"} "${@:3}"
