"""What goes in and out of the command line: prompts, streamed text, messages, the JSON report."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from common.files import TOO_DEEP, read_stream
from common.messages import say
from tokenizer import StreamDecoder, Tokenizer


def read_prompts(args: argparse.Namespace, pipe: bool = True) -> list[str]:
    """The texts that --prompt and --prompt_file give; where there is neither, what is piped in. Raises UserError.

    pipe: whether standard input is to be read; where it is not, some text stands for what comes through it.
    """
    stdin = args.prompt.count("-") + (str(args.prompt_file) == "-")
    if stdin and args.interactive:
        raise UserError("--interactive takes its turns from standard input, so no prompt can be read from there")
    if stdin > 1:
        raise UserError("standard input (-) can be read once")
    if not pipe and stdin:
        return ["-"]
    prompts = [piped_prompt("--prompt -") if prompt == "-" else prompt for prompt in args.prompt]
    if pipe and not prompts and args.prompt_file is None and not args.interactive and not args.random_weights:
        if (text := piped_text()).strip():
            prompts = [text]
        elif _is_pipe(sys.stdin):  # whatever should have written there has failed, perhaps
            say("standard input is empty, so there is no prompt from it")
    if args.prompt_file is not None:
        try:
            data = (
                sys.stdin.buffer.read()
                if str(args.prompt_file) == "-"
                else read_stream(args.prompt_file, LARGEST_PROMPTS)
            )
            text = data.decode("utf-8").removeprefix("\ufeff")
        except (OSError, UserError) as error:
            raise UserError(f"--prompt_file {getattr(error, 'strerror', None) or error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt_file {args.prompt_file}: not UTF-8 at byte {error.start}") from None
        lines = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not lines:
            raise UserError(f"--prompt_file {args.prompt_file}: no prompt in it")
        for n, line in lines:
            prompts.append(_json_prompt(args.prompt_file, n, line) if line.lstrip().startswith("{") else line)
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("--prompt is empty")
        if any(0xDC80 <= ord(c) <= 0xDCFF for c in prompt):  # how Python hands over stray bytes
            raise UserError("--prompt is not UTF-8")
    return prompts


def piped_text() -> str:
    """What comes in through a pipe or a file, as in `echo ... | generate.py`; "" from a terminal. Raises UserError."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return ""
    try:
        if _is_pipe(sys.stdin):
            say("reading the prompt from standard input (--prompt TEXT gives it otherwise)")
        return sys.stdin.buffer.read().decode("utf-8").removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 at byte {error.start}") from None
    except (OSError, ValueError):  # a stream that is no file, or one that nobody gave
        return ""


def _is_pipe(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # a stream that is no file, as in a notebook
        return False


def piped_prompt(flag: str) -> str:
    """All of standard input, for a flag whose value is -; from a terminal until Ctrl-D. Raises UserError if empty."""
    text = sys.stdin.read().removesuffix("\n") if sys.stdin.isatty() else piped_text()
    if not text.strip():
        raise UserError(f"{flag}: standard input is empty")
    return text


def _json_prompt(path: Path, n: int, line: str) -> str:
    try:
        prompt = json.loads(line.strip())["prompt"]
    except RecursionError:
        raise UserError(f"{path}, line {n}: {TOO_DEEP}") from None
    except (ValueError, KeyError):
        raise UserError(f'{path}, line {n}: not a JSON object with "prompt"') from None
    if not isinstance(prompt, str):
        raise UserError(f'{path}, line {n}: "prompt" is not text')
    return prompt


def encode_prompt(prompt: str, tokenizer: Tokenizer | None, n_vocab: int, seed: int, model: str) -> list[int]:
    """The prompt's token ids; for a number, as many random ones, as in gpt-fast. model: its name, for errors."""
    if prompt.isdecimal():
        if len(prompt) > 9 or int(prompt) > MOST_RANDOM:
            raise UserError(f"--prompt {prompt[:20]}: at most {MOST_RANDOM:,} random tokens")
        if int(prompt) < 1:
            raise UserError("--prompt 0 asks for no tokens")
        import torch  # not above: prompts are read, and mistakes in them told, before it is imported

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(n_vocab, (int(prompt),), generator=generator).tolist()
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer: give --prompt a number of tokens")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError(f"--prompt {prompt!r} is no token at all for this model's tokenizer")
    return ids


LARGEST_PROMPTS = 1 << 28  # bytes of a --prompt_file: a hundred times the longest context
MOST_RANDOM = 1 << 24  # tokens of a made-up prompt


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


def shown(argv: Sequence[str]) -> list[str]:
    """A command line as records show it: files without their folders, flags in full, so that it can be repeated."""
    parts = [word.partition("=") if word.startswith("--") else ("", "", word) for word in argv]
    return [flag + equals + (Path(value).name if "/" in value else value) for flag, equals, value in parts]
