"""Tokens through a model and its cache: prefill, the decode step, sampling, and the clock beside them."""

from engine.engine import LAG, PREFILL_CHUNK, Engine, Timing, chunk_size
from engine.fused import FusedStep
from engine.fused_chunk import FusedChunk
from engine.sampling import BAD, LEAST_TEMPERATURE, Sampling

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
