"""The cache contract and the three caches.

A `KVCache` is one layer's memory of past keys and values. It is a dataclass: its fields are its knobs,
and they become the flags of a `generate.py` subcommand named after the class's `name`. A `ModelCache`
(model_cache.py) holds one per layer, and the lengths that they share. The model calls `attend` and knows no more.

What a query at position p sees, with S = sink_size and W = window_size:

    cache          name           full precision              quantised   gone
    full           full           all                         -           -
    sink + window  compress_kv    pos < S and pos > p - W     -           the rest
    selective      quantize_kv    pos < S and pos > p - W     the rest    -      (8 or 4 bits: quantize.py)

A chunk of tokens sees itself causally in full precision, and what the cache held when the chunk's
first token came. A token is written once, and quantised once: when it leaves the window.

To write a cache of your own, subclass `KVCache` and define `update`: return the dense keys, values and
positions that a chunk may look at. That is also the slow, obvious reference of the caches here, which
their fast paths are tested against (`use_reference`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import Regions
from kernels.regions import Stored
from quantize import INT8, Format, hadamard, require_finite


@dataclass(frozen=True)
class Shape:
    """What one layer's cache must hold. capacity: the most tokens that a sequence will ever have."""

    batch: int
    n_kv_head: int
    head_dim: int
    capacity: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Chunk:
    """The tokens about to be read, [batch, token]: sequences `row` to `row + batch - 1` of the cache."""

    positions: Tensor  # int64 [batch, token], on the device
    row: int = 0
    start: int | None = None  # positions[:, 0] where it is one number that the host knows: never in decoding
    then: Tensor | None = None  # a weight that the model reads after attention: kernels may bring it nearer


class RopeLike(Protocol):
    @property
    def frequencies(self) -> Tensor: ...

    def back_to(self, last: int) -> tuple[Tensor, Tensor]: ...


def knob(default: Any, help: str, least: int | None = None, choices: Sequence[Any] = (), rare: bool = False) -> Any:
    """A dataclass field that becomes a command-line flag. least: the smallest value allowed; rare: a setting's
    name leaves it out where it has its default."""
    return field(default=default, metadata={"help": help, "least": least, "choices": tuple(choices), "rare": rare})


@dataclass
class KVCache:
    """One layer's cache. Subclasses set `name` to be found, and define `update`; the rest is optional."""

    name: ClassVar[str] = ""
    endless: ClassVar[bool] = False  # True: may read more tokens than the model's context

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least")
            if least is not None and value < least:
                raise ValueError(f"--{f.name} must be at least {least}, not {value}")
            if f.metadata.get("choices") and value not in f.metadata["choices"]:
                raise ValueError(f"--{f.name} must be one of {', '.join(map(str, f.metadata['choices']))}, not {value}")

    @property
    def n_exact(self) -> int:
        """How many tokens are kept in full precision; 0: no such limit. It must fit the model's context."""
        return 0

    def by_quality(self) -> list[tuple[str, KVCache]]:
        """This cache in each number of bits that it has, most first, and their names: what `--bits auto` tries."""
        return []

    def use_reference(self) -> None:
        """Take the slow, obvious path from now on; a cache without another takes it anyway."""

    @property
    def path(self) -> str:
        """How attention is computed, in a few words for the report."""
        return "reference attention"

    @property
    def capturable(self) -> bool:
        """Whether a decode step can be recorded as a CUDA graph: no look at the device from the host."""
        return False

    def allocate(self, shape: Shape) -> None:
        """Make room. On the meta device this costs nothing and `nbytes` then is the plan."""

    def reset(self) -> None:
        """Forget everything. (Fixed storage need not be cleared: positions say what is valid.)"""

    def nbytes(self) -> dict[str, int]:
        """Bytes really allocated, by region."""
        return {}

    def update(self, row: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take in a chunk of sequence `row` and return all that the chunk may look at, itself included.

        k, v: [n_kv_head, token, head_dim], keys already rotated; start: the first token's position.
        Returns dense k and v [n_kv_head, key, head_dim] and the keys' positions, int64 [key].
        """
        raise NotImplementedError

    def place(self, k: Tensor, positions: Tensor, start: int, rope: RopeLike) -> Tensor:
        """A chance to rotate the dense keys that `update` returned to other positions."""
        return k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, rope: RopeLike) -> Tensor:
        """The reference: dense keys and values, then attention, a sequence at a time.

        q: [batch, n_head, token, head_dim]; k, v: [batch, n_kv_head, token, head_dim]. Returns like q.
        """
        out = torch.empty_like(q)
        group = q.shape[1] // k.shape[1]
        for b in range(q.shape[0]):
            pos = chunk.positions[b]
            start = int(pos[0])
            keys, values, key_pos = self.update(chunk.row + b, k[b], v[b], start)
            keys = self.place(keys, key_pos, start, rope)
            seen = key_pos[None, :] <= pos[:, None]  # [token, key]
            keys, values = (t.repeat_interleave(group, 0).to(q.dtype) for t in (keys, values))
            out[b] = F.scaled_dot_product_attention(q[b], keys, values, attn_mask=seen)
        return out


def rotate(x: Tensor, offset: int, frequencies: Tensor) -> Tensor:
    """Turn x [..., head_dim] by `offset` more positions of RoPE."""
    angle = frequencies * offset  # float64: a million positions are many turns
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """In float32, or wider as it is: what a reference computes in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class _RegionCache(KVCache):
    """A cache made of sink, window and (maybe) quantised rows: storage, reference and fast path."""

    _reference: ClassVar[bool] = False

    def sizes(self, capacity: int) -> tuple[int, int]:
        """sink_size and window_size."""
        raise NotImplementedError

    quantises: ClassVar[bool] = False

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
        self.kernels = kernels.for_device(shape.device)

    def use_reference(self) -> None:
        self._reference = True  # type: ignore[misc]

    @property
    def path(self) -> str:
        return super().path if self._reference else self.kernels.NAME

    @property
    def capturable(self) -> bool:
        return not self._reference and self.regions.k.is_cuda and self.kernels is not kernels.eager

    def nbytes(self) -> dict[str, int]:
        r = self.regions
        slot_bytes = 2 * r.k[:, :, 0].nbytes
        sizes = {"sink": r.sink_size * slot_bytes, "window": r.window_size * slot_bytes}
        sizes["quantised"] = sum(part.ints.nbytes for part in r.quantised())
        sizes["scales"] = sum(part.scales.nbytes for part in r.quantised())
        return {region: n for region, n in sizes.items() if n}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, rope: RopeLike) -> Tensor:
        if self._reference:
            return super().attend(q, k, v, chunk, rope)
        regions = self.regions.batch_rows(chunk.row, q.shape[0])
        sink_turn = self.sink_turn(rope)
        if q.shape[2] == 1:
            pos = chunk.positions[:, 0]
            self.kernels.append(regions, k[:, :, 0], v[:, :, 0], pos)
            return self.kernels.decode_attention(q[:, :, 0], regions, pos, sink_turn, chunk.then)[:, :, None]
        assert chunk.start is not None, "a chunk of several tokens starts at one known position"
        self.kernels.evict(regions, chunk.start)
        y = kernels.chunk_attention(self.kernels, q, k, v, regions, chunk.start, sink_turn)
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


@dataclass
class FullCache(_RegionCache):
    """Keep every token in full precision."""

    name: ClassVar[str] = "full"

    def sizes(self, capacity: int) -> tuple[int, int]:
        return 0, capacity


@dataclass
class SinkWindowCache(_RegionCache):
    """Keep the first tokens and the most recent ones; drop the middle.

    StreamingLLM (Xiao et al. 2023, arXiv:2309.17453). Constant memory and speed, however long the text;
    what left the window is forgotten.
    """

    name: ClassVar[str] = "compress_kv"

    sink_size: int = knob(16, "first tokens kept for ever: a few keep the model stable, more cost little", 0)
    window_size: int = knob(32, "most recent tokens kept: memory grows with it, and what the model remembers", 1)
    positions: str = knob(
        "cache",
        "'cache' counts positions within the cache, so that text can run past the trained context; "
        "'original' keeps each token's own position",
        choices=("cache", "original"),
    )

    @property
    def endless(self) -> bool:  # type: ignore[override]
        return self.positions == "cache"

    @property
    def n_exact(self) -> int:
        return self.sink_size + self.window_size

    def sizes(self, capacity: int) -> tuple[int, int]:
        return self.sink_size, self.window_size

    def sink_turn(self, rope: RopeLike) -> tuple[Tensor, Tensor] | None:
        if self.positions == "original" or not self.sink_size:
            return None
        return rope.back_to(self.regions.k.shape[2] - 1)  # the last position within the cache

    def place(self, k: Tensor, positions: Tensor, start: int, rope: RopeLike) -> Tensor:
        n_dropped = self.regions.n_left(start + 1)
        if self.positions == "original" or n_dropped == 0:
            return k
        sink = self.regions.sink_size
        return torch.cat((rotate(k[:, :sink], n_dropped, rope.frequencies), k[:, sink:]), 1)


@dataclass
class SelectiveCache(_RegionCache):
    """Keep the first and the most recent tokens in full precision and everything between them in 8 or 4 bits."""

    name: ClassVar[str] = "quantize_kv"
    quantises: ClassVar[bool] = True

    sink_size: int = knob(16, "first tokens kept in full precision: they draw much attention and cost little", 0)
    window_size: int = knob(
        32,
        "most recent tokens kept in full precision: a larger one is closer to the full cache, and larger",
        1,
    )

    k_bits: int = knob(
        8,
        "8 or 4 bits for the keys between them: half the memory; keys are the more sensitive",
        choices=(8, 4),
        rare=True,
    )  # fmt: skip
    v_bits: int = knob(8, "8 or 4 bits for the values between them: half the memory", choices=(8, 4), rare=True)
    group_size: int = knob(
        0, "elements that share a scale at 4 bits, head_dim or half of it; 0: head_dim. Half is closer, and "
        "0.25 to 0.5 bits an element larger", 0, rare=True,
    )  # fmt: skip
    rotate: bool = knob(
        True,
        "turn 4-bit keys and their queries by a Hadamard matrix, which spreads outliers: costs no memory",
        rare=True,
    )

    def formats(self) -> tuple[Format, Format]:
        size = self.group_size
        return Format(self.k_bits, size, self.rotate) if self.k_bits == 4 else INT8, Format(self.v_bits, size)

    def by_quality(self) -> list[tuple[str, KVCache]]:
        bits = ((8, 8), (8, 4), (4, 4))  # keys keep theirs longest: they are the more sensitive
        return [(f"{k}-bit keys and {v}-bit values", dataclasses.replace(self, k_bits=k, v_bits=v)) for k, v in bits]

    @property
    def n_exact(self) -> int:
        return self.sink_size + self.window_size

    def sizes(self, capacity: int) -> tuple[int, int]:
        return self.sink_size, self.window_size


def caches() -> dict[str, type[KVCache]]:
    """Every cache class that has a name, the user's own included: name -> class."""
    found: dict[str, type[KVCache]] = {}
    waiting: list[type[KVCache]] = [KVCache]
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if cls.name:
            found[cls.name] = cls
    return found
