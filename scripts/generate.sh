#!/usr/bin/env bash
# Talk to a model. Edit the block, or set a line from outside, and add any flag of generate.py:
#   BASE_MODEL=my/llama LORA_PATH=output/finetune_lora bash scripts/generate.sh --prompt '你好'
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BASE_MODEL=${BASE_MODEL:-}   # empty: the small default model
LORA_PATH=${LORA_PATH:-}     # an adapter, or empty
TOT_CUDA=${TOT_CUDA:-}       # the GPU; empty: the first
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $TOT_CUDA ]] && export CUDA_VISIBLE_DEVICES=$TOT_CUDA
[[ -n $BASE_MODEL ]] || BASE_MODEL=$(python scripts/default_model.py)
exec python generate.py --model_name_or_path "$BASE_MODEL" ${LORA_PATH:+--lora_path "$LORA_PATH"} "$@"
