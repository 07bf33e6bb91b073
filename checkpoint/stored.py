"""Tensors in files: what a checkpoint holds, by name, shape and dtype, without reading the values.

safetensors and torch.save's zip are told apart by their first bytes, and both are memory-mapped: a
tensor is read from the disk when it is copied out, and never lies in memory of its own. Only plain
tensors are unpickled; a file that would run code is refused.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError
from common.files import first_bytes, is_plain_file, read_json

INTEGERS = {"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What torch.load raises on damaged files: from its zip reader, its unpickler, its rebuilding of tensors
UNPICKLING_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, MemoryError)
LARGEST_PICKLE = 1 << 26  # bytes: names and shapes of the tensors, 200 bytes each


class ReadRows(Protocol):
    def __call__(self, start: int, stop: int, columns: tuple[int, int] | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, or of those rows the columns [start, stop)."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint. `read` maps it into memory; nothing is copied yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)
    # Where reading makes the values, by dequantising: rows [start, stop), for it need not lie in memory whole.
    read_rows: ReadRows | None = field(default=None, repr=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def part(self, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> Stored:
        """Some of its rows and columns as a tensor in a checkpoint, of which nothing else is read."""
        (first, last), whole = rows, self.read_rows
        shape = (last - first, *self.shape[1:]) if columns is None else (last - first, columns[1] - columns[0])

        def read() -> Tensor:
            found = self.read()[first:last] if whole is None else whole(first, last, columns)
            return found if columns is None or whole is not None else found[:, slice(*columns)]

        def read_rows(start: int, stop: int, columns: tuple[int, int] | None = columns) -> Tensor:
            assert whole is not None
            return whole(first + start, first + stop, columns)

        return Stored(self.name, shape, self.dtype, read, read_rows if whole is not None else None)


def stored_tensors(file: Path, dtypes: Mapping[str, torch.dtype] = FLOATS) -> dict[str, Stored]:
    """The tensors of a .pth, a .safetensors or an index, told apart by what is in the file."""
    if file.name.endswith(".json"):
        return _sharded(file, dtypes)
    start = first_bytes(file, 16)
    if start.startswith(b"PK"):
        return _torch_tensors(file)
    if start[8:9] == b"{":
        return _safetensors(file, dtypes)
    if start.startswith(b"version https://"):
        raise UserError(f"{file}: a Git LFS pointer, not the weights themselves (git lfs pull fetches them)")
    if start.startswith(b"\x80"):
        raise UserError(f"{file}: a bare pickle; only what torch.save writes since 1.6 is read")
    raise UserError(f"{file}: not a checkpoint (neither torch.save's format nor safetensors)")


def _safetensors(file: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Stored]:
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or truncated ({error})") from None
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 (a safe_open is no mapping)
        header = handle.get_slice(name)
        if header.get_dtype() not in dtypes:
            raise UserError(f"{file}: {name} is {header.get_dtype()}; only {', '.join(dtypes)} are read")

        def read(name: str = name) -> Tensor:
            return handle.get_tensor(name)

        tensors[name] = Stored(name, tuple(header.get_shape()), dtypes[header.get_dtype()], read)
    return tensors


def _sharded(index: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Stored]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{index}: no weight_map in it")
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not is_plain_file(index.parent / shard):
            raise UserError(f"{index}: names {shard}, which is not there")
        found = stored_tensors(index.parent / shard, dtypes)
        for name in found.keys() & tensors.keys():
            raise UserError(f"{index}: {name} is in two shards")
        tensors |= found
    return tensors


def _torch_tensors(file: Path) -> dict[str, Stored]:
    """A .pth as gpt-fast and Meta write it: one flat dict of tensors. Nothing else is unpickled."""
    if re.fullmatch(r"consolidated\.\d+\.pth", file.name) and (file.parent / "consolidated.01.pth").exists():
        raise UserError(f"{file}: one of several model-parallel parts; give the Hugging Face folder instead")
    _check_zip(file)
    try:
        state = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise UserError(f"{file}: not plain tensors (a pickle that would run code is not loaded)") from None
    except (*UNPICKLING_ERRORS, SafetensorError):
        raise UserError(f"{file}: damaged or truncated, or not made by torch.save") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{file}: not a dict of tensors")
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise UserError(f"{file}: a name in it is {name!r}, not text")
        if not isinstance(value, Tensor):
            raise UserError(f"{file}: {name!r} is a {type(value).__name__}, not a tensor")
        if value.dtype not in FLOATS.values() or value.layout is not torch.strided:
            raise UserError(f"{file}: {name} is {value.dtype}; quantised or sparse weights are not read")
        if value.is_meta:
            raise UserError(f"{file}: {name} is a shape without values (a tensor on the meta device)")
        tensors[name] = Stored(name, tuple(value.shape), value.dtype, value.detach)
    _check_sizes(file, list(state.values()))
    return tensors


def _check_zip(file: Path) -> None:
    """Raises UserError where a few bytes would become many: torch.save stores each part once, as it is."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, *UNPICKLING_ERRORS):
        raise UserError(f"{file}: damaged or truncated, or not made by torch.save") from None
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise UserError(f"{file}: compressed, which torch.save never writes")
    if sum(part.file_size for part in parts) > file.stat().st_size:
        raise UserError(f"{file}: its parts overlap: they are larger than the file")
    largest = max((part.file_size for part in parts if part.filename.endswith(".pkl")), default=0)
    if largest > LARGEST_PICKLE:
        raise UserError(f"{file}: {largest:,} bytes that say what is in it, and at most {LARGEST_PICKLE:,} are read")


def _check_sizes(file: Path, tensors: Sequence[Tensor]) -> None:
    """Raises UserError where the tensors show the same bytes again and again (a stride of 0, say).

    Twice is usual: an embedding and the output that is tied to it.
    """
    shown: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        shown[storage.data_ptr()] = shown.get(storage.data_ptr(), 0) + tensor.numel() * tensor.element_size()
        if (
            tensor.numel() * tensor.element_size() > storage.nbytes()
            or shown[storage.data_ptr()] > 2 * storage.nbytes()
        ):
            raise UserError(f"{file}: its tensors are larger than what is stored of them")
