#!/usr/bin/env bash
# The whole recipe at toy size, from nothing to pictures, without any download but the Python packages:
#
#   bash scripts/quickstart.sh                      draws one and two things, trains, asks for combinations never seen
#   bash scripts/quickstart.sh --short              a few steps of everything: it runs, and learns nothing
#   bash scripts/quickstart.sh --data FOLDER        on your images and captions: whatever docs/your-data.md lists
#   bash scripts/quickstart.sh --resolution 128     with --data: side of the squares, a multiple of 16
#   bash scripts/quickstart.sh --output DIR         somewhere else than outputs/quickstart
#   bash scripts/quickstart.sh --pictures           later: what else the model can do, into outputs/quickstart/pictures
#
# Look at samples.png and report.json in the output folder afterwards. OMP_NUM_THREADS sets how many cores are used.
set -euo pipefail

script=$(realpath "${BASH_SOURCE[0]}")
source "$(dirname "$script")/environment.sh"
run_recipe "$script" recipe.py "$@"
