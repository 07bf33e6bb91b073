"""Short prompts read together: the tokens of several in one row, each with a cache of its own.

A matrix product takes hardly longer for 2,000 tokens than for 100. So what is left of prompts after their whole chunks
is packed into one row: products, norms and RoPE see the row, attention sees each sequence by itself. A prompt's chunks,
and what they see, are the same as if it were read alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kv_cache import ModelCache
from model import Rope
from selective_kv import Chunk, KVCache

PACK_TOKENS = 2048  # of prompts read together: with more a token takes no less (0.050 s for 2,048, 0.207 for 8,192)


class PromptPart(NamedTuple):
    """Some tokens of one prompt, read at once."""

    row: int  # the sequence
    start: int  # the position of the first
    n_token: int


def packs(starts: Sequence[int], ends: Sequence[int], chunk: int, most: int = PACK_TOKENS) -> list[list[PromptPart]]:
    """How prompts are read: what is read at once, in order. A prompt's chunks are those that it would have alone.

    starts, ends: of each sequence, the positions that are to be read. Whole chunks, and what is longer than `most`,
    are read alone.
    """
    alone: list[list[PromptPart]] = []
    rest: list[list[PromptPart]] = []
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for first in range(start, end, chunk):
            part = PromptPart(row, first, min(chunk, end - first))
            room = min(chunk, most) - (sum(p.n_token for p in rest[-1]) if rest else 0)
            if part.n_token == chunk or part.n_token > most:
                alone.append([part])
            elif rest and part.n_token <= room:
                rest[-1].append(part)
            else:
                rest.append([part])
    return alone + rest


def most_at_once(lengths: Iterable[int], chunk: int) -> int:
    """The most tokens that are read at once of prompts of these lengths, whole or together."""
    lengths = list(lengths)
    return min(chunk, max(max(lengths), min(PACK_TOKENS, sum(lengths))))


@dataclass
class PackedStep:
    """positions: int64 [1, token], of all parts one after the other."""

    positions: Tensor
    chunks: list[tuple[slice, Chunk]]  # where each part is, and what its cache is told
    ropes: list[Rope]


class PackedLayer:
    """One layer's cache, as the model sees it."""

    def __init__(self, layer: KVCache) -> None:
        self.layer = layer

    @property
    def attends_to_last(self) -> bool:
        return self.layer.attends_to_last

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: PackedStep, rope: Rope) -> Tensor:
        """q: [1, n_head, token, head_dim], of all tokens or of each part's last; k, v: of all. Returns like q."""
        if not step.ropes:
            step.ropes = [rope.part(tokens) for tokens, _ in step.chunks]
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        every = q.shape[2] == k.shape[2]
        for i, ((tokens, chunk), own) in enumerate(zip(step.chunks, step.ropes, strict=True)):
            queries = tokens if every else slice(i, i + 1)
            out[:, :, queries] = self.layer.attend(q[:, :, queries], k[:, :, tokens], v[:, :, tokens], chunk, own)
        return out


class PackedCache:
    """Parts of several sequences, none of them twice, as the one sequence that the model reads (`model.Cache`)."""

    def __init__(self, cache: ModelCache, parts: Sequence[PromptPart]) -> None:
        self.cache, self.parts = cache, parts
        self.layers = [PackedLayer(layer) for layer in cache.layers]
        device = cache.lengths.device
        self.rows = torch.tensor([p.row for p in parts], device=device)
        self.counts = torch.tensor([p.n_token for p in parts], device=device)
        self.last = self.counts.cumsum(0) - 1  # where each part's last token is, int64 [part]

    def begin(self, n_token: int) -> PackedStep:
        """Raises ValueError where a part does not fit."""
        assert n_token == sum(p.n_token for p in self.parts)
        for part in self.parts:
            self.cache.check_room(part.start + part.n_token)
        positions = torch.cat([torch.arange(p.start, p.start + p.n_token) for p in self.parts])[None]
        positions = positions.to(self.cache.lengths.device)
        chunks, first = [], 0
        for part in self.parts:
            tokens = slice(first, first + part.n_token)
            # A single token is read as a decode step, whose chunk has no `start`.
            start = part.start if part.n_token > 1 else None
            chunks.append((tokens, Chunk(positions[:, tokens], self.cache.row + part.row, start)))
            first += part.n_token
        return PackedStep(positions, chunks, [])

    def advance(self, step: PackedStep) -> None:
        self.cache.lengths.index_add_(0, self.rows, self.counts)


def read_once(prompts: Sequence[Sequence[int]], starts: Sequence[int], cache: ModelCache) -> list[int]:
    """For each prompt the sequence that it is read into: that of the first prompt with the same tokens, from which it
    is copied, or its own. It is its own if its sequence holds something already, or if the cache cannot be copied: it
    has no `storage`, or does not say what it `sees` and may keep more than that.
    """
    first: dict[tuple[int, ...], int] = {}
    copied = all(layer.storage() is not None and layer.sees() is not None for layer in cache.layers)
    return [
        first.setdefault(tuple(prompt), row) if copied and start == 0 and prompt else row
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True))
    ]


def copy_sequences(cache: ModelCache, sources: Sequence[int]) -> None:
    """Copy to each sequence what its source holds. A source must not come after its sequence."""
    rows = [row for row, source in enumerate(sources) if row != source]
    if not rows:
        return
    source = torch.tensor([sources[row] for row in rows], device=cache.lengths.device)
    cache.lengths[rows] = cache.lengths[source]
    for layer in cache.layers:
        for tensor in layer.storage() or []:
            for row in rows:  # one at a time: indexing would make a copy of all of them first
                tensor[cache.row + row] = tensor[cache.row + sources[row]]
