"""The memory that a benchmark's caches and weights need, and so which of them can be timed in turn."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from benchmark.contestant import Timed
from cli.plan import Plan, make_plan
from common.errors import UserError
from common.messages import size
from engine import PREFILL_CHUNK
from kv_cache import format_policy
from model import Config, Transformer
from selective_kv import FullCache, KVCache, Shape
from weights.setting import WeightSetting


class Model(NamedTuple):
    """A model whose weights `--weights` named."""

    weights: str
    transformer: Transformer


class Entry(NamedTuple):
    """A contestant that is not made yet, and the memory that it will take."""

    model: Model
    name: str  # of its cache
    plan: Plan
    make: Callable[[], Timed]


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
    config: Config, policies: list[KVCache], args: argparse.Namespace, shape: Shape, weights: WeightSetting | None
) -> dict[tuple[int, int], list[Plan]]:
    """Each cache's memory plan at every batch and context, with these weights. With a peer also its caches', planned as
    full caches that are copied when they grow."""
    found = {}
    for batch, context in args.shapes:
        at = replace(shape, batch=batch, capacity=context + max(args.steps, args.each_step) + 2)
        chunk = PREFILL_CHUNK if args.prefill or args.first_token else 1
        found[batch, context] = [make_plan(config, p, at, chunk, weights) for p in policies]
        if args.peer:
            theirs = make_plan(config, FullCache(), at, chunk, weights)
            found[batch, context] += [replace(theirs, cache=theirs.cache | {"copy": theirs.full_cache})] * 2
    return found


def require_room(planned: list[dict[tuple[int, int], list[Plan]]], policies: list[KVCache], available: int) -> None:
    """Raises UserError if a cache does not fit the device even alone, beside all weights. planned: `plans` for each
    setting of weights."""
    for batch, context in planned[0]:
        each = [at[batch, context] for at in planned]
        weights = sum(found[0].weights for found in each)
        for plan, i in ((plan, i) for found in each for i, plan in enumerate(found)):
            need = weights + plan.total - plan.weights
            if need > available:
                name = format_policy(policies[i]) if i < len(policies) else "--peer transformers"
                raise UserError(
                    f"{name}, {batch} x {context} tokens: {size(need)} are needed (weights {size(weights)}, "
                    f"cache {size(sum(plan.cache.values()))}) and {size(available)} are free"
                )


def together(entries: list[Entry], weights: int) -> int:
    """Bytes of several contestants beside `weights` bytes of all weights."""
    plans = [entry.plan for entry in entries]
    return weights + sum(sum(p.cache.values()) for p in plans) + max(p.activations for p in plans)


def in_turn(entries: list[Entry], weights: int, available: int) -> list[list[Entry]]:
    """Contestants in groups that fit the device: all; else, of several settings of weights, a cache over all of them;
    else each alone.
    """
    by_cache: dict[str, list[Entry]] = {}
    for entry in entries:
        by_cache.setdefault(entry.name, []).append(entry)
    for groups in ([entries], list(by_cache.values())):
        if all(together(group, weights) <= available for group in groups):
            return groups
    return [[entry] for entry in entries]
