"""Launching a Triton kernel, or only compiling it ahead of its first launch. Imports no Triton."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from selective_kv.warning import warn_once

_thread = threading.local()
ALWAYS_THERE = 48 << 10  # bytes of shared memory that a program may have without asking
PREFER_NONE = 0  # CU_FUNC_CACHE_PREFER_NONE


@contextmanager
def compiling(loaded: Callable[[Any], None] = lambda kernel: None) -> Iterator[None]:
    """In this context and thread `launch` compiles kernels instead of launching them. Arguments may be on the meta
    device.

    loaded: called with each compiled kernel; with None in the interpreter, where there is nothing to compile.
    """
    _thread.compiled = loaded
    try:
        yield
    finally:
        del _thread.compiled


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`, to be called with the kernel's arguments: tensors of one GPU, not always the current one."""
    loaded = getattr(_thread, "compiled", None)
    return partial(_launch, kernel[grid]) if loaded is None else partial(_compile, kernel, grid, loaded)


def _compile(kernel: Any, grid: tuple[int, ...], loaded: Callable[[Any], None], *args: Any, **kwargs: Any) -> None:
    loaded(kernel.warmup(*args, grid=grid, **kwargs))


def _launch(run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Triton compiles for the current GPU and launches there, whatever GPU the arguments are on."""
    index = next((arg.get_device() for arg in args if isinstance(arg, torch.Tensor)), -1)  # -1: a CPU's
    if index < 0 or index == torch.cuda.current_device():
        reset_carveout(run(*args, **kwargs))
        return
    with torch.cuda.device(index):
        reset_carveout(run(*args, **kwargs))


def reset_carveout(kernel: Any) -> None:
    """Reset a kernel's shared-memory carve-out preference to "none", so that consecutive launches can overlap on an SM.

    For a program with more than 48 KiB of shared memory Triton (3.6) sets the preference to the maximum. An SM can
    only change its split between shared memory and L1 while it is idle, so such a launch cannot start before the
    previous one has ended, nor the next one beside it: 15 us a layer on an H200, 13% of a step (LOG.md, 2026-11-25).
    If the driver refuses, a warning says so once; results do not depend on it.

    kernel: what a launch returned (the first launch of a kernel still used Triton's preference); None in the
    interpreter.
    """
    function = getattr(kernel, "function", None)
    if function is None or getattr(kernel, "divided", False) or kernel.metadata.shared <= ALWAYS_THERE:
        return
    kernel.divided = True
    library = driver()
    if library is not None:
        status = library.cuFuncSetCacheConfig(ctypes.c_void_p(function), PREFER_NONE)
        if status:
            warn_once(f"cuFuncSetCacheConfig failed with {status}: decoding may take longer than it needs to")


@contextmanager
def uncollected() -> Iterator[None]:
    """Around the capture of a CUDA graph: no garbage is collected. In it there may be an earlier graph, whose end a
    capture does not survive."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a GPU: cuBLAS keeps 32 MiB for each stream that it was ever called on.

    torch.cuda.graph's own stream is one for all GPUs, on the GPU of the process's first capture: it records nothing of
    what is launched on another.
    """
    return torch.cuda.Stream(device)


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """torch.cuda.graph of a step on `device`, whichever GPU is the current one. No garbage is collected in it."""
    stream = capture_stream(device)
    with (
        torch.cuda.device(device),
        uncollected(),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=capture_error_mode),
    ):
        yield


@cache
def driver() -> ctypes.CDLL | None:
    """NVIDIA's driver; None on a GPU of another make."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
