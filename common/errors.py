"""The application's own error: what the command line tells in one line."""

from __future__ import annotations

import difflib
from collections.abc import Collection

LONGEST = 1000  # characters of a message


def printable(text: str, most: int | None = LONGEST) -> str:
    """`text` as a terminal can be shown it, in one line: what files and flags call things may hold anything.

    Control characters, line ends and halves of surrogate pairs (how Python hands over bytes that are no UTF-8) become
    their escapes, and of more than `most` characters the middle is left out.
    """
    if most is not None and len(text) > most:
        head, tail = most * 2 // 3, most // 3
        text = f"{text[:head]} … {len(text) - head - tail:,} characters … {text[-tail:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class UserError(ValueError):
    """A mistake of the user's, told in one line; generate.py and the scripts print it and exit with 2.

    What it quotes may come from a file of somebody's: it is made `printable` here, so nobody has to think of it.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


def nearest(name: str, known: Collection[str]) -> str:
    """ "; did you mean ...?" with the one name that begins so, or else the likest; "" if none is alike."""
    longer = [other for other in known if other.startswith(name)]
    near = longer if len(longer) == 1 else difflib.get_close_matches(name, longer or known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
