#!/usr/bin/env bash
# Print the path of a Python that has all the project requires; if there is none, make one in .venv.
# usage: environment.sh [USED [INSTALLED]]
#   USED       comma-separated extras of pyproject.toml that the Python must have
#   INSTALLED  comma-separated extras to install if .venv has to be made or completed
# Tried in this order: $PYTHON, the active $VIRTUAL_ENV, .venv, python3 on PATH. Standard output has the path alone;
# what is used, and what is installed, is said on standard error.
# Read by another script, with `.`, it defines functions: `find_python USED INSTALLED` sets `python`; `attended`.
set -euo pipefail

say() { printf '%s\n' "$*" >&2 || true; }

child= # of `attended`

# attended COMMAND ...: runs it, without standard input, such that a signal is heard at once. Ends with its exit code.
attended() {
  local status
  "$@" &
  child=$!
  wait "$child" && status=0 || status=$?
  child=
  return "$status"
}

# stop_early NAME: what a signal does before there is anything to save.
stop_early() {
  trap '' TERM USR1 INT
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
  say "$1: stopped before training began: there is nothing to save; the same command starts it"
  exit 75
}

# fits PYTHON: prints one line about it; or returns 1 and prints why it cannot be used.
fits() {
  local said status=0
  said=$("$1" "$root/scripts/check_environment.py" --extras "$used" 2>/dev/null) || status=1
  printf '%s\n' "${said:-it is no working Python 3}"
  return "$status"
}

# is_fit PYTHON: does it fit? Then it is the one: `python`. What it is, or why it does not fit, is left in `reason`.
is_fit() {
  reason=$(fits "$1") || return 1
  say "using $reason"
  python=$1
}

# new_enough PYTHON: is it there, does it run, and has it the version that pyproject.toml asks for?
new_enough() {
  local minimum
  minimum=$(sed -n 's/^requires-python = ">=\([0-9]*\)\.\([0-9]*\)".*/\1, \2/p' "$root/pyproject.toml")
  "$1" -c "import sys; sys.exit(sys.version_info < ($minimum))" >/dev/null 2>&1
}

# Prints the first Python on PATH that can make virtual environments.
find_base_python() {
  local name without_venv=
  for name in python3 python3.13 python3.12 python3.11 python3.10; do
    new_enough "$name" || continue
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      command -v "$name"
      return
    fi
    without_venv=${without_venv:-$name}
  done
  if [[ -n $without_venv ]]; then
    say "error: $(command -v "$without_venv") cannot make virtual environments: it has no venv module."
    say "On Debian and Ubuntu: apt-get install python3-venv"
  else
    say "error: no Python that pyproject.toml allows is on PATH: install one, or name it with PYTHON=/path/to/python"
  fi
  return 1
}

find_python() {
  used=$1 installed=$2 venv=$root/.venv
  local base
  if [[ -n ${PYTHON:-} ]]; then
    python=$(command -v -- "$PYTHON") || { say "error: PYTHON=$PYTHON: no such command"; exit 2; }
    [[ $python == /* ]] || python=$PWD/$python
    if is_fit "$python"; then return; fi
    say "error: PYTHON=$PYTHON cannot be used:" "$reason"
    exit 2
  fi
  if [[ -n ${VIRTUAL_ENV:-} ]]; then
    if is_fit "$VIRTUAL_ENV/bin/python"; then return; fi
    say "not using the active $VIRTUAL_ENV: ${reason//$'\n'/, }"
  fi
  # The installer leaves .incomplete behind if it is cut off: files may be half written then, whatever the check says.
  if [[ -e $venv && ! -e $venv/.incomplete ]] && is_fit "$venv/bin/python"; then return; fi
  if python=$(command -v python3) && is_fit "$python"; then return; fi

  if [[ -e $venv/.incomplete ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    base=$(find_base_python) || exit
    [[ ! -e $venv ]] || say "$venv is incomplete: making it anew"
    rm -rf "$venv"
    mkdir "$venv"
    touch "$venv/.incomplete"
    say "making .venv with $base"
    attended "$base" -m venv "$venv" >&2 || exit
  fi
  attended "$venv/bin/python" "$root/scripts/install_requirements.py" --extras "$installed" >&2 || exit
  if is_fit "$venv/bin/python"; then return; fi
  say "error: .venv cannot be used after the installation:" "$reason"
  exit 1
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
  trap 'stop_early environment.sh' TERM USR1 INT
  find_python "${1:-}" "${2:-}"
  printf '%s\n' "$python"
fi
