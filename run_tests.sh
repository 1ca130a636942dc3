#!/usr/bin/env bash
# usage: ./run_tests.sh [PYTEST ARGUMENT ...]
# Runs the tests on all cores, in an environment that is made if there is none (scripts/environment.sh). PYTHON names
# another one. They run in one process where an argument asks for that (-n 0, --pdb), names single tests (FILE::TEST),
# or has them share a GPU (-m gpu).
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")"
python=$(scripts/environment.sh dev,offline dev,offline)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Two a core: half of the time tests wait for processes of their own.
workers=$((2 * $(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)))
export PYTEST_XDIST_AUTO_NUM_WORKERS=${PYTEST_XDIST_AUTO_NUM_WORKERS:-$workers}
cores=(-n auto --maxprocesses 16 --dist worksteal)
for argument in "$@"; do
  case $argument in
    -n | -n[0-9a]* | --numprocesses* | --dist* | --pdb* | --trace | --co | --collect-only | no:xdist | -pno:xdist) cores=() ;;
    *"not gpu"*) ;;
    *::* | gpu | "gpu "* | *" gpu" | *" gpu "*) cores=() ;;
  esac
done
exec "$python" -m pytest ${cores[@]+"${cores[@]}"} "$@"
