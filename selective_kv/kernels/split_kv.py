"""Split-KV: which tokens of a sequence each program of a decode step reads; and prefetching them into L2.

Full-precision slots and then tiles are one range, measured in blocks. n_split programs divide it evenly, at
the beginnings of blocks: none has more than a block above the mean, and the one at the border has slots and tiles. All
is computed from the number of tokens, in every program of `split_kernel` for itself; those of `combine_kernel` compute
the same to know which partial results were written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.kernels.basics import prefetch

TILE = tl.constexpr(128)


@triton.jit
def count_left(n_token, sink_size, window_size):
    """How many of a sequence's n_token tokens are in tiles: as `Regions.n_left` has it."""
    return tl.maximum(n_token.to(tl.int32) - sink_size - window_size, 0) // TILE * TILE


@triton.jit
def partition(
    n_token, n_left, n_slot, n_split,
    FLOAT_BLOCK: tl.constexpr, INT_BLOCK: tl.constexpr, HAS_INT: tl.constexpr,
):  # fmt: skip
    """What n_split programs share of a sequence of n_token tokens: one range of work, slots before tiles.

    n_left: tokens in tiles, a multiple of INT_BLOCK; without tiles (HAS_INT) what does not fit n_slot slots is gone.
    Program s takes blocks s * each to (s + 1) * each - 1 of it, see `first_blocks`. A block of slots and one of a tile
    count alike: by tokens the latter would be 2 to 4, but the program with slots then ends last: it has two loops to
    start, and a slot has 2 to 4 times the bytes (LOG.md, 2026-11-26: 1 x 32k took 10% longer). Returns each, the number
    of slots in use (where there are tiles, of all: those whose tokens are in a tile by now are masked), of their blocks
    and of the tiles' blocks. Exact while the whole range is below 2**29. As long as there are no tiles, `each` does not
    depend on n_slot: the shares are the full cache's.
    """
    n_full = tl.minimum(n_token, n_slot).to(tl.int32)
    int_blocks = n_full * 0
    if HAS_INT:
        int_blocks = n_left // INT_BLOCK
    float_blocks = tl.cdiv(n_full, FLOAT_BLOCK)
    work = float_blocks + int_blocks
    each = ((work + n_split - 1).to(tl.uint32) // n_split.to(tl.uint32)).to(tl.int32)  # unsigned: half as long
    return each, n_full, float_blocks, int_blocks


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
