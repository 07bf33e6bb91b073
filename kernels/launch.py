"""How a Triton kernel is launched here, and how, instead, it is only compiled. Needs no Triton itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

_thread = threading.local()


@contextmanager
def compiling(loaded: Callable[[Any], None] = lambda kernel: None) -> Iterator[None]:
    """In here, and in this thread, `launch` compiles and launches nothing. Arguments may be on the meta device.

    loaded: called with what Triton has for each launch: None in the interpreter, where there is nothing to compile.
    """
    _thread.compiled = loaded
    try:
        yield
    finally:
        del _thread.compiled


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`, to be called with the kernel's arguments."""
    loaded = getattr(_thread, "compiled", None)
    return kernel[grid] if loaded is None else partial(_compile, kernel, grid, loaded)


def _compile(kernel: Any, grid: tuple[int, ...], loaded: Callable[[Any], None], *args: Any, **kwargs: Any) -> None:
    loaded(kernel.warmup(*args, grid=grid, **kwargs))
