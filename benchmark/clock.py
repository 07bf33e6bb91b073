"""The clock of the benchmarks, and the rate of reading that their figures are shares of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def read_ceiling(device: torch.device) -> float:
    """Bytes per second of reading, by the largest of each row of a tensor far larger than any cache.

    The best of ten: 4 GiB on a GPU, or a quarter of what is free there if that is less; 256 MiB on a CPU.
    """
    n = 1 << 28
    if device.type == "cuda":
        n = min(1 << 32, torch.cuda.mem_get_info(device)[0] // 4 >> 20 << 20)
    data = torch.ones(n // 4, device=device).view(1 << 14, -1)
    return n / min(timed(lambda: data.amax(1), device) for _ in range(10))
