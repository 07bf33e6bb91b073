"""Generate text from a Llama checkpoint, with the KV cache of your choice.

  python generate.py --prompt "Once upon a time"                       the full cache, the bundled model
  python generate.py --prompt "..." compress_kv --window_size 256      sink + window, the middle dropped
  python generate.py --prompt "..." quantize_kv --window_size 32       sink + window exact, the middle int8

Text goes to standard output, everything else to standard error. Options may stand before or after the
subcommand. A subcommand is a cache class (kv_cache.py); its flags are that class's fields.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint import (
    Checkpoint,
    check_tokenizer,
    find_demo,
    load_model,
    open_checkpoint,
    parse_device,
    parse_dtype,
)
from engine import PREFILL_CHUNK, Engine, Sampling
from kv_cache import FullCache, KVCache, ModelCache, Shape, caches
from options import Parser, add_cache_flags, load_plugin, policy_from, positive
from profiling import Profiler
from report import device_memory, make_plan, make_report, report_lines, require_fit
from tokenizer import StreamDecoder, Tokenizer, UserError, load_tokenizer


def make_parser() -> Parser:
    p = Parser("generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.allow_abbrev = False
    p.add_argument("cache", nargs="?", default=FullCache.name, choices=sorted(caches()), help="default: full")
    g = p.add_argument_group("model")
    g.add_argument(
        "--checkpoint_path", type=Path, metavar="PATH",
        help="a gpt-fast model.pth or a Hugging Face folder (default: the bundled small model)",
    )  # fmt: skip
    g.add_argument("--model", metavar="NAME", help="the model's shape, where the checkpoint does not tell it")
    g.add_argument("--random_weights", action="store_true", help="the shape of --model with no checkpoint")
    g.add_argument("--dtype", default="auto", help="bfloat16, float16, float32 or auto (default)")
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto (default)")
    g = p.add_argument_group("prompts")
    g.add_argument(
        "--prompt", action="append", default=[],
        help="text to continue, or a number N for N random tokens; more than once for a batch",
    )  # fmt: skip
    g.add_argument("--prompt_file", type=Path, metavar="FILE", help='a prompt a line, or JSONL with "prompt"')
    g.add_argument("--num_samples", type=positive, default=1, help="continuations of each prompt (default: 1)")
    g.add_argument("--interactive", action="store_true", help="a conversation, kept in the cache")
    g.add_argument("--echo", action=argparse.BooleanOptionalAction, default=True, help="print the prompt too")
    g = p.add_argument_group("generation")
    g.add_argument("--max_new_tokens", type=positive, default=200, help="(default: 200)")
    g.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8)")
    g.add_argument("--top_k", type=int, default=200, help="0: no limit (default: 200)")
    g.add_argument("--top_p", type=float, default=1.0, help="1: no limit (default: 1)")
    g.add_argument("--seed", type=int, default=1234, help="(default: 1234)")
    g.add_argument("--ignore_eos", action="store_true", help="go on past the model's end tokens")
    g = p.add_argument_group("memory and reports")
    g.add_argument("--context", type=positive, metavar="N", help="room in the cache for --interactive")
    g.add_argument(
        "--prefill_chunk", type=positive, default=PREFILL_CHUNK, metavar="N",
        help=f"prompt tokens read at once: less memory, and later chunks see the earlier ones as the "
        f"cache holds them (default: {PREFILL_CHUNK})",
    )  # fmt: skip
    g.add_argument("--dry_run", action="store_true", help="print the memory plan and stop")
    g.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="the report as JSON: standard output's last line, or FILE",
    )  # fmt: skip
    g.add_argument("--profile", metavar="NAME", help="write a profile of the run to outputs/NAME/")
    g.add_argument("--reference", action="store_true", help="the slow reference attention, to compare with")
    g.add_argument("--plugin", type=Path, metavar="FILE", help="a Python file that defines caches of your own")
    add_cache_flags(p)
    return p


def say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            text = args.prompt_file.read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"--prompt_file {args.prompt_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt_file {args.prompt_file}: not UTF-8 at byte {error.start}") from None
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not lines:
            raise UserError(f"--prompt_file {args.prompt_file}: no prompt in it")
        for n, line in lines:
            prompts.append(_json_prompt(args.prompt_file, n, line) if line.startswith("{") else line)
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("--prompt is empty")
        if any(0xDC80 <= ord(c) <= 0xDCFF for c in prompt):  # how Python hands over stray bytes
            raise UserError("--prompt is not UTF-8")
    return prompts


def _json_prompt(path: Path, n: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError):
        raise UserError(f'{path}, line {n}: not a JSON object with "prompt"') from None
    if not isinstance(prompt, str):
        raise UserError(f'{path}, line {n}: "prompt" is not text')
    return prompt


def encode_prompt(prompt: str, tokenizer: Tokenizer | None, n_vocab: int, seed: int) -> list[int]:
    """Token ids; a number makes that many random ones, as gpt-fast does."""
    if prompt.isdecimal():
        if int(prompt) < 1:
            raise UserError("--prompt 0 asks for no tokens")
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(n_vocab, (int(prompt),), generator=generator).tolist()
    if tokenizer is None:
        raise UserError("random weights have no tokenizer: give --prompt a number of tokens")
    return tokenizer.encode(prompt)


class Printer:
    """Text to standard output in the prompts' order: the first unfinished sequence streams."""

    def __init__(self, tokenizer: Tokenizer | None, prompts: list[list[int]], echo: bool) -> None:
        self.decoders = [StreamDecoder(tokenizer) if tokenizer else None for _ in prompts]
        self.ended = [False] * len(prompts)
        self.texts = ["" for _ in prompts]  # without the prompt
        self.waiting = ["" for _ in prompts]
        self.current = 0
        for b, (decoder, prompt) in enumerate(zip(self.decoders, prompts, strict=True)):
            if decoder is not None:
                before = "".join(decoder.push(token) for token in prompt)
                self.waiting[b] = before if echo else ""

    def push(self, row: Iterable[int | None], end_ids: frozenset[int]) -> None:
        for b, token in enumerate(row):
            decoder = self.decoders[b]
            if token is None or self.ended[b]:
                continue
            if token in end_ids:
                self._end(b)
            elif decoder is not None:
                self._add(b, decoder.push(token))
        self._print()

    def finish(self) -> None:
        for b in range(len(self.ended)):
            self._end(b)
        self._print()

    def _add(self, b: int, text: str) -> None:
        self.texts[b] += text
        self.waiting[b] += text

    def _end(self, b: int) -> None:
        decoder = self.decoders[b]
        if not self.ended[b]:
            self._add(b, decoder.flush() if decoder is not None else "")
            self.waiting[b] += "\n"
            self.ended[b] = True

    def _print(self) -> None:
        while self.current < len(self.ended):
            if self.decoders[self.current] is not None:
                print(self.waiting[self.current], end="", flush=True)
            self.waiting[self.current] = ""
            if not self.ended[self.current]:
                return
            self.current += 1


def converse(engine: Engine, tokenizer: Tokenizer, args: argparse.Namespace, reports: list[Any]) -> list[int]:
    """A line in, a continuation out; the cache keeps it all. Returns the conversation's length."""
    say("Type a line; /reset forgets, Ctrl-D ends.")
    pending: list[int] = []  # the last token written, which the cache has not read yet
    n_seen = 0
    prompts = iter(args.prompt)
    while True:
        text = next(prompts, None)
        if text is None:
            say("> ")
            text = sys.stdin.readline()
            if not text:
                return [n_seen]
            text = text.rstrip("\n")
        if text == "/reset":
            engine.reset()
            pending, n_seen = [], 0
            continue
        if not text.strip():
            continue
        ids = pending + tokenizer.encode(text, bos=n_seen == 0)
        room = engine.cache.shape.capacity - n_seen - len(ids) + 1
        if room < 1 and not engine.cache.policy.endless:
            raise UserError(f"the conversation is {1 - room} tokens past the context: /reset, or a larger --context")
        n_new = args.max_new_tokens if engine.cache.policy.endless else min(args.max_new_tokens, room)
        printer = Printer(tokenizer, [ids], echo=False)
        n_written = 0
        for row in engine.generate([ids], n_new):
            printer.push(row, engine.end_ids)
            pending = [t for t in row if t is not None]
            n_written += 1
        printer.finish()
        n_seen += len(ids) + n_written - 1
        reports.append(engine.timing)


def write_json(target: str, report: dict[str, Any]) -> None:
    if target == "-":
        print(json.dumps(report))
        return
    path = Path(target)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        raise UserError(f"--json {target}: {error.strerror}") from None


def find_checkpoint(args: argparse.Namespace) -> Checkpoint:
    if args.random_weights:
        if args.model is None or args.checkpoint_path is not None:
            raise UserError("--random_weights needs --model NAME, and no --checkpoint_path")
        return open_checkpoint(None, args.model)
    return open_checkpoint(args.checkpoint_path or find_demo(), args.model)


def context_of(policy: KVCache, checkpoint: Checkpoint, args: argparse.Namespace, longest: int) -> tuple[int, int]:
    """Tokens of room that each sequence needs, and new tokens to write."""
    context, n_new = checkpoint.config.context, args.max_new_tokens
    if policy.n_exact > context:
        raise UserError(
            f"--sink_size + --window_size is {policy.n_exact}, {policy.n_exact - context} past the model's "
            f"context of {context}"
        )
    if args.interactive:
        return min(args.context or context, context) if not policy.endless else args.context or context, n_new
    if policy.endless:
        return longest + n_new, n_new
    if longest > context:
        raise UserError(
            f"the prompt has {longest} tokens, {longest - context} more than the model's context of {context} "
            f"(compress_kv can read on: it keeps only a window)"
        )
    if longest + n_new - 1 > context:
        n_new = context - longest + 1
        say(f"writing {n_new} tokens, not {args.max_new_tokens}: the model's context is {context}")
    return longest + n_new, n_new


def run(args: argparse.Namespace, policy: KVCache) -> None:
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    texts = read_prompts(args)
    if not texts and not args.interactive:
        texts = ["Once upon a time"] if not args.random_weights else ["16"]
    device = parse_device(args.device)
    checkpoint = find_checkpoint(args)
    dtype = parse_dtype(args.dtype, checkpoint, device)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path) if checkpoint.tokenizer_path else None
    if tokenizer is not None:
        check_tokenizer(checkpoint.config, tokenizer)
    if args.interactive and tokenizer is None:
        raise UserError("--interactive needs a checkpoint with a tokenizer")
    ids = [encode_prompt(text, tokenizer, checkpoint.config.vocab_size, args.seed) for text in texts]
    prompts = [p for p in ids for _ in range(args.num_samples)]
    longest = max(map(len, prompts), default=0)
    capacity, n_new = context_of(policy, checkpoint, args, longest)
    batch = 1 if args.interactive else len(prompts)
    config = checkpoint.config
    shape = Shape(batch, config.n_kv_head, config.head_dim, capacity, dtype, device)
    chunk = min(args.prefill_chunk, capacity if args.interactive else longest)
    if args.dry_run:
        print("\n".join(make_plan(config, policy, shape, chunk).lines()))
    require_fit(config, policy, shape, chunk, device_memory(device))
    if args.dry_run:
        return

    model = load_model(checkpoint, device, dtype, random_weights=args.random_weights, seed=args.seed)
    cache = ModelCache(policy, config.n_layer, shape)
    if args.reference:
        for layer in cache.layers:
            layer.use_reference()
    end_ids = (
        frozenset() if args.ignore_eos or tokenizer is None else frozenset(checkpoint.eos_ids or tokenizer.eos_ids)
    )
    profiler = Profiler(args.profile, device) if args.profile else None
    engine = Engine(
        model, cache, sampling, end_ids, args.prefill_chunk, lag=0 if args.interactive else -1,
        hook=profiler.hook if profiler else None,
    )  # fmt: skip
    path = f"{cache.layers[0].path}, {engine.step_path}"

    timings: list[Any] = []
    lengths: list[int] = []
    printer = Printer(tokenizer, prompts, args.echo and not all(t.isdecimal() for t in texts))
    interrupted = False
    try:
        if args.interactive:
            assert tokenizer is not None
            lengths = converse(engine, tokenizer, args, timings)
        else:
            for row in engine.generate(prompts, n_new):
                printer.push(row, end_ids)
            printer.finish()
    except KeyboardInterrupt:
        interrupted = True
        print()
    if not args.interactive:
        done = engine.timing.n_written // batch
        lengths = [len(p) + max(0, done - 1) for p in prompts]
    report = make_report(model, checkpoint.name, cache, engine.timing, lengths, path)
    if not args.interactive:
        report["texts"] = printer.texts
    report["command"] = ["generate.py", *args.argv]
    say("", *report_lines(report))
    if profiler is not None:
        say(*profiler.write(report))
    if args.json:
        write_json(args.json, report)
    if interrupted:
        sys.exit(130)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        load_plugin(argv)
        args = make_parser().parse(argv)
        args.argv = argv
        run(args, policy_from(args))
    except UserError as error:
        say(f"generate.py: error: {error}")
        sys.exit(2)
    except BrokenPipeError:  # the reader of the pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
