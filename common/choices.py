"""Names of dtypes and devices, as flags have them. Needs no torch."""

from __future__ import annotations

import re

from common.errors import UserError

DTYPE_NAMES = {  # and what torch calls them
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}


def require_dtype(name: str) -> None:
    """Raises UserError unless the name is one of DTYPE_NAMES, or auto."""
    if name not in (*DTYPE_NAMES, "auto"):
        raise UserError(f"--dtype {name}: give one of {', '.join(DTYPE_NAMES)}, auto")


def require_device(name: str) -> None:
    """Raises UserError unless the name is auto or that of a known kind of device."""
    if name != "auto" and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: give cpu, cuda, cuda:N, mps or auto")
