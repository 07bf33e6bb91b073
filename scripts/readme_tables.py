"""README.md's tables of figures, from the result files: python scripts/readme_tables.py [--check]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project is run from its folder, not installed

from common.program import start

if __name__ == "__main__":
    start("plots.readme_tables")
