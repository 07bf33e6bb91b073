"""The Triton twins of `kernels/eager.py`: same functions, same signatures, for a CUDA device."""

from __future__ import annotations

from kernels.triton_decode import decode_attention
from kernels.triton_store import append

__all__ = ["append", "decode_attention"]
