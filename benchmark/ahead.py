"""What a benchmark launches, so that its kernels are compiled side by side while the weights are being made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from benchmark import first_token
from benchmark.gate import gate_runs
from engine import PREFILL_CHUNK, chunk_size
from engine.packing import PromptPart
from engine.precompile import Run, prompt_parts
from model import Config
from selective_kv import KVCache, Shape
from weights.setting import WeightSetting

MANY = 32  # sequences: where the largest batch is not known yet, the kernels' launch configuration for many


def gated_batches(args: argparse.Namespace) -> list[int]:
    """The batches of which the gate asks for right attention and products."""
    return [1, MANY] if args.largest_batch else sorted({batch for batch, _ in args.shapes})


def runs_of(
    config: Config, policies: Sequence[KVCache], args: argparse.Namespace, shape: Shape,
    settings: Sequence[WeightSetting | None],
) -> list[Run]:  # fmt: skip
    """Every gate and every contestant, for all weights, caches, batches and contexts. shape: its batch and capacity
    do not count.
    """
    found = []
    for weights, policy, batch in product(settings, policies, gated_batches(args)):
        if args.first_token:
            found.append(Run(policy, *first_token.gate_parts(shape), weights))
        else:
            found += gate_runs(policy, replace(shape, batch=batch), weights)
        for context in sorted({context for n, context in args.shapes if n == batch or args.largest_batch}):
            n_step = 0 if args.first_token else 1 + max(args.steps, args.each_step)
            at = replace(shape, batch=batch, capacity=context + n_step + 1)
            parts: list[PromptPart] = []
            if args.first_token or args.prefill:
                parts = prompt_parts([context] * batch, chunk_size(policy, config.context, PREFILL_CHUNK))
            found.append(Run(policy, at, parts, weights))
    return found
