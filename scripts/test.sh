#!/usr/bin/env bash
# Installs what the tests need and runs them all; further arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/svg_t2i -k solvers
set -euo pipefail

source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"
activate_environment
install -r requirements.txt
install -e ".[dev]"
set_threads
cd "$REPO_ROOT"
exec python -m pytest "$@"
