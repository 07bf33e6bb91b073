"""A model that itself looks back a window only: chunks of any size show what decoding and transformers show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
import selective_kv.sliding as sliding
from checkpoint import load_model, open_checkpoint
from cli import run
from kv_cache import ModelCache, plan
from model import Config, Rope
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

CPU = torch.device("cpu")


def read(
    policy: KVCache, shape: Shape, chunks: Sequence[int], qkv: Sequence[torch.Tensor], reference: bool = False
) -> torch.Tensor:
    """A layer's output for the text q, k, v [1, head, token, head_dim], read in chunks of these sizes."""
    cache = ModelCache(policy, 1, shape)
    if reference:
        cache.layers[0].use_reference()
    frequencies = Config(10, 16, 1, 2, 1, 8, 64).rope_frequencies
    outs, at = [], 0
    for n in chunks:
        chunk = cache.begin(n)
        outs.append(
            cache.layers[0].attend(*(t[:, :, at : at + n] for t in qkv), chunk, Rope(frequencies, chunk.positions))
        )
        cache.advance(chunk)
        at += n
    return torch.cat(outs, 2)


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: int, window: int) -> torch.Tensor:
    p = torch.arange(q.shape[2])
    seen = (p <= p[:, None]) & ((p > p[:, None] - window) | (p < sink))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return ((q @ k.transpose(-1, -2)) * q.shape[3] ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1) @ v


@settings(max_examples=60)
@given(
    sink=st.integers(0, 9),
    window=st.integers(1, 12),
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    narrow=st.sampled_from([1, 128]),
    seed=st.integers(0, 99),
)
def test_a_chunk_sees_what_decoding_sees(sink: int, window: int, chunks: list[int], narrow: int, seed: int) -> None:
    """By blocks without a mask and by the mask; chunks that begin in the sinks, in the window and past both."""
    torch.manual_seed(seed)
    n = sum(chunks)
    qkv = [torch.randn(1, heads, n, 8, dtype=torch.float64) for heads in (2, 1, 1)]
    shape = Shape(1, 1, 8, n, torch.float64, CPU, reach=window)
    before, sliding.NARROW = sliding.NARROW, narrow
    try:
        got = read(SinkWindowCache(sink, window, "original"), shape, chunks, qkv)
        assert (got - by_definition(*qkv, sink, window)).abs().max() < 1e-6
        assert (read(FullCache(), shape, chunks, qkv) - by_definition(*qkv, 0, window)).abs().max() < 1e-6
        for positions in ("original", "cache"):
            policy = SinkWindowCache(sink, window + 3, positions)  # no wider than the model's own
            one = read(policy, shape, [1] * n, qkv)
            assert (read(policy, shape, chunks, qkv) - one).abs().max() < 1e-5, positions
            assert (read(policy, shape, chunks, qkv, reference=True) - one).abs().max() < 1e-5, positions
    finally:
        sliding.NARROW = before


def test_without_a_reach_nothing_is_another() -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(1, heads, 40, 8) for heads in (2, 1, 1)]
    shape = Shape(1, 1, 8, 40, torch.float32, CPU)
    wide = dataclasses.replace(shape, reach=40)
    for policy in (FullCache(), SinkWindowCache(3, 40, "original")):
        for chunks in ([40], [7, 20, 13], [1] * 40):
            a, b = (read(policy, s, chunks, qkv) for s in (shape, wide))
            assert (a - b).abs().max() < 1e-5


def test_a_cache_that_shows_more_is_refused_past_the_reach() -> None:
    shape = Shape(1, 1, 8, 40, torch.float32, CPU, reach=16)
    for make in (lambda p: ModelCache(p, 1, shape), lambda p: plan(p, 1, shape)):
        with pytest.raises(ValueError, match="attends to the last 16 tokens only, which quantize_kv does not keep to"):
            make(SelectiveCache(2, 4))
    ModelCache(SelectiveCache(2, 4), 1, dataclasses.replace(shape, capacity=16))
    assert sum(plan(FullCache(), 1, shape).values()) == 16 * 2 * 8 * 4


@pytest.mark.parametrize("policy", [FullCache(), SinkWindowCache(2, 99), SinkWindowCache(2, 14)])
def test_less_room_than_a_query_sees_is_no_endless_cache(policy: KVCache) -> None:
    """More tokens than room, and less room than the window: a smaller window was seen, and nobody was told."""
    for capacity, endless in ((15, False), (18, True)):
        cache = ModelCache(policy, 1, Shape(1, 1, 8, capacity, torch.float32, CPU, reach=16))
        assert cache.endless == endless
        if endless:
            cache.begin(19)
            continue
        with pytest.raises(ValueError, match="16 tokens do not fit a cache made for 15"):
            cache.begin(16)


@pytest.mark.parametrize("family", ["mistral-sliding", "qwen2-sliding"])
@pytest.mark.parametrize("chunks", [[150], [1] * 150, [60, 1, 70, 19]], ids=["prefill", "decode", "chunks"])
def test_logits_equal_transformers_past_the_window(family: str, chunks: list[int], tmp_path: Path) -> None:
    """Mistral 0.1: prompts past the window were refused, and chunks were not its attention."""
    reference = families.make(family, tmp_path)
    tokens = torch.randint(97, (1, 150), generator=torch.Generator().manual_seed(1))
    want = families.logits_of(reference, tokens)
    checkpoint = open_checkpoint(tmp_path)
    config, model = checkpoint.config, load_model(checkpoint, CPU, torch.float32)
    assert (config.reach, config.context, config.far_context) == (32, 32, 256)
    shape = Shape(1, config.n_kv_head, config.head_dim, 150, torch.float32, CPU, config.reach)
    for policy in (FullCache(), SinkWindowCache(0, 32, "original"), SinkWindowCache(0, 99)):
        cache = ModelCache(policy, config.n_layer, shape)
        with torch.inference_mode():
            got = torch.cat([model(part, cache) for part in tokens.split(chunks, 1)], 1)
        assert (got - want).abs().max() < 1e-4, policy


def test_generate_goes_on_past_the_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt is three windows long, and the text runs past the trained context: no cache but these two can."""
    reference = families.make("mistral-sliding", tmp_path)
    argv = ["--checkpoint_path", str(tmp_path), "--temperature", "0", "--ignore_eos", "--prompt", "100"]
    prompt = torch.randint(97, (100,), generator=torch.Generator().manual_seed(1234))[None]
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt))
    want = reference.generate(prompt, **options)[0, 100:]
    for cache in (["full"], ["compress_kv", "--sink_size", "0", "--window_size", "32", "--positions", "original"]):
        args = generate.make_parser().parse([*argv, "--max_new_tokens", "40", "--prefill_chunk", "33", *cache])
        job = run.prepare(args, run.chosen_policy(args))
        engine, _ = run.build(job)
        assert [row[0] for row in engine.generate(job.prompts, 40)] == want.tolist()
    capsys.readouterr()
    generate.main([*argv, "--max_new_tokens", "300"])
    assert "tokens/s" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main([*argv, "quantize_kv", "--sink_size", "2", "--window_size", "4"])
    assert "the prompt has 100 tokens, 68 more than the model's context of 32" in capsys.readouterr().err
