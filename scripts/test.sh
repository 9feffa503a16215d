#!/usr/bin/env bash
# The tests: bash scripts/test.sh [pytest flags]. Makes its own .venv the first time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
exec "$python" -m pytest -n 2 --dist worksteal "$@"
