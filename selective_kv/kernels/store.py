"""Writing to the cache in Triton: new tokens into their slots, what leaves the window into quantised rows.

A token is quantised once, from its slot, in the launch that gives the slot to a newer token (`append`), or
straight from the chunk it came with if it passes through the window without staying (`store_chunk`). The
integers are those of `formats.py`, bit for bit: divisions are IEEE ones and halves round to even. (After a
rotation, a sum of head_dim terms, they are off by one where the sum's last bit tips a half.)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from selective_kv.kernels.basics import INTERPRET, prefetch
from selective_kv.kernels.decode import as_words
from selective_kv.kernels.decode_config import early, processor
from selective_kv.kernels.hadamard import butterfly_halves
from selective_kv.kernels.launch import launch
from selective_kv.regions import Regions

ROUND = tl.constexpr(12582912.0)  # adding and subtracting it rounds a small float32 to nearest even


@triton.jit
def eight_bits(x, scale):
    """x: float32 [N, D]; scale: [N]. Returns int8 [N, D]."""
    ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    return ((tl.minimum(tl.maximum(ratio, -127.0), 127.0) + ROUND) - ROUND).to(tl.int8)


@triton.jit
def group_scale(low, high):
    """Scale and base, float32 with the values of float16, of a group whose least and largest elements are given."""
    fifteen = tl.full(low.shape, 15.0, tl.float32)
    scale = tl.div_rn(high - low, fifteen).to(tl.float16).to(tl.float32)
    return tl.where(scale == 0, 1.0, scale), low.to(tl.float16).to(tl.float32)


@triton.jit
def four_bits(x, scale, base):
    """x: float32 [N, D]; scale, base: [N]. Returns int32 [N, D] from 0 to 15."""
    ratio = tl.div_rn(x - base[:, None], tl.broadcast_to(scale[:, None], x.shape))
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    return ((tl.minimum(tl.maximum(ratio, 0.0), 15.0) + ROUND) - ROUND).to(tl.int32)


@triton.jit
def one_word(scale, base):
    """Two float16 in an int32, the scale in its lower half."""
    low = scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (base.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def least(x, there):
    return tl.min(tl.where(there, x, float("inf")), 1)


@triton.jit
def store_vectors(
    low, high, ints, scales, row, wanted, rotation,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, ROTATED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Quantise vectors given as their lower and upper halves, [N, D / 2] each in a float dtype, into the rows `row`
    [N] where `wanted`. ints, scales: of one KV head of one sequence; with 4 bits as bytes and as int32.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    d = tl.arange(0, low.shape[1])
    there = d[None, :] < HALF
    mask = wanted[:, None] & there
    if ROTATED and low.shape[0] > 1:
        dtype: tl.constexpr = tl.float32 if INTERPRET else rotation.dtype.element_ty
        norm: tl.constexpr = HEAD_DIM**-0.5
        at = rotation + d[:, None] * HEAD_DIM + d[None, :]  # symmetric: its quarters are those of its transpose
        one, two = tl.load(at).to(dtype), tl.load(at + HALF).to(dtype)
        four = tl.load(at + HALF * HEAD_DIM + HALF).to(dtype)
        a, b = low.to(dtype), high.to(dtype)  # exact: this is the dtype of the slots
        low = tl.dot(b, two, tl.dot(a, one, input_precision="ieee"), input_precision="ieee") * norm
        high = tl.dot(b, four, tl.dot(a, two, input_precision="ieee"), input_precision="ieee") * norm
    low, high = low.to(tl.float32), high.to(tl.float32)
    if ROTATED and low.shape[0] == 1:  # matrix units would rotate it sixteen times, after reading the matrix
        low, high = butterfly_halves(low, high, HALF, 1)
        low, high = low * (HEAD_DIM**-0.5), high * (HEAD_DIM**-0.5)
    if BITS == 8:
        absmax = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
        scale = tl.where(absmax == 0, 1.0, tl.div_rn(absmax, tl.full(absmax.shape, 127.0, tl.float32)))
        bad = tl.max(((low != low) | (high != high)).to(tl.int32), 1)
        scale = tl.where(bad > 0, float("nan"), scale)  # a NaN says so; integers have no meaning then
        at = ints + row[:, None] * HEAD_DIM + d[None, :]
        tl.store(at, eight_bits(low, scale), mask)
        tl.store(at + HALF, eight_bits(high, scale), mask)
        tl.store(scales + row, scale, wanted)
    else:
        first, second = least(low, there), least(high, there)
        first_top, second_top = -least(-low, there), -least(-high, there)
        if GROUPS == 1:
            first = tl.minimum(first, second)
            first_top = tl.maximum(first_top, second_top)
            second, second_top = first, first_top
        scale, base = group_scale(first, first_top)
        packed = four_bits(low, scale, base)
        tl.store(scales + row * GROUPS, one_word(scale, base), wanted)
        if GROUPS == 2:
            scale, base = group_scale(second, second_top)
            tl.store(scales + row * GROUPS + 1, one_word(scale, base), wanted)
        packed |= four_bits(high, scale, base) << 4
        tl.store(ints + row[:, None] * HALF + d[None, :], packed.to(tl.uint8), mask)


@triton.jit(do_not_specialize=["n_row", "sink_size", "window_size"])
def append_kernel(
    k_new, v_new, k, v, k_int, v_int, k_scale, v_scale, rotation, positions,
    new_stride_kb, new_stride_kh, new_stride_vb, new_stride_vh, slot_stride_b, slot_stride_h,
    n_row, sink_size, window_size,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr, ROTATED: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (KV head, sequence, 0 for K and 1 for V). K_BITS 0: what leaves is dropped.

    What leaves depends on earlier steps alone: it is quantised while the launch before this one, which makes the
    new token, is still at work. A load and a store are left for afterwards. EARLY: the next launch's programs may
    take their places before that.
    """
    if OVERLAP and EARLY:
        gdc_launch_dependents()
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row_at = (batch * tl.num_programs(0) + head) * n_row
    pos = tl.load(positions + batch).to(tl.int32)
    left = pos - sink_size - window_size  # the row of what leaves
    # unsigned and of 32 bits: a division of 64 bits is ten times as long
    turn = (pos - sink_size).to(tl.uint32) % window_size.to(tl.uint32)
    slot = tl.where(left < 0, pos, sink_size + turn.to(tl.int32)).to(tl.int64)
    slot_at = batch * slot_stride_b + head * slot_stride_h + slot * HEAD_DIM
    if tl.program_id(2) == 0:
        new, slots = k_new + batch * new_stride_kb + head * new_stride_kh, k + slot_at
        if K_BITS > 0:
            leave(
                slots, k_int + row_at * (HEAD_DIM * K_BITS // 8), k_scale + row_at * K_GROUPS, left, rotation,
                HEAD_DIM, K_BITS, K_GROUPS, ROTATED, INTERPRET,
            )  # fmt: skip
    else:
        new, slots = v_new + batch * new_stride_vb + head * new_stride_vh, v + slot_at
        if V_BITS > 0:
            leave(
                slots, v_int + row_at * (HEAD_DIM * V_BITS // 8), v_scale + row_at * V_GROUPS, left, rotation,
                HEAD_DIM, V_BITS, V_GROUPS, False, INTERPRET,
            )  # fmt: skip
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    if OVERLAP:
        settle(new)
        settle(slots)
        gdc_wait()
    if OVERLAP and not EARLY:
        gdc_launch_dependents()  # not before: the splits must find every processor as empty as the next
    tl.store(slots + d, tl.load(new + d, d < HEAD_DIM).to(slots.dtype.element_ty), d < HEAD_DIM)


@triton.jit
def settle(at):
    """Have the address, a scalar, computed and translated by now; the compiler would put it off until it is used."""
    prefetch(at)


@triton.jit
def leave(
    slot, ints, scales, row, rotation,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, ROTATED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Quantise the vector [D] in `slot` into row `row` of its head; a negative row: nothing leaves yet."""
    if row >= 0:
        d = tl.arange(0, triton.next_power_of_2(HEAD_DIM // 2))[None, :]
        there = d < HEAD_DIM // 2
        # from L2: before its wait a launch has no promise that L1 holds nothing older
        low = tl.load(slot + d, there, 0.0, cache_modifier=".cg")
        high = tl.load(slot + HEAD_DIM // 2 + d, there, 0.0, cache_modifier=".cg")
        one = tl.arange(0, 1)
        store_vectors(
            low, high, ints, scales, row.to(tl.int64) + one, one == 0, rotation,
            HEAD_DIM, BITS, GROUPS, ROTATED, INTERPRET,
        )  # fmt: skip
        tl.debug_barrier()  # every thread has read its part before another's new one takes the place


def operands(regions: Regions) -> tuple[list[Tensor], dict[str, int]]:
    """What the kernels here take of the quantised rows: integers, scales, rotation; and how to read them."""
    head_dim = regions.k.shape[3]
    flags = {
        "HEAD_DIM": head_dim, "K_BITS": 0, "V_BITS": 0, "K_GROUPS": regions.k_format.n_group(head_dim),
        "V_GROUPS": regions.v_format.n_group(head_dim), "ROTATED": regions.rotation is not None, "INTERPRET": INTERPRET,
    }  # fmt: skip
    k_int, v_int, k_scale, v_scale = regions.k_int, regions.v_int, regions.k_scale, regions.v_scale
    if k_int is None or v_int is None or k_scale is None or v_scale is None:
        return [regions.k] * 5, flags
    assert all(t.is_contiguous() for t in (k_int, v_int, k_scale, v_scale))
    flags |= {"K_BITS": regions.k_format.bits, "V_BITS": regions.v_format.bits}
    rotation = regions.k if regions.rotation is None else regions.rotation
    return [k_int, v_int, as_words(k_scale), as_words(v_scale), rotation], flags


def append(regions: Regions, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """Write one token per sequence; the one that it pushes out of the window is quantised, or dropped.

    k, v: [batch, n_kv_head, head_dim]; positions: int64 [batch], below 2**31, where the new tokens stand.

    On Hopper `positions` and the slots are read, and rows are written, before the launch ahead of this one has ended;
    k and v are read after it. So an ordinary launch, one that waits for all before it, must stand between whatever
    writes a slot or `positions` and this: a step's lengths and its sampling are such. Of two calls for one cache with
    nothing of that kind between, the second may miss what the first writes, where that is its slot: window_size 1, or
    positions that repeat.
    """
    batch, n_kv_head, _ = k.shape
    assert k.stride(2) == v.stride(2) == 1 and positions.is_contiguous()
    here = processor(k.device)
    stored, flags = operands(regions)
    flags["EARLY"] = early(batch * n_kv_head, here.multiprocessors, 0 < flags["K_BITS"] + flags["V_BITS"] < 16)
    launch(append_kernel, (n_kv_head, batch, 2))(
        k, v, regions.k, regions.v, *stored, positions,
        *k.stride()[:2], *v.stride()[:2], *regions.k.stride()[:2], stored[0].shape[2],
        regions.sink_size, regions.window_size, **flags, OVERLAP=here.overlap, launch_pdl=here.overlap, num_warps=1,
    )  # fmt: skip


@triton.jit
def load_halves(x, at, wanted, HEAD_DIM: tl.constexpr):
    """Two tiles [N, D / 2] of vectors that begin at the offsets `at` [N]; zeros where not wanted."""
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM // 2))[None, :]
    mask = wanted[:, None] & (d < HEAD_DIM // 2)
    at = at[:, None] + d
    return tl.load(x + at, mask, 0.0), tl.load(x + at + HEAD_DIM // 2, mask, 0.0)


@triton.jit(do_not_specialize=["start", "first", "end", "n_row", "n_kv_head", "sink_size", "window_size"])
def quantize_kernel(
    chunk_k, chunk_v, k, v, k_int, v_int, k_scale, v_scale, rotation, start, first, end,
    k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, slot_stride_b, slot_stride_h,
    n_row, n_kv_head, sink_size, window_size,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr, ROTATED: tl.constexpr, INTERPRET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, sequence and KV head, 0 for K and 1 for V): positions first to end - 1 are
    quantised from their slots if they are older than `start`, and from the chunk that begins there if not.
    """
    one = tl.program_id(1)
    batch, head = (one // n_kv_head).to(tl.int64), (one % n_kv_head).to(tl.int64)
    pos = first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = pos < end
    old, fresh = wanted & (pos < start), wanted & (pos >= start)
    slot_at = batch * slot_stride_b + head * slot_stride_h + (sink_size + (pos - sink_size) % window_size) * HEAD_DIM
    row, row_at = pos - sink_size, one.to(tl.int64) * n_row
    if tl.program_id(2) == 0:
        low, high = load_halves(
            chunk_k, batch * k_stride_b + head * k_stride_h + (pos - start) * k_stride_t, fresh, HEAD_DIM
        )
        old_low, old_high = load_halves(k, slot_at, old, HEAD_DIM)
        low, high = tl.where(old[:, None], old_low, low), tl.where(old[:, None], old_high, high)
        store_vectors(
            low, high, k_int + row_at * (HEAD_DIM * K_BITS // 8), k_scale + row_at * K_GROUPS, row, wanted,
            rotation, HEAD_DIM, K_BITS, K_GROUPS, ROTATED, INTERPRET,
        )  # fmt: skip
    else:
        low, high = load_halves(
            chunk_v, batch * v_stride_b + head * v_stride_h + (pos - start) * v_stride_t, fresh, HEAD_DIM
        )
        old_low, old_high = load_halves(v, slot_at, old, HEAD_DIM)
        low, high = tl.where(old[:, None], old_low, low), tl.where(old[:, None], old_high, high)
        store_vectors(
            low, high, v_int + row_at * (HEAD_DIM * V_BITS // 8), v_scale + row_at * V_GROUPS, row, wanted,
            rotation, HEAD_DIM, V_BITS, V_GROUPS, False, INTERPRET,
        )  # fmt: skip


@triton.jit(do_not_specialize=["start", "end", "sink_size", "window_size", "n_sink"])
def slots_kernel(
    chunk_k, chunk_v, k, v, start, end, n_sink,
    k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, slot_stride_b, slot_stride_h,
    n_kv_head, sink_size, window_size, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of kept tokens, sequence and KV head): write them into their slots.

    Of the chunk's tokens, positions start to end - 1, the first n_sink are kept (they are sinks) and
    those that are still in the window at its end.
    """
    batch, head = (tl.program_id(1) // n_kv_head).to(tl.int64), (tl.program_id(1) % n_kv_head).to(tl.int64)
    kept = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    recent = tl.maximum(tl.maximum(start, sink_size), end - window_size)
    pos = tl.where(kept < n_sink, start + kept, recent + kept - n_sink)
    slot = tl.where(kept < n_sink, pos, sink_size + (pos - sink_size) % window_size)
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    wanted = (pos < end)[:, None] & (d < HEAD_DIM)
    k_at = batch * k_stride_b + head * k_stride_h + (pos - start)[:, None] * k_stride_t + d
    v_at = batch * v_stride_b + head * v_stride_h + (pos - start)[:, None] * v_stride_t + d
    slot_at = batch * slot_stride_b + head * slot_stride_h + slot[:, None] * HEAD_DIM + d
    tl.store(k + slot_at, tl.load(chunk_k + k_at, wanted, 0.0).to(k.dtype.element_ty), wanted)
    tl.store(v + slot_at, tl.load(chunk_v + v_at, wanted, 0.0).to(v.dtype.element_ty), wanted)


BLOCK = 16  # tokens per program


def quantize_span(regions: Regions, k: Tensor, v: Tensor, start: int, first: int, end: int) -> None:
    """Quantise positions first to end - 1; from `start` on they are in k, v [batch, n_kv_head, token, head_dim]."""
    first = max(first, regions.sink_size)
    if first >= end or regions.k_int is None:
        return
    batch, n_kv_head, _, _ = k.shape
    stored, flags = operands(regions)
    launch(quantize_kernel, (triton.cdiv(end - first, BLOCK), batch * n_kv_head, 2))(
        k, v, regions.k, regions.v, *stored, start, first, end,
        *k.stride()[:3], *v.stride()[:3], *regions.k.stride()[:2], stored[0].shape[2],
        n_kv_head, regions.sink_size, regions.window_size, **flags, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def evict(regions: Regions, start: int) -> None:
    """Before a chunk: quantise the token that position `start` pushes out of the window."""
    leaving = start - regions.window_size
    quantize_span(regions, regions.k, regions.v, start, leaving, leaving + 1)  # from its slot: no chunk is read


def store_chunk(regions: Regions, k: Tensor, v: Tensor, start: int) -> None:
    """After attention over a chunk: keep its last tokens, quantise (or drop) what leaves the window.

    k, v: [batch, n_kv_head, token, head_dim], the tokens at positions start, start + 1, ...
    `evict(regions, start)` came first. Two launches: every old token is read before a new one takes its slot.
    """
    sink, window = regions.sink_size, regions.window_size
    batch, n_kv_head, n_token, head_dim = k.shape
    end = start + n_token
    quantize_span(regions, k, v, start, start - window + 1, end - window)
    n_sink = max(0, min(sink, end) - start)
    n_kept = n_sink + max(0, end - max(start, sink, end - window))
    launch(slots_kernel, (triton.cdiv(n_kept, BLOCK), batch * n_kv_head))(
        k, v, regions.k, regions.v, start, end, n_sink,
        *k.stride()[:3], *v.stride()[:3], *regions.k.stride()[:2], n_kv_head, sink, window,
        HEAD_DIM=head_dim, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
