"""Scoring a text after another one that a saved cache holds: what the long one has left is read from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from engine import Engine, Sampling
from engine.saved import SavedCache
from evaluation.scoring import ParallelCache
from evaluation.subject import Subject, adopt
from kv_cache import ModelCache, format_policy
from selective_kv import FullCache, KVCache


class After:
    """The text of a saved full cache, stored as every setting would have stored it, and tokens read after it."""

    def __init__(self, path: Path, subject: Subject, longest: int) -> None:
        """longest: tokens of a window. Raises UserError."""
        self.subject, saved = subject, SavedCache(path)
        full = FullCache()
        n = self.n_token = len(saved.tokens[0])
        shape = subject.shape(n)
        saved.require(subject.config, full, shape)
        if n + longest > subject.config.context:
            most = subject.config.context
            raise UserError(f"{path}: {n} tokens and a window of {longest} are past the model's context of {most}")
        for policy in subject.policies:
            if not ParallelCache.can(policy):
                raise UserError(f"{format_policy(policy)}: what it keeps of a saved full cache is not known")
        if subject.reference is not subject.model:
            raise UserError("--load_cache holds what one set of weights made: not with --weights beside others")
        self.cache = ModelCache(full, subject.config.n_layer, shape)
        saved.load(Engine(subject.model, self.cache, Sampling(temperature=0), capture=False), [n])

    @torch.inference_mode()
    def read(self, policy: KVCache, tokens: Tensor) -> Tensor:
        """What `model.head` turns into logits, [token, dim], of tokens read one by one after the saved text."""
        model = self.subject.model
        shape = dataclasses.replace(self.cache.shape, capacity=self.n_token + len(tokens))
        cache: Any = ModelCache(policy, model.config.n_layer, shape)
        cache.expect_biases(model.key_biases(), model.frequencies)
        adopt(cache, self.cache, self.n_token)
        return torch.cat([model.read(token[None, None], cache)[0] for token in tokens])
