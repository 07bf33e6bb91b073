"""The full cache's results in a folder, for settings that are evaluated one by one (sweep.py, a Slurm array).

Every setting is compared with the full cache on the same texts, and the full cache's part is the same each time: its
hidden states of each window, its scores, its answers, the text that the model writes by itself. The first run that
needs one of these results computes and stores it; later runs read it back, equal to the bit. Each result is a file of
its own. It has checksums and names all that it was made from: weights, texts, settings, dtype, device, torch, and the
program's own sources. A file that names anything else, or that is damaged, is computed again.

Two runs at the same time wait for each other by a file lock, which ends with the process that holds it. On a file
system without locks each run computes what it does not find.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import remove_dead_parts, replaced_whole, require_writable
from common.messages import note
from common.tensor_file import TensorFile, write_tensors
from evaluation.flags import KEEP_FULL as FLAG

KIND = "selective_kv_full"
WHAT = "a result of the full cache"
ROOT = Path(__file__).parents[1]
ROOMS = ("", "selective_kv", "engine", "weights", "checkpoint", "cli", "common", "evaluation")  # sources of a result
Make = Callable[[], Mapping[str, Tensor]]


def without_flag(argv: Sequence[str]) -> list[str]:
    """A command line without `--keep_full`, which changes no result."""
    found: list[str] = []
    words = iter(argv)
    for word in words:
        if word == FLAG:
            next(words, None)
        elif not word.startswith(f"{FLAG}="):
            found.append(word)
    return found


def sources() -> str:
    """A sha256 of the program's own sources: an edited program may compute another result."""
    whole = hashlib.sha256()
    for room in ROOMS:
        folder = ROOT / room
        for file in sorted(folder.rglob("*.py") if room else folder.glob("*.py")):
            whole.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return whole.hexdigest()


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the full cache's results depend on: all of a run's record, as evaluate.py writes it, but its command and
    commit; the sources; and what decides the last bits of a CPU's arithmetic."""
    arithmetic = {"instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    found = {name: value for name, value in record.items() if name not in ("command", "commit")}
    return json.loads(json.dumps(found | {"sources": sources(), "arithmetic": arithmetic}))


class FullResults:
    """Results by name. `folder` None: nothing is stored, every result is computed."""

    def __init__(self, folder: Path | None = None, record: Mapping[str, Any] | None = None) -> None:
        """record: of the run that asks. Raises UserError where the folder cannot be written."""
        self.folder = None
        if folder is not None:
            self.identity = identity(record or {})
            digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
            self.folder = folder / digest[:16]
            require_writable(self.folder / "lock", FLAG)

    def result(self, name: str, of: Iterable[int], make: Make) -> Mapping[str, Tensor]:
        """The tensors that `make` returns: read from the file if there is one (then on the CPU), else computed and
        stored. Raises OSError.

        of: the tokens that the result is made from, since no record names a text that came through a pipe.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.safetensors"
        record = {"identity": self.identity, "name": name, "of": hashlib.sha256(repr(list(of)).encode()).hexdigest()}
        found = _read(path, record)
        if found is not None:
            return found
        with _alone(self.folder / "lock"):
            found = _read(path, record)  # the run that held the lock may have stored it
            if found is None:
                found = make()
                with replaced_whole(path) as part:
                    write_tensors(part, KIND, record, found)
                remove_dead_parts(path)
        return found

    def text(self, name: str, of: Iterable[int], make: Callable[[], str]) -> str:
        """`result` for a text."""

        def encoded() -> Mapping[str, Tensor]:
            return {"text": torch.frombuffer(bytearray(make().encode() + b"."), dtype=torch.uint8)}  # none is empty

        return self.result(name, of, encoded)["text"].numpy().tobytes()[:-1].decode()


def _read(path: Path, record: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """The tensors of a stored result; None if there is no file, or it is damaged or has another record."""
    if not path.is_file():
        return None
    try:
        file = TensorFile(path, KIND, WHAT)
        if file.record != record:
            return None
        # Copied to where PyTorch aligns tensors: a product's last bit may depend on that
        return {name: tensor.clone() for name, tensor in file.read(file.sums)}
    except UserError:  # cut off, damaged, or gone since: it is made again
        return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock on `path`, an empty file that is made, where the file system has locks."""
    path.parent.mkdir(parents=True, exist_ok=True)  # another run may have cleared the folder away
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a network's file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note("another run computes what the full cache gives: waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
