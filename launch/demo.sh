#!/usr/bin/env bash
# Two ranks on this host share the default model and write a text. Further words are passed on: prompt="Hello" ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
environment
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun would set it too, and say so at length
exec "$python" -m torch.distributed.run --nproc-per-node 2 --master-port "$(free_port)" -m distllm.run "$@"
