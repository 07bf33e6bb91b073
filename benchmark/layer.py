"""One layer's decode attention on a CPU: append a token and attend, each cache beside SDPA.

  python scripts/bench_attention.py --context 2048 16384

A gate first: `quantize_kv` must agree with attention over its own dequantised values. Then medians of
interleaved rounds, in milliseconds. (`bench_kernels.py` is the same question on a GPU.)
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Before torch loads OpenMP: threads that spin long while they wait take the processor from whoever else needs it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
import torch.nn.functional as F
from torch import Tensor

from cli.options import Parser, positive
from common.errors import UserError
from common.files import to_json
from common.program import program
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache
from selective_kv.formats import TILE
from selective_kv.kernels import pytorch as eager
from selective_kv.regions import Regions

CPU = torch.device("cpu")


def filled(policy: KVCache, shape: Shape) -> Regions:
    """A cache's memory with random values of a real cache's sizes."""
    policy.allocate(shape)
    policy.fill_randomly()
    return policy.regions  # type: ignore[attr-defined]


def gate(q: Tensor, regions: Regions, position: Tensor) -> None:
    """Raises UserError unless attention over the quantised cache is that over its dequantised values."""
    stored = list(regions.stored())
    if not stored:  # too short for a tile: all of it is in full precision, and PyTorch's own attention reads it
        return
    got = eager.decode_attention(q, regions, position)
    n_token = int(position[0]) + 1
    n_tile = regions.n_left(n_token) // TILE
    keys, values = (
        torch.cat(
            [part.slots[:, :, where].float() for where in regions.exact_slots(n_token)]
            + [part.format.dequantize(part.tiles.part(slice(0, n_tile))).flatten(2, 3)],
            2,
        )
        for part in stored
    )  # a softmax does not mind the order
    tile = q.float().unflatten(1, (regions.k.shape[1], -1))
    want = F.scaled_dot_product_attention(tile, keys, values).flatten(1, 2)
    error = ((got.float() - want).norm() / want.norm()).item()
    if not error < 1e-2:
        raise UserError(f"attention is {error:.2g} from its reference: no timing")


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) * 1e3 for name, s in seconds.items()}


def measure(shape: Shape, group: int, rounds: int) -> dict[str, float]:
    """The median of every contestant, milliseconds. group: query heads per KV head."""
    context, dtype = shape.capacity, shape.dtype
    policies: dict[str, KVCache] = {
        "full": FullCache(),
        "quantize_kv": SelectiveCache(16, 32),
        "K4V4": SelectiveCache(16, 32, 4, 4),
        "compress_kv": SinkWindowCache(16, 32),
    }
    regions = {name: filled(policy, shape) for name, policy in policies.items()}
    q = torch.randn(1, shape.n_kv_head * group, shape.head_dim).to(dtype)
    new = torch.randn(1, shape.n_kv_head, shape.head_dim).to(dtype)
    position = torch.tensor([context - 1])
    for name in ("quantize_kv", "K4V4"):
        gate(q, regions[name], position)

    def step(r: Regions) -> Callable[[], object]:
        def run() -> Tensor:
            eager.append(r, new, new, position)
            return eager.decode_attention(q, r, position)

        return run

    full = regions["full"]
    tile = q.unflatten(1, (shape.n_kv_head, -1))
    return medians(
        {
            **{name: step(r) for name, r in regions.items()},
            "SDPA, packed group": lambda: F.scaled_dot_product_attention(tile, full.k, full.v),
            "SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(q[:, :, None], full.k, full.v, enable_gqa=True),
        },
        rounds,
    )


def run(contexts: Sequence[int], n_kv_head: int, group: int, head_dim: int, rounds: int) -> list[dict[str, Any]]:
    """Measure and print every context in both dtypes. Raises UserError."""
    if min(contexts) <= 48:
        raise UserError("--context must be past sink and window, 48 tokens, for anything to be quantised")
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for context in contexts:
            name = str(dtype).removeprefix("torch.")
            ms = measure(Shape(1, n_kv_head, head_dim, context, dtype, CPU), group, rounds)
            rows.append({"dtype": name, "context": context, "ms": ms})
            print(f"{name:<9}{context:>7}  " + "  ".join(f"{n} {t:.2f}" for n, t in ms.items()))
    return rows


def main(argv: list[str] | None = None) -> None:
    p = Parser("bench_attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--context", nargs="+", type=positive, default=[2048, 16384])
    p.add_argument("--n_kv_head", type=positive, default=8)
    p.add_argument("--group", type=positive, default=4, help="query heads per KV head (default: 4)")
    p.add_argument("--head_dim", type=positive, default=128)
    p.add_argument("--rounds", type=positive, default=15)
    argv = sys.argv[1:] if argv is None else argv
    with program("bench_attention.py"):
        args = p.parse(argv)
        rows = run(args.context, args.n_kv_head, args.group, args.head_dim, args.rounds)
        print(to_json({"rows": rows, "torch": torch.__version__, "command": ["scripts/bench_attention.py", *argv]}))
