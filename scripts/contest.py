"""What a benchmark's contestants have in common: the clock, the fill, and the gate before it.

A contestant is one cache, filled to a context and ready to step. `Contestant` is one of ours; `peers.py` has others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernels
import kv_cache
from engine import Engine, Sampling
from kv_cache import KVCache, ModelCache, Shape
from model import Transformer
from options import format_policy
from tokenizer import UserError

GATE_TOKENS = 200
GATE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, of an output


def read_ceiling(device: torch.device) -> float:
    """Bytes per second of reading, by the largest of each row of a tensor far larger than any cache."""
    n = (1 << 32) if device.type == "cuda" else (1 << 28)
    data = torch.ones(n // 4, device=device).view(1 << 14, -1)
    return n / min(timed(lambda: data.amax(1), device) for _ in range(10))


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def fill(engine: Engine, context: int) -> None:
    """As if every sequence had read `context` tokens: random values in all that is held."""
    for layer in engine.cache.layers:
        regions = getattr(layer, "regions", None)  # a plugin's cache may have none
        if regions is None:
            raise UserError(f"{layer.name}: only caches with regions can be filled; --prefill reads a prompt instead")
        regions.k.normal_()
        regions.v.normal_()
        for _, ints, scales, form in regions.quantised():
            ints.random_(0, 128)
            scales.uniform_(0.005, 0.015) if form.bits == 8 else scales.uniform_(0.1, 0.2)
    engine.cache.lengths.fill_(context)


class Checked:
    """A layer's cache that also asks its reference, with the same q, k and v, and keeps the largest error.

    Layer by layer, because a model's layers amplify what rounding makes of the first one.
    """

    def __init__(self, policy: KVCache, shape: Shape) -> None:
        self.fast, self.reference = dataclasses.replace(policy), dataclasses.replace(policy)
        for layer in (self.fast, self.reference):
            layer.allocate(shape)
        self.reference.use_reference()
        self.error = 0.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Any, rope: Any) -> Tensor:
        want = self.reference.attend(q, k, v, step, rope).float()
        got = self.fast.attend(q, k, v, step, rope)
        error = ((got.float() - want).norm() / want.norm()).item()
        self.error = max(self.error, error if math.isfinite(error) else math.inf)
        return got


@torch.inference_mode()
def gate(model: Transformer, policy: KVCache, shape: Shape) -> float:
    """The largest relative error of any attention output against the reference, over a prompt read in two chunks
    and decoded on; raises UserError past what the dtype's rounding explains."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, GATE_TOKENS), generator=generator).to(shape.device)
    cache = ModelCache(policy, 0, shape)
    checked = [Checked(policy, shape) for _ in range(model.config.n_layer)]
    cache.layers = checked  # type: ignore[assignment]
    view = cache.slot(0)
    for part in tokens.split([GATE_TOKENS // 2, GATE_TOKENS // 4, *[1] * (GATE_TOKENS // 4)], 1):
        model(part, view, last_only=True)
    worst = max(layer.error for layer in checked)
    most = GATE_ERROR[shape.dtype]
    if not worst <= most:
        raise UserError(
            f"{format_policy(policy)}: attention is {worst:.2g} from its reference, and {most:g} is allowed"
        )
    return worst


class StoreClock:
    """The time that the calls which store a chunk's keys and values take, while this is entered."""

    NAMES = ("evict", "store_chunk")

    def __init__(self, device: torch.device) -> None:
        self.device, self.functions = device, kernels.for_device(device)
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.host = 0.0

    def __enter__(self) -> StoreClock:
        self.kept = {name: getattr(self.functions, name) for name in self.NAMES}
        for name, function in self.kept.items():
            setattr(self.functions, name, functools.partial(self.call, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(self.functions, name, function)

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


class Timed:
    """Decode steps of one cache, timed in rounds. cache_bytes: at the context; None where nobody can tell."""

    path = ""
    cache_bytes: int | None = None
    prefill_seconds = 0.0  # 0: no prompt was read
    store_seconds: float | None = None  # of those, storing keys and values

    def __init__(self, name: str, batch: int, context: int, device: torch.device) -> None:
        self.name, self.batch, self.context, self.device = name, batch, context, device
        self.seconds: list[float] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def advance(self) -> None:
        """One decode step of the whole batch."""
        raise NotImplementedError

    def rewind(self) -> None:
        """Back to the context, where that is possible."""

    @torch.inference_mode()
    def round(self, steps: int) -> None:
        """Time `steps` decode steps, after one that does not count."""
        self.advance()

        def run() -> None:
            for _ in range(steps):
                self.advance()

        self.seconds.append(timed(run, self.device) / steps)
        self.rewind()

    def result(self, model: Transformer, ceiling: float) -> dict[str, Any]:
        step = statistics.median(self.seconds)
        read = None if self.cache_bytes is None else weight_bytes(model) + self.cache_bytes
        return {
            "cache": self.name,
            "batch": self.batch,
            "context": self.context,
            "step_ms": step * 1e3,
            "step_ms_min": min(self.seconds) * 1e3,
            "step_ms_max": max(self.seconds) * 1e3,
            "tokens_per_s": self.batch / step,
            "cache_bytes": self.cache_bytes,
            "read_bytes_per_s": read and read / step,
            "share_of_ceiling": read and read / step / ceiling,
            "prefill_s": self.prefill_seconds,
            "store_s": self.store_seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
            "path": self.path,
        }


def weight_bytes(model: Transformer) -> int:
    """What a step reads of the weights: all, but of an embedding of its own only rows."""
    n = sum(p.nbytes for p in model.parameters())
    return n if model.config.tied_embeddings else n - model.tok_embeddings.weight.nbytes


class Contestant(Timed):
    """One of our caches with its engine."""

    def __init__(self, model: Transformer, policy: KVCache, shape: Shape, context: int, prefill: bool = False) -> None:
        super().__init__(format_policy(policy), shape.batch, context, shape.device)
        self.engine = Engine(model, ModelCache(policy, model.config.n_layer, shape), Sampling(temperature=0))
        if prefill:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(model.config.vocab_size, (context,), generator=generator).tolist()
            with StoreClock(self.device) as clock:
                self.prefill_seconds = timed(lambda: self.engine.read([ids] * shape.batch), self.device)
            self.store_seconds = clock.seconds()
        else:
            fill(self.engine, context)
        held = dataclasses.replace(shape, capacity=context, device=torch.device("meta"))
        self.cache_bytes = sum(kv_cache.plan(policy, model.config.n_layer, held).values())
        self.path = f"{self.engine.cache.layers[0].path}, {self.engine.step_path}"

    def advance(self) -> None:
        self.engine.step()

    def rewind(self) -> None:
        self.engine.cache.lengths.fill_(self.context)
