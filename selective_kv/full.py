"""The full cache: every token in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from selective_kv.region_cache import RegionCache


@dataclass
class FullCache(RegionCache):
    """Keep every token in full precision."""

    name: ClassVar[str] = "full"

    def sizes(self, capacity: int) -> tuple[int, int]:
        return 0, capacity
