#!/usr/bin/env bash
# A model out of base and adapter. Edit the block, or set a line from outside, and add any flag of merge_lora.py:
#   BASE_MODEL=my/llama LORA_PATH=output/a,output/b bash scripts/merge_lora.sh --weights 0.7,0.3
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BASE_MODEL=${BASE_MODEL:-}                       # the model that the adapter was trained on; empty: the small default model
LORA_PATH=${LORA_PATH:-output/finetune_lora}     # one adapter, or several with commas
OUTPUT_PATH=${OUTPUT_PATH:-output/merge_lora}
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $BASE_MODEL ]] || BASE_MODEL=$(python scripts/default_model.py)
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec python merge_lora.py --model_name_or_path "$BASE_MODEL" --lora_path "$LORA_PATH" --output_dir "$OUTPUT_PATH" "$@"
