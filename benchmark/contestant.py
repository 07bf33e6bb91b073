"""What a benchmark's contestants have in common: the clock and the fill.

A contestant is one cache, filled to a context and ready to step. `Contestant` is one of ours; `peers.py` has others.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

import kv_cache
from benchmark.clock import timed
from checkpoint import Share
from cli.plan import bytes_read, parameter_bytes
from common.errors import UserError
from engine import PREFILL_CHUNK, Engine, Sampling
from engine.parallel import Parallel
from engine.saved import SavedCache
from kv_cache import ModelCache, format_policy
from model import Transformer
from selective_kv import KVCache, Shape
from selective_kv.formats import TILE
from selective_kv.kernels import AttentionKernels, attention_kernels

WARM_TOKENS = PREFILL_CHUNK + 64  # of a prompt, read before it is timed: a chunk, and a second one that looks back
FILL_TOKENS = 1024  # that a cache without regions takes in at a time, as a prompt's chunks


def fill(engine: Engine, context: int) -> None:
    """Fill the cache with random values, as if every sequence had read `context` tokens. Raises UserError."""
    shape = engine.cache.shape
    for layer in engine.cache.layers:
        if layer.fill_randomly():
            continue
        try:  # a user's own cache: only its `update` knows what it keeps
            for row in range(shape.batch):
                for start in range(0, context, FILL_TOKENS):
                    size = (shape.n_kv_head, min(FILL_TOKENS, context - start), shape.head_dim)
                    k, v = (torch.randn(size, dtype=shape.dtype, device=shape.device) for _ in "kv")
                    layer.update(row, k, v, start)
        except NotImplementedError:
            raise UserError(f"{layer.name}: it has no update to fill it through: give --prefill") from None
    engine.cache.lengths.fill_(context)


class StoreClock:
    """The time that the calls which store a chunk's keys and values take, while this is entered."""

    def __init__(self, cache: ModelCache) -> None:
        self.cache, self.device = cache, cache.shape.device
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.host = 0.0

    def timed_kernels(self, kernels: AttentionKernels) -> AttentionKernels:
        evict, store_chunk = (functools.partial(self.call, f) for f in (kernels.evict, kernels.store_chunk))
        return dataclasses.replace(kernels, evict=evict, store_chunk=store_chunk)

    def __enter__(self) -> StoreClock:
        for layer in self.cache.layers:
            layer.wrap_kernels(self.timed_kernels)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.cache.layers:
            layer.wrap_kernels(lambda _: attention_kernels(self.device))

    def call(self, function: Callable[..., None], *args: Any) -> None:
        if self.device.type == "cuda":  # read later: a look at the clock must not stop the queue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function(*args)
            end.record()
            self.events.append((begin, end))
        else:
            self.host += timed(lambda: function(*args), self.device)

    def seconds(self) -> float:
        return self.host + sum(begin.elapsed_time(end) for begin, end in self.events) / 1e3


class Peak:
    """The most device memory that one contestant takes, beside the weights and what others hold. Bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.held, self.most = device, 0, 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """All that is allocated and freed in here is this contestant's."""
        if self.device.type != "cuda":
            yield
            return
        others = torch.cuda.memory_allocated(self.device) - self.held
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self.most = max(self.most, torch.cuda.max_memory_allocated(self.device) - others)
        self.held = torch.cuda.memory_allocated(self.device) - others


class Timed:
    """Decode steps of one cache, timed in rounds. cache_bytes: at the context; None where nobody can tell."""

    path = ""
    cache_bytes: int | None = None
    bits: dict[str, float] | None = None  # an element of what is quantised, as kv_cache.bits_per_element has them
    prefill_seconds = 0.0  # 0: no prompt was read
    store_seconds: float | None = None  # of those, storing keys and values
    each_seconds: list[float] | None = None  # of steps one by one

    def __init__(self, name: str, batch: int, context: int, device: torch.device) -> None:
        self.name, self.batch, self.context, self.device = name, batch, context, device
        self.seconds: list[float] = []
        self.peak = Peak(device)

    def advance(self) -> None:
        """One decode step of the whole batch."""
        raise NotImplementedError

    def rewind(self) -> None:
        """Back to the context, where that is possible."""

    @torch.inference_mode()
    def round(self, steps: int) -> None:
        """Time `steps` decode steps, after one that does not count."""

        def run() -> None:
            for _ in range(steps):
                self.advance()

        with self.peak.watch():
            self.advance()
            self.seconds.append(timed(run, self.device) / steps)
            self.rewind()

    def spread(self) -> None:
        """Set the sequences of a batch apart, where that is possible, so that they close their tiles in turn."""

    @torch.inference_mode()
    def one_by_one(self, steps: int) -> None:
        """Time every one of `steps` consecutive decode steps by itself, after one that does not count."""
        self.spread()
        self.advance()
        if self.device.type == "cuda":  # read later: a look at the clock must not stop the queue
            events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
            events[0].record()
            for event in events[1:]:
                self.advance()
                event.record()
            events[-1].synchronize()
            self.each_seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
        else:
            self.each_seconds = [timed(self.advance, self.device) for _ in range(steps)]
        self.rewind()

    def result(self, model: Transformer, ceiling: float) -> dict[str, Any]:
        step = statistics.median(self.seconds)
        read = None if self.cache_bytes is None else bytes_read(model) + self.cache_bytes
        return {
            "cache": self.name,
            "batch": self.batch,
            "context": self.context,
            "step_ms": step * 1e3,
            "step_ms_min": min(self.seconds) * 1e3,
            "step_ms_max": max(self.seconds) * 1e3,
            "tokens_per_s": self.batch / step,
            "cache_bytes": self.cache_bytes,
            "bits_per_element": self.bits,
            "read_bytes_per_s": read and read / step,
            "share_of_ceiling": read and read / step / ceiling,
            "prefill_s": self.prefill_seconds,
            "store_s": self.store_seconds,
            "each_step": self.each_seconds and spread_of(self.each_seconds),
            "peak_memory_bytes": self.peak.most and parameter_bytes(model) + self.peak.most,
            "path": self.path,
        }


def spread_of(seconds: list[float]) -> dict[str, float]:
    """Steps one by one: their number, the median, and mean and longest over it."""
    median = statistics.median(seconds)
    return {
        "steps": len(seconds),
        "median_ms": median * 1e3,
        "mean_over_median": statistics.fmean(seconds) / median,
        "longest_over_median": max(seconds) / median,
    }


class Contestant(Timed):
    """One of our caches with its engine."""

    def __init__(
        self, model: Transformer, policy: KVCache, shape: Shape, context: int, prefill: bool = False,
        saved: SavedCache | None = None, ranks: Parallel | None = None, share: Share | None = None,
    ) -> None:  # fmt: skip
        """Filled to `context` with a prompt (prefill), with what `saved` holds, or with random values. share: of the
        model, where it is one rank's."""
        super().__init__(format_policy(policy), shape.batch, context, shape.device)
        self.ranks = ranks
        with self.peak.watch():
            cache = ModelCache(policy, model.config.n_layer, shape)
            self.engine = Engine(model, cache, Sampling(temperature=0), ranks=ranks)
            if prefill:
                self.read(model.config.vocab_size)
            elif saved is not None:
                saved.load(self.engine, [context] * shape.batch, share)
            else:
                fill(self.engine, context)
        held = dataclasses.replace(shape, capacity=context, device=torch.device("meta"))
        self.cache_bytes = sum(kv_cache.plan(policy, model.config.n_layer, held).values()) or None
        self.bits = kv_cache.bits_per_element(policy, shape.head_dim)
        self.path = f"{self.engine.cache.layers[0].path}, {self.engine.step_path}"

    def read(self, vocab_size: int) -> None:
        """Random prompts, timed; a part of them once before, because the first call of a kernel compiles it."""
        generator = torch.Generator().manual_seed(0)  # a prompt a sequence: the same one would be read once
        ids = torch.randint(vocab_size, (self.batch, self.context), generator=generator).tolist()
        self.engine.read([prompt[:WARM_TOKENS] for prompt in ids])
        self.engine.reset()
        with StoreClock(self.engine.cache) as clock:
            self.prefill_seconds = timed(lambda: self.engine.read(ids), self.device)
        self.store_seconds = clock.seconds()

    def result(self, model: Transformer, ceiling: float) -> dict[str, Any]:
        row = super().result(model, ceiling)
        if self.ranks is not None:
            row["peak_memory_bytes"] = self.peak.most and row["peak_memory_bytes"] + self.ranks.nbytes
            row["rank_peak_memory_bytes"] = self.ranks.from_all(row["peak_memory_bytes"])
        return row

    def advance(self) -> None:
        self.engine.step()

    def spread(self) -> None:
        apart = torch.arange(self.batch, device=self.device) * TILE // self.batch
        self.engine.cache.lengths.sub_(apart).clamp_(min=1)

    def rewind(self) -> None:
        if all(layer.storage() is not None for layer in self.engine.cache.layers):
            self.engine.cache.lengths.fill_(self.context)
        else:  # it has kept what was stepped, and nobody else can take that out again
            self.engine.cache.reset()
            fill(self.engine, self.context)
