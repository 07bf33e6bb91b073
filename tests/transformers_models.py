"""Tiny random models of transformers, and what `generate` writes with a cache, for the plug-in's tests."""

from __future__ import annotations

import functools
from typing import Any

import families
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from selective_kv.transformers import NAME

PROMPTS = torch.randint(3, families.N_VOCAB, (3, 24), generator=torch.Generator().manual_seed(3))
# Long enough that a selective cache of a small window has quantised some, even if it does so 128 tokens at a time.
LONG = torch.randint(3, families.N_VOCAB, (3, 190), generator=torch.Generator().manual_seed(4))


@functools.cache
def tiny(family: str, implementation: str = NAME, seed: int = 0) -> PreTrainedModel:
    """float32, in eval mode; weights large enough that attention matters. The same ones whatever the implementation."""
    config_class, model_class, changes = families.FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**families._SHAPE | changes)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
    model.set_attn_implementation(implementation)
    model.generation_config.eos_token_id = None
    return model


def write(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, n: int = 40, **settings: Any) -> Tensor:
    """Greedy by default. Returns int64 [batch, prompt and n new tokens]."""
    settings = dict(do_sample=False, pad_token_id=0, max_new_tokens=n) | settings
    return model.generate(ids, past_key_values=cache, **settings)


def alone(model: PreTrainedModel, prompts: list[Tensor], make: Any, n: int = 40, **settings: Any) -> list[list[int]]:
    """The new tokens of each prompt, int64 [token], read in a batch of its own."""
    return [write(model, p[None], make(), n, **settings)[0, len(p) :].tolist() for p in prompts]


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One batch with padding on the left, int64 [batch, longest], and its mask."""
    longest = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
