#!/usr/bin/env bash
# vLLM computes, this package's server stands before it: API on http://127.0.0.1:7030, page on http://127.0.0.1:7020.
#
#   bash scripts/serve_vllm.sh                                       the small model in this repo on vLLM's CPU build
#   VLLM_PYTHON=/path/to/python MODEL=/path/to/chatglm2-6b DTYPE=bfloat16 VLLM_FLAGS="--tensor-parallel-size 2" \
#       bash scripts/serve_vllm.sh --prefix ads=/path/to/run         a GPU: that Python's environment has vllm==0.32.0
#
# Flags go to `ptuning serve`; VLLM_FLAGS to vLLM. STORE (output/vllm) is where the model is exported to and prefixes are kept.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_vllm.sh"
cd "$root"

model="${MODEL:-models/chatglm2-tiny}" store="${STORE:-output/vllm}" port="${VLLM_PORT:-7040}" dtype="${DTYPE:-float32}"
native="$store/model-$(basename "$(cd "$model" && pwd)")-$dtype" prefixes="$store/prefixes"
mkdir -p "$prefixes"
# Written under another name first: a folder with the name is whole.
if [ ! -d "$native" ]; then
    rm -rf "$native.part"
    "$python" -m ptuning.cli export --format vllm --model_name_or_path "$model" --dtype "$dtype" --output_dir "$native.part"
    mv "$native.part" "$native"
fi

prefixes="$(cd "$prefixes" && pwd)"
config="{\"kv_connector\": \"PrefixConnector\", \"kv_connector_module_path\": \"ptuning_vllm.connector\", \"kv_role\": \"kv_consumer\", \
\"kv_load_failure_policy\": \"fail\", \"kv_connector_extra_config\": {\"prefix_store\": \"$prefixes\"}}"
echo "serve_vllm: starting vLLM on 127.0.0.1:$port (log: $store/vllm.log)"
# --block-size 32: the smallest that the CPU build has, so that the requests of a short prefix share its blocks too. The token endpoint needs no tokenizer, and vLLM's would be wrong.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_NO_USAGE_STATS=1 \
    "$vllm_python" -m vllm.entrypoints.openai.api_server --model "$native" --skip-tokenizer-init --enable-scale-out --host 127.0.0.1 \
    --port "$port" --dtype "$dtype" --block-size 32 --enable-lora --max-lora-rank 64 --kv-transfer-config "$config" \
    ${VLLM_FLAGS:-} >"$store/vllm.log" 2>&1 &
vllm=$!
trap 'kill $vllm 2>/dev/null; wait $vllm 2>/dev/null || true' EXIT
until "$python" -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/health', timeout=5)" 2>/dev/null; do
    kill -0 $vllm 2>/dev/null || { tail -n 20 "$store/vllm.log" >&2; echo "serve_vllm: vLLM didn't start, see $store/vllm.log" >&2; exit 1; }
    sleep 2
done
"$python" -m ptuning.cli serve --engine vllm --model "$model" --vllm_url "http://127.0.0.1:$port" --prefix_store "$prefixes" \
    --max_concurrent 128 "$@" &
front=$!
trap 'kill -TERM $front 2>/dev/null; wait $front 2>/dev/null || true; kill $vllm 2>/dev/null; wait $vllm 2>/dev/null || true' EXIT
trap 'exit 0' INT TERM
wait $front
