#!/usr/bin/env bash
# A first result on a CPU: installs into .venv, then the bundled model through all three caches.
# Arguments go to scripts/demo.py, for example: scripts/demo.sh --checkpoint_path checkpoints/my-llama
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
venv requirements.txt
exec .venv/bin/python scripts/demo.py "$@"
