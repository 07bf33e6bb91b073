"""Writing to the cache in Triton: new tokens into their slots, what leaves the window into int8 rows.

A token is quantised once, from its slot, in the launch that gives the slot to a newer token (`append`), or
straight from the chunk it came with if it passes through the window without staying (`store_chunk`). The
integers are those of `quantize.quantize`, bit for bit: divisions are IEEE ones and halves round to even.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.regions import Regions
from kernels.triton_decode import processor

ROUND = tl.constexpr(12582912.0)  # adding and subtracting it rounds a small float32 to nearest even


@triton.jit
def quantize_rows(x):
    """x: float32 [N, D], padded with zeros. Returns int8 [N, D] and float32 scales [N].

    A vector with a NaN or an infinity gets a scale that says so, and integers of no meaning.
    """
    absmax = tl.max(tl.abs(x), 1)
    scale = tl.where(absmax == 0, 1.0, tl.div_rn(absmax, tl.full(absmax.shape, 127.0, tl.float32)))
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
    ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    integers = (tl.minimum(tl.maximum(ratio, -127.0), 127.0) + ROUND) - ROUND
    return integers.to(tl.int8), scale


@triton.jit(do_not_specialize=["n_kv_head", "sink_size", "window_size", "scale_stride_b", "scale_stride_h"])
def append_kernel(
    k_new, v_new, k, v, k_int, v_int, k_scale, v_scale, positions,
    new_stride_kb, new_stride_kh, new_stride_vb, new_stride_vh, slot_stride_b, slot_stride_h,
    row_stride_b, row_stride_h, scale_stride_b, scale_stride_h, n_kv_head, sink_size, window_size,
    HEAD_DIM: tl.constexpr, HAS_INT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (sequence and KV head, 0 for K and 1 for V)."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()  # not before: the splits must find every processor as empty as the next
    batch, head = (tl.program_id(0) // n_kv_head).to(tl.int64), (tl.program_id(0) % n_kv_head).to(tl.int64)
    if tl.program_id(1) == 0:
        append_one(
            k_new + batch * new_stride_kb + head * new_stride_kh,
            k + batch * slot_stride_b + head * slot_stride_h,
            k_int + batch * row_stride_b + head * row_stride_h,
            k_scale + batch * scale_stride_b + head * scale_stride_h,
            tl.load(positions + batch), sink_size, window_size, HEAD_DIM, HAS_INT,
        )  # fmt: skip
    else:
        append_one(
            v_new + batch * new_stride_vb + head * new_stride_vh,
            v + batch * slot_stride_b + head * slot_stride_h,
            v_int + batch * row_stride_b + head * row_stride_h,
            v_scale + batch * scale_stride_b + head * scale_stride_h,
            tl.load(positions + batch), sink_size, window_size, HEAD_DIM, HAS_INT,
        )  # fmt: skip


@triton.jit
def append_one(new, slots, rows, scales, pos, sink_size, window_size, HEAD_DIM: tl.constexpr, HAS_INT: tl.constexpr):
    """One token of one head: quantise what its slot holds if that leaves the window, then write the slot."""
    DIM: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    d = tl.arange(0, DIM)
    there = d < HEAD_DIM
    slot = tl.where(pos < sink_size, pos, sink_size + (pos - sink_size) % window_size)
    x = tl.load(new + d, there, 0.0)
    at = slots + slot * HEAD_DIM + d
    if HAS_INT and pos >= sink_size + window_size:
        row = pos - window_size - sink_size
        integers, scale = quantize_rows(tl.load(at, there, 0.0).to(tl.float32)[None, :])
        tl.store(rows + row * HEAD_DIM + d[None, :], integers, there[None, :])
        tl.store(scales + row + tl.arange(0, 1), scale)
        tl.debug_barrier()  # the old token has been read before the new one overwrites it
    tl.store(at, x.to(slots.dtype.element_ty), there)


def append(regions: Regions, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """Write one token per sequence; the one that it pushes out of the window is quantised, or dropped.

    k, v: [batch, n_kv_head, head_dim]; positions: int64 [batch], where the new tokens stand.
    """
    batch, n_kv_head, head_dim = k.shape
    has_int = regions.k_int is not None
    k_int, v_int, k_scale, v_scale = (
        (regions.k_int, regions.v_int, regions.k_scale, regions.v_scale) if has_int else (regions.k,) * 4
    )
    assert k_int is not None and v_int is not None and k_scale is not None and v_scale is not None
    overlap = processor(k.device)[1]
    append_kernel[(batch * n_kv_head, 2)](
        k, v, regions.k, regions.v, k_int, v_int, k_scale, v_scale, positions,
        *k.stride()[:2], *v.stride()[:2], *regions.k.stride()[:2], *k_int.stride()[:2], *k_scale.stride()[:2],
        n_kv_head, regions.sink_size, regions.window_size, HEAD_DIM=head_dim, HAS_INT=has_int,
        OVERLAP=overlap, launch_pdl=overlap, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "first", "end", "sink_size", "window_size", "scale_stride_b", "scale_stride_h"])
def quantize_kernel(
    chunk_k, chunk_v, k, v, k_int, v_int, k_scale, v_scale, start, first, end,
    k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, slot_stride_b, slot_stride_h,
    row_stride_b, row_stride_h, scale_stride_b, scale_stride_h, n_kv_head, sink_size, window_size,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, sequence and KV head, 0 for K and 1 for V): positions first to end - 1 are
    quantised from their slots if they are older than `start`, and from the chunk that begins there if not.
    """
    batch, head = (tl.program_id(1) // n_kv_head).to(tl.int64), (tl.program_id(1) % n_kv_head).to(tl.int64)
    pos = first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    wanted = (pos < end)[:, None] & (d < HEAD_DIM)
    old = (pos < start)[:, None]
    slot_at = (sink_size + (pos - sink_size) % window_size)[:, None] * HEAD_DIM + d
    slot_at += batch * slot_stride_b + head * slot_stride_h
    row_at = batch * row_stride_b + head * row_stride_h + (pos - sink_size)[:, None] * HEAD_DIM + d
    scale_at = batch * scale_stride_b + head * scale_stride_h + pos - sink_size
    if tl.program_id(2) == 0:
        chunk_at = batch * k_stride_b + head * k_stride_h + (pos - start)[:, None] * k_stride_t + d
        x = tl.load(chunk_k + chunk_at, wanted & (old == 0), 0.0).to(tl.float32)
        x += tl.load(k + slot_at, wanted & old, 0.0).to(tl.float32)  # one of the two is zero
        integers, scale = quantize_rows(x)
        tl.store(k_int + row_at, integers, wanted)
        tl.store(k_scale + scale_at, scale, pos < end)
    else:
        chunk_at = batch * v_stride_b + head * v_stride_h + (pos - start)[:, None] * v_stride_t + d
        x = tl.load(chunk_v + chunk_at, wanted & (old == 0), 0.0).to(tl.float32)
        x += tl.load(v + slot_at, wanted & old, 0.0).to(tl.float32)
        integers, scale = quantize_rows(x)
        tl.store(v_int + row_at, integers, wanted)
        tl.store(v_scale + scale_at, scale, pos < end)


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
    k_int, v_int, k_scale, v_scale = regions.k_int, regions.v_int, regions.k_scale, regions.v_scale
    assert v_int is not None and k_scale is not None and v_scale is not None
    batch, n_kv_head, _, head_dim = k.shape
    quantize_kernel[(triton.cdiv(end - first, BLOCK), batch * n_kv_head, 2)](
        k, v, regions.k, regions.v, k_int, v_int, k_scale, v_scale, start, first, end,
        *k.stride()[:3], *v.stride()[:3], *regions.k.stride()[:2], *k_int.stride()[:2], *k_scale.stride()[:2],
        n_kv_head, regions.sink_size, regions.window_size, HEAD_DIM=head_dim, BLOCK=BLOCK, num_warps=4,
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
    slots_kernel[(triton.cdiv(n_kept, BLOCK), batch * n_kv_head)](
        k, v, regions.k, regions.v, start, end, n_sink,
        *k.stride()[:3], *v.stride()[:3], *regions.k.stride()[:2], n_kv_head, sink, window,
        HEAD_DIM=head_dim, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
