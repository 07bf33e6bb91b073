"""The memory of one layer's cache, as every kernel sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from selective_kv.formats import INT8, Format


class Stored(NamedTuple):
    """K or V: full precision, integers, scales, and how to read the last two."""

    values: Tensor
    ints: Tensor
    scales: Tensor
    format: Format


class Regions(NamedTuple):
    """Sink and window in full precision, what has left the window as integers.

    The token at position pos lives in full precision in slot `pos` (pos < sink_size) or
    `sink_size + (pos - sink_size) % window_size` (a ring), and, once it has left the window, in row
    `pos - sink_size` of the quantised tensors. With sink 2 and window 3, after positions 0 to 6:

        slots  0  1 | 5  6  4        (ring: 5 -> 2 + 3 % 3, 6 -> 2 + 4 % 3, 4 -> 2 + 2 % 3)
        rows   2  3                  (positions 2 and 3 have left; their rows are 0 and 1)

    The full cache is sink 0 and a window of the whole capacity; sink + window has no rows.
    """

    k: Tensor  # [batch, n_kv_head, sink_size + window_size, head_dim], a float dtype
    v: Tensor
    k_int: Tensor | None  # [batch, n_kv_head, n_row, bytes], as `k_format` has it; None: what leaves is dropped
    v_int: Tensor | None
    k_scale: Tensor | None  # [batch, n_kv_head, n_row, ...], 4 bytes per group of elements
    v_scale: Tensor | None
    sink_size: int  # >= 0
    window_size: int  # >= 1
    k_format: Format = INT8
    v_format: Format = INT8
    rotation: Tensor | None = None  # [head_dim, head_dim] of 1 and -1 in k's dtype, where k_format is rotated

    def slot(self, pos: int) -> int:
        """The full-precision slot of a position."""
        return pos if pos < self.sink_size else self.sink_size + (pos - self.sink_size) % self.window_size

    def n_left(self, n_token: int) -> int:
        """How many of the first n_token tokens are no longer in full precision."""
        return max(0, n_token - self.sink_size - self.window_size)

    def quantised(self) -> Iterator[Stored]:
        """K's and V's; nothing where the middle is dropped."""
        if self.k_int is not None and self.v_int is not None and self.k_scale is not None and self.v_scale is not None:
            yield Stored(self.k, self.k_int, self.k_scale, self.k_format)
            yield Stored(self.v, self.v_int, self.v_scale, self.v_format)

    def held(self, row: int, n_token: int) -> dict[str, Tensor]:
        """What sequence `row` holds after n_token tokens, by name: views [n_kv_head, slot or row, ...].

        Slots and rows do not depend on the capacity: a ring that the capacity made shorter has not come round yet.
        """
        n_left = self.n_left(n_token)
        slots, rows = slice(n_token - n_left), slice(n_left)
        lengths = {"k": slots, "v": slots, "k_int": rows, "v_int": rows, "k_scale": rows, "v_scale": rows}
        views = {name: getattr(self, name)[row, :, n] for name, n in lengths.items() if getattr(self, name) is not None}
        return {name: view for name, view in views.items() if view.numel()}

    def batch_rows(self, first: int, n: int) -> Regions:
        """Views of n sequences, from `first` on."""
        tensors = [t if t is None else t[first : first + n] for t in self[:6]]
        return Regions(*tensors, *self[6:])  # type: ignore[arg-type, call-arg]
