#!/usr/bin/env bash
# Makes a venv with a vLLM for CPUs: tests/vllm_server/install.sh VENV. About 3 GB, and minutes. Python 3.11, Linux, x86-64.
# Apart from the project's own venv, since vLLM needs an older transformers. VENV/installed is there once it is whole.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?usage: install.sh VENV}
rm -f "$venv/installed"
test -x "$venv/bin/python" || "${VLLM_PYTHON:-python3.11}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check install "$@"; }
# With its dependencies, which a build of torch for GPUs has more of; all others are listed one by one.
pip -c "$here/requirements.txt" torch
pip --no-deps -r "$here/requirements.txt"
pip --no-deps --require-hashes -r "$here/vllm.txt"
# Only its Python code is of use beside a torch for CPUs; without its operators it has to be told of their names.
pip --no-deps torchvision==0.28.0
"$venv/bin/python" "$here/torchvision_operators.py" "$("$venv/bin/python" -c 'import sysconfig as s; print(s.get_path("purelib"))')"
"$venv/bin/python" -c 'import torchvision.transforms.v2, vllm'
touch "$venv/installed"
