"""The inner steps of attention in Triton: one block of keys and values added to a running softmax.

Tiles. Keys lie along the matrix units' long side and queries (the heads of a group, and in prefill their
tokens) along the short one, so a small group wastes little. A block of keys is cut into one slice per
warp (`dot` over a batch of WARPS slices): every warp keeps a softmax of its own, which
the merging launch takes. With one shared softmax they would wait for each other twice per block.

int8 without converting K, and V without byte loads:
 - q becomes two int8 terms, q = step * (254 * hi + lo): 16 bits. hi and lo are neighbouring columns of one
   operand, and q·k comes from int8 matrix units, exactly.
 - V is loaded as int16 pairs (dims 2i and 2i + 1), because shared memory can transpose 16-bit elements
   only. A byte permutation puts an integer under the exponent of 1024 in float16; subtracting is exact.
 - probability times V's scale is a float16. It is kept in range by `unit`, the largest scale so far: the
   accumulators hold sums of p * v * HALF_RANGE / unit.

4 bits (formats.py has the format; two elements to a byte, i and i + head_dim / 2):
 - K's bytes become two int8 tiles, low and high halves, by a mask and a shift of four bytes at a time; each
   meets its half of q. base * sum(q) is added to the score, so that integers stay in 0 .. 15.
 - V is loaded as int16: four elements. A masked nibble IS a float16: its bits stand in the lowest ones, which makes
   it a subnormal number, u * 2**-24 or, four bits up, u * 2**-20. Matrix units take those exactly, and the
   power of two is undone once, at the end: 5 instructions for 8 elements. base * p is summed apart.
 - Matrix units truncate what they add up. These sums have terms of one sign and base * p is taken off again, so
   the loss would show; a block's sum starts from zero, and a multiply-add, which rounds, adds it to the others.

A running softmax is a tuple (top, total, ...): top [WARPS, Q] the largest score so far, in whatever unit
`step` turns into log2; total [WARPS, SLICE, Q] sums of weights, added up only at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE = tl.constexpr(-1.0e30)  # below any score, and finite: minus itself it is 0, not NaN
UNSEEN = tl.constexpr(-2.0e30)  # the score of what must not be seen: its weight is 0 even beside NEGATIVE
HALF_RANGE = tl.constexpr(32768.0)  # the largest weight in float16
ROUND = tl.constexpr(12582912.0)  # adding and subtracting it rounds a float32 to nearest even


@triton.jit
def unpack_pairs(x, INTERPRET: tl.constexpr):
    """int16 elements, each two int8 (low byte first), to two float16 tensors of the same values."""
    if INTERPRET:  # the interpreter knows no assembly
        even = ((x << 8).to(tl.int16) >> 8).to(tl.float16)
        odd = (x >> 8).to(tl.float16)
    else:
        even, odd = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 u, e, o, bias;
            xor.b32 u, $2, 0x80808080;
            prmt.b32 e, u, 0x64646464, 0x4240;
            prmt.b32 o, u, 0x64646464, 0x4341;
            mov.b32 bias, 0x64806480;
            sub.f16x2 $0, e, bias;
            sub.f16x2 $1, o, bias;
            }
            """,
            "=r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@triton.jit
def unpack_bytes(x, INTERPRET: tl.constexpr):
    """int8 elements, each two integers of 4 bits, to two int8 tensors: low halves and high halves."""
    if INTERPRET:
        low, high = x & 15, (x >> 4) & 15
    else:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up;
            and.b32 $0, $2, 0x0F0F0F0F;
            shr.u32 up, $2, 4;
            and.b32 $1, up, 0x0F0F0F0F;
            }
            """,
            "=r,=r,r",
            [x],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def unpack_quads(x, INTERPRET: tl.constexpr):
    """int16 elements, each four integers of 4 bits, to four float16 tensors: u * 2**-24, 2**-20, 2**-24, 2**-20."""
    if INTERPRET:
        unit = 5.960464477539063e-08
        a = ((x & 15).to(tl.float32) * unit).to(tl.float16)
        b = ((x & 240).to(tl.float32) * unit).to(tl.float16)
        c = (((x >> 8) & 15).to(tl.float32) * unit).to(tl.float16)
        d = (((x >> 8) & 240).to(tl.float32) * unit).to(tl.float16)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up;
            and.b32 $0, $4, 0x000F000F;
            and.b32 $1, $4, 0x00F000F0;
            shr.u32 up, $4, 8;
            and.b32 $2, up, 0x000F000F;
            and.b32 $3, up, 0x00F000F0;
            }
            """,
            "=r,=r,=r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@triton.jit
def scale_and_base(x):
    """An int32 that holds two float16, the scale first; both as float32."""
    scale = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    base = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, base


@triton.jit
def lowest_byte(x):
    """The integer, from -128 to 127, that was rounded by adding ROUND to it: int8. A conversion would take longer."""
    return x.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def two_terms(q, unit, N: tl.constexpr):
    """q float32 [D, N] to int8 [D, 2 * N]: q[:, n] = unit[n] / 254 * (254 * t[:, 2n] + t[:, 2n + 1]).

    unit: float32 [N], a 127th of the largest element. The sums over D of what the terms stand for, [1, N], too.
    """
    x = q * (1.0 / unit)[None, :]
    high = x + ROUND  # its lowest bits are the integer; within 127 because `unit` is the largest element's 127th
    hi = high - ROUND
    low = (x - hi) * 254.0 + ROUND
    terms = tl.reshape(tl.join(lowest_byte(high), lowest_byte(low)), (q.shape[0], 2 * N))
    return terms, tl.sum(hi * 254.0 + (low - ROUND), 0)[None, :]


@triton.jit
def whole(product, N: tl.constexpr):
    """int32 [WARPS, SLICE, 2 * N], products with both terms, to float32 [WARPS, SLICE, N]."""
    hi, lo = tl.split(tl.reshape(product, (product.shape[0], product.shape[1], N, 2)))
    return (hi * 254 + lo).to(tl.float32)


@triton.jit
def key_scores(
    terms, sums, k, k_scale, row,
    HEAD_DIM: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Scores of the rows `row` [WARPS, SLICE], float32 [WARPS, SLICE, N], in units of the terms' step.

    8 bits: terms[0] is int8 [WARPS, D, 2 * N]. 4 bits: terms are those of the two halves of q, and sums theirs.
    """
    DIM: tl.constexpr = terms[0].shape[1]
    d = tl.arange(0, DIM)
    if BITS == 8:
        at = k + row[:, :, None] * HEAD_DIM + d[None, None, :]
        keys = tl.load(at) if DIM == HEAD_DIM else tl.load(at, (d < HEAD_DIM)[None, None, :], 0)
        scale = tl.load(k_scale + row)
        score = whole(tl.dot(keys, terms[0], out_dtype=tl.int32), N) * scale[:, :, None]
    else:
        low, high = unpack_bytes(tl.load(k + row[:, :, None] * (HEAD_DIM // 2) + d[None, None, :]), INTERPRET)
        if GROUPS == 1:
            scale, base = scale_and_base(tl.load(k_scale + row))
            product = tl.dot(low, terms[0], out_dtype=tl.int32)
            product = tl.dot(high, terms[1], product, out_dtype=tl.int32)
            score = whole(product, N) * scale[:, :, None] + base[:, :, None] * (sums[0] + sums[1])[None]
        else:
            scale, base = scale_and_base(tl.load(k_scale + 2 * row))
            score = whole(tl.dot(low, terms[0], out_dtype=tl.int32), N) * scale[:, :, None]
            score += base[:, :, None] * sums[0][None]
            scale, base = scale_and_base(tl.load(k_scale + 2 * row + 1))
            score += whole(tl.dot(high, terms[1], out_dtype=tl.int32), N) * scale[:, :, None]
            score += base[:, :, None] * sums[1][None]
    return score


@triton.jit
def new_state(
    WARPS: tl.constexpr, SLICE: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, V_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """An empty softmax: top, total, unit, sums of weighted values, and of weighted bases (4 bits) per group."""
    top = tl.full((WARPS, N), NEGATIVE, tl.float32)
    total = tl.zeros((WARPS, SLICE, N), tl.float32)
    unit = tl.full((WARPS, N), 1e-30, tl.float32)
    if V_BITS == 8:
        even = tl.zeros((WARPS, DIM // 2, N), tl.float32)
        state = (top, total, unit, even, even)
    else:
        a = tl.zeros((WARPS, DIM // 4, N), tl.float32)
        state = (top, total, unit, a, a, a, a, total)
        if GROUPS == 2:
            state = (top, total, unit, a, a, a, a, total, total)
    return state


@triton.jit
def int_tile(
    state, terms, sums, step, k, v_pair, k_scale, v_scale, tok, end,
    HEAD_DIM: tl.constexpr, N: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the quantised rows tok [WARPS, SLICE] that come before `end` to the softmax of N queries.

    step: float32 [1, N], from scores to log2 units; v_pair: V's bytes as int16.
    """
    top, total, unit = state[0], state[1], state[2]
    row = tl.minimum(tok, end - 1)  # rows that do not count are the last one again: no masks, no garbage
    WORDS: tl.constexpr = HEAD_DIM * V_BITS // 16
    WIDE: tl.constexpr = state[3].shape[1]
    word = tl.arange(0, WIDE)
    v_at = v_pair + row[:, None, :] * WORDS + word[None, :, None]  # [WARPS, words, SLICE]
    packed = tl.load(v_at) if WIDE == WORDS else tl.load(v_at, (word < WORDS)[None, :, None], 0)
    score = key_scores(terms, sums, k, k_scale, row, HEAD_DIM, N, K_BITS, K_GROUPS, INTERPRET)
    score = tl.where((tok < end)[:, :, None], score, UNSEEN)
    new_top = tl.maximum(top, tl.max(score, 1))
    prob = tl.exp2((score - new_top[:, None, :]) * step[:, None, :])
    keep = tl.exp2((top - new_top) * step)
    total = total * keep[:, None, :] + prob
    if V_BITS == 8:
        vs = tl.where(score > UNSEEN, tl.load(v_scale + row)[:, :, None], 0.0)  # for each query, as the scores are
        new_unit = tl.maximum(unit, tl.max(vs, 1))
        inverse = 1.0 / new_unit
        weight = (prob * (vs * (inverse * HALF_RANGE)[:, None, :])).to(tl.float16)
        keep = (keep * (unit * inverse))[:, None, :]
        v_even, v_odd = unpack_pairs(packed, INTERPRET)
        even = tl.dot(v_even, weight, state[3] * keep)
        odd = tl.dot(v_odd, weight, state[4] * keep)
        after = (new_top, total, new_unit, even, odd)
    else:
        a, b, c, d = unpack_quads(packed, INTERPRET)
        if V_GROUPS == 1:
            scale, base = scale_and_base(tl.load(v_scale + row))
            vs = tl.where(score > UNSEEN, scale[:, :, None], 0.0)
            new_unit = tl.maximum(unit, tl.max(vs, 1))
            inverse = 1.0 / new_unit
            weight = (prob * (vs * (inverse * HALF_RANGE)[:, None, :])).to(tl.float16)
            bases = state[7] * keep[:, None, :] + prob * base[:, :, None]
            keep = tl.broadcast_to((keep * (unit * inverse))[:, None, :], state[3].shape)
            a = tl.fma(state[3], keep, tl.dot(a, weight))
            b = tl.fma(state[4], keep, tl.dot(b, weight))
            c = tl.fma(state[5], keep, tl.dot(c, weight))
            d = tl.fma(state[6], keep, tl.dot(d, weight))
            after = (new_top, total, new_unit, a, b, c, d, bases)
        else:
            scale, base = scale_and_base(tl.load(v_scale + 2 * row))
            high_scale, high_base = scale_and_base(tl.load(v_scale + 2 * row + 1))
            vs = tl.where(score > UNSEEN, scale[:, :, None], 0.0)
            high = tl.where(score > UNSEEN, high_scale[:, :, None], 0.0)
            new_unit = tl.maximum(unit, tl.max(tl.maximum(vs, high), 1))
            inverse = 1.0 / new_unit
            factor = (inverse * HALF_RANGE)[:, None, :]
            weight, high_weight = (prob * (vs * factor)).to(tl.float16), (prob * (high * factor)).to(tl.float16)
            bases = state[7] * keep[:, None, :] + prob * base[:, :, None]
            high_bases = state[8] * keep[:, None, :] + prob * high_base[:, :, None]
            keep = tl.broadcast_to((keep * (unit * inverse))[:, None, :], state[3].shape)
            a = tl.fma(state[3], keep, tl.dot(a, weight))
            b = tl.fma(state[4], keep, tl.dot(b, high_weight))
            c = tl.fma(state[5], keep, tl.dot(c, weight))
            d = tl.fma(state[6], keep, tl.dot(d, high_weight))
            after = (new_top, total, new_unit, a, b, c, d, bases, high_bases)
    return after


@triton.jit
def weighted_values(state, V_BITS: tl.constexpr, GROUPS: tl.constexpr):
    """What a running softmax has summed up: weighted sums of values, float32 [WARPS, dims / 2, N, 2].

    8 bits: of all dims, and the same again. 4 bits: of the lower and of the upper half of head_dim.
    """
    scaled = (state[2] * (1.0 / HALF_RANGE))[:, None, :]
    if V_BITS == 8:
        low = tl.join(state[3] * scaled, state[4] * scaled)
        high = low
    else:
        base = tl.sum(state[7], 1)[:, None, :, None]
        high_base = base
        if GROUPS == 2:
            high_base = tl.sum(state[8], 1)[:, None, :, None]
        first, second = scaled * 16777216.0, scaled * 1048576.0  # 2**24, 2**20
        low = tl.join(state[3] * first, state[5] * first) + base
        high = tl.join(state[4] * second, state[6] * second) + high_base
    return low, high


@triton.jit
def float_tile(
    state, q, step, k, v, tok, end, sink_size, HEAD_DIM: tl.constexpr, TURN_SINKS: tl.constexpr, INTERPRET: tl.constexpr
):
    """Add the full-precision slots tok [WARPS, SLICE] that come before `end` to the softmax.

    q: [WARPS, D, N] in the slots' dtype; with TURN_SINKS [WARPS, D, 2 * N], each query beside the one that stands in
    for it where sinks are looked at. step: from products to log2 units.
    """
    top, total, out = state
    DIM: tl.constexpr = q.shape[1]
    d = tl.arange(0, DIM)
    slot = tl.minimum(tok, end - 1)  # what lies beyond may be NaN, and 0 * NaN is NaN
    k_at = k + slot[:, :, None] * HEAD_DIM + d[None, None, :]
    v_at = v + slot[:, None, :] * HEAD_DIM + d[None, :, None]  # [WARPS, D, SLICE]
    if DIM == HEAD_DIM:
        keys, values = tl.load(k_at), tl.load(v_at)
    else:
        keys = tl.load(k_at, (d < HEAD_DIM)[None, None, :], 0.0)
        values = tl.load(v_at, (d < HEAD_DIM)[None, :, None], 0.0)
    if INTERPRET:  # its bfloat16 arithmetic is wrong
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    score = tl.dot(keys, q, input_precision="ieee")  # [WARPS, SLICE, N]
    if TURN_SINKS:
        own, back = tl.split(tl.reshape(score, (tok.shape[0], tok.shape[1], q.shape[2] // 2, 2)))
        score = tl.where((tok < sink_size)[:, :, None], back, own)
    score = tl.where((tok < end)[:, :, None], score, UNSEEN)
    new_top = tl.maximum(top, tl.max(score, 1))
    prob = tl.exp2((score - new_top[:, None, :]) * step)
    keep = tl.exp2((top - new_top) * step)
    total = total * keep[:, None, :] + prob
    out = tl.dot(values, prob.to(values.dtype), out * keep[:, None, :], input_precision="ieee")
    return new_top, total, out


@triton.jit
def turned(x, partner, cos, sin, d, HEAD_DIM: tl.constexpr):
    """x float32 [D, N] turned by RoPE, whose pairs are (i, i + D / 2). partner: x with the halves of D swapped.

    cos, sin: pointers to float32 [HEAD_DIM], as `model.Rope` has them. Angles are not made here: a million positions
    are so many turns that it takes float64, and all programs of all layers of a step would make the same ones.
    """
    there = d < HEAD_DIM
    return x * tl.load(cos + d, there, 0.0)[:, None] + partner * tl.load(sin + d, there, 0.0)[:, None]
