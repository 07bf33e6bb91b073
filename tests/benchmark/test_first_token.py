"""benchmark.py --first_token: what it times, and that nothing wrong is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from benchmark import command as benchmark
from benchmark import first_token
from checkpoint import load_model, open_checkpoint
from common.errors import UserError
from engine import Engine, Sampling
from kv_cache import ModelCache
from model import Transformer
from selective_kv import FullCache, SelectiveCache, Shape, region_cache

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = tmp_path_factory.mktemp("model")
    families.make("llama3", folder)
    return load_model(open_checkpoint(folder), CPU, torch.float32)


def shape_for(model: Transformer, batch: int = 1, capacity: int = 64) -> Shape:
    return Shape(batch, model.config.n_kv_head, model.config.head_dim, capacity, torch.float32, CPU)


def test_every_cache_reads_every_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    families.make("llama3", tmp_path / "model")
    out = tmp_path / "out.json"
    monkeypatch.setattr(first_token, "GATE_CHUNKS", (200, 90))
    words = ["--first_token", "--context", "90", "40", "--batch", "1", "2", "--rounds", "2", "--caches", "full"]
    words += ["quantize_kv", "--checkpoint_path", str(tmp_path / "model"), "--device", "cpu", "--json", str(out)]
    benchmark.main(words)
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    rows = record["rows"]
    assert [(r["batch"], r["context"], r["cache"].partition(":")[0]) for r in rows] == [
        (b, n, cache) for b in (1, 2) for n in (40, 90) for cache in ("full", "quantize_kv")
    ]
    for r in rows:
        assert 0 < r["first_token_s_min"] <= r["first_token_s"] <= r["first_token_s_max"]
        assert 0 < r["store_s"] < r["first_token_s"] and "step_ms" not in r
        assert r["prompt_tokens_per_s"] == pytest.approx(r["batch"] * r["context"] / r["first_token_s"])
    assert record["command"] == ["scripts/benchmark.py", *words]
    assert capsys.readouterr().out.count("1.000") >= 4  # each context's first cache, over itself


def test_a_wrong_prompt_is_never_timed(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_token, "GATE_CHUNKS", (200, 90))
    right: Any = region_cache.chunk_attention
    assert first_token.gate(model, SelectiveCache(), shape_for(model)) < 1e-4
    monkeypatch.setattr(region_cache, "chunk_attention", lambda *args: right(*args) * 1.01)
    with pytest.raises(UserError, match="is allowed"):
        first_token.gate(model, SelectiveCache(), shape_for(model))


def test_warming_up_reads_by_a_part_of_the_model_and_leaves_nothing(model: Transformer) -> None:
    n_layer = model.config.n_layer
    engine = Engine(model, ModelCache(FullCache(), n_layer, shape_for(model)), Sampling(temperature=0))
    calls: list[int] = []
    handles = [block.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(model.layers)]
    first_token.warm(engine, [[1, 2, 3]])
    for handle in handles:
        handle.remove()
    assert 0 < len(set(calls)) <= first_token.WARM_LAYERS
    assert engine.cache.lengths.tolist() == [0]
    assert len(model.layers) == model.config.n_layer == len(engine.cache.layers) == n_layer


@pytest.mark.parametrize("more", [["--prefill"], ["--peer", "transformers"], ["--steps", "3"], ["--kernels"]])
def test_what_times_something_else_is_refused(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        benchmark.main(["--first_token", *more])
    assert error.value.code == 2
    assert "--first_token goes with" in capsys.readouterr().err
