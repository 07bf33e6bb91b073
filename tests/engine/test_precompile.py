"""Kernels compiled ahead: that they are the ones that a run launches, and that nothing is launched meanwhile."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import Sampling, precompile
from model import Config
from selective_kv import FullCache, Shape
from selective_kv.kernels.launch import compiling, launch

CONFIG = Config(100, 64, 2, 4, 2, 128, 256)
CPU = Shape(1, 2, 16, 64, torch.float32, torch.device("cpu"))


class Kernel:
    """Keeps what it is asked for, as Triton's would do it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.calls.append(("run", grid, args, kwargs))

    def warmup(self, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> str:
        self.calls.append(("compile", grid, args, kwargs))
        return "compiled"


def test_a_launch_compiles_only_within_compiling_and_its_thread() -> None:
    kernel, loaded = Kernel(), []
    launch(kernel, (2,))(1, N=3)
    with compiling(loaded.append):
        launch(kernel, (2,))(1, N=3)
        other = threading.Thread(target=lambda: launch(kernel, (4,))(5))
        other.start()
        other.join()
    with pytest.raises(KeyError), compiling():
        raise KeyError
    launch(kernel, (1,))()
    assert kernel.calls == [
        ("run", (2,), (1,), {"N": 3}), ("compile", (2,), (1,), {"N": 3}), ("run", (4,), (5,), {}), ("run", (1,), (), {})
    ]  # fmt: skip
    assert loaded == ["compiled"]


def test_parts_of_prompts() -> None:
    assert precompile.prompt_parts([300, 10], 128) == [(0, 0, 128), (0, 128, 128), (0, 256, 44), (1, 0, 10)]
    assert precompile.prompt_parts([5] * 100, 128) == [(b, 0, 5) for b in range(4)]
    assert precompile.prompt_parts([129, 9, 9, 9, 131], 128)[-2:] == [(3, 0, 9), (4, 128, 3)]


def test_a_run_asks_for_no_binary_that_was_not_compiled_ahead() -> None:
    """By Triton's own keys: dtypes, constants, options, and what is divisible by 16."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "keys_ahead.py")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    biased = found.pop("biased")  # which layers will keep a key bias out of tiles is not known ahead
    assert len(biased["run"]) >= 9 and set(biased["run"]) <= set(biased["ahead"])
    gates = found.pop("gates")  # of benchmark.py; a step of one sequence is compiled for them, too
    assert len(gates) == 4
    for case, keys in gates.items():
        assert len(keys["run"]) >= 10 and set(keys["run"]) <= set(keys["ahead"]), case
    assert len(found) == 12
    for case, keys in found.items():
        assert len(keys["run"]) >= 9, case
        assert keys["ahead"] == keys["run"], case


WALK = """
import sys, torch
from engine import Sampling, precompile
from engine.kernels import peer_sum
from engine.parallel import Parallel
from engine.sums import PeerSums
from model import CONFIGS
from selective_kv import FullCache, SelectiveCache, Shape, SinkWindowCache
from selective_kv.kernels import launch
launch._compile = lambda *args, **kwargs: None
shape = Shape(1, 8, 128, 40000, torch.bfloat16, torch.device("cuda"))
parts = [(0, 0, 8192), (0, 8192, 8192), (0, 16384, 7)]
peers = object.__new__(PeerSums)  # without the memory
peers.kernel, peers.rank, peers.peers, peers.sums, peers.choices = peer_sum, 0, (0, 0), *torch.zeros(2, 9)
peers.group = type("Group", (), {"size": lambda self: 2})()
ranks = Parallel(0, 2, shape.device, None, None, (peers,))
for policy in (FullCache(), SinkWindowCache(), SelectiveCache(k_bits=4, v_bits=4)):
    with launch.compiling():
        precompile.walk(CONFIGS["qwen-3-8b"], policy, shape, Sampling(temperature=0), parts)
        precompile.walk(CONFIGS["qwen-3-8b"], policy, shape, Sampling(temperature=0), parts, ranks=ranks)
print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])
"""


def test_looking_ahead_imports_no_compiler_of_torchs() -> None:
    """sympy and torch._dynamo take 3 s, in which the thread that reads weights waits."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", WALK], env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_nothing_happens_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    with precompile.compiled_ahead(CONFIG, [precompile.Run(FullCache(), CPU)], Sampling()):
        pass


def test_an_error_is_told_and_ends_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(precompile, "uses_triton", fail)
    shape = Shape(1, 2, 16, 64, torch.float32, torch.device("cuda", 0))
    with precompile.compiled_ahead(CONFIG, [precompile.Run(FullCache(), shape)], Sampling()):
        pass
    err = capsys.readouterr().err
    assert "no such luck" in err and err.count("\n") == 1


def test_compilers_load_what_they_compile_and_keep_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    loaded: list[str] = []
    monkeypatch.setattr(precompile, "load", loaded.append)
    with precompile._Compilers(torch.device("cuda", 0)) as compilers:
        compilers.submit(lambda: "kernel")
        compilers.submit(lambda: 1 // 0)
    assert loaded == ["kernel"]
    assert [type(r.exception()) for r in compilers.results] == [type(None), ZeroDivisionError]


class Driver:
    """Stands for NVIDIA's driver: keeps what it is asked for."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.asked = status, []

    def cuFuncSetCacheConfig(self, function: ctypes.c_void_p, config: int) -> int:
        self.asked.append((function.value, config))
        return self.status


def launched(monkeypatch: pytest.MonkeyPatch, driver: Driver, *shared: int) -> None:
    """Kernels, each twice, that have these bytes of shared memory and the functions 1, 2, and so on."""
    monkeypatch.setattr("selective_kv.kernels.launch.driver", lambda: driver)
    for function, n_bytes in enumerate(shared, 1):
        kernel = SimpleNamespace(function=function, metadata=SimpleNamespace(shared=n_bytes))
        for _ in range(2):
            launch({(1,): lambda kernel=kernel: kernel}, (1,))()


def test_a_launch_leaves_the_division_of_shared_memory_to_the_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    launched(monkeypatch, driver, 96 << 10, 48 << 10, 64 << 10)  # with 48 KiB Triton asks for nothing
    assert driver.asked == [(1, 0), (3, 0)]


def test_a_driver_that_refuses_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launched(monkeypatch, Driver(400), 96 << 10, 96 << 10)
    told = "".join(f"{record.message}\n" for record in caplog.records)
    assert told.count("\n") == 1 and "cuFuncSetCacheConfig failed with 400" in told


START = """
import sys, torch
from model import CONFIGS, Transformer
with torch.device("meta"):
    model = Transformer(CONFIGS["llama-3.2-1b"])
with torch.device("meta"):
    small = Transformer(__import__("dataclasses").replace(CONFIGS["llama-3.2-1b"], n_layer=1, vocab_size=64))
small.materialize(torch.device("cpu"))
print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])
"""


def test_making_a_model_imports_no_compiler_of_torchs() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", START], env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
