"""Sums over ranks of a prompt's long chunk, beside its products.

A chunk of 8,192 tokens has two sums a layer of 67 MB, which an all-reduce takes 0.2 ms for on two H100s, and every rank
then adds and norms all rows: 0.3 ms a sum, a tenth of the time to the first token. Instead

    1. each rank copies what it has of another's rows into that one's memory (`send`);
    2. a rank adds up its own rows, norms them (`add`) and copies the result into everybody's memory;
    3. who needs the norm of all rows waits for it (`normed`).

Copies are the copy engines': they take no SM from a product, and nothing is ever asked for from afar. The chunk's
tokens are in parts, so that one part's copies go beside the other's products. Behind a copy, in its stream, a flag
is written, the number of the sum: a fence comes before it. Received rows have two places, by whether that number is
odd: whoever sends number e + 2 has added up e + 1, of which every rank's part was sent after e had been read. Normed
rows have one: whoever writes number e + 1 has everybody's part of it, which was made of the norm before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from selective_kv.kernels.launch import driver

N_PART = 2
# Tokens x dim x dim of a rank: what a layer's products are made of. Less is done before the host has launched it all.
# (The 8B shape on two GPUs, by the backend and so: 4,096 tokens 63 and 79 ms, 8,192 tokens 121 and 112: LOG.md)
LONG = 3072 * 4096**2
SENT, NORMED = 0, 1  # kinds of flags
LINE = 128  # bytes that each of a memory's tensors begins at a multiple of


def share(n: int, rank: int, size: int) -> slice:
    """Of n rows, those that a rank adds up."""
    return slice(rank * n // size, (rank + 1) * n // size)


def sender(rank: int, receiver: int) -> int:
    """Where a rank is among the others of a receiver, in their order."""
    return rank - (rank > receiver)


@dataclass
class Memory:
    """What one rank is written into.

    received: [odd or even, part, size - 1, most rows, dim], of the other ranks in their order; normed: [token, dim],
    of a whole chunk; flags: int32 [kind, part, odd or even, at least size - 1], the numbers of sums.
    """

    received: Tensor
    normed: Tensor
    flags: Tensor

    @classmethod
    def in_bytes(cls, memory: Tensor, size: int, n_token: int, dim: int, dtype: torch.dtype) -> Memory:
        """memory: uint8, of `n_byte`."""
        found, first = [], 0
        for shape, kind in _tensors(size, n_token, dim, dtype):
            n = shape.numel() * kind.itemsize
            found.append(memory[first : first + n].view(kind).view(shape))
            first += -(-n // LINE) * LINE
        return cls(*found)


def _tensors(size: int, n_token: int, dim: int, dtype: torch.dtype) -> list[tuple[torch.Size, torch.dtype]]:
    half = -(-n_token // N_PART)
    return [
        (torch.Size((2, N_PART, size - 1, -(-half // size), dim)), dtype),
        (torch.Size((n_token, dim)), dtype),
        (torch.Size((2, N_PART, 2, -(-(size - 1) // 4) * 4)), torch.int32),  # each part's at a multiple of 16 bytes
    ]


def by_rows(n_token: int, dim: int, size: int) -> bool:
    """Whether a chunk is long enough to be summed so."""
    return n_token >= N_PART and n_token * dim * dim >= LONG * size


def n_byte(size: int, n_token: int, dim: int, dtype: torch.dtype) -> int:
    """Of a rank's `Memory` for chunks of up to n_token tokens."""
    return sum(-(-shape.numel() * kind.itemsize // LINE) * LINE for shape, kind in _tensors(size, n_token, dim, dtype))


class ChunkSums:
    """One rank's sums of a chunk at a time; every rank makes the same calls in the same order.

    memories: of all ranks, in their order, as this one sees them, with flags that are 0 at first.
    """

    def __init__(self, rank: int, memories: Sequence[Memory]) -> None:
        from engine.kernels import chunk_sum

        self.kernel, self.rank, self.memories = chunk_sum, rank, list(memories)
        self.own = self.memories[rank]
        self.device = self.own.normed.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.counts = [0] * N_PART  # sums so far
        self.sent: list[tuple[Tensor, torch.Event | None] | None] = [None] * N_PART
        self.parts: list[slice] = []

    def fits(self, x: Tensor) -> bool:
        """Whether there is memory for a chunk of x, [token, dim]."""
        place = self.own.normed
        return len(x) <= len(place) and x.shape[1:] == place.shape[1:] and x.dtype == place.dtype

    def begin(self, n_token: int) -> ChunkSums:
        """A chunk of so many tokens."""
        assert n_token <= len(self.own.normed)
        half = -(-n_token // N_PART)
        self.parts = [slice(first, min(first + half, n_token)) for first in range(0, n_token, half)]
        assert len(self.parts) > 1
        return self

    def send(self, i: int, y: Tensor) -> None:
        """Begin the sum of part i, of which this rank has y [row, dim], contiguous."""
        self.counts[i] += 1
        size, odd = len(self.memories), self.counts[i] & 1
        with self._beside():
            for far in range(1, size):
                receiver = (self.rank + far) % size
                rows = share(len(y), receiver, size)
                place = sender(self.rank, receiver)
                there = self.memories[receiver]
                self._copy(there.received[odd, i, place, : rows.stop - rows.start], y[rows])
                self._flag(there.flags[SENT, i, odd, place], self.counts[i])
            self.sent[i] = y, None if self.stream is None else self.stream.record_event()

    def add(self, i: int, x: Tensor, norm: Tensor, eps: float) -> None:
        """Add part i's sum to this rank's rows of x, [token, dim] of the whole chunk, in place, and begin to hand round
        their RMSNorm."""
        sent = self.sent[i]
        assert sent is not None
        (y, event), self.sent[i] = sent, None
        size, odd, part = len(self.memories), self.counts[i] & 1, self.parts[i]
        rows = share(len(y), self.rank, size)
        out = self.own.normed[part][rows]
        self.kernel.add_rows(
            x[part][rows], y[rows], self.own.received[odd, i], self.own.flags[SENT, i, odd, : size - 1],
            self.counts[i], norm, eps, out, self.rank,
        )  # fmt: skip
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)  # then y's memory is free
        with self._beside():
            for far in range(1, size):
                receiver = (self.rank + far) % size
                there = self.memories[receiver]
                self._copy(there.normed[part][rows], out)
                self._flag(there.flags[NORMED, i, odd, sender(self.rank, receiver)], self.counts[i])

    def normed(self, i: int) -> Tensor:
        """The RMSNorm of all rows of part i, [row, dim]; until its next `add`."""
        flags = self.own.flags[NORMED, i, self.counts[i] & 1, : len(self.memories) - 1]
        self.kernel.wait(flags, self.counts[i])
        return self.own.normed[self.parts[i]]

    def own_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows of x that this rank adds up, and zeros for others: over ranks their sum is what they are. index: int64
        [row]."""
        own = torch.zeros_like(index, dtype=torch.bool)
        for part in self.parts:
            rows = share(part.stop - part.start, self.rank, len(self.memories))
            own |= (index >= part.start + rows.start) & (index < part.start + rows.stop)
        return torch.where(own[:, None], x[index], 0)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """After what has been launched, and beside what will be."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def _copy(self, out: Tensor, x: Tensor) -> None:
        if not x.is_meta:
            out.copy_(x)

    def _flag(self, flag: Tensor, number: int) -> None:
        """Write a number when all before it in the stream has been written, as everybody sees it."""
        if self.stream is not None:
            library = driver()
            assert library is not None
            status = library.cuStreamWriteValue32_v2(
                ctypes.c_void_p(self.stream.cuda_stream), ctypes.c_uint64(flag.data_ptr()), ctypes.c_uint32(number), 0
            )
            if status:
                raise RuntimeError(f"cuStreamWriteValue32 failed with {status}")
        elif not flag.is_meta:
            flag.fill_(number)
