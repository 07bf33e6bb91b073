"""The command line of train_demo.py: its options, and what can be told wrong with them before any text is read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from cli.options import Parser, positive
from common.errors import UserError
from common.files import is_special
from model import Config
from training import data as demo_data

SHORT = 2048  # tokens of a sequence in the first part of the training
BATCH_TOKENS = 262_144
CPU_BATCH_TOKENS = 2048  # seconds a step, where the other takes minutes
TRIALS = 50
CPU_TRIALS = 2  # 88 prompts of up to 8k tokens are minutes' work too


def number(what: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: a finite number that `fits`; `what` is how a mistake's line calls it."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


above_zero = number("a number above zero", lambda x: x > 0)
not_negative = number("a number of zero or more", lambda x: x >= 0)
share = number("a share from 0 to 1", lambda x: 0 <= x <= 1)
below_one = number("a share from 0 to below 1", lambda x: 0 <= x < 1)


def seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:  # what every generator takes
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 999,999,999")
    return int(text)


def make_parser(description: str | None) -> Parser:
    p = Parser("train_demo.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, nargs="+", required=True, help="training text, plain or .xz")
    p.add_argument("--extra", type=Path, nargs="*", default=[], help="more text, read --extra_passes times a pass")
    p.add_argument("--extra_passes", type=positive, default=1)
    p.add_argument("--val", type=Path, required=True, help="held-out text")
    p.add_argument("--export", type=Path, required=True, help="the folder that the checkpoint is written to")
    p.add_argument("--state", type=Path, default=Path("outputs/train_demo.pt"), help="where a run is kept")
    p.add_argument("--resume", action="store_true", help="go on from --state")
    p.add_argument("--init", type=Path, metavar="FOLDER", help="start from an exported checkpoint")
    p.add_argument("--tokenizer", type=Path, help="a SentencePiece model, instead of training one")
    p.add_argument("--minutes", type=above_zero, default=9.0, help="of training (default: 9)")
    p.add_argument("--max_steps", type=positive, help="stop after so many steps, as if interrupted")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:N or mps")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(default: on a GPU)")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--lr", type=above_zero, default=4e-3)
    p.add_argument(
        "--weight_decay", type=not_negative, default=0.6,
        help="of matrices; many passes over little text want much: what is learnt is forgotten in "
        "1 / (lr * weight_decay) steps, and the text's details before its rules (default: 0.6)",
    )  # fmt: skip
    p.add_argument(
        "--embedding_decay", type=not_negative, default=0.1, help="the same, of the embeddings (default: 0.1)"
    )
    p.add_argument("--dropout", type=below_one, default=0.1, help="while training; for many passes too (default: 0.1)")
    p.add_argument("--short_share", type=share, default=0.6, help=f"of the time, on {SHORT} tokens (default: 0.6)")
    p.add_argument(
        "--batch_tokens", type=positive,
        help=f"of one step, and one sequence at least (default: {BATCH_TOKENS:,}; on a CPU {CPU_BATCH_TOKENS:,})",
    )  # fmt: skip
    p.add_argument(
        "--part_tokens", type=positive, default=65_536,
        help="of one forward and backward pass; never more than --batch_tokens (default: 65,536)",
    )  # fmt: skip
    p.add_argument("--vocab_size", type=positive, default=4096)
    p.add_argument("--dim", type=positive, default=256)
    p.add_argument("--n_layer", type=positive, default=10)
    p.add_argument("--n_head", type=positive, default=4)
    p.add_argument("--n_kv_head", type=positive, default=2)
    p.add_argument("--ffn_dim", type=positive, default=672)
    p.add_argument("--context", type=positive, default=8192)
    p.add_argument("--rope_theta", type=above_zero, default=500_000.0)
    p.add_argument(
        "--trials", type=positive,
        help=f"passkeys a cell in the final scores (default: {TRIALS}; on a CPU {CPU_TRIALS})",
    )  # fmt: skip
    return p


def settle(args: argparse.Namespace, device: torch.device) -> None:
    """Set the options whose default hangs on the device."""
    on_cpu = device.type == "cpu"
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.batch_tokens is None:
        args.batch_tokens = CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS
    if args.trials is None:
        args.trials = CPU_TRIALS if on_cpu else TRIALS
    args.part_tokens = min(args.part_tokens, args.batch_tokens)


def shape_of(args: argparse.Namespace, vocab_size: int) -> Config:
    """Raises UserError where the options make no model."""
    if args.dim % args.n_head:
        raise UserError(f"--dim {args.dim} is not a multiple of --n_head {args.n_head}")
    try:
        return Config(
            vocab_size, args.dim, args.n_layer, args.n_head, args.n_kv_head, args.ffn_dim, args.context,
            rope_theta=args.rope_theta, tied_embeddings=True,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be told before any text is read."""
    for path in [*args.text, *args.extra, args.val]:
        if not path.exists():
            raise UserError(f"{path}: no such file")
    if args.context < demo_data.LEAST_CONTEXT:
        raise UserError(f"--context {args.context}: passkeys and copies take {demo_data.LEAST_CONTEXT} tokens at least")
    if args.vocab_size > demo_data.MOST_PIECES:
        raise UserError(f"--vocab_size {args.vocab_size}: {demo_data.MOST_PIECES} at most, since an id has 16 bits")
    shape_of(args, args.vocab_size)
    if args.init and args.tokenizer:
        raise UserError("--init brings its own tokenizer: no --tokenizer with it")
    if args.resume and not args.state.exists():
        raise UserError(f"--resume: there is no {args.state} to go on from (--state names it)")
    if is_special(args.state):  # it would be replaced by a file
        raise UserError(f"--state {args.state}: not a file")
