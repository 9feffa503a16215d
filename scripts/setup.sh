#!/usr/bin/env bash
# Makes .venv from requirements.lock, once. Sourced by the other scripts; sets $python. With python_version=3.12 it is
# .venv-3.12 with that Python.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

setup_fail() { echo "setup: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    setup_fail "no Python 3.11 or newer found. Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or set PYTHON=/path/to/python3"
}

# The interpreter of one version: a pyenv shim is there also for a version that isn't in use, so it must run.
find_version() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    setup_fail "no Python $1 found. Install it (Debian, Ubuntu: apt-get install python$1 python$1-venv, where the release has it)"
}

venv="$root/.venv${python_version:+-$python_version}"
python="$venv/bin/python"
stamp="$venv/.installed"
wanted="$(cksum < "$root/requirements.lock")"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    if [ -n "${python_version:-}" ]; then base="$(find_version "$python_version")"; else base="$(find_python)"; fi
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        setup_fail "$base has no venv module. Debian, Ubuntu: apt-get install python${python_version:-3}-venv"
    echo "setup: installing into ${venv##*/} (once; a few minutes)"
    [ -x "$python" ] || "$base" -m venv "$venv"
    log="$venv/install.log"
    if ! { "$python" -m pip install --disable-pip-version-check -r "$root/requirements.lock" &&
        "$python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e "$root"; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        setup_fail "pip failed, see $log. It needs a package registry that pip reaches, and about 5 GB of disk (CPU) or 12 GB (CUDA)"
    fi
    echo "$wanted" >"$stamp"
fi
