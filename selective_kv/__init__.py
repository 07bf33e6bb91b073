"""Selective KV quantization: KV caches that keep what attention needs in full precision and the rest in fewer bits.

    from selective_kv import FullCache, SelectiveCache, SinkWindowCache    # the three caches
    from selective_kv import KVCache, knob                                 # to write a fourth

A cache is one layer's memory of past keys and values; `cache.py` is its contract. The library depends on torch (and
on Triton where there is a GPU), knows nothing of any model, and never prints.
"""

from selective_kv._version import __version__
from selective_kv.cache import Chunk, KVCache, RopeLike, Shape, caches, knob
from selective_kv.full import FullCache
from selective_kv.selective import SelectiveCache
from selective_kv.sink_window import SinkWindowCache

__all__ = [
    "Chunk",
    "FullCache",
    "KVCache",
    "RopeLike",
    "SelectiveCache",
    "Shape",
    "SinkWindowCache",
    "__version__",
    "caches",
    "knob",
]
