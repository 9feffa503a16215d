#!/usr/bin/env bash
# All weights with DeepSpeed ZeRO-3, then the scores of the untuned and the tuned model.
#
#   bash scripts/train_full.sh                                      the small model and data in this repo, two processes, any laptop
#   MODEL=/path/or/hub-id NUM_GPUS=8 TRAIN_FILE=train.json VALIDATION_FILE=dev.json bash scripts/train_full.sh [any flag]
#                                                                   the real thing with the official defaults
#   DEEPSPEED_CONFIG=configs/zero3_offload.json …                   another DeepSpeed file: docs/training.md says which
#   HOSTFILE=hosts …                                                several machines: docs/distributed.md
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
port="$("$python" -c 'from ptuning.distributed import free_port; print(free_port())')"
deepspeed_config="$(realpath "${DEEPSPEED_CONFIG:-$root/configs/zero3.json}")"

launch=(deepspeed --num_gpus "${NUM_GPUS:-2}" --master_port "$port")
[ -z "${HOSTFILE:-}" ] || launch=(deepspeed --hostfile "$HOSTFILE" --master_port "$port")
run() { "${launch[@]}" "$root/ptuning/main.py" --deepspeed "$deepspeed_config" "$@"; }

if [ -z "${MODEL:-}" ]; then
    cd "$root"
    output="output/demo-full"
    flags=(--config configs/full_demo.yaml --output_dir "$output" --model_name_or_path models/chatglm2-tiny)
    predict=(--do_predict)
else
    output="${OUTPUT_DIR:-output/chatglm2-6b-ft}"
    flags=(--config "$root/configs/full_zero3.yaml" --output_dir "$output" --model_name_or_path "$MODEL")
    predict=()
    [ -z "${TRAIN_FILE:-}" ] || flags+=(--train_file "$TRAIN_FILE")
    [ -z "${VALIDATION_FILE:-}" ] || { flags+=(--validation_file "$VALIDATION_FILE") && predict=(--do_predict); }
    [ -z "${TEST_FILE:-}" ] || { flags+=(--test_file "$TEST_FILE") && predict=(--do_predict); }
fi

# Under ZeRO-3 the base is gone once training has begun, so it answers first, in a run of its own.
before=()
if [ "${#predict[@]}" -gt 0 ]; then
    run "${flags[@]}" "$@" --do_train false --eval_strategy no --do_predict --probe --output_dir "$output/base"
    before=(--probe --baseline_from "$output/base")
fi
run "${flags[@]}" --overwrite_output_dir "$@" --do_train true "${predict[@]}" ${before[@]+"${before[@]}"}
echo "The tuned model, complete and in the official format: $output"
