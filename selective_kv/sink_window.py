"""Sink and window: the first tokens and the most recent ones; the middle is dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selective_kv.cache import Chunk, RopeLike, Visible, wide
from selective_kv.settings import SinkWindowSettings
from selective_kv.sliding import SlidingCache


def rotate(x: Tensor, offset: int | Tensor, frequencies: Tensor) -> Tensor:
    """Turn x [..., head_dim] by `offset` more positions of RoPE: one number, or as many as broadcast to [..., 1]."""
    angle = frequencies * offset  # float64: a million positions are many turns
    a, b = wide(x).chunk(2, -1)
    cos, sin = angle.cos().to(a.dtype), angle.sin().to(a.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


@dataclass
class SinkWindowCache(SinkWindowSettings, SlidingCache):
    __doc__ = SinkWindowSettings.__doc__

    @property
    def endless(self) -> bool:  # type: ignore[override]
        return self.positions == "cache"

    def sees(self) -> Visible | None:
        if type(self) is not SinkWindowCache:  # what a subclass changes is not known
            return None
        return Visible(self.sink_size, self.window_size, within=self.positions == "cache")

    @property
    def n_exact(self) -> int:
        return self.sink_size + self.window_size

    def sizes(self, capacity: int) -> tuple[int, int]:
        return self.sink_size, self.window_size if self.reach is None else min(self.window_size, self.reach)

    def endless_with(self, reach: int | None) -> bool:
        return self.endless or (reach is not None and self.sink_size == 0)

    def endless_in(self, capacity: int, reach: int | None) -> bool:
        window = self.window_size if reach is None else min(self.window_size, reach)
        return self.endless_with(reach) and capacity >= self.sink_size + window

    def sink_rope(self, rope: RopeLike) -> tuple[Tensor, Tensor] | None:
        if self.positions == "original" or not self.sink_size:
            return None
        return rope.back_to(self.regions.k.shape[2] - 1)  # the last position within the cache

    def place(self, k: Tensor, positions: Tensor, start: int, rope: RopeLike) -> Tensor:
        n_dropped = self.regions.n_left(start + 1)
        if self.positions == "original" or n_dropped == 0:
            return k
        sink = self.regions.sink_size
        return torch.cat((rotate(k[:, :sink], n_dropped, rope.frequencies), k[:, sink:]), 1)

    def sink_queries(self, q: Tensor, chunk: Chunk, rope: RopeLike) -> Tensor | None:
        if self.positions == "original" or not self.sink_size:
            return None
        n_slot = self.regions.sink_size + self.regions.window_size
        n_dropped = (chunk.positions + 1 - n_slot).clamp_min(0)[:, None, :, None]  # [batch, 1, token, 1]
        return rotate(q, -n_dropped, rope.frequencies)
