"""Tiles of keys and values quantised, in Triton (formats.py has the definition).

A program, of 8 warps as a rule, has a block of whole vectors of a tile: up to 128 channels of keys, each over the
tile's 128 tokens, or up to 128 tokens of values, each over all dims. One product with the Hadamard matrix rotates the
block, and the product's rows are the vectors: so a vector's elements are in the registers of four threads, and finding
its extremes takes two exchanges between them. The vectors are ordered (`place`) so that integers that share a byte are
in the registers of one thread or of neighbours.

The limit is instructions, about a dozen an element. So there is no division after a rotation or a norm, where the
reference's bits cannot be reproduced anyway: elements are multiplied by the inverse of a vector's scale, and rounded by
adding `ROUND`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.formats import INSET
from selective_kv.kernels.basics import ROUND, TILE
from selective_kv.kernels.bias import less_bias

# `Format.inset` by bits, of keys and of values
KEY_INSETS = tl.constexpr(tuple(INSET.get((bits, True), 0.0) for bits in range(9)))
VALUE_INSETS = tl.constexpr(tuple(INSET.get((bits, False), 0.0) for bits in range(9)))

ELEMENTS = 16384  # of a block, at most
LEAST = tl.constexpr(2.0**-126)  # the smallest float32 whose inverse is one too


def blocks_of(head_dim: int) -> tuple[int, int, int]:
    """Vectors in a block of keys, vectors in a block of values, and warps of a program."""
    dim = max(16, triton.next_power_of_2(head_dim))
    keys, values = min(dim, ELEMENTS // TILE.value), min(TILE.value, ELEMENTS // dim)
    return keys, values, max(1, min(8, keys * TILE.value // 2048))


@triton.jit
def to_bfloat16_down(x):
    """float32 to the next bfloat16 that is no larger, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x < 0, bits + 0xFFFF, bits) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def one_word(scale, base):
    """Two bfloat16, given as float32, in an int32: the scale in its lower half."""
    low = (scale.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    return low | (base.to(tl.int32, bitcast=True) & -65536)


@triton.jit
def least(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def extremes(x, inside, MASKED: tl.constexpr, INTERPRET: tl.constexpr):
    """The least and the largest element of each row of x, [R, 1], of those `inside` where MASKED; and whether one is
    NaN or infinite, or they are too far apart for float32."""
    below, above = x, x
    if MASKED:
        below, above = tl.where(inside, x, float("inf")), tl.where(inside, x, float("-inf"))
    if INTERPRET:  # which takes an element at a time for a function that it does not know
        low, high = tl.min(below, 1, keep_dims=True), tl.max(above, 1, keep_dims=True)
        finite = tl.abs(x) < float("inf")
        if MASKED:
            finite = finite | (inside == 0)
        bad = tl.max(tl.where(finite, 0, 1), 1, keep_dims=True) > 0
        bad = bad | ((tl.abs(high - low) < float("inf")) == 0)
    else:
        low, high = tl.reduce(below, 1, least, keep_dims=True), tl.reduce(above, 1, largest, keep_dims=True)
        bad = (tl.abs(high - low) < float("inf")) == 0
    return low, high, bad


@triton.jit
def levels(
    x, low, high, bad, BITS: tl.constexpr, INSET: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """The scale and base of the rows of x, from `extremes`: [R, 1]; and the integers, int32. Those of 8 bits are less
    128. Of an integer the lowest 16 bits count.

    EXACT: bit for bit the reference's, otherwise a tie may tip. A quotient's remainder corrects it: with a correctly
    rounded inverse that makes the quotient correctly rounded, too (Markstein 1990), because a divisor of 8 significant
    bits has none that lies closer to the middle of two float32 than what the correction is off.
    """
    MOST: tl.constexpr = 2.0**BITS - 1.0
    base = low
    if INSET > 0:
        base += tl.div_rn(high - low, tl.full(low.shape, (MOST + 2.0 * INSET) / INSET, tl.float32))
    base = to_bfloat16_down(base)
    scale = -to_bfloat16_down(-tl.div_rn(high - base, tl.full(low.shape, MOST + INSET, tl.float32)))
    scale, base = tl.where(bad, float("nan"), scale), tl.where(bad, float("nan"), base)
    inverse = tl.div_rn(tl.full(low.shape, 1.0, tl.float32), tl.maximum(scale, LEAST))
    inverse = tl.where(scale > 0, inverse, 0.0)  # of a constant row, and of a bad one
    above = x - base
    ratio = above * inverse
    if EXACT and INTERPRET:  # whose multiply-add rounds twice
        ratio = tl.div_rn(above, tl.broadcast_to(scale, x.shape))
    elif EXACT:
        factor = tl.broadcast_to(scale, x.shape)
        ratio = tl.fma(tl.fma(-ratio, factor, above), tl.broadcast_to(inverse, x.shape), ratio)
    ZERO: tl.constexpr = ROUND - (128.0 if BITS == 8 else 0.0)
    y = ratio + ZERO
    if INSET > 0 or EXACT:
        y = tl.maximum(y, ZERO)
    u = tl.minimum(y, ZERO + MOST).to(tl.int32, bitcast=True)  # also where y is NaN: not into other bits of the byte
    return scale, base, u


@triton.jit
def place(i, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The index of the vector in row i of a block: of 16 rows, each BLOCK are consecutive vectors, and the next BLOCK
    begin STEP vectors further on."""
    return i // 16 * BLOCK + i % 16 // BLOCK * STEP + i % BLOCK


@triton.jit
def load_tokens(slots, chunk, chunk_stride, first_pos, token, d, start, sink_size, ring_size, HEAD_DIM: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """Elements d [K] of the tokens [N] of the tile at first_pos: from `chunk`, which begins at position `start`, older
    ones from their slots."""
    pos = first_pos + token
    there = (d < HEAD_DIM)[None, :] & (token >= 0)[:, None]
    if CHUNK and first_pos >= start:
        at = chunk + (pos - start)[:, None].to(tl.int64) * chunk_stride + d[None, :]
        x = tl.load(at, there, 0.0).to(slots.dtype.element_ty)
    else:
        slot = sink_size + (pos - sink_size) % ring_size
        at = slots + slot[:, None] * HEAD_DIM + d[None, :]
        if CHUNK:
            x = tl.load(at, there & (pos < start)[:, None], 0.0)
            if first_pos + TILE > start:  # the one tile that is in both
                new = there & (pos >= start)[:, None]
                y = tl.load(chunk + (pos - start)[:, None].to(tl.int64) * chunk_stride + d[None, :], new, 0.0)
                x = tl.where(new, y.to(x.dtype), x)
        else:
            x = tl.load(at, there, 0.0)
    return x


@triton.jit
def rotated(
    slots, chunk, chunk_stride, rotation, first_pos, token, vector, start, sink_size, ring_size, pairs, within, turned,
    HEAD_DIM: tl.constexpr, ROTATION: tl.constexpr, KEYS: tl.constexpr, BALANCED: tl.constexpr, CHUNK: tl.constexpr,
    PAIRS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A block of vectors, times sqrt(ROTATION): float32. Of keys the channels `vector` [R] over the tokens [TILE],
    [R, TILE], and, where BALANCED, the sum of each token's squares; of values the tokens [R] over all dims, [R, DIM].
    PAIRS: of channels whose bias is taken out of keys."""
    DIM: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 16))
    N: tl.constexpr = TILE if KEYS else DIM
    dtype: tl.constexpr = tl.float32 if INTERPRET else slots.dtype.element_ty
    K: tl.constexpr = 16 if slots.dtype.element_ty == tl.float32 and not INTERPRET else min(DIM, 128)
    y = tl.zeros((vector.shape[0], N), tl.float32)
    squares = tl.zeros((token.shape[0],), tl.float32)
    if ROTATION > 1 or BALANCED:
        for first in range(0, DIM, K):
            d = first + tl.arange(0, K)
            x = load_tokens(
                slots, chunk, chunk_stride, first_pos, token, d, start, sink_size, ring_size, HEAD_DIM, CHUNK
            )  # fmt: skip
            if PAIRS > 0:
                x = less_bias(x, d, pairs, within, turned, HEAD_DIM, PAIRS)
            if BALANCED:
                wide = x.to(tl.float32)
                squares += tl.sum(wide * wide, 1)
            if ROTATION > 1:
                if KEYS:
                    row, column = vector[:, None], d[None, :]
                else:
                    row, column = d[:, None], tl.arange(0, DIM)[None, :]
                at = rotation + row * HEAD_DIM + column
                matrix = tl.load(at, (row < HEAD_DIM) & (column < HEAD_DIM), 0.0)
                if KEYS:
                    y = tl.dot(matrix.to(dtype), tl.trans(x).to(dtype), y, input_precision="ieee")
                else:
                    y = tl.dot(x.to(dtype), matrix.to(dtype), y, input_precision="ieee")
    if ROTATION == 1:
        d = vector if KEYS else tl.arange(0, DIM)
        x = load_tokens(slots, chunk, chunk_stride, first_pos, token, d, start, sink_size, ring_size, HEAD_DIM, CHUNK)
        if PAIRS > 0:
            x = less_bias(x, d, pairs, within, turned, HEAD_DIM, PAIRS)
        y = tl.trans(x).to(tl.float32) if KEYS else x.to(tl.float32)
    return y, squares


@triton.jit
def plane_bytes(six, group, PLANE: tl.constexpr, AXIS: tl.constexpr):
    """The bytes of plane PLANE of 3 bits, from the six bits of each pair of dims, int32. group: which of the four
    tokens that share bytes, along AXIS: PLANE's own has the lower six bits, the last one shares the upper two of all
    planes."""
    return tl.sum(tl.where(group == PLANE, six, tl.where(group == 3, ((six >> (2 * PLANE)) & 3) << 6, 0)), AXIS)


@triton.jit
def close_keys(
    slots, chunk, chunk_stride, rotation, codes, scales, factors, first_pos, block, start, sink_size, ring_size,
    pairs, within, turned,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, ROTATION: tl.constexpr, BALANCED: tl.constexpr,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Quantise ROWS channels, block `block` of them, of the tile of keys at positions first_pos and on. codes, scales,
    factors, turned: the tile's own; pairs, within: the KV head's."""
    token = tl.arange(0, TILE)
    i = tl.arange(0, ROWS)
    channel = block * ROWS + i
    if BITS == 3:
        channel = block * ROWS + i // 16 * 16 + i % 8 * 2 + i // 8 % 2  # a byte's two channels are eight rows apart
    x, squares = rotated(
        slots, chunk, chunk_stride, rotation, first_pos, token, channel, start, sink_size, ring_size,
        pairs, within, turned, HEAD_DIM, ROTATION, True, BALANCED, CHUNK, PAIRS, INTERPRET,
    )  # fmt: skip
    if BALANCED:
        norm = tl.sqrt_rn(squares) * HEAD_DIM**-0.5
        factor = tl.where((norm > 0) & (norm < float("inf")), -to_bfloat16_down(-norm), 1.0)  # from 2**-78 to 2**64
        x *= (ROTATION**-0.5 / factor)[None, :]
        if block == 0:
            half = tl.arange(0, 2)[:, None]
            bits = (tl.reshape(factor, (2, TILE // 2)).to(tl.int32, bitcast=True) >> 16) & 0xFFFF
            tl.store(factors + tl.arange(0, TILE // 2), tl.sum(bits << (16 * half), 0))
    elif ROTATION > 1:
        x *= ROTATION**-0.5
    low, high, bad = extremes(x, x, False, INTERPRET)
    scale, base, u = levels(x, low, high, bad, BITS, KEY_INSETS[BITS], ROTATION == 1 and not BALANCED, INTERPRET)
    there = channel < HEAD_DIM
    tl.store(scales + channel, tl.reshape(one_word(scale, base), (ROWS,)), there)
    if BITS == 3:
        bit, group = tl.arange(0, 2)[None, :, None, None, None], tl.arange(0, 4)[None, None, :, None]
        six = tl.sum(tl.reshape(u, (ROWS // 16, 2, 8, 4, 32)) << (3 * bit), 1)  # [rows of 16, pair, group, token]
        pair = block * (ROWS // 2) + tl.arange(0, ROWS // 2)
        at = codes + tl.arange(0, 32)[None, :] * (HEAD_DIM // 2) + pair[:, None]
        for j in tl.static_range(3):
            byte = tl.reshape(plane_bytes(six, group, j, 2), (ROWS // 2, 32))
            store_bytes(at + j * (16 * HEAD_DIM), byte, (pair < HEAD_DIM // 2)[:, None], HEAD_DIM % ROWS > 0)
    else:
        PARTS: tl.constexpr = 8 // BITS
        N: tl.constexpr = TILE // PARTS
        shift = (BITS * tl.arange(0, PARTS))[None, :, None]
        byte = tl.sum(tl.reshape(u, (ROWS, PARTS, N)) << shift, 1)
        at = codes + tl.arange(0, N)[None, :] * HEAD_DIM + channel[:, None]
        store_bytes(at, byte, there[:, None], HEAD_DIM % ROWS > 0)


@triton.jit
def store_bytes(at, x, there, MASKED: tl.constexpr):
    """Store the lowest byte of each element of x, int32."""
    byte = x.to(tl.uint8).to(at.dtype.element_ty, bitcast=True)
    if MASKED:
        tl.store(at, byte, there)
    else:
        tl.store(at, byte)


@triton.jit
def close_values(
    slots, chunk, chunk_stride, rotation, codes, scales, first_pos, block, start, sink_size, ring_size,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, ROTATION: tl.constexpr, CHUNK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Quantise ROWS tokens, block `block` of those that share bytes, of the tile of values at positions first_pos and
    on."""
    DIM: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 16))
    PARTS: tl.constexpr = 4 if BITS == 3 else 8 // BITS  # tokens whose integers share bytes
    EACH: tl.constexpr = 16 // PARTS
    GROUPS: tl.constexpr = ROWS // 16
    i = tl.arange(0, ROWS)
    token = block * (GROUPS * EACH) + place(i, EACH, TILE // PARTS)
    x, _squares = rotated(
        slots, chunk, chunk_stride, rotation, first_pos, token, i, start, sink_size, ring_size,
        scales, scales, scales, HEAD_DIM, ROTATION, False, False, CHUNK, 0, INTERPRET,
    )  # fmt: skip
    if ROTATION > 1:
        x *= ROTATION**-0.5
    column = tl.arange(0, DIM)[None, :]
    low, high, bad = extremes(x, column < HEAD_DIM, HEAD_DIM < DIM, INTERPRET)
    scale, base, u = levels(x, low, high, bad, BITS, VALUE_INSETS[BITS], ROTATION == 1, INTERPRET)
    tl.store(scales + token, tl.reshape(one_word(scale, base), (ROWS,)))
    row = block * (GROUPS * EACH) + tl.arange(0, GROUPS * EACH)[:, None]
    if BITS == 3:
        bit, group = tl.arange(0, 2)[None, None, None, None, :], tl.arange(0, 4)[None, :, None, None]
        six = tl.sum(tl.reshape(u, (GROUPS, 4, EACH, DIM // 2, 2)) << (3 * bit), 4)
        pair = tl.arange(0, DIM // 2)[None, :]
        at = codes + row * (HEAD_DIM // 2) + pair
        for j in tl.static_range(3):
            byte = tl.reshape(plane_bytes(six, group, j, 1), (GROUPS * EACH, DIM // 2))
            store_bytes(at + j * (16 * HEAD_DIM), byte, pair < HEAD_DIM // 2, HEAD_DIM < DIM)
    else:
        shift = (BITS * tl.arange(0, PARTS))[None, :, None, None]
        byte = tl.sum(tl.reshape(u, (GROUPS, PARTS, EACH, DIM)) << shift, 1)
        byte = tl.reshape(byte, (GROUPS * EACH, DIM))
        store_bytes(codes + row * HEAD_DIM + column, byte, column < HEAD_DIM, HEAD_DIM < DIM)
