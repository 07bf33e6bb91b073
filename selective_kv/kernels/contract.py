"""The contract of the kernels that the caches call: they write to a layer's cache and attend over it.

PyTorch (`pytorch.py`, the reference) and Triton (`triton_backend.py`) implement it. To measure or compare, hand a cache
another implementation (`dataclasses.replace`). Every function works on `Regions`, a layer's memory.

Triton's decoding functions (`close`, `append`, `decode_attention`) never wait for the device: they may be recorded in a
CUDA graph, and read the sequences' lengths on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from selective_kv.regions import LayerGroup, Regions

SinkRotation = tuple[Tensor, Tensor]  # cos and sin, float32 [batch, head_dim], as `model.Rope` has them


class Append(Protocol):
    def __call__(self, regions: Regions, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write one token per sequence into its slot. The token that was there is lost: `close` has quantised its tile
        before, or the cache drops it.

        k, v: [batch, n_kv_head, head_dim] in the regions' dtype; positions: int64 [batch], of the new tokens.
        """
        ...


class Close(Protocol):
    def __call__(self, group: LayerGroup, positions: Tensor) -> None:
        """Before a step's tokens are appended: quantise, in all layers of the group, the tiles that they push out of
        the window.

        positions: int64 [batch], of the tokens to come. A second call before the same step changes nothing.
        """
        ...


class DecodeAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        regions: Regions,
        positions: Tensor,
        sink_rope: SinkRotation | None = None,
        next_weight: Tensor | None = None,
        new: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of one new token per sequence over all that its cache holds.

        q: [batch, n_head, head_dim] in the regions' dtype; positions: int64 [batch]; sink_rope: the rotation of q by
        which it sees the sinks at their distance within the cache (StreamingLLM, arXiv:2309.17453), None: q as it is;
        next_weight: the weight that is read next, which may be prefetched into L2 meanwhile; new: the token's key and
        value, [batch, n_kv_head, head_dim] each, to be appended first as `Append` does, None: they are in the cache
        already. Returns [batch, n_head, head_dim] in q's dtype.
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
        """Before attention over a chunk that begins at position `start`: quantise the tile, if any, that the token at
        `start` pushes out of the window."""
        ...


class StoreChunk(Protocol):
    def __call__(self, regions: Regions, k: Tensor, v: Tensor, start: int) -> None:
        """After attention over a chunk: write the tokens that stay in the window into their slots, and quantise or drop
        all that leave it.

        k, v: [batch, n_kv_head, token, head_dim], of the tokens at positions start, start + 1, ...
        """
        ...


@dataclass(frozen=True)
class AttentionKernels:
    """One implementation. name: how reports call it; captures: a CUDA graph may record its decode step."""

    name: str
    captures: bool
    append: Append
    close: Close
    decode_attention: DecodeAttention
    history_attention: HistoryAttention
    evict: Evict
    store_chunk: StoreChunk
