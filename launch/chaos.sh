#!/usr/bin/env bash
# Hundreds of faults while requests run, and a table of what they cost: --faults 300 --seed 0 --only "SIGSTOP decode"; with
# a rank that stands by: --spares 1; jobs under torchrun, rank 0 struck too: --torchrun --faults 46.
# A soak with a random fault every 10 seconds, and its plot: --minutes 30 --plot soak.png
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
environment dev
export OMP_NUM_THREADS=1
exec "$python" "$root/tests/chaos.py" "$@"
