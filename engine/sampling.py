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

    @property
    def bytes_per_logit(self) -> int:
        """The most memory that a step's logits and `pick` take together, over the number of logits.

        Logits and their float32 copy; divided, masked, as probabilities; sorted, with 8-byte indices and what a GPU's
        sort needs beside its result.
        """
        if self.temperature == 0:
            return 8
        return 48 if self.top_p < 1 else 20

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
        del scaled
        if self.top_p < 1:
            ordered, index = probs.sort(-1, descending=True)
            surplus = ordered.cumsum(-1) - ordered > self.top_p  # the mass before it is enough
            probs.scatter_(-1, index, ordered.masked_fill_(surplus, 0.0))  # each back to its place
            del ordered, index, surplus
        by_prompt = probs.view(-1, self.samples or len(probs), probs.shape[-1])  # [prompt, sample, vocab_size]
        noise = torch.empty_like(by_prompt[0]).exponential_(1, generator=generator)
        token = by_prompt.div_(noise).argmax(-1).flatten()
        return torch.where(logits.isfinite().all(-1), token, BAD)
