"""Programs run in a fork of the test's process: as killable as any process, and torch is imported already."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

MODULES = {
    "generate.py": "generate",
    "evaluate.py": "evaluation.command",
    "benchmark.py": "benchmark.command",
    "convert_hf_checkpoint.py": "cli.convert",
    "plot.py": "plots.command",
    "sweep.py": "evaluation.sweep",
    "train_demo.py": "training.command",
}


class Forked:
    """A program under way. out: a file for both of its streams. stdin: what it can read there."""

    def __init__(self, program: str, argv: Sequence[object], out: Path, stdin: str = os.devnull) -> None:
        self.main = importlib.import_module(MODULES[program]).main  # before the fork: the child imports nothing
        self.out, self.stdin = out, stdin
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run([str(word) for word in argv])

    def _run(self, argv: list[str]) -> NoReturn:
        code = 70
        try:
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # as `start` begins and ends
            handle = os.open(self.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(handle, number)
            os.dup2(os.open(self.stdin, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.main(argv)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def wait(self) -> int:
        """Its exit code; minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def stop(self, number: int, seconds: float) -> int:
        """Send a signal after so many seconds, if it is still there, and wait."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(self.pid, number)
        return self.wait()


def run_forked(command: Sequence[str], out: Path) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` does with [python, script, ...]."""
    code = Forked(Path(command[1]).name, command[2:], out).wait()
    return subprocess.CompletedProcess(command, code, out.read_text(), "")


def fork_instead(monkeypatch: Any, tmp_path: Path) -> list[str]:
    """Let what is tested fork its programs rather than start them. Returns the list that their scripts go to."""
    ran: list[str] = []
    original = subprocess.run

    def run(command: Any, **options: Any) -> Any:
        if isinstance(command, tuple) and command[0] == sys.executable:
            ran.append(command[1])
            return run_forked(command, tmp_path / "said.txt")
        return original(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    return ran
