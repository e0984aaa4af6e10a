#!/usr/bin/env bash
# A LoRA of the published model on your pictures, then pictures of what it learnt, on one card of 24 GB.
#
# Machine: one GPU of 24 GB.      Time: about an hour (estimate: svg_t2i.plan).   Price: below a dollar, rented.
# Data: ten images and more, captions in .txt files beside them; svg_t2i/pre-trained/ (docs/published-weights.md)
# Out: results/my_lora (an adapter for this code and for diffusers), outputs/my_lora
#
#   DATA=my_images PROMPT="what the captions call it, on a beach" bash runs/card_24gb.sh [key=value …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=${DATA:?set DATA to the folder of your images}
prompt=${PROMPT:?set PROMPT to what should be drawn}
results=${RESULTS_DIR:-results/my_lora}
output=${OUTPUT:-outputs/my_lora}
checkpoint=${INIT_FROM:-svg_t2i/pre-trained}

python -m svg_t2i.inspect_data "$data" --output "$output/inspect_data"
python -m svg_t2i.train --config configs/svg_t2i/finetune_lora.yaml data.path="$data" results_dir="$results" \
    init_from="$checkpoint" "$@"
python -m svg_t2i.sample --checkpoint "$results" --prompt "$prompt" --num_images_per_prompt 4 --output "$output/samples"
