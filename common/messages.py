"""Words for people on standard error; standard output belongs to what was asked for."""

from __future__ import annotations

import sys

from common.errors import printable


def say(*lines: str) -> None:
    """Each line as one, whatever the names in it hold."""
    for line in lines:
        print(printable(line, None), file=sys.stderr)
