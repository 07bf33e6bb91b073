"""What the command line has to know of several ranks: how many, what each may take and took, where each writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from cli.device import device_memory, peak_memory
from cli.profile import Profiler, require_name
from common.errors import UserError
from engine import Engine
from engine.link import Link
from engine.parallel import Parallel


def world_size(args: argparse.Namespace, link: Link | None) -> int:
    """How many ranks the run is, or is planned, for."""
    started = 1 if link is None else link.size
    wanted = args.world_size or started
    if wanted != started and (link is not None or not args.dry_run):
        raise UserError(f"--world_size {wanted}, and {started} rank{'s' * (started > 1)} started (--nproc_per_node)")
    return wanted


def free_memory(device: torch.device, ranks: Parallel | None) -> int:
    """Bytes that tensors can still take; over several ranks the minimum, so that all decide alike."""
    free = device_memory(device)
    if ranks is None:
        return free
    return min(ranks.from_all(free)) // (ranks.size if device.type == "cpu" else 1)  # one machine's, shared


def memory_budget(args: argparse.Namespace, device: torch.device, ranks: Parallel | None) -> int:
    """Bytes that this run, or each of its ranks, may take."""
    free = free_memory(device, ranks)
    if args.memory_budget is None:
        return free
    return args.memory_budget if args.dry_run else min(free, args.memory_budget)  # a dry run: of another machine


def make_profiler(name: str | None, device: torch.device, link: Link | None) -> Profiler | None:
    """The profiler of --profile; each of several ranks has a folder for its traces in the run's folder."""
    if name is None or link is None:
        return None if name is None else Profiler(name, device)
    require_name(name)
    return Profiler(f"rank{link.rank}", device, Path("outputs") / name)


def rank_part(engine: Engine) -> dict[str, Any]:
    """What a report says of each of several ranks. Nothing here waits for the device."""
    return {
        "weight_bytes": sum(p.nbytes for p in engine.model.parameters()),
        "cache_bytes": sum(engine.cache.nbytes().values()),
        "peak_memory_bytes": peak_of(engine),
    }


def peak_of(engine: Engine) -> int:
    """The most bytes taken so far, with the memory that ranks share for their sums."""
    return peak_memory(engine.device) + (0 if engine.ranks is None else engine.ranks.nbytes)
