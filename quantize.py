"""How values become integers and back: the reference maths.

int8, symmetric, one scale per token and head: `scale = absmax / 127`, integers in [-127, 127]. The
scale is kept beside the integers and multiplies the attention score (K) or the probability (V), so
that nothing is ever dequantised elementwise on the fast paths; `dequantize` is for the reference.
Bits per element, scale included: 8 + 32 / head_dim (8.25 at head_dim 128, 8.5 at 64).
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., head_dim], any float dtype. Returns int8 [..., head_dim] and float32 scale [...].

    A zero vector gets scale 1. A non-finite vector gets a non-finite scale and spoils nobody else;
    `require_finite` is the check that refuses it.
    """
    x = x.float()
    absmax = torch.linalg.vector_norm(x, torch.inf, dim=-1)
    scale = torch.where(absmax == 0, 1.0, absmax / 127)
    return (x / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """integers: int8 [..., head_dim]; scale: float32 [...]. Returns float32 [..., head_dim]."""
    return integers.float() * scale[..., None]


def require_finite(x: Tensor, what: str) -> None:
    """Raises ValueError, naming `what`, if x holds a NaN or an infinity. Waits for the device."""
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} holds a value that is not finite and cannot be quantised")
