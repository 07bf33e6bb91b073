"""How programs end: an exit code and one line, whatever stops them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common import files
from common.errors import UserError
from common.files import append_line, part_of, remove_dead_parts, require_writable, to_json, write_whole
from common.program import interrupt_deferred, program

IMPORTING = {  # arguments that make a program import what takes long; the others do already for --help
    "generate.py": ["--prompt", "a"],
    "scripts/benchmark.py": [],
    "scripts/convert_hf_checkpoint.py": ["--checkpoint_dir", "."],
    "scripts/download.py": ["--repo_id", "no/such"],
    "scripts/evaluate.py": ["passkey"],
    "scripts/merge_lora.py": ["--checkpoint_dir", ".", "--adapter", ".", "--out", "new"],
    "scripts/plot.py": [],
    "scripts/sweep.py": ["--name", "none"],
}
SCRIPTS = sorted(p.relative_to(ROOT) for p in [*(ROOT / "scripts").glob("*.py"), ROOT / "generate.py"])


def code_of(raised: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_, program("x.py", "stopped"):
        raise raised
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, capsys.readouterr().err


def test_an_error_is_a_line_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(UserError("no\nsuch \x1b[2Jthing"), capsys) == (2, "x.py: error: no\\nsuch \\x1b[2Jthing\n")
    assert code_of(OSError(28, "No space left on device", "a/b.json"), capsys) == (
        2,
        "x.py: error: a/b.json: No space left on device\n",
    )
    assert code_of(KeyboardInterrupt(), capsys) == (130, "stopped\n")
    assert code_of(RuntimeError("CUDA out of memory. Tried"), capsys)[0] == 2
    with pytest.raises(RuntimeError, match="a bug"), program("x.py"):
        raise RuntimeError("a bug")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def run_with(body: str, **streams: int) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom common.program import program\n"
    code += f"with program('x.py'):\n    {body}"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, **streams)


def test_a_pipe_whose_reader_left_and_a_full_disk_make_no_noise() -> None:
    read, write = os.pipe()
    os.close(read)
    out = run_with("print('a' * 100)", stdout=write)
    assert (out.returncode, out.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        out = run_with("print('a' * 100)", stdout=full.fileno())
    assert (out.returncode, out.stderr) == (2, "x.py: error: No space left on device\n")


def test_messages_that_cannot_be_written_change_no_exit_code() -> None:
    """A log on a full disk: the traceback of the message hid the mistake's own exit code, 2, and gave 1."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom common.program import program, UserError\n"
    code += "with program('x.py'):\n    raise UserError('no')"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stderr=full).returncode == 2


def test_streams_closed_by_whoever_started_the_program_are_the_null_device(tiny: Path, tmp_path: Path) -> None:
    """`>&-`, and services without streams: Python has None there, which had no method that was called."""
    generate = (
        f"{sys.executable} {ROOT}/generate.py --checkpoint_path {tiny} --max_new_tokens 3 --json {tmp_path}/a.json"
    )
    out = subprocess.run(f"{generate} --prompt a <&- >&- 2>&-", shell=True)
    assert out.returncode == 0 and json.loads((tmp_path / "a.json").read_text())["model"]
    out = subprocess.run(f"{generate} --prompt - <&-", shell=True, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (2, "generate.py: error: --prompt -: standard input is empty\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_ctrl_c_while_a_program_is_being_imported_is_quiet(script: Path, tmp_path: Path) -> None:
    """Traceback after traceback, in the first seconds of every script."""
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *IMPORTING.get(str(script), ["--help"])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    while b"torch" not in Path(f"/proc/{process.pid}/maps").read_bytes() and process.poll() is None:
        pass  # it has begun to import what takes long
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert not list(tmp_path.iterdir())


def test_a_block_is_not_divided_by_a_ctrl_c() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")
    assert done


# --- Files ------------------------------------------------------------------------------------------


def test_a_line_is_added_whole_and_half_a_line_of_a_dead_run_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk left half a line, and the next record was glued to it."""
    file = tmp_path / "new" / "speed.json"
    append_line(file, '{"a": 1}')
    file.write_text(file.read_text() + '{"b": [1, 2')
    append_line(file, '{"c": 3}')
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 1}, {"c": 3}]
    assert "cut off" in capsys.readouterr().err
    file.write_text('{"a": 1}')  # whole, but without its end: somebody's editor
    append_line(file, '{"c": 3}')
    assert file.read_text() == '{"a": 1}\n{"c": 3}\n'

    def full(self: Path, text: str, **_: object) -> int:
        with self.open("w") as out:
            out.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        append_line(file, '{"d": 4}')
    assert file.read_bytes() == b'{"a": 1}\n{"c": 3}\n' and [f.name for f in file.parent.iterdir()] == ["speed.json"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        append_line(file, "{}")


def test_parts_of_dead_runs_block_nothing_and_are_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale part whose pid came back blocked `--json` with "is not a folder"."""
    file = tmp_path / "a.json"
    part_of(file).write_text("half")
    require_writable(file, "--json")
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        part_of(file).write_text("half")
    monkeypatch.undo()
    elsewhere = tmp_path / f".a.json.another-host.{dead.pid}.part"
    elsewhere.write_text("half")
    remove_dead_parts(file)
    left = {f.name for f in tmp_path.iterdir()}
    assert left == {f".a.json.{files._host()}.{os.getppid()}.part", elsewhere.name}  # those may be alive
    write_whole(file, "é")
    assert file.read_bytes() == "é".encode()


def test_what_is_not_finite_is_named_and_not_written() -> None:
    with pytest.raises(UserError, match=r"not written: rows\[1\]\.kl is not a finite number"):
        to_json({"rows": [{"kl": 1.0}, {"kl": float("nan")}]})
