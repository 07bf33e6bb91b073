"""Reading JSON, and writing files whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

TOO_DEEP = "the JSON is nested too deeply"


LARGEST_JSON = 1 << 28  # bytes: an index of a thousand shards has 2^24


def read_file(path: Path, most: int) -> bytes:
    """All of a plain file. Raises UserError where it is none (a pipe or a device may never end), or larger."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{path}: {size:,} bytes, and at most {most:,} are read")
        return file.read()


def first_bytes(path: Path, n: int) -> bytes:
    """The first n bytes of a plain file, or as many as there are. Raises UserError."""
    with _opened(path) as file:
        return file.read(n)


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
        part.touch(exist_ok=False)
        part.unlink()
    except FileExistsError:
        raise UserError(f"{flag} {path}: {path.parent} is not a folder") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None


def is_special(path: Path) -> bool:
    """A pipe or a device: written to as it stands, never replaced by a file."""
    return path.exists() and not path.is_file()


def part_of(path: Path) -> Path:
    """Where the new content of `path` grows; where `path` is a link, beside what it points to."""
    target = path.resolve()
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever looks finds the old one or all of the new one. Makes its folder; raises OSError."""
    if is_special(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        part.write_text(text)
        part.replace(path.resolve())
    finally:
        part.unlink(missing_ok=True)


def write_json(target: str, report: dict[str, Any]) -> None:
    """To standard output's last line ("-") or to a file. Raises UserError."""
    if target == "-":
        print(json.dumps(report))
        return
    try:
        write_whole(Path(target), json.dumps(report) + "\n")
    except OSError as error:
        raise UserError(f"--json {target}: {error.strerror}") from None
