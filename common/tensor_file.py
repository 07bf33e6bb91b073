"""Tensors and a record in one safetensors file, written and read side by side, with a checksum of each.

safetensors' own `save_file` wants every tensor in memory at once and copies it once more; a cache has gigabytes on a
GPU. Here each tensor is copied, summed and written by itself, a few at a time. The format is the library's, and so is
the reader: eight bytes of length, a JSON header (name: dtype, shape, where its bytes are), the bytes.

The record is JSON in the header's metadata, with its own SHA-256 beside it; it holds those of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
THREADS = 4  # tensors on their way at once
NO_SUM = "0" * 64  # stands in the header until the bytes are known


def write_tensors(path: Path, kind: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a new file at `path`. kind: what the record is called in the metadata. Raises OSError.

    The tensors may lie on any device and have any strides.
    """
    sums = dict.fromkeys(tensors, NO_SUM)
    first = len(_header(kind, record, sums, tensors))
    places, end = {}, first
    for name, tensor in tensors.items():
        places[name] = end
        end += tensor.nbytes
    with open(path, "wb", buffering=0) as file:

        def copy(name: str) -> None:
            host = tensors[name].detach().contiguous().cpu()
            sums[name] = _sum(host)
            _write_at(file.fileno(), _bytes(host), places[name])

        for _ in _side_by_side(copy, tensors):
            pass
        _write_at(file.fileno(), memoryview(_header(kind, record, sums, tensors)), 0)


class TensorFile:
    """A file that `write_tensors` made. Opening it reads the header alone. Raises UserError, in one line."""

    def __init__(self, path: Path, kind: str, what: str) -> None:
        """what: words for such a file, for errors."""
        self.path, self.what = path, what
        if not path.is_file():
            raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
        try:
            self.handle = safe_open(path, framework="pt", device="cpu")
            metadata = self.handle.metadata() or {}
        except UnicodeEncodeError:
            raise UserError(f"{path}: the library of safetensors opens only paths that are UTF-8") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not {what}, or cut short ({error})") from None
        if kind not in metadata:
            raise UserError(f"{path}: not {what}: its metadata has no {kind!r}")
        if metadata.get("sha256") != hashlib.sha256(metadata[kind].encode()).hexdigest():
            raise UserError(f"{path}: {what} that was changed since it was written")
        try:
            self.record: dict[str, Any] = json.loads(metadata[kind])
            self.sums: dict[str, str] = self.record.pop("sha256")
        except (ValueError, LookupError, AttributeError, RecursionError):
            raise UserError(f"{path}: {what} of another version") from None
        if set(self.sums) != set(self.handle.keys()):
            raise UserError(f"{path}: {what} that was changed since it was written")

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A tensor's shape; None where there is none of that name."""
        return tuple(self.handle.get_slice(name).get_shape()) if name in self.sums else None

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the file, mapped into memory and compared with their checksums. Raises UserError."""

        def get(name: str) -> tuple[str, Tensor]:
            tensor = self.handle.get_tensor(name)
            if _sum(tensor) != self.sums[name]:
                raise UserError(f"{self.path}: {self.what} that was changed or damaged since it was written ({name})")
            return name, tensor

        return _side_by_side(get, names)


def _side_by_side(do: Callable[[str], Any], names: Iterable[str]) -> Iterator[Any]:
    """do(name) in a few threads, the results in order. The first error is raised, and nothing new is begun."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield from pool.map(do, names)
    finally:
        pool.shutdown(cancel_futures=True)


def _header(kind: str, record: Mapping[str, Any], sums: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """The file up to the first tensor's bytes; as long whatever the checksums are."""
    text = json.dumps({**record, "sha256": dict(sums)})
    header: dict[str, Any] = {"__metadata__": {kind: text, "sha256": hashlib.sha256(text.encode()).hexdigest()}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    body = json.dumps(header).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _sum(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _write_at(file: int, data: memoryview, place: int) -> None:
    while data:
        n = os.pwrite(file, data, place)
        data, place = data[n:], place + n
