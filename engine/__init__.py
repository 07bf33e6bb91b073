"""Tokens through a model and its cache: prefill, the decode step, sampling, and the clock beside them.

What is named here is imported when it is first asked for: `engine.settings` and `engine.link` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from engine.settings import LEAST_TEMPERATURE, PREFILL_CHUNK

if TYPE_CHECKING:
    from engine.engine import LAG, Engine, Timing, chunk_size
    from engine.fused import FusedStep
    from engine.fused_chunk import FusedChunk
    from engine.sampling import BAD, Sampling

__all__ = [
    "BAD",
    "LAG",
    "LEAST_TEMPERATURE",
    "PREFILL_CHUNK",
    "Engine",
    "FusedChunk",
    "FusedStep",
    "Sampling",
    "Timing",
    "chunk_size",
]
_HOMES = {  # the rest: engine.engine
    "FusedChunk": "fused_chunk",
    "FusedStep": "fused",
    "BAD": "sampling",
    "Sampling": "sampling",
}

if not TYPE_CHECKING:  # a type checker is to know these names, and no others

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"engine.{_HOMES.get(name, 'engine')}"), name)
