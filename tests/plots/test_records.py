"""Result files: what is wrong is one line, what is left out is said, what is compared belongs together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kv_cache import format_policy
from plots import command as plot
from plots import records
from selective_kv import FullCache, SelectiveCache

SCORE = {"text": "a.txt", "cache": "full", "cache_bytes": 1e6, "perplexity": 9.0, "kl": 0.0, "same_top": 1.0,
         "by_position": {"0-256": {"kl": 0.0}}}  # fmt: skip
KEYS = {"cache": "full", "mean": 1.0, "recalled": {"512": {"0": 1.0}}}
STEP = {"cache": "full", "batch": 1, "context": 8, "step_ms": 1.0}
REPORT = {"model": "m", "device": "cpu", "dtype": "float32", "cache": {"name": "full"}, "batch": 1, "tokens_read": 5,
          "tokens_written": 3, "decode_tokens_per_s": 9.0, "cache_bytes": {"window": 80}, "weight_bytes": 7,
          "peak_memory_bytes": 100}  # fmt: skip
WRONG: list[tuple[Any, str]] = [
    ([], "is needed, not []"),
    (5, "is needed, not 5"),
    ({}, "no kind, no rows and no decode_tokens_per_s"),
    ({"kind": "perplexity"}, "no rows"),
    ({"kind": "perplexity", "rows": 3}, "rows is not a list: 3"),
    ({"kind": "perplexity", "rows": [7]}, "row 1: not an object: 7"),
    ({"kind": "perplexity", "rows": [{k: v for k, v in SCORE.items() if k != "text"}]}, "row 1: no text"),
    ({"kind": "divergence", "rows": [SCORE | {"kl": float("nan")}]}, "row 1: kl is not a number: nan"),
    ({"kind": "divergence", "rows": [SCORE | {"by_position": {"0-256": {}}}]}, "row 1, 0-256: not an object"),
    ({"kind": "divergence", "rows": [SCORE, SCORE | {"text": "b", "cache": "x"}]}, "no row of the full cache for b"),
    ({"kind": "taste", "rows": []}, "kind 'taste' is none of"),
    ({"kind": ["passkey"], "rows": []}, "kind ['passkey'] is none of"),
    ({"kind": "passkey", "rows": [KEYS | {"recalled": {}}]}, "recalled is not an object: {}"),
    ({"kind": "passkey", "rows": [KEYS | {"recalled": {"512": {"0": 1.0}, "1024": {"1": 1.0}}}]}, "row 1, 1024: no 0"),
    ({"kind": "passkey", "rows": [KEYS | {"recalled": {"512": {"deep": 1.0}}}]}, "depths"),
    ({"kind": "rouge", "rows": [{"text": "t", "cache": "full", "rouge_l_to_full": {}}]}, "rouge_l_to_full is"),
    ({"model": "m", "device": "cpu", "rows": [STEP | {"step_ms": 0}]}, "step_ms is not a number above zero: 0"),
    ({"model": "m", "rows": [STEP]}, "no device"),
    ({k: v for k, v in REPORT.items() if k != "cache"}, "no cache"),
    (REPORT | {"cache": {"name": "full", "knob": 1}}, "cache: --knob is a flag of no cache"),
    (REPORT | {"cache": {"sink_size": 1}}, "cache: no name"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_record_is_one_line_that_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: Any, message: str
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(value))
    with pytest.raises(SystemExit) as exit_:
        plot.main([str(tmp_path / "bad.json"), "--out", str(tmp_path / "pictures")])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.count("\n") == 1 and f"{tmp_path / 'bad.json'}" in err and message in err
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"kind": "passkey", "rows": []}, "no rows"),
        ({"kind": "divergence", "rows": []}, "no rows"),
        ({"kind": "divergence", "rows": [SCORE], "finished": False}, "an unfinished record"),
        ({"device": "cuda", "rows": [{"batch": 1, "us": 3.0}]}, "no picture shows this kind of record"),
        ({"plan": {"total": 3}}, "no picture shows this kind of record"),
    ],
)
def test_what_is_empty_unfinished_or_not_for_a_picture_is_left_out_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: Any, why: str
) -> None:
    (tmp_path / "some.json").write_text(json.dumps(value))
    assert records.read([tmp_path / "some.json"]) == []
    assert capsys.readouterr().err == f"{tmp_path / 'some.json'}: {why}, left out\n"


def test_json_over_many_lines_and_one_a_line(tmp_path: Path) -> None:
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    one.write_text(json.dumps({"kind": "passkey", "rows": [KEYS]}, indent=1))
    many.write_text("".join(json.dumps({"kind": "passkey", "rows": [KEYS]}) + "\n" for _ in range(2)))
    assert [r.kind for r in records.read([one, many])] == ["passkey"] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff", "utf-8"),
        (b'{"kind": ', "Expecting value"),
        (b"[" * 100_000, "recursion"),
        (b'{"plan": {}}\n{"rows": ', "line 2: "),
        (b'{"kind": "rouge", "rows": ' + b"1" * 5000 + b"}", "digits"),
    ],
)
def test_a_file_that_is_not_json_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        plot.main([str(tmp_path / "bad.json"), "--out", str(tmp_path / "pictures")])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.count("\n") == 1 and "bad.json" in err and message in err
    assert not (tmp_path / "pictures").exists()


def test_a_report_and_a_score_of_one_cache_share_a_line_of_the_table() -> None:
    """A report of generate.py lists every knob, an evaluation only those that are not usually left alone."""
    for policy in (FullCache(), SelectiveCache(4, 8), SelectiveCache(4, 8, v_bits=4, rotate=False)):
        report = {"name": policy.name, **dataclasses.asdict(policy)}
        assert records.setting_of(json.loads(json.dumps(report))) == format_policy(policy)
    assert records.setting_of({"name": "of_a_plugin", "stride": 3}) == "of_a_plugin:stride=3"


def test_two_settings_never_share_a_name() -> None:
    """Knobs (one of them is no more) were dropped: five rows of the table were called "quantize_kv K4V4 16/128"."""
    sizes = "sink_size=16,window_size=128"
    names = {
        "full": "full",
        f"quantize_kv:{sizes}": "quantize_kv 16/128",
        f"quantize_kv:{sizes},k_bits=4,v_bits=4": "quantize_kv K4V4 16/128",
        f"quantize_kv:{sizes},k_bits=4,v_bits=4,group_size=32": "quantize_kv K4V4 16/128 group_size=32",
        f"quantize_kv:{sizes},k_bits=4,rotate=false": "quantize_kv K4V8 16/128 rotate=false",
        f"compress_kv:{sizes},positions=cache": "compress_kv 16/128",
        f"compress_kv:{sizes},positions=original": "compress_kv 16/128 positions=original",
        "of_a_plugin:window_size=8,stride=3": "of_a_plugin window_size=8 stride=3",
        "transformers quantized hqq 8 bit": "transformers quantized hqq 8 bit",
        "odd:word": "odd word=",
    }
    assert {setting: records.short(setting) for setting in names} == names
    assert records.family(f"quantize_kv:{sizes},k_bits=4,group_size=32") == "quantize_kv K4V8 group_size=32"


def test_settings_stand_in_one_order() -> None:
    q = "quantize_kv:sink_size={},window_size={}"
    expected = ["full", "compress_kv:sink_size=4,window_size=8,positions=cache", q.format(4, 256), q.format(16, 32),
                q.format(16, 128), q.format(0, 8) + ",v_bits=4", q.format(0, 8) + ",k_bits=4,v_bits=4"]  # fmt: skip
    assert sorted(reversed(expected), key=records.order) == expected
