"""Online softmax: one block of a tile's keys and values, in Triton.

Orientation, and a softmax of each warp's own: as in `online_softmax.py`.

A block holds the tokens of ROWS packed rows a warp, PARTS tokens a row: a byte of a plane of b bits holds 8 / b tokens,
and token j of row r is r + j * TILE / PARTS, where PARTS is the larger number of tokens a byte, of keys and of values.
So keys and values are unpacked into PARTS operands of ROWS tokens each, which never need to be joined: their scores,
their weights and their products with values stay PARTS tensors.

Keys. The channels' scales multiply the query, once a block, and their bases become one number a head: the loop over
tokens has neither. The scaled query is two int8 terms, step * (254 * hi + lo): 16 bits. hi and lo are neighbouring
columns of one operand, and q·k comes from int8 matrix units, exactly. A token's factor multiplies its score.

Values. Probability times a value's scale is a float16. It is kept in range by `unit`, the largest scale so far: sums
are of p * u * HALF_RANGE / unit. The bases' share, the sum of p * base, is the same in all dims, and kept apart.
Matrix units truncate what they add up. Below 8 bits, sums have terms of one sign and the bases are taken off again, so
the loss would show; a block's sum starts from zero, and a multiply-add, which rounds, adds it to the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.kernels.bias import bias_scores, bias_terms, load_within
from selective_kv.kernels.unpack import (
    key_bytes_2,
    key_bytes_3,
    key_bytes_4,
    scale_and_base,
    value_pairs_2,
    value_pairs_3,
    value_pairs_4,
    value_pairs_8,
)

TILE = tl.constexpr(128)
NEGATIVE = tl.constexpr(-1.0e30)  # below any score, and finite: minus itself it is 0, not NaN
UNSEEN = tl.constexpr(-2.0e30)  # below NEGATIVE
HALF_RANGE = tl.constexpr(32768.0)  # the largest weight in float16
ROUND = tl.constexpr(12582912.0)  # adding and subtracting it rounds a float32 to nearest even


@triton.jit
def lowest_byte(x):
    """The integer, from -128 to 127, that was rounded by adding ROUND to it: int8. A conversion would take longer."""
    return x.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def two_terms(q, unit, N: tl.constexpr):
    """q float32 [D, N] to int8 [D, 2 * N]: q[:, n] = unit[n] / 254 * (254 * t[:, 2n] + t[:, 2n + 1]).

    unit: float32 [N], at least a 127th of the largest element.
    """
    x = q * (1.0 / unit)[None, :]
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
def which_half(row, first):
    """Of 3 bits: 1 where a row, of 32 of lower bits, has the second half of the bytes of upper bits; [WARPS, ROWS] or,
    where each warp has 16 of them (`first` is the first), [WARPS, 1]: no layout has to be changed for those."""
    if row.shape[1] == 16:  # noqa: SIM108, Triton decides it when it compiles
        half = (first // 16 + tl.arange(0, row.shape[0]))[:, None]
    else:
        half = row // 16
    return half


@triton.jit
def key_parts(k, row, first, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
              INTERPRET: tl.constexpr):  # fmt: skip
    """A tuple of PARTS int8 tensors [WARPS, ROWS, DIM]: the tokens row + j * TILE / PARTS of the tile at k."""
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
        x = load_rows(k, row, DIM, HEAD_DIM)
        y = load_rows(k + 32 * HEAD_DIM, row % 16, DIM, HEAD_DIM)
        odd = tl.broadcast_to(which_half(row, first).to(tl.int8)[:, :, None], x.shape)
        parts = key_bytes_3(x, y, odd, INTERPRET)
    return parts


@triton.jit
def value_parts(v, row, first, WIDE: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
                INTERPRET: tl.constexpr):  # fmt: skip
    """Two tuples of PARTS float16 tensors [WARPS, WIDE, ROWS]: even dims, and odd ones, of the tokens
    row + j * TILE / PARTS of the tile at v (int16). Below 8 bits SUBNORMAL times its place in the byte as large."""
    if BITS == 8:
        a = value_pairs_8(load_columns(v, row, WIDE, WORDS), INTERPRET)
        even, odd = (a[0],), (a[1],)
        if PARTS >= 2:
            b = value_pairs_8(load_columns(v, row + TILE // PARTS, WIDE, WORDS), INTERPRET)
            even, odd = (a[0], b[0]), (a[1], b[1])
        if PARTS == 4:
            c = value_pairs_8(load_columns(v, row + 64, WIDE, WORDS), INTERPRET)
            d = value_pairs_8(load_columns(v, row + 96, WIDE, WORDS), INTERPRET)
            even, odd = (a[0], b[0], c[0], d[0]), (a[1], b[1], c[1], d[1])
    elif BITS == 4:
        a = value_pairs_4(load_columns(v, row, WIDE, WORDS), INTERPRET)
        even, odd = (a[0], a[1]), (a[2], a[3])
        if PARTS == 4:
            b = value_pairs_4(load_columns(v, row + 32, WIDE, WORDS), INTERPRET)
            even, odd = (a[0], b[0], a[1], b[1]), (a[2], b[2], a[3], b[3])
    else:
        x = load_columns(v, row, WIDE, WORDS)
        if BITS == 2:
            a = value_pairs_2(x, INTERPRET)
        else:
            y = load_columns(v + 32 * WORDS, row % 16, WIDE, WORDS)
            upper = tl.broadcast_to(which_half(row, first).to(tl.int16)[:, None, :], x.shape)
            a = value_pairs_3(x, y, upper, INTERPRET)
        even, odd = (a[0], a[1], a[2], a[3]), (a[4], a[5], a[6], a[7])
    return even, odd


@triton.jit
def new_state(WARPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr):
    """An empty softmax: top, the largest score in log2 units [WARPS, N]; total, sums of weights that are still to be
    added up [WARPS, ROWS, N]; unit [WARPS, N]; sums of weighted values, even dims and odd ones [WARPS, DIM / 2, N];
    sums of weighted bases, like total."""
    total = tl.zeros((WARPS, ROWS, N), tl.float32)
    even = tl.zeros((WARPS, DIM // 2, N), tl.float32)
    return (
        tl.full((WARPS, N), NEGATIVE, tl.float32), total, tl.full((WARPS, N), 1e-30, tl.float32), even, even, total
    )  # fmt: skip


@triton.jit
def add_block(
    state, query, log2_scale, k, v, k_scale, v_scale, k_factor, by_bias, bias_within, bias_turned, start,
    HEAD_DIM: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, BALANCED: tl.constexpr, PAIRS: tl.constexpr, WITHIN: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add WARPS * ROWS * PARTS tokens, the first of which is `start` counted over all tiles, to the softmax.

    query: float32 [DIM, N], rotated where the keys are; log2_scale: from q·k to log2 units. k, v (as int16), their
    scales and factors: of one KV head of one sequence. by_bias: what `bias_queries` returns, where PAIRS of channels
    have a bias that is not in the tiles, and WITHIN what `all_within` does.
    """
    top, total, unit, even, odd, bases = state
    DIM: tl.constexpr = query.shape[0]
    tile = start // TILE
    first = start % TILE // PARTS
    row = first + (tl.arange(0, WARPS) * ROWS)[:, None] + tl.arange(0, ROWS)[None, :]  # [WARPS, ROWS]
    k_tile = k + tile.to(tl.int64) * (TILE * HEAD_DIM * K_BITS // 8)
    v_tile = v + tile.to(tl.int64) * (TILE * HEAD_DIM * V_BITS // 16)
    keys = key_parts(k_tile, row, first, DIM, HEAD_DIM, K_BITS, PARTS, INTERPRET)
    evens, odds = value_parts(v_tile, row, first, DIM // 2, HEAD_DIM // 2, V_BITS, PARTS, INTERPRET)

    d = tl.arange(0, DIM)
    words = tl.load(k_scale + tile * HEAD_DIM + d, d < HEAD_DIM, 0) if DIM > HEAD_DIM else tl.load(
        k_scale + tile * HEAD_DIM + d
    )  # fmt: skip
    scale, base = scale_and_base(words)
    if K_BITS == 8:
        base += 128.0 * scale
    scaled = query * scale[:, None]
    largest = tl.maximum(tl.max(tl.abs(scaled), 0), 1e-30) * (1.0 / 127.0)
    terms = tl.broadcast_to(two_terms(scaled, largest, N)[None], (WARPS, DIM, 2 * N))
    step = (largest * (log2_scale / 254.0))[None, None, :]
    offset = (tl.sum(query * base[:, None], 0) * log2_scale)[None, None, :]

    scores = (whole(tl.dot(keys[0], terms, out_dtype=tl.int32), N) * step + offset,)
    for j in tl.static_range(1, PARTS):
        scores = scores + (whole(tl.dot(keys[j], terms, out_dtype=tl.int32), N) * step + offset,)  # noqa: RUF005
    if BALANCED:
        pair = tl.load(k_factor + tile * (TILE // 2) + row)  # of the tokens row and row + TILE / 2
        one, two = scale_and_base(pair)
        if PARTS == 2:
            scores = (scores[0] * one[:, :, None], scores[1] * two[:, :, None])
        else:
            pair = tl.load(k_factor + tile * (TILE // 2) + row + 32)
            three, four = scale_and_base(pair)
            scores = (
                scores[0] * one[:, :, None], scores[1] * three[:, :, None], scores[2] * two[:, :, None],
                scores[3] * four[:, :, None],
            )  # fmt: skip
    if PAIRS > 0:
        terms = bias_terms(by_bias[0], by_bias[1], bias_turned, tile, WARPS)
        without, scores = scores, ()
        for j in tl.static_range(PARTS):
            if WITHIN:  # noqa: SIM108, Triton decides it when it compiles
                cos_sin = by_bias[2 + j]
            else:
                cos_sin = load_within(bias_within, row + j * (TILE // PARTS), 2 * PAIRS)
            scores = scores + (without[j] + bias_scores(terms, cos_sin),)  # noqa: RUF005

    new_top = top
    new_unit = unit
    v_words = (tl.load(v_scale + tile * TILE + row),)
    for j in tl.static_range(1, PARTS):
        v_words = v_words + (tl.load(v_scale + tile * TILE + row + j * (TILE // PARTS)),)  # noqa: RUF005
    v_steps, v_bases = (), ()
    for j in tl.static_range(PARTS):
        new_top = tl.maximum(new_top, tl.max(scores[j], 1))
        step_j, base_j = scale_and_base(v_words[j])
        if V_BITS == 8:
            base_j += 128.0 * step_j
        # for each query, as the scores are: otherwise the compiler loads scales once more, for a layout of its own
        step_j = tl.where(scores[j] > UNSEEN, step_j[:, :, None], 0.0)
        new_unit = tl.maximum(new_unit, tl.max(step_j, 1))
        v_steps, v_bases = v_steps + (step_j,), v_bases + (base_j,)  # noqa: RUF005
    keep = tl.exp2(top - new_top)
    inverse = 1.0 / new_unit  # [WARPS, N]
    total = total * keep[:, None, :]
    bases = bases * keep[:, None, :]
    keep_values = tl.broadcast_to((keep * (unit * inverse))[:, None, :], even.shape)
    if V_BITS == 8:
        even_sum = even * keep_values
        odd_sum = odd * keep_values
    else:
        even_sum = tl.zeros(even.shape, tl.float32)
        odd_sum = even_sum
    for j in tl.static_range(PARTS):
        prob = tl.exp2(scores[j] - new_top[:, None, :])
        total += prob
        bases += prob * v_bases[j][:, :, None]
        part_range = HALF_RANGE  # over how many times too large this part comes from `value_parts`
        if V_BITS < 4:
            part_range = HALF_RANGE / 4.0**j
        elif V_BITS == 4 and j >= PARTS // 2:
            part_range = HALF_RANGE / 16.0
        weight = (prob * (v_steps[j] * (inverse * part_range)[:, None, :])).to(tl.float16)
        even_sum = tl.dot(evens[j], weight, even_sum)
        odd_sum = tl.dot(odds[j], weight, odd_sum)
    if V_BITS < 8:
        even_sum = tl.fma(even, keep_values, even_sum)
        odd_sum = tl.fma(odd, keep_values, odd_sum)
    return new_top, total, new_unit, even_sum, odd_sum, bases


@triton.jit
def weighted_values(state, V_BITS: tl.constexpr):
    """The unnormalised output of the online softmax: even dims and odd ones, float32 [WARPS, DIM / 2, N] each,
    rotated as the values are."""
    _top, _total, unit, even, odd, bases = state
    scaled = (unit * (1.0 / HALF_RANGE))[:, None, :]
    if V_BITS < 8:
        scaled *= 16777216.0  # over SUBNORMAL
    base = tl.sum(bases, 1)[:, None, :]
    return even * scaled + base, odd * scaled + base
