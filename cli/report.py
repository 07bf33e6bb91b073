"""What a run will take, before it starts, and what it took, after it.

The plan's cache bytes come from allocating the cache on the meta device, so they are what will really
be allocated; the weights' from the model's tensors there. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import kv_cache
from checkpoint.quantised import skeleton
from cli.limits import limited_memory
from cli.provenance import device_name
from common.errors import UserError
from common.messages import say
from engine import Engine, Sampling, Timing
from kv_cache import format_policy
from model import Config, Transformer
from quantize import WeightSetting
from selective_kv import FullCache, KVCache, Shape


def size(n: float) -> str:
    """Bytes for people: '1.50 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


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


def process_age() -> float:
    """Seconds since this process began; where the system does not say, since this module was imported."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            started = int(stat.read().rpartition(")")[2].split()[19])  # field 22 of proc(5), clock ticks after boot
            return float(uptime.read().split()[0]) - started / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()


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
        """For people. n_rank: how many ranks there are, of which this is one's."""
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


def weight_bytes(config: Config, dtype: torch.dtype, weights: WeightSetting | None = None) -> int:
    return parameter_bytes(skeleton(config, weights, dtype))


def parameter_bytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def bytes_read(model: Transformer) -> int:
    """What a decode step reads of the weights: all, but of an embedding only rows, unless it is the head's too. A
    rank's head is a part of it.
    """
    n, embedding, config = parameter_bytes(model), parameter_bytes(model.tok_embeddings), model.config
    if not config.tied_embeddings:
        return n - embedding
    return n - embedding * (config.vocab_size - (config.vocab_rows or config.vocab_size)) // config.vocab_size


def activation_bytes(config: Config, shape: Shape, n_token: int) -> int:
    """What n_token tokens take on their way through a layer, estimated from above.

    The feed-forward's part and attention's are never there together; but a CPU's allocator does not give
    the one's memory to the other.
    """
    size = shape.dtype.itemsize
    heads = (config.n_head + 2 * config.n_kv_head) * config.head_dim
    feed_forward = (2 * config.dim + 4 * config.ffn_dim) * size
    # q, k and v as they come and rotated; parts of the output in float32, and what merges them
    attention = (2 * config.dim + 2 * heads) * size + 6 * config.n_head * config.head_dim * 4
    per_token = feed_forward + attention if shape.device.type == "cpu" else 1.1 * max(feed_forward, attention)
    return round(n_token * per_token)


def make_plan(
    config: Config, policy: KVCache, shape: Shape, chunk: int, weights: WeightSetting | None = None,
    sampling: Sampling | None = None,
) -> Plan:  # fmt: skip
    """chunk: the most prompt tokens read at once. sampling: None: greedy."""
    chosen = sampling or Sampling(temperature=0)
    logits = shape.batch * config.vocab_size * chosen.bytes_per_logit
    return Plan(
        weights=weight_bytes(config, shape.dtype, weights),
        cache=kv_cache.plan(policy, config.n_layer, shape),
        full_cache=sum(kv_cache.plan(FullCache(), config.n_layer, shape).values()),
        activations=activation_bytes(config, shape, max(min(chunk, shape.capacity), shape.batch)) + logits,
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
    """Raises UserError if the cache cannot hold this model's vectors: 4 bits of a head_dim that they are not for."""
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


def peak_memory(device: torch.device) -> int:
    """The most bytes taken so far: of the device by tensors, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make_report(engine: Engine, name: str, timing: Timing, weight_setting: str = "16") -> dict[str, Any]:
    """What a run took, for JSON. name: the model's; timing: of the run, or of all turns of a conversation.

    Bandwidth counts what a decode step must read: every weight (of the embedding, the rows used) and the
    cache's bytes at the mean length of the run, not its capacity.
    """
    model, cache = engine.model, engine.cache
    lengths = cache.lengths.tolist()
    policy, shape = cache.policy, cache.shape
    weights = bytes_read(model)
    n_layer = model.config.n_layer

    def held(p: KVCache, n: float) -> int:
        at = replace(shape, batch=1, capacity=max(1, int(n)))
        return sum(kv_cache.plan(p, n_layer, at).values())

    n_step = (timing.n_written - timing.n_first) / shape.batch
    read_cache = sum(held(policy, length - n_step / 2) for length in lengths)
    seconds_per_step = timing.decode_seconds / n_step if n_step >= 1 else 0.0
    return {
        "model": name,
        "cache": {"name": policy.name, **asdict(policy)},
        "setting": format_policy(policy),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": device_name(shape.device),
        "path": f"{cache.layers[0].path}, {engine.step_path}",
        "torch": torch.__version__,
        "batch": shape.batch,
        "tokens_read": timing.n_read,
        "tokens_written": timing.n_written,
        "time_to_first_token_s": timing.first_token_seconds,
        "prefill_s": timing.prefill_seconds,
        "decode_s": timing.decode_seconds,
        "decode_tokens_per_s": timing.decode_tokens_per_second,
        "cache_bytes": cache.nbytes(),
        "full_cache_bytes": sum(kv_cache.plan(FullCache(), n_layer, shape).values()),
        "cache_bytes_held": sum(held(policy, n) for n in lengths),
        "full_cache_bytes_held": sum(held(FullCache(), n) for n in lengths),
        "weights": weight_setting,
        "weight_bytes": parameter_bytes(model),
        "peak_memory_bytes": peak_memory(shape.device),
        "bandwidth_bytes_per_s": (weights + read_cache) / seconds_per_step if seconds_per_step else 0.0,
    }


def rank_lines(parts: list[dict[str, Any]]) -> list[str]:
    """Of several ranks, for people: each one's bytes and their sum. A rank that could not be asked has no numbers."""

    def column(key: str) -> str:
        found = [part.get(key) for part in parts]
        each = ", ".join("?" if n is None else size(n) for n in found)
        return each + f" = {size(sum(n or 0 for n in found))}"

    words = (("peak memory", "peak_memory_bytes"), ("weights", "weight_bytes"), ("cache", "cache_bytes"))
    return [f"{len(parts)} ranks; the figures above are rank 0's"] + [f"  {word} {column(key)}" for word, key in words]


def startup(age: float, loading: float, timing: Timing) -> dict[str, float]:
    """What a report says of the way to the first token. age: of the process when the prompt's reading began;
    loading: seconds of it that went into the weights."""
    return {"load_weights_s": loading, "start_to_first_token_s": age + timing.first_token_seconds}


def report_lines(r: dict[str, Any]) -> list[str]:
    """The report for people."""
    name, _, knobs = r["setting"].partition(":")  # the rare knobs only where they are set
    cache, full = sum(r["cache_bytes"].values()), r["full_cache_bytes"]
    regions = ", ".join(f"{name} {size(n)}" for name, n in r["cache_bytes"].items())
    allocated = f"{size(cache)} allocated ({regions}); the full cache: {size(full)} ({cache / full:.1%})"
    held = f"{size(r['cache_bytes_held'])} held at the end; the full cache: {size(r['full_cache_bytes_held'])}"
    first = f"time to first token {r['time_to_first_token_s']:.3f} s, {r['tokens_read']} tokens read; "
    first += f"{r['start_to_first_token_s']:.2f} s after the program began, {r['load_weights_s']:.2f} loading weights"
    weights = "" if r["weights"] == "16" else f", weights {r['weights']}"
    where = "device" if r["device"] != "cpu" else "process"
    return [
        f"{r['model']}, {r['dtype']} on {r['device']}{weights}; cache {name}"
        + (f" ({knobs.replace('=', ' ').replace(',', ', ')})" if knobs else "")
        + f"; {r['path']}",
        first if r["tokens_written"] else f"no token written, {r['tokens_read']} tokens read",
        f"decode {r['decode_tokens_per_s']:.2f} tokens/s, {r['tokens_written']} tokens written",
        *_saving_lines(r),
        *([f"cache {allocated}", f"cache {held}"] if r["cache_bytes"] else ["cache bytes: this cache does not say"]),
        f"peak memory {size(r['peak_memory_bytes'])} ({where}), weights {size(r['weight_bytes'])} of it; "
        f"bandwidth {r['bandwidth_bytes_per_s'] / 1e9:.2f} GB/s, weights and cache",
        *(rank_lines(r["ranks"]) if "ranks" in r else []),
    ]


def _saving_lines(r: dict[str, Any]) -> list[str]:
    """What a run had from a saved cache, and what it saved."""
    lines = []
    if "load_cache" in r:
        loaded = r["load_cache"]
        lines.append(f"loaded {sum(loaded['tokens'])} tokens from {loaded['file']} in {loaded['seconds']:.2f} s")
    if "save_cache" in r:
        saved = r["save_cache"]
        lines.append(f"saved {size(saved['bytes'])} to {saved['file']} in {saved['seconds']:.2f} s")
    return lines
