"""Selective KV quantization: KV caches that keep what attention needs in full precision and the rest in fewer bits.

    from selective_kv import FullCache, SelectiveCache, SinkWindowCache    # the three caches
    from selective_kv import KVCache, knob                                 # to write a fourth

A cache is one layer's memory of past keys and values; `cache.py` is its contract. The library depends on torch (and
on Triton where there is a GPU), knows nothing of any model, and never prints. torch is imported with the first of
these names that needs it: `selective_kv.settings` does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from selective_kv._version import __version__
from selective_kv.settings import knob

if TYPE_CHECKING:
    from selective_kv.cache import Chunk, KVCache, RopeLike, Shape, caches
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
_HOMES = {"FullCache": "full", "SelectiveCache": "selective", "SinkWindowCache": "sink_window"}  # the rest: cache

if not TYPE_CHECKING:  # a type checker is to know these names, and no others

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'cache')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
