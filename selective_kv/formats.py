"""How values become integers and back: the reference maths, and the formats that a cache can store.

A `Format` is made of small pieces: an optional rotation, groups that share a scale, rounding, packing.

8 bits, symmetric, one scale per token and head: `scale = absmax / 127`, integers in [-127, 127]. The
scale is kept beside the integers and multiplies the attention score (K) or the probability (V), so
that nothing is ever dequantised elementwise on the fast paths; `dequantize` is for the reference.
Bits per element, scale included: 8 + 32 / head_dim (8.25 at head_dim 128, 8.5 at 64).

4 bits, asymmetric, per group of `group_size` elements: `base = min`, `scale = (max - min) / 15`, both rounded
to float16 first; integers in [0, 15], value = base + scale * integer. Two to a byte: element i in the low
half of byte i, element i + head_dim / 2 in the high half. base and scale multiply scores and probabilities
too: q·k = scale * (q·u) + base * sum(q). Bits per element: 4 + 32 / group_size (4.25 at 128, 4.5 at 64).

Rotation: a vector times the Hadamard matrix over sqrt(head_dim), which is its own inverse. It spreads an
outlier channel over all of them; q·k does not change if both are rotated (QuaRot, arXiv:2404.00456).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., head_dim], any float dtype. Returns int8 [..., head_dim] and float32 scale [...].

    A zero vector gets scale 1. A non-finite vector gets a non-finite scale and spoils nobody else;
    `require_finite` is the check that refuses it.
    """
    x = x.float()
    absmax = torch.linalg.vector_norm(x, torch.inf, dim=-1)
    scale = (absmax / 127).masked_fill_(absmax == 0, 1.0)
    return (x / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """integers: int8 [..., head_dim]; scale: float32 [...]. Returns float32 [..., head_dim]."""
    return integers.float() * scale[..., None]


def quantize4(x: Tensor, n_group: int) -> tuple[Tensor, Tensor]:
    """x: [..., head_dim]. Returns uint8 [..., head_dim / 2] and float16 [..., n_group, 2], scale and base.

    A constant group gets scale 1 and comes back as its base. Finite or not: as in `quantize`.
    """
    grouped = x.float().unflatten(-1, (n_group, -1))
    low, high = grouped.amin(-1), grouped.amax(-1)
    base, scale = low.half(), ((high - low) / 15).half()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    u = ((grouped - base.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15)
    first, second = u.nan_to_num(0).to(torch.uint8).flatten(-2).chunk(2, -1)
    return first | (second << 4), torch.stack((scale, base), -1)


def dequantize4(packed: Tensor, scales: Tensor) -> Tensor:
    """What `quantize4` returned. Returns float32 [..., head_dim]."""
    u = torch.cat((packed & 15, packed >> 4), -1).float().unflatten(-1, (scales.shape[-2], -1))
    scale, base = scales.float()[..., None].unbind(-2)
    return (base + scale * u).flatten(-2)


@functools.lru_cache
def hadamard(n: int, device: torch.device) -> Tensor:
    """float32 [n, n] of 1 and -1, n a power of two (Sylvester's construction). Over sqrt(n) it is orthogonal."""
    h = torch.ones(1, 1, device="cpu")  # on the meta device cat imports a compiler
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h.to(device)


def rotate(x: Tensor) -> Tensor:
    """x: [..., head_dim], a power of two. Returns float32; twice gives x back."""
    n = x.shape[-1]
    return x.float() @ hadamard(n, x.device) * n**-0.5


@dataclass(frozen=True)
class Format:
    """How vectors of head_dim elements are stored. group_size 0: one group; `rotated`: before all else."""

    bits: int = 8
    group_size: int = 0
    rotated: bool = False

    def check(self, head_dim: int) -> None:
        """Raises ValueError where this format does not suit vectors of head_dim elements."""
        if self.bits == 8:
            return
        if head_dim & (head_dim - 1) or head_dim < 64:  # matrix units sum 32 bytes at a time, half a vector's
            raise ValueError(f"4 bits need a head_dim that is a power of two and at least 64, not {head_dim}")
        if self.group_size not in (0, head_dim, head_dim // 2):
            raise ValueError(
                f"--group_size must be the head_dim, {head_dim}, or half of it, {head_dim // 2}, not {self.group_size}"
            )

    def n_group(self, head_dim: int) -> int:
        """Scales per vector."""
        return head_dim // self.group_size if self.bits == 4 and self.group_size else 1

    def n_byte(self, head_dim: int) -> int:
        """Bytes of a vector's integers."""
        return head_dim * self.bits // 8

    def bits_per_element(self, head_dim: int) -> float:
        """Scales and bases included."""
        return self.bits + 32 * self.n_group(head_dim) / head_dim

    def room(self, rows: tuple[int, ...], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Zeroed storage for `rows` vectors: integers [*rows, n_byte] and scales, as `quantize` returns them."""
        if self.bits == 8:
            return torch.zeros(*rows, head_dim, dtype=torch.int8, device=device), torch.zeros(*rows, device=device)
        scales = torch.zeros(*rows, self.n_group(head_dim), 2, dtype=torch.float16, device=device)
        return torch.zeros(*rows, head_dim // 2, dtype=torch.uint8, device=device), scales

    def turn(self, q: Tensor) -> Tensor:
        """A query as the stored keys are: rotated if they are. float32."""
        return rotate(q) if self.rotated else q.float()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [..., head_dim], any float dtype. Returns integers and scales."""
        x = self.turn(x)
        return quantize(x) if self.bits == 8 else quantize4(x, self.n_group(x.shape[-1]))

    def stored(self, integers: Tensor, scales: Tensor) -> Tensor:
        """The stored values, float32 [..., head_dim]: still rotated if they are."""
        return dequantize(integers, scales) if self.bits == 8 else dequantize4(integers, scales)

    def dequantize(self, integers: Tensor, scales: Tensor) -> Tensor:
        """What `quantize` was given, but for the rounding; float32 [..., head_dim]."""
        return self.turn(self.stored(integers, scales))


INT8 = Format()


def require_finite(x: Tensor, what: str) -> None:
    """Raises ValueError, naming `what`, if x holds a NaN or an infinity. Waits for the device."""
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} holds a value that is not finite and cannot be quantised")
