"""The selective cache: sink and window in full precision, everything between them quantised."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from selective_kv.cache import KVCache, Visible, knob
from selective_kv.formats import INT8, Format
from selective_kv.region_cache import RegionCache


@dataclass
class SelectiveCache(RegionCache):
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

    def sees(self) -> Visible | None:
        if type(self) is not SelectiveCache:  # what a subclass changes is not known
            return None
        return Visible(self.sink_size, self.window_size, self.formats())

    def by_quality(self) -> list[tuple[str, KVCache]]:
        bits = ((8, 8), (8, 4), (4, 4))  # keys keep theirs longest: they are the more sensitive
        return [(f"{k}-bit keys and {v}-bit values", dataclasses.replace(self, k_bits=k, v_bits=v)) for k, v in bits]

    @property
    def n_exact(self) -> int:
        return self.sink_size + self.window_size

    def sizes(self, capacity: int) -> tuple[int, int]:
        return self.sink_size, self.window_size
