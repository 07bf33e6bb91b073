"""The key bias that is kept out of tiles, in Triton: subtracted from keys, added back to scores (maths: key_bias.py).

Dimension `term`, of TERMS = 2 * PAIRS, has the cosine of pair term / 2 at even indices and its sine at odd ones.
Products have float16 operands: cosines and sines are stored in float16, and the other factor is the sum of two float16,
its rounded value and the remainder, which is as accurate as float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(60000.0)  # float16 ends at 65,504; larger scores saturate the softmax anyway


@triton.jit
def two_halves(x):
    """float32, clamped to LARGEST, as the sum of two float16."""
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def bias_queries(q, stride_h, head, n_head, pairs, scale, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """The factors of u and of w in a score (key_bias.py), times `scale`: two float32 [TERMS, N]. head: [N], the query
    heads; pairs: those of the KV head."""
    term = tl.arange(0, 2 * PAIRS)
    channel, odd = tl.load(pairs + term // 2), term % 2 == 1
    there = (head < n_head)[None, :] & (term >= 0)[:, None]
    at = q + head[None, :] * stride_h + channel[:, None]
    by_u = tl.load(at + tl.where(odd, HEAD_DIM // 2, 0)[:, None], there, 0.0).to(tl.float32)
    by_w = tl.load(at + tl.where(odd, 0, HEAD_DIM // 2)[:, None], there, 0.0).to(tl.float32)
    return by_u * scale, by_w * tl.where(odd, -scale, scale)[:, None]


@triton.jit
def bias_terms(by_u, by_w, turned, tile, WARPS: tl.constexpr):
    """The factors of a tile's cosines and sines in a score: two float16 [WARPS, TERMS, N] that are to be added.
    by_u, by_w: from `bias_queries`."""
    TERMS: tl.constexpr = by_u.shape[0]
    term = tl.arange(0, TERMS)
    at = turned + (tile * (TERMS // 2) + term // 2) * 2
    high, low = two_halves(by_u * tl.load(at)[:, None] + by_w * tl.load(at + 1)[:, None])
    shape: tl.constexpr = (WARPS, TERMS, by_u.shape[1])
    return tl.broadcast_to(high[None], shape), tl.broadcast_to(low[None], shape)


@triton.jit
def load_within(within, token, TERMS: tl.constexpr):
    """Cosines and sines of the tokens `token` [WARPS, ROWS] of a tile: float16 [WARPS, ROWS, TERMS]."""
    return tl.load(within + token[:, :, None] * TERMS + tl.arange(0, TERMS)[None, None, :])


@triton.jit
def all_within(within, WARPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, TERMS: tl.constexpr):
    """`load_within` of all tokens of a tile, in the order of a block that is a whole tile: a tuple of PARTS."""
    token = (tl.arange(0, WARPS) * ROWS)[:, None] + tl.arange(0, ROWS)[None, :]
    found = ()
    for j in tl.static_range(PARTS):
        found = found + (load_within(within, token + j * (WARPS * ROWS), TERMS),)  # noqa: RUF005
    return found


@triton.jit
def bias_scores(terms, cos_sin):
    """The bias' part of scores: float32 [WARPS, ROWS, N]."""
    high, low = terms
    return tl.dot(cos_sin, low, tl.dot(cos_sin, high))


@triton.jit
def less_bias(x, d, pairs, within, turned, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """Channels d [K] of a tile's keys, x [TILE, K], without the bias, in their dtype. turned: of the tile."""
    term, token = tl.arange(0, 2 * PAIRS), tl.arange(0, x.shape[0])
    channel, odd = tl.load(pairs + term // 2), (term % 2 == 1)[:, None]
    u, w = tl.load(turned + term // 2 * 2)[:, None], tl.load(turned + term // 2 * 2 + 1)[:, None]
    second = (d >= HEAD_DIM // 2)[None, :]
    factor = tl.where(second == odd, u, w)
    factor = tl.where(odd & (d < HEAD_DIM // 2)[None, :], -factor, factor)
    mine = (channel[:, None] == (d % (HEAD_DIM // 2))[None, :]) & (d < HEAD_DIM)[None, :]  # beyond it x stays 0
    high, low = two_halves(tl.where(mine, factor, 0.0))
    cos_sin = tl.load(within + token[:, None] * (2 * PAIRS) + term[None, :])
    return (x.to(tl.float32) - tl.dot(cos_sin, low, tl.dot(cos_sin, high))).to(x.dtype)
