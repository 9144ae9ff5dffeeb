#!/usr/bin/env bash
# Makes (or reuses) a virtual environment with one dependency line, and this checkout in it.
#
#   python=$(bash tools/setup_env.sh)
#
# Progress goes to stderr; stdout is one line, the path of the environment's Python. Once it has succeeded, it returns
# within a second until setup.py or this script changes.
#
#   MMSTRUCTKD_STACK   onedl (default) or openmmlab
#   MMSTRUCTKD_VENV    where the environment lies (default: .venv for onedl, .venv-openmmlab for openmmlab)
#   MMSTRUCTKD_PYTHON  the Python (>= 3.10) that makes it (default: python3.11, else python3)
#   MAX_JOBS           compilers at a time (default: the cores, at most one for each 2 GB of memory)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stack=${MMSTRUCTKD_STACK:-onedl}
# From 77, as torch wants it; below 82, where pkg_resources went, which the openmmlab line needs. It is named in each
# step, so that no step moves it.
setuptools='setuptools>=77.0.3,<82'

say() { printf '[set-up] %s\n' "$*" >&2; }
step() { printf '[set-up %s/6] %s\n' "$1" "$2" >&2; }
die() {
  printf '[set-up] FAILED: %s\n' "$*" >&2
  exit 1
}

# What an environment depends on: the lists of versions, these steps, the line, and where the checkout lies.
hash_inputs() {
  { cat "$root/setup.py" "$root/tools/setup_env.sh" && printf '%s\n%s\n' "$stack" "$root"; } | cksum
}

is_ready() { [[ -x $python && -f $stamp && $(sed -n 1p "$stamp") == "$wanted" ]]; }

make_venv() {
  local base=${MMSTRUCTKD_PYTHON:-$(command -v python3.11 || command -v python3 || true)}
  [[ -n $base ]] || die 'there is no python3. Install Python 3.10 or newer, or name one in MMSTRUCTKD_PYTHON.'
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || die "Python 3.10 or newer is needed, $base is $("$base" -V 2>&1). Name another in MMSTRUCTKD_PYTHON."
  "$base" -m venv "$venv" >&2 \
    || die "$base cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv."
}

# NAME ARGUMENTS...: installs quietly; on failure shows the end of what pip wrote.
pip_install() {
  local log=$logs/$1.log
  shift
  if ! "$python" -m pip install --disable-pip-version-check "$@" > "$log" 2>&1 < /dev/null; then
    printf '\n--- the end of %s ---\n' "$log" >&2
    tail -n 40 "$log" >&2
    return 1
  fi
}

# WHAT COUNT COMMAND...: runs the command, and until it ends prints a line every 30 seconds with what COUNT prints.
with_heartbeat() {
  local what=$1 count=$2 begun=$SECONDS next=30
  shift 2
  "$@" &
  local job=$!
  while kill -0 "$job" 2> /dev/null; do
    sleep 0.5
    if ((SECONDS - begun >= next)); then
      say "  $what: $((SECONDS - begun)) s$("$count")"
      next=$((next + 30))
    fi
  done
  wait "$job"
}
nothing() { :; }
objects() { printf ', %s of about 78 objects' "$(find "$build" -name '*.o' 2> /dev/null | wc -l)"; }

# DISTRIBUTION VERSION: is it there?
has() {
  "$python" - "$@" << 'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    sys.exit(version(sys.argv[1]).split('+')[0] != sys.argv[2])
except PackageNotFoundError:
    sys.exit(1)
PY
}

# torch, mmcv, rest or dev: the requirements, one a line, at the versions that were run; setup.py has them.
versions() {
  "$python" - "$root/setup.py" "$stack" "$1" << 'PY'
import runpy
import sys

path, stack, what = sys.argv[1:]
book = runpy.run_path(path, run_name='versions')
pins = [f'{name}=={low}' for name, (low, _) in book['TRIED'][stack].items()]
mmcv = [pin for pin in pins if pin.split('==')[0].endswith('mmcv')]
answers = {
    'torch': ['torch==' + book['TORCH'][0]],
    'mmcv': mmcv,
    'rest': [pin for pin in pins if pin not in mmcv] + book['UNDECLARED'][stack],
    'dev': book['DEV'],
}
print('\n'.join(answers[what]))
PY
}

install_mmcv() {
  local pin=$1 jobs fits
  if has "${pin%%==*}" "${pin##*==}"; then
    say '  is there already'
    return
  fi
  command -v c++ > /dev/null || command -v g++ > /dev/null \
    || die 'mmcv is compiled here and needs a C++ compiler. On Debian or Ubuntu: apt install build-essential python3-dev.'
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
    || die 'mmcv is compiled here and needs the headers of Python (Python.h). On Debian or Ubuntu: apt install python3-dev.'
  jobs=$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 2)
  if [[ -r /proc/meminfo ]]; then
    fits=$(awk '/^MemAvailable/ {n = int($2 / 2000000); print (n < 1) ? 1 : n}' /proc/meminfo)
    if ((fits < jobs)); then jobs=$fits; fi
  fi
  export MAX_JOBS=${MAX_JOBS:-$jobs}
  build=$venv/build-mmcv # pip builds below TMPDIR, so that the objects can be counted
  mkdir -p "$build"
  MMCV_WITH_OPS=1 TMPDIR=$build with_heartbeat "compiling $pin with $MAX_JOBS jobs" objects \
    pip_install mmcv --no-build-isolation "$pin" || die "cannot build $pin (see above)."
  rm -rf "$build"
}

main() {
  case "$stack" in
    onedl) venv=${MMSTRUCTKD_VENV:-$root/.venv} ;;
    openmmlab) venv=${MMSTRUCTKD_VENV:-$root/.venv-openmmlab} ;;
    *) die "MMSTRUCTKD_STACK must be 'onedl' or 'openmmlab', got '$stack'." ;;
  esac
  [[ $venv == /* ]] || venv=$PWD/$venv
  python=$venv/bin/python
  stamp=$venv/.mmstructkd-stamp
  logs=$venv/setup-logs
  wanted=$(hash_inputs)
  if [[ ${1:-} == --hash ]]; then # what the stamp of a finished environment begins with
    printf '%s\n' "$wanted"
    return
  fi
  if is_ready; then
    printf '%s\n' "$python"
    return
  fi
  if [[ -f $stamp && $(sed -n 2p "$stamp") != "$stack" ]]; then
    die "$venv holds the line '$(sed -n 2p "$stamp")', not '$stack'. Set MMSTRUCTKD_VENV to another folder."
  fi

  local started=$SECONDS
  step 1 "Python environment in $venv (line: $stack)"
  [[ -x $python ]] || make_venv
  # Two runs at once (a test run and a quickstart) must not install over each other.
  if command -v flock > /dev/null; then
    exec 9> "$venv/.mmstructkd-lock"
    flock 9
    if is_ready; then # another run finished it while this one waited
      printf '%s\n' "$python"
      return
    fi
  fi
  mkdir -p "$logs"
  pip_install build-tools "$setuptools" wheel ninja || die 'cannot install setuptools, wheel and ninja (see above).'
  local torch mmcv rest dev
  torch=$(versions torch) && mmcv=$(versions mmcv) && rest=$(versions rest) && dev=$(versions dev) \
    || die 'cannot read the versions from setup.py.'

  step 2 "$torch"
  # Named exactly: where there is a build without CUDA, this takes it.
  with_heartbeat "$torch" nothing pip_install torch "$torch" "$setuptools" || die "cannot install $torch (see above)."

  step 3 "$mmcv, compiled for this torch (about 9 minutes on 2 cores; seconds where pip has kept the result)"
  install_mmcv "$mmcv"

  local -a requirements
  mapfile -t requirements <<< "$rest"
  step 4 "${requirements[*]}"
  # torch and mmcv are named again, so that nothing moves them.
  with_heartbeat 'installing' nothing pip_install line "$torch" "$mmcv" "$setuptools" "${requirements[@]}" \
    || die "cannot install the line '$stack' (see above)."

  mapfile -t requirements <<< "$dev"
  step 5 'mmstructkd itself (editable), and what its tests use'
  with_heartbeat 'installing' nothing pip_install dev "$torch" "$mmcv" "$setuptools" "${requirements[@]}" \
    || die 'cannot install what the tests use (see above).'
  pip_install mmstructkd --no-build-isolation --no-deps --editable "$root" || die 'cannot install mmstructkd (see above).'

  step 6 'checking that everything imports'
  (cd "$venv" && "$python" -c 'import mmcv.ops, mmdet, mmengine, mmseg, torch, mmstructkd') > "$logs/check.log" 2>&1 || {
    tail -n 20 "$logs/check.log" >&2
    die 'the environment does not import (see above).'
  }
  printf '%s\n%s\n' "$wanted" "$stack" > "$stamp"
  say "done in $((SECONDS - started)) s"
  printf '%s\n' "$python"
}

# The last line: bash has then read the whole script before it runs any of it, so that a change of this file (a pull)
# does not reach a set-up that is under way.
main "$@"
exit
