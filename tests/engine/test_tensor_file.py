"""Tensors in a file: in pieces, in rows of several writers, in parts of rows; the library reads what is written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from common import tensor_file
from common.errors import UserError
from common.tensor_file import Rows, TensorFile, layout, make_room, write_header, write_rows, write_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int32]
SHAPES = [(5,), (0,), (1, 7), (4, 9), (6, 5, 3), (2, 11, 2, 2)]


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int, strided: bool) -> Tensor:
    """Random bits; strided: a part of something larger, as what a cache holds is."""
    generator = torch.Generator().manual_seed(seed)
    if strided and len(shape) > 1:
        larger = (shape[0], shape[1] + 3, *shape[2:])
        return torch.randint(0, 100, larger, generator=generator).to(dtype)[:, : shape[1]]
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


@given(
    cases=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=4),
    piece=st.sampled_from([1, 16, 60, 1 << 24]),
    cut=st.integers(0, 4),
    keep=st.integers(1, 4),
)
def test_what_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    cases: list[tuple[tuple[int, ...], torch.dtype, bool]],
    piece: int,
    cut: int,
    keep: int,
) -> None:
    """By the library, from any row on, as much of a row as is wanted; the same bytes however many have written them."""
    tensors = {f"t{i}": made(shape, dtype, i, strided) for i, (shape, dtype, strided) in enumerate(cases)}
    folder = tmp_path_factory.mktemp("file")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "PIECE", piece)
        write_tensors(folder / "one", "kind", {"a": 1}, tensors)
        shares: list[dict[str, Tensor | Rows]] = [{}, {}]
        for name, tensor in tensors.items():
            if tensor.dim() < 2:
                shares[0][name] = tensor
                continue
            at = min(cut, len(tensor))
            shares[0][name] = Rows(tensor[:at], 0, len(tensor))
            shares[1][name] = Rows(tensor[at:], at, len(tensor))
        where = layout("kind", {"a": 1}, tensors)
        make_room(folder / "two", where.size)
        found = [write_rows(folder / "two", where, share) for share in shares]
        digests = {name: found[0].get(name, []) + found[1].get(name, []) for name in tensors}
        write_header(folder / "two", "kind", {"a": 1}, tensors, digests)
        assert (folder / "two").read_bytes() == (folder / "one").read_bytes()

        for name, tensor in load_file(folder / "one").items():
            assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
        file = TensorFile(folder / "one", "kind", "a thing")
        assert file.record == {"a": 1} and all(torch.equal(t, tensors[name]) for name, t in file.read(tensors))
        rows = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1}
        targets = {name: torch.zeros_like(tensor)[cut:, :keep] for name, tensor in rows.items()}
        tail = file.load(targets, cut)
        assert all(torch.equal(targets[name], tensor[cut:, :keep]) for name, tensor in rows.items())
        head = file.load({name: torch.zeros_like(tensor[:cut]) for name, tensor in rows.items()})
        file.require({name: head[name] + tail[name] for name in rows})


def test_a_sum_is_of_the_sums_of_rows(tmp_path: Path) -> None:
    """So that whoever reads the file without this program can check it."""
    tensor = made((3, 4), torch.float32, 0, False)
    write_tensors(tmp_path / "f", "kind", {}, {"t": tensor})
    data = (tmp_path / "f").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    rows = [hashlib.sha256(row.numpy().tobytes()).digest() for row in tensor]
    assert json.loads(header["__metadata__"]["kind"])["sha256"]["t"] == hashlib.sha256(b"".join(rows)).hexdigest()


def test_rows_that_were_changed_or_are_missing(tmp_path: Path) -> None:
    tensor, path = made((3, 4), torch.float32, 0, False), tmp_path / "f"
    write_tensors(path, "kind", {}, {"t": tensor})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    file = TensorFile(path, "kind", "a thing")
    with pytest.raises(UserError, match=r"a thing that was changed or damaged since it was written \(t\)"):
        file.require(file.load({"t": torch.zeros(3, 4)}))
    file.load({"t": torch.zeros(2, 4)})  # rows that are whole can be read without it
    path.write_bytes(whole[:-5])  # by somebody else, after it was opened
    with pytest.raises(UserError, match="cut short while it was read"):
        file.load({"t": torch.zeros(3, 4)})


def test_room_is_taken_before_the_work_where_a_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(number: int) -> None:
        def fallocate(file: int, start: int, n_byte: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", fallocate)

    tensors = {"t": made((3, 4), torch.float32, 0, False)}
    refuses(errno.EOPNOTSUPP)
    write_tensors(tmp_path / "f", "kind", {}, tensors)
    assert torch.equal(load_file(tmp_path / "f")["t"], tensors["t"])
    refuses(errno.ENOSPC)
    monkeypatch.setattr(tensor_file, "write_rows", None)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "g", "kind", {}, tensors)
