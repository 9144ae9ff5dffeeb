#!/usr/bin/env bash
# Sets the environment up, then trains configs one after the other, each from the student that the one before has left.
# Arguments go to tools/train_stages.py: bash tools/train_stages.sh hint.py kd.py --work-dir work_dirs/two_stages
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/tools/setup_env.sh")
exec "$python" "$root/tools/train_stages.py" "$@"
