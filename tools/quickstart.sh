#!/usr/bin/env bash
# Sets the environment up, then trains a teacher, a student alone and a distilled student on rendered scenes.
# Arguments go to tools/quickstart.py: bash tools/quickstart.sh --seeds 0 1 2
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/tools/setup_env.sh")
exec "$python" "$root/tools/quickstart.py" "$@"
