"""Help, and mistakes that flags show by themselves, wait for no library: torch alone takes seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = "torch", "triton", "numpy", "matplotlib", "transformers", "sentencepiece", "jinja2", "huggingface_hub"
LOOK = """
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *sorted({name.partition(".")[0] for name in sys.modules})))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/scripts/")[0] or sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def imported(script: str, *argv: str) -> tuple[int, list[str], str]:
    """The exit code of a program, the packages that it had imported at its end, and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(ROOT / script), *argv], capture_output=True, text=True, cwd=ROOT
    )
    *_, last = done.stdout.splitlines()
    assert last.startswith("imported: ")
    return done.returncode, last.split()[1:], done.stderr


@pytest.mark.parametrize(
    ("script", "mistake"),
    [
        ("generate.py", ("--max_new_tokns", "3")),
        ("generate.py", ("quantize_kv", "--window_size", "0")),
        ("generate.py", ("full", "--sink_size", "4")),
        ("generate.py", ("--bits", "4")),
        ("generate.py", ("--temperature", "-1")),
        ("generate.py", ("--checkpoint_path", "nowhere/at/all")),
        ("generate.py", ("--system", "Say so.")),
        ("generate.py", ("--load_cache", "nowhere")),
        ("generate.py", ("--prompt_file", "nowhere")),
        ("generate.py", ("--weights", "int5")),
        ("generate.py", ("--dtype", "fp8", "--device", "cpu")),
        ("generate.py", ("--device", "gpu")),
        ("quantize.py", ("--checkpoint_path", "nowhere", "--out", "x")),
        ("scripts/evaluate.py", ("perplexity", "--caches", "quantise_kv")),
        ("scripts/benchmark.py", ("--random_weights",)),
        ("scripts/sweep.py", ("--name",)),
        ("scripts/plot.py", ("--output", "x")),
        ("scripts/convert_hf_checkpoint.py", ("--checkpoint_dir", "nowhere")),
        ("scripts/download.py", ()),
    ],
)
def test_a_mistake_is_told_at_once(script: str, mistake: tuple[str, ...]) -> None:
    code, packages, said = imported(script, *mistake)
    assert code == 2 and said.count("\n") == 1 and ": error: " in said, said
    assert not {*HEAVY} & {*packages}


@pytest.mark.parametrize(
    "script",
    ["generate.py", "quantize.py"]
    + [
        f"scripts/{name}.py" for name in ("evaluate", "benchmark", "sweep", "plot", "convert_hf_checkpoint", "download")
    ],
)
def test_help_is_told_at_once(script: str) -> None:
    code, packages, _ = imported(script, "--help")
    assert code == 0 and not {*HEAVY} & {*packages}


def test_the_library_names_its_caches_without_torch() -> None:
    """Settings alone; the classes come with torch, when they are asked for."""
    code = (
        "import sys, selective_kv; from selective_kv.settings import known_settings\n"
        "print([*known_settings()], 'torch' in sys.modules, 'SelectiveCache' in dir(selective_kv))\n"
        "from selective_kv import SelectiveCache, caches\n"
        "print([*caches()], caches()['quantize_kv'] is SelectiveCache, known_settings() == caches())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    names = ["full", "compress_kv", "quantize_kv"]
    assert done.stdout.splitlines() == [f"{names} False True", f"{names} True True"]
