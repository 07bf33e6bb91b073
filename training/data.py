"""Training text for the bundled checkpoint: a tokenizer, token arrays, and sequences that need the far past.

A small model trained on text alone ignores what is thousands of tokens away, and a cache that forgets it
then looks free. So some sequences hide passkeys in the text and ask for them later, many to a sequence
with a name each, and some repeat a passage thousands of tokens on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import lzma
import queue
import random
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from common.errors import UserError
from common.files import read_stream
from evaluation import passkey
from tokenizer import SentencePieceTokenizer

END = "<|endoftext|>"  # a line of its own between texts; it becomes the end token, never text
ANSWER_WEIGHT = 8.0  # of the loss on a key's digits: they are few among thousands of other tokens
FAR_SHARE = 0.10  # of the sequences need the far past
SHORTEST_COPY = 48  # tokens of a passage that comes back; it takes a quarter of a sequence at most
LEAST_CONTEXT = 4 * (SHORTEST_COPY + 1)
MOST_PIECES = 1 << 16  # ids are kept as uint16
LARGEST_INPUT = 1 << 30  # bytes of a file: texts are held whole, and their tokens
Array = np.ndarray


@dataclass(frozen=True)
class Inputs:
    """What a run is made of: the tokenizer, ids of both texts, and a line for the card on every file given."""

    processor: sentencepiece.SentencePieceProcessor
    tokenizer: bytes
    tokens: Array
    held_out: Array
    files: list[str]


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Raises UserError."""
    files: list[str] = []
    tokenizer, given = b"", args.init / "tokenizer.model" if args.init else args.tokenizer
    if given:
        tokenizer = read_file(given, "tokenizer", files)
        SentencePieceTokenizer(tokenizer, str(given))  # raises UserError where it is none
    if args.init:
        read_file(args.init / "model.safetensors", "weights it began with", files)
    passes = f", {args.extra_passes} times a pass" if args.extra_passes > 1 else ""
    texts = [decode_text(path, read_file(path, "training text", files)) for path in args.text]
    extra = [decode_text(path, read_file(path, f"training text{passes}", files)) for path in args.extra]
    held_out = decode_text(args.val, read_file(args.val, "held-out text", files))
    tokenizer = tokenizer or train_tokenizer(texts + extra, args.vocab_size, args.seed)
    processor = open_tokenizer(tokenizer, str(given or "--vocab_size"))
    tokens = np.concatenate([encode_texts(processor, text) for text in texts + extra * args.extra_passes])
    val = encode_texts(processor, held_out)
    for flag, ids in (("--text", tokens), ("--val", val)):
        if len(ids) < 2 * args.context:
            raise UserError(
                f"{flag}: {len(ids)} tokens are too short a text, and twice --context {args.context} is needed"
            )
    return Inputs(processor, tokenizer, tokens, val, files)


def read_file(path: Path, role: str, files: list[str]) -> bytes:
    """A file's bytes. `files` gains a line that says which file this was, without its folder. Raises UserError."""
    data = read_stream(path, LARGEST_INPUT)
    files.append(f"`{path.name}` ({role}): {len(data):,} bytes, sha256 `{hashlib.sha256(data).hexdigest()}`")
    return data


def decode_text(path: Path, data: bytes) -> str:
    """The text in a file's bytes, plain or .xz. Raises UserError."""
    try:
        if path.suffix == ".xz":
            with lzma.open(io.BytesIO(data)) as file:
                data = file.read(LARGEST_INPUT + 1)
            if len(data) > LARGEST_INPUT:
                raise UserError(f"{path}: more than {LARGEST_INPUT:,} bytes when decompressed")
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()  # any line's end becomes "\n"
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path}: damaged, or not made by xz ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    if not text.replace(END, "").strip():
        raise UserError(f"{path}: an empty text")
    return text


def train_tokenizer(texts: Sequence[str], vocab_size: int, seed: int) -> bytes:
    """A SentencePiece BPE model that gives every string back exactly: byte fallback, digits apart."""
    lines = [line for text in texts for line in text.splitlines() if line and line != END]
    sample = random.Random(seed).sample(lines, min(len(lines), 200_000))
    model = io.BytesIO()
    try:
        _train(sample, model, vocab_size)
    except RuntimeError as error:  # sentencepiece's own message begins with its source's file and line
        raise UserError(f"--vocab_size {vocab_size}: {_reason(str(error))}") from None
    return model.getvalue()


def _reason(message: str) -> str:
    if match := re.search(r"too high .*<= (\d+)", message):
        return f"the text gives {match[1]} pieces at most"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"the text's characters alone are {match[1]} pieces"
    return " ".join(message.rpartition("] ")[2].split()) or "no tokenizer comes of this text"


def _train(lines: Sequence[str], model: io.BytesIO, vocab_size: int) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        required_chars="0123456789",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        character_coverage=0.9999,
        max_sentence_length=20_000,
        minloglevel=2,
    )


def open_tokenizer(data: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """Raises UserError, which begins with `name`, where texts and passkeys cannot be told with these pieces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    if processor.vocab_size() > MOST_PIECES:
        raise UserError(f"{name}: {processor.vocab_size()} pieces, and an id has 16 bits")
    if min(processor.bos_id(), processor.eos_id()) < 0:
        raise UserError(f"{name}: no token that begins or none that ends a text")
    if processor.piece_to_id("\n") == processor.unk_id():
        raise UserError(f"{name}: no piece for a line's end; train_demo.py makes one that has it")
    try:
        for color, thing in itertools.product(passkey.COLORS, passkey.THINGS):
            passkey.answer(processor.encode, f"{color} {thing}", "12345")
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return processor


def encode_texts(processor: sentencepiece.SentencePieceProcessor, text: str) -> Array:
    """uint16 ids of a file's texts, each between a beginning and an end token."""
    parts: list[Array] = []
    newline = processor.piece_to_id("\n")
    for document in text.split(END + "\n"):
        if not document.strip():
            continue
        ids = [processor.bos_id()]
        for line in processor.encode(document.strip("\n").split("\n"), num_threads=-1):
            ids += line
            ids.append(newline)
        ids[-1] = processor.eos_id()
        parts.append(np.array(ids, dtype=np.uint16))
    return np.concatenate(parts)


def token_bytes(processor: sentencepiece.SentencePieceProcessor) -> Array:
    """int64 [vocab_size]: how many bytes of text each id stands for."""
    sizes = []
    for i in range(processor.vocab_size()):
        if processor.is_control(i) or processor.is_unknown(i):
            sizes.append(0)
        elif processor.is_byte(i):
            sizes.append(1)
        else:
            sizes.append(len(processor.id_to_piece(i).replace("\u2581", " ").encode()))
    return np.array(sizes, dtype=np.int64)


class FarSequences:
    """Sequences that can only be predicted from the far past. All of `length` tokens, with a loss weight each."""

    def __init__(self, tokens: Array, processor: sentencepiece.SentencePieceProcessor, length: int, seed: int) -> None:
        self.tokens, self.length = tokens, length
        self.encode = processor.encode
        self.rng = random.Random(seed)

    def filler(self, n: int) -> Array:
        start = self.rng.randrange(len(self.tokens) - n)
        return self.tokens[start : start + n]

    def passkeys(self) -> tuple[Array, Array]:
        """Several named keys hidden anywhere, each asked for once or twice anywhere later."""
        rng = self.rng
        n_key = rng.choice((1, 1, 2, 4, 8, 12))
        names = [f"{c} {t}" for c in passkey.COLORS for t in passkey.THINGS]
        events: list[tuple[float, list[int], list[int]]] = []  # where, ids, the answer at their end
        for name in rng.sample(names, n_key):
            key = f"{rng.randrange(10_000, 100_000)}"
            at = rng.random()
            events.append((at, self.encode(passkey.needle(name, key)), []))
            for _ in range(rng.choice((1, 1, 2))):
                asked = self.encode(passkey.question(name))
                later = 1.0 if rng.random() < 0.3 else rng.uniform(at, 1)
                events.append((later, asked, passkey.answer(self.encode, name, key)))
        events.sort(key=lambda event: event[0])
        n_event = sum(len(ids) + len(reply) for _, ids, reply in events)
        n_filler = max(0, self.length - n_event)
        filler = self.filler(self.length)
        pieces: list[Array] = []
        weights: list[Array] = []
        used = 0
        for at, ids, reply in events:
            upto = max(used, int(at * n_filler))
            pieces += [filler[used:upto], np.array([*ids, *reply], dtype=np.uint16)]
            weights += [np.ones(upto - used + len(ids)), np.full(len(reply), ANSWER_WEIGHT)]
            used = upto
        pieces.append(filler[used:])
        weights.append(np.ones(len(filler) - used))
        return np.concatenate(pieces)[: self.length], np.concatenate(weights)[: self.length]

    def copies(self) -> tuple[Array, Array]:
        """A passage that comes back, anywhere later."""
        ids = self.filler(self.length).copy()
        n = self.rng.randrange(SHORTEST_COPY, min(256, self.length // 4))
        source = self.rng.randrange(0, self.length - 2 * n)
        target = self.rng.randrange(source + n, self.length - n)
        ids[target : target + n] = ids[source : source + n]
        return ids, np.ones(self.length)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        while True:
            yield self.copies() if self.rng.random() < 0.2 else self.passkeys()


class Batches:
    """Batches [rows, length + 1] of ids and weights, made in a thread: text in a new order every pass.

    A context: leaving it ends the thread. What fails in the thread is raised here, by `next` or at the end.
    """

    def __init__(self, tokens: Array, processor: Any, rows: int, length: int, seed: int) -> None:
        self.tokens, self.rows, self.length = tokens, rows, length
        self.rng = np.random.default_rng(seed)
        self.far = iter(FarSequences(tokens, processor, length + 1, seed))
        self.queue: queue.Queue[tuple[Array, Array]] = queue.Queue(8)
        self.stopped = False
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._fill, daemon=True)

    def __enter__(self) -> Batches:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stopped = True
        self.thread.join()
        if kind is None:  # otherwise that error is on its way already
            self._check()

    def _check(self) -> None:
        if self.failure is not None:
            raise RuntimeError("no batches can be made") from self.failure

    def _starts(self) -> Iterator[int]:
        while True:
            shift = int(self.rng.integers(self.length))
            starts = np.arange(shift, len(self.tokens) - self.length - 1, self.length)
            yield from (int(s) for s in self.rng.permutation(starts))

    def _fill(self) -> None:
        try:
            starts = self._starts()
            while not self.stopped:
                self._put(*self._batch(starts))
        except Exception as error:  # of whatever kind: nobody waits for a thread, so the run's own thread tells it
            self.failure = error

    def _batch(self, starts: Iterator[int]) -> tuple[Array, Array]:
        pairs = [
            next(self.far)
            if self.rng.random() < FAR_SHARE
            else (self.tokens[(s := next(starts)) : s + self.length + 1], np.ones(self.length + 1))
            for _ in range(self.rows)
        ]
        ids, weights = (np.stack(x) for x in zip(*pairs, strict=True))
        return ids.astype(np.int64), weights.astype(np.float32)

    def _put(self, ids: Array, weights: Array) -> None:
        while not self.stopped:
            try:
                self.queue.put((ids, weights), timeout=0.2)
                return
            except queue.Full:
                pass

    def next(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ids, weights = (torch.from_numpy(x) for x in self._get())
        if device.type == "cuda":
            ids, weights = ids.pin_memory(), weights.pin_memory()
        return ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)

    def _get(self) -> tuple[Array, Array]:
        while True:
            self._check()
            try:
                return self.queue.get(timeout=0.2)
            except queue.Empty:
                pass
