"""Write a checkpoint in 8 or 4 bits: it loads at the speed of its own size, and no weight is quantised again.

  python quantize.py --checkpoint_path checkpoints/llama3-8b --weights int4 --out checkpoints/llama3-8b-int4
  python generate.py --checkpoint_path checkpoints/llama3-8b-int4 --prompt "Once upon a time"

The tokenizer's files are copied. The memory taken is that of what is written and one tensor in full.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint import Checkpoint, load_model, open_checkpoint, parse_device
from checkpoint.quantised import write_quantised
from cli.options import Parser
from common.errors import UserError
from common.messages import size
from common.program import program
from model import Transformer
from quantize import WeightSetting, parse_weights, weights_help


def make_parser() -> Parser:
    parser = Parser("quantize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, required=True, metavar="PATH", help="as for generate.py")
    parser.add_argument("--model", metavar="NAME", help="the shape, where the checkpoint does not tell it")
    parser.add_argument("--weights", default="int4", metavar="SETTING", help=weights_help("int4"))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--device", default="auto", help="where to quantise: cpu, cuda, cuda:N or auto (default)")
    return parser


def quantise(source: Path, model: str | None, weights: WeightSetting, out: Path, device: torch.device) -> Path:
    """Write `source` in fewer bits to the folder `out`; returns the file of the weights. Raises UserError."""
    checkpoint = open_checkpoint(source, model)
    if checkpoint.weights is not None:
        raise UserError(f"{source}: quantised already, to {checkpoint.weights}")
    tokenizer = checkpoint.tokenizer_path
    if checkpoint.gguf is not None and tokenizer is None:
        raise UserError(
            f"{source}: its tokenizer is inside the GGUF file, and cannot be written beside the weights: put a "
            "tokenizer.json beside the file, or quantise while loading (generate.py --weights)"
        )
    folder = None if tokenizer is None else tokenizer.parent
    if folder is not None and folder.name == "original":
        folder = folder.parent
    if folder is not None and folder.resolve() == out.resolve():
        raise UserError(f"--out {out}: the folder that the weights come from")

    def load() -> Transformer:
        dtype = checkpoint.dtype if checkpoint.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        return load_model(checkpoint, device, dtype, progress=progress, weights=weights, to_run=False)

    return write_quantised(out, checkpoint.name, weights, checkpoint.eos_ids, folder, load)


def progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done / total:4.0%}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    return sum(fill.stored.numel * fill.stored.dtype.itemsize for fill in checkpoint.fills)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    with program("quantize.py", "interrupted: nothing is written"):
        args = parser.parse(sys.argv[1:] if argv is None else argv)
        began = time.perf_counter()
        weights = parse_weights(args.weights)
        if weights is None:
            raise UserError(f"--weights {args.weights}: give int8 or int4")
        file = quantise(args.checkpoint_path, args.model, weights, args.out, parse_device(args.device))
        before = checkpoint_bytes(open_checkpoint(args.checkpoint_path, args.model))
        after, seconds = file.stat().st_size, time.perf_counter() - began
        print(f"{file}: {weights}, {size(after)}, {after / before:.0%} of {size(before)}, {seconds:.1f} s")
