#!/usr/bin/env bash
# usage: scripts/interpret_kernels.sh [PYTEST OPTION ...]
# Runs the tests of our Triton kernels without a GPU, in Triton's interpreter, which has no bfloat16 and no compiler.
# Triton, and a NumPy that its interpreter takes, go into .interpreter, beside the environment that all tests run in.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=$(scripts/environment.sh dev,offline dev,offline)
if [[ ! -e .interpreter/complete ]]; then
  rm -rf .interpreter
  "$python" -m pip install -q --target .interpreter 'triton>=3.6,<3.10' 'numpy>=2,<2.4' >&2
  touch .interpreter/complete
fi
export PYTHONPATH=$PWD/.interpreter:$PWD TRITON_INTERPRET=1
mapfile -t files < <(grep -l TRITON_INTERPRET tests/kernels/test_*.py)
exec "$python" -m pytest -m gpu "${files[@]}" "$@"
