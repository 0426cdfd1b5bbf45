#!/usr/bin/env bash
# The model as an OpenAI-compatible API, under the name yangtuo: vLLM where it is installed and a GPU is (pip install vllm, in an environment
# of its own), else transformers serve (pip install -r requirements-serve.txt). Edit the block, or set a line from outside, and add any flag of the server:
#   BASE_MODEL=my/llama LORA_PATH=output/finetune_lora bash scripts/serve.sh
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
BASE_MODEL=${BASE_MODEL:-}   # a model's folder; empty: the small default model
LORA_PATH=${LORA_PATH:-}     # an adapter, or several with commas: merged into the base first, once
OUTPUT_PATH=${OUTPUT_PATH:-output/serve}  # where merged models go
PORT=${PORT:-8000}
TOT_CUDA=${TOT_CUDA:-}       # GPUs, as in 0,1; empty: the first
# -----------------
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
export CUDA_VISIBLE_DEVICES=${TOT_CUDA:-${CUDA_VISIBLE_DEVICES-0}} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
[[ -n $BASE_MODEL ]] || BASE_MODEL=$(python scripts/default_model.py)
[[ -f $BASE_MODEL/config.json ]] || { echo "error: BASE_MODEL=$BASE_MODEL is no model folder: download it first, hf download $BASE_MODEL --local-dir my/model" >&2; exit 2; }
if [[ -n $LORA_PATH ]]; then
  IFS=, read -ra ADAPTERS <<< "${LORA_PATH//, /,}"
  for adapter in "${ADAPTERS[@]}"; do
    [[ -f $adapter/adapter_model.safetensors ]] || { echo "error: LORA_PATH: $adapter holds no adapter_model.safetensors" >&2; exit 2; }
  done
  MERGED=$OUTPUT_PATH/$({ echo "$BASE_MODEL"; cat "${ADAPTERS[@]/%//adapter_model.safetensors}"; } | sha256sum | head -c 12)
  [[ -f $MERGED/config.json ]] || python merge_lora.py --model_name_or_path "$BASE_MODEL" --lora_path "$LORA_PATH" --output_dir "$MERGED" >&2
  BASE_MODEL=$MERGED
fi
mkdir -p "$OUTPUT_PATH/$PORT"
ln -sfn "$(realpath "$BASE_MODEL")" "$OUTPUT_PATH/$PORT/yangtuo"
cd "$OUTPUT_PATH/$PORT"  # where the folder's name is the model's
if command -v vllm > /dev/null && nvidia-smi > /dev/null 2>&1; then
  exec vllm serve yangtuo --host 127.0.0.1 --port "$PORT" --tensor-parallel-size "$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)" "$@"
fi
python -c 'import openai, uvicorn, fastapi' 2> /dev/null || { echo "error: the server is not installed: pip install -r requirements-serve.txt" >&2; exit 2; }
mkdir -p "${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}"  # it lists what is there on /v1/models, and fails without
exec transformers serve yangtuo --host 127.0.0.1 --port "$PORT" "$@"  # last, so that the caller's flags win
