#!/usr/bin/env bash
# One rank on this host, under a torchrun of its own that starts it again when it dies. On each host of a job:
#   ./launch/host.sh RANK RANKS MASTER_HOST[:PORT] key=value ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
[ $# -ge 3 ] || {
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
rank=$1 ranks=$2 master=$3
shift 3
port=29500
case $master in *:*) port=${master##*:} master=${master%:*} ;; esac
restarts="${MAX_RESTARTS:-100}"
[ "$rank" != 0 ] || restarts="${MASTER_MAX_RESTARTS:-3}" # whoever comes in its place begins to load anew
environment
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m torch.distributed.run --nnodes "$ranks" --node-rank "$rank" --nproc-per-node 1 \
    --master-addr "$master" --master-port "$port" --max-restarts "$restarts" -m distllm.run "$@"
