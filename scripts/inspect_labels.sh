#!/usr/bin/env bash
# What is trained. Edit the block, or set a line from outside, and add any flag of inspect_labels.py:
#   MODEL_PATH=my/llama DATA_PATH=my.json bash scripts/inspect_labels.sh --record 7
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
MODEL_PATH=${MODEL_PATH:-}                        # empty: the small default model
DATA_PATH=${DATA_PATH:-sample/instruction.json}   # your records, see sample/README.md
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $MODEL_PATH ]] || MODEL_PATH=$(python scripts/default_model.py)
exec python inspect_labels.py --model_name_or_path "$MODEL_PATH" --data_path "$DATA_PATH" "$@"
