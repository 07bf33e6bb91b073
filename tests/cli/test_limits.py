"""The command line at its edges: numbers out of range, files that are none, a Ctrl-C in a conversation."""

from __future__ import annotations

import io
import json
import os
import stat
import threading
from pathlib import Path

import pytest

import generate
from common import files
from engine import Engine


def run(*argv: object) -> None:
    generate.main(["--device", "cpu", *map(str, argv)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "nan"], "--temperature must be 0 or at least 0.0001"),
        (["--temperature", "1e-320"], "--temperature must be 0 or at least 0.0001"),
        (["--temperature", "inf"], "--temperature must be 0 or at least 0.0001"),
        (["--seed", "9" * 23], "--seed must fit 64 bits"),
        (["--prompt", "9" * 23], "at most 16,777,216 random tokens"),
        (["--num_samples", "999999999999"], "more than 2,147,483,647"),
        (["--num_samples", "999999"], "a batch has at most 65535 sequences"),
        (["--context", "100"], "--context is the room of a conversation"),
        (["--interactive", "--num_samples", "2"], "no --num_samples"),
        (["--interactive", "--context", "20", "compress_kv"], "less than --sink_size + --window_size, 48"),
        (["--profile", ""], "--profile"),
    ],
)
def test_out_of_range_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(*argv)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_a_pipe_given_for_the_report_stays_a_pipe(tmp_path: Path) -> None:
    """A device node was once replaced by a file: /dev/full, and /dev/null would have been."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    files.write_json(str(pipe), {"a": 1})
    reader.join(10)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and json.loads(got[0]) == {"a": 1}


def test_a_link_is_written_through_and_a_neighbour_left_alone(tmp_path: Path) -> None:
    target, link, part = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "link.json.part"
    link.symlink_to(target)
    part.write_text("mine")
    files.require_writable(link, "--json")
    files.write_json(str(link), {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1} and part.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "link.json.part", "target.json"]


def test_an_interrupted_turn_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, steps = Engine.step, 0

    def step(self: Engine) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr("sys.stdin", io.StringIO("The fox\n"))
    with pytest.raises(SystemExit) as exit_:
        run("--interactive", "--max_new_tokens", 30, "--ignore_eos", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert exit_.value.code == 130 and report["tokens_written"] == 5 and report["texts"][0]
    assert report["tokens_read"] > 0 and "5 tokens written" in capsys.readouterr().err


def test_a_plan_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    run("--prompt", "100", "--dry_run", "--json", "-")
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["total"] == plan["weights"] + sum(plan["cache"].values()) + plan["activations"]
