"""The memory that this process may still take where it may not take all of the machine's: containers, Slurm, ulimit.

Control groups (https://docs.kernel.org/admin-guide/cgroup-v2.html, and v1's memory controller): a group's limit holds
for all processes in it and in the groups below, so the tightest one on the way up to the root counts. What a group
has in its file cache (`inactive_file`) counts as used, and is given up when memory runs short.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc/self/cgroup")


def limited_memory(root: Path = ROOT, proc: Path = PROC) -> int | None:
    """Bytes that this process may still take; None if nothing limits it."""
    rooms = [*_room_in_groups(root, proc), *_address_space()]
    return max(0, min(rooms)) if rooms else None


def _room_in_groups(root: Path, proc: Path) -> Iterator[int]:
    """The bytes that each limited control group of this process has left."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:  # no control groups here
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)  # "0::/slice" in v2, "4:memory:/slice" in v1
        if controllers == "":
            yield from _room_left(root, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            yield from _room_left(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _room_left(mount: Path, path: str, limit_name: str, used_name: str) -> Iterator[int]:
    """The bytes left in the process's control group and in each one above it. Within a container the mount may be the
    group itself, and then its path does not exist there."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for n in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:n])
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None and limit < 1 << 60:  # v1 writes "no limit" as nearly 2^63
            yield limit - used + _inactive_file(folder)


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file, or it says "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _inactive_file(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split()[:2] for line in lines if len(line.split()) == 2)
    return int(found.get("total_inactive_file", found.get("inactive_file", "0")))


def _address_space() -> Iterator[int]:
    """`ulimit -v`, less what is mapped already."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        mapped = 0
    yield limit - mapped
