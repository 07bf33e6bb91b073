"""The tiles that a decode step pushes out of the window are quantised before its first layer, for all layers at once.

A tile that closes holds tokens of earlier steps only, so it need not wait for its layer; and all layers close theirs in
the same step. Together they are work for a whole GPU. One layer's few tiles are not: each layer would take as long as
one tile does. The price is one short launch in every step, also in those that close nothing. (Two launches, if only
some of the layers have a key bias that is kept apart.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from selective_kv.cache import Chunk, KVCache
from selective_kv.regions import LayerGroup, Regions, layer_groups

if TYPE_CHECKING:
    from selective_kv.kernels import AttentionKernels


class Closing:
    """Closes the tiles of one model's layers. It holds a table of where their memory is, made anew when that
    changes."""

    def __init__(self) -> None:
        self.held: list[Regions] = []
        self.groups: list[LayerGroup] = []

    def __reduce__(self) -> tuple[type[Closing], tuple[()]]:
        """A copy belongs to copied layers, whose memory is elsewhere, and starts without a table."""
        return Closing, ()

    def look(self, layers: Sequence[KVCache]) -> list[tuple[AttentionKernels, Regions]]:
        """Each layer's `tile_storage`; nothing unless all layers have some. Makes the table, and waits for the device,
        if the layers' memory has changed."""
        found = [layer.tile_storage() for layer in layers]
        there = [tiles for tiles in found if tiles is not None]
        if len(there) < len(found):
            there = []
        held = [regions for _, regions in there]
        if len(held) != len(self.held) or any(a is not b for a, b in zip(held, self.held, strict=True)):
            self.held, self.groups = held, layer_groups(held)
        return there

    def __call__(self, layers: Sequence[KVCache], chunk: Chunk) -> Chunk:
        """Close the tiles that a chunk of one token a sequence pushes out, and return the chunk for `attend`. Before it
        is captured, it or `look` must have run once."""
        there = self.look(layers)
        if not there:
            return chunk
        batch = len(chunk.positions)
        for group in self.groups:
            own = group if batch == len(group.first.k) else group.sequences(chunk.row, batch)
            there[0][0].close(own, chunk.positions[:, 0])
        return replace(chunk, closed=True)
