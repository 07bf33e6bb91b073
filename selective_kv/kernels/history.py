"""Chunked prefill in Triton: a chunk's queries over all that the cache held when the chunk began.

Every query of the chunk sees every key here, without causality. With thousands of queries this is compute-bound, and a
library's flash kernel over dense keys is three times as fast as ours was on integers (LOG.md). So what is held is made
dense a block at a time, in this order, which a softmax does not mind: tiles, still rotated; sinks and the ring, rotated
like them. So the blocks have the same few sizes whatever the cache keeps (cuDNN makes a plan for each), and quantised
history takes no more calls than the full cache's. The chunk's attention over itself and that over each block are
merged in one pass, which also rotates back.

Tiles of at most 4 bits are attended to in 8 (history_8bit.py), which is faster still.

Where the middle is dropped there are few slots, and sinks may be seen by turned queries: a kernel of our own (flash
attention, Dao 2023, arXiv:2307.08691) goes on with the softmax of the chunk over itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_kv.formats import TILE
from selective_kv.kernels.attention_lse import LARGEST_BLOCK, attend, key_blocks
from selective_kv.kernels.basics import INTERPRET, LN_2, LOG2_E, NEGATIVE, UNSEEN
from selective_kv.kernels.dense import dense_history, rotated_heads
from selective_kv.kernels.history_8bit import attend_8bit, quantize_queries, takes_8bit
from selective_kv.kernels.launch import launch
from selective_kv.kernels.merge import PartialResult, empty_output, merge
from selective_kv.kernels.online_softmax import apply_rope, at_slot
from selective_kv.regions import Regions

QUERIES = 64  # of a program
COUNTS = ("group", "n_token", "sink_size", "n_held", "oldest", "n_slot")


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
    q, k, v, cos, sin, own, own_lse, out, out_lse, q_stride_b, q_stride_h, q_stride_t, slot_stride_b, slot_stride_h,
    stride_b, stride_h, stride_t, group, n_token, sink_size, n_held, oldest, n_slot, softmax_scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    TURN_SINKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head, sequence): the n_held tokens that stand in slots, see `at_slot`, added to what
    the queries have seen already: own [sequence, head, n_token, HEAD_DIM] and own_lse, which is contiguous.

    With TURN_SINKS, sinks are seen by queries turned by cos and sin, float32 [sequence, HEAD_DIM]. out: like own, with
    the same strides.
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
    log2_scale = softmax_scale * LOG2_E
    at = (batch * tl.num_programs(1) + head) * n_token + token
    row = batch * stride_b + head.to(tl.int64) * stride_h + token[:, None].to(tl.int64) * stride_t + d[None, :]
    seen_before = tl.load(own_lse + at, token < n_token, 0.0)
    some = seen_before > float("-inf")
    state = (
        tl.where(some, seen_before * LOG2_E, NEGATIVE),
        tl.where(some, 1.0, 0.0),
        tl.load(own + row, there & some[:, None], 0.0).to(tl.float32),
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
    y = sums / tl.where(total == 0, 1.0, total)[:, None]  # a query that saw nothing gets zeros
    tl.store(out + row, y.to(out.dtype.element_ty), there)
    tl.store(out_lse + at, (top + tl.log2(total)) * LN_2, token < n_token)


def over_dense(q: Tensor, k: Tensor, v: Tensor) -> list[PartialResult]:
    """`attend` over any number of keys, not causally, in blocks that its kernels are quick with: each one's result."""
    return [attend(q, k[:, :, block], v[:, :, block]) for block in key_blocks(q, k)]


def slot_attention(
    q: Tensor, regions: Regions, start: int, own: PartialResult, sink_rope: tuple[Tensor, Tensor] | None
) -> PartialResult:
    """`history_attention` over the slots alone, and its log-sum-exp."""
    batch, n_head, n_token, head_dim = q.shape
    n_left = regions.n_left(start + 1)
    out, y, lse = empty_output(q, q.dtype), own[0], own[1].contiguous()
    out_lse = torch.empty(batch, n_head, n_token, dtype=torch.float32, device=q.device)
    if y.stride() != out.stride():
        y = empty_output(q, y.dtype).copy_(y)
    turn = sink_rope is not None and n_left > 0
    cos, sin = sink_rope if sink_rope is not None and turn else (lse, lse)  # the latter is never looked at
    assert cos.is_contiguous() and sin.is_contiguous()
    launch(history_kernel, (triton.cdiv(n_token, QUERIES), n_head, batch))(
        q, regions.k, regions.v, cos, sin, y, lse, out, out_lse,
        *q.stride()[:3], *regions.k.stride()[:2], *out.stride()[:3], n_head // regions.k.shape[1], n_token,
        regions.sink_size, start - n_left, n_left % max(1, regions.ring_size), regions.k.shape[2], head_dim**-0.5,
        HEAD_DIM=head_dim, QUERIES=QUERIES, KEYS=32, STAGES=2, TURN_SINKS=turn, INTERPRET=INTERPRET, num_warps=4,
    )  # fmt: skip
    return out, out_lse


def history_attention(
    q: Tensor, regions: Regions, start: int, own: PartialResult, sink_rope: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of a chunk that begins at position `start` over itself, which is `own`, and what the cache held before.

    q: [batch, n_head, token, head_dim]. What `start` pushes out of the window has left (`evict` came first). own: the
    output over the chunk, like q, and the log-sum-exp of its scores, float32 [batch, n_head, token]. sink_rope: as for
    `decode_attention`, of the token at `start`. Returns like q.
    """
    if q.stride(3) != 1:
        q = q.contiguous()
    n_left = regions.n_left(start + 1)
    if n_left == 0 and start > 0:  # nothing has left: the slots are dense keys
        return merge([own, *over_dense(q, regions.k[:, :, :start], regions.v[:, :, :start])], q.dtype)[0]
    if regions.k_tiles is None or n_left == 0:
        return slot_attention(q, regions, start, own, sink_rope)[0]
    if takes_8bit(q, regions) and regions.rotation is not None:
        partials = [slot_attention(q, regions, start, own, sink_rope)]
        queries, most = quantize_queries(q, regions.rotation), LARGEST_BLOCK // TILE
        for first in range(0, n_left // TILE, most):
            partials.append(attend_8bit(queries, regions, first, min(first + most, n_left // TILE)))
        return merge(partials, q.dtype)[0]
    keys, values = regions.stored()
    rotated = q if regions.rotation is None or not keys.format.rotated else rotated_heads(q, regions.rotation)
    partials = [own]
    for first in range(0, start, LARGEST_BLOCK):
        k, v = dense_history(regions, start, first, min(first + LARGEST_BLOCK, start))
        partials += over_dense(rotated, k, v)
    return merge(partials, q.dtype, regions.rotation if values.format.rotated else None)[0]
