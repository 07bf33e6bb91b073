"""Merge a LoRA adapter (a folder as PEFT writes it) into its base model: a Hugging Face folder like any other.

  python scripts/merge_lora.py --checkpoint_dir checkpoints/llama3-8b --adapter my_adapter --out checkpoints/my_llama3
  python generate.py --checkpoint_path checkpoints/my_llama3 --prompt ...

The folder appears whole or not at all. An adapter's own tokenizer is taken, where it brings one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.options import Parser
from common.errors import printable
from common.files import require_there
from common.program import importing, program


def main(argv: Sequence[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("merge_lora.py", description=__doc__, formatter_class=form)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="the base model's Hugging Face folder")
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, empty or not there")
    with program("merge_lora.py", "interrupted: nothing is written"):
        args = parser.parse(sys.argv[1:] if argv is None else argv)
        require_there(args.checkpoint_dir)
        with importing():
            from checkpoint.lora import merge
        print(printable(str(merge(args.checkpoint_dir, args.adapter, args.out))))
