"""Training text for the bundled checkpoint: a tokenizer, token arrays, and sequences that need the far past.

A small model trained on text alone ignores what is thousands of tokens away, and a cache that forgets it
then looks free. So some sequences hide passkeys in the text and ask for them later, many to a sequence
with a name each, and some repeat a passage thousands of tokens on.
"""

from __future__ import annotations

import io
import lzma
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import passkey
import sentencepiece
import torch
from torch import Tensor

END = "<|endoftext|>"  # a line of its own between texts; it becomes the end token, never text
ANSWER_WEIGHT = 8.0  # of the loss on a key's digits: they are few among thousands of other tokens
FAR_SHARE = 0.10  # of the sequences need the far past
Array = np.ndarray


def read_text(path: Path) -> str:
    """A text file, plain or .xz."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        return lines.read()


def train_tokenizer(texts: Sequence[str], vocab_size: int, seed: int) -> bytes:
    """A SentencePiece BPE model that gives every string back exactly: byte fallback, digits apart."""
    lines = [line for text in texts for line in text.splitlines() if line and line != END]
    sample = random.Random(seed).sample(lines, min(len(lines), 200_000))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
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
    return model.getvalue()


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
        n = self.rng.randrange(48, min(256, self.length // 4))
        source = self.rng.randrange(0, self.length - 2 * n)
        target = self.rng.randrange(source + n, self.length - n)
        ids[target : target + n] = ids[source : source + n]
        return ids, np.ones(self.length)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        while True:
            yield self.copies() if self.rng.random() < 0.2 else self.passkeys()


class Batches:
    """Batches [rows, length + 1] of ids and weights, made in a thread: text in a new order every pass."""

    def __init__(self, tokens: Array, processor: Any, rows: int, length: int, seed: int) -> None:
        self.tokens, self.rows, self.length = tokens, rows, length
        self.rng = np.random.default_rng(seed)
        self.far = iter(FarSequences(tokens, processor, length + 1, seed))
        self.queue: queue.Queue[tuple[Array, Array]] = queue.Queue(8)
        self.stopped = False
        self.thread = threading.Thread(target=self._fill, daemon=True)
        self.thread.start()

    def _starts(self) -> Iterator[int]:
        while True:
            shift = int(self.rng.integers(self.length))
            starts = np.arange(shift, len(self.tokens) - self.length - 1, self.length)
            yield from (int(s) for s in self.rng.permutation(starts))

    def _fill(self) -> None:
        starts = self._starts()
        while not self.stopped:
            pairs = [
                next(self.far)
                if self.rng.random() < FAR_SHARE
                else (self.tokens[(s := next(starts)) : s + self.length + 1], np.ones(self.length + 1))
                for _ in range(self.rows)
            ]
            ids, weights = (np.stack(x) for x in zip(*pairs, strict=True))
            while not self.stopped:
                try:
                    self.queue.put((ids.astype(np.int64), weights.astype(np.float32)), timeout=0.2)
                    break
                except queue.Full:
                    pass

    def next(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self.thread.is_alive() and self.queue.empty():
            raise RuntimeError("the thread that makes batches has died")
        ids, weights = (torch.from_numpy(x) for x in self.queue.get())
        if device.type == "cuda":
            ids, weights = ids.pin_memory(), weights.pin_memory()
        return ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)

    def stop(self) -> None:
        self.stopped = True
