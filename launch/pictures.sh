#!/usr/bin/env bash
# Pictures of the server's live page for docs/, taken while one of its ranks dies.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
environment dev
export OMP_NUM_THREADS=1 PYTHONPATH="$root/tests"
exec "$python" "$root/tests/ring/page_pictures.py"
