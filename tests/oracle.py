"""Attention by the definition alone, in float64: which tokens a query sees, and in what precision.

It shares no code with the caches: it is given every key and value of a sequence, and decides from positions.
Only `Format.quantize` is the project's own (it has tests of its own).
"""

from __future__ import annotations

import torch
from torch import Tensor

from selective_kv.formats import Format

TILE = 128


def rotate(x: Tensor, offset: int, frequencies: Tensor) -> Tensor:
    """RoPE by complex numbers: pair i is (x[i], x[i + half]). x: [head, token, head_dim]."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.polar(torch.ones(half, dtype=torch.float64), frequencies.double() * offset)
    return torch.cat((z.real, z.imag), -1)


def in_tiles(x: Tensor, sink_size: int, form: Format) -> Tensor:
    """x [head, token, head_dim] with every whole tile after the sinks quantised: float64."""
    rounded = x.double().clone()
    for first in range(sink_size, x.shape[1] - TILE + 1, TILE):
        tile = slice(first, first + TILE)
        rounded[:, tile] = form.dequantize(form.quantize(x[:, tile])).double()
    return rounded


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    sink_size: int,
    window_size: int,
    middle: str,
    frequencies: Tensor | None = None,
    formats: tuple[Format, Format] | None = None,
) -> Tensor:
    """The chunk of queries q [n_head, token, head_dim] stands at `start`; k, v [n_kv_head, end, head_dim]
    hold every token from position 0 to the chunk's end. middle: "exact", "quantised" (in `formats`) or "gone".
    frequencies: given, sinks are seen at their distance within the cache. Returns float64 like q.
    """
    end, group = start + q.shape[1], q.shape[0] // k.shape[0]
    keys, values = k.double().clone(), v.double().clone()
    pos = torch.arange(end)
    seen = pos[None] <= torch.arange(start, end)[:, None]  # [query, key]
    left = (pos >= sink_size) & (pos <= start - window_size)  # of what was held when the chunk began
    if middle == "gone":
        seen = seen & ~left
    if middle == "quantised" and formats is not None:
        last = sink_size + ((pos - sink_size).div(TILE, rounding_mode="floor") + 1) * TILE - 1  # of the token's tile
        whole = left & (last <= start - window_size)
        for x, source, form in zip((keys, values), (k, v), formats, strict=True):
            x[:, whole] = in_tiles(source, sink_size, form)[:, whole]
    if frequencies is not None:
        sinks, dropped = slice(0, min(sink_size, start)), max(0, start + 1 - sink_size - window_size)
        keys[:, sinks] = rotate(k[:, sinks], dropped, frequencies)
    score = torch.einsum("hqd,hkd->hqk", q.double(), keys.repeat_interleave(group, 0)) * q.shape[-1] ** -0.5
    prob = score.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,hkd->hqd", prob, values.repeat_interleave(group, 0))
