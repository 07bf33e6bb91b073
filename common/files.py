"""Reading JSON, and writing files whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import lzma
import math
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError
from common.messages import say

TOO_DEEP = "the JSON is nested too deeply"


LARGEST_JSON = 1 << 28  # bytes: an index of a thousand shards has 2^24


def read_file(path: Path, most: int) -> bytes:
    """All of a plain file. Raises UserError where it is none (a pipe or a device may never end), or larger."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{path}: {size:,} bytes, and at most {most:,} are read")
        return file.read()


def read_stream(path: Path, most: int) -> bytes:
    """All of a file, a pipe or a device that is meant to be read (`<(...)`). Raises UserError past `most` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(data) > most:
        raise UserError(f"{path}: more than {most:,} bytes")
    return data


LARGEST_TEXT = 1 << 28  # bytes: fifty long books


def read_text_file(path: Path) -> str:
    """A text of somebody's, decompressed if it is an .xz, or from a pipe. Raises UserError, also where it is too large:
    a device has no end, and a few kilobytes of .xz may hold gigabytes.
    """
    if path.is_fifo():
        say(f"{path}: reading from a pipe")
    data = read_stream(path, LARGEST_TEXT)
    try:
        if path.suffix == ".xz":
            with lzma.open(io.BytesIO(data)) as file:
                data = file.read(LARGEST_TEXT + 1)
            if len(data) > LARGEST_TEXT:
                raise UserError(f"{path}: more than {LARGEST_TEXT:,} bytes when decompressed")
        return data.decode("utf-8-sig")
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path}: damaged, or not made by xz ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def first_bytes(path: Path, n: int) -> bytes:
    """The first n bytes of a plain file, or as many as there are. Raises UserError."""
    with _opened(path) as file:
        return file.read(n)


def require_there(path: Path) -> None:
    """Raises UserError if `path` does not exist; the error says so if it looks like a model's name on the Hub."""
    if path.exists():
        return
    hub = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        hub = f"; if it is a model of the Hugging Face Hub: python scripts/download.py --repo_id {path}"
    raise UserError(f"{path}: {'a link to nothing' if path.is_symlink() else 'no such file or folder'}{hub}")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        kind = stat.S_IFMT(path.stat().st_mode)  # before it is opened: a pipe nobody writes to would wait for ever
        if kind != stat.S_IFREG:
            raise UserError(f"{path}: a {'folder' if kind == stat.S_IFDIR else 'pipe or a device'}, not a file")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: {error}") from None  # a null character


def is_plain_file(path: Path) -> bool:
    """Whether there is a file to read, through links: no folder, pipe or device, no link to nothing or to itself."""
    return os.path.isfile(path)


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """A JSON object. Raises UserError, which names `where`."""
    try:
        fields = json.loads(data)
        if re.search(rb"\\u[dD][89a-fA-F]", data):  # halves of pairs, which nothing can write or look up
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a surrogate pair, which is no text") from None
    except ValueError as error:  # json's own error and a wrong encoding are both of this class
        raise UserError(f"{where}: not JSON ({error}); is it truncated?") from None
    except RecursionError:
        raise UserError(f"{where}: {TOO_DEEP}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object")
    return fields


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON object from a file; {} for a file that is not there and need not be. Raises UserError."""
    if missing_ok and not os.path.lexists(path):
        return {}
    return parse_json(read_file(path, LARGEST_JSON), path)


def require_writable(path: Path, flag: str) -> None:
    """Raises UserError if `path` cannot be written: before the work, not after it. Makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        part = part_of(path)
        part.touch()
        part.unlink()
        remove_dead_parts(path)
    except FileExistsError:
        raise UserError(f"{flag} {path}: {path.parent} is not a folder") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None


def is_special(path: Path) -> bool:
    """A pipe or a device: written to as it stands, never replaced by a file."""
    return path.exists() and not path.is_file()


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())


def part_of(path: Path) -> Path:
    """The temporary file that the new content of `path` is written to; beside the target, if `path` is a link.

    The name is this process's own: a file that has it already was left by a dead process, and is written over.
    """
    target = path.resolve()
    return target.with_name(f".{target.name}.{_host()}.{os.getpid()}.part")


def remove_dead_parts(path: Path) -> None:
    """Remove the temporary files of `path` (`part_of`) that processes of this machine left when they were killed."""
    target = path.resolve()
    mine = re.compile(re.escape(f".{target.name}.{_host()}.") + r"(\d+)\.part")
    for name in os.listdir(target.parent):
        found = mine.fullmatch(name)
        if found is not None and not _alive(int(found[1])):
            (target.parent / name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process of ours has such a number
        return True
    return True


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary file, which replaces `path` at the end of the block. If the block raises, it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        part.replace(path.resolve())
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever looks finds the old one or all of the new one. Makes its folder; raises OSError."""
    if is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    with replaced_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all. Half a line that a killed run left there is removed, with a message.

    Raises OSError, or UserError if the file is not lines of text.
    """
    if is_special(path):
        with path.open("a", encoding="utf-8") as out:
            out.write(line + "\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8, so no line is added to it") from None
        lines = text.split("\n")
        if lines[-1] and not _is_json(lines[-1]):
            say(f"{path}: its last line was cut off when a run died; it is left out")
            lines[-1] = ""
        kept = "\n".join(lines)
        write_whole(path, kept + ("\n" if lines[-1] else "") + line + "\n")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock of the folder, so that runs that add to one file at the same moment wait for each other. It does
    nothing if the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network's file system without locks: runs at the same moment are rare enough there
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def to_json(value: Any) -> str:
    """One line of JSON. Raises UserError, naming the field, where a number is not finite: JSON has no NaN."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        raise UserError(f"not written: {_not_finite(value, '') or 'the record'} is not a finite number") from None


def _not_finite(value: Any, name: str) -> str | None:
    """The name of the first number inside that is a NaN or an infinity."""
    if isinstance(value, float):
        return None if math.isfinite(value) else name
    inside: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        inside = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        inside = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return next((found for key, item in inside if (found := _not_finite(item, key))), None)


def write_json(target: str, report: dict[str, Any]) -> None:
    """Write JSON to a file, or as standard output's last line ("-"). Raises UserError."""
    text = to_json(report)
    if target == "-":
        print(text)
        return
    try:
        write_whole(Path(target), text + "\n")
    except OSError as error:
        raise UserError(f"--json {target}: {error.strerror}") from None
