"""`--first_token`: prompts read whole, each cache in turn, from nothing to the choice of the first token."""

from __future__ import annotations

import copy
import dataclasses
import gc
import statistics
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmark.clock import timed
from benchmark.contestant import Peak, StoreClock
from benchmark.gate import GATE_ERROR, distance, shallow
from benchmark.memory import Model
from cli.plan import parameter_bytes
from common.errors import UserError
from common.messages import say, size
from common.tables import table
from engine import Engine, Sampling
from engine.packing import PromptPart
from engine.parallel import Parallel
from kv_cache import ModelCache, format_policy
from model import Transformer
from selective_kv import Chunk, KVCache, Shape

WARM_LAYERS = 2  # of the model that reads the prompt once before: all kernels and plans of the real one, in little time
GATE_CHUNKS = (1500, 700)  # tokens: enough for every kernel that a GPU has for a chunk
GATE_8BIT = 3e-2  # what attention in 8 bits to history in 4 may be off by (a fourth of what 4 bits are: LOG.md)


def gate_parts(shape: Shape) -> tuple[Shape, list[PromptPart]]:
    """The shape of the gate's cache, and the chunks that it reads."""
    first, second = GATE_CHUNKS
    at = dataclasses.replace(shape, batch=1, capacity=first + second)
    return at, [PromptPart(0, 0, first), PromptPart(0, first, second)]


@torch.inference_mode()
def gate(model: Transformer, policy: KVCache, shape: Shape) -> float:
    """The largest relative error of a layer's attention in a prompt's second chunk, beside the reference; UserError
    past what rounding explains. Values share a direction, as a model's do."""
    at, parts = gate_parts(shape)
    config, n_token = model.config, at.capacity
    layers = [dataclasses.replace(policy) for _ in range(2)]
    for layer in layers:
        layer.allocate(at)
    layers[1].use_reference()
    generator = torch.Generator(shape.device).manual_seed(0)

    def random(n_head: int) -> Tensor:
        size = (1, n_token, n_head, config.head_dim)
        return torch.randn(size, generator=generator, device=shape.device).to(shape.dtype).transpose(1, 2)

    q, k, v = random(config.n_head), random(config.n_kv_head), random(config.n_kv_head)
    v = v + v[:, :, :1]
    positions = torch.arange(n_token, device=shape.device)[None]
    worst = 0.0
    for _, start, n in parts:
        part = slice(start, start + n)
        chunk = Chunk(positions[:, part], start=start)
        got, want = (
            layer.attend(q[:, :, part], k[:, :, part], v[:, :, part], chunk, model.rope(chunk.positions))
            for layer in layers
        )
        worst = max(worst, distance(got, want))
    most = GATE_ERROR[shape.dtype] if shape.dtype == torch.float32 else GATE_8BIT
    if not worst <= most:
        raise UserError(f"{format_policy(policy)}: a prompt is {worst:.2g} from its reference, and {most:g} is allowed")
    return worst


def warm(engine: Engine, prompts: list[list[int]]) -> None:
    """Read the prompts by a few of the model's layers, so that nothing is compiled or planned later."""
    model, cache = shallow(engine.model, WARM_LAYERS), copy.copy(engine.cache)
    cache.layers = cache.layers[: model.config.n_layer]
    Engine(model, cache, engine.sampling, capture=False, ranks=engine.ranks).read(prompts)
    engine.reset()


def read(
    model: Transformer, policy: KVCache, shape: Shape, prompts: list[list[int]], warmed: bool, ranks: Parallel | None
) -> dict[str, Any]:
    """One reading by a cache of its own: seconds, those of storing, and the most memory."""
    peak = Peak(shape.device)
    with peak.watch():
        cache = ModelCache(policy, model.config.n_layer, shape)
        engine = Engine(model, cache, Sampling(temperature=0), capture=False, ranks=ranks)
        if not warmed:
            warm(engine, prompts)
        engine.synchronize()
        with StoreClock(cache) as clock:
            seconds = timed(lambda: engine.read(prompts), shape.device)
    others = parameter_bytes(model) + (0 if ranks is None else ranks.nbytes)
    return {"seconds": seconds, "store": clock.seconds(), "peak": peak.most and others + peak.most}


def compare(
    models: list[Model], policies: list[KVCache], shapes: list[tuple[int, int]], rounds: int, shape: Shape,
    ranks: Parallel | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every cache, weight setting, and batch and context of `shapes`: seconds to the first token, the rounds'
    median."""
    rows = []
    for batch, context in shapes:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(models[0].transformer.config.vocab_size, (batch, context), generator=generator).tolist()
        at = dataclasses.replace(shape, batch=batch, capacity=context + 1)
        contestants = list(product(models, policies))
        found: list[list[dict[str, Any]]] = [[] for _ in contestants]
        for turn in range(rounds):
            for (made, policy), readings in zip(contestants, found, strict=True):
                readings.append(read(made.transformer, policy, at, prompts, turn > 0, ranks))
                say(f"{format_policy(policy)}, {batch} x {context} tokens: {readings[-1]['seconds']:.3f} s")
                gc.collect()
                if shape.device.type == "cuda":
                    torch.cuda.empty_cache()
        for (made, policy), readings in zip(contestants, found, strict=True):
            seconds = sorted(reading["seconds"] for reading in readings)
            median = statistics.median(seconds)
            rows.append({
                "cache": format_policy(policy), "weights": made.weights, "batch": batch, "context": context,
                "first_token_s": median, "first_token_s_min": seconds[0], "first_token_s_max": seconds[-1],
                "prompt_tokens_per_s": batch * context / median,
                "store_s": statistics.median(reading["store"] for reading in readings),
                "peak_memory_bytes": max(reading["peak"] for reading in readings),
            })  # fmt: skip
            if ranks is not None:
                rows[-1]["rank_peak_memory_bytes"] = ranks.from_all(rows[-1]["peak_memory_bytes"])
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    header = ["cache", "weights", "batch", "context", "first token, s", "min-max", "tokens/s", "vs first"]
    header += ["of it storing", "peak"]
    cells = []
    for r in rows:
        base = next(b for b in rows if (b["batch"], b["context"]) == (r["batch"], r["context"]))
        cells.append([
            r["cache"], r["weights"], str(r["batch"]), str(r["context"]), f"{r['first_token_s']:.3f}",
            f"{r['first_token_s_min']:.3f}-{r['first_token_s_max']:.3f}", f"{r['prompt_tokens_per_s']:.0f}",
            f"{r['first_token_s'] / base['first_token_s']:.3f}", f"{r['store_s'] / r['first_token_s']:.2%}",
            size(r["peak_memory_bytes"]) if r["peak_memory_bytes"] else "",
        ])  # fmt: skip
    print(table(header, cells))
