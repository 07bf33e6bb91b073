"""Split-KV: which tokens of a sequence each program of a decode step reads; and prefetching them into L2.

Full-precision slots and then tiles are one range, measured in blocks. n_split programs divide it evenly, at
the beginnings of blocks: none has more than a block above the mean, and the one at the border has slots and tiles. All
is computed from the number of tokens, in every program of `split_kernel` for itself; those of `combine_kernel` compute
the same to know which partial results were written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.kernels.basics import TILE, prefetch

MOST_HALVED = tl.constexpr(384)  # the most tokens in tiles a program for which blocks are halved (LOG.md, 2026-11-26)


@triton.jit
def count_left(n_token, sink_size, window_size):
    """How many of a sequence's n_token tokens are in tiles: as `Regions.n_left` has it."""
    return tl.maximum(n_token.to(tl.int32) - sink_size - window_size, 0) // TILE * TILE


@triton.jit
def slots_in_use(n_token, n_left, sink_size, n_slot, BLOCK: tl.constexpr, HAS_INT: tl.constexpr):
    """The slots to go through in blocks, in the order of memory, for a sequence of n_token tokens, n_left of them in
    tiles; without tiles (HAS_INT) what does not fit n_slot slots is gone.

    Of the ring's slots up to 127 hold tokens that are in a tile by now. They are one gap, or, where the live ones do
    not reach round the ring's end, a gap and what is behind the last. Blocks that lie in the gap are not read; what is
    left of it in others is masked. Returns the end of the slots in use, the ring's `oldest` place, and the gap's first
    slot and size in whole blocks: see `past_gap`. As long as n_left is 0 there is no gap.
    """
    end = tl.minimum(n_token, n_slot).to(tl.int32)
    oldest, gap, n_gap = end * 0, end * 0, end * 0
    if HAS_INT:
        oldest = (n_left.to(tl.uint32) % (n_slot - sink_size).to(tl.uint32)).to(tl.int32)
        behind = oldest + n_token.to(tl.int32) - n_left  # the newest token's slot + 1, if the ring had no end
        end = tl.minimum(behind, n_slot)
        gap = tl.cdiv(sink_size + tl.maximum(behind - n_slot, 0), BLOCK) * BLOCK
        n_gap = tl.maximum((sink_size + oldest) // BLOCK * BLOCK - gap, 0)
    return end, oldest, gap, n_gap


@triton.jit
def past_gap(at, gap, n_gap):
    """The slot at place `at` of those that remain without the gap; at and gap: beginnings of blocks."""
    return at + tl.where(at >= gap, n_gap, 0)


@triton.jit
def tile_blocks(n_left, n_split, BLOCK: tl.constexpr, HAS_INT: tl.constexpr, HALVES: tl.constexpr):
    """How many tokens a block of tiles has, and how many blocks the n_left tokens in tiles are.

    HALVES: whether a block is half of BLOCK when each program has few tokens (MOST_HALVED). Long blocks take fewer
    instructions a token, but a program takes whole blocks, and short ones are shared more evenly.
    """
    block, n_blocks = n_left * 0 + BLOCK, n_left * 0
    if HAS_INT:
        n_blocks = n_left // BLOCK
    if HALVES:
        few = n_left <= n_split * MOST_HALVED
        block = tl.where(few, BLOCK // 2, BLOCK)
        n_blocks = tl.where(few, 2 * n_blocks, n_blocks)
    return block, n_blocks


@triton.jit
def partition(n_used, int_blocks, n_split, FLOAT_BLOCK: tl.constexpr):
    """What n_split programs share of a sequence: one range of work, n_used slots (`slots_in_use`, without the gap)
    before int_blocks blocks of tiles.

    Program s takes blocks s * each to (s + 1) * each - 1 of it, see `first_blocks`. A block of slots and one of a tile
    count alike: by tokens the latter would be 2 to 4, but the program with slots then ends last: it has two loops to
    start, and a slot has 2 to 4 times the bytes (LOG.md, 2026-11-26: 1 x 32k took 10% longer). Returns `each`
    and the number of the slots' blocks. Exact while the whole range is below 2**29. As long as there are no tiles,
    `each` does not depend on the number of slots: the shares are the full cache's.
    """
    float_blocks = tl.cdiv(n_used, FLOAT_BLOCK)
    work = float_blocks + int_blocks
    each = ((work + n_split - 1).to(tl.uint32) // n_split.to(tl.uint32)).to(tl.int32)  # unsigned: half as long
    return each, float_blocks


@triton.jit
def first_blocks(split, each, float_blocks, int_blocks):
    """Where the shares of `split` and of all programs after it begin: a block of slots and a block of tiles."""
    at = split * each
    return tl.minimum(at, float_blocks), tl.minimum(tl.maximum(at - float_blocks, 0), int_blocks)


@triton.jit
def written(entry, each, float_blocks, int_blocks):
    """Whether a partial result stands at `entry`: that of the slots of program `entry` or of the tiles of the one
    before. There are never both: tiles come after all slots. `combine_kernel` has no time for more than this.
    """
    at = entry * each
    slots = (entry >= 0) & (at < float_blocks)
    return slots | ((int_blocks > 0) & (at > float_blocks) & (at - each < float_blocks + int_blocks))


@triton.jit
def fetch(start, end, N_BYTES: tl.constexpr):
    """Prefetch about N_BYTES from `start` on into L2, nothing from `end` on. start, end: pointers."""
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(N_BYTES, 128))
    prefetch(tl.minimum(start.to(tl.int64) + tl.arange(0, LINES) * 128, end.to(tl.int64) - 1))
