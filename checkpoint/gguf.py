"""GGUF, llama.cpp's file format: metadata and tensors by name, from a memory map.

The file is, in this order (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3):

    "GGUF" | version | number of tensors | number of metadata pairs | the pairs | names, shapes, types and
    offsets of the tensors | padding | the tensors' bytes

The header is read here and not with the gguf package's `GGUFReader`, which makes numpy views of every string
(2.4 s for a vocabulary of 49,152 tokens, and six times that for Llama 3's) and takes a count that lies at its
word, for hours. What the numbers mean (types, block sizes) and how they are dequantised is the package's.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint.stored import Stored
from common.errors import UserError
from common.files import first_bytes
from common.packages import missing

MAGIC = b"GGUF"
_ALIGNMENT = 32  # where general.alignment does not say otherwise
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUFValueType
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def _package() -> Any:
    """The gguf package, which is needed for GGUF files only."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise missing("gguf", "a GGUF file") from None
    return gguf


VOCABULARY = "vocabulary.gguf"  # beside weights that quantize.py wrote: metadata alone, the tokenizer in it


@dataclass(frozen=True)
class GGUF:
    """What a file, or all shards of a model, hold. metadata: the first shard's."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, Stored] = field(repr=False)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of metadata; the default where it is missing. Raises UserError where it is of another kind."""
        value = self.metadata.get(key, default)
        if value is default:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{self.path}: {key} is {_shown(value)}, not of type {kind.__name__}")
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:56] + " ..."


def is_gguf(file: Path) -> bool:
    """Whether a file is a GGUF, by its first bytes. Raises UserError."""
    return first_bytes(file, 4) == MAGIC


def find_gguf(folder: Path) -> Path | None:
    """The one GGUF model in a folder, its first shard; None if there is none. Raises UserError if there are more."""
    found = []
    for path in sorted(folder.glob("*.gguf")):
        shard = _SHARD.fullmatch(path.name)
        if shard is None or int(shard[2]) == 1 or not (folder / _shard_name(shard, 1)).exists():
            found.append(path)
    models = {(m[1], m[3]) if (m := _SHARD.fullmatch(path.name)) else path.name for path in found}
    if len(models) > 1:
        raise UserError(f"{folder}: several models ({', '.join(path.name for path in found[:4])}): name one of them")
    return found[0] if found else None


def _shard_name(shard: re.Match[str], number: int) -> str:
    return f"{shard[1]}-{number:05}-of-{shard[3]}.gguf"


def read_gguf(file: Path) -> GGUF:
    """A file's metadata and tensors, with all the other shards' where it is one of several. Raises UserError."""
    metadata, tensors = _read_file(file)
    count = metadata.get("split.count", 0)
    shard = _SHARD.fullmatch(file.name)
    if type(count) is not int or count <= 1:
        return GGUF(file, metadata, tensors)
    if shard is None or int(shard[3]) != count:
        raise UserError(f"{file}: one of {count} shards, and not called ...-0000N-of-{count:05}.gguf")
    paths = [file.with_name(_shard_name(shard, number)) for number in range(1, count + 1)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{file}: one of {count} shards, and {missing[0]} is not there")
    parts = [_read_file(path) for path in paths]
    metadata, tensors = parts[0][0], {}
    for number, (path, (own, found)) in enumerate(zip(paths, parts, strict=True)):
        if (own.get("split.no"), own.get("split.count")) != (number, count):
            raise UserError(
                f"{path}: says that it is shard {own.get('split.no')} of {own.get('split.count')} from 0 on"
            )
        for name in found.keys() & tensors.keys():
            raise UserError(f"{path}: {name} is in two shards")
        tensors |= found
    if metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        raise UserError(
            f"{file}: {metadata['split.tensors.count']} tensors in all shards, and {len(tensors)} are there"
        )
    return GGUF(paths[0], metadata, tensors)


def metadata_alone(gguf: GGUF) -> bytes:
    """A model's metadata as a GGUF file without tensors."""
    data = torch.from_file(str(gguf.path), shared=False, size=gguf.path.stat().st_size, dtype=torch.uint8)
    header = _Header(gguf.path, data)
    header.pairs()
    after_counts = 24
    n_pair = bytes(header.bytes[16:after_counts])
    return bytes(header.bytes[:8]) + bytes(8) + n_pair + bytes(header.bytes[after_counts : header.at])


def read_metadata(file: Path) -> GGUF:
    """A file's metadata alone, whatever it says of tensors or shards. Raises UserError."""
    return GGUF(file, _read_file(file)[0], {})


def _read_file(file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    n_byte = file.stat().st_size
    if n_byte < 24:
        raise UserError(f"{file}: cut off, or not a GGUF file")
    data = torch.from_file(str(file), shared=False, size=n_byte, dtype=torch.uint8)  # a map: nothing is read yet
    return _Header(file, data).read()


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]  # as torch has it: ours is their order backwards
    kind: int
    start: int  # within the tensors' bytes
    n_byte: int


class _Header:
    """A cursor over a file's bytes. Every count is held against the bytes that are left before it is believed."""

    def __init__(self, file: Path, data: Tensor) -> None:
        self.file, self.data, self.at = file, data, 4
        self.bytes = memoryview(data.numpy())  # type: ignore[arg-type]

    def read(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        n_tensor, metadata = self.pairs()
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {_shown(alignment)}, not a power of two")
        infos = [self.info(alignment) for _ in range(n_tensor)]
        return metadata, self.tensors(infos, -self.at % alignment + self.at)

    def pairs(self) -> tuple[int, dict[str, Any]]:
        """How many tensors there are, and the metadata, behind which the cursor is then."""
        if self.bytes[:4] != MAGIC:
            raise self.error("not a GGUF file")
        version = self.number("I")
        if version >> 16 and version & 0xFFFF == 0:
            raise self.error("a big-endian file: only little-endian ones are read")
        if version not in (2, 3):
            raise self.error(f"GGUF version {version}: versions 2 and 3 are read")
        n_tensor, n_pair = self.count(24), self.count(12)
        metadata: dict[str, Any] = {}
        for _ in range(n_pair):
            key = self.string()
            if key in metadata:
                raise self.error(f"{key} is there twice")
            metadata[key] = self.value(self.number("I"), key)
        return n_tensor, metadata

    def error(self, message: str) -> UserError:
        return UserError(f"{self.file}: {message}")

    def cut(self) -> UserError:
        return self.error(f"cut off or damaged: it has {len(self.bytes):,} bytes, and its header speaks of more")

    def number(self, form: str) -> Any:
        try:
            (value,) = struct.unpack_from(f"<{form}", self.bytes, self.at)
        except struct.error:
            raise self.cut() from None
        self.at += struct.calcsize(f"<{form}")
        return value

    def count(self, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        value = self.number("Q")
        if value * least > len(self.bytes) - self.at:
            raise self.cut()
        return value

    def string(self) -> str:
        n_byte = self.count(1)
        self.at += n_byte
        try:
            return str(self.bytes[self.at - n_byte : self.at], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"damaged: text at byte {self.at - n_byte} is not UTF-8") from None

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 4:
            raise self.error(f"damaged: {key} is of type {kind}, which GGUF does not have")
        inner = self.number("I")
        if inner in _NUMBERS:
            form = np.dtype("?" if _NUMBERS[inner] == "?" else f"<{_NUMBERS[inner]}")
            n = self.count(form.itemsize)
            self.at += n * form.itemsize
            return np.frombuffer(self.bytes, form, n, self.at - n * form.itemsize).tolist()
        n = self.count(8)
        if inner == _STRING:
            return [self.string() for _ in range(n)]
        return [self.value(inner, key, depth + 1) for _ in range(n)]

    def info(self, alignment: int) -> _Info:
        name, n_dim = self.string(), self.number("I")
        if not 1 <= n_dim <= _MOST_DIMENSIONS:
            raise self.error(f"damaged: {_shown(name)} has {n_dim} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dim))[::-1]
        kind, start = self.number("I"), self.number("Q")
        package = _package()  # which is not there: not in the block, whose ValueErrors are of the file
        try:
            block, block_bytes = package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise self.error(f"{_shown(name)} is of type {kind}, which is not known") from None
        if 0 in shape or shape[-1] % block:
            raise self.error(f"{_shown(name)} has shape {[*shape]}, whose rows are not made of blocks of {block}")
        if start % alignment:
            raise self.error(f"damaged: {_shown(name)} begins at {start}, which is not a multiple of {alignment}")
        n_byte = block_bytes
        for size in (*shape[:-1], shape[-1] // block):
            n_byte *= size
        return _Info(name, shape, kind, start, n_byte)

    def tensors(self, infos: list[_Info], base: int) -> dict[str, Stored]:
        """Raises UserError where a tensor is not within the file, or where two share bytes or a name."""
        for info in infos:
            if base + info.start + info.n_byte > len(self.bytes):
                raise self.error(
                    f"cut off or damaged: {_shown(info.name)} ends at byte {base + info.start + info.n_byte:,}, "
                    f"and the file at {len(self.bytes):,}"
                )
        for before, after in pairwise(sorted(infos, key=lambda info: info.start)):
            if before.start + before.n_byte > after.start:
                raise self.error(f"damaged: {_shown(before.name)} and {_shown(after.name)} share bytes")
        found: dict[str, Stored] = {}
        for info in infos:
            if info.name in found:
                raise self.error(f"{_shown(info.name)} is there twice")
            found[info.name] = self.stored(info, self.data[base + info.start : base + info.start + info.n_byte])
        return found

    def stored(self, info: _Info, data: Tensor) -> Stored:
        """data: the tensor's bytes, uint8 [n_byte]."""
        kind = _package().GGMLQuantizationType(info.kind)
        if kind.name in _PLAIN:

            def read() -> Tensor:
                return data.view(_PLAIN[kind.name]).view(info.shape)

            return Stored(info.name, info.shape, _PLAIN[kind.name], read)
        if not _dequantises(kind):
            raise self.error(f"{_shown(info.name)} is of type {kind.name}, which is not read")
        packed = data.view(*info.shape[:-1], -1)
        block, block_bytes = _package().GGML_QUANT_SIZES[kind]

        def read_rows(start: int, stop: int, columns: tuple[int, int] | None = None) -> Tensor:
            if columns is None:
                return _dequantise(packed[start:stop], kind)
            first, last = columns[0] // block, -(-columns[1] // block)  # whole blocks, and of them what is wanted
            bytes_ = packed[start:stop, first * block_bytes : last * block_bytes].contiguous()
            return _dequantise(bytes_, kind)[:, columns[0] - first * block : columns[1] - first * block]

        return Stored(
            info.name,
            info.shape,
            torch.bfloat16,  # what the model was trained in, as a rule; float16 would not hold its activations
            lambda: _dequantise(packed, kind),
            read_rows,
        )


def _dequantises(kind: Any) -> bool:
    """Whether the gguf package has a dequantiser for a type: tried on a block of zeros."""
    try:
        _package().dequantize(np.zeros((1, _package().GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantise(packed: Tensor, kind: Any) -> Tensor:
    """packed: uint8 [..., row bytes]. Returns float32 [..., row]."""
    with np.errstate(all="ignore"):  # a scale that is not finite is told by the tensor's name, later
        return torch.from_numpy(_package().dequantize(packed.numpy(), kind))
