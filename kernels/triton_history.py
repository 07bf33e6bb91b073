"""Chunked prefill in Triton: a chunk's queries over all that the cache held when the chunk began.

Flash attention (Dao 2023, arXiv:2307.08691) without causality: every query of the chunk sees every key
here. The chunk's attention over itself is someone else's, and the two are merged by their log-sum-exps.
Integers become float16 in registers, a block at a time: no dense copy exists anywhere. A query is divided by its
largest element first, so that float16 holds it whatever its size, and K's scale multiplies the score; the
probability times V's scale is kept in float16's range by `unit`, as in `triton_tiles.py`.

One program takes QUERIES tokens of one head. Matrix units want both operands long here (a chunk has many
queries), so this is the usual tile [queries, keys], unlike decoding's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.regions import Regions
from kernels.triton_tiles import HALF_RANGE, NEGATIVE, UNSEEN, turn_back

INTERPRET = bool(triton.knobs.runtime.interpret)
COUNTS = ("group", "n_token", "n_sink", "n_slot", "gap", "n_int", "n_dropped", "scale_stride_b", "scale_stride_h")


@triton.jit
def to_half(x, INTERPRET: tl.constexpr):
    """int8 to float16, four elements at a time: a byte under the exponent of 1024, minus 1024 + 128."""
    if INTERPRET:  # the interpreter knows no assembly
        return x.to(tl.float16)
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 u, a, b, bias;
        xor.b32 u, $2, 0x80808080;
        prmt.b32 a, u, 0x64646464, 0x4140;
        prmt.b32 b, u, 0x64646464, 0x4342;
        mov.b32 bias, 0x64806480;
        sub.f16x2 $0, a, bias;
        sub.f16x2 $1, b, bias;
        }
        """,
        "=r,=r,r",
        [x],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


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


@triton.jit
def add_rows(
    state, unit, q, step, k, v, k_scale, v_scale, key, end,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add int8 rows `key` [KEYS]; MASKED: only those before `end`. q: float16 [QUERIES, D]; step: [QUERIES].

    `top` is in the unit that step turns into log2; `out` holds sums of weight * v * HALF_RANGE / unit.
    """
    top, total, out = state
    DIM: tl.constexpr = q.shape[1]
    d = tl.arange(0, DIM)
    row = tl.minimum(key, end - 1) if MASKED else key
    at = row[:, None] * HEAD_DIM + d[None, :]
    if DIM == HEAD_DIM:
        keys, values = tl.load(k + at), tl.load(v + at)
    else:
        keys = tl.load(k + at, (d < HEAD_DIM)[None, :], 0)
        values = tl.load(v + at, (d < HEAD_DIM)[None, :], 0)
    ks, vs = tl.load(k_scale + row), tl.load(v_scale + row)
    score = tl.dot(q, tl.trans(to_half(keys, INTERPRET))) * ks[None, :]
    if MASKED:
        score = tl.where((key < end)[None, :], score, UNSEEN)
    new_top = tl.maximum(top, tl.max(score, 1))
    prob = tl.exp2(score * step[:, None] - (new_top * step)[:, None])
    new_unit = tl.maximum(unit, tl.max(vs, 0))
    weight = (prob * (vs * (1.0 / new_unit * HALF_RANGE))[None, :]).to(tl.float16)
    keep = tl.exp2((top - new_top) * step)
    out = tl.dot(weight, to_half(values, INTERPRET), out * (keep * (unit / new_unit))[:, None])
    return (new_top, total * keep + tl.sum(prob, 1), out), new_unit


@triton.jit(do_not_specialize=COUNTS)
def history_kernel(
    q, k, v, k_int, v_int, k_scale, v_scale, frequencies, out, lse,
    q_stride_b, q_stride_h, q_stride_t, slot_stride_b, slot_stride_h, row_stride_b, row_stride_h,
    scale_stride_b, scale_stride_h, group, n_token, n_sink, n_slot, gap, n_int, n_dropped, softmax_scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, FLOAT_KEYS: tl.constexpr, INT_KEYS: tl.constexpr,
    STAGES: tl.constexpr, HAS_INT: tl.constexpr, TURN_SINKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head, sequence): slots [0, n_slot) but for `gap`, and rows [0, n_int).

    With TURN_SINKS, slots below n_sink are seen by queries turned back by n_dropped positions.
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
    unit = HALF_RANGE + 0.0  # until the first row comes, sums are as they are
    if HAS_INT:
        largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-20)
        half = (x / largest[:, None]).to(tl.float16)
        step = largest * log2_scale
        row_at = batch * row_stride_b + kv_head * row_stride_h
        scale_at = batch * scale_stride_b + kv_head * scale_stride_h
        k_int += row_at
        v_int += row_at
        k_scale += scale_at
        v_scale += scale_at
        unit = 1e-30
        key = tl.arange(0, INT_KEYS)
        whole = n_int // INT_KEYS * INT_KEYS
        for start in tl.range(0, whole, INT_KEYS, num_stages=STAGES):
            state, unit = add_rows(
                state, unit, half, step, k_int, v_int, k_scale, v_scale, key + start, n_int, HEAD_DIM, False, INTERPRET
            )
        if whole < n_int:
            state, unit = add_rows(
                state, unit, half, step, k_int, v_int, k_scale, v_scale, key + whole, n_int, HEAD_DIM, True, INTERPRET
            )
        top, total, sums = state
        state = (top * step, total, sums * (unit / HALF_RANGE))
    k += batch * slot_stride_b + kv_head * slot_stride_h
    v += batch * slot_stride_b + kv_head * slot_stride_h
    slot = tl.arange(0, FLOAT_KEYS)
    first = n_slot * 0
    if TURN_SINKS:
        swapped = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
        y = tl.load(q + token[:, None].to(tl.int64) * q_stride_t + swapped[None, :], there, 0.0).to(tl.float32)
        turned = tl.trans(turn_back(tl.trans(x), tl.trans(y), frequencies, n_dropped, d, HEAD_DIM)).to(dtype)
        for start in range(0, n_sink, FLOAT_KEYS):
            seen = slot + start < n_sink
            state = add_slots(state, turned, log2_scale, k, v, slot + start, seen, HEAD_DIM, INTERPRET)
        first = n_sink
    queries = x.to(dtype)
    for start in tl.range(first, n_slot, FLOAT_KEYS, num_stages=STAGES):
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


def history_attention(
    q: Tensor, regions: Regions, start: int, sink_frequencies: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk that begins at position `start` over what the cache held before it.

    q: [batch, n_head, token, head_dim]. The token at start - window_size has left (`evict` came
    first): its slot, which `start` will take, is not looked at. Returns the output, shaped and typed like
    q, and the log-sum-exp of its scores, float32 [batch, n_head, token].
    """
    batch, n_head, n_token, head_dim = q.shape
    if q.stride(3) != 1:
        q = q.contiguous()
    n_left = regions.n_left(start + 1)
    full = n_left > 0
    n_slot, gap = (regions.k.shape[2], regions.slot(start)) if full else (start, start)
    has_int = regions.k_int is not None and full
    turn = sink_frequencies is not None and full
    k_int, v_int, k_scale, v_scale = (
        (regions.k_int, regions.v_int, regions.k_scale, regions.v_scale) if has_int else (regions.k,) * 4
    )
    assert k_int is not None and v_int is not None and k_scale is not None and v_scale is not None
    out = torch.empty(batch, n_head, n_token, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, n_head, n_token, dtype=torch.float32, device=q.device)
    wide = head_dim > 128 or q.element_size() > 2
    queries = 64 if wide else 128
    history_kernel[(triton.cdiv(n_token, queries), n_head, batch)](
        q, regions.k, regions.v, k_int, v_int, k_scale, v_scale,
        sink_frequencies if turn else lse, out, lse,
        *q.stride()[:3], *regions.k.stride()[:2], *k_int.stride()[:2], *k_scale.stride()[:2],
        n_head // regions.k.shape[1], n_token, min(regions.sink_size, n_slot), n_slot, gap,
        n_left if has_int else 0, n_left, head_dim**-0.5,
        HEAD_DIM=head_dim, QUERIES=queries, FLOAT_KEYS=32 if wide else 64, INT_KEYS=32 if wide else 64,
        STAGES=2 if wide else 3,
        HAS_INT=has_int, TURN_SINKS=turn, INTERPRET=INTERPRET, num_warps=4 if wide else 8,
    )  # fmt: skip
    return out, lse
