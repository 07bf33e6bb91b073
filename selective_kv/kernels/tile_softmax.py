"""Online softmax: one block of a tile's keys and values, in Triton.

Orientation, and a softmax of each warp's own: as in `online_softmax.py`.

A block holds PARTS tokens of every packed row: part j of row r is token r + j * TILE / PARTS. PARTS is the number of
tokens whose integers share bytes, the larger one of keys and of values. So keys and values are unpacked into PARTS
operands of ROWS tokens each. They are never joined: scores, weights and products with values stay PARTS tensors. With 3
bits, whose bytes hold several dims too, an operand has every second dim of keys, or every fourth dim of values.

Keys. The channels' scales multiply the query, once a block (`tile_query`), and their bases become one number a head, so
that the loop over tokens has neither. The scaled query is two int8 terms, step * (254 * hi + lo): 16 bits. hi and lo
are neighbouring columns of one operand, and int8 matrix units compute q·k exactly. A token's factor multiplies its
score.

Values. A probability times its value's scale is a float16. Dividing by `unit`, the largest scale so far, keeps it in
range: sums are of p * u * HALF_RANGE / unit. The bases' part, the sum of p * base, is the same in all dims, and is kept
apart. Matrix units truncate sums. Below 8 bits the sums have terms of one sign, from which the bases are subtracted
again, so the loss would show: there a block's sum starts from zero, and a multiply-add, which rounds, adds it to the
others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.kernels.basics import NEGATIVE, ROUND, TILE, reciprocal
from selective_kv.kernels.bias import bias_scores, bias_terms, load_within
from selective_kv.kernels.unpack import (
    key_bytes_2,
    key_bytes_3,
    key_bytes_4,
    scale_and_base,
    value_pairs_2,
    value_pairs_4,
    value_pairs_8,
    value_quads_3,
)

HALF_RANGE = tl.constexpr(32768.0)  # the largest weight in float16


@triton.jit
def lowest_byte(x):
    """The integer, from -128 to 127, that was rounded by adding ROUND to it: int8. A conversion would take longer."""
    return x.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def two_terms(q, unit, N: tl.constexpr, DIVIDE: tl.constexpr):
    """q float32 [D, N] to int8 [D, 2 * N]: q[:, n] = unit[n] / 254 * (254 * t[:, 2n] + t[:, 2n + 1]).

    unit: float32 [N], at least a 127th of the largest element.
    """
    x = q * reciprocal(unit, DIVIDE)[None, :]
    high = x + ROUND  # its lowest bits are the integer
    low = (x - (high - ROUND)) * 254.0 + ROUND
    return tl.reshape(tl.join(lowest_byte(high), lowest_byte(low)), (q.shape[0], 2 * N))


@triton.jit
def whole(product, N: tl.constexpr):
    """int32 [WARPS, ROWS, 2 * N], products with both terms, to float32 [WARPS, ROWS, N]."""
    hi, lo = tl.split(tl.reshape(product, (product.shape[0], product.shape[1], N, 2)))
    return (hi * 254 + lo).to(tl.float32)


@triton.jit
def load_rows(plane, row, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Bytes of the rows `row` [WARPS, ROWS] of a plane: int8 [WARPS, ROWS, DIM]."""
    d = tl.arange(0, DIM)
    at = plane + row[:, :, None] * HEAD_DIM + d[None, None, :]
    return tl.load(at) if DIM == HEAD_DIM else tl.load(at, (d < HEAD_DIM)[None, None, :], 0)


@triton.jit
def load_columns(plane, row, WIDE: tl.constexpr, WORDS: tl.constexpr):
    """Pairs of bytes of the rows `row` [WARPS, ROWS] of a plane: int16 [WARPS, WIDE, ROWS]."""
    word = tl.arange(0, WIDE)
    at = plane + row[:, None, :] * WORDS + word[None, :, None]
    return tl.load(at) if WIDE == WORDS else tl.load(at, (word < WORDS)[None, :, None], 0)


@triton.jit
def key_parts(k, row, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
              INTERPRET: tl.constexpr):  # fmt: skip
    """A tuple of PARTS int8 tensors [WARPS, ROWS, DIM]: the tokens row + j * TILE / PARTS of the tile at k. Of 3 bits
    the even dims of token j and then its odd dims: eight tensors of DIM dims."""
    if BITS == 8:
        parts = (load_rows(k, row, DIM, HEAD_DIM),)
        if PARTS >= 2:
            parts = (parts[0], load_rows(k, row + TILE // PARTS, DIM, HEAD_DIM))
        if PARTS == 4:
            parts = (
                parts[0], parts[1], load_rows(k, row + 64, DIM, HEAD_DIM), load_rows(k, row + 96, DIM, HEAD_DIM)
            )  # fmt: skip
    elif BITS == 4:
        parts = key_bytes_4(load_rows(k, row, DIM, HEAD_DIM), INTERPRET)
        if PARTS == 4:
            odd = key_bytes_4(load_rows(k, row + 32, DIM, HEAD_DIM), INTERPRET)
            parts = (parts[0], odd[0], parts[1], odd[1])
    elif BITS == 2:
        parts = key_bytes_2(load_rows(k, row, DIM, HEAD_DIM), INTERPRET)
    else:
        BYTES: tl.constexpr = HEAD_DIM // 2  # of a row of a plane
        parts = key_bytes_3(
            load_rows(k, row, DIM, BYTES), load_rows(k + 32 * BYTES, row, DIM, BYTES),
            load_rows(k + 64 * BYTES, row, DIM, BYTES), INTERPRET,
        )  # fmt: skip
    return parts


@triton.jit
def value_parts(v, row, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
                INTERPRET: tl.constexpr):  # fmt: skip
    """Float16 tensors [WARPS, WIDE, ROWS] of the tokens row + j * TILE / PARTS of the tile at v (int16): of token 0
    the even dims and the odd ones, and so on. Of 3 bits four tensors a token, of every fourth dim, those of dims
    4 i + 1 and 4 i + 3 8 times as large. Below 8 bits all are SUBNORMAL times their place in the byte as large."""
    WORDS: tl.constexpr = HEAD_DIM // 2
    if BITS == 8:
        a = value_pairs_8(load_columns(v, row, WIDE, WORDS), INTERPRET)
        parts = (a[0], a[1])
        if PARTS >= 2:
            b = value_pairs_8(load_columns(v, row + TILE // PARTS, WIDE, WORDS), INTERPRET)
            parts = (a[0], a[1], b[0], b[1])
        if PARTS == 4:
            c = value_pairs_8(load_columns(v, row + 64, WIDE, WORDS), INTERPRET)
            d = value_pairs_8(load_columns(v, row + 96, WIDE, WORDS), INTERPRET)
            parts = (a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1])
    elif BITS == 4:
        a = value_pairs_4(load_columns(v, row, WIDE, WORDS), INTERPRET)
        parts = (a[0], a[2], a[1], a[3])
        if PARTS == 4:
            b = value_pairs_4(load_columns(v, row + 32, WIDE, WORDS), INTERPRET)
            parts = (a[0], a[2], b[0], b[2], a[1], a[3], b[1], b[3])
    elif BITS == 2:
        a = value_pairs_2(load_columns(v, row, WIDE, WORDS), INTERPRET)
        parts = (a[0], a[4], a[1], a[5], a[2], a[6], a[3], a[7])
    else:
        QUADS: tl.constexpr = HEAD_DIM // 4
        parts = value_quads_3(
            load_columns(v, row, WIDE, QUADS), load_columns(v + 32 * QUADS, row, WIDE, QUADS),
            load_columns(v + 64 * QUADS, row, WIDE, QUADS), INTERPRET,
        )  # fmt: skip
    return parts


@triton.jit
def new_state(WARPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, V_BITS: tl.constexpr):
    """An empty softmax: top, the largest score in log2 units [WARPS, N]; total, sums of weights that are still to be
    added up [WARPS, ROWS, N]; unit [WARPS, N]; sums of weighted bases, like total; sums of weighted values: of even
    dims and odd ones [WARPS, DIM / 2, N], or, where `value_parts` has four tensors a token, of every fourth dim."""
    total = tl.zeros((WARPS, ROWS, N), tl.float32)
    state = tl.full((WARPS, N), NEGATIVE, tl.float32), total, tl.full((WARPS, N), 1e-30, tl.float32), total
    if V_BITS == 3:
        values = tl.zeros((WARPS, DIM // 4, N), tl.float32)
        state = state + (values, values, values, values)  # noqa: RUF005
    else:
        values = tl.zeros((WARPS, DIM // 2, N), tl.float32)
        state = state + (values, values)  # noqa: RUF005
    return state


@triton.jit
def channels(k_scale, d, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Scale and base of the channels d [DIM] of a tile: two float32 tensors."""
    words = tl.load(k_scale + d, d < HEAD_DIM, 0) if DIM > HEAD_DIM else tl.load(k_scale + d)
    return scale_and_base(words)


@triton.jit
def tile_query(
    query, k_scale, log2_scale, HEAD_DIM: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """What the queries become for one tile of keys, whose scales and bases are at k_scale.

    query: a tuple of float32 [DIM, N], rotated where the keys are: of all dims, or of even ones and of odd ones (3
    bits). log2_scale: from q·k to log2 units. Returns step and offset [N], and for each of the tuple terms
    [DIM, 2 * N]: a score in log2 units is step * (254 * hi + lo) + offset of products with the integers.
    """
    DIM: tl.constexpr = query[0].shape[0]
    if BITS == 3:
        d = 2 * tl.arange(0, DIM)
        scale, base = channels(k_scale, d, 2 * DIM, HEAD_DIM)
        odd_scale, odd_base = channels(k_scale, d + 1, 2 * DIM, HEAD_DIM)
        one, two = query[0] * scale[:, None], query[1] * (odd_scale * 0.125)[:, None]
        largest = tl.max(tl.maximum(tl.abs(one), tl.abs(two)), 0)
        offset = tl.sum(query[0] * base[:, None] + query[1] * odd_base[:, None], 0)
        unit = tl.maximum(largest, 1e-30) * (1.0 / 127.0)
        terms = (two_terms(one, unit, N, DIVIDE), two_terms(two, unit, N, DIVIDE))
    else:
        scale, base = channels(k_scale, tl.arange(0, DIM), DIM, HEAD_DIM)
        if BITS == 8:
            base += 128.0 * scale
        scaled = query[0] * scale[:, None]
        offset = tl.sum(query[0] * base[:, None], 0)
        unit = tl.maximum(tl.max(tl.abs(scaled), 0), 1e-30) * (1.0 / 127.0)
        terms = (two_terms(scaled, unit, N, DIVIDE),)
    return (unit * (log2_scale / 254.0), offset * log2_scale) + terms  # noqa: RUF005


@triton.jit
def key_scores(
    k, row, query, HEAD_DIM: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Scores in log2 units, of keys without their factors, of the tokens row + j * TILE / PARTS of the tile at k:
    a tuple of PARTS float32 [WARPS, ROWS, N]. query: as `tile_query` returns it."""
    WARPS: tl.constexpr = row.shape[0]
    DIM: tl.constexpr = query[2].shape[0]
    keys = key_parts(k, row, DIM, HEAD_DIM, BITS, PARTS, INTERPRET)
    terms = tl.broadcast_to(query[2][None], (WARPS, DIM, 2 * N))
    step, offset = query[0][None, None, :], query[1][None, None, :]
    scores = ()
    for j in tl.static_range(PARTS):
        if BITS == 3:
            odd_terms = tl.broadcast_to(query[3][None], (WARPS, DIM, 2 * N))
            product = tl.dot(keys[2 * j], terms, out_dtype=tl.int32)
            product = tl.dot(keys[2 * j + 1], odd_terms, product, out_dtype=tl.int32)
        else:
            product = tl.dot(keys[j], terms, out_dtype=tl.int32)
        scores = scores + (whole(product, N) * step + offset,)  # noqa: RUF005
    return scores


@triton.jit
def times_factors(scores, k_factor, row, PARTS: tl.constexpr):
    """`key_scores` times the tokens' factors, of the tile at k_factor."""
    one, two = scale_and_base(tl.load(k_factor + row))  # of the tokens row and row + TILE / 2
    if PARTS == 2:
        scores = (scores[0] * one[:, :, None], scores[1] * two[:, :, None])
    else:
        three, four = scale_and_base(tl.load(k_factor + row + 32))
        scores = (
            scores[0] * one[:, :, None], scores[1] * three[:, :, None], scores[2] * two[:, :, None],
            scores[3] * four[:, :, None],
        )  # fmt: skip
    return scores


@triton.jit
def add_block(
    state, query, k, v, v_scale, k_factor, by_bias, bias_within, bias_turned, start,
    HEAD_DIM: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    PARTS: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BALANCED: tl.constexpr, PAIRS: tl.constexpr,
    WITHIN: tl.constexpr, DIVIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add WARPS * STEPS * ROWS * PARTS tokens, the first of which is `start` counted over all tiles, to the softmax.

    query: as `tile_query` returns it for their tile. k, v (as int16), v_scale and k_factor: of one KV head of one
    sequence. by_bias: what `bias_queries` returns, where PAIRS of channels have a bias that is not in the tiles, and
    WITHIN what `all_within` does. A warp unpacks and multiplies STEPS times ROWS rows, one after the other: all at once
    would take more registers than there are.
    """
    top, total, unit, bases = state[0], state[1], state[2], state[3]
    tile = start // TILE
    first = start % TILE // PARTS + (tl.arange(0, WARPS) * (STEPS * ROWS))[:, None] + tl.arange(0, ROWS)[None, :]
    k += tile.to(tl.int64) * (TILE * HEAD_DIM * K_BITS // 8)
    v += tile.to(tl.int64) * (TILE * HEAD_DIM * V_BITS // 16)
    k_factor += tile * (TILE // 2)
    v_scale += tile * TILE

    terms = by_bias[0]
    if PAIRS > 0:
        terms = bias_terms(by_bias[0], by_bias[1], bias_turned, tile, WARPS)
    scores = ()
    for s in tl.static_range(STEPS):
        part = key_scores(k, first + s * ROWS, query, HEAD_DIM, N, K_BITS, PARTS, INTERPRET)
        if BALANCED:
            part = times_factors(part, k_factor, first + s * ROWS, PARTS)
        for j in tl.static_range(PARTS):
            score = part[j]
            if PAIRS > 0:
                if WITHIN:
                    cos_sin = by_bias[2 + j]
                else:
                    cos_sin = load_within(bias_within, first + (s * ROWS + j * (TILE // PARTS)), 2 * PAIRS)
                score += bias_scores(terms, cos_sin)
            scores = scores + (score,)  # noqa: RUF005
    best, largest = scores[0], tl.zeros(scores[0].shape, tl.float32)
    v_steps, v_bases = (), ()
    for s in tl.static_range(STEPS):
        for j in tl.static_range(PARTS):
            score = scores[s * PARTS + j]
            best = tl.maximum(best, score)
            step, base = scale_and_base(tl.load(v_scale + first + (s * ROWS + j * (TILE // PARTS))))
            if V_BITS == 8:
                base += 128.0 * step
            # For each query, as the scores are, of which nothing is added: otherwise the compiler loads scales once
            # more, for a layout of its own.
            step = tl.fma(score, 0.0, tl.broadcast_to(step[:, :, None], score.shape))
            largest = tl.maximum(largest, step)
            v_steps, v_bases = v_steps + (step,), v_bases + (base,)  # noqa: RUF005
    new_top, new_unit = tl.maximum(top, tl.max(best, 1)), tl.maximum(unit, tl.max(largest, 1))
    keep = tl.exp2(top - new_top)
    inverse = reciprocal(new_unit, DIVIDE)  # [WARPS, N]
    total = total * keep[:, None, :]
    bases = bases * keep[:, None, :]
    keep_values = tl.broadcast_to((keep * (unit * inverse))[:, None, :], state[4].shape)
    weights = ()
    for s in tl.static_range(STEPS):
        for j in tl.static_range(PARTS):
            prob = tl.exp2(scores[s * PARTS + j] - new_top[:, None, :])
            total += prob
            bases += prob * v_bases[s * PARTS + j][:, :, None]
            part_range = HALF_RANGE  # over how many times too large this part comes from `value_parts`
            if V_BITS == 2:
                part_range = HALF_RANGE / 4.0**j
            elif V_BITS == 4 and j >= PARTS // 2:
                part_range = HALF_RANGE / 16.0
            weight = prob * (v_steps[s * PARTS + j] * (inverse * part_range)[:, None, :])
            weights = weights + (weight.to(tl.float16),)  # noqa: RUF005

    EACH: tl.constexpr = 4 if V_BITS == 3 else 2  # sums of values
    sums = ()
    for e in tl.static_range(EACH):
        if V_BITS == 8:
            sums = sums + (state[4 + e] * keep_values,)  # noqa: RUF005
        else:
            sums = sums + (tl.zeros(keep_values.shape, tl.float32),)  # noqa: RUF005
    for s in tl.static_range(STEPS):
        values = value_parts(v, first + s * ROWS, keep_values.shape[1], HEAD_DIM, V_BITS, PARTS, INTERPRET)
        for j in tl.static_range(PARTS):
            weight = weights[s * PARTS + j]
            if EACH == 2:
                sums = (tl.dot(values[2 * j], weight, sums[0]), tl.dot(values[2 * j + 1], weight, sums[1]))
            else:
                sums = (
                    tl.dot(values[4 * j], weight, sums[0]), tl.dot(values[4 * j + 1], weight, sums[1]),
                    tl.dot(values[4 * j + 2], weight, sums[2]), tl.dot(values[4 * j + 3], weight, sums[3]),
                )  # fmt: skip
    after = new_top, total, new_unit, bases
    for e in tl.static_range(EACH):
        values = sums[e]
        if V_BITS < 8:
            values = tl.fma(state[4 + e], keep_values, values)
        after = after + (values,)  # noqa: RUF005
    return after


@triton.jit
def weighted_values(state, V_BITS: tl.constexpr):
    """The unnormalised output of the online softmax, rotated as the values are: even dims and odd ones, float32
    [WARPS, DIM / 2, N] each; of 3 bits the dims 4 i, 4 i + 1, 4 i + 2, 4 i + 3, [WARPS, DIM / 4, N] each."""
    scaled = (state[2] * (1.0 / HALF_RANGE))[:, None, :]
    if V_BITS < 8:
        scaled *= 16777216.0  # over SUBNORMAL
    base = tl.sum(state[3], 1)[:, None, :]
    if V_BITS == 3:
        eighth = scaled * 0.125
        values = (
            state[4] * scaled + base, state[5] * eighth + base, state[6] * scaled + base, state[7] * eighth + base
        )  # fmt: skip
    else:
        values = (state[4] * scaled + base, state[5] * scaled + base)
    return values
