#!/usr/bin/env bash
set -euo pipefail

# A standard stream that is closed would be the next file that is opened, and get what is printed; one that is full, or
# whose reader has gone, must not end this script.
true >&2 || exec 2>/dev/null
{ true >&1; } 2>/dev/null || exec >/dev/null
{ true <&0; } 2>/dev/null || exec </dev/null
trap '' PIPE

usage() {
  cat <<'USAGE'
usage: ./run_train.sh [CONFIG] [--section.key value ...] [--dry-run]

Trains with the settings of the TOML file CONFIG, train_configs/debug.toml if none is given. A relative CONFIG is
looked for in the current folder, then in the repository; the name of a shipped configuration will do as well. What
follows overrides keys of the file. With --dry-run nothing is trained or written: what training would refuse is refused,
and what each of NNODES x NGPU GPUs would hold is shown, on any machine.

  NGPU           GPUs to use on this machine, a process each; 0 or none: train on the CPU (default: what is there)
  NPROC          processes on this machine if it trains on the CPU (default 1)
  NNODES         machines the run spans, or MIN:MAX of an elastic run (default 1); start the same command on each
  RDZV_ENDPOINT  HOST:PORT at which they meet, one of them; needed for more than one machine
  RDZV_ID        name of the run there, the same on all (default swamla-titan)
  MAX_RESTARTS   how often processes that crashed are started again, from the newest checkpoint (default 3; a run of
                 one process is not)
  LOG_RANK       the processes of this machine whose output is shown, as in 0,3 (default 0)
  PYTHON         the Python to run (default: the active virtual environment, .venv, or python3 if it has all that is
                 required; else .venv is made)

Exit codes: 0 done, 1 the run failed, 2 something given is wrong, 75 stopped on purpose: the same command goes on.
USAGE
}

refuse() {
  printf 'run_train.sh: %s\n' "$*" >&2 || true
  exit 2
}

# takes_files FOLDER: can a file be written there, with something in it?
takes_files() {
  local file status=0
  file=$(mktemp "$1/swamla-titan.XXXXXX" 2>/dev/null) || return 1
  { printf 'room' >"$file"; } 2>/dev/null || status=1
  rm -f "$file"
  return "$status"
}

# Schedulers leave behind the TMPDIR of another job. Python then takes /tmp by itself, and not all that it calls does.
find_temporary_folder() {
  local folder
  for folder in "${TMPDIR:-/tmp}" /tmp /var/tmp; do
    takes_files "$folder" || continue
    [[ -z ${TMPDIR:-} || $folder == "$TMPDIR" ]] ||
      printf 'run_train.sh: no file can be written in TMPDIR=%q: %s is used\n' "$TMPDIR" "$folder" >&2 || true
    [[ $folder == /tmp && -z ${TMPDIR:-} ]] || export TMPDIR=$folder
    return
  done
  refuse "no folder for temporary files can be written (TMPDIR=${TMPDIR:-}, /tmp, /var/tmp): make room, or set TMPDIR"
}

count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
  fi
}

# refuse_positional ARGUMENT ...: other launchers take batch size and sequence length by their place; here keys have names.
refuse_positional() {
  local argument numbers=() others=() keys=(training.local_batch_size training.seq_len training.steps) named=
  while (($#)); do
    argument=$1
    shift
    case $argument in
      --dry-run | --*=*) ;;
      --*) (($# == 0)) || shift ;;
      -*) ;; # Python explains those
      *)
        if [[ $argument =~ ^[0-9]+$ ]]; then numbers+=("$argument"); else others+=("$argument"); fi
        ;;
    esac
  done
  for argument in "${others[@]+"${others[@]}"}"; do
    [[ ! $argument =~ ^[a-z_]+\.[a-z0-9_]+= ]] || refuse "$argument: two dashes are missing, write --$argument"
    refuse "$argument: one configuration is taken, and after it settings as --section.key value"
  done
  ((${#numbers[@]})) || return 0
  for argument in "${!numbers[@]}"; do
    [[ -z ${keys[argument]:-} ]] || named+=" --${keys[argument]} ${numbers[argument]}"
  done
  refuse "${numbers[*]}: settings have names, write$named (sequences that a GPU computes at a time, their tokens, steps)"
}

# data_parallel ARGUMENT ...: what the processes do with the weights, as far as it can be seen without reading TOML; the
# run's own log says all of it.
data_parallel() {
  local way="" keys='(tensor|context|pipeline)[[:space:]]*=[[:space:]]*([2-9]|[0-9]{2,})'
  if grep -qE "^[[:space:]]*(parallel\.)?$keys" "$config" 2>/dev/null || [[ $* =~ --parallel\.(tensor|context|pipeline) ]]; then
    return
  fi
  if [[ $* =~ --parallel\.data_parallel[\ =]([a-z]+) ]]; then
    way=${BASH_REMATCH[1]}
  else
    way=$(sed -nE 's/^[[:space:]]*(parallel\.)?data_parallel[[:space:]]*=[[:space:]]*"([a-z]+)".*/\2/p' "$config" 2>/dev/null)
  fi
  case ${way:-fsdp} in
    fsdp) printf 'FSDP ' ;;
    hsdp) printf 'HSDP ' ;;
    ddp) printf 'DDP ' ;;
  esac
}

# counted NUMBER NOUN PLURAL
counted() {
  if [[ $1 == 1 ]]; then printf '1 %s' "$2"; else printf '%s %s' "$1" "$3"; fi
}

# say_what_was_found ARGUMENT ...
say_what_was_found() {
  local found where="" how="" count=$((most * nproc))
  if [[ $ngpu != 0 ]]; then
    found=$(counted "$ngpu" GPU GPUs)
  elif [[ -n ${NGPU:-} ]]; then
    found="NGPU=$NGPU"
  else
    found="no GPU"
  fi
  [[ $ngpu != 0 ]] || where=" on the CPU,"
  [[ $count == 1 ]] || how=$(data_parallel "$@")
  if ((fewest < most)); then
    found+=", $fewest to $most machines"
    count="$((fewest * nproc)) to $count"
  elif ((most > 1)); then
    found+=" on each of $most machines"
  fi
  [[ -n $where ]] || where=" on"
  printf 'run_train.sh: %s: %straining%s %s%s\n' "$found" "$how" "$where" "$(counted "$count" process processes)" \
    "${endpoint:+, which meet at $endpoint}" >&2 || true
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
    if [[ -f $1 || ! $1 =~ ^[0-9]+$ ]]; then
      config=$1
      shift
    fi
    ;;
esac
refuse_positional "$@"
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
[[ $nnodes =~ ^([1-9][0-9]*)(:([1-9][0-9]*))?$ ]] || refuse "NNODES=$nnodes: expected a number of machines, or MIN:MAX"
fewest=${BASH_REMATCH[1]} most=${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}
((fewest <= most)) || refuse "NNODES=$nnodes: the smaller number stands first, NNODES=$most:$fewest"

ngpu=${NGPU:-}
[[ $ngpu != none ]] || ngpu=0
if [[ -z $ngpu ]]; then
  ngpu=$(count_gpus)
else
  [[ $ngpu =~ ^(0|[1-9][0-9]*)$ ]] || refuse "NGPU=$ngpu: expected a number of GPUs, 0 or none for the CPU"
  [[ $ngpu != 0 ]] || export CUDA_VISIBLE_DEVICES=""
fi
[[ ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] || refuse "NPROC=$NPROC: expected a number of processes"
nproc=${NPROC:-1}
if [[ $ngpu != 0 ]]; then
  [[ -z ${NPROC:-} || $nproc == "$ngpu" ]] ||
    refuse "NPROC=$nproc is for the CPU, and $ngpu GPUs take a process each: set NGPU=0, or leave NPROC out"
  nproc=$ngpu
fi

for argument in "$@"; do
  [[ $argument != --dry-run ]] || dry_run=yes
done
if [[ -n ${dry_run:-} ]]; then
  python=$("$root/scripts/environment.sh" "" offline)
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  # First, so that a --gpus among the arguments has the last word.
  exec "$python" -m swamla_titan train --gpus "$((most * nproc))" "$config" "$@"
fi

find_temporary_folder
restarts=${MAX_RESTARTS:-3}
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || refuse "MAX_RESTARTS=$restarts: expected a number"
shown=${LOG_RANK:-0}
[[ $shown =~ ^[0-9]+(,[0-9]+)*$ ]] || refuse "LOG_RANK=$shown: expected numbers of processes, as in 0,3"
hidden=
for ((rank = 0; rank < nproc; rank++)); do
  [[ ,$shown, == *,$rank,* ]] || hidden+=,$rank:2
done
for rank in ${shown//,/ }; do
  ((10#$rank < nproc)) || refuse "LOG_RANK=$shown: the processes of this machine are 0 to $((nproc - 1))"
done
endpoint=${RDZV_ENDPOINT:-}
if [[ -n $endpoint ]]; then
  [[ $endpoint =~ ^([^:]+|\[.*\]):[0-9]+$ ]] || refuse "RDZV_ENDPOINT=$endpoint: expected HOST:PORT"
elif ((most > 1)); then
  refuse "NNODES=$nnodes needs RDZV_ENDPOINT=HOST:PORT, the same on every machine: one of them, and a free port there"
fi

say_what_was_found "$@"
python=$("$root/scripts/environment.sh" "" offline)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if ((most == 1 && nproc == 1)); then
  exec "$python" -m swamla_titan train "$config" "$@"
fi

# Several processes: what is wrong with the configuration is said once, before any of them starts.
processes=
for ((nodes = fewest; nodes <= most; nodes++)); do processes+=,$((nodes * nproc)); done
"$python" -m swamla_titan.tools.preflight "${processes#,}" "$ngpu" "$config" "$@" || exit

if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  threads=$((cores / nproc))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
flags=(--nnodes="$nnodes" --nproc-per-node="$nproc" --max-restarts="$restarts" --local-ranks-filter="$shown")
# What the hidden processes say on standard error is kept, for the case that they crash.
[[ -z $hidden ]] || flags+=(--redirects="${hidden#,}")
# Each start of the processes gets a store of its own. In the one that torchrun shares among all starts, processes that
# are started again find addresses of dead ones; and where machines meet, nobody could join again.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [[ -n $endpoint ]]; then
  flags+=(--rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="${RDZV_ID:-swamla-titan}")
else
  # A free port for each run. By its number, because a machine need not know its own name.
  flags+=(--standalone --local-addr=127.0.0.1)
fi
exec "$root/scripts/torchrun.sh" "$python" "${flags[@]}" -m swamla_titan train "$config" "$@"
