"""The model against transformers, through the real caches, and the seam between model and cache."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from families import FAMILIES, make

from checkpoint import load_model, open_checkpoint
from kv_cache import ModelCache
from model import CONFIGS, Config, Rope, RopeScaling, Transformer, with_signs
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

CPU = torch.device("cpu")
N_TOKEN = 80


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "chunks",
    [[N_TOKEN], [1] * N_TOKEN, [33, 1, 20, *[1] * 26]],
    ids=["prefill", "decode", "chunked prefill, then decode"],
)
def test_logits_equal_transformers(family: str, chunks: list[int], tmp_path: Path) -> None:
    """Every family, and every cache that still holds all tokens, at float32 within 1e-4."""
    reference = make(family, tmp_path)
    tokens = torch.randint(97, (1, N_TOKEN), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = reference(tokens).logits
    checkpoint = open_checkpoint(tmp_path, None)
    model = load_model(checkpoint, CPU, torch.float32)
    config = checkpoint.config
    shape = Shape(1, config.n_kv_head, config.head_dim, N_TOKEN + 4, torch.float32, CPU)
    policies: list[KVCache] = [FullCache(), SelectiveCache(3, N_TOKEN), SinkWindowCache(3, N_TOKEN)]
    for policy in policies:
        cache = ModelCache(policy, config.n_layer, shape)
        with torch.inference_mode():
            got = torch.cat([model(part, cache) for part in tokens.split(chunks, 1)], 1)
        assert (got - want).abs().max() < 1e-4, policy


def test_the_model_never_learns_what_the_cache_keeps() -> None:
    """One seam: the words of a cache's policy do not occur in model.py."""
    assert re.findall(r"(?i)quant|int8|int4|sink|window", (ROOT / "model.py").read_text()) == []


LIBRARY = {"selective_kv"}
MODEL = {"common", "model"}
LOADS = MODEL | {"checkpoint", "tokenizer"}
RUNS = LOADS | LIBRARY | {"engine", "kv_cache", "kv_settings", "quantize"}
ASKS = RUNS | {"cli"}
ROOMS = {  # a room, and what it may import besides itself
    "common": set(),
    "selective_kv": set(),
    "model": {"common"},
    "tokenizer": {"common"},
    "quantize": {"common", "model"} | LIBRARY,
    "kv_settings": {"common"} | LIBRARY,
    "kv_cache": {"common", "kv_settings"} | LIBRARY,
    "checkpoint": LOADS | {"quantize"},
    "engine": RUNS,
    "cli": RUNS,
    "generate": ASKS,
    "evaluation": ASKS,
    "benchmark": ASKS | {"evaluation", "plots"},
    "plots": ASKS | {"evaluation"},
    "training": ASKS | {"evaluation"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downwards_only(room: str) -> None:
    """What stands below can be read without what stands above: the library alone, the model without any cache."""
    paths = list((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]
    for path in paths:
        found = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)) & (
            set(ROOMS) | {"scripts"}
        )
        assert found <= ROOMS[room] | {room}, path


def test_only_the_library_asks_what_class_a_cache_is() -> None:
    for room in set(ROOMS) - {"selective_kv"}:
        for path in list((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]:
            assert not re.search(r"isinstance\([^)]*[Cc]ache", path.read_text()), path


def test_a_large_position_is_as_exact_as_a_small_one() -> None:
    """Scores depend on distances alone; float32 angles would lose that at a million tokens."""
    config = Config(10, 64, 1, 1, 1, 8, 64)
    with torch.device("meta"):
        model = Transformer(config)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64)

    def score(at: int) -> float:
        ends = [model.rope(torch.tensor([[at + d]])).rotate(x) for d, x in ((7, q), (0, k))]
        return float((ends[0] * ends[1]).sum())

    assert abs(score(0) - score(1_000_003)) < 1e-4


def test_named_configs_have_their_published_sizes() -> None:
    """Parameters in billions, as the models' cards state them."""
    published = {
        "llama-2-7b": 6.74,
        "llama-3-8b": 8.03,
        "llama-3.1-8b": 8.03,
        "llama-3.2-1b": 1.24,
        "llama-3.2-3b": 3.21,
        "mistral-7b": 7.24,
        "qwen-2.5-0.5b": 0.49,
        "qwen-2.5-7b": 7.62,
        "qwen-3-0.6b": 0.60,
        "qwen-3-8b": 8.19,
    }
    for name, billions in published.items():
        with torch.device("meta"):
            model = Transformer(CONFIGS[name])
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006), name


def test_a_config_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="n_head 6 is not a multiple of n_kv_head 4"):
        Config(10, 48, 1, 6, 4, 8, 64)
    with pytest.raises(ValueError, match="'longrope' is not supported"):
        _ = Config(10, 48, 1, 6, 2, 8, 64, rope_scaling=RopeScaling("longrope", 4.0)).rope_frequencies


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rope_turns_by_the_angles_of_each_half(dtype: torch.dtype) -> None:
    """Signed frequencies give the same bits as a sine that is negated and a cosine that is repeated."""
    frequencies = CONFIGS["llama-3.1-8b"].rope_frequencies.to(dtype)
    positions = torch.tensor([[0, 1, 7, 8191, 131071, 1_000_003]])
    angle = positions[:, None, :, None] * frequencies
    rope = Rope(frequencies, positions)
    assert torch.equal(rope.cos, angle.cos().float().repeat(1, 1, 1, 2))
    assert torch.equal(rope.sin, torch.cat((-angle.sin(), angle.sin()), -1).float())
    assert torch.equal(Rope(frequencies, positions, with_signs(frequencies)).sin, rope.sin)


def test_a_turn_back_is_that_to_an_earlier_position_or_none() -> None:
    """By sequence, from its first position; a million positions are as exact as few; and made once."""
    frequencies = CONFIGS["llama-3.1-8b"].rope_frequencies
    rope = Rope(frequencies, torch.tensor([[0, 1], [47, 48], [48, 49], [1_000_047, 1_000_048]]))
    cos, sin = rope.back_to(47)
    assert torch.equal(cos[:2], torch.ones(2, 128)) and torch.equal(sin[:2], torch.zeros(2, 128))
    for b, angle in ((2, frequencies), (3, 1_000_000 * frequencies)):
        assert torch.equal(cos[b], angle.cos().float().repeat(2))
        assert torch.equal(sin[b], torch.cat((angle.sin(), -angle.sin())).float())
    assert rope.back_to(47) is rope.back_to(47) and rope.back_to(48)[1][2].eq(0).all()
