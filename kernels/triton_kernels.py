"""The Triton twins of `kernels/eager.py`: same functions, same signatures, for a CUDA device."""

from __future__ import annotations

from kernels.eager import causal_attention
from kernels.triton_decode import decode_attention
from kernels.triton_history import history_attention
from kernels.triton_store import append, evict, store_chunk

NAME = "Triton kernels"

__all__ = ["NAME", "append", "causal_attention", "decode_attention", "evict", "history_attention", "store_chunk"]
