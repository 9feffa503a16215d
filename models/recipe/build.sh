#!/usr/bin/env bash
# Rebuilds the whole demo: data sets, pretraining text, tokenizer, base model. Under an hour on two free CPU cores.
# usage: bash models/recipe/build.sh [folder of the model [flags of pretrain.py]]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../../scripts/setup.sh"
cd "$root"
out=${1:-models/chatglm2-tiny}
log=models/recipe/training.json
[ "$out" = models/chatglm2-tiny ] || log="$out/training.json" # the committed log belongs to the committed weights
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" data/recipe/advertise.py
"$python" data/recipe/dialogue.py
"$python" models/recipe/corpus.py --out "$work/corpus.jsonl"
"$python" models/recipe/train_tokenizer.py --corpus "$work/corpus.jsonl" --out "$out"
"$python" models/recipe/pretrain.py --corpus "$work/corpus.jsonl" --out "$out" --log "$log" "${@:2}"
