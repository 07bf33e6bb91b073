"""The memory of one layer's cache, as every kernel sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


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
    k_int: Tensor | None  # int8 [batch, n_kv_head, n_row, head_dim]; None: what leaves is dropped
    v_int: Tensor | None
    k_scale: Tensor | None  # float32 [batch, n_kv_head, n_row]
    v_scale: Tensor | None
    sink_size: int  # >= 0
    window_size: int  # >= 1

    def slot(self, pos: int) -> int:
        """The full-precision slot of a position."""
        return pos if pos < self.sink_size else self.sink_size + (pos - self.sink_size) % self.window_size

    def n_left(self, n_token: int) -> int:
        """How many of the first n_token tokens are no longer in full precision."""
        return max(0, n_token - self.sink_size - self.window_size)

    def quantised(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """K's and V's (full precision, integers, scales); nothing where the middle is dropped."""
        for values, ints, scale in ((self.k, self.k_int, self.k_scale), (self.v, self.v_int, self.v_scale)):
            if ints is not None and scale is not None:
                yield values, ints, scale

    def batch_rows(self, first: int, n: int) -> Regions:
        """Views of n sequences, from `first` on."""

        def view(t: Tensor) -> Tensor:
            return t[first : first + n]

        k, v = view(self.k), view(self.v)
        if self.k_int is None or self.v_int is None or self.k_scale is None or self.v_scale is None:
            return self._replace(k=k, v=v)
        return Regions(k, v, view(self.k_int), view(self.v_int), view(self.k_scale), view(self.v_scale), *self[6:])
