#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: ./run_train.sh [CONFIG] [--section.key value ...]

Trains with the settings of the TOML file CONFIG, train_configs/debug.toml if none is given. A relative CONFIG is
looked for in the current folder, then in the repository; the name of a shipped configuration will do as well. What
follows overrides keys of the file.

  NGPU      GPUs to use; 0 or none: train on the CPU (default: what is there, at most 1 in this version)
  NNODES    machines the run spans (default 1, the only number this version takes)
  PYTHON    the Python to run (default: the active virtual environment, .venv, or python3 if it has all that is
            required; else .venv is made)

RDZV_ENDPOINT, RDZV_ID, MAX_RESTARTS and LOG_RANK are for runs of several processes, which this version has none of.

Exit codes: 0 done, 1 the run failed, 2 something given is wrong, 75 stopped on purpose: the same command goes on.
USAGE
}

refuse() {
  printf 'run_train.sh: %s\n' "$*" >&2
  exit 2
}

count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
  fi
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

config=train_configs/debug.toml
case ${1:-} in
  -h | --help)
    usage
    exit 0
    ;;
  --*) ;;
  ?*)
    config=$1
    shift
    ;;
esac
if [[ ! -f $config ]]; then
  if [[ -f $root/train_configs/$config.toml ]]; then
    config=$root/train_configs/$config.toml
  elif [[ $config != /* && -f $root/$config ]]; then
    config=$root/$config
  else
    refuse "no file $config in $PWD or $root, nor a shipped configuration of that name"
  fi
fi

nnodes=${NNODES:-1}
[[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || refuse "NNODES=$nnodes: expected a number of machines, or MIN:MAX"
[[ $nnodes == 1 || $nnodes == 1:1 ]] ||
  refuse "NNODES=$nnodes: this version trains on one process; set NNODES=1 and NGPU=1"

ngpu=${NGPU:-}
if [[ -z $ngpu ]]; then
  ngpu=$(count_gpus)
  if ((ngpu > 1)); then
    printf 'run_train.sh: notice: %s GPUs are there; this version trains on one process and uses one\n' "$ngpu" >&2
    ngpu=1
  fi
else
  [[ $ngpu != none ]] || ngpu=0
  [[ $ngpu =~ ^(0|[1-9][0-9]*)$ ]] || refuse "NGPU=$ngpu: expected a number of GPUs, 0 or none for the CPU"
  [[ $ngpu == [01] ]] || refuse "NGPU=$ngpu: this version trains on one process; set NGPU=1"
  [[ $ngpu == 1 ]] || export CUDA_VISIBLE_DEVICES=""
fi

python=$("$root/scripts/environment.sh" "" offline)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m swamla_titan train "$config" "$@"
