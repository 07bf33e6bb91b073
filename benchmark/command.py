"""What scripts/benchmark.py does once its flags have been read."""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmark import attention_kernels as bench_kernels
from benchmark import first_token, peers
from benchmark import layer as bench_attention
from benchmark.ahead import gated_batches, runs_of
from benchmark.clock import read_ceiling
from benchmark.contestant import Contestant
from benchmark.flags import DEFAULT_CACHES, DEFAULT_STEPS, main, make_parser
from benchmark.gate import gate
from benchmark.memory import Entry, Model, in_turn, largest_batch, plans, require_room, together
from benchmark.rows import print_slopes, print_table
from benchmark.saved import load_saved
from checkpoint import Checkpoint, chosen_weights, find_demo, load_model, open_checkpoint, parse_dtype
from cli.device import device_memory
from cli.plan import parameter_bytes, require_suits
from cli.provenance import FORMAT, device_name, made_from
from cli.ranks import free_memory
from common.errors import UserError, printable
from common.files import append_line, require_writable, to_json
from common.messages import note, say, size
from common.program import ran_out
from engine import Sampling
from engine.link import Link
from engine.parallel import connect, rank_device
from engine.precompile import compiled_ahead
from kv_cache import format_policy, parse_policy
from model import Config, Transformer
from selective_kv import KVCache, Shape

__all__ = ["largest_batch", "main", "make_parser", "release", "run"]


def compare(
    models: list[Model], config: Config, policies: list[KVCache], args: argparse.Namespace, shape: Shape, ceiling: float
) -> list[dict[str, Any]]:
    """A row for every cache at every batch and context, over every setting of weights, interleaved within each context
    as far as they fit the device together. Of several ranks, the first one's rows, with every rank's peak.
    """
    theirs = None
    if args.peer:
        theirs = peers.transformers_model(models[0].transformer)
        say(f"peer: transformers' logits are {peers.gate(models[0].transformer, theirs):.2g} from ours")
    rows: list[dict[str, Any]] = []
    release(shape.device)
    weights = sum(parameter_bytes(model.transformer) for model in models)
    available = free_memory(shape.device, args.ranks) + weights
    planned = [plans(config, policies, args, shape, setting) for setting in args.weight_settings]
    for batch, context in planned[0]:
        at = replace(shape, batch=batch, capacity=context + max(args.steps, args.each_step) + 2)
        rest = (at, context, args.prefill)
        entries: list[Entry] = []
        for model, found in zip(models, planned, strict=True):
            for policy, plan in zip(policies, found[batch, context], strict=False):  # a peer's plans are behind them
                name = format_policy(policy)
                saved = args.saved.get(name)
                ours = partial(Contestant, model.transformer, policy, *rest, saved, args.ranks, args.share)
                entries.append(Entry(model, name, plan, ours))
        if theirs is not None:
            # As full ones are their plans; a package that is not installed leaves one of them out.
            of_peers = zip(peers.caches(theirs).items(), planned[0][batch, context][len(policies) :], strict=False)
            for (name, cache), plan in of_peers:
                their = partial(peers.Peer, name, theirs, cache, at, context, args.prefill)
                entries.append(Entry(models[0], name, plan, their))
        groups = in_turn(entries, weights, available)
        if len(groups) > 1:
            need = f"all caches together need {size(together(entries, weights))}"
            say(f"{batch} x {context} tokens: {need}, and {size(available)} are free: "
                "they are timed one after the other, so a drift of the machine may touch one alone")  # fmt: skip
        for group in groups:
            rows += [row | {"interleaved": len(groups) == 1} for row in time_group(group, args, ceiling)]
            release(shape.device)
    return rows


def time_group(entries: list[Entry], args: argparse.Namespace, ceiling: float) -> list[dict[str, Any]]:
    """Rows of contestants that are timed in turn."""
    contestants = [entry.make() for entry in entries]
    for _ in range(args.rounds):
        for contestant in contestants:
            contestant.round(args.steps)
    for contestant in contestants if args.each_step else ():
        contestant.one_by_one(args.each_step)
    return [
        contestant.result(entry.model.transformer, ceiling) | {"weights": entry.model.weights}
        for entry, contestant in zip(entries, contestants, strict=True)
    ]


def fill_card(
    models: list[Model], config: Config, policies: list[KVCache], args: argparse.Namespace, shape: Shape, ceiling: float
) -> list[dict[str, Any]]:
    """A row for each cache and context, of as many sequences as the plan says fit: allocated, filled and stepped."""
    release(shape.device)
    ((weights, model),) = models
    # What the plan counts weights in: they are there already.
    available = device_memory(shape.device) + parameter_bytes(model)
    available = min(available, args.memory_budget or available)
    rows = []
    for context in args.context:
        for policy in policies:
            at = replace(shape, capacity=context + args.steps + 2)
            n = largest_batch(config, policy, at, available, args.weight_settings[0])
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
            rows.append(row | {"weights": weights})
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
        heads = bench_kernels.Heads(c.n_head, c.n_kv_head, c.head_dim)
        return bench_kernels.run([heads], args.shapes, rounds=args.rounds)
    if any(batch > 1 for batch, _ in args.shapes):
        raise UserError("--kernels measures batch 1 on a CPU")
    rows = bench_attention.run(
        [context for _, context in args.shapes], c.n_kv_head, c.n_head // c.n_kv_head, c.head_dim, args.rounds
    )
    return {"device": str(device), "rows": rows}


def run_caches(checkpoint: Checkpoint, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole model, every cache: a record for every setting of weights."""
    dtype = parse_dtype(args.dtype, checkpoint, device)
    policies = [parse_policy(text) for text in args.caches]
    config = checkpoint.config
    for policy in policies:
        require_suits(policy, config)
    if len({format_policy(policy) for policy in policies}) < len(policies):
        raise UserError("--caches names a setting twice")
    args.weight_settings = settings = [chosen_weights(checkpoint, text) for text in args.weights or [None]]
    shape = Shape(1, config.n_kv_head, config.head_dim, 1, dtype, device)
    for saved in args.saved.values():
        whole = config if args.share is None else args.share.whole
        saved.require(whole, saved.policy(), replace(shape, batch=args.shapes[0][0]))
    if not args.largest_batch:
        planned = [plans(config, policies, args, shape, weights) for weights in settings]
        require_room(planned, policies, free_memory(device, args.ranks))
    models = []
    runs = runs_of(config, policies, args, shape, settings)
    with compiled_ahead(config, runs, Sampling(temperature=0), args.ranks):
        for weights in settings:
            note(f"loading {checkpoint.name}")
            made = load_model(
                checkpoint, device, dtype, random_weights=args.random_weights, weights=weights, ranks=args.ranks
            )
            models.append(Model(str(weights or 16), made))
        note("compiling kernels")
    for (name, made), policy in product(models, policies):
        if args.first_token:
            worst = first_token.gate(made, policy, shape)
        else:
            worst = gate(made, policy, shape, batches=gated_batches(args))
        of = f", weights {name}," if len(settings) > 1 else ""
        print(f"gate: {format_policy(policy)}{of} within {worst:.2g} of its reference", file=sys.stderr)
    of = f"{str(dtype).removeprefix('torch.')}, weights {', '.join(model.weights for model in models)}"
    about = {
        "model": checkpoint.name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "world_size": 1 if args.ranks is None else args.ranks.size,
    }
    if args.first_token:
        rows = first_token.compare(models, policies, args.shapes, args.rounds, shape, args.ranks)
        print(f"{printable(checkpoint.name, 80)}, {of}")
        first_token.print_rows(rows)
        return [about | {"weights": m.weights, "rows": [r for r in rows if r["weights"] == m.weights]} for m in models]
    note("measuring the read ceiling, then steps")
    ceiling = read_ceiling(device)
    measure = fill_card if args.largest_batch else compare
    rows = measure(models, config, policies, args, shape, ceiling)
    print(f"{printable(checkpoint.name, 80)}, {of}; read ceiling {ceiling / 1e9:.0f} GB/s")
    print_table(rows)
    for r in rows if args.largest_batch else ():
        base = next(b["batch"] for b in rows if b["context"] == r["context"])
        print(f"{r['context']} tokens, {r['cache']}: {r['batch']} sequences, {r['batch'] / base:.2f}x the first's")
    slopes = {}
    if not args.largest_batch:
        slopes = {model.weights: print_slopes([r for r in rows if r["weights"] == model.weights]) for model in models}
    return [
        about
        | {
            "weights": model.weights,
            "read_ceiling_bytes_per_s": ceiling,
            "rows": [r for r in rows if r["weights"] == model.weights],
            "slope_us_per_1000_tokens": slopes.get(model.weights, {}),
        }
        for model in models
    ]


def run(args: argparse.Namespace, argv: list[str], link: Link | None) -> None:
    """Load the model, check it by the gate, time the caches, print tables and write the records. Raises UserError."""
    device = rank_device(args.device, link)
    if link is not None and (args.kernels or args.largest_batch or args.peer):
        raise UserError("--kernels, --largest_batch and --peer are measured on one device")
    if link is None and args.sums != "auto":
        raise UserError("--sums goes with several ranks (torchrun)")
    load_saved(args)
    args.caches, args.steps = args.caches or DEFAULT_CACHES, args.steps or DEFAULT_STEPS
    where = None if args.random_weights else args.checkpoint_path or find_demo()
    checkpoint = open_checkpoint(where, args.model)
    args.ranks, args.share = None, None
    if link is not None:
        checkpoint = checkpoint.share_of(link.rank, link.size)
        args.share = checkpoint.share
        args.ranks = connect(link, device, args.sums)
    for flag, path in (("--json", args.json), ("--png", args.png)):
        if path:
            require_writable(path, flag)
    records = [run_kernels(checkpoint, device, args)] if args.kernels else run_caches(checkpoint, device, args)
    dtype = parse_dtype(args.dtype, checkpoint, device)
    for record in records:
        record |= {"format": FORMAT, "torch": torch.__version__, "command": ["scripts/benchmark.py", *argv]}
    if link is not None:
        link.finish()
        if link.rank:
            return
    if args.json:
        sources = made_from(where, [args.plugin, *args.load_cache], dtype, device)
        for record in records:
            append_line(args.json, to_json(record | {"made_from": sources}))
    if args.png:
        from plots.command import draw_speed  # matplotlib is needed for this alone

        draw_speed(records, args.png.parent, args.png.stem)
