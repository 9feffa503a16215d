#!/usr/bin/env bash
# All figures of a GPU with the real shape of ChatGLM2-6B, as one JSON file and a table: bash benchmarks/gpu.sh [flags of gpu.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup.sh"
exec "$python" "$root/benchmarks/gpu.py" "$@"
