"""A cache made of sink, window and (maybe) tiles: what the three caches here have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selective_kv.cache import Chunk, KVCache, RopeLike, Shape, wide
from selective_kv.formats import TILE, Format, key_format, require_finite, rotation_matrix
from selective_kv.kernels import AttentionKernels, attention_kernels, chunk_attention
from selective_kv.key_bias import key_bias
from selective_kv.regions import LayerGroup, Regions, layer_offsets
from selective_kv.score_error import LEAST_TOKENS, MOST_ROWS, score_error


@dataclass
class RegionCache(KVCache):
    """A cache made of sink, window and (maybe) tiles: storage, reference and fast path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reference = False
        self._last_q: dict[int, Tensor] = {}  # by sequence, [n_head, head_dim]: the last query of its latest chunk
        self._bias: tuple[Tensor, Tensor] | None = None

    def sizes(self, capacity: int) -> tuple[int, int]:
        """sink_size and window_size."""
        raise NotImplementedError

    def formats(self) -> tuple[Format, Format] | None:
        """K's and V's formats for tokens that have left the window; None: such tokens are dropped."""
        return None

    def allocate(self, shape: Shape) -> None:
        sink, window = self.sizes(shape.capacity)
        sink = min(sink, shape.capacity)
        formats, rest = self.formats(), shape.capacity - sink
        n_tile = max(0, rest - window) // TILE if formats else 0
        if n_tile:
            ring = window + TILE  # a tile's first tokens wait for its last
        else:  # no tile is ever full: nothing leaves, or, in a cache that drops tokens, what the window has no room for
            window = ring = max(1, rest if formats else min(window, rest))

        # Zeros, not garbage: a value that is masked is still multiplied by zero, and 0 * NaN is NaN.
        slots = (shape.batch, shape.n_kv_head, sink + ring, shape.head_dim)
        k, v = (torch.zeros(slots, dtype=shape.dtype, device=shape.device) for _ in "kv")
        self.regions = Regions(k, v, sink, window)
        if formats and n_tile:
            k_tiles, v_tiles = (
                form.zeros((shape.batch, shape.n_kv_head, n_tile), shape.head_dim, shape.device) for form in formats
            )
            rotation = None
            if any(form.rotated for form in formats):
                rotation = rotation_matrix(shape.head_dim, shape.device).to(shape.dtype)
            self.regions = Regions(k, v, sink, window, k_tiles, v_tiles, *formats, rotation)
            self._here = layer_offsets([self.regions])
        self.kernels: AttentionKernels = attention_kernels(shape.device)

    def expect_bias(self, bias: Tensor, frequencies: Tensor) -> None:
        r = self.regions
        self._bias = bias, frequencies
        if r.k_tiles is not None:
            with torch.inference_mode(False):
                kept_out = key_bias(bias.to(r.k.device), frequencies, r.sink_size, r.k_tiles.codes.shape[2])
            self.regions = r._replace(key_bias=kept_out)

    def use_reference(self) -> None:
        self._reference = True

    def wrap_kernels(self, wrap: Callable[[AttentionKernels], AttentionKernels]) -> bool:
        self.kernels = wrap(self.kernels)
        return True

    @property
    def path(self) -> str:
        return super().path if self._reference else self.kernels.name

    @property
    def capturable(self) -> bool:
        return not self._reference and self.regions.k.is_cuda and self.kernels.captures

    def tile_storage(self) -> tuple[AttentionKernels, Regions] | None:
        if self._reference or self.regions.k_tiles is None or self.sees() is None:  # what a subclass does is not known
            return None
        return self.kernels, self.regions

    def reset(self) -> None:
        self._last_q.clear()
        if self.regions.k_tiles is not None:  # a masked slot may hold an earlier text's value, and that may be NaN
            with torch.inference_mode():  # the mode in which it may have been allocated
                self.regions.v.zero_()

    def storage(self) -> list[Tensor] | None:
        return [*self.regions.tensors().values()]

    def fill_randomly(self) -> bool:
        regions = self.regions
        regions.k.normal_()
        regions.v.normal_()
        for part in regions.stored():  # random integers, with the scales of a tile of normal numbers
            like = part.format.quantize(torch.randn(1, TILE, regions.k.shape[3]).to(regions.k.device))
            for held, made in zip(part.tiles, like, strict=True):
                if held is not None and made is not None:
                    held.random_(0, 256) if held.dtype == torch.uint8 else held.copy_(made.expand_as(held))
        return True

    def nbytes(self) -> dict[str, int]:
        r = self.regions
        slot_bytes = 2 * r.k[:, :, 0].nbytes
        sizes = {"sink": r.sink_size * slot_bytes, "window": r.ring_size * slot_bytes}
        sizes["quantised"] = sum(part.tiles.codes.nbytes for part in r.stored())
        sizes["scales"] = sum(part.tiles.nbytes for part in r.stored()) - sizes["quantised"]
        return {region: n for region, n in sizes.items() if n}

    @property
    def attends_to_last(self) -> bool:
        return not self._reference and self.sees() is not None  # what a subclass does is not known

    def held(self, row: int, n_token: int) -> dict[str, Tensor] | None:
        if self.sees() is None:  # a subclass may keep more than its regions
            return None
        return self.regions.held(row, n_token)

    def score_error(self, row: int, n_token: int, k_bits: int | None = None) -> Tensor | None:
        formats, q = self.formats(), self._last_q.get(row)
        if formats is None or q is None:
            return None
        r = self.regions
        first = r.sink_size + r.n_left(n_token)  # of the tile that is stored next
        n = min(n_token - first, TILE)
        if n < LEAST_TOKENS:
            return None
        k = r.k[row, :, [r.slot(p) for p in range(first, first + n)]]
        kept_out = key_bias(*self._bias, first, 1) if self._bias is not None else None
        bias = None if kept_out is None else kept_out.dense(slice(0, 1), k.shape[2])[:, 0].to(k.device)
        form = formats[0] if k_bits is None else key_format(k_bits, formats[0].rotated)
        return score_error(q, k, form, bias)

    def forgets(self, n_token: int) -> bool:
        return self.regions.n_left(n_token) > 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, rope: RopeLike) -> Tensor:
        if k.shape[2] > 1 and chunk.row < MOST_ROWS and self.regions.k_tiles is not None and not q.is_meta:
            self._last_q |= dict(enumerate(q[: MOST_ROWS - chunk.row, :, -1].clone(), chunk.row))
        if self._reference:
            return super().attend(q, k, v, chunk, rope)
        regions = self.regions.sequences(chunk.row, q.shape[0])
        sink_rope = self.sink_rope(rope)
        if k.shape[2] == 1:
            pos = chunk.positions[:, 0]
            if regions.k_tiles is not None and not chunk.closed:
                self.kernels.close(LayerGroup([regions], self._here), pos)
            new = k[:, :, 0], v[:, :, 0]
            attend = self.kernels.decode_attention
            return attend(q[:, :, 0], regions, pos, sink_rope, chunk.next_weight, new)[:, :, None]
        assert chunk.start is not None, "a chunk of several tokens starts at one known position"
        self.kernels.evict(regions, chunk.start)
        y = chunk_attention(self.kernels, q, k, v, regions, chunk.start, sink_rope)
        self.kernels.store_chunk(regions, k, v, chunk.start)
        return y

    def sink_rope(self, rope: RopeLike) -> tuple[Tensor, Tensor] | None:
        """cos and sin, float32 [batch, head_dim], of the rotation of queries that lets them see the sinks at their
        distance within the cache; None: at their distance in the text.
        """
        return None

    def update(self, row: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        r = self.regions
        self._close_tile(row, start)
        n_left = r.n_left(start + 1)
        past = torch.arange(start, device=k.device)
        middle = (past >= r.sink_size) & (past < r.sink_size + n_left)
        slots = torch.where(past < r.sink_size, past, r.sink_size + (past - r.sink_size) % r.ring_size)
        stored, tiles = [*r.stored()], slice(0, n_left // TILE)
        dense = []
        for i, (chunk, values) in enumerate(((k, r.k), (v, r.v))):
            kept = wide(values[row, :, slots[~middle]])
            parts = [kept[:, : r.sink_size], kept[:, r.sink_size :], wide(chunk)]
            if stored:
                parts.insert(1, stored[i].dequantize(stored[i].tiles.of(row).part(tiles), tiles).flatten(1, 2))
            dense.append(torch.cat(parts, 1))
        positions = past if stored else past[~middle]
        for i in range(k.shape[1]):
            if i > 0:
                self._close_tile(row, start + i)
            r.k[row, :, r.slot(start + i)] = k[:, i].to(r.k.dtype)
            r.v[row, :, r.slot(start + i)] = v[:, i].to(r.v.dtype)
        own = torch.arange(start, start + k.shape[1], device=k.device)
        return dense[0], dense[1], torch.cat((positions, own))

    def _close_tile(self, row: int, pos: int) -> None:
        """Quantise the tile, if any, whose last token leaves the window for the token at position `pos`, which is about
        to be written."""
        r = self.regions
        first, end = (r.sink_size + r.n_left(n) for n in (pos, pos + 1))
        if first == end:
            return
        tile = (first - r.sink_size) // TILE
        for part in r.stored():
            tokens = part.slots[row, :, [r.slot(p) for p in range(first, end)]]
            require_finite(tokens, f"a key or value at positions {first} to {end - 1}")
            made = part.quantize(tokens[:, None], tile)
            require_finite(made.scales, f"a scale of the keys or values at positions {first} to {end - 1}")
            for held, new in zip(part.tiles.of(row), made, strict=True):
                if held is not None and new is not None:
                    held[:, tile : tile + 1] = new
