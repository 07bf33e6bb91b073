"""Several ranks of a run, on this machine: forked from the tests' process, which has imported torch already."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Rank:
    """A process, and the files that its standard output and error go to."""

    pid: int
    out: Path
    err: Path
    status: int | None = None  # of its end; minus the signal that killed it

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(
    n: int, body: Callable[[int], object], folder: Path, stdin: str = "", missing: int | None = None
) -> list[Rank]:
    """Fork n ranks that each call body(rank), with the variables that torchrun sets. stdin: what rank 0 can read.
    missing: a rank that is not started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stdin").write_text(stdin)
    port, ranks = free_port(), []
    for k in range(n):
        if k == missing:
            continue
        rank = Rank(0, folder / f"out{k}", folder / f"err{k}")
        sys.stdout.flush()
        rank.pid = os.fork()
        if rank.pid:
            ranks.append(rank)
            continue
        status = 1
        gc.freeze()  # what the tests' process has left over is its own to end
        try:
            variables = {"RANK": k, "WORLD_SIZE": n, "LOCAL_RANK": k, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in variables.items()})
            for file, fd, mode in ((folder / "stdin", 0, "r"), (rank.out, 1, "w"), (rank.err, 2, "w")):
                with file.open(mode) as stream:
                    os.dup2(stream.fileno(), fd)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            faulthandler.enable(sys.stderr)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            body(k)
            status = 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return ranks


def finish(ranks: list[Rank], seconds: float = 60) -> list[int | None]:
    """The statuses of all; those who are not done in time are killed, and have None."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
    found = [rank.poll() for rank in ranks]
    for rank in ranks:
        rank.kill(signal.SIGABRT)  # its error output then says where it stood
    return found


def wait_for(file: Path, text: str, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while text not in (file.read_text() if file.exists() else ""):
        assert time.monotonic() < until, file.read_text() if file.exists() else f"{file} is not there"
        time.sleep(0.02)
