#!/usr/bin/env bash
# Makes .venv-vllm, vLLM's own environment (its transformers is another than this package's), once: about 4 minutes and 3.5 GB. Sourced
# by serve_vllm.sh and test_vllm.sh; sets $vllm_python.
#
#   VLLM_PYTHON=/path/to/python     an environment that is there already, with vLLM 0.32.0 in it (the GPU build: pip install vllm==0.32.0)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ -n "${VLLM_PYTHON:-}" ]; then
    vllm_python="$VLLM_PYTHON"
    "$vllm_python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("vllm"))' ||
        setup_fail "VLLM_PYTHON=$VLLM_PYTHON has no vllm: pip install vllm==0.32.0 there"
else
    vllm_venv="$root/.venv-vllm" vllm_python="$root/.venv-vllm/bin/python"
    vllm_wanted="$(cksum < "$root/ptuning_vllm/requirements-cpu.txt")"
    if [ ! -f "$vllm_venv/.installed" ] || [ "$(cat "$vllm_venv/.installed")" != "$vllm_wanted" ]; then
        echo "setup: installing vLLM's CPU build into .venv-vllm (once; about 4 minutes, 3.5 GB)"
        [ -x "$vllm_python" ] || "$(find_python)" -m venv "$vllm_venv"
        # --no-deps: the list is complete, and the torchvision that would come along doesn't fit its torch.
        if ! "$vllm_python" -m pip install --disable-pip-version-check --no-deps -r "$root/ptuning_vllm/requirements-cpu.txt" >"$vllm_venv/install.log" 2>&1; then
            tail -n 20 "$vllm_venv/install.log" >&2
            setup_fail "pip failed, see $vllm_venv/install.log"
        fi
        echo "$vllm_wanted" >"$vllm_venv/.installed"
    fi
fi
