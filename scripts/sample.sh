#!/usr/bin/env bash
# Draw images for prompts with a trained or published SVG-DiT. Run from svg_t2i/ or from the repository root:
#   bash scripts/sample.sh                       with the variables below
#   bash scripts/sample.sh --prompt "a red fox"  further arguments are passed on and win
#   NPROC_PER_NODE=8 bash scripts/sample.sh      on several GPUs; the same images
set -euo pipefail

checkpoint=${CHECKPOINT:-pre-trained}  # a published folder, a run, a saved pipeline, or a Hugging Face id
subfolder=${SUBFOLDER:-}               # which DiT, where the folder holds several
preset=${PRESET:-}                     # stage1 | stage2 | stage3 | stage4 | quickstart; empty: what suits the model
prompts=${PROMPTS:-configs/example_prompts.txt}
output=${OUTPUT:-samples/$(date +%Y%m%d-%H%M%S)}

# Empty: what the model was trained with, or what lies beside it in pre-trained/.
autoencoder=${AUTOENCODER:-}
latent_stats=${LATENT_STATS:-}
text_encoder=${TEXT_ENCODER:-}

# Empty: the model's own settings, or the preset's.
resolution=(${RESOLUTION:-}) # [category:]WIDTHxHEIGHT, several separated by spaces
solver=                      # dpm | euler | heun | midpoint | heun3 | dopri5
num_inference_steps=
guidance_scale=
guidance_interval=()         # (LO HI), from 0 noise to 1 image
time_shift=                  # a number, or dynamic
system_prompt=               # base | align | aesthetics | real | 4grid | empty

seed=0                       # image i of every prompt uses seed + i
num_images_per_prompt=1
batch_size=4

repo_root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH="$repo_root${PYTHONPATH:+:$PYTHONPATH}"
[ -e "$prompts" ] || prompts="$repo_root/$prompts"

options=()
for name in subfolder preset autoencoder latent_stats text_encoder solver num_inference_steps guidance_scale \
    time_shift system_prompt; do
    [ -z "${!name}" ] || options+=("--$name" "${!name}")
done
[ ${#resolution[@]} -eq 0 ] || options+=(--resolution "${resolution[@]}")
[ ${#guidance_interval[@]} -eq 0 ] || options+=(--guidance_interval "${guidance_interval[@]}")
case " $* " in *" --prompt "* | *" --prompts "*) ;; *) options+=(--prompts "$prompts") ;; esac

launch=(python)
[ "${NPROC_PER_NODE:-1}" -eq 1 ] || launch=(python -m autoencoder.common.launch --standalone --nproc_per_node "$NPROC_PER_NODE")
exec "${launch[@]}" -m svg_t2i.sample --checkpoint "$checkpoint" --output "$output" --seed "$seed" \
    --num_images_per_prompt "$num_images_per_prompt" --batch_size "$batch_size" "${options[@]}" "$@"
