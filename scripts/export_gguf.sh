#!/usr/bin/env bash
# One file for llama.cpp, Ollama and LM Studio. Edit the block, or set a line from outside, and add any flag of export_gguf.py:
#   BASE_MODEL=output/merge_lora TYPE=q4_1 bash scripts/export_gguf.sh
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BASE_MODEL=${BASE_MODEL:-}             # a 16-bit model, with its adapter merged in (merge_lora.sh); empty: the small default model
DATA_PATH=${DATA_PATH:-sample/corpus.txt}  # lines whose ids are compared, where llama-cpp-python is installed
TYPE=${TYPE:-q8_0}                     # f16, bf16, q8_0, q4_1 or q4_0
OUTPUT_PATH=${OUTPUT_PATH:-output/export_gguf/model-$TYPE.gguf}
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $BASE_MODEL ]] || BASE_MODEL=$(python scripts/default_model.py)
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec python export_gguf.py --model_name_or_path "$BASE_MODEL" --eval_path "$DATA_PATH" --output_file "$OUTPUT_PATH" --type "$TYPE" "$@"
