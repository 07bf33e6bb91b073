"""The full cache: every token in full precision."""

from __future__ import annotations

from dataclasses import dataclass

from selective_kv.cache import Visible
from selective_kv.settings import FullSettings
from selective_kv.sliding import SlidingCache


@dataclass
class FullCache(FullSettings, SlidingCache):
    __doc__ = FullSettings.__doc__

    def sees(self) -> Visible | None:
        return Visible() if type(self) is FullCache else None  # what a subclass changes is not known

    def sizes(self, capacity: int) -> tuple[int, int]:
        return 0, capacity if self.reach is None else min(self.reach, capacity)

    def endless_with(self, reach: int | None) -> bool:
        return self.endless or reach is not None

    def endless_in(self, capacity: int, reach: int | None) -> bool:
        return reach is not None and capacity >= reach
