"""What a decode step pushes out of the window is quantised before its first layer, for all layers in one launch.

A tile that closes holds tokens of earlier steps alone, so it need not wait for its layer. All layers close theirs in
the same step: together they are work for a whole GPU, where a layer's few tiles would take as long as one of them does,
layer after layer. A step that closes none has one short launch more, and its layers need not look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selective_kv.cache import Chunk, KVCache
from selective_kv.regions import Regions, Together, together


class Closing:
    """For the layers of one model, whose memory it remembers: it makes a table of it whenever that has changed."""

    def __init__(self) -> None:
        self.held: list[Regions] = []
        self.parts: list[Together] = []

    def __reduce__(self) -> tuple[type[Closing], tuple[()]]:
        """A copy of it stands beside a copy of the layers, whose memory is elsewhere, and looks anew."""
        return Closing, ()

    def __call__(self, layers: Sequence[KVCache], chunk: Chunk) -> Chunk:
        """The chunk, of one token a sequence, as `attend` is to be called with. To be captured it must have run."""
        found = [layer.tiles() for layer in layers]
        there = [tiles for tiles in found if tiles is not None]
        if not there or len(there) < len(found):
            return chunk
        held = [regions for _, regions in there]
        if len(held) != len(self.held) or any(a is not b for a, b in zip(held, self.held, strict=True)):
            self.held, self.parts = held, together(held)
        batch = len(chunk.positions)
        for part in self.parts:
            some = part if batch == len(part.first.k) else part.sequences(chunk.row, batch)
            there[0][0].close(some, chunk.positions[:, 0])
        return replace(chunk, closed=True)
