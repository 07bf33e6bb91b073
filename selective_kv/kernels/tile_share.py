"""What a program of decode attention does with its tiles: queries rotated, blocks in turn, the result rotated back."""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.kernels.basics import TILE
from selective_kv.kernels.bias import all_within
from selective_kv.kernels.hadamard import butterfly
from selective_kv.kernels.online_softmax import load_q
from selective_kv.kernels.tile_softmax import add_block, new_state, tile_query, weighted_values


@triton.jit
def tile_queries(
    q, stride_h, head, n_head, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, BITS: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """Queries rotated as keys of BITS bits are, times sqrt(ROTATION), as `tile_query` takes them: a tuple of float32
    [DIM, HEADS], of all dims or of even ones and odd ones."""
    if BITS == 3:
        DIM: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 64))
        d = 2 * tl.arange(0, DIM // 2)
        even = load_q(q, stride_h, head, n_head, d, d < HEAD_DIM)
        odd = load_q(q, stride_h, head, n_head, d + 1, d < HEAD_DIM)
        if ROTATION > 1:  # bit 0 of a dim, then the others
            queries = (butterfly(even + odd, ROTATION // 2, HEADS), butterfly(even - odd, ROTATION // 2, HEADS))
        else:
            queries = (even, odd)
    else:
        ALL: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 32))
        d = tl.arange(0, ALL)
        x = load_q(q, stride_h, head, n_head, d, d < HEAD_DIM)
        if ROTATION > 1:
            x = butterfly(x, ROTATION, HEADS)
        queries = (x,)
    return queries


@triton.jit
def tile_share(
    query, k, v, k_scale, v_scale, k_factor, by_bias, bias_within, bias_turned, lo, hi, scale,
    HEAD_DIM: tl.constexpr, WARPS: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, BALANCED: tl.constexpr, K_ROTATION: tl.constexpr, V_ROTATION: tl.constexpr,
    V_LATER: tl.constexpr, PAIRS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Tokens lo to hi - 1 of those in tiles. query: see `tile_queries`; by_bias: as for `add_block`.

    Returns of each warp weighted sums of values, a tuple of two or four [WARPS, dims / 2 or 4, HEADS], see
    `weighted_values`, largest scores in log2 units and sums of weights, [WARPS, HEADS].
    """
    HEADS: tl.constexpr = query[0].shape[1]
    DIM: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 64 if V_BITS == 3 else 32))
    BITS: tl.constexpr = K_BITS if K_BITS < V_BITS else V_BITS
    PARTS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
    BLOCK: tl.constexpr = WARPS * SLICE
    MOST: tl.constexpr = max(1, SLICE // (16 * PARTS))  # matrix units take 16 rows
    STEPS: tl.constexpr = min(MOST, max(1, SLICE * DIM // 8192))
    ROWS: tl.constexpr = SLICE // (STEPS * PARTS)
    if K_ROTATION > 1:
        scale *= K_ROTATION**-0.5
    # Where a block is a tile, all blocks meet the same cosines and sines: the loop need not load them, through memory
    # that would leave room for one program less.
    WITHIN: tl.constexpr = PAIRS > 0 and PARTS == 4 and STEPS == 1 and BLOCK == TILE
    if WITHIN:
        by_bias = by_bias + all_within(bias_within, WARPS, ROWS, PARTS, 2 * PAIRS)
    # With shorter reciprocals the compiler takes 168 registers for few bits, not 255, and 8 x 32k take 7% longer.
    DIVIDE: tl.constexpr = INTERPRET or PARTS == 4
    state = new_state(WARPS, ROWS, DIM, HEADS, V_BITS)
    if SLICE == TILE:  # long blocks
        ready = tile_query(query, k_scale + lo // TILE * HEAD_DIM, scale, HEAD_DIM, HEADS, K_BITS, DIVIDE)
        for start in tl.range(lo, hi, BLOCK, num_stages=STAGES):
            at = lo * 0 + start  # a tensor, in the interpreter too
            # of the next block, so that what it takes overlaps with this one's arithmetic
            after = tl.minimum(at + BLOCK, hi - 1) // TILE
            following = tile_query(query, k_scale + after * HEAD_DIM, scale, HEAD_DIM, HEADS, K_BITS, DIVIDE)
            state = add_block(
                state, ready, k, v, v_scale, k_factor, by_bias, bias_within, bias_turned, at, HEAD_DIM, HEADS, WARPS,
                ROWS, STEPS, PARTS, K_BITS, V_BITS, BALANCED, PAIRS, WITHIN, DIVIDE, INTERPRET,
            )  # fmt: skip
            ready = following
    else:
        for start in tl.range(lo, hi, BLOCK, num_stages=STAGES):
            at = lo * 0 + start
            ready = tile_query(query, k_scale + at // TILE * HEAD_DIM, scale, HEAD_DIM, HEADS, K_BITS, DIVIDE)
            state = add_block(
                state, ready, k, v, v_scale, k_factor, by_bias, bias_within, bias_turned, at, HEAD_DIM, HEADS, WARPS,
                ROWS, STEPS, PARTS, K_BITS, V_BITS, BALANCED, PAIRS, WITHIN, DIVIDE, INTERPRET,
            )  # fmt: skip
    sums = weighted_values(state, V_BITS)
    if V_ROTATION > 1:
        sums = rotated_back(sums, V_ROTATION, V_LATER, HEADS)
    return sums, state[0], tl.sum(state[1], 1)


@triton.jit
def rotated_back(sums, ROTATION: tl.constexpr, LATER: tl.constexpr, N: tl.constexpr):
    """`weighted_values` of rotated values, times the Hadamard matrix of size ROTATION over its root, but for its lowest
    rounds, up to size LATER, which `combine_kernel` makes: see `decode_config.rounds_later`.

    LATER 1: none. The lowest one or two bits of a dim tell the sums apart; LATER covers them all, or none of them."""
    UNIT: tl.constexpr = ROTATION**-0.5
    N_SUM: tl.constexpr = len(sums)
    a, b = sums[0] * UNIT, sums[1] * UNIT
    if N_SUM == 4:
        c, d = sums[2] * UNIT, sums[3] * UNIT
    if LATER == 1:
        a, b = a + b, a - b
        if N_SUM == 4:
            c, d = c + d, c - d
            if ROTATION > 2:
                a, b, c, d = a + c, b + d, a - c, b - d
    FIRST: tl.constexpr = max(LATER, N_SUM)  # the size of the rounds that are not made here, or have been
    SIZE: tl.constexpr = max(1, ROTATION // FIRST)
    APART: tl.constexpr = FIRST // N_SUM * N
    rotated = (butterfly(a, SIZE, APART), butterfly(b, SIZE, APART))
    if N_SUM == 4:
        rotated = rotated + (butterfly(c, SIZE, APART), butterfly(d, SIZE, APART))  # noqa: RUF005
    return rotated


@triton.jit
def store_share(
    partial, statistics, at, query, k, v, k_scale, v_scale, k_factor, by_bias, bias_within, bias_turned, lo, hi, scale,
    HEAD_DIM: tl.constexpr, WARPS: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, BALANCED: tl.constexpr, K_ROTATION: tl.constexpr, V_ROTATION: tl.constexpr,
    V_LATER: tl.constexpr, PAIRS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute `tile_share` and store its results. at: [WARPS, HEADS], their places among the partial results."""
    sums, largest, weights = tile_share(
        query, k, v, k_scale, v_scale, k_factor, by_bias, bias_within, bias_turned, lo, hi, scale, HEAD_DIM, WARPS,
        SLICE, STAGES, K_BITS, V_BITS, BALANCED, K_ROTATION, V_ROTATION, V_LATER, PAIRS, INTERPRET,
    )  # fmt: skip
    store_sums(partial + at[:, None, :] * HEAD_DIM, sums, HEAD_DIM)
    tl.store(statistics + 2 * at, largest)
    tl.store(statistics + 2 * at + 1, weights)


@triton.jit
def store_sums(to, sums, HEAD_DIM: tl.constexpr):
    """Store a tuple of two or four tensors [WARPS, dims / n, HEADS], of every n-th dim from 0, 1, ... on, side by side.
    to: pointers [WARPS, 1, HEADS]."""
    if len(sums) == 2:
        d = (2 * tl.arange(0, sums[0].shape[1])[:, None, None] + tl.arange(0, 2)[None, None, :])[None]
        tl.store(to[:, :, :, None] + d, tl.join(sums[0], sums[1]), d < HEAD_DIM)
    else:
        bit = tl.arange(0, 2)
        d = (4 * tl.arange(0, sums[0].shape[1]))[:, None, None, None] + 2 * bit[:, None] + bit[None, :]
        together = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))  # the last bit of a dim comes last
        tl.store(to[:, :, :, None, None] + d[None], together, (d < HEAD_DIM)[None])
