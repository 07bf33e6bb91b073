"""The bar while a long prompt is read: on a terminal, and nowhere else."""

from __future__ import annotations

import fcntl
import functools
import os
import pty
import re
import struct
import sys
import termios
import traceback
from pathlib import Path

import pytest
from tqdm import tqdm

import generate
from cli import reading


def on_a_terminal(argv: list[str]) -> tuple[int, str]:
    """The exit code, and all that a terminal is shown, of a run whose bar does not wait before it shows."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 (pytest has its own)
            fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a window has a size
            reading.PATIENCE = 0.0
            reading.tqdm = functools.partial(tqdm, mininterval=0, miniters=0, ascii=True)  # type: ignore[misc]
            generate.main(argv)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    shown = b""
    try:
        while data := os.read(terminal, 1 << 16):
            shown += data
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def test_a_terminal_sees_tokens_and_tokens_per_second(tiny: Path) -> None:
    """They count up to the prompt's, over chunks and sequences, and are gone before the text."""
    argv = ["--checkpoint_path", tiny, "--prompt", 90, "--prompt", 70, "--prefill_chunk", 40, "--max_new_tokens", 3]
    code, shown = on_a_terminal([str(a) for a in argv])
    assert code == 0, shown
    found = [int(n) for n in re.findall(r"reading: ([\d,]+) tokens in \d+:\d+, +\S+ tokens/s", shown)]
    assert found[-1] == 160 and len(found) > 4 and found == sorted(found), shown
    bar, _, rest = shown.rpartition("reading: ")
    assert "decode" in rest and "decode" not in bar  # the report comes after it
    assert re.search(r"\r +\r", rest)  # and the line is wiped


def test_nothing_is_shown_elsewhere(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--checkpoint_path", str(tiny), "--prompt", "90", "--max_new_tokens", "3"])
    assert "reading" not in capsys.readouterr().err
