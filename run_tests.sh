#!/usr/bin/env bash
# usage: ./run_tests.sh [PYTEST ARGUMENT ...]
# Runs the tests, in an environment that is made if there is none (scripts/environment.sh). PYTHON names another one.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")"
python=$(scripts/environment.sh dev,offline dev,offline)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m pytest "$@"
