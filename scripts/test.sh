#!/usr/bin/env bash
# Install what the tests need, and run them all (or those named behind: bash scripts/test.sh -k template).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh requirements-test.txt
if ! command -v chromium chromium-browser google-chrome > /dev/null; then  # the browser that the page is tested in
  SUDO=$([[ $(id -u) == 0 ]] || echo sudo -n)
  { $SUDO apt-get -qq update && DEBIAN_FRONTEND=noninteractive $SUDO apt-get -qq install -y --no-install-recommends chromium; } > /dev/null 2>&1 \
    || echo "chromium could not be installed, tests of the page will fail: apt-get install -y chromium" >&2
fi
# llama.cpp is compiled for many minutes, so its tests run where pip has kept it from another time: pip install llama-cpp-python==0.3.36, anywhere
wheel=$(python -m pip cache list llama_cpp_python --format abspath 2> /dev/null | grep -m 1 -- '-0\.3\.36-') \
  && python -m pip install --quiet --disable-pip-version-check "$wheel" || echo "llama.cpp is not at hand: what it does with exported files is not tested" >&2
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # one thread each for as many processes as there are cores
exec python -m pytest -q -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder tests "$@"
