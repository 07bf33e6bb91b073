"""What the machine has and what the process has taken of it: memory and age."""

from __future__ import annotations

import os
import resource
import sys

import torch

from cli.limits import limited_memory

# What a run takes of a GPU past its tensors: loaded kernels, workspaces, a stream, a graph, rounding. 31 sequences that
# left 0.2 GiB of an H200 did not run (LOG.md, 2026-11-25).
BEYOND_TENSORS = 1 << 30


def device_memory(device: torch.device) -> int:
    """Bytes that tensors can still take, as far as the system tells."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return 1 << 62  # a plan for another machine: --memory_budget says what it has
    if device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - BEYOND_TENSORS)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (FileNotFoundError, KeyError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limited = limited_memory()
    return free if limited is None else min(free, limited)


def peak_memory(device: torch.device) -> int:
    """The most bytes taken so far: of the device by tensors, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
