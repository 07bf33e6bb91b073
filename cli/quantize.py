"""Write a checkpoint in 8 or 4 bits: it loads at the speed of its own size, and no weight is quantised again.

  python quantize.py --checkpoint_path checkpoints/llama3-8b --weights int4 --out checkpoints/llama3-8b-int4
  python generate.py --checkpoint_path checkpoints/llama3-8b-int4 --prompt "Once upon a time"

The tokenizer's files are copied, or a GGUF file's metadata, which holds it. The memory taken is that of what is
written and one tensor in full.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cli.options import Parser
from common.choices import require_device
from common.errors import UserError
from common.files import require_there
from common.messages import size
from common.program import importing, program
from weights.setting import parse_weights, weights_help

# Before torch loads OpenMP: threads that spin while they wait made this take four times as long on a busy processor.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def make_parser() -> Parser:
    parser = Parser("quantize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, required=True, metavar="PATH", help="as for generate.py")
    parser.add_argument("--model", metavar="NAME", help="the shape, where the checkpoint does not tell it")
    parser.add_argument("--weights", default="int4", metavar="SETTING", help=weights_help("int4"))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--device", default="auto", help="where to quantise: cpu, cuda, cuda:N or auto (default)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    with program("quantize.py", "interrupted: nothing is written"):
        args = parser.parse(sys.argv[1:] if argv is None else argv)
        began = time.perf_counter()
        weights = parse_weights(args.weights)
        if weights is None:
            raise UserError(f"--weights {args.weights}: give int8 or int4")
        require_device(args.device)
        require_there(args.checkpoint_path)
        with importing():
            from checkpoint import open_checkpoint, parse_device
            from cli.quantising import checkpoint_bytes, quantise
        file = quantise(args.checkpoint_path, args.model, weights, args.out, parse_device(args.device))
        before = checkpoint_bytes(open_checkpoint(args.checkpoint_path, args.model))
        after, seconds = file.stat().st_size, time.perf_counter() - began
        print(f"{file}: {weights}, {size(after)}, {after / before:.0%} of {size(before)}, {seconds:.1f} s")
