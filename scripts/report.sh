#!/usr/bin/env bash
# Before and after: a base and its adapter are measured on the same sets, texts and records, and report.md says what changed. Edit the block,
# or set a line from outside, and add any flag of evaluate.py. Run again, it goes on where it was; give another OUTPUT_PATH for other data.
#   BASE_MODEL=my/llama LORA_PATH=output/finetune_lora DATA_PATH=held_out.jsonl bash scripts/report.sh --limit 20
# AFTER_MODEL=... compares with another model instead: one that was trained with all its weights, merged, or quantized.
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BASE_MODEL=${BASE_MODEL:-}   # before; empty: the small default model
LORA_PATH=${LORA_PATH:-output/quickstart/adapter}  # the adapter that makes it "after"
AFTER_MODEL=${AFTER_MODEL:-} # or a model that is "after" by itself
DATA_DIR=${DATA_DIR:-sample/eval}                # the sets as they are published, and texts in perplexity/
DATA_PATH=${DATA_PATH:-sample/eval/company.jsonl} # records that the model was not trained on
OUTPUT_PATH=${OUTPUT_PATH:-output/report}
TOT_CUDA=${TOT_CUDA:-}       # the GPU; empty: the first
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $TOT_CUDA ]] && export CUDA_VISIBLE_DEVICES=$TOT_CUDA
[[ -n $BASE_MODEL ]] || BASE_MODEL=$(python scripts/default_model.py)
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
measure() { python evaluate.py --data_dir "$DATA_DIR" --eval_path "$DATA_PATH" "$@" > /dev/null; }
[[ -n $AFTER_MODEL || -f $LORA_PATH/adapter_config.json ]] || { echo "error: LORA_PATH=$LORA_PATH is no adapter: run scripts/quickstart.sh first, or give one" >&2; exit 2; }
measure --model_name_or_path "$BASE_MODEL" --output_dir "$OUTPUT_PATH/before" "$@"
if [[ -n $AFTER_MODEL ]]; then measure --model_name_or_path "$AFTER_MODEL" --output_dir "$OUTPUT_PATH/after" "$@"
else measure --model_name_or_path "$BASE_MODEL" --lora_path "$LORA_PATH" --output_dir "$OUTPUT_PATH/after" "$@"; fi
python evaluate.py --compare "$OUTPUT_PATH/before,$OUTPUT_PATH/after" --output_dir "$OUTPUT_PATH/comparison"
echo "read $OUTPUT_PATH/comparison/report.md" >&2
