"""Number formats: how a tile of 128 tokens of keys or values becomes integers, and back. The reference maths.

Tokens are stored a tile of `TILE` = 128 at a time, [128, head_dim] per KV head. A `Format` is made of small steps:

1. Rotation. A vector times a Hadamard matrix over sqrt(head_dim), its own inverse, which spreads an outlier channel
   over all of them (QuaRot, arXiv:2404.00456). q·k does not change if both are rotated; a weighted sum of rotated
   values is rotated back once. Where head_dim is no power of two, blocks of the largest one that divides it.
2. Balancing (keys). Each token is divided by its factor, the root mean square of its elements in bfloat16; the
   factor multiplies the token's score. One large token then does not widen the steps of 127 others. (After KVarN,
   arXiv:2606.03458, which alternates between columns and rows; one division did as well here: LOG.md.)
3. Scale and base. Of keys, one pair for a channel, over the 128 tokens of the tile; of values, one for a token:
   value = base + scale * u with u from 0 to 2**bits - 1. Both are bfloat16, whose range is float32's: base is rounded
   down and scale up. The lowest level is `INSET` steps above the least element, the highest as far below the largest:
   of few levels all come closer together, and the extremes lose less than the others win.
4. Packing. Integers of b = 8, 4 or 2 bits form a plane: [128 * b / 8, head_dim] bytes, byte (row, d) holds element d of
   the tokens row, row + n_row, row + 2 * n_row, ... in its bits 0 to b - 1, b to 2b - 1, ... 8 bits are kept as
   u - 128, a signed byte. 3 bits form three planes of [32, head_dim / 2] bytes: byte (row, i) of plane j has the
   elements 2 i and 2 i + 1 of token row + 32 j in its lower six bits. Those of token row + 96 are six bits too, and
   stand in the upper two bits of the three planes, the lowest in plane 0.

Bits per element, with all scales, at head_dim D (in brackets 64; 128):

    keys, 8 bits              8 + 32 / 128            (8.25; 8.25)
    keys, b = 4, 3, 2 bits    b + 32 / 128 + 16 / D   (b + 0.5; b + 0.375)
    values, b bits            b + 32 / D              (b + 0.5; b + 0.25)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selective_kv.settings import BITS

TILE = 128  # tokens


INSET = {(4, True): 0.15, (3, True): 0.3, (2, True): 0.3, (3, False): 0.15, (2, False): 0.3}
"""Steps by (bits, whether scales belong to channels); 0 for the others. Found on a real model (LOG.md)."""


class Tiles(NamedTuple):
    """Quantised tiles. n_vector: scales of a tile, one for each of head_dim channels (keys) or TILE tokens (values)."""

    codes: Tensor  # uint8 [..., n_tile, n_byte]: the planes, one after the other
    scales: Tensor  # bfloat16 [..., n_tile, n_vector, 2]: scale and base
    factors: Tensor | None  # bfloat16 [..., n_tile, TILE / 2, 2], where balanced: of the tokens i and i + TILE / 2

    def of(self, sequence: int) -> Tiles:
        """Views of one sequence's tiles, if the first dimension counts sequences."""
        return Tiles(
            self.codes[sequence], self.scales[sequence], None if self.factors is None else self.factors[sequence]
        )

    def part(self, which: slice) -> Tiles:
        """Views of some tiles."""
        codes, scales, factors = self
        return Tiles(
            codes[..., which, :], scales[..., which, :, :], None if factors is None else factors[..., which, :, :]
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)


@dataclass(frozen=True)
class Format:
    """How tiles are stored. per_channel: a scale belongs to a channel (keys) and not to a token (values)."""

    bits: int
    per_channel: bool
    rotated: bool = True
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"a format has {', '.join(map(str, BITS))} bits, not {self.bits}")

    @property
    def inset(self) -> float:
        """Steps between the least element and the lowest level."""
        return INSET.get((self.bits, self.per_channel), 0.0)

    def n_vector(self, head_dim: int) -> int:
        """Scales of a tile."""
        return head_dim if self.per_channel else TILE

    def n_byte(self, head_dim: int) -> int:
        """Bytes of a tile's integers."""
        return TILE * head_dim * self.bits // 8

    def bits_per_element(self, head_dim: int) -> float:
        """Scales, bases and factors included."""
        return self.bits + 32 / (TILE if self.per_channel else head_dim) + (16 / head_dim if self.balanced else 0)

    def zeros(self, shape: tuple[int, ...], head_dim: int, device: torch.device) -> Tiles:
        """Zeroed storage for [*shape] tiles, as `quantize` returns them."""
        return Tiles(
            torch.zeros(*shape, self.n_byte(head_dim), dtype=torch.uint8, device=device),
            torch.zeros(*shape, self.n_vector(head_dim), 2, dtype=torch.bfloat16, device=device),
            torch.zeros(*shape, TILE // 2, 2, dtype=torch.bfloat16, device=device) if self.balanced else None,
        )

    def rotate(self, x: Tensor) -> Tensor:
        """x [..., head_dim] by the Hadamard rotation (not RoPE), where the format has one: float32, or wider as x is.
        Its own inverse."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return rotate(x) if self.rotated else x

    def quantize(self, x: Tensor) -> Tiles:
        """x: [..., n_tile, TILE, head_dim], any float dtype.

        A constant channel (or token, of values) has scale 0 and comes back as its base, exactly where that is a
        bfloat16. What is not finite, or has no float32 after rotation, gives the channel or token a scale and base that
        are NaN, and spoils no other; `require_finite` is the check that refuses it.
        """
        x = x.float()
        factors = None
        if self.balanced:
            norms = torch.linalg.vector_norm(x, dim=-1) * x.shape[-1] ** -0.5
            factors = rounded_up(norms).masked_fill(~((norms > 0) & norms.isfinite()), 1.0)
        x = self.rotate(x)
        if factors is not None:
            x = x / factors[..., None]
        axis = -2 if self.per_channel else -1
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        # by a tensor: by a number a GPU would multiply with its inverse, and now and then be off in the last bit
        base, most = low, 2**self.bits - 1
        if self.inset:
            base = low + (high - low) / torch.full_like(low, (most + 2 * self.inset) / self.inset)
        base = rounded_down(base)
        scale = rounded_up((high - base) / torch.full_like(high, most + self.inset))
        scale, base = (t.masked_fill(~(high - low).isfinite(), float("nan")) for t in (scale, base))
        u = ((x - base) / scale).round().clamp(0, most).nan_to_num(0).to(torch.uint8)
        scales = torch.stack((scale, base), -1).flatten(-3, -2).bfloat16()
        if factors is not None:
            factors = factors.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous().bfloat16()
        return Tiles(self.pack(u), scales, factors)

    def stored(self, tiles: Tiles) -> Tensor:
        """The stored vectors, still rotated if they are: float32 [..., n_tile, TILE, head_dim]."""
        scale, base = tiles.scales.float().unsqueeze(-3 if self.per_channel else -2).unbind(-1)
        x = base + scale * self.unpack(tiles.codes)
        return x if tiles.factors is None else x * tiles.factors.float().transpose(-1, -2).flatten(-2)[..., None]

    def dequantize(self, tiles: Tiles) -> Tensor:
        """What `quantize` was given, but for the rounding: float32 [..., n_tile, TILE, head_dim]."""
        return self.rotate(self.stored(tiles))

    def pack(self, u: Tensor) -> Tensor:
        """u: uint8 [..., TILE, head_dim]. Returns the planes, uint8 [..., n_byte]."""
        if self.bits == 8:
            return (u ^ 128).flatten(-2)
        if self.bits == 3:
            six = u.unflatten(-2, (4, -1)).unflatten(-1, (-1, 2))
            six = six[..., 0] | six[..., 1] << 3  # [..., 4, row, byte]
            last = six[..., 3, :, :]
            return torch.stack([six[..., j, :, :] | (last >> 2 * j) << 6 for j in range(3)], -3).flatten(-3)
        part = u.unflatten(-2, (8 // self.bits, -1))  # [..., tokens of a byte, row, d]
        byte = part[..., 0, :, :].clone()
        for i in range(1, 8 // self.bits):
            byte |= part[..., i, :, :] << (self.bits * i)
        return byte.flatten(-2)

    def unpack(self, codes: Tensor) -> Tensor:
        """What `pack` was given: uint8 [..., TILE, head_dim]."""
        if self.bits == 8:
            return codes.unflatten(-1, (TILE, -1)) ^ 128
        head_dim = codes.shape[-1] * 8 // (TILE * self.bits)
        return self.unpack_into(codes, codes.new_empty(*codes.shape[:-1], TILE, head_dim))

    def unpack_into(self, codes: Tensor, out: Tensor) -> Tensor:
        """Write what `pack` was given (of 8 bits less 128) into out [..., TILE, head_dim], of any dtype. Returns it."""
        if self.bits == 8:
            return out.copy_(codes.view(torch.int8).view(out.shape))
        if self.bits == 3:
            planes = codes.unflatten(-1, (3, 32, -1))
            upper = planes >> 6
            last = upper[..., 0, :, :] | upper[..., 1, :, :] << 2 | upper[..., 2, :, :] << 4
            for j in range(4):
                six = last if j == 3 else planes[..., j, :, :] & 63
                rows = out[..., 32 * j : 32 * (j + 1), :]
                rows[..., 0::2].copy_((six & 7).view(torch.int8))  # of which conversion is faster
                rows[..., 1::2].copy_((six >> 3).view(torch.int8))
            return out
        n_row = TILE * self.bits // 8
        byte, n = codes.unflatten(-1, (n_row, -1)), 8 // self.bits
        for i, rows in enumerate(out.split(n_row, -2)):
            part = byte if i == 0 else byte >> (self.bits * i)
            part = part if i == n - 1 else part & (2**self.bits - 1)
            rows.copy_(part.view(torch.int8))
        return out


def key_format(bits: int, rotated: bool = True) -> Format:
    """Scales of keys belong to channels. At 8 bits balancing improves nothing (LOG.md)."""
    return Format(bits, per_channel=True, rotated=rotated, balanced=bits < 8)


def value_format(bits: int, rotated: bool = True) -> Format:
    """Scales of values belong to tokens. At 8 bits a rotation improves next to nothing, and costs decoding time."""
    return Format(bits, per_channel=False, rotated=rotated and bits < 8)


def rounded_down(x: Tensor) -> Tensor:
    """float32 to the next bfloat16 that is no larger, as float32. NaN and infinities stay."""
    bits = x.contiguous().view(torch.int32)
    away = torch.where(x < 0, bits + 0xFFFF, bits) & -0x10000  # the magnitude of a negative number grows
    return torch.where(x.isfinite(), away.view(torch.float32), x)


def rounded_up(x: Tensor) -> Tensor:
    """float32 to the next bfloat16 that is no smaller, as float32. NaN and infinities stay."""
    return -rounded_down(-x)


@functools.lru_cache
def hadamard(n: int, device: torch.device) -> Tensor:
    """float32 [n, n] of 1 and -1, n a power of two (Sylvester's construction). Over sqrt(n) it is orthogonal."""
    with torch.inference_mode(False):
        h = torch.ones(1, 1, device="cpu")  # on the meta device cat imports a compiler
        while len(h) < n:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
        return h.to(device)


def rotation_size(head_dim: int) -> int:
    """The size of the Hadamard blocks that rotate a vector: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


def rotate(x: Tensor) -> Tensor:
    """x: [..., head_dim] in float32 or float64. Twice gives x back."""
    n = rotation_size(x.shape[-1])
    blocks = x.unflatten(-1, (-1, n)) @ hadamard(n, x.device).to(x.dtype)
    return blocks.flatten(-2) * n**-0.5


@functools.lru_cache
def rotation_matrix(head_dim: int, device: torch.device) -> Tensor:
    """float32 [head_dim, head_dim] of 1, -1 and, between blocks, 0: over sqrt(rotation_size) what `rotate` does."""
    n = rotation_size(head_dim)
    with torch.inference_mode(False):
        return torch.block_diag(*[hadamard(n, torch.device("cpu"))] * (head_dim // n)).to(device)


@functools.lru_cache
def rotation(head_dim: int, device: torch.device) -> Tensor:
    """float32 [head_dim, head_dim]: what `rotate` multiplies by. In one product it costs a CPU a third of the time."""
    with torch.inference_mode(False):
        return rotation_matrix(head_dim, device) * rotation_size(head_dim) ** -0.5


def require_finite(x: Tensor, what: str) -> None:
    """Raises ValueError, naming `what`, if x holds a NaN or an infinity. Waits for the device."""
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} holds a value that is not finite and cannot be quantised")
