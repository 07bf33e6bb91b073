#!/usr/bin/env bash
# All checks: formatting and lint (ruff), types (mypy), tests (pytest; those for a GPU skip without one).
# Arguments go to pytest: scripts/test.sh -k cache
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
venv requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy .
# Two processes, one thread each: small tensors gain nothing from more.
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -q -n 2 "$@"
