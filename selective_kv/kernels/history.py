"""Chunked prefill in Triton: a chunk's queries over all that the cache held when the chunk began.

Flash attention (Dao 2023, arXiv:2307.08691) without causality: every query of the chunk sees every key
here. The chunk's attention over itself is someone else's, and the two are merged by their log-sum-exps.

Full-precision slots: one program takes QUERIES tokens of one head. Matrix units want both operands long here
(a chunk has many queries), so this is the usual tile [queries, keys], unlike decoding's. Quantised rows: a block of
BLOCK_ROWS of them is made dense, met by a library's flash kernel and merged, and the next block takes its place. A
chunk of thousands of queries looks at each row thousands of times: reading it costs nothing, and the library's
kernel is three times as fast as ours was with integers in it (LOG.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_kv.formats import hadamard, rotate
from selective_kv.kernels.attention_lse import LARGEST_BLOCK, attend, key_blocks
from selective_kv.kernels.basics import INTERPRET
from selective_kv.kernels.launch import launch
from selective_kv.kernels.merge import merge
from selective_kv.kernels.online_softmax import NEGATIVE, UNSEEN, scale_and_base, turned
from selective_kv.kernels.store import operands
from selective_kv.regions import Regions

COUNTS = ("group", "n_token", "n_sink", "n_slot", "gap")
BLOCK_ROWS = LARGEST_BLOCK  # quantised rows made dense at a time


@triton.jit
def add_slots(state, q, step, k, v, key, seen, HEAD_DIM: tl.constexpr, INTERPRET: tl.constexpr):
    """Add full-precision slots `key` [KEYS], where `seen`, to the softmax. q: [QUERIES, D] in their dtype."""
    top, total, out = state
    d = tl.arange(0, q.shape[1])
    at = key[:, None] * HEAD_DIM + d[None, :]
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
    group, n_token, n_sink, n_slot, gap, softmax_scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    TURN_SINKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head, sequence): slots [0, n_slot) but for `gap`.

    With TURN_SINKS, slots below n_sink are seen by queries turned by cos and sin, float32 [sequence, HEAD_DIM].
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
    slot = tl.arange(0, KEYS)
    first = n_slot * 0
    if TURN_SINKS:
        swapped = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
        y = tl.load(q + token[:, None].to(tl.int64) * q_stride_t + swapped[None, :], there, 0.0).to(tl.float32)
        y = turned(tl.trans(x), tl.trans(y), cos + batch * HEAD_DIM, sin + batch * HEAD_DIM, d, HEAD_DIM)
        back = tl.trans(y).to(dtype)
        for start in range(0, n_sink, KEYS):
            seen = slot + start < n_sink
            state = add_slots(state, back, log2_scale, k, v, slot + start, seen, HEAD_DIM, INTERPRET)
        first = n_sink
    queries = x.to(dtype)
    for start in tl.range(first, n_slot, KEYS, num_stages=STAGES):
        seen = (slot + start < n_slot) & (slot + start != gap)
        state = add_slots(state, queries, log2_scale, k, v, slot + start, seen, HEAD_DIM, INTERPRET)
    top, total, sums = state
    at = (batch * tl.num_programs(1) + head) * n_token + token
    blind = total == 0  # a query that saw nothing gets zeros
    total = tl.where(blind, 1.0, total)
    y = sums / total[:, None]
    tl.store(out + at[:, None] * HEAD_DIM + d[None, :], y.to(out.dtype.element_ty), there)
    log_sum = tl.where(blind, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + at, log_sum, token < n_token)


@triton.jit
def load_vectors(
    ints, scales, row, end, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """The stored values of the rows `row` [N] that come before `end`, as their two halves: float32 [N, D / 2]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    d = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    known = row < end
    mask = known[:, None] & (d < HALF)
    if BITS == 8:
        at = ints + row[:, None] * HEAD_DIM + d
        scale = tl.load(scales + row, known, 0.0)[:, None]
        low, high = tl.load(at, mask, 0).to(tl.float32) * scale, tl.load(at + HALF, mask, 0).to(tl.float32) * scale
    else:
        packed = tl.load(ints + row[:, None] * HALF + d, mask, 0).to(tl.int32)
        scale, base = scale_and_base(tl.load(scales + row * GROUPS, known, 0))
        low = base[:, None] + scale[:, None] * (packed & 15).to(tl.float32)
        if GROUPS == 2:
            scale, base = scale_and_base(tl.load(scales + row * GROUPS + 1, known, 0))
        high = base[:, None] + scale[:, None] * ((packed >> 4) & 15).to(tl.float32)
    return low, high


@triton.jit(do_not_specialize=["first", "end", "n_row"])
def dequantize_kernel(
    k_int, v_int, k_scale, v_scale, k, v, first, end, n_row,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, sequence and KV head, 0 for K and 1 for V): rows first to end - 1 into k, v
    [sequence, KV head, end - first, HEAD_DIM]."""
    one = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        dequantize_one(k_int, k_scale, k, one, first, end, n_row, HEAD_DIM, K_BITS, K_GROUPS, BLOCK)
    else:
        dequantize_one(v_int, v_scale, v, one, first, end, n_row, HEAD_DIM, V_BITS, V_GROUPS, BLOCK)


@triton.jit
def dequantize_one(
    ints, scales, out, one, first, end, n_row,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of rows of K or of V; `one` counts sequences and KV heads."""
    HALF: tl.constexpr = HEAD_DIM // 2
    row = first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    mask = (row < end)[:, None] & (d < HALF)
    row_at = one * n_row
    low, high = load_vectors(
        ints + row_at * (HEAD_DIM * BITS // 8), scales + row_at * GROUPS, row, end, HEAD_DIM, BITS, GROUPS
    )
    at = out + (one * (end - first) + row - first)[:, None] * HEAD_DIM + d
    tl.store(at, low.to(out.dtype.element_ty), mask)
    tl.store(at + HALF, high.to(out.dtype.element_ty), mask)


def dequantize_rows(regions: Regions, first: int, end: int) -> tuple[Tensor, Tensor]:
    """The stored values (rotated, if they are) of rows first to end - 1 in the slots' dtype: two tensors
    [batch, n_kv_head, end - first, head_dim]."""
    batch, n_kv_head, _, head_dim = regions.k.shape
    k, v = (regions.k.new_empty(batch, n_kv_head, end - first, head_dim) for _ in "kv")
    (k_int, v_int, k_scale, v_scale, _), flags = operands(regions)
    flags = {name: flags[name] for name in ("HEAD_DIM", "K_BITS", "V_BITS", "K_GROUPS", "V_GROUPS")}
    launch(dequantize_kernel, (triton.cdiv(end - first, 32), batch * n_kv_head, 2))(
        k_int, v_int, k_scale, v_scale, k, v, first, end, k_int.shape[2], **flags, BLOCK=32, num_warps=4
    )
    return k, v


def rotated_queries(q: Tensor) -> Tensor:
    """`rotate(q)` in q's dtype. In 16 bits by matrix units: products with 1 and -1 are exact and their sums float32, so
    that it is rounded once, as there; four passes over memory in float32 take a chunk 0.6 ms a layer."""
    batch, n_head, n_token, head_dim = q.shape
    if q.is_meta:  # where it would import sympy
        return q.new_empty(batch, n_token, n_head, head_dim).transpose(1, 2)
    if q.dtype == torch.float32 or INTERPRET:
        return rotate(q).to(q.dtype)
    rows = q.transpose(1, 2).reshape(-1, head_dim)  # a token's heads together, as they come
    matrix = hadamard(head_dim, q.device).to(q.dtype)
    turned = torch.addmm(matrix[0], rows, matrix, beta=0, alpha=head_dim**-0.5)
    return turned.view(batch, n_token, n_head, head_dim).transpose(1, 2)


def over_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` over any number of keys, not causally, in blocks that its kernels are quick with."""
    first, *rest = key_blocks(q, k)
    out, lse = attend(q, k[:, :, first], v[:, :, first])
    for block in rest:
        out, lse = merge(out, lse, *attend(q, k[:, :, block], v[:, :, block]))
    return out, lse


def slot_attention(
    q: Tensor, regions: Regions, start: int, sink_turn: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """`history_attention` over the full-precision slots alone."""
    batch, n_head, n_token, head_dim = q.shape
    n_left = regions.n_left(start + 1)
    n_slot, gap = (regions.k.shape[2], regions.slot(start)) if n_left > 0 else (start, start)
    out = torch.empty(batch, n_head, n_token, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, n_head, n_token, dtype=torch.float32, device=q.device)
    turn = sink_turn is not None and n_left > 0
    cos, sin = sink_turn if sink_turn is not None and turn else (lse, lse)  # the latter is never looked at
    assert cos.is_contiguous() and sin.is_contiguous()
    wide = head_dim > 128 or q.element_size() > 2
    queries = 64 if wide else 128
    launch(history_kernel, (triton.cdiv(n_token, queries), n_head, batch))(
        q, regions.k, regions.v, cos, sin, out, lse,
        *q.stride()[:3], *regions.k.stride()[:2], n_head // regions.k.shape[1], n_token,
        min(regions.sink_size, n_slot), n_slot, gap, head_dim**-0.5,
        HEAD_DIM=head_dim, QUERIES=queries, KEYS=32 if wide else 64, STAGES=2 if wide else 3,
        TURN_SINKS=turn, INTERPRET=INTERPRET, num_warps=4 if wide else 8,
    )  # fmt: skip
    return out, lse


def history_attention(
    q: Tensor, regions: Regions, start: int, sink_turn: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk that begins at position `start` over what the cache held before it.

    q: [batch, n_head, token, head_dim]. The token at start - window_size has left (`evict` came
    first): its slot, which `start` will take, is not looked at. sink_turn: as for `decode_attention`, of the
    token at `start`. Returns the output, shaped like q, in its dtype or float32, and the log-sum-exp of its scores,
    float32 [batch, n_head, token].
    """
    if q.stride(3) != 1:
        q = q.contiguous()
    n_left = regions.n_left(start + 1)
    if n_left == 0 and start > 0:  # nothing has left: the slots are dense keys
        return over_dense(q, regions.k[:, :, :start], regions.v[:, :, :start])
    out, lse = slot_attention(q, regions, start, sink_turn)
    if regions.k_int is None or n_left == 0:
        return out, lse
    turned = rotated_queries(q) if regions.k_format.rotated else q
    for first in range(0, n_left, BLOCK_ROWS):
        k, v = dequantize_rows(regions, first, min(first + BLOCK_ROWS, n_left))
        out, lse = merge(out, lse, *over_dense(turned, k, v))
    return out, lse
