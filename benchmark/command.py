"""What scripts/benchmark.py does once its flags have been read."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmark import attention_kernels as bench_kernels
from benchmark import layer as bench_attention
from benchmark import peers
from benchmark.clock import read_ceiling
from benchmark.contestant import Contestant, Timed, gate
from benchmark.flags import DEFAULT_CACHES, DEFAULT_STEPS, main, make_parser
from benchmark.rows import no_slower_from, print_table, slope
from benchmark.saved import load_saved
from checkpoint import Checkpoint, chosen_weights, find_demo, load_model, open_checkpoint, parse_dtype
from cli.device import device_memory
from cli.plan import Plan, make_plan, parameter_bytes, require_suits
from cli.provenance import FORMAT, device_name, made_from
from cli.ranks import free_memory
from common.errors import UserError, printable
from common.files import append_line, require_writable, to_json
from common.messages import note, say, size
from common.program import ran_out
from engine import PREFILL_CHUNK
from engine.link import Link
from engine.parallel import connect, rank_device
from kv_cache import format_policy, parse_policy
from model import Config, Transformer
from quantize import WeightSetting
from selective_kv import FullCache, KVCache, Shape

__all__ = ["largest_batch", "main", "make_parser", "release", "run"]


def largest_batch(
    config: Config, policy: KVCache, shape: Shape, available: int, weights: WeightSetting | None = None
) -> int:
    """The most sequences of `shape` whose plan fits; 0 if not one does."""

    def fits(n: int) -> bool:
        return make_plan(config, policy, replace(shape, batch=n), 1, weights).total <= available

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plans(
    config: Config, policies: list[KVCache], args: argparse.Namespace, shape: Shape
) -> dict[tuple[int, int], list[Plan]]:
    """What each cache takes at every batch and context, weights included; with a peer, its caches too, as full ones
    that are copied when they grow."""
    found = {}
    for batch in args.batch:
        for context in args.context:
            at = replace(shape, batch=batch, capacity=context + args.steps + 2)
            chunk = PREFILL_CHUNK if args.prefill else 1
            found[batch, context] = [make_plan(config, p, at, chunk, args.weight_setting) for p in policies]
            if args.peer:
                theirs = make_plan(config, FullCache(), at, chunk, args.weight_setting)
                found[batch, context] += [replace(theirs, cache=theirs.cache | {"copy": theirs.full_cache})] * 2
    return found


def require_room(planned: dict[tuple[int, int], list[Plan]], policies: list[KVCache], available: int) -> None:
    """Raises UserError if a cache does not fit the device even alone."""
    for (batch, context), each in planned.items():
        for i, plan in enumerate(each):
            if plan.total > available:
                name = format_policy(policies[i]) if i < len(policies) else "--peer transformers"
                raise UserError(
                    f"{name}, {batch} x {context} tokens: {size(plan.total)} are needed (weights {size(plan.weights)}, "
                    f"cache {size(sum(plan.cache.values()))}) and {size(available)} are free"
                )


def together(each: list[Plan]) -> int:
    """Bytes of several caches beside one copy of the weights."""
    return each[0].weights + sum(sum(p.cache.values()) for p in each) + max(p.activations for p in each)


def compare(
    model: Transformer, config: Config, policies: list[KVCache], args: argparse.Namespace, shape: Shape, ceiling: float
) -> list[dict[str, Any]]:
    """A row for every cache at every batch and context, interleaved within each; one cache after the other where they
    do not fit the device together. Of several ranks, the first one's rows, with every rank's peak.
    """
    theirs = None
    if args.peer:
        theirs = peers.transformers_model(model)
        say(f"peer: transformers' logits are {peers.gate(model, theirs):.2g} from ours")
    rows: list[dict[str, Any]] = []
    release(shape.device)
    available = free_memory(shape.device, args.ranks) + parameter_bytes(model)
    for (batch, context), each in plans(config, policies, args, shape).items():
        at = replace(shape, batch=batch, capacity=context + args.steps + 2)
        rest = (at, context, args.prefill)
        makers: list[Callable[[], Timed]] = [
            partial(Contestant, model, p, *rest, args.saved.get(format_policy(p)), args.ranks) for p in policies
        ]
        if theirs is not None:
            made = peers.caches(theirs)
            makers += [partial(peers.Peer, n, theirs, make, at, context, args.prefill) for n, make in made.items()]
        groups = [makers]
        if together(each) > available:
            groups = [[maker] for maker in makers]
            need = f"all caches together need {size(together(each))}"
            say(f"{batch} x {context} tokens: {need}, and {size(available)} are free: "
                "they are timed one after the other, so a drift of the machine may touch one alone")  # fmt: skip
        for group in groups:
            rows += [row | {"interleaved": len(groups) == 1} for row in time_group(group, args, model, ceiling)]
            release(shape.device)
    return rows


def time_group(
    makers: list[Callable[[], Timed]], args: argparse.Namespace, model: Transformer, ceiling: float
) -> list[dict[str, Any]]:
    """Rows of contestants that are timed in turn."""
    contestants = [make() for make in makers]
    for _ in range(args.rounds):
        for contestant in contestants:
            contestant.round(args.steps)
    return [contestant.result(model, ceiling) for contestant in contestants]


def fill_card(
    model: Transformer, config: Config, policies: list[KVCache], args: argparse.Namespace, shape: Shape, ceiling: float
) -> list[dict[str, Any]]:
    """As many sequences as the plan says fit, per cache and context, really allocated, filled and stepped."""
    release(shape.device)
    # What the plan counts weights in: they are there already.
    available = device_memory(shape.device) + parameter_bytes(model)
    available = min(available, args.memory_budget or available)
    rows = []
    for context in args.context:
        for policy in policies:
            at = replace(shape, capacity=context + args.steps + 2)
            n = largest_batch(config, policy, at, available, args.weight_setting)
            if not n:
                raise UserError(
                    f"{format_policy(policy)}: not one sequence of {context} tokens fits in {size(available)}"
                )
            while not (row := step_batch(model, policy, replace(at, batch=n), context, args, ceiling)):
                print(f"{format_policy(policy)}: the plan says {n} sequences fit, and they do not", file=sys.stderr)
                n -= 1
                if not n:
                    raise UserError(f"{format_policy(policy)}: not one sequence of {context} tokens fits")
                release(shape.device)
            rows.append(row)
            release(shape.device)
    return rows


def step_batch(
    model: Transformer, policy: KVCache, shape: Shape, context: int, args: argparse.Namespace, ceiling: float
) -> dict[str, Any] | None:
    """The row of one cache alone on the device; None if memory does not suffice."""
    try:
        contestant = Contestant(model, policy, shape, context)
        for _ in range(args.rounds):
            contestant.round(args.steps)
        return contestant.result(model, ceiling)
    except RuntimeError as error:
        if ran_out(error):
            return None
        raise


def release(device: torch.device) -> None:
    """Free what is no longer used: engines refer to themselves, and the allocator keeps memory for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_kernels(checkpoint: Checkpoint, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """`--kernels`: the model's attention shape, by bench_kernels.py on a GPU and bench_attention.py on a CPU."""
    c = checkpoint.config
    if device.type == "cuda":
        shapes = [(batch, context) for batch in args.batch for context in args.context]
        heads = bench_kernels.Heads(c.n_head, c.n_kv_head, c.head_dim)
        return bench_kernels.run(heads, shapes, rounds=args.rounds)
    if args.batch != [1]:
        raise UserError("--kernels measures batch 1 on a CPU")
    rows = bench_attention.run(args.context, c.n_kv_head, c.n_head // c.n_kv_head, c.head_dim, args.rounds)
    return {"device": str(device), "rows": rows}


def run_caches(checkpoint: Checkpoint, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The whole model, every cache."""
    dtype = parse_dtype(args.dtype, checkpoint, device)
    policies = [parse_policy(text) for text in args.caches]
    args.context = sorted(set(args.context))
    config = checkpoint.config
    for policy in policies:
        require_suits(policy, config)
    if len({format_policy(policy) for policy in policies}) < len(policies):
        raise UserError("--caches names a setting twice")
    args.weight_setting = weights = chosen_weights(checkpoint, args.weights)
    shape = Shape(1, config.n_kv_head, config.head_dim, 1, dtype, device)
    for saved in args.saved.values():
        saved.require(config, saved.policy(), replace(shape, batch=args.batch[0]))
    if not args.largest_batch:
        require_room(plans(config, policies, args, shape), policies, free_memory(device, args.ranks))
    note(f"loading {checkpoint.name}")
    model = load_model(checkpoint, device, dtype, random_weights=args.random_weights, weights=weights, ranks=args.ranks)
    for policy in policies:
        # The largest batch is not known yet: 32 sequences take the kernels' plan for many.
        worst = max(
            gate(model, policy, replace(shape, batch=n)) for n in ([1, 32] if args.largest_batch else args.batch)
        )
        print(f"gate: {format_policy(policy)} within {worst:.2g} of its reference", file=sys.stderr)
    note("measuring the read ceiling, then steps")
    ceiling = read_ceiling(device)
    measure = fill_card if args.largest_batch else compare
    rows = measure(model, config, policies, args, shape, ceiling)
    of = f"{str(dtype).removeprefix('torch.')}, weights {weights or 16}"
    print(f"{printable(checkpoint.name, 80)}, {of}; read ceiling {ceiling / 1e9:.0f} GB/s")
    print_table(rows)
    for r in rows if args.largest_batch else ():
        base = next(b["batch"] for b in rows if b["context"] == r["context"])
        print(f"{r['context']} tokens, {r['cache']}: {r['batch']} sequences, {r['batch'] / base:.2f}x the first's")
    slopes = {}
    for batch in args.batch if len(args.context) > 1 and not args.largest_batch else ():
        by_cache: dict[str, list[dict[str, Any]]] = {}
        for r in rows:
            if r["batch"] == batch:
                by_cache.setdefault(r["cache"], []).append(r)
        base, base_rows = next(iter(by_cache.items()))
        for name, found in by_cache.items():
            slopes[f"{name} batch {batch}"] = slope(found)
            start = no_slower_from(found, base_rows)
            than = "" if name == base else f"; no slower than {base} from {start} tokens on" if start else \
                f"; slower than {base} at {found[-1]['context']} tokens"  # fmt: skip
            print(f"batch {batch}, {name}: {slope(found):.2f} us per 1,000 tokens of context{than}")
    return {
        "model": checkpoint.name,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": str(weights or 16),
        "device": device_name(device),
        "read_ceiling_bytes_per_s": ceiling,
        "world_size": 1 if args.ranks is None else args.ranks.size,
        "rows": rows,
        "slope_us_per_1000_tokens": slopes,
    }


def run(args: argparse.Namespace, argv: list[str], link: Link | None) -> None:
    device = rank_device(args.device, link)
    if link is not None and (args.kernels or args.largest_batch or args.peer or args.load_cache):
        raise UserError("--kernels, --largest_batch, --peer and --load_cache are measured on one device")
    if link is None and args.sums != "auto":
        raise UserError("--sums goes with several ranks (torchrun)")
    load_saved(args)
    args.caches, args.steps = args.caches or DEFAULT_CACHES, args.steps or DEFAULT_STEPS
    where = None if args.random_weights else args.checkpoint_path or find_demo()
    checkpoint = open_checkpoint(where, args.model)
    args.ranks = None
    if link is not None:
        checkpoint = checkpoint.share_of(link.rank, link.size)
        args.ranks = connect(link, device, args.sums)
    for flag, path in (("--json", args.json), ("--png", args.png)):
        if path:
            require_writable(path, flag)
    record = (run_kernels if args.kernels else run_caches)(checkpoint, device, args)
    dtype = parse_dtype(args.dtype, checkpoint, device)
    record |= {"format": FORMAT, "torch": torch.__version__, "command": ["scripts/benchmark.py", *argv]}
    if link is not None:
        link.finish()
        if link.rank:
            return
    if args.json:
        record["made_from"] = made_from(where, [args.plugin, *args.load_cache], dtype, device)
    if args.json:
        append_line(args.json, to_json(record))
    if args.png:
        from plots.command import draw_speed  # matplotlib is needed for this alone

        draw_speed([record], args.png.parent, args.png.stem)
