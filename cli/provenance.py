"""What a result was made from, by content: a record holds it, and only where it is the same is the record one's own.

A command names files by their names alone, so the same command may have read other weights, another text or another
cache of the user's, or have run elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from checkpoint.fingerprint import fingerprint, sha256_of_file
from common.errors import UserError
from common.program import describe

# Of records, raised when figures of an older program no longer compare with a newer one's: 2 is the first that says
# what a result was made from, and whether its run was whole.
FORMAT = 2


def made_from(
    checkpoint: Path | None, files: Iterable[Path | None], dtype: torch.dtype, device: torch.device,
    reference: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Contents and settings that a command line does not tell.

    checkpoint: None: weights of a generator. files: texts, prompts and plugins, in order; None: not given. reference:
    another checkpoint, which the first is compared with.
    """
    try:
        return {
            "checkpoint": None if checkpoint is None else fingerprint(checkpoint),
            "files": [[path.name, sha256_of_file(path)] for path in files if path is not None and path.is_file()],
            "dtype": str(dtype).removeprefix("torch."),
            "device": device_name(device),
        } | ({} if reference is None else {"reference": fingerprint(reference)})
    except OSError as error:
        raise UserError(describe(error)) from None


def device_name(device: torch.device) -> str:
    """The GPU's own name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
