#!/usr/bin/env bash
# Score answers, and make pairs, best answers or hindsight dialogues of them. Edit the block, or set a line from outside, and add any
# flag of score_records.py:
#   MODEL_PATH=my/llama BY=ifd OUTPUT_FILE=output/ordered.jsonl bash scripts/score_records.sh --buckets 4
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BY=${BY:-rules}                                      # reward, rules, judge, loss, ifd or length
DATA_PATH=${DATA_PATH:-sample/preference.json}       # records with one answer, several, or a preference, see sample/README.md
OUTPUT_FILE=${OUTPUT_FILE:-output/scored.jsonl}      # a new file
RULES=${RULES:-sample/rules.py:finished=1,repetition=1,chinese=0.5}
REWARD_MODEL=${REWARD_MODEL:-output/train_reward}    # for BY=reward
MODEL_PATH=${MODEL_PATH:-}                           # the judge, or whose loss; empty: the small default model
LORA_PATH=${LORA_PATH:-}                             # an adapter of it, or empty
TOT_CUDA=${TOT_CUDA:-}                               # the GPU; empty: the first
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $TOT_CUDA ]] && export CUDA_VISIBLE_DEVICES=$TOT_CUDA
[[ -n $MODEL_PATH || ! $BY =~ ^(judge|loss|ifd)$ ]] || MODEL_PATH=$(python scripts/default_model.py)
mkdir -p "$(dirname "$OUTPUT_FILE")"
SCORER=()
[[ $BY == rules ]] && SCORER=(--rules "$RULES")
[[ $BY == reward ]] && SCORER=(--reward_model "$REWARD_MODEL")
exec python score_records.py --by "$BY" --data_path "$DATA_PATH" --output_file "$OUTPUT_FILE" ${SCORER[@]+"${SCORER[@]}"} \
  ${MODEL_PATH:+--model_name_or_path "$MODEL_PATH"} ${LORA_PATH:+--lora_path "$LORA_PATH"} "$@"  # last, so that the caller's flags win
