"""What goes in and out of the command line: prompts, streamed text, messages, the JSON report."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch

from cli.conversation import Conversation, Turn
from cli.saving import Transcript
from common.errors import UserError
from common.files import TOO_DEEP, read_stream
from common.messages import say
from common.program import first_interrupt_noted
from engine import Engine, Timing
from engine.parallel import Parallel
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
        prompts = [text] if (text := piped_text()).strip() else []
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


def _is_pipe(stream: TextIO) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # a stream that is no file, as in a notebook
        return False


def piped_prompt(flag: str) -> str:
    """Standard input, which was asked for: until Ctrl-D where it is a terminal. Raises UserError where it is empty."""
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
    """Token ids; a number makes that many random ones, as gpt-fast does. model: how an error names it."""
    if prompt.isdecimal():
        if len(prompt) > 9 or int(prompt) > MOST_RANDOM:
            raise UserError(f"--prompt {prompt[:20]}: at most {MOST_RANDOM:,} random tokens")
        if int(prompt) < 1:
            raise UserError("--prompt 0 asks for no tokens")
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
    """A command line as a record shows it: files by their names alone, flags whole, so that it can be repeated."""
    parts = [word.partition("=") if word.startswith("--") else ("", "", word) for word in argv]
    return [flag + equals + (Path(value).name if "/" in value else value) for flag, equals, value in parts]


def read_line() -> str:
    """The user's next line; "" at the end."""
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def next_turn(
    chat: Conversation, ranks: Parallel | None, text: str, reply: str, pending: Sequence[int], end_ids: frozenset[int]
) -> Turn:
    """`Conversation.turn`, which of several ranks the first alone asks: a template may look at the clock, and has a
    time limit. Raises UserError, everywhere.
    """
    if ranks is None:
        return chat.turn(text, reply, pending, end_ids)
    mine: list[Turn] = []

    def take() -> tuple[list[int], bool]:
        mine.append(chat.turn(text, reply, pending, end_ids))
        return mine[0].ids, mine[0].anew

    ids, anew = ranks.from_first(take)
    return mine[0] if mine else Turn(ids, anew, chat)


def converse(
    engine: Engine, tokenizer: Tokenizer, transcript: Transcript, given: Sequence[str], n_new: int
) -> Iterator[tuple[Timing, str]]:
    """A line in, a continuation of at most n_new tokens out; the cache keeps it all, and each turn reads only what is
    new to it, unless a chat's template now writes the earlier ones in another way.

    transcript: the conversation so far, which is kept up to date; given: the first lines, before those of standard
    input. Yields what each turn took, and what was written. Of several ranks the first reads standard input and makes
    the ids of a turn.
    """
    endless, capacity, ranks = engine.cache.endless, engine.cache.shape.capacity, engine.ranks
    say("Type a line; /reset forgets, Ctrl-D ends.")
    told = False
    first = iter(given)
    while True:
        text = next(first, None)
        if text is None:
            text = read_line() if ranks is None else ranks.from_first(read_line)
            if not text:
                return
        text = text.strip("\n")
        if text == "/reset":
            engine.reset()
            transcript.forget()
        if not text.strip() or text == "/reset":
            continue
        chat, n_seen = transcript.chat, len(transcript.ids)
        after, held = chat, n_seen
        try:
            if chat is not None:
                turn = next_turn(chat, ranks, text, transcript.reply, transcript.pending, engine.end_ids)
                ids, after = turn.ids, turn.after
                held = 0 if turn.anew else n_seen
            else:
                ids = transcript.pending + tokenizer.encode(text, bos=n_seen == 0)
        except UserError as error:  # of this line: the conversation goes on
            say(f"not read: {error}")
            continue
        if not ids:
            say("not read: the line is no token at all for this model's tokenizer")
            continue
        room = n_new if endless else capacity - held - len(ids) + 1
        if room < 1:
            say(f"no room: that is {1 - room} tokens past the context of {capacity}; /reset starts anew")
            continue
        if held < n_seen:
            if not told:
                say("(the chat template writes earlier turns in another way than they were: each turn reads all anew)")
            told = True
            engine.reset()
        transcript.chat, transcript.ids = after, transcript.ids[:held]
        printer = Printer(tokenizer, [ids], echo=False)
        written: list[int] = []
        transcript.whole = False
        try:
            # An answer stops between two steps, so that the cache is whole. Of several ranks the others would go on:
            # there a Ctrl-C ends the conversation.
            with first_interrupt_noted(engine.ranks is None) as stopped:
                for row in engine.generate([ids], min(n_new, room)):
                    printer.push(row, engine.end_ids)
                    written += [token for token in row if token is not None]
                    if stopped:
                        break
        except KeyboardInterrupt:
            yield engine.timing, printer.texts[0]  # what was done of this turn belongs to the report
            raise
        printer.finish()
        if stopped:
            say("(stopped; Ctrl-C at the prompt, or Ctrl-D, ends the conversation)")
        transcript.ids.extend(ids + written[:-1])
        transcript.pending, transcript.reply, transcript.whole = written[-1:], printer.texts[0], True
        yield engine.timing, transcript.reply
