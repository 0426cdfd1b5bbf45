#!/usr/bin/env bash
# The chat page. Edit the block, or set a line from outside, and add any flag of webui.py:
#   BASE_MODEL=my/llama LORA_PATH=output/a,output/b bash scripts/webui.sh --bits 4
#   BASE_MODEL=my/llama bash scripts/webui.sh --server_name 0.0.0.0 --auth user:password
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BASE_MODEL=${BASE_MODEL:-}   # empty: the small default model
LORA_PATH=${LORA_PATH:-}     # an adapter, several with commas, or empty
PORT=${PORT:-7860}
TOT_CUDA=${TOT_CUDA:-}       # the GPU; empty: the first
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $TOT_CUDA ]] && export CUDA_VISIBLE_DEVICES=$TOT_CUDA
[[ -n $BASE_MODEL ]] || BASE_MODEL=$(python scripts/default_model.py)
exec python webui.py --model_name_or_path "$BASE_MODEL" ${LORA_PATH:+--lora_path "$LORA_PATH"} --server_port "$PORT" "$@"
