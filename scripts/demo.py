"""The three caches side by side, on a CPU, in a minute: a story that each continues, and a number to remember."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project is run from its folder, not installed

from common.packages import missing_packages_told

if __name__ == "__main__":
    with missing_packages_told():
        from evaluation.demo import main

        main()
