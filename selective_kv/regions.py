"""The memory of one layer's cache, as every kernel sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selective_kv.formats import TILE, Format, Tiles
from selective_kv.key_bias import KeyBias


class Stored(NamedTuple):
    """K or V of a layer: slots, tiles, and the format and bias by which tiles are written and read."""

    slots: Tensor
    tiles: Tiles
    format: Format
    bias: KeyBias | None  # subtracted before tiles are quantised, and added back

    def quantize(self, x: Tensor, first: int) -> Tiles:
        """The tiles from index `first` on, made of x [..., n_kv_head, n_tile, TILE, head_dim]."""
        if self.bias is not None:
            x = self.bias.taken_out(x, slice(first, first + x.shape[-3]))
        return self.format.quantize(x)

    def stored(self, tiles: Tiles, which: slice) -> Tensor:
        """The vectors of `tiles`, which are those of indices `which`, rotated if the format is: float32 [..., n_tile,
        TILE, head_dim]."""
        x = self.format.stored(tiles)
        return x if self.bias is None else x + self.format.rotate(self.bias.dense(which, x.shape[-1]))

    def dequantize(self, tiles: Tiles, which: slice) -> Tensor:
        """What `quantize` was given, but for the rounding: float32 [..., n_tile, TILE, head_dim]."""
        x = self.format.dequantize(tiles)
        return x if self.bias is None else x + self.bias.dense(which, x.shape[-1])


class Regions(NamedTuple):
    """Sink and window in full precision, what has left the window as tiles.

    The token at position pos lives in full precision in slot `pos` (pos < sink_size) or
    `sink_size + (pos - sink_size) % ring_size`. Tile t holds the positions sink_size + t * TILE up to
    sink_size + (t + 1) * TILE - 1, all quantised when the last of them has left the window; until then they stay in the
    ring, which therefore is TILE longer than the window. Were TILE 2, with sink 2 and window 3, after positions 0 to 7:

        slots  0  1 | 7  3  4  5  6      (ring of 5: 7 -> 2 + 5 % 5, 3 -> 2 + 1 % 5, ...)
        tiles  [2 3]                     (4 has left the window, 5 has not: their tile is still to come)

    3 is in both: its slot is not needed again before position 8, and is no longer looked at. The full cache is sink 0
    and a window of the whole capacity; sink + window has no tiles, and a ring of the window alone.
    """

    k: Tensor  # [batch, n_kv_head, sink_size + ring_size, head_dim], a float dtype
    v: Tensor
    sink_size: int  # >= 0
    window_size: int  # >= 1
    k_tiles: Tiles | None = None  # [batch, n_kv_head, n_tile, ...], as `k_format` has it; None: what leaves is dropped
    v_tiles: Tiles | None = None
    k_format: Format | None = None
    v_format: Format | None = None
    rotation: Tensor | None = None  # [head_dim, head_dim] of 1, -1 and 0 in k's dtype, where a format is rotated
    key_bias: KeyBias | None = None  # what is not in the tiles of K

    @property
    def ring_size(self) -> int:
        """Slots after the sinks'."""
        return self.k.shape[2] - self.sink_size

    def slot(self, pos: int) -> int:
        """The full-precision slot of a position."""
        return pos if pos < self.sink_size else self.sink_size + (pos - self.sink_size) % self.ring_size

    def n_left(self, n_token: int) -> int:
        """How many of the first n_token tokens have left full precision: those at positions sink_size and on.

        With tiles this is a multiple of TILE.
        """
        n = max(0, n_token - self.sink_size - self.window_size)
        return n if self.k_tiles is None else n // TILE * TILE

    def exact_slots(self, n_token: int, coming: int = 0) -> list[slice]:
        """The slots of those of n_token tokens that are in full precision: the sinks, then the ring from its oldest
        token on, which may be in two parts. coming: tokens still to be written, for which others have already left."""
        sink, n_left = self.sink_size, self.n_left(n_token + coming)
        if n_left == 0:
            return [slice(0, n_token)]
        first = n_left % self.ring_size
        end = first + n_token - sink - n_left
        return [
            slice(0, sink),
            slice(sink + first, sink + min(end, self.ring_size)),
            slice(sink, sink + max(0, end - self.ring_size)),
        ]

    def stored(self) -> Iterator[Stored]:
        """K's and V's slots and tiles; nothing if what leaves the window is dropped."""
        if self.k_tiles is not None and self.v_tiles is not None and self.k_format and self.v_format:
            yield Stored(self.k, self.k_tiles, self.k_format, self.key_bias)
            yield Stored(self.v, self.v_tiles, self.v_format, None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that tokens are written to, by name: [batch, n_kv_head, slot or tile, ...]."""
        found: dict[str, Tensor | None] = {"k": self.k, "v": self.v}
        for name, part in zip("kv", self.stored(), strict=False):
            found |= {f"{name}_{what}": tensor for what, tensor in part.tiles._asdict().items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def held(self, row: int, n_token: int) -> dict[str, Tensor]:
        """What sequence `row` holds after n_token tokens, by name: views [n_kv_head, slot or tile, ...].

        They do not depend on the capacity: a ring that a small capacity made shorter has not been gone round yet.
        """
        slots, tiles = slice(min(n_token, self.k.shape[2])), slice(self.n_left(n_token) // TILE)
        views = {name: t[row, :, slots if name in ("k", "v") else tiles] for name, t in self.tensors().items()}
        return {name: view for name, view in views.items() if view.numel()}

    def sequences(self, first: int, n: int) -> Regions:
        """Views of n sequences, from `first` on."""
        part = slice(first, first + n)
        if first == 0 and n == len(self.k):
            return self

        def cut(tiles: Tiles | None) -> Tiles | None:
            return tiles and Tiles(*(None if t is None else t[part] for t in tiles))  # type: ignore[arg-type]

        return self._replace(
            k=self.k[part], v=self.v[part], k_tiles=cut(self.k_tiles), v_tiles=cut(self.v_tiles)
        )  # fmt: skip


class LayerGroup(NamedTuple):
    """The memory of layers that are alike in shapes, formats and window: one launch serves them all."""

    layers: list[Regions]
    # int64 [layer, N_ADDRESS]: elements from the first layer's tensors to each layer's, of: K's and V's slots, K's and
    # V's integers, K's and V's scales, K's factors, and the key bias' `pairs`, `within` and `turned`
    offsets: Tensor

    @property
    def first(self) -> Regions:
        return self.layers[0]

    def sequences(self, first: int, n: int) -> LayerGroup:
        """Views of n sequences, from `first` on."""
        return LayerGroup([layer.sequences(first, n) for layer in self.layers], self.offsets)


N_ADDRESS = 10


def layer_groups(layers: Sequence[Regions]) -> list[LayerGroup]:
    """Layers with tiles in groups that one launch can serve. Waits for the device, if there is more than one layer.

    There are several groups if only some of the layers have a key bias that is kept apart.
    """
    groups: dict[object, list[Regions]] = {}
    for layer in layers:
        alike = layer.sink_size, layer.window_size, layer.k_format, layer.v_format, layer.key_bias is None
        shapes = [(t.shape, t.dtype, t.device) for t in layer.tensors().values()]
        groups.setdefault((alike, *shapes), []).append(layer)
    return [LayerGroup(group, layer_offsets(group)) for group in groups.values()]


def layer_offsets(layers: list[Regions]) -> Tensor:
    """`LayerGroup.offsets`. Waits for the device, if there is more than one layer."""
    device = layers[0].k.device
    if len(layers) == 1 or device.type == "meta":
        return torch.zeros(len(layers), N_ADDRESS, dtype=torch.int64, device=device)
    first = _addresses(layers[0])
    rows = [
        [(there - here) // size for (there, size), (here, _) in zip(_addresses(layer), first, strict=True)]
        for layer in layers
    ]
    # A CPU's allocator promises 64 bytes only, and the interpreter does not care.
    aligned = device.type == "cpu" or all(offset % 16 == 0 for row in rows for offset in row)
    assert aligned, "the kernels are compiled for layers' tensors that are multiples of 16 elements apart"
    return torch.tensor(rows, dtype=torch.int64).to(device)


def _addresses(layer: Regions) -> list[tuple[int, int]]:
    """The addresses of a layer's tensors in the order of `LayerGroup.offsets`, each with the size in bytes of the
    elements that kernels count there."""
    assert layer.k_tiles is not None and layer.v_tiles is not None
    (k, k_scale, factor), (v, v_scale, _) = layer.k_tiles, layer.v_tiles
    bias = [layer.k] * 3 if layer.key_bias is None else [*layer.key_bias]
    words = [t.view(torch.int32) for t in (k_scale, v_scale, k_scale if factor is None else factor)]
    return [(t.data_ptr(), t.itemsize) for t in (layer.k, layer.v, k, v, *words, *bias)]
