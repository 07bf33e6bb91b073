"""What the kernels' tests share: a cache's memory made by hand, and attention in float64, by the definition.

Without a GPU the kernels run in Triton's interpreter, on the CPU; with one, on it (`-m gpu`). The reference
here shares nothing with the kernels, nor with their PyTorch twins, but the reference quantisation.
Memory that holds no token is full of NaN, so that a kernel that looks at it cannot pass.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="the kernels need Triton")

import triton as triton  # noqa: E402, for tests with kernels of their own: a test module cannot skip before its imports
import triton.language as tl  # noqa: E402, F401
from conftest import ROOT  # noqa: E402

from selective_kv.formats import TILE, Format, Tiles, key_format, rotation_matrix, value_format  # noqa: E402
from selective_kv.regions import Regions  # noqa: E402

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="the GPU runs the same tests")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")]),
]
Formats = tuple[Format, Format]


def formats(k_bits: int, v_bits: int, rotated: bool = True) -> Formats:
    return key_format(k_bits, rotated), value_format(v_bits, rotated)


INT8 = formats(8, 8)
FORMATS = [INT8, formats(4, 4), formats(8, 4, False)]
FEW_BITS = [formats(3, 3), formats(4, 2, False)]
RARE: list[Formats] = [] if not HAS_GPU else [
    (Format(8, True, True), Format(8, False, True)), formats(4, 8), formats(2, 2), formats(3, 8), formats(8, 2),
    formats(3, 4, False), formats(2, 3),
]  # fmt: skip
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tokens(batch: int, n_kv_head: int, n_token: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random keys and values with an outlier channel in K and sinks that draw much attention."""
    k, v = (torch.randn(batch, n_kv_head, n_token, head_dim) for _ in "kv")
    k[..., 1] *= 8
    k[:, :, :2] *= 2
    v[:, :, :2] *= 0.1
    v[:, :, n_token // 2] = 0  # a zero vector has scale 1
    return k.to(dtype), v.to(dtype)


def few(cases: Sequence[Any], *which: int) -> list[Any]:
    """All of them on a GPU; those at `which` in the interpreter, where a program takes half a second."""
    return list(cases) if HAS_GPU else [cases[i] for i in which]


def n_left(n: int, sink: int, window: int, has_tiles: bool = True) -> int:
    """How many of n tokens have left, by the definition; of those that are quantised only whole tiles."""
    return max(0, n - sink - window) // (TILE if has_tiles else 1) * (TILE if has_tiles else 1)


def held(
    k: Tensor, v: Tensor, lengths: list[int], sink: int, window: int, n_tile: int, device: str,
    formats: Formats = INT8,
) -> Regions:  # fmt: skip
    """The memory of a cache that has seen the first lengths[b] tokens of k, v [batch, n_kv_head, token, D]; n_tile 0:
    what leaves is dropped. Slots without a token hold NaN, but for values where a tile has closed: those are large.
    """
    batch, n_kv_head, _, head_dim = k.shape
    ring = window + (TILE if n_tile else 0)
    slots = [torch.full((batch, n_kv_head, sink + ring, head_dim), float("nan"), dtype=k.dtype) for _ in "kv"]
    tiles = [form.zeros((batch, n_kv_head, n_tile), head_dim, k.device) for form in formats]
    for part in (t for pair in tiles for t in pair if t is not None):
        part.random_(0, 256) if part.dtype == torch.uint8 else part.fill_(float("nan"))
    for b, n in enumerate(lengths):
        left = n_left(n, sink, window, n_tile > 0)
        if n_tile and left:
            slots[1][b] = 1e4
        for x, slot, tile, form in zip((k, v), slots, tiles, formats, strict=True):
            for pos in (*range(min(sink, n)), *range(sink + left, n)):
                slot[b, :, pos if pos < sink else sink + (pos - sink) % ring] = x[b, :, pos]
            if n_tile and left:
                made = form.quantize(x[b, :, sink : sink + left].unflatten(1, (-1, TILE)))
                for room, new in zip(tile, made, strict=True):
                    if room is not None and new is not None:
                        room[b, :, : left // TILE] = new
    k_slots, v_slots = (t.to(device) for t in slots)
    if not n_tile:
        return Regions(k_slots, v_slots, sink, window)
    k_tiles, v_tiles = (Tiles(*(None if t is None else t.to(device) for t in pair)) for pair in tiles)
    rotation = rotation_matrix(head_dim, torch.device(device)).to(k.dtype)
    return Regions(k_slots, v_slots, sink, window, k_tiles, v_tiles, *formats, rotation)


def copied(regions: Regions) -> Regions:
    """The same in memory of its own."""

    def own(tiles: Tiles | None) -> Tiles | None:
        return tiles and Tiles(*(None if t is None else t.clone() for t in tiles))  # type: ignore[arg-type]

    return regions._replace(
        k=regions.k.clone(), v=regions.v.clone(), k_tiles=own(regions.k_tiles), v_tiles=own(regions.v_tiles)
    )


def apply_rope(x: Tensor, offset: int, frequencies: Tensor) -> Tensor:
    """x float64 [..., D] rotated by `offset` positions of RoPE."""
    a, b = x.chunk(2, -1)
    cos, sin = (frequencies.double() * offset).cos(), (frequencies.double() * offset).sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def visible(
    k: Tensor, v: Tensor, n: int, sink: int, window: int, quantised: bool, formats: Formats = INT8
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 keys and values that token n - 1 sees, and their positions. k, v: [n_kv_head, token, D]."""
    pos, left = torch.arange(n), n_left(n, sink, window, quantised)
    middle = (pos >= sink) & (pos < sink + left)
    keys, values = (x[:, :n].double() for x in (k, v))
    if not quantised:
        return keys[:, ~middle], values[:, ~middle], pos[~middle]
    if left:
        for x, exact, form in zip((k, v), (keys, values), formats, strict=True):
            tiles = x[:, sink : sink + left].unflatten(1, (-1, TILE))
            exact[:, middle] = form.dequantize(form.quantize(tiles)).flatten(1, 2).double()
    return keys, values, pos


def reference(
    q: Tensor, k: Tensor, v: Tensor, n: int, sink: int, window: int, quantised: bool, frequencies: Tensor | None,
    formats: Formats = INT8,
) -> Tensor:  # fmt: skip
    """float64 attention of the query of token n - 1. q: [n_head, D]; k, v: [n_kv_head, token, D]."""
    keys, values, pos = visible(k, v, n, sink, window, quantised, formats)
    group = q.shape[0] // k.shape[0]
    if frequencies is not None:
        dropped = max(0, n - sink - window)
        keys = torch.where((pos < sink)[:, None], apply_rope(keys, dropped, frequencies), keys)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    score = torch.einsum("hd,hkd->hk", q.double(), keys) * q.shape[-1] ** -0.5
    return torch.einsum("hk,hkd->hd", score.softmax(-1), values)


def same_tiles(mine: Regions, theirs: Regions, b: int, n_tile: int) -> None:
    """Integers and scales bit for bit; after a rotation, or a norm, a rounding may tip, now and then."""
    for got, want in zip(mine.stored(), theirs.stored(), strict=True):
        got_tiles, want_tiles = (
            Tiles(*(None if t is None else t[b, :, :n_tile].cpu() for t in part.tiles)) for part in (got, want)
        )
        if not (got.format.rotated or got.format.balanced):
            assert torch.equal(got_tiles.codes, want_tiles.codes) and torch.equal(got_tiles.scales, want_tiles.scales)
            continue
        values, expected = got.format.stored(got_tiles), got.format.stored(want_tiles)
        size = expected.abs().amax((-1, -2), keepdim=True)
        step = size * {8: 0.02, 4: 0.2, 3: 0.4, 2: 1.0}[got.format.bits]
        assert ((values - expected).abs() <= step).all()
        assert ((values - expected).abs() > 1e-2 * size).float().mean() < 0.01
        # a scale that tips is a 256th off, which of 8 bits moves many
        assert (got_tiles.codes != want_tiles.codes).float().mean() < (0.2 if got.format.bits == 8 else 0.02)


def error(out: Tensor, expected: Tensor) -> float:
    expected = expected.cpu()
    return ((out.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-6)).item()


def poison(device: str) -> None:
    """Fill memory about to be reused with NaN: what a kernel does not write, or reads too early, shows."""
    for n in (1 << 12, 1 << 16, 1 << 20):
        torch.full((n,), float("nan"), device=device)


def settle(device: str) -> None:
    """An ordinary launch, which waits for all before it: without one between, `append` may look ahead of another."""
    torch.ones(1, device=device)


def compiled(function: str, shapes: Sequence[Any]) -> list[Any]:
    """What a function of aot.py returns for each of its arguments: lists, or dicts by name. By the real compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), function, json.dumps(list(shapes))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def counts(function: str, shapes: Sequence[Any]) -> list[dict[str, int]]:
    """`compiled`, of machine code, for tests marked machine_code. Skips where no tool can read that, and under
    another compiler than the one whose code the test is about: instruction counts are its own.
    """
    pinned = re.search(r"^triton==([\d.]+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    if pinned is None or triton.__version__ != pinned[1]:
        pytest.skip(f"counts are about Triton {pinned and pinned[1]}, and this is {triton.__version__}")
    found = compiled(function, shapes)
    if None in found:
        pytest.skip("this Triton has no cuobjdump beside it")
    return found
