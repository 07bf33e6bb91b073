"""Chunked prefill in Triton: a chunk's queries over all that the cache held when the chunk began.

Flash attention (Dao 2023, arXiv:2307.08691) without causality: every query of the chunk sees every key
here. The chunk's attention over itself is someone else's, and the two are merged by their log-sum-exps.

Full-precision slots: one program takes QUERIES tokens of one head. A chunk has many queries, so scores are the usual
[queries, keys], the transpose of decoding's. Tiles: BLOCK_TILES of them at a time are dequantised, still rotated, into
a dense scratch block; a library's flash kernel attends over it, the result is merged, and the whole is rotated back
once. With thousands of queries this is compute-bound: the extra traffic is hidden, and the library's kernel is three
times as fast as ours was on integers (LOG.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_kv.formats import TILE as TILE_TOKENS
from selective_kv.formats import rotate, rotation_matrix, rotation_size
from selective_kv.kernels.attention_lse import LARGEST_BLOCK, attend, key_blocks
from selective_kv.kernels.basics import INTERPRET
from selective_kv.kernels.launch import launch
from selective_kv.kernels.merge import merge
from selective_kv.kernels.online_softmax import NEGATIVE, UNSEEN, apply_rope, at_slot
from selective_kv.kernels.operands import stored_bits, tile_operands
from selective_kv.kernels.tile_softmax import TILE
from selective_kv.kernels.unpack import scale_and_base
from selective_kv.regions import Regions

COUNTS = ("group", "n_token", "sink_size", "n_held", "oldest", "n_slot")
BLOCK_TILES = LARGEST_BLOCK // TILE_TOKENS  # made dense at a time


@triton.jit
def add_slots(state, q, step, k, v, slot, seen, HEAD_DIM: tl.constexpr, INTERPRET: tl.constexpr):
    """Add the tokens in the slots `slot` [KEYS], where `seen`, to the softmax. q: [QUERIES, D] in their dtype."""
    top, total, out = state
    d = tl.arange(0, q.shape[1])
    at = slot[:, None] * HEAD_DIM + d[None, :]
    mask = seen[:, None] & (d < HEAD_DIM)[None, :]
    keys, values = tl.load(k + at, mask, 0.0), tl.load(v + at, mask, 0.0)
    if INTERPRET:  # its bfloat16 arithmetic is wrong
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    score = tl.dot(q, tl.trans(keys), input_precision="ieee") * step
    score = tl.where(seen[None, :], score, UNSEEN)
    new_top = tl.maximum(top, tl.max(score, 1))
    prob = tl.exp2(score - new_top[:, None])
    keep = tl.exp2(top - new_top)
    out = tl.dot(prob.to(values.dtype), values, out * keep[:, None], input_precision="ieee")
    return new_top, total * keep + tl.sum(prob, 1), out


@triton.jit(do_not_specialize=COUNTS)
def history_kernel(
    q, k, v, cos, sin, out, lse, q_stride_b, q_stride_h, q_stride_t, slot_stride_b, slot_stride_h,
    group, n_token, sink_size, n_held, oldest, n_slot, softmax_scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    TURN_SINKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head, sequence): the n_held tokens that stand in slots, see `at_slot`.

    With TURN_SINKS, sinks are seen by queries turned by cos and sin, float32 [sequence, HEAD_DIM].
    out: [sequence, head, n_token, HEAD_DIM]; lse: float32 [sequence, head, n_token].
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    DIM: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 16))
    d = tl.arange(0, DIM)
    there = (token < n_token)[:, None] & (d < HEAD_DIM)[None, :]
    q += batch * q_stride_b + head.to(tl.int64) * q_stride_h
    x = tl.load(q + token[:, None].to(tl.int64) * q_stride_t + d[None, :], there, 0.0).to(tl.float32)
    dtype: tl.constexpr = tl.float32 if INTERPRET else k.dtype.element_ty
    log2_scale = softmax_scale * 1.4426950408889634
    state = (
        tl.full((QUERIES,), NEGATIVE, tl.float32),
        tl.zeros((QUERIES,), tl.float32),
        tl.zeros((QUERIES, DIM), tl.float32),
    )
    k += batch * slot_stride_b + kv_head * slot_stride_h
    v += batch * slot_stride_b + kv_head * slot_stride_h
    key = tl.arange(0, KEYS)
    first = n_held * 0
    if TURN_SINKS:
        swapped = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
        y = tl.load(q + token[:, None].to(tl.int64) * q_stride_t + swapped[None, :], there, 0.0).to(tl.float32)
        y = apply_rope(tl.trans(x), tl.trans(y), cos + batch * HEAD_DIM, sin + batch * HEAD_DIM, d, HEAD_DIM)
        back = tl.trans(y).to(dtype)
        for start in range(0, sink_size, KEYS):
            seen = key + start < sink_size
            state = add_slots(state, back, log2_scale, k, v, key + start, seen, HEAD_DIM, INTERPRET)
        first = sink_size
    queries = x.to(dtype)
    for start in tl.range(first, n_held, KEYS, num_stages=STAGES):
        slot = at_slot(key + start, sink_size, oldest, n_slot)
        state = add_slots(state, queries, log2_scale, k, v, slot, key + start < n_held, HEAD_DIM, INTERPRET)
    top, total, sums = state
    at = (batch * tl.num_programs(1) + head) * n_token + token
    blind = total == 0  # a query that saw nothing gets zeros
    total = tl.where(blind, 1.0, total)
    y = sums / total[:, None]
    tl.store(out + at[:, None] * HEAD_DIM + d[None, :], y.to(out.dtype.element_ty), there)
    log_sum = tl.where(blind, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + at, log_sum, token < n_token)


@triton.jit
def load_plane(plane, token, d, mask, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Integers of the tokens `token` [N] of a tile in one of its planes: int32 [N, D]."""
    N_ROW: tl.constexpr = TILE * BITS // 8
    byte = tl.load(plane + (token % N_ROW)[:, None] * HEAD_DIM + d[None, :], mask, 0).to(tl.int32)
    return (byte >> (token // N_ROW * BITS)[:, None]) & (2**BITS - 1)


@triton.jit
def dequantize_one(
    codes, scales, factors, out, one, first_tile, n_tile, n_token,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, BALANCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of tokens of K or of V; `one` counts sequences and KV heads."""
    n = tl.program_id(0) * BLOCK
    tile = one * n_tile + first_tile + n // TILE
    token = n % TILE + tl.arange(0, BLOCK)  # within the tile
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    mask = (token < TILE)[:, None] & (d < HEAD_DIM)[None, :]
    codes += tile * (TILE * HEAD_DIM * BITS // 8)
    if BITS == 3:
        u = load_plane(codes, token, d, mask, 2, HEAD_DIM)
        u |= load_plane(codes + 32 * HEAD_DIM, token, d, mask, 1, HEAD_DIM) << 2
    else:
        u = load_plane(codes, token, d, mask, BITS, HEAD_DIM)
    if BITS == 8:
        u ^= 128
    if KEYS:
        scale, base = scale_and_base(tl.load(scales + tile * HEAD_DIM + d, d < HEAD_DIM, 0))
        x = base[None, :] + scale[None, :] * u.to(tl.float32)
    else:
        scale, base = scale_and_base(tl.load(scales + tile * TILE + token))
        x = base[:, None] + scale[:, None] * u.to(tl.float32)
    if BALANCED:
        low, high = scale_and_base(tl.load(factors + tile * (TILE // 2) + token % (TILE // 2)))
        x *= tl.where(token < TILE // 2, low, high)[:, None]
    at = out + (one * n_token + n + tl.arange(0, BLOCK))[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, x.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["first_tile", "n_tile", "n_token"])
def dequantize_kernel(
    k_codes, v_codes, k_scale, v_scale, k_factor, k, v, first_tile, n_tile, n_token,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BALANCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, sequence and KV head, 0 for K and 1 for V): n_token tokens from first_tile on into k, v
    [sequence, KV head, n_token, HEAD_DIM]."""
    one = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        dequantize_one(
            k_codes, k_scale, k_factor, k, one, first_tile, n_tile, n_token, HEAD_DIM, K_BITS, True, BALANCED, BLOCK
        )
    else:
        dequantize_one(
            v_codes, v_scale, k_factor, v, one, first_tile, n_tile, n_token, HEAD_DIM, V_BITS, False, False, BLOCK
        )


def dequantize_tiles(regions: Regions, first: int, end: int) -> tuple[Tensor, Tensor]:
    """The stored vectors (rotated, if they are) of the tiles first to end - 1 in the slots' dtype: two tensors
    [batch, n_kv_head, token, head_dim]."""
    batch, n_kv_head, _, head_dim = regions.k.shape
    n_token = (end - first) * TILE_TOKENS
    k, v = (regions.k.new_empty(batch, n_kv_head, n_token, head_dim) for _ in "kv")
    k_bits, v_bits = stored_bits(regions)
    stored = tile_operands(regions)
    launch(dequantize_kernel, (n_token // 32, batch * n_kv_head, 2))(
        *stored, k, v, first, stored[0].shape[2], n_token, HEAD_DIM=head_dim, K_BITS=k_bits, V_BITS=v_bits,
        BALANCED=regions.k_format is not None and regions.k_format.balanced, BLOCK=32, num_warps=4,
    )  # fmt: skip
    return k, v


def rotated_heads(x: Tensor) -> Tensor:
    """`rotate(x)` in x's dtype, [batch, n_head, token, head_dim]. In 16 bits by matrix units: products with 1 and -1
    are exact and their sums float32, so that it is rounded once, as there; four passes over memory in float32 take a
    chunk 0.6 ms a layer."""
    batch, n_head, n_token, head_dim = x.shape
    if x.is_meta:  # where it would import sympy
        return x.new_empty(batch, n_token, n_head, head_dim).transpose(1, 2)
    if x.dtype == torch.float32 or INTERPRET:
        return rotate(x.float()).to(x.dtype)
    rows = x.transpose(1, 2).reshape(-1, head_dim)  # a token's heads together, as they come
    matrix = rotation_matrix(head_dim, x.device).to(x.dtype)
    y = torch.addmm(matrix[0], rows, matrix, beta=0, alpha=rotation_size(head_dim) ** -0.5)
    return y.view(batch, n_token, n_head, head_dim).transpose(1, 2)


def over_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` over any number of keys, not causally, in blocks that its kernels are quick with."""
    first, *rest = key_blocks(q, k)
    out, lse = attend(q, k[:, :, first], v[:, :, first])
    for block in rest:
        out, lse = merge(out, lse, *attend(q, k[:, :, block], v[:, :, block]))
    return out, lse


def slot_attention(
    q: Tensor, regions: Regions, start: int, sink_rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """`history_attention` over the full-precision slots alone."""
    batch, n_head, n_token, head_dim = q.shape
    n_left = regions.n_left(start + 1)
    out = torch.empty(batch, n_head, n_token, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, n_head, n_token, dtype=torch.float32, device=q.device)
    turn = sink_rope is not None and n_left > 0
    cos, sin = sink_rope if sink_rope is not None and turn else (lse, lse)  # the latter is never looked at
    assert cos.is_contiguous() and sin.is_contiguous()
    wide = head_dim > 128 or q.element_size() > 2
    queries = 64 if wide else 128
    launch(history_kernel, (triton.cdiv(n_token, queries), n_head, batch))(
        q, regions.k, regions.v, cos, sin, out, lse,
        *q.stride()[:3], *regions.k.stride()[:2], n_head // regions.k.shape[1], n_token,
        regions.sink_size, start - n_left, n_left % max(1, regions.ring_size), regions.k.shape[2], head_dim**-0.5,
        HEAD_DIM=head_dim, QUERIES=queries, KEYS=32 if wide else 64, STAGES=2 if wide else 3,
        TURN_SINKS=turn, INTERPRET=INTERPRET, num_warps=4 if wide else 8,
    )  # fmt: skip
    return out, lse


def history_attention(
    q: Tensor, regions: Regions, start: int, sink_rope: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk that begins at position `start` over what the cache held before it.

    q: [batch, n_head, token, head_dim]. What `start` pushes out of the window has left (`evict` came first).
    sink_rope: as for `decode_attention`, of the token at `start`. Returns the output, shaped like q, in its dtype or
    float32, and the log-sum-exp of its scores, float32 [batch, n_head, token].
    """
    if q.stride(3) != 1:
        q = q.contiguous()
    n_left = regions.n_left(start + 1)
    if n_left == 0 and start > 0:  # nothing has left: the slots are dense keys
        return over_dense(q, regions.k[:, :, :start], regions.v[:, :, :start])
    seen = slot_attention(q, regions, start, sink_rope)
    n_tile = n_left // TILE_TOKENS
    if regions.k_tiles is None or n_tile == 0:
        return seen
    keys, values = regions.stored()
    rotated = rotated_heads(q) if keys.format.rotated else q
    stored = None
    for first in range(0, n_tile, BLOCK_TILES):
        which = slice(first, min(first + BLOCK_TILES, n_tile))
        k, v = dequantize_tiles(regions, which.start, which.stop)
        if keys.bias is not None and not k.is_meta:
            k += keys.format.rotate(keys.bias.dense(which, k.shape[3])).flatten(1, 2).to(k.dtype)
        met = over_dense(rotated, k, v)
        stored = met if stored is None else merge(*stored, *met)
    assert stored is not None
    out = stored[0].to(q.dtype)
    return merge(*seen, rotated_heads(out) if values.format.rotated else out, stored[1], q.dtype)
