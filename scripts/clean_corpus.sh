#!/usr/bin/env bash
# A cleaned, de-duplicated corpus. Edit the block, or set a line from outside, and add any flag of clean_corpus.py:
#   DATA_PATH=my/corpus GOOD_TEXT=my/best.txt OUTPUT_PATH=output/clean bash scripts/clean_corpus.sh --against my/older
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
DATA_PATH=${DATA_PATH:-sample/web/pages.txt}          # your text or records: a file or a folder
DOCUMENT_SEPARATOR=${DOCUMENT_SEPARATOR:-blank_line}  # between the documents of a .txt file: line or blank_line
GOOD_TEXT=${GOOD_TEXT-sample/corpus.txt}              # text like which the corpus should be; empty: no score
WORD_LIST=${WORD_LIST-sample/web/words.tsv}           # lines of category, tab, word; empty: none
EVAL_DATA=${EVAL_DATA-sample/web/questions.csv}       # test questions that must not be trained on: a file or a folder; empty: none
LIMITS=${LIMITS:-}                                    # thresholds of your own, as {"least_characters": 200}; empty: those of report.md
MODEL_PATH=${MODEL_PATH:-}                            # a model whose bits per character are the score instead (slow); empty: none
OUTPUT_PATH=${OUTPUT_PATH:-output/clean_corpus}
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
more=()
[[ -z $GOOD_TEXT ]] || more+=(--good_text "$GOOD_TEXT")
[[ -z $WORD_LIST ]] || more+=(--word_list "$WORD_LIST")
[[ -z $EVAL_DATA ]] || more+=(--eval_data "$EVAL_DATA")
[[ -z $LIMITS ]] || more+=(--limits "$LIMITS")
[[ -z $MODEL_PATH ]] || more+=(--model_name_or_path "$MODEL_PATH")
exec python clean_corpus.py --data_path "$DATA_PATH" --document_separator "$DOCUMENT_SEPARATOR" --output_dir "$OUTPUT_PATH" \
  ${more[@]+"${more[@]}"} "$@"
