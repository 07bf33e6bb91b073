"""transformers' generate() with its own caches and with ours, eager and compiled."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project is run from its folder, not installed

from benchmark.transformers_generate import main

if __name__ == "__main__":
    main()
