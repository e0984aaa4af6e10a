#!/usr/bin/env bash
# The whole recipe at toy size on a CPU, and a new word learnt by it.
#
# Machine: two CPU cores, 4 GB.   Time: 12 minutes (measured).   Price: nothing.
# Data: drawn by the script.      Out: outputs/cpu/quickstart (a model, samples.png, report.json), outputs/cpu/star
#
#   bash runs/cpu.sh              --short: three minutes, learns nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

output=${OUTPUT:-outputs/cpu}
bash scripts/quickstart.sh --output "$output/quickstart" "$@"
bash scripts/quickstart_lora.sh --quickstart "$output/quickstart" --output "$output/star" "$@"
