"""lm-evaluation-harness with this project's caches: its own command line, and `--model selective_kv`."""

import sys
from pathlib import Path

# In place of this folder, whose lm_eval.py would be found for the package of that name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.packages import missing_packages_told  # noqa: E402

if __name__ == "__main__":
    with missing_packages_told():
        from evaluation.lm_eval import main

        main()
