"""The Hadamard rotation of `formats.py` in Triton, in two ways.

`rotated_rows` multiplies blocks of tokens by the matrix, on matrix units.

`butterfly` is for one vector or a few, where time counts: a fast Walsh-Hadamard transform in registers. It has log2(n)
rounds. In each an element meets the one whose index differs in one bit: x[i] + x[j] takes the place of x[i], and x[i] -
x[j] that of x[j]. Between threads of a warp that takes one shuffle, within a thread none, and no matrix is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.kernels.basics import INTERPRET

IN_INTERPRETER = tl.constexpr(INTERPRET)


@triton.jit
def rotated_rows(x, rotation, HEAD_DIM: tl.constexpr, ROTATION: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of x [N, D] rotated, float32. rotation: pointer to [HEAD_DIM, HEAD_DIM] of 1, -1 and 0
    (`formats.rotation_matrix`); ROTATION: `formats.rotation_size`; DTYPE: that of the product's operands."""
    d = tl.arange(0, x.shape[1])
    there = d < HEAD_DIM
    at = rotation + d[:, None] * HEAD_DIM + d[None, :]
    matrix = tl.load(at) if x.shape[1] == HEAD_DIM else tl.load(at, there[:, None] & there[None, :], 0.0)
    return tl.dot(x.to(DTYPE), matrix.to(DTYPE), input_precision="ieee") * ROTATION**-0.5


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
