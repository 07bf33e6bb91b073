"""The cache of a whole model: one `KVCache` for each layer, the lengths that they share, the memory that they will
take; and caches made from their settings as text (`kv_settings.py`).
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

    The whole batch decodes together, one token for each sequence. `sequence(b)` is a view of sequence b alone, into
    which a prompt of any length can be read.
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
        self.start: int | None = None  # the sequences' length, if the host knows it without asking the device

    def expect_biases(self, biases: Sequence[Tensor | None], frequencies: Tensor) -> None:
        """`KVCache.expect_bias` of every layer whose keys have one. Waits for the device."""
        for layer, bias in zip(self.layers, biases, strict=True):
            if bias is not None:
                layer.expect_bias(bias, frequencies)

    @property
    def endless(self) -> bool:
        """Whether a sequence may be longer than the model's context, and than the capacity."""
        return self.policy.endless_in(self.shape.capacity, self.shape.reach)

    def sequence(self, b: int, start: int | None = None) -> ModelCache:
        """A view of one of the batch's sequences. start: its length, if the caller knows it."""
        view = copy.copy(self)
        view.start = start
        view.lengths = self.lengths[b : b + 1]
        view.row = self.row + b
        return view

    def begin(self, n_token: int) -> Chunk:
        """Prepare to read a chunk of n_token tokens a sequence. Returns what `attend` must be told of it.

        One token (decoding): the tiles that it pushes out of the window are quantised here, in all layers at once.
        Nothing waits for the device, so that the step can be captured; the caller has called `check_room`.
        More tokens: the sequences must all have the same length. Raises ValueError if they do not, or if the chunk does
        not fit.
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
    """Raises ValueError if a cache would show a query more tokens than the model's own sliding window has."""
    if shape.reach is not None and shape.capacity > shape.reach and not policy.slides:
        raise ValueError(
            f"the model attends to the last {shape.reach} tokens only, which {policy.name or type(policy).__name__} "
            f"does not keep to: at most {shape.reach} tokens, not {shape.capacity}"
        )


def plan(policy: KVCache, n_layer: int, shape: Shape) -> dict[str, int]:
    """Bytes by region that the caches of n_layer layers will need, found by allocating one on the meta device."""
    require_slides(policy, shape)
    layer = dataclasses.replace(policy)
    layer.allocate(dataclasses.replace(shape, device=torch.device("meta")))
    return {region: n * n_layer for region, n in layer.nbytes().items()}


def bits_per_element(policy: KVCache, head_dim: int) -> dict[str, float] | None:
    """Bits of a quantised element with its share of the scales, for "keys" and "values". None: the cache quantises
    nothing, or does not say what it does."""
    seen = policy.sees()
    if seen is None or seen.formats is None:
        return None
    return {name: f.bits_per_element(head_dim) for name, f in zip(("keys", "values"), seen.formats, strict=True)}


def make_policy(name: str, knobs: Mapping[str, Any]) -> KVCache:
    """The cache called `name`; the values of its knobs may be text. Raises UserError."""
    caches()  # imports the cache classes: without them this would be the settings alone
    return cast(KVCache, make_settings(name, knobs))


def parse_policy(text: str) -> KVCache:
    """A cache setting in one word: "full", "quantize_kv:sink_size=16,window_size=32". Raises UserError."""
    caches()
    return cast(KVCache, parse_settings(text))
