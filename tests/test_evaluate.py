"""evaluate.py as its users call it: tables, records, mistakes. What it computes is tested in test_scoring.py."""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SENTENCES

pytest.importorskip("rouge_score", reason="evaluate.py needs rouge_score")
import evaluate
import summaries

TEXT = "\n".join(SENTENCES * 2)
CACHES = ["--caches", "quantize_kv:sink_size=2,window_size=8", "compress_kv:sink_size=2,window_size=8"]


BLANK = """
from dataclasses import dataclass
from typing import ClassVar
from kv_cache import SelectiveCache

@dataclass
class Blank(SelectiveCache):
    "Sees nothing from position 50 on."
    name: ClassVar[str] = "blank_kv"

    def attend(self, q, k, v, chunk, rope):
        return super().attend(q, k, v, chunk, rope) * (chunk.positions < 50)[:, None, :, None]
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress(TEXT.encode()))
    return path


def record(tmp_path: Path, *argv: object) -> dict:  # type: ignore[type-arg]
    out = tmp_path / "new" / "out.json"
    evaluate.main([*map(str, argv), "--json", str(out)])
    assert [f.name for f in out.parent.iterdir()] == ["out.json"]
    return json.loads(out.read_text())


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def test_perplexity_and_divergence_of_a_text(
    tiny: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--checkpoint_path", tiny, "--text", text, "--context", 100, "--windows", 3, *CACHES]
    r = record(tmp_path, "perplexity", *base)
    full, quantised, dropped = r["rows"]
    assert full["cache"] == "full" and full["kl"] == 0 and full["perplexity_rise"] == 0 and full["same_top"] == 1
    assert full["tokens"] == 297 and full["windows"] == 3
    assert abs(quantised["perplexity_rise"]) < 0.01 and 0 < quantised["kl"] < 1e-2 < dropped["kl"]
    assert quantised["bits_per_quantised_element"] == 8 + 32 / 8  # head_dim 8
    assert full["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert r["command"][0] == "scripts/evaluate.py" and str(tmp_path) not in json.dumps(r)
    assert TEXT[:40] not in json.dumps(r)  # figures travel, texts do not
    sequential = record(tmp_path, "perplexity", *base, "--sequential")
    for a, b in zip(r["rows"], sequential["rows"], strict=True):
        assert abs(a["nll"] - b["nll"]) < 1e-3
    out = capsys.readouterr().out
    assert "bits/byte" in out and "quantize_kv:sink_size=2,window_size=8" in out
    record(tmp_path, "divergence", *base)
    assert "mean KL" in capsys.readouterr().out


def test_a_cache_of_ones_own_is_scored_through_itself(tiny: Path, tmp_path: Path, text: Path) -> None:
    """Token by token: nobody knows its parallel form, even where it is derived from a cache that has one."""
    plugin, out = tmp_path / "mine.py", tmp_path / "out.json"
    plugin.write_text(BLANK)
    argv = ["--checkpoint_path", tiny, "--text", text, "--context", 100, "--windows", 1, "--plugin", plugin]
    argv += ["--caches", "quantize_kv", "blank_kv", "--json", out]
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", "divergence", *map(str, argv)]
    subprocess.run(command, check=True, capture_output=True)  # a process of its own: the class stays known in this one
    kl = {r["cache"].partition(":")[0]: r["kl"] for r in json.loads(out.read_text())["rows"]}
    assert kl["quantize_kv"] < 1e-2 < kl["blank_kv"]


def test_without_a_text_the_model_writes_one(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["divergence", "--checkpoint_path", tiny, "--context", 60, "--windows", 2, *CACHES]
    a, b = record(tmp_path, *base), record(tmp_path, *base)
    assert a["rows"] == b["rows"] and a["rows"][0]["sampled"]
    assert "the text's entropy" in capsys.readouterr().out


def test_passkeys_read_the_cache(tiny: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights recall nothing; what counts is that every cell is tried, and the body is read apart."""
    reads: list[int] = []
    original = evaluate.Engine.read

    def spy(self, prompts):  # type: ignore[no-untyped-def]
        reads.append(len(prompts[0]))
        return original(self, prompts)

    monkeypatch.setattr(evaluate.Engine, "read", spy)
    base = ["--checkpoint_path", tiny, "--text", text, "--lengths", 200, 240, "--depths", 0, 1, "--trials", 2]
    r = record(tmp_path, "passkey", *base, *CACHES)
    assert len(reads) == 2 * 3 * 2 * 2 * 2
    assert {a + b for a, b in zip(reads[::2], reads[1::2], strict=True)} == {200, 240}
    assert all(set(row["recalled"]) == {"200", "240"} for row in r["rows"])


def test_a_crash_loses_no_finished_result(
    tiny: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passkeys: the second setting fails; the first one's figures are in the file, which says it is not finished."""
    original = evaluate.recalls

    def crash(subject, policy, *rest):  # type: ignore[no-untyped-def]
        if policy.name == "quantize_kv":
            raise KeyboardInterrupt
        return original(subject, policy, *rest)

    monkeypatch.setattr(evaluate, "recalls", crash)
    out = tmp_path / "out.json"
    argv = ["--checkpoint_path", str(tiny), "--text", str(text), "--lengths", "200", "--json", str(out), *CACHES]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(["passkey", *argv])
    saved = json.loads(out.read_text())
    assert [row["cache"] for row in saved["rows"]] == ["full"] and not saved["finished"]


def test_mistakes_are_one_line(tiny: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["perplexity", "--checkpoint_path", tiny, "--context", 100]
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "an empty text" in fails(capsys, *base, "--text", empty)
    short = tmp_path / "short.txt"
    short.write_text("The red fox")
    assert "tokens, and a window has 100" in fails(capsys, *base, "--text", short)
    assert "none.txt" in fails(capsys, *base, "--text", tmp_path / "none.txt")
    assert "past the model's context of 256" in fails(capsys, "perplexity", "--checkpoint_path", tiny, "--context", 300)
    assert "no cache is called 'quantise'" in fails(capsys, *base, "--text", text, "--caches", "quantise")
    assert "takes a value of type int" in fails(capsys, *base, "--caches", "quantize_kv:sink_size=x")
    passkey = ["passkey", "--checkpoint_path", tiny, "--text", text]
    assert "a passkey test takes at least" in fails(capsys, *passkey, "--lengths", 20)
    assert "past the model's context" in fails(capsys, *passkey, "--lengths", 256)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe")
    assert "bad.txt" in fails(capsys, *base, "--text", bad)


def test_rouge_of_summaries(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SQuALITY's layout and a plain one; the full cache agrees with itself; a window of all agrees too."""
    responses = [{"response_text": t} for t in SENTENCES[:2]]
    squality = {"document": TEXT, "questions": [{"question_text": "What is the plot?", "responses": responses}]}
    for line in (squality, {"document": TEXT, "summary": SENTENCES[0]}, {"prompt": TEXT, "references": SENTENCES[:3]}):
        path = tmp_path / "d.jsonl"
        path.write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
        base = ["rouge", "--checkpoint_path", tiny, "--text", path, "--context", 200, "--max_new_tokens", 12]
        r = record(tmp_path, *base, "--caches", "quantize_kv:sink_size=2,window_size=200", "compress_kv:window_size=2")
        full, same, other = r["rows"]
        assert full["rouge_l_to_full"]["mean"] == same["rouge_l_to_full"]["mean"] == 1
        assert full["rouge_l"] == same["rouge_l"] and full["documents"] == 2
        assert other["rouge_l_to_full"]["mean"] < 1
        assert SENTENCES[0] not in json.dumps(r)
    assert "were cut to fit" in capsys.readouterr().err
    for line, message in (
        ('{"document": "a"}', "line 1: the field 'summary'"),
        ("{", "line 1: not JSON"),
        ("", "no document"),
    ):
        path.write_text(line)
        assert message in fails(capsys, *base)


def test_an_interval_holds_its_mean_and_narrows() -> None:
    few = summaries.mean_and_interval([0.1, 0.5, 0.3])
    many = summaries.mean_and_interval([0.1, 0.5, 0.3] * 50)
    assert few["low"] <= few["mean"] <= few["high"] and few["high"] - few["low"] > many["high"] - many["low"]
    assert summaries.rouge_l("the fox jumps", ["a dog", "the fox jumped"]) == 1  # stemmed; the best reference
