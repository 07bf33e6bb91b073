"""Words for people on standard error; standard output belongs to what was asked for."""

from __future__ import annotations

import sys


def say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)
