"""The inner steps of attention in Triton: one block of keys and values added to a running softmax.

Tiles. Keys lie along the matrix units' long side and queries (the heads of a group, and in prefill their
tokens) along the short one, so a small group wastes little. A block of keys is cut into one slice per
warp (`dot` over a batch of WARPS slices): every warp keeps a softmax of its own, and warps meet once, after
their last key. With one shared softmax they would wait for each other twice per block.

int8 without converting K, and V without byte loads:
 - q becomes two int8 terms, q = step * (254 * hi + lo): 16 bits. hi and lo are neighbouring columns of one
   operand, and q·k comes from int8 matrix units, exactly.
 - V is loaded as int16 pairs (dims 2i and 2i + 1), because shared memory can transpose 16-bit elements
   only. A byte permutation puts an integer under the exponent of 1024 in float16; subtracting is exact.
 - probability times V's scale is a float16. It is kept in range by `unit`, the largest scale so far: the
   accumulators hold sums of p * v * HALF_RANGE / unit.

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
def two_terms(q, N: tl.constexpr):
    """q float32 [D, N] to int8 [D, 2 * N] and step [N]: q[:, n] = step[n] * (254 * t[:, 2n] + t[:, 2n + 1])."""
    unit = tl.maximum(tl.max(tl.abs(q), 0), 1e-20) / 127.0
    x = q / unit[None, :]
    hi = tl.minimum(tl.maximum((x + ROUND) - ROUND, -127.0), 127.0)
    lo = ((x - hi) * 254.0 + ROUND) - ROUND
    lo = tl.minimum(tl.maximum(lo, -127.0), 127.0)
    terms = tl.reshape(tl.join(hi.to(tl.int8), lo.to(tl.int8)), (q.shape[0], 2 * N))
    return terms, unit / 254.0


@triton.jit
def int8_tile(
    state, terms, step, k, v_pair, k_scale, v_scale, tok, end,
    HEAD_DIM: tl.constexpr, N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the int8 rows tok [WARPS, SLICE] that come before `end` to the softmax of N queries.

    terms: int8 [WARPS, D, 2 * N]; step: float32 [1, N], from products to log2 units; v_pair: V as int16.
    """
    top, total, unit, even, odd = state
    DIM: tl.constexpr = terms.shape[1]
    HALF: tl.constexpr = even.shape[1]
    d, pair = tl.arange(0, DIM), tl.arange(0, HALF)
    row = tl.minimum(tok, end - 1)  # rows that do not count are the last one again: no masks, no garbage
    k_at = k + row[:, :, None] * HEAD_DIM + d[None, None, :]
    v_at = v_pair + row[:, None, :] * (HEAD_DIM // 2) + pair[None, :, None]  # [WARPS, D / 2, SLICE]
    if DIM == HEAD_DIM and 2 * HALF == HEAD_DIM:
        keys, pairs = tl.load(k_at), tl.load(v_at)
    else:
        keys = tl.load(k_at, (d < HEAD_DIM)[None, None, :], 0)
        pairs = tl.load(v_at, (pair < HEAD_DIM // 2)[None, :, None], 0)
    ks, vs = tl.load(k_scale + row), tl.load(v_scale + row)
    product = tl.dot(keys, terms, out_dtype=tl.int32)  # [WARPS, SLICE, 2 * N]
    hi, lo = tl.split(tl.reshape(product, (product.shape[0], product.shape[1], N, 2)))
    score = (hi * 254 + lo).to(tl.float32) * ks[:, :, None]
    score = tl.where((tok < end)[:, :, None], score, UNSEEN)
    new_top = tl.maximum(top, tl.max(score, 1))
    prob = tl.exp2((score - new_top[:, None, :]) * step[:, None, :])
    keep = tl.exp2((top - new_top) * step)
    total = total * keep[:, None, :] + prob
    vs = tl.where(score > UNSEEN, vs[:, :, None], 0.0)  # for each query, and so where the scores are
    new_unit = tl.maximum(unit, tl.max(vs, 1))
    inverse = 1.0 / new_unit
    weight = (prob * (vs * (inverse * HALF_RANGE)[:, None, :])).to(tl.float16)
    keep = (keep * (unit * inverse))[:, None, :]
    v_even, v_odd = unpack_pairs(pairs, INTERPRET)
    even = tl.dot(v_even, weight, even * keep)
    odd = tl.dot(v_odd, weight, odd * keep)
    return new_top, total, new_unit, even, odd


@triton.jit
def float_tile(state, q, step, k, v, tok, end, HEAD_DIM: tl.constexpr, INTERPRET: tl.constexpr):
    """Add the full-precision slots tok [WARPS, SLICE] that come before `end` to the softmax.

    q: [WARPS, D, N] in the slots' dtype; step: from products to log2 units.
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
    score = tl.where((tok < end)[:, :, None], score, UNSEEN)
    new_top = tl.maximum(top, tl.max(score, 1))
    prob = tl.exp2((score - new_top[:, None, :]) * step)
    keep = tl.exp2((top - new_top) * step)
    total = total * keep[:, None, :] + prob
    out = tl.dot(values, prob.to(values.dtype), out * keep[:, None, :], input_precision="ieee")
    return new_top, total, out


@triton.jit
def merge_slices(top, total, step):
    """What each warp's slice weighs, [WARPS, N], and the program's largest score and sum of weights, [N]."""
    best = tl.max(top, 0)
    weight = tl.exp2((top - best[None, :]) * step)
    return weight, best, tl.sum(tl.sum(total, 1) * weight, 0)


@triton.jit
def turn_back(x, partner, frequencies, offset, d, HEAD_DIM: tl.constexpr):
    """Rotate x float32 [D, N] back by `offset` positions of RoPE, whose pairs are (i, i + D / 2).

    partner: x with the halves of D swapped. The angle is reduced in float64: a million positions on,
    float32 would be off by a tenth of a radian.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    TURN: tl.constexpr = 6.283185307179586
    angle = tl.load(frequencies + d % HALF, d < HEAD_DIM, 0.0).to(tl.float64) * offset.to(tl.float64)
    angle = (angle - tl.floor(angle / TURN) * TURN).to(tl.float32)
    sin = tl.where(d < HALF, tl.sin(angle), -tl.sin(angle))
    return x * tl.cos(angle)[:, None] + partner * sin[:, None]
