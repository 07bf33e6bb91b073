"""Tables for a terminal: columns as wide as what is in them, so that no two cells ever touch."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import printable

LONGEST_CELL = 100


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lines of cells, two blanks apart. left: how many columns stand at the left of their width."""
    cells = [[printable(cell, LONGEST_CELL) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [cell.ljust(w) for cell, w in zip(line[:left], widths[:left], strict=True)]
        padded += [cell.rjust(w) for cell, w in zip(line[left:], widths[left:], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
