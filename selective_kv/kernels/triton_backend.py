"""The contract in Triton, for a CUDA device."""

from __future__ import annotations

from selective_kv.kernels.contract import AttentionKernels
from selective_kv.kernels.decode import decode_attention
from selective_kv.kernels.history import history_attention
from selective_kv.kernels.store import append, close, evict, store_chunk

__all__ = ["TRITON", "append", "close", "decode_attention", "evict", "history_attention", "store_chunk"]

TRITON = AttentionKernels(
    name="Triton kernels",
    captures=True,
    append=append,
    close=close,
    decode_attention=decode_attention,
    history_attention=history_attention,
    evict=evict,
    store_chunk=store_chunk,
)
