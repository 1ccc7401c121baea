#!/usr/bin/env bash
# 200 clients that stream, for five minutes, and a table of what they got: --clients 200 --minutes 5; who else is to bear
# it: --beside vllm --vllm-python VENV/bin/python; SIGKILL meanwhile: --faults worker@60 master@120 front@200.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
environment dev
export OMP_NUM_THREADS=1
exec "$python" "$root/tests/load.py" "$@"
