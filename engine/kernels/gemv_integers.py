"""A decode step's matrix products for one token where weights are integers of 8 or 4 bits.

Such a product should take as long as reading the integers does, and at 4 bits an H100 reads 28 of them a clock and
SM: converting each to float32 before it is multiplied would take longer than that. So the integers stay what they
are and the token becomes integers too, without losing anything that matters: of each 16 or 32 activations, which meet
the same 16 bytes of a row, the largest m sets a step m / 127, and an activation is two int8 terms of it,

    x = m / 127 / 254 * (254 * hi + lo),    off by at most m / 64,516: a 250th of what bfloat16 itself rounds.

Then `dp4a` multiplies four bytes by four and adds them up: 2 instructions for four weights of 8 bits, and 7 for
eight of 4 bits, the masks and the shift included. The sums are exact in int32; a group's scale multiplies its sum,
and its base the sum of the activations (`quantize.py` has the formula).

Making x into terms takes about 10 instructions an activation, so a program does it once, for `repeats` times UNITS
units of the output one after the other; the next units' weights are in flight while these are multiplied. Prologue
(norm) and epilogue (RoPE, SwiGLU, residual) are in the launch as they are in `gemv.py`.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.epilogue import Around, finish, load_epilogue, rows_of
from selective_kv.kernels.basics import INTERPRET, ROUND
from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch
from weights.modules import QuantizedWeight

SMALLEST = tl.constexpr(1e-30)  # largest activations below it are taken for zeros: 127 / m must be finite


@triton.jit
def halves(pair, FLOAT16: tl.constexpr):
    """An int32 of two 16-bit floats, the first in its low half: both as float32."""
    if FLOAT16:
        first = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def low_bytes(a, b, c, d, INTERPRET: tl.constexpr):
    """The lowest bytes of four float32, as an int32."""
    if INTERPRET:
        p, q = a.to(tl.int32, bitcast=True) & 255, b.to(tl.int32, bitcast=True) & 255
        r, s = c.to(tl.int32, bitcast=True) & 255, d.to(tl.int32, bitcast=True) & 255
        word = p | (q << 8) | (r << 16) | (s << 24)
    else:
        word = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high;
            prmt.b32 low, $1, $2, 0x0040;
            prmt.b32 high, $3, $4, 0x0040;
            prmt.b32 $0, low, high, 0x5410;
            }
            """,
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return word


@triton.jit
def two_terms(a, b, c, d, inverse, INTERPRET: tl.constexpr):
    """Four float32 of at most 127 / inverse: hi and lo of each as bytes of two int32."""
    a, b, c, d = a * inverse, b * inverse, c * inverse, d * inverse
    hi_a, hi_b, hi_c, hi_d = a + ROUND, b + ROUND, c + ROUND, d + ROUND
    lo_a, lo_b = (a - (hi_a - ROUND)) * 254 + ROUND, (b - (hi_b - ROUND)) * 254 + ROUND
    lo_c, lo_d = (c - (hi_c - ROUND)) * 254 + ROUND, (d - (hi_d - ROUND)) * 254 + ROUND
    return low_bytes(hi_a, hi_b, hi_c, hi_d, INTERPRET), low_bytes(lo_a, lo_b, lo_c, lo_d, INTERPRET)


@triton.jit
def byte(word, n):
    """The n-th byte of a word, an int8, as int32."""
    return (word << (24 - 8 * n)) >> 24


@triton.jit
def dot_bytes(w, hi, lo, INTERPRET: tl.constexpr):
    """254 * (w · hi) + w · lo, of four int8 each."""
    if INTERPRET:
        total = w * 0
        for n in tl.static_range(4):
            total += byte(w, n) * (254 * byte(hi, n) + byte(lo, n))
    else:
        total = tl.inline_asm_elementwise(
            """
            {
            .reg .s32 high, low;
            dp4a.s32.s32 high, $1, $2, 0;
            dp4a.s32.s32 low, $1, $3, 0;
            mad.lo.s32 $0, high, 254, low;
            }
            """,
            "=r,r,r,r",
            [w, hi, lo],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return total


@triton.jit
def dot_nibbles(w, hi_even, lo_even, hi_odd, lo_odd, INTERPRET: tl.constexpr):
    """254 * (u · hi) + u · lo, of w's eight nibbles u: those of even bytes' low halves first, and so on.

    even: the activations that meet the low half of each byte; odd: the high half.
    """
    if INTERPRET:
        total = w * 0
        for n in tl.static_range(4):
            total += ((w >> (8 * n)) & 15) * (254 * byte(hi_even, n) + byte(lo_even, n))
            total += ((w >> (8 * n + 4)) & 15) * (254 * byte(hi_odd, n) + byte(lo_odd, n))
    else:
        total = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 even, odd;
            .reg .s32 high, low;
            and.b32 even, $1, 0x0F0F0F0F;
            shr.u32 odd, $1, 4;
            and.b32 odd, odd, 0x0F0F0F0F;
            dp4a.s32.s32 high, even, $2, 0;
            dp4a.s32.s32 low, even, $3, 0;
            dp4a.s32.s32 high, odd, $4, high;
            dp4a.s32.s32 low, odd, $5, low;
            mad.lo.s32 $0, high, 254, low;
            }
            """,
            "=r,r,r,r,r,r",
            [w, hi_even, lo_even, hi_odd, lo_odd],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return total


@triton.jit
def words_of(at, mask, MASKED: tl.constexpr):
    return tl.load(at, mask, 0) if MASKED else tl.load(at)


@triton.jit
def largest(a, b, c, d):
    return tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))


@triton.jit(do_not_specialize=["n_out", "n_unit", "n_turned", "repeats"])
def integers_kernel(
    x, ints, row_scale, pairs, bias, norm, residual, cos, sin, out, n_out, n_unit, n_turned, repeats, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    FLOAT16: tl.constexpr, OVERLAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program: `repeats` times UNITS units of the output, for one token.

    x, norm: int32 [K / 2], two 16-bit floats each; ints: int32 [n_row, WORDS]; row_scale: float32 [n_row]. pairs: with
    4 bits int32 [n_row, n_group], scale and base in float16; with 8 bits in groups their steps, four bytes in an int32
    [n_row, n_group / 4], or uint8 [n_row, n_group] if 4 does not divide n_group. A chunk is 16 bytes of a row.
    """
    if OVERLAP:
        gdc_launch_dependents()
    PAIRED: tl.constexpr = SWIGLU or HEAD_DIM > 0
    N_GROUP: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    WORDS: tl.constexpr = N_GROUP * GROUP // 8 if BITS == 4 else K // 4
    FOURS: tl.constexpr = BITS == 8 and N_GROUP % 4 == 0  # steps that a load brings
    SCALE_WORDS: tl.constexpr = N_GROUP // 4 if FOURS else N_GROUP
    WHOLE: tl.constexpr = CHUNKS * 4 == WORDS  # every thread has as many chunks
    ROWS: tl.constexpr = 2 * UNITS if PAIRED else UNITS
    chunk, word = tl.arange(0, CHUNKS), tl.arange(0, 4)
    # Tensors are [CHUNKS, ROWS, 4] or less, in this order: so a compiler gives a thread a chunk of every row.
    column = (chunk[:, None] * 4 + word[None, :])[:, None, :]  # [CHUNKS, 1, 4]
    inside = (chunk < WORDS // 4)[:, None, None]
    group = tl.minimum(chunk * (128 // BITS) // GROUP, N_GROUP - 1) if GROUP > 0 else chunk
    scale_word = group // 4 if FOURS else group
    r = tl.arange(0, ROWS)  # the first rows of all units, then the second ones
    start = tl.program_id(0) * (UNITS * repeats)
    first, apart = rows_of(tl.minimum(start, n_unit - UNITS), n_out, HEAD_DIM, SWIGLU)
    # Units one after the other are rows one after the other: a row's offset from the first is a constant.
    row_offset = r % UNITS + r // UNITS * apart
    offset = (row_offset * WORDS)[None, :, None]
    scale_offset = (row_offset * SCALE_WORDS)[None, :] + scale_word[:, None]
    weights = words_of(ints + first.to(tl.int64) * WORDS + column + offset, inside, not WHOLE)
    scales = weights
    if GROUP > 0:
        scales = tl.load(pairs + first.to(tl.int64) * SCALE_WORDS + scale_offset)
    if OVERLAP:
        gdc_wait()

    # The token: a chunk's largest, its sum, and its terms. Of 4 bits, word p of a group has elements 2p and 2p + 1 of
    # each quarter of the group: `quantize.py` has the order.
    squares = tl.zeros((CHUNKS, 1, 4), tl.float32)
    if BITS == 4:
        QUARTER: tl.constexpr = GROUP // 8  # in pairs
        EXACT: tl.constexpr = WHOLE and K % GROUP == 0
        at = column // QUARTER * (GROUP // 2) + column % QUARTER
        a0, a1 = halves(words_of(x + at, at < K // 2, not EXACT), FLOAT16)
        b0, b1 = halves(words_of(x + at + QUARTER, at + QUARTER < K // 2, not EXACT), FLOAT16)
        c0, c1 = halves(words_of(x + at + 2 * QUARTER, at + 2 * QUARTER < K // 2, not EXACT), FLOAT16)
        d0, d1 = halves(words_of(x + at + 3 * QUARTER, at + 3 * QUARTER < K // 2, not EXACT), FLOAT16)
        if NORM:
            squares = a0 * a0 + a1 * a1 + b0 * b0 + b1 * b1 + c0 * c0 + c1 * c1 + d0 * d0 + d1 * d1
            g, h = halves(words_of(norm + at, at < K // 2, not EXACT), FLOAT16)
            a0, a1 = a0 * g, a1 * h
            g, h = halves(words_of(norm + at + QUARTER, at + QUARTER < K // 2, not EXACT), FLOAT16)
            b0, b1 = b0 * g, b1 * h
            g, h = halves(words_of(norm + at + 2 * QUARTER, at + 2 * QUARTER < K // 2, not EXACT), FLOAT16)
            c0, c1 = c0 * g, c1 * h
            g, h = halves(words_of(norm + at + 3 * QUARTER, at + 3 * QUARTER < K // 2, not EXACT), FLOAT16)
            d0, d1 = d0 * g, d1 * h
        most = tl.max(tl.maximum(largest(a0, a1, b0, b1), largest(c0, c1, d0, d1)), 2)
        sums = tl.sum((a0 + a1) + (b0 + b1) + (c0 + c1) + (d0 + d1), 2)
        most = tl.maximum(most, SMALLEST)
        inverse = (127.0 / most)[:, :, None]
        hi, lo = two_terms(a0, c0, a1, c1, inverse, INTERPRET)
        hi_odd, lo_odd = two_terms(b0, d0, b1, d1, inverse, INTERPRET)
    else:
        four = words_of(x.to(tl.pointer_type(tl.int64)) + column, column < WORDS, not WHOLE)
        a0, a1 = halves(four.to(tl.int32), FLOAT16)
        b0, b1 = halves((four >> 32).to(tl.int32), FLOAT16)
        if NORM:
            squares = a0 * a0 + a1 * a1 + b0 * b0 + b1 * b1
            four = words_of(norm.to(tl.pointer_type(tl.int64)) + column, column < WORDS, not WHOLE)
            g, h = halves(four.to(tl.int32), FLOAT16)
            a0, a1 = a0 * g, a1 * h
            g, h = halves((four >> 32).to(tl.int32), FLOAT16)
            b0, b1 = b0 * g, b1 * h
        most = tl.maximum(tl.max(largest(a0, a1, b0, b1), 2), SMALLEST)
        sums = tl.sum((a0 + a1) + (b0 + b1), 2)
        hi, lo = two_terms(a0, a1, b0, b1, (127.0 / most)[:, :, None], INTERPRET)
        hi_odd, lo_odd = hi, lo
    step = most * (1.0 / (127.0 * 254.0)) + (sums - sums)  # no number, where an activation is none
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(tl.reshape(squares, (CHUNKS * 4,)), 0) / K + eps)

    for n in range(repeats):
        index = tl.minimum(start + n * UNITS, n_unit - UNITS)
        first, apart = rows_of(index, n_out, HEAD_DIM, SWIGLU)
        row = first + tl.arange(0, UNITS)
        there = row < n_out
        epilogue = load_epilogue(bias, residual, cos, sin, row, apart, row, 0, n_turned, there, HEAD_DIM, BIAS, ADD)
        row_scales = tl.load(row_scale + first + row_offset)
        # The next units' weights; behind the last ones the last again: a mask would cost more than reading the L2.
        ahead = tl.minimum(start + tl.minimum(n + 1, repeats - 1) * UNITS, n_unit - UNITS)
        first_ahead = rows_of(ahead, n_out, HEAD_DIM, SWIGLU)[0].to(tl.int64)
        weights_ahead = words_of(ints + first_ahead * WORDS + column + offset, inside, not WHOLE)
        scales_ahead = scales
        if GROUP > 0:
            scales_ahead = tl.load(pairs + first_ahead * SCALE_WORDS + scale_offset)

        y = (
            sum_of(weights, scales, group, hi, lo, hi_odd, lo_odd, step, sums, BITS, GROUP, FOURS, INTERPRET)
            * row_scales
        )
        other = y
        if PAIRED:
            y, other = tl.split(tl.permute(tl.reshape(y, (2, UNITS)), (1, 0)))
        finish(y, other, scale, epilogue, out, row, apart, there, HEAD_DIM, SWIGLU, BIAS, ADD)
        weights, scales = weights_ahead, scales_ahead


@triton.jit
def step_of(scales, group, FOURS: tl.constexpr):
    """The step of the group `group` as float32. scales: the step, uint8; with FOURS those of four groups, int32."""
    bits = (scales >> group % 4 * 8) & 255 if FOURS else scales.to(tl.int32)
    # Set under 2**23's exponent they count ones: a conversion is slow.
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


def steps_as_loaded(weight: QuantizedWeight) -> Tensor:
    """Steps of 8 bits, [n_row, n_group]: four to an int32 where they are as many, otherwise uint8."""
    assert weight.steps is not None
    return weight.steps.view(torch.int32) if weight.steps.shape[1] % 4 == 0 else weight.steps


@triton.jit
def sum_of(
    weights, scales, group, hi, lo, hi_odd, lo_odd, step, sums,
    BITS: tl.constexpr, GROUP: tl.constexpr, FOURS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Rows' products with the token, but for the rows' units: float32 [ROWS]. weights: [CHUNKS, ROWS, 4]."""
    hi, lo = tl.broadcast_to(hi, weights.shape), tl.broadcast_to(lo, weights.shape)
    if BITS == 4:
        hi_odd, lo_odd = tl.broadcast_to(hi_odd, weights.shape), tl.broadcast_to(lo_odd, weights.shape)
        total = tl.sum(dot_nibbles(weights, hi, lo, hi_odd, lo_odd, INTERPRET), 2).to(tl.float32) * step
        scale, base = halves(scales, True)
        part = total * scale + base * sums
    else:
        part = tl.sum(dot_bytes(weights, hi, lo, INTERPRET), 2).to(tl.float32) * step
        if GROUP > 0:
            part *= step_of(scales, group[:, None], FOURS)
    return tl.sum(part, 0)


class Plan(NamedTuple):
    """What a program of `integers_kernel` takes on."""

    units: int  # of the output at a time
    repeats: int  # how many times that, one after the other
    warps: int


def chunks_of(weight: QuantizedWeight) -> int:
    """16-byte parts of a row, filled up to a power of two."""
    return max(32, triton.next_power_of_2(weight.ints.shape[1] * weight.ints.element_size() // 16))


def plan(n_unit: int, chunks: int, paired: bool, n_processor: int) -> Plan:
    """What measured best on an H100 for Llama 8B's shapes (LOG.md, 2026-11-26): a chunk or two a thread, and, up to a
    limit, as many repeats as still give every SM 16 warps.
    """
    if chunks >= 1024:
        p = Plan(2, 8, 16)
    elif chunks == 256:
        p = Plan(2 if paired else 4, 2, 8)
    else:
        p = Plan(4, 4, max(1, min(chunks // 32, 8)))
    n_program = n_processor * 16 // p.warps
    return p._replace(repeats=min(p.repeats, triton.cdiv(n_unit, p.units * n_program)))


def integers_fit(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether `run_integers` is for this token: 16-bit activations, rows of whole 16 bytes."""
    _, k = weight.shape
    return len(x) == 1 and x.element_size() == 2 and k % 16 == 0 and chunks_of(weight) <= 2048


def run_integers(x: Tensor, weight: QuantizedWeight, around: Around, p: Plan) -> Tensor:
    """The product of one token by a given plan. x: [1, k]; returns [1, n_out].

    Units at a time are rows one after the other: no more of them than there are, nor than half a head turns together.
    """
    around.check(x, weight.ints)
    units = min(p.units, 1 << (around.n_unit(weight.ints).bit_length() - 1))
    if around.turn is not None:
        units = gcd(units, around.turn.cos.shape[1] // 2)
    p = p._replace(units=units)
    overlap = processor(x.device).overlap
    n_out = around.n_out(weight.ints)
    out = torch.empty(1, n_out, dtype=x.dtype, device=x.device)
    words = weight.ints.view(torch.int32)
    pairs = words if weight.pairs is None else weight.pairs.view(torch.int32)
    if weight.steps is not None:
        pairs = steps_as_loaded(weight)
    bias, norm, residual, cos, sin = around.pointers(x)
    launch(integers_kernel, (triton.cdiv(around.n_unit(weight.ints), p.units * p.repeats),))(
        x.view(torch.int32), words, weight.scale, pairs, bias, norm.view(torch.int32), residual, cos, sin, out,
        n_out, around.n_unit(weight.ints), around.n_turned, p.repeats, around.eps,
        K=x.shape[1], BITS=weight.bits, GROUP=weight.group, UNITS=p.units, CHUNKS=chunks_of(weight), **around.constants,
        FLOAT16=x.dtype == torch.float16, OVERLAP=overlap, INTERPRET=INTERPRET, launch_pdl=overlap, num_warps=p.warps,
    )  # fmt: skip
    return out
