"""Prologue and epilogue fused into a matrix product's launch: an RMSNorm before; bias, SwiGLU, RoPE or residual after.

Outputs are computed in units: with SwiGLU a row of the gate and its row of the up projection, with RoPE the two rows of
a head that are one rotated pair, otherwise one row. A program has all rows of its units: its epilogue is its own.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Turn(NamedTuple):
    """RoPE of the first n_head heads of an output. cos, sin: float32 [n_token, head_dim], as `model.Rope` has them."""

    cos: Tensor
    sin: Tensor
    n_head: int


class Around(NamedTuple):
    """The prologue and epilogue of one product, as `Linear` and `QKV` in contract.py define them."""

    bias: Tensor | None = None  # [n_row]
    norm: Tensor | None = None  # [k]
    eps: float = 0.0
    swiglu: bool = False
    residual: Tensor | None = None  # [n_token, n_out]
    turn: Turn | None = None

    @property
    def paired(self) -> bool:
        """Whether a unit of the output has two rows."""
        return self.swiglu or self.turn is not None

    def n_out(self, weight: Tensor) -> int:
        """Elements of a token's output."""
        return weight.shape[0] // 2 if self.swiglu else weight.shape[0]

    def n_unit(self, weight: Tensor) -> int:
        return weight.shape[0] // 2 if self.paired else weight.shape[0]

    def pointers(self, x: Tensor) -> tuple[Tensor, ...]:
        """bias, norm, residual, cos and sin; in place of one that is not given stands x, which is then not read."""
        cos, sin = (x, x) if self.turn is None else self.turn[:2]
        bias, norm, residual = (x if t is None else t for t in (self.bias, self.norm, self.residual))
        return bias, norm, residual, cos, sin

    @property
    def n_turned(self) -> int:
        """Rows that RoPE turns."""
        return 0 if self.turn is None else self.turn.n_head * self.turn.cos.shape[1]

    @property
    def constants(self) -> dict[str, int | bool]:
        """The kernels' arguments that say what is there. HEAD_DIM 0: no RoPE."""
        return {
            "HEAD_DIM": 0 if self.turn is None else self.turn.cos.shape[1], "NORM": self.norm is not None,
            "SWIGLU": self.swiglu, "BIAS": self.bias is not None, "ADD": self.residual is not None,
        }  # fmt: skip

    def check(self, x: Tensor, weight: Tensor) -> None:
        """Asserts that these operands go together, and lie as kernels read them."""
        assert x.stride(1) == 1 and x.stride(0) == x.shape[1] and weight.is_contiguous()
        assert self.residual is None or self.residual.is_contiguous()
        assert self.bias is None or not self.swiglu
        assert self.turn is None or not (self.swiglu or self.residual is not None)
        assert self.turn is None or (self.turn.cos.is_contiguous() and self.turn.sin.is_contiguous())


@triton.jit
def rows_of(unit, n_out, HEAD_DIM: tl.constexpr, SWIGLU: tl.constexpr):
    """The weight's row that is a unit's first, and the distance to its second one (0: it has none)."""
    row, apart = unit, n_out * 0
    if SWIGLU:
        apart = n_out
    if HEAD_DIM > 0:
        HALF: tl.constexpr = HEAD_DIM // 2
        row, apart = unit // HALF * HEAD_DIM + unit % HALF, apart + HALF
    return row, apart


@triton.jit
def weight_rows(n_out, ROWS: tl.constexpr, UNITS: tl.constexpr, HEAD_DIM: tl.constexpr, SWIGLU: tl.constexpr):
    """The ROWS rows of a program's UNITS units: the first rows of all units, then, if units have two, the second ones.
    Row 0 stands for those beyond the end."""
    r = tl.arange(0, ROWS)
    row, apart = rows_of(tl.program_id(0) * UNITS + r % UNITS, n_out, HEAD_DIM, SWIGLU)
    return tl.where(row < n_out, row, 0) + r // UNITS * apart


@triton.jit
def unit_sums(total, UNITS: tl.constexpr, PAIRED: tl.constexpr):
    """float32 [WARPS, ROWS, N], a sum of each warp for each of `weight_rows` and each token, added up over the warps:
    those of units' first rows and of their second ones, [UNITS, N] each; the first ones twice if not PAIRED."""
    WARPS: tl.constexpr = total.shape[0]
    PAIR: tl.constexpr = total.shape[1] // UNITS
    N: tl.constexpr = total.shape[2]
    if WARPS > 1:
        # Two warps' sums go to one thread and those of the others to its neighbours: warps meet once for that, and
        # twice in a `tl.sum` over them.
        y = tl.reshape(total, (WARPS // 2, 2, PAIR, UNITS, N))
        y, other = tl.split(tl.permute(y, (3, 4, 2, 0, 1)))
        y = tl.sum(y + other, 3)
    else:
        y = tl.permute(tl.reshape(total, (PAIR, UNITS, N)), (1, 2, 0))
    if PAIRED:
        y, other = tl.split(y)
    else:
        y = tl.reshape(y, (UNITS, N))
        other = y
    return y, other


@triton.jit
def load_epilogue(
    bias, residual, cos, sin, row, apart, at, token, n_turned, there,
    HEAD_DIM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The epilogue's operands, for `finish`, loaded ahead of the main loop, which hides their latency. at: offsets in
    `residual`; token: rows of cos and sin; there: which outputs exist."""
    first, second, added = 0.0, 0.0, 0.0
    turn = (1.0, 0.0, 1.0, 0.0)
    if BIAS:
        first = tl.load(bias + row, there, 0.0).to(tl.float32)
        if HEAD_DIM > 0:
            second = tl.load(bias + row + apart, there, 0.0).to(tl.float32)
    if ADD:
        added = tl.load(residual + at, there, 0.0).to(tl.float32)
    if HEAD_DIM > 0:
        turns = there & (row < n_turned)
        turn_at = token * HEAD_DIM + row % HEAD_DIM
        turn = (
            tl.load(cos + turn_at, turns, 1.0), tl.load(sin + turn_at, turns, 0.0),
            tl.load(cos + turn_at + HEAD_DIM // 2, turns, 1.0), tl.load(sin + turn_at + HEAD_DIM // 2, turns, 0.0),
        )  # fmt: skip
    return first, second, added, turn


@triton.jit
def finish(
    y, other, scale, epilogue, out, at, apart, there,
    HEAD_DIM: tl.constexpr, SWIGLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The epilogue: scale, bias, SwiGLU or RoPE, residual, store. y, other: float32 sums of units' two rows; epilogue:
    from `load_epilogue`."""
    first, second, added, turn = epilogue
    y *= scale
    other *= scale
    if BIAS:
        y += first
    if SWIGLU:
        y = y / (1.0 + tl.exp(-y)) * other
    if HEAD_DIM > 0:
        if BIAS:
            other += second
        tl.store(out + at + apart, (other * turn[2] + y * turn[3]).to(out.dtype.element_ty), there)
        y = y * turn[0] + other * turn[1]
    if ADD:
        y += added
    tl.store(out + at, y.to(out.dtype.element_ty), there)
