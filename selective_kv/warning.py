"""Warnings of the library, which never prints: they go to the logger "selective_kv", each line once a process."""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_once(line: str) -> None:
    """Every layer may find the same reason to warn, and one line is enough."""
    logging.getLogger("selective_kv").warning(line)
