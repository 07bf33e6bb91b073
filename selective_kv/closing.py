"""What a decode step pushes out of the window is quantised before its first layer, for all layers in one launch.

A tile that closes holds tokens of earlier steps alone, so it need not wait for its layer. All layers close theirs in
the same step: together they are work for a whole GPU, where a layer's few tiles would take as long as one of them does,
layer after layer. A step that closes none has one short launch more, and its layers need not look. (Two launches where
only some layers have a key bias that is kept apart.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from selective_kv.cache import Chunk, KVCache
from selective_kv.regions import Regions, Together, together

if TYPE_CHECKING:
    from selective_kv.kernels import AttentionKernels


class Closing:
    """For the layers of one model, whose memory it remembers: it makes a table of it whenever that has changed."""

    def __init__(self) -> None:
        self.held: list[Regions] = []
        self.parts: list[Together] = []

    def __reduce__(self) -> tuple[type[Closing], tuple[()]]:
        """A copy of it stands beside a copy of the layers, whose memory is elsewhere, and looks anew."""
        return Closing, ()

    def look(self, layers: Sequence[KVCache]) -> list[tuple[AttentionKernels, Regions]]:
        """Each layer's `tiles`, or nothing unless all have some. Remembers where they are; waits for the device if that
        has changed."""
        found = [layer.tiles() for layer in layers]
        there = [tiles for tiles in found if tiles is not None]
        if len(there) < len(found):
            there = []
        held = [regions for _, regions in there]
        if len(held) != len(self.held) or any(a is not b for a, b in zip(held, self.held, strict=True)):
            self.held, self.parts = held, together(held)
        return there

    def __call__(self, layers: Sequence[KVCache], chunk: Chunk) -> Chunk:
        """The chunk, of one token a sequence, as `attend` is to be called with. To be captured it must have run, or
        `look`."""
        there = self.look(layers)
        if not there:
            return chunk
        batch = len(chunk.positions)
        for part in self.parts:
            some = part if batch == len(part.first.k) else part.sequences(chunk.row, batch)
            there[0][0].close(some, chunk.positions[:, 0])
        return replace(chunk, closed=True)
