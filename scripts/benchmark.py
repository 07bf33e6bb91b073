"""How fast each cache decodes, and in how much memory: caches x batch x context, in one process.

  python scripts/benchmark.py                                              the bundled model, this machine
  python scripts/benchmark.py --random_weights --model llama-3.1-8b --batch 1 8 --context 256 8192 32768

A gate comes first: each cache's fast path must agree with its slow reference, or nothing is timed. The
caches are then filled to the context, and their decode steps timed in turn (A B C A B C ...), so that a
drift of the machine touches all alike. Reported per cache: the median step over the rounds and its
spread, tokens/s, cache bytes, the share of the measured read ceiling that weights + cache bytes come to,
and, over the contexts, the slope of a step's latency against the context.

Filling writes random values instead of reading a prompt: the time of a step does not depend on them.
`--prefill` reads a real (random) prompt of the context's length instead and reports how long that took.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin long while they wait take the processor from whoever else needs it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import kv_cache
from checkpoint import find_demo, load_model, open_checkpoint, parse_device, parse_dtype
from engine import Engine, Sampling
from kv_cache import KVCache, ModelCache, Shape
from model import Transformer
from options import Parser, format_policy, parse_policy, positive
from report import size
from tokenizer import UserError

DEFAULT_CACHES = [
    "full",
    "compress_kv:sink_size=16,window_size=32",
    "quantize_kv:sink_size=16,window_size=32",
]
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
        for tensor in getattr(layer, "regions", ()):
            if isinstance(tensor, torch.Tensor):
                if tensor.dtype in (torch.int8, torch.uint8):
                    tensor.random_(0, 128)
                elif tensor.dtype == torch.float16 and tensor.dim() == 5:  # scales and bases
                    tensor.uniform_(0.1, 0.2)
                elif tensor.dim() == 3:  # scales
                    tensor.uniform_(0.005, 0.015)
                else:
                    tensor.normal_()
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


class Contestant:
    """One cache with its engine, filled, ready to step."""

    def __init__(self, model: Transformer, policy: KVCache, shape: Shape, context: int, prefill: bool) -> None:
        self.name = format_policy(policy)
        self.policy = policy
        self.device = shape.device
        self.prefill_seconds = 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cache = ModelCache(policy, model.config.n_layer, shape)
        self.engine = Engine(model, cache, Sampling(temperature=0))
        if prefill:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(model.config.vocab_size, (context,), generator=generator).tolist()
            self.prefill_seconds = timed(lambda: self.engine.read([ids] * shape.batch), self.device)
        else:
            fill(self.engine, context)
        self.context = context
        self.seconds: list[float] = []

    @torch.inference_mode()
    def round(self, steps: int) -> None:
        """Time `steps` decode steps, then put the clock of the cache back."""
        self.engine.step()

        def run() -> None:
            for _ in range(steps):
                self.engine.step()

        self.seconds.append(timed(run, self.device) / steps)
        self.engine.cache.lengths.fill_(self.context)

    def result(self, model: Transformer, ceiling: float) -> dict[str, Any]:
        shape = self.engine.cache.shape
        step = statistics.median(self.seconds)
        weights = sum(p.nbytes for p in model.parameters())
        if not model.config.tied_embeddings:
            weights -= model.tok_embeddings.weight.nbytes
        held = Shape(shape.batch, shape.n_kv_head, shape.head_dim, self.context, shape.dtype, torch.device("meta"))
        cache_bytes = sum(kv_cache.plan(self.policy, model.config.n_layer, held).values())
        return {
            "cache": self.name,
            "batch": shape.batch,
            "context": self.context,
            "step_ms": step * 1e3,
            "step_ms_min": min(self.seconds) * 1e3,
            "step_ms_max": max(self.seconds) * 1e3,
            "tokens_per_s": shape.batch / step,
            "cache_bytes": cache_bytes,
            "read_bytes_per_s": (weights + cache_bytes) / step,
            "share_of_ceiling": (weights + cache_bytes) / step / ceiling,
            "prefill_s": self.prefill_seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
            "path": f"{self.engine.cache.layers[0].path}, {self.engine.step_path}",
        }


def slope(rows: list[dict[str, Any]]) -> float:
    """Least-squares microseconds of a step per 1,000 tokens of context."""
    xs, ys = [r["context"] / 1e3 for r in rows], [r["step_ms"] * 1e3 for r in rows]
    return statistics.linear_regression(xs, ys).slope if len(set(xs)) > 1 else float("nan")


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'batch':>5} {'context':>8} {'cache':<44} {'step ms':>9} {'min-max':>15} {'tok/s':>8} "
          f"{'vs first':>8} {'cache':>11} {'ceiling':>8}")  # fmt: skip
    first: dict[tuple[int, int], float] = {}
    for r in rows:
        base = first.setdefault((r["batch"], r["context"]), r["step_ms"])
        spread = f"{r['step_ms_min']:.2f}-{r['step_ms_max']:.2f}"
        print(f"{r['batch']:>5} {r['context']:>8} {r['cache']:<44} {r['step_ms']:>9.3f} {spread:>15} "
              f"{r['tokens_per_s']:>8.1f} {base / r['step_ms']:>7.3f}x {size(r['cache_bytes']):>11} "
              f"{r['share_of_ceiling']:>8.1%}")  # fmt: skip


def make_parser() -> Parser:
    p = Parser("benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint_path", type=Path)
    p.add_argument("--model", metavar="NAME")
    p.add_argument("--random_weights", action="store_true")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument("--caches", nargs="+", default=DEFAULT_CACHES, metavar="CACHE", help="the first is the base")
    p.add_argument("--batch", nargs="+", type=positive, default=[1])
    p.add_argument("--context", nargs="+", type=positive, default=[256, 2048, 8000])
    p.add_argument("--steps", type=positive, default=16, help="decode steps timed at a time (default: 16)")
    p.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    p.add_argument("--prefill", action="store_true", help="read a prompt instead of filling with random values")
    p.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line with everything")
    return p


def run(args: argparse.Namespace, argv: list[str]) -> None:
    device = parse_device(args.device)
    if args.random_weights and args.model is None:
        raise UserError("--random_weights needs --model NAME")
    where = None if args.random_weights else args.checkpoint_path or find_demo()
    checkpoint = open_checkpoint(where, args.model)
    dtype = parse_dtype(args.dtype, checkpoint, device)
    policies = [parse_policy(text) for text in args.caches]
    config = checkpoint.config
    model = load_model(checkpoint, device, dtype, random_weights=args.random_weights)
    for policy in policies:
        shape = Shape(1, config.n_kv_head, config.head_dim, GATE_TOKENS, dtype, device)
        worst = gate(model, policy, shape)
        print(f"gate: {format_policy(policy)} within {worst:.2g} of its reference", file=sys.stderr)
    ceiling = read_ceiling(device)
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        for context in args.context:
            shape = Shape(batch, config.n_kv_head, config.head_dim, context + args.steps + 2, dtype, device)
            contestants = [Contestant(model, p, shape, context, args.prefill) for p in policies]
            for _ in range(args.rounds):
                for contestant in contestants:
                    contestant.round(args.steps)
            rows += [c.result(model, ceiling) for c in contestants]
            del contestants
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(f"{checkpoint.name}, {str(dtype).removeprefix('torch.')}; read ceiling {ceiling / 1e9:.0f} GB/s")
    print_table(rows)
    slopes = {}
    for batch in args.batch if len(args.context) > 1 else ():
        for name in dict.fromkeys(r["cache"] for r in rows):
            slopes[f"{name} batch {batch}"] = slope([r for r in rows if r["cache"] == name and r["batch"] == batch])
            print(f"batch {batch}, {name}: {slopes[f'{name} batch {batch}']:.2f} us per 1,000 tokens of context")
    if args.json:
        record = {
            "model": checkpoint.name,
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "torch": torch.__version__,
            "read_ceiling_bytes_per_s": ceiling,
            "rows": rows,
            "slope_us_per_1000_tokens": slopes,
            "command": ["scripts/benchmark.py", *argv],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a") as out:
            out.write(json.dumps(record) + "\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(make_parser().parse(argv), argv)
    except UserError as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
