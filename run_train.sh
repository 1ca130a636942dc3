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
  RDZV_ENDPOINT  HOST:PORT of the rendezvous endpoint, on one of them; needed for more than one machine
  RDZV_ID        name of the run there, the same on all (default swamla-titan)
  MAX_RESTARTS   how often processes that crashed are started again, from the newest checkpoint (default 3; a run of
                 one process is not)
  LOG_RANK       the processes of this machine whose output is shown, as in 0,3 (default 0)
  PYTHON         the Python to run (default: the active virtual environment, .venv, or python3 if it has all that is
                 required; else .venv is made)

A run listens at ports through which whoever reaches them can end it or have code run in it: at the loopback address if
it has one machine, else at the address by which its machines reach each other. Open them to those machines alone.

Exit codes: 0 done, 1 the run failed, 2 something given is wrong, 75 stopped on purpose: the same command continues.
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

# shown VALUE: for a message, on one line whatever it holds.
shown() {
  if [[ ${#1} -gt 80 || $1 == *[[:cntrl:]]* ]]; then
    printf '%q...' "${1:0:80}"
  else
    printf '%s' "$1"
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
  if ((${#others[@]})); then
    argument=$(shown "${others[0]}")
    [[ ! $argument =~ ^[a-z_]+\.[a-z0-9_]+= ]] || refuse "$argument: two dashes are missing, write --$argument"
    refuse "${argument:-an empty argument}: one configuration is taken, and after it settings as --section.key value"
  fi
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
    "${endpoint:+, rendezvous endpoint $endpoint}" >&2 || true
}

# matches VALUE PATTERN: letters and digits are ASCII's, whatever the locale.
matches() {
  local LC_ALL=C
  [[ $1 =~ $2 ]]
}

# whole VALUE LEAST MOST: is it a number between these, as people write it? Longer ones bash would count wrongly.
whole() {
  matches "$1" '^(0|[1-9][0-9]{0,8})$' && (($1 >= $2 && $1 <= $3))
}

# Prints how many GPUs processes would find: those that are there, up to the first entry of CUDA_VISIBLE_DEVICES that
# names none of them, and none at all if one is named twice. Without nvidia-smi, entries are taken at their word.
count_gpus() {
  local LC_ALL=C listed line there='' ids=$'\n' rest entry named=$'\n' count=0
  if listed=$(nvidia-smi -L 2>/dev/null); then
    there=0
    while IFS= read -r line; do
      if [[ $line == 'GPU '* ]]; then
        there=$((there + 1))
        if [[ $line =~ UUID:\ (GPU-[0-9A-Za-z-]+) ]]; then ids+=${BASH_REMATCH[1]}$'\n'; fi
      fi
    done <<<"$listed"
  fi
  if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
    printf '%s\n' "${there:-0}"
    return
  fi
  if [[ $CUDA_VISIBLE_DEVICES == MIG-* ]]; then # CUDA takes one such part of a GPU
    printf '1\n'
    return
  fi
  rest=$CUDA_VISIBLE_DEVICES,
  while [[ -n $rest ]]; do
    entry=${rest%%,*} rest=${rest#*,}
    if [[ $CUDA_VISIBLE_DEVICES == GPU-* ]]; then
      [[ $entry == GPU-* ]] || break
    else
      [[ $entry =~ ^[[:space:]]*[+]?0*([0-9]+) ]] || break
      entry=${BASH_REMATCH[1]}
    fi
    if [[ $named == *$'\n'"$entry"$'\n'* ]]; then
      printf '0\n'
      return
    fi
    named+=$entry$'\n'
  done
  while IFS= read -r entry; do
    [[ -n $entry ]] || continue
    if [[ $entry == GPU-* ]]; then # the beginning of an id will do, if only one begins so
      [[ $ids == $'\n' || ($ids == *$'\n'"$entry"* && $ids != *$'\n'"$entry"*$'\n'"$entry"*) ]] || break
    elif [[ -n $there ]]; then
      whole "$entry" 0 $((there - 1)) || break
    fi
    count=$((count + 1))
  done <<<"$named"
  printf '%s\n' "$count"
}

# prepare_python: which Python runs, and from where it imports: the repository, and not the current folder.
prepare_python() {
  local found=":${PYTHONPATH:-}:"
  find_python "" offline
  while [[ $found == *::* ]]; do found=${found//::/:}; done # an empty entry means the current folder
  found=$root$found
  export PYTHONPATH=${found%:} PYTHONSAFEPATH=1
  # That variable is not known to Python 3.10.
  [[ $reason != 'Python 3.10.'* ]] || PYTHONPATH+=:$root/swamla_titan/safe_path
}

# What the caller's shell is set to must not change this script or those that it runs.
unset BASH_ENV ENV CDPATH
export -n SHELLOPTS BASHOPTS
set +o noglob +o noclobber
shopt -u failglob nullglob nocasematch

script=${BASH_SOURCE[0]}
while [[ -L $script ]]; do
  link=$(readlink -- "$script" && printf .)
  link=${link%$'\n.'}
  [[ $link == /* || $script != */* ]] || link=${script%/*}/$link
  script=$link
done
[[ $script == */* ]] || script=./$script
root=$(cd -- "${script%/*}/" && pwd && printf .)
root=${root%$'\n.'}
[[ $root != *:* ]] || refuse "$root: a path with a colon cannot be given to Python; move the repository"
pwd -P >/dev/null 2>&1 || refuse "the current folder has been removed; go to one that is there"

# shellcheck source=scripts/environment.sh
. "$root/scripts/environment.sh"
trap 'stop_early run_train.sh' TERM USR1 INT

# Other launchers, and shells in which a run was, leave what torchrun tells its processes.
foreign=
for name in RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME \
  MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID \
  TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE SWAMLA_TITAN_LAUNCH_FOLDER; do
  [[ -z ${!name:-} ]] || foreign+=" $name=$(shown "${!name}")"
  unset "$name"
done
[[ $foreign != *RANK=* && $foreign != *WORLD_SIZE=* ]] ||
  printf 'run_train.sh: left out, as other launchers and earlier runs leave them in the environment:%s\n' "$foreign" >&2 ||
  true

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
    refuse "no file $(shown "$config") in $PWD or $root, nor a shipped configuration of that name"
  fi
fi

nnodes=${NNODES:-1}
fewest=${nnodes%%:*} most=${nnodes#*:}
if ! whole "$fewest" 1 10000 || ! whole "$most" 1 10000; then
  refuse "NNODES=$(shown "$nnodes"): expected a number of machines, 1 to 10000, or MIN:MAX"
fi
((fewest <= most)) || refuse "NNODES=$nnodes: the smaller number stands first, NNODES=$most:$fewest"

ngpu=${NGPU:-}
[[ $ngpu != none ]] || ngpu=0
if [[ -z $ngpu ]]; then
  ngpu=$(count_gpus)
else
  whole "$ngpu" 0 1024 ||
    refuse "NGPU=$(shown "$ngpu"): expected a number of GPUs, at most 1024, 0 or none for the CPU"
  [[ $ngpu != 0 ]] || export CUDA_VISIBLE_DEVICES=""
fi
whole "${NPROC:-1}" 1 1024 || refuse "NPROC=$(shown "$NPROC"): expected a number of processes, 1 to 1024"
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
  prepare_python
  # First, so that a --gpus among the arguments has the last word.
  exec "$python" -m swamla_titan train --gpus "$((most * nproc))" "$config" "$@"
fi

find_temporary_folder
restarts=${MAX_RESTARTS:-3}
whole "$restarts" 0 1000000 || refuse "MAX_RESTARTS=$(shown "$restarts"): expected a number, at most 1000000"
shown_ranks=${LOG_RANK:-0}
matches "$shown_ranks" '^[0-9]+(,[0-9]+)*$' || refuse "LOG_RANK=$(shown "$shown_ranks"): expected numbers of processes, as in 0,3"
for rank in ${shown_ranks//,/ }; do
  whole "$rank" 0 $((nproc - 1)) ||
    refuse "LOG_RANK=$(shown "$shown_ranks"): the processes of this machine are 0 to $((nproc - 1))"
done
hidden=
for ((rank = 0; rank < nproc; rank++)); do
  [[ ,$shown_ranks, == *,$rank,* ]] || hidden+=,$rank:2
done
endpoint=${RDZV_ENDPOINT:-}
if [[ -n $endpoint ]]; then
  if ! matches "$endpoint" '^([A-Za-z0-9._-]+|\[[A-Za-z0-9.:%_-]+\]):[0-9]+$' || ! whole "${endpoint##*:}" 1 65535; then
    refuse "RDZV_ENDPOINT=$(shown "$endpoint"): expected HOST:PORT, an IPv6 address as [ADDRESS]:PORT, ports 1 to 65535"
  fi
elif ((most > 1)); then
  refuse "NNODES=$nnodes needs RDZV_ENDPOINT=HOST:PORT, the same on every machine: one of them, and a free port there"
fi

((most > 1)) || endpoint= # one machine meets nobody
run=${RDZV_ID:-swamla-titan}
matches "$run" '^[A-Za-z0-9._:@+=-]{1,100}$' ||
  refuse "RDZV_ID=$(shown "$run"): expected at most 100 letters, digits, or any of . _ : @ + = -"

say_what_was_found "$@"
prepare_python
if ((most == 1 && nproc == 1)); then
  # A signal that comes before Python can handle it waits until it does.
  hold=
  if [[ $python != *=* ]] && env --block-signal=INT env >/dev/null 2>&1; then hold=yes; fi
  exec ${hold:+env --block-signal=INT,TERM,USR1} "$python" -m swamla_titan train "$config" "$@"
fi

# Several processes: an error of the configuration is reported once, before any of them starts.
processes=
for ((nodes = fewest; nodes <= most; nodes++)); do processes+=,$((nodes * nproc)); done
attended "$python" -m swamla_titan.launch.preflight "${processes#,}" "$ngpu" "$config" "$@" || exit

if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  threads=$((cores / nproc))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
flags=(--nnodes="$nnodes" --nproc-per-node="$nproc" --max-restarts="$restarts" --local-ranks-filter="$shown_ranks")
# What the hidden processes say on standard error is kept, for the case that they crash.
[[ -z $hidden ]] || flags+=(--redirects="${hidden#,}")
# Each start of the processes gets a store of its own. In the one that torchrun shares among all starts, processes that
# are started again find addresses of dead ones; and at the rendezvous endpoint nobody could join again.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [[ -n $endpoint ]]; then
  flags+=(--rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$run")
else
  # A free port for each run. By its number, because a machine need not know its own name.
  flags+=(--standalone --local-addr=127.0.0.1)
fi
# In this shell, so that there is no moment in which it does not hear signals.
# shellcheck source=scripts/torchrun.sh
. "$root/scripts/torchrun.sh" "$python" "${flags[@]}" -m swamla_titan train "$config" "$@"
