"""Words for people on standard error; standard output belongs to what was asked for."""

from __future__ import annotations

import sys
from typing import Any

from common.errors import printable


def say(*lines: str) -> None:
    """Print lines to standard error. Each stays one line, whatever characters the names in it have."""
    for line in lines:
        print(printable(line, None), file=sys.stderr)


def note(what: str) -> None:
    """Tell what is going on, where nothing else is printed for seconds; only on a terminal, not in a log."""
    if sys.stderr.isatty():
        say(what)


def progress(items: Any, total: int | None, what: str) -> Any:
    """Iterate with a progress bar on standard error, if that is a terminal. The bar disappears at the end."""
    from tqdm import tqdm  # not above: entry points, which say what is not installed, stand on this module

    return tqdm(items, total=total, desc=what, disable=not sys.stderr.isatty(), leave=False)


def size(n: float) -> str:
    """Bytes for people: '1.50 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
