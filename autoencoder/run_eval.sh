#!/usr/bin/env bash
# Evaluate reconstructions and fill the table:  bash run_eval.sh <GPU NUM> <IMAGES> [further arguments]
#
#   bash run_eval.sh 8 /data/imagenet/val                       the standard run: ImageNet-1k val, 50,000 images
#   CONFIGS=my.yaml RESOLUTIONS="256" bash run_eval.sh 1 photos --checkpoint last.ckpt
#
# IMAGES is a folder or a manifest. Every config is evaluated at every resolution, one row each in OUTPUT/table.md.
# Variants that have results are skipped, so that the command can be repeated until the table is full.
set -euo pipefail

case "${1:---help}" in -h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit $(( $# == 0 ? 2 : 0 ))  # without arguments nothing is started
    ;;
esac

GPUS=${1:-1}                             # processes on this machine: one per GPU, or CPU processes where there is none
IMAGES=${2:-}
CONFIGS=${CONFIGS:-$(echo configs/pre-trained/svg_autoencoder_{P,R}_stage{1_256,2_512,3_1024}.yaml)}
RESOLUTIONS=${RESOLUTIONS:-256 512 1024}
BATCH_SIZE=${BATCH_SIZE:-16}             # per GPU
NUM_WORKERS=${NUM_WORKERS:-8}            # processes that read images, per GPU
OUTPUT=${OUTPUT:-results/reconstruction}
PYTHON=${PYTHON:-python}

if [ -z "$IMAGES" ]; then
    echo "error: bash run_eval.sh <GPU NUM> <IMAGES>: name a folder of images or a manifest" >&2
    exit 2
fi

IMAGES=$(realpath "$IMAGES")
cd "$(dirname "${BASH_SOURCE[0]}")"
export PYTHONPATH="$(cd .. && pwd)${PYTHONPATH:+:$PYTHONPATH}"

run=("$PYTHON" -m)
(( GPUS == 1 )) || run=("$PYTHON" -m autoencoder.common.launch --standalone --nproc_per_node "$GPUS" -m)

status=0
for config in $CONFIGS; do
    name=$(basename "$config" .yaml)
    if [ -f "$OUTPUT/$name/metrics.json" ]; then
        echo "$OUTPUT/$name has results; delete it to evaluate $config again"
        continue
    fi
    "${run[@]}" autoencoder.evaluate_reconstruction "$config" --data "$IMAGES" --resolution $RESOLUTIONS \
        --batch-size "$BATCH_SIZE" --num-workers "$NUM_WORKERS" --output "$OUTPUT/$name" --table "$OUTPUT/table.md" \
        "${@:3}" || { status=$?; echo "error: $config was not evaluated" >&2; }
done
[ ! -f "$OUTPUT/table.md" ] || cat "$OUTPUT/table.md"
exit "$status"
