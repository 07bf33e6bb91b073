"""Turn a Hugging Face folder into gpt-fast's model.pth, which gpt-fast and generate.py both read.

  python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/Meta-Llama-3-8B --out checkpoints/llama3-8b

generate.py needs no conversion; this is for sharing a checkpoint with gpt-fast. q, k and v are fused and
their rows interleaved for gpt-fast's RoPE; all else is copied from a memory map straight into the file,
so the memory taken is that of q, k and v alone. Biases and q/k norms, which gpt-fast does not have, keep
to its naming. The config and the tokenizer go beside model.pth, which appears last and whole, and the folder must
hold none of another checkpoint's.
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
    parser = Parser("convert_hf_checkpoint.py", description=__doc__, formatter_class=form)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="the Hugging Face folder")
    parser.add_argument("--out", type=Path, help="the folder to write to (default: the same)")
    parser.add_argument("--model_name", metavar="NAME", help="the shape, where there is no config.json")
    with program("convert_hf_checkpoint.py", "interrupted: nothing is converted"):
        args = parser.parse(sys.argv[1:] if argv is None else argv)
        require_there(args.checkpoint_dir)
        with importing():
            from checkpoint.convert import convert
        file = convert(args.checkpoint_dir, args.out or args.checkpoint_dir, args.model_name)
        print(f"{printable(str(file))}: {file.stat().st_size / 2**30:.2f} GiB")
