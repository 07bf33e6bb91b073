"""The Triton twins of `kernels/eager.py`: same functions, same signatures, for a CUDA device."""

from __future__ import annotations

from kernels.triton_decode import decode_attention
from kernels.triton_history import history_attention
from kernels.triton_linear import linear, qkv, rotate_qk
from kernels.triton_pick import greedy
from kernels.triton_store import append, evict, store_chunk

NAME = "Triton kernels"

__all__ = [
    "NAME",
    "append",
    "decode_attention",
    "evict",
    "greedy",
    "history_attention",
    "linear",
    "qkv",
    "rotate_qk",
    "store_chunk",
]
