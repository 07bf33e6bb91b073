"""Train the bundled checkpoint: a small Llama with 8,192 tokens of context that uses them."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project is run from its folder, not installed

from common.packages import missing_packages_told

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with missing_packages_told():
        from training.command import main

        main()
