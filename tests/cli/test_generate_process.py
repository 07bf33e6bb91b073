"""generate.py as a process of its own: the clock from its start, Ctrl-C, a pipe that nobody reads any more."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from generate_calls import COMPRESS


def start(*argv: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "generate.py", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, **options)  # type: ignore[call-overload]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when a process began")
def test_the_report_counts_from_the_start_of_the_process(tiny: Path) -> None:
    """Python's own start, the imports and the weights are in it, and nothing that comes after the first token."""
    began = time.monotonic()
    argv = ["--checkpoint_path", tiny, "--prompt", "The", "--max_new_tokens", 3, "--json"]
    run = subprocess.run([sys.executable, ROOT / "generate.py", *map(str, argv)], capture_output=True, text=True)
    whole = time.monotonic() - began
    report = json.loads(run.stdout.splitlines()[-1])
    assert 0.5 < report["start_to_first_token_s"] < whole + 0.1
    assert 0 < report["load_weights_s"] < report["start_to_first_token_s"] - report["time_to_first_token_s"]


def test_ctrl_c_reports_what_was_done_and_exits_130(tiny: Path) -> None:
    long = ["--max_new_tokens", 100_000, "--ignore_eos", *COMPRESS]
    process = start("--checkpoint_path", tiny, "--prompt", "The red", *long)
    assert process.stdout is not None
    process.stdout.read(40)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "tokens/s" in err and "Traceback" not in err


def test_a_closed_pipe_ends_quietly(tiny: Path) -> None:
    process = start("--checkpoint_path", tiny, "--prompt", "The red", "--max_new_tokens", 100_000, *COMPRESS)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in err and "Error" not in err
