"""Files that are no checkpoint, or a damaged one: one line each, and no code is run."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import families
import pytest
import torch
from checkpoints import (
    CPU,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint import convert as convert_hf_checkpoint
from checkpoint import (
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from common.errors import UserError


class Touch:
    """What a hostile pickle does: a call on unpickling."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint"),
        (b"just some text\n" * 20, "not a checkpoint"),
        (b"PK\x03\x04 no zip at all", "damaged or truncated"),
        (b"\x10\0\0\0\0\0\0\0{not a header at", "damaged or truncated"),
        (b"\x80\x02}q\0.", "a bare pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_other_files(tmp_path: Path, content: bytes, message: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_paths_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"File name too long|no such file or folder"):
        open_checkpoint(tmp_path / ("a" * 5000))
    with pytest.raises(UserError, match=r"File name too long|no such file"):
        load_tokenizer(tmp_path / ("a" * 5000))

    def forbidden(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(UserError, match=r"/locked: Permission denied$"):
        open_checkpoint(tmp_path / "locked")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no weights in this folder .*model.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(1)], "not a dict of tensors"),
        ({}, "not a dict of tensors"),
        ({"model": {"a": torch.zeros(1)}}, "'model' is a dict, not a tensor"),
        ({3: torch.zeros(1)}, "a name in it is 3, not text"),
        ({"a": torch.zeros(1, dtype=torch.int8)}, "a is torch.int8; quantised"),
    ],
)
def test_pth_of_other_things(tmp_path: Path, value: object, message: str) -> None:
    torch.save(value, tmp_path / "model.pth")
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


def test_no_code_in_a_pickle_runs(tmp_path: Path) -> None:
    torch.save({"a": Touch(tmp_path / "made")}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="not plain tensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.pth").write_bytes(pickle.dumps(Touch(tmp_path / "made")))
    with pytest.raises(UserError, match="bare pickle"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    families.make("llama2", folder)
    convert_hf_checkpoint.convert(folder, folder)
    return {name: (folder / name).read_bytes() for name in ("model.pth", "model.safetensors", "config.json")}


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "config.json"])
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_end_in_one_line(tmp_path: Path, good: dict[str, bytes], name: str, data: st.DataObject) -> None:
    """Cut short anywhere: refused. A byte changed anywhere: refused, or it made no difference to form."""
    for other, content in good.items():
        if other == name or other == "config.json":
            (tmp_path / other).write_bytes(content)
    content = good[name]
    cut = data.draw(st.booleans())
    place = data.draw(st.integers(0, len(content) - 2) | st.integers(0, min(3000, len(content) - 2)))
    damaged = (
        content[:place]
        if cut
        else content[:place] + data.draw(st.binary(min_size=1, max_size=3)) + content[place + 1 :]
    )
    (tmp_path / name).write_bytes(damaged)
    weights = tmp_path / ("model.safetensors" if name == "config.json" else name)
    (tmp_path / "model.safetensors").write_bytes(good["model.safetensors"]) if name == "config.json" else None
    try:
        load_model(open_checkpoint(weights), CPU, torch.float32)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert not cut


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is not there"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names ../model.safetensors, which is not there"),
    ],
)
def test_bad_indices(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors").touch()
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    families.make("llama2", tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        save_file({"model.norm.weight": torch.ones(4)}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "x": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model.norm.weight is in two shards"):
        open_checkpoint(tmp_path)
