"""What runs where: the kernels that a device gets, and the one that a program is bound to."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT

from checkpoint import parse_device
from selective_kv import kernels
from selective_kv.warning import warn_once

GPU = torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """As if there were two GPUs with Triton and a compiler; returns the devices that were made current."""
    chosen: list[torch.device] = []
    for name, value in {
        "is_available": True, "device_count": 2, "get_device_capability": (9, 0), "get_device_name": "Some GPU"
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("SELECTIVE_KV_KERNELS", raising=False)
    monkeypatch.delenv("CC", raising=False)
    warn_once.cache_clear()
    return chosen


def test_a_numbered_gpu_is_the_current_one(two_gpus: list[torch.device]) -> None:
    """Triton launches on the current device, and a graph is captured there: cuda:1 once meant both, half and half."""
    assert parse_device("cuda:1") == GPU and two_gpus == [GPU]


def test_a_gpu_that_can_gets_triton(two_gpus: list[torch.device]) -> None:
    pytest.importorskip("triton")
    assert kernels.attention_kernels(GPU).name == "Triton kernels"
    assert kernels.attention_kernels(torch.device("cpu")) is kernels.PYTORCH


@pytest.mark.parametrize(
    ("where", "name", "found", "told"),
    [
        (importlib.util, "find_spec", None, "Triton is not installed"),
        (torch.cuda, "get_device_capability", (7, 5), "compute capability 7.5, below 8.0"),
        (shutil, "which", None, "needs a C compiler"),
    ],
)
def test_what_is_missing_is_told_once(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    where: Any, name: str, found: Any, told: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(where, name, lambda *_: found)
    assert kernels.attention_kernels(GPU) is kernels.PYTORCH and kernels.attention_kernels(GPU) is kernels.PYTORCH
    err = "".join(f"{record.message}\n" for record in caplog.records)
    assert err.count(told) == 1 and "falls back" in err and err.count("\n") == 1


def test_every_program_starts_where_there_is_no_triton() -> None:
    """requirements.txt does not bring it, and a CPU does not need it."""
    names = ["generate", *sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))]
    code = f"import sys; sys.path[1:1] = ['scripts']; sys.modules['triton'] = None; import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
