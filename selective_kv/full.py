"""The full cache: every token in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from selective_kv.cache import Visible
from selective_kv.region_cache import RegionCache


@dataclass
class FullCache(RegionCache):
    """Keep every token in full precision."""

    name: ClassVar[str] = "full"

    def sees(self) -> Visible | None:
        return Visible() if type(self) is FullCache else None  # what a subclass changes is not known

    def sizes(self, capacity: int) -> tuple[int, int]:
        return 0, capacity
