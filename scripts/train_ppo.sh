#!/usr/bin/env bash
# Learning from rewards: PPO, RLOO or GRPO. Edit the block, or set a line from outside, and add any flag of train_ppo.py:
#   TOT_CUDA=0,1 MODEL_PATH=my/tuned_llama REWARD_MODEL=output/train_reward bash scripts/train_ppo.sh --advantage rloo
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
MODEL_PATH=${MODEL_PATH:-}                        # tuned model; empty: the small default model
DATA_PATH=${DATA_PATH:-sample/prompts.jsonl}      # prompts, see sample/README.md
RULES=${RULES-sample/rules.py:finished=1,repetition=1,chinese=1}  # a Python file and weights; empty: the reward model alone
REWARD_MODEL=${REWARD_MODEL:-}                    # of train_reward.py; empty: the rules alone
OUTPUT_PATH=${OUTPUT_PATH:-output/train_ppo}
TOT_CUDA=${TOT_CUDA:-}                            # GPUs, as in 0,1; empty: all
BITS=${BITS:-}                                    # of the base: 4 fits 7B into 24 GB; empty: 4 on a GPU, 16 on a CPU
CHECK_MEMORY=${CHECK_MEMORY:-warn}                # where the run will hardly fit: warn, or stop (exit status 2), or off
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}  # several machines: OUTPUT_PATH on a disk they share
[[ $NNODES == 1 ]] && PORT=${PORT:-$((20000 + RANDOM % 20000))}  # random, so that two runs on one machine seldom meet
PORT=${PORT:-29500}
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
[[ -n $TOT_CUDA ]] && export CUDA_VISIBLE_DEVICES=$TOT_CUDA
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then GPUS=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]') || GPUS=0  # "" and -1: none
else GPUS=$(nvidia-smi --list-gpus 2> /dev/null | wc -l) || GPUS=0; fi
[[ -n $MODEL_PATH ]] || MODEL_PATH=$(python scripts/default_model.py)
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
[[ $CHECK_MEMORY =~ ^(warn|stop|off)$ ]] || { echo "error: CHECK_MEMORY=$CHECK_MEMORY is none of warn, stop, off" >&2; exit 2; }
RANKS=$((GPUS > 0 ? GPUS : 1))
RUN=(--model_name_or_path "$MODEL_PATH" --data_path "$DATA_PATH" --output_dir "$OUTPUT_PATH" \
  --bits "${BITS:-$((GPUS > 0 ? 4 : 16))}")
[[ -z $RULES ]] || RUN+=(--rules "$RULES")
[[ -z $REWARD_MODEL ]] || RUN+=(--reward_model "$REWARD_MODEL")
((GPUS > 0)) || RUN+=(--gradient_checkpointing False --rollout_batch_size 4 --num_generations 4 --max_new_tokens 64 --max_steps 20)  # minutes on a CPU
RUN+=("$@")  # last, so that the caller's flags win
if [[ $CHECK_MEMORY != off && $NODE_RANK == 0 && ! " $* " =~ " -h "|" --help " ]]; then  # the verdict alone: what else it finds wrong, the run says itself
  python estimate_memory.py --stage train_ppo --ranks "$RANKS" --nnodes "$NNODES" --verdict "$CHECK_MEMORY" "${RUN[@]}" >&2 2> /dev/null ||
    case $? in 3) exit 2 ;; 130) exit 130 ;; esac
fi
exec torchrun --nproc_per_node "$RANKS" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
  --master_addr "$MASTER_ADDR" --master_port "$PORT" train_ppo.py "${RUN[@]}"
