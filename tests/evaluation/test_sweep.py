"""Sweeps: every setting visited, done ones skipped, failed ones neither done nor hidden."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SENTENCES

from evaluation import sweep

NAMES = ["--caches", "quantize_kv", "compress_kv", "--sinks", "2", "4", "--windows", "8", "16"]


MINE = """
from dataclasses import dataclass
from typing import ClassVar
from selective_kv import FullCache, knob

@dataclass
class Mine(FullCache):
    "Mine."
    name: ClassVar[str] = "mine_kv"
    n: int = knob(3, "n")
"""


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "t.txt").write_text("\n".join(SENTENCES))
    return ["--name", "s", "--outputs", str(tmp_path / "out")]


def rest(tiny: Path, tmp_path: Path) -> list[str]:
    text = str(tmp_path / "t.txt")
    return ["--", "--checkpoint_path", str(tiny), "--text", text, "--context", "60", "--windows", "1"]


def test_every_setting_is_visited_once_and_then_skipped(
    tiny: Path, tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shell loops elsewhere visited one element."""
    argv = [*base, "--kind", "divergence", "--caches", "quantize_kv", "--sinks", "2", "--windows", "8", "16", "8"]
    sweep.main([*argv, *rest(tiny, tmp_path)])
    files = sorted((tmp_path / "out" / "s").iterdir())
    assert [f.name for f in files] == [
        "divergence-full.json",
        "divergence-quantize_kv-sink_size-2-window_size-16.json",
        "divergence-quantize_kv-sink_size-2-window_size-8.json",
    ]
    for f in files:
        assert f.read_text().count("\n") == 1 and json.loads(f.read_text())["rows"]
    files[1].write_text('{"half of a')  # as if killed by a program that does not write in one step
    files[2].write_text('{"finished": false, "rows": []}')  # as if killed between two texts
    ran: list[str] = []
    original = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda c, **k: ran.append(c[1]) or original(c, **k))
    sweep.main([*argv, *rest(tiny, tmp_path)])
    assert len([c for c in ran if c.endswith("evaluate.py")]) == 2


def test_results_of_another_command_are_not_taken_for_these(
    tiny: Path, tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One name, two texts: the second sweep once found everything done."""
    argv = [*base, "--caches", "quantize_kv", "--sinks", "2", "--windows", "8"]
    sweep.main([*argv, *rest(tiny, tmp_path)])
    sweep.main([*argv, *rest(tiny, tmp_path)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        sweep.main([*argv, *rest(tiny, tmp_path), "--windows", "2"])
    assert exit_.value.code == 2 and "was made by another command" in capsys.readouterr().err


def test_a_failed_task_is_not_done_and_is_told(
    tiny: Path, tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """cold-compress counted failed runs as done."""
    argv = [*base, "--caches", "compress_kv", "--sinks", "2", "--windows", "8", "400", "--kind", "speed", "--"]
    argv += ["--checkpoint_path", str(tiny), "--prompt", "The", "--max_new_tokens", "4"]
    with pytest.raises(SystemExit) as exit_:
        sweep.main(argv)
    assert exit_.value.code == 1
    err = capsys.readouterr().err
    assert "window_size=400" in err and "past the model's context" in err and "2 of 3 done" in err
    assert len(list((tmp_path / "out" / "s").iterdir())) == 2


def test_tasks_apart_are_the_sweep_together(
    tiny: Path, tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As a Slurm array runs it."""
    sweep.main([*base, *NAMES, "--count"])
    assert int(capsys.readouterr().out) == 9
    argv = [*base, "--kind", "speed", "--caches", "quantize_kv", "--sinks", "2", "--windows", "8"]
    for i in (1, 0):
        speed = ["--", "--checkpoint_path", str(tiny), "--prompt", "The", "--max_new_tokens", "4"]
        sweep.main([*argv, "--index", str(i), *speed])
    reports = [json.loads(f.read_text()) for f in sorted((tmp_path / "out" / "s").iterdir())]
    assert [r["cache"]["name"] for r in reports] == ["full", "quantize_kv"]
    assert reports[1]["cache"].items() >= {"name": "quantize_kv", "sink_size": 2, "window_size": 8, "k_bits": 8}.items()
    with pytest.raises(SystemExit) as exit_:
        sweep.main([*argv, "--index", "2", *rest(tiny, tmp_path)])
    assert exit_.value.code == 2


def test_a_cache_may_bring_knobs_of_its_own(base: list[str]) -> None:
    cache = "quantize_kv:v_bits=4,k_bits=4,rotate=false"
    args = sweep.make_parser().parse([*base, "--kind", "speed", "--caches", cache, "--sinks", "2", "--windows", "8"])
    args.rest = []
    task = sweep.tasks(args)[1]
    assert task.setting == "quantize_kv:sink_size=2,window_size=8,k_bits=4,v_bits=4,rotate=false"
    assert "--no-rotate" in task.command and task.command[task.command.index("--k_bits") + 1] == "4"


def test_a_cache_of_ones_own_without_sink_and_window_is_one_task(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    env = os.environ | {"CACHES": "mine_kv", "SINKS": "0 4", "WINDOWS": "8 32", "COUNT": "1"}
    for plugin, count in (("mine.py", "2"), ("", "")):
        out = subprocess.run(
            ["bash", str(ROOT / "scripts" / "sweep.sh")],
            env=env | {"PLUGIN": plugin}, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert out.stdout.strip() == count, out.stderr
    assert "no cache is called 'mine_kv'" in out.stderr and out.returncode == 2


def test_the_shell_scripts_visit_every_element(tmp_path: Path) -> None:
    lists = {"CACHES": "quantize_kv compress_kv", "SINKS": "0 4 16", "WINDOWS": "8 32", "COUNT": "1"}
    out = subprocess.run(
        ["bash", str(ROOT / "scripts" / "sweep.sh")],
        env=os.environ | lists,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == "13", out.stderr
    sbatch = (ROOT / "scripts" / "sweep.sbatch").read_text()
    assert "SLURM_ARRAY_TASK_ID" in sbatch and subprocess.run(["bash", "-n"], input=sbatch, text=True).returncode == 0
