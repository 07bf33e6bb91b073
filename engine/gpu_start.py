"""What a start on a GPU waits for beside imports, done while torch is being imported: that holds the interpreter for
seconds, and the driver and a checksum do not need it.

The CUDA context of a device is one for the whole process, whoever asks for it first. Triton looks its binaries up by a
checksum of itself, 0.4 s of them; it keeps the first one it computes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress

LIBRARY = "libcuda.so.1"


_threads: list[threading.Thread] = []


def begin(device: str, index: int | None = None) -> None:
    """Begin what a run on `device` (as `--device` has it) will wait for; `wait` comes before it is needed.

    index: of several ranks, the GPU that is this one's. Nothing begins where the device is no GPU of NVIDIA's, or
    there is no driver: what is wrong with that, whoever needs it will say.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cuda"):
        return
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return
    ordinal = index if index is not None else int(number or 0)
    _start(make_context, driver, ordinal)
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        with suppress(ImportError):  # no Triton, or one that keeps its checksum elsewhere
            from triton.runtime.cache import triton_key

            _start(triton_key)


def _start(do: Callable[..., object], *args: object) -> None:
    _threads.append(threading.Thread(target=do, args=args, name=do.__name__, daemon=True))
    _threads[-1].start()


def make_context(driver: ctypes.CDLL, ordinal: int) -> None:
    """Have the driver make the primary context of a device, which torch will then find. It stays for the process."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), ordinal) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def wait() -> None:
    """Until all that was begun is done."""
    while _threads:
        _threads.pop().join()
