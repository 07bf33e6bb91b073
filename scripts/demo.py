"""The three caches side by side, on a CPU, in a minute: a story that each continues, and a number to remember."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project is run from its folder, not installed

from common.program import start

if __name__ == "__main__":
    start("evaluation.demo")
