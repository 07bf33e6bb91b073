"""--profile: what it writes, how much, and that it changes nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import generate
from cli.profile import Profiler
from common.errors import UserError


def run(tiny: Path, *extra: str) -> None:
    base = ["--checkpoint_path", str(tiny), "--prompt", "The red fox", "--seed", "3", "--ignore_eos", "--json"]
    generate.main([*base, *extra])


def test_a_profile_of_a_long_run_is_bounded_and_changes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = []
    for extra in ([], ["--profile", "run"]):
        run(tiny, "--max_new_tokens", "200", *extra, "quantize_kv", "--window_size", "8")
        out, err = capsys.readouterr()
        texts.append(json.loads(out.splitlines()[-1])["texts"])
    assert texts[0] == texts[1]
    folder = tmp_path / "outputs" / "run"
    names = {"prefill_trace.json", "prefill_summary.txt", "decode_trace.json", "decode_summary.txt", "report.json"}
    assert {f.name for f in folder.iterdir()} == names
    assert sum(f.stat().st_size for f in folder.iterdir()) < 30 << 20
    assert "perfetto" in err and "outputs/run/" in err
    events = json.loads((folder / "decode_trace.json").read_text())["traceEvents"]
    steps = [e for e in events if e.get("name") == "aten::embedding" and e.get("ph") == "X"]
    assert len(steps) == 8  # of 199
    for phase in ("prefill", "decode"):
        table = (folder / f"{phase}_summary.txt").read_text()
        for column in ("Self CPU", "CPU Mem", "# of Calls", "FLOPs"):
            assert column in table, (phase, column)
    assert json.loads((folder / "report.json").read_text())["tokens_written"] == 200


def test_a_short_run_leaves_whole_files(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n in ("1", "2", "4"):
        run(tiny, "--max_new_tokens", n, "--profile", f"short{n}")
        for trace in (tmp_path / "outputs" / f"short{n}").glob("*_trace.json"):
            assert json.loads(trace.read_text())["traceEvents"]
    assert (tmp_path / "outputs" / "short4" / "decode_trace.json").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/x", "x/", "a\\b", "caf\udce9", "a\nb", "a\0b"])
def test_a_name_that_is_no_folders_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--profile ..` wrote into the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--profile '.*': (a name for a folder in outputs/|not printable)") as caught:
        Profiler(name, torch.device("cpu"))
    assert str(caught.value).isprintable() and not list(tmp_path.iterdir())


def test_a_name_that_is_taken_loses_no_trace(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs with one name: the second wrote over the first, in silence."""
    monkeypatch.chdir(tmp_path)
    folders = [Profiler("run", torch.device("cpu")).folder.name for _ in range(3)]
    assert folders == ["run", "run-2", "run-3"] and "goes to outputs/run-3/" in capsys.readouterr().err


def test_a_ctrl_c_while_a_profile_is_written_loses_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a segmentation fault, and the report was lost."""
    monkeypatch.chdir(tmp_path)
    original = torch.profiler.profile.stop

    def stop(self: torch.profiler.profile) -> None:
        signal.raise_signal(signal.SIGINT)
        original(self)

    monkeypatch.setattr(torch.profiler.profile, "stop", stop)
    with pytest.raises(SystemExit) as exit_:
        run(tiny, "--max_new_tokens", "40", "--profile", "cut")
    assert exit_.value.code == 130
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = tmp_path / "outputs" / "cut"
    assert json.loads((folder / "report.json").read_text())["finished"] is report["finished"] is False
    assert json.loads((folder / "prefill_trace.json").read_text())["traceEvents"]
