#!/usr/bin/env bash
# Two machines, for real: two network namespaces with a cable (veth) between them, one rank each, over gloo. Shows that the run
# ends in the weights of two ranks on one machine; that it ends with a message when the cable is cut; and that it goes on after.
# Needs root and iproute2, no GPU:   bash benchmarks/two_hosts.sh
set -euo pipefail
cd "$(dirname "$0")/.."
command -v ip > /dev/null || { echo "error: ip is missing: apt-get install iproute2" >&2; exit 2; }
[[ $EUID == 0 ]] || { echo "error: making network namespaces needs root" >&2; exit 2; }
command -v torchrun > /dev/null || PATH="$PWD/.venv/bin:$PATH"
WORK=$(mktemp -d)
clean() { ip netns pids yangtuo0 2> /dev/null | xargs -r kill -9; ip netns pids yangtuo1 2> /dev/null | xargs -r kill -9
          ip netns del yangtuo0 2> /dev/null || true; ip netns del yangtuo1 2> /dev/null || true; rm -rf "$WORK"; }
trap clean EXIT
ip netns add yangtuo0 && ip netns add yangtuo1
ip link add cable0 netns yangtuo0 type veth peer name cable1 netns yangtuo1
for host in 0 1; do
  ip -n yangtuo$host addr add 10.77.0.$((host + 1))/24 dev cable$host
  ip -n yangtuo$host link set cable$host up && ip -n yangtuo$host link set lo up
done
export MODEL_PATH=${MODEL_PATH:-$(python scripts/default_model.py)} DATA_PATH=${DATA_PATH:-sample/conversation.json} CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PORT=29577
FLAGS="--template chatml --max_length 128 --gradient_accumulation_steps 1 --max_steps 6 --save_steps 2 --ddp_timeout ${TIMEOUT:-30} --logging_steps 1 --learning_rate 1e-4"

host() {  # host NUMBER OUTPUT [flags]: one machine's part of a run
  OUTPUT_PATH=$2 NNODES=2 NODE_RANK=$1 MASTER_ADDR=10.77.0.1 GLOO_SOCKET_IFNAME=cable$1 ip netns exec yangtuo$1 \
    bash scripts/finetune.sh $FLAGS "${@:3}" > "$WORK/host$1.log" 2>&1
}
both() { host 0 "$@" & host 1 "$@" & for one in $(jobs -p); do wait "$one" || return 1; done; }
compare() {
  python - "$@" << 'COMPARE'
import sys
from safetensors.torch import load_file
a, b = (load_file(f"{folder}/model.safetensors") for folder in sys.argv[1:])
print(f"  greatest difference of a weight: {max((a[name] - b[name]).abs().max().item() for name in a):.3g}")
COMPARE
}

echo "two ranks on one machine"
OUTPUT_PATH=$WORK/one torchrun --nproc_per_node 2 --master_port $PORT finetune.py --model_name_or_path "$MODEL_PATH" --data_path "$DATA_PATH" \
  --output_dir "$WORK/one" $FLAGS > "$WORK/one.log" 2>&1
echo "two machines with one rank each"
both "$WORK/two"
compare "$WORK/one" "$WORK/two"

echo "two machines, the cable cut behind the first checkpoint"
host 0 "$WORK/cut" & first=$!
host 1 "$WORK/cut" & second=$!
until ls -d "$WORK"/cut/checkpoint-* > /dev/null 2>&1; do sleep 0.1; kill -0 $first; done
ip -n yangtuo1 link set cable1 down
SECONDS=0
wait $first && { echo "error: the run did not notice" >&2; exit 1; } || echo "  the other machine ended after $SECONDS s with status $?:"
grep -h "^error" "$WORK/host0.log" | sed 's/^/  /'
wait $second || echo "  the one cut off ended after $SECONDS s"
ip -n yangtuo1 link set cable1 up
echo "the cable is back: --resume True"
both "$WORK/cut" --resume True
compare "$WORK/one" "$WORK/cut"
