"""How the next token is chosen from a step's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels import step_kernels
from engine.settings import LEAST_TEMPERATURE, SamplingSettings

__all__ = ["BAD", "LEAST_TEMPERATURE", "Sampling"]
BAD = -1  # what a step returns in place of a token when its logits hold a NaN or an infinity; `greedy` says so too


class Sampling(SamplingSettings):
    """How the next token is chosen from a step's logits: the settings, and the choice."""

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
