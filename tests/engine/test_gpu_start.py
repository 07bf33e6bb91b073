"""What begins beside imports: the driver's context, Triton's checksum, and nothing where there is no GPU to use."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest

from engine import gpu_start


class Driver:
    """Stands for NVIDIA's driver: keeps what it is asked for, and by which thread."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.asked = status, []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            ordinal = [arg for arg in args if isinstance(arg, int)]
            self.asked.append((name, *ordinal, threading.current_thread() is threading.main_thread()))
            return self.status

        return call


@pytest.mark.parametrize(
    ("device", "index", "ordinal"), [("auto", None, 0), ("cuda", None, 0), ("cuda:2", None, 2), ("cuda", 3, 3)]
)
def test_a_context_is_made_by_another_thread(
    device: str, index: int | None, ordinal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    gpu_start.begin(device, index)
    gpu_start.wait()
    names = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert driver.asked == [(names[0], 0, False), (names[1], ordinal, False), (names[2], False)]
    gpu_start.wait()  # nothing is left to wait for


def test_a_driver_that_refuses_is_left_to_whoever_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(100)  # CUDA_ERROR_NO_DEVICE
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    gpu_start.begin("auto")
    gpu_start.wait()
    assert [name for name, *_ in driver.asked] == ["cuInit"]


def test_nothing_begins_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(threading, "Thread", None)
    monkeypatch.setattr(ctypes, "CDLL", absent)
    gpu_start.begin("auto")
    monkeypatch.setattr(ctypes, "CDLL", None)
    for device in ("cpu", "mps"):
        gpu_start.begin(device)


def test_triton_keeps_its_checksum() -> None:
    """`triton_key` is private: where it moves, the start is slower, and this test says so."""
    cache = pytest.importorskip("triton.runtime.cache")
    assert cache.triton_key() is cache.triton_key()
