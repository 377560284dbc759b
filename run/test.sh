#!/usr/bin/env bash
# Run the tests: 17 minutes on two cores (measured).
#   bash run/test.sh [--all] [pytest's arguments]
# --all: also the whole of the large matrices (marker `slow`). It makes .venv; an active environment, or the interpreter that
# PYTHON names, is used instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source run/environment.sh
environment dev

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 # the tests themselves run side by side; no test may need a network
selection=(-m "not slow and not gpu")
if [ "${1:-}" = "--all" ]; then
  selection=(-m "not gpu")
  shift
fi
# three for two cores: many tests wait for processes of their own
exec "$PYTHON" -m pytest -n 3 --dist loadfile "${selection[@]}" "$@"
