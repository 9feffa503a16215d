#!/usr/bin/env bash
# P-Tuning v2, then the scores of the untuned and the tuned model.
#
#   bash scripts/train_ptuning.sh                                   the small model and data in this repo, on any laptop
#   MODEL=/path/or/hub-id TRAIN_FILE=train.json VALIDATION_FILE=dev.json bash scripts/train_ptuning.sh [any flag]
#                                                                   the real thing with the official defaults
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ -z "${MODEL:-}" ]; then
    cd "$root"
    exec "$python" -m ptuning.main --config configs/ptuning_demo.yaml --overwrite_output_dir "$@"
fi

files=()
[ -z "${TRAIN_FILE:-}" ] || files+=(--train_file "$TRAIN_FILE")
[ -z "${VALIDATION_FILE:-}" ] || files+=(--validation_file "$VALIDATION_FILE" --do_predict --baseline --probe)
[ -z "${TEST_FILE:-}" ] || files+=(--test_file "$TEST_FILE" --do_predict --baseline --probe)
exec "$python" -m ptuning.main --config "$root/configs/ptuning_official.yaml" --model_name_or_path "$MODEL" ${files[@]+"${files[@]}"} "$@"
