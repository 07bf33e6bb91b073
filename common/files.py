"""Reading JSON, and writing files whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError

TOO_DEEP = "the JSON is nested too deeply"


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON object from a file; {} for a file that is not there and need not be. Raises UserError."""
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # json's own error and a wrong encoding are both of this class
        raise UserError(f"{path}: not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: {TOO_DEEP}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object")
    return fields


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
