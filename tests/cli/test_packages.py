"""A package that is not installed is one line that says how to get it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import ROOT

from common import packages

WITHOUT = """
import importlib.abc, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = {argv!r}
sys.path.insert(0, {folder!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without(package: str, *argv: object) -> subprocess.CompletedProcess[str]:
    script = ROOT / str(argv[0])
    code = WITHOUT.format(package=package, argv=[str(script), *map(str, argv[1:])], folder=str(script.parent))
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("package", "argv", "pip"),
    [
        ("matplotlib", ["scripts/plot.py"], "matplotlib"),
        ("huggingface_hub", ["scripts/download.py", "--repo_id", "a/b"], "huggingface_hub"),
        ("rouge_score", ["scripts/evaluate.py", "rouge", "--caches", "quantize_kv"], "rouge_score"),
        ("sentencepiece", ["generate.py", "--prompt", "a"], "sentencepiece"),
        ("matplotlib", ["scripts/benchmark.py", "--context", "60", "--png", "a.png"], "matplotlib"),
        ("transformers", ["scripts/benchmark.py", "--context", "60", "--peer", "transformers"], "transformers"),
        ("transformers", ["scripts/divergence_transformers.py", "--context", "16"], "transformers"),
        ("lm_eval", ["scripts/lm_eval.py", "--tasks", "x"], "lm-eval"),
    ],
)
def test_the_package_is_named(package: str, argv: list[str], pip: str) -> None:
    result = run_without(package, *argv)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and f"pip install {pip}" in result.stderr and "error: " in result.stderr


def test_a_gguf_file_needs_its_package(tmp_path: Path) -> None:
    """ "Of type 8, which is not known", said a program without the package that knows types."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a", np.zeros((2, 32), np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    result = run_without("gguf", "generate.py", "--checkpoint_path", tmp_path / "a.gguf", "--prompt", "a")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "pip install gguf" in result.stderr


def test_an_environment_that_is_there_and_not_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had run demo.sh and came back in another shell was told to install torch."""
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    assert packages.remedy("torch") == "pip install torch"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert packages.remedy("torch") == f"source {tmp_path}/.venv/bin/activate, or pip install torch"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert packages.remedy("torch") == "pip install torch"


def test_only_rouge_needs_rouge_score(tiny: Path) -> None:
    argv = ["divergence", "--checkpoint_path", tiny, "--context", 40, "--windows", 1, "--caches", "quantize_kv"]
    result = run_without("rouge_score", "scripts/evaluate.py", *argv)
    assert result.returncode == 0 and "mean KL" in result.stdout, result.stderr


def test_a_module_of_ours_that_is_missing_is_a_fault() -> None:
    result = run_without("selective_kv", "scripts/plot.py")
    assert result.returncode == 1 and "Traceback" in result.stderr
