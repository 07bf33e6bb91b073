"""The cache of a whole model: one `KVCache` a layer, the lengths that they share, and the memory that it will take."""

from __future__ import annotations

import copy
import dataclasses

import torch

from selective_kv import Chunk, KVCache, Shape


class ModelCache:
    """One cache per layer, and on the device how many tokens each sequence has: int64 `lengths` [batch].

    The whole batch decodes a token at a time; `slot(b)` is the same cache seen as sequence b alone, to
    read a prompt of its own length into it.
    """

    def __init__(self, policy: KVCache, n_layer: int, shape: Shape) -> None:
        self.policy = policy
        self.shape = shape
        self.layers: list[KVCache] = [dataclasses.replace(policy) for _ in range(n_layer)]
        for layer in self.layers:
            layer.allocate(shape)
        self.lengths = torch.zeros(shape.batch, dtype=torch.int64, device=shape.device)
        self.row = 0

    def slot(self, b: int) -> ModelCache:
        view = copy.copy(self)
        view.lengths = self.lengths[b : b + 1]
        view.row = self.row + b
        return view

    def begin(self, n_token: int) -> Chunk:
        """The chunk about to be read. Raises ValueError if it does not fit.

        One token: no look at the device, so that decoding can be captured; the caller has made sure that
        it fits. More: the sequences must all have the same length.
        """
        if n_token == 1:
            return Chunk(self.lengths[:, None], self.row)
        lengths = self.lengths.tolist()
        if len(set(lengths)) > 1:
            raise ValueError("sequences of different lengths read their chunks one by one, by slot()")
        self.check_room(lengths[0] + n_token)
        own = torch.arange(n_token, device=self.lengths.device)
        return Chunk(self.lengths[:, None] + own, self.row, lengths[0])

    def check_room(self, n_token: int) -> None:
        """Raises ValueError if a sequence of n_token tokens is past the capacity."""
        if n_token > self.shape.capacity and not self.policy.endless:
            raise ValueError(f"{n_token} tokens do not fit a cache made for {self.shape.capacity}")

    def advance(self, chunk: Chunk) -> None:
        self.lengths += chunk.positions.shape[1]

    def reset(self) -> None:
        self.lengths.zero_()
        for layer in self.layers:
            layer.reset()

    def nbytes(self) -> dict[str, int]:
        """Bytes by region, over all layers."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for region, n in layer.nbytes().items():
                total[region] = total.get(region, 0) + n
        return total


def plan(policy: KVCache, n_layer: int, shape: Shape) -> dict[str, int]:
    """The bytes by region that a cache will need, found by allocating it on the meta device."""
    layer = dataclasses.replace(policy)
    layer.allocate(dataclasses.replace(shape, device=torch.device("meta")))
    return {region: n * n_layer for region, n in layer.nbytes().items()}
