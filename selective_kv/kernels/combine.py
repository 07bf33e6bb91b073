"""Split-KV's second launch: the partial results of a decode step's splits become one output.

Each warp of `split_kernel` (decode.py) has left its largest score, its sum of weights and its weighted sum of values.
Here they are rescaled to a common largest score, added up and normalised (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from selective_kv.kernels.basics import in_order
from selective_kv.kernels.hadamard import butterfly
from selective_kv.kernels.split_kv import count_left, partition, slots_in_use, tile_blocks, written

# Runtime integers that Triton must not specialise on (1, multiples of 16): one binary serves all values.
COUNTS = ("group", "sink_size", "window_size", "n_slot", "n_split")


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    partial, statistics, positions, out, group, sink_size, window_size, n_slot, n_split,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, FLOAT_BLOCK: tl.constexpr,
    INT_BLOCK: tl.constexpr, CHUNK: tl.constexpr, DIMS: tl.constexpr, HAS_INT: tl.constexpr, HALVES: tl.constexpr,
    V_LATER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (KV head, sequence, query head of the group and block of DIMS dims): reduce the partial results.

    out: [sequence, query head, HEAD_DIM]. CHUNK: at least (n_split + 1) * WARPS. One warp: a barrier would cost more
    than further warps save. Only what follows the PDL wait is on the critical path, so masks and addresses are computed
    before it, and loads have no mask: in place of an entry that was not written they read entry 0, with weight 0.
    """
    BLOCKS: tl.constexpr = HEAD_DIM // DIMS
    kv_head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    member, block = tl.program_id(2) // BLOCKS, tl.program_id(2) % BLOCKS
    n_token = tl.load(positions + batch) + 1
    n_left = count_left(n_token, sink_size, window_size)
    slot_end, _, _, n_gap = slots_in_use(n_token, n_left, sink_size, n_slot, FLOAT_BLOCK, HAS_INT)
    _, int_blocks = tile_blocks(n_left, n_split, INT_BLOCK, HAS_INT, HALVES)
    each, float_blocks = partition(slot_end - n_gap, int_blocks, n_split, FLOAT_BLOCK)
    entry = tl.arange(0, CHUNK)
    split = entry // WARPS
    wrote = written(split, each, float_blocks, int_blocks) & (split <= n_split)
    column = (batch * tl.num_programs(0) + kv_head) * COLUMNS + member // HEADS
    at = column * (n_split + 1) * WARPS * HEADS + member % HEADS
    entry = tl.where(wrote, entry, 0)[:, None] * HEADS  # program 0 has a slot if any has
    d = tl.arange(0, DIMS)[None, :]
    partial += at * HEAD_DIM + block * DIMS + (entry * HEAD_DIM + d)
    statistics += at * 2 + (entry * 2 + tl.arange(0, 2)[None, :])
    out += ((batch * tl.num_programs(0) + kv_head) * group + member) * HEAD_DIM + block * DIMS
    row = tl.arange(0, triton.cdiv(128, DIMS))[:, None]  # as many as make the layout of `partial`, which y has
    to = out + row * 0 + d
    if n_token <= 0:  # a sequence without a token: zeros, and there is nothing to read
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        tl.store(to, tl.zeros(to.shape, out.dtype.element_ty), row == 0)
        return
    if OVERLAP:
        if each >= 0:  # always true: it makes the compiler compute `each` before the PDL wait
            gdc_wait()
        # PDL trigger only now: the next launch would take SM residency and memory bandwidth from the splits.
        gdc_launch_dependents()
    best, weights = tl.split(tl.load(statistics))
    values = tl.load(partial)
    # Of integers a warp finds the largest in one instruction, of floats in five exchanges.
    top = in_order(tl.max(in_order(best.to(tl.int32, bitcast=True)), 0)).to(tl.float32, bitcast=True)
    factor = tl.where(wrote, tl.exp2(best - top), 0.0)
    y = tl.sum(values * factor[:, None], 0)
    if V_LATER > 1:  # without tiles there is nothing rotated, and the result is the full cache's
        y = tl.where(int_blocks > 0, butterfly(y, V_LATER, 1), y)
    y *= 1.0 / tl.sum(weights * factor, 0)
    tl.store(to, tl.broadcast_to(y[None, :], to.shape).to(out.dtype.element_ty), row == 0)
