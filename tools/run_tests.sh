#!/usr/bin/env bash
# Sets the environment up, then runs the tests, all of them in a process for each core (MMSTRUCTKD_WORKERS changes that).
# Arguments go to pytest, which then runs in one process: bash tools/run_tests.sh tests/functional -k pair
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/tools/setup_env.sh")

# The tests work on tiny tensors: more threads only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
cd "$root"
# A file stays in one process, so that what its tests share is made once.
(($#)) || set -- -n "${MMSTRUCTKD_WORKERS:-$(nproc)}" --dist loadfile
exec "$python" -m pytest -c .pytest.ini --rootdir . "$@"
