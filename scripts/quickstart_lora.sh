#!/usr/bin/env bash
# The quickstart's model learns a new word, "star", from ten pictures: a LoRA, trained in two minutes on a CPU. Needs the
# results of scripts/quickstart.sh.
#
#   bash scripts/quickstart_lora.sh                       draws ten stars, learns them, asks for others and for old things
#   bash scripts/quickstart_lora.sh --short               a few steps of everything: it runs, and learns nothing
#   bash scripts/quickstart_lora.sh --quickstart DIR      where quickstart.sh left its model, if not in outputs/quickstart
#   bash scripts/quickstart_lora.sh --output DIR          somewhere else than outputs/quickstart_lora
#
# Look at stars.png and report.json in the output folder afterwards. OMP_NUM_THREADS sets how many cores are used.
set -euo pipefail

script=$(realpath "${BASH_SOURCE[0]}")
source "$(dirname "$script")/environment.sh"
run_recipe "$script" learn_star.py "$@"
