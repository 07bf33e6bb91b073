"""How the next token is chosen from a step's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from engine.kernels import step_kernels

LEAST_TEMPERATURE = 1e-4  # above 0: logits over less would overflow
BAD = -1  # what a step returns in place of a token when its logits hold a NaN or an infinity; `greedy` says so too


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the most likely one. top_k 0, top_p 1: no limit."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(f"--temperature must be 0 or at least {LEAST_TEMPERATURE:g}, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top_k must not be negative, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise UserError(f"--seed must fit 64 bits, not {self.seed}")

    def pick(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits: [batch, vocab_size]. Returns int64 [batch]; BAD where a row is not finite.

        Sampling divides the probabilities by exponential noise and takes the largest, which draws from
        them without waiting for the device (as gpt-fast does).
        """
        if self.temperature == 0:
            return step_kernels(logits.device).greedy(logits)
        scaled = logits.float() / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, float("-inf"))
        probs = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, index = probs.sort(-1, descending=True)
            surplus = ordered.cumsum(-1) - ordered > self.top_p  # the mass before it is enough
            probs = probs.masked_fill(surplus.gather(-1, index.argsort(-1)), 0.0)
        noise = torch.empty_like(probs).exponential_(1, generator=generator)
        token = (probs / noise).argmax(-1)
        return torch.where(logits.isfinite().all(-1), token, BAD)
