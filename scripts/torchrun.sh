#!/usr/bin/env bash
# Run torchrun, deliver signals to its workers, and end with the workers' own exit code.
# usage: torchrun.sh PYTHON TORCHRUN_ARGUMENT ...   run_train.sh reads it with `.`
# swamla_titan/launch/__init__.py draws the states of the workers and lists the files of the launch folder; worker.py
# beside it is the workers' side, agent.py is torchrun adapted to them.
#
# SIGTERM, SIGUSR1 and SIGINT: the workers save and end, however long that takes; the exit code is 75. A second one
# three seconds later, or SIGHUP, ends all at once. torchrun ignores these signals: it would give its workers 30 seconds.
# shellcheck disable=SC2317  # functions called by traps
set -euo pipefail

python=$1
shift
folder=$(mktemp -d "${TMPDIR:-/tmp}/swamla-titan.XXXXXX")
export SWAMLA_TITAN_LAUNCH_FOLDER=$folder
printf '%s\n' "$$" >"$folder/launcher"
keep=
trap '[[ -n $keep ]] || rm -rf "$folder"' EXIT

agent=       # process id of torchrun
asked_at=    # when the first signal came, in seconds
interrupted= # a signal interrupted the wait
killed_by=   # the number of the signal that ended all at once
idle=        # there were no workers when the signal came

# Prints the process ids of the running workers; with `unaware`, only of those that no signal has reached yet; with
# `unended`, only of those that have not left their exit code.
workers() {
  local file pid
  for file in "$folder"/*.pid; do
    [[ -e $file ]] || continue
    pid=$(<"$file")
    [[ ${1:-} != unaware || ! -e ${file%.pid}.stopping ]] || continue
    [[ ${1:-} != unended || ! -e ${file%.pid}.code ]] || continue
    if kill -0 "$pid" 2>/dev/null; then printf '%s\n' "$pid"; fi
  done
}

# any_code CODE: has a worker ended with this exit code?
any_code() {
  local file
  for file in "$folder"/*.code; do
    if [[ -e $file && $(<"$file") == "$1" ]]; then return 0; fi
  done
  return 1
}

# Have all workers of the last start ended with 0 or 75? Then torchrun failed in its own shutdown.
all_ended_well() {
  local file any=1
  for file in "$folder"/*.pid; do
    [[ -e $file ]] || continue
    [[ -e ${file%.pid}.code && $(<"${file%.pid}.code") =~ ^(0|75)$ ]] || return 1
    any=0
  done
  return "$any"
}

# torchrun first: it would start the workers again.
kill_all() {
  local pid
  [[ -z $agent ]] || kill -KILL "$agent" 2>/dev/null || true
  for pid in $(workers); do kill -KILL "$pid" 2>/dev/null || true; done
}

stop() {
  local pid
  interrupted=1
  if [[ -z $asked_at ]]; then
    asked_at=$SECONDS
    { printf '%s\n' "$1" >"$folder/stop"; } 2>/dev/null || true # on a full disk the signal itself must do
    # Terminals and schedulers signal the workers as well. Those have a second to acknowledge it, and then get it once.
    sleep 1 || true
    for pid in $(workers unaware); do kill -s "$1" "$pid" 2>/dev/null || true; done
    # No worker has ever started: torchrun waits for other machines, and there is nothing to save. Later, between two
    # starts, the next workers must start, because they tell the other machines.
    if [[ -n $agent ]] && ! compgen -G "$folder/*.pid" >/dev/null; then
      idle=1
      kill_all
    fi
  elif ((SECONDS - asked_at > 2)); then # sooner, it is the same signal on its second way here
    end_at_once "$1"
  fi
}

end_at_once() {
  interrupted=1
  killed_by=$(kill -l "$1")
  kill_all
}

trap 'stop TERM' TERM
trap 'stop USR1' USR1
trap 'stop INT' INT
trap 'end_at_once HUP' HUP
(
  trap '' TERM USR1 INT
  # Some signal must be named for torchrun to handle; SIGQUIT is of no use here.
  exec "$python" -m swamla_titan.launch.agent --log-dir "$folder/logs" --signals-to-handle SIGQUIT "$@"
) &
agent=$!

while
  interrupted=
  { wait "$agent" && status=0 || status=$?; } 2>/dev/null
  [[ -n $interrupted ]]
do :; done

# Workers whose torchrun was killed or has ended would keep the GPUs and the dump folder.
if ((status != 0)); then
  for pid in $(workers unended); do kill -KILL "$pid" 2>/dev/null || true; done
fi

if [[ -n $killed_by ]]; then
  exit $((128 + killed_by))
elif any_code 2; then
  exit 2 # other workers crashed, if at all, because this one had ended
elif [[ -n $idle ]]; then
  exit 75
elif ((status == 0)) || all_ended_well; then
  if any_code 75; then exit 75; fi
  exit 0
fi
for file in "$folder"/logs/*/attempt_*/*/stderr.log; do
  if [[ -s $file ]]; then
    keep=1
    printf 'run_train.sh: the errors of the processes not shown (LOG_RANK) are in %s\n' "$folder/logs" >&2 || true
    break
  fi
done
exit 1
