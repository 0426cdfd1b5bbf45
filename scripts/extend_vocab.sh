#!/usr/bin/env bash
# A Chinese vocabulary. Edit the block, or set a line from outside, and add any flag of extend_vocab.py:
#   MODEL_PATH=my/llama DATA_PATH=my/corpus NUM_PIECES=20000 bash scripts/extend_vocab.sh --add_tokens '<|im_start|>,<|im_end|>,<pad>'
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
MODEL_PATH=${MODEL_PATH:-}             # base model; empty: the small default model
DATA_PATH=${DATA_PATH:-sample}         # your text: a file or a folder
NUM_PIECES=${NUM_PIECES:-1000}         # 20000 for 20 MB of text or more
INIT=${INIT:-share}                    # rows of the new pieces; mean_of_pieces needs no pass through the base, and leaves a tied head tied
OUTPUT_PATH=${OUTPUT_PATH:-output/extend_vocab}
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $MODEL_PATH ]] || MODEL_PATH=$(python scripts/default_model.py)
exec python extend_vocab.py --model_name_or_path "$MODEL_PATH" --corpus_path "$DATA_PATH" --num_pieces "$NUM_PIECES" \
  --init "$INIT" --output_dir "$OUTPUT_PATH" "$@"
