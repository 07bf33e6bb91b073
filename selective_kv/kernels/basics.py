"""Constants and small functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.formats import TILE as TOKENS_OF_A_TILE

INTERPRET = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: programs run one by one on the CPU
LOG2_E = tl.constexpr(1.4426950408889634)  # softmax by exp2, which is one instruction: scores times this
LN_2 = tl.constexpr(0.6931471805599453)
NEGATIVE = tl.constexpr(-1.0e30)  # below any score, and finite: minus itself it is 0, not NaN
UNSEEN = tl.constexpr(-2.0e30)  # the score of what must not be seen: its weight is 0 even beside NEGATIVE
ROUND = tl.constexpr(12582912.0)  # added to a float32, it rounds that to the nearest integer: the low bits of the sum
TILE = tl.constexpr(TOKENS_OF_A_TILE)  # tokens


@triton.jit
def prefetch(at):
    """L2 prefetch of the 128-byte line at each address (a pointer, or int64): asynchronous, no register waits for it.

    Not in the interpreter, which knows no assembly. The `mov` is there as Triton's inline assembly needs an output.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def in_order(bits):
    """Bits of float32 to int32 that compare in the floats' order. Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def reciprocal(x, DIVIDE: tl.constexpr):
    """1 / x, off by a unit in the last place at most, of float32 between 1e-37 and 1e37: one instruction where a
    division has eight. DIVIDE: by that division, as in the interpreter, which knows no assembly."""
    if DIVIDE:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y
