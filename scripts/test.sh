#!/usr/bin/env bash
# Install what the tests need, and run them all (or those named behind: bash scripts/test.sh -k template).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh requirements-test.txt
export OMP_WAIT_POLICY=passive
exec python -m pytest -q tests "$@"
