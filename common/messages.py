"""Words for people on standard error; standard output belongs to what was asked for."""

from __future__ import annotations

import sys
from typing import Any

from common.errors import printable


def say(*lines: str) -> None:
    """Each line as one, whatever the names in it hold."""
    for line in lines:
        print(printable(line, None), file=sys.stderr)


def note(what: str) -> None:
    """What goes on where nothing else would be heard for seconds: to somebody who looks on, not into a log."""
    if sys.stderr.isatty():
        say(what)


def progress(items: Any, total: int | None, what: str) -> Any:
    """A bar on standard error around what is iterated over, where a person looks on; gone when it is done."""
    from tqdm import tqdm  # not above: entry points, which say what is not installed, stand on this module

    return tqdm(items, total=total, desc=what, disable=not sys.stderr.isatty(), leave=False)


def size(n: float) -> str:
    """Bytes for people: '1.50 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
