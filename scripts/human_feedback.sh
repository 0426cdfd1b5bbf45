#!/usr/bin/env bash
# Ziya's third stage, human feedback, as one command: SFT adapter -> candidates -> scores by rules and by a reward model trained on them ->
# best of n (HFFT) -> chain of hindsight (COHFT) -> DPO -> PPO, and a table of what each did on prompts that none has seen. As it stands it
# ends within half an hour on two CPU cores, with the small default model, for which it is a demonstration: it hardly knows Chinese. For a
# model of use, set your tuned model, prompts and pairs of your own, and raise the numbers. Run again, it does what is not done yet.
#   MODEL_PATH=my/llama DATA_PATH=my.json PROMPTS=my_prompts.jsonl HELD_OUT=200 PPO_STEPS=300 bash scripts/human_feedback.sh
set -euo pipefail
SECONDS=0
cd "$(dirname "$0")/.."
# ---- edit me ----
MODEL_PATH=${MODEL_PATH:-}                   # model to tune; empty: the small default model
DATA_PATH=${DATA_PATH:-sample/company.json}  # instructions for the SFT adapter
PROMPTS=${PROMPTS:-sample/prompts.jsonl}     # what the model is asked, and what rules need to know of it
PAIRS=${PAIRS:-}                             # people's preferences for the reward model; empty: pairs that the rules make of the candidates
RULES=${RULES:-finished=1,chinese=1,repetition=1,format=0.5,number=0.5}  # of RULES_FILE
RULES_FILE=${RULES_FILE:-sample/rules.py}
JUDGES=${JUDGES:-finished=0,chinese=0,repetition=0,format=0,number=0,length=0,banned_words=0}  # shown in the table; the last two are not paid for
OUT=${OUT:-output/human_feedback}
HELD_OUT=${HELD_OUT:-10}                     # prompts kept for the table
CANDIDATES=${CANDIDATES:-6}                  # answers to each of the others
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-48}
SFT_EPOCHS=${SFT_EPOCHS:-1} EPOCHS=${EPOCHS:-3}  # EPOCHS: of HFFT, COHFT, DPO and the reward model
PPO_STEPS=${PPO_STEPS:-12}                   # updates, of 4 prompts with 8 answers each
# -----------------
source scripts/install.sh requirements.txt
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
mkdir -p "$OUT"
[[ -n $MODEL_PATH ]] || MODEL_PATH=$(python scripts/default_model.py)
again() { [[ -d $1 ]] && echo True || echo False; }
TUNED=$OUT/sft_model  # the start of all that follows, and what it is kept near to
ask() { python generate.py --per_device_eval_batch_size 5 --max_new_tokens "$MAX_NEW_TOKENS" --temperature 1 --top_p 1 --top_k 0 "$@"; }
score() { python score_records.py "$@"; }
tune() { python finetune_lora.py --max_length 256 --gradient_accumulation_steps 1 --lora_r 16 --lora_alpha 32 --lora_dropout 0 \
  --gradient_checkpointing False --resume "$(again "$OUT/$1")" --output_dir "$OUT/$1" "${@:2}"; }

echo "1. prompts to learn from, and prompts to be measured on" >&2
[[ -s $OUT/held_out.jsonl ]] || python - "$PROMPTS" "$OUT" "$HELD_OUT" << 'SPLIT'
import json, os, sys
from collections import Counter
from score_records import GOOD, prompt_messages
from utils import read_rows
path, out, held_out = sys.argv[1], sys.argv[2], int(sys.argv[3])
if not os.path.isfile(path):
    sys.exit(f"error: PROMPTS={path} does not exist: name a file of prompts")
rows = list(read_rows(path, Counter()))
if not 0 < held_out < len(rows):
    sys.exit(f"error: HELD_OUT={held_out} must be from 1 to {len(rows) - 1}")
rows = [row | {"messages": prompt_messages(row)} for row in rows]
rows = [{name: value for name, value in row.items() if name not in ("prompt", "system", "answer", "answers", "finished")} for row in rows]
with_verdict = [row | {"messages": row["messages"][:-1] + [{"role": "user", "content": f"{row['messages'][-1]['content']}\n\n{GOOD}"}]} for row in rows]
for name, part in (("prompts", rows[:-held_out]), ("held_out_good", with_verdict[-held_out:]), ("held_out", rows[-held_out:])):
    with open(f"{out}/{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
SPLIT
echo "2. SFT adapter, merged" >&2
[[ -f $OUT/sft/adapter_config.json ]] || tune sft --model_name_or_path "$MODEL_PATH" --data_path "$DATA_PATH" --num_train_epochs "$SFT_EPOCHS" \
  --learning_rate 4e-4
[[ -f $TUNED/config.json ]] || python merge_lora.py --model_name_or_path "$MODEL_PATH" --lora_path "$OUT/sft" --output_dir "$TUNED"
echo "3. candidates, scored by rules" >&2
ask --model_name_or_path "$TUNED" --input_file "$OUT/prompts.jsonl" --output_file "$OUT/candidates.jsonl" --num_return_sequences "$CANDIDATES"
[[ -s $OUT/by_rules.jsonl ]] || score --by rules --rules "$RULES_FILE:$RULES" --data_path "$OUT/candidates.jsonl" --output_file "$OUT/by_rules.jsonl"
[[ -n $PAIRS || -s $OUT/rule_pairs.jsonl ]] || score --keep pairs --data_path "$OUT/by_rules.jsonl" --output_file "$OUT/rule_pairs.jsonl"
echo "4. reward model" >&2
[[ -f $OUT/reward/adapter_config.json ]] || python train_reward.py --model_name_or_path "$TUNED" --data_path "${PAIRS:-$OUT/rule_pairs.jsonl}" \
  --max_length 256 --gradient_accumulation_steps 1 --num_train_epochs "$EPOCHS" --learning_rate 3e-4 --gradient_checkpointing False \
  --output_dir "$OUT/reward" --resume "$(again "$OUT/reward")"
echo "5. candidates, scored by rules and reward model: best of n, pairs, hindsight" >&2
[[ -s $OUT/scored.jsonl ]] || score --by reward --reward_model "$OUT/reward" --model_name_or_path "$TUNED" --rules "$RULES_FILE:$RULES" \
  --data_path "$OUT/candidates.jsonl" --output_file "$OUT/scored.jsonl"
for kept in best pairs hindsight; do
  [[ -s $OUT/$kept.jsonl ]] || score --keep "$kept" --data_path "$OUT/scored.jsonl" --output_file "$OUT/$kept.jsonl"
done
echo "6. HFFT: SFT on the best of n" >&2
[[ -f $OUT/hfft/adapter_config.json ]] || tune hfft --model_name_or_path "$TUNED" --data_path "$OUT/best.jsonl" --num_train_epochs "$EPOCHS" \
  --learning_rate 5e-4
echo "7. COHFT: SFT on dialogues with the verdict" >&2
[[ -f $OUT/cohft/adapter_config.json ]] || tune cohft --model_name_or_path "$TUNED" --data_path "$OUT/hindsight.jsonl" --num_train_epochs "$EPOCHS" \
  --learning_rate 5e-4
echo "8. DPO" >&2
[[ -f $OUT/dpo/adapter_config.json ]] || python train_dpo.py --model_name_or_path "$TUNED" --data_path "$OUT/pairs.jsonl" --max_length 256 \
  --gradient_accumulation_steps 1 --num_train_epochs "$EPOCHS" --learning_rate 1e-4 --sft_weight 0.1 --gradient_checkpointing False \
  --output_dir "$OUT/dpo" --resume "$(again "$OUT/dpo")"
echo "9. PPO" >&2
[[ -f $OUT/ppo/adapter_config.json ]] || python train_ppo.py --model_name_or_path "$TUNED" --data_path "$OUT/prompts.jsonl" \
  --reward_model "$OUT/reward" --rules "$RULES_FILE:$RULES" --rollout_batch_size 4 --num_generations 8 --max_new_tokens "$MAX_NEW_TOKENS" \
  --max_length 512 --max_steps "$PPO_STEPS" --save_steps 4 --logging_steps 4 --learning_rate 2e-4 --gradient_checkpointing False \
  --output_dir "$OUT/ppo" --resume "$(again "$OUT/ppo")"
echo "10. each of them on the prompts held out" >&2
for name in start sft hfft cohft dpo ppo; do
  held=$OUT/held_out.jsonl model=(--model_name_or_path "$TUNED" --lora_path "$OUT/$name")
  [[ $name == start ]] && model=(--model_name_or_path "$MODEL_PATH")
  [[ $name == sft ]] && model=(--model_name_or_path "$TUNED")
  [[ $name == cohft ]] && held=$OUT/held_out_good.jsonl  # asked for what it has learned to tell apart
  ask "${model[@]}" --input_file "$held" --output_file "$OUT/answers_$name.jsonl" --num_return_sequences 4
  judged=$OUT/answers_$name.jsonl
  if [[ $name == cohft && -f $judged ]]; then  # the reward model reads the question that the others were asked
    sed 's/\\n\\n请给出一个好的回答。//' "$judged" > "$OUT/judged_cohft.jsonl"
    judged=$OUT/judged_cohft.jsonl
  fi
  [[ -s $OUT/table_$name.json ]] || { rm -f "$OUT/table_$name.jsonl"; score --by reward --reward_model "$OUT/reward" --model_name_or_path "$TUNED" \
    --rules "$RULES_FILE:$JUDGES" --data_path "$judged" --output_file "$OUT/table_$name.jsonl" > "$OUT/.table.json"
    mv "$OUT/.table.json" "$OUT/table_$name.json"; }
done
python - "$OUT" start sft hfft cohft dpo ppo << 'TABLE'
import json, sys
shown = {name: json.load(open(f"{sys.argv[1]}/table_{name}.json", encoding="utf-8")) for name in sys.argv[2:]}
rules = list(next(iter(shown.values()))["rules"])
print(*(f"{head:>12}" for head in ("", *rules, "characters", "reward")), sep=" ")
for name, said in shown.items():
    print(f"{name:>12}", *(f"{value:12.2f}" for value in (*said["rules"].values(), said["characters"], said["score"])))
TABLE
echo "$SECONDS seconds; rules: mean of each, 1 is as it should be; $((HELD_OUT * 4)) answers a row. Go on: BASE_MODEL=$TUNED LORA_PATH=$OUT/ppo bash scripts/generate.sh" >&2
