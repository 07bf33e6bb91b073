"""scripts/sweep_plans.py: plans as words, and what it says where it cannot run."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import sweep_plans
from kernel_reference import HAS_GPU  # chooses the interpreter before Triton is loaded

from kernels.triton_plan import Plan
from tokenizer import UserError


def test_a_plan_is_the_usual_one_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import triton_decode

    usual = triton_decode.plan
    shape: tuple[Any, ...] = (8, 4, 128, 2, 132)
    with sweep_plans.planned(sweep_plans.parse_plan("warps=2,ahead=0")):
        assert triton_decode.plan(*shape) == usual(*shape)._replace(warps=2, ahead=0)
    assert triton_decode.plan is usual
    assert sweep_plans.parse_plan("") == {}


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
