"""What the caches call: the kernels that write to a layer's cache and attend over it. PyTorch and Triton implement
the contract; whoever measures or compares hands a cache another implementation (`dataclasses.replace`).

`Regions` is the memory that every function sees. Nothing here waits for the device in decoding (`close`, `append`,
`decode_attention`); with Triton all three may be recorded in a CUDA graph, and lengths are read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from selective_kv.regions import Regions, Together

SinkRotation = tuple[Tensor, Tensor]  # cos and sin, float32 [batch, head_dim], as RoPE has them


class Append(Protocol):
    def __call__(self, regions: Regions, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write one token per sequence. What that pushes out of the window is dropped, or `close` came first.

        k, v: [batch, n_kv_head, head_dim] in the regions' dtype; positions: int64 [batch], where the tokens stand.
        """
        ...


class Close(Protocol):
    def __call__(self, together: Together, positions: Tensor) -> None:
        """Before a step's tokens are appended: quantise, in all of these layers, the tiles that they push out of the
        window.

        positions: int64 [batch], where the tokens will stand. Twice before a step does what once does.
        """
        ...


class DecodeAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        regions: Regions,
        positions: Tensor,
        sink_rope: SinkRotation | None = None,
        then: Tensor | None = None,
        new: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of one new token per sequence over all that its cache holds.

        q: [batch, n_head, head_dim]; positions: int64 [batch]; sink_rope: what q is rotated by for the sinks, so that
        they are seen at their distance within the cache (StreamingLLM, arXiv:2309.17453); then: a weight that is read
        next, which may be prefetched into L2 meanwhile; new: the token's key and value, [batch, n_kv_head, head_dim]
        each, appended first as `Append` does; None: they have been. Returns [batch, n_head, head_dim] in q's dtype.
        """
        ...


class HistoryAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        regions: Regions,
        start: int,
        own: tuple[Tensor, Tensor],
        sink_rope: SinkRotation | None = None,
    ) -> Tensor:
        """Attention of a chunk that begins at position `start` over itself and over what the cache held before it
        (`evict` came first).

        q: [batch, n_head, token, head_dim]; own: the output over the chunk itself, like q, and the log-sum-exp of its
        scores, float32 [batch, n_head, token], -inf where nothing was seen. Returns like q.
        """
        ...


class Evict(Protocol):
    def __call__(self, regions: Regions, start: int) -> None:
        """Before a chunk that begins at `start`: quantise what has left the window by then."""
        ...


class StoreChunk(Protocol):
    def __call__(self, regions: Regions, k: Tensor, v: Tensor, start: int) -> None:
        """After attention over a chunk: keep its last tokens, quantise (or drop) what leaves the window.

        k, v: [batch, n_kv_head, token, head_dim], the tokens at positions start, start + 1, ...
        """
        ...


@dataclass(frozen=True)
class AttentionKernels:
    """One implementation. `name` is what a report shows; captures: a decode step of it may be in a CUDA graph."""

    name: str
    captures: bool
    append: Append
    close: Close
    decode_attention: DecodeAttention
    history_attention: HistoryAttention
    evict: Evict
    store_chunk: StoreChunk
