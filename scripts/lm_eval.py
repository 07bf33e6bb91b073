"""lm-evaluation-harness with this project's caches: its own command line, and `--model selective_kv`."""

import sys
from pathlib import Path

# The project is run from its folder, not installed; in place of this one, whose lm_eval.py hides the package's name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.program import start  # noqa: E402

if __name__ == "__main__":
    start("evaluation.lm_eval")
