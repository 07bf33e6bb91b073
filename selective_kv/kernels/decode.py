"""Decode attention in Triton: one query token per sequence over sink, window and tiles.

Mechanism. Split-KV attention (Flash-Decoding, Dao et al. 2023): `split_kernel` divides the tokens of one sequence and
KV head among `n_split` programs, each of whose warps keeps an online softmax and writes a partial result; the small
`combine_kernel` rescales them to a common maximum, adds and normalises. Lengths are read on the device and the grid
does not depend on them, so one CUDA graph serves every length; a program without tokens only prefetches into L2 the
weight that is read after attention (`next_weight`), and `combine_kernel` reads only the partial results that were
written. A new token needs no launch of its own, except in a large batch (`split_appends`): the programs that have its
slot write it there before they read.

Full-precision slots and then tiles are one range of work, measured in blocks, and cut evenly: the program at
the border takes some of both. The shares depend on how many tokens there are, never on capacity: as long as nothing
has left the window, the result is the full cache's, bit for bit.

Of n tokens the first n_left after the sinks are in whole tiles. The others are in slots: sinks first, then a ring.
Slots are gone through in the order of memory, but for whole blocks of those whose tokens are in a tile by now.
`online_softmax.py` and `tile_softmax.py` tell what happens to a block, `tile_share.py` to a program's tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from selective_kv.formats import TILE as TILE_TOKENS
from selective_kv.kernels.basics import INTERPRET, LOG2_E, NEGATIVE, TILE
from selective_kv.kernels.bias import bias_queries
from selective_kv.kernels.combine import combine_kernel
from selective_kv.kernels.decode_config import (
    Plan,
    blocks,
    fitting,
    merging,
    plan,
    processor,
    rounds_later,
    sharing,
    split_appends,
)
from selective_kv.kernels.hadamard import butterfly
from selective_kv.kernels.launch import launch
from selective_kv.kernels.online_softmax import apply_rope, float_block, load_q
from selective_kv.kernels.operands import bias_operands, rotations, stored_bits, tile_operands
from selective_kv.kernels.split_kv import (
    count_left,
    fetch,
    first_blocks,
    partition,
    past_gap,
    slots_in_use,
    tile_blocks,
)
from selective_kv.kernels.store import append, settle, slot_of
from selective_kv.kernels.tile_share import store_share, tile_queries
from selective_kv.regions import Regions

# Runtime integers that Triton must not specialise on (1, multiples of 16): one binary serves all values.
COUNTS = ("group", "sink_size", "window_size", "n_slot", "n_tile", "n_split", "next_bytes", "next_each")

# The most bytes of `next_weight` that are prefetched into L2, since more slows the reads of keys and values; and the
# most that one program prefetches, since `combine_kernel` waits until it has exited.
MOST_NEXT, MOST_NEXT_EACH = 4 << 20, 16 << 10


@triton.jit
def float_share(
    x, partner, k, v, cos, sin, lo, hi, end, gap, n_gap, sink_size, oldest, n_slot, n_ring, n_dropped, step,
    HEAD_DIM: tl.constexpr, WARPS: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    TURN_SINKS: tl.constexpr, RING: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The tokens in slots lo to hi - 1, counted without the gap; end, gap, n_gap, oldest: as `slots_in_use` has them.

    x: queries, float32 [D, HEADS]; partner: the same with the halves of D swapped; cos, sin: pointers to
    this sequence's [HEAD_DIM], see `decode_attention`; n_ring: see `float_block`.

    Returns of each warp weighted sums of values [WARPS, D, HEADS], largest scores in log2 units and sums of weights,
    [WARPS, HEADS].
    """
    DIM: tl.constexpr = x.shape[0]
    HEADS: tl.constexpr = x.shape[1]
    BLOCK: tl.constexpr = WARPS * SLICE
    dtype: tl.constexpr = tl.float32 if INTERPRET else k.dtype.element_ty
    slot = (tl.arange(0, WARPS) * SLICE)[:, None] + tl.arange(0, SLICE)[None, :]
    state = (
        tl.full((WARPS, HEADS), NEGATIVE, tl.float32),
        tl.zeros((WARPS, SLICE, HEADS), tl.float32),
        tl.zeros((WARPS, DIM, HEADS), tl.float32),
    )
    queries = x
    if TURN_SINKS:  # a query for sinks beside the one for all others: matrix units have columns to spare
        back = x
        if n_dropped > 0:
            back = apply_rope(x, partner, cos, sin, tl.arange(0, DIM), HEAD_DIM)
        queries = tl.reshape(tl.join(x, back), (DIM, 2 * HEADS))
    queries = tl.broadcast_to(queries.to(dtype)[None], (WARPS, DIM, queries.shape[1]))
    for start in tl.range(lo, hi, BLOCK, num_stages=STAGES):
        first = lo * 0 + start  # a tensor, in the interpreter too
        if RING:
            first = past_gap(first, gap, n_gap)
        state = float_block(
            state,
            queries,
            step,
            k,
            v,
            slot + first,
            end,
            sink_size,
            oldest,
            n_slot,
            n_ring,
            HEAD_DIM,
            TURN_SINKS,
            RING,
            INTERPRET,
        )
    top, total, out = state
    return out, top * step, tl.sum(total, 1)


@triton.jit(do_not_specialize=COUNTS)
def split_kernel(
    q, k, v, k_codes, v_pairs, k_scale, v_scale, k_factor, bias_pairs, bias_within, bias_turned, positions, cos, sin,
    partial, statistics, next_weight, k_new, v_new,
    q_stride_b, q_stride_h, slot_stride_b, slot_stride_h, new_stride_kb, new_stride_kh, new_stride_vb, new_stride_vh,
    n_tile, group, sink_size, window_size, n_slot, n_split,
    next_bytes, next_each, softmax_scale,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    FLOAT_SLICE: tl.constexpr, INT_SLICE: tl.constexpr, FLOAT_STAGES: tl.constexpr, INT_STAGES: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, BALANCED: tl.constexpr, K_ROTATION: tl.constexpr,
    V_ROTATION: tl.constexpr, PAIRS: tl.constexpr, AHEAD: tl.constexpr, TURN_SINKS: tl.constexpr,
    V_LATER: tl.constexpr, HALVES: tl.constexpr, NEW: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (column, sequence, split): one split of the tokens of one sequence, for HEADS of the query heads of KV
    head column // COLUMNS. COLUMNS: ceil(group / HEADS), the columns of each KV head.

    partial: float32 [sequence, column, n_split + 1, WARPS, HEADS, HEAD_DIM], weighted sums of values; statistics:
    float32 [sequence, column, n_split + 1, WARPS, HEADS, 2], the largest score in log2 units and the sum of weights.
    The partial result of a program's slots is stored at index `split`, that of its tiles at split + 1: the program at
    the border writes both. Each warp stores its own: a reduction over warps here would cost every program barriers, and
    in `combine_kernel` it costs a load.

    K_BITS 0: nothing is quantised. K_ROTATION, V_ROTATION: `rotation_size`, or 1. V_LATER: `rounds_later`. HALVES: see
    `tile_blocks`. PAIRS: pairs of channels whose bias is not in the tiles (bias.py). AHEAD: tokens prefetched into L2
    before the PDL wait.
    next_weight: the weight that is read after attention; each program prefetches next_each of its first next_bytes
    bytes into L2 when it has done its own reads. NEW: the token is not in its slot yet; every program that has this
    slot writes it there, and then reads it like all others.
    """
    column, split = tl.program_id(0), tl.program_id(2)
    batch, kv_head = tl.program_id(1).to(tl.int64), (column // COLUMNS).to(tl.int64)
    HAS_INT: tl.constexpr = K_BITS > 0
    FLOAT_BLOCK: tl.constexpr = WARPS * FLOAT_SLICE
    INT_BLOCK: tl.constexpr = WARPS * INT_SLICE
    K_TILE: tl.constexpr = TILE * HEAD_DIM * K_BITS // 8  # bytes
    V_TILE: tl.constexpr = TILE * HEAD_DIM * V_BITS // 8
    if OVERLAP:
        gdc_launch_dependents()  # PDL trigger: `combine_kernel` may become resident, and waits for this grid to end
    # `positions` was written before the step's first launch: it may be read, and work divided, before the PDL wait.
    n_token = tl.load(positions + batch) + 1
    n_left = count_left(n_token, sink_size, window_size)
    slot_end, oldest, gap, n_gap = slots_in_use(n_token, n_left, sink_size, n_slot, FLOAT_BLOCK, HAS_INT)
    n_used = slot_end - n_gap
    int_block, int_blocks = tile_blocks(n_left, n_split, INT_BLOCK, HAS_INT, HALVES)
    each, float_blocks = partition(n_used, int_blocks, n_split, FLOAT_BLOCK)
    lo, tile_lo = first_blocks(split, each, float_blocks, int_blocks)
    hi, tile_hi = first_blocks(split + 1, each, float_blocks, int_blocks)
    lo, hi = lo * FLOAT_BLOCK, tl.minimum(hi * FLOAT_BLOCK, n_used)
    tile_lo, tile_hi = tile_lo * int_block, tile_hi * int_block
    slot_at = batch * slot_stride_b + kv_head * slot_stride_h
    tile_at = (batch * (tl.num_programs(0) // COLUMNS) + kv_head) * n_tile  # the first tile
    k_codes += tile_at * K_TILE
    v_pairs += tile_at * (V_TILE // 2)
    k_scale += tile_at * HEAD_DIM
    v_scale += tile_at * TILE
    k_factor += tile_at * (TILE // 2)
    slot, has_new = n_slot, lo < 0
    k_new += batch * new_stride_kb + kv_head * new_stride_kh
    v_new += batch * new_stride_vb + kv_head * new_stride_vh
    if NEW:
        slot = slot_of((n_token - 1).to(tl.int32), sink_size, n_slot)
        place = tl.where(slot >= gap + n_gap, slot - n_gap, slot)
        has_new = (place >= lo) & (place < hi)
    if OVERLAP:
        if NEW:
            settle(k_new)
            settle(v_new)
        if AHEAD > 0 and lo < hi:
            ITEM: tl.constexpr = k.dtype.element_ty.primitive_bitwidth // 8
            SLOT: tl.constexpr = HEAD_DIM * ITEM
            first = past_gap(lo, gap, n_gap)
            last = tl.minimum(first + (hi - lo), slot_end)  # where the gap lies between, some of it is fetched too
            fetch(k + slot_at + first * HEAD_DIM, k + slot_at + last * HEAD_DIM, AHEAD * SLOT)
            fetch(v + slot_at + first * HEAD_DIM, v + slot_at + last * HEAD_DIM, AHEAD * SLOT)
        if HAS_INT and AHEAD > 0 and tile_lo < tile_hi:
            fetch(k_codes + tile_lo * K_TILE // TILE, k_codes + tile_hi * K_TILE // TILE, AHEAD * K_TILE // TILE)
            v_lo, v_hi = v_pairs + tile_lo * V_TILE // (2 * TILE), v_pairs + tile_hi * V_TILE // (2 * TILE)
            fetch(v_lo, v_hi, AHEAD * V_TILE // TILE)
            fetch(k_scale + tile_lo // TILE * HEAD_DIM, k_scale + (tile_lo // TILE + 1) * HEAD_DIM, HEAD_DIM * 4)
            fetch(v_scale + tile_lo, v_scale + tile_hi, AHEAD * 4)
        # The condition makes the compiler compute the split's bounds before the PDL wait, not after it. Split 0 waits
        # even if it is empty: were this grid to complete before the ones ahead of it, the launch after it could
        # overwrite memory that they still use.
        if (lo < hi) | (tile_lo < tile_hi) | (split == 0):
            gdc_wait()  # for the token's own query, key and value
    DIM: tl.constexpr = triton.next_power_of_2(max(HEAD_DIM, 32))
    q += batch * q_stride_b + kv_head * group * q_stride_h
    log2_scale = softmax_scale * LOG2_E
    # Tiles first, and each branch recomputes what it needs: values live across both loops would take registers.
    if HAS_INT and tile_lo < tile_hi:
        member = tl.arange(0, HEADS)
        head = column % COLUMNS * HEADS + member  # within the group
        query = tile_queries(q, q_stride_h, head, group, HEAD_DIM, HEADS, K_BITS, K_ROTATION)
        by_bias = query[0], query[0]
        if PAIRS > 0:
            by_bias = bias_queries(
                q, q_stride_h, head, group, bias_pairs + kv_head * PAIRS, log2_scale, HEAD_DIM, PAIRS
            )  # fmt: skip
        result = ((batch * tl.num_programs(0) + column) * (n_split + 1) + split + 1) * WARPS + tl.arange(0, WARPS)
        at = result[:, None] * HEADS + member[None, :]
        bias_within += kv_head * (2 * PAIRS * TILE)
        bias_turned += kv_head * n_tile * (2 * PAIRS)
        if HALVES and int_block < INT_BLOCK:
            store_share(
                partial, statistics, at, query, k_codes, v_pairs, k_scale, v_scale, k_factor, by_bias, bias_within,
                bias_turned, tile_lo, tile_hi, log2_scale, HEAD_DIM, WARPS, INT_SLICE // 2, INT_STAGES, K_BITS, V_BITS,
                BALANCED, K_ROTATION, V_ROTATION, V_LATER, PAIRS, INTERPRET,
            )  # fmt: skip
        else:
            store_share(
                partial, statistics, at, query, k_codes, v_pairs, k_scale, v_scale, k_factor, by_bias, bias_within,
                bias_turned, tile_lo, tile_hi, log2_scale, HEAD_DIM, WARPS, INT_SLICE, INT_STAGES, K_BITS, V_BITS,
                BALANCED, K_ROTATION, V_ROTATION, V_LATER, PAIRS, INTERPRET,
            )  # fmt: skip
    if lo < hi:
        if NEW and has_new:
            e = tl.arange(0, DIM)
            to, inside = slot_at + slot.to(tl.int64) * HEAD_DIM + e, e < HEAD_DIM
            tl.store(k + to, tl.load(k_new + e, inside).to(k.dtype.element_ty), inside)
            tl.store(v + to, tl.load(v_new + e, inside).to(v.dtype.element_ty), inside)
            tl.debug_barrier()  # other threads will read it
        d, member = tl.arange(0, DIM), tl.arange(0, HEADS)
        head = column % COLUMNS * HEADS + member
        x = load_q(q, q_stride_h, head, group, d, d < HEAD_DIM)
        partner = x
        if TURN_SINKS:
            swapped = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
            partner = load_q(q, q_stride_h, head, group, swapped, d < HEAD_DIM)
        out, best, total = float_share(
            x, partner, k + slot_at, v + slot_at, cos + batch * HEAD_DIM, sin + batch * HEAD_DIM, lo, hi, slot_end, gap,
            n_gap, sink_size, oldest, n_slot, n_token.to(tl.int32) - n_left - sink_size, n_token - n_slot, log2_scale,
            HEAD_DIM, WARPS, FLOAT_SLICE, FLOAT_STAGES, TURN_SINKS, HAS_INT, INTERPRET,
        )  # fmt: skip
        if V_LATER > 1 and int_blocks > 0:  # merging will undo it
            out = butterfly(out, V_LATER, HEADS) * (1.0 / V_LATER)
        result = ((batch * tl.num_programs(0) + column) * (n_split + 1) + split) * WARPS + tl.arange(0, WARPS)
        at = result[:, None] * HEADS + member[None, :]
        tl.store(partial + at[:, None, :] * HEAD_DIM + d[None, :, None], out, (d < HEAD_DIM)[None, :, None])
        tl.store(statistics + 2 * at, best)
        tl.store(statistics + 2 * at + 1, total)
    if OVERLAP:
        ROUND: tl.constexpr = WARPS * 32 * 128  # a line a thread
        program = (tl.program_id(1) * tl.num_programs(2) + split) * tl.num_programs(0) + column
        start = program.to(tl.int64) * next_each
        end = tl.minimum(start + next_each, next_bytes)
        for offset in range(start, end, ROUND):
            fetch(next_weight.to(tl.int64) + offset, next_weight.to(tl.int64) + end, ROUND)


def decode_attention(
    q: Tensor,
    regions: Regions,
    positions: Tensor,
    sink_rope: tuple[Tensor, Tensor] | None = None,
    next_weight: Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    configure: Callable[..., Plan] = plan,
) -> Tensor:
    """Attention of one new token per sequence over all that its cache holds.

    q: [batch, n_head, head_dim]; positions: int64 [batch], written before the launch that comes before this
    one, since they are read before the PDL wait. sink_rope: cos and sin, float32 [batch,
    head_dim], as `model.Rope` has them. When given, sinks are seen at their distance within the cache, as if the
    dropped tokens had never been there (StreamingLLM, arXiv:2309.17453): for them q is turned back by as many
    positions. It is read after the PDL wait, and only where something was dropped. next_weight: the weight that is read
    next, which may be prefetched into L2 meanwhile. new: the token's key and value, [batch, n_kv_head, head_dim] each,
    to be appended first; None: they are in the cache already. With `new`, `positions` must be written as early as
    `append` asks.
    Returns [batch, n_head, head_dim] in q's dtype. No host synchronisation.
    """
    batch_heads, group = q.shape[0] * regions.k.shape[1], q.shape[1] // regions.k.shape[1]
    k_bits, v_bits = stored_bits(regions)
    here, itemsize = processor(q.device), regions.k.element_size()
    p = configure(batch_heads, group, q.shape[2], itemsize, here.multiprocessors, k_bits, v_bits)
    p = fitting(p, here.shared, q.shape[2], itemsize, k_bits, v_bits)
    if new is not None and here.overlap and not split_appends(batch_heads, here.multiprocessors):
        append(regions, *new, positions, early=p.ahead > 0)
        new = None
    return run(q, regions, positions, sink_rope, p, next_weight, new)


def run(
    q: Tensor,
    regions: Regions,
    positions: Tensor,
    sink_rope: tuple[Tensor, Tensor] | None,
    p: Plan,
    next_weight: Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`decode_attention` by a given plan; `new` is written by the programs that read it."""
    k_new, v_new = new or (regions.k[:, :, 0], regions.v[:, :, 0])  # the latter are never looked at
    assert k_new.stride(2) == v_new.stride(2) == 1
    batch, n_head, head_dim = q.shape
    cos, sin = sink_rope or (positions, positions)  # the latter are never looked at
    assert q.stride(2) == 1 and positions.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    n_kv_head, n_slot = regions.k.shape[1:3]
    group = n_head // n_kv_head
    columns = triton.cdiv(group, p.heads)
    n_column = n_kv_head * columns
    here = processor(q.device)
    overlap = here.overlap
    n_split = p.splits or sharing(p, batch * n_column, here.multiprocessors)

    k_bits, v_bits = stored_bits(regions)
    has_int = k_bits > 0
    k_codes, v_codes, k_scale, v_scale, k_factor = tile_operands(regions)
    if has_int:
        k_codes, v_codes = k_codes.view(torch.int8), v_codes.view(torch.int16)
    partials = batch, n_column, n_split + 1, p.warps, p.heads
    partial = torch.empty(*partials, head_dim, dtype=torch.float32, device=q.device)
    statistics = torch.empty(*partials, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, n_head, head_dim, dtype=q.dtype, device=q.device)
    grid = (n_column, batch, n_split)  # also where there are fewer blocks: empty splits prefetch `next_weight`
    next_bytes = 0 if next_weight is None or not overlap else min(next_weight.nbytes, MOST_NEXT)
    bias, n_pair = bias_operands(regions)
    block, rotated = merging((n_split + 1) * p.warps, head_dim), rotations(regions)
    later = rounds_later(p, k_bits, v_bits, rotated["V_ROTATION"], block["DIMS"])
    halves = bool(p.halves) and p.warps * p.int_slice == TILE_TOKENS  # what was made shorter to fit is not halved again
    launch(split_kernel, grid)(
        q, regions.k, regions.v, k_codes, v_codes, k_scale, v_scale, k_factor, *bias, positions,
        cos, sin, partial, statistics, q if next_weight is None else next_weight, k_new, v_new,
        *q.stride()[:2], *regions.k.stride()[:2], *k_new.stride()[:2], *v_new.stride()[:2], k_codes.shape[2], group,
        regions.sink_size, regions.window_size, n_slot, n_split, next_bytes,
        min(MOST_NEXT_EACH, 128 * triton.cdiv(next_bytes, 128 * math.prod(grid))), head_dim**-0.5,
        HEAD_DIM=head_dim, HEADS=p.heads, COLUMNS=columns, WARPS=p.warps, FLOAT_SLICE=p.float_slice,
        INT_SLICE=p.int_slice, FLOAT_STAGES=p.float_stages, INT_STAGES=p.int_stages, K_BITS=k_bits,
        V_BITS=v_bits, BALANCED=regions.k_format is not None and regions.k_format.balanced, **rotated,
        PAIRS=n_pair, AHEAD=p.ahead if overlap else 0, TURN_SINKS=sink_rope is not None, V_LATER=later,
        HALVES=halves, NEW=new is not None, INTERPRET=INTERPRET, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=p.warps,
    )  # fmt: skip
    launch(combine_kernel, (n_kv_head, batch, group * (head_dim // block["DIMS"])))(
        partial, statistics, positions, out, group, regions.sink_size, regions.window_size, n_slot, n_split,
        HEAD_DIM=head_dim, HEADS=p.heads, COLUMNS=columns, WARPS=p.warps, **blocks(p), **block, HAS_INT=has_int,
        HALVES=halves, V_LATER=later, OVERLAP=overlap, launch_pdl=overlap, num_warps=1,
    )  # fmt: skip
    return out
