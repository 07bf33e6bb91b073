"""evaluate.py rouge: documents, summaries and their intervals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SENTENCES
from evaluate_calls import CACHES, TEXT, fails, record

from evaluation import summaries


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
        assert full["rouge_l"] == same["rouge_l"] and full["documents"] == 2 and full["cut"] == 2
        assert full["rouge_l_rise"] == {"mean": 0, "low": 0, "high": 0}
        assert other["rouge_l_to_full"]["mean"] < 1
        assert SENTENCES[0] not in json.dumps(r)
    assert "2 cut to fit" in capsys.readouterr().out
    for line, message in (
        ('{"document": "a"}', "line 1: the field 'summary'"),
        ("{", "line 1: not JSON"),
        ("", "an empty text"),
        ('{"document": 5, "summary": "a"}', "line 1: 'document' is not a text"),
        ('{"document": "a", "summary": null}', "line 1: the references are not"),
        ('{"document": "a", "questions": [{"question_text": "b", "responses": []}]}', "line 1: the references are not"),
        ('{"document": "a", "questions": 5}', "line 1: 'questions' are not"),
        ("5", "line 1: not a JSON object"),
    ):
        path.write_text(line)
        assert message in fails(capsys, *base)


def test_summaries_of_the_models_own_text(tiny: Path, tmp_path: Path) -> None:
    """Nothing to compare with but the full cache's words."""
    base = ["rouge", "--checkpoint_path", tiny, "--context", 100, "--max_new_tokens", 8, "--documents", 2]
    full, *_ = record(tmp_path, *base, *CACHES)["rows"]
    assert "rouge_l" not in full and full["rouge_l_to_full"]["mean"] == 1


def test_an_interval_holds_its_mean_and_narrows() -> None:
    few = summaries.mean_and_interval([0.1, 0.5, 0.3])
    many = summaries.mean_and_interval([0.1, 0.5, 0.3] * 50)
    assert few["low"] <= few["mean"] <= few["high"] and few["high"] - few["low"] > many["high"] - many["low"]
    assert summaries.rouge_l("the fox jumps", ["a dog", "the fox jumped"]) == 1  # stemmed; the best reference
