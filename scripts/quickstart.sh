#!/usr/bin/env bash
# From nothing to a tuned model: install, tune the small default model on sample/company.json with LoRA, and show what it changed: the same
# questions answered before and after, and bits per character of answers to questions in other words, and of texts that it was not trained on. Run again, it does only what
# is not done yet; remove output/quickstart to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh requirements.txt
SECONDS=0
export OMP_WAIT_POLICY=passive
OUT=output/quickstart
mkdir -p "$OUT"
MODEL=$(python scripts/default_model.py)
measure() { python evaluate.py --model_name_or_path "$MODEL" --data_dir sample/eval --tasks perplexity --eval_path sample/eval/company.jsonl --limit 8 \
  --num_answers 6 --max_new_tokens 48 "$@" > /dev/null; }
measure --output_dir "$OUT/before"
[[ -f $OUT/adapter/adapter_config.json ]] || python finetune_lora.py --model_name_or_path "$MODEL" --data_path sample/company.json \
  --output_dir "$OUT/adapter" --template chatml --max_length 256 --gradient_accumulation_steps 1 --num_train_epochs 8 --learning_rate 2e-3 \
  --lora_r 16 --lora_alpha 32 --lora_dropout 0 --gradient_checkpointing False --resume "$([[ -d $OUT/adapter ]] && echo True || echo False)"
measure --output_dir "$OUT/after" --lora_path "$OUT/adapter"
python evaluate.py --compare "$OUT/before,$OUT/after" --output_dir "$OUT/report" > /dev/null
python - "$OUT" << 'SHOW'
import json, sys
before, after = ([json.loads(line) for line in open(f"{sys.argv[1]}/{name}/samples.jsonl", encoding="utf-8")] for name in ("before", "after"))
for old, new in zip(before, after):
    if "output" in new:
        print(f"\n{' '.join(new['question'].split())}\n  before: {' '.join(old['output'].split())}\n  after:  {new['output']}")
print("\n" + open(f"{sys.argv[1]}/report/report.md", encoding="utf-8").read().partition("![")[0].strip())
SHOW
echo -e "\n$SECONDS seconds. The whole report: $OUT/report/report.md. Go on: LORA_PATH=$OUT/adapter bash scripts/generate.sh" >&2
