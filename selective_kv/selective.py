"""The selective cache: sink and window in full precision, everything between them quantised."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from selective_kv.cache import KVCache, Visible
from selective_kv.formats import Format, key_format, value_format
from selective_kv.region_cache import RegionCache
from selective_kv.settings import SelectiveSettings

LADDER = ((8, 8), (8, 4), (4, 4), (4, 3), (3, 3), (3, 2))  # of keys and values, by quality (LOG.md, 2026-11-26)


@dataclass
class SelectiveCache(SelectiveSettings, RegionCache):
    __doc__ = SelectiveSettings.__doc__

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
