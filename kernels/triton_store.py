"""Writing to the cache in Triton: new tokens into their slots, what leaves the window into int8 rows.

A token is quantised once, from its slot, in the launch that gives the slot to a newer token (`append`), or
straight from the chunk it came with if it passes through the window without staying (`store_chunk`). The
integers are those of `quantize.quantize`, bit for bit: divisions are IEEE ones and halves round to even.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.regions import Regions

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
    HEAD_DIM: tl.constexpr, HAS_INT: tl.constexpr,
):  # fmt: skip
    """Program (sequence and KV head, 0 for K and 1 for V)."""
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
    append_kernel[(batch * n_kv_head, 2)](
        k, v, regions.k, regions.v, k_int, v_int, k_scale, v_scale, positions,
        *k.stride()[:2], *v.stride()[:2], *regions.k.stride()[:2], *k_int.stride()[:2], *k_scale.stride()[:2],
        n_kv_head, regions.sink_size, regions.window_size, HEAD_DIM=head_dim, HAS_INT=has_int, num_warps=1,
    )  # fmt: skip
