#!/usr/bin/env bash
# A model out of base and delta; with --make True the delta out of base and model. Edit the block, or set a line from outside:
#   BASE_MODEL=llama-13b DELTA_PATH=Ziya-LLaMA-13B-v1 OUTPUT_PATH=Ziya-LLaMA-13B bash scripts/apply_delta.sh --allow_pickle True
#   OUTPUT_PATH=output/merge_lora DELTA_PATH=output/delta bash scripts/apply_delta.sh --make True
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BASE_MODEL=${BASE_MODEL:-}                     # empty: the small default model
DELTA_PATH=${DELTA_PATH:-output/delta}         # read, or written with --make True
OUTPUT_PATH=${OUTPUT_PATH:-output/apply_delta} # the model: written, or read with --make True
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $BASE_MODEL ]] || BASE_MODEL=$(python scripts/default_model.py)
exec python apply_delta.py --base "$BASE_MODEL" --target "$OUTPUT_PATH" --delta "$DELTA_PATH" "$@"
