"""Generate text from a Llama checkpoint, with the KV cache of your choice.

  python generate.py --prompt "Once upon a time"                       the full cache, the bundled model
  python generate.py --prompt "..." compress_kv --window_size 256      sink + window, the middle dropped
  python generate.py --prompt "..." quantize_kv --window_size 32       sink + window exact, the middle int8
  python generate.py --prompt "..." quantize_kv --bits 4               the middle in 4 bits
  python generate.py --prompt "..." --weights int4                     the weights in 4 bits
  torchrun --standalone --nproc_per_node 2 generate.py ...             one model on two GPUs
  python generate.py --checkpoint_path DIR --chat --interactive        an instruct model, turn by turn

Text goes to standard output, everything else to standard error. Options may stand before or after the
subcommand. A subcommand is a cache class (kv_cache.py); its flags are that class's fields.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # importing takes its time, in which a Ctrl-C has nothing to report
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.flags import add_saving_flags, check_flags
from cli.options import Parser, add_cache_flags, add_plugin_flag, load_plugin, parse_size, positive
from common.packages import missing_packages_reported
from common.phases import mark
from common.program import importing, program
from engine import gpu_start
from engine.link import linked
from engine.settings import PREFILL_CHUNK
from selective_kv.settings import BITS, FullSettings, known_settings
from weights.setting import weights_help


def make_parser() -> Parser:
    p = Parser("generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.allow_abbrev = False
    names = sorted(known_settings())
    p.add_argument("cache", nargs="?", default=FullSettings.name, choices=names, help="default: full")
    g = p.add_argument_group("model")
    g.add_argument(
        "--checkpoint_path", type=Path, metavar="PATH",
        help="a Hugging Face folder, a GGUF file or a gpt-fast model.pth (default: the bundled small model)",
    )  # fmt: skip
    g.add_argument("--model", metavar="NAME", help="the model's shape, where the checkpoint does not tell it")
    g.add_argument("--random_weights", action="store_true", help="the shape of --model with no checkpoint")
    g.add_argument("--weights", metavar="SETTING", help=weights_help("16"))
    g.add_argument("--dtype", default="auto", help="bfloat16, float16, float32 or auto (default)")
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto (default)")
    g = p.add_argument_group("prompts")
    g.add_argument(
        "--prompt", action="append", default=[],
        help="text to continue, - for standard input, or a number N for N random tokens; more than once for a batch",
    )  # fmt: skip
    g.add_argument(
        "--prompt_file", type=Path, metavar="FILE", help='a prompt a line, or JSONL with "prompt"; -: standard input'
    )
    g.add_argument("--num_samples", type=positive, default=1, help="continuations of each prompt (default: 1)")
    g.add_argument("--interactive", action="store_true", help="a conversation, kept in the cache")
    g.add_argument(
        "--chat", action="store_true",
        help="prompts are a user's turns, and are written as the checkpoint's own chat template says",
    )  # fmt: skip
    g.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told before the first turn")
    g.add_argument(
        "--template_vars", metavar="JSON",
        help="""with --chat: what the template is to know, such as '{"enable_thinking": false}' for Qwen 3""",
    )  # fmt: skip
    g.add_argument("--echo", action=argparse.BooleanOptionalAction, default=True, help="print the prompt too")
    g = p.add_argument_group("generation")
    g.add_argument("--max_new_tokens", type=positive, default=200, help="(default: 200)")
    g.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8)")
    g.add_argument("--top_k", type=int, default=200, help="0: no limit (default: 200)")
    g.add_argument("--top_p", type=float, default=1.0, help="1: no limit (default: 1)")
    g.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="(default: 1234); the same prompt gets the same tokens, alone or in a batch",
    )
    g.add_argument("--ignore_eos", action="store_true", help="go on past the model's end tokens")
    add_saving_flags(p)
    g = p.add_argument_group("memory and reports")
    g.add_argument("--context", type=positive, metavar="N", help="room in the cache for --interactive")
    g.add_argument(
        "--prefill_chunk", type=positive, default=PREFILL_CHUNK, metavar="N",
        help=f"prompt tokens read at once: less memory, and later chunks see the earlier ones as the "
        f"cache holds them (default: {PREFILL_CHUNK})",
    )  # fmt: skip
    g.add_argument(
        "--bits", choices=(*map(str, BITS), "auto"),
        help="of quantize_kv: --k_bits and --v_bits at once; auto takes the most that --memory_budget allows",
    )  # fmt: skip
    g.add_argument(
        "--memory_budget", type=parse_size, metavar="SIZE",
        help="20GiB, say, for weights, cache and activations: more is refused (default: what is free)",
    )  # fmt: skip
    g.add_argument("--dry_run", action="store_true", help="print the memory plan and stop")
    g.add_argument(
        "--world_size", type=positive, metavar="N",
        help="ranks that share the model: to plan for, with --dry_run; under torchrun, another number is refused",
    )  # fmt: skip
    g.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="the report as JSON: standard output's last line, or FILE",
    )  # fmt: skip
    g.add_argument("--profile", metavar="NAME", help="write a profile of the run to outputs/NAME/")
    g.add_argument("--reference", action="store_true", help="the slow reference attention, to compare with")
    add_plugin_flag(g)
    add_cache_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    # What an interrupted run took it has told already.
    with linked("generate.py") as link, program("generate.py", "", ranks=True):
        load_plugin(argv)
        for i, word in enumerate(argv[:-1]):  # "--json quantize_kv": the subcommand, not a file of that name
            if word == "--json" and argv[i + 1] in known_settings():
                argv[i] = "--json=-"
        args = make_parser().parse(argv)
        args.argv = argv
        check_flags(args)
        if not args.dry_run:
            gpu_start.begin(args.device, None if link is None else link.local_rank)
        with importing():  # torch, above all: whoever made a mistake, or asked for help, has not waited for it
            from cli.run import chosen_policy, prepare, run
        mark("imports")
        run(prepare(args, chosen_policy(args), link), link)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with missing_packages_reported():
        main()
