#!/usr/bin/env bash
# Measure a model. Edit the block, or set a line from outside, and add any flag of evaluate.py:
#   BASE_MODEL=my/llama LORA_PATH=output/finetune_lora DATA_DIR=my_sets bash scripts/evaluate.sh --tasks cmmlu,mmlu --limit 20
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BASE_MODEL=${BASE_MODEL:-}   # empty: the small default model
LORA_PATH=${LORA_PATH:-}     # an adapter, or empty
DATA_DIR=${DATA_DIR:-sample/eval}                # the sets as they are published, and texts in perplexity/
DATA_PATH=${DATA_PATH:-sample/eval/company.jsonl} # records that the model was not trained on
OUTPUT_PATH=${OUTPUT_PATH:-output/evaluate}
TOT_CUDA=${TOT_CUDA:-}       # the GPU; empty: the first
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $TOT_CUDA ]] && export CUDA_VISIBLE_DEVICES=$TOT_CUDA
[[ -n $BASE_MODEL ]] || BASE_MODEL=$(python scripts/default_model.py)
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec python evaluate.py --model_name_or_path "$BASE_MODEL" ${LORA_PATH:+--lora_path "$LORA_PATH"} --data_dir "$DATA_DIR" --eval_path "$DATA_PATH" \
  --output_dir "$OUTPUT_PATH" "$@"
