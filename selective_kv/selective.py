"""The selective cache: sink and window in full precision, everything between them quantised."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from selective_kv.cache import KVCache, Visible, knob
from selective_kv.formats import BITS, Format, key_format, value_format
from selective_kv.region_cache import RegionCache

LADDER = ((8, 8), (8, 4), (4, 4), (4, 3), (3, 3), (3, 2))  # of keys and values, by quality (LOG.md, 2026-11-26)


@dataclass
class SelectiveCache(RegionCache):
    """Keep the first and the most recent tokens in full precision and everything between them in 8 to 2 bits.

    Tokens leave the window 128 at a time, as a tile: between window_size and window_size + 127 of them are exact.
    """

    name: ClassVar[str] = "quantize_kv"

    sink_size: int = knob(16, "first tokens kept in full precision: they draw much attention and cost little", 0)
    window_size: int = knob(
        32,
        "most recent tokens kept in full precision: a larger one is closer to the full cache, and larger",
        1,
    )

    k_bits: int = knob(
        8,
        "bits of the keys between them: keys are the more sensitive; 2 bits are for experiments",
        choices=BITS,
        rare=True,
    )  # fmt: skip
    v_bits: int = knob(8, "bits of the values between them", choices=BITS, rare=True)
    rotate: bool = knob(
        True,
        "rotate what has fewer than 8 bits by a Hadamard matrix, which spreads outliers: costs no memory",
        rare=True,
    )

    def formats(self) -> tuple[Format, Format]:
        return key_format(self.k_bits, self.rotate), value_format(self.v_bits, self.rotate)

    def sees(self) -> Visible | None:
        if type(self) is not SelectiveCache:  # what a subclass changes is not known
            return None
        return Visible(self.sink_size, self.window_size, self.formats())

    def by_quality(self) -> list[tuple[str, KVCache]]:
        named = [(f"{k}-bit keys and {v}-bit values", k, v) for k, v in LADDER]
        return [(name, dataclasses.replace(self, k_bits=k, v_bits=v)) for name, k, v in named]

    @property
    def n_exact(self) -> int:
        return self.sink_size + self.window_size

    def sizes(self, capacity: int) -> tuple[int, int]:
        return self.sink_size, self.window_size
