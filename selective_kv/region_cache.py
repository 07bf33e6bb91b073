"""A cache made of sink, window and (maybe) quantised rows: what the three caches here have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selective_kv.cache import Chunk, KVCache, RopeLike, Shape, wide
from selective_kv.formats import INT8, Format, hadamard, require_finite
from selective_kv.kernels import AttentionKernels, attention_kernels, chunk_attention
from selective_kv.regions import Regions, Stored


@dataclass
class RegionCache(KVCache):
    """A cache made of sink, window and (maybe) quantised rows: storage, reference and fast path."""

    quantises: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reference = False

    def sizes(self, capacity: int) -> tuple[int, int]:
        """sink_size and window_size."""
        raise NotImplementedError

    def formats(self) -> tuple[Format, Format]:
        """K's and V's, in what has left the window."""
        return INT8, INT8

    def allocate(self, shape: Shape) -> None:
        sink, window = self.sizes(shape.capacity)
        sink = min(sink, shape.capacity)
        window = max(1, min(window, shape.capacity - sink))
        n_row = max(0, shape.capacity - sink - window) if self.quantises else 0

        def room(n: int, dtype: torch.dtype, *tail: int) -> Tensor:
            # Zeros, not garbage: what is masked is still multiplied by zero, and 0 * NaN is NaN.
            return torch.zeros(shape.batch, shape.n_kv_head, n, *tail, dtype=dtype, device=shape.device)

        k, v = (room(sink + window, shape.dtype, shape.head_dim) for _ in "kv")
        k_format, v_format = self.formats()
        k_int = v_int = k_scale = v_scale = rotation = None
        if n_row:
            k_format.check(shape.head_dim)
            v_format.check(shape.head_dim)
            rows = (shape.batch, shape.n_kv_head, n_row)
            k_int, k_scale = k_format.room(rows, shape.head_dim, shape.device)
            v_int, v_scale = v_format.room(rows, shape.head_dim, shape.device)
            if k_format.rotated:
                rotation = hadamard(shape.head_dim, shape.device).to(shape.dtype)
        self.regions = Regions(k, v, k_int, v_int, k_scale, v_scale, sink, window, k_format, v_format, rotation)
        self.kernels: AttentionKernels = attention_kernels(shape.device)

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

    def storage(self) -> list[Tensor] | None:
        return [t for t in self.regions[:6] if t is not None]

    def nbytes(self) -> dict[str, int]:
        r = self.regions
        slot_bytes = 2 * r.k[:, :, 0].nbytes
        sizes = {"sink": r.sink_size * slot_bytes, "window": r.window_size * slot_bytes}
        sizes["quantised"] = sum(part.ints.nbytes for part in r.quantised())
        sizes["scales"] = sum(part.scales.nbytes for part in r.quantised())
        return {region: n for region, n in sizes.items() if n}

    @property
    def attends_to_last(self) -> bool:
        return not self._reference and self.sees() is not None  # what a subclass does is not known

    def held(self, row: int, n_token: int) -> dict[str, Tensor] | None:
        if self.sees() is None:  # a subclass may keep more than its regions
            return None
        return self.regions.held(row, n_token)

    def forgets(self, n_token: int) -> bool:
        return self.regions.n_left(n_token) > 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, rope: RopeLike) -> Tensor:
        if self._reference:
            return super().attend(q, k, v, chunk, rope)
        regions = self.regions.batch_rows(chunk.row, q.shape[0])
        sink_turn = self.sink_turn(rope)
        if k.shape[2] == 1:
            pos = chunk.positions[:, 0]
            self.kernels.append(regions, k[:, :, 0], v[:, :, 0], pos)
            return self.kernels.decode_attention(q[:, :, 0], regions, pos, sink_turn, chunk.then)[:, :, None]
        assert chunk.start is not None, "a chunk of several tokens starts at one known position"
        self.kernels.evict(regions, chunk.start)
        y = chunk_attention(self.kernels, q, k, v, regions, chunk.start, sink_turn)
        self.kernels.store_chunk(regions, k, v, chunk.start)
        return y

    def sink_turn(self, rope: RopeLike) -> tuple[Tensor, Tensor] | None:
        """cos and sin of what queries are turned by for the sinks, if those are to be seen at their distance within
        the cache: float32 [batch, head_dim], as RoPE has them.
        """
        return None

    def update(self, row: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        r = self.regions
        self._leave(row, start - r.window_size)
        past = torch.arange(start, device=k.device)
        middle = (past >= r.sink_size) & (past <= start - r.window_size)
        slots = torch.where(past < r.sink_size, past, r.sink_size + (past - r.sink_size) % r.window_size)
        dense = []
        stored: list[Stored | None] = list(r.quantised()) or [None, None]
        for chunk, values, held in zip((k, v), (r.k, r.v), stored, strict=True):
            kept = wide(values[row, :, slots[~middle]])
            parts = [kept[:, : r.sink_size], kept[:, r.sink_size :], wide(chunk)]
            if held is not None:
                rows = past[middle] - r.sink_size
                parts.insert(1, held.format.dequantize(held.ints[row, :, rows], held.scales[row, :, rows]))
            dense.append(torch.cat(parts, 1))
        positions = past if self.regions.k_int is not None else past[~middle]
        for i in range(k.shape[1]):
            if i > 0:
                self._leave(row, start + i - r.window_size)
            r.k[row, :, r.slot(start + i)] = k[:, i].to(r.k.dtype)
            r.v[row, :, r.slot(start + i)] = v[:, i].to(r.v.dtype)
        own = torch.arange(start, start + k.shape[1], device=k.device)
        return dense[0], dense[1], torch.cat((positions, own))

    def _leave(self, row: int, pos: int) -> None:
        """The token at `pos` leaves the window: quantise it, this once."""
        if pos < self.regions.sink_size:
            return
        at = pos - self.regions.sink_size
        for values, ints, scales, form in self.regions.quantised():
            token = values[row, :, self.regions.slot(pos)]
            require_finite(token, f"the key or value at position {pos}")
            ints[row, :, at], scales[row, :, at] = form.quantize(token)
