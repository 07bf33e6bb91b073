"""Tensors and a record in one safetensors file, written and read side by side, with checksums.

safetensors' own `save_file` wants every tensor in memory at once and copies it once more; a cache has gigabytes on a
GPU. Here a tensor goes through page-locked buffers, row by row (of its first dimension), and rows are copied, summed
and written in several threads. Several processes may have rows of one tensor each. The format is the library's, and so
is what checks it: eight bytes of length, a JSON header (name: dtype, shape, where its bytes are), the bytes.

The record is JSON in the header's metadata, with its own SHA-256 beside it; it holds those of the tensors: the SHA-256
of the SHA-256s of a tensor's rows. A tensor of one dimension is one row.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
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
THREADS = 8  # rows on their way at once
PIECE = 1 << 24  # bytes that one of them has in memory
NO_SUM = "0" * 64  # stands in the header until the bytes are known
Digests = dict[str, list[bytes]]  # of each tensor, its rows' SHA-256, in order


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor in the file that this process has: from `first` on, of n_row in all."""

    tensor: Tensor
    first: int
    n_row: int


@dataclass(frozen=True)
class Layout:
    """Where a file's tensors stand: of each its dtype, its shape, and the byte where it begins."""

    header: int  # bytes before the first one
    places: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]
    size: int


def layout(kind: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor | Rows], header: int = 0) -> Layout:
    """header: the bytes of the file's header, if another process has the record."""
    sums = dict.fromkeys(tensors, NO_SUM)
    end = header = header or len(_header(kind, record, sums, tensors))
    places = {}
    for name, tensor in tensors.items():
        dtype, shape = _described(tensor)
        places[name] = dtype, shape, end
        end += dtype.itemsize * prod(shape)
    return Layout(header, places, end)


def write_tensors(path: Path, kind: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor | Rows]) -> None:
    """Write a new file at `path`. kind: what the record is called in the metadata. Raises OSError.

    The tensors may lie on any device and have any strides.
    """
    where = layout(kind, record, tensors)
    make_room(path, where.size)
    write_header(path, kind, record, tensors, write_rows(path, where, tensors))


def make_room(path: Path, size: int) -> None:
    """Make a new file with all of its bytes on the disk, so that a full disk is noticed at once. Raises OSError.

    It also keeps file systems that place bytes late (ext4) from writing all of them out when the file takes the place
    of an older one.
    """
    with open(path, "wb") as file:
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system that takes none ahead
                raise


def write_rows(path: Path, where: Layout, tensors: Mapping[str, Tensor | Rows]) -> Digests:
    """Write rows to their places in a file that is there. Raises OSError."""
    rows = []
    for name, given in tensors.items():
        part = given if isinstance(given, Rows) else Rows(given, 0, len(given) if given.dim() > 1 else 1)
        rows += [(name, part.first + i, row) for i, row in enumerate(_rows(part.tensor))]
    buffers = _Buffers(next((row.device for _, _, row in rows), torch.device("cpu")))
    with open(path, "r+b", buffering=0) as file:

        @torch.inference_mode()
        def copy(at: tuple[str, int, Tensor]) -> bytes:
            name, n, row = at
            dtype, shape, place = where.places[name]
            place += n * (dtype.itemsize * prod(shape[1:]) if len(shape) > 1 else 0)
            digest = hashlib.sha256()
            for piece in _pieces(row):
                data = _bytes(piece.contiguous() if piece.device.type == "cpu" else buffers.to_host(piece))
                digest.update(data)
                _write_at(file.fileno(), data, place)
                place += len(data)
            return digest.digest()

        found: Digests = {name: [] for name in tensors}
        for (name, _, _), digest in zip(rows, _side_by_side(copy, rows), strict=True):
            found[name].append(digest)
    return found


def write_header(
    path: Path, kind: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor | Rows], digests: Digests
) -> None:
    """The last thing that is written: with it the file is whole. Raises OSError."""
    sums = {name: _combined(digests[name]) for name in tensors}
    with open(path, "r+b", buffering=0) as file:
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
            self.places = _places(path)
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
        return self.places[name][1] if name in self.sums else None

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the file, mapped into memory and compared with their checksums. Raises UserError."""

        def get(name: str) -> tuple[str, Tensor]:
            tensor = self.handle.get_tensor(name)
            self.require({name: [_sum(row) for row in _rows(tensor)]})
            return name, tensor

        return _side_by_side(get, names)

    def load(self, targets: Mapping[str, Tensor], first: int = 0) -> Digests:
        """Copy tensors of two dimensions or more into `targets`, on any device: of each tensor the rows from `first`
        on, as many as the target has, and of each row as many bytes as the target's row has. Rows that are read whole
        enter the checksums that `require` compares.
        Raises UserError where the file ends early.
        """
        buffers = _Buffers(next((target.device for target in targets.values()), torch.device("cpu")))
        rows = [(name, first + i, row) for name, target in targets.items() for i, row in enumerate(target)]
        with open(self.path, "rb", buffering=0) as file:

            @torch.inference_mode()
            def copy(at: tuple[str, int, Tensor]) -> bytes:
                name, n, target = at
                dtype, shape, place = self.places[name]
                unit, digest = dtype.itemsize * prod(shape[2:]), hashlib.sha256()
                place += n * unit * shape[1]
                step = max(1, PIECE // max(1, unit))
                for start in range(0, shape[1], step):
                    stop = min(start + step, shape[1])
                    host = buffers.get((stop - start) * unit)
                    if not _read_at(file.fileno(), _bytes(host), place + start * unit):
                        raise UserError(f"{self.path}: {self.what}, cut short while it was read")
                    digest.update(_bytes(host))
                    n_kept = min(stop, len(target)) - start
                    if n_kept > 0:
                        kept = host[: n_kept * unit].view(dtype).view(n_kept, *shape[2:])
                        target[start : start + n_kept].copy_(kept)
                return digest.digest()

            found: Digests = {name: [] for name in targets}
            for (name, _, _), digest in zip(rows, _side_by_side(copy, rows), strict=True):
                found[name].append(digest)
        return found

    def require(self, digests: Digests) -> None:
        """Raises UserError unless these are the digests of all rows of each tensor."""
        for name, found in digests.items():
            if _combined(found) != self.sums[name]:
                raise UserError(f"{self.path}: {self.what} that was changed or damaged since it was written ({name})")


class _Buffers:
    """A piece of memory for each thread, page-locked where it is to be copied from or to a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.mine = device, threading.local()

    def get(self, n_byte: int) -> Tensor:
        """uint8 [n_byte], until the same thread asks again."""
        buffer = getattr(self.mine, "buffer", None)
        if buffer is None or len(buffer) < n_byte:
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.set_device(self.device)  # the current one is a thread's own
            buffer = self.mine.buffer = torch.empty(max(n_byte, PIECE), dtype=torch.uint8, pin_memory=cuda)
        return buffer[:n_byte]

    def to_host(self, piece: Tensor) -> Tensor:
        host = self.get(piece.nbytes).view(piece.dtype).view(piece.shape)
        return host.copy_(piece)


def _rows(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.unbind() if tensor.dim() > 1 else (tensor,)


def _pieces(row: Tensor) -> Sequence[Tensor]:
    """A row in parts of at most PIECE bytes, or of one element of its first dimension."""
    if row.nbytes <= PIECE or row.dim() == 0:
        return (row,)
    return row.split(max(1, PIECE * len(row) // row.nbytes))


def _side_by_side(do: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """do(item) in a few threads, the results in order. The first error is raised, and nothing new is begun."""
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        yield from pool.map(do, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _described(tensor: Tensor | Rows) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(tensor, Rows):
        own = tensor.tensor
        return own.dtype, (tensor.n_row, *own.shape[1:]) if own.dim() > 1 else tuple(own.shape)
    return tensor.dtype, tuple(tensor.shape)


def _header(
    kind: str, record: Mapping[str, Any], sums: Mapping[str, str], tensors: Mapping[str, Tensor | Rows]
) -> bytes:
    """The file up to the first tensor's bytes; as long whatever the checksums are."""
    text = json.dumps({**record, "sha256": dict(sums)})
    header: dict[str, Any] = {"__metadata__": {kind: text, "sha256": hashlib.sha256(text.encode()).hexdigest()}}
    begin = 0
    for name, tensor in tensors.items():
        dtype, shape = _described(tensor)
        end = begin + dtype.itemsize * prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    body = json.dumps(header).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def _places(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Each tensor's dtype, shape and first byte, by name, in a file that the library has accepted."""
    known = {name: dtype for dtype, name in DTYPES.items()}
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n))
    header.pop("__metadata__", None)
    return {
        name: (known[at["dtype"]], tuple(at["shape"]), 8 + n + at["data_offsets"][0])
        for name, at in header.items()
        if at["dtype"] in known
    }


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _sum(row: Tensor) -> bytes:
    return hashlib.sha256(_bytes(row)).digest()


def _combined(digests: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _write_at(file: int, data: memoryview, place: int) -> None:
    while data:
        n = os.pwrite(file, data, place)
        data, place = data[n:], place + n


def _read_at(file: int, data: memoryview, place: int) -> bool:
    """Fill `data`; False where the file ends before."""
    while data:
        n = os.preadv(file, [data], place)
        if n == 0:
            return False
        data, place = data[n:], place + n
    return True
