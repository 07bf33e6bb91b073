"""The cache contract and the three caches.

A `KVCache` is one layer's memory of past keys and values. It is a dataclass: its fields are its knobs,
and they become the flags of a `generate.py` subcommand named after the class's `name`. A model holds one per layer
(the application's `kv_cache.ModelCache`), and the lengths that they share. It calls `attend` and knows no more.

What a query at position p sees, with S = sink_size and W = window_size:

    cache          name           full precision              quantised   gone
    full           full           all                         -           -
    sink + window  compress_kv    pos < S and pos > p - W     -           the rest
    selective      quantize_kv    pos < S and pos > p - W     the rest    -      (8 to 2 bits: formats.py)

The selective cache's tokens leave the window a tile of T = 128 at a time: tile t holds positions S + t * T up to
S + (t + 1) * T - 1, and is quantised when the last of them has left: between W and W + T - 1 recent tokens are exact.

A chunk of tokens sees itself causally in full precision, and what the cache held when the chunk's
first token came; where the model itself slides (`Shape.reach`), the window holds inside the chunk too
(sliding.py). A token is written once, and quantised once: when its tile leaves the window.

To write a cache of your own, subclass `KVCache` and define `update`: return the dense keys, values and
positions that a chunk may look at. That is also the slow, obvious reference of the caches here, which
their fast paths are tested against (`use_reference`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_kv.formats import Format
from selective_kv.settings import CacheSettings, knob, known_settings

if TYPE_CHECKING:
    from selective_kv.kernels import AttentionKernels
    from selective_kv.regions import Regions

__all__ = ["Chunk", "KVCache", "RopeLike", "Shape", "Visible", "caches", "knob", "wide"]


@dataclass(frozen=True)
class Shape:
    """What one layer's cache must hold. capacity: the most tokens that a sequence will ever have.

    reach: the size in tokens of the model's own sliding window, the query's token included (Mistral 7B 0.1); None: the
    model has no such window.
    """

    batch: int
    n_kv_head: int
    head_dim: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    reach: int | None = None


@dataclass(frozen=True)
class Chunk:
    """The tokens about to be read, [batch, token]: sequences `row` to `row + batch - 1` of the cache."""

    positions: Tensor  # int64 [batch, token], on the device
    row: int = 0
    start: int | None = None  # positions[:, 0], if it is one number that the host knows; None in decoding
    closed: bool = False  # in decoding: the tiles that the tokens push out of the window are quantised (closing.py)
    next_weight: Tensor | None = None  # read right after attention: kernels may prefetch it into L2


@dataclass(frozen=True)
class Visible:
    """What a query at position p sees of the token at position t <= p in decoding.

    The token is in full precision if t < sink_size or t > p - window_size (window_size None: always). Otherwise it is
    in `formats`, K's and V's, as soon as its whole tile has left the window; with formats None it is gone. within:
    sinks are seen at their distance within the cache, not in the text.
    """

    sink_size: int = 0
    window_size: int | None = None
    formats: tuple[Format, Format] | None = None
    within: bool = False


class RopeLike(Protocol):
    """What caches need of a model's rotary embedding: `model.Rope` has it."""

    @property
    def frequencies(self) -> Tensor: ...

    def back_to(self, last: int) -> tuple[Tensor, Tensor]: ...


@dataclass
class KVCache(CacheSettings):
    """One layer's cache. Subclasses set `name` to be found, and define `update`; the rest is optional."""

    endless: ClassVar[bool] = False  # True: may read more tokens than the model's context
    slides: ClassVar[bool] = False  # True: keeps to `Shape.reach`; others must not hold more tokens than that

    @property
    def n_exact(self) -> int:
        """Tokens that are always in full precision, which must fit the model's context; 0: there is no such number."""
        return 0

    def endless_with(self, reach: int | None) -> bool:
        """Whether a sequence may be longer than the context of a model whose own window is `reach` tokens."""
        return self.endless

    def endless_in(self, capacity: int, reach: int | None) -> bool:
        """Whether one with room for `capacity` tokens may read more: all that a query is to see must fit in it."""
        return self.endless_with(reach) and capacity >= self.n_exact

    def sees(self) -> Visible | None:
        """What a query sees, if the settings alone decide that: then a text can be scored in one pass, and a prompt
        that the full cache has read can be stored as this cache would have stored it. None: only `update` knows.
        """
        return None

    def by_quality(self) -> list[tuple[str, KVCache]]:
        """The cache in each of its formats with the format's name, most bits first: what `--bits auto` tries."""
        return []

    def use_reference(self) -> None:
        """Compute by the slow, obvious reference from now on. A cache without a fast path always does."""

    def wrap_kernels(self, wrap: Callable[[AttentionKernels], AttentionKernels]) -> bool:
        """Call wrap(kernels) in place of this layer's kernels from now on, to time, compare or compile them.

        Returns False, and does nothing, for a cache that calls no kernels.
        """
        return False

    @property
    def path(self) -> str:
        """How attention is computed, in a few words for the report."""
        return "reference attention"

    @property
    def capturable(self) -> bool:
        """Whether a decode step can be recorded as a CUDA graph: no look at the device from the host."""
        return False

    @property
    def attends_to_last(self) -> bool:
        """Whether `attend` takes the query of a chunk's last token alone with the keys and values of the whole chunk:
        a model's last layer needs no other output.
        """
        return False

    def tile_storage(self) -> tuple[AttentionKernels, Regions] | None:
        """The kernels and the memory by which `closing.Closing` quantises the tiles that a decode step closes, for all
        layers at once, before the first one. None: there are no tiles, or `attend` quantises them.
        """
        return None

    def allocate(self, shape: Shape) -> None:
        """Make room. On the meta device this costs nothing and `nbytes` then is the plan."""

    def expect_bias(self, bias: Tensor, frequencies: Tensor) -> None:
        """Keys will come with a bias that their projection adds before RoPE (Qwen 2). Called once, after `allocate` and
        before the first token. A cache that quantises keys may keep the bias apart; results may differ by rounding
        only.

        bias: [n_kv_head, head_dim]; frequencies: [head_dim / 2], radians that each pair of dimensions turns per
        position, as `RopeLike` has them.
        """

    def reset(self) -> None:
        """Forget everything. (Fixed storage need not be cleared: positions say what is valid.)"""

    def storage(self) -> list[Tensor] | None:
        """The tensors, [batch, ...], that tokens are written to, always in the same order: a copy of them is a copy of
        the sequences. With a larger capacity they may be longer, or more of them may follow, but a token's place is the
        same. None: this cache cannot be copied.
        """
        return None

    def fill_randomly(self) -> bool:
        """For measurements: fill the storage with random keys and values, as if every sequence had been read up to the
        capacity. (The lengths say how much of that counts.) Returns False, and does nothing, if only `update` can.
        """
        return False

    def nbytes(self) -> dict[str, int]:
        """Bytes really allocated, by region."""
        return {}

    def held(self, row: int, n_token: int) -> dict[str, Tensor] | None:
        """All that sequence `row` holds after its first `n_token` tokens: views of the storage, by name.

        A cache is saved by copying these views and loaded by copying back, maybe into a cache of another capacity; so
        neither their names nor their contents may depend on the capacity. Dimension 1 counts tokens (or tiles of
        tokens). Empty views may be left out. None: this cache cannot be saved.
        """
        return None

    def score_error(self, row: int, n_token: int, k_bits: int | None = None) -> Tensor | None:
        """How far scores are off over keys as this layer stores them, in nats, float32 []: the root mean square for the
        last query of the chunk that was read last, over the last keys of sequence `row`, which holds n_token tokens.
        More than `score_error.BOUND` is a lot. k_bits: as if keys were stored in so many bits.

        None: this cache stores no keys in fewer bits, or there is nothing to measure it by (fewer than 16 tokens, or a
        sequence of a batch after its eighth).
        """
        return None

    def forgets(self, n_token: int) -> bool:
        """Whether a sequence of n_token tokens has quantised or dropped any of them. If not, it can be cut back to any
        shorter beginning: what `held` returns of that is the beginning of what it returns now.
        """
        return True

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


def wide(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is wider: what references compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def caches() -> dict[str, type[KVCache]]:
    """Every cache class that has a name, the user's own included: name -> class."""
    from selective_kv import full, selective, sink_window  # noqa: F401 (not above: they import this module)

    return {name: cls for name, cls in known_settings().items() if issubclass(cls, KVCache)}
