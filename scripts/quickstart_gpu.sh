#!/usr/bin/env bash
# The quickstart on one GPU: at 256 px, where an image has 256 latents instead of 16, with a transformer of 50 million
# parameters instead of 6. About three minutes, which nobody has measured yet; report.json has the seconds.
#
#   bash scripts/quickstart_gpu.sh                   the same steps and the same report as scripts/quickstart.sh
#   bash scripts/quickstart_gpu.sh --short           a few steps of everything: it runs, and learns nothing; also on a CPU
#   bash scripts/quickstart_gpu.sh --output DIR      somewhere else than outputs/quickstart_gpu
#
# Look at samples.png and report.json in the output folder afterwards.
set -euo pipefail

script=$(realpath "${BASH_SOURCE[0]}")
source "$(dirname "$script")/environment.sh"
case " $* " in *" --output"*) ;; *) set -- --output outputs/quickstart_gpu "$@" ;; esac
run_recipe "$script" recipe.py --gpu "$@"
