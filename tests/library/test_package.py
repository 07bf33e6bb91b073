"""The library as others have it: a wheel with one top-level name, installed into an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT

PROGRAM = """
import pathlib, sys
from importlib.metadata import metadata, version
import torch
import selective_kv
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

assert pathlib.Path(selective_kv.__file__).is_relative_to(sys.argv[1]), selective_kv.__file__
assert selective_kv.__version__ == version("selective-kv")
assert {"gpu", "transformers"} <= set(metadata("selective-kv").get_all("Provides-Extra"))
for policy in (FullCache(), SinkWindowCache(2, 4), SelectiveCache(2, 4)):
    assert isinstance(policy, KVCache)
    policy.allocate(Shape(1, 2, 64, 300, torch.float32, torch.device("cpu")))
    assert sum(policy.nbytes().values()) > 0
rooms = {"generate", "model", "tokenizer", "engine", "checkpoint", "cli", "common", "kv_cache", "quantize"}
assert not rooms & set(sys.modules), "the library imported the application"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows, as `pip install .` does: a folder beside them must not slip in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "selective_kv").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (source / "engine").mkdir()
    (source / "engine" / "__init__.py").touch()  # what pip once stopped at: "multiple top-level packages"
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]  # no network
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(source)],
        check=True,
        cwd=folder,
    )
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.skipif(find_spec("setuptools") is None, reason="building a wheel needs setuptools")
def test_a_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"selective_kv"}
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "selective_kv").rglob("*.py")} | {"selective_kv/py.typed"}
    assert here <= set(names)


@pytest.mark.skipif(find_spec("setuptools") is None, reason="building a wheel needs setuptools")
def test_the_wheel_is_installed_and_imported(wheel: Path, tmp_path: Path) -> None:
    """Of the machine's packages only torch and what it needs can be seen; of this folder nothing."""
    home = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-index",
            "--quiet",
            "--target",
            str(home),
            str(wheel),
        ],
        check=True,
    )
    torch_home = Path(torch.__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(home)!r}, {str(torch_home)!r}]\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(home)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
