#!/usr/bin/env bash
# For every lock in constraints/: an environment of that Python below .venv-matrix/, the fast tests, and two steps
# of training. One line for each; exit code 1 if one fails. `LOCKS=constraints/py312-jax0.11.txt` narrows it.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p .venv-matrix
failed=0

try() {  # LOCK: prints how it went
  local name venv log python start tested
  name=$(basename "$1" .txt)
  venv=.venv-matrix/$name
  log=$venv.log
  python=${name#py3}
  python=python3.${python%%-*}
  if ! "$python" -c 'import ensurepip' 2> /dev/null; then
    echo "$name: FAILED, no $python with venv on the PATH"
    return 1
  fi
  start=$SECONDS
  { test -x "$venv/bin/python" || "$python" -m venv "$venv"; } > "$log" 2>&1 &&
    make VENV="$venv" LOCK="$1" "$venv/installed-core" >> "$log" 2>&1 ||
    { echo "$name: FAILED to install, see $log"; return 1; }
  local installed=$((SECONDS - start))
  start=$SECONDS
  make VENV="$venv" LOCK="$1" test-fast >> "$log" 2>&1 || { echo "$name: FAILED in the tests, see $log"; return 1; }
  tested=$((SECONDS - start))
  start=$SECONDS
  rm -rf "$venv.run"
  JAX_PLATFORMS=cpu "$venv/bin/python" -m vigos_jax.main --config configs/base.py --config.steps=2 \
    --config.demo_eval.questions=20 --workdir "$venv.run" >> "$log" 2>&1 ||
    { echo "$name: FAILED in training, see $log"; return 1; }
  "$venv/bin/python" - "$name" "$installed" "$tested" "$((SECONDS - start))" << 'END'
import platform
import sys
from importlib.metadata import version

name, *seconds = sys.argv[1:]
versions = ", ".join(f"{package} {version(package)}" for package in ("jax", "flax", "optax", "orbax-checkpoint", "numpy"))
print(f"{name}: passed; Python {platform.python_version()}, {versions};",
      "installed in {} s, tests {} s, training {} s".format(*seconds))
END
}

for lock in ${LOCKS:-constraints/py*.txt}; do
  try "$lock" || failed=1
done
exit $failed
