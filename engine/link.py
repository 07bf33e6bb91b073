"""What holds the processes of one run together beside their tensors: who is there, who failed, when to end.

`torchrun` starts a process a rank. Collectives alone would leave the others waiting for ever when one dies (a captured
CUDA graph has no time limit), so every rank has a connection to rank 0, which the system closes when its process ends,
however it ends: rank 0 sees it, tells the others, and everybody exits. Over the same connections a rank that finds a
mistake tells rank 0, which alone prints, and rank 0 asks for what its report says of the others. All of it is done by
threads, which need neither the main thread nor the device: both may be waiting in a collective.

    rank k to 0   hello, token, k       failed, line      report, {...}     bye (all work is done)
    rank 0 to k   ask (for a report)    end, status       lost, line
"""

from __future__ import annotations

import io
import json
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from common.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

MOST_RANKS = 1 << 12
JOIN_SECONDS = 25  # for all ranks to come
GRACE_SECONDS = 2.0  # in which rank 0 may find the mistake of another rank itself


class _LastLine(io.TextIOBase):
    """Standard error of a rank that does not print: what it would have said last."""

    line = ""

    def write(self, text: str) -> int:
        self.line = next((line for line in reversed(text.splitlines()) if line.strip()), self.line)
        return len(text)


class Link:
    """One rank's end of it. answer: what `reports` on rank 0 gets of this rank."""

    def __init__(self, environment: Mapping[str, str], program: str) -> None:
        """Waits until all ranks are there. Raises UserError where they do not come."""
        # Not above: a process that is alone need not wait for torch to be imported.
        from torch.distributed import DistNetworkError, DistStoreError
        from torch.distributed.rendezvous import rendezvous

        self.program, self.stderr = program, sys.stderr
        try:
            self.rank, self.size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            self.local_rank = int(environment.get("LOCAL_RANK", self.rank))
            host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
            if not (0 <= self.rank < self.size <= MOST_RANKS and self.local_rank >= 0 and 0 <= port < 1 << 16):
                raise ValueError
        except (KeyError, ValueError):
            raise UserError("RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: torchrun sets them, all or none") from None
        try:
            socket.getaddrinfo(host, port)  # torch writes a page about a host that it cannot find
        except (OSError, UnicodeError) as error:
            raise UserError(f"MASTER_ADDR {host}: {getattr(error, 'strerror', None) or 'no host'}") from None
        self.answer: Callable[[], dict[str, Any]] = dict
        self.released, self.leaving, self.dying = threading.Event(), threading.Event(), threading.Lock()
        self.writing = threading.Lock()
        self.peers: dict[int, socket.socket] = {}
        self.done: dict[int, threading.Event] = {k: threading.Event() for k in range(self.size)}
        self.answers: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        try:
            timeout = timedelta(seconds=JOIN_SECONDS)
            self.store: Store = next(rendezvous("env://", self.rank, self.size, timeout=timeout))[0]
            self._connect(host)
        except (DistStoreError, DistNetworkError, OSError, ValueError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"rank {self.rank}: not all of {self.size} ranks came within {JOIN_SECONDS} s ({line})"
            ) from None
        if self.rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 is interrupted, and ends the others
            sys.stdout, self.said = open(os.devnull, "w"), _LastLine()  # noqa: SIM115 (for good)
            sys.stderr = self.said

    def _connect(self, host: str) -> None:
        if self.rank == 0:
            listener = socket.create_server((host, 0)) if _is_here(host) else socket.create_server(("", 0))
            listener.settimeout(JOIN_SECONDS)
            token = secrets.token_hex(16)
            self.store.set("link", json.dumps([listener.getsockname()[1], token]))
            while len(self.peers) < self.size - 1:
                connection, _ = listener.accept()
                connection.settimeout(JOIN_SECONDS)
                hello = _receive(connection.makefile("r")) or []
                if len(hello) == 3 and hello[:2] == ["hello", token]:
                    connection.settimeout(None)
                    self.peers[hello[2]] = connection
            listener.close()
        else:
            port, token = json.loads(self.store.get("link"))
            self.peers[0] = socket.create_connection((host, port), JOIN_SECONDS)
            self.peers[0].settimeout(None)
            self._send(0, "hello", token, self.rank)
        for peer, connection in self.peers.items():
            listen = self._listen if self.rank == 0 else self._obey
            threading.Thread(target=listen, args=(peer, connection), name=f"link to {peer}", daemon=True).start()

    def _send(self, peer: int, *message: Any) -> None:
        try:
            with self.writing:
                self.peers[peer].sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # it is gone: its thread will see that
            return

    # --- Rank 0's threads, one for each other rank ---

    def _listen(self, peer: int, connection: socket.socket) -> None:
        lines = connection.makefile("r")
        while (message := _receive(lines)) is not None:
            kind, *rest = message
            if kind == "report":
                self.answers.put((peer, rest[0]))
            elif kind == "bye":
                self.done[peer].set()
            elif kind == "failed":
                if not self.leaving.wait(GRACE_SECONDS):  # otherwise rank 0 has found it too, and has said so
                    self._die(f"rank {peer}: {rest[0]}", rest[1])
                return
        if not (self.done[peer].is_set() or self.leaving.is_set()):
            self._die(f"{self.program}: error: rank {peer} has ended: the others cannot go on", 1)

    def _die(self, line: str, status: int) -> None:
        with self.dying:
            print(line, file=self.stderr, flush=True)
            for peer in self.peers:
                self._send(peer, "lost", line)
            os._exit(status)

    # --- The other ranks' thread ---

    def _obey(self, _: int, connection: socket.socket) -> None:
        lines = connection.makefile("r")
        while (message := _receive(lines)) is not None:
            kind, *rest = message
            if kind == "ask":
                self._send(0, "report", self.answer())
            elif kind == "end":
                if not self.leaving.is_set():
                    os._exit(rest[0])
                self.released.set()
                return
            elif kind == "lost":
                if self.leaving.is_set():  # it has a status of its own
                    self.released.set()
                    return
                print(f"{self.program}: rank {self.rank} ends too: {rest[0]}", file=self.stderr, flush=True)
                os._exit(1)
        print(f"{self.program}: error: rank 0 has ended: rank {self.rank} cannot go on", file=self.stderr, flush=True)
        os._exit(1)

    # --- What the main threads call ---

    def reports(self, seconds: float = 5.0) -> list[dict[str, Any]]:
        """On rank 0: every rank's `answer`, in order; whatever their main threads wait for."""
        found = {0: self.answer()}
        for peer in self.peers:
            self._send(peer, "ask")
        until = time.monotonic() + seconds
        while len(found) < self.size and time.monotonic() < until:
            try:
                peer, report = self.answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            found[peer] = report
        return [found.get(rank, {}) for rank in range(self.size)]

    def finish(self) -> None:
        """All is done and written here. Rank 0 waits for the others to come so far, unless one dies meanwhile.

        Without this call the end of rank 0's main thread is the end of every rank, with the same status.
        """
        if self.rank:
            self._send(0, "bye")
        for peer in self.peers if self.rank == 0 else ():
            self.done[peer].wait()

    def leave(self, status: int, line: str = "") -> None:
        """The last call: this rank's main thread ends with `status`, and line is what it would say."""
        self.leaving.set()
        if self.rank == 0:
            for peer in self.peers:
                self._send(peer, "end", status)
            return
        if status:
            self._send(0, "failed", line, status)
        self.released.wait()  # rank 0 speaks first: torchrun ends everybody at the first who fails


def _is_here(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", "::1")


def _receive(lines: Any) -> list[Any] | None:
    """The next message; None where the connection has ended."""
    try:
        line = lines.readline()
    except OSError:
        return None
    return json.loads(line) if line.endswith("\n") else None


@contextmanager
def linked(program: str) -> Iterator[Link | None]:
    """The link of a process that torchrun started; None of one that is alone. On leaving the others are told."""
    if "RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    try:
        link = Link(os.environ, program)
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        yield link
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        link.leave(status, link.said.line if link.rank else "")
        _end(status)
    except BaseException as error:
        time.sleep(GRACE_SECONDS)  # a collective fails when a rank has died: then the link's thread ends this process
        traceback.print_exc(file=link.stderr)
        link.leave(1, f"{program}: error: {type(error).__name__}: {error}")
        os._exit(1)
    link.leave(0)
    _end(0)


def _end(status: int) -> NoReturn:
    """The process's, without the interpreter's: NCCL would wait there for graphs that hold its collectives."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(status)
