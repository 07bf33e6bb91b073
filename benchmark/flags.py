"""How fast each cache decodes, and in how much memory: caches x batch x context, in one process.

  python scripts/benchmark.py                                              the bundled model, this machine
  python scripts/benchmark.py --random_weights --model llama-3.1-8b --batch 1 8 --context 256 8192 32768
  python scripts/benchmark.py --random_weights --model llama-3.1-8b --weights 16 int8 int4   weights beside each other
  python scripts/benchmark.py --peer transformers                          its caches beside ours
  python scripts/benchmark.py --first_token --context 8192 32768           how long prompts take to read
  python scripts/benchmark.py --shapes 1x131072 8x32768                    just these batches and contexts
  python scripts/benchmark.py --kernels                                    one layer's decode attention alone
  python scripts/benchmark.py --largest_batch --context 8000               how many sequences fit
  torchrun --standalone --nproc_per_node 2 scripts/benchmark.py ...        one model on two GPUs

A gate comes first: each cache's fast path must agree with its slow reference, or nothing is timed. The
caches are then filled to the context, and their decode steps timed in turn (A B C A B C ...), over every
setting of `--weights` as far as the device holds them together, so that a drift of the machine touches all
alike. Reported per cache: the median step over the rounds and its spread, tokens/s, cache bytes, the share
of the measured read ceiling that weights + cache bytes come to, on a GPU the peak memory it would take
alone with the weights, and, over the contexts, the slope of a step's latency and from where on it is no
slower than the first.

Filling writes random values instead of reading a prompt: the time of a step does not depend on them.
`--prefill` reads a real (random) prompt of the context's length instead, and reports how long that took
and the share of it that went into storing keys and values (quantising them, where a cache does).
`--first_token` times nothing but that: each cache in turn, after its kernels have been compiled and planned
by reading the prompt with the model's first layers.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cli.options import (
    MOST_SEQUENCES,
    Parser,
    add_plugin_flag,
    at_most,
    check_cache_names,
    load_plugin,
    parse_shape,
    parse_size,
    positive,
    require_weights,
)
from common.choices import require_device, require_dtype
from common.errors import UserError
from common.files import require_there
from common.packages import require
from common.program import importing, program
from engine import gpu_start
from engine.link import linked
from engine.settings import SUMS
from weights.setting import parse_weights, weights_help

# Before torch loads OpenMP: threads that spin long while they wait take the processor from whoever else needs it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

DEFAULT_CACHES = [
    "full",
    "compress_kv:sink_size=16,window_size=32",
    "quantize_kv:sink_size=16,window_size=32",
]
DEFAULT_STEPS = 16


def make_parser() -> Parser:
    p = Parser(
        "benchmark.py", stray="--caches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--checkpoint_path", type=Path)
    p.add_argument("--model", metavar="NAME")
    p.add_argument("--random_weights", action="store_true")
    p.add_argument("--weights", nargs="+", metavar="SETTING", help=f"one, or several in turn; {weights_help('16')}")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument(
        "--caches", nargs="+", metavar="CACHE", help=f"the first is the base (default: {' '.join(DEFAULT_CACHES)})"
    )
    add_plugin_flag(p)
    p.add_argument("--batch", nargs="+", type=at_most(MOST_SEQUENCES), help="(default: 1)")
    p.add_argument("--context", nargs="+", type=positive, help="(default: 256 2048 8000)")
    p.add_argument(
        "--shapes", nargs="+", type=parse_shape, metavar="BATCHxCONTEXT",
        help="instead of every --batch at every --context, just these: 1x131072 8x32768",
    )  # fmt: skip
    p.add_argument(
        "--load_cache", nargs="+", type=Path, metavar="FILE", default=[],
        help="time the caches that generate.py --save_cache wrote, as long as they are",
    )  # fmt: skip
    p.add_argument("--steps", type=positive, help=f"decode steps timed at a time (default: {DEFAULT_STEPS})")
    p.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    p.add_argument(
        "--each_step", type=positive, default=0, metavar="N",
        help="then time N steps one by one, a batch's sequences closing their tiles in turn: mean and longest are told",
    )  # fmt: skip
    p.add_argument("--prefill", action="store_true", help="read a prompt instead of filling with random values")
    p.add_argument("--first_token", action="store_true", help="time the reading of prompts, and no decoding")
    p.add_argument("--peer", choices=("transformers",), help="run its dynamic and quantised caches beside ours")
    p.add_argument("--sums", choices=SUMS, default="auto", help="of several ranks: how a step's sums go between them")
    p.add_argument("--kernels", action="store_true", help="decode attention of one layer alone, beside SDPA's")
    p.add_argument("--largest_batch", action="store_true", help="instead of --batch, as many sequences as fit")
    p.add_argument("--memory_budget", type=parse_size, metavar="SIZE", help="--largest_batch may take this much in all")
    p.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line with everything, for each --weights")
    p.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="draw latency and tokens/s against the context: a PNG, and an SVG beside it",
    )
    return p


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError about what the flags say by themselves."""
    if args.random_weights and args.model is None:
        raise UserError("--random_weights needs --model NAME")
    others = args.peer or args.largest_batch or args.png or args.prefill or args.steps or args.each_step
    if args.first_token and (others or args.load_cache or args.kernels):
        raise UserError("--first_token goes with the model, --caches, --batch, --context, --rounds and --json alone")
    others = others or args.caches
    if args.kernels and (others or args.weights or args.dtype != "auto"):
        raise UserError("--kernels goes with the model, --device, --batch, --context, --rounds and --json alone")
    if args.memory_budget and not args.largest_batch:
        raise UserError("--memory_budget goes with --largest_batch")
    if args.largest_batch and (args.peer or args.prefill or args.png or args.each_step or args.batch):
        raise UserError("--largest_batch does not go with --batch, --peer, --prefill, --png or --each_step")
    if len(args.weights or ()) > 1 and (args.largest_batch or args.peer or args.png):
        raise UserError("several settings of --weights do not go with --largest_batch, --peer or --png")
    if args.png:
        if args.png.suffix != ".png":  # else the pictures, a PNG and an SVG, would have another name than was asked for
            raise UserError(f"--png {args.png}: the name must end in .png (an SVG goes beside it)")
        require("matplotlib", "--png")
    if args.peer:
        require("transformers", "--peer")
    if args.shapes and (args.batch or args.context or args.largest_batch):
        raise UserError("--shapes goes instead of --batch and --context, and without --largest_batch")
    require_weights(args)
    check_cache_names(args.caches or ())
    settings = [parse_weights(text) for text in args.weights or ()]
    if len(set(settings)) < len(settings):
        raise UserError("--weights names a setting twice")
    require_dtype(args.dtype)
    require_device(args.device)
    if args.checkpoint_path is not None:
        require_there(args.checkpoint_path)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with linked("benchmark.py") as link, program("benchmark.py", "interrupted: nothing is written", ranks=True):
        load_plugin(argv)
        args = make_parser().parse(argv)
        check_flags(args)
        gpu_start.begin(args.device, None if link is None else link.local_rank)
        with importing():
            from benchmark.command import run
        run(args, argv, link)
