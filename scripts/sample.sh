#!/usr/bin/env bash
# Draw images for prompts with a trained or published SVG-DiT. Run from svg_t2i/ or from the repository root:
#   bash scripts/sample.sh                       with the variables below
#   bash scripts/sample.sh --prompt "a red fox"  further arguments are passed on and win
set -euo pipefail

checkpoint=${CHECKPOINT:-pre-trained/svg-t2i/stage4-sft}
autoencoder=${AUTOENCODER:-pre-trained/autoencoder/svg_autoencoder_P_stage3_1024.yaml}
latent_stats=${LATENT_STATS:-pre-trained/dinov3_s16p_layer_patchtoken_stats_dist.pt}
text_encoder=${TEXT_ENCODER:-google/gemma-2-2b}
prompts=${PROMPTS:-configs/example_prompts.txt}
output=${OUTPUT:-samples/$(date +%Y%m%d-%H%M%S)}

resolution=(${RESOLUTION:-1024:1024x1024})  # [category:]WIDTHxHEIGHT, several separated by spaces
solver=dpm                                  # dpm | euler | heun | midpoint | dopri5
num_inference_steps=50
guidance_scale=4.0
time_shift=                                 # empty: 10 for dpm, 6 for the ODE solvers
seed=0                                      # image i of every prompt uses seed + i
num_images_per_prompt=1
batch_size=4
system_prompt=base                          # base | align | aesthetics | real | 4grid | empty

repo_root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH="$repo_root${PYTHONPATH:+:$PYTHONPATH}"
[ -e "$prompts" ] || prompts="$repo_root/$prompts"

# An own run remembers its autoencoder and text encoder: AUTOENCODER= TEXT_ENCODER= LATENT_STATS= (empty) uses those.
parts=()
[ -z "${AUTOENCODER-x$autoencoder}" ] || parts+=(--autoencoder "$autoencoder")
[ -z "${LATENT_STATS-x$latent_stats}" ] || parts+=(--latent_stats "$latent_stats")
[ -z "${TEXT_ENCODER-x$text_encoder}" ] || parts+=(--text_encoder "$text_encoder")
[ -z "$time_shift" ] || parts+=(--time_shift "$time_shift")
case " $* " in *" --prompt "*|*" --prompts "*) ;; *) parts+=(--prompts "$prompts") ;; esac

exec python -m svg_t2i.sample --checkpoint "$checkpoint" "${parts[@]}" --output "$output" \
    --resolution "${resolution[@]}" --solver "$solver" --num_inference_steps "$num_inference_steps" \
    --guidance_scale "$guidance_scale" --seed "$seed" \
    --num_images_per_prompt "$num_images_per_prompt" --batch_size "$batch_size" \
    --system_prompt "$system_prompt" "$@"
