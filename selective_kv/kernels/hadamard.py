"""The Hadamard matrix of `formats.py` times a vector, in registers: a fast Walsh-Hadamard transform.

log2(n) rounds, in each of which an element meets the one whose index differs in one bit: x[i] + x[j] takes the
place of x[i], x[i] - x[j] that of x[j]. Between threads of a warp a meeting is one shuffle, within a thread nothing
at all, and the matrix is not read. It is the way for a vector or a few, with no time to lose; blocks of tokens go
through the matrix units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.kernels.basics import INTERPRET

IN_INTERPRETER = tl.constexpr(INTERPRET)


@triton.jit
def butterfly(x, SIZE: tl.constexpr, AFTER: tl.constexpr):
    """x: float32 [before, SIZE, AFTER] in any shape of that order; SIZE a power of two. Returns H x, in x's shape.

    The partner comes from `xor_sum`, which has both elements of a pair meet: own ^ (own ^ partner) is the partner,
    to the bit, and the compiler sees it. The interpreter, which is slow at that, takes a sum, which rounds.
    """
    tl.static_assert(SIZE & (SIZE - 1) == 0 and SIZE <= 4096)
    sign = tl.where(tl.arange(0, 2) == 0, 1.0, -1.0)[None, :, None]
    y = x
    for i in tl.static_range(12):
        if 2 << i <= SIZE:  # decided when compiling
            y = tl.reshape(y, (x.numel // (AFTER * 2 << i), 2, AFTER << i))
            if IN_INTERPRETER:
                partner = tl.sum(y, 1, keep_dims=True) - y
            else:
                bits = y.to(tl.int32, bitcast=True)
                partner = (tl.xor_sum(bits, 1, keep_dims=True) ^ bits).to(tl.float32, bitcast=True)
            y = y * sign + partner
    return tl.reshape(y, x.shape)
