"""A part of a tile quantised by a program of one warp, in Triton (formats.py has the definition).

The part needs no other: 16 channels of keys over all 128 tokens, 16 tokens of values over all dims. It is rotated by a
product with some columns of the Hadamard matrix. So it needs few registers and little shared memory, which count for
the occupancy of `append_kernel` in every step, though a sequence closes a tile once in 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.formats import INSET
from selective_kv.kernels.bias import less_bias
from selective_kv.kernels.tile_softmax import ROUND, TILE

# `Format.inset` by bits, of keys and of values
KEY_INSETS = tl.constexpr(tuple(INSET.get((bits, True), 0.0) for bits in range(9)))
VALUE_INSETS = tl.constexpr(tuple(INSET.get((bits, False), 0.0) for bits in range(9)))

PART = 16  # channels of keys, or tokens of values, that a program quantises at a time


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
def levels(x, low, high, bad, BITS: tl.constexpr, INSET: tl.constexpr):
    """The scale and base of vectors of x: low and high are their least and largest elements, `bad` says where one is
    not finite. Returns them, which broadcast with x, and the integers: int32."""
    base = low
    if INSET > 0:
        base += tl.div_rn(high - low, tl.full(low.shape, (2.0**BITS - 1.0 + 2.0 * INSET) / INSET, tl.float32))
    base = to_bfloat16_down(base)
    scale = -to_bfloat16_down(-tl.div_rn(high - base, tl.full(low.shape, 2.0**BITS - 1.0 + INSET, tl.float32)))
    scale, base = tl.where(bad, float("nan"), scale), tl.where(bad, float("nan"), base)
    ratio = tl.div_rn(x - base, tl.broadcast_to(scale, x.shape))
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    u = (tl.minimum(tl.maximum(ratio, 0.0), 2.0**BITS - 1.0) + ROUND) - ROUND
    return scale, base, u.to(tl.int32)


@triton.jit
def not_finite(x, AXIS: tl.constexpr):
    """Where a vector along AXIS has an element that is NaN or infinite. (x - x would not do: where x is a product, that
    is fused into one instruction, and is the product's rounding.)"""
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), AXIS, keep_dims=True) > 0


@triton.jit
def load_tokens(slots, chunk, chunk_stride, pos, d, start, sink_size, ring_size, HEAD_DIM: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """Elements d [K] of the tokens at pos [N]: from `chunk`, which begins at `start`; older ones from their slots."""
    slot = sink_size + (pos - sink_size) % ring_size
    old = pos >= 0
    if CHUNK:
        old = pos < start
    # from L2: before its wait a launch has no promise that L1 holds nothing older
    x = tl.load(
        slots + slot[:, None] * HEAD_DIM + d[None, :], old[:, None] & (d < HEAD_DIM)[None, :], 0.0, cache_modifier=".cg"
    )
    if CHUNK:
        at = chunk + (pos - start)[:, None].to(tl.int64) * chunk_stride + d[None, :]
        y = tl.load(at, (pos >= start)[:, None] & (d < HEAD_DIM)[None, :], 0.0)
        x = tl.where(old[:, None], x, y.to(x.dtype))
    return x


@triton.jit
def rotated_part(
    slots, chunk, chunk_stride, rotation, pos, column, start, sink_size, ring_size, pairs, within, turned,
    HEAD_DIM: tl.constexpr, ROTATION: tl.constexpr, BALANCED: tl.constexpr, CHUNK: tl.constexpr,
    PAIRS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The channels `column` [C] of the rotated vectors of the tokens at pos [N]: float32 [N, C]; and, where BALANCED,
    the sums of all their squares, [N]. With PAIRS, of keys less their bias: N is TILE then."""
    K: tl.constexpr = 16
    dtype: tl.constexpr = tl.float32 if INTERPRET else slots.dtype.element_ty
    x = tl.zeros((pos.shape[0], column.shape[0]), tl.float32)
    squares = tl.zeros((pos.shape[0],), tl.float32)
    if ROTATION > 1 or BALANCED:
        for first in range(0, HEAD_DIM, K):
            d = first + tl.arange(0, K)
            part = load_tokens(slots, chunk, chunk_stride, pos, d, start, sink_size, ring_size, HEAD_DIM, CHUNK)
            if PAIRS > 0:
                part = less_bias(part, d, pairs, within, turned, HEAD_DIM, PAIRS)
            if BALANCED:
                wide = part.to(tl.float32)
                squares += tl.sum(wide * wide, 1)
            if ROTATION > 1:
                at = rotation + d[:, None] * HEAD_DIM + column[None, :]
                hadamard = tl.load(at, (d < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :], 0.0)
                x = tl.dot(part.to(dtype), hadamard.to(dtype), x, input_precision="ieee")
    if ROTATION > 1:
        x *= ROTATION**-0.5
    else:
        x = load_tokens(slots, chunk, chunk_stride, pos, column, start, sink_size, ring_size, HEAD_DIM, CHUNK)
        if PAIRS > 0:
            x = less_bias(x, column, pairs, within, turned, HEAD_DIM, PAIRS)
        x = x.to(tl.float32)
    return x, squares


@triton.jit
def close_keys(
    slots, chunk, chunk_stride, rotation, codes, scales, factors, first_pos, block, start, sink_size, ring_size,
    pairs, within, turned,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, ROTATION: tl.constexpr, BALANCED: tl.constexpr, CHUNK: tl.constexpr,
    PAIRS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Quantise a block of channels of the tile of keys at positions first_pos and on. codes, scales, factors, turned:
    the tile's own; pairs, within: the KV head's."""
    token = tl.arange(0, TILE)
    column = block * 16 + tl.arange(0, 16)
    x, squares = rotated_part(
        slots, chunk, chunk_stride, rotation, first_pos + token, column, start, sink_size, ring_size,
        pairs, within, turned, HEAD_DIM, ROTATION, BALANCED, CHUNK, PAIRS, INTERPRET,
    )  # fmt: skip
    if BALANCED:
        norm = tl.sqrt_rn(squares) * HEAD_DIM**-0.5
        factor = -to_bfloat16_down(-norm)
        factor = tl.where((norm > 0) & (norm < float("inf")), factor, 1.0)
        x = tl.div_rn(x, tl.broadcast_to(factor[:, None], x.shape))
        if block == 0:
            half = tl.arange(0, 2)[:, None]
            bits = (tl.reshape(factor, (2, TILE // 2)).to(tl.int32, bitcast=True) >> 16) & 0xFFFF
            tl.store(factors + tl.arange(0, TILE // 2), tl.sum(bits << (16 * half), 0))
    low, high = tl.min(x, 0, keep_dims=True), tl.max(x, 0, keep_dims=True)
    scale, base, u = levels(x, low, high, not_finite(x, 0), BITS, KEY_INSETS[BITS])
    there = column < HEAD_DIM
    tl.store(scales + column, tl.reshape(one_word(scale, base), (16,)), there)
    if BITS == 8:
        store_plane(u ^ 128, codes, token, column, 8, 1, 16, HEAD_DIM)
    elif BITS == 3:
        store_planes_3(u, codes, token, column, HEAD_DIM)
    else:
        store_plane(u, codes, token, column, BITS, 8 // BITS, 16, HEAD_DIM)


@triton.jit
def store_plane(
    u, codes, token, column,
    BITS: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Pack u, int32 [N, C] of PARTS equal groups of tokens, and store the bytes.

    token: of the rows of u; the first group's are the rows of the plane.
    """
    N: tl.constexpr = u.shape[0] // PARTS
    shift = (BITS * tl.arange(0, PARTS))[:, None, None]
    byte = tl.sum(tl.reshape(u, (PARTS, N, C)) << shift, 0)
    row = tl.min(tl.reshape(token, (PARTS, N)), 0)  # the first group's
    at = codes + row[:, None] * HEAD_DIM + column[None, :]
    tl.store(at, byte.to(tl.uint8).to(codes.dtype.element_ty, bitcast=True), (column < HEAD_DIM)[None, :])


@triton.jit
def store_planes_3(u, codes, token, column, HEAD_DIM: tl.constexpr):
    """`store_plane` of 3 bits. u: int32 [N, C], of four equal groups of tokens and of whole pairs of dims."""
    N: tl.constexpr = u.shape[0] // 4
    PAIRS: tl.constexpr = u.shape[1] // 2
    six = tl.sum(tl.reshape(u, (4, N, PAIRS, 2)) << (3 * tl.arange(0, 2))[None, None, None, :], 3)
    group = tl.arange(0, 4)[:, None, None]
    row = tl.min(tl.reshape(token, (4, N)), 0)
    pair = tl.min(tl.reshape(column, (PAIRS, 2)), 1) // 2
    at = codes + row[:, None] * (HEAD_DIM // 2) + pair[None, :]
    for j in tl.static_range(3):  # the last group's six bits are shared out among the planes
        byte = tl.sum(tl.where(group == j, six, tl.where(group == 3, ((six >> (2 * j)) & 3) << 6, 0)), 0)
        byte = byte.to(tl.uint8).to(codes.dtype.element_ty, bitcast=True)
        tl.store(at + j * (16 * HEAD_DIM), byte, (pair < HEAD_DIM // 2)[None, :])


@triton.jit
def close_values(
    slots, chunk, chunk_stride, rotation, codes, scales, first_pos, block, start, sink_size, ring_size,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, ROTATION: tl.constexpr, CHUNK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Quantise 16 tokens of the tile of values at positions first_pos and on: those that share bytes."""
    DIM: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 16))
    SHARED: tl.constexpr = 4 if BITS == 3 else 8 // BITS  # tokens whose integers share bytes
    ROWS: tl.constexpr = 16 // SHARED
    i = tl.arange(0, 16)
    token = i // ROWS * (TILE // SHARED) + block * ROWS + i % ROWS
    column = tl.arange(0, DIM)
    x, _squares = rotated_part(
        slots, chunk, chunk_stride, rotation, first_pos + token, column, start, sink_size, ring_size,
        scales, scales, scales, HEAD_DIM, ROTATION, False, CHUNK, 0, INTERPRET,
    )  # fmt: skip
    there = (column < HEAD_DIM)[None, :]
    low = tl.min(tl.where(there, x, float("inf")), 1, keep_dims=True)
    high = tl.max(tl.where(there, x, float("-inf")), 1, keep_dims=True)
    scale, base, u = levels(x, low, high, not_finite(x, 1), BITS, VALUE_INSETS[BITS])
    tl.store(scales + token, tl.reshape(one_word(scale, base), (16,)))
    if BITS == 8:
        store_plane(u ^ 128, codes, token, column, 8, 1, DIM, HEAD_DIM)
    elif BITS == 3:
        store_planes_3(u, codes, token, column, HEAD_DIM)
    else:
        store_plane(u, codes, token, column, BITS, 8 // BITS, DIM, HEAD_DIM)
