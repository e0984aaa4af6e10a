#!/usr/bin/env bash
# Installs what the tests need and runs them all, one process a core; further arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/svg_t2i -k solvers
set -euo pipefail

source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"
activate_environment
install -r requirements.txt
install -e ".[dev,app]"
processes=${TEST_PROCESSES:-$(unset OMP_NUM_THREADS; nproc 2>/dev/null || sysctl -n hw.ncpu)}
export OMP_NUM_THREADS=1  # a process a core: more threads would only wait for each other
set_threads
cd "$REPO_ROOT"
exec python -m pytest -n "$processes" --dist loadfile "$@"
