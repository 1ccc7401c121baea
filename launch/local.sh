#!/usr/bin/env bash
# N ranks on this host, each under a torchrun of its own, so that one that dies takes nobody with it and comes back:
#   ./launch/local.sh N key=value ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
[ $# -ge 1 ] && [ "$1" -gt 0 ] 2>/dev/null || {
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
ranks=$1
shift
environment
master="127.0.0.1:$(free_port)"
agents=()
trap 'kill "${agents[@]}" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for ((rank = ranks - 1; rank > 0; rank--)); do
    "$root/launch/host.sh" "$rank" "$ranks" "$master" "$@" </dev/null &
    agents+=($!)
done
"$root/launch/host.sh" 0 "$ranks" "$master" "$@" <&0 &
first=$!
agents+=("$first")
code=0
wait "$first" || code=$?
exit "$code"
