#!/usr/bin/env bash
# The tests against a real vLLM (CPU build, an environment of its own): bash scripts/test_vllm.sh [pytest flags]. Some 10 minutes and
# 4 GB of memory; not part of test.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_vllm.sh"
cd "$root"
PTUNING_TEST_VLLM="$vllm_python" exec "$python" -m pytest tests/ptuning_vllm/test_real_vllm.py -v "$@"
