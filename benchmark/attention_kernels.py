"""Decode attention alone: our kernels beside PyTorch's, at given batch sizes and contexts.

    python scripts/bench_kernels.py --shapes 1x8192 8x32768
    python scripts/bench_kernels.py --n_head 8 24 56 --head_dim 64 128 --shapes 12x30000 --formats K4V4 --no_sdpa

One layer of Llama-3.1-8B by default; of several numbers of heads or dims, every combination. Every version is first
compared with attention in float64 over the same (dequantised) values, on fresh random data and poisoned outputs; no
speed is printed if that fails. Then each is captured in a CUDA graph that walks over copies of the cache larger than
the L2, and the graphs are replayed in turn, so that a change of clocks hits all of them alike. GB/s counts the payload
and scales that must be read; the share is of the read rate measured in the same run (`clock.read_ceiling`).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmark.clock import read_ceiling
from cli.options import Parser, parse_shape, positive
from common.errors import UserError
from common.files import require_writable, to_json, write_whole
from common.program import program
from selective_kv import SelectiveCache, Shape
from selective_kv.formats import TILE, Format, key_format, value_format
from selective_kv.kernels import attention_kernels
from selective_kv.regions import Regions

L2_BYTES = 256 << 20  # copies are made until they hold this much: several times any L2
COPIES = 8  # at least: of a single copy, however large, a part may still lie in the L2 when its turn comes again
LAUNCHES = 12  # in a graph, at least
TOLERANCE = 1e-2  # norm of the error over norm of the reference, for bf16 outputs


@dataclass(frozen=True)
class Heads:
    """A model's attention shape."""

    n_head: int
    n_kv_head: int
    head_dim: int


@dataclass
class Version:
    """One way to compute decode attention. launch(i) runs it once over copy i of the cache."""

    name: str
    launch: Callable[[int], Tensor]
    n_copy: int
    read_bytes: int
    reference: Callable[[], Tensor]
    times: list[float]
    graph: torch.cuda.CUDAGraph | None = None
    n_launch: int = 0
    error: float = float("nan")


FORMATS: dict[str, tuple[Format, Format] | None] = {"bf16": None} | {
    name: (key_format(k_bits), value_format(v_bits))
    for name, k_bits, v_bits in (
        ("int8", 8, 8), ("K8V4", 8, 4), ("K4V4", 4, 4), ("K4V2", 4, 2), ("K3V3", 3, 3), ("K3V2", 3, 2)
    )
}  # fmt: skip


def random_regions(
    batch: int, n_token: int, heads: Heads, slots: int, formats: tuple[Format, Format] | None
) -> Regions:
    """A cache that holds n_token random tokens per sequence; given formats, `slots` of them or up to 127 more in full
    precision."""
    shape = (batch, heads.n_kv_head, n_token, heads.head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    k[..., 5] *= 4  # an outlier channel
    if formats is None:
        return Regions(k, v, 0, n_token)
    policy = SelectiveCache(4, slots - 4)
    policy.formats = lambda: formats  # type: ignore[method-assign]
    policy.allocate(Shape(batch, heads.n_kv_head, heads.head_dim, n_token, k.dtype, k.device))
    attention_kernels(k.device).store_chunk(policy.regions, k, v, 0)
    return policy.regions


def reference(q: Tensor, regions: Regions, n_token: int) -> Tensor:
    """Attention in float64 over what a cache of n_token tokens holds. q: [batch, n_head, head_dim]."""
    exact, n_tile = regions.exact_slots(n_token), regions.n_left(n_token) // TILE
    batch, _, head_dim = q.shape
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    n_kv_head = regions.k.shape[1]
    for b in range(batch):
        for h in range(n_kv_head):
            keys, values = (torch.cat([x[b, h, part] for part in exact]).double() for x in (regions.k, regions.v))
            if n_tile:
                stored = [part.tiles.of(b).of(h).part(slice(0, n_tile)) for part in regions.stored()]
                keys, values = (
                    torch.cat((x, part.format.dequantize(tiles).flatten(0, 1).double()))
                    for x, tiles, part in zip((keys, values), stored, regions.stored(), strict=True)
                )
            tile = q[b].view(n_kv_head, -1, head_dim)[h].double()
            score = tile @ keys.T * head_dim**-0.5
            out[b].view(n_kv_head, -1, head_dim)[h] = score.softmax(-1) @ values
    return out


def n_bytes(regions: Regions, n_token: int) -> int:
    """What has to be read of a cache of n_token tokens."""
    n_exact = n_token - regions.n_left(n_token)
    return 2 * regions.k[:, :, 0].nbytes * n_exact + sum(part.tiles.nbytes for part in regions.stored())


def our_version(name: str, caches: list[Regions], q: Tensor, positions: Tensor) -> Version:
    """Our Triton decode attention over copies of a cache."""
    from selective_kv.kernels import (
        triton_backend as triton_kernels,  # not above: benchmark.py runs where there is no Triton
    )

    def launch(i: int) -> Tensor:
        return triton_kernels.decode_attention(q, caches[i], positions)

    n_token = int(positions[0]) + 1
    return Version(name, launch, len(caches), n_bytes(caches[0], n_token), lambda: reference(q, caches[0], n_token), [])


def sdpa_version(name: str, backend: SDPBackend, packed: bool, caches: list[Regions], q: Tensor) -> Version:
    """packed: the group of query heads as so many query tokens of one head, which is the same sum."""
    n_kv_head = caches[0].k.shape[1]
    tile = q.unflatten(1, (n_kv_head, -1)) if packed else q[:, :, None]

    def launch(i: int) -> Tensor:
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(tile, caches[i].k, caches[i].v, enable_gqa=not packed)
        return y.reshape(q.shape)

    n_token = caches[0].k.shape[2]
    return Version(name, launch, len(caches), n_bytes(caches[0], n_token), lambda: reference(q, caches[0], n_token), [])


def versions(
    batch: int, n_token: int, heads: Heads, slots: int, with_sdpa: bool = True, formats: Iterable[str] = FORMATS
) -> list[Version]:
    """All that is timed at one shape: our formats and, over the bf16 one's slots, SDPA's kernels. Each has so many
    copies of its cache that none is found in the L2. slots: tokens in full precision."""
    q = torch.randn(batch, heads.n_head, heads.head_dim, device="cuda", dtype=torch.bfloat16)
    positions = torch.full((batch,), n_token - 1, device="cuda")
    found = []
    full: list[Regions] = []
    for name in formats:
        stored = FORMATS[name]
        caches = [random_regions(batch, n_token, heads, slots, stored)]
        while len(caches) < COPIES or sum(n_bytes(r, n_token) for r in caches) < L2_BYTES:
            caches.append(random_regions(batch, n_token, heads, slots, stored))
        found.append(our_version(f"ours {name}", caches, q, positions))
        full = full or (caches if name == "bf16" else [])
    if with_sdpa and full:
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            found.append(sdpa_version(f"SDPA {name}", backend, False, full, q))
            found.append(sdpa_version(f"SDPA {name} packed", backend, True, full, q))
    return found


def check(version: Version) -> bool:
    """Compare with float64. Freed memory is poisoned first, so that what is not written shows."""
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison
    out = version.launch(0).double()
    expected = version.reference()
    version.error = ((out - expected).norm() / expected.norm()).item()
    return version.error < TOLERANCE


def capture(version: Version) -> None:
    """One graph of LAUNCHES or more launches, so that the cost of replaying it is spread thin."""
    version.launch(0)
    version.n_launch = max(version.n_copy, LAUNCHES)
    version.graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(version.graph):
        for i in range(version.n_launch):
            version.launch(i % version.n_copy)


def time_all(group: list[Version], rounds: int) -> None:
    """Replay the graphs in turn; microseconds per launch are added to version.times."""
    for version in group:
        capture(version)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    for _ in range(rounds):
        for version in group:
            assert version.graph is not None
            start.record()
            version.graph.replay()
            end.record()
            end.synchronize()
            version.times.append(start.elapsed_time(end) * 1e3 / version.n_launch)


def combinations(n_head: Iterable[int], n_kv_head: Iterable[int], head_dim: Iterable[int]) -> list[Heads]:
    """Every one of them. Raises UserError where query heads do not divide among the KV heads."""
    found = [Heads(*each) for each in itertools.product(n_head, n_kv_head, head_dim)]
    for heads in found:
        if heads.n_head % heads.n_kv_head:
            raise UserError(f"{heads.n_head} query heads do not divide among {heads.n_kv_head} KV heads")
    return found


def run(
    all_heads: Iterable[Heads], shapes: Iterable[tuple[int, int]], slots: int = 128, rounds: int = 30,
    with_sdpa: bool = True, formats: Iterable[str] = FORMATS,
) -> dict[str, Any]:  # fmt: skip
    """Check, time and print every version at every (batch, context) of every shape of heads. Raises UserError."""
    if not torch.cuda.is_available():
        raise UserError("this benchmark times CUDA kernels, and there is no CUDA device")
    ceiling = read_ceiling(torch.device("cuda"))
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; read ceiling {ceiling / 1e12:.2f} TB/s")
    print(f"{'heads':>12} {'batch':>5} {'context':>8}  {'version':<20} {'µs':>8} {'GB/s':>6} {'share':>6} {'error':>8}")
    rows = []
    for heads, (batch, n_token) in itertools.product(all_heads, shapes):
        group = versions(batch, n_token, heads, slots, with_sdpa, formats)
        begin = f"{heads.n_head}/{heads.n_kv_head} x {heads.head_dim}".rjust(12) + f" {batch:5} {n_token:8} "
        for version in list(group):
            try:
                right = check(version)
            except RuntimeError as error:  # a back end that does not take this shape
                print(f"{begin} {version.name:<20} not run: {str(error).splitlines()[0]}")
                group.remove(version)
                continue
            if not right:
                raise UserError(
                    f"{version.name} at {batch}x{n_token}: error {version.error:.1e}, so no speed is reported"
                )
        time_all(group, rounds)
        for version in group:
            times = sorted(version.times)
            median, rate = statistics.median(times), version.read_bytes / statistics.median(times) * 1e6
            rows.append({
                **vars(heads), "batch": batch, "context": n_token, "version": version.name, "us": round(median, 2),
                "us_p10_p90": [round(times[int(len(times) * f)], 2) for f in (0.1, 0.9)],
                "gb_per_s": round(rate / 1e9), "share_of_ceiling": round(rate / ceiling, 3),
                "error": version.error,
            })  # fmt: skip
            print(
                f"{begin} {version.name:<20} {median:8.1f} {rate / 1e9:6.0f} {rate / ceiling:6.1%} {version.error:8.1e}"
            )
        ours = {v.name: statistics.median(v.times) for v in group}
        peers = [t for name, t in ours.items() if name.startswith("SDPA")]
        if "ours bf16" in ours:
            best = min([ours["ours bf16"], *peers])
            faster = [f"{n} {best / ours[f'ours {n}']:.2f}x" for n in FORMATS if n != "bf16" and f"ours {n}" in ours]
            print(f"{begin} against the best bf16: {', '.join(faster)}", end="")
            print(f"; our bf16 is {min(peers) / ours['ours bf16']:.2f}x the best SDPA" if peers else "", flush=True)
        del group
        torch.cuda.empty_cache()
    return {
        "device": device, "ceiling_tb_s": round(ceiling / 1e12, 3), "rows": rows, "torch": torch.__version__,
        "command": sys.argv,
    }  # fmt: skip


def main() -> None:
    parser = Parser("bench_kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [(1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 32768), (32, 8192)]
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=default, help="batch x context, e.g. 8x32768")
    parser.add_argument("--n_head", nargs="+", type=positive, default=[32], help="query heads (default: 32)")
    parser.add_argument("--n_kv_head", nargs="+", type=positive, default=[8], help="(default: 8)")
    parser.add_argument("--head_dim", nargs="+", type=positive, default=[128], help="(default: 128)")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="SDPA stands beside bf16 (default: all)"
    )
    parser.add_argument("--slots", type=int, default=128, help="tokens that quantised caches keep in full precision")
    parser.add_argument("--rounds", type=int, default=30, help="replays of each version")
    parser.add_argument("--no_sdpa", action="store_true", help="only our own kernels")
    parser.add_argument("--output", type=Path, help="write the JSON line here too")
    with program("bench_kernels.py", "interrupted: nothing is written"):
        args = parser.parse(sys.argv[1:])
        heads = combinations(args.n_head, args.n_kv_head, args.head_dim)
        if args.output:
            require_writable(args.output, "--output")
        line = to_json(run(heads, args.shapes, args.slots, args.rounds, not args.no_sdpa, args.formats))
        print(line)
        if args.output:
            write_whole(args.output, line + "\n")
