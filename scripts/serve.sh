#!/usr/bin/env bash
# The API on http://127.0.0.1:7030 and the page on http://127.0.0.1:7020.
#
#   bash scripts/serve.sh                                      the small model in this repo, and whatever prefixes are under output/
#   bash scripts/serve.sh --model /path/to/chatglm2-6b --prefix ads=/path/to/run --prefix chat=/path/to/other [any flag]
#                                                              the real thing; docs/serving.md has the flags
#   bash scripts/serve.sh --model /path/to/Baichuan2-13B-Chat
#                                                              beside it: POST /baichuan on port 7010, the page on 7021
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

given=" $* "
if [[ "$given" != *" --model"* ]]; then
    cd "$root"
fi
exec "$python" -m ptuning.cli serve "$@"
