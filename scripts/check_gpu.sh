#!/usr/bin/env bash
# Everything that a GPU can show, most important first, within some minutes; safe to be cut off at any time:
#
#   bash scripts/check_gpu.sh                    # 10 minutes; writes outputs/gpu_report/gpu_report.{json,md}
#   bash scripts/check_gpu.sh --minutes 30 --parity_dir ../shared/parity    # all parts; in 10 minutes the last are left out
#   bash scripts/check_gpu.sh --parts training_512 attention                # these, into the same report
#   bash scripts/check_gpu.sh --device cpu       # the same parts at toy size, without a GPU
set -euo pipefail

source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"
activate_environment
install -r requirements.txt
install -e ".[dev]"
cd "$REPO_ROOT"
exec python -m benchmarks.gpu_report "$@"
