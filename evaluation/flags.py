"""What each cache costs in quality, through the cache: perplexity, divergence, passkeys, RULER, ROUGE-L.

  python scripts/evaluate.py perplexity --text val_books.txt.xz --context 8192 --windows 8
  python scripts/evaluate.py divergence --text my.txt --caches quantize_kv:sink_size=16,window_size=32
  python scripts/evaluate.py passkey --lengths 1024 8192 --trials 4
  python scripts/evaluate.py ruler --lengths 1024 4096 --trials 10 --tasks niah_single vt
  python scripts/evaluate.py rouge --text stories.jsonl --context 8192

The full cache is always the reference, and always run. Texts are scored as token-by-token decoding would
leave the cache (scoring.py: the exact parallel form, or `--sequential`). Without a text the model writes
one with the full cache, whose entropy the same run tells. A table goes to standard output; with
`--json FILE` a record with everything needed to repeat it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path

from cli.options import Parser, add_plugin_flag, at_most, check_cache_names, load_plugin, positive
from common.choices import require_device, require_dtype
from common.errors import UserError
from common.files import require_there
from common.program import importing, program
from engine import gpu_start
from evaluation.ruler_tasks import TASKS

# Before torch loads OpenMP: threads that spin long while they wait take the processor from whoever else needs it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

CACHES = [
    "quantize_kv:sink_size=16,window_size=32",
    "quantize_kv:sink_size=4,window_size=256",
    "compress_kv:sink_size=16,window_size=32",
    "compress_kv:sink_size=4,window_size=256",
]
CACHES_HELP = (
    "beside the full cache: a name, and knobs after a colon, as in quantize_kv:window_size=128,k_bits=4,v_bits=4 "
    f"(default: {' '.join(CACHES)})"
)
KEEP_FULL = "--keep_full"
MOST_TRIALS = 10_000  # a cell: all prompts are made before the first is read
SCORED = ("perplexity", "divergence")  # kinds that compare with a reference, token by token
SETTINGS = {  # what a record names of the command line, defaults included
    "perplexity": ("context", "windows", "sequential", "batch"),
    "divergence": ("context", "windows", "sequential", "batch"),
    "passkey": ("lengths", "depths", "trials", "batch"),
    "ruler": ("lengths", "tasks", "trials", "chat", "batch"),
    "rouge": ("context", "documents", "max_new_tokens", "batch"),
}
USED_BY = {"load_cache": SCORED, "reference_path": SCORED, "text": (*SCORED, "passkey", "rouge")} | {
    name: tuple(kind for kind, names in SETTINGS.items() if name in names)
    for name in itertools.chain.from_iterable(SETTINGS.values())
}  # by which kinds a flag is used, where not by all


def make_parser() -> Parser:
    p = Parser("evaluate.py", stray="--text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=tuple(SETTINGS))
    p.add_argument("--checkpoint_path", type=Path, help="(default: the bundled model)")
    p.add_argument("--model", metavar="NAME")
    p.add_argument(
        "--weights", metavar="SETTING",
        help="as for generate.py; perplexity and divergence compare with the full cache and weights as they are",
    )  # fmt: skip
    p.add_argument(
        "--reference_path", type=Path, metavar="CHECKPOINT",
        help="perplexity, divergence: compare with its full cache, as where a GGUF has these weights in fewer bits",
    )  # fmt: skip
    p.add_argument("--dtype", default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument("--caches", nargs="+", default=CACHES, metavar="CACHE", help=CACHES_HELP)
    add_plugin_flag(p)
    p.add_argument("--text", type=Path, nargs="+", default=[], help="plain or .xz; passkey: filler; rouge: JSONL")
    p.add_argument("--context", type=positive, default=2048, help="tokens of a window (default: 2048)")
    p.add_argument("--windows", type=positive, default=4, help="windows of each text, evenly spread (default: 4)")
    p.add_argument(
        "--batch", type=positive, default=1,
        help="windows, passkeys, samples or documents that the model reads together: faster on a GPU (default: 1)",
    )  # fmt: skip
    p.add_argument("--sequential", action="store_true", help="token by token through the cache: slow, the same")
    p.add_argument(
        "--load_cache", type=Path, metavar="FILE",
        help="perplexity, divergence: texts are scored after the one that this full cache of generate.py's holds",
    )  # fmt: skip
    p.add_argument("--lengths", nargs="+", type=positive, default=[1024, 2048, 4096])
    p.add_argument("--depths", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    p.add_argument(
        "--trials", type=at_most(MOST_TRIALS), default=4, help="passkeys or RULER samples a cell (default: 4)"
    )
    p.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"RULER's: {', '.join(TASKS)}")
    p.add_argument("--chat", action="store_true", help="RULER's prompts as a user's turn, by the checkpoint's template")
    p.add_argument("--documents", type=positive, default=25, help="rouge: how many (default: 25)")
    p.add_argument("--max_new_tokens", type=positive, default=128, help="rouge: of a summary (default: 128)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    p.add_argument(
        KEEP_FULL, type=Path, metavar="FOLDER",
        help="keep there what the full cache gives, for other runs over the same, and take it from there",
    )  # fmt: skip
    return p


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError about what the flags say by themselves."""
    if any(not 0 <= depth <= 1 for depth in args.depths):
        raise UserError("--depths lie between 0 and 1")
    if args.kind in SCORED and args.context < 2:
        raise UserError("--context 1: the first token has no score")
    if args.model is not None and args.checkpoint_path is None:
        raise UserError(f"--model {args.model} is a shape, and its weights are evaluated: give --checkpoint_path")
    for name, kinds in USED_BY.items():
        if args.kind not in kinds and getattr(args, name) != make_parser().get_default(name):
            raise UserError(f"--{name} goes with {' and '.join(kinds)}, not {args.kind}")
    if args.kind in ("passkey", "rouge") and len(args.text) > 1:
        raise UserError(f"{args.kind} takes one --text")
    check_cache_names(args.caches)
    require_dtype(args.dtype)
    require_device(args.device)
    for path in (args.checkpoint_path, args.reference_path):
        if path is not None:
            require_there(path)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with program("evaluate.py", "interrupted; with --json FILE, what was done is in FILE's .unfinished.json"):
        load_plugin(argv)
        args = make_parser().parse(argv)
        check_flags(args)
        gpu_start.begin(args.device)
        with importing():
            from evaluation.command import run
        run(args, argv)
