"""How a program begins, ends and fails: one line and an exit code, never a traceback, whatever interrupts it.

Exit codes: 0 done (also where the reader of a pipe has seen enough, as in `| head -1`), 1 some of several tasks failed,
2 a mistake, a full disk or a device whose memory ran out, 130 interrupted.
"""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO

from common.errors import UserError, printable
from common.messages import say
from common.packages import missing_packages_reported


def start(module: str) -> None:
    """Import a module and run its `main`; a Ctrl-C during the import ends the program without a traceback."""
    signal.signal(signal.SIGINT, _leave)
    with missing_packages_reported():
        main = importlib.import_module(module).main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with missing_packages_reported():
            main()
    except KeyboardInterrupt:  # before its own way to end has begun
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, _leave)  # the interpreter's own end has nothing to report either


def _leave(*_: object) -> NoReturn:
    os._exit(130)


@contextmanager
def importing() -> Iterator[None]:
    """For imports that take seconds, within a `main`: a Ctrl-C ends the program at once, since compiled code would turn
    it into some other error. If Ctrl-C is ignored, as on all ranks but the first, it stays so.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, _leave)
    gc.disable()  # what is imported stays: to look through it for garbage, again and again, is in vain
    try:
        yield
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)


@contextmanager
def program(name: str, interrupted: str = "interrupted", ranks: bool = False) -> Iterator[None]:
    """The body of a `main`: what it raises becomes one line on standard error and an exit code.

    interrupted: the message at a Ctrl-C, "" for none. ranks: whether it may be one of several processes
    of one run; otherwise each would do all of the work and write the same files.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a model writes, and a table, fit no smaller alphabet
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # stray bytes are told where they are read, not a traceback
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        with _interrupts_recognised():
            if not ranks:
                _require_alone()
            yield
        sys.stdout.flush()  # not at the interpreter's end, where an error could only be ignored
    except UserError as error:
        fail(name, str(error))
    except KeyboardInterrupt:
        with interrupts_ignored():
            _drop_output()
            if interrupted:
                say(interrupted)
        sys.exit(130)
    except BrokenPipeError:
        _drop_output()
    except OSError as error:  # a full disk, a folder that may not be written
        _drop_output()
        fail(name, describe(error))
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        fail(name, "the device's memory ran out: does another program run?")


def _open_closed_streams() -> None:
    """A standard stream that whoever started the program has closed (`>&-`, some services) is None in Python: it
    becomes the null device, so a prompt from there is empty, and text and messages go nowhere.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the program runs)


def _require_alone() -> None:
    """Raises UserError on the first rank if `torchrun` started several. The others end silently and a little later,
    since torchrun ends all ranks when one has ended.
    """
    n_rank, rank = (os.environ.get(name, "0") for name in ("WORLD_SIZE", "RANK"))
    if not n_rank.isdecimal() or int(n_rank) < 2 or "RANK" not in os.environ:
        return
    if rank != "0":
        time.sleep(1)
        sys.exit(2)
    raise UserError(
        f"it runs on one device, and {n_rank} ranks were started (generate.py and scripts/benchmark.py share)"
    )


@contextmanager
def _interrupts_recognised() -> Iterator[None]:
    """If compiled code turned a Ctrl-C into an error of its own (safetensors: a ValueError), raise KeyboardInterrupt.

    Does nothing if Ctrl-C is handled elsewhere already, or in a thread, which gets no signals.
    """
    handled = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except (UserError, OSError):  # they say what went wrong themselves
        raise
    except Exception as error:
        if seen:
            raise KeyboardInterrupt from error
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def fail(name: str, message: str) -> NoReturn:
    """Exit with 2 and a line on standard error, or without it if that cannot be written (a log on a full disk)."""
    try:
        say(f"{name}: error: {printable(message)}")
    except OSError:
        _drop(sys.stderr)
    sys.exit(2)


def describe(error: OSError) -> str:
    """ "results/a.json: No space left on device"."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _drop_output() -> None:
    """What is left in the buffer goes nowhere: flushing it at the interpreter's end would fail again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _drop(sys.stdout)


def _drop(stream: TextIO) -> None:
    """What a stream still holds, and all that follows, goes to the null device."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # a stream that is no file, as in tests
        return


def ran_out(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory. PyTorch's allocator has a class for it; other
    allocations, such as a stream's, only say so in their text.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error)
        for words in ("out of memory", "can't allocate memory")  # a GPU's, the CPU's
    )


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C: a second one must not cut off the report that follows the first."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def first_interrupt_noted(noted: bool = True) -> Iterator[list[int]]:
    """Yields a list to which the first Ctrl-C is added, so that the block can stop where it suits; a second one raises.

    noted: False if the first one is to raise too.
    """
    caught: list[int] = [] if noted else [signal.SIGINT]

    def note(number: int, _: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught if noted else []
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Let a Ctrl-C wait until the block has ended, so that no update is left half done."""
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt
