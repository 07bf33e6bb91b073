"""Sums over ranks of a prompt's long chunk, made while its matrix products run.

A chunk of 8,192 tokens of the 8B shape has two sums a layer, of 67 MB each. On two H100s an all-reduce of one takes
0.2 ms, and then every rank adds and norms all rows: 0.3 ms a sum, a tenth of the time to the first token. Here every
row of the chunk has one rank that adds it up (a reduce-scatter, then an all-gather of normed rows):

    1. each rank copies its partial results of another rank's rows into that rank's memory (`send`);
    2. a rank adds up its own rows, norms them and copies the result into all other ranks' memory (`add`);
    3. a product that needs the norm of all rows waits for it (`normed`).

Copy engines make the copies: they take no SM from a product. Ranks only write into each other's memory; to read from
there would take a round trip. The chunk's tokens are in N_PART parts, so that the copies of one part run beside the
products of another.

Behind each copy, in its stream and after a fence, a flag is written: the number of the sum. No rank confirms that it
has read what it was sent; the order of sums makes sure of it. Received rows have two places, for odd and even numbers:
a rank that sends sum e + 2 has added up sum e + 1, and every other rank sent its share of e + 1 after it had read e.
Normed rows have one place: a rank that writes the rows of sum e + 1 has every rank's share of that sum, and those were
products of the normed rows of sum e.
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
# The least work of a rank for a chunk to be summed in this way: tokens x dim x dim / ranks, to which its products are
# proportional. With less, the host takes longer for its launches than the products do. (The 8B shape on two GPUs, by
# NCCL and by rows: 4,096 tokens 63 and 79 ms, 8,192 tokens 121 and 112: LOG.md, 2026-11-26.)
LEAST_WORK = 3072 * 4096**2
SENT, NORMED = 0, 1  # kinds of flags
LINE = 128  # bytes: each tensor of a `Memory` begins at a multiple of it


def share(n: int, rank: int, size: int) -> slice:
    """Of n rows, those that a rank adds up."""
    return slice(rank * n // size, (rank + 1) * n // size)


def sender(rank: int, receiver: int) -> int:
    """The index of rank `rank` among the ranks other than `receiver`, in their order."""
    return rank - (rank > receiver)


@dataclass
class Memory:
    """The memory of one rank that the other ranks write into.

    received: [number of the sum modulo 2, part, size - 1, most rows of a rank, dim], partial results of the other ranks
    in their order; normed: [token, dim], the RMSNorm of all rows of a chunk; flags: int32 [kind, part, number modulo 2,
    at least size - 1], the number of the last sum that each other rank has written.
    """

    received: Tensor
    normed: Tensor
    flags: Tensor

    @classmethod
    def in_bytes(cls, memory: Tensor, size: int, n_token: int, dim: int, dtype: torch.dtype) -> Memory:
        """memory: uint8 [`n_byte` of the same arguments]. The tensors are views of it."""
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
    """Whether a chunk of n_token tokens is long enough to be summed in this way by `size` ranks."""
    return n_token >= N_PART and n_token * dim * dim >= LEAST_WORK * size


def n_byte(size: int, n_token: int, dim: int, dtype: torch.dtype) -> int:
    """The bytes of one rank's `Memory` for chunks of up to n_token tokens."""
    return sum(-(-shape.numel() * kind.itemsize // LINE) * LINE for shape, kind in _tensors(size, n_token, dim, dtype))


class ChunkSums:
    """One rank's side of the sums of one chunk at a time. Every rank makes the same calls in the same order.

    memories: those of all ranks, in their order, as this rank addresses them. Their flags are 0 at first.
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
        """Start a chunk of n_token tokens: cut them into parts."""
        assert n_token <= len(self.own.normed)
        half = -(-n_token // N_PART)
        self.parts = [slice(first, min(first + half, n_token)) for first in range(0, n_token, half)]
        assert len(self.parts) > 1
        return self

    def send(self, i: int, y: Tensor) -> None:
        """Begin the sum of part i. y: this rank's partial results, [token of the part, dim], contiguous."""
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
        """Add part i's sum to those rows of x that this rank adds up, in place, and begin to send their RMSNorm to the
        other ranks. x: the residual, [token of the whole chunk, dim]; norm: [dim], the weight of that RMSNorm."""
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
        """The RMSNorm of all rows of part i, [token of the part, dim], valid until the next `add` of that part."""
        flags = self.own.flags[NORMED, i, self.counts[i] & 1, : len(self.memories) - 1]
        self.kernel.wait(flags, self.counts[i])
        return self.own.normed[self.parts[i]]

    def own_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """The rows `index` (int64 [row]) of x, with zeros for those that another rank adds up: summed over ranks they
        are the complete rows, [row, dim]."""
        own = torch.zeros_like(index, dtype=torch.bool)
        for part in self.parts:
            rows = share(part.stop - part.start, self.rank, len(self.memories))
            own |= (index >= part.start + rows.start) & (index < part.start + rows.stop)
        return torch.where(own[:, None], x[index], 0)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Launch into a stream of its own: after all that has been launched, beside what will be."""
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
        """Write a number, once everything before it in the stream is visible to all ranks."""
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
