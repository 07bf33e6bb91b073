"""What command lines say of an engine, and what values it may have. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.errors import UserError

PREFILL_CHUNK = 8192  # tokens of a prompt read at once; bounds the activations of a long one
SUMS = ("auto", "backend")  # how ranks add up
LEAST_TEMPERATURE = 1e-4  # above 0: logits over less would overflow


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. temperature 0: the most likely one. top_k 0, top_p 1: no limit.

    samples: the batch is so many continuations of each prompt, one prompt after the other. The i-th continuation of
    every prompt meets the same random numbers, so a prompt gets the tokens that it gets alone, whatever else is in the
    batch. 0: every sequence meets its own.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234
    samples: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(f"--temperature must be 0 or at least {LEAST_TEMPERATURE:g}, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top_k must not be negative, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise UserError(f"--seed must fit 64 bits, not {self.seed}")
