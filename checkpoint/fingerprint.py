"""What a checkpoint holds, in 64 hexadecimal digits: two that differ in a byte that is read are two.

Names of folders say nothing: A/model.pth and B/model.pth are called alike in every command and record.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

BLOCK = 1 << 26  # bytes that are hashed by one thread at a time
MOST_THREADS = 8
WEIGHTS = ("*.safetensors", "*.pth", "*.bin", "*.gguf")
COMPANIONS = (  # what is read beside weights: configs, tokenizers, templates, indices of shards
    "*config.json", "params.json", "tok*.json", "tekken.json", "vocab.json", "*tokens*.json", "*.index.json",
    "chat_template*", "*.model", "*.tiktoken", "merges.txt", "vocabulary.gguf",
)  # fmt: skip
_SHARD = re.compile(r"(.*-)\d{5}(-of-\d{5}\..*)")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the SHA-256 of every 64 MiB, which several threads find at once. Raises OSError."""
    size = path.stat().st_size

    def digest(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK)).digest()

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        return hashlib.sha256(b"".join(threads.map(digest, range(0, size, BLOCK)))).hexdigest()


def files_of(path: Path) -> list[Path]:
    """The files that a checkpoint may be read from. Of a file, itself, its shards, and what lies beside it."""
    folder = path if path.is_dir() else path.parent
    found = [f for f in sorted(folder.iterdir()) if f.is_file()]
    if not path.is_dir():
        shard = _SHARD.fullmatch(path.name)
        beside = [f for f in found if shard and (m := _SHARD.fullmatch(f.name)) and m.groups() == shard.groups()]
        # An index of shards names files of its own
        beside = beside or ([f for f in found if _matches(f, WEIGHTS)] if path.suffix == ".json" else [path])
        return [f for f in found if f in beside or _matches(f, COMPANIONS)]
    inner = [path / "original" / "tokenizer.model", *sorted(path.glob("snapshots/*/*"))]  # the second: a Hub cache's
    return [f for f in [*found, *inner] if f.is_file() and _matches(f, (*WEIGHTS, *COMPANIONS))]


def _matches(file: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in patterns)


def fingerprint(path: Path) -> str:
    """A sha256 of all files that a checkpoint is read from, and of their names. Raises OSError."""
    whole = hashlib.sha256()
    for file in files_of(path):
        whole.update(f"{file.name}\0{sha256_of_file(file)}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()
