"""A sweep over caches, sinks and windows: one task per setting, one JSON line per task, in outputs/NAME/.

  python scripts/sweep.py --name frontier --kind perplexity --caches quantize_kv compress_kv \
      --sinks 4 16 --windows 32 256 -- --text my.txt --context 8192
  python scripts/sweep.py --name speed --kind speed -- --prompt 4000 --max_new_tokens 64

KIND is one of evaluate.py's, or `speed` (generate.py's report). What stands behind `--` goes to that program.
A task whose result is there is skipped; one that fails or was killed is not done, is tried again by the next
call, and makes this one exit with 1 after the others have run. Programs write their results in one step,
so a killed sweep goes on where it was, and tasks may run at the same time (sweep.sbatch: `--count`, `--index`).
What the full cache gives, with which every setting is compared, is computed once and kept until all tasks are done.
A result is this sweep's where its command is, and what it was made from: weights, texts, dtype and device.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import NoReturn

from cli.options import Parser, add_plugin_flag, load_plugin, require_name
from common.errors import UserError
from common.program import importing, program
from evaluation.flags import KEEP_FULL
from evaluation.tables import PRINTERS
from selective_kv.settings import known_settings


class SweepParser(Parser):
    """A parser that says of unknown flags where flags for the tasks' program stand."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unknown argument"):
            message += "; flags for evaluate.py, or for generate.py where the kind is speed, stand behind --"
        super().error(message)


def require_free(args: argparse.Namespace) -> None:
    """Raises UserError where what stands behind `--` sets what the sweep itself sets: the last of two would win."""
    taken = {"--caches", "--json", "--plugin", KEEP_FULL}
    if args.kind == "speed":
        knobs = {f.name for cls in known_settings().values() for f in dataclasses.fields(cls)} | {"bits"}
        taken |= {f"--{name}" for name in knobs} | {f"--no-{name}" for name in knobs}
    for word in args.rest:
        if word.partition("=")[0] in taken:
            raise UserError(f"{word.partition('=')[0]} behind --: the sweep sets it, from what stands before")


def make_parser() -> Parser:
    p = SweepParser("sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", required=True, help="results go to outputs/NAME/")
    p.add_argument("--kind", choices=(*PRINTERS, "speed"), default="divergence")
    p.add_argument(
        "--caches", nargs="+", default=["quantize_kv", "compress_kv"], metavar="CACHE",
        help="a name, or one with knobs: quantize_kv:k_bits=4,v_bits=4",
    )  # fmt: skip
    add_plugin_flag(p)
    p.add_argument("--sinks", nargs="+", default=["4", "16"])
    p.add_argument("--windows", nargs="+", default=["32", "128"])
    p.add_argument("--outputs", type=Path, default=Path("outputs"))
    p.add_argument("--count", action="store_true", help="print the number of tasks and stop")
    p.add_argument("--index", type=int, metavar="N", help="run task N alone, counted from 0")
    return p


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    with program("sweep.py", "interrupted: the same command goes on from here"):
        load_plugin(argv[:cut])
        args = make_parser().parse(argv[:cut])
        args.rest = argv[cut + 1 :]
        require_name(args.name, "--name")
        require_free(args)
        with importing():
            from evaluation.sweep import run
        run(args)
