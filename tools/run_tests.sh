#!/usr/bin/env bash
# Sets the environment up, then runs the tests. Arguments go to pytest: bash tools/run_tests.sh tests/functional -k pair
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/tools/setup_env.sh")

# The tests work on tiny tensors: more threads only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
cd "$root"
exec "$python" -m pytest -c .pytest.ini --rootdir . "$@"
