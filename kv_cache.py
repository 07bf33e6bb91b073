"""The cache of a whole model: one `KVCache` a layer, the lengths that they share, the memory that it will take, and
the caches that settings spell (`kv_settings.py`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kv_settings import format_policy, make_settings, parse_settings
from selective_kv import Chunk, KVCache, Shape, caches
from selective_kv.closing import Closing
from selective_kv.score_error import layer_errors

__all__ = ["ModelCache", "format_policy", "make_policy", "parse_policy", "plan", "require_slides"]


class ModelCache:
    """One cache per layer, and on the device how many tokens each sequence has: int64 `lengths` [batch].

    The whole batch decodes a token at a time; `sequence(b)` is the same cache seen as sequence b alone, to
    read a prompt of its own length into it.
    """

    def __init__(self, policy: KVCache, n_layer: int, shape: Shape) -> None:
        self.policy = policy
        self.shape = shape
        require_slides(policy, shape)
        self.layers: list[KVCache] = [dataclasses.replace(policy) for _ in range(n_layer)]
        for layer in self.layers:
            layer.allocate(shape)
        self.lengths = torch.zeros(shape.batch, dtype=torch.int64, device=shape.device)
        self.row = 0
        self.closing = Closing()
        self.start: int | None = None  # how long the sequences are, where that need not be asked of the device

    def expect_biases(self, biases: Sequence[Tensor | None], frequencies: Tensor) -> None:
        """`KVCache.expect_bias` of every layer whose keys have one. Waits for the device."""
        for layer, bias in zip(self.layers, biases, strict=True):
            if bias is not None:
                layer.expect_bias(bias, frequencies)

    @property
    def endless(self) -> bool:
        """Whether a sequence may be longer than the model's context."""
        return self.policy.endless_with(self.shape.reach)

    def sequence(self, b: int, start: int | None = None) -> ModelCache:
        """One of a batch's sequences, as a cache of its own. start: its length, where the caller knows it."""
        view = copy.copy(self)
        view.start = start
        view.lengths = self.lengths[b : b + 1]
        view.row = self.row + b
        return view

    def begin(self, n_token: int) -> Chunk:
        """The chunk about to be read. Raises ValueError if it does not fit.

        One token: what it pushes out of the window is quantised now, in all layers. No look at the device, so that
        decoding can be captured; the caller has made sure that it fits. More: the sequences must all have the same
        length.
        """
        if n_token == 1:
            return self.closing(self.layers, Chunk(self.lengths[:, None], self.row))
        lengths = [self.start] if self.start is not None else self.lengths.tolist()
        if len(set(lengths)) > 1:
            raise ValueError("sequences of different lengths read their chunks one by one, by sequence()")
        self.check_room(lengths[0] + n_token)
        own = torch.arange(n_token, device=self.lengths.device)
        return Chunk(self.lengths[:, None] + own, self.row, lengths[0])

    def check_room(self, n_token: int) -> None:
        """Raises ValueError if a sequence of n_token tokens is past the capacity."""
        if n_token > self.shape.capacity and not self.endless:
            raise ValueError(f"{n_token} tokens do not fit a cache made for {self.shape.capacity}")

    def advance(self, chunk: Chunk) -> None:
        self.lengths += chunk.positions.shape[1]
        self.start = None

    def reset(self) -> None:
        self.lengths.zero_()
        for layer in self.layers:
            layer.reset()

    def held(self, b: int, n_token: int) -> dict[str, Tensor]:
        """Views of all that sequence b holds after n_token tokens, over all layers. Raises ValueError if its caches do
        not say.
        """
        found: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            views = layer.held(self.row + b, n_token)
            if views is None:
                raise ValueError(f"{self.policy.name} does not say what it holds (KVCache.held), and cannot be saved")
            found |= {f"layers.{i}.{name}": view for name, view in views.items()}
        return found

    def score_errors(self, k_bits: int | None = None) -> list[float] | None:
        """`KVCache.score_error` of every layer, over all sequences. Waits for the device. None: nothing to measure."""
        return layer_errors(self.layers, self.lengths.tolist(), self.row, k_bits)

    def nbytes(self) -> dict[str, int]:
        """Bytes by region, over all layers."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for region, n in layer.nbytes().items():
                total[region] = total.get(region, 0) + n
        return total


def require_slides(policy: KVCache, shape: Shape) -> None:
    """Raises ValueError where a cache would show a query more than the model's own attention looks back to."""
    if shape.reach is not None and shape.capacity > shape.reach and not policy.slides:
        raise ValueError(
            f"the model attends to the last {shape.reach} tokens only, which {policy.name or type(policy).__name__} "
            f"does not keep to: at most {shape.reach} tokens, not {shape.capacity}"
        )


def plan(policy: KVCache, n_layer: int, shape: Shape) -> dict[str, int]:
    """The bytes by region that a cache will need, found by allocating it on the meta device."""
    require_slides(policy, shape)
    layer = dataclasses.replace(policy)
    layer.allocate(dataclasses.replace(shape, device=torch.device("meta")))
    return {region: n * n_layer for region, n in layer.nbytes().items()}


def bits_per_element(policy: KVCache, head_dim: int) -> dict[str, float] | None:
    """Of what a cache stores in fewer bits, scales included, by "keys" and "values". None: it stores nothing so, or
    does not say."""
    seen = policy.sees()
    if seen is None or seen.formats is None:
        return None
    return {name: f.bits_per_element(head_dim) for name, f in zip(("keys", "values"), seen.formats, strict=True)}


def make_policy(name: str, knobs: Mapping[str, Any]) -> KVCache:
    """The cache called `name`, with values given as text or as they are. Raises UserError."""
    caches()  # they are imported: what is made are caches, not their settings alone
    return cast(KVCache, make_settings(name, knobs))


def parse_policy(text: str) -> KVCache:
    """A cache setting in one word: "full", "quantize_kv:sink_size=16,window_size=32". Raises UserError."""
    caches()
    return cast(KVCache, parse_settings(text))
