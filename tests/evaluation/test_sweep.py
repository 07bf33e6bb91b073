"""Sweeps: every setting visited, done ones skipped, failed ones neither done nor hidden."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SENTENCES, write_checkpoint
from forks import fork_instead

from evaluation import sweep

NAMES = ["--caches", "quantize_kv", "compress_kv", "--sinks", "2", "4", "--windows", "8", "16"]


# sweep.sh takes python3 where the tree has no .venv
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
pytestmark = pytest.mark.usefixtures("ran")


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
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Programs are forked; the list of those that were."""
    return fork_instead(monkeypatch, tmp_path)


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "t.txt").write_text("\n".join(SENTENCES))
    return ["--name", "s", "--outputs", str(tmp_path / "out")]


def rest(tiny: Path, tmp_path: Path) -> list[str]:
    text = str(tmp_path / "t.txt")
    return ["--", "--checkpoint_path", str(tiny), "--text", text, "--context", "60", "--windows", "1"]


def test_every_setting_is_visited_once_and_then_skipped(
    tiny: Path, tmp_path: Path, base: list[str], ran: list[str]
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
    ran.clear()
    sweep.main([*argv, *rest(tiny, tmp_path)])
    assert len([c for c in ran if c.endswith("evaluate.py")]) == 2
    for damaged in (b"\xff\xfe\x00", b"[1, 2]", b"[" * 100_000, b""):
        files[1].write_bytes(damaged)
        task = sweep.tasks(parsed([*argv, *rest(tiny, tmp_path)]))[2]
        assert task.result == files[1] and task.record() is None


def parsed(argv: list[str]) -> argparse.Namespace:
    cut = argv.index("--")
    args = sweep.make_parser().parse(argv[:cut])
    args.rest = argv[cut + 1 :]
    return args


def test_results_of_other_weights_texts_and_plugins_are_not_taken_for_these(
    tiny: Path, tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A/model.pth and B/model.pth under one name: the second sweep said "2 of 2 done" with A's perplexities."""
    argv = [*base, "--caches", "quantize_kv", "--sinks", "2", "--windows", "8"]
    first, second = tmp_path / "A" / "ckpt", write_checkpoint(tmp_path / "B" / "ckpt", seed=1)
    shutil.copytree(tiny, first)
    sweep.main([*argv, *rest(first, tmp_path)])
    out, err = capsys.readouterr()
    assert "2 of 2 done" in err and out.count("quantize_kv") == 2 and out.count("\nfull") == 2  # both tables, once

    def refused(checkpoint: Path) -> str:
        with pytest.raises(SystemExit) as exit_:
            sweep.main([*argv, *rest(checkpoint, tmp_path)])
        assert exit_.value.code == 2
        return capsys.readouterr().err

    assert "was made from other weights: choose another --name" in refused(second)
    config = first / "config.json"
    changed = json.loads(config.read_text()) | {"rope_theta": 20000.0}
    before = config.read_text()
    config.write_text(json.dumps(changed))
    assert "other weights" in refused(first)
    config.write_text(before)
    text = (tmp_path / "t.txt").read_text()
    (tmp_path / "t.txt").write_text(text.replace("fox", "dog"))
    assert "another text" in refused(first)
    (tmp_path / "t.txt").write_text(text)
    sweep.main([*argv, *rest(first, tmp_path)])
    result = next((tmp_path / "out" / "s").glob("*window*"))
    record = json.loads(result.read_text())
    for change, words in (
        ({"format": 1}, "another version"),
        ({"format": None}, "another version"),
        ({"made_from": record["made_from"] | {"device": "H100"}}, "another device"),
        ({"made_from": 3}, "something else"),
        ({"command": {"a": 1}}, "another command"),
        ({"command": [1, 2]}, "another command"),
    ):
        result.write_text(json.dumps(record | change))
        assert words in refused(first), change


def test_another_reference_is_another_result(
    tiny: Path, tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        *base,
        "--caches",
        "quantize_kv",
        "--sinks",
        "2",
        "--windows",
        "8",
        *rest(tiny, tmp_path),
        "--reference_path",
    ]
    first, second = (write_checkpoint(tmp_path / name / "ckpt", seed=n) for n, name in enumerate("AB", 1))
    sweep.main([*argv, str(first)])
    sweep.main([*argv, str(first)])
    assert capsys.readouterr().err.count("2 of 2 done") == 2
    with pytest.raises(SystemExit) as exit_:
        sweep.main([*argv, str(second)])
    assert exit_.value.code == 2 and "was made from another reference" in capsys.readouterr().err


def test_an_interrupted_run_is_not_done(tiny: Path, tmp_path: Path, base: list[str]) -> None:
    """A speed task whose generate.py got SIGINT after 851 of 3,000 tokens was "1 of 1 done"."""
    argv = [*base, "--kind", "speed", "--caches", "quantize_kv", "--sinks", "2", "--windows", "8"]
    argv += ["--index", "0", "--", "--checkpoint_path", str(tiny), "--prompt", "The", "--max_new_tokens", "4"]
    sweep.main(argv)
    (result,) = (tmp_path / "out" / "s").iterdir()
    report = json.loads(result.read_text())
    assert report["finished"] is True
    task, _ = sweep.tasks(parsed(argv))
    assert task.record() == report
    result.write_text(json.dumps(report | {"finished": False}))
    assert task.record() is None


def test_a_bad_flag_fails_once(tiny: Path, tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It failed nine times, in 82 s."""
    for kind, words in (("divergence", "unknown argument --contxt"), ("speed", "unknown argument --contxt")):
        with pytest.raises(SystemExit) as exit_:
            sweep.main([*base, *NAMES, "--kind", kind, "--", "--checkpoint_path", str(tiny), "--contxt", "60"])
        err = capsys.readouterr().err
        assert exit_.value.code == 2 and err.count(words) == 1 and "stopped" in err
    with pytest.raises(SystemExit) as exit_:
        sweep.main([*base, *NAMES, "--", "--checkpoint_path", str(tmp_path / "nowhere")])
    assert exit_.value.code == 2 and "nowhere: no such file" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("kind", "behind", "message"),
    [
        ("divergence", ["--caches", "full"], "--caches behind --: the sweep sets it"),
        ("divergence", ["--json=r.json"], "--json behind --"),
        ("divergence", ["--keep_full", "x"], "--keep_full behind --"),
        ("speed", ["--sink_size", "9"], "--sink_size behind --"),
        ("speed", ["--no-rotate"], "--no-rotate behind --"),
        ("divergence", ["--text"], "--text: expected at least one argument"),
        ("divergence", ["--text", "/dev/zero"], "a pipe or a device, and every task reads it anew"),
    ],
)
def test_what_stands_behind_cannot_take_the_sweeps_place(
    kind: str, behind: list[str], message: str, base: list[str], capsys: pytest.CaptureFixture[str], ran: list[str]
) -> None:
    """Every task of `-- --caches full` was the full cache's, and its file bore another's name."""
    with pytest.raises(SystemExit) as exit_:
        sweep.main([*base, *NAMES, "--kind", kind, "--", *behind])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and message in err and err.count("\n") == 1 and not ran


def test_a_name_is_a_folders_and_flags_know_their_place(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--name", "../up"], "--name '../up': a name for a folder"),
        (["--text", "a.txt"], "stand behind --"),
        (["--sinks", "9" * 20], "--sink_size must be at most 2,147,483,647"),
    ):
        with pytest.raises(SystemExit) as exit_:
            sweep.main([*base, *argv])
        assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_result_of_another_cache_is_told(
    tiny: Path, tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*base, "--caches", "quantize_kv", "--sinks", "2", "--windows", "8", *rest(tiny, tmp_path)]
    sweep.main(argv)
    result = next((tmp_path / "out" / "s").glob("*quantize*"))
    record = json.loads(result.read_text())
    for rows in ([record["rows"][0]], [], [3]):
        result.write_text(json.dumps(record | {"rows": rows}))
        with pytest.raises(SystemExit) as exit_:
            sweep.main(argv)
        assert exit_.value.code == 2 and "holds no result of quantize_kv:" in capsys.readouterr().err


def test_a_cache_may_bring_knobs_of_its_own(base: list[str]) -> None:
    cache = "quantize_kv:v_bits=4,k_bits=4,rotate=false"
    args = sweep.make_parser().parse([*base, "--kind", "speed", "--caches", cache, "--sinks", "2", "--windows", "8"])
    args.rest = []
    task = sweep.tasks(args)[1]
    assert task.setting == "quantize_kv:sink_size=2,window_size=8,k_bits=4,v_bits=4,rotate=false"
    assert "--no-rotate" in task.command and task.command[task.command.index("--k_bits") + 1] == "4"


def test_a_cache_of_ones_own_without_sink_and_window_is_one_task(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    env = ENVIRONMENT | {"CACHES": "mine_kv", "SINKS": "0 4", "WINDOWS": "8 32", "COUNT": "1"}
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
        env=ENVIRONMENT | lists,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == "13", out.stderr
    lines = lists | {"SINKS": "4\n16\t64", "WINDOWS": "8\n"}  # the second line was lost in silence
    out = subprocess.run(
        ["bash", str(ROOT / "scripts" / "sweep.sh")],
        env=ENVIRONMENT | lines,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == "7", out.stderr
    sbatch = (ROOT / "scripts" / "sweep.sbatch").read_text()
    assert "SLURM_ARRAY_TASK_ID" in sbatch and subprocess.run(["bash", "-n"], input=sbatch, text=True).returncode == 0
