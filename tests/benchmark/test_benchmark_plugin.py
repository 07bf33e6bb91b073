"""The two programs that measure the plug-in for transformers beside transformers' own caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, SENTENCES

from benchmark import transformers_divergence, transformers_generate
from common.errors import UserError

DEMO = ROOT / "assets" / "demo"


def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    flags = ["--context", "40", "--new", "4", "--device", "cpu", "--json", str(out)]
    transformers_generate.run([*flags, "--only", "int8, eager", "transformers dynamic, eager"])
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["transformers dynamic, eager", "int8, eager"]
    assert all(row["tokens_per_second"] > 0 for row in report["rows"])
    assert report["gate"]["full, eager"] < 1e-4 and report["command"][0] == "scripts/bench_transformers.py"
    assert "tokens/s" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no 'int9, eager'"):
        transformers_generate.run([*flags, "--only", "int9, eager"])


def test_divergence(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES))
    flags = ["--checkpoint_path", str(DEMO), "--text", str(text), "--chunk", "64", "--device", "cpu"]
    rows = transformers_divergence.run([*flags, "--context", "448"])["rows"]
    assert abs(rows["full, eager"]["mean_kl"]) < 1e-5
    assert 0 < rows["int8, eager"]["mean_kl"] < rows["K4V4, eager"]["mean_kl"] < 0.1
    with pytest.raises(UserError, match="tokens, and 9999 are asked for"):
        transformers_divergence.run([*flags, "--context", "9999"])
