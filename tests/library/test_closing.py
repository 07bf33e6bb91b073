"""What a decode step pushes out of the window is quantised for all layers at once (closing.py)."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from kv_cache import ModelCache
from model import Rope
from selective_kv import SelectiveCache, Shape
from selective_kv.formats import TILE
from selective_kv.kernels import pytorch as eager
from selective_kv.regions import LayerGroup, layer_offsets

FREQUENCIES = 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)


class OwnWay(SelectiveCache):
    """What it does with its memory is not known."""

    name: ClassVar[str] = ""  # it is not the one that commands find


@pytest.mark.parametrize("alone", [[], [1]], ids=["all", "but one"])
def test_a_step_closes_the_tiles_of_all_layers_at_once(alone: list[int]) -> None:
    """Once before the first layer, though memory has moved meanwhile; each by itself where one has another way. They
    close the same tiles."""
    sink, window, start = 3, 20, 23 + TILE - 2
    shape = Shape(2, 2, 8, 400, torch.float32, torch.device("cpu"))
    called: list[tuple[int, int]] = []

    def close(group: LayerGroup, positions: Tensor) -> None:
        called.append((len(group.layers), len(positions)))
        eager.close(group, positions)

    cache = ModelCache(SelectiveCache(sink, window), 3, shape)
    cache.layers = [OwnWay(sink, window) if i in alone else layer for i, layer in enumerate(cache.layers)]
    want = ModelCache(SelectiveCache(sink, window), 3, shape)
    for i, (mine, theirs) in enumerate(zip(cache.layers, want.layers, strict=True)):
        if i in alone:
            mine.allocate(shape)
        torch.manual_seed(i)
        mine.fill_randomly()
        for target, source in zip(theirs.storage() or [], mine.storage() or [], strict=True):
            target.copy_(source)
        theirs.use_reference()
        mine.wrap_kernels(lambda kernels: dataclasses.replace(kernels, close=close))
    for c in (cache, want):
        c.lengths.copy_(torch.tensor([start, start - 1]))
    for turn in range(4):
        q, (k, v) = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 2, 1, 8)
        if turn == 2:
            moved = cache.layers[0]
            assert isinstance(moved, SelectiveCache)
            before = moved.regions.k
            moved.regions = moved.regions._replace(k=before.clone())
            before.fill_(1e3)  # what a table of the old memory would quantise
        for c in (cache, want):
            chunk = c.begin(1)
            for layer in c.layers:
                layer.attend(q, k, v, chunk, Rope(FREQUENCIES, chunk.positions))
            c.advance(chunk)
    for mine, theirs in zip(cache.layers, want.layers, strict=True):
        for a, b in zip(mine.storage() or [], theirs.storage() or [], strict=True):
            assert torch.equal(a, b)
    assert called == ([(3, 2)] * 4 if not alone else [(1, 2)] * 12)
    cache.sequence(1).begin(1)
    assert called[-1] == ((3, 1) if not alone else (1, 2))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_cache_closes_the_tiles_in_its_own_memory(copied: Callable[[ModelCache], ModelCache]) -> None:
    """The table of where layers' memory is, which a launch goes by, is none of the original's."""
    seen: list[LayerGroup] = []

    def close(group: LayerGroup, positions: Tensor) -> None:
        seen.append(group)

    original = ModelCache(SelectiveCache(3, 20), 3, Shape(1, 2, 8, 400, torch.float32, torch.device("cpu")))
    original.begin(1)
    original.closing.groups[0].offsets.add_(16)  # distances are others there, whatever the allocator does
    cache = copied(original)
    for layer in cache.layers:
        assert isinstance(layer, SelectiveCache)
        layer.wrap_kernels(lambda kernels: dataclasses.replace(kernels, close=close))
    cache.begin(1)
    assert [regions.k.data_ptr() for regions in seen[0].layers] == [
        layer.regions.k.data_ptr() for layer in cache.layers if isinstance(layer, SelectiveCache)
    ]
    assert seen[0].offsets.equal(layer_offsets(seen[0].layers))
