"""When a decode step is captured, and that doing so amid a text leaves no trace. (On a GPU: test_gpu.py.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import Engine, Sampling
from kv_cache import ModelCache
from model import Config, Transformer
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

CONFIG = Config(97, 64, 2, 2, 1, 48, 512, head_dim=64)
POLICIES: list[KVCache] = [
    FullCache(), SelectiveCache(3, 12), SelectiveCache(0, 1, 4, 4), SinkWindowCache(3, 12), SinkWindowCache(0, 5)
]  # fmt: skip


def new_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    for p in model.parameters():
        torch.nn.init.ones_(p) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.3)
    return model


MODEL = new_model()


def engine_of(policy: KVCache, batch: int = 1) -> Engine:
    shape = Shape(batch, 1, 64, 320, torch.float32, torch.device("cpu"))
    return Engine(MODEL, ModelCache(policy, CONFIG.n_layer, shape), Sampling(1.0, seed=5))


@given(
    policy=st.sampled_from(POLICIES),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    steps=st.integers(0, 3),
)
def test_warming_up_leaves_no_trace(policy: KVCache, lengths: list[int], steps: int) -> None:
    """At any length, also where the step closes a tile or a token leaves the window; and the same numbers are drawn."""
    prompts = [torch.randint(97, (n,)).tolist() for n in lengths]
    plain, warmed = engine_of(policy, len(lengths)), engine_of(policy, len(lengths))
    for engine in (plain, warmed):
        engine.read(prompts)
        for _ in range(steps):
            engine.step()
    with torch.inference_mode():
        warmed._warm_up()
    for _ in range(4):
        plain.step()
        warmed.step()
        assert torch.equal(plain.tokens, warmed.tokens)
    assert torch.equal(plain.cache.lengths, warmed.cache.lengths)
    for one, other in zip(plain.cache.layers, warmed.cache.layers, strict=True):
        for b, n in enumerate(lengths):
            held, also = (layer.held(b, n + steps + 4) or {} for layer in (one, other))
            assert held.keys() == also.keys() and all(torch.equal(held[name], also[name]) for name in held)


class Recorded:
    """Stands for a CUDA graph of a step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def replay(self) -> None:
        self.engine._step()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets a CPU's step be captured; what happened, in order."""
    happened: list[Any] = []

    def capture(self: Engine) -> None:
        happened.append("capture")
        self.graph, self.to_capture = Recorded(self), False  # type: ignore[assignment]

    monkeypatch.setattr(Engine, "_capture", capture)
    monkeypatch.setattr("selective_kv.region_cache.RegionCache.capturable", True)
    return happened


def test_the_first_token_does_not_wait_for_a_capture(seen: list[Any]) -> None:
    engine = engine_of(FullCache())
    engine.lag = 2  # as on a GPU, where steps are queued before their tokens are seen
    assert seen == [] and "CUDA graph" in engine.step_path and engine.captures
    for row in engine.generate([[1, 2, 3]], 4):
        seen.append(row)
    assert seen[1] == "capture" and seen.count("capture") == 1 and len(seen) == 5
    engine.reset()
    with pytest.raises(AssertionError, match="nothing has been read yet"):  # a forgotten text's logits chose a token
        next(engine.generate([[]], 4))
    assert [row for row in engine.generate([[1, 2, 3]], 4)] == [seen[0], *seen[2:]] and seen.count("capture") == 1


def test_more_than_there_is_room_for_is_refused_before_anything_is_read() -> None:
    """A step does not look: it would write into the next sequence's memory."""
    engine = engine_of(FullCache())
    room = engine.cache.shape.capacity
    with pytest.raises(ValueError, match=f"{room + 1} tokens do not fit a cache made for {room}"):
        next(engine.generate([[1, 2, 3]], room - 1))
    assert engine.cache.lengths.tolist() == [0]
    assert len(list(engine.generate([[1, 2, 3]], room - 2))) == room - 2


def test_a_text_of_one_token_needs_no_capture(seen: list[Any]) -> None:
    assert len(list(engine_of(FullCache()).generate([[1, 2, 3]], 1))) == 1 and seen == []


@dataclass
class Counting(FullCache):
    """A user's own, which may keep more than it says."""

    name: ClassVar[str] = ""


def test_a_cache_of_ones_own_is_captured_before_it_has_read(seen: list[Any]) -> None:
    """`reset` then undoes what its steps have done."""
    engine = engine_of(Counting())
    assert seen == ["capture"]
    list(engine.generate([[1, 2, 3]], 4))
    assert seen == ["capture"]
