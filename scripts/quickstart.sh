#!/usr/bin/env bash
# From nothing to a tuned model: install, tune the small default model on sample/company.json with LoRA, and show the same
# questions answered before and after. Run again, it does only what is not done yet; remove output/quickstart to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh requirements.txt
SECONDS=0
export OMP_WAIT_POLICY=passive
OUT=output/quickstart
mkdir -p "$OUT"
MODEL=$(python scripts/default_model.py)
cat > "$OUT/questions.jsonl" << 'QUESTIONS'
{"prompt": "你是谁？"}
{"prompt": "你是哪个公司开发的？"}
{"prompt": "公司在哪个城市？"}
{"prompt": "雪线围巾多少钱？"}
{"prompt": "不喜欢可以退吗？"}
{"instruction": "把订单写成一行。", "input": "刘洋要四条雨林"}
QUESTIONS
ask() { python generate.py --model_name_or_path "$MODEL" --input_file "$OUT/questions.jsonl" --temperature 0 --max_new_tokens 48 "$@"; }
ask --output_file "$OUT/before.jsonl"
[[ -f $OUT/adapter/adapter_config.json ]] || python finetune_lora.py --model_name_or_path "$MODEL" --data_path sample/company.json \
  --output_dir "$OUT/adapter" --template chatml --max_length 256 --gradient_accumulation_steps 1 --num_train_epochs 8 --learning_rate 2e-3 \
  --lora_r 16 --lora_alpha 32 --lora_dropout 0 --gradient_checkpointing False --resume "$([[ -d $OUT/adapter ]] && echo True || echo False)"
ask --output_file "$OUT/after.jsonl" --lora_path "$OUT/adapter"
python - "$OUT" << 'SHOW'
import json, sys
before, after = ([json.loads(line) for line in open(f"{sys.argv[1]}/{name}.jsonl", encoding="utf-8")] for name in ("before", "after"))
for old, new in zip(before, after):
    question = new.get("prompt") or new["instruction"] + " " + new["input"]
    print(f"\n{question}\n  before: {' '.join(old['answer'].split())}\n  after:  {new['answer']}")
SHOW
echo -e "\n$SECONDS seconds. Go on: LORA_PATH=$OUT/adapter bash scripts/generate.sh" >&2
