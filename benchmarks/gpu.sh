#!/usr/bin/env bash
# One NVIDIA card of 11 GB or more, ten minutes, nothing downloaded: every training script, generation, GPTQ and merging on random LLaMAs
# of 0.1B, 1B and, where it fits, 7B weights; then tests/test_gpu.py, which has what must be exact. The table is in output/gpu/table.md.
#   bash benchmarks/gpu.sh --minutes 20
#   bash benchmarks/gpu.sh --rehearse True      # without a card: the same rows with a tiny model on the CPU
set -euo pipefail
cd "$(dirname "$0")/.."
command -v python > /dev/null && python -c 'import fire' 2> /dev/null || PATH="$PWD/.venv/bin:$PATH"
export OMP_WAIT_POLICY=passive
DEVICE=cuda
[[ " $* " =~ " --rehearse True " || " $* " =~ " --rehearse=True " ]] && DEVICE=cpu
STATUS=0
python benchmarks/gpu.py "$@" || STATUS=$?
if python -c 'import pytest' 2> /dev/null; then TEST_DEVICE=$DEVICE python -m pytest -q tests/test_gpu.py || STATUS=$?
else echo "tests/test_gpu.py is left out: pip install pytest" >&2; fi
exit "$STATUS"
