"""Decode attention in Triton: one query token per sequence over sink, window and int8 middle.

Mechanism. Flash-decoding (Dao et al. 2023): `n_split` programs share the tokens of one sequence and KV
head, each writes a partial softmax, and a second small launch merges them. Lengths are read on the
device and the grid depends on the cache's capacity alone, so one CUDA graph serves every length; programs with
nothing to do return at once, and the second launch reads only what was written.

The first programs take full-precision slots and the others int8 rows, in proportion to their bytes. The
shares depend on how many tokens there are, never on capacity: as long as nothing has left the window, the
result is the full cache's, bit for bit.

Layout rule: slots [0, min(n, sink + window)) and rows [0, n - sink - window) hold tokens; both are contiguous,
and a softmax does not mind a ring's order. `triton_tiles.py` tells what happens to a block of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.regions import Regions
from kernels.triton_tiles import (
    HALF_RANGE,
    NEGATIVE,
    float_tile,
    int8_tile,
    merge_slices,
    turn_back,
    two_terms,
)

INTERPRET = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: programs run one by one on the CPU
COUNTS = (
    "n_kv_head",
    "group",
    "sink_size",
    "n_slot",
    "n_split",
    "scale_stride_b",
    "scale_stride_h",
)  # any value: one binary


@triton.jit
def partition(n_full, n_int, n_split, COST: tl.constexpr, FLOAT_BLOCK: tl.constexpr, INT_BLOCK: tl.constexpr):
    """Share n_full slots and n_int rows among n_split programs; a slot costs COST times a row.

    Returns how many programs take slots, slots per program, how many programs there are in all, and rows
    per program. Without rows the answer is that of the full cache.
    """
    cost = n_full.to(tl.int64) * COST
    share = ((cost * n_split + n_int // 2) // (cost + n_int)).to(tl.int32)
    n_float = tl.where(n_int > 0, tl.minimum(tl.maximum(share, 1), n_split - 1), n_split)
    float_len = tl.cdiv(tl.cdiv(n_full, n_float), FLOAT_BLOCK) * FLOAT_BLOCK
    n_float = tl.cdiv(n_full, float_len)
    n_rest = tl.maximum(n_split - n_float, 1)
    int_len = tl.maximum(tl.cdiv(tl.cdiv(n_int, n_rest), INT_BLOCK), 1) * INT_BLOCK
    return n_float, float_len, n_float + tl.cdiv(n_int, int_len), int_len


@triton.jit
def load_q(q, stride_h, head, n_head, d, there):
    """float32 [D, N]: one query head per column, zeros where there is no such head or dim."""
    at = head[None, :] * stride_h + d[:, None]
    return tl.load(q + at, there[:, None] & (head < n_head)[None, :], 0.0).to(tl.float32)


@triton.jit
def float_share(
    q, k, v, frequencies, q_stride_h, head, group, lo, hi, sink_size, n_dropped, step,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, WARPS: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    TURN_SINKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Slots lo to hi - 1. Returns weighted sums of values [D, HEADS], largest scores (log2), sums of weights."""
    DIM: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 16))
    BLOCK: tl.constexpr = WARPS * SLICE
    dtype: tl.constexpr = tl.float32 if INTERPRET else k.dtype.element_ty
    d = tl.arange(0, DIM)
    tok = (tl.arange(0, WARPS) * SLICE)[:, None] + tl.arange(0, SLICE)[None, :]
    state = (
        tl.full((WARPS, HEADS), NEGATIVE, tl.float32),
        tl.zeros((WARPS, SLICE, HEADS), tl.float32),
        tl.zeros((WARPS, DIM, HEADS), tl.float32),
    )
    x = load_q(q, q_stride_h, head, group, d, d < HEAD_DIM)
    if TURN_SINKS and n_dropped > 0:
        partner = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
        y = load_q(q, q_stride_h, head, group, partner, d < HEAD_DIM)
        y = turn_back(x, y, frequencies, n_dropped, d, HEAD_DIM)
        turned = tl.broadcast_to(y.to(dtype)[None], (WARPS, DIM, HEADS))
        sink_hi = tl.minimum(hi, sink_size)
        for start in range(lo, sink_hi, BLOCK):
            state = float_tile(state, turned, step, k, v, tok + start, sink_hi, HEAD_DIM, True, INTERPRET)
        lo = tl.minimum(tl.maximum(lo, sink_size), hi)
    queries = tl.broadcast_to(x.to(dtype)[None], (WARPS, DIM, HEADS))
    whole = lo + (hi - lo) // BLOCK * BLOCK
    for start in tl.range(lo, whole, BLOCK, num_stages=STAGES):
        state = float_tile(state, queries, step, k, v, tok + start, hi, HEAD_DIM, False, INTERPRET)
    if whole < hi:
        state = float_tile(state, queries, step, k, v, tok + whole, hi, HEAD_DIM, True, INTERPRET)
    top, total, out = state
    weight, best, sum_of_weights = merge_slices(top, total, step)
    return tl.sum(out * weight[:, None, :], 0), best * step, sum_of_weights


@triton.jit
def int8_share(
    q, k, v_pair, k_scale, v_scale, q_stride_h, head, group, lo, hi, scale,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, WARPS: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Rows lo to hi - 1. Returns weighted sums of even and of odd dims of values, and the rest as above."""
    DIM: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 32))
    PAIRS: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM // 2, 16))
    BLOCK: tl.constexpr = WARPS * SLICE
    d = tl.arange(0, DIM)
    tok = (tl.arange(0, WARPS) * SLICE)[:, None] + tl.arange(0, SLICE)[None, :]
    terms, unit = two_terms(load_q(q, q_stride_h, head, group, d, d < HEAD_DIM), HEADS)
    terms = tl.broadcast_to(terms[None], (WARPS, DIM, 2 * HEADS))
    step = (unit * scale)[None, :]  # [1, HEADS]
    state = (
        tl.full((WARPS, HEADS), NEGATIVE, tl.float32),
        tl.zeros((WARPS, SLICE, HEADS), tl.float32),
        tl.full((WARPS,), 1e-30, tl.float32),
        tl.zeros((WARPS, PAIRS, HEADS), tl.float32),
        tl.zeros((WARPS, PAIRS, HEADS), tl.float32),
    )
    whole = lo + (hi - lo) // BLOCK * BLOCK
    for start in tl.range(lo, whole, BLOCK, num_stages=STAGES):
        state = int8_tile(
            state,
            terms,
            step,
            k,
            v_pair,
            k_scale,
            v_scale,
            tok + start,
            hi,
            HEAD_DIM,
            HEADS,
            False,
            INTERPRET,
        )
    if whole < hi:
        state = int8_tile(
            state, terms, step, k, v_pair, k_scale, v_scale, tok + whole, hi, HEAD_DIM, HEADS, True, INTERPRET
        )
    top, total, v_unit, even, odd = state
    weight, best, sum_of_weights = merge_slices(top, total, step)
    weight = (weight * (v_unit / HALF_RANGE)[:, None])[:, None, :]
    return tl.sum(even * weight, 0), tl.sum(odd * weight, 0), best * tl.sum(step, 0), sum_of_weights


@triton.jit(do_not_specialize=COUNTS)
def split_kernel(
    q, k, v, k_int, v_pair, k_scale, v_scale, positions, frequencies, partial, statistics,
    q_stride_b, q_stride_h, slot_stride_b, slot_stride_h, row_stride_b, row_stride_h, scale_stride_b, scale_stride_h,
    n_kv_head, group, sink_size, n_slot, n_split, softmax_scale,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, WARPS: tl.constexpr,
    FLOAT_SLICE: tl.constexpr, INT_SLICE: tl.constexpr, FLOAT_STAGES: tl.constexpr, INT_STAGES: tl.constexpr,
    HAS_INT: tl.constexpr, TURN_SINKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (row, split): one share of the tokens of row = (sequence, KV head, tile of HEADS query heads).

    partial: float32 [row, n_split, HEADS, HEAD_DIM], weighted sums of values; statistics: float32 [row,
    n_split, 2, HEADS], the largest score in log2 units and the sum of weights.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    n_tile = tl.cdiv(group, HEADS)
    kv_head, batch = (row // n_tile % n_kv_head).to(tl.int64), (row // n_tile // n_kv_head).to(tl.int64)
    n_token = tl.load(positions + batch) + 1
    n_full = tl.minimum(n_token, n_slot).to(tl.int32)
    n_int = tl.maximum(n_token - n_slot, 0).to(tl.int32) * HAS_INT
    COST: tl.constexpr = k.dtype.element_ty.primitive_bitwidth // 8
    n_float, float_len, n_active, int_len = partition(
        n_full, n_int, n_split, COST, WARPS * FLOAT_SLICE, WARPS * INT_SLICE
    )
    if split >= n_active:
        return

    head = row % n_tile * HEADS + tl.arange(0, HEADS)  # within the group
    q += batch * q_stride_b + kv_head * group * q_stride_h
    log2_scale = softmax_scale * 1.4426950408889634  # exp2 is an instruction, exp is not
    at = (row.to(tl.int64) * n_split + split) * HEADS
    column = tl.arange(0, HEADS)
    statistics += at * 2 + column
    partial += at * HEAD_DIM + column[None, :] * HEAD_DIM
    if split < n_float:
        lo = split * float_len
        out, best, total = float_share(
            q, k + batch * slot_stride_b + kv_head * slot_stride_h, v + batch * slot_stride_b + kv_head * slot_stride_h,
            frequencies, q_stride_h, head, group, lo, tl.minimum(lo + float_len, n_full), sink_size,
            n_token - n_slot, log2_scale, HEAD_DIM, HEADS, WARPS, FLOAT_SLICE, FLOAT_STAGES, TURN_SINKS, INTERPRET,
        )  # fmt: skip
        d = tl.arange(0, out.shape[0])[:, None]
        tl.store(partial + d, out, d < HEAD_DIM)
        tl.store(statistics, best)
        tl.store(statistics + HEADS, total)
    elif HAS_INT:
        row_at = batch * row_stride_b + kv_head * row_stride_h
        scale_at = batch * scale_stride_b + kv_head * scale_stride_h
        start = (split - n_float) * int_len
        even, odd, largest, weights = int8_share(
            q, k_int + row_at, v_pair + row_at // 2, k_scale + scale_at, v_scale + scale_at, q_stride_h, head, group,
            start, tl.minimum(start + int_len, n_int), log2_scale, HEAD_DIM, HEADS, WARPS, INT_SLICE, INT_STAGES, INTERPRET,
        )  # fmt: skip
        pair = tl.arange(0, even.shape[0])[:, None]
        tl.store(partial + 2 * pair, even, pair < HEAD_DIM // 2)
        tl.store(partial + 2 * pair + 1, odd, pair < HEAD_DIM // 2)
        tl.store(statistics, largest)
        tl.store(statistics + HEADS, weights)


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    partial, statistics, positions, out, n_kv_head, group, n_slot, n_split,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, COST: tl.constexpr,
    FLOAT_BLOCK: tl.constexpr, INT_BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    HAS_INT: tl.constexpr,
):  # fmt: skip
    """Program (sequence and query head): merge the partial softmaxes. out: [batch, n_head, HEAD_DIM]."""
    pid = tl.program_id(0)
    n_head = n_kv_head * group
    batch, kv_head, member = pid // n_head, pid % n_head // group, pid % group
    n_tile = tl.cdiv(group, HEADS)
    row = (batch * n_kv_head + kv_head) * n_tile + member // HEADS
    column = member % HEADS
    n_token = tl.load(positions + batch) + 1
    n_full = tl.minimum(n_token, n_slot).to(tl.int32)
    n_int = tl.maximum(n_token - n_slot, 0).to(tl.int32) * HAS_INT
    _, _, n_active, _ = partition(n_full, n_int, n_split, COST, FLOAT_BLOCK, INT_BLOCK)

    at = row.to(tl.int64) * n_split * HEADS
    statistics += at * 2 + column
    every = tl.arange(0, SPLITS)
    top = tl.max(tl.load(statistics + every * (2 * HEADS), every < n_active, float("-inf")), 0)
    DIM: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    d = tl.arange(0, DIM)
    partial += at * HEAD_DIM + column * HEAD_DIM + d[None, :]
    total = tl.zeros((CHUNK,), tl.float32)
    y = tl.zeros((CHUNK, DIM), tl.float32)
    for first in range(0, n_active, CHUNK):
        split = first + tl.arange(0, CHUNK)
        there = split < n_active
        weight = tl.exp2(tl.load(statistics + split * (2 * HEADS), there, float("-inf")) - top)
        total += tl.load(statistics + split * (2 * HEADS) + HEADS, there, 0.0) * weight
        mask = there[:, None] & (d < HEAD_DIM)[None, :]
        y += tl.load(partial + split[:, None] * (HEADS * HEAD_DIM), mask, 0.0) * weight[:, None]
    result = tl.sum(y, 0) / tl.sum(total, 0)
    tl.store(out + pid.to(tl.int64) * HEAD_DIM + d, result.to(out.dtype.element_ty), d < HEAD_DIM)


class Plan(NamedTuple):
    """How a cache's shape maps to programs; nothing here depends on how many tokens there are."""

    heads: int  # query heads per program
    warps: int
    float_slice: int  # tokens per warp and block
    int_slice: int
    float_stages: int  # blocks in flight
    int_stages: int
    per_processor: int  # programs on a streaming multiprocessor at once


def plan(group: int, head_dim: int, itemsize: int) -> Plan:
    heads = min(max(4, triton.next_power_of_2(group)), 16 if head_dim <= 128 else 8)
    return Plan(heads, 4, 16, 32, 3, 3, 2)


@lru_cache
def n_processor(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; the interpreter runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def decode_attention(q: Tensor, regions: Regions, positions: Tensor, sink_frequencies: Tensor | None = None) -> Tensor:
    """Attention of one new token per sequence, already appended, over all that its cache holds.

    q: [batch, n_head, head_dim]; positions: int64 [batch]. sink_frequencies [head_dim / 2]: when
    given, sinks are seen at their distance within the cache, as if what was dropped had never been
    (StreamingLLM, arXiv:2309.17453): q is turned back by that many positions for them.
    Returns [batch, n_head, head_dim] in q's dtype. No host synchronisation.
    """
    group = q.shape[1] // regions.k.shape[1]
    return run(q, regions, positions, sink_frequencies, plan(group, q.shape[2], regions.k.element_size()))


def run(q: Tensor, regions: Regions, positions: Tensor, sink_frequencies: Tensor | None, p: Plan) -> Tensor:
    """`decode_attention` by a given plan."""
    batch, n_head, head_dim = q.shape
    assert q.stride(2) == 1
    n_kv_head, n_slot = regions.k.shape[1:3]
    group = n_head // n_kv_head
    n_row = batch * n_kv_head * triton.cdiv(group, p.heads)
    n_split = min(max(2, n_processor(q.device) * p.per_processor // n_row), 128)
    float_block, int_block = p.warps * p.float_slice, p.warps * p.int_slice

    has_int = regions.k_int is not None
    k_int, v_int, k_scale, v_scale = (
        (regions.k_int, regions.v_int, regions.k_scale, regions.v_scale) if has_int else (regions.k,) * 4
    )
    assert k_int is not None and v_int is not None and k_scale is not None and v_scale is not None
    most = triton.cdiv(n_slot, float_block) + (triton.cdiv(k_int.shape[2], int_block) if has_int else 0)
    partial = torch.empty(n_row, n_split, p.heads, head_dim, dtype=torch.float32, device=q.device)
    statistics = torch.empty(n_row, n_split, 2, p.heads, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, n_head, head_dim, dtype=q.dtype, device=q.device)
    split_kernel[(n_row, min(n_split, most))](
        q, regions.k, regions.v, k_int, v_int.view(torch.int16), k_scale, v_scale, positions,
        positions if sink_frequencies is None else sink_frequencies, partial, statistics,
        *q.stride()[:2], *regions.k.stride()[:2], *k_int.stride()[:2], *k_scale.stride()[:2],
        n_kv_head, group, regions.sink_size, n_slot, n_split, head_dim**-0.5,
        HEAD_DIM=head_dim, HEADS=p.heads, WARPS=p.warps, FLOAT_SLICE=p.float_slice, INT_SLICE=p.int_slice,
        FLOAT_STAGES=p.float_stages, INT_STAGES=p.int_stages,
        HAS_INT=has_int, TURN_SINKS=sink_frequencies is not None, INTERPRET=INTERPRET, num_warps=p.warps,
    )  # fmt: skip
    combine_kernel[(batch * n_head,)](
        partial, statistics, positions, out, n_kv_head, group, n_slot, n_split,
        HEAD_DIM=head_dim, HEADS=p.heads, COST=regions.k.element_size(), FLOAT_BLOCK=float_block,
        INT_BLOCK=int_block, SPLITS=triton.next_power_of_2(n_split), CHUNK=16, HAS_INT=has_int, num_warps=4,
    )  # fmt: skip
    return out
