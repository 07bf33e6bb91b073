"""Pictures from small made-up result files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import plot
import pytest

from kv_cache import FullCache, SelectiveCache
from options import format_policy


def files(folder: Path) -> list[str]:
    caches = [
        "full",
        "quantize_kv:sink_size=16,window_size=32",
        "compress_kv:sink_size=16,window_size=32,positions=cache",
    ]
    rows = []
    for text in ("a.txt", "b.txt"):
        for i, cache in enumerate(caches):
            positions = {"0-256": {"kl": 0.1 * i}, "256-1024": {"kl": 0.2 * i}}
            row = {"text": text, "cache": cache, "cache_bytes": 1e6 * (i + 1), "perplexity": 9.0, "same_top": 1.0}
            rows.append(row | {"kl": 10.0**-i if i else 0.0, "by_position": positions})
    keys = [
        {"cache": c, "mean": 0.5, "recalled": {"1024": {"0": 1.0, "0.5": 0.5}, "2048": {"0": 0.0, "0.5": 1.0}}}
        for c in caches
    ]
    (folder / "d.json").write_text(json.dumps({"kind": "divergence", "rows": rows}) + "\n")
    (folder / "p.json").write_text(json.dumps({"kind": "passkey", "rows": keys}, indent=1))
    return [str(folder / "d.json"), str(folder / "p.json")]


def test_every_picture_is_made_from_the_files_alone(tmp_path: Path) -> None:
    plot.main([*files(tmp_path), "--out", str(tmp_path / "pictures")])
    for name in ("table", "memory", "cache", "frontier", "position", "passkeys"):
        png, svg = ((tmp_path / "pictures" / f"{name}.{ending}").read_bytes() for ending in ("png", "svg"))
        assert png.startswith(b"\x89PNG") and len(png) > 3000 and b"<svg" in svg


def test_missing_data_names_the_command_that_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot.main(["--out", str(tmp_path / "pictures")])
    err = capsys.readouterr().err
    assert "evaluate.py divergence" in err and "evaluate.py passkey" in err
    assert {f.stem for f in (tmp_path / "pictures").iterdir()} == {"memory", "cache"}


def test_a_broken_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text('{"kind": ')
    with pytest.raises(SystemExit) as exit_:
        plot.main([str(tmp_path / "bad.json"), "--out", str(tmp_path / "pictures")])
    assert exit_.value.code == 2 and "bad.json" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_a_report_and_a_score_of_one_cache_share_a_line_of_the_table() -> None:
    """A report of generate.py lists every knob, an evaluation only those that are not usually left alone."""
    for policy in (FullCache(), SelectiveCache(4, 8), SelectiveCache(4, 8, v_bits=4, group_size=32)):
        report = {"name": policy.name, **dataclasses.asdict(policy)}
        assert plot.setting_of(json.loads(json.dumps(report))) == format_policy(policy)
    assert plot.setting_of({"name": "of_a_plugin", "stride": 3}) == "of_a_plugin:stride=3"


def test_benchmarks_are_drawn_apart_by_model_and_device(tmp_path: Path) -> None:
    files = []
    for device in ("cpu", "NVIDIA H200"):
        rows = [
            {"cache": cache, "batch": batch, "context": context, "step_ms": float(context)}
            for cache in ("full", "quantize_kv:sink_size=16,window_size=32", "transformers dynamic")
            for batch, context in ((1, 100), (1, 2048), (8, 100))
        ]
        files.append(tmp_path / f"{device}.json")
        files[-1].write_text(json.dumps({"model": "m", "device": device, "rows": rows}) + "\n")
    plot.main([*map(str, files), "--out", str(tmp_path / "out")])
    assert {f.name for f in (tmp_path / "out").glob("speed*.png")} == {"speed-m-cpu.png", "speed-m-nvidia-h200.png"}
    assert not (tmp_path / "out" / "table.png").exists()
