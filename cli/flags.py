"""What can be said of generate.py's flags by themselves: mistakes that are told before torch is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cli.options import knobs_from, require_weights
from common.choices import require_device, require_dtype
from common.errors import UserError
from common.files import require_there
from engine.settings import SamplingSettings
from selective_kv.settings import SelectiveSettings
from weights.setting import parse_weights


def add_saving_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("a prompt that is read once")
    g.add_argument(
        "--save_cache", type=Path, metavar="FILE",
        help="keep the cache there when the prompts have been read, or at the end of a conversation",
    )  # fmt: skip
    g.add_argument(
        "--load_cache", type=Path, metavar="FILE",
        help="start from it, and read only what the prompt adds; without --prompt, go on with the saved text",
    )  # fmt: skip


def chosen_knobs(args: argparse.Namespace) -> dict[str, Any]:
    """The cache's knobs as the command line has them, `--bits` taken for both `--k_bits` and `--v_bits`. Raises
    UserError.
    """
    if args.bits is None:
        return knobs_from(args)
    if args.cache != SelectiveSettings.name:
        raise UserError(f"--bits is a flag of {SelectiveSettings.name}, and the cache is {args.cache}")
    if args.k_bits is not None or args.v_bits is not None:
        raise UserError("--bits says both --k_bits and --v_bits: give it or them")
    bits = {} if args.bits == "auto" else dict.fromkeys(("k_bits", "v_bits"), args.bits)
    return knobs_from(args) | bits


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of how tokens are chosen, by name."""
    return {
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed,
        "samples": args.num_samples,
    }  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError where a value is none that a flag takes, flags do not go together, or a path leads nowhere."""
    chosen_knobs(args)
    SamplingSettings(**sampling_of(args))
    if args.interactive and (args.prompt_file is not None or args.num_samples > 1):
        raise UserError(
            "--interactive takes its turns from standard input and --prompt: no --prompt_file, no --num_samples"
        )
    if args.context is not None and not args.interactive:
        raise UserError("--context is the room of a conversation: it goes with --interactive")
    if args.random_weights and (args.model is None or args.checkpoint_path is not None):
        raise UserError("--random_weights needs --model NAME, and no --checkpoint_path")
    require_weights(args)
    for flag, value in (("--system", args.system), ("--template_vars", args.template_vars)):
        if value is not None and not args.chat:
            raise UserError(f"{flag} goes with --chat")
    if args.weights is not None:
        parse_weights(args.weights)
    require_dtype(args.dtype)
    require_device(args.device)
    if args.checkpoint_path is not None:
        require_there(args.checkpoint_path)
    if args.load_cache is not None and not args.load_cache.exists():
        raise UserError(f"{args.load_cache}: no such file")
    if args.prompt_file is not None and str(args.prompt_file) != "-" and not args.prompt_file.exists():
        raise UserError(f"--prompt_file {args.prompt_file}: No such file or directory")
