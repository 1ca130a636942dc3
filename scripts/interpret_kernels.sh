#!/usr/bin/env bash
# usage: scripts/interpret_kernels.sh [PYTEST OPTION ...]
# Runs the tests of our Triton kernels without a GPU, in Triton's interpreter, which has no bfloat16 and no compiler.
# Triton, and a NumPy that its interpreter takes, go into .interpreter, beside the environment that all tests run in.
# With -m "gpu and not tedious" the longest are left out.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=$(scripts/environment.sh dev,offline dev,offline)
version=$("$python" -V)
if [[ $(cat .interpreter/made_for 2>/dev/null || true) != "$version" ]]; then
  rm -rf .interpreter
  "$python" -m pip install -q --target .interpreter 'triton>=3.6,<3.10' 'numpy>=2,<2.4' >&2
  echo "$version" >.interpreter/made_for
fi
files=$(grep -l 'get("TRITON_INTERPRET") == "1"' tests/kernels/test_*.py)  # of these all that is marked gpu
export PYTHONPATH=$PWD/.interpreter:$PWD TRITON_INTERPRET=1
# shellcheck disable=SC2086 # names without spaces
exec "$python" -m pytest -m gpu $files "$@"
