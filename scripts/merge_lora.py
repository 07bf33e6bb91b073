"""Merge a LoRA adapter into its base model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project is run from its folder, not installed

from common.program import start

if __name__ == "__main__":
    start("cli.merge_lora")
