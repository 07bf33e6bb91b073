"""Online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867): one block of full-precision keys and values, in Triton.

Keys are the M dimension of the tensor-core product and queries (the heads of a group) the N dimension, which may be as
small as 8: a small group wastes little. A block is cut into one slice per warp (`dot` over a batch of WARPS slices):
every warp keeps a softmax of its own, which `combine_kernel` reduces. One for all would take two barriers a block.

The state is (top, total, out): top [WARPS, Q] the running maximum of scores, in whatever unit `step` turns into log2;
total [WARPS, SLICE, Q] sums of exponentials, reduced over SLICE at the end; out [WARPS, D, Q] the unnormalised output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.kernels.basics import UNSEEN


@triton.jit
def load_q(q, stride_h, head, n_head, d, there):
    """float32 [D, N]: one query head per column, zeros where there is no such head or dim."""
    at = head[None, :] * stride_h + d[:, None]
    return tl.load(q + at, there[:, None] & (head < n_head)[None, :], 0.0).to(tl.float32)


@triton.jit
def at_slot(index, sink_size, oldest, n_slot):
    """The slot of the index-th token in full precision: sinks, then the ring of slots from its `oldest` token on."""
    slot = tl.where(index < sink_size, index, index + oldest)
    return tl.where(slot < n_slot, slot, slot - (n_slot - sink_size))


@triton.jit
def float_block(
    state, q, step, k, v, slot, end, sink_size, oldest, n_slot, n_ring,
    HEAD_DIM: tl.constexpr, TURN_SINKS: tl.constexpr, RING: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the tokens in the slots `slot` [WARPS, SLICE], if before `end`, to the softmax, which does not mind a ring's
    order. RING: only the n_ring slots of the ring from its `oldest` on count; what stands in the others is in a tile.

    To go through slots in the order of memory, skip blocks and mask the few that are left, takes an addition a row; to
    find the slot of each token (`at_slot`) took 350 instructions after a decode step's PDL wait.

    q: [WARPS, D, N] in the slots' dtype; with TURN_SINKS [WARPS, D, 2 * N], each query beside the one that stands in
    for it where sinks are looked at. step: from products to log2 units.
    """
    top, total, out = state
    DIM: tl.constexpr = q.shape[1]
    d = tl.arange(0, DIM)
    within = tl.minimum(slot, end - 1)  # what lies beyond may be NaN, and 0 * NaN is NaN
    k_at = k + within[:, :, None] * HEAD_DIM + d[None, None, :]
    v_at = v + within[:, None, :] * HEAD_DIM + d[None, :, None]  # [WARPS, D, SLICE]
    if DIM == HEAD_DIM:
        keys, values = tl.load(k_at), tl.load(v_at)
    else:
        keys = tl.load(k_at, (d < HEAD_DIM)[None, None, :], 0.0)
        values = tl.load(v_at, (d < HEAD_DIM)[None, :, None], 0.0)
    if INTERPRET:  # its bfloat16 arithmetic is wrong
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    score = tl.dot(keys, q, input_precision="ieee")  # [WARPS, SLICE, N]
    if TURN_SINKS:
        own, back = tl.split(tl.reshape(score, (slot.shape[0], slot.shape[1], q.shape[2] // 2, 2)))
        score = tl.where((slot < sink_size)[:, :, None], back, own)
    seen = slot < end
    if RING:
        age = slot - sink_size - oldest
        age = tl.where(age < 0, age + (n_slot - sink_size), age)
        seen = seen & ((slot < sink_size) | (age < n_ring))
    score = tl.where(seen[:, :, None], score, UNSEEN)
    new_top = tl.maximum(top, tl.max(score, 1))
    prob = tl.exp2((score - new_top[:, None, :]) * step)
    keep = tl.exp2((top - new_top) * step)
    total = total * keep[:, None, :] + prob
    out = tl.dot(values, prob.to(values.dtype), out * keep[:, None, :], input_precision="ieee")
    return new_top, total, out


@triton.jit
def apply_rope(x, partner, cos, sin, d, HEAD_DIM: tl.constexpr):
    """x float32 [D, N] turned by RoPE, whose pairs are (i, i + D / 2). partner: x with the halves of D swapped.

    cos, sin: pointers to float32 [HEAD_DIM], as `model.Rope` has them. Angles are not made here: a million positions
    are so many turns that it takes float64, and all programs of all layers of a step would make the same ones.
    """
    there = d < HEAD_DIM
    return x * tl.load(cos + d, there, 0.0)[:, None] + partner * tl.load(sin + d, there, 0.0)[:, None]
