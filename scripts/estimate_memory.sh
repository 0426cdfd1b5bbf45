#!/usr/bin/env bash
# Does it fit? Edit the block, or set a line from outside, and add any flag of the training script, or --fit and the size of a card:
#   STAGE=finetune MODEL_PATH=qwen2.5-7b bash scripts/estimate_memory.sh --max_length 2048 --fit 40
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
STAGE=${STAGE:-finetune_lora}  # a training script, without .py
MODEL_PATH=${MODEL_PATH:-}     # a folder, a config.json, or a size such as llama-2-7b; empty: usual ones, on usual cards
DATA_PATH=${DATA_PATH:-}       # your records, for the command that is printed
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
exec python estimate_memory.py --stage "$STAGE" ${MODEL_PATH:+--model_name_or_path "$MODEL_PATH"} ${DATA_PATH:+--data_path "$DATA_PATH"} "$@"
