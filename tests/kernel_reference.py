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

from selective_kv.formats import INT8, Format, hadamard  # noqa: E402
from selective_kv.regions import Regions  # noqa: E402

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="the GPU runs the same tests")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")]),
]
K4, K4_HALVES, V4, V4_HALVES = Format(4, 0, True), Format(4, -1), Format(4), Format(4, -1)
FORMATS = [(INT8, INT8), (K4, V4), (K4_HALVES, INT8), (INT8, V4_HALVES), (Format(4, -1, True), V4_HALVES)]
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


def slot_of(pos: int, sink: int, window: int) -> int:
    return pos if pos < sink else sink + (pos - sink) % window


def sized(formats: tuple[Format, Format], head_dim: int) -> tuple[Format, Format]:
    """With groups of half a vector where -1 asks for them."""
    k_format, v_format = (Format(f.bits, head_dim // 2 if f.group_size else 0, f.rotated) for f in formats)
    return k_format, v_format


def held(
    k: Tensor, v: Tensor, lengths: list[int], sink: int, window: int, n_row: int, device: str,
    formats: tuple[Format, Format] = (INT8, INT8),
) -> Regions:  # fmt: skip
    """The memory of a cache that has seen the first lengths[b] tokens of k, v [batch, n_kv_head, token, D]."""
    batch, n_kv_head, _, head_dim = k.shape
    formats = sized(formats, head_dim)
    slots = [torch.full((batch, n_kv_head, sink + window, head_dim), float("nan"), dtype=k.dtype) for _ in "kv"]
    ints, scales = map(
        list, zip(*(f.room((batch, n_kv_head, n_row), head_dim, k.device) for f in formats), strict=True)
    )
    for integer, scale in zip(ints, scales, strict=True):
        integer.random_(0, 128)
        scale.fill_(float("nan"))
    for b, n in enumerate(lengths):
        for pos in range(n):
            for x, slot, integer, scale, form in zip((k, v), slots, ints, scales, formats, strict=True):
                if pos < sink or pos > n - 1 - window:
                    slot[b, :, slot_of(pos, sink, window)] = x[b, :, pos]
                elif n_row:
                    integer[b, :, pos - sink], scale[b, :, pos - sink] = form.quantize(x[b, :, pos])
    slots, ints, scales = ([t.to(device) for t in group] for group in (slots, ints, scales))
    if not n_row:
        return Regions(slots[0], slots[1], None, None, None, None, sink, window)
    rotation = hadamard(head_dim, torch.device(device)).to(k.dtype) if formats[0].rotated else None
    return Regions(*slots, *ints, *scales, sink, window, *formats, rotation)


def turned(x: Tensor, offset: int, frequencies: Tensor) -> Tensor:
    """x float64 [..., D] rotated by `offset` positions of RoPE."""
    a, b = x.chunk(2, -1)
    cos, sin = (frequencies.double() * offset).cos(), (frequencies.double() * offset).sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def visible(
    k: Tensor, v: Tensor, n: int, sink: int, window: int, quantised: bool, formats: tuple[Format, Format] = (INT8, INT8)
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 keys and values that token n - 1 sees, and their positions. k, v: [n_kv_head, token, D]."""
    pos = torch.arange(n)
    middle = (pos >= sink) & (pos <= n - 1 - window)
    keys, values = (x[:, :n].double() for x in (k, v))
    if quantised:
        keys, values = (
            torch.where(middle[:, None], form.dequantize(*form.quantize(x[:, :n])).double(), exact)
            for x, exact, form in zip((k, v), (keys, values), sized(formats, k.shape[2]), strict=True)
        )
        return keys, values, pos
    return keys[:, ~middle], values[:, ~middle], pos[~middle]


def reference(
    q: Tensor, k: Tensor, v: Tensor, n: int, sink: int, window: int, quantised: bool, frequencies: Tensor | None,
    formats: tuple[Format, Format] = (INT8, INT8),
) -> Tensor:  # fmt: skip
    """float64 attention of the query of token n - 1. q: [n_head, D]; k, v: [n_kv_head, token, D]."""
    keys, values, pos = visible(k, v, n, sink, window, quantised, formats)
    group = q.shape[0] // k.shape[0]
    if frequencies is not None:
        dropped = max(0, n - sink - window)
        keys = torch.where((pos < sink)[:, None], turned(keys, dropped, frequencies), keys)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    score = torch.einsum("hd,hkd->hk", q.double(), keys) * q.shape[-1] ** -0.5
    return torch.einsum("hk,hkd->hd", score.softmax(-1), values)


def error(out: Tensor, expected: Tensor) -> float:
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


def same_rows(mine: Regions, theirs: Regions, b: int, n_left: int) -> None:
    """Integers and scales bit for bit; after a rotation an integer may be the neighbour's, now and then."""
    for got, want in zip(mine.quantised(), theirs.quantised(), strict=True):
        ints, scales = got.ints[b, :, :n_left].cpu(), got.scales[b, :, :n_left].cpu()
        if not got.format.rotated:
            assert torch.equal(ints, want.ints[b, :, :n_left]) and torch.equal(scales, want.scales[b, :, :n_left])
            continue
        assert torch.allclose(scales.float(), want.scales[b, :, :n_left].float(), rtol=2e-3, atol=1e-6)
        values, expected = (want.format.stored(*x) for x in ((ints, scales), (want.ints[b], want.scales[b])))
        expected = expected[:, :n_left]
        assert ((values - expected).abs() > 1e-2 * expected.abs().amax(-1, keepdim=True)).float().mean() < 0.02
