"""scripts/sweep_plans.py: plans as words, and what it says where it cannot run."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from kernel_reference import HAS_GPU  # chooses the interpreter before Triton is loaded

from benchmark import decode_configs as sweep_plans
from common.errors import UserError
from selective_kv import SelectiveCache, Shape
from selective_kv.kernels.decode_config import Plan


@pytest.mark.skipif(HAS_GPU, reason="the interpreter runs on a CPU")
def test_the_kernels_are_launched_by_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("selective_kv.kernels.decode.run", lambda *args: seen.append(args[4]))
    usual = SelectiveCache(4, 8)
    usual.allocate(Shape(1, 2, 64, 32, torch.float32, torch.device("cpu")))
    q, at = torch.zeros(1, 4, 64), torch.zeros(1, dtype=torch.int64)
    for words in ("", "warps=4,ahead=0"):
        sweep_plans.configured(sweep_plans.parse_plan(words)).decode_attention(q, usual.regions, at)
    assert seen[1] == seen[0]._replace(warps=4, ahead=0)


def test_every_field_is_a_plan_s() -> None:
    assert set(sweep_plans.FIELDS) == set(Plan._fields) - {"heads"}


@pytest.mark.parametrize("text", ["heads=4", "warps", "warps=two", "warps=-1", "ahead=1,,x"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--plans"):
        sweep_plans.parse_plan(text)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep_plans.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        sweep_plans.main()
    assert stop.value.code == 2 and "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_plans_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--context", "300", "--caches", "quantize_kv", "--rounds", "1", "--steps", "2", "--plans"]
    monkeypatch.setattr(sys, "argv", ["sweep_plans.py", *words, "", "ahead=0"])
    sweep_plans.main()
    out = capsys.readouterr().out
    assert "(as it is)" in out and "ahead=0" in out
