"""Attention by the definition alone, in float64: which tokens a query sees, and in what precision.

It shares no code with the caches: it is given every key and value of a sequence, and decides token by
token from positions. Only `Format.quantize` is the project's own (it has tests of its own).
"""

from __future__ import annotations

import torch
from torch import Tensor

from selective_kv.formats import INT8, Format


def rotate(x: Tensor, offset: int, frequencies: Tensor) -> Tensor:
    """RoPE by complex numbers: pair i is (x[i], x[i + half]). x: [head, token, head_dim]."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.polar(torch.ones(half, dtype=torch.float64), frequencies.double() * offset)
    return torch.cat((z.real, z.imag), -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    sink_size: int,
    window_size: int,
    middle: str,
    frequencies: Tensor | None = None,
    formats: tuple[Format, Format] = (INT8, INT8),
) -> Tensor:
    """The chunk of queries q [n_head, token, head_dim] stands at `start`; k, v [n_kv_head, end, head_dim]
    hold every token from position 0 to the chunk's end. middle: "exact", "quantised" or "gone".
    frequencies: given, sinks are seen at their distance within the cache. Returns float64 like q.
    """
    end = start + q.shape[1]
    group = q.shape[0] // k.shape[0]
    k_int, v_int = (f.dequantize(*f.quantize(x)).double() for f, x in zip(formats, (k, v), strict=True))
    dropped = max(0, start + 1 - sink_size - window_size)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i in range(q.shape[1]):
        keys, values = [], []
        for j in range(end):
            if j > start + i:
                continue
            key, value = k[:, j].double(), v[:, j].double()
            left = sink_size <= j <= start - window_size  # held when the chunk began, out of the window
            if left and middle == "gone":
                continue
            if left and middle == "quantised":
                key, value = k_int[:, j], v_int[:, j]
            if frequencies is not None and j < min(sink_size, start):
                key = rotate(key[:, None], dropped, frequencies)[:, 0]
            keys.append(key)
            values.append(value)
        dense_k = torch.stack(keys, 1).repeat_interleave(group, 0)
        dense_v = torch.stack(values, 1).repeat_interleave(group, 0)
        score = torch.einsum("hd,hkd->hk", q[:, i].double(), dense_k) * q.shape[-1] ** -0.5
        out[:, i] = torch.einsum("hk,hkd->hd", score.softmax(-1), dense_v)
    return out
