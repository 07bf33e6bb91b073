"""What a run will take, before it starts, and the most bits that fit.

The cache's bytes come from allocating it on the meta device, so they are what will really be allocated; the
weights' from the model's tensors there. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import kv_cache
from checkpoint.quantised import skeleton
from common.errors import UserError
from common.messages import say, size
from engine import Sampling
from engine.chunk_sums import by_rows, n_byte
from engine.packing import most_at_once
from kv_cache import format_policy
from model import Config, Transformer
from quantize import WeightSetting
from selective_kv import FullCache, KVCache, Shape
from weights.cpu import packed_more


@dataclass(frozen=True)
class Plan:
    """The memory that a run will take, all in bytes."""

    weights: int
    cache: dict[str, int]  # by region
    full_cache: int  # what the full cache would take for the same sequences
    activations: int
    capacity: int
    batch: int
    dense_weights: int = 0  # what the weights would take in the run's dtype
    weight_setting: str = "16"  # what --weights said

    @property
    def total(self) -> int:
        return self.weights + sum(self.cache.values()) + self.activations

    def lines(self, n_rank: int = 1) -> list[str]:
        """The plan as lines for people. n_rank: how many ranks there are; this is one rank's plan."""
        regions = ", ".join(f"{name} {size(n)}" for name, n in self.cache.items())
        cache = sum(self.cache.values())
        kept = ""
        if self.weight_setting != "16":
            kept = f"  {self.weight_setting}: {self.weights / self.dense_weights:.1%} of {size(self.dense_weights)}"
        what = f"{self.batch} x {self.capacity} tokens ({regions})" if self.cache else "this cache does not say"
        return [
            f"weights      {size(self.weights):>12}{kept}",
            f"cache        {size(cache):>12}  {what}",
            f"  full cache {size(self.full_cache):>12}"
            + (f"  this one takes {cache / self.full_cache:.1%} of it" if self.cache else ""),
            f"activations  {size(self.activations):>12}  at most, estimated",
            f"total        {size(self.total):>12}" + ("" if n_rank == 1 else f"  on each of {n_rank} ranks"),
            *([] if n_rank == 1 else [f"  in all     {size(n_rank * self.total):>12}"]),
        ]


def weight_bytes(
    config: Config, dtype: torch.dtype, weights: WeightSetting | None = None, device: torch.device | None = None
) -> int:
    """Bytes of the weights. device: where they will run (a CPU's products reorder them); None: as they are written."""
    model = skeleton(config, weights, dtype)
    return parameter_bytes(model) + (packed_more(model) if device is not None and device.type == "cpu" else 0)


def parameter_bytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def bytes_read(model: Transformer) -> int:
    """Bytes of the weights that a decode step reads: all but the embedding, of which it reads a row a token. If the
    embedding is the output head too, it counts; on a rank, the part of it that is the rank's head.
    """
    n, embedding, config = parameter_bytes(model), parameter_bytes(model.tok_embeddings), model.config
    if not config.tied_embeddings:
        return n - embedding
    return n - embedding * (config.vocab_size - (config.vocab_rows or config.vocab_size)) // config.vocab_size


def activation_bytes(config: Config, shape: Shape, n_token: int) -> int:
    """Bytes that n_token tokens take on their way through a layer, estimated from above.

    The activations of the feed-forward and of attention are never needed together, but a CPU's allocator does not reuse
    the memory of one for the other.
    """
    size = shape.dtype.itemsize
    heads = (config.n_head + 2 * config.n_kv_head) * config.head_dim
    feed_forward = (2 * config.dim + 4 * config.ffn_dim) * size
    # q, k and v as they come and rotated; parts of the output in float32, and what merges them
    attention = (2 * config.dim + 2 * heads) * size + 6 * config.n_head * config.head_dim * 4
    per_token = feed_forward + attention if shape.device.type == "cpu" else 1.1 * max(feed_forward, attention)
    return round(n_token * per_token) + _sums_bytes(config, shape, n_token)


def _sums_bytes(config: Config, shape: Shape, n_token: int) -> int:
    """Bytes of shared memory for a long chunk's sums over GPUs (engine/chunk_sums.py). config: one rank's share."""
    if not config.vocab_rows or shape.device.type != "cuda":
        return 0
    n_rank = -(-config.vocab_size // config.vocab_rows)
    return n_byte(n_rank, n_token, config.dim, shape.dtype) if by_rows(n_token, config.dim, n_rank) else 0


def make_plan(
    config: Config, policy: KVCache, shape: Shape, chunk: int, weights: WeightSetting | None = None,
    sampling: Sampling | None = None,
) -> Plan:  # fmt: skip
    """The memory that a run will take. chunk: the most tokens of a prompt read at once; sampling None: greedy."""
    chosen = sampling or Sampling(temperature=0)
    logits = shape.batch * config.vocab_size * chosen.bytes_per_logit
    n_token = max(most_at_once([shape.capacity] * shape.batch, chunk), shape.batch)
    return Plan(
        weights=weight_bytes(config, shape.dtype, weights, shape.device),
        cache=kv_cache.plan(policy, config.n_layer, shape),
        full_cache=sum(kv_cache.plan(FullCache(), config.n_layer, shape).values()),
        activations=activation_bytes(config, shape, n_token) + logits,
        capacity=shape.capacity,
        batch=shape.batch,
        dense_weights=weight_bytes(config, shape.dtype),
        weight_setting=str(weights or 16),
    )


def choose_bits(
    config: Config, policy: KVCache, shape: Shape, chunk: int, budget: int, weights: WeightSetting | None = None,
    sampling: Sampling | None = None,
) -> KVCache:  # fmt: skip
    """The cache with the most bits whose plan fits. Raises UserError if the fewest do not."""
    tried = []
    for name, one in policy.by_quality():
        try:
            total = make_plan(config, one, shape, chunk, weights, sampling).total
        except ValueError as error:  # a head_dim that a plugin's format is not for
            tried.append(f"{name}: {error}")
            continue
        tried.append(f"{name} need {size(total)}")
        if total <= budget:
            say(f"--bits auto: {'; '.join(tried)}, and {size(budget)} are there")
            return one
    raise UserError(f"--bits auto: {'; '.join(tried)}, and {size(budget)} are there")


def require_suits(policy: KVCache, config: Config) -> None:
    """Raises UserError if the cache's formats do not suit this model's head_dim."""
    length = policy.n_exact + 1  # where the first token has left
    shape = Shape(1, config.n_kv_head, config.head_dim, length, torch.bfloat16, torch.device("meta"))
    try:
        kv_cache.plan(policy, 1, shape)
    except ValueError as error:
        raise UserError(f"{format_policy(policy)}: {error}") from None


def require_fit(
    config: Config, policy: KVCache, shape: Shape, chunk: int, available: int, weights: WeightSetting | None = None,
    sampling: Sampling | None = None,
) -> None:  # fmt: skip
    """Raises UserError, naming the largest context that fits, if the plan needs more than `available`."""
    plan = make_plan(config, policy, shape, chunk, weights, sampling)
    if plan.total <= available:
        return
    fits, too_many = 0, shape.capacity
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        total = make_plan(config, policy, replace(shape, capacity=middle), chunk, weights, sampling).total
        fits, too_many = (middle, too_many) if total <= available else (fits, middle)
    rest = f"the largest context that fits is {fits} tokens" if fits else "not even one token fits"
    raise UserError(
        f"this run needs {size(plan.total)} (weights {size(plan.weights)}, cache "
        f"{size(sum(plan.cache.values()))}) and {size(available)} are free: {rest}"
    )
