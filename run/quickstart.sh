#!/usr/bin/env bash
# Train two tiny models on real data, sample from both, and measure what they have learned: at most five minutes on two cores
# after the installation. Needs Python 3.11 or newer and nothing else.
#   bash run/quickstart.sh [--scale 0.1] [--out FOLDER]
# It makes .venv; an active environment, or the interpreter that PYTHON names, is used instead. QUICKSTART_SCALE=0.1 is --scale 0.1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source run/environment.sh
environment
# Threads that wait for each other sleep instead of spinning: where other programs run too, that is several times as fast.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$PYTHON" run/quickstart.py "$@"
