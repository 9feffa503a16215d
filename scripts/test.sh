#!/usr/bin/env bash
# The tests: bash scripts/test.sh [pytest flags]. Makes its own .venv the first time.
#
#   bash scripts/test.sh --python 3.12 [pytest flags]     the fast tests with that Python, in a .venv-3.12 of their own
set -euo pipefail
fast=()
if [ "${1:-}" = --python ]; then
    [[ "${2:-}" =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] || { echo "test: --python needs 3.11 or newer, e.g. --python 3.12; it is '${2:-}'" >&2; exit 2; }
    python_version="$2" fast=(-m "not slow")
    shift 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
# One more than there are cores, because tests also wait for processes; each takes 1 to 3 GB.
workers=$(($(getconf _NPROCESSORS_ONLN) + 1))
exec "$python" -m pytest -n $((workers < 4 ? workers : 4)) --dist loadfile --no-loadscope-reorder ${fast[@]+"${fast[@]}"} "$@"
