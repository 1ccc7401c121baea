#!/usr/bin/env bash
# Format, lint, types and tests, two files at a time. Further words go to pytest: -m slow, -k sampler ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
environment dev
cd "$root"
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1
ruff format --check --quiet .
ruff check --quiet .
mypy
exec "$python" -m pytest -n 2 --dist loadfile "$@"
