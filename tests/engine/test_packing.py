"""Prompts read together: what is read at once, and that every sequence is as if it had been read alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_reference import DEVICES, FP32
from torch import Tensor

from engine import Engine, FusedChunk, Sampling
from engine.packing import PACK_TOKENS, PackedCache, PromptPart, most_at_once, packs
from kv_cache import ModelCache
from model import Config, Transformer
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache
from selective_kv.kernels import triton_backend

CONFIG = Config(61, 32, 2, 4, 2, 48, 1024, head_dim=8)
POLICIES = [
    FullCache(),
    SinkWindowCache(sink_size=3, window_size=20),
    SinkWindowCache(sink_size=3, window_size=20, positions="original"),
    SelectiveCache(sink_size=3, window_size=20),
    SelectiveCache(sink_size=2, window_size=9, k_bits=4, v_bits=4),
]


@dataclass
class Everything(KVCache):
    """A cache of a user's own: `update` alone, which cannot be copied."""

    name: ClassVar[str] = ""

    def allocate(self, shape: Shape) -> None:
        self.kept = [torch.zeros(2, shape.n_kv_head, 0, shape.head_dim) for _ in range(shape.batch)]

    def update(self, row: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        self.kept[row] = torch.cat((self.kept[row][:, :, :start], torch.stack((k, v))), 2)
        return (*self.kept[row], torch.arange(start + k.shape[1]))


def small_model(config: Config = CONFIG, device: str = "cpu") -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).to(device).eval()
    for p in model.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.3)
    return model


MODEL = small_model()


def engine_for(policy: KVCache, batch: int, chunk: int, model: Transformer = MODEL, reach: int | None = None) -> Engine:
    c = model.config
    shape = Shape(batch, c.n_kv_head, c.head_dim, 400, FP32, torch.device("cpu"), reach)
    return Engine(model, ModelCache(policy, c.n_layer, shape), Sampling(temperature=0), prefill_chunk=chunk)


def texts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (n,), generator=generator).tolist() for n in lengths]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 70)), max_size=12), st.integers(1, 40), st.integers(1, 60))
def test_every_token_once_in_the_chunks_it_would_have_alone(
    spans: list[tuple[int, int]], chunk: int, most: int
) -> None:
    starts, ends = [s for s, _ in spans], [s + n for s, n in spans]
    found = packs(starts, ends, chunk, most)
    for pack in found:
        assert len({part.row for part in pack}) == len(pack)
        assert len(pack) == 1 or sum(part.n_token for part in pack) <= min(chunk, most)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        alone = [PromptPart(row, first, min(chunk, end - first)) for first in range(start, end, chunk)]
        assert [part for pack in found for part in pack if part.row == row] == alone


def test_what_is_read_at_once() -> None:
    assert packs([0, 0, 5], [10, 3, 9], 4) == [
        [(0, 0, 4)], [(0, 4, 4)], [(2, 5, 4)], [(0, 8, 2)], [(1, 0, 3)]
    ]  # fmt: skip
    assert packs([0] * 3, [10, 20, 30], 100) == [[(0, 0, 10), (1, 0, 20), (2, 0, 30)]]
    assert most_at_once([10, 20], 100) == 30
    assert most_at_once([10, 20], 15) == 15
    assert most_at_once([9000, 20], 8192) == 8192
    assert most_at_once([300] * 32, 8192) == PACK_TOKENS


@pytest.mark.parametrize("policy", [*POLICIES, Everything()], ids=str)
@settings(deadline=None, max_examples=3)
@given(st.lists(st.integers(1, 150), min_size=2, max_size=4), st.sampled_from([30, 64, 300]), st.integers(0, 9))
@example([170, 1, 40, 150], 300, 0)
@example([5, 1, 9], 4, 1)
def test_a_batch_is_its_prompts_alone(policy: KVCache, lengths: list[int], chunk: int, seed: int) -> None:
    """Two turns of ragged prompts and a few tokens after each: logits and lengths as those of each prompt alone."""
    turns = texts(lengths, seed), texts(lengths[::-1], seed + 100)
    together = engine_for(policy, len(lengths), chunk)
    alone = [engine_for(policy, 1, chunk) for _ in lengths]
    for turn in turns:
        together.read(turn)
        for row, engine in enumerate(alone):
            engine.read([turn[row]])
            slack = 3e-2 if isinstance(policy, SelectiveCache) else 1e-4  # a last bit tips an integer
            assert torch.allclose(together.logits[row], engine.logits[0], rtol=slack, atol=slack)  # type: ignore[index]
    assert together.cache.lengths.tolist() == [sum(n) for n in zip(lengths, lengths[::-1], strict=True)]
    assert together.timing.n_read == 2 * sum(lengths)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("chunk", [50, 300])
def test_neighbours_change_not_a_bit(policy: KVCache, chunk: int) -> None:
    """The same lengths and another's tokens: products are the same, so all that a sequence holds must be."""
    lengths = [160, 1, 45, 151]
    ours, others = texts(lengths, 1), texts(lengths, 2)
    engines = [engine_for(policy, 4, chunk) for _ in range(2)]
    engines[0].read(ours)
    engines[1].read([ours[b] if b in (0, 2) else others[b] for b in range(4)])
    for b in (0, 2):
        held = [engine.cache.held(b, lengths[b]) for engine in engines]
        assert held[0].keys() == held[1].keys() and held[0]
        assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
        assert torch.equal(engines[0].logits[b], engines[1].logits[b])  # type: ignore[index]
    assert not torch.equal(engines[0].logits[3], engines[1].logits[3])  # type: ignore[index]


@pytest.mark.parametrize("policy", [*POLICIES, Everything()], ids=str)
def test_the_same_prompt_is_read_once(policy: KVCache) -> None:
    a, b = texts([170, 60], 3)
    engine = engine_for(policy, 5, 300)
    engine.read([a, b, a, a, b])
    copied = not isinstance(policy, Everything)
    assert engine.timing.n_read == (230 if copied else 3 * 170 + 2 * 60)
    assert engine.cache.lengths.tolist() == [170, 60, 170, 170, 60]
    if copied:
        for row, source in ((2, 0), (3, 0), (4, 1)):
            assert torch.equal(engine.logits[row], engine.logits[source])  # type: ignore[index]
            held = [engine.cache.held(i, len((a, b)[source])) for i in (row, source)]
            assert all(torch.equal(held[0][name], held[1][name]) for name in held[1])
    more = texts([20, 20, 20, 20, 20], 4)
    engine.read(more)  # what follows is each one's own
    for row, first in enumerate((a, b, a, a, b)):
        alone = engine_for(policy, 1, 300)
        alone.read([first])
        alone.read([more[row]])
        assert torch.allclose(engine.logits[row], alone.logits[0], rtol=3e-2, atol=3e-2)  # type: ignore[index]


def test_after_what_differs_the_same_words_are_read_twice() -> None:
    first, words = texts([9, 12], 5), texts([30], 6)[0]
    engine = engine_for(FullCache(), 2, 300)
    engine.read(first)
    engine.read([words, words])
    assert engine.timing.n_read == 9 + 12 + 60
    assert not torch.equal(engine.logits[0], engine.logits[1])  # type: ignore[index]


@pytest.mark.parametrize("policy", POLICIES[:2], ids=str)
def test_a_model_that_slides(policy: KVCache) -> None:
    model = small_model(Config(61, 32, 2, 4, 2, 48, 24, head_dim=8, reach=24, far_context=500))
    prompts = texts([70, 5, 1, 90], 7)
    together = engine_for(policy, 4, 60, model, 24)
    together.read(prompts)
    for row, prompt in enumerate(prompts):
        alone = engine_for(policy, 1, 60, model, 24)
        alone.read([prompt])
        assert torch.allclose(together.logits[row], alone.logits[0], atol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[4]], ids=str)
def test_a_pack_by_fused_kernels(policy: KVCache, device: str) -> None:
    """Parts with and without a past, one of a single token: their last tokens' logits, and what is held."""
    config = Config(61, 32, 1, 2, 1, 48, 1024, head_dim=16)
    model = small_model(config, device)
    shape = Shape(3, 1, 16, 200, FP32, torch.device(device))
    packed, alone = (ModelCache(policy, config.n_layer, shape) for _ in range(2))
    for cache in (packed, alone):
        for layer in cache.layers:
            layer.wrap_kernels(lambda _: triton_backend.TRITON)
    chunk = FusedChunk(model)
    with torch.inference_mode():
        past = torch.randint(61, (1, 145), device=device)
        for cache in (packed, alone):
            chunk(past, cache.sequence(1))
        parts = [PromptPart(0, 0, 30), PromptPart(1, 145, 20), PromptPart(2, 0, 1)]
        ids = torch.randint(61, (1, 51), device=device)
        view = PackedCache(packed, parts)
        got = chunk(ids, view, view.last)
        for i, (row, tokens) in enumerate(zip(range(3), ids.split([30, 20, 1], 1), strict=True)):
            want = chunk(tokens, alone.sequence(row))
            assert torch.allclose(got[0, i], want[0, 0], rtol=3e-2, atol=3e-2)
    assert packed.lengths.tolist() == alone.lengths.tolist() == [30, 165, 1]
