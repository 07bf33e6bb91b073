"""When a program has come how far: seconds since its process began, by name."""

from __future__ import annotations

import os
import time

_IMPORTED = time.monotonic()
_marks: dict[str, float] = {}


def process_age() -> float:
    """Seconds since this process began; where the system does not say, since this module was imported."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            started = int(stat.read().rpartition(")")[2].split()[19])  # field 22 of proc(5), clock ticks after boot
            return float(uptime.read().split()[0]) - started / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        return time.monotonic() - _IMPORTED


def mark(phase: str) -> None:
    """Note that a phase of the start has ended now. If one process has several runs (tests), the last counts."""
    _marks[phase] = process_age()


def marks() -> dict[str, float]:
    """Seconds since the process began at which each phase ended, in order."""
    return dict(sorted(_marks.items(), key=lambda item: item[1]))
