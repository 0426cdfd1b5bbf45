#!/usr/bin/env bash
# A model of 4, 3, 2 or 8 bits. Edit the block, or set a line from outside, and add any flag of quantize_gptq.py:
#   BASE_MODEL=my/llama DATA_PATH=my_records.json BITS=4 bash scripts/quantize_gptq.sh --desc_act True
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BASE_MODEL=${BASE_MODEL:-}             # a 16-bit model, with its adapter merged in (merge_lora.sh); empty: the small default model
DATA_PATH=${DATA_PATH:-sample/corpus.txt}  # text or records like those it will be used on: a hundred long ones are enough
BITS=${BITS:-4}
GROUP_SIZE=${GROUP_SIZE:-64}           # 128 is usual where all widths are multiples of it, which the default model's are not
OUTPUT_PATH=${OUTPUT_PATH:-output/quantize_gptq}
TOT_CUDA=${TOT_CUDA:-}                 # the GPU that it is done on; empty: the first
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $TOT_CUDA ]] && export CUDA_VISIBLE_DEVICES=$TOT_CUDA
[[ -n $BASE_MODEL ]] || BASE_MODEL=$(python scripts/default_model.py)
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec python quantize_gptq.py --model_name_or_path "$BASE_MODEL" --calibration_path "$DATA_PATH" --bits "$BITS" --group_size "$GROUP_SIZE" \
  --output_dir "$OUTPUT_PATH" "$@"
