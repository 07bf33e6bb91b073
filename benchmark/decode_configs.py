"""Decode steps of a whole model by several launch plans of the decode kernel in turn.

    python scripts/sweep_plans.py --random_weights --model llama-3.1-8b --context 256 8192 131072 \\
        --caches full quantize_kv --plans "" warps=2,int_slice=32,int_stages=4,per_processor=2 ahead=0

A plan is the usual one of the cache's shape with some of its fields changed; the empty one changes nothing. In a model
and not alone, because what stands beside a kernel decides as much as the kernel does (LOG.md, 2026-11-25). Every
plan passes the benchmark's gate before it is timed. Needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmark.command import release
from benchmark.contestant import Contestant
from benchmark.gate import gate
from checkpoint import find_demo, load_model, open_checkpoint, parse_device, parse_dtype
from cli.options import Parser, positive
from cli.plan import require_suits
from common.errors import UserError, printable
from common.program import program
from kv_cache import format_policy, parse_policy
from selective_kv import Shape
from selective_kv.kernels import AttentionKernels

FIELDS = (
    "warps", "float_slice", "int_slice", "float_stages", "int_stages", "per_processor", "splits", "ahead", "halves"
)  # fmt: skip


def parse_plan(text: str) -> dict[str, int]:
    """ "warps=2,ahead=64" -> {"warps": 2, "ahead": 64}. Raises UserError."""
    changes = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in FIELDS or not value.isdecimal():
            raise UserError(f"--plans: {part!r} is not one of {', '.join(FIELDS)} = a number")
        changes[name] = int(value)
    return changes


def configured(changes: dict[str, Any]) -> AttentionKernels:
    """The Triton kernels whose decode attention is launched by its usual configuration with these fields changed."""
    from selective_kv.kernels.decode import decode_attention, plan
    from selective_kv.kernels.triton_backend import TRITON

    def changed(*shape: Any) -> Any:
        return plan(*shape)._replace(**changes)

    return replace(TRITON, decode_attention=partial(decode_attention, configure=changed))


def run(args: argparse.Namespace) -> None:
    """Time steps with every plan in turn, for each cache and context, and print the medians. Raises UserError."""
    device = parse_device(args.device)
    plans = [parse_plan(text) for text in args.plans]
    if device.type != "cuda":
        raise UserError("this sweeps a CUDA kernel's plans, and there is no CUDA device")
    if args.random_weights and args.model is None:
        raise UserError("--random_weights needs --model NAME")
    where = None if args.random_weights else args.checkpoint_path or find_demo()
    checkpoint = open_checkpoint(where, args.model)
    config, dtype = checkpoint.config, parse_dtype("auto", checkpoint, device)
    policies = [parse_policy(text) for text in args.caches]
    for policy in policies:
        require_suits(policy, config)
    model = load_model(checkpoint, device, dtype, random_weights=args.random_weights)
    shape = Shape(args.batch, config.n_kv_head, config.head_dim, 1, dtype, device)
    name = printable(checkpoint.name, 80)
    print(f"{name}, {torch.cuda.get_device_name(device)}, batch {args.batch}; medians, ms a step")
    for policy in policies:
        for changes in plans:
            gate(model, policy, shape, attention=configured(changes))
        for context in args.context:
            at = replace(shape, capacity=context + args.steps + 2)
            contestant = Contestant(model, policy, at, context)
            graphs = []
            for changes in plans:
                kernels = configured(changes)
                for layer in contestant.engine.cache.layers:
                    layer.wrap_kernels(lambda _, kernels=kernels: kernels)  # type: ignore[misc]
                contestant.engine._capture()
                graphs.append(contestant.engine.graph)
            contestant.rewind()
            times: list[list[float]] = [[] for _ in plans]
            for _ in range(args.rounds):
                for graph, found in zip(graphs, times, strict=True):
                    contestant.engine.graph = graph
                    contestant.round(args.steps)
                    found.append(contestant.seconds[-1] * 1e3)
            for median, text in sorted((statistics.median(t), text) for t, text in zip(times, args.plans, strict=True)):
                print(f"{context:>8} {format_policy(policy):<44} {median:9.4f}  {text or '(as it is)'}", flush=True)
            del contestant, graphs
            release(device)


def main() -> None:
    p = Parser("sweep_plans.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint_path", type=Path)
    p.add_argument("--model", metavar="NAME")
    p.add_argument("--random_weights", action="store_true")
    p.add_argument("--device", default="auto")
    p.add_argument("--batch", type=positive, default=1)
    p.add_argument("--context", nargs="+", type=positive, default=[256, 8000])
    p.add_argument("--caches", nargs="+", metavar="CACHE", default=["full", "quantize_kv"])
    p.add_argument("--plans", nargs="+", metavar="PLAN", default=[""], help=f"fields: {', '.join(FIELDS)}")
    p.add_argument("--steps", type=positive, default=8, help="decode steps timed at a time (default: 8)")
    p.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    with program("sweep_plans.py"):
        run(p.parse(sys.argv[1:]))
